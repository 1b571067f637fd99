//! Directory operations: lookup, listing, and the catalogue changes that are file operations.
//!
//! Taking a snapshot is CREATE in `snapshots/`, deleting one is UNLINK, renaming one is RENAME; the same
//! in `clones/` makes an empty clone, deletes and renames one (LINK, which clones, is in `clones`).
//! All are durable when they return (T1). Everything else that would make, remove or move a name is
//! refused, so that a stray cp, mv or rsync harms nothing.

use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

use crate::error::Kind;
use crate::tree::Tree;
use crate::tree::handle::{Handle, SnapshotHandle};
use crate::tree::node::{
    CLONES_NAME, CONTROL, CONTROL_NAME, DIFFS_NAME, LIVE_NAME, Node, ROOT, SNAPSHOTS_NAME,
    VolumeNode, clones_node, diffs_node, live_node, snapshots_node, status_entry, volume_directory,
};
use crate::tree::types::{
    Attr, Caching, DirEntry, FileKind, HandleId, NodeId, OpenFlags, Opened, RenameMode, Result,
    StatusFile, TreeError,
};
use crate::units::{Name, escape};
use crate::volume::VolumeInfo;

/// What a snapshot's and a clone's file name ends with.
pub(super) const IMAGE_SUFFIX: &str = ".img";

/// Cookie of `.`; `..` has the next one, every other entry its inode number and this on top, which
/// is above both.
const COOKIE_DOT: u64 = 1;
const COOKIE_BASE: u64 = 2;

impl Tree {
    /// Finds a name in a directory and counts the answer until it is forgotten. `.` and `..` are asked
    /// for when somebody comes with a file handle he has kept: `.` of any node is that node.
    ///
    /// # Errors
    /// `NotFound`; `NotDirectory`.
    pub fn lookup(&self, parent: NodeId, name: &str) -> Result<Attr> {
        let parent = self.resolve(parent)?;
        let node = match name {
            "." => parent,
            ".." => self.above(parent)?,
            name => self.named(&parent, name)?,
        };
        let attr = self.attr(&node)?;
        self.nodes.remember(attr.node, &node);
        Ok(attr)
    }

    /// The directory in which a directory lies.
    fn above(&self, directory: Node) -> Result<Node> {
        Ok(match directory {
            Node::Root | Node::Control | Node::VolumeDirectory(_) => Node::Root,
            Node::Snapshots(v) | Node::Clones(v) | Node::Diffs(v) => Node::VolumeDirectory(v),
            Node::Live(_)
            | Node::Status(_)
            | Node::Snapshot { .. }
            | Node::Clone { .. }
            | Node::Diff(_) => return Err(TreeError::NotDirectory),
        })
    }

    fn named(&self, parent: &Node, name: &str) -> Result<Node> {
        Ok(match parent {
            Node::Root if name == CONTROL_NAME => Node::Control,
            Node::Root => Node::VolumeDirectory(
                self.volume_node(&Name::new(name).map_err(|_| absent(name))?)?,
            ),
            Node::Control => {
                let named = |file: &StatusFile| status_entry(*file).1 == name;
                let file = [StatusFile::Json, StatusFile::Metrics]
                    .into_iter()
                    .find(named);
                Node::Status(file.ok_or_else(|| absent(name))?)
            }
            Node::VolumeDirectory(v) if name == LIVE_NAME => Node::Live(v.clone()),
            Node::VolumeDirectory(v) if name == SNAPSHOTS_NAME => Node::Snapshots(v.clone()),
            Node::VolumeDirectory(v) if name == CLONES_NAME => Node::Clones(v.clone()),
            Node::VolumeDirectory(v) if name == DIFFS_NAME => Node::Diffs(v.clone()),
            Node::VolumeDirectory(_) => return Err(absent(name)),
            Node::Diffs(v) => self.diff_named(v.clone(), name)?,
            Node::Snapshots(v) => {
                let snapshot = image_name(name).map_err(|_| absent(name))?;
                let info = self.engine.snapshot(&v.info.name, &snapshot)?;
                Node::Snapshot { info, linked: true }
            }
            Node::Clones(v) => {
                let clone = image_name(name).map_err(|_| absent(name))?;
                let info = Box::new(self.engine.clone_info(&v.info.name, &clone)?);
                Node::Clone { info, linked: true }
            }
            Node::Live(_)
            | Node::Status(_)
            | Node::Snapshot { .. }
            | Node::Clone { .. }
            | Node::Diff(_) => return Err(TreeError::NotDirectory),
        })
    }

