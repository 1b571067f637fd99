//! Rows 31, 32 and 33: what hangs, mounts that do not want to go, and mounts whose daemon has died.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{errno, image, is_root, log, refused, served, status, writable};
use crate::rig::{
    Attached, Rig, Running, can_loop, can_mount, ended, eventually, gone, is_mounted, must, signal,
    touch,
};

/// A filesystem that can be frozen, so that whoever writes to it hangs.
struct Freezer {
    at: PathBuf,
    _attached: Attached,
}

impl Freezer {
    fn new(rig: &Rig) -> Freezer {
        let file = rig.source("freezer", 32 << 20);
        must("mkfs.ext4", &["-q", file.to_str().unwrap()]);
        let at = rig.at("frozen");
        fs::create_dir(&at).unwrap();
        let mut attached = Attached::new(&file);
        attached.mount(&at);
        Freezer {
            at,
            _attached: attached,
        }
    }

    fn freeze(&self) {
        must("fsfreeze", &["--freeze", self.at.to_str().unwrap()]);
    }

    fn thaw(&self) {
        must("fsfreeze", &["--unfreeze", self.at.to_str().unwrap()]);
    }
}

/// A process that writes one block to a file, and the number of its error or 0.
fn writer(file: &Path) -> Child {
    let of = format!("of={}", file.to_str().unwrap());
    let mut dd = Command::new("dd");
    dd.args(["if=/dev/zero", &of, "bs=4096", "count=1", "conv=notrunc"]);
    dd.stdout(Stdio::null()).stderr(Stdio::null());
    dd.spawn().unwrap()
}

/// A source that does not answer: named in the log and in the status, with volume, age and the call that
/// hangs; the rest goes on; and no longer named when it is over.
#[test]
fn what_hangs_is_named() {
    if !can_mount() || !can_loop() {
        return;
    }
    let mut rig = Rig::new();
    let freezer = Freezer::new(&rig);
    let source = freezer.at.join("disk.img");
    fs::write(&source, vec![5; 1 << 20]).unwrap();
    let other = image(&rig, "other.img");
    rig.mount_with(&[
        "--stuck-after=1",
        "--volume",
        &format!("vm={}", source.display()),
        "--volume",
        &format!("other={}", other.display()),
    ]);
    assert_eq!(status(&rig)["stuck"].as_array().unwrap().len(), 0);
    freezer.freeze();
    let mut hangs = Running(writer(&rig.live("vm")));
    eventually("the status names it", || {
        let report = status(&rig);
        report["stuck"].as_array().unwrap().iter().any(|row| {
            row["operation"] == "write"
                && row["subject"] == "vm"
                && row["seconds"].as_u64() >= Some(1)
        })
    });
    let report = status(&rig);
    let row = &report["stuck"][0];
    let phase = row["phase"].as_str().unwrap();
    assert_eq!(phase, format!("in a write of {}", source.display()));
    assert_eq!(report["unanswered"], false);
    let said = rig.ok(&["status"]);
    assert!(said.contains("stuck: write on vm for "), "{said}");
    eventually("the log names it", || {
        log(&rig).contains("stuck: write on vm for ")
    });
    let metrics = fs::read_to_string(rig.mnt().join(".stillframe/metrics.prom")).unwrap();
    assert!(
        metrics.contains("\nstillframe_stuck_requests 1\n"),
        "{metrics}"
    );
    // The other volume does not notice.
    writable(&rig.live("other"))
        .write_all_at(&[1; 100], 0)
        .unwrap();
    touch(&rig.snapshot("other", "a")).unwrap();
    assert!(hangs.0.try_wait().unwrap().is_none());
    // SIGUSR1 writes what is under way to the log.
    signal(rig.pid(), "USR1");
    eventually("the log has it, by name", || {
        let log = log(&rig);
        let told = log.split_once("are under way").map(|(_, told)| told);
        told.is_some_and(|told| told.contains("INFO stillframe::daemon::events: write on vm for "))
    });
    freezer.thaw();
    assert!(hangs.0.wait().unwrap().success());
    eventually("it is over", || {
        status(&rig)["stuck"].as_array().unwrap().is_empty()
    });
    eventually("the log says so", || {
        log(&rig).contains("no longer stuck: write on vm")
    });
    rig.umount();
}

