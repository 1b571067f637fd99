//! Opening a store: from whatever a crash left to a served state.
//!
//! Order: superblock; make what a killed predecessor left in page caches durable; open the map or set
//! it aside; scan the log from the map's checkpoint; open the sources and compare them; a new segment
//! whose durable head ends the old one, before anything is served or written.
//!
//! The map is taken only if it is this store's and does not lead the log; otherwise it is rebuilt.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use crate::error::{Error, IoContext, Kind, Result};
use crate::log::commit::{Log, LogConfig, Resume};
use crate::log::keys::Keys;
use crate::log::record::{Record, RecordType};
use crate::log::room::settle;
use crate::log::scan::{Event, Scan, Scanned};
use crate::log::segment::{self, BATCHES_AT, SEGMENT_MAX, SEGMENT_MIN};
use crate::log::superblock::{INCOMPAT_SUMS, Superblock, SuperblockFile};
use crate::map::transient::TransientIndex;
use crate::map::{Applied, ExtentMap};
use crate::sys::disk::{Dir, Identity, Open};
use crate::sys::planted::{Bug, planted, point};
use crate::units::{Lsn, Place, Uuid};
use crate::volume::catalog::{BookmarkEntry, Catalog, Trust, VolumeEntry, is_device};
use crate::volume::clone_records::LAYER_BIT;
use crate::volume::facts::{Environment, Settings, SnapshotState, VolumeState};
use crate::volume::heal::Heal;
use crate::volume::layers::Clones;
use crate::volume::live::Volume;
use crate::volume::marks::{self, Failure, apply_marks};
use crate::volume::overlay::Home;
use crate::volume::reclaim;
use crate::volume::scrub::Scrub;
use crate::volume::shared::{
    Point, Shared, Vol, VolState, compare, lock, to_publish, unreadable_layer,
};
use crate::volume::space::{Waiting, has_room_for_map, make_room_for_map};
use crate::volume::thin::Thin;

const LOG_DIR: &str = "log";
/// Newest segments whose content is made durable before it is read.
const SYNCED_AT_OPEN: usize = 4;

/// Bytes of overlays that a clean stop reads to make checksums of what was just written.
const SEALED_AT_CLOSE: u64 = 256 << 20;

/// Makes an empty store in a directory.
///
/// # Errors
/// `Exists` if there is a store, `Invalid` for a bad setting, the system's errors.
pub fn create(env: &Environment, settings: &Settings) -> Result<()> {
    if !(SEGMENT_MIN..=SEGMENT_MAX).contains(&settings.segment_bytes) {
        return Err(Error::new(
            Kind::Invalid,
            format!("a segment has {SEGMENT_MIN} to {SEGMENT_MAX} bytes"),
        ));
    }
    let random = || env.clock.random().context(|| "no random bytes for a store");
    let mut secret = [0; 32];
    secret[..16].copy_from_slice(&random()?);
    secret[16..].copy_from_slice(&random()?);
    let superblock = Superblock {
        compat: 0,
        incompat: 0,
        store: Uuid::from_random(random()?),
        secret,
        segment_bytes: settings.segment_bytes,
        created_ns: env.clock.now_ns(),
        sequence: 0,
        open: false,
        invalid: Vec::new(),
    };
    env.dir
        .subdir(LOG_DIR, true)
        .context(|| "cannot create the store's log directory")?;
    // Durable first: a superblock without it says that a log was lost.
    env.dir
        .sync()
        .context(|| "cannot sync the store directory")?;
    // The superblock comes last: a directory with one is a store.
    SuperblockFile::create(env.dir.as_ref(), superblock)?;
    env.dir.sync().context(|| "cannot sync the store directory")
}

