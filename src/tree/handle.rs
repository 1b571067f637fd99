//! Open files and directories.
//!
//! A handle owns what its operations need, so none of them looks anything up by name: a snapshot
//! handle holds the snapshot (its data stays, T3), an image handle the volume or the clone, a status
//! handle the bytes rendered when it was opened, a directory handle its listing.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::error;
use crate::image::Image;
use crate::image::clone::CloneImage;
use crate::image::live::LiveImage;
use crate::image::rewrite::{Rewrite, Target};
use crate::tree::diffs::{DiffHandle, DiffNode};
use crate::tree::types::{DirEntry, HandleId, NodeId, Result, TreeError};
use crate::volume::{Snapshot, Zeroing};

/// Most handles open at once; each is small, the limit only bounds a runaway program.
pub const HANDLES_MAX: usize = 1 << 16;

/// What can be written: the live volume or a clone.
pub(super) enum Content {
    Live(LiveImage),
    Clone(CloneImage),
}

impl Content {
    fn image(&self) -> &dyn Image {
        match self {
            Content::Live(live) => live,
            Content::Clone(clone) => clone,
        }
    }

    pub fn zero(&self, offset: u64, len: u64, how: Zeroing) -> error::Result<()> {
        match self {
            Content::Live(live) => live.zero(offset, len, how),
            Content::Clone(clone) => clone.zero(offset, len, how),
        }
    }

    pub fn flush(&self) -> error::Result<()> {
        match self {
            Content::Live(live) => live.flush(),
            Content::Clone(clone) => clone.flush(),
        }
    }

    /// Makes what still grows large enough for something that ends at `end`.
    pub fn grow_to(&self, end: u64) -> error::Result<()> {
        match self {
            Content::Live(_) => Ok(()),
            Content::Clone(clone) => clone.grow_to(end),
        }
    }

    /// The clone that still has no fixed size.
    pub fn growing(&self) -> Option<&CloneImage> {
        match self {
            Content::Clone(clone) if clone.is_growing() => Some(clone),
            Content::Live(_) | Content::Clone(_) => None,
        }
    }
}

impl Image for Content {
    fn size(&self) -> u64 {
        self.image().size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> error::Result<()> {
        self.image().read_at(offset, buf)
    }

    fn next_data(&self, offset: u64) -> error::Result<Option<u64>> {
        self.image().next_data(offset)
    }

    fn next_hole(&self, offset: u64) -> error::Result<u64> {
        self.image().next_hole(offset)
    }
}

impl Target for Content {
    fn write_at(&self, offset: u64, data: &[u8], compare: bool) -> error::Result<()> {
        match self {
            Content::Live(live) => live.write_at(offset, data, compare),
            Content::Clone(clone) => clone.write_at(offset, data, compare),
        }
    }

    fn discard(&self, offset: u64, len: u64) -> error::Result<()> {
        self.zero(offset, len, Zeroing::Discard)
    }
}

/// An open `live.img` or clone.
pub(super) struct ImageHandle {
    pub content: Content,
    pub node: NodeId,
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
    Image(ImageHandle),
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

    /// The clone of a node, if it is open.
    pub fn open_clone(&self, node: NodeId) -> Option<CloneImage> {
        self.find_image(|h| match &h.content {
            Content::Clone(clone) if h.node == node => Some(clone.clone()),
            Content::Clone(_) | Content::Live(_) => None,
        })
    }

    /// Whether anybody has this image open for writing.
    pub fn has_writers(&self, node: NodeId) -> bool {
        self.find_image(|h| (h.node == node && h.writable).then_some(()))
            .is_some()
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

    fn find_image<T>(&self, pick: impl Fn(&ImageHandle) -> Option<T>) -> Option<T> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.values().find_map(|handle| match &**handle {
            Handle::Image(h) => pick(h),
            _ => None,
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
