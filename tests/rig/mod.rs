//! A daemon of the real binary in a directory of its own, for tests that kill, load or measure it.
//!
//! Promises: whatever happens to the test, its daemon, its mounts, its loop devices and its directory
//! are gone afterwards ([`Rig`] and [`Attached`] clean up when they are dropped); only processes that
//! were started here are ended, by number, after a look that it is still them. A machine that cannot
//! do what a test needs skips it loudly; with `STILLFRAME_CI=1` that is a failure instead.

#![allow(dead_code, reason = "every test uses its part")]

use std::fs::{self, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

pub const BINARY: &str = env!("CARGO_BIN_EXE_stillframe");
/// How long anything may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Whether this machine can mount; says why not.
pub fn can_mount() -> bool {
    match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(_) => true,
        Err(e) => skip(&format!("/dev/fuse: {e}")),
    }
}

/// Whether this may use loop devices and mount filesystems on them.
pub fn can_loop() -> bool {
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        return skip("needs root for loop devices");
    }
    Path::new("/dev/loop-control").exists() || skip("no /dev/loop-control")
}

pub fn skip(why: &str) -> bool {
    assert!(
        std::env::var_os("STILLFRAME_CI").is_none(),
        "must not be skipped here: {why}"
    );
    eprintln!(
        "SKIP {}: {why}",
        std::thread::current().name().unwrap_or("?")
    );
    false
}

/// The seed of a test that is given none: a run says something of the change that is tested, and of nothing
/// else. Who looks for what nobody has met yet gives others.
pub const SEED: u64 = 20_261_121;

/// A number from the environment, else `default`.
pub fn setting(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number")),
        Err(_) => default,
    }
}

/// A small generator of chances; every run repeats from its seed.
pub struct Chance(pub u64);

impl Chance {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// A command that must succeed; returns what it said.
#[track_caller]
pub fn must(program: &str, args: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    // mkfs and losetup lie where a user's PATH often does not lead.
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    let out = command.env("PATH", path).output();
    let out = out.unwrap_or_else(|e| panic!("{program}: {e}"));
    good(&out, &format!("{program} {args:?}"))
}

#[track_caller]
pub fn good(out: &Output, what: &str) -> String {
    let (said, complained) = (
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr),
    );
    assert!(
        out.status.success(),
        "{what}: {}\n{said}\n{complained}",
        out.status
    );
    said.into_owned()
}

/// Sends a signal to a process that this test started.
pub fn signal(pid: u32, name: &str) {
    must("kill", &["-s", name, &pid.to_string()]);
}

/// Whether a process has ended (a zombie has).
pub fn ended(pid: u32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat
            .rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with(['Z', 'X'])),
        Err(_) => true,
    }
}

/// Whether a process has ended with all of its threads: its first one may be a zombie while another
/// still finishes a system call, and with it the files and locks of the process are there.
pub fn gone(pid: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    ended(pid) && threads <= 1
}

#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "does not come true: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn is_mounted(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table
        .lines()
        .any(|line| line.split(' ').nth(4) == path.to_str())
}

/// Takes a snapshot as touch does.
pub fn touch(path: &Path) -> std::io::Result<()> {
    let mut how = OpenOptions::new();
    how.write(true).create_new(true).open(path).map(drop)
}

/// A directory with a store, a mountpoint, sources and at most one daemon.
pub struct Rig {
    top: TempDir,
    store: Option<PathBuf>,
    pid: Option<u32>,
}

impl Rig {
    /// As [`Rig::new`], with the store elsewhere.
    pub fn with_store(store: PathBuf) -> Rig {
        let mut rig = Rig::new();
        rig.store = Some(store);
        rig
    }

    pub fn new() -> Rig {
        let top = tempfile::Builder::new().prefix("stillframe-").tempdir();
        let rig = Rig {
            top: top.unwrap(),
            store: None,
            pid: None,
        };
        fs::create_dir(rig.mnt()).unwrap();
        rig
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.top.path().canonicalize().unwrap().join(name)
    }

    /// Where a test says at which named place the daemon is to die.
    pub fn kill_at(&self) -> PathBuf {
        self.at("kill-at")
    }

    pub fn mnt(&self) -> PathBuf {
        self.at("mnt")
    }

    pub fn store(&self) -> PathBuf {
        self.store.clone().unwrap_or_else(|| self.at("store"))
    }

    pub fn live(&self, volume: &str) -> PathBuf {
        self.mnt().join(volume).join("live.img")
    }

    pub fn snapshot(&self, volume: &str, name: &str) -> PathBuf {
        let dir = self.mnt().join(volume).join("snapshots");
        dir.join(format!("{name}.img"))
    }

    /// A new sparse source.
    pub fn source(&self, name: &str, size: u64) -> PathBuf {
        let path = self.at(name);
        let file = fs::File::create_new(&path).unwrap();
        file.set_len(size).unwrap();
        path
    }

