//! What changed between two points, as qcow2, by the word of QEMU's own tools.
//!
//! Goal: the older image and the overlay are the newer image, whatever happened between the two:
//! writes, zeroes, resizes to odd sizes, reverts, points that were deleted, bookmarks, restarts, a lost
//! map. Method: a random history of a volume in the engine on simulated disks, pages of one byte each so
//! that `qemu-io` can be asked for them. For each diff `qemu-img` checks, compares, converts and maps
//! the overlay. `STILLFRAME_DIFFS` asks for more of them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;
#[path = "rig/sim.rs"]
mod sim;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use serde_json::Value;
use stillframe::image::Image;
use stillframe::image::diff::{DiffExtent, extents};
use stillframe::image::qcow2::{Ends, Layout, Qcow2};
use stillframe::map::memory::MemoryIndexHome;
use stillframe::sys::sim::SimWorld;
use stillframe::units::{Grain, Name, Uuid};
use stillframe::volume::{Engine, Settings, Volume, VolumeOptions, Zeroing};

use rig::{Chance, setting};
use sim::{PAGE, environment};

const MIB: u64 = 1 << 20;
const SIZES: std::ops::Range<u64> = 2 * MIB..5 * MIB;
const POINTS: usize = 5;

struct History {
    world: SimWorld,
    index: MemoryIndexHome,
    engine: Arc<Engine>,
    chance: Chance,
    live: Vec<u8>,
    /// Snapshots in the order of their instants, with their content.
    snapshots: Vec<(Name, Vec<u8>)>,
    bookmarks: Vec<(Name, u64, Vec<u8>)>,
    /// Number of each snapshot's instant.
    instants: BTreeMap<Name, u64>,
    next: u64,
    counts: BTreeMap<&'static str, u64>,
}

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn settings() -> Settings {
    Settings {
        segment_bytes: MIB,
        checkpoint_bytes: 256 << 10,
        ballast_bytes: 0,
        ..Settings::default()
    }
}

