//! Row 17: one store, one daemon; and a store that was copied.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{content, errno, image, is_root, refused, served, status, vm, writable};
use crate::rig::{
    Attached, Rig, can_loop, can_mount, eventually, is_mounted, must, setting, touch,
};

/// A second daemon is out at once, naming the first, by whatever path it comes.
#[test]
fn a_second_daemon_is_out_at_once() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    let pid = format!("process {}", rig.pid());
    fs::create_dir(rig.at("mnt2")).unwrap();
    let (mnt2, store) = (rig.at("mnt2"), rig.store());
    let mnt2 = mnt2.to_str().unwrap();
    std::os::unix::fs::symlink(&store, rig.at("link")).unwrap();
    let mut paths = vec![store.clone(), rig.at("link"), store.join("../store")];
    let bound = rig.at("bound");
    if is_root() {
        fs::create_dir(&bound).unwrap();
        must(
            "mount",
            &["--bind", store.to_str().unwrap(), bound.to_str().unwrap()],
        );
        paths.push(bound.clone());
    }
    for path in paths {
        let out = || {
            let start = Instant::now();
            let mut command = Command::new(crate::rig::BINARY);
            command.args(["mount", mnt2, "--store"]).arg(&path);
            let out = command.stdin(Stdio::null()).output().unwrap();
            (out, start.elapsed())
        };
        // A start that waits for the lock (2 s) does so every time; a busy machine is slow now and then.
        let mut tries = (0..20).map(|_| out());
        let found = tries.find(|(_, took)| *took < Duration::from_secs(1));
        if path == bound {
            must("umount", &[bound.to_str().unwrap()]);
        }
        let (out, took) = found.expect("a second daemon is refused in less than a second");
        let said = refused(&out, 6);
        assert!(said.contains(&pid), "{}: {said}", path.display());
        println!("refused by {} after {took:?}", path.display());
    }
    assert_eq!(status(&rig)["pid"], rig.pid());
    assert!(!is_mounted(&rig.at("mnt2")));
    rig.umount();
}

/// A hundred start at once: one serves, the others say so and are gone, and nothing is left of them.
#[test]
fn of_many_that_start_at_once_one_serves() {
    if !can_mount() {
        return;
    }
    let many = setting("STILLFRAME_RACERS", 24) as usize;
    let mut rig = served();
    rig.umount();
    let mut starting = Vec::new();
    for i in 0..many {
        let mnt = rig.at(&format!("mnt{i}"));
        fs::create_dir(&mnt).unwrap();
        let mut command = rig.command(&["mount", mnt.to_str().unwrap()]);
        command.arg("--log").arg(rig.at("daemon.log"));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        starting.push((mnt, command.spawn().unwrap()));
    }
    let mut serving = Vec::new();
    for (mnt, child) in starting {
        let out = child.wait_with_output().unwrap();
        if out.status.success() {
            serving.push(mnt);
        } else {
            let said = refused(&out, 6);
            assert!(said.contains("is in use by"), "{said}");
        }
    }
    assert_eq!(serving.len(), 1, "{serving:?}");
    let mounted = (0..many).filter(|i| is_mounted(&rig.at(&format!("mnt{i}"))));
    assert_eq!(mounted.count(), 1);
    let at = serving[0].to_str().unwrap();
    assert_eq!(status(&rig)["mountpoint"], at);
    rig.ok(&["umount", at]);
    rig.mount();
    rig.umount();
}

