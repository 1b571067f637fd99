//! The tree over a real engine, without a mount: the sentences of `docs/semantics.md`.

mod changes;
mod clones;
mod diffs;
mod durable;
mod facts;
mod faults;
mod listings;
mod sentences;
mod whole_image;

use super::*;
use crate::error::Kind;
use crate::tree::fixture::{World, world};
use crate::units::Name;
use crate::volume::Zeroing;

const READ: OpenFlags = OpenFlags {
    write: false,
    truncate: false,
    append: false,
};
const WRITE: OpenFlags = OpenFlags {
    write: true,
    truncate: false,
    append: false,
};
const TRUNCATE: OpenFlags = OpenFlags {
    write: true,
    truncate: true,
    append: false,
};

/// The process that asks, unless a test says otherwise.
const CALLER: u32 = 77;

impl World {
    /// Walks a path like the kernel, from the root.
    fn walk(&self, path: &str) -> Result<Attr> {
        let mut attr = self.tree.getattr(ROOT)?;
        for name in path.split('/').filter(|n| !n.is_empty()) {
            attr = self.tree.lookup(attr.node, name)?;
        }
        Ok(attr)
    }

    fn node(&self, path: &str) -> NodeId {
        self.walk(path).unwrap().node
    }

    fn open(&self, path: &str, flags: OpenFlags) -> Result<HandleId> {
        Ok(self.tree.open(self.node(path), flags)?.handle)
    }

    fn read_all(&self, handle: HandleId) -> Vec<u8> {
        let size = self.tree.size(handle).unwrap();
        let mut bytes = vec![0; size as usize + 10];
        let len = self.tree.read(handle, 0, &mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    }

    fn content(&self, path: &str) -> Vec<u8> {
        let handle = self.open(path, READ).unwrap();
        let bytes = self.read_all(handle);
        self.tree.release(handle).unwrap();
        bytes
    }

    fn names(&self, path: &str) -> Vec<String> {
        let handle = self.tree.opendir(self.node(path)).unwrap();
        let mut names = Vec::new();
        self.tree
            .readdir(handle, 0, |e| {
                names.push(e.name.clone());
                false
            })
            .unwrap();
        self.tree.release(handle).unwrap();
        names
    }

    fn touch(&self, volume: &str, name: &str) -> Attr {
        let directory = self.node(&format!("{volume}/snapshots"));
        let (attr, opened) = self.tree.create(directory, name, WRITE, CALLER).unwrap();
        self.tree.release(opened.handle).unwrap();
        attr
    }

    fn write(&self, path: &str, offset: u64, data: &[u8]) {
        let handle = self.open(path, WRITE).unwrap();
        assert_eq!(
            self.tree.write(handle, offset, data, false).unwrap(),
            data.len()
        );
        self.tree.flush(handle).unwrap();
        self.tree.release(handle).unwrap();
    }

    fn set(&self, path: &str, set: SetAttr) -> Result<Attr> {
        self.tree.setattr(self.node(path), None, set)
    }
}

fn kind(error: TreeError) -> Kind {
    match error {
        TreeError::Engine(e) => e.kind(),
        other => panic!("{other:?}"),
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i / 512) as u8 ^ seed | 1).collect()
}

#[test]
fn the_mount_shows_volumes_and_nothing_that_does_not_work() {
    let w = world();
    assert_eq!(w.names(""), [".", "..", ".stillframe", "odd", "vm"]);
    assert_eq!(
        w.names("vm"),
        [".", "..", "live.img", "snapshots", "clones", "diffs"]
    );
    assert_eq!(w.names("vm/clones"), [".", ".."]);
    assert_eq!(w.names("vm/diffs"), [".", ".."]);
    assert_eq!(w.names("vm/snapshots"), [".", ".."]);
    assert_eq!(
        w.names(".stillframe"),
        [".", "..", "status.json", "metrics.prom"]
    );
    for absent in [
        "nope",
        "vm/clones/a.img",
        "vm/diffs/a.img",
        "vm/diffs/a..b.json",
        "vm/snapshots/a.img",
        ".stillframe/x",
        "a b",
    ] {
        assert_eq!(
            kind(w.walk(absent).unwrap_err()),
            Kind::NotFound,
            "{absent}"
        );
    }
    assert!(matches!(
        w.walk("vm/live.img/x"),
        Err(TreeError::NotDirectory)
    ));
}

