//! Real filesystems on `live.img`.
//!
//! Goal: a snapshot taken after `sync` is the volume at that instant, and a filesystem that was in
//! use is intact in it. Method: ext4 and XFS are made in an image, mounted through a loop device over
//! `live.img`, and used at random. After each `sync` a snapshot is taken and the source is copied
//! behind the program's back; if the kernel wrote anything meanwhile (its journals have timers), the
//! round is repeated. At the end, when everything was overwritten many times, each of the 20 snapshots
//! must equal its copy byte for byte; plain copies and a clone of each are mounted, so that the journal is
//! replayed, show exactly the files of their instant, and pass the checker. The clone is written to, and
//! its snapshot is looked at once more.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use stillframe::volume::VolumeOptions;

use crate::harness::{Chance, Loop, Mount, Mounted, Needs, assert_equal, possible, run, try_run};

const SNAPSHOTS: usize = 20;
const FILES_MAX: usize = 60;

/// Relative path to content.
type Files = BTreeMap<String, Vec<u8>>;

struct Kind {
    mkfs: &'static [&'static str],
    size: u64,
    /// How a copy is mounted beside the original.
    options: &'static str,
    check: &'static [&'static str],
}

/// Nothing is initialised in the background, which would write at any time.
const EXT4: Kind = Kind {
    mkfs: &[
        "mkfs.ext4",
        "-q",
        "-F",
        "-E",
        "lazy_itable_init=0,lazy_journal_init=0",
    ],
    size: 64 << 20,
    options: "rw",
    check: &["e2fsck", "-f", "-n"],
};

const XFS: Kind = Kind {
    mkfs: &["mkfs.xfs", "-q", "-f"],
    size: 320 << 20,
    // It is the same filesystem as the one that is mounted already.
    options: "rw,nouuid",
    check: &["xfs_repair", "-n"],
};

/// Some work of a user: files come, grow, change, move and go.
fn work(root: &Path, files: &mut Files, chance: &mut Chance, next: &mut u64) {
    for _ in 0..12 {
        let names: Vec<String> = files.keys().cloned().collect();
        let some = names.get(chance.below(names.len().max(1) as u64) as usize);
        match (chance.below(10), some) {
            (0..=1, Some(name)) => {
                fs::remove_file(root.join(name)).unwrap();
                files.remove(name);
            }
            (2, Some(name)) => {
                *next += 1;
                let new = format!("d{}/moved{next}", chance.below(3));
                fs::rename(root.join(name), root.join(&new)).unwrap();
                let content = files.remove(name).unwrap();
                files.insert(new, content);
            }
            (3..=5, Some(name)) => {
                let content = files.get_mut(name).unwrap();
                let len = (1 + chance.below(40_000)) as usize;
                let at = chance.below(content.len() as u64 + 1) as usize;
                content.resize(content.len().max(at + len), 0);
                content[at..at + len].copy_from_slice(&chance.bytes(len));
                fs::write(root.join(name), &content[..]).unwrap();
            }
            _ if files.len() >= FILES_MAX => {}
            _ => {
                *next += 1;
                let name = format!("d{}/file{next}", chance.below(3));
                let len = chance.below(150_000) as usize;
                let content = chance.bytes(len);
                fs::write(root.join(&name), &content).unwrap();
                files.insert(name, content);
            }
        }
    }
}

/// When the source was last written.
fn written(source: &Path) -> (i64, i64) {
    let meta = fs::metadata(source).unwrap();
    (meta.mtime(), meta.mtime_nsec())
}

/// A snapshot and an independent copy of the same instant.
fn take(mount: &Mount, source: &Path, filesystem: &Path, name: &str) {
    for _ in 0..20 {
        run("sync", &[Path::new("-f"), filesystem]);
        let before = written(source);
        let snapshot = mount.touch("vm", name);
        run("cp", &[source, &mount.scratch(&format!("{name}.copy"))]);
        if written(source) == before {
            return;
        }
        fs::remove_file(snapshot).unwrap();
    }
    panic!("the kernel never stops writing");
}

fn found(root: &Path) -> Files {
    let mut files = Files::new();
    for directory in 0..3 {
        for entry in fs::read_dir(root.join(format!("d{directory}"))).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let content = fs::read(entry.path()).unwrap();
            files.insert(format!("d{directory}/{name}"), content);
        }
    }
    files
}

