//! A tebibyte under protection: what adding, taking and deleting cost, and what the daemon needs.
//!
//! Goal: with a sparse source of 1 TiB, add, snapshot and delete take under 100 ms each, with 1 GiB changed
//! so do making and deleting clones, the list of what changed takes under a second, a revert at most twice
//! as long as writing what differs to a plain file; and the daemon's anonymous memory stays under 128 MiB: under a load of
//! scattered writes, with 100 GiB of preserved extents in the map, and while they are reclaimed. Times are printed, and fail the test only
//! when they are far off (a busy machine is no fault); memory is asserted.
//!
//! Method: the load is real. The 100 GiB are put into the map of a store that was stopped cleanly,
//! through the library, as if the log had published them; their payload is claimed to lie where no
//! segment reaches, so that reading them must fail rather than answer anything.
//! A revert and the plain file are measured in turns, because a disk is not equally fast twice;
//! `STILLFRAME_LARGE_PAIRS` says how often, and medians and the ratio of each pair are printed. `cargo test
//! --release` measures what a user runs.
//! `STILLFRAME_LARGE_STRIDE=2` makes them single grains with gaps instead of runs, the worst there is:
//! minutes, and measured rather than promised.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use stillframe::map::index::IndexHome;
use stillframe::map::sled_index::SledHome;
use stillframe::map::{ExtentMap, Publish, Published};
use stillframe::units::{Epoch, Place, VolumeId};

use rig::{Chance, Rig, eventually, setting, skip, touch};

const SIZE: u64 = 1 << 40;
const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Grains of a page of the map.
const REGION: u64 = 4096;
/// 100 GiB in grains of 4 KiB.
const PRESERVED: u64 = 100 << 18;
/// What the daemon may need of anonymous memory.
const MEMORY_MAX: u64 = 128 * MIB;
/// Beyond this a time is a fault on any machine.
const FAR_OFF: Duration = Duration::from_secs(2);
const WRITERS: u64 = 4;
const LOAD: Duration = Duration::from_secs(6);

/// Times of one kind of operation.
struct Times(&'static str, Vec<Duration>);

impl Times {
    fn new(what: &'static str) -> Times {
        Times(what, Vec::new())
    }

    fn of<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let done = work();
        self.1.push(begin.elapsed());
        done
    }

    /// Prints median and longest.
    fn tell(&mut self, when: &str) {
        self.1.sort();
        let (median, longest) = (self.1[self.1.len() / 2], self.1[self.1.len() - 1]);
        let (what, n) = (self.0, self.1.len());
        println!("{when}: {what}: median {median:?}, longest {longest:?} of {n}");
        assert!(median < FAR_OFF, "{when}: {what} took {median:?}");
    }
}

/// Anonymous memory of a process in bytes.
fn anonymous(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() << 10
}

/// Watches the daemon's memory while `work` is done; returns its peak too.
fn watched<T>(rig: &Rig, when: &str, work: impl FnOnce() -> T) -> T {
    let (pid, over, peak) = (rig.pid(), AtomicBool::new(false), AtomicU64::new(0));
    let done = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                peak.fetch_max(anonymous(pid), Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        over.store(true, Ordering::SeqCst);
        done
    });
    let done = done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let peak = peak.load(Ordering::SeqCst).max(anonymous(pid));
    println!("{when}: anonymous memory at most {} MiB", peak / MIB);
    assert!(peak < MEMORY_MAX, "{when}: {} MiB", peak / MIB);
    done
}

