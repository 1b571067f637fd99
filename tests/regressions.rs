//! Faults that were found once, each with the sequence that showed it, on simulated disks.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set its stage has failed"
)]

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;
use stillframe::error::{Error, Kind, Result};
use stillframe::map::memory::MemoryIndexHome;
use stillframe::sys::disk::{Dir, Disk};
use stillframe::sys::sim::{Fault, Op, SimWorld, What};
use stillframe::units::Name;
use stillframe::volume::{
    Engine, Environment, OnFull, Settings, SnapshotState, Sources, VolumeOptions, VolumeState,
};

const MIB: u64 = 1 << 20;
struct SimSources(SimWorld);
impl Sources for SimSources {
    fn open(&self, path: &str) -> Result<Arc<dyn Disk>> {
        let disk = self
            .0
            .disk(path)
            .ok_or_else(|| Error::new(Kind::NotFound, format!("no {path}")))?;
        Ok(disk)
    }
}
fn settings() -> Settings {
    Settings {
        ballast_bytes: 0,
        map_cache_bytes: 4 << 10,
        segment_bytes: MIB,
        checkpoint_bytes: 64 * MIB,
        ..Settings::default()
    }
}
fn n(s: &str) -> Name {
    Name::new(s).unwrap()
}
fn env(w: &SimWorld, i: &MemoryIndexHome) -> Environment {
    Environment {
        dir: w.dir("store"),
        index: Arc::new(i.clone()),
        sources: Arc::new(SimSources(w.clone())),
        clock: Arc::new(w.clock()),
    }
}
fn fresh(seed: u64) -> (SimWorld, MemoryIndexHome, Arc<Engine>) {
    let (w, i) = (SimWorld::new(seed), MemoryIndexHome::new());
    Engine::create(&env(&w, &i), &settings()).unwrap();
    let e = Engine::open(env(&w, &i), settings()).unwrap();
    w.add_disk("src/v", 4 * MIB);
    e.add_volume(
        &n("v"),
        "src/v",
        VolumeOptions {
            on_full: OnFull::FailWrite,
            on_full_wait_s: 0,
            ..Default::default()
        },
    )
    .unwrap();
    (w, i, e)
}
fn reopen(w: &SimWorld, i: &MemoryIndexHome) -> Result<Arc<Engine>> {
    Engine::open(env(w, i), settings())
}
fn read(e: &Engine, s: &str) -> Result<u8> {
    let mut b = vec![0; 4096];
    e.open_snapshot(&n("v"), &n(s))?.read_at(0, &mut b)?;
    Ok(b[0])
}
fn state(e: &Engine) -> VolumeState {
    e.volume(&n("v")).unwrap().info().state
}

#[test]
fn a_refused_write_and_an_open_do_not_wait_for_each_other() {
    let (w, i, e) = fresh(1);
    let v = e.volume(&n("v")).unwrap();
    v.write_at(0, &[1; 4096], false).unwrap();
    e.take_snapshots(&[(n("v"), n("s"))]).unwrap();
    e.close().unwrap();
    drop(v);
    drop(e);
    w.kill();
    i.kill(1);
    w.poke("src/v", 0, &[9; 16]);
    let e = reopen(&w, &i).unwrap();
    let (tx, rx) = channel();
    let (e1, tx1) = (e.clone(), tx.clone());
    std::thread::spawn(move || {
        let v = e1.volume(&n("v")).unwrap();
        for _ in 0..200_000 {
            let _ = v.write_at(0, &[2; 4096], false);
        }
        tx1.send(()).unwrap();
    });
    std::thread::spawn(move || {
        for _ in 0..200_000 {
            let _ = e.open_snapshot(&n("v"), &n("s"));
        }
        tx.send(()).unwrap();
    });
    let a = rx.recv_timeout(Duration::from_secs(40));
    let b = rx.recv_timeout(Duration::from_secs(40));
    assert!(a.is_ok() && b.is_ok(), "DEADLOCK {a:?} {b:?}");
}

