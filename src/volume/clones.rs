//! Clones: writable copies of a snapshot, or of a clone, that hold only what was written to them.
//!
//! A clone is a stack of layers over a snapshot ([`crate::volume::layers`]); the top one is its own.
//! Cloning a clone freezes that layer for both and gives each a new one, in one batch of the log: a
//! crash leaves both or none. A clone that was made empty may change its size, and may take over a
//! snapshot piece by piece.
//!
//! Every record about a clone is appended under its gate, so none can undo what a writer's CLONE_ALLOC
//! said before it.

use std::sync::{Arc, PoisonError};

use crate::error::{Error, IoContext, Kind, Result};
use crate::log::record::Record;
use crate::sys::planted::{Bug, planted, point};
use crate::units::{Name, Uuid, VOLUME_SIZE_MAX};
use crate::volume::catalog::Catalog;
use crate::volume::clone_records::{
    Base, CloneEntry, LAYER_BIT, LayerEntry, clone_deleted_record, clone_record,
};
use crate::volume::clone_write::Writer;
use crate::volume::engine::Engine;
use crate::volume::facts::{CloneInfo, SnapshotState, Zeroing};
use crate::volume::layers::{CloneRt, View};
use crate::volume::read::Snapshot;
use crate::volume::shared::{Shared, Vol, lock};

/// Most clones of one store.
const CLONES_MAX: usize = 65_536;
/// Most layers that one clone is read through.
const LAYERS_MAX: usize = 128;

/// An open clone; its data stays until the handle is dropped, also when it is deleted.
pub struct OpenClone {
    shared: Arc<Shared>,
    clone: Arc<CloneRt>,
}

impl OpenClone {
    fn open(shared: &Arc<Shared>, clone: Arc<CloneRt>) -> Result<Arc<OpenClone>> {
        clone.state().handles += 1;
        let opened = OpenClone {
            shared: Arc::clone(shared),
            clone,
        };
        shared.open_base(&opened.clone);
        {
            let state = opened.clone.state();
            if state.deleted && state.stack.base.is_some() && state.base.is_none() {
                let why = "the clone has just been deleted";
                return Err(Error::new(Kind::NotFound, why));
            }
        }
        Ok(Arc::new(opened))
    }

