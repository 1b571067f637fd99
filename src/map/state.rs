//! What the extent map holds in memory, and the questions that need nothing else.
//!
//! Everything here is guarded by the one `state` lock of [`ExtentMap`](crate::map::extents::ExtentMap)
//! and does no I/O.
//!
//! - **S1** A record that was published is in `delta`, in `frozen`, or in the index.
//! - **S2** `generation` moves when records leave `frozen`; whoever read the index without the lock
//!   looks again if it moved meanwhile.
//! - **S3** The cache holds what the index held when its generation began, or later.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use crate::map::bitmaps::{ChunkKey, EpochSets};
use crate::map::extents::{Applied, Publish, Published};
use crate::map::keys::PageKey;
use crate::map::mask::RegionMask;
use crate::map::page::{Extent, New, Page};
use crate::units::{Epoch, REGION_GRAINS, VolumeId};

/// Pages by key.
pub(super) type Pages = BTreeMap<PageKey, Page>;

/// See the head of the file.
pub(super) struct State {
    /// See S2.
    pub generation: u64,
    /// Published since the last checkpoint began.
    pub delta: Pages,
    /// What a running checkpoint merges into the index.
    pub frozen: Arc<Pages>,
    /// About the bytes of `delta`.
    pub delta_bytes: usize,
    /// Of every epoch that has any.
    pub sets: BTreeMap<(VolumeId, Epoch), EpochSets>,
    /// Chunks of `sets` that differ from the index.
    pub dirty: BTreeSet<ChunkKey>,
    /// Newest epoch that had sets when the last checkpoint began.
    pub covered: BTreeMap<VolumeId, Epoch>,
    /// What the index covers.
    pub applied: Option<Applied>,
    /// Resolved regions of the index.
    pub cache: BaseCache,
}

/// The part of a range of grains in each region: (region, grains relative to it).
pub(super) fn regions(grains: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut at = grains.start;
    std::iter::from_fn(move || {
        if at >= grains.end {
            return None;
        }
        let region = at / REGION_GRAINS;
        let base = region * REGION_GRAINS;
        let end = grains.end.min(base + REGION_GRAINS);
        let part = (at - base) as usize..(end - base) as usize;
        at = end;
        Some((region, part))
    })
}

impl State {
    /// Takes in one record.
    pub fn publish(&mut self, record: &Publish) {
        let grains = record.start..record.start + u64::from(record.count);
        let sets = self.sets.entry((record.volume, record.epoch)).or_default();
        match &record.kind {
            Published::Changed => sets.change(grains.clone()),
            Published::Bits { bits, complete } => {
                if *complete {
                    sets.replace_changed(grains.clone(), bits);
                } else {
                    bits.ranges_in(grains.clone())
                        .for_each(|run| sets.change(run));
                }
            }
            Published::Zero => sets.preserve(grains.clone(), true),
            Published::Data { .. } => sets.preserve(grains.clone(), false),
        }
        self.mark_dirty(record.volume, record.epoch, grains.clone());
        for (region, part) in regions(grains) {
            let new = match &record.kind {
                Published::Changed | Published::Bits { .. } => return,
                Published::Zero => New::Zero(record.segment),
                Published::Data { place, sums } => {
                    let skip = (region * REGION_GRAINS + part.start as u64 - record.start) as usize;
                    let blocks = skip as u64 * u64::from(record.grain_blocks);
                    New::Data(place.advance(blocks), &sums[skip..skip + part.len()])
                }
            };
            let key = PageKey {
                volume: record.volume,
                region,
                epoch: record.epoch,
            };
            let page = self
                .delta
                .entry(key)
                .or_insert_with(|| Page::new(record.grain_blocks));
            let before = if page.is_empty() { 0 } else { page.memory() };
            page.insert(part, new);
            // Two extents may have become one, so it may shrink.
            self.delta_bytes = self.delta_bytes + page.memory() - before;
        }
    }

