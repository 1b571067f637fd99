//! The real twin of the storage traits: files, block devices and directories of this machine.
//!
//! Promises: a call either does all it was asked or answers an error (short reads and writes and
//! interruptions are retried); a [`FileDir`] is held by descriptor, so that a path replaced under
//! it leads nowhere else; it never follows a symbolic link below itself; what it makes is
//! for the owner alone (files 0600, directories 0700). A [`FileDir`] that was opened by path
//! belongs to this user and is not writable for others.
//!
//! It does not cache, buffer or retry a failed sync, and it holds no lock (see `sys::lock`). The
//! file position of a descriptor is not used: `SEEK_DATA` and `SEEK_HOLE` move it.

#![allow(unsafe_code, reason = "system calls that std has no door for")]

mod dir;

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::sys::disk::{Disk, Identity};
pub use crate::sys::file::dir::FileDir;
use crate::sys::watch::{Call, calling};
use crate::units::BLOCK;

/// Bytes written at once where a range cannot be punched: bounds memory and the time until a
/// signal is seen.
const ZERO_PIECE: usize = 1 << 20;

/// The most parts the kernel takes in one `pwritev` (`UIO_MAXIOV`).
const PARTS_MAX: usize = 1024;

/// A regular file or a block device.
#[derive(Debug)]
pub struct FileDisk {
    file: File,
    device: bool,
}

impl FileDisk {
    /// Takes over an open file.
    ///
    /// # Errors
    /// `InvalidInput` if it is neither a regular file nor a block device; else the system's error.
    pub fn from_file(file: File) -> io::Result<FileDisk> {
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(
                ErrorKind::InvalidInput,
                "not a regular file or block device",
            ));
        }
        Ok(FileDisk {
            file,
            device: kind.is_block_device(),
        })
    }

    /// Opens an existing file or device by path, following symbolic links.
    ///
    /// # Errors
    /// As [`FileDisk::from_file`].
    pub fn open(path: &Path, write: bool) -> io::Result<FileDisk> {
        // O_NONBLOCK: opening a pipe by mistake must not hang. It means nothing for files.
        let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
        let file = OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(flags)
            .open(path)?;
        FileDisk::from_file(file)
    }

    /// Whether this is a block device.
    pub fn is_device(&self) -> bool {
        self.device
    }

    /// Writes zeros in bounded pieces; nothing if the range is empty or reversed.
    fn zero(&self, mut offset: u64, end: u64) -> io::Result<()> {
        let _calling = calling(Call::Write, self.file.as_raw_fd());
        let len = usize::try_from(end.saturating_sub(offset)).unwrap_or(ZERO_PIECE);
        let zeros = vec![0; len.min(ZERO_PIECE)];
        while offset < end {
            let len = usize::try_from(end - offset)
                .unwrap_or(ZERO_PIECE)
                .min(zeros.len());
            self.file.write_all_at(&zeros[..len], offset)?;
            offset += len as u64;
        }
        Ok(())
    }

    /// Punches without fallback.
    fn fallocate_punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let _calling = calling(Call::Space, self.file.as_raw_fd());
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (offset, len) = (file_offset(offset)?, file_offset(len)?);
        retry(|| {
            // SAFETY: takes numbers only; the descriptor is open as long as `self.file`.
            unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, len) }
        })
        .map(drop)
    }

    fn seek(&self, offset: u64, whence: libc::c_int) -> io::Result<u64> {
        let offset = file_offset(offset)?;
        // SAFETY: takes numbers only; the descriptor is open as long as `self.file`.
        let found = unsafe { libc::lseek(self.file.as_raw_fd(), offset, whence) };
        u64::try_from(found).map_err(|_| io::Error::last_os_error())
    }
}

