//! Random operations through the mount against a model in memory.
//!
//! Goal: whatever is written, punched, zeroed, synced, snapshotted, removed and renamed, through
//! whichever kind of descriptor, every view holds what the model says, also for who holds a removed
//! snapshot open, and after a restart. Method: operations from a printed seed on two volumes, one of
//! them no multiple of its grain; all views are compared whole every 100, by turns through the
//! kernel's cache and without it.
//! `STILLFRAME_MODEL_SEED` repeats a run.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use stillframe::sys::disk::Disk;
use stillframe::units::Grain;
use stillframe::volume::VolumeOptions;

use crate::harness::{Chance, Mount, Needs, disk, fallocate, fresh, open, possible};

const OPERATIONS: u64 = 5000;
const COMPARE_EVERY: u64 = 100;
const SNAPSHOTS_MAX: usize = 5;

/// A snapshot of the model.
struct Taken {
    content: Arc<Vec<u8>>,
    mtime: (i64, i64),
}

/// The ways to write.
struct Files {
    plain: File,
    direct: File,
    durable: File,
}

struct Volume {
    name: &'static str,
    live: Vec<u8>,
    snapshots: BTreeMap<String, Taken>,
    /// Removed, and held open.
    held: Vec<(File, Arc<Vec<u8>>)>,
    changed: bool,
    last_mtime: Option<(i64, i64)>,
}

struct Run {
    mount: Mount,
    volumes: Vec<Volume>,
    chance: Chance,
    counts: BTreeMap<&'static str, u64>,
    next_name: u64,
}

fn files(mount: &Mount, name: &str) -> Files {
    let live = mount.live(name);
    Files {
        plain: open(&live, 0),
        direct: open(&live, libc::O_DIRECT),
        durable: open(&live, libc::O_DSYNC),
    }
}

/// A place in `buffer` where direct I/O may begin.
fn aligned(buffer: &mut [u8], len: usize) -> &mut [u8] {
    let skip = buffer.as_ptr().align_offset(4096);
    &mut buffer[skip..skip + len]
}

