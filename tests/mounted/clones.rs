//! `clones/` through a mount: made by ln and cp, written with plain tools, used as a disk; and the
//! commands that change a whole volume while it is mounted.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use stillframe::units::Name;
use stillframe::volume::VolumeOptions;

use crate::harness::{
    Chance, Loop, Mount, Mounted, Needs, allocated, arg, assert_equal, errno, fallocate,
    first_page, open, possible, qemu_img, rename_with, run, seek, try_run,
};

/// A whole number of sectors, not of grains.
const SIZE: u64 = (3 << 20) + 512;

/// A mount with the volumes `vm` (random bytes and a hole from 1 to 2 MiB) and `other`, and a snapshot
/// `a` of each; `vm` was changed since.
fn mounted() -> Mount {
    let mount = Mount::new();
    let mut chance = Chance(7);
    for name in ["vm", "other"] {
        let source = mount.scratch(&format!("{name}.img"));
        let file = File::create(&source).unwrap();
        file.set_len(SIZE).unwrap();
        file.write_all_at(&chance.bytes(1 << 20), 0).unwrap();
        file.write_all_at(&chance.bytes((1 << 20) + 512), 2 << 20)
            .unwrap();
        mount.add(name, &source, VolumeOptions::default());
        run("cp", &[&source, &mount.scratch(&format!("{name}.a"))]);
        mount.touch(name, "a");
    }
    let live = open(&mount.live("vm"), 0);
    live.write_all_at(&chance.bytes(100_000), 5000).unwrap();
    mount
}

fn clone(mount: &Mount, name: &str) -> PathBuf {
    mount.at(&format!("vm/clones/{name}.img"))
}

fn ln(from: &Path, to: &Path) -> i32 {
    errno(fs::hard_link(from, to))
}

fn fact(path: &Path, name: &str) -> String {
    let name = format!("user.stillframe.{name}");
    let path = path.to_str().unwrap();
    run(
        "getfattr",
        &["--only-values", "--absolute-names", "-n", &name, path],
    )
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
fn ln_makes_a_clone_and_parents_go_in_any_order() {
    if !possible(Needs::Fuse, "clones by ln") {
        return;
    }
    let mut mount = mounted();
    let (a, expected) = (mount.snapshot("vm", "a"), mount.scratch("vm.a"));
    let b = clone(&mount, "b");
    run("ln", &[&a, &b]);
    let (of_a, of_b) = (fs::metadata(&a).unwrap(), fs::metadata(&b).unwrap());
    assert_ne!(of_a.ino(), of_b.ino());
    assert_eq!((of_b.mode() & 0o7777, of_b.nlink()), (0o600, 1));
    assert_eq!((of_b.len(), of_b.blocks()), (SIZE, of_a.blocks()));
    assert_eq!(fs::metadata(&a).unwrap().nlink(), 1);
    assert_equal(&b, &expected);
    refusals(&mount, &a, &b);
    // Three generations; each has what its parent had then.
    let mut twins = Vec::new();
    let mut chance = Chance(11);
    let mut parent = b.clone();
    for name in ["c", "d"] {
        let data = chance.bytes(70_000);
        let at = chance.below(SIZE - 70_000);
        open(&parent, 0).write_all_at(&data, at).unwrap();
        open(&expected, 0).write_all_at(&data, at).unwrap();
        let child = clone(&mount, name);
        run("ln", &[&parent, &child]);
        parent = child;
    }
    let d = parent;
    open(&d, 0).write_all_at(b"of d", SIZE - 4).unwrap();
    open(&expected, 0).write_all_at(b"of d", SIZE - 4).unwrap();
    twins.push((d.clone(), fs::metadata(&d).unwrap().ino()));
    for gone in [clone(&mount, "c"), a.clone(), b.clone()] {
        let held = OpenOptions::new().read(true).open(&gone).unwrap();
        let before = fs::read(&gone).unwrap();
        fs::remove_file(&gone).unwrap();
        assert_equal(&d, &expected);
        let mut bytes = vec![0; before.len()];
        held.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == before, "who has it open goes on");
        drop(held);
        mount.restart();
        for (path, ino) in &twins {
            assert_eq!(fs::metadata(path).unwrap().ino(), *ino);
            assert_equal(path, &expected);
        }
    }
    assert_eq!(list(&mount.at("vm/clones")), ["d.img"]);
    assert!(list(&mount.at("vm/snapshots")).is_empty());
}

