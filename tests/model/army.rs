//! The simulated disk as an army: many crash states out of every moment.
//!
//! Goal: whatever a power cut, a kill or the loss of one device leaves of what was not synced, the store
//! opens by itself and every view is what the model says, every diff names what changed, and the
//! accounts are those that the log alone gives.
//!
//! Method: a seed begins with scouts ([`crate::scouts`]): a few states out of each of many kinds of moment.
//! Then it looks longer at one history. Each round runs a short random trace again and again
//! from one state, and ends it at its 1st, 2nd, 3rd... changing I/O (in every fourth round those of the
//! recovery before it, too), until it ends by itself. Each of these moments is forked, never run again:
//! every fork resolves what is in doubt in its own way, is recovered and compared. One of the states is
//! where the next round starts. All of it is one thread and one seed.
//!
//! `STILLFRAME_ARMY_STATES` asks for more states, `STILLFRAME_ARMY_FILE` names the file in which a
//! campaign over several runs keeps which seeds are done, `STILLFRAME_ARMY_SEED` repeats one seed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use stillframe::error::{Kind, Result};
use stillframe::sys::disk::{Dir, Disk};
use stillframe::volume::Zeroing;

use crate::campaign::{Campaign, Counts};
use crate::rig::Chance;
use crate::scouts::scout;
use crate::shape::Shape;
use crate::{Run, UnderWay};

/// What a seed means; grows with every change of it.
const SEEDS: u64 = 2;
/// States out of one moment.
const PER_MOMENT: u64 = 24;
/// Rounds of one seed.
const ROUNDS: u64 = 6;
/// Moments of a round one after another; later ones are taken with gaps.
const EVERY_MOMENT: u64 = 40;

impl Run {
    /// A copy as a killed process leaves it: nothing of it lives, the kernel still has everything.
    pub fn fork(&self, seed: u64) -> Run {
        Run {
            world: self.world.fork(seed),
            index: self.index.fork(seed),
            engine: self.engine.clone(),
            chance: Chance(seed),
            volumes: self.volumes.clone(),
            counts: BTreeMap::new(),
            next_name: self.next_name,
            under_way: self.under_way.clone(),
            full: self.full,
            ever_full: self.ever_full,
            dying: false,
            faulty: false,
            seed: self.seed,
            shape: self.shape.clone(),
        }
    }

    /// One operation of any kind, but for the ends of a daemon.
    pub fn any_operation(&mut self) -> Result<()> {
        let v = self.any_volume();
        match self.chance.below(100) {
            0..=29 => self.write(v),
            30..=34 => self.zero(v, Zeroing::Discard),
            35..=37 => self.zero(v, Zeroing::Zero),
            38..=45 => self.clone_write(v),
            46..=48 => self.clone_zero(v),
            49..=50 => self.clone_flush(v),
            51..=58 => self.background(),
            59..=63 => self.flush(v),
            64..=72 => self.snapshot(),
            73..=78 => self.delete(v),
            79..=80 => self.rename(v),
            81..=86 => self.make_clone(v),
            87..=88 => self.delete_clone(v),
            89..=90 => self.delete_bookmark(v),
            91..=95 => self.revert(v),
            _ => self.resize(v),
        }
    }

    /// Operations until this life ends; whether one was cut off.
    fn live_through(&mut self, operations: u64) -> bool {
        for _ in 0..operations {
            let done = self.any_operation();
            if self.world.is_dead() {
                return done.is_err();
            }
            if done.is_err() {
                self.take_refusal(done);
            }
        }
        false
    }

    /// Takes a refusal that a full disk explains, and no other.
    pub fn take_refusal(&mut self, done: Result<()>) {
        if let Err(e) = self.tolerate(done) {
            panic!("seed {}: {e:?}", self.seed);
        }
        self.under_way = None;
    }

    /// A clean stop; whether it was cut off.
    pub fn stop(&mut self) -> bool {
        self.volumes
            .iter_mut()
            .for_each(|model| model.stopping = true);
        match self.engine.close() {
            Ok(()) => {
                self.volumes.iter_mut().for_each(|model| model.stopped());
                false
            }
            Err(e) => {
                let full = self.full > 0 && e.kind() == Kind::NoSpace;
                assert!(full || self.world.is_dead(), "seed {}: {e:?}", self.seed);
                true
            }
        }
    }

