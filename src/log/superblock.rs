//! The superblock: who the store is and how to read it, in two slots written in turn.
//!
//! A slot is 64 KiB of which the first bytes are used; the newest valid one counts. The secret that
//! keys every checksum of the log stands here, so the file has mode 0600. Invalid marks are epochs
//! whose snapshots have failed: there is always room for them here, also when the log has none.

use std::sync::Arc;

use crate::error::{Error, IoContext, Kind, Result};
use crate::log::codec::{Reader, Writer};
use crate::log::segment::{SEGMENT_MAX, SEGMENT_MIN};
use crate::sys::disk::{Dir, Disk, Open};
use crate::units::{COUNTER_MAX, Uuid};

/// File name in the store.
pub const FILE: &str = "superblock";
/// First bytes of a slot.
pub const MAGIC: [u8; 8] = *b"SFsuper1";
/// The format this program writes.
pub const VERSION: u32 = 1;
/// Incompatible feature: overlays have checksums, which whoever writes to one takes away first.
pub const INCOMPAT_SUMS: u64 = 1;
/// Incompatible features this program knows; a store with another bit is refused.
pub const INCOMPAT_KNOWN: u64 = INCOMPAT_SUMS;
/// Bytes of a slot.
pub const SLOT_LEN: usize = 64 << 10;
/// Most invalid marks a slot holds.
pub const MARKS_MAX: usize = 2048;
const SUM_LEN: usize = 16;

/// Snapshots of a volume with epochs in `first..=last` have failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InvalidMark {
    /// Volume number.
    pub volume: u32,
    /// First epoch.
    pub first: u64,
    /// Last epoch.
    pub last: u64,
    /// Why.
    pub reason: Reason,
}

/// Why snapshots failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The thin target was full.
    Full,
    /// A part of the log cannot be read, or a reason this program does not know.
    Lost,
}

/// What a superblock says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Features a reader may ignore.
    pub compat: u64,
    /// Features a reader must know.
    pub incompat: u64,
    /// The store.
    pub store: Uuid,
    /// Keys every checksum of the log.
    pub secret: [u8; 32],
    /// Size at which a log segment is closed, in bytes.
    pub segment_bytes: u64,
    /// When the store was made, ns since 1970.
    pub created_ns: i64,
    /// The store is open, or was not stopped cleanly.
    pub open: bool,
    /// Grows with every write; the slot with the larger one counts.
    pub sequence: u64,
    /// Failed snapshots not yet noted in the log.
    pub invalid: Vec<InvalidMark>,
}

