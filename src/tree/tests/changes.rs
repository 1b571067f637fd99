//! Revert and resize as the tree runs them: who is in the way, and who hears of it.

use std::sync::{Arc, Mutex};

use super::*;

const REVERT: &str = "user.stillframe.revert";

/// The nodes of which somebody is told that they have changed.
fn watched(w: &World) -> Arc<Mutex<Vec<NodeId>>> {
    let told = Arc::new(Mutex::new(Vec::new()));
    let tell = Arc::clone(&told);
    w.tree
        .watch_changes(move |node| tell.lock().unwrap().push(node));
    told
}

#[test]
fn setting_an_attribute_of_the_live_image_reverts_the_volume() {
    let w = world();
    w.write("vm/live.img", 0, &pattern(20_000, 3));
    w.touch("vm", "a.img");
    let a = w.content("vm/snapshots/a.img");
    w.write("vm/live.img", 5000, &pattern(300_000, 9));
    let changed = w.content("vm/live.img");
    let told = watched(&w);
    let live = w.node("vm/live.img");
    w.tree.setxattr(live, REVERT, b"a").unwrap();
    assert_eq!(*told.lock().unwrap(), [live]);
    assert_eq!(w.content("vm/live.img"), a);
    assert_eq!(w.content("vm/snapshots/a.img"), a);
    // What it was is a snapshot now, and reverting to that undoes it.
    let names = w.names("vm/snapshots");
    assert_eq!(names.len(), 4, "{names:?}");
    let undo = names[3].trim_end_matches(".img");
    assert_eq!(w.content(&format!("vm/snapshots/{undo}.img")), changed);
    w.tree.setxattr(live, REVERT, undo.as_bytes()).unwrap();
    assert_eq!(w.content("vm/live.img"), changed);
    // It is a deed, not a fact.
    assert!(matches!(
        w.tree.getxattr(live, REVERT),
        Err(TreeError::NoAttribute)
    ));
}

#[test]
fn a_revert_is_refused_while_somebody_writes_and_elsewhere() {
    let w = world();
    w.write("vm/live.img", 0, b"before");
    w.touch("vm", "a.img");
    w.write("vm/live.img", 0, b"after!");
    let live = w.node("vm/live.img");
    let set = |node, value: &[u8]| w.tree.setxattr(node, REVERT, value);
    let told = watched(&w);
    let (one, two) = (w.open("vm/live.img", WRITE), w.open("vm/live.img", WRITE));
    let reader = w.open("vm/live.img", READ).unwrap();
    let (one, two) = (one.unwrap(), two.unwrap());
    let begun = std::time::Instant::now();
    assert_eq!(kind(set(live, b"a").unwrap_err()), Kind::Busy);
    let waited = begun.elapsed();
    assert!(
        waited.as_secs() >= 2,
        "a close may be on its way: {waited:?}"
    );
    w.tree.release(one).unwrap();
    assert_eq!(kind(set(live, b"a").unwrap_err()), Kind::Busy);
    w.tree.release(two).unwrap();
    // Writers of another volume are in nobody's way, nor are readers.
    let other = w.open("odd/live.img", WRITE).unwrap();
    for (value, expected) in [
        (&b"nope"[..], Kind::NotFound),
        (b"", Kind::Invalid),
        (b"a b", Kind::Invalid),
        (b"\xff", Kind::Invalid),
        (b"live", Kind::Invalid),
    ] {
        assert_eq!(kind(set(live, value).unwrap_err()), expected, "{value:?}");
    }
    for path in ["vm", "vm/snapshots/a.img", ".stillframe/status.json"] {
        let refused = set(w.node(path), b"a");
        assert_eq!(kind(refused.unwrap_err()), Kind::Permission, "{path}");
    }
    assert!(told.lock().unwrap().is_empty(), "nothing was done");
    assert_eq!(&w.content("vm/live.img")[..6], b"after!");
    set(live, b"a").unwrap();
    assert_eq!(
        &w.read_all(reader)[..6],
        b"before",
        "through an open handle"
    );
    w.tree.release(reader).unwrap();
    w.tree.release(other).unwrap();
}

