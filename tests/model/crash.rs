//! Ends of a daemon, clean and unclean, and what they may leave: adopts what an unanswered operation or a
//! power cut may have left, and nothing else.

use std::collections::BTreeSet;

use stillframe::error::Result;
use stillframe::units::Name;
use stillframe::volume::audit::{self, Severity};
use stillframe::volume::{Engine, Share, VolumeState, Zeroing};

use crate::check::view_is;
use crate::sim::environment;
use crate::state::{ModelClone, Writable};
use crate::{Run, UnderWay, trace};

impl Run {
    pub fn try_reopen(&mut self) -> Result<()> {
        let env = environment(&self.world, &self.index);
        self.engine = Engine::open(env, self.shape.settings.clone())?;
        Ok(())
    }

    /// `check` has nothing to say against what a life left, however it ended.
    pub fn sound(&self) {
        let env = environment(&self.world, &self.index);
        let found = audit::offline(&env, Share(5), self.seed);
        let found = found.unwrap_or_else(|e| panic!("seed {}: {e:?}", self.seed));
        // What failed for want of space has failed. A power cut may tear the slot of the superblock
        // or the leaf of checksums that is being written; that cannot be told from rot.
        let torn = |f: &audit::Finding| {
            let why = f.reason.as_deref().unwrap_or_default();
            f.check == "superblock" && why.contains("does not match its checksum")
                || f.check == "clone" && why.starts_with("checksums of a layer are lost")
        };
        let wrong =
            |f: &&audit::Finding| f.severity != Severity::Note && f.check != "state" && !torn(f);
        let wrong: Vec<_> = found.findings.iter().filter(wrong).collect();
        assert!(wrong.is_empty(), "seed {}: {wrong:#?}", self.seed);
        assert!(found.batches > 0, "seed {}: {found:?}", self.seed);
    }

    /// Opens what the last life left.
    pub fn reopen(&mut self) {
        self.try_reopen()
            .unwrap_or_else(|e| panic!("seed {}: the store does not open: {e:?}", self.seed));
        let unfinished = (0..self.volumes.len())
            .any(|v| matches!(self.volume(v).info().state, VolumeState::Unfinished(_)));
        let spent = self.full > 0 && self.world.disk("store/ballast").is_none();
        if unfinished && spent {
            // A revert or resize whose end finds no space, reserve and ballast being spent, is finished
            // by the next start that finds some.
            self.free();
            self.world.kill();
            self.index.kill(self.chance.next());
            self.count("unfinished until there was space");
            self.try_reopen().expect("with space it opens");
        }
        for v in 0..self.volumes.len() {
            let state = self.volume(v).info().state;
            assert!(
                matches!(state, VolumeState::Active | VolumeState::Unverified),
                "seed {}: v{v} is {state:?}",
                self.seed
            );
        }
    }

    pub fn remount(&mut self, lose_map: bool) {
        self.free();
        self.engine.close().expect("a clean stop");
        for model in &mut self.volumes {
            model.stopped();
            model.prune();
        }
        self.world.kill();
        self.index.kill(self.chance.next());
        if lose_map {
            self.index.lose();
            self.count("map loss");
        }
        trace(|| format!("remount, map lost {lose_map}"));
        self.sound();
        self.reopen();
        self.count("remount");
    }

    /// The process dies, now or inside one of the next operations.
    pub fn kill(&mut self, power: bool) {
        self.under_way = None;
        let mut interrupted = false;
        if self.chance.below(3) > 0 {
            self.dying = true;
            self.world.die_at(1 + self.chance.below(24));
            for _ in 0..40 {
                interrupted = self.step_dying().is_err();
                if interrupted || self.world.is_dead() {
                    break;
                }
            }
        }
        self.dying = false;
        trace(|| format!("crash, power {power}, interrupted {interrupted}"));
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
        if self.chance.below(8) == 0 {
            self.index.lose();
            self.count("map loss");
        }
        self.sound();
        self.reopen();
        let under_way = self.under_way.take().filter(|_| interrupted);
        self.settle(under_way, power);
        self.count(if power { "power cut" } else { "kill" });
    }

