//! Writing to a clone.
//!
//! The first write of a grain puts the whole grain, merged with what lies beneath, into the overlay,
//! makes the overlay durable, then says so in the log (CLONE_ALLOC), then counts it to the layer, then
//! is acknowledged. A grain that lies in the layer is overwritten in place, in the page cache. So a
//! crash leaves each grain either as it was beneath or as it was written, never stale bytes that an
//! earlier crash left in the overlay.
//!
//! Past the end of a growing clone the overlay reads as zero wherever the layer holds it; its size is
//! in the same record as the data that reaches it.

use std::ops::Range;
use std::sync::PoisonError;
use std::time::Instant;

use crate::error::{Error, Kind, Result};
use crate::log::commit::{BATCH_PAYLOAD_MAX, Entry};
use crate::sys::planted::{Bug, planted, point};
use crate::units::VOLUME_SIZE_MAX;
use crate::volume::clone_records::clone_alloc_record;
use crate::volume::layers::{CloneRt, View};
use crate::volume::shared::{Shared, lock};

/// Bytes that one write handles at a time: bounds its memory.
const PIECE_MAX: u64 = BATCH_PAYLOAD_MAX as u64;
/// Bytes that one zeroing handles at a time.
const ZERO_PIECE_MAX: u64 = 64 << 20;
/// Bytes that overlays leave free, besides what the log is to find: a segment's head, a checkpoint.
const LEAVE_FREE: u64 = 1 << 20;

/// A writer of a clone.
pub struct Writer<'a> {
    pub shared: &'a Shared,
    pub clone: &'a CloneRt,
}

fn past_the_end(offset: u64, len: u64) -> Error {
    Error::new(
        Kind::NoSpace,
        format!("{len} bytes at {offset} reach past the end of a clone"),
    )
}