#[test]
fn a_snapshot_that_was_refused_does_not_come_back_with_new_bytes() {
    let (w, i, e) = fresh(2);
    let v = e.volume(&n("v")).unwrap();
    v.write_at(0, &[b'A'; 4096], false).unwrap();
    v.flush().unwrap();
    w.fail_nth(Op::Sync, 1, 5);
    // Neither a new segment nor a bare one; there is no spare.
    for nth in 1..=2 {
        w.fail_nth(Op::Open, nth, 28);
    }
    let r = e.take_snapshots(&[(n("v"), n("s"))]);
    assert!(r.is_err());
    v.write_at(0, &[b'B'; 4096], false).unwrap();
    drop(v);
    drop(e);
    w.kill();
    i.kill(1);
    let e = reopen(&w, &i).unwrap();
    if let Ok(byte) = read(&e, "s") {
        assert_eq!(
            byte, b'A',
            "a snapshot that was refused came back with new bytes"
        );
    }
}

#[test]
fn a_change_while_stopped_gets_a_later_time_also_without_snapshots() {
    let (w, i, e) = fresh(4);
    let v = e.volume(&n("v")).unwrap();
    v.write_at(0, &[b'A'; 4096], false).unwrap();
    let m1 = e.take_snapshots(&[(n("v"), n("s"))]).unwrap()[0].mtime_ns;
    e.delete_snapshot(&n("v"), &n("s")).unwrap();
    e.close().unwrap();
    drop(v);
    drop(e);
    w.kill();
    i.kill(1);
    w.advance(10_000_000_000);
    w.poke("src/v", 0, &[b'B'; 4096]);
    let e = reopen(&w, &i).unwrap();
    let m2 = e.take_snapshots(&[(n("v"), n("s"))]).unwrap()[0].mtime_ns;
    assert!(
        m2 >= m1 + 1_000_000_000,
        "the same time for content {}",
        read(&e, "s").unwrap() as char
    );
}

#[test]
fn what_is_accepted_after_a_failed_sync_is_what_the_medium_has() {
    let (w, i, e) = fresh(6);
    let v = e.volume(&n("v")).unwrap();
    v.write_at(0, &[b'A'; 4096], false).unwrap();
    v.flush().unwrap();
    v.write_at(0, &[b'B'; 4096], false).unwrap();
    w.fail_nth(Op::Sync, 1, 5);
    assert!(v.flush().is_err());
    e.accept_volume(&n("v")).unwrap();
    e.take_snapshots(&[(n("v"), n("s"))]).unwrap();
    assert_eq!(
        read(&e, "s").unwrap(),
        b'A',
        "what is accepted is what the medium has"
    );
    drop(v);
    drop(e);
    w.power_cut();
    i.power_cut(1);
    let e = reopen(&w, &i).unwrap();
    assert_eq!(
        read(&e, "s").unwrap(),
        b'A',
        "an acknowledged snapshot changed"
    );
}

#[test]
fn a_failed_sync_does_not_make_a_changed_source_good() {
    let (w, i, e) = fresh(7);
    let v = e.volume(&n("v")).unwrap();
    v.write_at(0, &[b'A'; 4096], false).unwrap();
    e.take_snapshots(&[(n("v"), n("s"))]).unwrap();
    e.close().unwrap();
    drop(v);
    drop(e);
    w.kill();
    i.kill(1);
    w.poke("src/v", 0, &[b'X'; 4096]);
    let e = reopen(&w, &i).unwrap();
    assert!(read(&e, "s").is_err());
    w.fail_nth(Op::Sync, 1, 5);
    let flushed = e.volume(&n("v")).unwrap().flush();
    assert!(flushed.is_err(), "the sync was made to fail");
    assert_eq!(read(&e, "s").unwrap_err().kind(), Kind::Failed);
}