impl Superblock {
    /// One slot's bytes.
    pub fn encode(&self) -> Vec<u8> {
        assert!(
            self.invalid.len() <= MARKS_MAX,
            "marks are merged before they are written"
        );
        let mut w = Writer::new();
        w.raw(&MAGIC)
            .u32(VERSION)
            .u32(!VERSION)
            .u64(self.compat)
            .u64(self.incompat);
        w.uuid(self.store)
            .raw(&self.secret)
            .u64(self.segment_bytes)
            .i64(self.created_ns);
        w.u64(self.sequence)
            .u32(self.invalid.len() as u32)
            .u32(u32::from(self.open));
        for mark in &self.invalid {
            let reason = match mark.reason {
                Reason::Full => 0,
                Reason::Lost => 1,
            };
            w.u32(mark.volume)
                .u32(reason)
                .u64(mark.first)
                .u64(mark.last);
        }
        let mut bytes = w.finish();
        let sum = checksum(&bytes);
        bytes.extend_from_slice(&sum);
        bytes.resize(SLOT_LEN, 0);
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Superblock> {
        let damaged = || Error::new(Kind::Damaged, "a superblock slot is damaged");
        let mut r = Reader::new(bytes, "the superblock");
        let magic: [u8; 8] = r.array()?;
        // The version stands twice, so that rot is not taken for a newer program's work: what a newer
        // one writes behind it, its checksum included, may lie elsewhere.
        let (version, complement) = (r.u32()?, r.u32()?);
        if magic != MAGIC || version != !complement {
            return Err(damaged());
        }
        if version != VERSION {
            return Err(newer(&format!("format version {version}")));
        }
        let (compat, incompat, store, secret) = (r.u64()?, r.u64()?, r.uuid()?, r.array()?);
        let (segment_bytes, created_ns, sequence) = (r.u64()?, r.i64()?, r.u64()?);
        let (count, open) = (r.u32()? as usize, r.u32()? != 0);
        if count > MARKS_MAX {
            return Err(damaged());
        }
        let sound = (SEGMENT_MIN..=SEGMENT_MAX).contains(&segment_bytes) && sequence <= COUNTER_MAX;
        let mut invalid = Vec::with_capacity(count);
        for _ in 0..count {
            let (volume, reason) = (r.u32()?, r.u32()?);
            invalid.push(InvalidMark {
                volume,
                first: r.u64()?,
                last: r.u64()?,
                reason: match reason {
                    0 => Reason::Full,
                    _ => Reason::Lost,
                },
            });
        }
        let used = bytes.len() - r.left();
        let sum: [u8; SUM_LEN] = r.array()?;
        if sum != checksum(&bytes[..used]) {
            return Err(damaged());
        }
        if incompat & !INCOMPAT_KNOWN != 0 {
            return Err(newer(&format!(
                "features {:#x}",
                incompat & !INCOMPAT_KNOWN
            )));
        }
        // Of a clone (bit 31) a mark means all there is; a volume's name epochs that were given.
        let given = |mark: &InvalidMark| mark.volume >> 31 != 0 || mark.last <= COUNTER_MAX;
        if !sound || !invalid.iter().all(given) {
            return Err(damaged());
        }
        Ok(Superblock {
            compat,
            incompat,
            store,
            secret,
            segment_bytes,
            created_ns,
            open,
            sequence,
            invalid,
        })
    }
}

fn newer(what: &str) -> Error {
    Error::new(
        Kind::Unsupported,
        format!("the store has {what}, which this stillframe does not know; use a newer one"),
    )
}

fn checksum(bytes: &[u8]) -> [u8; SUM_LEN] {
    let hash = blake3::derive_key("stillframe 2026-11 superblock v1", bytes);
    hash[..SUM_LEN].try_into().expect("a hash has 32 bytes")
}

/// Bytes of a slot.
pub const SLOT_BYTES: u64 = SLOT_LEN as u64;

/// Both slots as they are, for whoever checks them.
///
/// # Errors
/// The system's. A slot that cannot be read or used is an error in its place.
pub fn slots(dir: &dyn Dir) -> Result<[Result<Superblock>; 2]> {
    let disk = dir
        .open(FILE, Open::Read)
        .context(|| "cannot open the store's superblock")?;
    Ok([0, SLOT_BYTES].map(|at| {
        let mut bytes = vec![0; SLOT_LEN];
        disk.read_exact_at(at, &mut bytes)
            .context(|| "cannot read the superblock")
            .and_then(|()| Superblock::decode(&bytes))
    }))
}

/// The superblock's file: reads the newest slot, writes the other one.
pub struct SuperblockFile {
    disk: Arc<dyn Disk>,
    current: Superblock,
}

impl SuperblockFile {
    /// Writes both slots of a new store; durable when it returns, except for the name.
    ///
    /// # Errors
    /// `Exists` if there is one already, or the system's error.
    pub fn create(dir: &dyn Dir, current: Superblock) -> Result<SuperblockFile> {
        let disk = dir
            .open(FILE, Open::Create)
            .context(|| "cannot create the store's superblock")?;
        let mut file = SuperblockFile { disk, current };
        let next = file.current.clone();
        file.update(next.clone())?;
        file.update(next)?;
        Ok(file)
    }

    /// Reads the newest valid slot.
    ///
    /// # Errors
    /// `NotFound` if there is no superblock, `Damaged` if no slot is valid, `Unsupported` if the
    /// store is newer than this program.
    pub fn open(dir: &dyn Dir) -> Result<SuperblockFile> {
        let disk = dir
            .open(FILE, Open::Write)
            .context(|| "cannot open the store's superblock")?;
        // A killed predecessor's slot may be in the page cache only. Relied on, it would have the next
        // update go over the one slot that the medium has.
        disk.sync_data()
            .and_then(|()| disk.drop_cache())
            .context(|| "cannot sync the store's superblock")?;
        let mut best: Option<Superblock> = None;
        let mut worst = Error::new(Kind::Damaged, "both slots of the superblock are damaged");
        for slot in 0..2u64 {
            let mut bytes = vec![0; SLOT_LEN];
            let read = disk.read_exact_at(slot * SLOT_LEN as u64, &mut bytes);
            match read
                .context(|| "cannot read the superblock")
                .and_then(|()| Superblock::decode(&bytes))
            {
                Ok(found) => {
                    if best.as_ref().is_none_or(|b| found.sequence > b.sequence) {
                        best = Some(found);
                    }
                }
                Err(e) if e.kind() == Kind::Unsupported => worst = e,
                Err(_) => {}
            }
        }
        match best {
            // A slot of a newer program outranks an older one beside it.
            Some(_) if worst.kind() == Kind::Unsupported => Err(worst),
            Some(current) => Ok(SuperblockFile { disk, current }),
            None => Err(worst),
        }
    }

