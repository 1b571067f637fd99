//! The extent map and its bitmaps against what the log alone gives.
//!
//! Records are compared one by one, linear in their number. The log may hold records that no snapshot
//! needs and that the map has swept; whatever a snapshot needs must be in both, and equal. What the map
//! has and the log has not is damage of the log if the segment is gone, else of the map.

use std::collections::BTreeMap;

use crate::error::{Kind, Result};
use crate::log::segment;
use crate::map::ExtentMap;
use crate::map::bitmaps::EpochSets;
use crate::map::keys::PageKey;
use crate::map::page::{Content, Page};
use crate::sys::disk::Dir;
use crate::units::{Epoch, Place, REGION_GRAINS, VolumeId};
use crate::volume::audit::view::View;
use crate::volume::audit::{
    Audit, COPY_ASIDE, Finding, Places, Severity, map_damaged, names_of, open_if_there,
};
use crate::volume::clone_records::{LAYER_BIT, layer_volume};
use crate::volume::facts::SnapshotState;
use crate::volume::verify::{Points, needing, points_of};

/// What a page says of one grain.
#[derive(Clone, Copy, PartialEq)]
enum Slot {
    Zero,
    Data(Place, u64),
}

/// What is wrong with a record of the map.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Wrong {
    Missing,
    Other,
    Unknown,
    SegmentGone(u32),
}

type Slots = Vec<Option<Slot>>;

fn slots(page: Option<&Page>) -> Slots {
    let mut slots = vec![None; REGION_GRAINS as usize];
    let Some(page) = page else {
        return slots;
    };
    for extent in page.extents() {
        let sums = page.sums(extent);
        for (i, grain) in extent.range().enumerate() {
            slots[grain] = Some(match extent.content {
                Content::Zero { .. } => Slot::Zero,
                Content::Data { place, .. } => {
                    let blocks = i as u64 * u64::from(page.grain_blocks());
                    Slot::Data(place.advance(blocks), sums[i])
                }
            });
        }
    }
    slots
}

/// Walks one map by pages with what the other one has at the same key.
struct Compare<'a> {
    view: &'a View,
    points: BTreeMap<u32, Points>,
    log: &'a dyn Dir,
    present: BTreeMap<u32, bool>,
    region: Option<(VolumeId, u64)>,
    last: Vec<Option<u64>>,
    wrong: BTreeMap<Wrong, Places>,
    records: BTreeMap<Wrong, u64>,
}

/// Compares every record.
///
/// # Errors
/// The system's; damage of the map is a finding.
pub fn pages(view: &View, actual: &ExtentMap, log: &dyn Dir, audit: &mut Audit) -> Result<()> {
    let mut compare = Compare {
        view,
        points: points_of(&view.catalog),
        log,
        present: BTreeMap::new(),
        region: None,
        last: vec![None; REGION_GRAINS as usize],
        wrong: BTreeMap::new(),
        records: BTreeMap::new(),
    };
    let mut failed = None;
    let walked = view.map.for_each_page(&mut |key, page| {
        let other = match actual.page_at(key) {
            Ok(other) => other,
            Err(e) => {
                failed = Some(e);
                return Err(crate::error::Error::new(Kind::Failed, "stopped"));
            }
        };
        compare.page(key, &slots(Some(page)), &slots(other.as_ref()), true)
    });
    match failed {
        // Whatever it says then, it is not to be relied on.
        Some(e) if e.kind() == Kind::Damaged => {
            map_damaged(&e.chain(), audit);
            return Ok(());
        }
        Some(e) => return Err(e),
        None => walked?,
    }
    compare.region = None;
    let walked = actual.for_each_page(&mut |key, page| {
        let other = view.map.page_at(key)?;
        compare.page(key, &slots(Some(page)), &slots(other.as_ref()), false)
    });
    match walked {
        Err(e) if e.kind() == Kind::Damaged => map_damaged(&e.chain(), audit),
        done => done?,
    }
    compare.report(audit);
    Ok(())
}