/// The wait of a full store is meant to be long: nobody calls it stuck, neither the writer nor who waits for
/// him.
#[test]
fn a_wait_for_space_is_not_stuck() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new();
    let source = rig.source("disk.img", 64 << 20);
    fs::write(&source, vec![5; 64 << 20]).unwrap();
    rig.mount_with(&[
        "--stuck-after=1",
        "--abort-stuck=1",
        "--limit=24M",
        "--segment-size=4M",
        "--on-full-wait=600",
        "--volume",
        &format!("vm={}", source.display()),
    ]);
    touch(&rig.snapshot("vm", "a")).unwrap();
    let live = rig.live("vm");
    let of = format!("of={}", live.to_str().unwrap());
    let mut dd = Command::new("dd");
    dd.args(["if=/dev/urandom", &of, "bs=1M", "count=48", "conv=notrunc"]);
    let mut waits = Running(dd.stderr(Stdio::null()).spawn().unwrap());
    let used = || status(&rig)["thin"]["free"].as_u64().unwrap();
    eventually("it is full", || used() < 4 << 20);
    // That something does not happen takes time to see: three times the limits.
    std::thread::sleep(Duration::from_secs(3));
    assert!(waits.0.try_wait().unwrap().is_none(), "it does not wait");
    assert_eq!(status(&rig)["stuck"].as_array().unwrap().len(), 0);
    assert!(!log(&rig).contains("stuck:"), "{}", log(&rig));
    rig.ok(&["snapshot", "delete", "vm@a"]);
    assert!(waits.0.wait().unwrap().success());
    rig.umount();
}

/// With `--abort-stuck` clients of a source that hangs get an error, and the mount is gone; nothing that was
/// acknowledged is lost.
#[test]
fn a_stuck_mount_is_cut_off_on_request() {
    if !can_mount() || !can_loop() {
        return;
    }
    let mut rig = Rig::new();
    let freezer = Freezer::new(&rig);
    let source = freezer.at.join("disk.img");
    fs::write(&source, vec![5; 1 << 20]).unwrap();
    let volume = format!("vm={}", source.display());
    rig.mount_with(&["--stuck-after=1", "--abort-stuck=2", "--volume", &volume]);
    touch(&rig.snapshot("vm", "a")).unwrap();
    let live = writable(&rig.live("vm"));
    live.write_all_at(&[7; 4096], 8192).unwrap();
    live.sync_all().unwrap();
    drop(live);
    let (pid, at) = (rig.pid(), rig.mnt());
    freezer.freeze();
    let start = Instant::now();
    // A process of its own: a descriptor of a mount that hangs would hang others who start programs.
    let mut client = Running(writer(&rig.live("vm")));
    let ended = client.0.wait().unwrap();
    let freed = start.elapsed();
    assert!(!ended.success());
    println!("freed after {freed:?}");
    assert!(!is_mounted(&at));
    assert!(log(&rig).contains("cutting the users of the mount off: write on vm"));
    freezer.thaw();
    eventually("the daemon ends", || gone(pid));
    rig.mount();
    let found = fs::read(rig.live("vm")).unwrap();
    assert!(found[8192..12288].iter().all(|&b| b == 7));
    assert!(
        fs::read(rig.snapshot("vm", "a"))
            .unwrap()
            .iter()
            .all(|&b| b == 5)
    );
    rig.umount();
}

/// A daemon that is stopped does not answer, and `umount` says so; `umount --force` frees its clients.
#[test]
fn force_frees_the_clients_of_a_stopped_daemon() {
    if !can_mount() || !is_root() {
        return;
    }
    let mut rig = served();
    touch(&rig.snapshot("vm", "a")).unwrap();
    signal(rig.pid(), "STOP");
    let mut client = Running(writer(&rig.live("vm")));
    eventually("the client hangs", || waits(client.0.id()));
    let start = Instant::now();
    let said = refused(&rig.umount_command().output().unwrap(), 6);
    assert!(said.contains("--force"), "{said}");
    println!("asked in vain for {:?}", start.elapsed());
    assert!(client.0.try_wait().unwrap().is_none(), "still hangs");
    freed(&mut rig, &mut client);
}

