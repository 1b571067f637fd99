//! Operations on open files: read, write, flush, space changes, seeking for data and holes.
//!
//! A file answers like a disk of fixed size: reading stops at the end, a write is cut there, a
//! write that begins there is refused. A clone that still grows is the exception: it gets larger. What
//! was written through a handle is durable when a sync of any handle, or the flush of that handle, has
//! returned `Ok` (T5).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::error::Kind;
use crate::image::Image;
use crate::image::clone::CloneImage;
use crate::image::live::{LiveImage, fit};
use crate::image::rewrite::{Rewrite, Target};
use crate::tree::Tree;
use crate::tree::handle::{Content, Handle, ImageHandle, SnapshotHandle};
use crate::tree::node::{Node, live_node};
use crate::tree::types::{
    Caching, HandleId, NodeId, OpenFlags, Opened, Result, Seek, SpaceChange, TreeError,
};
use crate::volume::{CloneInfo, Zeroing};

impl Tree {
    /// Opens a file.
    ///
    /// # Errors
    /// `ReadOnly` for writing to what cannot be written; `Permission` for appending to an image;
    /// `IsDirectory`; `NotFound`; `TooManyOpen`; those of opening a snapshot.
    pub fn open(&self, id: NodeId, flags: OpenFlags) -> Result<Opened> {
        let node = self.resolve(id)?;
        let writes = flags.write || flags.truncate;
        if writes
            && matches!(
                node,
                Node::Status(_) | Node::Snapshot { .. } | Node::Diff(_)
            )
        {
            return Err(TreeError::ReadOnly);
        }
        let (handle, caching) = match node {
            Node::Live(v) => {
                let node = live_node(v.info.ino_base);
                let content = Content::Live(LiveImage::new(v.volume));
                (open_image(content, node, flags)?, Caching::None)
            }
            Node::Clone { info, linked } => {
                let content = Content::Clone(self.clone_image(&info, linked)?);
                (open_image(content, id, flags)?, Caching::None)
            }
            Node::Status(file) => (Handle::Status(self.status.render(file)?), Caching::None),
            Node::Snapshot { info, linked } => {
                let snapshot = if linked {
                    self.engine.open_snapshot(&info.volume, &info.name)?
                } else {
                    // Opened through /proc/<pid>/fd while another handle keeps it.
                    self.handles.open_snapshot(id).ok_or(TreeError::BadHandle)?
                };
                if snapshot.info().ino != id.0 {
                    // Renamed away between the two calls: the name now means another one.
                    return Err(TreeError::new(
                        Kind::NotFound,
                        "the snapshot was just renamed",
                    ));
                }
                let handle = SnapshotHandle {
                    snapshot,
                    node: id,
                    creator: None,
                };
                (Handle::Snapshot(handle), Caching::Immutable)
            }
            // Not cached: if an end fails, the file must.
            Node::Diff(diff) => (self.open_diff(*diff)?, Caching::None),
            Node::Root
            | Node::Control
            | Node::VolumeDirectory(_)
            | Node::Snapshots(_)
            | Node::Clones(_)
            | Node::Diffs(_) => return Err(TreeError::IsDirectory),
        };
        Ok(Opened {
            handle: self.handles.insert(handle)?,
            caching,
        })
    }

    /// Size of an open file in bytes.
    ///
    /// # Errors
    /// `BadHandle`; `IsDirectory`.
    pub fn size(&self, handle: HandleId) -> Result<u64> {
        match &*self.handles.get(handle)? {
            Handle::Image(h) => Ok(h.content.size()),
            Handle::Snapshot(h) => Ok(Image::size(&*h.snapshot)),
            Handle::Diff(h) => Ok(h.image.size()),
            Handle::Status(bytes) | Handle::DiffJson { bytes, .. } => Ok(bytes.len() as u64),
            Handle::Directory { .. } => Err(TreeError::IsDirectory),
        }
    }

    /// Reads up to `buf`'s length; less only at the end. Returns the bytes read.
    ///
    /// # Errors
    /// `BadHandle`; `IsDirectory`; `Failed` for a snapshot that could not be kept; `Damaged`, `Io`.
    pub fn read(&self, handle: HandleId, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let handle = self.handles.get(handle)?;
        let image: &dyn Image = match &*handle {
            Handle::Image(h) => &h.content,
            Handle::Snapshot(h) => &*h.snapshot,
            Handle::Diff(h) => {
                h.check()?;
                &h.image
            }
            Handle::Status(bytes) | Handle::DiffJson { bytes, .. } => {
                return Ok(read_bytes(bytes, offset, buf));
            }
            Handle::Directory { .. } => return Err(TreeError::IsDirectory),
        };
        let len = available(image.size(), offset, buf.len());
        if len > 0 {
            image.read_at(offset, &mut buf[..len])?;
        }
        Ok(len)
    }

