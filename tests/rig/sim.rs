//! The engine on simulated disks: its environment, sparse model content, and the comparison of a whole
//! view with it, through the same calls a reader uses (data, holes, reads).

#![allow(dead_code, reason = "every test uses its part")]

use std::collections::BTreeMap;
use std::sync::Arc;

use stillframe::error::{Error, Kind, Result};
use stillframe::map::memory::MemoryIndexHome;
use stillframe::sys::disk::{Dir, Disk};
use stillframe::sys::sim::SimWorld;
use stillframe::volume::{Environment, Sources};

/// Bytes of a page of model content.
pub const PAGE: u64 = 4096;

pub struct SimSources(pub SimWorld);

impl Sources for SimSources {
    fn open(&self, path: &str) -> Result<Arc<dyn Disk>> {
        let disk = self.0.disk(path);
        let disk = disk.ok_or_else(|| Error::new(Kind::NotFound, format!("no {path}")))?;
        Ok(disk)
    }
}

pub fn environment(world: &SimWorld, index: &MemoryIndexHome) -> Environment {
    Environment {
        dir: world.dir("store"),
        index: Arc::new(index.clone()),
        sources: Arc::new(SimSources(world.clone())),
        clock: Arc::new(world.clock()),
    }
}

/// Takes from the log what it has in hand for a full disk: what was written ahead in its newest segment, and
/// the spare one.
pub fn nothing_held_back(world: &SimWorld) {
    let dir = world.dir("store/log");
    let mut names = dir.list().unwrap();
    names.retain(|name| name != "spare");
    names.sort();
    let segment = format!("store/log/{}", names.last().unwrap());
    let bytes = world.peek(&segment).unwrap();
    let used = bytes.iter().rposition(|&byte| byte != 0).unwrap() + 1;
    let disk = world.disk(&segment).unwrap();
    disk.set_size(used.next_multiple_of(4096) as u64).unwrap();
    disk.sync_data().unwrap();
    dir.remove("spare").ok();
    dir.sync().unwrap();
}

pub type Page = Arc<[u8; PAGE as usize]>;

/// Sparse content: an absent page is zero.
#[derive(Clone, Default, PartialEq)]
pub struct Content(pub BTreeMap<u64, Page>);

impl Content {
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let mut at = 0;
        while at < data.len() {
            let position = offset + at as u64;
            let (page, within) = (position / PAGE, (position % PAGE) as usize);
            let len = (PAGE as usize - within).min(data.len() - at);
            let mut bytes = self.0.get(&page).map_or([0; PAGE as usize], |p| **p);
            bytes[within..within + len].copy_from_slice(&data[at..at + len]);
            match bytes.iter().all(|&b| b == 0) {
                true => drop(self.0.remove(&page)),
                false => drop(self.0.insert(page, Arc::new(bytes))),
            }
            at += len;
        }
    }

    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        let pages = offset / PAGE..(offset + len as u64).div_ceil(PAGE);
        for (&page, bytes) in self.0.range(pages) {
            let start = (page * PAGE).max(offset);
            let end = ((page + 1) * PAGE).min(offset + len as u64);
            out[(start - offset) as usize..(end - offset) as usize].copy_from_slice(
                &bytes[(start - page * PAGE) as usize..(end - page * PAGE) as usize],
            );
        }
        out
    }

    /// Forgets what lies at and behind `size`.
    pub fn truncate(&mut self, size: u64) {
        let cut = size / PAGE;
        if let Some(page) = self.0.get(&cut) {
            let mut bytes = **page;
            bytes[(size % PAGE) as usize..].fill(0);
            self.0.split_off(&cut);
            if bytes.iter().any(|&b| b != 0) {
                self.0.insert(cut, Arc::new(bytes));
            }
        }
        self.0.split_off(&size.div_ceil(PAGE));
    }

    /// The pages in which two contents differ.
    pub fn differing(&self, other: &Content) -> Vec<u64> {
        let all: std::collections::BTreeSet<u64> =
            self.0.keys().chain(other.0.keys()).copied().collect();
        let differs = |page: &u64| self.0.get(page) != other.0.get(page);
        all.into_iter().filter(differs).collect()
    }

    pub fn zero_in(&self, range: std::ops::Range<u64>) -> bool {
        range.is_empty()
            || self
                .0
                .range(range.start / PAGE..range.end.div_ceil(PAGE))
                .all(|(&page, bytes)| {
                    let start = (page * PAGE).max(range.start) - page * PAGE;
                    let end = ((page + 1) * PAGE).min(range.end) - page * PAGE;
                    bytes[start as usize..end as usize].iter().all(|&b| b == 0)
                })
    }
}

pub fn compare_snapshot(snapshot: &stillframe::volume::Snapshot, content: &Content, what: &str) {
    compare_view(
        snapshot.size(),
        content,
        what,
        &|at| snapshot.next_data(at),
        &|at| snapshot.next_hole(at),
        &|at, buf| snapshot.read_at(at, buf),
    );
}

/// Walks a whole view: what is not data must be zero in the model, what is data must be equal.
pub fn compare_view(
    size: u64,
    content: &Content,
    what: &str,
    next_data: &dyn Fn(u64) -> Result<Option<u64>>,
    next_hole: &dyn Fn(u64) -> Result<u64>,
    read: &dyn Fn(u64, &mut [u8]) -> Result<()>,
) {
    let mut at = 0;
    while at < size {
        let data = next_data(at)
            .unwrap_or_else(|e| panic!("{what}: {e:?}"))
            .unwrap_or(size);
        assert!(
            content.zero_in(at..data),
            "{what}: {at}..{data} is said to be a hole"
        );
        if data >= size {
            break;
        }
        let end = next_hole(data).unwrap_or_else(|e| panic!("{what}: {e:?}"));
        assert!(end > data && end <= size, "{what}: data {data}..{end}");
        let mut buf = vec![0xa5; (end - data) as usize];
        read(data, &mut buf).unwrap_or_else(|e| panic!("{what} at {data}: {e:?}"));
        let expect = content.read(data, buf.len());
        if buf != expect {
            let bad = buf
                .iter()
                .zip(&expect)
                .position(|(a, b)| a != b)
                .unwrap_or(0);
            panic!(
                "{what}: differs at {} in {data}..{end}: {:x?}, not {:x?}",
                data + bad as u64,
                &buf[bad..buf.len().min(bad + 16)],
                &expect[bad..buf.len().min(bad + 16)]
            );
        }
        at = end;
    }
}

/// The sectors that a range of bytes touches.
pub fn sectors(offset: u64, len: u64) -> std::ops::Range<u64> {
    offset / 512..(offset + len).div_ceil(512)
}

/// The pages that a range of bytes touches.
pub fn pages(offset: u64, len: u64) -> std::ops::Range<u64> {
    offset / PAGE..(offset + len).div_ceil(PAGE)
}
