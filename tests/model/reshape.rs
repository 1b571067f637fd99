//! Revert and resize.

use std::collections::{BTreeMap, BTreeSet};

use stillframe::error::{Kind, Result};
use stillframe::units::Name;
use stillframe::volume::SnapshotState;

use crate::points::check_mtime;
use crate::sim::pages;
use crate::state::Point;
use crate::{Run, UnderWay, trace};

impl Run {
    /// Whether a snapshot can be read.
    pub fn state_of(&self, v: usize, name: &str) -> std::result::Result<(), String> {
        let name = Name::new(name).unwrap();
        match self.engine.snapshot(&self.name(v), &name).unwrap().state {
            SnapshotState::Active => Ok(()),
            SnapshotState::Failed(why) => Err(why),
        }
    }

    pub fn revert(&mut self, v: usize) -> Result<()> {
        if self.volumes[v].snapshots.len() >= self.shape.snapshots {
            return self.delete(v);
        }
        let Some(name) = self.pick(|run| &run.volumes[v].snapshots) else {
            return Ok(());
        };
        if self.state_of(v, &name).is_err() {
            return Ok(());
        }
        self.revert_to(v, &name)
    }

    pub fn revert_to(&mut self, v: usize, name: &str) -> Result<()> {
        self.note_revert(v, name);
        self.under_way = Some(UnderWay::Revert(v, name.to_owned()));
        trace(|| format!("revert v{v} to {name}"));
        let to = Name::new(name).unwrap();
        let done = self
            .engine
            .revert_volume(&self.name(v), &to, &mut |_, _| ());
        let undo = done?.undo.name.to_string();
        self.under_way = None;
        self.undo_is_there(v, &undo, true);
        self.becomes(v, name);
        self.count("revert");
        Ok(())
    }

    /// A revert may write what was written since, and nothing else.
    fn note_revert(&mut self, v: usize, name: &str) {
        let of_grain = self.volume(v).info().grain.bytes() / crate::sim::PAGE;
        let model = &mut self.volumes[v];
        let target = model.snapshots[name].clone();
        let since = model.intervals.range(target.instant..);
        let mut touched: Vec<u64> = since.flat_map(|(_, i)| i.pages.iter().copied()).collect();
        let (a, b) = (
            target.size.min(model.live.size),
            target.size.max(model.live.size),
        );
        touched.extend(pages(a, b - a));
        // It writes whole grains, zeros among them: a discard finds data there from then on.
        let grains: BTreeSet<u64> = (touched.iter().chain(target.content.0.keys()))
            .map(|page| page / of_grain.max(1))
            .collect();
        let whole = |grain: u64| grain * of_grain.max(1)..(grain + 1) * of_grain.max(1);
        model.live.ever.extend(grains.into_iter().flat_map(whole));
        model.note_pages(touched);
        model.touched = true;
    }

    /// The snapshot that undoes a revert was taken: it holds what was live.
    pub fn undo_is_there(&mut self, v: usize, undo: &str, answered: bool) {
        let (_, instant) = self.fresh('u');
        let info = self
            .engine
            .snapshot(&self.name(v), &Name::new(undo).unwrap())
            .unwrap();
        let model = &mut self.volumes[v];
        // What the revert may write belongs behind the instant of its undo snapshot, too.
        let written = model.intervals.values().next_back().expect("one").clone();
        let point: Point = model.point(instant, info.mtime_ns);
        model.note_pages(written.pages);
        assert_eq!(info.size, point.size);
        if answered {
            check_mtime(model, info.mtime_ns);
        } else {
            model.last_mtime = model.last_mtime.max(Some(info.mtime_ns));
        }
        model.snapshots.insert(undo.to_owned(), point);
        model.live.unflushed.clear();
        model.changed = false;
        model.touched = true;
    }

    /// The live volume is now what a snapshot is.
    pub fn becomes(&mut self, v: usize, name: &str) {
        let model = &mut self.volumes[v];
        let target = model.snapshots[name].clone();
        model.changed |= model.live.content != target.content || model.live.size != target.size;
        model.live.content = target.content;
        model.live.size = target.size;
        model.live.unflushed.clear();
    }

    /// After a revert that was refused: its undo snapshot may be there, and nothing else has changed.
    pub fn adopt_undo(&mut self, v: usize) {
        let listed = self.engine.snapshots(&self.name(v)).unwrap();
        let extra: Vec<String> = listed
            .iter()
            .map(|s| s.name.to_string())
            .filter(|name| !self.volumes[v].snapshots.contains_key(name))
            .collect();
        assert!(extra.len() <= 1, "seed {}: {extra:?}", self.seed);
        for undo in extra {
            self.undo_is_there(v, &undo, true);
        }
    }

    pub fn resize(&mut self, v: usize) -> Result<()> {
        let sizes = self.volumes[v].sizes.clone();
        let now = self.volumes[v].live.size;
        let step = 1 + self.chance.below(self.shape.step);
        let step = if self.chance.below(2) == 0 {
            step.next_multiple_of(4096)
        } else {
            step
        };
        let to = match self.chance.below(2) {
            0 => now + step,
            _ => now.saturating_sub(step),
        };
        self.resize_to(v, to.clamp(sizes.start, sizes.end))
    }