    fn writer(&self) -> Writer<'_> {
        Writer {
            shared: &self.shared,
            clone: &self.clone,
        }
    }

    /// Facts, as of now.
    pub fn info(&self) -> CloneInfo {
        info_of(&self.shared, &self.clone)
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.clone.state().entry.size
    }

    /// Reads; the range must lie within the size.
    ///
    /// # Errors
    /// `Invalid` outside of the size, `Failed`, `Damaged`, `Io`.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let view = self.clone.view()?;
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > view.size) {
            return Err(Error::new(Kind::Invalid, "a read past the end of a clone"));
        }
        view.read(offset, buf)
    }

    /// Writes; acknowledged when it returns (I2), durable after [`OpenClone::flush`]. Past the end of a
    /// clone that was made empty it makes the clone longer; what lies between reads as zero.
    ///
    /// # Errors
    /// `NoSpace` past the end or on a full disk, `Limit`, `Failed`, `Io`. After an error a prefix may
    /// have been written.
    pub fn write_at(&self, offset: u64, data: &[u8], compare: bool) -> Result<()> {
        self.writer().write(offset, data, compare)
    }

    /// Makes a range zero; it must lie within the size. Both ways give the space back.
    ///
    /// # Errors
    /// As [`OpenClone::write_at`].
    pub fn zero(&self, offset: u64, len: u64, _how: Zeroing) -> Result<()> {
        self.writer().zero(offset, len)
    }

    /// Whether the size is not fixed: it was made empty, for a copy into it.
    pub fn is_growing(&self) -> bool {
        self.clone.state().entry.growing
    }

    /// Gives a clone that was made empty another size; what is new reads as zero. Durable when it
    /// returns.
    ///
    /// # Errors
    /// `Permission` for another size of any other clone, `Limit`, `Failed`, `NoSpace`, `Io`.
    pub fn set_size(&self, size: u64) -> Result<()> {
        let shared = &self.shared;
        let clone = &*self.clone;
        let _structure = lock(&shared.structure);
        shared.check_open()?;
        let _gate = clone.gate.write().unwrap_or_else(PoisonError::into_inner);
        let view = clone.writable()?;
        if size == view.size {
            return Ok(());
        }
        if !view.growing {
            let why = "the size of a clone is fixed, unless it was made empty";
            return Err(Error::new(Kind::Permission, why));
        }
        if size > VOLUME_SIZE_MAX {
            return Err(Error::new(Kind::Limit, "a clone is at most 8 EiB large"));
        }
        let overlay = &view.top()?.overlay;
        // What was cut off before must be gone for good before it could show again.
        overlay.sync()?;
        let said = shared.restate(clone, None, |catalog, entry, (id, layer)| {
            entry.size = size;
            layer.visible = layer.visible.min(size);
            if size == 0 {
                // Nothing is left of it, so it may begin anew, over another snapshot too.
                *id = catalog.next_layer;
                *layer = nothing(entry.volume);
            }
        });
        said?;
        clone.note_change(shared.env.clock.now_ns());
        if size < view.size && size > 0 {
            overlay.zero_from(size).inspect_err(|e| {
                let why = format!("what was cut off cannot be removed: {}", e.chain());
                clone.state().broken.get_or_insert(why);
            })?;
        }
        Ok(())
    }

    /// Takes over a range of a snapshot of the same volume at once, if that can be had: the clone was made
    /// empty, offsets are equal, and the range continues what was taken over so far, if need be over a
    /// hole. `false`: the caller has to copy. Durable when it returns.
    ///
    /// # Errors
    /// `NoSpace`, `Failed`, `Io`.
    pub fn take_over(&self, from: &Snapshot, offset: u64, len: u64) -> Result<bool> {
        let shared = &self.shared;
        let clone = &*self.clone;
        let end = offset.checked_add(len).filter(|&end| end <= from.size());
        let Some(end) = end.filter(|&end| end > offset && from.is_of(&clone.vol)) else {
            return Ok(false);
        };
        let epoch = from.info().epoch.0;
        let _structure = lock(&shared.structure);
        shared.check_open()?;
        let _gate = clone.gate.write().unwrap_or_else(PoisonError::into_inner);
        let view = clone.writable()?;
        let listed = match lock(&shared.catalog).snapshot_or_kept(clone.vol.id, epoch) {
            Some(snap) => snap.state == SnapshotState::Active,
            None => false,
        };
        if !listed || !view.growing || clone.state().deleted || !fits(&view, from, offset..end)? {
            return Ok(false);
        }
        // Opened before: readers hold no lock, and must not meet a layer whose base is not there yet.
        let base = shared.open_snapshot_of(clone, epoch);
        shared.restate(clone, base, |_, entry, (_, layer)| {
            layer.base = Base::Snapshot(epoch);
            layer.visible = end;
            entry.size = entry.size.max(end);
        })?;
        clone.note_change(shared.env.clock.now_ns());
        Ok(true)
    }

    /// Makes every acknowledged write durable (I3).
    ///
    /// # Errors
    /// `Failed` once a sync has failed (I7), until the store is opened again.
    pub fn flush(&self) -> Result<()> {
        flush(&self.clone)
    }

    /// The first data at or after an offset, `None` if only holes follow.
    ///
    /// # Errors
    /// As [`OpenClone::read_at`].
    pub fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        let view = self.clone.view()?;
        view.seek(offset..view.size, true)
    }

    /// The first hole at or after an offset; the size counts as one.
    ///
    /// # Errors
    /// As [`OpenClone::read_at`].
    pub fn next_hole(&self, offset: u64) -> Result<u64> {
        let view = self.clone.view()?;
        let found = view.seek(offset..view.size, false)?;
        Ok(found.unwrap_or(view.size.max(offset)))
    }

    /// Bytes of storage its content uses: its own layer, and what it shares.
    ///
    /// # Errors
    /// `Io`.
    pub fn allocated(&self) -> Result<u64> {
        let (stack, base) = {
            let state = self.clone.state();
            (Arc::clone(&state.stack), state.base.clone())
        };
        let mut total = base.map_or(0, |base| base.info().allocated);
        for level in &stack.levels {
            total += level.layer.overlay.allocated()?;
        }
        Ok(total)
    }
}

