//! Power cuts on real filesystems.
//!
//! Goal: whenever the power goes, whatever part of what was not yet flushed a device has kept, in
//! whatever order: the filesystem mounts, the store opens without help, every acknowledged snapshot is
//! exact, every flushed byte is there, nothing deleted comes back, and no diff misses a change.
//!
//! Method: store and sources lie on ext4, XFS or btrfs, on one device or two, which record every write,
//! discard and flush ([`disks`]). A random history runs over the engine with real files and the real
//! index ([`workload`], [`machine`]) while the kernel writes back at any moment ([`shaker`]); how far the
//! record had come is noted at each acknowledgement ([`model`]). Then states are made of the record
//! ([`crash`]), mounted ([`filesystems`]), opened and compared ([`verify`]); of some the recovery is
//! recorded, too, and cut again ([`trace`]).
//!
//! `docs/testing.md`, section 8, says what was run and how to run more.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set its stage has failed"
)]

mod campaign;
mod crash;
mod daemon;
mod disks;
mod filesystems;
mod machine;
mod model;
#[path = "../rig/mod.rs"]
mod rig;
mod shaker;
#[path = "../rig/sim.rs"]
mod sim;
mod trace;
mod verify;
mod workload;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::campaign::Campaign;
use crate::crash::Fate;
use crate::disks::Farm;
use crate::filesystems::{KINDS, Kind, Layout, program};
use crate::rig::{Chance, setting};
use crate::trace::{By, Findings, Trace};

/// Farms at work at once: a state mostly waits.
const WORKERS: u64 = 4;

fn workers() -> u64 {
    setting("STILLFRAME_POWER_WORKERS", WORKERS)
}

/// Whether this machine can do it; says why not.
fn can_run() -> bool {
    if !rig::can_mount() || !rig::can_loop() {
        return false;
    }
    let tools = KINDS.map(|kind| format!("mkfs.{}", kind.name()));
    match tools.iter().find(|tool| program(tool).is_none()) {
        Some(tool) => rig::skip(&format!("no {tool}")),
        None => {
            disks::sweep();
            true
        }
    }
}

fn verdict(what: &str, seed: u64, began: Instant, findings: &Findings) {
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "{what}, seed {seed}: {} states in {seconds:.0} s ({:.0} ms each), {} violations",
        findings.states,
        seconds * 1000.0 / findings.states.max(1) as f64,
        findings.violations.len()
    );
    println!("{:#?}", findings.counts);
    let first: Vec<_> = findings.violations.iter().take(5).collect();
    assert!(first.is_empty(), "the first violations: {first:#?}");
}

/// Random states of random histories, each on a layout of its own.
#[test]
fn any_part_of_what_was_not_flushed_may_be_lost() {
    if !can_run() {
        return;
    }
    let began = Instant::now();
    let mut campaign = Campaign::new();
    let findings = campaign.run(workers());
    verdict("power cuts", campaign.seed, began, &findings);
    if campaign.was_whole() {
        let reached = |what: &str, least: u64| {
            let n = findings.counts.get(what).copied().unwrap_or(0);
            assert!(n >= least, "{what}: only {n}");
        };
        reached("something was not flushed", findings.states / 3);
        reached("unflushed writes were lost", findings.states / 4);
        reached("map kept", findings.states / 2);
        reached("an operation was under way", findings.states / 4);
        reached("cut while it was recovered", findings.states / 100);
        reached("snapshots compared", findings.states);
        reached("clones compared", findings.states);
        reached("diffs compared", findings.states);
    }
}

/// The same with the daemon: a history through its mount, and states that it is started on.
#[test]
fn the_daemon_starts_on_what_a_power_cut_leaves() {
    if !can_run() {
        return;
    }
    let began = Instant::now();
    let (seed, rounds) = (campaign::seed(), setting("STILLFRAME_POWER_DAEMON", 1));
    println!("seed {seed}");
    let mut farm = Farm::new();
    let mut findings = Findings::default();
    for round in 0..rounds {
        let mut chance = Chance(seed ^ round);
        let layout = Layout::number(setting("STILLFRAME_POWER_LAYOUT", seed % 6 + round));
        let operations = |done, _| done >= 60;
        let trace = Trace::new(&mut farm, layout, By::Daemon, chance.next(), operations);
        let mut replay = trace.replay();
        for (n, at) in trace.cuts(&mut chance, 25).into_iter().enumerate() {
            replay.advance(at);
            let cut = trace.cut(&replay, None, &mut chance);
            match n % 4 {
                0 => trace.check_by_daemon(&mut farm, &cut, &mut findings),
                _ => trace.check(&mut farm, &cut, &mut chance, &mut findings),
            }
        }
    }
    verdict("power cuts of the daemon", seed, began, &findings);
    let mounted = findings.counts.get("read through the mount");
    assert!(mounted.is_some_and(|&n| n >= rounds * 5));
}

/// Each prefix of what the devices were told, in order: a machine whose devices have no cache.
#[test]
fn every_prefix_of_a_history_can_be_recovered() {
    if !can_run() {
        return;
    }
    let began = Instant::now();
    let writes = setting("STILLFRAME_POWER_PREFIXES", 40) as usize;
    let seed = campaign::seed();
    let layout = Layout::number(setting("STILLFRAME_POWER_LAYOUT", seed % 6));
    let mut farm = Farm::new();
    let trace = Trace::new(&mut farm, layout, By::Library, seed, |_, told| {
        told >= writes
    });
    let range = trace.range();
    assert!(trace.writes() >= writes, "only {}", trace.writes());
    // One filesystem's copies cannot be mounted at once on btrfs.
    let workers = match layout.kinds().contains(&Kind::Btrfs) {
        true => 1,
        false => workers() as usize,
    };
    let found = Mutex::new(Findings::default());
    let next = AtomicUsize::new(range.start);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                let (mut farm, mut replay) = (Farm::new(), trace.replay());
                let mut findings = Findings::default();
                let mut chance = Chance(seed);
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at > range.end {
                        break;
                    }
                    replay.advance(at);
                    let cut = trace.cut(&replay, Some(Fate::Prefix), &mut chance);
                    trace.check(&mut farm, &cut, &mut chance, &mut findings);
                }
                found.lock().unwrap().add(findings);
            });
        }
    });
    let findings = found.into_inner().unwrap();
    assert_eq!(findings.states as usize, range.len() + 1);
    println!("{}: {} writes and discards", layout.name(), trace.writes());
    verdict("every prefix", seed, began, &findings);
}
