//! Writes with no snapshot, everybody to one file; and writes to blocks that are preserved already, against those.

use crate::contender::{Contender, OURS, QSD};
use crate::content::{PAGE, mixed};
use crate::driver::{Scattered, check_whole, ready, write_in_order};
use crate::report::{Claim, Row, at_least};
use crate::run::{Run, Sources};

use super::{MIB, rate, unique};

pub const IDS: [&str; 8] = [
    "plain-4k-1",
    "plain-4k-1-direct",
    "plain-4k-16",
    "plain-seq",
    "plain-seq-direct",
    "rewrite-4k-1",
    "rewrite-4k-16",
    "rewrite-seq",
];

const NO_SNAPSHOT: &str = "stillframe, no snapshot";

pub fn measure(run: &mut Run) {
    if IDS[..5].iter().any(|id| run.wants(id)) {
        with_no_snapshot(run);
    }
    if IDS[5..].iter().any(|id| run.wants(id)) {
        rewrites(run);
    }
}

fn with_no_snapshot(run: &mut Run) {
    let (sources, size) = (Sources::new(), run.options.size);
    let source = sources.make_for_writes("disk.img", size, &run.options);
    let mut all = vec![Contender::raw(&source), Contender::ours(&source, false)];
    let peers = &mut run.peers;
    all.extend(peers.plain(&source, false, true));
    all.extend(peers.plain(&source, true, true));
    all.extend(peers.nbd(&source, false, true));
    all.extend(peers.loop_device(&source, true));
    let small = "writes with no snapshot, random 4 KiB, depth 1";
    let claims = [at_least(QSD, 1.8, 2.3)];
    scattered(run, &mut all, size, (IDS[0], small), (1, false), &claims);
    let small = "writes with no snapshot, random 4 KiB, depth 1, O_DIRECT";
    scattered(run, &mut all, size, (IDS[1], small), (1, true), &claims);
    let deep = "writes with no snapshot, random 4 KiB, depth 16, O_DIRECT";
    let claims = [at_least(QSD, 1.8, 2.6)];
    scattered(run, &mut all, size, (IDS[2], deep), (16, true), &claims);
    let long = "writes with no snapshot, sequential 1 MiB";
    let claims = [at_least(QSD, 1.4, 1.9)];
    in_order(run, &mut all, size, (IDS[3], long), false, &claims);
    let long = "writes with no snapshot, sequential 1 MiB, O_DIRECT";
    in_order(run, &mut all, size, (IDS[4], long), true, &claims);
}

fn rewrites(run: &mut Run) {
    let (sources, size) = (Sources::new(), run.options.size.min(64 * MIB));
    let mut kept = Contender::ours(
        &sources.make_for_writes("kept.img", size, &run.options),
        true,
    );
    write_in_order(&kept.live, 0..size, MIB, true);
    assert!(unique(kept.rig(), "s0") >= size, "it is not preserved");
    let mut plain = Contender::ours(
        &sources.make_for_writes("plain.img", size, &run.options),
        false,
    );
    plain.name = NO_SNAPSHOT;
    let mut all = [kept, plain];
    let claims = [at_least(NO_SNAPSHOT, 0.9, 0.97)];
    let small = "rewrite of already preserved blocks, random 4 KiB, depth 1";
    scattered(run, &mut all, size, (IDS[5], small), (1, true), &claims);
    let deep = "rewrite of already preserved blocks, random 4 KiB, depth 16";
    scattered(run, &mut all, size, (IDS[6], deep), (16, true), &claims);
    let long = "rewrite of already preserved blocks, sequential 1 MiB";
    in_order(run, &mut all, size, (IDS[7], long), true, &claims);
    check_whole(&all[0].read, 0..size, 0);
}

fn scattered(
    run: &mut Run,
    all: &mut [Contender],
    size: u64,
    (id, title): (&'static str, &'static str),
    (depth, direct): (usize, bool),
    claims: &[Claim],
) {
    if !run.wants(id) {
        return;
    }
    let mut row = Row::new(id, title, "writes/s", claims);
    let most = match (run.options.small, depth) {
        (true, _) => 256,
        (_, 1) => 16384,
        _ => 65536,
    };
    run.turns(
        all,
        |contender, round| {
            ready(&contender.behind[0], size);
            let mut offsets = mixed(size, PAGE, round as u64);
            offsets.truncate(most);
            Scattered {
                path: &contender.live,
                offsets: &offsets,
                request: PAGE,
                depth,
                write: true,
                direct: direct && contender.direct,
            }
            .run(&run.options)
        },
        |name, value| row.add(name, value),
    );
    run.done(row);
}

fn in_order(
    run: &mut Run,
    all: &mut [Contender],
    size: u64,
    (id, title): (&'static str, &'static str),
    direct: bool,
    claims: &[Claim],
) {
    if !run.wants(id) {
        return;
    }
    let mut row = Row::new(id, title, "MiB/s", claims);
    run.turns(
        all,
        |contender, _| {
            ready(&contender.behind[0], size);
            let took = write_in_order(&contender.live, 0..size, MIB, direct && contender.direct);
            rate(size, took)
        },
        |name, value| row.add(name, value),
    );
    assert!(row.samples.iter().any(|samples| samples.contender == OURS));
    run.done(row);
}
