//! Change tracking for bookmarks: what is written is known, although nothing of it is preserved.
//!
//! A write is recorded by itself where old content is preserved for a snapshot. Where the newest
//! bookmark is newer than every point, nothing need be preserved of a grain that was preserved for an
//! older point, and nothing at all without a point; but a diff from the bookmark must name it. So:
//!
//! - **T1** While the newest good bookmark B is newer than every point, no grain is written before
//!   it has a record (preserved or changed) in an epoch at or after B. Older bookmarks are served
//!   by the same record; a diff that ends at a later snapshot sees it, too.
//! - **T2** Before the first such write into a region of [`INTENT_BYTES`] in an epoch, a CHANGED
//!   *intent* for the whole region is durable. Grains are then noted in the map in memory alone. A
//!   crash leaves the whole region changed: too much, never too little (I5).
//! - **T3** A checkpoint of the map opens a new epoch where there are intents, so that the old one is
//!   complete and exact in the checkpoint, and no intent before it is relied on behind it. A BITMAP
//!   then replaces the intents of the old epoch in the log.
//! - **T4** Before a segment goes, the sets of every epoch that a bookmark needs, and those of
//!   layers, stand in BITMAPs outside of it, if the segment may hold any of their records.
//!
//! Epochs opened by T3 have no snapshot. Their numbers only grow, like all others.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, PoisonError};

use crate::error::{Kind, Result};
use crate::log::commit::Entry;
use crate::log::record::Record;
use crate::map::bitmaps::ChunkKey;
use crate::map::{GrainSet, Publish, Published};
use crate::sys::planted::{Bug, planted};
use crate::units::{Epoch, VolumeId};
use crate::volume::shared::{Shared, Vol, VolState, lock};

/// Bytes of a region that one intent covers: a power of two, and whole grains of any size.
pub const INTENT_BYTES: u64 = 64 << 20;
/// Regions that are tracked together: bounds a batch of intents.
const REGIONS_AT_ONCE: u64 = 256;
/// Bytes of a table of BITMAPs: with the copy of it that follows, far below a commit block's limit.
const BITMAPS_AT_ONCE: usize = 256 << 10;
/// Numbers from here on are of layers of clones, not of volumes.
pub const LAYERS_FROM: u32 = 0x8000_0000;

/// What a volume's changes are tracked for, and what is tracked already.
#[derive(Default)]
pub struct Tracking {
    /// The newest good bookmark, if no point is as new.
    since: Option<u64>,
    /// Grains with a record in an epoch at or after it.
    tracked: GrainSet,
    /// Regions with a durable intent of the current epoch.
    intents: BTreeSet<u64>,
    /// Chunks of which the log has intents and no later BITMAP, by epoch.
    coarse: BTreeMap<u64, BTreeSet<u64>>,
}

impl Tracking {
    /// Goes on for another bookmark; `load` gives the grains with a record since an epoch.
    pub fn follow(&mut self, since: Option<u64>, load: impl FnOnce(Epoch) -> GrainSet) {
        if since != self.since {
            self.since = since;
            self.tracked = since.map_or_else(GrainSet::default, |epoch| load(Epoch(epoch)));
        }
    }

    /// Grains have got a record in the current epoch.
    pub fn recorded(&mut self, grains: Range<u64>) {
        if self.since.is_some() {
            self.tracked.insert_range(grains);
        }
    }

    /// Intents are of one epoch: the new one has none.
    pub fn epoch_opened(&mut self) {
        self.intents.clear();
    }

    /// Whether there are intents of the current epoch, or a writer may be about to append one.
    fn may_have_intents(&self) -> bool {
        self.since.is_some() || !self.intents.is_empty()
    }

    /// Grains of a range that may not be written yet (T1).
    fn untracked(&self, grains: Range<u64>) -> Vec<Range<u64>> {
        match self.since {
            Some(_) => self.tracked.gaps_in(grains).collect(),
            None => Vec::new(),
        }
    }
}

impl VolState {
    /// The bookmark that writes are tracked for; see T1.
    pub fn tracked_since(&self) -> Option<u64> {
        let newest = self.bookmarks.last().copied();
        newest.filter(|&bookmark| self.newest.is_none_or(|point| point < bookmark))
    }
}

