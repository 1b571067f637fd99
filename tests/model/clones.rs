//! Clones: of snapshots and of clones; writing, zeroing, flushing, deleting them.

use std::collections::BTreeSet;
use std::sync::Arc;

use stillframe::error::{Kind, Result};
use stillframe::units::Name;
use stillframe::volume::{OpenClone, SnapshotState, Zeroing};

use crate::sim::{pages, sectors};
use crate::state::{ModelClone, Writable};
use crate::{Run, UnderWay, trace};

impl Run {
    pub fn open_clone(&self, v: usize, name: &str) -> Arc<OpenClone> {
        let name = Name::new(name).unwrap();
        self.engine
            .open_clone(&self.name(v), &name)
            .unwrap_or_else(|e| panic!("seed {}: clone {name}: {e:?}", self.seed))
    }

    /// As [`Run::open_clone`], where its medium may have errors.
    fn try_open_clone(&self, v: usize, name: &str) -> Result<Arc<OpenClone>> {
        self.engine
            .open_clone(&self.name(v), &Name::new(name).unwrap())
    }

    pub fn make_clone(&mut self, v: usize) -> Result<()> {
        if self.volumes[v].clones.len() >= self.shape.clones {
            return self.delete_clone(v);
        }
        let of_clone = self.chance.below(2) == 0;
        self.make_clone_of(v, of_clone)
    }

    /// A clone of any clone or of any snapshot.
    pub fn make_clone_of(&mut self, v: usize, clone: bool) -> Result<()> {
        let of_clone = clone && !self.volumes[v].clones.is_empty();
        let (volume, (name, _)) = (self.name(v), self.fresh('c'));
        let new = Name::new(&name).unwrap();
        if of_clone {
            let of = self
                .pick(|run| &run.volumes[v].clones)
                .expect("there is one");
            let parent = self.volumes[v].clones[&of].clone();
            trace(|| format!("clone v{v}/{of} -> {name}"));
            self.under_way = Some(UnderWay::Make(v, name.clone(), parent.image.clone()));
            match self
                .engine
                .clone_clone(&volume, &Name::new(&of).unwrap(), &new)
            {
                // Its base may have failed on a full disk since the last comparison.
                Err(e) if e.kind() == Kind::Failed && self.may_fail(v) => {}
                done => {
                    done?;
                    // What both share is durable, or a power cut could part them.
                    let model = &mut self.volumes[v];
                    let parent = model.clones.get_mut(&of).expect("known");
                    parent.image.unflushed.clear();
                    let child = parent.clone();
                    model.clones.insert(name, child);
                    self.count("clone of a clone");
                }
            }
        } else {
            let Some(of) = self.pick(|run| &run.volumes[v].snapshots) else {
                return Ok(());
            };
            let point = &self.volumes[v].snapshots[&of];
            let image = Writable {
                content: point.content.clone(),
                size: point.size,
                unflushed: BTreeSet::new(),
                ever: point.content.0.keys().copied().collect(),
            };
            trace(|| format!("clone v{v}@{of} -> {name}"));
            self.under_way = Some(UnderWay::Make(v, name.clone(), image.clone()));
            match self
                .engine
                .clone_snapshot(&volume, &Name::new(&of).unwrap(), &new)
            {
                Err(e) if e.kind() == Kind::Failed && self.may_fail(v) => {}
                done => {
                    let info = done?;
                    assert_eq!(info.size, image.size);
                    let failed = false;
                    let clone = ModelClone { image, failed };
                    self.volumes[v].clones.insert(name, clone);
                    self.count("clone");
                }
            }
        }
        self.under_way = None;
        Ok(())
    }

    pub fn delete_clone(&mut self, v: usize) -> Result<()> {
        let Some(name) = self.pick(|run| &run.volumes[v].clones) else {
            return Ok(());
        };
        let held = (!self.faulty && self.chance.below(4) == 0).then(|| self.open_clone(v, &name));
        // It may have failed with its snapshot since the last comparison.
        let held = held.filter(|held| held.info().state == SnapshotState::Active);
        self.under_way = Some(UnderWay::DeleteClone(v, name.clone()));
        trace(|| format!("delete clone v{v}/{name}"));
        self.engine
            .delete_clone(&self.name(v), &Name::new(&name).unwrap())?;
        self.under_way = None;
        let deleted = self.volumes[v].clones.remove(&name).expect("known");
        self.count("clone deleted");
        if let Some(held) = held {
            let maintained = self.engine.maintain().map(drop);
            self.tolerate(maintained)?;
            // A read may be the operation at which it dies: it syncs checksums before it relies on them.
            if !self.dying {
                let what = format!("seed {}: deleted but open {name}", self.seed);
                crate::check::compare_clone(&held, &deleted.image.content, &what);
            }
        }
        Ok(())
    }

    pub fn clone_write(&mut self, v: usize) -> Result<()> {
        let Some(name) = self.pick(|run| &run.volumes[v].clones) else {
            return Ok(());
        };
        let (offset, len) = self.range(self.volumes[v].clones[&name].image.size);
        let data = match self.chance.below(10) {
            0 => {
                let image = &self.volumes[v].clones[&name].image;
                image.content.read(offset, len as usize)
            }
            _ => self.fill(len),
        };
        let compare = self.chance.below(6) == 0;
        self.clone_write_these(v, &name, offset, &data, compare)
    }

