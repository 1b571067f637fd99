//! Bookmarks and diffs against a model, in process, on simulated disks.
//!
//! Goal: whatever is written, snapshotted, turned into a bookmark, deleted, reclaimed, killed, cut from
//! power or robbed of its map, in any order: a diff from a snapshot or bookmark to a later snapshot or
//! to now names every byte that differs. As long as nothing crashed since its older end it names no
//! grain that was not written since: exact to the grain.
//!
//! Method: random operations from a printed seed on two volumes, small segments and checkpoints, so
//! that the records behind most bookmarks have left the log. Volumes are larger than one region of an
//! intent. The model keeps the content of each point and which grains were written when.
//! `STILLFRAME_BOOKMARKS_OPS` and `STILLFRAME_BOOKMARKS_SEED` choose a longer run or repeat one.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set its stage has failed"
)]

mod rig;
#[path = "rig/sim.rs"]
mod sim;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use stillframe::error::{Kind, Result};
use stillframe::map::memory::MemoryIndexHome;
use stillframe::sys::sim::SimWorld;
use stillframe::units::{Grain, Name};
use stillframe::volume::{Engine, OnFull, Settings, SnapshotState, VolumeOptions, Zeroing};

use rig::Chance;
use sim::environment;

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;

/// A digest of the content by sector; an absent one is zero.
type Content = BTreeMap<u64, u64>;

