//! Writing a whole image over an existing one: what opening with O_TRUNC means here.
//!
//! An image has a fixed size, so truncating cannot drop its content; it opens a *rewrite* instead.
//! cp and dd skip holes, which in a fresh file read as zeros and over an old image would leave old
//! bytes. A [`Rewrite`] remembers what was written and makes the gaps zero when it settles.
//!
//! Invariants:
//! - W1: after [`Rewrite::settle`], every byte below the limit is what was written through the
//!   rewrite, else zero. The limit is the end of the last written range, or the image's size once
//!   [`Rewrite::extend_to_size`] was called.
//! - W2: no byte at or behind the limit is ever touched.
//! - W3: a gap is never zeroed while a write of the same rewrite is in flight (the gate), so a
//!   write that was acknowledged is never zeroed.
//! - W4: at most [`RANGES_MAX`] ranges are remembered. Past that the smallest gaps are zeroed at
//!   once and forgotten: they lie below the limit, so settling would zero them too, and a later
//!   write into one simply overwrites zeros.
//!
//! Locks: the gate (shared by writes, exclusive for zeroing), then the state. The gate is given up
//! between pieces of [`PIECE`] bytes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use crate::error::Result;
use crate::image::Image;

/// Most ranges a rewrite remembers. cp, dd and qemu-img need a few; 64 Ki bound a hostile writer to
/// about 3 MiB of memory.
pub const RANGES_MAX: usize = 1 << 16;

/// Most bytes zeroed while other writers of the handle wait.
pub const PIECE: u64 = 16 << 20;

/// What a rewrite is applied to.
pub trait Target: Image {
    /// Writes; `compare` leaves alone what is equal already. The range lies within the size.
    ///
    /// # Errors
    /// Those of the volume.
    fn write_at(&self, offset: u64, data: &[u8], compare: bool) -> Result<()>;

    /// Makes a range zero and gives its space back. The range lies within the size.
    ///
    /// # Errors
    /// Those of the volume.
    fn discard(&self, offset: u64, len: u64) -> Result<()>;
}

/// Disjoint byte ranges; ranges that touch are one.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct RangeSet {
    /// Start to end.
    ranges: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// Adds a range.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        // Every range that touches the new one ends up in it: those that start at or before its
        // end, going down until one ends before its start.
        while let Some((&s, &e)) = self.ranges.range(..=end).next_back() {
            if e < start {
                break;
            }
            self.ranges.remove(&s);
            start = start.min(s);
            end = end.max(e);
        }
        self.ranges.insert(start, end);
    }

    /// Number of ranges.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// End of the last range, 0 without one.
    pub fn end(&self) -> u64 {
        self.ranges.last_key_value().map_or(0, |(_, &end)| end)
    }

    /// The first bytes below `limit` that no range holds.
    pub fn first_gap(&self, limit: u64) -> Option<Range<u64>> {
        self.gaps(limit).next()
    }

    /// The runs below `limit` that no range holds, ascending.
    pub fn gaps(&self, limit: u64) -> impl Iterator<Item = Range<u64>> {
        let starts = self.ranges.keys().copied().chain([u64::MAX]);
        let ends = [0].into_iter().chain(self.ranges.values().copied());
        ends.zip(starts)
            .map(move |(end, start)| end..start.min(limit))
            .filter(|gap| !gap.is_empty())
    }
}

#[derive(Default)]
struct State {
    written: RangeSet,
    to_size: bool,
}

/// One handle's rewrite of an image.
pub struct Rewrite {
    ranges_max: usize,
    gate: RwLock<()>,
    state: Mutex<State>,
}

impl Default for Rewrite {
    fn default() -> Self {
        Rewrite::with_limit(RANGES_MAX)
    }
}

impl Rewrite {
    /// A rewrite that remembers at most `ranges_max` (at least 2) ranges.
    pub fn with_limit(ranges_max: usize) -> Rewrite {
        Rewrite {
            ranges_max: ranges_max.max(2),
            gate: RwLock::new(()),
            state: Mutex::new(State::default()),
        }
    }

