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

use stillframe::error::{Error, Kind, Result};
use stillframe::sys::sim::Op;
use stillframe::units::Name;
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
struct Card {
    name: &'static str,
    /// What leads up to it and is not cut off.
    before: Does,
    /// It may be cut off anywhere in here.
    what: Does,
    /// A full disk is no reason to refuse it.
    always: bool,
}

const fn card(name: &'static str, what: Does) -> Card {
    Card {
        name,
        before: |_, _| Ok(()),
        what,
        always: false,
    }
}

/// One that what is held back on a full disk is for.
const fn always(name: &'static str, what: Does) -> Card {
    Card {
        always: true,
        ..card(name, what)
    }
}

const fn after(before: Does, name: &'static str, what: Does) -> Card {
    Card {
        before,
        ..card(name, what)
    }
}

/// Every kind of operation.
const DECK: &[Card] = &[
    card("write", |run, v| run.write(v)),
    card("writes and a flush", |run, v| {
        run.write(v)?;
        run.write(v)?;
        run.flush(v)
    }),
    card("write after a snapshot", |run, v| {
        run.snapshot_of(&[v])?;
        run.write(v)
    }),
    card("write after a bookmark", |run, v| {
        run.bookmark_newest(v)?;
        run.write(v)
    }),
    card("discard", |run, v| run.zero(v, Zeroing::Discard)),
    card("zero", |run, v| run.zero(v, Zeroing::Zero)),
    card("discards and a flush", |run, v| {
        run.zero(v, Zeroing::Discard)?;
        run.zero(v, Zeroing::Discard)?;
        run.flush(v)
    }),
    always("snapshot", |run, v| run.snapshot_of(&[v])),
    card("snapshot of unflushed writes of both", |run, _| {
        run.write(0)?;
        run.write(1)?;
        run.snapshot_of(&[1, 0])
    }),
    always("deletion", |run, v| run.delete(v)),
    card("deletion and what follows it", |run, v| {
        run.delete(v)?;
        while run.engine.maintain()? {}
        run.write(v)
    }),
    card("bookmark", |run, v| run.bookmark_newest(v)),
    always("bookmark's deletion", |run, v| run.delete_bookmark(v)),
    always("renaming", |run, v| run.rename(v)),
    card("clone", |run, v| {
        run.make_clone_of(v, false)?;
        run.clone_write(v)
    }),
    card("clone of a clone", |run, v| {
        run.clone_write(v)?;
        run.make_clone_of(v, true)?;
        for _ in 0..3 {
            run.clone_write(v)?;
        }
        Ok(())
    }),
    card("clone's write", |run, v| run.clone_write(v)),
    card("clone's write and flush", |run, v| {
        run.clone_write(v)?;
        run.clone_flush(v)
    }),
    card("clone's zeroing", |run, v| run.clone_zero(v)),
    Card {
        before: |run, v| {
            (0..3).try_for_each(|_| run.clone_write(v))?;
            run.flush_all_clones()
        },
        ..always("clone's deletion", |run, v| run.delete_clone(v))
    },
    after(
        |run, v| (0..3).try_for_each(|_| run.write(v)),
        "revert",
        |run, v| run.revert(v),
    ),
    after(
        |run, v| {
            (0..3).try_for_each(|_| run.write(v))?;
            run.flush(v)
        },
        "revert of what was flushed",
        |run, v| run.revert(v).and_then(|()| run.write(v)),
    ),
    card("resize", |run, v| run.resize(v)),
    card("resize and writes", |run, v| {
        run.resize(v)?;
        run.write(v)?;
        run.flush(v)
    }),
    after(
        |run, v| {
            run.snapshot_of(&[v])?;
            (0..8).try_for_each(|_| run.write(v))
        },
        "checkpoint",
        |run, _| run.background(),
    ),
    after(
        |run, v| {
            run.snapshot_of(&[v])?;
            (0..8).try_for_each(|_| run.write(v))
        },
        "checkpoint that the index stops in",
        |run, _| run.checkpoint_cut_off(),
    ),
    after(
        |run, _| run.delete_all(),
        "space given back",
        |run, _| {
            while run.engine.maintain()? {}
            Ok(())
        },
    ),
    after(
        |run, v| run.lives_and_deaths(v),
        "space of several lives given back",
        |run, _| {
            while run.engine.maintain()? {}
            Ok(())
        },
    ),
    after(
        |run, _| run.write(0).and_then(|()| run.write(1)),
        "clean stop",
        |run, _| {
            run.stop();
            Ok(())
        },
    ),
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

    /// The index stops at one of its next calls and stays so: a crash inside of what it does, of which the
    /// disks know nothing.
    fn checkpoint_cut_off(&mut self) -> Result<()> {
        let struck = self.index.struck();
        let nth = 1 + self.chance.below(6);
        self.index.fail_call(nth, true, Kind::Io);
        let stop = self.chance.below(2) == 0;
        let done = match stop {
            true => {
                self.volumes
                    .iter_mut()
                    .for_each(|model| model.stopping = true);
                self.engine.close()
            }
            false => self.engine.maintain().map(drop),
        };
        if self.index.struck() > struck {
            self.count("index stopped");
            return Ok(());
        }
        self.index.clear_faults();
        if stop && done.is_ok() {
            self.volumes.iter_mut().for_each(|model| model.stopped());
        }
        done
    }

    /// Has this life write to the log, which begins a segment for it: most of what follows is cut off
    /// elsewhere then.
    fn warm(&mut self, v: usize) -> Result<()> {
        let Some(name) = self.pick(|run| &run.volumes[v].snapshots) else {
            return Ok(());
        };
        let (volume, name) = (self.name(v), Name::new(&name).expect("a name"));
        self.engine.hold_snapshot(&volume, &name, true)?;
        self.engine.hold_snapshot(&volume, &name, false)
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

    /// What several lives preserved for one volume has lost its use, between what another volume's snapshot
    /// still needs and what is new.
    fn lives_and_deaths(&mut self, v: usize) -> Result<()> {
        self.free();
        self.delete_all()?;
        let other = (v + 1) % self.volumes.len();
        for of in [other, v] {
            self.write(of)?;
            self.snapshot_of(&[of])?;
            self.write(of)?;
        }
        for n in 0..4 {
            self.write(v)?;
            self.end(n % 2 > 0)?;
            self.dying = true;
        }
        self.delete(v)
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

    fn flush_all_clones(&mut self) -> Result<()> {
        for v in 0..self.volumes.len() {
            for _ in 0..2 * self.volumes[v].clones.len() {
                self.clone_flush(v)?;
            }
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

/// The cards in an order of chance, each once before any comes again.
struct Deck {
    left: Vec<usize>,
    /// About the changing I/Os that each took when it was done as a whole, so that it is cut off anywhere in it.
    took: Vec<u64>,
}

impl Deck {
    fn new() -> Deck {
        Deck {
            left: Vec::new(),
            took: vec![8; DECK.len()],
        }
    }

    fn deal(&mut self, chance: &mut Chance) -> usize {
        if self.left.is_empty() {
            self.left = (0..DECK.len()).collect();
        }
        let at = chance.below(self.left.len() as u64) as usize;
        self.left.swap_remove(at)
    }
}

/// Changing I/Os so far, opening aside.
fn changes(run: &Run) -> u64 {
    let ops = [
        Op::Write,
        Op::Sync,
        Op::SetSize,
        Op::Punch,
        Op::Remove,
        Op::Rename,
        Op::DirSync,
    ];
    ops.into_iter().map(|op| run.world.count(op)).sum()
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
fn deal(run: &mut Run, card: &Card, took: &mut u64, chance: &mut Chance) -> ControlFlow<bool> {
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
    run.does(|run| (card.before)(run, v))?;
    if run.full == 0 && chance.below(14) == 0 {
        let used = run.world.allocated("store");
        let most = 4096 << chance.below(7);
        let room = chance.below(most);
        run.world.set_space("store", Some(used + room));
        (run.full, run.ever_full) = (u64::MAX, true);
    }
    if chance.below(8) > 0 {
        run.does(|run| run.warm(v))?;
    }
    let (before, struck) = (changes(run), run.index.struck());
    if chance.below(3) > 0 {
        // How much it does is not known before; most do little.
        let far = 1 + chance.below(*took + 2);
        let near = 1 + chance.below(far);
        run.world
            .die_at(if chance.below(2) == 0 { far } else { near });
    }
    run.does(|run| {
        let done = (card.what)(run, v);
        let spent = run.world.disk("store/ballast").is_none() || run.world.is_dead();
        if card.always && !spent {
            assert!(done.is_ok(), "{} was refused: {done:?}", card.name);
        }
        done
    })?;
    *took = (*took + changes(run) - before).div_ceil(2);
    // It ended in time. No longer at a later I/O, then: a read may be one, too.
    run.world.die_at(u64::MAX);
    let stopped = run.volumes.iter().any(|model| model.stopping);
    if stopped || run.index.struck() > struck {
        // Nothing more can happen in this life.
        return ControlFlow::Break(false);
    }
    if chance.below(2) == 0 {
        run.does(|run| run.flush(v))?;
        run.does(Run::flush_all_clones)?;
    }
    ControlFlow::Continue(())
}

/// The first states of a seed.
pub fn scout(seed: u64, counts: &mut Counts, here: &mut Here) {
    let head = here.0.clone();
    let mut chance = Chance(seed ^ 0x5c07_5c07);
    let mut deck = Deck::new();
    let first = counts.states;
    for history in 0.. {
        here.0 = format!("{head}, history {history}, its start");
        let of = chance.next();
        let mut run = start(of, &mut chance);
        let until = (counts.states + 24 + chance.below(64)).min(first + STATES);
        let mut number = 0;
        while counts.states < until && run.failures() <= 2 {
            let dealt = deck.deal(&mut chance);
            let card = &DECK[dealt];
            number += 1;
            here.0 = format!("{head}, history {history}, deal {number}, {}", card.name);
            crate::trace(|| here.0.clone());
            let ended = deal(&mut run, card, &mut deck.took[dealt], &mut chance);
            counts.add(card.name);
            counts.add_many(
                "index stopped in a checkpoint",
                run.counts.remove("index stopped").unwrap_or(0),
            );
            if run.full > 0 {
                counts.add("dealt on a full disk");
            }
            if ended.is_continue() {
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
            if run.full > 0 && chance.below(2) == 0 {
                run.free();
            }
            if ended.is_break() || chance.below(2) == 0 {
                run = last.expect("at least one");
                run.dying = true;
            }
        }
        if counts.states >= first + STATES {
            here.0 = head;
            return;
        }
    }
}
