//! A page: what one epoch preserved of one region, as sorted extents.
//!
//! **P1** Extents are sorted, do not overlap and lie in the region. **P2** A data extent's payload is
//! contiguous in one segment: its grain i lies at `place.advance(i * grain_blocks)`, and has checksum
//! i. **P3** In the canonical form (every encoded and decoded page) neighbours that could be one are
//! one, and checksums stand in the order of the extents. The first record for a grain stays (M1).
//!
//! Value (little-endian), under 96 KiB also with 4096 extents of one grain (80 KiB):
//!
//! ```text
//!  0  u8   version = 1            16  u64  checksum over key and value with this field zero
//!  1  u8   zero                   24  extents, 12 bytes each:
//!  2  u16  blocks of a grain          u16 start, u16 count | 0x8000 if zero,
//!  4  u16  number of extents          u32 segment, u32 block (0 if zero)
//!  6  u16  zero                    -  u64 checksum of each grain of each data extent
//!  8  u64  LSN of the checkpoint that wrote it
//! ```
//!
//! The checksum (first eight bytes of BLAKE3, no key: nobody else writes here, it guards against
//! rot and against a value under a wrong key) covers the key. Keys are big-endian so that one forward
//! scan finds who preserved a region at or after an epoch.

use std::ops::Range;

use crate::error::{Error, Kind, Result};
use crate::map::keys::{PageKey, checksum};
use crate::map::mask::RegionMask;
use crate::units::{BLOCK, GRAIN_MAX, Lsn, Place, REGION_GRAINS};

const REGION: usize = REGION_GRAINS as usize;
const VERSION: u8 = 1;
const HEADER: usize = 24;
const CHECKSUM_AT: usize = 16;
const EXTENT: usize = 12;
const ZERO_FLAG: u16 = 0x8000;

const _: () = assert!(HEADER + REGION * (EXTENT + 8) <= crate::map::index::VALUE_MAX);
const _: () = assert!(REGION < ZERO_FLAG as usize);

/// How an extent was preserved; a data extent's checksums start at `sums_at` in its page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// As zero; the record stands in this segment.
    Zero {
        /// Segment that holds the record.
        segment: u32,
    },
    /// With payload.
    Data {
        /// Of the first grain.
        place: Place,
        /// Index of the first grain's checksum.
        sums_at: u32,
    },
}

/// A run of grains preserved alike, relative to its region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First grain.
    pub start: u16,
    /// Grains, at least one.
    pub count: u16,
    /// How.
    pub content: Content,
}

impl Extent {
    /// The grains, relative to the region.
    pub fn range(&self) -> Range<usize> {
        usize::from(self.start)..usize::from(self.start) + usize::from(self.count)
    }

    /// The part of the extent inside a range that it overlaps.
    #[must_use]
    pub fn cut(&self, to: Range<usize>, grain_blocks: u32) -> Extent {
        let own = self.range();
        let (start, end) = (own.start.max(to.start), own.end.min(to.end));
        let skip = start - own.start;
        let content = match self.content {
            Content::Zero { segment } => Content::Zero { segment },
            Content::Data { place, sums_at } => Content::Data {
                place: place.advance(skip as u64 * u64::from(grain_blocks)),
                sums_at: sums_at + skip as u32,
            },
        };
        Extent {
            start: start as u16,
            count: (end - start) as u16,
            content,
        }
    }

    /// Says where the checksums of the first grain are now; nothing for zero.
    pub fn move_sums(&mut self, to: usize) {
        if let Content::Data { sums_at, .. } = &mut self.content {
            *sums_at = u32::try_from(to).expect("a region has few checksums");
        }
    }

    /// Whether `next` only continues `self`.
    fn joins(&self, next: &Extent, grain_blocks: u32) -> bool {
        self.range().end == usize::from(next.start)
            && match (self.content, next.content) {
                (Content::Zero { segment: a }, Content::Zero { segment: b }) => a == b,
                (
                    Content::Data {
                        place: a,
                        sums_at: sums_a,
                    },
                    Content::Data {
                        place: b,
                        sums_at: sums_b,
                    },
                ) => {
                    let blocks = u64::from(self.count) * u64::from(grain_blocks);
                    a.segment == b.segment
                        && u64::from(a.block) + blocks == u64::from(b.block)
                        && sums_a + u32::from(self.count) == sums_b
                }
                _ => false,
            }
    }
}

