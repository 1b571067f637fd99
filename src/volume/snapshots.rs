//! Taking, deleting, renaming and opening snapshots.
//!
//! Taking: writers of the volumes concerned are held for the instant only: no sync and no log write
//! falls into it. The epoch moves in memory; from then on writers preserve for the new point. Then
//! the sources are made durable (I6), then one batch with every SNAP of the group, then the answer. A
//! crash anywhere leaves the whole group or none of it.
//!
//! Deleting: one record. The point goes when the record is durable and no handle is left; the space
//! follows in `reclaim`.

use std::sync::{Arc, PoisonError};

use crate::error::{Error, IoContext, Kind, Result};
use crate::log::record::{Record, RecordType};
use crate::sys::planted::{Bug, planted, point};
use crate::units::{Epoch, Name, Uuid};
use crate::volume::bookmarks;
use crate::volume::catalog::{
    Catalog, SnapEntry, bookmark_record, hold_record, rename_record, snap_record,
};
use crate::volume::facts::{SnapshotInfo, VolumeState};
use crate::volume::live::flush;
use crate::volume::read::Snapshot;
use crate::volume::shared::{Point, Shared, Vol, lock};

/// Most volumes of one group: their SNAPs go into one commit block.
const GROUP_MAX: usize = 256;
/// Most snapshots and bookmarks of one store: the catalogue must fit a batch many times over.
const SNAPSHOTS_MAX: usize = 65_536;

struct Taking {
    vol: Arc<Vol>,
    name: Name,
    epoch: u64,
    entry: SnapEntry,
}

/// Takes snapshots of several volumes at one instant; durable when it returns.
///
/// # Errors
/// `NotFound`, `Exists`, `Invalid` (a volume named twice), `Failed` (a source cannot be trusted or
/// made durable), `Limit`, `NoSpace`, `Io`. After an error there is no snapshot.
pub fn take(shared: &Arc<Shared>, targets: &[(Name, Name)]) -> Result<Vec<SnapshotInfo>> {
    let _structure = lock(&shared.structure);
    shared.check_open()?;
    let mut vols = check_targets(shared, targets)?;
    // Gates are taken in the order of volume numbers, whatever order was asked for.
    vols.sort_by_key(|(vol, _)| vol.id);
    let group = match targets.len() {
        1 => None,
        _ => Some(random_uuid(shared)?),
    };
    let mut uuids = Vec::new();
    for _ in &vols {
        uuids.push(random_uuid(shared)?);
    }
    let mut next_ino = lock(&shared.catalog).next_ino;

    // The instant: from here to the end of the block no write is under way in any of them.
    let mut taking = Vec::new();
    {
        let gates: Vec<_> = vols
            .iter()
            .map(|(vol, _)| vol.gate.write().unwrap_or_else(PoisonError::into_inner))
            .collect();
        let taken_ns = shared.env.clock.now_ns();
        for ((vol, name), uuid) in vols.iter().zip(uuids) {
            let allocated = vol.source()?.allocated().unwrap_or_else(|_| vol.size());
            let entry = open_epoch(
                shared,
                vol,
                name,
                uuid,
                (taken_ns, next_ino),
                allocated,
                group,
            );
            next_ino += 1;
            taking.push(entry);
        }
        drop(gates);
    }
    match make_durable(shared, &taking) {
        Ok(()) => Ok(settle(shared, taking)),
        Err(e) => {
            abort(shared, &taking, is_doubtful(&e));
            Err(e)
        }
    }
}

/// Takes a snapshot of a volume that the caller has claimed; its gate is held exclusively, and
/// `structure` too. The name is free.
///
/// # Errors
/// As [`take`].
pub fn take_held(shared: &Arc<Shared>, vol: &Arc<Vol>, name: &Name) -> Result<SnapshotInfo> {
    check_count(&lock(&shared.catalog), 1)?;
    let uuid = random_uuid(shared)?;
    let now = shared.env.clock.now_ns();
    let ino = lock(&shared.catalog).next_ino;
    let allocated = vol.source()?.allocated().unwrap_or_else(|_| vol.size());
    let taking = [open_epoch(
        shared,
        vol,
        name,
        uuid,
        (now, ino),
        allocated,
        None,
    )];
    let done = make_durable(shared, &taking);
    done.inspect_err(|e| abort(shared, &taking, is_doubtful(e)))?;
    let [taken] = taking;
    let mut infos = settle(shared, vec![taken]);
    Ok(infos.remove(0))
}

/// Whether a SNAP that was refused might come back with a crash.
fn is_doubtful(e: &Error) -> bool {
    e.kind() != Kind::NoSpace && e.kind() != Kind::Failed
}

