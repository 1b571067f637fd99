//! The extent map against a model that keeps every record in a hash map: under cuts, faults, replays
//! and sweeps, over both indexes; then threads; then memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::bitmaps::{CHUNK_GRAINS, GrainSet};
use super::extents::{Applied, ExtentMap, Publish, Published, Run, RunKind, Swept};
use super::index::IndexHome;
use super::keys::PAGE_NAMESPACE;
use super::memory::MemoryIndexHome;
use super::sled_index::SledHome;
use crate::error::Kind;
use crate::units::{Epoch, Lsn, Place, Uuid, VolumeId};

/// splitmix64.
pub(super) struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

const STORE: Uuid = Uuid([7; 16]);
const VOLUMES: [(VolumeId, u32); 2] = [(VolumeId(1), 1), (VolumeId(u32::MAX), 4)];
/// Grains are taken from around the ends of regions and chunks.
const CLUSTERS: [u64; 3] = [0, 4096 - 30, CHUNK_GRAINS - 20];
const CLUSTER: u64 = 60;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Kept {
    Zero(u32),
    Data(Place, u64),
}

/// What one volume should look like.
#[derive(Default)]
struct Model {
    epoch: u64,
    live: BTreeSet<u64>,
    /// Grain to epoch to the first record.
    kept: BTreeMap<u64, BTreeMap<u64, Kept>>,
    /// Grain to every epoch in which it changed.
    changed: BTreeMap<u64, BTreeSet<u64>>,
}

impl Model {
    fn publish(&mut self, record: &Publish) {
        for i in 0..u64::from(record.count) {
            let grain = record.start + i;
            self.changed
                .entry(grain)
                .or_default()
                .insert(record.epoch.0);
            let kept = match &record.kind {
                Published::Changed => continue,
                Published::Bits { .. } => unreachable!("this model makes none"),
                Published::Zero => Kept::Zero(record.segment),
                Published::Data { place, sums } => Kept::Data(
                    place.advance(i * u64::from(record.grain_blocks)),
                    sums[i as usize],
                ),
            };
            self.kept
                .entry(grain)
                .or_default()
                .entry(record.epoch.0)
                .or_insert(kept);
        }
    }

    fn answer(&self, grain: u64, snapshot: u64) -> Option<Kept> {
        self.kept
            .get(&grain)?
            .range(snapshot..)
            .next()
            .map(|(_, kept)| *kept)
    }

    /// Every record with whether some live snapshot reads it.
    fn records(&self) -> impl Iterator<Item = (u64, u64, Kept, bool)> + '_ {
        self.kept.iter().flat_map(move |(&grain, epochs)| {
            let mut before = None;
            epochs.iter().map(move |(&epoch, &kept)| {
                let from = before.replace(epoch).map_or(0, |before: u64| before + 1);
                let needed = self.live.range(from..=epoch).next().is_some();
                (grain, epoch, kept, needed)
            })
        })
    }

    fn unique(&self, prev: Option<u64>, snapshot: u64, next: Option<u64>) -> u64 {
        let only = |epochs: &&BTreeMap<u64, Kept>| {
            let first = epochs.range(snapshot..).next();
            let older = prev.is_none_or(|prev| epochs.range(prev..snapshot).next().is_some());
            matches!(first, Some((&e, Kept::Data(..))) if older && next.is_none_or(|next| e < next))
        };
        self.kept.values().filter(only).count() as u64
    }
}

/// A map under test with its log and its models.
struct Rig<'a> {
    home: &'a dyn IndexHome,
    memory: Option<&'a MemoryIndexHome>,
    map: ExtentMap,
    random: Random,
    log: Vec<Publish>,
    models: BTreeMap<VolumeId, Model>,
    /// A fault or a replay may have left more than is needed.
    loose: bool,
    counts: BTreeMap<&'static str, u64>,
}

const CACHE: usize = 4000;

