//! The rich store, and everything that can be read of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use stillframe::error::{Error, Result};
use stillframe::map::memory::MemoryIndexHome;
use stillframe::sys::sim::SimWorld;
use stillframe::units::{Grain, Name};
use stillframe::volume::{Engine, Environment, Settings, VolumeOptions, Zeroing};

use crate::rig::Chance;
use crate::sim::environment;

pub const PAGE: usize = 4096;
const MIB: u64 = 1 << 20;
pub const VOLUMES: [(&str, u64, u64); 2] =
    [("a", 384 << 10, 4096), ("b", (300 << 10) + 777, 16384)];

pub fn settings() -> Settings {
    Settings {
        ballast_bytes: 0,
        map_cache_bytes: 256 << 10,
        segment_bytes: MIB,
        checkpoint_bytes: 512 << 10,
        ..Settings::default()
    }
}

pub fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// One view: what each of its pages reads as.
pub type View = Vec<Result<Vec<u8>>>;

fn pages(size: u64, read: impl Fn(u64, &mut [u8]) -> Result<()>) -> View {
    let page = |at: u64| {
        let mut bytes = vec![0xa5; (size - at).min(PAGE as u64) as usize];
        read(at, &mut bytes).map(|()| bytes)
    };
    (0..size).step_by(PAGE).map(page).collect()
}

fn gone(e: Error) -> View {
    vec![Err(e)]
}

/// Everything that can be read, by name.
pub fn views(engine: &Engine) -> BTreeMap<String, View> {
    let mut all = BTreeMap::new();
    for (volume, _, _) in VOLUMES {
        let v = name(volume);
        let Ok(live) = engine.volume(&v) else {
            continue;
        };
        all.insert(
            format!("{volume}/live"),
            pages(live.size(), |at, buf| live.read_at(at, buf)),
        );
        for info in engine.snapshots(&v).unwrap() {
            let snapshot = engine.open_snapshot(&v, &info.name).unwrap();
            all.insert(
                format!("{volume}@{}", info.name),
                pages(info.size, |at, buf| snapshot.read_at(at, buf)),
            );
        }
        for info in engine.clones(&v).unwrap() {
            let view = match engine.open_clone(&v, &info.name) {
                Ok(clone) => pages(info.size, |at, buf| clone.read_at(at, buf)),
                Err(e) => gone(e),
            };
            all.insert(format!("{volume}/{}", info.name), view);
        }
    }
    all
}

/// What may differ between points, by (from, to).
pub fn diffs(engine: &Engine) -> BTreeMap<String, Vec<std::ops::Range<u64>>> {
    let mut all = BTreeMap::new();
    for (volume, _, _) in VOLUMES {
        let v = name(volume);
        let snapshots = engine.snapshots(&v).unwrap();
        let marks = engine.bookmarks(&v).unwrap();
        let points = snapshots.iter().map(|s| s.name.clone());
        for from in points.chain(marks.into_iter().map(|m| m.name)) {
            if let Ok(diff) = engine.diff(&v, &from, None) {
                all.insert(format!("{volume}@{from}"), diff.changed);
            }
        }
    }
    all
}

/// Does random work; afterwards every kind of record is in the log.
pub fn work(engine: &Engine, chance: &mut Chance, steps: u64, counts: &mut BTreeMap<String, u64>) {
    let mut next = 0;
    for step in 0..steps {
        let (volume, _, _) = VOLUMES[chance.below(2) as usize];
        let v = name(volume);
        let live = engine.volume(&v).unwrap();
        let snapshots = engine.snapshots(&v).unwrap();
        let clones = engine.clones(&v).unwrap();
        let some = |chance: &mut Chance, n: usize| chance.below(n.max(1) as u64) as usize;
        let salt = chance.next() % 1_000_000_000;
        let mut fresh = |what: &str| {
            next += 1;
            name(&format!("{what}{next}-{salt}"))
        };
        let mut did = |what: &str| *counts.entry(what.to_owned()).or_default() += 1;
        let range = |chance: &mut Chance, size: u64| {
            let at = chance.below(size);
            (at, (1 + chance.below(40_000)).min(size - at))
        };
        let bytes = |chance: &mut Chance, len: u64| -> Vec<u8> {
            (0..len).map(|_| chance.next() as u8).collect()
        };
        match if step < 6 { step } else { chance.below(22) } {
            0 | 6..=10 => {
                let (at, len) = range(chance, live.size());
                live.write_at(at, &bytes(chance, len), true).unwrap();
                did("write");
            }
            1 | 11 | 12 if snapshots.len() < 5 => {
                engine.take_snapshots(&[(v, fresh("s"))]).unwrap();
                did("snapshot");
            }
            2 | 13 => {
                let (at, len) = range(chance, live.size());
                live.zero(at, len, Zeroing::Discard).unwrap();
                did("zero");
            }
            3 | 14 if clones.len() < 4 && !snapshots.is_empty() => {
                let of = &snapshots[some(chance, snapshots.len())].name;
                engine.clone_snapshot(&v, of, &fresh("c")).unwrap();
                did("clone");
            }
            4 | 15..=17 if !clones.is_empty() => {
                let of = &clones[some(chance, clones.len())];
                let clone = engine.open_clone(&v, &of.name).unwrap();
                let (at, len) = range(chance, of.size);
                clone.write_at(at, &bytes(chance, len), true).unwrap();
                clone.flush().unwrap();
                did("clone written");
            }
            5 | 18 if !clones.is_empty() && clones.len() < 4 => {
                let of = &clones[some(chance, clones.len())].name;
                engine.clone_clone(&v, of, &fresh("c")).unwrap();
                did("clone of a clone");
            }
            19 if snapshots.len() > 2 => {
                let of = &snapshots[some(chance, snapshots.len())].name;
                match chance.below(2) {
                    0 => engine.delete_snapshot(&v, of).unwrap(),
                    _ => engine.delete_snapshot_keep_bookmark(&v, of).unwrap(),
                }
                did("deletion");
            }
            20 if snapshots.len() > 1 => {
                let of = &snapshots[some(chance, snapshots.len())].name;
                let done = engine.revert_volume(&v, of, &mut |_, _| {}).unwrap();
                did("revert");
                // Its name would be taken the next time.
                let undo = done.undo.name;
                engine.rename_snapshot(&v, &undo, &fresh("s")).unwrap();
            }
            21 => {
                let size = live.size() / 8 * 7 + chance.below(live.size() / 4);
                engine.resize_volume(&v, size).unwrap();
                did("resize");
            }
            _ => {}
        }
        while engine.maintain().unwrap() {}
    }
}

