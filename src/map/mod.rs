//! The extent map: which preserved copy, if any, serves a grain for a snapshot.
//!
//! Rule: **the smallest epoch >= s that preserved g, else the source.** The map decides and moves no
//! bytes; it knows places in the log as numbers and never opens it. It is derived data: the log can
//! rebuild it at any time, so whatever looks wrong here is an error of kind `Damaged`, never a guess.
//!
//! Words: a *page* holds what one epoch preserved in one region ([`page`]); the *sets* of an epoch
//! say which grains were preserved or changed in it ([`bitmaps`]); the *delta* is what was published
//! since the last checkpoint and is in memory only ([`extents`]).
//!
//! What holds, whatever is cut or fails (numbers are cited by code and tests):
//!
//! - **M1** For one (grain, epoch) the first record wins; publishing a record again changes nothing.
//! - **M2** [`extents::ExtentMap::plan`] answers from every record published before it was called.
//! - **M3** The durable index covers every record up to its `Applied`, and may hold any part of later
//!   ones. Replaying the log from `Applied` gives the same answers as if nothing had been cut.
//! - **M4** A record is *dead* when no live epoch lies in (its grain's previous preserving epoch, its
//!   own epoch]. Dead is for ever, and no live snapshot's plan ever names a dead record; so dead
//!   records may stay, go, or come back by replay without changing an answer.
//! - **M5** For every live s, what the sets call preserved since s is what the pages since s hold. So
//!   a lost page is noticed: `plan` answers `Damaged` instead of the source.
//!
//! Locks: `writer` (one at a time writes to the index: checkpoint, sweep, forget), then `state`
//! (memory only; never held while the index is read or written). Publishing and planning take only
//! `state`.
//!
//! Files: [`index`] what a key-value store must do; [`memory`] its twin with power cuts;
//! [`sled_index`] the real one; [`transient`] one for a full disk; [`keys`], [`page`], [`bitmaps`] what is stored; [`extents`] the public face, whose
//! parts are `state`, `plan`, `checkpoint` and `sweep`.

pub mod bitmaps;
mod checkpoint;
pub mod extents;
pub mod index;
pub mod keys;
pub mod mask;
pub mod memory;
pub mod page;
mod plan;
pub mod sled_index;
mod state;
mod sweep;
#[cfg(test)]
mod tests;
pub mod transient;

pub use crate::map::bitmaps::GrainSet;
pub use crate::map::extents::{Applied, ExtentMap, Publish, Published, Run, RunKind};
