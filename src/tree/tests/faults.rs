//! What the tree answers when content cannot be kept, written or vouched for.

use super::*;
use crate::sys::sim::{Op, SimWorld};

const EIO: i32 = 5;
const SEGMENT: &str = "store/log/000001.seg";

fn found(haystack: &[u8], needle: &[u8]) -> Vec<usize> {
    let windows = haystack.windows(needle.len()).enumerate();
    windows
        .filter(|(_, w)| *w == needle)
        .map(|(at, _)| at)
        .collect()
}

/// Breaks every place of the log's first segment that holds these bytes.
fn break_log(sim: &SimWorld, needle: &[u8]) -> usize {
    let places = found(&sim.peek(SEGMENT).unwrap(), needle);
    for &at in &places {
        sim.poke(SEGMENT, at as u64, &vec![0xa5; needle.len()]);
    }
    places.len()
}

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

#[test]
fn preserved_bytes_that_rot_are_an_error_and_nothing_else_is() {
    let w = world();
    w.write("vm/live.img", 0, &pattern(8192, 3));
    w.write("vm/live.img", 5000, b"only here and nowhere else");
    w.touch("vm", "a.img");
    w.write("vm/live.img", 0, &pattern(8192, 9));
    assert_eq!(break_log(&w.sim, b"only here and nowhere else"), 1);
    let handle = w.open("vm/snapshots/a.img", READ).unwrap();
    let mut buf = [0; 4096];
    let rotten = w.tree.read(handle, 4096, &mut buf).map_err(kind);
    assert_eq!(rotten, Err(Kind::Damaged));
    let across = w.tree.read(handle, 4000, &mut buf[..200]).map_err(kind);
    assert_eq!(across, Err(Kind::Damaged), "a part is as bad as the whole");
    assert_eq!(w.tree.read(handle, 0, &mut buf).unwrap(), 4096);
    assert_eq!(buf[..], pattern(8192, 3)[..4096]);
    assert_eq!(w.content("vm/live.img")[..8192], pattern(8192, 9));
}

#[test]
fn a_snapshot_that_could_not_be_kept_answers_no_byte_and_can_be_deleted() {
    let mut w = world();
    w.write("vm/live.img", 0, &pattern(8192, 3));
    let attr = w.touch("vm", "a.img");
    w.write("vm/live.img", 0, &pattern(8192, 9));
    // Two more batches, so that the loss below is a gap in the log and not its end.
    w.write("vm/live.img", 65536, &[1; 4096]);
    w.write("vm/live.img", 131_072, &[1; 4096]);
    w.write("odd/live.img", 0, b"of no snapshot");
    let marks = found(&w.sim.peek(SEGMENT).unwrap(), b"SFbatch1");
    let last = marks.len() - 1;
    // The table of the batch that preserved, and the copy of it in the next one.
    let broken = &marks[last - 2..last];
    w.restart(true, |sim| {
        for &at in broken {
            sim.poke(SEGMENT, at as u64 + 16, &[0xa5; 64]);
        }
    });
    let path = "vm/snapshots/a.img";
    let state = w.tree.getxattr(w.node(path), "user.stillframe.state");
    let state = String::from_utf8(state.unwrap()).unwrap();
    assert!(state.starts_with("failed: "), "{state}");
    let shown = w.walk(path).unwrap();
    assert_eq!(shown.mtime_ns, attr.mtime_ns + 1, "for caches above");
    let mtime_ns = attr.mtime_ns;
    assert_eq!(Attr { mtime_ns, ..shown }, attr, "it is there");
    let handle = w.open(path, READ).unwrap();
    let mut buf = [0; 512];
    for offset in [0, 4096, 65536, World::VM - 512] {
        let read = w.tree.read(handle, offset, &mut buf).map_err(kind);
        assert_eq!(read, Err(Kind::Failed), "{offset}");
        for what in [Seek::Data, Seek::Hole] {
            let found = w.tree.seek(handle, offset, what).map_err(kind);
            assert_eq!(found, Err(Kind::Failed), "{offset} {what:?}");
        }
    }
    assert_eq!(buf, [0; 512], "not one byte");
    assert_eq!(w.content("vm/live.img")[..8192], pattern(8192, 9));
    // Life goes on: another one can be taken, and this one removed.
    w.touch("vm", "b.img");
    w.write("vm/live.img", 0, &pattern(8192, 30));
    w.touch("vm", "c.img");
    for name in ["a..b.qcow2", "a..b.json", "a..c.json", "a..live.json"] {
        let refused = w.walk(&format!("vm/diffs/{name}")).map_err(kind);
        assert_eq!(refused.unwrap_err(), Kind::Failed, "{name}");
    }
    let listed = [".", "..", "b..c.qcow2", "b..c.json"];
    assert_eq!(w.names("vm/diffs"), listed, "of those that can be read");
    assert_eq!(w.content("vm/snapshots/b.img")[..8192], pattern(8192, 9));
    let directory = w.node("vm/snapshots");
    w.tree.unlink(directory, "a.img").unwrap();
    let deleted = w.tree.read(handle, 0, &mut buf).map_err(kind);
    assert_eq!(deleted, Err(Kind::Failed), "also while it is still open");
    w.tree.release(handle).unwrap();
    assert_eq!(w.names("vm/snapshots"), [".", "..", "b.img", "c.img"]);
}

