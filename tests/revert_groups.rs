//! A revert of many groups of grains, three of which are under way at once (`volume/revert_groups.rs`).
//!
//! Goal: that a group is preserved while the one before is written and the one behind is read changes
//! nothing of what a revert promises: wherever the process or the power ends, wherever the log or the
//! source fails or is full, the volume is what it was or what it was to be, and every snapshot, the one
//! that undoes included, is exact. And no more than three groups are held at once.
//!
//! Method: six groups, by their bytes and by their number of runs, on a simulated machine. The stage is
//! set once and copied for each case. The source is watched: a write of it can be held or fail. Segments
//! are smaller than a group, end in the middle, or hold all. Which thread comes first is the scheduler's
//! choice, so a case does not repeat exactly; counters prove what was reached.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set its stage has failed"
)]

mod rig;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use stillframe::error::{Kind, Result};
use stillframe::map::memory::MemoryIndexHome;
use stillframe::sys::disk::{Disk, Identity};
use stillframe::sys::sim::{Op, SimWorld};
use stillframe::units::Name;
use stillframe::volume::{
    Engine, Environment, Settings, SnapshotState, Sources, Volume, VolumeOptions, VolumeState,
};

use rig::{Chance, setting};

const MIB: usize = 1 << 20;
const GRAIN: usize = 4096;
/// The first half is changed as one run, and every second grain behind it.
const SIZE: usize = 30 * MIB;
const WHOLE: usize = 12 * MIB;
/// A group: 4 MiB or 1024 runs.
const GROUP: usize = 4 * MIB;
const GROUPS: u64 = 6;
/// Bytes of one content at the snapshot; as many zeros are punched, fewer are written.
const RUN: usize = 64 << 10;

fn n(name: &str) -> Name {
    Name::new(name).unwrap()
}

/// What the source is asked, and what it is made to do.
#[derive(Default)]
struct Watch {
    read: AtomicU64,
    writes: AtomicU64,
    /// Where it was punched, and how long.
    punched: Mutex<Vec<(u64, u64)>>,
    /// The n-th write from now fails; 0 for none.
    fail: AtomicU64,
    /// The next write says that it has come and waits until it may go on.
    hold: Mutex<Option<(Sender<()>, Receiver<()>)>>,
}

struct Watched(Arc<dyn Disk>, Arc<Watch>);

impl Watched {
    fn arrive(&self) -> io::Result<()> {
        self.1.writes.fetch_add(1, Ordering::SeqCst);
        let hold = self.1.hold.lock().unwrap().take();
        if let Some((arrived, go_on)) = hold {
            arrived.send(()).unwrap();
            go_on.recv().unwrap();
        }
        let left = self.1.fail.load(Ordering::SeqCst);
        if left > 0 && self.1.fail.fetch_sub(1, Ordering::SeqCst) == 1 {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }
}

impl Disk for Watched {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.1.read.fetch_add(buf.len() as u64, Ordering::SeqCst);
        self.0.read_exact_at(offset, buf)
    }
    fn write_all_at(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        self.arrive()?;
        self.0.write_all_at(offset, parts)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }
    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }
    fn set_size(&self, size: u64) -> io::Result<()> {
        self.0.set_size(size)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.arrive()?;
        self.1.punched.lock().unwrap().push((offset, len));
        self.0.punch(offset, len)
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.0.next_data(offset)
    }
    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        self.0.next_hole(offset)
    }
    fn allocated(&self) -> io::Result<u64> {
        self.0.allocated()
    }
    fn drop_cache(&self) -> io::Result<()> {
        self.0.drop_cache()
    }
    fn identity(&self) -> io::Result<Identity> {
        self.0.identity()
    }
}

struct WatchedSources(SimWorld, Arc<Watch>);

impl Sources for WatchedSources {
    fn open(&self, path: &str) -> Result<Arc<dyn Disk>> {
        let disk = self.0.disk(path).unwrap();
        Ok(Arc::new(Watched(disk, Arc::clone(&self.1))))
    }
}

fn settings(segment_bytes: usize) -> Settings {
    Settings {
        ballast_bytes: 256 << 10,
        segment_bytes: segment_bytes as u64,
        ..Settings::default()
    }
}

