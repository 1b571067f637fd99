//! [`ExtentMap`]: the public face of the map layer.
//!
//! Records come in by [`ExtentMap::publish`] once they are durable in the log, are answered from
//! memory at once, and reach the index at the next [`ExtentMap::checkpoint`]. All methods may be
//! called from any thread; those that write to the index (`checkpoint`, `sweep`, `live_segments`,
//! `forget_volume`) wait for each other. Invariants M1 to M5 stand in [`crate::map`].
//!
//! After an error of `checkpoint` nothing is lost: it is answered from memory and merged again next
//! time. After an error of kind `Damaged` from any method the caller sets the index aside and rebuilds.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use crate::error::{Error, Kind, Result};
use crate::map::bitmaps::{ChunkKey, EpochSets, GrainSet, SETS_NAMESPACE, decode_chunk};
use crate::map::index::Index;
use crate::map::keys::{GRAINS_MAX, PAGE_NAMESPACE, PageKey, checksum, volume_keys};
use crate::map::page::{Content, Page};
use crate::map::state::{BaseCache, State};
use crate::sys::planted::{Bug, planted};
use crate::units::{BLOCK, Epoch, GRAIN_MAX, Lsn, Place, Uuid, VolumeId};

/// One record of the log: what happened to a run of grains in an epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    /// Whose.
    pub volume: VolumeId,
    /// In which epoch.
    pub epoch: Epoch,
    /// First grain.
    pub start: u64,
    /// Grains.
    pub count: u32,
    /// Log blocks of a grain; the same for all records of a volume.
    pub grain_blocks: u32,
    /// Segment of the batch that holds the record; for data the same as in its place.
    pub segment: u32,
    /// What happened.
    pub kind: Published,
}

/// What happened to the grains of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Published {
    /// Preserved with payload.
    Data {
        /// Of the first grain; the others follow in the same segment.
        place: Place,
        /// One checksum a grain.
        sums: Vec<u64>,
    },
    /// Preserved as zero.
    Zero,
    /// Changed without being preserved.
    Changed,
    /// Of the grains of one chunk, those that changed or were preserved.
    Bits {
        /// Which.
        bits: GrainSet,
        /// Every record of the epoch came before: what else was taken for changed was not.
        complete: bool,
    },
}

/// A part of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Which grains.
    pub grains: Range<u64>,
    /// Where they are.
    pub kind: RunKind,
}

/// Where the grains of a run are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunKind {
    /// Nothing was preserved: in the source.
    Source,
    /// They are zero.
    Zero,
    /// In the log.
    Preserved {
        /// Of the first grain; the others follow in the same segment.
        place: Place,
        /// One checksum a grain.
        sums: Vec<u64>,
    },
}

/// Up to where in which log the index covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Applied {
    /// Store of the log.
    pub store: Uuid,
    /// The last batch covered.
    pub lsn: Lsn,
    /// Segment in which a replay starts.
    pub segment: u32,
    /// Byte offset in that segment at which a replay starts.
    pub offset: u64,
}

/// A region of the index.
pub struct Region {
    /// Whose.
    pub volume: VolumeId,
    /// Its number.
    pub region: u64,
    /// What each epoch preserved of it, by epoch.
    pub pages: Vec<(Epoch, Page)>,
}

/// What a sweep saw and did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Swept {
    /// Grains with payload that went.
    pub data_freed: u64,
    /// Grains preserved as zero that went.
    pub zero_freed: u64,
    /// Grains with payload that stay.
    pub data_live: u64,
    /// Grains preserved as zero that stay.
    pub zero_live: u64,
}

/// See the head of the file.
pub struct ExtentMap {
    /// Changes only in [`ExtentMap::adopt`], under `writer` and `state`.
    index: RwLock<Arc<dyn Index>>,
    /// Held by whoever writes to the index; before `state`.
    pub(super) writer: Mutex<()>,
    /// Never held while the index is used.
    state: Mutex<State>,
    /// Grows with every publish of preserved grains.
    counts: RwLock<BTreeMap<VolumeId, AtomicU64>>,
}

