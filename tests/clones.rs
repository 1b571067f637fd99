//! Clones against a model, in process, on simulated disks.
//!
//! Goal: whatever is cloned, written, zeroed, cut, taken over, renamed and deleted, in any order, beside
//! writes to the live volume, and whatever is killed, cut from power or robbed of its map: a clone holds
//! every acknowledged byte after a kill and every flushed byte after a power cut, what was cloned from
//! it or to it stays apart, and snapshots never change.
//!
//! Method: random operations from a printed seed on two small volumes, one no multiple of the grain.
//! The model is plain bytes. What an operation that was cut off may have left is spelled out in
//! [`Way`]; everything else must be exact. `STILLFRAME_CLONES_OPS` and `STILLFRAME_CLONES_SEED` choose a
//! longer run or repeat one.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set its stage has failed"
)]

mod rig;
#[path = "rig/sim.rs"]
mod sim;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use stillframe::error::{Kind, Result};
use stillframe::map::memory::MemoryIndexHome;
use stillframe::sys::sim::{Op, SimWorld};
use stillframe::units::{Grain, Name};
use stillframe::volume::{Engine, OpenClone, Settings, SnapshotState, VolumeOptions, Zeroing};

use rig::Chance;
use sim::environment;

const MIB: u64 = 1 << 20;
const SIZES: [(u64, u64); 2] = [(256 << 10, 4096), ((300 << 10) + 777, 16384)];

/// Something that is read and written.
#[derive(Clone)]
struct Content {
    bytes: Vec<u8>,
    /// After a power cut they may hold anything.
    unflushed: BTreeSet<u64>,
    growing: bool,
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.bytes.len())
    }
}

impl Content {
    fn of(bytes: &[u8]) -> Content {
        Content {
            bytes: bytes.to_vec(),
            unflushed: BTreeSet::new(),
            growing: false,
        }
    }

    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn put(&mut self, offset: u64, data: &[u8]) {
        let end = offset as usize + data.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[offset as usize..end].copy_from_slice(data);
    }
}

#[derive(Default)]
struct Model {
    live: Option<Content>,
    snapshots: BTreeMap<String, Vec<u8>>,
    clones: BTreeMap<String, Content>,
}

/// What is under way: what it may leave if it is cut off.
#[derive(Clone, Debug)]
enum Way {
    Nothing,
    Live(Range<u64>),
    Write(String, Range<u64>),
    SetSize(String, u64),
    TakeOver(String, Content),
    Make(String, Content),
    Delete(String),
    Rename(String, String),
    Snapshot(String),
    Unsnapshot(String),
}

struct Run {
    world: SimWorld,
    index: MemoryIndexHome,
    engine: Arc<Engine>,
    chance: Chance,
    models: Vec<Model>,
    counts: BTreeMap<&'static str, u64>,
    next_name: u64,
    way: (usize, Way),
    /// Segments are never removed, so that the map may be lost: what only it knew is in the log.
    keep_log: bool,
    full: bool,
    seed: u64,
}

fn settings() -> Settings {
    Settings {
        ballast_bytes: 512 << 10,
        map_cache_bytes: 64 << 10,
        segment_bytes: 2 * MIB,
        checkpoint_bytes: MIB,
        settle_rounds: 1,
        ..Settings::default()
    }
}

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn volume_name(v: usize) -> Name {
    name(&format!("v{v}"))
}

fn sectors(range: &Range<u64>) -> Range<u64> {
    range.start / 512..range.end.div_ceil(512)
}

fn open_new(world: &SimWorld, index: &MemoryIndexHome) -> Arc<Engine> {
    let env = environment(world, index);
    Engine::create(&env, &settings()).expect("a store is made");
    let engine = Engine::open(env, settings()).expect("a new store opens");
    for (v, (size, grain)) in SIZES.iter().enumerate() {
        let path = format!("sources/v{v}");
        world.add_disk(&path, *size);
        let options = VolumeOptions {
            grain: Grain::new(*grain).unwrap(),
            on_full_wait_s: 0,
            ..VolumeOptions::default()
        };
        engine.add_volume(&volume_name(v), &path, options).unwrap();
    }
    engine
}

impl Run {
    fn new(seed: u64) -> Run {
        let world = SimWorld::new(seed);
        let index = MemoryIndexHome::new();
        let engine = open_new(&world, &index);
        let model = |&(size, _): &(u64, u64)| Model {
            live: Some(Content::of(&vec![0; size as usize])),
            ..Model::default()
        };
        Run {
            world,
            index,
            engine,
            chance: Chance(seed),
            models: SIZES.iter().map(model).collect(),
            counts: BTreeMap::new(),
            next_name: 0,
            way: (0, Way::Nothing),
            keep_log: seed.is_multiple_of(2),
            full: false,
            seed,
        }
    }

    fn count(&mut self, what: &'static str) {
        trace(|| format!("{what} v{} {:?}", self.way.0, self.way.1));
        *self.counts.entry(what).or_default() += 1;
    }

    fn new_name(&mut self, kind: &str) -> String {
        self.next_name += 1;
        format!("{kind}{}", self.next_name)
    }

    fn some_clone(&mut self, v: usize) -> Option<String> {
        let names: Vec<&String> = self.models[v].clones.keys().collect();
        let n = names.len() as u64;
        (n > 0).then(|| names[self.chance.below(n) as usize].clone())
    }

    fn some_snapshot(&mut self, v: usize) -> Option<String> {
        let names: Vec<&String> = self.models[v].snapshots.keys().collect();
        let n = names.len() as u64;
        (n > 0).then(|| names[self.chance.below(n) as usize].clone())
    }

