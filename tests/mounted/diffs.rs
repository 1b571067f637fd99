//! `diffs/` through a mount: copied with cp, restored by qemu-img, and used in place.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};

use stillframe::volume::VolumeOptions;

use crate::harness::{Chance, Mount, Needs, assert_equal, errno, open, possible, qemu_img, run};

/// Neither a whole number of grains, of clusters nor of sectors.
const SIZE: u64 = (9 << 20) + 4096 + 777;

#[test]
fn a_snapshot_and_a_diff_in_a_directory_are_a_backup() {
    if !possible(Needs::Fuse, "diffs") || !qemu_img("diffs") {
        return;
    }
    let mut mount = Mount::new();
    let source = mount.scratch("source.img");
    let mut chance = Chance(5);
    fs::write(&source, chance.bytes(SIZE as usize)).unwrap();
    mount.add("vm", &source, VolumeOptions::default());
    // QEMU would take a colon for the end of a protocol.
    let names = ["a", "b:1", "c", "d", "e"];
    for name in names {
        mount.touch("vm", name);
        let live = open(&mount.live("vm"), 0);
        for _ in 0..12 {
            let at = chance.below(SIZE - 1);
            let len = (1 + chance.below(200_000)).min(SIZE - at) as usize;
            let data = match chance.below(3) {
                0 => vec![0; len],
                _ => chance.bytes(len),
            };
            live.write_all_at(&data, at).unwrap();
        }
        live.write_all_at(&chance.bytes(100), SIZE - 100).unwrap();
    }
    for round in ["first", "after a restart"] {
        let dir = mount.scratch(&format!("backup {round}"));
        fs::create_dir(&dir).unwrap();
        for (i, from) in names.iter().enumerate() {
            for to in &names[i + 1..] {
                restore(&mount, &dir, from, to);
            }
        }
        chain(&mount, &dir);
        mount.restart();
    }
    // Any change is refused.
    let diff = mount.at("vm/diffs/a..b:1.qcow2");
    assert_eq!(errno(fs::remove_file(&diff)), libc::EPERM);
    assert_eq!(
        errno(fs::File::create_new(mount.at("vm/diffs/x.img"))),
        libc::EPERM
    );
    let moved = fs::rename(&diff, mount.at("vm/diffs/x.qcow2"));
    assert_eq!(errno(moved), libc::EPERM);
    let written = fs::OpenOptions::new().write(true).open(&diff);
    assert_eq!(errno(written), libc::EROFS);
}

/// Overlays upon overlays, each told its new backing file once.
fn chain(mount: &Mount, dir: &std::path::Path) {
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    for (lower, upper) in [("a..c", "c..d"), ("c..d", "d..e")] {
        let (lower, upper) = (format!("{lower}.qcow2"), path(&format!("{upper}.qcow2")));
        run("chmod", &["u+w", &upper]);
        run(
            "qemu-img",
            &["rebase", "-u", "-F", "qcow2", "-b", &lower, &upper],
        );
    }
    let newest = mount.snapshot("vm", "e");
    let newest = newest.to_str().unwrap();
    let upper = path("d..e.qcow2");
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "qcow2", newest, &upper],
    );
    // The chain needs only the first image.
    for name in ["c.img", "d.img"] {
        fs::remove_file(dir.join(name)).unwrap();
    }
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "qcow2", newest, &upper],
    );
}

/// Copies the older image, the overlay and its list, restores the newer image, and reads it in place.
fn restore(mount: &Mount, dir: &std::path::Path, from: &str, to: &str) {
    let at = |name: &str| mount.at(&format!("vm/diffs/{name}"));
    let (overlay, list) = (format!("{from}..{to}.qcow2"), format!("{from}..{to}.json"));
    run("cp", &[&at(&overlay), &dir.join(&overlay)]);
    run("cp", &[&at(&list), &dir.join(&list)]);
    run(
        "cp",
        &[
            &at(&format!("{from}.img")),
            &dir.join(format!("{from}.img")),
        ],
    );
    assert_equal(&at(&overlay), &dir.join(&overlay));
    let meta = fs::metadata(at(&overlay)).unwrap();
    assert_eq!(
        (meta.mode() & 0o7777, meta.blocks()),
        (0o400, meta.len() / 512)
    );
    let newer = mount.snapshot("vm", to);
    for overlay in [dir.join(&overlay), at(&overlay)] {
        let overlay = overlay.to_str().unwrap();
        let text = run("qemu-img", &["check", overlay]);
        assert!(text.contains("No errors were found"), "{text}");
        let newer = newer.to_str().unwrap();
        run(
            "qemu-img",
            &["compare", "-f", "raw", "-F", "qcow2", newer, overlay],
        );
    }
    let restored = dir.join("restored.img");
    let (source, target) = (dir.join(&overlay), restored.to_str().unwrap());
    run(
        "qemu-img",
        &["convert", "-O", "raw", source.to_str().unwrap(), target],
    );
    assert_eq!(
        fs::metadata(&restored).unwrap().len(),
        SIZE.next_multiple_of(512)
    );
    let json = fs::read_to_string(dir.join(&list)).unwrap();
    assert!(json.contains(&format!("\"size\":{SIZE},")), "{json}");
    open(&restored, 0).set_len(SIZE).unwrap();
    assert_equal(&restored, &newer);
}
