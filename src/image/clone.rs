//! A clone as an image: writable, and of a fixed size unless it was made empty.
//!
//! A clone that was made empty *grows*: what is copied into it gives it its size, so a write past the
//! end makes it larger. Every other one ends like a device, see [`crate::image::live`].
//!
//! Does not: make a write durable by itself, see [`CloneImage::flush`].

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Result;
use crate::image::Image;
use crate::image::rewrite::Target;
use crate::volume::{CloneInfo, OpenClone, Snapshot, Zeroing};

/// An open clone's content.
#[derive(Clone)]
pub struct CloneImage {
    clone: Arc<OpenClone>,
}

/// Held while the size of a growing clone is compared and set, whichever handle it grows through: of
/// two that set it neither may cut off what the other one got. (Writes at the end and changes of the
/// size are kept apart by the kernel, which locks the file for both.)
static GROWTH: Mutex<()> = Mutex::new(());

impl CloneImage {
    /// The image of an open clone.
    pub fn new(clone: Arc<OpenClone>) -> CloneImage {
        CloneImage { clone }
    }

    /// Facts about the clone.
    pub fn info(&self) -> CloneInfo {
        self.clone.info()
    }

    /// Bytes of storage its content uses.
    ///
    /// # Errors
    /// `Io`.
    pub fn allocated(&self) -> Result<u64> {
        self.clone.allocated()
    }

    /// Whether it was made empty and its size is not fixed yet.
    pub fn is_growing(&self) -> bool {
        self.clone.is_growing()
    }

    /// Makes a growing clone at least `end` bytes large; any other stays as it is.
    ///
    /// # Errors
    /// Those of [`CloneImage::set_size`].
    pub fn grow_to(&self, end: u64) -> Result<()> {
        if end <= self.clone.size() || !self.clone.is_growing() {
            return Ok(());
        }
        let _alone = GROWTH.lock().unwrap_or_else(PoisonError::into_inner);
        if end <= self.clone.size() {
            return Ok(());
        }
        self.clone.set_size(end)
    }

    /// Gives a growing clone another size.
    ///
    /// # Errors
    /// `Permission` for one whose size is fixed; `Limit`, `NoSpace`, `Io`.
    pub fn set_size(&self, size: u64) -> Result<()> {
        let _alone = GROWTH.lock().unwrap_or_else(PoisonError::into_inner);
        self.clone.set_size(size)
    }

    /// Takes over a range of a snapshot without copying it; `false` if it has to be copied.
    ///
    /// # Errors
    /// Those of a write.
    pub fn take_over(&self, from: &Snapshot, offset: u64, len: u64) -> Result<bool> {
        let _alone = GROWTH.lock().unwrap_or_else(PoisonError::into_inner);
        self.clone.take_over(from, offset, len)
    }

    /// Makes a range zero; the range must lie within the size.
    ///
    /// # Errors
    /// Those of a write.
    pub fn zero(&self, offset: u64, len: u64, how: Zeroing) -> Result<()> {
        self.clone.zero(offset, len, how)
    }

    /// Makes every acknowledged write of this clone durable.
    ///
    /// # Errors
    /// `Failed` or `Io`: what was written since the last success counts as lost.
    pub fn flush(&self) -> Result<()> {
        self.clone.flush()
    }
}

impl Image for CloneImage {
    fn size(&self) -> u64 {
        self.clone.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.clone.read_at(offset, buf)
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        self.clone.next_data(offset)
    }

    fn next_hole(&self, offset: u64) -> Result<u64> {
        self.clone.next_hole(offset)
    }
}

impl Target for CloneImage {
    fn write_at(&self, offset: u64, data: &[u8], compare: bool) -> Result<()> {
        self.clone.write_at(offset, data, compare)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.clone.zero(offset, len, Zeroing::Discard)
    }
}
