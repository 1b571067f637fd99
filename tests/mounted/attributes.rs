//! What `stat` and `statfs` show of every kind of file, who gets in, and what is left to the kernel.

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use stillframe::sys::process::{effective_gid, effective_uid};
use stillframe::units::Name;
use stillframe::volume::VolumeOptions;

use crate::harness::{Mount, Needs, errno, open, possible, run, try_run, unknown_ioctl};

const SIZE: u64 = (1 << 20) + 512;

/// Every kind of file there is.
const PATHS: [(&str, u32, u64); 14] = [
    ("", 0o700, 4),
    (".stillframe", 0o700, 2),
    (".stillframe/status.json", 0o400, 1),
    (".stillframe/metrics.prom", 0o400, 1),
    ("vm", 0o700, 5),
    ("vm/live.img", 0o600, 1),
    ("vm/snapshots", 0o700, 2),
    ("vm/snapshots/a.img", 0o400, 1),
    ("vm/clones", 0o700, 2),
    ("vm/clones/c.img", 0o600, 1),
    ("vm/clones/empty.img", 0o600, 1),
    ("vm/diffs", 0o700, 2),
    ("vm/diffs/a..b.qcow2", 0o400, 1),
    ("vm/diffs/a..b.json", 0o400, 1),
];

fn fill(mount: &Mount) {
    let source = mount.scratch("vm.img");
    fs::write(&source, vec![1; SIZE as usize]).unwrap();
    mount.add("vm", &source, VolumeOptions::default());
    mount.touch("vm", "a");
    open(&mount.live("vm"), 0)
        .write_all_at(b"change", 5000)
        .unwrap();
    // The mode asked for is ignored.
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o666);
    options.open(mount.snapshot("vm", "b")).unwrap();
    options.open(mount.at("vm/clones/empty.img")).unwrap();
    fs::hard_link(mount.snapshot("vm", "a"), mount.at("vm/clones/c.img")).unwrap();
}

fn mounted() -> Mount {
    let mount = Mount::new();
    fill(&mount);
    mount
}

#[test]
fn every_file_shows_its_mode_owner_links_and_times() {
    if !possible(Needs::Fuse, "attributes") {
        return;
    }
    let mount = mounted();
    for (path, mode, links) in PATHS {
        let meta = fs::metadata(mount.at(path)).unwrap();
        assert_eq!(meta.mode() & 0o7777, mode, "{path}");
        assert_eq!(meta.nlink(), links, "{path}");
        let owner = (effective_uid(), effective_gid());
        assert_eq!((meta.uid(), meta.gid()), owner, "{path}");
        assert_eq!(meta.blksize(), 1 << 20, "{path}");
        assert!(meta.blocks() <= meta.len().div_ceil(512), "{path}");
        let accessed = (meta.atime(), meta.atime_nsec());
        assert_eq!(accessed, (meta.mtime(), meta.mtime_nsec()), "{path}");
    }
    let meta = |path: &str| fs::metadata(mount.at(path)).unwrap();
    let b = meta("vm/snapshots/b.img");
    assert_eq!((b.mode() & 0o7777, b.len()), (0o400, SIZE));
    // The snapshots have the volume's last change before them, and their own instant.
    let (a, live) = (meta("vm/snapshots/a.img"), meta("vm/live.img"));
    assert!(a.mtime() < b.mtime());
    assert_eq!(
        (b.mtime(), b.mtime_nsec()),
        (live.mtime(), live.mtime_nsec())
    );
    assert_eq!(
        (live.ctime(), live.ctime_nsec()),
        (live.mtime(), live.mtime_nsec())
    );
    assert!((a.ctime(), a.ctime_nsec()) < (b.ctime(), b.ctime_nsec()));
    // Nobody keeps an extended attribute for us.
    let held = || {
        let path = mount.snapshot("vm", "a");
        let args = [
            "--only-values",
            "-n",
            "user.stillframe.held",
            "--absolute-names",
        ];
        run("getfattr", &[&args[..], &[path.to_str().unwrap()]].concat())
    };
    assert_eq!(held(), "0");
    let [volume, snapshot] = ["vm", "a"].map(|name| Name::new(name).unwrap());
    mount
        .engine()
        .hold_snapshot(&volume, &snapshot, true)
        .unwrap();
    assert_eq!(held(), "1");
    // A name may have 200 bytes; no more.
    let long = "n".repeat(200);
    assert_eq!(errno(File::create_new(mount.snapshot("vm", &long))), 0);
    let longer = File::create_new(mount.snapshot("vm", &(long + "n")));
    assert_eq!(errno(longer), libc::EINVAL);
}