impl<'a> Rig<'a> {
    fn new(home: &'a dyn IndexHome, memory: Option<&'a MemoryIndexHome>, seed: u64) -> Rig<'a> {
        let map = ExtentMap::open(home.open().unwrap(), CACHE).unwrap();
        let models = VOLUMES
            .iter()
            .map(|(id, _)| (*id, Model::default()))
            .collect();
        let random = Random(seed);
        let counts = BTreeMap::new();
        Rig {
            home,
            memory,
            map,
            random,
            log: Vec::new(),
            models,
            loose: false,
            counts,
        }
    }

    fn publish(&mut self) {
        let mut records = Vec::new();
        for _ in 0..1 + self.random.below(4) {
            let (volume, grain_blocks) = VOLUMES[self.random.below(2) as usize];
            let base = CLUSTERS[self.random.below(3) as usize];
            let from = self.random.below(CLUSTER);
            let count = 1 + self.random.below((CLUSTER - from).min(20)) as u32;
            let lsn = self.log.len() as u64 + records.len() as u64;
            let segment = 1 + (lsn / 40) as u32;
            let block = 1 + (lsn % 40) as u32 * 1000;
            let kind = match self.random.below(5) {
                0 => Published::Changed,
                1 => Published::Zero,
                _ => Published::Data {
                    place: Place { segment, block },
                    sums: (0..u64::from(count)).map(|i| lsn * 1000 + i).collect(),
                },
            };
            let epoch = Epoch(self.models[&volume].epoch);
            let start = base + from;
            records.push(Publish {
                volume,
                epoch,
                start,
                count,
                grain_blocks,
                segment,
                kind,
            });
        }
        for record in &records {
            self.models.get_mut(&record.volume).unwrap().publish(record);
        }
        self.log.extend(records.iter().cloned());
        self.map.publish(records);
    }

    fn applied(&self) -> Applied {
        let lsn = Lsn(self.log.len() as u64);
        Applied {
            store: STORE,
            lsn,
            segment: 9,
            offset: lsn.0 * 512,
        }
    }

    fn checkpoint(&mut self) -> bool {
        let fault = self.random.below(8);
        if let Some(memory) = self.memory {
            match fault {
                0 => memory.fail_apply(self.random.below(3)),
                1 => memory.fail_checkpoint(self.random.below(2)),
                _ => {}
            }
        }
        let done = self.map.checkpoint(self.applied());
        if done.is_err() {
            *self.counts.entry("failed checkpoint").or_default() += 1;
            self.loose = true;
            assert!(self.memory.is_some(), "{done:?}");
        } else {
            assert_eq!(self.map.applied(), Some(self.applied()));
            assert_eq!(self.map.pending(), 0);
        }
        done.is_ok()
    }

    fn sweep(&mut self) {
        if !self.checkpoint() {
            return;
        }
        for (volume, blocks) in VOLUMES {
            let model = &self.models[&volume];
            let live: Vec<Epoch> = model.live.iter().map(|&e| Epoch(e)).collect();
            let mut freed = BTreeMap::new();
            let done = self.map.sweep(volume, &live, None, &mut |place, n| {
                for i in (0..n).step_by(blocks as usize) {
                    assert_eq!(freed.insert(place.advance(i), ()), None, "freed twice");
                }
            });
            let needed: BTreeSet<Place> = model
                .records()
                .filter_map(|(.., kept, needed)| match kept {
                    Kept::Data(place, _) if needed => Some(place),
                    _ => None,
                })
                .collect();
            assert!(
                !freed.keys().any(|place| needed.contains(place)),
                "freed what is needed"
            );
            match done {
                Ok(swept) => self.check_swept(volume, &swept, freed.len() as u64),
                Err(e) => {
                    assert_eq!(e.kind(), Kind::Io);
                    self.loose = true;
                    return;
                }
            }
        }
        self.check_pages();
    }

    fn check_swept(&self, volume: VolumeId, swept: &Swept, freed: u64) {
        let needed = |data: bool| {
            let model = &self.models[&volume];
            let is = |kept: &Kept| matches!(kept, Kept::Data(..)) == data;
            model
                .records()
                .filter(|(_, _, kept, needed)| *needed && is(kept))
                .count() as u64
        };
        assert_eq!(swept.data_freed, freed);
        assert_eq!(swept.data_live, needed(true));
        assert_eq!(swept.zero_live, needed(false));
    }

    /// After a sweep the index holds exactly the records that are needed, and nothing else is named.
    fn check_pages(&mut self) {
        let mut found = 0;
        self.map
            .for_each_page(&mut |key, page| {
                assert_eq!(*page, page.canonical());
                found += page
                    .extents()
                    .iter()
                    .map(|e| u64::from(e.count))
                    .sum::<u64>();
                let first = self.models[&key.volume].live.first();
                assert!(first.is_some_and(|&first| key.epoch.0 >= first));
                Ok(())
            })
            .unwrap();
        let mut segments: BTreeMap<u32, u64> = BTreeMap::new();
        let mut needed = 0;
        for (volume, blocks) in VOLUMES {
            for (.., kept, _) in self.models[&volume].records().filter(|record| record.3) {
                needed += 1;
                let (segment, blocks) = match kept {
                    Kept::Zero(segment) => (segment, 0),
                    Kept::Data(place, _) => (place.segment, u64::from(blocks)),
                };
                *segments.entry(segment).or_default() += blocks;
            }
        }
        assert_eq!(found, needed);
        assert_eq!(self.map.live_segments().unwrap(), segments);
    }

    fn reopen(&mut self) {
        let index = self.home.open().unwrap();
        self.map = ExtentMap::open(index, CACHE).unwrap();
        let from = self.map.applied().map_or(0, |applied| {
            assert_eq!(applied.store, STORE);
            applied.lsn.0
        });
        // A replay may start early, and does not know how the records once came.
        let mut at = from.saturating_sub(self.random.below(10)) as usize;
        while at < self.log.len() {
            let end = self.log.len().min(at + 1 + self.random.below(9) as usize);
            self.map.publish(self.log[at..end].to_vec());
            at = end;
        }
    }

    fn cut(&mut self) {
        let Some(memory) = self.memory else {
            return;
        };
        let seed = self.random.below(u64::MAX);
        match seed % 5 {
            0 => memory.lose(),
            1 | 2 => memory.kill(seed),
            _ => memory.power_cut(seed),
        }
        self.loose = true;
        self.reopen();
    }

    fn check(&mut self) {
        for (volume, blocks) in VOLUMES {
            let model = &self.models[&volume];
            let live: Vec<u64> = model.live.iter().copied().collect();
            for (i, &snapshot) in live.iter().enumerate() {
                for base in CLUSTERS {
                    let a = base + self.random.below(CLUSTER);
                    let b = base + self.random.below(CLUSTER + 1);
                    let grains = a.min(b)..a.max(b);
                    let plan = self
                        .map
                        .plan(volume, Epoch(snapshot), blocks, grains.clone())
                        .unwrap();
                    check_plan(model, snapshot, blocks, grains, &plan);
                }
                let prev = i.checked_sub(1).map(|i| live[i]);
                let next = live.get(i + 1).copied();
                let since = self.map.preserved_since(volume, Epoch(snapshot));
                let expect = set(model.kept.iter(), |epochs| {
                    epochs.range(snapshot..).next().is_some()
                });
                assert_eq!(since, expect);
                let upto = next.filter(|_| i % 2 == 0);
                let changed = self
                    .map
                    .changed_between(volume, Epoch(snapshot), upto.map(Epoch));
                let expect = set(model.changed.iter(), |epochs| {
                    epochs
                        .range(snapshot..upto.unwrap_or(u64::MAX))
                        .next()
                        .is_some()
                });
                assert_eq!(changed, expect);
                let unique = self.map.unique_grains(
                    volume,
                    prev.map(Epoch),
                    Epoch(snapshot),
                    next.map(Epoch),
                );
                let exact = model.unique(prev, snapshot, next);
                assert!(unique >= exact, "unique {unique} below {exact}");
            }
        }
    }

    /// Right after a sweep that followed no fault, the count is exact.
    fn check_unique(&self) {
        for (volume, _) in VOLUMES {
            let model = &self.models[&volume];
            let live: Vec<u64> = model.live.iter().copied().collect();
            for (i, &snapshot) in live.iter().enumerate() {
                let prev = i.checked_sub(1).map(|i| live[i]);
                let next = live.get(i + 1).copied();
                let (p, s, n) = (prev.map(Epoch), Epoch(snapshot), next.map(Epoch));
                assert_eq!(
                    self.map.unique_grains(volume, p, s, n),
                    model.unique(prev, snapshot, next)
                );
            }
        }
    }

    fn step(&mut self) {
        let volume = VOLUMES[self.random.below(2) as usize].0;
        let name = match self.random.below(100) {
            0..=54 => {
                self.publish();
                "publish"
            }
            55..=66 => {
                let by = 1 + self.random.below(3);
                let model = self.models.get_mut(&volume).unwrap();
                model.epoch += by;
                model.live.insert(model.epoch);
                "snapshot"
            }
            67..=76 => {
                let nth = self.random.below(6) as usize;
                let model = self.models.get_mut(&volume).unwrap();
                let gone = model.live.iter().nth(nth).copied();
                gone.map(|gone| model.live.remove(&gone));
                "delete"
            }
            77..=84 => {
                self.checkpoint();
                "checkpoint"
            }
            85..=91 => {
                self.sweep();
                if !self.loose {
                    self.check_unique();
                }
                "sweep"
            }
            92..=94 => {
                self.cut();
                "cut"
            }
            _ => {
                self.check();
                "check"
            }
        };
        *self.counts.entry(name).or_default() += 1;
    }
}

