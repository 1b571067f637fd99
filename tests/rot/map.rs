//! The real files of the extent map, damaged in every way: the store opens, every byte is right, and
//! the map is what the log gives.
//!
//! The store itself is a simulated one, so that it can be copied at no cost; the map is sled's, on files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stillframe::map::sled_index::SledHome;
use stillframe::sys::sim::SimWorld;
use stillframe::volume::audit::{self, Severity};
use stillframe::volume::{Engine, Environment, Share};

use crate::rig::{Chance, setting};
use crate::sim::SimSources;
use crate::stage::{VOLUMES, View, add_volumes, compare, settings, views, work};

fn env(world: &SimWorld, map: &Path) -> Environment {
    Environment {
        dir: world.dir("store"),
        index: Arc::new(SledHome::new(map.to_owned())),
        sources: Arc::new(SimSources(world.clone())),
        clock: Arc::new(world.clock()),
    }
}

/// A closed store whose map is in a directory.
struct Scene {
    world: SimWorld,
    map: PathBuf,
    /// The map as it was in the middle of the store's life.
    older: PathBuf,
    views: BTreeMap<String, View>,
}

fn scene(seed: u64, top: &Path) -> Scene {
    let world = SimWorld::new(seed);
    let (map, older) = (top.join("map"), top.join("older"));
    let mut chance = Chance(seed);
    for (volume, size, _) in VOLUMES {
        let disk = world.add_disk(volume, size);
        let bytes: Vec<u8> = (0..size).map(|_| chance.next() as u8).collect();
        stillframe::sys::disk::Disk::write_all_at(&*disk, 0, &[&bytes]).unwrap();
        stillframe::sys::disk::Disk::sync_data(&*disk).unwrap();
    }
    Engine::create(&env(&world, &map), &settings()).unwrap();
    let mut counts = BTreeMap::new();
    for life in 0..3 {
        let engine = Engine::open(env(&world, &map), settings()).unwrap();
        if life == 0 {
            add_volumes(&engine, str::to_owned);
        }
        work(&engine, &mut chance, 50, &mut counts);
        if life == 2 {
            let views = views(&engine);
            engine.close().unwrap();
            return Scene {
                world,
                map,
                older,
                views,
            };
        }
        engine.close().unwrap();
        drop(engine);
        if life == 1 {
            copy(&map, &older);
        }
    }
    unreachable!("the third life returns");
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

fn files(dir: &Path, all: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = fs::read_dir(dir).unwrap().map(Result::unwrap).collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        match entry.file_type().unwrap().is_dir() {
            true => files(&entry.path(), all),
            false => all.push(entry.path()),
        }
    }
}

/// Damages a map in one way and says which.
fn damage(map: &Path, scene: &Scene, other: &Scene, chance: &mut Chance) -> String {
    let mut all = Vec::new();
    files(map, &mut all);
    let file = &all[chance.below(all.len() as u64) as usize];
    let name = file.file_name().unwrap().to_string_lossy().into_owned();
    let mut bytes = fs::read(file).unwrap();
    let len = bytes.len() as u64;
    // Most of sled's file is hole: where content is, is where a flip hits.
    let used: Vec<usize> = (0..bytes.len()).filter(|&i| bytes[i] != 0).collect();
    let spot = |chance: &mut Chance| match used.is_empty() {
        true => 0,
        false => used[chance.below(used.len() as u64) as usize],
    };
    let what = match chance.below(16) {
        0 => {
            fs::remove_dir_all(map).unwrap();
            return "the map is gone".into();
        }
        1 => {
            fs::remove_dir_all(map).unwrap();
            copy(&scene.older, map);
            return "an older map".into();
        }
        2 => {
            fs::remove_dir_all(map).unwrap();
            copy(&other.map, map);
            return "the map of another store".into();
        }
        3 => {
            fs::remove_file(file).unwrap();
            return format!("{name} is gone");
        }
        4 => {
            let cut = chance.below(len.max(1));
            bytes.truncate(cut as usize);
            format!("{name} is cut to {cut}")
        }
        5 if len > 0 => {
            let at = spot(chance);
            let end = (at + 1 + chance.below(8192) as usize).min(bytes.len());
            bytes[at..end].fill(0);
            format!("{name} is zero in {at}..{end}")
        }
        6 if len > 0 => {
            let at = spot(chance);
            let end = (at + 1 + chance.below(600) as usize).min(bytes.len());
            bytes[at..end]
                .iter_mut()
                .for_each(|b| *b = chance.next() as u8);
            format!("{name} is noise in {at}..{end}")
        }
        _ if len > 0 => {
            let at = spot(chance);
            let bit = chance.below(8);
            bytes[at] ^= 1 << bit;
            format!("{name}: byte {at} bit {bit}")
        }
        _ => {
            bytes.extend_from_slice(b"x");
            format!("{name} is longer")
        }
    };
    fs::write(file, bytes).unwrap();
    what
}