impl History {
    fn new(seed: u64) -> History {
        let (world, index) = (SimWorld::new(seed), MemoryIndexHome::new());
        let env = environment(&world, &index);
        Engine::create(&env, &settings()).unwrap();
        let engine = Engine::open(env, settings()).unwrap();
        let mut chance = Chance(seed);
        let size = SIZES.start + chance.below(SIZES.end - SIZES.start);
        world.add_disk("source", size);
        let options = VolumeOptions {
            grain: Grain::new(4096 << chance.below(4)).unwrap(),
            ..VolumeOptions::default()
        };
        engine.add_volume(&name("vm"), "source", options).unwrap();
        History {
            world,
            index,
            engine,
            chance,
            live: vec![0; size as usize],
            snapshots: Vec::new(),
            bookmarks: Vec::new(),
            instants: BTreeMap::new(),
            next: 0,
            counts: BTreeMap::new(),
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn volume(&self) -> Arc<Volume> {
        self.engine.volume(&name("vm")).unwrap()
    }

    /// A run of whole pages of one byte, or of zeros; cut at the end.
    fn write(&mut self) {
        let size = self.live.len() as u64;
        let start = self.chance.below(size.div_ceil(PAGE)) * PAGE;
        let most = 1 + self.chance.below(40);
        let end = size.min(start + PAGE * (1 + self.chance.below(most)));
        let byte = self.chance.next() as u8;
        let range = start as usize..end as usize;
        if self.chance.below(4) == 0 {
            self.live[range].fill(0);
            let volume = self.volume();
            volume.zero(start, end - start, Zeroing::Discard).unwrap();
        } else {
            self.live[range.clone()].fill(byte);
            let data = &self.live[range];
            self.volume().write_at(start, data, false).unwrap();
        }
    }

    fn take(&mut self) {
        self.next += 1;
        let new = name(&format!("s{}", self.next));
        self.engine
            .take_snapshots(&[(name("vm"), new.clone())])
            .unwrap();
        self.instants.insert(new.clone(), self.next);
        self.snapshots.push((new, self.live.clone()));
    }

    fn delete(&mut self) {
        let at = self.chance.below(self.snapshots.len() as u64) as usize;
        let (gone, content) = self.snapshots.remove(at);
        if self.chance.below(2) == 0 {
            let engine = &self.engine;
            engine
                .delete_snapshot_keep_bookmark(&name("vm"), &gone)
                .unwrap();
            let instant = self.instants[&gone];
            self.bookmarks.push((gone, instant, content));
            if self.bookmarks.len() > 3 {
                let (old, ..) = self.bookmarks.remove(0);
                self.engine.delete_bookmark(&name("vm"), &old).unwrap();
            }
        } else {
            self.engine.delete_snapshot(&name("vm"), &gone).unwrap();
        }
        self.engine.maintain().unwrap();
    }

    fn revert(&mut self) {
        let at = self.chance.below(self.snapshots.len() as u64) as usize;
        let (to, content) = self.snapshots[at].clone();
        let done = self
            .engine
            .revert_volume(&name("vm"), &to, &mut |_, _| ())
            .unwrap();
        self.next += 1;
        let undo = done.undo.name;
        self.instants.insert(undo.clone(), self.next);
        self.snapshots
            .push((undo, std::mem::replace(&mut self.live, content)));
        self.count("revert");
    }

    fn resize(&mut self) {
        let odd = self.chance.below(SIZES.end - SIZES.start);
        let size = match self.chance.below(2) {
            0 => SIZES.start + odd,
            _ => SIZES.start + odd / 512 * 512,
        };
        self.engine.resize_volume(&name("vm"), size).unwrap();
        self.live.resize(size as usize, 0);
        self.count("resize");
    }

    fn restart(&mut self) {
        self.engine.close().unwrap();
        self.world.kill();
        self.index.kill(self.chance.next());
        if self.chance.below(2) == 0 {
            self.index.lose();
        }
        let env = environment(&self.world, &self.index);
        self.engine = Engine::open(env, settings()).unwrap();
        self.count("restart");
    }

    /// Some time passes.
    fn go_on(&mut self) {
        for _ in 0..1 + self.chance.below(12) {
            self.write();
        }
        match self.chance.below(12) {
            0 | 1 if !self.snapshots.is_empty() => self.revert(),
            2..=4 => self.resize(),
            5 => self.restart(),
            _ => {}
        }
        while self.snapshots.len() >= POINTS {
            self.delete();
        }
        self.take();
    }

    /// Two points, the older one perhaps a bookmark; with both contents.
    fn pair(&mut self) -> Option<(Name, Vec<u8>, Name, Vec<u8>)> {
        let bookmark = self.chance.below(2) == 0 && !self.bookmarks.is_empty();
        let (from, instant, a) = if bookmark {
            let at = self.chance.below(self.bookmarks.len() as u64) as usize;
            self.bookmarks[at].clone()
        } else {
            let at = self.chance.below(self.snapshots.len() as u64) as usize;
            let (from, a) = self.snapshots[at].clone();
            let instant = self.instants[&from];
            (from, instant, a)
        };
        let later: Vec<_> = self
            .snapshots
            .iter()
            .filter(|(s, _)| self.instants[s] > instant)
            .cloned()
            .collect();
        let (to, b) = later
            .get(self.chance.below(later.len().max(1) as u64) as usize)?
            .clone();
        if bookmark {
            self.count("from a bookmark");
        }
        Some((from, a, to, b))
    }
}

fn tool(dir: &Path, program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).current_dir(dir).output();
    rig::good(&out.unwrap(), &format!("{program} {args:?}"))
}

/// `qemu-img map` says of each byte what the extents say.
fn check_map(dir: &Path, list: &[DiffExtent], size: u64, what: &str) {
    let text = tool(
        dir,
        "qemu-img",
        &["map", "--output=json", "-f", "qcow2", "diff.qcow2"],
    );
    let map: Value = serde_json::from_str(&text).unwrap();
    let entries: Vec<(u64, u64, u64, bool)> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|e| {
            let n = |key: &str| e[key].as_u64().unwrap();
            (
                n("start"),
                n("start") + n("length"),
                n("depth"),
                e["zero"] == true,
            )
        })
        .collect();
    let end = entries.last().map_or(0, |e| e.1);
    assert_eq!(end, size.next_multiple_of(512), "{what}");
    for extent in list {
        let (from, to) = (extent.start, extent.start + extent.length);
        for &(start, end, depth, zero) in &entries {
            if start < to && from < end {
                assert_eq!(depth, 0, "{what}: {start}..{end} is not in the overlay");
                // A cluster is zero only if all of it is; but what is zero in it is never data.
                assert!(!zero || extent.zero, "{what}: {start}..{end} is not zero");
            }
        }
    }
}

