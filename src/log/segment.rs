//! A segment file: its name and its head.
//!
//! The head holds who the segment is and where its predecessor ends. What lies past that end in the
//! predecessor is dead for ever, whatever a later power cut brings back. The head stands twice, at
//! [`HEAD_AT`], so that one bad sector does not lose it. Batches begin at [`BATCHES_AT`].

use crate::error::{Error, Kind, Result};
use crate::log::codec::{Reader, Writer};
use crate::log::keys::{Keys, Sum128};
use crate::units::{BLOCK, COUNTER_MAX, Lsn, SECTOR, Uuid};

/// First bytes of a segment head.
pub const MAGIC: [u8; 8] = *b"SFsegmt1";
/// Offsets of the two copies of the head.
pub const HEAD_AT: [u64; 2] = [0, 2048];
/// Offset of the first batch.
pub const BATCHES_AT: u64 = BLOCK;
/// The smallest segment: a head, a catalogue and some batches.
pub const SEGMENT_MIN: u64 = 1 << 20;
/// The largest segment; block numbers have 32 bits, and one file should be quick to drop.
pub const SEGMENT_MAX: u64 = 1 << 30;

/// The last batch of the segment before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Predecessor {
    /// Its number; 0 if this is the first segment.
    pub segment: u32,
    /// Its generation.
    pub generation: u64,
    /// Byte offset where its last batch ends.
    pub end: u64,
    /// LSN of its last batch; 0 if none.
    pub last_lsn: u64,
    /// Checksum of that batch's commit block.
    pub checksum: Sum128,
}

/// A segment's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// The store it belongs to.
    pub store: Uuid,
    /// Its number, from 1, as in its name.
    pub segment: u32,
    /// Grows with every segment written, so that an old file under a reused name is noticed.
    pub generation: u64,
    /// The segment before.
    pub before: Predecessor,
}

const HEAD_LEN: usize = 8 + 16 + 4 + 4 + 8 + (4 + 4 + 8 + 8 + 8 + 16) + 16;
const _: () = assert!(HEAD_LEN == 104 && HEAD_LEN <= SECTOR as usize);

/// The file name of a segment.
pub fn file_name(segment: u32) -> String {
    format!("{segment:06}.seg")
}

/// The largest number of a segment: a file that claims more is none of ours.
pub const NUMBER_MAX: u32 = u32::MAX / 2;

/// The number in a segment's file name.
pub fn number(name: &str) -> Option<u32> {
    let digits = name.strip_suffix(".seg")?;
    let number: u32 = digits.parse().ok()?;
    ((1..=NUMBER_MAX).contains(&number) && file_name(number) == name).then_some(number)
}

impl Head {
    /// One copy, a sector long.
    pub fn encode(&self, keys: &Keys) -> Vec<u8> {
        let mut w = Writer::new();
        w.raw(&MAGIC)
            .uuid(self.store)
            .u32(self.segment)
            .u32(0)
            .u64(self.generation);
        let b = &self.before;
        w.u32(b.segment)
            .u32(0)
            .u64(b.generation)
            .u64(b.end)
            .u64(b.last_lsn)
            .raw(&b.checksum);
        let mut bytes = w.finish();
        let sum = keys.head(&bytes);
        bytes.extend_from_slice(&sum);
        bytes.resize(SECTOR as usize, 0);
        bytes
    }

    /// Reads one copy.
    ///
    /// # Errors
    /// `Damaged` if it is no head of this store with this number.
    pub fn decode(bytes: &[u8], keys: &Keys, store: Uuid, segment: u32) -> Result<Head> {
        let damaged = || {
            Error::new(
                Kind::Damaged,
                format!("segment {segment} has no valid head"),
            )
        };
        let signed = bytes.get(..HEAD_LEN - 16).ok_or_else(damaged)?;
        if bytes.get(HEAD_LEN - 16..HEAD_LEN) != Some(&keys.head(signed)[..]) {
            return Err(damaged());
        }
        let mut r = Reader::new(signed, "a segment head");
        let magic: [u8; 8] = r.array()?;
        let (owner, number, _) = (r.uuid()?, r.u32()?, r.u32()?);
        let generation = r.u64()?;
        let before = Predecessor {
            segment: (r.u32()?, r.u32()?).0,
            generation: r.u64()?,
            end: r.u64()?,
            last_lsn: r.u64()?,
            checksum: r.array()?,
        };
        if magic != MAGIC || owner != store || number != segment {
            return Err(damaged());
        }
        if [generation, before.generation, before.last_lsn]
            .iter()
            .any(|&n| n > COUNTER_MAX)
        {
            return Err(damaged());
        }
        Ok(Head {
            store,
            segment,
            generation,
            before,
        })
    }
}

/// The end of a written log: where the next batch or segment goes on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tail {
    /// Last segment; 0 for an empty log.
    pub segment: u32,
    /// Its generation.
    pub generation: u64,
    /// Byte offset where its last valid batch ends.
    pub end: u64,
    /// The newest LSN ever used.
    pub lsn: u64,
    /// Checksum of the last batch.
    pub checksum: Sum128,
}

impl Tail {
    /// The predecessor link a new segment carries.
    pub fn link(&self) -> Predecessor {
        Predecessor {
            segment: self.segment,
            generation: self.generation,
            end: self.end,
            last_lsn: self.lsn,
            checksum: self.checksum,
        }
    }

    /// The newest LSN.
    pub fn lsn(&self) -> Lsn {
        Lsn(self.lsn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_bound_to_store_number_and_every_bit() {
        let keys = Keys::derive(&[3; 32], Uuid([9; 16]));
        let before = Predecessor {
            segment: 1,
            generation: 4,
            end: 8192,
            last_lsn: 7,
            checksum: [5; 16],
        };
        let head = Head {
            store: Uuid([9; 16]),
            segment: 2,
            generation: 5,
            before,
        };
        let bytes = head.encode(&keys);
        assert_eq!(Head::decode(&bytes, &keys, head.store, 2).unwrap(), head);
        assert!(Head::decode(&bytes, &keys, head.store, 3).is_err());
        assert!(Head::decode(&bytes, &keys, Uuid([8; 16]), 2).is_err());
        for bit in 0..HEAD_LEN * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(
                Head::decode(&bad, &keys, head.store, 2).is_err(),
                "bit {bit}"
            );
        }
    }

    #[test]
    fn only_exact_names_are_segments() {
        assert_eq!(number("000001.seg"), Some(1));
        assert_eq!(number("1000000.seg"), Some(1_000_000));
        assert_eq!(number("2147483647.seg"), Some(NUMBER_MAX));
        for name in [
            "1.seg",
            "000000.seg",
            "000001.seg~",
            "+00001.seg",
            "x.seg",
            "2147483648.seg",
        ] {
            assert_eq!(number(name), None, "{name}");
        }
    }

    #[test]
    fn a_head_counts_no_further_than_anybody_has() {
        let keys = Keys::derive(&[3; 32], Uuid([9; 16]));
        let read = |generation, last_lsn| {
            let head = Head {
                store: Uuid([9; 16]),
                segment: 2,
                generation,
                before: Predecessor {
                    last_lsn,
                    ..Predecessor::default()
                },
            };
            Head::decode(&head.encode(&keys), &keys, head.store, 2)
        };
        assert!(read(COUNTER_MAX, COUNTER_MAX).is_ok());
        assert!(read(COUNTER_MAX + 1, 0).is_err());
        assert!(read(1, u64::MAX).is_err());
    }
}
