//! The command line as its users meet it: the real binary, real mounts, exit codes as a contract.
//!
//! Each test has a directory of its own with a store, a mountpoint and an image, and takes down in
//! any case what it started: [`Bench`] unmounts and kills its own daemon when it is dropped. A
//! machine without `/dev/fuse` skips loudly; with `STILLFRAME_CI=1` that is a failure instead.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_stillframe");
/// Bytes of the image: not a multiple of the grain.
const SIZE: u64 = (1 << 20) + 100;
/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether this machine can mount; says why not.
fn can_mount() -> bool {
    let missing = match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(_) => return true,
        Err(e) => format!("/dev/fuse: {e}"),
    };
    skip(&missing)
}

/// Whether this runs as root, which some refusals need to be provoked.
fn is_root() -> bool {
    if fs::metadata("/proc/self").unwrap().uid() == 0 {
        return true;
    }
    skip("needs root")
}

fn skip(why: &str) -> bool {
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

/// The program with a clean environment.
fn program() -> Command {
    let mut command = Command::new(BINARY);
    for name in [
        "STILLFRAME_STORE",
        "STILLFRAME_LOG",
        "NOTIFY_SOCKET",
        "WATCHDOG_USEC",
    ] {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

struct Bench {
    top: TempDir,
}

impl Bench {
    fn new() -> Bench {
        let top = tempfile::tempdir().unwrap();
        let bench = Bench { top };
        fs::create_dir(bench.mnt()).unwrap();
        bench.image("disk.img");
        bench
    }

    fn at(&self, name: &str) -> PathBuf {
        self.top.path().canonicalize().unwrap().join(name)
    }

    fn mnt(&self) -> PathBuf {
        self.at("mnt")
    }

    fn store(&self) -> PathBuf {
        self.at("store")
    }

    /// A new image that no two of its grains share.
    fn image(&self, name: &str) -> PathBuf {
        let path = self.at(name);
        let mut data = vec![0; SIZE as usize];
        blake3::Hasher::new()
            .update(name.as_bytes())
            .finalize_xof()
            .fill(&mut data);
        fs::write(&path, data).unwrap();
        path
    }

    fn file(&self, inside: &str) -> PathBuf {
        self.mnt().join(inside)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = program();
        command.args(args).arg("--store").arg(self.store());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        expect(self.run(args), 0)
    }

    /// Fails with this code and one line on stderr, which is returned.
    #[track_caller]
    fn refused(&self, args: &[&str], code: i32) -> String {
        refusal(self.run(args), code)
    }

    fn volume(&self) -> String {
        format!("vm={}", self.at("disk.img").display())
    }

    #[track_caller]
    fn mount(&self) {
        self.ok(&[
            "mount",
            "--volume",
            &self.volume(),
            self.mnt().to_str().unwrap(),
        ]);
    }

    #[track_caller]
    fn umount(&self) {
        self.ok(&["umount", self.mnt().to_str().unwrap()]);
    }

    #[track_caller]
    fn json(&self, args: &[&str]) -> Value {
        let text = self.ok(&[args, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    fn pid(&self) -> Option<u32> {
        let out = self.run(&["status", "--json"]);
        let status: Value = serde_json::from_slice(&out.stdout).ok()?;
        u32::try_from(status["pid"].as_u64()?).ok()
    }

    /// Starts a daemon in the foreground and waits until it serves.
    fn foreground(&self, environment: &[(&str, &str)]) -> Child {
        let mut command = self.command(&["mount", "--foreground", "--volume", &self.volume()]);
        command
            .arg(self.mnt())
            .envs(environment.iter().copied())
            .stderr(Stdio::null());
        let child = command.spawn().unwrap();
        eventually("the mount serves", || self.file("vm/live.img").exists());
        child
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for _ in 0..4 {
            if !is_mounted(&self.mnt()) {
                return;
            }
            let _ = self.run(&["umount", "--force", self.mnt().to_str().unwrap()]);
        }
        eprintln!("{} is still mounted", self.mnt().display());
    }
}

fn is_mounted(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table
        .lines()
        .any(|line| line.split(' ').nth(4) == path.to_str())
}

#[track_caller]
fn expect(out: Output, code: i32) -> String {
    let (stdout, stderr) = (
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr),
    );
    assert_eq!(
        out.status.code(),
        Some(code),
        "stdout: {stdout}\nstderr: {stderr}"
    );
    stdout.into_owned()
}

/// A refusal is one plain line: what, why, what to do.
#[track_caller]
fn refusal(out: Output, code: i32) -> String {
    let stderr = String::from_utf8(out.stderr.clone()).unwrap();
    expect(out, code);
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(
        stderr.starts_with("stillframe: ") && stderr.contains("; "),
        "{stderr}"
    );
    assert!(
        stderr.trim_end().bytes().all(|b| (0x20..0x7f).contains(&b)),
        "{stderr:?}"
    );
    stderr
}

#[track_caller]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "does not come true: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether a process has ended; a zombie whose threads still hold its files has not.
fn ended(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return true;
    };
    let zombie = stat
        .rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('Z'));
    zombie && fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count) <= 1
}

/// Sends a signal to a process that this test started.
fn signal(pid: u32, name: &str) {
    let status = Command::new("kill")
        .args(["-s", name, &pid.to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

fn touch(path: &Path) {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .unwrap();
}

/// The whole life: mount, snapshot, write, read, unmount; and what each step promises.
#[test]
fn the_whole_life() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    let before = fs::read(b.at("disk.img")).unwrap();
    b.mount();
    let pid = b.pid().unwrap();
    assert_eq!(fs::read(b.file("vm/live.img")).unwrap(), before);
    touch(&b.file("vm/snapshots/a.img"));
    let live = OpenOptions::new()
        .write(true)
        .open(b.file("vm/live.img"))
        .unwrap();
    live.write_all_at(&[7; 5000], 3000).unwrap();
    drop(live);
    b.ok(&["snapshot", "create", "vm@b"]);
    assert_eq!(fs::read(b.file("vm/snapshots/a.img")).unwrap(), before);
    let after = fs::read(b.file("vm/live.img")).unwrap();
    assert_ne!(after, before);
    assert_eq!(fs::read(b.file("vm/snapshots/b.img")).unwrap(), after);

    b.ok(&["snapshot", "rename", "vm@b", "c"]);
    let mut names: Vec<_> = fs::read_dir(b.file("vm/snapshots"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["a.img", "c.img"]);
    b.ok(&["snapshot", "delete", "vm@c"]);
    assert!(!b.file("vm/snapshots/c.img").exists());

    let status = b.json(&["status"]);
    assert_eq!(status["pid"], pid);
    assert_eq!(status["mountpoint"], b.mnt().to_str().unwrap());
    assert_eq!(status["volumes"][0]["snapshots"][0]["name"], "a");
    let inside = fs::read_to_string(b.file(".stillframe/status.json")).unwrap();
    let inside: Value = serde_json::from_str(&inside).unwrap();
    assert_eq!(inside["volumes"][0]["uuid"], status["volumes"][0]["uuid"]);
    let metrics = fs::read_to_string(b.file(".stillframe/metrics.prom")).unwrap();
    assert!(
        metrics.contains("stillframe_volume_snapshots{volume=\"vm\"} 1\n"),
        "{metrics}"
    );

    b.umount();
    assert!(ended(pid) && !is_mounted(&b.mnt()));
    assert!(!b.store().join("control.sock").exists());
    assert_eq!(fs::read(b.at("disk.img")).unwrap(), after);
    b.mount();
    assert_eq!(fs::read(b.file("vm/snapshots/a.img")).unwrap(), before);
    b.umount();
}

/// `diff`: with and without a daemon, for people and programs, and what it refuses.
#[test]
fn a_diff_is_shown() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    b.mount();
    touch(&b.file("vm/snapshots/a.img"));
    let live = OpenOptions::new()
        .write(true)
        .open(b.file("vm/live.img"))
        .unwrap();
    live.write_all_at(&[7; 5000], 3000).unwrap();
    live.write_all_at(&[0; 4196], SIZE - 4196).unwrap();
    drop(live);
    touch(&b.file("vm/snapshots/b.img"));
    let extents = serde_json::json!([
        {"start": 0, "length": 8192, "zero": false},
        {"start": SIZE - 4196, "length": 4196, "zero": true},
    ]);
    let inside: Value =
        serde_json::from_slice(&fs::read(b.file("vm/diffs/a..b.json")).unwrap()).unwrap();
    for mounted in [true, false] {
        let diff = b.json(&["diff", "vm@a..b"]);
        assert_eq!(diff, inside);
        assert_eq!(diff["extents"], extents);
        assert_eq!(
            (&diff["size"], &diff["grain"]),
            (&SIZE.into(), &4096.into())
        );
        let live = b.json(&["diff", "vm@a..live"]);
        assert_eq!(
            (&live["extents"], &live["to_uuid"]),
            (&extents, &Value::Null)
        );
        let text = b.ok(&["diff", "vm@a..b"]);
        let first = format!("12388 of {SIZE} bytes changed, in 2 extents\n");
        assert!(text.starts_with(&first) && text.contains(" zero"), "{text}");
        assert!(b.ok(&["diff", "vm@b..live"]).starts_with("0 of "));
        b.refused(&["diff", "vm@b..a"], 2);
        b.refused(&["diff", "vm@a..a"], 2);
        b.refused(&["diff", "vm@a..x"], 4);
        if mounted {
            b.umount();
        }
    }
}

/// Everything works without a daemon too, and `volume add` before the first mount.
/// A hold keeps a snapshot from rm and from the command, also over a restart, until it is released.
#[test]
fn a_snapshot_on_hold_stays() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    b.mount();
    let file = b.file("vm/snapshots/a.img");
    touch(&file);
    b.ok(&["snapshot", "hold", "vm@a"]);
    b.ok(&["snapshot", "hold", "vm@a"]);
    b.refused(&["snapshot", "delete", "vm@a"], 5);
    let e = std::fs::remove_file(&file).expect_err("it is on hold");
    assert_eq!(e.kind(), std::io::ErrorKind::ResourceBusy);
    b.umount();
    b.refused(&["snapshot", "delete", "vm@a"], 5);
    assert_eq!(b.json(&["snapshot", "list"])[0]["held"], true);
    b.ok(&["snapshot", "release", "vm@a"]);
    b.ok(&["snapshot", "delete", "vm@a"]);
    b.refused(&["snapshot", "hold", "vm@a"], 4);
}

#[test]
fn a_store_without_a_daemon() {
    let b = Bench::new();
    let disk = b.at("disk.img").to_str().unwrap().to_owned();
    let said = b.run(&[
        "volume",
        "add",
        "vm",
        &disk,
        "--grain",
        "64K",
        "--on-full-wait",
        "7",
    ]);
    let stderr = String::from_utf8_lossy(&said.stderr).into_owned();
    expect(said, 0);
    assert!(stderr.contains("made a new store at"), "{stderr}");
    assert_eq!(fs::metadata(b.store()).unwrap().mode() & 0o777, 0o700);
    b.ok(&["volume", "set", "vm", "--on-full", "fail-snapshot"]);
    b.ok(&["snapshot", "create", "vm@one"]);
    b.ok(&["snapshot", "create", "vm@two"]);
    let volumes = b.json(&["volume", "list"]);
    assert_eq!(volumes[0]["grain"], 65536);
    assert_eq!(volumes[0]["on_full"], "fail-snapshot");
    assert_eq!(volumes[0]["on_full_wait"], 7);
    assert_eq!(b.json(&["volume", "show", "vm"])["size"], SIZE);
    let snapshots = b.json(&["snapshot", "list", "vm"]);
    assert_eq!(
        (&snapshots[0]["name"], &snapshots[1]["name"]),
        (&"one".into(), &"two".into())
    );
    assert_eq!(snapshots[1]["parent"], snapshots[0]["uuid"]);
    assert!(snapshots[0]["time"].as_str().unwrap() < snapshots[1]["time"].as_str().unwrap());
    let text = b.ok(&["snapshot", "list"]);
    assert!(
        text.starts_with("SNAPSHOT") && text.contains("vm@two"),
        "{text}"
    );
    let status = b.json(&["status"]);
    assert_eq!(
        (&status["pid"], &status["mountpoint"]),
        (&Value::Null, &Value::Null)
    );

    let check = b.json(&["check"]);
    assert_eq!(
        (&check["findings"], &check["map_rebuilt"]),
        (&Value::Array(vec![]), &false.into())
    );
    let check = b.json(&["check", "--rebuild-map"]);
    assert_eq!(check["map_rebuilt"], true);
    assert_eq!(
        check["report"]["volumes"][0]["snapshots"]
            .as_array()
            .unwrap()
            .len(),
        2
    );

    b.refused(&["volume", "remove", "vm"], 5);
    b.ok(&["snapshot", "delete", "vm@one"]);
    b.ok(&["snapshot", "delete", "vm@two"]);
    b.ok(&["volume", "remove", "vm"]);
    assert_eq!(b.json(&["volume", "list"]), Value::Array(vec![]));
}

/// Several snapshots of one command are of one instant: they share a group, or none is taken.
#[test]
fn several_snapshots_are_of_one_instant() {
    let b = Bench::new();
    b.image("other.img");
    for (name, file) in [("a", "disk.img"), ("b", "other.img")] {
        b.ok(&["volume", "add", name, b.at(file).to_str().unwrap()]);
    }
    let taken = b.json(&["snapshot", "create", "a@x", "b@x"]);
    assert_eq!(taken.as_array().unwrap().len(), 2);
    assert!(taken[0]["group"].is_string());
    assert_eq!(taken[0]["group"], taken[1]["group"]);
    assert_eq!(taken[0]["time"], taken[1]["time"]);
    b.ok(&["snapshot", "create", "a@alone"]);
    // The listing shows what belongs together.
    let group: String = taken[0]["group"]
        .as_str()
        .unwrap()
        .chars()
        .take(8)
        .collect();
    let text = b.ok(&["snapshot", "list"]);
    let last = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().last().unwrap().to_owned()
    };
    assert_eq!((last("a@x"), last("b@x")), (group.clone(), group));
    assert_eq!(
        (last("SNAPSHOT"), last("a@alone")),
        ("GROUP".into(), "-".into())
    );
    b.ok(&["snapshot", "delete", "a@alone"]);
    b.refused(&["snapshot", "create", "a@y", "b@x"], 5);
    b.refused(&["snapshot", "create", "a@y", "none@y"], 4);
    assert_eq!(
        b.json(&["snapshot", "list", "a"]).as_array().unwrap().len(),
        1
    );
}

/// Every refusal has its documented exit code and leaves no store behind.
#[test]
fn refusals_without_a_mount() {
    let b = Bench::new();
    let mnt = b.mnt().to_str().unwrap().to_owned();
    let volume = b.volume();
    fs::create_dir(b.at("full")).unwrap();
    fs::write(b.at("full/file"), "x").unwrap();
    fs::create_dir(b.at("dir")).unwrap();
    let at = |name: &str| b.at(name).to_str().unwrap().to_owned();

    // usage: the parser's own words, more than one line
    for args in [
        &["frobnicate"][..],
        &["mount"],
        &["volume", "add", "a"],
        &["snapshot", "create"],
    ] {
        assert_eq!(b.run(args).status.code(), Some(2), "{args:?}");
    }
    for name in ["..", "a/b", "live", "-x", "a b", "", "a..b"] {
        let out = b.run(&["volume", "add", "--", name, &at("disk.img")]);
        assert_eq!(out.status.code(), Some(2), "{name}");
        let out = b.run(&["snapshot", "create", &format!("vm@{name}")]);
        assert_eq!(out.status.code(), Some(2), "{name}");
    }
    // mountpoint
    b.refused(&["mount", "--volume", &volume, &at("absent")], 4);
    b.refused(&["mount", "--volume", &volume, &at("disk.img")], 2);
    b.refused(&["mount", "--volume", &volume, &at("full")], 2);
    // a mistyped store
    let said = b.refused(&["mount", &mnt], 4);
    assert!(
        said.contains("--volume") && said.contains("no store at"),
        "{said}"
    );
    for args in [
        &["status"][..],
        &["volume", "list"],
        &["check"],
        &["snapshot", "create", "a@b"],
    ] {
        b.refused(args, 4);
    }
    // sources
    for (source, code) in [("absent", 4), ("dir", 2)] {
        b.refused(
            &["mount", "--volume", &format!("vm={}", at(source)), &mnt],
            code,
        );
        b.refused(&["volume", "add", "vm", &at(source)], code);
    }
    assert!(!b.store().exists(), "a refused command made a store");
    // places
    let with_store = |store: &str, mountpoint: &str| {
        let mut command = program();
        command.args(["mount", "--volume", &volume, "--store", store, mountpoint]);
        refusal(command.output().unwrap(), 2)
    };
    with_store(&at("mnt/store"), &mnt);
    with_store(&mnt, &mnt);
    with_store(&at("disk.img"), &mnt);
    with_store(&at("full"), &mnt);
    assert_eq!(fs::read_dir(b.at("full")).unwrap().count(), 1);
    // not mounted
    b.refused(&["umount", &mnt], 6);
    b.refused(&["umount", &at("absent")], 4);
}

#[test]
fn refusals_of_names_and_sources() {
    let b = Bench::new();
    let disk = b.at("disk.img").to_str().unwrap().to_owned();
    b.ok(&["volume", "add", "vm", &disk]);
    b.ok(&["snapshot", "create", "vm@a"]);
    let other = b.image("other.img").to_str().unwrap().to_owned();
    b.refused(&["volume", "add", "vm", &other], 5);
    b.refused(&["volume", "add", "twin", &disk], 5);
    b.refused(&["snapshot", "create", "vm@a"], 5);
    b.refused(&["snapshot", "create", "none@a"], 4);
    b.refused(&["snapshot", "delete", "vm@none"], 4);
    b.refused(&["snapshot", "rename", "vm@none", "x"], 4);
    b.ok(&["snapshot", "create", "vm@b"]);
    b.refused(&["snapshot", "rename", "vm@b", "a"], 5);
    b.refused(&["snapshot", "list", "none"], 4);
    b.refused(&["volume", "show", "none"], 4);
    b.refused(&["volume", "accept", "none"], 4);
    b.refused(&["volume", "set", "vm"], 2);
    let inside = b.store().join("lock");
    b.refused(&["volume", "add", "odd", inside.to_str().unwrap()], 2);
    // A name that is a terminal's command is shown, not obeyed.
    let evil = b.image("evil\u{1b}[31m\n.img").to_str().unwrap().to_owned();
    b.ok(&["volume", "add", "evil", &evil]);
    let listed = b.ok(&["volume", "list"]);
    assert!(listed.contains("evil\\u{1b}[31m\\n.img"), "{listed}");
    assert!(!listed.contains('\u{1b}'));
    assert_eq!(b.json(&["volume", "show", "evil"])["source"], evil.as_str());
    b.refused(&["volume", "add", "evil2", &evil], 5);
}

#[test]
fn a_volume_on_mount_is_added_once() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    let mnt = b.mnt().to_str().unwrap().to_owned();
    b.mount();
    b.umount();
    // The same file under another name of its path is the same source.
    let detour = format!("vm={}", b.at("mnt/../disk.img").display());
    b.ok(&["mount", "--volume", &detour, &mnt]);
    assert_eq!(b.json(&["volume", "list"]).as_array().unwrap().len(), 1);
    b.umount();
    let other = format!("vm={}", b.image("other.img").display());
    b.refused(&["mount", "--volume", &other, &mnt], 5);
    assert!(!is_mounted(&b.mnt()));
    b.ok(&["mount", &mnt]);
    b.ok(&["volume", "add", "late", b.at("other.img").to_str().unwrap()]);
    assert!(b.file("late/live.img").exists());
    // A source inside the mount would wait for itself.
    let inside = b.file("vm/live.img");
    b.refused(&["volume", "add", "loop", inside.to_str().unwrap()], 2);
    b.umount();
}

/// While a daemon has the store nobody else gets it, and the refusal names the process.
#[test]
fn a_served_store_is_locked() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    b.mount();
    let pid = b.pid().unwrap().to_string();
    fs::create_dir(b.at("mnt2")).unwrap();
    let said = b.refused(&["mount", b.at("mnt2").to_str().unwrap()], 6);
    assert!(said.contains(&pid), "{said}");
    assert!(b.refused(&["check", "--rebuild-map"], 6).contains(&pid));
    assert_eq!(b.json(&["check", "--read-data"])["mode"], "online");
    let said = b.refused(&["mount", b.mnt().to_str().unwrap()], 5);
    assert!(
        said.contains("already serves") && said.contains(&pid),
        "{said}"
    );
    b.umount();
}

