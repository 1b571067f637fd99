//! Writers, readers, snapshots, deletions and background work at once, on real files.
//!
//! Goal: a snapshot holds, of each page, a write that was under way or newer than the newest one
//! acknowledged before it was taken, and never one issued after it was there; it never changes; and
//! of two dependent writes to two volumes a group has the first if it has the second.
//!
//! Method: each page belongs to one writer, which stamps it with a growing number; what was
//! acknowledged and issued is noted around each write.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set its stage has failed"
)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use stillframe::error::Result;
use stillframe::map::sled_index::SledHome;
use stillframe::sys::clock::SystemClock;
use stillframe::sys::disk::Disk;
use stillframe::sys::file::FileDir;
use stillframe::sys::source::FileSources;
use stillframe::units::Name;
use stillframe::volume::{Engine, Environment, Settings, Snapshot, Sources, Volume, VolumeOptions};

const PAGE: usize = 4096;
const PAGES: u64 = 512;
const WRITERS: u64 = 4;

struct Files;

impl Sources for Files {
    fn open(&self, path: &str) -> Result<Arc<dyn Disk>> {
        FileSources.open(path)
    }
}

fn open(dir: &Path) -> Arc<Engine> {
    let store = dir.join("store");
    let new = !store.exists();
    let file_dir = FileDir::create(&store).unwrap();
    let env = Environment {
        index: Arc::new(SledHome::new(store.join("map"))),
        dir: Arc::new(file_dir),
        sources: Arc::new(Files),
        clock: Arc::new(SystemClock),
    };
    let settings = Settings {
        map_cache_bytes: 1 << 20,
        segment_bytes: 8 << 20,
        checkpoint_bytes: 4 << 20,
        ballast_bytes: 1 << 20,
        ..Settings::default()
    };
    if new {
        Engine::create(&env, &settings).unwrap();
    }
    Engine::open(env, settings).unwrap()
}

fn add(engine: &Engine, dir: &Path, name: &str) -> Arc<Volume> {
    let path = dir.join(format!("{name}.img"));
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(PAGES * PAGE as u64).unwrap();
    let options = VolumeOptions::default();
    engine
        .add_volume(&Name::new(name).unwrap(), path.to_str().unwrap(), options)
        .unwrap()
}

/// A page full of one number: a torn mixture shows.
fn stamp(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(PAGE / 8)
}

fn read_stamp(page: &[u8], what: &str) -> u64 {
    let number = u64::from_le_bytes(page[..8].try_into().unwrap());
    assert!(
        page == stamp(number),
        "{what}: a page holds parts of two writes"
    );
    number
}

fn read_all(snapshot: &Snapshot) -> Vec<u8> {
    let mut bytes = vec![0; snapshot.size() as usize];
    // In odd pieces, so that requests cross pages and runs.
    let mut at = 0;
    for piece in [1 << 20, 65_536, 5000, 700_001].iter().cycle() {
        let end = bytes.len().min(at + piece);
        snapshot.read_at(at as u64, &mut bytes[at..end]).unwrap();
        at = end;
        if at == bytes.len() {
            return bytes;
        }
    }
    unreachable!("the pieces cover everything")
}

struct Board {
    issued: Vec<AtomicU64>,
    acknowledged: Vec<AtomicU64>,
    stop: AtomicBool,
}

fn levels(of: &[AtomicU64]) -> Vec<u64> {
    of.iter().map(|n| n.load(Ordering::SeqCst)).collect()
}

fn write_pages(volume: &Volume, board: &Board, writer: u64) {
    let mut x = writer + 77;
    let mut number = 0_u64;
    while !board.stop.load(Ordering::SeqCst) {
        x = x
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let page = (x >> 33) % (PAGES / WRITERS) * WRITERS + writer;
        number += 1;
        board.issued[page as usize].store(number, Ordering::SeqCst);
        volume
            .write_at(page * PAGE as u64, &stamp(number), false)
            .unwrap();
        board.acknowledged[page as usize].store(number, Ordering::SeqCst);
        if number.is_multiple_of(97) {
            volume.flush().unwrap();
        }
    }
}

