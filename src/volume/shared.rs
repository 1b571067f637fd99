//! State of an open store that every part of the engine shares, and the log's sink.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::error::{Error, IoContext, Kind, Result};
use crate::log::commit::{Durable, Entry, Log, Sink};
use crate::log::record::{Record, RecordType};
use crate::log::superblock::SuperblockFile;
use crate::map::{ExtentMap, GrainSet, Publish, Published};
use crate::sys::disk::{Disk, Identity};
use crate::units::{Epoch, Grain, Lsn, Name, Place, Uuid, VolumeId};
use crate::volume::catalog::{Catalog, Trust, VolumeEntry};
use crate::volume::clone_records::{LAYER_BIT, layer_volume};
use crate::volume::facts::{Environment, Settings, SnapshotState, VolumeState};
use crate::volume::heal::Heal;
use crate::volume::layers::Clones;
use crate::volume::range_lock::RangeLock;
use crate::volume::scrub::Scrub;
use crate::volume::space::{FailureWatch, Waiting};
use crate::volume::thin::Thin;
use crate::volume::tracking::Tracking;

const NS_PER_S: i64 = 1_000_000_000;

/// Takes a lock; a panic elsewhere does not make its data unusable, because every critical section
/// leaves it consistent.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What an open store consists of.
pub struct Shared {
    // Fixed at open.
    pub env: Environment,
    pub settings: Settings,
    pub store: Uuid,
    pub log: Log,
    pub map: ExtentMap,
    /// The disk had no room for the map's index when the store was opened.
    pub map_in_memory: AtomicBool,
    // One catalogue change at a time.
    pub structure: Mutex<()>,
    pub superblock: Mutex<SuperblockFile>,
    pub catalog: Mutex<Catalog>,
    pub volumes: RwLock<BTreeMap<u32, Arc<Vol>>>,
    pub clones: Mutex<Clones>,
    // Atomic.
    pub closed: AtomicBool,
    /// Log bytes at the last checkpoint, as (segment, offset) of its end.
    pub checkpointed: Mutex<(u32, u64)>,
    /// Held by whoever does background work: sweeps and checkpoints must not overlap.
    pub maintaining: Mutex<()>,
    pub reclaim_due: Mutex<BTreeSet<u32>>,
    pub segments_due: AtomicBool,
    /// The first segment that may hold records of the sets of a (volume or layer, epoch).
    pub sets_since: Mutex<BTreeMap<(u32, u64), u32>>,
    pub idle_lsn: AtomicU64,
    pub waiting: Waiting,
    pub thin: Thin,
    pub scrub: Scrub,
    pub heal: Heal,
    pub failure_watch: Mutex<Option<FailureWatch>>,
}

/// One volume at run time.
pub struct Vol {
    // Fixed while open.
    pub id: u32,
    pub name: Name,
    pub uuid: Uuid,
    pub grain: Grain,
    /// Changes only while the gate and `reads` are held exclusively.
    size: AtomicU64,
    pub source: Option<Arc<dyn Disk>>,
    pub source_path: String,
    /// Writers share it from plan to source write; a snapshot excludes them for its instant.
    pub gate: RwLock<()>,
    /// Readers of the live content share it; excluded while that content is half one thing and half
    /// another, and while the size changes. After the gate.
    pub reads: RwLock<()>,
    pub ranges: RangeLock,
    pub state: Mutex<VolState>,
    /// Held while the source is synced; counts the syncs that succeeded.
    pub sync: Mutex<u64>,
    pub syncs_started: AtomicU64,
    /// Something was written since the last sync began.
    pub dirty: AtomicBool,
}

