//! Checksums of overlays: what lies in a layer of a clone is verified when it is read.
//!
//! The table of a layer is the file `clones/<layer>.sums`. A block of 4096 bytes, a *leaf*, holds the
//! checksums of 504 grains; 0 stands for none. A leaf is written (*sealed*) when its grains have not been
//! written for a while, after their content was made durable, and it is erased (*opened*), durably,
//! before a grain that it has a checksum of is written again. So a checksum on the medium is always that
//! of content that is durable and final: whatever a kill or a power cut leaves, a checksum that does not
//! match is rot, and grains that were being written have none.
//!
//! Opening a leaf takes the checksums of its other grains from the medium, not from memory: reads go on
//! verifying them, and sealing writes the same ones again, so rot is not taken for content. Only a crash,
//! or more than [`KEPT_MAX`] open leaves of a layer, loses them. Of a grain that is written in part the
//! rest is verified first.
//!
//! A writer pays one sync for the first overwrite in each leaf after it was sealed, and none for grains
//! that are new to the layer. A leaf that cannot be read or does not match its own checksum has none, and
//! is erased before its grains are written, too: nothing becomes unreadable by rot in the table alone.
//! It is not verified that a leaf which should be there is; the leaf behind 8 TiB of the table (petabytes
//! of clone) is never made.
//!
//! Locks: `gate` (writers share it from opening to the end of the write; sealing excludes them for a
//! moment), then `opening` (held over the erasing), `syncs` (from a leaf's erasing to its sync, and over other
//! syncs), then `state` (memory, and reads of single leaves).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::error::{Error, IoContext, Kind, Result};
use crate::log::keys::Keys;
use crate::map::GrainSet;
use crate::sys::disk::{Disk, Open};
use crate::units::BLOCK;
use crate::volume::overlay::{Home, PIECE_BYTES};
use crate::volume::shared::lock;

/// Grains of a leaf.
pub const LEAF_GRAINS: u64 = 504;
const HEADER: usize = 64;
const SUM_AT: usize = 48;
const MAGIC: [u8; 8] = *b"SFsums_1";
const SUFFIX: &str = ".sums";
/// Leaves that are kept in memory once they were read.
const CACHED_MAX: usize = 64;
/// Open leaves whose checksums of grains that were not written are kept in memory.
pub const KEPT_MAX: usize = 256;
/// A leaf that cannot be sealed is tried again after 2, 4, ... up to 2 to this power times the usual wait.
const PUT_OFF_MAX: u32 = 10;
/// Leaves looked at in one round for some that a predecessor left open.
const LOOK_AT_ONCE: u64 = 256;
/// Leaves taken to be sealed in one round, whatever waits: each takes a block of memory.
const DUE_MAX: usize = 256;
/// While so many leaves wait to be sealed, no more are looked for.
const BACKLOG_MAX: usize = 4096;

const _: () = assert!(HEADER + LEAF_GRAINS as usize * 8 == BLOCK as usize);

type Leaf = Arc<[u64]>;

/// See the head of the file.
pub struct Sums {
    home: Arc<Home>,
    layer: u32,
    grain: u64,
    keys: Keys,
    gate: RwLock<()>,
    opening: Mutex<()>,
    syncs: Mutex<()>,
    state: Mutex<State>,
    /// Called before what was sealed is made durable.
    #[cfg(test)]
    syncing: Mutex<Option<Syncing>>,
}

#[cfg(test)]
type Syncing = Box<dyn FnOnce(&Sums) + Send>;

#[derive(Default)]
struct State {
    file: Option<Arc<dyn Disk>>,
    /// Looked for, and not there.
    absent: bool,
    /// What a predecessor left in the page cache was made durable, or forgotten.
    settled: bool,
    leaves: BTreeMap<u64, Known>,
    /// Open leaves of which checksums are kept.
    kept: usize,
    /// Leaves with grains that were written and have no checksum.
    written: BTreeMap<u64, Written>,
    /// Where to go on looking for leaves that a predecessor left open; `None` when done.
    look_from: Option<u64>,
    /// Why a write or sync of the table failed. A later success would prove nothing.
    failed: Option<String>,
    /// Leaves that were being written then: what the medium has there is not known.
    stuck: BTreeSet<u64>,
}

/// What is known of a leaf.
#[derive(Clone, Default)]
struct Known {
    /// Checksums that hold now.
    sums: Option<Leaf>,
    /// The medium may have the leaf: it is to be erased before a grain that it has a checksum of is written.
    sealed: bool,
    /// The medium has less.
    kept: bool,
}

impl State {
    fn set(&mut self, leaf: u64, known: Known) {
        self.kept += usize::from(known.kept);
        let before = self.leaves.insert(leaf, known);
        self.kept -= usize::from(before.is_some_and(|k| k.kept));
    }

