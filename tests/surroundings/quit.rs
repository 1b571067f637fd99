//! Row 30, the end itself: a daemon that is to be gone at once is gone, whatever it was started with.

#![allow(unsafe_code, reason = "system calls without a wrapper")]

use std::fs;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Stdio;

use super::{content, served};
use crate::rig::{Running, can_mount, eventually, gone, is_mounted, signal};

/// Ignores and blocks, between fork and exec, all that can be.
fn deaf() -> io::Result<()> {
    // SAFETY: these are safe between fork and exec, and run no code of ours; the set is valid once filled.
    unsafe {
        for number in 1..32 {
            libc::signal(number, libc::SIG_IGN);
        }
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
    }
    Ok(())
}

/// A shell without job control starts what it puts in the background with SIGQUIT ignored, nohup does so
/// with SIGHUP, and who starts a program may have blocked any signal.
#[test]
fn what_its_starter_ignored_or_blocked_ends_it_all_the_same() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    rig.umount();
    for (name, how) in [
        ("TERM", None),
        ("INT", None),
        ("HUP", None),
        ("QUIT", Some(libc::SIGQUIT)),
        ("USR2", Some(libc::SIGUSR2)),
        ("ALRM", Some(libc::SIGALRM)),
    ] {
        let mnt = rig.mnt();
        let mut command = rig.command(&["mount", "--foreground", mnt.to_str().unwrap()]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: `deaf` calls nothing that is not safe between fork and exec.
        unsafe { command.pre_exec(deaf) };
        let mut daemon = Running(command.spawn().unwrap());
        eventually("it serves", || rig.live("vm").exists());
        signal(daemon.0.id(), name);
        eventually(&format!("it ends by {name}"), || gone(daemon.0.id()));
        let status = daemon.0.wait().unwrap();
        assert_eq!(status.signal(), how, "{name}");
        if how.is_none() {
            assert_eq!(status.code(), Some(0), "{name}");
            assert!(!is_mounted(&rig.mnt()), "{name}");
        }
        rig.mount();
        assert!(fs::read(rig.live("vm")).unwrap() == content("disk.img"));
        rig.umount();
    }
}
