//! A recording and the states that are made of it.
//!
//! A [`Trace`] begins with new filesystems and a new store, or with a crash state of another trace: then
//! it has recorded how that was mounted and recovered, and a second cut may hit in the middle of it.

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::crash::{FATES, Fate, Replay};
use crate::daemon::{Daemon, same_through_the_mount};
use crate::disks::{Disk, Event, Farm, Recorder};
use crate::filesystems::{Layout, Mounted};
use crate::machine::{Library, Machine};
use crate::model::{Doing, Moment, at_cut};
use crate::rig::Chance;
use crate::shaker::Shaker;
use crate::verify::{Case, Counts, count};
use crate::workload::Workload;

/// Mounted filesystems of a layout.
struct Stage {
    mounted: Vec<Mounted>,
    disks: Vec<u64>,
    store: PathBuf,
    sources: PathBuf,
}

impl Stage {
    /// Serves and mounts disks; says which filesystem would not mount.
    fn new(farm: &mut Farm, layout: Layout, disks: Vec<Disk>) -> Result<Stage, String> {
        let mut stage = Stage {
            mounted: Vec::new(),
            disks: Vec::new(),
            store: PathBuf::new(),
            sources: PathBuf::new(),
        };
        for (i, (disk, kind)) in disks.into_iter().zip(layout.kinds()).enumerate() {
            let (number, file) = farm.add(disk);
            stage.disks.push(number);
            let at = farm.directory(["first", "second"][i]);
            match Mounted::new(kind, &file, &at) {
                Ok(mounted) => stage.mounted.push(mounted),
                Err(e) => {
                    stage.clear(farm);
                    return Err(format!("{} does not mount: {e}", kind.name()));
                }
            }
            if i == 0 {
                stage.store = at.join("store");
            }
            stage.sources = at;
        }
        Ok(stage)
    }

    /// The kernel writes back whenever it likes.
    fn shake(&self, seed: u64) -> Shaker {
        let store = ["log", "clones", "map"].map(|dir| self.store.join(dir));
        let dirs = store.into_iter().chain([self.sources.clone()]);
        Shaker::new(dirs.collect(), seed)
    }

    fn clear(self, farm: &mut Farm) {
        for mounted in self.mounted {
            mounted.unmount();
        }
        for number in self.disks {
            farm.remove(number);
        }
    }
}

/// Operations before a violation that are told with it.
const TOLD: usize = 25;

/// States that were looked at in this process.
static STATES: AtomicU64 = AtomicU64::new(0);

/// What records a history.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// The engine in this process.
    Library,
    /// The daemon, through its mount.
    Daemon,
}

/// What was found.
#[derive(Default)]
pub struct Findings {
    pub states: u64,
    pub violations: Vec<String>,
    pub counts: Counts,
}

impl Findings {
    pub fn add(&mut self, other: Findings) {
        self.states += other.states;
        self.violations.extend(other.violations);
        for (what, n) in other.counts {
            *self.counts.entry(what).or_default() += n;
        }
    }
}

/// A crash state, and what it may hold.
pub struct Cut {
    pub at: usize,
    pub fates: Vec<Fate>,
    state: Vec<Disk>,
}

/// What the devices held before, what they were told, what was acknowledged when.
pub struct Trace {
    pub layout: Layout,
    before: Vec<Disk>,
    log: Vec<(usize, Event)>,
    history: Vec<Moment>,
    pub counts: Counts,
}

/// Has disks note what they are told.
fn recorded(disks: &[Disk], recorder: &Recorder) -> Vec<Disk> {
    let with = |(i, disk): (usize, &Disk)| Disk {
        recorder: Some((recorder.clone(), i)),
        ..disk.clone()
    };
    disks.iter().enumerate().map(with).collect()
}

fn words(why: &(dyn Any + Send)) -> String {
    let text = why.downcast_ref::<String>().cloned();
    let text = text.or_else(|| why.downcast_ref::<&str>().map(|s| (*s).to_owned()));
    text.unwrap_or_else(|| "a panic without words".to_owned())
}

