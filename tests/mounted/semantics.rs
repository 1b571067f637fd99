//! Sentences of `docs/semantics.md` that only a kernel can ask about: what system calls answer.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use stillframe::volume::VolumeOptions;

use crate::harness::{
    Loop, Mount, Needs, assert_equal, errno, fallocate, first_page, open, possible, rename_with,
    run, seek, try_run,
};

const SIZE: u64 = (1 << 20) + 512;

/// A mount with the volumes `vm` and `other`, each of [`SIZE`] bytes of ones.
fn mounted() -> Mount {
    let mount = Mount::new();
    for name in ["vm", "other"] {
        let source = mount.scratch(&format!("{name}.img"));
        fs::write(&source, vec![1; SIZE as usize]).unwrap();
        mount.add(name, &source, VolumeOptions::default());
    }
    mount
}

fn create(path: &Path) -> i32 {
    errno(File::create_new(path))
}

fn open_errno(path: &Path, flags: i32) -> i32 {
    let mut options = OpenOptions::new();
    errno(
        options
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path),
    )
}

#[test]
fn names_are_made_moved_and_removed_only_as_snapshots() {
    if !possible(Needs::Fuse, "names") {
        return;
    }
    let mount = mounted();
    let (a, b) = (mount.touch("vm", "a"), mount.snapshot("vm", "b"));
    assert_eq!(create(&a), libc::EEXIST);
    let (again, text) = try_run("touch", &[&a]);
    assert!(!again, "a second touch fails: {text}");
    races(&mount);
    assert_eq!(open_errno(&a, libc::O_CREAT), libc::EROFS);
    for bad in ["x", ".a.img.Xy12Zw", "live.img", "a b.img", "a..b.img"] {
        let path = mount.at("vm/snapshots").join(bad);
        assert_eq!(create(&path), libc::EINVAL, "{bad}");
    }
    let long = format!("vm/snapshots/{}.img", "n".repeat(201));
    assert_eq!(create(&mount.at(&long)), libc::EINVAL);
    for elsewhere in ["x", "x.img", "vm/x.img", ".stillframe/x"] {
        assert_eq!(create(&mount.at(elsewhere)), libc::EPERM, "{elsewhere}");
    }
    for place in ["x", "vm/x", "vm/snapshots/x.img", ".stillframe/x"] {
        let path = mount.at(place);
        assert_eq!(errno(fs::create_dir(&path)), libc::EPERM, "{place}");
        let link = std::os::unix::fs::symlink("target", &path);
        assert_eq!(errno(link), libc::EPERM, "{place}");
        assert_eq!(errno(fs::hard_link(&a, &path)), libc::EPERM, "{place}");
        let (made, text) = try_run("mkfifo", &[&path]);
        assert!(!made && text.contains("Operation not permitted"), "{text}");
    }
    for kept in ["vm", "vm/snapshots", ".stillframe"] {
        assert_eq!(errno(fs::remove_dir(mount.at(kept))), libc::EPERM, "{kept}");
    }
    for kept in ["vm/live.img", ".stillframe/status.json"] {
        assert_eq!(
            errno(fs::remove_file(mount.at(kept))),
            libc::EPERM,
            "{kept}"
        );
    }
    assert_eq!(errno(fs::remove_file(&b)), libc::ENOENT);
    // A copy into the directory takes a snapshot of that name and cannot write.
    let c = mount.snapshot("vm", "c");
    let (copied, text) = try_run("cp", &[&mount.scratch("other.img"), &c]);
    assert!(!copied && text.contains("Read-only file system"), "{text}");
    assert_equal(&c, &mount.scratch("vm.img"));
    // A stray rsync fails and leaves nothing.
    let into = mount.at("vm/snapshots/");
    let (sent, _) = try_run(
        "rsync",
        &[OsStr::new("-a"), a.as_os_str(), into.as_os_str()],
    );
    let other = mount.scratch("other.img");
    let (foreign, _) = try_run(
        "rsync",
        &[OsStr::new("-a"), other.as_os_str(), into.as_os_str()],
    );
    assert!(sent && !foreign, "onto itself there is nothing to send");
    assert_eq!(list(&into), ["a.img", "c.img"]);
    renames(&mount, &a, &c);
}

