//! The audit: holds everything a store says against everything else it says, and changes nothing.
//!
//! What it looks at: both slots of the superblock; every batch of the log with its checksums; the
//! catalogue replayed from the records against every CATALOG; the extent map against the map that the
//! log alone gives; bitmaps against the records; layers of clones against their files; names that are
//! nobody's. With a share of grains to read, preserved content against its checksums, too.
//!
//! Promises: it writes nothing (sled may tidy its own files when it is opened); damage is a finding,
//! never a panic, and never an error unless it keeps everything else from being looked at; a finding
//! names the volumes, snapshots, clones and byte ranges it concerns, as far as they are known.
//!
//! It does not judge the content of sources: that has no checksums of ours. It holds the map twice in
//! memory, about 25 bytes for each preserved grain.

mod compare;
mod files;
mod view;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Kind, Result};
use crate::log::keys::Keys;
use crate::log::superblock::{self, Superblock};
use crate::map::ExtentMap;
use crate::map::index::Index;
use crate::map::transient::TransientIndex;
use crate::sys::disk::{Dir, Open};
use crate::units::Lsn;
use crate::volume::catalog::Catalog;
use crate::volume::facts::{Environment, SnapshotState};
use crate::volume::shared::{Shared, lock};
use crate::volume::verify::{self, Share};

use view::View;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Worth knowing; nothing is wrong.
    Note,
    /// Something is wrong that concerns no content: a second copy is good, or it can be made again.
    Warning,
    /// Content, or what is known of it, is lost or in doubt.
    Damage,
}

/// A run of bytes of a volume, snapshot, clone or file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bytes {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

/// One thing that was found. The shape is part of the command line's contract.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What was looked at: `superblock`, `log`, `payload`, `catalogue`, `map`, `bitmap`, `clone`,
    /// `files` or `state`.
    pub check: String,
    /// What it is about: `store`, `volume`, `snapshot`, `clone`, `bookmark`, `segment` or `file`.
    pub what: String,
    /// `VOL`, `VOL@NAME`, `VOL/CLONE`, or a path in the store.
    pub name: String,
    /// One word: `damaged`, `lost`, `stale`, `orphan`, `failed`, `changed`, ...
    pub state: String,
    /// Why, in a line.
    pub reason: Option<String>,
    /// Which bytes of it, where that is known.
    pub ranges: Vec<Bytes>,
    /// What to do, in a line.
    pub advice: String,
    /// `check --repair` has mended it.
    pub repaired: bool,
}

impl Finding {
    /// A finding about a whole thing.
    pub fn new(severity: Severity, check: &str, what: &str, name: &str, state: &str) -> Finding {
        Finding {
            severity,
            check: check.to_owned(),
            what: what.to_owned(),
            name: name.to_owned(),
            state: state.to_owned(),
            reason: None,
            ranges: Vec::new(),
            advice: String::new(),
            repaired: false,
        }
    }

    /// Says why.
    #[must_use]
    pub fn because(mut self, why: impl Into<String>) -> Finding {
        self.reason = Some(why.into());
        self
    }

    /// Says what to do.
    #[must_use]
    pub fn advise(mut self, what: &str) -> Finding {
        what.clone_into(&mut self.advice);
        self
    }

    /// Says where.
    #[must_use]
    pub fn at(mut self, ranges: impl IntoIterator<Item = Range<u64>>) -> Finding {
        let bytes = |r: Range<u64>| Bytes {
            start: r.start,
            length: r.end - r.start,
        };
        self.ranges.extend(ranges.into_iter().map(bytes));
        self
    }
}

/// What an audit found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audit {
    /// Batches of the log that were read.
    pub batches: u64,
    /// Segments of the log.
    pub segments: u64,
    /// Preserved grains that were read and verified.
    pub grains_read: u64,
    /// Preserved grains that some snapshot needs.
    pub grains_needed: u64,
    /// What was found, in the order in which it was looked at.
    pub findings: Vec<Finding>,
    /// The extent map is not what the log gives, and making it again is certain to mend it.
    pub map_to_rebuild: bool,
    /// The map may know what the log has lost, so it is not to be made again.
    #[serde(skip)]
    pub(crate) keep_map: bool,
    /// The log, or its end, is gone: a start would go on from what is left, so it is for people to say
    /// when that is to be.
    #[serde(skip)]
    pub(crate) end_lost: bool,
}

