//! The n-th I/O fails: n = 1, 2, 3... until no fault strikes any more.
//!
//! Goal: whatever operation meets whatever error at whichever I/O, once or from then on, nothing panics,
//! no view ever shows a wrong byte, the refusal is one line with a cause, and the state is the documented
//! one; and when the disks are good again, a kill or a power cut and an opening later every view is what
//! the model says, flushes and snapshots work and survive the next power cut.
//!
//! Method: a seed makes a store with snapshots, bookmarks and clones. Every kind of operation, and every
//! kind of opening, is done on a fork of it with one fault set: EIO, ENOSPC, a short transfer or a failed
//! sync, in the store (log, superblock, overlays) or in a source, or an error of the index. A fault
//! that strikes is told from one that does not by a count, so the loop ends by itself.
//!
//! In CI every seventh n is taken, from another start for each loop; `STILLFRAME_FAULTS_STATES`,
//! `STILLFRAME_FAULTS_FILE` and `STILLFRAME_FAULTS_SEED` as for the army, then every n.

use stillframe::error::{Error, Kind, Result};
use stillframe::sys::sim::{Fault, Op, What};
use stillframe::units::Name;
use stillframe::volume::{VolumeState, Zeroing};

use crate::army::Here;
use crate::campaign::{Campaign, Counts};
use crate::rig::Chance;
use crate::shape::Shape;
use crate::sim::{Content, PAGE};
use crate::{Run, UnderWay};

/// What fails, and where.
#[derive(Clone, Copy, Debug)]
enum Site {
    /// Files below a topmost directory.
    Disk(&'static str, What, &'static [Op]),
    /// A call of the index.
    Index(Kind),
}

const EIO: What = What::Errno(libc::EIO);
const ENOSPC: What = What::Errno(libc::ENOSPC);
const SPACE: &[Op] = &[Op::Write, Op::SetSize, Op::Open, Op::Punch];
const SYNCS: &[Op] = &[Op::Sync, Op::DirSync];
const TRANSFERS: &[Op] = &[Op::Read, Op::Write];

const FAILED_SOURCE_SYNC: &str = "a failed sync in the source";
const SITES: &[(&str, Site)] = &[
    ("EIO in the store", Site::Disk("store", EIO, &[])),
    ("ENOSPC in the store", Site::Disk("store", ENOSPC, SPACE)),
    (
        "short in the store",
        Site::Disk("store", What::Short(libc::EIO), TRANSFERS),
    ),
    (
        "a failed sync in the store",
        Site::Disk("store", EIO, SYNCS),
    ),
    ("EIO in the source", Site::Disk("sources", EIO, &[])),
    ("ENOSPC in the source", Site::Disk("sources", ENOSPC, SPACE)),
    (
        "short in the source",
        Site::Disk("sources", What::Short(libc::EIO), TRANSFERS),
    ),
    (FAILED_SOURCE_SYNC, Site::Disk("sources", EIO, SYNCS)),
    ("an error of the index", Site::Index(Kind::Io)),
    ("no space for the index", Site::Index(Kind::NoSpace)),
];

type Workload = fn(&mut Run, usize) -> Result<()>;

const WORKLOADS: &[(&str, Workload)] = &[
    ("write", |run, v| run.write(v)),
    ("discard", |run, v| run.zero(v, Zeroing::Discard)),
    ("zero", |run, v| run.zero(v, Zeroing::Zero)),
    ("flush", |run, v| run.write(v).and_then(|()| run.flush(v))),
    ("snapshot", |run, _| run.snapshot()),
    ("delete", |run, v| run.delete(v)),
    ("rename", |run, v| run.rename(v)),
    ("clone of a snapshot", |run, v| run.make_clone_of(v, false)),
    ("clone of a clone", |run, v| run.make_clone_of(v, true)),
    ("clone write", |run, v| run.clone_write(v)),
    ("clone zero", |run, v| run.clone_zero(v)),
    ("clone flush", |run, v| {
        run.clone_write(v).and_then(|()| run.clone_flush(v))
    }),
    ("clone deletion", |run, v| run.delete_clone(v)),
    ("bookmark deletion", |run, v| run.delete_bookmark(v)),
    ("revert", |run, v| run.revert(v)),
    ("resize", |run, v| run.resize(v)),
    ("background work", |run, v| {
        run.delete(v)?;
        while run.engine.maintain()? {}
        Ok(())
    }),
    ("clean stop", |run, _| {
        run.volumes
            .iter_mut()
            .for_each(|model| model.stopping = true);
        run.engine.close()?;
        run.volumes.iter_mut().for_each(|model| model.stopped());
        Ok(())
    }),
    ("acceptance", |run, v| {
        run.engine.accept_volume(&run.name(v))
    }),
    ("hold", |run, v| {
        let Some(name) = run.pick(|run| &run.volumes[v].snapshots) else {
            return Ok(());
        };
        let name = Name::new(&name).unwrap();
        run.engine.hold_snapshot(&run.name(v), &name, true)?;
        run.engine.hold_snapshot(&run.name(v), &name, false)
    }),
];

