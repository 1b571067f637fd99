//! The command line's side of the control socket.
//!
//! Promises: "no daemon" (nobody listens) is told from "the daemon failed"; a daemon that goes away
//! in the middle of a job is an error, never success; [`wait_for_end`] tells the process it waits
//! for from a later one with the same number.

use std::fs::{self, File};
use std::io::{BufReader, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::daemon::protocol::{self, Answer, RESPONSE_MAX, Request, Response};
use crate::daemon::status::shown;
use crate::daemon::store::SOCKET;
use crate::error::{Error, IoContext, Kind, Result};

/// A connection to a daemon.
pub struct Connection {
    stream: BufReader<UnixStream>,
    until: Option<Instant>,
}

/// Connects to the daemon of a store; `None` if none listens.
///
/// # Errors
/// `Permission`, `Io`.
pub fn connect(store: &Path) -> Result<Option<Connection>> {
    let at = shown(store);
    let dir = match File::open(store) {
        Ok(dir) => dir,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(e) => return Err(Error::io(format!("cannot open store {at}"), e)),
    };
    // A socket's path ends at 107 bytes; the descriptor's path is short and means this directory.
    let path = PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()));
    match UnixStream::connect(&path) {
        Ok(stream) => Ok(Some(Connection {
            stream: BufReader::new(stream),
            until: None,
        })),
        Err(e)
            if matches!(
                e.kind(),
                ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(e) => Err(Error::io(
            format!("cannot reach the daemon of store {at}"),
            e,
        )),
    }
}

impl Connection {
    /// Bounds how long the daemon may take to answer, from now on and however much it streams meanwhile.
    pub fn limit(&mut self, limit: Duration) {
        self.until = Instant::now().checked_add(limit);
    }

    /// Has the next read end when the time is over.
    fn wait_no_longer(&self) -> Result<()> {
        let Some(until) = self.until else {
            return Ok(());
        };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let why = "the daemon has not answered in time";
            return Err(Error::new(Kind::Io, why));
        }
        let set = self.stream.get_ref().set_read_timeout(Some(left));
        set.context(|| "cannot set a time limit")
    }

    /// Has one job done; `progress` is called for each line the daemon streams meanwhile.
    ///
    /// # Errors
    /// The daemon's, by kind; `Io` if it went away before it answered.
    pub fn call(&mut self, request: &Request, progress: &mut dyn FnMut(&str)) -> Result<Answer> {
        // A daemon that refuses us may have answered and hung up before it was asked.
        let asked = protocol::send(self.stream.get_mut(), request);
        loop {
            self.wait_no_longer()?;
            let heard = match (protocol::receive(&mut self.stream, RESPONSE_MAX), &asked) {
                (Ok(Some(response)), _) => Some(response),
                (_, Err(e)) => {
                    let text = format!("cannot ask the daemon: {e}");
                    return Err(Error::new(Kind::Io, text));
                }
                (other, Ok(())) => other?,
            };
            match heard {
                Some(Response::Progress(text)) => progress(&text),
                Some(Response::Ok(answer)) => return Ok(answer),
                Some(Response::Error { kind, message }) => return Err(Error::new(kind, message)),
                None => {
                    return Err(Error::new(
                        Kind::Io,
                        "the daemon went away before it answered; see its log",
                    ));
                }
            }
        }
    }
}

/// A process, told from a later one with the same number by its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessMark {
    pid: u32,
    started: u64,
}

/// Marks a running process; `None` if it has ended. A zombie has, unless threads of it still run
/// and hold its files: a process's first thread may end before the others.
pub fn mark(pid: u32) -> Option<ProcessMark> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything; the fields after the last one are plain.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    let started = fields.nth(18)?.parse().ok()?;
    let over = matches!(state, "Z" | "X")
        && fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count) <= 1;
    (!over).then_some(ProcessMark { pid, started })
}

/// Whether a marked process still runs.
pub fn still_runs(process: ProcessMark) -> bool {
    mark(process.pid) == Some(process)
}

/// Waits until a process has ended; `false` if it still runs after `limit`.
pub fn wait_for_end(process: ProcessMark, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    while mark(process.pid) == Some(process) {
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_listens_is_not_an_error() {
        let top = tempfile::tempdir().unwrap();
        assert!(connect(top.path()).unwrap().is_none());
        assert!(connect(&top.path().join("absent")).unwrap().is_none());
        fs::write(top.path().join("file"), "").unwrap();
        assert!(connect(&top.path().join("file")).unwrap().is_none());
        // A socket nobody listens on any more: what a killed daemon leaves.
        drop(std::os::unix::net::UnixListener::bind(top.path().join(SOCKET)).unwrap());
        assert!(connect(top.path()).unwrap().is_none());
    }

    #[test]
    fn a_zombie_has_ended_and_a_number_is_not_a_process() {
        let mut child = std::process::Command::new("sleep")
            .arg("30")
            .spawn()
            .unwrap();
        let running = mark(child.id()).unwrap();
        assert!(!wait_for_end(running, Duration::from_millis(20)));
        child.kill().unwrap();
        // Not reaped yet.
        assert!(wait_for_end(running, Duration::from_secs(10)));
        child.wait().unwrap();
        let later = ProcessMark {
            pid: std::process::id(),
            started: 0,
        };
        assert!(wait_for_end(later, Duration::ZERO));
    }
}
