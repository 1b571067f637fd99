//! Clones where something else went wrong, in process, on simulated disks.
//!
//! Shown: what was written to a clone is never removed because a part of the log was lost, also where
//! that looked like a torn end; readers notice nothing of a clone's base being set; the files of one
//! clone keep neither the store nor another clone from opening; a clone that has failed leaves the stop
//! of the store clean, and is looked at anew by the next start; marks of failure in the superblock mean
//! what was there when they were made, and fit there.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set its stage has failed"
)]

mod rig;
#[path = "rig/sim.rs"]
mod sim;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use stillframe::error::Kind;
use stillframe::log::superblock::SuperblockFile;
use stillframe::map::memory::MemoryIndexHome;
use stillframe::sys::disk::{Dir, Disk};
use stillframe::sys::sim::{Op, SimWorld};
use stillframe::units::Name;
use stillframe::volume::{
    Engine, OnFull, OpenClone, Settings, SnapshotState, VolumeOptions, VolumeState,
};

use sim::environment;

const SIZE: u64 = 256 << 10;
const EIO: i32 = 5;

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn settings() -> Settings {
    Settings {
        ballast_bytes: 0,
        ..Settings::default()
    }
}

struct Stage {
    world: SimWorld,
    index: MemoryIndexHome,
    engine: Arc<Engine>,
}

impl Stage {
    /// A volume of ones, and a snapshot of it.
    fn new(options: VolumeOptions) -> Stage {
        let world = SimWorld::new(7);
        let index = MemoryIndexHome::new();
        let env = environment(&world, &index);
        Engine::create(&env, &settings()).unwrap();
        let engine = Engine::open(env, settings()).unwrap();
        world.add_disk("v", SIZE);
        let live = engine.add_volume(&name("v"), "v", options).unwrap();
        live.write_at(0, &vec![1; SIZE as usize], false).unwrap();
        let stage = Stage {
            world,
            index,
            engine,
        };
        stage.take("s");
        stage
    }

    fn usual() -> Stage {
        Stage::new(VolumeOptions::default())
    }

    fn take(&self, snapshot: &str) {
        let taken = self.engine.take_snapshots(&[(name("v"), name(snapshot))]);
        taken.unwrap();
    }

    fn clone_of(&self, snapshot: &str, clone: &str) -> Arc<OpenClone> {
        self.engine
            .clone_snapshot(&name("v"), &name(snapshot), &name(clone))
            .unwrap();
        self.open(clone)
    }

    fn empty(&self, clone: &str) -> Arc<OpenClone> {
        self.engine.clone_empty(&name("v"), &name(clone)).unwrap();
        self.open(clone)
    }

    fn open(&self, clone: &str) -> Arc<OpenClone> {
        self.engine.open_clone(&name("v"), &name(clone)).unwrap()
    }

    fn reopen(&mut self) {
        self.engine = Engine::open(environment(&self.world, &self.index), settings()).unwrap();
    }

    fn kill(&mut self) {
        self.world.kill();
        self.index.kill(1);
    }

    /// The files of clones, but for their checksums.
    fn overlays(&self) -> Vec<String> {
        let mut names = self.world.dir("store/clones").list().unwrap();
        names.retain(|name| !name.ends_with(".sums"));
        names.sort();
        names
    }

    fn newest_segment(&self) -> String {
        let names = self.world.dir("store/log").list().unwrap();
        let newest = names.into_iter().filter(|n| n.ends_with(".seg")).max();
        format!("store/log/{}", newest.unwrap())
    }

    /// Where the batches of the newest segment begin.
    fn batches(&self) -> Vec<u64> {
        let bytes = self.world.peek(&self.newest_segment()).unwrap();
        let starts = (0..bytes.len()).step_by(4096);
        let batch = |at: &usize| bytes[*at..].starts_with(b"SFbatch1");
        starts.filter(batch).map(|at| at as u64).collect()
    }

    fn rot(&self, from: u64, to: u64) {
        let bytes = vec![0xee; (to - from) as usize];
        self.world.poke(&self.newest_segment(), from, &bytes);
    }

    /// No space, and what the log had written ahead and set aside is gone.
    fn nothing_held_back(&self) {
        sim::nothing_held_back(&self.world);
        let used = self.world.allocated("store");
        self.world.set_space("store", Some(used));
    }

    fn state(&self, snapshot: &str) -> SnapshotState {
        self.engine
            .snapshot(&name("v"), &name(snapshot))
            .unwrap()
            .state
    }
}

fn read(clone: &OpenClone, at: u64) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    clone.read_at(at, &mut bytes).unwrap();
    bytes
}