/// Opens a store and recovers it.
///
/// # Errors
/// `NotFound` if there is no store, `Unsupported` if it is newer, `Damaged`, `NoSpace`, `Io`.
pub fn open(env: Environment, settings: Settings) -> Result<Arc<Shared>> {
    let mut superblock = SuperblockFile::open(env.dir.as_ref())?;
    let facts = superblock.current().clone();
    let keys = Keys::derive(&facts.secret, facts.store);
    // Never made here: an empty one would be served as a store in which nothing ever was.
    let dir = env.dir.subdir(LOG_DIR, false).map_err(|e| {
        let what = "cannot open the directory log of the store";
        match e.kind() {
            ErrorKind::NotFound => Error::new(
                Kind::Damaged,
                format!("{what}: {e}; bring it back from a copy of the store"),
            ),
            _ => Error::io(what, e),
        }
    })?;
    if !planted(Bug::PredecessorUnsynced) {
        sync_log(dir.as_ref())?;
    }

    let mut replay = recover_log(&env, &settings, dir.as_ref(), &keys, &mut superblock)?;
    for number in replay.scanned.abandoned.drain(..) {
        dir.remove(&segment::file_name(number))
            .context(|| format!("cannot remove the unfinished segment {number}"))?;
    }
    dir.sync().context(|| "cannot sync the log directory")?;
    cut_closed(dir.as_ref(), &replay.scanned)?;
    point("log recovered");

    let config = LogConfig {
        dir,
        store: facts.store,
        keys,
        segment_bytes: facts.segment_bytes,
        clock: Arc::clone(&env.clock),
    };
    let resume = Resume {
        tail: replay.scanned.tail,
        previous: std::mem::take(&mut replay.scanned.previous),
        number_max: replay.scanned.number_max,
    };
    let settings = Settings {
        segment_bytes: facts.segment_bytes,
        ..settings
    };
    let shared = Arc::new(Shared {
        settings,
        store: facts.store,
        log: Log::resume(config, resume),
        map: replay.map,
        map_in_memory: AtomicBool::new(replay.map_in_memory),
        structure: Mutex::new(()),
        superblock: Mutex::new(superblock),
        catalog: Mutex::new(replay.catalog.clone()),
        volumes: RwLock::default(),
        clones: Mutex::new(Clones::new(
            Home::new(Arc::clone(&env.dir)),
            Keys::derive(&facts.secret, facts.store),
        )),
        closed: AtomicBool::new(false),
        checkpointed: Mutex::new((replay.applied_segment, 0)),
        reclaim_due: Mutex::default(),
        segments_due: AtomicBool::new(true),
        sets_since: Mutex::default(),
        idle_lsn: AtomicU64::new(0),
        maintaining: Mutex::new(()),
        waiting: Waiting::default(),
        thin: Thin::default(),
        scrub: Scrub::open(env.dir.as_ref()),
        heal: Heal::default(),
        failure_watch: Mutex::new(None),
        env,
    });
    for id in shared.map.volumes() {
        // Removed, and its records came back with the replay.
        let known = match id.0 & LAYER_BIT {
            0 => replay.catalog.volumes.contains_key(&id.0),
            _ => replay.catalog.layers.contains_key(&(id.0 & !LAYER_BIT)),
        };
        if !known {
            shared.map.forget_volume(id)?;
        }
    }
    for id in shared.map.volumes() {
        // Where their records lie is not known.
        let epochs = shared.map.epochs(id);
        lock(&shared.sets_since).extend(epochs.into_iter().map(|epoch| ((id.0, epoch.0), 0)));
    }
    let clean = replay.catalog.clean && !facts.open;
    mark_open(&shared, true)?;
    for (&id, entry) in &replay.catalog.volumes {
        let vol = open_volume(&shared, id, entry, clean)?;
        insert_volume(&shared, vol);
    }
    apply_marks(&shared);
    if !shared.has_ballast() {
        shared.log.set_keep_free(shared.settings.ballast_bytes);
    }
    // Ends the old log and begins the new one, durably, before anything is served.
    match shared.append_records(Vec::new()) {
        Err(e) if e.kind() == Kind::NoSpace => {
            tracing::error!(
                "the store's disk is full, nothing can be preserved: {}",
                e.chain()
            );
        }
        done => drop(done?),
    }
    let settled = clean && !replay.catalog.unsettled;
    shared.recover_clones(settled, !replay.lost.is_empty())?;
    note_losses(&shared, &replay.lost)?;
    if let Err(e) = shared.adopt_marks() {
        tracing::warn!("marks of failure stay in the superblock: {}", e.chain());
    }
    for &id in replay.catalog.volumes.keys() {
        finish_begun(&shared, id);
    }
    for &id in replay.catalog.volumes.keys() {
        // A deletion just before the stop may not have been followed by its reclaim.
        shared.mark_reclaim(id);
    }
    if replay.map_in_memory
        && let Err(e) = shared.env.index.discard()
    {
        // What is on disk gets older from here on, and its space is wanted.
        tracing::warn!("an old extent map stays on disk: {}", e.chain());
    }
    if replay.rebuilt
        && let Err(e) = reclaim::checkpoint(&shared)
    {
        // The map is complete in memory; the next checkpoint tries again.
        tracing::warn!("the rebuilt map is not yet durable: {}", e.chain());
    }
    Ok(shared)
}

