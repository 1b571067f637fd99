//! `diffs/`: names of pairs of points to files, and what the files hold. The older one is a snapshot
//! or a bookmark, the newer one a snapshot or the live volume.
//!
//! A diff of two snapshots is computed when somebody asks for its attributes or opens it, by reading
//! what changed in the newer one; the outcome is a function of the two, so the last ones are kept
//! ([`Computed`]). One to `live` is made anew for everybody who asks.
//!
//! An open diff holds its snapshots: it reads on, the same bytes, when they are renamed or deleted.
//! If either fails, every read of it fails from then on. The names inside are those at the opening.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Kind};
use crate::image::Image;
use crate::image::diff::{DiffExtent, DiffList, LIVE, extents};
use crate::image::live::LiveImage;
use crate::image::qcow2::{Ends, Layout, Qcow2};
use crate::tree::Tree;
use crate::tree::directory::{IMAGE_SUFFIX, absent};
use crate::tree::handle::Handle;
use crate::tree::node::{Node, VolumeNode, live_node};
use crate::tree::types::{NodeId, Result, TreeError};
use crate::units::{Grain, Name};
use crate::volume::{Diff, DiffPoint, Snapshot, SnapshotInfo, SnapshotState};

/// Diffs of two snapshots that are kept, and extents that they may have together.
const KEPT_MAX: usize = 1024;
const KEPT_EXTENTS_MAX: usize = 1 << 20;

/// Bits of an inode number that name one end of a diff.
const END_BITS: u32 = 31;

/// What a file of `diffs/` holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Qcow2,
    Json,
}

impl Format {
    fn suffix(self) -> &'static str {
        match self {
            Format::Qcow2 => ".qcow2",
            Format::Json => ".json",
        }
    }
}

/// The two ends of a diff and its form.
#[derive(Clone)]
pub(super) struct DiffNode {
    pub volume: VolumeNode,
    pub from: DiffPoint,
    /// `None` is the live volume.
    pub to: Option<SnapshotInfo>,
    pub format: Format,
    /// Both ends are in their directory.
    pub linked: bool,
}

impl DiffNode {
    /// Its number, a function of its ends: bit 63, then the form, then both ends' numbers. No other
    /// node has a number as large, and ends' numbers are never given again.
    ///
    /// # Errors
    /// `Limit` once a store has given numbers of 2^31 and more.
    pub fn id(&self) -> Result<NodeId> {
        let to = match &self.to {
            Some(to) => to.ino,
            None => live_node(self.volume.info.ino_base).0,
        };
        number(self.from.ino, to, self.format)
    }

    fn facts(&self) -> Result<()> {
        let from = Some((&self.from.name, &self.from.state));
        let to = self.to.as_ref().map(|to| (&to.name, &to.state));
        for (name, state) in [from, to].into_iter().flatten() {
            if let SnapshotState::Failed(why) = state {
                let volume = &self.from.volume;
                let why = format!("{volume}@{name} has failed: {why}");
                return Err(TreeError::new(Kind::Failed, why));
            }
        }
        Ok(())
    }
}

fn number(from: u64, to: u64, format: Format) -> Result<NodeId> {
    if from >> END_BITS != 0 || to >> END_BITS != 0 {
        let why = "inode numbers of snapshots beyond 2^31 have no diffs as files";
        return Err(TreeError::new(Kind::Limit, why));
    }
    let form = u64::from(format == Format::Json) << 62;
    Ok(NodeId(1 << 63 | form | from << END_BITS | to))
}

/// The numbers of the two ends and the form of a diff's number.
pub(super) fn ends_of(id: NodeId) -> Option<(u64, u64, Format)> {
    let format = match id.0 >> 62 {
        0b10 => Format::Qcow2,
        0b11 => Format::Json,
        _ => return None,
    };
    let mask = (1 << END_BITS) - 1;
    Some((id.0 >> END_BITS & mask, id.0 & mask, format))
}

/// A diff of two snapshots, without names.
pub(super) struct Content {
    size: u64,
    grain: Grain,
    extents: Vec<DiffExtent>,
    layout: crate::error::Result<Arc<Layout>, (Kind, String)>,
}

impl Content {
    fn layout(&self) -> Result<&Arc<Layout>> {
        self.layout
            .as_ref()
            .map_err(|(kind, why)| TreeError::new(*kind, why.clone()))
    }
}

/// A diff's content, its older snapshot unless that is a bookmark, and its newer one.
type Held = (Arc<Content>, Option<Arc<Snapshot>>, Arc<Snapshot>);

/// What one pair's first asker leaves for the others; they wait for it.
type Slot = Arc<Mutex<Option<Arc<Content>>>>;

/// The diffs computed last, by the numbers of their ends.
#[derive(Default)]
pub(super) struct Computed {
    slots: Mutex<VecDeque<((u64, u64), Slot)>>,
}

