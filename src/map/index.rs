//! What the extent map needs of its index: ordered keys, small values, batches, one checkpoint.
//!
//! The index is derived data. It may lose everything since the last [`Index::checkpoint`], or lose
//! any subset of the batches since; it may never hold a key that was not put.

use std::sync::Arc;

use crate::error::Result;

/// A put (`Some`) or a removal (`None`) of one key.
pub type Change = (Vec<u8>, Option<Vec<u8>>);

/// The longest value in bytes. Twins assert it: a longer one is a mistake of the caller.
pub const VALUE_MAX: usize = 96 << 10;

/// The longest key in bytes.
pub const KEY_MAX: usize = 24;

/// Asserts the limits of every key and value of a batch.
///
/// # Panics
/// If one is over its limit.
pub fn assert_limits(changes: &[Change]) {
    for (key, value) in changes {
        assert!(
            !key.is_empty() && key.len() <= KEY_MAX,
            "a key of {} bytes",
            key.len()
        );
        let len = value.as_ref().map_or(0, Vec::len);
        assert!(len <= VALUE_MAX, "a value of {len} bytes");
    }
}

/// An ordered map from short keys to values of at most [`VALUE_MAX`] bytes.
pub trait Index: Send + Sync {
    /// The value of a key.
    ///
    /// # Errors
    /// `Damaged` or `Io`.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>>;

    /// Up to `limit` pairs with `from <= key < to`, ascending.
    ///
    /// # Errors
    /// `Damaged` or `Io`.
    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>>;

    /// Applies changes; not durable before the next checkpoint.
    ///
    /// # Errors
    /// `Io` or `NoSpace`; any of the changes may have been applied.
    fn apply(&self, changes: Vec<Change>) -> Result<()>;

    /// Makes everything applied durable.
    ///
    /// # Errors
    /// `Io` or `NoSpace`: nothing applied since the last success may be relied on.
    fn checkpoint(&self) -> Result<()>;
}

/// Where an index lives: opens it, and gets it out of the way when it is not to be trusted.
pub trait IndexHome: Send + Sync {
    /// Opens the index, empty if there is none.
    ///
    /// # Errors
    /// Whatever makes it unusable; the caller then calls [`IndexHome::set_aside`] and opens again.
    fn open(&self) -> Result<Arc<dyn Index>>;

    /// Removes or renames the index, so that the next open starts empty.
    ///
    /// # Errors
    /// `Io`.
    fn set_aside(&self) -> Result<()>;

    /// Removes the index, which nobody has open, so that the next open starts empty and nothing is left
    /// of it: for one that is out of date for a reason that is known.
    ///
    /// # Errors
    /// `Io`; it is then removed, set aside, or as it was.
    fn discard(&self) -> Result<()>;
}
