//! Full disks: the real daemon with its store on small loop filesystems (ext4, XFS, btrfs) that are
//! filled at random moments, also by somebody else and to the last byte.
//!
//! Shown: under `fail-write` every snapshot is exact before and after, the live volume is what was
//! acknowledged, and a writer is refused only after the wait. Under `fail-snapshot` no write is ever
//! refused; the snapshots that needed the content fail and answer EIO for every byte, also those the
//! kernel had cached; older ones that did not need it are exact; all of it also after SIGKILL and a
//! start on the disk that is still full. Deleting, renaming and taking snapshots work meanwhile, also
//! while a writer waits. When space comes back, everything works again, and the store checks clean.
//!
//! Clones are in it from the beginning: of a snapshot, of a clone, and one made on the full disk. They are
//! written at random while the disk fills. A write of theirs that finds no space is refused after the
//! wait and has changed no grain but as a whole, and disturbs nothing else; each is what was written to
//! it whenever all else is compared, also after SIGKILL; they are deleted on a disk without a free byte,
//! and can be written when there is space again; a writer with patience goes on then by itself.
//!
//! The model is in memory. `STILLFRAME_FULL_ROUNDS` (one a filesystem by default) and
//! `STILLFRAME_FULL_SEED` choose a longer run or repeat one's choices.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rig::{Attached, Chance, PATIENCE, Rig, eventually, must, setting, touch};

const GRAIN: u64 = 4096;
const SIZE: u64 = (6 << 20) + 777;
/// Grains at the front of which the older of two snapshots never needs the source.
const FRONT: u64 = 512;
/// The wait of the volume that refuses.
const WAIT: Duration = Duration::from_secs(1);

struct Snap {
    name: String,
    content: Vec<u8>,
    failed: bool,
    /// Open since it was taken, with all of its pages in the kernel's cache.
    file: File,
}

struct Vol {
    name: &'static str,
    live: Vec<u8>,
    file: Option<File>,
    snaps: Vec<Snap>,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Wrote {
    Yes,
    Refused,
}

/// A clone.
struct Copied {
    volume: &'static str,
    name: String,
    content: Vec<u8>,
    file: Option<File>,
    /// Grains that lie in its own layer.
    own: BTreeSet<u64>,
}

impl Copied {
    fn path(&self, rig: &Rig) -> PathBuf {
        let clones = rig.mnt().join(self.volume).join("clones");
        clones.join(format!("{}.img", self.name))
    }

    /// A clone of what lies at a path, with that content.
    fn make(rig: &Rig, volume: &'static str, of: &Path, content: &[u8], name: &str) -> Copied {
        let mut copied = Copied {
            volume,
            name: name.to_owned(),
            content: content.to_vec(),
            file: None,
            own: BTreeSet::new(),
        };
        let made = fs::hard_link(of, copied.path(rig));
        made.unwrap_or_else(|e| panic!("{volume}: cannot clone {}: {e}", of.display()));
        copied.open(rig);
        copied
    }

    fn open(&mut self, rig: &Rig) {
        let mut how = OpenOptions::new();
        let file = how.read(true).write(true).open(self.path(rig));
        self.file = Some(file.unwrap());
    }

    /// Writes and keeps the model. A refused write has changed whole grains or none, and a grain that
    /// was to lie in the layer first it has not changed.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Wrote {
        let end = SIZE.min(offset + bytes.len() as u64);
        let bytes = &bytes[..(end - offset) as usize];
        let file = self.file.as_ref().unwrap();
        let grains = offset / GRAIN..end.div_ceil(GRAIN);
        match file.write_at(bytes, offset) {
            Ok(len) => {
                assert_eq!(len, bytes.len(), "{}: half a write", self.name);
                self.content[offset as usize..end as usize].copy_from_slice(bytes);
                self.own.extend(grains);
                Wrote::Yes
            }
            Err(e) if e.kind() == ErrorKind::StorageFull => {
                let mut found = vec![0; bytes.len()];
                file.read_exact_at(&mut found, offset).unwrap();
                for grain in grains {
                    let from = offset.max(grain * GRAIN);
                    let to = end.min((grain + 1) * GRAIN);
                    let part = (from - offset) as usize..(to - offset) as usize;
                    let known = &mut self.content[from as usize..to as usize];
                    if found[part.clone()] == *known {
                        continue;
                    }
                    let what = format!("{}: grain {grain} of a refused write", self.name);
                    assert!(found[part.clone()] == bytes[part.clone()], "{what}");
                    let piece = (grain * GRAIN) >> 20 < (end - 1) >> 20;
                    assert!(self.own.contains(&grain) || piece, "{what}");
                    known.copy_from_slice(&found[part]);
                    self.own.insert(grain);
                }
                Wrote::Refused
            }
            Err(e) => panic!("{}: a write at {offset}: {e}", self.name),
        }
    }

