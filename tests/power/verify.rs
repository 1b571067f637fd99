//! Opens what a power cut left, as a user would, and compares every view with what must be there.
//!
//! A violation is a panic with the reason. Nothing is repaired on the way: the store is opened, once,
//! and has to be whole.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use stillframe::volume::{Diff, SnapshotState, VolumeState};

use crate::machine::{Library, Machine, name, volume_name};
use crate::model::{Doing, Patch, Point, World, Writable};
use crate::rig::Chance;
use crate::sim::{Content, PAGE, compare_view};

pub type Counts = BTreeMap<String, u64>;

pub fn count(counts: &mut Counts, what: &str) {
    *counts.entry(what.to_owned()).or_default() += 1;
}

/// A store after a cut, and what it may hold.
pub struct Case<'a> {
    pub dir: &'a Path,
    pub sources: &'a Path,
    pub world: World,
    pub under_way: Option<&'a Doing>,
    /// The map is gone, too.
    pub lose_map: bool,
    /// Goes on working afterwards.
    pub go_on: bool,
}

/// An open store.
pub struct Opened {
    library: Library,
    /// What became of its map.
    map: &'static str,
}

/// What was moved out of the way.
fn set_aside(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|n| n.contains("damaged")).collect()
}

impl Case<'_> {
    /// The whole check of a state.
    pub fn verify(self, chance: &mut Chance, counts: &mut Counts) {
        let go_on = self.go_on;
        let library = self.open();
        let (library, mut world) = self.adopt(library, counts);
        if go_on {
            carry_on(&mut world, &library, chance);
            count(counts, "went on afterwards");
        }
    }

    /// Opens the store.
    pub fn open(&self) -> Opened {
        let aside = set_aside(self.dir);
        let library = Library::existing(self.dir, self.sources, self.lose_map);
        let library = library.unwrap_or_else(|e| panic!("the store does not open: {}", e.chain()));
        let map = match self.lose_map {
            true => "map removed",
            false if set_aside(self.dir) != aside => "map made again by itself",
            false => "map kept",
        };
        Opened { library, map }
    }

    /// Compares; what was found, of all that might be, is what is known from now on.
    pub fn adopt(mut self, opened: Opened, counts: &mut Counts) -> (Library, World) {
        let Opened { library, map } = opened;
        count(counts, map);
        let names = Names::of(&library, self.world.volumes.len());
        if let Some(doing) = self.under_way {
            let done = self.settle(doing, &names, &library);
            let kind = kind_of(doing);
            let end = if done { "done" } else { "not done" };
            count(counts, &format!("under way: {kind}, {end}"));
        }
        names.compare(&self.world);
        let (found, older) = compare(&self.world, &library, counts);
        if older > 0 {
            count(counts, "unflushed writes were lost");
        }
        (library, found)
    }

    /// Whether the operation that was under way was done; the world is then the one after it.
    fn settle(&mut self, doing: &Doing, names: &Names, library: &Library) -> bool {
        let volume = |v: usize| &names.0[v];
        let done = match doing {
            Doing::Upkeep(_) | Doing::Restart(_) | Doing::Flush(..) => return false,
            // Any part of it may be there.
            Doing::Write(_) => true,
            Doing::Take(name, of) => {
                let there = of
                    .iter()
                    .filter(|&&v| volume(v).snapshots.contains(name))
                    .count();
                assert!(there == 0 || there == of.len(), "half a group {name}");
                there > 0
            }
            Doing::Delete(v, name, _) => !volume(*v).snapshots.contains(name),
            Doing::DeleteBookmark(v, name) => !volume(*v).bookmarks.contains(name),
            Doing::Rename(v, _, to) => volume(*v).snapshots.contains(to),
            Doing::CloneSnapshot(v, _, name) | Doing::CloneClone(v, _, name) => {
                volume(*v).clones.contains(name)
            }
            Doing::RenameClone(v, _, to) => volume(*v).clones.contains(to),
            Doing::DeleteClone(v, name) => !volume(*v).clones.contains(name),
            Doing::Revert(v, to) => self.settle_revert(*v, to, names, library),
            Doing::Resize(v, to) => {
                let size = library.engine().volume(&name(&volume_name(*v))).unwrap();
                let done = size.size() == *to;
                if done {
                    self.world.volumes[*v].live.resize_unflushed(*to);
                }
                return done;
            }
        };
        if done {
            self.world.apply(doing);
        }
        done
    }

    /// Finished or undone; the snapshot that undoes it may be there.
    fn settle_revert(&mut self, v: usize, to: &str, names: &Names, library: &Library) -> bool {
        let known = &self.world.volumes[v].snapshots;
        let listed = names.0[v].snapshots.iter();
        let extra: Vec<String> = listed
            .filter(|name| !known.contains_key(*name))
            .cloned()
            .collect();
        assert!(extra.len() <= 1, "snapshots came back: {extra:?}");
        let target = known[to].clone();
        let Some(undo) = extra.into_iter().next() else {
            return false;
        };
        let point = self.world.point(v);
        self.world.instants += 1;
        self.world.volumes[v].snapshots.insert(undo, point);
        let live = library.engine().volume(&name(&volume_name(v))).unwrap();
        if live.size() != target.size {
            return false;
        }
        let mut bytes = vec![0; target.size as usize];
        live.read_at(0, &mut bytes).unwrap();
        bytes == target.content.read(0, bytes.len())
    }
}

