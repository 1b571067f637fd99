//! Rows 13 and 14: a source that somebody else cuts off, makes longer, replaces, deletes, renames or locks.

use std::fs;
use std::os::unix::fs::FileExt;

use super::{SIZE, content, errno, image, log, refused, served, vm, writable};
use crate::rig::{Rig, can_mount, eventually, touch};
use stillframe::sys::disk::Disk;
use stillframe::sys::file::FileDisk;
use stillframe::sys::lock::lock_source;

/// Cut off under the daemon: what is gone is an error, never zeros or a hole, for snapshots and for the live
/// image; nothing is written behind the new end; the volume says so, and so does the next start.
#[test]
fn a_source_is_cut_off_while_mounted() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    touch(&rig.snapshot("vm", "a")).unwrap();
    let live = writable(&rig.live("vm"));
    // One grain is preserved: to write it again needs nothing of the source.
    let last = SIZE / 4096 * 4096;
    live.write_all_at(&[7; 100], last).unwrap();
    let source = rig.at("disk.img");
    writable(&source).set_len(SIZE / 2).unwrap();

    // At once, before anybody has looked.
    assert_eq!(errno(live.write_at(&[8; 100], last)), libc::EIO);
    assert_eq!(
        fs::metadata(&source).unwrap().len(),
        SIZE / 2,
        "made longer"
    );
    let mut buf = [0; 4096];
    assert_eq!(errno(live.read_at(&mut buf, SIZE / 2 + 5000)), libc::EIO);
    assert_eq!(vm(&rig)["state"], "changed");
    let snapshot = fs::File::open(rig.snapshot("vm", "a")).unwrap();
    assert_eq!(snapshot.metadata().unwrap().len(), SIZE);
    assert_eq!(
        errno(snapshot.read_at(&mut buf, SIZE / 2 + 5000)),
        libc::EIO
    );
    assert_eq!(errno(live.write_at(&[8; 100], 0)), libc::EIO);
    // What is left of the live image can be read; what is missing is no hole.
    live.read_exact_at(&mut buf, 0).unwrap();
    assert_eq!(buf[..], content("disk.img")[..4096]);
    let seen = FileDisk::open(&rig.live("vm"), false).unwrap();
    assert_eq!(errno(seen.next_data(0x90000)), libc::EIO);
    assert_eq!(errno(seen.next_hole(0x90000)), libc::EIO);
    drop(seen);
    let why = vm(&rig)["reason"].as_str().unwrap().to_owned();
    assert!(why.contains("cut off"), "{why}");
    assert!(log(&rig).contains("is not ours any more"), "{}", log(&rig));
    let out = rig.run(&["snapshot", "create", "vm@b"]);
    assert!(refused(&out, 1).contains("not as we left it"));

    // Given its old size again it is not trusted, neither now nor after a kill.
    eventually("the log knows", || {
        let text = rig.ok(&["status"]);
        text.contains("vm is changed")
    });
    writable(&source).set_len(SIZE).unwrap();
    assert_eq!(errno(snapshot.read_at(&mut buf, 0)), libc::EIO);
    drop((live, snapshot));
    rig.umount();
    rig.mount();
    assert_eq!(vm(&rig)["state"], "changed");
    assert_eq!(
        errno(fs::read(rig.snapshot("vm", "a"))),
        libc::EIO,
        "its second half would be zeros"
    );
    // The operator's word counts: what was not preserved is what the source has now.
    rig.ok(&["volume", "accept", "vm"]);
    assert_eq!(vm(&rig)["state"], "active");
    let bytes = fs::read(rig.snapshot("vm", "a")).unwrap();
    let (half, last) = (SIZE as usize / 2, last as usize);
    assert_eq!(bytes[..half], content("disk.img")[..half]);
    assert!(
        bytes[last..] == content("disk.img")[last..],
        "was preserved"
    );
    rig.umount();
}

/// Nobody reads or writes: the daemon finds it by itself, and a kill does not make it forget.
#[test]
fn a_source_that_grew_is_found_and_remembered() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    touch(&rig.snapshot("vm", "a")).unwrap();
    writable(&rig.at("disk.img")).set_len(SIZE + 1).unwrap();
    eventually("it is found", || vm(&rig)["state"] == "changed");
    let why = vm(&rig)["reason"].to_string();
    assert!(why.contains(&format!("{} bytes", SIZE + 1)), "{why}");
    assert_eq!(errno(fs::read(rig.snapshot("vm", "a"))), libc::EIO);
    let size = fs::metadata(rig.live("vm")).unwrap().len();
    assert_eq!(size, SIZE, "neither does the volume grow by that");
    let out = rig.run(&["volume", "accept", "vm"]);
    assert!(refused(&out, 1).contains("bring it back to that size"));
    writable(&rig.at("disk.img")).set_len(SIZE).unwrap();
    eventually("it is written down", || {
        log(&rig).contains("the log knows of the changed source")
    });
    rig.kill();
    rig.mount();
    assert_eq!(vm(&rig)["state"], "changed");
    rig.ok(&["volume", "accept", "vm"]);
    assert!(fs::read(rig.snapshot("vm", "a")).unwrap() == content("disk.img"));
    rig.umount();
}