fn refusals(mount: &Mount, a: &Path, b: &Path) {
    assert_eq!(ln(a, b), libc::EEXIST);
    assert_eq!(ln(b, b), libc::EEXIST);
    assert_eq!(ln(a, &mount.at("other/clones/b.img")), libc::EXDEV);
    assert_eq!(ln(&mount.live("vm"), &clone(mount, "x")), libc::EPERM);
    for to in ["vm/snapshots/x.img", "vm/x.img", "x.img", "vm/diffs/x.img"] {
        for from in [a, b] {
            assert_eq!(ln(from, &mount.at(to)), libc::EPERM, "{to}");
        }
    }
    for bad in ["x", "live", ".x"] {
        let to = mount.at("vm/clones").join(format!("{bad}.img"));
        let to = if bad == "x" {
            to.with_extension("")
        } else {
            to
        };
        assert_eq!(ln(a, &to), libc::EINVAL, "{to:?}");
    }
    let c = clone(mount, "c");
    run("ln", &[a, c.as_path()]);
    assert_eq!(errno(fs::rename(b, &c)), libc::EEXIST);
    for flags in [libc::RENAME_EXCHANGE, libc::RENAME_WHITEOUT] {
        assert_eq!(errno(rename_with(b, &c, flags)), libc::EINVAL);
    }
    let out = fs::rename(b, mount.at("vm/snapshots/b.img"));
    assert_eq!(errno(out), libc::EPERM);
    let number = fs::metadata(b).unwrap().ino();
    let moved = clone(mount, "moved");
    run("mv", &[b, moved.as_path()]);
    assert_eq!(fs::metadata(&moved).unwrap().ino(), number);
    run("mv", &[moved.as_path(), b]);
    fs::remove_file(&c).unwrap();
    assert_eq!(errno(fs::remove_file(&c)), libc::ENOENT);
    assert_eq!(errno(fs::create_dir(&c)), libc::EPERM);
    for mode in ["600", "644"] {
        let (done, _) = try_run("chmod", &[mode, b.to_str().unwrap()]);
        assert_eq!(done, mode == "600");
    }
}

#[test]
fn a_clone_is_written_like_a_device() {
    if !possible(Needs::Fuse, "writing a clone") {
        return;
    }
    let mount = mounted();
    let b = clone(&mount, "b");
    run("ln", &[&mount.snapshot("vm", "a"), &b]);
    let twin = mount.scratch("vm.a");
    let file = open(&b, 0);
    let mirror = open(&twin, 0);
    assert_eq!(file.write_at(&[7; 20], SIZE - 10).unwrap(), 10);
    mirror.write_all_at(&[7; 10], SIZE - 10).unwrap();
    for offset in [SIZE, 1 << 40] {
        assert_eq!(errno(file.write_at(b"x", offset)), libc::ENOSPC);
    }
    file.set_len(SIZE).unwrap();
    for size in [0, SIZE - 1, SIZE + 1] {
        assert_eq!(errno(file.set_len(size)), libc::EPERM);
    }
    let appended = OpenOptions::new().append(true).open(&b);
    assert_eq!(errno(appended), libc::EPERM);
    assert_eq!(errno(first_page(&file, libc::MAP_SHARED)), libc::ENODEV);
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    for disk in [&file, &mirror] {
        fallocate(disk, punch, 65_536, 65_536).unwrap();
        fallocate(disk, libc::FALLOC_FL_ZERO_RANGE, 200_000, 100).unwrap();
    }
    fallocate(&file, 0, 0, SIZE).unwrap();
    assert_eq!(errno(fallocate(&file, 0, 1, SIZE)), libc::ENOSPC);
    let mode = libc::FALLOC_FL_COLLAPSE_RANGE;
    assert_eq!(errno(fallocate(&file, mode, 0, 4096)), libc::EOPNOTSUPP);
    assert_eq!(seek(&file, 0, libc::SEEK_HOLE).unwrap(), 65_536);
    assert_eq!(seek(&file, 65_536, libc::SEEK_DATA).unwrap(), 131_072);
    assert_eq!(seek(&file, 131_072, libc::SEEK_HOLE).unwrap(), 1 << 20);
    assert_eq!(errno(seek(&file, SIZE, libc::SEEK_DATA)), libc::ENXIO);
    file.sync_all().unwrap();
    let direct = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(&b)
        .unwrap();
    let page = vec![9u8; 3 * 4096];
    let at = page.as_ptr().align_offset(4096);
    direct.write_all_at(&page[at..at + 4096], 1 << 20).unwrap();
    mirror.write_all_at(&[9; 4096], 1 << 20).unwrap();
    let mut back = [0; 4096];
    file.read_exact_at(&mut back, 1 << 20).unwrap();
    assert_eq!(back, [9; 4096], "what one wrote the other reads");
    assert_equal(&b, &twin);
    for (name, value) in [("layers", "1"), ("state", "active")] {
        assert_eq!(fact(&b, name), value);
    }
    let base = fact(&mount.snapshot("vm", "a"), "uuid");
    assert_eq!(fact(&b, "base"), base);
    assert_ne!(fact(&b, "own"), "0");
    let set = ["-n", "user.stillframe.own", "-v", "1", b.to_str().unwrap()];
    assert!(try_run("setfattr", &set).1.contains("not permitted"));
}

