//! Real I/O errors under a real filesystem: under the log, and under a source.
//!
//! A device in memory (nbdkit with its error filter, nbdfuse, a loop device) carries an ext4 without a
//! journal and fails every write while a file exists. Promises that are shown: a write that could not be
//! preserved is refused and has changed nothing, the log goes on in a new segment when the device does,
//! snapshots are exact before and after a kill and a fresh look at the medium; a failed sync of a source
//! stays failed, the volume is suspect, and only an operator ends that.
//!
//! Needs root, loop devices, nbdkit and nbdfuse.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

#[path = "rig/mod.rs"]
mod rig;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use rig::{Attached, Rig, Running, can_loop, can_mount, eventually, must, skip};

const PAGE: usize = 4096;
const PAGES: u64 = 400;

fn page(of: u64, n: u64) -> Vec<u8> {
    let mut x = of.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ n.wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    };
    (0..PAGE).map(|_| next()).collect()
}

fn can_fail_a_device() -> bool {
    for tool in ["nbdkit", "nbdfuse"] {
        let mut there = Command::new(tool);
        let there = there.arg("--version").stdout(Stdio::null());
        if there.stderr(Stdio::null()).status().is_err() {
            return skip(&format!("no {tool}"));
        }
    }
    can_mount() && can_loop()
}

/// A filesystem whose device fails while a file exists. Fields are dropped in this order.
struct Failing {
    attached: Option<Attached>,
    at: PathBuf,
    trigger: PathBuf,
    fuse: Running,
    fuse_at: PathBuf,
    _nbd: Running,
}

impl Failing {
    fn new(top: &Path) -> Failing {
        let (socket, trigger) = (top.join("nbd.sock"), top.join("fail"));
        let (fuse_at, at) = (top.join("nbd"), top.join("fs"));
        fs::create_dir(&fuse_at).unwrap();
        fs::create_dir(&at).unwrap();
        let nbd = Command::new("nbdkit")
            .args(["-f", "-U"])
            .arg(&socket)
            .args(["--filter=error", "memory", "192M", "error-pwrite=EIO"])
            .arg("error-pwrite-rate=100%")
            .arg(format!("error-pwrite-file={}", trigger.display()))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let nbd = Running(nbd);
        eventually("nbdkit listens", || socket.exists());
        let fuse = Command::new("nbdfuse")
            .arg(&fuse_at)
            .arg("--unix")
            .arg(&socket)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut failing = Failing {
            attached: None,
            at,
            trigger,
            fuse: Running(fuse),
            fuse_at,
            _nbd: nbd,
        };
        let disk = failing.fuse_at.join("nbd");
        eventually("nbdfuse serves", || disk.exists());
        let mut attached = Attached::new(&disk);
        must(
            "mkfs.ext4",
            &["-q", "-O", "^has_journal", "-b", "4096", &attached.device],
        );
        attached.mount(&failing.at);
        failing.attached = Some(attached);
        failing
    }

    fn fail(&self, on: bool) {
        match on {
            true => drop(File::create(&self.trigger).unwrap()),
            false => fs::remove_file(&self.trigger).unwrap(),
        }
    }

    /// What the medium has, and nothing that only a cache had.
    fn look_afresh(&mut self) {
        self.attached.take().unwrap().detach();
        let disk = self.fuse_at.join("nbd");
        let mut attached = Attached::new(&disk);
        // A filesystem without a journal that met errors; repairs answer 1.
        let mut repair = Command::new("e2fsck");
        let mut path = std::env::var_os("PATH").unwrap_or_default();
        path.push(":/usr/sbin:/sbin");
        let out = repair
            .args(["-f", "-y", &attached.device])
            .env("PATH", path)
            .output()
            .unwrap();
        assert!(out.status.code().is_some_and(|c| c < 4), "{out:?}");
        attached.mount(&self.at);
        self.attached = Some(attached);
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.trigger);
        drop(self.attached.take());
        let mut unmount = Command::new("fusermount3");
        let _ = unmount.arg("-u").arg(&self.fuse_at).status();
        let _ = self.fuse.0.wait();
    }
}

fn read(path: &Path, n: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; PAGE];
    let file = File::open(path)?;
    file.read_exact_at(&mut bytes, n * PAGE as u64)?;
    Ok(bytes)
}

