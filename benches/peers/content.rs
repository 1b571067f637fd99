//! What sources hold, so that every byte that is read can be judged without another copy of it.
//!
//! A page of 4 KiB is a function of its number and of its *generation*: 0 is what a source holds at first,
//! others are what a benchmark writes over it. No two words of a page are alike, no two pages, no two generations
//! of a page; none is zero. A page that comes from another place, another time or nowhere is noticed.

use std::ops::{Deref, DerefMut};

pub const PAGE: u64 = 4096;
const WORDS: u64 = PAGE / 8;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Bytes that begin at a page, as O_DIRECT asks for.
pub struct Buffer {
    store: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    pub fn new(len: usize) -> Buffer {
        let store = vec![0; len + PAGE as usize];
        let start = store.as_ptr().align_offset(PAGE as usize);
        Buffer { store, start, len }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.store[self.start..self.start + self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.store[self.start..self.start + self.len]
    }
}

fn base(page: u64, generation: u64) -> u64 {
    let mut z = (page << 12 | generation).wrapping_add(STEP);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn word(base: u64, number: u64) -> [u8; 8] {
    // Odd, so that none is zero.
    (base.wrapping_add(number.wrapping_mul(STEP)) | 1).to_le_bytes()
}

/// Makes whole pages what they are in a generation. `offset` is where the first lies.
pub fn fill(pages: &mut [u8], offset: u64, generation: u64) {
    for (number, page) in pages.chunks_exact_mut(PAGE as usize).enumerate() {
        let base = base(offset / PAGE + number as u64, generation);
        for (at, bytes) in page.chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&word(base, at as u64));
        }
    }
}

/// The offset of the first wrong byte's word, all bytes looked at.
pub fn first_wrong(pages: &[u8], offset: u64, generation: u64) -> Option<u64> {
    for (number, page) in pages.chunks_exact(PAGE as usize).enumerate() {
        let place = offset + number as u64 * PAGE;
        let base = base(place / PAGE, generation);
        let wrong = |(at, bytes): &(usize, &[u8])| **bytes != word(base, *at as u64);
        if let Some((at, _)) = page.chunks_exact(8).enumerate().find(wrong) {
            return Some(place + at as u64 * 8);
        }
    }
    None
}

/// As [`first_wrong`], but looks at one word of each page: cheap enough to be done while a clock runs.
pub fn sampled_wrong(pages: &[u8], offset: u64, generation: u64) -> Option<u64> {
    for (number, page) in pages.chunks_exact(PAGE as usize).enumerate() {
        let place = offset + number as u64 * PAGE;
        let base = base(place / PAGE, generation);
        let at = (base >> 32) % WORDS;
        if page[at as usize * 8..][..8] != word(base, at) {
            return Some(place + at * 8);
        }
    }
    None
}

/// Offsets of all pieces of `step` bytes in `0..size`, mixed; the same for everybody with the same seed.
pub fn mixed(size: u64, step: u64, seed: u64) -> Vec<u64> {
    let mut offsets: Vec<u64> = (0..size / step).map(|i| i * step).collect();
    let mut chance = super::rig::Chance(seed);
    for i in (1..offsets.len()).rev() {
        offsets.swap(i, chance.below(i as u64 + 1) as usize);
    }
    offsets
}

/// The checkers see what they are there to see; run before anything is measured.
pub fn self_test() {
    let (mut pages, offset) = (Buffer::new(4 * PAGE as usize), 7 * PAGE);
    fill(&mut pages, offset, 3);
    assert!(pages.as_ptr().align_offset(PAGE as usize) == 0);
    assert_eq!(first_wrong(&pages, offset, 3), None);
    assert_eq!(sampled_wrong(&pages, offset, 3), None);
    for (offset, generation) in [(offset, 2), (offset + PAGE, 3)] {
        assert!(first_wrong(&pages, offset, generation).is_some());
        assert!(sampled_wrong(&pages, offset, generation).is_some());
    }
    pages[2 * PAGE as usize + 17] ^= 1;
    assert_eq!(first_wrong(&pages, offset, 3), Some(offset + 2 * PAGE + 16));
}