#[test]
fn a_damaged_map_is_made_again_and_is_the_same() {
    let rounds = setting("STILLFRAME_MAP_FLIPS", 40);
    let seed = setting("STILLFRAME_FLIPS_SEED", 20_261_121);
    let state = std::env::var_os("STILLFRAME_FLIPS_STATE").map(|mut path| {
        path.push(".map");
        PathBuf::from(path)
    });
    let from: u64 = state
        .as_ref()
        .and_then(|path| fs::read_to_string(path).ok())
        .map_or(0, |text| text.trim().parse().unwrap());
    // With a state file the number is that of the whole campaign.
    let end = if state.is_some() {
        rounds
    } else {
        from + rounds
    };
    println!("seed {seed}, maps {from}..{end}");
    let top = tempfile::tempdir().unwrap();
    let (one, two) = (top.path().join("1"), top.path().join("2"));
    fs::create_dir(&one).unwrap();
    fs::create_dir(&two).unwrap();
    let scene = self::scene(seed, &one);
    let other = self::scene(seed ^ 1, &two);
    let (mut aside, mut noticed) = (0, 0);
    for n in from..end {
        let mut chance = Chance(seed.wrapping_mul(131).wrapping_add(n));
        let dir = top.path().join(format!("run{n}"));
        let map = dir.join("map");
        copy(&scene.map, &map);
        let what = damage(&map, &scene, &other, &mut chance);
        let what = format!("map {n}: {what}");
        let world = scene.world.fork(n);
        if chance.below(2) == 0 {
            let audit = audit::offline(&env(&world, &map), Share::NONE, n);
            let audit = audit.unwrap_or_else(|e| panic!("{what}: {e:?}"));
            noticed += u64::from(audit.findings.iter().any(|f| f.check == "map"));
        }
        let engine = Engine::open(env(&world, &map), settings());
        let engine = engine.unwrap_or_else(|e| panic!("{what}: {e:?}"));
        let failed = compare(&views(&engine), &scene.views, &what);
        assert_eq!(failed, [], "{what}");
        engine
            .maintain()
            .unwrap_or_else(|e| panic!("{what}: {e:?}"));
        engine.close().unwrap_or_else(|e| panic!("{what}: {e:?}"));
        drop(engine);
        let audit = audit::offline(&env(&world, &map), Share::ALL, n).unwrap();
        let mut wrong = audit.findings.iter();
        let wrong: Vec<_> = wrong
            .by_ref()
            .filter(|f| f.severity != Severity::Note)
            .collect();
        assert!(wrong.is_empty(), "{what}: {wrong:#?}");
        aside += u64::from(dir.join("map.damaged-1").exists());
        fs::remove_dir_all(&dir).unwrap();
        if let Some(path) = &state {
            fs::write(path, (n + 1).to_string()).unwrap();
        }
    }
    println!(
        "{aside} of {} maps were set aside, {noticed} noticed by the audit",
        end.saturating_sub(from)
    );
    assert!(
        aside > 0 || end.saturating_sub(from) < 40,
        "no damage mattered"
    );
}

/// The map of an open store rots under it, with work after its last checkpoint: it is made again while
/// it is used, and nobody sees an error.
#[test]
fn a_map_that_rots_while_it_is_used_is_made_again() {
    let mut healed = 0;
    for seed in 0..30 {
        let stage = crate::stage::Stage::new(seed, 120);
        let engine = crate::stage::open(&stage.world, &stage.index);
        let mut chance = Chance(seed);
        let mut counts = BTreeMap::new();
        work(&engine, &mut chance, 10, &mut counts);
        let live = engine.volume(&crate::stage::name("a")).unwrap();
        // Not in the index yet.
        live.write_at(5000, &[7; 9000], true).unwrap();
        let before = views(&engine);
        engine.close().unwrap();
        drop(engine);
        // A cold start, so that pages are read from the index.
        let engine = crate::stage::open(&stage.world, &stage.index);
        engine
            .volume(&crate::stage::name("a"))
            .unwrap()
            .write_at(5000, &[8; 9000], true)
            .unwrap();
        let life = stage.index.opened();
        for n in 0..3 {
            assert!(stage.index.rot(seed * 100 + n));
        }
        let found = views(&engine);
        let mut expect = before;
        expect.insert("a/live".into(), {
            let live = engine.volume(&crate::stage::name("a")).unwrap();
            let page = |at: u64| {
                let mut bytes = vec![0; (live.size() - at).min(4096) as usize];
                live.read_at(at, &mut bytes).map(|()| bytes)
            };
            (0..live.size()).step_by(4096).map(page).collect()
        });
        assert_eq!(compare(&found, &expect, &format!("seed {seed}")), []);
        while engine.maintain().unwrap() {}
        healed += u64::from(stage.index.opened() > life);
        // What nobody has read yet is found by a scrub.
        let options = stillframe::volume::ScrubOptions {
            volume: None,
            percent: 100,
            rate: 0,
            repair: true,
            restart: true,
        };
        let scrubbed = engine.scrub(&options, &mut |_| {}).unwrap();
        assert_eq!(scrubbed.found, 0);
        engine.close().unwrap();
        drop(engine);
        let env = crate::stage::env(&stage.world, &stage.index);
        let audit = audit::offline(&env, Share::ALL, seed).unwrap();
        let mut wrong = audit.findings.iter();
        assert!(
            wrong.all(|f| f.severity == Severity::Note),
            "{seed}: {:#?}",
            audit.findings
        );
    }
    println!("{healed} of 30 were made again while they were used");
    assert!(healed > 5);
}

