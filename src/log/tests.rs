//! The log on simulated disks: what a scan makes of torn tails, rot and unfinished segments.

use std::sync::{Arc, Mutex};

use crate::error::{Kind, Result};
use crate::log::batch::{Batch, Previous};
use crate::log::commit::{Durable, Entry, Log, LogConfig, Resume, Sink};
use crate::log::keys::Keys;
use crate::log::record::{Record, RecordType};
use crate::log::room::settle;
use crate::log::scan::{Event, Scan, Scanned};
use crate::log::segment;
use crate::sys::disk::Dir as _;
use crate::sys::sim::{Op, SimWorld};
use crate::units::{BLOCK, COUNTER_MAX, Place, Uuid};

const STORE: Uuid = Uuid([7; 16]);
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// Remembers what was published: (LSN, first grains of its records).
#[derive(Default)]
struct Seen(Mutex<Vec<(u64, Vec<u64>)>>);

impl Sink for Seen {
    fn durable(&self, batch: &Durable<'_>) {
        let firsts = batch.records.iter().map(|r| r.first).collect();
        self.0.lock().unwrap().push((batch.lsn.0, firsts));
    }

    fn catalog(&self) -> Vec<u8> {
        vec![1, 2, 3]
    }
}

fn keys() -> Keys {
    Keys::derive(&[1; 32], STORE)
}

fn open(world: &SimWorld, resume: Resume) -> Log {
    let config = LogConfig {
        dir: world.dir("log"),
        store: STORE,
        keys: keys(),
        segment_bytes: 1 << 20,
        clock: Arc::new(world.clock()),
    };
    Log::resume(config, resume)
}

fn preserve(log: &Log, first: u64) -> Entry {
    log.preserve(1, 1, first, 4096, vec![first as u8 ^ 0x5a; 4096])
}

/// What a scan visits: ((LSN, firsts, from the copy)...), LSN ranges lost, and the rest.
type Visited = (Vec<(u64, Vec<u64>, bool)>, Vec<(u64, u64)>, Scanned);

fn scan(world: &SimWorld) -> Result<Visited> {
    let (mut batches, mut lost) = (Vec::new(), Vec::new());
    let dir = world.dir("log");
    let keys = keys();
    let scan = Scan {
        dir: dir.as_ref(),
        keys: &keys,
        store: STORE,
        from_segment: 0,
    };
    let scanned = scan.run(&mut |event| {
        match event {
            Event::Batch {
                lsn,
                records,
                from_copy,
                ..
            } => {
                batches.push((lsn.0, records.iter().map(|r| r.first).collect(), from_copy));
            }
            Event::Lost { first, last, .. } => lost.push((first.0, last.0)),
            Event::Segment { .. } => {}
        }
        Ok(())
    })?;
    Ok((batches, lost, scanned))
}

fn resume_of(scanned: &Scanned) -> Resume {
    Resume {
        tail: scanned.tail,
        previous: scanned.previous.clone(),
        number_max: scanned.number_max,
    }
}

/// A log of five preserves, each a batch of its own; LSN 1 is the CATALOG, then 2 to 6.
fn five(world: &SimWorld) -> Vec<Place> {
    let log = open(world, Resume::default());
    let sink = Seen::default();
    let mut places = Vec::new();
    for first in 10..15 {
        let (_, segment, end) = {
            log.append(&sink, vec![preserve(&log, first)]).unwrap();
            log.end()
        };
        places.push(Place {
            segment,
            block: (end / BLOCK) as u32 - 2,
        });
    }
    places
}

/// Nobody comes so far; but what says that it has is refused, not followed by what no reader takes.
#[test]
fn a_log_that_has_no_numbers_left_takes_nothing() {
    let world = SimWorld::new(1);
    five(&world);
    let (_, _, scanned) = scan(&world).unwrap();
    let spent: [&dyn Fn(&mut Resume); 3] = [
        &|r| r.tail.lsn = COUNTER_MAX,
        &|r| r.tail.generation = COUNTER_MAX,
        &|r| r.number_max = u32::MAX,
    ];
    for spend in spent {
        let mut resume = resume_of(&scanned);
        spend(&mut resume);
        let log = open(&world, resume);
        let refused = log.append(&Seen::default(), vec![preserve(&log, 99)]);
        assert_eq!(refused.unwrap_err().kind(), Kind::Limit);
    }
    let log = open(&world, resume_of(&scanned));
    log.append(&Seen::default(), vec![preserve(&log, 99)])
        .unwrap();
}