impl Run {
    fn new(seed: u64) -> Run {
        let mount = Mount::new();
        let mut volumes = Vec::new();
        for (name, size, grain) in [("even", 3 << 20, 4096), ("odd", (2 << 20) + 777, 16384)] {
            let source = mount.scratch(name);
            File::create(&source).unwrap().set_len(size).unwrap();
            let options = VolumeOptions {
                grain: Grain::new(grain).unwrap(),
                ..VolumeOptions::default()
            };
            mount.add(name, &source, options);
            volumes.push(Volume {
                name,
                live: vec![0; size as usize],
                snapshots: BTreeMap::new(),
                held: Vec::new(),
                changed: true,
                last_mtime: None,
            });
        }
        Run {
            mount,
            volumes,
            chance: Chance(seed),
            counts: BTreeMap::new(),
            next_name: 0,
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// A range, now and then at the very end, in units of `unit` bytes.
    fn range(&mut self, v: usize, unit: u64) -> (u64, usize) {
        let size = self.volumes[v].live.len() as u64;
        let at = match self.chance.below(8) {
            0 => size - 1 - self.chance.below(20_000),
            1 => self.chance.below(size),
            _ => self.chance.below(256 << 10),
        };
        let len = match self.chance.below(6) {
            0 => 1 + self.chance.below(600),
            1 => 1 + self.chance.below(100_000),
            _ => 4096 * (1 + self.chance.below(4)),
        };
        let at = at / unit * unit;
        let len = len.next_multiple_of(unit).min(size - at) / unit * unit;
        (at, len as usize)
    }

    fn data(&mut self, v: usize, at: u64, len: usize) -> Vec<u8> {
        match self.chance.below(12) {
            0 => vec![0; len],
            1 => self.volumes[v].live[at as usize..][..len].to_vec(),
            _ => self.chance.bytes(len),
        }
    }

    /// Takes the bytes over into the model.
    fn wrote(&mut self, v: usize, at: u64, data: &[u8]) {
        let volume = &mut self.volumes[v];
        let place = &mut volume.live[at as usize..][..data.len()];
        volume.changed |= place != data;
        place.copy_from_slice(data);
    }

    fn write(&mut self, v: usize, files: &Files, durable: bool) {
        let (at, len) = self.range(v, 1);
        let data = self.data(v, at, len);
        let file = if durable {
            &files.durable
        } else {
            &files.plain
        };
        file.write_all_at(&data, at).unwrap();
        self.wrote(v, at, &data);
        self.count(if durable { "O_DSYNC write" } else { "write" });
    }

    /// One request of two parts that goes around every cache.
    fn write_direct(&mut self, v: usize, files: &Files) {
        let (at, len) = self.range(v, 4096);
        if len == 0 {
            return;
        }
        let data = self.data(v, at, len);
        let mut buffer = vec![0; len + 4096];
        let place = aligned(&mut buffer, len);
        place.copy_from_slice(&data);
        let (head, tail) = place.split_at(4096);
        disk(&files.direct).write_all_at(at, &[head, tail]).unwrap();
        self.wrote(v, at, &data);
        self.count("O_DIRECT pwritev");
    }

    fn make_zero(&mut self, v: usize, files: &Files, punch: bool) {
        let (at, len) = match self.chance.below(30) {
            0 => (0, self.volumes[v].live.len()),
            _ => self.range(v, 1),
        };
        let mode = if punch {
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE
        } else {
            libc::FALLOC_FL_ZERO_RANGE
        };
        fallocate(&files.plain, mode, at, len as u64).unwrap();
        self.wrote(v, at, &vec![0; len]);
        self.count(if punch { "punch" } else { "zero" });
    }

    fn take(&mut self, v: usize) {
        if self.volumes[v].snapshots.len() >= SNAPSHOTS_MAX {
            return self.remove(v);
        }
        self.next_name += 1;
        let name = format!("s{}", self.next_name);
        let path = self.mount.snapshot(self.volumes[v].name, &name);
        let file = File::create_new(&path).unwrap();
        let meta = file.metadata().unwrap();
        let mtime = (meta.mtime(), meta.mtime_nsec());
        let volume = &mut self.volumes[v];
        match (volume.last_mtime, volume.changed) {
            (Some(last), true) => assert!(mtime.0 > last.0, "{mtime:?} after {last:?}"),
            (Some(last), false) => assert!(mtime == last || mtime.0 > last.0),
            (None, _) => {}
        }
        (volume.last_mtime, volume.changed) = (Some(mtime), false);
        let content = Arc::new(volume.live.clone());
        volume.snapshots.insert(name, Taken { content, mtime });
        self.count("snapshot");
    }

    fn pick(&mut self, v: usize) -> Option<String> {
        let names: Vec<String> = self.volumes[v].snapshots.keys().cloned().collect();
        let count = names.len() as u64;
        (count > 0).then(|| names[self.chance.below(count) as usize].clone())
    }

    fn remove(&mut self, v: usize) {
        let Some(name) = self.pick(v) else { return };
        let path = self.mount.snapshot(self.volumes[v].name, &name);
        let hold = self.chance.below(3) == 0;
        let held = hold.then(|| File::open(&path).unwrap());
        fs::remove_file(&path).unwrap();
        let volume = &mut self.volumes[v];
        let taken = volume.snapshots.remove(&name).unwrap();
        if let Some(file) = held {
            if volume.held.len() >= 2 {
                volume.held.remove(0);
            }
            volume.held.push((file, taken.content));
        }
        self.count("rm");
    }

    fn rename(&mut self, v: usize) {
        let Some(name) = self.pick(v) else { return };
        self.next_name += 1;
        let new = format!("s{}", self.next_name);
        let volume = &mut self.volumes[v];
        let path = |name: &str| self.mount.snapshot(volume.name, name);
        fs::rename(path(&name), path(&new)).unwrap();
        let taken = volume.snapshots.remove(&name).unwrap();
        volume.snapshots.insert(new, taken);
        self.count("mv");
    }

    fn read(&mut self, v: usize, files: &Files) {
        let (at, len) = self.range(v, 4096);
        let direct = self.chance.below(2) == 0;
        let mut buffer = vec![0; len + 4096];
        let place = aligned(&mut buffer, len);
        let of_snapshot = self.pick(v).filter(|_| direct);
        let (file, content) = match &of_snapshot {
            Some(name) => {
                let path = self.mount.snapshot(self.volumes[v].name, name);
                let content = Arc::clone(&self.volumes[v].snapshots[name].content);
                (File::open(path).unwrap(), content)
            }
            None => {
                let file = if direct { &files.direct } else { &files.plain };
                let content = Arc::new(self.volumes[v].live.clone());
                (file.try_clone().unwrap(), content)
            }
        };
        file.read_exact_at(place, at).unwrap();
        assert!(place == &content[at as usize..][..len], "read at {at}");
        self.count("read");
    }

    /// Walks data and holes of a view.
    fn walk(&mut self, v: usize, files: &Files) {
        let view = self.pick(v).filter(|_| self.chance.below(2) == 0);
        let (file, content) = match &view {
            Some(name) => {
                let path = self.mount.snapshot(self.volumes[v].name, name);
                let content = Arc::clone(&self.volumes[v].snapshots[name].content);
                (File::open(path).unwrap(), content)
            }
            None => (
                files.plain.try_clone().unwrap(),
                Arc::new(self.volumes[v].live.clone()),
            ),
        };
        let (disk, size) = (disk(&file), content.len() as u64);
        let mut at = 0;
        while at < size {
            let data = disk.next_data(at).unwrap().unwrap_or(size);
            let hole = &content[at as usize..data as usize];
            assert!(
                hole.iter().all(|&b| b == 0),
                "{view:?}: hole at {at}..{data}"
            );
            at = disk.next_hole(data).unwrap();
            assert!(at > data || data == size, "{view:?}: data at {data}..{at}");
        }
        self.count("SEEK walk");
    }

    fn compare(&mut self, cached: bool) {
        for volume in &self.volumes {
            let live = fs::read(self.mount.live(volume.name)).unwrap();
            assert!(live == volume.live, "{} live differs", volume.name);
            let listed = fs::read_dir(self.mount.at(&format!("{}/snapshots", volume.name)));
            let mut listed: Vec<String> = listed
                .unwrap()
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect();
            listed.sort();
            let names = volume.snapshots.keys().map(|n| format!("{n}.img"));
            let mut names: Vec<String> = names.collect();
            names.sort();
            assert_eq!(listed, names);
            for (name, taken) in &volume.snapshots {
                let path = self.mount.snapshot(volume.name, name);
                let meta = fs::metadata(&path).unwrap();
                assert_eq!((meta.mtime(), meta.mtime_nsec()), taken.mtime, "{name}");
                let file = if cached {
                    File::open(&path).unwrap()
                } else {
                    fresh(&path)
                };
                let mut bytes = Vec::new();
                (&file).read_to_end(&mut bytes).unwrap();
                assert!(bytes == *taken.content, "{name} differs");
            }
            for (file, content) in &volume.held {
                let mut bytes = vec![0; content.len()];
                // Removed, but still to be found below /proc.
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                let again = fresh(Path::new(&path));
                let file = if cached { file } else { &again };
                file.read_exact_at(&mut bytes, 0).unwrap();
                assert!(bytes == **content, "a removed snapshot of {}", volume.name);
            }
        }
        self.count("compare");
    }

    fn step(&mut self, files: &[Files]) {
        let v = self.chance.below(2) as usize;
        let f = &files[v];
        match self.chance.below(100) {
            0..=27 => self.write(v, f, false),
            28..=45 => self.write_direct(v, f),
            46..=50 => self.write(v, f, true),
            51..=58 => self.make_zero(v, f, true),
            59..=64 => self.make_zero(v, f, false),
            65..=68 => {
                f.plain.sync_all().unwrap();
                self.count("fsync");
            }
            69..=75 => self.take(v),
            76..=78 => self.remove(v),
            79..=81 => self.rename(v),
            82..=94 => self.read(v, f),
            _ => self.walk(v, f),
        }
    }
}

#[test]
fn every_view_through_the_mount_is_what_the_model_says() {
    if !possible(Needs::Fuse, "the model test through a mount") {
        return;
    }
    let seed = std::env::var("STILLFRAME_MODEL_SEED");
    let seed = seed
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(0x5f02_11e7);
    println!("STILLFRAME_MODEL_SEED={seed}");
    let mut run = Run::new(seed);
    {
        let names: Vec<_> = run.volumes.iter().map(|v| v.name).collect();
        let files: Vec<_> = names.iter().map(|name| files(&run.mount, name)).collect();
        for n in 1..=OPERATIONS {
            run.step(&files);
            if n % COMPARE_EVERY == 0 {
                run.compare(n % (2 * COMPARE_EVERY) == 0);
            }
        }
    }
    for volume in &mut run.volumes {
        volume.held.clear();
    }
    run.mount.restart();
    run.compare(false);
    println!("{OPERATIONS} operations: {:?}", run.counts);
    for what in [
        "write",
        "O_DIRECT pwritev",
        "O_DSYNC write",
        "punch",
        "zero",
        "fsync",
        "snapshot",
        "rm",
        "mv",
        "read",
        "SEEK walk",
    ] {
        assert!(
            run.counts[what] >= 100,
            "only {} of {what}",
            run.counts[what]
        );
    }
}