    /// What it says.
    pub fn current(&self) -> &Superblock {
        &self.current
    }

    /// Writes changed content into the older slot; durable when it returns.
    ///
    /// # Errors
    /// The system's error, `Limit` if the sequence is spent; the content before stays valid.
    pub fn update(&mut self, mut next: Superblock) -> Result<()> {
        if self.current.sequence >= COUNTER_MAX {
            let why = "the superblock was written as often as can be counted";
            return Err(Error::new(Kind::Limit, why));
        }
        next.sequence = self.current.sequence + 1;
        let at = (next.sequence % 2) * SLOT_LEN as u64;
        self.disk
            .write_all_at(at, &[&next.encode()])
            .and_then(|()| self.disk.sync_data())
            .context(|| "cannot write the superblock")?;
        self.current = next;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Superblock {
        Superblock {
            compat: 0,
            incompat: 0,
            store: Uuid([7; 16]),
            secret: [9; 32],
            segment_bytes: 64 << 20,
            created_ns: 5,
            open: true,
            sequence: 3,
            invalid: vec![InvalidMark {
                volume: 1,
                first: 2,
                last: 3,
                reason: Reason::Full,
            }],
        }
    }

    /// Right checksums around what no writer says: fuzzing got these past the reader.
    #[test]
    fn what_no_writer_says_is_damaged() {
        let read = |change: &dyn Fn(&mut Superblock)| {
            let mut superblock = sample();
            change(&mut superblock);
            Superblock::decode(&superblock.encode())
        };
        let good: [&dyn Fn(&mut Superblock); 4] = [
            &|s| s.segment_bytes = SEGMENT_MIN,
            &|s| s.segment_bytes = SEGMENT_MAX,
            &|s| s.sequence = COUNTER_MAX,
            // Of a clone: all there is.
            &|s| (s.invalid[0].volume, s.invalid[0].last) = (1 << 31 | 1, u64::MAX),
        ];
        for (n, change) in good.iter().enumerate() {
            assert!(read(*change).is_ok(), "{n}");
        }
        let bad: [&dyn Fn(&mut Superblock); 5] = [
            &|s| s.segment_bytes = 0,
            &|s| s.segment_bytes = SEGMENT_MIN - 1,
            &|s| s.segment_bytes = u64::MAX,
            &|s| s.sequence = u64::MAX,
            &|s| s.invalid[0].last = u64::MAX,
        ];
        for (n, change) in bad.iter().enumerate() {
            let why = read(*change).map(|_| n).unwrap_err();
            assert_eq!(why.kind(), Kind::Damaged, "{n}");
        }
    }

    #[test]
    fn a_slot_is_read_as_written_and_no_used_bit_may_differ() {
        let bytes = sample().encode();
        assert_eq!(Superblock::decode(&bytes).unwrap(), sample());
        let used = 160;
        for bit in 0..used * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let read = Superblock::decode(&bad);
            assert!(read.is_err() || read.unwrap() == sample(), "bit {bit}");
        }
    }

    #[test]
    fn a_mark_says_why() {
        let mut marked = sample();
        marked.invalid[0].reason = Reason::Lost;
        let read = Superblock::decode(&marked.encode()).unwrap();
        assert_eq!(read, marked);
    }

    /// Golden bytes: a change of any of them is a new format version.
    #[test]
    fn golden_bytes() {
        let bytes = sample().encode();
        let hex: String = bytes[..160].iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            "534673757065723101000000feffffff00000000000000000000000000000000070707070707070707070707\
             0707070709090909090909090909090909090909090909090909090909090909090909090000000400000000\
             0500000000000000030000000000000001000000010000000100000000000000020000000000000003000000\
             000000009324bc1a0247aba1e744cd6ef48aa4f50000000000000000"
        );
    }

    #[test]
    fn newer_stores_are_refused_by_name() {
        let bytes = Superblock {
            incompat: 1 << 40,
            ..sample()
        }
        .encode();
        assert_eq!(
            Superblock::decode(&bytes).unwrap_err().kind(),
            Kind::Unsupported
        );
        let mut bytes = sample().encode();
        bytes[8..16].copy_from_slice(&[2, 0, 0, 0, 0xfd, 0xff, 0xff, 0xff]);
        assert_eq!(
            Superblock::decode(&bytes).unwrap_err().kind(),
            Kind::Unsupported
        );
    }
}
