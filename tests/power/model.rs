//! What must be there after a power cut, told from what was acknowledged before it.
//!
//! A [`World`] is what every view holds at a moment. A [`Moment`] is one operation: where the log of
//! blocks stood when it began and when it was acknowledged, and the world after it. So for a cut at a
//! position everything that was acknowledged before is known, and at most one operation is under way.
//!
//! A writable image keeps what it held when it was last durable and every write since. After a cut each
//! of its sectors holds one of these: what was durable, or what any later write left there.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::sim::{Content, sectors};

const SECTOR: usize = 512;

/// A write; zeros for a discard.
pub struct Patch {
    pub offset: u64,
    pub data: Vec<u8>,
}

/// A live volume or a clone.
#[derive(Clone)]
pub struct Writable {
    pub content: Arc<Content>,
    pub size: u64,
    durable: Arc<Content>,
    since: Vec<Arc<Patch>>,
}

impl Writable {
    /// Everything of it is durable.
    pub fn new(content: Arc<Content>, size: u64) -> Writable {
        Writable {
            durable: Arc::clone(&content),
            content,
            size,
            since: Vec::new(),
        }
    }

    pub fn write(&mut self, patch: &Arc<Patch>) {
        Arc::make_mut(&mut self.content).write(patch.offset, &patch.data);
        self.since.push(Arc::clone(patch));
    }

    pub fn flushed(&mut self) {
        *self = Writable::new(Arc::clone(&self.content), self.size);
    }

    fn resize(&mut self, size: u64) {
        self.resize_unflushed(size);
        self.flushed();
    }

    /// It has another size, and what was written is no more durable than before.
    pub fn resize_unflushed(&mut self, size: u64) {
        Arc::make_mut(&mut self.content).truncate(size);
        Arc::make_mut(&mut self.durable).truncate(size);
        self.size = size;
    }

    /// Whether a sector may hold these bytes.
    fn allows(&self, sector: u64, found: &[u8]) -> bool {
        let at = sector * SECTOR as u64;
        let mut value = self.durable.read(at, found.len());
        if value == found {
            return true;
        }
        for patch in &self.since {
            let end = patch.offset + patch.data.len() as u64;
            let (from, to) = (patch.offset.max(at), end.min(at + found.len() as u64));
            if from < to {
                let new = &patch.data[(from - patch.offset) as usize..(to - patch.offset) as usize];
                value[(from - at) as usize..(to - at) as usize].copy_from_slice(new);
                if value == found {
                    return true;
                }
            }
        }
        false
    }

    /// Compares the bytes of a whole image with what may be there; the number of sectors that do not
    /// hold what was written last.
    pub fn judge(&self, found: &[u8], what: &str) -> usize {
        assert_eq!(found.len() as u64, self.size, "{what}: its size");
        let mut older = 0;
        for (i, page) in found.chunks(4096).enumerate() {
            let at = i as u64 * 4096;
            let expected = self.content.read(at, page.len());
            if expected == page {
                continue;
            }
            for sector in sectors(at, page.len() as u64) {
                let from = (sector * SECTOR as u64 - at) as usize;
                let to = (from + SECTOR).min(page.len());
                if page[from..to] == expected[from..to] {
                    continue;
                }
                older += 1;
                assert!(
                    self.allows(sector, &page[from..to]),
                    "{what}: sector {sector} holds {:x?}, last written was {:x?}, durable {:x?}, {} writes since",
                    &page[from..from + 16],
                    &expected[from..from + 16],
                    &self.durable.read(at + from as u64, 16),
                    self.since.len(),
                );
            }
        }
        older
    }
}

/// A snapshot or a bookmark: the content of its instant.
#[derive(Clone)]
pub struct Point {
    pub content: Arc<Content>,
    pub size: u64,
    /// Grows from instant to instant.
    pub instant: u64,
}

#[derive(Clone)]
pub struct Volume {
    pub live: Writable,
    pub snapshots: BTreeMap<String, Point>,
    pub bookmarks: BTreeMap<String, Point>,
    pub clones: BTreeMap<String, Writable>,
}

#[derive(Clone)]
pub struct World {
    pub volumes: Vec<Volume>,
    pub instants: u64,
}

/// Which image of a volume: the live one, or a clone.
pub type Which = Option<String>;

