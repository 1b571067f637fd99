//! Resize and revert against a model, on simulated disks: crashes inside of them, full disks, a lost
//! map.
//!
//! Goal: whatever happens in the middle of a resize or a revert, the live volume is afterwards exactly
//! what it was or exactly what it was to become, never half; every snapshot is exact and has its size.
//!
//! Method: a file and a device (which keeps its size) as sources; random writes, discards, snapshots,
//! deletions, resizes to odd sizes and reverts from a printed seed; in many of the resizes and reverts
//! the process or the power ends at a random operation, and in some of the recoveries after it too.
//! The model is a byte vector per view, compared whole. `STILLFRAME_MODEL_OPS` and
//! `STILLFRAME_MODEL_SEED` choose a longer run or repeat one. Counters prove that crashes fell between
//! the begin and the end.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set its stage has failed"
)]

mod rig;
#[path = "rig/sim.rs"]
mod sim;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use stillframe::error::{Error, Kind, Result};
use stillframe::map::memory::MemoryIndexHome;
use stillframe::sys::disk::{Disk, Identity};
use stillframe::sys::sim::{Op, SimWorld};
use stillframe::units::{Grain, Name};
use stillframe::volume::{
    Engine, Environment, OnFull, Settings, Snapshot, SnapshotState, Sources, Volume, VolumeOptions,
    VolumeState, Zeroing,
};

use rig::Chance;
use sim::nothing_held_back;

const MIB: u64 = 1 << 20;
const DEVICE: u64 = 1536 << 10;
const SNAPSHOTS_MAX: usize = 8;

/// A disk that has no inode and keeps its size, as a block device.
struct Device(Arc<dyn Disk>);

impl Disk for Device {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(offset, buf)
    }
    fn write_all_at(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        self.0.write_all_at(offset, parts)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }
    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }
    fn set_size(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.punch(offset, len)
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok((offset < self.0.size()?).then_some(offset))
    }
    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        Ok(self.0.size()?.max(offset))
    }
    fn allocated(&self) -> io::Result<u64> {
        self.0.size()
    }
    fn drop_cache(&self) -> io::Result<()> {
        self.0.drop_cache()
    }
    fn identity(&self) -> io::Result<Identity> {
        Ok(Identity {
            ino: 0,
            ctime_ns: 0,
            ..self.0.identity()?
        })
    }
}

struct SimSources(SimWorld);

impl Sources for SimSources {
    fn open(&self, path: &str) -> Result<Arc<dyn Disk>> {
        let disk = self.0.disk(path);
        let disk = disk.ok_or_else(|| Error::new(Kind::NotFound, format!("no {path}")))?;
        Ok(match path.starts_with("devices/") {
            true => Arc::new(Device(disk)),
            false => disk,
        })
    }
}

fn n(name: &str) -> Name {
    Name::new(name).unwrap()
}

