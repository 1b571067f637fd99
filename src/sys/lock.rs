//! Locks between processes: one daemon a store, one user a source.
//!
//! Both are open-file-description locks (`F_OFD_SETLK`): held by the descriptor, given back when
//! the last copy of it closes, so also when the process dies in any way. They do not wait. The
//! lock on a file is advisory: programs that lock (qemu does) are seen and see us, others are not.
//! The lock file of a store is never removed: a removed one could be locked twice.

#![allow(unsafe_code, reason = "fcntl")]

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::disk::{Disk, Open};
use crate::sys::file::{FileDir, FileDisk};
use crate::sys::process;
use crate::units::escape;

const LOCK_NAME: &str = "lock";
/// Bytes of a lock file that are read: two numbers, a space, a newline.
const CONTENT_MAX: u64 = 64;

/// The right to use a store, while it lives.
#[derive(Debug)]
#[must_use = "the store is locked only while this lives"]
pub struct StoreLock {
    _file: FileDisk,
}

impl StoreLock {
    /// Locks the store in `dir`, making the lock file if it is missing.
    ///
    /// # Errors
    /// `Locked` if another process (or another lock of this one) holds it, naming the process;
    /// else by the system's error.
    pub fn acquire(dir: &FileDir) -> Result<StoreLock> {
        let store = escape(&dir.path().to_string_lossy());
        let file = open_lock(dir).context(|| format!("cannot open the lock of store {store}"))?;
        if !try_lock(file.as_fd()).context(|| format!("cannot lock store {store}"))? {
            let by = holder(&file).unwrap_or_else(|| "another process".to_owned());
            return Err(Error::new(
                Kind::Locked,
                format!("store {store} is in use by {by}"),
            ));
        }
        match write_holder(&file) {
            // The lock holds all the same; only who has it cannot be told.
            Err(e) if e.kind() == io::ErrorKind::StorageFull => {}
            written => {
                written.context(|| format!("cannot write the lock of store {store}"))?;
            }
        }
        Ok(StoreLock { _file: file })
    }
}

/// The process that holds the store in `dir`, if one does. Takes no lock.
///
/// # Errors
/// The system's error; a missing lock file is nobody's.
pub fn store_holder(dir: &FileDir) -> io::Result<Option<u32>> {
    let file = match dir.open_file(LOCK_NAME, Open::Write) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut lock = whole_file(libc::F_WRLCK);
    // SAFETY: `lock` is a valid `flock`, writable for the call; the descriptor is open.
    let answer = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    if libc::c_int::from(lock.l_type) == libc::F_UNLCK {
        return Ok(None);
    }
    Ok(read_holder(&file).map(|(pid, _)| pid))
}

/// Locks the whole of a file source for this process; `shown` names it in the message. A device is
/// claimed when it is opened (`O_EXCL`), not here. The lock ends when `disk` is dropped.
///
/// # Errors
/// `Busy` if another program holds a lock on any part; else by the system's error.
pub fn lock_source(disk: &FileDisk, shown: &str) -> Result<()> {
    if disk.is_device() {
        return Ok(());
    }
    if try_lock(disk.as_fd()).context(|| format!("cannot lock source {shown}"))? {
        return Ok(());
    }
    Err(Error::new(
        Kind::Busy,
        format!("source {shown} is locked by another program"),
    ))
}

fn open_lock(dir: &FileDir) -> io::Result<FileDisk> {
    match dir.open_file(LOCK_NAME, Open::Write) {
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        other => return other,
    }
    match dir.open_file(LOCK_NAME, Open::Create) {
        // Somebody was faster; files of this name are never removed.
        Err(e) if e.kind() == ErrorKind::AlreadyExists => dir.open_file(LOCK_NAME, Open::Write),
        other => other,
    }
}

fn whole_file(kind: libc::c_int) -> libc::flock {
    // SAFETY: all zeros is a valid `flock`: from byte 0 to the end, and `l_pid` 0 as OFD wants it.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock
}

/// Whether the lock is ours now.
fn try_lock(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let lock = whole_file(libc::F_WRLCK);
    loop {
        // SAFETY: `lock` is a valid `flock` for the call; the descriptor is open.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => return Ok(false),
            Some(libc::EINTR) => {}
            _ => return Err(error),
        }
    }
}