/// An operation.
#[derive(Clone)]
pub enum Doing {
    /// Changes no view: background work, a stop and start.
    Upkeep(&'static str),
    /// Everything is durable afterwards: a stop, clean or not, and a start.
    Restart(&'static str),
    /// Writes to one image or several, by as many writers at once; each on sectors of its own.
    Write(Vec<(usize, Which, Arc<Patch>)>),
    Flush(usize, Which),
    /// A snapshot of one or all volumes.
    Take(String, Vec<usize>),
    /// A snapshot is deleted, perhaps for a bookmark.
    Delete(usize, String, bool),
    DeleteBookmark(usize, String),
    Rename(usize, String, String),
    CloneSnapshot(usize, String, String),
    CloneClone(usize, String, String),
    RenameClone(usize, String, String),
    DeleteClone(usize, String),
    /// Back to a snapshot; the name of the one that undoes it is known when it is there.
    Revert(usize, String),
    Resize(usize, u64),
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Doing::Upkeep(what) | Doing::Restart(what) => write!(f, "{what}"),
            Doing::Write(patches) => {
                for (v, which, patch) in patches {
                    let zero = patch.data.iter().all(|&b| b == 0);
                    let verb = if zero { "zero" } else { "write" };
                    let image = which.as_deref().unwrap_or("live");
                    let (at, len) = (patch.offset, patch.data.len());
                    write!(f, "{verb} v{v}/{image} {at}+{len}; ")?;
                }
                Ok(())
            }
            Doing::Flush(v, which) => {
                write!(f, "flush v{v}/{}", which.as_deref().unwrap_or("live"))
            }
            Doing::Take(name, of) => write!(f, "take {of:?}@{name}"),
            Doing::Delete(v, name, keep) => write!(f, "delete v{v}@{name}, bookmark {keep}"),
            Doing::DeleteBookmark(v, name) => write!(f, "delete bookmark v{v}@{name}"),
            Doing::Rename(v, from, to) => write!(f, "rename v{v}@{from} to {to}"),
            Doing::CloneSnapshot(v, of, name) => write!(f, "clone v{v}@{of} as {name}"),
            Doing::CloneClone(v, of, name) => write!(f, "clone v{v}/{of} as {name}"),
            Doing::RenameClone(v, from, to) => write!(f, "rename v{v}/{from} to {to}"),
            Doing::DeleteClone(v, name) => write!(f, "delete v{v}/{name}"),
            Doing::Revert(v, to) => write!(f, "revert v{v} to {to}"),
            Doing::Resize(v, to) => write!(f, "resize v{v} to {to}"),
        }
    }
}

impl World {
    pub fn image(&mut self, v: usize, which: &Which) -> &mut Writable {
        let volume = &mut self.volumes[v];
        match which {
            None => &mut volume.live,
            Some(clone) => volume.clones.get_mut(clone).expect("known"),
        }
    }

    /// The snapshot of a volume that is taken now: it makes the volume durable.
    pub fn point(&mut self, v: usize) -> Point {
        let live = &mut self.volumes[v].live;
        live.flushed();
        Point {
            content: Arc::clone(&live.content),
            size: live.size,
            instant: self.instants,
        }
    }

    /// What an operation does, a revert all but its undo snapshot.
    pub fn apply(&mut self, doing: &Doing) {
        self.instants += 1;
        match doing {
            Doing::Upkeep(_) => {}
            Doing::Restart(_) => {
                for volume in &mut self.volumes {
                    volume.live.flushed();
                    volume.clones.values_mut().for_each(Writable::flushed);
                }
            }
            Doing::Write(patches) => {
                for (v, which, patch) in patches {
                    self.image(*v, which).write(patch);
                }
            }
            Doing::Flush(v, which) => self.image(*v, which).flushed(),
            Doing::Take(name, of) => {
                for &v in of {
                    let point = self.point(v);
                    self.volumes[v].snapshots.insert(name.clone(), point);
                }
            }
            Doing::Delete(v, name, keep) => {
                let volume = &mut self.volumes[*v];
                let point = volume.snapshots.remove(name).expect("known");
                if *keep {
                    volume.bookmarks.insert(name.clone(), point);
                }
            }
            Doing::DeleteBookmark(v, name) => {
                self.volumes[*v].bookmarks.remove(name).expect("known");
            }
            Doing::Rename(v, from, to) => {
                let snapshots = &mut self.volumes[*v].snapshots;
                let point = snapshots.remove(from).expect("known");
                snapshots.insert(to.clone(), point);
            }
            Doing::CloneSnapshot(v, of, name) => {
                let volume = &mut self.volumes[*v];
                let point = &volume.snapshots[of];
                let clone = Writable::new(Arc::clone(&point.content), point.size);
                volume.clones.insert(name.clone(), clone);
            }
            Doing::CloneClone(v, of, name) => {
                let clones = &mut self.volumes[*v].clones;
                let of = clones.get_mut(of).expect("known");
                // What both share is durable first.
                of.flushed();
                let clone = of.clone();
                clones.insert(name.clone(), clone);
            }
            Doing::RenameClone(v, from, to) => {
                let clones = &mut self.volumes[*v].clones;
                let clone = clones.remove(from).expect("known");
                clones.insert(to.clone(), clone);
            }
            Doing::DeleteClone(v, name) => {
                self.volumes[*v].clones.remove(name).expect("known");
            }
            Doing::Revert(v, name) => {
                let volume = &mut self.volumes[*v];
                let point = &volume.snapshots[name];
                volume.live = Writable::new(Arc::clone(&point.content), point.size);
            }
            Doing::Resize(v, to) => self.volumes[*v].live.resize(*to),
        }
    }
}

/// An operation in a history: positions count events of the log.
pub struct Moment {
    pub began: usize,
    pub acknowledged: usize,
    pub doing: Doing,
    /// The world after it.
    pub after: Arc<World>,
}

/// The world at a cut, and the operation that was under way.
pub fn at_cut(history: &[Moment], cut: usize) -> (Arc<World>, Option<&Moment>) {
    let done = history.partition_point(|m| m.acknowledged <= cut);
    let world = Arc::clone(&history[done.checked_sub(1).expect("a beginning")].after);
    // At 0 of a recovery's log, what was under way before is so still.
    let under_way = history.get(done).filter(|m| m.began < cut || cut == 0);
    (world, under_way)
}
