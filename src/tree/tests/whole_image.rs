//! Restoring a whole image over `live.img`: what cp and dd do, finished, interrupted and failing.

use super::*;

const SIZE: usize = World::VM as usize;

/// What is restored: data with holes at the front, inside and at the end.
fn image() -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    for range in [8192..20_000, 300_000..300_001, 524_288..786_432] {
        let len = range.len();
        bytes[range].copy_from_slice(&pattern(len, 77));
    }
    bytes
}

/// A volume full of old content, with a snapshot of it.
fn full() -> World {
    let w = world();
    w.write("vm/live.img", 0, &pattern(SIZE, 5));
    w.touch("vm", "old.img");
    w
}

/// The handle of an open with O_TRUNC; dd closes the descriptor it came with before it writes.
fn begin(w: &World) -> HandleId {
    let handle = w.open("vm/live.img", TRUNCATE).unwrap();
    w.tree.flush(handle).unwrap();
    handle
}

fn finish(w: &World, handle: HandleId) {
    w.tree.flush(handle).unwrap();
    w.tree.release(handle).unwrap();
}

/// Writes the blocks of a range as dd does; cp leaves out those that are zero.
fn copy(w: &World, handle: HandleId, from: &[u8], range: std::ops::Range<usize>, sparse: bool) {
    for at in range.clone().step_by(4096) {
        let block = &from[at..(at + 4096).min(range.end)];
        if !sparse || block.iter().any(|&b| b != 0) {
            let len = w.tree.write(handle, at as u64, block, false).unwrap();
            assert_eq!(len, block.len());
        }
    }
}

fn set_size(w: &World, handle: Option<HandleId>, size: u64) -> Result<Attr> {
    let set = SetAttr {
        size: Some(size),
        ..SetAttr::default()
    };
    w.tree.setattr(w.node("vm/live.img"), handle, set)
}

fn assert_old_snapshot(w: &World) {
    assert_eq!(w.content("vm/snapshots/old.img"), pattern(SIZE, 5));
}

fn used(w: &World) -> u64 {
    let vm = Name::new("vm").unwrap();
    w.engine.volume(&vm).unwrap().info().used
}

#[test]
fn dd_leaves_exactly_the_image() {
    let w = full();
    let handle = begin(&w);
    copy(&w, handle, &image(), 0..SIZE, false);
    finish(&w, handle);
    assert_eq!(w.content("vm/live.img"), image());
    assert_old_snapshot(&w);
}

#[test]
fn cp_of_a_sparse_image_leaves_exactly_the_image() {
    let w = full();
    let handle = begin(&w);
    copy(&w, handle, &image(), 0..SIZE, true);
    set_size(&w, Some(handle), World::VM).unwrap();
    finish(&w, handle);
    assert_eq!(w.content("vm/live.img"), image());
    assert_old_snapshot(&w);
}

#[test]
fn an_interrupted_copy_has_replaced_a_prefix() {
    for sparse in [false, true] {
        for end in [1, 4096, 8192, 12_288, 300_001, 600_000] {
            let w = full();
            let handle = begin(&w);
            copy(&w, handle, &image(), 0..end, sparse);
            // A killed program's descriptors are closed, too.
            finish(&w, handle);
            let live = w.content("vm/live.img");
            // A hole that was about to be skipped is not known yet.
            let mut reached = end;
            while sparse && reached > 0 && live[..reached] != image()[..reached] {
                reached = (reached - 1) / 4096 * 4096;
            }
            assert_eq!(live[..reached], image()[..reached], "{sparse} {end}");
            assert_eq!(
                live[reached..],
                pattern(SIZE, 5)[reached..],
                "{sparse} {end}"
            );
            assert!(sparse || reached == end);
            assert_old_snapshot(&w);
            // Begun again, it comes to its end.
            let handle = begin(&w);
            copy(&w, handle, &image(), 0..SIZE, sparse);
            set_size(&w, Some(handle), World::VM).unwrap();
            finish(&w, handle);
            assert_eq!(w.content("vm/live.img"), image(), "{sparse} {end}");
        }
    }
}

