//! What the log alone says: the catalogue replayed, and a map made from nothing else.
//!
//! It reads every batch of the log. Damage becomes findings; what it concerns is what existed when the
//! damaged part was written. Of an open store only what was durable when the audit began is read: a
//! batch that is being written looks like a torn one.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::{IoContext, Kind, Result};
use crate::log::keys::Keys;
use crate::log::record::{Record, RecordType};
use crate::log::scan::{Event, Scan, Scanned};
use crate::log::segment;
use crate::map::transient::TransientIndex;
use crate::map::{Applied, ExtentMap, GrainSet};
use crate::sys::disk::{Dir, Open};
use crate::units::{Lsn, Place, Uuid};
use crate::volume::audit::{Audit, COPY_ASIDE, Finding, NEXT_START, Severity};
use crate::volume::catalog::{Catalog, Trust};
use crate::volume::facts::SnapshotState;
use crate::volume::recovery::read_catalog;
use crate::volume::shared::to_publish;

/// Where the log is.
pub struct Source<'a> {
    /// The directory `log/`.
    pub dir: &'a dyn Dir,
    /// Its checksums.
    pub keys: &'a Keys,
    /// Its store.
    pub store: Uuid,
    /// Of an open store: up to where the map is to be made, and what is durable.
    pub upto: Option<(Lsn, Lsn)>,
}

/// See the head of the file.
pub struct View {
    pub catalog: Catalog,
    /// Made from the log alone, all of it in its (transient) index.
    pub map: ExtentMap,
    /// The newest complete BITMAP of each (volume, epoch, first grain): count and bits.
    pub refined: BTreeMap<(u32, u64, u64), (u32, GrainSet)>,
    /// Segments that never became part of the log.
    pub abandoned: Vec<u32>,
    /// Batches whose records cannot be read were found.
    pub lost: bool,
    /// The log could be read from end to end.
    pub read: bool,
    /// The store was not stopped cleanly.
    pub unclean: bool,
}

/// Bytes of records that the view's own map keeps apart before it merges them.
const PENDING: usize = 16 << 20;

impl View {
    /// Reads all of a log.
    ///
    /// # Errors
    /// `Unsupported` for a newer store, the system's errors.
    pub fn read(source: &Source<'_>, audit: &mut Audit) -> Result<View> {
        let map = ExtentMap::open(Arc::new(TransientIndex::default()), PENDING)?;
        let mut view = View {
            catalog: Catalog::default(),
            map,
            refined: BTreeMap::new(),
            abandoned: Vec::new(),
            lost: false,
            read: true,
            unclean: false,
        };
        let scan = Scan {
            dir: source.dir,
            keys: source.keys,
            store: source.store,
            from_segment: 0,
        };
        let mut replay = Replay {
            source,
            view: &mut view,
            audit,
            have_catalog: false,
            before: BTreeMap::new(),
            adjoins: false,
            segment: u32::MAX,
            at: None,
        };
        let scanned = scan.run(&mut |event| replay.event(event));
        let (have_catalog, at) = (replay.have_catalog, replay.at);
        let scanned = match scanned {
            Ok(scanned) => scanned,
            Err(e) if e.kind() == Kind::Damaged => {
                audit.findings.push(
                    Finding::new(Severity::Damage, "log", "store", "log", "damaged")
                        .because(e.chain())
                        .advise(COPY_ASIDE),
                );
                (view.lost, view.read) = (true, false);
                return Ok(view);
            }
            Err(e) => return Err(e),
        };
        if let Some(at) = at {
            view.map.checkpoint(at)?;
        }
        if scanned.torn && source.upto.is_none() {
            let name = segment::file_name(scanned.tail.segment);
            audit.findings.push(
                Finding::new(
                    Severity::Note,
                    "log",
                    "segment",
                    &format!("log/{name}"),
                    "torn",
                )
                .because(format!(
                    "the last batch at byte {} was never completed",
                    scanned.tail.end
                ))
                .advise(NEXT_START),
            );
        }
        if !have_catalog && scanned.number_max > 0 {
            audit.findings.push(
                Finding::new(Severity::Damage, "catalogue", "store", "log", "lost")
                    .because("no catalogue in the log can be read")
                    .advise(COPY_ASIDE),
            );
        }
        view.abandoned = scanned.abandoned;
        Ok(view)
    }

