//! A batch: one commit block followed by block-aligned payload.
//!
//! The commit block starts at a multiple of [`BLOCK`] and takes whole sectors; the payload starts at
//! the next multiple of [`BLOCK`], so that reclaim can give its space back to the filesystem
//! (a punch frees whole blocks only) and readers can map it. Header, own table and a copy of the
//! previous batch's table are covered by a keyed checksum at the end; the header has one
//! of their own, so that the lengths are trusted before anything is read by them.
//!
//! Because all of it is checksummed, commit block and payload may reach the medium in any order: a
//! torn batch is recognised.

use crate::error::{Error, Kind, Result};
use crate::log::codec::{Reader, Writer};
use crate::log::keys::{Keys, Sum128};
use crate::log::record::{Record, decode_table, encode_table};
use crate::units::{BLOCK, COUNTER_MAX, Place, SECTOR, Uuid};

/// First bytes of a commit block.
pub const MAGIC: [u8; 8] = *b"SFbatch1";
/// Bytes of the header.
pub const HEADER_LEN: usize = 192;
/// Largest commit block: bounds what a reader allocates before it has checked the whole.
pub const COMMIT_MAX: usize = 1 << 20;
const HEADER_SUM_AT: usize = HEADER_LEN - 8;
const CHECKSUM_LEN: usize = 16;

/// A batch named as the previous one, with what is needed to use its table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Previous {
    /// Its LSN; 0 for none.
    pub lsn: u64,
    /// Its segment.
    pub segment: u32,
    /// Its byte offset in that segment.
    pub offset: u64,
    /// Bytes from its start to the end of its payload.
    pub len: u64,
    /// Its commit block's checksum.
    pub checksum: Sum128,
    /// Its records.
    pub records: Vec<Record>,
}

/// A batch's header and tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The store.
    pub store: Uuid,
    /// The segment it lies in.
    pub segment: u32,
    /// That segment's generation.
    pub generation: u64,
    /// Its number.
    pub lsn: u64,
    /// The newest LSN known durable when it was written.
    pub durable_upto: u64,
    /// Wall-clock time, ns since 1970.
    pub time_ns: i64,
    /// Its own byte offset in the segment.
    pub offset: u64,
    /// Blocks of payload behind the commit block.
    pub payload_blocks: u32,
    /// What it says.
    pub records: Vec<Record>,
    /// The batch before, with a copy of its table.
    pub previous: Previous,
}

impl Batch {
    /// Bytes of the commit block as laid out, without padding to a block.
    pub fn commit_len(records: &[Record], previous: &[Record]) -> usize {
        let tables: usize = records
            .iter()
            .chain(previous)
            .map(Record::encoded_len)
            .sum();
        (HEADER_LEN + tables + CHECKSUM_LEN).next_multiple_of(SECTOR as usize)
    }

    /// Lays out the commit block, padded to whole blocks. The payload areas of `records` must have
    /// been placed behind it.
    ///
    /// Returns the bytes and the commit block's checksum.
    pub fn encode(&self, keys: &Keys) -> (Vec<u8>, Sum128) {
        let table = encode_table(&self.records);
        let copy = encode_table(&self.previous.records);
        let commit_len = Batch::commit_len(&self.records, &self.previous.records);
        assert!(
            commit_len <= COMMIT_MAX,
            "the committer bounds a batch's tables"
        );
        let as_u32 = |n: usize| u32::try_from(n).expect("bounded by COMMIT_MAX");

        let p = &self.previous;
        let mut w = Writer::new();
        w.raw(&MAGIC)
            .uuid(self.store)
            .u64(self.generation)
            .u64(self.lsn);
        w.u64(self.durable_upto)
            .i64(self.time_ns)
            .u64(self.offset)
            .u32(self.segment);
        w.u32(as_u32(commit_len))
            .u32(self.payload_blocks)
            .u32(as_u32(self.records.len()));
        w.u32(as_u32(table.len()))
            .u32(as_u32(p.records.len()))
            .u32(as_u32(copy.len()));
        w.u32(p.segment)
            .u64(p.lsn)
            .u64(p.offset)
            .u64(p.len)
            .raw(&p.checksum);
        let mut bytes = w.finish();
        assert!(bytes.len() <= HEADER_SUM_AT);
        bytes.resize(HEADER_SUM_AT, 0);
        let sum = keys.commit(&bytes);
        bytes.extend_from_slice(&sum[..8]);
        bytes.extend_from_slice(&table);
        bytes.extend_from_slice(&copy);
        bytes.resize(commit_len - CHECKSUM_LEN, 0);
        let checksum = keys.commit(&bytes);
        bytes.extend_from_slice(&checksum);
        bytes.resize(commit_len.next_multiple_of(BLOCK as usize), 0);
        (bytes, checksum)
    }

