//! Clones at run time: layers, the stacks of them that clones read through, and their registry.
//!
//! A grain is read from the topmost layer that holds it, else from the snapshot at the bottom, as far
//! as that shows through. Layers below the top one are never written, so a reader needs no lock but
//! for a look at the sets. A layer that the catalogue no longer has is *doomed*: its files go when the
//! last stack that names it is gone.
//!
//! Locks, after those of [`crate::volume`]: a clone's gate and a range of its grains stand where a
//! volume's do; then `catalog`, the registry, a clone's state, a volume's state.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use crate::error::{Error, IoContext, Kind, Result};
use crate::log::keys::Keys;
use crate::map::GrainSet;
use crate::sys::disk::Dir;
use crate::units::{Epoch, Grain};
use crate::volume::catalog::Catalog;
use crate::volume::clone_records::{CloneEntry, LAYER_BIT, layer_volume};
use crate::volume::facts::SnapshotState;
use crate::volume::overlay::{self, Home, Overlay};
use crate::volume::range_lock::RangeLock;
use crate::volume::read::Snapshot;
use crate::volume::shared::{Point, Shared, Vol, lock};
use crate::volume::snapshots::info_of;
use crate::volume::sums::Sums;

/// A layer.
pub struct Layer {
    pub id: u32,
    pub overlay: Overlay,
    /// The grains that lie in it.
    pub set: Mutex<GrainSet>,
}

/// A layer in a stack.
#[derive(Clone)]
pub struct Level {
    pub layer: Arc<Layer>,
    /// Bytes of what lies beneath that show through.
    pub visible: u64,
}

/// What a clone reads through, top first.
#[derive(Default)]
pub struct Stack {
    pub levels: Vec<Level>,
    /// Epoch of the snapshot at the bottom.
    pub base: Option<u64>,
}

/// One clone at run time.
pub struct CloneRt {
    pub id: u32,
    pub vol: Arc<Vol>,
    /// Writers share it; what changes the clone's layers or its entry excludes them.
    pub gate: RwLock<()>,
    pub ranges: RangeLock,
    state: Mutex<CloneState>,
}

/// The changing part of a clone.
pub struct CloneState {
    pub entry: CloneEntry,
    pub stack: Arc<Stack>,
    /// The snapshot at the bottom, while the clone is open.
    pub base: Option<Arc<Snapshot>>,
    /// Open handles.
    pub handles: usize,
    pub mtime_ns: i64,
    pub deleted: bool,
    /// The log did not take what was to be said of it, and might say it after a crash.
    pub broken: Option<String>,
}

/// All clones and layers of an open store.
pub struct Clones {
    pub home: Arc<Home>,
    keys: Keys,
    pub by_id: BTreeMap<u32, Arc<CloneRt>>,
    layers: BTreeMap<u32, Arc<Layer>>,
    doomed: Vec<Arc<Layer>>,
}

/// A clone as one call sees it.
pub struct View {
    grain: Grain,
    pub stack: Arc<Stack>,
    base: Option<Arc<Snapshot>>,
    pub size: u64,
    pub growing: bool,
}

