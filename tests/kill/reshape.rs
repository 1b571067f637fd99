//! One more volume, on which one thread does what changes its shape: snapshots, clones, clones of clones,
//! bookmarks, reverts, resizes. Because nobody else touches it, every view of it is known to the byte,
//! but for the one operation that the kill cut off: that is done or not done, whole.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Output;
use std::time::Instant;

use crate::rig::{Chance, PATIENCE, Rig, touch};
use crate::{Cut, Load, PAGE, read_all};

pub const NAME: &str = "v2";
pub const SIZE: u64 = (5 << 19) + 333;
const SIZES: std::ops::Range<u64> = 1 << 20..3 << 20;
const VIEWS_MAX: usize = 5;

type Views = BTreeMap<String, Vec<u8>>;

/// What was asked for and not answered yet.
#[derive(Debug)]
enum Pending {
    Nothing,
    /// Bytes at an offset of the live volume, or of a clone.
    Write(Option<String>, u64, Vec<u8>),
    Take(String),
    Remove(String),
    Clone(String, Vec<u8>),
    RemoveClone(String),
    RemoveBookmark(String),
    Revert(String),
    Resize(u64),
}

pub struct Shape {
    live: Vec<u8>,
    snapshots: Views,
    clones: Views,
    /// Bookmarks, with the content of their instant.
    bookmarks: Views,
    pending: Pending,
    next_name: u64,
    pub counts: BTreeMap<&'static str, u64>,
    seed: u64,
}

fn clone_path(rig: &Rig, name: &str) -> PathBuf {
    rig.mnt()
        .join(NAME)
        .join("clones")
        .join(format!("{name}.img"))
}

fn names_in(rig: &Rig, dir: &str) -> io::Result<BTreeSet<String>> {
    let name = |entry: io::Result<fs::DirEntry>| {
        let name = entry?.file_name().into_string().unwrap();
        Ok(name.strip_suffix(".img").unwrap().to_owned())
    };
    let entries = fs::read_dir(rig.mnt().join(NAME).join(dir))?;
    entries.map(name).collect()
}

fn bookmarks_of(rig: &Rig) -> BTreeSet<String> {
    let text = rig.ok(&["bookmark", "list", NAME, "--json"]);
    let list: serde_json::Value = serde_json::from_str(&text).unwrap();
    let names = list.as_array().unwrap().iter();
    names
        .map(|b| b["name"].as_str().unwrap().to_owned())
        .collect()
}

fn some(views: &Views, chance: &mut Chance) -> Option<String> {
    let at = chance.below(views.len().max(1) as u64) as usize;
    views.keys().nth(at).cloned()
}

impl Shape {
    pub fn new(seed: u64) -> Shape {
        Shape {
            live: vec![0; SIZE as usize],
            snapshots: Views::new(),
            clones: Views::new(),
            bookmarks: Views::new(),
            pending: Pending::Nothing,
            next_name: 0,
            counts: BTreeMap::new(),
            seed,
        }
    }

    fn done(&mut self, what: &'static str) {
        self.pending = Pending::Nothing;
        *self.counts.entry(what).or_default() += 1;
    }

    fn fresh(&mut self, letter: char) -> String {
        self.next_name += 1;
        format!("{letter}{}", self.next_name)
    }

    /// Works until it is cut off or stopped.
    pub fn work(&mut self, load: &Load, mut chance: Chance) {
        while !load.over.load(std::sync::atomic::Ordering::SeqCst) {
            let many = self.snapshots.len() >= VIEWS_MAX;
            let done = match chance.below(24) {
                _ if many => self.remove(load, &mut chance),
                0..=6 => self.write(load, &mut chance),
                7..=10 => self.take(load),
                11..=12 => self.remove(load, &mut chance),
                13..=14 => self.clone(load, &mut chance),
                15..=17 => self.write_clone(load, &mut chance),
                18 => self.remove_clone(load, &mut chance),
                19..=21 => self.revert(load, &mut chance),
                _ => self.resize(load, &mut chance),
            };
            if let Err(Cut::Killed) = done {
                return;
            }
        }
    }

