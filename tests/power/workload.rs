//! A random history of everything that the program does, written down with the positions of the log.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::disks::Recorder;
use crate::machine::{Machine, Restart, VOLUMES};
use crate::model::{Doing, Moment, Patch, Point, Volume, Which, World, Writable};
use crate::rig::Chance;
use crate::sim::Content;

const SNAPSHOTS: usize = 4;
const BOOKMARKS: usize = 2;
const CLONES: usize = 3;

pub struct Workload {
    pub machine: Box<dyn Machine>,
    recorder: Recorder,
    chance: Chance,
    world: World,
    pub history: Vec<Moment>,
    names: u64,
    pub counts: BTreeMap<&'static str, u64>,
}

fn beginning() -> World {
    let volume = |&(size, _): &(u64, u64)| Volume {
        live: Writable::new(Arc::new(Content::default()), size),
        snapshots: BTreeMap::<String, Point>::new(),
        bookmarks: BTreeMap::new(),
        clones: BTreeMap::new(),
    };
    World {
        volumes: VOLUMES.iter().map(volume).collect(),
        instants: 0,
    }
}

/// One of some names, if there are any.
fn pick<T>(chance: &mut Chance, from: &BTreeMap<String, T>) -> Option<String> {
    let n = from.len() as u64;
    if n == 0 {
        return None;
    }
    from.keys().nth(chance.below(n) as usize).cloned()
}

impl Workload {
    /// On a machine with new volumes; the history begins here.
    pub fn new(machine: Box<dyn Machine>, recorder: Recorder, seed: u64) -> Workload {
        let position = recorder.position();
        let first = Moment {
            began: position,
            acknowledged: position,
            doing: Doing::Upkeep("beginning"),
            after: Arc::new(beginning()),
        };
        Workload::resume(machine, recorder, seed, vec![first])
    }

    /// On a machine that has a history.
    pub fn resume(
        machine: Box<dyn Machine>,
        recorder: Recorder,
        seed: u64,
        history: Vec<Moment>,
    ) -> Workload {
        let world = World::clone(&history.last().expect("a beginning").after);
        Workload {
            machine,
            recorder,
            chance: Chance(seed),
            // Names that nobody has had: an instant is passed at least once for each.
            names: world.instants + 1,
            world,
            history,
            counts: BTreeMap::new(),
        }
    }

    fn fresh(&mut self, letter: char) -> String {
        self.names = self.names.max(self.world.instants) + 1;
        format!("{letter}{}", self.names)
    }

    /// Does an operation and writes it down; `run` may tell the name of an undo snapshot.
    fn step(&mut self, what: &'static str, doing: Doing, run: impl FnOnce(&mut dyn Machine)) {
        let began = self.recorder.position();
        run(self.machine.as_mut());
        let acknowledged = self.recorder.position();
        self.world.apply(&doing);
        *self.counts.entry(what).or_default() += 1;
        self.history.push(Moment {
            began,
            acknowledged,
            doing,
            after: Arc::new(self.world.clone()),
        });
    }

    /// One random operation.
    pub fn go(&mut self) {
        let v = self.chance.below(VOLUMES.len() as u64) as usize;
        match self.chance.below(100) {
            0..=35 => self.write(v, None),
            36..=39 => self.burst(),
            40..=44 => self.zero(v, None),
            45..=53 => self.flush(v),
            54..=64 => self.write_clone(v),
            65..=74 => self.snapshot(v),
            75..=78 => self.delete(v),
            79 => self.delete_bookmark(v),
            80 | 81 => self.rename(v),
            82..=85 => self.clone(v),
            86 => self.delete_clone(v),
            87..=89 => self.revert(v),
            90..=92 => self.resize(v),
            93..=96 => self.step("maintain", Doing::Upkeep("maintain"), |m| m.maintain()),
            _ => self.restart(),
        }
    }

    /// A range: hot places again and again, the end, and now and then anywhere.
    fn range(&mut self, size: u64) -> (u64, u64) {
        let offset = match self.chance.below(10) {
            0 => self.chance.below(size),
            1 => size.saturating_sub(1 + self.chance.below(20_000)),
            n => (n % 3) * (160 << 10) + self.chance.below(96 << 10),
        };
        let offset = match self.chance.below(3) {
            0 => offset,
            1 => offset / 512 * 512,
            _ => offset / 4096 * 4096,
        };
        let len = match self.chance.below(8) {
            0 => 1 + self.chance.below(600),
            1 => 1 + self.chance.below(48 << 10),
            _ => 4096 * (1 + self.chance.below(4)),
        };
        let offset = offset.min(size - 1);
        (offset, len.min(size - offset))
    }