/// Where a run of bytes is to be read.
enum From<'a> {
    Overlay(&'a Overlay),
    Base(&'a Snapshot),
    Zero,
}

impl Clones {
    /// No clones yet.
    pub fn new(home: Home, keys: Keys) -> Clones {
        Clones {
            home: Arc::new(home),
            keys,
            by_id: BTreeMap::new(),
            layers: BTreeMap::new(),
            doomed: Vec::new(),
        }
    }

    fn layer(
        &mut self,
        (id, grain): (u32, Option<Grain>),
        set: GrainSet,
        files: &[String],
    ) -> Arc<Layer> {
        let (home, keys) = (&self.home, &self.keys);
        let sums = |grain: Grain| Sums::new(Arc::clone(home), id, grain.bytes(), keys.clone());
        let new = || {
            Arc::new(Layer {
                id,
                overlay: Overlay::new(Arc::clone(home), id, files, grain.map(sums)),
                set: Mutex::new(set),
            })
        };
        Arc::clone(self.layers.entry(id).or_insert_with(new))
    }

    /// The stack over a clone's top layer; new layers are empty.
    pub fn stack(&mut self, catalog: &Catalog, top: u32) -> Arc<Stack> {
        let levels = catalog.chain(top).into_iter().map(|(id, entry)| Level {
            layer: self.layer((id, grain_of(catalog, entry.volume)), GrainSet::new(), &[]),
            visible: entry.visible,
        });
        let levels = levels.collect();
        let base = catalog.bottom(top);
        Arc::new(Stack { levels, base })
    }

    /// The layers of a volume's clones.
    pub fn layers_of(&self, volume: u32) -> Vec<Arc<Layer>> {
        let clones = self.by_id.values().filter(|c| c.vol.id == volume);
        let mut found: BTreeMap<u32, Arc<Layer>> = BTreeMap::new();
        for clone in clones {
            let stack = Arc::clone(&clone.state().stack);
            for level in &stack.levels {
                found.insert(level.layer.id, Arc::clone(&level.layer));
            }
        }
        found.into_values().collect()
    }

    /// Takes layers that the catalogue no longer has out of use.
    fn doom(&mut self, catalog: &Catalog) {
        let gone: Vec<u32> = self
            .layers
            .keys()
            .filter(|id| !catalog.layers.contains_key(id))
            .copied()
            .collect();
        let gone = gone.iter().filter_map(|id| self.layers.remove(id));
        self.doomed.extend(gone);
    }
}

fn grain_of(catalog: &Catalog, volume: u32) -> Option<Grain> {
    catalog.volumes.get(&volume).map(|v| v.grain)
}

impl CloneRt {
    fn new(id: u32, vol: Arc<Vol>, entry: CloneEntry, stack: Arc<Stack>) -> CloneRt {
        let state = CloneState {
            mtime_ns: entry.created_ns,
            entry,
            stack,
            base: None,
            handles: 0,
            deleted: false,
            broken: None,
        };
        CloneRt {
            id,
            vol,
            gate: RwLock::new(()),
            ranges: RangeLock::default(),
            state: Mutex::new(state),
        }
    }

    pub fn state(&self) -> MutexGuard<'_, CloneState> {
        lock(&self.state)
    }

    /// What there is to read.
    ///
    /// # Errors
    /// `Failed` once the clone has failed.
    pub fn view(&self) -> Result<View> {
        let state = self.state();
        if let SnapshotState::Failed(why) = &state.entry.state {
            let name = &state.entry.name;
            let why = format!("clone {}@{name} has failed: {why}", self.vol.name);
            return Err(Error::new(Kind::Failed, why));
        }
        Ok(View {
            grain: self.vol.grain,
            stack: Arc::clone(&state.stack),
            base: state.base.clone(),
            size: state.entry.size,
            growing: state.entry.growing,
        })
    }

    /// The view of a writer.
    ///
    /// # Errors
    /// `Failed`, also after a failed sync.
    pub fn writable(&self) -> Result<View> {
        let view = self.view()?;
        if let Some(why) = &self.state().broken {
            return Err(Error::new(Kind::Failed, why.clone()));
        }
        view.top()?.overlay.check()?;
        Ok(view)
    }

    /// Notes that content is about to change.
    pub fn note_change(&self, now_ns: i64) {
        let mut state = self.state();
        state.mtime_ns = state.mtime_ns.max(now_ns);
    }
}

impl View {
    /// Grain of the volume.
    pub fn grain(&self) -> Grain {
        self.grain
    }

    /// The layer that is written.
    ///
    /// # Errors
    /// `Failed` if the catalogue does not know it.
    pub fn top(&self) -> Result<&Arc<Layer>> {
        let top = self.stack.levels.first().map(|level| &level.layer);
        top.ok_or_else(|| Error::new(Kind::Failed, "the clone has no layer"))
    }

    /// Where the bytes at `at` lie, and how far that holds, at most to
    /// `limit`, which is above.
    fn find(&self, at: u64, limit: u64) -> Result<(From<'_>, u64)> {
        let grain = at / self.grain.bytes();
        let mut limit = limit;
        for level in &self.stack.levels {
            let grains = grain..limit.div_ceil(self.grain.bytes());
            let set = lock(&level.layer.set);
            if set.contains(grain) {
                let end = set.gaps_in(grains).next().map(|gap| gap.start);
                let end = end.map_or(limit, |g| g * self.grain.bytes());
                return Ok((From::Overlay(&level.layer.overlay), end.min(limit)));
            }
            if let Some(run) = set.ranges_in(grains).next() {
                limit = limit.min(run.start * self.grain.bytes());
            }
            drop(set);
            if at >= level.visible {
                return Ok((From::Zero, limit));
            }
            limit = limit.min(level.visible);
        }
        match (self.stack.base, &self.base) {
            (None, _) => Ok((From::Zero, limit)),
            (Some(_), Some(base)) => Ok((From::Base(base), limit)),
            (Some(_), None) => Err(Error::new(
                Kind::Failed,
                "the snapshot below a clone is not open",
            )),
        }
    }