#[test]
fn attributes_are_those_of_the_contract() {
    let w = world();
    let root = w.walk("").unwrap();
    assert_eq!(
        (root.mode, root.nlink, root.kind),
        (0o700, 5, FileKind::Directory)
    );
    assert_eq!(
        (
            w.walk("vm").unwrap().nlink,
            w.walk("vm/snapshots").unwrap().nlink
        ),
        (5, 2)
    );
    let live = w.walk("odd/live.img").unwrap();
    assert_eq!((live.mode, live.nlink, live.size), (0o600, 1, World::ODD));
    assert_eq!((live.uid, live.gid), (World::UID, World::GID));
    assert!(live.blocks <= World::ODD.div_ceil(512));
    let taken = w.touch("odd", "a.img");
    assert_eq!(
        (taken.mode, taken.size, taken.nlink),
        (0o400, World::ODD, 1)
    );
    assert_eq!(taken.mtime_ns, live.mtime_ns, "mtime is the content's");
    assert_eq!(w.walk("odd/snapshots/a.img").unwrap(), taken);
    let info = w
        .engine
        .snapshot(&Name::new("odd").unwrap(), &Name::new("a").unwrap())
        .unwrap();
    assert_eq!((taken.node.0, taken.ctime_ns), (info.ino, info.taken_ns));
}

#[test]
fn touch_takes_a_snapshot_that_never_changes() {
    let w = world();
    let old = pattern(9000, 3);
    w.write("vm/live.img", 4096, &old);
    w.touch("vm", "a.img");
    w.write("vm/live.img", 5000, &pattern(9000, 9));
    let mut expected = vec![0; World::VM as usize];
    expected[4096..4096 + 9000].copy_from_slice(&old);
    assert_eq!(w.content("vm/snapshots/a.img"), expected);
}

#[test]
fn the_creating_handle_reads_and_refuses_writes_and_times_may_be_set_while_it_is_open() {
    let w = world();
    let directory = w.node("vm/snapshots");
    let (attr, opened) = w.tree.create(directory, "a.img", WRITE, CALLER).unwrap();
    assert_eq!(opened.caching, Caching::Immutable);
    let handle = opened.handle;
    assert!(matches!(
        w.tree.write(handle, 0, b"x", false),
        Err(TreeError::ReadOnly)
    ));
    assert_eq!(w.read_all(handle).len() as u64, World::VM);
    let times = SetAttr {
        times: true,
        caller: CALLER,
        ..SetAttr::default()
    };
    let set = w.tree.setattr(attr.node, None, times).unwrap();
    assert_eq!(set.mtime_ns, attr.mtime_ns, "accepted and ignored");
    // The second of two touches at one time: it took nothing and must not think so.
    let second = SetAttr {
        caller: CALLER + 1,
        ..times
    };
    let refused = w.tree.setattr(attr.node, None, second);
    assert_eq!(kind(refused.unwrap_err()), Kind::Permission);
    w.tree.release(handle).unwrap();
    let late = w.tree.setattr(attr.node, None, times);
    assert_eq!(kind(late.unwrap_err()), Kind::Permission);
}

#[test]
fn only_good_names_in_the_right_place_take_a_snapshot() {
    let w = world();
    w.touch("vm", "a.img");
    let directory = w.node("vm/snapshots");
    for (name, expected) in [
        ("a.img", Kind::Exists),
        ("a", Kind::Invalid),
        (".a.img.Xy12", Kind::Invalid),
        (".img", Kind::Invalid),
        ("live.img", Kind::Invalid),
        ("a b.img", Kind::Invalid),
        ("a..b.img", Kind::Invalid),
    ] {
        assert_eq!(
            kind(w.tree.create(directory, name, WRITE, CALLER).unwrap_err()),
            expected,
            "{name}"
        );
    }
    for parent in ["", "vm", ".stillframe"] {
        let refused = w.tree.create(w.node(parent), "b.img", WRITE, CALLER);
        assert_eq!(kind(refused.unwrap_err()), Kind::Permission, "{parent}");
    }
    assert_eq!(w.names("vm/snapshots"), [".", "..", "a.img"]);
    assert_eq!(w.tree.open_handles(), 0);
}