#[test]
fn what_was_appended_is_scanned_in_order_across_segments() {
    let world = SimWorld::new(1);
    let log = open(&world, Resume::default());
    let sink = Seen::default();
    for first in 0..400 {
        log.append(&sink, vec![preserve(&log, first)]).unwrap();
    }
    world.kill();
    let (batches, lost, scanned) = scan(&world).unwrap();
    assert!(lost.is_empty() && !scanned.torn && scanned.abandoned.is_empty());
    assert!(scanned.tail.segment >= 3, "several segments were filled");
    let seen: Vec<(u64, Vec<u64>)> = batches
        .iter()
        .map(|(lsn, firsts, _)| (*lsn, firsts.clone()))
        .collect();
    assert_eq!(seen, *sink.0.lock().unwrap());
    let firsts: Vec<u64> = batches
        .iter()
        .filter(|(_, firsts, _)| firsts.len() == 1 && firsts != &[0])
        .flat_map(|(_, firsts, _)| firsts.clone())
        .collect();
    assert_eq!(firsts, (1..400).collect::<Vec<u64>>());
}

#[test]
fn every_cut_leaves_all_acknowledged_batches_and_never_half_of_one() {
    let mut torn = 0;
    for seed in 0..400 {
        let world = SimWorld::new(seed);
        let log = open(&world, Resume::default());
        let sink = Seen::default();
        world.die_at(1 + seed % 40);
        let mut acknowledged = Vec::new();
        for first in 0..30 {
            match log.append(
                &sink,
                vec![preserve(&log, 2 * first), preserve(&log, 2 * first + 1)],
            ) {
                Ok(lsn) => acknowledged.push(lsn.0),
                Err(_) => break,
            }
        }
        match seed % 2 {
            0 => world.power_cut(),
            _ => world.kill(),
        }
        let (batches, lost, scanned) = scan(&world).unwrap();
        assert!(lost.is_empty(), "seed {seed}: a cut is no rot");
        torn += u64::from(scanned.torn);
        let found: Vec<u64> = batches
            .iter()
            .filter(|(_, f, _)| f.len() == 2)
            .map(|(lsn, _, _)| *lsn)
            .collect();
        assert!(
            found.starts_with(&acknowledged),
            "seed {seed}: {found:?} {acknowledged:?}"
        );
        assert!(found.len() <= acknowledged.len() + 1, "seed {seed}");
        // Whatever was found can be read, and the log goes on behind it.
        let log = open(&world, resume_of(&scanned));
        for (lsn, firsts, _) in &batches {
            assert!(
                firsts.len() == 2 || *lsn == 1 || firsts.len() <= 1,
                "seed {seed}"
            );
        }
        let next = log.append(&sink, vec![preserve(&log, 99)]).unwrap();
        assert!(next.0 > scanned.tail.lsn);
        world.kill();
        let (again, lost, _) = scan(&world).unwrap();
        assert!(lost.is_empty(), "seed {seed}");
        assert_eq!(again.last().unwrap().1, vec![99]);
        let before: Vec<u64> = again.iter().map(|(lsn, _, _)| *lsn).collect();
        assert!(before.is_sorted(), "seed {seed}");
        for lsn in found {
            assert!(
                before.contains(&lsn),
                "seed {seed}: {lsn} was there and is not"
            );
        }
    }
    assert!(
        torn > 5,
        "only {torn} torn batches: the cuts do not reach the interesting places"
    );
}

#[test]
fn a_rotten_commit_block_is_replaced_by_its_copy() {
    for victim in 0..4 {
        let world = SimWorld::new(3);
        let places = five(&world);
        let at = places[victim].offset();
        world.poke("log/000001.seg", at + 200, &[0xff; 8]);
        let (batches, lost, scanned) = scan(&world).unwrap();
        assert!(lost.is_empty() && !scanned.torn, "victim {victim}");
        let from_copy: Vec<u64> = batches.iter().filter(|b| b.2).map(|b| b.0).collect();
        assert_eq!(from_copy, vec![victim as u64 + 2]);
        assert_eq!(batches.len(), 6);
        assert_eq!(batches[victim + 1].1, vec![victim as u64 + 10]);
    }
}

