//! What a simulated file and a simulated directory hold, and what a power cut leaves of them.
//!
//! Invariants: a page that `undo` does not name is durable as it stands. `undo` keeps, for each
//! page touched since the last good sync, its durable image and which of its sectors may differ
//! from it. `sizes` starts with the durable size and ends with the current one.
//!
//! It knows no names, faults or locks; the world above does.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::units::{BLOCK, SECTOR};

const PAGE_LEN: usize = BLOCK as usize;
const SECTOR_LEN: usize = SECTOR as usize;
const ALL_SECTORS: u8 = 0xff;
const _: () = assert!(PAGE_LEN == 8 * SECTOR_LEN, "a page has one bit a sector");

type Page = Arc<[u8; PAGE_LEN]>;

/// SplitMix64: small, seedable, good enough to choose faults.
#[derive(Debug, Clone)]
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `end`, which is not 0.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(super) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// The durable image of a touched page.
#[derive(Debug, Clone)]
struct Undo {
    old: Option<Page>,
    /// Sectors that may differ from `old`.
    sectors: u8,
    /// A failed sync covered it: clean to the kernel, never on the medium unless written again.
    lost: bool,
}

/// Content of a file.
#[derive(Debug, Clone)]
pub(super) struct Medium {
    pages: BTreeMap<u64, Page>,
    undo: BTreeMap<u64, Undo>,
    sizes: Vec<u64>,
}

/// How a power cut treats one file: extremes on purpose as often as mixtures.
enum Fate {
    Old,
    New,
    Mixed,
}

impl Medium {
    pub(super) fn new() -> Medium {
        Medium {
            pages: BTreeMap::new(),
            undo: BTreeMap::new(),
            sizes: vec![0],
        }
    }

    pub(super) fn size(&self) -> u64 {
        *self.sizes.last().expect("never empty")
    }

    pub(super) fn allocated(&self) -> u64 {
        self.pages.len() as u64 * BLOCK
    }

    fn change_size(&mut self, size: u64) {
        if size != self.size() {
            self.sizes.push(size);
        }
    }

    fn touch(&mut self, page: u64, sectors: u8) {
        let pages = &self.pages;
        let undo = self.undo.entry(page).or_insert_with(|| Undo {
            old: pages.get(&page).cloned(),
            sectors: 0,
            lost: false,
        });
        undo.sectors |= sectors;
        undo.lost = false;
    }

    /// Forgets what a failed sync left clean in the cache: the medium does not have it.
    pub(super) fn drop_cache(&mut self) {
        let lost: Vec<u64> = self
            .undo
            .iter()
            .filter(|(_, undo)| undo.lost)
            .map(|(page, _)| *page)
            .collect();
        for page in lost {
            match self.undo.remove(&page).and_then(|undo| undo.old) {
                Some(old) => drop(self.pages.insert(page, old)),
                None => drop(self.pages.remove(&page)),
            }
        }
    }

