//! Revert: makes the live volume what a snapshot is, undoable, finished after a crash.
//!
//! Order: readers and writers of the live volume are held; a snapshot that undoes it is taken; there
//! is room for preserving all that may differ; a durable REVERT_BEGIN; every grain that changed since
//! the target and does differ is preserved, then written; the source is synced; REVERT_END. From
//! BEGIN to END the source is half one thing and half another, and nobody sees it: recovery runs the
//! same again before anything is served, which is the same whatever was done before, because it
//! compares every grain with the target.
//!
//! When it cannot go on, it goes back: the undo snapshot becomes the target, for which nothing needs
//! room. When that fails too the volume is *unfinished*: the live content is not served until the
//! same revert, one to the undo snapshot, or the next opening of the store has finished it.
//!
//! The policy of the volume for a full thin target is not asked: a revert fails, never a snapshot.

use std::sync::{Arc, PoisonError};

use crate::error::{Error, IoContext, Kind, Result};
use crate::map::GrainSet;
use crate::sys::planted::{Bug, planted, point};
use crate::units::{Epoch, Name};
use crate::volume::catalog::{
    Reverting, SnapEntry, VolumeEntry, revert_begin_record, revert_end_record,
};
use crate::volume::engine::Engine;
use crate::volume::facts::{Reverted, SnapshotInfo, SnapshotState};
use crate::volume::live::{Volume, flush};
use crate::volume::read::Snapshot;
use crate::volume::resize::Claim;
use crate::volume::revert_groups::{GROUP_BYTES, RUNS_MAX};
use crate::volume::shared::lock;
use crate::volume::{reclaim, snapshots};

/// Bytes of an undo snapshot's name.
const NAME_MAX: usize = 200;
/// Bytes of the log that a preserved grain takes besides its content, at most: its checksum and, if no
/// neighbour is preserved with it, a record; in a batch and once more in the next.
const GRAIN_OVERHEAD: u64 = 128;
/// Bytes of the log that a batch or the beginning of a segment takes besides, at most.
const BATCH_OVERHEAD: u64 = 16 << 10;

