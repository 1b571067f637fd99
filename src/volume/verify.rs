//! Preserved content against its checksums: the walk that the audit and the scrub share.
//!
//! It goes region by region through an extent map and reads every preserved grain that a snapshot
//! needs, or a share of them, in pieces of at most a mebibyte. What nobody needs is passed over: its
//! payload may have been given back. It reads and judges; it mends nothing.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::error::Result;
use crate::log::keys::Keys;
use crate::map::ExtentMap;
use crate::map::page::{Content, Page};
use crate::units::{Epoch, Grain, Place, REGION_GRAINS, VolumeId};
use crate::volume::audit::{Finding, Severity};
use crate::volume::catalog::Catalog;
use crate::volume::facts::SnapshotState;

/// Bytes that are read at a time.
const PIECE: u64 = 1 << 20;

/// How many of all grains are read, in hundredths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share(pub u32);

impl Share {
    /// None of them.
    pub const NONE: Share = Share(0);
    /// Each of them.
    pub const ALL: Share = Share(100);

    /// As `Share::takes`, for a grain of a layer.
    pub fn takes_grain(self, seed: u64, layer: u32, grain: u64) -> bool {
        let block = grain as u32;
        let segment = layer ^ (grain >> 32) as u32;
        self.takes(seed ^ 0x1a7e_0000_0000, Place { segment, block })
    }

    /// Whether a grain is among those that are read; evenly spread, another choice for each seed.
    fn takes(self, seed: u64, place: Place) -> bool {
        let mut z = seed ^ (u64::from(place.segment) << 32) ^ u64::from(place.block);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % 100 < u64::from(self.0)
    }
}

/// What of a volume needs preserved content.
#[derive(Debug, Clone)]
pub struct Points {
    pub grain: Grain,
    /// Epochs, ascending.
    pub live: Vec<u64>,
    /// What is read through each: (what, name).
    pub names: BTreeMap<u64, Vec<(&'static str, String)>>,
}

/// The points of every volume, from a catalogue.
pub fn points_of(catalog: &Catalog) -> BTreeMap<u32, Points> {
    let mut all = BTreeMap::new();
    for (&id, volume) in &catalog.volumes {
        let mut names: BTreeMap<u64, Vec<(&'static str, String)>> = BTreeMap::new();
        for (&epoch, snap) in &volume.snapshots {
            if snap.state == SnapshotState::Active {
                let name = format!("{}@{}", volume.name, snap.name);
                names.entry(epoch).or_default().push(("snapshot", name));
            }
        }
        for (&epoch, snap) in &volume.kept {
            if snap.state == SnapshotState::Active {
                names.entry(epoch).or_default();
            }
        }
        for clone in catalog.clones.values().filter(|c| c.volume == id) {
            let bottom = catalog.bottom(clone.top);
            if let Some(list) = bottom.and_then(|epoch| names.get_mut(&epoch)) {
                list.push(("clone", format!("{}/{}", volume.name, clone.name)));
            }
        }
        let points = Points {
            grain: volume.grain,
            live: names.keys().copied().collect(),
            names,
        };
        all.insert(id, points);
    }
    all
}

/// The epochs that need what was preserved at `epoch`, if the grain had been preserved before at
/// `before`. `live` is sorted.
pub fn needing(live: &[u64], before: Option<u64>, epoch: u64) -> impl Iterator<Item = u64> + '_ {
    let upto = live.partition_point(|&live| live <= epoch);
    let from = before.map_or(0, |before| live.partition_point(|&live| live <= before));
    live[from.min(upto)..upto].iter().copied()
}

/// A preserved grain that cannot be read, or is not what it was.
#[derive(Debug, Clone)]
pub struct Bad {
    pub volume: u32,
    pub epoch: u64,
    /// The epoch in which the grain had been preserved before.
    pub before: Option<u64>,
    pub grain: u64,
    pub place: Place,
    pub sum: u64,
    /// Why, in a line.
    pub why: String,
    /// Other records of the same grain with the same checksum.
    pub twins: Vec<Place>,
}

/// What a walk did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Grains that were read.
    pub read: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// Grains that some snapshot needs.
    pub needed: u64,
}

/// Reads payload at a place.
pub type Read<'a> = dyn Fn(Place, &mut [u8]) -> Result<()> + 'a;

