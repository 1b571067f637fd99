//! The test twin of the storage traits: disks and directories in memory, and a power plug.
//!
//! A [`SimWorld`] holds everything: files, directories, time, randomness, faults. Two runs with one
//! seed and one order of calls are equal byte for byte. What it promises to be like a machine:
//!
//! - W1 What a sync of a file or directory covered with `Ok` survives every power cut.
//! - W2 At [`SimWorld::power_cut`] each sector not synced is old, new, anything it was in between, torn
//!   (the head of a newer image with the tail of an older one), zero or garbage; a size not synced is
//!   any the file had since; changes of a directory not synced are kept up to some point, or each by
//!   chance. By chance a whole device (the files below one topmost directory) has stopped at an
//!   earlier moment instead, in order; devices do so independently.
//! - W3 After [`SimWorld::kill`] or [`SimWorld::power_cut`] every handle opened before answers
//!   EIO: a dead process cannot write into the next life.
//! - W4 A failed sync leaves what it covered clean but not on the medium: a later good sync does
//!   not bring it back, a power cut loses it for certain.
//! - W5 Holes are exact in units of 4096 bytes.
//!
//! It does not model reordering of reads, time spent, or links. One mutex guards the world; it is
//! never held while another lock is taken.

mod cut;
mod faults;
#[cfg(test)]
mod faults_tests;
mod handles;
mod medium;
mod names;
#[cfg(test)]
mod tests;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::sys::clock::Clock;
use crate::sys::sim::cut::Rng;
pub use crate::sys::sim::faults::{Fault, What};
pub use crate::sys::sim::handles::{SimDir, SimDisk};
use crate::sys::sim::medium::Medium;
use crate::sys::sim::names::Names;
use crate::sys::sim::world::{Content, EPOCH_NS, Node, ROOT, World};

/// Operations that are counted and can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Op {
    /// [`Disk::read_exact_at`](crate::sys::disk::Disk::read_exact_at).
    Read,
    /// [`Disk::write_all_at`](crate::sys::disk::Disk::write_all_at); a failed one has written some
    /// prefix.
    Write,
    /// [`Disk::sync_data`](crate::sys::disk::Disk::sync_data).
    Sync,
    /// [`Disk::set_size`](crate::sys::disk::Disk::set_size).
    SetSize,
    /// [`Disk::punch`](crate::sys::disk::Disk::punch).
    Punch,
    /// [`Dir::open`](crate::sys::disk::Dir::open) and
    /// [`Dir::subdir`](crate::sys::disk::Dir::subdir), creating or not.
    Open,
    /// [`Dir::remove`](crate::sys::disk::Dir::remove).
    Remove,
    /// [`Dir::rename`](crate::sys::disk::Dir::rename).
    Rename,
    /// [`Dir::sync`](crate::sys::disk::Dir::sync).
    DirSync,
    /// Everything that asks and moves no content: sizes, holes, identities, space, listings.
    Look,
}

/// A simulated machine. Clones are the same machine.
#[derive(Clone)]
pub struct SimWorld(Arc<Mutex<World>>);

impl fmt::Debug for SimWorld {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimWorld") // its content would fill a terminal for minutes
    }
}

impl SimWorld {
    /// An empty machine whose every chance follows from `seed`.
    pub fn new(seed: u64) -> SimWorld {
        let content = Content::Dir(Names::default());
        let root = Node {
            fs: ROOT,
            dir: ROOT,
            linked: true,
            open: 0,
            ctime_ns: EPOCH_NS,
            durable_ctime_ns: EPOCH_NS,
            content,
        };
        SimWorld(Arc::new(Mutex::new(World {
            nodes: BTreeMap::from([(ROOT, root)]),
            next_id: ROOT + 1,
            rng: Rng(seed),
            now_ns: EPOCH_NS,
            life: 1,
            dies_in: None,
            faults: Vec::new(),
            struck: 0,
            gone: BTreeSet::new(),
            stamp: 0,
            counts: BTreeMap::new(),
            limits: BTreeMap::new(),
        })))
    }

    /// A copy of the machine as it is, with chances of its own: to cut the power at one point in
    /// many ways. Handles of `self` do not belong to it.
    #[must_use]
    pub fn fork(&self, seed: u64) -> SimWorld {
        let mut world = self.lock().clone();
        world.rng = Rng(seed);
        world.forget_handles();
        SimWorld(Arc::new(Mutex::new(world)))
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        // A test that panicked inside says so itself; the world stays usable for the others.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The directory at `path` (`a/b`), made durably where it is missing. Neither counted nor
    /// failed.
    ///
    /// # Panics
    /// If a component is a file or no name: tests only.
    pub fn dir(&self, path: &str) -> Arc<SimDir> {
        let mut world = self.lock();
        let mut at = ROOT;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            at = world.make_durably(at, name, Content::Dir(Names::default()));
        }
        assert!(world.names(at).is_ok(), "{path} is a directory");
        Arc::new(SimDir {
            world: self.clone(),
            id: at,
            life: world.life,
        })
    }

    /// A new handle for the file at `path`, if it exists. Neither counted nor failed.
    pub fn disk(&self, path: &str) -> Option<Arc<SimDisk>> {
        let mut world = self.lock();
        let id = world.find(path)?;
        world.look(id).ok()?;
        Some(self.handle(&mut world, id, true))
    }

