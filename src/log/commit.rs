//! Writing the log: group commit, segments, the file descriptors of the thin target.
//!
//! Whoever appends while no commit runs becomes the leader: it writes everything that waits as one
//! batch, makes it durable with one sync, hands the records to the [`Sink`], and releases those who
//! wait. While a sync runs newcomers gather; no timer is involved.
//!
//! Invariants:
//! - L1 A batch is written only after the batch before it is durable; so only the last batch of a
//!   log can be torn.
//! - L2 After a failed write or sync nothing more goes into that segment: the next batch opens a new
//!   one whose head says where the old one ends, and the sync is never repeated as proof. A write that
//!   found no space is no such failure: the next batch overwrites what it left.
//! - L3 The sink sees batches in LSN order, each before anyone who waits for it is released.
//! - L4 Every segment begins with a CATALOG batch, so older segments are needed for payload only.
//! - L5 Behind every batch of a writer lies the reserve: [`RESERVE`] bytes of zeros, durable with the
//!   batch, whatever the segment's size. A new segment has its own before its head is written.
//!
//! Where no new segment can be made, records that are no writer's go on in the last one, within its
//! reserve, also after a start (`Writer::go_on`); then into the spare. So they need nothing from a
//! filesystem that has nothing to give, or that others empty as soon as it has.
//!
//! Locks: `queue` (never held over I/O or the sink), then `writer` (held by the leader alone).

use std::collections::{HashMap, VecDeque};
use std::io::ErrorKind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use crate::error::{Error, IoContext, Kind, Result};
use crate::log::batch::{self, Batch, Previous};
use crate::log::keys::Keys;
use crate::log::record::{Payload, Record, RecordType};
use crate::log::room::{Made, SPARE, ZEROS, begin, zero_behind};
use crate::log::segment::{self, BATCHES_AT, HEAD_AT, Head, SEGMENT_MAX, Tail};
use crate::sys::clock::Clock;
use crate::sys::disk::{Dir, Disk, Open};
use crate::sys::planted::{Bug, planted, point};
use crate::units::{BLOCK, COUNTER_MAX, Lsn, Place, Uuid};

/// Payload after which a batch takes no further submissions: one sync then moves enough.
pub const BATCH_PAYLOAD_MAX: usize = 1 << 20;
/// Records after which a batch takes no further submissions; bounds the commit block.
pub const BATCH_RECORDS_MAX: usize = 512;
/// Zeros are written ahead in steps of this many bytes, so that a sync of a batch is one device
/// flush (blocks already allocated) and a small store stays small.
const PREWRITE_STEP: u64 = 4 << 20;
/// Bytes of a batch up to which zeros are written ahead for speed. The next one after a larger batch is
/// likely as large (a revert), and to write its blocks twice costs more than the change of the file's
/// metadata that it saves. What the reserve needs is written ahead all the same.
const AHEAD_BATCH_MAX: u64 = 2 * BATCH_PAYLOAD_MAX as u64;
/// Bytes written ahead that preserved content must leave free (L5): what deletions, marks of failure
/// and new snapshots need when the disk is full.
pub const RESERVE: u64 = 256 << 10;
/// Segment files kept open for reading.
const OPEN_SEGMENTS_MAX: usize = 256;

/// A record to append, with its payload (empty for none).
#[derive(Debug)]
pub struct Entry {
    /// The record; `payload` is filled in when it is placed.
    pub record: Record,
    /// Payload bytes; whole blocks, except for the last of a CATALOG.
    pub payload: Vec<u8>,
}

impl Entry {
    /// A record without payload.
    pub fn plain(record: Record) -> Entry {
        Entry {
            record,
            payload: Vec::new(),
        }
    }
}

/// A batch that has just become durable.
#[derive(Debug)]
pub struct Durable<'a> {
    /// Its number.
    pub lsn: Lsn,
    /// The place of its commit block; payload places are relative to it.
    pub place: Place,
    /// Byte offset behind it.
    pub end: u64,
    /// Its records, payload placed.
    pub records: &'a [Record],
}

