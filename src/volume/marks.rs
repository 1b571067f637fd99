//! Marks of failure: how it is made durable that snapshots, bookmarks and clones have failed.
//!
//! A mark is a record of the log (INVALIDATE), or stands in the superblock where the log takes none; from
//! there it moves into the log when the store is opened. It is durable before anything that the failed
//! ones need is overwritten, and nothing good is marked with them, with one exception: when the
//! superblock has no room left, one of the volume's marks there may be widened over what lies between,
//! which then fails at once and not only at the next start.
//!
//! A mark names epochs, which may be larger than any that the log knows: epochs of snapshots that could
//! not be taken are known in memory only. So a volume whose marks stand in the superblock begins
//! behind them; otherwise a later snapshot could have an epoch that was marked before.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Error, Kind, Result};
use crate::log::record::Record;
use crate::log::superblock::{InvalidMark, MARKS_MAX, Reason, SuperblockFile};
use crate::sys::planted::{Bug, planted};
use crate::volume::catalog::{Catalog, invalidate_record};
use crate::volume::clone_records::LAYER_BIT;
use crate::volume::facts::SnapshotState;
use crate::volume::shared::{Shared, Vol, lock};

/// Why snapshots failed, where a mark in the superblock says it.
pub const FULL: &str = "the thin target was full";
const LOST: &str = "a part of the log was lost";
/// Records of one batch.
const BATCH_RECORDS: usize = 512;

/// What has failed, and why.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Number of a volume; with `LAYER_BIT`, of a clone.
    pub volume: u32,
    /// First epoch; says nothing of a clone.
    pub first: u64,
    /// Last epoch.
    pub last: u64,
    pub why: String,
}

impl Failure {
    /// A clone has failed.
    pub fn of_clone(id: u32, why: &str) -> Failure {
        Failure {
            volume: LAYER_BIT | id,
            first: 0,
            last: u64::MAX,
            why: why.to_owned(),
        }
    }

    fn record(&self) -> Record {
        invalidate_record(self.volume, self.first, self.last, &self.why)
    }

    fn mark(&self) -> InvalidMark {
        InvalidMark {
            volume: self.volume,
            first: self.first,
            last: self.last,
            reason: match &*self.why {
                FULL => Reason::Full,
                _ => Reason::Lost,
            },
        }
    }
}

impl Shared {
    /// Marks the snapshots and bookmarks with epochs in `first..=last` failed; durable when it returns,
    /// before the caller overwrites anything they need. The caller holds `structure`.
    ///
    /// # Errors
    /// If neither the log nor the superblock takes the mark: then nothing has changed.
    pub fn fail_snapshots(&self, vol: &Vol, first: u64, last: u64, why: &str) -> Result<()> {
        self.fail_all(&[Failure {
            volume: vol.id,
            first,
            last,
            why: why.to_owned(),
        }])
    }

    /// Marks snapshots, bookmarks and clones failed, in as few batches as can be; durable when it
    /// returns. The caller holds `structure` or opens the store.
    ///
    /// # Errors
    /// If neither the log nor the superblock takes all of them: then those of the last batches have not
    /// failed.
    pub fn fail_all(&self, failures: &[Failure]) -> Result<()> {
        for failures in failures.chunks(BATCH_RECORDS) {
            let records = match planted(Bug::FailureUnmarked) {
                true => Vec::new(),
                false => failures.iter().map(Failure::record).collect(),
            };
            let marked = match self.append_records(records) {
                Ok(_) => failures.to_vec(),
                Err(e) => {
                    tracing::error!("the log does not take marks of failure: {}", e.chain());
                    self.mark_in_superblock(failures)?
                }
            };
            for failure in &marked {
                self.tell_failure(failure);
            }
        }
        Ok(())
    }

    /// Whoever has open what failed is refused from here on.
    fn tell_failure(&self, failure: &Failure) {
        if failure.volume & LAYER_BIT != 0 {
            self.drop_failed_clone(failure.volume & !LAYER_BIT, &failure.why);
        } else if let Some(vol) = self.vol(failure.volume) {
            self.drop_failed_points(&vol, failure.first..=failure.last, &failure.why);
        }
    }

    /// Notes failures in the superblock, with one update of it, and in the catalogue. Returns what has
    /// failed by that: more than was asked for where a mark had to be widened.
    fn mark_in_superblock(&self, failures: &[Failure]) -> Result<Vec<Failure>> {
        // Nobody adds to it meanwhile: who takes or makes something holds `structure`, too.
        let good = Good::of(&lock(&self.catalog));
        let mut superblock = lock(&self.superblock);
        let mut next = superblock.current().clone();
        let mut marked = Vec::new();
        for failure in failures {
            let mark = put_mark(&mut next.invalid, failure.mark(), &good)?;
            marked.push(Failure {
                first: mark.first,
                last: mark.last,
                ..failure.clone()
            });
        }
        superblock.update(next.clone())?;
        // Into the other slot, too: rot in one of them must not forget it. It counts already.
        if let Err(e) = superblock.update(next) {
            tracing::warn!("marks of failure stand in one slot only: {}", e.chain());
        }
        drop(superblock);
        let mut catalog = lock(&self.catalog);
        for failure in &marked {
            catalog.apply(&failure.record())?;
        }
        Ok(marked)
    }

