//! The real daemon, killed at random under load.
//!
//! Goal: after SIGKILL at any moment (under load, while it starts, while it stops) the next
//! `stillframe mount` works without any repair, also when the extent map was removed; each page of a
//! volume holds its last acknowledged write or the one that was under way; an acknowledged snapshot
//! holds the same bytes for ever, and one whose taking was cut off is absent or of one instant
//! within its taking; a deletion or renaming is done if it was acknowledged, done or not done if not.
//!
//! Method: buffered, O_DIRECT and O_DSYNC writers own the pages of two volumes whose sizes are no
//! multiple of the grain, and stamp them with numbers that only grow, or punch them. One thread takes,
//! renames, removes and reads snapshots, one more works alone on a volume of its own ([`reshape`]). Then
//! the daemon dies, and everything is compared.
//! `STILLFRAME_KILLS` and `STILLFRAME_KILL_SEED` choose a longer run or repeat a seed's choices
//! (threads interleave as they like).

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod reshape;
#[path = "../rig/mod.rs"]
mod rig;

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use stillframe::sys::disk::Disk;
use stillframe::sys::file::FileDisk;

use reshape::Shape;
use rig::{Chance, Rig, Running, setting, signal, touch};

const PAGE: u64 = 4096;
/// Name, size, grain. The last page of each is cut.
const VOLUMES: [(&str, u64, &str); 2] = [
    ("v0", (2 << 20) + 777, "4K"),
    ("v1", (3 << 19) - 1536, "16K"),
];
/// How each writer of a volume opens it.
const WRITERS: [i32; 3] = [0, libc::O_DIRECT, libc::O_DSYNC];
/// Pages of which the odd groups belong to one writer each; in the even ones they alternate.
const GROUP: u64 = 32;
/// Snapshots of a volume beyond which some go.
const SNAPSHOTS_MAX: usize = 7;

/// What is known of each page of a volume, by number.
struct Board {
    name: &'static str,
    size: u64,
    /// The last number given to a page; never given again.
    given: Vec<AtomicU64>,
    /// The number of the newest write that may be on the medium.
    issued: Vec<AtomicU64>,
    acknowledged: Vec<AtomicU64>,
    /// (page, number) of the writes that were holes.
    holes: Mutex<HashSet<(u64, u64)>>,
}

fn levels(of: &[AtomicU64]) -> Vec<u64> {
    of.iter().map(|n| n.load(Ordering::SeqCst)).collect()
}

/// A page of one number that says where it belongs: a torn mixture or a stray page shows.
fn stamp(volume: &str, page: u64, number: u64, len: usize) -> Vec<u8> {
    let mut unit = [0; 16];
    unit[..2].copy_from_slice(&volume.as_bytes()[..2]);
    unit[2..8].copy_from_slice(&page.to_le_bytes()[..6]);
    unit[8..].copy_from_slice(&number.to_le_bytes());
    unit.into_iter().cycle().take(len).collect()
}

impl Board {
    fn new(name: &'static str, size: u64) -> Board {
        let pages = size.div_ceil(PAGE);
        let zeros = || (0..pages).map(|_| AtomicU64::new(0)).collect();
        Board {
            name,
            size,
            given: zeros(),
            issued: zeros(),
            acknowledged: zeros(),
            holes: Mutex::new((0..pages).map(|page| (page, 0)).collect()),
        }
    }

    fn pages(&self) -> u64 {
        self.given.len() as u64
    }

    fn len_of(&self, page: u64) -> usize {
        PAGE.min(self.size - page * PAGE) as usize
    }

    fn writer_of(&self, page: u64) -> u64 {
        let group = page / GROUP;
        match group % 2 {
            0 => page % 3,
            _ => group / 2 % 3,
        }
    }