    /// What the engine says of space: the log and nothing else decides it.
    fn accounts(&self) -> Vec<(String, u64)> {
        let mut all = Vec::new();
        for model in &self.volumes {
            let info = self.engine.volume(&model.name).expect("it is there").info();
            all.push((format!("{} used", model.name), info.used));
            for snapshot in self.engine.snapshots(&model.name).expect("it is there") {
                all.push((format!("{}@{}", model.name, snapshot.name), snapshot.unique));
                assert!(snapshot.unique <= info.used);
            }
            for clone in self.engine.clones(&model.name).expect("it is there") {
                all.push((format!("{}/{}", model.name, clone.name), clone.own));
            }
        }
        all
    }

    /// The accounts are the same without the index, and what the log and the clones are said to use is
    /// what their files use.
    fn check_accounts(&mut self) {
        let seed = self.chance.next();
        let mut twins = [self.fork(seed), self.fork(seed)];
        twins[1].index.lose();
        for twin in &mut twins {
            twin.reopen();
            twin.free();
            // What a deletion left may not have been given back yet.
            while twin.engine.maintain().unwrap() {}
        }
        let [with, without] = twins.map(|twin| twin.accounts());
        assert_eq!(with, without, "seed {}", self.seed);
        let mut bytes = 0;
        for top in ["store/log", "store/clones"] {
            let names = self.world.dir(top).list().expect("it is a directory");
            // The spare belongs to nobody yet.
            for name in names.into_iter().filter(|name| name != "spare") {
                let file = self.world.disk(&format!("{top}/{name}"));
                bytes += file.map_or(0, |file| file.allocated().expect("it is open"));
            }
        }
        assert_eq!(self.engine.thin().expect("it answers").used, bytes);
    }

    /// With every snapshot and clone gone, nothing is used for them any more.
    fn check_emptied(&mut self) {
        for v in 0..self.volumes.len() {
            while let Some(clone) = self.pick(|run| &run.volumes[v].clones) {
                let name = stillframe::units::Name::new(&clone).unwrap();
                self.engine.delete_clone(&self.name(v), &name).unwrap();
                self.volumes[v].clones.remove(&clone);
            }
            while let Some(snapshot) = self.pick(|run| &run.volumes[v].snapshots) {
                let name = stillframe::units::Name::new(&snapshot).unwrap();
                self.engine
                    .hold_snapshot(&self.name(v), &name, false)
                    .unwrap();
                self.engine.delete_snapshot(&self.name(v), &name).unwrap();
                self.volumes[v].snapshots.remove(&snapshot);
            }
        }
        while self.engine.maintain().unwrap() {}
        for v in 0..self.volumes.len() {
            let info = self.volume(v).info();
            assert_eq!((info.used, info.reclaimable), (0, 0), "seed {}", self.seed);
        }
        let clones = self.world.dir("store/clones").list().unwrap();
        assert!(clones.is_empty(), "seed {}: {clones:?} are left", self.seed);
    }
}

/// Begun by this process.
static STATES: AtomicU64 = AtomicU64::new(0);

/// Notes that a state is begun.
pub fn begun() {
    STATES.fetch_add(1, Ordering::Relaxed);
}

/// Says where a state is that did not hold.
pub struct Here(pub String);

impl Drop for Here {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let states = STATES.load(Ordering::Relaxed);
            eprintln!(
                "found by: {}, in the first {states} states of this run",
                self.0
            );
        }
    }
}