#[test]
fn snapshots_are_renamed_within_their_directory_and_never_replace_one() {
    let w = world();
    let attr = w.touch("vm", "a.img");
    w.touch("vm", "b.img");
    let (vm, odd) = (w.node("vm/snapshots"), w.node("odd/snapshots"));
    let rename =
        |from, to, new_parent, mode| w.tree.rename(vm, from, new_parent, to, mode).map_err(kind);
    use RenameMode::{Plain, Special};
    assert_eq!(rename("a.img", "b.img", vm, Plain), Err(Kind::Exists));
    assert_eq!(rename("a.img", "c.img", odd, Plain), Err(Kind::Permission));
    assert_eq!(
        rename("a.img", "c.img", w.node("vm"), Plain),
        Err(Kind::Permission)
    );
    assert_eq!(rename("a.img", "b.img", vm, Special), Err(Kind::Invalid));
    assert_eq!(rename("a.img", "c.txt", vm, Plain), Err(Kind::Invalid));
    assert_eq!(rename("x.img", "c.img", vm, Plain), Err(Kind::NotFound));
    let live = w
        .tree
        .rename(w.node("vm"), "live.img", w.node("vm"), "x.img", Plain);
    assert_eq!(kind(live.unwrap_err()), Kind::Permission);
    assert_eq!(rename("a.img", "c.img", vm, Plain), Ok(()));
    assert_eq!(w.names("vm/snapshots"), [".", "..", "c.img", "b.img"]);
    // The kernel goes on using the number it has.
    assert_eq!(w.tree.getattr(attr.node).unwrap().node, attr.node);
    assert_eq!(w.node("vm/snapshots/c.img"), attr.node);
}

#[test]
fn a_deleted_snapshot_is_readable_while_open_and_gone_after() {
    let w = world();
    w.write("vm/live.img", 0, b"before");
    let attr = w.touch("vm", "a.img");
    let handle = w.open("vm/snapshots/a.img", READ).unwrap();
    let directory = w.node("vm/snapshots");
    w.tree.unlink(directory, "a.img").unwrap();
    w.write("vm/live.img", 0, b"after!");
    assert_eq!(w.names("vm/snapshots"), [".", ".."]);
    assert_eq!(w.tree.getattr(attr.node).unwrap().nlink, 0);
    assert_eq!(&w.read_all(handle)[..6], b"before");
    // A new one of that name is another node.
    let new = w.touch("vm", "a.img");
    assert_ne!(new.node, attr.node);
    assert_eq!(w.tree.getattr(attr.node).unwrap().nlink, 0);
    w.tree.release(handle).unwrap();
    assert_eq!(kind(w.tree.getattr(attr.node).unwrap_err()), Kind::NotFound);
    assert_eq!(
        kind(w.tree.unlink(directory, "x.img").unwrap_err()),
        Kind::NotFound
    );
}

#[test]
fn nothing_else_can_be_made_or_removed() {
    let w = world();
    for parent in ["", "vm", "vm/snapshots", "vm/diffs", ".stillframe"] {
        let refused = w.tree.refuse_name(w.node(parent));
        assert_eq!(kind(refused.unwrap_err()), Kind::Permission, "{parent}");
    }
    for (parent, name) in [
        ("", "vm"),
        ("vm", "live.img"),
        (".stillframe", "status.json"),
    ] {
        let refused = w.tree.unlink(w.node(parent), name);
        assert_eq!(kind(refused.unwrap_err()), Kind::Permission, "{name}");
    }
}

#[test]
fn a_write_ends_where_the_image_ends() {
    let w = world();
    let handle = w.open("odd/live.img", WRITE).unwrap();
    let end = World::ODD;
    assert_eq!(w.tree.write(handle, end - 3, b"abcdef", false).unwrap(), 3);
    assert!(matches!(
        w.tree.write(handle, end, b"x", false),
        Err(TreeError::PastEnd)
    ));
    assert!(matches!(
        w.tree.write(handle, u64::MAX, b"x", false),
        Err(TreeError::PastEnd)
    ));
    assert_eq!(w.tree.write(handle, end, b"", false).unwrap(), 0);
    let mut buf = [7; 10];
    assert_eq!(w.tree.read(handle, end - 3, &mut buf).unwrap(), 3);
    assert_eq!(&buf[..4], b"abc\x07");
    assert_eq!(w.tree.read(handle, end, &mut buf).unwrap(), 0);
    assert_eq!(w.tree.read(handle, u64::MAX, &mut buf).unwrap(), 0);
}