/// The changing part of a volume.
pub struct VolState {
    pub health: VolumeState,
    pub trust: Trust,
    pub removed: bool,
    /// The current epoch: that of the newest snapshot taken, or being taken.
    pub epoch: u64,
    /// Points by epoch. Failed snapshots need nothing and are not here.
    pub points: BTreeMap<u64, Point>,
    /// Open handles by epoch, also of failed snapshots.
    pub pins: BTreeMap<u64, usize>,
    /// Failed snapshots that are still open, and why.
    pub failed: BTreeMap<u64, String>,
    /// The grains preserved at or after the newest point.
    pub preserved: GrainSet,
    pub newest: Option<u64>,
    /// Epochs of the bookmarks that have not failed.
    pub bookmarks: BTreeSet<u64>,
    /// What must be recorded besides what is preserved; see `tracking`.
    pub tracking: Tracking,
    pub mtime_ns: i64,
    pub snap_mtime_ns: i64,
    pub changed: bool,
    /// Bytes that reclaim is known to give back.
    pub reclaimable: u64,
    /// A resize or revert runs: no snapshot, no other change of the volume meanwhile.
    pub busy: Option<&'static str>,
    /// A resize or revert was begun and could not be finished: the live content is not served.
    pub unfinished: Option<String>,
    /// The path of the source leads elsewhere by now; see `vigil`.
    pub astray: Option<String>,
}

/// Why a point counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// A listed snapshot.
    Listed,
    /// Being taken.
    Pending,
    /// Its SNAP was not acknowledged by the log, but might come back after a crash: it is preserved
    /// for until the log has durably gone on without it.
    Doubtful,
    /// Deleted, kept by open handles.
    Deleted,
    /// Deleted, kept by a layer of a clone.
    Kept,
}

impl Vol {
    pub fn new(id: u32, entry: &VolumeEntry, source: Option<Arc<dyn Disk>>) -> Vol {
        let health = match (&source, entry.trust) {
            (None, _) => VolumeState::Missing("the source is not open".into()),
            (_, Trust::Known) => VolumeState::Active,
            (_, Trust::Unverified) => VolumeState::Unverified,
            (_, Trust::Changed) => VolumeState::Changed("found changed at an earlier start".into()),
        };
        let state = VolState {
            health,
            trust: entry.trust,
            removed: false,
            epoch: entry.epoch,
            points: BTreeMap::new(),
            pins: BTreeMap::new(),
            failed: BTreeMap::new(),
            preserved: GrainSet::default(),
            newest: None,
            bookmarks: BTreeSet::new(),
            tracking: Tracking::default(),
            mtime_ns: entry.mtime_ns,
            snap_mtime_ns: entry.snap_mtime_ns,
            changed: entry.changed,
            reclaimable: 0,
            busy: None,
            unfinished: None,
            astray: None,
        };
        Vol {
            id,
            name: entry.name.clone(),
            uuid: entry.uuid,
            grain: entry.grain,
            size: AtomicU64::new(entry.size),
            source,
            source_path: entry.source.clone(),
            gate: RwLock::new(()),
            reads: RwLock::new(()),
            ranges: RangeLock::default(),
            state: Mutex::new(state),
            sync: Mutex::new(0),
            syncs_started: AtomicU64::new(0),
            dirty: AtomicBool::new(true),
        }
    }

    pub fn state(&self) -> MutexGuard<'_, VolState> {
        lock(&self.state)
    }

    /// The source, if it can be read.
    ///
    /// # Errors
    /// `Failed` if it could not be opened.
    pub fn source(&self) -> Result<&Arc<dyn Disk>> {
        self.source.as_ref().ok_or_else(|| {
            Error::new(
                Kind::Failed,
                format!("the source {} is not open", self.source_path),
            )
        })
    }

    pub fn id(&self) -> VolumeId {
        VolumeId(self.id)
    }

    /// Bytes of the volume. Stays while the gate or `reads` is held; a device may have more.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// The caller holds the gate and `reads` exclusively, or nobody else has the volume yet.
    pub fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    pub fn grain_blocks(&self) -> u32 {
        self.grain.blocks() as u32
    }

    /// Keeps a snapshot's data until its handle is dropped. The caller knows that it is listed.
    pub fn pin(&self, epoch: u64, snapshot: &SnapshotState) {
        let mut state = self.state();
        *state.pins.entry(epoch).or_default() += 1;
        if let SnapshotState::Failed(why) = snapshot {
            state.failed.insert(epoch, why.clone());
        }
    }

    /// Recomputes what is preserved for the newest point, and what is tracked, after points or
    /// bookmarks came or went.
    pub fn refresh(&self, map: &ExtentMap, state: &mut VolState) {
        let newest = state.points.keys().next_back().copied();
        if newest != state.newest {
            state.newest = newest;
            state.preserved = match newest {
                Some(epoch) => map.preserved_since(self.id(), Epoch(epoch)),
                None => GrainSet::default(),
            };
        }
        let since = state.tracked_since();
        state
            .tracking
            .follow(since, |epoch| map.changed_between(self.id(), epoch, None));
    }
}

