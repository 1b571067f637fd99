//! Inode numbers to nodes, and what the kernel still remembers.
//!
//! The kernel speaks in inode numbers it was given by a lookup, until it forgets them. The table
//! keeps for each of them the *name* it had, and resolving asks the engine by name and compares
//! numbers, so a name that now belongs to something else never answers for the old node (T4). A
//! snapshot renamed behind the table's back is found again by its number; a deleted one only while
//! it is open.
//!
//! The table is bounded by the kernel's own cache: an entry goes when the kernel forgets it. A number
//! that is asked for all the same (by a file handle that somebody has kept, as NFS clients do) is
//! looked for among everything there is: numbers are never given again, so it can only mean one thing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Kind;
use crate::tree::Tree;
use crate::tree::diffs::{DiffNode, ends_of};
use crate::tree::directory::image_name;
use crate::tree::types::{FileKind, NodeId, Result, StatusFile, TreeError};
use crate::units::Name;
use crate::volume::{CloneInfo, SnapshotInfo, Volume, VolumeInfo};

/// The root directory.
pub const ROOT: NodeId = NodeId(1);
/// The directory `.stillframe`.
pub const CONTROL: NodeId = NodeId(2);
/// `status.json`.
pub const STATUS_FILE: NodeId = NodeId(3);
/// `metrics.prom`.
pub const METRICS_FILE: NodeId = NodeId(4);

/// Name of the control directory.
pub(super) const CONTROL_NAME: &str = ".stillframe";
/// Name of a volume's live image.
pub(super) const LIVE_NAME: &str = "live.img";
/// Name of a volume's directory of snapshots.
pub(super) const SNAPSHOTS_NAME: &str = "snapshots";
/// Name of a volume's directory of clones.
pub(super) const CLONES_NAME: &str = "clones";
/// Name of a volume's directory of diffs.
pub(super) const DIFFS_NAME: &str = "diffs";

/// Numbers from a volume's base on that are its own nodes'.
const INO_PER_VOLUME: u64 = 16;
const LIVE_OFFSET: u64 = 1;
const SNAPSHOTS_OFFSET: u64 = 2;
const CLONES_OFFSET: u64 = 3;
const DIFFS_OFFSET: u64 = 4;

/// The directory of a volume with this base.
pub fn volume_directory(ino_base: u64) -> NodeId {
    NodeId(ino_base)
}

pub(super) fn live_node(ino_base: u64) -> NodeId {
    NodeId(ino_base + LIVE_OFFSET)
}

pub(super) fn snapshots_node(ino_base: u64) -> NodeId {
    NodeId(ino_base + SNAPSHOTS_OFFSET)
}

pub(super) fn clones_node(ino_base: u64) -> NodeId {
    NodeId(ino_base + CLONES_OFFSET)
}

pub(super) fn diffs_node(ino_base: u64) -> NodeId {
    NodeId(ino_base + DIFFS_OFFSET)
}

/// The name and node of a status file.
pub(super) fn status_entry(file: StatusFile) -> (NodeId, &'static str) {
    match file {
        StatusFile::Json => (STATUS_FILE, "status.json"),
        StatusFile::Metrics => (METRICS_FILE, "metrics.prom"),
    }
}

/// A volume and its facts at one moment.
#[derive(Clone)]
pub(super) struct VolumeNode {
    pub volume: Arc<Volume>,
    pub info: VolumeInfo,
}

/// A node, with the facts that its operations need.
pub(super) enum Node {
    Root,
    Control,
    Status(StatusFile),
    VolumeDirectory(VolumeNode),
    Live(VolumeNode),
    Snapshots(VolumeNode),
    Clones(VolumeNode),
    Diffs(VolumeNode),
    Diff(Box<DiffNode>),
    /// `linked` is false for a deleted snapshot that is still open.
    Snapshot {
        info: SnapshotInfo,
        linked: bool,
    },
    /// `linked` is false for a deleted clone that is still open.
    Clone {
        info: Box<CloneInfo>,
        linked: bool,
    },
}

impl Node {
    pub fn kind(&self) -> FileKind {
        match self {
            Node::Root
            | Node::Control
            | Node::VolumeDirectory(_)
            | Node::Snapshots(_)
            | Node::Clones(_)
            | Node::Diffs(_) => FileKind::Directory,
            Node::Status(_)
            | Node::Live(_)
            | Node::Snapshot { .. }
            | Node::Clone { .. }
            | Node::Diff(_) => FileKind::File,
        }
    }
}

impl Node {
    /// Its number.
    ///
    /// # Errors
    /// `Limit` for a diff that can have none.
    pub fn id(&self) -> Result<NodeId> {
        Ok(match self {
            Node::Root => ROOT,
            Node::Control => CONTROL,
            Node::Status(file) => status_entry(*file).0,
            Node::VolumeDirectory(v) => volume_directory(v.info.ino_base),
            Node::Live(v) => live_node(v.info.ino_base),
            Node::Snapshots(v) => snapshots_node(v.info.ino_base),
            Node::Clones(v) => clones_node(v.info.ino_base),
            Node::Diffs(v) => diffs_node(v.info.ino_base),
            Node::Diff(diff) => diff.id()?,
            Node::Snapshot { info, .. } => NodeId(info.ino),
            Node::Clone { info, .. } => NodeId(info.ino),
        })
    }
}