    /// Writes and remembers the range, which must lie within the image. What is equal already is
    /// neither written nor preserved.
    ///
    /// # Errors
    /// Those of the target; part of the data may have been written.
    pub fn write(&self, target: &impl Target, offset: u64, data: &[u8]) -> Result<()> {
        let range = offset..offset + data.len() as u64;
        self.change(target, range, || target.write_at(offset, data, true))
    }

    /// Runs another change of `range` (a punch, say) as part of the rewrite and remembers it. A change
    /// that fails is not remembered: what it did counts as never written.
    ///
    /// # Errors
    /// Those of the change or of the target.
    pub fn change(
        &self,
        target: &impl Target,
        range: Range<u64>,
        apply: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let count = {
            let _in_flight = self.gate.read().unwrap_or_else(PoisonError::into_inner);
            apply()?;
            let mut state = self.state();
            state.written.insert(range);
            state.written.len()
        };
        if count > self.ranges_max {
            self.merge(target)
        } else {
            Ok(())
        }
    }

    /// The writer has set the image's size: from now on the limit is the image's end.
    pub fn extend_to_size(&self) {
        self.state().to_size = true;
    }

    /// Zeroes every gap below the limit; returns whether there was one. Not durable by itself.
    ///
    /// # Errors
    /// Those of the target; a part of the gaps may have been zeroed.
    pub fn settle(&self, target: &impl Target) -> Result<bool> {
        let mut any = false;
        loop {
            let _alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
            let gap = {
                let state = self.state();
                let limit = if state.to_size {
                    target.size()
                } else {
                    state.written.end()
                };
                state.written.first_gap(limit)
            };
            let Some(gap) = gap else {
                return Ok(any);
            };
            any = true;
            let done = zero_piece(target, gap.clone())?;
            self.state().written.insert(gap.start..done);
        }
    }

