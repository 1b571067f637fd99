//! Snapshots and bookmarks: taking, deleting, holding, renaming.

use stillframe::error::{Kind, Result};
use stillframe::units::Name;
use stillframe::volume::SnapshotState;

use crate::sim::compare_snapshot;
use crate::state::Volume;
use crate::{Run, UnderWay, trace};

const BOOKMARKS: usize = 3;

impl Run {
    pub fn snapshot(&mut self) -> Result<()> {
        let mut chosen: Vec<usize> = (0..self.volumes.len()).collect();
        match self.chance.below(3) {
            0 => chosen.reverse(),
            _ => chosen = vec![self.any_volume()],
        }
        for &v in &chosen {
            if self.volumes[v].snapshots.len() >= self.shape.snapshots {
                return self.delete(v);
            }
        }
        self.snapshot_of(&chosen)
    }

    /// One snapshot of several volumes at one instant.
    pub fn snapshot_of(&mut self, chosen: &[usize]) -> Result<()> {
        let (name, instant) = self.fresh('s');
        let targets: Vec<(Name, Name)> = chosen
            .iter()
            .map(|&v| (self.name(v), Name::new(&name).unwrap()))
            .collect();
        self.under_way = Some(UnderWay::Take(name.clone(), targets.len()));
        trace(|| format!("take {targets:?}"));
        let infos = self.engine.take_snapshots(&targets)?;
        self.under_way = None;
        for &v in chosen {
            let model = &mut self.volumes[v];
            let info = infos
                .iter()
                .find(|i| i.volume == model.name)
                .expect("one each");
            assert_eq!(info.size, model.live.size);
            let point = model.point(instant, info.mtime_ns);
            check_mtime(model, info.mtime_ns);
            model.snapshots.insert(name.clone(), point);
            model.live.unflushed.clear();
            model.changed = false;
            model.touched = false;
        }
        self.count("snapshot");
        Ok(())
    }

    pub fn delete(&mut self, v: usize) -> Result<()> {
        let Some(name) = self.pick(|run| &run.volumes[v].snapshots) else {
            return Ok(());
        };
        if self.chance.below(12) == 0 {
            self.hold(v, &name)?;
        }
        let open = !self.faulty && self.chance.below(4) == 0;
        let keep = self.chance.below(3) == 0
            && self.volumes[v].bookmarks.len() < BOOKMARKS
            && self.state_of(v, &name).is_ok();
        self.delete_this(v, &name, keep, open)
    }

    /// Deletes a snapshot, perhaps for a bookmark, perhaps while somebody has it open.
    pub fn delete_this(&mut self, v: usize, name: &str, keep: bool, open: bool) -> Result<()> {
        let (volume, snapshot) = (self.name(v), Name::new(name).unwrap());
        let info = self.engine.snapshot(&volume, &snapshot)?;
        if info.held {
            // Its release was refused on a full disk.
            self.engine.hold_snapshot(&volume, &snapshot, false)?;
        }
        let uuid = info.uuid;
        let held = open.then(|| {
            self.engine
                .open_snapshot(&volume, &snapshot)
                .expect("it is there")
        });
        self.under_way = Some(UnderWay::Delete(v, name.to_owned()));
        trace(|| format!("delete v{v}@{name}, bookmark {keep}"));
        match keep {
            true => self
                .engine
                .delete_snapshot_keep_bookmark(&volume, &snapshot)?,
            false => self.engine.delete_snapshot(&volume, &snapshot)?,
        }
        self.under_way = None;
        let deleted = self.volumes[v].snapshots.remove(name).expect("known");
        if keep {
            self.volumes[v]
                .bookmarks
                .insert(name.to_owned(), deleted.clone());
            self.count("bookmark");
        }
        self.count("delete");
        let clones = self.engine.clones(&volume)?;
        if clones.iter().any(|clone| clone.base == Some(uuid)) {
            self.count("parent of a clone deleted");
        }
        if let Some(held) = held {
            // An open reader goes on reading its instant, whatever is written meanwhile.
            let written = self.write(v);
            self.tolerate(written)?;
            let maintained = self.engine.maintain().map(drop);
            self.tolerate(maintained)?;
            // It may have failed on a full disk since the last comparison.
            let failed = self.may_fail(v)
                && held
                    .read_at(0, &mut [0])
                    .is_err_and(|e| e.kind() == Kind::Failed);
            if !deleted.failed && !failed && !self.world.is_dead() {
                let what = format!("seed {}: deleted but open {name}", self.seed);
                compare_snapshot(&held, &deleted.content, &what);
            }
        }
        Ok(())
    }

