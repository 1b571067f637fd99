//! The sweep: takes dead records out of the index and says which payload nobody needs any more.
//!
//! A region's pages are walked by ascending epoch with the last preserving epoch of each grain; a
//! record is dead when no live epoch lies between that and its own (M4). Dead grains leave their page
//! and, in the same batch, move from `data` or `zero` to `changed` in the sets of their epoch: they
//! did change, and a diff must still say so.
//!
//! Readers need not be told: no live snapshot's plan names a dead record, so cached regions stay right.
//!
//! A snapshot taken after `live` was gathered is not in it. So only pages are judged that no later
//! checkpoint has written (their LSN says so), and sets go only for epochs that were there when the
//! last checkpoint began.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::error::Result;
use crate::map::bitmaps::{ChunkKey, EpochSets, encode_chunk};
use crate::map::extents::{ExtentMap, Swept};
use crate::map::keys::{PAGE_NAMESPACE, PageKey, volume_keys};
use crate::map::mask::RegionMask;
use crate::map::page::{Content, Page};
use crate::sys::planted::{Bug, planted};
use crate::units::{Epoch, Lsn, Place, REGION_GRAINS, VolumeId};

/// Pages of one step: bounds a batch to about a megabyte, and how long `writer` is held.
const STEP: usize = 8;

/// What a sweep carries from step to step.
struct Walk<'a> {
    volume: VolumeId,
    live: &'a [Epoch],
    /// Pages written by a later checkpoint are not judged.
    limit: Lsn,
    region: Option<u64>,
    /// Of each grain of the region.
    last: Vec<Option<Epoch>>,
    swept: Swept,
}

/// What one step found.
#[derive(Default)]
struct Step {
    pages: Vec<(PageKey, Page)>,
    /// Dead runs of grains, by epoch.
    dead: Vec<(Epoch, Range<u64>)>,
    freed: Vec<(Place, u64)>,
}

impl ExtentMap {
    /// Takes dead records of a volume out of the index. `live` names, sorted, every epoch whose
    /// snapshot exists, is being taken, or is held open; it must have been gathered after the last
    /// checkpoint returned. `bookmark` is the oldest epoch besides in which a diff may start: its
    /// sets and later ones stay. `freed` is told of payload (place, log blocks) after its records are gone
    /// from the index, though not durably before the next checkpoint. After a cut the same payload
    /// may be told again, also of a segment that is gone by then.
    ///
    /// # Errors
    /// `Damaged`, `Io`, `NoSpace`: what was told is gone, the rest stays for the next sweep.
    ///
    /// # Panics
    /// If `live` is not sorted.
    pub fn sweep(
        &self,
        volume: VolumeId,
        live: &[Epoch],
        bookmark: Option<Epoch>,
        freed: &mut dyn FnMut(Place, u64),
    ) -> Result<Swept> {
        assert!(live.is_sorted(), "live epochs are sorted");
        let state = self.lock();
        let (applied, covered) = (state.applied, state.covered.get(&volume).copied());
        drop(state);
        let Some(applied) = applied else {
            // Never checkpointed: whatever is in the index came from a checkpoint that was cut.
            return Ok(Swept::default());
        };
        let last = vec![None; REGION_GRAINS as usize];
        let swept = Swept::default();
        let mut walk = Walk {
            volume,
            live,
            limit: applied.lsn,
            region: None,
            last,
            swept,
        };
        let (mut from, to) = volume_keys(PAGE_NAMESPACE, volume);
        loop {
            let writer = self.lock_writer();
            let pairs = self.index().scan(&from, &to, STEP)?;
            let more = pairs.len() == STEP;
            let mut step = Step::default();
            for (key, value) in pairs {
                let at = PageKey::decode(&key)?;
                walk.judge(at, Page::decode(at, &value)?, &mut step);
                from = key;
                from.push(0);
            }
            self.bury(&walk, &step)?;
            drop(writer);
            for (place, blocks) in step.freed {
                freed(place, blocks);
            }
            if !more {
                break;
            }
        }
        self.drop_epochs(volume, live, bookmark, covered);
        Ok(walk.swept)
    }