fn check_count(catalog: &Catalog, more: usize) -> Result<()> {
    let count: usize = catalog
        .volumes
        .values()
        .map(|v| v.snapshots.len() + v.bookmarks.len())
        .sum();
    if count + more > SNAPSHOTS_MAX {
        return Err(Error::new(
            Kind::Limit,
            format!("a store holds at most {SNAPSHOTS_MAX} snapshots and bookmarks; delete some"),
        ));
    }
    Ok(())
}

fn check_targets(shared: &Shared, targets: &[(Name, Name)]) -> Result<Vec<(Arc<Vol>, Name)>> {
    if targets.is_empty() {
        return Err(Error::new(Kind::Invalid, "no volume to take a snapshot of"));
    }
    if targets.len() > GROUP_MAX {
        let why = format!("a group holds at most {GROUP_MAX} volumes");
        return Err(Error::new(Kind::Limit, why));
    }
    let mut vols: Vec<(Arc<Vol>, Name)> = Vec::new();
    for (volume, name) in targets {
        let vol = shared.find(volume)?;
        if vols.iter().any(|(v, _)| v.id == vol.id) {
            return Err(Error::new(
                Kind::Invalid,
                format!("volume '{volume}' is named twice"),
            ));
        }
        let state = vol.state();
        state.idle(&vol.name)?;
        state.serving(&vol.name)?;
        if let VolumeState::Suspect(why) = &state.health {
            return Err(Error::new(
                Kind::Failed,
                format!("volume '{volume}' cannot be made durable ({why}); accept it first"),
            ));
        }
        drop(state);
        vols.push((vol, name.clone()));
    }
    let catalog = lock(&shared.catalog);
    check_count(&catalog, targets.len())?;
    for (vol, name) in &vols {
        if catalog.volumes.get(&vol.id).is_some_and(|v| v.has(name)) {
            let why = format!("there is a snapshot or bookmark '{name}' of this volume already");
            return Err(Error::new(Kind::Exists, why));
        }
    }
    Ok(vols)
}

/// Opens a new epoch; the caller holds the volume's gate exclusively.
fn open_epoch(
    shared: &Shared,
    vol: &Arc<Vol>,
    name: &Name,
    uuid: Uuid,
    (taken_ns, ino): (i64, u64),
    allocated: u64,
    group: Option<Uuid>,
) -> Taking {
    let parent = lock(&shared.catalog)
        .volumes
        .get(&vol.id)
        .and_then(|v| v.snapshots.values().next_back().map(|s| s.uuid));
    let mut state = vol.state();
    // Nothing written since the last snapshot: it has that one's time, so that rsync skips it.
    let mtime_ns = match state.changed || state.snap_mtime_ns == 0 {
        true => state.mtime_ns,
        false => state.snap_mtime_ns,
    };
    state.epoch += 1;
    let epoch = state.epoch;
    state.points.insert(epoch, Point::Pending);
    state.newest = Some(epoch);
    state.preserved = Default::default();
    state.changed = false;
    state.tracking.epoch_opened();
    // Every later write finds this point.
    state.tracking.follow(None, |_| Default::default());
    state.snap_mtime_ns = state.snap_mtime_ns.max(mtime_ns);
    drop(state);
    let entry = SnapEntry {
        name: name.clone(),
        uuid,
        ino,
        taken_ns,
        mtime_ns,
        size: vol.size(),
        allocated,
        parent,
        group,
        held: false,
        state: crate::volume::facts::SnapshotState::Active,
    };
    Taking {
        vol: Arc::clone(vol),
        name: name.clone(),
        epoch,
        entry,
    }
}

fn make_durable(shared: &Shared, taking: &[Taking]) -> Result<()> {
    for t in taking {
        if !planted(Bug::SnapUnflushed) {
            flush(&t.vol)?;
        }
    }
    point("snapshot flushed");
    let records: Vec<Record> = taking
        .iter()
        .map(|t| snap_record(t.vol.id, t.epoch, &t.entry))
        .collect();
    shared.append_records(records)?;
    point("snapshot durable");
    Ok(())
}

/// The SNAPs are durable: the points are snapshots.
fn settle(shared: &Shared, taking: Vec<Taking>) -> Vec<SnapshotInfo> {
    let mut infos = Vec::new();
    for t in taking {
        t.vol.state().points.insert(t.epoch, Point::Listed);
        infos.push(info_of(shared, &t.vol, t.epoch, &t.entry));
    }
    infos
}

/// No snapshot came about. After a failed log write its SNAP might still come back with a crash, so
/// the point stays until the log has durably gone on without it.
fn abort(shared: &Shared, taking: &[Taking], doubtful: bool) {
    for t in taking {
        let mut state = t.vol.state();
        match doubtful {
            true => drop(state.points.insert(t.epoch, Point::Doubtful)),
            false => drop(state.points.remove(&t.epoch)),
        }
        state.changed = true;
        t.vol.refresh(&shared.map, &mut state);
        tracing::warn!(snapshot = t.name.as_str(), "a snapshot could not be taken");
    }
}