#[test]
fn a_handle_is_good_for_what_it_was_opened_for() {
    let w = world();
    w.touch("vm", "a.img");
    let reading = w.open("vm/live.img", READ).unwrap();
    assert!(matches!(
        w.tree.write(reading, 0, b"x", false),
        Err(TreeError::BadHandle)
    ));
    let zero = SpaceChange::Zero { keep_size: true };
    assert!(matches!(
        w.tree.allocate(reading, 0, 1, zero),
        Err(TreeError::BadHandle)
    ));
    for path in ["vm/snapshots/a.img", ".stillframe/status.json"] {
        assert!(
            matches!(w.open(path, WRITE), Err(TreeError::ReadOnly)),
            "{path}"
        );
        let truncate = OpenFlags {
            truncate: true,
            ..READ
        };
        assert!(
            matches!(w.open(path, truncate), Err(TreeError::ReadOnly)),
            "{path}"
        );
    }
    let append = OpenFlags {
        append: true,
        ..WRITE
    };
    assert_eq!(
        kind(w.open("vm/live.img", append).unwrap_err()),
        Kind::Permission
    );
    assert!(matches!(w.open("vm", READ), Err(TreeError::IsDirectory)));
    assert!(matches!(
        w.tree.opendir(w.node("vm/live.img")),
        Err(TreeError::NotDirectory)
    ));
    w.tree.release(reading).unwrap();
    let mut buf = [0; 1];
    assert!(matches!(
        w.tree.read(reading, 0, &mut buf),
        Err(TreeError::BadHandle)
    ));
    assert!(matches!(w.tree.release(reading), Err(TreeError::BadHandle)));
}

#[test]
fn a_rewrite_leaves_exactly_what_was_written() {
    let w = world();
    w.write("vm/live.img", 0, &pattern(World::VM as usize, 5));
    // Opening and closing alone changes nothing, and dd closes once before it writes.
    let handle = w.open("vm/live.img", TRUNCATE).unwrap();
    w.tree.flush(handle).unwrap();
    assert_eq!(w.content("vm/live.img"), pattern(World::VM as usize, 5));
    // cp of a file with two holes, interrupted: a prefix is replaced, the rest untouched.
    w.tree.write(handle, 8192, b"middle", false).unwrap();
    w.tree.flush(handle).unwrap();
    let mut expected = pattern(World::VM as usize, 5);
    expected[..8192].fill(0);
    expected[8192..8198].copy_from_slice(b"middle");
    assert_eq!(w.content("vm/live.img"), expected);
    // The final hole is only known through ftruncate.
    let other = SetAttr {
        size: Some(8198),
        ..SetAttr::default()
    };
    let node = w.node("vm/live.img");
    assert_eq!(
        kind(w.tree.setattr(node, Some(handle), other).unwrap_err()),
        Kind::Permission
    );
    let same = SetAttr {
        size: Some(World::VM),
        ..SetAttr::default()
    };
    w.tree.setattr(node, Some(handle), same).unwrap();
    w.tree.flush(handle).unwrap();
    expected[8198..].fill(0);
    assert_eq!(w.content("vm/live.img"), expected);
    w.tree.release(handle).unwrap();
}

#[test]
fn without_truncation_a_write_touches_only_its_range() {
    let w = world();
    let mut expected = pattern(World::VM as usize, 5);
    w.write("vm/live.img", 0, &expected);
    w.write("vm/live.img", 9000, b"spot");
    expected[9000..9004].copy_from_slice(b"spot");
    assert_eq!(
        w.set(
            "vm/live.img",
            SetAttr {
                size: Some(World::VM),
                ..SetAttr::default()
            }
        )
        .unwrap()
        .size,
        World::VM
    );
    assert_eq!(w.content("vm/live.img"), expected);
}