/// What the table keeps of a node.
#[derive(Clone)]
enum Known {
    /// Any of a volume's own nodes.
    Volume(Name),
    Snapshot(Name, Name),
    Clone(Name, Name),
    /// A diff of two points of this volume; its number says which.
    Diff(Name),
}

struct Entry {
    known: Known,
    /// Answers that named this node and that the kernel has not yet forgotten.
    lookups: u64,
}

/// The nodes the kernel knows.
#[derive(Default)]
pub(super) struct Nodes {
    table: Mutex<HashMap<u64, Entry>>,
}

impl Nodes {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Entry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an answer that names the node. The fixed nodes need no entry.
    pub fn remember(&self, id: NodeId, node: &Node) {
        let known = match node {
            Node::Root | Node::Control | Node::Status(_) => return,
            Node::VolumeDirectory(v)
            | Node::Live(v)
            | Node::Snapshots(v)
            | Node::Clones(v)
            | Node::Diffs(v) => Known::Volume(v.info.name.clone()),
            Node::Clone { info, .. } => Known::Clone(info.volume.clone(), info.name.clone()),
            Node::Diff(diff) => Known::Diff(diff.volume.info.name.clone()),
            Node::Snapshot { info, .. } => Known::Snapshot(info.volume.clone(), info.name.clone()),
        };
        let mut table = self.lock();
        let lookups = table.get(&id.0).map_or(0, |e| e.lookups);
        table.insert(
            id.0,
            Entry {
                known,
                lookups: lookups + 1,
            },
        );
    }

    /// Counts an answer that names a node by a name it no longer has in this directory. It may have
    /// another one, by which somebody may look it up before the kernel gives this answer back.
    pub fn remember_listed(&self, id: NodeId, parent: &Node, name: &str) {
        let mut table = self.lock();
        if let Some(entry) = table.get_mut(&id.0) {
            entry.lookups += 1;
            return;
        }
        let known = match parent {
            Node::Root => Name::new(name).ok().map(Known::Volume),
            Node::VolumeDirectory(v) => Some(Known::Volume(v.info.name.clone())),
            Node::Diffs(v) => Some(Known::Diff(v.info.name.clone())),
            Node::Snapshots(v) => image_name(name)
                .ok()
                .map(|name| Known::Snapshot(v.info.name.clone(), name)),
            Node::Clones(v) => image_name(name)
                .ok()
                .map(|name| Known::Clone(v.info.name.clone(), name)),
            // Its entries are fixed; the others are no directories.
            Node::Control
            | Node::Live(_)
            | Node::Status(_)
            | Node::Snapshot { .. }
            | Node::Clone { .. }
            | Node::Diff(_) => None,
        };
        if let Some(known) = known {
            table.insert(id.0, Entry { known, lookups: 1 });
        }
    }

    fn forget(&self, id: NodeId, count: u64) {
        let mut table = self.lock();
        if let Some(entry) = table.get_mut(&id.0) {
            entry.lookups = entry.lookups.saturating_sub(count);
            if entry.lookups == 0 {
                table.remove(&id.0);
            }
        }
    }

    fn known(&self, id: NodeId) -> Option<Known> {
        self.lock().get(&id.0).map(|e| e.known.clone())
    }

    fn renamed(&self, id: NodeId, known: Known) {
        if let Some(entry) = self.lock().get_mut(&id.0) {
            entry.known = known;
        }
    }

    pub fn len(&self) -> usize {
        self.lock().len()
    }
}

impl Tree {
    /// The kernel drops `count` of the lookups it was answered for this node.
    pub fn forget(&self, node: NodeId, count: u64) {
        self.nodes.forget(node, count);
    }

    /// Which volume, snapshot or clone a node belongs to, for messages: from memory alone, so that it
    /// answers while the engine hangs. `None` for what the kernel does not know, or at a busy moment.
    pub fn belongs_to(&self, node: NodeId) -> Option<String> {
        let table = self.nodes.table.try_lock().ok()?;
        Some(match &table.get(&node.0)?.known {
            Known::Volume(volume) => volume.to_string(),
            Known::Snapshot(volume, name) => format!("{volume}@{name}"),
            Known::Clone(volume, name) => format!("{volume}/{name}"),
            Known::Diff(volume) => format!("a diff of {volume}"),
        })
    }

    /// Whether looking at a node, or a name in it, may read content: the size of a diff is only known
    /// once its changed grains were read. The caller then lets nobody else wait for it.
    pub fn reads_to_look(&self, node: NodeId) -> bool {
        const DIFF_BIT: u64 = 1 << 63;
        node.0 & DIFF_BIT != 0 || matches!(self.resolve(node), Ok(Node::Diffs(_)))
    }

    /// Number of nodes the kernel knows besides the fixed ones, for status.
    pub fn known_nodes(&self) -> usize {
        self.nodes.len()
    }