    /// Bytes from the batch's start to its end.
    pub fn len(&self) -> u64 {
        let commit = Batch::commit_len(&self.records, &self.previous.records) as u64;
        commit.next_multiple_of(BLOCK) + u64::from(self.payload_blocks) * BLOCK
    }

    /// A batch always has a commit block.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The place of the batch's first block.
    pub fn place(&self) -> Place {
        place(self.segment, self.offset)
    }

    /// What the next batch carries of this one.
    pub fn as_previous(&self, len: u64, checksum: Sum128) -> Previous {
        Previous {
            lsn: self.lsn,
            segment: self.segment,
            offset: self.offset,
            len,
            checksum,
            records: self.records.clone(),
        }
    }
}

/// The place of an aligned byte offset.
pub fn place(segment: u32, offset: u64) -> Place {
    debug_assert!(offset.is_multiple_of(BLOCK));
    Place {
        segment,
        block: u32::try_from(offset / BLOCK).expect("segments are bounded"),
    }
}

/// What identifies the batch that should be found at an offset.
#[derive(Debug, Clone, Copy)]
pub struct Expect {
    /// Store.
    pub store: Uuid,
    /// Segment number.
    pub segment: u32,
    /// Generation.
    pub generation: u64,
    /// Byte offset.
    pub offset: u64,
}

/// The lengths in a header whose own checksum and identity hold.
#[derive(Debug, Clone, Copy)]
pub struct Lengths {
    /// Bytes of the commit block.
    pub commit: usize,
    /// Blocks of payload.
    pub payload_blocks: u32,
}

/// Checks the header of a commit block.
///
/// # Errors
/// `Damaged` if it is not a header, or not the one that belongs there.
pub fn check_header(bytes: &[u8], keys: &Keys, expect: &Expect) -> Result<Lengths> {
    let damaged = |why: &str| {
        Err(Error::new(
            Kind::Damaged,
            format!(
                "no batch at {} of segment {}: {why}",
                expect.offset, expect.segment
            ),
        ))
    };
    let Some(header) = bytes.get(..HEADER_LEN) else {
        return damaged("too short");
    };
    if header[..8] != MAGIC {
        return damaged("no magic");
    }
    if keys.commit(&header[..HEADER_SUM_AT])[..8] != header[HEADER_SUM_AT..] {
        return damaged("header checksum");
    }
    let mut r = Reader::new(&header[8..], "a batch header");
    let (store, generation, _lsn) = (r.uuid()?, r.u64()?, r.u64()?);
    let (_durable, _time, offset, segment) = (r.u64()?, r.i64()?, r.u64()?, r.u32()?);
    let (commit, payload_blocks) = (r.u32()? as usize, r.u32()?);
    if store != expect.store || segment != expect.segment {
        return damaged("another store or segment");
    }
    if generation != expect.generation || offset != expect.offset {
        return damaged("another generation or offset");
    }
    if !(HEADER_LEN + CHECKSUM_LEN..=COMMIT_MAX).contains(&commit)
        || !commit.is_multiple_of(SECTOR as usize)
    {
        return damaged("length");
    }
    Ok(Lengths {
        commit,
        payload_blocks,
    })
}

