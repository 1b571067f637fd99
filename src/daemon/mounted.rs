//! The daemon's mount: taking it away, gently or not, and cutting off who does not leave.
//!
//! Promises: it is unmounted at most once, whoever asks first (a client, a signal, a failed start),
//! because a second unmount of the same path would hit what lies below it; nothing here touches the
//! mounted filesystem itself.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::daemon::places;
use crate::daemon::protocol::Leave;
use crate::daemon::status::shown;
use crate::error::{Error, Kind, Result};
use crate::sys::mount::{self, Unmount};
use crate::units::escape;

/// Kernel read-ahead of the mount in KiB, where rights allow (DESIGN section 5.6).
const READ_AHEAD_KIB: u32 = 1024;

/// How long users of a mount that was told to end may keep it before they are cut off.
pub const DRAIN: Duration = Duration::from_secs(5);

/// How long a mount may be in use by nobody who can be found before it is said so.
const LET_GO: Duration = Duration::from_secs(2);

/// What the daemon's main thread waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Told to stop.
    Signal,
    /// A client had it unmounted.
    Unmounted {
        /// How long its users may stay; `None` as long as they like.
        grace: Option<Duration>,
    },
    /// The session has ended.
    SessionEnded,
}

/// A mount of ours; detached when it is dropped and nobody has done it before.
pub struct Mounted {
    mountpoint: PathBuf,
    device: Option<(u32, u32)>,
    tell: Mutex<Sender<Event>>,
    leaving: Mutex<bool>,
    gone: AtomicBool,
}

impl Mounted {
    /// Takes charge of a mount that was just made; `tell` gets the events.
    pub fn new(mountpoint: PathBuf, tell: Sender<Event>) -> Arc<Mounted> {
        let device = match places::standing(&mountpoint) {
            Ok(places::Standing::Ours { device, .. }) => Some(device),
            _ => None,
        };
        let tell = Mutex::new(tell);
        let (leaving, gone) = (Mutex::new(false), AtomicBool::new(false));
        Arc::new(Mounted {
            mountpoint,
            device,
            tell,
            leaving,
            gone,
        })
    }

    /// Where it is.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// The session has ended, by whosever hand: there is nothing left to take away.
    pub fn gone(&self) {
        self.gone.store(true, Ordering::SeqCst);
    }

    /// Sets what can only be set once the mount is there, as far as rights allow.
    pub fn tune(&self) {
        let Some((major, minor)) = self.device else {
            return;
        };
        if !mount::set_read_ahead(major, minor, READ_AHEAD_KIB) {
            tracing::debug!("no right to set the read-ahead; works without");
        }
    }

    /// Cuts off whoever still uses the mount: they get errors, the session ends. Whether that could
    /// be done: it takes the control filesystem below `/sys/fs/fuse/connections`.
    pub fn abort(&self) -> bool {
        let Some((_, minor)) = self.device else {
            return false;
        };
        mount::abort_connection(minor).unwrap_or_else(|e| {
            tracing::error!("cannot cut off the mount's users: {e}");
            false
        })
    }

    /// Unmounts because the daemon was told to stop: detaches what is in use.
    pub fn detach_for_stop(&self) {
        let mut leaving = self.leaving.lock().unwrap_or_else(PoisonError::into_inner);
        if *leaving {
            return;
        }
        let gently = mount::unmount(&self.mountpoint, Unmount::Normal);
        let done = match gently {
            Err(e) if e.kind() == Kind::Busy => {
                tracing::warn!(
                    "{} is in use by {}; detaching it",
                    shown(&self.mountpoint),
                    self.holders()
                );
                mount::unmount(&self.mountpoint, Unmount::Lazy)
            }
            other => other,
        };
        match done {
            Ok(()) => *leaving = true,
            Err(e) => tracing::error!("cannot unmount: {}", e.chain()),
        }
    }

    fn holders(&self) -> String {
        let list: Vec<String> = mount::holders(&self.mountpoint)
            .iter()
            .map(|holder| match holder.pid {
                Some(pid) => format!("{} (pid {pid})", escape(&holder.name)),
                None => escape(&holder.name),
            })
            .collect();
        if list.is_empty() {
            "a process that cannot be seen".to_owned()
        } else {
            list.join(", ")
        }
    }

    /// Unmounts because a client asked.
    ///
    /// # Errors
    /// `Busy`, naming who uses it; `Permission`, `Io`.
    pub fn leave(&self, how: Leave, progress: &mut dyn FnMut(&str)) -> Result<()> {
        let mut leaving = self.leaving.lock().unwrap_or_else(PoisonError::into_inner);
        let at = shown(&self.mountpoint);
        let mode = match how {
            Leave::Gently => Unmount::Normal,
            // Forcibly: detached here, cut off below.
            Leave::Lazily | Leave::Forcibly => Unmount::Lazy,
        };
        if !*leaving {
            self.unmount(mode).map_err(|e| self.explain(e))?;
            *leaving = true;
            progress(&format!("unmounted {at}; closing the store"));
        }
        let grace = match how {
            Leave::Gently => Some(DRAIN),
            Leave::Lazily => None,
            Leave::Forcibly => Some(Duration::ZERO),
        };
        let told = Event::Unmounted { grace };
        // Nobody listens once the session has ended: then there is nothing left to wait for.
        let _ = self
            .tell
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .send(told);
        Ok(())
    }

    /// Unmounts; a user who cannot be found is waited for a moment. Whoever forks holds everything open
    /// twice until the child runs its own program, and is nowhere to be seen afterwards.
    fn unmount(&self, mode: Unmount) -> Result<()> {
        let until = Instant::now() + LET_GO;
        loop {
            match mount::unmount(&self.mountpoint, mode) {
                Err(e)
                    if e.kind() == Kind::Busy
                        && Instant::now() < until
                        && mount::holders(&self.mountpoint).is_empty() =>
                {
                    std::thread::sleep(Duration::from_millis(20));
                }
                done => return done,
            }
        }
    }

    fn explain(&self, e: Error) -> Error {
        if e.kind() != Kind::Busy {
            return e;
        }
        Error::new(
            Kind::Busy,
            format!(
                "{} is in use by {}; end that, or use --lazy or --force",
                shown(&self.mountpoint),
                self.holders()
            ),
        )
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let leaving = *self.leaving.lock().unwrap_or_else(PoisonError::into_inner);
        if leaving || self.gone.load(Ordering::SeqCst) {
            return;
        }
        if let Err(e) = mount::unmount(&self.mountpoint, Unmount::Lazy) {
            tracing::warn!("cannot unmount: {}", e.chain());
        }
    }
}