/// A client of such a daemon cannot even be killed; it ends with `umount --force`.
#[test]
fn force_ends_a_client_that_was_killed_in_vain() {
    if !can_mount() || !is_root() {
        return;
    }
    let mut rig = served();
    signal(rig.pid(), "STOP");
    let mut client = Running(writer(&rig.live("vm")));
    eventually("the client hangs", || waits(client.0.id()));
    signal(client.0.id(), "KILL");
    freed(&mut rig, &mut client);
}

/// Forces the mount of a stopped daemon: its client ends, and the store is fine.
fn freed(rig: &mut Rig, client: &mut Running) {
    let pid = rig.pid();
    let start = Instant::now();
    let out = rig.umount_command().arg("--force").output().unwrap();
    assert_eq!(out.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&out.stderr).contains(&pid.to_string()));
    assert!(!client.0.wait().unwrap().success());
    println!("forced in {:?}", start.elapsed());
    assert!(!is_mounted(&rig.mnt()));
    signal(pid, "CONT");
    eventually("the daemon ends", || gone(pid));
    rig.mount();
    rig.umount();
}

/// Whether a process sleeps in a system call.
fn waits(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let state = stat
        .rsplit_once(") ")
        .map(|(_, rest)| rest.starts_with(['D', 'S']));
    comm == "dd\n" && state == Some(true)
}

/// Unmounting never waits for ever, and says who is in the way: an open file and a working directory.
#[test]
fn an_unmount_names_who_is_in_the_way_and_ends() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    let mut tail = Command::new("tail");
    tail.args(["-f", "/dev/null"]).arg(rig.live("vm"));
    let tail = Running(tail.stdout(Stdio::null()).spawn().unwrap());
    let mut sleep = Command::new("sleep");
    let sleep = Running(sleep.arg("1000").current_dir(rig.mnt()).spawn().unwrap());
    eventually("the file is open", || {
        let fds = fs::read_dir(format!("/proc/{}/fd", tail.0.id())).unwrap();
        fds.flatten()
            .any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.ends_with("vm/live.img")))
    });
    let said = refused(&rig.umount_command().output().unwrap(), 5);
    for (name, holder) in [("tail", &tail), ("sleep", &sleep)] {
        let named = format!("{name} (pid {})", holder.0.id());
        assert!(said.contains(&named), "{said}");
    }
    assert!(rig.live("vm").exists());
    let pid = rig.pid();
    let out = rig.umount_command().arg("--lazy").output().unwrap();
    assert_eq!(out.status.code(), Some(0));
    assert!(!is_mounted(&rig.mnt()) && !ended(pid));
    drop((tail, sleep));
    eventually("the daemon ends with its last user", || gone(pid));
    rig.mount();
    rig.umount();
}

/// A clean stop that hangs: `umount` comes back and says what it waits for, a signal more ends it.
#[test]
fn an_unmount_that_cannot_finish_comes_back() {
    if !can_mount() || !can_loop() {
        return;
    }
    let rig = Rig::new();
    let freezer = Freezer::new(&rig);
    let source = image(&rig, "disk.img");
    // The store hangs, not the source.
    let store = freezer.at.join("store");
    let mut rig2 = Rig::with_store(store);
    rig2.mount_with(&["--volume", &format!("vm={}", source.display())]);
    let pid = rig2.pid();
    freezer.freeze();
    let start = Instant::now();
    let out = rig2.umount_command().arg("--wait=2").output().unwrap();
    let took = start.elapsed();
    let said = refused(&out, 5);
    assert!(
        said.contains("is not closed yet") && said.contains(&pid.to_string()),
        "{said}"
    );
    println!("came back after {took:?}");
    assert!(!is_mounted(&rig2.mnt()));
    freezer.thaw();
    eventually("it goes on by itself", || gone(pid));
    rig2.mount();
    assert_eq!(super::vm(&rig2)["state"], "active");
    rig2.umount();
}