    fn step_dying(&mut self) -> Result<()> {
        let v = self.any_volume();
        match self.chance.below(20) {
            0..=6 => self.write(v),
            7 => self.zero(v, Zeroing::Discard),
            8 | 9 => self.snapshot(),
            10 => self.delete(v),
            11 => self.make_clone(v),
            12 | 13 => self.clone_write(v),
            14 => match self.chance.below(3) {
                0 => self.delete_clone(v),
                1 => self.delete_bookmark(v),
                _ => self.clone_zero(v),
            },
            15 | 16 => self.revert(v),
            17 => self.resize(v),
            18 => self.engine.maintain().map(drop),
            _ => self.flush(v),
        }
    }

    pub fn settle(&mut self, under_way: Option<UnderWay>, power: bool) {
        self.learn_failures();
        for model in &mut self.volumes {
            model.crashed();
        }
        self.settle_snapshots(&under_way);
        self.settle_bookmarks(&under_way);
        for v in 0..self.volumes.len() {
            self.settle_live(v, &under_way, power);
            self.settle_clones(v, &under_way, power);
        }
    }

    /// The snapshots that are there are those that were, but for the one whose making or deleting was
    /// not answered; of a group all or none.
    fn settle_snapshots(&mut self, under_way: &Option<UnderWay>) {
        let mut there = 0;
        for v in 0..self.volumes.len() {
            let listed = self.engine.snapshots(&self.name(v)).expect("it is there");
            let names: BTreeSet<String> = listed.iter().map(|s| s.name.to_string()).collect();
            if let Some(UnderWay::Rename(of, from, to)) = under_way
                && *of == v
                && names.contains(to)
            {
                let model = &mut self.volumes[v].snapshots;
                let renamed = model.remove(from).expect("it was renamed");
                model.insert(to.clone(), renamed);
            }
            let known: BTreeSet<String> = self.volumes[v].snapshots.keys().cloned().collect();
            for extra in names.difference(&known) {
                match under_way {
                    Some(UnderWay::Take(name, _)) if name == extra => {
                        there += 1;
                        let instant = self.next_name;
                        let new = Name::new(extra).unwrap();
                        let info = self.engine.snapshot(&self.name(v), &new).unwrap();
                        let model = &mut self.volumes[v];
                        assert_eq!(info.size, model.live.size);
                        let point = model.point(instant, info.mtime_ns);
                        model.last_mtime = model.last_mtime.max(Some(info.mtime_ns));
                        model.snapshots.insert(extra.clone(), point);
                        model.live.unflushed.clear();
                    }
                    Some(UnderWay::Revert(of, _)) if *of == v => {
                        self.undo_is_there(v, extra, false)
                    }
                    _ => panic!("seed {}: snapshot {extra} came back", self.seed),
                }
            }
            for gone in known.difference(&names) {
                let may_be = matches!(under_way, Some(UnderWay::Delete(of, name))
                    if *of == v && name == gone);
                assert!(may_be, "seed {}: lost {gone}", self.seed);
                let point = self.volumes[v].snapshots.remove(gone).expect("known");
                let bookmarks = self.engine.bookmarks(&self.name(v)).unwrap();
                if bookmarks.iter().any(|b| b.name.as_str() == gone) {
                    self.volumes[v].bookmarks.insert(gone.clone(), point);
                }
            }
        }
        if let Some(UnderWay::Take(_, of)) = under_way
            && *of > 1
        {
            assert!(
                there == 0 || there == *of,
                "seed {}: half a group",
                self.seed
            );
            self.count(if there == 0 {
                "group undone"
            } else {
                "group kept"
            });
        }
    }