impl Audit {
    fn concluded(mut self) -> Audit {
        self.map_to_rebuild &= !self.keep_map;
        if self.keep_map {
            let of_map = |f: &&mut Finding| matches!(f.check.as_str(), "map" | "bitmap");
            for finding in self.findings.iter_mut().filter(of_map) {
                if finding.severity != Severity::Note {
                    COPY_ASIDE.clone_into(&mut finding.advice);
                }
            }
        }
        self
    }
}

const COPY_ASIDE: &str = "copy the store aside before anything else";
const NEXT_START: &str = "nothing; the next start mends it";

/// Audits a store that is not open; the caller holds its lock.
///
/// # Errors
/// `Damaged` or `Unsupported` if the superblock cannot be used, which makes everything unreadable;
/// the system's errors.
pub fn offline(env: &Environment, share: Share, seed: u64) -> Result<Audit> {
    let mut audit = Audit::default();
    let superblock = slots(env.dir.as_ref(), &mut audit)?;
    let keys = Keys::derive(&superblock.secret, superblock.store);
    let dir = match env.dir.subdir("log", false) {
        Ok(dir) => dir,
        Err(e) => {
            audit.findings.push(
                Finding::new(Severity::Damage, "log", "file", "log", "lost")
                    .because(format!("the directory of the log cannot be opened: {e}"))
                    .advise("bring it back from a copy of the store"),
            );
            (audit.keep_map, audit.end_lost) = (true, true);
            return Ok(audit);
        }
    };
    let source = view::Source {
        dir: dir.as_ref(),
        keys: &keys,
        store: superblock.store,
        upto: None,
    };
    let mut view = View::read(&source, &mut audit)?;
    audit.keep_map = view.lost;
    view.unclean = superblock.open;
    for finding in audit.findings.iter_mut().filter(|f| f.state == "torn") {
        if !superblock.open {
            // A clean stop leaves none.
            finding.severity = Severity::Warning;
        }
    }
    // Noted there because the log had no room; they count like records.
    for mark in &superblock.invalid {
        view.fail(mark.volume, mark.first, mark.last);
    }
    states(&view.catalog, &mut audit);
    let actual = match view.read {
        true => actual_map(env, &source, &mut audit),
        // What cannot be read says nothing of the map.
        false => None,
    };
    let actual = match actual {
        Some(actual) => actual,
        None => return finish(env, dir.as_ref(), &keys, view, None, share, seed, audit),
    };
    compare::pages(&view, &actual, dir.as_ref(), &mut audit)?;
    compare::bitmaps(&view, &actual, &mut audit);
    finish(
        env,
        dir.as_ref(),
        &keys,
        view,
        Some(actual),
        share,
        seed,
        audit,
    )
}

/// What needs nothing but the log's own map.
#[allow(clippy::too_many_arguments, reason = "one caller, in two places")]
fn finish(
    env: &Environment,
    log: &dyn Dir,
    keys: &Keys,
    view: View,
    actual: Option<ExtentMap>,
    share: Share,
    seed: u64,
    mut audit: Audit,
) -> Result<Audit> {
    files::clones(env.dir.as_ref(), &view, actual.as_ref(), &mut audit)?;
    files::orphans(env.dir.as_ref(), log, &view, &mut audit)?;
    let volumes = verify::points_of(&view.catalog);
    let read = |place: crate::units::Place, buf: &mut [u8]| view::read_payload(log, place, buf);
    let walk = verify::Walk {
        map: &view.map,
        volumes: &volumes,
        keys,
        read: &read,
        share,
        seed,
    };
    let mut bad = verify::Rot::default();
    if share != Share::NONE {
        let choice = (share, seed);
        files::content(&env.dir, keys, &view, actual.as_ref(), choice, &mut audit)?;
    }
    let counts = walk.run(None, &mut |rot| {
        bad.merge(rot);
        Ok(())
    })?;
    audit.grains_read += counts.read;
    audit.grains_needed += counts.needed;
    audit.findings.extend(bad.findings());
    Ok(audit.concluded())
}