#[test]
fn a_busy_mount_names_its_holders() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    let mnt = b.mnt().to_str().unwrap().to_owned();
    b.mount();
    let daemon = b.pid().unwrap();
    let mut holder = Command::new("sleep")
        .arg("1000")
        .current_dir(b.file("vm"))
        .spawn()
        .unwrap();
    let said = b.refused(&["umount", &mnt], 5);
    assert!(
        said.contains("sleep") && said.contains(&holder.id().to_string()),
        "{said}"
    );
    assert!(
        b.file("vm/live.img").exists(),
        "a refused umount changes nothing"
    );
    let said = b.ok(&["umount", "--lazy", &mnt]);
    assert!(said.contains("still in use"), "{said}");
    assert!(!is_mounted(&b.mnt()) && !ended(daemon));
    holder.kill().unwrap();
    holder.wait().unwrap();
    eventually("the daemon ends with its last user", || ended(daemon));

    b.mount();
    let daemon = b.pid().unwrap();
    let mut holder = Command::new("sleep")
        .arg("1000")
        .current_dir(b.file("vm"))
        .spawn()
        .unwrap();
    b.ok(&["umount", "--force", &mnt]);
    assert!(!is_mounted(&b.mnt()) && ended(daemon));
    holder.kill().unwrap();
    holder.wait().unwrap();
    b.ok(&["check"]);
}

