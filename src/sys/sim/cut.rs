//! How a power cut resolves what was not durable.
//!
//! Promises: what a sync covered is never touched; each sector in doubt becomes one of the images it had
//! since the last sync, a mixture of two of them, zeros or garbage; each of these happens. All chance
//! comes from the seed.

use std::ops::Range;
use std::sync::Arc;

use crate::sys::sim::medium::{Medium, PAGE_LEN, Page, SECTOR_LEN, Undo};
use crate::units::BLOCK;

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

/// How a power cut treats a file, a directory or a whole device: extremes on purpose as often as
/// mixtures.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fate {
    /// Nothing unsynced is there.
    Old,
    /// All of it is.
    New,
    /// Each sector by itself.
    Mixed,
    /// What was done up to this stamp, in order, and nothing later.
    Until(u64),
}

impl Fate {
    /// One of all fates, given the stamps of what is in doubt.
    pub(super) fn draw(rng: &mut Rng, stamps: &[u64]) -> Fate {
        match rng.below(8) {
            0 | 1 => Fate::Old,
            2 => Fate::New,
            3 if !stamps.is_empty() => Fate::Until(stamps[rng.below(stamps.len() as u64) as usize]),
            _ => Fate::Mixed,
        }
    }
}

impl Medium {
    /// When what is in doubt was done.
    pub(super) fn stamps(&self) -> Vec<u64> {
        let of_page = |undo: &Undo| {
            undo.between
                .iter()
                .map(|(at, _)| *at)
                .chain([undo.since])
                .collect::<Vec<_>>()
        };
        let pages = self.undo.values().flat_map(of_page);
        pages
            .chain(self.sizes[1..].iter().map(|(at, _)| *at))
            .collect()
    }

    /// Whether a power cut changes nothing.
    pub(super) fn is_durable(&self) -> bool {
        self.undo.is_empty() && self.sizes.len() == 1
    }

    /// Resolves everything not durable, as a power cut may.
    pub(super) fn cut(&mut self, fate: Fate, rng: &mut Rng) {
        let size = self.cut_size(fate, rng);
        for (page, undo) in std::mem::take(&mut self.undo) {
            let resolved = match fate {
                _ if undo.lost => undo.old,
                Fate::Old => undo.old,
                Fate::New => continue,
                Fate::Until(stamp) if undo.since <= stamp => continue,
                Fate::Until(stamp) => undo.image_at(stamp),
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
        self.sizes = vec![(0, size)];
    }

    fn cut_size(&self, fate: Fate, rng: &mut Rng) -> u64 {
        let any = rng.below(self.sizes.len() as u64) as usize;
        let follows = rng.below(2) == 0;
        let chosen = match fate {
            Fate::Old if follows => 0,
            Fate::New if follows => self.sizes.len() - 1,
            // The durable size has no stamp.
            Fate::Until(stamp) => self.sizes[1..]
                .iter()
                .filter(|(at, _)| *at <= stamp)
                .count(),
            _ => any,
        };
        self.sizes[chosen].1
    }
}

impl Undo {
    /// What the page was when this was done; the durable image if that is older than all.
    fn image_at(&self, stamp: u64) -> Option<Page> {
        let known = self.between.iter().rev().find(|(at, _)| *at <= stamp);
        known.map_or_else(|| self.old.clone(), |(_, image)| image.clone())
    }
}

/// Each sector in doubt becomes old, new, one of the images between, torn (the head of a newer image
/// before the tail of an older one), zeros or garbage.
fn mix(undo: &Undo, new: Option<&Page>, rng: &mut Rng) -> Option<Page> {
    const HOLE: &[u8; PAGE_LEN] = &[0; PAGE_LEN];
    let images: Vec<Option<&Page>> = [undo.old.as_ref()]
        .into_iter()
        .chain(undo.between.iter().map(|(_, image)| image.as_ref()))
        .chain([new])
        .collect();
    let bytes = |i: usize, at: &Range<usize>| &images[i].map_or(HOLE, |page| &**page)[at.clone()];
    let last = images.len() - 1;
    let (mut out, mut used) = (new.map_or(*HOLE, |page| **page), vec![false; images.len()]);
    for sector in (0..8).filter(|s| undo.sectors & 1 << s != 0) {
        let at = sector * SECTOR_LEN..(sector + 1) * SECTOR_LEN;
        let older = rng.below(last as u64) as usize;
        match rng.below(16) {
            0..=4 => used[last] = true,
            5..=8 => {
                out[at.clone()].copy_from_slice(bytes(0, &at));
                used[0] = true;
            }
            9 | 10 => {
                out[at.clone()].copy_from_slice(bytes(older, &at));
                used[older] = true;
            }
            11..=13 => {
                let newer = older + 1 + rng.below((last - older) as u64) as usize;
                let head = 1 + rng.below(SECTOR_LEN as u64 - 1) as usize;
                let (front, back) = (bytes(newer, &at), bytes(older, &at));
                let torn = [&front[..head], &back[head..]].concat();
                out[at].copy_from_slice(&torn);
                (used[older], used[newer]) = (true, true);
            }
            14 if new.is_some() => {
                rng.fill(&mut out[at]);
                used[last] = true;
            }
            _ => out[at].fill(0),
        }
    }
    // A page that no image with content gave anything to may as well be the hole it once was.
    let gave = images
        .iter()
        .zip(&used)
        .any(|(image, used)| *used && image.is_some());
    let never_a_hole = images.iter().all(Option::is_some);
    (gave || never_a_hole).then(|| Arc::new(out))
}