/// Audits an open store. What changes meanwhile is left out, not judged.
///
/// # Errors
/// `Damaged` if the superblock cannot be read any more; the system's errors.
pub fn online(shared: &Shared) -> Result<Audit> {
    let mut audit = Audit::default();
    let superblock = slots(shared.env.dir.as_ref(), &mut audit)?;
    let keys = Keys::derive(&superblock.secret, superblock.store);
    let dir = shared.env.dir.subdir("log", false);
    let dir = crate::error::IoContext::context(dir, || "cannot open the log's directory")?;
    // No checkpoint, sweep or removal of a segment meanwhile.
    let _maintaining = lock(&shared.maintaining);
    shared.check_open()?;
    let durable = shared.log.durable_lsn();
    let index = shared.map.copy_of_index();
    let applied = shared.map.applied();
    let source = view::Source {
        dir: dir.as_ref(),
        keys: &keys,
        store: superblock.store,
        upto: Some((applied.map_or(Lsn(0), |a| a.lsn), durable)),
    };
    let mut view = View::read(&source, &mut audit)?;
    audit.keep_map = view.lost;
    let now = lock(&shared.catalog).clone();
    view.keep_points_of(&now);
    states(&now, &mut audit);
    match index.and_then(|index| ExtentMap::open(Arc::new(index), CACHE)) {
        Ok(actual) => {
            compare::pages(&view, &actual, dir.as_ref(), &mut audit)?;
            compare::bitmaps(&view, &actual, &mut audit);
        }
        Err(e) => map_damaged(&e.chain(), &mut audit),
    }
    Ok(audit.concluded())
}

/// Bytes of the cache of a map that is only walked.
const CACHE: usize = 4 << 20;

fn slots(dir: &dyn Dir, audit: &mut Audit) -> Result<Superblock> {
    let best = superblock::SuperblockFile::open(dir)?;
    for (number, slot) in (0u64..).zip(superblock::slots(dir)?) {
        let why = match slot {
            Ok(slot) if slot.sequence % 2 != number => "holds what belongs to the other slot",
            Ok(slot) if slot.store != best.current().store => "is of another store",
            Ok(_) => continue,
            Err(_) => "does not match its checksum",
        };
        audit.findings.push(
            Finding::new(
                Severity::Warning,
                "superblock",
                "file",
                "superblock",
                "damaged",
            )
            .because(format!("slot {number} {why}; the other one is good"))
            .at(std::iter::once(
                number * superblock::SLOT_BYTES..(number + 1) * superblock::SLOT_BYTES,
            ))
            .advise(NEXT_START),
        );
    }
    Ok(best.current().clone())
}

/// What the catalogue itself says is wrong.
fn states(catalog: &Catalog, audit: &mut Audit) {
    let failed = |state: &SnapshotState| match state {
        SnapshotState::Failed(why) => Some(why.clone()),
        SnapshotState::Active => None,
    };
    let mut add = |what: &str, name: String, why: String, advice: &str| {
        audit.findings.push(
            Finding::new(Severity::Damage, "state", what, &name, "failed")
                .because(why)
                .advise(advice),
        );
    };
    for (id, volume) in &catalog.volumes {
        for snap in volume.snapshots.values() {
            if let Some(why) = failed(&snap.state) {
                let name = format!("{}@{}", volume.name, snap.name);
                add("snapshot", name, why, "delete it");
            }
        }
        for mark in volume.bookmarks.values() {
            if let Some(why) = failed(&mark.state) {
                let name = format!("{}@{}", volume.name, mark.name);
                add(
                    "bookmark",
                    name,
                    why,
                    "delete it; the next backup is a full one",
                );
            }
        }
        for clone in catalog.clones.values().filter(|c| c.volume == *id) {
            if let Some(why) = failed(&clone.state) {
                let name = format!("{}/{}", volume.name, clone.name);
                add("clone", name, why, "delete it");
            }
        }
    }
}

