//! Sets of grains, and the three sets each (volume, epoch) has: what changed, and how it was kept.
//!
//! A [`GrainSet`] is a map of chunks of [`CHUNK_GRAINS`] grains to roaring bitmaps; chunks are shared
//! when a set is cloned and copied when one side changes, so a clone costs a few microseconds even
//! for a volume of 1 TiB. Runs are cheap. [`EpochSets`] are disjoint:
//!
//! - **B1** a grain is in at most one of `data`, `zero` and `changed`;
//! - **B2** the first of `data` and `zero` stays; `changed` gives way to both;
//! - **B3** the three parts of one chunk are one value of the index, so that no crash can move a
//!   grain out of one set without moving it into the other.
//!
//! Value (little-endian): version u8, 3 bytes zero, three lengths u32 (data, zero, changed), checksum
//! u64 over key and value with this field zero, then the three bitmaps in roaring's portable format,
//! of grain numbers relative to the chunk; an empty set has length 0. A chunk of 2^17 grains holds two
//! roaring containers, at most 8 KiB each, three times: under 50 KiB. Four times the grains would
//! not fit three sets under the 96 KiB an index takes.

use std::collections::BTreeMap;
use std::collections::btree_map;
use std::ops::Range;
use std::sync::Arc;

use roaring::RoaringBitmap;

use crate::error::{Error, Kind, Result};
use crate::map::keys::{GRAINS_MAX, checksum, put_key, take_key};
use crate::sys::planted::{Bug, planted};
use crate::units::{COUNTER_MAX, Epoch, VolumeId};

/// Grains of a chunk, the unit in which sets are shared and persisted.
pub const CHUNK_GRAINS: u64 = 1 << 17;

/// First byte of the keys of sets.
pub const SETS_NAMESPACE: u8 = b'B';

const VERSION: u8 = 1;
const HEADER: usize = 24;
const CHECKSUM_AT: usize = 16;

/// A set of grain numbers, good at runs.
#[derive(Clone, Default, PartialEq)]
pub struct GrainSet {
    /// Never holds an empty bitmap.
    chunks: BTreeMap<u64, Arc<RoaringBitmap>>,
}

/// The chunks of a range with the part of each, relative to the chunk.
fn split(range: Range<u64>) -> impl Iterator<Item = (u64, Range<u32>)> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let chunk = at / CHUNK_GRAINS;
        let base = chunk * CHUNK_GRAINS;
        let end = range.end.min(base + CHUNK_GRAINS);
        let part = (at - base) as u32..(end - base) as u32;
        at = end;
        Some((chunk, part))
    })
}

impl GrainSet {
    /// The empty set.
    pub fn new() -> GrainSet {
        GrainSet::default()
    }

    /// Adds a run.
    pub fn insert_range(&mut self, range: Range<u64>) {
        for (chunk, part) in split(range) {
            Arc::make_mut(self.chunks.entry(chunk).or_default()).insert_range(part);
        }
    }

    /// Takes a run out.
    pub fn remove_range(&mut self, range: Range<u64>) {
        for (chunk, part) in split(range) {
            let Some(bits) = self.chunks.get_mut(&chunk) else {
                continue;
            };
            Arc::make_mut(bits).remove_range(part);
            if bits.is_empty() {
                self.chunks.remove(&chunk);
            }
        }
    }

    /// Whether a grain is in the set.
    pub fn contains(&self, grain: u64) -> bool {
        let bits = self.chunks.get(&(grain / CHUNK_GRAINS));
        bits.is_some_and(|bits| bits.contains((grain % CHUNK_GRAINS) as u32))
    }

    /// Whether every grain of a range is in the set; true for an empty range.
    pub fn contains_range(&self, range: Range<u64>) -> bool {
        split(range).all(|(chunk, part)| {
            self.chunks
                .get(&chunk)
                .is_some_and(|bits| bits.contains_range(part))
        })
    }

    /// Whether any grain of a range is in the set.
    pub fn intersects_range(&self, range: Range<u64>) -> bool {
        self.ranges_in(range).next().is_some()
    }