impl Compare<'_> {
    /// One page of the log's map (`ours` from the log) or of the store's.
    fn page(&mut self, key: PageKey, ours: &Slots, other: &Slots, of_log: bool) -> Result<()> {
        if self.region != Some((key.volume, key.region)) {
            self.region = Some((key.volume, key.region));
            self.last.fill(None);
        }
        for (grain, slot) in ours.iter().enumerate() {
            let Some(slot) = slot else { continue };
            let before = self.last[grain].replace(key.epoch.0);
            if other[grain].as_ref() == Some(slot) {
                continue;
            }
            let wrong = match (of_log, other[grain]) {
                (true, None) => Wrong::Missing,
                (true, Some(_)) => Wrong::Other,
                // Seen from the other side already.
                (false, Some(_)) => continue,
                (false, None) => match slot {
                    Slot::Data(place, _) if !self.is_there(place.segment)? => {
                        Wrong::SegmentGone(place.segment)
                    }
                    _ => Wrong::Unknown,
                },
            };
            self.note(wrong, key, before, grain as u64);
        }
        Ok(())
    }

    fn is_there(&mut self, segment: u32) -> Result<bool> {
        if let Some(&there) = self.present.get(&segment) {
            return Ok(there);
        }
        let found = open_if_there(self.log, &segment::file_name(segment));
        let there =
            crate::error::IoContext::context(found, || "cannot look for a segment")?.is_some();
        self.present.insert(segment, there);
        Ok(there)
    }

    fn note(&mut self, wrong: Wrong, key: PageKey, before: Option<u64>, grain: u64) {
        let Some(points) = self.points.get(&key.volume.0) else {
            return;
        };
        let grain = key.first_grain() + grain;
        let bytes = points.grain.span(grain..grain + 1);
        let mut hit = false;
        for epoch in needing(&points.live, before, key.epoch.0) {
            hit = true;
            for who in names_of(&self.view.catalog, key.volume.0, epoch) {
                self.wrong.entry(wrong).or_default().add(who, bytes.clone());
            }
        }
        if hit {
            *self.records.entry(wrong).or_default() += 1;
        }
    }

    fn report(self, audit: &mut Audit) {
        for (wrong, places) in self.wrong {
            let count = self.records.get(&wrong).copied().unwrap_or(0);
            let (check, why, advice) = match wrong {
                Wrong::Missing => (
                    "map",
                    "the extent map lacks what the log has".to_owned(),
                    "'stillframe check --repair' makes the map again from the log",
                ),
                Wrong::Other => (
                    "map",
                    "the extent map says something else than the log".to_owned(),
                    "'stillframe check --repair' makes the map again from the log",
                ),
                Wrong::Unknown => (
                    "map",
                    "the extent map has what the log has not".to_owned(),
                    COPY_ASIDE,
                ),
                Wrong::SegmentGone(number) => (
                    "log",
                    format!("log/{} is gone", segment::file_name(number)),
                    "bring the file back from a copy of the store; do not rebuild the map",
                ),
            };
            match wrong {
                Wrong::Missing | Wrong::Other => audit.map_to_rebuild = true,
                Wrong::Unknown | Wrong::SegmentGone(_) => audit.keep_map = true,
            }
            for ((what, name), ranges) in places.0 {
                audit.findings.push(
                    Finding::new(Severity::Damage, check, what, &name, "damaged")
                        .because(format!("{why} ({count} records)"))
                        .at(ranges)
                        .advise(advice),
                );
            }
        }
    }
}