/// A killed daemon leaves a stale mount: `mount`, `umount` and `doctor` each clean it.
#[test]
fn stale_mounts_of_ours_are_cleaned() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    let mnt = b.mnt().to_str().unwrap().to_owned();
    let kill = || {
        let pid = b.pid().unwrap();
        signal(pid, "KILL");
        eventually("the daemon is gone", || ended(pid));
        assert!(is_mounted(&b.mnt()));
    };
    b.mount();
    kill();
    let out = b.run(&["mount", &mnt]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    expect(out, 0);
    assert!(said.contains("cleaned the stale mount"), "{said}");
    kill();
    let said = b.ok(&["umount", &mnt]);
    assert!(said.contains("cleaned the stale mount"), "{said}");
    assert!(!is_mounted(&b.mnt()));
    b.refused(&["umount", &mnt], 6);

    b.mount();
    kill();
    let findings = b.json(&["doctor"]);
    let about = |check: &str| {
        let found = findings.as_array().unwrap().iter();
        found
            .filter(|f| f["check"] == check)
            .cloned()
            .collect::<Vec<_>>()
    };
    // Tests run beside each other: others may have stale mounts of theirs at the moment.
    let ours = about("mounts").into_iter().any(|f| {
        f["verdict"] == "fixed" && f["detail"].as_str().is_some_and(|d| d.ends_with(&mnt))
    });
    assert!(ours || !is_mounted(&b.mnt()), "{findings:?}");
    assert_eq!(about("fuse-device")[0]["verdict"], "ok");
    assert_eq!(about("rights")[0]["verdict"], "ok");
    assert!(!is_mounted(&b.mnt()));
}

