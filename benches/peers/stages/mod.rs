//! Stages: rows that share what they need, which is made before them and gone after.

pub mod cow;
pub mod half;
pub mod million;
pub mod pause;
pub mod plain;
pub mod race;
pub mod reads;
pub mod scale;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::contender::Contender;
use super::driver::Scattered;
use super::rig::Rig;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;

/// A million punches on a busy machine.
const RECLAIMED: Duration = Duration::from_secs(1800);

/// MiB a second.
pub fn rate(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / MIB as f64 / took.as_secs_f64()
}

pub fn status(rig: &Rig) -> Value {
    serde_json::from_str(&rig.ok(&["status", "--json"])).unwrap()
}

pub fn volume_of<'a>(status: &'a Value, name: &str) -> &'a Value {
    let volumes = status["volumes"].as_array().unwrap();
    volumes.iter().find(|v| v["name"] == name).unwrap()
}

/// Preserved bytes that only this snapshot needs.
pub fn unique(rig: &Rig, snapshot: &str) -> u64 {
    let status = status(rig);
    let snapshots = volume_of(&status, "disk")["snapshots"].as_array().unwrap();
    let found = snapshots.iter().find(|s| s["name"] == snapshot).unwrap();
    found["unique"].as_u64().unwrap()
}

/// Deletes a snapshot and waits until its space is given back, so that nobody pays for it later.
pub fn delete(rig: &Rig, snapshot: &str) {
    fs::remove_file(rig.snapshot("disk", snapshot)).unwrap();
    let end = Instant::now() + RECLAIMED;
    while volume_of(&status(rig), "disk")["reclaimable"] != 0 {
        assert!(Instant::now() < end, "what nobody needs is not reclaimed");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Bytes that a file or a directory takes on its filesystem.
pub fn allocated(path: &Path) -> u64 {
    let Ok(about) = fs::symlink_metadata(path) else {
        return 0;
    };
    let inner = match about.is_dir() {
        true => {
            let entries = fs::read_dir(path).unwrap();
            entries.map(|entry| allocated(&entry.unwrap().path())).sum()
        }
        false => 0,
    };
    inner + about.blocks() * 512
}

/// Overwrites every second piece of 64 KiB of a range.
pub fn overwrite_half(contender: &Contender, range: std::ops::Range<u64>) {
    let offsets: Vec<u64> = range.step_by(128 * KIB as usize).collect();
    Scattered {
        path: &contender.live,
        offsets: &offsets,
        request: 64 * KIB,
        depth: 4,
        write: true,
        direct: contender.direct,
    }
    .by_threads();
    super::driver::settle(&contender.behind);
}