#[test]
fn one_source_that_cannot_be_synced_does_not_stop_the_others() {
    let (w, i, e) = fresh(8);
    e.volume(&n("v"))
        .unwrap()
        .write_at(0, &[b'A'; 4096], false)
        .unwrap();
    drop(e);
    w.kill();
    i.kill(1);
    // Syncs at open: the log's and the superblock's first, the source's after them.
    let (mut refused, mut suspect) = (0, 0);
    for k in 1..6 {
        let f = w.fork(k);
        let fi = MemoryIndexHome::new();
        f.fail_nth(Op::Sync, k, 5);
        match reopen(&f, &fi) {
            Ok(e) => suspect += u32::from(matches!(state(&e), VolumeState::Suspect(_))),
            Err(e) => refused += u32::from(e.chain().contains("src/v")),
        }
    }
    assert_eq!(refused, 0, "the store does not open because of one source");
    assert_eq!(suspect, 1, "one of the failed syncs is the source's");
}

#[test]
fn an_open_on_a_full_disk_is_no_clean_stop() {
    let (w, i, e) = fresh(10);
    let v = e.volume(&n("v")).unwrap();
    e.take_snapshots(&[(n("v"), n("s"))]).unwrap();
    v.write_at(0, &[b'A'; 4096], false).unwrap(); // preserved now
    e.close().unwrap();
    drop(v);
    drop(e);
    w.kill();
    i.kill(1);
    let used = w.allocated("store");
    w.set_space("store", Some(used.saturating_sub(2 * MIB)));
    let e = reopen(&w, &i);
    let e = e.unwrap();
    w.advance(5_000_000_000);
    e.volume(&n("v"))
        .unwrap()
        .write_at(0, &[b'B'; 4096], false)
        .unwrap();
    drop(e);
    w.kill();
    i.kill(1);
    w.set_space("store", None);
    let e = reopen(&w, &i).unwrap();
    assert!(
        matches!(state(&e), VolumeState::Unverified),
        "our own writes are taken for a foreign change"
    );
}

#[test]
fn a_source_replaced_before_its_first_snapshot_is_known_from_then_on() {
    let (w, i, e) = fresh(17);
    e.close().unwrap();
    drop(e);
    w.kill();
    i.kill(1);
    w.dir("src").remove("v").unwrap();
    w.dir("src").sync().unwrap();
    w.add_disk("src/v", 4 * MIB);
    let e = reopen(&w, &i).unwrap();
    e.take_snapshots(&[(n("v"), n("s"))]).unwrap();
    drop(e);
    w.kill();
    i.kill(1);
    let e = reopen(&w, &i).unwrap();
    assert!(
        !matches!(state(&e), VolumeState::Changed(_)),
        "it is {:?}",
        state(&e)
    );
}

#[test]
fn nothing_goes_into_a_segment_that_a_new_head_has_ended() {
    let (mut lost, mut reached) = (0, 0);
    for seed in 0..60 {
        let (w, i, e) = fresh(1300 + seed);
        let v = e.volume(&n("v")).unwrap();
        for g in 0..1024u64 {
            v.write_at(g * 4096, &[1; 4096], false).unwrap();
        }
        e.take_snapshots(&[(n("v"), n("s0"))]).unwrap();
        // fill the segment to about 0.7 MiB, then a preserve of 0.5 MiB has to roll
        v.write_at(0, &[2; 700 << 10], false).unwrap();
        w.fail_nth(Op::Write, 2, 28);
        let r = v.write_at(2 * MIB, &[3; 512 << 10], false);
        if r.is_ok() {
            continue;
        }
        if e.take_snapshots(&[(n("v"), n("s1"))]).is_err() {
            continue;
        }
        reached += 1;
        drop(v);
        drop(e);
        w.power_cut();
        i.power_cut(seed);
        let e = reopen(&w, &i).unwrap();
        if e.snapshot(&n("v"), &n("s1")).is_err() {
            lost += 1;
        }
    }
    assert_eq!(lost, 0, "acknowledged snapshots were lost");
    assert!(reached > 0, "no roll failed: the test shows nothing");
}