#[test]
fn fallocate_zeroes_and_never_changes_the_size() {
    let w = world();
    let end = World::ODD;
    let mut expected = pattern(end as usize, 5);
    w.write("odd/live.img", 0, &expected);
    let handle = w.open("odd/live.img", WRITE).unwrap();
    let allocate = |offset, len, change| w.tree.allocate(handle, offset, len, change);
    allocate(0, end, SpaceChange::Reserve).unwrap();
    assert!(matches!(
        allocate(1, end, SpaceChange::Reserve),
        Err(TreeError::PastEnd)
    ));
    allocate(10, 5000, SpaceChange::Punch).unwrap();
    expected[10..5010].fill(0);
    allocate(end - 10, 100, SpaceChange::Punch).unwrap();
    expected[end as usize - 10..].fill(0);
    allocate(end + 10, 100, SpaceChange::Punch).unwrap();
    let zero = |keep_size| SpaceChange::Zero { keep_size };
    assert!(matches!(
        allocate(end - 20, 30, zero(false)),
        Err(TreeError::PastEnd)
    ));
    assert_eq!(w.read_all(handle), expected);
    allocate(end - 20, 30, zero(true)).unwrap();
    allocate(6000, 10, zero(false)).unwrap();
    expected[end as usize - 20..].fill(0);
    expected[6000..6010].fill(0);
    assert_eq!(w.read_all(handle), expected);
    assert_eq!(
        kind(allocate(0, 0, SpaceChange::Punch).unwrap_err()),
        Kind::Invalid
    );
    assert_eq!(
        kind(allocate(u64::MAX, 2, SpaceChange::Punch).unwrap_err()),
        Kind::Invalid
    );
}

#[test]
fn seeking_finds_data_and_holes() {
    let w = world();
    w.write("vm/live.img", 65536, &pattern(4096, 1));
    w.touch("vm", "a.img");
    for path in ["vm/live.img", "vm/snapshots/a.img"] {
        let handle = w.open(path, READ).unwrap();
        let seek = |offset, what| w.tree.seek(handle, offset, what);
        assert_eq!(seek(0, Seek::Data).unwrap(), 65536, "{path}");
        assert_eq!(seek(65537, Seek::Data).unwrap(), 65537);
        assert_eq!(seek(0, Seek::Hole).unwrap(), 0);
        assert_eq!(seek(65536, Seek::Hole).unwrap(), 65536 + 4096);
        for (offset, what) in [
            (70000, Seek::Data),
            (World::VM, Seek::Hole),
            (u64::MAX, Seek::Data),
        ] {
            assert!(
                matches!(seek(offset, what), Err(TreeError::NoSuchOffset)),
                "{path} {offset}"
            );
        }
        w.tree.release(handle).unwrap();
    }
    let status = w.open(".stillframe/status.json", READ).unwrap();
    assert_eq!(w.tree.seek(status, 1, Seek::Data).unwrap(), 1);
    assert_eq!(
        w.tree.seek(status, 1, Seek::Hole).unwrap(),
        w.tree.size(status).unwrap()
    );
}

#[test]
fn attributes_can_only_be_set_to_what_they_are() {
    let w = world();
    w.touch("vm", "a.img");
    for (path, mode) in [
        ("vm/live.img", 0o600),
        ("vm/snapshots/a.img", 0o400),
        ("vm", 0o700),
    ] {
        let set = |set| w.set(path, set).map(|_| ()).map_err(kind);
        let none = SetAttr::default();
        assert_eq!(
            set(SetAttr {
                mode: Some(0o100_000 | mode),
                ..none
            }),
            Ok(()),
            "{path}"
        );
        assert_eq!(
            set(SetAttr {
                mode: Some(0o644),
                ..none
            }),
            Err(Kind::Permission),
            "{path}"
        );
        assert_eq!(
            set(SetAttr {
                uid: Some(World::UID),
                gid: Some(World::GID),
                ..none
            }),
            Ok(())
        );
        assert_eq!(
            set(SetAttr {
                uid: Some(World::UID + 1),
                ..none
            }),
            Err(Kind::Permission)
        );
        assert_eq!(
            set(SetAttr {
                gid: Some(World::GID + 1),
                ..none
            }),
            Err(Kind::Permission)
        );
    }
    let times = SetAttr {
        times: true,
        ..SetAttr::default()
    };
    w.set("vm/live.img", times).unwrap();
    for path in [
        "",
        "vm",
        "vm/snapshots",
        "vm/snapshots/a.img",
        ".stillframe/status.json",
    ] {
        assert_eq!(
            kind(w.set(path, times).unwrap_err()),
            Kind::Permission,
            "{path}"
        );
    }
    let size = SetAttr {
        size: Some(World::VM),
        ..SetAttr::default()
    };
    assert!(matches!(
        w.set("vm/snapshots/a.img", size),
        Err(TreeError::ReadOnly)
    ));
    assert!(matches!(w.set("vm", size), Err(TreeError::IsDirectory)));
}