    /// Whether nothing is in the set.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Number of grains.
    pub fn len(&self) -> u64 {
        self.chunks.values().map(|bits| bits.len()).sum()
    }

    /// Adds another set.
    pub fn union_with(&mut self, other: &GrainSet) {
        for (&chunk, theirs) in &other.chunks {
            match self.chunks.entry(chunk) {
                btree_map::Entry::Vacant(free) => {
                    free.insert(Arc::clone(theirs));
                }
                btree_map::Entry::Occupied(mut ours) => {
                    if !Arc::ptr_eq(ours.get(), theirs) {
                        *Arc::make_mut(ours.get_mut()) |= theirs.as_ref();
                    }
                }
            }
        }
    }

    /// What is in either set.
    #[must_use]
    pub fn union(&self, other: &GrainSet) -> GrainSet {
        let mut all = self.clone();
        all.union_with(other);
        all
    }

    /// Number of grains in both sets.
    pub fn intersection_len(&self, other: &GrainSet) -> u64 {
        self.chunks
            .iter()
            .filter_map(|(chunk, bits)| Some(bits.intersection_len(other.chunks.get(chunk)?)))
            .sum()
    }

    /// The set as sorted half-open runs; neighbours are joined.
    pub fn ranges(&self) -> Ranges<'_> {
        self.ranges_in(0..u64::MAX)
    }

    /// The runs of the set inside a range, cut to it.
    pub fn ranges_in(&self, range: Range<u64>) -> Ranges<'_> {
        let first = range.start / CHUNK_GRAINS;
        let end = range.end.div_ceil(CHUNK_GRAINS).max(first);
        Ranges {
            chunks: self.chunks.range(first..end),
            open: None,
            held: None,
            within: range,
        }
    }

    /// The runs of a range that are not in the set.
    pub fn gaps_in(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut runs = self.ranges_in(range.clone());
        let mut at = range.start;
        std::iter::from_fn(move || {
            while at < range.end {
                let run = runs.next().unwrap_or(range.end..range.end);
                let gap = at..run.start;
                at = run.end.max(at);
                if !gap.is_empty() {
                    return Some(gap);
                }
            }
            None
        })
    }

    /// The grains of the chunk that begins at `first`, from roaring's portable format; `None` if
    /// it does not hold such.
    pub fn from_chunk_bytes(first: u64, mut bytes: &[u8]) -> Option<GrainSet> {
        let bits = RoaringBitmap::deserialize_from(&mut bytes).ok()?;
        let inside = bits.max().is_none_or(|max| u64::from(max) < CHUNK_GRAINS);
        if !inside || !bytes.is_empty() || !first.is_multiple_of(CHUNK_GRAINS) {
            return None;
        }
        let mut set = GrainSet::new();
        set.set_chunk(first / CHUNK_GRAINS, Some(Arc::new(bits)));
        Some(set)
    }

    fn chunk(&self, chunk: u64) -> Option<Arc<RoaringBitmap>> {
        self.chunks.get(&chunk).cloned()
    }

    fn set_chunk(&mut self, chunk: u64, bits: Option<Arc<RoaringBitmap>>) {
        match bits {
            Some(bits) if !bits.is_empty() => self.chunks.insert(chunk, bits),
            _ => self.chunks.remove(&chunk),
        };
    }
}

impl Eq for GrainSet {}

impl std::fmt::Debug for GrainSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.ranges()).finish()
    }
}

impl FromIterator<Range<u64>> for GrainSet {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(runs: I) -> GrainSet {
        let mut set = GrainSet::new();
        for run in runs {
            set.insert_range(run);
        }
        set
    }
}

/// Sorted runs of a [`GrainSet`].
pub struct Ranges<'a> {
    chunks: btree_map::Range<'a, u64, Arc<RoaringBitmap>>,
    open: Option<(u64, roaring::bitmap::Iter<'a>)>,
    held: Option<Range<u64>>,
    within: Range<u64>,
}

