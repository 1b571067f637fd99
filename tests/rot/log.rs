//! Rot that the copies do not cover, writes that went astray, and writes that never came: what is
//! concerned fails and is named, everything else is read, and deleting what failed ends it.

use std::collections::BTreeSet;

use stillframe::log::superblock::{INCOMPAT_SUMS, Superblock, SuperblockFile};
use stillframe::map::index::IndexHome;
use stillframe::sys::disk::Dir;
use stillframe::sys::sim::{Op, SimWorld};
use stillframe::volume::audit::{self, Severity};
use stillframe::volume::{Engine, Share, SnapshotState};

use crate::rig::Chance;
use crate::stage::{Stage, VOLUMES, compare, env, name, settings, views};

/// A batch in a segment file.
#[derive(Clone, Debug)]
struct Batch {
    path: String,
    at: usize,
    commit: usize,
    payload: usize,
}

impl Batch {
    fn payload_at(&self) -> usize {
        (self.at + self.commit).next_multiple_of(4096)
    }
}

fn batches(stage: &Stage) -> Vec<Batch> {
    let mut found = Vec::new();
    for (path, _) in stage.files("store/log") {
        if !path.ends_with(".seg") {
            continue;
        }
        let bytes = stage.world.peek(&path).unwrap();
        let mut at = 4096;
        while at + 4096 <= bytes.len() {
            if &bytes[at..at + 8] != b"SFbatch1" {
                at += 4096;
                continue;
            }
            let field = |from: usize| {
                let four = bytes[at + from..at + from + 4].try_into().unwrap();
                u32::from_le_bytes(four) as usize
            };
            let batch = Batch {
                path: path.clone(),
                at,
                commit: field(68),
                payload: field(72) * 4096,
            };
            at = batch.payload_at() + batch.payload;
            found.push(batch);
        }
    }
    found
}

fn flip(world: &SimWorld, path: &str, at: usize) {
    let byte = world.peek(path).unwrap()[at];
    world.poke(path, at as u64, &[byte ^ 0x10]);
}

/// Two commit blocks in a row: the table of the first is lost in both copies. With the map gone, too,
/// every snapshot and clone of that time fails and says so; later ones and the volumes are whole.
#[test]
fn a_lost_table_fails_what_existed_then_and_nothing_else() {
    let (mut lost, mut spared, mut runs) = (0, 0, 0);
    for seed in 0..24 {
        let stage = Stage::new(seed, 160);
        let all = batches(&stage);
        let mut chance = Chance(seed);
        let first = chance.below(all.len() as u64 - 3) as usize;
        let (a, b) = (&all[first], &all[first + 1]);
        if a.path != b.path {
            continue;
        }
        runs += 1;
        let what = format!("seed {seed}: {a:?}");
        let world = stage.world.fork(seed);
        let index = stage.index.fork(seed);
        flip(&world, &a.path, a.at + 200);
        flip(&world, &b.path, b.at + 200);
        index.set_aside().unwrap();
        let audit = audit::offline(&env(&world, &index), Share::NONE, seed).unwrap();
        let named: BTreeSet<&str> = audit
            .findings
            .iter()
            .filter(|f| f.check == "log" && f.state == "lost")
            .map(|f| f.name.as_str())
            .collect();
        assert!(!named.is_empty(), "{what}: {:#?}", audit.findings);
        let engine = Engine::open(env(&world, &index), settings());
        let engine = engine.unwrap_or_else(|e| panic!("{what}: {e:?}"));
        let found = views(&engine);
        // What was made in what was lost is not there; nothing else is missing.
        let expect = stage
            .views
            .iter()
            .filter(|(name, _)| found.contains_key(*name));
        let expect = expect.map(|(name, _)| {
            let view = stage.views[name].iter();
            let view = view
                .map(|page| Ok(page.as_ref().unwrap().clone()))
                .collect();
            (name.clone(), view)
        });
        let failed = compare(&found, &expect.collect(), &what);
        assert!(
            failed.iter().all(|(name, _)| !name.ends_with("/live")),
            "{what}"
        );
        let failed: BTreeSet<String> = failed.into_iter().map(|(name, _)| name).collect();
        let mut said = BTreeSet::new();
        for (volume, _, _) in VOLUMES {
            let v = name(volume);
            for s in engine.snapshots(&v).unwrap() {
                if let SnapshotState::Failed(why) = &s.state {
                    assert!(why.contains("damaged"), "{what}: {why}");
                    said.insert(format!("{volume}@{}", s.name));
                }
            }
            for c in engine.clones(&v).unwrap() {
                if let SnapshotState::Failed(_) = &c.state {
                    said.insert(format!("{volume}/{}", c.name));
                }
            }
        }
        assert_eq!(failed, said, "{what}");
        lost += failed.len();
        spared += found.len() - failed.len() - 2;
        for name_of in &failed {
            let (volume, is_clone, n) = match name_of.split_once('@') {
                Some((volume, n)) => (volume, false, n),
                None => {
                    let (volume, n) = name_of.split_once('/').unwrap();
                    (volume, true, n)
                }
            };
            match is_clone {
                true => engine.delete_clone(&name(volume), &name(n)).unwrap(),
                false => engine.delete_snapshot(&name(volume), &name(n)).unwrap(),
            }
        }
        while engine.maintain().unwrap() {}
        for (volume, _, _) in VOLUMES {
            let snapshots = engine.snapshots(&name(volume)).unwrap();
            let good = snapshots.iter().all(|s| s.state == SnapshotState::Active);
            assert!(good, "{what}");
        }
        engine.close().unwrap();
        drop(engine);
        let audit = audit::offline(&env(&world, &index), Share::ALL, seed).unwrap();
        let mut left = audit.findings.iter();
        let state = |f: &&audit::Finding| f.check == "state" && f.what != "bookmark";
        assert_eq!(left.find(state), None, "{what}");
    }
    println!("{runs} runs: {lost} views failed, {spared} did not");
    assert!(lost > 20 && spared > 5, "{lost} {spared}");
}

