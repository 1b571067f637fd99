//! A thread that does something again and again, until it is told to stop.
//!
//! Promises: a panic of one round is logged and the next one comes; [`Ticker::stop`] returns after the
//! round in hand, or after two seconds if that hangs: the thread is then left behind.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crate::error::{IoContext, Result};

/// How long a stop waits for a round that hangs.
const PATIENCE: Duration = Duration::from_secs(2);

/// The running thread.
pub struct Ticker {
    name: &'static str,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Ticker {
    /// Starts a thread that calls `round` every `pause`.
    ///
    /// # Errors
    /// `Io` if the system gives no thread.
    pub fn start(
        name: &'static str,
        pause: Duration,
        mut round: impl FnMut() + Send + 'static,
    ) -> Result<Ticker> {
        let (stop, stopped) = mpsc::channel();
        let run = move || {
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(pause) {
                if catch_unwind(AssertUnwindSafe(&mut round)).is_err() {
                    tracing::error!("{name}: a round panicked");
                }
            }
        };
        let thread = Builder::new()
            .name(name.into())
            .spawn(run)
            .context(|| format!("cannot start the thread {name}"))?;
        Ok(Ticker {
            name,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Stops it.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        drop(self.stop.take());
        let Some(thread) = self.thread.take() else {
            return;
        };
        let end = Instant::now() + PATIENCE;
        while !thread.is_finished() {
            if Instant::now() >= end {
                tracing::warn!("{}: hangs, and is left behind", self.name);
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        // A round cannot panic out of the thread.
        let _ = thread.join();
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on_after_a_panic_and_stops_when_told() {
        let (tell, told) = mpsc::channel();
        let mut round = 0;
        let ticker = Ticker::start("test", Duration::from_millis(1), move || {
            round += 1;
            tell.send(round).unwrap();
            assert!(round != 2, "on purpose");
        });
        let ticker = ticker.unwrap();
        while told.recv_timeout(Duration::from_secs(30)).unwrap() < 4 {}
        ticker.stop();
        while told.try_recv().is_ok() {}
        assert_eq!(told.try_recv(), Err(mpsc::TryRecvError::Disconnected));
    }

    #[test]
    fn one_that_hangs_is_left_behind() {
        let (release, wait) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        let ticker = Ticker::start("test", Duration::from_millis(1), move || {
            tell.send(()).unwrap();
            let _ = wait.recv();
        });
        told.recv_timeout(Duration::from_secs(30)).unwrap();
        ticker.unwrap().stop();
        drop(release);
    }
}
