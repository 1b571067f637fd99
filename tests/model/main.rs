//! The engine against a model, in process, on simulated disks.
//!
//! Goal: whatever is written, discarded, snapshotted, cloned, bookmarked, reverted, resized, deleted,
//! remounted, killed, cut from power or robbed of its map, in any order, every view holds exactly what
//! the model says: a snapshot the bytes of its instant, the live volume and every clone each
//! acknowledged byte after a kill, and after a power cut each flushed byte; a diff everything that
//! differs and no grain that nobody wrote.
//!
//! Method: random operations from a printed seed on three volumes of about 64 MiB, with sizes that are
//! no multiple of the grain. The model is a sparse map of 4 KiB pages per view. Views are compared
//! whole, through the same calls a reader uses (data, holes, reads). `STILLFRAME_MODEL_OPS` and
//! `STILLFRAME_MODEL_SEED` choose a longer run or repeat one.
//!
//! Files: [`state`] what the model knows; [`shape`] how large it is; [`live`], [`points`], [`clones`],
//! [`reshape`] the operations; [`crash`] kills, power cuts and what they may leave; [`check`] the
//! comparison. [`army`] takes many crash states out of each moment, after [`scouts`] took a few of each kind; [`sequences`] does so for all short
//! sequences, [`faults`] lets the n-th I/O fail, [`broken`] has disks lie; [`campaign`] runs many seeds.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set its stage has failed"
)]

mod army;
mod broken;
mod campaign;
mod check;
mod clones;
mod crash;
mod faults;
mod live;
mod points;
mod reshape;
#[path = "../rig/mod.rs"]
mod rig;
mod scouts;
mod sequences;
mod shape;
#[path = "../rig/sim.rs"]
mod sim;
mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use stillframe::error::{Kind, Result};
use stillframe::map::memory::MemoryIndexHome;
use stillframe::sys::sim::SimWorld;
use stillframe::units::{Grain, Name};
use stillframe::volume::{Engine, OnFull, VolumeOptions, Zeroing};

use crate::rig::Chance;
use crate::shape::Shape;
use crate::sim::environment;
use crate::state::{Volume, Writable};

const MIB: u64 = 1 << 20;
const COMPARE_EVERY: u64 = 50;

/// An operation whose answer has not been given yet.
#[derive(Clone)]
enum UnderWay {
    /// Sectors of the live volume are being written.
    Write(usize, BTreeSet<u64>),
    /// Sectors of a clone are being written.
    CloneWrite(usize, String, BTreeSet<u64>),
    /// A snapshot of this many volumes is being taken.
    Take(String, usize),
    /// A snapshot is being deleted, perhaps for a bookmark.
    Delete(usize, String),
    /// A snapshot is getting another name.
    Rename(usize, String, String),
    DeleteBookmark(usize, String),
    /// A clone is being made, with this content.
    Make(usize, String, Writable),
    DeleteClone(usize, String),
    /// The volume is becoming what this snapshot is.
    Revert(usize, String),
    /// The volume is getting this size.
    Resize(usize, u64),
}

struct Run {
    world: SimWorld,
    index: MemoryIndexHome,
    engine: Arc<Engine>,
    chance: Chance,
    volumes: Vec<Volume>,
    counts: BTreeMap<&'static str, u64>,
    next_name: u64,
    under_way: Option<UnderWay>,
    /// Operations until the disk is no longer full.
    full: u64,
    ever_full: bool,
    /// The process dies at one of the next operations.
    dying: bool,
    /// Its disks have errors: what could only be answered without them is not asked.
    faulty: bool,
    seed: u64,
    shape: Shape,
}

fn trace(text: impl FnOnce() -> String) {
    if std::env::var_os("STILLFRAME_MODEL_TRACE").is_some() {
        println!("{}", text());
    }
}