fn set(content: &mut Content, sector: u64, bytes: &[u8]) {
    if bytes.iter().all(|&b| b == 0) {
        content.remove(&sector);
        return;
    }
    let fold = |digest: u64, &byte: &u8| (digest ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    content.insert(sector, bytes.iter().fold(0xcbf2_9ce4_8422_2325, fold));
}

struct Point {
    name: Name,
    /// When, in operations.
    at: u64,
    content: Content,
    bookmark: bool,
}

struct Model {
    name: Name,
    size: u64,
    grain: u64,
    live: Content,
    /// Oldest first.
    points: Vec<Point>,
    /// The last operation that wrote to a grain.
    written: BTreeMap<u64, u64>,
    /// Sectors written since the last flush: a power cut may leave any of their old content.
    unflushed: BTreeSet<u64>,
}

struct Run {
    world: SimWorld,
    index: MemoryIndexHome,
    engine: Arc<Engine>,
    chance: Chance,
    volumes: Vec<Model>,
    counts: BTreeMap<&'static str, u64>,
    now: u64,
    /// Operation of the last crash or loss of the map: diffs from before need not be exact.
    crashed: u64,
    next_name: u64,
    seed: u64,
}

fn settings() -> Settings {
    Settings {
        ballast_bytes: 0,
        map_cache_bytes: 64 << 10,
        segment_bytes: MIB,
        checkpoint_bytes: 512 << 10,
        ..Settings::default()
    }
}

fn trace(text: impl FnOnce() -> String) {
    if std::env::var_os("STILLFRAME_BOOKMARKS_TRACE").is_some() {
        println!("{}", text());
    }
}

impl Run {
    fn new(seed: u64) -> Run {
        let world = SimWorld::new(seed);
        let index = MemoryIndexHome::new();
        let env = environment(&world, &index);
        Engine::create(&env, &settings()).unwrap();
        let engine = Engine::open(env, settings()).unwrap();
        let mut volumes = Vec::new();
        for (i, (size, grain)) in [(200 * MIB - 1536, 4096), (130 * MIB, 16384)]
            .into_iter()
            .enumerate()
        {
            let path = format!("sources/v{i}");
            world.add_disk(&path, size);
            let name = Name::new(&format!("v{i}")).unwrap();
            let options = VolumeOptions {
                grain: Grain::new(grain).unwrap(),
                on_full: OnFull::FailWrite,
                on_full_wait_s: 0,
            };
            engine.add_volume(&name, &path, options).unwrap();
            volumes.push(Model {
                name,
                size,
                grain,
                live: Content::new(),
                points: Vec::new(),
                written: BTreeMap::new(),
                unflushed: BTreeSet::new(),
            });
        }
        Run {
            world,
            index,
            engine,
            chance: Chance(seed),
            volumes,
            counts: BTreeMap::new(),
            now: 1,
            crashed: 0,
            next_name: 0,
            seed,
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// Whole sectors in a few hot places of several regions, now and then at the end.
    fn range(&mut self, v: usize) -> (u64, u64) {
        let size = self.volumes[v].size;
        let base = match self.chance.below(24) {
            0 => self.chance.below(size),
            1 => size - 1 - self.chance.below(40_000),
            n => (n % 5) * 31 * MIB + self.chance.below(200 << 10),
        };
        let offset = base.min(size - SECTOR) / SECTOR * SECTOR;
        let len = SECTOR * (1 + self.chance.below(40));
        (offset, len.min(size - offset))
    }

    /// Whether what follows the change was refused because the process had died.
    fn write(&mut self, v: usize, zero: bool) -> Result<()> {
        let (offset, len) = self.range(v);
        let byte = match zero {
            true => 0,
            false => self.chance.next() as u8,
        };
        let compare = self.chance.below(8) == 0;
        trace(|| format!("{} write v{v} {offset}+{len} of {byte}", self.now));
        let now = self.now;
        let model = &mut self.volumes[v];
        for grain in offset / model.grain..(offset + len).div_ceil(model.grain) {
            model.written.insert(grain, now);
        }
        let sectors = offset / SECTOR..(offset + len) / SECTOR;
        model.unflushed.extend(sectors.clone());
        let volume = self.engine.volume(&model.name).unwrap();
        let done = match zero {
            true => volume.zero(offset, len, Zeroing::Discard),
            false => volume.write_at(offset, &vec![byte; len as usize], compare),
        };
        match &done {
            Ok(()) => {
                for sector in sectors {
                    set(&mut model.live, sector, &[byte; SECTOR as usize]);
                }
                self.count(if zero { "zero" } else { "write" });
            }
            Err(e) => trace(|| format!("refused: {e:?}")),
        }
        done
    }

    fn snapshot(&mut self, v: usize) -> Result<()> {
        if self.volumes[v].points.len() >= 7 {
            return self.delete(v);
        }
        self.next_name += 1;
        let name = Name::new(&format!("s{}", self.next_name)).unwrap();
        let model = &self.volumes[v];
        trace(|| format!("{} take v{v} {name}", self.now));
        self.engine
            .take_snapshots(&[(model.name.clone(), name.clone())])?;
        let now = self.now;
        let model = &mut self.volumes[v];
        model.unflushed.clear();
        let content = model.live.clone();
        model.points.push(Point {
            name,
            at: now,
            content,
            bookmark: false,
        });
        // What is written from here on comes later than the snapshot.
        self.now += 1;
        self.count("snapshot");
        Ok(())
    }

    fn of_kind(&mut self, v: usize, bookmark: bool) -> Option<usize> {
        let of_kind: Vec<usize> = self.volumes[v]
            .points
            .iter()
            .enumerate()
            .filter(|(_, p)| p.bookmark == bookmark)
            .map(|(i, _)| i)
            .collect();
        let n = of_kind.len() as u64;
        (n > 0).then(|| of_kind[self.chance.below(n) as usize])
    }

    fn keep(&mut self, v: usize) -> Result<()> {
        let Some(i) = self.of_kind(v, false) else {
            return Ok(());
        };
        let held = self.chance.below(4) == 0;
        let model = &self.volumes[v];
        let name = model.points[i].name.clone();
        trace(|| format!("{} keep v{v} {name}", self.now));
        let held = held.then(|| self.engine.open_snapshot(&model.name, &name).unwrap());
        self.engine
            .delete_snapshot_keep_bookmark(&model.name, &name)?;
        self.volumes[v].points[i].bookmark = true;
        if held.is_some() {
            // Written while the point is still held open, then it goes.
            self.write(v, false)?;
            self.now += 1;
            drop(held);
        }
        self.count("keep");
        Ok(())
    }

    fn delete(&mut self, v: usize) -> Result<()> {
        let bookmark = self.chance.below(2) == 0;
        let Some(i) = self.of_kind(v, bookmark) else {
            return Ok(());
        };
        let model = &self.volumes[v];
        let name = model.points[i].name.clone();
        trace(|| format!("{} delete v{v} {name}", self.now));
        match bookmark {
            true => self.engine.delete_bookmark(&model.name, &name)?,
            false => self.engine.delete_snapshot(&model.name, &name)?,
        }
        self.volumes[v].points.remove(i);
        self.count("delete");
        Ok(())
    }

    fn some_step(&mut self, v: usize) -> Result<()> {
        match self.chance.below(100) {
            0..=64 => self.write(v, false),
            65..=71 => self.write(v, true),
            72..=76 => {
                self.engine.volume(&self.volumes[v].name).unwrap().flush()?;
                self.volumes[v].unflushed.clear();
                Ok(())
            }
            77..=82 => self.snapshot(v),
            83..=87 => self.keep(v),
            88..=90 => self.delete(v),
            _ => {
                trace(|| format!("{} maintain", self.now));
                self.engine.maintain().map(|_| self.count("maintain"))
            }
        }
    }

    fn reopen(&mut self) {
        let env = environment(&self.world, &self.index);
        self.engine = Engine::open(env, settings())
            .unwrap_or_else(|e| panic!("seed {}: does not open: {e:?}", self.seed));
    }

    fn remount(&mut self, lose_map: bool) {
        trace(|| format!("{} remount, map lost {lose_map}", self.now));
        self.engine.close().unwrap();
        for model in &mut self.volumes {
            model.unflushed.clear();
        }
        self.world.kill();
        self.index.kill(self.chance.next());
        if lose_map {
            // A clean stop has refined every intent: the log alone is as exact as the map was.
            self.index.lose();
            self.count("map loss");
        }
        self.reopen();
        self.count("remount");
    }

    fn crash(&mut self, power: bool) {
        let mut under_way = None;
        if self.chance.below(3) > 0 {
            self.world.die_at(1 + self.chance.below(24));
            for _ in 0..40 {
                let v = self.chance.below(2) as usize;
                if self.some_step(v).is_err() || self.world.is_dead() {
                    under_way = Some(v);
                    break;
                }
                self.now += 1;
            }
        }
        trace(|| format!("{} crash, power {power}, {under_way:?}", self.now));
        match power {
            true => {
                self.world.power_cut();
                self.index.power_cut(self.chance.next());
            }
            false => {
                self.world.kill();
                self.index.kill(self.chance.next());
            }
        }
        if self.chance.below(4) == 0 {
            self.index.lose();
            self.count("crash with map loss");
        }
        self.reopen();
        for v in 0..self.volumes.len() {
            self.adopt(v);
        }
        self.now += 1;
        self.crashed = self.now;
        self.now += 1;
        self.count(if power { "power cut" } else { "kill" });
    }

    /// Takes over what a crash may have left: sectors not flushed, and the operation under way.
    fn adopt(&mut self, v: usize) {
        let model = &mut self.volumes[v];
        let volume = self.engine.volume(&model.name).unwrap();
        for sector in std::mem::take(&mut model.unflushed) {
            let mut bytes = [0; SECTOR as usize];
            volume.read_at(sector * SECTOR, &mut bytes).unwrap();
            set(&mut model.live, sector, &bytes);
        }
        let snapshots = self.engine.snapshots(&model.name).unwrap();
        let bookmarks = self.engine.bookmarks(&model.name).unwrap();
        model.points.retain_mut(|point| {
            let snapshot = snapshots.iter().any(|s| s.name == point.name);
            point.bookmark = bookmarks.iter().any(|b| b.name == point.name);
            assert!(!(snapshot && point.bookmark), "one or the other");
            snapshot || point.bookmark
        });
        for extra in &snapshots {
            if !model.points.iter().any(|p| p.name == extra.name) {
                // The answer was lost, the snapshot is there: not worth modelling.
                self.engine
                    .delete_snapshot(&model.name, &extra.name)
                    .unwrap();
            }
        }
        assert!(
            bookmarks
                .iter()
                .all(|b| model.points.iter().any(|p| p.name == b.name)),
            "a bookmark out of nothing"
        );
    }

    fn check(&mut self) {
        for v in 0..self.volumes.len() {
            let model = &self.volumes[v];
            let listed = self.engine.bookmarks(&model.name).unwrap();
            let known: Vec<&Name> = model
                .points
                .iter()
                .filter(|p| p.bookmark)
                .map(|p| &p.name)
                .collect();
            assert_eq!(listed.iter().map(|b| &b.name).collect::<Vec<_>>(), known);
            assert!(listed.iter().all(|b| b.state == SnapshotState::Active));
            let mut pairs = Vec::new();
            for (i, from) in model.points.iter().enumerate() {
                for to in &model.points[i + 1..] {
                    pairs.push((from, Some(to)));
                }
                pairs.push((from, None));
            }
            let mut exact_pairs = 0;
            let mut from_bookmarks = 0;
            for (from, to) in pairs {
                let name = to.map(|to| &to.name);
                let diff = self.engine.diff(&model.name, &from.name, name);
                if to.is_some_and(|to| to.bookmark) {
                    assert_eq!(diff.unwrap_err().kind(), Kind::NotFound);
                    continue;
                }
                let diff = diff.unwrap();
                assert_eq!(diff.from.bookmark, from.bookmark);
                let what = format!(
                    "seed {} at {}: {}@{}..{name:?}",
                    self.seed, self.now, model.name, from.name
                );
                let content = to.map_or(&model.live, |to| &to.content);
                let inside = |sector: u64| {
                    let at = sector * SECTOR;
                    let i = diff.changed.partition_point(|run| run.end <= at);
                    diff.changed.get(i).is_some_and(|run| run.start <= at)
                };
                for &sector in from.content.keys().chain(content.keys()) {
                    let same = from.content.get(&sector) == content.get(&sector);
                    assert!(same || inside(sector), "{what}: misses sector {sector}");
                }
                from_bookmarks += u64::from(from.bookmark);
                if from.at > self.crashed {
                    exact_pairs += u64::from(from.bookmark);
                    let until = to.map_or(u64::MAX, |to| to.at);
                    let end = to.map_or(self.now, |to| to.at);
                    for run in &diff.changed {
                        for grain in run.start / model.grain..run.end.div_ceil(model.grain) {
                            let last = model.written.get(&grain).copied().unwrap_or(0);
                            // Written after `to`, too: the last time says nothing of before.
                            let unknown = last > until;
                            assert!(
                                last >= from.at || unknown,
                                "{what}: grain {grain} was last written at {last}, not in {}..{end}",
                                from.at
                            );
                        }
                    }
                }
            }
            *self.counts.entry("diff from a bookmark").or_default() += from_bookmarks;
            *self.counts.entry("exact diff from a bookmark").or_default() += exact_pairs;
        }
        self.count("check");
    }

    fn step(&mut self) {
        let v = self.chance.below(2) as usize;
        match self.chance.below(1000) {
            0..=979 => self
                .some_step(v)
                .unwrap_or_else(|e| panic!("seed {} at {}: {e:?}", self.seed, self.now)),
            980..=985 => self.remount(false),
            986..=989 => self.remount(true),
            990..=994 => self.crash(false),
            _ => self.crash(true),
        }
        self.now += 1;
    }
}

fn env_u64(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|v| v.parse().ok())
}

fn run(seed: u64, operations: u64) -> BTreeMap<&'static str, u64> {
    let mut run = Run::new(seed);
    println!("seed {seed}");
    for n in 0..operations {
        run.step();
        if n % 20 == 0 || env_u64("STILLFRAME_BOOKMARKS_FROM").is_some_and(|from| n >= from) {
            run.check();
        }
    }
    run.check();
    println!("seed {seed}: {:?}", run.counts);
    run.counts
}

#[test]
fn a_diff_misses_nothing_and_is_exact() {
    let operations = env_u64("STILLFRAME_BOOKMARKS_OPS").unwrap_or(24_000);
    let seeds: Vec<u64> = match env_u64("STILLFRAME_BOOKMARKS_SEED") {
        Some(seed) => vec![seed],
        None => (1..=8).collect(),
    };
    let each = operations / seeds.len() as u64;
    let mut totals: BTreeMap<&str, u64> = BTreeMap::new();
    for seed in seeds {
        for (what, count) in run(seed, each) {
            *totals.entry(what).or_default() += count;
        }
    }
    println!("in all: {totals:?}");
    if operations >= 24_000 {
        for (what, least) in [
            ("keep", 200),
            ("kill", 40),
            ("power cut", 40),
            ("map loss", 40),
            ("crash with map loss", 10),
            ("diff from a bookmark", 5000),
            ("exact diff from a bookmark", 2000),
        ] {
            let seen = totals.get(what).copied().unwrap_or(0);
            assert!(seen >= least, "only {seen} of {what}");
        }
    }
}

fn n(name: &str) -> Name {
    Name::new(name).unwrap()
}

/// A store of its own for one fault: volumes of 8 MiB with grains of 4 KiB, background work only when
/// it is asked for.
struct Small {
    world: SimWorld,
    index: MemoryIndexHome,
    engine: Option<Arc<Engine>>,
}

const GRAIN: u64 = 4096;

impl Small {
    fn new(seed: u64, volumes: &[(&str, OnFull)]) -> Small {
        let (world, index) = (SimWorld::new(seed), MemoryIndexHome::new());
        let env = environment(&world, &index);
        Engine::create(&env, &Small::settings()).unwrap();
        let engine = Engine::open(env, Small::settings()).unwrap();
        for (name, on_full) in volumes {
            world.add_disk(&format!("src/{name}"), 80 * MIB);
            let options = VolumeOptions {
                on_full: *on_full,
                on_full_wait_s: 0,
                ..VolumeOptions::default()
            };
            engine
                .add_volume(&n(name), &format!("src/{name}"), options)
                .unwrap();
        }
        Small {
            world,
            index,
            engine: Some(engine),
        }
    }

    fn settings() -> Settings {
        Settings {
            checkpoint_bytes: 1 << 40,
            map_cache_bytes: 4 << 20,
            ..settings()
        }
    }

    fn engine(&self) -> &Arc<Engine> {
        self.engine.as_ref().unwrap()
    }

    fn write(&self, volume: &str, grains: std::ops::Range<u64>, byte: u8) -> Result<()> {
        let bytes = vec![byte; ((grains.end - grains.start) * GRAIN) as usize];
        let volume = self.engine().volume(&n(volume)).unwrap();
        volume.write_at(grains.start * GRAIN, &bytes, false)
    }

    fn take(&self, volume: &str, name: &str) {
        self.engine()
            .take_snapshots(&[(n(volume), n(name))])
            .unwrap();
    }

    fn mark(&self, volume: &str, name: &str) {
        self.take(volume, name);
        self.engine()
            .delete_snapshot_keep_bookmark(&n(volume), &n(name))
            .unwrap();
    }

    /// What changed since, in grains.
    fn since(&self, volume: &str, name: &str) -> Result<Vec<std::ops::Range<u64>>> {
        let diff = self.engine().diff(&n(volume), &n(name), None)?;
        let grains = diff.changed.iter().map(|r| r.start / GRAIN..r.end / GRAIN);
        Ok(grains.collect())
    }

    fn failed(&self, volume: &str, name: &str) -> bool {
        let bookmark = self.engine().bookmark(&n(volume), &n(name)).unwrap();
        let failed = bookmark.state != SnapshotState::Active;
        match self.since(volume, name) {
            Ok(_) => assert!(!failed, "it has failed and answers"),
            Err(e) => assert!(failed && e.kind() == Kind::Failed, "{e:?}"),
        }
        failed
    }

    fn stop(&mut self, clean: bool) {
        let engine = self.engine.take().unwrap();
        if clean {
            engine.close().unwrap();
        }
        drop(engine);
        self.world.kill();
        self.index.kill(1);
    }

    fn start(&mut self) {
        let env = environment(&self.world, &self.index);
        self.engine = Some(Engine::open(env, Small::settings()).unwrap());
    }

    fn restart(&mut self, clean: bool) {
        self.stop(clean);
        self.start();
    }

    fn segments(&self) -> Vec<String> {
        use stillframe::sys::disk::Dir;
        let mut names = self.world.dir("store/log").list().unwrap();
        names.sort();
        names
    }
}

#[test]
fn a_bookmark_is_what_its_snapshot_was() {
    let mut s = Small::new(1, &[("v", OnFull::FailWrite)]);
    s.take("v", "a");
    s.take("v", "b");
    let engine = Arc::clone(s.engine());
    let was = engine.snapshot(&n("v"), &n("a")).unwrap();
    engine.hold_snapshot(&n("v"), &n("a"), true).unwrap();
    let kept = engine.delete_snapshot_keep_bookmark(&n("v"), &n("a"));
    assert_eq!(kept.unwrap_err().kind(), Kind::Busy, "on hold");
    engine.hold_snapshot(&n("v"), &n("a"), false).unwrap();
    engine
        .delete_snapshot_keep_bookmark(&n("v"), &n("a"))
        .unwrap();
    drop(engine);
    for clean in [true, false, true] {
        let engine = s.engine();
        let kind = |done: Result<()>| done.unwrap_err().kind();
        let found = engine.bookmark(&n("v"), &n("a")).unwrap();
        assert_eq!(
            (found.uuid, found.ino, found.epoch, found.size),
            (was.uuid, was.ino, was.epoch, was.size)
        );
        assert_eq!(
            (found.taken_ns, found.mtime_ns),
            (was.taken_ns, was.mtime_ns)
        );
        assert_eq!(engine.bookmarks(&n("v")).unwrap().len(), 1);
        assert!(engine.open_snapshot(&n("v"), &n("a")).is_err());
        // It has its name for itself.
        let taken = engine.take_snapshots(&[(n("v"), n("a"))]).map(drop);
        assert_eq!(kind(taken), Kind::Exists);
        let renamed = engine.rename_snapshot(&n("v"), &n("b"), &n("a"));
        assert_eq!(kind(renamed), Kind::Exists);
        let again = engine.delete_snapshot_keep_bookmark(&n("v"), &n("a"));
        assert_eq!(kind(again), Kind::NotFound);
        assert_eq!(
            kind(engine.delete_bookmark(&n("v"), &n("b"))),
            Kind::NotFound
        );
        let to_it = engine.diff(&n("v"), &n("a"), Some(&n("a"))).map(drop);
        assert_eq!(kind(to_it), Kind::NotFound);
        s.restart(clean);
    }
    let engine = s.engine();
    engine.delete_bookmark(&n("v"), &n("a")).unwrap();
    assert!(engine.bookmarks(&n("v")).unwrap().is_empty());
    engine.take_snapshots(&[(n("v"), n("a"))]).unwrap();
    for name in ["a", "b"] {
        engine
            .delete_snapshot_keep_bookmark(&n("v"), &n(name))
            .unwrap();
    }
    // Bookmarks go along with their volume.
    engine.remove_volume(&n("v")).unwrap();
    s.restart(false);
    assert!(s.engine().volumes().is_empty());
}

#[test]
fn a_source_changed_unseen_and_accepted_fails_its_bookmarks() {
    let mut s = Small::new(2, &[("v", OnFull::FailWrite)]);
    s.write("v", 0..4, 1).unwrap();
    s.mark("v", "a");
    s.stop(true);
    s.world.advance(10_000_000_000);
    s.world.poke("src/v", 9 * GRAIN, &[9; 16]);
    s.start();
    // Nobody may write, and so change the source's time, before somebody has decided.
    assert_eq!(s.write("v", 0..1, 2).unwrap_err().kind(), Kind::Failed);
    assert!(!s.failed("v", "a"), "it might be put back as it was");
    s.engine().accept_volume(&n("v")).unwrap();
    assert!(s.failed("v", "a"));
    s.write("v", 0..1, 2).unwrap();
    s.mark("v", "b");
    s.write("v", 5..7, 2).unwrap();
    assert_eq!(s.since("v", "b").unwrap(), std::slice::from_ref(&(5..7)));
    s.restart(true);
    assert!(s.failed("v", "a"));
    assert_eq!(s.since("v", "b").unwrap(), std::slice::from_ref(&(5..7)));
    s.engine().delete_bookmark(&n("v"), &n("a")).unwrap();
    assert_eq!(s.since("v", "b").unwrap(), std::slice::from_ref(&(5..7)));
}

#[test]
fn on_a_full_disk_a_bookmark_is_never_wrong() {
    let volumes = [("w", OnFull::FailWrite), ("f", OnFull::FailSnapshot)];
    let mut s = Small::new(3, &volumes);
    for volume in ["w", "f"] {
        s.mark(volume, "a");
        s.write(volume, 0..1, 1).unwrap();
        s.mark(volume, "b");
    }
    let used = s.world.allocated("store");
    s.world
        .set_space("store", Some(used.saturating_sub(4 * MIB)));
    // Preserved content fills what was written ahead, up to the reserve.
    s.take("w", "fill");
    let full = (0..2000).find(|&g| s.write("w", 10_000 + g..10_001 + g, 3).is_err());
    assert!(full.is_some(), "the disk does not fill up");
    s.engine().delete_snapshot(&n("w"), &n("fill")).unwrap();

    let refused = s.write("w", 20..21, 2).unwrap_err();
    assert_eq!(refused.kind(), Kind::NoSpace);
    assert!(!s.failed("w", "a") && !s.failed("w", "b"));
    s.write("f", 20..21, 2).unwrap();
    assert!(s.failed("f", "a") && s.failed("f", "b"));
    s.world.set_space("store", None);
    s.restart(false);
    assert!(!s.failed("w", "a") && !s.failed("w", "b"));
    assert!(s.failed("f", "a") && s.failed("f", "b"));
    s.write("w", 20..21, 2).unwrap();
    assert!(s.since("w", "b").unwrap().contains(&(20..21)));
    s.mark("f", "c");
    s.write("f", 30..31, 2).unwrap();
    assert_eq!(s.since("f", "c").unwrap(), std::slice::from_ref(&(30..31)));
}

/// A segment is gone, which held the only record of a change that a bookmark has to name.
#[test]
fn a_segment_that_goes_takes_no_bit_along() {
    let mut s = Small::new(4, &[("v", OnFull::FailWrite), ("w", OnFull::FailWrite)]);
    for volume in ["v", "w"] {
        s.write(volume, 0..300, 1).unwrap();
        s.take(volume, "a");
    }
    // One segment holds what the other volume's snapshot needs, and the bookmark's first record.
    s.write("w", 0..2, 2).unwrap();
    s.write("v", 0..2, 2).unwrap();
    s.write("w", 2..300, 2).unwrap();
    let first = s.segments()[0].clone();
    s.engine()
        .delete_snapshot_keep_bookmark(&n("v"), &n("a"))
        .unwrap();
    s.engine().maintain().unwrap();
    assert_eq!(s.segments()[0], first, "held by the other volume");
    s.engine().delete_snapshot(&n("w"), &n("a")).unwrap();
    s.engine().maintain().unwrap();
    assert_ne!(s.segments()[0], first, "it is gone, and its bits are kept");
    s.stop(false);
    s.index.lose();
    s.start();
    assert_eq!(s.since("v", "a").unwrap(), std::slice::from_ref(&(0..2)));
    s.write("v", 100..101, 2).unwrap();
    s.engine().maintain().unwrap();
    s.write("v", 200..201, 2).unwrap();
    let since = [0..2, 100..101, 200..201];
    assert_eq!(s.since("v", "a").unwrap(), since);
    s.stop(true);
    s.index.lose();
    s.start();
    assert_eq!(s.since("v", "a").unwrap(), since);
    s.stop(false);
    s.index.lose();
    s.start();
    assert_eq!(s.since("v", "a").unwrap(), since);
}

/// An intent outlives the bitmap that refined it: a new one must take its place again.
#[test]
fn a_refined_region_stays_refined() {
    let volumes = ["v", "w", "x"].map(|name| (name, OnFull::FailWrite));
    let mut s = Small::new(5, &volumes);
    s.write("w", 0..2, 1).unwrap();
    s.write("x", 0..600, 1).unwrap();
    s.mark("v", "a");
    s.take("w", "stays");
    s.write("v", 100..101, 2).unwrap();
    s.write("w", 0..2, 2).unwrap();
    let first = s.segments()[0].clone();
    for byte in 3..9 {
        s.take("x", "t");
        s.write("x", 0..600, byte).unwrap();
        s.engine().delete_snapshot(&n("x"), &n("t")).unwrap();
        s.engine().maintain().unwrap();
    }
    let left = s.segments();
    // The intent's is there, those that held its bitmaps are gone.
    assert!(left[0] == first && left.len() < 4, "{left:?}");
    assert!(left.last().unwrap().as_str() > "000008.seg", "{left:?}");
    s.stop(true);
    s.index.lose();
    s.start();
    assert_eq!(
        s.since("v", "a").unwrap(),
        std::slice::from_ref(&(100..101))
    );
}

#[test]
fn a_lost_batch_fails_the_bookmarks_that_were_there() {
    let volumes = ["v", "w"].map(|name| (name, OnFull::FailWrite));
    let mut s = Small::new(6, &volumes);
    s.mark("v", "a");
    // Half of the log is behind the bookmark, whatever comes before it.
    for _ in 0..20 {
        s.take("w", "t");
        s.engine().delete_snapshot(&n("w"), &n("t")).unwrap();
    }
    s.write("v", 0..1, 1).unwrap();
    let log = s.segments();
    s.restart(true);
    // A clean map needs nothing of the old segment; only who reads it again finds it damaged.
    assert!(!s.failed("v", "a"));
    s.stop(false);
    s.index.lose();
    let victim = format!("store/log/{}", log[0]);
    let bytes = s.world.peek(&victim).unwrap();
    let from = bytes.len() as u64 / 2;
    s.world
        .poke(&victim, from, &vec![0xee; bytes.len() - from as usize]);
    s.start();
    assert!(s.failed("v", "a"));
    s.restart(true);
    assert!(s.failed("v", "a"), "for ever");
    s.mark("v", "b");
    s.write("v", 7..8, 1).unwrap();
    assert_eq!(s.since("v", "b").unwrap(), std::slice::from_ref(&(7..8)));
}

/// Writers, bookmarks, checkpoints and the removal of segments at once.
///
/// A write issued after a bookmark was there must be named, at once and by what is left after a kill that
/// also takes the map. A grain whose last write had ended before the bookmark was begun must not be named
/// as long as nothing was killed.
#[test]
fn writers_and_bookmarks_at_once() {
    const WRITERS: u64 = 3;
    const GRAINS: u64 = 400;
    let mut s = Small::new(7, &[("v", OnFull::FailWrite), ("x", OnFull::FailWrite)]);
    let clock = AtomicU64::new(1);
    // Of the last write to each grain, the times at its beginning and end; each has one writer.
    let times = || -> Vec<AtomicU64> { (0..WRITERS * GRAINS).map(|_| AtomicU64::new(0)).collect() };
    let (issued, ended) = (times(), times());
    // Name, time before and after, and whether nothing was killed since.
    let mut marks: Vec<(String, u64, u64, bool)> = Vec::new();
    let (mut exact, mut named) = (0, 0);
    for round in 0..12 {
        let stop = AtomicBool::new(false);
        let engine = Arc::clone(s.engine());
        std::thread::scope(|scope| {
            for writer in 0..WRITERS {
                let (engine, clock, stop) = (&engine, &clock, &stop);
                let (issued, ended) = (&issued, &ended);
                scope.spawn(move || {
                    let volume = engine.volume(&n("v")).unwrap();
                    let mut chance = Chance(writer + 10 * round);
                    while !stop.load(Ordering::SeqCst) {
                        // Each round leaves most of them alone.
                        let part = round % 4 * (GRAINS / 4) + chance.below(GRAINS / 4);
                        let grain = writer * GRAINS + part;
                        // Far apart, in both regions of the volume.
                        let at = grain * 17 * GRAIN;
                        let now = clock.fetch_add(1, Ordering::SeqCst);
                        issued[grain as usize].store(now, Ordering::SeqCst);
                        volume.write_at(at, &now.to_le_bytes(), false).unwrap();
                        ended[grain as usize].store(clock.load(Ordering::SeqCst), Ordering::SeqCst);
                    }
                });
            }
            for step in 0..6 {
                let now = || clock.load(Ordering::SeqCst);
                let name = format!("m{round}-{step}");
                let before = now();
                s.mark("v", &name);
                marks.push((name, before, now(), true));
                // Another volume rolls the log on, so that segments go.
                s.take("x", "t");
                s.write("x", 0..300, (round * 6 + step) as u8 + 1).unwrap();
                engine.delete_snapshot(&n("x"), &n("t")).unwrap();
                engine.maintain().unwrap();
                let until = now() + 60;
                while now() < until {
                    std::thread::yield_now();
                }
                engine.maintain().unwrap();
            }
            stop.store(true, Ordering::SeqCst);
        });
        drop(engine);
        if round % 2 == 1 {
            s.stop(round % 4 == 1);
            s.index.lose();
            s.start();
            if round % 4 == 3 {
                marks.iter_mut().for_each(|mark| mark.3 = false);
            }
        }
        for (name, before, after, whole) in &marks {
            let since: BTreeSet<u64> = s.since("v", name).unwrap().into_iter().flatten().collect();
            for (grain, issued) in issued.iter().enumerate() {
                let last = issued.load(Ordering::SeqCst);
                let inside = since.contains(&(grain as u64 * 17));
                assert!(inside || last <= *after, "{name} {round}: misses {grain}");
                named += u64::from(last > *after);
                let over = ended[grain].load(Ordering::SeqCst) < *before;
                if *whole && over {
                    assert!(
                        !inside,
                        "{name} {round}: {grain} was last written at {last}"
                    );
                    exact += 1;
                }
            }
        }
        while marks.len() > 12 {
            let (name, ..) = marks.remove(0);
            s.engine().delete_bookmark(&n("v"), &n(&name)).unwrap();
        }
    }
    println!("{named} named, {exact} not");
    assert!(
        named > 10_000 && exact > 10_000,
        "{named} named, {exact} not"
    );
}

/// The end was preserved for a snapshot before the bookmark was made, is cut off and comes back as zeros.
#[test]
fn an_end_that_was_cut_off_and_grew_again_has_changed() {
    for snapshot in [false, true] {
        let mut s = Small::new(8, &[("v", OnFull::FailWrite)]);
        s.write("v", 19_000..19_010, 1).unwrap();
        if snapshot {
            s.take("v", "old");
        }
        s.write("v", 19_000..19_010, 2).unwrap();
        s.mark("v", "a");
        s.engine().resize_volume(&n("v"), 70 * MIB).unwrap();
        s.engine().resize_volume(&n("v"), 80 * MIB).unwrap();
        for lose in [false, true] {
            // What is cut off is looked at in pieces of 1 MiB.
            let since = s.since("v", "a").unwrap();
            assert!(
                since.len() == 1 && since[0].start == 19_000 && since[0].end >= 19_010,
                "snapshot {snapshot}, map lost {lose}: {since:?}"
            );
            s.engine().maintain().unwrap();
            s.stop(true);
            if !lose {
                s.index.lose();
            }
            s.start();
        }
    }
}

#[test]
fn a_revert_is_a_change() {
    let mut s = Small::new(9, &[("v", OnFull::FailWrite)]);
    s.write("v", 0..10, 1).unwrap();
    s.take("v", "old");
    s.write("v", 3..5, 2).unwrap();
    s.mark("v", "a");
    let reverted = s.engine().revert_volume(&n("v"), &n("old"), &mut |_, _| {});
    let undo = reverted.unwrap().undo;
    let changed: Vec<_> = std::iter::once(3..5).collect();
    assert_eq!(s.since("v", "a").unwrap(), changed);
    s.engine().delete_snapshot(&n("v"), &undo.name).unwrap();
    s.engine().maintain().unwrap();
    assert_eq!(s.since("v", "a").unwrap(), changed);
    s.stop(true);
    s.index.lose();
    s.start();
    assert_eq!(s.since("v", "a").unwrap(), changed);
}