/// A rich store in the simulator, closed, with what was read of it before.
pub struct Stage {
    pub world: SimWorld,
    pub index: MemoryIndexHome,
    pub views: BTreeMap<String, View>,
    pub diffs: BTreeMap<String, Vec<std::ops::Range<u64>>>,
    pub counts: BTreeMap<String, u64>,
}

pub fn env(world: &SimWorld, index: &MemoryIndexHome) -> Environment {
    environment(world, index)
}

pub fn open(world: &SimWorld, index: &MemoryIndexHome) -> Arc<Engine> {
    Engine::open(env(world, index), settings()).unwrap()
}

pub fn add_volumes(engine: &Engine, path: impl Fn(&str) -> String) {
    for (volume, _, grain) in VOLUMES {
        let options = VolumeOptions {
            grain: Grain::new(grain).unwrap(),
            ..VolumeOptions::default()
        };
        engine
            .add_volume(&name(volume), &path(volume), options)
            .unwrap();
    }
}

impl Stage {
    pub fn new(seed: u64, steps: u64) -> Stage {
        let world = SimWorld::new(seed);
        let index = MemoryIndexHome::new();
        let mut chance = Chance(seed);
        for (volume, size, _) in VOLUMES {
            let disk = world.add_disk(volume, size);
            let bytes: Vec<u8> = (0..size).map(|_| chance.next() as u8).collect();
            stillframe::sys::disk::Disk::write_all_at(&*disk, 0, &[&bytes]).unwrap();
            stillframe::sys::disk::Disk::sync_data(&*disk).unwrap();
        }
        Engine::create(&env(&world, &index), &settings()).unwrap();
        let mut counts = BTreeMap::new();
        let engine = open(&world, &index);
        add_volumes(&engine, str::to_owned);
        // Across lives, so that there are links between segments, and CATALOGs.
        work(&engine, &mut chance, steps / 2, &mut counts);
        engine.close().unwrap();
        drop(engine);
        let engine = open(&world, &index);
        work(&engine, &mut chance, steps - steps / 2, &mut counts);
        let (views, diffs) = (views(&engine), diffs(&engine));
        assert!(views.values().flatten().all(Result::is_ok));
        engine.close().unwrap();
        drop(engine);
        Stage {
            world,
            index,
            views,
            diffs,
            counts,
        }
    }

    /// Names of the files in the store, with their sizes.
    pub fn files(&self, dir: &str) -> Vec<(String, u64)> {
        use stillframe::sys::disk::{Dir, Disk};
        let names = self.world.dir(dir).list().unwrap();
        let mut files: Vec<(String, u64)> = names
            .into_iter()
            .filter_map(|n| {
                let path = format!("{dir}/{n}");
                let disk = self.world.disk(&path)?;
                Some((path, disk.size().unwrap()))
            })
            .collect();
        files.sort();
        files
    }
}

/// Compares what is read with what was: pages that answer an error are returned, a wrong byte is a
/// failure.
pub fn compare(
    found: &BTreeMap<String, View>,
    expect: &BTreeMap<String, View>,
    what: &str,
) -> Vec<(String, usize)> {
    let names = |v: &BTreeMap<String, View>| v.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(expect), "{what}");
    let mut failed = Vec::new();
    for (name, view) in found {
        let good = &expect[name];
        for (page, read) in view.iter().enumerate() {
            match (read, good.get(page)) {
                (Ok(read), Some(Ok(good))) => {
                    assert!(read == good, "{what}: {name} page {page} is wrong");
                }
                (Ok(_), _) => panic!("{what}: {name} page {page} was not there"),
                (Err(_), _) => failed.push((name.clone(), page)),
            }
        }
    }
    failed
}
