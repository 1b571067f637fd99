//! Sentences of `docs/semantics.md` that no other test happens to show.

use super::*;
use crate::sys::sim::Op;

const VM: usize = World::VM as usize;

fn used(w: &World) -> u64 {
    let vm = Name::new("vm").unwrap();
    w.engine.volume(&vm).unwrap().info().used
}

fn blocks(w: &World) -> u64 {
    w.walk("vm/live.img").unwrap().blocks
}

fn change(w: &World, offset: u64, len: u64, change: SpaceChange) -> Result<()> {
    let handle = w.open("vm/live.img", WRITE).unwrap();
    let done = w.tree.allocate(handle, offset, len, change);
    w.tree.flush(handle).unwrap();
    w.tree.release(handle).unwrap();
    done
}

const ZERO: SpaceChange = SpaceChange::Zero { keep_size: false };

#[test]
fn zeroing_gives_space_back_and_preserves_what_a_snapshot_needs() {
    let w = world();
    let mut live = pattern(VM, 5);
    w.write("vm/live.img", 0, &live);
    assert_eq!(blocks(&w), World::VM / 512);
    change(&w, 8192, 16_384, SpaceChange::Punch).unwrap();
    live[8192..24_576].fill(0);
    assert_eq!(blocks(&w), (World::VM - 16_384) / 512);
    assert_eq!(w.content("vm/live.img"), live);
    w.touch("vm", "a.img");
    change(&w, 40_960, 4096, SpaceChange::Punch).unwrap();
    change(&w, 81_920, 8192, ZERO).unwrap();
    assert_eq!(used(&w), 3 * 4096, "as a write");
    assert_eq!(w.content("vm/snapshots/a.img"), live);
    live[40_960..45_056].fill(0);
    live[81_920..90_112].fill(0);
    assert_eq!(w.content("vm/live.img"), live);
}

#[test]
fn zeroing_meets_a_full_store_like_a_write() {
    let w = world();
    w.write("vm/live.img", 0, &pattern(VM, 5));
    w.touch("vm", "a.img");
    w.sim.set_space("store", Some(0));
    // Space that was written ahead may serve for a while.
    let (mut refused, mut at) = ([0; 2], 0);
    while at < World::VM {
        let which = (at / 65_536 % 2) as usize;
        let how = [SpaceChange::Punch, ZERO][which];
        match change(&w, at, 65_536, how).map_err(kind) {
            Ok(()) => {}
            Err(e) => {
                assert_eq!(e, Kind::NoSpace);
                let live = w.content("vm/live.img");
                let piece = &live[at as usize..at as usize + 65_536];
                assert_eq!(piece, &pattern(VM, 5)[at as usize..][..65_536]);
                refused[which] += 1;
            }
        }
        at += 65_536;
    }
    assert!(refused[0] > 0 && refused[1] > 0, "{refused:?}");
    assert_eq!(w.content("vm/snapshots/a.img"), pattern(VM, 5));
}

#[test]
fn zeros_may_stay_where_they_are_while_something_counts_changes() {
    for held in ["nothing", "snapshot", "bookmark"] {
        let w = world();
        w.write("vm/live.img", 0, &[0; 8192]);
        let vm = Name::new("vm").unwrap();
        if held != "nothing" {
            w.touch("vm", "a.img");
        }
        if held == "bookmark" {
            let a = Name::new("a").unwrap();
            w.engine.delete_snapshot_keep_bookmark(&vm, &a).unwrap();
        }
        assert_eq!(blocks(&w), 16, "zeros that take space");
        change(&w, 0, 8192, SpaceChange::Punch).unwrap();
        assert_eq!(used(&w), 0, "{held}: nothing was preserved");
        let left = if held == "snapshot" { 16 } else { 0 };
        assert_eq!(blocks(&w), left, "{held}");
        assert!(w.content("vm/live.img").iter().all(|&b| b == 0));
    }
}

#[test]
fn equal_bytes_are_not_written_by_a_rewrite() {
    let w = world();
    w.write("vm/live.img", 0, &pattern(VM, 5));
    let handle = w.open("vm/live.img", TRUNCATE).unwrap();
    let writes = w.sim.count(Op::Write);
    w.tree.write(handle, 0, &pattern(VM, 5), false).unwrap();
    w.tree.flush(handle).unwrap();
    assert_eq!(w.sim.count(Op::Write), writes, "neither here nor there");
    w.tree.write(handle, 4096, &[9; 4096], false).unwrap();
    assert!(w.sim.count(Op::Write) > writes);
    w.tree.flush(handle).unwrap();
    w.tree.release(handle).unwrap();
}