/// Takes what has become durable; the engine above.
pub trait Sink: Send + Sync {
    /// Publishes a batch. Called in LSN order by one thread at a time (L3); must not append.
    fn durable(&self, batch: &Durable<'_>);

    /// The catalogue as of everything published so far, for the head of a new segment.
    fn catalog(&self) -> Vec<u8>;

    /// Whether preserved content may take so many bytes more than the segments have now. Called by
    /// one thread at a time; must not append.
    ///
    /// # Errors
    /// The system's error.
    fn may_grow(&self, _bytes: u64) -> Result<bool> {
        Ok(true)
    }
}

/// What a log needs to know of its store.
#[derive(Clone)]
pub struct LogConfig {
    /// The directory `log/`.
    pub dir: Arc<dyn Dir>,
    /// The store.
    pub store: Uuid,
    /// Checksums.
    pub keys: Keys,
    /// Size at which a segment is closed.
    pub segment_bytes: u64,
    /// Time stamps.
    pub clock: Arc<dyn Clock>,
}

/// Where writing goes on; from a scan.
#[derive(Debug, Clone, Default)]
pub struct Resume {
    /// End of the log.
    pub tail: Tail,
    /// The last batch, whose table the next one repeats.
    pub previous: Previous,
    /// The largest segment number in the directory.
    pub number_max: u32,
}

/// An open log.
pub struct Log {
    config: LogConfig,
    queue: Mutex<Queue>,
    released: Condvar,
    writer: Mutex<Writer>,
    readers: RwLock<HashMap<u32, Arc<dyn Disk>>>,
    durable_lsn: AtomicU64,
    /// Bytes of the filesystem that preserved content must leave free besides.
    keep_free: AtomicU64,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Submission>,
    leader: bool,
}

struct Submission {
    entries: Vec<Entry>,
    outcome: Arc<OnceLock<Outcome>>,
}

/// Leadership of the committer. However it ends, those who wait are released.
struct Leading<'a> {
    log: &'a Log,
    outcomes: Vec<Arc<OnceLock<Outcome>>>,
    outcome: Option<Outcome>,
}

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        let broken = || Err((Kind::Io, "the committer stopped in the middle".to_owned()));
        let outcome = self.outcome.take().unwrap_or_else(broken);
        for waiting in self.outcomes.drain(..) {
            waiting.get_or_init(|| outcome.clone());
        }
        lock(&self.log.queue).leader = false;
        self.log.released.notify_all();
    }
}

type Outcome = std::result::Result<Lsn, (Kind, String)>;

struct Writer {
    file: Option<Arc<dyn Disk>>,
    tail: Tail,
    previous: Previous,
    number_max: u32,
    lsn_next: u64,
    prewritten: u64,
    must_roll: bool,
    /// A write or sync failed in the segment for another reason than a lack of space (L2).
    lost: bool,
    /// Successors that were begun and given up since the last roll. While a power cut could bring one
    /// back, its head says where the segment ends.
    given_up: Vec<String>,
    /// Only the CATALOG is in the segment: whatever comes next goes in, however large.
    fresh: bool,
    keep_free: u64,
    /// The spare is there, as far as is known.
    spare: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Log {
    /// Goes on where a scan ended, in a new segment: it is created by the first append. What stands
    /// behind the end of the last one must not be a batch.
    pub fn resume(config: LogConfig, resume: Resume) -> Log {
        let writer = Writer {
            file: None,
            tail: resume.tail,
            previous: resume.previous,
            number_max: resume.number_max.max(resume.tail.segment),
            lsn_next: resume.tail.lsn + 1,
            prewritten: 0,
            must_roll: true,
            lost: false,
            given_up: Vec::new(),
            fresh: false,
            keep_free: 0,
            spare: false,
        };
        Log {
            config,
            queue: Mutex::default(),
            released: Condvar::new(),
            durable_lsn: AtomicU64::new(resume.tail.lsn),
            writer: Mutex::new(writer),
            readers: RwLock::default(),
            keep_free: AtomicU64::new(0),
        }
    }

    /// Makes the spare if there is none: where a filesystem is full, or gives freed space back only
    /// later, it is what the next segment is made of. For a catalogue that may grow by half.
    ///
    /// # Errors
    /// The system's error; `NoSpace` leaves nothing behind.
    pub fn make_spare(&self, sink: &dyn Sink) -> Result<()> {
        // A roll may not take it half made.
        let mut writer = lock(&self.writer);
        if writer.spare {
            return Ok(());
        }
        let context = || "cannot make the spare segment";
        let dir = &self.config.dir;
        let catalog = sink.catalog().len() as u64 * 3 / 2;
        let len = (BATCHES_AT + catalog + 2 * RESERVE).next_multiple_of(BLOCK);
        match dir.open(SPARE, Open::Read) {
            Ok(there) if there.size().context(context)? >= len => {
                writer.spare = true;
                return Ok(());
            }
            // Cut short in the making, or too small by now.
            Ok(_) => dir.remove(SPARE).context(context)?,
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e).context(context),
        }
        let made = dir.open(SPARE, Open::Create).and_then(|file| {
            file.write_all_at(0, &[&vec![0; len as usize]])?;
            file.sync_data()?;
            dir.sync()
        });
        if made.is_err() {
            let _ = dir.remove(SPARE);
        }
        made.context(context)?;
        writer.spare = true;
        Ok(())
    }