    /// Applies a mark of failure that is not in the log yet.
    pub fn fail(&mut self, volume: u32, first: u64, last: u64) {
        let why = "a mark in the superblock says so";
        let record = crate::volume::catalog::invalidate_record(volume, first, last, why);
        // An INVALIDATE of what is not there says nothing.
        let _ = self.catalog.apply(&record);
    }

    /// Of an open store: only what is there now, too, is judged.
    pub fn keep_points_of(&mut self, now: &Catalog) {
        self.catalog.volumes.retain(|id, volume| {
            let Some(known) = now.volumes.get(id) else {
                return false;
            };
            let there = |epoch: &u64| known.snapshots.get(epoch).or(known.kept.get(epoch));
            for snaps in [&mut volume.snapshots, &mut volume.kept] {
                snaps.retain(|epoch, _| there(epoch).is_some());
                for (epoch, snap) in snaps.iter_mut() {
                    if let Some(known) = there(epoch) {
                        snap.clone_from(known);
                    }
                }
            }
            volume.bookmarks.retain(|epoch, mark| {
                let known = known.bookmarks.get(epoch);
                if let Some(known) = known {
                    mark.clone_from(known);
                }
                known.is_some()
            });
            true
        });
        self.catalog
            .clones
            .retain(|id, _| now.clones.contains_key(id));
        self.catalog
            .layers
            .retain(|id, _| now.layers.contains_key(id));
    }
}

/// Reads payload.
///
/// # Errors
/// The system's error.
pub fn read_payload(dir: &dyn Dir, place: Place, buf: &mut [u8]) -> Result<()> {
    let name = segment::file_name(place.segment);
    dir.open(&name, Open::Read)
        .and_then(|disk| disk.read_exact_at(place.offset(), buf))
        .context(|| format!("cannot read {name} at byte {}", place.offset()))
}

/// Brings a map that covers the log up to `applied` to the log's end, in memory only, unless the log ends
/// before that.
///
/// # Errors
/// The system's.
pub fn catch_up(source: &Source<'_>, map: &ExtentMap, applied: Applied) -> Result<Scanned> {
    let scan = Scan {
        dir: source.dir,
        keys: source.keys,
        store: source.store,
        from_segment: applied.segment,
    };
    let scanned = scan.run(&mut |event| {
        if let Event::Batch {
            lsn,
            place,
            records,
            ..
        } = event
            && lsn > applied.lsn
        {
            let records = records.iter().filter_map(|r| to_publish(r, place));
            map.publish(records.collect());
        }
        Ok(())
    })?;
    if applied.lsn.0 > scanned.tail.lsn {
        return Ok(scanned);
    }
    map.checkpoint(Applied {
        store: source.store,
        lsn: Lsn(scanned.tail.lsn),
        segment: scanned.tail.segment,
        offset: scanned.tail.end,
    })?;
    Ok(scanned)
}

struct Replay<'a, 's> {
    source: &'a Source<'s>,
    view: &'a mut View,
    audit: &'a mut Audit,
    /// Every segment begins with a CATALOG; before one was read records have nothing to apply to.
    have_catalog: bool,
    /// What each segment says lies before it.
    before: BTreeMap<u32, u32>,
    /// No segment is missing before the one that is read, and none without a batch lies between.
    adjoins: bool,
    /// That of the last batch.
    segment: u32,
    /// Where the map has come to.
    at: Option<Applied>,
}