fn check_pages(dir: &Path, b: &[u8], chance: &mut Chance) {
    let mut args = vec!["-r".to_owned(), "-f".to_owned(), "qcow2".to_owned()];
    for _ in 0..6 {
        let page = chance.below((b.len() as u64 / PAGE).max(1)) * PAGE;
        let bytes = b
            .get(page as usize..(page + PAGE) as usize)
            .unwrap_or_default();
        // A page that was cut by a resize is of two bytes.
        if let [first, ..] = bytes
            && bytes.iter().all(|byte| byte == first)
        {
            args.push("-c".to_owned());
            args.push(format!("read -P {first} {page} {PAGE}"));
        }
    }
    args.push("diff.qcow2".to_owned());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let said = tool(dir, "qemu-io", &args);
    assert!(!said.contains("Pattern verification failed"), "{said}");
}

#[test]
fn qemu_restores_every_newer_point_from_an_older_one_and_the_diff() {
    let missing = ["qemu-img", "qemu-io"]
        .iter()
        .find(|tool| Command::new(tool).arg("--version").output().is_err());
    if let Some(missing) = missing {
        rig::skip(&format!("{missing} is not installed"));
        return;
    }
    let wanted = setting("STILLFRAME_DIFFS", 60);
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut totals: BTreeMap<&str, u64> = BTreeMap::new();
    let (mut made, mut seed) = (0, setting("STILLFRAME_DIFFS_SEED", 0));
    while made < wanted {
        seed += 1;
        let mut history = History::new(seed);
        history.take();
        for _ in 0..10 {
            history.go_on();
            let Some((from, a, to, b)) = history.pair() else {
                continue;
            };
            made += 1;
            let what = format!("seed {seed}: {from}..{to}");
            let diff = history.engine.diff(&name("vm"), &from, Some(&to)).unwrap();
            let newer = history.engine.open_snapshot(&name("vm"), &to).unwrap();
            let list = extents(&*newer, &diff).unwrap();
            let layout = Arc::new(Layout::new(diff.size, &list).unwrap());
            let ends = Ends {
                backing: "a.img".to_owned(),
                from: Uuid([1; 16]),
                to: newer.info().uuid,
            };
            let file = Qcow2::new(newer, layout, &ends).unwrap();
            let mut bytes = vec![0; file.size() as usize];
            file.read_at(0, &mut bytes).unwrap();
            fs::write(dir.join("a.img"), &a).unwrap();
            fs::write(dir.join("b.img"), &b).unwrap();
            fs::write(dir.join("diff.qcow2"), &bytes).unwrap();
            let text = tool(dir, "qemu-img", &["check", "-f", "qcow2", "diff.qcow2"]);
            assert!(text.contains("No errors were found"), "{what}: {text}");
            tool(
                dir,
                "qemu-img",
                &["compare", "-f", "raw", "-F", "qcow2", "b.img", "diff.qcow2"],
            );
            tool(
                dir,
                "qemu-img",
                &["convert", "-O", "raw", "diff.qcow2", "c.img"],
            );
            let mut restored = fs::read(dir.join("c.img")).unwrap();
            assert!(restored.len() >= b.len(), "{what}");
            let padding = restored.split_off(b.len());
            assert!(padding.iter().all(|&byte| byte == 0), "{what}");
            assert!(restored == b, "{what}: the restored image differs");
            check_map(dir, &list, diff.size, &what);
            check_pages(dir, &b, &mut history.chance);
            if list.iter().any(|e| e.zero) {
                history.count("with zeros");
            }
            match a.len().cmp(&b.len()) {
                std::cmp::Ordering::Less => history.count("longer"),
                std::cmp::Ordering::Greater => history.count("shorter"),
                std::cmp::Ordering::Equal => {}
            }
        }
        for (what, count) in history.counts {
            *totals.entry(what).or_default() += count;
        }
    }
    println!("{made} diffs, {totals:?}");
    for what in [
        "revert",
        "resize",
        "restart",
        "from a bookmark",
        "with zeros",
        "longer",
        "shorter",
    ] {
        assert!(
            totals.get(what).is_some_and(|&n| n >= 3),
            "too little of {what}"
        );
    }
}
