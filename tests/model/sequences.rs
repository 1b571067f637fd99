//! All short sequences of operations, and a crash at every I/O of the last one.
//!
//! Goal: what random histories might miss. Every sequence of a given length of writes (of one place, of
//! another, across both), flush, discard, zeroing, snapshot, deletion (also for a bookmark), revert,
//! clone, write to a clone, resize, background work, kill and power cut is done from several starts; the
//! last operation is cut off at its 1st, 2nd, 3rd... changing I/O and after its end; each time several
//! forks resolve what is in doubt, by a kill or a power cut, and are compared with the model.
//!
//! In CI the length is 2; `STILLFRAME_SEQUENCES_LENGTH=3` is the campaign. A failure names its sequence.

use std::sync::atomic::{AtomicUsize, Ordering};

use stillframe::error::Result;
use stillframe::volume::Zeroing;

use crate::Run;
use crate::army::{Here, state};
use crate::campaign::Counts;
use crate::shape::Shape;

/// Resolutions of one moment.
const PER_MOMENT: u64 = 6;

type Operation = fn(&mut Run) -> Result<()>;

/// Two places: `a` is aligned, `b` is not and reaches into the grain behind it.
const A: u64 = 4096;
const B: u64 = 9000;

const OPERATIONS: &[(&str, Operation)] = &[
    ("write a", |run| run.write_tag(A, 4096)),
    ("write b", |run| run.write_tag(B, 5000)),
    ("write both", |run| run.write_tag(A + 512, 9000)),
    ("flush", |run| run.flush(0)),
    ("discard a", |run| {
        run.zero_range(0, A, 4096, Zeroing::Discard)
    }),
    ("zero b", |run| run.zero_range(0, B, 700, Zeroing::Zero)),
    ("snapshot", |run| run.snapshot_of(&[0])),
    ("snapshot both", |run| run.snapshot_of(&[0, 1])),
    ("delete", |run| run.delete_one(false)),
    ("delete for a bookmark", |run| run.delete_one(true)),
    ("revert", |run| {
        let Some(name) = run.newest() else {
            return Ok(());
        };
        run.revert_to(0, &name)
    }),
    ("clone", |run| run.make_clone_of(0, false)),
    ("write clone", |run| {
        let Some(name) = run.volumes[0].clones.keys().next().cloned() else {
            return Ok(());
        };
        let data = run.tag(5000);
        run.clone_write_these(0, &name, B, &data, false)
    }),
    ("grow", |run| run.resize_to(0, 50_000)),
    ("shrink", |run| run.resize_to(0, 12_800)),
    ("maintain", |run| run.background()),
    ("kill", |run| run.end(false)),
    ("power cut", |run| run.end(true)),
];

/// What there is before a sequence: content; with a snapshot, changed since; with a clone of it, too.
const STARTS: &[(&str, &[usize])] = &[
    ("content", &[]),
    ("a snapshot", &[6, 0]),
    ("a bookmark", &[6, 0, 9]),
    ("a clone", &[6, 1, 11, 12, 0]),
];

impl Run {
    fn tag(&mut self, len: u64) -> Vec<u8> {
        let tag = (self.chance.next() | 1).to_le_bytes();
        tag.iter().copied().cycle().take(len as usize).collect()
    }

    fn write_tag(&mut self, offset: u64, len: u64) -> Result<()> {
        let size = self.volumes[0].live.size;
        let data = self.tag(len.min(size - offset));
        self.write_these(0, offset, &data, false)
    }

    /// The newest snapshot of the first volume.
    fn newest(&self) -> Option<String> {
        let snapshots = self.volumes[0].snapshots.iter();
        let newest = snapshots.max_by_key(|(_, point)| point.instant);
        newest.map(|(name, _)| name.clone())
    }

    fn delete_one(&mut self, keep: bool) -> Result<()> {
        match self.newest() {
            Some(name) => self.delete_this(0, &name, keep, false),
            None => Ok(()),
        }
    }

