//! The one door to storage: [`Disk`] is a file or device, [`Dir`] a directory of them.
//!
//! The log, the superblock, overlays and sources do all their I/O through these traits. The real
//! twin is `sys::file`; the test twin `sys::sim` decides at a simulated power cut, from a seed, for
//! each sector not yet synced, what it becomes: old, new, torn, zero or garbage.
//!
//! Durability: nothing is durable before [`Disk::sync_data`] (content) or [`Dir::sync`] (names) has
//! returned `Ok`. After an error of either, what it covered counts as lost: a later `Ok` proves
//! nothing about it.

use std::io;
use std::sync::Arc;

/// A file or block device, read and written at offsets. All offsets and lengths are bytes.
pub trait Disk: Send + Sync {
    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` if the disk ends inside the range; else the system's error.
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes the parts one after another from `offset`, as one request where the system allows;
    /// extends the file when it ends before.
    ///
    /// # Errors
    /// The system's error; any prefix may have been written.
    fn write_all_at(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()>;

    /// Makes content and size durable (`fdatasync`), but not times.
    ///
    /// # Errors
    /// The system's error: everything written since the last success counts as lost.
    fn sync_data(&self) -> io::Result<()>;

    /// As [`Disk::sync_data`], and the times that [`Disk::identity`] tells, too (`fsync`): a power cut
    /// after it does not set them back. A disk without times need not tell the two apart.
    ///
    /// # Errors
    /// As [`Disk::sync_data`].
    fn sync_all(&self) -> io::Result<()> {
        self.sync_data()
    }

    /// Has the system begin to write back what was written to a range, so that less is left for the
    /// next [`Disk::sync_data`]. A hint and nothing more: it proves nothing, reports no error and takes
    /// none from that sync.
    fn start_writing(&self, _offset: u64, _len: u64) {}

    /// Size in bytes.
    ///
    /// # Errors
    /// The system's error.
    fn size(&self) -> io::Result<u64>;

    /// Cuts or extends the file; new bytes read as zero.
    ///
    /// # Errors
    /// The system's error; a device cannot.
    fn set_size(&self, size: u64) -> io::Result<()>;

    /// Makes a range read as zero and gives its space back where the system can; never changes the
    /// size. Falls back to writing zeros.
    ///
    /// # Errors
    /// The system's error; the range may be half done.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;

    /// The first offset at or after `offset` that holds data (`SEEK_DATA`), `None` when only hole
    /// follows. A disk that knows no holes answers `offset` below its size.
    ///
    /// # Errors
    /// The system's error.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>>;

    /// The first offset at or after `offset` that is a hole (`SEEK_HOLE`); the size counts as one.
    /// At or past the end: `offset`.
    ///
    /// # Errors
    /// The system's error.
    fn next_hole(&self, offset: u64) -> io::Result<u64>;

    /// Bytes of storage in use (`st_blocks * 512`).
    ///
    /// # Errors
    /// The system's error.
    fn allocated(&self) -> io::Result<u64>;

    /// Has the system forget cached content that is not waiting to be written, so that the next read
    /// shows what the medium has. After a failed sync the cache may show what the medium lacks.
    ///
    /// # Errors
    /// The system's error.
    fn drop_cache(&self) -> io::Result<()>;

    /// What tells this disk from another one, and whether somebody changed it.
    ///
    /// # Errors
    /// The system's error.
    fn identity(&self) -> io::Result<Identity>;

    /// Whether the disk ends before `size` bytes: somebody who is not us has cut it off. Only files of
    /// this machine can be; it costs no I/O.
    ///
    /// # Errors
    /// The system's error.
    fn shorter_than(&self, _size: u64) -> io::Result<bool> {
        Ok(false)
    }

    /// Whether a name still leads to the disk; what has none goes with the last process that has it
    /// open. Only files of this machine can lose theirs.
    ///
    /// # Errors
    /// The system's error.
    fn has_name(&self) -> io::Result<bool> {
        Ok(true)
    }
}

/// Who a source is and, for files, when it last changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Identity {
    /// Device that holds the file, or the device itself.
    pub dev: u64,
    /// Inode number; 0 for a device.
    pub ino: u64,
    /// Bytes.
    pub size: u64,
    /// Last status change in nanoseconds since 1970; 0 where it says nothing (devices).
    pub ctime_ns: i64,
}

/// How [`Dir::open`] opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Open {
    /// An existing file, for reading.
    Read,
    /// An existing file, for reading and writing.
    Write,
    /// A new file, for reading and writing; mode 0600; an error if it exists.
    Create,
}

/// Space of the filesystem that holds a directory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Size of the filesystem.
    pub total: u64,
    /// What this process may still use.
    pub available: u64,
}

/// A directory, held by descriptor: a renamed or replaced path does not lead elsewhere. Names are
/// single components; symbolic links are never followed.
pub trait Dir: Send + Sync {
    /// Opens or creates a file. A created name is durable after [`Dir::sync`].
    ///
    /// # Errors
    /// The system's error.
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn Disk>>;

    /// Opens a subdirectory, made with mode 0700 first if `create` and absent.
    ///
    /// # Errors
    /// The system's error.
    fn subdir(&self, name: &str, create: bool) -> io::Result<Arc<dyn Dir>>;

    /// Names of the entries, in no order, without `.` and `..`.
    ///
    /// # Errors
    /// The system's error.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Removes a file; open disks stay usable. Durable after [`Dir::sync`].
    ///
    /// # Errors
    /// The system's error.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Renames within the directory, over what is there. Durable after [`Dir::sync`].
    ///
    /// # Errors
    /// The system's error.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Makes creations, removals and renames durable (`fsync` of the directory).
    ///
    /// # Errors
    /// The system's error.
    fn sync(&self) -> io::Result<()>;

    /// Space of the filesystem below.
    ///
    /// # Errors
    /// The system's error.
    fn space(&self) -> io::Result<Space>;
}
