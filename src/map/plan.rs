//! Planning a read: for a snapshot and a range of grains, where each grain is.
//!
//! Each region is answered in one go under the state lock, from its resolved base (cached) and the
//! pages not yet merged; by epoch, so that it does not matter in which of the three a record is. A
//! base that is not cached is read without the lock; if the generation moved meanwhile, a checkpoint
//! has carried records from memory to the index behind our back, and we start again (S2).

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::map::extents::{ExtentMap, Run, RunKind, SCAN};
use crate::map::keys::{GRAINS_MAX, PageKey};
use crate::map::mask::RegionMask;
use crate::map::page::{Content, Extent, Page};
use crate::map::state::{Base, State, regions};
use crate::units::{Epoch, Place, REGION_GRAINS, VolumeId};

/// One question about one region.
struct Ask {
    volume: VolumeId,
    snapshot: Epoch,
    grain_blocks: u32,
    region: u64,
    /// Relative to the region.
    part: Range<usize>,
}

/// The best answer for one grain so far.
#[derive(Clone, Copy)]
enum Slot {
    Source,
    Zero(Epoch),
    Data(Epoch, Place, u64),
}

impl ExtentMap {
    /// Where the grains of a range are for a snapshot; the runs cover the range exactly, sorted and
    /// coalesced. The snapshot has to be live for [`ExtentMap::sweep`]: other answers are undefined.
    ///
    /// # Errors
    /// `Damaged` on any doubt, also when a page is missing that the sets know of; `Invalid` for a
    /// range outside every volume; `Io`.
    pub fn plan(
        &self,
        volume: VolumeId,
        snapshot: Epoch,
        grain_blocks: u32,
        grains: Range<u64>,
    ) -> Result<Vec<Run>> {
        if grains.start > grains.end || grains.end > GRAINS_MAX {
            return Err(Error::new(
                Kind::Invalid,
                format!("no volume has grains {grains:?}"),
            ));
        }
        let mut runs = Runs {
            runs: Vec::new(),
            grain_blocks,
        };
        for (region, part) in regions(grains) {
            self.plan_region(
                &Ask {
                    volume,
                    snapshot,
                    grain_blocks,
                    region,
                    part,
                },
                &mut runs,
            )?;
        }
        Ok(runs.runs)
    }

    fn plan_region(&self, ask: &Ask, runs: &mut Runs) -> Result<()> {
        loop {
            let mut state = self.lock();
            if let Some(base) = state.cache.get(ask.volume, ask.region, ask.snapshot) {
                let slots = overlay(&state, &base, ask)?;
                drop(state);
                runs.add(ask, &slots);
                return Ok(());
            }
            let generation = state.generation;
            let expected = expected(&state, ask);
            drop(state);

            let base = Arc::new(self.load(ask)?);
            let mut state = self.lock();
            if state.generation != generation {
                continue;
            }
            let mut held = RegionMask::new();
            base.mark(&mut held);
            for (_, page) in state.unmerged(ask.volume, ask.region, ask.snapshot) {
                page.mark(&mut held);
            }
            if !expected.is_within(&held) {
                return Err(ask.damaged("a page is missing"));
            }
            let slots = overlay(&state, &base, ask)?;
            state.cache.put(ask.volume, ask.region, ask.snapshot, base);
            drop(state);
            runs.add(ask, &slots);
            return Ok(());
        }
    }

    fn load(&self, ask: &Ask) -> Result<Base> {
        let key = PageKey {
            volume: ask.volume,
            region: ask.region,
            epoch: ask.snapshot,
        };
        let mut from = key.encode();
        let to = PageKey {
            epoch: Epoch(u64::MAX),
            ..key
        }
        .encode();
        let mut pages = Vec::new();
        loop {
            let pairs = self.index().scan(&from, &to, SCAN)?;
            let more = pairs.len() == SCAN;
            for (key, value) in pairs {
                let at = PageKey::decode(&key)?;
                let page = Page::decode(at, &value)?;
                if page.grain_blocks() != ask.grain_blocks {
                    return Err(ask.damaged("a page of another grain size"));
                }
                pages.push((at.epoch, page));
                from = key;
                from.push(0);
            }
            if !more {
                return Ok(Base::resolve(&pages));
            }
        }
    }
}