/// Pairs taken from the index at a time when all of a namespace is walked.
pub(super) const SCAN: usize = 16;

const APPLIED_KEY: &[u8] = b"A";
const APPLIED_VERSION: u8 = 1;
const APPLIED_LEN: usize = 48;

/// Walks all pairs of a key range, a few at a time.
pub(super) fn walk(
    index: &dyn Index,
    mut from: Vec<u8>,
    to: &[u8],
    mut visit: impl FnMut(Vec<u8>, Vec<u8>) -> Result<()>,
) -> Result<()> {
    loop {
        let pairs = index.scan(&from, to, SCAN)?;
        let more = pairs.len() == SCAN;
        for (key, value) in pairs {
            // The smallest key after this one.
            from = key.clone();
            from.push(0);
            visit(key, value)?;
        }
        if !more {
            return Ok(());
        }
    }
}

pub(super) fn encode_applied(applied: &Applied) -> (Vec<u8>, Vec<u8>) {
    let mut out = vec![APPLIED_VERSION, 0, 0, 0];
    out.extend_from_slice(&applied.segment.to_le_bytes());
    out.extend_from_slice(&applied.store.0);
    out.extend_from_slice(&applied.lsn.0.to_le_bytes());
    out.extend_from_slice(&applied.offset.to_le_bytes());
    let sum = checksum(APPLIED_KEY, &out);
    out.extend_from_slice(&sum.to_le_bytes());
    (APPLIED_KEY.to_vec(), out)
}

fn decode_applied(value: &[u8]) -> Result<Applied> {
    let bad = || {
        Error::new(
            Kind::Damaged,
            "the extent map's position in the log is damaged",
        )
    };
    let value: &[u8; APPLIED_LEN] = value.try_into().map_err(|_| bad())?;
    let u64_at = |at: usize| u64::from_le_bytes(value[at..at + 8].try_into().expect("eight bytes"));
    if checksum(APPLIED_KEY, &value[..40]) != u64_at(40) || value[..4] != [APPLIED_VERSION, 0, 0, 0]
    {
        return Err(bad());
    }
    Ok(Applied {
        store: Uuid(value[8..24].try_into().expect("sixteen bytes")),
        lsn: Lsn(u64_at(24)),
        segment: u32::from_le_bytes(value[4..8].try_into().expect("four bytes")),
        offset: u64_at(32),
    })
}

impl ExtentMap {
    /// Opens the map over an index: loads its position and all sets. Pages are checked when used.
    /// The caller compares [`ExtentMap::applied`] with its log, replays from there, and only then
    /// asks for plans.
    ///
    /// # Errors
    /// `Damaged` on any doubt; `Io`.
    pub fn open(index: Arc<dyn Index>, cache_bytes: usize) -> Result<ExtentMap> {
        let applied = match index.get(APPLIED_KEY)? {
            Some(value) => Some(decode_applied(&value)?),
            None => None,
        };
        let mut sets: BTreeMap<(VolumeId, Epoch), EpochSets> = BTreeMap::new();
        let mut covered: BTreeMap<VolumeId, Epoch> = BTreeMap::new();
        walk(
            &*index,
            vec![SETS_NAMESPACE],
            &[SETS_NAMESPACE + 1],
            |key, value| {
                let key = ChunkKey::decode(&key)?;
                covered.insert(key.volume, key.epoch);
                decode_chunk(
                    key,
                    &value,
                    sets.entry((key.volume, key.epoch)).or_default(),
                )
            },
        )?;
        let state = State {
            generation: 0,
            delta: BTreeMap::new(),
            frozen: Arc::default(),
            delta_bytes: 0,
            sets,
            dirty: BTreeSet::new(),
            covered,
            applied,
            cache: BaseCache::new(cache_bytes),
        };
        Ok(ExtentMap {
            index: RwLock::new(index),
            writer: Mutex::new(()),
            state: Mutex::new(state),
            counts: RwLock::default(),
        })
    }

