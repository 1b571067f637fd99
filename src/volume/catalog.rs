//! The catalogue: volumes, snapshots, counters. A function of the log.
//!
//! [`Catalog::apply`] is the only way it changes: the engine calls it for each record that has become
//! durable, recovery for each record it finds. A CATALOG record holds the whole of it as a table of
//! the same records, so there is one encoding and older segments may go.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use crate::error::{Error, Kind, Result};
use crate::log::codec::{Reader, Writer};
use crate::log::record::{Record, RecordType, encode_table};
use crate::sys::disk::Identity;
use crate::units::{COUNTER_MAX, Grain, Name, Uuid, VOLUME_SIZE_MAX};
use crate::volume::clone_records::{CloneEntry, LAYER_BIT, LayerEntry};
use crate::volume::{OnFull, SnapshotState, VolumeOptions};

/// First inode number handed out to volumes and snapshots; smaller ones are the tree's own.
pub const INO_FIRST: u64 = 1024;
/// Inode numbers a volume takes for its own nodes.
pub const INO_PER_VOLUME: u64 = 16;

/// Flag of the STORE entry: the store was stopped cleanly.
const STORE_CLEAN: u32 = 1;
/// Flag of the STORE entry: a clone had failed then, whose files are as after an unclean stop.
const STORE_UNSETTLED: u32 = 2;
/// Offset of a SNAP's flags in its body.
const SNAP_FLAGS_AT: usize = 88;
/// Flag of a SNAP: the snapshot has failed.
const SNAP_FAILED: u8 = 1;
/// Flag of a SNAP: the snapshot is on hold.
const SNAP_HELD: u8 = 2;
/// Flag of a SNAP: the snapshot was deleted and is kept by a layer.
const SNAP_KEPT: u8 = 4;
/// Flag of a BOOKMARK: the bookmark has failed.
const BOOKMARK_FAILED: u8 = 1;

/// Flag of a RESIZE: the volume has its new size.
const RESIZE_DONE: u64 = 1;

/// What is known of a source's trustworthiness, as far as it outlives the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Trust {
    /// The content is as we left it.
    #[default]
    Known,
    /// The last stop was unclean; nothing could be checked but identity and size.
    Unverified,
    /// Found changed; waits for an operator.
    Changed,
}

/// A revert that was begun and not ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reverting {
    /// Epoch of the snapshot that the volume becomes.
    pub target: u64,
    /// Epoch of the snapshot that undoes it.
    pub undo: u64,
}

/// A snapshot in the catalogue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapEntry {
    /// Name.
    pub name: Name,
    /// Unique for ever.
    pub uuid: Uuid,
    /// Inode number.
    pub ino: u64,
    /// The instant, ns since 1970.
    pub taken_ns: i64,
    /// Last change before it, ns since 1970.
    pub mtime_ns: i64,
    /// Bytes.
    pub size: u64,
    /// Bytes of storage its content used.
    pub allocated: u64,
    /// The snapshot before it.
    pub parent: Option<Uuid>,
    /// Its group.
    pub group: Option<Uuid>,
    /// On hold: it cannot be deleted.
    pub held: bool,
    /// Whether it can be read.
    pub state: SnapshotState,
}

/// A bookmark in the catalogue: what is left of a snapshot whose content was given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BookmarkEntry {
    /// Name.
    pub name: Name,
    /// Uuid of the snapshot it was.
    pub uuid: Uuid,
    /// Inode number of the snapshot it was.
    pub ino: u64,
    /// The instant, ns since 1970.
    pub taken_ns: i64,
    /// Last change before it, ns since 1970.
    pub mtime_ns: i64,
    /// Bytes of the volume then.
    pub size: u64,
    /// Whether what changed since is known.
    pub state: SnapshotState,
}

/// A volume in the catalogue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeEntry {
    /// Unique for ever.
    pub uuid: Uuid,
    /// Name.
    pub name: Name,
    /// Absolute path of the source.
    pub source: String,
    /// Bytes.
    pub size: u64,
    /// Grain.
    pub grain: Grain,
    /// Options, grain included.
    pub options: VolumeOptions,
    /// First of its inode numbers.
    pub ino_base: u64,
    /// When it was added, ns since 1970.
    pub added_ns: i64,
    /// The largest epoch any record of it names.
    pub epoch: u64,
    /// Last change, ns since 1970.
    pub mtime_ns: i64,
    /// The largest mtime a snapshot of it ever got.
    pub snap_mtime_ns: i64,
    /// Whether anything may have changed since the last snapshot.
    pub changed: bool,
    /// Trust in the source.
    pub trust: Trust,
    /// The source as it was left at the last clean stop.
    pub identity: Identity,
    /// The size of a resize that was begun: the source has it, or `size`, or one between.
    pub resizing: Option<u64>,
    /// A revert that was begun: the source is partly the one and partly the other.
    pub reverting: Option<Reverting>,
    /// Snapshots by epoch.
    pub snapshots: BTreeMap<u64, SnapEntry>,
    /// Bookmarks by epoch; no epoch is that of a snapshot, too.
    pub bookmarks: BTreeMap<u64, BookmarkEntry>,
    /// Snapshots that were deleted while a layer of a clone stands on them, by epoch.
    pub kept: BTreeMap<u64, SnapEntry>,
}

