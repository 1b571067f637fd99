//! Reads of a snapshot of which every second piece of 64 KiB has been overwritten.
//!
//! Everybody has a source of his own, since everybody overwrites it; the raw file is another one like it. That half is
//! preserved is read from what the snapshots hold.
//!
//! Some releases of qemu (7.2 for one) return overwritten content where a request reaches over blocks that were copied and blocks
//! that were not. Such a peer is named, and what it was measured at stands: it is the faster for it. With O_DIRECT and
//! requests of 64 KiB, which are the blocks that it copies, it is right, and is measured so, too.

use crate::contender::{Contender, FLEECING, FLEECING_SHORT, OURS, RAW};
use crate::driver::check_whole;
use crate::report::{Row, at_least};
use crate::run::{Run, Sources};

use super::reads::{Way, pass};
use super::{KIB, allocated, overwrite_half, unique};

pub const IDS: [&str; 2] = ["half-direct", "half-first"];

pub fn measure(run: &mut Run) {
    let (sources, size) = (Sources::new(), run.options.size);
    let raw = sources.make("raw.img", size);
    let mut ours = Contender::ours(&sources.make("ours.img", size), true);
    overwrite_half(&ours, 0..size);
    assert!(unique(ours.rig(), "s0") >= size / 2, "it is not preserved");
    let mut all = vec![Contender::raw(&raw), ours];
    for (uring, name) in [(false, "fleecing.img"), (true, "uring.img")] {
        let source = sources.make(name, size);
        if let Some(peer) = run.peers.fleecing(&source, uring) {
            overwrite_half(&peer, 0..size);
            assert!(allocated(&peer.behind[1]) >= size / 2, "it is not copied");
            if !uring {
                all.push(peer.with_requests(FLEECING_SHORT, 64 * KIB));
            }
            all.push(peer);
        }
    }
    let claims = [at_least(FLEECING, 3.0, 4.0), at_least(RAW, 0.4, 0.55)];
    for (id, way, title) in [
        (
            "half-direct",
            Way::Direct,
            "sequential read of a snapshot, half of the blocks preserved, 64 KiB interleaved, O_DIRECT, 1 MiB requests",
        ),
        (
            "half-first",
            Way::First,
            "the same through the page cache, first time",
        ),
    ] {
        if !run.wants(id) {
            continue;
        }
        let mut row = Row::new(id, title, "MiB/s", &claims);
        run.turns(
            &mut all,
            |contender, _| {
                let source = contender.behind[0].clone();
                pass(contender, &source, size, way).rate
            },
            |name, value| row.add(name, value),
        );
        run.done(row);
        for contender in &mut all {
            run.note_wrong(contender, id);
            contender.wrong = 0;
        }
        // Through the page cache the kernel makes the requests.
        all.retain(|contender| contender.name != FLEECING_SHORT);
    }
    let ours = all.iter().find(|contender| contender.name == OURS);
    check_whole(&ours.expect("it is always there").read, 0..size, 0);
}
