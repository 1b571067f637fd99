//! What the model knows: content of every view, and what may have happened since the last flush.

use std::collections::{BTreeMap, BTreeSet};

use stillframe::units::Name;

use crate::sim::{Content, pages, sectors};

/// A snapshot or a bookmark: the content of its instant.
#[derive(Clone)]
pub struct Point {
    pub content: Content,
    pub size: u64,
    pub mtime_ns: i64,
    pub failed: bool,
    /// Number of its instant; grows.
    pub instant: u64,
}

/// An image that can be written: the live volume, a clone.
#[derive(Clone, Default)]
pub struct Writable {
    pub content: Content,
    pub size: u64,
    /// Sectors written since the last flush: after a power cut they may hold anything.
    pub unflushed: BTreeSet<u64>,
    /// Pages ever written: what a discard may touch on the medium, also where it reads as zero.
    pub ever: BTreeSet<u64>,
}

impl Writable {
    /// Notes that a range is being written, whatever becomes of it.
    pub fn touch(&mut self, offset: u64, len: u64) {
        self.unflushed.extend(sectors(offset, len));
        self.ever.extend(pages(offset, len));
    }

    /// The parts of a range that were ever written.
    pub fn parts(&self, offset: u64, len: u64) -> Vec<(u64, u64)> {
        use crate::sim::PAGE;
        let cut = |page: &u64| {
            let (start, end) = (page * PAGE, page * PAGE + PAGE);
            (start.max(offset), end.min(offset + len))
        };
        let parts = self.ever.range(pages(offset, len)).map(cut);
        parts.filter(|(start, end)| start < end).collect()
    }

    pub fn resize(&mut self, size: u64) {
        self.content.truncate(size);
        self.size = size;
    }
}

/// A clone and what it stands on.
#[derive(Clone)]
pub struct ModelClone {
    pub image: Writable,
    pub failed: bool,
}

/// What was written between one instant and the next.
#[derive(Default, Clone)]
pub struct Interval {
    pub pages: BTreeSet<u64>,
    /// Something is only known by region so far: it was written while the newest point was a bookmark.
    pub by_region: bool,
    /// A crash happened while something was only known by region.
    pub coarse: bool,
}

#[derive(Clone)]
pub struct Volume {
    pub name: Name,
    /// Sizes it may have.
    pub sizes: std::ops::Range<u64>,
    pub live: Writable,
    pub snapshots: BTreeMap<String, Point>,
    pub bookmarks: BTreeMap<String, Point>,
    pub clones: BTreeMap<String, ModelClone>,
    /// By the number of the instant at which each began; the last is the current one.
    pub intervals: BTreeMap<u64, Interval>,
    /// Content changed since the newest snapshot.
    pub changed: bool,
    /// Something was written since, perhaps the same content.
    pub touched: bool,
    pub last_mtime: Option<i64>,
    /// A clean stop was asked for: it may have been one, and then nothing counts as changed.
    pub stopping: bool,
}

impl Volume {
    pub fn new(name: &str, size: u64, sizes: std::ops::Range<u64>) -> Volume {
        let live = Writable {
            size,
            ..Writable::default()
        };
        Volume {
            name: Name::new(name).expect("a name"),
            sizes,
            live,
            snapshots: BTreeMap::new(),
            bookmarks: BTreeMap::new(),
            clones: BTreeMap::new(),
            intervals: BTreeMap::from([(0, Interval::default())]),
            changed: true,
            touched: true,
            last_mtime: None,
            stopping: false,
        }
    }

    /// Notes that a range of the live volume is being written, whatever becomes of it.
    pub fn touch(&mut self, offset: u64, len: u64) {
        self.live.touch(offset, len);
        self.note_pages(pages(offset, len));
        self.touched = true;
    }

    pub fn note_pages(&mut self, touched: impl IntoIterator<Item = u64>) {
        let mut last = self.intervals.last_entry().expect("there is always one");
        last.get_mut().pages.extend(touched);
        self.note_region();
    }

    /// Notes that what was written since the newest instant is only known by region, if so: nothing is
    /// preserved for snapshots that have failed.
    pub fn note_region(&mut self) {
        let newest = |points: &BTreeMap<String, Point>| {
            let good = points.values().filter(|p| !p.failed);
            good.map(|p| p.instant).max()
        };
        let by_region = newest(&self.bookmarks) > newest(&self.snapshots);
        let mut last = self.intervals.last_entry().expect("there is always one");
        last.get_mut().by_region |= by_region && !last.get().pages.is_empty();
    }

    /// The live volume's content becomes that of a point; a new interval begins.
    pub fn point(&mut self, instant: u64, mtime_ns: i64) -> Point {
        self.intervals.insert(instant, Interval::default());
        Point {
            content: self.live.content.clone(),
            size: self.live.size,
            mtime_ns,
            failed: false,
            instant,
        }
    }

    /// What was written from one instant to another, to now without one; `None` if only regions
    /// are known.
    pub fn written(&self, from: u64, to: Option<u64>) -> Option<BTreeSet<u64>> {
        let mut all = BTreeSet::new();
        for (_, interval) in self.intervals.range(from..to.unwrap_or(u64::MAX)) {
            if interval.coarse {
                return None;
            }
            all.extend(&interval.pages);
        }
        Some(all)
    }

    /// The unclean end of a daemon: what was known by region only has changed as a whole.
    pub fn crashed(&mut self) {
        for interval in self.intervals.values_mut() {
            interval.coarse |= interval.by_region;
        }
        self.changed |= !std::mem::take(&mut self.stopping);
        self.touched = true;
    }

    /// The clean end of a daemon: every grain is known.
    pub fn stopped(&mut self) {
        for interval in self.intervals.values_mut() {
            interval.by_region = false;
        }
        self.live.unflushed.clear();
        for clone in self.clones.values_mut() {
            clone.image.unflushed.clear();
        }
    }

    /// Forgets intervals in which no diff can start any more.
    pub fn prune(&mut self) {
        let points = self.snapshots.values().chain(self.bookmarks.values());
        let last = *self
            .intervals
            .keys()
            .next_back()
            .expect("there is always one");
        let oldest = points.map(|p| p.instant).min().unwrap_or(last);
        self.intervals = self.intervals.split_off(&oldest.min(last));
    }
}
