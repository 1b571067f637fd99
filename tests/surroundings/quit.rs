//! Row 30, the end itself: a daemon that is to be gone at once is gone, whatever it was started with and
//! whatever it has not answered.
//!
//! A process of which one thread waits in the kernel for an answer that only this process could give cannot
//! be ended, not by SIGKILL either: the descriptor whose closing would end the wait is closed with the last
//! thread. What is shown here is that the daemon never waits so where it once did: for reads in flight of
//! a snapshot that has just failed.

#![allow(unsafe_code, reason = "system calls without a wrapper")]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};

use super::{content, log, served};
use crate::rig::{Rig, Running, can_mount, eventually, gone, is_mounted, signal, skip, touch};

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

/// A shell without job control starts what it puts in the background with SIGQUIT ignored, and who starts a
/// program may have blocked any signal. Under nohup SIGHUP is to do nothing.
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
        signal(daemon.0.id(), "HUP");
        touch(&rig.snapshot("vm", &format!("{name}-hup"))).unwrap();
        assert!(!gone(daemon.0.id()), "HUP");
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

/// Threads of another process that stand still until this is dropped or their process is killed.
struct Held(Vec<libc::pid_t>);

impl Held {
    /// Those whose name begins so; `None`, loudly, where nobody may do that.
    fn new(pid: u32, name: &str) -> Option<Held> {
        let mut held = Held(Vec::new());
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let task = task.unwrap();
            let comm = fs::read_to_string(task.path().join("comm")).unwrap();
            if !comm.starts_with(name) {
                continue;
            }
            let tid: libc::pid_t = task.file_name().to_str().unwrap().parse().unwrap();
            // SAFETY: takes numbers only; the thread is one of a child of ours.
            if unsafe { libc::ptrace(libc::PTRACE_SEIZE, tid, 0, 0) } < 0 {
                let error = io::Error::last_os_error();
                assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}");
                skip(&format!("no right to hold a thread by ptrace: {error}"));
                return None;
            }
            held.0.push(tid);
            let mut status = 0;
            // SAFETY: takes numbers and a status that is writable.
            let stopped = unsafe {
                libc::ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0) == 0
                    && libc::waitpid(tid, &raw mut status, libc::__WALL) == tid
            };
            assert!(stopped && libc::WIFSTOPPED(status), "{name}: {status:x}");
        }
        assert!(held.0.len() >= 2, "no threads {name}");
        Some(held)
    }

    /// Lets those go that were killed: until then the kernel keeps them.
    fn bury(&self) {
        for &tid in &self.0 {
            let mut status = 0;
            // SAFETY: takes numbers and a status that is writable.
            unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for &tid in &self.0 {
            // SAFETY: takes numbers only; fails for threads that are gone.
            unsafe { libc::ptrace(libc::PTRACE_DETACH, tid, 0, 0) };
        }
        self.bury();
    }
}

const SIZE: u64 = 64 << 20;
/// Where nobody but the read that hangs has looked.
const UNSEEN: u64 = 60 << 20;

