//! `clones/`: instant clones by LINK, empty ones by CREATE, and ranges taken over instead of copied.
//!
//! A LINK whose source is a snapshot or a clone makes a clone: the answer is a new node of its own,
//! not a second name of the source's. It shares everything with its source and is durable when the
//! call returns.

use crate::error::Kind;
use crate::image::clone::CloneImage;
use crate::tree::Tree;
use crate::tree::directory::{Images, image_name};
use crate::tree::file::{may_open, open_image, writable};
use crate::tree::handle::{Content, Handle};
use crate::tree::node::{Node, VolumeNode};
use crate::tree::types::{Attr, Caching, HandleId, NodeId, OpenFlags, Opened, Result, TreeError};
use crate::units::Name;
use crate::volume::CloneInfo;

impl Tree {
    /// Makes the clone `name` (with its suffix) of a snapshot or clone of the same volume. Durable
    /// when this returns. The answer counts like a lookup.
    ///
    /// # Errors
    /// `Permission` for any other source, and outside `clones/`; `OtherVolume`; `Invalid` for a name
    /// that is none of an image; `NotFound` for a source that is gone; `Exists`; those of cloning.
    pub fn link(&self, source: NodeId, parent: NodeId, name: &str) -> Result<Attr> {
        let why =
            "only snapshots and clones can be linked, and only into clones/: that clones them";
        let refused = || TreeError::new(Kind::Permission, why);
        let Images::Clones(volume) = self.images_directory(parent, why)? else {
            return Err(refused());
        };
        let volume = &volume.info.name;
        let source = self.resolve(source)?;
        let of = match &source {
            Node::Snapshot { info, .. } => &info.volume,
            Node::Clone { info, .. } => &info.volume,
            _ => return Err(refused()),
        };
        if of != volume {
            return Err(TreeError::OtherVolume);
        }
        let name = image_name(name)?;
        let info = match source {
            Node::Snapshot { info, linked: true } => {
                let clone = self.engine.clone_snapshot(volume, &info.name, &name)?;
                if clone.base != Some(info.uuid) {
                    return Err(self.not_that_one(volume, &name));
                }
                clone
            }
            Node::Clone { info, linked: true } => {
                let clone = self.engine.clone_clone(volume, &info.name, &name)?;
                let now = self.engine.clone_info(volume, &info.name);
                if now.is_ok_and(|now| now.ino != info.ino) {
                    return Err(self.not_that_one(volume, &name));
                }
                clone
            }
            _ => return Err(TreeError::new(Kind::NotFound, "the source was deleted")),
        };
        Ok(self.made(info))
    }

    /// The source's name passed to another one between looking and cloning: the clone is of that.
    fn not_that_one(&self, volume: &Name, made: &Name) -> TreeError {
        match self.engine.delete_clone(volume, made) {
            Ok(()) => TreeError::new(Kind::NotFound, "the source was just renamed"),
            Err(e) => TreeError::Engine(e),
        }
    }

    fn made(&self, info: CloneInfo) -> Attr {
        let attr = self.clone_attr(&info, true);
        let info = Box::new(info);
        self.nodes
            .remember(attr.node, &Node::Clone { info, linked: true });
        attr
    }

    pub(super) fn create_clone(
        &self,
        volume: &VolumeNode,
        name: Name,
        flags: OpenFlags,
    ) -> Result<(Attr, Opened)> {
        // Before anything is made: a refusal leaves nothing behind.
        may_open(flags)?;
        let volume = &volume.info.name;
        let info = self.engine.clone_empty(volume, &name)?;
        let content = Content::Clone(CloneImage::new(self.engine.open_clone(volume, &name)?));
        let flags = OpenFlags {
            truncate: false,
            ..flags
        };
        let handle = open_image(content, NodeId(info.ino), flags)?;
        let handle = self.handles.insert(handle)?;
        let caching = Caching::None;
        Ok((self.made(info), Opened { handle, caching }))
    }

    /// Copies a range from one open file to another without moving bytes, if that can be had; returns
    /// the bytes copied, fewer only at the source's end. It can from a snapshot to a clone that was
    /// made empty and gets the same bytes in the same places, from its beginning on.
    ///
    /// # Errors
    /// `Unsupported` where the caller has to read and write; `BadHandle`, `ReadOnly`; those of a write.
    pub fn copy_range(
        &self,
        from: HandleId,
        from_offset: u64,
        to: HandleId,
        to_offset: u64,
        len: u64,
    ) -> Result<u64> {
        let by_hand = || TreeError::new(Kind::Unsupported, "this range has to be copied");
        let (from, to) = (self.handles.get(from)?, self.handles.get(to)?);
        let open = writable(&to)?;
        let (Handle::Snapshot(from), Content::Clone(clone)) = (&*from, &open.content) else {
            return Err(by_hand());
        };
        let len = len.min(from.snapshot.size().saturating_sub(from_offset));
        if from_offset != to_offset || len == 0 || open.rewrite.is_some() {
            return Err(by_hand());
        }
        let mut taken = false;
        open.changing(|| {
            taken = clone.take_over(&from.snapshot, from_offset, len)?;
            Ok(())
        })?;
        if taken { Ok(len) } else { Err(by_hand()) }
    }
}