    fn range(&mut self, size: u64) -> Range<u64> {
        let base = match self.chance.below(4) {
            0 => self.chance.below(size),
            1 => size.saturating_sub(self.chance.below(9000)),
            n => (n * 60_000 + self.chance.below(20_000)).min(size - 1),
        };
        let start = match self.chance.below(3) {
            0 => base,
            1 => base / 512 * 512,
            _ => base / 4096 * 4096,
        };
        let len = match self.chance.below(6) {
            0 => 1 + self.chance.below(600),
            1 => 1 + self.chance.below(64 << 10),
            2 => 16384,
            _ => 4096 * (1 + self.chance.below(3)),
        };
        let start = start.min(size - 1);
        start..(start + len).min(size)
    }

    fn fill(&mut self, len: u64) -> Vec<u8> {
        if self.chance.below(12) == 0 {
            return vec![0; len as usize];
        }
        let tag = self.chance.next().to_le_bytes();
        tag.iter().copied().cycle().take(len as usize).collect()
    }

    fn open(&self, v: usize, clone: &str) -> Arc<OpenClone> {
        self.engine
            .open_clone(&volume_name(v), &name(clone))
            .unwrap_or_else(|e| panic!("seed {}: {clone} does not open: {e:?}", self.seed))
    }

    fn write_live(&mut self, v: usize) -> Result<()> {
        let range = self.range(SIZES[v].0);
        let data = self.fill(range.end - range.start);
        self.way = (v, Way::Live(range.clone()));
        let live = self.models[v].live.as_mut().unwrap();
        live.unflushed.extend(sectors(&range));
        let volume = self.engine.volume(&volume_name(v))?;
        volume.write_at(range.start, &data, false)?;
        let live = self.models[v].live.as_mut().unwrap();
        live.put(range.start, &data);
        self.count("live write");
        Ok(())
    }

    fn write(&mut self, v: usize, clone: &str) -> Result<()> {
        let model = &self.models[v].clones[clone];
        let (size, growing) = (model.size(), model.growing);
        let range = match growing && self.chance.below(2) == 0 || size == 0 {
            // On, or past a gap, or over the end.
            true if growing => {
                let at = (size + self.chance.below(9000)).saturating_sub(4000);
                let at = at.min(SIZES[v].0 + 50_000);
                at..at + 1 + self.chance.below(12_000)
            }
            true => return Ok(()),
            false => self.range(size),
        };
        let model = &self.models[v].clones[clone];
        let same = range.end <= size && self.chance.below(8) == 0;
        let data = match same {
            true => model.bytes[range.start as usize..range.end as usize].to_vec(),
            false => self.fill(range.end - range.start),
        };
        let compare = self.chance.below(4) == 0;
        self.way = (v, Way::Write(clone.to_owned(), range.clone()));
        let own = self.engine.clone_info(&volume_name(v), &name(clone))?.own;
        let opened = self.open(v, clone);
        let done = opened.write_at(range.start, &data, compare);
        let model = self.models[v].clones.get_mut(clone).unwrap();
        model.unflushed.extend(sectors(&range));
        done?;
        model.put(range.start, &data);
        if same && compare {
            assert_eq!(opened.info().own, own, "equal content takes no space");
            self.count("left out");
        }
        self.count(if range.end > size { "longer" } else { "write" });
        Ok(())
    }

    fn zero(&mut self, v: usize, clone: &str) -> Result<()> {
        let size = self.models[v].clones[clone].size();
        if size == 0 {
            return Ok(());
        }
        let range = match self.chance.below(6) {
            0 => 0..size,
            1 => self.chance.below(size)..size,
            _ => self.range(size),
        };
        self.way = (v, Way::Write(clone.to_owned(), range.clone()));
        let model = self.models[v].clones.get_mut(clone).unwrap();
        model.unflushed.extend(sectors(&range));
        let opened = self.open(v, clone);
        opened.zero(range.start, range.end - range.start, Zeroing::Discard)?;
        let zeros = vec![0; (range.end - range.start) as usize];
        let model = self.models[v].clones.get_mut(clone).unwrap();
        model.put(range.start, &zeros);
        let grain = SIZES[v].1;
        let whole = range.start.next_multiple_of(grain)..range.end / grain * grain;
        if !whole.is_empty() {
            let data = opened.next_data(whole.start)?;
            let seed = self.seed;
            assert!(
                data.is_none_or(|at| at >= whole.end),
                "seed {seed}: no space is given back"
            );
        }
        self.count("zero");
        Ok(())
    }

    fn flush(&mut self, v: usize, clone: &str) -> Result<()> {
        self.way = (v, Way::Nothing);
        self.open(v, clone).flush()?;
        self.models[v]
            .clones
            .get_mut(clone)
            .unwrap()
            .unflushed
            .clear();
        self.count("flush");
        Ok(())
    }

    fn set_size(&mut self, v: usize, clone: &str) -> Result<()> {
        let model = self.models[v].clones.get_mut(clone).unwrap();
        let old = model.size();
        let size = match self.chance.below(5) {
            0 => 0,
            1 => old + self.chance.below(30_000),
            _ => self.chance.below(old + 1),
        };
        if !model.growing {
            let refused = self.open(v, clone).set_size(size);
            let expected = (size != old).then_some(Kind::Permission);
            match refused {
                Err(e) if e.kind() == Kind::Io => return Err(e),
                done => assert_eq!(done.err().map(|e| e.kind()), expected),
            }
            return Ok(());
        }
        // Its sector may be torn by the cut.
        model
            .unflushed
            .extend(sectors(&(size.saturating_sub(1)..size + 1)));
        self.way = (v, Way::SetSize(clone.to_owned(), size));
        self.open(v, clone).set_size(size)?;
        let model = self.models[v].clones.get_mut(clone).unwrap();
        model.bytes.resize(size as usize, 0);
        self.count(if size < old { "cut" } else { "stretched" });
        Ok(())
    }

