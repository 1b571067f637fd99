//! What is durable when a directory operation is answered, and at once: shown by cutting the power.

use super::*;

/// Writes without asking for durability.
fn acknowledged(w: &World, offset: u64, data: &[u8]) {
    let handle = w.open("vm/live.img", WRITE).unwrap();
    assert_eq!(
        w.tree.write(handle, offset, data, false).unwrap(),
        data.len()
    );
}

#[test]
fn a_snapshot_and_every_write_before_it_survive_a_power_cut() {
    let mut w = world();
    for (i, name) in ["a.img", "b.img", "c.img"].iter().enumerate() {
        acknowledged(&w, 8192 * i as u64, name.as_bytes());
        let a = w.touch("vm", name);
        acknowledged(&w, 8192 * i as u64, b"later");
        w.restart(true, |sim| sim.power_cut());
        assert_eq!(w.walk(&format!("vm/snapshots/{name}")).unwrap(), a);
        let bytes = w.content(&format!("vm/snapshots/{name}"));
        assert_eq!(&bytes[8192 * i..8192 * i + 5], name.as_bytes());
    }
    assert_eq!(w.names("vm/snapshots")[2..], ["a.img", "b.img", "c.img"]);
}

#[test]
fn deletions_and_renames_survive_a_power_cut() {
    let mut w = world();
    for name in ["a.img", "b.img", "c.img"] {
        w.touch("vm", name);
    }
    let cut = |w: &mut World| w.restart(true, |sim| sim.power_cut());
    w.tree.unlink(w.node("vm/snapshots"), "a.img").unwrap();
    cut(&mut w);
    assert_eq!(w.names("vm/snapshots")[2..], ["b.img", "c.img"]);
    let directory = w.node("vm/snapshots");
    let number = w.node("vm/snapshots/b.img");
    w.tree
        .rename(directory, "b.img", directory, "d.img", RenameMode::Plain)
        .unwrap();
    cut(&mut w);
    assert_eq!(w.names("vm/snapshots")[2..], ["d.img", "c.img"]);
    assert_eq!(w.node("vm/snapshots/d.img"), number);
    let (source, clones) = (w.node("vm/snapshots/c.img"), w.node("vm/clones"));
    w.tree.link(source, clones, "x.img").unwrap();
    cut(&mut w);
    assert_eq!(w.names("vm/clones")[2..], ["x.img"]);
}

#[test]
fn the_times_of_clones_are_the_making_of_the_newest() {
    let w = world();
    let added = w.walk("vm").unwrap().mtime_ns;
    assert_eq!(w.walk("vm/clones").unwrap().mtime_ns, added);
    let a = w.touch("vm", "a.img").node;
    let directory = w.node("vm/clones");
    w.sim.advance(5_000_000_000);
    w.tree.link(a, directory, "x.img").unwrap();
    let first = w.walk("vm/clones").unwrap().mtime_ns;
    assert_eq!(first, w.walk("vm/clones/x.img").unwrap().ctime_ns);
    assert!(first >= added + 5_000_000_000);
    w.sim.advance(5_000_000_000);
    let second = w.tree.link(a, directory, "w.img").unwrap().ctime_ns;
    let shown = w.walk("vm/clones").unwrap();
    assert_eq!((shown.mtime_ns, shown.ctime_ns), (second, second));
    assert!(second > first);
}