    /// Moves marks of failure from the superblock into the log, where they count like any record.
    ///
    /// # Errors
    /// As an append; the marks stay where they are.
    pub fn adopt_marks(&self) -> Result<()> {
        let marks = lock(&self.superblock).current().invalid.clone();
        if marks.is_empty() {
            return Ok(());
        }
        let record = |m: &InvalidMark| invalidate_record(m.volume, m.first, m.last, text(m));
        // One that covers nothing says nothing.
        let says = |m: &&InvalidMark| m.first <= m.last;
        self.append_records(marks.iter().filter(says).map(record).collect())?;
        let mut superblock = lock(&self.superblock);
        let mut next = superblock.current().clone();
        next.invalid.retain(|mark| !marks.contains(mark));
        superblock.update(next)
    }
}

/// Notes failures in the superblock of a store that is about to be opened; durable when it returns.
///
/// # Errors
/// `NoSpace` if they are too many, or the system's: the store must not be opened without them.
pub fn mark_before_open(
    superblock: &mut SuperblockFile,
    catalog: &Catalog,
    failures: &[Failure],
) -> Result<()> {
    let good = Good::of(catalog);
    let mut next = superblock.current().clone();
    for failure in failures {
        put_mark(&mut next.invalid, failure.mark(), &good)?;
    }
    superblock.update(next.clone())?;
    superblock.update(next)
}

/// Puts a mark among others. Where there is little room left they become as few as can be without
/// covering anything good, and if that does not suffice, one of the same volume is widened: the one over
/// which the fewest good ones fail. Returns the mark that covers it.
fn put_mark(marks: &mut Vec<InvalidMark>, mark: InvalidMark, good: &Good) -> Result<InvalidMark> {
    if marks.len() + 1 < MARKS_MAX {
        marks.push(mark);
        return Ok(mark);
    }
    let few = good.compacted(marks.iter().copied().chain([mark]).collect());
    if few.len() < MARKS_MAX {
        *marks = few;
        let covers = |m: &&InvalidMark| {
            m.volume == mark.volume && m.first <= mark.first && m.last >= mark.last
        };
        // None covers what is gone.
        return Ok(marks.iter().find(covers).copied().unwrap_or(mark));
    }
    let of_volume = marks.iter_mut().filter(|m| m.volume == mark.volume);
    let cost = |m: &&mut InvalidMark| {
        let range = m.first.min(mark.first)..=m.last.max(mark.last);
        let known = good.0.get(&mark.volume);
        known.map_or(0, |good| good.range(range).count())
    };
    let Some(known) = of_volume.min_by_key(cost) else {
        let why = "the superblock has no room for another mark of failure; free some space";
        return Err(Error::new(Kind::NoSpace, why));
    };
    known.first = known.first.min(mark.first);
    known.last = known.last.max(mark.last);
    if known.reason != mark.reason {
        known.reason = Reason::Lost;
    }
    Ok(*known)
}

/// What has not failed: by volume the epochs of its snapshots and bookmarks, and with no epochs the clones.
struct Good(BTreeMap<u32, BTreeSet<u64>>);

impl Good {
    fn of(catalog: &Catalog) -> Good {
        let volumes = catalog.volumes.iter().map(|(&id, volume)| {
            let points = volume.snapshots.iter().chain(&volume.kept);
            let points = points.filter(|(_, s)| s.state == SnapshotState::Active);
            let marks = volume.bookmarks.iter();
            let marks = marks.filter(|(_, b)| b.state == SnapshotState::Active);
            let epochs = points.map(|(&epoch, _)| epoch);
            (id, epochs.chain(marks.map(|(&epoch, _)| epoch)).collect())
        });
        let clones = catalog.clones.keys();
        let clones = clones.map(|id| (LAYER_BIT | id, BTreeSet::new()));
        Good(volumes.chain(clones).collect())
    }

    /// The same marks in as few as can be: those of what is gone are left out, and two of a volume become
    /// one where nothing good lies between them.
    fn compacted(&self, mut marks: Vec<InvalidMark>) -> Vec<InvalidMark> {
        marks.sort_by_key(|m| (m.volume, m.first));
        let mut few: Vec<InvalidMark> = Vec::new();
        for mark in marks {
            let Some(good) = self.0.get(&mark.volume) else {
                continue;
            };
            match few.last_mut() {
                Some(last)
                    if last.volume == mark.volume
                        && last.reason == mark.reason
                        && (last.last >= mark.first
                            || good.range(last.last..mark.first).next().is_none()) =>
                {
                    last.last = last.last.max(mark.last);
                }
                _ => few.push(mark),
            }
        }
        few
    }
}

