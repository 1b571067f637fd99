//! What changed between two points of a volume, to the grain.
//!
//! Promises: every byte that differs between the two points lies in [`Diff::changed`]; a grain that
//! nobody wrote between them does not, except at a changed end of the volume. For two snapshots the
//! answer is the same for as long as both exist: the first overwrite of a grain after the older one
//! is recorded in an epoch between them, and that record lives as long as the older snapshot.
//!
//! Does not: read content. Whether a changed grain is zero is for the layer above.

use std::ops::Range;

use crate::error::{Error, Kind, Result};
use crate::units::{Epoch, Grain, Name, SECTOR, Uuid};
use crate::volume::engine::Engine;
use crate::volume::facts::{BookmarkInfo, SnapshotInfo, SnapshotState};

/// Most runs of a diff; a diff in more pieces is refused instead of filling the memory.
pub const DIFF_RUNS_MAX: usize = 1 << 22;

/// The older end of a diff: a snapshot or a bookmark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiffPoint {
    /// Its volume's name.
    pub volume: Name,
    /// Name.
    pub name: Name,
    /// Unique for ever.
    pub uuid: Uuid,
    /// The epoch it opened.
    pub epoch: Epoch,
    /// Inode number; never given again.
    pub ino: u64,
    /// The instant, ns since 1970.
    pub taken_ns: i64,
    /// Last change before it, ns since 1970.
    pub mtime_ns: i64,
    /// Bytes of the volume then.
    pub size: u64,
    /// Whether it can serve a diff.
    pub state: SnapshotState,
    /// A bookmark: there is nothing to read.
    pub bookmark: bool,
}

impl From<&SnapshotInfo> for DiffPoint {
    fn from(info: &SnapshotInfo) -> DiffPoint {
        DiffPoint {
            volume: info.volume.clone(),
            name: info.name.clone(),
            uuid: info.uuid,
            epoch: info.epoch,
            ino: info.ino,
            taken_ns: info.taken_ns,
            mtime_ns: info.mtime_ns,
            size: info.size,
            state: info.state.clone(),
            bookmark: false,
        }
    }
}

impl From<&BookmarkInfo> for DiffPoint {
    fn from(info: &BookmarkInfo) -> DiffPoint {
        DiffPoint {
            volume: info.volume.clone(),
            name: info.name.clone(),
            uuid: info.uuid,
            epoch: info.epoch,
            ino: info.ino,
            taken_ns: info.taken_ns,
            mtime_ns: info.mtime_ns,
            size: info.size,
            state: info.state.clone(),
            bookmark: true,
        }
    }
}

/// What changed between two points of a volume.
#[derive(Debug, Clone)]
pub struct Diff {
    /// The older point.
    pub from: DiffPoint,
    /// The newer point; `None` is the volume as it is now.
    pub to: Option<SnapshotInfo>,
    /// Bytes of the newer point.
    pub size: u64,
    /// Unit of tracking.
    pub grain: Grain,
    /// Bytes that may differ, ascending, neither empty nor touching one another, cut at `size`.
    /// Each begins at a whole grain and ends at one or at `size`.
    pub changed: Vec<Range<u64>>,
}