/// The CLONE of a clone is lost, and nothing else tells of it: its overlay stays all the same.
#[test]
fn an_overlay_stays_when_the_record_of_its_clone_is_lost() {
    for (followed, newer) in [(true, false), (true, true), (false, false)] {
        let mut s = Stage::usual();
        let kept = s.clone_of("s", "kept");
        kept.write_at(0, &[2; 4096], false).unwrap();
        drop(kept);
        let before = s.batches().len();
        let lost = s.clone_of("s", "lost");
        lost.write_at(0, &[3; 4096], false).unwrap();
        lost.flush().unwrap();
        drop(lost);
        let after = s.batches().len();
        if newer {
            // The number of its layer is below one that is known.
            drop(s.clone_of("s", "newer"));
        }
        if followed {
            s.take("t");
            s.take("u");
        }
        let mut batches = s.batches();
        batches.push(s.world.peek(&s.newest_segment()).unwrap().len() as u64);
        s.kill();
        s.index.lose();
        s.rot(batches[before], batches[after]);
        assert_eq!(s.overlays(), ["000001.data", "000002.data"]);
        s.reopen();
        let what = format!("followed {followed}, newer {newer}");
        let known = s.engine.clone_info(&name("v"), &name("lost"));
        assert_eq!(known.unwrap_err().kind(), Kind::NotFound, "{what}");
        for _ in 0..2 {
            assert_eq!(
                s.overlays(),
                ["000001.data", "000002.data.lost-1"],
                "{what}"
            );
            let content = s.world.peek("store/clones/000002.data.lost-1").unwrap();
            assert_eq!(content, [3; 4096], "{what}");
            // Upkeep and another start do not touch it.
            for _ in 0..3 {
                s.engine.maintain().unwrap();
            }
            s.engine.close().unwrap();
            s.kill();
            s.reopen();
        }
        // Nor does a new clone.
        s.take("w");
        let new = s.clone_of("w", "new");
        new.write_at(0, &[4; 4096], false).unwrap();
        assert_eq!(read(&new, 0), [4; 4096]);
        drop(new);
        s.engine.delete_clone(&name("v"), &name("new")).unwrap();
        s.engine.delete_clone(&name("v"), &name("kept")).unwrap();
        s.engine.maintain().unwrap();
        assert_eq!(s.overlays(), ["000002.data.lost-1"], "{what}");
    }
}

/// What nobody needs goes, also if it could not be removed when its clone went.
#[test]
fn an_overlay_of_a_deleted_clone_goes_at_the_next_start() {
    let mut s = Stage::usual();
    let clone = s.clone_of("s", "c");
    clone.write_at(0, &[2; 4096], false).unwrap();
    s.engine.delete_clone(&name("v"), &name("c")).unwrap();
    drop(clone);
    s.kill();
    assert_eq!(s.overlays(), ["000001.data"]);
    // A file that cannot be removed keeps nobody waiting.
    s.world.fail_nth(Op::Remove, 1, EIO);
    s.reopen();
    assert_eq!(s.overlays(), ["000001.data"]);
    s.kill();
    s.reopen();
    assert!(s.overlays().is_empty());
}

/// While a snapshot is taken over, whoever reads the clone sees it with that snapshot or without.
#[test]
fn a_reader_notices_nothing_of_a_base_that_is_set() {
    let s = Stage::usual();
    s.take("t");
    let clone = s.empty("g");
    let snapshots = ["s", "t"].map(|of| s.engine.open_snapshot(&name("v"), &name(of)).unwrap());
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for opens in [false, true] {
            let (s, clone, stop, reads) = (&s, &clone, &stop, &reads);
            scope.spawn(move || {
                while !stop.load(Ordering::Acquire) {
                    let other = opens.then(|| s.open("g"));
                    let clone = other.as_ref().unwrap_or(clone);
                    let mut bytes = [9; 4096];
                    match clone.read_at(4096, &mut bytes) {
                        Ok(()) => assert_eq!(bytes, [1; 4096]),
                        // It is empty just now.
                        Err(e) => assert_eq!(e.kind(), Kind::Invalid, "{e:?}"),
                    }
                    reads.fetch_add(1, Ordering::AcqRel);
                }
            });
        }
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Release);
            }
        }
        let _stop = Stop(&stop);
        for round in 0..1500 {
            let from = &snapshots[round % 2];
            assert!(clone.take_over(from, 0, 16 << 10).unwrap());
            clone.set_size(0).unwrap();
        }
    });
    assert!(reads.load(Ordering::Acquire) > 100);
}

