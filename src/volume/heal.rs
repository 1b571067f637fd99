//! Mending the extent map of an open store.
//!
//! The map is derived. When its index turns out damaged while the store is served (its pages are only
//! verified when they are read), the index is moved aside and made again from the log, and whoever asked
//! asks again; nobody sees more than a wait. Readers and writers go on meanwhile. Should that fail, the
//! answer is the map's error, and it is tried again later and at the next open.
//!
//! The new map has what the log still says of content that is dead and of volumes that are gone; that
//! is forgotten again. Until the new index is complete the log alone says what there is: its last batch
//! gets a second copy first, so that rot in it is not taken for a torn end.
//!
//! Lock: `one`, in the order of locks just before the log's own; held over I/O.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::error::{Error, IoContext, Kind, Result};
use crate::log::scan::{Event, Scan};
use crate::map::index::Index;
use crate::map::transient::TransientIndex;
use crate::map::{Applied, ExtentMap};
use crate::units::VolumeId;
use crate::volume::clone_records::LAYER_BIT;
use crate::volume::shared::{Shared, lock, to_publish, unreadable_layer};
use crate::volume::space::has_room_for_map;

/// How long it is not tried again after it failed.
const PAUSE: Duration = Duration::from_secs(10);
/// Rounds of maintenance between two looks for space for a map in memory, and after a failure.
const LOOK_AFTER: u32 = 4;
const TRY_AFTER: u32 = 60;
/// Bytes of space left, besides what the map takes, with which one in memory goes back to disk.
const SPACE_LEFT: u64 = 8 << 20;
/// A segment may be removed, or cut to its end, while the log is read.
const TRIES: u32 = 8;

/// What is known of earlier attempts.
#[derive(Default)]
pub struct Heal {
    /// When the last one failed.
    one: Mutex<Option<Instant>>,
    /// Those that succeeded.
    healed: AtomicU64,
    /// Rounds of maintenance until a map in memory looks for space again.
    wait: AtomicU32,
}

impl Shared {
    /// Asks the map; if it turns out damaged, it is made again and asked once more.
    ///
    /// # Errors
    /// Those of `ask`.
    pub fn healing<T>(&self, ask: impl Fn(&ExtentMap) -> Result<T>) -> Result<T> {
        let before = self.heal.healed.load(Ordering::Acquire);
        match ask(&self.map) {
            Err(e) if e.kind() == Kind::Damaged => {
                self.heal_since(before, &e)?;
                ask(&self.map)
            }
            done => done,
        }
    }

    /// Brings a map that is in memory for want of space back to disk, when there is enough. Best effort: until
    /// then a start reads all of the log. `maintaining` is held.
    pub fn map_to_disk(&self, at_once: bool) {
        if !self.map_in_memory.load(Ordering::Acquire) {
            return;
        }
        let wait = self.heal.wait.load(Ordering::Relaxed);
        if wait > 0 && !at_once {
            self.heal.wait.store(wait - 1, Ordering::Relaxed);
            return;
        }
        // Nobody makes the map again meanwhile, in the place that is cleared here.
        let _one = lock(&self.heal.one);
        if !self.map_in_memory.load(Ordering::Acquire) {
            return;
        }
        match self.try_map_to_disk() {
            Ok(true) => tracing::info!("there is space again: the extent map is on disk"),
            Ok(false) => self.heal.wait.store(LOOK_AFTER, Ordering::Relaxed),
            Err(e) => {
                self.heal.wait.store(TRY_AFTER, Ordering::Relaxed);
                tracing::debug!("the extent map stays in memory: {}", e.chain());
                // Half of one would be looked at in the next start.
                if let Err(e) = self.env.index.discard() {
                    tracing::debug!("{}", e.chain());
                }
            }
        }
    }

    fn try_map_to_disk(&self) -> Result<bool> {
        let space = self.env.dir.space().context(|| "cannot stat the store")?;
        let left = self.settings.ballast_bytes + SPACE_LEFT;
        if space.available < left || space.available - left < 2 * self.map.indexed_bytes()? {
            return Ok(false);
        }
        // What is there is older, whatever it is.
        self.env.index.discard()?;
        self.map.move_to(|| self.env.index.open())?;
        self.map_in_memory.store(false, Ordering::Release);
        Ok(true)
    }

    /// Makes the map again from the log.
    ///
    /// # Errors
    /// `Damaged` if it could not be done.
    pub fn heal_map(&self, why: &Error) -> Result<()> {
        self.heal_since(self.heal.healed.load(Ordering::Acquire), why)
    }