fn random_uuid(shared: &Shared) -> Result<Uuid> {
    let bytes = shared
        .env
        .clock
        .random()
        .context(|| "no random bytes for a uuid")?;
    Ok(Uuid::from_random(bytes))
}

/// Facts about a snapshot.
pub fn info_of(shared: &Shared, vol: &Vol, epoch: u64, snap: &SnapEntry) -> SnapshotInfo {
    let volume = lock(&shared.catalog)
        .volumes
        .get(&vol.id)
        .map(|v| v.name.clone());
    SnapshotInfo {
        volume: volume.unwrap_or_else(|| snap.name.clone()),
        name: snap.name.clone(),
        uuid: snap.uuid,
        epoch: Epoch(epoch),
        ino: snap.ino,
        taken_ns: snap.taken_ns,
        mtime_ns: snap.mtime_ns,
        size: snap.size,
        allocated: snap.allocated,
        unique: shared.unique_bytes(vol, epoch),
        state: snap.state.clone(),
        parent: snap.parent,
        group: snap.group,
        held: snap.held,
    }
}

/// Finds a snapshot by name.
///
/// # Errors
/// `NotFound`.
pub fn find(shared: &Shared, volume: &Name, name: &Name) -> Result<(Arc<Vol>, u64, SnapEntry)> {
    let vol = shared.find(volume)?;
    let catalog = lock(&shared.catalog);
    let found = catalog.volumes.get(&vol.id).and_then(|entry| {
        let epoch = entry.find(name)?;
        Some((epoch, entry.snapshots.get(&epoch)?.clone()))
    });
    drop(catalog);
    match found {
        Some((epoch, snap)) => Ok((vol, epoch, snap)),
        None => Err(Error::new(
            Kind::NotFound,
            format!("there is no snapshot '{volume}@{name}'"),
        )),
    }
}

/// The snapshots of a volume, oldest first.
///
/// # Errors
/// `NotFound`.
pub fn list(shared: &Shared, volume: &Name) -> Result<Vec<SnapshotInfo>> {
    let vol = shared.find(volume)?;
    let snapshots = lock(&shared.catalog)
        .volumes
        .get(&vol.id)
        .map(|v| v.snapshots.clone());
    let snapshots = snapshots.unwrap_or_default();
    Ok(snapshots
        .iter()
        .map(|(&epoch, snap)| info_of(shared, &vol, epoch, snap))
        .collect())
}

/// The latest instant of a volume's snapshots.
///
/// # Errors
/// `NotFound`.
pub fn newest_ns(shared: &Shared, volume: &Name) -> Result<Option<i64>> {
    let vol = shared.find(volume)?;
    let catalog = lock(&shared.catalog);
    let entry = catalog.volumes.get(&vol.id);
    Ok(entry.and_then(|e| e.snapshots.values().map(|s| s.taken_ns).max()))
}

/// Deletes a snapshot, and may keep a bookmark in its place; durable when it returns.
///
/// # Errors
/// `NotFound`, `Busy` while it is on hold, `Failed` if it has failed and is to be kept as a bookmark,
/// `NoSpace`, `Io`: the snapshot stays.
pub fn delete(shared: &Arc<Shared>, volume: &Name, name: &Name, keep: bool) -> Result<()> {
    let _structure = lock(&shared.structure);
    shared.check_open()?;
    let (vol, epoch, snap) = find(shared, volume, name)?;
    if snap.held {
        let why = format!("snapshot '{volume}@{name}' is on hold; release it first");
        return Err(Error::new(Kind::Busy, why));
    }
    not_reverting(shared, &vol, epoch)?;
    let unique = shared.unique_bytes(&vol, epoch);
    let record = match keep {
        true => bookmark_record(vol.id, epoch, &bookmarks::kept(volume, &snap)?),
        false => Record::plain(RecordType::Delete, vol.id, epoch, Vec::new()),
    };
    if planted(Bug::CatalogEarly) && !keep {
        lock(&shared.catalog).apply(&record)?;
        release_point(shared, &vol, epoch, unique);
        shared.append_records(vec![record])?;
        return Ok(());
    }
    if planted(Bug::FreedBeforeDelete) && !keep {
        release_point(shared, &vol, epoch, unique);
        crate::volume::reclaim::reclaim(shared, &vol)?;
        shared.append_records(vec![record])?;
        return Ok(());
    }
    shared.append_records(vec![record])?;
    point("deletion durable");
    if keep {
        // Before the point goes: whoever gathers what is needed sees one, the other, or both.
        vol.state().bookmarks.insert(epoch);
    }
    release_point(shared, &vol, epoch, unique);
    Ok(())
}

