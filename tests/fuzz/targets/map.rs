//! The extent map: pages, sets and the position in the log, one by one and as a whole index.
//!
//! Input: pairs of key and value, with a byte of flags each (1: the checksum stays as it is), or grains as the
//! log holds them. Held: a page
//! or a chunk of sets that is taken keeps its own rules and is what its writer writes; a map that opens
//! answers every question with an answer or an error, and the same ones after it was written back.

use std::ops::Range;

use stillframe::error::Kind;
use stillframe::map::bitmaps::{
    CHUNK_GRAINS, ChunkKey, EpochSets, GrainSet, SETS_NAMESPACE, decode_chunk, encode_chunk,
};
use stillframe::map::index::{IndexHome, KEY_MAX, VALUE_MAX};
use stillframe::map::keys::{PAGE_NAMESPACE, PageKey, checksum};
use stillframe::map::memory::MemoryIndexHome;
use stillframe::map::page::{Content, Page};
use stillframe::map::{Applied, ExtentMap, Run};
use stillframe::units::{Epoch, Lsn, REGION_GRAINS, VolumeId};

use super::bytes::{Input, put_counted};
use super::store::valid;
use super::{Target, nothing};

pub const TARGET: Target = Target {
    name: "map",
    seeds,
    run,
    reaches: &["refused", "opened", "planned", "written"],
    tokens: &[
        b"P",
        b"B",
        b"A",
        &[0, 0x10],
        &[0, 0x80],
        &[0x3a, 0x30],
        &[0x3b, 0x30],
        &[1, 0x80],
        &[0, 0, 0, 0x80],
    ],
    max_len: 16 << 10,
    group: 1,
    reset: nothing,
};

/// Bytes of pages that are kept: a few, so that they go and come again.
const CACHE: usize = 1 << 10;
/// First byte of a key that is none of the map's: its value is grains as a BITMAP of the log holds them, and
/// what follows says the first of them, in half chunks.
const BITS: u8 = b'T';
const SUM_AT: usize = 16;
const APPLIED_SUM_AT: usize = 40;

fn seeds() -> Vec<Vec<u8>> {
    let pairs = &valid().pairs;
    let some = |of: &[(Vec<u8>, Vec<u8>)]| {
        let mut out = Vec::new();
        for (key, value) in of {
            out.push(0);
            put_counted(&mut out, key);
            put_counted(&mut out, value);
        }
        out
    };
    let mut seeds = vec![some(pairs)];
    seeds.extend(pairs.chunks(4).map(some));
    // A page with every kind of extent, sets with every kind of container.
    let key = PageKey {
        volume: VolumeId(1),
        region: 0,
        epoch: Epoch(2),
    };
    use stillframe::map::page::New;
    use stillframe::units::Place;
    let at = |block| Place { segment: 1, block };
    let mut page = Page::new(2);
    page.insert(0..3, New::Data(at(8), &[1, 2, 3]));
    page.insert(5..9, New::Zero(1));
    page.insert(9..12, New::Zero(2));
    page.insert(4000..4096, New::Data(at(100), &[7; 96]));
    page.lsn = Lsn(9);
    let mut sets = EpochSets::default();
    sets.preserve(0..3, false);
    sets.preserve(4000..4096, false);
    sets.preserve(5..12, true);
    sets.change(70_000..131_000);
    for grain in (20..3000).step_by(3) {
        sets.change(grain..grain + 1);
    }
    let chunk = ChunkKey {
        volume: VolumeId(1),
        epoch: Epoch(2),
        chunk: 0,
    };
    let made = [
        (key.encode(), page.encode(key).unwrap()),
        (chunk.encode(), encode_chunk(chunk, &sets).unwrap()),
        (vec![BITS, 4], sets.touched_bytes(0)),
    ];
    seeds.push(some(&made));
    seeds
}

/// Makes a value's checksum right, wherever its kind keeps it.
fn sign(key: &[u8], value: &mut [u8]) {
    let at = match key.first() {
        Some(b'A') => APPLIED_SUM_AT,
        _ => SUM_AT,
    };
    if value.len() < at + 8 {
        return;
    }
    let sum = match at {
        SUM_AT => {
            value[at..at + 8].fill(0);
            checksum(key, value)
        }
        _ => checksum(key, &value[..at]),
    };
    value[at..at + 8].copy_from_slice(&sum.to_le_bytes());
}

