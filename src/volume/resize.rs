//! Resize: another size for the live volume; snapshots keep theirs.
//!
//! Order of a shrink: what is cut off is preserved while writers go on; then they are held, what is
//! left is preserved (a writer preserves by itself, so it is next to nothing), a durable RESIZE says
//! what is about to happen, the source is cut and synced, a second RESIZE says that it was. Before
//! the first RESIZE nothing of the live volume has changed, and a crash or a full disk leaves it
//! alone. After it everything the snapshots need is preserved, so a crash can only be followed by
//! finishing: recovery does that before anything is served. Growing is the same without preserving.
//!
//! Everything behind the new end is preserved unless it is a hole. A hole may be left out: a snapshot
//! reads past the end of a file as zero, the file grows with zeros, and a later write there preserves
//! those. A device shows again what it had when its volume grows, so of a device everything is
//! preserved. For the same reason what is new in a volume on a device is what the device holds.
//!
//! The policy of the volume for a full thin target is not asked: a resize fails, never a snapshot.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::disk::Identity;
use crate::sys::planted::{Bug, planted, point};
use crate::units::{Name, VOLUME_SIZE_MAX};
use crate::volume::catalog::{VolumeEntry, is_device, resize_record, resized_record};
use crate::volume::engine::Engine;
use crate::volume::facts::{VolumeInfo, VolumeState};
use crate::volume::live::{Change, PIECE_MAX, Refused, Volume, flush};
use crate::volume::shared::{Shared, Vol, lock};

/// A volume that nobody else takes a snapshot of or changes as a whole, until it is dropped.
pub(in crate::volume) struct Claim(pub(in crate::volume) Arc<Vol>);

impl Claim {
    /// Claims a volume whose content is known and can be made durable.
    ///
    /// # Errors
    /// `NotFound`, `Busy`, `Failed`, `Interrupted`.
    pub fn new(shared: &Shared, volume: &Name, what: &'static str) -> Result<Claim> {
        let _structure = lock(&shared.structure);
        shared.check_open()?;
        let vol = shared.find(volume)?;
        let mut state = vol.state();
        state.idle(volume)?;
        state.usable(volume)?;
        if let VolumeState::Suspect(why) = &state.health {
            return Err(Error::new(
                Kind::Failed,
                format!("volume '{volume}' cannot be made durable ({why}); accept it first"),
            ));
        }
        state.busy = Some(what);
        drop(state);
        Ok(Claim(vol))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.state().busy = None;
    }
}

impl Engine {
    /// Gives a volume another size in bytes, at least one; durable when it returns. What is new reads
    /// as zero. A block device has to have the size already, and what is new is what it holds there;
    /// a volume may be smaller than its device. Finishes an earlier resize that could not be.
    ///
    /// # Errors
    /// `NotFound`, `Invalid` for 0, `Limit`, `Busy` while another resize or a revert is under way,
    /// `Failed` (a device is too small, a source cannot be trusted), `NoSpace` (what is cut off could
    /// not be preserved, or the source's filesystem is full), `Io`. Nothing has changed, unless the
    /// state of the volume says that it is unfinished.
    pub fn resize_volume(&self, volume: &Name, size: u64) -> Result<VolumeInfo> {
        if size == 0 {
            return Err(Error::new(Kind::Invalid, "a volume has at least one byte"));
        }
        if size > VOLUME_SIZE_MAX {
            return Err(Error::new(
                Kind::Limit,
                format!("a volume has at most {VOLUME_SIZE_MAX} bytes"),
            ));
        }
        let shared = &self.shared;
        let claim = Claim::new(shared, volume, "a resize")?;
        let live = self.handle(Arc::clone(&claim.0));
        let entry = live.entry()?;
        if entry.reverting.is_some() {
            let why = format!("a revert of '{volume}' is unfinished; revert it again first");
            return Err(Error::new(Kind::Busy, why));
        }
        if let Some(to) = entry.resizing {
            live.finish_resize(to)?;
        }
        live.forget_intent()?;
        if size != live.size() {
            live.resize(size)?;
        }
        drop(claim);
        Ok(live.info())
    }
}