    /// Notes that the sets of an epoch differ from the index in a range.
    pub fn mark_dirty(&mut self, volume: VolumeId, epoch: Epoch, grains: Range<u64>) {
        for chunk in ChunkKey::touched(grains) {
            self.dirty.insert(ChunkKey {
                volume,
                epoch,
                chunk,
            });
        }
    }

    /// The sets of a volume's epochs in a range.
    pub fn epochs(
        &self,
        volume: VolumeId,
        epochs: Range<Epoch>,
    ) -> impl Iterator<Item = (Epoch, &EpochSets)> {
        let last = epochs.end.max(epochs.start);
        let range = (volume, epochs.start)..(volume, last);
        self.sets
            .range(range)
            .map(|((_, epoch), sets)| (*epoch, sets))
    }

    /// Pages of a region that are not yet in the index, from an epoch on.
    pub fn unmerged(
        &self,
        volume: VolumeId,
        region: u64,
        from: Epoch,
    ) -> impl Iterator<Item = (Epoch, &Page)> {
        let first = PageKey {
            volume,
            region,
            epoch: from,
        };
        let last = PageKey {
            volume,
            region,
            epoch: Epoch(u64::MAX),
        };
        let frozen = self.frozen.range(first..=last);
        frozen
            .chain(self.delta.range(first..=last))
            .map(|(key, page)| (key.epoch, page))
    }

    /// Ends a checkpoint that succeeded: the index has all of `frozen`. Returns what was frozen, to
    /// be dropped without the lock.
    pub fn thaw(&mut self, applied: Applied) -> Arc<Pages> {
        self.generation += 1;
        self.applied = Some(applied);
        let frozen = std::mem::take(&mut self.frozen);
        let mut last = None;
        for key in frozen.keys() {
            if last != Some((key.volume, key.region)) {
                self.cache.drop_region(key.volume, key.region);
                last = Some((key.volume, key.region));
            }
        }
        frozen
    }

    /// Ends a checkpoint that failed: everything frozen waits for the next one.
    pub fn refreeze(&mut self, chunks: BTreeSet<ChunkKey>) {
        self.dirty.extend(chunks);
        let frozen = std::mem::take(&mut self.frozen);
        let mut pages = Arc::try_unwrap(frozen).unwrap_or_else(|shared| Pages::clone(&shared));
        for (key, later) in std::mem::take(&mut self.delta) {
            match pages.entry(key) {
                std::collections::btree_map::Entry::Vacant(free) => {
                    free.insert(later);
                }
                std::collections::btree_map::Entry::Occupied(mut page) => {
                    page.get_mut().merge(&later);
                }
            }
        }
        self.delta_bytes = pages.values().map(Page::memory).sum();
        self.delta = pages;
    }
}

/// A region of the index as one snapshot sees it: of each grain the record with the smallest epoch.
#[derive(Default)]
pub(super) struct Base {
    /// Sorted.
    extents: Vec<Extent>,
    /// Of each extent.
    epochs: Vec<Epoch>,
    sums: Vec<u64>,
    /// Of all pages; 0 if there are none.
    pub grain_blocks: u32,
}

impl Base {
    /// Resolves pages, given by ascending epoch.
    pub fn resolve(pages: &[(Epoch, Page)]) -> Base {
        let mut covered = RegionMask::new();
        let mut found = Vec::new();
        let mut base = Base::default();
        for (epoch, page) in pages {
            base.grain_blocks = page.grain_blocks();
            for extent in page.extents() {
                for (run, taken) in covered.runs(extent.range()) {
                    if !taken {
                        found.push((extent.cut(run, page.grain_blocks()), *epoch, page));
                    }
                }
            }
            page.mark(&mut covered);
        }
        found.sort_unstable_by_key(|(extent, ..)| extent.start);
        for (mut extent, epoch, page) in found {
            let sums = page.sums(&extent);
            extent.move_sums(base.sums.len());
            base.sums.extend_from_slice(sums);
            base.extents.push(extent);
            base.epochs.push(epoch);
        }
        base.extents.shrink_to_fit();
        base.epochs.shrink_to_fit();
        base.sums.shrink_to_fit();
        base
    }