#[test]
fn whole_images_are_written_over_a_clone() {
    if !possible(Needs::Fuse, "rewriting a clone") {
        return;
    }
    let mount = mounted();
    let b = clone(&mount, "b");
    run("ln", &[&mount.snapshot("vm", "a"), &b]);
    let (first, second) = (mount.scratch("vm.a"), mount.scratch("other.a"));
    // What is there already is not written again.
    run("cp", &[&first, &b]);
    assert_eq!(fact(&b, "own"), "0");
    for (tool, image) in [("dd", &second), ("cp", &first), ("sparse", &second)] {
        match tool {
            "dd" => run("dd", &[&arg("if", image), &arg("of", &b), "bs=1M"]),
            "cp" => run("cp", &[image, &b]),
            _ => run("cp", &[Path::new("--sparse=always"), image, &b]),
        };
        assert_equal(&b, image);
    }
    assert_equal(&mount.snapshot("vm", "a"), &first);
    // Within the mount cp asks for copy_file_range, which the kernel then does by itself.
    let foreign = mount.snapshot("other", "a");
    for to in [mount.live("vm"), b.clone()] {
        run("cp", &[&first, &to]);
        run("cp", &[&foreign, &to]);
        assert_equal(&to, &second);
        let dense = mount.touch("vm", if to == b { "dense-b" } else { "dense" });
        run("cp", &[&dense, &to]);
        assert_equal(&to, &dense);
    }
}

/// cp into `clones/`: of a dense snapshot it takes over, of a sparse one it copies; either way the
/// result is the snapshot.
#[test]
fn cp_makes_a_clone_of_whatever_it_is_given() {
    if !possible(Needs::Fuse, "clones by cp") {
        return;
    }
    let mut mount = mounted();
    let mut chance = Chance(3);
    let dense = chance.bytes(SIZE as usize);
    open(&mount.live("vm"), 0).write_all_at(&dense, 0).unwrap();
    let full = mount.touch("vm", "full");
    assert_eq!(fs::metadata(&full).unwrap().blocks(), SIZE / 512);
    let (a, image) = (mount.snapshot("vm", "a"), mount.scratch("other.a"));
    let foreign = mount.snapshot("other", "a");
    let whole = [
        ("taken", &full),
        ("sparse", &a),
        ("foreign", &foreign),
        ("file", &image),
    ];
    for (name, from) in whole {
        let to = clone(&mount, name);
        run("cp", &[from, &to]);
        assert_equal(&to, from);
        assert_eq!(fs::metadata(&to).unwrap().len(), SIZE);
    }
    assert_eq!(
        fact(&clone(&mount, "taken"), "own"),
        "0",
        "nothing was copied"
    );
    assert_ne!(fact(&clone(&mount, "sparse"), "own"), "0");
    let taken = clone(&mount, "taken");
    open(&taken, 0).write_all_at(b"its own", 100).unwrap();
    let mut expected = dense.clone();
    expected[100..107].copy_from_slice(b"its own");
    assert!(fs::read(&taken).unwrap() == expected);
    assert!(fs::read(&full).unwrap() == dense);
    // A shell that writes a file, a tool that sets the size first, and one copy over another.
    let small = clone(&mount, "small");
    run(
        "sh",
        &["-c", &format!("printf hello > {}", small.display())],
    );
    assert_eq!(fs::read(&small).unwrap(), b"hello");
    let raw = clone(&mount, "raw");
    let raw_text = raw.to_str().unwrap();
    let from = a.to_str().unwrap();
    if qemu_img("a copy into a clone") {
        run(
            "qemu-img",
            &["convert", "-f", "raw", "-O", "raw", from, raw_text],
        );
        assert_equal(&raw, &a);
    }
    let numbers: Vec<_> = whole
        .iter()
        .map(|(name, _)| fs::metadata(clone(&mount, name)).unwrap().ino())
        .collect();
    fs::remove_file(&a).unwrap();
    fs::remove_file(&full).unwrap();
    mount.restart();
    assert!(fs::read(&taken).unwrap() == expected);
    assert_equal(&clone(&mount, "sparse"), &mount.scratch("vm.a"));
    assert_equal(&clone(&mount, "foreign"), &image);
    assert_eq!(fs::read(&small).unwrap(), b"hello");
    for ((name, _), ino) in whole.iter().zip(numbers) {
        assert_eq!(
            fs::metadata(clone(&mount, name)).unwrap().ino(),
            ino,
            "{name}"
        );
    }
}

