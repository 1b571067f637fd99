//! Attributes: what `stat` and `statfs` show, and which changes of them are allowed.
//!
//! Nothing a caller sets is ever kept: a mode, owner or size can be set to what it is already, and
//! times are accepted where refusing would break cp, touch and rsync.

use crate::error::Kind;
use crate::image::Image;
use crate::image::clone::CloneImage;
use crate::image::live::LiveImage;
use crate::sys::disk::Space;
use crate::tree::Tree;
use crate::tree::diffs::{DiffNode, Format};
use crate::tree::handle::{Content, Handle};
use crate::tree::node::{
    CONTROL, Node, ROOT, VolumeNode, clones_node, diffs_node, live_node, snapshots_node,
    status_entry, volume_directory,
};
use crate::tree::types::{Attr, FileKind, HandleId, NodeId, Result, SetAttr, TreeError};
use crate::units::SECTOR;
use crate::volume::{CloneInfo, SnapshotInfo, SnapshotState};

const MODE_DIRECTORY: u16 = 0o700;
const MODE_READ_ONLY: u16 = 0o400;
const MODE_WRITABLE: u16 = 0o600;

/// A file's facts before owner and kind are added.
struct FileFacts {
    node: NodeId,
    mode: u16,
    nlink: u32,
    size: u64,
    allocated: u64,
    mtime_ns: i64,
    ctime_ns: i64,
    fixed: bool,
}

impl Tree {
    /// The attributes of a node.
    ///
    /// # Errors
    /// `NotFound` for a node that is gone; those of the status source for its files.
    pub fn getattr(&self, node: NodeId) -> Result<Attr> {
        self.attr(&self.resolve(node)?)
    }

    pub(super) fn attr(&self, node: &Node) -> Result<Attr> {
        Ok(match node {
            Node::Root => {
                let infos: Vec<_> = self.engine.volumes().iter().map(|v| v.info()).collect();
                let newest = infos.iter().map(|i| i.added_ns).max().unwrap_or(0);
                self.directory(ROOT, infos.len() + 1, newest)
            }
            Node::Control => self.directory(CONTROL, 0, self.status.now_ns()),
            Node::Status(file) => {
                let size = self.status.render(*file)?.len() as u64;
                let now = self.status.now_ns();
                self.file(FileFacts {
                    node: status_entry(*file).0,
                    mode: MODE_READ_ONLY,
                    nlink: 1,
                    size,
                    allocated: size,
                    mtime_ns: now,
                    ctime_ns: now,
                    fixed: false,
                })
            }
            Node::VolumeDirectory(v) => {
                self.directory(volume_directory(v.info.ino_base), 3, v.info.added_ns)
            }
            Node::Live(v) => {
                let image = LiveImage::new(v.volume.clone());
                self.file(FileFacts {
                    node: live_node(v.info.ino_base),
                    mode: MODE_WRITABLE,
                    nlink: 1,
                    size: image.size(),
                    // A source that cannot be asked is shown as full: nobody then skips a hole
                    // that is not one.
                    allocated: image.allocated().unwrap_or(u64::MAX),
                    mtime_ns: v.info.mtime_ns,
                    ctime_ns: v.info.mtime_ns,
                    fixed: false,
                })
            }
            Node::Snapshots(v) => {
                self.directory(snapshots_node(v.info.ino_base), 0, self.newest(v)?)
            }
            Node::Snapshot { info, linked } => self.snapshot_attr(info, *linked),
            Node::Clones(v) => {
                let clones = self.engine.clones(&v.info.name)?;
                let newest = clones.iter().map(|c| c.created_ns).max();
                let time_ns = newest.unwrap_or(v.info.added_ns);
                self.directory(clones_node(v.info.ino_base), 0, time_ns)
            }
            Node::Clone { info, linked } => self.clone_attr(info, *linked),
            Node::Diffs(v) => self.directory(diffs_node(v.info.ino_base), 0, self.newest(v)?),
            Node::Diff(diff) => self.diff_attr(diff)?,
        })
    }

