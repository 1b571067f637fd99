//! Has a job done: by the daemon of the store if one runs, else in this process.
//!
//! Promises: a store is opened here only under its lock, so never beside a daemon; it is closed
//! cleanly before the answer is shown; when another command has the store for a moment, or a daemon
//! is just starting or stopping, we wait for five seconds and then say who has it.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::{interrupt, out};
use crate::daemon::protocol::{Answer, Request};
use crate::daemon::status::{Place, shown};
use crate::daemon::store::{self, Store};
use crate::daemon::{client, jobs, places};
use crate::error::{Error, Kind, Result};

/// How long a store may be locked by somebody who does not answer; in the documents too.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Has one job done. With `may_create` an absent or empty store directory becomes a store first.
///
/// # Errors
/// The job's; `Locked`, `NotFound`, `Damaged` of the store.
pub fn perform(at: &Path, request: &Request, may_create: bool) -> Result<Answer> {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(mut daemon) = client::connect(at)? {
            return daemon.call(request, &mut |text| out::progress(text));
        }
        match in_process(at, request, may_create) {
            Err(Attempt::Locked(_)) if Instant::now() < end => {
                thread::sleep(Duration::from_millis(50));
            }
            Err(Attempt::Locked(e) | Attempt::Failed(e)) => return Err(e),
            Ok(answer) => return Ok(answer),
        }
    }
}

/// Only a store that could not be locked is worth another try: a job's own `Locked` is an answer.
enum Attempt {
    Locked(Error),
    Failed(Error),
}

fn in_process(at: &Path, request: &Request, may_create: bool) -> Result<Answer, Attempt> {
    let _guard = interrupt::guard();
    if may_create && let Request::VolumeAdd { source, .. } = request {
        places::before_a_store_is_made(at, None, &[source]).map_err(Attempt::Failed)?;
    }
    let held = store::hold(at, may_create).map_err(|e| match e.kind() {
        Kind::Locked => Attempt::Locked(e),
        _ => Attempt::Failed(e),
    })?;
    let place = Place {
        store: held.dir().path().to_owned(),
        mountpoint: None,
    };
    let fresh = held.fresh();
    let job = || -> Result<Answer> {
        let store = held.open()?;
        if fresh {
            out::remark(&format!("made a new store at {}", shown(&place.store)));
        }
        let scene = jobs::Scene {
            engine: store.engine(),
            place: &place,
            tree: None,
        };
        let answer = jobs::run(scene, request, &mut |text| out::progress(text));
        finish(store, answer)
    };
    job().map_err(Attempt::Failed)
}

/// Closes the store; the job's own error counts more than the closing's.
///
/// # Errors
/// The job's, else the engine's, else `Interrupted`.
pub fn finish<T>(store: Store, outcome: Result<T>) -> Result<T> {
    let closed = store.close();
    let outcome = outcome?;
    closed?;
    interrupt::check()?;
    Ok(outcome)
}

/// An answer of a kind that was not asked for: the daemon is of another version.
pub fn unexpected(answer: &Answer) -> Error {
    let text = format!("the daemon answered something else: {answer:?}");
    Error::new(
        Kind::Unsupported,
        format!("{text:.120}; restart it with this version"),
    )
}
