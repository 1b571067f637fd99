//! Mounting, unmounting and looking at mounts; nothing of the FUSE protocol.
//!
//! Promises: [`mount_fuse`] answers the connection of a mount that is there, or an error that
//! names the package or the right that is missing. [`unmount`] acts on the topmost
//! mount at a path, so a caller looks with [`mount_at`] first whether it is the one he means. The
//! source of a mount of ours is `stillframe:` and the escaped path of its store
//! ([`escape_source`]): no option separator, space or terminal escape can stand in it.
//!
//! A path is never asked of the mounted filesystem where the kernel's table of mounts knows the
//! answer: a daemon that hangs must not hang who looks.

#![allow(unsafe_code, reason = "mount(2), umount2(2), geteuid")]

mod abort;
mod fusermount;
mod table;

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::error::{Error, IoContext, Kind, Result};
pub use crate::sys::mount::abort::abort_connection;
pub use crate::sys::mount::table::{
    MountEntry, escape_source, mount_at, mount_of, mounts, unescape_source,
};
use crate::sys::process;
use crate::units::escape;

const FUSE_DEVICE: &str = "/dev/fuse";
/// How long a mount may take to answer before it counts as alive but hung.
const ANSWER_WAIT: Duration = Duration::from_millis(if cfg!(test) { 200 } else { 3000 });

/// How to unmount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmount {
    /// Refused while something below is open.
    Normal,
    /// Gone from the tree at once; what is open stays usable until it is closed.
    Lazy,
}

/// What is at a place where one wants to mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mountpoint {
    /// An empty directory.
    Ready,
    /// A mount of ours whose daemon has died.
    Stale {
        /// Its source.
        source: String,
    },
    /// A mount of ours that answers, or does not say that it cannot.
    OursLive {
        /// Its source.
        source: String,
    },
    /// A mount of somebody else.
    ForeignMount {
        /// Filesystem type.
        fstype: String,
        /// What is mounted: foreign text.
        source: String,
    },
}

/// Who keeps a mount busy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Holder {
    /// The process; `None` for a loop device or a mount below.
    pub pid: Option<u32>,
    /// Name of the process or device, or the mountpoint below: foreign text.
    pub name: String,
}

/// Mounts a FUSE filesystem: with rights of one's own, else by `fusermount3`. The mountpoint is an
/// absolute path. Others than the mounting user see it only with `allow_other`, and then the
/// kernel checks modes. The caller must serve the connection: until then whoever looks waits.
///
/// # Errors
/// `Unsupported` if the kernel has no FUSE; `Permission` without the right, naming what would
/// give it; `NotFound`, `Invalid` for the mountpoint or a source that is not escaped; `Busy`.
pub fn mount_fuse(mountpoint: &Path, source: &str, allow_other: bool) -> Result<OwnedFd> {
    check_source(source)?;
    if !mountpoint.is_absolute() {
        return Err(Error::new(
            Kind::Invalid,
            format!("{} is not absolute", shown(mountpoint)),
        ));
    }
    let device = open_device().map_err(device_error)?;
    let refused = match mount_direct(&device, mountpoint, source, allow_other) {
        Ok(()) => return Ok(device.into()),
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => e,
        Err(e) => return Err(mount_error(mountpoint, e)),
    };
    drop(device);
    match fusermount::mount(mountpoint, source, allow_other)? {
        Some(connection) => Ok(connection),
        None => {
            let text = format!(
                "cannot mount at {}: needs root, or the package fuse3 for fusermount3",
                shown(mountpoint)
            );
            Err(Error::with_source(Kind::Permission, text, refused))
        }
    }
}