impl Ranges<'_> {
    /// The next run of one chunk, not yet joined with its neighbour.
    fn piece(&mut self) -> Option<Range<u64>> {
        loop {
            if let Some((base, bits)) = &mut self.open
                && let Some(run) = bits.next_range()
            {
                let run = *base + u64::from(*run.start())..*base + u64::from(*run.end()) + 1;
                if run.start >= self.within.end {
                    return None;
                }
                return Some(run.start..run.end.min(self.within.end));
            }
            let (chunk, bits) = self.chunks.next()?;
            let base = chunk * CHUNK_GRAINS;
            let from = self.within.start.saturating_sub(base).min(CHUNK_GRAINS) as u32;
            self.open = Some((base, bits.range(from..)));
        }
    }
}

impl Iterator for Ranges<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let mut run = self.held.take().or_else(|| self.piece())?;
        while let Some(next) = self.piece() {
            if next.start != run.end {
                self.held = Some(next);
                break;
            }
            run.end = next.end;
        }
        Some(run)
    }
}

/// What happened to the grains of a volume in one epoch. See B1 and B2.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct EpochSets {
    /// Preserved with payload.
    pub data: GrainSet,
    /// Preserved as zero.
    pub zero: GrainSet,
    /// Changed, and nothing of this epoch is kept.
    pub changed: GrainSet,
}

impl EpochSets {
    /// Records that a range was preserved, as zero or with payload; what was preserved before stays.
    pub fn preserve(&mut self, range: Range<u64>, zero: bool) {
        let (set, other) = if zero {
            (&mut self.zero, &self.data)
        } else {
            (&mut self.data, &self.zero)
        };
        for mut part in other.gaps_in(range.clone()) {
            if planted(Bug::BitmapShort) && part.end - part.start > 1 {
                part.end -= 1;
            }
            set.insert_range(part);
        }
        self.changed.remove_range(range);
    }

    /// Records that a range changed; what was preserved stays so.
    pub fn change(&mut self, range: Range<u64>) {
        for part in self.data.gaps_in(range) {
            for part in self.zero.gaps_in(part) {
                self.changed.insert_range(part);
            }
        }
    }

    /// Records that exactly these grains of a range changed, or were preserved.
    pub fn replace_changed(&mut self, range: Range<u64>, touched: &GrainSet) {
        self.changed.remove_range(range.clone());
        for run in touched.ranges_in(range) {
            self.change(run);
        }
    }

    /// All grains of a chunk that anything happened to, in roaring's portable format.
    pub fn touched_bytes(&self, chunk: u64) -> Vec<u8> {
        let mut all = RoaringBitmap::new();
        for set in [&self.data, &self.zero, &self.changed] {
            if let Some(bits) = set.chunk(chunk) {
                all |= &*bits;
            }
        }
        all.optimize();
        let mut out = Vec::new();
        all.serialize_into(&mut out)
            .expect("writing to memory cannot fail");
        out
    }

    /// What was preserved in a range is gone, but did change.
    pub fn bury(&mut self, range: Range<u64>) {
        for set in [&mut self.data, &mut self.zero] {
            let runs: Vec<_> = set.ranges_in(range.clone()).collect();
            for run in runs {
                set.remove_range(run.clone());
                self.changed.insert_range(run);
            }
        }
    }

    /// Numbers of the chunks that hold anything.
    pub fn chunks(&self) -> impl Iterator<Item = u64> + '_ {
        [&self.data, &self.zero, &self.changed]
            .into_iter()
            .flat_map(|s| s.chunks.keys().copied())
    }

    /// One chunk of the three sets, shared, as sets of their own.
    #[must_use]
    pub fn part(&self, chunk: u64) -> EpochSets {
        let mut part = EpochSets::default();
        part.data.set_chunk(chunk, self.data.chunk(chunk));
        part.zero.set_chunk(chunk, self.zero.chunk(chunk));
        part.changed.set_chunk(chunk, self.changed.chunk(chunk));
        part
    }

    /// Whether nothing happened.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty() && self.zero.is_empty() && self.changed.is_empty()
    }
}