    fn take_over(&mut self, v: usize, clone: &str) -> Result<()> {
        let Some(snapshot) = self.some_snapshot(v) else {
            return Ok(());
        };
        let model = self.models[v].clones[clone].clone();
        let from = self
            .engine
            .open_snapshot(&volume_name(v), &name(&snapshot))?;
        let content = &self.models[v].snapshots[&snapshot];
        let start = match self.chance.below(3) {
            0 => self.chance.below(from.size()),
            _ => model.size().min(from.size() - 1),
        };
        let end = (start + 1 + self.chance.below(80_000)).min(from.size());
        let mut after = model.clone();
        after.put(start, &content[start as usize..end as usize]);
        self.way = (v, Way::TakeOver(clone.to_owned(), after.clone()));
        let opened = self.open(v, clone);
        let own = opened.info().own;
        match opened.take_over(&from, start, end - start)? {
            true => {
                assert!(model.growing);
                assert_eq!(opened.info().own, own, "taken over, not copied");
                assert_eq!(opened.info().base, Some(from.info().uuid));
                self.models[v].clones.insert(clone.to_owned(), after);
                self.count("taken over");
            }
            false => self.count("not taken over"),
        }
        Ok(())
    }

    fn make(&mut self, v: usize) -> Result<()> {
        if self.models[v].clones.len() >= 6 {
            return match self.some_clone(v) {
                Some(clone) => self.delete(v, &clone),
                None => Ok(()),
            };
        }
        let new = self.new_name("c");
        let (volume, clone) = (volume_name(v), name(&new));
        let content = match (
            self.chance.below(4),
            self.some_clone(v),
            self.some_snapshot(v),
        ) {
            (0, ..) => {
                let mut empty = Content::of(&[]);
                empty.growing = true;
                self.way = (v, Way::Make(new.clone(), empty.clone()));
                self.engine.clone_empty(&volume, &clone)?;
                self.count("empty");
                empty
            }
            (1 | 2, Some(of), _) => {
                let content = Content::of(&self.models[v].clones[&of].bytes);
                self.way = (v, Way::Make(new.clone(), content.clone()));
                let before = self.engine.clone_info(&volume, &name(&of))?;
                let info = self.engine.clone_clone(&volume, &name(&of), &clone)?;
                assert_eq!((info.size, info.own), (content.size(), 0));
                assert_eq!(info.base, before.base);
                self.models[v]
                    .clones
                    .get_mut(&of)
                    .unwrap()
                    .unflushed
                    .clear();
                self.count("clone of clone");
                content
            }
            (_, _, Some(of)) => {
                let content = Content::of(&self.models[v].snapshots[&of]);
                self.way = (v, Way::Make(new.clone(), content.clone()));
                let info = self.engine.clone_snapshot(&volume, &name(&of), &clone)?;
                assert_eq!((info.size, info.own, info.layers), (content.size(), 0, 1));
                assert_eq!(info.base_name, Some(name(&of)));
                self.count("clone");
                content
            }
            _ => return Ok(()),
        };
        self.models[v].clones.insert(new, content);
        Ok(())
    }

    fn delete(&mut self, v: usize, clone: &str) -> Result<()> {
        let held = (self.chance.below(3) == 0).then(|| self.open(v, clone));
        self.way = (v, Way::Delete(clone.to_owned()));
        self.engine.delete_clone(&volume_name(v), &name(clone))?;
        let mut model = self.models[v].clones.remove(clone).unwrap();
        self.count("delete");
        let Some(held) = held else { return Ok(()) };
        self.way = (v, Way::Nothing);
        // Also its snapshot may go now.
        if let Some(snapshot) = self.some_snapshot(v) {
            self.unsnapshot(v, &snapshot)?;
            self.way = (v, Way::Nothing);
        }
        self.maintain()?;
        self.write_live(v)?;
        self.way = (v, Way::Nothing);
        if model.size() > 0 {
            let range = self.range(model.size());
            let data = self.fill(range.end - range.start);
            held.write_at(range.start, &data, false)?;
            model.put(range.start, &data);
        }
        let mut bytes = vec![0; model.bytes.len()];
        held.read_at(0, &mut bytes)?;
        assert!(bytes == model.bytes, "seed {}: deleted but open", self.seed);
        self.count("deleted but open");
        Ok(())
    }

    fn rename(&mut self, v: usize, clone: &str) -> Result<()> {
        let new = self.new_name("c");
        self.way = (v, Way::Rename(clone.to_owned(), new.clone()));
        self.engine
            .rename_clone(&volume_name(v), &name(clone), &name(&new))?;
        let model = self.models[v].clones.remove(clone).unwrap();
        self.models[v].clones.insert(new, model);
        self.count("rename");
        Ok(())
    }

    fn snapshot(&mut self, v: usize) -> Result<()> {
        if self.models[v].snapshots.len() >= 4 {
            let old = self.some_snapshot(v).unwrap();
            return self.unsnapshot(v, &old);
        }
        let new = self.new_name("s");
        self.way = (v, Way::Snapshot(new.clone()));
        self.engine
            .take_snapshots(&[(volume_name(v), name(&new))])?;
        let model = &mut self.models[v];
        let live = model.live.as_mut().unwrap();
        live.unflushed.clear();
        model.snapshots.insert(new, live.bytes.clone());
        self.count("snapshot");
        Ok(())
    }

    fn unsnapshot(&mut self, v: usize, snapshot: &str) -> Result<()> {
        let uuid = self.engine.snapshot(&volume_name(v), &name(snapshot))?.uuid;
        let clones = self.engine.clones(&volume_name(v))?;
        let kept = clones.iter().any(|c| c.base == Some(uuid));
        self.way = (v, Way::Unsnapshot(snapshot.to_owned()));
        self.engine
            .delete_snapshot(&volume_name(v), &name(snapshot))?;
        self.models[v].snapshots.remove(snapshot);
        self.count(if kept {
            "kept by a clone"
        } else {
            "unsnapshot"
        });
        Ok(())
    }