    /// Opens a directory for listing.
    ///
    /// # Errors
    /// `NotFound`; `NotDirectory`; `TooManyOpen`.
    pub fn opendir(&self, node: NodeId) -> Result<HandleId> {
        match self.resolve(node)?.kind() {
            FileKind::Directory => self.handles.insert(Handle::Directory {
                node,
                listing: Mutex::new(Vec::new()),
            }),
            FileKind::File => Err(TreeError::NotDirectory),
        }
    }

    /// The entries after a cookie (0 for the beginning), handed out until `give` says it is full.
    /// The listing is that of the moment it was begun; beginning again renews it.
    ///
    /// # Errors
    /// `BadHandle`; `NotFound` when the directory is gone.
    pub fn readdir(
        &self,
        handle: HandleId,
        after: u64,
        mut give: impl FnMut(&DirEntry) -> bool,
    ) -> Result<()> {
        let handle = self.handles.get(handle)?;
        let Handle::Directory { node, listing } = &*handle else {
            return Err(TreeError::BadHandle);
        };
        let fresh = if after == 0 {
            Some(self.list(*node)?)
        } else {
            None
        };
        let mut listing = listing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(fresh) = fresh {
            *listing = fresh;
        }
        let from = listing.partition_point(|entry| entry.cookie <= after);
        for entry in &listing[from..] {
            if give(entry) {
                break;
            }
        }
        Ok(())
    }

    /// Like [`Tree::readdir`], and hands out with each entry what a lookup of its name would answer
    /// now. There are no attributes with `.` and `..`, with what is not there any more under that name,
    /// and where telling them would read or ask a file (a diff, a status file, the live image, a clone):
    /// listing stays cheap, and a source or an overlay that hangs does not hang it.
    ///
    /// Each entry but `.` and `..` that fits counts like a lookup, with and without attributes.
    ///
    /// # Errors
    /// Those of [`Tree::readdir`].
    pub fn readdir_plus(
        &self,
        handle: HandleId,
        after: u64,
        mut give: impl FnMut(&DirEntry, Option<&Attr>) -> bool,
    ) -> Result<()> {
        self.told.fetch_add(1, Ordering::Relaxed);
        let open = self.handles.get(handle)?;
        let Handle::Directory { node: parent, .. } = &*open else {
            return Err(TreeError::BadHandle);
        };
        let parent = self.resolve(*parent)?;
        self.readdir(handle, after, |entry| {
            if entry.cookie <= COOKIE_DOT + 1 {
                return give(entry, None);
            }
            let node = self.listed(&parent, entry);
            let attr = node.as_ref().and_then(|node| match node {
                Node::Diff(_) | Node::Status(_) | Node::Live(_) | Node::Clone { .. } => None,
                Node::Root
                | Node::Control
                | Node::VolumeDirectory(_)
                | Node::Snapshots(_)
                | Node::Clones(_)
                | Node::Diffs(_)
                | Node::Snapshot { .. } => self.attr(node).ok(),
            });
            let full = give(entry, attr.as_ref());
            match node {
                Some(node) if !full => self.nodes.remember(entry.node, &node),
                None if !full => self.nodes.remember_listed(entry.node, &parent, &entry.name),
                _ => {}
            }
            full
        })
    }

    /// The node of an entry, if it still has that name.
    fn listed(&self, parent: &Node, entry: &DirEntry) -> Option<Node> {
        let node = self.named(parent, &entry.name).ok()?;
        (node.id().ok()? == entry.node).then_some(node)
    }