/// A mount of somebody else is neither used nor touched.
#[test]
fn foreign_mounts_are_left_alone() {
    if !is_root() {
        return;
    }
    let b = Bench::new();
    let mnt = b.mnt().to_str().unwrap().to_owned();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "foreign", &mnt])
        .output()
        .unwrap();
    if !mounted.status.success() {
        skip("cannot mount a tmpfs");
        return;
    }
    let refused = b.run(&["mount", "--volume", &b.volume(), &mnt]);
    let left = b.run(&["umount", &mnt]);
    let forced = b.run(&["umount", "--force", &mnt]);
    b.run(&["doctor"]);
    let still = is_mounted(&b.mnt());
    let status = Command::new("umount").arg(&mnt).status().unwrap();
    assert!(still && status.success());
    assert!(refusal(refused, 5).contains("tmpfs"));
    assert!(refusal(left, 4).contains("tmpfs"));
    refusal(forced, 4);
    assert!(!b.store().exists());
}

#[test]
fn a_signal_stops_cleanly() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    for name in ["TERM", "INT"] {
        let mut daemon = b.foreground(&[]);
        touch(&b.file(&format!("vm/snapshots/{name}.img")));
        signal(daemon.id(), name);
        assert_eq!(daemon.wait().unwrap().code(), Some(0), "{name}");
        assert!(!is_mounted(&b.mnt()), "{name}");
    }
    assert_eq!(b.json(&["snapshot", "list"]).as_array().unwrap().len(), 2);

    // A busy mount is detached, and its users are cut off after a while.
    let mut daemon = b.foreground(&[]);
    let mut holder = Command::new("sleep")
        .arg("1000")
        .current_dir(b.file("vm"))
        .spawn()
        .unwrap();
    signal(daemon.id(), "TERM");
    assert_eq!(daemon.wait().unwrap().code(), Some(0));
    assert!(!is_mounted(&b.mnt()));
    holder.kill().unwrap();
    holder.wait().unwrap();

    // The second signal does not wait.
    let mut daemon = b.foreground(&[]);
    let mut holder = Command::new("sleep")
        .arg("1000")
        .current_dir(b.file("vm"))
        .spawn()
        .unwrap();
    signal(daemon.id(), "TERM");
    eventually("the mount is detached", || !is_mounted(&b.mnt()));
    signal(daemon.id(), "TERM");
    // What waits for the users of the mount ends otherwise.
    assert_eq!(daemon.wait().unwrap().code(), Some(130));
    holder.kill().unwrap();
    holder.wait().unwrap();
    b.ok(&["check"]);
}

/// Somebody else's `umount` ends the daemon as cleanly as our own.
#[test]
fn an_unmount_from_outside_ends_the_daemon() {
    if !can_mount() || !is_root() {
        return;
    }
    let b = Bench::new();
    b.mount();
    let pid = b.pid().unwrap();
    touch(&b.file("vm/snapshots/a.img"));
    assert!(
        Command::new("umount")
            .arg(b.mnt())
            .status()
            .unwrap()
            .success()
    );
    eventually("the daemon ends", || ended(pid));
    assert!(!b.store().join("control.sock").exists());
    assert_eq!(b.json(&["status"])["volumes"][0]["state"], "active");
}