/// Reads a whole commit block of the length [`check_header`] gave.
///
/// # Errors
/// `Damaged` if the checksum or the structure does not hold, `Unsupported` for a newer record type.
pub fn decode(bytes: &[u8], keys: &Keys) -> Result<(Batch, Sum128)> {
    let damaged = |why: &str| Error::new(Kind::Damaged, format!("a commit block is bad: {why}"));
    let end = bytes
        .len()
        .checked_sub(CHECKSUM_LEN)
        .ok_or_else(|| damaged("too short"))?;
    let (signed, checksum) = bytes.split_at(end);
    if keys.commit(signed) != *checksum {
        return Err(damaged("checksum"));
    }
    let checksum: Sum128 = checksum.try_into().expect("split at its length");
    let mut r = Reader::new(signed, "a commit block");
    let _magic: [u8; 8] = r.array()?;
    let (store, generation, lsn, durable_upto) = (r.uuid()?, r.u64()?, r.u64()?, r.u64()?);
    let (time_ns, offset, segment, _commit) = (r.i64()?, r.u64()?, r.u32()?, r.u32()?);
    let (payload_blocks, count, table_len) = (r.u32()?, r.u32()?, r.u32()? as usize);
    let (copy_count, copy_len) = (r.u32()?, r.u32()? as usize);
    let mut previous = Previous {
        segment: r.u32()?,
        lsn: r.u64()?,
        offset: r.u64()?,
        len: r.u64()?,
        checksum: r.array()?,
        records: Vec::new(),
    };
    let mut r = Reader::new(&signed[HEADER_LEN..], "a commit block");
    let records = decode_table(r.raw(table_len)?, count)?;
    previous.records = decode_table(r.raw(copy_len)?, copy_count)?;
    let first = (bytes.len() as u64).div_ceil(BLOCK);
    let blocks = first..first + u64::from(payload_blocks);
    if !records.iter().all(|record| lies_in(record, &blocks)) {
        return Err(damaged("payload outside of the batch"));
    }
    if !previous.is_sound() || !(1..=COUNTER_MAX).contains(&lsn) || previous.lsn >= lsn {
        return Err(damaged("its number, or what it says of the batch before"));
    }
    let batch = Batch {
        store,
        segment,
        generation,
        lsn,
        durable_upto,
        time_ns,
        offset,
        payload_blocks,
        records,
        previous,
    };
    Ok((batch, checksum))
}

/// Whether a record's payload lies in these blocks, counted from the batch's start, and can be taken.
fn lies_in(record: &Record, blocks: &std::ops::Range<u64>) -> bool {
    let start = u64::from(record.payload.block);
    let end = start + u64::from(record.payload.len).div_ceil(BLOCK);
    // Also a record without payload has a place, and that is counted with.
    let placed = match record.payload.len {
        0 => start == 0,
        _ => start >= blocks.start && end <= blocks.end,
    };
    record.is_sound() && placed
}