    /// The instant of the newest snapshot of a volume, else when the volume was added.
    fn newest(&self, v: &VolumeNode) -> Result<i64> {
        let newest = self.engine.newest_snapshot_ns(&v.info.name)?;
        Ok(newest.unwrap_or(v.info.added_ns))
    }

    fn diff_attr(&self, diff: &DiffNode) -> Result<Attr> {
        let size = self.diff_size(diff)?;
        let taken = diff.to.as_ref().map(|to| to.taken_ns);
        let time_ns = taken.unwrap_or_else(|| self.status.now_ns());
        Ok(self.file(FileFacts {
            node: diff.id()?,
            mode: MODE_READ_ONLY,
            nlink: u32::from(diff.linked),
            size,
            allocated: size,
            mtime_ns: time_ns,
            ctime_ns: time_ns,
            // The length of a JSON changes with the names in it.
            fixed: diff.format == Format::Qcow2,
        }))
    }

    pub(super) fn snapshot_attr(&self, info: &SnapshotInfo, linked: bool) -> Attr {
        self.file(FileFacts {
            node: NodeId(info.ino),
            mode: MODE_READ_ONLY,
            nlink: u32::from(linked),
            size: info.size,
            allocated: info.allocated,
            mtime_ns: told_mtime(info.mtime_ns, &info.state),
            ctime_ns: info.taken_ns,
            fixed: true,
        })
    }

    pub(super) fn clone_attr(&self, info: &CloneInfo, linked: bool) -> Attr {
        let node = NodeId(info.ino);
        let image = self.handles.open_clone(node).or_else(|| {
            let opened = self.engine.open_clone(&info.volume, &info.name);
            opened.ok().map(CloneImage::new)
        });
        let image = image.filter(|image| image.info().ino == info.ino);
        let allocated = image.and_then(|image| image.allocated().ok());
        self.file(FileFacts {
            node,
            mode: MODE_WRITABLE,
            nlink: u32::from(linked),
            size: info.size,
            // One that cannot be asked is shown as full: nobody then skips a hole that is not one.
            allocated: allocated.unwrap_or(u64::MAX),
            mtime_ns: told_mtime(info.mtime_ns, &info.state),
            ctime_ns: info.mtime_ns.max(info.created_ns),
            fixed: false,
        })
    }

    fn directory(&self, node: NodeId, subdirectories: usize, time_ns: i64) -> Attr {
        Attr {
            node,
            kind: FileKind::Directory,
            mode: MODE_DIRECTORY,
            nlink: u32::try_from(subdirectories + 2).unwrap_or(u32::MAX),
            uid: self.uid,
            gid: self.gid,
            size: 0,
            blocks: 0,
            mtime_ns: time_ns,
            ctime_ns: time_ns,
            fixed: false,
        }
    }

    fn file(&self, facts: FileFacts) -> Attr {
        Attr {
            node: facts.node,
            kind: FileKind::File,
            mode: facts.mode,
            nlink: facts.nlink,
            uid: self.uid,
            gid: self.gid,
            size: facts.size,
            blocks: facts
                .allocated
                .div_ceil(SECTOR)
                .min(facts.size.div_ceil(SECTOR)),
            mtime_ns: facts.mtime_ns,
            ctime_ns: facts.ctime_ns,
            fixed: facts.fixed,
        }
    }