impl Shared {
    /// Makes sure that grains about to change have a record, as far as a bookmark needs one (T1). The
    /// caller holds the volume's gate, and has appended what must be preserved of them.
    ///
    /// # Errors
    /// As an append: then the grains may not be written.
    pub fn track(&self, vol: &Vol, grains: Range<u64>) -> Result<()> {
        let region = INTENT_BYTES / vol.grain.bytes();
        let mut at = grains.start;
        while at < grains.end {
            let end = grains.end.min((at / region + REGIONS_AT_ONCE) * region);
            self.track_some(vol, at..end, region)?;
            at = end;
        }
        Ok(())
    }

    fn track_some(&self, vol: &Vol, grains: Range<u64>, region: u64) -> Result<()> {
        let (epoch, mut wanted) = {
            let state = vol.state();
            let mut wanted = BTreeSet::new();
            for gap in state.tracking.untracked(grains.clone()) {
                wanted.extend(gap.start / region..gap.end.div_ceil(region));
            }
            if wanted.is_empty() {
                return Ok(());
            }
            wanted.retain(|region| !state.tracking.intents.contains(region));
            (state.epoch, wanted)
        };
        if !wanted.is_empty() {
            let end = vol.size().div_ceil(vol.grain.bytes()).max(grains.end);
            let covered = |number: u64| number * region..end.min((number + 1) * region);
            let intents = wanted.iter().map(|&number| {
                let bytes = vol.grain.bytes();
                Entry::plain(Record::intent(vol.id, epoch, covered(number), bytes))
            });
            if !planted(Bug::IntentLost) {
                self.append(intents.collect())?;
            }
        }
        let mut state = vol.state();
        // The gate has kept the epoch.
        let chunks = state.tracking.coarse.entry(epoch).or_default();
        for &number in &wanted {
            chunks.extend(ChunkKey::touched(number * region..(number + 1) * region));
        }
        state.tracking.intents.append(&mut wanted);
        let gaps = state.tracking.untracked(grains.clone());
        let changed = |gap: Range<u64>| Publish {
            volume: vol.id(),
            epoch: Epoch(epoch),
            start: gap.start,
            count: (gap.end - gap.start) as u32,
            grain_blocks: vol.grain_blocks(),
            segment: 0,
            kind: Published::Changed,
        };
        self.map.publish(gaps.into_iter().map(changed).collect());
        state.tracking.recorded(grains);
        Ok(())
    }

    fn all_volumes(&self) -> Vec<Arc<Vol>> {
        let volumes = self.volumes.read().unwrap_or_else(PoisonError::into_inner);
        volumes.values().cloned().collect()
    }

    /// Completes the epoch of every volume with intents (T3): behind this none of them is relied
    /// on. The caller has taken the log's end before and writes a checkpoint of the map after.
    pub fn complete_epochs(&self) {
        for vol in self.all_volumes() {
            // A writer whose intent is durable may not have counted it yet: only where nothing is
            // tracked can there be none under way.
            if !vol.state().tracking.may_have_intents() {
                continue;
            }
            // Whoever relied on an intent has noted its grains in the map when this is granted.
            let _gate = vol.gate.write().unwrap_or_else(PoisonError::into_inner);
            let mut state = vol.state();
            if state.tracking.intents.is_empty() {
                continue;
            }
            state.epoch += 1;
            state.tracking.epoch_opened();
        }
    }