/// Takes, checks and deletes snapshots; returns how many.
fn take_and_check(engine: &Engine, board: &Board, until: Instant) -> u64 {
    let volume = Name::new("a").unwrap();
    let mut kept: Vec<(Name, Arc<Snapshot>, Vec<u8>)> = Vec::new();
    let mut taken = 0_u64;
    // As many as a slow machine needs, too.
    while Instant::now() < until || taken <= 10 {
        taken += 1;
        let name = Name::new(&format!("s{taken}")).unwrap();
        let before = levels(&board.acknowledged);
        engine
            .take_snapshots(&[(volume.clone(), name.clone())])
            .unwrap();
        let after = levels(&board.issued);
        let snapshot = engine.open_snapshot(&volume, &name).unwrap();
        let bytes = read_all(&snapshot);
        for (i, page) in bytes.chunks(PAGE).enumerate() {
            let found = read_stamp(page, &format!("{name} page {i}"));
            assert!(
                found >= before[i],
                "{name} page {i}: lost {found} < {}",
                before[i]
            );
            assert!(
                found <= after[i],
                "{name} page {i}: too new, {found} > {}",
                after[i]
            );
        }
        kept.push((name, snapshot, bytes));
        // Every kept one is read again while its blocks are overwritten; some are deleted first.
        if kept.len() > 5 {
            let (name, snapshot, bytes) = kept.remove((taken % 5) as usize);
            if taken.is_multiple_of(2) {
                engine.delete_snapshot(&volume, &name).unwrap();
            }
            assert!(read_all(&snapshot) == bytes, "{name} changed");
            drop(snapshot);
            if !taken.is_multiple_of(2) {
                engine.delete_snapshot(&volume, &name).unwrap();
            }
        }
    }
    for (name, snapshot, bytes) in kept {
        assert!(read_all(&snapshot) == bytes, "{name} changed");
    }
    taken
}

#[test]
fn snapshots_under_load_are_of_one_instant_and_never_change() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let volume = add(&engine, dir.path(), "a");
    let zeros = || (0..PAGES).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
    let board = Arc::new(Board {
        issued: zeros(),
        acknowledged: zeros(),
        stop: AtomicBool::new(false),
    });
    let taken = std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (volume, board) = (Arc::clone(&volume), Arc::clone(&board));
            scope.spawn(move || write_pages(&volume, &board, writer));
        }
        let maintainer = Arc::clone(&board);
        let maintained = Arc::clone(&engine);
        scope.spawn(move || {
            while !maintainer.stop.load(Ordering::SeqCst) {
                maintained.maintain().unwrap();
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let until = Instant::now() + Duration::from_secs(8);
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            take_and_check(&engine, &board, until)
        }));
        board.stop.store(true, Ordering::SeqCst);
        checked
    });
    let taken = taken.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let written: u64 = levels(&board.acknowledged).iter().sum();
    println!("{taken} snapshots while pages reached {written} in sum");
    assert!(taken > 10);
    // What is left is what was written, also after a clean restart.
    engine.close().unwrap();
    drop((engine, volume));
    let engine = open(dir.path());
    let volume = engine.volume(&Name::new("a").unwrap()).unwrap();
    let mut page = vec![0; PAGE];
    for (i, level) in levels(&board.acknowledged).into_iter().enumerate() {
        volume.read_at((i * PAGE) as u64, &mut page).unwrap();
        assert_eq!(read_stamp(&page, "live"), level);
    }
}

#[test]
fn a_group_is_one_instant_across_volumes() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let names: Vec<Name> = ["a", "b", "c"]
        .iter()
        .map(|n| Name::new(n).unwrap())
        .collect();
    let volumes: Vec<_> = ["a", "b", "c"]
        .iter()
        .map(|n| add(&engine, dir.path(), n))
        .collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Dependent writes: the next one is issued after the one before is acknowledged.
            let mut number = 0_u64;
            while !stop.load(Ordering::SeqCst) {
                number += 1;
                for volume in &volumes {
                    volume.write_at(8192, &stamp(number), false).unwrap();
                }
            }
        });
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for round in 0..150 {
                let name = Name::new(&format!("g{round}")).unwrap();
                let targets: Vec<_> = names.iter().map(|v| (v.clone(), name.clone())).collect();
                let infos = engine.take_snapshots(&targets).unwrap();
                assert!(
                    infos
                        .iter()
                        .all(|i| i.group.is_some() && i.group == infos[0].group)
                );
                let mut numbers = Vec::new();
                for volume in &names {
                    let snapshot = engine.open_snapshot(volume, &name).unwrap();
                    let mut page = vec![0; PAGE];
                    snapshot.read_at(8192, &mut page).unwrap();
                    numbers.push(read_stamp(&page, "group"));
                    engine.delete_snapshot(volume, &name).unwrap();
                }
                assert!(
                    numbers.is_sorted_by(|a, b| a >= b),
                    "round {round}: {numbers:?}"
                );
                assert!(numbers[0] - numbers[2] <= 1, "round {round}: {numbers:?}");
            }
        }));
        stop.store(true, Ordering::SeqCst);
        checked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}