#[test]
fn extended_attributes_say_what_a_snapshot_is() {
    let w = world();
    let first = w.touch("vm", "a.img");
    let second = w.touch("vm", "b.img");
    let text = |node, name: &str| {
        let value = w.tree.getxattr(node, &format!("user.stillframe.{name}"));
        value.map(|v| String::from_utf8(v).unwrap())
    };
    assert_eq!(text(first.node, "state").unwrap(), "active");
    assert_eq!(
        text(second.node, "parent").unwrap(),
        text(first.node, "uuid").unwrap()
    );
    assert!(matches!(
        text(first.node, "parent"),
        Err(TreeError::NoAttribute)
    ));
    let epoch = |node| text(node, "epoch").unwrap().parse::<u64>().unwrap();
    assert!(epoch(first.node) < epoch(second.node));
    assert!(text(first.node, "unique").unwrap().parse::<u64>().is_ok());
    let live = w.node("vm/live.img");
    assert_eq!(text(live, "state").unwrap(), "active");
    for name in ["security.capability", "user.other"] {
        assert!(matches!(
            w.tree.getxattr(live, name),
            Err(TreeError::NoAttribute)
        ));
        assert_eq!(
            kind(w.tree.refuse_xattr(name).unwrap_err()),
            Kind::Unsupported
        );
    }
    let refused = w.tree.refuse_xattr("user.stillframe.uuid");
    assert_eq!(kind(refused.unwrap_err()), Kind::Permission);
    for node in [first.node, second.node, live] {
        let list = w.tree.listxattr(node).unwrap();
        assert_eq!(list.last(), Some(&0));
        for name in list.split(|&b| b == 0).filter(|n| !n.is_empty()) {
            let name = std::str::from_utf8(name).unwrap();
            assert!(
                w.tree.getxattr(node, name).is_ok(),
                "{name} is listed and readable"
            );
        }
    }
    assert!(w.tree.listxattr(ROOT).unwrap().is_empty());
}

#[test]
fn a_listing_goes_on_where_it_was_while_entries_come_and_go() {
    let w = world();
    for i in 0..10 {
        w.touch("vm", &format!("s{i}.img"));
    }
    let directory = w.node("vm/snapshots");
    let handle = w.tree.opendir(directory).unwrap();
    let mut seen = Vec::new();
    let mut after = 0;
    loop {
        let mut batch = Vec::new();
        w.tree
            .readdir(handle, after, |e| {
                batch.push((e.name.clone(), e.cookie));
                batch.len() == 3
            })
            .unwrap();
        let Some((_, cookie)) = batch.last() else {
            break;
        };
        after = *cookie;
        seen.extend(batch.into_iter().map(|(name, _)| name));
        // Deleted behind, added in front.
        let _ = w.tree.unlink(directory, "s0.img");
        w.touch("vm", &format!("new{after}.img"));
    }
    let mut expected = vec![".".to_owned(), "..".to_owned()];
    expected.extend((0..10).map(|i| format!("s{i}.img")));
    assert_eq!(seen, expected, "each once");
    let mut again = 0;
    w.tree
        .readdir(handle, 0, |_| {
            again += 1;
            false
        })
        .unwrap();
    assert!(again > seen.len(), "rewinding renews the listing");
}

#[test]
fn status_files_are_as_of_opening() {
    let w = world();
    let handle = w.open(".stillframe/status.json", READ).unwrap();
    let first = w.read_all(handle);
    let other = w.content(".stillframe/status.json");
    assert_ne!(first, other, "the fixture renders something new each time");
    assert_eq!(w.read_all(handle), first);
    let mut buf = [0; 3];
    assert_eq!(
        w.tree
            .read(handle, first.len() as u64 - 2, &mut buf)
            .unwrap(),
        2
    );
    assert_eq!(w.tree.read(handle, u64::MAX, &mut buf).unwrap(), 0);
}