impl Replay<'_, '_> {
    fn event(&mut self, event: Event<'_>) -> Result<()> {
        let durable = self.source.upto.map(|(_, durable)| durable);
        let beyond = |lsn: Lsn| durable.is_some_and(|durable| lsn > durable);
        match event {
            Event::Segment { number, before } => {
                self.audit.segments += 1;
                self.before.insert(number, before);
                Ok(())
            }
            Event::Lost { first, .. } if beyond(first) => Ok(()),
            Event::Lost {
                first,
                last,
                segment,
                bytes,
            } => {
                self.lost(first, last, segment, &bytes);
                Ok(())
            }
            Event::Batch { lsn, .. } if beyond(lsn) => Ok(()),
            Event::Batch {
                lsn,
                place,
                end,
                records,
                from_copy,
                ..
            } => {
                self.audit.batches += 1;
                if from_copy {
                    self.copied(lsn, place, end);
                }
                self.batch(lsn, place, end, records)
            }
        }
    }

    fn batch(&mut self, lsn: Lsn, place: Place, end: u64, records: &[Record]) -> Result<()> {
        let follows = |segment: u32| Some(&segment) == self.before.get(&place.segment);
        self.adjoins = place.segment == self.segment || follows(self.segment);
        self.segment = place.segment;
        for record in records {
            if record.kind == RecordType::Catalog {
                self.document(record, place)?;
            } else if self.have_catalog
                && let Err(e) = self.view.catalog.apply(record)
            {
                if e.kind() == Kind::Unsupported {
                    return Err(e);
                }
                self.audit.findings.push(
                    Finding::new(
                        Severity::Damage,
                        "catalogue",
                        "segment",
                        &file_of(place.segment),
                        "damaged",
                    )
                    .because(format!("batch {}: {}", lsn.0, e.chain()))
                    .advise(COPY_ASIDE),
                );
            }
            self.refined(record);
        }
        if self.source.upto.is_some_and(|(covered, _)| lsn > covered) {
            return Ok(());
        }
        let publish = records.iter().filter_map(|r| to_publish(r, place));
        self.view.map.publish(publish.collect());
        let at = Applied {
            store: self.source.store,
            lsn,
            segment: place.segment,
            offset: end,
        };
        self.at = Some(at);
        if self.view.map.pending() > PENDING {
            self.view.map.checkpoint(at)?;
        }
        Ok(())
    }

    fn refined(&mut self, record: &Record) {
        if record.kind != RecordType::Bitmap {
            return;
        }
        let Some((bits, complete)) = record.bitmap_bits() else {
            return;
        };
        if let (true, Some(bits)) = (complete, GrainSet::from_chunk_bytes(record.first, bits)) {
            let key = (record.volume, record.epoch, record.first);
            self.view.refined.insert(key, (record.count, bits));
        }
    }

    /// A CATALOG says what the records before it say.
    fn document(&mut self, record: &Record, place: Place) -> Result<()> {
        let read = read_catalog(self.source.dir, self.source.keys, record, place);
        let finding = |severity, state: &str| {
            let name = file_of(place.segment);
            Finding::new(severity, "catalogue", "segment", &name, state)
        };
        let at = place.offset();
        match read {
            Ok(Some(read)) => {
                if self.have_catalog
                    && self.adjoins
                    && let Some(why) = differ(&self.view.catalog, &read)
                {
                    self.audit.findings.push(
                        finding(Severity::Damage, "contradicts")
                            .because(format!(
                                "the catalogue at byte {at} is not what the records say: {why}"
                            ))
                            .advise(COPY_ASIDE),
                    );
                }
                self.view.catalog = read;
                self.have_catalog = true;
            }
            Ok(None) => {
                self.audit.findings.push(
                    finding(Severity::Warning, "damaged")
                        .because(format!(
                            "the catalogue at byte {at} does not match its checksum; the records \
                             before it say the same"
                        ))
                        .advise("nothing; later segments have their own"),
                );
                self.have_catalog &= self.adjoins;
            }
            Err(e) if e.kind() == Kind::Unsupported => return Err(e),
            Err(e) => {
                self.audit
                    .findings
                    .push(finding(Severity::Damage, "damaged").because(e.chain()));
                self.have_catalog &= self.adjoins;
            }
        }
        Ok(())
    }