/// Everything a store knows besides preserved content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Catalog {
    /// The store was stopped cleanly, and nothing happened since.
    pub clean: bool,
    /// The store was stopped cleanly but for clones that had failed: their overlays are to be taken
    /// for what an unclean stop leaves.
    pub unsettled: bool,
    /// Number of the next volume.
    pub next_volume: u32,
    /// Next inode number.
    pub next_ino: u64,
    /// Volumes by number.
    pub volumes: BTreeMap<u32, VolumeEntry>,
    /// Number of the next clone.
    pub next_clone: u32,
    /// Number of the next layer.
    pub next_layer: u32,
    /// Clones by number.
    pub clones: BTreeMap<u32, CloneEntry>,
    /// Layers of clones by number.
    pub layers: BTreeMap<u32, LayerEntry>,
}

impl Default for Catalog {
    fn default() -> Self {
        Catalog {
            clean: false,
            unsettled: false,
            next_volume: 1,
            next_ino: INO_FIRST,
            volumes: BTreeMap::new(),
            next_clone: 1,
            next_layer: 1,
            clones: BTreeMap::new(),
            layers: BTreeMap::new(),
        }
    }
}

impl Catalog {
    /// Applies a durable record. A CATALOG needs its payload: see [`Catalog::decode`].
    ///
    /// # Errors
    /// `Damaged` if the record does not fit what is known, `Unsupported` for a type whose meaning
    /// this program does not have.
    pub fn apply(&mut self, record: &Record) -> Result<()> {
        counted(record.epoch)?;
        match record.kind {
            RecordType::Preserve | RecordType::Zero | RecordType::Changed => {
                self.clean = false;
                if let Some(volume) = self.volumes.get_mut(&record.volume) {
                    same_grain(volume, record)?;
                    volume.epoch = volume.epoch.max(record.epoch);
                    volume.changed = true;
                }
            }
            RecordType::Bitmap => {
                if let Some(volume) = self.volumes.get_mut(&record.volume) {
                    // Nothing of a complete epoch follows its bitmap: another one is open by now.
                    let complete = record.bitmap_bits().is_some_and(|(_, complete)| complete);
                    let epoch = (record.epoch + u64::from(complete)).min(COUNTER_MAX);
                    volume.epoch = volume.epoch.max(epoch);
                }
            }
            RecordType::Snap => self.apply_snap(record)?,
            RecordType::Delete => {
                self.volume(record.volume)?;
                self.unlist_snapshot(record.volume, record.epoch);
            }
            RecordType::Bookmark => {
                let bookmark = decode_bookmark(&record.body)?;
                self.next_ino = self.next_ino.max(bookmark.ino + 1);
                self.volume(record.volume)?;
                // One record does both: no crash leaves a snapshot and its bookmark, or neither.
                self.unlist_snapshot(record.volume, record.epoch);
                let volume = self.volume(record.volume)?;
                volume.epoch = volume.epoch.max(record.epoch);
                volume.bookmarks.insert(record.epoch, bookmark);
            }
            RecordType::BookmarkDeleted => {
                self.volume(record.volume)?.bookmarks.remove(&record.epoch);
            }
            RecordType::Rename => {
                let name = Reader::new(&record.body, "a RENAME").name()?;
                let snapshots = &mut self.volume(record.volume)?.snapshots;
                if let Some(snap) = snapshots.get_mut(&record.epoch) {
                    snap.name = name;
                }
            }
            RecordType::Hold => {
                let held = Reader::new(&record.body, "a HOLD").u8()? != 0;
                let snapshots = &mut self.volume(record.volume)?.snapshots;
                if let Some(snap) = snapshots.get_mut(&record.epoch) {
                    snap.held = held;
                }
            }
            RecordType::Volume => self.apply_volume(record)?,
            RecordType::Resize => self.apply_resize(record)?,
            RecordType::RevertBegin => {
                let target = Reader::new(&record.body, "a REVERT_BEGIN").u64()?;
                let undo = record.epoch;
                self.volume(record.volume)?.reverting = Some(Reverting { target, undo });
            }
            RecordType::RevertEnd => {
                let mut r = Reader::new(&record.body, "a REVERT_END");
                let (size, source) = (sized(r.u64()?)?, r.u64()?);
                let volume = self.volume(record.volume)?;
                (volume.size, volume.identity.size) = (size, source);
                volume.reverting = None;
            }
            RecordType::VolumeRemoved => {
                self.volumes.remove(&record.volume);
                self.clones.retain(|_, clone| clone.volume != record.volume);
                self.drop_unreachable(record.volume);
            }
            RecordType::Clone => self.apply_clone(record)?,
            RecordType::CloneAlloc => self.apply_clone_alloc(record)?,
            RecordType::CloneDeleted => self.apply_clone_deleted(record),
            RecordType::Invalidate => {
                let mut r = Reader::new(&record.body, "an INVALIDATE");
                let (last, why) = (r.u64()?, r.text()?.to_owned());
                if record.volume & LAYER_BIT != 0 {
                    self.fail_clone(record.volume & !LAYER_BIT, &why);
                } else if let Some(volume) = self.volumes.get_mut(&record.volume)
                    && record.epoch <= last
                {
                    for snap in volume.points_mut(record.epoch..=last) {
                        snap.state = SnapshotState::Failed(why.clone());
                    }
                    for (_, mark) in volume.bookmarks.range_mut(record.epoch..=last) {
                        mark.state = SnapshotState::Failed(why.clone());
                    }
                }
            }
            RecordType::Store => {
                let mut r = Reader::new(&record.body, "a STORE record");
                let flags = r.u32()?;
                self.clean = flags & STORE_CLEAN != 0;
                self.unsettled = flags & STORE_UNSETTLED != 0;
                self.next_volume = self.next_volume.max(next_number(r.u32()?)?);
                let next_ino = r.u64()?;
                counted(next_ino.saturating_sub(INO_PER_VOLUME))?;
                self.next_ino = self.next_ino.max(next_ino);
                if r.left() > 0 {
                    self.next_clone = self.next_clone.max(next_number(r.u32()?)?);
                    self.next_layer = self.next_layer.max(next_number(r.u32()?)?);
                }
                return Ok(());
            }
            RecordType::Group | RecordType::Catalog => {}
            other => {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!(
                        "the store uses {other:?}, which this stillframe does not; use a newer one"
                    ),
                ));
            }
        }
        self.clean = false;
        Ok(())
    }

    fn volume(&mut self, id: u32) -> Result<&mut VolumeEntry> {
        self.volumes.get_mut(&id).ok_or_else(|| {
            Error::new(
                Kind::Damaged,
                format!("the log speaks of a volume {id} it never defined"),
            )
        })
    }

    fn apply_snap(&mut self, record: &Record) -> Result<()> {
        let mut r = Reader::new(&record.body, "a SNAP");
        let (uuid, ino) = (r.uuid()?, counted(r.u64()?)?);
        let (taken_ns, mtime_ns) = (r.i64()?, r.i64()?);
        let (size, allocated) = (sized(r.u64()?)?, r.u64()?);
        let (parent, group) = (r.uuid_or_zero()?, r.uuid_or_zero()?);
        let flags = r.u8()?;
        let (failed, held) = (flags & SNAP_FAILED != 0, flags & SNAP_HELD != 0);
        let kept = flags & SNAP_KEPT != 0;
        let (name, why) = (r.name()?, r.text()?.to_owned());
        let state = if failed {
            SnapshotState::Failed(why)
        } else {
            SnapshotState::Active
        };
        self.next_ino = self.next_ino.max(ino + 1);
        let volume = self.volume(record.volume)?;
        volume.epoch = volume.epoch.max(record.epoch);
        volume.changed = false;
        volume.snap_mtime_ns = volume.snap_mtime_ns.max(mtime_ns);
        volume.mtime_ns = volume.mtime_ns.max(mtime_ns);
        let snap = SnapEntry {
            name,
            uuid,
            ino,
            taken_ns,
            mtime_ns,
            size,
            allocated,
            parent,
            group,
            held,
            state,
        };
        if !kept && volume.bookmarks.contains_key(&record.epoch) {
            let why = "the log speaks of a snapshot after it became a bookmark";
            return Err(Error::new(Kind::Damaged, why));
        }
        match kept {
            true => volume.kept.insert(record.epoch, snap),
            false => volume.snapshots.insert(record.epoch, snap),
        };
        Ok(())
    }

    fn apply_resize(&mut self, record: &Record) -> Result<()> {
        let mut r = Reader::new(&record.body, "a RESIZE");
        let (_, to, source, done) = (r.u64()?, sized(r.u64()?)?, r.u64()?, r.u64()?);
        let volume = self.volume(record.volume)?;
        if done & RESIZE_DONE != 0 {
            (volume.size, volume.identity.size) = (to, source);
            volume.resizing = None;
        } else {
            volume.resizing = Some(to);
        }
        Ok(())
    }

    fn apply_volume(&mut self, record: &Record) -> Result<()> {
        let entry = decode_volume(&record.body)?;
        self.next_volume = self.next_volume.max(numbered(record.volume)? + 1);
        self.next_ino = self.next_ino.max(entry.ino_base + INO_PER_VOLUME);
        let mut entry = entry;
        // These have records of their own.
        if let Some(known) = self.volumes.remove(&record.volume) {
            entry.snapshots = known.snapshots;
            entry.kept = known.kept;
            entry.bookmarks = known.bookmarks;
            entry.resizing = known.resizing;
            entry.reverting = known.reverting;
            entry.epoch = entry.epoch.max(known.epoch);
        }
        self.volumes.insert(record.volume, entry);
        Ok(())
    }

    /// The whole catalogue as the payload of a CATALOG record.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        let flags = [(self.clean, STORE_CLEAN), (self.unsettled, STORE_UNSETTLED)];
        let flags = flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag);
        w.u32(flags.sum()).u32(self.next_volume).u64(self.next_ino);
        if self.next_clone > 1 || self.next_layer > 1 {
            w.u32(self.next_clone).u32(self.next_layer);
        }
        let mut records = vec![Record::plain(RecordType::Store, 0, 0, w.finish())];
        for (&id, volume) in &self.volumes {
            records.push(volume_record(id, volume));
            for (&epoch, snap) in &volume.snapshots {
                records.push(snap_record(id, epoch, snap));
            }
            for (&epoch, bookmark) in &volume.bookmarks {
                records.push(bookmark_record(id, epoch, bookmark));
            }
            for (&epoch, snap) in &volume.kept {
                let mut record = snap_record(id, epoch, snap);
                record.body[SNAP_FLAGS_AT] |= SNAP_KEPT;
                records.push(record);
            }
            // A SNAP says that nothing changed since; the VOLUME after it has the last word.
            records.push(volume_record(id, volume));
            if let Some(to) = volume.resizing {
                records.push(resize_record(id, volume.size, to));
            }
            if let Some(reverting) = volume.reverting {
                records.push(revert_begin_record(id, reverting));
            }
            records.extend(self.clone_records(id));
        }
        let mut w = Writer::new();
        w.u32(records.len() as u32).u32(0);
        w.raw(&encode_table(&records));
        w.finish()
    }

    /// Reads the payload of a CATALOG record.
    ///
    /// # Errors
    /// As [`Catalog::apply`].
    pub fn decode(payload: &[u8]) -> Result<Catalog> {
        let mut r = Reader::new(payload, "a CATALOG");
        let (count, _) = (r.u32()?, r.u32()?);
        let mut catalog = Catalog::default();
        let mut clean = false;
        for _ in 0..count {
            if let Some(record) = Record::decode(&mut r)? {
                catalog.apply(&record)?;
                if record.kind == RecordType::Store {
                    clean = catalog.clean;
                }
            }
        }
        catalog.clean = clean;
        Ok(catalog)
    }

    /// A volume's number by name.
    pub fn find(&self, name: &Name) -> Option<u32> {
        self.volumes
            .iter()
            .find(|(_, v)| v.name == *name)
            .map(|(&id, _)| id)
    }
}