#[test]
fn a_filesystem_is_made_used_and_checked_on_a_clone() {
    if !possible(Needs::Loops, "a loop device on a clone") {
        return;
    }
    let mount = Mount::new();
    let source = mount.scratch("vm.img");
    File::create(&source).unwrap().set_len(64 << 20).unwrap();
    mount.add("vm", &source, VolumeOptions::default());
    mount.touch("vm", "empty");
    let work = clone(&mount, "work");
    run("ln", &[&mount.snapshot("vm", "empty"), &work]);
    let text = Chance(1).bytes(3 << 20);
    {
        let device = Loop::new(&work, &["--direct-io=on"]);
        run("mkfs.ext4", &[Path::new("-q"), &device.0]);
        let at = Mounted::new(&device.0, mount.scratch("fs"), "rw");
        fs::write(at.0.join("file"), &text).unwrap();
        run("sync", &[Path::new("-f"), &at.0]);
        // A clone of a clone in use is as if power was cut: its journal is replayed.
        run("ln", &[&work, &clone(&mount, "copy")]);
    }
    for name in ["work", "copy"] {
        let device = Loop::new(&clone(&mount, name), &[]);
        let at = Mounted::new(&device.0, mount.scratch("fs"), "rw");
        assert!(fs::read(at.0.join("file")).unwrap() == text, "{name}");
        fs::write(at.0.join(name), b"written").unwrap();
        drop(at);
        run("fsck.ext4", &[Path::new("-fn"), &device.0]);
    }
    let empty = fs::read(mount.snapshot("vm", "empty")).unwrap();
    assert!(empty.iter().all(|&b| b == 0));
    assert!(allocated(&work) < 32 << 20);
}

/// What the file handles of NFS need: a handle is good also after the kernel has forgotten the node.
#[test]
fn a_file_handle_outlives_the_kernel_s_memory() {
    if !possible(Needs::Loops, "file handles") {
        return;
    }
    let mount = mounted();
    let b = clone(&mount, "b");
    run("ln", &[&mount.snapshot("vm", "a"), &b]);
    let paths = [
        b,
        mount.live("vm"),
        mount.snapshot("vm", "a"),
        mount.at("vm/snapshots"),
        mount.at("vm"),
    ];
    let handles: Vec<_> = paths.iter().map(|path| FileHandle::of(path)).collect();
    let numbers: Vec<_> = paths
        .iter()
        .map(|p| fs::metadata(p).unwrap().ino())
        .collect();
    let root = File::open(mount.at("")).unwrap();
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    for (handle, ino) in handles.iter().zip(&numbers) {
        assert_eq!(handle.open(&root).unwrap().metadata().unwrap().ino(), *ino);
    }
    fs::remove_file(&paths[0]).unwrap();
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    assert_eq!(errno(handles[0].open(&root)), libc::ESTALE);
}