#[test]
fn a_read_that_fails_on_the_source_is_an_error() {
    let w = world();
    w.write("vm/live.img", 0, &pattern(8192, 3));
    w.touch("vm", "a.img");
    for path in ["vm/live.img", "vm/snapshots/a.img"] {
        let handle = w.open(path, READ).unwrap();
        let mut buf = [0; 4096];
        w.sim.fail_nth(Op::Read, 1, EIO);
        let failed = w.tree.read(handle, 0, &mut buf).map_err(kind);
        assert_eq!(failed, Err(Kind::Io), "{path}");
        assert_eq!(w.tree.read(handle, 0, &mut buf).unwrap(), 4096, "{path}");
    }
}

#[test]
fn a_write_that_finds_no_space_to_preserve_changes_nothing() {
    let w = world();
    let mut live = pattern(World::VM as usize, 1);
    w.write("vm/live.img", 0, &live);
    w.touch("vm", "a.img");
    w.sim.set_space("store", Some(0));
    let handle = w.open("vm/live.img", WRITE).unwrap();
    let mut refused = None;
    // Space that was written ahead may serve for a while.
    for round in 0u8..8 {
        let new = pattern(World::VM as usize, 16 + round);
        for (at, piece) in new.chunks(65536).enumerate().map(|(i, p)| (i * 65536, p)) {
            match w.tree.write(handle, at as u64, piece, false) {
                Ok(len) => live[at..at + len].copy_from_slice(piece),
                Err(e) => refused = Some(kind(e)),
            }
            if refused.is_some() {
                break;
            }
        }
        if refused.is_some() || !touched(&w, &format!("s{round}.img")) {
            break;
        }
    }
    assert_eq!(refused, Some(Kind::NoSpace));
    w.tree.flush(handle).unwrap();
    assert_eq!(w.content("vm/live.img"), live);
    assert_eq!(
        w.content("vm/snapshots/a.img"),
        pattern(World::VM as usize, 1)
    );
    w.sim.set_space("store", None);
    w.write("vm/live.img", 0, &pattern(World::VM as usize, 99));
    assert_eq!(
        w.content("vm/snapshots/a.img"),
        pattern(World::VM as usize, 1)
    );
}

fn touched(w: &World, name: &str) -> bool {
    let directory = w.node("vm/snapshots");
    match w.tree.create(directory, name, WRITE, CALLER) {
        Ok((_, opened)) => w.tree.release(opened.handle).is_ok(),
        Err(_) => false,
    }
}

#[test]
fn after_a_failed_sync_nothing_is_promised_until_an_operator_accepts() {
    let w = world();
    w.write("vm/live.img", 0, &pattern(8192, 3));
    w.touch("vm", "a.img");
    let handle = w.open("vm/live.img", WRITE).unwrap();
    w.tree.write(handle, 0, &pattern(8192, 9), false).unwrap();
    w.sim.fail_nth(Op::Sync, 1, EIO);
    let close = w.tree.flush(handle).map_err(kind);
    assert_eq!(close, Err(Kind::Failed), "close returns it");
    for _ in 0..2 {
        let again = w.tree.fsync(handle).map_err(kind);
        assert_eq!(again, Err(Kind::Failed), "a second sync proves nothing");
    }
    let durable = w.tree.write(handle, 0, b"x", true).map_err(kind);
    assert_eq!(durable, Err(Kind::Failed));
    assert!(!touched(&w, "b.img"), "a snapshot must be durable");
    let live = w.node("vm/live.img");
    let state = || String::from_utf8(w.tree.getxattr(live, "user.stillframe.state").unwrap());
    assert!(state().unwrap().starts_with("suspect: "));
    w.engine.accept_volume(&name("vm")).unwrap();
    assert_eq!(state().unwrap(), "active");
    w.tree.flush(handle).unwrap();
    assert!(touched(&w, "b.img"));
    assert_eq!(w.content("vm/snapshots/a.img")[..8192], pattern(8192, 3));
}

/// Space is kept for it: deletions are the way out of a full store.
#[test]
fn snapshots_can_be_deleted_on_a_full_store_until_what_is_kept_for_it_is_used_up() {
    let w = world();
    w.write("vm/live.img", 0, &pattern(World::VM as usize, 1));
    w.touch("vm", "a.img");
    w.touch("vm", "b.img");
    w.sim.set_space("store", Some(0));
    let handle = w.open("vm/live.img", WRITE).unwrap();
    let mut refused = None;
    for round in 0u8..8 {
        let new = pattern(World::VM as usize, 16 + round);
        let mut pieces = new.chunks(65536).enumerate();
        refused = pieces.find_map(|(i, p)| w.tree.write(handle, i as u64 * 65536, p, false).err());
        if refused.is_some() || !touched(&w, &format!("s{round}.img")) {
            break;
        }
    }
    assert_eq!(refused.map(kind), Some(Kind::NoSpace), "the store is full");
    let directory = w.node("vm/snapshots");
    w.tree.unlink(directory, "a.img").unwrap();
    // Every change of the catalogue takes a little of what is kept; in the end there is none left.
    let mut names = ["b.img", "c.img"];
    let ends = (0..100_000).find_map(|_| {
        let [from, to] = names;
        let renamed = w
            .tree
            .rename(directory, from, directory, to, RenameMode::Plain);
        names.swap(0, 1);
        renamed.err()
    });
    assert_eq!(
        ends.map(kind),
        Some(Kind::NoSpace),
        "what is kept has an end"
    );
    names.swap(0, 1);
    let before = w.names("vm/snapshots");
    if let Err(e) = w.tree.unlink(directory, names[0]) {
        assert_eq!(kind(e), Kind::NoSpace);
        assert_eq!(w.names("vm/snapshots"), before, "refused is not done");
    }
    w.sim.set_space("store", None);
    let still = w.names("vm/snapshots").contains(&names[0].to_owned());
    assert_eq!(w.tree.unlink(directory, names[0]).is_ok(), still);
}