    fn patch(&mut self, offset: u64, len: u64) -> Arc<Patch> {
        // Every sector of every write is told from every other, so that no torn mixture passes.
        let tag = self.chance.next();
        let word = |i: u64| (tag ^ (i / 64)).to_le_bytes();
        let bytes = (0..len.div_ceil(8)).flat_map(word);
        let data = bytes.take(len as usize).collect();
        Arc::new(Patch { offset, data })
    }

    fn write(&mut self, v: usize, which: Which) {
        let size = self.world.image(v, &which).size;
        let (offset, len) = self.range(size);
        let patch = self.patch(offset, len);
        let doing = Doing::Write(vec![(v, which.clone(), Arc::clone(&patch))]);
        let what = if which.is_some() {
            "clone write"
        } else {
            "write"
        };
        self.step(what, doing, |m| m.write(v, &which, &patch));
    }

    /// Writers at once, so that they share commits of the log.
    fn burst(&mut self) {
        let mut patches: Vec<(usize, Which, Arc<Patch>)> = Vec::new();
        for _ in 0..4 {
            let v = self.chance.below(VOLUMES.len() as u64) as usize;
            let which = match self.chance.below(4) {
                0 => pick(&mut self.chance, &self.world.volumes[v].clones),
                _ => None,
            };
            let size = self.world.image(v, &which).size;
            let (offset, len) = self.range(size);
            let apart = |(of, image, other): &(usize, Which, Arc<Patch>)| {
                let end = other.offset + other.data.len() as u64;
                (*of, image) != (v, &which)
                    || offset / 512 * 512 >= end.next_multiple_of(512)
                    || other.offset / 512 * 512 >= (offset + len).next_multiple_of(512)
            };
            if patches.iter().all(apart) {
                let patch = self.patch(offset, len);
                patches.push((v, which, patch));
            }
        }
        self.step("burst", Doing::Write(patches.clone()), |machine| {
            let machine = &*machine;
            std::thread::scope(|scope| {
                for (v, which, patch) in &patches {
                    scope.spawn(move || machine.write(*v, which, patch));
                }
            });
        });
    }

    fn zero(&mut self, v: usize, which: Which) {
        let size = self.world.image(v, &which).size;
        let (offset, len) = match self.chance.below(20) {
            0 => (0, size),
            _ => self.range(size),
        };
        let data = vec![0; len as usize];
        let doing = Doing::Write(vec![(v, which.clone(), Arc::new(Patch { offset, data }))]);
        self.step("zero", doing, |m| m.zero(v, &which, offset, len));
    }

    fn flush(&mut self, v: usize) {
        let which = match self.chance.below(3) {
            0 => pick(&mut self.chance, &self.world.volumes[v].clones),
            _ => None,
        };
        let doing = Doing::Flush(v, which.clone());
        self.step("flush", doing, |m| m.flush(v, &which));
    }

    fn write_clone(&mut self, v: usize) {
        let which = pick(&mut self.chance, &self.world.volumes[v].clones);
        match (which, self.chance.below(6)) {
            (None, _) => {}
            (which, 0) => self.zero(v, which),
            (which, _) => self.write(v, which),
        }
    }

    fn snapshot(&mut self, v: usize) {
        let of: Vec<usize> = match self.chance.below(3) {
            0 => (0..VOLUMES.len()).collect(),
            _ => vec![v],
        };
        for &v in &of {
            if self.world.volumes[v].snapshots.len() >= SNAPSHOTS {
                return self.delete(v);
            }
        }
        let name = self.fresh('s');
        let what = if of.len() > 1 { "group" } else { "snapshot" };
        let doing = Doing::Take(name.clone(), of.clone());
        self.step(what, doing, |m| m.take(&name, &of));
    }

    fn delete(&mut self, v: usize) {
        let Some(name) = pick(&mut self.chance, &self.world.volumes[v].snapshots) else {
            return;
        };
        let keep = self.chance.below(3) == 0 && self.world.volumes[v].bookmarks.len() < BOOKMARKS;
        let what = if keep { "bookmark" } else { "delete" };
        let doing = Doing::Delete(v, name.clone(), keep);
        self.step(what, doing, |m| m.delete(v, &name, keep));
    }