    /// The extents that touch a range, with their epoch.
    pub fn touching(&self, range: Range<usize>) -> impl Iterator<Item = (&Extent, Epoch)> {
        let from = self
            .extents
            .partition_point(|e| e.range().end <= range.start);
        let pairs = self.extents[from..]
            .iter()
            .zip(self.epochs[from..].iter().copied());
        pairs.take_while(move |(e, _)| usize::from(e.start) < range.end)
    }

    /// All checksums; extents say where theirs are.
    pub fn sums(&self) -> &[u64] {
        &self.sums
    }

    /// Adds what is preserved to a mask.
    pub fn mark(&self, mask: &mut RegionMask) {
        for extent in &self.extents {
            mask.set(extent.range());
        }
    }

    fn memory(&self) -> usize {
        const ENTRY: usize = 320;
        let extent = size_of::<Extent>() + size_of::<Epoch>();
        ENTRY + self.extents.len() * extent + self.sums.len() * 8
    }
}

type BaseKey = (VolumeId, u64, Epoch);

struct Cached {
    base: Arc<Base>,
    used: u64,
}

/// Resolved regions, least recently used out first, bounded in bytes.
pub(super) struct BaseCache {
    limit: usize,
    bytes: usize,
    clock: u64,
    entries: BTreeMap<BaseKey, Cached>,
    order: BTreeMap<u64, BaseKey>,
}

impl BaseCache {
    pub fn new(limit: usize) -> BaseCache {
        BaseCache {
            limit,
            bytes: 0,
            clock: 0,
            entries: BTreeMap::new(),
            order: BTreeMap::new(),
        }
    }

    pub fn get(&mut self, volume: VolumeId, region: u64, snapshot: Epoch) -> Option<Arc<Base>> {
        let key = (volume, region, snapshot);
        let entry = self.entries.get_mut(&key)?;
        self.order.remove(&entry.used);
        self.clock += 1;
        entry.used = self.clock;
        self.order.insert(self.clock, key);
        Some(Arc::clone(&entry.base))
    }

    pub fn put(&mut self, volume: VolumeId, region: u64, snapshot: Epoch, base: Arc<Base>) {
        let key = (volume, region, snapshot);
        self.drop_key(key);
        self.clock += 1;
        self.bytes += base.memory();
        self.order.insert(self.clock, key);
        self.entries.insert(
            key,
            Cached {
                base,
                used: self.clock,
            },
        );
        while self.bytes > self.limit {
            let Some((_, &oldest)) = self.order.first_key_value() else {
                break;
            };
            self.drop_key(oldest);
        }
    }

    fn drop_key(&mut self, key: BaseKey) {
        if let Some(entry) = self.entries.remove(&key) {
            self.order.remove(&entry.used);
            self.bytes -= entry.base.memory();
        }
    }

    fn drop_range(&mut self, keys: std::ops::RangeInclusive<BaseKey>) {
        let keys: Vec<_> = self.entries.range(keys).map(|(key, _)| *key).collect();
        for key in keys {
            self.drop_key(key);
        }
    }

    pub fn clear(&mut self) {
        self.entries.clear();
        self.order.clear();
        self.bytes = 0;
    }

    pub fn drop_region(&mut self, volume: VolumeId, region: u64) {
        self.drop_range((volume, region, Epoch(0))..=(volume, region, Epoch(u64::MAX)));
    }

    pub fn drop_volume(&mut self, volume: VolumeId) {
        self.drop_range((volume, 0, Epoch(0))..=(volume, u64::MAX, Epoch(u64::MAX)));
    }

    /// Bytes held, at most the limit.
    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}