    fn check(&self, rig: &Rig, when: &str) {
        let what = format!("{when}: clone {} of {}", self.name, self.volume);
        let held = read_whole(self.file.as_ref().unwrap());
        assert!(held == self.content, "{what} differs");
        let anew = read_whole(&File::open(self.path(rig)).unwrap());
        assert!(
            anew == self.content,
            "{what} differs when it is opened anew"
        );
    }

    fn remove(mut self, rig: &Rig) {
        self.file = None;
        let gone = fs::remove_file(self.path(rig));
        gone.unwrap_or_else(|e| panic!("cannot delete clone {}: {e}", self.name));
        assert!(!self.path(rig).exists());
    }
}

impl Vol {
    fn grains(&self) -> u64 {
        SIZE.div_ceil(GRAIN)
    }

    fn open(&mut self, rig: &Rig) {
        let mut how = OpenOptions::new();
        let file = how.read(true).write(true).open(rig.live(self.name));
        self.file = Some(file.unwrap());
    }

    /// Writes and keeps the model. A refused write has changed nothing, or just what lay before an
    /// aligned MiB within it.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Wrote {
        let end = SIZE.min(offset + bytes.len() as u64);
        let bytes = &bytes[..(end - offset) as usize];
        match self.file.as_ref().unwrap().write_at(bytes, offset) {
            Ok(len) => {
                assert_eq!(len, bytes.len(), "{}: half a write", self.name);
                self.live[offset as usize..end as usize].copy_from_slice(bytes);
                Wrote::Yes
            }
            Err(e) if e.kind() == ErrorKind::StorageFull => {
                let cut = offset.next_multiple_of(1 << 20);
                if offset < cut && cut < end {
                    let head = (cut - offset) as usize;
                    let mut found = vec![0; head];
                    let file = self.file.as_ref().unwrap();
                    file.read_exact_at(&mut found, offset).unwrap();
                    if found == bytes[..head] {
                        self.live[offset as usize..cut as usize].copy_from_slice(&found);
                    }
                }
                Wrote::Refused
            }
            Err(e) => panic!("{}: a write of {} at {offset}: {e}", self.name, bytes.len()),
        }
    }

    fn take(&mut self, rig: &Rig, name: &str) {
        let path = rig.snapshot(self.name, name);
        touch(&path).unwrap_or_else(|e| panic!("{}: cannot take {name}: {e}", self.name));
        let snap = Snap {
            name: name.to_owned(),
            content: self.live.clone(),
            failed: false,
            file: File::open(path).unwrap(),
        };
        let cached = read_whole(&snap.file);
        assert!(cached == snap.content, "{}@{name}: when taken", self.name);
        self.snaps.push(snap);
    }

    fn remove(&mut self, rig: &Rig, at: usize) {
        let snap = self.snaps.remove(at);
        let gone = fs::remove_file(rig.snapshot(self.name, &snap.name));
        gone.unwrap_or_else(|e| panic!("{}: cannot delete {}: {e}", self.name, snap.name));
    }

    fn rename(&mut self, rig: &Rig, at: usize, to: &str) {
        let snap = &mut self.snaps[at];
        let from = rig.snapshot(self.name, &snap.name);
        let done = fs::rename(from, rig.snapshot(self.name, to));
        done.unwrap_or_else(|e| panic!("{}: cannot rename {}: {e}", self.name, snap.name));
        snap.name = to.to_owned();
    }

    /// Opens everything again after the daemon was started anew.
    fn reopen(&mut self, rig: &Rig) {
        self.open(rig);
        for snap in &mut self.snaps {
            snap.file = File::open(rig.snapshot(self.name, &snap.name)).unwrap();
        }
    }

    fn close(&mut self) {
        self.file = None;
        let null = File::open("/dev/null").unwrap();
        for snap in &mut self.snaps {
            snap.file = null.try_clone().unwrap();
        }
    }

    /// Compares everything; returns how many snapshots failed since the last look.
    fn check(&mut self, rig: &Rig, when: &str) -> usize {
        let live = read_whole(self.file.as_ref().unwrap());
        assert!(live == self.live, "{when}: {} live differs", self.name);
        let states = states(rig, self.name);
        assert_eq!(states.len(), self.snaps.len(), "{when}: {states:?}");
        let mut failed = 0;
        for snap in &mut self.snaps {
            let what = format!("{when}: {}@{}", self.name, snap.name);
            let path = rig.snapshot(self.name, &snap.name);
            if states[&snap.name] == "failed" {
                failed += usize::from(!snap.failed);
                snap.failed = true;
                refuses_all(&snap.file, &format!("{what} held open"));
                if let Ok(file) = File::open(&path) {
                    refuses_all(&file, &format!("{what} opened now"));
                }
                continue;
            }
            assert!(!snap.failed, "{what} came back from having failed");
            // What the kernel has cached, and what the daemon answers.
            assert!(read_whole(&snap.file) == snap.content, "{what} (cached)");
            let mut how = OpenOptions::new();
            let direct = how.read(true).custom_flags(libc::O_DIRECT).open(&path);
            let direct = read_direct(&direct.unwrap());
            assert!(direct == snap.content, "{what} (direct)");
        }
        failed
    }
}