/// What is to be inserted into a page.
#[derive(Debug, Clone, Copy)]
pub enum New<'a> {
    /// Preserved as zero by a record in this segment.
    Zero(u32),
    /// Preserved at a place, one checksum a grain.
    Data(Place, &'a [u64]),
}

/// What one epoch preserved of one region. Equality is meant for canonical pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Log blocks of a grain, 1 to 256.
    grain_blocks: u32,
    /// The checkpoint that last wrote it; 0 for one that was never written.
    pub lsn: Lsn,
    extents: Vec<Extent>,
    sums: Vec<u64>,
}

impl Page {
    /// An empty page.
    pub fn new(grain_blocks: u32) -> Page {
        Page {
            grain_blocks,
            lsn: Lsn(0),
            extents: Vec::new(),
            sums: Vec::new(),
        }
    }

    /// Log blocks of a grain.
    pub fn grain_blocks(&self) -> u32 {
        self.grain_blocks
    }

    /// Whether it preserves nothing.
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// The extents, sorted.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// The extents that touch a range of the region.
    pub fn touching(&self, range: Range<usize>) -> impl Iterator<Item = &Extent> + '_ {
        touching(&self.extents, range)
    }

    /// The checksums of a data extent of this page; empty for zero.
    pub fn sums(&self, extent: &Extent) -> &[u64] {
        match extent.content {
            Content::Zero { .. } => &[],
            Content::Data { sums_at, .. } => {
                &self.sums[sums_at as usize..sums_at as usize + usize::from(extent.count)]
            }
        }
    }

    /// All checksums; an extent's `sums_at` says where its are.
    pub fn all_sums(&self) -> &[u64] {
        &self.sums
    }

    /// Bytes of memory, about.
    pub fn memory(&self) -> usize {
        const PAGE: usize = 160;
        PAGE + self.extents.len() * size_of::<Extent>() + self.sums.len() * 8
    }

    /// Adds what is preserved of a range to a mask.
    pub fn mark(&self, mask: &mut RegionMask) {
        for extent in &self.extents {
            mask.set(extent.range());
        }
    }

    /// Adds a record; grains that the page has already keep what they have (M1).
    pub fn insert(&mut self, range: Range<usize>, new: New<'_>) {
        let mut gaps = Vec::new();
        let mut at = range.start;
        for extent in touching(&self.extents, range.clone()) {
            let own = extent.range();
            if at < own.start {
                gaps.push(at..own.start);
            }
            at = own.end;
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        for gap in gaps {
            self.insert_gap(gap.clone(), new, gap.start - range.start);
        }
    }

    fn insert_gap(&mut self, gap: Range<usize>, new: New<'_>, skip: usize) {
        let content = match new {
            New::Zero(segment) => Content::Zero { segment },
            New::Data(place, sums) => {
                let sums_at = self.sums.len() as u32;
                self.sums.extend_from_slice(&sums[skip..skip + gap.len()]);
                let place = place.advance(skip as u64 * u64::from(self.grain_blocks));
                Content::Data { place, sums_at }
            }
        };
        let mut extent = Extent {
            start: gap.start as u16,
            count: gap.len() as u16,
            content,
        };
        let mut at = self
            .extents
            .partition_point(|e| usize::from(e.start) < gap.start);
        if at > 0 && self.extents[at - 1].joins(&extent, self.grain_blocks) {
            at -= 1;
            let before = self.extents.remove(at);
            extent = Extent {
                count: before.count + extent.count,
                ..before
            };
        }
        if self
            .extents
            .get(at)
            .is_some_and(|next| extent.joins(next, self.grain_blocks))
        {
            extent.count += self.extents.remove(at).count;
        }
        self.extents.insert(at, extent);
    }

    /// Adds all of a later page of the same key; what is here stays (M1).
    pub fn merge(&mut self, later: &Page) {
        for extent in &later.extents {
            let new = match extent.content {
                Content::Zero { segment } => New::Zero(segment),
                Content::Data { place, .. } => New::Data(place, later.sums(extent)),
            };
            self.insert(extent.range(), new);
        }
    }

    /// Takes grains out, and says which payload (place, log blocks) they had. Returns how many data
    /// and zero grains went.
    pub fn remove(&mut self, dead: &RegionMask, freed: &mut Vec<(Place, u64)>) -> (u64, u64) {
        let (mut data, mut zero) = (0, 0);
        let mut kept = Vec::with_capacity(self.extents.len());
        for extent in &self.extents {
            for (run, gone) in dead.runs(extent.range()) {
                let part = extent.cut(run, self.grain_blocks);
                let grains = u64::from(part.count);
                match part.content {
                    _ if !gone => kept.push(part),
                    Content::Zero { .. } => zero += grains,
                    Content::Data { place, .. } => {
                        data += grains;
                        freed.push((place, grains * u64::from(self.grain_blocks)));
                    }
                }
            }
        }
        self.extents = kept;
        (data, zero)
    }

    /// The same content in canonical form (P3).
    #[must_use]
    pub fn canonical(&self) -> Page {
        let mut page = Page {
            lsn: self.lsn,
            ..Page::new(self.grain_blocks)
        };
        page.extents.reserve(self.extents.len());
        for extent in &self.extents {
            let mut extent = *extent;
            let sums = self.sums(&extent);
            extent.move_sums(page.sums.len());
            page.sums.extend_from_slice(sums);
            match page.extents.last_mut() {
                Some(last) if last.joins(&extent, self.grain_blocks) => last.count += extent.count,
                _ => page.extents.push(extent),
            }
        }
        page
    }

    /// The value of the page; `None` if it is empty and the key has to go.
    pub fn encode(&self, key: PageKey) -> Option<Vec<u8>> {
        if self.is_empty() {
            return None;
        }
        let page = self.canonical();
        let mut out =
            Vec::with_capacity(HEADER + page.extents.len() * EXTENT + page.sums.len() * 8);
        out.extend_from_slice(&[VERSION, 0]);
        out.extend_from_slice(&(page.grain_blocks as u16).to_le_bytes());
        out.extend_from_slice(&(page.extents.len() as u16).to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&page.lsn.0.to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        for extent in &page.extents {
            let (flag, segment, block) = match extent.content {
                Content::Zero { segment } => (ZERO_FLAG, segment, 0),
                Content::Data { place, .. } => (0, place.segment, place.block),
            };
            out.extend_from_slice(&extent.start.to_le_bytes());
            out.extend_from_slice(&(extent.count | flag).to_le_bytes());
            out.extend_from_slice(&segment.to_le_bytes());
            out.extend_from_slice(&block.to_le_bytes());
        }
        for sum in &page.sums {
            out.extend_from_slice(&sum.to_le_bytes());
        }
        let sum = checksum(&key.encode(), &out);
        out[CHECKSUM_AT..HEADER].copy_from_slice(&sum.to_le_bytes());
        Some(out)
    }

    /// Reads a page.
    ///
    /// # Errors
    /// `Damaged`: checksum, version, or anything an encoder does not write.
    pub fn decode(key: PageKey, value: &[u8]) -> Result<Page> {
        decode(key, value).map_err(|why| {
            let PageKey {
                volume,
                region,
                epoch,
            } = key;
            let at = format!("volume {} region {region} epoch {}", volume.0, epoch.0);
            Error::new(
                Kind::Damaged,
                format!("page of the extent map ({at}): {why}"),
            )
        })
    }
}

/// The extents, sorted, that touch a range.
pub fn touching(extents: &[Extent], range: Range<usize>) -> impl Iterator<Item = &Extent> + '_ {
    let from = extents.partition_point(|e| e.range().end <= range.start);
    extents[from..]
        .iter()
        .take_while(move |e| usize::from(e.start) < range.end)
}

