//! A store with a million extents (`--extents`): reading, memory, opening, and deleting while somebody writes.
//!
//! The extents are single grains with a gap after each, preserved in one epoch with their content, so one snapshot
//! holds them all. Behind them lies a range of the volume that is preserved from end to end; the same range alone,
//! in a store of its own, is the small case.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::contender::{Contender, OURS};
use crate::content::{Buffer, PAGE, fill, mixed};
use crate::driver::{Scattered, make_source, open, read_in_order, settle, write_in_order};
use crate::report::{Row, at_least, at_most, percentile, under};
use crate::rig::{Rig, eventually, touch};
use crate::run::{Run, Sources};

use super::{MIB, delete, rate, status, unique, volume_of};
use std::os::unix::fs::FileExt;

pub const IDS: [&str; 4] = ["million-read", "memory", "open", "delete-p99"];

const ALONE: &str = "stillframe, the range alone";
const UNDISTURBED: &str = "stillframe, undisturbed";
/// Extents in a MiB.
const DENSITY: u64 = MIB / PAGE / 2;
/// What the writer writes to while a snapshot is deleted.
const WRITTEN: u64 = 4 * MIB;

/// Where things lie in the volume.
struct Layout {
    gaps: u64,
    range: std::ops::Range<u64>,
}

impl Layout {
    fn of(run: &Run) -> Layout {
        let gaps = run.options.extents.div_ceil(DENSITY) * MIB;
        let size = run.options.size.min(256 * MIB);
        Layout {
            gaps,
            range: gaps..gaps + size,
        }
    }
}

pub fn measure(run: &mut Run) {
    let (sources, layout) = (Sources::new(), Layout::of(run));
    let mut large = build(&sources, &layout);
    if run.wants(IDS[0]) {
        let range = layout.range.clone();
        let source = sources.at("small.img");
        make_source(&source, range.end - range.start, 0..range.end - range.start);
        let mut small = Contender::ours(&source, true);
        small.name = ALONE;
        write_in_order(&small.live, 0..range.end - range.start, MIB, true);
        let mut all = [large, small];
        read(run, &mut all, &range);
        [large, _] = all;
    }
    if run.wants(IDS[2]) {
        opening(run, &mut large);
    }
    if run.wants(IDS[1]) {
        memory(run, &sources, &mut large, &layout);
    }
    if run.wants(IDS[3]) {
        deletion(run, &mut large, &layout);
    }
}

/// A volume with snapshot `s0`, which has all the extents and the range.
fn build(sources: &Sources, layout: &Layout) -> Contender {
    let source = sources.at("large.img");
    let end = layout.range.end;
    make_source(&source, end, layout.range.clone());
    // Half of it, so that there is something to preserve and the gaps stay holes.
    let file = open(&source, true, false);
    let mut piece = Buffer::new(MIB as usize);
    for at in (0..layout.gaps).step_by(MIB as usize) {
        fill(&mut piece, at, 0);
        for grain in (0..MIB).step_by(2 * PAGE as usize) {
            let bytes = &piece[grain as usize..][..PAGE as usize];
            file.write_all_at(bytes, at + grain).unwrap();
        }
    }
    file.sync_all().unwrap();
    let mut ours = Contender::ours(&source, true);
    let offsets: Vec<u64> = (0..layout.gaps).step_by(MIB as usize).collect();
    std::thread::scope(|scope| {
        for part in offsets.chunks(offsets.len().div_ceil(8)) {
            let live = open(&ours.live, true, true);
            scope.spawn(move || {
                let mut piece = Buffer::new(MIB as usize);
                for &at in part {
                    fill(&mut piece, at, 1);
                    for gap in piece.chunks_mut(PAGE as usize).skip(1).step_by(2) {
                        gap.fill(0);
                    }
                    live.write_all_at(&piece, at).unwrap();
                }
            });
        }
    });
    write_in_order(&ours.live, layout.range.clone(), MIB, true);
    let expected = layout.gaps / 2 + (layout.range.end - layout.range.start);
    let kept = unique(ours.rig(), "s0");
    assert_eq!(kept, expected, "gaps were preserved, or grains were not");
    settle(&ours.behind);
    ours
}

fn read(run: &mut Run, all: &mut [Contender; 2], range: &std::ops::Range<u64>) {
    let mut row = Row::new(
        IDS[0],
        "sequential read of a contiguous preserved range in a store with a million extents, O_DIRECT, 1 MiB requests",
        "MiB/s",
        &[at_least(ALONE, 0.9, 0.97)],
    );
    let length = range.end - range.start;
    run.turns(
        all,
        |contender, _| {
            let range = match contender.name {
                OURS => range.clone(),
                _ => 0..length,
            };
            rate(
                length,
                read_in_order(&contender.read, range, MIB, true).right(&contender.read),
            )
        },
        |name, value| row.add(name, value),
    );
    run.done(row);
}

fn anonymous(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<f64>().unwrap() / 1024.0
}