/// One crash state: resolved, recovered, compared.
pub fn state(moment: &Run, interrupted: bool, seed: u64, counts: &mut Counts) -> Run {
    begun();
    let mut run = moment.fork(seed);
    // A device that went away under a living daemon took what was not synced there along.
    let device_lost = moment.faulty;
    let chance = run.chance.next();
    let mut power = true;
    match run.chance.below(16) {
        0 | 1 => {
            power = device_lost;
            run.world.kill();
            run.index.kill(chance);
            counts.add("killed");
        }
        2 => {
            run.world.lose_device("store");
            run.world.kill();
            run.index.power_cut(chance);
            counts.add("only the store's device cut");
        }
        3 => {
            run.world.lose_device("sources");
            run.world.kill();
            run.index.kill(chance);
            counts.add("only the source's device cut");
        }
        _ => {
            run.world.power_cut();
            run.index.power_cut(chance);
            counts.add("cut");
        }
    }
    if run.chance.below(8) == 0 {
        run.index.lose();
        counts.add("map lost");
    }
    // Chosen without a chance: histories stay what they were.
    if seed.is_multiple_of(8) {
        run.sound();
        counts.add("audited");
    }
    if run.chance.below(8) == 0 {
        let n = 1 + run.chance.below(24);
        run.world.die_at(n);
        match run.try_reopen() {
            Err(_) if run.world.is_dead() => counts.add("cut again while recovering"),
            done => done.unwrap_or_else(|e| panic!("seed {}: {e:?}", run.seed)),
        }
        run.world.power_cut();
        run.index.power_cut(chance);
        power = true;
    }
    run.reopen();
    let under_way = run.under_way.take().filter(|_| interrupted);
    run.settle(under_way, power);
    crate::trace(|| format!("recovered, power {power}"));
    run.compare_views();
    for v in 0..run.volumes.len() {
        run.check_diff(v);
    }
    match run.chance.below(32) {
        0..=1 => {
            run.check_accounts();
            counts.add("accounts compared");
        }
        4..=6 => {
            run.free();
            crate::trace(|| format!("goes on; snapshots {:?}", run.points()));
            run.live_through(6);
            run.compare();
            counts.add("went on");
        }
        7 if run.full == 0 => {
            run.reopened(seed).check_emptied();
            counts.add("emptied");
        }
        _ => {}
    }
    for (what, count) in std::mem::take(&mut run.counts) {
        if what.starts_with("diff") || what.ends_with("finished") || what.ends_with("undone") {
            counts.add_many(what, count);
        }
    }
    counts.states += 1;
    run
}

impl Run {
    /// Every point of every volume and its instant.
    fn points(&self) -> Vec<(&str, u64)> {
        let points = self
            .volumes
            .iter()
            .flat_map(|model| model.snapshots.iter().chain(&model.bookmarks));
        points
            .map(|(name, point)| (&**name, point.instant))
            .collect()
    }

    /// Snapshots that failed on a full disk.
    pub fn failures(&self) -> usize {
        let lists = self.volumes.iter().map(|model| &model.snapshots);
        let points = lists.flat_map(|list| list.values());
        points.filter(|point| point.failed).count()
    }

    /// A copy of a living one that lives, after a kill.
    fn reopened(&self, seed: u64) -> Run {
        let mut run = self.fork(seed);
        run.reopen();
        run.settle(None, false);
        run
    }
}

pub fn kind_of(under_way: &UnderWay) -> &'static str {
    match under_way {
        UnderWay::Write(..) => "in a write",
        UnderWay::CloneWrite(..) => "in a clone's write",
        UnderWay::Take(..) => "in a snapshot",
        UnderWay::Delete(..) => "in a deletion",
        UnderWay::Rename(..) => "in a renaming",
        UnderWay::DeleteBookmark(..) => "in a bookmark's deletion",
        UnderWay::Make(..) => "in a clone's making",
        UnderWay::DeleteClone(..) => "in a clone's deletion",
        UnderWay::Revert(..) => "in a revert",
        UnderWay::Resize(..) => "in a resize",
    }
}

/// One of the two devices goes away while the daemon lives; it ends a while later.
fn device_goes(base: &Run, chance: &mut Chance, counts: &mut Counts, here: &mut Here) {
    let head = here.0.clone();
    for n in 0..4 {
        let top = ["store", "sources"][chance.below(2) as usize];
        let mut run = base.fork(chance.next());
        run.reopen();
        run.settle(None, false);
        run.dying = true;
        run.live_through(4);
        run.world.lose_device(top);
        run.faulty = true;
        let mut interrupted = false;
        for _ in 0..6 {
            if let Err(e) = run.any_operation() {
                crate::faults::one_line(&head, &e);
                interrupted = true;
                break;
            }
        }
        counts.add("a device went under a living daemon");
        if interrupted {
            counts.add("and was noticed");
        }
        run.nothing_is_wrong(&head, counts);
        counts.moments += 1;
        for k in 0..PER_MOMENT {
            here.0 = format!("{head}, {top} goes {n}, state {k}");
            state(&run, interrupted, chance.next(), counts);
        }
    }
    here.0 = head;
}

