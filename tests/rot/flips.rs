//! The campaign of bit flips: in every class of position of log, superblock and overlays.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;

use stillframe::map::memory::MemoryIndexHome;
use stillframe::sys::sim::SimWorld;
use stillframe::volume::Share;
use stillframe::volume::audit::{self, Severity};

use crate::rig::{Chance, setting};
use crate::stage::{Stage, compare, diffs, env, settings, views};

/// Where a flip hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Superblock,
    Head,
    BatchHeader,
    Table,
    Checksum,
    Payload,
    Rest,
    Overlay,
    OverlaySums,
}

const CLASSES: [Class; 9] = [
    Class::Superblock,
    Class::Head,
    Class::BatchHeader,
    Class::Table,
    Class::Checksum,
    Class::Payload,
    Class::Rest,
    Class::Overlay,
    Class::OverlaySums,
];

/// The bytes of each class: (file, start, end).
type Targets = BTreeMap<Class, Vec<(String, u64, u64)>>;

fn targets(stage: &Stage) -> Targets {
    let mut all: Targets = BTreeMap::new();
    let mut add = |class, path: &str, start: u64, end: u64| {
        if start < end {
            all.entry(class)
                .or_default()
                .push((path.to_owned(), start, end));
        }
    };
    for slot in [0, 64 << 10] {
        add(Class::Superblock, "store/superblock", slot, slot + 200);
    }
    for (path, size) in stage.files("store/log") {
        if !path.ends_with(".seg") {
            continue;
        }
        add(Class::Head, &path, 0, 104);
        add(Class::Head, &path, 2048, 2048 + 104);
        let bytes = stage.world.peek(&path).unwrap();
        let mut at = 4096;
        while at + 4096 <= size as usize {
            if &bytes[at..at + 8] != b"SFbatch1" {
                add(Class::Rest, &path, at as u64, at as u64 + 4096);
                at += 4096;
                continue;
            }
            let field = |from: usize| {
                let four = bytes[at + from..at + from + 4].try_into().unwrap();
                u32::from_le_bytes(four) as usize
            };
            let (commit, payload) = (field(68), field(72));
            let end = at + commit;
            let payload_at = end.next_multiple_of(4096);
            add(Class::BatchHeader, &path, at as u64, at as u64 + 192);
            add(Class::Table, &path, at as u64 + 192, end as u64 - 16);
            add(Class::Checksum, &path, end as u64 - 16, end as u64);
            add(Class::Rest, &path, end as u64, payload_at as u64);
            let next = payload_at + payload * 4096;
            add(Class::Payload, &path, payload_at as u64, next as u64);
            at = next;
        }
    }
    for (path, size) in stage.files("store/clones") {
        let class = match path.ends_with(".data") {
            true => Class::Overlay,
            false => Class::OverlaySums,
        };
        add(class, &path, 0, size);
    }
    all
}

/// Flips one bit, or a few in a row; returns the byte's position.
fn flip(world: &SimWorld, targets: &Targets, class: Class, chance: &mut Chance) -> (String, u64) {
    let list = &targets[&class];
    let (path, start, end) = &list[chance.below(list.len() as u64) as usize];
    let at = start + chance.below(end - start);
    let byte = world.peek(path).unwrap()[at as usize];
    let bits = match chance.below(8) {
        0 => 1 + chance.below(255) as u8,
        _ => 1 << chance.below(8),
    };
    world.poke(path, at, &[byte ^ bits]);
    (path.clone(), at)
}

#[derive(Default)]
struct Score {
    flips: BTreeMap<Class, u64>,
    /// Flips after which some page answered an error.
    refused: BTreeMap<Class, u64>,
    noticed: BTreeMap<Class, u64>,
}

/// Whether some ranges, ascending, cover one.
fn covers(all: &[Range<u64>], range: &Range<u64>) -> bool {
    all.iter()
        .any(|have| have.start <= range.start && range.end <= have.end)
}