/// Of many that touch one name at one time, one succeeds: the others took nothing.
fn races(mount: &Mount) {
    for round in 0..10 {
        let path = mount.snapshot("other", &format!("race{round}"));
        let touches: Vec<_> = (0..6)
            .map(|_| {
                Command::new("touch")
                    .arg(&path)
                    .stderr(Stdio::null())
                    .spawn()
            })
            .collect();
        let succeeded = touches
            .into_iter()
            .map(|child| child.unwrap().wait().unwrap().success())
            .filter(|&success| success)
            .count();
        assert_eq!(succeeded, 1, "round {round}");
    }
}

fn renames(mount: &Mount, a: &Path, c: &Path) {
    let b = mount.snapshot("vm", "b");
    assert_eq!(errno(fs::rename(a, c)), libc::EEXIST);
    let no_replace = rename_with(a, c, libc::RENAME_NOREPLACE);
    assert_eq!(errno(no_replace), libc::EEXIST);
    for flags in [libc::RENAME_EXCHANGE, libc::RENAME_WHITEOUT] {
        assert_eq!(errno(rename_with(a, c, flags)), libc::EINVAL, "{flags}");
    }
    let bad = mount.at("vm/snapshots/b.txt");
    assert_eq!(errno(fs::rename(a, bad)), libc::EINVAL);
    for to in ["other/snapshots/b.img", "vm/b.img", "b.img"] {
        assert_eq!(errno(fs::rename(a, mount.at(to))), libc::EPERM, "{to}");
    }
    let live = fs::rename(mount.live("vm"), mount.at("vm/x.img"));
    assert_eq!(errno(live), libc::EPERM);
    assert_eq!(
        errno(fs::rename(mount.at("vm"), mount.at("vn"))),
        libc::EPERM
    );
    // mv copies where rename is refused: a new file outside is welcome, the snapshot stays until
    // the copy is whole.
    let before = fs::metadata(a).unwrap();
    let held = File::open(a).unwrap();
    fs::rename(a, &b).unwrap();
    let after = fs::metadata(&b).unwrap();
    assert_eq!(held.metadata().unwrap().ino(), before.ino());
    assert_eq!(
        (after.ino(), after.mtime_nsec(), after.ctime_nsec()),
        (before.ino(), before.mtime_nsec(), before.ctime_nsec())
    );
    rename_with(&b, a, libc::RENAME_NOREPLACE).unwrap();
}

