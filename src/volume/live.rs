//! The live volume: copy-before-write.
//!
//! A change of a range takes the volume's gate (shared), finds the grains that need preserving, locks
//! them, reads their old content, appends what really changes to the log, and only after that is
//! durable and published touches the source (I1). Grains that need nothing take no lock beyond the
//! gate. Everything that changes content goes through [`Volume::change`]: writes, discards, zeroing.
//!
//! A failed preserve fails the write and changes nothing.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLockReadGuard};
use std::time::Instant;

use crate::error::{Error, IoContext, Kind, Result};
use crate::log::commit::{BATCH_PAYLOAD_MAX, Entry};
use crate::log::record::{Record, RecordType};
use crate::sys::planted::{Bug, planted, point};
use crate::volume::facts::{VolumeInfo, VolumeState, Zeroing};
use crate::volume::shared::{Shared, Vol, lock};

/// Bytes that one change handles at a time: bounds its memory and the batch it appends.
pub(in crate::volume) const PIECE_MAX: u64 = BATCH_PAYLOAD_MAX as u64;
/// Bytes of hole that one discard handles at a time: bounds how long it excludes a snapshot.
const HOLE_PIECE_MAX: u64 = 64 << 20;

/// A volume under protection: the only way to write to its source.
pub struct Volume {
    pub(in crate::volume) shared: Arc<Shared>,
    pub(in crate::volume) vol: Arc<Vol>,
}

/// What a change puts in the place of the old content.
#[derive(Clone, Copy)]
pub(in crate::volume) enum Change<'a> {
    Bytes(&'a [u8]),
    Zero,
    /// The end of the volume is about to be cut off: everything is preserved, nothing is written.
    Cut,
}

/// Why a change was not made.
pub(in crate::volume) enum Refused {
    /// The thin target did not take what had to be preserved; nothing has changed.
    Thin(Error),
    /// Anything else.
    Other(Error),
}

impl From<Error> for Refused {
    fn from(e: Error) -> Refused {
        Refused::Other(e)
    }
}

impl Change<'_> {
    /// Whether the new content of `range` (relative to the change's start) equals `old`.
    fn equals(&self, range: Range<usize>, old: &[u8]) -> bool {
        match self {
            Change::Bytes(data) => &data[range] == old,
            Change::Zero => is_zero(old),
            Change::Cut => false,
        }
    }
}

/// Whether all bytes are zero.
pub(in crate::volume) fn is_zero(bytes: &[u8]) -> bool {
    // Comparing a slice with itself shifted by one is a memcmp.
    bytes
        .first()
        .is_none_or(|&first| first == 0 && bytes[..bytes.len() - 1] == bytes[1..])
}

impl Volume {
    /// Facts.
    pub fn info(&self) -> VolumeInfo {
        // Not the whole entry: this is asked for at every look at a name, and there may be thousands
        // of snapshots in it.
        let (ino_base, added_ns, options) = lock(&self.shared.catalog)
            .volumes
            .get(&self.vol.id)
            .map_or_else(Default::default, |e| (e.ino_base, e.added_ns, e.options));
        let state = self.vol.state();
        let grain = self.vol.grain.bytes();
        let used = self.shared.map.data_grains(self.vol.id()) * grain;
        VolumeInfo {
            id: self.vol.id(),
            uuid: self.vol.uuid,
            name: self.vol.name.clone(),
            source: self.vol.source_path.clone(),
            size: self.vol.size(),
            grain: self.vol.grain,
            state: match (&state.health, &state.unfinished) {
                (VolumeState::Active | VolumeState::Unverified, Some(why)) => {
                    VolumeState::Unfinished(why.clone())
                }
                (health, _) => health.clone(),
            },
            notice: state.astray.clone(),
            ino_base,
            mtime_ns: state.mtime_ns,
            added_ns,
            used,
            reclaimable: state.reclaimable.min(used),
            options,
        }
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.vol.size()
    }