    fn maintain(&mut self) -> Result<()> {
        if self.keep_log {
            return Ok(());
        }
        self.engine.maintain()?;
        self.count("maintain");
        Ok(())
    }

    fn step(&mut self, crashing: bool) -> Result<()> {
        self.way = (0, Way::Nothing);
        let v = self.chance.below(2) as usize;
        let choice = self.chance.below(if crashing { 84 } else { 100 });
        let clone = self.some_clone(v);
        match (choice, clone) {
            (0..=11, _) => self.write_live(v),
            (12..=17, _) => self.snapshot(v),
            (18..=26, _) => self.make(v),
            (27..=56, Some(clone)) => self.write(v, &clone),
            (57..=62, Some(clone)) => self.zero(v, &clone),
            (63..=67, Some(clone)) => self.flush(v, &clone),
            (68..=70, Some(clone)) => self.set_size(v, &clone),
            (71..=75, Some(clone)) => self.take_over(v, &clone),
            (76..=77, Some(clone)) => self.rename(v, &clone),
            (78..=79, Some(clone)) => self.delete(v, &clone),
            (80..=83, _) => self.maintain(),
            (84..=88, _) => {
                self.compare();
                Ok(())
            }
            (89..=91, _) => {
                self.fill_disk();
                Ok(())
            }
            (92..=94, _) => {
                self.remount();
                Ok(())
            }
            (95..=99, _) => {
                self.crash();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn fill_disk(&mut self) {
        if std::mem::take(&mut self.full) {
            self.world.set_space("store", None);
        } else if !self.keep_log && self.world.disk("store/ballast").is_some() {
            let room = self.chance.below(1500 << 10);
            let used = self.world.allocated("store");
            self.world.set_space("store", Some(used + room));
            self.full = true;
            self.count("full");
        }
    }

    fn free(&mut self) {
        self.world.set_space("store", None);
        self.full = false;
    }

    fn reopen(&mut self) {
        let env = environment(&self.world, &self.index);
        self.engine = Engine::open(env, settings())
            .unwrap_or_else(|e| panic!("seed {}: the store does not open: {e:?}", self.seed));
    }

    fn remount(&mut self) {
        self.free();
        self.engine.close().expect("a clean stop");
        for model in &mut self.models {
            model.live.as_mut().unwrap().unflushed.clear();
            model.clones.values_mut().for_each(|c| c.unflushed.clear());
        }
        // A clean stop leaves nothing that a power cut could take.
        self.world.power_cut();
        self.index.power_cut(self.chance.next());
        self.lose_map();
        self.reopen();
        self.compare();
        self.count("remount");
    }

    fn lose_map(&mut self) {
        if self.keep_log && self.chance.below(2) == 0 {
            self.index.lose();
            self.count("map loss");
        }
    }

    fn crash(&mut self) {
        let power = self.chance.below(2) == 0;
        self.free();
        let mut cut = false;
        self.way = (0, Way::Nothing);
        if self.chance.below(5) > 0 {
            self.world.die_at(1 + self.chance.below(20));
            for _ in 0..60 {
                match self.step(true) {
                    Ok(()) => {}
                    Err(_) => {
                        cut = true;
                        break;
                    }
                }
            }
        }
        if !cut {
            self.way = (0, Way::Nothing);
        }
        match power {
            true => {
                self.world.power_cut();
                self.index.power_cut(self.chance.next());
            }
            false => {
                self.world.kill();
                self.index.kill(self.chance.next());
            }
        }
        self.lose_map();
        self.reopen();
        self.settle(true, power);
        self.compare();
        self.count(if power { "power cut" } else { "kill" });
        if cut {
            self.count("cut off");
        }
    }

    /// Takes over what an operation that was cut off, or a power cut, may have left, and nothing else.
    fn settle(&mut self, crashed: bool, power: bool) {
        let (v, way) = std::mem::replace(&mut self.way, (0, Way::Nothing));
        trace(|| format!("settle v{v} {way:?}, power {power}"));
        let clones = self.engine.clones(&volume_name(v)).unwrap();
        let listed = |text: &str| clones.iter().find(|c| c.name == name(text));
        let snapshots = self.engine.snapshots(&volume_name(v)).unwrap();
        let snapped = |text: &str| snapshots.iter().any(|s| s.name == name(text));
        let mut loose: Option<(Option<String>, Range<u64>)> = None;
        let model = &mut self.models[v];
        match way {
            Way::Nothing => {}
            Way::Live(range) => loose = Some((None, range)),
            Way::Write(clone, range) => {
                let known = model.clones.get_mut(&clone).unwrap();
                let size = listed(&clone).unwrap().size;
                if size != known.size() {
                    assert!(known.growing && size == range.end && size > known.size());
                    known.bytes.resize(size as usize, 0);
                }
                loose = Some((Some(clone), range));
            }
            Way::SetSize(clone, size) => {
                if listed(&clone).unwrap().size == size {
                    let known = model.clones.get_mut(&clone).unwrap();
                    known.bytes.resize(size as usize, 0);
                }
            }
            Way::TakeOver(clone, after) => {
                let volume = volume_name(v);
                let opened = self.engine.open_clone(&volume, &name(&clone)).unwrap();
                let mut bytes = vec![0; opened.size() as usize];
                opened.read_at(0, &mut bytes).unwrap();
                // Sectors that the cut may have torn say nothing of it.
                let sure = |at: &usize| !after.unflushed.contains(&(*at as u64 / 512));
                let equal = |at: usize| bytes.get(at) == after.bytes.get(at);
                if opened.size() == after.size() && (0..bytes.len()).filter(sure).all(equal) {
                    model.clones.insert(clone, after);
                }
            }
            Way::Make(clone, content) => {
                if listed(&clone).is_some() {
                    model.clones.insert(clone, content);
                    *self.counts.entry("made unanswered").or_default() += 1;
                }
            }
            Way::Delete(clone) => {
                if listed(&clone).is_none() {
                    model.clones.remove(&clone);
                }
            }
            Way::Rename(old, new) => {
                if listed(&new).is_some() {
                    let known = model.clones.remove(&old).unwrap();
                    model.clones.insert(new, known);
                }
            }
            Way::Snapshot(snapshot) => {
                if snapped(&snapshot) {
                    let live = model.live.as_mut().unwrap();
                    live.unflushed.clear();
                    model.snapshots.insert(snapshot, live.bytes.clone());
                }
            }
            Way::Unsnapshot(snapshot) => {
                if !snapped(&snapshot) {
                    model.snapshots.remove(&snapshot);
                }
            }
        }
        for (of, model) in self.models.iter_mut().enumerate() {
            let volume = self.engine.volume(&volume_name(of)).unwrap();
            let adopt = |clone: Option<&String>, content: &mut Content| {
                let mut free = BTreeSet::new();
                if crashed {
                    // What a kill left is made durable by the next start.
                    let unflushed = std::mem::take(&mut content.unflushed);
                    free.extend(unflushed.into_iter().filter(|_| power));
                }
                if let Some((which, range)) = &loose
                    && of == v
                    && which.as_ref() == clone
                {
                    free.extend(sectors(range));
                }
                let opened = clone.map(|c| {
                    let opened = self.engine.open_clone(&volume_name(of), &name(c));
                    opened.unwrap_or_else(|e| panic!("seed {}: {c}: {e:?}", self.seed))
                });
                for sector in free {
                    let start = sector * 512;
                    let end = (start + 512).min(content.size());
                    if start >= end {
                        continue;
                    }
                    let out = &mut content.bytes[start as usize..end as usize];
                    match &opened {
                        Some(opened) => opened.read_at(start, out).unwrap(),
                        None => volume.read_at(start, out).unwrap(),
                    }
                }
            };
            adopt(None, model.live.as_mut().unwrap());
            for (clone, content) in &mut model.clones {
                adopt(Some(clone), content);
            }
        }
    }

    fn compare(&mut self) {
        for (v, model) in self.models.iter().enumerate() {
            let volume = volume_name(v);
            let what = |name: &str| format!("seed {}: v{v} {name}", self.seed);
            let live = model.live.as_ref().unwrap();
            let mut bytes = vec![0; live.bytes.len()];
            let opened = self.engine.volume(&volume).unwrap();
            opened.read_at(0, &mut bytes).unwrap();
            same(&bytes, &live.bytes, &what("live"));
            let listed = self.engine.snapshots(&volume).unwrap();
            assert_eq!(listed.len(), model.snapshots.len(), "{}", what("snapshots"));
            for (snapshot, content) in &model.snapshots {
                let opened = self.engine.open_snapshot(&volume, &name(snapshot)).unwrap();
                opened.read_at(0, &mut bytes).unwrap();
                same(&bytes, content, &what(snapshot));
            }
            let listed = self.engine.clones(&volume).unwrap();
            let names: Vec<String> = listed.iter().map(|c| c.name.to_string()).collect();
            let mut known: Vec<String> = model.clones.keys().cloned().collect();
            known.sort();
            assert_eq!(names, known, "{}", what("clones"));
            for (clone, content) in &model.clones {
                let opened = self.engine.open_clone(&volume, &name(clone)).unwrap();
                let info = opened.info();
                assert_eq!(info.state, SnapshotState::Active, "{}", what(clone));
                assert_eq!(info.size, content.size(), "{}", what(clone));
                assert!(info.mtime_ns >= info.created_ns);
                assert_eq!(opened.is_growing(), content.growing);
                compare_clone(&opened, &content.bytes, &what(clone));
            }
        }
        self.count("compare");
    }

    /// Overlays that no clone needs are gone after some upkeep.
    fn finish(&mut self) {
        self.free();
        for v in 0..2 {
            for clone in self.models[v].clones.keys() {
                self.engine
                    .delete_clone(&volume_name(v), &name(clone))
                    .unwrap();
            }
            for snapshot in self.models[v].snapshots.keys() {
                self.engine
                    .delete_snapshot(&volume_name(v), &name(snapshot))
                    .unwrap();
            }
        }
        for _ in 0..3 {
            self.engine.maintain().unwrap();
        }
        let left = self.world.dir("store/clones");
        let left = stillframe::sys::disk::Dir::list(left.as_ref()).unwrap();
        assert!(left.is_empty(), "seed {}: {left:?}", self.seed);
        for v in 0..2 {
            let info = self.engine.volume(&volume_name(v)).unwrap().info();
            assert_eq!(info.used, 0, "seed {}: preserved for nobody", self.seed);
            self.engine.remove_volume(&volume_name(v)).unwrap();
        }
        self.engine.close().unwrap();
    }
}

#[track_caller]
fn same(found: &[u8], expected: &[u8], what: &str) {
    if let Some(at) = (0..found.len()).find(|&i| found[i] != expected[i]) {
        let (found, expected) = (found[at], expected[at]);
        panic!("{what}: byte {at} is {found} and should be {expected}");
    }
}

fn trace(text: impl FnOnce() -> String) {
    if std::env::var_os("STILLFRAME_CLONES_TRACE").is_some() {
        println!("{}", text());
    }
}

fn compare_clone(opened: &OpenClone, expected: &[u8], what: &str) {
    let mut bytes = vec![0; expected.len()];
    opened
        .read_at(0, &mut bytes)
        .unwrap_or_else(|e| panic!("{what}: {e:?}"));
    same(&bytes, expected, what);
    let size = expected.len() as u64;
    let mut at = 0;
    while at < size {
        let data = opened.next_data(at).unwrap().unwrap_or(size);
        let zero = &expected[at as usize..data as usize];
        assert!(
            zero.iter().all(|&b| b == 0),
            "{what}: a hole at {at} hides data"
        );
        if data == size {
            break;
        }
        at = opened.next_hole(data).unwrap();
        assert!(
            at > data && at <= size,
            "{what}: no hole after {data}: {at}"
        );
    }
    assert!(opened.allocated().is_ok());
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn clones_hold_what_was_written_to_them_and_nothing_else() {
    let ops = setting("STILLFRAME_CLONES_OPS", 9000);
    let only = std::env::var("STILLFRAME_CLONES_SEED").is_ok();
    let mut totals: BTreeMap<&'static str, u64> = BTreeMap::new();
    let (mut seed, mut done) = (setting("STILLFRAME_CLONES_SEED", 1), 0);
    while done < ops {
        let mut run = Run::new(seed);
        println!("seed {seed}");
        for _ in 0..300 {
            let step = run.step(false);
            match step {
                Err(e) if run.full && e.kind() == Kind::NoSpace => {
                    run.count("refused");
                    run.settle(false, false);
                }
                done => done.unwrap_or_else(|e| panic!("seed {seed}: {e:?}")),
            }
            run.way = (0, Way::Nothing);
        }
        run.compare();
        run.finish();
        for (what, n) in &run.counts {
            *totals.entry(what).or_default() += n;
        }
        done += 300;
        seed += 1;
        if only {
            break;
        }
    }
    println!("{totals:?}");
    if only || ops < 9000 {
        return;
    }
    for what in [
        "clone",
        "clone of clone",
        "empty",
        "write",
        "longer",
        "left out",
        "zero",
        "flush",
        "cut",
        "stretched",
        "taken over",
        "not taken over",
        "delete",
        "deleted but open",
        "rename",
        "kept by a clone",
        "kill",
        "power cut",
        "cut off",
        "made unanswered",
        "map loss",
        "remount",
        "full",
        "refused",
    ] {
        assert!(
            totals.get(what).copied().unwrap_or(0) >= 5,
            "too few: {what}"
        );
    }
}

struct Stage {
    world: SimWorld,
    index: MemoryIndexHome,
    engine: Arc<Engine>,
}

/// A volume whose first half is ones, a snapshot of it, a clone of that.
fn stage() -> Stage {
    let world = SimWorld::new(7);
    let index = MemoryIndexHome::new();
    let engine = open_new(&world, &index);
    let live = engine.volume(&name("v0")).unwrap();
    live.write_at(0, &vec![1; 128 << 10], false).unwrap();
    engine.take_snapshots(&[(name("v0"), name("s"))]).unwrap();
    engine
        .clone_snapshot(&name("v0"), &name("s"), &name("c"))
        .unwrap();
    Stage {
        world,
        index,
        engine,
    }
}

impl Stage {
    fn open(&self, clone: &str) -> Arc<OpenClone> {
        self.engine.open_clone(&name("v0"), &name(clone)).unwrap()
    }

    fn reopen(&mut self) {
        let env = environment(&self.world, &self.index);
        self.engine = Engine::open(env, settings()).unwrap();
    }
}

#[test]
fn after_a_failed_sync_a_clone_takes_no_writes_until_the_store_is_opened_again() {
    let mut s = stage();
    let clone = s.open("c");
    clone.write_at(0, &[2; 4096], false).unwrap();
    clone.flush().unwrap();
    clone.write_at(0, &[3; 4096], false).unwrap();
    s.world.fail_nth(Op::Sync, 1, 5);
    assert_eq!(clone.flush().unwrap_err().kind(), Kind::Failed);
    assert_eq!(clone.flush().unwrap_err().kind(), Kind::Failed);
    let refused = clone.write_at(8192, &[3; 4096], false);
    assert_eq!(refused.unwrap_err().kind(), Kind::Failed);
    let refused = s.engine.clone_clone(&name("v0"), &name("c"), &name("d"));
    assert_eq!(refused.unwrap_err().kind(), Kind::Failed);
    assert!(matches!(clone.info().state, SnapshotState::Failed(_)));
    let mut bytes = [0; 4096];
    clone.read_at(8192, &mut bytes).unwrap();
    assert_eq!(bytes, [1; 4096], "it can be read");
    drop(clone);
    s.world.kill();
    s.index.kill(1);
    s.reopen();
    let clone = s.open("c");
    assert_eq!(clone.info().state, SnapshotState::Active);
    // What the medium has, not what the cache showed.
    clone.read_at(0, &mut bytes).unwrap();
    assert_eq!(bytes, [2; 4096]);
    clone.write_at(0, &[4; 4096], false).unwrap();
    clone.flush().unwrap();
}

#[test]
fn a_clone_fails_with_its_snapshot_where_it_needs_it() {
    let mut s = stage();
    let clone = s.open("c");
    clone.write_at(0, &[2; 8192], false).unwrap();
    s.engine.delete_snapshot(&name("v0"), &name("s")).unwrap();
    assert_eq!(clone.info().base_name, None);
    drop(clone);
    s.engine.close().unwrap();
    s.world.kill();
    s.index.kill(1);
    // Somebody writes to the source while no daemon watches.
    s.world.poke("sources/v0", 5000, &[9; 100]);
    s.reopen();
    let clone = s.open("c");
    let mut bytes = [0; 4096];
    clone.read_at(4096, &mut bytes).unwrap();
    assert_eq!(bytes, [2; 4096]);
    let refused = clone.read_at(8192, &mut bytes);
    assert_eq!(refused.unwrap_err().kind(), Kind::Failed);
    let refused = clone.write_at(8192 + 100, &bytes[..100], false);
    assert_eq!(refused.unwrap_err().kind(), Kind::Failed);
    clone.write_at(8192, &[5; 4096], false).unwrap();
    clone.read_at(8192, &mut bytes).unwrap();
    assert_eq!(bytes, [5; 4096]);
}

#[test]
fn names_limits_and_volumes_are_checked() {
    let s = stage();
    let (v, c) = (name("v0"), name("c"));
    let kind = |done: Result<()>| done.map_err(|e| e.kind());
    let engine = &s.engine;
    let again = engine.clone_snapshot(&v, &name("s"), &c).map(drop);
    assert_eq!(kind(again), Err(Kind::Exists));
    let none = engine.clone_snapshot(&v, &name("t"), &name("d")).map(drop);
    assert_eq!(kind(none), Err(Kind::NotFound));
    assert_eq!(kind(engine.remove_volume(&v)), Err(Kind::Busy));
    engine.delete_snapshot(&v, &name("s")).unwrap();
    assert_eq!(kind(engine.remove_volume(&v)), Err(Kind::Busy));
    let clone = s.open("c");
    let past = clone.write_at(SIZES[0].0 - 1, &[1, 2], false);
    assert_eq!(kind(past), Err(Kind::NoSpace));
    let past = clone.zero(SIZES[0].0 - 1, 2, Zeroing::Zero);
    assert_eq!(kind(past), Err(Kind::NoSpace));
    let past = clone.read_at(SIZES[0].0 - 1, &mut [0, 0]);
    assert_eq!(kind(past), Err(Kind::Invalid));
    // As deep as it goes.
    for depth in 1..200 {
        clone.write_at(0, &[depth], false).unwrap();
        let new = name(&format!("d{depth}"));
        match engine.clone_clone(&v, &c, &new) {
            Ok(_) => {}
            Err(e) => {
                assert_eq!(e.kind(), Kind::Limit);
                assert_eq!(depth, 128);
                break;
            }
        }
        let mut byte = [0];
        let copy = engine.open_clone(&v, &new).unwrap();
        copy.read_at(0, &mut byte).unwrap();
        assert_eq!(byte, [depth]);
        drop(copy);
        engine.delete_clone(&v, &new).unwrap();
    }
    assert_eq!(clone.info().layers, 128);
}

#[test]
fn a_second_copy_from_an_untouched_clone_adds_no_layer() {
    let s = stage();
    let (v, c) = (name("v0"), name("c"));
    let info = s.engine.clone_clone(&v, &c, &name("d")).unwrap();
    assert_eq!(info.layers, 1);
    s.open("d").write_at(0, &[7], false).unwrap();
    let info = s.engine.clone_clone(&v, &name("d"), &name("e")).unwrap();
    assert_eq!((info.layers, info.base_name), (2, Some(name("s"))));
}

#[test]
fn writers_of_a_clone_and_of_its_clones_do_not_meet() {
    let s = stage();
    let (v, c) = (name("v0"), name("c"));
    std::thread::scope(|scope| {
        for writer in 0..4u64 {
            let clone = s.open("c");
            scope.spawn(move || {
                for round in 0..100u64 {
                    let at = (round * 4 + writer) * 1024 % (256 << 10);
                    clone
                        .write_at(at, &[writer as u8 + 1; 1024], false)
                        .unwrap();
                    let mut back = [0; 1024];
                    clone.read_at(at, &mut back).unwrap();
                    assert_eq!(back, [writer as u8 + 1; 1024]);
                }
                clone.flush().unwrap();
            });
        }
        scope.spawn(|| {
            for n in 0..20 {
                let new = name(&format!("d{n}"));
                s.engine.clone_clone(&v, &c, &new).unwrap();
                let copy = s.engine.open_clone(&v, &new).unwrap();
                let mut first = vec![0; 256 << 10];
                let mut second = first.clone();
                copy.read_at(0, &mut first).unwrap();
                copy.zero(0, 4096, Zeroing::Zero).unwrap();
                copy.read_at(0, &mut second).unwrap();
                assert!(first[4096..] == second[4096..] && second[..4096] == [0; 4096]);
            }
        });
    });
    let mut bytes = vec![0; 256 << 10];
    s.open("c").read_at(0, &mut bytes).unwrap();
    for (i, chunk) in bytes.chunks(1024).enumerate() {
        assert!(chunk.iter().all(|&b| b == (i % 4) as u8 + 1), "chunk {i}");
    }
}

#[test]
fn what_was_lost_with_a_part_of_the_log_fails_the_clones_of_that_time() {
    for power in [false, true] {
        let mut s = stage();
        let v = name("v0");
        let clone = s.open("c");
        for grain in 0..60u64 {
            clone.write_at(grain * 4096, &[2; 4096], false).unwrap();
            if grain == 30 {
                // Only the catalogue of the clean stop will know of it.
                s.engine.clone_clone(&v, &name("c"), &name("d")).unwrap();
                s.engine.take_snapshots(&[(v.clone(), name("m"))]).unwrap();
            }
        }
        clone.flush().unwrap();
        drop(clone);
        s.engine.take_snapshots(&[(v.clone(), name("t"))]).unwrap();
        s.engine.clone_snapshot(&v, &name("t"), &name("e")).unwrap();
        s.open("e").write_at(0, &[3; 4096], false).unwrap();
        s.engine.close().unwrap();
        s.world.kill();
        let log = s.world.dir("store/log");
        let mut segments = stillframe::sys::disk::Dir::list(log.as_ref()).unwrap();
        segments.sort();
        // Twenty batches or so from about the twentieth write on.
        let path = format!("store/log/{}", segments.last().unwrap());
        s.world.poke(&path, 100 << 10, &[0xee; 80 << 10]);
        s.index.lose();
        s.reopen();
        for _ in 0..2 {
            for (clone, lost) in [("c", true), ("d", true), ("e", false)] {
                let clone = s.open(clone);
                let state = clone.info().state;
                assert_eq!(matches!(state, SnapshotState::Failed(_)), lost);
                let read = clone.read_at(0, &mut [0; 8192]).map_err(|e| e.kind());
                let written = clone.write_at(0, &[0; 4096], false).map_err(|e| e.kind());
                let expected = if lost { Err(Kind::Failed) } else { Ok(()) };
                assert_eq!((read, written), (expected, expected));
            }
            for (snapshot, lost) in [("s", true), ("m", true), ("t", false)] {
                let state = s.engine.snapshot(&v, &name(snapshot)).unwrap().state;
                assert_eq!(
                    matches!(state, SnapshotState::Failed(_)),
                    lost,
                    "{snapshot}"
                );
            }
            // It stays so.
            match power {
                true => s.world.power_cut(),
                false => s.world.kill(),
            }
            s.index.lose();
            s.reopen();
        }
        s.engine.delete_clone(&v, &name("c")).unwrap();
        s.engine.delete_clone(&v, &name("d")).unwrap();
    }
}

/// What a write past the end left behind when it was cut off, or what was cut off a clone, never shows.
#[test]
fn behind_the_end_of_a_growing_clone_there_are_zeros_after_any_crash() {
    let v = name("v0");
    let mut stale = 0;
    for n in 1..24u64 {
        for cut in [false, true] {
            let mut s = stage();
            s.engine.clone_empty(&v, &name("g")).unwrap();
            let clone = s.open("g");
            clone.write_at(0, &[1; 1000], false).unwrap();
            clone.flush().unwrap();
            s.world.die_at(n);
            let done = match cut {
                true => clone.set_size(500),
                false => clone.write_at(1000, &[2; 2000], false),
            };
            let held = s.world.peek("store/clones/000002.data").unwrap();
            stale += u64::from(done.is_err() && !cut && held[1000..3000].contains(&2));
            drop(clone);
            s.world.kill();
            s.index.kill(n);
            s.reopen();
            let clone = s.open("g");
            let size = clone.size();
            assert!([500, 1000, 3000].contains(&size));
            clone.set_size(size + 100).unwrap();
            clone.write_at(4000, &[3; 1000], false).unwrap();
            let mut bytes = vec![9; 5000];
            clone.read_at(0, &mut bytes).unwrap();
            let behind = &bytes[size as usize..4000];
            assert!(behind.iter().all(|&b| b == 0), "operation {n}, cut {cut}");
        }
    }
    assert!(stale > 0, "nothing was ever left behind the end");
}

/// What was cut off stays away when the clone gets longer again, also if the power is cut then.
#[test]
fn a_clone_that_was_cut_and_stretched_is_zero_there_after_a_power_cut() {
    let s = stage();
    s.engine.clone_empty(&name("v0"), &name("g")).unwrap();
    let clone = s.open("g");
    clone.write_at(0, &[1; 12_000], false).unwrap();
    clone.flush().unwrap();
    clone.set_size(1024).unwrap();
    clone.set_size(12_000).unwrap();
    for seed in 0..16 {
        let world = s.world.fork(seed);
        world.power_cut();
        let index = MemoryIndexHome::new();
        let engine = Engine::open(environment(&world, &index), settings()).unwrap();
        let clone = engine.open_clone(&name("v0"), &name("g")).unwrap();
        let mut bytes = vec![9; 12_000];
        clone.read_at(0, &mut bytes).unwrap();
        assert!(bytes[..1024] == [1; 1024] && bytes[1024..].iter().all(|&b| b == 0));
    }
}

/// The largest volume there can be: the last grain, and zeroing all of it at once.
#[test]
fn a_clone_of_eight_exbibytes_is_written_at_its_end() {
    let s = stage();
    let (v, size) = (name("big"), i64::MAX as u64);
    s.world.add_disk("sources/big", size);
    let options = VolumeOptions {
        grain: Grain::new(1 << 20).unwrap(),
        ..VolumeOptions::default()
    };
    let live = s.engine.add_volume(&v, "sources/big", options).unwrap();
    live.write_at(size - 10, &[1; 10], false).unwrap();
    s.engine.take_snapshots(&[(v.clone(), name("s"))]).unwrap();
    s.engine.clone_snapshot(&v, &name("s"), &name("c")).unwrap();
    let clone = s.engine.open_clone(&v, &name("c")).unwrap();
    clone.write_at(size - 5, &[2; 5], false).unwrap();
    clone.write_at(20 << 40, &[3; 5], false).unwrap();
    let mut bytes = [0; 10];
    clone.read_at(size - 10, &mut bytes).unwrap();
    assert_eq!(bytes, [1, 1, 1, 1, 1, 2, 2, 2, 2, 2]);
    let mut names = stillframe::sys::disk::Dir::list(s.world.dir("store/clones").as_ref()).unwrap();
    names.sort();
    assert_eq!(names, ["000002.1048575.data", "000002.2.data"]);
    assert_eq!(clone.next_data(0).unwrap(), Some(20 << 40));
    clone.flush().unwrap();
    clone.zero(0, size, Zeroing::Discard).unwrap();
    assert_eq!(clone.next_data(0).unwrap(), None);
    clone.read_at(size - 10, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 10]);
}

/// A first write of a grain does not bring back what was cut off the snapshot below it.
#[test]
fn what_was_cut_off_below_stays_away_when_its_grain_is_written() {
    let s = stage();
    s.engine.clone_empty(&name("v0"), &name("g")).unwrap();
    let clone = s.open("g");
    let from = s.engine.open_snapshot(&name("v0"), &name("s")).unwrap();
    assert!(clone.take_over(&from, 0, 16 << 10).unwrap());
    clone.set_size(5000).unwrap();
    clone.set_size(12_000).unwrap();
    clone.write_at(4200, &[2; 100], false).unwrap();
    clone.zero(4300, 100, Zeroing::Zero).unwrap();
    let mut bytes = vec![9; 12_000];
    clone.read_at(0, &mut bytes).unwrap();
    assert!(bytes[4400..5000] == [1; 600] && bytes[5000..].iter().all(|&b| b == 0));
}
