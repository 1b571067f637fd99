//! The shapes of arguments that several commands share, and how they are read.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::daemon::protocol::{Choices, NewSize};
use crate::error::{Error, IoContext, Kind, Result};
use crate::image::diff::LIVE;
use crate::log::segment::{SEGMENT_MAX, SEGMENT_MIN};
use crate::units::{Grain, Name, escape};
use crate::volume::OnFull;

/// Policy of a volume.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct PolicyArgs {
    /// What happens to a writer when the thin target is full
    #[arg(long, value_name = "POLICY")]
    pub on_full: Option<OnFullArg>,
    /// Seconds to wait for space before that
    #[arg(long, value_name = "SECONDS")]
    pub on_full_wait: Option<u32>,
}

/// Choices for a volume that is added.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct NewVolumeArgs {
    /// Unit of tracking and preserving, a power of two from 4K to 1M [default: 4K]
    #[arg(long, value_name = "SIZE", value_parser = grain)]
    pub grain: Option<u64>,
    /// Policy.
    #[command(flatten)]
    pub policy: PolicyArgs,
}

/// `--on-full`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnFullArg {
    /// The writer gets the error, every snapshot lives (the default)
    FailWrite,
    /// The writer goes on, the snapshots concerned fail
    FailSnapshot,
}

impl PolicyArgs {
    /// As the protocol says it.
    pub fn choices(self) -> Choices {
        let on_full = self.on_full.map(|policy| match policy {
            OnFullArg::FailWrite => OnFull::FailWrite,
            OnFullArg::FailSnapshot => OnFull::FailSnapshot,
        });
        Choices {
            grain: None,
            on_full,
            on_full_wait: self.on_full_wait,
        }
    }
}

impl NewVolumeArgs {
    /// As the protocol says it.
    pub fn choices(self) -> Choices {
        Choices {
            grain: self.grain,
            ..self.policy.choices()
        }
    }
}

/// The policy as `--on-full` reads it.
pub fn policy_name(policy: OnFull) -> &'static str {
    match policy {
        OnFull::FailWrite => "fail-write",
        OnFull::FailSnapshot => "fail-snapshot",
    }
}

/// Reads a share as `25%` or `25`, in hundredths.
///
/// # Errors
/// One line for the argument parser.
pub fn percent(text: &str) -> Result<u32, String> {
    let number = text.strip_suffix('%').unwrap_or(text);
    match number.parse() {
        Ok(percent @ 1..=100) => Ok(percent),
        _ => Err("a share is written 1% to 100%".to_owned()),
    }
}

/// `VOL@NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotArg {
    /// The volume.
    pub volume: String,
    /// The snapshot.
    pub name: String,
}

/// Reads `VOL@NAME`.
///
/// # Errors
/// One line for the argument parser.
pub fn snapshot(text: &str) -> Result<SnapshotArg, String> {
    let (volume, name) = text
        .split_once('@')
        .ok_or("a snapshot is written VOLUME@NAME")?;
    Ok(SnapshotArg {
        volume: checked(volume)?,
        name: checked(name)?,
    })
}

/// `VOL/CLONE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloneArg {
    /// The volume.
    pub volume: String,
    /// The clone.
    pub name: String,
}

/// Reads `VOL/CLONE`.
///
/// # Errors
/// One line for the argument parser.
pub fn clone(text: &str) -> Result<CloneArg, String> {
    let (volume, name) = text
        .split_once('/')
        .ok_or("a clone is written VOLUME/CLONE")?;
    Ok(CloneArg {
        volume: checked(volume)?,
        name: checked(name)?,
    })
}

/// What a clone is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OriginArg {
    /// `VOL@NAME`.
    Snapshot(SnapshotArg),
    /// `VOL/CLONE`.
    Clone(CloneArg),
}

/// Reads `VOL@NAME` or `VOL/CLONE`.
///
/// # Errors
/// One line for the argument parser.
pub fn origin(text: &str) -> Result<OriginArg, String> {
    match text.contains('/') {
        true => clone(text).map(OriginArg::Clone),
        false => snapshot(text).map(OriginArg::Snapshot).map_err(|e| {
            if text.contains('@') {
                e
            } else {
                "write VOLUME@SNAPSHOT, or VOLUME/CLONE".to_owned()
            }
        }),
    }
}

/// `VOL@A..B`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiffArg {
    /// The volume.
    pub volume: String,
    /// The older snapshot, or a bookmark.
    pub from: String,
    /// The newer snapshot, or `live`.
    pub to: String,
}

/// Reads `VOL@A..B`; B may be `live`.
///
/// # Errors
/// One line for the argument parser.
pub fn diff(text: &str) -> Result<DiffArg, String> {
    let how = "a diff is written VOLUME@OLDER..NEWER or VOLUME@OLDER..live";
    let (volume, ends) = text.split_once('@').ok_or(how)?;
    let (from, to) = ends.split_once("..").ok_or(how)?;
    Ok(DiffArg {
        volume: checked(volume)?,
        from: checked(from)?,
        to: match to {
            LIVE => LIVE.to_owned(),
            to => checked(to)?,
        },
    })
}

/// Reads the name of a volume or snapshot.
///
/// # Errors
/// One line for the argument parser.
pub fn checked(text: &str) -> Result<String, String> {
    Name::new(text)
        .map(|name| name.to_string())
        .map_err(|e| e.to_string())
}

/// `NAME=SOURCE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeArg {
    /// The name.
    pub name: String,
    /// The source, as given.
    pub source: String,
}