/// A daemon, this process's child, whose store is full, and a writer who waits.
fn full(rig: &mut Rig) -> (Running, Running) {
    let source = rig.source("disk.img", SIZE);
    File::options()
        .write(true)
        .open(&source)
        .unwrap()
        .write_all_at(&[5; SIZE as usize], 0)
        .unwrap();
    let (mnt, log_file) = (rig.mnt(), rig.at("daemon.log"));
    let mut command = rig.command(&["mount", "--foreground", mnt.to_str().unwrap()]);
    command.args(["--limit=24M", "--segment-size=4M", "--on-full-wait=600"]);
    command.arg("--volume").arg(format!("vm={}", text(&source)));
    command
        .arg("--log")
        .arg(log_file)
        .env("STILLFRAME_LOG", "debug");
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let daemon = Running(command.spawn().unwrap());
    eventually("it serves", || rig.live("vm").exists());
    touch(&rig.snapshot("vm", "a")).unwrap();
    let mut dd = Command::new("dd");
    dd.args(["if=/dev/zero", "bs=1M", "count=48", "conv=notrunc"]);
    dd.arg(format!("of={}", text(&rig.live("vm"))));
    let writer = Running(dd.stderr(Stdio::null()).spawn().unwrap());
    eventually("the writer waits for space", || {
        signal(daemon.0.id(), "USR1");
        log(rig).contains("waits for space")
    });
    (daemon, writer)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A snapshot fails while a read of it, through the kernel's cache, is not answered: pages that wait for the
/// answer are locked. The daemon tells the kernel, and is not held; then a kill finds nobody who waits.
#[test]
fn a_killed_daemon_waits_for_no_read_that_it_leaves_unanswered() {
    if !can_mount() {
        return;
    }
    for name in ["KILL", "QUIT"] {
        let mut rig = Rig::new();
        let (mut daemon, mut writer) = full(&mut rig);
        let pid = daemon.0.id();
        let reader = File::open(rig.snapshot("vm", "a")).unwrap();
        let mut page = [0; 4096];
        reader.read_exact_at(&mut page, 0).unwrap();
        assert_eq!(page, [5; 4096]);
        // Whoever takes requests stands still; the rest of the daemon goes on.
        let Some(held) = Held::new(pid, "fuse") else {
            return;
        };
        // Asks for pages and does not wait for them.
        let (at, len) = (UNSEEN as i64, 4096);
        // SAFETY: takes numbers only.
        let asked =
            unsafe { libc::posix_fadvise(reader.as_raw_fd(), at, len, libc::POSIX_FADV_WILLNEED) };
        assert_eq!(asked, 0);
        assert!(!log(&rig).contains("the kernel looks again"));
        let policy = ["--on-full", "fail-snapshot", "--on-full-wait", "0"];
        rig.ok(&[&["volume", "set", "vm"][..], &policy].concat());
        eventually("the kernel is told that the snapshot failed", || {
            log(&rig).contains("the kernel looks again")
        });
        signal(pid, name);
        eventually(&format!("it ends by {name}"), || {
            held.bury();
            gone(pid)
        });
        drop(held);
        assert_ne!(daemon.0.wait().unwrap().code(), Some(0));
        assert!(!writer.0.wait().unwrap().success());
        assert!(reader.read_at(&mut page, UNSEEN).is_err());
        drop(reader);
        rig.mount();
        let refused =
            File::open(rig.snapshot("vm", "a")).and_then(|file| file.read_at(&mut page, 0));
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EIO));
        rig.umount();
    }
}

/// What the kernel has cached of a snapshot that fails is refused by a descriptor that was open before, and
/// gone from mappings when somebody has looked.
#[test]
fn what_is_cached_of_a_failed_snapshot_is_refused() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new();
    let (daemon, mut writer) = full(&mut rig);
    let reader = File::open(rig.snapshot("vm", "a")).unwrap();
    let mut bytes = vec![0; 1 << 20];
    reader.read_exact_at(&mut bytes, UNSEEN).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 5));
    let before = reader.metadata().unwrap();
    let policy = ["--on-full", "fail-snapshot", "--on-full-wait", "0"];
    rig.ok(&[&["volume", "set", "vm"][..], &policy].concat());
    assert!(writer.0.wait().unwrap().success());
    eventually("the kernel is told that the snapshot failed", || {
        log(&rig).contains("the kernel looks again")
    });
    for page in (0..1 << 20).step_by(4096) {
        let error = reader
            .read_at(&mut bytes[..4096], UNSEEN + page)
            .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{page}");
    }
    let after = reader.metadata().unwrap();
    assert_eq!(
        after.modified().unwrap(),
        before.modified().unwrap() + std::time::Duration::from_nanos(1)
    );
    drop(reader);
    signal(daemon.0.id(), "TERM");
    eventually("it ends", || gone(daemon.0.id()));
}
