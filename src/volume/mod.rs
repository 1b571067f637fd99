//! The engine: volumes, snapshots, copy-before-write, recovery.
//!
//! Definitions. A volume's *source* S holds its current content. The *thin target* is the log L. A
//! *point* is a snapshot that is listed, being taken, or deleted but still open. A grain *needs
//! preserving* if it was not preserved at or after the newest point.
//!
//! Invariants, cited by number in code and tests:
//! - I1 Undo before overwrite: the old content of a grain and its record are durable in L before any
//!   new byte of the grain is handed to the kernel for S.
//! - I2 Acknowledged survives a killed daemon: an acknowledged write is in a kernel page cache.
//! - I3 Flushed survives power loss: `flush` answers only after S is durable.
//! - I4 The extent map and the bitmaps are functions of L.
//! - I5 A changed-block bitmap is a superset of what changed on the medium.
//! - I6 An acknowledged snapshot never changes again; so taking one makes S durable.
//! - I7 A failed sync is never repeated as proof: the volume is suspect until reopened or accepted.
//!
//! Locks, in the order in which they may be taken: `structure` (one catalogue change at a time),
//! the gates of volumes by number (writers share, a snapshot excludes), a volume's `reads` (readers of
//! the live content share, a resize and a revert exclude), a range of grains, then the log's own, `catalog`, a volume's `state`, the map's own. None of the last three is held over I/O.

pub mod audit;
mod bookmarks;
mod catalog;
mod clone_records;
mod clone_write;
mod clones;
mod diffs;
mod engine;
mod facts;
#[cfg(feature = "planted")]
pub mod fuzzing;
mod heal;
mod layers;
mod live;
mod marks;
mod overlay;
mod range_lock;
mod read;
mod reclaim;
mod recovery;
mod resize;
mod revert;
mod revert_groups;
mod scrub;
mod shared;
mod snapshots;
mod space;
mod sums;
mod thin;
mod tracking;
mod verify;
mod vigil;

pub use crate::volume::clones::OpenClone;
pub use crate::volume::diffs::{DIFF_RUNS_MAX, Diff, DiffPoint};
pub use crate::volume::engine::Engine;
pub use crate::volume::facts::{
    BookmarkInfo, CloneInfo, Environment, OnFull, Reverted, Settings, SnapshotInfo, SnapshotState,
    Sources, ThinInfo, VolumeInfo, VolumeOptions, VolumeState, Zeroing,
};
pub use crate::volume::live::Volume;
pub use crate::volume::read::Snapshot;
pub use crate::volume::scrub::{ScrubOptions, ScrubState};
pub use crate::volume::verify::Share;
