//! Records: what a batch's table is made of.
//!
//! A record is a fixed head of [`HEAD_LEN`] bytes and a body; `docs/format.md` draws both. Preserved
//! content is *payload*: it lies behind the commit block, and the body holds one keyed checksum for
//! each grain (for a CATALOG: for each block) of it.
//!
//! A reader that meets a type it does not know may go on only if the record says so
//! ([`SKIPPABLE`]); otherwise the store is newer than the reader and is refused.

use crate::error::{Error, Kind, Result};
use crate::log::codec::{Reader, Writer};
use crate::units::{COUNTER_MAX, GRAINS_MAX, Grain, Place, VOLUME_SIZE_MAX};

/// Bytes of a record's head.
pub const HEAD_LEN: usize = 40;

/// Flag: a reader that does not know the type may skip the record.
pub const SKIPPABLE: u16 = 1;

/// Flag of a CHANGED: it was written before the grains were, for more of them than were meant.
const CHANGED_INTENT: u32 = 1;
/// Flag of a BITMAP: all records of its epoch are before it.
const BITMAP_COMPLETE: u32 = 1;

macro_rules! record_types {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $skippable:literal;)*) => {
        /// What a record says. Codes are part of the format and never change their meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum RecordType { $($(#[$doc])* $name = $code,)* }

        impl RecordType {
            /// Every type of this format version.
            pub const ALL: &'static [RecordType] = &[$(RecordType::$name),*];

            /// The type with a code, `None` if this program does not know it.
            pub fn from_code(code: u16) -> Option<RecordType> {
                match code { $($code => Some(RecordType::$name),)* _ => None }
            }

            /// Whether a reader that does not know the type may skip its records.
            pub fn skippable(self) -> bool {
                match self { $(RecordType::$name => $skippable,)* }
            }
        }
    };
}

record_types! {
    /// Old content of a run of grains; payload.
    Preserve = 1, false;
    /// The old content of a run of grains was zeros or a hole.
    Zero = 2, false;
    /// A run of grains changed; nothing was preserved.
    Changed = 3, false;
    /// The changed-block bitmap of an epoch, rewritten before its records go.
    Bitmap = 4, false;
    /// Old and new content, to be applied to the source later.
    Redo = 5, false;
    /// Grains whose REDO has reached the source.
    RedoRetired = 6, false;
    /// A snapshot was taken.
    Snap = 16, false;
    /// A snapshot was deleted.
    Delete = 17, false;
    /// A snapshot has a new name.
    Rename = 18, false;
    /// A snapshot became a bookmark.
    Bookmark = 19, false;
    /// A clone was made.
    Clone = 20, false;
    /// Grains of an overlay are in use.
    CloneAlloc = 21, false;
    /// A volume's attributes, new or changed.
    Volume = 22, false;
    /// A volume is about to change its size.
    Resize = 23, false;
    /// A revert has begun.
    RevertBegin = 24, false;
    /// A revert is complete.
    RevertEnd = 25, false;
    /// A migration has begun.
    MigrateBegin = 26, false;
    /// Regions that have moved.
    MigrateMoved = 27, false;
    /// A migration is complete or abandoned.
    MigrateEnd = 28, false;
    /// Snapshots of one instant.
    Group = 29, true;
    /// Snapshots that failed.
    Invalidate = 30, false;
    /// The whole catalogue; older catalogue records are superseded.
    Catalog = 31, false;
    /// A volume was removed.
    VolumeRemoved = 32, false;
    /// A snapshot is on hold or released.
    Hold = 33, false;
    /// A clone is gone.
    CloneDeleted = 34, false;
    /// A bookmark was deleted.
    BookmarkDeleted = 35, false;
    /// In a CATALOG: counters and flags of the store.
    Store = 48, false;
}

/// One record of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// What it says.
    pub kind: RecordType,
    /// Volume number, 0 if none.
    pub volume: u32,
    /// Epoch, 0 if none.
    pub epoch: u64,
    /// First grain.
    pub first: u64,
    /// Number of grains.
    pub count: u32,
    /// Fields of the type; for payload, its checksums.
    pub body: Vec<u8>,
    /// Payload in the batch's payload area.
    pub payload: Payload,
}

/// Payload of a record: how many bytes, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Payload {
    /// Bytes; 0 for none. Takes whole blocks in the log.
    pub len: u32,
    /// Offset from the batch's start, in blocks.
    pub block: u32,
}

impl Record {
    /// A record without payload.
    pub fn plain(kind: RecordType, volume: u32, epoch: u64, body: Vec<u8>) -> Record {
        Record {
            kind,
            volume,
            epoch,
            first: 0,
            count: 0,
            body,
            payload: Payload::default(),
        }
    }

    /// A record of a run of grains without payload.
    pub fn run(kind: RecordType, volume: u32, epoch: u64, first: u64, count: u32) -> Record {
        Record {
            first,
            count,
            ..Record::plain(kind, volume, epoch, Vec::new())
        }
    }