/// One test at a time: a filesystem that is looked at afresh must come back under its device number. A store
/// that was killed and comes back under another one within a boot takes itself for a copy.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn a_log_on_a_failing_device_refuses_and_goes_on_in_a_new_segment() {
    if !can_fail_a_device() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let top = tempfile::tempdir().unwrap();
    let mut failing = Failing::new(top.path());
    let mut rig = Rig::with_store(failing.at.join("store"));
    let source = rig.at("disk.img");
    let content: Vec<u8> = (0..PAGES).flat_map(|n| page(0, n)).collect();
    fs::write(&source, content).unwrap();
    let volume = format!("vm={}", source.display());
    rig.mount_with(&["--volume", &volume]);
    rig.ok(&["snapshot", "create", "vm@a"]);
    let live = rig.live("vm");
    let file = OpenOptions::new().write(true).open(&live).unwrap();
    let mut acked = vec![0; PAGES as usize];
    let mut refused = Vec::new();
    let segments = |rig: &Rig| fs::read_dir(rig.store().join("log")).unwrap().count();
    let before = segments(&rig);
    for n in 0..PAGES {
        match n {
            100 => failing.fail(true),
            200 => failing.fail(false),
            _ => {}
        }
        let wrote = file
            .write_all_at(&page(1, n), n * PAGE as u64)
            .and_then(|()| file.sync_data());
        match wrote {
            Ok(()) => acked[n as usize] = 1,
            Err(e) => {
                assert_eq!(e.raw_os_error(), Some(5), "{e}");
                refused.push(n);
            }
        }
    }
    println!("{} writes refused: {refused:?}", refused.len());
    assert!(refused.len() > 50, "{refused:?}");
    assert!(
        refused.iter().all(|n| (100..260).contains(n)),
        "{refused:?}"
    );
    assert!(segments(&rig) > before, "no new segment");
    let compare = |rig: &Rig, what: &str| {
        for n in 0..PAGES {
            let snapshot = read(&rig.snapshot("vm", "a"), n);
            assert!(snapshot.unwrap() == page(0, n), "{what}: snapshot page {n}");
            let now = read(&rig.live("vm"), n).unwrap();
            assert!(now == page(acked[n as usize], n), "{what}: live page {n}");
        }
    };
    drop(file);
    compare(&rig, "served");
    rig.kill();
    must("fusermount3", &["-u", "-z", rig.mnt().to_str().unwrap()]);
    failing.look_afresh();
    rig.mount();
    compare(&rig, "from the medium");
    rig.umount();
    let checked = rig.run(&["check", "--read-data"]);
    assert!(checked.status.success(), "{checked:?}");
}

#[test]
fn a_failed_sync_of_a_source_stays_failed_until_an_operator_accepts() {
    if !can_fail_a_device() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let top = tempfile::tempdir().unwrap();
    let failing = Failing::new(top.path());
    let mut rig = Rig::new();
    let source = failing.at.join("disk.img");
    let content: Vec<u8> = (0..PAGES).flat_map(|n| page(0, n)).collect();
    fs::write(&source, content).unwrap();
    must("sync", &["-f", source.to_str().unwrap()]);
    let volume = format!("vm={}", source.display());
    rig.mount_with(&["--volume", &volume]);
    let state = |rig: &Rig| {
        let text = rig.ok(&["volume", "list", "--json"]);
        let rows: serde_json::Value = serde_json::from_str(&text).unwrap();
        rows[0]["state"].as_str().unwrap().to_owned()
    };
    let file = OpenOptions::new().write(true).open(rig.live("vm")).unwrap();
    file.write_all_at(&page(1, 0), 0).unwrap();
    file.sync_data().unwrap();
    assert_eq!(state(&rig), "active");
    failing.fail(true);
    file.write_all_at(&page(1, 1), PAGE as u64).unwrap();
    assert_eq!(file.sync_data().unwrap_err().raw_os_error(), Some(5));
    failing.fail(false);
    assert_eq!(state(&rig), "suspect");
    // The device is good again, the promise is not.
    assert_eq!(file.sync_data().unwrap_err().raw_os_error(), Some(5));
    assert!(!rig.run(&["snapshot", "create", "vm@a"]).status.success());
    rig.ok(&["volume", "accept", "vm"]);
    assert_eq!(state(&rig), "active");
    file.write_all_at(&page(2, 1), PAGE as u64).unwrap();
    file.sync_data().unwrap();
    rig.ok(&["snapshot", "create", "vm@a"]);
    assert!(read(&rig.snapshot("vm", "a"), 1).unwrap() == page(2, 1));
    drop(file);
    rig.umount();
}