/// Finishes a resize or revert that was begun. What cannot be finished now leaves the volume's live
/// content unserved, and is tried again when the store is opened again.
fn finish_begun(shared: &Arc<Shared>, id: u32) {
    let entry = lock(&shared.catalog).volumes.get(&id).cloned();
    let (Some(vol), Some(entry)) = (shared.vol(id), entry) else {
        return;
    };
    let live = Volume {
        shared: Arc::clone(shared),
        vol,
    };
    if let Some(to) = entry.resizing {
        let ready = live.can_finish();
        match ready.inspect_err(|e| live.resize_unfinished(to, e)) {
            Ok(()) => drop(live.finish_resize(to)),
            Err(_) => return,
        }
    }
    if let Some(begun) = entry.reverting {
        match live.can_finish() {
            Ok(()) => match live.finish_revert(begun) {
                Ok(_) => tracing::info!(volume = id, "an unfinished revert is finished"),
                Err(e) => tracing::error!(volume = id, "an unfinished revert: {}", e.chain()),
            },
            Err(e) => live.revert_unfinished(begun, &e),
        }
    }
}

/// Notes in the superblock, which always has room, whether the store is open.
fn mark_open(shared: &Shared, open: bool) -> Result<()> {
    let mut superblock = lock(&shared.superblock);
    let next = superblock.current().clone();
    let incompat = next.incompat | INCOMPAT_SUMS;
    superblock.update(Superblock {
        open,
        incompat,
        ..next
    })
}

/// Puts a volume among the served ones.
pub fn insert_volume(shared: &Shared, vol: Arc<Vol>) {
    let mut volumes = shared
        .volumes
        .write()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    volumes.insert(vol.id, vol);
}

/// A killed predecessor's bytes may only be in the page cache: what is read below must not vanish
/// with a power cut after it was acted upon. What a sync of the predecessor's failed on is clean in the
/// cache, so that a sync now says nothing about it: it is forgotten, and what is read is what the
/// medium has.
fn sync_log(dir: &dyn Dir) -> Result<()> {
    let context = || "cannot make the log durable";
    let names = dir.list().context(context)?;
    let mut numbers: Vec<u32> = names.iter().filter_map(|n| segment::number(n)).collect();
    numbers.sort_unstable();
    // Older segments were made durable batch by batch, and nothing goes into them after a roll. The
    // newest files may be creations cut short, so more than the last one are taken.
    for number in numbers.into_iter().rev().take(SYNCED_AT_OPEN) {
        let disk = dir
            .open(&segment::file_name(number), Open::Write)
            .context(context)?;
        disk.sync_data().context(context)?;
        disk.drop_cache().context(context)?;
    }
    dir.sync().context(context)
}