    /// The numbers a page's bytes can stand for, of those in `low..=high`; the newest of them.
    fn number_of(&self, page: u64, bytes: &[u8], low: u64, high: u64) -> Result<u64, String> {
        let is_hole = bytes.iter().all(|&b| b == 0);
        let found = if is_hole {
            let holes = self.holes.lock().unwrap();
            (low..=high).rev().find(|&n| holes.contains(&(page, n)))
        } else {
            let number = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
            if bytes != stamp(self.name, page, number, bytes.len()) {
                return Err(format!("{} page {page}: torn or stray", self.name));
            }
            let hole = self.holes.lock().unwrap().contains(&(page, number));
            (!hole && (low..=high).contains(&number)).then_some(number)
        };
        found.ok_or_else(|| {
            let shown = match is_hole {
                true => "a hole".to_owned(),
                false => u64::from_le_bytes(bytes[8..16].try_into().unwrap()).to_string(),
            };
            format!(
                "{} page {page}: found {shown}, not within {low}..={high}",
                self.name
            )
        })
    }

    fn check(&self, bytes: &[u8], low: &[u64], high: &[u64], what: &str) {
        assert_eq!(bytes.len() as u64, self.size, "{what}: the size");
        for (page, content) in bytes.chunks(PAGE as usize).enumerate() {
            if let Err(e) = self.number_of(page as u64, content, low[page], high[page]) {
                panic!("{what}: {e}");
            }
        }
    }

    /// After a kill: each page is as acknowledged or as the write under way left it, and from now on
    /// it is what it was found to be.
    fn settle(&self, bytes: &[u8], what: &str) {
        assert_eq!(bytes.len() as u64, self.size, "{what}: the size");
        for (page, content) in bytes.chunks(PAGE as usize).enumerate() {
            let low = self.acknowledged[page].load(Ordering::SeqCst);
            let high = self.issued[page].load(Ordering::SeqCst);
            let found = self.number_of(page as u64, content, low, high);
            let number = found.unwrap_or_else(|e| panic!("{what}: {e}"));
            self.acknowledged[page].store(number, Ordering::SeqCst);
            self.issued[page].store(number, Ordering::SeqCst);
        }
    }
}

struct Kept {
    low: Vec<u64>,
    high: Vec<u64>,
    hash: Option<blake3::Hash>,
}

/// Volume and snapshot.
type Key = (usize, String);

/// What was asked for and not answered yet.
enum Pending {
    Nothing,
    Take(Vec<(Key, Vec<u64>)>),
    Rename(Key, String),
    Remove(Key),
}

struct Model {
    boards: Arc<Vec<Board>>,
    kept: BTreeMap<Key, Kept>,
    pending: Pending,
    next_name: u64,
    seed: u64,
    counts: BTreeMap<&'static str, u64>,
    shape: Shape,
}

/// A piece of load either works or is cut off by the kill.
enum Cut {
    Killed,
}

/// Under load an error is the daemon's death, or the product's fault.
struct Load<'a> {
    rig: &'a Rig,
    /// The load is to stop.
    over: &'a AtomicBool,
    /// The daemon is being killed.
    dying: &'a AtomicBool,
}

impl Load<'_> {
    #[track_caller]
    fn cut<T>(&self, done: io::Result<T>, what: &str) -> Result<T, Cut> {
        match done {
            Ok(value) => Ok(value),
            Err(e) => {
                assert!(self.dying.load(Ordering::SeqCst), "{what}: {e}");
                // What the kernel says of a mount whose daemon is gone.
                let of_death = matches!(
                    e.kind(),
                    ErrorKind::NotConnected | ErrorKind::ConnectionAborted
                );
                assert!(
                    of_death || self.is_the_kernels(&e),
                    "{what}, while the daemon died: {e}"
                );
                Err(Cut::Killed)
            }
        }
    }

    /// The kernel answers EIO to a request that it is just copying into a daemon that is killed
    /// (docs/testing.md, section 4). A daemon that answers it says so in its log before.
    fn is_the_kernels(&self, e: &io::Error) -> bool {
        let log = fs::read_to_string(self.rig.at("daemon.log")).unwrap();
        e.raw_os_error() == Some(libc::EIO) && !log.contains("stillframe::fuse::errno")
    }
}