/// The key of a chunk of an epoch's sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkKey {
    /// Whose.
    pub volume: VolumeId,
    /// Of which epoch.
    pub epoch: Epoch,
    /// First grain divided by [`CHUNK_GRAINS`].
    pub chunk: u64,
}

impl ChunkKey {
    /// Numbers of the chunks a range of grains touches.
    pub fn touched(grains: Range<u64>) -> Range<u64> {
        grains.start / CHUNK_GRAINS..grains.end.div_ceil(CHUNK_GRAINS)
    }

    /// The grains of a chunk, as far as a volume can have them.
    pub fn grains(chunk: u64) -> Range<u64> {
        let start = chunk * CHUNK_GRAINS;
        start..(start + CHUNK_GRAINS).min(GRAINS_MAX)
    }

    /// The key as the index orders it.
    pub fn encode(self) -> Vec<u8> {
        put_key(SETS_NAMESPACE, self.volume.0, self.epoch.0, self.chunk)
    }

    /// Reads a key.
    ///
    /// # Errors
    /// `Damaged`.
    pub fn decode(key: &[u8]) -> Result<ChunkKey> {
        let (volume, epoch, chunk) = take_key(SETS_NAMESPACE, key)?;
        if chunk >= GRAINS_MAX / CHUNK_GRAINS || epoch > COUNTER_MAX {
            return Err(damaged("a chunk or epoch is out of range"));
        }
        Ok(ChunkKey {
            volume: VolumeId(volume),
            epoch: Epoch(epoch),
            chunk,
        })
    }
}

fn damaged(why: &str) -> Error {
    Error::new(
        Kind::Damaged,
        format!("changed-block sets of the extent map: {why}"),
    )
}

/// The value of one chunk of an epoch's sets; `None` if it is empty and the key has to go.
pub fn encode_chunk(key: ChunkKey, sets: &EpochSets) -> Option<Vec<u8>> {
    let mut out = vec![0; HEADER];
    out[0] = VERSION;
    for (i, set) in [&sets.data, &sets.zero, &sets.changed]
        .into_iter()
        .enumerate()
    {
        let Some(bits) = set.chunk(key.chunk) else {
            continue;
        };
        let mut bits = RoaringBitmap::clone(&bits);
        bits.optimize();
        let from = out.len();
        bits.serialize_into(&mut out)
            .expect("writing to memory cannot fail");
        let len = u32::try_from(out.len() - from).expect("a chunk is under 20 KiB");
        out[4 + 4 * i..8 + 4 * i].copy_from_slice(&len.to_le_bytes());
    }
    if out.len() == HEADER {
        return None;
    }
    let sum = checksum(&key.encode(), &out);
    out[CHECKSUM_AT..HEADER].copy_from_slice(&sum.to_le_bytes());
    Some(out)
}