struct Replay {
    map: ExtentMap,
    map_in_memory: bool,
    catalog: Catalog,
    scanned: Scanned,
    lost: Vec<Lost>,
    rebuilt: bool,
    applied_segment: u32,
}

/// Batches that cannot be read any more, and who was there when they were written.
struct Lost {
    first: Lsn,
    last: Lsn,
    /// (volume, first epoch, last epoch) of the snapshots and bookmarks that existed then.
    snapshots: Vec<(u32, u64, u64)>,
    /// The clones that existed then.
    clones: BTreeSet<u32>,
}

impl Lost {
    /// Lost while this was the catalogue.
    fn of(catalog: &Catalog, first: Lsn, last: Lsn) -> Lost {
        let volumes = catalog.volumes.iter();
        let snapshots = volumes.filter_map(|(&id, v)| {
            let (first, last) = v.lost_span()?;
            Some((id, first, last))
        });
        Lost {
            first,
            last,
            snapshots: snapshots.collect(),
            clones: catalog.clones.keys().copied().collect(),
        }
    }
}

fn recover_log(
    env: &Environment,
    settings: &Settings,
    dir: &dyn Dir,
    keys: &Keys,
    superblock: &mut SuperblockFile,
) -> Result<Replay> {
    let store = superblock.current().store;
    match open_map(env, settings, store) {
        Ok((map, _, Some(applied))) => {
            match replay(env, dir, (keys, store), settings, map, Some(applied))? {
                Fit::Whole(replay) => return Ok(*replay),
                Fit::Not => tracing::warn!("the extent map does not fit the log; rebuilding it"),
                Fit::Leads(catalog, lost) => {
                    // Durable before the map goes, which alone shows that something is lost.
                    let (first, last) = (lost.first.0, lost.last.0);
                    tracing::error!("batches {first} to {last}, the end of the log, are lost");
                    marks::mark_before_open(superblock, &catalog, &failures_of(&catalog, &lost))?;
                }
            }
        }
        Ok((map, map_in_memory, None)) => {
            // An empty map: a new store, or one whose map was removed or found no room.
            let replayed = replay(env, dir, (keys, store), settings, map, None)?;
            return replayed.whole(map_in_memory);
        }
        Err(e) if e.kind() == Kind::Damaged => {
            tracing::warn!(
                "the extent map cannot be used; rebuilding it: {}",
                e.chain()
            );
        }
        // A full disk or a lack of descriptors says nothing against the map.
        Err(e) => return Err(e),
    }
    env.index.set_aside()?;
    let (map, map_in_memory, _) = open_map(env, settings, store)?;
    replay(env, dir, (keys, store), settings, map, None)?.whole(map_in_memory)
}

/// What came of a map and the log together.
enum Fit {
    Whole(Box<Replay>),
    /// The map is to be made again.
    Not,
    /// The map is to be made again, and it has taken in batches that the log does not have any more. The
    /// catalogue is the last one that is known.
    Leads(Box<Catalog>, Lost),
}

impl Fit {
    fn whole(self, map_in_memory: bool) -> Result<Replay> {
        match self {
            Fit::Whole(replay) => Ok(Replay {
                map_in_memory,
                ..*replay
            }),
            _ => Err(Error::new(Kind::Damaged, "the log has no beginning")),
        }
    }
}

/// The map, whether it is one in memory only, and how far it has come.
fn open_map(
    env: &Environment,
    settings: &Settings,
    store: Uuid,
) -> Result<(ExtentMap, bool, Option<Applied>)> {
    make_room_for_map(env);
    let opened = env
        .index
        .open()
        .and_then(|index| ExtentMap::open(index, settings.map_cache_bytes));
    let mut in_memory = false;
    let map = match opened {
        // sled writes when it is opened, and what it says of a disk without room differs.
        Err(e) if e.kind() == Kind::NoSpace || !has_room_for_map(env, 0) => {
            tracing::error!(
                "the disk is too full for the extent map ({}); it is made in memory, from all of the log",
                e.chain()
            );
            in_memory = true;
            let index = Arc::new(TransientIndex::default());
            ExtentMap::open(index, settings.map_cache_bytes)?
        }
        opened => opened?,
    };
    let applied = map.applied();
    if applied.is_some_and(|a| a.store != store) {
        return Err(Error::new(
            Kind::Damaged,
            "the extent map belongs to another store",
        ));
    }
    Ok((map, in_memory, applied))
}