/// Ends the trace of one round at one I/O after another; returns where the next round starts.
fn round(base: &Run, seed: u64, counts: &mut Counts, here: &mut Here) -> Run {
    let mut chance = Chance(seed);
    let (trace, operations) = (chance.next(), 2 + chance.below(8));
    let with_recovery = chance.below(4) == 0;
    let (full, stops) = (chance.below(10) == 0, chance.below(8) == 0);
    if chance.below(4) == 0 {
        device_goes(base, &mut chance, counts, here);
    }
    let head = here.0.clone();
    let (mut next, mut n) = (None, 1);
    loop {
        // The same history each time, but for its end.
        let mut run = base.fork(trace);
        if full {
            let used = run.world.allocated("store");
            run.world
                .set_space("store", Some(used + trace % (256 << 10)));
            (run.full, run.ever_full) = (u64::MAX, true);
        }
        if with_recovery {
            run.world.die_at(n);
        }
        let mut interrupted = false;
        match run.try_reopen() {
            Err(_) if run.world.is_dead() => counts.add("in a recovery"),
            done => {
                done.unwrap_or_else(|e| panic!("seed {}: {e:?}", run.seed));
                run.settle(None, false);
                if !with_recovery {
                    run.world.die_at(n);
                }
                run.dying = true;
                interrupted = run.live_through(operations);
                if stops && !run.world.is_dead() {
                    interrupted = run.stop();
                }
                match run.under_way.as_ref().filter(|_| interrupted) {
                    Some(under_way) => counts.add(kind_of(under_way)),
                    None => counts.add("between operations"),
                }
            }
        }
        let ends = !run.world.is_dead();
        crate::trace(|| {
            format!(
                "moment {n}, interrupted {interrupted}, points {:?}",
                run.points()
            )
        });
        counts.moments += 1;
        for k in 0..PER_MOMENT {
            here.0 = format!("{head}, moment {n}, state {k}");
            let state = state(&run, interrupted, chance.next(), counts);
            let follows = next.is_none() || chance.below(n * PER_MOMENT) == 0;
            if follows {
                next = Some(state.fork(0));
            }
        }
        if ends {
            break;
        }
        n += match n {
            0..EVERY_MOMENT => 1,
            _ => 1 + chance.below(12),
        };
    }
    if full {
        counts.add("rounds on a full disk");
    }
    let mut next = next.expect("every round has a moment");
    next.free();
    next
}

/// Everything that follows from one seed.
fn soldier(seed: u64) -> Counts {
    let mut counts = Counts::default();
    let mut here = Here(format!("STILLFRAME_ARMY_SEED={seed}"));
    let mut chance = Chance(seed ^ 0xa5a5_5a5a);
    scout(seed, &mut counts, &mut here);
    here.0 = format!("STILLFRAME_ARMY_SEED={seed}, behind its scouts");
    let mut run = Run::new(seed, Shape::small());
    run.dying = true;
    run.live_through(40);
    let mut base = run.fork(chance.next());
    base.under_way = None;
    for n in 0..ROUNDS {
        here.0 = format!("STILLFRAME_ARMY_SEED={seed}, round {n}");
        base = round(&base, chance.next(), &mut counts, &mut here);
        base.under_way = None;
        // Volumes that lost their snapshots would make for dull rounds.
        if base.failures() > 2 {
            break;
        }
    }
    counts
}

/// 50,000 states in CI, as many more as a campaign is asked for.
#[test]
fn every_state_that_a_crash_can_leave_is_recovered() {
    let done = Campaign::of("ARMY", 50_000, SEEDS).run(soldier);
    let counts = &done.counts;
    println!("{done}");
    if done.full_share() {
        for (what, least) in [
            ("of scouts", 4000),
            ("cut", 1000),
            ("killed", 1000),
            ("only the store's device cut", 1000),
            ("only the source's device cut", 1000),
            ("cut again while recovering", 1000),
            ("map lost", 1000),
            ("accounts compared", 1000),
            ("went on", 1000),
            ("emptied", 100),
            ("in a write", 10),
            ("in a clone's write", 10),
            ("in a snapshot", 10),
            ("in a deletion", 10),
            ("in a renaming", 1),
            ("in a bookmark's deletion", 1),
            ("in a clone's making", 10),
            ("in a clone's deletion", 1),
            ("in a revert", 10),
            ("index stopped in a checkpoint", 10),
            ("dealt on a full disk", 100),
            ("in a resize", 10),
            ("in a recovery", 10),
            ("a device went under a living daemon", 10),
            ("and was noticed", 10),
            ("between operations", 10),
            ("rounds on a full disk", 1),
            ("diff", 1000),
        ] {
            assert!(
                counts.of(what) >= least,
                "only {} of {what}",
                counts.of(what)
            );
        }
    }
}