impl Engine {
    /// The older end of a diff by name.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn diff_point(&self, volume: &Name, name: &Name) -> Result<DiffPoint> {
        // The snapshot first: it may become a bookmark in between, never the other way round.
        match self.snapshot(volume, name) {
            Ok(info) => Ok((&info).into()),
            Err(e) if e.kind() == Kind::NotFound => match self.bookmark(volume, name) {
                Ok(info) => Ok((&info).into()),
                Err(_) => Err(e),
            },
            Err(e) => Err(e),
        }
    }

    /// What changed from a snapshot or bookmark to a newer snapshot, or to now.
    ///
    /// # Errors
    /// `NotFound` (also if `to` is a bookmark: it has no content); `Invalid` if `from` is not older than `to`; `Failed` if either could not be kept;
    /// `Limit` for more than [`DIFF_RUNS_MAX`] runs.
    pub fn diff(&self, volume: &Name, from: &Name, to: Option<&Name>) -> Result<Diff> {
        let from = self.diff_point(volume, from)?;
        let to = to.map(|name| self.snapshot(volume, name)).transpose()?;
        if let Some(to) = &to
            && from.epoch >= to.epoch
        {
            return Err(Error::new(
                Kind::Invalid,
                format!("'{volume}@{}' is not older than '{}'", from.name, to.name),
            ));
        }
        let handle = self.volume(volume)?;
        let info = handle.info();
        let size = to.as_ref().map_or(handle.size(), |to| to.size);
        let grain = info.grain;
        let until = to.as_ref().map(|to| to.epoch);
        let mut set = self.changed_grains(info.id, from.epoch, until);
        if let Some(ends) = changed_end(grain, from.size, size) {
            set.insert_range(ends);
        }
        let mut changed = Vec::new();
        for grains in set.ranges_in(0..size.div_ceil(grain.bytes())) {
            if changed.len() == DIFF_RUNS_MAX {
                return Err(Error::new(
                    Kind::Limit,
                    format!("the diff has more than {DIFF_RUNS_MAX} pieces"),
                ));
            }
            push(&mut changed, clipped(grain, grains, size));
        }
        // Looked at last: had one failed before its grains were counted, this shows it. And a
        // snapshot that is gone by now may have taken its records along.
        still_good(&self.diff_point(volume, &from.name)?, &from)?;
        if let Some(to) = &to {
            still_good(&(&self.snapshot(volume, &to.name)?).into(), &to.into())?;
        }
        Ok(Diff {
            from,
            to,
            size,
            grain,
            changed,
        })
    }
}

fn still_good(now: &DiffPoint, then: &DiffPoint) -> Result<()> {
    if now.uuid != then.uuid {
        let why = "the snapshot was just renamed or deleted";
        return Err(Error::new(Kind::NotFound, why));
    }
    match &now.state {
        SnapshotState::Active => Ok(()),
        SnapshotState::Failed(why) => Err(Error::new(
            Kind::Failed,
            format!(
                "{} {}@{} has failed: {why}",
                if now.bookmark { "bookmark" } else { "snapshot" },
                now.volume,
                now.name
            ),
        )),
    }
}

/// The grains at the end that count as changed because the sizes differ.
fn changed_end(grain: Grain, from: u64, to: u64) -> Option<Range<u64>> {
    if to > from {
        return Some(grain.cover(from..to));
    }
    // The older one goes on where the newer one ends in the middle of a sector: who reads whole
    // sectors must not find the older one's bytes there.
    (from > to && !to.is_multiple_of(SECTOR)).then(|| grain.cover(to - 1..to))
}

fn clipped(grain: Grain, grains: Range<u64>, size: u64) -> Range<u64> {
    let end = grains.end.saturating_mul(grain.bytes()).min(size);
    grains.start * grain.bytes()..end
}

/// Adds a run that begins at or after the end of the last one.
fn push(runs: &mut Vec<Range<u64>>, run: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        _ if run.is_empty() => {}
        _ => runs.push(run),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_end_is_part_of_the_diff() {
        let grain = Grain::DEFAULT;
        assert_eq!(changed_end(grain, 8192, 8192), None);
        assert_eq!(changed_end(grain, 5000, 5000), None);
        assert_eq!(changed_end(grain, 5000, 20_000), Some(1..5));
        assert_eq!(changed_end(grain, 8192, 8193), Some(2..3));
        assert_eq!(changed_end(grain, 0, 1), Some(0..1));
        assert_eq!(changed_end(grain, 20_000, 8192), None, "ends at a sector");
        assert_eq!(changed_end(grain, 20_000, 5000), Some(1..2));
        assert_eq!(changed_end(grain, 20_000, 0), None);
    }

    #[test]
    fn runs_are_cut_at_the_end_and_joined() {
        let grain = Grain::DEFAULT;
        assert_eq!(clipped(grain, 1..2, 5000), 4096..5000);
        assert_eq!(clipped(grain, 0..u64::MAX, 5000), 0..5000);
        let mut runs = Vec::new();
        for run in [0..10, 10..20, 30..30, 30..40] {
            push(&mut runs, run);
        }
        assert_eq!(runs, [0..20, 30..40]);
    }
}