impl VolumeEntry {
    /// Whether the volume's source may have so many bytes: a device any that suffice, a file those of
    /// the volume or, while a resize or revert is unfinished, any from the old to the new size. A revert
    /// that goes back may have been to any snapshot.
    pub fn allows(&self, found: &Identity) -> bool {
        let reverted = self.reverting.into_iter().flat_map(|r| {
            let back = r.target == r.undo;
            let concerns = move |epoch: &u64| back || *epoch == r.target || *epoch == r.undo;
            let snapshots = self.snapshots.iter();
            snapshots
                .filter(move |(epoch, _)| concerns(epoch))
                .map(|(_, snap)| snap.size)
        });
        let sizes = || reverted.clone().chain(self.resizing);
        let least = sizes().fold(self.size, u64::min);
        let most = sizes().fold(self.size, u64::max);
        found.size >= least && (found.size <= most || is_device(found))
    }

    /// The snapshots with epochs in a range, listed or kept.
    pub fn points_mut(
        &mut self,
        epochs: RangeInclusive<u64>,
    ) -> impl Iterator<Item = &mut SnapEntry> {
        let kept = self.kept.range_mut(epochs.clone());
        self.snapshots
            .range_mut(epochs)
            .chain(kept)
            .map(|(_, snap)| snap)
    }