/// Compares every view; returns the world as it was found, and how many sectors do not hold what was
/// written last.
fn compare(world: &World, library: &Library, counts: &mut Counts) -> (World, usize) {
    let mut found = world.clone();
    let mut older = 0;
    for v in 0..world.volumes.len() {
        older += compare_volume(world, v, library, &mut found, counts);
        compare_diffs(&found, v, library, counts);
    }
    (found, older)
}

/// An image as it was read.
fn image_of(bytes: &[u8]) -> Writable {
    let mut content = Content::default();
    content.write(0, bytes);
    Writable::new(Arc::new(content), bytes.len() as u64)
}

fn compare_volume(
    world: &World,
    v: usize,
    library: &Library,
    found: &mut World,
    counts: &mut Counts,
) -> usize {
    let (engine, volume) = (library.engine(), name(&volume_name(v)));
    let known = &world.volumes[v];
    let live = engine.volume(&volume).unwrap();
    let state = live.info().state;
    assert!(
        matches!(state, VolumeState::Active | VolumeState::Unverified),
        "{volume} is {state:?}"
    );
    for (snapshot, point) in &known.snapshots {
        let what = format!("snapshot {volume}@{snapshot}");
        let opened = engine.open_snapshot(&volume, &name(snapshot)).unwrap();
        assert_eq!(opened.info().state, SnapshotState::Active, "{what}");
        assert_eq!(opened.size(), point.size, "{what}");
        compare_view(
            point.size,
            &point.content,
            &what,
            &|at| opened.next_data(at),
            &|at| opened.next_hole(at),
            &|at, buf| opened.read_at(at, buf),
        );
        count(counts, "snapshots compared");
    }
    let mut older = 0;
    for (clone, image) in &known.clones {
        let what = format!("clone {volume}/{clone}");
        let opened = engine.open_clone(&volume, &name(clone)).unwrap();
        assert_eq!(opened.info().state, SnapshotState::Active, "{what}");
        let mut bytes = vec![0xa5; opened.size() as usize];
        opened.read_at(0, &mut bytes).unwrap();
        older += image.judge(&bytes, &what);
        found.volumes[v]
            .clones
            .insert(clone.clone(), image_of(&bytes));
        count(counts, "clones compared");
    }
    let mut bytes = vec![0xa5; live.size() as usize];
    live.read_at(0, &mut bytes).unwrap();
    older += known.live.judge(&bytes, &format!("live {volume}"));
    found.volumes[v].live = image_of(&bytes);
    for mark in engine.bookmarks(&volume).unwrap() {
        assert_eq!(mark.state, SnapshotState::Active, "bookmark {}", mark.name);
    }
    older
}

/// From each point to each later one and to now: everything that differs is in the diff.
fn compare_diffs(found: &World, v: usize, library: &Library, counts: &mut Counts) {
    let (engine, volume) = (library.engine(), name(&volume_name(v)));
    let known = &found.volumes[v];
    for (from, a) in known.snapshots.iter().chain(&known.bookmarks) {
        let mut to_compare = |to: Option<&str>, content: &Content, size: u64| {
            let what = format!("{volume}@{from}..{}", to.unwrap_or("live"));
            let diff = engine.diff(&volume, &name(from), to.map(name).as_ref());
            let diff = diff.unwrap_or_else(|e| panic!("diff {what}: {}", e.chain()));
            covers(&diff, a, content, size, &what);
            count(counts, "diffs compared");
        };
        for (to, b) in &known.snapshots {
            if b.instant > a.instant {
                to_compare(Some(to), &b.content, b.size);
            }
        }
        to_compare(None, &known.live.content, known.live.size);
    }
}