impl VolState {
    /// Notes that content is about to change (rule of mtimes: DESIGN section 2). At least one whole
    /// second behind every snapshot's mtime, because rsync compares whole seconds.
    pub fn note_change(&mut self, now_ns: i64) {
        let floor = (self.snap_mtime_ns.div_euclid(NS_PER_S) + 1).saturating_mul(NS_PER_S);
        let floor = if self.snap_mtime_ns == 0 {
            i64::MIN
        } else {
            floor
        };
        self.mtime_ns = self.mtime_ns.max(now_ns).max(floor);
        self.changed = true;
    }

    /// Whether the live content may be served and written.
    ///
    /// # Errors
    /// As [`VolState::usable`]; `Failed` while a resize or revert is unfinished.
    pub fn serving(&self, name: &Name) -> Result<()> {
        self.usable(name)?;
        match &self.unfinished {
            None => Ok(()),
            Some(why) => Err(Error::new(Kind::Failed, format!("volume {name}: {why}"))),
        }
    }

    /// Whether nothing runs that excludes snapshots and changes of the volume.
    ///
    /// # Errors
    /// `Busy`.
    pub fn idle(&self, name: &Name) -> Result<()> {
        match self.busy {
            None => Ok(()),
            Some(what) => Err(Error::new(
                Kind::Busy,
                format!("volume {name}: {what} is under way"),
            )),
        }
    }

    /// Whether clean blocks of the source may be served and written.
    ///
    /// # Errors
    /// `Failed` if the source was changed or is missing, `NotFound` if the volume was removed.
    pub fn usable(&self, name: &Name) -> Result<()> {
        if self.removed {
            return Err(Error::new(
                Kind::NotFound,
                format!("volume {} was removed", name),
            ));
        }
        let why = match &self.health {
            VolumeState::Missing(why) => {
                return Err(Error::new(Kind::Failed, format!("volume {name}: {why}")));
            }
            VolumeState::Changed(why) => why,
            // A failed sync of a changed source does not make it good.
            _ if self.trust == Trust::Changed => "found changed",
            VolumeState::Active
            | VolumeState::Unverified
            | VolumeState::Suspect(_)
            | VolumeState::Unfinished(_) => return Ok(()),
        };
        Err(Error::new(
            Kind::Failed,
            format!(
                "volume {name}: the source is not as we left it ({why}); \
                 'stillframe volume accept {name}' declares it good"
            ),
        ))
    }
}