    /// Whether an epoch is that of a snapshot, listed or kept, or of a bookmark.
    pub fn has_epoch(&self, epoch: u64) -> bool {
        self.snapshots.contains_key(&epoch)
            || self.kept.contains_key(&epoch)
            || self.bookmarks.contains_key(&epoch)
    }

    /// First and last epoch of the snapshots, listed or kept, and of the bookmarks; `None` if there are
    /// none.
    pub fn lost_span(&self) -> Option<(u64, u64)> {
        let points = || self.snapshots.keys().chain(self.kept.keys());
        let epochs = || points().chain(self.bookmarks.keys()).copied();
        Some((epochs().min()?, epochs().max()?))
    }

    /// First and last epoch of the snapshots, listed or kept; `None` if there are none.
    pub fn point_span(&self) -> Option<(u64, u64)> {
        let kept = || self.kept.keys().chain(self.bookmarks.keys());
        let epochs = || self.snapshots.keys().chain(kept()).copied();
        Some((epochs().min()?, epochs().max()?))
    }

    /// A snapshot's epoch by name.
    pub fn find(&self, name: &Name) -> Option<u64> {
        self.snapshots
            .iter()
            .find(|(_, s)| s.name == *name)
            .map(|(&epoch, _)| epoch)
    }

    /// A bookmark's epoch by name.
    pub fn find_bookmark(&self, name: &Name) -> Option<u64> {
        self.bookmarks
            .iter()
            .find(|(_, b)| b.name == *name)
            .map(|(&epoch, _)| epoch)
    }

    /// Whether a snapshot or a bookmark has this name.
    pub fn has(&self, name: &Name) -> bool {
        self.find(name).is_some() || self.find_bookmark(name).is_some()
    }

    /// Whether anything is only right as long as nobody but us changes the source.
    pub fn depended_on(&self) -> bool {
        let good = |b: &BookmarkEntry| b.state == SnapshotState::Active;
        self.point_span().is_some() || self.bookmarks.values().any(good)
    }
}

