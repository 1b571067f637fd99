//! Ctrl-C for commands that are not daemons.
//!
//! Promises: a command that only waits ends at once with 130; a command that has a store open, or a
//! scratch mount to take away, is let finish its step and end in order ([`guard`], [`check`]); a
//! second Ctrl-C ends it at once in any case.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::exit;
use crate::error::{Error, Kind, Result};

static GUARDED: AtomicUsize = AtomicUsize::new(0);
static SIGNALS: AtomicUsize = AtomicUsize::new(0);

/// Takes charge of SIGINT, SIGTERM and SIGHUP for the rest of the process's life.
///
/// # Errors
/// `Io`.
pub fn install() -> Result<()> {
    ctrlc::set_handler(|| {
        let before = SIGNALS.fetch_add(1, Ordering::SeqCst);
        if before > 0 || GUARDED.load(Ordering::SeqCst) == 0 {
            std::process::exit(i32::from(exit::INTERRUPTED));
        }
        super::out::remark("stopping in order; once more stops at once");
    })
    .map_err(|e| Error::with_source(Kind::Io, "cannot catch signals", e))
}

/// While it lives, a signal waits for [`check`].
#[must_use = "signals end the process as soon as this is gone"]
pub struct Guard(());

/// Puts signals off.
pub fn guard() -> Guard {
    GUARDED.fetch_add(1, Ordering::SeqCst);
    Guard(())
}

impl Drop for Guard {
    fn drop(&mut self) {
        GUARDED.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Whether to go on.
///
/// # Errors
/// `Interrupted` once a signal has come.
pub fn check() -> Result<()> {
    if SIGNALS.load(Ordering::SeqCst) == 0 {
        return Ok(());
    }
    Err(Error::new(Kind::Interrupted, "stopped on request"))
}