/// Openings: after a clean stop, a kill, a power cut, and without the map.
const OPENINGS: &[&str] = &["stop", "kill", "power cut", "map lost"];

impl Run {
    fn set_fault(&self, site: Site, nth: u64, lasting: bool) {
        match site {
            Site::Disk(under, what, ops) => self.world.inject(Fault {
                what,
                ops,
                under,
                nth,
                lasting,
            }),
            Site::Index(kind) => self.index.fail_call(nth, lasting, kind),
        }
    }

    fn struck(&self) -> bool {
        self.world.struck() + self.index.struck() > 0
    }

    /// While disks have errors every page that can be read at all is right.
    pub fn nothing_is_wrong(&self, what: &str, counts: &mut Counts) {
        for (v, model) in self.volumes.iter().enumerate() {
            let Ok(volume) = self.engine.volume(&model.name) else {
                continue;
            };
            let other = match &self.under_way {
                Some(UnderWay::Revert(of, to)) if *of == v => model.snapshots.get(to),
                _ => None,
            };
            let size = volume.size().min(model.live.size);
            let size = other.map_or(size, |other| size.min(other.size));
            let live = [Some(&model.live.content), other.map(|other| &other.content)];
            let doubt = |page: u64| {
                let in_page = |sector: &u64| sector / 8 == page;
                match &self.under_way {
                    Some(UnderWay::Write(of, sectors)) if *of == v => sectors.iter().any(in_page),
                    _ => false,
                }
            };
            let read = |at, buf: &mut [u8]| volume.read_at(at, buf);
            pages_are(what, "live", size, &live, &doubt, &read, counts);
            for (name, point) in &model.snapshots {
                let name = Name::new(name).unwrap();
                if let Ok(snapshot) = self.engine.open_snapshot(&model.name, &name) {
                    let read = |at, buf: &mut [u8]| snapshot.read_at(at, buf);
                    let content = [Some(&point.content), None];
                    pages_are(
                        what,
                        name.as_str(),
                        point.size,
                        &content,
                        &|_| false,
                        &read,
                        counts,
                    );
                }
            }
            for (name, clone) in &model.clones {
                let doubt = |page: u64| {
                    let in_page = |sector: &u64| sector / 8 == page;
                    matches!(&self.under_way, Some(UnderWay::CloneWrite(of, written, sectors))
                        if *of == v && written == name && sectors.iter().any(in_page))
                };
                let name = Name::new(name).unwrap();
                if let Ok(open) = self.engine.open_clone(&model.name, &name) {
                    let read = |at, buf: &mut [u8]| open.read_at(at, buf);
                    let content = [Some(&clone.image.content), None];
                    pages_are(
                        what,
                        name.as_str(),
                        clone.image.size,
                        &content,
                        &doubt,
                        &read,
                        counts,
                    );
                }
            }
        }
    }

    /// The disks are good again; everything is, after an opening, and stays so.
    fn repaired(&mut self, power: bool, counts: &mut Counts) {
        self.world.clear_faults();
        self.index.clear_faults();
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
        self.faulty = false;
        self.reopen();
        let under_way = self.under_way.take();
        // What a failed sync covered counts as lost, also to a kill.
        self.settle(under_way, true);
        self.compare_views();
        for v in 0..self.volumes.len() {
            self.check_diff(v);
            self.write(v).unwrap();
            self.flush(v).unwrap();
        }
        while self
            .volumes
            .iter()
            .any(|v| v.snapshots.len() >= self.shape.snapshots)
        {
            for v in 0..self.volumes.len() {
                self.delete(v).unwrap();
            }
        }
        self.snapshot().unwrap();
        self.world.power_cut();
        self.index.power_cut(chance);
        self.reopen();
        self.settle(None, true);
        self.compare_views();
        counts.add(if power {
            "repaired by a power cut"
        } else {
            "repaired by a kill"
        });
    }

