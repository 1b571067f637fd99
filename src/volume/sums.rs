//! Checksums of overlays: what lies in a layer of a clone is verified when it is read.
//!
//! The table of a layer is the file `clones/<layer>.sums`. A block of 4096 bytes, a *leaf*, holds the
//! checksums of 504 grains; 0 stands for none. A leaf is written (*sealed*) when its grains have not been
//! written for a while, after their content was made durable, and it is erased (*opened*), durably,
//! before a grain that it has a checksum of is written again. So a checksum on the medium is always that
//! of content that is durable and final: whatever a kill or a power cut leaves, a checksum that does not
//! match is rot, and grains that were being written have none.
//!
//! A writer pays one sync for the first overwrite in each leaf after it was sealed, and none for grains
//! that are new to the layer. A leaf that cannot be read or does not match its own checksum counts as
//! opened: nothing becomes unreadable by rot in the table alone. It is not verified that a leaf which
//! should be there is; the leaf behind 8 TiB of the table (petabytes of clone) is never made.
//!
//! Locks: `gate` (writers share it from opening to the end of the write; sealing excludes them for a
//! moment), then `opening` (held over the erasing), then `state` (memory, and reads of single leaves).

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

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
/// Leaves looked at in one round for some that a predecessor left open.
const LOOK_AT_ONCE: u64 = 256;

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
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    file: Option<Arc<dyn Disk>>,
    /// Looked for, and not there.
    absent: bool,
    /// What a predecessor left in the page cache was made durable, or forgotten.
    settled: bool,
    /// `None` for an open one.
    leaves: BTreeMap<u64, Option<Leaf>>,
    /// Leaves with grains that were written and have no checksum.
    written: BTreeMap<u64, Written>,
    /// Where to go on looking for leaves that a predecessor left open; `None` when done.
    look_from: Option<u64>,
    /// Why a write or sync of the table failed.
    failed: Option<String>,
}