fn set<'a, T: 'a>(
    grains: impl Iterator<Item = (&'a u64, &'a T)>,
    is: impl Fn(&T) -> bool,
) -> GrainSet {
    grains
        .filter(|(_, epochs)| is(epochs))
        .map(|(&grain, _)| grain..grain + 1)
        .collect()
}

fn check_plan(
    model: &Model,
    snapshot: u64,
    blocks: u32,
    grains: std::ops::Range<u64>,
    plan: &[Run],
) {
    let mut at = grains.start;
    for run in plan {
        assert_eq!(run.grains.start, at);
        assert!(!run.grains.is_empty());
        for (i, grain) in run.grains.clone().enumerate() {
            let expect = model.answer(grain, snapshot);
            match (&run.kind, expect) {
                (RunKind::Source, None) | (RunKind::Zero, Some(Kept::Zero(_))) => {}
                (RunKind::Preserved { place, sums }, Some(Kept::Data(at, sum))) => {
                    assert_eq!(place.advance(i as u64 * u64::from(blocks)), at);
                    assert_eq!(sums[i], sum);
                }
                (kind, expect) => panic!("grain {grain} @{snapshot}: {kind:?}, not {expect:?}"),
            }
        }
        if let RunKind::Preserved { sums, .. } = &run.kind {
            assert_eq!(sums.len() as u64, run.grains.end - run.grains.start);
        }
        at = run.grains.end;
    }
    assert_eq!(at, grains.end);
    for pair in plan.windows(2) {
        let plain = |kind: &RunKind| !matches!(kind, RunKind::Preserved { .. });
        assert!(
            !plain(&pair[0].kind) || pair[0].kind != pair[1].kind,
            "not coalesced: {pair:?}"
        );
    }
}

