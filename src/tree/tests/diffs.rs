//! `diffs/`: names, numbers, content, and what keeps an open diff.

use super::*;
use crate::image::diff::{DiffExtent, DiffList};
use crate::tree::diffs::ends_of;

fn list(w: &World, path: &str) -> DiffList {
    let bytes = w.content(path);
    assert_eq!(w.walk(path).unwrap().size, bytes.len() as u64);
    assert_eq!(bytes.last(), Some(&b'\n'));
    serde_json::from_slice(&bytes).unwrap()
}

fn spans(list: &DiffList) -> Vec<(u64, u64, bool)> {
    let span = |e: &DiffExtent| (e.start, e.length, e.zero);
    list.extents.iter().map(span).collect()
}

/// Snapshots a to d of both volumes with changes between them.
fn changed() -> World {
    let w = world();
    w.write("vm/live.img", 0, &pattern(65536, 3));
    w.touch("vm", "a.img");
    w.write("vm/live.img", 5000, b"x");
    w.write("vm/live.img", 20_000, &[0; 20_000]);
    w.touch("vm", "b.img");
    w.write("vm/live.img", 5000, b"y");
    w.write("vm/live.img", World::VM - 1, b"z");
    w.touch("vm", "c.img");
    w.touch("vm", "d.img");
    w
}

#[test]
fn consecutive_pairs_are_listed_and_others_resolve() {
    let w = changed();
    let expected = [
        ".",
        "..",
        "a..b.qcow2",
        "a..b.json",
        "b..c.qcow2",
        "b..c.json",
        "c..d.qcow2",
        "c..d.json",
    ];
    assert_eq!(w.names("vm/diffs"), expected);
    assert_eq!(w.names("odd/diffs"), [".", ".."]);
    for there in ["a..d.qcow2", "a..c.json", "a..live.json", "d..live.json"] {
        let attr = w.walk(&format!("vm/diffs/{there}")).unwrap();
        assert_eq!((attr.mode, attr.nlink), (0o400, 1), "{there}");
    }
    let absent = [
        "b..a.qcow2",
        "a..a.json",
        "a..live.qcow2",
        "live..a.json",
        "a..x.json",
        "x..a.json",
        "a.json",
        "a..b",
        "a..b..c.json",
        "..json",
        "x.img",
        "a..b.img",
    ];
    for absent in absent {
        let refused = w.walk(&format!("vm/diffs/{absent}")).unwrap_err();
        assert_eq!(kind(refused), Kind::NotFound, "{absent}");
    }
    // The older image, beside its overlay, is the snapshot itself.
    let image = w.walk("vm/diffs/a.img").unwrap();
    assert_eq!(image, w.walk("vm/snapshots/a.img").unwrap());
    w.tree.unlink(w.node("vm/snapshots"), "b.img").unwrap();
    assert_eq!(w.names("vm/diffs")[2..4], ["a..c.qcow2", "a..c.json"]);
}

#[test]
fn extents_are_what_was_written_to_the_grain_whoever_was_between() {
    let w = changed();
    // The zeros cover four whole grains; the first and last one of them keep other bytes.
    let ab = [
        (4096, 4096, false),
        (16384, 4096, false),
        (20480, 16384, true),
        (36864, 4096, false),
    ];
    let end = (World::VM - 4096, 4096, false);
    let check = |w: &World| {
        assert_eq!(spans(&list(w, "vm/diffs/a..b.json")), ab);
        assert_eq!(
            spans(&list(w, "vm/diffs/b..c.json")),
            [(4096, 4096, false), end]
        );
        assert_eq!(spans(&list(w, "vm/diffs/c..d.json")), []);
        let all: Vec<_> = ab.into_iter().chain([end]).collect();
        assert_eq!(spans(&list(w, "vm/diffs/a..d.json")), all);
        assert_eq!(spans(&list(w, "vm/diffs/a..c.json")), all);
        all
    };
    let all = check(&w);
    let names = ["a", "b"].map(|n| Name::new(n).unwrap());
    let infos = names.map(|n| w.engine.snapshot(&Name::new("vm").unwrap(), &n).unwrap());
    let ab_list = list(&w, "vm/diffs/a..b.json");
    let head = (
        ab_list.volume.as_str(),
        ab_list.from.as_str(),
        ab_list.to.as_str(),
    );
    assert_eq!(head, ("vm", "a", "b"));
    assert_eq!((ab_list.size, ab_list.grain), (World::VM, 4096));
    assert_eq!(ab_list.from_uuid, infos[0].uuid.to_string());
    assert_eq!(ab_list.to_uuid, Some(infos[1].uuid.to_string()));
    // What is written later belongs to later diffs, however b is kept by then.
    w.write("vm/live.img", 0, &pattern(World::VM as usize, 9));
    check(&w);
    let live = list(&w, "vm/diffs/d..live.json");
    assert_eq!(spans(&live), [(0, World::VM, false)]);
    assert_eq!((live.to.as_str(), live.to_uuid.clone()), ("live", None));
    // A deletion between the ends changes nothing, nor does a stop of either kind.
    w.tree.unlink(w.node("vm/snapshots"), "b.img").unwrap();
    while w.engine.maintain().unwrap() {}
    let mut w = w;
    for kill in [false, true] {
        w.restart(kill, |_| {});
        assert_eq!(spans(&list(&w, "vm/diffs/a..d.json")), all);
    }
}

