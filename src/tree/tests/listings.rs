//! Listings with attributes: what they tell, what they leave to a lookup, and what they count.

use super::*;

/// A whole listing in one piece: each entry with its attributes.
fn plus(w: &World, path: &str) -> Vec<(DirEntry, Option<Attr>)> {
    let handle = w.tree.opendir(w.node(path)).unwrap();
    let mut all = Vec::new();
    let give = |entry: &DirEntry, attr: Option<&Attr>| {
        all.push((entry.clone(), attr.copied()));
        false
    };
    w.tree.readdir_plus(handle, 0, give).unwrap();
    w.tree.release(handle).unwrap();
    all
}

#[test]
fn a_listing_tells_what_a_lookup_would() {
    let w = world();
    w.write("vm/live.img", 5000, &pattern(9000, 3));
    for name in ["a.img", "b.img"] {
        w.touch("vm", name);
        w.write("vm/live.img", 0, name.as_bytes());
    }
    let snapshot = w.node("vm/snapshots/a.img");
    w.tree.link(snapshot, w.node("vm/clones"), "c.img").unwrap();
    for path in ["", "vm", "vm/snapshots", "vm/clones", "odd/snapshots"] {
        let listed = plus(&w, path);
        let names: Vec<_> = listed.iter().map(|(e, _)| e.name.clone()).collect();
        assert_eq!(names, w.names(path), "the same as without attributes");
        for (entry, attr) in listed {
            if entry.name.starts_with('.') && entry.name != ".stillframe" {
                assert_eq!(attr, None, "{path}: the kernel wants none of {entry:?}");
                continue;
            }
            let looked = w.walk(&format!("{path}/{}", entry.name)).unwrap();
            // Those would ask the source or the clone's files.
            let asks = entry.name == "live.img" || path == "vm/clones";
            assert_eq!(attr, (!asks).then_some(looked), "{path}");
            assert_eq!((entry.node, entry.kind), (looked.node, looked.kind));
        }
    }
}

#[test]
fn a_listing_reads_no_content() {
    let w = world();
    for name in ["a.img", "b.img", "c.img"] {
        w.touch("vm", name);
        w.write("vm/live.img", 0, name.as_bytes());
    }
    for path in ["vm/diffs", ".stillframe"] {
        let rendered = w.status.renders();
        let listed = plus(&w, path);
        assert_eq!(w.status.renders(), rendered, "no status was rendered");
        assert_eq!(w.tree.computed.len(), 0, "no diff was computed");
        assert!(listed.len() > 3, "{path}");
        assert!(listed.iter().all(|(_, attr)| attr.is_none()), "{path}");
        if path == ".stillframe" {
            w.node(".stillframe/status.json");
            assert_ne!(w.status.renders(), rendered, "a look renders");
        }
    }
    for (entry, _) in &plus(&w, "vm/diffs")[2..] {
        let looked = w.node(&format!("vm/diffs/{}", entry.name));
        assert_eq!(looked, entry.node);
    }
    assert_eq!(w.tree.computed.len(), 2, "a look at each pair computes");
}

#[test]
fn attributes_in_a_listing_are_as_of_the_hand_out() {
    let w = world();
    let handle = w.tree.opendir(w.node("vm")).unwrap();
    w.tree.readdir_plus(handle, 0, |_, _| true).unwrap();
    let before = w.walk("vm/snapshots").unwrap();
    w.touch("vm", "a.img");
    let mut told = None;
    let give = |entry: &DirEntry, attr: Option<&Attr>| {
        if entry.name == "snapshots" {
            told = attr.copied();
        }
        false
    };
    w.tree.readdir_plus(handle, 2, give).unwrap();
    w.tree.release(handle).unwrap();
    let after = w.walk("vm/snapshots").unwrap();
    assert_ne!(after, before, "the newest snapshot moves its times");
    assert_eq!(told, Some(after), "not as of the listing's beginning");
}