    fn delete_bookmark(&mut self, v: usize) {
        if let Some(name) = pick(&mut self.chance, &self.world.volumes[v].bookmarks) {
            let doing = Doing::DeleteBookmark(v, name.clone());
            self.step("bookmark deleted", doing, |m| m.delete_bookmark(v, &name));
        }
    }

    fn rename(&mut self, v: usize) {
        let of_clone = self.chance.below(2) == 0;
        let volume = &self.world.volumes[v];
        let from = match of_clone {
            true => pick(&mut self.chance, &volume.clones),
            false => pick(&mut self.chance, &volume.snapshots),
        };
        let Some(from) = from else { return };
        let to = self.fresh(if of_clone { 'c' } else { 's' });
        if of_clone {
            let doing = Doing::RenameClone(v, from.clone(), to.clone());
            self.step("rename", doing, |m| m.rename_clone(v, &from, &to));
        } else {
            let doing = Doing::Rename(v, from.clone(), to.clone());
            self.step("rename", doing, |m| m.rename(v, &from, &to));
        }
    }

    fn clone(&mut self, v: usize) {
        if self.world.volumes[v].clones.len() >= CLONES {
            return self.delete_clone(v);
        }
        let name = self.fresh('c');
        let volume = &self.world.volumes[v];
        if self.chance.below(3) == 0
            && let Some(of) = pick(&mut self.chance, &volume.clones)
        {
            let doing = Doing::CloneClone(v, of.clone(), name.clone());
            self.step("clone of a clone", doing, |m| m.clone_clone(v, &of, &name));
        } else if let Some(of) = pick(&mut self.chance, &volume.snapshots) {
            let doing = Doing::CloneSnapshot(v, of.clone(), name.clone());
            self.step("clone", doing, |m| m.clone_snapshot(v, &of, &name));
        }
    }

    fn delete_clone(&mut self, v: usize) {
        if let Some(name) = pick(&mut self.chance, &self.world.volumes[v].clones) {
            let doing = Doing::DeleteClone(v, name.clone());
            self.step("clone deleted", doing, |m| m.delete_clone(v, &name));
        }
    }

    fn revert(&mut self, v: usize) {
        let snapshots = &self.world.volumes[v].snapshots;
        if snapshots.len() >= SNAPSHOTS {
            return self.delete(v);
        }
        let Some(to) = pick(&mut self.chance, snapshots) else {
            return;
        };
        let mut undo = None;
        let before = self.world.point(v);
        let doing = Doing::Revert(v, to.clone());
        self.step("revert", doing, |m| undo = Some(m.revert(v, &to)));
        let undo = undo.expect("it was reverted");
        let point = Point {
            instant: self.world.instants,
            ..before
        };
        self.world.volumes[v].snapshots.insert(undo, point);
        let last = self.history.last_mut().expect("just made");
        last.after = Arc::new(self.world.clone());
    }

    fn resize(&mut self, v: usize) {
        let now = self.world.volumes[v].live.size;
        let step = 1 + self.chance.below(80 << 10);
        let step = match self.chance.below(2) {
            0 => step.next_multiple_of(4096),
            _ => step,
        };
        let to = match self.chance.below(2) {
            0 => now + step,
            _ => now.saturating_sub(step),
        };
        let first = VOLUMES[v].0;
        let to = to.clamp(first - (128 << 10), first + (128 << 10));
        // To the size it has already, nothing is done: not a sync either.
        if to != now {
            self.step("resize", Doing::Resize(v, to), |m| m.resize(v, to));
        }
    }

    fn restart(&mut self) {
        let all = [Restart::Clean, Restart::Kill, Restart::LoseMap];
        let how = all[self.chance.below(3) as usize];
        let what = match how {
            Restart::Clean => "clean restart",
            Restart::Kill => "kill",
            Restart::LoseMap => "map lost",
        };
        self.step(what, Doing::Restart(what), |m| m.restart(how));
    }

    /// Stops for good; what happens meanwhile belongs to the history.
    pub fn finish(self) -> (Vec<Moment>, BTreeMap<&'static str, u64>) {
        let began = self.recorder.position();
        self.machine.stop();
        let acknowledged = self.recorder.position();
        let mut world = self.world;
        let doing = Doing::Restart("stop");
        world.apply(&doing);
        let mut history = self.history;
        history.push(Moment {
            began,
            acknowledged,
            doing,
            after: Arc::new(world),
        });
        (history, self.counts)
    }
}
