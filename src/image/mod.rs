//! Everything that can be read as a raw disk image, and the rules for writing a whole one.
//!
//! An [`Image`] has a size, content at offsets, and a map of where it holds data. A snapshot and the
//! live volume are images, and so are clones and a diff as qcow2; what is shown later (restore points)
//! is built over this trait and needs no code of its own in `tree`.
//!
//! Promises: a range inside the size is read whole or not at all; a hole reads as zeros; the extents
//! of a range cover it without gap or overlap and neighbours differ in kind.
//!
//! Does not: cache, lock, or know names. Writing is only possible through [`live::LiveImage`] and
//! [`clone::CloneImage`].

pub mod clone;
pub mod diff;
pub mod live;
pub mod qcow2;
pub mod rewrite;

use std::ops::Range;

use crate::error::{Error, Kind, Result};
use crate::volume::Snapshot;

/// What an extent of an image holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Bytes that must be read to be known.
    Data,
    /// Reads as zeros; need not be read.
    Hole,
}

/// A run of an image with one kind of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageExtent {
    /// First byte.
    pub start: u64,
    /// Bytes, never 0.
    pub len: u64,
    /// What it holds.
    pub kind: ExtentKind,
}

/// A raw disk image that can be read at offsets. All offsets and lengths are bytes.
pub trait Image: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`; the range must lie within the size.
    ///
    /// # Errors
    /// `Invalid` for a range outside; `Failed` for a snapshot that could not be kept; `Damaged`,
    /// `Io`.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// The first offset at or after `offset` that holds data; `None` when only holes follow.
    ///
    /// # Errors
    /// As [`Image::read_at`].
    fn next_data(&self, offset: u64) -> Result<Option<u64>>;

    /// The first offset at or after `offset` that is a hole; the size counts as one.
    ///
    /// # Errors
    /// As [`Image::read_at`].
    fn next_hole(&self, offset: u64) -> Result<u64>;

    /// The extents of a range, ascending, covering it exactly.
    ///
    /// # Errors
    /// `Invalid` for a range outside the size; else as [`Image::read_at`].
    fn extents(&self, range: Range<u64>) -> Result<Vec<ImageExtent>> {
        if range.start > range.end || range.end > self.size() {
            return Err(Error::new(
                Kind::Invalid,
                format!("range {}..{} is outside the image", range.start, range.end),
            ));
        }
        let mut extents = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let data = self
                .next_data(at)?
                .unwrap_or(range.end)
                .clamp(at, range.end);
            push(&mut extents, at..data, ExtentKind::Hole);
            if data == range.end {
                break;
            }
            // A live image may change between the two questions: always get on by a byte at least.
            let hole = self.next_hole(data)?.clamp(data + 1, range.end);
            push(&mut extents, data..hole, ExtentKind::Data);
            at = hole;
        }
        Ok(extents)
    }
}

fn push(extents: &mut Vec<ImageExtent>, range: Range<u64>, kind: ExtentKind) {
    if range.is_empty() {
        return;
    }
    let len = range.end - range.start;
    match extents.last_mut() {
        Some(last) if last.kind == kind => last.len += len,
        _ => extents.push(ImageExtent {
            start: range.start,
            len,
            kind,
        }),
    }
}

impl Image for Snapshot {
    fn size(&self) -> u64 {
        Snapshot::size(self)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        Snapshot::read_at(self, offset, buf)
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        Snapshot::next_data(self, offset)
    }

    fn next_hole(&self, offset: u64) -> Result<u64> {
        Snapshot::next_hole(self, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image of 10-byte cells, `true` where it holds data.
    struct Cells(Vec<bool>);

    impl Image for Cells {
        fn size(&self) -> u64 {
            self.0.len() as u64 * 10
        }
        fn read_at(&self, _offset: u64, _buf: &mut [u8]) -> Result<()> {
            Err(Error::new(Kind::Unsupported, "only a map"))
        }
        fn next_data(&self, offset: u64) -> Result<Option<u64>> {
            Ok((offset..self.size()).find(|&o| self.0[(o / 10) as usize]))
        }
        fn next_hole(&self, offset: u64) -> Result<u64> {
            let hole = (offset..self.size()).find(|&o| !self.0[(o / 10) as usize]);
            Ok(hole.unwrap_or(self.size().max(offset)))
        }
    }

    #[test]
    fn extents_cover_a_range_exactly() {
        let image = Cells(vec![false, true, true, false, false, true]);
        for start in 0..=60 {
            for end in start..=60 {
                let mut at = start;
                let mut last = None;
                for e in image.extents(start..end).unwrap() {
                    assert_eq!(e.start, at, "{start}..{end}");
                    assert!(e.len > 0 && last != Some(e.kind), "{start}..{end}");
                    for o in e.start..e.start + e.len {
                        assert_eq!(image.0[(o / 10) as usize], e.kind == ExtentKind::Data);
                    }
                    last = Some(e.kind);
                    at += e.len;
                }
                assert_eq!(at, end);
            }
        }
    }

    #[test]
    fn extents_refuse_a_range_outside() {
        let image = Cells(vec![true]);
        assert_eq!(image.extents(0..11).unwrap_err().kind(), Kind::Invalid);
        #[allow(clippy::reversed_empty_ranges, reason = "the point of the test")]
        let reversed = 5..4;
        assert_eq!(image.extents(reversed).unwrap_err().kind(), Kind::Invalid);
    }
}