fn report_seed(seed: u64) -> impl Drop {
    struct OnPanic(u64);
    impl Drop for OnPanic {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("seed {}", self.0);
            }
        }
    }
    OnPanic(seed)
}

#[test]
fn answers_like_the_model_under_cuts_faults_and_sweeps() {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for seed in 0..60 {
        let _seed = report_seed(seed);
        let home = MemoryIndexHome::new();
        let mut rig = Rig::new(&home, Some(&home), seed);
        for _ in 0..400 {
            rig.step();
        }
        rig.check();
        for (name, n) in rig.counts {
            *counts.entry(name).or_default() += n;
        }
    }
    println!("{counts:?}");
    for name in [
        "publish",
        "snapshot",
        "delete",
        "checkpoint",
        "sweep",
        "cut",
        "check",
    ] {
        assert!(counts[name] >= 400, "{name}: {counts:?}");
    }
    assert!(counts["failed checkpoint"] >= 100);
}

#[test]
fn unique_counts_are_exact_after_a_sweep() {
    for seed in 1000..1020 {
        let _seed = report_seed(seed);
        let home = MemoryIndexHome::new();
        // Without the handle to the twin the rig neither cuts nor injects faults.
        let mut rig = Rig::new(&home, None, seed);
        for _ in 0..400 {
            rig.step();
        }
        assert!(!rig.loose && rig.counts["sweep"] > 5);
    }
}