    /// Has preserved content leave so many bytes of the filesystem free, from the next time on that
    /// it needs more than was written ahead.
    pub fn set_keep_free(&self, bytes: u64) {
        self.keep_free.store(bytes, Ordering::Release);
    }

    /// Bytes that whoever shares the filesystem with the log leaves free for it.
    pub fn keeps_free(&self) -> u64 {
        self.keep_free.load(Ordering::Acquire) + RESERVE
    }

    /// The checksum keys.
    pub fn keys(&self) -> &Keys {
        &self.config.keys
    }

    /// A PRESERVE of `payload`, which holds whole grains from `first`.
    pub fn preserve(
        &self,
        volume: u32,
        epoch: u64,
        first: u64,
        grain: usize,
        payload: Vec<u8>,
    ) -> Entry {
        let count = u32::try_from(payload.len() / grain).expect("bounded by the batch");
        let mut record = Record::run(RecordType::Preserve, volume, epoch, first, count);
        record.body = self.config.keys.payload_sums(&payload, grain);
        Entry { record, payload }
    }

    /// A record whose payload is bytes of its own kind, checked block by block.
    pub fn document(&self, kind: RecordType, volume: u32, epoch: u64, payload: Vec<u8>) -> Entry {
        let body = self.config.keys.payload_sums(&payload, BLOCK as usize);
        Entry {
            record: Record::plain(kind, volume, epoch, body),
            payload,
        }
    }