#[test]
fn a_rebuild_that_is_cut_off_does_not_forget_what_was_lost() {
    let (w, i, e) = fresh(3);
    let v = e.volume(&n("v")).unwrap();
    for g in 0..1024u64 {
        v.write_at(g * 4096, &[b'A'; 4096], false).unwrap();
    }
    e.take_snapshots(&[(n("v"), n("s"))]).unwrap();
    for g in 0..1024u64 {
        v.write_at(g * 4096, &[b'B'; 4096], false).unwrap();
    }
    e.close().unwrap();
    drop(v);
    drop(e);
    w.kill();
    i.kill(1);
    // rot: two whole batches (8 KiB each) in the middle of every early segment's start
    let names: Vec<String> = {
        let d = w.dir("store/log");
        let mut x = d.list().unwrap();
        x.sort();
        x
    };
    let path = format!("store/log/{}", names[2]);
    w.poke(&path, 65536, &[0xEE; 65536]);
    i.lose();
    // A rebuild that is not cut off fails the snapshot.
    let whole = reopen(&w.fork(5), &MemoryIndexHome::new()).unwrap();
    assert_eq!(read(&whole, "s").unwrap_err().kind(), Kind::Failed);
    drop(whole);
    let mut wrong = 0;
    for k in 1..12 {
        let f = w.fork(100 + k);
        let fi = MemoryIndexHome::new();
        f.die_at(k);
        drop(reopen(&f, &fi));
        f.kill();
        fi.kill(k);
        let e = reopen(&f, &fi).unwrap();
        let snap = e.open_snapshot(&n("v"), &n("s")).unwrap();
        let mut bad = 0;
        for g in 0..1024u64 {
            let mut b = vec![0; 4096];
            if snap.read_at(g * 4096, &mut b).is_ok() && b[0] != b'A' {
                bad += 1;
            }
        }
        if bad > 0 {
            wrong += 1;
        }
    }
    assert_eq!(wrong, 0, "grains of another instant were returned as good");
}

/// A sync of the data alone does not make times durable; the catalogue compares them after a clean stop.
#[test]
fn a_power_cut_after_a_clean_stop_does_not_make_a_source_changed() {
    let (w, i, e) = fresh(11);
    let v = e.volume(&n("v")).unwrap();
    e.take_snapshots(&[(n("v"), n("s"))]).unwrap();
    v.write_at(0, &[b'B'; 4096], false).unwrap();
    e.close().unwrap();
    drop(v);
    drop(e);
    w.power_cut();
    i.power_cut(1);
    let e = reopen(&w, &i).unwrap();
    let state = e.volume(&n("v")).unwrap().info().state;
    assert_eq!(state, VolumeState::Active);
    assert_eq!(read(&e, "s").unwrap(), 0);
}

fn fails(ops: &'static [Op], under: &'static str, nth: u64, lasting: bool) -> Fault {
    let what = What::Errno(libc::EIO);
    Fault {
        what,
        ops,
        under,
        nth,
        lasting,
    }
}

/// A sync of the log failed, so that the batch was clean in the cache and not on the medium; the next
/// daemon read it there, took the grain for preserved and overwrote it. Found by the loops over the n-th
/// failing I/O (`STILLFRAME_FAULTS_SEED=0`, a write, EIO in the store from the second I/O on).
#[test]
fn a_batch_whose_sync_failed_is_not_believed_after_a_kill() {
    for seed in 0..20 {
        let (w, i, e) = fresh(seed);
        let v = e.volume(&n("v")).unwrap();
        v.write_at(0, &[1; 4096], false).unwrap();
        e.take_snapshots(&[(n("v"), n("s"))]).unwrap();
        w.inject(fails(&[Op::Sync], "store", 1, true));
        let refused = v.write_at(0, &[2; 4096], false);
        assert_eq!(refused.unwrap_err().kind(), Kind::Io);
        assert!(w.struck() > 0);
        w.kill();
        i.kill(seed);
        let e = reopen(&w, &i).unwrap();
        let v = e.volume(&n("v")).unwrap();
        v.write_at(0, &[2; 4096], false).unwrap();
        v.flush().unwrap();
        w.power_cut();
        i.power_cut(seed);
        let e = reopen(&w, &i).unwrap();
        assert_eq!(read(&e, "s").unwrap(), 1, "seed {seed}");
    }
}

