//! Numbers, times, space and listings: the facts a file shows.

use super::*;

const SECOND: i64 = 1_000_000_000;

fn xattr(w: &World, path: &str, name: &str) -> Result<String> {
    let value = w
        .tree
        .getxattr(w.node(path), &format!("user.stillframe.{name}"))?;
    Ok(String::from_utf8(value).unwrap())
}

#[test]
fn numbers_are_the_same_after_a_restart_and_never_given_again() {
    let mut w = world();
    let fixed = |w: &World| {
        [
            "",
            ".stillframe",
            ".stillframe/status.json",
            ".stillframe/metrics.prom",
        ]
        .map(|path| w.node(path).0)
    };
    assert_eq!(fixed(&w), [1, 2, 3, 4]);
    w.write("vm/live.img", 0, b"x");
    let a = w.touch("vm", "a.img");
    let b = w.touch("vm", "b.img");
    let paths = [
        "vm",
        "vm/live.img",
        "vm/snapshots",
        "odd",
        "vm/snapshots/a.img",
    ];
    let before = paths.map(|path| w.walk(path).unwrap());
    for kill in [false, true] {
        w.restart(kill, |_| {});
        assert_eq!(fixed(&w), [1, 2, 3, 4]);
        for (path, attr) in paths.iter().zip(&before) {
            assert_eq!(w.node(path), attr.node, "{path}");
        }
        let again = w.walk("vm/snapshots/a.img").unwrap();
        assert_eq!(again, a, "all of a snapshot's attributes stay");
    }
    w.tree.unlink(w.node("vm/snapshots"), "b.img").unwrap();
    w.restart(true, |_| {});
    let c = w.touch("odd", "c.img");
    assert!(c.node > b.node, "{c:?} {b:?}");
    let mut all: Vec<u64> = fixed(&w).to_vec();
    all.extend(paths.map(|path| w.node(path).0));
    all.extend(["odd/live.img", "odd/snapshots", "odd/snapshots/c.img"].map(|p| w.node(p).0));
    let count = all.len();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), count, "no number twice");
}

#[test]
fn mtime_stays_without_a_write_and_moves_a_whole_second_with_one() {
    let w = world();
    w.write("vm/live.img", 0, &pattern(8192, 1));
    let mut last = w.touch("vm", "s0.img");
    let live = w.walk("vm/live.img").unwrap();
    assert_eq!(last.mtime_ns, live.mtime_ns);
    assert_eq!(
        (live.ctime_ns, last.ctime_ns >= live.ctime_ns),
        (live.mtime_ns, true)
    );
    // The clock moves less than a second over all of this.
    for i in 1..6 {
        let same = w.touch("vm", &format!("same{i}.img"));
        assert_eq!(same.mtime_ns, last.mtime_ns, "nothing was written");
        assert!(same.ctime_ns > last.ctime_ns, "the instant is another");
        w.write("vm/live.img", 100, &[0xf0 + i]);
        let changed = w.touch("vm", &format!("s{i}.img"));
        let seconds = |attr: &Attr| attr.mtime_ns.div_euclid(SECOND);
        assert!(seconds(&changed) > seconds(&last), "one byte was");
        assert_eq!(changed.mtime_ns, w.walk("vm/live.img").unwrap().mtime_ns);
        last = changed;
    }
    // The other volume was not written to.
    let odd = w.touch("odd", "a.img");
    assert_eq!(odd.mtime_ns, w.walk("odd").unwrap().mtime_ns);
}

#[test]
fn an_unclean_stop_counts_as_a_change_and_a_clean_one_does_not() {
    let mut w = world();
    w.write("vm/live.img", 0, &pattern(8192, 1));
    let a = w.touch("vm", "a.img");
    w.restart(false, |_| {});
    let b = w.touch("vm", "b.img");
    assert_eq!(b.mtime_ns, a.mtime_ns);
    w.restart(true, |_| {});
    let c = w.touch("vm", "c.img");
    assert!(c.mtime_ns.div_euclid(SECOND) > a.mtime_ns.div_euclid(SECOND));
}