/// The log lies on a filesystem that hangs: the daemon serves on, can be asked to stop, and is ended by the
/// second signal, although it can say nothing of all that.
#[test]
fn a_log_that_hangs_holds_up_nobody() {
    if !can_mount() || !can_loop() {
        return;
    }
    let mut rig = served();
    rig.umount();
    let freezer = Freezer::new(&rig);
    let log = freezer.at.join("daemon.log");
    let mut command = rig.command(&["mount", "--foreground"]);
    command.arg(rig.mnt()).arg("--log").arg(&log);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut daemon = Running(command.spawn().unwrap());
    let pid = daemon.0.id();
    eventually("it serves, and has said so", || {
        fs::read_to_string(&log).is_ok_and(|log| log.contains("serving store"))
    });
    let size = || fs::metadata(&log).unwrap().len();
    let before = size();
    freezer.freeze();
    // Something to log.
    signal(pid, "USR1");
    touch(&rig.snapshot("vm", "a")).unwrap();
    assert_eq!(status(&rig)["unanswered"], false);
    let mut sleep = Command::new("sleep");
    let sleep = Running(sleep.arg("1000").current_dir(rig.mnt()).spawn().unwrap());
    // Is said in the log, too: who uses it.
    signal(pid, "TERM");
    eventually("it is detached", || !is_mounted(&rig.mnt()));
    signal(pid, "TERM");
    eventually("it ends at once", || ended(pid));
    assert_eq!(size(), before, "the log did not hang");
    freezer.thaw();
    assert_eq!(daemon.0.wait().unwrap().code(), Some(130));
    drop(sleep);
    rig.mount();
    assert!(fs::read(rig.snapshot("vm", "a")).unwrap() == super::content("disk.img"));
    rig.umount();
}

/// Dead mounts: ours is replaced by the next mount at its place, named by `doctor`; a dead one of somebody
/// else beside it, and on the place where we want to be, is left alone.
#[test]
fn a_dead_mount_of_ours_is_replaced_and_no_other() {
    use stillframe::sys::mount::{Unmount, mount_fuse, unmount};
    if !can_mount() || !is_root() {
        return;
    }
    /// Unmounts somebody else's, also after a failure.
    struct Foreign(PathBuf);
    impl Drop for Foreign {
        fn drop(&mut self) {
            let _ = unmount(&self.0, Unmount::Lazy);
        }
    }
    let mut rig = served();
    let beside = rig.at("beside");
    fs::create_dir(&beside).unwrap();
    // As sshfs or another would leave it.
    drop(mount_fuse(&beside, "other:/somewhere", false).unwrap());
    let _foreign = Foreign(beside.clone());
    assert_eq!(errno(fs::metadata(&beside)), libc::ENOTCONN);
    rig.kill();
    assert_eq!(errno(fs::metadata(rig.mnt())), libc::ENOTCONN);
    let said = rig.mount();
    assert!(said.contains("cleaned the stale mount"), "{said}");
    assert!(rig.live("vm").exists());
    rig.kill();
    let findings = rig.ok(&["doctor"]);
    let at = rig.mnt();
    // Another test's doctor may have been faster.
    assert!(
        findings.contains(at.to_str().unwrap()) || !is_mounted(&at),
        "{findings}"
    );
    assert!(!is_mounted(&at));
    assert!(is_mounted(&beside), "not ours to take away");
    let out = rig.run(&["mount", beside.to_str().unwrap()]);
    assert!(refused(&out, 5).contains("other:/somewhere"));
    let out = rig.run(&["umount", "--force", beside.to_str().unwrap()]);
    refused(&out, 4);
    assert!(is_mounted(&beside));
    rig.mount();
    let file = File::open(rig.live("vm")).unwrap();
    drop(file);
    rig.umount();
}