impl Shared {
    /// A volume by number.
    pub fn vol(&self, id: u32) -> Option<Arc<Vol>> {
        self.volumes
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&id)
            .cloned()
    }

    /// A volume's number and run-time state by name.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn find(&self, name: &Name) -> Result<Arc<Vol>> {
        let id = lock(&self.catalog).find(name);
        id.and_then(|id| self.vol(id))
            .ok_or_else(|| Error::new(Kind::NotFound, format!("there is no volume '{name}'")))
    }

    /// Refuses work after `close`.
    ///
    /// # Errors
    /// `Interrupted`.
    pub fn check_open(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::new(Kind::Interrupted, "the store is being closed"));
        }
        Ok(())
    }

    /// Appends to the log; durable and published when it returns.
    ///
    /// # Errors
    /// As [`Log::append`].
    pub fn append(&self, entries: Vec<Entry>) -> Result<Lsn> {
        self.log.append(self, entries)
    }

    /// Appends records without payload; on a full disk the ballast makes room for them.
    ///
    /// # Errors
    /// As [`Log::append`].
    pub fn append_records(&self, records: Vec<Record>) -> Result<Lsn> {
        let entries = || records.iter().cloned().map(Entry::plain).collect();
        match self.append(entries()) {
            Err(e) if e.kind() == Kind::NoSpace && self.release_ballast() => self.append(entries()),
            done => done,
        }
    }

    /// The catalogue with the run-time state of every volume folded in.
    pub fn current_catalog(&self) -> Catalog {
        let mut catalog = lock(&self.catalog).clone();
        // Of a store that is open.
        (catalog.clean, catalog.unsettled) = (false, false);
        let volumes = self.volumes.read().unwrap_or_else(PoisonError::into_inner);
        for (id, entry) in &mut catalog.volumes {
            let Some(vol) = volumes.get(id) else { continue };
            let state = vol.state();
            entry.epoch = entry.epoch.max(state.epoch);
            entry.mtime_ns = state.mtime_ns;
            entry.snap_mtime_ns = state.snap_mtime_ns;
            entry.changed = state.changed;
            entry.trust = state.trust;
        }
        catalog
    }

    /// The catalogue of a clean stop: what the sources are now is what the next opening must find.
    ///
    /// # Errors
    /// A source that cannot be asked: what it was before would not be found again.
    pub fn clean_catalog(&self) -> Result<Catalog> {
        let mut catalog = self.current_catalog();
        catalog.clean = true;
        let volumes = self.volumes.read().unwrap_or_else(PoisonError::into_inner);
        for (id, entry) in &mut catalog.volumes {
            let Some(vol) = volumes.get(id) else { continue };
            if entry.trust == Trust::Changed {
                continue;
            }
            if let Some(source) = &vol.source {
                let identity = source.identity();
                entry.identity = identity.context(|| format!("cannot stat {}", vol.source_path))?;
            }
        }
        Ok(catalog)
    }
}

/// Whether a record says nothing new while the store is open: an intent because the grains that are
/// written are noted one by one, a BITMAP because it repeats what the map holds.
fn only_replayed(record: &Record) -> bool {
    record.kind == RecordType::Bitmap || record.is_intent()
}

/// The layer of a BITMAP that does not say which grains lie in it.
pub fn unreadable_layer(record: &Record) -> Option<u32> {
    if record.kind != RecordType::Bitmap || record.volume & LAYER_BIT == 0 {
        return None;
    }
    let bits = record.bitmap_bits();
    let read = bits.and_then(|(bits, _)| GrainSet::from_chunk_bytes(record.first, bits));
    read.is_none().then_some(record.volume & !LAYER_BIT)
}

fn bitmap_to_publish(record: &Record, batch: Place) -> Option<Publish> {
    let (bits, complete) = record.bitmap_bits()?;
    let bits = match GrainSet::from_chunk_bytes(record.first, bits) {
        Some(bits) => bits,
        // Neither all nor nothing is safe to say of a layer: recovery fails its clones.
        None if record.volume & LAYER_BIT != 0 => return None,
        // What cannot be read says that all of it changed: too much, never too little.
        None => std::iter::once(record.first..record.first + u64::from(record.count)).collect(),
    };
    Some(Publish {
        volume: VolumeId(record.volume),
        epoch: Epoch(record.epoch),
        start: record.first,
        count: record.count,
        grain_blocks: 1,
        segment: batch.segment,
        kind: Published::Bits { bits, complete },
    })
}