    /// Appends records as part of one batch; durable and published when it returns.
    ///
    /// # Errors
    /// `NoSpace` if the thin target is full (nothing was appended), else the system's error (the
    /// records may come back after a crash, unless a later append succeeds).
    pub fn append(&self, sink: &dyn Sink, entries: Vec<Entry>) -> Result<Lsn> {
        let outcome = Arc::new(OnceLock::new());
        let mut queue = lock(&self.queue);
        queue.waiting.push_back(Submission {
            entries,
            outcome: Arc::clone(&outcome),
        });
        loop {
            if let Some(outcome) = outcome.get() {
                return outcome.clone().map_err(|(kind, why)| Error::new(kind, why));
            }
            if queue.leader {
                queue = self
                    .released
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            queue.leader = true;
            let group = take_group(&mut queue.waiting);
            drop(queue);
            self.lead(sink, group);
            queue = lock(&self.queue);
        }
    }

    /// Writes one group and releases its members.
    fn lead(&self, sink: &dyn Sink, group: Vec<Submission>) {
        let mut leading = Leading {
            log: self,
            outcomes: Vec::new(),
            outcome: None,
        };
        let mut entries = Vec::new();
        for submission in group {
            leading.outcomes.push(submission.outcome);
            entries.extend(submission.entries);
        }
        let mut writer = lock(&self.writer);
        writer.keep_free = self.keep_free.load(Ordering::Acquire);
        let outcome = writer.commit(&self.config, sink, &mut entries, &self.durable_lsn);
        leading.outcome = Some(outcome.map_err(|e| (e.kind(), e.chain())));
    }

    /// Appends an empty batch if the last one has records: the newest table then exists twice, and
    /// everything before it is known durable on the medium itself.
    ///
    /// # Errors
    /// As [`Log::append`].
    pub fn seal(&self, sink: &dyn Sink) -> Result<()> {
        if lock(&self.writer).previous.records.is_empty() {
            return Ok(());
        }
        self.append(sink, Vec::new()).map(drop)
    }

    /// The newest durable batch.
    pub fn durable_lsn(&self) -> Lsn {
        Lsn(self.durable_lsn.load(Ordering::Acquire))
    }

    /// Where the log ends: the current segment and the byte offset behind its last durable batch.
    pub fn end(&self) -> (Lsn, u32, u64) {
        let writer = lock(&self.writer);
        (Lsn(writer.tail.lsn), writer.tail.segment, writer.tail.end)
    }

    /// As [`Log::end`], but for a seal at the end: it says nothing, so whoever has taken in all before it
    /// has taken in all, and it can be lost without anybody missing it.
    pub fn end_said(&self) -> (Lsn, u32, u64) {
        let writer = lock(&self.writer);
        let seal = u64::from(writer.previous.records.is_empty());
        let lsn = writer.tail.lsn.saturating_sub(seal);
        (Lsn(lsn), writer.tail.segment, writer.tail.end)
    }

    /// Bytes of the current segment that are written ahead, to be used by the next batches.
    pub fn written_ahead(&self) -> u64 {
        let writer = lock(&self.writer);
        writer.prewritten.saturating_sub(writer.tail.end)
    }

    /// Reads payload.
    ///
    /// # Errors
    /// The system's error; `NotFound` if the segment is gone.
    pub fn read(&self, place: Place, buf: &mut [u8]) -> Result<()> {
        let disk = self.segment(place.segment)?;
        disk.read_exact_at(place.offset(), buf).context(|| {
            format!(
                "cannot read {} bytes at {place:?} of the thin target",
                buf.len()
            )
        })
    }

    fn segment(&self, segment: u32) -> Result<Arc<dyn Disk>> {
        let readers = self.readers.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(disk) = readers.get(&segment) {
            return Ok(Arc::clone(disk));
        }
        drop(readers);
        let disk = self
            .config
            .dir
            .open(&segment::file_name(segment), Open::Write)
            .context(|| format!("cannot open segment {segment} of the thin target"))?;
        let mut readers = self.readers.write().unwrap_or_else(PoisonError::into_inner);
        if readers.len() >= OPEN_SEGMENTS_MAX {
            readers.clear();
        }
        readers.insert(segment, Arc::clone(&disk));
        Ok(disk)
    }

    /// Gives the space of dead payload back to the filesystem. The caller guarantees that the
    /// records naming it are dead for ever and that this is durable (hazard: a punch before the
    /// DELETE).
    ///
    /// # Errors
    /// The system's error.
    pub fn punch(&self, place: Place, blocks: u64) -> Result<()> {
        self.segment(place.segment)?
            .punch(place.offset(), blocks * BLOCK)
            .context(|| format!("cannot free {blocks} blocks at {place:?} of the thin target"))
    }

    /// Puts a good copy of a unit of payload where a damaged one lies; durable and read back when it
    /// returns. Safe in place: what is there does not match its checksum, so a cut in the middle leaves
    /// it as bad as it was, and no other bytes are touched. The caller keeps reclaim away.
    ///
    /// # Errors
    /// `Invalid` if the copy does not match the checksum or nothing is damaged, `Damaged` if it cannot
    /// be read back, the system's errors.
    pub fn mend(&self, place: Place, good: &[u8], sum: u64) -> Result<()> {
        let keys = &self.config.keys;
        let context = || format!("cannot mend {} bytes at {place:?}", good.len());
        let refused = |why: &str| Error::new(Kind::Invalid, format!("{}: {why}", context()));
        if keys.payload(good) != sum {
            return Err(refused("the copy is another content"));
        }
        let disk = self.segment(place.segment)?;
        let mut there = vec![0; good.len()];
        if disk.read_exact_at(place.offset(), &mut there).is_ok() && keys.payload(&there) == sum {
            return Err(refused("nothing is damaged"));
        }
        disk.write_all_at(place.offset(), &[good])
            .and_then(|()| disk.sync_data())
            .and_then(|()| disk.drop_cache())
            .and_then(|()| disk.read_exact_at(place.offset(), &mut there))
            .context(context)?;
        match keys.payload(&there) == sum {
            true => Ok(()),
            false => Err(Error::new(
                Kind::Damaged,
                format!("{}: it does not stay", context()),
            )),
        }
    }

    /// Removes dead segments. None of them may be the current one.
    ///
    /// The segment before each is cut to its end first, durably: the link that says where it ends goes
    /// with the segment. So is one that is to be removed itself, and what a link passes over is gone
    /// durably, too: a power cut may take a later name and bring an earlier one back.
    ///
    /// # Errors
    /// The system's error.
    pub fn remove_segments(&self, segments: &[u32]) -> Result<()> {
        let current = lock(&self.writer).tail.segment;
        let sync = || {
            let done = self.config.dir.sync();
            done.context(|| "cannot sync the thin target's directory")
        };
        assert!(
            segments.iter().all(|&number| number < current),
            "only closed segments are removed"
        );
        if !planted(Bug::LinkFirst) {
            for &number in segments {
                self.cut_predecessor(number)?;
            }
            sync()?;
        }
        for &number in segments {
            if planted(Bug::LinkFirst) {
                self.cut_predecessor(number)?;
            }
            self.readers
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&number);
            self.config
                .dir
                .remove(&segment::file_name(number))
                .context(|| format!("cannot remove segment {number} of the thin target"))?;
            point("segment removed");
        }
        sync()
    }

