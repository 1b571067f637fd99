//! What the command line and the daemon say to each other: one JSON object a line.
//!
//! A connection carries one [`Request`] line, then any number of [`Response::Progress`] lines, then
//! one [`Response::Ok`] or [`Response::Error`] line. A line is bounded on both sides
//! ([`REQUEST_MAX`], [`RESPONSE_MAX`]), so that neither side can make the other one grow. Unknown
//! requests and fields are refused, never guessed at: a command of another version fails with a
//! message instead of doing half.
//!
//! The rows are also what `--json` prints and what `.stillframe/status.json` holds, so their field
//! names are an interface. Names in requests are plain text and are checked where they are used.

use std::io::{self, BufRead, ErrorKind, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::image::diff::DiffList;
use crate::units::escape;
use crate::volume::OnFull;
use crate::volume::audit::{Audit, Finding};

/// Longest request line in bytes.
pub const REQUEST_MAX: u64 = 1 << 20;
/// Longest response line in bytes: a listing of 100,000 snapshots takes some 30 MiB.
pub const RESPONSE_MAX: u64 = 256 << 20;

/// Policy choices that were made explicitly; `None` keeps what is there or the default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choices {
    /// Bytes of a grain; only when a volume is added.
    pub grain: Option<u64>,
    /// Policy for a full thin target.
    pub on_full: Option<OnFull>,
    /// Seconds to wait for space first.
    pub on_full_wait: Option<u32>,
}

/// How the daemon is to unmount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Leave {
    /// Refuse while the mount is in use.
    Gently,
    /// Detach at once, finish when the last user is gone.
    Lazily,
    /// Abort what is in flight.
    Forcibly,
}

/// What a clone is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// A snapshot of this name.
    Snapshot(String),
    /// A clone of this name.
    Clone(String),
}

/// A size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NewSize {
    /// Exactly this.
    To(u64),
    /// So much more than now.
    By(u64),
}

/// A job for a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Everything worth knowing.
    Status {},
    /// Puts a source under protection.
    VolumeAdd {
        /// Name.
        name: String,
        /// Absolute path of the source.
        source: String,
        /// Policy.
        choices: Choices,
    },
    /// Every volume, or the named one.
    VolumeList {
        /// Only this one.
        name: Option<String>,
    },
    /// Changes the policy.
    VolumeSet {
        /// Name.
        name: String,
        /// Policy; `grain` is refused.
        choices: Choices,
    },
    /// Declares the source good as it is.
    VolumeAccept {
        /// Name.
        name: String,
    },
    /// Forgets a volume.
    VolumeRemove {
        /// Name.
        name: String,
    },
    /// Gives a volume another size.
    VolumeResize {
        /// Name.
        name: String,
        /// The new size, or what is added to it.
        size: NewSize,
    },
    /// Takes snapshots at one instant.
    SnapshotCreate {
        /// (volume, snapshot) pairs.
        targets: Vec<(String, String)>,
    },
    /// Every snapshot, or those of one volume.
    SnapshotList {
        /// Only of this volume.
        volume: Option<String>,
    },
    /// Deletes a snapshot.
    SnapshotDelete {
        /// Volume.
        volume: String,
        /// Snapshot.
        name: String,
        /// Leave a bookmark in its place.
        keep_bookmark: bool,
    },
    /// Makes the live volume what a snapshot is.
    SnapshotRevert {
        /// Volume.
        volume: String,
        /// Snapshot.
        name: String,
        /// Even while `live.img` is open for writing.
        force: bool,
    },
    /// Puts a snapshot on hold or releases it.
    SnapshotHold {
        /// Volume.
        volume: String,
        /// Snapshot.
        name: String,
        /// On hold, or released.
        held: bool,
    },
    /// Renames a snapshot.
    SnapshotRename {
        /// Volume.
        volume: String,
        /// Snapshot.
        name: String,
        /// Its new name.
        new: String,
    },
    /// Makes a clone.
    CloneCreate {
        /// Volume.
        volume: String,
        /// What it is made of.
        of: Origin,
        /// Its name.
        name: String,
    },
    /// Every clone, or those of one volume.
    CloneList {
        /// Only of this volume.
        volume: Option<String>,
    },
    /// Deletes a clone.
    CloneDelete {
        /// Volume.
        volume: String,
        /// Clone.
        name: String,
    },
    /// Renames a clone.
    CloneRename {
        /// Volume.
        volume: String,
        /// Clone.
        name: String,
        /// Its new name.
        new: String,
    },
    /// Every bookmark, or those of one volume.
    BookmarkList {
        /// Only of this volume.
        volume: Option<String>,
    },
    /// Deletes a bookmark.
    BookmarkDelete {
        /// Volume.
        volume: String,
        /// Bookmark.
        name: String,
    },
    /// What changed between two points.
    Diff {
        /// Volume.
        volume: String,
        /// The older snapshot, or a bookmark.
        from: String,
        /// The newer snapshot, or `live`.
        to: String,
    },
    /// Holds what the store says against everything else it says.
    Check {
        /// Share of the preserved content to read, in hundredths.
        percent: u32,
        /// Mend what is certain.
        repair: bool,
    },
    /// Reads preserved content and mends what has a good copy.
    Scrub {
        /// Only of this volume.
        volume: Option<String>,
        /// Share of it, in hundredths.
        percent: u32,
        /// Bytes a second; 0 for as fast as it goes.
        rate: Option<u64>,
        /// Mend what has a good copy.
        repair: bool,
        /// Begin anew.
        restart: bool,
    },
    /// Unmounts, closes the store and ends the daemon.
    Unmount {
        /// How.
        how: Leave,
    },
}