/// A snapshot has left the listing: what nothing else keeps is let go. `unique` is what only it needed.
pub fn release_point(shared: &Shared, vol: &Vol, epoch: u64, unique: u64) {
    let kept = lock(&shared.catalog)
        .volumes
        .get(&vol.id)
        .is_some_and(|v| v.kept.contains_key(&epoch));
    let mut state = vol.state();
    if kept {
        state.points.entry(epoch).and_modify(|p| *p = Point::Kept);
        return;
    }
    if state.pins.contains_key(&epoch) {
        state
            .points
            .entry(epoch)
            .and_modify(|p| *p = Point::Deleted);
    } else {
        state.points.remove(&epoch);
        state.failed.remove(&epoch);
    }
    vol.refresh(&shared.map, &mut state);
    state.reclaimable += unique;
    drop(state);
    shared.mark_reclaim(vol.id);
}

/// Whether no revert that is under way or unfinished needs a snapshot. The caller holds `structure`.
///
/// # Errors
/// `Busy`.
pub fn not_reverting(shared: &Shared, vol: &Vol, epoch: u64) -> Result<()> {
    let catalog = lock(&shared.catalog);
    let begun = catalog.volumes.get(&vol.id).and_then(|v| v.reverting);
    match begun {
        Some(begun) if begun.target == epoch || begun.undo == epoch => Err(Error::new(
            Kind::Busy,
            format!("a revert of volume '{}' needs the snapshot", vol.name),
        )),
        _ => Ok(()),
    }
}

/// Opens a snapshot that is known to be listed, by its epoch.
///
/// # Errors
/// `NotFound`.
pub fn open_at(shared: &Arc<Shared>, vol: &Arc<Vol>, epoch: u64) -> Result<Snapshot> {
    let snap = {
        let catalog = lock(&shared.catalog);
        let entry = catalog.volumes.get(&vol.id);
        let snap = entry.and_then(|v| v.snapshots.get(&epoch).cloned());
        let snap = snap
            .ok_or_else(|| Error::new(Kind::NotFound, format!("no snapshot of epoch {epoch}")))?;
        vol.pin(epoch, &snap.state);
        snap
    };
    let info = info_of(shared, vol, epoch, &snap);
    Ok(Snapshot::pinned(Arc::clone(shared), Arc::clone(vol), info))
}

/// Puts a snapshot on hold or releases it; durable when it returns.
///
/// # Errors
/// `NotFound`, `NoSpace`, `Io`.
pub fn hold(shared: &Arc<Shared>, volume: &Name, name: &Name, held: bool) -> Result<()> {
    let _structure = lock(&shared.structure);
    shared.check_open()?;
    let (vol, epoch, snap) = find(shared, volume, name)?;
    if snap.held == held {
        return Ok(());
    }
    shared
        .append_records(vec![hold_record(vol.id, epoch, held)])
        .map(drop)
}

/// Renames a snapshot; durable when it returns.
///
/// # Errors
/// `NotFound`, `Exists`, `NoSpace`, `Io`.
pub fn rename(shared: &Arc<Shared>, volume: &Name, name: &Name, new: &Name) -> Result<()> {
    let _structure = lock(&shared.structure);
    shared.check_open()?;
    let (vol, epoch, _) = find(shared, volume, name)?;
    if name == new {
        return Ok(());
    }
    let taken = lock(&shared.catalog)
        .volumes
        .get(&vol.id)
        .is_some_and(|entry| entry.has(new));
    if taken {
        let why = format!("there is a snapshot or bookmark '{volume}@{new}' already");
        return Err(Error::new(Kind::Exists, why));
    }
    shared
        .append_records(vec![rename_record(vol.id, epoch, new)])
        .map(drop)
}

/// Opens a snapshot for reading. Takes no lock that is held over I/O, so it never waits for a
/// snapshot being taken.
///
/// # Errors
/// `NotFound`.
pub fn open(shared: &Arc<Shared>, volume: &Name, name: &Name) -> Result<Arc<Snapshot>> {
    shared.check_open()?;
    let vol = shared.find(volume)?;
    let (epoch, snap) = {
        let catalog = lock(&shared.catalog);
        let found = catalog.volumes.get(&vol.id).and_then(|entry| {
            let epoch = entry.find(name)?;
            Some((epoch, entry.snapshots.get(&epoch)?.clone()))
        });
        let (epoch, snap) = found.ok_or_else(|| {
            Error::new(
                Kind::NotFound,
                format!("there is no snapshot '{volume}@{name}'"),
            )
        })?;
        // Pinned while it is still in the catalogue: a deletion looks for pins after it has left.
        vol.pin(epoch, &snap.state);
        (epoch, snap)
    };
    let info = info_of(shared, &vol, epoch, &snap);
    Ok(Arc::new(Snapshot::pinned(Arc::clone(shared), vol, info)))
}