    /// Writes what one step found, pages and sets in one batch.
    fn bury(&self, walk: &Walk<'_>, step: &Step) -> Result<()> {
        if step.pages.is_empty() {
            return Ok(());
        }
        let mut parts: BTreeMap<ChunkKey, EpochSets> = BTreeMap::new();
        let state = self.lock();
        for (epoch, run) in &step.dead {
            let Some(sets) = state.sets.get(&(walk.volume, *epoch)) else {
                continue;
            };
            // A region lies in one chunk.
            let chunk = ChunkKey::touched(run.clone()).start;
            let key = ChunkKey {
                volume: walk.volume,
                epoch: *epoch,
                chunk,
            };
            parts.entry(key).or_insert_with(|| sets.part(chunk));
        }
        drop(state);
        for (epoch, run) in &step.dead {
            let chunk = ChunkKey::touched(run.clone()).start;
            let key = ChunkKey {
                volume: walk.volume,
                epoch: *epoch,
                chunk,
            };
            if let Some(part) = parts.get_mut(&key) {
                part.bury(run.clone());
            }
        }
        let pages = step
            .pages
            .iter()
            .map(|(key, page)| (key.encode(), page.encode(*key)));
        let sets = parts
            .iter()
            .map(|(key, part)| (key.encode(), encode_chunk(*key, part)));
        self.index().apply(pages.chain(sets).collect())?;
        let mut state = self.lock();
        for (epoch, run) in &step.dead {
            if let Some(sets) = state.sets.get_mut(&(walk.volume, *epoch)) {
                sets.bury(run.clone());
            }
        }
        Ok(())
    }

    /// Drops the sets in which no diff can start any more.
    fn drop_epochs(
        &self,
        volume: VolumeId,
        live: &[Epoch],
        bookmark: Option<Epoch>,
        covered: Option<Epoch>,
    ) {
        let end = match (live.first(), covered) {
            (Some(&first), _) => first,
            (None, Some(covered)) => Epoch(covered.0 + 1),
            (None, None) => return,
        };
        let end = bookmark.map_or(end, |bookmark| end.min(bookmark));
        loop {
            let mut state = self.lock();
            let first = state
                .epochs(volume, Epoch(0)..end)
                .map(|(epoch, _)| epoch)
                .next();
            let Some(epoch) = first else {
                return;
            };
            let sets = state.sets.remove(&(volume, epoch)).unwrap_or_default();
            let chunks: BTreeSet<u64> = sets.chunks().collect();
            state.dirty.extend(chunks.into_iter().map(|chunk| ChunkKey {
                volume,
                epoch,
                chunk,
            }));
        }
    }
}

impl Walk<'_> {
    /// Whether some live snapshot reads what was preserved at `epoch`, if its grain had been
    /// preserved before at `before`.
    fn needed(&self, before: Option<Epoch>, epoch: Epoch) -> bool {
        let upto = match planted(Bug::SweptAtEpoch) {
            true => self.live.partition_point(|&live| live < epoch),
            false => self.live.partition_point(|&live| live <= epoch),
        };
        if planted(Bug::SweptEarly) {
            return upto > 0 && before.is_none();
        }
        upto > 0 && before.is_none_or(|before| self.live[upto - 1] > before)
    }

    fn judge(&mut self, key: PageKey, mut page: Page, step: &mut Step) {
        if self.region != Some(key.region) {
            self.region = Some(key.region);
            self.last.fill(None);
        }
        let mut dead = RegionMask::new();
        let (mut data, mut zero) = (0, 0);
        for extent in page.extents() {
            match extent.content {
                Content::Data { .. } => data += u64::from(extent.count),
                Content::Zero { .. } => zero += u64::from(extent.count),
            }
            for grain in extent.range() {
                let before = self.last[grain].replace(key.epoch);
                if page.lsn <= self.limit && !self.needed(before, key.epoch) {
                    dead.set(grain..grain + 1);
                }
            }
        }
        if !dead.is_empty() {
            let base = key.first_grain();
            for (run, gone) in dead.runs(0..REGION_GRAINS as usize) {
                if gone {
                    let run = base + run.start as u64..base + run.end as u64;
                    step.dead.push((key.epoch, run));
                }
            }
            let (data_gone, zero_gone) = page.remove(&dead, &mut step.freed);
            step.pages.push((key, page));
            self.swept.data_freed += data_gone;
            self.swept.zero_freed += zero_gone;
            data -= data_gone;
            zero -= zero_gone;
        }
        self.swept.data_live += data;
        self.swept.zero_live += zero;
    }
}