    /// Reads; the caller has checked the range.
    ///
    /// # Errors
    /// `Failed`, `Damaged`, `Io`.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let (place, stop) = self.find(at, end)?;
            let out = &mut buf[(at - offset) as usize..(stop - offset) as usize];
            match place {
                From::Overlay(overlay) => overlay.read(at, out)?,
                From::Base(base) => base.read_at(at, out)?,
                From::Zero => out.fill(0),
            }
            at = stop;
        }
        Ok(())
    }

    /// The first data (`want_data`) or hole in a range.
    ///
    /// # Errors
    /// As [`View::read`].
    pub fn seek(&self, range: Range<u64>, want_data: bool) -> Result<Option<u64>> {
        let mut at = range.start;
        // The bottom's answer holds until there, however many runs of other layers lie before it.
        let mut base_next: Option<u64> = None;
        while at < range.end {
            let (place, stop) = self.find(at, range.end)?;
            let found = match place {
                From::Overlay(overlay) => overlay.seek(at..stop, want_data)?,
                From::Zero => (!want_data).then_some(at),
                From::Base(base) => {
                    if base_next.is_none_or(|next| next < at) {
                        base_next = Some(match want_data {
                            true => base.next_data(at)?.unwrap_or(u64::MAX),
                            false => base.next_hole(at)?,
                        });
                    }
                    base_next.filter(|&next| next < stop)
                }
            };
            if found.is_some() {
                return Ok(found);
            }
            at = stop;
        }
        Ok(None)
    }
}

impl Shared {
    /// A clone that was just made durable, or is known from the log.
    pub fn insert_clone(&self, id: u32) -> Option<Arc<CloneRt>> {
        let catalog = lock(&self.catalog);
        let entry = catalog.clones.get(&id)?.clone();
        let vol = self.vol(entry.volume)?;
        let mut clones = lock(&self.clones);
        let stack = clones.stack(&catalog, entry.top);
        let clone = Arc::new(CloneRt::new(id, vol, entry, stack));
        clones.by_id.insert(id, Arc::clone(&clone));
        Some(clone)
    }

    /// Takes over a clone's entry and layers from the catalogue, which has just changed them, and at the
    /// same moment the snapshot at their bottom, if that is a new one: whoever reads sees both or
    /// neither.
    pub fn refresh_clone(&self, clone: &CloneRt, base: Option<Arc<Snapshot>>) {
        let catalog = lock(&self.catalog);
        let Some(entry) = catalog.clones.get(&clone.id).cloned() else {
            return;
        };
        let stack = lock(&self.clones).stack(&catalog, entry.top);
        let mut state = clone.state();
        state.entry = entry;
        state.stack = stack;
        let epoch = state.stack.base;
        let fits = |open: &Arc<Snapshot>| Some(open.info().epoch.0) == epoch;
        let old = state.base.take();
        let (wanted, unused): (Vec<_>, Vec<_>) = [old, base].into_iter().flatten().partition(fits);
        state.base = wanted.first().cloned();
        drop(state);
        drop(catalog);
        // Their drop takes the volume's state.
        drop((wanted, unused));
    }

    /// After layers have left the catalogue: they and the snapshots that only they kept are let go.
    pub fn release_layers(&self, vol: &Vol) {
        let catalog = lock(&self.catalog);
        lock(&self.clones).doom(&catalog);
        let entry = catalog.volumes.get(&vol.id);
        let mut state = vol.state();
        let gone: Vec<u64> = state
            .points
            .iter()
            .filter(|(epoch, point)| {
                **point == Point::Kept && entry.is_none_or(|e| !e.kept.contains_key(epoch))
            })
            .map(|(&epoch, _)| epoch)
            .collect();
        drop(catalog);
        for epoch in &gone {
            match state.pins.contains_key(epoch) {
                true => drop(state.points.insert(*epoch, Point::Deleted)),
                false => drop(state.points.remove(epoch)),
            }
        }
        vol.refresh(&self.map, &mut state);
        drop(state);
        if !gone.is_empty() {
            self.mark_reclaim(vol.id);
        }
    }

    /// Whether there are files that [`Shared::remove_doomed_layers`] would remove.
    pub fn has_free_layers(&self) -> bool {
        let clones = lock(&self.clones);
        clones.doomed.iter().any(|l| Arc::strong_count(l) == 1)
    }

