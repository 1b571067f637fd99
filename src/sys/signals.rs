//! Signals of a daemon other than those that end it.
//!
//! SIGTERM, SIGINT and SIGHUP end it cleanly and are caught elsewhere; everything not named here or there
//! does what the system does, which for most is a kill, however the daemon was started: what its starter
//! ignores or blocks is not inherited ([`as_the_system_does`]), but for SIGHUP under `nohup`.

#![allow(unsafe_code, reason = "signal dispositions and masks")]

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// Undoes what this process was started with: signals that were ignored do again what the system does, and
/// none is blocked. A shell without job control, for one, starts what it puts in the background with SIGINT
/// and SIGQUIT ignored. To be called before other threads start and before any signal is caught; SIGPIPE
/// stays as the language's runtime has set it: ignored.
///
/// An ignored SIGHUP stays so ([`as_to_hangups`]): only `nohup`, and who means the same, does that.
pub fn as_the_system_does() {
    for signal in 1..=libc::SIGRTMAX() {
        if signal == libc::SIGPIPE {
            continue;
        }
        // SAFETY: this runs no code of ours. It is refused for signals that cannot be changed (SIGKILL,
        // SIGSTOP, the C library's own), and then changes nothing.
        unsafe {
            let mut now: libc::sigaction = std::mem::zeroed();
            let asked = libc::sigaction(signal, std::ptr::null(), &raw mut now);
            // What is caught (the runtime does so to tell of a stack that is too small) stays caught.
            let ignored = asked == 0 && now.sa_sigaction == libc::SIG_IGN;
            if ignored && signal == libc::SIGHUP {
                HANGUPS_IGNORED.store(true, Ordering::Relaxed);
            } else if ignored {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
    }
    // SAFETY: all zeros is a `sigset_t`, which `sigemptyset` makes a valid one; the mask is this thread's,
    // and inherited by those it starts.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Whether SIGHUP was ignored when this process was started.
static HANGUPS_IGNORED: AtomicBool = AtomicBool::new(false);

/// Ignores SIGHUP again, which has been caught since, if it was ignored when this process was started.
pub fn as_to_hangups() {
    if HANGUPS_IGNORED.load(Ordering::Relaxed) {
        // SAFETY: ignoring a signal runs no code of ours.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
    }
}

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