    fn list(&self, id: NodeId) -> Result<Vec<DirEntry>> {
        use FileKind::{Directory, File};
        let mut parent = ROOT;
        let mut cookies = None;
        let mut entries: Vec<(NodeId, FileKind, String)> = match self.resolve(id)? {
            Node::Root => {
                let volume = |info: VolumeInfo| {
                    (
                        volume_directory(info.ino_base),
                        Directory,
                        info.name.to_string(),
                    )
                };
                let volumes = self.engine.volumes();
                let control = (CONTROL, Directory, CONTROL_NAME.to_owned());
                [control]
                    .into_iter()
                    .chain(volumes.iter().map(|v| volume(v.info())))
                    .collect()
            }
            Node::Control => [StatusFile::Json, StatusFile::Metrics]
                .map(status_entry)
                .map(|(node, name)| (node, File, name.to_owned()))
                .into(),
            Node::VolumeDirectory(v) => vec![
                (live_node(v.info.ino_base), File, LIVE_NAME.to_owned()),
                (
                    snapshots_node(v.info.ino_base),
                    Directory,
                    SNAPSHOTS_NAME.to_owned(),
                ),
                (
                    clones_node(v.info.ino_base),
                    Directory,
                    CLONES_NAME.to_owned(),
                ),
                (
                    diffs_node(v.info.ino_base),
                    Directory,
                    DIFFS_NAME.to_owned(),
                ),
            ],
            Node::Snapshots(v) => {
                parent = volume_directory(v.info.ino_base);
                let snapshots = self.engine.snapshots(&v.info.name)?;
                let entry = |ino, name: &Name| (NodeId(ino), File, format!("{name}{IMAGE_SUFFIX}"));
                snapshots.iter().map(|s| entry(s.ino, &s.name)).collect()
            }
            Node::Clones(v) => {
                parent = volume_directory(v.info.ino_base);
                let clones = self.engine.clones(&v.info.name)?;
                let entry = |ino, name: &Name| (NodeId(ino), File, format!("{name}{IMAGE_SUFFIX}"));
                clones.iter().map(|c| entry(c.ino, &c.name)).collect()
            }
            Node::Diffs(v) => {
                parent = volume_directory(v.info.ino_base);
                let names = self.diff_names(&v)?;
                // Their numbers are larger than a cookie may be.
                cookies = Some(names.iter().map(|n| n.1).collect::<Vec<_>>());
                names.into_iter().map(|n| (n.0, File, n.2)).collect()
            }
            Node::Live(_)
            | Node::Status(_)
            | Node::Snapshot { .. }
            | Node::Clone { .. }
            | Node::Diff(_) => return Err(TreeError::NotDirectory),
        };
        if cookies.is_none() {
            // Ascending by number, so that the cookie of an entry only depends on the entry.
            entries.sort_by_key(|(node, ..)| *node);
        }
        let cookies = cookies.unwrap_or_else(|| entries.iter().map(|e| e.0.0).collect());
        let dots = [(id, ".", COOKIE_DOT), (parent, "..", COOKIE_DOT + 1)];
        let dots = dots.map(|(node, name, cookie)| DirEntry {
            node,
            kind: Directory,
            name: name.to_owned(),
            cookie,
        });
        let entries = entries.into_iter().zip(cookies);
        let entries = entries.map(|((node, kind, name), cookie)| DirEntry {
            node,
            kind,
            name,
            cookie: cookie + COOKIE_BASE,
        });
        Ok(dots.into_iter().chain(entries).collect())
    }

    /// In `snapshots/`, takes the snapshot `name` (with its suffix); the handle reads it and refuses
    /// writes. In `clones/`, makes an empty clone for a copy into it. Durable when this returns. The
    /// answer counts like a lookup. `caller` is the number of the process.
    ///
    /// # Errors
    /// `Invalid` for a name that is none of an image; `Exists`; `Permission` elsewhere; those of
    /// taking a snapshot and of making a clone.
    pub fn create(
        &self,
        parent: NodeId,
        name: &str,
        flags: OpenFlags,
        caller: u32,
    ) -> Result<(Attr, Opened)> {
        let why = "files can only be made in snapshots/ and clones/";
        match self.images_directory(parent, why)? {
            Images::Snapshots(volume) => self.take(&volume, name, caller),
            Images::Clones(volume) => self.create_clone(&volume, image_name(name)?, flags),
        }
    }

