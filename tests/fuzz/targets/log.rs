//! The log: segment heads, batches, their tables and payload, the scan of all of it, and recovery.
//!
//! Input: segments taken apart into fields (see [`Batch`]), put together here with right lengths, chaining
//! and checksums, as far as no flag asks for others; then single bytes that rot afterwards. What is mutated
//! is so what stands behind the checksums, which nobody can forge without the store's secret, and what
//! a fault of the writer could put there. Held: a scan answers or errs, tells batches by growing LSN
//! and inside their segments; a store that opens can be read and written, and opens again to the same.

use stillframe::error::Kind;
use stillframe::log::batch::{Expect, HEADER_LEN, MAGIC, check_header, decode};
use stillframe::log::record::{Record, RecordType, decode_table, encode_table};
use stillframe::log::scan::{Event, Scan, Scanned};
use stillframe::log::segment::{self, BATCHES_AT, HEAD_AT};
use stillframe::map::memory::MemoryIndexHome;
use stillframe::sys::disk::{Dir, Disk};
use stillframe::units::{BLOCK, SECTOR};
use stillframe::volume::Engine;

use super::bytes::{Input, put_counted, trimmed};
use super::disk::MemDir;
use super::store::{environment, name, segments, settings, valid};
use super::{Target, nothing};

pub const TARGET: Target = Target {
    name: "log",
    seeds,
    run,
    reaches: &["refused", "scanned", "lost", "torn", "not opened", "opened"],
    tokens: &[
        &[1, 0],
        &[2, 0],
        &[3, 0],
        &[4, 0],
        &[16, 0],
        &[17, 0],
        &[19, 0],
        &[20, 0],
        &[21, 0],
        &[22, 0],
        &[30, 0],
        &[31, 0],
        &[0, 0x10, 0, 0],
        &[0, 0x20, 0, 0],
        &[1, 0, 0, 0],
        &[0, 0, 0, 0x80],
    ],
    max_len: 48 << 10,
    group: 1,
    reset: nothing,
};

/// Opens the engine, too.
const OPEN: u8 = 1;

/// Flags of a batch; a flag that is not set has the harness make it right.
const KEEP_LENGTHS: u8 = 1;
const KEEP_SUMS: u8 = 2;
const KEEP_PLACE: u8 = 4;
const KEEP_CHAIN: u8 = 8;
const BAD_CHECKSUM: u8 = 16;

/// Where a header's own fields begin, behind magic and store, and end.
const FIELDS: std::ops::Range<usize> = 24..136;
const HEADER_SUM_AT: usize = HEADER_LEN - 8;
/// A head's fields behind magic and store.
const HEAD_FIELDS: std::ops::Range<usize> = 24..88;
/// Largest segment here.
const SEGMENT: usize = 512 << 10;
/// Grains of a run without payload: a volume of 8 EiB in one record is sound and takes long.
const RUN_MAX: u32 = 1 << 16;

/// A segment: its number and its content.
type File = (u32, Vec<u8>);

/// A batch as the input holds it.
struct Batch<'a> {
    flags: u8,
    fields: [u8; FIELDS.end - FIELDS.start],
    table: &'a [u8],
    copy: &'a [u8],
    payload: &'a [u8],
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// What the next batch says of this one.
#[derive(Default, Clone, Copy)]
struct Last {
    lsn: [u8; 8],
    segment: [u8; 4],
    offset: [u8; 8],
    len: [u8; 8],
    checksum: [u8; 16],
}