    pub(super) fn index(&self) -> Arc<dyn Index> {
        let index = self.index.read();
        Arc::clone(&*index.expect("no code panics while it holds the index"))
    }

    /// Takes another index into use, which `made` has filled and checkpointed from the log up to at
    /// least [`ExtentMap::applied`]: what was in the old one is looked for there from now on. What was
    /// published since the last checkpoint stays in memory, and so do the sets, which are as good as
    /// ever. `make` runs while no checkpoint or sweep does.
    ///
    /// # Errors
    /// What `make` returns: then nothing has changed.
    pub fn adopt(&self, make: impl FnOnce() -> Result<ExtentMap>) -> Result<()> {
        let _writer = self.lock_writer();
        let made = make()?;
        let mut fresh = made.lock();
        let mut state = self.lock();
        *self
            .index
            .write()
            .expect("no code panics while it holds the index") = made.index();
        state.applied = fresh.applied;
        // Whoever read the old one looks again.
        state.generation += 1;
        state.cache.clear();
        for sets in [&std::mem::take(&mut fresh.sets), &state.sets.clone()] {
            for ((volume, epoch), sets) in sets {
                let chunks: BTreeSet<u64> = sets.chunks().collect();
                state.dirty.extend(chunks.into_iter().map(|chunk| ChunkKey {
                    volume: *volume,
                    epoch: *epoch,
                    chunk,
                }));
            }
        }
        Ok(())
    }

    /// Takes an empty index into use, with all that the old one has, durably. What was published since
    /// the last checkpoint stays in memory. No checkpoint or sweep runs meanwhile; readers do.
    ///
    /// # Errors
    /// Those of `make` and of the index it made: then nothing has changed but that one.
    pub fn move_to(&self, make: impl FnOnce() -> Result<Arc<dyn Index>>) -> Result<()> {
        let _writer = self.lock_writer();
        let (old, fresh) = (self.index(), make()?);
        let mut some = Vec::new();
        // The namespaces of the map are capital letters.
        walk(old.as_ref(), vec![b'A'], &[b'Z' + 1], |key, value| {
            some.push((key, Some(value)));
            match some.len() < SCAN {
                true => Ok(()),
                false => fresh.apply(std::mem::take(&mut some)),
            }
        })?;
        fresh.apply(some)?;
        fresh.checkpoint()?;
        let mut state = self.lock();
        *self
            .index
            .write()
            .expect("no code panics while it holds the index") = fresh;
        // Whoever read the old one looks again.
        state.generation += 1;
        Ok(())
    }

    /// Bytes of keys and values in the index.
    ///
    /// # Errors
    /// Those of the index.
    pub fn indexed_bytes(&self) -> Result<u64> {
        let mut bytes = 0;
        walk(
            self.index().as_ref(),
            vec![b'A'],
            &[b'Z' + 1],
            |key, value| {
                bytes += (key.len() + value.len()) as u64;
                Ok(())
            },
        )?;
        Ok(bytes)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("no code panics while it holds the map's state")
    }