    /// Cuts the segment before to its end, and removes what was abandoned between the two.
    fn cut_predecessor(&self, number: u32) -> Result<()> {
        let context = || format!("cannot cut the segment before {number}");
        let disk = self.segment(number)?;
        let head = HEAD_AT.iter().find_map(|&at| {
            let mut sector = vec![0; 512];
            disk.read_exact_at(at, &mut sector).ok()?;
            Head::decode(&sector, &self.config.keys, self.config.store, number).ok()
        });
        let Some(head) = head else {
            // Never part of the log: a creation cut short.
            return Ok(());
        };
        let before = head.before;
        for abandoned in self.segments()? {
            if abandoned > before.segment && abandoned < number {
                self.config
                    .dir
                    .remove(&segment::file_name(abandoned))
                    .context(context)?;
            }
        }
        if before.segment == 0 {
            return Ok(());
        }
        let earlier = match self.segment(before.segment) {
            Ok(earlier) => earlier,
            Err(e) if e.kind() == Kind::NotFound => return Ok(()),
            Err(e) => return Err(e),
        };
        if planted(Bug::TailKept) {
            return Ok(());
        }
        if earlier.size().context(context)? > before.end {
            earlier.set_size(before.end).context(context)?;
        }
        // Also when it was cut before: that cut may not have been durable, and a torn batch behind
        // the end must not come back once the link is gone.
        earlier.sync_data().context(context)
    }

    /// Numbers of the segment files, ascending.
    ///
    /// # Errors
    /// The system's error.
    pub fn segments(&self) -> Result<Vec<u32>> {
        let names = self
            .config
            .dir
            .list()
            .context(|| "cannot list the thin target")?;
        let mut numbers: Vec<u32> = names.iter().filter_map(|n| segment::number(n)).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Bytes of storage that the segments use.
    ///
    /// # Errors
    /// The system's error.
    pub fn allocated(&self) -> Result<u64> {
        let mut bytes = 0;
        for number in self.segments()? {
            let segment = match self.segment(number) {
                Ok(segment) => segment,
                // Removed since the listing: it uses nothing.
                Err(e) if e.kind() == Kind::NotFound => continue,
                Err(e) => return Err(e),
            };
            bytes += segment.allocated().context(|| "cannot stat a segment")?;
        }
        Ok(bytes)
    }
}

/// Whether entries come from a writer, whose records have to leave the reserve alone: there is no
/// end to them, and who deletes snapshots to make space must come through.
fn is_bulk(entries: &[Entry]) -> bool {
    entries.iter().any(|e| {
        matches!(
            e.record.kind,
            RecordType::Preserve
                | RecordType::Zero
                | RecordType::Changed
                | RecordType::Bitmap
                | RecordType::Redo
        )
    })
}

/// Takes submissions from the front as long as they fit one batch; at least one. Preserved content
/// goes apart from the rest: it may be refused where the rest still has its reserve.
fn take_group(waiting: &mut VecDeque<Submission>) -> Vec<Submission> {
    let (mut payload, mut records) = (0, 0);
    let mut group: Vec<Submission> = Vec::new();
    while let Some(next) = waiting.front() {
        if group
            .first()
            .is_some_and(|first| is_bulk(&first.entries) != is_bulk(&next.entries))
        {
            break;
        }
        payload += next.entries.iter().map(|e| e.payload.len()).sum::<usize>();
        records += next.entries.len();
        if !group.is_empty() && (payload > BATCH_PAYLOAD_MAX || records > BATCH_RECORDS_MAX) {
            break;
        }
        group.extend(waiting.pop_front());
    }
    group
}

impl Writer {
    /// Writes entries as one batch; after a failure once more in a new segment (L2).
    fn commit(
        &mut self,
        config: &LogConfig,
        sink: &dyn Sink,
        entries: &mut [Entry],
        durable_lsn: &AtomicU64,
    ) -> Result<Lsn> {
        self.check_counters()?;
        let mut first_error = None;
        for _ in 0..2 {
            let written = self
                .roll_if_needed(config, sink, entries, durable_lsn)
                .and_then(|()| self.write(config, sink, entries, durable_lsn));
            match written {
                Ok(lsn) => return Ok(lsn),
                // After a failed sync it is not true that nothing was appended, whatever followed.
                Err(e) if e.kind() == Kind::NoSpace && first_error.is_none() => return Err(e),
                Err(e) => {
                    (self.must_roll, self.lost) = (true, true);
                    first_error.get_or_insert(e);
                }
            }
        }
        Err(first_error.expect("the loop ends here only after an error"))
    }

    /// Whether there are numbers for some more batches and segments: what is written beyond the last that
    /// a reader takes is lost.
    fn check_counters(&self) -> Result<()> {
        const SOME: u64 = 16;
        let spent = self.lsn_next.max(self.tail.generation) > COUNTER_MAX - SOME;
        if spent || self.number_max > u32::MAX - SOME as u32 {
            let why = "the log has as many batches or segments as can be counted";
            return Err(Error::new(Kind::Limit, why));
        }
        Ok(())
    }

