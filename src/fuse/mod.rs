//! The FUSE adapter: serves a [`Tree`] over a mounted `/dev/fuse` descriptor.
//!
//! Mounting and unmounting are not done here (`sys::mount`): this layer is given a descriptor that
//! is mounted already and ends when the kernel says so. It translates (`wire`), decides what may
//! wait where (`adapter`, `pool`), and turns errors into errno in one place (`errno`).
//!
//! Promises:
//! - F1: every request is answered exactly once, also by a handler that panics (EIO).
//! - F2: an answer is only sent after what it promises is so; a session that has ended has finished
//!   every request it took.
//! - F3: a write is never cached by the kernel: `live.img` and clones are opened for direct I/O, and
//!   the kernel's write-back cache is never asked for.
//! - F4: what a daemon uses of this waits nowhere in the kernel for a request that only this process can
//!   answer: a process that does cannot be ended, not even by SIGKILL.
//!
//! Who may use the mount is the kernel's business (the mount option `allow_other`, with
//! `default_permissions`), not fuser's: its own check would lock out loop devices.

mod adapter;
mod answer;
mod errno;
mod pool;
#[cfg(test)]
mod tests;
mod wire;

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::Builder;

use fuser::{Config, INodeNo, Notifier, Session, SessionACL};

use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::watch::Watch;
use crate::tree::{NodeId, Tree};

use adapter::Adapter;
use pool::Pool;

/// How a session is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Threads that read requests. One is fastest for a single reader; with two, one that waits
    /// for a cold read does not stop everybody.
    pub event_threads: usize,
    /// Threads for what may wait for a medium.
    pub workers: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            event_threads: 2,
            workers: pool::WORKERS,
        }
    }
}

/// How a session ended: `None` while it runs; an error as text, since every waiter gets it.
type Outcome = Option<std::result::Result<(), String>>;

#[derive(Default)]
struct End {
    outcome: Mutex<Outcome>,
    changed: Condvar,
}

/// A running session. Dropping it does not end the session: unmounting does.
pub struct SessionHandle {
    end: Arc<End>,
    notifier: Notifier,
}

/// Workers for changes of the catalogue, which go one after another in the engine anyway.
const CATALOGUE_WORKERS: usize = 4;

/// Workers for looks at files whose size is only known after reading (diffs).
const VIEW_WORKERS: usize = 2;

/// Starts to serve a tree over a descriptor of `/dev/fuse` that is mounted already. Returns when the
/// kernel and we have agreed on a protocol; requests are served from then on.
///
/// # Errors
/// `Io` when the kernel hangs up or speaks no version we know; `Limit` when a thread cannot be
/// started.
pub fn serve(fd: OwnedFd, tree: Arc<Tree>, options: Options) -> Result<SessionHandle> {
    serve_watched(fd, tree, options, Arc::default())
}

/// As [`serve`]; every request can be seen in `watch` while it is under way.
///
/// # Errors
/// As [`serve`].
pub fn serve_watched(
    fd: OwnedFd,
    tree: Arc<Tree>,
    options: Options,
    watch: Arc<Watch>,
) -> Result<SessionHandle> {
    let start = |workers| {
        Pool::start(workers)
            .map_err(|e| Error::with_source(Kind::Limit, "cannot start worker threads", e))
    };
    let (pool, catalogue) = (start(options.workers.max(1))?, start(CATALOGUE_WORKERS)?);
    let views = start(VIEW_WORKERS)?;
    let mut config = Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(options.event_threads.max(1));
    let session = Session::from_fd(
        Adapter::new(tree, watch, pool, catalogue, views),
        fd,
        SessionACL::All,
        config,
    )
    .context(|| "cannot start the FUSE session")?;
    let notifier = session.notifier();
    let end = Arc::new(End::default());
    let signal = Arc::clone(&end);
    Builder::new()
        .name("fuse-session".to_owned())
        .spawn(move || {
            // Returns after `Adapter::destroy`, that is with every accepted request finished.
            let outcome = ended(session.run());
            *signal
                .outcome
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = Some(outcome);
            signal.changed.notify_all();
        })
        .map_err(|e| Error::with_source(Kind::Limit, "cannot start the session thread", e))?;
    Ok(SessionHandle { end, notifier })
}

/// An aborted connection is how a forced unmount looks from here: a normal end.
fn ended(result: io::Result<()>) -> std::result::Result<(), String> {
    /// ENODEV has no kind of its own.
    const ENODEV: i32 = 19;
    match result {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => Ok(()),
        Err(e) if e.raw_os_error() == Some(ENODEV) => Ok(()),
        Err(e) => Err(e.to_string()),
    }
}

impl SessionHandle {
    /// Whether the session has ended and every request it took is finished.
    pub fn is_finished(&self) -> bool {
        self.end
            .outcome
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }

    /// Waits until the session has ended and every request it took is finished.
    ///
    /// # Errors
    /// `Io` when it did not end by an unmount.
    pub fn wait(&self) -> Result<()> {
        let outcome = self
            .end
            .outcome
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let outcome = self
            .end
            .changed
            .wait_while(outcome, |outcome| outcome.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        match &*outcome {
            Some(Err(text)) => Err(Error::new(
                Kind::Io,
                format!("the FUSE session broke off: {text}"),
            )),
            Some(Ok(())) | None => Ok(()),
        }
    }

    /// Makes the kernel ask for a node's attributes before they are next looked at, which it does before
    /// every read from its cache, too. If size or time of change are not what they were it then drops the
    /// content it has cached.
    ///
    /// Waits for no request, and cannot be made to drop content here: that waits, in the kernel and not to
    /// be ended even by SIGKILL, for reads in flight. If this process dies then, nobody answers them, and
    /// it stays half dead, with mount, files and locks, until somebody cuts the connection. Whoever
    /// looks next can wait for us; we cannot.
    ///
    /// # Errors
    /// `Io`; a node the kernel does not know is fine.
    pub fn forget_attributes(&self, node: NodeId) -> Result<()> {
        const NO_CONTENT: i64 = -1;
        self.notifier
            .inval_inode(INodeNo(node.0), NO_CONTENT, 0)
            .context(|| format!("cannot invalidate inode {}", node.0))
    }

    /// Makes the kernel drop a cached name. May wait for requests, as [`SessionHandle::forget_attributes`]
    /// says what must not: not for a daemon.
    ///
    /// # Errors
    /// `Io`; a name the kernel does not know is fine.
    pub fn invalidate_entry(&self, parent: NodeId, name: &str) -> Result<()> {
        self.notifier
            .inval_entry(INodeNo(parent.0), OsStr::new(name))
            .context(|| format!("cannot invalidate an entry of inode {}", parent.0))
    }
}