/// The end of the log is lost, as by a disk that acknowledged what it did not keep. The map has taken it
/// in, so it shows: no snapshot reads as what its volume is now. The seal of a clean stop says nothing,
/// and its loss fails nothing. Cut off while that is found out, it is found out again.
#[test]
fn a_lost_end_of_the_log_is_told_by_the_map() {
    let (mut failed, mut sealed, mut cut_off, mut live) = (0, 0, 0, 0);
    for seed in 300..316 {
        let stage = Stage::new(seed, 160);
        let all = batches(&stage);
        let newest = all.iter().map(|b| b.path.clone()).max().unwrap();
        let last: Vec<&Batch> = all.iter().filter(|b| b.path == newest).collect();
        for count in [1, 2, 3, 6, 12] {
            if count >= last.len() {
                break;
            }
            let what = format!("seed {seed}, {count} batches");
            let world = stage.world.fork(seed);
            let index = stage.index.fork(seed);
            for batch in &last[last.len() - count..] {
                let size = batch.payload_at() - batch.at + batch.payload;
                world.poke(&batch.path, batch.at as u64, &vec![0; size]);
            }
            let audit = audit::offline(&env(&world, &index), Share::NONE, seed).unwrap();
            let lost = audit
                .findings
                .iter()
                .any(|f| f.check == "log" && f.state == "lost");
            assert_eq!(lost, count > 1, "{what}: {:#?}", audit.findings);
            assert!(!lost || !audit.map_to_rebuild, "{what}");
            if count > 1 && seed % 2 == 0 {
                world.die_at(1 + seed % 7);
                cut_off += u64::from(Engine::open(env(&world, &index), settings()).is_err());
                world.power_cut();
                index.power_cut(seed);
            }
            let engine = Engine::open(env(&world, &index), settings());
            let engine = engine.unwrap_or_else(|e| panic!("{what}: {e:?}"));
            let found = views(&engine);
            if count == 1 {
                assert_eq!(compare(&found, &stage.views, &what), [], "{what}");
                sealed += 1;
                continue;
            }
            for (view, pages) in &found {
                if view.ends_with("/live") {
                    // Where a resize is lost, too, its end may not be there.
                    let wrong = |(a, b): (&_, &_)| {
                        matches!((a, b), (Ok::<Vec<u8>, _>(a), Ok::<Vec<u8>, _>(b))
                            if a.len() == b.len() && a != b)
                    };
                    let mut both = pages.iter().zip(&stage.views[view]);
                    assert!(!both.any(wrong), "{what}: {view}");
                    live += u32::from(pages.iter().all(Result::is_ok));
                } else {
                    assert!(pages.iter().all(Result::is_err), "{what}: {view} is served");
                    failed += 1;
                }
            }
            engine.close().unwrap();
            drop(engine);
            let audit = audit::offline(&env(&world, &index), Share::ALL, seed).unwrap();
            let mut states = audit
                .findings
                .iter()
                .filter(|f| f.severity != Severity::Note);
            assert!(
                states.all(|f| f.check == "state"),
                "{what}: {:#?}",
                audit.findings
            );
        }
    }
    println!("{sealed} without a seal, {failed} views failed, {live} live, {cut_off} cut off");
    assert!(sealed == 16 && failed > 100 && live > 50 && cut_off > 10);
}

/// A store from before overlays had checksums opens, shows the same, and has them from then on.
#[test]
fn a_store_without_checksums_of_overlays_gets_them() {
    let stage = Stage::new(400, 160);
    let (world, index) = (&stage.world, &stage.index);
    let sums = |world: &SimWorld| -> Vec<String> {
        let names = world.dir("store/clones").list().unwrap();
        names.into_iter().filter(|n| n.ends_with(".sums")).collect()
    };
    assert!(!sums(world).is_empty());
    for name in sums(world) {
        world.dir("store/clones").remove(&name).unwrap();
    }
    let superblock = || SuperblockFile::open(world.dir("store").as_ref()).unwrap();
    let mut before = superblock();
    let next = before.current().clone();
    assert_eq!(next.incompat, INCOMPAT_SUMS);
    before
        .update(Superblock {
            incompat: 0,
            ..next
        })
        .unwrap();
    let engine = Engine::open(env(world, index), settings()).unwrap();
    assert_eq!(superblock().current().incompat, INCOMPAT_SUMS);
    assert_eq!(compare(&views(&engine), &stage.views, "opened"), []);
    engine.close().unwrap();
    drop(engine);
    assert!(!sums(world).is_empty());
    let audit = audit::offline(&env(world, index), Share::ALL, 1).unwrap();
    assert!(audit.findings.iter().all(|f| f.severity == Severity::Note));
    let data = stage.files("store/clones");
    let (path, size) = data.iter().find(|(p, _)| p.ends_with(".data")).unwrap();
    for at in (0..*size).step_by(4096) {
        flip(world, path, at as usize);
    }
    let audit = audit::offline(&env(world, index), Share::ALL, 1).unwrap();
    assert!(audit.findings.iter().any(|f| f.check == "payload"));
}

