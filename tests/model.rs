//! The engine against a model, in process, on simulated disks.
//!
//! Goal: whatever is written, discarded, snapshotted, deleted, remounted, killed, cut from power or
//! robbed of its map, in any order, every view holds exactly what the model says: a snapshot the
//! bytes of its instant, the live volume every acknowledged byte after a kill, and after a power cut
//! every flushed byte.
//!
//! Method: random operations from a printed seed on three volumes of 64 MiB, two of them no multiple
//! of the grain. The model is a sparse map of 4 KiB pages per view. Views are compared whole, through
//! the same calls a reader uses (data, holes, reads). `STILLFRAME_MODEL_OPS` and
//! `STILLFRAME_MODEL_SEED` choose a longer run or repeat one.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set its stage has failed"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use stillframe::error::{Error, Kind, Result};
use stillframe::map::memory::MemoryIndexHome;
use stillframe::sys::disk::Disk;
use stillframe::sys::sim::SimWorld;
use stillframe::units::{Grain, Name};
use stillframe::volume::{
    Engine, Environment, OnFull, Settings, SnapshotState, Sources, VolumeOptions, VolumeState,
    Zeroing,
};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const COMPARE_EVERY: u64 = 50;

struct SimSources(SimWorld);

impl Sources for SimSources {
    fn open(&self, path: &str) -> Result<Arc<dyn Disk>> {
        let disk = self.0.disk(path);
        let disk = disk.ok_or_else(|| Error::new(Kind::NotFound, format!("no {path}")))?;
        Ok(disk)
    }
}

/// A small generator of chances; every run repeats from its seed.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

type Page = Arc<[u8; PAGE as usize]>;

/// Sparse content: an absent page is zero.
#[derive(Clone, Default, PartialEq)]
struct Content(BTreeMap<u64, Page>);