impl Writer<'_> {
    /// See [`crate::volume::OpenClone::write_at`].
    pub fn write(&self, offset: u64, data: &[u8], compare: bool) -> Result<()> {
        let len = data.len() as u64;
        let end = offset
            .checked_add(len)
            .ok_or_else(|| past_the_end(offset, len))?;
        let view = self.clone.view()?;
        if end > view.size && !view.growing {
            return Err(past_the_end(offset, len));
        }
        if end > VOLUME_SIZE_MAX {
            return Err(Error::new(Kind::Limit, "a clone is at most 8 EiB large"));
        }
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let len = (PIECE_MAX - at % PIECE_MAX).min(rest.len() as u64) as usize;
            self.with_space(&|| self.change(at, &rest[..len], compare))?;
            at += len as u64;
            rest = &rest[len..];
        }
        Ok(())
    }

    /// Space that can be given back is, and space is waited for as long as the volume says, before anybody
    /// is refused: as for a writer of the volume, but for its policy. Holds no gate meanwhile. A piece
    /// that was refused has changed no grain that was not in the layer already, and is done anew.
    fn with_space(&self, change: &dyn Fn() -> Result<()>) -> Result<()> {
        let mut since = None;
        loop {
            let full = match change() {
                Err(e) if e.kind() == Kind::NoSpace => e,
                done => return done,
            };
            let since = *since.get_or_insert_with(Instant::now);
            if !self.shared.wait_for_space(&self.clone.vol, since) {
                return Err(full);
            }
        }
    }

    /// Overlays share the filesystem with the log and leave it what it keeps for itself.
    fn room(&self, bytes: u64) -> Result<()> {
        let Ok(space) = self.shared.env.dir.space() else {
            return Ok(());
        };
        let keep = self.shared.log.keeps_free() + LEAVE_FREE;
        if space.available < bytes.saturating_add(keep) {
            let why = "the store's disk is full: nothing was written to the clone";
            return Err(Error::new(Kind::NoSpace, why));
        }
        Ok(())
    }

    /// Overlays count against the limit of this run; what lies in one already may be written on.
    fn within_limit(&self, fresh: u64) -> Result<()> {
        if fresh == 0 || self.shared.limit_allows(fresh)? {
            return Ok(());
        }
        let why = "the limit for the store is reached: nothing was written to the clone";
        Err(Error::new(Kind::NoSpace, why))
    }

    /// One piece of at most [`PIECE_MAX`] bytes.
    fn change(&self, offset: u64, new: &[u8], compare: bool) -> Result<()> {
        let clone = self.clone;
        let grain = clone.vol.grain;
        let end = offset + new.len() as u64;
        let _gate = clone.gate.read().unwrap_or_else(PoisonError::into_inner);
        self.shared.check_open()?;
        let view = clone.writable()?;
        if end > view.size && !view.growing {
            return Err(past_the_end(offset, new.len() as u64));
        }
        let grains = grain.cover(offset..end);
        let held = || {
            view.top()
                .map(|top| lock(&top.set).contains_range(grains.clone()))
        };
        // What makes a clone longer may have to be taken back, so there everybody takes turns.
        if !compare && !view.growing && held()? {
            self.room(new.len() as u64)?;
            clone.note_change(self.shared.env.clock.now_ns());
            return view.top()?.overlay.write(offset, new);
        }
        let _range = clone.ranges.lock(grains.clone());
        // Somebody may have put some of them into the layer, or made the clone longer.
        let view = clone.writable()?;
        let parts: Vec<Range<u64>> = match compare {
            true => self.differing(&view, offset, new)?,
            false => std::iter::once(offset..end).collect(),
        };
        if parts.is_empty() {
            return Ok(());
        }
        let top = view.top()?;
        let missing = self.missing(&view, &parts)?;
        let fresh: u64 = missing
            .iter()
            .map(|g| (g.end - g.start) * grain.bytes())
            .sum();
        self.room(fresh + new.len() as u64)?;
        self.within_limit(fresh)?;
        clone.note_change(self.shared.env.clock.now_ns());
        for run in &missing {
            self.put_fresh(&view, run, offset, new)?;
        }
        let grows = end > view.size;
        let put = || -> Result<()> {
            for part in &parts {
                self.put_held(&view, part, &missing, offset, new)?;
            }
            if missing.is_empty() && !grows {
                return Ok(());
            }
            if !planted(Bug::OverlayUnsynced) {
                top.overlay.sync()?;
            }
            point("overlay synced");
            let mut said = missing.clone();
            if said.is_empty() {
                said.push(grains.end - 1..grains.end);
            }
            self.say(&view, &said, false, if view.growing { end } else { 0 })
        };
        let done = put();
        if done.is_err() && grows {
            self.take_back(&view, offset.max(view.size)..end);
        }
        done
    }

    /// A write that was to make the clone longer failed: what it left behind the end must not appear
    /// when somebody else makes it longer.
    fn take_back(&self, view: &View, range: Range<u64>) {
        // The range of grains is locked, so nobody else has written there meanwhile.
        let done = view.top().and_then(|top| top.overlay.zero(range));
        if let Err(e) = done {
            let why = format!("what a failed write left cannot be removed: {}", e.chain());
            self.clone.state().broken.get_or_insert(why);
        }
    }

    /// Says durably that grains lie in the layer, and counts them from then on.
    fn say(&self, view: &View, runs: &[Range<u64>], zero: bool, size: u64) -> Result<()> {
        let clone = self.clone;
        let top = view.top()?;
        let grain = clone.vol.grain.bytes();
        let record = |run: &Range<u64>| {
            let run = run.clone();
            Entry::plain(clone_alloc_record(
                clone.vol.id,
                top.id,
                run,
                grain,
                zero,
                size,
            ))
        };
        self.shared.append(runs.iter().map(record).collect())?;
        let mut set = lock(&top.set);
        for run in runs {
            set.insert_range(run.clone());
        }
        drop(set);
        for run in runs {
            top.overlay.note_held(run.clone());
        }
        let mut state = clone.state();
        state.entry.size = state.entry.size.max(size);
        Ok(())
    }

    /// The parts of a write that differ from what is there, by grains.
    fn differing(&self, view: &View, offset: u64, new: &[u8]) -> Result<Vec<Range<u64>>> {
        let grain = self.clone.vol.grain;
        let end = offset + new.len() as u64;
        let mut old = vec![0; new.len()];
        let known = view.size.clamp(offset, end);
        view.read(offset, &mut old[..(known - offset) as usize])?;
        let mut parts: Vec<Range<u64>> = Vec::new();
        for g in grain.cover(offset..end) {
            let span = grain.span(g..g + 1);
            let part = span.start.max(offset)..span.end.min(end);
            let at = (part.start - offset) as usize..(part.end - offset) as usize;
            if part.end <= known && new[at.clone()] == old[at] {
                continue;
            }
            match parts.last_mut() {
                Some(last) if last.end == part.start => last.end = part.end,
                _ => parts.push(part),
            }
        }
        Ok(parts)
    }

    /// The grains of some parts that do not lie in the layer yet.
    fn missing(&self, view: &View, parts: &[Range<u64>]) -> Result<Vec<Range<u64>>> {
        let grain = self.clone.vol.grain;
        let set = lock(&view.top()?.set);
        let runs = parts
            .iter()
            .flat_map(|part| set.gaps_in(grain.cover(part.clone())).collect::<Vec<_>>());
        Ok(runs.collect())
    }

    /// Puts whole grains into the overlay: new content, and around it what lies beneath.
    fn put_fresh(&self, view: &View, run: &Range<u64>, offset: u64, new: &[u8]) -> Result<()> {
        let grain = self.clone.vol.grain;
        let span = grain.span(run.clone());
        let inside = span.start.max(offset)..span.end.min(offset + new.len() as u64);
        let mut whole = vec![0; (span.end - span.start) as usize];
        let known = view.size.clamp(span.start, span.end);
        for rest in [span.start..inside.start, inside.end..span.end] {
            let rest = rest.start..rest.end.min(known);
            if rest.start < rest.end {
                let at = (rest.start - span.start) as usize..(rest.end - span.start) as usize;
                view.read(rest.start, &mut whole[at])?;
            }
        }
        let at = (inside.start - span.start) as usize..(inside.end - span.start) as usize;
        let from = (inside.start - offset) as usize..(inside.end - offset) as usize;
        whole[at].copy_from_slice(&new[from]);
        view.top()?.overlay.write(span.start, &whole)
    }

    /// Overwrites the grains of a part that lie in the layer.
    fn put_held(
        &self,
        view: &View,
        part: &Range<u64>,
        missing: &[Range<u64>],
        offset: u64,
        new: &[u8],
    ) -> Result<()> {
        let grain = self.clone.vol.grain;
        let mut at = part.start;
        let fresh = missing.iter().map(|run| grain.span(run.clone()));
        let fresh = fresh.filter(|span| span.end > part.start && span.start < part.end);
        for span in fresh.chain(std::iter::once(part.end..part.end)) {
            if at < span.start {
                let bytes = (at - offset) as usize..(span.start - offset) as usize;
                view.top()?.overlay.write(at, &new[bytes])?;
            }
            at = at.max(span.end);
        }
        Ok(())
    }

    /// See [`crate::volume::OpenClone::zero`].
    pub fn zero(&self, offset: u64, len: u64) -> Result<()> {
        let grain = self.clone.vol.grain.bytes();
        let mut at = offset;
        loop {
            let view = self.clone.view()?;
            let end = offset.checked_add(len).filter(|&end| end <= view.size);
            let end = end.ok_or_else(|| past_the_end(offset, len))?;
            // What reads as a hole is passed over.
            let Some(next) = view.seek(at..end, true)? else {
                self.shared.check_open()?;
                return self.clone.writable().map(drop);
            };
            at = at.max(next - next % grain);
            let head = at.next_multiple_of(grain).min(end);
            // Behind the clone's end its last grain is zero anyhow, and stays so if the size is fixed.
            let tail = match end == view.size && !view.growing {
                true => end.next_multiple_of(grain),
                false => end - end % grain,
            };
            let stop = if at < head {
                head
            } else if at < tail {
                tail.min((at + ZERO_PIECE_MAX) / grain * grain)
            } else {
                end
            };
            if at.is_multiple_of(grain) && stop <= tail {
                self.with_space(&|| self.zero_grains(at / grain..stop / grain))?;
            } else {
                let zeros = vec![0; (stop - at) as usize];
                self.with_space(&|| self.change(at, &zeros, true))?;
            }
            at = stop;
            if at >= end {
                return Ok(());
            }
        }
    }

    /// Zeroes whole grains.
    fn zero_grains(&self, grains: Range<u64>) -> Result<()> {
        let clone = self.clone;
        let grain = clone.vol.grain;
        let _gate = clone.gate.read().unwrap_or_else(PoisonError::into_inner);
        self.shared.check_open()?;
        let _range = clone.ranges.lock(grains.clone());
        let view = clone.writable()?;
        let top = view.top()?;
        let (held, gaps): (Vec<_>, Vec<_>) = {
            let set = lock(&top.set);
            (
                set.ranges_in(grains.clone()).collect(),
                set.gaps_in(grains).collect(),
            )
        };
        let mut fresh = Vec::new();
        for gap in gaps {
            self.data_beneath(&view, gap, &mut fresh)?;
        }
        if held.is_empty() && fresh.is_empty() {
            return Ok(());
        }
        self.room(0)?;
        clone.note_change(self.shared.env.clock.now_ns());
        for run in held.iter().chain(&fresh) {
            top.overlay.zero(grain.span(run.clone()))?;
        }
        if fresh.is_empty() {
            return Ok(());
        }
        // What an earlier crash may have left there must be gone before it counts.
        if !planted(Bug::OverlayUnsynced) {
            top.overlay.sync()?;
        }
        for runs in fresh.chunks(BATCH_RUNS) {
            self.say(&view, runs, true, 0)?;
        }
        Ok(())
    }

    /// The grains of a run under which there is data.
    fn data_beneath(
        &self,
        view: &View,
        run: Range<u64>,
        found: &mut Vec<Range<u64>>,
    ) -> Result<()> {
        let grain = self.clone.vol.grain;
        let span = grain.span(run.clone());
        let end = span.end.min(view.size);
        let mut at = span.start;
        while at < end {
            let Some(data) = view.seek(at..end, true)? else {
                break;
            };
            let hole = view.seek(data..end, false)?.unwrap_or(end);
            let grains = grain.cover(data..hole);
            match found.last_mut() {
                Some(last) if last.end >= grains.start => last.end = last.end.max(grains.end),
                _ => found.push(grains.clone()),
            }
            at = grains.end * grain.bytes();
        }
        Ok(())
    }
}

/// Runs that are said in one batch.
const BATCH_RUNS: usize = 256;