#[test]
fn numbers_and_bytes_are_the_same_after_a_restart() {
    let mut w = changed();
    let files = [
        "a..b.qcow2",
        "a..b.json",
        "a..d.qcow2",
        "a..d.json",
        "c..d.qcow2",
    ];
    let look = |w: &World| {
        files.map(|f| {
            let path = format!("vm/diffs/{f}");
            (w.walk(&path).unwrap(), w.content(&path))
        })
    };
    let before = look(&w);
    for (attr, bytes) in &before {
        assert_eq!(attr.size, bytes.len() as u64);
        assert_eq!(attr.blocks, attr.size.div_ceil(512));
        let ends = ends_of(attr.node).unwrap();
        assert!(ends.0 < ends.1);
    }
    let taken = w.walk("vm/snapshots/d.img").unwrap().ctime_ns;
    assert_eq!(before[2].0.mtime_ns, taken, "the newer one's instant");
    assert_eq!(before[2].0.ctime_ns, taken);
    let mut numbers: Vec<_> = before.iter().map(|(attr, _)| attr.node).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), files.len());
    for kill in [false, true] {
        w.restart(kill, |_| {});
        assert!(look(&w) == before);
    }
}

#[test]
fn an_open_diff_reads_on_when_its_ends_are_renamed_and_deleted() {
    let w = changed();
    let bytes = w.content("vm/diffs/a..b.qcow2");
    let json = w.content("vm/diffs/a..b.json");
    let open = w.open("vm/diffs/a..b.qcow2", READ).unwrap();
    let text = w.open("vm/diffs/a..b.json", READ).unwrap();
    let attr = w.walk("vm/diffs/a..b.qcow2").unwrap();
    let dir = w.node("vm/snapshots");
    let plain = RenameMode::Plain;
    w.tree
        .rename(dir, "a.img", dir, "first.img", plain)
        .unwrap();
    assert_eq!(w.tree.getattr(attr.node).unwrap(), attr, "the same node");
    assert_eq!(w.node("vm/diffs/first..b.qcow2"), attr.node);
    let renamed = w.content("vm/diffs/first..b.qcow2");
    let has = |bytes: &[u8], name: &[u8]| bytes.windows(name.len()).any(|w| w == name);
    assert!(has(&renamed, b"first.img") && !has(&bytes, b"first.img"));
    for name in ["first.img", "b.img"] {
        w.tree.unlink(dir, name).unwrap();
    }
    while w.engine.maintain().unwrap() {}
    w.write("vm/live.img", 0, &pattern(World::VM as usize, 9));
    assert_eq!(w.tree.getattr(attr.node).unwrap().nlink, 0);
    assert!(w.read_all(open) == bytes && w.read_all(text) == json);
    assert_eq!(w.tree.seek(open, 10, Seek::Hole).unwrap(), attr.size);
    for handle in [open, text] {
        w.tree.flush(handle).unwrap();
        w.tree.release(handle).unwrap();
    }
    assert_eq!(kind(w.tree.getattr(attr.node).unwrap_err()), Kind::NotFound);
}

