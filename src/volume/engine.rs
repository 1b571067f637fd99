//! The engine's face: one open store, its volumes, its snapshots.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use crate::error::{Error, IoContext, Kind, Result};
use crate::log::record::{Record, RecordType};
use crate::map::GrainSet;
use crate::sys::disk::Space;
use crate::units::{Epoch, Name, Uuid, VOLUME_SIZE_MAX, VolumeId};
use crate::volume::catalog::{INO_PER_VOLUME, SnapEntry, Trust, VolumeEntry, volume_record};
use crate::volume::facts::{
    Environment, Settings, SnapshotInfo, ThinInfo, VolumeOptions, VolumeState,
};
use crate::volume::live::{Volume, flush, note_failed_sync};
use crate::volume::read::Snapshot;
use crate::volume::shared::{Shared, Vol, lock};
use crate::volume::{bookmarks, reclaim, recovery, snapshots};

/// Most volumes of one store.
const VOLUMES_MAX: usize = 4096;

/// One open store. All methods may be called from any thread.
pub struct Engine {
    pub(in crate::volume) shared: Arc<Shared>,
}

impl Engine {
    /// Makes an empty store in the directory.
    ///
    /// # Errors
    /// `Exists` if there is a store, `Invalid` for a bad setting, the system's errors.
    pub fn create(env: &Environment, settings: &Settings) -> Result<()> {
        recovery::create(env, settings)
    }

    /// Opens a store and recovers it; nothing is served before recovery is complete.
    ///
    /// # Errors
    /// `NotFound` if there is no store, `Unsupported` if it is newer, `Damaged`, `NoSpace`, `Io`.
    pub fn open(env: Environment, settings: Settings) -> Result<Arc<Engine>> {
        Ok(Arc::new(Engine {
            shared: recovery::open(env, settings)?,
        }))
    }

    /// The store's uuid.
    pub fn uuid(&self) -> Uuid {
        self.shared.store
    }

    pub(in crate::volume) fn handle(&self, vol: Arc<Vol>) -> Arc<Volume> {
        Arc::new(Volume {
            shared: Arc::clone(&self.shared),
            vol,
        })
    }

    /// Puts a source under protection; durable when it returns.
    ///
    /// # Errors
    /// `Exists` (the name, or the source is a volume already), those of opening a source, `Limit`,
    /// `NoSpace`, `Io`.
    pub fn add_volume(
        &self,
        name: &Name,
        source: &str,
        options: VolumeOptions,
    ) -> Result<Arc<Volume>> {
        let shared = &self.shared;
        let _structure = lock(&shared.structure);
        shared.check_open()?;
        {
            let catalog = lock(&shared.catalog);
            if catalog.find(name).is_some() {
                let why = format!("there is a volume '{name}' already");
                return Err(Error::new(Kind::Exists, why));
            }
            if let Some(other) = catalog.volumes.values().find(|v| v.source == source) {
                let why = format!("the source is volume '{}' already", other.name);
                return Err(Error::new(Kind::Exists, why));
            }
            if catalog.volumes.len() >= VOLUMES_MAX {
                let why = format!("a store holds at most {VOLUMES_MAX} volumes");
                return Err(Error::new(Kind::Limit, why));
            }
        }
        let disk = shared.env.sources.open(source)?;
        let size = disk
            .size()
            .context(|| format!("cannot tell the size of {source}"))?;
        if size > VOLUME_SIZE_MAX {
            return Err(Error::new(
                Kind::Limit,
                format!("{source} is larger than 8 EiB"),
            ));
        }
        let identity = disk
            .identity()
            .context(|| format!("cannot stat {source}"))?;
        let random = shared
            .env
            .clock
            .random()
            .context(|| "no random bytes for a uuid")?;
        let now = shared.env.clock.now_ns();
        let (id, ino_base) = {
            let catalog = lock(&shared.catalog);
            (catalog.next_volume, catalog.next_ino)
        };
        let entry = VolumeEntry {
            uuid: Uuid::from_random(random),
            name: name.clone(),
            source: source.to_owned(),
            size,
            grain: options.grain,
            options,
            ino_base,
            added_ns: now,
            epoch: 0,
            mtime_ns: now,
            snap_mtime_ns: 0,
            changed: true,
            trust: Trust::Known,
            identity,
            resizing: None,
            reverting: None,
            snapshots: Default::default(),
            bookmarks: Default::default(),
            kept: Default::default(),
        };
        ino_base
            .checked_add(INO_PER_VOLUME)
            .expect("inode numbers outlast the store");
        shared.append_records(vec![volume_record(id, &entry)])?;
        let vol = Arc::new(Vol::new(id, &entry, Some(disk)));
        recovery::insert_volume(shared, Arc::clone(&vol));
        Ok(self.handle(vol))
    }