#[test]
fn systemd_is_told() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    let path = b.at("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let hear = || {
        let mut bytes = [0; 4096];
        let len = socket.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    };
    let environment = [
        ("NOTIFY_SOCKET", path.to_str().unwrap()),
        ("WATCHDOG_USEC", "200000"),
    ];
    let mut daemon = b.foreground(&environment);
    let mut heard = Vec::new();
    while !heard.iter().any(|text: &String| text.contains("READY=1")) {
        heard.push(hear());
    }
    assert!(
        heard.iter().any(|text| text.contains("STATUS=Serving")),
        "{heard:?}"
    );
    for _ in 0..3 {
        while !hear().contains("WATCHDOG=1") {}
    }
    signal(daemon.id(), "TERM");
    while !hear().contains("STOPPING=1") {}
    assert_eq!(daemon.wait().unwrap().code(), Some(0));
}

/// The unit is sound, and makes no mount namespace that would hide the mount.
#[test]
fn the_unit_file_is_sound() {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/stillframe.service");
    let text = fs::read_to_string(unit).unwrap();
    let hiding = [
        "Protect",
        "Private",
        "ReadOnly",
        "ReadWrite",
        "Inaccessible",
        "Bind",
        "Root",
        "Mount",
        "TemporaryFileSystem",
        "Exec=",
        "NoExecPaths",
        "DynamicUser",
        "RestrictFileSystems",
    ];
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        assert!(!hiding.iter().any(|word| line.starts_with(word)), "{line}");
    }
    assert!(text.contains("\nType=notify\n"));
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("stillframe.service");
    fs::write(&copy, text.replace("/usr/local/bin/stillframe", BINARY)).unwrap();
    match Command::new("systemd-analyze")
        .arg("verify")
        .arg(&copy)
        .output()
    {
        Ok(out) => {
            let said = String::from_utf8_lossy(&out.stderr).into_owned();
            assert!(
                out.status.success() && !said.contains("stillframe.service"),
                "{said}"
            );
        }
        Err(e) => {
            skip(&format!("systemd-analyze: {e}"));
        }
    }
}

#[test]
fn damaged_and_newer_stores_are_refused() {
    let b = Bench::new();
    b.ok(&["volume", "add", "vm", b.at("disk.img").to_str().unwrap()]);
    let path = b.store().join("superblock");
    let good = fs::read(&path).unwrap();
    fs::write(&path, vec![0xa5; good.len()]).unwrap();
    b.refused(&["check"], 7);
    b.refused(&["mount", b.mnt().to_str().unwrap()], 7);
    assert!(!is_mounted(&b.mnt()));
    fs::write(&path, &good).unwrap();
    b.ok(&["check"]);
    fs::remove_file(&path).unwrap();
    b.refused(&["status"], 7);
    // Without a superblock a log is not taken for an empty directory.
    b.refused(
        &["mount", "--volume", &b.volume(), b.mnt().to_str().unwrap()],
        7,
    );
}

/// Another user has no business in a store.
#[test]
fn rights_are_kept() {
    if !is_root() {
        return;
    }
    let b = Bench::new();
    b.ok(&["volume", "add", "vm", b.at("disk.img").to_str().unwrap()]);
    // The binary and the directory must be within the other user's reach, or it proves nothing.
    fs::set_permissions(b.top.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let copy = b.at("program");
    fs::copy(BINARY, &copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    let nobody = |args: &[&str]| {
        let mut command = Command::new(&copy);
        command
            .args(args)
            .arg("--store")
            .arg(b.store())
            .uid(65534)
            .gid(65534);
        command
            .current_dir("/")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    assert_eq!(nobody(&["--version"]).status.code(), Some(0));
    refusal(nobody(&["volume", "list"]), 9);
    refusal(nobody(&["mount", b.mnt().to_str().unwrap()]), 9);
    fs::set_permissions(b.store(), fs::Permissions::from_mode(0o777)).unwrap();
    let said = b.refused(&["volume", "list"], 9);
    assert!(said.contains("store"), "{said}");
    let findings = b.run(&["doctor", "--json"]);
    assert_eq!(findings.status.code(), Some(1));
}

/// Paths of any length and with any character: sockets, mount table and messages cope.
#[test]
fn odd_paths_work() {
    if !can_mount() {
        return;
    }
    let mut b = Bench::new();
    let odd = format!("a b,c=d\\e%41\n{}", "x".repeat(120));
    fs::create_dir_all(b.top.path().join(&odd)).unwrap();
    let top = b.at(&odd);
    let (mnt, store) = (top.join("m n"), top.join("store"));
    fs::create_dir(&mnt).unwrap();
    let run = |args: &[&str]| {
        let mut command = program();
        command
            .args(args)
            .arg("--store")
            .arg(&store)
            .arg("--")
            .output()
            .unwrap()
    };
    let mount = |b: &Bench| {
        let mut command = program();
        command
            .args(["mount", "--volume", &b.volume(), "--store"])
            .arg(&store)
            .arg(&mnt);
        command.output().unwrap()
    };
    expect(mount(&b), 0);
    touch(&mnt.join("vm/snapshots/a.img"));
    let status = run(&["status", "--json"]);
    let status: Value = serde_json::from_str(&expect(status, 0)).unwrap();
    assert_eq!(status["volumes"][0]["snapshots"][0]["name"], "a");
    let pid = u32::try_from(status["pid"].as_u64().unwrap()).unwrap();
    expect(program().arg("umount").arg(&mnt).output().unwrap(), 0);
    assert!(ended(pid));
    // A stale one is found and cleaned too.
    expect(mount(&b), 0);
    let status: Value = serde_json::from_str(&expect(run(&["status", "--json"]), 0)).unwrap();
    let pid = u32::try_from(status["pid"].as_u64().unwrap()).unwrap();
    signal(pid, "KILL");
    eventually("the daemon is gone", || ended(pid));
    let said = expect(program().arg("umount").arg(&mnt).output().unwrap(), 0);
    assert!(
        said.contains("cleaned the stale mount") && !said.trim_end().contains('\n'),
        "{said}"
    );
    b.top.disable_cleanup(false);
}

/// A reader that goes away is no failure; a full disk is.
#[test]
fn output_that_cannot_be_written() {
    let b = Bench::new();
    b.ok(&["volume", "add", "vm", b.at("disk.img").to_str().unwrap()]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let out = b
        .command(&["volume", "list"])
        .stdout(writer)
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(0));
    assert!(
        out.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    refusal(
        b.command(&["volume", "list"])
            .stdout(full)
            .output()
            .unwrap(),
        8,
    );
}

#[test]
fn completions_and_manual_pages() {
    let b = Bench::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(b.ok(&["completions", shell]).contains("umount"), "{shell}");
    }
    b.ok(&["man", b.mnt().to_str().unwrap()]);
    let page = fs::read_to_string(b.file("stillframe-snapshot-create.1")).unwrap();
    assert!(page.contains("VOL@NAME"), "{page}");
    b.refused(&["man", b.at("absent").to_str().unwrap()], 4);
    // What belongs to later versions is absent, not stubbed.
    let help = b.ok(&["--help"]);
    for later in ["backup", "restore", "migrate"] {
        assert!(!help.contains(later), "{later}: {help}");
        assert_eq!(b.run(&[later]).status.code(), Some(2), "{later}");
    }
    for there in ["clone", "bookmark", "snapshot", "diff", "check", "scrub"] {
        assert!(help.contains(there), "{there}: {help}");
    }
}

/// The demo holds, cleans up, and with `--keep` leaves what it says.
#[test]
fn the_demo_works() {
    if !can_mount() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let demo = |args: &[&str]| {
        let mut command = program();
        command.arg("demo").args(args).env("TMPDIR", temp.path());
        command
    };
    let said = expect(demo(&[]).output().unwrap(), 0);
    assert!(said.matches("   ok: ").count() >= 8, "{said}");
    assert_eq!(
        fs::read_dir(temp.path()).unwrap().count(),
        0,
        "the demo left something behind"
    );

    let said = expect(demo(&["--keep"]).output().unwrap(), 0);
    let kept = fs::read_dir(temp.path())
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let mnt = kept.join("mnt");
    let live = mnt.join("disk/live.img");
    let (there, shown) = (live.exists(), said.contains(live.to_str().unwrap()));
    let umount = said
        .lines()
        .find_map(|line| line.trim().strip_prefix("$ stillframe umount "));
    let umount = umount.map(str::to_owned);
    expect(
        program()
            .args(["umount", mnt.to_str().unwrap()])
            .output()
            .unwrap(),
        0,
    );
    assert!(there && shown, "{said}");
    assert_eq!(umount.as_deref(), mnt.to_str());

    // Ctrl-C in the middle: nothing is left mounted or lying about.
    fs::remove_dir_all(&kept).unwrap();
    let mut child = demo(&[])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("mount ")));
    signal(child.id(), "INT");
    let mut rest = String::new();
    while let Some(Ok(line)) = lines.next() {
        rest.push_str(&line);
    }
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest}");
    assert_eq!(
        fs::read_dir(temp.path()).unwrap().count(),
        0,
        "Ctrl-C left something behind"
    );
}