fn settings() -> Settings {
    Settings {
        ballast_bytes: 256 << 10,
        map_cache_bytes: 64 << 10,
        segment_bytes: MIB,
        checkpoint_bytes: MIB / 2,
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

/// What a snapshot reads, whole; also checks that its holes are zero and its data is found.
fn read_snapshot(snapshot: &Snapshot) -> Vec<u8> {
    let mut all = vec![0xAA; snapshot.size() as usize];
    for (i, part) in all.chunks_mut(100_000).enumerate() {
        let at = i as u64 * 100_000;
        snapshot
            .read_at(at, part)
            .unwrap_or_else(|e| panic!("{:?} at {at}: {e:?}", snapshot.info().name));
    }
    let mut at = 0;
    while let Some(data) = snapshot.next_data(at).unwrap() {
        assert!(all[at as usize..data as usize].iter().all(|&b| b == 0));
        at = snapshot.next_hole(data).unwrap();
        assert!(at > data && at <= snapshot.size());
    }
    assert!(all[at as usize..].iter().all(|&b| b == 0));
    all
}

fn read_live(volume: &Volume) -> Vec<u8> {
    let mut all = vec![0xAA; volume.size() as usize];
    volume.read_at(0, &mut all).unwrap();
    all
}

#[track_caller]
fn same(found: &[u8], wanted: &[u8], what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}: size");
    if let Some(at) = (0..found.len()).find(|&at| found[at] != wanted[at]) {
        let (found, wanted) = (found[at], wanted[at]);
        panic!("{what}: byte {at} is {found:#x}, not {wanted:#x}");
    }
}

struct Model {
    name: Name,
    path: &'static str,
    live: Vec<u8>,
    snapshots: BTreeMap<String, Vec<u8>>,
}

struct Run {
    seed: u64,
    world: SimWorld,
    index: MemoryIndexHome,
    engine: Arc<Engine>,
    chance: Chance,
    models: Vec<Model>,
    counts: BTreeMap<&'static str, u64>,
    next_name: u64,
}

impl Run {
    fn new(seed: u64) -> Run {
        let (world, index) = (SimWorld::new(seed), MemoryIndexHome::new());
        let env = environment(&world, &index);
        Engine::create(&env, &settings()).unwrap();
        let engine = Engine::open(env, settings()).unwrap();
        let mut run = Run {
            seed,
            world,
            index,
            engine,
            chance: Chance(seed),
            models: Vec::new(),
            counts: BTreeMap::new(),
            next_name: 0,
        };
        run.add("v0", "files/v0", MIB + 777, 4096);
        run.add("v1", "devices/v1", DEVICE, 16384);
        run.add("v2", "files/v2", MIB / 2, 16384);
        run
    }

    fn add(&mut self, name: &str, path: &'static str, size: u64, grain: u64) {
        self.world.add_disk(path, size);
        let options = VolumeOptions {
            grain: Grain::new(grain).unwrap(),
            on_full_wait_s: 0,
            ..VolumeOptions::default()
        };
        self.engine.add_volume(&n(name), path, options).unwrap();
        self.models.push(Model {
            name: n(name),
            path,
            live: vec![0; size as usize],
            snapshots: BTreeMap::new(),
        });
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn volume(&self, v: usize) -> Arc<Volume> {
        self.engine.volume(&self.models[v].name).unwrap()
    }

    fn range(&mut self, v: usize) -> (u64, u64) {
        let size = self.models[v].live.len() as u64;
        let base = match self.chance.below(4) {
            0 => self.chance.below(size),
            1 => size.saturating_sub(self.chance.below(40_000)),
            n => (n * 200_000 + self.chance.below(60_000)).min(size - 1),
        };
        let offset = match self.chance.below(2) {
            0 => base.min(size - 1),
            _ => base.min(size - 1) / 4096 * 4096,
        };
        let len = 1 + match self.chance.below(4) {
            0 => self.chance.below(200_000),
            _ => self.chance.below(9000),
        };
        (offset, len.min(size - offset))
    }

    fn write(&mut self, v: usize) {
        let (offset, len) = self.range(v);
        let part = offset as usize..(offset + len) as usize;
        let volume = self.volume(v);
        if self.chance.below(4) == 0 {
            volume.zero(offset, len, Zeroing::Discard).unwrap();
            self.models[v].live[part].fill(0);
        } else {
            let tag = self.chance.next().to_le_bytes();
            let data: Vec<u8> = tag.iter().copied().cycle().take(len as usize).collect();
            volume.write_at(offset, &data, false).unwrap();
            self.models[v].live[part].copy_from_slice(&data);
        }
        self.count("write");
    }

    fn snapshot(&mut self, v: usize) {
        if self.models[v].snapshots.len() >= SNAPSHOTS_MAX {
            let names: Vec<String> = self.models[v].snapshots.keys().cloned().collect();
            let gone = &names[self.chance.below(names.len() as u64) as usize];
            let model = &mut self.models[v];
            self.engine.delete_snapshot(&model.name, &n(gone)).unwrap();
            model.snapshots.remove(gone);
            return self.count("delete");
        }
        self.next_name += 1;
        let name = format!("s{}", self.next_name);
        let model = &mut self.models[v];
        self.engine
            .take_snapshots(&[(model.name.clone(), n(&name))])
            .unwrap();
        model.snapshots.insert(name, model.live.clone());
        self.count("snapshot");
    }

    /// What the volume is with another size.
    fn resized(&self, v: usize, size: u64) -> Vec<u8> {
        let model = &self.models[v];
        let mut live = model.live.clone();
        if size as usize > live.len() && model.path.starts_with("devices/") {
            let device = self.world.peek(model.path).unwrap();
            live.extend_from_slice(&device[live.len()..size as usize]);
        }
        live.resize(size as usize, 0);
        live
    }

    fn size(&mut self, v: usize) -> u64 {
        let most = match self.models[v].path.starts_with("devices/") {
            true => DEVICE,
            false => 3 * MIB / 2,
        };
        match self.chance.below(4) {
            0 => (1 + self.chance.below(most / 4096)) * 4096,
            1 => most,
            _ => 1 + self.chance.below(most),
        }
    }

    /// A resize or revert of a volume; what it leaves if it is done, and the name of an undo snapshot.
    fn choose(&mut self, v: usize) -> (Change, Vec<u8>) {
        let names: Vec<String> = self.models[v].snapshots.keys().cloned().collect();
        if names.is_empty() || self.chance.below(5) < 2 {
            let size = self.size(v);
            return (Change::Resize(size), self.resized(v, size));
        }
        let to = names[self.chance.below(names.len() as u64) as usize].clone();
        let live = self.models[v].snapshots[&to].clone();
        (Change::Revert(to), live)
    }

    fn change(&self, v: usize, change: &Change) -> Result<()> {
        let name = &self.models[v].name;
        match change {
            Change::Resize(size) => {
                let info = self.engine.resize_volume(name, *size)?;
                assert_eq!(
                    (info.size, info.state),
                    (*size, self.volume(v).info().state)
                );
            }
            Change::Revert(to) => {
                let mut last = (0, 0);
                let reverted = self.engine.revert_volume(name, &n(to), &mut |done, all| {
                    assert!(last.0 <= done && done <= all, "{last:?} {done} {all}");
                    last = (done, all);
                })?;
                assert_eq!(last.0, last.1, "the progress ends at its end");
                // A long name is cut, to leave room for a number.
                let undo = format!("before-revert-{to}");
                let undo = &undo[..undo.len().min(190)];
                assert!(reverted.undo.name.as_str().starts_with(undo));
            }
        }
        Ok(())
    }

    /// Undo snapshots that the model does not know hold what was live before.
    fn adopt_undo(&mut self, v: usize, before: &[u8], new_max: usize) {
        let model = &mut self.models[v];
        let mut new = 0;
        for info in self.engine.snapshots(&model.name).unwrap() {
            let name = info.name.to_string();
            model.snapshots.entry(name).or_insert_with_key(|name| {
                assert!(name.starts_with("before-revert-"), "{name}");
                new += 1;
                before.to_vec()
            });
        }
        assert!(new <= new_max, "{new} undo snapshots");
    }

    fn change_safely(&mut self, v: usize) {
        let (change, after) = self.choose(v);
        let before = std::mem::replace(&mut self.models[v].live, after);
        self.change(v, &change)
            .unwrap_or_else(|e| panic!("seed {}: {change:?}: {e:?}", self.seed));
        let undo = usize::from(matches!(change, Change::Revert(_)));
        self.adopt_undo(v, &before, undo);
        self.count(change.name());
    }

    /// The process or the power ends inside a resize or a revert.
    fn change_and_crash(&mut self, v: usize) {
        for v in 0..self.models.len() {
            self.volume(v).flush().unwrap();
        }
        let (change, after) = self.choose(v);
        let within = match &change {
            Change::Resize(_) => 8,
            Change::Revert(_) => 45,
        };
        self.world.die_at(1 + self.chance.below(within));
        let done = self.change(v, &change);
        let power = self.chance.below(2) == 0;
        self.crash(power);
        let before = self.models[v].live.clone();
        let source = self.world.peek(self.models[v].path).unwrap();
        let of = |view: &[u8]| source.get(..view.len()) == Some(view);
        if !of(&before) && !of(&after) {
            self.count(change.half());
        }
        while self.chance.below(3) == 0 {
            // And again inside the recovery.
            self.world.die_at(1 + self.chance.below(30));
            let opened = Engine::open(environment(&self.world, &self.index), settings());
            if opened.is_err() {
                self.count("crash in recovery");
            }
            drop(opened);
            self.crash(power);
        }
        if self.chance.below(6) == 0 {
            self.index.lose();
            self.count("map loss");
        }
        self.reopen(VolumeState::Unverified);
        let found = read_live(&self.volume(v));
        let what = format!("seed {}: {change:?}, power {power}, {done:?}", self.seed);
        if done.is_ok() || found == after {
            same(&found, &after, &what);
            self.count(if done.is_ok() {
                "done before"
            } else {
                "finished"
            });
            self.models[v].live = after;
        } else {
            same(&found, &before, &what);
            self.count("not begun");
        }
        self.adopt_undo(v, &before, 1);
        self.compare();
    }

    fn crash(&mut self, power: bool) {
        let seed = self.chance.next();
        match power {
            true => {
                self.world.power_cut();
                self.index.power_cut(seed);
            }
            false => {
                self.world.kill();
                self.index.kill(seed);
            }
        }
    }

    fn reopen(&mut self, worst: VolumeState) {
        let env = environment(&self.world, &self.index);
        self.engine = Engine::open(env, settings())
            .unwrap_or_else(|e| panic!("seed {}: the store does not open: {e:?}", self.seed));
        for v in 0..self.models.len() {
            let state = self.volume(v).info().state;
            assert!(
                state == VolumeState::Active || state == worst,
                "seed {}: v{v} is {state:?}",
                self.seed
            );
        }
    }

    fn remount(&mut self) {
        self.engine.close().unwrap();
        self.world.kill();
        self.index.kill(self.chance.next());
        // A device is not known to be what it was.
        self.reopen(VolumeState::Unverified);
        self.count("remount");
    }

    fn compare(&mut self) {
        for v in 0..self.models.len() {
            let model = &self.models[v];
            let what = format!("seed {}: {}", self.seed, model.name);
            same(&read_live(&self.volume(v)), &model.live, &what);
            let listed = self.engine.snapshots(&model.name).unwrap();
            assert_eq!(listed.len(), model.snapshots.len(), "{what}");
            for info in listed {
                assert_eq!(info.state, SnapshotState::Active, "{what}");
                let opened = self.engine.open_snapshot(&model.name, &info.name).unwrap();
                let wanted = &model.snapshots[info.name.as_str()];
                let what = format!("{what}@{}", info.name);
                same(&read_snapshot(&opened), wanted, &what);
            }
        }
        self.count("compare");
    }

    fn step(&mut self) {
        let v = self.chance.below(self.models.len() as u64) as usize;
        match self.chance.below(100) {
            0..=59 => self.write(v),
            60..=71 => self.snapshot(v),
            72..=81 => self.change_safely(v),
            82..=93 => self.change_and_crash(v),
            94..=96 => drop(self.engine.maintain().unwrap()),
            97..=98 => self.compare(),
            _ => self.remount(),
        }
    }
}

#[derive(Debug)]
enum Change {
    Resize(u64),
    Revert(String),
}

impl Change {
    fn name(&self) -> &'static str {
        match self {
            Change::Resize(_) => "resize",
            Change::Revert(_) => "revert",
        }
    }

    fn half(&self) -> &'static str {
        match self {
            Change::Resize(_) => "half resized",
            Change::Revert(_) => "half reverted",
        }
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn never_half() {
    let first = setting("STILLFRAME_MODEL_SEED", 1);
    let seeds = if std::env::var_os("STILLFRAME_MODEL_SEED").is_some() {
        1
    } else {
        4
    };
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for seed in first..first + seeds {
        println!("seed {seed}");
        let mut run = Run::new(seed);
        for _ in 0..setting("STILLFRAME_MODEL_OPS", 500) {
            run.step();
        }
        run.compare();
        for (what, count) in run.counts {
            *counts.entry(what).or_default() += count;
        }
    }
    println!("{counts:?}");
    for what in [
        "half reverted",
        "finished",
        "not begun",
        "done before",
        "crash in recovery",
        "map loss",
        "resize",
        "revert",
    ] {
        let reached = counts.get(what).copied().unwrap_or(0);
        assert!(reached >= 3 || seeds == 1, "{what}: only {reached} times");
    }
}

/// One volume of 1 MiB and a bit with the snapshots `a` and `b`, and what they and the live volume hold.
struct Stage {
    world: SimWorld,
    index: MemoryIndexHome,
    engine: Arc<Engine>,
    views: BTreeMap<&'static str, Vec<u8>>,
    live: Vec<u8>,
}

impl Stage {
    fn new(seed: u64) -> Stage {
        let (world, index) = (SimWorld::new(seed), MemoryIndexHome::new());
        let env = environment(&world, &index);
        Engine::create(&env, &settings()).unwrap();
        let engine = Engine::open(env, settings()).unwrap();
        let size = MIB + 777;
        world.add_disk("files/v", size);
        let options = VolumeOptions {
            // A snapshot that fails because of a resize or revert is a fault.
            on_full: OnFull::FailSnapshot,
            on_full_wait_s: 0,
            ..VolumeOptions::default()
        };
        engine.add_volume(&n("v"), "files/v", options).unwrap();
        let live = vec![0; size as usize];
        let mut stage = Stage {
            world,
            index,
            engine,
            views: BTreeMap::new(),
            live,
        };
        stage.write(0, 300_000, 1);
        stage.write(900_001, 100_000, 2);
        stage.take("a");
        stage.write(200_000, 200_000, 3);
        stage.zero(20_000, 90_000);
        stage.take("b");
        stage.write(100, 50_000, 4);
        stage.write(1_000_000, 49_353, 5);
        stage.volume().flush().unwrap();
        stage
    }

    fn volume(&self) -> Arc<Volume> {
        self.engine.volume(&n("v")).unwrap()
    }

    fn write(&mut self, at: usize, len: usize, byte: u8) {
        self.volume()
            .write_at(at as u64, &vec![byte; len], false)
            .unwrap();
        self.live[at..at + len].fill(byte);
    }

    fn zero(&mut self, at: usize, len: usize) {
        let how = Zeroing::Discard;
        self.volume().zero(at as u64, len as u64, how).unwrap();
        self.live[at..at + len].fill(0);
    }

    fn take(&mut self, name: &'static str) {
        self.engine.take_snapshots(&[(n("v"), n(name))]).unwrap();
        self.views.insert(name, self.live.clone());
    }

    fn revert(&self, to: &str) -> Result<()> {
        let done = self.engine.revert_volume(&n("v"), &n(to), &mut |_, _| {});
        done.map(drop)
    }

    fn resize(&self, size: usize) -> Result<()> {
        self.engine.resize_volume(&n("v"), size as u64).map(drop)
    }

    fn state(&self) -> VolumeState {
        self.volume().info().state
    }

    fn reopen(&mut self) {
        let env = environment(&self.world, &self.index);
        self.engine = Engine::open(env, settings()).unwrap();
    }

    fn crash(&mut self) {
        self.world.kill();
        self.index.kill(1);
        self.reopen();
    }

    /// Every snapshot is exact; undo snapshots hold `before`. Returns how many of these there are.
    fn check_snapshots(&self, before: &[u8], what: &str) -> usize {
        let mut undos = 0;
        for info in self.engine.snapshots(&n("v")).unwrap() {
            assert_eq!(info.state, SnapshotState::Active, "{what}");
            let opened = self.engine.open_snapshot(&n("v"), &info.name).unwrap();
            let wanted = match self.views.get(info.name.as_str()) {
                Some(view) => view,
                None => {
                    undos += 1;
                    before
                }
            };
            let what = format!("{what}: {}", info.name);
            same(&read_snapshot(&opened), wanted, &what);
        }
        undos
    }

    fn check(&self, live: &[u8], what: &str) {
        same(&read_live(&self.volume()), live, what);
    }

    /// The live volume is unfinished: nobody gets a byte of it, and nobody writes one.
    fn check_unserved(&self, what: &str) {
        let volume = self.volume();
        let refused = |e: Error| assert_eq!(e.kind(), Kind::Failed, "{what}: {e:?}");
        refused(volume.read_at(0, &mut [0]).unwrap_err());
        refused(volume.write_at(0, &[1], false).unwrap_err());
        refused(volume.zero(0, 4096, Zeroing::Zero).unwrap_err());
        refused(volume.next_data(0).unwrap_err());
        let taken = self.engine.take_snapshots(&[(n("v"), n("new"))]);
        refused(taken.unwrap_err());
    }
}

/// Every operation of a resize and of a revert fails once, in each of them: the volume is what it was,
/// or what it was to be, or unfinished and not served; and then asking again finishes it.
#[test]
fn an_error_anywhere_in_the_middle() {
    let (mut unfinished, mut unchanged, mut done, mut went_on) = (0, 0, 0, 0);
    let ops = [Op::Write, Op::Sync, Op::SetSize, Op::Punch, Op::Read];
    for (case, op) in (0..4).flat_map(|case| ops.map(|op| (case, op))) {
        for nth in 1..200 {
            let mut stage = Stage::new(nth);
            let before = stage.live.clone();
            let to = match case {
                0 | 1 => ["a", "b"][case].to_owned(),
                2 => String::from("700001"),
                _ => String::from("1400000"),
            };
            let after = match case {
                0 | 1 => stage.views[to.as_str()].clone(),
                _ => {
                    let mut after = before.clone();
                    after.resize(to.parse().unwrap(), 0);
                    after
                }
            };
            if case == 1 {
                // So that the size changes, too.
                stage.resize(777_777).unwrap();
            }
            let before = match case {
                1 => before[..777_777].to_vec(),
                _ => before,
            };
            let run = |stage: &Stage| match case {
                0 | 1 => stage.revert(&to),
                _ => stage.resize(to.parse().unwrap()),
            };
            let counted = stage.world.count(op);
            stage.world.fail_nth(op, nth, 5);
            let outcome = run(&stage);
            let reached = stage.world.count(op) - counted >= nth;
            let what = format!("case {case}, {op:?} number {nth}, {outcome:?}");
            if !reached {
                assert!(outcome.is_ok(), "{what}");
                break;
            }
            match (&outcome, stage.state()) {
                (Ok(()), VolumeState::Active) => {
                    stage.check(&after, &what);
                    done += 1;
                }
                (Err(_), VolumeState::Active) => {
                    stage.check(&before, &what);
                    assert_eq!(stage.check_snapshots(&before, &what), 0, "{what}");
                    unchanged += 1;
                }
                (Err(_), VolumeState::Unfinished(_) | VolumeState::Suspect(_)) => {
                    stage.check_unserved(&what);
                    stage.check_snapshots(&before, &what);
                    unfinished += 1;
                    if matches!(stage.state(), VolumeState::Suspect(_)) {
                        stage.engine.accept_volume(&n("v")).unwrap();
                    }
                    if nth % 2 == 0 {
                        run(&stage).unwrap_or_else(|e| panic!("{what}: again: {e:?}"));
                        stage.check(&after, &what);
                        went_on += 1;
                    }
                }
                other => panic!("{what}: {other:?}"),
            }
            stage.check_snapshots(&before, &what);
            stage.crash();
            let found = read_live(&stage.volume());
            if outcome.is_ok() || found == after {
                same(&found, &after, &what);
            } else {
                same(&found, &before, &what);
            }
            stage.check_snapshots(&before, &what);
        }
    }
    println!("{unfinished} unfinished, {unchanged} unchanged, {done} done, {went_on} went on");
    assert!(unfinished >= 4 && unchanged >= 10 && went_on >= 2);
}

#[test]
fn a_full_disk_refuses_and_changes_nothing() {
    let mut stage = Stage::new(7);
    let used = stage.world.allocated("store");
    let (size, before) = (stage.live.len(), stage.live.clone());
    stage.world.set_space("store", Some(used + (100 << 10)));
    // The end holds more than 100 KiB of content that `b` needs.
    let refused = stage.revert("a").unwrap_err();
    assert_eq!(refused.kind(), Kind::NoSpace, "{refused:?}");
    let refused = stage.resize(5000).unwrap_err();
    assert_eq!(refused.kind(), Kind::NoSpace, "{refused:?}");
    assert_eq!(stage.state(), VolumeState::Active);
    stage.check(&before, "refused");
    assert_eq!(stage.check_snapshots(&before, "refused"), 0);
    stage.world.set_space("store", None);
    stage.resize(5000).unwrap();
    stage.resize(size).unwrap();
    let mut zeroed = before.clone();
    zeroed[5000..].fill(0);
    stage.check(&zeroed, "cut and grown");
    stage.check_snapshots(&[], "cut and grown");
    stage.live = zeroed;
    stage.revert("a").unwrap();
    stage.check(&stage.views["a"], "reverted");
    assert_eq!(stage.check_snapshots(&stage.live, "reverted"), 1);
}

/// A revert cut short, and then a disk so full that nothing more can be preserved: it goes back, or
/// waits unserved until there is space.
#[test]
fn a_revert_that_cannot_be_finished_waits_or_goes_back() {
    let (mut unserved, mut back, mut finished) = (0, 0, 0);
    for nth in 1..60 {
        let mut stage = Stage::new(nth);
        let before = stage.live.clone();
        stage.world.die_at(nth);
        let done = stage.revert("a").is_ok();
        if done {
            break;
        }
        stage.world.kill();
        stage.index.kill(nth);
        // The half of them find no space at all, nor what the log had written ahead.
        let space = match nth % 2 {
            0 => {
                nothing_held_back(&stage.world);
                1
            }
            _ => stage.world.allocated("store"),
        };
        stage.world.set_space("store", Some(space));
        stage.reopen();
        let what = format!("died at {nth}");
        match stage.state() {
            VolumeState::Unfinished(_) => {
                stage.check_unserved(&what);
                unserved += 1;
            }
            _ => {
                let found = read_live(&stage.volume());
                match found == stage.views["a"] {
                    true => finished += 1,
                    false => back += 1,
                }
                assert!(found == before || found == stage.views["a"], "{what}");
            }
        }
        stage.check_snapshots(&before, &what);
        stage.world.set_space("store", None);
        stage.crash();
        let found = read_live(&stage.volume());
        assert!(found == before || found == stage.views["a"], "{what}");
        stage.check_snapshots(&before, &what);
    }
    println!("{unserved} unserved, {back} not begun or back, {finished} finished");
    assert!(back >= 2 && finished >= 2 && unserved >= 2);
}

/// What a revert excludes and what goes on, asked from its own middle.
#[test]
fn others_go_on_during_a_revert() {
    let stage = Stage::new(3);
    stage.world.add_disk("files/w", MIB);
    let options = VolumeOptions::default();
    let other = stage
        .engine
        .add_volume(&n("w"), "files/w", options)
        .unwrap();
    let engine = &stage.engine;
    let mut asked = 0;
    let busy = |done: Result<()>| assert_eq!(done.unwrap_err().kind(), Kind::Busy);
    let reverted = engine.revert_volume(&n("v"), &n("a"), &mut |_, _| {
        asked += 1;
        let again = engine.revert_volume(&n("v"), &n("b"), &mut |_, _| {});
        busy(again.map(drop));
        busy(engine.resize_volume(&n("v"), 5).map(drop));
        busy(engine.take_snapshots(&[(n("v"), n("x"))]).map(drop));
        busy(
            engine
                .take_snapshots(&[(n("w"), n("x")), (n("v"), n("x"))])
                .map(drop),
        );
        busy(engine.remove_volume(&n("v")));
        busy(engine.accept_volume(&n("v")));
        busy(engine.set_volume(&n("v"), options));
        if asked == 1 {
            busy(engine.delete_snapshot(&n("v"), &n("a")));
            busy(engine.delete_snapshot(&n("v"), &n("before-revert-a")));
        }
        let name = format!("w{asked}");
        engine.take_snapshots(&[(n("w"), n(&name))]).unwrap();
        other.write_at(0, name.as_bytes(), false).unwrap();
        engine.maintain().unwrap();
        stage.check_snapshots(&stage.live, "in the middle");
    });
    let reverted = reverted.unwrap();
    assert!(asked >= 2);
    assert_eq!(reverted.undo.name, n("before-revert-a"));
    assert!(reverted.written > 0);
    stage.check(&stage.views["a"], "reverted");
    // Nothing differs now, so nothing is written.
    let again = engine
        .revert_volume(&n("v"), &n("a"), &mut |_, _| {})
        .unwrap();
    assert_eq!(again.written, 0);
    assert_eq!(again.undo.name, n("before-revert-a-2"));
    // Undone by the snapshot that was taken first; free again are all of them.
    stage.revert("before-revert-a").unwrap();
    stage.check(&stage.live, "undone");
    engine.delete_snapshot(&n("v"), &n("a")).unwrap();
    engine
        .delete_snapshot(&n("v"), &n("before-revert-a"))
        .unwrap();
}

/// A write that arrives in the middle waits, and is then made to what the revert left; so does a read.
#[test]
fn a_write_during_a_revert_waits_for_its_end() {
    let stage = Stage::new(9);
    let engine = &stage.engine;
    let (written, read) = (AtomicBool::new(false), AtomicBool::new(false));
    let volume = stage.volume();
    std::thread::scope(|scope| {
        let mut asked = 0;
        let (sent, started) = channel();
        let mut sent = Some(sent);
        let (volume, started, written, read) = (&volume, started, &written, &read);
        let expected = stage.views["a"][0];
        let reverted = engine.revert_volume(&n("v"), &n("a"), &mut |_, _| {
            asked += 1;
            if let Some(sent) = sent.take() {
                let again = sent.clone();
                scope.spawn(move || {
                    sent.send(()).unwrap();
                    volume.write_at(4096, &[99; 4096], false).unwrap();
                    written.store(true, Ordering::SeqCst);
                });
                scope.spawn(move || {
                    let mut first = [0];
                    again.send(()).unwrap();
                    volume.read_at(0, &mut first).unwrap();
                    assert_eq!(first, [expected], "after it");
                    read.store(true, Ordering::SeqCst);
                });
                started.recv().unwrap();
                started.recv().unwrap();
            }
            for _ in 0..1000 {
                std::thread::yield_now();
            }
            assert!(!written.load(Ordering::SeqCst), "it did not wait");
            assert!(!read.load(Ordering::SeqCst), "it was read in the middle");
        });
        reverted.unwrap();
        assert!(asked >= 2, "asked {asked} times");
    });
    assert!(written.load(Ordering::SeqCst));
    let mut expected = stage.views["a"].clone();
    expected[4096..8192].fill(99);
    stage.check(&expected, "reverted and written");
}

/// A clean stop does not wait for a long revert: the next opening finishes it.
#[test]
fn a_stop_in_the_middle_of_a_revert() {
    let mut stage = Stage::new(13);
    let engine = Arc::clone(&stage.engine);
    let mut stopping = None;
    let reverted = engine.revert_volume(&n("v"), &n("a"), &mut |_, _| {
        if stopping.is_some() {
            return;
        }
        let stopped = Arc::clone(&engine);
        stopping = Some(std::thread::spawn(move || stopped.close()));
        while engine.open_snapshot(&n("v"), &n("a")).is_ok() {
            std::thread::yield_now();
        }
    });
    assert_eq!(reverted.unwrap_err().kind(), Kind::Interrupted);
    stopping.unwrap().join().unwrap().unwrap();
    drop(engine);
    stage.world.kill();
    stage.index.kill(1);
    stage.reopen();
    assert_eq!(stage.state(), VolumeState::Active);
    stage.check(&stage.views["a"], "finished");
    assert_eq!(stage.check_snapshots(&stage.live, "finished"), 1);
}

/// Readers of the live volume see all of it before or all of it after; readers of snapshots see
/// nothing of a resize; a writer that comes in between writes to what the revert left.
#[test]
fn readers_and_writers_meanwhile() {
    let stage = Stage::new(5);
    let (before, after) = (&stage.live, &stage.views["b"]);
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let volume = stage.volume();
            let mut all = vec![0; before.len()];
            while !stop.load(Ordering::Acquire) {
                match volume.read_at(0, &mut all) {
                    Ok(()) => assert!(all == *before || all == *after, "half is seen"),
                    // While it is shorter.
                    Err(e) => assert_eq!(e.kind(), Kind::Invalid, "{e:?}"),
                }
                reads.fetch_add(1, Ordering::AcqRel);
            }
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Acquire) {
                let opened = stage.engine.open_snapshot(&n("v"), &n("a")).unwrap();
                same(&read_snapshot(&opened), &stage.views["a"], "a");
                reads.fetch_add(1, Ordering::AcqRel);
            }
        });
        let mut undo = 0;
        let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while undo < 12 || reads.load(Ordering::Acquire) < 40 {
            assert!(
                std::time::Instant::now() < end,
                "the readers do not come through"
            );
            stage.revert("b").unwrap();
            stage.check(after, "reverted");
            stage.resize(200_000).unwrap();
            undo += 1;
            let name = match undo {
                1 => "before-revert-b".to_owned(),
                n => format!("before-revert-b-{n}"),
            };
            stage.revert(&name).unwrap();
            stage.check(before, "undone");
        }
        stop.store(true, Ordering::Release);
    });
}