/// Bounds runs and makes the checksums of payload right.
fn settle(
    batch: &Batch<'_>,
    header: &[u8],
    table: &[u8],
    commit: usize,
    payload: &[u8],
) -> Vec<u8> {
    let Ok(mut records) = decode_table(table, u32_at(header, 76)) else {
        return table.to_vec();
    };
    for record in &mut records {
        if record.payload.len == 0 {
            record.count = record.count.min(RUN_MAX);
            continue;
        }
        let first = (commit as u64).div_ceil(BLOCK);
        let at = u64::from(record.payload.block).checked_sub(first);
        let from = at.and_then(|at| usize::try_from(at * BLOCK).ok());
        let part = from.and_then(|from| payload.get(from..from + record.payload.len as usize));
        if batch.flags & KEEP_SUMS == 0
            && let Some(part) = part
        {
            let sums = valid().keys.payload_sums(part, record.unit());
            if sums.len() == record.body.len() {
                record.body = sums;
            }
        }
    }
    let again = encode_table(&records);
    match again.len() == table.len() {
        true => again,
        // A record of a type nobody knows was passed over.
        false => table.to_vec(),
    }
}

impl<'a> Batch<'a> {
    fn take(input: &mut Input<'a>) -> Batch<'a> {
        Batch {
            flags: input.u8(),
            fields: input.array(),
            table: input.counted(),
            copy: input.counted(),
            payload: input.counted(),
        }
    }

    /// Commit block and payload, in whole blocks.
    fn bytes(&self, number: u32, generation: &[u8], at: usize, last: &mut Last) -> Vec<u8> {
        let mut header = vec![0; HEADER_LEN];
        put(&mut header, 0, &MAGIC);
        put(&mut header, 8, &valid().superblock.store.0);
        put(&mut header, FIELDS.start, &self.fields);
        if self.flags & KEEP_PLACE == 0 {
            put(&mut header, 24, generation);
            put(&mut header, 56, &(at as u64).to_le_bytes());
            put(&mut header, 64, &number.to_le_bytes());
        }
        if self.flags & KEEP_CHAIN == 0 {
            put(&mut header, 92, &last.segment);
            put(&mut header, 96, &last.lsn);
            put(&mut header, 104, &last.offset);
            put(&mut header, 112, &last.len);
            put(&mut header, 120, &last.checksum);
        }
        let real = HEADER_LEN + self.table.len() + self.copy.len() + 16;
        let commit = real.next_multiple_of(SECTOR as usize);
        let blocks = self.payload.len().div_ceil(BLOCK as usize);
        let said = u32_at(&header, 72) as usize;
        // Zeros at the end of payload are not in the input.
        let blocks = if said <= 32 { blocks.max(said) } else { blocks };
        if self.flags & KEEP_LENGTHS == 0 {
            put(&mut header, 68, &(commit as u32).to_le_bytes());
            put(&mut header, 72, &(blocks as u32).to_le_bytes());
            put(&mut header, 80, &(self.table.len() as u32).to_le_bytes());
            put(&mut header, 88, &(self.copy.len() as u32).to_le_bytes());
        }
        let mut payload = self.payload.to_vec();
        payload.resize(blocks * BLOCK as usize, 0);
        let table = settle(self, &header, self.table, commit, &payload);
        let keys = &valid().keys;
        let sum = keys.commit(&header[..HEADER_SUM_AT]);
        put(&mut header, HEADER_SUM_AT, &sum[..8]);
        let mut bytes = header;
        bytes.extend_from_slice(&table);
        bytes.extend_from_slice(self.copy);
        bytes.resize(commit - 16, 0);
        let mut checksum = keys.commit(&bytes);
        checksum[0] ^= u8::from(self.flags & BAD_CHECKSUM != 0);
        bytes.extend_from_slice(&checksum);
        bytes.resize(commit.next_multiple_of(BLOCK as usize), 0);
        bytes.extend_from_slice(&payload);
        *last = Last {
            lsn: bytes[32..40].try_into().unwrap(),
            segment: number.to_le_bytes(),
            offset: (at as u64).to_le_bytes(),
            len: (bytes.len() as u64).to_le_bytes(),
            checksum,
        };
        bytes
    }
}

/// Puts an input together: files by number.
fn assemble(input: &mut Input<'_>) -> Vec<File> {
    let mut files: Vec<File> = Vec::new();
    let mut last = Last::default();
    for _ in 0..input.u8() % 5 {
        let flags = input.u8();
        let mut head = vec![0; SECTOR as usize];
        put(&mut head, 0, &segment::MAGIC);
        put(&mut head, 8, &valid().superblock.store.0);
        put(&mut head, HEAD_FIELDS.start, &input.array::<64>());
        if flags & KEEP_CHAIN == 0 {
            // Where the segment before ends is said again after it was changed.
            let (number, end) = files
                .last()
                .map_or((0, 0), |(n, bytes)| (*n, bytes.len() as u64));
            put(&mut head, 40, &number.to_le_bytes());
            put(&mut head, 56, &end.to_le_bytes());
            put(&mut head, 64, &last.lsn);
            put(&mut head, 72, &last.checksum);
        }
        let sum = valid().keys.head(&head[..HEAD_FIELDS.end]);
        put(&mut head, HEAD_FIELDS.end, &sum);
        let number = u32_at(&head, 24);
        let generation = head[32..40].to_vec();
        let mut bytes = vec![0; BATCHES_AT as usize];
        for at in HEAD_AT {
            put(&mut bytes, at as usize, &head);
        }
        for _ in 0..input.u8() % 64 {
            let batch = Batch::take(input);
            if bytes.len() < SEGMENT {
                let more = batch.bytes(number, &generation, bytes.len(), &mut last);
                bytes.extend_from_slice(&more);
            }
        }
        if number > 0 && files.iter().all(|(n, _)| *n != number) {
            files.push((number, bytes));
        }
    }
    for _ in 0..input.u8() {
        let (which, at, value) = (input.u8(), input.u32(), input.u8());
        let len = files.len().max(1);
        if let Some((_, bytes)) = files.get_mut(usize::from(which) % len) {
            let at = at as usize % bytes.len();
            bytes[at] = value;
        }
    }
    files
}

/// Takes a segment's file apart, its first batches.
fn take_apart(number: u32, file: &[u8], most: usize) -> Vec<u8> {
    let valid = valid();
    let mut out = vec![0];
    out.extend_from_slice(&file[HEAD_FIELDS]);
    let generation = u64::from_le_bytes(file[32..40].try_into().unwrap());
    let (mut batches, mut at) = (Vec::new(), BATCHES_AT as usize);
    while let Some(header) = file.get(at..at + HEADER_LEN) {
        let expect = Expect {
            store: valid.superblock.store,
            segment: number,
            generation,
            offset: at as u64,
        };
        let Ok(lengths) = check_header(header, &valid.keys, &expect) else {
            break;
        };
        let commit = &file[at..at + lengths.commit];
        let (batch, _) = decode(commit, &valid.keys).unwrap();
        let from = at + lengths.commit.next_multiple_of(BLOCK as usize);
        let end = from + lengths.payload_blocks as usize * BLOCK as usize;
        let mut one = vec![0];
        one.extend_from_slice(&commit[FIELDS]);
        put_counted(&mut one, &encode_table(&batch.records));
        put_counted(&mut one, &encode_table(&batch.previous.records));
        put_counted(&mut one, trimmed(&file[from..end]));
        batches.push(one);
        at = end;
    }
    batches.truncate(most);
    out.push(batches.len() as u8);
    out.extend(batches.concat());
    out
}

fn seeds() -> Vec<Vec<u8>> {
    let apart: Vec<Vec<u8>> = segments()
        .iter()
        .map(|(n, file)| take_apart(*n, file, 63))
        .collect();
    let seed = |flags: u8, segments: &[Vec<u8>], rot: &[u8]| {
        let mut out = vec![flags, segments.len() as u8];
        out.extend(segments.concat());
        out.extend_from_slice(rot);
        out
    };
    let last = apart.len() - 1;
    let mut seeds = Vec::new();
    for flags in [0, OPEN] {
        seeds.push(seed(flags, &apart, &[0]));
        seeds.push(seed(flags, &apart[..1], &[0]));
        seeds.push(seed(flags, &apart[last..], &[0]));
        // Rot in a commit block in the middle, and at the very end of the log.
        seeds.push(seed(flags, &apart, &[1, 0, 100, 0x30, 0, 0, 0xff]));
        // Rot in the payload of the last batch.
        let (segment, rot) = torn();
        seeds.push(seed(flags, &[segment], &rot));
    }
    seeds
}

/// A segment that ends with a batch with payload, and rot there, as an input has both: a torn batch.
fn torn() -> (Vec<u8>, Vec<u8>) {
    let torn = |apart: &Vec<u8>, at: usize| {
        let mut files = segments_of(std::slice::from_ref(apart));
        files[0].1[at] ^= 0xff;
        let value = files[0].1[at];
        let (scanned, _) = scan(&files);
        scanned.is_ok_and(|scanned| scanned.torn).then_some(value)
    };
    let (number, file) = segments().remove(0);
    for most in (1..64).rev() {
        let apart = take_apart(number, &file, most);
        let len = segments_of(std::slice::from_ref(&apart))[0].1.len();
        for at in (BATCHES_AT as usize..len).step_by(BLOCK as usize).rev() {
            if let Some(value) = torn(&apart, at) {
                let mut rot = vec![1, 0];
                rot.extend((at as u32).to_le_bytes());
                rot.push(value);
                return (apart, rot);
            }
        }
    }
    unreachable!("some batch of the store has payload")
}

fn segments_of(apart: &[Vec<u8>]) -> Vec<File> {
    let mut bytes = vec![apart.len() as u8];
    bytes.extend(apart.concat());
    assemble(&mut Input(&bytes))
}

/// Whether what is taken apart and put together is the same, byte for byte; for the driver's own tests.
pub fn is_faithful() -> bool {
    let apart: Vec<Vec<u8>> = segments()
        .iter()
        .map(|(n, file)| take_apart(*n, file, 63))
        .collect();
    let files = segments_of(&apart);
    let same = |((n, file), (m, again)): (&File, &File)| {
        let end = again.len().min(file.len());
        n == m && file[..end] == again[..end] && file[end..].iter().all(|&b| b == 0)
    };
    files.len() == segments().len() && segments().iter().zip(&files).all(same)
}

fn check_record(record: &Record) {
    let end = record.first.checked_add(u64::from(record.count));
    assert!(end.is_some(), "a run of grains ends");
    assert!(RecordType::from_code(record.kind as u16) == Some(record.kind));
    let again = decode_table(&encode_table(std::slice::from_ref(record)), 1);
    assert_eq!(
        again.expect("what was read can be written"),
        std::slice::from_ref(record)
    );
}

fn scan(files: &[File]) -> (Result<Scanned, Kind>, bool) {
    let named = files
        .iter()
        .map(|(n, bytes)| (segment::file_name(*n), bytes.clone()));
    let dir = MemDir::new(named);
    let valid = valid();
    let scan = Scan {
        dir: &dir,
        keys: &valid.keys,
        store: valid.superblock.store,
        from_segment: 0,
    };
    let (mut newest, mut lost) = (0, false);
    let done = scan.run(&mut |event| {
        match event {
            Event::Batch {
                lsn,
                place,
                end,
                records,
                from_copy,
                ..
            } => {
                assert!(lsn.0 > newest, "LSNs grow: {} after {newest}", lsn.0);
                newest = lsn.0;
                let file = files.iter().find(|(n, _)| *n == place.segment);
                let size = file.map(|(_, bytes)| bytes.len() as u64);
                assert!(end > place.offset(), "a batch has an end");
                if !from_copy {
                    assert!(
                        size.is_some_and(|size| end <= size),
                        "a batch lies in its segment"
                    );
                }
                records.iter().for_each(check_record);
            }
            Event::Lost {
                first, last, bytes, ..
            } => {
                assert!(first <= last && bytes.start <= bytes.end);
                lost = true;
            }
            Event::Segment { number, .. } => assert!(files.iter().any(|(n, _)| *n == number)),
        }
        Ok(())
    });
    (done.map_err(|e| e.kind()), lost)
}

/// Everything that an open engine tells, and whether it can be read: a text to compare.
fn look(engine: &Engine) -> String {
    let mut text = String::new();
    let mut buf = vec![0; 8192];
    for volume in engine.volumes() {
        let info = volume.info();
        let id = &info.name;
        text += &format!("{id} {:?} {}\n", info.uuid, info.size);
        drop(volume.read_at(0, &mut buf[..1000]));
        drop(volume.next_data(0));
        for snapshot in engine.snapshots(id).unwrap() {
            text += &format!(" {} {} {}", snapshot.name, snapshot.epoch.0, snapshot.size);
            if let Ok(open) = engine.open_snapshot(id, &snapshot.name) {
                let len = buf
                    .len()
                    .min(usize::try_from(open.size()).unwrap_or(usize::MAX));
                let read = open.read_at(0, &mut buf[..len]);
                let tail = open.read_at(open.size().saturating_sub(9), &mut [0; 9][..len.min(9)]);
                text += &format!(" {:?} {}", read.is_ok(), tail.is_ok());
                if read.is_ok() {
                    text += &blake3::hash(&buf[..len]).to_hex()[..16];
                }
                drop(open.next_data(0));
            }
            text += "\n";
        }
        for clone in engine.clones(id).unwrap() {
            text += &format!(" /{} {}\n", clone.name, clone.size);
            if let Ok(open) = engine.open_clone(id, &clone.name) {
                drop(open.read_at(0, &mut buf[..100]));
                drop(open.next_data(0));
            }
        }
        for mark in engine.bookmarks(id).unwrap() {
            text += &format!(" #{} {}\n", mark.name, mark.epoch.0);
        }
    }
    text
}

fn open(files: &[File]) -> &'static str {
    let world = valid().world.fork(11);
    let dir = world.dir("store/log");
    for name in dir.list().unwrap() {
        dir.remove(&name).unwrap();
    }
    for (number, bytes) in files {
        let path = format!("store/log/{}", segment::file_name(*number));
        let disk = world.add_disk(&path, 0);
        disk.write_all_at(0, &[bytes]).unwrap();
        disk.sync_data().unwrap();
    }
    let index = MemoryIndexHome::new();
    let engine = match Engine::open(environment(&world, &index), settings()) {
        Ok(engine) => engine,
        Err(e) => {
            let told = [Kind::Damaged, Kind::Unsupported, Kind::Limit, Kind::NoSpace];
            assert!(told.contains(&e.kind()), "no other error: {}", e.chain());
            return "not opened";
        }
    };
    let found = look(&engine);
    // Nothing was lost that is not marked by now: the next life sees the same.
    drop(engine);
    world.kill();
    let engine = Engine::open(environment(&world, &index), settings()).expect("it was open before");
    assert_eq!(look(&engine), found, "the same after a kill");
    for volume in engine.volumes() {
        let info = volume.info();
        drop(engine.take_snapshots(&[(info.name.clone(), name("fuzz"))]));
        drop(volume.write_at(0, &[0x5a; 5000][..info.size.min(5000) as usize], false));
        drop(engine.delete_snapshot(&info.name, &name("fuzz")));
    }
    while engine.maintain().unwrap_or(false) {}
    drop(engine.close());
    "opened"
}

fn run(input: &[u8]) -> &'static str {
    let mut input = Input(input);
    let flags = input.u8();
    let files = assemble(&mut input);
    let (scanned, lost) = scan(&files);
    if flags & OPEN != 0 && !files.is_empty() {
        return open(&files);
    }
    match scanned {
        Err(kind) => {
            assert!(
                matches!(kind, Kind::Damaged | Kind::Unsupported),
                "{kind:?}"
            );
            "refused"
        }
        Ok(scanned) if scanned.torn => "torn",
        Ok(_) if lost => "lost",
        Ok(_) => "scanned",
    }
}
