//! Processes: starting the daemon, telling that it is ready, who a process or a peer is.
//!
//! The daemon is this same program started anew, not a fork that goes on: no thread or lock is
//! lost on the way. It gets a session of its own, null stdio, `/` as directory, umask 077, no
//! descriptor of the caller, and one pipe on which it says, once, that it serves or why not.

#![allow(unsafe_code, reason = "fork hooks, prctl, credentials")]

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, IoContext, Kind, Result};

use crate::sys::planted::{Bug, planted};

/// Names the descriptor of the ready pipe and the process that reads it: `FD:PID`.
const READY_VAR: &str = "STILLFRAME_READY_FD";
/// The longest ready line in bytes; bounds what a broken daemon can make its starter hold.
const READY_MAX: u64 = 64 << 10;

/// The starter's end of the ready pipe.
#[derive(Debug)]
pub struct ReadyReader(File);

impl ReadyReader {
    /// Waits for the daemon's line, without its newline; `None` if it ended without one.
    ///
    /// # Errors
    /// The system's error; `InvalidData` for a line that is not UTF-8.
    pub fn receive(self) -> io::Result<Option<String>> {
        let mut from = self.0.take(READY_MAX);
        let mut buf = [0; 512];
        let mut bytes = Vec::new();
        while !bytes.contains(&b'\n') {
            match from.read(&mut buf) {
                Ok(0) => return Ok(None),
                Ok(len) => bytes.extend_from_slice(&buf[..len]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        let line = bytes.split(|b| *b == b'\n').next().unwrap_or_default();
        let text = std::str::from_utf8(line).map_err(|_| io::ErrorKind::InvalidData)?;
        Ok(Some(text.to_owned()))
    }
}

/// The daemon's end of the ready pipe.
#[derive(Debug)]
pub struct ReadyWriter(File);

impl ReadyWriter {
    /// The pipe this process was started with by [`spawn_daemon`], once; `None` if it was not.
    pub fn from_env() -> Option<ReadyWriter> {
        static TAKEN: AtomicBool = AtomicBool::new(false);
        let value = std::env::var(READY_VAR).ok()?;
        let (fd, parent) = value.split_once(':')?;
        let (fd, parent) = (fd.parse::<RawFd>().ok()?, parent.parse::<u32>().ok()?);
        // A hook started by a daemon inherits the variable but neither pipe nor parent.
        if fd < 3 || std::os::unix::process::parent_id() != parent {
            return None;
        }
        if TAKEN.swap(true, Ordering::SeqCst) {
            return None;
        }
        // SAFETY: fcntl takes numbers only and fails on a descriptor that is not open.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return None;
        }
        // SAFETY: it is open, our parent gave it to us by name, and TAKEN lets one owner exist.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let is_pipe = file.metadata().is_ok_and(|meta| meta.file_type().is_fifo());
        is_pipe.then_some(ReadyWriter(file))
    }

    /// Says the one line (JSON; a newline is added) and closes the pipe.
    ///
    /// # Errors
    /// `InvalidInput` if the line holds a newline or is too long; `BrokenPipe` if the starter has
    /// gone; else the system's error.
    pub fn send(mut self, line: &str) -> io::Result<()> {
        if line.contains('\n') || line.len() as u64 >= READY_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.0.write_all(format!("{line}\n").as_bytes())
    }
}

fn pipe() -> io::Result<(ReadyReader, ReadyWriter)> {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for the two descriptors.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both were just made and nobody else knows them.
    let [reader, writer] = fds.map(|fd| File::from(unsafe { OwnedFd::from_raw_fd(fd) }));
    Ok((ReadyReader(reader), ReadyWriter(writer)))
}

/// Starts this program again as a daemon with `args`. Paths in them must be absolute: the daemon
/// runs in `/`. The child is to be kept until the reader has answered, then may be dropped (it
/// lives on).
///
/// # Errors
/// By the system's error.
pub fn spawn_daemon(args: &[OsString]) -> Result<(Child, ReadyReader)> {
    let program = std::env::current_exe().context(|| "cannot find this program to start it")?;
    let mut command = Command::new(program);
    command.args(args);
    spawn_detached(command)
}

fn spawn_detached(mut command: Command) -> Result<(Child, ReadyReader)> {
    let (reader, writer) = pipe().context(|| "cannot make a pipe for the daemon")?;
    let fd = writer.0.as_raw_fd();
    command
        .env(READY_VAR, format!("{fd}:{}", std::process::id()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/");
    // SAFETY: the hook calls only functions that are safe between fork and exec; it neither
    // allocates nor locks.
    unsafe { command.pre_exec(move || detach(fd)) };
    let child = command.spawn().context(|| "cannot start the daemon")?;
    Ok((child, reader)) // our copy of the writer closes here: the daemon's death is an end of file
}

/// Runs in the child, between fork and exec.
fn detach(ready: RawFd) -> io::Result<()> {
    // SAFETY: these take numbers only. Closing at exec what the caller's shell left open matters:
    // a lock or pipe of its script would live as long as the daemon. Old kernels cannot; so be it.
    let kept = unsafe {
        libc::setsid();
        libc::umask(0o077);
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        );
        libc::fcntl(ready, libc::F_SETFD, 0)
    };
    if kept < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Makes what this process creates private to its user.
pub fn private_umask() {
    // SAFETY: takes a number only.
    unsafe { libc::umask(0o077) };
}

/// Keeps freed memory in few heaps. By default glibc makes one for each of many threads, and what one
/// thread frees no other reuses; that was a third of a busy daemon's memory. No promise elsewhere.
pub fn keep_few_heaps() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: takes numbers only; a value it does not like is refused and changes nothing.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1)
    };
}

/// Tells the kernel that this process serves a disk, so that memory pressure does not make it wait
/// for itself. Whether the rights sufficed.
pub fn set_io_flusher() -> bool {
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    let (on, unused): (libc::c_ulong, libc::c_ulong) = (1, 0);
    if planted(Bug::NoIoFlusher) {
        return true;
    }
    // SAFETY: takes numbers only.
    unsafe { libc::prctl(PR_SET_IO_FLUSHER, on, unused, unused, unused) == 0 }
}

/// Ends this process as a kill from outside would.
#[cfg(feature = "planted")]
pub fn kill_self() -> ! {
    loop {
        // SAFETY: takes numbers only.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
}

/// The user whose rights this process has.
pub fn effective_uid() -> u32 {
    // SAFETY: takes and touches nothing.
    unsafe { libc::geteuid() }
}

/// The group whose rights this process has.
pub fn effective_gid() -> u32 {
    // SAFETY: takes and touches nothing.
    unsafe { libc::getegid() }
}

/// The user at the other end of a socket when it connected.
///
/// # Errors
/// The system's error.
pub fn peer_uid(stream: &UnixStream) -> Result<u32> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `peer` is writable for `len` bytes during the call; the descriptor is open.
    let answer = unsafe {
        let fd = stream.as_raw_fd();
        let out = (&raw mut peer).cast();
        libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, out, &raw mut len)
    };
    if answer < 0 {
        return Err(Error::io(
            "cannot ask who is at the other end",
            io::Error::last_os_error(),
        ));
    }
    Ok(peer.uid)
}