    fn heal_since(&self, before: u64, why: &Error) -> Result<()> {
        let mut failed = lock(&self.heal.one);
        if self.heal.healed.load(Ordering::Acquire) != before {
            // Somebody else has, since this was found out.
            return Ok(());
        }
        let again = || Error::new(Kind::Damaged, why.chain());
        if failed.is_some_and(|at| at.elapsed() < PAUSE) {
            return Err(again());
        }
        tracing::error!(
            "the extent map is damaged and is made again from the log: {}",
            why.chain()
        );
        let sealed = self.log.seal(self);
        match sealed.and_then(|()| self.adopt_from_log()) {
            Ok(()) => {
                *failed = None;
                self.heal.healed.fetch_add(1, Ordering::AcqRel);
                tracing::info!("the extent map is whole again");
                Ok(())
            }
            Err(e) => {
                *failed = Some(Instant::now());
                tracing::error!("the extent map cannot be made again: {}", e.chain());
                Err(again())
            }
        }
    }

    fn adopt_from_log(&self) -> Result<()> {
        let mut done = Ok(());
        for _ in 0..TRIES {
            let (mut volumes, mut in_memory) = (BTreeSet::new(), false);
            done = self.map.adopt(|| {
                in_memory = !has_room_for_map(&self.env, 0);
                let map = self.map_from_log(in_memory)?;
                volumes = map.volumes();
                Ok(map)
            });
            match &done {
                Ok(()) => {
                    self.map_in_memory.store(in_memory, Ordering::Release);
                    self.forget_again(volumes);
                    break;
                }
                Err(e) if matches!(e.kind(), Kind::NotFound | Kind::Io) => {}
                Err(_) => break,
            }
        }
        done
    }

    /// Of volumes that are gone the log may still speak, and so it does of content that was freed.
    fn forget_again(&self, volumes: BTreeSet<VolumeId>) {
        let catalog = lock(&self.catalog);
        let known = |id: &VolumeId| match id.0 & LAYER_BIT {
            0 => catalog.volumes.contains_key(&id.0),
            _ => catalog.layers.contains_key(&(id.0 & !LAYER_BIT)),
        };
        let gone: Vec<VolumeId> = volumes.into_iter().filter(|id| !known(id)).collect();
        let there: Vec<u32> = catalog.volumes.keys().copied().collect();
        drop(catalog);
        for id in gone {
            if let Err(e) = self.map.forget_volume(id) {
                tracing::warn!("the map keeps what is gone: {}", e.chain());
            }
        }
        for id in there {
            self.mark_reclaim(id);
        }
        self.segments_due.store(true, Ordering::Release);
    }

