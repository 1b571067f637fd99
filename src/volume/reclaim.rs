//! Background work: checkpoints of the map, reclaim of preserved content nobody needs.
//!
//! A preserved grain (g, e) whose next older preservation is e' serves the points in (e', e]. When none
//! of them is left the record is dead for ever, because new epochs only grow. Order: the DELETE is
//! durable, the map has forgotten the dead record, every record whose payload goes is known durable
//! on the medium (a seal stands behind it, so a scan never mistakes freed payload for a torn batch),
//! then the payload is punched. A segment that no surviving record came from is removed as a whole.
//!
//! A thread of the daemon calls [`maintain`], and so does a writer that waits for space; one at a time
//! works (`maintaining`). Writers and readers go on meanwhile.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use crate::error::{Kind, Result};
use crate::map::Applied;
use crate::sys::planted::point;
use crate::units::{Epoch, Place};
use crate::volume::shared::{Shared, Vol, lock};

/// Pieces of payload that are punched together: bounds the memory of a reclaim.
const PUNCH_AT_ONCE: usize = 16 << 10;

/// Bytes of overlays that one round reads to make checksums.
const SEALED_AT_ONCE: u64 = 32 << 20;

/// Does what is due; returns whether there was anything.
///
/// # Errors
/// `NoSpace`, `Damaged`, `Io`: nothing is lost, it is tried again at the next call.
pub fn maintain(shared: &Shared) -> Result<bool> {
    match work(shared) {
        // Of its map only: nothing else that it reads says so.
        Err(e) if e.kind() == Kind::Damaged => shared.heal_map(&e).map(|()| true),
        done => done,
    }
}

fn work(shared: &Shared) -> Result<bool> {
    let _maintaining = lock(&shared.maintaining);
    shared.check_open()?;
    // First: it needs no space, and on a full disk a checkpoint may find none without it.
    let doomed = shared.remove_doomed_layers();
    let mut worked = matches!(doomed, Ok(true));
    if worked {
        shared.space_freed();
    }
    let due = std::mem::take(&mut *lock(&shared.reclaim_due));
    if !due.is_empty() || checkpoint_due(shared) {
        if let Err(e) = checkpoint(shared) {
            lock(&shared.reclaim_due).extend(due);
            return Err(e);
        }
        worked = true;
    }
    for id in due {
        let Some(vol) = shared.vol(id) else { continue };
        if let Err(e) = reclaim(shared, &vol) {
            shared.mark_reclaim(id);
            return Err(e);
        }
        shared.segments_due.store(true, Ordering::Release);
        worked = true;
    }
    if shared.segments_due.swap(false, Ordering::AcqRel) {
        remove_dead_segments(shared)
            .inspect_err(|_| shared.segments_due.store(true, Ordering::Release))?;
        worked = true;
    }
    shared.seal_layers(shared.settings.settle_rounds, SEALED_AT_ONCE);
    shared.refine()?;
    if worked {
        shared.space_freed();
    }
    shared.map_to_disk(false);
    shared.restore_ballast();
    shared.sample_growth();
    // Idle since the last call: the last real table gets its second copy.
    let lsn = shared.log.durable_lsn().0;
    if shared.idle_lsn.swap(lsn, Ordering::AcqRel) == lsn {
        shared.log.seal(shared)?;
        shared
            .idle_lsn
            .store(shared.log.durable_lsn().0, Ordering::Release);
    }
    doomed.map(|_| worked)
}

fn checkpoint_due(shared: &Shared) -> bool {
    let (_, segment, end) = shared.log.end();
    let (last_segment, last_end) = *lock(&shared.checkpointed);
    let written = match segment == last_segment {
        true => end.saturating_sub(last_end),
        false => {
            u64::from(segment - last_segment).saturating_mul(shared.settings.segment_bytes / 2)
                + end
        }
    };
    written >= shared.settings.checkpoint_bytes
        || shared.map.pending() >= shared.settings.map_cache_bytes
}