    fn roll_if_needed(
        &mut self,
        config: &LogConfig,
        sink: &dyn Sink,
        entries: &[Entry],
        durable_lsn: &AtomicU64,
    ) -> Result<()> {
        let end = self.tail.end + self.batch_len(entries);
        if !self.must_roll && (self.fresh || end <= config.segment_bytes) && end <= SEGMENT_MAX {
            return Ok(());
        }
        match self.roll(config, sink, durable_lsn, is_bulk(entries)) {
            Err(e) if e.kind() == Kind::NoSpace && !is_bulk(entries) => {
                self.without_space(config, sink, entries, durable_lsn, e)
            }
            done => done,
        }
    }

    /// There is no space for a new segment: what was held back for records that are no writer's.
    fn without_space(
        &mut self,
        config: &LogConfig,
        sink: &dyn Sink,
        entries: &[Entry],
        durable_lsn: &AtomicU64,
        full: Error,
    ) -> Result<()> {
        match self.go_on(config, self.batch_len(entries)) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(e) => tracing::debug!("the last segment cannot go on: {}", e.chain()),
        }
        for made in [Made::OfSpare, Made::Bare] {
            match self.next_segment(config, sink, durable_lsn, made) {
                // No spare is no other error.
                Err(e) if matches!(e.kind(), Kind::NoSpace | Kind::NotFound) => {}
                done => return done,
            }
        }
        Err(full)
    }

    fn batch_len(&self, entries: &[Entry]) -> u64 {
        let own: usize = entries.iter().map(|e| e.record.encoded_len()).sum();
        let copy: usize = self.previous.records.iter().map(Record::encoded_len).sum();
        let payload: u64 = entries.iter().map(|e| blocks(e.payload.len())).sum();
        (batch::HEADER_LEN + own + copy + 1024) as u64 + (payload + 1) * BLOCK
    }

    /// Opens a new segment with its reserve.
    ///
    /// # Errors
    /// `NoSpace`: the old one stays as it was.
    fn roll(
        &mut self,
        config: &LogConfig,
        sink: &dyn Sink,
        durable_lsn: &AtomicU64,
        bulk: bool,
    ) -> Result<()> {
        let reserve = BATCHES_AT + (blocks(sink.catalog().len()) + 1) * BLOCK + RESERVE;
        if bulk {
            // Not even begun: a writer waits for space and asks often.
            let space = config.dir.space();
            let space = space.context(|| "cannot tell the store's free space")?;
            if space.available < self.keep_free + reserve {
                let why = "the thin target has no space left for another segment";
                return Err(Error::new(Kind::NoSpace, why));
            }
        }
        self.next_segment(config, sink, durable_lsn, Made::New(reserve))
    }

    /// Makes a segment: head, then a CATALOG batch (L4).
    fn next_segment(
        &mut self,
        config: &LogConfig,
        sink: &dyn Sink,
        durable_lsn: &AtomicU64,
        made: Made,
    ) -> Result<()> {
        let number = self.number_max + 1;
        let head = Head {
            store: config.store,
            segment: number,
            generation: self.tail.generation + 1,
            before: self.tail.link(),
        };
        let name = segment::file_name(number);
        let context = || format!("cannot create segment {number} of the thin target");
        if made == Made::OfSpare {
            self.spare = false;
        }
        let file = match begin(config.dir.as_ref(), &name, &head.encode(&config.keys), made) {
            Ok(file) => file,
            Err((e, begun)) => {
                if begun {
                    self.give_up(number, name);
                }
                return Err(Error::io(context(), e));
            }
        };
        point("segment begun");
        self.number_max = number;
        let ready = match file.size() {
            Ok(ready) => ready,
            Err(e) => {
                self.give_up(number, name);
                return Err(Error::io(context(), e));
            }
        };
        let closed = self.file.replace(file);
        let (closed_tail, closed_ahead) = (self.tail, self.prewritten);
        self.tail = Tail {
            segment: number,
            generation: head.generation,
            end: BATCHES_AT,
            ..closed_tail
        };
        self.prewritten = ready;
        let catalog = sink.catalog();
        let body = config.keys.payload_sums(&catalog, BLOCK as usize);
        let record = Record::plain(RecordType::Catalog, 0, 0, body);
        let entry = Entry {
            record,
            payload: catalog,
        };
        if let Err(e) = self.write(config, sink, &mut [entry], durable_lsn) {
            // Abandoned: its successor's link passes over it, so a scan ignores what it holds.
            let _ = config.dir.remove(&name);
            self.file = closed;
            (self.tail, self.prewritten) = (closed_tail, closed_ahead);
            self.give_up(number, name);
            return Err(e);
        }
        point("segment has its catalogue");
        (self.must_roll, self.lost, self.fresh) = (false, false, true);
        self.given_up.clear();
        self.secure_reserve();
        if let Some(closed) = closed.or_else(|| open_last(config, closed_tail.segment)) {
            // Space written ahead and not used; if this fails, recovery does it.
            let _ = closed.set_size(closed_tail.end);
        }
        Ok(())
    }