    /// Writes; returns the bytes written, which are fewer only at the end. Acknowledged when this
    /// returns; durable then only if `durable` (O_DSYNC, O_SYNC).
    ///
    /// # Errors
    /// `PastEnd`; `ReadOnly`; `BadHandle`; `NoSpace` when the thin target is full; `Failed`, `Io`.
    pub fn write(
        &self,
        handle: HandleId,
        offset: u64,
        data: &[u8],
        durable: bool,
    ) -> Result<usize> {
        let handle = self.handles.get(handle)?;
        let open = writable(&handle)?;
        if data.is_empty() {
            return Ok(0);
        }
        let content = &open.content;
        let len = match content.growing() {
            Some(_) => data.len(),
            None => fit(content.size(), offset, data.len()).ok_or(TreeError::PastEnd)?,
        };
        let data = &data[..len];
        open.changing(|| match &open.rewrite {
            Some(rewrite) => rewrite.write(content, offset, data),
            None => content.write_at(offset, data, false),
        })?;
        if durable {
            content.flush()?;
        }
        Ok(len)
    }

    /// Changes the space of a range; see [`SpaceChange`].
    ///
    /// # Errors
    /// `PastEnd` for a range that would extend the image; `Invalid` for an empty or impossible one;
    /// `ReadOnly`; `BadHandle`; `NoSpace` when the thin target is full; `Failed`, `Io`.
    pub fn allocate(
        &self,
        handle: HandleId,
        offset: u64,
        len: u64,
        change: SpaceChange,
    ) -> Result<()> {
        let handle = self.handles.get(handle)?;
        let open = writable(&handle)?;
        let content = &open.content;
        let end = match offset.checked_add(len) {
            Some(end) if len > 0 => end,
            _ => {
                return Err(TreeError::new(
                    Kind::Invalid,
                    "an empty or impossible range",
                ));
            }
        };
        let (how, may_cut) = match change {
            SpaceChange::Reserve => (None, false),
            SpaceChange::Punch => (Some(Zeroing::Discard), true),
            SpaceChange::Zero { keep_size } => (Some(Zeroing::Zero), keep_size),
        };
        if !may_cut {
            content.grow_to(end)?;
        }
        let size = content.size();
        if end > size && !may_cut {
            return Err(TreeError::PastEnd);
        }
        let end = end.min(size);
        let Some(how) = how else {
            return Ok(());
        };
        if offset >= end {
            return Ok(());
        }
        open.changing(|| {
            let apply = || content.zero(offset, end - offset, how);
            match &open.rewrite {
                Some(rewrite) => rewrite.change(content, offset..end, apply),
                None => apply(),
            }
        })?;
        Ok(())
    }

    /// The handle is closed by one of its holders: a rewrite settles, and what was written through
    /// the handle is made durable.
    ///
    /// # Errors
    /// `BadHandle`; those of zeroing and of flushing: what was written may be lost.
    pub fn flush(&self, handle: HandleId) -> Result<()> {
        match &*self.handles.get(handle)? {
            Handle::Image(h) => h.flush(),
            Handle::Snapshot(_)
            | Handle::Status(_)
            | Handle::Diff(_)
            | Handle::DiffJson { .. }
            | Handle::Directory { .. } => Ok(()),
        }
    }

    /// fsync and fdatasync: makes every acknowledged write of the file durable, through whichever
    /// handle it came.
    ///
    /// # Errors
    /// As [`Tree::flush`].
    pub fn fsync(&self, handle: HandleId) -> Result<()> {
        match &*self.handles.get(handle)? {
            Handle::Image(h) => h.sync(),
            Handle::Snapshot(_)
            | Handle::Status(_)
            | Handle::Diff(_)
            | Handle::DiffJson { .. }
            | Handle::Directory { .. } => Ok(()),
        }
    }

    /// The last holder has let go of a file or directory.
    ///
    /// # Errors
    /// `BadHandle`.
    pub fn release(&self, handle: HandleId) -> Result<()> {
        self.handles.remove(handle).map(drop)
    }