    /// What semantics.md says of a volume whose source failed to sync: it stays so.
    fn failed_sync_sticks(&mut self, v: usize, what: &str, counts: &mut Counts) {
        let state = self.volume(v).info().state;
        if !matches!(state, VolumeState::Suspect(_)) {
            return;
        }
        self.world.clear_faults();
        let refused = self.volume(v).flush();
        assert!(refused.is_err(), "{what}: a later flush says all is well");
        counts.add("a failed sync stuck");
    }
}

/// Every page that can be read is what one of the contents says.
fn pages_are(
    what: &str,
    view: &str,
    size: u64,
    contents: &[Option<&Content>; 2],
    in_doubt: &dyn Fn(u64) -> bool,
    read: &dyn Fn(u64, &mut [u8]) -> Result<()>,
    counts: &mut Counts,
) {
    for page in 0..size.div_ceil(PAGE) {
        let len = PAGE.min(size - page * PAGE) as usize;
        let mut bytes = vec![0xa5; len];
        match read(page * PAGE, &mut bytes) {
            Ok(()) if in_doubt(page) => {}
            Ok(()) => {
                let mut contents = contents.iter().flatten();
                let right = contents.any(|content| content.read(page * PAGE, len) == bytes);
                assert!(right, "{what}: {view}: page {page} is wrong");
                counts.add("pages right while disks fail");
            }
            Err(e) => {
                one_line(what, &e);
                counts.add("pages refused while disks fail");
            }
        }
    }
}

/// A refusal says what and why, in one line.
pub fn one_line(what: &str, e: &Error) {
    let text = e.chain();
    let plain = text.chars().all(|c| !c.is_control()) && (12..600).contains(&text.len());
    assert!(plain, "{what}: {text:?}");
    let blamed = matches!(
        e.kind(),
        Kind::Invalid | Kind::Limit | Kind::Locked | Kind::Interrupted
    );
    assert!(!blamed, "{what}: {:?} {text:?}", e.kind());
}

/// A store in which there is something of everything.
pub fn furnished(seed: u64) -> Run {
    let mut run = Run::new(seed, Shape::small());
    run.dying = true;
    let furnished = |run: &Run| {
        let all = |model: &crate::state::Volume| {
            !model.snapshots.is_empty()
                && model.snapshots.len() < run.shape.snapshots
                && !model.bookmarks.is_empty()
                && model.clones.len() == 1
        };
        run.volumes.iter().all(all)
    };
    for _ in 0..5000 {
        if furnished(&run) {
            break;
        }
        run.any_operation().expect("nothing fails yet");
    }
    assert!(furnished(&run), "seed {seed}");
    run.fork(seed)
}

/// One loop: n = first, first + step... until no fault strikes.
struct Loop<'a> {
    base: &'a Run,
    seed: u64,
    site: (&'static str, Site),
    lasting: bool,
    case: Case,
    n: u64,
    step: u64,
}