/// Scattered small changes are preserved many with one sync of the log.
#[test]
fn scattered_changes_share_syncs() {
    let mut stage = Stage::new(11);
    let mut grains = 0;
    for at in (0..stage.live.len() - 4096).step_by(3 * 4096) {
        stage.write(at, 4096, 9);
        grains += 1;
    }
    let syncs = stage.world.count(Op::Sync);
    stage.revert("b").unwrap();
    let syncs = stage.world.count(Op::Sync) - syncs;
    stage.check(&stage.views["b"], "reverted");
    assert!(
        grains > 80 && syncs < 20,
        "{syncs} syncs for {grains} grains"
    );
}

/// A device keeps its size: the volume on it takes part of it.
#[test]
fn a_device_may_be_larger_than_its_volume() {
    let (world, index) = (SimWorld::new(1), MemoryIndexHome::new());
    let env = || environment(&world, &index);
    Engine::create(&env(), &settings()).unwrap();
    let engine = Engine::open(env(), settings()).unwrap();
    world.add_disk("devices/d", MIB);
    let options = VolumeOptions::default();
    let volume = engine.add_volume(&n("d"), "devices/d", options).unwrap();
    volume.write_at(0, &vec![7; MIB as usize], false).unwrap();
    engine.take_snapshots(&[(n("d"), n("a"))]).unwrap();
    let refused = engine.resize_volume(&n("d"), MIB + 1).unwrap_err();
    assert_eq!(refused.kind(), Kind::Failed);
    engine.resize_volume(&n("d"), 100_001).unwrap();
    // Somebody else's use of the rest is none of the snapshot's business.
    world.poke("devices/d", 500_000, &[1; 4096]);
    engine.resize_volume(&n("d"), MIB).unwrap();
    let mut byte = [0];
    volume.read_at(500_000, &mut byte).unwrap();
    assert_eq!(byte, [1], "what is new is what the device holds");
    let opened = engine.open_snapshot(&n("d"), &n("a")).unwrap();
    same(&read_snapshot(&opened), &vec![7; MIB as usize], "a");
    drop(opened);
    engine
        .revert_volume(&n("d"), &n("a"), &mut |_, _| {})
        .unwrap();
    same(&read_live(&volume), &vec![7; MIB as usize], "reverted");
    for (size, good) in [(2 * MIB, true), (MIB - 512, false)] {
        world.kill();
        index.kill(1);
        world.disk("devices/d").unwrap().set_size(size).unwrap();
        let engine = Engine::open(env(), settings()).unwrap();
        let state = engine.volume(&n("d")).unwrap().info().state;
        match good {
            true => assert_eq!(state, VolumeState::Unverified),
            false => assert!(matches!(state, VolumeState::Changed(_)), "{state:?}"),
        }
    }
}

