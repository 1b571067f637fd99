//! What the engine is told and what it tells: environment, settings, facts about volumes and
//! snapshots. Plain data.

use std::sync::Arc;

use crate::error::Result;
use crate::map::index::IndexHome;
use crate::sys::clock::Clock;
use crate::sys::disk::{Dir, Disk};
use crate::units::{Epoch, Grain, Name, Uuid, VolumeId};

/// Opens sources; the real one checks, locks and refuses, see `sys::source`.
pub trait Sources: Send + Sync {
    /// Opens and locks a source for reading and writing.
    ///
    /// # Errors
    /// `NotFound`, `Permission`, `Busy` (locked by another), `Invalid` (a directory, inside a
    /// Stillframe mount), `Io`.
    fn open(&self, path: &str) -> Result<Arc<dyn Disk>>;

    /// What an open source's path names by now, if that is not the source; `None` if it is, or where
    /// nobody but us can change it.
    ///
    /// # Errors
    /// The system's error.
    fn astray(&self, _path: &str, _disk: &dyn Disk) -> Result<Option<String>> {
        Ok(None)
    }
}

/// Everything outside that the engine uses.
#[derive(Clone)]
pub struct Environment {
    /// The store directory; the caller holds its lock.
    pub dir: Arc<dyn Dir>,
    /// Where the extent map's index lives.
    pub index: Arc<dyn IndexHome>,
    /// Opens sources.
    pub sources: Arc<dyn Sources>,
    /// Time and randomness.
    pub clock: Arc<dyn Clock>,
}

/// Settings of an opened store.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Bytes of cached map pages.
    pub map_cache_bytes: usize,
    /// Bytes of a log segment, only used when the store is created.
    pub segment_bytes: u64,
    /// Bytes of log after which `maintain` writes a checkpoint.
    pub checkpoint_bytes: u64,
    /// Bytes of the ballast; 0 for none.
    pub ballast_bytes: u64,
    /// Calls of `maintain` for which a part of a clone must not have been written before it gets
    /// checksums.
    pub settle_rounds: u32,
    /// Most bytes that the log and the clones may use, if there is a limit: beyond it the thin
    /// target counts as full. What needs no payload (deletions, marks of failure, new snapshots)
    /// still gets through.
    pub limit_bytes: Option<u64>,
    /// The store is a copy: a source of which it cannot be told that nobody wrote to it since is taken for
    /// changed.
    pub copied: bool,
}

/// How much of the thin target is used, and how fast that grows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThinInfo {
    /// Bytes that the log and the clones use.
    pub used: u64,
    /// The limit, if there is one.
    pub limit: Option<u64>,
    /// Bytes that it may still grow by: what the filesystem or the limit has left, whichever is less.
    pub free: u64,
    /// Bytes by which it grew in an hour; below zero if it shrank. `None` until enough was seen.
    pub growth: Option<i64>,
    /// Seconds over which the growth was measured.
    pub measured_s: u64,
    /// Seconds until it is full if it goes on like that; `None` if it does not grow or is not known.
    pub full_in_s: Option<u64>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            map_cache_bytes: 32 << 20,
            segment_bytes: 64 << 20,
            checkpoint_bytes: 64 << 20,
            ballast_bytes: 8 << 20,
            settle_rounds: 5,
            limit_bytes: None,
            copied: false,
        }
    }
}

/// What to do with a writer when the thin target is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFull {
    /// The writer gets the error, every snapshot lives.
    FailWrite,
    /// The writer goes on, the snapshots concerned fail.
    FailSnapshot,
}

/// Choices made when a volume is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VolumeOptions {
    /// Grain of tracking and preserving.
    pub grain: Grain,
    /// Policy for a full thin target.
    pub on_full: OnFull,
    /// Seconds to wait for space first.
    pub on_full_wait_s: u32,
}

impl Default for VolumeOptions {
    fn default() -> Self {
        VolumeOptions {
            grain: Grain::DEFAULT,
            on_full: OnFull::FailWrite,
            on_full_wait_s: 60,
        }
    }
}

/// How far a volume's content is known to be what we left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeState {
    /// All is known.
    Active,
    /// The last stop was unclean: identity and size match, the rest could not be checked. Works.
    Unverified,
    /// The source is not as we left it: reads of snapshots and writes are refused until `accept`.
    Changed(String),
    /// A sync of the source failed: flushes are refused until reopened or accepted.
    Suspect(String),
    /// The source cannot be opened; nothing of the volume can be read.
    Missing(String),
    /// A resize or revert was begun and could not be finished yet: the live content is neither read
    /// nor written; snapshots can be read. Asking for it again or opening the store finishes it.
    Unfinished(String),
}