    /// Some bytes at some place of an image, now and then many.
    fn bytes(&self, of: usize, chance: &mut Chance) -> (u64, Vec<u8>) {
        let at = chance.below(of as u64);
        let most = [20_000, 1 << 20][usize::from(chance.below(4) == 0)];
        let len = (1 + chance.below(most)).min(of as u64 - at) as usize;
        let tag = match chance.below(6) {
            0 => [0; 8],
            _ => chance.next().to_le_bytes(),
        };
        (at, tag.into_iter().cycle().take(len).collect())
    }

    fn write(&mut self, load: &Load, chance: &mut Chance) -> Result<(), Cut> {
        let (at, data) = self.bytes(self.live.len(), chance);
        self.pending = Pending::Write(None, at, data.clone());
        load.cut(put(load.rig.live(NAME), at, &data), "write live.img")?;
        self.live[at as usize..at as usize + data.len()].copy_from_slice(&data);
        self.done("written");
        Ok(())
    }

    fn write_clone(&mut self, load: &Load, chance: &mut Chance) -> Result<(), Cut> {
        let Some(name) = some(&self.clones, chance) else {
            return Ok(());
        };
        let (at, data) = self.bytes(self.clones[&name].len(), chance);
        self.pending = Pending::Write(Some(name.clone()), at, data.clone());
        load.cut(put(clone_path(load.rig, &name), at, &data), "write a clone")?;
        let clone = self.clones.get_mut(&name).expect("chosen from them");
        clone[at as usize..at as usize + data.len()].copy_from_slice(&data);
        self.done("clone written");
        Ok(())
    }

    fn take(&mut self, load: &Load) -> Result<(), Cut> {
        let name = self.fresh('s');
        self.pending = Pending::Take(name.clone());
        load.cut(touch(&load.rig.snapshot(NAME, &name)), "touch a snapshot")?;
        self.snapshots.insert(name, self.live.clone());
        self.done("taken");
        Ok(())
    }

    fn remove(&mut self, load: &Load, chance: &mut Chance) -> Result<(), Cut> {
        let Some(name) = some(&self.snapshots, chance) else {
            return Ok(());
        };
        let keep = chance.below(6) == 0;
        if keep && self.bookmarks.len() >= 3 {
            return self.remove_bookmark(load, chance);
        }
        self.pending = Pending::Remove(name.clone());
        if keep {
            let target = format!("{NAME}@{name}");
            self.command(load, &["snapshot", "delete", &target, "--keep-bookmark"])?;
        } else {
            let path = load.rig.snapshot(NAME, &name);
            load.cut(fs::remove_file(path), "remove a snapshot")?;
        }
        let content = self.snapshots.remove(&name).expect("chosen from them");
        if keep {
            self.bookmarks.insert(name, content);
        }
        self.done(if keep { "bookmarked" } else { "removed" });
        Ok(())
    }

    fn clone(&mut self, load: &Load, chance: &mut Chance) -> Result<(), Cut> {
        if self.clones.len() >= VIEWS_MAX {
            return self.remove_clone(load, chance);
        }
        let name = self.fresh('c');
        let of_clone = chance.below(2) == 0;
        let from = some(
            if of_clone {
                &self.clones
            } else {
                &self.snapshots
            },
            chance,
        );
        let Some(from) = from else { return Ok(()) };
        let (path, content) = match of_clone {
            true => (clone_path(load.rig, &from), self.clones[&from].clone()),
            false => (
                load.rig.snapshot(NAME, &from),
                self.snapshots[&from].clone(),
            ),
        };
        self.pending = Pending::Clone(name.clone(), content.clone());
        load.cut(
            fs::hard_link(path, clone_path(load.rig, &name)),
            "ln a clone",
        )?;
        self.clones.insert(name, content);
        self.done(if of_clone {
            "clone of a clone"
        } else {
            "cloned"
        });
        Ok(())
    }

    fn remove_clone(&mut self, load: &Load, chance: &mut Chance) -> Result<(), Cut> {
        let Some(name) = some(&self.clones, chance) else {
            return Ok(());
        };
        self.pending = Pending::RemoveClone(name.clone());
        load.cut(
            fs::remove_file(clone_path(load.rig, &name)),
            "remove a clone",
        )?;
        self.clones.remove(&name);
        self.done("clone removed");
        Ok(())
    }

