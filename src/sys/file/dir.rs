//! Directories of this machine; what they promise stands in [`super`].

use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::disk::{Dir, Disk, Open, Space};
use crate::sys::file::{FileDisk, check_name, retry};
use crate::sys::process::effective_uid;
use crate::sys::watch::{Call, calling};
use crate::units::escape;

/// A directory of this machine, held by descriptor.
#[derive(Debug)]
pub struct FileDir {
    fd: OwnedFd,
    path: PathBuf,
}

impl FileDir {
    /// Opens an existing directory, which must be this user's and closed to other writers.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` if it is no directory; `Permission` if it belongs to somebody else
    /// or others may write to it; else by the system's error.
    pub fn open(path: &Path) -> Result<FileDir> {
        let shown = escape(&path.to_string_lossy());
        let canonical = path
            .canonicalize()
            .context(|| format!("cannot open directory {shown}"))?;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
            .open(&canonical)
            .map_err(|e| match e.kind() {
                ErrorKind::NotADirectory => {
                    Error::new(Kind::Invalid, format!("{shown} is not a directory"))
                }
                _ => Error::io(format!("cannot open directory {shown}"), e),
            })?;
        check_private(&file, &shown)?;
        Ok(FileDir {
            fd: file.into(),
            path: canonical,
        })
    }

    /// Opens a directory, making it and its missing parents with mode 0700 first. Each new name is
    /// durable when this returns.
    ///
    /// # Errors
    /// As [`FileDir::open`].
    pub fn create(path: &Path) -> Result<FileDir> {
        let shown = escape(&path.to_string_lossy());
        make_dirs(path).context(|| format!("cannot make directory {shown}"))?;
        FileDir::open(path)
    }

    /// Has a filesystem that writes everything to a new place (btrfs) overwrite in place what is made
    /// in this directory from now on: else not even bytes that are there already can be written
    /// when it is full. Best effort; elsewhere nothing happens.
    pub fn overwrite_in_place(&self) {
        const BTRFS: u64 = 0x9123_683e;
        const NOCOW: libc::c_int = 0x0080_0000;
        // SAFETY: all bytes zero is a valid `statfs`, which the call fills.
        let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is ours, the struct outlives the call.
        let done = unsafe { libc::fstatfs(self.raw(), &raw mut stat) };
        if done != 0 || stat.f_type as u64 != BTRFS {
            return;
        }
        let mut flags: libc::c_int = 0;
        // SAFETY: the descriptor is ours; the kernel reads and writes one int, whatever the
        // request's number says of a long.
        unsafe {
            if libc::ioctl(self.raw(), libc::FS_IOC_GETFLAGS, &raw mut flags) == 0 {
                flags |= NOCOW;
                libc::ioctl(self.raw(), libc::FS_IOC_SETFLAGS, &raw const flags);
            }
        }
    }