#[test]
fn a_failed_sync_counts_until_the_volume_is_mounted_again() {
    let mut w = world();
    w.write("vm/live.img", 0, &pattern(8192, 3));
    let handle = w.open("vm/live.img", WRITE).unwrap();
    w.tree.write(handle, 0, &pattern(8192, 9), false).unwrap();
    w.sim.fail_nth(Op::Sync, 1, 5);
    for _ in 0..3 {
        assert_eq!(w.tree.fsync(handle).map_err(kind), Err(Kind::Failed));
    }
    w.restart(true, |_| {});
    let handle = w.open("vm/live.img", WRITE).unwrap();
    w.tree.write(handle, 0, &pattern(8192, 9), false).unwrap();
    w.tree.fsync(handle).unwrap();
    w.tree.release(handle).unwrap();
    w.touch("vm", "a.img");
    assert_eq!(w.content("vm/snapshots/a.img")[..8192], pattern(8192, 9));
}

#[test]
fn a_diff_is_read_once_and_a_listing_reads_nothing() {
    let w = world();
    w.write("vm/live.img", 0, &pattern(VM, 3));
    w.touch("vm", "a.img");
    w.write("vm/live.img", 0, &pattern(65_536, 5));
    w.touch("vm", "b.img");
    let reads = |what: &dyn Fn()| {
        let before = w.sim.count(Op::Read);
        what();
        w.sim.count(Op::Read) - before
    };
    assert_eq!(reads(&|| drop(w.names("vm/diffs"))), 0);
    assert_eq!(reads(&|| drop(w.walk("vm/diffs"))), 0);
    let asked = reads(&|| drop(w.walk("vm/diffs/a..b.json")));
    assert!(asked > 0, "what changed was looked at");
    let again = || {
        for name in ["a..b.json", "a..b.qcow2"] {
            let handle = w.open(&format!("vm/diffs/{name}"), READ).unwrap();
            w.tree.release(handle).unwrap();
        }
    };
    assert_eq!(reads(&again), 0);
    assert_eq!(reads(&|| drop(w.content("vm/diffs/a..b.json"))), 0);
}

/// A diff that was open when its ends failed.
#[test]
fn an_open_diff_fails_with_its_ends() {
    let w = world();
    let mut live = pattern(VM, 3);
    w.write("vm/live.img", 0, &live);
    let vm = Name::new("vm").unwrap();
    let mut options = w.engine.volume(&vm).unwrap().info().options;
    options.on_full = crate::volume::OnFull::FailSnapshot;
    w.engine.set_volume(&vm, options).unwrap();
    w.touch("vm", "a.img");
    w.write("vm/live.img", 0, &pattern(4096, 5));
    live[..4096].copy_from_slice(&pattern(4096, 5));
    w.touch("vm", "b.img");
    let handle = w.open("vm/diffs/a..b.qcow2", READ).unwrap();
    let opened = w.open("vm/diffs/a..b.qcow2", READ).unwrap();
    let size = w.tree.size(handle).unwrap();
    let mut buf = vec![0; 512];
    w.tree.read(handle, size - 512, &mut buf).unwrap();
    w.tree.release(opened).unwrap();
    w.sim.set_space("store", Some(0));
    for round in 0u8..8 {
        w.write("vm/live.img", 0, &pattern(VM, 16 + round));
        let state = |name: &str| {
            let node = w.node(&format!("vm/snapshots/{name}.img"));
            let state = w.tree.getxattr(node, "user.stillframe.state").unwrap();
            String::from_utf8(state).unwrap()
        };
        if state("b").starts_with("failed") {
            break;
        }
        let directory = w.node("vm/snapshots");
        let _ = w
            .tree
            .create(directory, &format!("s{round}.img"), WRITE, CALLER);
    }
    buf.fill(0);
    for at in [0, 512, size - 512] {
        let read = w.tree.read(handle, at, &mut buf).map_err(kind);
        assert_eq!(read, Err(Kind::Failed), "{at}");
    }
    assert_eq!(buf, [0; 512], "not one byte");
    for name in ["a..b.qcow2", "a..b.json"] {
        let refused = w.walk(&format!("vm/diffs/{name}")).map_err(kind);
        assert_eq!(refused.unwrap_err(), Kind::Failed, "{name}");
    }
    w.tree.release(handle).unwrap();
}

fn fact(w: &World, path: &str, name: &str) -> Result<String> {
    let name = format!("user.stillframe.{name}");
    let value = w.tree.getxattr(w.node(path), &name)?;
    Ok(String::from_utf8(value).unwrap())
}