impl Volume {
    /// The volume in the catalogue.
    pub(in crate::volume) fn entry(&self) -> Result<VolumeEntry> {
        let catalog = lock(&self.shared.catalog);
        let entry = catalog.volumes.get(&self.vol.id).cloned();
        entry.ok_or_else(|| Error::new(Kind::NotFound, "the volume was removed"))
    }

    pub(in crate::volume) fn identity(&self) -> Result<Identity> {
        let identity = self.vol.source()?.identity();
        identity.context(|| format!("cannot stat {}", self.vol.source_path))
    }

    fn resize(&self, to: u64) -> Result<()> {
        let vol = &*self.vol;
        self.check_device(to)?;
        let from = vol.size();
        if to < from && !planted(Bug::ShrinkUnpreserved) {
            self.preserve_end(to..from, true)?;
        }
        let _gate = vol.gate.write().unwrap_or_else(PoisonError::into_inner);
        let _reads = vol.reads.write().unwrap_or_else(PoisonError::into_inner);
        self.shared.check_open()?;
        if to < from && !planted(Bug::ShrinkUnpreserved) {
            self.preserve_end(to..from, false)?;
        }
        let intent = vec![resize_record(vol.id, from, to)];
        if let Err(e) = self.shared.append_records(intent) {
            self.refused_intent(&e, "a resize");
            return Err(e);
        }
        point("resize meant");
        self.conclude(from, to)
    }

    /// Whether what was begun can be finished: the source is known and can be made durable.
    ///
    /// # Errors
    /// `Failed`.
    pub(in crate::volume) fn can_finish(&self) -> Result<()> {
        let state = self.vol.state();
        state.usable(&self.vol.name)?;
        match &state.health {
            VolumeState::Suspect(why) => Err(Error::new(
                Kind::Failed,
                format!("the source cannot be made durable: {why}"),
            )),
            _ => Ok(()),
        }
    }

    /// A record that was not acknowledged must not come back with a crash and be acted upon: it is
    /// dead once the log has gone on without it. Until then the volume is not served.
    pub(in crate::volume) fn refused_intent(&self, e: &Error, what: &str) {
        if e.kind() != Kind::NoSpace && self.shared.append_records(Vec::new()).is_err() {
            self.vol.state().unfinished = Some(format!(
                "{what} may have been noted in the log, which takes nothing now; try again"
            ));
        }
    }

    /// Serves a volume again that is unfinished only because of [`Volume::refused_intent`].
    ///
    /// # Errors
    /// If the log still takes nothing.
    pub(in crate::volume) fn forget_intent(&self) -> Result<()> {
        let entry = self.entry()?;
        let begun = entry.resizing.is_some() || entry.reverting.is_some();
        if !begun && self.vol.state().unfinished.is_some() {
            self.shared.append_records(Vec::new())?;
            self.vol.state().unfinished = None;
        }
        Ok(())
    }

    /// Finishes a resize that was begun; the size may be the old one, the new one or one between.
    ///
    /// # Errors
    /// As [`Engine::resize_volume`]; the volume stays unfinished.
    pub(in crate::volume) fn finish_resize(&self, to: u64) -> Result<()> {
        let vol = &*self.vol;
        let _gate = vol.gate.write().unwrap_or_else(PoisonError::into_inner);
        let _reads = vol.reads.write().unwrap_or_else(PoisonError::into_inner);
        let from = self.entry()?.size;
        let here = vol.size();
        let ready = match to < here {
            true => self.preserve_end(to..here, false),
            false => self.check_device(to),
        };
        ready
            .and_then(|()| self.conclude(from, to))
            .inspect_err(|e| self.resize_unfinished(to, e))
    }

    pub(in crate::volume) fn resize_unfinished(&self, to: u64, e: &Error) {
        tracing::error!(volume = self.vol.id, "unfinished resize: {}", e.chain());
        self.vol.state().unfinished = Some(format!(
            "a resize to {to} bytes is unfinished ({}); 'stillframe volume resize' or the next mount \
             finishes it",
            e.chain()
        ));
    }