#[test]
fn times_of_directories_are_those_of_what_was_added() {
    let w = world();
    let added = |name: &str| {
        let name = Name::new(name).unwrap();
        w.engine.volume(&name).unwrap().info().added_ns
    };
    let mtime = |path: &str| w.walk(path).unwrap().mtime_ns;
    assert_eq!(mtime(""), added("odd").max(added("vm")));
    assert_eq!(mtime("vm"), added("vm"));
    assert_eq!(mtime("vm/snapshots"), added("vm"), "none yet");
    w.touch("vm", "a.img");
    let b = w.touch("vm", "b.img");
    assert_eq!(mtime("vm/snapshots"), b.ctime_ns);
    assert_eq!(mtime("vm/diffs"), b.ctime_ns);
    let directory = w.node("vm/snapshots");
    w.tree
        .rename(directory, "a.img", directory, "c.img", RenameMode::Plain)
        .unwrap();
    w.tree.unlink(directory, "c.img").unwrap();
    assert_eq!(mtime("vm/snapshots"), b.ctime_ns, "not moved by either");
    assert_eq!(mtime("vm/diffs"), b.ctime_ns, "not moved by either");
    for path in [".stillframe", ".stillframe/status.json"] {
        assert_eq!(mtime(path), w.status.now_ns(), "{path}");
    }
    let size = w.walk(".stillframe/status.json").unwrap().size;
    assert_eq!(size, w.content(".stillframe/status.json").len() as u64);
}

#[test]
fn blocks_are_what_the_content_uses() {
    let w = world();
    assert_eq!(w.walk("vm/live.img").unwrap().blocks, 0);
    w.write("vm/live.img", 65536, &pattern(8192, 1));
    assert_eq!(w.walk("vm/live.img").unwrap().blocks, 16);
    let a = w.touch("vm", "a.img");
    assert_eq!(a.blocks, 16);
    w.write("odd/live.img", 0, &pattern(World::ODD as usize, 1));
    let live = w.walk("odd/live.img").unwrap();
    assert_eq!(
        live.blocks,
        World::ODD.div_ceil(512),
        "never more than the size"
    );
    // Of a snapshot and of a clone, whose grains count in each layer, neither.
    let most = World::ODD.div_ceil(512);
    assert_eq!(w.touch("odd", "a.img").blocks, most);
    let clone = w.link("odd/snapshots/a.img", "odd/clones/c.img").unwrap();
    assert_eq!(clone.blocks, most);
    w.write("odd/clones/c.img", 0, &pattern(World::ODD as usize, 3));
    assert_eq!(w.walk("odd/clones/c.img").unwrap().blocks, most);
    w.write("vm/live.img", 0, &pattern(World::VM as usize, 2));
    assert_eq!(w.walk("vm/snapshots/a.img").unwrap().blocks, 16, "as then");
}

#[test]
fn the_space_shown_is_that_of_the_store() {
    let w = world();
    assert_eq!(w.tree.statfs().unwrap(), w.status.space().unwrap());
}

#[test]
fn snapshots_of_one_instant_share_a_group() {
    let w = world();
    w.touch("vm", "alone.img");
    let targets = ["vm", "odd"].map(|v| (Name::new(v).unwrap(), Name::new("both").unwrap()));
    w.engine.take_snapshots(&targets).unwrap();
    let group = xattr(&w, "vm/snapshots/both.img", "group").unwrap();
    assert_eq!(xattr(&w, "odd/snapshots/both.img", "group").unwrap(), group);
    let alone = xattr(&w, "vm/snapshots/alone.img", "group");
    assert!(matches!(alone, Err(TreeError::NoAttribute)));
    let instants = ["vm", "odd"].map(|v| {
        let path = format!("{v}/snapshots/both.img");
        w.walk(&path).unwrap().ctime_ns
    });
    assert_eq!(instants[0], instants[1]);
    assert_eq!(xattr(&w, "vm/live.img", "source").unwrap(), "sources/vm");
}

#[test]
fn unique_bytes_are_those_that_only_this_snapshot_needs() {
    let w = world();
    w.write("vm/live.img", 0, &pattern(16384, 1));
    w.touch("vm", "a.img");
    w.write("vm/live.img", 0, &pattern(8192, 2));
    w.touch("vm", "b.img");
    w.write("vm/live.img", 8192, &pattern(4096, 3));
    let unique = |name: &str| xattr(&w, &format!("vm/snapshots/{name}.img"), "unique").unwrap();
    assert_eq!(unique("a"), "8192", "the first two grains");
    assert_eq!(unique("b"), "0", "the third serves both");
}

#[test]
fn touching_an_existing_snapshot_takes_nothing() {
    let w = world();
    let a = w.touch("vm", "a.img");
    w.write("vm/live.img", 0, b"later");
    // The kernel looks up first and then opens for writing; two racing touches both create.
    let open = w.open("vm/snapshots/a.img", WRITE);
    assert!(matches!(open, Err(TreeError::ReadOnly)));
    let directory = w.node("vm/snapshots");
    let create = w.tree.create(directory, "a.img", WRITE, CALLER).map(drop);
    assert_eq!(create.map_err(kind), Err(Kind::Exists));
    assert_eq!(w.walk("vm/snapshots/a.img").unwrap(), a);
    assert_eq!(w.names("vm/snapshots"), [".", "..", "a.img"]);
    assert_eq!(w.content("vm/snapshots/a.img")[..5], [0; 5]);
}