#[test]
fn an_image_that_is_there_already_costs_nothing_and_one_that_differs_what_differs() {
    let w = full();
    let same = pattern(SIZE, 5);
    let handle = begin(&w);
    copy(&w, handle, &same, 0..SIZE, false);
    finish(&w, handle);
    assert_eq!(used(&w), 0);
    let mut other = same;
    other[100_000] ^= 1;
    other[500_000] ^= 1;
    let handle = begin(&w);
    copy(&w, handle, &other, 0..SIZE, false);
    finish(&w, handle);
    assert_eq!(used(&w), 2 * 4096);
    assert_eq!(w.content("vm/live.img"), other);
    assert_old_snapshot(&w);
}

#[test]
fn a_hole_over_a_hole_costs_nothing() {
    let w = world();
    w.touch("vm", "old.img");
    let handle = begin(&w);
    set_size(&w, Some(handle), World::VM).unwrap();
    finish(&w, handle);
    assert_eq!(used(&w), 0);
    assert_eq!(w.walk("vm/live.img").unwrap().blocks, 0);
}

#[test]
fn only_a_close_zeroes_gaps_and_only_of_the_handle_that_has_them() {
    let w = full();
    let handle = begin(&w);
    w.tree.write(handle, 65536, &[1; 4096], false).unwrap();
    w.tree.fsync(handle).unwrap();
    let mut expected = pattern(SIZE, 5);
    expected[65536..65536 + 4096].fill(1);
    assert_eq!(w.content("vm/live.img"), expected, "fsync zeroes nothing");
    // Another writer comes and goes: the gaps are not its.
    w.write("vm/live.img", 100, b"another");
    expected[100..107].copy_from_slice(b"another");
    assert_eq!(w.content("vm/live.img"), expected);
    finish(&w, handle);
    expected[..65536].fill(0);
    assert_eq!(w.content("vm/live.img"), expected);
}

#[test]
fn a_punched_range_is_written_and_a_size_set_elsewhere_is_not_the_copys_end() {
    let w = full();
    let handle = begin(&w);
    w.tree
        .allocate(handle, 8192, 4096, SpaceChange::Punch)
        .unwrap();
    w.tree.write(handle, 0, &[1; 8192], false).unwrap();
    set_size(&w, None, World::VM).unwrap();
    for other in [0, 8192, World::VM - 1, World::VM + 1] {
        let refused = set_size(&w, Some(handle), other).map_err(kind);
        assert_eq!(refused.map(drop), Err(Kind::Permission), "{other}");
    }
    finish(&w, handle);
    let mut expected = pattern(SIZE, 5);
    expected[..8192].fill(1);
    expected[8192..12_288].fill(0);
    assert_eq!(w.content("vm/live.img"), expected);
}

#[test]
fn opening_with_truncation_discards_nothing() {
    let w = full();
    let handle = begin(&w);
    finish(&w, handle);
    assert_eq!(w.content("vm/live.img"), pattern(SIZE, 5));
    // Without write access O_TRUNC says nothing.
    let flags = OpenFlags {
        write: false,
        ..TRUNCATE
    };
    let handle = w.open("vm/live.img", flags).unwrap();
    let refused = w.tree.write(handle, 0, b"x", false);
    assert!(matches!(refused, Err(TreeError::BadHandle)));
    finish(&w, handle);
    assert_eq!(w.content("vm/live.img"), pattern(SIZE, 5));
}

#[test]
fn a_copy_that_is_longer_than_the_volume_ends_at_its_end() {
    let w = full();
    let handle = begin(&w);
    let image = image();
    copy(&w, handle, &image, 0..SIZE - 4096, false);
    let last = w
        .tree
        .write(handle, World::VM - 4096, &[7; 9000], false)
        .unwrap();
    assert_eq!(last, 4096);
    let past = w.tree.write(handle, World::VM, &[7; 10], false);
    assert!(matches!(past, Err(TreeError::PastEnd)));
    finish(&w, handle);
    let mut expected = image;
    expected[SIZE - 4096..].fill(7);
    assert_eq!(w.content("vm/live.img"), expected);
}
