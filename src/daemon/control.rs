//! The control socket: who may ask, how much, and how long.
//!
//! Promises: only the daemon's own user and root are served (checked by the kernel's word, not by
//! the file's mode alone); a client that sends nothing, too much or nonsense costs one thread for
//! at most [`PATIENCE`]; more than [`CONNECTIONS_MAX`] clients at once are turned away with `Busy`,
//! not queued; a job that panics answers an error and the daemon goes on.
//!
//! The socket lies in the store and is bound through the directory's descriptor, because a
//! socket's path ends at 107 bytes. The caller holds the store's lock, so a socket that is already
//! there is a dead one's and is removed.

use std::fs::{self, Permissions};
use std::io::{BufReader, ErrorKind};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::daemon::protocol::{self, Answer, REQUEST_MAX, Request, Response};
use crate::daemon::store::SOCKET;
use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::file::FileDir;
use crate::sys::process;

/// Clients served at once.
pub const CONNECTIONS_MAX: usize = 32;
/// How long a client may take to send its request, and to take each line of the answer.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Does one job; the second argument streams a line for people.
pub type Handler = dyn Fn(Request, &mut dyn FnMut(&str)) -> Result<Answer> + Send + Sync;

/// A listening control socket.
pub struct Control {
    dir: Arc<FileDir>,
    shared: Arc<Shared>,
}

struct Shared {
    handler: Box<Handler>,
    serving: AtomicUsize,
    stopped: AtomicBool,
}

/// Binds the socket and serves it from a thread of its own.
///
/// # Errors
/// `Io`, `Permission`, `NoSpace`.
pub fn start(dir: &Arc<FileDir>, handler: Box<Handler>) -> Result<Control> {
    let path = dir.fd_path().join(SOCKET);
    let context = || "cannot make the control socket in the store";
    match fs::remove_file(&path) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(Error::io(context(), e)),
        _ => {}
    }
    let listener = UnixListener::bind(&path).context(context)?;
    fs::set_permissions(&path, Permissions::from_mode(0o600)).context(context)?;
    let shared = Arc::new(Shared {
        handler,
        serving: AtomicUsize::new(0),
        stopped: AtomicBool::new(false),
    });
    let accepting = shared.clone();
    thread::Builder::new()
        .name("control".into())
        .spawn(move || accept_loop(&listener, &accepting))
        .context(context)?;
    Ok(Control {
        dir: dir.clone(),
        shared,
    })
}

impl Control {
    /// Takes the socket away, so that nobody new finds it. Call it while the store's lock is held:
    /// afterwards the name may be a successor's.
    pub fn close(&self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        let path = self.dir.fd_path().join(SOCKET);
        // Wakes the accepting thread, which then sees that it is stopped and lets go.
        drop(UnixStream::connect(&path));
        if let Err(e) = fs::remove_file(&path) {
            tracing::warn!("cannot remove the control socket: {e}");
        }
    }

    /// Waits up to `limit` for the clients being served. Returns whether all were.
    pub fn drain(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while self.shared.serving.load(Ordering::SeqCst) > 0 {
            if Instant::now() >= end {
                return false;
            }
            thread::sleep(Duration::from_millis(2));
        }
        true
    }
}

fn accept_loop(listener: &UnixListener, shared: &Arc<Shared>) {
    loop {
        let accepted = listener.accept();
        if shared.stopped.load(Ordering::SeqCst) {
            return;
        }
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Out of descriptors, most likely: going round at full speed would not help.
                tracing::warn!("cannot accept a control connection: {e}");
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let slot = Slot::take(shared);
        let served = thread::Builder::new()
            .name("control-job".into())
            .spawn(move || {
                if let Err(e) = serve(&stream, &slot) {
                    tracing::debug!("control connection ended: {}", e.chain());
                }
            });
        if let Err(e) = served {
            tracing::warn!("cannot serve a control connection: {e}");
        }
    }
}

/// One served client; counted while it lives.
struct Slot {
    shared: Arc<Shared>,
    number: usize,
}