impl Computed {
    fn slot(&self, key: (u64, u64)) -> Slot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, slot)) = slots.iter().find(|(k, _)| *k == key) {
            return Arc::clone(slot);
        }
        let slot = Slot::default();
        slots.push_back((key, Arc::clone(&slot)));
        if slots.len() > KEPT_MAX {
            slots.pop_front();
        }
        slot
    }

    /// How many were or are being computed, and are kept.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.len()
    }

    /// Forgets the oldest until the rest is small enough; one may be larger alone.
    fn trim(&self) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let weight = |slot: &Slot| {
            // One that is being computed weighs when it is done.
            let content = slot.try_lock().ok()?;
            content.as_ref().map(|c| c.extents.len())
        };
        let mut total: usize = slots.iter().filter_map(|(_, slot)| weight(slot)).sum();
        while total > KEPT_EXTENTS_MAX && slots.len() > 1 {
            let gone = slots.pop_front();
            total -= gone
                .and_then(|(_, slot)| weight(&slot))
                .unwrap_or(0)
                .min(total);
        }
    }
}

/// An open diff as qcow2.
pub(super) struct DiffHandle {
    pub node: DiffNode,
    pub image: Qcow2,
    /// Absent for a bookmark, which has nothing that could be read.
    from: Option<Arc<Snapshot>>,
    to: Arc<Snapshot>,
}

impl DiffHandle {
    /// Whether both ends can still be vouched for; tables are not read from either.
    pub fn check(&self) -> Result<()> {
        for end in self.from.iter().chain([&self.to]) {
            end.next_hole(end.size())?;
        }
        Ok(())
    }
}

impl Tree {
    /// The node of a name in `diffs/`.
    pub(super) fn diff_named(&self, volume: VolumeNode, file: &str) -> Result<Node> {
        let name = |text: &str| Name::new(text).map_err(|_| absent(file));
        if let Some(image) = file.strip_suffix(IMAGE_SUFFIX) {
            let info = self.engine.snapshot(&volume.info.name, &name(image)?)?;
            return Ok(Node::Snapshot { info, linked: true });
        }
        let format = [Format::Qcow2, Format::Json]
            .into_iter()
            .find(|format| file.ends_with(format.suffix()))
            .ok_or_else(|| absent(file))?;
        let pair = file.strip_suffix(format.suffix()).unwrap_or(file);
        let (from, to) = pair.split_once("..").ok_or_else(|| absent(file))?;
        let from = self.engine.diff_point(&volume.info.name, &name(from)?)?;
        let to = match to {
            LIVE if format == Format::Json => None,
            to => Some(self.engine.snapshot(&volume.info.name, &name(to)?)?),
        };
        if to.as_ref().is_some_and(|to| from.epoch >= to.epoch) {
            return Err(absent(file));
        }
        Ok(Node::Diff(Box::new(DiffNode {
            volume,
            from,
            to,
            format,
            linked: true,
        })))
    }

    /// The listed names: every consecutive pair of snapshots that can be read, in both forms, each
    /// with its place in the listing, which only grows along it.
    pub(super) fn diff_names(&self, volume: &VolumeNode) -> Result<Vec<(NodeId, u64, String)>> {
        let mut all = self.engine.snapshots(&volume.info.name)?;
        all.retain(|s| s.state == SnapshotState::Active);
        let mut names = Vec::new();
        for pair in all.windows(2) {
            let [from, to] = pair else { continue };
            for (i, format) in [Format::Qcow2, Format::Json].into_iter().enumerate() {
                // Without a number there is no file; the rest can be listed.
                if let Ok(id) = number(from.ino, to.ino, format) {
                    let name = format!("{}..{}{}", from.name, to.name, format.suffix());
                    names.push((id, to.ino * 2 + i as u64, name));
                }
            }
        }
        Ok(names)
    }

    /// Finds a diff again by its number.
    pub(super) fn resolve_diff(&self, id: NodeId, volume: &Name) -> Result<Node> {
        let gone = || TreeError::new(Kind::NotFound, format!("inode {} is gone", id.0));
        let (from, to, format) = ends_of(id).ok_or_else(gone)?;
        let volume = match self.volume_node(volume) {
            Ok(volume) => volume,
            Err(_) => {
                return self
                    .handles
                    .open_diff(id)
                    .map(|n| Node::Diff(Box::new(n)))
                    .ok_or_else(gone);
            }
        };
        let all = self.engine.snapshots(&volume.info.name)?;
        let older = match all.iter().find(|s| s.ino == from) {
            Some(snapshot) => Some(DiffPoint::from(snapshot)),
            None => {
                let marks = self.engine.bookmarks(&volume.info.name)?;
                let mark = marks.iter().find(|b| b.ino == from);
                mark.map(DiffPoint::from)
            }
        };
        let live = live_node(volume.info.ino_base).0 == to;
        match (older, all.into_iter().find(|s| s.ino == to)) {
            (Some(from), to) if to.is_some() || live => Ok(Node::Diff(Box::new(DiffNode {
                volume,
                from,
                to,
                format,
                linked: true,
            }))),
            _ => self
                .handles
                .open_diff(id)
                .map(|n| Node::Diff(Box::new(n)))
                .ok_or_else(gone),
        }
    }