fn check_page(key: &[u8], value: &[u8]) -> Option<PageKey> {
    let key = PageKey::decode(key).ok()?;
    let page = match Page::decode(key, value) {
        Ok(page) => page,
        Err(e) => {
            assert_eq!(e.kind(), Kind::Damaged);
            return None;
        }
    };
    assert!(!page.is_empty() && page.grain_blocks().is_power_of_two());
    let mut end = 0;
    for extent in page.extents() {
        let range = extent.range();
        assert!(range.start >= end && range.start < range.end);
        end = range.end;
        let sums = page.sums(extent);
        match extent.content {
            Content::Zero { .. } => assert!(sums.is_empty()),
            Content::Data { place, .. } => {
                assert_eq!(sums.len(), range.len());
                let blocks = range.len() as u64 * u64::from(page.grain_blocks());
                assert!(u64::from(place.block) + blocks <= u64::from(u32::MAX));
            }
        }
    }
    assert!(end as u64 <= REGION_GRAINS);
    assert_eq!(page.canonical(), page);
    assert_eq!(
        page.encode(key).as_deref(),
        Some(value),
        "it is what its writer writes"
    );
    Some(key)
}

fn check_sets(key: &[u8], value: &[u8]) -> Option<ChunkKey> {
    let key = ChunkKey::decode(key).ok()?;
    let mut sets = EpochSets::default();
    if let Err(e) = decode_chunk(key, value, &mut sets) {
        assert_eq!(e.kind(), Kind::Damaged);
        return None;
    }
    let all = ChunkKey::grains(key.chunk);
    for set in [&sets.data, &sets.zero, &sets.changed] {
        assert!(
            set.ranges()
                .all(|run| run.start >= all.start && run.end <= all.end)
        );
    }
    assert_eq!(sets.data.intersection_len(&sets.zero), 0);
    assert_eq!(sets.data.intersection_len(&sets.changed), 0);
    assert_eq!(sets.zero.intersection_len(&sets.changed), 0);
    let bytes = encode_chunk(key, &sets).expect("none of its sets is empty");
    let mut again = EpochSets::default();
    decode_chunk(key, &bytes, &mut again).expect("what was written is read");
    assert_eq!(again, sets);
    let touched = GrainSet::from_chunk_bytes(all.start, &sets.touched_bytes(key.chunk));
    let touched = touched.expect("what was written is read");
    let parts = [&sets.data, &sets.zero, &sets.changed].map(GrainSet::len);
    assert_eq!(touched.len(), parts.iter().sum::<u64>());
    Some(key)
}

/// The grains of a chunk as a BITMAP in the log holds them.
fn check_bits(first: u64, bytes: &[u8]) {
    if let Some(set) = GrainSet::from_chunk_bytes(first, bytes) {
        let all = first..first.saturating_add(CHUNK_GRAINS);
        assert!(first.is_multiple_of(CHUNK_GRAINS));
        assert!(
            set.ranges()
                .all(|run| run.start >= all.start && run.end <= all.end)
        );
    }
}

/// The grains around where a page or chunk is.
fn near(first: u64) -> Range<u64> {
    first
        ..first
            .saturating_add(REGION_GRAINS)
            .min(stillframe::map::keys::GRAINS_MAX)
}

fn check_plan(grains: Range<u64>, runs: &[Run]) {
    let mut at = grains.start;
    for run in runs {
        assert_eq!(run.grains.start, at, "runs cover the range");
        assert!(run.grains.end > at);
        at = run.grains.end;
    }
    assert_eq!(at, grains.end);
}