    /// Makes a durable file of `size` bytes, all hole, and opens it.
    ///
    /// # Panics
    /// If a component of the path is a file: tests only.
    pub fn add_disk(&self, path: &str, size: u64) -> Arc<SimDisk> {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        let dir = self.dir(dir);
        let mut world = self.lock();
        let id = world.make_durably(dir.id, name, Content::File(Arc::new(Medium::new())));
        let file = world.file(id).expect("the path does not name a directory");
        file.set_size(size);
        file.sync();
        self.handle(&mut world, id, true)
    }

    /// Whole content of the file at `path`, if it exists. Neither counted nor failed.
    pub fn peek(&self, path: &str) -> Option<Vec<u8>> {
        let mut world = self.lock();
        let id = world.find(path)?;
        let file = world.look(id).ok()?;
        let mut bytes = vec![0; usize::try_from(file.size()).ok()?];
        file.read(0, &mut bytes);
        Some(bytes)
    }

    /// Changes bytes on the medium behind everybody's back (rot, or a foreign writer).
    ///
    /// # Panics
    /// If there is no such file: tests only.
    pub fn poke(&self, path: &str, offset: u64, bytes: &[u8]) {
        let mut world = self.lock();
        let id = world.find(path).expect("the file exists");
        world.file(id).expect("it is a file").poke(offset, bytes);
        world.changed(id);
    }

    /// The process dies (SIGKILL): what the kernel has stays, handles are dead, faults are
    /// forgotten.
    pub fn kill(&self) {
        let mut world = self.lock();
        world.forget_handles();
        world.sweep();
    }

    /// The power fails: W2. Handles are dead, faults are forgotten.
    pub fn power_cut(&self) {
        let mut world = self.lock();
        world.cut(|_| true);
        world.forget_handles();
        world.sweep();
    }

    /// Lets the n-th operation of its kind from now (the next is 1) fail with `errno`, once.
    pub fn fail_nth(&self, op: Op, n: u64, errno: i32) {
        let ops = match op {
            Op::Read => &[Op::Read],
            Op::Write => &[Op::Write],
            Op::Sync => &[Op::Sync],
            Op::SetSize => &[Op::SetSize],
            Op::Punch => &[Op::Punch],
            Op::Open => &[Op::Open],
            Op::Remove => &[Op::Remove],
            Op::Rename => &[Op::Rename],
            Op::DirSync => &[Op::DirSync],
            Op::Look => &[Op::Look],
        };
        self.inject(Fault {
            what: What::Errno(errno),
            ops,
            under: "",
            nth: n,
            lasting: false,
        });
    }

    /// Lets this life end at the n-th changing operation from now (the next is 1): that one (a
    /// write: some prefix of it) is not done, and it and all that follow answer EIO until
    /// [`SimWorld::kill`] or [`SimWorld::power_cut`]. Changing is all but [`Op::Read`], [`Op::Look`] and opening
    /// what exists.
    pub fn die_at(&self, n: u64) {
        self.lock().dies_in = Some(n.max(1));
    }

    /// Whether [`SimWorld::die_at`] has struck.
    pub fn is_dead(&self) -> bool {
        self.lock().dies_in == Some(0)
    }

    /// How many operations of a kind were begun, failed ones included.
    pub fn count(&self, op: Op) -> u64 {
        self.lock().counts.get(&op).copied().unwrap_or(0)
    }

    /// Limits what the filesystem of a topmost directory may allocate, in bytes; `None` lifts it.
    ///
    /// # Panics
    /// If the directory does not exist: tests only.
    pub fn set_space(&self, top: &str, bytes: Option<u64>) {
        let mut world = self.lock();
        let id = world.find(top).expect("the directory exists");
        match bytes {
            Some(bytes) => world.limits.insert(id, bytes),
            None => world.limits.remove(&id),
        };
    }

    /// Bytes that the filesystem of a directory has allocated.
    ///
    /// # Panics
    /// If the directory does not exist: tests only.
    pub fn allocated(&self, top: &str) -> u64 {
        let mut world = self.lock();
        let id = world.find(top).expect("the directory exists");
        let space = world.space_of(id);
        space.total - space.available
    }

    /// A clock of this world.
    pub fn clock(&self) -> SimClock {
        SimClock(self.clone())
    }

    /// Moves time.
    pub fn advance(&self, ns: i64) {
        self.lock().now_ns += ns;
    }

    fn handle(&self, world: &mut World, id: u64, writable: bool) -> Arc<SimDisk> {
        if let Some(node) = world.nodes.get_mut(&id) {
            node.open += 1;
        }
        Arc::new(SimDisk {
            world: self.clone(),
            id,
            life: world.life,
            writable,
        })
    }
}

/// The clock of a [`SimWorld`]: moves a little at each look, up to a millisecond.
#[derive(Debug, Clone)]
pub struct SimClock(SimWorld);

impl Clock for SimClock {
    fn now_ns(&self) -> i64 {
        let mut world = self.0.lock();
        let step = world.rng.below(1_000_000) + 1;
        world.now_ns += step as i64;
        world.now_ns
    }

    fn random(&self) -> io::Result<[u8; 16]> {
        let mut bytes = [0; 16];
        self.0.lock().rng.fill(&mut bytes);
        Ok(bytes)
    }
}
