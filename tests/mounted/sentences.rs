//! Sentences of `docs/semantics.md` that need a kernel and that no other test happens to show: what
//! reaches the source of a volume, what tools leave behind, and what a cache above or below knows.

#![allow(unsafe_code, reason = "system calls without a wrapper")]

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use stillframe::units::Name;
use stillframe::volume::VolumeOptions;

use crate::harness::{
    Loop, Mount, Needs, arg, assert_equal, first_page, open, possible, qemu_img, run, try_run,
};
use crate::rig::{Rig, can_mount, eventually, touch};

const SIZE: u64 = 1 << 20;

/// A mount with the volume `vm` of ones.
fn mounted() -> Mount {
    let mount = Mount::new();
    let source = mount.scratch("vm.img");
    fs::write(&source, vec![1; SIZE as usize]).unwrap();
    mount.add("vm", &source, VolumeOptions::default());
    mount
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn the_live_image_is_opened_any_way_any_number_of_times() {
    if !possible(Needs::Fuse, "opening live.img") {
        return;
    }
    let mount = mounted();
    let live = mount.live("vm");
    let mut files = Vec::new();
    for (read, write) in [(true, false), (false, true), (true, true)].repeat(60) {
        let file = OpenOptions::new().read(read).write(write).open(&live);
        files.push((read, write, file.unwrap()));
    }
    for (i, (read, write, file)) in files.iter().enumerate() {
        let byte = [i as u8];
        assert_eq!(file.write_at(&byte, i as u64).is_ok(), *write);
        let mut found = [0];
        assert_eq!(file.read_at(&mut found, i as u64).is_ok(), *read);
        let expected = if *write { i as u8 } else { 1 };
        let all = &files[2].2;
        all.read_exact_at(&mut found, i as u64).unwrap();
        assert_eq!(found, [expected], "what one wrote the others read");
    }
}

#[test]
fn what_is_durable_was_synced_and_syncfs_reaches_nobody() {
    if !possible(Needs::Fuse, "syncs") {
        return;
    }
    let mount = mounted();
    let live = mount.live("vm");
    let syncs = |what: &dyn Fn()| {
        let before = mount.source_reads_and_syncs().1;
        what();
        mount.source_reads_and_syncs().1 - before
    };
    let (plain, reader) = (open(&live, 0), File::open(&live).unwrap());
    let write = |file: &File| file.write_all_at(b"bytes", 5000).unwrap();
    assert_eq!(syncs(&|| write(&plain)), 0, "a write alone is not durable");
    // SAFETY: takes a number only; the descriptor is open.
    let syncfs = || assert_eq!(unsafe { libc::syncfs(plain.as_raw_fd()) }, 0);
    assert_eq!(syncs(&syncfs), 0, "it does not reach the daemon");
    assert!(syncs(&|| reader.sync_all().unwrap()) > 0, "fsync elsewhere");
    write(&plain);
    assert!(syncs(&|| reader.sync_data().unwrap()) > 0, "fdatasync");
    for flags in [libc::O_DSYNC, libc::O_SYNC] {
        let file = open(&live, flags);
        assert!(syncs(&|| write(&file)) > 0, "{flags:o}");
    }
    for flags in [libc::RWF_DSYNC, libc::RWF_SYNC] {
        assert!(syncs(&|| write_with(&plain, flags)) > 0, "{flags}");
    }
    // Any descriptor of an opening through which something was written, when it is closed.
    let file = open(&live, 0);
    write(&file);
    let other = file.try_clone().unwrap();
    assert!(syncs(&|| close(other.try_clone().unwrap())) > 0);
    assert_eq!(syncs(&|| close(file.try_clone().unwrap())), 0, "no news");
    write(&file);
    assert!(syncs(&|| close(file.try_clone().unwrap())) > 0);
}

fn close(file: File) {
    drop(file);
}

/// pwritev2(2).
fn write_with(file: &File, flags: i32) {
    let data = b"bytes";
    let part = libc::iovec {
        iov_base: data.as_ptr().cast_mut().cast(),
        iov_len: data.len(),
    };
    // SAFETY: one part, which outlives the call and is only read.
    let written = unsafe { libc::pwritev2(file.as_raw_fd(), &part, 1, 9000, flags) };
    assert_eq!(written, 5, "{}", io::Error::last_os_error());
}

#[test]
fn a_snapshot_is_read_from_the_cache_and_by_o_direct_around_it() {
    if !possible(Needs::Fuse, "the kernel's cache") {
        return;
    }
    let mount = mounted();
    let path = mount.touch("vm", "a");
    let reads = |flags: i32| {
        let before = mount.source_reads_and_syncs().0;
        let mut how = OpenOptions::new();
        let file = how.read(true).custom_flags(flags).open(&path).unwrap();
        let mut memory = vec![0; SIZE as usize + 4096];
        let at = memory.as_ptr().align_offset(4096);
        let bytes = &mut memory[at..at + SIZE as usize];
        file.read_exact_at(bytes, 0).unwrap();
        assert!(bytes.iter().all(|&b| b == 1));
        mount.source_reads_and_syncs().0 - before
    };
    assert!(reads(0) > 0);
    // The kernel may drop a page whenever it needs memory.
    assert!((0..5).any(|_| reads(0) == 0), "cached also after a close");
    assert!(reads(libc::O_DIRECT) > 0, "around the cache");
    assert!(reads(libc::O_DIRECT) > 0);
}

#[test]
fn tools_that_skip_holes_and_tools_that_truncate() {
    if !possible(Needs::Fuse, "dd and qemu-img on live.img") {
        return;
    }
    let mount = mounted();
    let live = mount.live("vm");
    let image = mount.scratch("image.img");
    let mut expected = vec![0; SIZE as usize];
    expected[8192..16_384].fill(5);
    fs::write(&image, &expected).unwrap();
    let (input, output) = (arg("if", &image), arg("of", &live));
    // Here as on a device: a plain file that is not truncated.
    let device = mount.scratch("device.img");
    fs::write(&device, vec![1; SIZE as usize]).unwrap();
    run("dd", &[&input, &output, "bs=4096", "conv=sparse"]);
    let onto = arg("of", &device);
    run("dd", &[&input, &onto, "bs=4096", "conv=sparse,notrunc"]);
    let found = fs::read(&live).unwrap();
    assert!(found[16_384..].iter().all(|&b| b == 1), "the old bytes");
    assert!(found[16_384..] == fs::read(&device).unwrap()[16_384..]);
    assert!(found[8192..16_384] == expected[8192..16_384]);
    run("dd", &[&input, &output, "bs=4096"]);
    assert_equal(&live, &image);
    if !qemu_img("qemu-img convert onto live.img") {
        return;
    }
    open(&live, 0)
        .write_all_at(&vec![1; SIZE as usize], 0)
        .unwrap();
    let args = ["convert", "-f", "raw", "-O", "raw"];
    let paths = [text(&image), text(&live)];
    let (done, why) = try_run("qemu-img", &[&args[..], &paths].concat());
    assert!(!done && why.contains("not permitted"), "{why}");
    let found = fs::read(&live).unwrap();
    assert!(found.iter().all(|&b| b == 1), "nothing was done");
    run("qemu-img", &[&args[..], &["-n"], &paths].concat());
    assert_equal(&live, &image);
}

/// Attributes of a file that is copied here cannot be kept, and those of an image not copied elsewhere
/// as if they were somebody's: neither stops a tool.
#[test]
fn copies_onto_an_image_go_on_without_its_attributes() {
    if !possible(Needs::Fuse, "copies with attributes") {
        return;
    }
    let mount = mounted();
    let (live, image) = (mount.live("vm"), mount.scratch("image.img"));
    fs::write(&image, vec![7; SIZE as usize]).unwrap();
    // Another mode would be refused, and cp says so.
    fs::set_permissions(&image, Permissions::from_mode(0o600)).unwrap();
    let set = ["-n", "user.other", "-v", "x", text(&image)];
    if !try_run("setfattr", &set).0 {
        eprintln!("SKIPPED attributes of the source: its filesystem has none");
    }
    let (done, why) = try_run("cp", &["-a", text(&image), text(&live)]);
    assert!(done, "{why}");
    assert_equal(&live, &image);
    open(&live, 0).write_all_at(b"other", 0).unwrap();
    let snapshot = mount.touch("vm", "a");
    let out = mount.scratch("out.img");
    let (done, why) = try_run("cp", &["-a", text(&snapshot), text(&out)]);
    assert!(done, "{why}");
    assert_equal(&out, &snapshot);
}

#[test]
fn what_a_loop_device_has_cached_is_flushed_before_a_snapshot_and_resized_when_told() {
    if !possible(Needs::Loops, "a cache above live.img") {
        return;
    }
    let mount = mounted();
    let device = Loop::new(&mount.live("vm"), &[]);
    let file = open(&device.0, 0);
    file.write_all_at(&[7; 8192], 4096).unwrap();
    file.sync_all().unwrap();
    let taken = fs::read(mount.touch("vm", "a")).unwrap();
    assert_eq!(taken[4096..12_288], [7; 8192]);
    let size = || run("blockdev", &["--getsize64", text(&device.0)]);
    let larger = SIZE + 65_536;
    let vm = Name::new("vm").unwrap();
    mount.engine().resize_volume(&vm, larger).unwrap();
    assert_eq!(fs::metadata(mount.live("vm")).unwrap().len(), larger);
    assert_eq!(size().trim(), SIZE.to_string(), "not told yet");
    run("losetup", &["--set-capacity", text(&device.0)]);
    assert_eq!(size().trim(), larger.to_string());
    file.write_all_at(&[8; 512], larger - 512).unwrap();
    file.sync_all().unwrap();
    let mut end = [0; 512];
    let live = File::open(mount.live("vm")).unwrap();
    live.read_exact_at(&mut end, larger - 512).unwrap();
    assert_eq!(end, [8; 512]);
}

/// The daemon has the kernel forget the pages of a private mapping, which is all it may know.
#[test]
fn the_kernel_forgets_a_volume_that_was_reverted_or_resized() {
    if !possible(Needs::Fuse, "what the kernel knows") || !can_mount() {
        return;
    }
    let mut rig = Rig::new();
    let source = rig.source("vm", SIZE);
    fs::write(&source, vec![1; SIZE as usize]).unwrap();
    rig.mount_with(&["--volume", &format!("vm={}", text(&source))]);
    touch(&rig.snapshot("vm", "a")).unwrap();
    let live = rig.live("vm");
    open(&live, 0).write_all_at(&[2; 4096], 0).unwrap();
    let reader = File::open(&live).unwrap();
    let page = || first_page(&reader, libc::MAP_PRIVATE).unwrap();
    assert_eq!(page(), [2; 4096]);
    let revert = ["-n", "user.stillframe.revert", "-v", "a", text(&live)];
    run("setfattr", &revert);
    // By a thread of the daemon, which may still be on its way.
    eventually("a mapping shows what was reverted to", || {
        page() == [1; 4096]
    });
    rig.ok(&["volume", "resize", "vm", "1000"]);
    assert_eq!(fs::metadata(&live).unwrap().size(), 1000);
    eventually("a mapping ends with the volume", || {
        page()[1000..].iter().all(|&b| b == 0)
    });
    rig.ok(&["volume", "resize", "vm", "+20000"]);
    assert_eq!(reader.metadata().unwrap().len(), 21_000);
    drop(reader);
    rig.umount();
}