/// Reads `NAME=SOURCE`; a source may hold further `=`.
///
/// # Errors
/// One line for the argument parser.
pub fn volume(text: &str) -> Result<VolumeArg, String> {
    let (name, source) = text
        .split_once('=')
        .ok_or("a volume is written NAME=SOURCE")?;
    if source.is_empty() {
        return Err("the source is empty".into());
    }
    Ok(VolumeArg {
        name: checked(name)?,
        source: source.to_owned(),
    })
}

fn grain(text: &str) -> Result<u64, String> {
    size(text).and_then(|bytes| {
        Grain::new(bytes)
            .map(Grain::bytes)
            .map_err(|e| e.to_string())
    })
}

/// Reads a size: `4096`, `64K`, `64KiB`, `1M`, `2G`, `1T`; powers of 1024.
///
/// # Errors
/// One line for the argument parser.
pub fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let number: u64 = digits
        .parse()
        .ok()
        // A sign is no digit.
        .filter(|_| digits.starts_with(|c: char| c.is_ascii_digit()))
        .ok_or("not a size; write 4096, 64K, 1M or 2G")?;
    let unit = text[digits.len()..].to_ascii_uppercase();
    let shift = match unit.strip_suffix("IB").unwrap_or(&unit) {
        "" if unit.is_empty() => 0,
        "B" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err("not a size; write 4096, 64K, 1M or 2G".into()),
    };
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "the size is too large".into())
}

/// Reads the size of a log segment.
///
/// # Errors
/// One line for the argument parser.
pub fn segment(text: &str) -> Result<u64, String> {
    size(text).and_then(|bytes| match (SEGMENT_MIN..=SEGMENT_MAX).contains(&bytes) {
        true => Ok(bytes),
        false => Err("a segment has 1M to 1G".into()),
    })
}

/// Reads a new size: a size, or `+` and a size for so much more.
///
/// # Errors
/// One line for the argument parser.
pub fn new_size(text: &str) -> Result<NewSize, String> {
    match text.strip_prefix('+') {
        Some(more) => size(more).map(NewSize::By),
        None => size(text).map(NewSize::To),
    }
}

/// An absolute path as text: the daemon runs in another directory, and the engine keeps sources as
/// text.
///
/// # Errors
/// `Invalid` if it is not UTF-8; `Io`.
pub fn absolute_text(path: &str) -> Result<String> {
    let shown = || format!("cannot use path {}", escape(path));
    let absolute = std::path::absolute(path).context(shown)?;
    absolute
        .into_os_string()
        .into_string()
        .map_err(|_| Error::new(Kind::Invalid, format!("{}: it is not UTF-8", shown())))
}

/// An absolute path; links and `..` stay as they are.
///
/// # Errors
/// `Invalid` if it is empty; `Io`.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path)
        .map_err(|e| Error::with_source(Kind::Invalid, "cannot use the path", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_or_refused() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64K", 65536),
            ("64k", 65536),
            ("64KiB", 65536),
            ("1M", 1 << 20),
            ("2G", 2 << 30),
            ("3T", 3 << 40),
            ("7B", 7),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for bad in [
            "",
            "K",
            "-1",
            "+1",
            "4.5K",
            "4 K",
            "4KK",
            "4KB",
            "iB",
            "4iB",
            "99999999999T",
            "\u{663}",
        ] {
            assert!(size(bad).is_err(), "{bad}");
        }
        assert_eq!(segment("2M"), Ok(2 << 20));
        assert!(segment("5K").is_err() && segment("2G").is_err());
        assert_eq!(grain("64K"), Ok(65536));
        assert!(grain("2K").is_err() && grain("5000").is_err() && grain("2M").is_err());
    }

    #[test]
    fn names_are_read_or_refused() {
        let good = snapshot("vm@daily-1").unwrap();
        assert_eq!(
            (good.volume.as_str(), good.name.as_str()),
            ("vm", "daily-1")
        );
        for bad in ["vm", "vm@", "@x", "vm@a@b", "vm@live", "../x@y", "vm@a/b"] {
            assert!(snapshot(bad).is_err(), "{bad}");
        }
        let good = diff("vm@a.b..live").unwrap();
        assert_eq!((good.from.as_str(), good.to.as_str()), ("a.b", "live"));
        assert_eq!(diff("vm@a..b-1").unwrap().to, "b-1");
        for bad in [
            "vm",
            "vm@a",
            "vm@a..",
            "vm@..b",
            "vm@live..b",
            "vm@a..b..c",
            "a..b",
        ] {
            assert!(diff(bad).is_err(), "{bad}");
        }
        let good = clone("vm/work.1").unwrap();
        assert_eq!((good.volume.as_str(), good.name.as_str()), ("vm", "work.1"));
        for bad in ["vm", "vm/", "/x", "vm/a/b", "vm/live", "vm@a"] {
            assert!(clone(bad).is_err(), "{bad}");
        }
        assert_eq!(
            origin("vm@a"),
            Ok(OriginArg::Snapshot(snapshot("vm@a").unwrap()))
        );
        assert_eq!(origin("vm/a"), Ok(OriginArg::Clone(clone("vm/a").unwrap())));
        for bad in ["vm", "vm@a/b", "vm/a@b", "vm@", ""] {
            assert!(origin(bad).is_err(), "{bad}");
        }
        assert_eq!(new_size("2G"), Ok(NewSize::To(2 << 30)));
        assert_eq!(new_size("+1M"), Ok(NewSize::By(1 << 20)));
        for bad in ["", "+", "-1M", "++1", "1M+", "+ 1"] {
            assert!(new_size(bad).is_err(), "{bad}");
        }
        let good = volume("vm=/a=b").unwrap();
        assert_eq!((good.name.as_str(), good.source.as_str()), ("vm", "/a=b"));
        for bad in ["vm", "vm=", "=x", "a b=x"] {
            assert!(volume(bad).is_err(), "{bad}");
        }
    }
}
