//! What happens when the thin target is full.
//!
//! Three stores of space keep a full store usable: the log's reserve, which preserved content never
//! takes; the *ballast*, a file of real blocks that is given up when a deletion, a mark of failure, a
//! new snapshot or the map needs room; and the superblock, where marks of failure always fit. The
//! ballast comes back by itself when there is space again.
//!
//! A writer whose old content cannot be preserved waits for reclaim as long as its volume says, and
//! longer while something is being reclaimed. Then the volume's policy decides: the writer gets the
//! error and nothing has changed, or every snapshot that needed the content is durably marked failed
//! *before* the overwrite. A snapshot that failed stays failed.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::disk::Open;
use crate::volume::facts::{Environment, OnFull};
use crate::volume::marks::FULL;
use crate::volume::shared::{Shared, Vol, lock};

const BALLAST: &str = "ballast";
/// The ballast is made only while this many times its size is free.
const BALLAST_MARGIN: u64 = 4;
/// How often a waiting writer looks again, whoever wakes it.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Wakes writers that wait for space.
#[derive(Default)]
pub struct Waiting {
    turn: Mutex<()>,
    freed: Condvar,
}

/// Told the inode number of each snapshot that fails.
pub type FailureWatch = Box<dyn Fn(u64) + Send + Sync>;

impl Shared {
    /// Whether the ballast is there.
    pub fn has_ballast(&self) -> bool {
        self.env.dir.open(BALLAST, Open::Read).is_ok()
    }

    /// Gives up the ballast; returns whether there was any.
    pub fn release_ballast(&self) -> bool {
        let removed = self
            .env
            .dir
            .remove(BALLAST)
            .and_then(|()| self.env.dir.sync());
        if removed.is_ok() {
            tracing::warn!("the store's disk is full: its ballast is given up");
            // What it made free is not for preserved content.
            self.log.set_keep_free(self.settings.ballast_bytes);
        }
        removed.is_ok()
    }

    /// Makes the ballast again when there is space for it. Best effort.
    pub fn restore_ballast(&self) {
        let bytes = self.settings.ballast_bytes;
        let Ok(space) = self.env.dir.space() else {
            return;
        };
        if bytes == 0 || space.available < bytes * BALLAST_MARGIN {
            return;
        }
        match make_ballast(self, bytes) {
            Ok(()) => {
                self.log.set_keep_free(0);
                if let Err(e) = self.log.make_spare(self) {
                    tracing::debug!("{}", e.chain());
                }
            }
            Err(e) => tracing::debug!("no ballast: {}", e.chain()),
        }
    }

    /// Makes room for the map: sled does not survive a full disk, so it is not asked to.
    ///
    /// # Errors
    /// `NoSpace` if there is too little, also without the ballast.
    pub fn room_for_checkpoint(&self) -> Result<()> {
        let enough = || {
            self.map_in_memory.load(Ordering::Acquire)
                || has_room_for_map(&self.env, self.map.pending())
        };
        if enough() || self.release_ballast() && enough() {
            return Ok(());
        }
        Err(Error::new(
            Kind::NoSpace,
            "too little space for a checkpoint of the extent map",
        ))
    }

    /// Whether reclaim has something to do, so that space may come back.
    pub(in crate::volume) fn reclaimable(&self) -> bool {
        !lock(&self.reclaim_due).is_empty() || self.has_free_layers()
    }

    /// Wakes writers that wait for space.
    pub fn space_freed(&self) {
        self.waiting.freed.notify_all();
    }

    fn wait_a_little(&self) {
        let waiting = lock(&self.waiting.turn);
        // Woken or not, the writer looks again.
        drop(self.waiting.freed.wait_timeout(waiting, LOOK_AGAIN));
    }

    /// Waits until space may have come back; returns false when the volume's patience is over.
    ///
    /// `since` is when the writer was first refused.
    pub fn wait_for_space(&self, vol: &Vol, since: Instant) -> bool {
        let patience = Duration::from_secs(u64::from(self.options_of(vol).on_full_wait_s));
        if self.reclaimable() {
            // Space that can be given back is, before anybody is refused.
            match crate::volume::reclaim::maintain(self) {
                Ok(_) => return true,
                Err(e) => tracing::debug!("reclaim for a waiting writer: {}", e.chain()),
            }
        }
        if since.elapsed() >= patience {
            return false;
        }
        crate::sys::watch::patiently(|| self.wait_a_little());
        true
    }

    fn options_of(&self, vol: &Vol) -> crate::volume::facts::VolumeOptions {
        let catalog = lock(&self.catalog);
        catalog
            .volumes
            .get(&vol.id)
            .map(|v| v.options)
            .unwrap_or_default()
    }