    /// The canonical path it was opened by, for messages. It may have been renamed since.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path that leads to this very directory while `self` lives, in this process only. Short:
    /// a socket's path ends at 107 bytes.
    pub fn fd_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.fd.as_raw_fd()))
    }

    /// As [`Dir::open`], for callers that need the descriptor.
    ///
    /// # Errors
    /// As [`Dir::open`].
    pub fn open_file(&self, name: &str, how: Open) -> io::Result<FileDisk> {
        let access = match how {
            Open::Read => libc::O_RDONLY,
            Open::Write => libc::O_RDWR,
            Open::Create => libc::O_RDWR | libc::O_CREAT | libc::O_EXCL,
        };
        // O_NONBLOCK: a pipe planted here must not hang us. It means nothing for files.
        let fd = self.open_at(&c_name(name)?, access | libc::O_NONBLOCK | libc::O_NOCTTY)?;
        FileDisk::from_file(File::from(fd))
    }

    /// As [`Dir::subdir`], for callers that need the descriptor or the path.
    ///
    /// # Errors
    /// As [`Dir::subdir`].
    pub fn open_dir(&self, name: &str, create: bool) -> io::Result<FileDir> {
        let c = c_name(name)?;
        if create {
            // SAFETY: `c` is a C string that outlives the call; the descriptor is ours.
            let made = retry(|| unsafe { libc::mkdirat(self.raw(), c.as_ptr(), 0o700) });
            match made {
                Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
                _ => {}
            }
        }
        let fd = self.open_at(&c, libc::O_RDONLY | libc::O_DIRECTORY)?;
        Ok(FileDir {
            fd,
            path: self.path.join(name),
        })
    }

    fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    fn open_at(&self, name: &CStr, flags: libc::c_int) -> io::Result<OwnedFd> {
        let flags = flags | libc::O_CLOEXEC | libc::O_NOFOLLOW;
        let mode: libc::c_uint = 0o600;
        // SAFETY: `name` is a C string that outlives the call; the descriptor is ours.
        let fd = retry(|| unsafe { libc::openat(self.raw(), name.as_ptr(), flags, mode) })?;
        // SAFETY: `openat` just made this descriptor and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

impl AsFd for FileDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Dir for FileDir {
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn Disk>> {
        Ok(Arc::new(self.open_file(name, how)?))
    }

    fn subdir(&self, name: &str, create: bool) -> io::Result<Arc<dyn Dir>> {
        Ok(Arc::new(self.open_dir(name, create)?))
    }

    /// A name that is not UTF-8 comes with U+FFFD in it: it shows that something is there, and it
    /// opens nothing.
    fn list(&self) -> io::Result<Vec<String>> {
        // A description of its own: the reading position must not be shared.
        let fd = self.open_at(c".", libc::O_RDONLY | libc::O_DIRECTORY)?;
        let mut stream = DirStream::new(fd)?;
        let mut names = Vec::new();
        while let Some(name) = stream.next_name()? {
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let c = c_name(name)?;
        // SAFETY: `c` is a C string that outlives the call; the descriptor is ours.
        retry(|| unsafe { libc::unlinkat(self.raw(), c.as_ptr(), 0) }).map(drop)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let (from, to) = (c_name(from)?, c_name(to)?);
        retry(|| {
            // SAFETY: both are C strings that outlive the call; the descriptor is ours.
            unsafe { libc::renameat(self.raw(), from.as_ptr(), self.raw(), to.as_ptr()) }
        })
        .map(drop)
    }

    fn sync(&self) -> io::Result<()> {
        let _calling = calling(Call::Sync, self.raw());
        // SAFETY: takes a number only; the descriptor is ours.
        retry(|| unsafe { libc::fsync(self.raw()) }).map(drop)
    }

    fn space(&self) -> io::Result<Space> {
        // SAFETY: all zeros is a valid `statvfs`.
        let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
        // SAFETY: `stat` is writable for the call; the descriptor is ours.
        retry(|| unsafe { libc::fstatvfs(self.raw(), &raw mut stat) })?;
        let unit = stat.f_frsize;
        Ok(Space {
            total: stat.f_blocks.saturating_mul(unit),
            available: stat.f_bavail.saturating_mul(unit),
        })
    }
}

/// An open directory stream; closed on drop.
struct DirStream(*mut libc::DIR);

impl DirStream {
    fn new(fd: OwnedFd) -> io::Result<DirStream> {
        // SAFETY: the descriptor is open; on success the stream owns it.
        let stream = unsafe { libc::fdopendir(fd.as_raw_fd()) };
        if stream.is_null() {
            return Err(io::Error::last_os_error());
        }
        std::mem::forget(fd); // the stream closes it
        Ok(DirStream(stream))
    }

    fn next_name(&mut self) -> io::Result<Option<String>> {
        // SAFETY: errno is this thread's own; readdir tells an error from the end by it only.
        unsafe { *libc::__errno_location() = 0 };
        // SAFETY: the stream is open and nobody else uses it.
        let entry = unsafe { libc::readdir64(self.0) };
        if entry.is_null() {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(0) {
                Ok(None)
            } else {
                Err(error)
            };
        }
        // SAFETY: a returned entry holds a NUL-terminated name, valid until the next call.
        let name = unsafe { CStr::from_ptr((*entry).d_name.as_ptr()) };
        Ok(Some(name.to_string_lossy().into_owned()))
    }
}

impl Drop for DirStream {
    fn drop(&mut self) {
        // SAFETY: the stream is open and closed only here.
        unsafe { libc::closedir(self.0) };
    }
}

fn c_name(name: &str) -> io::Result<CString> {
    check_name(name)?;
    Ok(CString::new(name).expect("check_name refuses NUL"))
}

/// Makes missing components one by one, each durable before the next.
fn make_dirs(path: &Path) -> io::Result<()> {
    let mut missing = Vec::new();
    let mut at = path;
    while !at.as_os_str().is_empty() && !at.exists() {
        missing.push(at);
        match at.parent() {
            Some(parent) => at = parent,
            None => break,
        }
    }
    for dir in missing.into_iter().rev() {
        match std::fs::create_dir(dir) {
            Ok(()) => std::fs::set_permissions(dir, Permissions::from_mode(0o700))?,
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
        let parent = match dir.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}

fn check_private(dir: &File, shown: &str) -> Result<()> {
    let meta = dir
        .metadata()
        .context(|| format!("cannot look at directory {shown}"))?;
    let us = effective_uid();
    if meta.uid() != us {
        let text = format!(
            "directory {shown} belongs to user {}, not to user {us}",
            meta.uid()
        );
        return Err(Error::new(Kind::Permission, text));
    }
    if meta.mode() & 0o022 != 0 {
        let text = format!("directory {shown} is writable for others (chmod go-w {shown})");
        return Err(Error::new(Kind::Permission, text));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir() -> (tempfile::TempDir, FileDir) {
        let temp = tempfile::tempdir().unwrap();
        let dir = FileDir::open(temp.path()).unwrap();
        (temp, dir)
    }

    #[test]
    fn names_cannot_leave_the_directory() {
        let (temp, dir) = dir();
        for bad in ["", ".", "..", "a/b", "/etc/passwd", "a\0b"] {
            let e = dir.open(bad, Open::Create).err().unwrap();
            assert_eq!(e.kind(), ErrorKind::InvalidInput, "{bad:?}");
            assert!(dir.subdir(bad, true).is_err() && dir.remove(bad).is_err());
        }
        std::os::unix::fs::symlink("/etc", temp.path().join("l")).unwrap();
        assert!(dir.open("l", Open::Read).is_err());
        assert!(dir.subdir("l", true).is_err());
        let c = CString::new(temp.path().join("pipe").to_str().unwrap()).unwrap();
        // SAFETY: `c` is a C string.
        assert_eq!(unsafe { libc::mkfifo(c.as_ptr(), 0o600) }, 0);
        assert!(dir.open("pipe", Open::Read).is_err(), "and does not hang");
    }

    #[test]
    fn a_directory_keeps_names_and_rights() {
        let (temp, dir) = dir();
        let sub = dir.subdir("log", true).unwrap();
        dir.subdir("log", true).unwrap();
        assert!(dir.subdir("no", false).is_err());
        let a = sub.open("a", Open::Create).unwrap();
        assert_eq!(
            sub.open("a", Open::Create).err().unwrap().kind(),
            ErrorKind::AlreadyExists
        );
        assert_eq!(
            sub.open("b", Open::Write).err().unwrap().kind(),
            ErrorKind::NotFound
        );
        assert!(
            sub.open("a", Open::Read)
                .unwrap()
                .write_all_at(0, &[b"x"])
                .is_err()
        );
        sub.rename("a", "c").unwrap();
        assert_eq!(sub.list().unwrap(), ["c"]);
        assert_eq!(sub.list().unwrap(), ["c"], "each listing starts over");
        let mode = |p: &str| std::fs::metadata(temp.path().join(p)).unwrap().mode() & 0o777;
        assert_eq!((mode("log"), mode("log/c")), (0o700, 0o600));
        sub.remove("c").unwrap();
        a.write_all_at(0, &[b"still"]).unwrap();
        sub.sync().unwrap();
        assert!(sub.list().unwrap().is_empty());
        let space = sub.space().unwrap();
        assert!(space.available > 0 && space.available <= space.total);
        assert!(dir.fd_path().join("log").is_dir());
    }

    #[test]
    fn a_store_directory_is_private() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("x/y");
        assert_eq!(FileDir::open(&path).unwrap_err().kind(), Kind::NotFound);
        let dir = FileDir::create(&path).unwrap();
        assert_eq!(dir.path(), path.canonicalize().unwrap());
        FileDir::create(&path).unwrap();
        assert_eq!(
            std::fs::metadata(temp.path().join("x")).unwrap().mode() & 0o777,
            0o700
        );
        std::fs::set_permissions(&path, Permissions::from_mode(0o770)).unwrap();
        let e = FileDir::create(&path).unwrap_err();
        assert_eq!(e.kind(), Kind::Permission, "{e}");
        std::fs::write(temp.path().join("f"), "").unwrap();
        assert_eq!(
            FileDir::open(&temp.path().join("f")).unwrap_err().kind(),
            Kind::Invalid
        );
    }

    #[test]
    fn a_directory_of_somebody_else_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        if effective_uid() == 0 {
            std::os::unix::fs::chown(temp.path(), Some(12345), None).unwrap();
            let e = FileDir::open(temp.path()).unwrap_err();
            assert!(
                e.kind() == Kind::Permission && e.to_string().contains("12345"),
                "{e}"
            );
        } else {
            assert_eq!(
                FileDir::open(Path::new("/")).unwrap_err().kind(),
                Kind::Permission
            );
        }
    }
}