    /// Makes checksums of what nobody writes any more, as far as `budget` bytes of reading go. The
    /// caller keeps the removal of layers away.
    pub fn seal_layers(&self, rounds: u32, budget: u64) {
        let layers: Vec<Arc<Layer>> = lock(&self.clones).layers.values().cloned().collect();
        let mut left = budget;
        for layer in layers {
            let used = layer.overlay.has_open_files();
            let held = || lock(&layer.set).clone();
            match layer.overlay.seal(&held, rounds, left) {
                Ok(bytes) => left = left.saturating_sub(bytes),
                // It stays with the overlay, which says so to whoever uses it.
                Err(e) => tracing::debug!(layer = layer.id, "{}", e.chain()),
            }
            if !used && layer.overlay.has_open_files() {
                // Clones that nobody has open hold no descriptors.
                layer.overlay.close_files_again();
            }
        }
    }

    /// Removes the files of doomed layers that nobody reads any more; returns whether there were any.
    ///
    /// # Errors
    /// `Io`, `NoSpace`: it is tried again.
    pub fn remove_doomed_layers(&self) -> Result<bool> {
        let free: Vec<Arc<Layer>> = {
            let mut clones = lock(&self.clones);
            let doomed = std::mem::take(&mut clones.doomed);
            // Nobody but a stack gives away a doomed layer, so one reference stays one.
            let (free, used) = doomed.into_iter().partition(|l| Arc::strong_count(l) == 1);
            clones.doomed = used;
            free
        };
        let worked = !free.is_empty();
        let mut first = Ok(());
        for layer in free {
            let gone = layer.overlay.remove();
            if let Err(e) = gone.and_then(|()| self.map.forget_volume(layer_volume(layer.id))) {
                lock(&self.clones).doomed.push(layer);
                first = first.and(Err(e));
            }
        }
        first.map(|()| worked)
    }

    /// Opens a snapshot of a clone's volume, listed or kept; `None` if there is no such one.
    pub fn open_snapshot_of(
        self: &Arc<Shared>,
        clone: &CloneRt,
        epoch: u64,
    ) -> Option<Arc<Snapshot>> {
        let snap = {
            let catalog = lock(&self.catalog);
            let snap = catalog.snapshot_or_kept(clone.vol.id, epoch)?.clone();
            // Pinned while it is in the catalogue: a deletion looks for pins after it has left.
            clone.vol.pin(epoch, &snap.state);
            snap
        };
        let info = info_of(self, &clone.vol, epoch, &snap);
        let vol = Arc::clone(&clone.vol);
        Some(Arc::new(Snapshot::pinned(Arc::clone(self), vol, info)))
    }

    /// Opens the snapshot at the bottom of a clone that is being opened. If another one takes its place
    /// meanwhile, that one comes with its base ([`Shared::refresh_clone`]).
    pub fn open_base(self: &Arc<Shared>, clone: &CloneRt) {
        let epoch = {
            let state = clone.state();
            state.stack.base.filter(|_| state.base.is_none())
        };
        let Some(epoch) = epoch else { return };
        let Some(base) = self.open_snapshot_of(clone, epoch) else {
            return;
        };
        let mut state = clone.state();
        let unused = match state.stack.base == Some(epoch) && state.base.is_none() {
            true => state.base.replace(base),
            false => Some(base),
        };
        // Its drop takes the volume's state.
        drop(state);
        drop(unused);
    }

    /// A clone was marked failed: readers and listings are told.
    pub(in crate::volume) fn drop_failed_clone(&self, id: u32, why: &str) {
        let clone = lock(&self.clones).by_id.get(&id).cloned();
        if let Some(clone) = clone {
            let mut state = clone.state();
            state.entry.state = SnapshotState::Failed(why.to_owned());
            let ino = state.entry.ino;
            drop(state);
            if let Some(watch) = &*lock(&self.failure_watch) {
                watch(ino);
            }
        }
    }