/// One flip in a copy of the stage: everything is read, with the map as it was and sometimes lost.
fn one(stage: &Stage, targets: &Targets, seed: u64, score: &mut Score) {
    let mut chance = Chance(seed);
    let world = stage.world.fork(seed);
    let index: MemoryIndexHome = stage.index.fork(seed);
    let class = loop {
        let class = CLASSES[chance.below(CLASSES.len() as u64) as usize];
        if targets.contains_key(&class) {
            break class;
        }
    };
    let (path, at) = flip(&world, targets, class, &mut chance);
    let what = format!("flip {seed}: {class:?} {path} byte {at}");
    let audit = audit::offline(&env(&world, &index), Share::ALL, seed);
    let audit = audit.unwrap_or_else(|e| panic!("{what}: {e:?}"));
    let wrong = audit.findings.iter();
    let wrong: Vec<_> = wrong.filter(|f| f.severity != Severity::Note).collect();
    if chance.below(4) == 0 {
        stillframe::map::index::IndexHome::set_aside(&index).unwrap();
    }
    let engine = stillframe::volume::Engine::open(env(&world, &index), settings());
    let engine = engine.unwrap_or_else(|e| panic!("{what}: {e:?}"));
    let failed = compare(&views(&engine), &stage.views, &what);
    // What changed is known: more may be said to have, never less.
    for (point, changed) in diffs(&engine) {
        for range in &stage.diffs[&point] {
            assert!(
                covers(&changed, range),
                "{what}: the diff from {point} lacks {range:?}"
            );
        }
    }
    *score.flips.entry(class).or_default() += 1;
    if !wrong.is_empty() {
        *score.noticed.entry(class).or_default() += 1;
    }
    if failed.is_empty() {
        return;
    }
    *score.refused.entry(class).or_default() += 1;
    assert!(!wrong.is_empty(), "{what}: {failed:?} and no finding");
    // Only what the record covers: one grain of one volume, in any of its views.
    assert!(
        matches!(class, Class::Payload | Class::Overlay),
        "{what}: {failed:?}"
    );
    let volumes: BTreeSet<&str> = failed.iter().map(|(name, _)| &name[..1]).collect();
    assert_eq!(volumes.len(), 1, "{what}: {failed:?}");
    let grain = if volumes.contains("a") { 1 } else { 4 };
    let grains: BTreeSet<usize> = failed.iter().map(|(_, page)| page / grain).collect();
    assert_eq!(grains.len(), 1, "{what}: {failed:?}");
    assert!(
        failed.iter().all(|(name, _)| !name.ends_with("/live")),
        "{what}: {failed:?}"
    );
}

/// No wrong byte, and no error outside of what the flipped record covers.
#[test]
fn a_flipped_bit_returns_no_wrong_byte_and_fails_nothing_else() {
    let flips = setting("STILLFRAME_FLIPS", 500);
    let seed = setting("STILLFRAME_FLIPS_SEED", 20_261_121);
    let state = std::env::var_os("STILLFRAME_FLIPS_STATE");
    let from: u64 = state
        .as_ref()
        .and_then(|path| fs::read_to_string(path).ok())
        .map_or(0, |text| text.trim().parse().unwrap());
    // With a state file the number is that of the whole campaign.
    let end = if state.is_some() { flips } else { from + flips };
    println!("seed {seed}, flips {from}..{end}");
    let mut score = Score::default();
    // A stage for some flips: their stores differ, too.
    const OF_ONE: u64 = 125;
    let mut stage: Option<(u64, Stage, Targets)> = None;
    for n in from..end {
        let number = n / OF_ONE;
        if stage.as_ref().is_none_or(|(known, ..)| *known != number) {
            let made = Stage::new(seed ^ (number << 20), 160);
            let targets = targets(&made);
            stage = Some((number, made, targets));
        }
        let (_, made, targets) = stage.as_ref().unwrap();
        one(
            made,
            targets,
            seed.wrapping_mul(31).wrapping_add(n),
            &mut score,
        );
        if let Some(path) = &state
            && (n + 1) % OF_ONE == 0
        {
            fs::write(path, (n + 1).to_string()).unwrap();
        }
    }
    println!("flips {:?}", score.flips);
    println!("refused {:?}", score.refused);
    println!("noticed {:?}", score.noticed);
    if end.saturating_sub(from) >= 500 {
        for class in CLASSES {
            assert!(score.flips.contains_key(&class), "{class:?} was never hit");
        }
        // It cannot be that none of them mattered.
        for class in [Class::Payload, Class::Overlay] {
            assert!(score.refused.contains_key(&class), "{class:?}");
        }
        for class in [
            Class::Superblock,
            Class::BatchHeader,
            Class::Table,
            Class::OverlaySums,
        ] {
            assert!(score.noticed.contains_key(&class), "{class:?}");
        }
    }
}
