//! What must not depend on how much there is: offset, size, number of snapshots.

use crate::contender::{Contender, OURS};
use crate::content::{PAGE, mixed};
use crate::driver::{Scattered, make_source, read_in_order, settle, warm};
use crate::report::{Row, at_least, at_most};
use crate::rig::touch;
use crate::run::{Run, Sources};

use super::{MIB, delete, overwrite_half, rate, unique};

pub const IDS: [&str; 3] = ["hundred-snapshots", "far-offset", "thousand-snapshots"];

const ONE: &str = "stillframe, 1 snapshot";
const NEAR: &str = "stillframe, at the start";
const TEBIBYTE: u64 = 1 << 40;

pub fn measure(run: &mut Run) {
    if run.wants(IDS[0]) {
        hundred(run);
    }
    if run.wants(IDS[1]) {
        far(run);
    }
    if run.wants(IDS[2]) {
        thousand(run);
    }
}

/// Takes snapshots with a few writes between them.
fn take(ours: &mut Contender, count: u64, size: u64) {
    let places = mixed(size, PAGE, 77);
    for number in 0..count {
        let at = number as usize * 4 % places.len();
        Scattered {
            path: &ours.live,
            offsets: &places[at..(at + 4).min(places.len())],
            request: PAGE,
            depth: 1,
            write: true,
            direct: true,
        }
        .by_threads();
        touch(&ours.rig().snapshot("disk", &format!("t{number}"))).unwrap();
    }
}

/// First overwrites, and so the dearest kind of write, with 100 snapshots and with one.
fn hundred(run: &mut Run) {
    let mut row = Row::new(
        IDS[0],
        "time of a random 4 KiB first overwrite, depth 1, with 100 snapshots held",
        "us",
        &[at_most(ONE, 1.1, 1.02)],
    );
    let (sources, size) = (Sources::new(), run.options.size.min(256 * MIB));
    let mut many = Contender::ours(
        &sources.make_for_writes("many.img", size, &run.options),
        true,
    );
    // Two more are there while it is measured.
    take(&mut many, if run.options.small { 3 } else { 98 }, size);
    let mut one = Contender::ours(
        &sources.make_for_writes("one.img", size, &run.options),
        false,
    );
    one.name = ONE;
    let mut all = [many, one];
    run.turns(
        &mut all,
        |contender, round| {
            touch(&contender.rig().snapshot("disk", "now")).unwrap();
            let mut offsets = mixed(size, PAGE, 500 + round as u64);
            offsets.truncate(if run.options.small { 128 } else { 4096 });
            let rate = Scattered {
                path: &contender.live,
                offsets: &offsets,
                request: PAGE,
                depth: 1,
                write: true,
                direct: true,
            }
            .run(&run.options);
            settle(&contender.behind);
            delete(contender.rig(), "now");
            1e6 / rate
        },
        |name, value| row.add(name, value),
    );
    run.done(row);
}

/// The same content, half of it preserved, at the start of a volume and at 1 TiB.
fn far(run: &mut Run) {
    let mut row = Row::new(
        IDS[1],
        "sequential read of a snapshot at 1 TiB, half of it preserved, O_DIRECT, 1 MiB requests",
        "MiB/s",
        &[at_least(NEAR, 0.9, 0.97)],
    );
    let (sources, size) = (Sources::new(), run.options.size);
    let mut all = Vec::new();
    for (name, start) in [(OURS, TEBIBYTE), (NEAR, 0)] {
        let source = sources.at(&format!("at-{start}.img"));
        make_source(&source, start + size, start..start + size);
        let mut ours = Contender::ours(&source, true);
        ours.name = name;
        overwrite_half(&ours, start..start + size);
        assert!(unique(ours.rig(), "s0") >= size / 2, "it is not preserved");
        all.push(ours);
    }
    run.turns(
        &mut all,
        |contender, _| {
            let start = if contender.name == OURS { TEBIBYTE } else { 0 };
            let range = start..start + size;
            warm(&contender.behind[0], range.clone());
            rate(
                size,
                read_in_order(&contender.read, range, MIB, true).right(&contender.read),
            )
        },
        |name, value| row.add(name, value),
    );
    run.done(row);
}

/// The oldest of 1,000 snapshots, and the only one.
fn thousand(run: &mut Run) {
    let mut row = Row::new(
        IDS[2],
        "sequential read of the oldest of 1,000 snapshots, half of it preserved, O_DIRECT, 1 MiB requests",
        "MiB/s",
        &[at_least(ONE, 0.9, 0.97)],
    );
    let (sources, size) = (Sources::new(), run.options.size.min(512 * MIB));
    let count = if run.options.small { 6 } else { 999 };
    let mut all = Vec::new();
    for (name, more) in [(OURS, count), (ONE, 0)] {
        let source = sources.make(&format!("of-{more}.img"), size);
        let mut ours = Contender::ours(&source, true);
        ours.name = name;
        take(&mut ours, more, size);
        // In the last epoch, so that the plan of the oldest has all the others to look through. Who has no others
        // gets the same writes.
        if more == 0 {
            let places = mixed(size, PAGE, 77);
            let count = (count as usize * 4).min(places.len());
            Scattered {
                path: &ours.live,
                offsets: &places[..count],
                request: PAGE,
                depth: 1,
                write: true,
                direct: true,
            }
            .by_threads();
        }
        overwrite_half(&ours, 0..size);
        all.push(ours);
    }
    run.turns(
        &mut all,
        |contender, _| {
            warm(&contender.behind[0], 0..size);
            rate(
                size,
                read_in_order(&contender.read, 0..size, MIB, true).right(&contender.read),
            )
        },
        |name, value| row.add(name, value),
    );
    run.done(row);
}