/// The record that a revert goes back was refused and came back with a kill; what it said of the
/// source's size left out the size it had. Found by the loops over the n-th failing I/O
/// (`STILLFRAME_FAULTS_SEED=0`, a revert, EIO in the store from the eighth I/O on).
#[test]
fn a_source_is_known_whose_revert_was_to_go_back() {
    let mut refused = 0;
    for nth in 1..60 {
        let (w, i, e) = fresh(nth);
        let v = e.volume(&n("v")).unwrap();
        v.write_at(0, &[1; 8192], false).unwrap();
        e.take_snapshots(&[(n("v"), n("s"))]).unwrap();
        v.write_at(0, &[2; 8192], false).unwrap();
        e.resize_volume(&n("v"), 3 * MIB).unwrap();
        w.inject(fails(&[], "store", nth, true));
        let done = e.revert_volume(&n("v"), &n("s"), &mut |_, _| ());
        refused += u32::from(done.is_err());
        w.kill();
        i.kill(nth);
        let e = reopen(&w, &i).unwrap();
        let now = state(&e);
        assert!(
            matches!(now, VolumeState::Active | VolumeState::Unverified),
            "{nth}: {now:?}"
        );
        assert_eq!(read(&e, "s").unwrap(), 1);
    }
    assert!(refused > 10, "{refused}");
}

/// A clean stop that could not stat a source noted what it had been when the store was opened; the next
/// opening took our own writes for somebody else's. Found by the loops over the n-th failing I/O
/// (`STILLFRAME_FAULTS_SEED=4`, a clean stop, EIO in the source at the third I/O).
#[test]
fn a_stop_that_cannot_look_at_a_source_is_no_clean_one() {
    let mut refused = 0;
    for nth in 1..6 {
        let (w, i, e) = fresh(nth);
        let v = e.volume(&n("v")).unwrap();
        e.take_snapshots(&[(n("v"), n("s"))]).unwrap();
        v.write_at(0, &[1; 4096], false).unwrap();
        w.inject(fails(&[Op::Look], "src", nth, false));
        refused += u32::from(e.close().is_err());
        w.kill();
        i.kill(nth);
        let e = reopen(&w, &i).unwrap();
        let now = state(&e);
        assert!(
            matches!(now, VolumeState::Active | VolumeState::Unverified),
            "{nth}: {now:?}"
        );
    }
    assert!(refused > 0);
}

/// A start that fails while it makes a segment leaves a head whose name may not be durable, and the next
/// start goes on behind it. When a power cut takes that name, nothing of the log is missing.
#[test]
fn a_segment_without_a_batch_that_a_power_cut_takes_is_no_loss() {
    let mut nameless = 0;
    for seed in 0..40 {
        let (w, i, e) = fresh(seed);
        let v = e.volume(&n("v")).unwrap();
        v.write_at(0, &[b'A'; 4096], false).unwrap();
        e.take_snapshots(&[(n("v"), n("s"))]).unwrap();
        v.write_at(0, &[b'B'; 4096], false).unwrap();
        v.flush().unwrap();
        drop((v, e));
        w.kill();
        i.kill(seed);
        let before = w.dir("store/log").list().unwrap().len();
        // Neither is the name made durable nor the file removed.
        for nth in 1..=8 {
            w.fail_nth(Op::DirSync, nth + seed % 4, 5);
            w.fail_nth(Op::Remove, nth, 5);
        }
        drop(reopen(&w, &i));
        w.kill();
        i.kill(seed);
        nameless += usize::from(w.dir("store/log").list().unwrap().len() > before);
        let e = reopen(&w, &i).unwrap();
        e.take_snapshots(&[(n("v"), n("t"))]).unwrap();
        drop(e);
        w.power_cut();
        i.lose();
        let e = reopen(&w, &i).unwrap();
        assert_eq!(read(&e, "s").unwrap(), b'A', "seed {seed}");
        assert_eq!(read(&e, "t").unwrap(), b'B', "seed {seed}");
    }
    println!("{nameless} names");
    assert!(nameless > 5, "{nameless}");
}

