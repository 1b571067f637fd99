//! The comparison of every view with the model.

use std::collections::BTreeSet;

use stillframe::error::{Kind, Result};
use stillframe::units::Name;
use stillframe::volume::{OpenClone, SnapshotState};

use crate::sim::{Content, compare_snapshot, compare_view};
use crate::{Run, trace};

impl Run {
    pub fn compare_views(&mut self) {
        for v in 0..self.volumes.len() {
            self.compare_live(v);
            self.compare_snapshots(v);
            self.compare_clones(v);
            self.compare_bookmarks(v);
        }
    }

    pub fn compare(&mut self) {
        self.compare_views();
        for v in 0..self.volumes.len() {
            for _ in 0..3 {
                self.check_diff(v);
            }
        }
        self.count("compare");
    }

    fn compare_live(&mut self, v: usize) {
        let volume = self.volume(v);
        let live = &self.volumes[v].live;
        let what = format!("seed {}: live v{v}", self.seed);
        assert_eq!(volume.size(), live.size, "{what}");
        compare_view(
            live.size,
            &live.content,
            &what,
            &|at| volume.next_data(at),
            &|at| volume.next_hole(at),
            &|at, buf| volume.read_at(at, buf),
        );
    }

    fn compare_snapshots(&mut self, v: usize) {
        let may_fail = self.may_fail(v);
        let volume = self.name(v);
        let listed = self.engine.snapshots(&volume).expect("it is there");
        let model = &mut self.volumes[v];
        assert_eq!(listed.len(), model.snapshots.len());
        for (name, known) in &mut model.snapshots {
            let what = format!("seed {}: v{v}@{name}", self.seed);
            let opened = self
                .engine
                .open_snapshot(&volume, &Name::new(name).unwrap())
                .expect("it is there");
            assert_eq!(opened.info().mtime_ns, known.mtime_ns);
            assert_eq!(opened.size(), known.size);
            if opened.info().state == SnapshotState::Active {
                assert!(!known.failed, "{what} had failed and is there again");
                compare_snapshot(&opened, &known.content, &what);
                continue;
            }
            // Under `fail-snapshot`: refused for ever, every byte of it.
            assert!(may_fail, "{what} failed without cause");
            known.failed = true;
            for at in [0, opened.size() / 2, opened.size() - 1] {
                let read = opened.read_at(at, &mut [0]);
                assert_eq!(read.unwrap_err().kind(), Kind::Failed, "{what}");
            }
        }
    }

    fn compare_clones(&mut self, v: usize) {
        let may_fail = self.may_fail(v);
        let listed = self.engine.clones(&self.name(v)).expect("it is there");
        let names: BTreeSet<&str> = listed.iter().map(|c| c.name.as_str()).collect();
        let known: BTreeSet<&str> = self.volumes[v].clones.keys().map(String::as_str).collect();
        assert_eq!(names, known, "seed {}", self.seed);
        for info in &listed {
            let what = format!("seed {}: v{v}/{}", self.seed, info.name);
            let clone = self.open_clone(v, info.name.as_str());
            let known = self.volumes[v].clones.get_mut(info.name.as_str());
            let known = known.expect("just compared");
            assert_eq!(clone.size(), known.image.size, "{what}");
            if info.state == SnapshotState::Active {
                assert!(!known.failed, "{what} had failed and is there again");
                compare_clone(&clone, &known.image.content, &what);
                continue;
            }
            assert!(may_fail, "{what} failed without cause");
            trace(|| format!("{what} has failed: {:?}", info.state));
            known.failed = true;
            let read = clone.read_at(0, &mut [0]);
            if let Err(e) = read {
                assert_eq!(e.kind(), Kind::Failed, "{what}");
            }
        }
    }

    fn compare_bookmarks(&mut self, v: usize) {
        let listed = self.engine.bookmarks(&self.name(v)).expect("it is there");
        let names: BTreeSet<&str> = listed.iter().map(|b| b.name.as_str()).collect();
        let model = &self.volumes[v];
        let known: BTreeSet<&str> = model.bookmarks.keys().map(String::as_str).collect();
        assert_eq!(names, known, "seed {}", self.seed);
        for info in &listed {
            let known = &model.bookmarks[info.name.as_str()];
            assert_eq!((info.size, info.mtime_ns), (known.size, known.mtime_ns));
        }
    }
}

pub fn compare_clone(clone: &OpenClone, content: &Content, what: &str) {
    compare_view(
        clone.size(),
        content,
        what,
        &|at| clone.next_data(at),
        &|at| clone.next_hole(at),
        &|at, buf| clone.read_at(at, buf),
    );
}

/// Whether an image of a size is exactly this content.
pub fn view_is(
    content: &Content,
    size: u64,
    found: u64,
    read: &dyn Fn(u64, &mut [u8]) -> Result<()>,
) -> bool {
    if size != found {
        return false;
    }
    let step = 1 << 20;
    (0..size).step_by(step as usize).all(|at| {
        let mut buf = vec![0; step.min(size - at) as usize];
        read(at, &mut buf).expect("it can be read");
        buf == content.read(at, buf.len())
    })
}