fn open(world: &SimWorld, watch: &Arc<Watch>, segment_bytes: usize) -> Arc<Engine> {
    let env = Environment {
        dir: world.dir("store"),
        // The map is made again from the log each time.
        index: Arc::new(MemoryIndexHome::new()),
        sources: Arc::new(WatchedSources(world.clone(), Arc::clone(watch))),
        clock: Arc::new(world.clock()),
    };
    Engine::open(env, settings(segment_bytes)).unwrap()
}

/// Where a run that is changed begins, and its length.
fn changes() -> impl Iterator<Item = (usize, usize)> {
    let grains = (WHOLE + GRAIN..SIZE).step_by(2 * GRAIN);
    std::iter::once((0, WHOLE)).chain(grains.map(|at| (at, GRAIN)))
}

/// A volume with a snapshot `a` and everything in it changed since.
struct Stage {
    world: SimWorld,
    a: Vec<u8>,
    live: Vec<u8>,
}

impl Stage {
    fn new() -> Stage {
        let (world, watch) = (SimWorld::new(1), Arc::default());
        let env = Environment {
            dir: world.dir("store"),
            index: Arc::new(MemoryIndexHome::new()),
            sources: Arc::new(WatchedSources(world.clone(), Arc::clone(&watch))),
            clock: Arc::new(world.clock()),
        };
        Engine::create(&env, &settings(64 * MIB)).unwrap();
        let engine = open(&world, &watch, 64 * MIB);
        world.add_disk("files/v", SIZE as u64);
        let options = VolumeOptions::default();
        let volume = engine.add_volume(&n("v"), "files/v", options).unwrap();
        let mut a = vec![0; SIZE];
        for (i, run) in a.chunks_mut(RUN).enumerate() {
            // Every fifth is zero, so that a revert punches, too.
            run.fill((i % 5 * 50) as u8);
        }
        volume.write_at(0, &a, false).unwrap();
        volume.flush().unwrap();
        engine.take_snapshots(&[(n("v"), n("a"))]).unwrap();
        let mut live = a.clone();
        for (at, len) in changes() {
            for grain in live[at..at + len].chunks_mut(GRAIN) {
                grain.fill(grain[0] + 1);
            }
            volume
                .write_at(at as u64, &live[at..at + len], false)
                .unwrap();
        }
        volume.flush().unwrap();
        engine.close().unwrap();
        Stage { world, a, live }
    }

    /// A copy of the stage with an engine of its own.
    fn copy(&self, seed: u64, segment_bytes: usize) -> Case<'_> {
        let (world, watch) = (self.world.fork(seed), Arc::default());
        let engine = open(&world, &watch, segment_bytes);
        Case {
            stage: self,
            world,
            watch,
            engine,
        }
    }
}

struct Case<'a> {
    stage: &'a Stage,
    world: SimWorld,
    watch: Arc<Watch>,
    engine: Arc<Engine>,
}

impl Case<'_> {
    fn volume(&self) -> Arc<Volume> {
        self.engine.volume(&n("v")).unwrap()
    }

    /// Reverts to `a`; `told` hears of each group that is preserved, from 1.
    fn revert(&self, told: &mut dyn FnMut(u64)) -> Result<()> {
        let (mut number, mut last) = (0, 0);
        let done = self.engine.revert_volume(&n("v"), &n("a"), &mut |seen, _| {
            // At the end it hears once more of all.
            if seen > last {
                (number, last) = (number + 1, seen);
                told(number);
            }
        });
        done.map(drop)
    }

    fn live(&self) -> Vec<u8> {
        let mut all = vec![0; SIZE];
        self.volume().read_at(0, &mut all).unwrap();
        all
    }

    /// Every snapshot is exact; whether there is one that undoes.
    fn check_snapshots(&self, what: &str) -> bool {
        let mut undo = false;
        for info in self.engine.snapshots(&n("v")).unwrap() {
            assert_eq!(info.state, SnapshotState::Active, "{what}");
            let snapshot = self.engine.open_snapshot(&n("v"), &info.name).unwrap();
            let mut all = vec![0; SIZE];
            snapshot.read_at(0, &mut all).unwrap();
            let wanted = match info.name.as_str() {
                "a" => &self.stage.a,
                _ => {
                    undo = true;
                    &self.stage.live
                }
            };
            let differs = all.iter().zip(wanted).position(|(x, y)| x != y);
            assert_eq!(differs, None, "{what}: {}", info.name);
        }
        undo
    }

    /// Grains that were written in the source, of those that the revert changes.
    fn grains_done(&self) -> (usize, usize) {
        let now = self.world.peek("files/v").unwrap();
        let (mut done, mut all) = (0, 0);
        for (at, len) in changes() {
            for at in (at..at + len).step_by(GRAIN) {
                done += usize::from(now[at..at + GRAIN] == self.stage.a[at..at + GRAIN]);
                all += 1;
            }
        }
        (done, all)
    }
}

