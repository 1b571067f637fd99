//! `stillframe check` and `stillframe scrub`, the real binary on real files: the shape of the JSON, the
//! exit codes, what is repaired, and both on a store that is mounted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

#[path = "rig/mod.rs"]
mod rig;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

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