/// An entry that the listing could not tell, and that somebody looks up by its new name before the
/// kernel gives the listing's answer back.
#[test]
fn an_entry_renamed_during_a_listing_is_counted_also_if_it_was_not_known() {
    let w = world();
    let made = w.touch("vm", "a.img");
    w.link("vm/snapshots/a.img", "vm/clones/c.img").unwrap();
    let clone = w.node("vm/clones/c.img");
    for (directory, node, from, to) in [
        ("vm/snapshots", made.node, "a.img", "b.img"),
        ("vm/clones", clone, "c.img", "d.img"),
    ] {
        let directory = w.node(directory);
        let handle = w.tree.opendir(directory).unwrap();
        w.tree.readdir_plus(handle, 0, |_, _| true).unwrap();
        w.tree.forget(node, u64::MAX);
        let known = w.tree.known_nodes();
        let mode = RenameMode::Plain;
        w.tree.rename(directory, from, directory, to, mode).unwrap();
        w.tree.readdir_plus(handle, 2, |_, _| false).unwrap();
        assert_eq!(w.tree.known_nodes(), known + 1);
        assert_eq!(w.tree.lookup(directory, to).unwrap().node, node);
        w.tree.forget(node, 1);
        assert_eq!(w.tree.known_nodes(), known + 1, "the lookup still counts");
        w.tree.forget(node, 1);
        assert_eq!(w.tree.known_nodes(), known);
        w.tree.release(handle).unwrap();
    }
}

#[test]
fn an_entry_counts_when_it_was_delivered_and_only_then() {
    let w = world();
    for i in 0..10 {
        w.touch("vm", &format!("s{i}.img"));
        let node = w.node(&format!("vm/snapshots/s{i}.img"));
        w.tree.forget(node, 2);
    }
    let directory = w.node("vm/snapshots");
    let before = w.tree.known_nodes();
    let handle = w.tree.opendir(directory).unwrap();
    let mut after = 0;
    let mut delivered: Vec<NodeId> = Vec::new();
    for round in 0.. {
        let (mut room, from) = (4, after);
        let give = |entry: &DirEntry, attr: Option<&Attr>| {
            if room == 0 {
                return true;
            }
            room -= 1;
            after = entry.cookie;
            if let Some(attr) = attr {
                delivered.push(attr.node);
            }
            false
        };
        w.tree.readdir_plus(handle, from, give).unwrap();
        assert_eq!(w.tree.known_nodes(), before + delivered.len(), "{round}");
        if room == 4 {
            break;
        }
    }
    assert_eq!(delivered.len(), 10);
    for node in delivered {
        w.tree.forget(node, 1);
    }
    assert_eq!(w.tree.known_nodes(), before);
    w.tree.release(handle).unwrap();
}

#[test]
fn what_went_during_a_listing_is_listed_and_forgotten_like_the_rest() {
    let w = world();
    let made = ["a.img", "b.img", "c.img", "d.img"].map(|name| w.touch("vm", name));
    let directory = w.node("vm/snapshots");
    let known = w.tree.known_nodes();
    let handle = w.tree.opendir(directory).unwrap();
    w.tree.readdir_plus(handle, 0, |_, _| true).unwrap();
    // One is deleted and known, one deleted and forgotten, one has another's name, one is renamed.
    let rename = |from, to| {
        let mode = RenameMode::Plain;
        w.tree.rename(directory, from, directory, to, mode).unwrap();
    };
    w.tree.unlink(directory, "a.img").unwrap();
    w.tree.unlink(directory, "b.img").unwrap();
    w.tree.forget(made[1].node, 1);
    rename("c.img", "e.img");
    rename("d.img", "c.img");
    let (mut seen, mut after) = (Vec::new(), 0);
    let give = |entry: &DirEntry, attr: Option<&Attr>| {
        assert!(entry.cookie > after);
        after = entry.cookie;
        seen.push((entry.name.clone(), entry.node, attr.is_some()));
        false
    };
    w.tree.readdir_plus(handle, 2, give).unwrap();
    let expected = made.iter().zip(["a.img", "b.img", "c.img", "d.img"]);
    let expected: Vec<_> = expected
        .map(|(attr, name)| (name.to_owned(), attr.node, false))
        .collect();
    assert_eq!(
        seen, expected,
        "as of its beginning, with nothing that is not so"
    );
    // Every one comes back once for the listing; those that were known are known as before.
    for attr in &made {
        w.tree.forget(attr.node, 1);
    }
    assert_eq!(w.tree.known_nodes(), known - 1);
    assert_eq!(w.tree.getattr(made[2].node).unwrap().node, made[2].node);
    for index in [0, 2, 3] {
        w.tree.forget(made[index].node, 1);
    }
    assert_eq!(w.tree.known_nodes(), known - 4);
    w.tree.release(handle).unwrap();
    assert!(matches!(
        w.tree.readdir_plus(handle, 0, |_, _| false),
        Err(TreeError::BadHandle)
    ));
}