impl Disk for FileDisk {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let _calling = calling(Call::Read, self.file.as_raw_fd());
        self.file.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, mut offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        let _calling = calling(Call::Write, self.file.as_raw_fd());
        let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
        let mut rest: &mut [IoSlice<'_>] = &mut slices;
        IoSlice::advance_slices(&mut rest, 0); // drops empty parts at the front
        while !rest.is_empty() {
            let count = rest.len().min(PARTS_MAX);
            let at = file_offset(offset)?;
            let wrote = retry_long(|| {
                // SAFETY: an `IoSlice` is an `iovec` by its documented layout; the first `count`
                // of them are initialised and borrow memory that outlives the call.
                unsafe {
                    let fd = self.file.as_raw_fd();
                    libc::pwritev(fd, rest.as_ptr().cast(), count as libc::c_int, at)
                }
            })?;
            if wrote == 0 {
                return Err(ErrorKind::WriteZero.into());
            }
            offset += wrote as u64;
            IoSlice::advance_slices(&mut rest, wrote);
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let _calling = calling(Call::Sync, self.file.as_raw_fd());
        self.file.sync_data()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn start_writing(&self, offset: u64, len: u64) {
        let (Ok(offset), Ok(len)) = (file_offset(offset), file_offset(len)) else {
            return;
        };
        // Only this flag: those that wait would take an error of writing back from the next sync.
        let how = libc::SYNC_FILE_RANGE_WRITE;
        // SAFETY: takes numbers only; the descriptor is open as long as `self.file`.
        let _ = unsafe { libc::sync_file_range(self.file.as_raw_fd(), offset, len, how) };
    }

    fn size(&self) -> io::Result<u64> {
        if self.device {
            return self.seek(0, libc::SEEK_END);
        }
        Ok(self.file.metadata()?.size())
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        if self.device {
            return Err(io::Error::new(
                ErrorKind::Unsupported,
                "a device keeps its size",
            ));
        }
        let _calling = calling(Call::Space, self.file.as_raw_fd());
        self.file.set_len(size)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let size = self.size()?;
        let wanted_end = offset.saturating_add(len);
        let end = wanted_end.min(size);
        if offset >= end {
            return Ok(());
        }
        // A device punches whole blocks only; its edges are zeroed.
        let (from, to) = if self.device {
            (
                offset.next_multiple_of(BLOCK).min(end),
                (end / BLOCK * BLOCK).max(offset),
            )
        } else if wanted_end >= size {
            // Whole last block, so that its space goes too.
            (offset, end.checked_next_multiple_of(BLOCK).unwrap_or(end))
        } else {
            (offset, end)
        };
        if from >= to {
            return self.zero(offset, end);
        }
        self.zero(offset, from)?;
        match self.fallocate_punch(from, to - from) {
            Ok(()) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                self.zero(from, to.min(end))?;
            }
            Err(e) => return Err(e),
        }
        self.zero(to, end)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        match self.seek(offset, libc::SEEK_DATA) {
            Ok(found) => Ok(Some(found)),
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                Ok((offset < self.size()?).then_some(offset))
            }
            Err(e) => Err(e),
        }
    }

    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        match self.seek(offset, libc::SEEK_HOLE) {
            Ok(found) => Ok(found),
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(offset),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(self.size()?.max(offset)),
            Err(e) => Err(e),
        }
    }

    fn allocated(&self) -> io::Result<u64> {
        if self.device {
            return self.size(); // its node has no blocks; the device is all in use
        }
        Ok(self.file.metadata()?.blocks() * 512)
    }

    fn drop_cache(&self) -> io::Result<()> {
        // SAFETY: the descriptor is open for as long as `self`; the call takes no pointers.
        let errno =
            unsafe { libc::posix_fadvise(self.file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        if errno == 0 {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(errno))
        }
    }

    fn shorter_than(&self, size: u64) -> io::Result<bool> {
        // A device that shrinks refuses what lies past its end.
        Ok(!self.device && self.file.metadata()?.size() < size)
    }

    fn has_name(&self) -> io::Result<bool> {
        Ok(self.device || self.file.metadata()?.nlink() > 0)
    }

    fn identity(&self) -> io::Result<Identity> {
        let meta = self.file.metadata()?;
        if self.device {
            return Ok(Identity {
                dev: meta.rdev(),
                ino: 0,
                size: self.size()?,
                ctime_ns: 0,
            });
        }
        let ctime_ns = meta
            .ctime()
            .saturating_mul(1_000_000_000)
            .saturating_add(meta.ctime_nsec());
        Ok(Identity {
            dev: meta.dev(),
            ino: meta.ino(),
            size: meta.size(),
            ctime_ns,
        })
    }
}

impl AsFd for FileDisk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Checks that `name` is one path component.
///
/// # Errors
/// `InvalidInput`.
pub(super) fn check_name(name: &str) -> io::Result<()> {
    if matches!(name, "" | "." | "..") || name.contains(['/', '\0']) {
        return Err(io::Error::new(
            ErrorKind::InvalidInput,
            "not a plain file name",
        ));
    }
    Ok(())
}