/// The map's view of a record that has become durable; `None` for catalogue records.
pub fn to_publish(record: &Record, batch: Place) -> Option<Publish> {
    let (kind, segment) = match record.kind {
        RecordType::Preserve => {
            let place = record.place(batch);
            (
                Published::Data {
                    place,
                    sums: record.sums(),
                },
                place.segment,
            )
        }
        RecordType::Zero => (Published::Zero, batch.segment),
        RecordType::Changed | RecordType::CloneAlloc => (Published::Changed, batch.segment),
        RecordType::Bitmap => return bitmap_to_publish(record, batch),
        _ => return None,
    };
    let (volume, epoch) = match record.kind {
        RecordType::CloneAlloc => (layer_volume(u32::try_from(record.epoch).ok()?), 1),
        _ => (VolumeId(record.volume), record.epoch),
    };
    // A record that says nothing sound of its grain is no record of ours.
    let grain = Grain::new(u64::from(record.grain_bytes()?)).ok()?;
    let grain_blocks = grain.blocks() as u32;
    Some(Publish {
        volume,
        epoch: Epoch(epoch),
        start: record.first,
        count: record.count,
        grain_blocks,
        segment,
        kind,
    })
}

impl Sink for Shared {
    fn durable(&self, batch: &Durable<'_>) {
        let published: Vec<Publish> = batch
            .records
            .iter()
            .filter(|r| !only_replayed(r))
            .filter_map(|r| to_publish(r, batch.place))
            .collect();
        let preserved: Vec<(u32, u64, u64)> = batch
            .records
            .iter()
            .filter(|r| matches!(r.kind, RecordType::Preserve | RecordType::Zero))
            .map(|r| (r.volume, r.first, r.first + u64::from(r.count)))
            .collect();
        let intents = batch.records.iter().filter(|r| r.is_intent());
        let sets: Vec<(u32, u64)> = published
            .iter()
            .map(|p| (p.volume.0, p.epoch.0))
            .chain(intents.map(|r| (r.volume, r.epoch)))
            .collect();
        // The map first: whoever recomputes `preserved` from it in between misses nothing.
        if !published.is_empty() {
            self.map.publish(published);
        }
        self.note_sets(sets.into_iter(), batch.place.segment);
        for (volume, start, end) in preserved {
            if let Some(vol) = self.vol(volume) {
                let mut state = vol.state();
                state.preserved.insert_range(start..end);
                state.tracking.recorded(start..end);
            }
        }
        let mut catalog = lock(&self.catalog);
        for record in batch.records {
            if let Err(e) = catalog.apply(record) {
                // Our own record, just written: the engine never makes one that does not apply.
                tracing::error!("a record just written does not apply: {}", e.chain());
            }
        }
        drop(catalog);
        self.clear_doubt();
    }

    fn catalog(&self) -> Vec<u8> {
        self.current_catalog().encode()
    }

    fn may_grow(&self, bytes: u64) -> Result<bool> {
        self.limit_allows(bytes)
    }
}

impl Shared {
    /// The log has durably gone on: a SNAP that failed before this is dead for ever (L2).
    fn clear_doubt(&self) {
        for vol in self
            .volumes
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
        {
            let mut state = vol.state();
            if state.points.values().any(|p| *p == Point::Doubtful) {
                state.points.retain(|_, p| *p != Point::Doubtful);
                vol.refresh(&self.map, &mut state);
            }
        }
    }
}

/// Whether a source is still the one that was left, as far as can be told.
///
/// After a clean stop the change time decides; device numbers are left out then, because many
/// filesystems get another one at each boot. After an unclean stop our own last writes moved the
/// change time, so only the inode and the size can be compared.
pub fn compare(left: &Identity, found: &Identity, clean: bool) -> std::result::Result<(), String> {
    if left.ino != found.ino {
        return Err("it is another file than before".into());
    }
    if left.size != found.size {
        return Err(format!(
            "its size was {} and is {} bytes",
            left.size, found.size
        ));
    }
    // A device has no change time: nothing more can be told of it.
    if clean && left.ctime_ns != found.ctime_ns {
        return Err("it was written or touched while no daemon watched".into());
    }
    Ok(())
}