#[test]
fn a_writer_who_is_just_closing_is_waited_for() {
    let w = world();
    w.write("vm/live.img", 0, b"before");
    w.touch("vm", "a.img");
    w.write("vm/live.img", 0, b"after!");
    let live = w.node("vm/live.img");
    let writer = w.open("vm/live.img", WRITE).unwrap();
    let (closing, closed) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let closed = closed;
            closed.recv().unwrap();
            w.tree.release(writer).unwrap();
        });
        closing.send(()).unwrap();
        w.tree.setxattr(live, REVERT, b"a").unwrap();
    });
    assert_eq!(&w.content("vm/live.img")[..6], b"before");
}

#[test]
fn a_forced_revert_lets_writers_go_on_afterwards() {
    let w = world();
    w.write("vm/live.img", 0, b"before");
    w.touch("vm", "a.img");
    let writer = w.open("vm/live.img", WRITE).unwrap();
    w.tree.write(writer, 0, b"after!", false).unwrap();
    let (vm, a) = (Name::new("vm").unwrap(), Name::new("a").unwrap());
    let refused = w.tree.revert(&vm, &a, false, &mut |_, _| {});
    assert_eq!(kind(refused.unwrap_err()), Kind::Busy);
    let mut news = Vec::new();
    let done = w
        .tree
        .revert(&vm, &a, true, &mut |done, all| news.push((done, all)));
    let done = done.unwrap();
    assert!(
        done.written > 0 && done.written <= 65_536,
        "{}",
        done.written
    );
    assert!(news.iter().all(|(done, all)| done <= all), "{news:?}");
    w.tree.write(writer, 6, b" and on", true).unwrap();
    assert_eq!(&w.read_all(writer)[..13], b"before and on");
    w.tree.release(writer).unwrap();
}

#[test]
fn a_volume_is_resized_and_its_snapshots_are_not() {
    let mut w = world();
    w.write("vm/live.img", 0, &pattern(World::VM as usize, 5));
    w.touch("vm", "a.img");
    let vm = Name::new("vm").unwrap();
    let told = watched(&w);
    let handle = w.open("vm/live.img", WRITE).unwrap();
    let large = World::VM + 100_000;
    assert_eq!(w.tree.resize(&vm, large).unwrap().size, large);
    assert_eq!(*told.lock().unwrap(), [w.node("vm/live.img")]);
    // Also through a handle that was open before.
    assert_eq!(w.tree.size(handle).unwrap(), large);
    assert_eq!(w.walk("vm/live.img").unwrap().size, large);
    let end = &w.read_all(handle)[World::VM as usize..];
    assert!(end.len() == 100_000 && end.iter().all(|&b| b == 0));
    w.tree.write(handle, large - 3, b"end", false).unwrap();
    // A writer would lose what he writes behind the new end.
    let refused = w.tree.resize(&vm, 8192);
    assert_eq!(kind(refused.unwrap_err()), Kind::Busy);
    w.tree.flush(handle).unwrap();
    w.tree.release(handle).unwrap();
    w.touch("vm", "b.img");
    w.tree.resize(&vm, 8192).unwrap();
    assert_eq!(
        w.content("vm/live.img"),
        pattern(World::VM as usize, 5)[..8192]
    );
    for kill in [false, true] {
        let a = w.content("vm/snapshots/a.img");
        assert_eq!(a, pattern(World::VM as usize, 5));
        let b = w.content("vm/snapshots/b.img");
        assert_eq!((b.len() as u64, &b[b.len() - 3..]), (large, &b"end"[..]));
        assert_eq!(w.walk("vm/live.img").unwrap().size, 8192);
        w.restart(kill, |_| {});
    }
}