    pub(super) fn resolve(&self, id: NodeId) -> Result<Node> {
        match id {
            ROOT => return Ok(Node::Root),
            CONTROL => return Ok(Node::Control),
            STATUS_FILE => return Ok(Node::Status(StatusFile::Json)),
            METRICS_FILE => return Ok(Node::Status(StatusFile::Metrics)),
            _ => {}
        }
        match self.nodes.known(id) {
            Some(Known::Volume(name)) => self.resolve_volume(id, &name),
            Some(Known::Snapshot(volume, name)) => self.resolve_snapshot(id, &volume, &name),
            Some(Known::Clone(volume, name)) => self.resolve_clone(id, &volume, &name),
            Some(Known::Diff(volume)) => self.resolve_diff(id, &volume),
            None => match self.resolve_open(id) {
                Ok(open) => Ok(open),
                Err(gone) => self.find(id).ok_or(gone),
            },
        }
    }

    /// Looks for a number among all there is.
    fn find(&self, id: NodeId) -> Option<Node> {
        let (ino, diff) = (id.0, ends_of(id).is_some());
        self.engine.volumes().iter().find_map(|volume| {
            let info = volume.info();
            if diff {
                return self.resolve_diff(id, &info.name).ok();
            }
            if (info.ino_base..info.ino_base + INO_PER_VOLUME).contains(&ino) {
                return self.resolve_volume(id, &info.name).ok();
            }
            let snapshots = self.engine.snapshots(&info.name).ok()?;
            if let Some(info) = snapshots.into_iter().find(|s| s.ino == ino) {
                return Some(Node::Snapshot { info, linked: true });
            }
            let clones = self.engine.clones(&info.name).ok()?;
            let info = Box::new(clones.into_iter().find(|c| c.ino == ino)?);
            Some(Node::Clone { info, linked: true })
        })
    }

    fn resolve_volume(&self, id: NodeId, name: &Name) -> Result<Node> {
        let node = self.volume_node(name)?;
        let base = node.info.ino_base;
        if id == volume_directory(base) {
            Ok(Node::VolumeDirectory(node))
        } else if id == live_node(base) {
            Ok(Node::Live(node))
        } else if id == snapshots_node(base) {
            Ok(Node::Snapshots(node))
        } else if id == clones_node(base) {
            Ok(Node::Clones(node))
        } else if id == diffs_node(base) {
            Ok(Node::Diffs(node))
        } else {
            Err(gone(id))
        }
    }

    fn resolve_snapshot(&self, id: NodeId, volume: &Name, name: &Name) -> Result<Node> {
        match self.engine.snapshot(volume, name) {
            Ok(info) if info.ino == id.0 => return Ok(Node::Snapshot { info, linked: true }),
            Ok(_) => {}
            Err(e) if e.kind() == Kind::NotFound => {}
            Err(e) => return Err(e.into()),
        }
        let listed = match self.engine.snapshots(volume) {
            Ok(listed) => listed,
            Err(e) if e.kind() == Kind::NotFound => Vec::new(),
            Err(e) => return Err(e.into()),
        };
        match listed.into_iter().find(|info| info.ino == id.0) {
            Some(info) => {
                let known = Known::Snapshot(volume.clone(), info.name.clone());
                self.nodes.renamed(id, known);
                Ok(Node::Snapshot { info, linked: true })
            }
            None => self.resolve_open(id),
        }
    }

    fn resolve_clone(&self, id: NodeId, volume: &Name, name: &Name) -> Result<Node> {
        let node = |info: CloneInfo| {
            Ok(Node::Clone {
                info: Box::new(info),
                linked: true,
            })
        };
        match self.engine.clone_info(volume, name) {
            Ok(info) if info.ino == id.0 => return node(info),
            Ok(_) => {}
            Err(e) if e.kind() == Kind::NotFound => {}
            Err(e) => return Err(e.into()),
        }
        let listed = match self.engine.clones(volume) {
            Ok(listed) => listed,
            Err(e) if e.kind() == Kind::NotFound => Vec::new(),
            Err(e) => return Err(e.into()),
        };
        match listed.into_iter().find(|info| info.ino == id.0) {
            Some(info) => {
                let known = Known::Clone(volume.clone(), info.name.clone());
                self.nodes.renamed(id, known);
                node(info)
            }
            None => self.resolve_open(id),
        }
    }

    /// A deleted snapshot or clone lives on as a node while it is open.
    fn resolve_open(&self, id: NodeId) -> Result<Node> {
        if let Some(snapshot) = self.handles.open_snapshot(id) {
            return Ok(Node::Snapshot {
                info: snapshot.info(),
                linked: false,
            });
        }
        match self.handles.open_clone(id) {
            Some(clone) => Ok(Node::Clone {
                info: Box::new(clone.info()),
                linked: false,
            }),
            None => Err(gone(id)),
        }
    }

    pub(super) fn volume_node(&self, name: &Name) -> Result<VolumeNode> {
        let volume = self.engine.volume(name)?;
        let info = volume.info();
        Ok(VolumeNode { volume, info })
    }
}

fn gone(id: NodeId) -> TreeError {
    TreeError::new(Kind::NotFound, format!("inode {} is gone", id.0))
}
