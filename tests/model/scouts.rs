//! Scouts of the army: many kinds of moment, few states out of each, before it stays anywhere for long.
//!
//! Goal: whatever goes wrong with one kind of operation shows in the first few hundred states of a seed,
//! not when a long look at other moments is over.
//!
//! Method: several histories, one after another. Each starts with something of everything (snapshots, a
//! bookmark, a clone, often a clone of it) and lives and dies again and again. A deck holds every kind of
//! operation once and is dealt again when it is through. Each deal is prepared so that the operation has
//! something to do, happens, and is cut off at one of its I/Os or ends; then one or two crash states are
//! taken, and all diffs are compared, too. History goes on in one of these states, or as if nothing had been.

use std::ops::ControlFlow;

use stillframe::error::{Error, Result};
use stillframe::volume::Zeroing;

use crate::Run;
use crate::army::{Here, kind_of, state};
use crate::campaign::Counts;
use crate::rig::Chance;
use crate::shape::Shape;

/// States of the scouts of one seed.
pub const STATES: u64 = 512;

type Does = fn(&mut Run, usize) -> Result<()>;

/// A kind of operation.
struct Kind {
    name: &'static str,
    /// What leads up to it and is not cut off.
    before: Does,
    /// It may be cut off anywhere in here.
    what: Does,
}

const fn kind(name: &'static str, what: Does) -> Kind {
    Kind {
        name,
        before: |_, _| Ok(()),
        what,
    }
}

const fn after(before: Does, name: &'static str, what: Does) -> Kind {
    Kind { name, before, what }
}

/// Every kind of operation.
const DECK: &[Kind] = &[
    kind("write", |run, v| run.write(v)),
    kind("writes and a flush", |run, v| {
        run.write(v)?;
        run.write(v)?;
        run.flush(v)
    }),
    kind("write after a snapshot", |run, v| {
        run.snapshot_of(&[v])?;
        run.write(v)
    }),
    kind("write after a bookmark", |run, v| {
        run.bookmark_newest(v)?;
        run.write(v)
    }),
    kind("discard", |run, v| run.zero(v, Zeroing::Discard)),
    kind("zero", |run, v| run.zero(v, Zeroing::Zero)),
    kind("snapshot", |run, v| run.snapshot_of(&[v])),
    kind("snapshot of unflushed writes of both", |run, _| {
        run.write(0)?;
        run.write(1)?;
        run.snapshot_of(&[1, 0])
    }),
    kind("deletion", |run, v| run.delete(v)),
    kind("deletion and what follows it", |run, v| {
        run.delete(v)?;
        while run.engine.maintain()? {}
        run.write(v)
    }),
    kind("bookmark", |run, v| run.bookmark_newest(v)),
    kind("bookmark's deletion", |run, v| run.delete_bookmark(v)),
    kind("renaming", |run, v| run.rename(v)),
    kind("clone", |run, v| {
        run.make_clone_of(v, false)?;
        run.clone_write(v)
    }),
    kind("clone of a clone", |run, v| {
        run.clone_write(v)?;
        run.make_clone_of(v, true)?;
        for _ in 0..3 {
            run.clone_write(v)?;
        }
        Ok(())
    }),
    kind("clone's write", |run, v| run.clone_write(v)),
    kind("clone's write and flush", |run, v| {
        run.clone_write(v)?;
        run.clone_flush(v)
    }),
    kind("clone's zeroing", |run, v| run.clone_zero(v)),
    kind("clone's deletion", |run, v| run.delete_clone(v)),
    after(|run, v| run.write(v), "revert", |run, v| run.revert(v)),
    after(
        |run, v| run.write(v).and_then(|()| run.flush(v)),
        "revert of what was flushed",
        |run, v| run.revert(v).and_then(|()| run.write(v)),
    ),
    kind("resize", |run, v| run.resize(v)),
    kind("resize and writes", |run, v| {
        run.resize(v)?;
        run.write(v)?;
        run.flush(v)
    }),
    kind("background work", |run, _| run.background()),
    after(
        |run, _| run.delete_all(),
        "space given back",
        |run, _| {
            while run.engine.maintain()? {}
            Ok(())
        },
    ),
    kind("clean stop", |run, _| {
        run.stop();
        Ok(())
    }),
];

impl Run {
    /// Deletes the newest snapshot for a bookmark.
    fn bookmark_newest(&mut self, v: usize) -> Result<()> {
        while self.volumes[v].bookmarks.len() >= 3 {
            self.delete_bookmark(v)?;
        }
        if self.volumes[v].snapshots.is_empty() {
            self.snapshot_of(&[v])?;
        }
        let snapshots = self.volumes[v].snapshots.iter();
        let newest = snapshots.max_by_key(|(_, point)| point.instant);
        let newest = newest.expect("one was taken").0.clone();
        let keep = self.state_of(v, &newest).is_ok();
        self.delete_this(v, &newest, keep, false)
    }

    /// Deletes every snapshot, bookmark and clone.
    fn delete_all(&mut self) -> Result<()> {
        for v in 0..self.volumes.len() {
            while !self.volumes[v].clones.is_empty() {
                self.delete_clone(v)?;
            }
            while !self.volumes[v].snapshots.is_empty() {
                self.delete(v)?;
            }
            while !self.volumes[v].bookmarks.is_empty() {
                self.delete_bookmark(v)?;
            }
        }
        Ok(())
    }