/// The map is made again and again while the store is written, snapshots come and go and space is freed:
/// nothing that is published meanwhile is lost.
#[test]
fn a_map_is_made_again_while_the_store_is_written() {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    struct End<'a>(&'a AtomicBool);
    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
        }
    }

    const PAGES: u64 = 64;
    let page = |n: u64| [n as u8, (n >> 8) as u8, (n >> 16) as u8, 1].repeat(1024);
    for seed in 0..2 {
        let world = SimWorld::new(seed);
        let top = tempfile::tempdir().unwrap();
        let map = top.path().join("map");
        world.add_disk("a", PAGES * 4096);
        let env = || env(&world, &map);
        // Segments are cut while the log is read, but not all the time.
        let settings = || stillframe::volume::Settings {
            segment_bytes: 4 << 20,
            ..settings()
        };
        Engine::create(&env(), &settings()).unwrap();
        let engine = Engine::open(env(), settings()).unwrap();
        let a = crate::stage::name("a");
        let live = engine
            .add_volume(&a, "a", stillframe::volume::VolumeOptions::default())
            .unwrap();
        let done = AtomicBool::new(false);
        let mut now = vec![vec![0; 4096]; PAGES as usize];
        let mut models = BTreeMap::new();
        let check = |models: &BTreeMap<String, Vec<Vec<u8>>>, what: &str| {
            for (name, model) in models {
                let snapshot = engine.open_snapshot(&a, &crate::stage::name(name)).unwrap();
                for (n, expect) in model.iter().enumerate() {
                    let mut bytes = vec![0; 4096];
                    snapshot.read_at(n as u64 * 4096, &mut bytes).unwrap();
                    assert!(bytes == *expect, "seed {seed} {what} {name} page {n}");
                }
            }
        };
        let made = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let healer = scope.spawn(|| {
                while !done.load(Ordering::Acquire) {
                    engine.rebuild_map().unwrap();
                    made.fetch_add(1, Ordering::AcqRel);
                }
            });
            let keeper = scope.spawn(|| {
                while !done.load(Ordering::Acquire) {
                    engine.maintain().unwrap();
                }
            });
            // Also if it ends by a panic: the others would never end.
            let end = End(&done);
            let mut chance = Chance(seed);
            for step in (1..).take_while(|_| made.load(Ordering::Acquire) < 5) {
                if step % 8 == 1 {
                    let name = format!("s{step}");
                    engine
                        .take_snapshots(&[(a.clone(), crate::stage::name(&name))])
                        .unwrap();
                    models.insert(name, now.clone());
                }
                if models.len() > 6 {
                    let nth = chance.below(models.len() as u64) as usize;
                    let name = models.keys().nth(nth).unwrap().clone();
                    engine
                        .delete_snapshot(&a, &crate::stage::name(&name))
                        .unwrap();
                    models.remove(&name);
                }
                let at = chance.below(PAGES);
                live.write_at(at * 4096, &page(seed * 100_000 + step), true)
                    .unwrap();
                now[at as usize] = page(seed * 100_000 + step);
                if step % 20 == 0 {
                    check(&models, "meanwhile");
                }
            }
            drop(end);
            keeper.join().unwrap();
            healer.join().unwrap();
        });
        check(&models, "after");
        while engine.maintain().unwrap() {}
        check(&models, "freed");
        drop(live);
        drop(engine);
        world.power_cut();
        let engine = Engine::open(env(), settings()).unwrap();
        for (name, model) in &models {
            let snapshot = engine.open_snapshot(&a, &crate::stage::name(name)).unwrap();
            for (n, expect) in model.iter().enumerate() {
                let mut bytes = vec![0; 4096];
                snapshot.read_at(n as u64 * 4096, &mut bytes).unwrap();
                assert!(bytes == *expect, "seed {seed} reopened {name} page {n}");
            }
        }
        engine.close().unwrap();
        drop(engine);
        let audit = audit::offline(&env(), Share::ALL, seed).unwrap();
        let mut wrong = audit.findings.iter();
        assert!(
            wrong.all(|f| f.severity == Severity::Note),
            "{seed}: {:#?}",
            audit.findings
        );
    }
}