#[derive(Clone, Copy, Default)]
struct Written {
    writes: u64,
    seen: u64,
    idle: u32,
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
            state: Mutex::new(state),
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
            let of_leaf = grains.start.max(first)..grains.end.min(first + LEAF_GRAINS);
            let mut state = lock(&self.state);
            let file = self.file(&mut state);
            let file = file.map_err(|e| self.failure(&e.to_string()))?;
            let must_go = match self.load(&mut state, leaf) {
                Ok(Some(sums)) => of_leaf.clone().any(|g| sums[(g - first) as usize] != 0),
                Ok(None) => false,
                // It may be read again later.
                Err(_) => true,
            };
            if must_go {
                if let Some(why) = &state.failed {
                    return Err(self.failure(why));
                }
                drop(state);
                self.erase(leaf, file)?;
                state = lock(&self.state);
                state.leaves.insert(leaf, None);
            }
            state.written.entry(leaf).or_default().writes += 1;
        }
        Ok(guard)
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
        let done = match file.write_all_at(at, &[&[0; BLOCK as usize]]) {
            // Where even that needs space a hole does not.
            Err(e) if e.kind() == io::ErrorKind::StorageFull => file.punch(at, BLOCK),
            done => done,
        };
        done.and_then(|()| file.sync_data()).map_err(|e| {
            // A later success would prove nothing.
            let why = e.to_string();
            lock(&self.state).failed = Some(why.clone());
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

    /// A leaf from memory or from the file; `None` if it is open. What cannot be read is looked for
    /// again.
    fn load(&self, state: &mut State, leaf: u64) -> io::Result<Option<Leaf>> {
        if let Some(known) = state.leaves.get(&leaf) {
            return Ok(known.clone());
        }
        let mut block = vec![0; BLOCK as usize];
        let Some(file) = self.file(state)? else {
            return Ok(None);
        };
        if (leaf + 1) * BLOCK <= file.size()? {
            file.read_exact_at(leaf * BLOCK, &mut block)?;
        }
        let found = self.decode(leaf, &block);
        if found.is_none() && block.iter().any(|&b| b != 0) {
            tracing::error!(
                layer = self.layer,
                leaf,
                "checksums of an overlay are damaged; they are made again from the content"
            );
        }
        if state.leaves.len() >= CACHED_MAX {
            let written = std::mem::take(&mut state.written);
            state.leaves.retain(|leaf, _| written.contains_key(leaf));
            state.written = written;
        }
        state.leaves.insert(leaf, found.clone());
        Ok(found)
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
                true => match self.load(&mut state, leaf) {
                    Ok(Some(found)) => {
                        sums.extend_from_slice(
                            &found[(at - first) as usize..(end - first) as usize],
                        );
                    }
                    Ok(None) | Err(_) => sums.resize(sums.len() + (end - at) as usize, 0),
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
    /// of content go; returns the bytes that were read. `held` are the layer's grains, `read` reads them, `sync` makes them durable.
    ///
    /// # Errors
    /// Those of `sync`. What cannot be read, or written to the table, stays without checksums.
    pub fn seal(
        &self,
        held: &GrainSet,
        rounds: u32,
        budget: u64,
        read: &dyn Fn(u64, &mut [u8]) -> Result<()>,
        sync: &dyn Fn() -> Result<()>,
    ) -> Result<u64> {
        self.look(held);
        let due = self.due(rounds);
        let (mut bytes, mut sealed) = (0, false);
        if due.is_empty() || budget == 0 {
            return Ok(bytes);
        }
        sync()?;
        for (leaf, writes) in due {
            if bytes >= budget {
                break;
            }
            let mut sums = vec![0; LEAF_GRAINS as usize];
            let first = leaf * LEAF_GRAINS;
            let mut good = true;
            for run in held.ranges_in(first..first + LEAF_GRAINS) {
                let mut content = vec![0; self.grain as usize];
                for grain in run {
                    good &= read(grain * self.grain, &mut content).is_ok();
                    sums[(grain - first) as usize] = self.sum(&content);
                    bytes += self.grain;
                }
            }
            sealed |= good && self.put(leaf, writes, &sums);
        }
        let file = lock(&self.state).file.clone();
        if let (true, Some(file)) = (sealed, file)
            && let Err(e) = file.sync_data()
        {
            // What the medium has is not known; nobody may count on being able to erase it.
            lock(&self.state).failed = Some(e.to_string());
            tracing::error!(
                layer = self.layer,
                "a sync of an overlay's checksums failed: {e}"
            );
        }
        Ok(bytes)
    }

    /// Finds leaves with grains and without checksums that this process has not written.
    fn look(&self, held: &GrainSet) {
        let mut state = lock(&self.state);
        let Some(mut from) = state.look_from else {
            return;
        };
        for _ in 0..LOOK_AT_ONCE {
            let next = held.ranges_in(from * LEAF_GRAINS..u64::MAX).next();
            let leaf = next.map(|run| run.start / LEAF_GRAINS);
            let Some(leaf) = leaf.filter(|&leaf| leaf < PIECE_BYTES / BLOCK) else {
                state.look_from = None;
                return;
            };
            if matches!(self.load(&mut state, leaf), Ok(None)) {
                state.written.entry(leaf).or_default();
            }
            from = leaf + 1;
        }
        state.look_from = Some(from);
    }

    /// Leaves that nobody writes any more, with the count of their writes when nobody was writing.
    fn due(&self, rounds: u32) -> Vec<(u64, u64)> {
        let mut due = Vec::new();
        // Nobody is between opening and the end of a write.
        let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let mut state = lock(&self.state);
        if state.failed.is_some() {
            return due;
        }
        for (&leaf, written) in &mut state.written {
            match written.seen == written.writes {
                true => written.idle += 1,
                false => written.idle = 0,
            }
            written.seen = written.writes;
            if written.idle >= rounds {
                due.push((leaf, written.writes));
            }
        }
        due
    }

    /// Writes a leaf, unless somebody has written its grains meanwhile; whether it did.
    fn put(&self, leaf: u64, writes: u64, sums: &[u64]) -> bool {
        if let Err(e) = self.make() {
            tracing::debug!(layer = self.layer, "no checksums: {}", e.chain());
            return false;
        }
        let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let mut state = lock(&self.state);
        let same = state.written.get(&leaf).is_some_and(|w| w.writes == writes);
        let Some(file) = state.file.clone().filter(|_| same) else {
            return false;
        };
        let done = file.write_all_at(leaf * BLOCK, &[&self.encode(leaf, sums)]);
        match done {
            Ok(()) => {
                state.leaves.insert(leaf, Some(sums.into()));
                state.written.remove(&leaf);
                true
            }
            Err(e) => {
                // Half of it is damaged, and counts as open; the same here.
                state.leaves.insert(leaf, None);
                tracing::debug!(layer = self.layer, "no checksums: {e}");
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
        let Ok(Some(file)) = self.file(&mut lock(&self.state)) else {
            return lost;
        };
        let size = file.size().unwrap_or(0);
        let mut next = 0;
        while let Some(run) = held.ranges_in(next * LEAF_GRAINS..u64::MAX).next() {
            let leaf = run.start / LEAF_GRAINS;
            next = leaf + 1;
            if next * BLOCK > size {
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
    use crate::sys::sim::SimWorld;
    use crate::units::Uuid;
    use crate::volume::overlay::{self, Overlay};

    const GRAIN: u64 = 4096;

    fn open(world: &SimWorld) -> Overlay {
        let home = Arc::new(Home::new(world.dir("store")));
        let dir = home.dir(true).unwrap().unwrap();
        let names = overlay::files(dir.as_ref()).unwrap().remove(&7);
        let keys = Keys::derive(&[1; 32], Uuid([2; 16]));
        let sums = Sums::new(Arc::clone(&home), 7, GRAIN, keys);
        Overlay::new(home, 7, &names.unwrap_or_default(), Some(sums))
    }

    fn held(grains: Range<u64>) -> GrainSet {
        std::iter::once(grains).collect()
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
        assert!(o.seal(&all, 1, u64::MAX).unwrap() == 0, "too early");
        assert_eq!(o.seal(&all, 1, u64::MAX).unwrap(), 600 * GRAIN);
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
        o.seal(&all, 0, u64::MAX).unwrap();
        world.poke("store/clones/000007.data", 30 * GRAIN, &[1]);
        assert_eq!(kind(&o, 30), Some(Kind::Damaged));
        // Without its table nothing can be told, and nothing is refused.
        world.poke("store/clones/000007.sums", 100, &[0xff]);
        let o = open(&world);
        assert_eq!(kind(&o, 30), None);
        assert_eq!(o.damaged_sums(&all), vec![0..LEAF_GRAINS; 1]);
        o.seal(&all, 0, u64::MAX).unwrap();
        assert_eq!(o.damaged_sums(&all), []);
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
                o.seal(&all, 0, u64::MAX).unwrap();
                world.die_at(n);
                for round in 2..5 {
                    let _ = o.write(round * GRAIN + 7, &[round as u8; 9000]);
                    let _ = o.seal(&all, 0, u64::MAX);
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