#[test]
fn sizes_that_no_volume_has() {
    let stage = Stage::new(1);
    assert_eq!(stage.resize(0).unwrap_err().kind(), Kind::Invalid);
    assert_eq!(stage.resize(usize::MAX).unwrap_err().kind(), Kind::Limit);
    let nowhere = stage.engine.resize_volume(&n("w"), 1).unwrap_err();
    assert_eq!(nowhere.kind(), Kind::NotFound);
    assert_eq!(stage.revert("c").unwrap_err().kind(), Kind::NotFound);
    stage.check(&stage.live, "refused");
}

/// A read of a source that waits, once, until it is told to go on.
type Hook = Arc<std::sync::Mutex<Option<(Sender<()>, Receiver<()>)>>>;

struct Waits(Arc<dyn Disk>, Hook);

impl Disk for Waits {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let hook = self.1.lock().unwrap().take();
        if let Some((arrived, go_on)) = hook {
            arrived.send(()).unwrap();
            go_on.recv().unwrap();
        }
        self.0.read_exact_at(offset, buf)
    }
    fn write_all_at(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        self.0.write_all_at(offset, parts)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }
    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }
    fn set_size(&self, size: u64) -> io::Result<()> {
        self.0.set_size(size)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.punch(offset, len)
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.0.next_data(offset)
    }
    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        self.0.next_hole(offset)
    }
    fn allocated(&self) -> io::Result<u64> {
        self.0.allocated()
    }
    fn drop_cache(&self) -> io::Result<()> {
        self.0.drop_cache()
    }
    fn identity(&self) -> io::Result<Identity> {
        self.0.identity()
    }
}