#[test]
fn every_file_tells_the_space_of_the_store() {
    if !possible(Needs::Fuse, "statfs") {
        return;
    }
    let mount = mounted();
    let total = |path: &Path| {
        let shown = run("stat", &["-f", "-c", "%S %b", path.to_str().unwrap()]);
        let numbers: Vec<u64> = shown
            .split_whitespace()
            .map(|n| n.parse().unwrap())
            .collect();
        numbers[0] * numbers[1]
    };
    let real = total(&mount.scratch("store"));
    for (path, ..) in PATHS {
        assert_eq!(total(&mount.at(path)), real, "{path}");
    }
}

/// Whether the user nobody can run a tool on a path.
fn nobody(tool: &str, path: &Path) -> bool {
    let mut command = Command::new(tool);
    command.arg(path).uid(65534).gid(65534).current_dir("/");
    command.output().unwrap().status.success()
}

#[test]
fn others_get_in_only_with_allow_other_and_then_the_modes_decide() {
    if !possible(Needs::Loops, "other users") {
        return;
    }
    for others in [false, true] {
        let mount = Mount::open_to(others);
        fill(&mount);
        let root = mount.at("");
        // The directories above must not be what keeps him out.
        for above in root.ancestors().skip(1).take(1) {
            fs::set_permissions(above, Permissions::from_mode(0o755)).unwrap();
        }
        let reachable = nobody("stat", root.parent().unwrap());
        assert!(reachable, "the test's directory is out of nobody's reach");
        assert_eq!(nobody("stat", &root), others, "a look at the root");
        for path in ["", "vm/live.img", "vm/snapshots/a.img"] {
            let tool = if path.is_empty() { "ls" } else { "cat" };
            assert!(!nobody(tool, &mount.at(path)), "{path}: mode 0700");
        }
        assert!(fs::read(mount.snapshot("vm", "a")).is_ok());
    }
}

#[test]
fn status_files_refuse_every_change() {
    if !possible(Needs::Fuse, "status files") {
        return;
    }
    let mount = mounted();
    for name in ["status.json", "metrics.prom"] {
        let path = mount.at(".stillframe").join(name);
        for flags in [0, libc::O_TRUNC, libc::O_APPEND] {
            let mut options = OpenOptions::new();
            let opened = options.write(true).custom_flags(flags).open(&path);
            assert_eq!(errno(opened), libc::EROFS, "{flags}");
        }
        let file = File::open(&path).unwrap();
        let modes = fs::set_permissions(&path, Permissions::from_mode(0o600));
        let times = file.set_modified(std::time::UNIX_EPOCH);
        let moved = fs::rename(&path, mount.at(".stillframe/x"));
        let linked = fs::hard_link(&path, mount.at("vm/clones/s.img"));
        let removed = fs::remove_file(&path);
        for refused in [modes, times, moved, linked, removed] {
            assert_eq!(errno(refused), libc::EPERM, "{name}");
        }
        let (cut, why) = try_run("truncate", &["-s", "0", path.to_str().unwrap()]);
        assert!(!cut && why.contains("Read-only file system"), "{why}");
        let made = File::create_new(mount.at(".stillframe").join(format!("{name}2")));
        assert_eq!(errno(made), libc::EPERM);
        assert!(!fs::read(&path).unwrap().is_empty());
    }
}

#[test]
fn locks_are_the_kernel_s_and_ioctls_are_not_ours() {
    if !possible(Needs::Fuse, "locks") {
        return;
    }
    let mount = mounted();
    for path in ["vm/live.img", "vm/snapshots/a.img", "vm/clones/c.img"] {
        let path = mount.at(path);
        let (one, two) = (File::open(&path).unwrap(), File::open(&path).unwrap());
        assert_eq!(errno(unknown_ioctl(&one)), libc::ENOTTY, "{path:?}");
        one.lock().unwrap();
        assert!(two.try_lock().is_err(), "{path:?} is locked");
        drop(one);
        two.lock().unwrap();
    }
}