/// The process or the power ends anywhere in a revert of six groups.
#[test]
fn a_cut_anywhere_with_groups_under_way() {
    let stage = Stage::new();
    let cases = setting("STILLFRAME_REVERT_CUTS", 45);
    let mut chance = Chance(setting("STILLFRAME_REVERT_SEED", 7));
    let (mut ahead, mut half, mut finished, mut undone) = (0, 0, 0, 0);
    // One without a cut tells how many changing calls there are.
    let whole = stage.copy(0, 64 * MIB);
    let changing = |world: &SimWorld| {
        let ops = [Op::Write, Op::Sync, Op::Punch, Op::SetSize, Op::DirSync];
        ops.map(|op| world.count(op)).iter().sum::<u64>()
    };
    let before = changing(&whole.world);
    let mut groups = 0;
    whole.revert(&mut |number| groups = number).unwrap();
    let calls = changing(&whole.world) - before;
    assert_eq!((groups, whole.live() == stage.a), (GROUPS, true));
    assert!(whole.check_snapshots("whole"));
    for number in 0..cases {
        let segment = [MIB, 6 * MIB, 64 * MIB][number as usize % 3];
        let mut case = stage.copy(number, segment);
        let mut preserved = 0;
        let at = 1 + chance.below(calls);
        case.world.die_at(at);
        let done = case.revert(&mut |number| preserved = number);
        let what = format!("case {number}, segments of {segment}, cut at {at} of {calls}");
        let (written, all) = case.grains_done();
        // More than one group was preserved and not yet written in whole.
        let begun = (written / all.div_ceil(GROUPS as usize)) as u64 + 1;
        ahead += u64::from(preserved > begun);
        half += u64::from(done.is_err() && written > 0 && written < all);
        match number % 2 {
            0 => case.world.kill(),
            _ => case.world.power_cut(),
        }
        case.engine = open(&case.world, &case.watch, segment);
        // After a cut nobody knows who else wrote to the source.
        let state = case.volume().info().state;
        let served = matches!(state, VolumeState::Active | VolumeState::Unverified);
        assert!(served, "{what}: {state:?}");
        let found = case.live();
        let undo = case.check_snapshots(&what);
        if found == stage.a {
            assert!(undo, "{what}");
            finished += 1;
        } else {
            assert!(found == stage.live && done.is_err(), "{what}: half");
            undone += 1;
        }
    }
    println!("{cases} cuts: {half} half, {ahead} ahead, {finished} finished, {undone} not begun");
    assert!(half >= cases / 3 && finished >= cases / 3 && ahead > 0);
}

/// While a group is written the next is preserved and the one behind is read, and no more than these.
#[test]
fn three_groups_are_under_way_and_no_more() {
    let stage = Stage::new();
    let case = stage.copy(3, 64 * MIB);
    let ((arrived, arrival), (go_on, wait)) = (channel(), channel());
    *case.watch.hold.lock().unwrap() = Some((arrived, wait));
    let read_before = case.watch.read.load(Ordering::SeqCst);
    let told = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let reverting =
            scope.spawn(|| case.revert(&mut |number| told.store(number, Ordering::SeqCst)));
        arrival.recv().unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        // The first write of the first group is held, and the second group gets preserved.
        while told.load(Ordering::SeqCst) < 2 {
            assert!(Instant::now() < end, "the next group waits for the writing");
            std::thread::yield_now();
        }
        assert_eq!(case.watch.writes.load(Ordering::SeqCst), 1);
        assert_eq!(case.grains_done().0, 0);
        // The third is read, and nothing beyond it however long this takes; a clean grain is read for
        // the target as well, and there are none among those of the first groups.
        let groups_read = || (case.watch.read.load(Ordering::SeqCst) - read_before) / GROUP as u64;
        while groups_read() < 3 {
            assert!(Instant::now() < end, "nobody reads ahead");
            std::thread::yield_now();
        }
        for _ in 0..1000 {
            assert!(told.load(Ordering::SeqCst) <= 2 && groups_read() <= 3);
            std::thread::yield_now();
        }
        go_on.send(()).unwrap();
        reverting.join().unwrap().unwrap();
    });
    assert_eq!(told.load(Ordering::SeqCst), GROUPS);
    assert!(case.live() == stage.a);
    assert!(case.check_snapshots("done"));
}