/// Scans the log from where the map ends.
fn replay(
    env: &Environment,
    dir: &dyn Dir,
    (keys, store): (&Keys, Uuid),
    settings: &Settings,
    map: ExtentMap,
    applied: Option<Applied>,
) -> Result<Fit> {
    let from_segment = applied.map_or(0, |a| a.segment);
    let applied_lsn = applied.map_or(Lsn(0), |a| a.lsn);
    let scan = Scan {
        dir,
        keys,
        store,
        from_segment,
    };
    let mut catalog = Catalog::default();
    // Every segment begins with a CATALOG. Before one was read, records have nothing to apply to.
    let mut have_catalog = false;
    let mut lost: Vec<Lost> = Vec::new();
    let mut unreadable: BTreeMap<u32, Lsn> = BTreeMap::new();
    let (mut scanned_segment, mut adjoins) = (u32::MAX, false);
    let scanned = scan.run(&mut |event| match event {
        Event::Batch {
            lsn,
            place,
            end,
            records,
            ..
        } => {
            for record in records {
                if let Some(layer) = unreadable_layer(record) {
                    tracing::error!(layer, ?lsn, "a BITMAP of a layer cannot be read");
                    unreadable.insert(layer, lsn);
                }
                if record.kind == RecordType::Catalog {
                    match read_catalog(dir, keys, record, place)? {
                        Some(read) => {
                            if let Some(loss) = lost.last_mut() {
                                // What was made in what was lost is first heard of here.
                                let known = |id: &u32| catalog.clones.contains_key(id);
                                let made = read.clones.keys().filter(|id| !known(id));
                                loss.clones.extend(made.copied());
                                loss.snapshots.extend(first_heard_of(&catalog, &read));
                            }
                            catalog = read;
                            have_catalog = true;
                        }
                        // The one before, with what was applied since, is as good, if no segment
                        // between the two is gone.
                        None if adjoins => {}
                        None => have_catalog = false,
                    }
                } else if have_catalog {
                    catalog.apply(record)?;
                }
            }
            // One too many is left out.
            let short = planted(Bug::ReplayShort) && lsn.0 == applied_lsn.0 + 1;
            if lsn > applied_lsn && !short {
                let unread = |r: &&Record| planted(Bug::IntentUnread) && r.is_intent();
                map.publish(
                    records
                        .iter()
                        .filter(|r| !unread(r))
                        .filter_map(|r| to_publish(r, place))
                        .collect(),
                );
                // Not once something was found lost: recovery must find it again until it is noted.
                // Without room all of it stays in memory until there is some.
                if lost.is_empty()
                    && unreadable.is_empty()
                    && map.pending() > settings.map_cache_bytes
                    && has_room_for_map(env, map.pending())
                {
                    let segment = place.segment;
                    map.checkpoint(Applied {
                        store,
                        lsn,
                        segment,
                        offset: end,
                    })?;
                }
            }
            Ok(())
        }
        Event::Segment { number, before } => {
            adjoins = before == scanned_segment;
            scanned_segment = number;
            Ok(())
        }
        Event::Lost {
            first,
            last,
            segment,
            bytes,
        } => {
            tracing::error!(
                ?first,
                ?last,
                segment,
                ?bytes,
                "batches of the log are damaged"
            );
            lost.push(Lost::of(&catalog, first, last));
            Ok(())
        }
    })?;
    for (layer, lsn) in unreadable {
        let clones = catalog.clones.iter();
        let clones =
            clones.filter(|(_, c)| catalog.chain(c.top).iter().any(|&(id, _)| id == layer));
        lost.push(Lost {
            first: lsn,
            last: lsn,
            snapshots: Vec::new(),
            clones: clones.map(|(&id, _)| id).collect(),
        });
    }
    if !have_catalog && scanned.number_max > 0 {
        return Ok(Fit::Not);
    }
    if let Some(applied) = applied.filter(|a| a.lsn.0 > scanned.tail.lsn) {
        if !have_catalog {
            // Nothing is known of what there was: what was written to clones must not go as nobody's.
            return Err(Error::new(
                Kind::Damaged,
                format!(
                    "the log is gone: no segment is in log/, and the extent map knows of {} batches; \
                     bring the segments back from a copy of the store",
                    applied.lsn.0
                ),
            ));
        }
        let lost = Lost::of(&catalog, Lsn(scanned.tail.lsn + 1), applied.lsn);
        return Ok(Fit::Leads(Box::new(catalog), lost));
    }
    let rebuilt = applied.is_none() && scanned.tail.lsn > 0;
    let applied_segment = from_segment;
    Ok(Fit::Whole(Box::new(Replay {
        map,
        map_in_memory: false,
        catalog,
        scanned,
        lost,
        rebuilt,
        applied_segment,
    })))
}