    pub fn resize_to(&mut self, v: usize, to: u64) -> Result<()> {
        let now = self.volumes[v].live.size;
        let (a, b) = (to.min(now), to.max(now));
        let model = &mut self.volumes[v];
        model.note_pages(pages(a, b - a));
        model.touched = true;
        let cuts = to < now && !to.is_multiple_of(512);
        let in_doubt = cuts && model.live.unflushed.insert(to / 512);
        self.under_way = Some(UnderWay::Resize(v, to));
        trace(|| format!("resize v{v} {now} -> {to}"));
        let info = self.engine.resize_volume(&self.name(v), to)?;
        assert_eq!(info.size, to);
        self.under_way = None;
        if in_doubt {
            // The sector of the new end was written, and is durable like the rest of it.
            self.volumes[v].live.unflushed.remove(&(to / 512));
        }
        self.resized(v, to);
        self.count("resize");
        Ok(())
    }

    pub fn resized(&mut self, v: usize, to: u64) {
        let model = &mut self.volumes[v];
        model.changed |= to != model.live.size;
        model.live.resize(to);
        let last = to.div_ceil(512);
        model.live.unflushed.retain(|&sector| sector < last);
    }

    /// Diffs between random points of a volume: all that differs, and no grain that nobody wrote.
    pub fn check_diff(&mut self, v: usize) {
        let bookmark = self.chance.below(2) == 0;
        let from = match bookmark {
            true => self.pick(|run| &run.volumes[v].bookmarks),
            false => self.pick(|run| &run.volumes[v].snapshots),
        };
        let Some(from) = from else { return };
        let model = &self.volumes[v];
        let instant = match bookmark {
            true => model.bookmarks[&from].instant,
            false => model.snapshots[&from].instant,
        };
        let later: Vec<String> = model
            .snapshots
            .iter()
            .filter(|(_, s)| s.instant > instant)
            .map(|(name, _)| name.clone())
            .collect();
        let to = match self.chance.below(later.len() as u64 + 1) {
            0 => None,
            n => Some(later[n as usize - 1].clone()),
        };
        self.check_diff_between(v, &from, bookmark, to);
    }

    /// The diffs from every point of every volume to every later snapshot and to now.
    pub fn check_all_diffs(&mut self) {
        for v in 0..self.volumes.len() {
            let model = &self.volumes[v];
            let points = |of: &BTreeMap<String, Point>, bookmark| {
                let points = of.iter();
                let points = points.map(|(name, p)| (name.clone(), p.instant, bookmark));
                points.collect::<Vec<_>>()
            };
            let snapshots = points(&model.snapshots, false);
            let bookmarks = points(&model.bookmarks, true);
            for (from, instant, bookmark) in snapshots.iter().chain(&bookmarks) {
                for (to, later, _) in &snapshots {
                    if later > instant {
                        self.check_diff_between(v, from, *bookmark, Some(to.clone()));
                    }
                }
                self.check_diff_between(v, from, *bookmark, None);
            }
        }
    }

    fn check_diff_between(&mut self, v: usize, from: &str, bookmark: bool, to: Option<String>) {
        let model = &self.volumes[v];
        let a = match bookmark {
            true => model.bookmarks[from].clone(),
            false => model.snapshots[from].clone(),
        };
        let (content, size, instant) = match &to {
            Some(to) => {
                let b = &model.snapshots[to];
                (&b.content, b.size, Some(b.instant))
            }
            None => (&model.live.content, model.live.size, None),
        };
        let what = format!("seed {}: diff v{v}@{from}..{to:?}", self.seed);
        let to = to.map(|to| Name::new(&to).unwrap());
        let diff = match self
            .engine
            .diff(&model.name, &Name::new(from).unwrap(), to.as_ref())
        {
            Err(e) if e.kind() == Kind::Failed && self.may_fail(v) => return,
            diff => diff.unwrap_or_else(|e| panic!("{what}: {e:?}")),
        };
        assert_eq!(diff.size, size, "{what}");
        let mut cut = content.clone();
        cut.truncate(size);
        let mut old = a.content.clone();
        old.truncate(size);
        let page = crate::sim::PAGE;
        for differs in cut.differing(&old) {
            let (start, end) = (differs * page, (differs * page + page).min(size));
            assert!(
                diff.changed
                    .iter()
                    .any(|r| r.start <= start && end <= r.end),
                "{what}: page {differs} differs and is not in it"
            );
        }
        let Some(written) = model.written(a.instant, instant) else {
            self.count("diff of a coarse interval");
            return;
        };
        let grain = diff.grain.bytes();
        let ends = pages(a.size.min(size), a.size.max(size) - a.size.min(size));
        for run in &diff.changed {
            for start in (run.start..run.end).step_by(grain as usize) {
                let of_grain = pages(start, grain);
                let cause = written.range(of_grain.clone()).next().is_some()
                    || of_grain.start < ends.end && ends.start < of_grain.end
                    || a.size != size && of_grain.contains(&((size.max(1) - 1) / page));
                assert!(
                    cause,
                    "{what}: nobody wrote the grain at {start}; changed {:?}, written {written:?}",
                    diff.changed
                );
            }
        }
        self.count("diff");
        if bookmark {
            self.count("diff from a bookmark");
        }
    }
}