#[test]
fn answers_like_the_model_over_sled_with_reopening() {
    for seed in 2000..2003 {
        let _seed = report_seed(seed);
        let dir = tempfile::tempdir().unwrap();
        let home = SledHome::new(dir.path().join("map"));
        let mut rig = Rig::new(&home, None, seed);
        for round in 0..4 {
            for _ in 0..150 {
                rig.step();
            }
            if round == 2 {
                let empty = MemoryIndexHome::new().open().unwrap();
                rig.map = ExtentMap::open(empty, CACHE).unwrap();
                home.set_aside().unwrap();
            } else {
                // sled allows one opener; let the old one go first.
                let empty = MemoryIndexHome::new().open().unwrap();
                rig.map = ExtentMap::open(empty, CACHE).unwrap();
            }
            rig.reopen();
            rig.check();
        }
    }
}

/// A record of payload for one grain, for the tests below.
fn data(grain: u64, epoch: u64) -> Publish {
    let place = Place {
        segment: 1 + (grain >> 16) as u32,
        block: 1 + (grain & 0xffff) as u32,
    };
    Publish {
        volume: VolumeId(1),
        epoch: Epoch(epoch),
        start: grain,
        count: 1,
        grain_blocks: 1,
        segment: place.segment,
        kind: Published::Data {
            place,
            sums: vec![grain ^ 0xabcd],
        },
    }
}

fn applied(lsn: u64) -> Applied {
    Applied {
        store: STORE,
        lsn: Lsn(lsn),
        segment: 1,
        offset: 4096,
    }
}

