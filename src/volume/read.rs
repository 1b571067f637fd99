//! Reading a snapshot: plan, run, look again.
//!
//! The plan says for each run of grains whether it is clean (read it from the source), zero, or
//! preserved (read it from the log and verify it). Writers publish a preserved grain before they
//! overwrite it (I1), so after reading clean runs the reader asks whether anything was published
//! since its plan, and if so plans again and re-reads what is preserved now. A byte it returns is
//! therefore of the snapshot's instant, whatever is written meanwhile; no writer waits for it.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, IoContext, Kind, Result};
use crate::map::{Run, RunKind};
use crate::sys::planted::{Bug, planted};
use crate::units::{Epoch, Place};
use crate::volume::facts::SnapshotInfo;
use crate::volume::shared::{Point, Shared, Vol};

/// Grains planned at a time when looking for data and holes.
const LOOK_GRAINS: u64 = 4096;

/// An open snapshot; holding it keeps its data, also after it is deleted.
pub struct Snapshot {
    shared: Arc<Shared>,
    vol: Arc<Vol>,
    info: SnapshotInfo,
}

impl Snapshot {
    /// A snapshot whose epoch the caller has pinned; dropping it releases the pin.
    pub(in crate::volume) fn pinned(
        shared: Arc<Shared>,
        vol: Arc<Vol>,
        info: SnapshotInfo,
    ) -> Snapshot {
        Snapshot { shared, vol, info }
    }

    /// Facts, as of opening; the name may have changed since.
    pub fn info(&self) -> SnapshotInfo {
        self.info.clone()
    }

    /// Bytes at the instant.
    pub fn size(&self) -> u64 {
        self.info.size
    }

    /// Whether it is one of this volume's.
    pub(in crate::volume) fn is_of(&self, vol: &Vol) -> bool {
        self.vol.id == vol.id && self.vol.uuid == vol.uuid
    }

    fn check(&self) -> Result<()> {
        let state = self.vol.state();
        if let Some(why) = state.failed.get(&self.info.epoch.0) {
            return Err(Error::new(
                Kind::Failed,
                format!(
                    "snapshot {}@{} has failed: {why}",
                    self.info.volume, self.info.name
                ),
            ));
        }
        state.usable(&self.vol.name)
    }