    fn remove_bookmark(&mut self, load: &Load, chance: &mut Chance) -> Result<(), Cut> {
        let Some(name) = some(&self.bookmarks, chance) else {
            return Ok(());
        };
        self.pending = Pending::RemoveBookmark(name.clone());
        self.command(load, &["bookmark", "delete", &format!("{NAME}@{name}")])?;
        self.bookmarks.remove(&name);
        self.done("bookmark removed");
        Ok(())
    }

    fn revert(&mut self, load: &Load, chance: &mut Chance) -> Result<(), Cut> {
        let Some(name) = some(&self.snapshots, chance) else {
            return Ok(());
        };
        let target = format!("{NAME}@{name}");
        self.pending = Pending::Revert(name.clone());
        // A handle just closed may still count as a writer for a moment, on a busy machine for long.
        self.command(load, &["snapshot", "revert", &target, "--force"])?;
        // The daemon may be killed between the two.
        let listed = load.cut(names_in(load.rig, "snapshots"), "list the snapshots")?;
        self.adopt_undo(listed);
        self.live = self.snapshots[&name].clone();
        self.done("reverted");
        Ok(())
    }

    /// The snapshot that undoes a revert holds what was live.
    fn adopt_undo(&mut self, listed: BTreeSet<String>) {
        for name in listed {
            if !self.snapshots.contains_key(&name) {
                self.snapshots.insert(name, self.live.clone());
            }
        }
    }

    fn resize(&mut self, load: &Load, chance: &mut Chance) -> Result<(), Cut> {
        let size = SIZES.start + chance.below(SIZES.end - SIZES.start);
        self.pending = Pending::Resize(size);
        let end = Instant::now() + PATIENCE;
        let size_text = size.to_string();
        loop {
            let out = load.rig.run(&["volume", "resize", NAME, &size_text]);
            // As above; a resize cannot be forced.
            let busy = String::from_utf8_lossy(&out.stderr).contains("open for writing");
            if !busy || Instant::now() > end {
                self.answered(load, &out, "resize")?;
                break;
            }
        }
        self.live.resize(size as usize, 0);
        self.done("resized");
        Ok(())
    }

    fn command(&self, load: &Load, args: &[&str]) -> Result<(), Cut> {
        self.answered(load, &load.rig.run(args), &format!("{args:?}"))
    }

    fn answered(&self, load: &Load, out: &Output, what: &str) -> Result<(), Cut> {
        if out.status.success() {
            return Ok(());
        }
        let complaint = String::from_utf8_lossy(&out.stderr);
        let dying = load.dying.load(std::sync::atomic::Ordering::SeqCst);
        assert!(dying, "{what}: {complaint}");
        Err(Cut::Killed)
    }

    /// Everything against what is known, with nobody at work.
    pub fn verify(&mut self, rig: &Rig) {
        self.resolve(rig);
        let seed = self.seed;
        let live = read_all(&rig.live(NAME), 0, 1 << 20).unwrap();
        same(&live, &self.live, &format!("seed {seed}: {NAME}"));
        let listed = names_in(rig, "snapshots").unwrap();
        assert!(
            listed.iter().eq(self.snapshots.keys()),
            "seed {seed}: {listed:?}"
        );
        for (name, content) in &self.snapshots {
            let found = read_all(&rig.snapshot(NAME, name), 0, 1 << 20).unwrap();
            same(&found, content, &format!("seed {seed}: {NAME}@{name}"));
        }
        let listed = names_in(rig, "clones").unwrap();
        assert!(
            listed.iter().eq(self.clones.keys()),
            "seed {seed}: {listed:?}"
        );
        for (name, content) in &self.clones {
            let found = read_all(&clone_path(rig, name), 0, 1 << 20).unwrap();
            same(&found, content, &format!("seed {seed}: {NAME}/{name}"));
        }
        let listed = bookmarks_of(rig);
        assert!(
            listed.iter().eq(self.bookmarks.keys()),
            "seed {seed}: {listed:?}"
        );
        for (name, content) in &self.bookmarks {
            self.check_diff(rig, name, content);
        }
        *self.counts.entry("compared").or_default() += 1;
    }

