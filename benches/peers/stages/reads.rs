//! Reads of a snapshot of which nothing was overwritten yet: everybody reads one file that is in the page cache.
//!
//! *First*: the kernel has none of the mount's pages ([`forget`], looked at with fincore); only the source is cached.
//! *Again*: the file was read just before, and is opened anew, as tools do; a server that does not tell the kernel
//! that the file is immutable is read again in full.

use std::path::Path;

use crate::contender::{Contender, OURS, QSD, QSD_URING, RAW, cpu_of};
use crate::content::{PAGE, mixed};
use crate::driver::{Scattered, cached, forget, read_in_order, ready};
use crate::report::{Claim, Row, at_least, at_most};
use crate::run::{Run, Sources};

use super::{KIB, rate};

pub const IDS: [&str; 7] = [
    "seq-first",
    "seq-direct",
    "seq-again",
    "cpu-buffered",
    "cpu-direct",
    "rand-read-1",
    "rand-read-16",
];

/// How a file is read in order.
#[derive(Clone, Copy, PartialEq)]
pub enum Way {
    First,
    Direct,
    Again,
}

/// What reading in order gave.
pub struct Pass {
    pub rate: f64,
    /// CPU seconds of server and reader for a GiB.
    pub cpu: f64,
}

pub fn measure(run: &mut Run) {
    let sources = Sources::new();
    let size = run.options.size;
    let source = sources.make("disk.img", size);
    let mut all = vec![Contender::raw(&source), Contender::ours(&source, true)];
    let peers = &mut run.peers;
    all.extend(peers.plain(&source, false, false));
    all.extend(peers.plain(&source, true, false));
    all.extend(peers.fleecing(&source, false));
    all.extend(peers.fleecing(&source, true));
    all.extend(peers.nbd(&source, false, false));
    all.extend(peers.nbd(&source, true, false));
    all.extend(peers.loop_device(&source, false));
    let raw_and = |must, goal, raw_must, raw_goal| {
        [at_least(QSD, must, goal), at_least(RAW, raw_must, raw_goal)]
    };
    let first = Row::new(
        "seq-first",
        "sequential read of a snapshot through the page cache, first time, 1 MiB requests",
        "MiB/s",
        &[at_least(QSD, 2.7, 3.5)],
    );
    let direct = Row::new(
        "seq-direct",
        "the same with O_DIRECT",
        "MiB/s",
        &raw_and(4.0, 5.0, 0.55, 0.7),
    );
    let again = Row::new(
        "seq-again",
        "second read of a snapshot",
        "MiB/s",
        &raw_and(4.5, 5.5, 0.7, 0.8),
    );
    in_order(
        run,
        &mut all,
        &source,
        first,
        Way::First,
        Some(cpu_row("cpu-buffered", 0.5, 0.4)),
    );
    in_order(
        run,
        &mut all,
        &source,
        direct,
        Way::Direct,
        Some(cpu_row("cpu-direct", 0.25, 0.17)),
    );
    in_order(run, &mut all, &source, again, Way::Again, None);
    let one = [at_least(QSD_URING, 1.0, 1.2)];
    let sixteen = [at_least(QSD_URING, 2.2, 3.0)];
    scattered(
        run,
        &mut all,
        "rand-read-1",
        "random 4 KiB read of a snapshot, depth 1, O_DIRECT",
        1,
        &one,
    );
    scattered(
        run,
        &mut all,
        "rand-read-16",
        "random 4 KiB read of a snapshot, depth 16, O_DIRECT",
        16,
        &sixteen,
    );
    for contender in &all {
        run.note_wrong(contender, "with nothing overwritten");
        if contender.name == OURS {
            crate::driver::check_whole(&contender.read, 0..size, 0);
        }
    }
}

fn cpu_row(id: &'static str, must: f64, goal: f64) -> Row {
    Row::new(
        id,
        match id {
            "cpu-direct" => {
                "CPU seconds per GiB of sequential snapshot read, O_DIRECT, reader included"
            }
            _ => {
                "CPU seconds per GiB of sequential snapshot read, through the page cache, reader included"
            }
        },
        "s/GiB",
        &[at_most(QSD, must, goal)],
    )
}

/// Reads in order, once.
pub fn pass(contender: &mut Contender, source: &Path, size: u64, way: Way) -> Pass {
    ready(source, size);
    // The raw file is the source, whose pages shall stay.
    if contender.name != RAW {
        forget(&contender.read);
        if contender.name.starts_with(OURS) {
            assert_eq!(cached(&contender.read).unwrap_or(0), 0, "pages are left");
        }
    }
    let request = contender.request;
    if way == Way::Again {
        read_in_order(&contender.read, 0..size, request, false);
    }
    let direct = way == Way::Direct && contender.direct;
    let before = contender.cpu() + cpu_of("self");
    let pass = read_in_order(&contender.read, 0..size, request, direct);
    let used = contender.cpu() + cpu_of("self") - before;
    let took = match contender.is_peer() {
        true => pass.took,
        false => pass.right(&contender.read),
    };
    contender.wrong += u64::from(pass.wrong.is_some());
    Pass {
        rate: rate(size, took),
        cpu: used * (1 << 30) as f64 / size as f64,
    }
}

/// One row of reads in order, and perhaps one of what they cost.
fn in_order(
    run: &mut Run,
    all: &mut [Contender],
    source: &Path,
    mut row: Row,
    way: Way,
    mut cpu: Option<Row>,
) {
    if !run.wants(row.id) && !cpu.as_ref().is_some_and(|cpu| run.wants(cpu.id)) {
        return;
    }
    let size = run.options.size;
    run.turns(
        all,
        |contender, _| pass(contender, source, size, way),
        |name, pass| {
            row.add(name, pass.rate);
            // The kernel threads behind a loop device are not in it.
            if let Some(cpu) = &mut cpu
                && name != crate::contender::LOOP
            {
                cpu.add(name, pass.cpu);
            }
        },
    );
    run.done(row);
    if let Some(cpu) = cpu {
        run.done(cpu);
    }
}

fn scattered(
    run: &mut Run,
    all: &mut [Contender],
    id: &'static str,
    title: &'static str,
    depth: usize,
    claims: &[Claim],
) {
    if !run.wants(id) {
        return;
    }
    let mut row = Row::new(id, title, "reads/s", claims);
    let size = run.options.size;
    let count = size / (if depth == 1 { 64 } else { 16 } * KIB);
    run.turns(
        all,
        |contender, round| {
            let offsets = mixed(size, PAGE, round as u64);
            // Behind a loop device pages gather in its own cache.
            if contender.name != RAW {
                forget(&contender.read);
            }
            Scattered {
                path: &contender.read,
                offsets: &offsets[..count as usize],
                request: PAGE,
                depth,
                write: false,
                direct: contender.direct,
            }
            .run(&run.options)
        },
        |name, value| row.add(name, value),
    );
    run.done(row);
}
