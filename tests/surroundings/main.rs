//! The daemon among others: sources that change under it, other daemons, other users, signals, races,
//! limits of the system, and what hangs.
//!
//! Goal: each row of the table in docs/testing.md, section 12, with the real program on real mounts, as a
//! user would meet it. Nothing here is a unit test, and nothing is left behind, also after a failure. What
//! takes long by nature is behind an environment variable, which that section names.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod hanging;
mod limits;
mod quit;
mod signals;
mod sources;
mod stores;
mod users;

#[path = "../rig/mod.rs"]
mod rig;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Output;

use rig::Rig;
use serde_json::Value;

/// No whole number of grains.
pub(crate) const SIZE: u64 = (1 << 20) + 100;

/// A rig with one volume `vm` whose grains all differ, served.
pub(crate) fn served() -> Rig {
    let mut rig = Rig::new();
    let volume = format!("vm={}", image(&rig, "disk.img").display());
    rig.mount_with(&["--volume", &volume]);
    rig
}

/// A source that no two grains of are alike.
pub(crate) fn image(rig: &Rig, name: &str) -> std::path::PathBuf {
    let path = rig.at(name);
    fs::write(&path, content(name)).unwrap();
    path
}

pub(crate) fn content(name: &str) -> Vec<u8> {
    let mut data = vec![0; SIZE as usize];
    let mut reader = blake3::Hasher::new();
    reader
        .update(name.as_bytes())
        .finalize_xof()
        .fill(&mut data);
    data
}

pub(crate) fn writable(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[track_caller]
pub(crate) fn status(rig: &Rig) -> Value {
    let text = rig.ok(&["status", "--json"]);
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// The row of volume `vm`.
#[track_caller]
pub(crate) fn vm(rig: &Rig) -> Value {
    status(rig)["volumes"][0].clone()
}

pub(crate) fn log(rig: &Rig) -> String {
    fs::read_to_string(rig.at("daemon.log")).unwrap_or_default()
}

/// One plain line on stderr and this exit code.
#[track_caller]
pub(crate) fn refused(out: &Output, code: i32) -> String {
    let text = String::from_utf8(out.stderr.clone()).unwrap();
    assert_eq!(out.status.code(), Some(code), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(
        text.starts_with("stillframe: ") && text.contains("; "),
        "{text}"
    );
    let plain = |b: u8| (0x20..0x7f).contains(&b);
    assert!(text.trim_end().bytes().all(plain), "{text:?}");
    text
}

pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0 || rig::skip("needs root")
}

/// The error number of a failed call.
#[track_caller]
pub(crate) fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}