    fn settle_bookmarks(&mut self, under_way: &Option<UnderWay>) {
        for v in 0..self.volumes.len() {
            let listed = self.engine.bookmarks(&self.name(v)).expect("it is there");
            let names: BTreeSet<String> = listed.iter().map(|b| b.name.to_string()).collect();
            let known: BTreeSet<String> = self.volumes[v].bookmarks.keys().cloned().collect();
            let extra: Vec<_> = names.difference(&known).collect();
            assert!(extra.is_empty(), "seed {}: bookmarks {extra:?}", self.seed);
            for gone in known.difference(&names) {
                let may_be = matches!(under_way, Some(UnderWay::DeleteBookmark(of, name))
                    if *of == v && name == gone);
                assert!(may_be, "seed {}: lost bookmark {gone}", self.seed);
                self.volumes[v].bookmarks.remove(gone);
            }
        }
    }

    fn settle_live(&mut self, v: usize, under_way: &Option<UnderWay>, power: bool) {
        let size = self.volume(v).size();
        match under_way {
            Some(UnderWay::Write(of, sectors)) if *of == v => self.adopt_live(v, sectors),
            Some(UnderWay::Resize(of, to)) if *of == v => {
                if size == *to {
                    self.resized(v, *to);
                    self.count("resize finished");
                } else {
                    self.count("resize undone");
                }
            }
            Some(UnderWay::Revert(of, name)) if *of == v => {
                // Finished or undone, never half.
                let (volume, target) = (self.volume(v), &self.volumes[v].snapshots[name]);
                let read = |at, buf: &mut [u8]| volume.read_at(at, buf);
                let undo_taken = self.volumes[v].live.unflushed.is_empty();
                if undo_taken && view_is(&target.content, target.size, size, &read) {
                    self.becomes(v, name);
                    self.count("revert finished");
                } else {
                    self.count("revert undone");
                }
            }
            _ => {}
        }
        assert_eq!(size, self.volumes[v].live.size, "seed {}: v{v}", self.seed);
        let unflushed = std::mem::take(&mut self.volumes[v].live.unflushed);
        if power {
            self.adopt_live(v, &unflushed);
        }
    }

    fn settle_clones(&mut self, v: usize, under_way: &Option<UnderWay>, power: bool) {
        let listed = self.engine.clones(&self.name(v)).expect("it is there");
        let names: BTreeSet<String> = listed.iter().map(|c| c.name.to_string()).collect();
        let known: BTreeSet<String> = self.volumes[v].clones.keys().cloned().collect();
        for extra in names.difference(&known) {
            match under_way {
                Some(UnderWay::Make(of, name, image)) if *of == v && name == extra => {
                    let clone = ModelClone {
                        image: Writable {
                            unflushed: BTreeSet::new(),
                            ..image.clone()
                        },
                        failed: false,
                    };
                    self.volumes[v].clones.insert(extra.clone(), clone);
                    self.count("unanswered clone");
                    // Made of a clone: made durable first.
                    continue;
                }
                _ => panic!("seed {}: clone {extra} came back", self.seed),
            }
        }
        for gone in known.difference(&names) {
            let may_be = matches!(under_way, Some(UnderWay::DeleteClone(of, name))
                if *of == v && name == gone);
            assert!(may_be, "seed {}: lost clone {gone}", self.seed);
            self.volumes[v].clones.remove(gone);
        }
        for name in known.intersection(&names) {
            if let Some(UnderWay::CloneWrite(of, written, sectors)) = under_way
                && *of == v
                && written == name
            {
                self.adopt_clone(v, name, sectors);
            }
            let clone = self.volumes[v].clones.get_mut(name).expect("known");
            let unflushed = std::mem::take(&mut clone.image.unflushed);
            if power {
                self.adopt_clone(v, name, &unflushed);
            }
        }
    }
}

/// Sectors that may hold anything are taken over as they are.
pub fn adopt(
    image: &mut Writable,
    sectors: &BTreeSet<u64>,
    read: &dyn Fn(u64, &mut [u8]) -> Result<()>,
    seed: u64,
) {
    for sector in sectors {
        let offset = sector * 512;
        if offset >= image.size {
            continue;
        }
        let mut bytes = vec![0; 512.min(image.size - offset) as usize];
        read(offset, &mut bytes).unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
        image.content.write(offset, &bytes);
    }
}