/// Unmounts the topmost mount at an absolute path.
///
/// # Errors
/// `Busy` if something below is open (not when lazy); `Invalid` if nothing is mounted there;
/// `Permission`; else by the system's error.
pub fn unmount(mountpoint: &Path, mode: Unmount) -> Result<()> {
    let path = c_path(mountpoint)?;
    let flags = libc::UMOUNT_NOFOLLOW
        | match mode {
            Unmount::Normal => 0,
            Unmount::Lazy => libc::MNT_DETACH,
        };
    // SAFETY: `path` is a C string that outlives the call.
    if unsafe { libc::umount2(path.as_ptr(), flags) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    let shown = shown(mountpoint);
    match error.raw_os_error() {
        Some(libc::EPERM) => fusermount::unmount(mountpoint, mode),
        Some(libc::EBUSY) => Err(Error::new(Kind::Busy, format!("{shown} is in use"))),
        Some(libc::EINVAL) => Err(Error::new(
            Kind::Invalid,
            format!("nothing is mounted at {shown}"),
        )),
        _ => Err(Error::io(format!("cannot unmount {shown}"), error)),
    }
}

/// Looks at a place where one wants to mount.
///
/// # Errors
/// `NotFound`; `Invalid` if it is not a directory or a plain directory that is not empty;
/// `Permission`; else by the system's error.
pub fn check_mountpoint(path: &Path) -> Result<Mountpoint> {
    let name = shown(path);
    let full = resolve(path).context(|| format!("cannot use mountpoint {name}"))?;
    if let Some(entry) = mount_at(&full).context(|| "cannot read the table of mounts")? {
        let MountEntry { fstype, source, .. } = entry;
        if unescape_source(&source).is_none() || !fstype.starts_with("fuse") {
            return Ok(Mountpoint::ForeignMount { fstype, source });
        }
        return Ok(if is_stale(&full) {
            Mountpoint::Stale { source }
        } else {
            Mountpoint::OursLive { source }
        });
    }
    let refuse = |why: &str| {
        Err(Error::new(
            Kind::Invalid,
            format!("mountpoint {name} {why}"),
        ))
    };
    let meta = fs::metadata(&full).map_err(|e| match e.kind() {
        ErrorKind::NotFound => {
            Error::new(Kind::NotFound, format!("mountpoint {name} does not exist"))
        }
        _ => Error::io(format!("cannot use mountpoint {name}"), e),
    })?;
    if !meta.is_dir() {
        return refuse("is not a directory");
    }
    let mut entries = fs::read_dir(&full).context(|| format!("cannot list mountpoint {name}"))?;
    if entries.next().is_some() {
        return refuse("is not empty");
    }
    Ok(Mountpoint::Ready)
}

/// The absolute path of a mountpoint without asking what is mounted there, which might wait for
/// ever: the parent is resolved, the last component only if it is no mountpoint.
///
/// # Errors
/// The system's error.
pub fn resolve(path: &Path) -> io::Result<PathBuf> {
    let Some(name) = path.file_name() else {
        return path.canonicalize();
    };
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let full = parent.unwrap_or(Path::new(".")).canonicalize()?.join(name);
    if mount_at(&full)?.is_some() {
        return Ok(full);
    }
    match fs::symlink_metadata(&full) {
        Ok(meta) if meta.file_type().is_symlink() => full.canonicalize(),
        _ => Ok(full), // what is not there is the caller's to notice
    }
}

/// Sets the read-ahead of a mount in KiB. `false` if the system does not offer it or rights lack.
pub fn set_read_ahead(major: u32, minor: u32, kib: u32) -> bool {
    let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    write_setting(&path, &kib.to_string()).unwrap_or(false)
}

/// Who has something open below a mountpoint (absolute, resolved), as far as rights let one see:
/// processes other than this one, loop devices, mounts below. Sorted.
pub fn holders(mountpoint: &Path) -> Vec<Holder> {
    let mut found = Vec::new();
    for pid in numbers("/proc").filter(|pid| *pid != std::process::id()) {
        if holds(pid, mountpoint) {
            let name = process::process_name(pid).unwrap_or_default();
            found.push(Holder {
                pid: Some(pid),
                name,
            });
        }
    }
    for device in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let backing = fs::read(device.path().join("loop/backing_file")).unwrap_or_default();
        if is_below(&backing, mountpoint) {
            let name = device.file_name().to_string_lossy().into_owned();
            found.push(Holder {
                pid: None,
                name: format!("/dev/{name}"),
            });
        }
    }
    for entry in mounts().unwrap_or_default() {
        if entry.mountpoint != mountpoint && entry.mountpoint.starts_with(mountpoint) {
            let name = entry.mountpoint.to_string_lossy().into_owned();
            found.push(Holder { pid: None, name });
        }
    }
    found.sort();
    found
}

fn holds(pid: u32, mountpoint: &Path) -> bool {
    let below = |link: PathBuf| {
        fs::read_link(link).is_ok_and(|target| is_below(target.as_os_str().as_bytes(), mountpoint))
    };
    let base = format!("/proc/{pid}");
    if ["cwd", "root", "exe"]
        .iter()
        .any(|link| below(Path::new(&base).join(link)))
    {
        return true;
    }
    let fds = fs::read_dir(format!("{base}/fd"))
        .into_iter()
        .flatten()
        .flatten();
    if fds.into_iter().any(|fd| below(fd.path())) {
        return true;
    }
    let maps = fs::read(format!("{base}/maps")).unwrap_or_default();
    maps.split(|b| *b == b'\n').any(|line| {
        let path = line
            .iter()
            .position(|b| *b == b'/')
            .map_or(&[][..], |at| &line[at..]);
        is_below(path, mountpoint)
    })
}