/// An error of the medium at any file that is opened by a start: it is that of one clone, or it is said
/// what else it is.
#[test]
fn a_clone_whose_files_cannot_be_looked_at_fails_alone() {
    let s = Stage::usual();
    for clone in ["c", "d"] {
        let clone = s.clone_of("s", clone);
        clone.write_at(0, &[2; 4096], false).unwrap();
    }
    s.engine.close().unwrap();
    let mut alone = 0;
    for n in 1..60 {
        let world = s.world.fork(n);
        world.kill();
        let index = s.index.clone();
        world.fail_nth(Op::Open, n, EIO);
        let engine = match Engine::open(environment(&world, &index), settings()) {
            Ok(engine) => engine,
            Err(e) => {
                let why = e.chain();
                assert!(!why.contains("overlay"), "{n}: {why}");
                continue;
            }
        };
        let states = ["c", "d"].map(|clone| {
            let info = engine.clone_info(&name("v"), &name(clone)).unwrap();
            matches!(info.state, SnapshotState::Failed(_))
        });
        assert_ne!(states, [true, true], "{n}");
        if states == [false, false] {
            continue;
        }
        alone += 1;
        let (bad, good) = if states[0] { ("c", "d") } else { ("d", "c") };
        let open = |clone| engine.open_clone(&name("v"), &name(clone)).unwrap();
        open(good).write_at(0, &[4; 4096], false).unwrap();
        let refused = open(bad).write_at(0, &[4; 4096], false);
        assert_eq!(refused.unwrap_err().kind(), Kind::Failed);
        // It is looked at again by the next start, after a stop that is clean.
        engine.close().unwrap();
        world.kill();
        let engine = Engine::open(environment(&world, &index), settings()).unwrap();
        let open = |clone| engine.open_clone(&name("v"), &name(clone)).unwrap();
        assert_eq!(read(&open(bad), 0), [2; 4096]);
        assert_eq!(read(&open(good), 0), [4; 4096]);
        open(bad).write_at(0, &[5; 4096], false).unwrap();
    }
    assert_eq!(alone, 2, "each of the two clones has failed alone");
}

#[test]
fn a_failed_clone_leaves_the_stop_clean_and_is_looked_at_anew() {
    let mut s = Stage::usual();
    let clone = s.clone_of("s", "c");
    clone.write_at(0, &[2; 4096], false).unwrap();
    clone.flush().unwrap();
    clone.write_at(0, &[3; 4096], false).unwrap();
    s.world.fail_nth(Op::Sync, 1, EIO);
    assert_eq!(clone.flush().unwrap_err().kind(), Kind::Failed);
    drop(clone);
    let facts = |s: &Stage| {
        let info = s.engine.volume(&name("v")).unwrap().info();
        (info.state, info.mtime_ns)
    };
    let before = facts(&s);
    assert_eq!(before.0, VolumeState::Active);
    s.engine.close().unwrap();
    s.world.kill();
    s.reopen();
    assert_eq!(facts(&s), before, "the stop was not clean");
    let clone = s.open("c");
    assert_eq!(clone.info().state, SnapshotState::Active);
    // What the medium has, not what the cache showed.
    assert_eq!(read(&clone, 0), [2; 4096]);
    clone.write_at(0, &[4; 4096], false).unwrap();
    drop(clone);
    s.engine.close().unwrap();
    s.world.power_cut();
    s.reopen();
    assert_eq!(read(&s.open("c"), 0), [4; 4096]);
}

/// A sync that fails in the stop itself is told, and the store is clean all the same.
#[test]
fn a_clone_that_fails_while_the_store_is_closed_is_told() {
    let mut told = 0;
    for n in 1..40 {
        let mut s = Stage::usual();
        let clone = s.clone_of("s", "c");
        clone.write_at(0, &[2; 4096], false).unwrap();
        clone.flush().unwrap();
        clone.write_at(0, &[3; 4096], false).unwrap();
        drop(clone);
        s.world.fail_nth(Op::Sync, n, EIO);
        let closed = s.engine.close();
        let of_clone = closed.is_err_and(|e| e.chain().contains("overlay"));
        s.world.kill();
        s.index.kill(n);
        s.reopen();
        if of_clone {
            told += 1;
            let info = s.engine.volume(&name("v")).unwrap().info();
            assert_eq!(info.state, VolumeState::Active);
            assert_eq!(read(&s.open("c"), 0), [2; 4096]);
        }
    }
    assert_eq!(told, 1);
}

