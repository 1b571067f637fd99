//! Units, identifiers and names: the words every layer shares.
//!
//! Ranges are half-open. A *grain* is the unit of tracking and preserving, a power of two from
//! 4 KiB to 1 MiB, fixed per volume. A *region* is [`REGION_GRAINS`] grains. Names are an allow-list,
//! so that no name can hide a path, an option, a terminal escape or a second meaning.

use std::fmt;
use std::ops::Range;

use crate::error::{Error, Kind, Result};

/// Bytes that a medium writes as one: what survives a power cut whole.
pub const SECTOR: u64 = 512;
/// Bytes of the unit in which the log places payload; also the smallest grain.
pub const BLOCK: u64 = 4096;
/// Grains of one region, the unit in which the extent map keeps its pages.
pub const REGION_GRAINS: u64 = 4096;
/// The largest grain in bytes.
pub const GRAIN_MAX: u32 = 1 << 20;
/// The largest volume in bytes: file offsets are signed.
pub const VOLUME_SIZE_MAX: u64 = i64::MAX as u64;

/// One past the largest grain number that any volume can have.
pub const GRAINS_MAX: u64 = VOLUME_SIZE_MAX / BLOCK + 1;

/// The largest value of an epoch, LSN, generation, inode number or sequence that is taken from a medium.
/// None was ever counted so far; whatever is larger is damage, and adding to it could overflow.
pub const COUNTER_MAX: u64 = u64::MAX / 2;

/// A volume's number: unique in its store, never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeId(pub u32);

/// An epoch: opened by the snapshot of the same number, only grows, never used twice in a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

/// A log sequence number: one a batch, only grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

/// Where a block of payload lies in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Segment number, from 1.
    pub segment: u32,
    /// Offset in the segment file in units of [`BLOCK`].
    pub block: u32,
}

impl Place {
    /// The place `blocks` further on in the same segment.
    #[must_use]
    pub fn advance(self, blocks: u64) -> Place {
        let blocks = u32::try_from(blocks).expect("a segment holds fewer than 2^32 blocks");
        Place {
            segment: self.segment,
            block: self.block + blocks,
        }
    }

    /// Byte offset in the segment file.
    pub fn offset(self) -> u64 {
        u64::from(self.block) * BLOCK
    }
}

/// The grain size of a volume in bytes; a power of two in `4096..=1048576`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grain(u32);

impl Grain {
    /// The grain a volume gets when nobody says otherwise.
    pub const DEFAULT: Grain = Grain(BLOCK as u32);

    /// Checks a size in bytes.
    ///
    /// # Errors
    /// `Invalid` if it is not a power of two in the range.
    pub fn new(bytes: u64) -> Result<Grain> {
        if bytes.is_power_of_two() && (BLOCK..=u64::from(GRAIN_MAX)).contains(&bytes) {
            return Ok(Grain(bytes as u32));
        }
        Err(Error::new(
            Kind::Invalid,
            format!("grain size {bytes} is not a power of two from 4096 to {GRAIN_MAX} bytes"),
        ))
    }

    /// Bytes of a grain.
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// Log blocks of a grain's payload.
    pub fn blocks(self) -> u64 {
        self.bytes() / BLOCK
    }

    /// The grains a byte range touches.
    pub fn cover(self, bytes: Range<u64>) -> Range<u64> {
        bytes.start / self.bytes()..bytes.end.div_ceil(self.bytes())
    }

    /// The bytes of a range of grains.
    pub fn span(self, grains: Range<u64>) -> Range<u64> {
        grains.start * self.bytes()..grains.end * self.bytes()
    }
}

/// Sixteen random bytes that name a store, a volume or a snapshot for ever.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// Marks random bytes as a version 4 UUID (RFC 9562, section 5.4).
    pub fn from_random(mut bytes: [u8; 16]) -> Uuid {
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Uuid(bytes)
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if matches!(i, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A checked name of a volume, snapshot or clone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

/// Longest name in bytes; `.img` and a directory entry's 255 bytes leave room.
pub const NAME_MAX: usize = 200;

impl Name {
    /// Checks a name: `[A-Za-z0-9_][A-Za-z0-9._+:-]*`, at most 200 bytes, no `..`, not `live`.
    ///
    /// # Errors
    /// `Invalid`, saying which rule it breaks.
    pub fn new(name: &str) -> Result<Name> {
        let bad = |why: &str| {
            let shown = escape(name);
            Err(Error::new(Kind::Invalid, format!("name '{shown}' {why}")))
        };
        let Some(&first) = name.as_bytes().first() else {
            return bad("is empty");
        };
        if name.len() > NAME_MAX {
            return bad("is longer than 200 bytes");
        }
        if !(first.is_ascii_alphanumeric() || first == b'_') {
            return bad("must start with a letter, a digit or '_'");
        }
        if !name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._+:-".contains(&b))
        {
            return bad("may only hold letters, digits and . _ + : -");
        }
        if name.contains("..") {
            return bad("may not hold '..' (it separates the ends of a diff)");
        }
        if name == "live" {
            return bad("is reserved");
        }
        Ok(Name(name.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Makes foreign text safe for a terminal and a log: control and non-ASCII characters are escaped.
pub fn escape(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let plain = c == ' ' || c.is_ascii_graphic() && c != '\\';
            let escaped = (!plain).then(|| c.escape_default());
            plain
                .then_some(c)
                .into_iter()
                .chain(escaped.into_iter().flatten())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_an_allow_list() {
        for good in [
            "a",
            "daily-2026-11-21T10:00:00+01",
            "_x",
            "vm1.web",
            &"n".repeat(200),
        ] {
            assert!(Name::new(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "a..b",
            "-x",
            ".x",
            "a/b",
            "a\0b",
            "a\nb",
            "\u{202e}x",
            "live",
            "a b",
        ] {
            assert_eq!(Name::new(bad).unwrap_err().kind(), Kind::Invalid, "{bad:?}");
        }
        assert!(Name::new(&"n".repeat(201)).is_err());
    }

    #[test]
    fn errors_show_foreign_names_escaped() {
        let text = Name::new("x\u{1b}[31m\n").unwrap_err().to_string();
        assert!(text.bytes().all(|b| (0x20..0x7f).contains(&b)), "{text:?}");
    }

    #[test]
    fn grains_cover_what_a_range_touches() {
        let g = Grain::new(4096).unwrap();
        assert_eq!(g.cover(4095..4097), 0..2);
        assert_eq!(g.cover(4096..4096), 1..1);
        assert!(Grain::new(2048).is_err() && Grain::new(5000).is_err());
        assert!(Grain::new(2 << 20).is_err());
    }
}
