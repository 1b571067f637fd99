//! How long a store with many extents takes to serve again after its daemon was killed.
//!
//! Measured: from the start of `stillframe mount` until a snapshot can be looked at and a preserved grain
//! of it was read and is right. Every start follows a new SIGKILL of the real daemon. The sync of the
//! source, which recovery does as well, is not in it: it depends on what others left in the page cache,
//! so the source is synced before, and what that took is printed beside.
//!
//! The store: a source of 8 KiB for each extent, of which every second grain was overwritten once, in eight
//! epochs that lie mixed in every region, so that each is an extent of its own with its payload in the log.
//! Three states at the kill:
//!
//! - *checkpoint*: nothing is outstanding;
//! - *preserved*: about all of the log that may lie behind a checkpoint (nearly 96 MiB: two segments,
//!   of which the first counts half, see `checkpoint_due` in `volume/reclaim.rs`), of first overwrites;
//! - *zeros*: the same of first overwrites of single grains of zeros, whose records have no payload: most records
//!   in as much log.
//!
//! Each with a warm page cache and (for root) an empty one. What is outstanding is not assumed but read from
//! the store between the kill and the start, from a copy of the map and with a scan of the log.
//!
//! | variable | meaning |
//! | --- | --- |
//! | `STILLFRAME_RECOVERY_EXTENTS` | extents, 20,000 by default, with less outstanding (from 500,000 on it is all); a million needs 20 GB of disk and minutes |
//! | `STILLFRAME_RECOVERY_ROUNDS` | starts of each kind, 3 by default |
//! | `STILLFRAME_RECOVERY_ONLY` | one of the three names: that state only |
//!
//! Nothing is left behind, also when it fails. It promises no time: it prints them.

#![allow(clippy::unwrap_used, reason = "a measurement fails by panicking")]

#[path = "../tests/rig/mod.rs"]
mod rig;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use stillframe::log::keys::Keys;
use stillframe::log::record::RecordType;
use stillframe::log::scan::{Event, Scan};
use stillframe::log::superblock::slots;
use stillframe::map::ExtentMap;
use stillframe::map::index::IndexHome;
use stillframe::map::sled_index::SledHome;
use stillframe::sys::disk::Dir;
use stillframe::sys::file::FileDir;

use rig::{PATIENCE, Rig, can_mount, setting, touch};

const GRAIN: usize = 4096;
const PIECE: u64 = 1 << 20;
/// Extents that one write of a piece makes.
const EXTENTS: u64 = PIECE / (2 * GRAIN as u64);
const EPOCHS: u64 = 8;
const WRITERS: u64 = 8;
/// What the grains that are never changed hold.
const STILL: u8 = 0x5a;
/// What the others hold before the first snapshot.
const FIRST: u8 = 1;
/// Pieces whose first overwrites fill nearly as much log as may be outstanding.
const PRESERVED: u64 = 170;
/// The same of first overwrites of zeros.
const ZEROS: u64 = 8200;
/// Instead of both, in a small store.
const SMALL: u64 = 30;
/// A store from which on the outstanding log is of full size.
const FULL: u64 = 500_000;

/// What is outstanding when the daemon is killed.
#[derive(Clone, Copy, PartialEq)]
enum State {
    Checkpoint,
    Preserved,
    Zeros,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            State::Checkpoint => "checkpoint",
            State::Preserved => "preserved",
            State::Zeros => "zeros",
        }
    }
}

/// What a start has to take in.
struct Outstanding {
    bytes: u64,
    batches: u64,
    records: u64,
}

struct Bench {
    rig: Rig,
    pieces: u64,
    full: bool,
    /// Written into the changing grains; another one each time.
    value: u8,
}

