//! Reading a log from its segments: recovery, rebuild of the map, verification.
//!
//! A scan visits every valid batch in LSN order and tells a torn tail from rot:
//! - A batch that a later batch follows was durable once (L1 in `commit`). If its commit block is bad
//!   now, that is rot. Its records are taken from the copy of its table in the next batch; if that is
//!   gone too, they are [`Event::Lost`].
//! - The last batch of the log may be torn: its payload is verified too, and if anything does not
//!   hold, the log ends before it.
//!
//! Segments that their successor's link passes over were abandoned while being made; they are
//! reported and ignored. It reads through [`Dir`], writes nothing, and works on any store directory.

use std::sync::Arc;

use crate::error::{Error, IoContext, Kind, Result};
use crate::log::batch::{Batch, COMMIT_MAX, Expect, HEADER_LEN, Previous, check_header, decode};
use crate::log::keys::{Keys, Sum128};
use crate::log::record::Record;
use crate::log::segment::{self, BATCHES_AT, HEAD_AT, Head, Tail};
use crate::sys::disk::{Dir, Disk, Open};
use crate::units::{BLOCK, Lsn, Place, SECTOR, Uuid};

/// What a scan finds, in order.
#[derive(Debug)]
pub enum Event<'a> {
    /// A batch: from its own commit block or, if that is damaged, from the copy in the next one.
    Batch {
        /// Its number.
        lsn: Lsn,
        /// Its place.
        place: Place,
        /// Byte offset of its end in the segment.
        end: u64,
        /// Wall-clock time; 0 if only the copy is left.
        time_ns: i64,
        /// Its records.
        records: &'a [Record],
        /// The commit block itself is damaged.
        from_copy: bool,
    },
    /// A segment begins.
    Segment {
        /// Its number.
        number: u32,
        /// The segment before it when it was begun; that one may be gone by now.
        before: u32,
    },
    /// Batches whose tables are lost in both copies.
    Lost {
        /// First of them.
        first: Lsn,
        /// Last of them.
        last: Lsn,
        /// Segment.
        segment: u32,
        /// Bytes of the segment that could not be read as batches.
        bytes: std::ops::Range<u64>,
    },
}

/// The result of a scan.
#[derive(Debug, Default)]
pub struct Scanned {
    /// End of the log.
    pub tail: Tail,
    /// The last batch.
    pub previous: Previous,
    /// Largest segment number seen in the directory.
    pub number_max: u32,
    /// Segments that never became part of the log; may be removed.
    pub abandoned: Vec<u32>,
    /// Closed segments and where they end, among those scanned; space behind may be cut.
    pub closed: Vec<(u32, u64)>,
    /// A torn batch was found at the end and is not part of the log.
    pub torn: bool,
}

/// What to scan.
pub struct Scan<'a> {
    /// The directory `log/`.
    pub dir: &'a dyn Dir,
    /// Checksums.
    pub keys: &'a Keys,
    /// The store.
    pub store: Uuid,
    /// First segment to read; 0 for all.
    pub from_segment: u32,
}

struct Segment {
    number: u32,
    disk: Arc<dyn Disk>,
    head: Head,
    /// Where its successor says it ends.
    end: Option<u64>,
}

/// A batch held back until the next one shows that it was durable.
struct Held {
    batch: Batch,
    len: u64,
    checksum: Sum128,
}

struct State<'a, 'v> {
    scan: &'a Scan<'a>,
    visit: &'v mut dyn FnMut(Event<'_>) -> Result<()>,
    held: Option<Held>,
    last_lsn: u64,
    /// The segment scanned before this one.
    scanned: u32,
    /// A stretch that could not be read, up to the next valid batch.
    gap: Option<(u32, u64)>,
    /// The medium did not give a part of the gap. What it would say is not known, so nothing may be
    /// called lost or torn for it: only a copy settles it.
    unread: Option<Error>,
    result: Scanned,
}