fn text(mark: &InvalidMark) -> &'static str {
    match mark.reason {
        Reason::Full => FULL,
        Reason::Lost => LOST,
    }
}

/// What recovery does about marks of failure: they count before anything is served.
pub fn apply_marks(shared: &Shared) {
    let marks = lock(&shared.superblock).current().invalid.clone();
    for mark in marks {
        if mark.first > mark.last {
            continue;
        }
        let mut catalog = lock(&shared.catalog);
        if mark.volume & LAYER_BIT != 0 {
            catalog.fail_clone(mark.volume & !LAYER_BIT, text(&mark));
        } else if let Some(entry) = catalog.volumes.get_mut(&mark.volume) {
            for snap in entry.points_mut(mark.first..=mark.last) {
                if snap.state == SnapshotState::Active {
                    snap.state = SnapshotState::Failed(text(&mark).into());
                }
            }
            for (_, bookmark) in entry.bookmarks.range_mut(mark.first..=mark.last) {
                if bookmark.state == SnapshotState::Active {
                    bookmark.state = SnapshotState::Failed(text(&mark).into());
                }
            }
            // As long as the mark stands there, it means what was there when it was made.
            entry.epoch = entry.epoch.max(mark.last);
        }
        drop(catalog);
        if let Some(vol) = shared.vol(mark.volume) {
            let mut state = vol.state();
            state.epoch = state.epoch.max(mark.last);
            drop(state);
            shared.drop_failed_points(&vol, mark.first..=mark.last, text(&mark));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(volume: u32, first: u64, last: u64) -> InvalidMark {
        InvalidMark {
            volume,
            first,
            last,
            reason: Reason::Full,
        }
    }

    #[test]
    fn marks_become_one_only_where_nothing_good_lies_between() {
        let good = Good(BTreeMap::from([
            (1, BTreeSet::from([4, 20])),
            (2, BTreeSet::new()),
            (LAYER_BIT | 7, BTreeSet::new()),
        ]));
        let lost = InvalidMark {
            reason: Reason::Lost,
            ..mark(2, 9, 9)
        };
        let marks = vec![
            mark(1, 8, 9),
            mark(1, 1, 3),
            mark(1, 5, 6),
            mark(1, 5, 12),
            mark(1, 21, 22),
            // Removed since.
            mark(3, 1, 9),
            mark(2, 1, 2),
            mark(2, 4, 8),
            lost,
            mark(LAYER_BIT | 7, 0, u64::MAX),
            mark(LAYER_BIT | 7, 0, u64::MAX),
            mark(LAYER_BIT | 8, 0, u64::MAX),
        ];
        let few = [
            mark(1, 1, 3),
            mark(1, 5, 12),
            mark(1, 21, 22),
            mark(2, 1, 8),
            lost,
            mark(LAYER_BIT | 7, 0, u64::MAX),
        ];
        assert_eq!(good.compacted(marks), few);
        assert_eq!(good.compacted(few.to_vec()), few);
    }

    #[test]
    fn a_full_table_takes_a_mark_of_a_volume_that_it_has_and_of_no_other() {
        let mut marks = Vec::new();
        let volumes = 1..MARKS_MAX as u32;
        let known = 1..=MARKS_MAX as u32;
        let good = Good(known.map(|n| (n, BTreeSet::from([4]))).collect());
        for n in volumes {
            let put = put_mark(&mut marks, mark(n, 5, 6), &good).unwrap();
            assert_eq!(put, mark(n, 5, 6));
        }
        assert_eq!(marks.len(), MARKS_MAX - 1);
        let put = put_mark(&mut marks, mark(9, 1, 2), &good).unwrap();
        assert_eq!(put, mark(9, 1, 6));
        assert!(marks.contains(&put));
        let refused = put_mark(&mut marks, mark(MARKS_MAX as u32, 1, 2), &good);
        assert_eq!(refused.unwrap_err().kind(), Kind::NoSpace);
        assert_eq!(marks.len(), MARKS_MAX - 1);
    }

    #[test]
    fn a_full_table_widens_the_mark_over_which_nothing_good_fails() {
        let volumes = 2..MARKS_MAX as u32 - 1;
        let mut good: BTreeMap<_, _> = volumes.clone().map(|n| (n, BTreeSet::new())).collect();
        good.insert(1, BTreeSet::from([20, 22, 30]));
        let good = Good(good);
        let mut marks = vec![mark(1, 1, 3), mark(1, 40, 45)];
        marks.extend(volumes.map(|n| mark(n, 1, 1)));
        assert_eq!(marks.len(), MARKS_MAX - 1);
        let put = put_mark(&mut marks, mark(1, 44, 50), &good).unwrap();
        assert_eq!(put, mark(1, 40, 50));
        // Nothing can be joined now: what costs the least is.
        let put = put_mark(&mut marks, mark(1, 25, 26), &good).unwrap();
        assert_eq!(put, mark(1, 25, 50));
    }
}