impl Run {
    fn new(seed: u64, shape: Shape) -> Run {
        let settings = shape.settings.clone();
        let world = SimWorld::new(seed);
        let index = MemoryIndexHome::new();
        let env = environment(&world, &index);
        Engine::create(&env, &settings).expect("a store is made");
        let engine = Engine::open(env, settings).expect("a new store opens");
        let mut volumes = Vec::new();
        for (i, (size, grain)) in shape.volumes.iter().copied().enumerate() {
            let path = format!("sources/v{i}");
            world.add_disk(&path, size);
            let volume = Volume::new(&format!("v{i}"), size, shape.sizes.clone());
            let on_full = match i {
                1 => OnFull::FailSnapshot,
                _ => OnFull::FailWrite,
            };
            let options = VolumeOptions {
                grain: Grain::new(grain).unwrap(),
                on_full,
                on_full_wait_s: 0,
            };
            engine
                .add_volume(&volume.name, &path, options)
                .expect("a volume is added");
            volumes.push(volume);
        }
        Run {
            world,
            index,
            engine,
            chance: Chance(seed),
            volumes,
            counts: BTreeMap::new(),
            next_name: 0,
            under_way: None,
            full: 0,
            ever_full: false,
            dying: false,
            faulty: false,
            seed,
            shape,
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn volume(&self, v: usize) -> Arc<stillframe::volume::Volume> {
        self.engine
            .volume(&self.volumes[v].name)
            .expect("the volume is there")
    }

    fn name(&self, v: usize) -> Name {
        self.volumes[v].name.clone()
    }

    fn any_volume(&mut self) -> usize {
        self.chance.below(self.volumes.len() as u64) as usize
    }

    /// A name that was never used, and its number, by which instants are ordered.
    fn fresh(&mut self, letter: char) -> (String, u64) {
        self.next_name += 1;
        (format!("{letter}{}", self.next_name), self.next_name)
    }

    /// One of some names, if there are any.
    fn pick<T>(&mut self, from: impl Fn(&Run) -> &BTreeMap<String, T>) -> Option<String> {
        let names: Vec<String> = from(self).keys().cloned().collect();
        if names.is_empty() {
            return None;
        }
        Some(names[self.chance.below(names.len() as u64) as usize].clone())
    }

    fn step(&mut self) {
        trace(|| format!("{} next {}: {:?}", self.seed, self.next_name, self.counts));
        let v = self.any_volume();
        let choice = self.chance.below(1000);
        let done = match choice {
            0..=459 => self.write(v),
            460..=529 => self.zero(v, Zeroing::Discard),
            530..=579 => self.zero(v, Zeroing::Zero),
            580..=704 => self.clone_write(v),
            705..=734 => self.clone_zero(v),
            735..=744 => self.clone_flush(v),
            745..=774 => self.background(),
            775..=814 => self.flush(v),
            815..=884 => self.snapshot(),
            885..=912 => self.delete(v),
            913..=922 => self.rename(v),
            923..=944 => self.make_clone(v),
            945..=951 => self.delete_clone(v),
            952..=957 => self.delete_bookmark(v),
            958..=966 => self.revert(v),
            967..=975 => self.resize(v),
            976..=981 => {
                self.remount(false);
                Ok(())
            }
            982..=987 => {
                self.remount(true);
                Ok(())
            }
            988..=993 => {
                self.kill(false);
                Ok(())
            }
            _ => {
                self.kill(true);
                Ok(())
            }
        };
        // On a full disk writers, background work, reverts and resizes may be refused, and nobody else.
        let may_wait = choice < 775 || (958..=975).contains(&choice);
        let spent = self.full > 0 && self.world.disk("store/ballast").is_none();
        if !may_wait && spent && matches!(&done, Err(e) if e.kind() == Kind::NoSpace) {
            // Reserve and ballast are spent, which takes many catalogue changes on one full disk.
            self.count("refused without ballast");
            self.under_way = None;
        } else {
            let done = if may_wait { self.tolerate(done) } else { done };
            done.unwrap_or_else(|e| {
                let used = self.world.allocated("store");
                panic!("seed {}: operation {choice}: {e:?}; {used} used", self.seed)
            });
        }
        if self.full > 0 {
            self.learn_failures();
        }
        self.fill_or_free();
    }

    fn background(&mut self) -> Result<()> {
        self.engine.maintain()?;
        self.count("maintain");
        Ok(())
    }

    /// Takes a refusal on a full disk: a prefix may have been written.
    fn tolerate(&mut self, done: Result<()>) -> Result<()> {
        match done {
            // A dead one refuses everything; what it may have written is seen in its next life.
            Err(e) if e.kind() == Kind::NoSpace && self.full > 0 && !self.world.is_dead() => {}
            done => return done,
        }
        match self.under_way.take() {
            Some(UnderWay::Write(v, sectors)) => self.adopt_live(v, &sectors),
            Some(UnderWay::CloneWrite(v, name, sectors)) => self.adopt_clone(v, &name, &sectors),
            // The volume is as it was; the snapshot that was to undo it may be there.
            Some(UnderWay::Revert(v, _)) => self.adopt_undo(v),
            _ => {}
        }
        self.count("refused");
        Ok(())
    }

    fn free(&mut self) {
        self.world.set_space("store", None);
        self.full = 0;
    }

    /// Now and then the store's disk fills up for a while.
    fn fill_or_free(&mut self) {
        match self.full {
            // With the ballast in place: that is what a disk filled by somebody else finds.
            0 if self.chance.below(120) == 0 && self.world.disk("store/ballast").is_some() => {
                let used: u64 = self.world.allocated("store");
                let room = self.chance.below(64 << 10);
                trace(|| format!("full: {used} used, {room} left"));
                self.world.set_space("store", Some(used + room));
                self.full = 5 + self.chance.below(40);
                self.ever_full = true;
                self.count("full");
            }
            0 => {}
            1 => self.free(),
            _ => self.full -= 1,
        }
    }
}

fn env_u64(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|v| v.parse().ok())
}

fn run(seed: u64, operations: u64) -> BTreeMap<&'static str, u64> {
    let mut run = Run::new(seed, Shape::large());
    for n in 0..operations {
        run.step();
        if n % COMPARE_EVERY == 0 {
            run.compare();
        } else if env_u64("STILLFRAME_MODEL_FROM").is_some_and(|from| n >= from) {
            // Diffs are chosen by chance, which would change the history.
            run.compare_views();
        }
    }
    run.compare();
    run.remount(false);
    run.compare();
    println!("seed {seed}: {operations} operations: {:?}", run.counts);
    run.counts
}