impl Content {
    fn write(&mut self, offset: u64, data: &[u8]) {
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

    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
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

    fn zero_in(&self, range: std::ops::Range<u64>) -> bool {
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

struct ModelSnapshot {
    content: Content,
    mtime_ns: i64,
    failed: bool,
}

impl ModelSnapshot {
    fn of(live: &Content, mtime_ns: i64) -> ModelSnapshot {
        ModelSnapshot {
            content: live.clone(),
            mtime_ns,
            failed: false,
        }
    }
}

struct ModelVolume {
    name: Name,
    size: u64,
    live: Content,
    /// Sectors written since the last flush: after a power cut they may hold anything.
    unflushed: BTreeSet<u64>,
    /// Pages ever written: what a discard may touch on the medium, also where it reads as zero.
    ever: BTreeSet<u64>,
    snapshots: BTreeMap<String, ModelSnapshot>,
    /// Content changed since the newest snapshot.
    changed: bool,
    /// Something was written since, perhaps the same content.
    touched: bool,
    last_mtime: Option<i64>,
}

struct Run {
    world: SimWorld,
    index: MemoryIndexHome,
    engine: Arc<Engine>,
    chance: Chance,
    volumes: Vec<ModelVolume>,
    counts: BTreeMap<&'static str, u64>,
    next_name: u64,
    /// Volume and sectors of the write under way.
    under_way: Option<(usize, BTreeSet<u64>)>,
    /// Operations until the disk is no longer full.
    full: u64,
    ever_full: bool,
    /// The process dies at one of the next operations.
    dying: bool,
    /// A group of snapshots is being taken: its size.
    taking: usize,
    seed: u64,
}

fn settings() -> Settings {
    // Small enough that segments, checkpoints and the page cache turn over all the time.
    Settings {
        ballast_bytes: 512 << 10,
        map_cache_bytes: 256 << 10,
        segment_bytes: 2 * MIB,
        checkpoint_bytes: MIB,
        ..Settings::default()
    }
}

fn environment(world: &SimWorld, index: &MemoryIndexHome) -> Environment {
    Environment {
        dir: world.dir("store"),
        index: Arc::new(index.clone()),
        sources: Arc::new(SimSources(world.clone())),
        clock: Arc::new(world.clock()),
    }
}

fn trace(text: impl FnOnce() -> String) {
    if std::env::var_os("STILLFRAME_MODEL_TRACE").is_some() {
        println!("{}", text());
    }
}

fn sectors(offset: u64, len: u64) -> std::ops::Range<u64> {
    offset / 512..(offset + len).div_ceil(512)
}

impl Run {
    fn new(seed: u64) -> Run {
        let world = SimWorld::new(seed);
        let index = MemoryIndexHome::new();
        let env = environment(&world, &index);
        Engine::create(&env, &settings()).expect("a store is made");
        let engine = Engine::open(env, settings()).expect("a new store opens");
        let mut volumes = Vec::new();
        for (i, (size, grain)) in [
            (64 * MIB, 4096),
            (64 * MIB + 777, 4096),
            (64 * MIB - 1536, 16384),
        ]
        .iter()
        .enumerate()
        {
            let path = format!("sources/v{i}");
            world.add_disk(&path, *size);
            let name = Name::new(&format!("v{i}")).unwrap();
            let grain = Grain::new(*grain).unwrap();
            let on_full = match i {
                1 => OnFull::FailSnapshot,
                _ => OnFull::FailWrite,
            };
            let options = VolumeOptions {
                grain,
                on_full,
                on_full_wait_s: 0,
            };
            engine
                .add_volume(&name, &path, options)
                .expect("a volume is added");
            volumes.push(ModelVolume {
                name,
                size: *size,
                live: Content::default(),
                unflushed: BTreeSet::new(),
                ever: BTreeSet::new(),
                snapshots: BTreeMap::new(),
                changed: true,
                touched: true,
                last_mtime: None,
            });
        }
        let chance = Chance(seed);
        Run {
            world,
            index,
            engine,
            chance,
            volumes,
            counts: BTreeMap::new(),
            next_name: 0,
            under_way: None,
            taking: 0,
            full: 0,
            ever_full: false,
            dying: false,
            seed,
        }
    }

    /// A range in one of a few hot places, so that grains are overwritten again and again; now and
    /// then anywhere, and at the very end.
    fn range(&mut self, v: usize) -> (u64, u64) {
        let size = self.volumes[v].size;
        let base = match self.chance.below(20) {
            0 => self.chance.below(size),
            1 => size.saturating_sub(self.chance.below(20_000)),
            n => (n % 4) * 13 * MIB + self.chance.below(96 << 10),
        };
        let offset = match self.chance.below(3) {
            0 => base,
            1 => base / 512 * 512,
            _ => base / PAGE * PAGE,
        };
        let len = match self.chance.below(8) {
            0 => 1 + self.chance.below(600),
            1 => 1 + self.chance.below(64 << 10),
            _ => PAGE * (1 + self.chance.below(4)),
        };
        (offset.min(size - 1), len.min(size - offset.min(size - 1)))
    }

    fn fill(&mut self, len: u64) -> Vec<u8> {
        let tag = self.chance.next().to_le_bytes();
        if self.chance.below(12) == 0 {
            return vec![0; len as usize];
        }
        tag.iter().copied().cycle().take(len as usize).collect()
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn volume(&self, v: usize) -> Arc<stillframe::volume::Volume> {
        self.engine
            .volume(&self.volumes[v].name)
            .expect("the volume is there")
    }

    fn write(&mut self, v: usize) -> Result<()> {
        let (offset, len) = self.range(v);
        let same = self.chance.below(10) == 0;
        let data = match same {
            true => self.volumes[v].live.read(offset, len as usize),
            false => self.fill(len),
        };
        let compare = self.chance.below(6) == 0;
        self.under_way = Some((v, sectors(offset, len).collect()));
        trace(|| format!("write v{v} {offset}+{len} compare {compare} same {same}"));
        let done = self.volume(v).write_at(offset, &data, compare);
        let model = &mut self.volumes[v];
        model.unflushed.extend(sectors(offset, len));
        model
            .ever
            .extend(offset / PAGE..(offset + len).div_ceil(PAGE));
        model.touched = true;
        let differs = model.live.read(offset, len as usize) != data;
        done?;
        // Not before: a refused write has changed nothing, or some prefix.
        model.changed |= differs;
        model.live.write(offset, &data);
        self.under_way = None;
        Ok(())
    }

    fn zero(&mut self, v: usize, how: Zeroing) -> Result<()> {
        let (offset, len) = match self.chance.below(40) {
            0 => (0, self.volumes[v].size),
            _ => self.range(v),
        };
        let model = &self.volumes[v];
        let parts: Vec<(u64, u64)> = model
            .ever
            .iter()
            .map(|page| {
                (
                    (page * PAGE).max(offset),
                    (page * PAGE + PAGE).min(offset + len),
                )
            })
            .filter(|(start, end)| start < end)
            .collect();
        let had_data = !model.live.zero_in(offset..offset + len);
        let touched: BTreeSet<u64> = parts
            .iter()
            .flat_map(|&(start, end)| sectors(start, end - start))
            .collect();
        self.under_way = Some((v, touched.clone()));
        trace(|| format!("zero v{v} {offset}+{len}"));
        let done = self.volume(v).zero(offset, len, how);
        let model = &mut self.volumes[v];
        model.unflushed.extend(touched);
        model.touched = true;
        done?;
        model.changed |= had_data;
        for (start, end) in parts {
            model.live.write(start, &vec![0; (end - start) as usize]);
        }
        self.under_way = None;
        Ok(())
    }

    fn flush(&mut self, v: usize) -> Result<()> {
        trace(|| format!("flush v{v}"));
        self.volume(v).flush()?;
        self.volumes[v].unflushed.clear();
        Ok(())
    }

    fn snapshot(&mut self) -> Result<()> {
        let mut chosen: Vec<usize> = (0..self.volumes.len()).collect();
        match self.chance.below(3) {
            0 => chosen.reverse(),
            _ => chosen = vec![self.chance.below(3) as usize],
        }
        // Few enough that comparing them all stays affordable.
        let limit = 5;
        for &v in &chosen {
            if self.volumes[v].snapshots.len() >= limit {
                return self.delete(v);
            }
        }
        self.next_name += 1;
        let name = format!("s{}", self.next_name);
        let targets: Vec<(Name, Name)> = chosen
            .iter()
            .map(|&v| (self.volumes[v].name.clone(), Name::new(&name).unwrap()))
            .collect();
        self.taking = targets.len();
        trace(|| format!("take {targets:?}"));
        let infos = self.engine.take_snapshots(&targets)?;
        self.taking = 0;
        for v in chosen {
            let model = &mut self.volumes[v];
            let info = infos
                .iter()
                .find(|i| i.volume == model.name)
                .expect("one each");
            assert_eq!(info.size, model.size);
            check_mtime(model, info.mtime_ns);
            model
                .snapshots
                .insert(name.clone(), ModelSnapshot::of(&model.live, info.mtime_ns));
            model.unflushed.clear();
            model.changed = false;
            model.touched = false;
        }
        Ok(())
    }

    fn delete(&mut self, v: usize) -> Result<()> {
        let names: Vec<String> = self.volumes[v].snapshots.keys().cloned().collect();
        if names.is_empty() {
            return Ok(());
        }
        let name = names[self.chance.below(names.len() as u64) as usize].clone();
        if self.chance.below(16) == 0 {
            self.hold(v, &name)?;
        }
        let (volume, snapshot) = (self.volumes[v].name.clone(), Name::new(&name).unwrap());
        if self.engine.snapshot(&volume, &snapshot).unwrap().held {
            // Its release was refused on a full disk.
            self.engine.hold_snapshot(&volume, &snapshot, false)?;
        }
        let held = (self.chance.below(4) == 0).then(|| {
            let name = Name::new(&name).unwrap();
            self.engine
                .open_snapshot(&self.volumes[v].name, &name)
                .expect("it is there")
        });
        self.engine
            .delete_snapshot(&self.volumes[v].name, &Name::new(&name).unwrap())?;
        let deleted = self.volumes[v]
            .snapshots
            .remove(&name)
            .expect("the model has it");
        self.count("delete");
        if let Some(held) = held {
            // An open reader goes on reading its instant, whatever is written meanwhile.
            let written = self.write(v);
            self.tolerate(written)?;
            let maintained = self.engine.maintain().map(drop);
            self.tolerate(maintained)?;
            // It may have failed on a full disk since the last comparison.
            let failed = v == 1
                && self.ever_full
                && held
                    .read_at(0, &mut [0])
                    .is_err_and(|e| e.kind() == Kind::Failed);
            if !deleted.failed && !failed && !self.world.is_dead() {
                let what = format!("seed {}: deleted but open {name}", self.seed);
                compare_snapshot(&held, &deleted.content, &what);
            }
        }
        Ok(())
    }

    /// A snapshot on hold stays, also over a restart, until it is released.
    fn hold(&mut self, v: usize, name: &str) -> Result<()> {
        let (volume, name) = (self.volumes[v].name.clone(), Name::new(name).unwrap());
        self.engine.hold_snapshot(&volume, &name, true)?;
        if !self.dying && self.chance.below(8) == 0 {
            self.remount(false);
        }
        let refused = self.engine.delete_snapshot(&volume, &name);
        assert_eq!(refused.unwrap_err().kind(), Kind::Busy);
        self.engine.hold_snapshot(&volume, &name, false)?;
        self.count("hold");
        Ok(())
    }

    fn rename(&mut self, v: usize) -> Result<()> {
        let Some(name) = self.volumes[v].snapshots.keys().next().cloned() else {
            return Ok(());
        };
        self.next_name += 1;
        let new = format!("s{}", self.next_name);
        let (from, to) = (Name::new(&name).unwrap(), Name::new(&new).unwrap());
        self.engine
            .rename_snapshot(&self.volumes[v].name, &from, &to)?;
        let snapshot = self.volumes[v]
            .snapshots
            .remove(&name)
            .expect("the model has it");
        self.volumes[v].snapshots.insert(new, snapshot);
        Ok(())
    }

    /// Opens what the last life left.
    fn reopen(&mut self) {
        let env = environment(&self.world, &self.index);
        self.engine = Engine::open(env, settings())
            .unwrap_or_else(|e| panic!("seed {}: the store does not open: {e:?}", self.seed));
        for model in &self.volumes {
            let state = self
                .engine
                .volume(&model.name)
                .expect("it is there")
                .info()
                .state;
            assert!(
                matches!(state, VolumeState::Active | VolumeState::Unverified),
                "seed {}: {} is {state:?}",
                self.seed,
                model.name
            );
        }
    }

    fn remount(&mut self, lose_map: bool) {
        self.free();
        self.engine.close().expect("a clean stop");
        for model in &mut self.volumes {
            model.unflushed.clear();
        }
        self.world.kill();
        self.index.kill(self.chance.next());
        if lose_map {
            self.index.lose();
            self.count("map loss");
        }
        self.reopen();
        self.count("remount");
    }

    /// The process dies, now or inside one of the next operations.
    fn kill(&mut self, power: bool) {
        let mut interrupted = false;
        self.under_way = None;
        if self.chance.below(3) > 0 {
            self.dying = true;
            self.world.die_at(1 + self.chance.below(24));
            for _ in 0..40 {
                interrupted = self.step_dying().is_err();
                if interrupted || self.world.is_dead() {
                    break;
                }
            }
        }
        self.dying = false;
        trace(|| {
            format!(
                "crash, power {power}, interrupted {interrupted}, {:?}",
                self.under_way
            )
        });
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
        if self.chance.below(8) == 0 {
            self.index.lose();
            self.count("map loss");
        }
        self.reopen();
        self.settle(interrupted, power);
        self.count(if power { "power cut" } else { "kill" });
    }

    fn step_dying(&mut self) -> Result<()> {
        let v = self.chance.below(3) as usize;
        match self.chance.below(10) {
            0..=4 => self.write(v),
            5 => self.zero(v, Zeroing::Discard),
            6 => self.snapshot(),
            7 => self.delete(v),
            8 => self.engine.maintain().map(drop),
            _ => self.flush(v),
        }
    }

    /// Adopts what an unacknowledged operation or a power cut may have left, and nothing else.
    fn settle(&mut self, interrupted: bool, power: bool) {
        let listed: Vec<BTreeSet<String>> = self
            .volumes
            .iter()
            .map(|m| {
                let snapshots = self.engine.snapshots(&m.name).expect("it is there");
                snapshots.iter().map(|s| s.name.to_string()).collect()
            })
            .collect();
        let under_way = self.under_way.take();
        for (v, names) in listed.iter().enumerate() {
            let engine_volume = self.volume(v);
            let model = &mut self.volumes[v];
            let known: BTreeSet<String> = model.snapshots.keys().cloned().collect();
            for extra in names.difference(&known) {
                // Only the one being taken, only if its answer was never given.
                assert!(
                    interrupted,
                    "seed {}: snapshot {extra} came back",
                    self.seed
                );
                assert_eq!(*extra, format!("s{}", self.next_name));
                println!(
                    "seed {}: unanswered {extra} of {} is there",
                    self.seed, model.name
                );
                let info = self
                    .engine
                    .snapshot(&model.name, &Name::new(extra).unwrap())
                    .unwrap();
                model
                    .snapshots
                    .insert(extra.clone(), ModelSnapshot::of(&model.live, info.mtime_ns));
                model.last_mtime = Some(info.mtime_ns.max(model.last_mtime.unwrap_or(i64::MIN)));
                model.unflushed.clear();
            }
            let gone: Vec<String> = known.difference(names).cloned().collect();
            assert!(
                gone.len() <= usize::from(interrupted),
                "seed {}: lost {gone:?}",
                self.seed
            );
            for name in gone {
                model.snapshots.remove(&name);
            }
            model.changed = true;
            model.touched = true;
            if let Some((_, sectors)) = under_way.as_ref().filter(|(of, _)| *of == v) {
                adopt(model, sectors, &engine_volume, self.seed);
            }
            let unflushed = std::mem::take(&mut model.unflushed);
            if power {
                adopt(model, &unflushed, &engine_volume, self.seed);
            }
        }
        self.check_group(&listed);
    }

    /// A group is whole or absent.
    fn check_group(&mut self, listed: &[BTreeSet<String>]) {
        let last = format!("s{}", self.next_name);
        let there = listed.iter().filter(|names| names.contains(&last)).count();
        if std::mem::take(&mut self.taking) > 1 {
            assert!(
                there == 0 || there == self.volumes.len(),
                "seed {}: half a group",
                self.seed
            );
            self.count(if there == 0 {
                "group undone"
            } else {
                "group kept"
            });
        }
    }

    fn compare(&mut self) {
        for v in 0..self.volumes.len() {
            let volume = self.volume(v);
            let model = &self.volumes[v];
            let what = format!("seed {}: live {}", self.seed, model.name);
            compare_view(
                model.size,
                &model.live,
                &what,
                &|at| volume.next_data(at),
                &|at| volume.next_hole(at),
                &|at, buf| volume.read_at(at, buf),
            );
            let listed = self.engine.snapshots(&model.name).expect("it is there");
            assert_eq!(listed.len(), model.snapshots.len(), "{what}");
            let model = &mut self.volumes[v];
            for (name, known) in &mut model.snapshots {
                let snap = Name::new(name).unwrap();
                let opened = self
                    .engine
                    .open_snapshot(&model.name, &snap)
                    .expect("it is there");
                assert_eq!(opened.info().mtime_ns, known.mtime_ns);
                let what = format!("seed {}: {name}", self.seed);
                if opened.info().state == SnapshotState::Active {
                    assert!(!known.failed, "{what} had failed and is there again");
                    compare_snapshot(&opened, &known.content, &what);
                    continue;
                }
                // Under `fail-snapshot`: refused for ever, every byte of it.
                assert!(v == 1 && self.ever_full, "{what} failed without cause");
                known.failed = true;
                for at in [0, opened.size() / 2, opened.size() - 1] {
                    let read = opened.read_at(at, &mut [0]);
                    assert_eq!(read.unwrap_err().kind(), Kind::Failed, "{what}");
                }
            }
        }
        self.count("compare");
    }

    fn step(&mut self) {
        trace(|| format!("{} next s{}: {:?}", self.seed, self.next_name, self.counts));
        let v = self.chance.below(3) as usize;
        let choice = self.chance.below(1000);
        let done = match choice {
            0..=599 => self.write(v).map(|()| self.count("write")),
            600..=699 => self
                .zero(v, Zeroing::Discard)
                .map(|()| self.count("discard")),
            700..=769 => self.zero(v, Zeroing::Zero).map(|()| self.count("zero")),
            770..=819 => self.flush(v).map(|()| self.count("flush")),
            820..=899 => self.snapshot().map(|()| self.count("snapshot")),
            900..=939 => self.delete(v),
            940..=949 => self.rename(v).map(|()| self.count("rename")),
            950..=975 => self.engine.maintain().map(|_| self.count("maintain")),
            976..=981 => {
                self.remount(false);
                Ok(())
            }
            982..=987 => {
                self.remount(true);
                Ok(())
            }
            988..=993 => {
                self.kill(false);
                Ok(())
            }
            _ => {
                self.kill(true);
                Ok(())
            }
        };
        // On a full disk writers and background work may be refused, and nobody else.
        let may_wait = choice < 770 || (950..=975).contains(&choice);
        let spent = self.full > 0 && self.world.disk("store/ballast").is_none();
        if !may_wait && spent && matches!(&done, Err(e) if e.kind() == Kind::NoSpace) {
            // Reserve and ballast are spent, which takes many catalogue changes on one full disk.
            self.count("refused without ballast");
            self.taking = 0;
        } else {
            let done = if may_wait { self.tolerate(done) } else { done };
            done.unwrap_or_else(|e| {
                let used = self.world.allocated("store");
                panic!("seed {}: operation {choice}: {e:?}; {used} used", self.seed)
            });
        }
        self.fill_or_free();
    }

    /// Takes a refusal on a full disk: a prefix may have been written.
    fn tolerate(&mut self, done: Result<()>) -> Result<()> {
        match done {
            Err(e) if e.kind() == Kind::NoSpace && self.full > 0 => {}
            done => return done,
        }
        if let Some((v, sectors)) = self.under_way.take() {
            let volume = self.volume(v);
            adopt(&mut self.volumes[v], &sectors, &volume, self.seed);
        }
        self.count("refused");
        Ok(())
    }

    fn free(&mut self) {
        self.world.set_space("store", None);
        self.full = 0;
    }

    /// Now and then the store's disk fills up for a while.
    fn fill_or_free(&mut self) {
        match self.full {
            // With the ballast in place: that is what a disk filled by somebody else finds.
            0 if self.chance.below(300) == 0 && self.world.disk("store/ballast").is_some() => {
                let used: u64 = self.world.allocated("store");
                let room = self.chance.below(64 << 10);
                trace(|| format!("full: {used} used, {room} left"));
                self.world.set_space("store", Some(used + room));
                self.full = 5 + self.chance.below(40);
                self.ever_full = true;
                self.count("full");
            }
            0 => {}
            1 => self.free(),
            _ => self.full -= 1,
        }
    }
}

/// Sectors that may hold anything are taken over as they are; all others must be what the model says.
fn adopt(
    model: &mut ModelVolume,
    sectors: &BTreeSet<u64>,
    volume: &stillframe::volume::Volume,
    seed: u64,
) {
    for sector in sectors {
        let offset = sector * 512;
        if offset >= model.size {
            continue;
        }
        let mut bytes = vec![0; 512.min(model.size - offset) as usize];
        volume
            .read_at(offset, &mut bytes)
            .unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
        model.live.write(offset, &bytes);
    }
}

/// The rule of DESIGN section 2 for rsync: the same time if nothing changed, at least a second more
/// if anything did.
fn check_mtime(model: &mut ModelVolume, mtime_ns: i64) {
    if let Some(last) = model.last_mtime {
        match (model.changed, model.touched) {
            (true, _) => assert!(
                mtime_ns.div_euclid(1_000_000_000) > last.div_euclid(1_000_000_000),
                "{} changed, and its time went from {last} to {mtime_ns}",
                model.name
            ),
            (false, false) => assert_eq!(mtime_ns, last, "{} did not change", model.name),
            (false, true) => assert!(mtime_ns >= last),
        }
    }
    model.last_mtime = Some(mtime_ns);
}

fn compare_snapshot(snapshot: &stillframe::volume::Snapshot, content: &Content, what: &str) {
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
fn compare_view(
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

fn env_u64(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|v| v.parse().ok())
}

fn run(seed: u64, operations: u64) -> BTreeMap<&'static str, u64> {
    let seed = env_u64("STILLFRAME_MODEL_SEED").unwrap_or(seed);
    let mut run = Run::new(seed);
    for n in 0..operations {
        run.step();
        if n % COMPARE_EVERY == 0 || env_u64("STILLFRAME_MODEL_FROM").is_some_and(|from| n >= from)
        {
            run.compare();
        }
    }
    run.compare();
    run.remount(false);
    run.compare();
    println!("seed {seed}: {operations} operations: {:?}", run.counts);
    run.counts
}

/// 200,000 operations, in two halves that use both processors.
#[test]
fn every_view_is_what_the_model_says() {
    let operations = env_u64("STILLFRAME_MODEL_OPS").unwrap_or(200_000);
    let halves = [0x5711_f4a3_u64, 0xd15c_0b10];
    let workers: Vec<_> = halves
        .into_iter()
        .map(|seed| std::thread::spawn(move || run(seed, operations / 2)))
        .collect();
    let mut totals: BTreeMap<&str, u64> = BTreeMap::new();
    for worker in workers {
        for (what, count) in worker.join().expect("a half failed; its seed is above") {
            *totals.entry(what).or_default() += count;
        }
    }
    println!("in all: {totals:?}");
    if operations >= 200_000 {
        for what in [
            "write",
            "discard",
            "zero",
            "snapshot",
            "delete",
            "remount",
            "kill",
            "power cut",
            "map loss",
        ] {
            assert!(totals[what] >= 1000, "only {} of {what}", totals[what]);
        }
    }
}