    fn copied(&mut self, lsn: Lsn, place: Place, end: u64) {
        self.audit.findings.push(
            Finding::new(
                Severity::Warning,
                "log",
                "segment",
                &file_of(place.segment),
                "damaged",
            )
            .because(format!(
                "the commit block of batch {} is damaged; its records are known from the copy in the next batch",
                lsn.0
            ))
            .at(std::iter::once(place.offset()..end))
            .advise("look at the disk; a second damage beside it would lose snapshots"),
        );
    }

    fn lost(&mut self, first: Lsn, last: Lsn, segment: u32, bytes: &std::ops::Range<u64>) {
        self.view.lost = true;
        let why = format!("batches {} to {} of the log are lost", first.0, last.0);
        self.audit.findings.push(
            Finding::new(
                Severity::Damage,
                "log",
                "segment",
                &file_of(segment),
                "lost",
            )
            .because(why.clone())
            .at(std::iter::once(bytes.clone()))
            .advise(COPY_ASIDE),
        );
        let catalog = &self.view.catalog;
        let mut hit = Vec::new();
        for (id, volume) in &catalog.volumes {
            for snap in volume.snapshots.values() {
                hit.push(("snapshot", format!("{}@{}", volume.name, snap.name)));
            }
            for clone in catalog.clones.values().filter(|c| c.volume == *id) {
                hit.push(("clone", format!("{}/{}", volume.name, clone.name)));
            }
        }
        for (what, name) in hit {
            self.audit.findings.push(
                Finding::new(Severity::Damage, "log", what, &name, "lost")
                    .because(format!(
                        "{why}, and may have held anything that was preserved for it"
                    ))
                    .advise("the next start marks it failed; then delete it"),
            );
        }
    }
}

fn file_of(segment: u32) -> String {
    format!("log/{}", segment::file_name(segment))
}

/// What two catalogues say of the same instant must be equal, but for what has no records of its own
/// while the store is open.
fn differ(replayed: &Catalog, read: &Catalog) -> Option<String> {
    let (a, b) = (settled(replayed), settled(read));
    let names = |c: &Catalog| -> Vec<String> {
        let volumes = c.volumes.values();
        volumes.map(|v| v.name.to_string()).collect()
    };
    if names(&a) != names(&b) {
        return Some(format!("volumes {:?}, not {:?}", names(&b), names(&a)));
    }
    for (id, volume) in &a.volumes {
        let other = b.volumes.get(id)?;
        if volume != other {
            let what = match () {
                () if volume.snapshots != other.snapshots => "snapshots",
                () if volume.kept != other.kept => "kept snapshots",
                () if volume.bookmarks != other.bookmarks => "bookmarks",
                () => "attributes",
            };
            return Some(format!("the {what} of volume {}", volume.name));
        }
    }
    if a.clones != b.clones {
        return Some("the clones".into());
    }
    (a.layers != b.layers).then(|| "the layers of clones".into())
}

fn settled(catalog: &Catalog) -> Catalog {
    let mut catalog = catalog.clone();
    catalog.clean = false;
    catalog.next_ino = 0;
    for volume in catalog.volumes.values_mut() {
        volume.epoch = 0;
        volume.mtime_ns = 0;
        volume.snap_mtime_ns = 0;
        volume.changed = false;
        volume.trust = Trust::Known;
        volume.identity = Default::default();
        // A mark in the superblock may be in one before it is in the other.
        for snap in volume
            .snapshots
            .values_mut()
            .chain(volume.kept.values_mut())
        {
            snap.state = SnapshotState::Active;
        }
        for mark in volume.bookmarks.values_mut() {
            mark.state = SnapshotState::Active;
        }
    }
    for clone in catalog.clones.values_mut() {
        clone.state = SnapshotState::Active;
    }
    catalog
}