impl Trace {
    /// Records a history on new filesystems until `enough` of (operations, writes to the devices).
    pub fn new(
        farm: &mut Farm,
        layout: Layout,
        by: By,
        seed: u64,
        enough: impl Fn(u64, usize) -> bool,
    ) -> Trace {
        let recorder = Recorder::default();
        let kinds = layout.kinds();
        let before: Vec<Disk> = kinds.iter().map(|kind| kind.make(farm)).collect();
        let disks = recorded(&before, &recorder);
        let stage = Stage::new(farm, layout, disks).expect("a new filesystem mounts");
        let (store, sources) = (&stage.store, &stage.sources);
        let machine: Box<dyn Machine> = match by {
            By::Library => Box::new(Library::new(store, sources)),
            By::Daemon => Box::new(Daemon::new(store, sources)),
        };
        let workload = Workload::new(machine, recorder.clone(), seed);
        Trace::finish(
            farm, layout, before, stage, workload, recorder, seed, enough,
        )
    }

    /// Records how a crash state is recovered, and so many operations more.
    pub fn after(
        &self,
        farm: &mut Farm,
        cut: Cut,
        seed: u64,
        operations: u64,
    ) -> Result<Trace, (Cut, String)> {
        let recorder = Recorder::default();
        let before: Vec<Disk> = cut.state.iter().cloned().map(Disk::flatten).collect();
        let stage = match Stage::new(farm, self.layout, recorded(&before, &recorder)) {
            Ok(stage) => stage,
            Err(why) => return Err((cut, why)),
        };
        let (world, under_way) = at_cut(&self.history, cut.at);
        let case = Case {
            dir: &stage.store,
            sources: &stage.sources,
            world: (*world).clone(),
            under_way: under_way.map(|m| &m.doing),
            lose_map: false,
            go_on: false,
        };
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let library = case.open();
            let opened = recorder.position();
            let (library, world) = case.adopt(library, &mut Counts::new());
            (library, world, opened)
        }));
        let (library, found, opened) = match opened {
            Ok(opened) => opened,
            Err(why) => {
                stage.clear(farm);
                return Err((cut, words(&*why)));
            }
        };
        let upkeep = Doing::Upkeep("recovery");
        let history = vec![
            Moment {
                began: 0,
                acknowledged: 0,
                doing: upkeep.clone(),
                after: world,
            },
            Moment {
                began: 0,
                acknowledged: opened,
                doing: under_way.map_or(upkeep, |m| m.doing.clone()),
                after: Arc::new(found),
            },
        ];
        let workload = Workload::resume(Box::new(library), recorder.clone(), seed, history);
        let enough = |done, _| done >= operations;
        let layout = self.layout;
        let trace = Trace::finish(
            farm, layout, before, stage, workload, recorder, seed, enough,
        );
        Ok(trace)
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of what it makes")]
    fn finish(
        farm: &mut Farm,
        layout: Layout,
        before: Vec<Disk>,
        stage: Stage,
        mut workload: Workload,
        recorder: Recorder,
        seed: u64,
        enough: impl Fn(u64, usize) -> bool,
    ) -> Trace {
        let shaker = stage.shake(seed);
        let mut done = 0;
        let began = recorder.position();
        while !enough(done, recorder.writes_since(began)) {
            workload.go();
            done += 1;
        }
        let (history, counts) = workload.finish();
        drop(shaker);
        stage.clear(farm);
        Trace {
            layout,
            before,
            log: recorder.take(),
            history,
            counts: counts.into_iter().map(|(k, n)| (k.to_owned(), n)).collect(),
        }
    }

    /// The part of the log that the history covers.
    pub fn range(&self) -> Range<usize> {
        let first = self.history.first().expect("a beginning").acknowledged;
        let last = self.history.last().expect("an end").acknowledged;
        first..last
    }

    pub fn replay(&self) -> Replay<'_> {
        let kinds = self.layout.kinds().into_iter();
        Replay::new(&self.log, kinds.zip(self.before.iter().cloned()).collect())
    }

    /// Where to cut, in order: the seed decides. A third of the cuts are right behind an
    /// acknowledgement, the others anywhere.
    pub fn cuts(&self, chance: &mut Chance, count: u64) -> Vec<usize> {
        let range = self.range();
        let span = (range.end - range.start) as u64 + 1;
        let moments = self.history.len() as u64;
        let one = |_| match chance.below(3) {
            0 => self.history[chance.below(moments) as usize].acknowledged,
            _ => range.start + chance.below(span) as usize,
        };
        let mut cuts: Vec<usize> = (0..count).map(one).collect();
        cuts.sort_unstable();
        cuts
    }

    /// Makes a state of the replay's position: each device by a fate of its own.
    pub fn cut(&self, replay: &Replay<'_>, fate: Option<Fate>, chance: &mut Chance) -> Cut {
        let mut choose = || fate.unwrap_or(FATES[chance.below(FATES.len() as u64) as usize]);
        let fates: Vec<Fate> = self.before.iter().map(|_| choose()).collect();
        Cut {
            at: replay.position(),
            state: replay.state(&fates, chance),
            fates,
        }
    }

    /// Mounts a state, opens the store and compares.
    pub fn check(&self, farm: &mut Farm, cut: &Cut, chance: &mut Chance, findings: &mut Findings) {
        findings.states += 1;
        let number = STATES.fetch_add(1, Ordering::Relaxed) + 1;
        let counts = &mut findings.counts;
        count(counts, &self.layout.name());
        for fate in &cut.fates {
            count(counts, &format!("{fate:?}"));
        }
        let (world, under_way) = at_cut(&self.history, cut.at);
        let looked = Stage::new(farm, self.layout, cut.state.clone()).and_then(|stage| {
            let case = Case {
                dir: &stage.store,
                sources: &stage.sources,
                world: (*world).clone(),
                under_way: under_way.map(|m| &m.doing),
                lose_map: chance.below(8) == 0,
                go_on: chance.below(4) == 0,
            };
            let counts = &mut *counts;
            let done = catch_unwind(AssertUnwindSafe(|| case.verify(chance, counts)));
            stage.clear(farm);
            done.map_err(|why| words(&*why))
        });
        if under_way.is_some() {
            count(counts, "an operation was under way");
        }
        if let Err(why) = looked {
            let why = format!("state {number} of this run: {why}");
            self.report(cut, &why, findings);
        }
    }

    /// Mounts a state twice: the engine finds out what it holds, then the daemon has to show the same.
    pub fn check_by_daemon(&self, farm: &mut Farm, cut: &Cut, findings: &mut Findings) {
        findings.states += 1;
        let (world, under_way) = at_cut(&self.history, cut.at);
        let mut found = None;
        let mut look = |farm: &mut Farm, daemon: bool| -> Result<(), String> {
            let stage = Stage::new(farm, self.layout, cut.state.clone())?;
            let case = Case {
                dir: &stage.store,
                sources: &stage.sources,
                world: (*world).clone(),
                under_way: under_way.map(|m| &m.doing),
                lose_map: false,
                go_on: false,
            };
            let done = catch_unwind(AssertUnwindSafe(|| match (&found, daemon) {
                (Some(found), true) => same_through_the_mount(&stage.store, found),
                _ => {
                    let library = case.open();
                    found = Some(case.adopt(library, &mut findings.counts).1);
                }
            }));
            stage.clear(farm);
            done.map_err(|why| words(&*why))
        };
        let looked = look(farm, false).and_then(|()| look(farm, true));
        count(&mut findings.counts, "read through the mount");
        if let Err(why) = looked {
            self.report(cut, &why, findings);
        }
    }

    /// Notes a violation, and keeps its devices if asked to.
    pub fn report(&self, cut: &Cut, why: &str, findings: &mut Findings) {
        let (at, fates, range) = (cut.at, &cut.fates, self.range());
        let what = format!(
            "{}: cut at {at} of {range:?}, {fates:?}: {why}",
            self.layout.name()
        );
        eprintln!("VIOLATION {what}");
        let begun = self.history.partition_point(|m| m.began < at);
        for m in &self.history[begun.saturating_sub(TOLD)..begun] {
            eprintln!("  {}..{}: {}", m.began, m.acknowledged, m.doing);
        }
        if let Some(dir) = std::env::var_os("STILLFRAME_POWER_KEEP") {
            for (i, disk) in cut.state.iter().enumerate() {
                let name = format!("state-{}-{at}-{i}.img", std::process::id());
                disk.save(&PathBuf::from(&dir).join(name)).unwrap();
            }
        }
        findings.violations.push(what);
    }

    /// Where the log stood when the store was first open.
    pub fn opened(&self) -> usize {
        self.history[self.history.len().min(2) - 1].acknowledged
    }

    /// How many writes and discards were recorded.
    pub fn writes(&self) -> usize {
        let told = self.log[self.range()].iter();
        told.filter(|(_, event)| !matches!(event, Event::Flush))
            .count()
    }
}
