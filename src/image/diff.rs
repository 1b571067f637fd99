//! A diff with what its newer point holds: the extent list that programs read.
//!
//! Promises: the extents are sorted, disjoint and coalesced, each is a whole number of grains (cut
//! at the size), and `zero` is exact to the grain: it says that every byte of every grain of the
//! extent is zero in the newer point, and its absence that every grain holds another byte. So the
//! list of two snapshots is a function of the two, however their content is kept at the moment.
//!
//! Only changed grains are looked at, and holes among them are skipped where they are long. Of the
//! live volume the list is as of moments while it was made.
//!
//! Does not: cache, or know files.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::volume::{DIFF_RUNS_MAX, Diff};

/// Bytes read at a time; no grain is larger.
const PIECE: u64 = 1 << 20;

/// What the newer end of a diff is called when it is the volume as it is now.
pub const LIVE: &str = "live";

/// A run of changed grains, all zero or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiffExtent {
    /// First byte.
    pub start: u64,
    /// Bytes, never 0.
    pub length: u64,
    /// Every grain is zero in the newer point; else none is.
    pub zero: bool,
}

/// A diff as programs read it; its field names are an interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiffList {
    /// The volume.
    pub volume: String,
    /// The older snapshot.
    pub from: String,
    /// The newer snapshot, or `live`.
    pub to: String,
    /// Bytes of the newer point.
    pub size: u64,
    /// Bytes of a grain.
    pub grain: u64,
    /// Unique for ever.
    pub from_uuid: String,
    /// Unique for ever; absent for `live`.
    pub to_uuid: Option<String>,
    /// What changed, in bytes.
    pub extents: Vec<DiffExtent>,
}

impl DiffList {
    /// The list of a diff whose extents are known.
    pub fn new(diff: &Diff, extents: Vec<DiffExtent>) -> DiffList {
        DiffList {
            volume: diff.from.volume.to_string(),
            from: diff.from.name.to_string(),
            to: diff
                .to
                .as_ref()
                .map_or(LIVE.to_owned(), |to| to.name.to_string()),
            size: diff.size,
            grain: diff.grain.bytes(),
            from_uuid: diff.from.uuid.to_string(),
            to_uuid: diff.to.as_ref().map(|to| to.uuid.to_string()),
            extents,
        }
    }

    /// One JSON object, ended by a newline.
    ///
    /// # Errors
    /// `Failed` if it cannot be rendered.
    pub fn json(&self) -> Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec(self)
            .map_err(|e| Error::with_source(Kind::Failed, "cannot render a diff", e))?;
        bytes.push(b'\n');
        Ok(bytes)
    }
}

/// The extents of a diff, with the content of `image`, its newer point.
///
/// # Errors
/// Those of reading; `Limit` for more than [`DIFF_RUNS_MAX`] extents.
pub fn extents(image: &dyn Image, diff: &Diff) -> Result<Vec<DiffExtent>> {
    looked_at(image, &diff.changed, diff.grain.bytes())
}

pub(super) fn looked_at(
    image: &dyn Image,
    changed: &[Range<u64>],
    grain: u64,
) -> Result<Vec<DiffExtent>> {
    let mut extents = Vec::new();
    let mut buffer = Vec::new();
    // The end of what is known to hold no data.
    let mut hole_end = 0;
    for run in changed {
        let mut at = run.start;
        while at < run.end {
            let known = hole_end.min(run.end) / grain * grain;
            let known = if hole_end >= run.end { run.end } else { known };
            if known > at {
                push(&mut extents, at..known, true);
                at = known;
                continue;
            }
            let end = run.end.min(at + PIECE);
            buffer.resize((end - at) as usize, 0);
            image.read_at(at, &mut buffer)?;
            let mut data = false;
            for (i, content) in buffer.chunks(grain as usize).enumerate() {
                let zero = is_zero(content);
                let start = at + i as u64 * grain;
                push(&mut extents, start..start + content.len() as u64, zero);
                data |= !zero;
            }
            if extents.len() > DIFF_RUNS_MAX {
                let why = format!("the diff has more than {DIFF_RUNS_MAX} extents");
                return Err(Error::new(Kind::Limit, why));
            }
            at = end;
            if !data && end - run.start >= PIECE && at < run.end {
                hole_end = image.next_data(at)?.unwrap_or(u64::MAX);
            }
        }
    }
    Ok(extents)
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(64)
        .all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}