fn decode(key: PageKey, value: &[u8]) -> std::result::Result<Page, &'static str> {
    if value.len() < HEADER {
        return Err("too short");
    }
    let u16_at = |at: usize| u16::from_le_bytes([value[at], value[at + 1]]);
    let u32_at = |at: usize| u32::from_le_bytes(value[at..at + 4].try_into().expect("four bytes"));
    let u64_at = |at: usize| u64::from_le_bytes(value[at..at + 8].try_into().expect("eight bytes"));
    let mut plain = value.to_vec();
    plain[CHECKSUM_AT..HEADER].fill(0);
    if checksum(&key.encode(), &plain) != u64_at(CHECKSUM_AT) {
        return Err("checksum mismatch");
    }
    if value[0] != VERSION || value[1] != 0 || u16_at(6) != 0 {
        return Err("unknown version");
    }
    let grain_blocks = u32::from(u16_at(2));
    if !grain_blocks.is_power_of_two() || grain_blocks > GRAIN_MAX / BLOCK as u32 {
        return Err("bad grain size");
    }
    let count = usize::from(u16_at(4));
    let sums_from = HEADER + count * EXTENT;
    if count == 0 || count > REGION || value.len() < sums_from {
        return Err("bad number of extents");
    }
    let mut page = Page {
        lsn: Lsn(u64_at(8)),
        ..Page::new(grain_blocks)
    };
    let mut upto = 0;
    let mut sums = 0;
    for at in (HEADER..sums_from).step_by(EXTENT) {
        let (start, raw) = (u16_at(at), u16_at(at + 2));
        let place = Place {
            segment: u32_at(at + 4),
            block: u32_at(at + 8),
        };
        let count = raw & !ZERO_FLAG;
        let content = if raw & ZERO_FLAG != 0 {
            Content::Zero {
                segment: place.segment,
            }
        } else {
            Content::Data {
                place,
                sums_at: sums,
            }
        };
        let extent = Extent {
            start,
            count,
            content,
        };
        if count == 0 || usize::from(start) < upto || extent.range().end > REGION {
            return Err("extents out of order or out of range");
        }
        upto = extent.range().end;
        match content {
            Content::Zero { .. } if place.block != 0 => return Err("a zero extent with a place"),
            Content::Zero { .. } => {}
            Content::Data { .. } => {
                sums += u32::from(count);
                let blocks = u64::from(count) * u64::from(grain_blocks);
                if u64::from(place.block) + blocks > u64::from(u32::MAX) {
                    return Err("a place is out of range");
                }
            }
        }
        if page
            .extents
            .last()
            .is_some_and(|last| last.joins(&extent, grain_blocks))
        {
            return Err("extents that should be one");
        }
        page.extents.push(extent);
    }
    if value.len() != sums_from + sums as usize * 8 {
        return Err("wrong length");
    }
    page.sums = value[sums_from..]
        .chunks_exact(8)
        .map(|s| u64::from_le_bytes(s.try_into().expect("eight bytes")))
        .collect();
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::tests::Random;
    use crate::units::{Epoch, VolumeId};

    const KEY: PageKey = PageKey {
        volume: VolumeId(3),
        region: 5,
        epoch: Epoch(9),
    };

    fn random_page(random: &mut Random, records: u64) -> (Page, Vec<Option<(Place, u64)>>) {
        let blocks = 1 << random.below(9);
        let mut page = Page::new(blocks);
        let mut model = vec![None; REGION];
        for n in 0..records {
            let start = random.below(REGION_GRAINS) as usize;
            let end = REGION.min(start + 1 + random.below(50) as usize);
            let segment = 1 + random.below(3) as u32;
            let block = random.below(9000) as u32;
            let place = Place { segment, block };
            let zero = random.below(3) == 0;
            let sums: Vec<u64> = (start..end).map(|g| n << 16 | g as u64).collect();
            let new = if zero {
                New::Zero(segment)
            } else {
                New::Data(place, &sums)
            };
            page.insert(start..end, new);
            for (skip, slot) in (0..).zip(&mut model[start..end]) {
                let at = place.advance(skip * u64::from(blocks));
                let zero_at = (
                    Place {
                        segment,
                        block: u32::MAX,
                    },
                    0,
                );
                let kept = if zero {
                    zero_at
                } else {
                    (at, sums[skip as usize])
                };
                slot.get_or_insert(kept);
            }
        }
        (page, model)
    }

    fn explode(page: &Page) -> Vec<Option<(Place, u64)>> {
        let mut all = vec![None; REGION];
        let mut upto = 0;
        for extent in page.extents() {
            assert!(extent.count > 0 && extent.range().start >= upto);
            upto = extent.range().end;
            for (i, grain) in extent.range().enumerate() {
                all[grain] = Some(match extent.content {
                    Content::Zero { segment } => (
                        Place {
                            segment,
                            block: u32::MAX,
                        },
                        0,
                    ),
                    Content::Data { place, .. } => {
                        let blocks = i as u64 * u64::from(page.grain_blocks());
                        (place.advance(blocks), page.sums(extent)[i])
                    }
                });
            }
        }
        all
    }

    #[test]
    fn the_first_record_of_a_grain_stays_and_a_value_says_the_same() {
        let mut random = Random(1);
        for round in 0..200 {
            let (mut page, model) = random_page(&mut random, 1 + round);
            assert_eq!(explode(&page), model);
            page.lsn = Lsn(round);
            let read = Page::decode(KEY, &page.encode(KEY).unwrap()).unwrap();
            assert_eq!(read, page.canonical());
            assert_eq!(explode(&read), model);
        }
    }

    #[test]
    fn removing_leaves_the_rest_and_tells_every_block_that_went() {
        let mut random = Random(2);
        for round in 0..100 {
            let (mut page, mut model) = random_page(&mut random, 1 + round);
            let mut dead = RegionMask::new();
            for _ in 0..random.below(100) {
                let at = random.below(REGION_GRAINS) as usize;
                dead.set(at..REGION.min(at + random.below(200) as usize));
            }
            let mut freed = Vec::new();
            let (data, zero) = page.remove(&dead, &mut freed);
            let mut told = Vec::new();
            for (place, blocks) in freed {
                for i in (0..blocks).step_by(page.grain_blocks() as usize) {
                    told.push(place.advance(i));
                }
            }
            let mut gone = Vec::new();
            let mut zeros = 0;
            for (grain, kept) in model.iter_mut().enumerate() {
                if dead.has(grain) {
                    match kept.take() {
                        Some((place, _)) if place.block != u32::MAX => gone.push(place),
                        Some(_) => zeros += 1,
                        None => {}
                    }
                }
            }
            assert_eq!(explode(&page), model);
            assert_eq!((told, data, zero), (gone.clone(), gone.len() as u64, zeros));
        }
    }

    #[test]
    fn the_largest_page_fits() {
        let mut page = Page::new(1);
        for grain in 0..REGION {
            let place = Place {
                segment: 1,
                block: 1 + 2 * grain as u32,
            };
            page.insert(grain..grain + 1, New::Data(place, &[grain as u64]));
        }
        let value = page.encode(KEY).unwrap();
        assert_eq!(value.len(), 24 + 4096 * 20);
        assert_eq!(Page::decode(KEY, &value).unwrap(), page);
    }

    /// Goal: a page that was written in order is one extent, so that 100 GiB need little.
    #[test]
    fn neighbours_become_one() {
        let mut page = Page::new(4);
        for grain in 0..100_u32 {
            let place = Place {
                segment: 1,
                block: 8 + 4 * grain,
            };
            page.insert(grain as usize..grain as usize + 1, New::Data(place, &[1]));
            page.insert(200 + grain as usize..201 + grain as usize, New::Zero(1));
        }
        assert_eq!(page.extents().len(), 2);
        page.insert(300..301, New::Zero(2));
        assert_eq!(
            page.extents().len(),
            3,
            "another segment, which must not be forgotten"
        );
    }

    #[test]
    fn golden_bytes() {
        let mut page = Page::new(2);
        page.lsn = Lsn(0x0102_0304);
        page.insert(
            1..3,
            New::Data(
                Place {
                    segment: 7,
                    block: 16,
                },
                &[0xaa, 0xbb],
            ),
        );
        page.insert(10..14, New::Zero(8));
        let value = page.encode(KEY).unwrap();
        let hex: String = value.iter().map(|b| format!("{b:02x}")).collect();
        let head = "01000200020000000403020100000000";
        let body = "010002000700000010000000\
                    0a0004800800000000000000\
                    aa00000000000000bb00000000000000";
        assert_eq!(&hex[..32], head);
        assert_eq!(&hex[48..], body);
        assert_eq!(&hex[32..48], "08b79917e7f622bc");
        let key: String = KEY.encode().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            key,
            "50000000030000000000000005".to_owned() + "0000000000000009"
        );
    }

    #[test]
    fn damage_is_noticed_and_never_a_panic() {
        let mut random = Random(3);
        for round in 0..60 {
            let (page, _) = random_page(&mut random, 1 + round);
            let value = page.encode(KEY).unwrap();
            let other = PageKey { region: 6, ..KEY };
            assert!(
                Page::decode(other, &value).is_err(),
                "a value under a wrong key"
            );
            for _ in 0..40 {
                let mut bad = value.clone();
                match random.below(4) {
                    0 => bad.truncate(random.below(value.len() as u64) as usize),
                    1 => bad.push(0),
                    _ => {
                        let at = random.below(value.len() as u64) as usize;
                        bad[at] ^= 1 << random.below(8);
                    }
                }
                assert_eq!(Page::decode(KEY, &bad).unwrap_err().kind(), Kind::Damaged);
                // With a checksum that fits, the bounds alone have to hold.
                if bad.len() >= HEADER {
                    bad[CHECKSUM_AT..HEADER].fill(0);
                    let sum = checksum(&KEY.encode(), &bad);
                    bad[CHECKSUM_AT..HEADER].copy_from_slice(&sum.to_le_bytes());
                    if let Ok(read) = Page::decode(KEY, &bad) {
                        explode(&read);
                        assert_eq!(read.encode(KEY).unwrap(), bad);
                    }
                }
            }
        }
    }
}
