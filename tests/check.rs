//! `stillframe check` and `stillframe scrub`, the real binary on real files: the shape of the JSON, the
//! exit codes, what is repaired, and both on a store that is mounted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

#[path = "rig/mod.rs"]
mod rig;

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rig::{Rig, can_mount, eventually};
use serde_json::Value;

const PAGE: usize = 4096;
const PAGES: u64 = 32;

fn page(of: u64, n: u64) -> Vec<u8> {
    let mut x = of.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ n.wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    };
    (0..PAGE).map(|_| next()).collect()
}

/// Runs with `--json`; the exit code and what was printed.
fn json(rig: &Rig, args: &[&str]) -> (i32, Value) {
    let out = rig.command(args).arg("--json").output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let value = serde_json::from_str(&text);
    let value = value.unwrap_or_else(|e| panic!("{args:?}: {e}: {text} {out:?}"));
    (out.status.code().unwrap(), value)
}

/// The first finding of a check.
#[track_caller]
fn of<'a>(told: &'a Value, check: &str) -> &'a Value {
    let all = told["findings"].as_array().unwrap();
    let found = all.iter().find(|f| f["check"] == check);
    found.unwrap_or_else(|| panic!("no {check} in {told}"))
}

/// A volume with a snapshot, overwritten; the first page is again what it was.
fn served() -> Rig {
    let mut rig = Rig::new();
    let source = rig.at("disk.img");
    let content: Vec<u8> = (0..PAGES).flat_map(|n| page(0, n)).collect();
    fs::write(&source, content).unwrap();
    rig.mount_with(&["--volume", &format!("vm={}", source.display())]);
    rig.ok(&["snapshot", "create", "vm@a"]);
    let live = OpenOptions::new().write(true).open(rig.live("vm")).unwrap();
    for n in 0..PAGES {
        live.write_all_at(&page(1, n), n * PAGE as u64).unwrap();
    }
    live.write_all_at(&page(0, 0), 0).unwrap();
    live.sync_data().unwrap();
    drop(live);
    rig
}

/// Flips a bit of a page's content in the log.
fn rot(rig: &Rig, content: &[u8]) {
    let log = rig.store().join("log");
    let mut hits = 0;
    for entry in fs::read_dir(log).unwrap() {
        let path: PathBuf = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        for at in (0..bytes.len()).step_by(PAGE) {
            if bytes[at..].starts_with(content) {
                let file = OpenOptions::new().write(true).open(&path).unwrap();
                file.write_all_at(&[bytes[at + 9] ^ 1], at as u64 + 9)
                    .unwrap();
                hits += 1;
            }
        }
    }
    assert_eq!(hits, 1);
}

#[test]
fn a_closed_store_is_left_alone_named_and_repaired() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    rig.umount();
    let (code, good) = json(&rig, &["check", "--read-data"]);
    assert_eq!((code, &good["mode"]), (0, &"offline".into()), "{good}");
    assert_eq!(good["version"], 1);
    assert_eq!(good["findings"], Value::Array(vec![]));
    assert_eq!(good["grains_read"], good["grains_needed"]);
    assert!(good["grains_read"].as_u64().unwrap() >= PAGES);

    // What has a copy and what has none.
    rot(&rig, &page(0, 0));
    rot(&rig, &page(0, 5));
    let (code, structure) = json(&rig, &["check"]);
    assert_eq!(code, 0, "{structure}");
    let (code, found) = json(&rig, &["check", "--read-data"]);
    assert_eq!(code, 7);
    assert_eq!(found["report"], Value::Null, "it was opened");
    let finding = of(&found, "payload");
    assert_eq!(
        (&finding["severity"], &finding["check"], &finding["name"]),
        (&"damage".into(), &"payload".into(), &"vm@a".into())
    );
    let ranges = finding["ranges"].as_array().unwrap();
    let starts: Vec<u64> = ranges
        .iter()
        .map(|r| r["start"].as_u64().unwrap())
        .collect();
    assert_eq!(starts, [0, 5 * PAGE as u64]);
    assert!(!finding["advice"].as_str().unwrap().is_empty());

    // The map, too; and a slot of the superblock.
    fs::write(rig.store().join("map/db"), vec![0xa5; 5000]).unwrap();
    let superblock = OpenOptions::new()
        .write(true)
        .open(rig.store().join("superblock"));
    superblock.unwrap().write_all_at(&[0xff; 16], 40).unwrap();
    let (code, repaired) = json(&rig, &["check", "--read-data", "--repair"]);
    assert_eq!(code, 7, "page 5 has no copy: {repaired}");
    assert_eq!(repaired["map_rebuilt"], true);
    assert_eq!(of(&repaired, "map")["repaired"], true);
    assert_eq!(of(&repaired, "superblock")["repaired"], true);
    let (code, left) = json(&rig, &["check", "--read-data"]);
    assert_eq!(code, 7);
    let ranges = of(&left, "payload")["ranges"].as_array().unwrap();
    assert_eq!(ranges.len(), 1, "{left}");
    assert_eq!(ranges[0]["start"], 5 * PAGE as u64);

    rig.ok(&["snapshot", "delete", "vm@a"]);
    let (code, clean) = json(&rig, &["check", "--read-data"]);
    assert_eq!(code, 0, "{clean}");
    // Nothing but the map is wrong: all of it is repaired.
    fs::write(rig.store().join("map/db"), vec![0x5a; 5000]).unwrap();
    let (code, told) = json(&rig, &["check"]);
    assert_eq!(
        (code, &told["findings"][0]["state"]),
        (7, &"damaged".into())
    );
    let (code, _) = json(&rig, &["check", "--repair"]);
    assert_eq!(code, 10);
    let (code, _) = json(&rig, &["check"]);
    assert_eq!(code, 0);
}