    /// Fills `buf`; the range lies inside the size.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) {
        for (page, inside, at) in pieces(offset, buf.len()) {
            match self.pages.get(&page) {
                Some(bytes) => buf[at].copy_from_slice(&bytes[inside]),
                None => buf[at].fill(0),
            }
        }
    }

    /// Writes while new pages cost at most `room`; answers how many bytes it wrote.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8], mut room: u64) -> usize {
        let mut done = 0;
        for (page, inside, at) in pieces(offset, bytes.len()) {
            if !self.pages.contains_key(&page) {
                if room < BLOCK {
                    break;
                }
                room -= BLOCK;
            }
            self.touch(page, sectors_of(&inside));
            let content = self
                .pages
                .entry(page)
                .or_insert_with(|| Arc::new([0; PAGE_LEN]));
            done = at.end;
            Arc::make_mut(content)[inside].copy_from_slice(&bytes[at]);
        }
        if done > 0 {
            self.change_size(self.size().max(offset + done as u64));
        }
        done
    }

    pub(super) fn set_size(&mut self, size: u64) {
        if size < self.size() {
            self.clear(size, self.size().next_multiple_of(BLOCK));
        }
        self.change_size(size);
    }

    /// Makes a range read as zero; never changes the size.
    pub(super) fn punch(&mut self, offset: u64, len: u64) {
        let size = self.size();
        let mut end = offset.saturating_add(len);
        if end >= size {
            end = size.next_multiple_of(BLOCK); // as filesystems do with the last block
        }
        self.clear(offset, end);
    }

    /// Frees whole pages and zeroes partial ones; holes stay holes.
    fn clear(&mut self, offset: u64, end: u64) {
        if offset >= end {
            return;
        }
        let touched: Vec<u64> = self
            .pages
            .range(offset / BLOCK..end.div_ceil(BLOCK))
            .map(|(page, _)| *page)
            .collect();
        for page in touched {
            let start = page * BLOCK;
            let inside = offset.saturating_sub(start) as usize..(end - start).min(BLOCK) as usize;
            self.touch(page, sectors_of(&inside));
            if inside.len() == PAGE_LEN {
                self.pages.remove(&page);
            } else if let Some(content) = self.pages.get_mut(&page) {
                Arc::make_mut(content)[inside].fill(0);
            }
        }
    }

    pub(super) fn next_data(&self, offset: u64) -> Option<u64> {
        let (page, _) = self.pages.range(offset / BLOCK..).next()?;
        let found = offset.max(page * BLOCK);
        (found < self.size()).then_some(found)
    }

    pub(super) fn next_hole(&self, offset: u64) -> u64 {
        let size = self.size();
        let first = offset / BLOCK;
        let run = self
            .pages
            .range(first..)
            .zip(first..)
            .take_while(|((p, _), i)| *p == i)
            .count();
        if run == 0 {
            offset
        } else {
            ((first + run as u64) * BLOCK).min(size).max(offset)
        }
    }

    /// A sync that succeeds. What a failed one covered stays lost.
    pub(super) fn sync(&mut self) {
        self.undo.retain(|_, undo| undo.lost);
        self.sizes = vec![self.size()];
    }

    /// A sync that fails: everything it covered is clean from now on, and not on the medium.
    pub(super) fn sync_failed(&mut self) {
        self.undo.values_mut().for_each(|undo| undo.lost = true);
    }

    /// Changes the medium behind everybody's back: durable at once, now and before.
    pub(super) fn poke(&mut self, offset: u64, bytes: &[u8]) {
        for (page, inside, at) in pieces(offset, bytes.len()) {
            let content = self
                .pages
                .entry(page)
                .or_insert_with(|| Arc::new([0; PAGE_LEN]));
            Arc::make_mut(content)[inside.clone()].copy_from_slice(&bytes[at.clone()]);
            if let Some(undo) = self.undo.get_mut(&page) {
                let old = undo.old.get_or_insert_with(|| Arc::new([0; PAGE_LEN]));
                Arc::make_mut(old)[inside].copy_from_slice(&bytes[at]);
            }
        }
        let size = self.size().max(offset + bytes.len() as u64);
        self.change_size(size);
    }

    /// Resolves everything not durable, as a power cut may.
    pub(super) fn cut(&mut self, rng: &mut Rng) {
        let fate = match rng.below(4) {
            0 => Fate::Old,
            1 => Fate::New,
            _ => Fate::Mixed,
        };
        let size = self.sizes[rng.below(self.sizes.len() as u64) as usize];
        for (page, undo) in std::mem::take(&mut self.undo) {
            let resolved = match fate {
                _ if undo.lost => undo.old,
                Fate::Old => undo.old,
                Fate::New => continue,
                Fate::Mixed => mix(&undo, self.pages.get(&page), rng),
            };
            match resolved {
                Some(content) => self.pages.insert(page, content),
                None => self.pages.remove(&page),
            };
        }
        // Nothing lies behind the end, nor shows up if the file grows again.
        let last = self
            .pages
            .last_key_value()
            .map_or(0, |(page, _)| (page + 1) * BLOCK);
        self.clear(size, last);
        self.undo.clear();
        self.sizes = vec![size];
    }
}