/// Compares the sets: a superset of what the log shows, and where the log has the exact set, that.
pub fn bitmaps(view: &View, actual: &ExtentMap, audit: &mut Audit) {
    let all = Epoch(0)..Epoch(u64::MAX);
    for (&id, volume) in &view.catalog.volumes {
        // Of what has failed nobody asks what changed, and nothing is kept for it.
        let active = |state: &SnapshotState| *state == SnapshotState::Active;
        let points = volume.snapshots.iter().chain(&volume.kept);
        let points = points.filter(|(_, snap)| active(&snap.state));
        let marks = volume.bookmarks.iter();
        let marks = marks.filter(|(_, mark)| active(&mark.state));
        let epochs = points.map(|(epoch, _)| epoch);
        let Some(&oldest) = epochs.chain(marks.map(|(epoch, _)| epoch)).min() else {
            continue;
        };
        let ours: BTreeMap<u64, EpochSets> = sets(actual, VolumeId(id), all.clone());
        let none = EpochSets::default();
        for (epoch, expect) in sets(&view.map, VolumeId(id), Epoch(oldest)..all.end) {
            let found = ours.get(&epoch).unwrap_or(&none);
            let has = found.data.union(&found.zero).union(&found.changed);
            let must = expect.data.union(&expect.zero);
            let runs = must.ranges();
            let lacks: Vec<_> = runs
                .flat_map(|run| has.gaps_in(run).collect::<Vec<_>>())
                .collect();
            if !lacks.is_empty() {
                let why = format!("the bitmap of epoch {epoch} lacks grains that were preserved");
                wrong_bitmap(&volume.name.to_string(), &why, audit, &lacks, volume.grain);
            }
        }
        for (&(_, epoch, first), (count, bits)) in view
            .refined
            .range((id, oldest, 0)..(id, u64::MAX, u64::MAX))
        {
            let found = ours.get(&epoch).unwrap_or(&none);
            let has = found.data.union(&found.zero).union(&found.changed);
            let range = first..first + u64::from(*count);
            let differ: Vec<_> = has
                .ranges_in(range.clone())
                .flat_map(|run| bits.gaps_in(run).collect::<Vec<_>>())
                .chain(
                    bits.ranges_in(range)
                        .flat_map(|run| has.gaps_in(run).collect::<Vec<_>>()),
                )
                .collect();
            if !differ.is_empty() {
                let why = format!("the bitmap of epoch {epoch} is not the exact one of the log");
                wrong_bitmap(&volume.name.to_string(), &why, audit, &differ, volume.grain);
            }
        }
    }
    for (&layer, entry) in &view.catalog.layers {
        let of = |map: &ExtentMap| map.changed_between(layer_volume(layer), Epoch(0), None);
        let (expect, found) = (of(&view.map), of(actual));
        if expect == found {
            continue;
        }
        audit.map_to_rebuild = true;
        let Some(volume) = view.catalog.volumes.get(&entry.volume) else {
            continue;
        };
        let on_it = view.catalog.clones.values();
        for clone in on_it.filter(|c| view.catalog.chain(c.top).iter().any(|&(id, _)| id == layer))
        {
            let name = format!("{}/{}", volume.name, clone.name);
            audit.findings.push(
                Finding::new(Severity::Damage, "bitmap", "clone", &name, "damaged")
                    .because(format!(
                        "the grains of layer {layer} in the map are not those of the log"
                    ))
                    .advise("'stillframe check --repair' makes the map again from the log"),
            );
        }
    }
}

fn sets(
    map: &ExtentMap,
    volume: VolumeId,
    epochs: std::ops::Range<Epoch>,
) -> BTreeMap<u64, EpochSets> {
    debug_assert!(volume.0 & LAYER_BIT == 0);
    let all = map.sets_of(volume, epochs);
    all.into_iter().map(|(e, sets)| (e.0, sets)).collect()
}

fn wrong_bitmap(
    volume: &str,
    why: &str,
    audit: &mut Audit,
    grains: &[std::ops::Range<u64>],
    grain: crate::units::Grain,
) {
    audit.map_to_rebuild = true;
    audit.findings.push(
        Finding::new(Severity::Damage, "bitmap", "volume", volume, "damaged")
            .because(why)
            .at(grains.iter().map(|run| grain.span(run.clone())))
            .advise("'stillframe check --repair' makes the map again from the log"),
    );
}