fn read_all(path: &Path, flags: i32, piece: usize) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    let mut bytes = Vec::new();
    loop {
        let at = bytes.len();
        bytes.resize(at + piece, 0);
        let got = file.read_at(&mut bytes[at..], at as u64)?;
        bytes.truncate(at + got);
        if got == 0 {
            return Ok(bytes);
        }
    }
}

/// Writes and punches pages that are its own until it is cut off or stopped.
fn write(load: &Load, board: &Board, writer: u64, mut chance: Chance) {
    let mut work = || -> Result<(), Cut> {
        let mut how = OpenOptions::new();
        let how = how.read(true).write(true);
        let how = how.custom_flags(WRITERS[writer as usize]);
        let file = load.cut(how.open(load.rig.live(board.name)), "open live.img")?;
        let again = load.cut(file.try_clone(), "dup")?;
        let disk = load.cut(FileDisk::from_file(again), "look at live.img")?;
        while !load.over.load(Ordering::SeqCst) {
            write_once(load, board, writer, &mut chance, &file, &disk)?;
        }
        // What `close` answers is not seen here; the next mount tells.
        load.cut(file.sync_data(), "fdatasync")
    };
    let (Ok(()) | Err(Cut::Killed)) = work();
}

fn write_once(
    load: &Load,
    board: &Board,
    writer: u64,
    chance: &mut Chance,
    file: &File,
    disk: &FileDisk,
) -> Result<(), Cut> {
    let first = chance.below(board.pages());
    let most = 1 + chance.below(GROUP);
    let run: Vec<u64> = (first..(first + most).min(board.pages()))
        .take_while(|&page| board.writer_of(page) == writer)
        .collect();
    let Some(&last) = run.last() else {
        return Ok(());
    };
    let hole = chance.below(12) == 0;
    let mut data = Vec::new();
    for &page in &run {
        let i = page as usize;
        let number = board.given[i].fetch_add(1, Ordering::SeqCst) + 1;
        if hole {
            board.holes.lock().unwrap().insert((page, number));
        } else {
            data.extend(stamp(board.name, page, number, board.len_of(page)));
        }
        board.issued[i].store(number, Ordering::SeqCst);
    }
    let at = first * PAGE;
    let done = if hole {
        disk.punch(at, ((last + 1) * PAGE).min(board.size) - at)
    } else {
        file.write_all_at(&data, at)
    };
    load.cut(done, "write")?;
    for &page in &run {
        let i = page as usize;
        let number = board.issued[i].load(Ordering::SeqCst);
        board.acknowledged[i].store(number, Ordering::SeqCst);
    }
    if chance.below(40) == 0 {
        load.cut(file.sync_all(), "fsync")?;
    }
    Ok(())
}