    /// Whether snapshots of a volume may have failed.
    pub fn may_fail(&self, v: usize) -> bool {
        v == 1 && self.ever_full
    }

    /// What failed for want of space: from then on nothing is preserved for it.
    pub fn learn_failures(&mut self) {
        for v in 0..self.volumes.len() {
            if !self.may_fail(v) {
                continue;
            }
            let listed = self.engine.snapshots(&self.volumes[v].name);
            let model = &mut self.volumes[v];
            for info in listed.expect("it is there") {
                // One that is not known yet was being taken when the daemon died.
                if let Some(known) = model.snapshots.get_mut(info.name.as_str()) {
                    known.failed |= info.state != SnapshotState::Active;
                }
            }
            model.note_region();
        }
    }

    /// A snapshot on hold stays, also over a restart, until it is released.
    fn hold(&mut self, v: usize, name: &str) -> Result<()> {
        let (volume, name) = (self.name(v), Name::new(name).unwrap());
        self.engine.hold_snapshot(&volume, &name, true)?;
        if !self.dying && self.chance.below(8) == 0 {
            self.remount(false);
        }
        let refused = self.engine.delete_snapshot(&volume, &name);
        assert_eq!(refused.unwrap_err().kind(), Kind::Busy);
        self.engine.hold_snapshot(&volume, &name, false)?;
        self.count("hold");
        Ok(())
    }

    pub fn rename(&mut self, v: usize) -> Result<()> {
        let Some(name) = self.volumes[v].snapshots.keys().next().cloned() else {
            return Ok(());
        };
        let (new, _) = self.fresh('s');
        let (from, to) = (Name::new(&name).unwrap(), Name::new(&new).unwrap());
        self.under_way = Some(UnderWay::Rename(v, name.clone(), new.clone()));
        self.engine.rename_snapshot(&self.name(v), &from, &to)?;
        self.under_way = None;
        let snapshot = self.volumes[v].snapshots.remove(&name).expect("known");
        self.volumes[v].snapshots.insert(new, snapshot);
        self.count("rename");
        Ok(())
    }

    pub fn delete_bookmark(&mut self, v: usize) -> Result<()> {
        let Some(name) = self.pick(|run| &run.volumes[v].bookmarks) else {
            return Ok(());
        };
        self.under_way = Some(UnderWay::DeleteBookmark(v, name.clone()));
        trace(|| format!("delete bookmark v{v}@{name}"));
        let bookmark = Name::new(&name).unwrap();
        self.engine.delete_bookmark(&self.name(v), &bookmark)?;
        self.under_way = None;
        self.volumes[v].bookmarks.remove(&name);
        self.count("bookmark deleted");
        Ok(())
    }
}

/// The rule of DESIGN section 2 for rsync: the same time if nothing changed, at least a second more
/// if anything did.
pub fn check_mtime(model: &mut Volume, mtime_ns: i64) {
    if let Some(last) = model.last_mtime {
        match (model.changed, model.touched) {
            (true, _) => assert!(
                mtime_ns.div_euclid(1_000_000_000) > last.div_euclid(1_000_000_000),
                "{} changed, and its time went from {last} to {mtime_ns}; snapshots {:?}",
                model.name,
                model
                    .snapshots
                    .iter()
                    .map(|(name, p)| (name, p.mtime_ns))
                    .collect::<Vec<_>>()
            ),
            (false, false) => assert_eq!(mtime_ns, last, "{} did not change", model.name),
            (false, true) => assert!(mtime_ns >= last),
        }
    }
    model.last_mtime = Some(mtime_ns);
}
