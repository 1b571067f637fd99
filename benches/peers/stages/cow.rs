//! First overwrites: each write is the first one of its 64 KiB since the snapshot.
//!
//! 64 KiB is the unit in which qemu copies before a write; ours is a grain of 4 KiB. Every measurement begins with a
//! new snapshot, for the peers with a new process and an empty target, and that old content was really put aside is
//! read from where it went. What is written is never what is there. Ours makes old content durable before it lets the new
//! one go to the source; neither peer does. At the end the oldest snapshot is compared, whole.

use std::path::{Path, PathBuf};

use crate::contender::{Contender, FLEECING, FLEECING_URING, NBD_COW, OURS, RAW, fleecing, nbd};
use crate::content::{PAGE, mixed};
use crate::driver::{Scattered, check_whole, ready, settle};
use crate::report::{Claim, Row, at_least, under};
use crate::rig::touch;
use crate::run::{Run, Sources};

use super::{KIB, MIB, allocated, delete};

pub const IDS: [&str; 6] = [
    "cow-4k-1",
    "cow-4k-1-direct",
    "cow-4k-16",
    "cow-64k-1",
    "cow-64k-1-direct",
    "cow-space",
];

const COPIED: u64 = 64 * KIB;

struct Work {
    id: &'static str,
    title: &'static str,
    request: u64,
    depth: usize,
    /// Most writes of a measurement.
    most: usize,
    direct: bool,
    claims: [Claim; 1],
}

pub fn measure(run: &mut Run) {
    if IDS[..5].iter().any(|id| run.wants(id)) {
        against_peers(run);
    }
    if run.wants("cow-space") {
        space(run);
    }
}

/// Depth 1 in two ways: peers are faster past the page cache of their mount, and tools do not go past it.
fn works() -> [Work; 5] {
    let work = |id, title, request, depth, most, direct, must, goal| Work {
        id,
        title,
        request,
        depth,
        most,
        direct,
        claims: [at_least(FLEECING, must, goal)],
    };
    let small = "random 4 KiB first overwrite, depth 1, durable order kept";
    let small_direct = "random 4 KiB first overwrite, depth 1, O_DIRECT, durable order kept";
    let deep = "random 4 KiB first overwrite, depth 16, O_DIRECT, durable order kept";
    let large = "random 64 KiB first overwrite, depth 1, durable order kept";
    let large_direct = "random 64 KiB first overwrite, depth 1, O_DIRECT, durable order kept";
    [
        work("cow-4k-1", small, PAGE, 1, 8192, false, 1.0, 2.0),
        work(
            "cow-4k-1-direct",
            small_direct,
            PAGE,
            1,
            8192,
            true,
            1.0,
            2.0,
        ),
        work("cow-4k-16", deep, PAGE, 16, 16384, true, 1.0, 1.5),
        work("cow-64k-1", large, COPIED, 1, 4096, false, 1.2, 1.9),
        work(
            "cow-64k-1-direct",
            large_direct,
            COPIED,
            1,
            4096,
            true,
            1.2,
            1.9,
        ),
    ]
}

fn against_peers(run: &mut Run) {
    let (sources, size) = (Sources::new(), run.options.size);
    let mut all = vec![
        Contender::raw(&sources.make_for_writes("raw.img", size, &run.options)),
        Contender::ours(
            &sources.make_for_writes("ours.img", size, &run.options),
            true,
        ),
    ];
    let source = sources.make_for_writes("fleecing.img", size, &run.options);
    all.extend(run.peers.fleecing(&source, false));
    let source = sources.make_for_writes("uring.img", size, &run.options);
    all.extend(run.peers.fleecing(&source, true));
    let source = sources.make_for_writes("nbd.img", size, &run.options);
    all.extend(run.peers.nbd(&source, true, true));
    for work in works() {
        if !run.wants(work.id) {
            continue;
        }
        let mut row = Row::new(work.id, work.title, "writes/s", &work.claims);
        run.turns(
            &mut all,
            |contender, round| once(run, contender, &work, round),
            |name, value| row.add(name, value),
        );
        run.done(row);
    }
    let ours = all.iter().find(|contender| contender.name == OURS);
    check_whole(&ours.expect("it is always there").read, 0..size, 0);
}