/// Whether a source is a device: it keeps its size, and may be larger than its volume.
pub fn is_device(identity: &Identity) -> bool {
    identity.ino == 0
}

/// The SNAP record of a snapshot.
pub fn snap_record(volume: u32, epoch: u64, snap: &SnapEntry) -> Record {
    let mut w = Writer::new();
    w.uuid(snap.uuid)
        .u64(snap.ino)
        .i64(snap.taken_ns)
        .i64(snap.mtime_ns);
    w.u64(snap.size)
        .u64(snap.allocated)
        .uuid_or_zero(snap.parent)
        .uuid_or_zero(snap.group);
    let (failed, why) = match &snap.state {
        SnapshotState::Active => (0, ""),
        SnapshotState::Failed(why) => (SNAP_FAILED, why.as_str()),
    };
    let held = if snap.held { SNAP_HELD } else { 0 };
    w.u8(failed | held).text(snap.name.as_str()).text(why);
    Record::plain(RecordType::Snap, volume, epoch, w.finish())
}

/// The BOOKMARK record that puts a bookmark in the place of a snapshot.
pub fn bookmark_record(volume: u32, epoch: u64, bookmark: &BookmarkEntry) -> Record {
    let mut w = Writer::new();
    w.uuid(bookmark.uuid)
        .u64(bookmark.ino)
        .i64(bookmark.taken_ns)
        .i64(bookmark.mtime_ns)
        .u64(bookmark.size);
    let (flags, why) = match &bookmark.state {
        SnapshotState::Active => (0, ""),
        SnapshotState::Failed(why) => (BOOKMARK_FAILED, why.as_str()),
    };
    w.u8(flags).text(bookmark.name.as_str()).text(why);
    Record::plain(RecordType::Bookmark, volume, epoch, w.finish())
}

/// A volume has one grain for ever: a record with another would be taken for other bytes of it.
pub(super) fn same_grain(volume: &VolumeEntry, record: &Record) -> Result<()> {
    let own = volume.grain.bytes();
    match record
        .grain_bytes()
        .is_none_or(|bytes| u64::from(bytes) == own)
    {
        true => Ok(()),
        false => Err(Error::new(
            Kind::Damaged,
            "a record of the log has another grain than its volume",
        )),
    }
}

/// A counter as a record says it.
pub(super) fn counted(value: u64) -> Result<u64> {
    match value <= COUNTER_MAX {
        true => Ok(value),
        false => Err(Error::new(
            Kind::Damaged,
            "a record of the catalogue counts further than anybody has",
        )),
    }
}

/// A size as a record says it.
pub(super) fn sized(bytes: u64) -> Result<u64> {
    match bytes <= VOLUME_SIZE_MAX {
        true => Ok(bytes),
        false => Err(Error::new(
            Kind::Damaged,
            "a record of the catalogue speaks of more than a volume can hold",
        )),
    }
}

/// The next number of a volume, clone or layer: one more than the largest that is given.
fn next_number(next: u32) -> Result<u32> {
    numbered(next.saturating_sub(1)).map(|_| next)
}

/// A number of a volume, as a record says it.
fn numbered(id: u32) -> Result<u32> {
    match id < LAYER_BIT {
        true => Ok(id),
        false => Err(Error::new(
            Kind::Damaged,
            "a record of the catalogue has a number that is never given",
        )),
    }
}

fn decode_bookmark(body: &[u8]) -> Result<BookmarkEntry> {
    let mut r = Reader::new(body, "a BOOKMARK");
    let (uuid, ino) = (r.uuid()?, counted(r.u64()?)?);
    let (taken_ns, mtime_ns, size) = (r.i64()?, r.i64()?, sized(r.u64()?)?);
    let flags = r.u8()?;
    let (name, why) = (r.name()?, r.text()?.to_owned());
    let state = match flags & BOOKMARK_FAILED {
        0 => SnapshotState::Active,
        _ => SnapshotState::Failed(why),
    };
    Ok(BookmarkEntry {
        name,
        uuid,
        ino,
        taken_ns,
        mtime_ns,
        size,
        state,
    })
}

/// The RENAME record of a snapshot.
pub fn rename_record(volume: u32, epoch: u64, name: &Name) -> Record {
    let mut w = Writer::new();
    w.text(name.as_str());
    Record::plain(RecordType::Rename, volume, epoch, w.finish())
}

/// The HOLD record that puts a snapshot on hold or releases it.
pub fn hold_record(volume: u32, epoch: u64, held: bool) -> Record {
    Record::plain(RecordType::Hold, volume, epoch, vec![u8::from(held)])
}

/// An INVALIDATE of the snapshots with epochs in `first..=last`.
pub fn invalidate_record(volume: u32, first: u64, last: u64, why: &str) -> Record {
    let mut w = Writer::new();
    w.u64(last).text(why);
    Record::plain(RecordType::Invalidate, volume, first, w.finish())
}

/// The RESIZE record that says a volume is about to change its size.
pub fn resize_record(volume: u32, from: u64, to: u64) -> Record {
    let mut w = Writer::new();
    w.u64(from).u64(to).u64(0).u64(0);
    Record::plain(RecordType::Resize, volume, 0, w.finish())
}

