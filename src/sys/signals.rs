//! Signals of a daemon other than those that end it.
//!
//! SIGTERM, SIGINT and SIGHUP end it cleanly and are caught elsewhere; everything not named here or there
//! does what the system does, which for most is a kill.

#![allow(unsafe_code, reason = "signal dispositions and masks")]

use std::io;
use std::thread;

/// Has the daemon live on where the system would stop or end it for no reason of ours: SIGTSTP, SIGTTIN
/// and SIGTTOU (a stopped daemon hangs everybody who uses its mount; SIGSTOP cannot be helped) and SIGXFSZ
/// (a write beyond a limit is an error like any other).
pub fn ignore_harmless() {
    for signal in [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU, libc::SIGXFSZ] {
        // SAFETY: ignoring a signal runs no code of ours.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Calls `tell` for every SIGUSR1, from a thread of its own. To be called before other threads start: those
/// that are there already would be ended by the signal.
///
/// # Errors
/// The system's, if it gives no thread.
pub fn on_usr1(tell: impl Fn() + Send + 'static) -> io::Result<()> {
    // SAFETY: all zeros is a `sigset_t`, which `sigemptyset` then makes a valid one.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is valid and writable for the calls; the mask is this thread's, and inherited.
    unsafe {
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGUSR1);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
    let wait = move || {
        loop {
            let mut number = 0;
            // SAFETY: both are valid for the call.
            if unsafe { libc::sigwait(&raw const set, &raw mut number) } != 0 {
                return;
            }
            tell();
        }
    };
    thread::Builder::new()
        .name("usr1".into())
        .spawn(wait)
        .map(drop)
}