/// One measurement, with a new snapshot of whoever has snapshots.
fn once(run: &Run, contender: &mut Contender, work: &Work, round: usize) -> f64 {
    let mut offsets = mixed(run.options.size, COPIED, round as u64 + 1000);
    offsets.truncate(work.most);
    let offsets = &offsets[..];
    let source: PathBuf = contender.behind[0].clone();
    let again = |made: Result<Contender, String>| made.unwrap_or_else(|e| panic!("{e}"));
    ready(&source, run.options.size);
    let snapshot = format!("now-{}-{round}", work.id);
    let mut before = 0;
    match contender.name {
        OURS => {
            touch(&contender.rig().snapshot("disk", &snapshot)).unwrap();
            before = preserved(contender);
        }
        RAW => {}
        NBD_COW => *contender = again(nbd(NBD_COW, &source, true, true)),
        name => *contender = again(fleecing(name, &source, name == FLEECING_URING)),
    }
    let value = Scattered {
        path: &contender.live,
        offsets,
        request: work.request,
        depth: work.depth,
        write: true,
        direct: work.direct && contender.direct,
    }
    .run(&run.options);
    let count = offsets.len() as u64;
    match contender.name {
        OURS => {
            let kept = preserved(contender) - before;
            assert!(kept >= count * work.request, "only {kept} bytes are kept");
            // To wait for what is reclaimed takes up to a second, and with small input nobody is to be spared.
            if !run.options.small {
                settle(&contender.behind);
                delete(contender.rig(), &snapshot);
            }
        }
        FLEECING | FLEECING_URING => {
            settle(&contender.behind);
            let copied = allocated(&contender.behind[1]);
            assert!(copied >= count * COPIED, "only {copied} bytes are copied");
        }
        _ => {}
    }
    value
}

/// Preserved bytes, all of them.
fn preserved(contender: &mut Contender) -> u64 {
    let status = super::status(contender.rig());
    super::volume_of(&status, "disk")["used"].as_u64().unwrap()
}

/// What the store grows by, with everything that is in it, between two clean stops.
fn space(run: &mut Run) {
    let mut row = Row::new(
        "cow-space",
        "added space per random 4 KiB first overwrite at depth 16",
        "KiB",
        &[under(6.0, 4.5)],
    );
    let (sources, size) = (Sources::new(), run.options.size);
    let source = sources.make_for_writes("space.img", size, &run.options);
    let mut ours = Contender::ours(&source, true);
    let offsets = mixed(size, COPIED, 5);
    for _ in 0..run.options.rounds.min(3) {
        run.check_interrupt();
        touch(&ours.rig().snapshot("disk", "now")).unwrap();
        let before = stopped(&mut ours);
        Scattered {
            path: &ours.live,
            offsets: &offsets,
            request: PAGE,
            depth: 16,
            write: true,
            direct: true,
        }
        .as_measured(&run.options);
        let grown = stopped(&mut ours).saturating_sub(before);
        row.add(OURS, grown as f64 / KIB as f64 / offsets.len() as f64);
        delete(ours.rig(), "now");
    }
    run.done(row);
}

/// What the store takes after a clean stop; it is served again after that.
fn stopped(ours: &mut Contender) -> u64 {
    let rig = ours.rig();
    rig.umount();
    let taken = taken(&rig.store());
    rig.mount();
    ours.pids = vec![ours.rig().pid()];
    taken
}

fn taken(store: &Path) -> u64 {
    // The ballast is there before and after, or comes back.
    let all = allocated(store);
    all - allocated(&store.join("ballast")).min(all).min(8 * MIB)
}