#[test]
fn the_live_image_tells_how_far_its_source_can_be_trusted() {
    let mut w = world();
    w.write("vm/live.img", 0, &pattern(8192, 3));
    w.touch("vm", "a.img");
    let state = |w: &World| fact(w, "vm/live.img", "state").unwrap();
    let uuid = fact(&w, "vm/live.img", "uuid").unwrap();
    assert_eq!(state(&w), "active");
    w.restart(true, |_| {});
    assert_eq!(state(&w), "unverified", "a stop that was not clean");
    w.restart(false, |sim| {
        sim.advance(10_000_000_000);
        sim.poke("sources/vm", 0, &[9; 512]);
    });
    assert!(state(&w).starts_with("changed: "), "{}", state(&w));
    w.engine.accept_volume(&Name::new("vm").unwrap()).unwrap();
    assert_eq!(state(&w), "active");
    w.hide_sources(true);
    w.restart(false, |_| {});
    assert!(state(&w).starts_with("missing: "), "{}", state(&w));
    w.hide_sources(false);
    w.restart(false, |_| {});
    assert_eq!(fact(&w, "vm/live.img", "uuid").unwrap(), uuid);
    assert_eq!(fact(&w, "vm/live.img", "source").unwrap(), "sources/vm");
}

#[test]
fn the_facts_of_a_snapshot_stay_with_it() {
    let mut w = world();
    w.touch("vm", "a.img");
    w.touch("vm", "b.img");
    let path = "vm/snapshots/b.img";
    let names = ["uuid", "epoch", "parent", "unique", "state"];
    let facts = |w: &World, path: &str| names.map(|name| fact(w, path, name).unwrap());
    let before = facts(&w, path);
    assert_eq!(before[2], fact(&w, "vm/snapshots/a.img", "uuid").unwrap());
    let (vm, b) = (Name::new("vm").unwrap(), Name::new("b").unwrap());
    assert_eq!(fact(&w, path, "held").unwrap(), "0");
    w.engine.hold_snapshot(&vm, &b, true).unwrap();
    assert_eq!(fact(&w, path, "held").unwrap(), "1");
    let directory = w.node("vm/snapshots");
    let plain = RenameMode::Plain;
    let renamed = w.tree.rename(directory, "b.img", directory, "c.img", plain);
    renamed.unwrap();
    w.restart(true, |_| {});
    assert_eq!(facts(&w, "vm/snapshots/c.img"), before);
    assert_eq!(fact(&w, "vm/snapshots/c.img", "held").unwrap(), "1");
    // A number of its own: also of the same name in another volume, and of one that is taken again.
    w.tree.unlink(w.node("vm/snapshots"), "a.img").unwrap();
    w.touch("vm", "a.img");
    w.touch("odd", "a.img");
    let mut uuids: Vec<String> = [
        "vm/snapshots/a.img",
        "vm/snapshots/c.img",
        "odd/snapshots/a.img",
    ]
    .map(|path| fact(&w, path, "uuid").unwrap())
    .to_vec();
    uuids.push(before[2].clone());
    uuids.sort_unstable();
    uuids.dedup();
    assert_eq!(uuids.len(), 4, "{uuids:?}");
}

#[test]
fn a_deleted_base_is_still_named_by_its_clones() {
    let w = world();
    w.touch("vm", "a.img");
    let base = fact(&w, "vm/snapshots/a.img", "uuid").unwrap();
    let clones = w.node("vm/clones");
    w.tree
        .link(w.node("vm/snapshots/a.img"), clones, "b.img")
        .unwrap();
    w.write("vm/clones/b.img", 0, b"own");
    w.tree
        .link(w.node("vm/clones/b.img"), clones, "c.img")
        .unwrap();
    w.tree.unlink(w.node("vm/snapshots"), "a.img").unwrap();
    for (path, layers) in [("vm/clones/b.img", "2"), ("vm/clones/c.img", "2")] {
        assert_eq!(fact(&w, path, "base").unwrap(), base, "{path}");
        assert_eq!(fact(&w, path, "layers").unwrap(), layers, "{path}");
        assert_eq!(fact(&w, path, "own").unwrap(), "0", "{path}");
    }
    let uuids = ["b", "c"].map(|c| fact(&w, &format!("vm/clones/{c}.img"), "uuid").unwrap());
    assert!(uuids[0] != uuids[1] && uuids[0] != base);
}

#[test]
fn attributes_are_of_images_only_and_cannot_be_changed() {
    let w = world();
    w.touch("vm", "a.img");
    w.touch("vm", "b.img");
    for path in [
        "",
        "vm",
        "vm/snapshots",
        "vm/clones",
        "vm/diffs",
        "vm/diffs/a..b.json",
        ".stillframe",
        ".stillframe/status.json",
    ] {
        let node = w.node(path);
        assert!(w.tree.listxattr(node).unwrap().is_empty(), "{path}");
        let uuid = w.tree.getxattr(node, "user.stillframe.uuid");
        assert!(matches!(uuid, Err(TreeError::NoAttribute)), "{path}");
    }
    for path in ["vm", "vm/live.img", "vm/snapshots/a.img"] {
        let node = w.node(path);
        for (name, expected) in [
            ("user.stillframe.state", Kind::Permission),
            ("user.stillframe.new", Kind::Permission),
            ("user.other", Kind::Unsupported),
            ("security.selinux", Kind::Unsupported),
        ] {
            let set = w.tree.setxattr(node, name, b"a").map_err(kind);
            assert_eq!(set, Err(expected), "{path} {name}");
        }
    }
}