/// The daemon lets go of the terminal and of whatever its starter had open.
#[test]
fn the_daemon_is_on_its_own() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    let log = b.at("daemon.log");
    let args = [
        "mount",
        "--log",
        log.to_str().unwrap(),
        "--volume",
        &b.volume(),
    ];
    let mut child = b
        .command(&args)
        .arg(b.mnt())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Ends when the last writer of the pipe is gone: a daemon that kept it would hang this read.
    let mut said = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert!(child.wait().unwrap().success());
    let pid = b.pid().unwrap();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session: u32 = stat
        .rsplit_once(") ")
        .unwrap()
        .1
        .split(' ')
        .nth(3)
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(session, pid, "a session of its own");
    for fd in 0..3 {
        let to = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
        assert_eq!(to, Path::new("/dev/null"));
    }
    assert!(fs::read_to_string(&log).unwrap().contains("serving store"));
    assert_eq!(fs::metadata(&log).unwrap().mode() & 0o777, 0o600);
    let socket = fs::metadata(b.store().join("control.sock")).unwrap();
    assert_eq!(socket.mode() & 0o777, 0o600);
    b.umount();
}

/// Nonsense on the control socket is answered, and the daemon serves on.
#[test]
fn the_control_socket_takes_nonsense() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    b.mount();
    let dir = File::open(b.store()).unwrap();
    let path = format!(
        "/proc/self/fd/{}/control.sock",
        std::os::fd::AsRawFd::as_raw_fd(&dir)
    );
    for nonsense in [
        &b"\n"[..],
        b"{}\n",
        b"\xff\x00\n",
        b"{\"do\":\"unmount\"}\n",
        b"x",
    ] {
        let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
        stream.write_all(nonsense).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("{\"error\":"), "{answer}");
    }
    assert!(b.file("vm/live.img").exists());
    b.umount();
}

/// The documents: the two commands stand on the first screen, links lead somewhere, every command and
/// exit code is as the program has it.
#[test]
fn the_documents_are_true() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let screen: String = readme.lines().take(24).collect::<Vec<_>>().join("\n");
    for needed in [
        "cargo run --release -- demo",
        "cargo test",
        "only through `live.img`",
    ] {
        assert!(screen.contains(needed), "not on the first screen: {needed}");
    }
    let mut pages = vec![root.join("README.md")];
    pages.extend(
        fs::read_dir(root.join("docs"))
            .unwrap()
            .map(|entry| entry.unwrap().path()),
    );
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        for link in text
            .split("](")
            .skip(1)
            .map(|rest| rest.split(')').next().unwrap())
        {
            let file = link.split('#').next().unwrap();
            let there = file.starts_with("https://") || page.parent().unwrap().join(file).exists();
            assert!(there, "{}: {link} leads nowhere", page.display());
        }
        for line in text
            .lines()
            .map(str::trim_start)
            .filter(|l| l.starts_with("stillframe "))
        {
            let line = line.split('#').next().unwrap();
            let words: Vec<&str> = line.split_whitespace().skip(1).collect();
            // The words before the first argument are the command; its help must exist.
            let is_command = |w: &&&str| w.bytes().all(|b| b.is_ascii_lowercase());
            let command: Vec<&&str> = words.iter().take_while(is_command).collect();
            let known = (1..=command.len().min(2)).any(|n| {
                let mut help = program();
                help.args(command[..n].iter().copied()).arg("--help");
                help.output().unwrap().status.success()
            });
            assert!(known, "{}: {line}", page.display());
        }
    }
    let help = String::from_utf8(program().arg("--help").output().unwrap().stdout).unwrap();
    for code in ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "130"] {
        assert!(readme.contains(&format!("\n| {code} | ")), "README: {code}");
        assert!(help.contains(&format!(" {code} ")), "--help: {code}");
    }
}