/// Another file under the source's name: what is written goes to a file that is gone with the daemon, so no
/// sync may succeed; snapshots stay exact until then.
#[test]
fn a_source_is_replaced_or_deleted_while_mounted() {
    if !can_mount() {
        return;
    }
    for deleted in [false, true] {
        let mut rig = served();
        touch(&rig.snapshot("vm", "a")).unwrap();
        let live = writable(&rig.live("vm"));
        live.write_all_at(&[7; 9000], 3000).unwrap();
        live.sync_all().unwrap();
        if deleted {
            fs::remove_file(rig.at("disk.img")).unwrap();
        } else {
            fs::rename(image(&rig, "other.img"), rig.at("disk.img")).unwrap();
        }
        live.write_all_at(&[9; 100], 0).unwrap();
        // At once, before anybody has looked.
        assert_eq!(errno(live.sync_all()), libc::EIO);
        eventually("it is found", || vm(&rig)["state"] == "suspect");
        let why = vm(&rig)["reason"].to_string();
        assert!(why.contains("copy live.img away"), "{why}");
        assert_eq!(errno(live.sync_all()), libc::EIO);
        refused(&rig.run(&["snapshot", "create", "vm@b"]), 1);
        refused(&rig.run(&["volume", "accept", "vm"]), 1);
        assert!(fs::read(rig.snapshot("vm", "a")).unwrap() == content("disk.img"));
        let saved = fs::read(rig.live("vm")).unwrap();
        assert_eq!(saved[..100], [9; 100]);
        drop(live);
        // Not a clean stop: something may be lost, and it says so.
        let out = rig.umount_command().output().unwrap();
        assert_eq!(out.status.code(), Some(1));
        rig.kill();
        rig.mount();
        let state = vm(&rig)["state"].clone();
        assert_eq!(state, if deleted { "missing" } else { "changed" });
        assert_eq!(errno(fs::read(rig.snapshot("vm", "a"))), libc::EIO);
        rig.umount();
        // What was saved takes the place of what is gone.
        fs::write(rig.at("disk.img"), saved).unwrap();
        rig.mount();
        rig.ok(&["volume", "accept", "vm"]);
        assert!(fs::read(rig.snapshot("vm", "a")).unwrap() == content("disk.img"));
        rig.umount();
    }
}

/// Renamed, it is all there: it goes on, with a word about the next start.
#[test]
fn a_source_is_renamed_while_mounted() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    touch(&rig.snapshot("vm", "a")).unwrap();
    fs::rename(rig.at("disk.img"), rig.at("elsewhere.img")).unwrap();
    eventually("it is found", || vm(&rig)["reason"].is_string());
    let row = vm(&rig);
    assert_eq!(row["state"], "active");
    assert!(row["reason"].to_string().contains("names nothing"), "{row}");
    let live = writable(&rig.live("vm"));
    live.write_all_at(&[7; 9000], 3000).unwrap();
    live.sync_all().unwrap();
    drop(live);
    fs::rename(rig.at("elsewhere.img"), rig.at("disk.img")).unwrap();
    eventually("it is seen to be back", || vm(&rig)["reason"].is_null());
    rig.umount();
    rig.mount();
    assert_eq!(vm(&rig)["state"], "active");
    assert!(fs::read(rig.snapshot("vm", "a")).unwrap() == content("disk.img"));
    rig.umount();
}

/// Row 14: who looks at locks stays out, on both sides.
#[test]
fn a_source_is_locked_on_both_sides() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    let source = rig.at("disk.img");
    // QEMU looks at locks.
    let mut qemu = std::process::Command::new("qemu-io");
    qemu.args(["-f", "raw", "-c", "write -P 1 0 512"])
        .arg(&source);
    match qemu.output() {
        Ok(out) => {
            let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
            assert!(!out.status.success() && text.contains("lock"), "{text}");
        }
        Err(e) => drop(crate::rig::skip(&format!("qemu-io: {e}"))),
    }
    assert!(fs::read(&source).unwrap() == content("disk.img"));
    // A second store on the same source.
    let mut other = Rig::new();
    let volume = format!("vm={}", source.display());
    let mnt = other.mnt();
    let mount = ["mount", mnt.to_str().unwrap(), "--volume", &volume];
    let said = refused(&other.run(&mount), 5);
    assert!(said.contains("locked by another program"), "{said}");
    rig.umount();
    other.mount_with(&["--volume", &volume]);
    other.umount();
    // And another's lock keeps us out.
    let file = FileDisk::open(&source, true).unwrap();
    lock_source(&file, "the source").unwrap();
    rig.mount();
    assert_eq!(vm(&rig)["state"], "missing");
    assert!(vm(&rig)["reason"].to_string().contains("locked"));
    rig.umount();
}