fn main() {
    // What cargo passes to every benchmark says nothing here.
    if !can_mount() {
        return;
    }
    let extents = setting("STILLFRAME_RECOVERY_EXTENTS", 20_000);
    let rounds = setting("STILLFRAME_RECOVERY_ROUNDS", 3).max(1);
    let begin = Instant::now();
    let mut bench = Bench::new(extents);
    println!(
        "store: {} extents in {EPOCHS} epochs, map of {} MiB, made in {:.0?}; load {}",
        bench.extents(),
        size_of_dir(&bench.rig.store().join("map")) >> 20,
        begin.elapsed(),
        load()
    );
    println!(
        "| outstanding | page cache | n | median ms | min | max | MiB of log | batches | records | source's sync ms |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    let only = std::env::var("STILLFRAME_RECOVERY_ONLY").ok();
    let states = [State::Checkpoint, State::Preserved, State::Zeros];
    let wanted = |state: &State| only.as_deref().is_none_or(|name| name == state.name());
    assert!(states.iter().any(wanted), "no state is called {only:?}");
    for state in states.into_iter().filter(wanted) {
        for cold in [false, true] {
            if cold && !can_drop() {
                println!(
                    "| {} | empty | not measured: needs root | | | | | | | |",
                    state.name()
                );
                continue;
            }
            bench.measure(state, cold, rounds);
        }
    }
    bench.rig.mount();
    bench.rig.umount();
    println!("load {}; all in {:.0?}", load(), begin.elapsed());
}

impl Bench {
    /// Makes the store, and stops it cleanly.
    fn new(extents: u64) -> Bench {
        let pieces = extents.div_ceil(EXTENTS).max(EPOCHS);
        let rig = Rig::new();
        let source = rig.source("disk.img", pieces * PIECE);
        let content = piece(FIRST);
        let file = OpenOptions::new().write(true).open(&source).unwrap();
        (0..pieces).for_each(|at| file.write_all_at(&content, at * PIECE).unwrap());
        file.sync_all().unwrap();
        let full = extents >= FULL;
        let mut bench = Bench {
            rig,
            pieces,
            full,
            value: FIRST,
        };
        let zeros = bench.rig.source("zeros.img", bench.zeros() * PIECE);
        let volumes = [("disk", source), ("zeros", zeros)];
        let named = volumes.map(|(name, path)| format!("{name}={}", path.display()));
        bench
            .rig
            .mount_with(&["--volume", &named[0], "--volume", &named[1]]);
        for epoch in 0..EPOCHS {
            touch(&bench.rig.snapshot("disk", &format!("e{epoch}"))).unwrap();
            let mixed: Vec<u64> = (epoch..pieces).step_by(EPOCHS as usize).collect();
            bench.overwrite("disk", &mixed);
        }
        bench.rig.umount();
        assert!(bench.extents() >= extents, "not all of them are extents");
        bench
    }

    /// Pieces that are overwritten before a kill.
    fn preserved(&self) -> u64 {
        if self.full { PRESERVED } else { SMALL }
    }

    /// Makes the second source zeros from end to end.
    fn clear_zeros(&self) {
        let file = OpenOptions::new()
            .write(true)
            .open(self.rig.at("zeros.img"));
        let (file, zeros) = (file.unwrap(), vec![0; PIECE as usize]);
        for at in 0..self.zeros() {
            file.write_all_at(&zeros, at * PIECE).unwrap();
        }
        file.sync_data().unwrap();
    }

    /// Pieces of the second source.
    fn zeros(&self) -> u64 {
        if self.full { ZEROS } else { SMALL }
    }

    /// Writes pieces through the mount, of which only every second grain changes.
    fn overwrite(&mut self, volume: &str, pieces: &[u64]) {
        self.value = self.value % 200 + 1;
        let content = match volume {
            "zeros" => sparse_piece(self.value),
            _ => piece(self.value),
        };
        let live = OpenOptions::new().write(true).open(self.rig.live(volume));
        let (live, next) = (live.unwrap(), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..WRITERS {
                scope.spawn(|| {
                    while let Some(at) = pieces.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                        live.write_all_at(&content, at * PIECE).unwrap();
                    }
                });
            }
        });
    }

    /// The extents of the index, from a copy of it.
    fn extents(&self) -> u64 {
        let mut extents = 0;
        let mut count = |page: &stillframe::map::page::Page| extents += page.extents().len() as u64;
        let visited = self.map().for_each_page(&mut |_, page| {
            count(page);
            Ok(())
        });
        visited.unwrap();
        extents
    }

    /// The map as it is on the disk, from a copy: opening it changes it.
    fn map(&self) -> ExtentMap {
        let copy = self.rig.at("map-copy");
        if copy.exists() {
            fs::remove_dir_all(&copy).unwrap();
        }
        copy_dir(&self.rig.store().join("map"), &copy);
        ExtentMap::open(SledHome::new(copy).open().unwrap(), 1 << 20).unwrap()
    }

    fn outstanding(&self) -> Outstanding {
        let applied = self.map().applied().expect("it was checkpointed");
        let dir = FileDir::open(&self.rig.store()).unwrap();
        let current = slots(&dir).unwrap().into_iter().filter_map(Result::ok);
        let superblock = current.max_by_key(|s| s.sequence).unwrap();
        let keys = Keys::derive(&superblock.secret, superblock.store);
        let log = dir.subdir("log", false).unwrap();
        let scan = Scan {
            dir: &*log,
            keys: &keys,
            store: superblock.store,
            from_segment: applied.segment,
        };
        let mut found = Outstanding {
            bytes: 0,
            batches: 0,
            records: 0,
        };
        let scanned = scan.run(&mut |event| {
            if let Event::Batch {
                lsn,
                place,
                end,
                records,
                ..
            } = event
                && lsn > applied.lsn
            {
                found.bytes += end - place.offset();
                found.batches += 1;
                let grains = records
                    .iter()
                    .filter(|r| matches!(r.kind, RecordType::Preserve | RecordType::Zero));
                found.records += grains.count() as u64;
            }
            Ok(())
        });
        scanned.unwrap();
        found
    }

    /// Brings the store into a state, with its daemon killed.
    fn prepare(&mut self, state: State) {
        self.rig.mount();
        for volume in ["disk", "zeros"] {
            let last = self.rig.snapshot(volume, "last");
            if last.exists() {
                fs::remove_file(last).unwrap();
            }
        }
        if state == State::Zeros {
            // Nothing depends on its content now. Overwritten, not cut: some filesystems tell the device
            // of every freed block before they go on.
            self.rig.umount();
            self.clear_zeros();
            self.rig.mount();
        }
        // The start's own checkpoint, and the reclaim of what was just deleted.
        self.settle();
        match state {
            State::Checkpoint => {}
            State::Preserved => {
                touch(&self.rig.snapshot("disk", "last")).unwrap();
                let pieces: Vec<u64> = (0..self.pieces.min(self.preserved())).collect();
                self.overwrite("disk", &pieces);
            }
            State::Zeros => {
                touch(&self.rig.snapshot("zeros", "last")).unwrap();
                let pieces: Vec<u64> = (0..self.zeros()).collect();
                self.overwrite("zeros", &pieces);
            }
        }
        self.rig.kill();
    }

    /// Waits until the daemon has nothing to do.
    fn settle(&self) {
        let stat = format!("/proc/{}/stat", self.rig.pid());
        let used = || -> u64 {
            let stat = fs::read_to_string(&stat).unwrap();
            let (_, rest) = stat.rsplit_once(") ").unwrap();
            let words: Vec<&str> = rest.split(' ').collect();
            words[11].parse::<u64>().unwrap() + words[12].parse::<u64>().unwrap()
        };
        let (pause, calm) = (Duration::from_millis(100), if self.full { 25 } else { 4 });
        let end = Instant::now() + PATIENCE;
        let (mut before, mut quiet) = (used(), 0);
        while quiet < calm {
            assert!(Instant::now() < end, "the daemon is never idle");
            std::thread::sleep(pause);
            let now = used();
            quiet = if now <= before + 1 { quiet + 1 } else { 0 };
            before = now;
        }
    }

    /// Starts the killed daemon's successor; the time until a snapshot answers.
    fn start(&mut self) -> Duration {
        let path = self.rig.snapshot("disk", "e0");
        let begin = Instant::now();
        let answered = std::thread::scope(|scope| {
            let answer = scope.spawn(|| until_it_answers(&path));
            self.rig.mount();
            answer.join().unwrap()
        });
        answered - begin
    }

    fn measure(&mut self, state: State, cold: bool, rounds: u64) {
        let (mut times, mut syncs, mut found) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            self.prepare(state);
            let begin = Instant::now();
            for name in ["disk.img", "zeros.img"] {
                File::open(self.rig.at(name)).unwrap().sync_data().unwrap();
            }
            syncs.push(begin.elapsed());
            found.push(self.outstanding());
            if cold {
                fs::write("/proc/sys/vm/drop_caches", "3\n").unwrap();
            }
            times.push(self.start());
            self.rig.kill();
        }
        times.sort();
        syncs.sort();
        found.sort_by_key(|found| found.bytes);
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let median = |of: &[Duration]| ms(of[of.len() / 2]);
        let middle = &found[found.len() / 2];
        println!(
            "| {} | {} | {rounds} | {:.0} | {:.0} | {:.0} | {:.1} | {} | {} | {:.0} |",
            state.name(),
            if cold { "empty" } else { "warm" },
            median(&times),
            ms(times[0]),
            ms(times[times.len() - 1]),
            middle.bytes as f64 / f64::from(1 << 20),
            middle.batches,
            middle.records,
            median(&syncs),
        );
        std::io::stdout().flush().unwrap();
    }
}