    /// Bytes of the file.
    pub(super) fn diff_size(&self, node: &DiffNode) -> Result<u64> {
        node.facts()?;
        if !node.linked {
            let open = self.handles.open_diff_size(node.id()?);
            return open.ok_or(TreeError::BadHandle);
        }
        match (&node.to, node.format) {
            (Some(to), Format::Qcow2) => {
                let content = self.content(node, to)?.0;
                Ok(content.layout()?.file_size())
            }
            _ => Ok(self.diff_json(node)?.len() as u64),
        }
    }

    /// Opens a diff.
    pub(super) fn open_diff(&self, node: DiffNode) -> Result<Handle> {
        node.facts()?;
        if !node.linked {
            // Opened through /proc/<pid>/fd: its ends have no names any more to open it by.
            return Err(TreeError::new(Kind::NotFound, "a snapshot was deleted"));
        }
        let Some(to) = node.to.clone().filter(|_| node.format == Format::Qcow2) else {
            let bytes = self.diff_json(&node)?;
            return Ok(Handle::DiffJson { node, bytes });
        };
        let (content, from, to) = self.content(&node, &to)?;
        let ends = Ends {
            backing: backing(&node.from.name),
            from: node.from.uuid,
            to: to.info().uuid,
        };
        let layout = Arc::clone(content.layout()?);
        let image = Qcow2::new(Arc::clone(&to) as Arc<dyn Image>, layout, &ends)?;
        Ok(Handle::Diff(DiffHandle {
            node,
            image,
            from,
            to,
        }))
    }

    fn diff_json(&self, node: &DiffNode) -> Result<Vec<u8>> {
        let volume = &node.volume.info.name;
        let list = match &node.to {
            Some(to) => {
                let content = self.content(node, to)?.0;
                let diff = Diff {
                    from: node.from.clone(),
                    to: node.to.clone(),
                    size: content.size,
                    grain: content.grain,
                    changed: Vec::new(),
                };
                DiffList::new(&diff, content.extents.clone())
            }
            None => {
                let diff = self.engine.diff(volume, &node.from.name, None)?;
                same(diff.from.ino, node.from.ino)?;
                let image = LiveImage::new(Arc::clone(&node.volume.volume));
                let extents = extents(&image, &diff)?;
                DiffList::new(&diff, extents)
            }
        };
        Ok(list.json()?)
    }

    /// The content of a diff that does not end at `live`, and its snapshots, held.
    fn content(&self, node: &DiffNode, to: &SnapshotInfo) -> Result<Held> {
        let volume = &node.volume.info.name;
        let open = |name: &Name, ino: u64| -> Result<Arc<Snapshot>> {
            let snapshot = self.engine.open_snapshot(volume, name)?;
            same(snapshot.info().ino, ino)?;
            Ok(snapshot)
        };
        let from = &node.from;
        let older = match from.bookmark {
            true => None,
            false => Some(open(&from.name, from.ino)?),
        };
        let newer = open(&to.name, to.ino)?;
        let slot = self.computed.slot((node.from.ino, to.ino));
        let mut kept = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(content) = &*kept {
            return Ok((Arc::clone(content), older, newer));
        }
        let diff = self.engine.diff(volume, &node.from.name, Some(&to.name))?;
        same(diff.from.ino, node.from.ino)?;
        diff.to
            .as_ref()
            .map_or(Ok(()), |found| same(found.ino, to.ino))?;
        let extents = extents(&*newer, &diff)?;
        let layout = Layout::new(diff.size, &extents).map(Arc::new);
        let content = Arc::new(Content {
            size: diff.size,
            grain: diff.grain,
            extents,
            layout: layout.map_err(|e: Error| (e.kind(), e.to_string())),
        });
        *kept = Some(Arc::clone(&content));
        drop(kept);
        self.computed.trim();
        Ok((content, older, newer))
    }
}

/// How an overlay names the older image. QEMU takes what stands before a colon for a protocol, unless
/// a slash comes first.
fn backing(name: &Name) -> String {
    let here = if name.as_str().contains(':') {
        "./"
    } else {
        ""
    };
    format!("{here}{name}{IMAGE_SUFFIX}")
}

/// Whether a name still means the snapshot it meant.
fn same(found: u64, meant: u64) -> Result<()> {
    if found == meant {
        return Ok(());
    }
    let why = "the snapshot was just renamed";
    Err(TreeError::new(Kind::NotFound, why))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_tell_the_ends_and_end_with_a_limit() {
        let last = (1 << END_BITS) - 1;
        let mut seen = std::collections::BTreeSet::new();
        for from in [1, 2, 77, last] {
            for to in [1, 2, 78, last] {
                for format in [Format::Qcow2, Format::Json] {
                    let id = number(from, to, format).unwrap();
                    assert_eq!(ends_of(id), Some((from, to, format)));
                    assert!(seen.insert(id) && id.0 >> 63 == 1);
                }
            }
        }
        assert_eq!(ends_of(NodeId(last)), None);
        for (from, to) in [(last + 1, 1), (1, last + 1)] {
            let refused = number(from, to, Format::Json).unwrap_err();
            assert!(matches!(refused, TreeError::Engine(e) if e.kind() == Kind::Limit));
        }
    }
}