    /// Writes the exact sets of complete epochs over their intents. Best effort: without them a lost
    /// map or a crash makes whole regions changed.
    ///
    /// # Errors
    /// As an append, but for a full disk.
    pub fn refine(&self) -> Result<()> {
        for vol in self.all_volumes() {
            let due = {
                let mut state = vol.state();
                // A snapshot's diff crosses the epoch, too, and it may become a bookmark.
                let points = state.points.keys().chain(&state.bookmarks);
                let oldest = points.min().copied().unwrap_or(u64::MAX);
                let current = state.epoch;
                // Nobody asks for what is older than every point and bookmark.
                state.tracking.coarse.retain(|&epoch, _| epoch >= oldest);
                let due = state.tracking.coarse.range(..current);
                due.map(|(&epoch, chunks)| (epoch, chunks.clone()))
                    .collect::<Vec<_>>()
            };
            for (epoch, chunks) in due {
                match self.append_bitmaps(vol.id(), Epoch(epoch), Some(&chunks), true) {
                    Ok(()) => drop(vol.state().tracking.coarse.remove(&epoch)),
                    Err(e) if e.kind() == Kind::NoSpace => {
                        tracing::debug!("bitmaps wait for space: {}", e.chain());
                        return Ok(());
                    }
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(())
    }

    /// Appends BITMAPs of an epoch: of some chunks, or of all that hold anything.
    fn append_bitmaps(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        chunks: Option<&BTreeSet<u64>>,
        complete: bool,
    ) -> Result<()> {
        let sets = self.map.sets_of(volume, epoch..Epoch(epoch.0 + 1));
        let sets = sets.into_iter().next().map(|(_, sets)| sets);
        let sets = sets.unwrap_or_default();
        let all: BTreeSet<u64> = match chunks {
            Some(chunks) => chunks.clone(),
            None => sets.chunks().collect(),
        };
        let mut entries = Vec::new();
        let mut bytes = 0;
        for chunk in all {
            let grains = ChunkKey::grains(chunk);
            let count = (grains.end - grains.start) as u32;
            let bits = sets.touched_bytes(chunk);
            let record = Record::bitmap(volume.0, epoch.0, grains.start, count, &bits, complete);
            bytes += record.encoded_len();
            entries.push(Entry::plain(record));
            if bytes >= BITMAPS_AT_ONCE {
                bytes = 0;
                self.append(std::mem::take(&mut entries))?;
            }
        }
        if !entries.is_empty() {
            self.append(entries)?;
        }
        Ok(())
    }

    /// Notes the first segment that may hold records of the sets of a (volume or layer, epoch).
    pub fn note_sets(&self, of: impl Iterator<Item = (u32, u64)>, segment: u32) {
        let mut since = lock(&self.sets_since);
        let mut last = None;
        for key in of {
            if last.replace(key) != Some(key) {
                since.entry(key).or_insert(segment);
            }
        }
    }

    /// Before segments go: writes BITMAPs of what a bookmark or a layer needs and may stand in one of
    /// them alone (T4). What snapshots need is never only there: of the first change after a
    /// snapshot the record lives as long as the snapshot.
    ///
    /// # Errors
    /// As an append: the segments must stay.
    pub fn keep_bitmaps(&self, dead: &[u32]) -> Result<()> {
        let Some(newest_dead) = dead.iter().max() else {
            return Ok(());
        };
        for volume in self.map.volumes() {
            let epochs = self.map.epochs(volume);
            let (oldest, current) = match self.vol(volume.0) {
                Some(vol) => {
                    let state = vol.state();
                    let Some(&oldest) = state.bookmarks.first() else {
                        continue;
                    };
                    (oldest, state.epoch)
                }
                // Its records are in the map before the log's end is behind them.
                None if volume.0 >= LAYERS_FROM => (0, u64::MAX),
                None => continue,
            };
            for epoch in epochs.into_iter().filter(|epoch| epoch.0 >= oldest) {
                let key = (volume.0, epoch.0);
                let since = lock(&self.sets_since).get(&key).copied().unwrap_or(0);
                if since > *newest_dead {
                    continue;
                }
                // Later records of the same sets lie at or behind this. In an open epoch whoever
                // relies on an intent may not have noted its grains yet, unless the last checkpoint
                // lies in between; and all dead segments are before that.
                let (_, segment, _) = self.log.end();
                let closed = epoch.0 < current;
                let complete = closed && volume.0 < LAYERS_FROM;
                self.append_bitmaps(volume, epoch, None, complete)?;
                let first = if closed { segment } else { newest_dead + 1 };
                lock(&self.sets_since).insert(key, first);
            }
        }
        self.forget_segments();
        Ok(())
    }

    /// Forgets the segments of sets that are gone.
    fn forget_segments(&self) {
        let mut since = lock(&self.sets_since);
        since.retain(|&(volume, epoch), _| {
            // The grains behind the first intent of an epoch come into the map after it.
            let open = self.vol(volume).is_some_and(|v| v.state().epoch <= epoch);
            open || self.map.has_sets(VolumeId(volume), Epoch(epoch))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::log::record::RecordType;
    use crate::log::scan::{Event, Scan};
    use crate::map::ExtentMap;
    use crate::map::index::IndexHome;
    use crate::map::memory::MemoryIndexHome;
    use crate::sys::disk::Disk;
    use crate::sys::sim::SimWorld;
    use crate::units::{BLOCK, Name};
    use crate::volume::engine::Engine;
    use crate::volume::facts::{Environment, Settings, Sources, VolumeOptions};
    use crate::volume::reclaim;
    use crate::volume::shared::to_publish;

    struct Sim(SimWorld);

    impl Sources for Sim {
        fn open(&self, path: &str) -> Result<Arc<dyn Disk>> {
            let disk = self.0.disk(path);
            Ok(disk.ok_or_else(|| Error::new(Kind::NotFound, path))?)
        }
    }

    fn engine(world: &SimWorld) -> Arc<Engine> {
        let settings = Settings {
            segment_bytes: 1 << 20,
            ballast_bytes: 0,
            checkpoint_bytes: 64 << 10,
            ..Settings::default()
        };
        let env = Environment {
            dir: world.dir("store"),
            index: Arc::new(MemoryIndexHome::new()),
            sources: Arc::new(Sim(world.clone())),
            clock: Arc::new(world.clock()),
        };
        Engine::create(&env, &settings).unwrap();
        Engine::open(env, settings).unwrap()
    }

    /// A map made from the log alone.
    fn replayed(shared: &Shared, world: &SimWorld) -> ExtentMap {
        let map = ExtentMap::open(MemoryIndexHome::new().open().unwrap(), 1 << 20).unwrap();
        let dir = world.dir("store/log");
        let scan = Scan {
            dir: &*dir,
            keys: shared.log.keys(),
            store: shared.store,
            from_segment: 0,
        };
        scan.run(&mut |event| {
            if let Event::Batch { place, records, .. } = event {
                let records = records.iter().filter_map(|r| to_publish(r, place));
                map.publish(records.collect());
            }
            Ok(())
        })
        .unwrap();
        map
    }

    /// What the log says of a layer outlives the segments it was said in, as long as the map has it.
    #[test]
    fn the_sets_of_a_layer_outlive_their_segments() {
        let world = SimWorld::new(1);
        let engine = engine(&world);
        world.add_disk("v", 4 << 20);
        let name = Name::new("v").unwrap();
        engine
            .add_volume(&name, "v", VolumeOptions::default())
            .unwrap();
        let shared = &engine.shared;
        let layer = VolumeId(LAYERS_FROM | 5);
        let mut wanted = GrainSet::new();
        let note = |grains: Range<u64>, wanted: &mut GrainSet| {
            let record = Record::grains(RecordType::Changed, layer.0, 1, grains.clone(), BLOCK);
            shared.append_records(vec![record]).unwrap();
            wanted.insert_range(grains);
        };
        let volume = engine.volume(&name).unwrap();
        let mut gone = 0;
        for round in 0..6 {
            note(round * 100..round * 100 + 3, &mut wanted);
            note(round * 300_000..round * 300_000 + 3, &mut wanted);
            let snapshot = Name::new("s").unwrap();
            engine
                .take_snapshots(&[(name.clone(), snapshot.clone())])
                .unwrap();
            let bytes = vec![round as u8 + 1; 3 << 20];
            volume.write_at(0, &bytes, false).unwrap();
            engine.delete_snapshot(&name, &snapshot).unwrap();
            let before = shared.log.segments().unwrap();
            reclaim::maintain(shared).unwrap();
            let after = shared.log.segments().unwrap();
            gone += before.iter().filter(|s| !after.contains(s)).count();
            let log = replayed(shared, &world);
            let set = log.changed_between(layer, Epoch(0), None);
            assert_eq!(set, wanted, "after round {round}");
        }
        assert!(gone >= 6, "only {gone} segments went");
        shared.map.forget_volume(layer).unwrap();
        assert!(lock(&shared.sets_since).contains_key(&(layer.0, 1)));
        shared.forget_segments();
        assert!(!lock(&shared.sets_since).contains_key(&(layer.0, 1)));
    }

    /// A checkpoint must not go past a writer whose intent is durable and not yet counted.
    #[test]
    fn an_epoch_is_completed_behind_the_writers_that_are_under_way() {
        let world = SimWorld::new(1);
        let engine = engine(&world);
        world.add_disk("v", 4 << 20);
        let (name, mark) = (Name::new("v").unwrap(), Name::new("b").unwrap());
        engine
            .add_volume(&name, "v", VolumeOptions::default())
            .unwrap();
        engine
            .take_snapshots(&[(name.clone(), mark.clone())])
            .unwrap();
        engine.delete_snapshot_keep_bookmark(&name, &mark).unwrap();
        let shared = &engine.shared;
        let vol = shared.find(&name).unwrap();
        let before = vol.state().epoch;
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let gate = vol.gate.read().unwrap();
            scope.spawn(|| {
                shared.complete_epochs();
                done.store(true, std::sync::atomic::Ordering::SeqCst);
            });
            // As long as it would need if it did not wait.
            for _ in 0..100 {
                if done.load(std::sync::atomic::Ordering::SeqCst) {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            shared.track(&vol, 3..4).unwrap();
            assert_eq!(vol.state().epoch, before);
            drop(gate);
        });
        assert_eq!(vol.state().epoch, before + 1);
        shared.complete_epochs();
        assert_eq!(vol.state().epoch, before + 1, "nothing to complete");
    }

    /// Of a layer neither too much nor too little may be said.
    #[test]
    fn a_bitmap_of_a_layer_that_cannot_be_read_fails_its_clones() {
        let world = SimWorld::new(1);
        let engine = engine(&world);
        world.add_disk("v", 4 << 20);
        let n = |text| Name::new(text).unwrap();
        engine
            .add_volume(&n("v"), "v", VolumeOptions::default())
            .unwrap();
        engine.take_snapshots(&[(n("v"), n("s"))]).unwrap();
        for clone in ["c", "d"] {
            engine.clone_snapshot(&n("v"), &n("s"), &n(clone)).unwrap();
            let clone = engine.open_clone(&n("v"), &n(clone)).unwrap();
            clone.write_at(0, &[1; 4096], false).unwrap();
        }
        engine.clone_clone(&n("v"), &n("c"), &n("e")).unwrap();
        let bad = Record::bitmap(LAYERS_FROM | 1, 1, 0, 1 << 10, &[0xff; 7], false);
        engine.shared.append_records(vec![bad]).unwrap();
        drop(engine);
        world.kill();
        let env = Environment {
            dir: world.dir("store"),
            index: Arc::new(MemoryIndexHome::new()),
            sources: Arc::new(Sim(world.clone())),
            clock: Arc::new(world.clock()),
        };
        let engine = Engine::open(env, Settings::default()).unwrap();
        for (clone, good) in [("c", false), ("d", true), ("e", false)] {
            let clone = engine.open_clone(&n("v"), &n(clone)).unwrap();
            let mut bytes = [9; 8192];
            let read = clone.read_at(0, &mut bytes).map_err(|e| e.kind());
            assert_eq!(read, if good { Ok(()) } else { Err(Kind::Failed) });
            assert!(!good || (bytes[..4096] == [1; 4096] && bytes[4096..] == [0; 4096]));
        }
    }

    #[test]
    fn what_is_tracked_follows_bookmarks_and_points() {
        let mut tracking = Tracking::default();
        let none = |_| -> GrainSet { unreachable!("nothing to follow") };
        tracking.follow(None, none);
        tracking.recorded(0..9);
        assert!(tracking.untracked(0..9).is_empty(), "nothing is wanted");
        let known = |epoch| {
            assert_eq!(epoch, Epoch(5));
            std::iter::once(3..5).collect()
        };
        tracking.follow(Some(5), known);
        tracking.follow(Some(5), none);
        assert_eq!(tracking.untracked(0..9), [0..3, 5..9]);
        tracking.recorded(0..6);
        assert_eq!(tracking.untracked(0..9), std::slice::from_ref(&(6..9)));
        tracking.follow(None, none);
        assert!(tracking.untracked(0..9).is_empty());
        tracking.follow(Some(5), known);
        assert_eq!(tracking.untracked(0..9), [0..3, 5..9]);
    }
}