impl Previous {
    /// Whether it can be the place of a batch, and its records' payload lies in it.
    fn is_sound(&self) -> bool {
        let end = self.offset.checked_add(self.len);
        let placed = end.is_some_and(|end| end <= u64::from(u32::MAX) * BLOCK);
        let aligned = self.offset.is_multiple_of(BLOCK) && self.len.is_multiple_of(BLOCK);
        let there = self.lsn == 0 || self.len > 0;
        let blocks = 1..self.len / BLOCK;
        placed && aligned && there && self.records.iter().all(|record| lies_in(record, &blocks))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::record::{Payload, RecordType};

    fn sample(keys: &Keys) -> (Batch, Vec<u8>) {
        let mut preserve = Record::run(RecordType::Preserve, 1, 4, 100, 2);
        preserve.body = keys.payload_sums(&[7; 8192], 4096);
        preserve.payload = Payload {
            len: 8192,
            block: 1,
        };
        let batch = Batch {
            store: Uuid([1; 16]),
            segment: 3,
            generation: 5,
            lsn: 77,
            durable_upto: 76,
            time_ns: -1,
            offset: 12288,
            payload_blocks: 2,
            records: vec![preserve, Record::run(RecordType::Zero, 1, 4, 200, 9)],
            previous: Previous {
                lsn: 76,
                segment: 3,
                offset: 4096,
                len: 8192,
                checksum: [2; 16],
                records: vec![Record::run(RecordType::Changed, 1, 4, 5, 1)],
            },
        };
        let (bytes, _) = batch.encode(keys);
        (batch, bytes)
    }

    #[test]
    fn a_batch_is_read_as_written_and_no_bit_may_differ() {
        let keys = Keys::derive(&[3; 32], Uuid([1; 16]));
        let (batch, bytes) = sample(&keys);
        let expect = Expect {
            store: batch.store,
            segment: 3,
            generation: 5,
            offset: batch.offset,
        };
        let lengths = check_header(&bytes, &keys, &expect).unwrap();
        assert_eq!(bytes.len() as u64 + 8192, batch.len());
        let (read, _) = decode(&bytes[..lengths.commit], &keys).unwrap();
        assert_eq!(read, batch);
        for bit in (0..lengths.commit * 8).step_by(3) {
            let mut bad = bytes[..lengths.commit].to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bad, &keys).is_err(), "bit {bit}");
        }
    }

    /// Right checksums around what no writer says: fuzzing got each of these past the readers.
    #[test]
    fn what_no_writer_says_is_damaged() {
        let keys = Keys::derive(&[3; 32], Uuid([1; 16]));
        let read = |change: &dyn Fn(&mut Batch)| {
            let (mut batch, _) = sample(&keys);
            change(&mut batch);
            let len = Batch::commit_len(&batch.records, &batch.previous.records);
            let (bytes, _) = batch.encode(&keys);
            decode(&bytes[..len], &keys)
        };
        assert!(read(&|_| {}).is_ok());
        // The first batch of a log, and the largest of all grains.
        assert!(read(&|b| b.previous = Previous::default()).is_ok());
        assert!(read(&|b| b.records[1].first = u64::from(u32::MAX)).is_ok());
        let bad: [&dyn Fn(&mut Batch); 12] = [
            &|b| b.lsn = 0,
            &|b| b.lsn = u64::MAX,
            &|b| b.previous.lsn = b.lsn,
            &|b| b.previous.offset = u64::MAX - 4095,
            &|b| b.previous.offset += 1,
            &|b| b.previous.len = 0,
            &|b| b.previous.records[0].payload = Payload { len: 1, block: 9 },
            // A checksum less than grains, a grain of no size, payload outside, grains outside.
            &|b| b.records[0].body.truncate(8),
            &|b| b.records[0].payload.len = 4096,
            &|b| b.records[0].payload.block = 2,
            // A place, and no payload that lies there: it may be further on than segments go.
            &|b| b.records[1].payload.block = u32::MAX,
            &|b| b.records[0].first = crate::units::GRAINS_MAX - 1,
        ];
        for (n, change) in bad.iter().enumerate() {
            let why = read(*change).map(|_| n).unwrap_err();
            assert_eq!(why.kind(), Kind::Damaged, "{n}");
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Golden bytes: a change of any of them is a new format version.
    #[test]
    fn golden_bytes() {
        let keys = Keys::derive(&[3; 32], Uuid([1; 16]));
        let (_, bytes) = sample(&keys);
        assert_eq!(
            hex(&bytes[..HEADER_LEN]),
            "53466261746368310101010101010101010101010101010105000000000000004d000000000000004c000000\
             00000000ffffffffffffffff0030000000000000030000000002000002000000020000006000000001000000\
             28000000030000004c0000000000000000100000000000000020000000000000020202020202020202020202\
             0202020200000000000000000000000000000000000000000000000000000000000000000000000000000000\
             0000000000000000ec6bb95a67f9ea13"
        );
        assert_eq!(
            blake3::hash(&bytes).to_hex().as_str(),
            "1b7b2422b4d9c21640f4bf6e2caf3c862825dd17c6893f8219d985db4a7f8353"
        );
    }

    #[test]
    fn a_header_belongs_to_one_place() {
        let keys = Keys::derive(&[3; 32], Uuid([1; 16]));
        let (_, bytes) = sample(&keys);
        let right = Expect {
            store: Uuid([1; 16]),
            segment: 3,
            generation: 5,
            offset: 12288,
        };
        assert!(check_header(&bytes, &keys, &right).is_ok());
        assert!(
            check_header(
                &bytes,
                &keys,
                &Expect {
                    offset: 8192,
                    ..right
                }
            )
            .is_err()
        );
        assert!(
            check_header(
                &bytes,
                &keys,
                &Expect {
                    generation: 4,
                    ..right
                }
            )
            .is_err()
        );
        assert!(
            check_header(
                &bytes,
                &keys,
                &Expect {
                    segment: 2,
                    ..right
                }
            )
            .is_err()
        );
        assert!(check_header(&bytes[..100], &keys, &right).is_err());
    }
}
