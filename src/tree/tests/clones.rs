//! `clones/`: made by LINK and CREATE, written through, deleted in any order.

use super::*;
use crate::tree::fixture::World;

impl World {
    pub(super) fn link(&self, source: &str, to: &str) -> Result<Attr> {
        let (directory, name) = to.rsplit_once('/').unwrap();
        self.tree
            .link(self.node(source), self.node(directory), name)
    }

    fn unlink(&self, path: &str) -> Result<()> {
        let (directory, name) = path.rsplit_once('/').unwrap();
        self.tree.unlink(self.node(directory), name)
    }

    /// Makes an empty clone that is open.
    fn empty(&self, path: &str, flags: OpenFlags) -> (Attr, HandleId) {
        let (directory, name) = path.rsplit_once('/').unwrap();
        let made = self.tree.create(self.node(directory), name, flags, CALLER);
        let (attr, opened) = made.unwrap();
        assert_eq!(opened.caching, Caching::None);
        (attr, opened.handle)
    }

    fn fact(&self, path: &str, name: &str) -> Result<String> {
        let name = format!("user.stillframe.{name}");
        let value = self.tree.getxattr(self.node(path), &name)?;
        Ok(String::from_utf8(value).unwrap())
    }
}

fn with(base: &[u8], at: usize, data: &[u8]) -> Vec<u8> {
    let mut bytes = base.to_vec();
    bytes[at..at + data.len()].copy_from_slice(data);
    bytes
}

#[test]
fn a_link_into_clones_is_a_writable_copy_of_its_own() {
    let w = world();
    w.write("vm/live.img", 0, &pattern(40_000, 3));
    let a = w.touch("vm", "a.img");
    w.write("vm/live.img", 0, &pattern(40_000, 7));
    let base = w.content("vm/snapshots/a.img");
    let b = w.link("vm/snapshots/a.img", "vm/clones/b.img").unwrap();
    assert_ne!(b.node, a.node, "a node of its own");
    assert_eq!(
        (b.mode, b.nlink, b.size, b.kind),
        (0o600, 1, World::VM, FileKind::File)
    );
    assert_eq!(w.walk("vm/snapshots/a.img").unwrap().nlink, 1);
    assert_eq!(w.content("vm/clones/b.img"), base);
    w.write("vm/clones/b.img", 5000, b"of the clone");
    let changed = with(&base, 5000, b"of the clone");
    assert_eq!(w.content("vm/clones/b.img"), changed);
    assert_eq!(w.content("vm/snapshots/a.img"), base);
    assert_eq!(w.content("vm/live.img")[..40_000], pattern(40_000, 7));
    // A clone of the clone has what was written so far, and both go their ways.
    w.link("vm/clones/b.img", "vm/clones/c.img").unwrap();
    w.write("vm/clones/c.img", 0, b"c");
    w.write("vm/clones/b.img", 1, b"b");
    assert_eq!(w.content("vm/clones/c.img"), with(&changed, 0, b"c"));
    assert_eq!(w.content("vm/clones/b.img"), with(&changed, 1, b"b"));
    assert_eq!(
        w.names("vm/clones"),
        [".", "..", "b.img", "c.img"],
        "oldest first"
    );
    // A diff's view of a snapshot is the snapshot.
    w.link("vm/diffs/a.img", "vm/clones/d.img").unwrap();
    assert_eq!(w.content("vm/clones/d.img"), base);
}

