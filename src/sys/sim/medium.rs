//! What a simulated file holds, now and on the medium.
//!
//! Invariants: a page that `undo` does not name is durable as it stands. `undo` keeps, for each
//! page touched since the last good sync, its durable image, the images since, and which of its
//! sectors may differ from it. `sizes` starts with the durable size and ends with the current one.
//!
//! It knows no names, faults or locks; the world above does. What a power cut leaves of it is in
//! [`cut`](super::cut).

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::units::{BLOCK, SECTOR};

pub(super) const PAGE_LEN: usize = BLOCK as usize;
pub(super) const SECTOR_LEN: usize = SECTOR as usize;
const ALL_SECTORS: u8 = 0xff;
const _: () = assert!(PAGE_LEN == 8 * SECTOR_LEN, "a page has one bit a sector");

/// Images of a page between the durable one and the newest that are kept for a power cut.
const BETWEEN_MAX: usize = 6;

pub(super) type Page = Arc<[u8; PAGE_LEN]>;

/// A page of zeros: logs write so many ahead that they share one.
fn zeros() -> Page {
    static ZEROS: OnceLock<Page> = OnceLock::new();
    Arc::clone(ZEROS.get_or_init(|| Arc::new([0; PAGE_LEN])))
}

/// The durable image of a touched page, and what it was since.
#[derive(Debug, Clone)]
pub(super) struct Undo {
    pub(super) old: Option<Page>,
    /// What it was in between, and since when; the last ones.
    pub(super) between: Vec<(u64, Option<Page>)>,
    /// Since when it is what it is.
    pub(super) since: u64,
    /// Sectors that may differ from `old`.
    pub(super) sectors: u8,
    /// A failed sync covered it: clean to the kernel, never on the medium unless written again.
    pub(super) lost: bool,
}

/// Content of a file.
#[derive(Debug, Clone)]
pub(super) struct Medium {
    pub(super) pages: BTreeMap<u64, Page>,
    pub(super) undo: BTreeMap<u64, Undo>,
    /// Sizes and since when; the durable one first, the current one last.
    pub(super) sizes: Vec<(u64, u64)>,
    /// The stamp of what is being done; the world sets it.
    pub(super) now: u64,
}

impl Medium {
    pub(super) fn new() -> Medium {
        Medium {
            pages: BTreeMap::new(),
            undo: BTreeMap::new(),
            sizes: vec![(0, 0)],
            now: 0,
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.sizes.last().expect("never empty").1
    }

    pub(super) fn allocated(&self) -> u64 {
        self.pages.len() as u64 * BLOCK
    }

    fn change_size(&mut self, size: u64) {
        if size != self.size() {
            self.sizes.push((self.now, size));
        }
    }

    fn touch(&mut self, page: u64, sectors: u8) {
        let current = self.pages.get(&page).cloned();
        let undo = self.undo.entry(page).or_insert_with(|| Undo {
            old: current.clone(),
            between: Vec::new(),
            since: self.now,
            sectors: 0,
            lost: false,
        });
        if undo.since != self.now {
            if !undo.lost {
                if undo.between.len() == BETWEEN_MAX {
                    undo.between.remove(0);
                }
                undo.between.push((undo.since, current));
            }
            undo.since = self.now;
        }
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
            done = at.end;
            match <&[u8; PAGE_LEN]>::try_from(&bytes[at.clone()]) {
                // Compared as a whole, which is many times faster than byte by byte.
                Ok(whole) if *whole == [0; PAGE_LEN] => {
                    self.pages.insert(page, zeros());
                }
                Ok(whole) => drop(self.pages.insert(page, Arc::new(*whole))),
                Err(_) => {
                    let content = self.pages.entry(page).or_insert_with(zeros);
                    Arc::make_mut(content)[inside].copy_from_slice(&bytes[at]);
                }
            }
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
    pub(super) fn clear(&mut self, offset: u64, end: u64) {
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

    /// Has what was just written (at the current stamp) never reach the medium; with `forget`, reads
    /// find that out at once, else only a power cut does.
    pub(super) fn lose(&mut self, offset: u64, len: usize, forget: bool) {
        for (page, _, _) in pieces(offset, len) {
            if let Some(undo) = self.undo.get_mut(&page) {
                undo.lost = true;
                undo.between.clear();
            }
        }
        if forget {
            self.drop_cache();
        }
    }

    /// A sync that succeeds. What a failed one covered stays lost.
    pub(super) fn sync(&mut self) {
        self.undo.retain(|_, undo| undo.lost);
        self.sizes = vec![(0, self.size())];
    }

    /// A sync that fails: everything it covered is clean from now on, and not on the medium.
    pub(super) fn sync_failed(&mut self) {
        for undo in self.undo.values_mut() {
            undo.lost = true;
            undo.between.clear();
        }
    }

    /// Changes the medium behind everybody's back: durable at once, now and before.
    pub(super) fn poke(&mut self, offset: u64, bytes: &[u8]) {
        for (page, inside, at) in pieces(offset, bytes.len()) {
            let content = self.pages.entry(page).or_insert_with(zeros);
            Arc::make_mut(content)[inside.clone()].copy_from_slice(&bytes[at.clone()]);
            if let Some(undo) = self.undo.get_mut(&page) {
                let between = undo.between.iter_mut().map(|(_, image)| image);
                for image in between.chain([&mut undo.old]) {
                    let image = image.get_or_insert_with(zeros);
                    Arc::make_mut(image)[inside.clone()].copy_from_slice(&bytes[at.clone()]);
                }
            }
        }
        let size = self.size().max(offset + bytes.len() as u64);
        self.change_size(size);
    }
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