/// The backup job of the examples: copies, verifies, prunes, and leaves nothing half done.
#[test]
fn the_backup_example_works() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    b.mount();
    fs::create_dir(b.at("backups")).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/backup.sh");
    let job = |keep: &str| {
        let mut command = Command::new("bash");
        command
            .arg(&script)
            .arg(b.mnt())
            .arg("vm")
            .arg(b.at("backups"))
            .arg(keep);
        command.output().unwrap()
    };
    let mut made = Vec::new();
    for round in 0..3 {
        let live = OpenOptions::new()
            .write(true)
            .open(b.file("vm/live.img"))
            .unwrap();
        live.write_all_at(&[round; 9000], 1000).unwrap();
        drop(live);
        let path = PathBuf::from(expect(job("2"), 0).trim_end());
        assert_eq!(
            fs::read(&path).unwrap(),
            fs::read(b.file("vm/live.img")).unwrap()
        );
        made.push(path);
        // The stamp has a resolution of one second.
        std::thread::sleep(Duration::from_millis(1100));
    }
    let mut left: Vec<_> = fs::read_dir(b.at("backups"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    left.sort();
    assert_eq!(left, made[1..]);
    assert_eq!(fs::read_dir(b.file("vm/snapshots")).unwrap().count(), 0);
    expect(job("none"), 2);
    b.umount();
}

/// A source that was changed or taken away while nobody watched is noticed, and `accept` is the way out.
#[test]
fn a_source_that_is_not_as_we_left_it() {
    let b = Bench::new();
    b.ok(&["volume", "add", "vm", b.at("disk.img").to_str().unwrap()]);
    b.ok(&["snapshot", "create", "vm@a"]);
    let state = || b.json(&["volume", "show", "vm"])["state"].clone();
    assert_eq!(state(), "active");
    let file = OpenOptions::new()
        .write(true)
        .open(b.at("disk.img"))
        .unwrap();
    file.write_all_at(b"somebody else was here", 5000).unwrap();
    drop(file);
    assert_eq!(state(), "changed");
    let shown = b.ok(&["status"]);
    assert!(shown.contains("vm is changed: "), "{shown}");
    let checked = expect(b.run(&["check"]), 7);
    assert!(checked.contains("volume vm is changed"), "{checked}");
    b.ok(&["volume", "accept", "vm"]);
    assert_eq!(state(), "active");
    b.ok(&["check"]);
    fs::rename(b.at("disk.img"), b.at("away.img")).unwrap();
    assert_eq!(state(), "missing");
    let checked = expect(b.run(&["check"]), 3);
    assert!(checked.contains("volume vm is missing"), "{checked}");
    fs::rename(b.at("away.img"), b.at("disk.img")).unwrap();
    let state = state();
    // A rename moves the change time, so the file counts as changed by somebody.
    assert!(state == "changed" || state == "active", "{state}");
}

/// A daemon whose starter is gone before it served (Ctrl-C on `mount`) ends as if it had been told to.
#[test]
fn a_mount_nobody_waits_for_ends() {
    use stillframe::daemon::serve::{self, Announce, Config, Log};
    struct Deaf(bool);
    impl Announce for Deaf {
        fn note(&mut self, _: &str) {}
        fn ready(&mut self) -> bool {
            self.0 = true;
            false
        }
    }
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    let config = Config {
        store: b.store(),
        mountpoint: b.mnt(),
        volumes: vec![("vm".into(), b.at("disk.img").to_str().unwrap().into())],
        choices: stillframe::daemon::protocol::Choices::default(),
        allow_other: false,
        limit: None,
        segment_size: None,
        limits: stillframe::daemon::watchdog::Limits {
            named_after: None,
            abort_after: None,
        },
        log: Log::File(b.at("log")),
    };
    let mut deaf = Deaf(false);
    serve::run(&config, &mut deaf).unwrap();
    assert!(deaf.0, "it got as far as serving");
    assert!(!is_mounted(&b.mnt()));
    b.ok(&["check"]);
}

/// Clones by command: of a snapshot, of a clone, listed, renamed, deleted; and as the mount shows them.
#[test]
fn clones_by_command() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    let before = fs::read(b.at("disk.img")).unwrap();
    b.mount();
    b.ok(&["snapshot", "create", "vm@a"]);
    let made = b.json(&["clone", "create", "vm@a", "work"]);
    assert_eq!(
        (&made[0]["name"], &made[0]["size"]),
        (&"work".into(), &SIZE.into())
    );
    let clone = OpenOptions::new()
        .write(true)
        .open(b.file("vm/clones/work.img"))
        .unwrap();
    clone.write_all_at(&[7; 4096], 8192).unwrap();
    drop(clone);
    b.ok(&["clone", "create", "vm/work", "copy"]);
    let mut expected = before.clone();
    expected[8192..12_288].fill(7);
    assert_eq!(fs::read(b.file("vm/clones/copy.img")).unwrap(), expected);
    assert_eq!(fs::read(b.file("vm/live.img")).unwrap(), before);
    for (of, name, code) in [
        ("vm@a", "work", 5),
        ("vm/copy", "work", 5),
        ("vm@x", "new", 4),
        ("vm/x", "new", 4),
        ("x@a", "new", 4),
        ("x/a", "new", 4),
    ] {
        b.refused(&["clone", "create", of, name], code);
    }
    for args in [&["vm", "new"][..], &["vm@a", "live"], &["vm@a/b", "new"]] {
        let out = b.run(&[&["clone", "create"], args].concat());
        assert_eq!(out.status.code(), Some(2), "{args:?}");
    }
    b.ok(&["clone", "rename", "vm/copy", "kept"]);
    b.refused(&["clone", "rename", "vm/copy", "other"], 4);
    b.refused(&["clone", "rename", "vm/work", "kept"], 5);
    let list = b.json(&["clone", "list", "vm"]);
    let names: Vec<_> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|c| &c["name"])
        .collect();
    assert_eq!(names, ["kept", "work"]);
    let snapshot = &b.json(&["snapshot", "list"])[0]["uuid"];
    for clone in list.as_array().unwrap() {
        assert_eq!(
            (&clone["base"], &clone["base_name"]),
            (snapshot, &"a".into())
        );
        assert_eq!(clone["state"], "active");
    }
    let text = b.ok(&["clone", "list"]);
    assert!(
        text.starts_with("CLONE") && text.contains("vm/kept"),
        "{text}"
    );
    // The base may go; the clones stay, also over a restart, and without a daemon.
    b.ok(&["snapshot", "delete", "vm@a"]);
    b.ok(&["clone", "delete", "vm/work"]);
    let status = b.json(&["status"]);
    let clones = status["volumes"][0]["clones"].as_array().unwrap();
    assert_eq!(clones.len(), 1);
    assert_eq!(
        (&clones[0]["name"], &clones[0]["base_name"]),
        (&"kept".into(), &Value::Null)
    );
    let metrics = fs::read_to_string(b.file(".stillframe/metrics.prom")).unwrap();
    assert!(metrics.contains("stillframe_volume_clones{volume=\"vm\"} 1\n"));
    assert!(b.ok(&["status"]).contains("vm/kept"));
    b.refused(&["volume", "remove", "vm"], 5);
    b.umount();
    assert_eq!(b.json(&["clone", "list"])[0]["name"], "kept");
    b.mount();
    assert_eq!(fs::read(b.file("vm/clones/kept.img")).unwrap(), expected);
    b.umount();
    b.ok(&["clone", "delete", "vm/kept"]);
    b.refused(&["clone", "delete", "vm/kept"], 4);
    b.ok(&["volume", "remove", "vm"]);
}