    /// A segment was begun and given up. Its head may come back with a power cut and says where this
    /// segment ends: nothing more may go into it, and its number is spent.
    fn give_up(&mut self, number: u32, name: String) {
        self.number_max = number;
        self.must_roll = true;
        self.given_up.push(name);
    }

    /// Has the last segment take a batch of `len` bytes in what was written ahead, past the size at
    /// which it would be closed and also after a start. Answers whether there is room for it.
    ///
    /// What made it take nothing more is done away with, durably, before: successors that were begun,
    /// and after a start whatever stands behind the last batch.
    ///
    /// # Errors
    /// The system's error: nothing may go into it.
    fn go_on(&mut self, config: &LogConfig, len: u64) -> Result<bool> {
        let context = || "cannot go on in the last segment of the thin target";
        // Without a batch its name may not be durable, whatever a sync says after one that failed.
        if self.lost || self.tail.segment == 0 || self.tail.end == BATCHES_AT {
            return Ok(false);
        }
        if !self.given_up.is_empty() && !planted(Bug::HeadKept) {
            for name in &self.given_up {
                match config.dir.remove(name) {
                    Err(e) if e.kind() != ErrorKind::NotFound => return Err(e).context(context),
                    _ => {}
                }
            }
            config.dir.sync().context(context)?;
        }
        self.given_up.clear();
        if self.file.is_none() {
            let name = segment::file_name(self.tail.segment);
            let file = config.dir.open(&name, Open::Write).context(context)?;
            self.prewritten = zero_behind(file.as_ref(), self.tail.end).context(context)?;
            self.file = Some(file);
        }
        if self.tail.end + len > self.prewritten.min(SEGMENT_MAX) {
            return Ok(false);
        }
        self.must_roll = false;
        Ok(true)
    }

    /// Writes the reserve ahead in a new segment if it was made without: what the closed segment gives
    /// back goes to whoever comes first. As far as there is space; the next batch's sync covers it.
    fn secure_reserve(&mut self) {
        let Some(file) = &self.file else { return };
        let until = self.tail.end + RESERVE;
        while self.prewritten < until {
            let len = (until - self.prewritten).min(ZEROS.len() as u64);
            let zeros = &ZEROS[..len as usize];
            if file.write_all_at(self.prewritten, &[zeros]).is_err() {
                break;
            }
            self.prewritten += len;
        }
    }

    /// Writes one batch at the tail and makes it durable.
    fn write(
        &mut self,
        config: &LogConfig,
        sink: &dyn Sink,
        entries: &mut [Entry],
        durable_lsn: &AtomicU64,
    ) -> Result<Lsn> {
        let file = Arc::clone(self.file.as_ref().expect("a segment is open after a roll"));
        let mut records: Vec<Record> = entries.iter().map(|e| e.record.clone()).collect();
        let commit_len = Batch::commit_len(&records, &self.previous.records);
        let mut block = (commit_len as u64).div_ceil(BLOCK);
        let first = block;
        for (record, entry) in records.iter_mut().zip(entries.iter()) {
            if !entry.payload.is_empty() {
                let len = u32::try_from(entry.payload.len()).expect("a batch is below 4 GiB");
                let at = u32::try_from(block).expect("a batch is below 2^32 blocks");
                record.payload = Payload { len, block: at };
                block += blocks(entry.payload.len());
            }
        }
        let batch = Batch {
            store: config.store,
            segment: self.tail.segment,
            generation: self.tail.generation,
            lsn: self.lsn_next,
            durable_upto: self.tail.lsn,
            time_ns: config.clock.now_ns(),
            offset: self.tail.end,
            payload_blocks: u32::try_from(block - first).expect("a batch is below 2^32 blocks"),
            records,
            previous: self.previous.clone(),
        };
        self.lsn_next += 1;
        let (commit, checksum) = batch.encode(&config.keys);
        let end = self.tail.end + block * BLOCK;
        if planted(Bug::DurableEarly) {
            durable_lsn.store(batch.lsn, Ordering::Release);
            sink.durable(&Durable {
                lsn: Lsn(batch.lsn),
                place: batch.place(),
                end,
                records: &batch.records,
            });
        }
        self.put(config, sink, &file, &commit, entries, end)?;
        point("batch durable");

        self.tail.end = end;
        self.tail.lsn = batch.lsn;
        self.tail.checksum = checksum;
        self.fresh = false;
        self.previous = batch.as_previous(block * BLOCK, checksum);
        durable_lsn.store(batch.lsn, Ordering::Release);
        let durable = Durable {
            lsn: Lsn(batch.lsn),
            place: batch.place(),
            end,
            records: &batch.records,
        };
        sink.durable(&durable);
        Ok(Lsn(batch.lsn))
    }