#[test]
fn only_images_of_the_volume_are_linked_and_only_into_clones() {
    let w = world();
    w.touch("vm", "a.img");
    w.link("vm/snapshots/a.img", "vm/clones/b.img").unwrap();
    let refused = |source: &str, to: &str| kind(w.link(source, to).unwrap_err());
    for source in [
        "vm/live.img",
        "vm/diffs/a..live.json",
        ".stillframe/status.json",
    ] {
        assert_eq!(
            refused(source, "vm/clones/x.img"),
            Kind::Permission,
            "{source}"
        );
    }
    for to in [
        "vm/snapshots/x.img",
        "vm/x.img",
        "vm/diffs/x.img",
        "/x.img",
        ".stillframe/x.img",
    ] {
        assert_eq!(refused("vm/snapshots/a.img", to), Kind::Permission, "{to}");
    }
    for other in ["vm/snapshots/a.img", "vm/clones/b.img"] {
        let linked = w.link(other, "odd/clones/x.img");
        assert!(matches!(linked, Err(TreeError::OtherVolume)), "{other}");
    }
    for source in ["vm/snapshots/a.img", "vm/clones/b.img"] {
        assert_eq!(refused(source, "vm/clones/b.img"), Kind::Exists);
        for bad in ["x", ".b.img", "live.img", "a b.img"] {
            let to = format!("vm/clones/{bad}");
            assert_eq!(refused(source, &to), Kind::Invalid, "{bad}");
        }
    }
    let gone = w.tree.link(NodeId(9999), w.node("vm/clones"), "x.img");
    assert_eq!(kind(gone.unwrap_err()), Kind::NotFound);
    assert_eq!(w.names("vm/clones"), [".", "..", "b.img"]);
}

#[test]
fn clones_are_renamed_and_removed_like_snapshots() {
    let w = world();
    w.touch("vm", "a.img");
    let b = w.link("vm/snapshots/a.img", "vm/clones/b.img").unwrap();
    w.link("vm/snapshots/a.img", "vm/clones/c.img").unwrap();
    w.write("vm/clones/b.img", 0, b"mine");
    let (clones, other) = (w.node("vm/clones"), w.node("odd/clones"));
    let rename = |from, to, parent, mode| w.tree.rename(clones, from, parent, to, mode);
    let refused = |from, to, parent, mode| kind(rename(from, to, parent, mode).unwrap_err());
    use RenameMode::{Plain, Special};
    assert_eq!(refused("b.img", "c.img", clones, Plain), Kind::Exists);
    assert_eq!(refused("b.img", "c.img", clones, Special), Kind::Invalid);
    assert_eq!(refused("b.img", "d", clones, Plain), Kind::Invalid);
    assert_eq!(refused("x.img", "d.img", clones, Plain), Kind::NotFound);
    let snapshots = w.node("vm/snapshots");
    for elsewhere in [other, snapshots, w.node("vm")] {
        let kind = refused("b.img", "d.img", elsewhere, Plain);
        assert_eq!(kind, Kind::Permission, "{elsewhere:?}");
    }
    rename("b.img", "d.img", clones, Plain).unwrap();
    assert_eq!(w.tree.getattr(b.node).unwrap().node, b.node);
    assert_eq!(w.node("vm/clones/d.img"), b.node);
    // Behind the table's back, as a command does.
    let name = |name: &str| Name::new(name).unwrap();
    w.engine
        .rename_clone(&name("vm"), &name("d"), &name("e"))
        .unwrap();
    assert_eq!(w.tree.getattr(b.node).unwrap().nlink, 1);
    // Removed while open: it goes on, also for who opens it by the open descriptor, until the last
    // is closed.
    let handle = w.open("vm/clones/e.img", WRITE).unwrap();
    w.unlink("vm/clones/e.img").unwrap();
    assert_eq!(w.names("vm/clones"), [".", "..", "c.img"]);
    assert_eq!(w.tree.getattr(b.node).unwrap().nlink, 0);
    w.tree.write(handle, 4, b" still", true).unwrap();
    assert_eq!(&w.read_all(handle)[..10], b"mine still");
    let again = w.tree.open(b.node, READ).unwrap().handle;
    assert_eq!(&w.read_all(again)[..10], b"mine still");
    let clone = w.tree.link(b.node, clones, "f.img");
    assert_eq!(kind(clone.unwrap_err()), Kind::NotFound);
    w.tree.flush(handle).unwrap();
    w.tree.release(handle).unwrap();
    w.tree.release(again).unwrap();
    assert_eq!(kind(w.tree.getattr(b.node).unwrap_err()), Kind::NotFound);
    // A new one of that name is another node.
    let new = w.link("vm/snapshots/a.img", "vm/clones/e.img").unwrap();
    assert_ne!(new.node, b.node);
    assert_eq!(&w.content("vm/clones/e.img")[..4], &[0; 4]);
}