    /// Brings up the clones of a store that is being opened, and removes overlays of none; with `keep`,
    /// because a part of the log was lost, it removes nothing. What is wrong with the files of one clone
    /// is a fault of that clone.
    ///
    /// # Errors
    /// `Io`, `NoSpace`: of the directory of all overlays.
    pub fn recover_clones(&self, clean: bool, keep: bool) -> Result<()> {
        let (layers, ids) = {
            let catalog = lock(&self.catalog);
            let layers: Vec<(u32, Option<Grain>)> = catalog
                .layers
                .iter()
                .map(|(&id, entry)| (id, grain_of(&catalog, entry.volume)))
                .collect();
            let ids: Vec<u32> = catalog.clones.keys().copied().collect();
            (layers, ids)
        };
        let home = Arc::clone(&lock(&self.clones).home);
        let dir = home.dir(false)?;
        let mut files = match &dir {
            Some(dir) => overlay::files(dir.as_ref())?,
            None => BTreeMap::new(),
        };
        for (id, grain) in layers {
            let set = self.map.changed_between(layer_volume(id), Epoch(0), None);
            let names = files.remove(&id).unwrap_or_default();
            let layer = lock(&self.clones).layer((id, grain), set, &names);
            if !clean {
                layer.overlay.settle();
            }
        }
        if let Some(dir) = &dir {
            self.clear_orphans(dir.as_ref(), files, keep);
            if !clean {
                // A predecessor may have made a file and not its name durable.
                dir.sync()
                    .context(|| "cannot sync the overlays' directory")?;
            }
        }
        for id in ids {
            if let Some(clone) = self.insert_clone(id) {
                self.recover_clone(&clone, clean);
            }
        }
        Ok(())
    }

    /// Removes overlays of layers that the catalogue does not have, or sets them aside where it may be
    /// the record of the layer that is missing. What fails costs space.
    fn clear_orphans(&self, dir: &dyn Dir, files: BTreeMap<u32, Vec<String>>, keep: bool) {
        let catalog = lock(&self.catalog);
        // A file is made after its layer's CLONE is durable. So a number that was never given says that
        // the record was lost, also where that looked like a torn end of the log.
        let next = catalog.next_layer;
        let (lost, gone): (Vec<_>, Vec<_>) = files
            .into_iter()
            .partition(|(layer, _)| keep || *layer >= next);
        let newest = lost.last().map(|(layer, _)| *layer);
        drop(catalog);
        let names = |files: Vec<(u32, Vec<String>)>| -> Vec<String> {
            files.into_iter().flat_map(|(_, names)| names).collect()
        };
        let (lost, gone) = (names(lost), names(gone));
        if let Err(e) = overlay::remove_files(dir, &gone) {
            tracing::warn!("overlays that nobody needs stay: {}", e.chain());
        }
        if lost.is_empty() {
            return;
        }
        match overlay::set_aside(dir, &lost) {
            Ok(aside) => tracing::warn!(
                "the log has lost records: what was written to clones that it may have named is kept as {aside:?}"
            ),
            Err(e) => {
                if let Some(newest) = newest {
                    // As they keep their names, no other layer may write into them.
                    let mut catalog = lock(&self.catalog);
                    let behind = newest.saturating_add(1).min(LAYER_BIT - 2);
                    catalog.next_layer = catalog.next_layer.max(behind);
                }
                tracing::error!(
                    "the log has lost records: {lost:?} may be of clones that it named, and cannot be set aside: {}",
                    e.chain()
                );
            }
        }
    }

    fn recover_clone(&self, clone: &CloneRt, clean: bool) {
        let (stack, size, growing) = {
            let state = clone.state();
            let entry = &state.entry;
            (Arc::clone(&state.stack), entry.size, entry.growing)
        };
        let mut changed = None;
        for level in &stack.levels {
            let overlay = &level.layer.overlay;
            match overlay.check().and_then(|()| overlay.ctime_ns()) {
                Ok(ctime) => changed = changed.max(ctime),
                Err(e) => {
                    // The store opens without this one.
                    let why = format!("an overlay cannot be looked at: {}", e.chain());
                    tracing::error!(clone = clone.id, "{why}");
                    clone.state().broken.get_or_insert(why);
                    changed = changed.max(Some(self.env.clock.now_ns()));
                }
            }
        }
        if let Some(changed) = changed {
            clone.note_change(changed);
        }
        if let Some(top) = stack.levels.first().filter(|_| growing && !clean) {
            let overlay = &top.layer.overlay;
            // Behind the end there may be what was cut off, or was about to make the clone longer.
            if overlay.check().is_ok() {
                if let Err(e) = overlay.zero_from(size) {
                    // The store opens without this one.
                    let why = format!("what lies behind its end stays: {}", e.chain());
                    tracing::error!(clone = clone.id, "{why}");
                    clone.state().broken.get_or_insert(why);
                }
                // An error stays with the overlay, whose clone then says so.
                let _ = overlay.sync();
            }
        }
        for level in &stack.levels {
            level.layer.overlay.close_files();
        }
    }
}