    /// Reads the current content; the range must lie within the size.
    ///
    /// Waits while the volume is reverted.
    ///
    /// # Errors
    /// `Invalid` outside of the size, `Failed` if the source is missing, `Io`.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let _reading = self.reading()?;
        self.check_range(offset, buf.len() as u64, Kind::Invalid)?;
        self.vol.source()?.read_exact_at(offset, buf).context(|| {
            format!(
                "cannot read {} bytes at {offset} of {}",
                buf.len(),
                self.vol.source_path
            )
        })
    }

    /// While it is held the live content is one thing, and the size stays.
    fn reading(&self) -> Result<RwLockReadGuard<'_, ()>> {
        let reading = self.vol.reads.read();
        let reading = reading.unwrap_or_else(PoisonError::into_inner);
        match &self.vol.state().unfinished {
            None => Ok(reading),
            Some(why) => Err(Error::new(
                Kind::Failed,
                format!("volume {}: {why}", self.vol.name),
            )),
        }
    }

    fn check_range(&self, offset: u64, len: u64, kind: Kind) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.vol.size() => Ok(()),
            _ => Err(Error::new(
                kind,
                format!(
                    "{len} bytes at {offset} reach past the end of volume {}",
                    self.vol.name
                ),
            )),
        }
    }

    /// Writes; acknowledged when it returns (I2), durable after [`Volume::flush`]. With `compare`,
    /// grains whose content is equal already are neither written nor preserved.
    ///
    /// # Errors
    /// `NoSpace` past the end or when the thin target is full, `Failed`, `Io`. After an error a
    /// prefix may have been written; every snapshot is exact.
    pub fn write_at(&self, offset: u64, data: &[u8], compare: bool) -> Result<()> {
        self.check_range(offset, data.len() as u64, Kind::NoSpace)?;
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let len = (PIECE_MAX - at % PIECE_MAX).min(rest.len() as u64) as usize;
            self.change_or_wait(at, len as u64, Change::Bytes(&rest[..len]), compare)?;
            at += len as u64;
            rest = &rest[len..];
        }
        Ok(())
    }

    /// Makes a range zero. Both ways give the space back where the source can; the difference is
    /// the caller's promise, not the effect.
    ///
    /// # Errors
    /// As [`Volume::write_at`].
    pub fn zero(&self, offset: u64, len: u64, _how: Zeroing) -> Result<()> {
        self.check_range(offset, len, Kind::NoSpace)?;
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let hole_end = self.zero_hole(at, end)?;
            if hole_end > at {
                at = hole_end;
                continue;
            }
            let len = (PIECE_MAX - at % PIECE_MAX).min(end - at);
            self.change_or_wait(at, len, Change::Zero, false)?;
            at += len;
        }
        Ok(())
    }

    /// Passes over the hole at `at`, if there is one: it reads as zero already. Without a snapshot or
    /// bookmark it is punched all the same, which gives back space that was only reserved. Whole grains. Returns
    /// how far it got.
    fn zero_hole(&self, at: u64, end: u64) -> Result<u64> {
        let vol = &*self.vol;
        let _gate = vol.gate.read().unwrap_or_else(PoisonError::into_inner);
        self.shared.check_open()?;
        vol.state().serving(&self.vol.name)?;
        // The size may have changed since the caller looked.
        self.check_range(at, end - at, Kind::NoSpace)?;
        vol.whole()?;
        let source = vol.source()?;
        let grain = vol.grain.bytes();
        let limit = end.min(at + HOLE_PIECE_MAX);
        let limit = if limit == vol.size() {
            limit
        } else {
            limit - limit % grain
        };
        if !at.is_multiple_of(grain) || at >= limit {
            return Ok(at);
        }
        // Held so that nobody makes data here between the look and the punch.
        let _range = vol.ranges.lock(vol.grain.cover(at..limit));
        let data = source
            .next_data(at)
            .context(|| "cannot look for holes in the source")?;
        let hole_end = data.unwrap_or(vol.size()).min(limit);
        let hole_end = if hole_end == limit {
            limit
        } else {
            hole_end - hole_end % grain
        };
        if hole_end <= at {
            return Ok(at);
        }
        let state = vol.state();
        if state.newest.is_some() || !state.bookmarks.is_empty() {
            // It reads as zero and is not recorded: nothing may be written, see `change`.
            return Ok(hole_end);
        }
        drop(state);
        let done = source.punch(at, hole_end - at);
        vol.dirty.store(true, Ordering::Release);
        done.context(|| format!("cannot discard {} bytes at {at}", hole_end - at))?;
        Ok(hole_end)
    }

    /// One piece, under the volume's policy for a full thin target. While it waits it holds neither
    /// the gate nor a range.
    fn change_or_wait(&self, offset: u64, len: u64, new: Change<'_>, compare: bool) -> Result<()> {
        let mut since = None;
        loop {
            let full = match self.change(offset, len, new, compare) {
                Ok(()) => return Ok(()),
                Err(Refused::Thin(e)) if e.kind() == Kind::NoSpace => e,
                Err(Refused::Thin(e) | Refused::Other(e)) => return Err(e),
            };
            let since = *since.get_or_insert_with(Instant::now);
            if !self.shared.wait_for_space(&self.vol, since) {
                let grains = self.vol.grain.cover(offset..offset + len);
                self.shared.on_full(&self.vol, grains, full)?;
            }
        }
    }

    /// One piece of at most [`PIECE_MAX`] bytes, within one aligned piece.
    fn change(
        &self,
        offset: u64,
        len: u64,
        new: Change<'_>,
        compare: bool,
    ) -> std::result::Result<(), Refused> {
        let vol = &*self.vol;
        let _gate = vol.gate.read().unwrap_or_else(PoisonError::into_inner);
        vol.state().serving(&vol.name)?;
        // The size may have changed since the caller looked.
        self.check_range(offset, len, Kind::NoSpace)?;
        // A write past the new end of a source that was cut off would bring back as zeros what
        // snapshots share with it.
        vol.whole()?;
        self.change_in_gate(offset, len, new, compare)
    }

    /// As [`Volume::change`]; the caller holds the gate and has checked the range.
    pub(in crate::volume) fn change_in_gate(
        &self,
        offset: u64,
        len: u64,
        new: Change<'_>,
        compare: bool,
    ) -> std::result::Result<(), Refused> {
        let vol = &*self.vol;
        self.shared.check_open()?;
        let grains = vol.grain.cover(offset..offset + len);
        let (needs, may_elide) = self.needs(&grains)?;
        if needs.is_empty() && !compare {
            let whole = offset..offset + len;
            self.shared.track(vol, grains).map_err(Refused::Thin)?;
            return Ok(self.put(offset, new, std::slice::from_ref(&whole))?);
        }
        let _range = vol.ranges.lock(grains.clone());
        // Somebody may have preserved some of them while we waited.
        let (needs, _) = self.needs(&grains)?;
        let look = if compare {
            vec![grains.clone()]
        } else {
            needs.clone()
        };
        let mut old = Old::read(vol, grains, &look)?;
        if planted(Bug::GrainInPart) {
            let from = (offset - old.start) as usize;
            old.bytes[..from].fill(0);
            old.bytes[from + len as usize..].fill(0);
        }

        let differs = |grain: u64| {
            let span = vol.grain.span(grain..grain + 1);
            let range = span.start.max(offset)..span.end.min(offset + len);
            let new_range = (range.start - offset) as usize..(range.end - offset) as usize;
            !new.equals(new_range, old.bytes(range))
        };
        let keep_all = !may_elide;
        let mut entries = self.undo(&needs, &old, &|g| keep_all || differs(g));
        if planted(Bug::DiscardUnpreserved) && matches!(new, Change::Zero) {
            entries.clear();
        }
        if !entries.is_empty() {
            self.shared.append(entries).map_err(Refused::Thin)?;
            point("write preserved");
        }
        let looked = |grain: u64| may_elide && look.iter().any(|r| r.contains(&grain));
        let mut runs: Vec<Range<u64>> = Vec::new();
        for grain in old.grains.clone() {
            let span = vol.grain.span(grain..grain + 1);
            let (start, end) = (span.start.max(offset), span.end.min(offset + len));
            if looked(grain) && !differs(grain) {
                // Equal, and perhaps not preserved: not one byte of it may be written, because even
                // a write of equal bytes can be torn. A discard is left out too: where the source
                // cannot punch it would write zeros.
                continue;
            }
            match runs.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => runs.push(start..end),
            }
        }
        for run in &runs {
            let grains = vol.grain.cover(run.clone());
            self.shared.track(vol, grains).map_err(Refused::Thin)?;
        }
        Ok(self.put(offset, new, &runs)?)
    }

    /// The grains of a range that need preserving, and whether equal content may be left out.
    fn needs(&self, grains: &Range<u64>) -> Result<(Vec<Range<u64>>, bool)> {
        let state = self.vol.state();
        state.usable(&self.vol.name)?;
        let needs = match state.newest {
            Some(_) => state.preserved.gaps_in(grains.clone()).collect(),
            None => Vec::new(),
        };
        // A failed sync: what the page cache shows may not be what the medium has.
        Ok((needs, !matches!(state.health, VolumeState::Suspect(_))))
    }

    /// The entries that preserve the old content of those grains that change.
    pub(in crate::volume) fn undo(
        &self,
        needs: &[Range<u64>],
        old: &Old,
        changes: &dyn Fn(u64) -> bool,
    ) -> Vec<Entry> {
        let vol = &*self.vol;
        let epoch = vol.state().epoch;
        let grain = vol.grain.bytes() as usize;
        let mut entries: Vec<Entry> = Vec::new();
        let mut run: Option<(Range<u64>, bool)> = None;
        let flush = |run: &mut Option<(Range<u64>, bool)>, entries: &mut Vec<Entry>| {
            let Some((grains, zero)) = run.take() else {
                return;
            };
            entries.push(if zero {
                let bytes = vol.grain.bytes();
                Entry::plain(Record::grains(
                    RecordType::Zero,
                    vol.id,
                    epoch,
                    grains,
                    bytes,
                ))
            } else {
                let payload = old.padded(grains.clone());
                self.shared
                    .log
                    .preserve(vol.id, epoch, grains.start, grain, payload)
            });
        };
        for at in needs.iter().cloned().flatten().filter(|&g| changes(g)) {
            let zero = is_zero(old.padded_ref(at));
            match &mut run {
                Some((grains, z)) if grains.end == at && *z == zero => grains.end += 1,
                _ => {
                    flush(&mut run, &mut entries);
                    run = Some((at..at + 1, zero));
                }
            }
        }
        flush(&mut run, &mut entries);
        entries
    }

    /// Hands new content to the kernel for the source. Everything needed is preserved by now.
    pub(in crate::volume) fn put(
        &self,
        offset: u64,
        new: Change<'_>,
        runs: &[Range<u64>],
    ) -> Result<()> {
        if runs.is_empty() || matches!(new, Change::Cut) {
            return Ok(());
        }
        let vol = &*self.vol;
        let source = vol.source()?;
        vol.state().note_change(self.shared.env.clock.now_ns());
        for run in runs {
            let len = run.end - run.start;
            let done = match new {
                Change::Bytes(data) => {
                    let from = (run.start - offset) as usize;
                    source.write_all_at(run.start, &[&data[from..from + len as usize]])
                }
                Change::Zero => source.punch(run.start, len),
                Change::Cut => Ok(()),
            };
            point("write half done");
            // After the write: a sync that began before it must not clear this.
            if !planted(Bug::DiscardClean) || !matches!(new, Change::Zero) {
                vol.dirty.store(true, Ordering::Release);
            }
            done.context(|| {
                format!(
                    "cannot write {len} bytes at {} of {}",
                    run.start, vol.source_path
                )
            })?;
        }
        Ok(())
    }

    /// Makes every acknowledged write durable (I3). One sync serves all who asked before it began.
    ///
    /// # Errors
    /// `Failed` once a sync has failed (I7), until the volume is accepted or reopened.
    pub fn flush(&self) -> Result<()> {
        flush(&self.vol)
    }

    /// The first data at or after an offset, `None` if only holes follow.
    ///
    /// # Errors
    /// `Io`.
    pub fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        let _reading = self.reading()?;
        if offset >= self.vol.size() {
            return Ok(None);
        }
        let found = self
            .vol
            .source()?
            .next_data(offset)
            .context(|| "cannot look for data")?;
        self.vol.whole()?;
        Ok(found.filter(|&at| at < self.vol.size()))
    }

    /// The first hole at or after an offset; the size counts as one.
    ///
    /// # Errors
    /// `Io`.
    pub fn next_hole(&self, offset: u64) -> Result<u64> {
        let _reading = self.reading()?;
        if offset >= self.vol.size() {
            return Ok(offset);
        }
        let found = self
            .vol
            .source()?
            .next_hole(offset)
            .context(|| "cannot look for holes")?;
        self.vol.whole()?;
        Ok(found.min(self.vol.size()))
    }

    /// Bytes of storage in use by the source.
    ///
    /// # Errors
    /// `Io`.
    pub fn allocated(&self) -> Result<u64> {
        self.vol
            .source()?
            .allocated()
            .context(|| "cannot stat the source")
    }
}