/// Tells systemd a state (`READY=1`). Whether anybody listens.
///
/// # Errors
/// `Invalid` for a `NOTIFY_SOCKET` that is no address; else by the system's error.
pub fn notify_systemd(state: &str) -> Result<bool> {
    match std::env::var_os("NOTIFY_SOCKET") {
        Some(address) if !address.is_empty() => notify(&address, state).map(|()| true),
        _ => Ok(false),
    }
}

fn notify(address: &std::ffi::OsStr, state: &str) -> Result<()> {
    let bytes = address.as_encoded_bytes();
    let parsed = match bytes {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        [b'/', ..] => SocketAddr::from_pathname(address),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    };
    let to = parsed
        .map_err(|e| Error::with_source(Kind::Invalid, "NOTIFY_SOCKET is no socket address", e))?;
    let send = || UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &to);
    send()
        .map(drop)
        .context(|| "cannot tell systemd the state of the service")
}

/// Raises the limit of open descriptors as far as this process may. A store with many clones needs one
/// for each layer in use.
pub fn raise_descriptor_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is valid and writable for both calls.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

/// Ends this process at once: nothing is flushed or cleaned up, as in a kill.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: it does not return.
    unsafe { libc::_exit(code) }
}

/// Whether a process of this number exists, a zombie included.
pub fn pid_alive(pid: u32) -> bool {
    let Ok(pid) = libc::pid_t::try_from(pid) else {
        return false;
    };
    if pid == 0 {
        return false; // kill(0) would speak of our own group
    }
    // SAFETY: signal 0 only asks.
    let answer = unsafe { libc::kill(pid, 0) };
    answer == 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EPERM)
}

/// The name of a process, at most 15 bytes, chosen by itself: foreign text.
pub fn process_name(pid: u32) -> Option<String> {
    let name = std::fs::read(format!("/proc/{pid}/comm")).ok()?;
    Some(String::from_utf8_lossy(name.strip_suffix(b"\n").unwrap_or(&name)).into_owned())
}

/// When a process started, in clock ticks since boot: with the number, it names one process.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    parse_start_time(&String::from_utf8_lossy(&stat))
}

