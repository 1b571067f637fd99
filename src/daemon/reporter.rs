//! The state of a served store, also when the store does not answer.
//!
//! Promises: [`Reporter::report`] returns within two seconds and a little, whatever hangs: what is stuck
//! comes from memory; the rest is asked for in a thread of its own and left out if it does not come. While
//! such a thread hangs no other is started.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::daemon::protocol::Report;
use crate::daemon::status::{self, Place};
use crate::daemon::watchdog::Watchdog;
use crate::error::{Error, Kind, Result};
use crate::sys::clock::{Clock, SystemClock};
use crate::sys::disk::Space;
use crate::tree::{StatusFile, StatusSource};
use crate::volume::Engine;

/// How long the store may take to tell how it is.
const PATIENCE: Duration = Duration::from_secs(2);

/// Tells how the store is, to commands and to readers of the control directory.
pub struct Reporter {
    engine: Arc<Engine>,
    place: Place,
    dog: Arc<Watchdog>,
    late: Late,
}

impl Reporter {
    /// Makes one.
    pub fn new(engine: Arc<Engine>, place: Place, dog: Arc<Watchdog>) -> Reporter {
        Reporter {
            engine,
            place,
            dog,
            late: Late::default(),
        }
    }

    /// How things are.
    pub fn report(&self) -> Report {
        let mut report = self.ask().unwrap_or_else(|| Report {
            unanswered: true,
            ..status::nothing(&self.place)
        });
        report.stuck = self.dog.stuck();
        report
    }

    /// What the store says, if it says anything in time.
    fn ask(&self) -> Option<Report> {
        let (engine, place) = (Arc::clone(&self.engine), self.place.clone());
        self.late.ask(PATIENCE, move || {
            let report = status::report(&engine, &place);
            // Before it is told: nobody who has the answer waits for this thread.
            drop(engine);
            report
        })
    }
}

/// Questions whose answers did not come in time.
#[derive(Clone, Default)]
struct Late(Arc<AtomicUsize>);

/// One question: nobody, the one who answers or the one who asks has given it its end.
const OPEN: u8 = 0;
const ANSWERED: u8 = 1;
const GIVEN_UP: u8 = 2;

impl Late {
    /// Has a question answered in a thread of its own; `None` if no answer comes in time, and at once while
    /// an earlier one is still late.
    fn ask<T: Send + 'static>(
        &self,
        patience: Duration,
        question: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        if self.0.load(Ordering::Acquire) > 0 {
            return None;
        }
        let (tell, told) = mpsc::channel();
        let end = Arc::new(AtomicU8::new(OPEN));
        let (late, answered) = (self.clone(), Arc::clone(&end));
        let answer = move || {
            // A panic is logged by its hook, and counts as an answer that says nothing.
            if let Ok(found) = catch_unwind(AssertUnwindSafe(question)) {
                // Fails if nobody waits any more.
                let _ = tell.send(found);
            }
            if answered.swap(ANSWERED, Ordering::AcqRel) == GIVEN_UP {
                late.0.fetch_sub(1, Ordering::AcqRel);
            }
        };
        if let Err(e) = thread::Builder::new().name("report".into()).spawn(answer) {
            tracing::warn!("cannot start a thread: {e}");
            return None;
        }
        if let Ok(found) = told.recv_timeout(patience) {
            return Some(found);
        }
        // Counted first, so that the thread never takes back what was not counted.
        self.0.fetch_add(1, Ordering::AcqRel);
        if end.swap(GIVEN_UP, Ordering::AcqRel) == ANSWERED {
            self.0.fetch_sub(1, Ordering::AcqRel);
        }
        told.try_recv().ok()
    }
}

impl StatusSource for Reporter {
    fn render(&self, file: StatusFile) -> Result<Vec<u8>> {
        let report = self.report();
        match file {
            StatusFile::Json => {
                let mut text = serde_json::to_vec_pretty(&report)
                    .map_err(|e| Error::with_source(Kind::Failed, "cannot render the status", e))?;
                text.push(b'\n');
                Ok(text)
            }
            StatusFile::Metrics => Ok(status::metrics(&report).into_bytes()),
        }
    }

    fn space(&self) -> Result<Space> {
        self.engine.space()
    }

    fn now_ns(&self) -> i64 {
        SystemClock.now_ns()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(10);

    #[test]
    fn an_answer_that_hangs_is_left_out_until_it_has_come() {
        let late = Late::default();
        assert_eq!(late.ask(LONG, || 1), Some(1));
        let (release, wait) = mpsc::channel::<()>();
        let hangs = move || wait.recv().is_ok();
        assert_eq!(late.ask(SHORT, hangs), None);
        // Nobody is asked meanwhile.
        let (tell, told) = mpsc::channel();
        assert_eq!(late.ask(LONG, move || tell.send(()).is_ok()), None);
        assert_eq!(told.recv(), Err(mpsc::RecvError));
        release.send(()).unwrap();
        assert!(crate::sys::eventually(|| late.ask(LONG, || 2) == Some(2)));
    }

    /// Answers that come just when nobody waits any more are neither lost for good nor counted for ever.
    #[test]
    fn an_answer_at_the_last_moment_leaves_nothing_behind() {
        let late = Late::default();
        for round in 0..300u64 {
            let nap = Duration::from_micros(round % 30 * 20);
            let _ = late.ask(Duration::from_micros(300), move || thread::sleep(nap));
            let over = || late.0.load(Ordering::Acquire) == 0;
            assert!(crate::sys::eventually(over), "round {round}");
        }
    }

    #[test]
    fn a_panic_is_no_answer() {
        let late = Late::default();
        assert_eq!(late.ask(LONG, || -> u8 { panic!("on purpose") }), None);
        assert_eq!(late.ask(LONG, || 1), Some(1));
    }
}
