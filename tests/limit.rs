//! A limit for the thin target, and the forecast of when it is full.
//!
//! In the simulator, where the disk itself has all the space in the world, and on a real daemon with
//! `--limit`. Shown: preserved content stays below the limit, refused writes change nothing, whatever
//! needs no payload gets through at the limit, space that is given back can be used again, the overlays
//! of clones count, and the forecast says what was measured and nothing before.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use stillframe::error::{Error, Kind, Result};
use stillframe::map::memory::MemoryIndexHome;
use stillframe::sys::disk::{Dir, Disk, Open};
use stillframe::sys::sim::SimWorld;
use stillframe::units::Name;
use stillframe::volume::{
    Engine, Environment, OnFull, Settings, SnapshotState, Sources, VolumeOptions,
};

use rig::{Chance, Rig};

const MIB: u64 = 1 << 20;
const LIMIT: u64 = 6 * MIB;
const SIZE: u64 = 16 * MIB;
const GRAIN: u64 = 4096;
const MINUTE_NS: i64 = 60_000_000_000;

struct SimSources(SimWorld);

impl Sources for SimSources {
    fn open(&self, path: &str) -> Result<Arc<dyn Disk>> {
        let none = || Error::new(Kind::NotFound, format!("no {path}"));
        Ok(self.0.disk(path).ok_or_else(none)?)
    }
}

fn n(name: &str) -> Name {
    Name::new(name).unwrap()
}

struct Store {
    world: SimWorld,
    index: MemoryIndexHome,
    engine: Arc<Engine>,
    content: Vec<u8>,
}

