//! The moving of a revert: grains to the target's content, a group at a time, three groups at once.
//!
//! A group goes through three steps, each in the order of the groups and each with one group at a time:
//! *reading* it (what the target has, what the source has, which grains differ and how they would be
//! preserved), *preserving* it (one append, durable when it returns), *writing* the source. They overlap:
//! while a group is preserved, the next is read and the one before is written. Two threads besides the
//! caller's do the first and the last step; where they cannot be started, the caller does all in turn.
//!
//! Promises:
//! - I1: a group is handed to the writing step when its append has succeeded, never before, and whole.
//! - Groups have no grain in common, so what is read ahead is not what is being written.
//! - When a step fails, no later group reaches the step after it; what was being read ahead is dropped,
//!   what is preserved may be written or not. Nothing runs any more when [`Volume::bring`] returns.
//! - Memory is bounded: new content for three groups at most, old content for two and a piece. Hand-overs
//!   wait for each other; nothing queues.
//!
//! It syncs no source and holds no lock of its own; the caller holds the volume's gate and `reads`.

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use crate::error::{Error, IoContext, Kind, Result};
use crate::log::commit::Entry;
use crate::map::GrainSet;
use crate::sys::planted::point;
use crate::volume::live::{Change, Old, PIECE_MAX, Volume, is_zero};
use crate::volume::read::Snapshot;

/// Bytes of grains that are preserved with one batch: each batch waits for a sync, so a revert takes
/// larger ones than writers do.
pub(in crate::volume) const GROUP_BYTES: u64 = 4 * PIECE_MAX;
/// Runs of grains that are preserved with one batch. Grain by grain, records and their copy stay far
/// below the limit of a commit block.
pub(in crate::volume) const RUNS_MAX: usize = 1024;

/// Bytes from which a run of zeros is punched out of the source and not written. Each punch is a change
/// of the filesystem's own records, often with a discard: for a single page it takes many times as long
/// as writing the page. A grain that differs from zeros holds data, so writing it takes no new space
/// (on a filesystem that copies on write, as much as any write).
pub(in crate::volume) const PUNCH_MIN: u64 = 64 << 10;

/// A run of grains of the target, and which bytes of it have to be written.
struct Part {
    start: u64,
    new: Vec<u8>,
    data: Vec<Range<u64>>,
    zero: Vec<Range<u64>>,
}

impl Part {
    fn written(&self) -> impl Iterator<Item = &Range<u64>> {
        self.data.iter().chain(&self.zero)
    }
}

/// Grains that have been read and compared.
struct Group {
    /// Grains looked at, those that were passed over included.
    seen: u64,
    /// What preserves them.
    entries: Vec<Entry>,
    /// What is to be written once that is durable.
    parts: Vec<Part>,
}

/// Adds a run that begins at or after the end of the last one.
fn push(runs: &mut Vec<Range<u64>>, run: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        _ => runs.push(run),
    }
}

/// The groups of a revert, read one after another, in the order of their grains.
struct Groups<'a, I> {
    volume: &'a Volume,
    target: &'a Snapshot,
    runs: I,
    /// Of the run that was begun.
    rest: Range<u64>,
}

impl<I: Iterator<Item = Range<u64>>> Groups<'_, I> {
    /// The next group; `None` when there is nothing more to look at.
    fn read(&mut self) -> Result<Option<Group>> {
        let grain = self.volume.vol.grain.bytes();
        let mut group = Group {
            seen: 0,
            entries: Vec::new(),
            parts: Vec::new(),
        };
        let mut room = GROUP_BYTES;
        // A grain is never larger than a group.
        while room >= grain && group.parts.len() < RUNS_MAX {
            if self.rest.is_empty() {
                let Some(run) = self.runs.next() else { break };
                self.rest = run;
            }
            let from = self.volume.skip_holes(self.target, self.rest.clone())?;
            let end = self.rest.end.min(from + room.min(PIECE_MAX) / grain);
            group.seen += end - self.rest.start;
            self.rest.start = end;
            if from < end {
                self.volume.compare(self.target, from..end, &mut group)?;
                room -= (end - from) * grain;
            }
        }
        Ok((group.seen > 0).then_some(group))
    }
}

