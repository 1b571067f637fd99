//! What is fuzzed: functions from bytes to a verdict, and the valid inputs that mutations begin from.
//!
//! A function takes any bytes, panics if the product does what it must not, and else
//! says how far the bytes got. What stands behind a checksum is reached because the inputs are
//! taken apart and the checksums made right by the target itself, unless a flag in the input asks for
//! wrong ones.
//!
//! Files: [`bytes`] reading and writing inputs; [`disk`] files in memory; [`store`] a valid store that all
//! seeds come from; one file for each target.

pub mod bytes;
#[cfg(feature = "planted")]
pub mod catalog;
pub mod control;
pub mod disk;
pub mod fuse;
pub mod log;
pub mod map;
pub mod names;
pub mod store;
pub mod superblock;

/// One thing to fuzz.
pub struct Target {
    /// Its name, as `STILLFRAME_FUZZ_TARGET` takes it.
    pub name: &'static str,
    /// Valid inputs.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Feeds an input; says how far it got, one of `reaches`.
    pub run: fn(&[u8]) -> &'static str,
    /// Every verdict: a run of many inputs must see each of them.
    pub reaches: &'static [&'static str],
    /// Pieces that mutations put into inputs.
    pub tokens: &'static [&'static [u8]],
    /// Longest input of a mutation.
    pub max_len: usize,
    /// Executions that share state, from a multiple of this number on; 1: each stands for itself.
    pub group: u64,
    /// Ends what a group shares and looks at how it ends.
    pub reset: fn(),
}

/// For targets whose executions share nothing.
pub fn nothing() {}

/// All of them, the slowest last. The catalogue's readers are private: their door is only in a build with the
/// feature that tests have.
pub static ALL: &[Target] = &[
    control::TARGET,
    #[cfg(feature = "planted")]
    catalog::TARGET,
    superblock::TARGET,
    names::TARGET,
    map::TARGET,
    fuse::TARGET,
    log::TARGET,
];
