//! Which filesystem a directory lies on, as far as that can be told from a copy of it.
//!
//! Promises: two places that differ are two filesystems, or one that came back under another device number
//! ([`Place::Device`]); a filesystem and its copy, block by block, have the same [`Place::Filesystem`].

#![allow(unsafe_code, reason = "fstatfs(2), fstatvfs(3), fstat(2)")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

const BTRFS: u64 = 0x9123_683e;

/// Where something lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// On a device: a number that means something within one boot of the machine.
    Device(u64),
    /// On a filesystem that has a number of its own, which lasts. On btrfs each subvolume has another, so
    /// a snapshot of one is another place.
    Filesystem(u64),
    /// On one of which nothing lasting is known.
    Unknown,
}

/// The place of an open directory or file.
///
/// # Errors
/// The system's error.
pub fn place_of(opened: &impl AsFd) -> io::Result<Place> {
    let fd = opened.as_fd().as_raw_fd();
    // SAFETY: all bytes zero is a valid value of each of the three.
    let (mut fs, mut vfs, mut stat): (libc::statfs, libc::statvfs, libc::stat) =
        unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open while it is borrowed; the structs outlive the calls.
    let done = unsafe {
        libc::fstatfs(fd, &raw mut fs) == 0
            && libc::fstatvfs(fd, &raw mut vfs) == 0
            && libc::fstat(fd, &raw mut stat) == 0
    };
    if !done {
        return Err(io::Error::last_os_error());
    }
    Ok(if fs.f_type as u64 == BTRFS {
        Place::Filesystem(vfs.f_fsid)
    } else if libc::major(stat.st_dev) > 0 {
        Place::Device(stat.st_dev)
    } else {
        // A number that the kernel made up for this mount.
        Place::Unknown
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn a_place_stays() {
        let top = tempfile::tempdir().unwrap();
        let place = || place_of(&File::open(top.path()).unwrap()).unwrap();
        assert_eq!(place(), place());
        // Neither has a device.
        let proc = File::open("/proc").unwrap();
        assert_eq!(place_of(&proc).unwrap(), Place::Unknown);
    }
}