#[test]
fn the_table_of_nodes_forgets_what_the_kernel_forgets() {
    let w = world();
    let before = w.tree.known_nodes();
    let attr = w.touch("vm", "a.img");
    let directory = w.node("vm/snapshots");
    w.tree.lookup(directory, "a.img").unwrap();
    w.tree.forget(attr.node, 1);
    assert!(w.tree.getattr(attr.node).is_ok(), "one lookup is left");
    w.tree.forget(attr.node, 1);
    assert_eq!(w.tree.known_nodes(), before + 2);
    w.tree.forget(attr.node, 1);
    w.tree.forget(ROOT, 5);
    assert!(w.tree.getattr(ROOT).is_ok());
    // "vm" and "snapshots" were looked up on the way.
    assert_eq!(w.tree.known_nodes(), before + 2);
}

#[test]
fn what_the_command_line_does_is_seen_at_once() {
    let w = world();
    let attr = w.touch("vm", "a.img");
    let (volume, a, b) = (
        Name::new("vm").unwrap(),
        Name::new("a").unwrap(),
        Name::new("b").unwrap(),
    );
    w.engine.rename_snapshot(&volume, &a, &b).unwrap();
    assert_eq!(w.tree.getattr(attr.node).unwrap().nlink, 1);
    assert_eq!(w.node("vm/snapshots/b.img"), attr.node);
    let handle = w.open("vm/snapshots/b.img", READ).unwrap();
    w.tree.release(handle).unwrap();
    w.engine.delete_snapshot(&volume, &b).unwrap();
    assert_eq!(kind(w.tree.getattr(attr.node).unwrap_err()), Kind::NotFound);
    w.engine
        .volume(&volume)
        .unwrap()
        .zero(0, 10, Zeroing::Zero)
        .unwrap();
}

#[test]
fn what_was_written_through_a_handle_is_synced_before_its_flush_is_answered() {
    let w = world();
    w.touch("vm", "a.img");
    let handle = w.open("vm/live.img", TRUNCATE).unwrap();
    let synced = |what: &str, run: &dyn Fn() -> Result<()>| {
        let before = w.source_syncs("vm");
        run().unwrap();
        assert!(w.source_syncs("vm") >= before, "{what}");
        w.source_syncs("vm") > before
    };
    let flush = || w.tree.flush(handle);
    let write = |durable| w.tree.write(handle, 8192, b"x", durable).map(drop);
    assert!(!synced("flush of a handle that wrote nothing", &flush));
    assert!(!synced("write", &|| write(false)));
    assert!(synced("flush after a write, gaps zeroed", &flush));
    assert!(!synced("second flush", &flush));
    // Equal bytes were not written again and are durable already.
    assert!(!synced("equal O_DSYNC write", &|| write(true)));
    let other = |byte: u8| w.tree.write(handle, 8192, &[byte], true).map(drop);
    assert!(synced("O_DSYNC write", &|| other(1)));
    assert!(!synced("fsync with nothing to do", &|| w
        .tree
        .fsync(handle)));
    write(false).unwrap();
    assert!(synced("fsync", &|| w.tree.fsync(handle)));
    let punch = || w.tree.allocate(handle, 8192, 4096, SpaceChange::Punch);
    assert!(!synced("punch", &punch));
    assert!(synced("flush after a punch", &flush));
    // Another handle of the file syncs what this one wrote.
    write(false).unwrap();
    let reader = w.open("vm/live.img", READ).unwrap();
    assert!(synced("fsync of another handle", &|| w.tree.fsync(reader)));
    assert!(!synced("flush of a reader", &|| w.tree.flush(reader)));
    let snapshot = w.open("vm/snapshots/a.img", READ).unwrap();
    assert!(!synced("fsync of a snapshot", &|| w.tree.fsync(snapshot)));
}

#[test]
fn too_many_open_files_are_refused_and_nothing_else_breaks() {
    let handles = Handles::default();
    for _ in 0..HANDLES_MAX {
        handles.insert(handle::Handle::Status(Vec::new())).unwrap();
    }
    let refused = handles.insert(handle::Handle::Status(Vec::new()));
    assert!(matches!(refused, Err(TreeError::TooManyOpen)));
    handles.remove(HandleId(1)).unwrap();
    let next = handles.insert(handle::Handle::Status(Vec::new())).unwrap();
    assert_eq!(next.0, HANDLES_MAX as u64 + 1, "numbers are not used twice");
}