    /// A new index with all that the log says, up to its end now.
    fn map_from_log(&self, in_memory: bool) -> Result<ExtentMap> {
        self.env.index.set_aside()?;
        let index: Arc<dyn Index> = match in_memory {
            false => self.env.index.open()?,
            true => Arc::new(TransientIndex::default()),
        };
        let map = ExtentMap::open(index, self.settings.map_cache_bytes)?;
        let (upto, segment, offset) = self.log.end_said();
        let dir = self.env.dir.subdir("log", false);
        let dir = dir.context(|| "cannot open the log's directory")?;
        let scan = Scan {
            dir: dir.as_ref(),
            keys: self.log.keys(),
            store: self.store,
            from_segment: 0,
        };
        let lost = || {
            let why = "the log has lost batches, too; start again to have it recovered";
            Error::new(Kind::Failed, why)
        };
        // What is written meanwhile stands in the memory of the map that is in use.
        let scanned = scan.run(&mut |event| match event {
            Event::Batch {
                lsn,
                place,
                end,
                records,
                ..
            } if lsn <= upto => {
                if records.iter().any(|r| unreadable_layer(r).is_some()) {
                    return Err(lost());
                }
                let records = records.iter().filter_map(|r| to_publish(r, place));
                map.publish(records.collect());
                if map.pending() > self.settings.map_cache_bytes {
                    map.checkpoint(Applied {
                        store: self.store,
                        lsn,
                        segment: place.segment,
                        offset: end,
                    })?;
                }
                Ok(())
            }
            Event::Lost { first, .. } if first <= upto => Err(lost()),
            _ => Ok(()),
        })?;
        if scanned.tail.lsn < upto.0 {
            return Err(lost());
        }
        map.checkpoint(Applied {
            store: self.store,
            lsn: upto,
            segment,
            offset,
        })?;
        Ok(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::memory::MemoryIndexHome;
    use crate::sys::disk::{Dir, Disk};
    use crate::sys::sim::SimWorld;
    use crate::units::Name;
    use crate::volume::engine::Engine;
    use crate::volume::facts::{Environment, Settings, SnapshotState, Sources, VolumeOptions};
    use crate::volume::reclaim;

    struct Sim(SimWorld);

    impl Sources for Sim {
        fn open(&self, path: &str) -> Result<Arc<dyn Disk>> {
            let disk = self.0.disk(path);
            Ok(disk.ok_or_else(|| Error::new(Kind::NotFound, path))?)
        }
    }

    fn settings() -> Settings {
        Settings {
            ballast_bytes: 0,
            ..Settings::default()
        }
    }

    fn env(world: &SimWorld, index: &MemoryIndexHome) -> Environment {
        Environment {
            dir: world.dir("store"),
            index: Arc::new(index.clone()),
            sources: Arc::new(Sim(world.clone())),
            clock: Arc::new(world.clock()),
        }
    }

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    /// Rot in the last batch that the index has is rot of its content and of nothing else, however often
    /// the map is made again and the store is opened.
    #[test]
    fn rot_in_the_last_batch_is_no_end_of_the_log() {
        let (world, index) = (SimWorld::new(1), MemoryIndexHome::new());
        let disk = world.add_disk("v", 16 << 12);
        let was: Vec<u8> = (0..16u32 << 12).map(|i| (i % 251) as u8 + 1).collect();
        disk.write_all_at(0, &[&was]).unwrap();
        disk.sync_data().unwrap();
        Engine::create(&env(&world, &index), &settings()).unwrap();
        let mut engine = Engine::open(env(&world, &index), settings()).unwrap();
        let v = name("v");
        let live = engine.add_volume(&v, "v", VolumeOptions::default());
        let live = live.unwrap();
        engine.take_snapshots(&[(v.clone(), name("s"))]).unwrap();
        live.write_at(8 << 12, &[7; 4096], true).unwrap();
        live.write_at(3 << 12, &[7; 4096], true).unwrap();
        // The index has it, and no seal stands behind it.
        reclaim::checkpoint(&engine.shared).unwrap();
        let grain = &was[3 << 12..4 << 12];
        let mut rotten = 0;
        for file in world.dir("store/log").list().unwrap() {
            let path = format!("store/log/{file}");
            let bytes = world.peek(&path).unwrap();
            for at in (0..bytes.len()).step_by(4096) {
                if bytes[at..].starts_with(grain) {
                    world.poke(&path, at as u64, &[!grain[0]]);
                    rotten += 1;
                }
            }
        }
        assert_eq!(rotten, 1);
        drop(live);
        for round in 0..3 {
            if round > 0 {
                engine.rebuild_map().unwrap();
            }
            let snapshot = engine.open_snapshot(&v, &name("s")).unwrap();
            assert_eq!(snapshot.info().state, SnapshotState::Active);
            for page in 0..16usize {
                let mut bytes = vec![0; 4096];
                let read = snapshot.read_at((page as u64) << 12, &mut bytes);
                match page {
                    3 => assert_eq!(read.unwrap_err().kind(), Kind::Damaged),
                    _ => {
                        read.unwrap_or_else(|e| panic!("round {round} page {page}: {e:?}"));
                        assert!(bytes == was[page << 12..(page + 1) << 12]);
                    }
                }
            }
            drop(snapshot);
            if round == 1 {
                drop(engine);
                world.kill();
                engine = Engine::open(env(&world, &index), settings()).unwrap();
            }
        }
    }

    /// What was deleted does not come back with the log's records of it, nor do its segments stay.
    #[test]
    fn what_is_gone_stays_gone() {
        let (world, index) = (SimWorld::new(1), MemoryIndexHome::new());
        Engine::create(&env(&world, &index), &settings()).unwrap();
        let engine = Engine::open(env(&world, &index), settings()).unwrap();
        let shared = &engine.shared;
        let (a, b) = (name("a"), name("b"));
        for v in [&a, &b] {
            world.add_disk(v.as_str(), 1 << 20);
            engine
                .add_volume(v, v.as_str(), VolumeOptions::default())
                .unwrap();
        }
        for (n, snapshot) in ["p", "q"].iter().enumerate() {
            let both = [&a, &b].map(|v| (v.clone(), name(snapshot)));
            engine.take_snapshots(&both).unwrap();
            for v in [&a, &b] {
                let live = engine.volume(v).unwrap();
                live.write_at(n as u64 * 65536, &[n as u8 + 1; 200_000], true)
                    .unwrap();
            }
        }
        engine.delete_snapshot(&a, &name("p")).unwrap();
        for snapshot in ["p", "q"] {
            engine.delete_snapshot(&b, &name(snapshot)).unwrap();
        }
        engine.remove_volume(&b).unwrap();
        let settle = || {
            while engine.maintain().unwrap() {}
            reclaim::checkpoint(shared).unwrap();
            let mut pages = Vec::new();
            let mut visit = |key, page: &crate::map::page::Page| {
                let grains = page.extents().iter().map(|e| u64::from(e.count));
                pages.push(format!("{key:?} {}", grains.sum::<u64>()));
                Ok(())
            };
            shared.map.for_each_page(&mut visit).unwrap();
            (pages, shared.map.live_segments().unwrap())
        };
        let before = settle();
        assert!(!before.0.is_empty());
        engine.rebuild_map().unwrap();
        assert_eq!(settle(), before);
        assert_eq!(shared.map.volumes().len(), 1);
    }
}