fn read_whole(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// By the daemon, not from the kernel's cache.
fn read_direct(file: &File) -> Vec<u8> {
    const PIECE: usize = 1 << 20;
    let mut memory = vec![0; PIECE + 4096];
    let skip = memory.as_ptr().align_offset(4096);
    let piece = &mut memory[skip..skip + PIECE];
    let mut bytes = Vec::new();
    loop {
        let got = file.read_at(piece, bytes.len() as u64).unwrap();
        bytes.extend_from_slice(&piece[..got]);
        if got < PIECE {
            return bytes;
        }
    }
}

/// The kernel forgets the pages of a failed snapshot a moment later, in a thread of the daemon's.
fn refuses_all(file: &File, what: &str) {
    let mut page = [0; GRAIN as usize];
    let mut refused = |at: u64| match file.read_at(&mut page, at) {
        Ok(_) => false,
        Err(e) => {
            assert_eq!(e.raw_os_error(), Some(libc::EIO), "{what} at {at}: {e}");
            true
        }
    };
    eventually(&format!("{what}: reads are refused"), || refused(0));
    for page in 0..SIZE.div_ceil(GRAIN) {
        eventually(&format!("{what}: page {page} is refused"), || {
            refused(page * GRAIN)
        });
    }
}

fn states(rig: &Rig, volume: &str) -> BTreeMap<String, String> {
    // Not by the command: its socket may find no room on a disk without a single free block.
    let text = fs::read(rig.mnt().join(".stillframe/status.json")).unwrap();
    let report: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let volumes = report["volumes"].as_array().unwrap();
    let row = volumes.iter().find(|v| v["name"] == volume).unwrap();
    let text = |v: &serde_json::Value| v.as_str().unwrap().to_owned();
    let snapshots = row["snapshots"].as_array().unwrap();
    snapshots
        .iter()
        .map(|s| (text(&s["name"]), text(&s["state"])))
        .collect()
}

/// A small filesystem on a loop device.
struct Disk {
    kind: &'static str,
    at: PathBuf,
    attached: Option<Attached>,
    _top: tempfile::TempDir,
}

impl Disk {
    fn new(kind: &'static str, round: u64) -> Disk {
        let top = tempfile::Builder::new()
            .prefix("stillframe-full-")
            .tempdir();
        let top = top.unwrap();
        let (image, at) = (top.path().join("disk"), top.path().join("fs"));
        fs::create_dir(&at).unwrap();
        let (mkfs, options, mib): (_, &[&str], _) = match (kind, round % 2) {
            ("ext4", 0) => ("mkfs.ext4", &["-q", "-m", "0"], 64),
            ("ext4", _) => ("mkfs.ext4", &["-q"], 64),
            ("xfs", _) => ("mkfs.xfs", &["-q"], 300),
            // Without --mixed, whose metadata has no space of its own: nothing at all can be written
            // to such a one when it is full.
            ("btrfs", _) => ("mkfs.btrfs", &["-q"], 256),
            _ => unreachable!("no such filesystem here"),
        };
        File::create(&image).unwrap().set_len(mib << 20).unwrap();
        let mut args: Vec<&str> = options.to_vec();
        args.push(image.to_str().unwrap());
        must(mkfs, &args);
        let mut attached = Attached::new(&image);
        attached.mount(&at);
        Disk {
            kind,
            at,
            attached: Some(attached),
            _top: top,
        }
    }

    fn available(&self) -> u64 {
        let out = must("stat", &["-f", "-c", "%a %S", self.at.to_str().unwrap()]);
        let mut numbers = out.split_whitespace().map(|n| n.parse::<u64>().unwrap());
        numbers.next().unwrap() * numbers.next().unwrap()
    }

    fn fill_path(&self) -> PathBuf {
        self.at.join("fill")
    }

    /// Somebody else takes all space but so much; nothing of it if that is 0.
    fn fill(&self, leave: u64) {
        let path = self.fill_path();
        let mut file = OpenOptions::new();
        let mut file = file.create(true).append(true).open(&path).unwrap();
        loop {
            let want = self.available().saturating_sub(leave);
            if want < 256 << 10 {
                break;
            }
            let at = file.metadata().unwrap().len().to_string();
            let mut len = want;
            while len >= 64 << 10 {
                let mut command = Command::new("fallocate");
                command.args(["-o", &at, "-l", &len.to_string()]).arg(&path);
                if command.output().unwrap().status.success() {
                    break;
                }
                len /= 2;
            }
            if len < 64 << 10 {
                break;
            }
        }
        if leave == 0 {
            for piece in [64 << 10, GRAIN as usize, 1] {
                while file.write_all(&vec![7; piece]).is_ok() {}
            }
            file.sync_all().ok();
            while file.write_all(&[7; GRAIN as usize]).is_ok() {}
        }
    }

    fn free(&self) {
        fs::remove_file(self.fill_path()).unwrap();
        must("sync", &["-f", self.at.to_str().unwrap()]);
        eventually("space comes back", || self.available() > 16 << 20);
    }

    fn detach(mut self) {
        self.attached.take().unwrap().detach();
    }
}

/// Takes every byte as soon as it is free, until it is told to stop.
fn greedy(disk: &Disk, stop: &AtomicBool) {
    let mut file = OpenOptions::new();
    let mut file = file.append(true).open(disk.fill_path()).unwrap();
    while !stop.load(Ordering::SeqCst) {
        if file.write_all(&[7; GRAIN as usize]).is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// When dropped, space comes back.
struct Freed<'a>(&'a Disk, &'a AtomicBool);

impl Drop for Freed<'_> {
    fn drop(&mut self) {
        self.1.store(true, Ordering::SeqCst);
        self.0.free();
    }
}

#[derive(Default, Debug)]
struct Counts {
    refused: u64,
    /// Writes to clones, and those that found space on a disk that was full before.
    clones_refused: u64,
    clones_again: u64,
    failed: usize,
    spared: usize,
    kills: u64,
    waited: u64,
    clones_waited: u64,
    /// Starts that made the map in memory, and how often it went back to disk.
    maps_in_memory: usize,
    maps_on_disk: usize,
}

struct Campaign {
    disk: Disk,
    rig: Rig,
    chance: Chance,
    /// Refuses its writers.
    strict: Vol,
    /// Fails its snapshots.
    lax: Vol,
    /// Has its writers wait for longer than any test.
    patient: Vol,
    /// Of the strict volume, whose writers are refused after its wait.
    clones: Vec<Copied>,
    /// Of the patient one.
    waiting: Option<Copied>,
    counts: Counts,
}

fn random(chance: &mut Chance, len: u64) -> Vec<u8> {
    let words = (0..len.div_ceil(8)).map(|_| chance.next().to_le_bytes());
    let mut bytes: Vec<u8> = words.flatten().collect();
    bytes.truncate(len as usize);
    bytes
}

impl Campaign {
    fn new(kind: &'static str, round: u64, seed: u64) -> Campaign {
        let disk = Disk::new(kind, round);
        let mut chance = Chance(seed);
        let mut rig = Rig::with_store(disk.at.join("store"));
        let mut make = |name: &'static str| {
            let live = random(&mut chance, SIZE);
            fs::write(rig.source(name, 0), &live).unwrap();
            Vol {
                name,
                live,
                file: None,
                snaps: Vec::new(),
            }
        };
        let [mut strict, mut lax, mut patient] = ["strict", "lax", "patient"].map(&mut make);
        let source = rig.at("strict");
        let volume = format!("strict={}", source.to_str().unwrap());
        let first = ["--segment-size", "2M", "--on-full-wait", "1"];
        rig.mount_with(&[&first[..], &["--volume", &volume]].concat());
        let source = rig.at("lax");
        let add = ["volume", "add", "lax", source.to_str().unwrap()];
        let policy = ["--on-full", "fail-snapshot", "--on-full-wait", "0"];
        rig.ok(&[&add[..], &policy].concat());
        let source = rig.at("patient");
        let add = ["volume", "add", "patient", source.to_str().unwrap()];
        rig.ok(&[&add[..], &["--on-full-wait", "600"]].concat());
        for vol in [&mut strict, &mut lax, &mut patient] {
            vol.open(&rig);
        }
        Campaign {
            disk,
            rig,
            chance,
            strict,
            lax,
            patient,
            clones: Vec::new(),
            waiting: None,
            counts: Counts::default(),
        }
    }

    /// Clones of the first snapshots, and one of a clone.
    fn make_clones(&mut self) {
        let rig = &self.rig;
        let (strict, patient) = (&self.strict.snaps[0], &self.patient.snaps[0]);
        let of = |volume, snap: &Snap| rig.snapshot(volume, &snap.name);
        let make = |volume, snap: &Snap, name| {
            Copied::make(rig, volume, &of(volume, snap), &snap.content, name)
        };
        let mut clones = vec![
            make("strict", strict, "one"),
            make("strict", strict, "goes"),
        ];
        self.waiting = Some(make("patient", patient, "waits"));
        for clone in &mut clones {
            for _ in 0..10 {
                let (at, bytes) = (self.chance.below(SIZE), random(&mut self.chance, 9999));
                assert_eq!(clone.write(at, &bytes), Wrote::Yes);
            }
        }
        let one = &mut clones[0];
        let two = Copied::make(rig, "strict", &one.path(rig), &one.content, "two");
        // What it had lies beneath both now.
        one.own.clear();
        clones.push(two);
        self.clones = clones;
    }

    /// A random write to a random clone.
    fn write_clone(&mut self) -> Wrote {
        let clone = self.chance.below(self.clones.len() as u64) as usize;
        let clone = &mut self.clones[clone];
        let len = 1 + self.chance.below(16 * GRAIN);
        let (at, bytes) = (self.chance.below(SIZE), random(&mut self.chance, len));
        let begun = Instant::now();
        let wrote = clone.write(at, &bytes);
        if wrote == Wrote::Refused {
            let waited = begun.elapsed();
            assert!(waited >= WAIT, "refused after {waited:?}, not {WAIT:?}");
            self.counts.clones_refused += 1;
        }
        wrote
    }

    /// A whole grain that lies in no layer of a clone's own finds no space on a full disk.
    fn clones_are_refused(&mut self) {
        self.disk.fill(0);
        let clone = self.chance.below(self.clones.len() as u64) as usize;
        let clone = &mut self.clones[clone];
        let grains = SIZE / GRAIN;
        let first = self.chance.below(grains);
        let mut order = (0..grains).map(|n| (first + n) % grains);
        let fresh = order.find(|grain| !clone.own.contains(grain)).unwrap();
        let bytes = random(&mut self.chance, GRAIN);
        assert_eq!(clone.write(fresh * GRAIN, &bytes), Wrote::Refused);
        self.counts.clones_refused += 1;
    }

    fn take(&mut self, name: &str) {
        self.strict.take(&self.rig, name);
        self.lax.take(&self.rig, name);
        self.patient.take(&self.rig, name);
    }

    fn check(&mut self, when: &str) {
        let strict = self.strict.check(&self.rig, when);
        let patient = self.patient.check(&self.rig, when);
        assert_eq!(
            (strict, patient),
            (0, 0),
            "{when}: fail-write failed snapshots"
        );
        self.counts.failed += self.lax.check(&self.rig, when);
        for clone in self.clones.iter().chain(&self.waiting) {
            clone.check(&self.rig, when);
        }
        // Who fails has failed everything that was taken later.
        let failed: Vec<bool> = self.lax.snaps.iter().map(|s| s.failed).collect();
        self.counts.spared +=
            failed.iter().filter(|f| !**f).count() * usize::from(failed.contains(&true));
    }

    /// Random writes until the strict volume's writer is refused even a single grain.
    fn write_until_refused(&mut self, lax_range: u64) {
        let mut fill_in = self.chance.below(40);
        let (mut single, mut clones_refused) = (false, 0);
        for _ in 0..20_000 {
            // Not all the time: each refusal takes the wait.
            if clones_refused < 2 && self.chance.below(4) == 0 {
                clones_refused += u64::from(self.write_clone() == Wrote::Refused);
            }
            let len = match (single, self.chance.below(3)) {
                (true, _) | (_, 0) => GRAIN,
                (_, 1) => 1 + self.chance.below(3 * GRAIN),
                _ => GRAIN * (1 + self.chance.below(16)),
            };
            let bytes = random(&mut self.chance, len);
            let at = match single {
                true => GRAIN * self.chance.below(self.strict.grains() - 1),
                false => self.chance.below(SIZE),
            };
            let begun = Instant::now();
            if self.strict.write(at, &bytes) == Wrote::Refused {
                let waited = begun.elapsed();
                assert!(waited >= WAIT, "refused after {waited:?}, not {WAIT:?}");
                self.counts.refused += 1;
                self.disk.fill(0);
                if single {
                    return;
                }
                single = true;
            }
            let at = GRAIN * self.chance.below(lax_range);
            let len = bytes.len().min((lax_range * GRAIN - at) as usize);
            let wrote = self.lax.write(at, &bytes[..len]);
            assert_eq!(wrote, Wrote::Yes, "fail-snapshot");
            if fill_in == 0 {
                // The other writer is done at a random moment.
                self.disk.fill(0);
            }
            fill_in = fill_in.wrapping_sub(1);
        }
        panic!("the disk does not get full");
    }

    /// The lax volume goes on over a range until its newest snapshot has failed.
    fn write_until_failed(&mut self, range: u64) {
        let newest = self.lax.snaps.last().unwrap().name.clone();
        for grain in 0..range {
            let bytes = random(&mut self.chance, GRAIN);
            assert_eq!(self.lax.write(grain * GRAIN, &bytes), Wrote::Yes);
            if grain % 16 == 15 && states(&self.rig, "lax")[&newest] == "failed" {
                return;
            }
        }
        let state = &states(&self.rig, "lax")[&newest];
        assert_eq!(state, "failed", "nothing failed on a full disk");
    }

    fn close(&mut self) {
        let all = [&mut self.strict, &mut self.lax, &mut self.patient];
        all.into_iter().for_each(Vol::close);
        for clone in self.clones.iter_mut().chain(&mut self.waiting) {
            clone.file = None;
        }
    }

    fn kill(&mut self) {
        self.close();
        self.rig.kill();
        self.rig.mount();
        self.reopen();
        self.counts.kills += 1;
    }

    fn reopen(&mut self) {
        for vol in [&mut self.strict, &mut self.lax, &mut self.patient] {
            vol.reopen(&self.rig);
        }
        for clone in self.clones.iter_mut().chain(&mut self.waiting) {
            clone.open(&self.rig);
        }
    }

    fn round(&mut self) {
        let rig_was = Instant::now();
        self.take("a");
        self.make_clones();
        // For the front, the older snapshot has what it needs from here on.
        for grain in 0..FRONT {
            let bytes = random(&mut self.chance, GRAIN);
            assert_eq!(self.lax.write(grain * GRAIN, &bytes), Wrote::Yes);
        }
        for _ in 0..20 {
            let (at, bytes) = (self.chance.below(SIZE), random(&mut self.chance, 9999));
            assert_eq!(self.strict.write(at, &bytes), Wrote::Yes);
        }
        self.take("b");
        let leave = self.chance.below(3 << 20);
        self.disk.fill(leave);
        self.check("before it is full");

        self.write_until_refused(FRONT);
        self.clones_are_refused();
        self.check("when full");
        self.write_until_failed(FRONT);
        self.check("when a snapshot has failed");
        let state = |s: &Snap| (s.name.clone(), s.failed);
        let states: Vec<_> = self.lax.snaps.iter().map(state).collect();
        assert_eq!(states, [("a".into(), false), ("b".into(), true)]);

        self.kill();
        self.check("after a kill on the full disk");
        self.on_a_full_disk();
        self.kill();
        self.check("after deletions on the full disk and a kill");
        // A start needs nothing of the disk: as often as it is killed.
        for name in ["d2", "d3"] {
            self.disk.fill(0);
            self.kill();
            self.take(name);
            self.lax.remove(&self.rig, 0);
            self.check("snapshots and deletions after another kill");
        }
        self.a_writer_waits();
        self.check("when there is space again");
        self.works_again();
        eprintln!("{}: a round in {:?}", self.disk.kind, rig_was.elapsed());
    }

    /// Catalogue changes work at once, whatever a writer would have to wait.
    fn on_a_full_disk(&mut self) {
        self.disk.fill(0);
        self.take("c");
        self.strict.rename(&self.rig, 0, "a2");
        self.lax.rename(&self.rig, 1, "b2");
        let snap = self.strict.snaps.last().unwrap();
        let path = self.rig.snapshot("strict", &snap.name);
        let new = Copied::make(&self.rig, "strict", &path, &snap.content, "three");
        self.clones.push(new);
        self.check("new snapshots and a clone on a full disk");
        // A write that a snapshot needs is refused or fails snapshots, by policy.
        self.write_until_refused(self.lax.grains());
        self.write_until_failed(self.lax.grains());
        self.check("full once more");
        self.clones_are_refused();
        let goes = self.clones.iter().position(|c| c.name == "goes");
        self.clones.remove(goes.unwrap()).remove(&self.rig);
        self.strict.remove(&self.rig, 0);
        self.lax.remove(&self.rig, 1);
        self.take("d");
        self.check("deletions and new snapshots on a full disk");
    }

    /// A writer that waits holds up nobody who deletes, and goes on when there is space.
    fn a_writer_waits(&mut self) {
        let (disk, rig) = (&self.disk, &self.rig);
        disk.fill(0);
        let (stop, done) = (AtomicBool::new(false), AtomicBool::new(false));
        let bytes = random(&mut self.chance, 64 << 10);
        let (patient, lax) = (&mut self.patient, &mut self.lax);
        let cloned = AtomicBool::new(false);
        let waiting = self.waiting.as_mut().unwrap();
        let file = patient.file.as_ref().unwrap().try_clone().unwrap();
        std::thread::scope(|scope| {
            // Whatever fails here, the writer does not wait for ever.
            let freed = Freed(disk, &stop);
            let filler = scope.spawn(|| greedy(disk, &stop));
            let writer = scope.spawn(|| {
                let mut len = 0;
                // More than what deletions could give back meanwhile.
                for at in 0..SIZE / bytes.len() as u64 {
                    let wrote = file.write_at(&bytes, at * bytes.len() as u64).unwrap();
                    assert_eq!(wrote, bytes.len());
                    len += wrote;
                }
                done.store(true, Ordering::SeqCst);
                len
            });
            let other = scope.spawn(|| {
                for at in 0..SIZE / bytes.len() as u64 {
                    let wrote = waiting.write(at * bytes.len() as u64, &bytes);
                    assert_eq!(wrote, Wrote::Yes);
                }
                cloned.store(true, Ordering::SeqCst);
            });
            let begun = Instant::now();
            lax.take(rig, "e");
            lax.remove(rig, 0);
            lax.rename(rig, 0, "f");
            assert!(!states(rig, "patient").is_empty());
            assert!(begun.elapsed() < PATIENCE, "held up by a writer that waits");
            let waits = !done.load(Ordering::SeqCst);
            let clone_waits = !cloned.load(Ordering::SeqCst);
            stop.store(true, Ordering::SeqCst);
            filler.join().unwrap();
            self.counts.waited += u64::from(waits);
            self.counts.clones_waited += u64::from(clone_waits);
            drop(freed);
            other.join().unwrap();
            let len = writer.join().unwrap();
            for part in patient.live[..len].chunks_mut(bytes.len()) {
                part.copy_from_slice(&bytes);
            }
        });
    }

    fn works_again(&mut self) {
        self.take("g");
        for _ in 0..30 {
            let (at, bytes) = (self.chance.below(SIZE), random(&mut self.chance, 9999));
            assert_eq!(self.strict.write(at, &bytes), Wrote::Yes);
            let at = self.chance.below(SIZE);
            assert_eq!(self.lax.write(at, &bytes), Wrote::Yes);
            assert_eq!(self.write_clone(), Wrote::Yes);
            self.counts.clones_again += 1;
        }
        self.check("with space");
        assert!(!self.lax.snaps.last().unwrap().failed);
        eventually("the control socket is there", || {
            self.rig.run(&["status"]).status.success()
        });
        for vol in [&mut self.strict, &mut self.lax, &mut self.patient] {
            vol.remove(&self.rig, 0);
        }
        self.close();
        self.rig.umount();
        // A map that had no room at a start was in memory, and is on disk again; nothing is left of it.
        let log = fs::read_to_string(self.rig.at("daemon.log")).unwrap();
        self.counts.maps_in_memory += log.matches("it is made in memory").count();
        self.counts.maps_on_disk += log.matches("the extent map is on disk").count();
        let store = fs::read_dir(self.rig.store()).unwrap();
        let names = store.map(|e| e.unwrap().file_name().into_string().unwrap());
        let aside: Vec<String> = names.filter(|n| n.starts_with("map.")).collect();
        assert!(aside.is_empty(), "{aside:?}");
        let checked = self.rig.run(&["check"]);
        let said = String::from_utf8_lossy(&checked.stdout).into_owned();
        // Failed snapshots are a finding (7), with or without them nothing is damaged.
        let vols = [&self.strict, &self.lax, &self.patient];
        let failed = vols.iter().any(|vol| vol.snaps.iter().any(|s| s.failed));
        let expected = if failed { 7 } else { 0 };
        assert_eq!(checked.status.code(), Some(expected), "{said}");
        assert!(!said.contains("damage"), "{said}");
        assert!(!said.contains("map"), "{said}");
        self.rig.mount();
        self.reopen();
        self.check("after a clean stop");
    }

    fn end(mut self) -> Counts {
        self.close();
        self.rig.umount();
        drop(self.rig);
        self.disk.detach();
        self.counts
    }
}

fn campaign(kind: &'static str) {
    if !rig::can_mount() || !rig::can_loop() {
        return;
    }
    let there = |dir: &&str| Path::new(dir).join(format!("mkfs.{kind}")).exists();
    if !["/usr/sbin", "/sbin", "/usr/bin"].iter().any(there) {
        rig::skip(&format!("no mkfs.{kind}"));
        return;
    }
    let known = fs::read_to_string("/proc/filesystems").unwrap();
    if !known.contains(kind)
        && !Command::new("modprobe")
            .arg(kind)
            .status()
            .is_ok_and(|s| s.success())
    {
        rig::skip(&format!("this kernel has no {kind}"));
        return;
    }
    let rounds = setting("STILLFRAME_FULL_ROUNDS", 1);
    let seed = setting("STILLFRAME_FULL_SEED", rig::SEED);
    for round in 0..rounds {
        eprintln!("{kind}: round {round}, STILLFRAME_FULL_SEED={seed}");
        let mut campaign = Campaign::new(kind, round, seed.wrapping_add(round));
        campaign.round();
        let counts = campaign.end();
        eprintln!("{kind}: {counts:?}");
        assert!(counts.refused >= 2 && counts.failed >= 2 && counts.spared > 0);
        assert_eq!(counts.kills, 4);
        assert!(counts.clones_refused >= 2 && counts.clones_again > 0);
        assert!(counts.waited > 0 && counts.clones_waited > 0);
        assert!(counts.maps_in_memory > 0 && counts.maps_on_disk > 0);
    }
}

#[test]
fn a_full_ext4_loses_nothing_that_was_promised() {
    campaign("ext4");
}

#[test]
fn a_full_xfs_loses_nothing_that_was_promised() {
    campaign("xfs");
}

#[test]
fn a_full_btrfs_loses_nothing_that_was_promised() {
    campaign("btrfs");
}