    /// The volume's policy after the wait: `Err` gives the writer the error; `Ok` means that every
    /// snapshot which needed these grains is durably failed, or that a revert has begun which needs
    /// them: the writer tries again, and waits for it.
    ///
    /// # Errors
    /// `NoSpace` under `fail-write`; under `fail-snapshot` only if not even the mark can be written.
    pub fn on_full(&self, vol: &Vol, grains: Range<u64>, full: Error) -> Result<()> {
        match self.options_of(vol).on_full {
            OnFull::FailWrite => Err(full),
            OnFull::FailSnapshot => {
                // No snapshot is half taken while this is held: the mark covers whole ones only.
                let _structure = lock(&self.structure);
                self.check_open()?;
                let entry = lock(&self.catalog).volumes.get(&vol.id).cloned();
                if entry.is_some_and(|entry| entry.reverting.is_some()) {
                    // Without its two snapshots it could go neither on nor back.
                    return Ok(());
                }
                let after = self.map.oldest_preserved(vol.id(), grains);
                let first = after.map_or(0, |epoch| epoch.0 + 1);
                let last = vol.state().epoch;
                if first > last {
                    // Somebody has preserved them meanwhile: the writer tries again.
                    return Ok(());
                }
                self.fail_snapshots(vol, first, last, FULL)
            }
        }
    }

    /// The points that failed need nothing any more; readers and listings are told.
    pub(in crate::volume) fn drop_failed_points(
        &self,
        vol: &Vol,
        failed: std::ops::RangeInclusive<u64>,
        why: &str,
    ) {
        if failed.is_empty() {
            return;
        }
        let mut inos = Vec::new();
        {
            let catalog = lock(&self.catalog);
            if let Some(entry) = catalog.volumes.get(&vol.id) {
                inos.extend(
                    entry
                        .snapshots
                        .range(failed.clone())
                        .map(|(_, snap)| snap.ino),
                );
            }
            // What is read through a snapshot fails with it.
            let clones = catalog.clones.values().filter(|c| {
                c.volume == vol.id && catalog.bottom(c.top).is_some_and(|e| failed.contains(&e))
            });
            inos.extend(clones.map(|c| c.ino));
        }
        let mut state = vol.state();
        let gone: Vec<u64> = state
            .points
            .range(failed.clone())
            .map(|(&epoch, _)| epoch)
            .collect();
        for epoch in gone {
            state.points.remove(&epoch);
            state.failed.insert(epoch, why.to_owned());
        }
        state.bookmarks.retain(|epoch| !failed.contains(epoch));
        vol.refresh(&self.map, &mut state);
        drop(state);
        self.mark_reclaim(vol.id);
        tracing::error!(
            volume = vol.id,
            "{} snapshots and clones have failed: {why}",
            inos.len()
        );
        if let Some(watch) = &*lock(&self.failure_watch) {
            inos.into_iter().for_each(watch);
        }
    }
}

/// Whether the map can write what it has pending.
pub fn has_room_for_map(env: &Environment, pending: usize) -> bool {
    const LEAST: u64 = 1 << 20;
    const MOST: u64 = 4 << 20;
    let needed = LEAST + (pending as u64).min(MOST);
    env.dir
        .space()
        .map_or(true, |space| space.available >= needed)
}

/// Before there is an engine: gives up the ballast if opening the map needs its space.
pub fn make_room_for_map(env: &Environment) {
    if !has_room_for_map(env, 0)
        && env
            .dir
            .remove(BALLAST)
            .and_then(|()| env.dir.sync())
            .is_ok()
    {
        tracing::warn!("the store's disk is full: its ballast is given up");
    }
}