fn push(extents: &mut Vec<DiffExtent>, range: Range<u64>, zero: bool) {
    let length = range.end - range.start;
    match extents.last_mut() {
        Some(last) if last.zero == zero && last.start + last.length == range.start => {
            last.length += length;
        }
        _ => extents.push(DiffExtent {
            start: range.start,
            length,
            zero,
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// Bytes that count how many of them were read; what is zero from `hole` on is a hole.
    struct Counted {
        bytes: Vec<u8>,
        read: AtomicU64,
    }

    impl Image for Counted {
        fn size(&self) -> u64 {
            self.bytes.len() as u64
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
            let at = offset as usize;
            buf.copy_from_slice(&self.bytes[at..at + buf.len()]);
            self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
            Ok(())
        }
        fn next_data(&self, offset: u64) -> Result<Option<u64>> {
            let rest = &self.bytes[offset as usize..];
            let found = rest.iter().position(|&b| b != 0);
            Ok(found.map(|i| offset + i as u64))
        }
        fn next_hole(&self, _offset: u64) -> Result<u64> {
            Ok(self.size())
        }
    }

    fn image(size: usize, data: &[usize]) -> Counted {
        let mut bytes = vec![0; size];
        for &at in data {
            bytes[at] = 1;
        }
        Counted {
            bytes,
            read: AtomicU64::new(0),
        }
    }

    fn list(image: &Counted, changed: &[Range<u64>]) -> Vec<(u64, u64, bool)> {
        let extents = looked_at(image, changed, 4096).unwrap();
        extents
            .iter()
            .map(|e| (e.start, e.length, e.zero))
            .collect()
    }

    #[test]
    fn zero_is_exact_to_the_grain_and_the_end_is_cut() {
        let image = image(5 * 4096 + 100, &[4095, 4096, 3 * 4096, 5 * 4096 + 99]);
        let whole = 0..image.size();
        let expected = [
            (0, 8192, false),
            (8192, 4096, true),
            (12288, 4096, false),
            (16384, 4096, true),
            (20480, 100, false),
        ];
        assert_eq!(list(&image, std::slice::from_ref(&whole)), expected);
        let parts = [4096..8192, 16384..20480];
        let expected = [(4096, 4096, false), (16384, 4096, true)];
        assert_eq!(list(&image, &parts), expected);
        assert_eq!(list(&image, &[]), []);
    }

    #[test]
    fn only_what_changed_is_read_and_long_holes_are_not() {
        let small = image(64 << 20, &[]);
        assert_eq!(
            list(&small, &[4096..8192, 1 << 20..(1 << 20) + 4096]).len(),
            2
        );
        assert_eq!(small.read.load(Ordering::Relaxed), 8192);
        let at = (48 << 20) + 5000;
        let long = image(64 << 20, &[at]);
        let whole = [0..20 << 20, 21 << 20..64 << 20];
        let data = at as u64 / 4096 * 4096;
        let expected = [
            (0, 20 << 20, true),
            (21 << 20, data - (21 << 20), true),
            (data, 4096, false),
            (data + 4096, (64 << 20) - data - 4096, true),
        ];
        assert_eq!(list(&long, &whole), expected);
        assert!(long.read.load(Ordering::Relaxed) <= 4 << 20);
    }

    /// Zeros without end.
    struct Nothing;

    impl Image for Nothing {
        fn size(&self) -> u64 {
            u64::MAX
        }
        fn read_at(&self, _offset: u64, buf: &mut [u8]) -> Result<()> {
            buf.fill(0);
            Ok(())
        }
        fn next_data(&self, _offset: u64) -> Result<Option<u64>> {
            Ok(None)
        }
        fn next_hole(&self, offset: u64) -> Result<u64> {
            Ok(offset)
        }
    }

    #[test]
    fn a_diff_in_too_many_pieces_is_refused() {
        let pieces = |n: u64| (0..n).map(|i| 2 * i..2 * i + 1).collect::<Vec<_>>();
        let all = looked_at(&Nothing, &pieces(4_194_304), 1).unwrap();
        assert_eq!(all.len(), 4_194_304);
        let refused = looked_at(&Nothing, &pieces(4_194_305), 1).unwrap_err();
        assert_eq!(refused.kind(), Kind::Limit);
    }
}