    pub fn clone_write_these(
        &mut self,
        v: usize,
        name: &str,
        offset: u64,
        data: &[u8],
        compare: bool,
    ) -> Result<()> {
        let len = data.len() as u64;
        let clone = self.try_open_clone(v, name)?;
        let touched = sectors(offset, len).collect();
        self.under_way = Some(UnderWay::CloneWrite(v, name.to_owned(), touched));
        trace(|| format!("write v{v}/{name} {offset}+{len} compare {compare}"));
        let done = clone.write_at(offset, data, compare);
        let grain = self.shape.volumes[v].1;
        let image = &mut self.clone_mut(v, name).image;
        image.touch(offset, len);
        // Whole grains come into the clone's own layer, so a discard finds something there.
        let (first, end) = (
            offset / grain * grain,
            (offset + len).next_multiple_of(grain),
        );
        image.ever.extend(pages(first, end.min(image.size) - first));
        if !self.clone_refused(v, name, &done) {
            done?;
            let image = &mut self.clone_mut(v, name).image;
            image.content.write(offset, data);
            self.count("clone write");
        }
        self.under_way = None;
        Ok(())
    }

    pub fn clone_zero(&mut self, v: usize) -> Result<()> {
        let Some(name) = self.pick(|run| &run.volumes[v].clones) else {
            return Ok(());
        };
        let size = self.volumes[v].clones[&name].image.size;
        let (offset, len) = match self.chance.below(20) {
            0 => (0, size),
            _ => self.range(size),
        };
        let parts = self.volumes[v].clones[&name].image.parts(offset, len);
        // A grain of which a part is zeroed is written there, also where it was zero before.
        let grain = self
            .engine
            .volume(&self.volumes[v].name)?
            .info()
            .grain
            .bytes();
        let edge = |at: u64| {
            let start = at / grain * grain;
            (start.max(offset), (start + grain).min(offset + len))
        };
        let edges = [edge(offset), edge(offset + len - 1)];
        let touched: BTreeSet<u64> = parts
            .iter()
            .chain(&edges)
            .flat_map(|&(start, end)| sectors(start, end - start))
            .collect();
        let clone = self.try_open_clone(v, &name)?;
        self.under_way = Some(UnderWay::CloneWrite(v, name.clone(), touched));
        trace(|| format!("zero v{v}/{name} {offset}+{len}"));
        let done = clone.zero(offset, len, Zeroing::Discard);
        let image = &mut self.clone_mut(v, &name).image;
        for &(start, end) in parts.iter().chain(&edges) {
            image.touch(start, end - start);
        }
        if !self.clone_refused(v, &name, &done) {
            done?;
            let image = &mut self.clone_mut(v, &name).image;
            for (start, end) in parts {
                image.content.write(start, &vec![0; (end - start) as usize]);
            }
            self.count("clone zero");
        }
        self.under_way = None;
        Ok(())
    }

    pub fn clone_flush(&mut self, v: usize) -> Result<()> {
        let Some(name) = self.pick(|run| &run.volumes[v].clones) else {
            return Ok(());
        };
        trace(|| format!("flush v{v}/{name}"));
        let done = self.try_open_clone(v, &name)?.flush();
        if !self.clone_refused(v, &name, &done) {
            done?;
            self.clone_mut(v, &name).image.unflushed.clear();
            self.count("clone flush");
        }
        Ok(())
    }

    fn clone_mut(&mut self, v: usize, name: &str) -> &mut ModelClone {
        self.volumes[v].clones.get_mut(name).expect("known")
    }

    /// Whether a clone answers `Failed` with cause: the snapshot it stands on has failed.
    fn clone_refused(&mut self, v: usize, name: &str, done: &Result<()>) -> bool {
        let refused = matches!(done, Err(e) if e.kind() == Kind::Failed)
            && self.may_fail(v)
            && !self.faulty
            && !self.world.is_dead();
        if refused {
            let info = self.open_clone(v, name).info();
            assert_ne!(info.state, SnapshotState::Active, "it says why");
            trace(|| format!("v{v}/{name} refuses: {done:?}, {:?}", info.state));
            self.clone_mut(v, name).failed = true;
        }
        refused
    }

    /// As [`Run::adopt_live`], for a clone.
    pub fn adopt_clone(&mut self, v: usize, name: &str, sectors: &BTreeSet<u64>) {
        let clone = self.open_clone(v, name);
        if clone.info().state != SnapshotState::Active {
            assert!(self.may_fail(v), "{name} failed without cause");
            trace(|| format!("v{v}/{name} has failed: {:?}", clone.info().state));
            self.clone_mut(v, name).failed = true;
            return;
        }
        let seed = self.seed;
        let image = &mut self.clone_mut(v, name).image;
        crate::crash::adopt(image, sectors, &|at, buf| clone.read_at(at, buf), seed);
    }
}