/// Makes a volume's source durable; see [`Volume::flush`].
pub(in crate::volume) fn flush(vol: &Vol) -> Result<()> {
    let suspect = |why: &str| {
        Error::new(
            Kind::Failed,
            format!(
                "a sync of {} failed ({why}): writes since the last good one may be lost; \
                 'stillframe volume accept' goes on",
                vol.source_path
            ),
        )
    };
    vol.named()?;
    let started = vol.syncs_started.load(Ordering::Acquire);
    let mut succeeded = lock(&vol.sync);
    if let VolumeState::Suspect(why) = &vol.state().health {
        return Err(suspect(why));
    }
    if *succeeded > started || !vol.dirty.swap(false, Ordering::AcqRel) {
        return Ok(());
    }
    let number = vol.syncs_started.fetch_add(1, Ordering::AcqRel) + 1;
    let synced = match planted(Bug::SourceUnsynced) {
        true => Ok(()),
        false => vol.source()?.sync_data(),
    };
    match synced {
        Ok(()) => {
            // Who was deleted meanwhile is durable for nobody.
            vol.named()?;
            *succeeded = number;
            Ok(())
        }
        Err(e) => {
            let why = e.to_string();
            tracing::error!(
                source = vol.source_path,
                "a sync of the source failed: {why}"
            );
            note_failed_sync(vol, &e);
            Err(suspect(&why))
        }
    }
}