/// Snapshots and bookmarks, each as (volume, epoch, epoch), that a catalogue has and the one before
/// it, after which a part of the log is lost, has not.
fn first_heard_of(before: &Catalog, read: &Catalog) -> Vec<(u32, u64, u64)> {
    let mut made = Vec::new();
    for (&id, volume) in &read.volumes {
        let known = before.volumes.get(&id);
        let epochs = volume.snapshots.keys().chain(volume.kept.keys());
        for &epoch in epochs.chain(volume.bookmarks.keys()) {
            if !known.is_some_and(|known| known.has_epoch(epoch)) {
                made.push((id, epoch, epoch));
            }
        }
    }
    made
}

/// The catalogue in a CATALOG's payload; `None` if it is damaged (an older one then stands, and what
/// followed it was applied).
pub fn read_catalog(
    dir: &dyn Dir,
    keys: &Keys,
    record: &Record,
    batch: Place,
) -> Result<Option<Catalog>> {
    let place = record.place(batch);
    let disk = dir
        .open(&segment::file_name(place.segment), Open::Read)
        .context(|| format!("cannot open segment {}", place.segment))?;
    let mut payload = vec![0; record.payload.len as usize];
    disk.read_exact_at(place.offset(), &mut payload)
        .context(|| "cannot read a catalogue")?;
    if keys.payload_sums(&payload, record.unit()) != record.body {
        tracing::error!(
            ?place,
            "a catalogue in the log is damaged; an older one is used"
        );
        return Ok(None);
    }
    Catalog::decode(&payload).map(Some)
}

/// Gives back what was written ahead in closed segments. The last one keeps it: if there is no space
/// for another, the log goes on there.
///
/// The name of a last one without a batch may not be durable: when a power cut takes it, the end of
/// the one before is known by its size alone, so that is made durable.
fn cut_closed(dir: &dyn Dir, scanned: &Scanned) -> Result<()> {
    for &(number, end) in scanned.closed.iter().filter(|(number, _)| *number > 0) {
        let context = || format!("cannot cut segment {number} to its end");
        let disk = dir
            .open(&segment::file_name(number), Open::Write)
            .context(context)?;
        if disk.size().context(context)? > end && !planted(Bug::TailKept) {
            match disk.set_size(end) {
                // Where even that needs space, what is behind the end stays.
                Err(e) if e.kind() == ErrorKind::StorageFull => {
                    tracing::warn!("{}: {e}", context());
                }
                done => done.context(context)?,
            }
        }
        if scanned.tail.end == BATCHES_AT {
            disk.sync_data().context(context)?;
        }
    }
    match scanned.tail.segment {
        0 => Ok(()),
        last => settle(dir, last, scanned.tail.end)
            .context(|| format!("cannot end segment {last} of the thin target")),
    }
}