#[test]
fn a_volume_is_reverted_under_a_mount() {
    if !possible(Needs::Fuse, "revert") {
        return;
    }
    let mount = mounted();
    let (live, a) = (mount.live("vm"), mount.snapshot("vm", "a"));
    let changed = fs::read(&live).unwrap();
    let revert = |to: &str| {
        let args = ["-n", "user.stillframe.revert", "-v", to];
        try_run("setfattr", &[&args[..], &[live.to_str().unwrap()]].concat())
    };
    let reader = File::open(&live).unwrap();
    // A private mapping has pages in the kernel's cache.
    let mapped = first_page(&reader, libc::MAP_PRIVATE).unwrap();
    assert_eq!(mapped, changed[..4096]);
    {
        let _writer = open(&live, 0);
        assert!(revert("a").1.contains("busy"));
    }
    assert!(revert("x").1.contains("No such file"));
    assert!(fs::read(&live).unwrap() == changed);
    // Though the writer's release may come a moment after its close.
    let done = revert("a");
    assert!(done.0, "{}", done.1);
    assert_equal(&live, &a);
    let mut bytes = vec![0; SIZE as usize];
    reader.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == fs::read(&a).unwrap());
    let names = list(&mount.at("vm/snapshots"));
    let undo = names
        .iter()
        .find(|n| n.starts_with("before-revert-a"))
        .unwrap();
    assert!(fs::read(mount.at("vm/snapshots").join(undo)).unwrap() == changed);
    assert!(revert(undo.trim_end_matches(".img")).0);
    assert!(fs::read(&live).unwrap() == changed);
}

#[test]
fn a_volume_is_resized_under_a_mount_and_a_bookmark_is_an_incremental_s_beginning() {
    if !possible(Needs::Fuse, "resize and bookmarks") {
        return;
    }
    let mut mount = mounted();
    let name = |name: &str| Name::new(name).unwrap();
    let (live, a) = (mount.live("vm"), mount.snapshot("vm", "a"));
    let backup = mount.scratch("a.img");
    run("cp", &[&a, &backup]);
    let file = open(&live, 0);
    let larger = SIZE + 10 * 4096;
    mount.engine().resize_volume(&name("vm"), larger).unwrap();
    assert_eq!(file.metadata().unwrap().len(), larger);
    file.write_all_at(b"new end", larger - 7).unwrap();
    drop(file);
    let b = mount.touch("vm", "b");
    assert_eq!(fs::metadata(&a).unwrap().len(), SIZE);
    assert_eq!(fs::metadata(&b).unwrap().len(), larger);
    mount
        .engine()
        .delete_snapshot_keep_bookmark(&name("vm"), &name("a"))
        .unwrap();
    assert_eq!(errno(File::open(&a)), libc::ENOENT);
    mount.restart();
    // The backup of a and what changed since the bookmark are a backup of b.
    let overlay = mount.at("vm/diffs/a..b.qcow2");
    let copied = mount.scratch("a..b.qcow2");
    run("cp", &[&overlay, &copied]);
    if qemu_img("an incremental from a bookmark") {
        let (copied, b) = (copied.to_str().unwrap(), b.to_str().unwrap());
        run("qemu-img", &["check", copied]);
        run(
            "qemu-img",
            &["compare", "-f", "raw", "-F", "qcow2", b, copied],
        );
    }
    assert!(!list(&mount.at("vm/diffs")).contains(&"a..b.qcow2".to_owned()));
    assert_eq!(errno(File::open(mount.at("vm/diffs/a.img"))), libc::ENOENT);
}

/// name_to_handle_at(2) and open_by_handle_at(2).
struct FileHandle(Vec<u64>);

#[allow(unsafe_code, reason = "two system calls without a wrapper")]
impl FileHandle {
    const BYTES: u32 = 64;

    fn of(path: &Path) -> FileHandle {
        use std::os::unix::ffi::OsStrExt;
        let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
        let mut room = vec![0u64; 1 + Self::BYTES as usize / 8];
        let handle = room.as_mut_ptr().cast::<libc::file_handle>();
        let mut mount_id = 0;
        // SAFETY: the handle has its two numbers and room for the bytes that the first one names.
        let done = unsafe {
            (*handle).handle_bytes = Self::BYTES;
            libc::name_to_handle_at(libc::AT_FDCWD, path.as_ptr(), handle, &mut mount_id, 0)
        };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        FileHandle(room)
    }

    fn open(&self, of: &File) -> std::io::Result<File> {
        use std::os::fd::{AsRawFd, FromRawFd};
        let mut room = self.0.clone();
        let handle = room.as_mut_ptr().cast::<libc::file_handle>();
        // SAFETY: the handle was filled by the kernel; a descriptor that it returns is ours alone.
        unsafe {
            match libc::open_by_handle_at(of.as_raw_fd(), handle, libc::O_RDONLY) {
                -1 => Err(std::io::Error::last_os_error()),
                fd => Ok(File::from_raw_fd(fd)),
            }
        }
    }
}