#[test]
fn a_mounted_store_is_checked_and_scrubbed_by_its_daemon() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    let (code, good) = json(&rig, &["check", "--read-data"]);
    assert_eq!((code, &good["mode"]), (0, &"online".into()), "{good}");
    let (code, read) = json(&rig, &["scrub", "--rate", "0"]);
    assert_eq!(code, 0, "{read}");
    assert!(read["grains"].as_u64().unwrap() >= PAGES, "{read}");
    assert!(read["finished"].is_string());

    rot(&rig, &page(0, 0));
    rot(&rig, &page(0, 5));
    let (code, read) = json(&rig, &["scrub", "--rate", "0"]);
    assert_eq!(
        (code, &read["found"], &read["mended"]),
        (7, &2.into(), &1.into())
    );
    let damaged = &read["damaged"][0];
    assert_eq!(damaged["name"], "vm@a");
    assert_eq!(damaged["ranges"][0]["start"], 5 * PAGE as u64);
    // Everybody is told.
    let status = rig.ok(&["status"]);
    assert!(status.contains("snapshot vm@a is damaged"), "{status}");
    assert!(status.contains("scrub    ended"), "{status}");
    let metrics = fs::read_to_string(rig.mnt().join(".stillframe/metrics.prom")).unwrap();
    assert!(
        metrics.contains("stillframe_damaged_points 1\n"),
        "{metrics}"
    );
    assert!(metrics.contains("stillframe_scrub_mended_blocks 1\n"));
    let log = fs::read_to_string(rig.at("daemon.log")).unwrap();
    assert!(log.contains("concerned: snapshot vm@a"), "{log}");
    // Only that page is refused.
    let snapshot = fs::File::open(rig.snapshot("vm", "a")).unwrap();
    for n in 0..PAGES {
        let mut bytes = vec![0; PAGE];
        let read = snapshot.read_exact_at(&mut bytes, n * PAGE as u64);
        match n {
            5 => assert_eq!(read.unwrap_err().raw_os_error(), Some(5)),
            _ => assert!(read.is_ok() && bytes == page(0, n), "page {n}"),
        }
    }
    drop(snapshot);
    // It is known after a restart, and gone with the snapshot.
    rig.umount();
    rig.mount();
    assert!(rig.ok(&["status"]).contains("vm@a is damaged"));
    rig.ok(&["snapshot", "delete", "vm@a"]);
    eventually("nothing is damaged any more", || {
        !rig.ok(&["status"]).contains("damaged:")
    });
    assert!(!rig.ok(&["status"]).contains("vm@a"));
    let (code, _) = json(&rig, &["scrub", "--rate", "0"]);
    assert_eq!(code, 0);
    rig.umount();
}

/// What is in the files of a store but its map, which sled tidies, and its lock.
fn content(rig: &Rig) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut dirs = vec![rig.store()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.ends_with("map") || path.ends_with("lock") {
                continue;
            }
            match path.is_dir() {
                true => dirs.push(path),
                false => drop(all.insert(path.clone(), fs::read(path).unwrap())),
            }
        }
    }
    all
}

/// Starts of the batches in a segment.
fn batches(segment: &Path) -> Vec<u64> {
    let bytes = fs::read(segment).unwrap();
    let blocks = (PAGE..bytes.len()).step_by(PAGE);
    let starts = blocks.filter(|&at| bytes[at..].starts_with(b"SFbatch1"));
    starts.map(|at| at as u64).collect()
}

