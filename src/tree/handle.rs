//! Open files and directories.
//!
//! A handle owns what its operations need, so none of them looks anything up by name: a snapshot
//! handle holds the snapshot (its data stays, T3), a live handle the volume, a status handle the
//! bytes rendered when it was opened, a directory handle its listing.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::image::Image;
use crate::image::live::LiveImage;
use crate::image::rewrite::Rewrite;
use crate::tree::diffs::{DiffHandle, DiffNode};
use crate::tree::types::{DirEntry, HandleId, NodeId, Result, TreeError};
use crate::volume::Snapshot;

/// Most handles open at once; each is small, the limit only bounds a runaway program.
pub const HANDLES_MAX: usize = 1 << 16;

/// An open `live.img`.
pub(super) struct LiveHandle {
    pub image: LiveImage,
    /// Opened for writing.
    pub writable: bool,
    /// Opened with O_TRUNC.
    pub rewrite: Option<Rewrite>,
    /// Content was changed through this handle since its last flush.
    pub dirty: AtomicBool,
}

/// An open snapshot.
pub(super) struct SnapshotHandle {
    pub snapshot: Arc<Snapshot>,
    pub node: NodeId,
    /// The process whose CREATE took the snapshot, in the handle of that CREATE: while it is open,
    /// this process may "set" times. Another's touch must fail: it took nothing.
    pub creator: Option<u32>,
}

/// What a handle stands for.
pub(super) enum Handle {
    Live(LiveHandle),
    Snapshot(SnapshotHandle),
    Status(Vec<u8>),
    /// A diff as qcow2.
    Diff(DiffHandle),
    /// A diff as JSON, rendered when it was opened.
    DiffJson {
        node: DiffNode,
        bytes: Vec<u8>,
    },
    Directory {
        node: NodeId,
        listing: Mutex<Vec<DirEntry>>,
    },
}

/// The table of open handles.
#[derive(Default)]
pub(super) struct Handles {
    /// Guarded together, so that a number is never given twice.
    open: RwLock<HashMap<u64, Arc<Handle>>>,
    next: AtomicU64,
}

impl Handles {
    pub fn insert(&self, handle: Handle) -> Result<HandleId> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if open.len() >= HANDLES_MAX {
            return Err(TreeError::TooManyOpen);
        }
        // From 1: 0 is what a request without a handle carries.
        let id = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        open.insert(id, Arc::new(handle));
        Ok(HandleId(id))
    }

    pub fn get(&self, id: HandleId) -> Result<Arc<Handle>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.get(&id.0).cloned().ok_or(TreeError::BadHandle)
    }

    /// Takes a handle out; what it held is freed by the caller's drop, outside the lock.
    pub fn remove(&self, id: HandleId) -> Result<Arc<Handle>> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        open.remove(&id.0).ok_or(TreeError::BadHandle)
    }

    pub fn len(&self) -> usize {
        self.open
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    /// Any open handle of a snapshot node.
    pub fn open_snapshot(&self, node: NodeId) -> Option<Arc<Snapshot>> {
        self.find_snapshot(|h| (h.node == node).then(|| Arc::clone(&h.snapshot)))
    }

    /// Whether the CREATE by which this process took the snapshot is still open.
    pub fn is_creator(&self, node: NodeId, process: u32) -> bool {
        self.find_snapshot(|h| (h.node == node && h.creator == Some(process)).then_some(()))
            .is_some()
    }

    /// An open diff whose ends may have lost their names.
    pub fn open_diff(&self, id: NodeId) -> Option<DiffNode> {
        let (node, _) = self.find_diff(id)?;
        Some(DiffNode {
            linked: false,
            ..node
        })
    }

    /// Bytes of an open diff.
    pub fn open_diff_size(&self, id: NodeId) -> Option<u64> {
        self.find_diff(id).map(|(_, size)| size)
    }

    fn find_diff(&self, id: NodeId) -> Option<(DiffNode, u64)> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.values().find_map(|handle| {
            let (node, size) = match &**handle {
                Handle::Diff(h) => (&h.node, h.image.size()),
                Handle::DiffJson { node, bytes } => (node, bytes.len() as u64),
                _ => return None,
            };
            (node.id().ok()? == id).then(|| (node.clone(), size))
        })
    }

    fn find_snapshot<T>(&self, pick: impl Fn(&SnapshotHandle) -> Option<T>) -> Option<T> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.values().find_map(|handle| match &**handle {
            Handle::Snapshot(h) => pick(h),
            _ => None,
        })
    }
}
