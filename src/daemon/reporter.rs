//! The state of a served store, also when the store does not answer.
//!
//! Promises: [`Reporter::report`] returns within two seconds and a little, whatever hangs: what is stuck
//! comes from memory; the rest is asked for in a thread of its own and left out if it does not come. Of
//! threads that hang there is one at most at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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
    hangs: Arc<AtomicBool>,
}

impl Reporter {
    /// Makes one.
    pub fn new(engine: Arc<Engine>, place: Place, dog: Arc<Watchdog>) -> Reporter {
        Reporter {
            engine,
            place,
            dog,
            hangs: Arc::default(),
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
        if self.hangs.load(Ordering::Acquire) {
            return None;
        }
        let (tell, told) = mpsc::channel();
        let (engine, place) = (Arc::clone(&self.engine), self.place.clone());
        let hangs = Arc::clone(&self.hangs);
        let ask = move || {
            let report = status::report(&engine, &place);
            drop(engine);
            if tell.send(report).is_err() {
                // Nobody waited any more; from now on it can be asked again.
                hangs.store(false, Ordering::Release);
            }
        };
        let asked = thread::Builder::new().name("report".into()).spawn(ask);
        if asked.is_err() {
            return Some(status::report(&self.engine, &self.place));
        }
        match told.recv_timeout(PATIENCE) {
            Ok(report) => Some(report),
            Err(_) => {
                self.hangs.store(true, Ordering::Release);
                // It may have come in between: then its sender has not seen that nobody waits.
                let late = told.try_recv().ok();
                if late.is_some() {
                    self.hangs.store(false, Ordering::Release);
                }
                late
            }
        }
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