/// Adds, takes and deletes a few times; leaves nothing.
fn measure(rig: &Rig, when: &str) {
    let (mut add, mut take, mut delete) = (
        Times::new("volume add"),
        Times::new("snapshot by touch"),
        Times::new("delete by rm"),
    );
    let mut create = Times::new("snapshot create");
    for i in 0..5 {
        let (name, path) = (format!("extra{i}"), rig.at(&format!("extra{i}.img")));
        if !path.exists() {
            rig.source(&format!("extra{i}.img"), SIZE);
        }
        add.of(|| rig.ok(&["volume", "add", &name, path.to_str().unwrap()]));
        rig.ok(&["volume", "remove", &name]);
        let snapshot = rig.snapshot("disk", &name);
        take.of(|| touch(&snapshot).unwrap());
        create.of(|| rig.ok(&["snapshot", "create", &format!("disk@{name}-more")]));
        delete.of(|| fs::remove_file(&snapshot).unwrap());
        let more = rig.snapshot("disk", &format!("{name}-more"));
        delete.of(|| fs::remove_file(&more).unwrap());
    }
    for times in [&mut add, &mut take, &mut create, &mut delete] {
        times.tell(when);
    }
}

/// Scattered pages all over, and long runs in one place; returns the offsets of some pages.
fn write(rig: &Rig, writer: u64, taken: &AtomicU64) -> Vec<u64> {
    let live = OpenOptions::new().write(true).open(rig.live("disk"));
    let live = live.unwrap();
    let mut chance = Chance(writer);
    let (end, mut places) = (Instant::now() + LOAD, Vec::new());
    let long = vec![writer as u8 + 1; MIB as usize];
    let mut seen = 0;
    while Instant::now() < end {
        for _ in 0..64 {
            let at = chance.below(SIZE / PAGE) * PAGE;
            live.write_all_at(&long[..PAGE as usize], at).unwrap();
            places.push(at);
        }
        // After each snapshot once: its old content has to be preserved.
        let now = taken.load(Ordering::SeqCst);
        if now > seen {
            seen = now;
            for piece in 0..16 {
                let at = (writer * 16 + piece) * MIB;
                live.write_all_at(&long, at).unwrap();
            }
        }
    }
    live.sync_all().unwrap();
    places
}

fn load(rig: &Rig) {
    touch(&rig.snapshot("disk", "empty")).unwrap();
    let taken = AtomicU64::new(0);
    let mut times = Times::new("snapshot under load");
    let mut places: Vec<u64> = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let taken = &taken;
                scope.spawn(move || write(rig, writer, taken))
            })
            .collect();
        let end = Instant::now() + LOAD;
        while Instant::now() < end {
            let number = taken.fetch_add(1, Ordering::SeqCst);
            let name = format!("load{number}");
            times.of(|| touch(&rig.snapshot("disk", &name)).unwrap());
            std::thread::sleep(Duration::from_millis(500));
        }
        let ended = writers.into_iter().map(|writer| writer.join().unwrap());
        ended.flatten().collect()
    });
    times.tell("load");
    println!("load: {} scattered pages", places.len());
    places.sort_unstable();
    places.dedup();
    let live = File::open(rig.live("disk")).unwrap();
    let empty = File::open(rig.snapshot("disk", "empty")).unwrap();
    let mut page = vec![0; PAGE as usize];
    for at in places.iter().step_by(places.len() / 500 + 1) {
        live.read_exact_at(&mut page, *at).unwrap();
        assert!(page.iter().all(|&b| b != 0), "live.img at {at}");
        empty.read_exact_at(&mut page, *at).unwrap();
        assert!(page.iter().all(|&b| b == 0), "the snapshot at {at}");
    }
    let mut delete = Times::new("delete after load");
    for entry in fs::read_dir(rig.mnt().join("disk/snapshots")).unwrap() {
        let path = entry.unwrap().path();
        delete.of(|| fs::remove_file(path).unwrap());
    }
    delete.tell("load");
    reclaimed(rig, "load");
}

/// Waits until nothing is left to reclaim.
fn reclaimed(rig: &Rig, when: &str) {
    let begin = Instant::now();
    eventually("what nobody needs is reclaimed", || {
        std::thread::sleep(Duration::from_millis(50));
        volume_of(&status(rig), "disk")["reclaimable"] == 0
    });
    println!("{when}: reclaimed in {:?}", begin.elapsed());
}