impl Volume {
    /// Brings every grain of a set that lies within a range of grains to the target; returns the bytes
    /// written. `progress` is told (bytes looked at, bytes to look at).
    ///
    /// # Errors
    /// The first error of the first group that met one; groups before it are done.
    pub(in crate::volume) fn bring(
        &self,
        target: &Snapshot,
        set: &GrainSet,
        within: Range<u64>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<u64> {
        let grain = self.vol.grain.bytes();
        let total = set.ranges_in(within.clone()).map(|r| r.end - r.start);
        let total = total.sum::<u64>() * grain;
        let groups = || Groups {
            volume: self,
            target,
            runs: set.ranges_in(within.clone()),
            rest: 0..0,
        };
        let mut seen = 0;
        let mut told = |group: &Group| {
            seen += group.seen * grain;
            progress(seen, total);
        };
        thread::scope(|scope| {
            // No room in between: a group waits where it was made until the next step takes it.
            let (read, to_preserve) = sync_channel(0);
            let (preserved, to_write) = sync_channel(0);
            let named = |name: &str| thread::Builder::new().name(name.into());
            let mut ahead = groups();
            let reading = move || while hand_over(ahead.read().transpose(), &read) {};
            let writing = move || self.write_groups(&to_write);
            let reader = named("revert-read").spawn_scoped(scope, reading);
            let writer = named("revert-write").spawn_scoped(scope, writing);
            let (Ok(reader), Ok(writer)) = (reader, writer) else {
                // One that was started ends, because nobody takes or gives it anything.
                drop((to_preserve, preserved));
                return self.bring_in_turn(groups(), &mut told);
            };
            let done = self.preserve_groups(&to_preserve, preserved, &mut told);
            // Who reads ahead learns that nobody takes it any more.
            drop(to_preserve);
            let stopped = |_| Error::new(Kind::Io, "a revert stopped in the middle");
            let all_read = reader.join().map_err(stopped);
            let written = writer.join().map_err(stopped)?;
            all_read.and(done).and(written)
        })
    }

    /// As [`Volume::bring`], on one thread.
    fn bring_in_turn<I: Iterator<Item = Range<u64>>>(
        &self,
        mut groups: Groups<'_, I>,
        told: &mut dyn FnMut(&Group),
    ) -> Result<u64> {
        let mut written = 0;
        while let Some(mut group) = groups.read()? {
            self.preserve_group(&mut group)?;
            told(&group);
            written += self.write_group(group.parts)?;
        }
        Ok(written)
    }

    /// The second step of all groups, in order. Ends well also when nobody writes any more: who wrote
    /// says why.
    fn preserve_groups(
        &self,
        groups: &Receiver<Result<Group>>,
        preserved: SyncSender<Vec<Part>>,
        told: &mut dyn FnMut(&Group),
    ) -> Result<()> {
        for group in groups {
            let mut group = group?;
            self.preserve_group(&mut group)?;
            told(&group);
            if preserved.send(group.parts).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Makes durable what the grains of a group hold (I1).
    fn preserve_group(&self, group: &mut Group) -> Result<()> {
        self.shared.check_open()?;
        let entries = std::mem::take(&mut group.entries);
        if !entries.is_empty() {
            self.shared.append(entries)?;
        }
        Ok(())
    }

    /// The third step of all groups, in order, as far as they come.
    fn write_groups(&self, groups: &Receiver<Vec<Part>>) -> Result<u64> {
        let mut written = 0;
        for parts in groups {
            written += self.write_group(parts)?;
        }
        Ok(written)
    }

    /// Writes a group whose old content is durable by now; returns the bytes.
    fn write_group(&self, parts: Vec<Part>) -> Result<u64> {
        let first = parts.first().map_or(0, |part| part.start);
        let mut end = first;
        let mut written = 0;
        for part in parts {
            // The undo snapshot may be deleted by now, and a bookmark be newer than what is left.
            for run in part.written() {
                let grains = self.vol.grain.cover(run.clone());
                self.shared.track(&self.vol, grains)?;
                written += run.end - run.start;
                end = end.max(run.end);
            }
            point("revert overwrites");
            self.put(part.start, Change::Bytes(&part.new), &part.data)?;
            self.put(part.start, Change::Zero, &part.zero)?;
        }
        if written > 0 {
            // So that little is left for the sync at the end.
            self.vol.source()?.start_writing(first, end - first);
        }
        Ok(written)
    }

    /// How far the grains of a long run are holes on both sides.
    fn skip_holes(&self, target: &Snapshot, run: Range<u64>) -> Result<u64> {
        let grain = self.vol.grain.bytes();
        if (run.end - run.start) * grain < PIECE_MAX {
            return Ok(run.start);
        }
        let at = run.start * grain;
        let here = self.vol.source()?.next_data(at);
        let here = here.context(|| "cannot look for holes in the source")?;
        let data = here.unwrap_or(u64::MAX);
        if data / grain <= run.start {
            return Ok(run.start);
        }
        let data = data.min(target.next_data(at)?.unwrap_or(u64::MAX));
        Ok((data / grain).clamp(run.start, run.end))
    }

    /// Adds a run of grains to a group: what preserves those that differ from the target, and which of
    /// its bytes have to be written, by whole grains.
    fn compare(&self, target: &Snapshot, run: Range<u64>, group: &mut Group) -> Result<()> {
        let grain = self.vol.grain;
        let clip = |grains: Range<u64>| {
            let span = grain.span(grains);
            span.start..span.end.min(target.size())
        };
        let span = clip(run.clone());
        let mut part = Part {
            start: span.start,
            new: vec![0; (span.end - span.start) as usize],
            data: Vec::new(),
            zero: Vec::new(),
        };
        target.read_at(span.start, &mut part.new)?;
        let old = Old::read(&self.vol, run.clone(), std::slice::from_ref(&run))?;
        let mut differing: Vec<Range<u64>> = Vec::new();
        let mut zero: Vec<Range<u64>> = Vec::new();
        for at in run {
            let bytes = clip(at..at + 1);
            let from = (bytes.start - span.start) as usize;
            let new = &part.new[from..from + (bytes.end - bytes.start) as usize];
            if new == old.bytes(bytes.clone()) {
                continue;
            }
            push(&mut differing, at..at + 1);
            match is_zero(new) {
                true => push(&mut zero, bytes),
                false => push(&mut part.data, bytes),
            }
        }
        let (long, short): (Vec<_>, Vec<_>) = zero
            .into_iter()
            .partition(|run| run.end - run.start >= PUNCH_MIN);
        part.zero = long;
        part.data.extend(short);
        if part.data.is_empty() {
            // What is punched needs no bytes.
            part.new = Vec::new();
        }
        let needs: Vec<Range<u64>> = {
            let state = self.vol.state();
            let gaps = |run: Range<u64>| state.preserved.gaps_in(run).collect::<Vec<_>>();
            differing.into_iter().flat_map(gaps).collect()
        };
        group.entries.extend(self.undo(&needs, &old, &|_| true));
        group.parts.push(part);
        Ok(())
    }
}

/// Gives a group to the next step; whether there may be more to give.
fn hand_over(group: Option<Result<Group>>, to: &SyncSender<Result<Group>>) -> bool {
    match group {
        Some(group) => {
            let last = group.is_err();
            to.send(group).is_ok() && !last
        }
        None => false,
    }
}