impl Ask {
    fn damaged(&self, why: &str) -> Error {
        let Ask {
            volume,
            snapshot,
            region,
            ..
        } = self;
        let at = format!(
            "volume {} region {region} snapshot {}",
            volume.0, snapshot.0
        );
        Error::new(Kind::Damaged, format!("extent map ({at}): {why}"))
    }
}

/// What the sets say is preserved in the region (M5).
fn expected(state: &State, ask: &Ask) -> RegionMask {
    let base = ask.region * REGION_GRAINS;
    let mut mask = RegionMask::new();
    for (_, sets) in state.epochs(ask.volume, ask.snapshot..Epoch(u64::MAX)) {
        for set in [&sets.data, &sets.zero] {
            for run in set.ranges_in(base..base + REGION_GRAINS) {
                mask.set((run.start - base) as usize..(run.end - base) as usize);
            }
        }
    }
    mask
}

fn overlay(state: &State, base: &Base, ask: &Ask) -> Result<Vec<Slot>> {
    let mut slots = vec![Slot::Source; ask.part.len()];
    for (extent, epoch) in base.touching(ask.part.clone()) {
        fill(&mut slots, ask, extent, epoch, base.sums());
    }
    for (epoch, page) in state.unmerged(ask.volume, ask.region, ask.snapshot) {
        if page.grain_blocks() != ask.grain_blocks {
            return Err(ask.damaged("records of another grain size"));
        }
        for extent in page.touching(ask.part.clone()) {
            fill(&mut slots, ask, extent, epoch, page.all_sums());
        }
    }
    Ok(slots)
}

/// Smaller epochs win; for equal ones the index does, since it is asked first (M1).
fn fill(slots: &mut [Slot], ask: &Ask, extent: &Extent, epoch: Epoch, sums: &[u64]) {
    let extent = extent.cut(ask.part.clone(), ask.grain_blocks);
    for (i, grain) in extent.range().enumerate() {
        let slot = &mut slots[grain - ask.part.start];
        if let Slot::Zero(best) | Slot::Data(best, ..) = slot
            && *best <= epoch
        {
            continue;
        }
        *slot = match extent.content {
            Content::Zero { .. } => Slot::Zero(epoch),
            Content::Data { place, sums_at } => {
                let place = place.advance(i as u64 * u64::from(ask.grain_blocks));
                Slot::Data(epoch, place, sums[sums_at as usize + i])
            }
        };
    }
}

/// Collects runs, joining what can be one.
struct Runs {
    runs: Vec<Run>,
    grain_blocks: u32,
}

impl Runs {
    fn add(&mut self, ask: &Ask, slots: &[Slot]) {
        let first = ask.region * REGION_GRAINS + ask.part.start as u64;
        for (grain, slot) in (first..).zip(slots) {
            if !self.extend(slot) {
                let kind = match *slot {
                    Slot::Source => RunKind::Source,
                    Slot::Zero(_) => RunKind::Zero,
                    Slot::Data(_, place, sum) => RunKind::Preserved {
                        place,
                        sums: vec![sum],
                    },
                };
                self.runs.push(Run {
                    grains: grain..grain + 1,
                    kind,
                });
            }
        }
    }

    /// Lengthens the last run by one grain, if that says the same.
    fn extend(&mut self, slot: &Slot) -> bool {
        let Some(run) = self.runs.last_mut() else {
            return false;
        };
        match (&mut run.kind, slot) {
            (RunKind::Source, Slot::Source) | (RunKind::Zero, Slot::Zero(_)) => {}
            (RunKind::Preserved { place: first, sums }, Slot::Data(_, place, sum)) => {
                let blocks = sums.len() as u64 * u64::from(self.grain_blocks);
                let next = u64::from(first.block) + blocks;
                if first.segment != place.segment || next != u64::from(place.block) {
                    return false;
                }
                sums.push(*sum);
            }
            _ => return false,
        }
        run.grains.end += 1;
        true
    }
}