    /// Reads; the range must lie within the size.
    ///
    /// # Errors
    /// `Invalid` outside of the size, `Failed` once the snapshot has failed, `Damaged` if preserved
    /// content does not match its checksum, `Io`. Never a byte that is not of the instant.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let end = offset
            .checked_add(buf.len() as u64)
            .filter(|&end| end <= self.info.size);
        let Some(end) = end else {
            return Err(Error::new(
                Kind::Invalid,
                "a read past the end of a snapshot",
            ));
        };
        if buf.is_empty() {
            return Ok(());
        }
        self.check()?;
        let published = self.shared.map.publish_count(self.vol.id());
        let clean = self.fill(offset..end, offset, buf)?;
        let again = self.shared.map.publish_count(self.vol.id()) != published;
        if !clean.is_empty() && again && !planted(Bug::ReaderTrusts) {
            for range in clean {
                self.refill(range, offset, buf)?;
            }
        }
        // A snapshot that failed while we read may have lost a grain we took from the source.
        self.check()
    }

    fn plan(&self, bytes: &Range<u64>) -> Result<Vec<Run>> {
        let grains = self.vol.grain.cover(bytes.clone());
        self.shared.healing(|map| {
            let blocks = self.vol.grain_blocks();
            map.plan(self.vol.id(), self.info.epoch, blocks, grains.clone())
        })
    }

    fn clip(&self, run: &Run, bytes: &Range<u64>) -> Range<u64> {
        let span = self.vol.grain.span(run.grains.clone());
        span.start.max(bytes.start)..span.end.min(bytes.end)
    }

    /// Fills a range of the buffer that begins at `origin`; returns the parts read from the source.
    fn fill(&self, bytes: Range<u64>, origin: u64, buf: &mut [u8]) -> Result<Vec<Range<u64>>> {
        let mut clean: Vec<Range<u64>> = Vec::new();
        for run in self.plan(&bytes)? {
            let part = self.clip(&run, &bytes);
            let out = &mut buf[(part.start - origin) as usize..(part.end - origin) as usize];
            match &run.kind {
                RunKind::Source => {
                    self.read_source(part.start, out)?;
                    clean.push(part);
                }
                RunKind::Zero => out.fill(0),
                RunKind::Preserved { .. } => self.read_preserved(&run, part, out)?,
            }
        }
        Ok(clean)
    }

    /// Re-reads those parts of a range read from the source that are preserved by now. What still is
    /// not stands: had it been overwritten before it was read, this second look would show it.
    fn refill(&self, bytes: Range<u64>, origin: u64, buf: &mut [u8]) -> Result<()> {
        for run in self.plan(&bytes)? {
            let part = self.clip(&run, &bytes);
            let out = &mut buf[(part.start - origin) as usize..(part.end - origin) as usize];
            match &run.kind {
                RunKind::Source => {}
                RunKind::Zero => out.fill(0),
                RunKind::Preserved { .. } => self.read_preserved(&run, part, out)?,
            }
        }
        Ok(())
    }

    fn read_source(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        loop {
            // Past the source's recorded size a longer snapshot reads as zero; inside it, a short
            // read is an error and never zeros.
            let size = self.vol.size();
            let inside = size.saturating_sub(offset).min(out.len() as u64) as usize;
            let (data, rest) = out.split_at_mut(inside);
            rest.fill(0);
            match self.vol.source()?.read_exact_at(offset, data) {
                // Cut off while we read: what it held is preserved by now, and looked for again.
                Err(_) if self.vol.size() < size => {}
                done => {
                    return done.context(|| {
                        format!(
                            "cannot read {inside} bytes at {offset} of {}",
                            self.vol.source_path
                        )
                    });
                }
            }
        }
    }

    /// Reads whole grains, verifies them, and hands out the part asked for.
    fn read_preserved(&self, run: &Run, part: Range<u64>, out: &mut [u8]) -> Result<()> {
        let RunKind::Preserved { place, sums } = &run.kind else {
            return Ok(());
        };
        let grain = self.vol.grain.bytes();
        let grains = self.vol.grain.cover(part.clone());
        let skipped = grains.start - run.grains.start;
        let span = self.vol.grain.span(grains.clone());
        let place = place.advance(skipped * self.vol.grain.blocks());
        let sums = &sums[skipped as usize..];
        let verify = |bytes: &[u8]| {
            if planted(Bug::SumsIgnored) {
                return Ok(());
            }
            for (i, content) in bytes.chunks(grain as usize).enumerate() {
                if self.shared.log.keys().payload(content) != sums[i] {
                    return Err(self.rot(grains.start + i as u64));
                }
            }
            Ok(())
        };
        if span == part {
            self.read_log(place, out, &grains)?;
            return verify(out);
        }
        let mut whole = vec![0; (span.end - span.start) as usize];
        self.read_log(place, &mut whole, &grains)?;
        verify(&whole)?;
        let from = (part.start - span.start) as usize;
        out.copy_from_slice(&whole[from..from + out.len()]);
        Ok(())
    }

    fn read_log(&self, place: Place, out: &mut [u8], grains: &Range<u64>) -> Result<()> {
        self.shared.log.read(place, out).inspect_err(|e| {
            if e.kind() == Kind::Io {
                for grain in grains.clone() {
                    let scrub = &self.shared.scrub;
                    scrub.note(self.vol.id, self.info.epoch.0, grain);
                }
            }
        })
    }

    fn rot(&self, grain: u64) -> Error {
        let at = self.vol.grain.span(grain..grain + 1);
        let why = format!(
            "preserved content of {}@{} at bytes {}..{} does not match its checksum",
            self.info.volume, self.info.name, at.start, at.end
        );
        tracing::error!("{why}");
        self.shared
            .scrub
            .note(self.vol.id, self.info.epoch.0, grain);
        Error::new(Kind::Damaged, why)
    }

    /// The first data at or after an offset, `None` if only holes and zeros follow.
    ///
    /// # Errors
    /// As [`Snapshot::read_at`].
    pub fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        self.check()?;
        self.seek(offset, true)
    }

    /// The first hole or preserved zero at or after an offset; the size counts as one.
    ///
    /// # Errors
    /// As [`Snapshot::read_at`].
    pub fn next_hole(&self, offset: u64) -> Result<u64> {
        self.check()?;
        if offset >= self.info.size {
            return Ok(offset);
        }
        Ok(self.seek(offset, false)?.unwrap_or(self.info.size))
    }

    /// The first offset that is data (`want_data`) or is not.
    fn seek(&self, offset: u64, want_data: bool) -> Result<Option<u64>> {
        let size = self.info.size;
        let mut at = offset;
        while at < size {
            let published = self.shared.map.publish_count(self.vol.id());
            let window = at..self.window_end(at);
            let runs = self.plan(&window)?;
            let found = self.seek_runs(&runs, &window, want_data)?;
            let moved = self.shared.map.publish_count(self.vol.id()) != published;
            if moved && self.plan(&window)? != runs {
                // What the source showed may be newer than the snapshot.
                continue;
            }
            if let Some(found) = found {
                return Ok(Some(found).filter(|&f| f < size));
            }
            at = window.end;
            if want_data
                && matches!(
                    &runs[..],
                    [Run {
                        kind: RunKind::Source,
                        ..
                    }]
                )
            {
                at = self.skip_clean_hole(at)?;
            }
        }
        Ok(None)
    }

    fn window_end(&self, at: u64) -> u64 {
        let grain = self.vol.grain.bytes();
        (at / grain)
            .saturating_add(LOOK_GRAINS)
            .saturating_mul(grain)
            .min(self.info.size)
    }

    fn seek_runs(&self, runs: &[Run], window: &Range<u64>, data: bool) -> Result<Option<u64>> {
        for run in runs {
            let part = self.clip(run, window);
            let found = match run.kind {
                RunKind::Preserved { .. } => data.then_some(part.start),
                RunKind::Zero => (!data).then_some(part.start),
                RunKind::Source => self.seek_source(&part, data)?,
            };
            if let Some(found) = found.filter(|&f| f < part.end) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn seek_source(&self, part: &Range<u64>, data: bool) -> Result<Option<u64>> {
        let source = self.vol.source()?;
        let size = self.vol.size();
        if part.start >= size {
            return Ok((!data).then_some(part.start));
        }
        // A device may go on behind the volume's end; that is none of the volume's data.
        let found = if data {
            let found = source.next_data(part.start);
            found.map(|found| found.filter(|&at| at < size))
        } else {
            source.next_hole(part.start).map(|at| Some(at.min(size)))
        };
        let found = found.context(|| "cannot look for holes in the source")?;
        // What somebody cut off is no hole.
        self.vol.whole()?;
        Ok(found)
    }

    /// After a clean window without data: how far neither the source has data nor anything is
    /// preserved. Keeps a walk over a large sparse image short.
    fn skip_clean_hole(&self, at: u64) -> Result<u64> {
        let data = match at < self.vol.size() {
            true => self
                .vol
                .source()?
                .next_data(at)
                .context(|| "cannot look for data")?,
            false => None,
        };
        self.vol.whole()?;
        let grain = self.vol.grain.bytes();
        let preserved = self
            .shared
            .map
            .next_preserved(self.vol.id(), self.info.epoch, at / grain)
            .map(|g| g * grain);
        let next = data.unwrap_or(u64::MAX).min(preserved.unwrap_or(u64::MAX));
        Ok(next.min(self.info.size).max(at))
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        let mut state = self.vol.state();
        let epoch = self.info.epoch.0;
        let Some(pins) = state.pins.get_mut(&epoch) else {
            return;
        };
        *pins -= 1;
        if *pins > 0 {
            return;
        }
        state.pins.remove(&epoch);
        if state.points.get(&epoch) == Some(&Point::Deleted) {
            state.points.remove(&epoch);
            self.vol.refresh(&self.shared.map, &mut state);
            drop(state);
            self.shared.mark_reclaim(self.vol.id);
        }
    }
}

impl Shared {
    /// Has reclaim look at a volume.
    pub(in crate::volume) fn mark_reclaim(&self, volume: u32) {
        crate::volume::shared::lock(&self.reclaim_due).insert(volume);
    }

    /// Bytes that only this snapshot needs, from the bitmaps.
    pub(in crate::volume) fn unique_bytes(&self, vol: &Vol, epoch: u64) -> u64 {
        let state = vol.state();
        let before = state
            .points
            .range(..epoch)
            .next_back()
            .map(|(&e, _)| Epoch(e));
        let after = state
            .points
            .range(epoch + 1..)
            .next()
            .map(|(&e, _)| Epoch(e));
        drop(state);
        self.map
            .unique_grains(vol.id(), before, Epoch(epoch), after)
            * vol.grain.bytes()
    }
}