/// Opens a volume's source and compares it with what was left.
fn open_volume(shared: &Shared, id: u32, entry: &VolumeEntry, clean: bool) -> Result<Arc<Vol>> {
    let opened = shared.env.sources.open(&entry.source);
    let vol = Vol::new(id, entry, opened.as_ref().ok().cloned());
    let mut state = vol.state();
    for (&epoch, snap) in &entry.snapshots {
        match &snap.state {
            SnapshotState::Active => drop(state.points.insert(epoch, Point::Listed)),
            SnapshotState::Failed(why) => drop(state.failed.insert(epoch, why.clone())),
        }
    }
    let good = |(&epoch, mark): (&u64, &BookmarkEntry)| {
        (mark.state == SnapshotState::Active).then_some(epoch)
    };
    state.bookmarks = entry.bookmarks.iter().filter_map(good).collect();
    for (&epoch, snap) in &entry.kept {
        match &snap.state {
            SnapshotState::Active => drop(state.points.insert(epoch, Point::Kept)),
            SnapshotState::Failed(why) => drop(state.failed.insert(epoch, why.clone())),
        }
    }
    vol.refresh(&shared.map, &mut state);
    let now = shared.env.clock.now_ns();
    if !clean {
        // An unclean stop counts as a change.
        state.note_change(now);
    }
    match opened {
        Err(e) => {
            tracing::error!("volume {}: {}", entry.name, e.chain());
            state.health = VolumeState::Missing(e.chain());
            if !clean && state.trust == Trust::Known {
                state.trust = Trust::Unverified;
            }
            if shared.settings.copied && entry.depended_on() {
                // It cannot be compared now, and next time the store counts as at home.
                state.trust = Trust::Changed;
            }
        }
        Ok(source) => {
            let found = source
                .identity()
                .context(|| format!("cannot stat {}", entry.source))?;
            judge(
                &mut state,
                entry,
                &found,
                (clean, shared.settings.copied),
                now,
            );
            if entry.allows(&found) && !is_device(&found) {
                // Other than the volume's while a resize or revert is unfinished: what lies behind
                // the end of the file reads as zero for snapshots.
                vol.set_size(found.size);
            }
            if !entry.depended_on() {
                // Nothing depends on what it was: from here on it is this one.
                if let Some(known) = lock(&shared.catalog).volumes.get_mut(&id) {
                    known.identity = found;
                }
            }
            // What a killed predecessor left in the page cache is made durable, and what a failed sync
            // left there is forgotten, so that what is read is what the medium has.
            let forget = || if clean { Ok(()) } else { source.drop_cache() };
            let settle = || match planted(Bug::PredecessorUnsynced) {
                true => Ok(()),
                false => source.sync_data(),
            };
            if let Err(e) = settle().and_then(|()| forget()) {
                tracing::error!("volume {}: cannot sync the source: {e}", entry.name);
                if matches!(state.health, VolumeState::Active | VolumeState::Unverified) {
                    state.health = VolumeState::Suspect(e.to_string());
                }
            }
        }
    }
    drop(state);
    Ok(Arc::new(vol))
}