fn list(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_large_directory_is_listed_whole_while_entries_go() {
    if !possible(Needs::Fuse, "listing") {
        return;
    }
    let mount = mounted();
    let directory = mount.at("vm/snapshots");
    // More than one answer of the kernel's holds.
    for i in 0..300 {
        File::create_new(mount.snapshot("vm", &format!("snapshot-{i:03}"))).unwrap();
    }
    let mut names = Vec::new();
    for (n, entry) in fs::read_dir(&directory).unwrap().enumerate() {
        names.push(entry.unwrap().file_name().into_string().unwrap());
        if n % 3 == 0 {
            fs::remove_file(mount.snapshot("vm", &format!("snapshot-{n:03}"))).unwrap();
        }
    }
    let stayed = (0..300).filter(|n| n % 3 != 0);
    let stayed: Vec<String> = stayed.map(|n| format!("snapshot-{n:03}.img")).collect();
    let seen = |name: &String| names.iter().filter(|n| *n == name).count();
    assert!(stayed.iter().all(|name| seen(name) == 1));
    assert_eq!(list(&directory), stayed);
    File::open(&directory).unwrap().sync_all().unwrap();
}

#[test]
fn the_live_image_has_a_fixed_size_and_no_cache() {
    if !possible(Needs::Fuse, "live.img") {
        return;
    }
    let mount = mounted();
    let live = mount.live("vm");
    let meta = fs::metadata(&live).unwrap();
    assert_eq!((meta.len(), meta.blksize()), (SIZE, 1 << 20));
    assert_eq!((meta.mode() & 0o7777, meta.nlink()), (0o600, 1));
    assert_eq!(open_errno(&live, libc::O_APPEND), libc::EPERM);
    let file = open(&live, 0);
    assert_eq!(file.write_at(&[7; 20], SIZE - 10).unwrap(), 10);
    for offset in [SIZE, SIZE + 1, 1 << 40] {
        assert_eq!(errno(file.write_at(b"x", offset)), libc::ENOSPC);
        assert_eq!(file.read_at(&mut [0; 9], offset).unwrap(), 0);
    }
    assert_eq!(file.read_at(&mut [0; 99], SIZE - 10).unwrap(), 10);
    file.set_len(SIZE).unwrap();
    for size in [0, SIZE - 1, SIZE + 1] {
        assert_eq!(errno(file.set_len(size)), libc::EPERM);
    }
    assert_eq!(errno(first_page(&file, libc::MAP_SHARED)), libc::ENODEV);
    let page = first_page(&file, libc::MAP_PRIVATE).unwrap();
    assert_eq!(page, [1; 4096]);
    space(&file);
    // Nothing between a write and the next snapshot, through whichever descriptor.
    let mut writer = OpenOptions::new().write(true).open(&live).unwrap();
    writer.write_all(b"no cache").unwrap();
    let taken = fs::read(mount.touch("vm", "a")).unwrap();
    assert_eq!(&taken[..8], b"no cache");
    attributes(&mount);
    assert_eq!(
        errno(File::open(mount.at("vm")).unwrap().read(&mut [0])),
        libc::EISDIR
    );
    assert_eq!(open_errno(&mount.at("vm"), 0), libc::EISDIR);
}

fn space(file: &File) {
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let zero = libc::FALLOC_FL_ZERO_RANGE;
    let keep = zero | libc::FALLOC_FL_KEEP_SIZE;
    fallocate(file, 0, 0, SIZE).unwrap();
    assert_eq!(errno(fallocate(file, 0, 1, SIZE)), libc::ENOSPC);
    assert_eq!(errno(fallocate(file, zero, SIZE - 10, 11)), libc::ENOSPC);
    for mode in [
        libc::FALLOC_FL_KEEP_SIZE,
        libc::FALLOC_FL_COLLAPSE_RANGE,
        libc::FALLOC_FL_INSERT_RANGE,
    ] {
        let refused = errno(fallocate(file, mode, 0, 4096));
        assert_eq!(refused, libc::EOPNOTSUPP, "{mode}");
    }
    fallocate(file, punch, 65536, 8192).unwrap();
    fallocate(file, zero, 131_072, 100).unwrap();
    fallocate(file, keep, SIZE - 10, 100).unwrap();
    fallocate(file, punch, SIZE, 100).unwrap();
    let mut bytes = vec![0; SIZE as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let zeroed = |i: usize| {
        (65536..73728).contains(&i) || (131_072..131_172).contains(&i) || i >= SIZE as usize - 10
    };
    assert!((0..bytes.len()).all(|i| (bytes[i] == 0) == zeroed(i)));
    assert_eq!(seek(file, 0, libc::SEEK_HOLE).unwrap(), 65536);
    assert_eq!(seek(file, 65536, libc::SEEK_DATA).unwrap(), 73728);
    assert_eq!(seek(file, 73728, libc::SEEK_HOLE).unwrap(), SIZE);
    for (offset, whence) in [
        (SIZE, libc::SEEK_HOLE),
        (SIZE, libc::SEEK_DATA),
        (SIZE + 5, libc::SEEK_DATA),
    ] {
        assert_eq!(errno(seek(file, offset, whence)), libc::ENXIO);
    }
    let end = (&*file).seek(SeekFrom::End(0)).unwrap();
    assert_eq!(end, SIZE);
    (&*file).rewind().unwrap();
}

fn attributes(mount: &Mount) {
    let live = mount.live("vm");
    let mode = |mode| errno(fs::set_permissions(&live, Permissions::from_mode(mode)));
    assert_eq!((mode(0o600), mode(0o644)), (0, libc::EPERM));
    let meta = fs::metadata(&live).unwrap();
    let own = |uid| errno(std::os::unix::fs::chown(&live, Some(uid), None));
    assert_eq!(own(meta.uid()), 0);
    assert_ne!(own(meta.uid() + 1), 0);
    let file = open(&live, 0);
    let long_ago = std::time::UNIX_EPOCH;
    file.set_modified(long_ago).unwrap();
    assert_ne!(file.metadata().unwrap().modified().unwrap(), long_ago);
    let get = |path: &Path, name: &str| {
        let name = format!("user.stillframe.{name}");
        let args = [
            "--only-values",
            "--absolute-names",
            "-n",
            &name,
            path.to_str().unwrap(),
        ];
        try_run("getfattr", &args)
    };
    assert_eq!(get(&live, "state"), (true, "active".to_owned()));
    let source = mount.scratch("vm.img").to_str().unwrap().to_owned();
    assert_eq!(get(&live, "source"), (true, source));
    assert_eq!(get(&live, "uuid").1.len(), 36);
    assert!(get(&live, "nothing").1.contains("No such attribute"));
    let dump = run(
        "getfattr",
        &[OsStr::new("-d"), mount.snapshot("vm", "a").as_os_str()],
    );
    for name in ["uuid", "epoch", "unique", "held", "state"] {
        assert!(
            dump.contains(&format!("user.stillframe.{name}=\"")),
            "{dump}"
        );
    }
    let set = |name: &str| {
        let args = ["-n", name, "-v", "1", live.to_str().unwrap()];
        try_run("setfattr", &args).1
    };
    assert!(set("user.stillframe.state").contains("Operation not permitted"));
    assert!(set("user.other").contains("Operation not supported"));
    let shown = run("stat", &["-f", "-c", "%S %b %a", live.to_str().unwrap()]);
    let store = mount.scratch("store");
    let real = run("stat", &["-f", "-c", "%S %b %a", store.to_str().unwrap()]);
    let bytes = |text: &str, field: usize| {
        let numbers: Vec<u64> = text
            .split_whitespace()
            .map(|n| n.parse().unwrap())
            .collect();
        numbers[0] * numbers[field]
    };
    assert_eq!(
        bytes(&shown, 1),
        bytes(&real, 1),
        "size of the store's filesystem"
    );
    let free = bytes(&shown, 2).abs_diff(bytes(&real, 2));
    assert!(free < 8 << 30, "others use it too: {shown} {real}");
}

#[test]
fn a_snapshot_is_read_only_and_cached_truthfully() {
    if !possible(Needs::Fuse, "snapshots") {
        return;
    }
    let mount = mounted();
    let path = mount.snapshot("vm", "a");
    let created = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    assert_eq!(errno(created.write_at(b"x", 0)), libc::EROFS);
    assert_eq!(errno(created.set_len(0)), libc::EROFS);
    assert_eq!(errno(fallocate(&created, 0, 0, 1)), libc::EROFS);
    // While that handle is open, times are accepted and ignored; afterwards refused.
    let times = fs::metadata(&path).unwrap().mtime();
    created.set_modified(std::time::UNIX_EPOCH).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mtime(), times);
    drop(created);
    let reader = File::open(&path).unwrap();
    let refused = eventually(|| errno(reader.set_modified(std::time::UNIX_EPOCH)));
    assert_eq!(refused, libc::EPERM);
    for flags in [0, libc::O_TRUNC, libc::O_APPEND] {
        assert_eq!(open_errno(&path, flags), libc::EROFS, "{flags}");
    }
    assert_eq!(
        errno(OpenOptions::new().write(true).open(&path)),
        libc::EROFS
    );
    let before = fs::read(&path).unwrap();
    let live = open(&mount.live("vm"), 0);
    live.write_all_at(&vec![9; SIZE as usize], 0).unwrap();
    assert!(fs::read(&path).unwrap() == before, "from the cache");
    let direct = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path)
        .unwrap();
    let mut bytes = vec![0; SIZE as usize];
    direct.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == before, "around the cache");
    for flags in [libc::MAP_SHARED, libc::MAP_PRIVATE] {
        assert_eq!(first_page(&reader, flags).unwrap(), before[..4096]);
    }
    reader.sync_all().unwrap();
    // Removed while open, and the name taken again.
    fs::remove_file(&path).unwrap();
    mount.touch("vm", "a");
    reader.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == before && fs::read(&path).unwrap() != before);
    let gone = eventually(|| i32::from(reader.metadata().unwrap().nlink() == 0));
    assert_eq!(gone, 1, "no links left");
    status(&mount);
}

