//! The log: the truth of a store, append-only, self-describing, checksummed.
//!
//! `record` says what is said, `batch` and `segment` how it lies on the medium, `commit` writes
//! into files that `room` makes, `scan` reads, `superblock` says whose it is. `docs/format.md` draws the bytes. This layer decides
//! nothing: what a record means for a volume is the business of `volume`.

pub mod batch;
pub mod codec;
pub mod commit;
pub mod keys;
pub mod record;
pub mod room;
pub mod scan;
pub mod segment;
pub mod superblock;
#[cfg(test)]
mod tests;