impl Drop for OpenClone {
    fn drop(&mut self) {
        let mut state = self.clone.state();
        state.handles -= 1;
        if state.handles > 0 {
            return;
        }
        let base = state.base.take();
        let stack = Arc::clone(&state.stack);
        drop(state);
        // Its drop takes the volume's state.
        drop(base);
        for level in &stack.levels {
            level.layer.overlay.close_files();
        }
    }
}

/// Whether a range of a snapshot may show through the clone's layer: all that is written to it lies
/// elsewhere, and nothing else of the snapshot shows up with it.
fn fits(view: &View, from: &Snapshot, range: std::ops::Range<u64>) -> Result<bool> {
    let [level] = &view.stack.levels[..] else {
        return Ok(false);
    };
    let base = view.stack.base;
    if base.is_some_and(|epoch| epoch != from.info().epoch.0) || range.start < level.visible {
        return Ok(false);
    }
    let grains = view.grain().cover(range.clone());
    if lock(&level.layer.set).intersects_range(grains) {
        return Ok(false);
    }
    let gap_end = from.next_data(level.visible)?.unwrap_or(u64::MAX);
    Ok(gap_end >= range.start)
}

fn nothing(volume: u32) -> LayerEntry {
    LayerEntry {
        volume,
        base: Base::Nothing,
        visible: 0,
    }
}

fn flush(clone: &CloneRt) -> Result<()> {
    let (broken, stack) = {
        let state = clone.state();
        (state.broken.clone(), Arc::clone(&state.stack))
    };
    if let Some(why) = broken {
        return Err(Error::new(Kind::Failed, why));
    }
    // Only the top layer is ever written; a lower one was made durable when it was frozen.
    match stack.levels.first() {
        Some(top) => top.layer.overlay.sync(),
        None => Ok(()),
    }
}

/// Facts about a clone.
fn info_of(shared: &Shared, clone: &CloneRt) -> CloneInfo {
    let catalog = lock(&shared.catalog);
    let state = clone.state();
    let entry = &state.entry;
    let listed = catalog.volumes.get(&entry.volume);
    let base = state
        .stack
        .base
        .and_then(|epoch| catalog.snapshot_or_kept(entry.volume, epoch));
    let mut health = entry.state.clone();
    if let (SnapshotState::Active, Some(SnapshotState::Failed(why))) =
        (&health, base.map(|b| &b.state))
    {
        health = SnapshotState::Failed(format!("its snapshot has failed: {why}"));
    }
    let top = state.stack.levels.first().map(|level| &level.layer);
    let broken = state.broken.clone().or_else(|| {
        let checked = top.map(|top| top.overlay.check());
        checked.and_then(|checked| checked.err().map(|e| e.chain()))
    });
    if let (SnapshotState::Active, Some(why)) = (&health, broken) {
        health = SnapshotState::Failed(why);
    }
    CloneInfo {
        volume: listed.map_or_else(|| clone.vol.name.clone(), |v| v.name.clone()),
        name: entry.name.clone(),
        uuid: entry.uuid,
        ino: entry.ino,
        created_ns: entry.created_ns,
        mtime_ns: state.mtime_ns,
        size: entry.size,
        base: base.map(|b| b.uuid),
        base_name: base
            .filter(|_| {
                let epoch = state.stack.base.unwrap_or_default();
                listed.is_some_and(|v| v.snapshots.contains_key(&epoch))
            })
            .map(|b| b.name.clone()),
        layers: state.stack.levels.len(),
        own: top.map_or(0, |top| lock(&top.set).len()) * clone.vol.grain.bytes(),
        state: health,
    }
}