    /// Finds data or a hole at or after an offset; the end counts as a hole.
    ///
    /// # Errors
    /// `NoSuchOffset` at or past the end, or with only holes to come; `BadHandle`; `IsDirectory`;
    /// those of reading.
    pub fn seek(&self, handle: HandleId, offset: u64, what: Seek) -> Result<u64> {
        let handle = self.handles.get(handle)?;
        let image: &dyn Image = match &*handle {
            Handle::Image(h) => &h.content,
            Handle::Snapshot(h) => &*h.snapshot,
            Handle::Diff(h) => &h.image,
            Handle::Status(bytes) | Handle::DiffJson { bytes, .. } => {
                return seek_bytes(bytes.len() as u64, offset, what);
            }
            Handle::Directory { .. } => return Err(TreeError::IsDirectory),
        };
        let size = image.size();
        if offset >= size {
            return Err(TreeError::NoSuchOffset);
        }
        match what {
            Seek::Data => image.next_data(offset)?.filter(|&d| d < size),
            Seek::Hole => Some(image.next_hole(offset)?.min(size)),
        }
        .ok_or(TreeError::NoSuchOffset)
    }
}

impl Tree {
    /// The content of a clone's node.
    pub(super) fn clone_image(&self, info: &CloneInfo, linked: bool) -> Result<CloneImage> {
        let gone = || TreeError::new(Kind::NotFound, "the clone was just renamed or deleted");
        if !linked {
            // Through /proc/<pid>/fd while another handle keeps it.
            return self.handles.open_clone(NodeId(info.ino)).ok_or_else(gone);
        }
        let clone = self.engine.open_clone(&info.volume, &info.name)?;
        if clone.info().ino != info.ino {
            return Err(gone());
        }
        Ok(CloneImage::new(clone))
    }
}

impl ImageHandle {
    /// Remembers that there is something to flush.
    pub fn touched(&self) {
        self.dirty.store(true, Ordering::Release);
    }

    /// Runs a change and remembers that there is something to flush, also after a failure that
    /// may have changed a part. Afterwards, not before: a flush that ran meanwhile did not cover it.
    pub fn changing(
        &self,
        change: impl FnOnce() -> crate::error::Result<()>,
    ) -> crate::error::Result<()> {
        let result = change();
        self.touched();
        result
    }

    fn flush(&self) -> Result<()> {
        if let Some(rewrite) = &self.rewrite {
            let settled = rewrite.settle(&self.content);
            if !matches!(settled, Ok(false)) {
                self.touched();
            }
            settled?;
        }
        if self.dirty.load(Ordering::Acquire) {
            self.sync()
        } else {
            Ok(())
        }
    }

    fn sync(&self) -> Result<()> {
        // Before the flush: what is written while it runs is dirty again.
        self.dirty.store(false, Ordering::Release);
        self.content.flush().inspect_err(|_| self.touched())?;
        Ok(())
    }
}

/// Refuses what no image can be opened for.
pub(super) fn may_open(flags: OpenFlags) -> Result<()> {
    if flags.append {
        let why = "an image has a fixed size: nothing can be appended";
        return Err(TreeError::new(Kind::Permission, why));
    }
    Ok(())
}

pub(super) fn open_image(content: Content, node: NodeId, flags: OpenFlags) -> Result<Handle> {
    may_open(flags)?;
    // O_TRUNC without write access is unspecified by POSIX and has nothing to say here.
    let truncates = flags.truncate && flags.write;
    let emptied = match content.growing() {
        Some(clone) if truncates => {
            clone.set_size(0)?;
            true
        }
        _ => false,
    };
    let rewrite = (truncates && !emptied).then(Rewrite::default);
    Ok(Handle::Image(ImageHandle {
        content,
        node,
        writable: flags.write,
        rewrite,
        dirty: emptied.into(),
    }))
}

pub(super) fn writable(handle: &Arc<Handle>) -> Result<&ImageHandle> {
    match &**handle {
        Handle::Image(open) if open.writable => Ok(open),
        Handle::Image(_) => Err(TreeError::BadHandle),
        Handle::Snapshot(_) | Handle::Status(_) | Handle::Diff(_) | Handle::DiffJson { .. } => {
            Err(TreeError::ReadOnly)
        }
        Handle::Directory { .. } => Err(TreeError::IsDirectory),
    }
}

/// How much of a read of `len` bytes lies inside the size.
fn available(size: u64, offset: u64, len: usize) -> usize {
    usize::try_from(size.saturating_sub(offset))
        .unwrap_or(usize::MAX)
        .min(len)
}

fn read_bytes(bytes: &[u8], offset: u64, buf: &mut [u8]) -> usize {
    let len = available(bytes.len() as u64, offset, buf.len());
    if len > 0 {
        let start = offset as usize;
        buf[..len].copy_from_slice(&bytes[start..start + len]);
    }
    len
}

fn seek_bytes(size: u64, offset: u64, what: Seek) -> Result<u64> {
    if offset >= size {
        return Err(TreeError::NoSuchOffset);
    }
    Ok(match what {
        Seek::Data => offset,
        Seek::Hole => size,
    })
}