    /// Whatever differs from a bookmark to now lies in the diff.
    fn check_diff(&self, rig: &Rig, from: &str, content: &[u8]) {
        let text = rig.ok(&["diff", &format!("{NAME}@{from}..live"), "--json"]);
        let diff: serde_json::Value = serde_json::from_str(&text).unwrap();
        let mut known = vec![false; self.live.len()];
        for extent in diff["extents"].as_array().unwrap() {
            let start = extent["start"].as_u64().unwrap() as usize;
            let end = start + extent["length"].as_u64().unwrap() as usize;
            known[start..end].fill(true);
        }
        for (at, (&byte, &known)) in self.live.iter().zip(&known).enumerate() {
            let was = content.get(at).copied().unwrap_or(0);
            assert!(
                known || byte == was,
                "seed {}: {from}..live misses {at}",
                self.seed
            );
        }
    }

    /// What was not answered was done or not, whole; of a write any pages.
    fn resolve(&mut self, rig: &Rig) {
        let pending = std::mem::replace(&mut self.pending, Pending::Nothing);
        let cut_off = match pending {
            Pending::Nothing => return,
            Pending::Write(clone, at, data) => {
                let path = match &clone {
                    None => rig.live(NAME),
                    Some(name) => clone_path(rig, name),
                };
                let known = match &clone {
                    None => &mut self.live,
                    Some(name) => self.clones.get_mut(name).expect("chosen from them"),
                };
                adopt(known, &read_all(&path, 0, 1 << 20).unwrap(), at, &data);
                "cut off: write"
            }
            Pending::Take(name) => {
                if names_in(rig, "snapshots").unwrap().contains(&name) {
                    self.snapshots.insert(name, self.live.clone());
                }
                "cut off: take"
            }
            Pending::Remove(name) => {
                if !names_in(rig, "snapshots").unwrap().contains(&name) {
                    let content = self.snapshots.remove(&name).expect("chosen from them");
                    if bookmarks_of(rig).contains(&name) {
                        self.bookmarks.insert(name, content);
                    }
                }
                "cut off: removal"
            }
            Pending::Clone(name, content) => {
                if names_in(rig, "clones").unwrap().contains(&name) {
                    self.clones.insert(name, content);
                }
                "cut off: clone"
            }
            Pending::RemoveClone(name) => {
                if !names_in(rig, "clones").unwrap().contains(&name) {
                    self.clones.remove(&name);
                }
                "cut off: removal of a clone"
            }
            Pending::RemoveBookmark(name) => {
                if !bookmarks_of(rig).contains(&name) {
                    self.bookmarks.remove(&name);
                }
                "cut off: removal of a bookmark"
            }
            Pending::Revert(name) => {
                self.adopt_undo(names_in(rig, "snapshots").unwrap());
                let found = read_all(&rig.live(NAME), 0, 1 << 20).unwrap();
                let target = &self.snapshots[&name];
                let was = &self.live;
                let whole = found == *target || found == *was;
                assert!(whole, "seed {}: half a revert to {name}", self.seed);
                let finished = found == *target;
                self.live = found;
                match finished {
                    true => "cut off: revert, finished",
                    false => "cut off: revert, undone",
                }
            }
            Pending::Resize(size) => {
                let found = fs::metadata(rig.live(NAME)).unwrap().len();
                if found == size {
                    self.live.resize(size as usize, 0);
                }
                "cut off: resize"
            }
        };
        *self.counts.entry(cut_off).or_default() += 1;
    }

    pub fn compare_source(&self, rig: &Rig) {
        let bytes = fs::read(rig.at(NAME)).unwrap();
        same(
            &bytes,
            &self.live,
            &format!("seed {}: the source", self.seed),
        );
    }
}

fn put(path: PathBuf, at: u64, data: &[u8]) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    file.write_all_at(data, at)
}

/// Each page that was being written is what it was or what it was to be.
fn adopt(known: &mut [u8], found: &[u8], at: u64, data: &[u8]) {
    assert_eq!(found.len(), known.len());
    let end = at + data.len() as u64;
    let mut start = at;
    while start < end {
        let stop = (start / PAGE * PAGE + PAGE).min(end);
        let range = start as usize..stop as usize;
        let new = &data[(start - at) as usize..(stop - at) as usize];
        if found[range.clone()] == *new {
            known[range].copy_from_slice(new);
        }
        start = stop;
    }
}

fn same(found: &[u8], known: &[u8], what: &str) {
    assert_eq!(found.len(), known.len(), "{what}: the size");
    let differs = found.iter().zip(known).position(|(a, b)| a != b);
    assert!(differs.is_none(), "{what}: differs at {differs:?}");
}
