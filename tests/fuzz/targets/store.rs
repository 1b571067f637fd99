//! The valid store that seeds come from: made by the engine on simulated disks, with everything in it that
//! a record can say, and stopped without a word.

use std::sync::{Arc, OnceLock};

use stillframe::error::{Error, Kind, Result};
use stillframe::log::keys::Keys;
use stillframe::log::superblock::{Superblock, SuperblockFile};
use stillframe::map::memory::MemoryIndexHome;
use stillframe::sys::disk::{Dir, Disk};
use stillframe::sys::sim::SimWorld;
use stillframe::units::{Grain, Name};
use stillframe::volume::{Engine, Environment, Settings, Sources, VolumeOptions, Zeroing};

/// A store as a kill left it.
pub struct Valid {
    pub world: SimWorld,
    pub superblock: Superblock,
    pub keys: Keys,
    /// Key and value pairs of its extent map.
    pub pairs: Vec<(Vec<u8>, Vec<u8>)>,
}

struct SimSources(SimWorld);

impl Sources for SimSources {
    fn open(&self, path: &str) -> Result<Arc<dyn Disk>> {
        let disk = self.0.disk(path);
        let disk = disk.ok_or_else(|| Error::new(Kind::NotFound, format!("no {path}")))?;
        Ok(disk)
    }
}

/// What an engine needs to live in a simulated machine.
pub fn environment(world: &SimWorld, index: &MemoryIndexHome) -> Environment {
    Environment {
        dir: world.dir("store"),
        index: Arc::new(index.clone()),
        sources: Arc::new(SimSources(world.clone())),
        clock: Arc::new(world.clock()),
    }
}

/// Small segments, no ballast.
pub fn settings() -> Settings {
    Settings {
        segment_bytes: 1 << 20,
        ballast_bytes: 0,
        ..Settings::default()
    }
}

pub fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn work(engine: &Engine, step: u8) {
    let vm = engine.volume(&name("vm")).unwrap();
    let odd = engine.volume(&name("odd")).unwrap();
    vm.write_at(u64::from(step) * 4096, &[step; 6000], false)
        .unwrap();
    vm.zero(40_000, 9000, Zeroing::Discard).unwrap();
    odd.write_at(100, &[step; 300], false).unwrap();
}

fn make() -> Valid {
    let world = SimWorld::new(7);
    let index = MemoryIndexHome::new();
    let open = || Engine::open(environment(&world, &index), settings()).unwrap();
    Engine::create(&environment(&world, &index), &settings()).unwrap();
    let mut engine = open();
    for (volume, size, grain) in [("vm", 256 << 10, 4096), ("odd", 20_777, 8192)] {
        let path = format!("sources/{volume}");
        world.add_disk(&path, size);
        let options = VolumeOptions {
            grain: Grain::new(grain).unwrap(),
            on_full_wait_s: 0,
            ..VolumeOptions::default()
        };
        engine.add_volume(&name(volume), &path, options).unwrap();
    }
    let (vm, odd) = (name("vm"), name("odd"));
    work(&engine, 1);
    engine
        .take_snapshots(&[(vm.clone(), name("a")), (odd.clone(), name("a"))])
        .unwrap();
    work(&engine, 2);
    engine.take_snapshots(&[(vm.clone(), name("b"))]).unwrap();
    engine.hold_snapshot(&vm, &name("b"), true).unwrap();
    work(&engine, 3);
    engine.clone_snapshot(&vm, &name("a"), &name("c")).unwrap();
    let clone = engine.open_clone(&vm, &name("c")).unwrap();
    clone.write_at(8192, &[9; 5000], false).unwrap();
    engine.clone_clone(&vm, &name("c"), &name("d")).unwrap();
    clone.write_at(0, &[8; 100], false).unwrap();
    engine.clone_empty(&odd, &name("e")).unwrap();
    engine.take_snapshots(&[(vm.clone(), name("old"))]).unwrap();
    work(&engine, 4);
    engine
        .delete_snapshot_keep_bookmark(&vm, &name("old"))
        .unwrap();
    engine
        .rename_snapshot(&odd, &name("a"), &name("first"))
        .unwrap();
    drop(clone);
    // A second segment, a BITMAP or two, and a map that is durable.
    engine.close().unwrap();
    engine = open();
    engine.resize_volume(&odd, 40_000).unwrap();
    engine.take_snapshots(&[(odd.clone(), name("z"))]).unwrap();
    work(&engine, 5);
    engine
        .revert_volume(&odd, &name("z"), &mut |_, _| {})
        .unwrap();
    engine.delete_snapshot(&vm, &name("a")).unwrap();
    engine.take_snapshots(&[(vm.clone(), name("y"))]).unwrap();
    work(&engine, 6);
    world.kill();
    let mut pairs = Vec::new();
    index.tamper(|all| pairs.extend(all.iter().map(|(k, v)| (k.clone(), v.clone()))));
    let file = SuperblockFile::open(&*world.dir("store")).unwrap();
    let superblock = file.current().clone();
    let keys = Keys::derive(&superblock.secret, superblock.store);
    Valid {
        world,
        superblock,
        keys,
        pairs,
    }
}

/// The store; the same for every call and every process.
pub fn valid() -> &'static Valid {
    static VALID: OnceLock<Valid> = OnceLock::new();
    VALID.get_or_init(make)
}

/// The segments of the store: number and content.
pub fn segments() -> Vec<(u32, Vec<u8>)> {
    let valid = valid();
    let dir = valid.world.dir("store/log");
    let names = dir.list().unwrap();
    let numbers = names
        .iter()
        .filter_map(|n| stillframe::log::segment::number(n));
    let mut numbers: Vec<u32> = numbers.collect();
    numbers.sort_unstable();
    let read = |n| valid.world.peek(&format!("store/log/{n:06}.seg")).unwrap();
    numbers.into_iter().map(|n| (n, read(n))).collect()
}