#[test]
fn parents_go_in_any_order_and_a_restart_keeps_the_rest() {
    for order in [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ] {
        let mut w = world();
        w.write("vm/live.img", 0, &pattern(20_000, 3));
        w.touch("vm", "a.img");
        w.write("vm/live.img", 0, &pattern(20_000, 9));
        let base = w.content("vm/snapshots/a.img");
        w.link("vm/snapshots/a.img", "vm/clones/b.img").unwrap();
        w.write("vm/clones/b.img", 100, b"b");
        w.link("vm/clones/b.img", "vm/clones/c.img").unwrap();
        w.write("vm/clones/c.img", 9000, b"c");
        w.link("vm/clones/c.img", "vm/clones/d.img").unwrap();
        w.write("vm/clones/d.img", 200_000, b"d");
        let d = with(&with(&with(&base, 100, b"b"), 9000, b"c"), 200_000, b"d");
        let attr = w.walk("vm/clones/d.img").unwrap();
        let parents = ["vm/snapshots/a.img", "vm/clones/b.img", "vm/clones/c.img"];
        for (step, i) in order.into_iter().enumerate() {
            w.unlink(parents[i]).unwrap();
            // Space that nobody needs goes; what the clone needs stays.
            while w.engine.maintain().unwrap() {}
            assert_eq!(w.content("vm/clones/d.img"), d, "{order:?}");
            w.restart(step % 2 == 0, |_| {});
            assert_eq!(w.content("vm/clones/d.img"), d, "{order:?}");
            assert_eq!(w.node("vm/clones/d.img"), attr.node);
        }
        assert_eq!(w.names("vm/clones"), [".", "..", "d.img"]);
    }
}

#[test]
fn a_clone_of_fixed_size_is_written_like_the_live_image() {
    let w = world();
    w.write("odd/live.img", 0, &pattern(World::ODD as usize, 5));
    w.touch("odd", "a.img");
    w.link("odd/snapshots/a.img", "odd/clones/b.img").unwrap();
    let path = "odd/clones/b.img";
    let appending = OpenFlags {
        append: true,
        ..WRITE
    };
    assert_eq!(kind(w.open(path, appending).unwrap_err()), Kind::Permission);
    let reader = w.open(path, READ).unwrap();
    let refused = w.tree.write(reader, 0, b"x", false);
    assert!(matches!(refused, Err(TreeError::BadHandle)));
    let handle = w.open(path, WRITE).unwrap();
    let at = World::ODD - 3;
    assert_eq!(w.tree.write(handle, at, b"12345", false).unwrap(), 3);
    let past = w.tree.write(handle, World::ODD, b"1", false);
    assert!(matches!(past, Err(TreeError::PastEnd)));
    let mut expected = pattern(World::ODD as usize, 5);
    expected[at as usize..].copy_from_slice(b"123");
    for (offset, len, change) in [
        (4096, 4096, SpaceChange::Punch),
        (8200, 10, SpaceChange::Zero { keep_size: false }),
        (World::ODD - 1, 50, SpaceChange::Zero { keep_size: true }),
        (World::ODD, 50, SpaceChange::Punch),
        (0, World::ODD, SpaceChange::Reserve),
    ] {
        w.tree.allocate(handle, offset, len, change).unwrap();
    }
    for change in [SpaceChange::Zero { keep_size: false }, SpaceChange::Reserve] {
        let past = w.tree.allocate(handle, World::ODD - 1, 2, change);
        assert!(matches!(past, Err(TreeError::PastEnd)), "{change:?}");
    }
    expected[4096..8192].fill(0);
    expected[8200..8210].fill(0);
    expected[World::ODD as usize - 1] = 0;
    assert_eq!(w.read_all(handle), expected);
    assert_eq!(w.tree.seek(handle, 0, Seek::Hole).unwrap(), 4096);
    assert_eq!(w.tree.seek(handle, 4096, Seek::Data).unwrap(), 8192);
    let end = w.tree.seek(handle, World::ODD, Seek::Hole);
    assert!(matches!(end, Err(TreeError::NoSuchOffset)));
    let size = |size| SetAttr {
        size: Some(size),
        ..SetAttr::default()
    };
    w.set(path, size(World::ODD)).unwrap();
    for other in [0, World::ODD - 1, World::ODD + 1] {
        let refused = w.set(path, size(other)).unwrap_err();
        assert_eq!(kind(refused), Kind::Permission);
    }
    w.set(
        path,
        SetAttr {
            mode: Some(0o600),
            times: true,
            ..SetAttr::default()
        },
    )
    .unwrap();
    let mode = SetAttr {
        mode: Some(0o400),
        ..SetAttr::default()
    };
    assert_eq!(kind(w.set(path, mode).unwrap_err()), Kind::Permission);
    w.tree.fsync(handle).unwrap();
    w.tree.flush(handle).unwrap();
    w.tree.release(handle).unwrap();
    w.tree.release(reader).unwrap();
}

