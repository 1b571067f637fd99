//! What ends a daemon or has it speak: events, signals, systemd.
//!
//! Promises: [`until_over`] returns when the session has ended, or cannot be ended; the first signal to end
//! asks for a clean stop, the second ends the process at once; systemd hears a sign of life only while the
//! engine answers.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::daemon::mounted::{DRAIN, Event, Mounted};
use crate::daemon::watchdog::{Limits, Watchdog};
use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::process;
use crate::sys::signals;
use crate::sys::watch::Watch;
use crate::volume::Engine;

/// How long the session may take to end after its connection was cut.
const ABORT: Duration = Duration::from_secs(2);
/// How long a close may take when requests hang that nobody waits for any more.
const LAST_RESORT: Duration = Duration::from_secs(10);
/// How often the control socket is tried again where the disk had no room for it.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);

/// Takes events until the session has ended, or cannot be ended; returns whether it has.
pub fn until_over(
    events: &Receiver<Event>,
    mounted: &Mounted,
    engine: &Engine,
    listen: &mut dyn FnMut() -> Result<()>,
) -> bool {
    let watchdog = watchdog_interval();
    let mut listens = false;
    let mut cut_off: Option<Instant> = None;
    let mut aborted = false;
    let mut next_beat = Instant::now();
    loop {
        let now = Instant::now();
        if let Some(interval) = watchdog
            && now >= next_beat
        {
            // An engine that does not answer this does not serve: let systemd notice.
            let _ = engine.log_bytes();
            notify("WATCHDOG=1");
            next_beat = now + interval;
        }
        listens = listens || listen().is_ok();
        let beat = watchdog.map(|_| next_beat);
        let again = (!listens).then(|| now + LISTEN_AGAIN);
        let wake = [beat, cut_off, again].into_iter().flatten().min();
        let pause = wake.map_or(Duration::from_secs(3600), |at| {
            at.saturating_duration_since(now)
        });
        match events.recv_timeout(pause) {
            Ok(Event::SessionEnded) | Err(RecvTimeoutError::Disconnected) => return true,
            Ok(Event::Unmounted { grace: None }) => {}
            Ok(Event::Unmounted { grace: Some(grace) }) => cut_off = Some(Instant::now() + grace),
            Ok(Event::Signal) => {
                tracing::info!("told to stop");
                notify("STOPPING=1\nSTATUS=Unmounting");
                mounted.detach_for_stop();
                cut_off = Some(Instant::now() + DRAIN);
            }
            Err(RecvTimeoutError::Timeout) => {
                if cut_off.is_some_and(|at| Instant::now() >= at) {
                    tracing::warn!("the mount is still in use; cutting its users off");
                    if aborted || !mounted.abort() {
                        return false;
                    }
                    aborted = true;
                    cut_off = Some(Instant::now() + ABORT);
                }
            }
        }
    }
}

/// Half of what systemd allows between two signs of life; `None` when it watches nobody or not us.
fn watchdog_interval() -> Option<Duration> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    if number("WATCHDOG_PID").is_some_and(|pid| pid != u64::from(std::process::id())) {
        return None;
    }
    number("WATCHDOG_USEC")
        .filter(|&us| us > 0)
        .map(|us| Duration::from_micros(us / 2))
}

/// Tells systemd, if it listens.
pub fn notify(text: &str) {
    if let Err(e) = process::notify_systemd(text) {
        tracing::debug!("cannot tell systemd: {}", e.chain());
    }
}

/// Has signals that are to end the daemon tell so.
///
/// # Errors
/// `Io`.
pub fn catch_signals(tell: Sender<Event>) -> Result<()> {
    let count = AtomicUsize::new(0);
    let tell = Mutex::new(tell);
    ctrlc::set_handler(move || {
        if count.fetch_add(1, Ordering::SeqCst) > 0 {
            tracing::warn!("told to stop a second time: ending at once");
            std::process::exit(130);
        }
        // Nobody listens once the mount has ended: the stop is on its way already.
        let _ = tell
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .send(Event::Signal);
    })
    .map_err(|e| Error::with_source(Kind::Io, "cannot catch signals", e))?;
    signals::as_to_hangups();
    Ok(())
}

/// Has SIGUSR1 write to the log what is under way. To be called before other threads start.
///
/// # Errors
/// `Io`.
pub fn tell_on_usr1(watch: &Arc<Watch>) -> Result<()> {
    let watch = Arc::downgrade(watch);
    let tell = move || {
        let Some(watch) = watch.upgrade() else { return };
        let never = Limits {
            named_after: None,
            abort_after: None,
        };
        let all = Watchdog::new(watch, never).under_way();
        tracing::info!("{} requests and jobs are under way", all.len());
        all.iter().for_each(|text| tracing::info!("{text}"));
    };
    signals::on_usr1(tell).context(|| "cannot start a thread")
}

/// Ends the process if the close that follows hangs: the store survives that like any kill, and a lock
/// that is never let go helps nobody.
pub fn end_soon(watch: &Arc<Watch>) {
    let watch = Arc::clone(watch);
    let end = move || {
        thread::sleep(LAST_RESORT);
        let stages: Vec<String> = watch
            .look()
            .iter()
            .map(|seen| seen.what.to_string())
            .collect();
        tracing::error!("the close hangs ({}); ending at once", stages.join(", "));
        process::exit_now(1);
    };
    if let Err(e) = thread::Builder::new().name("last-resort".into()).spawn(end) {
        tracing::warn!("cannot start a thread: {e}");
    }
}