/// Reads one chunk into the sets of its epoch.
///
/// # Errors
/// `Damaged`: checksum, version, or anything an encoder does not write.
pub fn decode_chunk(key: ChunkKey, value: &[u8], into: &mut EpochSets) -> Result<()> {
    if value.len() < HEADER {
        return Err(damaged("too short"));
    }
    let (head, mut rest) = value.split_at(HEADER);
    let stored = u64::from_le_bytes(head[CHECKSUM_AT..].try_into().expect("eight bytes"));
    let mut plain = value.to_vec();
    plain[CHECKSUM_AT..HEADER].fill(0);
    if checksum(&key.encode(), &plain) != stored {
        return Err(damaged("checksum mismatch"));
    }
    if head[..4] != [VERSION, 0, 0, 0] {
        return Err(damaged("unknown version"));
    }
    let mut parts = [None, None, None];
    for (i, part) in parts.iter_mut().enumerate() {
        let len = u32::from_le_bytes(head[4 + 4 * i..8 + 4 * i].try_into().expect("four bytes"));
        let Some((bits, tail)) = rest.split_at_checked(len as usize) else {
            return Err(damaged("a length is out of range"));
        };
        rest = tail;
        if !bits.is_empty() {
            *part = Some(decode_bits(bits)?);
        }
    }
    let disjoint = |a: &Option<RoaringBitmap>, b: &Option<RoaringBitmap>| match (a, b) {
        (Some(a), Some(b)) => a.is_disjoint(b),
        _ => true,
    };
    let [data, zero, changed] = &parts;
    let apart = disjoint(data, zero) && disjoint(data, changed) && disjoint(zero, changed);
    if parts.iter().all(Option::is_none) {
        return Err(damaged("a chunk without grains"));
    }
    if !rest.is_empty() || !apart {
        return Err(damaged("its sets overlap or end early"));
    }
    let [data, zero, changed] = parts.map(|bits| bits.map(Arc::new));
    into.data.set_chunk(key.chunk, data);
    into.zero.set_chunk(key.chunk, zero);
    into.changed.set_chunk(key.chunk, changed);
    Ok(())
}