#[test]
fn tables_lost_in_both_copies_are_reported_and_not_taken_for_the_end() {
    let world = SimWorld::new(4);
    let places = five(&world);
    for place in &places[1..3] {
        world.poke("log/000001.seg", place.offset() + 200, &[0xff; 8]);
    }
    let (batches, lost, scanned) = scan(&world).unwrap();
    // Of the two damaged ones the second is known from the third's copy.
    assert_eq!(lost, vec![(3, 3)]);
    assert_eq!(
        batches.iter().map(|b| b.0).collect::<Vec<_>>(),
        vec![1, 2, 4, 5, 6]
    );
    assert_eq!(scanned.tail.lsn, 6);
}

#[test]
fn rot_at_the_end_of_a_closed_segment_is_known_from_the_next_one() {
    let world = SimWorld::new(5);
    let places = five(&world);
    let (_, _, scanned) = scan(&world).unwrap();
    let log = open(&world, resume_of(&scanned));
    log.append(&Seen::default(), vec![preserve(&log, 77)])
        .unwrap();
    world.poke("log/000001.seg", places[4].offset() + 200, &[0xff; 8]);
    let (batches, lost, _) = scan(&world).unwrap();
    assert!(lost.is_empty());
    assert!(
        batches
            .iter()
            .any(|(lsn, firsts, copy)| *lsn == 6 && firsts == &[14] && *copy)
    );
}

#[test]
fn a_batch_that_is_older_than_the_one_before_it_is_none() {
    let world = SimWorld::new(3);
    five(&world);
    world.kill();
    let (batches, _, scanned) = scan(&world).unwrap();
    let stale = |lsn| Batch {
        store: STORE,
        segment: scanned.tail.segment,
        generation: scanned.tail.generation,
        lsn,
        durable_upto: lsn - 1,
        time_ns: 0,
        offset: scanned.tail.end,
        payload_blocks: 0,
        records: vec![Record::run(RecordType::Zero, 1, 1, 99, 1)],
        previous: Previous::default(),
    };
    for (lsn, taken) in [(6, false), (7, true)] {
        let (bytes, _) = stale(lsn).encode(&keys());
        world.poke("log/000001.seg", scanned.tail.end, &bytes);
        let (again, lost, rescanned) = scan(&world).unwrap();
        assert_eq!(again.len(), batches.len() + usize::from(taken));
        assert!(lost.is_empty());
        assert_eq!(rescanned.tail.end > scanned.tail.end, taken);
    }
}

#[test]
fn what_follows_a_torn_batch_whose_predecessor_is_lost_is_newer_than_both() {
    let world = SimWorld::new(3);
    let log = open(&world, Resume::default());
    let sink = Seen::default();
    let mut ends = Vec::new();
    for first in 0..400 {
        log.append(&sink, vec![preserve(&log, first)]).unwrap();
        let (lsn, segment, end) = log.end();
        ends.push((segment, end, lsn));
        // One more than the one that begins the second segment.
        if segment == 2 && ends[ends.len() - 2].0 == 2 {
            break;
        }
    }
    drop(log);
    world.kill();
    let [
        ..,
        (1, before, _),
        (1, _, _),
        (2, begun, lost),
        (2, _, torn),
    ] = ends[..]
    else {
        panic!("two segments: {ends:?}");
    };
    let rot = |segment: u32, at: u64, end: u64| {
        let path = format!("log/{}", segment::file_name(segment));
        for block in (at..end).step_by(BLOCK as usize) {
            world.poke(&path, block + 200, &[0xff; 8]);
        }
    };
    rot(1, before, before + BLOCK);
    rot(2, segment::BATCHES_AT, begun);
    rot(2, begun + BLOCK, begun + 2 * BLOCK);
    let (_, _, scanned) = scan(&world).unwrap();
    assert!(scanned.torn && scanned.previous.lsn == lost.0 && lost < torn);
    let log = open(&world, resume_of(&scanned));
    log.append(&sink, vec![preserve(&log, 500)]).unwrap();
    let (lsn, _, _) = log.end();
    assert!(lsn > lost);
    drop(log);
    world.kill();
    let (batches, _, _) = scan(&world).unwrap();
    let last = batches.last().unwrap();
    assert!(
        last.0 == lsn.0 && last.1.contains(&500),
        "acknowledged, and there"
    );
}