/// As if 100 GiB had been overwritten since snapshot `epoch`: every `stride`-th grain, in a store that
/// was stopped cleanly.
fn feed(rig: &Rig, epoch: u64, stride: u64) {
    let home = SledHome::new(rig.store().join("map"));
    let map = ExtentMap::open(home.open().unwrap(), 32 << 20).unwrap();
    let applied = map.applied().expect("a clean stop leaves a checkpoint");
    // The newest segment there is: it stays while the map names it.
    let segments = fs::read_dir(rig.store().join("log")).unwrap();
    let numbers = segments.filter_map(|entry| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        name.strip_suffix(".seg")?.parse::<u32>().ok()
    });
    let segment = numbers.max().expect("a log has a segment");
    let begin = Instant::now();
    let mut number = 0;
    for first in (0..PRESERVED * stride).step_by((8 * REGION) as usize) {
        let count = if stride == 1 { REGION } else { 1 };
        let starts = (first..first + 8 * REGION).step_by((count * stride) as usize);
        let records = starts.map(|start| {
            // Far behind the end of the segment.
            let place = Place {
                segment,
                block: (1 << 20) + number,
            };
            number += count as u32;
            let sums = (0..count).map(|i| (start + i).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let sums = sums.collect();
            Publish {
                volume: VolumeId(1),
                epoch: Epoch(epoch),
                start,
                count: count as u32,
                grain_blocks: 1,
                segment,
                kind: Published::Data { place, sums },
            }
        });
        map.publish(records.collect());
        map.checkpoint(applied).unwrap();
    }
    assert_eq!(u64::from(number), PRESERVED);
    drop(map);
    println!("fed: 100 GiB, stride {stride}, in {:?}", begin.elapsed());
}

fn status(rig: &Rig) -> Value {
    let text = rig.ok(&["status", "--json"]);
    serde_json::from_str(&text).unwrap()
}

fn volume_of<'a>(status: &'a Value, name: &str) -> &'a Value {
    let volumes = status["volumes"].as_array().unwrap();
    volumes.iter().find(|v| v["name"] == name).unwrap()
}

/// The newest snapshot's epoch.
fn epoch_of(rig: &Rig, name: &str) -> u64 {
    let status = status(rig);
    let snapshots = volume_of(&status, "disk")["snapshots"].as_array().unwrap();
    let snapshot = snapshots.iter().find(|s| s["name"] == name).unwrap();
    snapshot["epoch"].as_u64().unwrap()
}

fn with_a_full_map(rig: &mut Rig, stride: u64) {
    let when = format!("100 GiB, stride {stride}");
    touch(&rig.snapshot("disk", "big")).unwrap();
    let epoch = epoch_of(rig, "big");
    rig.umount();
    feed(rig, epoch, stride);
    let begin = Instant::now();
    rig.mount();
    println!("{when}: mounted in {:?}", begin.elapsed());
    let all = status(rig);
    let snapshots = volume_of(&all, "disk")["snapshots"].as_array().unwrap();
    let big = snapshots.iter().find(|s| s["name"] == "big").unwrap();
    assert!(big["unique"].as_u64().unwrap() >= PRESERVED * PAGE, "{big}");
    watched(rig, &format!("{when}: in use"), || {
        measure(rig, &when);
        let big = File::open(rig.snapshot("disk", "big")).unwrap();
        let mut chance = Chance(stride);
        let mut page = vec![0; PAGE as usize];
        for _ in 0..3000 {
            let at = chance.below(PRESERVED) * stride * PAGE;
            // The map says where it is; it is not there.
            let refused = big.read_exact_at(&mut page, at).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EIO), "{refused}");
        }
    });
    watched(rig, &format!("{when}: reclaimed"), || {
        let mut delete = Times::new("delete of 100 GiB");
        delete.of(|| fs::remove_file(rig.snapshot("disk", "big")).unwrap());
        delete.tell(&when);
        reclaimed(rig, &when);
    });
}

