//! Locks on ranges of grains: first overwriters of the same grain go one after another.
//!
//! A holder may wait for the log; it never takes a second range of the same volume. Order with other
//! locks: the volume's gate before, everything else after.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// The locked ranges of one volume.
#[derive(Debug, Default)]
pub struct RangeLock {
    /// Start to end of each locked range; they do not overlap.
    held: Mutex<BTreeMap<u64, u64>>,
    released: Condvar,
}

/// A locked range; unlocked when dropped.
#[derive(Debug)]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    start: u64,
}

impl RangeLock {
    fn held(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no other holder has a part of the range, which must not be empty.
    pub fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        assert!(!range.is_empty(), "an empty range locks nothing");
        let mut held = self.held();
        while overlaps(&held, &range) {
            held = self
                .released
                .wait(held)
                .unwrap_or_else(PoisonError::into_inner);
        }
        held.insert(range.start, range.end);
        RangeGuard {
            lock: self,
            start: range.start,
        }
    }
}

fn overlaps(held: &BTreeMap<u64, u64>, range: &Range<u64>) -> bool {
    // Held ranges do not overlap, so the last one that starts before our end is the only candidate.
    held.range(..range.end)
        .next_back()
        .is_some_and(|(_, &end)| end > range.start)
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.held().remove(&self.start);
        self.lock.released.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn overlap_is_found_on_either_side() {
        let lock = RangeLock::default();
        let _a = lock.lock(10..20);
        let _b = lock.lock(20..30);
        let held = lock.held();
        for (range, expect) in [
            (0..10, false),
            (0..11, true),
            (15..16, true),
            (29..40, true),
            (30..40, false),
        ] {
            assert_eq!(overlaps(&held, &range), expect, "{range:?}");
        }
    }

    #[test]
    fn holders_of_one_grain_never_meet() {
        let lock = Arc::new(RangeLock::default());
        let inside: Arc<Vec<AtomicU64>> = Arc::new((0..16).map(|_| AtomicU64::new(0)).collect());
        std::thread::scope(|scope| {
            for seed in 0..4u64 {
                let (lock, inside) = (Arc::clone(&lock), Arc::clone(&inside));
                scope.spawn(move || {
                    let mut x = seed + 1;
                    for _ in 0..2000 {
                        x = x
                            .wrapping_mul(6364136223846793005)
                            .wrapping_add(1442695040888963407);
                        let start = (x >> 33) % 12;
                        let range = start..start + 1 + (x >> 60) % 4;
                        let _guard = lock.lock(range.clone());
                        for grain in range.clone() {
                            assert_eq!(inside[grain as usize].fetch_add(1, Ordering::SeqCst), 0);
                        }
                        for grain in range {
                            inside[grain as usize].fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
    }
}