impl Loop<'_> {
    /// One n; whether there is another.
    fn turn(&mut self, counts: &mut Counts, here: &mut Here) -> bool {
        let more = match self.case {
            Case::Operation(work, v) => self.operation(work, v, counts, here),
            Case::Opening(how) => self.opening(how, counts, here),
        };
        self.n += self.step;
        assert!(self.n < 20_000, "it never ends");
        counts.moments += u64::from(!more);
        more
    }

    fn run(
        &self,
        name: &str,
        counts: &mut Counts,
        here: &mut Here,
        case: &dyn Fn(&mut Run, u64, &mut Counts) -> bool,
    ) -> bool {
        let head = here.0.clone();
        let often = if self.lasting { "from then on" } else { "once" };
        here.0 = format!("{head}: {name}, {} at {}, {often}", self.site.0, self.n);
        let mut run = self.base.fork(self.seed);
        let struck = case(&mut run, self.n, counts);
        if struck {
            crate::army::begun();
            counts.states += 1;
            counts.add(self.site.0);
            counts.add(name);
            run.repaired((self.seed ^ self.n) & 1 == 0, counts);
        }
        here.0 = head;
        struck
    }

    fn operation(
        &self,
        (name, work): (&str, Workload),
        v: usize,
        counts: &mut Counts,
        here: &mut Here,
    ) -> bool {
        self.run(name, counts, here, &|run, n, counts| {
            run.reopen();
            run.settle(None, false);
            run.dying = true;
            run.faulty = true;
            run.ever_full = true;
            run.set_fault(self.site.1, n, self.lasting);
            let done = work(run, v);
            let what = format!("{name}, {} at {n}", self.site.0);
            match &done {
                Ok(()) => counts.add("done all the same"),
                Err(e) => {
                    one_line(&what, e);
                    run.nothing_is_missing(&what);
                    counts.add("refused");
                    if std::env::var_os("STILLFRAME_FAULTS_SAY").is_some() {
                        println!("{what}: {}", e.chain());
                    }
                }
            }
            if !run.struck() {
                assert!(done.is_ok(), "{what}: {done:?} and nothing had failed");
                return false;
            }
            run.nothing_is_wrong(&what, counts);
            if self.site.0 == FAILED_SOURCE_SYNC {
                let good = |v| {
                    let state = run.volume(v).info().state;
                    matches!(state, VolumeState::Active | VolumeState::Unverified)
                };
                let forgotten = (0..run.volumes.len()).all(good);
                // Behind a stop nobody asks again.
                let said = name == "clean stop" && done.is_err();
                assert!(said || !forgotten, "{what}: nobody knows of it any more");
            }
            run.failed_sync_sticks(v, &what, counts);
            true
        })
    }

    fn opening(&self, how: &'static str, counts: &mut Counts, here: &mut Here) -> bool {
        let name = format!("opening after: {how}");
        self.run(&name, counts, here, &|run, n, counts| {
            run.ever_full = true;
            let chance = run.chance.next();
            match how {
                "stop" => {
                    run.reopen();
                    run.settle(None, false);
                    run.engine.close().expect("nothing fails yet");
                    run.volumes.iter_mut().for_each(|model| model.stopped());
                    run.world.kill();
                    run.index.kill(chance);
                }
                "power cut" => {
                    run.world.power_cut();
                    run.index.power_cut(chance);
                }
                "map lost" => run.index.lose(),
                _ => {}
            }
            run.faulty = true;
            run.set_fault(self.site.1, n, self.lasting);
            let done = run.try_reopen();
            let what = format!("{name}, {} at {n}", self.site.0);
            match &done {
                Ok(()) => {
                    counts.add("opened all the same");
                    if how != "power cut" {
                        run.nothing_is_wrong(&what, counts);
                    }
                }
                Err(e) => {
                    one_line(&what, e);
                    counts.add("not opened");
                }
            }
            assert!(run.struck() || done.is_ok(), "{what}: {done:?}");
            run.struck()
        })
    }
}

#[derive(Clone, Copy)]
enum Case {
    Operation((&'static str, Workload), usize),
    Opening(&'static str),
}

/// Every operation on each volume and every opening, with everything that may fail there.
fn every_kind(volumes: usize) -> Vec<((&'static str, Site), bool, Case)> {
    let mut all = Vec::new();
    for &site in SITES {
        for lasting in [false, true] {
            for &work in WORKLOADS {
                all.extend((0..volumes).map(|v| (site, lasting, Case::Operation(work, v))));
            }
            all.extend(
                OPENINGS
                    .iter()
                    .map(|how| (site, lasting, Case::Opening(how))),
            );
        }
    }
    all
}

fn every_loop(seed: u64, every: u64) -> Counts {
    let mut counts = Counts::default();
    let mut here = Here(format!("STILLFRAME_FAULTS_SEED={seed}"));
    let base = furnished(seed);
    let mut chance = Chance(seed ^ 0x0fa1_0fa1);
    let mut kinds = every_kind(base.volumes.len());
    // Mixed, and each in its turn, so that a part of them has something of every kind.
    for n in (1..kinds.len()).rev() {
        kinds.swap(n, chance.below(n as u64 + 1) as usize);
    }
    let mut loops = Vec::new();
    for (site, lasting, case) in kinds {
        loops.push(Loop {
            base: &base,
            seed: chance.next(),
            site,
            lasting,
            case,
            n: 1 + chance.below(every),
            step: every,
        });
    }
    while !loops.is_empty() {
        loops.retain_mut(|of| of.turn(&mut counts, &mut here));
    }
    counts
}

/// A sample in CI; a campaign takes every n.
#[test]
fn every_io_may_fail() {
    let campaign = Campaign::of("FAULTS", 1500, 2);
    let every = if campaign.is_default() { 7 } else { 1 };
    let done = campaign.run(|seed| every_loop(seed, every));
    println!("{done}");
    let counts = &done.counts;
    if done.full_share() {
        let sites = SITES.iter().map(|(name, _)| *name);
        let works = WORKLOADS.iter().map(|(name, _)| *name);
        for what in sites.chain(works).chain([
            "refused",
            "done all the same",
            "not opened",
            "opened all the same",
            "a failed sync stuck",
            "pages refused while disks fail",
            "repaired by a kill",
            "repaired by a power cut",
        ]) {
            assert!(counts.of(what) >= 3, "only {} of {what}", counts.of(what));
        }
    }
}
