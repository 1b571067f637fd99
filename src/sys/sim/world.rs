//! The inside of a [`SimWorld`](super::SimWorld): nodes, lives, faults, space.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use crate::sys::disk::Space;
use crate::sys::sim::Op;
use crate::sys::sim::cut::{Fate, Rng};
use crate::sys::sim::faults::Fault;
use crate::sys::sim::medium::Medium;
use crate::sys::sim::names::{Change, Names};

/// Size that a filesystem without a limit shows.
pub(super) const UNLIMITED: u64 = 1 << 50;
/// The root directory's number.
pub(super) const ROOT: u64 = 1;
/// When the simulated clock starts: 2026-01-01.
pub(super) const EPOCH_NS: i64 = 1_767_225_600_000_000_000;

#[derive(Debug, Clone)]
pub(super) enum Content {
    /// Shared with forks until one of them changes it.
    File(Arc<Medium>),
    Dir(Names),
}

#[derive(Debug, Clone)]
pub(super) struct Node {
    /// The filesystem it belongs to: the number of its topmost directory below the root.
    pub(super) fs: u64,
    /// The directory it was made in.
    pub(super) dir: u64,
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
    pub(super) faults: Vec<Fault>,
    /// How often a fault has struck.
    pub(super) struck: u64,
    /// Filesystems whose device is gone until the next life.
    pub(super) gone: BTreeSet<u64>,
    /// Grows with everything that is done.
    pub(super) stamp: u64,
    pub(super) counts: BTreeMap<Op, u64>,
    /// Bytes a filesystem may allocate.
    pub(super) limits: BTreeMap<u64, u64>,
}

impl World {
    /// Whether a handle of this life for this node can still do anything.
    pub(super) fn check(&self, life: u64, id: u64) -> io::Result<()> {
        let gone = || {
            self.nodes
                .get(&id)
                .is_some_and(|node| self.gone.contains(&node.fs))
        };
        if life == self.life && self.dies_in != Some(0) && (self.gone.is_empty() || !gone()) {
            Ok(())
        } else {
            Err(os(libc::EIO))
        }
    }

    /// Counts an operation and lets this life end at it if it is to.
    pub(super) fn count(&mut self, life: u64, id: u64, op: Op, changing: bool) -> io::Result<()> {
        self.check(life, id)?;
        *self.counts.entry(op).or_default() += 1;
        if changing && let Some(left) = &mut self.dies_in {
            *left -= 1;
            if *left == 0 {
                return Err(os(libc::EIO));
            }
        }
        Ok(())
    }

    /// A length below `len`, if asked for one.
    pub(super) fn rng_below_if(&mut self, asked: bool, len: usize) -> Option<usize> {
        asked.then(|| self.rng.below(len.max(1) as u64) as usize)
    }

    /// A file to look at.
    pub(super) fn look(&self, id: u64) -> io::Result<&Medium> {
        match self.nodes.get(&id).map(|node| &node.content) {
            Some(Content::File(file)) => Ok(file),
            Some(Content::Dir(_)) => Err(os(libc::EISDIR)),
            None => Err(os(libc::ENOENT)),
        }
    }

    /// A file to change.
    pub(super) fn file(&mut self, id: u64) -> io::Result<&mut Medium> {
        self.stamp += 1;
        match self.nodes.get_mut(&id).map(|node| &mut node.content) {
            Some(Content::File(file)) => {
                let file = Arc::make_mut(file);
                file.now = self.stamp;
                Ok(file)
            }
            Some(Content::Dir(_)) => Err(os(libc::EISDIR)),
            None => Err(os(libc::ENOENT)),
        }
    }

    /// Cuts the power of some filesystems: each as a whole in one of several ways, or every file and
    /// directory in its own.
    pub(super) fn cut(&mut self, of: impl Fn(u64) -> bool) {
        let World { nodes, rng, .. } = self;
        let mut devices: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for node in nodes.values().filter(|node| of(node.fs)) {
            devices.entry(node.fs).or_default().extend(node.stamps());
        }
        let mut fates = BTreeMap::new();
        for (fs, stamps) in &devices {
            if rng.below(2) == 0 {
                fates.insert(*fs, Fate::draw(rng, stamps));
            }
        }
        for node in nodes.values_mut().filter(|node| of(node.fs)) {
            let whole = fates.get(&node.fs).copied();
            let fate = whole.unwrap_or_else(|| Fate::draw(rng, &node.stamps()));
            node.ctime_ns = node.durable_ctime_ns;
            match &mut node.content {
                Content::File(file) if file.is_durable() => {}
                Content::File(file) => Arc::make_mut(file).cut(fate, rng),
                Content::Dir(names) => names.cut(fate, rng),
            }
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
        self.rename(dir, Change { remove: None, add })?;
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
                dir,
                linked: true,
                open: 0,
                ctime_ns,
                durable_ctime_ns: ctime_ns,
                content,
            },
        );
        Ok(id)
    }

    /// Changes a directory; not durable.
    pub(super) fn rename(&mut self, dir: u64, change: Change) -> io::Result<()> {
        self.stamp += 1;
        let stamp = self.stamp;
        self.names(dir)?.change(change, stamp);
        Ok(())
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
        self.gone.clear();
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
    /// When what is in doubt of it was done.
    fn stamps(&self) -> Vec<u64> {
        match &self.content {
            Content::File(file) => file.stamps(),
            Content::Dir(names) => names.stamps(),
        }
    }

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