#[test]
fn an_empty_clone_goes_on_growing_and_is_emptied_by_truncation() {
    let mut w = world();
    let path = "vm/clones/a.img";
    let (_, opened) = w
        .tree
        .create(w.node("vm/clones"), "a.img", WRITE, CALLER)
        .unwrap();
    // A copy that is interrupted here is a clone with a prefix, which can be removed.
    let half = pattern(5000, 1);
    w.tree.write(opened.handle, 0, &half, false).unwrap();
    w.tree.flush(opened.handle).unwrap();
    w.tree.release(opened.handle).unwrap();
    assert_eq!(w.content(path), half);
    for kill in [false, true] {
        w.restart(kill, |_| {});
        assert_eq!(w.content(path), half);
        w.write(path, 6000, b"longer");
        assert_eq!(w.walk(path).unwrap().size, 6006, "it stays that way");
        assert_eq!(w.content(path)[5000..6000], [0; 1000]);
        let set = SetAttr {
            size: Some(5000),
            ..SetAttr::default()
        };
        w.set(path, set).unwrap();
    }
    let append = OpenFlags {
        append: true,
        ..WRITE
    };
    assert_eq!(kind(w.open(path, append).unwrap_err()), Kind::Permission);
    assert_eq!(w.content(path), half);
    let handle = w.open(path, TRUNCATE).unwrap();
    assert_eq!(w.tree.size(handle).unwrap(), 0, "emptied at once");
    w.tree.write(handle, 0, b"new", false).unwrap();
    w.tree.flush(handle).unwrap();
    w.tree.release(handle).unwrap();
    assert_eq!(w.content(path), b"new");
    w.tree.unlink(w.node("vm/clones"), "a.img").unwrap();
    assert_eq!(w.names("vm/clones"), [".", ".."]);
}

#[test]
fn a_removed_clone_gives_its_space_back_when_it_is_closed() {
    let w = world();
    w.touch("vm", "a.img");
    let clones = w.node("vm/clones");
    let settle = || {
        while w.engine.maintain().unwrap() {}
        w.sim.allocated("store")
    };
    w.tree
        .link(w.node("vm/snapshots/a.img"), clones, "b.img")
        .unwrap();
    w.write("vm/clones/b.img", 0, &pattern(VM, 5));
    let handle = w.open("vm/clones/b.img", WRITE).unwrap();
    w.tree.unlink(clones, "b.img").unwrap();
    let held = settle();
    assert_eq!(settle(), held, "it is open");
    w.tree.write(handle, 0, b"still", false).unwrap();
    assert_eq!(&w.read_all(handle)[..5], b"still");
    w.tree.flush(handle).unwrap();
    w.tree.release(handle).unwrap();
    let left = settle();
    assert!(held >= left + World::VM, "{held} {left}");
}

/// What a revert leaves as it is: every snapshot, bookmark and diff, also those that are newer.
#[test]
fn a_revert_leaves_snapshots_bookmarks_and_diffs_and_preserves_what_differs() {
    let w = world();
    let vm = Name::new("vm").unwrap();
    w.write("vm/live.img", 0, &pattern(VM, 3));
    for (name, at) in [("m", 0), ("a", 40_960), ("b", 81_920)] {
        w.touch("vm", &format!("{name}.img"));
        w.write("vm/live.img", at, &[at as u8 | 1; 4096]);
    }
    w.touch("vm", "c.img");
    let m = Name::new("m").unwrap();
    w.engine.delete_snapshot_keep_bookmark(&vm, &m).unwrap();
    let views = || {
        let diffs = ["m..a", "a..b", "b..c", "m..c"].map(|d| format!("diffs/{d}.json"));
        let snapshots = ["a", "b", "c"].map(|s| format!("snapshots/{s}.img"));
        let paths = diffs.into_iter().chain(snapshots);
        let views = paths.map(|p| (w.content(&format!("vm/{p}")), w.node(&format!("vm/{p}"))));
        views.collect::<Vec<_>>()
    };
    let (before, was) = (views(), used(&w));
    w.tree
        .setxattr(w.node("vm/live.img"), "user.stillframe.revert", b"a")
        .unwrap();
    assert_eq!(
        w.content("vm/live.img"),
        w.content("vm/snapshots/a.img"),
        "reverted"
    );
    assert_eq!(used(&w) - was, 2 * 4096, "the two grains that differ");
    assert!(views() == before);
    assert_eq!(w.engine.bookmarks(&vm).unwrap().len(), 1);
}
