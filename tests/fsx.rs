//! The file system exerciser (`cargo install fsx --version 0.3.2 --locked`) on a mounted volume.
//!
//! Goal: 100,000 random operations each (`STILLFRAME_FSX_OPS`) on a file of an ext4 that lies on
//! `live.img`, and on `live.img` itself, read back exactly what was written, while a snapshot is taken
//! every second; and every snapshot equals, at once and for ever, what the source file held when it
//! was taken.
//!
//! Method: the exerciser stands still (the filesystem frozen, the process stopped) while the source
//! is hashed directly, past the product, and the snapshot is taken; it goes on while the snapshot is
//! read. `STILLFRAME_FSX_SEED` repeats a run's operations.
//!
//! Not tried on `live.img`: what it refuses by design (truncation, shared writable mappings).

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rig::{Attached, Rig, Running, eventually, must, setting, signal, skip, touch};

const VOLUME: &str = "disk";
/// Between two snapshots.
const EVERY: Duration = Duration::from_secs(1);
/// Snapshots beyond which the oldest goes.
const SNAPSHOTS_MAX: usize = 10;

/// Everything the exerciser can do to a file. Without a sync after each write through a mapping, which
/// would be most of the time; freezing writes those pages back. Without operations on nothing: when it
/// allocates no bytes, which every filesystem refuses, it takes that for a filesystem that cannot.
const ON_A_FILE: &str = "flen = 1048576
nomsyncafterwrite = true
[opsize]
min = 1
[weights]
close_open = 1
invalidate = 1
mapread = 10
mapwrite = 10
read = 10
write = 10
truncate = 5
fsync = 0.3
fdatasync = 0.3
posix_fallocate = 2
punch_hole = 5
sendfile = 5
posix_fadvise = 1
copy_file_range = 5
";

/// What can be done to an image of fixed size without a shared writable mapping.
const ON_AN_IMAGE: &str = "blockmode = true
[weights]
close_open = 0
invalidate = 0
mapread = 0
mapwrite = 0
read = 10
write = 10
truncate = 0
fsync = 0.3
fdatasync = 0.3
posix_fallocate = 0
punch_hole = 5
sendfile = 5
posix_fadvise = 1
copy_file_range = 5
";

/// The exerciser, if it is installed.
fn find_fsx() -> Option<PathBuf> {
    let mut dirs: Vec<PathBuf> = std::env::var_os("PATH")
        .map(|path| std::env::split_paths(&path).collect())
        .unwrap_or_default();
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let cargo = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    dirs.extend(
        cargo
            .or_else(|| Some(home?.join(".cargo")))
            .map(|dir| dir.join("bin")),
    );
    let found = dirs
        .into_iter()
        .map(|dir| dir.join("fsx"))
        .find(|path| path.is_file());
    if found.is_none() {
        skip("no fsx; cargo install fsx --version 0.3.2 --locked");
    }
    found
}

fn hash(path: &Path) -> blake3::Hash {
    let mut file = File::open(path).unwrap();
    let mut hasher = blake3::Hasher::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        match file.read(&mut piece).unwrap() {
            0 => return hasher.finalize(),
            n => hasher.update(&piece[..n]),
        };
    }
}

struct Exerciser {
    process: Running,
    said: PathBuf,
}

impl Exerciser {
    fn start(program: &Path, rig: &Rig, config: &str, target: &Path) -> Exerciser {
        let seed = setting("STILLFRAME_FSX_SEED", rig::SEED);
        let ops = setting("STILLFRAME_FSX_OPS", 100_000);
        println!(
            "STILLFRAME_FSX_SEED={seed} STILLFRAME_FSX_OPS={ops}: {}",
            target.display()
        );
        let (settings, said) = (rig.at("fsx.toml"), rig.at("fsx.log"));
        fs::write(&settings, config).unwrap();
        let log = File::create(&said).unwrap();
        let child = Command::new(program)
            .args(["-N", &ops.to_string(), "-S", &seed.to_string()])
            .arg("-f")
            .arg(&settings)
            .arg("-P")
            .arg(rig.at(""))
            .arg(target)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        Exerciser {
            process: Running(child.unwrap()),
            said,
        }
    }

    /// Whether it goes on; fails if it found a mismatch.
    fn goes_on(&mut self) -> bool {
        let Some(status) = self.process.0.try_wait().unwrap() else {
            return true;
        };
        let said = fs::read_to_string(&self.said).unwrap();
        let good = status.success() && said.contains("All operations completed A-OK!");
        assert!(good, "fsx: {status}\n{said}");
        false
    }