/// With the end of the log, or all of it, gone, neither a check nor a start makes an empty store of what
/// is left, nothing is called repaired, and with the log back all is there.
#[test]
fn a_store_that_lost_its_log_is_left_alone() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    rig.ok(&["clone", "create", "vm@a", "c"]);
    let clone = rig.mnt().join("vm/clones/c.img");
    let clone = OpenOptions::new().write(true).open(clone).unwrap();
    clone.write_all_at(&page(7, 7), 0).unwrap();
    clone.sync_data().unwrap();
    drop(clone);
    rig.umount();
    let log = rig.store().join("log");
    let kept = rig.at("kept");
    let kept = || kept.clone();
    type Damage<'a> = (&'a str, bool, Box<dyn Fn() + 'a>);
    let damages: [Damage<'_>; 4] = [
        (
            "the end",
            true,
            Box::new(|| {
                let segment = log.join("000001.seg");
                fs::copy(&segment, kept()).unwrap();
                let starts = batches(&segment);
                let file = OpenOptions::new().write(true).open(&segment).unwrap();
                file.set_len(starts[starts.len() / 2]).unwrap();
            }),
        ),
        (
            "all segments",
            false,
            Box::new(|| {
                fs::rename(&log, kept()).unwrap();
                fs::create_dir(&log).unwrap();
            }),
        ),
        (
            "the directory",
            false,
            Box::new(|| fs::rename(&log, kept()).unwrap()),
        ),
        (
            "a link",
            false,
            Box::new(|| {
                fs::rename(&log, kept()).unwrap();
                std::os::unix::fs::symlink(kept(), &log).unwrap();
            }),
        ),
    ];
    for (what, opens, damage) in damages {
        damage();
        let before = content(&rig);
        for args in [&["check"][..], &["check", "--read-data", "--repair"]] {
            let (code, told) = json(&rig, args);
            assert_eq!(code, 7, "{what}: {told}");
            assert_eq!(told["report"], Value::Null, "{what}: it was opened");
            assert_eq!(of(&told, "log")["state"], "lost", "{what}: {told}");
            let all = told["findings"].as_array().unwrap();
            assert!(all.iter().all(|f| f["repaired"] == false), "{what}: {told}");
            // What was written to a clone is nobody's litter.
            assert!(all.iter().all(|f| f["state"] != "orphan"), "{what}: {told}");
        }
        let refused = rig.run(&["check", "--rebuild-map"]);
        assert_eq!(refused.status.code(), Some(7), "{what}: {refused:?}");
        if !opens {
            let refused = rig.run(&["volume", "list"]);
            assert!(!refused.status.success(), "{what}: {refused:?}");
        }
        assert!(content(&rig) == before, "{what}: something was written");
        // Back again.
        match fs::symlink_metadata(&log) {
            Ok(m) if m.is_symlink() => fs::remove_file(&log).unwrap(),
            Ok(_) if kept().is_dir() => fs::remove_dir(&log).unwrap(),
            _ => {}
        }
        match kept().is_dir() {
            true => fs::rename(kept(), &log).unwrap(),
            false => fs::rename(kept(), log.join("000001.seg")).unwrap(),
        }
        let again = rig.run(&["check", "--read-data"]);
        assert_eq!(again.status.code(), Some(0), "{what}: {again:?}");
    }
}

/// What has no copy is never called repaired, whichever blocks a sample takes.
#[test]
fn a_sample_does_not_repair_by_looking_away() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    rig.umount();
    rot(&rig, &page(0, 5));
    let mut found = 0;
    for _ in 0..16 {
        let (code, told) = json(&rig, &["check", "--sample", "50%", "--repair"]);
        assert!(code == 0 || code == 7, "{code}: {told}");
        found += u32::from(code == 7);
    }
    assert!(found > 0);
}

#[test]
fn a_rebuilt_map_is_judged_anew() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    rig.umount();
    fs::remove_dir_all(rig.store().join("map")).unwrap();
    fs::write(rig.store().join("map"), "no directory").unwrap();
    let (code, told) = json(&rig, &["check", "--rebuild-map"]);
    assert_eq!((code, &told["map_rebuilt"]), (10, &true.into()), "{told}");
    assert_eq!(of(&told, "map")["repaired"], true);
    assert_eq!(json(&rig, &["check"]).0, 0);
}