    /// Changes attributes, as far as that changes nothing; see `docs/semantics.md`.
    ///
    /// # Errors
    /// `Permission` for a change that would have to be kept; `ReadOnly` for the size of what
    /// cannot be written; `IsDirectory` for the size of a directory.
    pub fn setattr(&self, id: NodeId, handle: Option<HandleId>, set: SetAttr) -> Result<Attr> {
        let node = self.resolve(id)?;
        let attr = self.attr(&node)?;
        let other_mode = set
            .mode
            .is_some_and(|mode| mode & 0o7777 != u32::from(attr.mode));
        let other_owner = set.uid.is_some_and(|uid| uid != attr.uid)
            || set.gid.is_some_and(|gid| gid != attr.gid);
        if other_mode || other_owner {
            return Err(refused("mode and owner are fixed"));
        }
        if set.times {
            self.set_times(id, &node, set.caller)?;
        }
        if let Some(size) = set.size
            && self.set_size(&node, &attr, handle, size)?
        {
            return self.getattr(id);
        }
        Ok(attr)
    }

    /// Only the size that is there already can be set, and any one while a clone grows. On a rewrite
    /// that is the word that the image ends where the volume does. Returns whether the size is
    /// another now.
    fn set_size(
        &self,
        node: &Node,
        attr: &Attr,
        handle: Option<HandleId>,
        size: u64,
    ) -> Result<bool> {
        let handle = handle.map(|handle| self.handles.get(handle)).transpose()?;
        let open = match handle.as_deref() {
            Some(Handle::Image(h)) if h.node == attr.node => Some(h),
            _ => None,
        };
        match node {
            Node::Live(_) => {}
            Node::Clone { info, linked } => {
                let image = match open.map(|h| &h.content) {
                    Some(Content::Clone(image)) => image.clone(),
                    _ => self.clone_image(info, *linked)?,
                };
                if image.is_growing() {
                    image.set_size(size)?;
                    if let Some(h) = open {
                        h.touched();
                    }
                    return Ok(true);
                }
            }
            Node::Snapshot { .. } | Node::Status(_) | Node::Diff(_) => {
                return Err(TreeError::ReadOnly);
            }
            Node::Root
            | Node::Control
            | Node::VolumeDirectory(_)
            | Node::Snapshots(_)
            | Node::Clones(_)
            | Node::Diffs(_) => return Err(TreeError::IsDirectory),
        }
        if size != attr.size {
            return Err(refused(
                "the size of an image is not changed by truncating; a volume's is by a command",
            ));
        }
        if let Some(rewrite) = open.and_then(|h| h.rewrite.as_ref()) {
            rewrite.extend_to_size();
        }
        Ok(false)
    }

    fn set_times(&self, id: NodeId, node: &Node, caller: u32) -> Result<()> {
        match node {
            // cp -p and rsync set them after writing; the next write would change them anyway.
            Node::Live(_) | Node::Clone { .. } => Ok(()),
            // touch sets them right after the CREATE that took the snapshot, without the handle. A
            // second touch comes this far too, perhaps before the first one's handle is released.
            Node::Snapshot { .. } if self.handles.is_creator(id, caller) => Ok(()),
            Node::Snapshot { .. } => {
                Err(refused("the times of a snapshot are those of its content"))
            }
            Node::Root
            | Node::Control
            | Node::Status(_)
            | Node::VolumeDirectory(_)
            | Node::Snapshots(_)
            | Node::Clones(_)
            | Node::Diffs(_)
            | Node::Diff(_) => Err(refused("times are fixed")),
        }
    }

    /// The space that preserved content has: of the store's filesystem, or of the limit if that has less.
    ///
    /// # Errors
    /// `Io`.
    pub fn statfs(&self) -> Result<Space> {
        Ok(self.status.space()?)
    }
}

/// The time of change that a view tells: once it has failed, a nanosecond later. Caches above, the kernel's
/// first, drop content whose file has changed, and only then ask for what is now refused.
fn told_mtime(mtime_ns: i64, state: &SnapshotState) -> i64 {
    match state {
        SnapshotState::Active => mtime_ns,
        SnapshotState::Failed(_) => mtime_ns.saturating_add(1),
    }
}

fn refused(why: &str) -> TreeError {
    TreeError::new(Kind::Permission, why)
}