    fn take(&self, volume: &VolumeNode, name: &str, caller: u32) -> Result<(Attr, Opened)> {
        let target = (volume.info.name.clone(), image_name(name)?);
        self.engine.take_snapshots(std::slice::from_ref(&target))?;
        let snapshot = self.engine.open_snapshot(&target.0, &target.1)?;
        let info = snapshot.info();
        let attr = self.snapshot_attr(&info, true);
        let handle = self.handles.insert(Handle::Snapshot(SnapshotHandle {
            snapshot,
            node: attr.node,
            creator: Some(caller),
        }))?;
        self.nodes
            .remember(attr.node, &Node::Snapshot { info, linked: true });
        Ok((
            attr,
            Opened {
                handle,
                caching: Caching::Immutable,
            },
        ))
    }

    /// Deletes the snapshot or clone `name` (with its suffix). Durable when this returns; who has it
    /// open goes on.
    ///
    /// # Errors
    /// `NotFound`; `Busy` for a snapshot on hold; `Permission` elsewhere.
    pub fn unlink(&self, parent: NodeId, name: &str) -> Result<()> {
        let images = self.images_directory(parent, "only snapshots and clones can be removed")?;
        let image = image_name(name).map_err(|_| absent(name))?;
        match images {
            Images::Snapshots(v) => self.engine.delete_snapshot(&v.info.name, &image)?,
            Images::Clones(v) => self.engine.delete_clone(&v.info.name, &image)?,
        }
        Ok(())
    }

    /// Renames a snapshot or clone within its directory; never replaces one. Durable when this
    /// returns.
    ///
    /// # Errors
    /// `Invalid` for a new name that is none of an image, or an exchange; `NotFound`; `Exists`;
    /// `Permission` between directories or elsewhere.
    pub fn rename(
        &self,
        parent: NodeId,
        name: &str,
        new_parent: NodeId,
        new_name: &str,
        mode: RenameMode,
    ) -> Result<()> {
        if mode == RenameMode::Special {
            return Err(TreeError::new(
                Kind::Invalid,
                "names can neither be exchanged nor covered",
            ));
        }
        let images = self.images_directory(parent, "only snapshots and clones can be renamed")?;
        if parent != new_parent {
            let why = "a snapshot or clone stays in its directory";
            return Err(TreeError::new(Kind::Permission, why));
        }
        let old = image_name(name).map_err(|_| absent(name))?;
        let new = image_name(new_name)?;
        match images {
            Images::Snapshots(v) => self.engine.rename_snapshot(&v.info.name, &old, &new)?,
            Images::Clones(v) => self.engine.rename_clone(&v.info.name, &old, &new)?,
        }
        Ok(())
    }

    /// Answers an operation that makes or removes a name nobody can make or remove.
    ///
    /// # Errors
    /// Always: `Permission`, or `NotDirectory` / `NotFound` for a parent that is none.
    pub fn refuse_name(&self, parent: NodeId) -> Result<()> {
        match self.resolve(parent)?.kind() {
            FileKind::Directory => {
                let why = "this kind of file cannot be made or removed here";
                Err(TreeError::new(Kind::Permission, why))
            }
            FileKind::File => Err(TreeError::NotDirectory),
        }
    }

    pub(super) fn images_directory(&self, parent: NodeId, why: &str) -> Result<Images> {
        match self.resolve(parent)? {
            Node::Snapshots(volume) => Ok(Images::Snapshots(volume)),
            Node::Clones(volume) => Ok(Images::Clones(volume)),
            Node::Root | Node::Control | Node::VolumeDirectory(_) | Node::Diffs(_) => {
                Err(TreeError::new(Kind::Permission, why))
            }
            Node::Live(_)
            | Node::Status(_)
            | Node::Snapshot { .. }
            | Node::Clone { .. }
            | Node::Diff(_) => Err(TreeError::NotDirectory),
        }
    }
}

/// A directory in which names can be made, removed and changed.
pub(super) enum Images {
    Snapshots(VolumeNode),
    Clones(VolumeNode),
}

/// The snapshot that a file name in `snapshots/`, or the clone that one in `clones/`, means.
pub(super) fn image_name(file: &str) -> Result<Name> {
    match file.strip_suffix(IMAGE_SUFFIX) {
        Some(name) => Ok(Name::new(name)?),
        None => Err(TreeError::new(
            Kind::Invalid,
            format!("'{}' does not end in {IMAGE_SUFFIX}", escape(file)),
        )),
    }
}

pub(super) fn absent(name: &str) -> TreeError {
    TreeError::new(Kind::NotFound, format!("no entry '{}'", escape(name)))
}