/// Looks at a snapshot until it answers as it should; when it did.
fn until_it_answers(path: &Path) -> Instant {
    let end = Instant::now() + PATIENCE;
    let mut grain = vec![0; GRAIN];
    loop {
        // Until it is mounted there is no such file; before, the dead daemon's mount is in the way.
        let read = fs::metadata(path)
            .and_then(|_| File::open(path))
            .and_then(|file| file.read_exact_at(&mut grain, 0));
        let now = Instant::now();
        match read {
            Ok(()) => {
                assert!(grain.iter().all(|&b| b == FIRST), "a wrong byte");
                return now;
            }
            Err(e) => assert!(now < end, "{}: {e}", path.display()),
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// A piece whose every second grain holds a value.
fn piece(value: u8) -> Vec<u8> {
    let mut content = vec![STILL; PIECE as usize];
    for grain in content.chunks_mut(GRAIN).step_by(2) {
        grain.fill(value);
    }
    content
}

/// The same with zeros between.
fn sparse_piece(value: u8) -> Vec<u8> {
    let mut content = piece(value);
    for grain in content.chunks_mut(GRAIN).skip(1).step_by(2) {
        grain.fill(0);
    }
    content
}

fn can_drop() -> bool {
    let file = OpenOptions::new()
        .write(true)
        .open("/proc/sys/vm/drop_caches");
    file.is_ok()
}

fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap();
    text.split(' ').next().unwrap().to_owned()
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for (path, name) in entries(from) {
        match path.is_dir() {
            true => copy_dir(&path, &to.join(name)),
            false => {
                let to = to.join(name);
                fs::copy(&path, &to).unwrap();
                // So that no sync of the daemon has to wait for it.
                File::open(to).unwrap().sync_all().unwrap();
            }
        }
    }
}

fn size_of_dir(dir: &Path) -> u64 {
    let sizes = entries(dir)
        .into_iter()
        .map(|(path, _)| match path.is_dir() {
            true => size_of_dir(&path),
            false => fs::metadata(&path).unwrap().len(),
        });
    sizes.sum()
}

fn entries(dir: &Path) -> Vec<(PathBuf, std::ffi::OsString)> {
    let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
    entries.map(|e| (e.path(), e.file_name())).collect()
}