/// Bookmarks by command: an incremental starts from one, with and without a daemon.
#[test]
fn bookmarks_by_command() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    b.mount();
    touch(&b.file("vm/snapshots/a.img"));
    let live = OpenOptions::new()
        .write(true)
        .open(b.file("vm/live.img"))
        .unwrap();
    live.write_all_at(&[7; 5000], 3000).unwrap();
    drop(live);
    touch(&b.file("vm/snapshots/b.img"));
    let before = b.json(&["diff", "vm@a..b"]);
    let listed = b.json(&["snapshot", "list"])[0].clone();
    b.ok(&["snapshot", "delete", "--keep-bookmark", "vm@a"]);
    assert!(!b.file("vm/snapshots/a.img").exists());
    let inside = fs::read(b.file("vm/diffs/a..b.json")).unwrap();
    let inside: Value = serde_json::from_slice(&inside).unwrap();
    assert_eq!(inside, before);
    let status = b.json(&["status"]);
    let mark = status["volumes"][0]["bookmarks"][0].clone();
    for field in ["volume", "name", "uuid", "epoch", "time", "size", "state"] {
        assert_eq!(mark[field], listed[field], "{field}");
    }
    b.refused(&["snapshot", "create", "vm@a"], 5);
    for mounted in [true, false] {
        assert_eq!(b.json(&["diff", "vm@a..b"]), before);
        assert_eq!(b.json(&["diff", "vm@a..live"])["from_uuid"], listed["uuid"]);
        b.refused(&["diff", "vm@b..a"], 4);
        assert_eq!(b.json(&["bookmark", "list", "vm"])[0], mark);
        let text = b.ok(&["bookmark", "list"]);
        assert!(
            text.starts_with("BOOKMARK") && text.contains("vm@a"),
            "{text}"
        );
        b.refused(&["bookmark", "delete", "vm@b"], 4);
        b.refused(&["bookmark", "list", "x"], 4);
        b.refused(&["snapshot", "delete", "vm@a"], 4);
        if mounted {
            b.umount();
        }
    }
    b.ok(&["bookmark", "delete", "vm@a"]);
    b.refused(&["diff", "vm@a..b"], 4);
    assert_eq!(b.json(&["bookmark", "list"]), Value::Array(vec![]));
    b.ok(&["snapshot", "create", "vm@a"]);
}

/// Revert by command: busy while somebody writes, forced, undone; with and without a daemon.
#[test]
fn a_volume_is_reverted_by_command() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    let before = fs::read(b.at("disk.img")).unwrap();
    b.mount();
    b.ok(&["snapshot", "create", "vm@a"]);
    let live = OpenOptions::new()
        .read(true)
        .write(true)
        .open(b.file("vm/live.img"))
        .unwrap();
    live.write_all_at(&[7; 5000], 3000).unwrap();
    let said = b.refused(&["snapshot", "revert", "vm@a"], 5);
    assert!(said.contains("--force"), "{said}");
    b.refused(&["snapshot", "revert", "vm@x"], 4);
    let text = b.ok(&["snapshot", "revert", "--force", "vm@a"]);
    assert!(
        text.contains("8.0K differed") && text.contains("undoes it"),
        "{text}"
    );
    assert_eq!(fs::read(b.file("vm/live.img")).unwrap(), before);
    live.write_all_at(&[9; 10], 0).unwrap();
    drop(live);
    let mut after = before.clone();
    after[..10].fill(9);
    assert_eq!(fs::read(b.file("vm/live.img")).unwrap(), after);
    // The last writer's close may not have come through yet.
    eventually("nobody writes", || {
        b.run(&["snapshot", "revert", "vm@a"]).status.success()
    });
    assert_eq!(fs::read(b.file("vm/live.img")).unwrap(), before);
    b.umount();
    assert_eq!(fs::read(b.at("disk.img")).unwrap(), before);
    let list = b.json(&["snapshot", "list"]);
    let undo = list.as_array().unwrap().last().unwrap();
    let target = format!("vm@{}", undo["name"].as_str().unwrap());
    let done = b.json(&["snapshot", "revert", &target]);
    assert_eq!(done["written"], 4096);
    assert!(done["undo"]["uuid"].is_string());
    assert_eq!(fs::read(b.at("disk.img")).unwrap(), after);
}

/// Resize by command: grown and shrunk, exactly or by so much, and what is refused.
#[test]
fn a_volume_is_resized_by_command() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    let before = fs::read(b.at("disk.img")).unwrap();
    b.mount();
    b.ok(&["snapshot", "create", "vm@a"]);
    let size = |path: &str| fs::metadata(b.file(path)).unwrap().len();
    b.ok(&["volume", "resize", "vm", "+64K"]);
    assert_eq!(size("vm/live.img"), SIZE + 65_536);
    assert_eq!(size("vm/snapshots/a.img"), SIZE);
    let writer = OpenOptions::new()
        .write(true)
        .open(b.file("vm/live.img"))
        .unwrap();
    b.ok(&["volume", "resize", "vm", "2M"]);
    b.refused(&["volume", "resize", "vm", "1M"], 5);
    drop(writer);
    for bad in ["", "1X", "-1M"] {
        let out = b.run(&["volume", "resize", "vm", "--", bad]);
        assert_eq!(out.status.code(), Some(2), "{bad}");
    }
    b.refused(&["volume", "resize", "x", "1M"], 4);
    b.refused(&["volume", "resize", "vm", "+16777215T"], 1);
    b.umount();
    assert_eq!(fs::metadata(b.at("disk.img")).unwrap().len(), 2 << 20);
    b.ok(&["volume", "resize", "vm", "8K"]);
    assert_eq!(b.json(&["volume", "show", "vm"])["size"], 8192);
    assert_eq!(fs::read(b.at("disk.img")).unwrap(), before[..8192]);
    b.mount();
    assert_eq!(size("vm/live.img"), 8192);
    assert_eq!(fs::read(b.file("vm/snapshots/a.img")).unwrap(), before);
    let diff = b.json(&["diff", "vm@a..live"]);
    assert_eq!(diff["size"], 8192);
    b.umount();
    b.ok(&["check"]);
}

/// Under memory pressure the kernel must not make a thread of the daemon wait for the writing back of
/// what only the daemon can take: every one is an I/O flusher, or the log says why none can be.
#[test]
fn the_daemon_s_threads_are_io_flushers_as_far_as_rights_go() {
    // PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE of the kernel's task flags.
    const FLUSHER: u64 = 0x0008_0000 | 0x0010_0000;
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    let (log, mnt) = (b.at("daemon.log"), b.mnt());
    let (log, mnt) = (log.to_str().unwrap(), mnt.to_str().unwrap());
    b.ok(&["mount", "--log", log, "--volume", &b.volume(), mnt]);
    fs::write(b.file("vm/live.img"), vec![1; 65_536]).unwrap();
    let refused = fs::read_to_string(log).unwrap().contains("I/O flusher");
    let pid = b.json(&["status"])["pid"].as_u64().unwrap();
    let mut threads = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let stat = fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
        let (head, rest) = stat.rsplit_once(") ").unwrap();
        let flags: u64 = rest.split(' ').nth(6).unwrap().parse().unwrap();
        let is = flags & FLUSHER == FLUSHER;
        assert!(is != refused, "{head}): flags {flags:#x}, said: {refused}");
        threads += 1;
    }
    assert!(threads > 1);
    b.umount();
}