impl Store {
    fn new(on_full: OnFull) -> Store {
        let (world, index) = (SimWorld::new(7), MemoryIndexHome::new());
        let env = Store::environment(&world, &index);
        let settings = Store::settings(Some(LIMIT));
        Engine::create(&env, &settings).unwrap();
        let engine = Engine::open(env, settings).unwrap();
        let mut chance = Chance(9);
        let words = (0..SIZE / 8).map(|_| chance.next().to_le_bytes());
        let content: Vec<u8> = words.flatten().collect();
        world
            .add_disk("src/v", SIZE)
            .write_all_at(0, &[&content])
            .unwrap();
        let options = VolumeOptions {
            on_full,
            on_full_wait_s: 0,
            ..VolumeOptions::default()
        };
        engine.add_volume(&n("v"), "src/v", options).unwrap();
        Store {
            world,
            index,
            engine,
            content,
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

    fn settings(limit_bytes: Option<u64>) -> Settings {
        Settings {
            segment_bytes: MIB,
            ballast_bytes: 0,
            limit_bytes,
            ..Settings::default()
        }
    }

    fn take(&self, name: &str) {
        self.engine.take_snapshots(&[(n("v"), n(name))]).unwrap();
    }

    fn delete(&self, name: &str) {
        self.engine.delete_snapshot(&n("v"), &n(name)).unwrap();
    }

    /// Inverts grains from one on until one is refused; returns that one.
    fn write_from(&mut self, first: u64) -> u64 {
        let volume = self.engine.volume(&n("v")).unwrap();
        for grain in first..SIZE / GRAIN {
            let span = (grain * GRAIN) as usize..((grain + 1) * GRAIN) as usize;
            let new: Vec<u8> = self.content[span.clone()].iter().map(|b| !b).collect();
            match volume.write_at(grain * GRAIN, &new, false) {
                Ok(()) => self.content[span].copy_from_slice(&new),
                Err(e) => {
                    assert_eq!(e.kind(), Kind::NoSpace, "{}", e.chain());
                    return grain;
                }
            }
        }
        SIZE / GRAIN
    }

    fn snapshot(&self, name: &str) -> Vec<u8> {
        let mut bytes = vec![0; SIZE as usize];
        let snapshot = self.engine.open_snapshot(&n("v"), &n(name)).unwrap();
        snapshot.read_at(0, &mut bytes).unwrap();
        bytes
    }

    fn live(&self) -> Vec<u8> {
        let mut bytes = vec![0; SIZE as usize];
        let volume = self.engine.volume(&n("v")).unwrap();
        volume.read_at(0, &mut bytes).unwrap();
        bytes
    }
}

#[test]
fn preserved_content_stays_below_the_limit_and_the_rest_gets_through() {
    let mut store = Store::new(OnFull::FailWrite);
    store.take("a");
    let old = store.content.clone();
    let refused = store.write_from(0);
    assert!(refused > 600, "refused grain {refused} already");
    assert!(refused < SIZE / GRAIN, "nothing was refused");
    let thin = store.engine.thin().unwrap();
    assert_eq!(thin.limit, Some(LIMIT));
    assert!(thin.used <= LIMIT, "{thin:?}");
    assert!(thin.used > LIMIT - 2 * MIB, "refused too early: {thin:?}");
    assert_eq!(thin.free, LIMIT - thin.used);
    assert!(store.snapshot("a") == old && store.live() == store.content);

    // What is preserved can be written on, and what needs no payload gets through.
    let volume = store.engine.volume(&n("v")).unwrap();
    volume.write_at(0, &[1; 8192], false).unwrap();
    store.content[..8192].fill(1);
    for i in 0..40 {
        let name = format!("s{i}");
        store.take(&name);
        let held = |held| store.engine.hold_snapshot(&n("v"), &n(&name), held);
        held(true).unwrap();
        held(false).unwrap();
        let other = n(&format!("t{i}"));
        let done = store.engine.rename_snapshot(&n("v"), &n(&name), &other);
        done.unwrap();
    }
    let used = store.engine.thin().unwrap().used;
    assert!(used < LIMIT + MIB, "records took {used}");
    for i in 0..40 {
        store.delete(&format!("t{i}"));
    }
    assert!(store.snapshot("a") == old && store.live() == store.content);

    // Space that is given back can be used again.
    store.delete("a");
    while store.engine.maintain().unwrap() {}
    store.take("b");
    let old = store.content.clone();
    assert!(store.write_from(refused) > refused + 600);
    assert!(store.snapshot("b") == old && store.live() == store.content);
}

#[test]
fn at_the_limit_the_other_policy_fails_snapshots() {
    let mut store = Store::new(OnFull::FailSnapshot);
    store.take("a");
    assert_eq!(store.write_from(0), SIZE / GRAIN, "a write was refused");
    let state = store.engine.snapshot(&n("v"), &n("a")).unwrap().state;
    assert!(matches!(state, SnapshotState::Failed(_)), "{state:?}");
    assert!(store.live() == store.content);
}

/// A long write is done in aligned pieces: those before the refused one are there, of it nothing is.
#[test]
fn a_write_is_refused_by_whole_pieces() {
    for at in [0, 5 * GRAIN] {
        let store = Store::new(OnFull::FailWrite);
        store.take("a");
        let old = store.content.clone();
        let new: Vec<u8> = old[at as usize..].iter().map(|b| !b).collect();
        let volume = store.engine.volume(&n("v")).unwrap();
        let refused = volume.write_at(at, &new, false).unwrap_err();
        assert_eq!(refused.kind(), Kind::NoSpace);
        let live = store.live();
        let changed = |grain: u64| {
            let span = (grain * GRAIN) as usize..((grain + 1) * GRAIN) as usize;
            live[span.clone()] != old[span]
        };
        let first = at / GRAIN;
        let end = (first..SIZE / GRAIN).find(|&g| !changed(g)).unwrap();
        assert!(end > 2 * MIB / GRAIN, "refused at grain {end}");
        assert_eq!(end * GRAIN % MIB, 0, "a whole number of pieces");
        assert!((end..SIZE / GRAIN).all(|g| !changed(g)));
        assert!(live[at as usize..(end * GRAIN) as usize] == new[..(end * GRAIN - at) as usize]);
        assert!(store.snapshot("a") == old);
    }
}

/// Space that nobody needs any more is given back to a writer before he is refused, also if his
/// volume does not wait.
#[test]
fn what_can_be_reclaimed_is_reclaimed_before_a_write_is_refused() {
    let mut store = Store::new(OnFull::FailWrite);
    store.take("a");
    let refused = store.write_from(0);
    assert!(refused < SIZE / GRAIN);
    store.delete("a");
    store.take("b");
    // Nobody calls `maintain`.
    assert!(store.write_from(refused) > refused + 600);
}

/// Only the snapshots that need the piece fail, and it stays so.
#[test]
fn a_snapshot_that_does_not_need_the_piece_lives() {
    let mut store = Store::new(OnFull::FailSnapshot);
    let old = store.content.clone();
    store.take("a");
    let volume = store.engine.volume(&n("v")).unwrap();
    // More than what may be written ahead.
    let part = 2 * MIB as usize;
    volume.write_at(0, &vec![7; part], false).unwrap();
    store.take("b");
    let (v, part_of_b) = (n("v"), vec![7; part]);
    for (of, name) in [("a", "of-a"), ("b", "of-b")] {
        let made = store.engine.clone_snapshot(&v, &n(of), &n(name));
        made.unwrap();
        let clone = store.engine.open_clone(&v, &n(name)).unwrap();
        clone.write_at(0, &[6; 4096], false).unwrap();
        let mut bytes = vec![0; part];
        clone.read_at(0, &mut bytes).unwrap();
        assert!(of == "a" || bytes[4096..] == part_of_b[4096..]);
        clone.flush().unwrap();
    }
    let clones = store.world.dir("store").subdir("clones", true).unwrap();
    let overlay = clones.open("999.data", Open::Create).unwrap();
    let all = vec![1; LIMIT as usize];
    overlay.write_all_at(0, &[&all]).unwrap();
    volume.write_at(0, &vec![8; part], false).unwrap();
    volume.flush().unwrap();
    drop(volume);
    clones.remove("999.data").unwrap();
    for round in ["at once", "after a kill", "after a power cut"] {
        let state = |name| store.engine.snapshot(&n("v"), &n(name)).unwrap().state;
        assert_eq!(state("a"), SnapshotState::Active, "{round}");
        assert!(matches!(state("b"), SnapshotState::Failed(_)), "{round}");
        assert!(store.snapshot("a") == old, "{round}");
        assert!(store.live()[..part].iter().all(|&b| b == 8), "{round}");
        a_clone_fails_with_its_snapshot(&store.engine, round);
        match round {
            "at once" => store.world.kill(),
            _ => store.world.power_cut(),
        }
        store.index.kill(1);
        let env = Store::environment(&store.world, &store.index);
        store.engine = Engine::open(env, Store::settings(None)).unwrap();
    }
}

fn a_clone_fails_with_its_snapshot(engine: &Engine, round: &str) {
    let v = n("v");
    for (name, lost) in [("of-a", false), ("of-b", true)] {
        let clone = engine.open_clone(&v, &n(name)).unwrap();
        let state = clone.info().state;
        assert_eq!(matches!(state, SnapshotState::Failed(_)), lost, "{round}");
        let mut bytes = [0; 4096];
        clone.read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes, [6; 4096], "what was written to it");
        let expected = if lost { Err(Kind::Failed) } else { Ok(()) };
        for at in [4096, 8192, SIZE - 4096] {
            let read = clone.read_at(at, &mut bytes).map_err(|e| e.kind());
            assert_eq!(read, expected, "{round} {name} {at}");
        }
        // Of a grain in which the rest is the snapshot's.
        let written = clone.write_at(16_384 + 5, &[1], false);
        let refused = written.map_err(|e| e.kind());
        assert!(!lost || refused == expected, "{round}: {refused:?}");
        if lost {
            let copied = engine.clone_clone(&v, &n(name), &n("copy"));
            assert_eq!(copied.unwrap_err().kind(), Kind::Failed, "{round}");
            let copied = engine.clone_snapshot(&v, &n("b"), &n("copy"));
            assert_eq!(copied.unwrap_err().kind(), Kind::Failed, "{round}");
        }
    }
}

#[test]
fn the_overlays_of_clones_count() {
    let mut store = Store::new(OnFull::FailWrite);
    let before = store.engine.thin().unwrap().used;
    let clones = store.world.dir("store").subdir("clones", true).unwrap();
    let overlay = clones.open("7.data", Open::Create).unwrap();
    overlay.write_all_at(0, &[&vec![1; 4 << 20]]).unwrap();
    let after = store.engine.thin().unwrap().used;
    assert_eq!(after - before, 4 * MIB);
    store.take("a");
    let refused = store.write_from(0);
    assert!(refused < 300, "{refused} grains went beside the clone");
    assert!(store.engine.thin().unwrap().used <= LIMIT);
}

/// A clone's writer is refused, whatever the volume's policy says, after the wait and after what can be
/// reclaimed was; how long a wait is, `tests/full.rs` shows.
#[test]
fn a_clone_without_space_disturbs_nobody() {
    let mut store = Store::new(OnFull::FailSnapshot);
    store.take("a");
    let (old, v) = (store.content.clone(), n("v"));
    store.write_from(SIZE / GRAIN - 200);
    store.take("b");
    store.engine.clone_snapshot(&v, &n("a"), &n("c")).unwrap();
    let clone = store.engine.open_clone(&v, &n("c")).unwrap();
    let mut refused = None;
    for grain in 0..SIZE / GRAIN {
        let Err(e) = clone.write_at(grain * GRAIN, &[6; GRAIN as usize], false) else {
            continue;
        };
        assert_eq!(e.kind(), Kind::NoSpace, "{}", e.chain());
        refused = Some(grain);
        break;
    }
    let refused = refused.expect("a clone fills the store, too");
    assert!(refused > 100, "{refused}");
    for name in ["a", "b"] {
        let state = store.engine.snapshot(&v, &n(name)).unwrap().state;
        assert_eq!(state, SnapshotState::Active, "{name}");
    }
    assert!(store.snapshot("a") == old && store.live() == store.content);
    let mut bytes = vec![0; SIZE as usize];
    clone.read_at(0, &mut bytes).unwrap();
    let written = (refused * GRAIN) as usize;
    assert!(bytes[..written].iter().all(|&b| b == 6));
    assert!(bytes[written..] == old[written..]);
    // Another clone goes; nobody calls `maintain`.
    let engine = &store.engine;
    engine.clone_snapshot(&v, &n("b"), &n("d")).unwrap();
    drop(clone);
    engine.delete_clone(&v, &n("c")).unwrap();
    let clone = engine.open_clone(&v, &n("d")).unwrap();
    for grain in 0..100 {
        let done = clone.write_at(grain * GRAIN, &[6; GRAIN as usize], false);
        done.unwrap_or_else(|e| panic!("grain {grain}: {}", e.chain()));
    }
}

/// What does not fit below the limit is not begun.
#[test]
fn a_revert_beyond_the_limit_is_refused_before_it_begins() {
    let mut store = Store::new(OnFull::FailWrite);
    store.take("a");
    store.write_from(0);
    let mut none = |_: u64, _: u64| panic!("it has begun");
    let refused = store.engine.revert_volume(&n("v"), &n("a"), &mut none);
    assert_eq!(refused.unwrap_err().kind(), Kind::NoSpace);
    let left = store.engine.snapshots(&n("v")).unwrap();
    assert!(left.len() == 1 && store.live() == store.content);
}

#[test]
fn a_limit_belongs_to_the_run_not_to_the_store() {
    let mut store = Store::new(OnFull::FailWrite);
    store.take("a");
    let old = store.content.clone();
    let refused = store.write_from(0);
    store.engine.close().unwrap();
    let env = Store::environment(&store.world, &store.index);
    store.engine = Engine::open(env, Store::settings(None)).unwrap();
    assert_eq!(store.engine.thin().unwrap().limit, None);
    assert_eq!(store.write_from(refused), SIZE / GRAIN);
    assert!(store.snapshot("a") == old && store.live() == store.content);
}

#[test]
fn the_forecast_is_what_was_measured() {
    let store = Store::new(OnFull::FailWrite);
    store.take("a");
    store.engine.maintain().unwrap();
    let growth = || store.engine.thin().unwrap().growth;
    assert_eq!(growth(), None, "known before anything was seen");
    // Six minutes with 64 grains each, ten times an hour's worth.
    for minute in 0..6 {
        store.world.advance(MINUTE_NS);
        let volume = store.engine.volume(&n("v")).unwrap();
        for grain in 0..64 {
            let at = (minute * 64 + grain) * GRAIN;
            volume.write_at(at, &[9; 4096], false).unwrap();
        }
        store.engine.maintain().unwrap();
    }
    let thin = store.engine.thin().unwrap();
    let growth = thin.growth.unwrap();
    // Each grain also has a commit block, as they come one by one.
    let least = 10 * 6 * 64 * GRAIN as i64;
    assert!((least..3 * least).contains(&growth), "{growth} an hour");
    assert_eq!(thin.measured_s, 360);
    let left = thin.full_in_s.unwrap();
    assert_eq!(left, thin.free * 3600 / growth as u64);

    // It shrinks: there is nothing to foretell.
    store.delete("a");
    store.world.advance(MINUTE_NS);
    while store.engine.maintain().unwrap() {}
    for _ in 0..65 {
        store.world.advance(MINUTE_NS);
        store.engine.maintain().unwrap();
    }
    let thin = store.engine.thin().unwrap();
    assert!(thin.growth.unwrap() <= 0, "{thin:?}");
    assert_eq!(thin.full_in_s, None);
    // A clock that was set back spoils nothing.
    store.world.advance(-100 * MINUTE_NS);
    store.engine.maintain().unwrap();
    assert_eq!(store.engine.thin().unwrap().growth, None);
}

/// Bytes in all and bytes free, as `statfs` shows them.
fn shown(path: &std::path::Path) -> (u64, u64) {
    let path = path.to_str().unwrap();
    let shown = rig::must("stat", &["-f", "-c", "%S %b %a", path]);
    let numbers: Vec<u64> = shown
        .split_whitespace()
        .map(|n| n.parse().unwrap())
        .collect();
    (numbers[0] * numbers[1], numbers[0] * numbers[2])
}

#[test]
fn statfs_shows_what_the_limit_has_left() {
    if !rig::can_mount() {
        return;
    }
    let mut rig = Rig::new();
    let source = rig.source("v", SIZE);
    fs::write(&source, vec![1; SIZE as usize]).unwrap();
    let volume = format!("v={}", source.to_str().unwrap());
    let limit = ["--limit", "64M", "--segment-size", "1M"];
    rig.mount_with(&[&limit[..], &["--volume", &volume]].concat());
    let live = rig.live("v");
    let snapshot = rig.snapshot("v", "a");
    rig::touch(&snapshot).unwrap();
    // What is shown may be a second old.
    let used = |rig: &Rig| -> u64 {
        let report: serde_json::Value =
            serde_json::from_str(&rig.ok(&["status", "--json"])).unwrap();
        report["thin"]["used"].as_u64().unwrap()
    };
    let agrees = |what: &str| {
        rig::eventually(what, || {
            shown(&live) == (64 * MIB, 64 * MIB - used(&rig).next_multiple_of(4096))
        });
        shown(&live).1
    };
    let before = agrees("the free space at first");
    let file = fs::OpenOptions::new().write(true).open(&live).unwrap();
    file.write_all_at(&vec![7; 12 << 20], 0).unwrap();
    let fallen = agrees("the free space after preserving");
    assert!(fallen + 11 * MIB < before, "{fallen}, {before} before");
    fs::remove_file(&snapshot).unwrap();
    rig::eventually("the space of what was preserved is free again", || {
        shown(&live).1 > fallen + 8 * MIB && used(&rig) + 8 * MIB < 64 * MIB - fallen
    });
    drop(file);
    rig.umount();
    // A limit that the filesystem cannot reach shows the filesystem.
    rig.mount_with(&["--limit", "1000T"]);
    assert_eq!(shown(&rig.live("v")).0, shown(&rig.store()).0);
    rig.umount();
}

#[test]
fn a_daemon_keeps_its_limit_and_says_so() {
    if !rig::can_mount() {
        return;
    }
    let mut rig = Rig::new();
    let source = rig.source("v", SIZE);
    let mut chance = Chance(3);
    let words = (0..SIZE / 8).map(|_| chance.next().to_le_bytes());
    let content: Vec<u8> = words.flatten().collect();
    fs::write(&source, &content).unwrap();
    let volume = format!("v={}", source.to_str().unwrap());
    let args = [
        "--limit",
        "6M",
        "--segment-size",
        "1M",
        "--on-full-wait",
        "0",
    ];
    rig.mount_with(&[&args[..], &["--volume", &volume]].concat());
    rig::touch(&rig.snapshot("v", "a")).unwrap();
    let live = fs::OpenOptions::new()
        .write(true)
        .open(rig.live("v"))
        .unwrap();
    let refused =
        (0..SIZE / GRAIN).find(
            |grain| match live.write_at(&[7; GRAIN as usize], grain * GRAIN) {
                Ok(_) => false,
                Err(e) => {
                    assert_eq!(e.raw_os_error(), Some(libc::ENOSPC));
                    true
                }
            },
        );
    assert!(refused.is_some_and(|grain| grain > 600), "{refused:?}");
    let report: serde_json::Value = serde_json::from_str(&rig.ok(&["status", "--json"])).unwrap();
    let thin = &report["thin"];
    assert_eq!(thin["limit"], 6 * MIB);
    assert!(thin["used"].as_u64().unwrap() <= 6 * MIB, "{thin}");
    assert!(thin["growth_per_hour"].is_null(), "{thin}");
    let text = rig.ok(&["status"]);
    assert!(text.contains("limit 6.0M"), "{text}");
    let metrics = fs::read_to_string(rig.mnt().join(".stillframe/metrics.prom")).unwrap();
    assert!(
        metrics.contains("\nstillframe_thin_limit_bytes 6291456\n"),
        "{metrics}"
    );
    assert!(fs::read(rig.snapshot("v", "a")).unwrap() == content);

    rig::touch(&rig.snapshot("v", "b")).unwrap();
    for name in ["a", "b"] {
        fs::remove_file(rig.snapshot("v", name)).unwrap();
    }
    // Another size of segments is for new stores, and that is said.
    drop(live);
    rig.umount();
    let said = rig.mount_with(&["--segment-size", "2M"]);
    assert!(said.contains("segments keep their size"), "{said}");
    let live = fs::OpenOptions::new()
        .write(true)
        .open(rig.live("v"))
        .unwrap();
    rig::touch(&rig.snapshot("v", "c")).unwrap();
    live.write_at(&[8; 1 << 20], 8 << 20).unwrap();
    drop(live);
    rig.umount();
    // A segment size that no store can have is refused, and nothing is made.
    let mut other = Rig::new();
    let source = other.source("w", MIB);
    let volume = format!("w={}", source.to_str().unwrap());
    let mnt = other.mnt();
    let bad = [
        "mount",
        mnt.to_str().unwrap(),
        "--volume",
        &volume,
        "--segment-size",
        "5K",
    ];
    let refused = other.run(&bad);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    other.mount_with(&["--volume", &volume]);
    other.umount();
}