    /// It could not be sealed: the next attempts are farther and farther apart.
    fn put_off(&mut self, leaf: u64) {
        if let Some(written) = self.written.get_mut(&leaf) {
            written.idle = 0;
            written.failures = (written.failures + 1).min(PUT_OFF_MAX);
        }
    }
}

#[derive(Clone, Copy, Default)]
struct Written {
    writes: u64,
    seen: u64,
    idle: u32,
    failures: u32,
}

/// A leaf that is to be sealed.
struct Due {
    leaf: u64,
    writes: u64,
    /// The checksums it keeps.
    sums: Vec<u64>,
}

/// The name of a layer's table.
pub fn file_name(layer: u32) -> String {
    format!("{layer:06}{SUFFIX}")
}

/// The layer whose table a file's name says; `None` for another file.
pub fn parse(name: &str) -> Option<u32> {
    let layer = name.strip_suffix(SUFFIX)?.parse().ok()?;
    (file_name(layer) == name).then_some(layer)
}

impl Sums {
    /// The table of a layer. What a predecessor left open is sealed in time.
    pub fn new(home: Arc<Home>, layer: u32, grain: u64, keys: Keys) -> Sums {
        let state = State {
            look_from: Some(0),
            ..State::default()
        };
        Sums {
            home,
            layer,
            grain,
            keys,
            gate: RwLock::new(()),
            opening: Mutex::new(()),
            syncs: Mutex::new(()),
            state: Mutex::new(state),
            #[cfg(test)]
            syncing: Mutex::default(),
        }
    }

    /// Bytes of a grain.
    pub fn grain(&self) -> u64 {
        self.grain
    }

    fn leaves_of(&self, bytes: &Range<u64>) -> Range<u64> {
        let unit = self.grain * LEAF_GRAINS;
        let last = PIECE_BYTES / BLOCK;
        (bytes.start / unit).min(last)..bytes.end.div_ceil(unit).min(last)
    }

