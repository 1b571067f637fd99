//! A diff as a file: a qcow2 overlay (version 3) over the raw image of the older point.
//!
//! Promises: the file is a function of the extent list, the two names' and uuids' header, and the
//! content of the newer image; every cluster of it is counted once, so `qemu-img check` finds
//! nothing; a reader of the overlay over the older image sees the newer one, whole. A cluster of
//! which a part changed carries the newer image's content for all of it, which is equal where
//! nothing changed. A cluster that is zero by the extent list takes no space.
//!
//! The file, in clusters of 64 KiB: header, refcount table, refcount blocks, L1 table, L2 tables
//! (only those that have an entry), data clusters in the order of the image. The virtual size is
//! the image's, rounded up to 512; what lies past the image's end is zero.
//!
//! Header extensions: the backing format (raw), and [`UUIDS`]: 16 bytes of the older and 16 of the
//! newer snapshot's uuid. Nothing is written or kept: tables are made when they are read, each
//! piece in O(log n).

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::image::diff::DiffExtent;
use crate::units::{SECTOR, Uuid};

/// Bytes of a cluster.
pub const CLUSTER: u64 = 1 << CLUSTER_BITS;
const CLUSTER_BITS: u32 = 16;
/// Type of the header extension with both uuids ("STLF"); 32 bytes of data.
pub const UUIDS: u32 = 0x5354_4c46;

const MAGIC: u32 = 0x5146_49fb;
const HEADER_LENGTH: u32 = 104;
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// The longest backing file name that readers accept.
const BACKING_MAX: usize = 1023;
/// Entries of 8 bytes in a cluster of a table.
const ENTRIES: u64 = CLUSTER / 8;
/// Refcounts of 2 bytes in a block.
const COUNTS: u64 = CLUSTER / 2;
/// Readers refuse L1 tables of more than 32 MiB.
const L1_MAX: u64 = (32 << 20) / 8;
/// The cluster is used once, so it may be written in place.
const COPIED: u64 = 1 << 63;
/// The cluster reads as zeros.
const ZERO: u64 = 1;

/// A run of clusters of the image that the overlay has, all of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    /// First cluster of the image.
    first: u64,
    count: u64,
    zero: bool,
    /// Data clusters in the runs before this one.
    before: u64,
}

/// Where everything of the file is; a function of the extent list and the size.
#[derive(Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of the image, as it is.
    image_size: u64,
    runs: Vec<Run>,
    /// The entries of L1 that have a table, ascending; their tables follow in this order.
    tables: Vec<u64>,
    l1_entries: u64,
    refcount_table: Range<u64>,
    refcount_blocks: Range<u64>,
    l1: Range<u64>,
    l2: Range<u64>,
    data: Range<u64>,
}

impl Layout {
    /// The layout for an image of `size` bytes and the sorted, disjoint extents that the overlay
    /// has, all inside it.
    ///
    /// # Errors
    /// `Limit` for an image of more than 2 PiB, which readers of the format refuse.
    pub fn new(size: u64, extents: &[DiffExtent]) -> Result<Layout> {
        let l1_entries = size.div_ceil(CLUSTER).div_ceil(ENTRIES).max(1);
        if l1_entries > L1_MAX {
            let why = "a diff as qcow2 is at most 2 PiB large; use the JSON";
            return Err(Error::new(Kind::Limit, why));
        }
        let runs = Runs::of(size, extents);
        let mut tables: Vec<u64> = Vec::new();
        for run in &runs {
            let from = run.first / ENTRIES;
            let from = tables.last().map_or(from, |last| from.max(last + 1));
            tables.extend(from..(run.first + run.count).div_ceil(ENTRIES));
        }
        let data = runs.last().map_or(0, data_end);
        let fixed = l1_entries.div_ceil(ENTRIES) + tables.len() as u64 + data;
        let (table, blocks) = refcount_clusters(1 + fixed);
        let mut end = 1;
        let mut next = |count: u64| {
            let start = end;
            end += count;
            start..end
        };
        Ok(Layout {
            image_size: size,
            refcount_table: next(table),
            refcount_blocks: next(blocks),
            l1: next(l1_entries.div_ceil(ENTRIES)),
            l2: next(tables.len() as u64),
            data: next(data),
            runs,
            tables,
            l1_entries,
        })
    }

    /// Bytes of the file.
    pub fn file_size(&self) -> u64 {
        self.data.end * CLUSTER
    }

    /// Bytes of the disk it describes.
    pub fn virtual_size(&self) -> u64 {
        self.image_size.next_multiple_of(SECTOR)
    }

    /// The entry of L1 with this number.
    fn l1_entry(&self, index: u64) -> u64 {
        match self.tables.binary_search(&index) {
            Ok(at) => COPIED | ((self.l2.start + at as u64) * CLUSTER),
            Err(_) => 0,
        }
    }