/// Each sector in doubt becomes old, new, or torn: the head of the new before the tail of the old,
/// or garbage.
fn mix(undo: &Undo, new: Option<&Page>, rng: &mut Rng) -> Option<Page> {
    let old = undo.old.as_deref().unwrap_or(&[0; PAGE_LEN]);
    let new_bytes = new.map_or(&[0; PAGE_LEN], |page| &**page);
    let (mut out, mut some_old, mut some_new) = (*new_bytes, false, false);
    for sector in (0..8).filter(|s| undo.sectors & 1 << s != 0) {
        let at = sector * SECTOR_LEN..(sector + 1) * SECTOR_LEN;
        let choice = rng.below(8);
        some_old |= choice != 0 && choice < 4 || choice == 7;
        some_new |= choice == 0 || choice >= 4;
        match choice {
            0 | 4..=6 => {}
            1..=3 => out[at.clone()].copy_from_slice(&old[at]),
            _ if rng.below(2) == 0 && new.is_some() => rng.fill(&mut out[at]),
            _ => {
                let head = at.start + 1 + rng.below(SECTOR - 1) as usize;
                out[head..at.end].copy_from_slice(&old[head..at.end]);
            }
        }
    }
    let exists = new.is_some() && some_new || undo.old.is_some() && (some_old || new.is_some());
    exists.then(|| Arc::new(out))
}

/// Splits a byte range: (page, range in the page, range in the buffer).
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done as u64;
        let start = (at % BLOCK) as usize;
        let piece = (PAGE_LEN - start).min(len - done);
        done += piece;
        Some((at / BLOCK, start..start + piece, done - piece..done))
    })
}

fn sectors_of(inside: &Range<usize>) -> u8 {
    let (first, end) = (inside.start / SECTOR_LEN, inside.end.div_ceil(SECTOR_LEN));
    (first..end).fold(0, |mask, sector| mask | 1 << sector) & ALL_SECTORS
}

/// One change of a directory: atomic, also a rename.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub(super) remove: Option<(String, u64)>,
    pub(super) add: Option<(String, u64)>,
}

impl Change {
    fn apply(&self, entries: &mut BTreeMap<String, u64>) {
        if let Some((name, id)) = &self.remove
            && entries.get(name) == Some(id)
        {
            entries.remove(name);
        }
        if let Some((name, id)) = &self.add {
            entries.insert(name.clone(), *id);
        }
    }
}

/// Names of a directory, now and on the medium.
#[derive(Debug, Clone, Default)]
pub(super) struct Names {
    pub(super) entries: BTreeMap<String, u64>,
    durable: BTreeMap<String, u64>,
    /// Changes not synced; `true`: a failed sync covered it, it will never be durable.
    pending: Vec<(Change, bool)>,
}

impl Names {
    pub(super) fn change(&mut self, change: Change) {
        change.apply(&mut self.entries);
        self.pending.push((change, false));
    }

    pub(super) fn sync(&mut self) {
        for (change, lost) in &self.pending {
            if !lost {
                change.apply(&mut self.durable);
            }
        }
        self.pending.retain(|(_, lost)| *lost);
    }

    pub(super) fn sync_failed(&mut self) {
        self.pending.iter_mut().for_each(|(_, lost)| *lost = true);
    }

    /// Everything this directory may name after a power cut.
    pub(super) fn reachable(&self) -> impl Iterator<Item = u64> {
        let pending = self
            .pending
            .iter()
            .filter_map(|(change, _)| change.add.as_ref());
        let named = self.entries.values().chain(self.durable.values()).copied();
        named.chain(pending.map(|(_, id)| *id))
    }

    /// Keeps a prefix of the pending changes, as a journal does, or any of them, as POSIX allows.
    pub(super) fn cut(&mut self, rng: &mut Rng) {
        let pending = std::mem::take(&mut self.pending);
        let journal = rng.below(2) == 0;
        let kept = rng.below(pending.len() as u64 + 1) as usize;
        for (i, (change, lost)) in pending.iter().enumerate() {
            let keep = if journal { i < kept } else { rng.below(2) == 0 };
            if keep && !lost {
                change.apply(&mut self.durable);
            }
        }
        self.entries = self.durable.clone();
    }
}