/// Goal: M2 while checkpoints and sweeps run. A reader never misses what was published before it
/// asked; the cache is too small to hide what the index says.
#[test]
fn readers_never_miss_a_record_while_checkpoints_run() {
    let home = MemoryIndexHome::new();
    let map = ExtentMap::open(home.open().unwrap(), 2000).unwrap();
    let volume = VolumeId(1);
    let scatter = |i: u64| i * 977 % 20_000;
    let published = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let checks = AtomicU64::new(0);
    let stop_when_done = |work: &mut dyn FnMut(u64)| {
        let mut i = 0;
        while !stop.load(Ordering::SeqCst) {
            work(i);
            i += 1;
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| stop_when_done(&mut |i| map.checkpoint(applied(i)).unwrap()));
        scope.spawn(|| {
            stop_when_done(&mut |_| {
                map.sweep(volume, &[Epoch(1)], None, &mut |_, _| panic!("all is live"))
                    .unwrap();
            });
        });
        for reader in 0..2 {
            let (map, published, checks) = (&map, &published, &checks);
            let stop_when_done = &stop_when_done;
            scope.spawn(move || {
                let mut random = Random(reader);
                stop_when_done(&mut |_| {
                    let upto = published.load(Ordering::SeqCst);
                    if upto == 0 {
                        return;
                    }
                    // The newest are where a race would show.
                    let i = upto - 1 - random.below(upto.min(40));
                    let grain = scatter(i);
                    let plan = map.plan(volume, Epoch(1), 1, grain..grain + 1).unwrap();
                    let RunKind::Preserved { sums, .. } = &plan[0].kind else {
                        panic!("grain {grain} missed: {plan:?}");
                    };
                    assert_eq!(sums[0], grain ^ 0xabcd);
                    checks.fetch_add(1, Ordering::SeqCst);
                });
            });
        }
        let mut i = 0;
        while i < 20_000 || checks.load(Ordering::SeqCst) < 1000 && i < 200_000 {
            map.publish(vec![data(scatter(i), 1 + scatter(i) % 3)]);
            i += 1;
            published.store(i, Ordering::SeqCst);
            if i % 32 == 0 {
                // The lock is not fair, and a machine with two cores not patient.
                std::thread::sleep(std::time::Duration::from_micros(50));
            }
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert!(checks.load(Ordering::SeqCst) >= 1000, "{checks:?}");
    assert_eq!(map.publish_count(volume), published.load(Ordering::SeqCst));
    assert!(map.lock().cache.bytes() <= 2000);
}

/// The sets that a bookmark needs outlive every record behind them, and no others do.
#[test]
fn sets_since_a_bookmark_survive_a_sweep() {
    let home = MemoryIndexHome::new();
    let map = ExtentMap::open(home.open().unwrap(), 1 << 20).unwrap();
    let volume = VolumeId(1);
    map.publish((1..=5).map(|epoch| data(epoch * 10, epoch)).collect());
    map.checkpoint(applied(1)).unwrap();
    let known = |map: &ExtentMap| map.epochs(volume).iter().map(|e| e.0).collect::<Vec<_>>();
    let sweep = |live: &[Epoch], bookmark: Option<u64>| {
        let bookmark = bookmark.map(Epoch);
        map.sweep(volume, live, bookmark, &mut |_, _| {}).unwrap()
    };
    sweep(&[Epoch(4)], Some(2));
    assert_eq!(known(&map), [2, 3, 4, 5]);
    assert_eq!(
        sweep(&[], Some(3)).data_live,
        0,
        "no snapshot needs a record"
    );
    assert_eq!(known(&map), [3, 4, 5]);
    let changed = map.changed_between(volume, Epoch(3), None);
    assert_eq!(changed, [30..31, 40..41, 50..51].into_iter().collect());
    // A snapshot older than the bookmark decides.
    sweep(&[Epoch(3)], Some(5));
    assert_eq!(known(&map), [3, 4, 5]);
    map.checkpoint(applied(2)).unwrap();
    let again = ExtentMap::open(home.open().unwrap(), 1 << 20).unwrap();
    assert_eq!(again.changed_between(volume, Epoch(3), None), changed);
}

/// M5: a page that the index lost is damage, not the source's content; so is one that rotted.
#[test]
fn a_lost_or_rotten_page_is_damage() {
    for rot in [false, true] {
        let home = MemoryIndexHome::new();
        let map = ExtentMap::open(home.open().unwrap(), 1 << 20).unwrap();
        map.publish(vec![data(5, 1), data(9000, 2)]);
        map.checkpoint(applied(1)).unwrap();
        home.tamper(|pairs| {
            let key = pairs
                .keys()
                .find(|key| key[0] == PAGE_NAMESPACE)
                .unwrap()
                .clone();
            if rot {
                pairs.get_mut(&key).unwrap()[30] ^= 1;
            } else {
                pairs.remove(&key);
            }
        });
        let map = ExtentMap::open(home.open().unwrap(), 1 << 20).unwrap();
        assert_eq!(
            map.plan(VolumeId(1), Epoch(1), 1, 0..10)
                .unwrap_err()
                .kind(),
            Kind::Damaged
        );
        assert_eq!(
            map.plan(VolumeId(1), Epoch(1), 1, 9000..9001)
                .unwrap()
                .len(),
            1
        );
    }
}

#[test]
fn a_rotten_position_or_set_refuses_to_open() {
    for namespace in *b"AB" {
        let home = MemoryIndexHome::new();
        let map = ExtentMap::open(home.open().unwrap(), 1 << 20).unwrap();
        map.publish(vec![data(5, 1)]);
        map.checkpoint(applied(1)).unwrap();
        home.tamper(|pairs| {
            let (_, value) = pairs
                .iter_mut()
                .find(|(key, _)| key[0] == namespace)
                .unwrap();
            *value.last_mut().unwrap() ^= 0x80;
        });
        let opened = ExtentMap::open(home.open().unwrap(), 1 << 20);
        assert_eq!(opened.err().unwrap().kind(), Kind::Damaged);
    }
}

/// A snapshot may be taken while a sweep runs whose list of live ones is older.
#[test]
fn a_sweep_does_not_judge_what_came_after_its_checkpoint() {
    let home = MemoryIndexHome::new();
    let map = ExtentMap::open(home.open().unwrap(), 1 << 20).unwrap();
    let volume = VolumeId(1);
    map.publish((0..40).map(|i| data(i * 4096, 1)).collect());
    map.checkpoint(applied(10)).unwrap();
    let live = [Epoch(1)];
    let mut told = 0;
    // Epoch 5 opens, preserves what epoch 1 had, and is checkpointed while the sweep is under way.
    map.publish((0..40).map(|i| data(i * 4096 + 1, 1)).collect());
    let mut first = true;
    let run = map.sweep(volume, &live, None, &mut |_, _| told += 1);
    assert_eq!((run.unwrap().data_live, told), (40, 0));
    map.publish(vec![data(0, 0)]);
    map.checkpoint(applied(11)).unwrap();
    let swept = map.sweep(volume, &live, None, &mut |_, _| {
        if std::mem::take(&mut first) {
            map.publish((0..40).map(|i| data(i * 4096 + 1, 5)).collect());
            map.checkpoint(applied(12)).unwrap();
        }
    });
    assert_eq!(swept.unwrap().data_freed, 1);
    for i in 0..40 {
        let grain = i * 4096 + 1;
        let plan = map.plan(volume, Epoch(5), 1, grain..grain + 1).unwrap();
        assert!(
            matches!(plan[0].kind, RunKind::Preserved { .. }),
            "{plan:?}"
        );
    }
}

#[test]
fn a_forgotten_volume_leaves_nothing_and_others_stay() {
    let home = MemoryIndexHome::new();
    let map = ExtentMap::open(home.open().unwrap(), 1 << 20).unwrap();
    map.publish((0..60).map(|i| data(i * 5000, 1)).collect());
    let other = Publish {
        volume: VolumeId(2),
        ..data(7, 1)
    };
    map.publish(vec![other]);
    map.checkpoint(applied(1)).unwrap();
    map.publish(vec![data(1, 2)]);
    map.forget_volume(VolumeId(1)).unwrap();
    map.checkpoint(applied(2)).unwrap();
    assert_eq!(map.epochs(VolumeId(1)), []);
    let mut pages = Vec::new();
    map.for_each_page(&mut |key, _| {
        pages.push(key.volume);
        Ok(())
    })
    .unwrap();
    assert_eq!(pages, [VolumeId(2)]);
    let map = ExtentMap::open(home.open().unwrap(), 1 << 20).unwrap();
    assert!(map.preserved_since(VolumeId(1), Epoch(0)).is_empty());
    assert_eq!(map.preserved_since(VolumeId(2), Epoch(0)).len(), 1);
}

#[test]
#[should_panic(expected = "one checksum a grain")]
fn a_record_that_contradicts_itself_is_a_mistake_of_the_caller() {
    let map = ExtentMap::open(MemoryIndexHome::new().open().unwrap(), 1 << 20).unwrap();
    map.publish(vec![Publish {
        count: 2,
        ..data(1, 1)
    }]);
}

fn memory_mib() -> (u64, u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
            >> 10
    };
    (field("RssAnon:"), field("VmHWM:"))
}

/// Goal: the map of 100 GiB of preserved payload stays far below the daemon's 128 MiB. Run alone:
/// `cargo test --release map::tests::a_hundred -- --ignored --nocapture`.
#[test]
#[ignore = "measures the whole process: .ci/run runs it in one of its own"]
fn a_hundred_gib_of_map_stay_in_bounded_memory() {
    const REGION: u64 = 4096;
    const GRAINS: u64 = 100 << 18;
    /// 64 MiB of payload, after which a store checkpoints.
    const SLICE: u64 = 16_384;
    let dir = tempfile::tempdir().unwrap();
    let home = SledHome::new(dir.path().join("map"));
    let map = Arc::new(ExtentMap::open(home.open().unwrap(), 32 << 20).unwrap());
    let volume = VolumeId(1);
    let start = std::time::Instant::now();
    let record = |at: u64| {
        let place = Place {
            segment: 1 + (at / SLICE) as u32,
            block: 1 + (at % SLICE) as u32,
        };
        let sums = (0..REGION)
            .map(|i| (at + i).wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .collect();
        let kind = Published::Data { place, sums };
        let (epoch, count, segment) = (Epoch(1), REGION as u32, place.segment);
        Publish {
            volume,
            epoch,
            start: at,
            count,
            grain_blocks: 1,
            segment,
            kind,
        }
    };
    let mut longest = std::time::Duration::ZERO;
    for slice in 0..GRAINS / SLICE {
        let from = slice * SLICE;
        map.publish(
            (from..from + SLICE)
                .step_by(REGION as usize)
                .map(record)
                .collect(),
        );
        let begin = std::time::Instant::now();
        map.checkpoint(applied(slice)).unwrap();
        longest = longest.max(begin.elapsed());
    }
    println!(
        "written: {:?}, anon/peak MiB {:?}",
        start.elapsed(),
        memory_mib()
    );
    println!("longest checkpoint {longest:?}");
    let start = std::time::Instant::now();
    let mut random = Random(1);
    for _ in 0..5000 {
        let at = random.below(GRAINS - 256);
        let plan = map.plan(volume, Epoch(1), 1, at..at + 256).unwrap();
        assert!(
            plan.iter()
                .all(|run| matches!(run.kind, RunKind::Preserved { .. }))
        );
    }
    println!(
        "5000 random plans: {:?}, MiB {:?}",
        start.elapsed(),
        memory_mib()
    );
    let start = std::time::Instant::now();
    for at in (0..GRAINS).step_by(256) {
        assert!(
            !map.plan(volume, Epoch(1), 1, at..at + 256)
                .unwrap()
                .is_empty()
        );
    }
    println!(
        "sequential plans: {:?}, MiB {:?}",
        start.elapsed(),
        memory_mib()
    );
    let start = std::time::Instant::now();
    assert_eq!(map.preserved_since(volume, Epoch(1)).len(), GRAINS);
    println!("preserved_since: {:?}", start.elapsed());
    let start = std::time::Instant::now();
    assert_eq!(map.live_segments().unwrap().len() as u64, GRAINS / SLICE);
    println!(
        "live_segments: {:?}, MiB {:?}",
        start.elapsed(),
        memory_mib()
    );
    drop(map);
    let start = std::time::Instant::now();
    let map = ExtentMap::open(home.open().unwrap(), 32 << 20).unwrap();
    println!("reopen: {:?}, MiB {:?}", start.elapsed(), memory_mib());
    let start = std::time::Instant::now();
    let mut blocks = 0;
    let swept = map
        .sweep(volume, &[], None, &mut |_, n| blocks += n)
        .unwrap();
    assert_eq!((swept.data_freed, blocks), (GRAINS, GRAINS));
    map.checkpoint(applied(GRAINS)).unwrap();
    println!(
        "sweep of all: {:?}, MiB {:?}",
        start.elapsed(),
        memory_mib()
    );
    let size: u64 = std::fs::read_dir(dir.path().join("map"))
        .unwrap()
        .map(|e| e.unwrap().metadata().unwrap().len())
        .sum();
    println!("index on disk: {} MiB", size >> 20);
    assert!(memory_mib().0 < 100, "{:?}", memory_mib());
}

/// Goal: the opposite of the test above, single grains all over 1 TiB: every checkpoint rewrites
/// thousands of small pages.
#[test]
#[ignore = "measures the whole process: .ci/run runs it in one of its own"]
fn a_tebibyte_of_scattered_writes_stays_in_bounded_memory() {
    const GRAINS: u64 = 1 << 28;
    const SLICE: u64 = 16_384;
    let dir = tempfile::tempdir().unwrap();
    let home = SledHome::new(dir.path().join("map"));
    let map = ExtentMap::open(home.open().unwrap(), 32 << 20).unwrap();
    let mut random = Random(9);
    let mut longest = std::time::Duration::ZERO;
    let start = std::time::Instant::now();
    for slice in 0..60 {
        let epoch = 1 + slice / 20;
        map.publish(
            (0..SLICE)
                .map(|_| data(random.below(GRAINS), epoch))
                .collect(),
        );
        let begin = std::time::Instant::now();
        map.checkpoint(applied(slice)).unwrap();
        longest = longest.max(begin.elapsed());
        if slice % 20 == 19 {
            println!(
                "slice {slice}: {:?}, anon/peak MiB {:?}",
                start.elapsed(),
                memory_mib()
            );
        }
    }
    println!("longest checkpoint {longest:?}");
    let start = std::time::Instant::now();
    for _ in 0..20_000 {
        let at = random.below(GRAINS - 16);
        assert!(
            !map.plan(VolumeId(1), Epoch(1), 1, at..at + 16)
                .unwrap()
                .is_empty()
        );
    }
    println!(
        "20000 random plans: {:?}, MiB {:?}",
        start.elapsed(),
        memory_mib()
    );
    let start = std::time::Instant::now();
    let swept = map
        .sweep(VolumeId(1), &[Epoch(3)], None, &mut |_, _| {})
        .unwrap();
    map.checkpoint(applied(60)).unwrap();
    println!(
        "sweep {swept:?}: {:?}, MiB {:?}",
        start.elapsed(),
        memory_mib()
    );
    let size: u64 = std::fs::read_dir(dir.path().join("map"))
        .unwrap()
        .map(|e| e.unwrap().metadata().unwrap().len())
        .sum();
    println!("index on disk: {} MiB", size >> 20);
    assert!(memory_mib().0 < 128, "{:?}", memory_mib());
}
