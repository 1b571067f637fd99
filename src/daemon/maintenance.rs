//! The one thread that runs the engine's background work: checkpoints and reclaim.
//!
//! Promises: the engine's `maintain` is called at least every second while it
//! has nothing to do and without pause while it has; an error is logged when it appears and when it
//! goes, not every second, and is tried again. [`Maintenance::stop`] returns after the piece of work
//! in hand.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::error::{IoContext, Result};
use crate::sys::watch::Watch;
use crate::volume::Engine;

/// Pause when nothing is due.
const IDLE: Duration = Duration::from_secs(1);
/// Pause after an error: long enough not to burn a core, short enough to see space come back.
const AFTER_ERROR: Duration = Duration::from_secs(5);

/// The running thread.
pub struct Maintenance {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Stop {
    asked: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    /// Waits; returns whether to stop.
    fn wait(&self, pause: Duration) -> bool {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let (asked, _) = self
            .changed
            .wait_timeout_while(asked, pause, |asked| !*asked)
            .unwrap_or_else(PoisonError::into_inner);
        *asked
    }
}

/// Starts the thread.
///
/// # Errors
/// `Io` if the system gives no thread.
pub fn start(engine: Arc<Engine>, watch: Arc<Watch>) -> Result<Maintenance> {
    let stop = Arc::new(Stop::default());
    let asked = stop.clone();
    let thread = thread::Builder::new()
        .name("maintenance".into())
        .spawn(move || {
            run(&asked, AFTER_ERROR, || {
                let job = watch.begin_job("background work".to_owned());
                job.run(|| engine.maintain())
            })
        })
        .context(|| "cannot start the maintenance thread")?;
    Ok(Maintenance {
        stop,
        thread: Some(thread),
    })
}

fn run(stop: &Stop, after_error: Duration, mut work: impl FnMut() -> Result<bool>) {
    let mut failing: Option<String> = None;
    loop {
        let pause = match work() {
            Ok(more) => {
                if failing.take().is_some() {
                    tracing::info!("background work goes on");
                }
                if more { Duration::ZERO } else { IDLE }
            }
            Err(e) => {
                let text = e.chain();
                if failing.as_ref() != Some(&text) {
                    tracing::error!("background work failed, will be tried again: {text}");
                    failing = Some(text);
                }
                after_error
            }
        };
        if stop.wait(pause) {
            return;
        }
    }
}

impl Maintenance {
    /// Asks the thread to stop and waits for it.
    pub fn stop(mut self) {
        self.ask_and_join();
    }

    fn ask_and_join(&mut self) {
        *self
            .stop
            .asked
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = true;
        self.stop.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the maintenance thread had panicked");
        }
    }
}

impl Drop for Maintenance {
    fn drop(&mut self) {
        self.ask_and_join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, Kind};

    /// Busy work is not paused, idle work is; stopping does not wait for the pause.
    #[test]
    fn work_runs_until_there_is_none_and_stops_at_once() {
        let stop = Arc::new(Stop::default());
        let (tell, told) = std::sync::mpsc::channel();
        let asked = stop.clone();
        let thread = thread::spawn(move || {
            let mut left = 100;
            run(&asked, AFTER_ERROR, || {
                left -= 1;
                if left == 0 {
                    let _ = tell.send(());
                }
                Ok(left > 0)
            });
            left
        });
        told.recv_timeout(Duration::from_secs(20)).unwrap();
        *stop.asked.lock().unwrap() = true;
        stop.changed.notify_all();
        assert!(thread.join().unwrap() <= 0);
    }

    #[test]
    fn an_error_does_not_end_the_thread() {
        let stop = Stop::default();
        let mut calls = 0;
        run(&stop, Duration::from_millis(1), || {
            calls += 1;
            if calls < 3 {
                return Err(Error::new(Kind::NoSpace, "full"));
            }
            *stop.asked.lock().unwrap() = true;
            Ok(true)
        });
        assert_eq!(calls, 3);
    }
}