#[test]
fn whoever_has_a_snapshot_open_is_not_disturbed_by_a_rename() {
    let w = world();
    w.write("vm/live.img", 0, b"before");
    let a = w.touch("vm", "a.img");
    let handle = w.open("vm/snapshots/a.img", READ).unwrap();
    let directory = w.node("vm/snapshots");
    w.tree
        .rename(directory, "a.img", directory, "b.img", RenameMode::Plain)
        .unwrap();
    w.write("vm/live.img", 0, b"after!");
    assert_eq!(&w.read_all(handle)[..6], b"before");
    assert_eq!(w.tree.getattr(a.node).unwrap(), a);
    // The old name is free for another one, which is another node.
    let again = w.touch("vm", "a.img");
    assert_ne!(again.node, a.node);
    assert_eq!(&w.content("vm/snapshots/a.img")[..6], b"after!");
    assert_eq!(&w.content("vm/snapshots/b.img")[..6], b"before");
    assert_eq!(w.tree.getattr(a.node).unwrap(), a);
}

#[test]
fn an_entry_that_stays_is_listed_once_whatever_is_deleted_around_it() {
    let w = world();
    for i in 0..20 {
        w.touch("vm", &format!("s{i:02}.img"));
    }
    let directory = w.node("vm/snapshots");
    // A reader that goes on with a new handle each time, from the offset it had.
    let (mut seen, mut after) = (Vec::new(), 0);
    loop {
        let handle = w.tree.opendir(directory).unwrap();
        w.tree.readdir(handle, 0, |_| true).unwrap();
        let mut last = None;
        w.tree
            .readdir(handle, after, |e| {
                seen.push(e.name.clone());
                last = Some(e.cookie);
                true
            })
            .unwrap();
        w.tree.release(handle).unwrap();
        let Some(cookie) = last else { break };
        assert!(cookie > after, "offsets only grow");
        after = cookie;
        // Odd ones go as soon as they or their neighbours were seen.
        let odd = seen.len() | 1;
        let _ = w.tree.unlink(directory, &format!("s{odd:02}.img"));
    }
    let mut expected = vec![".".to_owned(), "..".to_owned()];
    expected.extend((0..20).step_by(2).map(|i| format!("s{i:02}.img")));
    for name in &expected {
        assert_eq!(seen.iter().filter(|n| *n == name).count(), 1, "{name}");
    }
}

/// A number is good for as long as its node exists, also after the kernel forgot it and after a
/// restart: what a file handle that somebody has kept (an NFS client) asks for.
#[test]
fn a_number_alone_finds_its_node_and_its_parent() {
    let mut w = world();
    w.write("vm/live.img", 0, b"x");
    w.touch("vm", "a.img");
    w.write("vm/live.img", 0, b"y");
    w.touch("vm", "b.img");
    w.touch("odd", "a.img");
    let paths = [
        "vm",
        "vm/live.img",
        "vm/snapshots",
        "vm/clones",
        "vm/diffs",
        "vm/snapshots/a.img",
        "odd/snapshots/a.img",
        "vm/diffs/a..b.qcow2",
        "vm/diffs/a..live.json",
        ".stillframe",
        "",
    ];
    let before = paths.map(|path| w.walk(path).unwrap());
    w.restart(false, |_| {});
    for (path, attr) in paths.iter().zip(&before) {
        assert_eq!(w.tree.getattr(attr.node).unwrap().node, attr.node, "{path}");
        let dot = w.tree.lookup(attr.node, ".").unwrap();
        assert_eq!((dot.node, dot.kind), (attr.node, attr.kind), "{path}");
        let above = w.tree.lookup(attr.node, "..");
        let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        match attr.kind {
            FileKind::Directory => assert_eq!(above.unwrap().node, w.node(parent), "{path}"),
            FileKind::File => assert!(matches!(above, Err(TreeError::NotDirectory)), "{path}"),
        }
    }
    w.restart(false, |_| {});
    let (a, diff) = (before[5].node, before[7].node);
    w.tree.unlink(w.node("vm/snapshots"), "a.img").unwrap();
    for gone in [a, diff, NodeId(a.0 + 1000), NodeId(u64::MAX)] {
        for asked in [w.tree.getattr(gone), w.tree.lookup(gone, ".")] {
            assert_eq!(kind(asked.unwrap_err()), Kind::NotFound, "{gone:?}");
        }
    }
}