    /// The end of this life and the next one.
    pub fn end(&mut self, power: bool) -> Result<()> {
        let chance = self.chance.next();
        match power {
            true => {
                self.world.power_cut();
                self.index.power_cut(chance);
            }
            false => {
                self.world.kill();
                self.index.kill(chance);
            }
        }
        self.try_reopen()?;
        self.settle(None, power);
        Ok(())
    }
}

/// The state that every sequence of a start begins with.
fn start(operations: &[usize], here: &mut Here) -> Run {
    let mut run = Run::new(7, Shape::small());
    run.dying = true;
    run.write_tag(0, 20_000).expect("nothing fails");
    run.flush(0).expect("nothing fails");
    for &operation in operations {
        here.0 = format!("preparing with {}", OPERATIONS[operation].0);
        OPERATIONS[operation].1(&mut run).expect("nothing fails");
    }
    run.fork(0)
}

/// Cuts the last of some operations off at each of its I/Os.
fn sequence(base: &Run, sequence: &[usize], seed: u64, counts: &mut Counts, here: &mut Here) {
    let head = here.0.clone();
    let (last, before) = sequence.split_last().expect("at least one");
    for n in 1.. {
        let mut run = base.fork(seed);
        run.reopen();
        run.settle(None, false);
        run.dying = true;
        for &operation in before {
            OPERATIONS[operation].1(&mut run).expect("nothing fails");
        }
        // These end a life by themselves; every eighth state cuts a recovery off.
        if !matches!(OPERATIONS[*last].0, "kill" | "power cut") {
            run.world.die_at(n);
        }
        let done = OPERATIONS[*last].1(&mut run);
        assert!(done.is_ok() || run.world.is_dead(), "{head}: {done:?}");
        if done.is_ok() {
            run.under_way = None;
        }
        let dead = run.world.is_dead();
        let interrupted = run.under_way.is_some();
        counts.moments += 1;
        counts.add(OPERATIONS[*last].0);
        for k in 0..PER_MOMENT {
            here.0 = format!("{head}, I/O {n}, state {k}");
            state(&run, interrupted, seed ^ (n << 32) ^ (k << 48), counts);
        }
        if !dead {
            break;
        }
    }
    here.0 = head;
}

/// All sequences of length 2, or of the length that is asked for.
#[test]
fn all_short_sequences_survive_a_crash_at_every_io() {
    let length = crate::env_u64("STILLFRAME_SEQUENCES_LENGTH").unwrap_or(2) as u32;
    let of_start = OPERATIONS.len().pow(length);
    let next = AtomicUsize::new(0);
    let work = || {
        let (mut counts, mut here) = (Counts::default(), Here(String::new()));
        let mut bases: Vec<Option<Run>> = STARTS.iter().map(|_| None).collect();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let (which, mut rest) = (number / of_start, number % of_start);
            let Some((what, operations)) = STARTS.get(which) else {
                return counts;
            };
            let base = bases[which].get_or_insert_with(|| start(operations, &mut here));
            let mut chosen = Vec::new();
            for _ in 0..length {
                chosen.push(rest % OPERATIONS.len());
                rest /= OPERATIONS.len();
            }
            let names: Vec<&str> = chosen.iter().map(|&o| OPERATIONS[o].0).collect();
            here.0 = format!("sequence {number}: {what}, {}", names.join(", "));
            sequence(base, &chosen, number as u64, &mut counts, &mut here);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut all = Counts::default();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            all.merge(&worker.join().expect("a sequence failed; it is named above"));
        }
    });
    println!(
        "SEQUENCES: length {length}, {} sequences, {} moments, {} states, 0 violations",
        of_start * STARTS.len(),
        all.moments,
        all.states
    );
    for (name, _) in OPERATIONS {
        assert!(
            all.of(name) >= (of_start / OPERATIONS.len()) as u64,
            "{name}"
        );
    }
}
