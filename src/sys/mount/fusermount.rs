//! Mounting and unmounting through the set-user-id program `fusermount3` (or `fusermount`).
//!
//! Protocol: the program finds one end of a stream socket under the number in `_FUSE_COMMFD` and
//! sends the connection's descriptor over it, with one byte, once it has mounted. Its words on
//! standard error are foreign text; they are shown escaped, on one line.

#![allow(unsafe_code, reason = "descriptor passing")]

use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::mount::{Unmount, shown};
use crate::units::escape;

const PROGRAMS: [&str; 2] = ["fusermount3", "fusermount"];
const COMM_VAR: &str = "_FUSE_COMMFD";
/// Words of the program that are shown, in bytes.
const WORDS_MAX: usize = 400;

/// Mounts; `None` if no such program is installed.
pub(super) fn mount(mountpoint: &Path, source: &str, allow_other: bool) -> Result<Option<OwnedFd>> {
    let others = if allow_other {
        ",default_permissions,allow_other"
    } else {
        ""
    };
    let options = format!("fsname={source},subtype=stillframe,nosuid,nodev{others}");
    let args = [
        "-o".into(),
        options.into(),
        "--".into(),
        mountpoint.as_os_str().to_owned(),
    ];
    let failed = || format!("cannot mount at {}", shown(mountpoint));
    let (ours, theirs) = UnixStream::pair().context(failed)?;
    let given = theirs.as_raw_fd();
    let Some(output) = run(&args, Some(given)).context(failed)? else {
        return Ok(None);
    };
    drop(theirs); // so that receiving ends when the program sent nothing
    let received = receive_fd(&ours).context(failed)?;
    match received {
        Some(connection) if output.status.success() => Ok(Some(connection)),
        _ => Err(Error::new(
            Kind::Permission,
            format!(
                "{}: {}",
                failed(),
                words(&output, "fusermount3 gave no connection")
            ),
        )),
    }
}

/// Unmounts.
pub(super) fn unmount(mountpoint: &Path, mode: Unmount) -> Result<()> {
    let mut args: Vec<OsString> = vec!["-u".into()];
    if mode == Unmount::Lazy {
        args.push("-z".into());
    }
    args.extend(["--".into(), mountpoint.as_os_str().to_owned()]);
    let failed = || format!("cannot unmount {}", shown(mountpoint));
    let Some(output) = run(&args, None).context(failed)? else {
        let text = format!(
            "{}: needs root or the package fuse3 for fusermount3",
            failed()
        );
        return Err(Error::new(Kind::Permission, text));
    };
    if output.status.success() {
        return Ok(());
    }
    let said = words(&output, "fusermount3 did not say why");
    // All it tells about the reason is its text, in the C locale.
    if said.contains("busy") {
        return Err(Error::new(
            Kind::Busy,
            format!("{} is in use", shown(mountpoint)),
        ));
    }
    Err(Error::new(
        Kind::Permission,
        format!("{}: {said}", failed()),
    ))
}

/// Runs the first of the programs that exists, to its end.
fn run(args: &[OsString], socket: Option<RawFd>) -> io::Result<Option<Output>> {
    for program in PROGRAMS {
        let mut command = Command::new(program);
        command
            .args(args)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command.stderr(Stdio::piped());
        if let Some(fd) = socket {
            command.env(COMM_VAR, fd.to_string());
            let keep = move || {
                // SAFETY: takes numbers only; the descriptor is open in the child.
                let kept = unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
                if kept < 0 {
                    Err(io::Error::last_os_error())
                } else {
                    Ok(())
                }
            };
            // SAFETY: the hook makes one system call; it neither allocates nor locks.
            unsafe { command.pre_exec(keep) };
        }
        match command.output() {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            other => return other.map(Some),
        }
    }
    Ok(None)
}

fn words(output: &Output, silent: &str) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    let line = said.lines().map(str::trim).filter(|line| !line.is_empty());
    let mut text = escape(&line.collect::<Vec<_>>().join("; "));
    text.truncate(WORDS_MAX); // escaped text is ASCII: any place is a boundary
    if text.is_empty() {
        silent.to_owned()
    } else {
        text
    }
}

/// Receives one descriptor; `None` if the other end closed without sending one.
fn receive_fd(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut byte = 0u8;
    let mut part = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    // Aligned and large enough for one header with one descriptor (24 bytes).
    let mut control = [0u64; 8];
    // SAFETY: all zeros is a valid `msghdr`.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    loop {
        // SAFETY: `message` points at `part` and `control`, writable for the call.
        let got =
            unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
        if got >= 0 {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
    // SAFETY: the kernel filled `message`; the macro checks that a whole header is there.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    if header.is_null() {
        return Ok(None);
    }
    // SAFETY: not null, so it points at a header inside `control`.
    let head = unsafe { &*header };
    // SAFETY: computes a number only.
    let wanted = unsafe { libc::CMSG_LEN(size_of::<RawFd>() as libc::c_uint) } as usize;
    if head.cmsg_level != libc::SOL_SOCKET
        || head.cmsg_type != libc::SCM_RIGHTS
        || head.cmsg_len != wanted
    {
        return Ok(None);
    }
    // SAFETY: the header says that one descriptor follows it.
    let fd = unsafe { libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned() };
    // SAFETY: the kernel just made this descriptor for us.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_socket_brings_no_descriptor() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        io::Write::write_all(&mut &theirs, b"x").unwrap();
        assert!(receive_fd(&ours).unwrap().is_none(), "a byte alone");
        drop(theirs);
        assert!(receive_fd(&ours).unwrap().is_none(), "the end");
    }

    #[test]
    fn words_of_the_program_are_one_safe_line() {
        let output = |text: &[u8]| Output {
            status: Default::default(),
            stdout: Vec::new(),
            stderr: text.to_vec(),
        };
        assert_eq!(words(&output(b" a\n\n\x1b[31mb\n"), "-"), "a; \\u{1b}[31mb");
        assert_eq!(words(&output(b"\n"), "silent"), "silent");
        assert_eq!(words(&output(&[b'x'; 9999]), "-").len(), WORDS_MAX);
    }
}