/// Several dead segments go at once. A power cut may take the names of later ones and bring an earlier one
/// back: its end is known all the same, so nothing is missing, and no snapshot fails.
#[test]
fn segments_that_a_power_cut_brings_back_have_an_end() {
    /// Stops the maintenance at an operation; what was there before and is there after a power cut.
    fn life(seed: u64, dies_at: u64) -> (Vec<String>, Vec<String>, bool) {
        let (w, i, e) = fresh(seed);
        e.close().unwrap();
        drop(e);
        let often = Settings {
            checkpoint_bytes: 64 << 10,
            ..settings()
        };
        let e = Engine::open(env(&w, &i), often).unwrap();
        let v = e.volume(&n("v")).unwrap();
        let fill = |byte| {
            for at in (0..4 * MIB).step_by(256 << 10) {
                v.write_at(at, &[byte; 256 << 10], false).unwrap();
            }
        };
        fill(b'A');
        // Of another volume, older than all that goes.
        w.add_disk("src/w", MIB);
        e.add_volume(&n("w"), "src/w", VolumeOptions::default())
            .unwrap();
        e.take_snapshots(&[(n("w"), n("keep"))]).unwrap();
        e.take_snapshots(&[(n("v"), n("old"))]).unwrap();
        fill(b'B');
        e.take_snapshots(&[(n("v"), n("s"))]).unwrap();
        v.write_at(0, &[b'C'; 4096], false).unwrap();
        v.flush().unwrap();
        let segments = || {
            let mut names = w.dir("store/log").list().unwrap();
            names.sort();
            names
        };
        let before = segments();
        e.delete_snapshot(&n("v"), &n("old")).unwrap();
        w.die_at(dies_at);
        while e.maintain().is_ok_and(|worked| worked) {}
        let ended = !w.is_dead();
        drop((v, e));
        w.power_cut();
        i.lose();
        let after = segments();
        let e = reopen(&w, &i).unwrap();
        assert_eq!(
            read(&e, "s").unwrap(),
            b'B',
            "seed {seed}, died at {dies_at}"
        );
        let keep = e.snapshot(&n("w"), &n("keep")).unwrap().state;
        assert_eq!(
            keep,
            SnapshotState::Active,
            "seed {seed}, died at {dies_at}"
        );
        (before, after, ended)
    }

    let (mut lives, mut returned) = (0, 0);
    for seed in 0..24 {
        let (before, after, ended) = life(seed, u64::MAX);
        assert!(ended);
        let mut dead = before;
        dead.retain(|name| name.ends_with(".seg") && !after.contains(name));
        assert!(dead.len() > 2, "several go: {dead:?}");
        for dies_at in 1.. {
            let (_, after, ended) = life(seed, dies_at);
            lives += 1;
            let first_there = dead.iter().position(|name| after.contains(name));
            let last_gone = dead.iter().rposition(|name| !after.contains(name));
            returned += usize::from(first_there.zip(last_gone).is_some_and(|(a, b)| a < b));
            if ended {
                break;
            }
        }
    }
    println!("{lives} lives, {returned} with an earlier one back and a later one gone");
    assert!(returned > 5, "{returned} of {lives}");
}

/// An acceptance of an active volume syncs the source. If that fails, what was written before may be lost,
/// and no later flush may say that all is well.
#[test]
fn an_acceptance_whose_sync_fails_is_not_forgotten() {
    let (w, _i, e) = fresh(7);
    let v = e.volume(&n("v")).unwrap();
    v.write_at(0, &[b'A'; 4096], false).unwrap();
    w.fail_nth(Op::Sync, 1, 5);
    assert!(e.accept_volume(&n("v")).is_err());
    let refused = v.flush().expect_err("the write may be lost");
    assert_eq!(refused.kind(), Kind::Failed, "{}", refused.chain());
    // Once more, and with a good sync it is what the medium has.
    e.accept_volume(&n("v")).unwrap();
    v.flush().unwrap();
}