/// O_TRUNC on a clone is a rewrite, see `whole_image`.
#[test]
fn a_whole_image_is_written_over_a_clone() {
    let w = world();
    w.write("vm/live.img", 0, &pattern(World::VM as usize, 5));
    w.touch("vm", "a.img");
    w.link("vm/snapshots/a.img", "vm/clones/b.img").unwrap();
    let path = "vm/clones/b.img";
    let before = w.content(path);
    // Opened and closed: nothing.
    let handle = w.open(path, TRUNCATE).unwrap();
    w.tree.flush(handle).unwrap();
    assert_eq!(w.read_all(handle), before);
    // What is equal takes no space, gaps become zero, the rest stays.
    w.tree.write(handle, 0, &before[..65_536], false).unwrap();
    w.tree.write(handle, 200_000, b"end", false).unwrap();
    w.tree.flush(handle).unwrap();
    let mut expected = before.clone();
    expected[65_536..200_000].fill(0);
    expected[200_000..200_003].copy_from_slice(b"end");
    assert_eq!(w.read_all(handle), expected);
    let own: u64 = w.fact(path, "own").unwrap().parse().unwrap();
    assert!(own > 0 && own <= 200_704 - 65_536, "{own}");
    // The final ftruncate says where it ends.
    let set = SetAttr {
        size: Some(World::VM),
        ..SetAttr::default()
    };
    w.tree.setattr(w.node(path), Some(handle), set).unwrap();
    w.tree.flush(handle).unwrap();
    expected[200_003..].fill(0);
    assert_eq!(w.read_all(handle), expected);
    w.tree.release(handle).unwrap();
    assert_eq!(w.content("vm/snapshots/a.img"), before);
}

#[test]
fn an_empty_clone_grows_while_something_is_copied_into_it() {
    let mut w = world();
    let (attr, handle) = w.empty("vm/clones/a.img", WRITE);
    assert_eq!((attr.size, attr.blocks, attr.mode), (0, 0, 0o600));
    let directory = w.node("vm/clones");
    let again = w.tree.create(directory, "a.img", WRITE, CALLER);
    assert_eq!(kind(again.unwrap_err()), Kind::Exists);
    for bad in ["a", ".a.img.Xy12", "live.img"] {
        let refused = w.tree.create(directory, bad, WRITE, CALLER);
        assert_eq!(kind(refused.unwrap_err()), Kind::Invalid, "{bad}");
    }
    // Refused, it leaves no clone behind.
    let append = OpenFlags {
        append: true,
        ..WRITE
    };
    let refused = w.tree.create(directory, "log.img", append, CALLER);
    assert_eq!(kind(refused.unwrap_err()), Kind::Permission);
    assert_eq!(w.names("vm/clones"), [".", "..", "a.img"]);
    w.tree.write(handle, 0, &pattern(5000, 1), false).unwrap();
    w.tree.write(handle, 100_000, b"far", false).unwrap();
    assert_eq!(w.tree.getattr(attr.node).unwrap().size, 100_003);
    // An earlier end does not cut.
    w.tree.write(handle, 7000, b"x", false).unwrap();
    let set = |size| SetAttr {
        size: Some(size),
        ..SetAttr::default()
    };
    let resized = w
        .tree
        .setattr(attr.node, Some(handle), set(200_000))
        .unwrap();
    assert_eq!(resized.size, 200_000);
    w.tree
        .allocate(handle, 200_000, 10, SpaceChange::Zero { keep_size: false })
        .unwrap();
    w.tree
        .allocate(handle, 200_010, 10, SpaceChange::Reserve)
        .unwrap();
    w.tree
        .allocate(handle, 0, 1000, SpaceChange::Punch)
        .unwrap();
    w.tree.flush(handle).unwrap();
    let mut expected = vec![0; 200_020];
    expected[1000..5000].copy_from_slice(&pattern(5000, 1)[1000..]);
    expected[7000] = b'x';
    expected[100_000..100_003].copy_from_slice(b"far");
    assert_eq!(w.read_all(handle), expected);
    w.tree.release(handle).unwrap();
    assert_eq!(w.content("vm/clones/a.img"), expected);
    let facts = |w: &World| {
        let path = "vm/clones/a.img";
        assert!(matches!(w.fact(path, "base"), Err(TreeError::NoAttribute)));
        assert_eq!(w.fact(path, "state").unwrap(), "active");
    };
    facts(&w);
    w.restart(true, |_| {});
    assert_eq!(w.content("vm/clones/a.img"), expected);
    assert_eq!(w.node("vm/clones/a.img"), attr.node);
    facts(&w);
}