fn decode_bits(mut bytes: &[u8]) -> Result<RoaringBitmap> {
    let bits = RoaringBitmap::deserialize_from(&mut bytes)
        .map_err(|e| Error::with_source(Kind::Damaged, "sets of the extent map", e))?;
    match bits.max() {
        Some(max) if u64::from(max) < CHUNK_GRAINS && bytes.is_empty() => Ok(bits),
        _ => Err(damaged("a bitmap is empty or out of range")),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::map::tests::Random;

    #[test]
    fn the_bits_of_a_chunk_survive_as_bytes() {
        let mut sets = EpochSets::default();
        let base = 3 * CHUNK_GRAINS;
        sets.preserve(base..base + 5, false);
        sets.preserve(base + 9..base + 70_000, true);
        sets.change(base + CHUNK_GRAINS - 1..base + CHUNK_GRAINS + 4);
        let bytes = sets.touched_bytes(3);
        let read = GrainSet::from_chunk_bytes(base, &bytes).unwrap();
        let runs = [
            base..base + 5,
            base + 9..base + 70_000,
            base + CHUNK_GRAINS - 1..base + CHUNK_GRAINS,
        ];
        assert_eq!(read, runs.into_iter().collect());
        let empty = EpochSets::default().touched_bytes(3);
        let none = GrainSet::from_chunk_bytes(base, &empty).unwrap();
        assert!(none.is_empty());
        assert_eq!(GrainSet::from_chunk_bytes(base + 1, &bytes), None);
        for cut in 0..bytes.len() {
            assert_eq!(
                GrainSet::from_chunk_bytes(base, &bytes[..cut]),
                None,
                "{cut}"
            );
        }
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(GrainSet::from_chunk_bytes(base, &longer), None);
        let mut far = Vec::new();
        let bits = RoaringBitmap::from([CHUNK_GRAINS as u32]);
        bits.serialize_into(&mut far).unwrap();
        assert_eq!(
            GrainSet::from_chunk_bytes(base, &far),
            None,
            "out of the chunk"
        );
    }

    #[test]
    fn a_complete_bitmap_replaces_what_changed_and_leaves_what_is_kept() {
        let mut sets = EpochSets::default();
        sets.preserve(10..20, false);
        sets.preserve(30..40, true);
        sets.change(0..100);
        sets.change(CHUNK_GRAINS..CHUNK_GRAINS + 9);
        let exact: GrainSet = [5..6, 10..20, 50..52].into_iter().collect();
        sets.replace_changed(0..CHUNK_GRAINS, &exact);
        let changed = [5..6, 50..52, CHUNK_GRAINS..CHUNK_GRAINS + 9];
        assert_eq!(sets.changed, changed.into_iter().collect());
        assert_eq!(sets.data, std::iter::once(10..20).collect());
        assert_eq!(sets.zero, std::iter::once(30..40).collect());
    }

    /// Ranges around the ends of containers and chunks, and some that span several.
    fn random_range(random: &mut Random) -> Range<u64> {
        let start = random.below(6) * (1 << 16) + random.below(40) * 3;
        let len = match random.below(8) {
            0 => 1 << 16,
            1 => (1 << 17) + random.below(9),
            _ => random.below(30),
        };
        start..start + len
    }

    fn runs_of(grains: &BTreeSet<u64>) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for &grain in grains {
            match runs.last_mut() {
                Some(run) if run.end == grain => run.end += 1,
                _ => runs.push(grain..grain + 1),
            }
        }
        runs
    }

    #[test]
    fn a_set_behaves_like_a_set() {
        let mut random = Random(4);
        for _ in 0..20 {
            let (mut a, mut model) = (GrainSet::new(), BTreeSet::new());
            let (mut b, mut other) = (GrainSet::new(), BTreeSet::new());
            for _ in 0..12 {
                let range = random_range(&mut random);
                match random.below(4) {
                    0 => {
                        a.remove_range(range.clone());
                        model.retain(|grain| !range.contains(grain));
                    }
                    1 => {
                        b.insert_range(range.clone());
                        other.extend(range);
                    }
                    _ => {
                        a.insert_range(range.clone());
                        model.extend(range);
                    }
                }
            }
            assert_eq!(a.len(), model.len() as u64);
            assert_eq!(a.is_empty(), model.is_empty());
            assert_eq!(a.ranges().collect::<Vec<_>>(), runs_of(&model));
            assert_eq!(a, runs_of(&model).into_iter().collect());
            assert_eq!(
                a.intersection_len(&b),
                model.intersection(&other).count() as u64
            );
            let both = model.union(&other).copied().collect();
            assert_eq!(a.union(&b).ranges().collect::<Vec<_>>(), runs_of(&both));
            for _ in 0..20 {
                let range = random_range(&mut random);
                let inside: BTreeSet<u64> = model.range(range.clone()).copied().collect();
                let outside = range
                    .clone()
                    .filter(|grain| !model.contains(grain))
                    .collect();
                assert_eq!(
                    a.ranges_in(range.clone()).collect::<Vec<_>>(),
                    runs_of(&inside)
                );
                assert_eq!(
                    a.gaps_in(range.clone()).collect::<Vec<_>>(),
                    runs_of(&outside)
                );
                assert_eq!(a.contains_range(range.clone()), outside.is_empty());
                assert_eq!(a.intersects_range(range.clone()), !inside.is_empty());
                assert_eq!(a.contains(range.start), model.contains(&range.start));
            }
        }
    }

    #[test]
    fn a_clone_does_not_see_later_changes() {
        let mut set: GrainSet = std::iter::once(0..CHUNK_GRAINS * 3).collect();
        let before = set.clone();
        set.remove_range(5..CHUNK_GRAINS + 5);
        set.insert_range(CHUNK_GRAINS * 9..CHUNK_GRAINS * 9 + 1);
        assert_eq!(before.len(), CHUNK_GRAINS * 3);
    }

    const KEY: ChunkKey = ChunkKey {
        volume: VolumeId(1),
        epoch: Epoch(2),
        chunk: 3,
    };

    /// The worst case: every second grain of one kind, so that nothing is a run.
    fn worst() -> EpochSets {
        let mut sets = EpochSets::default();
        let base = KEY.chunk * CHUNK_GRAINS;
        for grain in (base..base + CHUNK_GRAINS).step_by(3) {
            sets.preserve(grain..grain + 1, false);
            sets.preserve(grain + 1..grain + 2, true);
            sets.change(grain + 2..grain + 3);
        }
        sets
    }

    #[test]
    fn the_largest_chunk_fits_and_comes_back() {
        let sets = worst();
        let value = encode_chunk(KEY, &sets.part(3)).unwrap();
        assert!(value.len() < 52_000, "{}", value.len());
        let mut read = EpochSets::default();
        decode_chunk(KEY, &value, &mut read).unwrap();
        assert_eq!(read, sets.part(3));
        assert_eq!(ChunkKey::decode(&KEY.encode()).unwrap(), KEY);
        assert!(encode_chunk(KEY, &EpochSets::default()).is_none());
    }

    #[test]
    fn the_sets_of_an_epoch_stay_apart() {
        let mut sets = EpochSets::default();
        sets.change(0..10);
        sets.preserve(2..4, true);
        sets.preserve(3..6, false);
        sets.change(0..20);
        let runs = |set: &GrainSet| set.ranges().collect::<Vec<_>>();
        let single = |run: Range<u64>| Vec::from([run]);
        assert_eq!(
            (runs(&sets.zero), runs(&sets.data)),
            (single(2..4), single(4..6))
        );
        assert_eq!(runs(&sets.changed), [0..2, 6..20]);
        sets.bury(3..5);
        assert_eq!(
            (runs(&sets.zero), runs(&sets.data)),
            (single(2..3), single(5..6))
        );
        assert_eq!(runs(&sets.changed), [0..2, 3..5, 6..20]);
    }

    /// Keys and values with right checksums that no writer makes.
    #[test]
    fn what_no_writer_makes_is_damaged() {
        use crate::map::keys::PageKey;
        let key = |epoch, chunk| ChunkKey {
            volume: VolumeId(1),
            epoch: Epoch(epoch),
            chunk,
        };
        let last = GRAINS_MAX / CHUNK_GRAINS - 1;
        let good = key(COUNTER_MAX, last);
        assert_eq!(ChunkKey::decode(&good.encode()).unwrap(), good);
        assert!(ChunkKey::decode(&key(COUNTER_MAX + 1, 0).encode()).is_err());
        assert!(ChunkKey::decode(&key(1, last + 1).encode()).is_err());
        let page = |epoch| PageKey {
            volume: VolumeId(1),
            region: 0,
            epoch: Epoch(epoch),
        };
        assert!(PageKey::decode(&page(COUNTER_MAX).encode()).is_ok());
        assert!(PageKey::decode(&page(u64::MAX).encode()).is_err());
        // A chunk of nothing.
        let mut empty = vec![0; HEADER];
        empty[0] = VERSION;
        let sum = checksum(&good.encode(), &empty);
        empty[CHECKSUM_AT..HEADER].copy_from_slice(&sum.to_le_bytes());
        assert!(decode_chunk(good, &empty, &mut EpochSets::default()).is_err());
    }

    #[test]
    fn damage_is_noticed_and_never_a_panic() {
        let mut random = Random(5);
        let mut few = EpochSets::default();
        few.preserve(
            KEY.chunk * CHUNK_GRAINS..KEY.chunk * CHUNK_GRAINS + 70_000,
            false,
        );
        few.change((KEY.chunk + 1) * CHUNK_GRAINS - 9..(KEY.chunk + 1) * CHUNK_GRAINS);
        for sets in [few, worst()] {
            let value = encode_chunk(KEY, &sets).unwrap();
            for _ in 0..400 {
                let mut bad = value.clone();
                match random.below(8) {
                    0 => bad.truncate(random.below(value.len() as u64) as usize),
                    _ => {
                        let near = if random.below(2) == 0 {
                            64
                        } else {
                            value.len() as u64
                        };
                        let at = random.below(near.min(value.len() as u64)) as usize;
                        bad[at] ^= 1 << random.below(8);
                    }
                }
                let mut into = EpochSets::default();
                assert!(decode_chunk(KEY, &bad, &mut into).is_err());
                if bad.len() >= HEADER {
                    bad[CHECKSUM_AT..HEADER].fill(0);
                    let sum = checksum(&KEY.encode(), &bad);
                    bad[CHECKSUM_AT..HEADER].copy_from_slice(&sum.to_le_bytes());
                    if decode_chunk(KEY, &bad, &mut into).is_ok() {
                        assert_eq!(into.data.intersection_len(&into.zero), 0);
                    }
                }
            }
        }
    }
}