fn file_offset(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

/// Calls again while interrupted; a negative answer is the thread's errno.
fn retry(mut call: impl FnMut() -> libc::c_int) -> io::Result<libc::c_int> {
    loop {
        let answer = call();
        if answer >= 0 {
            return Ok(answer);
        }
        let error = io::Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// As [`retry`], for calls that answer a length.
fn retry_long(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        if let Ok(len) = usize::try_from(call()) {
            return Ok(len);
        }
        let error = io::Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::disk::{Dir, Open};

    fn dir() -> (tempfile::TempDir, FileDir) {
        let temp = tempfile::tempdir().unwrap();
        let dir = FileDir::open(temp.path()).unwrap();
        (temp, dir)
    }

    #[test]
    fn reads_back_what_many_parts_wrote() {
        let (_temp, dir) = dir();
        let disk = dir.open("a", Open::Create).unwrap();
        // More parts than one call takes, some of them empty.
        let bytes: Vec<u8> = (0..5000u32).map(|i| (i % 251) as u8).collect();
        let mut parts: Vec<&[u8]> = vec![&[], &[]];
        parts.extend(bytes.chunks(2).flat_map(|c| [c, &[][..]]));
        disk.write_all_at(7, &parts).unwrap();
        disk.sync_data().unwrap();
        assert_eq!(disk.size().unwrap(), 5007);
        let mut back = vec![1; 5007];
        disk.read_exact_at(0, &mut back).unwrap();
        assert_eq!(back[..7], [0; 7]);
        assert_eq!(back[7..], bytes);
        let past = disk.read_exact_at(5000, &mut [0; 8]).unwrap_err();
        assert_eq!(past.kind(), ErrorKind::UnexpectedEof);
        disk.write_all_at(0, &[]).unwrap();
        disk.write_all_at(0, &[&[], &[]]).unwrap();
        assert!(disk.write_all_at(u64::MAX, &[b"x"]).is_err());
    }

    #[test]
    fn holes_are_found_and_punched() {
        let (_temp, dir) = dir();
        let disk = dir.open("a", Open::Create).unwrap();
        disk.set_size(1 << 20).unwrap();
        assert_eq!(disk.allocated().unwrap(), 0);
        assert_eq!(disk.next_data(0).unwrap(), None);
        disk.write_all_at(65536, &[&[5; 65536]]).unwrap();
        assert_eq!(disk.next_data(0).unwrap(), Some(65536));
        assert_eq!(disk.next_hole(70000).unwrap(), 131_072);
        assert_eq!(disk.next_hole(2 << 20).unwrap(), 2 << 20);
        assert_eq!(disk.next_data(2 << 20).unwrap(), None);
        assert!(disk.allocated().unwrap() >= 65536);
        disk.punch(65536 + 100, 65536 - 100).unwrap();
        let mut back = vec![1; 65536];
        disk.read_exact_at(65536, &mut back).unwrap();
        assert_eq!(back[..100], [5; 100]);
        assert!(back[100..].iter().all(|b| *b == 0));
        assert!(disk.allocated().unwrap() < 65536);
        assert_eq!(disk.size().unwrap(), 1 << 20);
        disk.punch(0, u64::MAX).unwrap();
        assert_eq!(
            (disk.allocated().unwrap(), disk.size().unwrap()),
            (0, 1 << 20)
        );
        disk.punch(9, 0).unwrap();
    }

    #[test]
    fn zeros_stand_in_for_a_punch() {
        let (temp, dir) = dir();
        let disk = dir.open_file("a", Open::Create).unwrap();
        let len = 2 * ZERO_PIECE + 10;
        disk.write_all_at(0, &[&vec![7; len]]).unwrap();
        disk.zero(5, len as u64 - 5).unwrap();
        let back = std::fs::read(temp.path().join("a")).unwrap();
        assert_eq!(
            (back.len(), &back[..5], &back[len - 5..]),
            (len, &[7; 5][..], &[7; 5][..])
        );
        assert!(back[5..len - 5].iter().all(|b| *b == 0));
    }

    #[test]
    fn identity_tells_files_and_changes_apart() {
        let (_temp, dir) = dir();
        let (a, b) = (
            dir.open("a", Open::Create).unwrap(),
            dir.open("b", Open::Create).unwrap(),
        );
        let before = a.identity().unwrap();
        assert_ne!(before.ino, b.identity().unwrap().ino);
        assert_eq!(
            before,
            dir.open("a", Open::Read).unwrap().identity().unwrap()
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
        a.write_all_at(0, &[b"x"]).unwrap();
        let after = a.identity().unwrap();
        assert!(after.ctime_ns > before.ctime_ns && after.size == 1);
        assert_eq!((after.dev, after.ino), (before.dev, before.ino));
    }
}