    /// Takes care that there is something to do: snapshots and a clone, and room for more of them.
    fn furnish(&mut self, v: usize, chance: &mut Chance) -> Result<()> {
        while self.volumes[v].snapshots.len() >= self.shape.snapshots {
            self.delete(v)?;
        }
        if self.volumes[v].snapshots.is_empty() || chance.below(4) == 0 {
            self.write(v)?;
            self.snapshot_of(&[v])?;
        }
        while self.volumes[v].clones.len() >= self.shape.clones {
            self.delete_clone(v)?;
        }
        if self.volumes[v].clones.is_empty() {
            self.make_clone_of(v, false)?;
        }
        while self.volumes[v].snapshots.len() >= self.shape.snapshots {
            self.delete(v)?;
        }
        Ok(())
    }

    /// Does something; breaks if this life ended, with whether something was cut off.
    fn does(&mut self, what: impl FnOnce(&mut Run) -> Result<()>) -> ControlFlow<bool> {
        let done = what(self);
        if self.world.is_dead() {
            return ControlFlow::Break(done.is_err());
        }
        if self.full > 0 {
            self.learn_failures();
        }
        self.take_refusal(done);
        ControlFlow::Continue(())
    }
}

/// The kinds in an order of chance, each once before any comes again.
struct Deck(Vec<usize>);

impl Deck {
    fn deal(&mut self, chance: &mut Chance) -> &'static Kind {
        if self.0.is_empty() {
            self.0 = (0..DECK.len()).collect();
        }
        let at = chance.below(self.0.len() as u64) as usize;
        &DECK[self.0.swap_remove(at)]
    }
}

/// Volumes with a history: content, a bookmark, a snapshot, a clone, perhaps a clone of that.
fn start(seed: u64, chance: &mut Chance) -> Run {
    let mut run = Run::new(seed, Shape::small());
    run.dying = true;
    let mut some = || {
        for v in 0..run.volumes.len() {
            for _ in 0..6 {
                run.write(v)?;
            }
            if chance.below(2) == 0 {
                run.snapshot_of(&[v])?;
                run.write(v)?;
                run.bookmark_newest(v)?;
                run.write(v)?;
            }
            run.snapshot_of(&[v])?;
            run.write(v)?;
            run.make_clone_of(v, false)?;
            run.clone_write(v)?;
            if chance.below(2) == 0 {
                run.make_clone_of(v, true)?;
                run.clone_write(v)?;
            }
        }
        Ok::<_, Error>(())
    };
    some().expect("nothing fails yet");
    run
}

/// One deal: prepared, done, perhaps cut off. Breaks if this life ended, with whether inside of something.
fn deal(run: &mut Run, kind: &Kind, chance: &mut Chance) -> ControlFlow<bool> {
    let v = run.any_volume();
    if run.full > 0 {
        // What is left is soon used up.
        for _ in 0..3 {
            run.does(|run| run.write(v))?;
        }
    } else if chance.below(4) > 0 {
        run.does(|run| run.furnish(v, chance))?;
    }
    for _ in 0..chance.below(3) {
        run.does(Run::any_operation)?;
    }
    run.does(|run| (kind.before)(run, v))?;
    if run.full == 0 && chance.below(12) == 0 {
        let used = run.world.allocated("store");
        let most = 4096 << chance.below(7);
        let room = chance.below(most);
        run.world.set_space("store", Some(used + room));
        (run.full, run.ever_full) = (u64::MAX, true);
    }
    if chance.below(2) == 0 {
        // Most operations have few I/Os and some have many.
        let most = 2 << chance.below(5);
        run.world.die_at(1 + chance.below(most));
    }
    run.does(|run| (kind.what)(run, v))
}

/// The first states of a seed; returns where one of its histories ended.
pub fn scout(seed: u64, counts: &mut Counts, here: &mut Here) -> Run {
    let head = here.0.clone();
    let mut chance = Chance(seed ^ 0x5c07_5c07);
    let mut deck = Deck(Vec::new());
    let first = counts.states;
    for history in 0.. {
        here.0 = format!("{head}, history {history}, its start");
        let of = chance.next();
        let mut run = start(of, &mut chance);
        let until = (counts.states + 24 + chance.below(64)).min(first + STATES);
        let mut number = 0;
        while counts.states < until && run.failures() <= 2 {
            let kind = deck.deal(&mut chance);
            number += 1;
            here.0 = format!("{head}, history {history}, deal {number}, {}", kind.name);
            crate::trace(|| here.0.clone());
            let ended = deal(&mut run, kind, &mut chance);
            counts.add(kind.name);
            if run.full > 0 {
                counts.add("dealt on a full disk");
            }
            let stopped = run.volumes.iter().any(|model| model.stopping);
            if ended.is_continue() && !stopped {
                // No longer at a later I/O: a read may be one, too.
                run.world.die_at(u64::MAX);
                run.compare_views();
            }
            let interrupted = ended == ControlFlow::Break(true);
            match run.under_way.as_ref().filter(|_| interrupted) {
                Some(under_way) => counts.add(kind_of(under_way)),
                None => counts.add("between operations"),
            }
            counts.moments += 1;
            let mut last = None;
            for _ in 0..1 + chance.below(2) {
                let mut state = state(&run, interrupted, chance.next(), counts);
                state.check_all_diffs();
                counts.add("of scouts");
                last = Some(state);
            }
            if run.full > 0 && chance.below(4) == 0 {
                run.free();
            }
            if ended.is_break() || stopped || chance.below(2) == 0 {
                run = last.expect("at least one");
                run.dying = true;
            }
        }
        if counts.states >= first + STATES {
            here.0 = head;
            run.free();
            return run;
        }
    }
    unreachable!("histories have states");
}