    /// A ZERO or CHANGED of a run of grains; the body holds the grain's size in bytes.
    pub fn grains(
        kind: RecordType,
        volume: u32,
        epoch: u64,
        grains: std::ops::Range<u64>,
        grain_bytes: u64,
    ) -> Record {
        let count = u32::try_from(grains.end - grains.start).expect("bounded by the change");
        let body = u32::try_from(grain_bytes)
            .expect("a grain is at most 1 MiB")
            .to_le_bytes();
        Record {
            body: body.to_vec(),
            ..Record::run(kind, volume, epoch, grains.start, count)
        }
    }

    /// A CHANGED that announces writes into a run of grains, before it is known which of them.
    pub fn intent(
        volume: u32,
        epoch: u64,
        grains: std::ops::Range<u64>,
        grain_bytes: u64,
    ) -> Record {
        let mut record = Record::grains(RecordType::Changed, volume, epoch, grains, grain_bytes);
        record.body.extend_from_slice(&CHANGED_INTENT.to_le_bytes());
        record
    }

    /// Whether it is an intent.
    pub fn is_intent(&self) -> bool {
        let flags = self
            .body
            .get(4..8)
            .map(|f| f.try_into().expect("four bytes"));
        self.kind == RecordType::Changed
            && flags.is_some_and(|f| u32::from_le_bytes(f) & CHANGED_INTENT != 0)
    }

    /// A BITMAP of the chunk of grains that begins at `first`. A complete one replaces what was
    /// known to have changed in its epoch, another adds to it.
    pub fn bitmap(
        volume: u32,
        epoch: u64,
        first: u64,
        count: u32,
        bits: &[u8],
        complete: bool,
    ) -> Record {
        let flags = if complete { BITMAP_COMPLETE } else { 0 };
        let mut w = Writer::new();
        w.u32(flags).u32(0).raw(bits);
        Record {
            body: w.finish(),
            ..Record::run(RecordType::Bitmap, volume, epoch, first, count)
        }
    }

    /// The bits of a BITMAP, and whether it is complete; `None` if it has none.
    pub fn bitmap_bits(&self) -> Option<(&[u8], bool)> {
        let (head, bits) = self.body.split_at_checked(8)?;
        let flags = u32::from_le_bytes(head[..4].try_into().expect("four bytes"));
        Some((bits, flags & BITMAP_COMPLETE != 0))
    }

    /// Bytes of a grain, for records of runs of grains; `None` if it does not say.
    pub fn grain_bytes(&self) -> Option<u32> {
        match self.kind {
            RecordType::Preserve => self.payload.len.checked_div(self.count),
            RecordType::Zero => self.body.as_slice().try_into().ok().map(u32::from_le_bytes),
            RecordType::Changed => {
                let bytes = self.body.get(..4)?;
                bytes.try_into().ok().map(u32::from_le_bytes)
            }
            RecordType::CloneAlloc => {
                let head = self.body.first_chunk()?;
                Some(u32::from_le_bytes(*head))
            }
            _ => None,
        }
    }

    /// The checksums in the body of a record with payload.
    pub fn sums(&self) -> Vec<u64> {
        self.body
            .chunks_exact(8)
            .map(|c| u64::from_le_bytes(c.try_into().expect("chunks of eight")))
            .collect()
    }

    /// Where the payload of this record lies, given its batch's place.
    pub fn place(&self, batch: Place) -> Place {
        batch.advance(u64::from(self.payload.block))
    }

    /// Bytes of payload that one checksum covers: a grain, or a block of a document.
    pub fn unit(&self) -> usize {
        match self.count {
            0 => crate::units::BLOCK as usize,
            count => (self.payload.len / count).max(1) as usize,
        }
    }

    /// Whether a reader can take it: its grains lie in the largest volume, and a PRESERVE has the payload
    /// and the checksum of each.
    pub fn is_sound(&self) -> bool {
        let end = self.first.saturating_add(u64::from(self.count));
        let bytes = u128::from(end) * u128::from(self.grain_bytes().unwrap_or(0));
        if bytes > u128::from(VOLUME_SIZE_MAX) + 1 {
            return false;
        }
        match self.kind {
            RecordType::Preserve => {
                let grain = self.payload.len.checked_div(self.count);
                let grain = grain.and_then(|bytes| Grain::new(u64::from(bytes)).ok());
                let whole = self.payload.len.checked_rem(self.count) == Some(0);
                whole && grain.is_some() && self.body.len() as u64 == 8 * u64::from(self.count)
            }
            _ => true,
        }
    }

    /// Bytes in a table.
    pub fn encoded_len(&self) -> usize {
        HEAD_LEN + self.body.len().next_multiple_of(8)
    }

    /// Appends head and body, padded to eight bytes.
    pub fn encode(&self, w: &mut Writer) {
        let flags = if self.kind.skippable() { SKIPPABLE } else { 0 };
        w.u16(self.kind as u16).u16(flags);
        w.u32(u32::try_from(self.body.len()).expect("bodies are bounded by the batch"));
        w.u32(self.volume)
            .u32(self.count)
            .u64(self.epoch)
            .u64(self.first);
        w.u32(self.payload.block).u32(self.payload.len);
        w.raw(&self.body).pad(8);
    }

