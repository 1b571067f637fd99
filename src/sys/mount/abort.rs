//! Cutting a FUSE connection by the kernel's control filesystem.
//!
//! Whoever waits for a daemon that hangs cannot be killed; only this frees him. The control filesystem is
//! usually mounted at `/sys/fs/fuse/connections`. Where it is not, root gets one that is mounted nowhere
//! and goes with its descriptor.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Flags of fsopen(2) and the like; not in libc.
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;

/// Cuts a connection, so that everything waiting for it ends with an error. `false` if there is no such
/// connection, or no right to look for it.
///
/// # Errors
/// The system's error.
pub fn abort_connection(dev_minor: u32) -> io::Result<bool> {
    if super::write_setting(&format!("/sys/fs/fuse/connections/{dev_minor}/abort"), "1")? {
        return Ok(true);
    }
    let control = match control_filesystem() {
        Ok(control) => control,
        // No right, or a kernel without it.
        Err(e)
            if matches!(
                e.raw_os_error(),
                Some(libc::EPERM | libc::ENOSYS | libc::ENODEV)
            ) =>
        {
            return Ok(false);
        }
        Err(e) => return Err(e),
    };
    let name = CString::new(format!("{dev_minor}/abort")).expect("digits and letters");
    let flags = libc::O_WRONLY | libc::O_CLOEXEC | libc::O_NOFOLLOW;
    // SAFETY: `name` is a C string that outlives the call; the descriptor is ours.
    let fd = unsafe { libc::openat(control.as_raw_fd(), name.as_ptr(), flags) };
    match owned(fd.into()) {
        Ok(fd) => File::from(fd).write_all(b"1").map(|()| true),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// The control filesystem, mounted nowhere.
fn control_filesystem() -> io::Result<OwnedFd> {
    // SAFETY: the name is a C string that outlives the call.
    let context = unsafe { libc::syscall(libc::SYS_fsopen, c"fusectl".as_ptr(), FSOPEN_CLOEXEC) };
    let context = owned(context)?;
    let null = std::ptr::null::<libc::c_void>();
    // SAFETY: this command takes neither key nor value; the descriptor is ours.
    let made = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            FSCONFIG_CMD_CREATE,
            null,
            null,
            0,
        )
    };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes numbers only; the descriptor is ours.
    let mounted =
        unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0) };
    owned(mounted)
}

/// A descriptor that a system call has just answered.
fn owned(answer: libc::c_long) -> io::Result<OwnedFd> {
    match libc::c_int::try_from(answer) {
        // SAFETY: the kernel just made this descriptor and nobody else knows it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