/// What cp does with copy_file_range: ranges of a snapshot, one after another, into an empty clone.
#[test]
fn a_copy_of_a_snapshot_takes_its_ranges_over() {
    let w = world();
    w.write("vm/live.img", 0, &pattern(300_000, 5));
    w.touch("vm", "a.img");
    w.write("vm/live.img", 0, &pattern(300_000, 9));
    let base = w.content("vm/snapshots/a.img");
    let from = w.open("vm/snapshots/a.img", READ).unwrap();
    let (_, to) = w.empty("vm/clones/b.img", WRITE);
    let copy = |from, at: u64, to, there, len| w.tree.copy_range(from, at, to, there, len);
    let mut at = 0;
    while at < World::VM {
        let copied = copy(from, at, to, at, 262_144).unwrap();
        assert_eq!(copied, 262_144.min(World::VM - at));
        at += copied;
    }
    w.tree.flush(to).unwrap();
    assert_eq!(w.read_all(to), base);
    assert_eq!(w.fact("vm/clones/b.img", "own").unwrap(), "0", "no copy");
    w.tree.write(to, 0, b"own", false).unwrap();
    assert_eq!(w.content("vm/snapshots/a.img"), base);
    // Whatever else is asked for is the caller's to copy, and harms nothing.
    let live = w.open("vm/live.img", WRITE).unwrap();
    let (_, other) = w.empty("odd/clones/c.img", WRITE);
    let (_, late) = w.empty("vm/clones/d.img", WRITE);
    for (from, at, to, there) in [
        (from, 0, live, 0),
        (live, 0, late, 0),
        (from, 0, other, 0),
        (from, 0, late, 4096),
        (from, 4096, late, 4096),
        (from, World::VM, late, World::VM),
    ] {
        let refused = copy(from, at, to, there, 4096).unwrap_err();
        assert_eq!(kind(refused), Kind::Unsupported, "{at} {there}");
    }
    let read_only = copy(live, 0, from, 0, 4096);
    assert!(matches!(read_only, Err(TreeError::ReadOnly)));
    assert_eq!(w.tree.size(late).unwrap(), 0);
    for handle in [from, to, live, other, late] {
        w.tree.release(handle).unwrap();
    }
    assert_eq!(w.content("vm/live.img")[..300_000], pattern(300_000, 9));
}

