//! A bit for each grain of a region: what a sweep finds dead, what a page holds.

use std::ops::Range;

use crate::units::REGION_GRAINS;

const REGION: usize = REGION_GRAINS as usize;

/// One bit for each grain of a region.
#[derive(Clone, PartialEq, Eq)]
pub struct RegionMask([u64; REGION / 64]);

impl RegionMask {
    /// No grain.
    pub fn new() -> RegionMask {
        RegionMask([0; REGION / 64])
    }

    /// Adds a range of grains, relative to the region.
    pub fn set(&mut self, range: Range<usize>) {
        let mut at = range.start;
        while at < range.end {
            let upto = range.end.min((at / 64 + 1) * 64);
            let ones = u64::MAX >> (64 - (upto - at));
            self.0[at / 64] |= ones << (at % 64);
            at = upto;
        }
    }

    /// Whether a grain is in.
    pub fn has(&self, grain: usize) -> bool {
        self.0[grain / 64] >> (grain % 64) & 1 == 1
    }

    /// Whether no grain is in.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|&word| word == 0)
    }

    /// Whether all of `self` is in `other`.
    pub fn is_within(&self, other: &RegionMask) -> bool {
        self.0.iter().zip(&other.0).all(|(a, b)| a & !b == 0)
    }

    /// The runs of a range that are all in (`true`) or all out.
    pub fn runs(&self, range: Range<usize>) -> impl Iterator<Item = (Range<usize>, bool)> + '_ {
        let mut at = range.start;
        std::iter::from_fn(move || {
            let from = at;
            if from >= range.end {
                return None;
            }
            let kind = self.has(from);
            while at < range.end && self.has(at) == kind {
                at += 1;
            }
            Some((from..at, kind))
        })
    }
}

impl Default for RegionMask {
    fn default() -> RegionMask {
        RegionMask::new()
    }
}