    /// Sets the size, durably, and says so in the log. The intent is durable; the gate and `reads`
    /// are held exclusively.
    fn conclude(&self, from: u64, to: u64) -> Result<()> {
        let vol = &*self.vol;
        let resized = |to| {
            point("resize done");
            let source = self.identity()?.size;
            let record = resized_record(vol.id, from, to, source);
            self.shared.append_records(vec![record]).map(drop)
        };
        let Err(e) = self.set_source_size(to).and_then(|()| resized(to)) else {
            vol.state().unfinished = None;
            return Ok(());
        };
        let untouched = self.identity().is_ok_and(|found| found.size == from);
        if untouched && resized(from).is_ok() {
            vol.set_size(from);
            vol.state().unfinished = None;
            return Err(e);
        }
        self.resize_unfinished(to, &e);
        Err(e)
    }

    /// Gives source and volume a size, durably. Everything is preserved; the gate and `reads` are
    /// held exclusively.
    pub(in crate::volume) fn set_source_size(&self, to: u64) -> Result<()> {
        let vol = &*self.vol;
        let source = vol.source()?;
        if is_device(&self.identity()?) {
            self.check_device(to)?;
        } else {
            let before = vol.size();
            // Ahead of the source: a reader of a snapshot who finds the source shorter than the
            // volume looks whether the volume has become shorter, too.
            vol.set_size(to.min(before));
            let done = source.set_size(to);
            vol.dirty.store(true, Ordering::Release);
            if let Err(e) = done {
                vol.set_size(source.size().unwrap_or(before).min(before));
                let path = &vol.source_path;
                return Err(Error::io(format!("cannot give {path} {to} bytes"), e));
            }
        }
        vol.set_size(to);
        vol.state().note_change(self.shared.env.clock.now_ns());
        if planted(Bug::SizeUnsynced) {
            return Ok(());
        }
        flush(vol)
    }

    /// A device keeps its size: it must have that of the volume.
    ///
    /// # Errors
    /// `Failed`.
    pub(in crate::volume) fn check_device(&self, size: u64) -> Result<()> {
        let found = self.identity()?;
        if is_device(&found) && found.size < size {
            return Err(Error::new(
                Kind::Failed,
                format!(
                    "{} is a device of {} bytes; enlarge it to {size} first",
                    self.vol.source_path, found.size
                ),
            ));
        }
        Ok(())
    }

    /// Preserves what lies in a range that is about to be cut off; writes nothing to the source. In
    /// pieces that share the gate with writers, and waiting for space as a write does; or with the
    /// gate held by the caller.
    ///
    /// # Errors
    /// `NoSpace`, `Failed`, `Io`.
    pub(in crate::volume) fn preserve_end(&self, end: Range<u64>, sharing: bool) -> Result<()> {
        let vol = &*self.vol;
        let source = vol.source()?;
        // What somebody cut off is no hole that needs no preserving.
        vol.whole()?;
        let device = is_device(&self.identity()?);
        let preserved = vol.state().preserved.clone();
        for gap in preserved.gaps_in(vol.grain.cover(end.clone())) {
            let span = vol.grain.span(gap);
            let (mut at, stop) = (span.start.max(end.start), span.end.min(end.end));
            while at < stop {
                if !device {
                    let data = source.next_data(at);
                    let data = data.context(|| "cannot look for holes in the source")?;
                    let Some(data) = data.filter(|&data| data < stop) else {
                        break;
                    };
                    at = at.max(data - data % vol.grain.bytes());
                }
                let len = (PIECE_MAX - at % PIECE_MAX).min(stop - at);
                self.preserve_piece(at, len, sharing)?;
                at += len;
            }
        }
        if !sharing {
            // What is preserved for an older snapshot than the newest bookmark must be known to have
            // changed since, should the volume grow again.
            for run in preserved.ranges_in(vol.grain.cover(end)) {
                self.shared.track(vol, run)?;
            }
        }
        Ok(())
    }

    fn preserve_piece(&self, at: u64, len: u64, sharing: bool) -> Result<()> {
        let since = Instant::now();
        loop {
            let gate = sharing.then(|| {
                let gate = self.vol.gate.read();
                gate.unwrap_or_else(PoisonError::into_inner)
            });
            let done = self.change_in_gate(at, len, Change::Cut, false);
            drop(gate);
            match done {
                Ok(()) => return Ok(()),
                Err(Refused::Thin(e)) if e.kind() == Kind::NoSpace => {
                    if !sharing || !self.shared.wait_for_space(&self.vol, since) {
                        return Err(e);
                    }
                }
                Err(Refused::Thin(e) | Refused::Other(e)) => return Err(e),
            }
        }
    }
}