    /// The program on this store, with a clean environment.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        for name in [
            "STILLFRAME_STORE",
            "STILLFRAME_LOG",
            "NOTIFY_SOCKET",
            "WATCHDOG_USEC",
        ] {
            command.env_remove(name);
        }
        // Only a build with the feature `planted` looks at it.
        command.env("STILLFRAME_KILL_AT", self.kill_at());
        command.stdin(Stdio::null()).args(args);
        command.arg("--store").arg(self.store());
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        good(&self.run(args), &format!("stillframe {args:?}"))
    }

    /// Starts a daemon as a user would; what it noted on the way is returned.
    #[track_caller]
    pub fn mount(&mut self) -> String {
        self.mount_with(&[])
    }

    /// As [`Rig::mount`], with more arguments.
    #[track_caller]
    pub fn mount_with(&mut self, more: &[&str]) -> String {
        let (mnt, log) = (self.mnt(), self.at("daemon.log"));
        let mut command = self.command(&["mount", mnt.to_str().unwrap()]);
        let out = command.arg("--log").arg(log).args(more).output().unwrap();
        let said = good(&out, "stillframe mount");
        let pid = said.rsplit_once("(pid ").and_then(|(_, rest)| {
            let digits = rest.split(')').next()?;
            digits.parse().ok()
        });
        self.pid = Some(pid.unwrap_or_else(|| panic!("no pid in {said:?}")));
        String::from_utf8_lossy(&out.stderr).into_owned()
    }

    /// Starts a daemon that is this process's child; it may not serve yet.
    pub fn spawn(&self) -> Child {
        let mnt = self.mnt();
        let args = ["mount", "--foreground", mnt.to_str().unwrap()];
        let mut command = self.command(&args);
        let quiet = command.stdout(Stdio::null()).stderr(Stdio::null());
        quiet.spawn().unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.pid.expect("the daemon was started")
    }

    /// Ends the daemon the hard way, if it still runs, and waits until its process is gone.
    pub fn kill(&mut self) {
        let pid = self.pid.take().expect("the daemon was started");
        if self.is_ours(pid) {
            // It may end by itself just before.
            let _ = Command::new("kill")
                .args(["-s", "KILL", &pid.to_string()])
                .output();
        }
        eventually("the killed daemon ends", || gone(pid));
    }

    pub fn umount_command(&self) -> Command {
        let mnt = self.mnt();
        self.command(&["umount", mnt.to_str().unwrap()])
    }

    /// Ends the daemon the gentle way, which leaves neither process nor mount nor socket.
    #[track_caller]
    pub fn umount(&mut self) {
        let out = self.umount_command().output().unwrap();
        good(&out, "stillframe umount");
        let pid = self.pid.take().expect("the daemon was started");
        assert!(ended(pid), "umount returned before its daemon had ended");
        assert!(!is_mounted(&self.mnt()));
        let mut left: Vec<String> = fs::read_dir(self.store())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let ours = [
            "lock",
            "superblock",
            "log",
            "map",
            "ballast",
            "clones",
            "home",
            "scrub",
        ];
        left.retain(|name| !ours.contains(&&**name));
        assert!(left.is_empty(), "left in the store: {left:?}");
    }

    /// Whether the process is still a daemon of this store: its number may be another's by now.
    fn is_ours(&self, pid: u32) -> bool {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let store = self.store();
        let mut args = line.split(|&b| b == 0);
        args.any(|arg| arg == store.as_os_str().as_encoded_bytes())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(self.at("daemon.log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(30)..];
            eprintln!("the daemon's log ends:\n{}", tail.join("\n"));
        }
        if let Some(pid) = self.pid.filter(|&pid| self.is_ours(pid)) {
            // Killed rather than asked: a daemon that failed the test may not answer.
            let pid_text = pid.to_string();
            let _ = Command::new("kill")
                .args(["-s", "KILL", &pid_text])
                .status();
            let end = Instant::now() + PATIENCE;
            while !ended(pid) && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        for _ in 0..4 {
            if !is_mounted(&self.mnt()) {
                return;
            }
            let mut lazy = Command::new("fusermount3");
            let _ = lazy.args(["-u", "-z"]).arg(self.mnt()).status();
        }
        eprintln!("{} is still mounted", self.mnt().display());
    }
}

/// A child process that does not outlive the test.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Fails if it has ended and was waited for.
        let _ = self.0.kill();
        // Who hangs in the system ends when what he waits for is cleaned up: that comes after this.
        let end = Instant::now() + Duration::from_secs(10);
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// A loop device over a file, perhaps with a filesystem mounted from it.
pub struct Attached {
    pub device: String,
    pub mounted: Option<PathBuf>,
}

impl Attached {
    pub fn new(file: &Path) -> Attached {
        Attached::with(file, &["--find", "--show"])
    }

    pub fn read_only(file: &Path) -> Attached {
        Attached::with(file, &["--find", "--show", "--read-only"])
    }

    fn with(file: &Path, how: &[&str]) -> Attached {
        let device = must("losetup", &[how, &[file.to_str().unwrap()]].concat());
        Attached {
            device: device.trim().to_owned(),
            mounted: None,
        }
    }

    pub fn mount(&mut self, at: &Path) {
        must("mount", &[&self.device, at.to_str().unwrap()]);
        self.mounted = Some(at.to_owned());
    }

    /// Unmounts what is mounted of it.
    pub fn unmount(&mut self) {
        if let Some(at) = self.mounted.take() {
            must("umount", &[at.to_str().unwrap()]);
        }
    }

    /// Unmounts and detaches, and fails if that fails.
    pub fn detach(mut self) {
        self.unmount();
        must("losetup", &["--detach", &self.device]);
        self.device.clear();
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if self.device.is_empty() {
            return;
        }
        if let Some(at) = &self.mounted {
            // A filesystem that was frozen when the test failed would keep the mount busy.
            let _ = Command::new("fsfreeze").arg("--unfreeze").arg(at).output();
            let _ = Command::new("umount").arg("--lazy").arg(at).status();
        }
        let _ = Command::new("losetup")
            .args(["--detach", &self.device])
            .status();
    }
}