/// Facts about a volume.
#[derive(Debug, Clone)]
pub struct VolumeInfo {
    /// What an operator should hear of although the volume works.
    pub notice: Option<String>,
    /// Number, unique in the store.
    pub id: VolumeId,
    /// Unique for ever.
    pub uuid: Uuid,
    /// Name.
    pub name: Name,
    /// Absolute path of the source.
    pub source: String,
    /// Bytes.
    pub size: u64,
    /// Grain.
    pub grain: Grain,
    /// State.
    pub state: VolumeState,
    /// First of 16 inode numbers that belong to the volume's own nodes.
    pub ino_base: u64,
    /// Last change of the content, ns since 1970.
    pub mtime_ns: i64,
    /// When it was added, ns since 1970.
    pub added_ns: i64,
    /// Bytes of the thin target that serve this volume's snapshots.
    pub used: u64,
    /// Bytes of the thin target that reclaim will give back.
    pub reclaimable: u64,
    /// Options.
    pub options: VolumeOptions,
}

/// Whether a snapshot can be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotState {
    /// Every byte is of its instant.
    Active,
    /// It could not be kept; every read answers `Failed`.
    Failed(String),
}

/// Facts about a snapshot.
#[derive(Debug, Clone)]
pub struct SnapshotInfo {
    /// Its volume's name.
    pub volume: Name,
    /// Name.
    pub name: Name,
    /// Unique for ever.
    pub uuid: Uuid,
    /// The epoch it opened.
    pub epoch: Epoch,
    /// Inode number.
    pub ino: u64,
    /// The instant, ns since 1970.
    pub taken_ns: i64,
    /// The volume's last change before the instant, ns since 1970 (rule in DESIGN section 2).
    pub mtime_ns: i64,
    /// Bytes of the volume at that instant.
    pub size: u64,
    /// Bytes of storage the volume's content used at that instant.
    pub allocated: u64,
    /// Bytes of the thin target that only this snapshot needs.
    pub unique: u64,
    /// State.
    pub state: SnapshotState,
    /// The snapshot before it at the time it was taken, if there was one.
    pub parent: Option<Uuid>,
    /// Shared by snapshots taken at one instant together.
    pub group: Option<Uuid>,
    /// On hold: it cannot be deleted.
    pub held: bool,
}

/// How a range is made zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeroing {
    /// Give the space back.
    Discard,
    /// Read as zero; space may stay.
    Zero,
}

/// Facts about a clone.
#[derive(Debug, Clone)]
pub struct CloneInfo {
    /// Its volume's name.
    pub volume: Name,
    /// Name, unique among the clones of the volume.
    pub name: Name,
    /// Unique for ever.
    pub uuid: Uuid,
    /// Inode number.
    pub ino: u64,
    /// When it was made, ns since 1970.
    pub created_ns: i64,
    /// Last change of its content, ns since 1970.
    pub mtime_ns: i64,
    /// Bytes.
    pub size: u64,
    /// Uuid of the snapshot at the bottom of its layers; `None` if it was made empty.
    pub base: Option<Uuid>,
    /// Name of that snapshot, unless it was deleted since.
    pub base_name: Option<Name>,
    /// Layers between it and that snapshot, its own included.
    pub layers: usize,
    /// Bytes of grains that lie in its own layer.
    pub own: u64,
    /// Whether it can be read and written.
    pub state: SnapshotState,
}

/// Facts about a bookmark: the instant of a snapshot that was deleted, from which changes are known.
#[derive(Debug, Clone)]
pub struct BookmarkInfo {
    /// Its volume's name.
    pub volume: Name,
    /// Name; unique among the snapshots and bookmarks of the volume.
    pub name: Name,
    /// Uuid of the snapshot it was.
    pub uuid: Uuid,
    /// The epoch that snapshot opened.
    pub epoch: Epoch,
    /// Inode number of the snapshot it was; never given again.
    pub ino: u64,
    /// The instant, ns since 1970.
    pub taken_ns: i64,
    /// The volume's last change before the instant, ns since 1970.
    pub mtime_ns: i64,
    /// Bytes of the volume at that instant.
    pub size: u64,
    /// Failed if what changed since is not known any more.
    pub state: SnapshotState,
}

/// What a revert did.
#[derive(Debug, Clone)]
pub struct Reverted {
    /// The snapshot that undoes it.
    pub undo: SnapshotInfo,
    /// Bytes of grains that differed and were written.
    pub written: u64,
}