/// Runs of a MiB that are changed; the rest of the GiB is single pages anywhere.
const RUNS: u64 = 960;

fn run_at(number: u64) -> u64 {
    (number << 30) + 5 * MIB
}

/// Runs and scattered pages, by several writers, made durable. `salt` tells contents apart.
fn write_a_gib(file: &File, salt: u8) {
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            scope.spawn(move || {
                let mut chance = Chance(99 + writer);
                let mut data = vec![0; MIB as usize];
                for piece in 0..RUNS / WRITERS {
                    data.fill((piece as u8 ^ salt) | 1);
                    let run = run_at(piece * WRITERS + writer);
                    file.write_all_at(&data, run).unwrap();
                    for grain in data.chunks(PAGE as usize).take(17) {
                        let at = chance.below(SIZE / PAGE) * PAGE;
                        file.write_all_at(grain, at).unwrap();
                    }
                    if piece % 16 == 15 {
                        // Some filesystems set aside room for what is not written back yet, and run out.
                        file.sync_data().unwrap();
                    }
                }
            });
        }
    });
    file.sync_all().unwrap();
}

/// With 1 GiB changed, in runs and in scattered pages: clone and delete, and the list of what changed.
fn changed(rig: &Rig) {
    let when = "1 GiB changed";
    touch(&rig.snapshot("disk", "before")).unwrap();
    let live = OpenOptions::new()
        .write(true)
        .open(rig.live("disk"))
        .unwrap();
    let begin = Instant::now();
    write_a_gib(&live, 0);
    drop(live);
    println!("{when}: written in {:?}", begin.elapsed());
    let clone = rig.mnt().join("disk/clones/c.img");
    let again = rig.mnt().join("disk/clones/again.img");
    let (mut make, mut delete) = (Times::new("clone by ln"), Times::new("clone deleted"));
    let mut list = Times::new("diff JSON");
    for _ in 0..5 {
        make.of(|| fs::hard_link(rig.snapshot("disk", "before"), &clone).unwrap());
        make.of(|| fs::hard_link(&clone, &again).unwrap());
        delete.of(|| fs::remove_file(&clone).unwrap());
        delete.of(|| fs::remove_file(&again).unwrap());
        let text = list.of(|| rig.ok(&["diff", "disk@before..live", "--json"]));
        let diff: Value = serde_json::from_str(&text).unwrap();
        let extents = diff["extents"].as_array().unwrap();
        let bytes: u64 = extents.iter().map(|e| e["length"].as_u64().unwrap()).sum();
        // Pages chosen twice count once.
        assert!(
            (1000 * MIB..=1024 * MIB).contains(&bytes),
            "{bytes} bytes changed"
        );
    }
    for times in [&mut make, &mut delete, &mut list] {
        times.tell(when);
    }
    fs::remove_file(rig.snapshot("disk", "before")).unwrap();
    reclaimed(rig, when);
}

/// Whether every run of `live.img` is what a snapshot says, and whether it is data.
fn is_as(rig: &Rig, snapshot: &str, data: bool) {
    let live = File::open(rig.live("disk")).unwrap();
    let point = File::open(rig.snapshot("disk", snapshot)).unwrap();
    let (mut now, mut then) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    for piece in 0..RUNS {
        live.read_exact_at(&mut now, run_at(piece)).unwrap();
        point.read_exact_at(&mut then, run_at(piece)).unwrap();
        assert!(now == then, "run {piece} is not as in {snapshot}");
        assert_eq!(now.iter().any(|&b| b != 0), data, "run {piece}");
    }
}

fn revert(rig: &Rig, to: &str, data: bool) -> Duration {
    let begin = Instant::now();
    rig.ok(&["snapshot", "revert", &format!("disk@{to}")]);
    let took = begin.elapsed();
    is_as(rig, to, data);
    took
}