impl Slot {
    fn take(shared: &Arc<Shared>) -> Slot {
        let number = shared.serving.fetch_add(1, Ordering::SeqCst);
        Slot {
            shared: shared.clone(),
            number,
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shared.serving.fetch_sub(1, Ordering::SeqCst);
    }
}

fn serve(mut stream: &UnixStream, slot: &Slot) -> Result<()> {
    let context = || "cannot set up a control connection";
    stream.set_read_timeout(Some(PATIENCE)).context(context)?;
    stream.set_write_timeout(Some(PATIENCE)).context(context)?;
    let answer = admit(stream, slot)
        .and_then(|()| protocol::receive(&mut BufReader::new(stream), REQUEST_MAX))
        .and_then(|request: Option<Request>| match request {
            Some(request) => run(stream, slot, request).map(Some),
            None => Ok(None),
        });
    let response = match answer {
        Ok(Some(answer)) => Response::Ok(answer),
        Ok(None) => return Ok(()),
        Err(e) => Response::failure(&e),
    };
    protocol::send(&mut stream, &response).context(|| "cannot answer")
}

fn admit(stream: &UnixStream, slot: &Slot) -> Result<()> {
    let uid = process::peer_uid(stream)?;
    if uid != 0 && uid != process::effective_uid() {
        return Err(Error::new(
            Kind::Permission,
            "this store is served by another user; only that user and root may ask",
        ));
    }
    if slot.number >= CONNECTIONS_MAX {
        return Err(Error::new(
            Kind::Busy,
            format!("the daemon already serves {CONNECTIONS_MAX} clients; try again"),
        ));
    }
    Ok(())
}

fn run(mut stream: &UnixStream, slot: &Slot, request: Request) -> Result<Answer> {
    // A client that went away must not stop a job half-way: what cannot be told is dropped.
    let mut progress = |text: &str| {
        let _ = protocol::send(&mut stream, &Response::Progress(text.to_owned()));
    };
    catch_unwind(AssertUnwindSafe(|| {
        (slot.shared.handler)(request, &mut progress)
    }))
    .unwrap_or_else(|_| {
        Err(Error::new(
            Kind::Failed,
            "the job failed inside; see the log",
        ))
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::mpsc;

    use super::*;
    use crate::daemon::client;

    fn started(
        handler: impl Fn(Request, &mut dyn FnMut(&str)) -> Result<Answer> + Send + Sync + 'static,
    ) -> (tempfile::TempDir, Control) {
        let top = tempfile::tempdir().unwrap();
        // Deeper than a socket's path may be long.
        let deep = top.path().join("d".repeat(120));
        let dir = Arc::new(FileDir::create(&deep).unwrap());
        let control = start(&dir, Box::new(handler)).unwrap();
        (top, control)
    }

    fn ask(control: &Control, request: &Request) -> (Result<Answer>, Vec<String>) {
        let mut lines = Vec::new();
        let mut connection = client::connect(control.dir.path())
            .unwrap()
            .expect("listens");
        (
            connection.call(request, &mut |line| lines.push(line.to_owned())),
            lines,
        )
    }

    #[test]
    fn answers_errors_progress_and_panics_reach_the_client() {
        let (_top, control) = started(|request, progress| match request {
            Request::Status {} => {
                progress("half");
                progress("done");
                Ok(Answer::Done)
            }
            Request::VolumeAccept { name } => Err(Error::new(Kind::NotFound, name)),
            _ => panic!("on purpose"),
        });
        let (answer, lines) = ask(&control, &Request::Status {});
        assert!(matches!(answer, Ok(Answer::Done)));
        assert_eq!(lines, ["half", "done"]);
        let (answer, _) = ask(&control, &Request::VolumeAccept { name: "vm".into() });
        let e = answer.unwrap_err();
        assert_eq!((e.kind(), e.to_string().as_str()), (Kind::NotFound, "vm"));
        let (answer, _) = ask(&control, &Request::VolumeRemove { name: "vm".into() });
        assert_eq!(answer.unwrap_err().kind(), Kind::Failed);
        assert!(
            ask(&control, &Request::Status {}).0.is_ok(),
            "the daemon goes on"
        );
        control.close();
        assert!(control.drain(Duration::from_secs(5)));
        assert!(client::connect(control.dir.path()).unwrap().is_none());
    }

    /// What a job streams does not lengthen the time that its client has for it.
    #[test]
    fn a_limit_is_one_for_the_whole_answer() {
        let over = Arc::new(AtomicBool::new(false));
        let stop = over.clone();
        let (_top, control) = started(move |_, progress| {
            while !stop.load(Ordering::SeqCst) {
                progress("goes on");
                thread::sleep(Duration::from_millis(5));
            }
            Ok(Answer::Done)
        });
        let mut connection = client::connect(control.dir.path()).unwrap().unwrap();
        connection.limit(Duration::from_millis(100));
        let mut heard = 0;
        let answer = connection.call(&Request::Status {}, &mut |_| heard += 1);
        assert_eq!(answer.unwrap_err().kind(), Kind::Io);
        assert!(heard > 0, "nothing was streamed");
        over.store(true, Ordering::SeqCst);
        control.close();
        assert!(control.drain(Duration::from_secs(60)));
    }

    #[test]
    fn the_socket_is_private_and_a_dead_one_is_replaced() {
        let (_top, control) = started(|_, _| Ok(Answer::Done));
        let path = control.dir.path().join(SOCKET);
        let listed = fs::metadata(control.dir.fd_path().join(SOCKET)).unwrap();
        assert_eq!(listed.permissions().mode() & 0o777, 0o600);
        assert!(path.as_os_str().len() > 107);
        let again = start(&control.dir, Box::new(|_, _| Ok(Answer::Done))).unwrap();
        assert!(ask(&again, &Request::Status {}).0.is_ok());
    }

    /// A flood of nonsense is answered and forgotten, and never collected in memory.
    #[test]
    fn nonsense_is_refused_and_bounded() {
        let (_top, control) = started(|_, _| Ok(Answer::Done));
        let path = control.dir.fd_path().join(SOCKET);
        let mut stream = UnixStream::connect(&path).unwrap();
        let flood = vec![b'{'; 2 * REQUEST_MAX as usize];
        // The daemon stops reading at its limit; the rest may break the pipe.
        let _ = stream.write_all(&flood);
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(b"hello\n").unwrap();
        let answer = protocol::receive(&mut BufReader::new(&stream), 4096).unwrap();
        assert!(
            matches!(
                answer,
                Some(Response::Error {
                    kind: Kind::Invalid,
                    ..
                })
            ),
            "{answer:?}"
        );
        assert!(ask(&control, &Request::Status {}).0.is_ok());
    }

    /// Fills every slot with clients whose job does not end; the next one is turned away.
    #[test]
    fn too_many_clients_are_turned_away() {
        let (release, wait) = mpsc::channel::<()>();
        let wait = std::sync::Mutex::new(wait);
        let (_top, control) = started(move |_, progress| {
            progress("in");
            let _ = wait.lock().unwrap().recv();
            Ok(Answer::Done)
        });
        let path = control.dir.fd_path().join(SOCKET);
        let mut held = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            let mut stream = UnixStream::connect(&path).unwrap();
            protocol::send(&mut stream, &Request::Status {}).unwrap();
            let mut reader = BufReader::new(stream);
            let first: Option<Response> = protocol::receive(&mut reader, 4096).unwrap();
            assert!(matches!(first, Some(Response::Progress(_))));
            held.push(reader);
        }
        assert_eq!(
            ask(&control, &Request::Status {}).0.unwrap_err().kind(),
            Kind::Busy
        );
        drop(release);
        for mut reader in held {
            let last: Option<Response> = protocol::receive(&mut reader, 4096).unwrap();
            assert!(matches!(last, Some(Response::Ok(Answer::Done))));
        }
    }
}