/// Writes what was published into the index and makes it durable, so that recovery starts here.
///
/// # Errors
/// As [`maintain`].
pub fn checkpoint(shared: &Shared) -> Result<()> {
    shared.room_for_checkpoint()?;
    let (lsn, segment, offset) = shared.log.end_said();
    // After the end was taken: an intent before it is not replayed and must not be relied on.
    shared.complete_epochs();
    shared.map.checkpoint(Applied {
        store: shared.store,
        lsn,
        segment,
        offset,
    })?;
    *lock(&shared.checkpointed) = (segment, offset);
    Ok(())
}

pub(in crate::volume) fn reclaim(shared: &Shared, vol: &Vol) -> Result<()> {
    // Of one moment: a snapshot that becomes a bookmark must be seen as one of them.
    let (live, bookmark, before) = {
        let state = vol.state();
        let live: Vec<Epoch> = state.points.keys().map(|&e| Epoch(e)).collect();
        let bookmark = state.bookmarks.first().map(|&e| Epoch(e));
        (live, bookmark, state.reclaimable)
    };
    let mut freed: Vec<(Place, u64)> = Vec::new();
    let mut punched = Ok(());
    shared
        .map
        .sweep(vol.id(), &live, bookmark, &mut |place, blocks| {
            freed.push((place, blocks));
            if freed.len() >= PUNCH_AT_ONCE && punched.is_ok() {
                punched = punch(shared, &mut freed);
            }
        })?;
    punched.and_then(|()| punch(shared, &mut freed))?;
    let mut state = vol.state();
    state.reclaimable = state.reclaimable.saturating_sub(before);
    Ok(())
}

/// Punches payload whose records are gone.
fn punch(shared: &Shared, freed: &mut Vec<(Place, u64)>) -> Result<()> {
    if freed.is_empty() {
        return Ok(());
    }
    shared.log.seal(shared)?;
    for (place, blocks) in freed.drain(..) {
        // A punch that fails costs space, not content; the segment still goes as a whole later.
        if let Err(e) = shared.log.punch(place, blocks) {
            tracing::warn!("{}", e.chain());
        }
    }
    point("space freed");
    Ok(())
}

/// Removes segments that nothing needs: no surviving record of the map came from them, a newer
/// CATALOG is durable, and the map's checkpoint lies behind them.
fn remove_dead_segments(shared: &Shared) -> Result<()> {
    let (checkpointed, _) = *lock(&shared.checkpointed);
    let (_, current, _) = shared.log.end();
    let limit = checkpointed.min(current);
    let live = shared.map.live_segments()?;
    let dead: Vec<u32> = shared
        .log
        .segments()?
        .into_iter()
        .filter(|number| *number < limit && !live.contains_key(number))
        .collect();
    if dead.is_empty() {
        return Ok(());
    }
    match shared.keep_bitmaps(&dead) {
        Err(e) if e.kind() == Kind::NoSpace => {
            tracing::debug!("dead segments stay until bitmaps have room: {}", e.chain());
            return Ok(());
        }
        done => done?,
    }
    tracing::debug!(?dead, "removing dead segments");
    // The durable map no longer names them before they go.
    checkpoint(shared)?;
    shared.log.remove_segments(&dead)
}

/// Waits until no writer is under way and lets none in: for `close`.
pub fn drain(shared: &Shared) {
    shared.closed.store(true, Ordering::Release);
    let volumes = shared
        .volumes
        .read()
        .unwrap_or_else(PoisonError::into_inner);
    for vol in volumes.values() {
        drop(vol.gate.write().unwrap_or_else(PoisonError::into_inner));
    }
    drop(volumes);
    let clones: Vec<_> = lock(&shared.clones).by_id.values().cloned().collect();
    for clone in clones {
        drop(clone.gate.write().unwrap_or_else(PoisonError::into_inner));
    }
}