/// Prints the median of pairs (what was measured, its floor), and of their ratios.
fn tell_pairs(what: &str, pairs: &[(Duration, Duration)]) {
    let median = |mut all: Vec<f64>| {
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    let ratio = |pair: &(Duration, Duration)| pair.0.as_secs_f64() / pair.1.as_secs_f64();
    let ratios: Vec<f64> = pairs.iter().map(ratio).collect();
    let took = median(pairs.iter().map(|p| p.0.as_secs_f64()).collect());
    let floor = median(pairs.iter().map(|p| p.1.as_secs_f64()).collect());
    let each: Vec<String> = ratios.iter().map(|r| format!("{r:.2}")).collect();
    println!(
        "{what}: {took:.2} s, a plain file {floor:.2} s, {:.2}x (medians of {}; pairs {})",
        median(ratios),
        pairs.len(),
        each.join(" ")
    );
}

/// Reverts beside the writing of the same to a plain file made anew, in turns. Nothing is deleted in between:
/// what is freed then would be given back while the next is measured.
fn reverts(rig: &Rig) {
    let (mut to_holes, mut back, mut over_data) = (Vec::new(), Vec::new(), Vec::new());
    let floor = || {
        let _ = fs::remove_file(rig.at("plain.img"));
        let file = File::create_new(rig.at("plain.img")).unwrap();
        file.set_len(SIZE).unwrap();
        let begin = Instant::now();
        write_a_gib(&file, 0);
        begin.elapsed()
    };
    let live = || {
        let live = OpenOptions::new().write(true).open(rig.live("disk"));
        live.unwrap()
    };
    for pair in 0..setting("STILLFRAME_LARGE_PAIRS", 1) {
        let (holes, data) = (format!("holes{pair}"), format!("data{pair}"));
        // Who goes first changes from pair to pair.
        let beside = |to: &str, data: bool| match pair % 2 {
            0 => {
                let floor = floor();
                (revert(rig, to, data), floor)
            }
            _ => (revert(rig, to, data), floor()),
        };
        touch(&rig.snapshot("disk", &holes)).unwrap();
        write_a_gib(&live(), 0);
        to_holes.push(beside(&holes, false));
        back.push(beside(&format!("before-revert-{holes}"), true));
        touch(&rig.snapshot("disk", &data)).unwrap();
        write_a_gib(&live(), 0x80);
        over_data.push(beside(&data, true));
        // For the next pair.
        revert(rig, &holes, false);
    }
    fs::remove_file(rig.at("plain.img")).unwrap();
    tell_pairs("revert to holes", &to_holes);
    tell_pairs("revert of that, to data where holes are", &back);
    tell_pairs("revert to data where other data is", &over_data);
}

/// One test at a time: each measures the machine.
static ALONE: Mutex<()> = Mutex::new(());

/// A daemon with a sparse source of a tebibyte, `None` where there can be none.
fn tebibyte() -> Option<Rig> {
    if !rig::can_mount() {
        return None;
    }
    let mut rig = Rig::new();
    let file = File::create_new(rig.at("disk.img")).unwrap();
    if let Err(e) = file.set_len(SIZE) {
        skip(&format!(
            "no file of 1 TiB in {}: {e}",
            rig.at("").display()
        ));
        return None;
    }
    drop(file);
    let volume = format!("disk={}", rig.at("disk.img").display());
    rig.mount_with(&["--volume", &volume]);
    Some(rig)
}

#[test]
fn a_revert_takes_little_longer_than_the_writing() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut rig) = tebibyte() else { return };
    watched(&rig, "reverts", || reverts(&rig));
    rig.umount();
}

#[test]
fn a_tebibyte_costs_little() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut rig) = tebibyte() else { return };
    watched(&rig, "empty", || measure(&rig, "empty"));
    watched(&rig, "load", || load(&rig));
    watched(&rig, "after the load", || measure(&rig, "after the load"));
    changed(&rig);
    with_a_full_map(&mut rig, setting("STILLFRAME_LARGE_STRIDE", 1));
    rig.umount();
}