/// Whatever a disk that loses or misdirects writes makes of a batch, no view has a wrong byte.
#[test]
fn lost_and_misdirected_writes_return_no_wrong_byte() {
    let (mut refused, mut noticed) = (0, 0);
    for seed in 100..124 {
        let stage = Stage::new(seed, 160);
        let all = batches(&stage);
        let with_payload: Vec<&Batch> = all.iter().filter(|b| b.payload >= 4096).collect();
        for kind in 0..4 {
            let mut chance = Chance(seed * 7 + kind);
            let world = stage.world.fork(seed);
            let index = stage.index.fork(seed);
            let pick = |chance: &mut Chance| {
                with_payload[chance.below(with_payload.len() as u64 - 1) as usize].clone()
            };
            let (a, b) = (pick(&mut chance), pick(&mut chance));
            let bytes = world.peek(&a.path).unwrap();
            let whole = bytes[a.at..a.payload_at() + a.payload].to_vec();
            match kind {
                // It never came.
                0 => world.poke(&a.path, a.at as u64, &vec![0; whole.len()]),
                // It went where another one is.
                1 => world.poke(&b.path, b.at as u64, &whole[..whole.len().min(4096)]),
                // Two blocks of payload changed places.
                2 => {
                    let other = world.peek(&b.path).unwrap();
                    let (x, y) = (a.payload_at(), b.payload_at());
                    let (one, two) = (&bytes[x..x + 4096], &other[y..y + 4096]);
                    world.poke(&a.path, x as u64, two);
                    world.poke(&b.path, y as u64, one);
                }
                // The payload went to another place, and is missing here.
                _ => world.poke(&a.path, a.payload_at() as u64, &[0; 4096]),
            }
            let what = format!("seed {seed} kind {kind}: {a:?} {b:?}");
            let audit = audit::offline(&env(&world, &index), Share::ALL, seed).unwrap();
            let wrong = audit.findings.iter().any(|f| f.severity != Severity::Note);
            noticed += u64::from(wrong);
            if chance.below(2) == 0 {
                index.set_aside().unwrap();
            }
            let engine = Engine::open(env(&world, &index), settings());
            let engine = engine.unwrap_or_else(|e| panic!("{what}: {e:?}"));
            let failed = compare(&views(&engine), &stage.views, &what);
            assert!(
                failed.is_empty() || wrong,
                "{what}: {failed:?} and no finding"
            );
            assert!(
                failed.iter().all(|(name, _)| !name.ends_with("/live")),
                "{what}"
            );
            refused += u64::from(!failed.is_empty());
        }
    }
    println!("{noticed} of 96 noticed, {refused} refused something");
    assert!(noticed > 48 && refused > 20);
}

/// A read that fails once while the store is opened, each in turn: whatever it hits, nothing is called
/// lost or torn for it, and the next opening shows everything.
#[test]
fn a_read_error_while_opening_destroys_nothing() {
    let (mut opened, mut refused) = (0, 0);
    for seed in [200, 201] {
        let stage = Stage::new(seed, 120);
        for lost_map in [false, true] {
            for n in 1.. {
                let world = stage.world.fork(n);
                let index = stage.index.fork(seed);
                if lost_map {
                    index.set_aside().unwrap();
                }
                let before = world.count(Op::Read);
                world.fail_nth(Op::Read, n, 5);
                let engine = Engine::open(env(&world, &index), settings());
                if world.count(Op::Read) - before < n {
                    break;
                }
                let what = format!("seed {seed} read {n}");
                match engine {
                    Ok(engine) => {
                        opened += 1;
                        assert_eq!(compare(&views(&engine), &stage.views, &what), []);
                    }
                    Err(e) => {
                        refused += 1;
                        assert_ne!(e.kind(), stillframe::error::Kind::Failed, "{what}: {e:?}");
                    }
                }
                world.kill();
                index.kill(n);
                let engine = Engine::open(env(&world, &index), settings());
                let engine = engine.unwrap_or_else(|e| panic!("{what}: {e:?}"));
                assert_eq!(compare(&views(&engine), &stage.views, &what), [], "{what}");
            }
        }
    }
    println!("{opened} opened all the same, {refused} were refused");
    assert!(opened > 20 && refused > 20, "{opened} {refused}");
}