/// What is so after the last close, whose RELEASE comes in its own time.
fn eventually(ask: impl Fn() -> i32) -> i32 {
    let mut answer = 0;
    for _ in 0..300 {
        answer = ask();
        if answer != 0 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    answer
}

fn status(mount: &Mount) {
    let path = mount.at(".stillframe/status.json");
    assert_eq!(fs::read(&path).unwrap(), b"Json\n");
    assert_eq!(open_errno(&path, 0), libc::EROFS);
    let metrics = fs::read(mount.at(".stillframe/metrics.prom")).unwrap();
    assert_eq!(metrics, b"Metrics\n");
}

#[test]
fn copies_that_are_interrupted_and_tools_that_truncate() {
    if !possible(Needs::Fuse, "rewriting") {
        return;
    }
    let mount = mounted();
    let live = mount.live("vm");
    let now = || fs::read(&live).unwrap();
    let text = |path: &PathBuf| path.to_str().unwrap().to_owned();
    // A shell's truncation harms nothing, a sparse copy that stops leaves a prefix.
    File::create(&live).unwrap();
    assert!(now() == vec![1; SIZE as usize]);
    {
        let mut copy = File::create(&live).unwrap();
        copy.seek(SeekFrom::Start(8192)).unwrap();
        copy.write_all(&[5; 4096]).unwrap();
    }
    let mut expected = vec![1; SIZE as usize];
    expected[..8192].fill(0);
    expected[8192..12_288].fill(5);
    assert!(now() == expected);
    let image = mount.scratch("short.img");
    fs::write(&image, [3; 4096]).unwrap();
    let to = format!("of={}", text(&live));
    let from = format!("if={}", text(&image));
    run("dd", &[&from, &to, "bs=512", "count=3"]);
    expected[..1536].fill(3);
    assert!(now() == expected, "dd replaced what it wrote");
    // Its truncation is refused; some versions stop there and some go on, which is harmless.
    let (_, why) = try_run("dd", &[&from, &to, "bs=512", "seek=8", "count=1"]);
    assert!(why.contains("Operation not permitted"), "{why}");
    assert!(now()[..4096] == expected[..4096] && now()[4608..] == expected[4608..]);
    run("dd", &[&from, &to, "bs=512", "seek=8", "conv=notrunc"]);
    expected[4096..8192].fill(3);
    assert!(now() == expected);
    let (truncated, _) = try_run("truncate", &["-s", "0", &text(&live)]);
    assert!(!truncated);
    run("truncate", &["-s", &SIZE.to_string(), &text(&live)]);
    assert!(now() == expected);
}

#[test]
fn loop_devices_work_and_their_discards_punch_holes() {
    if !possible(Needs::Loops, "loop devices on live.img") {
        return;
    }
    let mount = mounted();
    for options in [&[][..], &["--direct-io=on"]] {
        {
            let device = Loop::new(&mount.live("vm"), options);
            let file = open(&device.0, 0);
            file.write_all_at(&[0x77; 8192], 4096).unwrap();
            file.sync_all().unwrap();
            let device = device.0.to_str().unwrap();
            run("blkdiscard", &["-o", "65536", "-l", "65536", device]);
        }
        let bytes = fs::read(mount.live("vm")).unwrap();
        assert_eq!(bytes[4096..12_288], [0x77; 8192]);
        assert!(bytes[65536..131_072].iter().all(|&b| b == 0));
        let live = open(&mount.live("vm"), 0);
        assert_eq!(seek(&live, 0, libc::SEEK_HOLE).unwrap(), 65536);
        live.write_all_at(&[1; 131_072], 4096).unwrap();
    }
}