/// The store goes on: a snapshot of what was found, writes over it, and everything is still there.
fn carry_on(world: &mut World, library: &Library, chance: &mut Chance) {
    let all: Vec<usize> = (0..world.volumes.len()).collect();
    library.take("after", &all);
    world.apply(&Doing::Take("after".to_owned(), all));
    for v in 0..world.volumes.len() {
        for _ in 0..4 {
            let size = world.volumes[v].live.size;
            let offset = chance.below(size - 4096);
            let data = vec![chance.next() as u8 | 1; 4096];
            let patch = Arc::new(Patch { offset, data });
            library.write(v, &None, &patch);
            world.apply(&Doing::Write(vec![(v, None, patch)]));
        }
    }
    library.maintain();
    let (_, older) = compare(world, library, &mut Counts::new());
    assert_eq!(older, 0, "a write is not there");
}

fn covers(diff: &Diff, a: &Point, content: &Content, size: u64, what: &str) {
    assert_eq!(diff.size, size, "diff {what}: its size");
    let (mut new, mut old) = (content.clone(), (*a.content).clone());
    new.truncate(size);
    old.truncate(size);
    for page in new.differing(&old) {
        let (start, end) = (page * PAGE, (page * PAGE + PAGE).min(size));
        let mut runs = diff.changed.iter();
        assert!(
            runs.any(|r| r.start <= start && end <= r.end),
            "diff {what}: page {page} differs and is not in it"
        );
    }
}

fn kind_of(doing: &Doing) -> &'static str {
    match doing {
        Doing::Upkeep(what) | Doing::Restart(what) => what,
        Doing::Write(patches) if patches.len() > 1 => "burst",
        Doing::Write(_) => "write",
        Doing::Flush(..) => "flush",
        Doing::Take(..) => "snapshot",
        Doing::Delete(_, _, true) => "bookmark",
        Doing::Delete(..) => "delete",
        Doing::DeleteBookmark(..) => "bookmark deleted",
        Doing::Rename(..) | Doing::RenameClone(..) => "rename",
        Doing::CloneSnapshot(..) | Doing::CloneClone(..) => "clone",
        Doing::DeleteClone(..) => "clone deleted",
        Doing::Revert(..) => "revert",
        Doing::Resize(..) => "resize",
    }
}

/// What is listed of a volume.
struct Listed {
    snapshots: BTreeSet<String>,
    bookmarks: BTreeSet<String>,
    clones: BTreeSet<String>,
}

struct Names(Vec<Listed>);

impl Names {
    fn of(library: &Library, volumes: usize) -> Names {
        let engine = library.engine();
        let listed = |v: usize| {
            let volume = name(&volume_name(v));
            let snapshots = engine.snapshots(&volume).unwrap();
            let bookmarks = engine.bookmarks(&volume).unwrap();
            let clones = engine.clones(&volume).unwrap();
            Listed {
                snapshots: snapshots.iter().map(|s| s.name.to_string()).collect(),
                bookmarks: bookmarks.iter().map(|b| b.name.to_string()).collect(),
                clones: clones.iter().map(|c| c.name.to_string()).collect(),
            }
        };
        Names((0..volumes).map(listed).collect())
    }

    /// What was acknowledged is listed, and nothing else.
    fn compare(&self, world: &World) {
        for (v, (listed, known)) in self.0.iter().zip(&world.volumes).enumerate() {
            fn keys<T>(of: &BTreeMap<String, T>) -> BTreeSet<String> {
                of.keys().cloned().collect()
            }
            assert_eq!(
                listed.snapshots,
                keys(&known.snapshots),
                "snapshots of v{v}"
            );
            assert_eq!(
                listed.bookmarks,
                keys(&known.bookmarks),
                "bookmarks of v{v}"
            );
            assert_eq!(listed.clones, keys(&known.clones), "clones of v{v}");
        }
    }
}