/// What lies behind the end of a growing clone cannot be taken away at a start: the store opens, the clone
/// can be read and not written, and the next start takes it away.
#[test]
fn a_growing_clone_that_cannot_be_put_right_does_not_keep_the_store_from_opening() {
    let mut reached = 0;
    for n in 1..4 {
        let mut s = Stage::usual();
        let clone = s.empty("g");
        clone.write_at(0, &[2; 9000], false).unwrap();
        clone.flush().unwrap();
        drop(clone);
        // As a write that was cut off leaves it.
        let disk = s.world.disk("store/clones/000001.data").unwrap();
        disk.write_all_at(12_000, &[&[7; 1000]]).unwrap();
        s.kill();
        s.world.fail_nth(Op::Punch, n, EIO);
        s.reopen();
        let clone = s.open("g");
        assert_eq!(read(&clone, 4096), [2; 4096]);
        let failed = matches!(clone.info().state, SnapshotState::Failed(_));
        let grown = clone.set_size(13_000).map_err(|e| e.kind());
        let expected = if failed { Err(Kind::Failed) } else { Ok(()) };
        assert_eq!(grown, expected);
        reached += u64::from(failed);
        drop(clone);
        if n % 2 == 0 {
            s.engine.close().unwrap();
        }
        s.kill();
        s.reopen();
        let clone = s.open("g");
        clone.set_size(13_000).unwrap();
        assert_eq!(read(&clone, 8904)[96..], [0; 4000]);
    }
    assert!(reached > 0, "nothing was ever refused");
}

/// Epochs of snapshots that could not be taken are known in memory only, and a mark of failure names them.
/// A later snapshot that was given such an epoch again would fail with the old ones.
#[test]
fn a_mark_in_the_superblock_does_not_fail_a_later_snapshot() {
    let mut s = Stage::new(VolumeOptions {
        on_full: OnFull::FailSnapshot,
        on_full_wait_s: 0,
        ..VolumeOptions::default()
    });
    s.world.set_space("store", Some(s.world.allocated("store")));
    // Until not even the reserve has room for a record.
    let mut refused = 0;
    for n in 0..2000 {
        let target = (name("v"), name(&format!("x{n}")));
        refused += u64::from(s.engine.take_snapshots(&[target]).is_err());
        if refused == 5 {
            break;
        }
    }
    assert_eq!(refused, 5);
    let live = s.engine.volume(&name("v")).unwrap();
    live.write_at(0, &vec![5; SIZE as usize], false).unwrap();
    assert!(matches!(s.state("s"), SnapshotState::Failed(_)));
    s.kill();
    // The mark cannot go into the log yet.
    s.reopen();
    assert!(matches!(s.state("s"), SnapshotState::Failed(_)));
    s.world.set_space("store", None);
    s.engine.accept_volume(&name("v")).ok();
    s.take("good");
    let live = s.engine.volume(&name("v")).unwrap();
    live.write_at(0, &vec![6; SIZE as usize], false).unwrap();
    for _ in 0..3 {
        s.kill();
        s.reopen();
        assert_eq!(s.state("good"), SnapshotState::Active);
        assert!(matches!(s.state("s"), SnapshotState::Failed(_)));
        let good = s.engine.open_snapshot(&name("v"), &name("good")).unwrap();
        let mut bytes = vec![0; SIZE as usize];
        good.read_at(0, &mut bytes).unwrap();
        assert!(bytes == vec![5; SIZE as usize]);
    }
}

/// Losses on a disk without any room, with more clones than the log's reserve takes records one by one.
#[test]
fn losses_are_noted_on_a_full_disk_however_many_have_failed() {
    let mut s = Stage::usual();
    for n in 0..150 {
        drop(s.clone_of("s", &format!("c{n}")));
    }
    let before = s.batches().len();
    for n in 0..4 {
        s.take(&format!("t{n}"));
    }
    let batches = s.batches();
    s.kill();
    s.index.lose();
    s.rot(batches[before], batches[before + 2]);
    for _ in 0..2 {
        s.nothing_held_back();
        s.reopen();
        let clones = s.engine.clones(&name("v")).unwrap();
        assert_eq!(clones.len(), 150);
        let failed = |state: &SnapshotState| matches!(state, SnapshotState::Failed(_));
        assert!(clones.iter().all(|c| failed(&c.state)));
        assert!(failed(&s.state("s")));
        assert!(!failed(&s.state("t3")));
        s.kill();
        // The log did not take them.
        let superblock = SuperblockFile::open(s.world.dir("store").as_ref()).unwrap();
        assert!(superblock.current().invalid.len() > 150);
        s.index.lose();
    }
}
