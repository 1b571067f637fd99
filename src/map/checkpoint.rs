//! The checkpoint: carries what was published from memory into the index.
//!
//! Order, and why: pages and sets in small batches; then the index is made durable; then `Applied`
//! alone; then durable again. A cut may keep any subset of the batches of one checkpoint, so
//! `Applied` must not share one with what it vouches for (M3). Every batch may be applied twice.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::map::bitmaps::{ChunkKey, EpochSets, encode_chunk};
use crate::map::extents::{Applied, ExtentMap, encode_applied};
use crate::map::index::{Change, Index};
use crate::map::page::Page;
use crate::map::state::Pages;
use crate::sys::planted::{Bug, planted, point};

/// Bytes of a batch: a batch of sled stops its readers, so it stays small.
const BATCH_BYTES: usize = 512 << 10;

/// Collects changes and applies them in small batches.
pub(super) struct Batches<'a> {
    index: &'a dyn Index,
    changes: Vec<Change>,
    bytes: usize,
}

impl Batches<'_> {
    pub fn new(index: &dyn Index) -> Batches<'_> {
        Batches {
            index,
            changes: Vec::new(),
            bytes: 0,
        }
    }

    pub fn push(&mut self, key: Vec<u8>, value: Option<Vec<u8>>) -> Result<()> {
        self.bytes += key.len() + value.as_ref().map_or(0, Vec::len);
        self.changes.push((key, value));
        if self.bytes >= BATCH_BYTES {
            self.flush()
        } else {
            Ok(())
        }
    }

    pub fn flush(&mut self) -> Result<()> {
        self.bytes = 0;
        let changes = std::mem::take(&mut self.changes);
        if changes.is_empty() {
            Ok(())
        } else {
            self.index.apply(changes)
        }
    }
}

impl ExtentMap {
    /// Carries everything published so far into the index and makes it durable, together with the
    /// position in the log up to which the caller has published everything.
    ///
    /// # Errors
    /// What the index says. Nothing is lost: it is answered from memory and merged again next time.
    pub fn checkpoint(&self, applied: Applied) -> Result<()> {
        let _writer = self.lock_writer();
        let (frozen, chunks, parts) = self.freeze();
        let merged = self.merge(&frozen, &parts, &applied);
        drop(frozen);
        match merged {
            Ok(()) => {
                point("checkpoint durable");
                let mut state = self.lock();
                let done = state.thaw(applied);
                drop(state);
                // Thousands of pages: not worth doing under the lock.
                drop(done);
                Ok(())
            }
            Err(e) => {
                self.lock().refreeze(chunks);
                Err(e)
            }
        }
    }

    /// Takes the delta and what the sets of changed chunks hold, all of one instant.
    fn freeze(&self) -> (Arc<Pages>, BTreeSet<ChunkKey>, Vec<(ChunkKey, EpochSets)>) {
        let mut state = self.lock();
        state.delta_bytes = 0;
        state.frozen = Arc::new(std::mem::take(&mut state.delta));
        let chunks = std::mem::take(&mut state.dirty);
        let part = |key: &ChunkKey| {
            let sets = state.sets.get(&(key.volume, key.epoch));
            (
                *key,
                sets.map_or_else(EpochSets::default, |sets| sets.part(key.chunk)),
            )
        };
        let parts = chunks.iter().map(part).collect();
        state.covered = state.sets.keys().copied().collect();
        (Arc::clone(&state.frozen), chunks, parts)
    }

    fn merge(
        &self,
        frozen: &Pages,
        parts: &[(ChunkKey, EpochSets)],
        applied: &Applied,
    ) -> Result<()> {
        let index = self.index();
        let mut batches = Batches::new(&*index);
        if planted(Bug::AppliedFirst) {
            let (key, value) = encode_applied(applied);
            self.index().apply(vec![(key, Some(value))])?;
            self.index().checkpoint()?;
        }
        for (key, later) in frozen {
            let name = key.encode();
            let mut page = match self.index().get(&name)? {
                Some(value) => Page::decode(*key, &value)?,
                None => Page::new(later.grain_blocks()),
            };
            if page.grain_blocks() != later.grain_blocks() {
                return Err(Error::new(
                    Kind::Damaged,
                    "extent map: a page of another grain size",
                ));
            }
            page.merge(later);
            page.lsn = page.lsn.max(applied.lsn);
            batches.push(name, page.encode(*key))?;
        }
        for (key, sets) in parts {
            batches.push(key.encode(), encode_chunk(*key, sets))?;
        }
        batches.flush()?;
        if !planted(Bug::IndexUnsynced) {
            self.index().checkpoint()?;
        }
        point("checkpoint half done");
        let (key, value) = encode_applied(applied);
        self.index().apply(vec![(key, Some(value))])?;
        if planted(Bug::IndexUnsynced) {
            return Ok(());
        }
        self.index().checkpoint()
    }
}