impl Engine {
    /// Makes the live volume what a snapshot is; its size too. A snapshot that undoes it is taken
    /// first, named `before-revert-` and the target's name. Who has the live volume open for writing
    /// is the caller's business; reads and writes that arrive meanwhile wait. `progress` is told (bytes
    /// looked at, bytes to look at). Durable when it returns.
    ///
    /// On a volume whose revert is unfinished, naming the same target goes on with it, and naming its
    /// undo snapshot goes back; both answer with that undo snapshot.
    ///
    /// # Errors
    /// `NotFound`, `Busy` while another revert or a resize is under way or unfinished, `Failed` for a
    /// snapshot that failed or a source that cannot be trusted, `NoSpace`, `Io`. Nothing has
    /// changed, unless the state of the volume says that it is unfinished.
    pub fn revert_volume(
        &self,
        volume: &Name,
        to: &Name,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Reverted> {
        let shared = &self.shared;
        let claim = Claim::new(shared, volume, "a revert")?;
        let live = self.handle(Arc::clone(&claim.0));
        live.forget_intent()?;
        let entry = live.entry()?;
        if entry.resizing.is_some() {
            let why = format!("a resize of '{volume}' is unfinished; resize it again first");
            return Err(Error::new(Kind::Busy, why));
        }
        if let Some(begun) = entry.reverting {
            let (_, target, _) = snapshots::find(shared, volume, to)?;
            return live.revert_again(begun, target, progress);
        }
        let (undo, done) = live.revert(volume, to, progress)?;
        let gone_back = done.is_err() && live.entry()?.reverting.is_none();
        if gone_back {
            // What it would undo did not happen.
            drop(claim);
            let deleted = snapshots::delete(shared, volume, &undo.name, false);
            if let Err(e) = deleted {
                tracing::warn!("snapshot {} stays: {}", undo.name, e.chain());
            }
        }
        done.map(|written| Reverted { undo, written })
    }
}

/// What an undo snapshot is named: the first name that is free.
fn undo_name(entry: &VolumeEntry, target: &Name) -> Result<Name> {
    for number in 1u32.. {
        let suffix = match number {
            1 => String::new(),
            n => format!("-{n}"),
        };
        // Names are ASCII, so every byte is a place to cut.
        let mut name = format!("before-revert-{target}");
        name.truncate(NAME_MAX - suffix.len());
        let name = Name::new(&(name + &suffix))?;
        if !entry.has(&name) {
            return Ok(name);
        }
    }
    Err(Error::new(
        Kind::Limit,
        "no name is left for the undo snapshot",
    ))
}

fn still_good(snap: &SnapEntry) -> Result<()> {
    match &snap.state {
        SnapshotState::Active => Ok(()),
        SnapshotState::Failed(why) => Err(Error::new(
            Kind::Failed,
            format!("snapshot {} has failed: {why}", snap.name),
        )),
    }
}

impl Volume {
    /// Takes the undo snapshot and runs. The outer error: nothing happened, and there is no undo
    /// snapshot. The inner one: it went back or is unfinished.
    fn revert(
        &self,
        volume: &Name,
        to: &Name,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(SnapshotInfo, Result<u64>)> {
        let (shared, vol) = (&self.shared, &self.vol);
        let (_, target, snap) = snapshots::find(shared, volume, to)?;
        if self.check_room(target, snap.size).is_err() {
            // Space that can be given back is, before anybody is refused.
            reclaim::maintain(shared)?;
        }
        let structure = lock(&shared.structure);
        // Again: it may have been deleted or failed since.
        let (_, target, snap) = snapshots::find(shared, volume, to)?;
        still_good(&snap)?;
        let name = undo_name(&self.entry()?, to)?;
        let _gate = vol.gate.write().unwrap_or_else(PoisonError::into_inner);
        let _reads = vol.reads.write().unwrap_or_else(PoisonError::into_inner);
        shared.check_open()?;
        self.check_device(snap.size)?;
        self.check_room(target, snap.size)?;
        let undo = snapshots::take_held(shared, vol, &name)?;
        let reverting = Reverting {
            target,
            undo: undo.epoch.0,
        };
        let begun = match planted(Bug::RevertUnmeant) {
            true => Ok(crate::units::Lsn(0)),
            false => shared.append_records(vec![revert_begin_record(vol.id, reverting)]),
        };
        drop(structure);
        if let Err(e) = begun {
            self.refused_intent(&e, "a revert");
            return Ok((undo, Err(e)));
        }
        point("revert begun");
        let done = self.run_or_go_back(reverting, progress);
        Ok((undo, done))
    }

    /// Goes on with a revert that is unfinished, in either direction.
    fn revert_again(
        &self,
        begun: Reverting,
        target: u64,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Reverted> {
        let (shared, vol) = (&self.shared, &self.vol);
        let _gate = vol.gate.write().unwrap_or_else(PoisonError::into_inner);
        let _reads = vol.reads.write().unwrap_or_else(PoisonError::into_inner);
        let reverting = Reverting { target, ..begun };
        if target == begun.undo && target != begun.target {
            shared.append_records(vec![revert_begin_record(vol.id, reverting)])?;
        } else if target != begun.target {
            let why = self.unfinished_revert(begun);
            return Err(Error::new(Kind::Busy, why));
        }
        let written = self.run_or_go_back(reverting, progress)?;
        let undo = snapshots::open_at(shared, vol, begun.undo)?.info();
        Ok(Reverted { undo, written })
    }

    /// Finishes a revert that was begun before the store was opened.
    ///
    /// # Errors
    /// The first error. Then it went back, or it stays unfinished.
    pub(in crate::volume) fn finish_revert(&self, begun: Reverting) -> Result<u64> {
        let vol = &self.vol;
        let _gate = vol.gate.write().unwrap_or_else(PoisonError::into_inner);
        let _reads = vol.reads.write().unwrap_or_else(PoisonError::into_inner);
        self.run_or_go_back(begun, &mut |_, _| {})
    }

    /// Notes that the live content is half one thing and half another.
    pub(in crate::volume) fn revert_unfinished(&self, begun: Reverting, e: &Error) {
        tracing::error!(volume = self.vol.id, "unfinished revert: {}", e.chain());
        let why = format!("{} ({})", self.unfinished_revert(begun), e.chain());
        self.vol.state().unfinished = Some(why);
    }

    fn unfinished_revert(&self, begun: Reverting) -> String {
        let name = |epoch| {
            let entry = self.entry().ok();
            let snap = entry.and_then(|e| e.snapshots.get(&epoch).map(|s| s.name.to_string()));
            snap.unwrap_or_else(|| format!("epoch {epoch}"))
        };
        let (target, undo) = (name(begun.target), name(begun.undo));
        if begun.target == begun.undo {
            return format!(
                "going back to '{undo}' is unfinished; a revert to it or the next mount finishes it"
            );
        }
        format!(
            "a revert to '{target}' is unfinished; a revert to '{target}' or the next mount goes on \
             with it, a revert to '{undo}' goes back"
        )
    }

    /// Ends a revert that can neither go on nor back, because both snapshots have failed: somebody has
    /// declared the source good as it is.
    ///
    /// # Errors
    /// As an append.
    pub(in crate::volume) fn abandon_revert(&self) -> Result<()> {
        let entry = self.entry()?;
        let Some(begun) = entry.reverting else {
            return Ok(());
        };
        let failed = |epoch| match entry.snapshots.get(&epoch) {
            Some(snap) => still_good(snap).is_err(),
            None => true,
        };
        if failed(begun.target) && failed(begun.undo) {
            self.end(begun)?;
        }
        Ok(())
    }

    /// Runs a revert; on an error back again. The gate and `reads` are held exclusively.
    fn run_or_go_back(
        &self,
        reverting: Reverting,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<u64> {
        let e = match self.run(reverting, progress) {
            Ok(written) => return Ok(written),
            Err(e) => e,
        };
        let mut now = reverting;
        // A store that is being closed finishes it at its next opening; and if the source cannot be
        // made durable now, going back would end as going on did.
        let closing = e.kind() == Kind::Interrupted;
        if !closing && reverting.target != reverting.undo && self.can_finish().is_ok() {
            tracing::warn!(volume = self.vol.id, "a revert goes back: {}", e.chain());
            let back = Reverting {
                target: reverting.undo,
                ..reverting
            };
            let begin = vec![revert_begin_record(self.vol.id, back)];
            let done = self.shared.append_records(begin).and_then(|_| {
                now = back;
                self.run(back, &mut |_, _| {})
            });
            match done {
                Ok(_) => return Err(e),
                Err(e) => tracing::error!(volume = self.vol.id, "nor goes back: {}", e.chain()),
            }
        }
        self.revert_unfinished(now, &e);
        Err(e)
    }

    fn end(&self, reverting: Reverting) -> Result<()> {
        let (size, source) = (self.vol.size(), self.identity()?.size);
        let end = revert_end_record(self.vol.id, reverting.undo, size, source);
        self.shared.append_records(vec![end])?;
        self.vol.state().unfinished = None;
        Ok(())
    }

    /// Brings the live content to the target and says so in the log. The gate and `reads` are held
    /// exclusively.
    fn run(&self, reverting: Reverting, progress: &mut dyn FnMut(u64, u64)) -> Result<u64> {
        let (shared, vol) = (&self.shared, &self.vol);
        let target = snapshots::open_at(shared, vol, reverting.target)?;
        let set = self.set_size_of(&target)?;
        let grain = vol.grain.bytes();
        let within = 0..target.size().div_ceil(grain);
        let total = set.ranges_in(within.clone()).map(|r| r.end - r.start);
        let total = total.sum::<u64>() * grain;
        progress(0, total);
        let written = self.bring(&target, &set, within, progress)?;
        if !planted(Bug::RevertUnsynced) {
            flush(vol)?;
        }
        point("revert flushed");
        self.end(reverting)?;
        progress(total, total);
        Ok(written)
    }

    /// Gives the volume the target's size; returns the grains that may differ then.
    fn set_size_of(&self, target: &Snapshot) -> Result<GrainSet> {
        let vol = &*self.vol;
        let (epoch, size) = (target.info().epoch, target.size());
        self.check_device(size)?;
        let known = self.entry()?.size;
        // What an unfinished run put behind the known end was never served.
        let cut = size..vol.size().min(known);
        if !cut.is_empty() {
            self.preserve_end(cut, false)?;
        }
        if vol.size() != size {
            self.set_source_size(size)?;
        }
        // Of a device that shows again what it held behind the known end, too: what the target has
        // there was preserved when it was cut off, so it counts as changed.
        let map = &self.shared.map;
        Ok(map.changed_between(vol.id(), epoch, None))
    }

    /// Whether the thin target has room for preserving all that may differ from the target.
    ///
    /// # Errors
    /// `NoSpace`; `Io`.
    fn check_room(&self, target: u64, size: u64) -> Result<()> {
        let (shared, vol) = (&self.shared, &self.vol);
        let (grain, here) = (vol.grain.bytes(), vol.size());
        let set = shared.map.changed_between(vol.id(), Epoch(target), None);
        let (mut grains, mut runs) = (0, 0);
        for run in set.ranges_in(0..here.min(size).div_ceil(grain)) {
            grains += run.end - run.start;
            runs += 1;
        }
        if size < here {
            let held = vol.source()?.allocated().unwrap_or(here);
            grains += (here - size).min(held).div_ceil(grain) + 1;
        }
        let bytes = grains.saturating_mul(grain + GRAIN_OVERHEAD);
        let batches = bytes / GROUP_BYTES * 2 + runs / RUNS_MAX as u64 + 2;
        let segments = bytes / (shared.settings.segment_bytes / 2) + 1;
        let catalog = shared.current_catalog().encode().len() as u64;
        let needed = bytes
            .saturating_add(batches.saturating_mul(BATCH_OVERHEAD))
            .saturating_add(segments.saturating_mul(catalog + BATCH_OVERHEAD))
            .saturating_add(shared.log.keeps_free());
        let space = shared.env.dir.space();
        let space = space.context(|| "cannot tell the store's free space")?;
        let available = match shared.settings.limit_bytes {
            Some(limit) => limit
                .saturating_sub(shared.thin_used()?)
                .min(space.available),
            None => space.available,
        };
        if available < needed {
            return Err(Error::new(
                Kind::NoSpace,
                format!(
                    "a revert may preserve up to {needed} bytes and the store has {available} bytes \
                     of space; nothing has changed"
                ),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_undo_snapshot_has_a_name_that_is_free_and_not_too_long() {
        let grain = crate::units::Grain::DEFAULT;
        let mut entry = VolumeEntry {
            uuid: crate::units::Uuid([1; 16]),
            name: Name::new("v").unwrap(),
            source: "/v".into(),
            size: 1,
            grain,
            options: Default::default(),
            ino_base: 1024,
            added_ns: 0,
            epoch: 0,
            mtime_ns: 0,
            snap_mtime_ns: 0,
            changed: false,
            trust: Default::default(),
            identity: Default::default(),
            resizing: None,
            reverting: None,
            bookmarks: Default::default(),
            kept: Default::default(),
            snapshots: Default::default(),
        };
        let mut take = |epoch: u64, target: &str| {
            let name = undo_name(&entry, &Name::new(target).unwrap()).unwrap();
            let snap = SnapEntry {
                name: name.clone(),
                uuid: crate::units::Uuid([2; 16]),
                ino: epoch,
                taken_ns: 0,
                mtime_ns: 0,
                size: 1,
                allocated: 0,
                parent: None,
                group: None,
                held: false,
                state: SnapshotState::Active,
            };
            entry.snapshots.insert(epoch, snap);
            name.to_string()
        };
        assert_eq!(take(1, "daily"), "before-revert-daily");
        assert_eq!(take(2, "daily"), "before-revert-daily-2");
        assert_eq!(take(3, "daily"), "before-revert-daily-3");
        let long = "x".repeat(NAME_MAX);
        let cut = format!("before-revert-{}", &long[14..]);
        assert_eq!(take(4, &long), cut);
        assert_eq!(take(5, &long), format!("{}-2", &cut[..198]));
        // Another that differs only where it is cut.
        let other = format!("{}y", &long[1..]);
        assert_eq!(take(6, &other), format!("{}-3", &cut[..198]));
    }
}