#[test]
fn a_diff_cannot_be_made_changed_or_removed() {
    let w = changed();
    let dir = w.node("vm/diffs");
    let made = w.tree.create(dir, "x.img", WRITE, CALLER).map(drop);
    assert_eq!(made.map_err(kind), Err(Kind::Permission));
    for name in ["a..b.qcow2", "a.img"] {
        let removed = w.tree.unlink(dir, name).map_err(kind);
        assert_eq!(removed, Err(Kind::Permission));
        let snapshots = w.node("vm/snapshots");
        for (from, to) in [(dir, dir), (dir, snapshots), (snapshots, dir)] {
            let moved = w.tree.rename(from, name, to, "x.img", RenameMode::Plain);
            assert_eq!(moved.map_err(kind), Err(Kind::Permission));
        }
    }
    for name in ["a..b.qcow2", "a..b.json", "a..live.json"] {
        let path = format!("vm/diffs/{name}");
        for flags in [WRITE, TRUNCATE] {
            assert!(matches!(w.open(&path, flags), Err(TreeError::ReadOnly)));
        }
        let handle = w.open(&path, READ).unwrap();
        let written = w.tree.write(handle, 0, b"x", false);
        assert!(matches!(written, Err(TreeError::ReadOnly)));
        let times = SetAttr {
            times: true,
            ..SetAttr::default()
        };
        assert_eq!(
            w.set(&path, times).map_err(kind).unwrap_err(),
            Kind::Permission
        );
        let size = SetAttr {
            size: Some(0),
            ..SetAttr::default()
        };
        assert!(matches!(w.set(&path, size), Err(TreeError::ReadOnly)));
        assert_eq!(w.tree.listxattr(w.node(&path)).unwrap(), b"");
    }
}

/// A bookmark stands where a snapshot stood: the same diff under the same name and number, also
/// after a restart, until it is deleted.
#[test]
fn a_bookmark_is_the_older_end_of_a_diff() {
    let mut w = changed();
    let names = ["a..b.qcow2", "a..c.json", "a..live.json"];
    let path = |name: &str| format!("vm/diffs/{name}");
    let before = names.map(|name| (w.node(&path(name)), w.content(&path(name))));
    let (vm, a) = (Name::new("vm").unwrap(), Name::new("a").unwrap());
    let held = w.open(&path("a..b.qcow2"), READ).unwrap();
    w.engine.delete_snapshot_keep_bookmark(&vm, &a).unwrap();
    assert_eq!(w.read_all(held), before[0].1, "through an open handle");
    w.tree.release(held).unwrap();
    for round in ["deleted", "stopped", "killed"] {
        for (name, (node, content)) in names.iter().zip(&before) {
            assert_eq!(w.node(&path(name)), *node, "{name} {round}");
            assert!(w.content(&path(name)) == *content, "{name} {round}");
            assert_eq!(w.tree.getattr(*node).unwrap().nlink, 1, "{name} {round}");
        }
        assert!(!w.names("vm/diffs").contains(&"a..b.qcow2".to_owned()));
        for gone in ["vm/diffs/a.img", "vm/snapshots/a.img", "vm/diffs/b..a.json"] {
            let refused = w.walk(gone).unwrap_err();
            assert_eq!(kind(refused), Kind::NotFound, "{gone} {round}");
        }
        while w.engine.maintain().unwrap() {}
        w.restart(round == "stopped", |_| {});
    }
    // Its name is taken until it goes.
    let directory = w.node("vm/snapshots");
    let taken = w.tree.create(directory, "a.img", WRITE, CALLER);
    assert_eq!(kind(taken.unwrap_err()), Kind::Exists);
    let json = w.open(&path("a..c.json"), READ).unwrap();
    w.engine.delete_bookmark(&vm, &a).unwrap();
    for (name, (node, _)) in names.iter().zip(&before) {
        let gone = w.walk(&path(name)).unwrap_err();
        assert_eq!(kind(gone), Kind::NotFound, "{name}");
        assert_eq!(w.tree.getattr(*node).is_ok(), *name == "a..c.json");
    }
    assert_eq!(w.read_all(json), before[1].1);
    w.tree.release(json).unwrap();
    w.touch("vm", "a.img");
}