/// Sets a volume's state from what its source was and is.
fn judge(
    state: &mut VolState,
    entry: &VolumeEntry,
    found: &Identity,
    (clean, copied): (bool, bool),
    now: i64,
) {
    // A device has no change time to compare.
    let comparable = clean && entry.identity.ctime_ns != 0;
    let allowed = entry.allows(found);
    let same = if allowed {
        let size = entry.identity.size;
        compare(&entry.identity, &Identity { size, ..*found }, comparable)
    } else {
        compare(&entry.identity, found, comparable)
    };
    if !entry.depended_on() && allowed {
        // Nothing depends on the old content; but a backup that compares times has to see it.
        if same.is_err() || !comparable {
            state.note_change(now);
        }
        state.trust = Trust::Known;
        state.health = VolumeState::Active;
        return;
    }
    let same = same.and_then(|()| match allowed {
        true => Ok(()),
        false => Err(format!(
            "it has {} bytes and the volume {}",
            found.size, entry.size
        )),
    });
    let same = same.and_then(|()| match copied && !comparable {
        true => Err("the store is a copy, and the original may have written since".to_owned()),
        false => Ok(()),
    });
    if let Err(why) = same {
        tracing::error!(
            "volume {}: the source is not as it was left: {why}",
            entry.name
        );
        state.health = VolumeState::Changed(why);
        state.trust = Trust::Changed;
    } else if !comparable && state.health == VolumeState::Active {
        state.note_change(now);
        state.health = VolumeState::Unverified;
        state.trust = Trust::Unverified;
    }
}

/// Lost records may have said anything: every snapshot, bookmark and clone that existed then fails. If
/// neither the log nor the superblock has room to say so, the store does not open until there is some:
/// served without it, the next checkpoint of the map would pass over the loss.
fn note_losses(shared: &Shared, lost: &[Lost]) -> Result<()> {
    let catalog = lock(&shared.catalog).clone();
    let failures: Vec<Failure> = lost.iter().flat_map(|l| failures_of(&catalog, l)).collect();
    shared.fail_all(&failures)
}

/// What has failed by a loss, of what a catalogue has.
fn failures_of(catalog: &Catalog, loss: &Lost) -> Vec<Failure> {
    let why = format!(
        "log batches {} to {} are damaged",
        loss.first.0, loss.last.0
    );
    let spans = loss.snapshots.iter();
    let spans = spans.filter(|(volume, ..)| catalog.volumes.contains_key(volume));
    let points = spans.map(|&(volume, first, last)| Failure {
        volume,
        first,
        last,
        why: why.clone(),
    });
    let clones = loss.clones.iter();
    let clones = clones.filter(|id| catalog.clones.contains_key(id));
    points
        .chain(clones.map(|&id| Failure::of_clone(id, &why)))
        .collect()
}

/// Clean stop; see [`crate::volume::Engine::close`].
///
/// # Errors
/// The first error; the store is then unclean, nothing is lost. Only the sync of a clone may fail and
/// leave it clean.
pub fn close(shared: &Shared) -> Result<()> {
    let _structure = lock(&shared.structure);
    if shared.closed.load(Ordering::Acquire) {
        return Ok(());
    }
    reclaim::drain(shared);
    let _maintaining = lock(&shared.maintaining);
    let vols: Vec<Arc<Vol>> = {
        let volumes = shared
            .volumes
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        volumes.values().cloned().collect()
    };
    for vol in vols.iter().filter(|v| v.source.is_some()) {
        if planted(Bug::CleanEarly) {
            continue;
        }
        crate::volume::live::flush(vol)?;
        // The catalogue is about to say when the source last changed. A flush does not keep that over
        // a power cut, and a source with an older time would count as somebody else's.
        vol.source()?
            .sync_all()
            .context(|| format!("cannot make {} durable", vol.source_path))?;
    }
    // Before the catalogue: whatever follows it makes the store unclean.
    shared.complete_epochs();
    shared.refine()?;
    let (settled, flushed) = shared.flush_clones();
    shared.seal_layers(0, SEALED_AT_CLOSE);
    let catalog = Catalog {
        unsettled: !settled,
        ..shared.clean_catalog()?
    };
    let catalog = catalog.encode();
    let entry = || {
        shared
            .log
            .document(RecordType::Catalog, 0, 0, catalog.clone())
    };
    match shared.append(vec![entry()]) {
        Err(e) if e.kind() == Kind::NoSpace && shared.release_ballast() => {
            shared.append(vec![entry()])?;
        }
        done => drop(done?),
    }
    shared.log.seal(shared)?;
    shared.map_to_disk(true);
    reclaim::checkpoint(shared)?;
    mark_open(shared, false)?;
    flushed
}
