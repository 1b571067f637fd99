//! How long writers stand still when a snapshot is taken of a volume of 1 TiB that is written to at full load.
//!
//! Four writers: three of random 4 KiB anywhere, one of 1 MiB in order, all of them first overwrites again after each
//! snapshot. The pause of a snapshot is the longest time that a 4 KiB write took which was under way between the
//! call that takes it and its answer. As many stretches of time with no snapshot are looked at in the same way, since
//! a loaded machine has pauses of its own.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::contender::{Contender, OURS};
use crate::content::{Buffer, PAGE, fill};
use crate::driver::open;
use crate::report::{Row, percentile, under};
use crate::rig::{Chance, touch};
use crate::run::{Run, Sources};

use super::MIB;

pub const IDS: [&str; 1] = ["pause"];

const SIZE: u64 = 1 << 40;
const NONE: &str = "stillframe, no snapshot";
const SMALL_WRITERS: u64 = 3;

type Stretch = (Instant, Instant);

/// When each of its writes was under way, until it is told to stop.
fn writer(path: &Path, number: u64, over: &AtomicBool) -> Vec<Stretch> {
    let (file, mut chance) = (open(path, true, true), Chance(number));
    let (mut page, mut writes) = (Buffer::new(PAGE as usize), Vec::new());
    while !over.load(Ordering::Relaxed) {
        let at = chance.below(SIZE / PAGE) * PAGE;
        fill(&mut page, at, 1 + number);
        let begin = Instant::now();
        file.write_all_at(&page, at).unwrap();
        writes.push((begin, Instant::now()));
    }
    writes
}

/// Keeps the daemon busy with long writes in one GiB.
fn long_writer(path: &Path, over: &AtomicBool) {
    let (file, mut piece) = (open(path, true, true), Buffer::new(MIB as usize));
    for number in 0.. {
        if over.load(Ordering::Relaxed) {
            return;
        }
        fill(&mut piece, 0, 10 + number % 1000);
        file.write_all_at(&piece, number % 1024 * MIB).unwrap();
    }
}

/// The longest write, in milliseconds, of those that were under way in a stretch of time.
fn longest(writes: &[Stretch], during: &Stretch) -> f64 {
    let overlap = writes
        .iter()
        .filter(|write| write.0 < during.1 && write.1 > during.0);
    let times = overlap.map(|write| (write.1 - write.0).as_secs_f64() * 1e3);
    times.fold(0.0, f64::max)
}

pub fn measure(run: &mut Run) {
    let mut row = Row::new(
        IDS[0],
        "writers' pause at a snapshot under full write load, 1 TiB volume: p99 of all snapshots",
        "ms",
        &[under(20.0, 5.0)],
    );
    let sources = Sources::new();
    let source = sources.at("huge.img");
    File::create_new(&source).unwrap().set_len(SIZE).unwrap();
    let ours = Contender::ours(&source, true);
    let count = if run.options.small { 4 } else { 200 };
    let over = AtomicBool::new(false);
    let (taken, calm, writes) = std::thread::scope(|scope| {
        let (live, over) = (&ours.live, &over);
        let small: Vec<_> = (0..SMALL_WRITERS)
            .map(|number| scope.spawn(move || writer(live, number, over)))
            .collect();
        scope.spawn(move || long_writer(live, over));
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            snapshots(run, &ours, count)
        }));
        over.store(true, Ordering::Relaxed);
        let mut writes = Vec::new();
        for writer in small {
            writes.extend(writer.join().unwrap());
        }
        let (taken, calm) = done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (taken, calm, writes)
    });
    for (name, stretches) in [(OURS, taken), (NONE, calm)] {
        let pauses = stretches.iter().map(|stretch| longest(&writes, stretch));
        let mut pauses: Vec<f64> = pauses.collect();
        row.add(name, percentile(&mut pauses, 0.99));
        println!(
            "pauses, {name}: median {:.2} ms, p99 {:.2} ms, most {:.2} ms of {}; {} writes in all",
            percentile(&mut pauses, 0.5),
            percentile(&mut pauses, 0.99),
            percentile(&mut pauses, 1.0),
            pauses.len(),
            writes.len()
        );
    }
    run.done(row);
}

/// Takes snapshots, and notes when; and as long a time between two, each time.
fn snapshots(run: &Run, ours: &Contender, count: usize) -> (Vec<Stretch>, Vec<Stretch>) {
    let (mut taken, mut calm) = (Vec::new(), Vec::new());
    let dir = ours.read.parent().expect("it lies in one");
    for number in 0..count {
        run.check_interrupt();
        std::thread::sleep(Duration::from_millis(30));
        let begin = Instant::now();
        touch(&dir.join(format!("p{number}.img"))).unwrap();
        let end = Instant::now();
        taken.push((begin, end));
        std::thread::sleep(Duration::from_millis(30));
        let begin = Instant::now();
        std::thread::sleep(end - taken[number].0);
        calm.push((begin, Instant::now()));
    }
    (taken, calm)
}
