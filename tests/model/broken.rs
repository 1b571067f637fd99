//! Disks that break their promises: writes into the log that are acknowledged, synced and never stored,
//! or stored elsewhere.
//!
//! Goal: never a wrong byte. What the damaged records cover is refused or failed, in one line; the live
//! volumes stay whole and readable; no snapshot and no clone vanishes.
//!
//! Method: as for the loops over failing I/Os, on the n-th write into the log. Such a write is found out
//! by what follows it, so each trace goes on for a while and is sealed before the daemon is killed; a
//! lost last write of a log is what no log without a second disk can tell from none. Sources have no
//! checksums of ours, so they are spared.

use stillframe::error::Kind;
use stillframe::sys::sim::{Fault, What};

use crate::Run;
use crate::army::Here;
use crate::campaign::{Campaign, Counts};
use crate::faults::{furnished, one_line};
use crate::rig::Chance;

/// Operations of a trace.
const OPERATIONS: u64 = 8;

impl Run {
    /// Every snapshot and clone the model knows is listed.
    pub fn nothing_is_missing(&self, what: &str) {
        for model in &self.volumes {
            let listed = self.engine.snapshots(&model.name).expect("it is there");
            let gone = |name: &&String| !listed.iter().any(|s| s.name.as_str() == **name);
            let gone: Vec<&String> = model.snapshots.keys().filter(gone).collect();
            assert!(gone.is_empty(), "{what}: snapshots {gone:?} vanished");
            let listed = self.engine.clones(&model.name).expect("it is there");
            let gone = |name: &&String| !listed.iter().any(|c| c.name.as_str() == **name);
            let gone: Vec<&String> = model.clones.keys().filter(gone).collect();
            assert!(gone.is_empty(), "{what}: clones {gone:?} vanished");
        }
    }

    /// Everything the model knows is listed, and the live volumes are whole.
    fn nothing_vanished(&self, what: &str, counts: &mut Counts) {
        self.nothing_is_missing(what);
        for model in &self.volumes {
            let volume = self.engine.volume(&model.name).expect("it is there");
            let size = volume.size().min(model.live.size) as usize;
            let mut bytes = vec![0; size];
            let read = volume.read_at(0, &mut bytes);
            assert!(read.is_ok(), "{what}: live: {read:?}");
            assert_eq!(bytes, model.live.content.read(0, size), "{what}: live");
            counts.add("live volumes whole");
        }
    }
}

fn broken(seed: u64, every: u64) -> Counts {
    let mut counts = Counts::default();
    let mut here = Here(String::new());
    let base = furnished(seed);
    let mut chance = Chance(seed ^ 0xb0b0);
    for what in [What::Lost, What::Misdirected] {
        for _ in 0..6 {
            let trace = chance.next();
            let mut n = 1 + chance.below(every);
            loop {
                let named =
                    format!("STILLFRAME_BROKEN_SEED={seed}: {what:?} at {n}, trace {trace}");
                here.0.clone_from(&named);
                let mut run = base.fork(trace);
                crate::army::begun();
                run.reopen();
                run.settle(None, false);
                run.dying = true;
                run.faulty = true;
                run.world.inject(Fault {
                    what,
                    ops: &[],
                    under: "store/log",
                    nth: n,
                    lasting: false,
                });
                for _ in 0..OPERATIONS {
                    if let Err(e) = run.any_operation() {
                        // What it needed was in what was lost.
                        one_line(&named, &e);
                        counts.add("operations refused");
                        break;
                    }
                }
                for _ in 0..4 {
                    if let Err(e) = run.background() {
                        one_line(&named, &e);
                        counts.add("background work refused");
                    }
                }
                if run.world.struck() == 0 {
                    break;
                }
                run.nothing_is_wrong(&named, &mut counts);
                if run.under_way.is_none() {
                    run.world.kill();
                    run.index.kill(trace);
                    if chance.below(2) == 0 {
                        run.index.lose();
                    }
                    match run.try_reopen() {
                        Ok(()) => {
                            run.nothing_is_wrong(&named, &mut counts);
                            run.nothing_vanished(&named, &mut counts);
                            counts.add("opened");
                        }
                        Err(e) => {
                            one_line(&named, &e);
                            assert_eq!(e.kind(), Kind::Damaged, "{named}: {}", e.chain());
                            counts.add("not opened");
                        }
                    }
                }
                counts.states += 1;
                counts.add(if what == What::Lost {
                    "lost"
                } else {
                    "misdirected"
                });
                n += every;
            }
            counts.moments += 1;
        }
    }
    counts
}

/// A sample in CI; a campaign takes every write.
#[test]
fn a_disk_that_breaks_its_promises_gives_no_wrong_byte() {
    let campaign = Campaign::of("BROKEN", 300, 1);
    let every = if campaign.is_default() { 2 } else { 1 };
    let done = campaign.run(|seed| broken(seed, every));
    println!("{done}");
    if done.full_share() {
        for what in [
            "lost",
            "misdirected",
            "opened",
            "pages refused while disks fail",
        ] {
            assert!(
                done.counts.of(what) >= 3,
                "only {} of {what}",
                done.counts.of(what)
            );
        }
    }
}