/// The RESIZE record that says a volume has its new size, and its source has `source` bytes.
pub fn resized_record(volume: u32, from: u64, to: u64, source: u64) -> Record {
    let mut w = Writer::new();
    w.u64(from).u64(to).u64(source).u64(RESIZE_DONE);
    Record::plain(RecordType::Resize, volume, 0, w.finish())
}

/// The REVERT_BEGIN record of a revert.
pub fn revert_begin_record(volume: u32, reverting: Reverting) -> Record {
    let mut w = Writer::new();
    w.u64(reverting.target);
    Record::plain(RecordType::RevertBegin, volume, reverting.undo, w.finish())
}

/// The REVERT_END record of a revert: the volume has `size` bytes, and its source `source`.
pub fn revert_end_record(volume: u32, undo: u64, size: u64, source: u64) -> Record {
    let mut w = Writer::new();
    w.u64(size).u64(source);
    Record::plain(RecordType::RevertEnd, volume, undo, w.finish())
}

/// The VOLUME record of a volume, without its snapshots.
pub fn volume_record(id: u32, v: &VolumeEntry) -> Record {
    let mut w = Writer::new();
    w.uuid(v.uuid).u64(v.size).u32(v.grain.bytes() as u32);
    w.u32(v.options.on_full_wait_s);
    w.u8(match v.options.on_full {
        OnFull::FailWrite => 0,
        OnFull::FailSnapshot => 1,
    });
    w.u8(match v.trust {
        Trust::Known => 0,
        Trust::Unverified => 1,
        Trust::Changed => 2,
    });
    w.u8(u8::from(v.changed)).u8(0).u32(0);
    w.u64(v.ino_base)
        .i64(v.added_ns)
        .u64(v.epoch)
        .i64(v.mtime_ns)
        .i64(v.snap_mtime_ns);
    let i = &v.identity;
    w.u64(i.dev).u64(i.ino).u64(i.size).i64(i.ctime_ns);
    w.text(v.name.as_str()).text(&v.source);
    Record::plain(RecordType::Volume, id, 0, w.finish())
}