/// The map that the store has, brought up to the log's end in memory.
fn actual_map(
    env: &Environment,
    source: &view::Source<'_>,
    audit: &mut Audit,
) -> Option<ExtentMap> {
    let opened = env
        .index
        .open()
        .and_then(|index| TransientIndex::copy_of(index.as_ref() as &dyn Index))
        .and_then(|index| ExtentMap::open(Arc::new(index), CACHE));
    let map = match opened {
        Ok(map) => map,
        Err(e) if e.kind() == Kind::NoSpace => {
            audit.findings.push(
                Finding::new(Severity::Warning, "map", "file", "map", "unread")
                    .because(format!("the disk is too full to open it: {}", e.chain()))
                    .advise("free space and check again"),
            );
            return None;
        }
        Err(e) => {
            map_damaged(&e.chain(), audit);
            return None;
        }
    };
    let Some(applied) = map.applied() else {
        audit.findings.push(
            Finding::new(Severity::Note, "map", "file", "map", "absent")
                .because(
                    "the extent map is new, was removed, or has lost its beginning; the log alone is the truth",
                )
                .advise(NEXT_START),
        );
        return None;
    };
    if applied.store != source.store {
        map_damaged("it belongs to another store", audit);
        return None;
    }
    match view::catch_up(source, &map, applied) {
        Ok(scanned) if applied.lsn.0 <= scanned.tail.lsn => Some(map),
        Ok(scanned) => {
            (audit.keep_map, audit.end_lost) = (true, true);
            let (first, last) = (scanned.tail.lsn + 1, applied.lsn.0);
            audit.findings.push(
                Finding::new(Severity::Damage, "log", "store", "log", "lost")
                    .because(format!(
                        "batches {first} to {last}, its end, are lost: the extent map has them"
                    ))
                    .advise(
                        "bring the log back from a copy of the store; a start goes on without them and marks failed \
                         what existed then, or refuses",
                    ),
            );
            Some(map)
        }
        Err(e) => {
            map_damaged(&e.chain(), audit);
            None
        }
    }
}

fn map_damaged(why: &str, audit: &mut Audit) {
    audit.map_to_rebuild = true;
    audit.findings.push(
        Finding::new(Severity::Warning, "map", "file", "map", "damaged")
            .because(why)
            .advise("'stillframe check --repair' makes it again from the log"),
    );
}

/// Names of snapshots and clones by (volume, epoch), for findings.
fn names_of(catalog: &Catalog, volume: u32, epoch: u64) -> Vec<(&'static str, String)> {
    let Some(entry) = catalog.volumes.get(&volume) else {
        return Vec::new();
    };
    let mut names = Vec::new();
    if let Some(snap) = entry.snapshots.get(&epoch) {
        names.push(("snapshot", format!("{}@{}", entry.name, snap.name)));
    }
    let on_it = catalog
        .clones
        .values()
        .filter(|c| c.volume == volume && catalog.bottom(c.top) == Some(epoch));
    names.extend(on_it.map(|c| ("clone", format!("{}/{}", entry.name, c.name))));
    names
}

/// Bytes by name, joined where they touch.
#[derive(Default)]
struct Places(BTreeMap<(&'static str, String), Vec<Range<u64>>>);

impl Places {
    fn add(&mut self, who: (&'static str, String), bytes: Range<u64>) {
        let ranges = self.0.entry(who).or_default();
        match ranges.last_mut() {
            Some(last) if last.end == bytes.start => last.end = bytes.end,
            _ => ranges.push(bytes),
        }
    }
}

/// A file of a directory, `None` if it is not there.
fn open_if_there(
    dir: &dyn Dir,
    name: &str,
) -> std::io::Result<Option<Arc<dyn crate::sys::disk::Disk>>> {
    match dir.open(name, Open::Read) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some),
    }
}