    /// Reads one record; `None` for one that may be skipped.
    ///
    /// # Errors
    /// `Damaged` if it is not well formed, `Unsupported` if only a newer program can read it.
    pub fn decode(r: &mut Reader<'_>) -> Result<Option<Record>> {
        let code = r.u16()?;
        let flags = r.u16()?;
        let body_len = r.u32()? as usize;
        let (volume, count, epoch, first) = (r.u32()?, r.u32()?, r.u64()?, r.u64()?);
        let payload = Payload {
            block: r.u32()?,
            len: r.u32()?,
        };
        let body = r.raw(body_len.next_multiple_of(8))?[..body_len].to_vec();
        let Some(kind) = RecordType::from_code(code) else {
            if flags & SKIPPABLE != 0 {
                return Ok(None);
            }
            return Err(Error::new(
                Kind::Unsupported,
                format!("the log holds a record of type {code}, written by a newer stillframe"),
            ));
        };
        let end = first.checked_add(u64::from(count));
        if end.is_none_or(|end| end > GRAINS_MAX) || epoch > COUNTER_MAX {
            return Err(Error::new(
                Kind::Damaged,
                "a record's grains or epoch are beyond every volume",
            ));
        }
        Ok(Some(Record {
            kind,
            volume,
            epoch,
            first,
            count,
            body,
            payload,
        }))
    }
}

/// Encodes a table: records one after another.
pub fn encode_table(records: &[Record]) -> Vec<u8> {
    let mut w = Writer::new();
    for record in records {
        record.encode(&mut w);
    }
    w.finish()
}

/// Reads a table of `count` records.
///
/// # Errors
/// As [`Record::decode`]; also if bytes are left over.
pub fn decode_table(bytes: &[u8], count: u32) -> Result<Vec<Record>> {
    let mut r = Reader::new(bytes, "a batch's table");
    let mut records = Vec::new();
    for _ in 0..count {
        records.extend(Record::decode(&mut r)?);
    }
    if r.left() != 0 {
        return Err(Error::new(
            Kind::Damaged,
            "a batch's table has bytes left over",
        ));
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_its_encoding() {
        for &kind in RecordType::ALL {
            assert_eq!(RecordType::from_code(kind as u16), Some(kind));
            let mut record = Record::run(kind, 3, 9, 1 << 40, 17);
            record.body = vec![1, 2, 3];
            let bytes = encode_table(std::slice::from_ref(&record));
            assert_eq!(bytes.len(), record.encoded_len());
            assert_eq!(decode_table(&bytes, 1).unwrap(), vec![record]);
        }
    }

    #[test]
    fn an_intent_is_told_from_a_change_and_a_bitmap_keeps_its_bits() {
        let plain = Record::grains(RecordType::Changed, 3, 9, 16..48, 8192);
        let intent = Record::intent(3, 9, 16..48, 8192);
        assert!(intent.is_intent() && !plain.is_intent());
        assert!(!Record::grains(RecordType::Zero, 3, 9, 16..48, 8192).is_intent());
        for record in [plain, intent] {
            assert_eq!(record.grain_bytes(), Some(8192));
            assert_eq!((record.first, record.count), (16, 32));
        }
        for complete in [false, true] {
            let bitmap = Record::bitmap(3, 9, 1 << 17, 1 << 17, b"bits", complete);
            let read = decode_table(&encode_table(std::slice::from_ref(&bitmap)), 1).unwrap();
            assert_eq!(read, [bitmap]);
            assert_eq!(read[0].bitmap_bits(), Some((&b"bits"[..], complete)));
        }
        let short = Record::plain(RecordType::Bitmap, 3, 9, vec![0; 7]);
        assert_eq!(short.bitmap_bits(), None);
    }

    /// Golden bytes of the bodies: a change of any of them is a new format version.
    #[test]
    fn golden_bodies_of_tracking() {
        let intent = Record::intent(3, 9, 16..48, 8192);
        assert_eq!(intent.body, [0, 0x20, 0, 0, 1, 0, 0, 0]);
        let bitmap = Record::bitmap(3, 9, 0, 1 << 17, &[7, 8], true);
        assert_eq!(bitmap.body, [1, 0, 0, 0, 0, 0, 0, 0, 7, 8]);
    }

    #[test]
    fn unknown_types_are_skipped_or_refused_as_they_ask() {
        let mut bytes = encode_table(&[Record::plain(RecordType::Snap, 0, 0, vec![])]);
        bytes[0] = 0xff;
        assert_eq!(
            decode_table(&bytes, 1).unwrap_err().kind(),
            Kind::Unsupported
        );
        bytes[2] = SKIPPABLE as u8;
        assert_eq!(decode_table(&bytes, 1).unwrap(), vec![]);
    }
}
