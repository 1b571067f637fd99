//! What the control socket answers, and how those who asked for the end hear of it.
//!
//! Promises: a status is answered whatever hangs ([`Reporter`]); whoever asked for the unmount gets the
//! outcome of the clean stop, not of the unmounting alone.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::daemon::control;
use crate::daemon::jobs;
use crate::daemon::mounted::Mounted;
use crate::daemon::protocol::{Answer, Leave, Request};
use crate::daemon::reporter::Reporter;
use crate::daemon::status::Place;
use crate::error::{Error, Kind, Result};
use crate::sys::watch::Watch;
use crate::tree::Tree;
use crate::volume::Engine;

/// How long a lazy unmount waits for the mount to become unused before it answers.
const LAZY: Duration = Duration::from_secs(1);

/// What the control socket's jobs are done with.
pub struct Served {
    /// The store.
    pub engine: Arc<Engine>,
    /// Where it is.
    pub place: Place,
    /// What is served.
    pub tree: Arc<Tree>,
    /// Who tells how it is.
    pub reporter: Arc<Reporter>,
    /// Who is told what is under way.
    pub watch: Arc<Watch>,
}

/// Answers the control socket.
pub fn handler(
    served: Served,
    mounted: &Arc<Mounted>,
    ending: &Arc<Ending>,
) -> Box<control::Handler> {
    // Weak: a client that still listens must not keep a mount of ours from being taken away.
    let (mounted, ending) = (Arc::downgrade(mounted), ending.clone());
    Box::new(move |request, progress| match request {
        Request::Unmount { how } => {
            if let Some(mounted) = mounted.upgrade() {
                mounted.leave(how, progress)?;
            }
            if how == Leave::Lazily && !ending.wait(LAZY) {
                return Ok(Answer::Detached);
            }
            ending.outcome()
        }
        Request::Status {} => Ok(Answer::Status(Box::new(served.reporter.report()))),
        other => {
            let scene = jobs::Scene {
                engine: &served.engine,
                place: &served.place,
                tree: Some(&served.tree),
            };
            let job = served.watch.begin_job(other.name());
            job.run(|| jobs::run(scene, &other, progress))
        }
    })
}

/// How the daemon ended, for the clients that wait for it.
#[derive(Default)]
pub struct Ending {
    outcome: Mutex<Option<std::result::Result<(), (Kind, String)>>>,
    changed: Condvar,
}

impl Ending {
    /// Tells it to everybody.
    pub fn finish(&self, outcome: &Result<()>) {
        let told = outcome
            .as_ref()
            .map(|&()| ())
            .map_err(|e| (e.kind(), e.chain()));
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(told);
        self.changed.notify_all();
    }

    /// Waits for the end; `false` if it has not come within the limit.
    fn wait(&self, limit: Duration) -> bool {
        let outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        let (outcome, _) = self
            .changed
            .wait_timeout_while(outcome, limit, |outcome| outcome.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        outcome.is_some()
    }

    fn outcome(&self) -> Result<Answer> {
        let outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = self
            .changed
            .wait_while(outcome, |outcome| outcome.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        match &*outcome {
            Some(Err((kind, message))) => Err(Error::new(*kind, message.clone())),
            Some(Ok(())) | None => Ok(Answer::Done),
        }
    }
}