    pub(super) fn lock_writer(&self) -> MutexGuard<'_, ()> {
        self.writer
            .lock()
            .expect("no code panics while it writes to the index")
    }

    /// Up to where the index covers the log; `None` if it never did.
    pub fn applied(&self) -> Option<Applied> {
        self.lock().applied
    }

    /// Takes in records that are durable in the log, in the order of the log. Memory only; records
    /// may come again (M1).
    ///
    /// # Panics
    /// If a record contradicts itself: number of checksums, segment, grain size, range.
    pub fn publish(&self, records: Vec<Publish>) {
        for record in &records {
            record.assert_sound();
        }
        let mut state = self.lock();
        for record in &records {
            if record.count > 0 {
                state.publish(record);
            }
        }
        drop(state);
        for record in &records {
            if matches!(record.kind, Published::Data { .. } | Published::Zero) {
                self.count(record.volume, |n| n.fetch_add(1, Ordering::SeqCst));
            }
        }
    }

    /// Grows with every publish of preserved grains of the volume: who planned, read the source and
    /// finds it moved has to look again.
    pub fn publish_count(&self, volume: VolumeId) -> u64 {
        self.count(volume, |n| n.load(Ordering::SeqCst))
    }

    fn count(&self, volume: VolumeId, with: impl Fn(&AtomicU64) -> u64) -> u64 {
        const WHY: &str = "no code panics while it holds the counters";
        if let Some(n) = self.counts.read().expect(WHY).get(&volume) {
            return with(n);
        }
        with(self.counts.write().expect(WHY).entry(volume).or_default())
    }

    /// What was preserved in this epoch or later.
    pub fn preserved_since(&self, volume: VolumeId, epoch: Epoch) -> GrainSet {
        let sets = self.sets_of(volume, epoch..Epoch(u64::MAX));
        union(sets.iter().flat_map(|(_, sets)| [&sets.data, &sets.zero]))
    }

    /// What changed in the epochs `from <= e < to`, to the newest if there is no `to`. A superset of
    /// what differs.
    pub fn changed_between(&self, volume: VolumeId, from: Epoch, to: Option<Epoch>) -> GrainSet {
        let from = match planted(Bug::DiffShort) {
            true => Epoch(from.0 + 1),
            false => from,
        };
        let sets = self.sets_of(volume, from..to.unwrap_or(Epoch(u64::MAX)).max(from));
        union(
            sets.iter()
                .flat_map(|(_, sets)| [&sets.data, &sets.zero, &sets.changed]),
        )
    }

    /// Grains whose payload only this snapshot needs, given its live neighbours.
    pub fn unique_grains(
        &self,
        volume: VolumeId,
        prev: Option<Epoch>,
        snapshot: Epoch,
        next: Option<Epoch>,
    ) -> u64 {
        let own = self.sets_of(volume, snapshot..next.unwrap_or(Epoch(u64::MAX)));
        let own = union(own.iter().map(|(_, sets)| &sets.data));
        let Some(prev) = prev else {
            return own.len();
        };
        let before = self.sets_of(volume, prev..snapshot);
        let before = union(before.iter().flat_map(|(_, sets)| [&sets.data, &sets.zero]));
        own.intersection_len(&before)
    }

    /// The epochs of a volume that have sets, ascending.
    pub fn epochs(&self, volume: VolumeId) -> Vec<Epoch> {
        let state = self.lock();
        state
            .epochs(volume, Epoch(0)..Epoch(u64::MAX))
            .map(|(epoch, _)| epoch)
            .collect()
    }

    /// Whether anything is known of an epoch.
    pub fn has_sets(&self, volume: VolumeId, epoch: Epoch) -> bool {
        self.lock().sets.contains_key(&(volume, epoch))
    }

    /// The sets of some epochs; they share memory with the map's until one side changes.
    pub fn sets_of(&self, volume: VolumeId, epochs: Range<Epoch>) -> Vec<(Epoch, EpochSets)> {
        let state = self.lock();
        state
            .epochs(volume, epochs)
            .map(|(epoch, sets)| (epoch, sets.clone()))
            .collect()
    }

    /// Grains of a volume that were preserved with payload and not yet swept.
    pub fn data_grains(&self, volume: VolumeId) -> u64 {
        let state = self.lock();
        let all = Epoch(0)..Epoch(u64::MAX);
        state
            .epochs(volume, all)
            .map(|(_, sets)| sets.data.len())
            .sum()
    }

    /// The first grain at or after `grain` that was preserved at or after an epoch, also as zero.
    pub fn next_preserved(&self, volume: VolumeId, epoch: Epoch, grain: u64) -> Option<u64> {
        let state = self.lock();
        state
            .epochs(volume, epoch..Epoch(u64::MAX))
            .flat_map(|(_, sets)| [&sets.data, &sets.zero])
            .filter_map(|set| set.ranges_in(grain..u64::MAX).next().map(|r| r.start))
            .min()
    }

    /// The oldest of the epochs in which the grains of a range were last preserved; `None` if one of
    /// them never was.
    pub fn oldest_preserved(&self, volume: VolumeId, grains: Range<u64>) -> Option<Epoch> {
        let state = self.lock();
        let all: Vec<_> = state.epochs(volume, Epoch(0)..Epoch(u64::MAX)).collect();
        let mut left = vec![grains];
        for (epoch, sets) in all.into_iter().rev() {
            for set in [&sets.data, &sets.zero] {
                left = left
                    .into_iter()
                    .flat_map(|range| set.gaps_in(range))
                    .collect();
            }
            if left.is_empty() {
                return Some(epoch);
            }
        }
        None
    }

    /// Volumes that any record is known of.
    pub fn volumes(&self) -> BTreeSet<VolumeId> {
        self.lock().sets.keys().map(|(volume, _)| *volume).collect()
    }

    /// About the bytes of memory that the next checkpoint moves into the index.
    pub fn pending(&self) -> usize {
        const CHUNK: usize = 64;
        let state = self.lock();
        state.delta_bytes + state.dirty.len() * CHUNK
    }

    /// Segments that surviving records name, with the log blocks of payload that they name there; a
    /// segment that holds only zero records stands with 0. Segments behind [`ExtentMap::applied`],
    /// from the one it names on, are needed whether they stand here or not.
    ///
    /// # Errors
    /// `Damaged` or `Io`.
    pub fn live_segments(&self) -> Result<BTreeMap<u32, u64>> {
        let _writer = self.lock_writer();
        let mut segments = BTreeMap::new();
        walk(
            &*self.index(),
            vec![PAGE_NAMESPACE],
            &[PAGE_NAMESPACE + 1],
            |key, value| {
                add_segments(
                    &Page::decode(PageKey::decode(&key)?, &value)?,
                    &mut segments,
                );
                Ok(())
            },
        )?;
        let state = self.lock();
        for page in state.frozen.values().chain(state.delta.values()) {
            add_segments(page, &mut segments);
        }
        Ok(segments)
    }

    /// Visits every page of the index by ascending key, in canonical form. What was published since
    /// the last checkpoint is not there. For checks: compare two maps, or their payload.
    ///
    /// # Errors
    /// `Damaged`, `Io`, or what `visit` returns.
    pub fn for_each_page(&self, visit: &mut dyn FnMut(PageKey, &Page) -> Result<()>) -> Result<()> {
        walk(
            &*self.index(),
            vec![PAGE_NAMESPACE],
            &[PAGE_NAMESPACE + 1],
            |key, value| {
                let key = PageKey::decode(&key)?;
                visit(key, &Page::decode(key, &value)?)
            },
        )
    }

    /// One page of the index, as [`ExtentMap::for_each_page`] would show it.
    ///
    /// # Errors
    /// `Damaged` or `Io`.
    pub fn page_at(&self, key: PageKey) -> Result<Option<Page>> {
        match self.index().get(&key.encode())? {
            Some(value) => Page::decode(key, &value).map(Some),
            None => Ok(None),
        }
    }

    /// The first region at or after one that has pages in the index, with all of them by epoch.
    ///
    /// # Errors
    /// `Damaged` or `Io`.
    pub fn region_from(&self, volume: VolumeId, region: u64) -> Result<Option<Region>> {
        let epoch = Epoch(0);
        let from = PageKey {
            volume,
            region,
            epoch,
        };
        let first = self
            .index()
            .scan(&from.encode(), &[PAGE_NAMESPACE + 1], 1)?
            .into_iter()
            .next();
        let Some((key, _)) = first else {
            return Ok(None);
        };
        let key = PageKey::decode(&key)?;
        let all = PageKey { epoch, ..key };
        let mut end = PageKey {
            epoch: Epoch(u64::MAX),
            ..key
        }
        .encode();
        end.push(0);
        let mut pages = Vec::new();
        walk(&*self.index(), all.encode(), &end, |key, value| {
            let key = PageKey::decode(&key)?;
            pages.push((key.epoch, Page::decode(key, &value)?));
            Ok(())
        })?;
        Ok(Some(Region {
            volume: key.volume,
            region: key.region,
            pages,
        }))
    }

    /// Reads all sets of the index again; what is in use is in memory, and was good when it was read.
    ///
    /// # Errors
    /// `Damaged` if one of them, or the position, is not what was written; `Io`.
    pub fn check_sets(&self) -> Result<()> {
        let index = self.index();
        if let Some(applied) = index.get(APPLIED_KEY)? {
            decode_applied(&applied)?;
        }
        walk(
            &*index,
            vec![SETS_NAMESPACE],
            &[SETS_NAMESPACE + 1],
            |key, value| {
                let key = ChunkKey::decode(&key)?;
                decode_chunk(key, &value, &mut EpochSets::default())
            },
        )
    }

    /// What the index holds at this moment, in memory. The caller keeps checkpoints and sweeps away.
    ///
    /// # Errors
    /// `Damaged` or `Io`.
    pub fn copy_of_index(&self) -> Result<crate::map::transient::TransientIndex> {
        crate::map::transient::TransientIndex::copy_of(&*self.index())
    }

    /// Forgets everything of a volume that is gone. A replay may bring records back; then it is to be
    /// called again.
    ///
    /// # Errors
    /// `Io` or `NoSpace`: some may still be there; call again.
    pub fn forget_volume(&self, volume: VolumeId) -> Result<()> {
        let _writer = self.lock_writer();
        let mut state = self.lock();
        state.generation += 1;
        let pages: Vec<PageKey> = state
            .delta
            .keys()
            .filter(|key| key.volume == volume)
            .copied()
            .collect();
        for key in pages {
            let gone = state.delta.remove(&key);
            state.delta_bytes -= gone.map_or(0, |page| page.memory());
        }
        state.sets.retain(|(owner, _), _| *owner != volume);
        state.dirty.retain(|key| key.volume != volume);
        state.cache.drop_volume(volume);
        drop(state);
        for namespace in [PAGE_NAMESPACE, SETS_NAMESPACE] {
            let (from, to) = volume_keys(namespace, volume);
            loop {
                let pairs = self.index().scan(&from, &to, SCAN)?;
                if pairs.is_empty() {
                    break;
                }
                self.index()
                    .apply(pairs.into_iter().map(|(key, _)| (key, None)).collect())?;
            }
        }
        Ok(())
    }
}