/// Links, directories and strangers among the files of a store: named, each for itself, in valid JSON.
#[test]
fn strangers_are_named_and_nothing_else_suffers() {
    use std::os::unix::ffi::OsStrExt;
    if !can_mount() {
        return;
    }
    let mut rig = served();
    rig.ok(&["clone", "create", "vm@a", "c"]);
    let clone = rig.mnt().join("vm/clones/c.img");
    let clone = OpenOptions::new().write(true).open(clone).unwrap();
    clone.write_all_at(&page(7, 7), 0).unwrap();
    clone.sync_data().unwrap();
    drop(clone);
    rig.umount();
    let clones = rig.store().join("clones");
    let odd = std::ffi::OsStr::from_bytes(b"\xff\n\"\x1b[31m");
    for dir in ["", "log", "clones"] {
        fs::write(rig.store().join(dir).join(odd), "").unwrap();
    }
    fs::write(clones.join("000009.data.lost-1"), "").unwrap();
    let (code, told) = json(&rig, &["check"]);
    assert_eq!(code, 0, "{told}");
    let all = told["findings"].as_array().unwrap();
    let states: Vec<&str> = all.iter().map(|f| f["state"].as_str().unwrap()).collect();
    assert_eq!(
        states,
        ["foreign", "foreign", "orphan", "foreign"],
        "{told}"
    );
    let text = rig.ok(&["check"]);
    assert!(
        text.lines()
            .all(|line| line.chars().all(|c| !c.is_control())),
        "{text}"
    );

    // The layer's file behind a link: it is not followed, and all else is looked at.
    for name in ["000001.data", "000001.sums"] {
        let (file, aside) = (clones.join(name), rig.at("aside"));
        fs::rename(&file, &aside).unwrap();
        std::os::unix::fs::symlink(&aside, &file).unwrap();
        let (code, told) = json(&rig, &["check", "--read-data"]);
        assert_eq!(code, 7, "{told}");
        let named = of(&told, "clone");
        assert_eq!(named["name"], format!("clones/{name}"), "{told}");
        assert!(told["grains_read"].as_u64().unwrap() >= PAGES, "{told}");
        fs::remove_file(&file).unwrap();
        fs::rename(&aside, &file).unwrap();
        assert_eq!(json(&rig, &["check", "--read-data"]).0, 0);
    }
}

#[test]
fn a_store_of_a_newer_version_is_refused_with_the_code_for_it() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    rig.umount();
    let path = rig.store().join("superblock");
    let superblock = OpenOptions::new().write(true).open(path).unwrap();
    for slot in [0, 65536] {
        let newer = [9u32.to_le_bytes(), (!9u32).to_le_bytes()].concat();
        superblock.write_all_at(&newer, slot + 8).unwrap();
    }
    for args in [
        &["check"][..],
        &["check", "--repair"],
        &["check", "--rebuild-map"],
    ] {
        let out = rig.run(args);
        assert_eq!(out.status.code(), Some(7), "{args:?} {out:?}");
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(
            said.contains("format version 9") && said.lines().count() == 1,
            "{said}"
        );
    }
}

/// As other commands, they wait for each other.
#[test]
fn checks_wait_for_each_other() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    rig.umount();
    let start = |_| {
        let mut command = rig.command(&["check", "--read-data"]);
        let quiet = command.stdout(std::process::Stdio::null());
        quiet.stderr(std::process::Stdio::piped()).spawn().unwrap()
    };
    let all: Vec<_> = (0..4).map(start).collect();
    for child in all {
        let out = child.wait_with_output().unwrap();
        assert_eq!(out.status.code(), Some(0), "{out:?}");
    }
}

/// Damage in a clone is known until a scrub of everything has read it again, not until any scrub begins.
#[test]
fn damage_in_a_clone_is_not_forgotten_by_a_sample() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    rig.ok(&["clone", "create", "vm@a", "c"]);
    let path = rig.mnt().join("vm/clones/c.img");
    let clone = || OpenOptions::new().write(true).open(&path).unwrap();
    for n in 0..4 {
        clone().write_all_at(&page(7, n), n * PAGE as u64).unwrap();
    }
    rig.umount();
    let overlay = rig.store().join("clones/000001.data");
    let overlay = OpenOptions::new().write(true).open(overlay).unwrap();
    overlay.write_all_at(b"rot", 2 * PAGE as u64 + 9).unwrap();
    rig.mount();
    let (code, told) = json(&rig, &["scrub", "--rate", "0"]);
    assert_eq!((code, &told["found"]), (7, &1.into()), "{told}");
    let source = rig.source("other.img", 1 << 20);
    rig.ok(&["volume", "add", "other", source.to_str().unwrap()]);
    for args in [
        &["scrub", "other"][..],
        &["scrub", "--sample", "1%", "--restart"],
    ] {
        let (code, told) = json(&rig, args);
        assert_eq!(code, 7, "{args:?}: {told}");
        assert_eq!(told["damaged"][0]["name"], "vm/c", "{args:?}: {told}");
    }
    clone().write_all_at(&page(7, 2), 2 * PAGE as u64).unwrap();
    let (code, told) = json(&rig, &["scrub", "--rate", "0"]);
    assert_eq!(
        (code, &told["damaged"]),
        (0, &Value::Array(vec![])),
        "{told}"
    );
    rig.umount();
}