#[test]
fn after_a_failed_sync_nothing_more_goes_into_that_segment() {
    let world = SimWorld::new(6);
    let log = open(&world, Resume::default());
    let sink = Seen::default();
    log.append(&sink, vec![preserve(&log, 1)]).unwrap();
    let (_, before, _) = log.end();
    world.fail_nth(Op::Sync, 1, EIO);
    log.append(&sink, vec![preserve(&log, 2)]).unwrap();
    let (_, after, _) = log.end();
    assert_eq!(
        after,
        before + 1,
        "moved into a new segment, and succeeded there"
    );
    world.power_cut();
    let (batches, lost, _) = scan(&world).unwrap();
    assert!(lost.is_empty());
    let firsts: Vec<_> = batches
        .iter()
        .flat_map(|b| b.1.clone())
        .filter(|&f| f > 0)
        .collect();
    assert_eq!(firsts, vec![1, 2]);
}

#[test]
fn a_full_disk_is_told_and_passes() {
    let world = SimWorld::new(7);
    let log = open(&world, Resume::default());
    let sink = Seen::default();
    log.append(&sink, vec![preserve(&log, 1)]).unwrap();
    world.set_space("log", Some(0));
    for _ in 0..300 {
        if let Err(e) = log.append(&sink, vec![preserve(&log, 2)]) {
            assert_eq!(e.kind(), Kind::NoSpace);
        }
    }
    assert_eq!(
        log.append(&sink, vec![preserve(&log, 2)])
            .unwrap_err()
            .kind(),
        Kind::NoSpace
    );
    world.set_space("log", None);
    log.append(&sink, vec![preserve(&log, 3)]).unwrap();
    world.kill();
    let (batches, lost, _) = scan(&world).unwrap();
    assert!(lost.is_empty());
    assert_eq!(batches.last().unwrap().1, vec![3]);
    let mut injected = SimWorld::new(8);
    for n in 1..30 {
        injected = SimWorld::new(8);
        let log = open(&injected, Resume::default());
        injected.fail_nth(Op::Write, n, ENOSPC);
        let failed = (0..10).filter(|i| log.append(&sink, vec![preserve(&log, *i)]).is_err());
        assert!(
            failed.count() <= 1,
            "write {n}: one fault, at most one refusal"
        );
    }
    let (_, lost, _) = scan(&injected).unwrap();
    assert!(lost.is_empty());
}

/// Lives on a full disk, or one that fails while a segment is made: each ends at some operation, with a
/// power cut or a kill. What was acknowledged is there, and no record is refused while there is a reserve.
#[test]
fn without_space_for_a_segment_the_last_one_goes_on_and_no_cut_loses_a_batch() {
    let (mut in_place, mut given_up, mut deaths, mut refusals) = (0, 0, 0, 0_u64);
    for seed in 0..600_u64 {
        let world = SimWorld::new(seed);
        let sink = Seen::default();
        let mut log = open(&world, Resume::default());
        for first in 1..4 {
            log.append(&sink, vec![preserve(&log, first)]).unwrap();
        }
        let mut known = vec![1, 2, 3];
        let (mut next, mut nameless) = (100, false);
        let used = world.allocated("log");
        for life in 0..4 {
            let full = (seed + life) % 3 > 0;
            world.set_space("log", full.then_some(used + (seed % 7) * 2048));
            if life > 0 && !full {
                // There is space, and it ends while the head is written (18, 19), while the catalogue is
                // (20), or when the name is made durable.
                match seed / 6 % 4 {
                    0 => world.fail_nth(Op::DirSync, 1, ENOSPC),
                    n => world.fail_nth(Op::Write, 17 + n, ENOSPC),
                }
            }
            if (seed + life) % 2 == 0 {
                world.die_at(1 + (seed * 31 + life * 17) % 45);
            }
            for _ in 0..5 {
                let record = Record::run(RecordType::Snap, 1, 1, next, 1);
                let before = log.end().1;
                match log.append(&sink, vec![Entry::plain(record)]) {
                    Ok(_) => known.push(next),
                    Err(e) => {
                        // Behind a segment whose name may not be durable nothing can be held back.
                        let refused = nameless && full && e.kind() == Kind::NoSpace;
                        assert!(world.is_dead() || refused, "seed {seed}: {}", e.chain());
                        refusals += u64::from(refused);
                        break;
                    }
                }
                next += 1;
                if life > 0 && log.end().1 == before {
                    in_place += u64::from(full);
                    given_up += u64::from(!full);
                }
            }
            deaths += u64::from(world.is_dead());
            match (seed / 2 + life) % 3 {
                0 => world.kill(),
                _ => world.power_cut(),
            }
            let (batches, lost, scanned) = scan(&world).unwrap();
            assert!(lost.is_empty(), "seed {seed}, life {life}");
            let firsts = batches.iter().flat_map(|b| b.1.clone());
            let mut found: Vec<u64> = firsts.filter(|&first| first > 0).collect();
            found.dedup();
            assert!(
                found.starts_with(&known),
                "seed {seed}: {found:?} {known:?}"
            );
            assert!(found.len() <= known.len() + 1, "seed {seed}: {found:?}");
            (known, next) = (found, next + 1);
            let dir = world.dir("log");
            for number in &scanned.abandoned {
                dir.remove(&segment::file_name(*number)).unwrap();
            }
            dir.sync().unwrap();
            nameless = scanned.tail.end == segment::BATCHES_AT;
            settle(dir.as_ref(), scanned.tail.segment, scanned.tail.end).unwrap();
            log = open(&world, resume_of(&scanned));
        }
    }
    println!(
        "{in_place} in place, {given_up} after one was given up, {deaths} deaths, {refusals} refused"
    );
    assert!(
        in_place > 1000 && given_up > 300 && deaths > 300,
        "{in_place} {given_up} {deaths} {refusals}"
    );
}