impl Shared {
    fn find_clone(&self, volume: &Name, name: &Name) -> Result<Arc<CloneRt>> {
        let vol = self.find(volume)?;
        let catalog = lock(&self.catalog);
        let id = catalog.find_clone(vol.id, name);
        let clones = lock(&self.clones);
        id.and_then(|id| clones.by_id.get(&id).cloned())
            .ok_or_else(|| {
                Error::new(
                    Kind::NotFound,
                    format!("there is no clone '{name}' of volume '{volume}'"),
                )
            })
    }

    /// Appends records about clones. If the log fails, they might come back with a crash, unless it has
    /// durably gone on without them; until that is so the clone takes no writes that could be undone.
    fn append_clones(&self, clone: Option<&CloneRt>, records: Vec<Record>) -> Result<()> {
        let Err(e) = self.append_records(records) else {
            return Ok(());
        };
        if e.kind() != Kind::NoSpace
            && self.append_records(Vec::new()).is_err()
            && let Some(clone) = clone
        {
            let why = format!("the log does not say what became of it: {}", e.chain());
            clone.state().broken.get_or_insert(why);
        }
        Err(e)
    }

    /// Says a clone's CLONE again with changes. The caller holds `structure` and the clone's gate, and
    /// gives the snapshot that is to be at the bottom, if that is a new one.
    fn restate(
        &self,
        clone: &CloneRt,
        base: Option<Arc<Snapshot>>,
        change: impl FnOnce(&Catalog, &mut CloneEntry, &mut (u32, LayerEntry)),
    ) -> Result<()> {
        let (entry, layer) = {
            let catalog = lock(&self.catalog);
            let Some(mut entry) = catalog.clones.get(&clone.id).cloned() else {
                let why = "the clone was deleted";
                return Err(Error::new(Kind::NotFound, why));
            };
            let known = catalog.layers.get(&entry.top).copied();
            let mut layer = (entry.top, known.unwrap_or_else(|| nothing(entry.volume)));
            change(&catalog, &mut entry, &mut layer);
            if layer.1.visible == 0 && entry.growing {
                layer.1.base = Base::Nothing;
            }
            entry.top = layer.0;
            (entry, layer)
        };
        self.append_clones(Some(clone), vec![clone_record(clone.id, &entry, &[layer])])?;
        self.refresh_clone(clone, base);
        self.release_layers(&clone.vol);
        Ok(())
    }

    /// Checks that a new clone may be made, and gives it an entry. The caller holds `structure`.
    fn new_clone(&self, vol: &Vol, name: &Name, size: u64) -> Result<(u32, CloneEntry)> {
        let random = self
            .env
            .clock
            .random()
            .context(|| "no random bytes for a uuid")?;
        let created_ns = self.env.clock.now_ns();
        let catalog = lock(&self.catalog);
        if catalog.find_clone(vol.id, name).is_some() {
            let why = format!("there is a clone '{name}' of this volume already");
            return Err(Error::new(Kind::Exists, why));
        }
        if catalog.clones.len() >= CLONES_MAX {
            let why = format!("a store holds at most {CLONES_MAX} clones; delete some");
            return Err(Error::new(Kind::Limit, why));
        }
        if catalog.next_layer.max(catalog.next_clone) >= LAYER_BIT - 2 {
            let why = "the store has used up its numbers for clones";
            return Err(Error::new(Kind::Limit, why));
        }
        let entry = CloneEntry {
            volume: vol.id,
            name: name.clone(),
            uuid: Uuid::from_random(random),
            ino: catalog.next_ino,
            created_ns,
            size,
            top: catalog.next_layer,
            growing: false,
            state: SnapshotState::Active,
        };
        Ok((catalog.next_clone, entry))
    }