/// Field 22; the name before it may hold spaces and parentheses.
fn parse_start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?
        .1
        .split_ascii_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::eventually;
    use std::os::unix::net::UnixListener;

    /// Scripts write through /proc: dash takes `>&12` for an error, and how high a descriptor's number
    /// gets depends on the tests that run beside.
    fn shell(script: &str) -> (Child, ReadyReader) {
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(script);
        spawn_detached(command).unwrap()
    }

    #[test]
    fn a_daemon_says_one_line_and_is_on_its_own() {
        let report = "fd=${STILLFRAME_READY_FD%%:*}; \
            set -- $(cat /proc/$$/stat); \
            echo $$ sid=$6 $(pwd) $(umask) $(readlink /proc/$$/fd/0) \
            parent=${STILLFRAME_READY_FD##*:} >/proc/$$/fd/$fd; echo more";
        let (mut child, reader) = shell(report);
        let line = reader.receive().unwrap().unwrap();
        let pid = child.id();
        let us = std::process::id();
        assert_eq!(
            line,
            format!("{pid} sid={pid} / 0077 /dev/null parent={us}")
        );
        child.wait().unwrap();
    }

    #[test]
    fn a_daemon_that_dies_silently_is_noticed() {
        let (mut child, reader) = shell("exit 3");
        assert_eq!(reader.receive().unwrap(), None);
        assert_eq!(child.wait().unwrap().code(), Some(3));
        let (mut child, reader) = shell("printf half >/proc/$$/fd/${STILLFRAME_READY_FD%%:*}");
        assert_eq!(reader.receive().unwrap(), None);
        child.wait().unwrap();
    }

    #[test]
    fn a_daemon_inherits_no_descriptor() {
        let (leak, _other) = pipe().unwrap();
        let fd = leak.0.as_raw_fd();
        // SAFETY: takes numbers only.
        assert_eq!(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }, 0);
        let script = format!(
            "test -e /proc/$$/fd/{fd} && a=leaked || a=closed; \
             echo $a >/proc/$$/fd/${{STILLFRAME_READY_FD%%:*}}"
        );
        let (mut child, reader) = shell(&script);
        assert_eq!(reader.receive().unwrap().unwrap(), "closed");
        child.wait().unwrap();
    }

    #[test]
    fn a_ready_line_arrives_whole() {
        let (reader, writer) = pipe().unwrap();
        let line = "x".repeat(3000);
        writer.send(&line).unwrap();
        assert_eq!(reader.receive().unwrap(), Some(line));
        let (reader, writer) = pipe().unwrap();
        assert!(writer.send("two\nlines").is_err());
        assert_eq!(reader.receive().unwrap(), None);
        assert!(
            ReadyWriter::from_env().is_none(),
            "the tests were not started by spawn_daemon"
        );
    }

    #[test]
    fn processes_are_named() {
        let us = std::process::id();
        assert!(pid_alive(us) && !pid_alive(0) && !pid_alive(u32::MAX));
        let mut child = Command::new("sleep").arg("30").spawn().unwrap();
        let pid = child.id();
        assert!(eventually(|| process_name(pid).as_deref() == Some("sleep")));
        assert!(start_time(pid).unwrap() >= start_time(us).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!pid_alive(pid));
        assert_eq!((process_name(pid), start_time(pid)), (None, None));
        let stat = "7 (a) b) S 1 7 7 0 -1 4 5 6 7 8 9 10 11 12 20 0 1 0 4242 99 1";
        assert_eq!(parse_start_time(stat), Some(4242));
    }

    #[test]
    fn a_peer_is_known() {
        let (a, _b) = UnixStream::pair().unwrap();
        assert_eq!(peer_uid(&a).unwrap(), effective_uid());
    }

    #[test]
    fn systemd_is_told_by_path_and_by_abstract_name() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("n");
        let by_path = UnixDatagram::bind(&path).unwrap();
        let name = format!("stillframe-test-{}", std::process::id());
        let to = SocketAddr::from_abstract_name(&name).unwrap();
        let by_name = UnixDatagram::bind_addr(&to).unwrap();
        notify(path.as_os_str(), "READY=1").unwrap();
        notify(format!("@{name}").as_ref(), "STOPPING=1").unwrap();
        let mut buf = [0; 64];
        let len = by_path.recv(&mut buf).unwrap();
        assert_eq!(&buf[..len], b"READY=1");
        let len = by_name.recv(&mut buf).unwrap();
        assert_eq!(&buf[..len], b"STOPPING=1");
        assert_eq!(
            notify("vsock:1:2".as_ref(), "x").unwrap_err().kind(),
            Kind::Invalid
        );
        assert!(notify(temp.path().join("none").as_os_str(), "x").is_err());
    }

    #[test]
    fn a_socket_in_a_deep_directory_binds_through_its_descriptor() {
        let temp = tempfile::tempdir().unwrap();
        let deep = temp.path().join("d".repeat(100)).join("e".repeat(100));
        let dir = crate::sys::file::FileDir::create(&deep).unwrap();
        let listener = UnixListener::bind(dir.fd_path().join("control.sock")).unwrap();
        UnixStream::connect(dir.fd_path().join("control.sock")).unwrap();
        listener.accept().unwrap();
        assert!(deep.join("control.sock").exists());
    }
}