#[test]
fn an_unfinished_segment_is_abandoned_and_a_foreign_one_refused() {
    let world = SimWorld::new(9);
    five(&world);
    world.add_disk("log/000002.seg", 4096);
    let (batches, _, scanned) = scan(&world).unwrap();
    assert_eq!((batches.len(), scanned.abandoned), (6, vec![2]));
    // Where the next segment's link names it, a segment without a head is damage.
    world.kill();
    let log = open(&world, resume_of(&scan(&world).unwrap().2));
    for _ in 0..2 {
        world.fail_nth(Op::Sync, 1, EIO);
        log.append(&Seen::default(), vec![preserve(&log, 1)])
            .unwrap();
    }
    assert!(scan(&world).is_ok());
    let victim = format!("log/{}", segment::file_name(log.end().1 - 1));
    for at in crate::log::segment::HEAD_AT {
        world.poke(&victim, at, &[0; 512]);
    }
    assert_eq!(scan(&world).unwrap_err().kind(), Kind::Damaged);
}

#[test]
fn appenders_share_syncs() {
    let world = SimWorld::new(10);
    let log = Arc::new(open(&world, Resume::default()));
    let sink = Arc::new(Seen::default());
    log.append(&*sink, vec![]).unwrap();
    let before = world.count(Op::Sync);
    std::thread::scope(|scope| {
        for t in 0..8u64 {
            let (log, sink) = (Arc::clone(&log), Arc::clone(&sink));
            scope.spawn(move || {
                for i in 0..50 {
                    log.append(&*sink, vec![preserve(&log, 1 + t * 50 + i)])
                        .unwrap();
                }
            });
        }
    });
    let published = sink.0.lock().unwrap();
    let mut firsts: Vec<u64> = published
        .iter()
        .flat_map(|(_, f)| f.clone())
        .filter(|&f| f > 0)
        .collect();
    firsts.sort_unstable();
    assert_eq!(firsts, (1..=400).collect::<Vec<u64>>(), "each record once");
    assert!(published.iter().map(|(lsn, _)| *lsn).is_sorted());
    assert!(world.count(Op::Sync) - before <= 400 + 10);
}

/// The format's golden bytes: a change of any of them is a new format version.
#[test]
fn golden_bytes() {
    let world = SimWorld::new(11);
    let log = open(&world, Resume::default());
    let mut record = Record::run(RecordType::Snap, 3, 9, 5, 6);
    record.body = vec![0xaa; 3];
    let mut bytes = crate::log::record::encode_table(&[record]);
    assert_eq!(
        hex(&bytes),
        "1000000003000000030000000600000009000000000000000500000000000000\
         0000000000000000aaaaaa0000000000"
    );
    bytes.clear();
    log.append(&Seen::default(), vec![]).unwrap();
    let file = world
        .peek(&format!("log/{}", segment::file_name(1)))
        .unwrap();
    assert_eq!(
        hex(&file[..104]),
        "53467365676d743107070707070707070707070707070707010000000000000001000000000000000000000000\
         00000000000000000000000000000000000000000000000000000000000000000000000000000000000000\
         54d20ed3aec51e41615ead5cf3a2efe8"
    );
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