/// See the head of the file.
pub struct Walk<'a> {
    pub map: &'a ExtentMap,
    pub volumes: &'a BTreeMap<u32, Points>,
    pub keys: &'a Keys,
    pub read: &'a Read<'a>,
    pub share: Share,
    pub seed: u64,
}

/// A record of a region, with what it is judged by.
struct Piece {
    epoch: u64,
    grain: u64,
    before: Option<u64>,
    place: Place,
    sum: u64,
}

impl Walk<'_> {
    /// Goes through all regions.
    ///
    /// # Errors
    /// Those of the map, and what `found` returns.
    pub fn run(
        &self,
        from: Option<(VolumeId, u64)>,
        found: &mut dyn FnMut(&Rot) -> Result<()>,
    ) -> Result<Counts> {
        let mut at = from.unwrap_or((VolumeId(0), 0));
        let mut all = Counts::default();
        if self.share == Share::NONE {
            return Ok(all);
        }
        while let Some(found_at) = self.map.region_from(at.0, at.1)? {
            let (volume, region) = (found_at.volume, found_at.region);
            let (counts, bad) = self.region(volume, region, &found_at.pages, &mut |_| Ok(()))?;
            all.read += counts.read;
            all.bytes += counts.bytes;
            all.needed += counts.needed;
            if !bad.is_empty() {
                found(&Rot::of(self.volumes, &bad))?;
            }
            at = (volume, region + 1);
        }
        Ok(all)
    }

    /// Reads what is needed of one region; `pace` is told the bytes after each piece.
    ///
    /// # Errors
    /// What `pace` returns.
    pub fn region(
        &self,
        volume: VolumeId,
        region: u64,
        pages: &[(Epoch, Page)],
        pace: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<(Counts, Vec<Bad>)> {
        let mut counts = Counts::default();
        let mut bad = Vec::new();
        let Some(points) = self.volumes.get(&volume.0) else {
            return Ok((counts, bad));
        };
        let pieces = self.pieces(points, region, pages, &mut counts);
        let mut run: Vec<&Piece> = Vec::new();
        let grain = points.grain.bytes();
        for piece in &pieces {
            let follows = run.last().is_some_and(|last| {
                last.place.segment == piece.place.segment
                    && last.place.advance(points.grain.blocks()) == piece.place
            });
            if !run.is_empty() && (!follows || (run.len() as u64 + 1) * grain > PIECE.max(grain)) {
                self.read_run(volume, points, &run, &mut bad);
                pace(run.len() as u64 * grain)?;
                run.clear();
            }
            run.push(piece);
        }
        if !run.is_empty() {
            self.read_run(volume, points, &run, &mut bad);
            pace(run.len() as u64 * grain)?;
        }
        counts.read = pieces.len() as u64;
        counts.bytes = counts.read * grain;
        for found in &mut bad {
            let twins = pieces
                .iter()
                .filter(|p| p.grain == found.grain && p.sum == found.sum && p.place != found.place);
            found.twins = twins.map(|p| p.place).collect();
        }
        Ok((counts, bad))
    }

    fn pieces(
        &self,
        points: &Points,
        region: u64,
        pages: &[(Epoch, Page)],
        counts: &mut Counts,
    ) -> Vec<Piece> {
        let first = region * REGION_GRAINS;
        let mut last: Vec<Option<u64>> = vec![None; REGION_GRAINS as usize];
        let mut pieces = Vec::new();
        for (epoch, page) in pages {
            for extent in page.extents() {
                let sums = page.sums(extent);
                for (i, grain) in extent.range().enumerate() {
                    let before = last[grain].replace(epoch.0);
                    let Content::Data { place, .. } = extent.content else {
                        continue;
                    };
                    if needing(&points.live, before, epoch.0).next().is_none() {
                        continue;
                    }
                    counts.needed += 1;
                    let place = place.advance(i as u64 * points.grain.blocks());
                    if self.share.takes(self.seed, place) {
                        pieces.push(Piece {
                            epoch: epoch.0,
                            grain: first + grain as u64,
                            before,
                            place,
                            sum: sums[i],
                        });
                    }
                }
            }
        }
        pieces
    }

    fn read_run(&self, volume: VolumeId, points: &Points, run: &[&Piece], bad: &mut Vec<Bad>) {
        let grain = points.grain.bytes() as usize;
        let mut bytes = vec![0; run.len() * grain];
        let whole = (self.read)(run[0].place, &mut bytes);
        for (i, piece) in run.iter().enumerate() {
            let content = &mut bytes[i * grain..(i + 1) * grain];
            // One bad sector does not condemn its neighbours.
            let read = match &whole {
                Ok(()) => Ok(()),
                Err(_) => (self.read)(piece.place, content),
            };
            let why = match read {
                Ok(()) if self.keys.payload(content) == piece.sum => continue,
                Ok(()) => "it does not match its checksum".to_owned(),
                Err(e) => e.chain(),
            };
            bad.push(Bad {
                volume: volume.0,
                epoch: piece.epoch,
                before: piece.before,
                grain: piece.grain,
                place: piece.place,
                sum: piece.sum,
                why,
                twins: Vec::new(),
            });
        }
    }
}