impl Scan<'_> {
    /// Visits the log.
    ///
    /// # Errors
    /// `Unsupported` for a record only a newer program can read, the system's errors, and what
    /// `visit` returns. Damage is not an error but an event.
    pub fn run(&self, visit: &mut dyn FnMut(Event<'_>) -> Result<()>) -> Result<Scanned> {
        let mut result = Scanned::default();
        let segments = self.segments(&mut result)?;
        let mut state = State {
            scan: self,
            visit,
            held: None,
            last_lsn: 0,
            scanned: 0,
            gap: None,
            unread: None,
            result,
        };
        for (i, segment) in segments.iter().enumerate() {
            state.segment(segment, i + 1 == segments.len())?;
        }
        state.finish(segments.last())?;
        Ok(state.result)
    }

    /// Opens the segments that belong to the log, with their ends.
    fn segments(&self, result: &mut Scanned) -> Result<Vec<Segment>> {
        let names = self.dir.list().context(|| "cannot list the thin target")?;
        let mut numbers: Vec<u32> = names.iter().filter_map(|n| segment::number(n)).collect();
        numbers.sort_unstable();
        result.number_max = numbers.last().copied().unwrap_or(0);
        numbers.retain(|&n| n >= self.from_segment);
        let mut segments: Vec<Segment> = Vec::new();
        let mut headless: Vec<(u32, Error)> = Vec::new();
        for number in numbers {
            let context = || format!("cannot read segment {number} of the thin target");
            let disk = self
                .dir
                .open(&segment::file_name(number), Open::Write)
                .context(context)?;
            match self.head(&disk, number) {
                Ok(head) => segments.push(Segment {
                    number,
                    disk,
                    head,
                    end: None,
                }),
                Err(e) if self.holds_batches(&disk)? => return Err(e),
                Err(e) => headless.push((number, e)),
            }
        }
        // A head is durable before anything relies on its segment. So a file without one is a
        // creation cut short, if it is at the end or the next segment's link passes over it.
        for (number, e) in headless {
            let next = segments.iter().find(|s| s.number > number);
            if next.is_some_and(|next| next.head.before.segment >= number) {
                return Err(e);
            }
            result.abandoned.push(number);
        }
        let mut kept: Vec<Segment> = Vec::new();
        for segment in segments {
            let before = segment.head.before;
            while kept.last().is_some_and(|k| k.number > before.segment) {
                result.abandoned.extend(kept.pop().map(|k| k.number));
            }
            if let Some(last) = kept.last_mut()
                && last.number == before.segment
            {
                last.end = Some(before.end);
                result.closed.push((last.number, before.end));
            }
            kept.push(segment);
        }
        Ok(kept)
    }

    fn head(&self, disk: &Arc<dyn Disk>, number: u32) -> Result<Head> {
        let mut last = Error::new(Kind::Damaged, format!("segment {number} has no valid head"));
        for at in HEAD_AT {
            let mut sector = vec![0; SECTOR as usize];
            if disk.read_exact_at(at, &mut sector).is_err() {
                continue;
            }
            match Head::decode(&sector, self.keys, self.store, number) {
                Ok(head) => return Ok(head),
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    /// Whether anything in the file looks like a batch; the generation is not known here.
    fn holds_batches(&self, disk: &Arc<dyn Disk>) -> Result<bool> {
        let size = disk.size().context(|| "cannot stat a segment")?;
        let mut magic = [0; 8];
        let mut at = BATCHES_AT;
        while at + HEADER_LEN as u64 <= size {
            disk.read_exact_at(at, &mut magic)
                .context(|| "cannot read a segment")?;
            if magic == crate::log::batch::MAGIC {
                return Ok(true);
            }
            at += BLOCK;
        }
        Ok(false)
    }

    /// The valid batch at an offset, `None` if there is none.
    fn batch_at(&self, segment: &Segment, offset: u64, end: u64) -> Result<Option<Held>> {
        let context = || format!("cannot read segment {}", segment.number);
        let mut block = vec![0; BLOCK as usize];
        if offset + BLOCK > end {
            return Ok(None);
        }
        segment
            .disk
            .read_exact_at(offset, &mut block)
            .context(context)?;
        let expect = Expect {
            store: self.store,
            segment: segment.number,
            generation: segment.head.generation,
            offset,
        };
        let Ok(lengths) = check_header(&block, self.keys, &expect) else {
            return Ok(None);
        };
        let commit_blocks = (lengths.commit as u64).next_multiple_of(BLOCK);
        let len = commit_blocks + u64::from(lengths.payload_blocks) * BLOCK;
        if len > end - offset {
            return Ok(None);
        }
        debug_assert!(lengths.commit <= COMMIT_MAX);
        let mut commit = vec![0; lengths.commit];
        let at_hand = block.len().min(commit.len());
        commit[..at_hand].copy_from_slice(&block[..at_hand]);
        segment
            .disk
            .read_exact_at(offset + at_hand as u64, &mut commit[at_hand..])
            .context(context)?;
        match decode(&commit, self.keys) {
            Ok((batch, checksum)) => Ok(Some(Held {
                batch,
                len,
                checksum,
            })),
            Err(e) if e.kind() == Kind::Unsupported => Err(e),
            Err(_) => Ok(None),
        }
    }

    /// Whether the payload of a batch is what its checksums say.
    fn payload_holds(&self, segment: &Segment, held: &Held) -> Result<bool> {
        for record in held.batch.records.iter().filter(|r| r.payload.len > 0) {
            let place = record.place(held.batch.place());
            let mut payload = vec![0; record.payload.len as usize];
            segment
                .disk
                .read_exact_at(place.offset(), &mut payload)
                .context(|| format!("cannot read segment {}", segment.number))?;
            if self.keys.payload_sums(&payload, record.unit()) != record.body {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl State<'_, '_> {
    fn segment(&mut self, segment: &Segment, is_last: bool) -> Result<()> {
        let size = segment.disk.size().context(|| "cannot stat a segment")?;
        // No segment is larger than its blocks have numbers.
        let end = segment.end.map_or(size, |end| end.min(size));
        let end = end.min(u64::from(u32::MAX) * BLOCK);
        (self.visit)(Event::Segment {
            number: segment.number,
            before: segment.head.before.segment,
        })?;
        if self.last_lsn == 0 {
            self.last_lsn = segment.head.before.last_lsn;
        }
        let mut at = BATCHES_AT;
        while at < end {
            match self.scan.batch_at(segment, at, end) {
                // One that is older than the newest is none: LSNs only grow.
                Ok(Some(found)) if found.batch.lsn > self.newest() => {
                    at += found.len;
                    self.found(found)?;
                    continue;
                }
                Ok(_) => {}
                Err(e) => self.not_read(e)?,
            }
            match self.next_valid(segment, at + BLOCK, end)? {
                Some(next) => {
                    self.gap.get_or_insert((segment.number, at));
                    at = next;
                }
                // Nothing follows: the end of the last segment, or rot at the end of a closed one.
                None if is_last => {
                    self.all_read()?;
                    break;
                }
                // Its end is known: from the next one's link or, where that one is gone, from the
                // size it was cut to before.
                None => {
                    self.gap.get_or_insert((segment.number, at));
                    break;
                }
            }
        }
        if segment.end.is_some_and(|linked| at < linked) {
            // Shorter than its successor remembers it.
            self.gap.get_or_insert((segment.number, at));
        }
        self.scanned = segment.number;
        if is_last {
            self.result.tail.segment = segment.number;
            self.result.tail.generation = segment.head.generation;
            self.result.tail.end = at;
        }
        Ok(())
    }

    fn next_valid(&mut self, segment: &Segment, from: u64, end: u64) -> Result<Option<u64>> {
        let mut magic = [0; 8];
        let mut at = from;
        while at + BLOCK <= end {
            let read = segment.disk.read_exact_at(at, &mut magic);
            if let Err(e) = read.context(|| "cannot read a segment") {
                self.not_read(e)?;
                magic = [0; 8];
            }
            if magic == crate::log::batch::MAGIC {
                match self.scan.batch_at(segment, at, end) {
                    Ok(Some(found)) if found.batch.lsn > self.newest() => return Ok(Some(at)),
                    Ok(_) => {}
                    Err(e) => self.not_read(e)?,
                }
            }
            at += BLOCK;
        }
        Ok(None)
    }

    /// Goes on behind what the medium did not give; other errors are answered.
    fn not_read(&mut self, e: Error) -> Result<()> {
        if e.kind() != Kind::Io {
            return Err(e);
        }
        tracing::error!("{}", e.chain());
        self.unread.get_or_insert(e);
        Ok(())
    }

    /// Refuses to conclude anything from what was not read.
    fn all_read(&mut self) -> Result<()> {
        self.unread.take().map_or(Ok(()), Err)
    }

    fn newest(&self) -> u64 {
        self.held.as_ref().map_or(self.last_lsn, |h| h.batch.lsn)
    }

    /// A valid batch: releases the one before it and settles a gap between the two.
    fn found(&mut self, found: Held) -> Result<()> {
        self.release()?;
        let previous = &found.batch.previous;
        let adjoins = previous.segment == found.batch.segment || previous.segment == self.scanned;
        if self.gap.is_none() && adjoins && previous.lsn > self.last_lsn {
            // It follows a batch that was not found.
            self.gap = Some((previous.segment, previous.offset));
        }
        if let Some((segment, at)) = self.gap.take() {
            let previous = &found.batch.previous;
            let copied = previous.segment == segment
                && previous.offset >= at
                && previous.lsn > self.last_lsn;
            if copied && previous.offset == at {
                // All that was not read lies in the one batch of which there is a copy.
                self.unread = None;
            }
            self.all_read()?;
            if !copied || previous.offset > at {
                let last = if copied {
                    previous.lsn
                } else {
                    found.batch.lsn
                } - 1;
                let end = if copied {
                    previous.offset
                } else {
                    found.batch.offset
                };
                (self.visit)(Event::Lost {
                    first: Lsn(self.last_lsn + 1),
                    last: Lsn(last.max(self.last_lsn + 1)),
                    segment,
                    bytes: at..end.max(at),
                })?;
            }
            if copied {
                (self.visit)(Event::Batch {
                    lsn: Lsn(previous.lsn),
                    place: crate::log::batch::place(previous.segment, previous.offset),
                    end: previous.offset + previous.len,
                    time_ns: 0,
                    records: &previous.records,
                    from_copy: true,
                })?;
                self.last_lsn = previous.lsn;
            }
        }
        self.held = Some(found);
        Ok(())
    }

    fn release(&mut self) -> Result<()> {
        let Some(held) = self.held.take() else {
            return Ok(());
        };
        (self.visit)(Event::Batch {
            lsn: Lsn(held.batch.lsn),
            place: held.batch.place(),
            end: held.batch.offset + held.len,
            time_ns: held.batch.time_ns,
            records: &held.batch.records,
            from_copy: false,
        })?;
        self.last_lsn = held.batch.lsn;
        self.result.tail.checksum = held.checksum;
        self.result.previous = held.batch.as_previous(held.len, held.checksum);
        Ok(())
    }

    /// The last batch may be torn: it counts only if all of it holds.
    fn finish(&mut self, last: Option<&Segment>) -> Result<()> {
        let in_last = self
            .held
            .as_ref()
            .zip(last)
            .filter(|(held, segment)| held.batch.segment == segment.number);
        if let Some((held, segment)) = in_last
            && !self.scan.payload_holds(segment, held)?
        {
            self.result.torn = true;
            self.result.tail.end = held.batch.offset;
            let previous = held.batch.previous.clone();
            self.result.tail.checksum = previous.checksum;
            self.result.previous = previous;
            self.held = None;
        }
        self.release()?;
        self.all_read()?;
        if let Some((segment, at)) = self.gap.take() {
            (self.visit)(Event::Lost {
                first: Lsn(self.last_lsn + 1),
                last: Lsn(self.last_lsn + 1),
                segment,
                bytes: at..at,
            })?;
        }
        // Of a torn batch the one before it may be lost: the next one is behind both, or it would name
        // one that is newer than itself.
        self.result.tail.lsn = self.last_lsn.max(self.result.previous.lsn);
        Ok(())
    }
}