/// A long run of zeros becomes a hole; single grains of zeros, of which each would be a change of the
/// filesystem's records, are written.
#[test]
fn long_runs_of_zeros_are_punched_and_short_ones_written() {
    let stage = Stage::new();
    let case = stage.copy(4, 64 * MIB);
    case.revert(&mut |_| {}).unwrap();
    let zero = (0..WHOLE)
        .step_by(RUN)
        .filter(|at| (at / RUN).is_multiple_of(5));
    let wanted: Vec<_> = zero.map(|at| (at as u64, RUN as u64)).collect();
    assert_eq!(*case.watch.punched.lock().unwrap(), wanted);
    assert!(case.live() == stage.a);
    assert!(case.check_snapshots("done"));
}

/// The log takes no more, while groups are being written and read: all goes back.
#[test]
fn a_disk_that_fills_up_in_the_middle() {
    let stage = Stage::new();
    for after in 1..GROUPS {
        let segment = [MIB, 6 * MIB, 64 * MIB][after as usize % 3];
        let mut case = stage.copy(after, segment);
        let world = case.world.clone();
        let refused = case.revert(&mut |number| {
            if number == after {
                let used = world.allocated("store");
                world.set_space("store", Some(used));
            }
        });
        let what = format!("full after {after} groups");
        assert_eq!(refused.unwrap_err().kind(), Kind::NoSpace, "{what}");
        assert_eq!(case.volume().info().state, VolumeState::Active, "{what}");
        assert!(case.live() == stage.live, "{what}");
        // Its snapshot goes, too.
        assert!(!case.check_snapshots(&what), "{what}");
        case.world.set_space("store", None);
        case.world.power_cut();
        case.engine = open(&case.world, &case.watch, segment);
        assert!(case.live() == stage.live, "{what}");
        case.check_snapshots(&what);
        case.revert(&mut |_| {}).unwrap();
        assert!(case.live() == stage.a, "{what}");
    }
}

/// The source refuses a write while later groups are preserved: all goes back.
#[test]
fn a_source_that_fails_in_the_middle() {
    let stage = Stage::new();
    let mut written = 0;
    for nth in [1, 2, 40, 900, 2000, 2300] {
        let case = stage.copy(nth, 6 * MIB);
        case.watch.fail.store(nth, Ordering::SeqCst);
        let failed = case.revert(&mut |_| {});
        let what = format!("write {nth}");
        assert_eq!(failed.unwrap_err().kind(), Kind::Io, "{what}");
        written = written.max(case.watch.writes.load(Ordering::SeqCst));
        assert_eq!(case.volume().info().state, VolumeState::Active, "{what}");
        assert!(case.live() == stage.live, "{what}");
        assert!(!case.check_snapshots(&what), "{what}");
        case.revert(&mut |_| {}).unwrap();
        assert!(case.live() == stage.a, "{what}");
        assert!(case.check_snapshots(&what), "{what}");
    }
    assert!(written > 2300);
}

/// A call of the log fails once, whichever: the revert is done, or goes back.
#[test]
fn a_log_that_fails_while_the_reader_is_ahead() {
    let stage = Stage::new();
    let (mut done, mut back) = (0, 0);
    for (op, nth) in [Op::Write, Op::Sync, Op::Read]
        .into_iter()
        .flat_map(|op| (1..60).step_by(6).map(move |nth| (op, nth)))
    {
        let mut case = stage.copy(nth, 6 * MIB);
        case.world.fail_nth(op, nth, libc::EIO);
        let outcome = case.revert(&mut |_| {});
        let what = format!("{op:?} {nth}: {outcome:?}");
        case.check_snapshots(&what);
        if case.volume().info().state == VolumeState::Active {
            let wanted = [&stage.live, &stage.a][usize::from(outcome.is_ok())];
            assert!(case.live() == *wanted, "{what}");
        }
        match outcome {
            Ok(()) => done += 1,
            Err(_) => back += 1,
        }
        case.world.power_cut();
        case.engine = open(&case.world, &case.watch, 6 * MIB);
        let found = case.live();
        assert!(found == stage.live || found == stage.a, "{what}: half");
        case.check_snapshots(&what);
    }
    println!("{done} done, {back} gone back");
    assert!(done >= 3 && back >= 3);
}