/// Damaged bytes by whoever reads them.
#[derive(Debug, Clone, Default)]
pub struct Rot(BTreeMap<Who, (String, Vec<Range<u64>>)>);

/// What it is and its name.
type Who = (&'static str, String);

impl Rot {
    /// What some bad grains mean.
    pub fn of(volumes: &BTreeMap<u32, Points>, bad: &[Bad]) -> Rot {
        let mut rot = Rot::default();
        for bad in bad {
            let Some(points) = volumes.get(&bad.volume) else {
                continue;
            };
            for epoch in needing(&points.live, bad.before, bad.epoch) {
                for who in points.names.get(&epoch).into_iter().flatten() {
                    let bytes = points.grain.span(bad.grain..bad.grain + 1);
                    rot.add(who.clone(), &bad.why, bytes);
                }
            }
        }
        rot
    }

    fn add(&mut self, who: Who, why: &str, bytes: Range<u64>) {
        let entry = self.0.entry(who);
        let (_, ranges) = entry.or_insert_with(|| (why.to_owned(), Vec::new()));
        match ranges.last_mut() {
            Some(last) if last.end == bytes.start => last.end = bytes.end,
            // Known in two ways.
            Some(last) if last.start <= bytes.start && bytes.end <= last.end => {}
            _ => ranges.push(bytes),
        }
    }

    /// Takes in what another one says.
    pub fn merge(&mut self, other: &Rot) {
        for (who, (why, ranges)) in &other.0 {
            for range in ranges {
                self.add(who.clone(), why, range.clone());
            }
        }
    }

    /// Whether nobody is concerned.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// As findings.
    pub fn findings(self) -> impl Iterator<Item = Finding> {
        self.0.into_iter().map(|((what, name), (why, ranges))| {
            Finding::new(Severity::Damage, "payload", what, &name, "damaged")
                .because(format!("preserved content cannot be read: {why}"))
                .at(ranges)
                .advise(
                    "'stillframe check --repair --read-data' or 'stillframe scrub' mends what has a good copy; \
                     else delete it",
                )
        })
    }
}

impl std::fmt::Display for Rot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, ((what, name), _)) in self.0.iter().enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            write!(f, "{comma}{what} {name}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_serves_the_points_between_it_and_the_one_before() {
        let live = [2, 4, 6];
        let of = |before, epoch| needing(&live, before, epoch).collect::<Vec<_>>();
        assert_eq!(of(None, 1), Vec::<u64>::new());
        assert_eq!(of(None, 4), [2, 4]);
        assert_eq!(of(Some(2), 5), [4]);
        assert_eq!(of(Some(4), 5), Vec::<u64>::new());
        assert_eq!(of(Some(5), 9), [6]);
    }

    #[test]
    fn a_share_is_about_what_it_says() {
        let taken = |share: u32, seed| {
            let places = (0..10_000).map(|block| Place { segment: 3, block });
            let taken = places.filter(|&p| Share(share).takes(seed, p));
            taken.map(|p| p.block).collect::<Vec<_>>()
        };
        assert_eq!((taken(0, 1).len(), taken(100, 1).len()), (0, 10_000));
        assert!((2_200..2_800).contains(&taken(25, 1).len()));
        assert_ne!(taken(25, 1), taken(25, 2));
    }
}