impl Request {
    /// Its name, as on the wire.
    pub fn name(&self) -> String {
        let tagged = serde_json::to_value(self).ok();
        let name = tagged.as_ref().and_then(|value| value["do"].as_str());
        name.unwrap_or("request").to_owned()
    }
}

/// The result of a [`Request`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "is", content = "with", rename_all = "kebab-case")]
pub enum Answer {
    /// Done; there is nothing to say.
    Done,
    /// To a lazy `Unmount`: detached, and still in use by somebody.
    Detached,
    /// To `Status`.
    Status(Box<Report>),
    /// To `VolumeAdd`, `VolumeList` and `VolumeResize`.
    Volumes(Vec<VolumeRow>),
    /// To `SnapshotCreate` and `SnapshotList`.
    Snapshots(Vec<SnapshotRow>),
    /// To `SnapshotRevert`.
    Reverted(Box<RevertRow>),
    /// To `CloneCreate` and `CloneList`.
    Clones(Vec<CloneRow>),
    /// To `BookmarkList`.
    Bookmarks(Vec<BookmarkRow>),
    /// To `Diff`.
    Diff(Box<DiffList>),
    /// To `Check`.
    Checked(Box<Checked>),
    /// To `Scrub`.
    Scrubbed(Box<ScrubRow>),
}

/// A line from the daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// The job goes on; text for people.
    Progress(String),
    /// The job is done.
    Ok(Answer),
    /// The job failed.
    Error {
        /// What a caller may act on.
        kind: Kind,
        /// One line.
        message: String,
    },
}

impl Response {
    /// The failure as the other side shows it.
    pub fn failure(e: &Error) -> Response {
        Response::Error {
            kind: e.kind(),
            message: e.chain(),
        }
    }
}

/// The whole state: `status --json` and `.stillframe/status.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Version of the program that serves the store.
    pub version: String,
    /// Process of the daemon; absent when none runs.
    pub pid: Option<u32>,
    /// Path of the store, escaped where it is not plain text.
    pub store: String,
    /// The store's own id.
    pub uuid: String,
    /// Where it is mounted; absent when it is not.
    pub mountpoint: Option<String>,
    /// Bytes of the log on disk; absent when they cannot be counted.
    pub log_bytes: Option<u64>,
    /// The thin target as a whole; absent when it cannot be counted.
    pub thin: Option<ThinRow>,
    /// The last scrub, and what is known damaged.
    #[serde(default)]
    pub scrub: ScrubRow,
    /// The volumes, by name.
    pub volumes: Vec<VolumeRow>,
    /// What is under way for longer than it should be, the oldest first.
    #[serde(default)]
    pub stuck: Vec<StuckRow>,
    /// The store did not answer in time: of all this only `stuck` and what does not change is known.
    #[serde(default)]
    pub unanswered: bool,
}

/// A request or job that hangs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StuckRow {
    /// The file operation, or the job.
    pub operation: String,
    /// The volume, snapshot (`VOL@NAME`) or clone (`VOL/NAME`); absent for a job.
    pub subject: Option<String>,
    /// Seconds since it began, without waiting for space.
    pub seconds: u64,
    /// Seconds since its last sign of life.
    pub quiet_seconds: u64,
    /// What it waits for.
    pub phase: String,
}