/// Writes the ballast, if it is not there: bytes that no filesystem can compress away.
fn make_ballast(shared: &Shared, bytes: u64) -> Result<()> {
    let context = || "cannot make the store's ballast";
    let disk = match shared.env.dir.open(BALLAST, Open::Create) {
        Ok(disk) => disk,
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            let known = shared.env.dir.open(BALLAST, Open::Read).context(context)?;
            if known.size().context(context)? >= bytes {
                return Ok(());
            }
            // Cut short in the making; the next round makes it anew.
            return shared.env.dir.remove(BALLAST).context(context);
        }
        Err(e) => return Err(Error::io(context(), e)),
    };
    let mut stream = blake3::Hasher::new_derive_key("stillframe 2026-11 ballast")
        .update(&shared.store.0)
        .finalize_xof();
    let mut piece = vec![0; 1 << 20];
    let mut at = 0;
    let written = loop {
        if at >= bytes {
            break disk.sync_data().and_then(|()| shared.env.dir.sync());
        }
        stream.fill(&mut piece);
        let len = (bytes - at).min(piece.len() as u64);
        if let Err(e) = disk.write_all_at(at, &[&piece[..len as usize]]) {
            break Err(e);
        }
        at += len;
    };
    if written.is_err() {
        // A part of it is worth nothing, and whoever filled the disk may need the space.
        let _ = shared.env.dir.remove(BALLAST);
    }
    written.context(context)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use crate::map::memory::MemoryIndexHome;
    use crate::sys::disk::{Dir, Disk};
    use crate::sys::sim::SimWorld;
    use crate::units::Name;
    use crate::volume::catalog::{Reverting, revert_begin_record};
    use crate::volume::engine::Engine;
    use crate::volume::facts::{Settings, SnapshotState, Sources, VolumeOptions};

    struct Sim(SimWorld);

    impl Sources for Sim {
        fn open(&self, path: &str) -> Result<Arc<dyn Disk>> {
            let disk = self.0.disk(path);
            Ok(disk.ok_or_else(|| Error::new(Kind::NotFound, path))?)
        }
    }

    /// A writer whose patience ends when a revert has just begun does not take its snapshots away.
    #[test]
    fn the_policy_waits_for_a_revert() {
        let world = SimWorld::new(1);
        let settings = Settings {
            ballast_bytes: 0,
            ..Settings::default()
        };
        let env = Environment {
            dir: world.dir("store"),
            index: Arc::new(MemoryIndexHome::new()),
            sources: Arc::new(Sim(world.clone())),
            clock: Arc::new(world.clock()),
        };
        Engine::create(&env, &settings).unwrap();
        let engine = Engine::open(env, settings).unwrap();
        world.add_disk("v", 1 << 20);
        let v = Name::new("v").unwrap();
        let options = VolumeOptions {
            on_full: OnFull::FailSnapshot,
            ..VolumeOptions::default()
        };
        engine.add_volume(&v, "v", options).unwrap();
        let take = |name| engine.take_snapshots(&[(v.clone(), Name::new(name).unwrap())]);
        let target = take("a").unwrap()[0].epoch.0;
        let undo = take("b").unwrap()[0].epoch.0;
        let shared = &engine.shared;
        let vol = shared.find(&v).unwrap();
        let good = || {
            let all = engine.snapshots(&v).unwrap();
            all.iter()
                .filter(|s| s.state == SnapshotState::Active)
                .count()
        };
        let full = || Error::new(Kind::NoSpace, "full");
        let begun = revert_begin_record(vol.id, Reverting { target, undo });
        shared.append_records(vec![begun]).unwrap();
        shared.on_full(&vol, 0..1, full()).unwrap();
        assert_eq!(good(), 2);
        let ended = crate::volume::catalog::revert_end_record(vol.id, undo, 1 << 20, 1 << 20);
        shared.append_records(vec![ended]).unwrap();
        shared.on_full(&vol, 0..1, full()).unwrap();
        assert_eq!(good(), 0);
    }

    struct Stage {
        world: SimWorld,
        index: MemoryIndexHome,
        v: Name,
    }

    impl Stage {
        fn open(&self) -> Result<Arc<Engine>> {
            let settings = Settings {
                ballast_bytes: 0,
                ..Settings::default()
            };
            let env = Environment {
                dir: self.world.dir("store"),
                index: Arc::new(self.index.clone()),
                sources: Arc::new(Sim(self.world.clone())),
                clock: Arc::new(self.world.clock()),
            };
            if self.world.dir("store").list().unwrap().is_empty() {
                Engine::create(&env, &settings)?;
            }
            Engine::open(env, settings)
        }

        /// A store with a volume under `fail-snapshot`, whose first two grains are known, and snapshot `a`.
        fn new() -> (Stage, Arc<Engine>) {
            let stage = Stage {
                world: SimWorld::new(1),
                index: MemoryIndexHome::new(),
                v: Name::new("v").unwrap(),
            };
            let engine = stage.open().unwrap();
            stage.world.add_disk("v", 1 << 20);
            let options = VolumeOptions {
                on_full: OnFull::FailSnapshot,
                on_full_wait_s: 0,
                ..VolumeOptions::default()
            };
            engine.add_volume(&stage.v, "v", options).unwrap();
            let volume = engine.volume(&stage.v).unwrap();
            volume.write_at(0, &[1; 8192], false).unwrap();
            let a = (stage.v.clone(), Name::new("a").unwrap());
            engine.take_snapshots(&[a]).unwrap();
            (stage, engine)
        }
    }

    /// A writer is refused, and before its patience is over another one has preserved the same grain.
    #[test]
    fn nothing_fails_for_what_is_preserved_by_now() {
        let (stage, engine) = Stage::new();
        let shared = &engine.shared;
        let vol = shared.find(&stage.v).unwrap();
        let volume = engine.volume(&stage.v).unwrap();
        volume.write_at(0, &[2; 4096], false).unwrap();
        let full = Error::new(Kind::NoSpace, "full");
        shared.on_full(&vol, 0..1, full).unwrap();
        let a = engine.snapshot(&stage.v, &Name::new("a").unwrap()).unwrap();
        assert_eq!(a.state, SnapshotState::Active);
        assert_eq!(lock(&shared.superblock).current().invalid, []);
    }

    /// A mark that covers nothing, as a superblock may have it, keeps no store from opening.
    #[test]
    fn a_mark_of_nothing_is_passed_over_and_dropped() {
        let (stage, engine) = Stage::new();
        let id = engine.shared.find(&stage.v).unwrap().id;
        {
            let mut superblock = lock(&engine.shared.superblock);
            let mut next = superblock.current().clone();
            next.invalid.push(crate::log::superblock::InvalidMark {
                volume: id,
                first: 2,
                last: 1,
                reason: crate::log::superblock::Reason::Full,
            });
            superblock.update(next).unwrap();
        }
        drop(engine);
        stage.world.kill();
        stage.index.kill(1);
        let engine = stage.open().unwrap();
        assert_eq!(lock(&engine.shared.superblock).current().invalid, []);
        let a = engine.snapshot(&stage.v, &Name::new("a").unwrap()).unwrap();
        assert_eq!(a.state, SnapshotState::Active);
    }

    /// The space of a deleted clone comes back also where a checkpoint finds none.
    #[test]
    fn a_deleted_clone_gives_its_space_back_where_there_is_none_for_a_checkpoint() {
        let (stage, engine) = Stage::new();
        let name = |text| Name::new(text).unwrap();
        engine
            .clone_snapshot(&stage.v, &name("a"), &name("c"))
            .unwrap();
        let clone = engine.open_clone(&stage.v, &name("c")).unwrap();
        clone.write_at(0, &vec![7; 512 << 10], false).unwrap();
        drop(clone);
        let used = stage.world.allocated("store");
        stage.world.set_space("store", Some(used + (300 << 10)));
        engine
            .take_snapshots(&[(stage.v.clone(), name("b"))])
            .unwrap();
        engine.delete_snapshot(&stage.v, &name("b")).unwrap();
        engine.delete_clone(&stage.v, &name("c")).unwrap();
        let before = stage.world.allocated("store");
        let refused = engine.maintain().map_err(|e| e.kind());
        assert_eq!(refused.unwrap_err(), Kind::NoSpace, "not the case meant");
        assert!(stage.world.allocated("store") + (512 << 10) <= before);
    }

    /// The process dies or the power fails at every operation of an overwrite that costs the snapshot, in
    /// many ways: as soon as a new byte may be on the source the snapshot has failed, for good.
    #[test]
    fn a_snapshot_has_failed_durably_before_a_new_byte_is_written() {
        let (stage, engine) = Stage::new();
        drop(engine);
        stage.world.kill();
        let (mut kept, mut failed, mut written) = (0, 0, 0);
        for seed in 0..60 {
            for call in 1.. {
                let life = Stage {
                    world: stage.world.fork(seed * 1000 + call),
                    index: MemoryIndexHome::new(),
                    v: stage.v.clone(),
                };
                let world = &life.world;
                let engine = life.open().unwrap();
                world.set_space("store", Some(world.allocated("store")));
                let volume = engine.volume(&life.v).unwrap();
                world.die_at(call);
                let answered = volume.write_at(0, &[2; 4096], false).is_ok();
                let died = world.is_dead();
                drop((volume, engine));
                match seed % 4 {
                    0 => world.kill(),
                    _ => world.power_cut(),
                }
                if seed % 2 == 0 {
                    world.set_space("store", None);
                }
                let new = world.peek("v").unwrap()[..4096].contains(&2);
                let what = format!("seed {seed}, call {call}");
                let engine = life.open().unwrap();
                let a = Name::new("a").unwrap();
                let state = engine.snapshot(&life.v, &a).unwrap().state;
                let mut bytes = [0; 4096];
                let read = engine
                    .open_snapshot(&life.v, &a)
                    .and_then(|snapshot| snapshot.read_at(0, &mut bytes));
                match state {
                    SnapshotState::Active => {
                        assert!(!answered && !new, "{what}: not failed");
                        read.unwrap();
                        assert!(bytes == [1; 4096], "{what}: other bytes");
                        kept += 1;
                    }
                    _ => {
                        assert!(read.is_err(), "{what}: a failed snapshot is read");
                        failed += u64::from(!new);
                        written += u64::from(new);
                    }
                }
                if !died {
                    assert!(answered, "{what}: refused");
                    break;
                }
            }
        }
        println!("{kept} kept, {failed} failed before a byte was written, {written} after");
        assert!(kept > 60 && failed > 60 && written > 20);
    }
}