    /// Forgets a volume; the source stays as it is. Durable when it returns.
    ///
    /// # Errors
    /// `NotFound`, `Busy` while it has snapshots or clones (bookmarks go along with it), `NoSpace`, `Io`.
    pub fn remove_volume(&self, name: &Name) -> Result<()> {
        let shared = &self.shared;
        let _structure = lock(&shared.structure);
        shared.check_open()?;
        let vol = shared.find(name)?;
        vol.state().idle(name)?;
        let (count, clones) = {
            let catalog = lock(&shared.catalog);
            let snapshots = catalog
                .volumes
                .get(&vol.id)
                .map_or(0, |v| v.snapshots.len());
            let clones = catalog.clones.values().filter(|c| c.volume == vol.id);
            (snapshots, clones.count())
        };
        if clones > 0 {
            let why = format!("volume '{name}' has {clones} clones; delete them first");
            return Err(Error::new(Kind::Busy, why));
        }
        if count > 0 || !vol.state().pins.is_empty() {
            return Err(Error::new(
                Kind::Busy,
                format!("volume '{name}' has {count} snapshots; delete them first"),
            ));
        }
        // No write is under way from here on, and later ones find the volume removed.
        let _gate = vol.gate.write().unwrap_or_else(PoisonError::into_inner);
        // What goes with the daemon anyway needs no sync.
        let named = vol.source.is_some() && vol.named().is_ok();
        if named && !matches!(vol.state().health, VolumeState::Suspect(_)) {
            flush(&vol)?;
        }
        let removed = Record::plain(RecordType::VolumeRemoved, vol.id, 0, Vec::new());
        shared.append_records(vec![removed])?;
        vol.state().removed = true;
        shared
            .volumes
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&vol.id);
        shared.map.forget_volume(vol.id())?;
        shared.segments_due.store(true, Ordering::Release);
        Ok(())
    }

    /// The volumes, by name.
    pub fn volumes(&self) -> Vec<Arc<Volume>> {
        let volumes = self
            .shared
            .volumes
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let mut vols: Vec<Arc<Vol>> = volumes.values().cloned().collect();
        drop(volumes);
        let catalog = lock(&self.shared.catalog);
        vols.sort_by_key(|vol| catalog.volumes.get(&vol.id).map(|v| v.name.clone()));
        drop(catalog);
        vols.into_iter().map(|vol| self.handle(vol)).collect()
    }

    /// A volume by name.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn volume(&self, name: &Name) -> Result<Arc<Volume>> {
        Ok(self.handle(self.shared.find(name)?))
    }

    /// Declares a changed, unverified or suspect volume's source good as it is; durable when it
    /// returns. Snapshots keep reading their clean blocks from it; bookmarks of a changed one fail.
    ///
    /// # Errors
    /// `NotFound`, `Failed` if the source is missing or has another size, `NoSpace`, `Io`.
    pub fn accept_volume(&self, name: &Name) -> Result<()> {
        let shared = &self.shared;
        let _structure = lock(&shared.structure);
        shared.check_open()?;
        let vol = shared.find(name)?;
        vol.state().idle(name)?;
        let source = vol.source()?;
        let identity = source.identity().context(|| "cannot stat the source")?;
        vol.named()?;
        let entry = lock(&shared.catalog).volumes.get(&vol.id).cloned();
        if !entry.is_some_and(|entry| entry.allows(&identity)) {
            return Err(Error::new(
                Kind::Failed,
                format!(
                    "the source of '{name}' has {} bytes and the volume {}; \
                     bring it back to that size first",
                    identity.size,
                    vol.size()
                ),
            ));
        }
        // No flush is under way, so none can fail unseen behind the new state.
        let _sync = lock(&vol.sync);
        // What is accepted is what the medium has: after a failed sync the cache may show more.
        source
            .sync_data()
            .inspect_err(|e| note_failed_sync(&vol, e))
            .and_then(|()| source.drop_cache())
            .context(|| "cannot make the source durable")?;
        if vol.state().trust == Trust::Changed {
            bookmarks::fail_all(shared, &vol, "the source was changed and accepted so")?;
        }
        let now = shared.env.clock.now_ns();
        self.change_entry(&vol, |entry, state| {
            entry.identity = identity;
            entry.trust = Trust::Known;
            state.note_change(now);
        })?;
        let mut state = vol.state();
        state.trust = Trust::Known;
        state.health = VolumeState::Active;
        vol.dirty.store(true, Ordering::Release);
        drop(state);
        self.handle(Arc::clone(&vol)).abandon_revert()
    }

    /// Changes the policy for a full thin target; the grain stays.
    ///
    /// # Errors
    /// `NotFound`, `NoSpace`, `Io`.
    pub fn set_volume(&self, name: &Name, options: VolumeOptions) -> Result<()> {
        let _structure = lock(&self.shared.structure);
        self.shared.check_open()?;
        let vol = self.shared.find(name)?;
        vol.state().idle(name)?;
        let options = VolumeOptions {
            grain: vol.grain,
            ..options
        };
        self.change_entry(&vol, |entry, _| entry.options = options)
    }

    /// Appends a volume's changed attributes. The caller holds `structure`.
    pub(in crate::volume) fn change_entry(
        &self,
        vol: &Vol,
        change: impl FnOnce(&mut VolumeEntry, &mut crate::volume::shared::VolState),
    ) -> Result<()> {
        let catalog = self.shared.current_catalog();
        let Some(mut entry) = catalog.volumes.get(&vol.id).cloned() else {
            return Err(Error::new(Kind::NotFound, "the volume was removed"));
        };
        {
            let mut state = vol.state();
            change(&mut entry, &mut state);
            entry.mtime_ns = state.mtime_ns;
            entry.changed = state.changed;
        }
        self.shared
            .append_records(vec![volume_record(vol.id, &entry)])
            .map(drop)
    }

    /// Takes snapshots of several volumes, given as (volume, name), at one instant; durable when it
    /// returns.
    ///
    /// # Errors
    /// `NotFound`, `Exists`, `Invalid`, `Failed`, `Limit`, `NoSpace`, `Io`; then there is none.
    pub fn take_snapshots(&self, targets: &[(Name, Name)]) -> Result<Vec<SnapshotInfo>> {
        snapshots::take(&self.shared, targets)
    }

    /// Deletes a snapshot; durable when it returns, space follows in [`Engine::maintain`].
    ///
    /// # Errors
    /// `NotFound`, `NoSpace`, `Io`: the snapshot stays.
    pub fn delete_snapshot(&self, volume: &Name, name: &Name) -> Result<()> {
        snapshots::delete(&self.shared, volume, name, false)
    }

    /// Puts a snapshot on hold (it cannot be deleted) or releases it; durable when it returns.
    ///
    /// # Errors
    /// `NotFound`, `NoSpace`, `Io`.
    pub fn hold_snapshot(&self, volume: &Name, name: &Name, held: bool) -> Result<()> {
        snapshots::hold(&self.shared, volume, name, held)
    }

    /// Renames a snapshot; durable when it returns.
    ///
    /// # Errors
    /// `NotFound`, `Exists`, `NoSpace`, `Io`.
    pub fn rename_snapshot(&self, volume: &Name, name: &Name, new: &Name) -> Result<()> {
        snapshots::rename(&self.shared, volume, name, new)
    }

    /// The snapshots of a volume, oldest first.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn snapshots(&self, volume: &Name) -> Result<Vec<SnapshotInfo>> {
        snapshots::list(&self.shared, volume)
    }

    /// The latest instant of a volume's snapshots, in nanoseconds since 1970; none without snapshots.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn newest_snapshot_ns(&self, volume: &Name) -> Result<Option<i64>> {
        snapshots::newest_ns(&self.shared, volume)
    }

    /// One snapshot.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn snapshot(&self, volume: &Name, name: &Name) -> Result<SnapshotInfo> {
        let (vol, epoch, snap): (_, _, SnapEntry) = snapshots::find(&self.shared, volume, name)?;
        Ok(snapshots::info_of(&self.shared, &vol, epoch, &snap))
    }

    /// Opens a snapshot for reading; its data stays until the handle is dropped.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn open_snapshot(&self, volume: &Name, name: &Name) -> Result<Arc<Snapshot>> {
        snapshots::open(&self.shared, volume, name)
    }

    /// The grains changed in the epochs `from <= e < to`, to the newest without a `to`.
    pub(in crate::volume) fn changed_grains(
        &self,
        volume: VolumeId,
        from: Epoch,
        to: Option<Epoch>,
    ) -> GrainSet {
        self.shared.map.changed_between(volume, from, to)
    }

    /// Does background work that is due (checkpoint, reclaim, seal); returns whether there was any.
    /// To be called from one thread, about once a second.
    ///
    /// # Errors
    /// `NoSpace`, `Damaged`, `Io`: nothing is lost, it is tried again at the next call.
    pub fn maintain(&self) -> Result<bool> {
        reclaim::maintain(&self.shared)
    }

    /// Has `watch` told the inode number of each snapshot that fails, so that a cache above can
    /// forget its pages. Called from the thread that found it out: it must not call back.
    pub fn watch_failures(&self, watch: impl Fn(u64) + Send + Sync + 'static) {
        *lock(&self.shared.failure_watch) = Some(Box::new(watch));
    }

    /// Bytes of storage the log uses.
    ///
    /// # Errors
    /// `Io`.
    pub fn log_bytes(&self) -> Result<u64> {
        self.shared.log.allocated()
    }

    /// How much of the thin target is used, and how fast that grows. The growth is known after
    /// [`Engine::maintain`] was called for a minute.
    ///
    /// # Errors
    /// `Io`.
    pub fn thin(&self) -> Result<ThinInfo> {
        self.shared.thin_info()
    }

    /// The space that preserved content has: of the store's filesystem, or of the limit if that has
    /// less. With a limit it may be a second old.
    ///
    /// # Errors
    /// `Io`.
    pub fn space(&self) -> Result<Space> {
        self.shared.space_shown()
    }

    /// Clean stop: drains, makes the sources durable, checkpoints, marks the store clean. The engine
    /// refuses work afterwards.
    ///
    /// # Errors
    /// The first error; the store is then unclean, nothing is lost. (The sync of a clone may fail and
    /// leave it clean: the next start looks at that clone as after an unclean stop.)
    pub fn close(&self) -> Result<()> {
        recovery::close(&self.shared)
    }
}