    /// Does what `flush` of each clone would. `false` if one of them could not be made durable, now or
    /// earlier: then what its overlays show may not be what the medium has. No clone keeps another one,
    /// or the store, from a clean stop.
    ///
    /// # Errors
    /// The first error that nobody has been told of yet, after all of them were flushed.
    pub fn flush_clones(&self) -> (bool, Result<()>) {
        let clones: Vec<Arc<CloneRt>> = lock(&self.clones).by_id.values().cloned().collect();
        let (mut all, mut first) = (true, Ok(()));
        for clone in clones {
            let known = clone.writable().is_err();
            if let Err(e) = flush(&clone) {
                all = false;
                tracing::error!(clone = clone.id, "not made durable: {}", e.chain());
                if !known {
                    first = first.and(Err(e));
                }
            }
        }
        (all, first)
    }

    /// Puts a clone that is durable now among the served ones.
    fn serve_clone(&self, id: u32) -> Result<CloneInfo> {
        let clone = self.insert_clone(id);
        let clone = clone.ok_or_else(|| Error::new(Kind::NotFound, "the volume was removed"))?;
        Ok(info_of(self, &clone))
    }
}

impl Engine {
    /// Makes a clone of a snapshot; durable when it returns.
    ///
    /// # Errors
    /// `NotFound`, `Exists`, `Failed`, `Limit`, `NoSpace`, `Io`.
    pub fn clone_snapshot(&self, volume: &Name, of: &Name, name: &Name) -> Result<CloneInfo> {
        let shared = &self.shared;
        let _structure = lock(&shared.structure);
        shared.check_open()?;
        let (vol, epoch, snap) = crate::volume::snapshots::find(shared, volume, of)?;
        if let SnapshotState::Failed(why) = &snap.state {
            let why = format!("snapshot {volume}@{of} has failed: {why}");
            return Err(Error::new(Kind::Failed, why));
        }
        let (id, entry) = shared.new_clone(&vol, name, snap.size)?;
        let layer = LayerEntry {
            volume: vol.id,
            base: Base::Snapshot(epoch),
            visible: snap.size,
        };
        let record = clone_record(id, &entry, &[(entry.top, layer)]);
        shared.append_clones(None, vec![record])?;
        shared.serve_clone(id)
    }

    /// Makes a clone of a clone: both share what was written so far; durable when it returns.
    ///
    /// # Errors
    /// As [`Engine::clone_snapshot`].
    pub fn clone_clone(&self, volume: &Name, of: &Name, name: &Name) -> Result<CloneInfo> {
        let shared = &self.shared;
        let _structure = lock(&shared.structure);
        shared.check_open()?;
        let source = shared.find_clone(volume, of)?;
        if let SnapshotState::Failed(why) = info_of(shared, &source).state {
            let why = format!("clone {volume}@{of} has failed: {why}");
            return Err(Error::new(Kind::Failed, why));
        }
        // Most of it, so that writers wait for little.
        flush(&source)?;
        let _gate = source.gate.write().unwrap_or_else(PoisonError::into_inner);
        flush(&source)?;
        let view = source.writable()?;
        let (id, mut entry) = shared.new_clone(&source.vol, name, view.size)?;
        if view.stack.levels.len() >= LAYERS_MAX {
            let why = format!("clones of clones are at most {LAYERS_MAX} deep");
            return Err(Error::new(Kind::Limit, why));
        }
        let untouched = lock(&view.top()?.set).is_empty() || planted(Bug::LayerShared);
        let records = {
            let catalog = lock(&shared.catalog);
            let gone = || Error::new(Kind::NotFound, "the clone was deleted");
            let mut old = catalog.clones.get(&source.id).cloned().ok_or_else(gone)?;
            let layer = catalog.layers.get(&old.top).copied().ok_or_else(gone)?;
            if untouched {
                // Nothing to share but what lies beneath.
                vec![clone_record(id, &entry, &[(entry.top, layer)])]
            } else {
                let above = LayerEntry {
                    volume: old.volume,
                    base: Base::Layer(old.top),
                    visible: old.size,
                };
                old.top = entry.top;
                entry.top += 1;
                vec![
                    clone_record(source.id, &old, &[(old.top, above)]),
                    clone_record(id, &entry, &[(entry.top, above)]),
                ]
            }
        };
        shared.append_clones(Some(&source), records)?;
        point("clone durable");
        shared.refresh_clone(&source, None);
        shared.serve_clone(id)
    }