    /// To be called before bytes of the layer change, and the guard to be kept until they have.
    ///
    /// # Errors
    /// `Failed`, `NoSpace`, `Io`: then nothing may be written.
    pub fn open(&self, bytes: Range<u64>) -> Result<RwLockReadGuard<'_, ()>> {
        let guard = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        for leaf in self.leaves_of(&bytes) {
            let _opening = lock(&self.opening);
            let first = leaf * LEAF_GRAINS;
            let grains = bytes.start / self.grain..bytes.end.div_ceil(self.grain);
            let part = grains.start.max(first) - first..grains.end.min(first + LEAF_GRAINS) - first;
            self.open_leaf(leaf, part.start as usize..part.end as usize)?;
        }
        Ok(guard)
    }

    /// Takes the checksums of a part of a leaf away, on the medium first. The caller holds `opening`.
    fn open_leaf(&self, leaf: u64, part: Range<usize>) -> Result<()> {
        let mut state = lock(&self.state);
        if let (true, Some(why)) = (state.stuck.contains(&leaf), &state.failed) {
            return Err(self.failure(why));
        }
        // One that cannot be read now may be read again later.
        let unread = Known {
            sealed: true,
            ..Known::default()
        };
        let mut known = self.load(&mut state, leaf).unwrap_or(unread);
        let has = |sums: &Leaf| sums[part.clone()].iter().any(|&sum| sum != 0);
        if known.sums.as_ref().map_or(known.sealed, has) {
            if known.sealed {
                if let Some(why) = &state.failed {
                    return Err(self.failure(why));
                }
                let file = self.file(&mut state);
                let file = file.map_err(|e| self.failure(&e.to_string()))?;
                drop(state);
                self.erase(leaf, file)?;
                state = lock(&self.state);
                known.sealed = false;
                if !known.kept && state.kept >= KEPT_MAX {
                    known.sums = None;
                }
                known.kept = known.sums.is_some();
            }
            known.sums = known.sums.map(|sums| {
                let mut sums = sums.to_vec();
                sums[part].fill(0);
                sums.into()
            });
            state.set(leaf, known);
        }
        state.written.entry(leaf).or_default().writes += 1;
        Ok(())
    }

    /// Grains have become the layer's: their leaves are to be sealed, also if that was just done.
    pub fn note_held(&self, grains: Range<u64>) {
        let mut state = lock(&self.state);
        for leaf in self.leaves_of(&(grains.start * self.grain..grains.end * self.grain)) {
            state.written.entry(leaf).or_default().writes += 1;
        }
    }

    fn failure(&self, why: &str) -> Error {
        Error::new(
            Kind::Failed,
            format!(
                "the checksums of overlay {} cannot be changed: {why}",
                self.layer
            ),
        )
    }

    fn erase(&self, leaf: u64, file: Option<Arc<dyn Disk>>) -> Result<()> {
        let Some(file) = file else {
            return Ok(());
        };
        let at = leaf * BLOCK;
        let _syncs = lock(&self.syncs);
        let done = match file.write_all_at(at, &[&[0; BLOCK as usize]]) {
            // Where even that needs space a hole does not.
            Err(e) if e.kind() == io::ErrorKind::StorageFull => file.punch(at, BLOCK),
            done => done,
        };
        done.and_then(|()| file.sync_data()).map_err(|e| {
            let why = e.to_string();
            let mut state = lock(&self.state);
            state.stuck.insert(leaf);
            state.failed = Some(why.clone());
            self.failure(&why)
        })
    }

    /// The file, `None` if there is none.
    fn file(&self, state: &mut State) -> io::Result<Option<Arc<dyn Disk>>> {
        if state.file.is_none() && !state.absent {
            let dir = self.home.dir(false).map_err(io::Error::other)?;
            let opened = dir.map(|dir| dir.open(&file_name(self.layer), Open::Write));
            state.file = match opened {
                Some(Err(e)) if e.kind() == io::ErrorKind::NotFound => None,
                Some(opened) => Some(opened?),
                None => None,
            };
            state.absent = state.file.is_none();
            // A predecessor may have been killed between an erasing and its sync, or its sync may have
            // failed: only what the medium has counts.
            if let Some(file) = state.file.clone().filter(|_| !state.settled) {
                let settled = file.sync_data().and_then(|()| file.drop_cache());
                settled.inspect_err(|_| state.file = None)?;
            }
            state.settled = true;
        }
        Ok(state.file.clone())
    }

    /// A leaf from memory or from the file. What cannot be read is looked for again.
    fn load(&self, state: &mut State, leaf: u64) -> io::Result<Known> {
        if let Some(known) = state.leaves.get(&leaf) {
            return Ok(known.clone());
        }
        let mut block = vec![0; BLOCK as usize];
        let Some(file) = self.file(state)? else {
            return Ok(Known::default());
        };
        // A write that was cut short may have ended the file in the middle of a leaf. What is missing
        // reads as zero once the file grows, and may complete it.
        let there = file.size()?.saturating_sub(leaf * BLOCK).min(BLOCK) as usize;
        if there > 0 {
            file.read_exact_at(leaf * BLOCK, &mut block[..there])?;
        }
        let found = self.decode(leaf, &block);
        let blank = block.iter().all(|&b| b == 0);
        if found.is_none() && !blank {
            tracing::error!(
                layer = self.layer,
                leaf,
                "checksums of an overlay are damaged; they are made again from the content"
            );
        }
        if state.leaves.len() >= CACHED_MAX {
            let State {
                leaves, written, ..
            } = state;
            // Of those that are being written the medium has less.
            leaves.retain(|leaf, _| written.contains_key(leaf));
        }
        // What is damaged as it was read now may be read as good later: it is erased like a good one.
        let known = Known {
            sealed: !blank,
            sums: found,
            kept: false,
        };
        state.set(leaf, known.clone());
        Ok(known)
    }

    fn encode(&self, leaf: u64, sums: &[u64]) -> Vec<u8> {
        let mut block = vec![0; BLOCK as usize];
        block[..8].copy_from_slice(&MAGIC);
        block[8..12].copy_from_slice(&self.layer.to_le_bytes());
        block[16..24].copy_from_slice(&leaf.to_le_bytes());
        for (i, sum) in sums.iter().enumerate() {
            block[HEADER + i * 8..HEADER + i * 8 + 8].copy_from_slice(&sum.to_le_bytes());
        }
        let sum = self.keys.commit(&block);
        block[SUM_AT..HEADER].copy_from_slice(&sum);
        block
    }

    fn decode(&self, leaf: u64, block: &[u8]) -> Option<Leaf> {
        let mut plain = block.to_vec();
        plain[SUM_AT..HEADER].fill(0);
        let ours = block[..8] == MAGIC
            && block[8..12] == self.layer.to_le_bytes()
            && block[16..24] == leaf.to_le_bytes()
            && self.keys.commit(&plain) == block[SUM_AT..HEADER];
        ours.then(|| {
            let sums = block[HEADER..].chunks_exact(8);
            sums.map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes")))
                .collect()
        })
    }

    /// The checksums of a run of grains, 0 where there is none.
    pub fn of(&self, grains: Range<u64>) -> Vec<u64> {
        let mut state = lock(&self.state);
        let mut sums = Vec::with_capacity((grains.end - grains.start) as usize);
        let mut at = grains.start;
        while at < grains.end {
            let leaf = at / LEAF_GRAINS;
            let first = leaf * LEAF_GRAINS;
            let end = grains.end.min(first + LEAF_GRAINS);
            match leaf < PIECE_BYTES / BLOCK {
                true => match self.load(&mut state, leaf).ok().and_then(|k| k.sums) {
                    Some(found) => {
                        sums.extend_from_slice(
                            &found[(at - first) as usize..(end - first) as usize],
                        );
                    }
                    None => sums.resize(sums.len() + (end - at) as usize, 0),
                },
                false => sums.resize(sums.len() + (end - at) as usize, 0),
            }
            at = end;
        }
        sums
    }

    /// The checksum of a grain's content; never 0.
    pub fn sum(&self, content: &[u8]) -> u64 {
        self.keys.payload(content).max(1)
    }

    /// Seals leaves whose grains have not been written for `rounds` calls, as far as `budget` bytes
    /// of content go; returns the bytes that were read. `held` tells the layer's grains, `read` reads
    /// them, `sync` makes them durable.
    ///
    /// # Errors
    /// Those of `sync`. What cannot be read, or written to the table, stays without checksums.
    pub fn seal(
        &self,
        held: &dyn Fn() -> GrainSet,
        rounds: u32,
        budget: u64,
        read: &dyn Fn(u64, &mut [u8]) -> Result<()>,
        sync: &dyn Fn() -> Result<()>,
    ) -> Result<u64> {
        self.look(held);
        let due = self.due(rounds);
        let (mut bytes, mut sealed) = (0, Vec::new());
        if due.is_empty() || budget == 0 {
            return Ok(bytes);
        }
        let held = held();
        sync()?;
        for mut due in due {
            if bytes >= budget {
                break;
            }
            let first = due.leaf * LEAF_GRAINS;
            let mut good = true;
            for run in held.ranges_in(first..first + LEAF_GRAINS) {
                let mut content = vec![0; self.grain as usize];
                for grain in run {
                    let sum = &mut due.sums[(grain - first) as usize];
                    // What it has one of already was not written, and is held against that.
                    if *sum == 0 {
                        good &= read(grain * self.grain, &mut content).is_ok();
                        *sum = self.sum(&content);
                        bytes += self.grain;
                    }
                }
            }
            if !good {
                lock(&self.state).put_off(due.leaf);
            } else if self.put(&due) {
                sealed.push(due.leaf);
            }
        }
        // An error of the medium is told to one sync only, so nobody may be between an erasing and
        // its own.
        let _syncs = lock(&self.syncs);
        let file = lock(&self.state).file.clone();
        #[cfg(test)]
        if let Some(syncing) = lock(&self.syncing).take() {
            syncing(self);
        }
        if let (false, Some(file)) = (sealed.is_empty(), file)
            && let Err(e) = file.sync_data()
        {
            // What the medium has is not known; nobody may count on being able to erase it.
            let mut state = lock(&self.state);
            state.failed = Some(e.to_string());
            state.stuck.extend(sealed);
            tracing::error!(
                layer = self.layer,
                "a sync of an overlay's checksums failed: {e}"
            );
        }
        Ok(bytes)
    }

    /// Finds leaves with grains without checksums that this process has not written.
    fn look(&self, held: &dyn Fn() -> GrainSet) {
        let Some(mut from) = lock(&self.state).look_from else {
            return;
        };
        let held = held();
        for _ in 0..LOOK_AT_ONCE {
            // Readers get their turn in between.
            let mut state = lock(&self.state);
            if state.written.len() >= BACKLOG_MAX {
                state.look_from = Some(from);
                return;
            }
            let next = held.ranges_in(from * LEAF_GRAINS..u64::MAX).next();
            let leaf = next.map(|run| run.start / LEAF_GRAINS);
            let Some(leaf) = leaf.filter(|&leaf| leaf < PIECE_BYTES / BLOCK) else {
                state.look_from = None;
                return;
            };
            let first = leaf * LEAF_GRAINS;
            let mut grains = held.ranges_in(first..first + LEAF_GRAINS).flatten();
            let lacks = match self.load(&mut state, leaf) {
                Ok(Known { sums: None, .. }) => true,
                Ok(Known {
                    sums: Some(sums), ..
                }) => grains.any(|grain| sums[(grain - first) as usize] == 0),
                Err(_) => false,
            };
            if lacks {
                state.written.entry(leaf).or_default();
            }
            from = leaf + 1;
        }
        lock(&self.state).look_from = Some(from);
    }

    /// Leaves that nobody writes any more, as they are when nobody is writing.
    fn due(&self, rounds: u32) -> Vec<Due> {
        let mut due = Vec::new();
        if lock(&self.state).written.is_empty() {
            return due;
        }
        // Nobody is between opening and the end of a write.
        let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let mut state = lock(&self.state);
        if state.failed.is_some() {
            return due;
        }
        let mut quiet = Vec::new();
        for (&leaf, written) in &mut state.written {
            match written.seen == written.writes {
                true => written.idle = written.idle.saturating_add(1),
                false => (written.idle, written.failures) = (0, 0),
            }
            written.seen = written.writes;
            if written.idle >= rounds << written.failures && quiet.len() < DUE_MAX {
                quiet.push((leaf, written.writes));
            }
        }
        for (leaf, writes) in quiet {
            match self.load(&mut state, leaf) {
                Ok(known) => due.push(Due {
                    leaf,
                    writes,
                    sums: match known.sums {
                        Some(sums) => sums.to_vec(),
                        None => vec![0; LEAF_GRAINS as usize],
                    },
                }),
                Err(_) => state.put_off(leaf),
            }
        }
        due
    }

    /// Writes a leaf, unless somebody has written its grains meanwhile; whether it did.
    fn put(&self, due: &Due) -> bool {
        let leaf = due.leaf;
        let made = self.make();
        let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let mut state = lock(&self.state);
        let writes = state.written.get(&leaf).map(|w| w.writes);
        if writes != Some(due.writes) {
            return false;
        }
        if due.sums.iter().all(|&sum| sum == 0) {
            // None of its grains is the layer's yet.
            state.written.remove(&leaf);
            return false;
        }
        let done = made.and_then(|()| match &state.file {
            Some(file) => file
                .write_all_at(leaf * BLOCK, &[&self.encode(leaf, &due.sums)])
                .context(|| "cannot write an overlay's checksums"),
            None => Err(Error::new(Kind::Io, "the file is not there")),
        });
        // Where that failed, half of it is damaged and counts as open, and all of it may be there.
        let kept = done.is_err() && state.kept < KEPT_MAX;
        let sums = (done.is_ok() || kept).then(|| due.sums.as_slice().into());
        let sealed = true;
        state.set(leaf, Known { sums, sealed, kept });
        match done {
            Ok(()) => {
                state.written.remove(&leaf);
                true
            }
            Err(e) => {
                state.put_off(leaf);
                tracing::debug!(layer = self.layer, "no checksums: {}", e.chain());
                false
            }
        }
    }

    /// Makes the file if there is none; its name is durable when it returns.
    fn make(&self) -> Result<()> {
        let mut state = lock(&self.state);
        let context = || "cannot make an overlay's checksums";
        if self.file(&mut state).context(context)?.is_some() {
            return Ok(());
        }
        let Some(dir) = self.home.dir(true)? else {
            return Ok(());
        };
        let file = dir
            .open(&file_name(self.layer), Open::Create)
            .context(context)?;
        state.file = Some(file);
        state.absent = false;
        dir.sync().context(context)
    }

    /// The grains of `held` whose checksums are lost, because their leaf is damaged.
    pub fn damaged(&self, held: &GrainSet) -> Vec<Range<u64>> {
        let mut lost: Vec<Range<u64>> = Vec::new();
        let file = match self.file(&mut lock(&self.state)) {
            Ok(Some(file)) => file,
            Ok(None) => return lost,
            Err(_) => return held.ranges().collect(),
        };
        let size = file.size().unwrap_or(0);
        let mut next = 0;
        while let Some(run) = held.ranges_in(next * LEAF_GRAINS..u64::MAX).next() {
            let leaf = run.start / LEAF_GRAINS;
            next = leaf + 1;
            if leaf * BLOCK >= size {
                break;
            }
            let mut block = vec![0; BLOCK as usize];
            let read = file.read_exact_at(leaf * BLOCK, &mut block);
            let good = block.iter().all(|&b| b == 0) || self.decode(leaf, &block).is_some();
            if read.is_err() || !good {
                lost.extend(held.ranges_in(leaf * LEAF_GRAINS..next * LEAF_GRAINS));
            }
        }
        lost
    }

    /// Keeps writers away until the guard is dropped.
    pub fn quiet(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the file is open.
    pub fn is_open(&self) -> bool {
        lock(&self.state).file.is_some()
    }

    /// Closes the file.
    pub fn close_file(&self) {
        let mut state = lock(&self.state);
        state.file = None;
        state.absent = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::sim::{Fault, Op, SimWorld, What};
    use crate::units::Uuid;
    use crate::volume::overlay::{self, Overlay};

    const GRAIN: u64 = 4096;

    fn open(world: &SimWorld) -> Overlay {
        open_with(world, GRAIN)
    }

    fn open_with(world: &SimWorld, grain: u64) -> Overlay {
        let home = Arc::new(Home::new(world.dir("store")));
        let dir = home.dir(true).unwrap().unwrap();
        let names = overlay::files(dir.as_ref()).unwrap().remove(&7);
        let keys = Keys::derive(&[1; 32], Uuid([2; 16]));
        let sums = Sums::new(Arc::clone(&home), 7, grain, keys);
        Overlay::new(home, 7, &names.unwrap_or_default(), Some(sums))
    }

    fn held(grains: Range<u64>) -> GrainSet {
        std::iter::once(grains).collect()
    }

    /// Returns the bytes that were read for it.
    fn seal(overlay: &Overlay, held: &GrainSet, rounds: u32) -> u64 {
        overlay.seal(&|| held.clone(), rounds, u64::MAX).unwrap()
    }

    fn kind(overlay: &Overlay, grain: u64) -> Option<Kind> {
        let mut bytes = vec![0; 100];
        let read = overlay.read(grain * GRAIN + 50, &mut bytes);
        read.err().map(|e| e.kind())
    }

    /// Sealed content is verified in every part of it, also by the next process; what is written again
    /// is not held against what was there.
    #[test]
    fn rot_is_found_once_a_leaf_is_sealed() {
        let world = SimWorld::new(1);
        let o = open(&world);
        let all = held(0..600);
        o.write(0, &vec![5; 600 * GRAIN as usize]).unwrap();
        assert_eq!(seal(&o, &all, 1), 0, "too early");
        assert_eq!(seal(&o, &all, 1), 600 * GRAIN);
        let o = open(&world);
        assert!((0..600).all(|g| kind(&o, g).is_none()));
        for grain in [0, 503, 504, 599] {
            world.poke("store/clones/000007.data", grain * GRAIN + 4000, &[6]);
            assert_eq!(kind(&o, grain), Some(Kind::Damaged), "{grain}");
            assert_eq!(kind(&o, grain ^ 1), None);
        }
        for grain in [0, 503, 504, 599] {
            o.write(grain * GRAIN, &[7; GRAIN as usize]).unwrap();
            assert_eq!(kind(&o, grain), None);
        }
        seal(&o, &all, 0);
        world.poke("store/clones/000007.data", 30 * GRAIN, &[1]);
        assert_eq!(kind(&o, 30), Some(Kind::Damaged));
        // Without its table nothing can be told, and nothing is refused.
        world.poke("store/clones/000007.sums", 100, &[0xff]);
        let o = open(&world);
        assert_eq!(kind(&o, 30), None);
        assert_eq!(o.damaged_sums(&all), vec![0..LEAF_GRAINS; 1]);
        seal(&o, &all, 0);
        assert_eq!(o.damaged_sums(&all), []);
    }

    /// Rot beside a grain that is written stays known while the leaf is open, and when it is sealed
    /// again; a part of a rotten grain is not written, all of it is.
    #[test]
    fn rot_is_not_sealed_as_content() {
        let world = SimWorld::new(2);
        let o = open(&world);
        let all = held(0..20);
        o.write(0, &[5; 20 * GRAIN as usize]).unwrap();
        seal(&o, &all, 0);
        for grain in [5, 6] {
            world.poke("store/clones/000007.data", grain * GRAIN + 9, &[0]);
        }
        o.write(7 * GRAIN, &[6; 2 * GRAIN as usize]).unwrap();
        assert_eq!(world.peek("store/clones/000007.sums").unwrap(), [0; 4096]);
        assert_eq!(kind(&o, 5), Some(Kind::Damaged), "while it is open");
        assert_eq!(
            seal(&o, &all, 0),
            2 * GRAIN,
            "only what was written is read"
        );
        for o in [o, open(&world)] {
            let bad: Vec<u64> = (0..20).filter(|&g| kind(&o, g).is_some()).collect();
            assert_eq!(bad, [5, 6]);
            for part in [5 * GRAIN + 1..6 * GRAIN, 4 * GRAIN..5 * GRAIN + 1] {
                let bytes = vec![1; (part.end - part.start) as usize];
                let refused = o.write(part.start, &bytes).unwrap_err();
                assert_eq!(refused.kind(), Kind::Damaged, "{part:?}");
                assert_eq!(o.zero(part).unwrap_err().kind(), Kind::Damaged);
            }
            assert_eq!(kind(&o, 4), None);
        }
        let o = open(&world);
        o.write(5 * GRAIN, &[1; GRAIN as usize]).unwrap();
        o.zero(6 * GRAIN..7 * GRAIN).unwrap();
        assert!((0..20).all(|g| kind(&o, g).is_none()));
    }

    /// A grain that becomes the layer's after its leaf was sealed gets a checksum, too, in this life or
    /// in the next.
    #[test]
    fn a_grain_that_came_late_is_sealed() {
        for next_life in [false, true] {
            let world = SimWorld::new(3);
            let mut o = open(&world);
            o.write(0, &[5; 3 * GRAIN as usize]).unwrap();
            seal(&o, &held(0..2), 0);
            assert_eq!(seal(&o, &held(0..2), 0), 0, "all is done");
            match next_life {
                true => o = open(&world),
                false => o.note_held(2..3),
            }
            assert_eq!(seal(&o, &held(0..3), 0), GRAIN);
            world.poke("store/clones/000007.data", 2 * GRAIN, &[0]);
            assert_eq!(kind(&o, 2), Some(Kind::Damaged));
        }
    }

    /// Where the erasing of a leaf failed, nothing is written under it any more, whatever the cache of
    /// leaves or of pages says.
    #[test]
    fn an_erasing_that_failed_is_not_passed_over() {
        const LEAVES: u64 = CACHED_MAX as u64 + 8;
        let all = held(0..LEAVES * LEAF_GRAINS);
        let mut shown_open = 0;
        for seed in 0..16 {
            let world = SimWorld::new(seed);
            let o = open_with(&world, 16);
            o.write(0, &vec![5; (LEAVES * LEAF_GRAINS * 16) as usize])
                .unwrap();
            seal(&o, &all, 0);
            world.fail_nth(Op::Sync, 1, 5);
            let refused = o.write(0, &[6; 16]).unwrap_err();
            assert_eq!(refused.kind(), Kind::Failed);
            let read_all = |o: &Overlay| {
                let leaf = |leaf| o.read(leaf * LEAF_GRAINS * 16, &mut [0; 16]);
                (0..LEAVES).rev().try_for_each(leaf).unwrap();
            };
            // A leaf that is not known yet drives the others out.
            o.write(LEAVES * LEAF_GRAINS * 16, &[5; 16]).unwrap();
            read_all(&o);
            let file = world.peek("store/clones/000007.sums").unwrap();
            shown_open += u64::from(file[..4096] == [0; 4096]);
            let refused = o.write(0, &[6; 16]).map_err(|e| e.kind());
            assert_eq!(refused, Err(Kind::Failed), "seed {seed}");
            world.power_cut();
            read_all(&open_with(&world, 16));
        }
        assert!(shown_open > 0);
    }

    /// A leaf that cannot be written is tried again, later and later, and content that has changed
    /// meanwhile is not held against what was to be written.
    #[test]
    fn a_leaf_that_cannot_be_written_is_put_off() {
        let world = SimWorld::new(5);
        let o = open(&world);
        let all = held(0..2);
        o.write(0, &[5; 2 * GRAIN as usize]).unwrap();
        o.sync().unwrap();
        let used = world.allocated("store");
        world.set_space("store", Some(used));
        let tried: u64 = (0..64).map(|_| seal(&o, &all, 1)).sum();
        assert_eq!(tried, 2 * GRAIN, "read once");
        o.write(0, &[6; GRAIN as usize]).unwrap();
        assert_eq!(kind(&o, 0), None);
        world.set_space("store", None);
        for _ in 0..3 {
            seal(&o, &all, 1);
        }
        world.poke("store/clones/000007.data", 0, &[0]);
        assert_eq!(kind(&o, 0), Some(Kind::Damaged));
        // Content that cannot be read is not read over and over.
        o.write(0, &[7; 2 * GRAIN as usize]).unwrap();
        let disk = world.disk("store/clones/000007.data").unwrap();
        crate::sys::disk::Disk::set_size(&*disk, GRAIN).unwrap();
        let tried: u64 = (0..64).map(|_| seal(&o, &all, 1)).sum();
        assert!((2..8).contains(&(tried / (2 * GRAIN))), "{tried}");
    }

    /// A leaf of which a cut left only the beginning is completed by the zeros that come with a later one,
    /// and one that is damaged may be read as good the next time: both are erased like good ones.
    #[test]
    fn a_leaf_that_is_not_whole_is_erased_before_its_grains_are_written() {
        const FILE: &str = "store/clones/000007.sums";
        let far = LEAF_GRAINS * GRAIN;
        let mut cut_short = 0;
        for seed in 0..64 {
            let world = SimWorld::new(seed);
            let o = open(&world);
            o.write(0, &[5; GRAIN as usize]).unwrap();
            world.inject(Fault {
                what: What::Short(28),
                ops: &[Op::Write],
                under: "store/clones",
                nth: 1,
                lasting: false,
            });
            seal(&o, &held(0..1), 0);
            cut_short += u64::from(world.peek(FILE).unwrap().len() > HEADER + 8);
            drop(o);
            world.kill();
            let o = open(&world);
            o.write(0, &[6; GRAIN as usize]).unwrap();
            o.write(far, &[6; GRAIN as usize]).unwrap();
            let all: GrainSet = [0..1, LEAF_GRAINS..LEAF_GRAINS + 1].into_iter().collect();
            seal(&o, &all, 1);
            o.write(0, &[7; GRAIN as usize]).unwrap();
            // The first one is still being written.
            assert_eq!(seal(&o, &all, 1), GRAIN);
            drop(o);
            world.kill();
            assert_eq!(kind(&open(&world), 0), None, "seed {seed}");
        }
        assert!(cut_short > 5, "{cut_short}");

        let world = SimWorld::new(9);
        let o = open(&world);
        o.write(0, &[5; GRAIN as usize]).unwrap();
        seal(&o, &held(0..1), 0);
        let good = world.peek(FILE).unwrap();
        world.poke(FILE, 100, &[good[100] ^ 1]);
        let o = open(&world);
        o.write(0, &[6; GRAIN as usize]).unwrap();
        if world.peek(FILE).unwrap()[100] == good[100] ^ 1 {
            world.poke(FILE, 100, &[good[100]]);
        }
        assert_eq!(kind(&open(&world), 0), None);
    }

    /// The sync of what was sealed would take the error of an erasing that has not been synced yet.
    #[test]
    fn nobody_is_erasing_while_what_was_sealed_is_synced() {
        let world = SimWorld::new(10);
        let o = open(&world);
        o.write(0, &[5; GRAIN as usize]).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        *lock(&o.sums().syncing) = Some(Box::new(move |sums| {
            tell.send(sums.syncs.try_lock().is_err()).unwrap();
        }));
        seal(&o, &held(0..1), 0);
        assert!(told.recv().unwrap());
    }

    /// However much waits to be sealed, little of it is taken at a time, and all of it in the end.
    #[test]
    fn a_long_backlog_is_sealed_bit_by_bit() {
        const LEAVES: u64 = 2 * DUE_MAX as u64 + 9;
        let world = SimWorld::new(11);
        let o = open_with(&world, 16);
        let all = held(0..LEAVES * LEAF_GRAINS);
        o.write(0, &vec![5; (LEAVES * LEAF_GRAINS * 16) as usize])
            .unwrap();
        let leaf = LEAF_GRAINS * 16;
        let most = DUE_MAX as u64 * leaf;
        let sealed: Vec<u64> = (0..4).map(|_| seal(&o, &all, 0)).collect();
        assert_eq!(sealed, [most, most, 9 * leaf, 0]);
    }

    /// A zeroing that failed behind the punch has changed content that is not durable.
    #[test]
    fn a_zeroing_that_failed_in_the_middle_is_made_durable_before_it_is_sealed() {
        for seed in 0..16 {
            let world = SimWorld::new(seed);
            let o = open(&world);
            let all = held(0..4);
            o.write(0, &[5; 4 * GRAIN as usize]).unwrap();
            seal(&o, &all, 0);
            world.inject(Fault {
                what: What::Errno(5),
                ops: &[Op::Look],
                under: "store/clones/000007.data",
                nth: 2,
                lasting: false,
            });
            o.zero(2 * GRAIN..6 * GRAIN).unwrap_err();
            assert_eq!(world.struck(), 1);
            seal(&o, &all, 0);
            drop(o);
            world.power_cut();
            let o = open(&world);
            assert!((0..4).all(|g| kind(&o, g).is_none()), "seed {seed}");
        }
    }

    /// Golden bytes: a change of any of them is a new format.
    #[test]
    fn golden_bytes() {
        let world = SimWorld::new(6);
        let o = open(&world);
        o.write(505 * GRAIN, &[5; GRAIN as usize]).unwrap();
        o.write(507 * GRAIN, &[6; GRAIN as usize]).unwrap();
        let all: GrainSet = [505..506, 507..508].into_iter().collect();
        seal(&o, &all, 0);
        let file = world.peek("store/clones/000007.sums").unwrap();
        assert_eq!(file.len(), 8192);
        assert_eq!(file[..4096], [0; 4096]);
        let leaf = &file[4096..];
        let hex: String = leaf[..96].iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            "534673756d735f3107000000000000000100000000000000000000000000000000000000000000000000000000000000\
             7d49565da1b2ee6bc06d2f216825a3b4\
             00000000000000005a78d7d50552daba0000000000000000e2dd02299be54f7d"
        );
        assert_eq!(leaf[96..], [0; 4000]);
    }

    /// Ended at any call, by a kill, then a power cut in the next life, or by a power cut at once: no
    /// grain is ever held against a checksum that is not its own.
    #[test]
    fn no_cut_leaves_a_checksum_of_something_else() {
        let all = held(0..20);
        let mut ended = 0;
        for n in 1..60 {
            for seed in 0..24 {
                let world = SimWorld::new(seed);
                let o = open(&world);
                o.write(0, &[1; 20 * GRAIN as usize]).unwrap();
                seal(&o, &all, 0);
                world.die_at(n);
                for round in 2..5 {
                    let _ = o.write(round * GRAIN + 7, &[round as u8; 9000]);
                    let _ = o.seal(&|| all.clone(), 0, u64::MAX);
                    let _ = o.zero(9 * GRAIN..11 * GRAIN);
                    let _ = o.sync();
                }
                ended += u64::from(world.is_dead());
                drop(o);
                match seed % 3 {
                    0 => world.power_cut(),
                    1 => {
                        world.kill();
                        let o = open(&world);
                        let _ = o.write(4 * GRAIN + 9, &[9; 8000]);
                        drop(o);
                        world.power_cut();
                    }
                    _ => world.kill(),
                }
                let o = open(&world);
                for grain in 0..20 {
                    let read = kind(&o, grain);
                    assert_eq!(read, None, "end {n} seed {seed} grain {grain}");
                }
            }
        }
        assert!(ended > 300, "{ended}");
    }
}