    /// Stops the process, with nothing of it under way; `false` if it has ended.
    fn stop(&mut self) -> bool {
        let pid = self.process.0.id();
        signal(pid, "STOP");
        let mut going = true;
        eventually("all threads of fsx stand still", || {
            going = self.process.0.try_wait().unwrap().is_none();
            !going || stands_still(pid)
        });
        going
    }

    fn resume(&self) {
        signal(self.process.0.id(), "CONT");
    }
}

fn stands_still(pid: u32) -> bool {
    let Ok(mut tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return false;
    };
    tasks.all(|task| {
        let stat = fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").map(|(_, rest)| rest.chars().next());
        matches!(state, Some(Some('T')) | None)
    })
}

/// Snapshots and what the source held when each was taken.
struct Taken<'a> {
    rig: &'a Rig,
    kept: Vec<(String, blake3::Hash)>,
    count: usize,
}

impl<'a> Taken<'a> {
    fn new(rig: &'a Rig) -> Taken<'a> {
        let (kept, count) = (Vec::new(), 0);
        Taken { rig, kept, count }
    }

    /// Call it while nobody writes.
    fn take(&mut self) {
        self.count += 1;
        let name = format!("s{}", self.count);
        let held = hash(&self.rig.at("disk.img"));
        touch(&self.rig.snapshot(VOLUME, &name)).unwrap();
        self.kept.push((name, held));
    }

    /// Call it while somebody writes again.
    fn check_newest(&mut self) {
        let (name, held) = self.kept.last().expect("one was taken");
        self.equal(name, held);
        if self.kept.len() > SNAPSHOTS_MAX {
            let (name, held) = self.kept.remove(0);
            self.equal(&name, &held);
            fs::remove_file(self.rig.snapshot(VOLUME, &name)).unwrap();
        }
    }

    fn equal(&self, name: &str, held: &blake3::Hash) {
        let found = hash(&self.rig.snapshot(VOLUME, name));
        assert!(found == *held, "{name} is not what the source held");
    }

    /// What is left is still what it was; they cannot all be the same.
    fn check_all(&self) -> usize {
        for (name, held) in &self.kept {
            self.equal(name, held);
        }
        let newest = self.kept.last().expect("one was taken").1;
        assert!(self.kept.iter().any(|(_, held)| *held != newest));
        self.count
    }
}

#[test]
fn on_a_file_of_an_ext4_on_live_img() {
    let Some(program) = find_fsx().filter(|_| rig::can_mount() && rig::can_loop()) else {
        return;
    };
    let mut rig = Rig::new();
    let source = rig.source("disk.img", (48 << 20) + 1536);
    rig.mount_with(&["--volume", &format!("{VOLUME}={}", source.display())]);
    let inside = rig.at("inside");
    fs::create_dir(&inside).unwrap();
    let mut attached = Attached::new(&rig.live(VOLUME));
    must("mkfs.ext4", &["-q", "-F", &attached.device]);
    attached.mount(&inside);
    let start = Instant::now();
    let mut exerciser = Exerciser::start(&program, &rig, ON_A_FILE, &inside.join("file"));
    let mut taken = Taken::new(&rig);
    while exerciser.goes_on() {
        let begin = Instant::now();
        must("fsfreeze", &["--freeze", inside.to_str().unwrap()]);
        taken.take();
        must("fsfreeze", &["--unfreeze", inside.to_str().unwrap()]);
        taken.check_newest();
        while begin.elapsed() < EVERY && exerciser.goes_on() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let elapsed = start.elapsed();
    drop(exerciser);
    let count = taken.check_all();
    println!("ext4: no mismatch in {elapsed:?}, {count} snapshots exact");
    attached.detach();
    rig.umount();
}

#[test]
fn on_live_img_itself() {
    let Some(program) = find_fsx().filter(|_| rig::can_mount()) else {
        return;
    };
    let mut rig = Rig::new();
    let source = rig.source("disk.img", (1 << 20) + 777);
    rig.mount_with(&["--volume", &format!("{VOLUME}={}", source.display())]);
    let start = Instant::now();
    let mut exerciser = Exerciser::start(&program, &rig, ON_AN_IMAGE, &rig.live(VOLUME));
    let mut taken = Taken::new(&rig);
    while exerciser.goes_on() {
        let begin = Instant::now();
        if !exerciser.stop() {
            continue;
        }
        taken.take();
        exerciser.resume();
        taken.check_newest();
        while begin.elapsed() < EVERY && exerciser.goes_on() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let elapsed = start.elapsed();
    drop(exerciser);
    let count = taken.check_all();
    println!("live.img: no mismatch in {elapsed:?}, {count} snapshots exact");
    let live = hash(&rig.live(VOLUME));
    rig.umount();
    assert_eq!(hash(&source), live, "the source is the volume");
}
