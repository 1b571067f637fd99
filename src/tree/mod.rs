//! Names to nodes: what the mount shows, what each file operation does, and what it refuses.
//!
//! ```text
//! /                        1
//!   .stillframe/           2   status.json 3, metrics.prom 4
//!   <volume>/              ino_base
//!     live.img             ino_base + 1
//!     snapshots/           ino_base + 2
//!       <name>.img         SnapshotInfo.ino
//!     clones/              ino_base + 3
//!       <name>.img         CloneInfo.ino
//!     diffs/               ino_base + 4
//!       <a>..<b>.qcow2     from the numbers of both snapshots, bit 63 set
//!       <a>..<b>.json      the same, bit 62 set too
//! ```
//!
//! `docs/semantics.md` states every operation on every node, one sentence a line; this module is
//! that document in code. No FUSE types here: `fuse` translates requests into these calls.
//!
//! Invariants:
//! - T1: catalogue changes (take, delete, rename) and flushes are durable when the call returns.
//! - T2: nothing but a write, a zeroing, a rewrite or a copy through a handle of `live.img` or a clone
//!   changes content, and of `live.img` a revert and a resize, which are asked for by name.
//! - T3: an open snapshot stays readable, with the same bytes, after it is renamed or deleted; an open
//!   clone stays usable.
//! - T4: a node is never shown under a number that belonged to another one: what the kernel still
//!   knows under an old number answers `NotFound`.
//! - T5: a handle that wrote is flushed to durability when it is flushed, before the answer.
//!
//! Locks: the node table and the handle table, each for a lookup or a change only, never across a
//! call into the engine; the listing of an open directory, around both. All methods may be called
//! from any thread.

mod attr;
mod change;
mod clones;
mod diffs;
mod directory;
mod file;
#[cfg(test)]
pub(crate) mod fixture;
mod handle;
mod node;
#[cfg(test)]
mod tests;
mod types;
mod xattr;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::volume::Engine;

use change::Watch;
use diffs::Computed;
use handle::Handles;
use node::Nodes;

pub use handle::HANDLES_MAX;
pub use node::{CONTROL, METRICS_FILE, ROOT, STATUS_FILE, volume_directory};
pub use types::{
    Attr, Caching, DirEntry, FileKind, HandleId, NodeId, OpenFlags, Opened, RenameMode, Result,
    Seek, SetAttr, SpaceChange, StatusFile, StatusSource, TreeError,
};

/// Preferred size of a read, shown as `st_blksize`: cp reads in pieces of this size.
pub const BLOCK_SIZE: u32 = 1 << 20;

/// The file tree over an engine.
pub struct Tree {
    engine: Arc<Engine>,
    status: Arc<dyn StatusSource>,
    uid: u32,
    gid: u32,
    nodes: Nodes,
    handles: Handles,
    computed: Computed,
    /// Listings with attributes that were asked for.
    told: AtomicU64,
    changed: Watch,
}

impl Tree {
    /// A tree that shows the engine's volumes, owned by one user.
    pub fn new(engine: Arc<Engine>, uid: u32, gid: u32, status: Arc<dyn StatusSource>) -> Tree {
        Tree {
            engine,
            status,
            uid,
            gid,
            nodes: Nodes::default(),
            handles: Handles::default(),
            computed: Computed::default(),
            told: AtomicU64::new(0),
            changed: Watch::default(),
        }
    }

    /// Number of open handles, for status.
    pub fn open_handles(&self) -> usize {
        self.handles.len()
    }

    /// How often a part of a listing with attributes was asked for, since the tree was made.
    pub fn listings_with_attributes(&self) -> u64 {
        self.told.load(Ordering::Relaxed)
    }
}