/// Mounts a plain copy of a snapshot, looks, and checks it.
fn assert_intact(mount: &Mount, kind: &Kind, snapshot: &Path, files: &Files, what: &str) {
    let copy = mount.scratch("copy.img");
    run("cp", &[snapshot, &copy]);
    {
        let device = Loop::new(&copy, &[]);
        let mounted = Mounted::new(&device.0, mount.scratch("copy"), kind.options);
        let found = found(&mounted.0);
        assert!(
            found == *files,
            "{what} shows {:?}, not {:?}",
            found.keys(),
            files.keys()
        );
    }
    let args: Vec<&str> = kind.check[1..]
        .iter()
        .copied()
        .chain(copy.to_str())
        .collect();
    let (clean, text) = try_run(kind.check[0], &args);
    assert!(clean, "{what}: {text}");
}

/// A clone is mounted read-write, which replays the journal, shows the files of the instant, takes
/// new ones, and passes the checker; what it was told is still there afterwards.
fn assert_clone_works(mount: &Mount, kind: &Kind, name: &str, files: &Files) {
    let clone = mount.at(&format!("vm/clones/{name}.img"));
    fs::hard_link(mount.snapshot("vm", name), &clone).unwrap();
    let mut files = files.clone();
    for round in ["first", "second"] {
        let device = Loop::new(&clone, &[]);
        let mounted = Mounted::new(&device.0, mount.scratch("clone"), kind.options);
        assert!(
            found(&mounted.0) == files,
            "{name}, {round} mount of its clone"
        );
        let added = format!("d0/of the clone, {round}");
        let content = vec![round.len() as u8; 300_000];
        fs::write(mounted.0.join(&added), &content).unwrap();
        files.insert(added, content);
        if let Some(gone) = files.keys().next().cloned() {
            fs::remove_file(mounted.0.join(&gone)).unwrap();
            files.remove(&gone);
        }
    }
    let args: Vec<&str> = kind.check[1..]
        .iter()
        .copied()
        .chain(clone.to_str())
        .collect();
    let (clean, text) = try_run(kind.check[0], &args);
    assert!(clean, "the clone of {name}: {text}");
    fs::remove_file(&clone).unwrap();
}

fn snapshots_of(kind: &Kind, seed: u64, loop_options: &[&str]) {
    let mount = Mount::new();
    let source = mount.scratch("source.img");
    fs::File::create(&source)
        .unwrap()
        .set_len(kind.size)
        .unwrap();
    let args: Vec<&str> = kind.mkfs[1..]
        .iter()
        .copied()
        .chain(source.to_str())
        .collect();
    run(kind.mkfs[0], &args);
    mount.add("vm", &source, VolumeOptions::default());
    let (mut chance, mut next) = (Chance(seed), 0);
    let mut instants: Vec<Files> = Vec::new();
    {
        let device = Loop::new(&mount.live("vm"), loop_options);
        let filesystem = Mounted::new(&device.0, mount.scratch("fs"), "rw");
        for directory in 0..3 {
            fs::create_dir(filesystem.0.join(format!("d{directory}"))).unwrap();
        }
        let mut files = Files::new();
        for i in 0..SNAPSHOTS {
            work(&filesystem.0, &mut files, &mut chance, &mut next);
            take(&mount, &source, &filesystem.0, &format!("s{i}"));
            instants.push(files.clone());
        }
        for _ in 0..5 {
            work(&filesystem.0, &mut files, &mut chance, &mut next);
        }
        // What is left is given back: discards preserve what snapshots need.
        run("fstrim", &[&filesystem.0]);
        for (i, files) in instants.iter().enumerate() {
            let snapshot = mount.snapshot("vm", &format!("s{i}"));
            assert_equal(&snapshot, &mount.scratch(&format!("s{i}.copy")));
            if i % 4 == 0 {
                assert_intact(&mount, kind, &snapshot, files, &format!("s{i}"));
            }
            assert_clone_works(&mount, kind, &format!("s{i}"), files);
            assert_equal(&snapshot, &mount.scratch(&format!("s{i}.copy")));
        }
        instants.push(files);
    }
    // The live volume itself, unmounted.
    let live = mount.live("vm");
    assert_intact(&mount, kind, &live, &instants[SNAPSHOTS], "live");
    assert_equal(&live, &source);
}

#[test]
fn snapshots_of_ext4_are_the_files_of_their_instant() {
    if possible(Needs::Loops, "ext4 on live.img") {
        snapshots_of(&EXT4, 1, &[]);
    }
}

#[test]
fn snapshots_of_xfs_are_the_files_of_their_instant() {
    if possible(Needs::Loops, "XFS on live.img") {
        snapshots_of(&XFS, 2, &["--direct-io=on"]);
    }
}