fn write_holder(file: &FileDisk) -> io::Result<()> {
    let pid = std::process::id();
    let started = process::start_time(pid).unwrap_or(0);
    file.set_size(0)?;
    file.write_all_at(0, &[format!("{pid} {started}\n").as_bytes()])
}

/// The recorded process and its start time.
fn read_holder(file: &FileDisk) -> Option<(u32, u64)> {
    let mut bytes = vec![0; usize::try_from(file.size().ok()?.min(CONTENT_MAX)).ok()?];
    file.read_exact_at(0, &mut bytes).ok()?;
    let text = std::str::from_utf8(&bytes).ok()?;
    let (pid, started) = text.trim_end().split_once(' ')?;
    Some((pid.parse().ok()?, started.parse().ok()?))
}

/// The recorded process in words, if it still is the one that was recorded.
fn holder(file: &FileDisk) -> Option<String> {
    let (pid, started) = read_holder(file)?;
    let same = process::start_time(pid).is_some_and(|now| started == 0 || now == started);
    let name = process::process_name(pid).filter(|_| same)?;
    Some(format!("process {pid} ({})", escape(&name)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::eventually;

    #[test]
    fn a_store_is_locked_once_and_the_holder_named() {
        let temp = tempfile::tempdir().unwrap();
        let dir = FileDir::open(temp.path()).unwrap();
        assert_eq!(store_holder(&dir).unwrap(), None);
        let lock = StoreLock::acquire(&dir).unwrap();
        let us = std::process::id();
        assert_eq!(store_holder(&dir).unwrap(), Some(us));
        let refused = StoreLock::acquire(&FileDir::open(temp.path()).unwrap()).unwrap_err();
        assert_eq!(refused.kind(), Kind::Locked);
        let name = process::process_name(us).unwrap();
        let expected = format!(
            "store {} is in use by process {us} ({name})",
            dir.path().display()
        );
        assert_eq!(refused.to_string(), expected);
        drop(lock);
        assert!(
            eventually(|| store_holder(&dir).unwrap().is_none()),
            "the file alone is no lock"
        );
        assert!(eventually(|| StoreLock::acquire(&dir).is_ok()));
    }

    #[test]
    fn a_stale_or_odd_record_names_nobody() {
        let temp = tempfile::tempdir().unwrap();
        let dir = FileDir::open(temp.path()).unwrap();
        let path = temp.path().join("lock");
        let _lock = StoreLock::acquire(&dir).unwrap();
        for odd in [
            "",
            "x",
            "1",
            "1 2 3",
            "4294967295 1\n",
            "\u{1b} \u{1b}",
            &"9".repeat(5000),
        ] {
            std::fs::write(&path, odd).unwrap();
            let text = StoreLock::acquire(&dir).unwrap_err().to_string();
            assert!(
                text.ends_with("is in use by another process"),
                "{odd:?}: {text}"
            );
        }
        // A process of that number, but a younger one than the record.
        std::fs::write(&path, format!("{} 1\n", std::process::id())).unwrap();
        assert!(
            StoreLock::acquire(&dir)
                .unwrap_err()
                .to_string()
                .contains("another process")
        );
    }

    #[test]
    fn a_source_is_locked_against_any_part_of_it() {
        let temp = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (
            FileDisk::open(temp.path(), true),
            FileDisk::open(temp.path(), true),
        );
        let (a, b) = (a.unwrap(), b.unwrap());
        // As qemu does: a read lock on single bytes.
        let mut byte = whole_file(libc::F_RDLCK);
        (byte.l_start, byte.l_len) = (100, 1);
        // SAFETY: `byte` is a valid `flock` for the call.
        let locked =
            unsafe { libc::fcntl(b.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &raw const byte) };
        assert_eq!(locked, 0);
        let refused = lock_source(&a, "/x").unwrap_err();
        assert_eq!(refused.kind(), Kind::Busy);
        assert_eq!(
            refused.to_string(),
            "source /x is locked by another program"
        );
        drop(b);
        assert!(eventually(|| lock_source(&a, "/x").is_ok()));
        lock_source(&a, "/x").unwrap();
    }
}