/// Remembers that a sync of the source failed (I7): what it covered may be lost, and no later one says so.
pub(in crate::volume) fn note_failed_sync(vol: &Vol, e: &std::io::Error) {
    let mut state = vol.state();
    let keep = !planted(Bug::SyncErrorForgotten);
    if keep && matches!(state.health, VolumeState::Active | VolumeState::Unverified) {
        state.health = VolumeState::Suspect(e.to_string());
    }
}

/// Old content of a run of grains, as far as it was read; what lies past the source's end is zero.
pub(in crate::volume) struct Old {
    grains: Range<u64>,
    grain: usize,
    start: u64,
    bytes: Vec<u8>,
}

impl Old {
    pub(in crate::volume) fn read(
        vol: &Vol,
        grains: Range<u64>,
        look: &[Range<u64>],
    ) -> Result<Old> {
        let span = vol.grain.span(grains.clone());
        let mut bytes = vec![0; (span.end - span.start) as usize];
        let source = vol.source()?;
        for run in look {
            let run = vol.grain.span(run.clone());
            let end = run.end.min(vol.size());
            let part = (run.start - span.start) as usize..(end - span.start) as usize;
            source
                .read_exact_at(run.start, &mut bytes[part])
                .context(|| {
                    format!(
                        "cannot read what must be preserved at {} of {}",
                        run.start, vol.source_path
                    )
                })?;
        }
        #[cfg(feature = "planted")]
        if planted(Bug::SecondCache) {
            static CACHE: std::sync::Mutex<std::collections::BTreeMap<(u32, u64, u64), Vec<u8>>> =
                std::sync::Mutex::new(std::collections::BTreeMap::new());
            let key = (vol.id, span.start, span.end);
            bytes.clone_from(lock(&CACHE).entry(key).or_insert_with(|| bytes.clone()));
        }
        Ok(Old {
            grains,
            grain: vol.grain.bytes() as usize,
            start: span.start,
            bytes,
        })
    }

    pub(in crate::volume) fn bytes(&self, range: Range<u64>) -> &[u8] {
        &self.bytes[(range.start - self.start) as usize..(range.end - self.start) as usize]
    }

    fn padded_ref(&self, grain: u64) -> &[u8] {
        let at = (grain - self.grains.start) as usize * self.grain;
        &self.bytes[at..at + self.grain]
    }

    fn padded(&self, grains: Range<u64>) -> Vec<u8> {
        let at = |g: u64| (g - self.grains.start) as usize * self.grain;
        self.bytes[at(grains.start)..at(grains.end)].to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn zero_is_told_from_nearly_zero() {
        assert!(is_zero(&[]) && is_zero(&[0]) && is_zero(&[0; 4096]));
        for at in [0, 1, 2047, 4095] {
            let mut bytes = [0; 4096];
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "byte {at}");
        }
        assert!(!is_zero(&[7; 9]));
    }
}