    /// The entry of L2 for this cluster of the image.
    fn l2_entry(&self, cluster: u64) -> u64 {
        let after = self.runs.partition_point(|run| run.first <= cluster);
        let Some(run) = after.checked_sub(1).map(|at| &self.runs[at]) else {
            return 0;
        };
        if cluster >= run.first + run.count {
            0
        } else if run.zero {
            ZERO
        } else {
            COPIED | ((self.data.start + run.before + (cluster - run.first)) * CLUSTER)
        }
    }

    /// The cluster of the image that this data cluster holds.
    fn guest(&self, data: u64) -> u64 {
        let after = self.runs.partition_point(|run| run.before <= data);
        // A zero run between two data runs stands before the second one, with the same count.
        let run = &self.runs[after - 1];
        run.first + (data - run.before)
    }

    /// Fills a table's cluster; `index` counts from the beginning of its part of the file.
    fn table(&self, cluster: u64, out: &mut [u8]) {
        let part = |range: &Range<u64>| {
            cluster
                .checked_sub(range.start)
                .filter(|_| cluster < range.end)
        };
        if let Some(index) = part(&self.refcount_table) {
            let blocks = self.refcount_blocks.end - self.refcount_blocks.start;
            entries(out, |i| {
                let block = index * ENTRIES + i;
                match block < blocks {
                    true => (self.refcount_blocks.start + block) * CLUSTER,
                    false => 0,
                }
            });
        } else if let Some(index) = part(&self.refcount_blocks) {
            for (i, count) in out.chunks_exact_mut(2).enumerate() {
                let used = index * COUNTS + (i as u64) < self.data.end;
                count.copy_from_slice(&u16::from(used).to_be_bytes());
            }
        } else if let Some(index) = part(&self.l1) {
            entries(out, |i| self.l1_entry(index * ENTRIES + i));
        } else if let Some(index) = part(&self.l2) {
            let first = self.tables[index as usize] * ENTRIES;
            entries(out, |i| self.l2_entry(first + i));
        }
    }
}

fn entries(out: &mut [u8], entry: impl Fn(u64) -> u64) {
    for (i, bytes) in out.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&entry(i as u64).to_be_bytes());
    }
}

/// Clusters of the refcount table and of the blocks for a file of `others` clusters besides them.
fn refcount_clusters(others: u64) -> (u64, u64) {
    let (mut table, mut blocks) = (1, 1);
    loop {
        let needed = (others + table + blocks).div_ceil(COUNTS);
        let wider = needed.div_ceil(ENTRIES);
        if (wider, needed) == (table, blocks) {
            return (table, blocks);
        }
        // Both only grow, and by less than what they make room for.
        (table, blocks) = (wider.max(table), needed.max(blocks));
    }
}

fn data_end(run: &Run) -> u64 {
    run.before + if run.zero { 0 } else { run.count }
}

/// Collects runs of clusters from extents.
struct Runs {
    size: u64,
    runs: Vec<Run>,
    /// A cluster of which parts were seen: its number, whether any held data, the zero bytes.
    open: Option<(u64, bool, u64)>,
}

impl Runs {
    fn of(size: u64, extents: &[DiffExtent]) -> Vec<Run> {
        let mut all = Runs {
            size,
            runs: Vec::new(),
            open: None,
        };
        for extent in extents {
            let end = extent.start + extent.length;
            let mut at = extent.start;
            while at < end {
                let cluster = at / CLUSTER;
                // The end of the image ends its last cluster.
                let full = match end == size {
                    true => end.div_ceil(CLUSTER),
                    false => end / CLUSTER,
                };
                if at % CLUSTER == 0 && full > cluster {
                    all.close();
                    all.push(cluster, full - cluster, extent.zero);
                    at = full * CLUSTER;
                } else {
                    let part = end.min((cluster + 1) * CLUSTER) - at;
                    all.part(cluster, part, extent.zero);
                    at += part;
                }
            }
        }
        all.close();
        all.runs
    }

    fn part(&mut self, cluster: u64, bytes: u64, zero: bool) {
        if self.open.is_some_and(|(open, ..)| open != cluster) {
            self.close();
        }
        let (_, data, zeros) = self.open.get_or_insert((cluster, false, 0));
        match zero {
            true => *zeros += bytes,
            false => *data = true,
        }
    }

    fn close(&mut self) {
        if let Some((cluster, data, zeros)) = self.open.take() {
            let start = cluster * CLUSTER;
            let bytes = (self.size - start).min(CLUSTER);
            self.push(cluster, 1, !data && zeros == bytes);
        }
    }

    fn push(&mut self, first: u64, count: u64, zero: bool) {
        let before = self.runs.last().map_or(0, data_end);
        match self.runs.last_mut() {
            Some(last) if last.zero == zero && last.first + last.count == first => {
                last.count += count;
            }
            _ => self.runs.push(Run {
                first,
                count,
                zero,
                before,
            }),
        }
    }
}