    /// Writes commit block, payload and what is written ahead; one sync.
    fn put(
        &mut self,
        config: &LogConfig,
        sink: &dyn Sink,
        file: &Arc<dyn Disk>,
        commit: &[u8],
        entries: &[Entry],
        end: u64,
    ) -> Result<()> {
        let known = self.prewritten;
        self.write_ahead(config, sink, file, end, is_bulk(entries))?;
        let mut parts: Vec<&[u8]> = vec![commit];
        for entry in entries {
            parts.push(&entry.payload);
            let padding =
                entry.payload.len().next_multiple_of(BLOCK as usize) - entry.payload.len();
            parts.push(&ZEROS[..padding]);
        }
        parts.retain(|p| !p.is_empty());
        let context = || "cannot write to the thin target";
        if let Err(e) = file.write_all_at(self.tail.end, &parts) {
            // There may be a hole before what was written ahead just now: it is not the reserve.
            self.prewritten = known;
            return Err(e).context(context);
        }
        point("batch written");
        if planted(Bug::UndoUnsynced) && is_bulk(entries) {
            return Ok(());
        }
        let synced = match file.sync_data() {
            Err(_) if planted(Bug::SyncRetried) => file.sync_data(),
            synced => synced,
        };
        if synced.is_ok() && end - self.tail.end > AHEAD_BATCH_MAX {
            // So much is seldom read soon, and memory that was in use a moment ago is written to
            // faster than new memory. It is no matter if it stays.
            let _ = file.drop_cache();
        }
        synced.map_err(|e| {
            // Even when space ran out: what a failed sync covered is lost, so this is no NoSpace
            // that could be tried again in the same place.
            (self.must_roll, self.lost) = (true, true);
            Error::with_source(Kind::Io, "cannot make the thin target durable", e)
        })
    }

    /// Writes zeros behind a batch that will end at `end`. For preserved content the reserve has to
    /// be there before anything is written; for the rest this is only a matter of speed.
    fn write_ahead(
        &mut self,
        config: &LogConfig,
        sink: &dyn Sink,
        file: &Arc<dyn Disk>,
        end: u64,
        bulk: bool,
    ) -> Result<()> {
        let needed = match bulk {
            true => end + RESERVE,
            false => end,
        };
        let ahead = needed.saturating_sub(self.prewritten);
        if ahead == 0 {
            return Ok(());
        }
        if self.keep_free > 0 {
            let space = config
                .dir
                .space()
                .context(|| "cannot tell the store's free space")?;
            if bulk && space.available < self.keep_free + ahead {
                let why = "the thin target has no space left but what deletions need";
                return Err(Error::new(Kind::NoSpace, why));
            }
        }
        let from = self.prewritten.max(end);
        let step = match end - self.tail.end > AHEAD_BATCH_MAX {
            true => needed,
            false => (needed + 1)
                .next_multiple_of(PREWRITE_STEP)
                .min(config.segment_bytes)
                .max(needed),
        };
        // A limit that cannot be looked up does not keep anybody from deleting.
        let limited = !sink.may_grow(step - self.prewritten).unwrap_or(false);
        if bulk && limited && !sink.may_grow(ahead)? {
            let why = "the thin target is at its limit";
            return Err(Error::new(Kind::NoSpace, why));
        }
        // Without its ballast the disk is full or nearly so: nothing is taken that is not needed.
        let scarce = self.keep_free > 0 || limited;
        if scarce && !bulk {
            self.prewritten = self.prewritten.max(end);
            return Ok(());
        }
        for until in if scarce { [needed; 2] } else { [step, needed] } {
            let zeros = vec![0; (until - from) as usize];
            let written = match planted(Bug::AllocatedOnly) {
                true => file.set_size(until),
                false => file.write_all_at(from, &[&zeros]),
            };
            match written {
                Ok(()) => {
                    self.prewritten = until;
                    return Ok(());
                }
                Err(e) if bulk && until == needed => {
                    return Err(Error::io("the thin target has no space left", e));
                }
                Err(_) => {}
            }
        }
        self.prewritten = self.prewritten.max(end);
        Ok(())
    }
}

/// The last segment of the log before this one was opened, to be cut.
fn open_last(config: &LogConfig, number: u32) -> Option<Arc<dyn Disk>> {
    let name = segment::file_name(number);
    (number > 0).then(|| config.dir.open(&name, Open::Write).ok())?
}

fn blocks(len: usize) -> u64 {
    (len as u64).div_ceil(BLOCK)
}