struct WaitingSources(SimWorld, Hook);

impl Sources for WaitingSources {
    fn open(&self, path: &str) -> Result<Arc<dyn Disk>> {
        Ok(Arc::new(Waits(self.0.disk(path).unwrap(), self.1.clone())))
    }
}

/// A reader of a snapshot is about to read from the source what is cut off just then.
#[test]
fn what_is_cut_off_under_a_reader_is_read_from_the_log() {
    let (world, index, hook) = (SimWorld::new(1), MemoryIndexHome::new(), Hook::default());
    let env = || Environment {
        sources: Arc::new(WaitingSources(world.clone(), hook.clone())),
        ..environment(&world, &index)
    };
    Engine::create(&env(), &settings()).unwrap();
    let engine = Engine::open(env(), settings()).unwrap();
    world.add_disk("files/v", MIB);
    let options = VolumeOptions::default();
    let volume = engine.add_volume(&n("v"), "files/v", options).unwrap();
    volume.write_at(0, &vec![7; MIB as usize], false).unwrap();
    engine.take_snapshots(&[(n("v"), n("a"))]).unwrap();
    let opened = engine.open_snapshot(&n("v"), &n("a")).unwrap();
    let ((arrived, arrival), (go_on, wait)) = (channel(), channel());
    *hook.lock().unwrap() = Some((arrived, wait));
    let reader = std::thread::spawn(move || read_snapshot(&opened));
    arrival.recv().unwrap();
    engine.resize_volume(&n("v"), 50_001).unwrap();
    go_on.send(()).unwrap();
    same(&reader.join().unwrap(), &vec![7; MIB as usize], "a");
}