/// What the header says besides the layout.
#[derive(Debug, Clone)]
pub struct Ends {
    /// File name of the older image, as the overlay names it.
    pub backing: String,
    /// The older snapshot's uuid.
    pub from: Uuid,
    /// The newer snapshot's uuid.
    pub to: Uuid,
}

/// The overlay file, read-only.
pub struct Qcow2 {
    image: Arc<dyn Image>,
    layout: Arc<Layout>,
    header: Vec<u8>,
}

impl Qcow2 {
    /// The overlay of `image`, the newer point, whose layout is that of the diff.
    ///
    /// # Errors
    /// `Invalid` if the layout is of an image of another size; `Limit` for a backing name of more
    /// than 1,023 bytes.
    pub fn new(image: Arc<dyn Image>, layout: Arc<Layout>, ends: &Ends) -> Result<Qcow2> {
        if image.size() != layout.image_size {
            let why = "the layout is of an image of another size";
            return Err(Error::new(Kind::Invalid, why));
        }
        if ends.backing.len() > BACKING_MAX {
            return Err(Error::new(Kind::Limit, "the backing name is too long"));
        }
        Ok(Qcow2 {
            header: header(&layout, ends),
            image,
            layout,
        })
    }

    fn read_cluster(&self, cluster: u64, within: usize, out: &mut [u8]) -> Result<()> {
        let layout = &self.layout;
        if layout.data.contains(&cluster) {
            let start = layout.guest(cluster - layout.data.start) * CLUSTER + within as u64;
            let inside = layout.image_size.saturating_sub(start);
            let inside = usize::try_from(inside).unwrap_or(usize::MAX).min(out.len());
            out[inside..].fill(0);
            return match inside {
                0 => Ok(()),
                _ => self.image.read_at(start, &mut out[..inside]),
            };
        }
        let mut whole = vec![0; CLUSTER as usize];
        if cluster == 0 {
            whole[..self.header.len()].copy_from_slice(&self.header);
        } else {
            layout.table(cluster, &mut whole);
        }
        out.copy_from_slice(&whole[within..within + out.len()]);
        Ok(())
    }
}

impl Image for Qcow2 {
    fn size(&self) -> u64 {
        self.layout.file_size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.size()) {
            return Err(Error::new(Kind::Invalid, "a read past the end of a diff"));
        }
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let within = (at % CLUSTER) as usize;
            let len = (buf.len() - done).min(CLUSTER as usize - within);
            self.read_cluster(at / CLUSTER, within, &mut buf[done..done + len])?;
            done += len;
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        Ok((offset < self.size()).then_some(offset))
    }

    fn next_hole(&self, offset: u64) -> Result<u64> {
        Ok(self.size().max(offset))
    }
}

/// The header, its extensions and the backing name: the beginning of the first cluster.
fn header(layout: &Layout, ends: &Ends) -> Vec<u8> {
    let mut extensions = Vec::new();
    let mut extension = |kind: u32, data: &[u8]| {
        extensions.extend(kind.to_be_bytes());
        extensions.extend((data.len() as u32).to_be_bytes());
        extensions.extend(data);
        extensions.resize(extensions.len().next_multiple_of(8), 0);
    };
    extension(BACKING_FORMAT, b"raw");
    extension(UUIDS, &[ends.from.0, ends.to.0].concat());
    extension(0, b"");
    let backing_at = u64::from(HEADER_LENGTH) + extensions.len() as u64;
    let mut out = Vec::new();
    let put32 = |out: &mut Vec<u8>, value: u32| out.extend(value.to_be_bytes());
    let put64 = |out: &mut Vec<u8>, value: u64| out.extend(value.to_be_bytes());
    put32(&mut out, MAGIC);
    put32(&mut out, 3);
    put64(&mut out, backing_at);
    put32(&mut out, ends.backing.len() as u32);
    put32(&mut out, CLUSTER_BITS);
    put64(&mut out, layout.virtual_size());
    // Not encrypted.
    put32(&mut out, 0);
    put32(&mut out, layout.l1_entries as u32);
    put64(&mut out, layout.l1.start * CLUSTER);
    put64(&mut out, layout.refcount_table.start * CLUSTER);
    put32(
        &mut out,
        (layout.refcount_table.end - layout.refcount_table.start) as u32,
    );
    // No snapshots of its own, nowhere; no incompatible, compatible or autoclear features.
    put32(&mut out, 0);
    for _ in 0..4 {
        put64(&mut out, 0);
    }
    // Refcounts of 2^4 bits.
    put32(&mut out, 4);
    put32(&mut out, HEADER_LENGTH);
    out.extend(extensions);
    out.extend(ends.backing.as_bytes());
    out
}

#[cfg(test)]
mod tests;