fn is_below(path: &[u8], mountpoint: &Path) -> bool {
    let path = path.strip_suffix(b"\n").unwrap_or(path);
    Path::new(std::ffi::OsStr::from_bytes(path)).starts_with(mountpoint)
}

fn numbers(dir: &str) -> impl Iterator<Item = u32> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn write_setting(path: &str, value: &str) -> io::Result<bool> {
    match fs::write(path, value) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// Whether a mount says that its daemon has gone. Asked in a thread that is left behind if there
/// is no answer: a hung daemon is not a dead one.
fn is_stale(mountpoint: &Path) -> bool {
    let (answer, wait) = mpsc::channel();
    let path = mountpoint.to_owned();
    let asked = thread::Builder::new().spawn(move || {
        let error = fs::metadata(path).err().and_then(|e| e.raw_os_error());
        let _ = answer.send(error); // nobody waits any more after a timeout
    });
    let answer = asked.ok().and_then(|_| wait.recv_timeout(ANSWER_WAIT).ok());
    matches!(answer, Some(Some(libc::ENOTCONN | libc::ECONNABORTED)))
}

fn open_device() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(FUSE_DEVICE)
}

fn device_error(e: io::Error) -> Error {
    let missing = matches!(
        e.raw_os_error(),
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)
    );
    if missing {
        let text = format!("{FUSE_DEVICE}: the fuse kernel module is not loaded (modprobe fuse)");
        return Error::with_source(Kind::Unsupported, text, e);
    }
    if e.kind() == ErrorKind::PermissionDenied {
        // fusermount3 opens it with the user's rights too: no way around.
        let text =
            format!("no right to open {FUSE_DEVICE}: needs root, or chmod 666 {FUSE_DEVICE}");
        return Error::with_source(Kind::Permission, text, e);
    }
    Error::io(format!("cannot open {FUSE_DEVICE}"), e)
}

fn mount_error(mountpoint: &Path, e: io::Error) -> Error {
    let shown = shown(mountpoint);
    match e.raw_os_error() {
        Some(libc::ENODEV) => device_error(e),
        Some(libc::ENOENT) => {
            Error::new(Kind::NotFound, format!("mountpoint {shown} does not exist"))
        }
        Some(libc::ENOTDIR) => Error::new(
            Kind::Invalid,
            format!("mountpoint {shown} is not a directory"),
        ),
        _ => Error::io(format!("cannot mount at {shown}"), e),
    }
}

fn mount_direct(
    device: &File,
    mountpoint: &Path,
    source: &str,
    allow_other: bool,
) -> io::Result<()> {
    let (uid, gid) = (process::effective_uid(), process::effective_gid());
    let fd = device.as_raw_fd();
    let others = if allow_other {
        ",default_permissions,allow_other"
    } else {
        ""
    };
    let options = format!("fd={fd},rootmode=40000,user_id={uid},group_id={gid}{others}");
    let options = CString::new(options).expect("numbers and words only");
    let source = CString::new(source).expect("check_source refuses NUL");
    // By descriptor: a link that is put in the way now leads nowhere else.
    let place = hold_place(mountpoint)?;
    let path = CString::new(format!("/proc/self/fd/{}", place.as_raw_fd()))?;
    let mount = |fstype: &std::ffi::CStr| {
        // SAFETY: all are C strings that outlive the call.
        let answer = unsafe {
            libc::mount(
                source.as_ptr(),
                path.as_ptr(),
                fstype.as_ptr(),
                libc::MS_NOSUID | libc::MS_NODEV,
                options.as_ptr().cast(),
            )
        };
        if answer == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    match mount(c"fuse.stillframe") {
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => mount(c"fuse"),
        other => other,
    }
}

/// The directory at an absolute path without links, held.
fn hold_place(mountpoint: &Path) -> io::Result<File> {
    let place = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(mountpoint)?;
    let is_at = fs::read_link(format!("/proc/self/fd/{}", place.as_raw_fd()))?;
    if is_at != mountpoint {
        return Err(io::Error::other("a link was put in its way"));
    }
    Ok(place)
}

/// Refuses what could end an option or a line somewhere: see [`escape_source`].
fn check_source(source: &str) -> Result<()> {
    let plain = |b: u8| b.is_ascii_graphic() && b != b',' && b != b'\\';
    if source.is_empty() || !source.bytes().all(plain) {
        let text = format!("'{}' is not an escaped mount source", escape(source));
        return Err(Error::new(Kind::Invalid, text));
    }
    Ok(())
}

fn c_path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::new(Kind::Invalid, "a path may not hold a NUL byte"))
}

fn shown(path: &Path) -> String {
    escape(&path.to_string_lossy())
}

#[cfg(test)]
mod tests;