    /// Brings the number of ranges down by zeroing the smallest gaps.
    fn merge(&self, target: &impl Target) -> Result<()> {
        let _alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let mut gaps: Vec<Range<u64>> = {
            let state = self.state();
            // Another writer may have merged meanwhile.
            if state.written.len() <= self.ranges_max {
                return Ok(());
            }
            state.written.gaps(state.written.end()).collect()
        };
        gaps.sort_by_key(|gap| gap.end - gap.start);
        // Half of them, so that the next merge is far away.
        gaps.truncate(gaps.len().div_ceil(2));
        for gap in gaps {
            let mut at = gap.start;
            while at < gap.end {
                at = zero_piece(target, at..gap.end)?;
            }
            self.state().written.insert(gap);
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Zeroes the beginning of a gap; returns where the rest of it begins. Holes cost nothing.
fn zero_piece(target: &impl Target, gap: Range<u64>) -> Result<u64> {
    let data = target
        .next_data(gap.start)?
        .unwrap_or(gap.end)
        .max(gap.start);
    if data >= gap.end {
        return Ok(gap.end);
    }
    let end = target
        .next_hole(data)?
        .clamp(data + 1, gap.end.min(data.saturating_add(PIECE)));
    target.discard(data, end - data)?;
    Ok(end)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use proptest::prelude::{Just, Strategy, any, prop_oneof, proptest};

    use super::*;

    const SIZE: usize = 256;

    /// A volume of bytes; `0` is a hole where `holes` says so.
    struct Model {
        bytes: Mutex<Vec<u8>>,
        discarded: AtomicU64,
    }

    impl Model {
        fn new() -> Model {
            let bytes = (0..SIZE)
                .map(|i| if i % 7 < 2 { 0 } else { 0xee })
                .collect();
            Model {
                bytes: Mutex::new(bytes),
                discarded: AtomicU64::new(0),
            }
        }
        fn bytes(&self) -> Vec<u8> {
            self.bytes.lock().unwrap().clone()
        }
    }

    impl Image for Model {
        fn size(&self) -> u64 {
            SIZE as u64
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
            let bytes = self.bytes.lock().unwrap();
            buf.copy_from_slice(&bytes[offset as usize..][..buf.len()]);
            Ok(())
        }
        fn next_data(&self, offset: u64) -> Result<Option<u64>> {
            let bytes = self.bytes.lock().unwrap();
            Ok((offset..SIZE as u64).find(|&o| bytes[o as usize] != 0))
        }
        fn next_hole(&self, offset: u64) -> Result<u64> {
            let bytes = self.bytes.lock().unwrap();
            let hole = (offset..SIZE as u64).find(|&o| bytes[o as usize] == 0);
            Ok(hole.unwrap_or(offset.max(SIZE as u64)))
        }
    }

    impl Target for Model {
        fn write_at(&self, offset: u64, data: &[u8], compare: bool) -> Result<()> {
            assert!(compare, "a rewrite compares");
            self.bytes.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
            Ok(())
        }
        fn discard(&self, offset: u64, len: u64) -> Result<()> {
            self.bytes.lock().unwrap()[offset as usize..][..len as usize].fill(0);
            self.discarded.fetch_add(len, Ordering::Relaxed);
            Ok(())
        }
    }

    #[derive(Debug, Clone)]
    enum Op {
        Write(u64, Vec<u8>),
        Punch(u64, u64),
        Settle,
        ToSize,
    }

    fn op() -> impl Strategy<Value = Op> {
        let range = (0..SIZE as u64).prop_flat_map(|s| (Just(s), 1..=SIZE as u64 - s));
        prop_oneof![
            8 => (0..SIZE as u64, 1..12usize, any::<u8>()).prop_map(|(s, len, byte)| {
                Op::Write(s, vec![byte; len.min(SIZE - s as usize)])
            }),
            1 => range.prop_map(|(s, len)| Op::Punch(s, len.min(20))),
            1 => Just(Op::Settle),
            1 => proptest::bool::weighted(0.1)
                .prop_map(|all| if all { Op::ToSize } else { Op::Settle }),
        ]
    }

    /// What the image must hold: written bytes, zero elsewhere below the limit, old bytes behind.
    struct Expected {
        old: Vec<u8>,
        new: Vec<Option<u8>>,
        to_size: bool,
    }

    impl Expected {
        fn limit(&self) -> usize {
            if self.to_size {
                return SIZE;
            }
            self.new
                .iter()
                .rposition(Option::is_some)
                .map_or(0, |i| i + 1)
        }
        fn settled(&self) -> Vec<u8> {
            let limit = self.limit();
            (0..SIZE)
                .map(|i| {
                    if i < limit {
                        self.new[i].unwrap_or(0)
                    } else {
                        self.old[i]
                    }
                })
                .collect()
        }
    }

    fn run(ops: Vec<Op>, ranges_max: usize) {
        let model = Model::new();
        let rewrite = Rewrite::with_limit(ranges_max);
        let mut expected = Expected {
            old: model.bytes(),
            new: vec![None; SIZE],
            to_size: false,
        };
        for op in ops.into_iter().chain([Op::Settle]) {
            match op {
                Op::Write(offset, data) => {
                    for (i, &byte) in data.iter().enumerate() {
                        expected.new[offset as usize + i] = Some(byte);
                    }
                    rewrite.write(&model, offset, &data).unwrap();
                }
                Op::Punch(offset, len) => {
                    expected.new[offset as usize..][..len as usize].fill(Some(0));
                    rewrite
                        .change(&model, offset..offset + len, || model.discard(offset, len))
                        .unwrap();
                }
                Op::ToSize => {
                    expected.to_size = true;
                    rewrite.extend_to_size();
                }
                Op::Settle => {
                    rewrite.settle(&model).unwrap();
                    assert_eq!(model.bytes(), expected.settled(), "W1");
                }
            }
            let limit = expected.limit();
            let bytes = model.bytes();
            assert_eq!(bytes[limit..], expected.old[limit..], "W2");
            for (i, byte) in expected.new.iter().enumerate() {
                assert!(byte.is_none_or(|b| b == bytes[i]), "W3: byte {i}");
            }
            assert!(rewrite.state().written.len() <= ranges_max, "W4");
        }
    }

    proptest! {
        #[test]
        fn a_rewrite_is_what_was_written_and_zero_between(ops in proptest::collection::vec(op(), 1..40)) {
            run(ops, RANGES_MAX);
        }

        #[test]
        fn forgetting_ranges_changes_nothing_but_when(ops in proptest::collection::vec(op(), 1..60)) {
            run(ops, 3);
        }

        #[test]
        fn ranges_are_a_set_of_bytes(
            ranges in proptest::collection::vec((0u64..100, 0u64..20), 0..30),
            limit in 0u64..130,
        ) {
            let mut set = RangeSet::default();
            let mut model = [false; 130];
            for (start, len) in ranges {
                set.insert(start..start + len);
                model[start as usize..(start + len) as usize].fill(true);
            }
            let runs = (0..130).filter(|&i| model[i] && (i == 0 || !model[i - 1])).count();
            assert_eq!(set.len(), runs, "ranges that touch are one");
            assert_eq!(set.is_empty(), runs == 0);
            let end = model.iter().rposition(|&b| b).map_or(0, |i| i as u64 + 1);
            assert_eq!(set.end(), end);
            let mut gap_bytes = [false; 130];
            let mut last_end = None;
            for gap in set.gaps(limit) {
                assert!(last_end.is_none_or(|e| e < gap.start), "ascending and apart");
                last_end = Some(gap.end);
                gap_bytes[gap.start as usize..gap.end as usize].fill(true);
            }
            for i in 0..130 {
                assert_eq!(gap_bytes[i], !model[i] && (i as u64) < limit, "byte {i}");
            }
        }
    }

    #[test]
    fn a_gap_that_is_a_hole_costs_nothing() {
        let model = Model::new();
        model.bytes.lock().unwrap().fill(0);
        let rewrite = Rewrite::default();
        rewrite.write(&model, 200, &[1; 8]).unwrap();
        rewrite.extend_to_size();
        rewrite.settle(&model).unwrap();
        assert_eq!(model.discarded.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_gap_is_not_zeroed_while_a_write_into_it_is_in_flight() {
        let model = Model::new();
        let rewrite = Rewrite::default();
        rewrite.write(&model, 200, &[1; 8]).unwrap();
        let settled = AtomicBool::new(false);
        std::thread::scope(|scope| {
            rewrite
                .change(&model, 100..104, || {
                    scope.spawn(|| {
                        assert!(rewrite.settle(&model).unwrap());
                        settled.store(true, Ordering::SeqCst);
                    });
                    std::thread::sleep(std::time::Duration::from_millis(50));
                    assert!(!settled.load(Ordering::SeqCst), "the gate holds it");
                    model.write_at(100, &[2; 4], true)
                })
                .unwrap();
        });
        let bytes = model.bytes();
        assert_eq!(bytes[100..104], [2; 4]);
        assert!(bytes[..100].iter().chain(&bytes[104..200]).all(|&b| b == 0));
    }

    #[test]
    fn a_failed_change_is_not_remembered() {
        let model = Model::new();
        let rewrite = Rewrite::default();
        let refuse = || {
            Err(crate::error::Error::new(
                crate::error::Kind::NoSpace,
                "full",
            ))
        };
        assert!(rewrite.change(&model, 100..110, refuse).is_err());
        let before = model.bytes();
        assert!(!rewrite.settle(&model).unwrap(), "nothing was written");
        assert_eq!(model.bytes(), before);
    }

    #[test]
    fn opening_and_closing_touches_nothing() {
        let model = Model::new();
        let before = model.bytes();
        Rewrite::default().settle(&model).unwrap();
        assert_eq!(model.bytes(), before);
    }
}