/// The most that the daemon has while it does a bit of everything with ten volumes and 100 snapshots.
fn memory(run: &mut Run, sources: &Sources, large: &mut Contender, layout: &Layout) {
    let mut row = Row::new(
        IDS[1],
        "anonymous memory of the daemon with 10 volumes, 100 snapshots, a million extents: the most seen in use",
        "MiB",
        &[under(256.0, 64.0)],
    );
    let (pid, over) = (large.rig().pid(), AtomicBool::new(false));
    // With the one there is, 100.
    let each = if run.options.small { 1 } else { 11 };
    let most = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut most: f64 = 0.0;
            while !over.load(Ordering::SeqCst) {
                most = most.max(anonymous(pid));
                std::thread::sleep(Duration::from_millis(3));
            }
            most
        });
        // Also when it fails, or the watcher would go on for ever.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            in_use(sources, large, layout, each);
        }));
        over.store(true, Ordering::SeqCst);
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        watcher.join().unwrap()
    });
    row.add(OURS, most);
    run.done(row);
}

fn in_use(sources: &Sources, large: &mut Contender, layout: &Layout, each: u64) {
    let rig = large.rig();
    for number in 0..9 {
        let name = format!("more{number}");
        let source = sources.make(&format!("{name}.img"), 4 * MIB);
        rig.ok(&["volume", "add", &name, source.to_str().unwrap()]);
        for taken in 0..each {
            let live = rig.live(&name);
            write_some(&live, 4 * MIB, taken);
            touch(&rig.snapshot(&name, &format!("t{taken}"))).unwrap();
        }
    }
    let offsets = mixed(layout.range.end, 2 * MIB, 4);
    let file = open(&large.read, false, true);
    let mut buffer = Buffer::new(MIB as usize);
    for &at in offsets.iter().take(2048) {
        file.read_exact_at(&mut buffer, at).unwrap();
    }
    read_in_order(&large.read, layout.range.clone(), MIB, true).right(&large.read);
}

fn write_some(path: &Path, size: u64, seed: u64) {
    let offsets = mixed(size, PAGE, seed);
    Scattered {
        path,
        offsets: &offsets[..offsets.len().min(256)],
        request: PAGE,
        depth: 4,
        write: true,
        direct: true,
    }
    .by_threads();
}

/// From the start of `mount` until a snapshot is read, after a clean stop.
fn opening(run: &mut Run, large: &mut Contender) {
    let mut row = Row::new(
        IDS[2],
        "opening a store with a million extents, after a clean stop, until a snapshot is read",
        "s",
        &[under(1.0, 0.2)],
    );
    for _ in 0..run.options.rounds {
        run.check_interrupt();
        large.rig().umount();
        let begin = Instant::now();
        large.rig().mount();
        let mut page = Buffer::new(PAGE as usize);
        let file = open(&large.read, false, true);
        file.read_exact_at(&mut page, 0).unwrap();
        row.add(OURS, begin.elapsed().as_secs_f64());
        assert_eq!(crate::content::first_wrong(&page, 0, 0), None);
        large.pids = vec![large.rig().pid()];
    }
    run.done(row);
}

/// Latencies in milliseconds of a writer of 4 KiB, until it is told to stop.
fn writer(path: &Path, at: u64, over: &AtomicBool) -> Vec<f64> {
    let (file, offsets) = (open(path, true, true), mixed(WRITTEN, PAGE, 8));
    let (mut page, mut times) = (Buffer::new(PAGE as usize), Vec::new());
    while !over.load(Ordering::SeqCst) {
        let offset = offsets[times.len() % offsets.len()];
        fill(&mut page, offset, 200 + times.len() as u64 % 800);
        let begin = Instant::now();
        file.write_all_at(&page, at + offset).unwrap();
        times.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    times
}

/// The writer's latencies while something is done.
fn beside(path: &Path, at: u64, work: impl FnOnce()) -> Vec<f64> {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writes = scope.spawn(|| writer(path, at, &over));
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        over.store(true, Ordering::SeqCst);
        let times = writes.join().unwrap();
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        times
    })
}

/// A second snapshot keeps the kind of write the same: blocks that are preserved already. Once, because the
/// extents are gone after it.
fn deletion(run: &mut Run, large: &mut Contender, layout: &Layout) {
    let mut row = Row::new(
        IDS[3],
        "writer's p99, 4 KiB depth 1, while a snapshot with a million extents is deleted and reclaimed",
        "ms",
        &[at_most(UNDISTURBED, 1.5, 1.1)],
    );
    let (live, at) = (large.live.clone(), layout.range.start);
    touch(&large.rig().snapshot("disk", "keep")).unwrap();
    write_in_order(&live, at..at + WRITTEN, MIB, true);
    settle(&large.behind);
    let rig: &Rig = large.rig();
    let calm = Duration::from_millis(if run.options.small { 300 } else { 10_000 });
    let undisturbed = || {
        beside(&live, at, || {
            let end = Instant::now() + calm;
            // Asked as below, so that asking does not count.
            eventually("time passes", || {
                assert!(volume_of(&status(rig), "disk")["reclaimable"].is_u64());
                std::thread::sleep(Duration::from_millis(20));
                Instant::now() > end
            });
        })
    };
    // Before and after: the machine is not equally busy all the time.
    let mut still = undisturbed();
    let begin = Instant::now();
    let mut busy = beside(&live, at, || delete(rig, "s0"));
    println!(
        "deleting and reclaiming took {:.2?}; {} writes meanwhile",
        begin.elapsed(),
        busy.len()
    );
    still.extend(undisturbed());
    row.add(OURS, percentile(&mut busy, 0.99));
    row.add(UNDISTURBED, percentile(&mut still, 0.99));
    run.done(row);
}
