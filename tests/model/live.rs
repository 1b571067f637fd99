//! Writing, discarding and flushing live volumes.

use std::collections::BTreeSet;

use stillframe::error::Result;
use stillframe::volume::Zeroing;

use crate::sim::{PAGE, pages, sectors};
use crate::{Run, UnderWay, trace};

impl Run {
    /// A range in one of a few hot places, so that grains are overwritten again and again; now and
    /// then anywhere, and at the very end.
    pub fn range(&mut self, size: u64) -> (u64, u64) {
        let base = match self.chance.below(20) {
            0 => self.chance.below(size),
            1 => size.saturating_sub(self.chance.below(20_000)),
            n => (n % 4) * self.shape.apart + self.chance.below(self.shape.spot),
        };
        let offset = match self.chance.below(3) {
            0 => base,
            1 => base / 512 * 512,
            _ => base / PAGE * PAGE,
        };
        let len = match self.chance.below(8) {
            0 => 1 + self.chance.below(600),
            1 => 1 + self.chance.below(self.shape.long),
            _ => PAGE * (1 + self.chance.below(4)),
        };
        (offset.min(size - 1), len.min(size - offset.min(size - 1)))
    }

    pub fn fill(&mut self, len: u64) -> Vec<u8> {
        let tag = self.chance.next().to_le_bytes();
        if self.chance.below(12) == 0 {
            return vec![0; len as usize];
        }
        tag.iter().copied().cycle().take(len as usize).collect()
    }

    pub fn write(&mut self, v: usize) -> Result<()> {
        let (offset, len) = self.range(self.volumes[v].live.size);
        let same = self.chance.below(10) == 0;
        let data = match same {
            true => self.volumes[v].live.content.read(offset, len as usize),
            false => self.fill(len),
        };
        let compare = self.chance.below(6) == 0;
        self.write_these(v, offset, &data, compare)
    }

    pub fn write_these(&mut self, v: usize, offset: u64, data: &[u8], compare: bool) -> Result<()> {
        let len = data.len() as u64;
        self.under_way = Some(UnderWay::Write(v, sectors(offset, len).collect()));
        trace(|| format!("write v{v} {offset}+{len} compare {compare}"));
        let done = self.volume(v).write_at(offset, data, compare);
        let model = &mut self.volumes[v];
        model.touch(offset, len);
        let differs = model.live.content.read(offset, len as usize) != *data;
        done?;
        // Not before: a refused write has changed nothing, or some prefix.
        model.changed |= differs;
        model.live.content.write(offset, data);
        self.under_way = None;
        self.count("write");
        Ok(())
    }

    pub fn zero(&mut self, v: usize, how: Zeroing) -> Result<()> {
        let (offset, len) = match self.chance.below(40) {
            0 => (0, self.volumes[v].live.size),
            _ => self.range(self.volumes[v].live.size),
        };
        self.zero_range(v, offset, len, how)
    }

    pub fn zero_range(&mut self, v: usize, offset: u64, len: u64, how: Zeroing) -> Result<()> {
        let model = &self.volumes[v];
        let parts = model.live.parts(offset, len);
        let had_data = !model.live.content.zero_in(offset..offset + len);
        let touched: BTreeSet<u64> = parts
            .iter()
            .flat_map(|&(start, end)| sectors(start, end - start))
            .collect();
        self.under_way = Some(UnderWay::Write(v, touched));
        trace(|| format!("zero v{v} {offset}+{len}"));
        let done = self.volume(v).zero(offset, len, how);
        let model = &mut self.volumes[v];
        // Where nothing was ever written there may be an intent all the same, and a page that is zeroed
        // may count as changed though it was a hole; but of a large image no holes other than those
        // behind data in the same piece of 1 MiB, which is zeroed at once.
        match len > crate::MIB {
            true => model.note_pages([]),
            false => model.note_pages(pages(offset, len)),
        }
        for &(start, end) in &parts {
            model.touch(start, end - start);
            let piece_end = end.next_multiple_of(crate::MIB).min(offset + len);
            model.note_pages(pages(start, piece_end - start));
        }
        model.touched = true;
        done?;
        model.changed |= had_data;
        for (start, end) in parts {
            let zeros = vec![0; (end - start) as usize];
            model.live.content.write(start, &zeros);
        }
        self.under_way = None;
        self.count(match how {
            Zeroing::Discard => "discard",
            Zeroing::Zero => "zero",
        });
        Ok(())
    }

    pub fn flush(&mut self, v: usize) -> Result<()> {
        trace(|| format!("flush v{v}"));
        self.volume(v).flush()?;
        self.volumes[v].live.unflushed.clear();
        self.count("flush");
        Ok(())
    }

    /// Sectors of the live volume that may hold anything are taken over as they are; all others must
    /// be what the model says.
    pub fn adopt_live(&mut self, v: usize, sectors: &BTreeSet<u64>) {
        let volume = self.volume(v);
        let seed = self.seed;
        let live = &mut self.volumes[v].live;
        crate::crash::adopt(live, sectors, &|at, buf| volume.read_at(at, buf), seed);
    }
}