/// What a check of an open store found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Checked {
    /// Of its structures, and of its content as far as that was asked for.
    pub audit: Audit,
    /// The extent map was made again.
    pub map_rebuilt: bool,
    /// The state after it.
    pub report: Report,
}

/// The last scrub, or the running one.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ScrubRow {
    /// One runs now.
    pub running: bool,
    /// When it began, ISO 8601; absent if there never was one.
    pub started: Option<String>,
    /// When one last came to its end, ISO 8601.
    pub finished: Option<String>,
    /// When one last came to its end, seconds since 1970.
    pub finished_unix: Option<f64>,
    /// Share of the blocks it reads, in hundredths.
    pub percent: u32,
    /// Blocks that were read.
    pub grains: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// Damaged blocks that were found.
    pub found: u64,
    /// Damaged blocks that were mended.
    pub mended: u64,
    /// What is known damaged and still needed, also from reads.
    pub damaged: Vec<Finding>,
}

/// The thin target: the log and the clones.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ThinRow {
    /// Bytes in use.
    pub used: u64,
    /// Bytes that it may use at most, where a limit was set.
    pub limit: Option<u64>,
    /// Bytes that it may still grow by.
    pub free: u64,
    /// Bytes by which it grows in an hour; negative if it shrinks, absent until a minute was seen.
    pub growth_per_hour: Option<i64>,
    /// Seconds over which that was measured.
    pub measured_seconds: u64,
    /// Seconds until it is full if it goes on like that; absent if it does not grow.
    pub full_in_seconds: Option<u64>,
}

/// A volume.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VolumeRow {
    /// Name.
    pub name: String,
    /// Unique for ever.
    pub uuid: String,
    /// Path of the source, as it was given.
    pub source: String,
    /// Bytes.
    pub size: u64,
    /// Bytes.
    pub grain: u64,
    /// `active`, `unverified`, `changed`, `suspect`, `missing` or `unfinished`.
    pub state: String,
    /// Why, where the state needs a reason.
    pub reason: Option<String>,
    /// Bytes of the thin target that serve its snapshots.
    pub used: u64,
    /// Bytes that reclaim will give back.
    pub reclaimable: u64,
    /// Policy for a full thin target.
    pub on_full: OnFull,
    /// Seconds to wait for space first.
    pub on_full_wait: u32,
    /// When it was added, ISO 8601.
    pub added: String,
    /// Oldest first.
    pub snapshots: Vec<SnapshotRow>,
    /// Writable clones, by name.
    pub clones: Vec<CloneRow>,
    /// Points in time whose content is gone and from which changes are known, oldest first.
    pub bookmarks: Vec<BookmarkRow>,
}

/// A snapshot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SnapshotRow {
    /// Its volume.
    pub volume: String,
    /// Name.
    pub name: String,
    /// Unique for ever.
    pub uuid: String,
    /// The epoch it opened.
    pub epoch: u64,
    /// The instant, ISO 8601.
    pub time: String,
    /// Bytes of the volume at the instant.
    pub size: u64,
    /// Bytes of storage the content used at the instant.
    pub allocated: u64,
    /// Bytes of the thin target that only this snapshot needs.
    pub unique: u64,
    /// `active` or `failed`.
    pub state: String,
    /// Why it failed.
    pub reason: Option<String>,
    /// The snapshot before it, by id.
    pub parent: Option<String>,
    /// Shared by snapshots of one instant.
    pub group: Option<String>,
    /// On hold: it cannot be deleted.
    pub held: bool,
}

/// A clone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CloneRow {
    /// Its volume.
    pub volume: String,
    /// Name.
    pub name: String,
    /// Unique for ever.
    pub uuid: String,
    /// When it was made, ISO 8601.
    pub created: String,
    /// Last change of its content, ISO 8601.
    pub modified: String,
    /// Bytes.
    pub size: u64,
    /// The snapshot at the bottom of its layers, by id; absent if it was made empty.
    pub base: Option<String>,
    /// Name of that snapshot, unless it was deleted since.
    pub base_name: Option<String>,
    /// Layers between it and that snapshot, its own included.
    pub layers: usize,
    /// Bytes of grains that lie in its own layer.
    pub own: u64,
    /// `active` or `failed`.
    pub state: String,
    /// Why it failed.
    pub reason: Option<String>,
}

