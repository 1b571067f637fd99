//! The inside of a [`SimWorld`](super::SimWorld): nodes, lives, faults, space.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use crate::sys::disk::Space;
use crate::sys::sim::Op;
use crate::sys::sim::medium::{Change, Medium, Names, Rng};

/// Size that a filesystem without a limit shows.
pub(super) const UNLIMITED: u64 = 1 << 50;
/// The root directory's number.
pub(super) const ROOT: u64 = 1;
/// When the simulated clock starts: 2026-01-01.
pub(super) const EPOCH_NS: i64 = 1_767_225_600_000_000_000;

#[derive(Debug, Clone)]
pub(super) enum Content {
    File(Medium),
    Dir(Names),
}

#[derive(Debug, Clone)]
pub(super) struct Node {
    /// The filesystem it belongs to: the number of its topmost directory below the root.
    pub(super) fs: u64,
    /// Whether the tree as it is now names it.
    pub(super) linked: bool,
    /// Handles of this life.
    pub(super) open: u64,
    pub(super) ctime_ns: i64,
    /// What a power cut sets it back to: a sync of the data alone does not keep times.
    pub(super) durable_ctime_ns: i64,
    pub(super) content: Content,
}

#[derive(Debug, Clone)]
pub(super) struct World {
    pub(super) nodes: BTreeMap<u64, Node>,
    pub(super) next_id: u64,
    pub(super) rng: Rng,
    pub(super) now_ns: i64,
    /// Which life handles must belong to.
    pub(super) life: u64,
    /// Changing operations until this life ends by itself; 0: it has.
    pub(super) dies_in: Option<u64>,
    pub(super) faults: Vec<(Op, u64, i32)>,
    pub(super) counts: BTreeMap<Op, u64>,
    /// Bytes a filesystem may allocate.
    pub(super) limits: BTreeMap<u64, u64>,
}

impl World {
    pub(super) fn check_life(&self, life: u64) -> io::Result<()> {
        if life == self.life && self.dies_in != Some(0) {
            Ok(())
        } else {
            Err(os(libc::EIO))
        }
    }

    /// Counts an operation and lets it fail if it is to.
    pub(super) fn begin(&mut self, life: u64, op: Op, changing: bool) -> io::Result<()> {
        self.check_life(life)?;
        *self.counts.entry(op).or_default() += 1;
        if changing && let Some(left) = &mut self.dies_in {
            *left -= 1;
            if *left == 0 {
                return Err(os(libc::EIO));
            }
        }
        let mut errno = None;
        self.faults.retain_mut(|(kind, left, error)| {
            if *kind == op {
                *left -= 1;
                if *left == 0 {
                    errno = Some(*error);
                }
            }
            *left > 0
        });
        errno.map_or(Ok(()), |errno| Err(os(errno)))
    }

    pub(super) fn file(&mut self, id: u64) -> io::Result<&mut Medium> {
        match self.nodes.get_mut(&id).map(|node| &mut node.content) {
            Some(Content::File(file)) => Ok(file),
            Some(Content::Dir(_)) => Err(os(libc::EISDIR)),
            None => Err(os(libc::ENOENT)),
        }
    }

    pub(super) fn names(&mut self, id: u64) -> io::Result<&mut Names> {
        match self.nodes.get_mut(&id).map(|node| &mut node.content) {
            Some(Content::Dir(names)) => Ok(names),
            Some(Content::File(_)) => Err(os(libc::ENOTDIR)),
            None => Err(os(libc::ENOENT)),
        }
    }

    pub(super) fn find(&mut self, path: &str) -> Option<u64> {
        path.split('/')
            .filter(|name| !name.is_empty())
            .try_fold(ROOT, |at, name| {
                self.names(at).ok()?.entries.get(name).copied()
            })
    }

    /// Makes a node in a directory; not durable.
    pub(super) fn make(&mut self, dir: u64, name: &str, content: Content) -> io::Result<u64> {
        let id = self.next_id;
        let add = Some((name.to_owned(), id));
        self.names(dir)?.change(Change { remove: None, add });
        self.next_id += 1;
        let fs = match self.nodes.get(&dir) {
            Some(parent) if dir != ROOT => parent.fs,
            _ => id,
        };
        let ctime_ns = self.now_ns;
        self.nodes.insert(
            id,
            Node {
                fs,
                linked: true,
                open: 0,
                ctime_ns,
                durable_ctime_ns: ctime_ns,
                content,
            },
        );
        Ok(id)
    }

    pub(super) fn make_durably(&mut self, dir: u64, name: &str, content: Content) -> u64 {
        let names = self.names(dir).expect("the parent is a directory");
        if let Some(id) = names.entries.get(name) {
            return *id;
        }
        let id = self
            .make(dir, name, content)
            .expect("the parent is a directory");
        self.names(dir).expect("as above").sync();
        id
    }

    pub(super) fn changed(&mut self, id: u64) {
        self.now_ns += 1000;
        let now_ns = self.now_ns;
        if let Some(node) = self.nodes.get_mut(&id) {
            node.ctime_ns = now_ns;
        }
    }

    /// Bytes the filesystem of a node may still allocate.
    pub(super) fn space_of(&self, id: u64) -> Space {
        let fs = self.nodes.get(&id).map_or(ROOT, |node| node.fs);
        let total = self.limits.get(&fs).copied().unwrap_or(UNLIMITED);
        let held = |node: &&Node| node.fs == fs && (node.linked || node.open > 0);
        let used: u64 = self.nodes.values().filter(held).map(Node::allocated).sum();
        Space {
            total,
            available: total.saturating_sub(used),
        }
    }

    pub(super) fn forget_handles(&mut self) {
        self.life += 1;
        self.dies_in = None;
        self.faults.clear();
        self.nodes.values_mut().for_each(|node| node.open = 0);
    }

    /// Drops nodes that nothing can name again.
    pub(super) fn sweep(&mut self) {
        let (mut seen, mut queue) = (BTreeSet::from([ROOT]), vec![ROOT]);
        while let Some(id) = queue.pop() {
            if let Some(Node {
                content: Content::Dir(names),
                ..
            }) = self.nodes.get(&id)
            {
                queue.extend(names.reachable().filter(|id| seen.insert(*id)));
            }
        }
        self.nodes
            .retain(|id, node| seen.contains(id) || node.open > 0);
        let named: BTreeSet<u64> = self.nodes.values().flat_map(Node::entries).collect();
        for (id, node) in &mut self.nodes {
            node.linked = *id == ROOT || named.contains(id);
        }
    }

    pub(super) fn unlink(&mut self, id: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.linked = false;
        }
    }
}

impl Node {
    pub(super) fn allocated(&self) -> u64 {
        match &self.content {
            Content::File(file) => file.allocated(),
            Content::Dir(_) => 0,
        }
    }

    pub(super) fn entries(&self) -> Vec<u64> {
        match &self.content {
            Content::File(_) => Vec::new(),
            Content::Dir(names) => names.entries.values().copied().collect(),
        }
    }
}

pub(super) fn os(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}