impl Model {
    fn new(seed: u64) -> Model {
        let boards = VOLUMES.map(|(name, size, _)| Board::new(name, size));
        Model {
            boards: Arc::new(boards.into()),
            kept: BTreeMap::new(),
            pending: Pending::Nothing,
            next_name: 0,
            seed,
            counts: BTreeMap::new(),
            shape: Shape::new(seed),
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn some_of(&self, volume: usize, chance: &mut Chance) -> Option<Key> {
        let of_volume: Vec<&Key> = self.kept.keys().filter(|k| k.0 == volume).collect();
        let at = chance.below(of_volume.len().max(1) as u64) as usize;
        of_volume.get(at).map(|key| (*key).clone())
    }

    /// Works with snapshots until it is cut off or stopped.
    fn work_with_snapshots(&mut self, load: &Load, mut chance: Chance) {
        while !load.over.load(Ordering::SeqCst) {
            let volume = chance.below(2) as usize;
            let many = self.kept.keys().filter(|k| k.0 == volume).count() >= SNAPSHOTS_MAX;
            let done = match chance.below(10) {
                _ if many => self.remove(load, volume, &mut chance),
                0..=3 => self.take(load, &[volume]),
                4 => self.take(load, &[0, 1]),
                5..=6 => self.rename(load, volume, &mut chance),
                7 => self.remove(load, volume, &mut chance),
                _ => self.look(load, volume, &mut chance),
            };
            if let Err(Cut::Killed) = done {
                return;
            }
        }
    }

    fn new_name(&mut self) -> String {
        self.next_name += 1;
        format!("s{}", self.next_name)
    }

    fn take(&mut self, load: &Load, volumes: &[usize]) -> Result<(), Cut> {
        let name = self.new_name();
        let asked = volumes.iter().map(|&v| {
            let before = levels(&self.boards[v].acknowledged);
            ((v, name.clone()), before)
        });
        self.pending = Pending::Take(asked.collect());
        if let [volume] = volumes {
            let path = load.rig.snapshot(VOLUMES[*volume].0, &name);
            load.cut(touch(&path), "touch a snapshot")?;
        } else {
            let targets = VOLUMES.map(|(volume, ..)| format!("{volume}@{name}"));
            let out = load
                .rig
                .run(&["snapshot", "create", &targets[0], &targets[1]]);
            if !out.status.success() {
                let complaint = String::from_utf8_lossy(&out.stderr);
                let dying = load.dying.load(Ordering::SeqCst);
                assert!(dying, "snapshot create: {complaint}");
                return Err(Cut::Killed);
            }
        }
        let Pending::Take(asked) = std::mem::replace(&mut self.pending, Pending::Nothing) else {
            unreachable!("it was set above");
        };
        for (key, low) in asked {
            let high = levels(&self.boards[key.0].issued);
            let hash = None;
            self.kept.insert(key, Kept { low, high, hash });
        }
        self.count(match volumes.len() {
            1 => "taken",
            _ => "taken as a group",
        });
        Ok(())
    }

    fn rename(&mut self, load: &Load, volume: usize, chance: &mut Chance) -> Result<(), Cut> {
        let Some(key) = self.some_of(volume, chance) else {
            return Ok(());
        };
        let new = self.new_name();
        self.pending = Pending::Rename(key.clone(), new.clone());
        let name = VOLUMES[volume].0;
        let (from, to) = (
            load.rig.snapshot(name, &key.1),
            load.rig.snapshot(name, &new),
        );
        load.cut(fs::rename(from, to), "rename a snapshot")?;
        self.pending = Pending::Nothing;
        let kept = self.kept.remove(&key).expect("it was chosen from them");
        self.kept.insert((volume, new), kept);
        self.count("renamed");
        Ok(())
    }

    fn remove(&mut self, load: &Load, volume: usize, chance: &mut Chance) -> Result<(), Cut> {
        let Some(key) = self.some_of(volume, chance) else {
            return Ok(());
        };
        self.pending = Pending::Remove(key.clone());
        let path = load.rig.snapshot(VOLUMES[volume].0, &key.1);
        load.cut(fs::remove_file(path), "remove a snapshot")?;
        self.pending = Pending::Nothing;
        self.kept.remove(&key);
        self.count("removed");
        Ok(())
    }

    /// Reads a snapshot while the load goes on.
    fn look(&mut self, load: &Load, volume: usize, chance: &mut Chance) -> Result<(), Cut> {
        let Some(key) = self.some_of(volume, chance) else {
            return Ok(());
        };
        let path = load.rig.snapshot(VOLUMES[volume].0, &key.1);
        let flags = [0, libc::O_DIRECT][chance.below(2) as usize];
        let bytes = load.cut(read_all(&path, flags, 100_000), "read a snapshot")?;
        self.compare(&key, &bytes);
        self.count("read under load");
        Ok(())
    }

    fn compare(&mut self, key: &Key, bytes: &[u8]) {
        let board = &self.boards[key.0];
        let what = format!("seed {}: {}@{}", self.seed, board.name, key.1);
        let kept = self.kept.get_mut(key).expect("only kept ones are compared");
        let hash = blake3::hash(bytes);
        match kept.hash {
            Some(left) => assert!(left == hash, "{what} has changed"),
            None => board.check(bytes, &kept.low, &kept.high, &what),
        }
        kept.hash = Some(hash);
    }

    /// Everything against what is known, with nobody at work.
    fn verify(&mut self, rig: &Rig, chance: &mut Chance) {
        let issued: Vec<_> = self.boards.iter().map(|b| levels(&b.issued)).collect();
        for board in self.boards.iter() {
            let live = rig.live(board.name);
            let bytes = read_all(&live, 0, 1 << 20).unwrap();
            board.settle(&bytes, &format!("seed {}: live.img", self.seed));
        }
        let mut listed: Vec<Key> = Vec::new();
        for (v, (volume, ..)) in VOLUMES.iter().enumerate() {
            let dir = rig.mnt().join(volume).join("snapshots");
            for entry in fs::read_dir(dir).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                listed.push((v, name.strip_suffix(".img").unwrap().to_owned()));
            }
        }
        listed.sort();
        self.resolve(&listed, issued);
        let known: Vec<Key> = self.kept.keys().cloned().collect();
        assert_eq!(listed, known, "seed {}: the snapshots", self.seed);
        for key in known {
            let path = rig.snapshot(VOLUMES[key.0].0, &key.1);
            let (flags, piece) =
                [(0, 1 << 20), (libc::O_DIRECT, 1 << 18), (0, 70_001)][chance.below(3) as usize];
            let bytes = read_all(&path, flags, piece).unwrap();
            self.compare(&key, &bytes);
            self.count("compared");
        }
        self.shape.verify(rig);
    }

    /// Whether everything was done often enough for so many kills to mean something.
    fn has_seen_enough(&self, kills: u64) -> bool {
        let count = |what| self.counts.get(what).copied().unwrap_or(0);
        let shaped = |what| self.shape.counts.get(what).copied().unwrap_or(0);
        let shapes = [
            "cloned",
            "clone of a clone",
            "clone written",
            "bookmarked",
            "reverted",
            "resized",
        ];
        count("taken") > kills / 2
            && count("compared") > kills
            && shapes.iter().all(|what| shaped(what) > kills / 20)
    }

    /// What was not answered was done or not, whole.
    fn resolve(&mut self, listed: &[Key], issued: Vec<Vec<u64>>) {
        let seed = self.seed;
        match std::mem::replace(&mut self.pending, Pending::Nothing) {
            Pending::Nothing => {}
            Pending::Take(asked) => {
                let there = asked.iter().filter(|(key, _)| listed.contains(key)).count();
                assert!(
                    there == 0 || there == asked.len(),
                    "seed {seed}: {there} snapshots of a group of {}",
                    asked.len()
                );
                self.count(match there {
                    0 => "cut off: not taken",
                    _ => "cut off: taken",
                });
                for (key, low) in asked.into_iter().filter(|_| there > 0) {
                    let high = issued[key.0].clone();
                    let hash = None;
                    self.kept.insert(key, Kept { low, high, hash });
                }
            }
            Pending::Rename(key, new) => {
                let new = (key.0, new);
                if listed.contains(&new) {
                    let kept = self.kept.remove(&key).expect("it was chosen from them");
                    self.kept.insert(new, kept);
                }
                self.count("cut off: rename");
            }
            Pending::Remove(key) => {
                if !listed.contains(&key) {
                    self.kept.remove(&key);
                }
                self.count("cut off: removal");
            }
        }
    }
}

/// How load ends.
#[derive(Clone, Copy)]
enum End<'a> {
    Stop,
    Kill,
    /// Killed at a named place, if it comes by in time.
    At(&'a str),
}

/// How long a place is waited for.
const PLACE_PATIENCE: Duration = Duration::from_secs(3);

/// Load for `length`; then the daemon is killed, or the load is stopped. Whether a named place was reached.
fn load(
    model: &mut Model,
    rig: &mut Rig,
    chance: &mut Chance,
    length: Duration,
    end: End<'_>,
) -> bool {
    let mut reached = false;
    let (over, dying) = (AtomicBool::new(false), AtomicBool::new(false));
    let boards = Arc::clone(&model.boards);
    let pid = rig.pid();
    let load = Load {
        rig,
        over: &over,
        dying: &dying,
    };
    let load = &load;
    std::thread::scope(|scope| {
        for board in boards.iter() {
            for writer in 0..WRITERS.len() as u64 {
                let chance = Chance(chance.next());
                scope.spawn(move || write(load, board, writer, chance));
            }
        }
        let Model { shape, .. } = model;
        let mut aside = std::mem::replace(shape, Shape::new(0));
        let shaping = Chance(chance.next());
        let shaper = scope.spawn(move || {
            aside.work(load, shaping);
            aside
        });
        let chance = Chance(chance.next());
        let keeper = scope.spawn(|| {
            model.work_with_snapshots(load, chance);
            model
        });
        match end {
            End::Stop => {
                std::thread::sleep(length);
                over.store(true, Ordering::SeqCst);
            }
            End::Kill => {
                std::thread::sleep(length);
                dying.store(true, Ordering::SeqCst);
                signal(pid, "KILL");
            }
            End::At(place) => {
                dying.store(true, Ordering::SeqCst);
                // Whole at once: the daemon looks at any moment.
                let (draft, there) = (load.rig.at("kill-at.new"), load.rig.kill_at());
                fs::write(&draft, place).unwrap();
                fs::rename(&draft, &there).unwrap();
                let latest = Instant::now() + PLACE_PATIENCE;
                while !rig::ended(pid) && Instant::now() < latest {
                    std::thread::sleep(Duration::from_millis(1));
                }
                reached = rig::ended(pid);
                if !reached {
                    signal(pid, "KILL");
                }
                fs::remove_file(there).unwrap();
            }
        }
        let model = keeper.join().expect("its panic is above");
        model.shape = shaper.join().expect("its panic is above");
    });
    if !matches!(end, End::Stop) {
        rig.kill();
        let stale = fs::metadata(rig.mnt()).unwrap_err();
        assert_eq!(stale.kind(), ErrorKind::NotConnected, "{stale}");
    }
    reached
}

/// A named place for the daemon to die at, now and then, if this build has them.
#[cfg(feature = "planted")]
fn some_place(chance: &mut Chance) -> Option<(&'static str, u64)> {
    use stillframe::sys::planted::POINTS;
    if chance.below(2) == 0 {
        return None;
    }
    let place = POINTS[chance.below(POINTS.len() as u64) as usize];
    let often = place.starts_with("batch") || place.starts_with("write");
    Some((place, 1 + chance.below(if often { 200 } else { 3 })))
}

#[cfg(not(feature = "planted"))]
fn some_place(_: &mut Chance) -> Option<(&'static str, u64)> {
    None
}

/// A daemon that dies while it starts: in the middle of recovery, or just after.
fn kill_while_starting(rig: &Rig, after: Duration) {
    let mut daemon = Running(rig.spawn());
    std::thread::sleep(after);
    assert!(
        daemon.0.try_wait().unwrap().is_none(),
        "the daemon ended by itself; is the store locked?"
    );
    daemon.0.kill().unwrap();
    daemon.0.wait().unwrap();
}

/// A daemon that dies while it stops.
fn kill_while_stopping(rig: &mut Rig, after: Duration) {
    let asking = rig
        .umount_command()
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let mut asking = Running(asking.unwrap());
    std::thread::sleep(after);
    rig.kill();
    // It may have been done in time, or not; either is an answer.
    asking.0.wait().unwrap();
}

/// After a clean stop the sources are plain images again.
fn compare_sources(model: &Model, rig: &Rig) {
    for board in model.boards.iter() {
        let bytes = fs::read(rig.at(board.name)).unwrap();
        let known = levels(&board.acknowledged);
        let what = format!("seed {}: the source", model.seed);
        board.check(&bytes, &known, &known, &what);
    }
    model.shape.compare_source(rig);
}

#[test]
fn nothing_acknowledged_is_lost_when_the_daemon_is_killed() {
    if !rig::can_mount() {
        return;
    }
    let kills = setting("STILLFRAME_KILLS", 100);
    let seed = setting("STILLFRAME_KILL_SEED", rig::SEED);
    println!("STILLFRAME_KILL_SEED={seed} STILLFRAME_KILLS={kills}");
    let mut chance = Chance(seed);
    let mut rig = Rig::new();
    for (i, (name, size, grain)) in VOLUMES.iter().enumerate() {
        let source = rig.source(name, *size);
        let source = source.to_str().unwrap();
        if i == 0 {
            // The first volume makes the store.
            rig.mount_with(&["--grain", grain, "--volume", &format!("{name}={source}")]);
        } else {
            rig.ok(&["volume", "add", name, source, "--grain", grain]);
        }
    }
    let source = rig.source(reshape::NAME, reshape::SIZE);
    rig.ok(&["volume", "add", reshape::NAME, source.to_str().unwrap()]);
    let mut model = Model::new(seed);
    let (start, mut longest) = (Instant::now(), Duration::ZERO);
    let mut kill = 0;
    // On a busy machine less is done before each kill: then there are more of them.
    while kill < kills || kill < 4 * kills && !model.has_seen_enough(kills) {
        kill += 1;
        if kill.is_multiple_of(20) {
            load(
                &mut model,
                &mut rig,
                &mut chance,
                Duration::from_millis(50),
                End::Stop,
            );
            model.verify(&rig, &mut chance);
            rig.umount();
            compare_sources(&model, &rig);
            rig.ok(&["check"]);
            rig.mount();
            model.verify(&rig, &mut chance);
            model.count("clean stop");
        }
        let mut pause = Duration::from_micros(chance.below(150_000));
        if chance.below(12) == 0 {
            // Long enough for reclaim and checkpoints, which come once a second.
            pause += Duration::from_millis(1200);
        }
        match some_place(&mut chance) {
            Some((place, nth)) => {
                let at = End::At(&format!("{place}:{nth}"));
                if load(&mut model, &mut rig, &mut chance, pause, at) {
                    model.count(place);
                }
            }
            None => {
                load(&mut model, &mut rig, &mut chance, pause, End::Kill);
                model.count("killed under load");
            }
        }
        if chance.below(8) == 0 {
            kill_while_starting(&rig, Duration::from_micros(chance.below(60_000)));
            model.count("killed while starting");
        }
        if chance.below(10) == 0 {
            fs::remove_dir_all(rig.store().join("map")).unwrap();
            model.count("map removed");
        }
        let stale = rig::is_mounted(&rig.mnt());
        let begin = Instant::now();
        let noted = rig.mount();
        longest = longest.max(begin.elapsed());
        // A daemon that was killed early in its start has cleaned up and not mounted yet.
        assert_eq!(noted.contains("cleaned the stale mount"), stale, "{noted}");
        if chance.below(10) == 0 {
            kill_while_stopping(&mut rig, Duration::from_micros(chance.below(40_000)));
            model.count("killed while stopping");
            rig.mount();
        }
        model.verify(&rig, &mut chance);
    }
    rig.umount();
    compare_sources(&model, &rig);
    println!(
        "{kill} kills in {:?}, longest mount {longest:?}, {:?}",
        start.elapsed(),
        model.counts
    );
    println!("{:?}", model.shape.counts);
    // A run in which nothing was at stake proves nothing.
    assert!(
        model.has_seen_enough(kills),
        "{:?} {:?}",
        model.counts,
        model.shape.counts
    );
    let written: u64 = model
        .boards
        .iter()
        .flat_map(|b| levels(&b.acknowledged))
        .sum();
    assert!(written > 10 * kills, "{written} page writes");
}