/// A bookmark.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BookmarkRow {
    /// Its volume.
    pub volume: String,
    /// Name.
    pub name: String,
    /// Id of the snapshot it was.
    pub uuid: String,
    /// The epoch that snapshot opened.
    pub epoch: u64,
    /// The instant, ISO 8601.
    pub time: String,
    /// Bytes of the volume at the instant.
    pub size: u64,
    /// `active` or `failed`.
    pub state: String,
    /// Why it failed: what changed since is not known any more.
    pub reason: Option<String>,
}

/// What a revert did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RevertRow {
    /// The snapshot that undoes it.
    pub undo: SnapshotRow,
    /// Bytes of grains that differed and were written.
    pub written: u64,
}

/// Writes a message as one line.
///
/// # Errors
/// The stream's error.
pub fn send(stream: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message).map_err(io::Error::other)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    stream.flush()
}

/// Reads a message of at most `max` bytes; `None` when the stream ends before its first byte.
///
/// # Errors
/// `Invalid` if it is too long, cut short or not understood; else by the stream's error (a time
/// limit of the stream is `Io`).
pub fn receive<T: DeserializeOwned>(stream: &mut impl BufRead, max: u64) -> Result<Option<T>> {
    let mut line = Vec::new();
    let mut bounded = stream.take(max + 1);
    loop {
        match bounded.read_until(b'\n', &mut line) {
            Ok(_) => break,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io("cannot read from the control socket", e)),
        }
    }
    if line.is_empty() {
        return Ok(None);
    }
    if line.len() as u64 > max {
        return Err(Error::new(
            Kind::Invalid,
            format!("message is longer than {max} bytes"),
        ));
    }
    if line.pop() != Some(b'\n') {
        return Err(Error::new(Kind::Invalid, "message ends in the middle"));
    }
    serde_json::from_slice(&line).map(Some).map_err(|e| {
        // What it says quotes the message, line breaks and all.
        let why = escape(&e.to_string());
        Error::new(Kind::Invalid, format!("message is not understood: {why}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8], max: u64) -> Result<Option<Request>> {
        receive(&mut io::BufReader::new(bytes), max)
    }

    #[test]
    fn a_refusal_is_one_line_whatever_it_quotes() {
        let why = read(b"{\"do\":\"a\\nb\\u001b\"}\n", 100).unwrap_err();
        assert_eq!(why.kind(), Kind::Invalid);
        assert!(why.chain().contains("not understood"));
        assert!(why.chain().bytes().all(|b| (0x20..0x7f).contains(&b)));
    }

    #[test]
    fn requests_come_through_whole() {
        let requests = [
            Request::Status {},
            Request::VolumeAdd {
                name: "vm".into(),
                source: "/x\n\u{1b}".into(),
                choices: Choices {
                    grain: Some(65536),
                    ..Choices::default()
                },
            },
            Request::SnapshotCreate {
                targets: vec![("a".into(), "b".into())],
            },
            Request::VolumeResize {
                name: "vm".into(),
                size: NewSize::By(u64::MAX),
            },
            Request::CloneCreate {
                volume: "vm".into(),
                of: Origin::Clone("a".into()),
                name: "b".into(),
            },
            Request::Unmount { how: Leave::Lazily },
        ];
        let mut stream = Vec::new();
        for request in &requests {
            send(&mut stream, request).unwrap();
        }
        assert_eq!(
            stream.iter().filter(|&&b| b == b'\n').count(),
            requests.len()
        );
        let mut stream = stream.as_slice();
        for request in &requests {
            assert_eq!(
                receive::<Request>(&mut stream, 4096).unwrap().as_ref(),
                Some(request)
            );
        }
        assert!(receive::<Request>(&mut stream, 4096).unwrap().is_none());
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for bad in [
            &b"{\"do\":\"status\"}"[..],
            b"{\"do\":\"stat",
            b"\n",
            b"{}\n",
            b"\xff\xff\n",
            b"{\"do\":\"format-disk\"}\n",
            b"{\"do\":\"volume-accept\",\"name\":\"a\",\"force\":true}\n",
            b"{\"do\":\"status\",\"extra\":1}\n",
        ] {
            let e = read(bad, 4096).expect_err(&String::from_utf8_lossy(bad));
            assert_eq!(e.kind(), Kind::Invalid);
        }
    }

    #[test]
    fn a_long_line_is_cut_off_not_collected() {
        let endless = vec![b'x'; 5000];
        assert_eq!(read(&endless, 4096).unwrap_err().kind(), Kind::Invalid);
        let exact = b"{\"do\":\"status\"}\n";
        assert!(read(exact, exact.len() as u64).unwrap().is_some());
        assert!(read(exact, exact.len() as u64 - 1).is_err());
    }
}