/// A copy made while the original served, and used after it: what the original has overwritten since is
/// not in the copy's log, so its snapshots would be wrong. They are not shown.
#[test]
fn a_copied_store_trusts_no_source() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    touch(&rig.snapshot("vm", "a")).unwrap();
    let store = rig.store();
    let top = rig.at("");
    let copy = |name: &str| {
        let to = top.join(name);
        must("cp", &["-a", store.to_str().unwrap(), to.to_str().unwrap()]);
        Rig::with_store(to)
    };
    // Beside the original it does not get the source.
    let mut other = copy("beside");
    other.mount();
    assert_eq!(vm(&other)["state"], "missing");
    other.umount();

    let mut after = copy("after");
    let live = writable(&rig.live("vm"));
    live.write_all_at(&[7; 9000], 3000).unwrap();
    live.sync_all().unwrap();
    drop(live);
    rig.kill();
    for round in 0..3 {
        let rig = if round == 2 { &mut other } else { &mut after };
        rig.mount();
        assert_eq!(vm(rig)["state"], "changed", "round {round}");
        let why = vm(rig)["reason"].to_string();
        assert!(round > 0 || why.contains("is a copy"), "{why}");
        assert_eq!(errno(fs::read(rig.snapshot("vm", "a"))), libc::EIO);
        let live = writable(&rig.live("vm"));
        assert_eq!(errno(live.write_at(&[1], 0)), libc::EIO);
        drop(live);
        rig.umount();
    }
    // The original is as it was.
    must("fusermount3", &["-u", "-z", rig.mnt().to_str().unwrap()]);
    rig.mount();
    assert_eq!(vm(&rig)["state"], "unverified");
    assert!(fs::read(rig.snapshot("vm", "a")).unwrap() == content("disk.img"));
    rig.umount();
    rig.mount();
    rig.ok(&["volume", "accept", "vm"]);
    rig.umount();
    // A copy of a store that was stopped cleanly is as good as the original, until one of them writes.
    let second = rig.at("second");
    must(
        "cp",
        &[
            "-a",
            rig.store().to_str().unwrap(),
            second.to_str().unwrap(),
        ],
    );
    let mut second = Rig::with_store(second);
    second.mount();
    assert_eq!(vm(&second)["state"], "active");
    assert!(fs::read(second.snapshot("vm", "a")).unwrap() == content("disk.img"));
    writable(&second.live("vm"))
        .write_all_at(&[9; 5000], 50_000)
        .unwrap();
    second.umount();
    rig.mount();
    assert_eq!(vm(&rig)["state"], "changed");
    eventually("the snapshot is refused", || {
        fs::read(rig.snapshot("vm", "a")).is_err()
    });
    rig.umount();
}

/// On btrfs a store is copied with the subvolume it lies in, file for file the same: it knows that, too. The
/// original knows itself after its filesystem was mounted again.
#[test]
fn a_btrfs_snapshot_of_a_store_is_a_copy() {
    if !can_mount() || !can_loop() {
        return;
    }
    if Command::new("btrfs").arg("version").output().is_err() {
        crate::rig::skip("btrfs");
        return;
    }
    let top = Rig::new();
    let file = top.source("btrfs", 256 << 20);
    must("mkfs.btrfs", &["-q", file.to_str().unwrap()]);
    let at = top.at("at");
    fs::create_dir(&at).unwrap();
    let mut attached = Attached::new(&file);
    attached.mount(&at);
    let (own, copy) = (at.join("own"), at.join("copy"));
    let (own, copy) = (own.to_str().unwrap(), copy.to_str().unwrap());
    must("btrfs", &["subvolume", "create", own]);
    let disk = image(&top, "disk.img");
    let mut rig = Rig::with_store(Path::new(own).join("store"));
    rig.mount_with(&["--volume", &format!("vm={}", disk.display())]);
    touch(&rig.snapshot("vm", "a")).unwrap();
    must("btrfs", &["subvolume", "snapshot", own, copy]);
    let live = writable(&rig.live("vm"));
    live.write_all_at(&[7; 9000], 3000).unwrap();
    live.sync_all().unwrap();
    drop(live);
    rig.kill();
    let mut other = Rig::with_store(Path::new(copy).join("store"));
    other.mount();
    assert_eq!(vm(&other)["state"], "changed");
    assert_eq!(errno(fs::read(other.snapshot("vm", "a"))), libc::EIO);
    other.umount();
    must("fusermount3", &["-u", "-z", rig.mnt().to_str().unwrap()]);
    attached.unmount();
    attached.mount(&at);
    rig.mount();
    assert_eq!(vm(&rig)["state"], "unverified");
    assert!(fs::read(rig.snapshot("vm", "a")).unwrap() == content("disk.img"));
    rig.umount();
}