fn decode_volume(body: &[u8]) -> Result<VolumeEntry> {
    let bad = |what: &str| Error::new(Kind::Damaged, format!("a VOLUME record has a bad {what}"));
    let mut r = Reader::new(body, "a VOLUME record");
    let (uuid, size, grain) = (r.uuid()?, sized(r.u64()?)?, u64::from(r.u32()?));
    let grain = Grain::new(grain).map_err(|_| bad("grain"))?;
    let on_full_wait_s = r.u32()?;
    let on_full = match r.u8()? {
        0 => OnFull::FailWrite,
        1 => OnFull::FailSnapshot,
        _ => return Err(bad("policy")),
    };
    let trust = match r.u8()? {
        0 => Trust::Known,
        1 => Trust::Unverified,
        2 => Trust::Changed,
        _ => return Err(bad("trust")),
    };
    let changed = r.u8()? != 0;
    let _ = (r.u8()?, r.u32()?);
    let (ino_base, added_ns, epoch) = (counted(r.u64()?)?, r.i64()?, counted(r.u64()?)?);
    let (mtime_ns, snap_mtime_ns) = (r.i64()?, r.i64()?);
    let identity = Identity {
        dev: r.u64()?,
        ino: r.u64()?,
        size: r.u64()?,
        ctime_ns: r.i64()?,
    };
    let (name, source) = (r.name()?, r.text()?.to_owned());
    Ok(VolumeEntry {
        uuid,
        name,
        source,
        size,
        grain,
        options: VolumeOptions {
            grain,
            on_full,
            on_full_wait_s,
        },
        ino_base,
        added_ns,
        epoch,
        mtime_ns,
        snap_mtime_ns,
        changed,
        trust,
        identity,
        resizing: None,
        reverting: None,
        snapshots: BTreeMap::new(),
        bookmarks: BTreeMap::new(),
        kept: BTreeMap::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Catalog {
        let mut snapshots = BTreeMap::new();
        for epoch in [3, 9] {
            let state = match epoch {
                3 => SnapshotState::Active,
                _ => SnapshotState::Failed("thin target full".into()),
            };
            let snap = SnapEntry {
                name: Name::new(&format!("s{epoch}")).unwrap(),
                uuid: Uuid([epoch as u8; 16]),
                ino: 2000 + epoch,
                taken_ns: 5,
                mtime_ns: 4,
                size: 4097,
                allocated: 4096,
                parent: (epoch > 3).then_some(Uuid([3; 16])),
                group: None,
                held: epoch == 9,
                state,
            };
            snapshots.insert(epoch, snap);
        }
        let grain = Grain::new(65536).unwrap();
        let volume = VolumeEntry {
            uuid: Uuid([4; 16]),
            name: Name::new("vm1").unwrap(),
            source: "/srv/vm1 with spaces.img".into(),
            size: 1 << 50,
            grain,
            options: VolumeOptions {
                grain,
                on_full: OnFull::FailSnapshot,
                on_full_wait_s: 7,
            },
            ino_base: 1024,
            added_ns: 1,
            epoch: 12,
            mtime_ns: 100,
            snap_mtime_ns: 4,
            changed: true,
            trust: Trust::Unverified,
            identity: Identity {
                dev: 1,
                ino: 2,
                size: 3,
                ctime_ns: -4,
            },
            resizing: None,
            reverting: None,
            snapshots,
            bookmarks: BTreeMap::new(),
            kept: BTreeMap::new(),
        };
        Catalog {
            clean: true,
            next_volume: 8,
            next_ino: 5000,
            volumes: BTreeMap::from([(7, volume)]),
            ..Catalog::default()
        }
    }

    /// Records that fuzzing got past the readers, and the largest that are good.
    #[test]
    fn what_no_writer_says_is_damaged() {
        let volume = |change: &dyn Fn(&mut VolumeEntry)| {
            let mut entry = sample().volumes[&7].clone();
            change(&mut entry);
            volume_record(7, &entry)
        };
        let snap = |epoch, change: &dyn Fn(&mut SnapEntry)| {
            let mut entry = sample().volumes[&7].snapshots[&3].clone();
            change(&mut entry);
            snap_record(7, epoch, &entry)
        };
        let mut store = Writer::new();
        store.u32(0).u32(u32::MAX).u64(5000).u32(1).u32(1);
        let store = Record::plain(RecordType::Store, 0, 0, store.finish());
        let good = [
            volume(&|v| v.size = VOLUME_SIZE_MAX),
            snap(20, &|s| s.size = VOLUME_SIZE_MAX),
            Record::grains(RecordType::Zero, 7, 12, 0..1, 65536),
            resize_record(7, 1, VOLUME_SIZE_MAX),
        ];
        for (n, record) in good.iter().enumerate() {
            assert!(sample().apply(record).is_ok(), "{n}");
        }
        let bad = [
            volume(&|v| v.size = u64::MAX),
            volume(&|v| v.ino_base = u64::MAX),
            volume(&|v| v.epoch = u64::MAX),
            Record {
                volume: u32::MAX,
                ..volume(&|_| {})
            },
            snap(20, &|s| s.ino = u64::MAX),
            snap(20, &|s| s.size = u64::MAX),
            snap(u64::MAX, &|_| {}),
            resize_record(7, 1, u64::MAX),
            revert_end_record(7, 9, u64::MAX, 1),
            Record::grains(RecordType::Zero, 7, 12, 0..1, 4096),
            store,
        ];
        for (n, record) in bad.iter().enumerate() {
            let why = sample().apply(record).map(|()| n).unwrap_err();
            assert_eq!(why.kind(), Kind::Damaged, "{n}");
        }
    }

    #[test]
    fn a_volume_keeps_its_epoch_and_a_bookmark_its_own() {
        let mut catalog = sample();
        let mut older = catalog.volumes[&7].clone();
        older.epoch = 2;
        catalog.apply(&volume_record(7, &older)).unwrap();
        assert_eq!(catalog.volumes[&7].epoch, 12);
        let snap = catalog.volumes[&7].snapshots[&3].clone();
        let bookmark = BookmarkEntry {
            uuid: snap.uuid,
            ino: snap.ino,
            taken_ns: snap.taken_ns,
            mtime_ns: snap.mtime_ns,
            size: snap.size,
            name: snap.name.clone(),
            state: SnapshotState::Active,
        };
        catalog.apply(&bookmark_record(7, 3, &bookmark)).unwrap();
        let again = catalog.apply(&snap_record(7, 3, &snap));
        assert_eq!(again.unwrap_err().kind(), Kind::Damaged);
    }

    #[test]
    fn a_catalogue_survives_its_encoding() {
        let catalog = sample();
        assert_eq!(Catalog::decode(&catalog.encode()).unwrap(), catalog);
    }

    /// Bodies of the records of resize and revert, byte by byte.
    #[test]
    fn golden_bytes_of_resize_and_revert() {
        let hex = |r: Record| -> String { r.body.iter().map(|b| format!("{b:02x}")).collect() };
        assert_eq!(
            hex(resize_record(7, 0x1000, 0x2001)),
            "00100000000000000120000000000000\
             00000000000000000000000000000000"
        );
        assert_eq!(
            hex(resized_record(7, 0x1000, 0x2001, 0x3000)),
            "00100000000000000120000000000000\
             00300000000000000100000000000000"
        );
        let begin = revert_begin_record(7, Reverting { target: 3, undo: 9 });
        assert_eq!((begin.volume, begin.epoch), (7, 9));
        assert_eq!(hex(begin), "0300000000000000");
        let end = revert_end_record(7, 9, 0x1000, 0x2000);
        assert_eq!((end.volume, end.epoch), (7, 9));
        assert_eq!(hex(end), "00100000000000000020000000000000");
    }

    #[test]
    fn what_was_begun_stays_begun_until_it_ends() {
        let mut catalog = sample();
        let size = catalog.volumes[&7].size;
        let begun = Reverting { target: 3, undo: 9 };
        for record in [
            resize_record(7, size, 5000),
            revert_begin_record(7, begun),
            // Other attributes change meanwhile.
            volume_record(7, &catalog.volumes[&7].clone()),
        ] {
            catalog.apply(&record).unwrap();
        }
        let catalog = Catalog::decode(&catalog.encode()).unwrap();
        assert_eq!(catalog.volumes[&7].resizing, Some(5000));
        assert_eq!(catalog.volumes[&7].reverting, Some(begun));
        assert_eq!(catalog.volumes[&7].size, size);
        let mut catalog = catalog;
        catalog.apply(&resized_record(7, size, 5000, 6000)).unwrap();
        let volume = &catalog.volumes[&7];
        assert_eq!((volume.size, volume.identity.size), (5000, 6000));
        assert_eq!((volume.resizing, volume.reverting), (None, Some(begun)));
        catalog.apply(&revert_end_record(7, 9, 70, 80)).unwrap();
        let volume = &catalog.volumes[&7];
        assert_eq!((volume.size, volume.identity.size), (70, 80));
        assert_eq!(volume.reverting, None);
    }

    #[test]
    fn a_source_has_the_size_of_its_volume_or_one_on_the_way() {
        let mut volume = sample().volumes.remove(&7).unwrap();
        volume.size = 9000;
        let found = |ino, size| Identity {
            ino,
            size,
            ..Identity::default()
        };
        let allowed = |v: &VolumeEntry, ino| {
            [4096, 4097, 8999, 9000, 9001, 12_000].map(|size| u8::from(v.allows(&found(ino, size))))
        };
        assert_eq!(allowed(&volume, 2), [0, 0, 0, 1, 0, 0]);
        assert_eq!(allowed(&volume, 0), [0, 0, 0, 1, 1, 1], "a device");
        volume.resizing = Some(12_000);
        assert_eq!(allowed(&volume, 2), [0, 0, 0, 1, 1, 1]);
        volume.resizing = None;
        // Its snapshots have 4097 bytes.
        volume.reverting = Some(Reverting { target: 3, undo: 9 });
        assert_eq!(allowed(&volume, 2), [0, 1, 1, 1, 0, 0]);
    }

    #[test]
    fn a_bookmark_takes_the_place_of_its_snapshot_and_survives_its_encoding() {
        let mut catalog = sample();
        let snap = catalog.volumes[&7].snapshots[&3].clone();
        let mark = |state| BookmarkEntry {
            name: snap.name.clone(),
            uuid: snap.uuid,
            ino: snap.ino,
            taken_ns: snap.taken_ns,
            mtime_ns: snap.mtime_ns,
            size: snap.size,
            state,
        };
        let good = mark(SnapshotState::Active);
        catalog.apply(&bookmark_record(7, 3, &good)).unwrap();
        let volume = &catalog.volumes[&7];
        assert_eq!(volume.snapshots.keys().collect::<Vec<_>>(), [&9]);
        assert_eq!(volume.bookmarks, BTreeMap::from([(3, good.clone())]));
        assert!(volume.has(&good.name) && volume.find(&good.name).is_none());
        assert_eq!(volume.find_bookmark(&good.name), Some(3));
        // A change of the volume's attributes leaves it.
        let same = volume_record(7, volume);
        catalog.apply(&same).unwrap();
        catalog.clean = true;
        assert_eq!(Catalog::decode(&catalog.encode()).unwrap(), catalog);

        catalog.apply(&invalidate_record(7, 2, 3, "lost")).unwrap();
        let failed = mark(SnapshotState::Failed("lost".into()));
        assert_eq!(catalog.volumes[&7].bookmarks[&3], failed);
        catalog.clean = true;
        assert_eq!(Catalog::decode(&catalog.encode()).unwrap(), catalog);
        catalog
            .apply(&Record::plain(RecordType::BookmarkDeleted, 7, 3, vec![]))
            .unwrap();
        assert!(catalog.volumes[&7].bookmarks.is_empty());
    }

    /// Golden bytes: a change of any of them is a new format version. The sample holds a STORE, a
    /// VOLUME and two SNAPs.
    #[test]
    fn golden_bytes() {
        let bytes = sample().encode();
        assert_eq!(bytes.len(), 752);
        assert_eq!(
            blake3::hash(&bytes).to_hex().as_str(),
            "91c57f346a973b26c11b70fccc26fcf167ca8e9b2c41714dfb76a2d2945c7642"
        );
        let hex: String = bytes[..96].iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            "0500000000000000300000001000000000000000000000000000000000000000000000000000000000000000\
             0000000001000000080000008813000000000000160000009300000007000000000000000000000000000000\
             0000000000000000"
        );
    }

    #[test]
    fn a_damaged_catalogue_is_refused_and_never_panics() {
        let bytes = sample().encode();
        for cut in 0..bytes.len() {
            assert!(Catalog::decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x55;
            let _ = Catalog::decode(&bad);
        }
    }

    #[test]
    fn any_record_after_a_clean_stop_makes_it_unclean() {
        let mut catalog = sample();
        catalog
            .apply(&Record::run(RecordType::Zero, 7, 13, 0, 1))
            .unwrap();
        assert!(!catalog.clean);
        assert_eq!(catalog.volumes[&7].epoch, 13);
    }
}
