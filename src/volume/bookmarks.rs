//! Bookmarks: instants whose preserved data is gone but from which changes are still known.
//!
//! A bookmark takes the place of its snapshot in one record, so no crash leaves both or neither. It
//! keeps the snapshot's name, uuid, epoch and number, and nothing of its content. What makes a diff
//! from it right is in `tracking`. Where changes since a bookmark cannot be known any more (the
//! source was changed behind our back and accepted so, a batch of the log is lost, a full disk under
//! `fail-snapshot`) it fails: a diff from it is refused, for ever.
//!
//! Names are shared by the snapshots and bookmarks of a volume. Bookmarks go with their volume.

use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::log::record::{Record, RecordType};
use crate::units::{Epoch, Name};
use crate::volume::catalog::{BookmarkEntry, SnapEntry, bookmark_record};
use crate::volume::engine::Engine;
use crate::volume::facts::{BookmarkInfo, SnapshotState};
use crate::volume::shared::{Shared, Vol, lock};
use crate::volume::snapshots;

impl Engine {
    /// Deletes a snapshot and keeps a bookmark of its name in its place; durable when it returns.
    ///
    /// # Errors
    /// As [`Engine::delete_snapshot`]; `Failed` for a snapshot that failed.
    pub fn delete_snapshot_keep_bookmark(&self, volume: &Name, name: &Name) -> Result<()> {
        snapshots::delete(&self.shared, volume, name, true)
    }

    /// The bookmarks of a volume, oldest first.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn bookmarks(&self, volume: &Name) -> Result<Vec<BookmarkInfo>> {
        let vol = self.shared.find(volume)?;
        let catalog = lock(&self.shared.catalog);
        let Some(entry) = catalog.volumes.get(&vol.id) else {
            return Ok(Vec::new());
        };
        let info = |(&epoch, bookmark): (&u64, &BookmarkEntry)| {
            info_of(entry.name.clone(), epoch, bookmark)
        };
        Ok(entry.bookmarks.iter().map(info).collect())
    }

    /// One bookmark.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn bookmark(&self, volume: &Name, name: &Name) -> Result<BookmarkInfo> {
        find(&self.shared, volume, name).map(|(_, info)| info)
    }

    /// Deletes a bookmark; durable when it returns.
    ///
    /// # Errors
    /// `NotFound`, `NoSpace`, `Io`.
    pub fn delete_bookmark(&self, volume: &Name, name: &Name) -> Result<()> {
        let shared = &self.shared;
        let _structure = lock(&shared.structure);
        shared.check_open()?;
        let (vol, info) = find(shared, volume, name)?;
        let epoch = info.epoch.0;
        let deleted = Record::plain(RecordType::BookmarkDeleted, vol.id, epoch, Vec::new());
        shared.append_records(vec![deleted])?;
        let mut state = vol.state();
        state.bookmarks.remove(&epoch);
        vol.refresh(&shared.map, &mut state);
        drop(state);
        shared.mark_reclaim(vol.id);
        Ok(())
    }
}

fn info_of(volume: Name, epoch: u64, bookmark: &BookmarkEntry) -> BookmarkInfo {
    BookmarkInfo {
        volume,
        name: bookmark.name.clone(),
        uuid: bookmark.uuid,
        epoch: Epoch(epoch),
        ino: bookmark.ino,
        taken_ns: bookmark.taken_ns,
        mtime_ns: bookmark.mtime_ns,
        size: bookmark.size,
        state: bookmark.state.clone(),
    }
}

fn find(shared: &Shared, volume: &Name, name: &Name) -> Result<(Arc<Vol>, BookmarkInfo)> {
    let vol = shared.find(volume)?;
    let catalog = lock(&shared.catalog);
    let found = catalog.volumes.get(&vol.id).and_then(|entry| {
        let epoch = entry.find_bookmark(name)?;
        let bookmark = entry.bookmarks.get(&epoch)?;
        Some(info_of(entry.name.clone(), epoch, bookmark))
    });
    drop(catalog);
    match found {
        Some(info) => Ok((vol, info)),
        None => Err(Error::new(
            Kind::NotFound,
            format!("there is no bookmark '{volume}@{name}'"),
        )),
    }
}

/// Fails every good bookmark of a volume: changes were made that nobody saw. Durable when it returns;
/// the caller holds `structure`.
///
/// # Errors
/// `NoSpace`, `Io`: some may have failed.
pub fn fail_all(shared: &Shared, vol: &Vol, why: &str) -> Result<()> {
    // A few hundred bytes each: far below what a batch takes.
    const AT_ONCE: usize = 256;
    let failed = |(&epoch, bookmark): (&u64, &BookmarkEntry)| {
        let state = SnapshotState::Failed(why.to_owned());
        let good = bookmark.state == SnapshotState::Active;
        let bookmark = bookmark.clone();
        good.then(|| bookmark_record(vol.id, epoch, &BookmarkEntry { state, ..bookmark }))
    };
    let records: Vec<Record> = match lock(&shared.catalog).volumes.get(&vol.id) {
        Some(entry) => entry.bookmarks.iter().filter_map(failed).collect(),
        None => Vec::new(),
    };
    for some in records.chunks(AT_ONCE) {
        shared.append_records(some.to_vec())?;
        let mut state = vol.state();
        for record in some {
            state.bookmarks.remove(&record.epoch);
        }
        vol.refresh(&shared.map, &mut state);
    }
    if !records.is_empty() {
        tracing::warn!(
            volume = vol.id,
            "{} bookmarks have failed: {why}",
            records.len()
        );
        shared.mark_reclaim(vol.id);
    }
    Ok(())
}

/// What stays of a snapshot.
///
/// # Errors
/// `Failed` if it has failed.
pub fn kept(volume: &Name, snap: &SnapEntry) -> Result<BookmarkEntry> {
    if let SnapshotState::Failed(why) = &snap.state {
        return Err(Error::new(
            Kind::Failed,
            format!(
                "snapshot '{volume}@{}' has failed ({why}): it leaves no bookmark",
                snap.name
            ),
        ));
    }
    Ok(BookmarkEntry {
        name: snap.name.clone(),
        uuid: snap.uuid,
        ino: snap.ino,
        taken_ns: snap.taken_ns,
        mtime_ns: snap.mtime_ns,
        size: snap.size,
        state: SnapshotState::Active,
    })
}