#[test]
fn a_clone_tells_what_it_is_and_what_it_uses() {
    let w = world();
    w.write("vm/live.img", 65_536, &pattern(131_072, 5));
    let a = w.touch("vm", "a.img");
    let b = w.link("vm/snapshots/a.img", "vm/clones/b.img").unwrap();
    let path = "vm/clones/b.img";
    let base = w.fact("vm/snapshots/a.img", "uuid").unwrap();
    assert_eq!(w.fact(path, "base").unwrap(), base);
    assert_ne!(w.fact(path, "uuid").unwrap(), base);
    assert_eq!(w.fact(path, "layers").unwrap(), "1");
    assert_eq!(w.fact(path, "own").unwrap(), "0");
    assert_eq!(w.fact(path, "state").unwrap(), "active");
    let names = w.tree.listxattr(w.node(path)).unwrap();
    assert_eq!(
        names.split(|&b| b == 0).filter(|n| !n.is_empty()).count(),
        5
    );
    assert_eq!(b.blocks, a.blocks);
    assert!(b.mtime_ns > a.ctime_ns, "when it was made");
    w.write(path, 0, &pattern(8192, 1));
    assert_eq!(w.fact(path, "own").unwrap(), "8192");
    let after = w.walk(path).unwrap();
    assert_eq!(after.blocks, a.blocks + 16);
    assert!(after.mtime_ns > b.mtime_ns && after.ctime_ns > b.ctime_ns);
    w.write(path, 65_536, &pattern(4096, 3));
    // What lies under its own grains is there, too.
    assert_eq!(w.walk(path).unwrap().blocks, a.blocks + 24);
    let handle = w.open(path, READ).unwrap();
    let seek = |at, what| w.tree.seek(handle, at, what).unwrap();
    assert_eq!((seek(0, Seek::Data), seek(0, Seek::Hole)), (0, 8192));
    assert_eq!(
        (seek(8192, Seek::Data), seek(65_536, Seek::Hole)),
        (65_536, 196_608)
    );
    w.tree.release(handle).unwrap();
    // Facts cannot be set.
    for name in ["user.stillframe.own", "user.stillframe.revert"] {
        let refused = w.tree.setxattr(w.node(path), name, b"a");
        assert_eq!(kind(refused.unwrap_err()), Kind::Permission);
    }
}

/// A base that could not be kept: never a byte of another instant, nor a write on top of one.
#[test]
fn a_clone_whose_base_failed_is_an_error_and_can_be_removed() {
    const SEGMENT: &str = "store/log/000001.seg";
    let mut w = world();
    w.write("vm/live.img", 0, &pattern(8192, 3));
    w.touch("vm", "a.img");
    w.link("vm/snapshots/a.img", "vm/clones/b.img").unwrap();
    w.write("vm/clones/b.img", 0, b"its own");
    w.write("vm/live.img", 0, &pattern(8192, 9));
    // Two more batches, so that the loss below is a gap in the log and not its end.
    w.write("vm/live.img", 65_536, &[1; 4096]);
    w.write("vm/live.img", 131_072, &[1; 4096]);
    let bytes = w.sim.peek(SEGMENT).unwrap();
    let marks: Vec<usize> = (0..bytes.len() - 8)
        .filter(|&at| bytes[at..].starts_with(b"SFbatch1"))
        .collect();
    let last = marks.len() - 1;
    // The table of the batch that preserved, and the copy of it in the next one.
    w.restart(true, |sim| {
        for &at in &marks[last - 2..last] {
            sim.poke(SEGMENT, at as u64 + 16, &[0xa5; 64]);
        }
    });
    let path = "vm/clones/b.img";
    let state = w.fact(path, "state").unwrap();
    assert!(state.starts_with("failed: "), "{state}");
    assert_eq!(w.walk(path).unwrap().size, World::VM);
    let handle = w.open(path, WRITE).unwrap();
    let mut buf = [0; 512];
    for offset in [0, 4096, 65_536] {
        let read = w.tree.read(handle, offset, &mut buf).map_err(kind);
        assert_eq!(read, Err(Kind::Failed), "{offset}");
        let written = w.tree.write(handle, offset, &[7; 512], false);
        assert_eq!(written.map_err(kind), Err(Kind::Failed), "{offset}");
    }
    assert_eq!(buf, [0; 512], "not one byte");
    w.tree.release(handle).unwrap();
    for source in ["vm/snapshots/a.img", path] {
        let refused = w.link(source, "vm/clones/c.img");
        assert_eq!(kind(refused.unwrap_err()), Kind::Failed, "{source}");
    }
    w.unlink(path).unwrap();
    assert_eq!(w.names("vm/clones"), [".", ".."]);
}
