//! The live volume as an image, and what a write at its end means.
//!
//! An image has a fixed size, like a device: a write that begins inside and ends past the end is
//! cut at the end, one that begins at or past it writes nothing ([`fit`]). Nothing here makes a write durable;
//! see [`LiveImage::flush`].

use std::sync::Arc;

use crate::error::Result;
use crate::image::Image;
use crate::image::rewrite::Target;
use crate::volume::{Volume, VolumeInfo, Zeroing};

/// A volume's current content.
#[derive(Clone)]
pub struct LiveImage {
    volume: Arc<Volume>,
}

impl LiveImage {
    /// The live image of a volume.
    pub fn new(volume: Arc<Volume>) -> LiveImage {
        LiveImage { volume }
    }

    /// Facts about the volume.
    pub fn info(&self) -> VolumeInfo {
        self.volume.info()
    }

    /// Bytes of storage in use by the content.
    ///
    /// # Errors
    /// `Io` when the source cannot be asked.
    pub fn allocated(&self) -> Result<u64> {
        self.volume.allocated()
    }

    /// Makes a range zero; the range must lie within the size.
    ///
    /// # Errors
    /// Those of a write.
    pub fn zero(&self, offset: u64, len: u64, how: Zeroing) -> Result<()> {
        self.volume.zero(offset, len, how)
    }

    /// Makes every acknowledged write of this volume durable.
    ///
    /// # Errors
    /// `Failed` or `Io`: what was written since the last success counts as lost.
    pub fn flush(&self) -> Result<()> {
        self.volume.flush()
    }
}

impl Image for LiveImage {
    fn size(&self) -> u64 {
        self.volume.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.volume.read_at(offset, buf)
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        self.volume.next_data(offset)
    }

    fn next_hole(&self, offset: u64) -> Result<u64> {
        self.volume.next_hole(offset)
    }
}

impl Target for LiveImage {
    fn write_at(&self, offset: u64, data: &[u8], compare: bool) -> Result<()> {
        self.volume.write_at(offset, data, compare)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.volume.zero(offset, len, Zeroing::Discard)
    }
}

/// How many bytes of a write of `len` (more than 0) bytes at `offset` fit into an image of `size`
/// bytes; `None` for a write that begins at or past the end.
pub fn fit(size: u64, offset: u64, len: usize) -> Option<usize> {
    let room = size.checked_sub(offset).filter(|&room| room > 0)?;
    Some(usize::try_from(room).unwrap_or(usize::MAX).min(len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_ends_at_the_end_like_on_a_device() {
        assert_eq!(fit(100, 0, 100), Some(100));
        assert_eq!(fit(100, 90, 20), Some(10));
        for (offset, len) in [(100, 1), (101, 1), (u64::MAX, usize::MAX)] {
            assert_eq!(fit(100, offset, len), None);
        }
    }
}