fn union<'a>(sets: impl Iterator<Item = &'a GrainSet>) -> GrainSet {
    let mut all = GrainSet::new();
    for set in sets {
        all.union_with(set);
    }
    all
}

fn add_segments(page: &Page, segments: &mut BTreeMap<u32, u64>) {
    for extent in page.extents() {
        let (segment, blocks) = match extent.content {
            Content::Zero { segment } => (segment, 0),
            Content::Data { place, .. } => (
                place.segment,
                u64::from(extent.count) * u64::from(page.grain_blocks()),
            ),
        };
        *segments.entry(segment).or_default() += blocks;
    }
}

impl Publish {
    /// What a caller that is in order never gets wrong; checked before anything changes.
    fn assert_sound(&self) {
        let end = self.start.checked_add(u64::from(self.count));
        assert!(
            end.is_some_and(|end| end <= GRAINS_MAX),
            "a record beyond the largest volume"
        );
        let blocks = u64::from(self.grain_blocks);
        assert!(
            blocks.is_power_of_two() && blocks <= u64::from(GRAIN_MAX) / BLOCK,
            "a grain of {blocks} blocks"
        );
        if let Published::Data { place, sums } = &self.kind {
            assert_eq!(sums.len(), self.count as usize, "one checksum a grain");
            assert_eq!(place.segment, self.segment, "payload lies with its record");
            let end = u64::from(place.block) + blocks * u64::from(self.count);
            assert!(
                end <= u64::from(u32::MAX),
                "payload beyond the largest segment"
            );
        }
    }
}