/// 200,000 operations, in two halves that use both processors.
#[test]
fn every_view_is_what_the_model_says() {
    let operations = env_u64("STILLFRAME_MODEL_OPS").unwrap_or(200_000);
    let halves = match env_u64("STILLFRAME_MODEL_SEED") {
        Some(seed) => vec![seed],
        None => vec![0x5711_f4a3_u64, 0xd15c_0b10],
    };
    let workers: Vec<_> = halves
        .into_iter()
        .map(|seed| std::thread::spawn(move || run(seed, operations / 2)))
        .collect();
    let mut totals: BTreeMap<&str, u64> = BTreeMap::new();
    for worker in workers {
        for (what, count) in worker.join().expect("a half failed; its seed is above") {
            *totals.entry(what).or_default() += count;
        }
    }
    println!("in all: {totals:?}");
    if operations >= 200_000 && env_u64("STILLFRAME_MODEL_SEED").is_none() {
        for what in [
            "write",
            "discard",
            "zero",
            "snapshot",
            "delete",
            "hold",
            "clone",
            "clone of a clone",
            "clone write",
            "clone deleted",
            "parent of a clone deleted",
            "bookmark",
            "diff",
            "diff from a bookmark",
            "revert",
            "resize",
            "remount",
            "kill",
            "power cut",
            "map loss",
            "full",
        ] {
            assert!(totals[what] >= 1000, "only {} of {what}", totals[what]);
        }
    }
}