fn run(input: &[u8]) -> &'static str {
    let mut input = Input(input);
    let mut pairs = Vec::new();
    let (mut pages, mut chunks) = (Vec::new(), Vec::new());
    while !input.0.is_empty() && pairs.len() < 64 {
        let flags = input.u8();
        let (key, mut value) = (input.counted().to_vec(), input.counted().to_vec());
        if key.is_empty() || key.len() > KEY_MAX || value.len() > VALUE_MAX {
            continue;
        }
        if flags & 1 == 0 {
            sign(&key, &mut value);
        }
        if key[0] == BITS {
            let first: u64 = key.iter().skip(1).fold(0, |n, &b| n << 8 | u64::from(b));
            check_bits(first.wrapping_mul(CHUNK_GRAINS / 2), &value);
            continue;
        }
        match key[0] {
            PAGE_NAMESPACE => pages.extend(check_page(&key, &value)),
            SETS_NAMESPACE => chunks.extend(check_sets(&key, &value)),
            _ => {}
        }
        pairs.push((key, value));
    }
    let home = MemoryIndexHome::new();
    home.tamper(|all| all.extend(pairs));
    let map = match ExtentMap::open(home.open().unwrap(), CACHE) {
        Ok(map) => map,
        Err(e) => {
            assert_eq!(e.kind(), Kind::Damaged);
            return "refused";
        }
    };
    let mut places: Vec<(VolumeId, Epoch, Range<u64>)> = Vec::new();
    places.extend(
        pages
            .iter()
            .map(|p| (p.volume, p.epoch, near(p.first_grain()))),
    );
    places.extend(
        chunks
            .iter()
            .map(|c| (c.volume, c.epoch, near(c.chunk * CHUNK_GRAINS))),
    );
    places.truncate(16);
    ask(map, &home, &places)
}

fn ask(
    map: ExtentMap,
    home: &MemoryIndexHome,
    places: &[(VolumeId, Epoch, Range<u64>)],
) -> &'static str {
    let question = |map: &ExtentMap, (volume, epoch, grains): &(VolumeId, Epoch, Range<u64>)| {
        let grain = map.plan(*volume, *epoch, 1, grains.clone());
        let answer = grain.or_else(|_| map.plan(*volume, *epoch, 2, grains.clone()));
        match &answer {
            Ok(runs) => check_plan(grains.clone(), runs),
            Err(e) => assert!(matches!(e.kind(), Kind::Damaged | Kind::Invalid), "{e:?}"),
        }
        for grains in [grains.end..grains.start, grains.start..u64::MAX] {
            let refused = map.plan(*volume, *epoch, 1, grains).unwrap_err();
            assert_eq!(refused.kind(), Kind::Invalid, "no range of a volume");
        }
        let next = Epoch(epoch.0.saturating_add(1));
        let kept = map.preserved_since(*volume, *epoch);
        let changed = map.changed_between(*volume, *epoch, None);
        assert_eq!(
            kept.intersection_len(&changed),
            kept.len(),
            "what is kept has changed"
        );
        let own = map.unique_grains(*volume, None, *epoch, Some(next));
        assert!(own <= map.unique_grains(*volume, None, *epoch, None));
        (answer.ok(), changed)
    };
    let before: Vec<_> = places.iter().map(|p| question(&map, p)).collect();
    let applied = Applied {
        store: valid().superblock.store,
        lsn: Lsn(99),
        segment: 2,
        offset: 4096,
    };
    map.checkpoint(applied).expect("nothing is in the way");
    drop(map);
    let map = ExtentMap::open(home.open().unwrap(), CACHE).expect("it was open before");
    let after: Vec<_> = places.iter().map(|p| question(&map, p)).collect();
    assert!(
        before == after,
        "the answers of a map that was written back"
    );
    assert_eq!(map.applied(), Some(applied));
    let mut swept = true;
    for volume in map.volumes() {
        let live: Vec<Epoch> = map.epochs(volume).into_iter().step_by(2).collect();
        let mut freed = 0u64;
        match map.sweep(volume, &live, None, &mut |_, blocks| freed += blocks) {
            Ok(_) => {}
            Err(e) => {
                assert_eq!(e.kind(), Kind::Damaged);
                swept = false;
            }
        }
    }
    match (before.iter().any(|(plan, _)| plan.is_some()), swept) {
        (true, true) => "written",
        (true, false) => "planned",
        _ => "opened",
    }
}