    /// Makes an empty clone of size 0, for a copy into it; durable when it returns.
    ///
    /// # Errors
    /// As [`Engine::clone_snapshot`].
    pub fn clone_empty(&self, volume: &Name, name: &Name) -> Result<CloneInfo> {
        let shared = &self.shared;
        let _structure = lock(&shared.structure);
        shared.check_open()?;
        let vol = shared.find(volume)?;
        let (id, mut entry) = shared.new_clone(&vol, name, 0)?;
        entry.growing = true;
        let record = clone_record(id, &entry, &[(entry.top, nothing(vol.id))]);
        shared.append_clones(None, vec![record])?;
        shared.serve_clone(id)
    }

    /// Deletes a clone; durable when it returns, space follows in [`Engine::maintain`].
    ///
    /// # Errors
    /// `NotFound`, `NoSpace`, `Io`: the clone stays.
    pub fn delete_clone(&self, volume: &Name, name: &Name) -> Result<()> {
        let shared = &self.shared;
        let _structure = lock(&shared.structure);
        shared.check_open()?;
        let clone = shared.find_clone(volume, name)?;
        let record = clone_deleted_record(clone.vol.id, clone.id);
        if planted(Bug::CloneFilesFirst) {
            clone.writable()?.top()?.overlay.remove()?;
        }
        shared.append_clones(Some(&clone), vec![record])?;
        lock(&shared.clones).by_id.remove(&clone.id);
        clone.state().deleted = true;
        shared.release_layers(&clone.vol);
        Ok(())
    }

    /// Renames a clone; durable when it returns.
    ///
    /// # Errors
    /// `NotFound`, `Exists`, `NoSpace`, `Io`.
    pub fn rename_clone(&self, volume: &Name, name: &Name, new: &Name) -> Result<()> {
        let shared = &self.shared;
        let _structure = lock(&shared.structure);
        shared.check_open()?;
        let clone = shared.find_clone(volume, name)?;
        if name == new {
            return Ok(());
        }
        if shared.find_clone(volume, new).is_ok() {
            let why = format!("there is a clone '{new}' of volume '{volume}' already");
            return Err(Error::new(Kind::Exists, why));
        }
        let _gate = clone.gate.write().unwrap_or_else(PoisonError::into_inner);
        shared.restate(&clone, None, |_, entry, _| entry.name = new.clone())
    }

    /// The clones of a volume, by name.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn clones(&self, volume: &Name) -> Result<Vec<CloneInfo>> {
        let vol = self.shared.find(volume)?;
        let mut clones: Vec<Arc<CloneRt>> = {
            let clones = lock(&self.shared.clones);
            clones.by_id.values().cloned().collect()
        };
        clones.retain(|clone| clone.vol.id == vol.id);
        let infos = clones.iter().map(|clone| info_of(&self.shared, clone));
        let mut infos: Vec<CloneInfo> = infos.collect();
        infos.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(infos)
    }

    /// One clone.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn clone_info(&self, volume: &Name, name: &Name) -> Result<CloneInfo> {
        let clone = self.shared.find_clone(volume, name)?;
        Ok(info_of(&self.shared, &clone))
    }

    /// Opens a clone.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn open_clone(&self, volume: &Name, name: &Name) -> Result<Arc<OpenClone>> {
        self.shared.check_open()?;
        let clone = self.shared.find_clone(volume, name)?;
        OpenClone::open(&self.shared, clone)
    }
}
