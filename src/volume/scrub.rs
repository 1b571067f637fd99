//! The scrub: reads all preserved content, slowly, and mends what has a good copy.
//!
//! Promises: it keeps to a rate and gives way to writers; its position and what it found outlive the
//! process (the file `scrub` of the store, which counts for nothing else and may be removed); a damaged
//! grain is overwritten only in place of bytes that do not match their checksum, by bytes that do (from
//! the source, another epoch's record, or a clone), so being cut off in the middle leaves it no worse.
//! What cannot be mended stays and is named: reads of it answer an error, everything else is read.
//!
//! What is known damaged is listed as long as a snapshot or clone needs it: deleting those ends it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::{Error, IoContext, Kind, Result};
use crate::map::ExtentMap;
use crate::map::extents::Region;
use crate::sys::disk::{Dir, Open};
use crate::units::{Grain, Name, VOLUME_SIZE_MAX, VolumeId};
use crate::volume::audit::{Finding, Severity};
use crate::volume::catalog::Catalog;
use crate::volume::clone_records::LAYER_BIT;
use crate::volume::engine::Engine;
use crate::volume::layers::Layer;
use crate::volume::shared::{Shared, Vol, lock};
use crate::volume::verify::{self, Bad, Points, Rot, Share, Walk, points_of};

const FILE: &str = "scrub";
const NEW_FILE: &str = "scrub.new";
/// How often the position is written.
const SAVE: Duration = Duration::from_secs(10);
/// Most damaged grains that are remembered.
const KNOWN_MAX: usize = 10_000;
/// Largest state that is read.
const FILE_MAX: u64 = 8 << 20;
/// The pause after a piece while writers are at work.
const GIVE_WAY: Duration = Duration::from_millis(10);

/// What a scrub is to do.
#[derive(Debug, Clone)]
pub struct ScrubOptions {
    /// Only of this volume.
    pub volume: Option<Name>,
    /// How many of the grains, in hundredths.
    pub percent: u32,
    /// Bytes a second; 0 for as fast as it goes.
    pub rate: u64,
    /// Mend what has a good copy.
    pub repair: bool,
    /// From the beginning, also if an earlier one was cut off.
    pub restart: bool,
}

/// How the last scrub went, or how far the running one is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubState {
    /// One is running in this process.
    #[serde(skip)]
    pub running: bool,
    /// When it began, ns since 1970.
    pub started_ns: i64,
    /// When one last came to its end, ns since 1970; 0 if none did.
    pub finished_ns: i64,
    /// Where it goes on: volume and region of 4096 grains; `None` when it is done.
    pub position: Option<(u32, u64)>,
    /// The volume it was limited to.
    pub only: Option<u32>,
    /// Share of the grains, in hundredths.
    pub percent: u32,
    /// Chooses the share.
    pub seed: u64,
    /// Grains that were read.
    pub grains: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// Grains that some snapshot needs.
    pub needed: u64,
    /// Damaged grains that were found.
    pub found: u64,
    /// Damaged grains that were mended.
    pub mended: u64,
    /// What is damaged now.
    known: Vec<Known>,
}

impl ScrubState {
    /// For whoever is told how far it is, who may take his time: without what is damaged.
    fn told(&mut self) -> ScrubState {
        let known = std::mem::take(&mut self.known);
        let told = self.clone();
        self.known = known;
        told
    }
}

/// A damaged grain, as the record that holds it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Known {
    volume: u32,
    epoch: u64,
    before: Option<u64>,
    grain: u64,
    /// When the scrub began in which it was last seen, by it or by a reader.
    #[serde(default)]
    seen: i64,
}

impl Known {
    fn is(&self, other: &Known) -> bool {
        (self.volume, self.grain) == (other.volume, other.grain)
            && (self.epoch, self.before) == (other.epoch, other.before)
    }
}

/// See the head of the file.
#[derive(Default)]
pub struct Scrub {
    state: Mutex<ScrubState>,
    running: AtomicBool,
}

impl Scrub {
    /// What an earlier process left; nothing, if that cannot be read.
    pub fn open(dir: &dyn Dir) -> Scrub {
        let read = || -> std::io::Result<ScrubState> {
            let disk = dir.open(FILE, Open::Read)?;
            let size = disk.size()?.min(FILE_MAX);
            let mut bytes = vec![0; size as usize];
            disk.read_exact_at(0, &mut bytes)?;
            serde_json::from_slice(&bytes).map_err(std::io::Error::other)
        };
        let state = match read() {
            Ok(state) => state,
            Err(e) if e.kind() == ErrorKind::NotFound => ScrubState::default(),
            Err(e) => {
                tracing::warn!("the state of the last scrub cannot be read: {e}");
                ScrubState::default()
            }
        };
        Scrub {
            state: Mutex::new(state),
            running: AtomicBool::new(false),
        }
    }

    /// A reader met a damaged grain of a snapshot.
    pub fn note(&self, volume: u32, epoch: u64, grain: u64) {
        self.remember(Known {
            volume,
            epoch,
            // Of this snapshot and no other: what else needs it is found by a scrub.
            before: epoch.checked_sub(1),
            grain,
            seen: 0,
        });
    }

    fn remember(&self, known: Known) {
        let mut state = lock(&self.state);
        let seen = state.started_ns;
        if let Some(known) = state.known.iter_mut().find(|k| k.is(&known)) {
            known.seen = seen;
        } else if state.known.len() < KNOWN_MAX {
            state.known.push(Known { seen, ..known });
        }
    }

    /// A record is good again, so whatever it serves is.
    fn forget(&self, bad: &Bad) {
        let serves = |epoch: u64| epoch <= bad.epoch && bad.before.is_none_or(|b| epoch > b);
        let is = |k: &Known| (k.volume, k.grain) == (bad.volume, bad.grain) && serves(k.epoch);
        lock(&self.state).known.retain(|k| !is(k));
    }

    /// A scrub has read all of these volumes: what it did not find damaged is good, as after an error
    /// that passed, or where a clone was written anew. `layers` are those of the volumes.
    fn forget_unseen(&self, only: Option<u32>, layers: &BTreeSet<u32>) {
        let mut state = lock(&self.state);
        let seen = state.started_ns;
        let concerned = |k: &Known| match k.volume & LAYER_BIT {
            0 => only.is_none_or(|o| o == k.volume),
            _ => layers.contains(&(k.volume & !LAYER_BIT)),
        };
        state.known.retain(|k| k.seen == seen || !concerned(k));
    }
}

/// Whoever holds it is the only one.
struct Running<'a>(&'a AtomicBool);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Keeps to a rate, and gives way.
struct Pace<'a> {
    shared: &'a Shared,
    rate: u64,
    began: Instant,
    bytes: u64,
    lsn: u64,
    saved: Instant,
}

impl Pace<'_> {
    fn after(&mut self, bytes: u64) -> Result<()> {
        self.shared.check_open()?;
        self.bytes += bytes;
        let lsn = self.shared.log.durable_lsn().0;
        if self.rate > 0 {
            let due = Duration::from_secs_f64(self.bytes as f64 / self.rate as f64);
            // In short pieces, so that a stop does not wait.
            while let Some(left) = due.checked_sub(self.began.elapsed()) {
                std::thread::sleep(left.min(Duration::from_millis(50)));
                self.shared.check_open()?;
            }
            if lsn != self.lsn {
                std::thread::sleep(GIVE_WAY);
            }
        }
        self.lsn = lsn;
        Ok(())
    }
}

impl Shared {
    /// What the scrub knows, for status.
    pub fn scrub_state(&self) -> ScrubState {
        let mut state = lock(&self.scrub.state).clone();
        state.running = self.scrub.running.load(Ordering::Acquire);
        state
    }

    /// What is known damaged and still needed, by name.
    pub fn known_damage(&self) -> Vec<Finding> {
        let catalog = lock(&self.catalog).clone();
        let points = points_of(&catalog);
        let mut known = lock(&self.scrub.state).known.clone();
        known.sort_unstable_by_key(|k| (k.volume, k.grain, k.epoch));
        let mut rot = Rot::default();
        let mut gone = Vec::new();
        let of_layers = known_in_layers(&catalog, &known, &mut gone);
        for k in known.into_iter().filter(|k| k.volume & LAYER_BIT == 0) {
            if points.get(&k.volume).is_some_and(|p| !fits(&k, p.grain)) {
                gone.push(k);
                continue;
            }
            let bad = Bad {
                volume: k.volume,
                epoch: k.epoch,
                before: k.before,
                grain: k.grain,
                place: crate::units::Place {
                    segment: 0,
                    block: 0,
                },
                sum: 0,
                why: "it does not match its checksum, or the medium does not give it".into(),
                twins: Vec::new(),
            };
            let of = Rot::of(&points, &[bad]);
            match of.is_empty() {
                true => gone.push(k),
                false => rot.merge(&of),
            }
        }
        if !gone.is_empty() {
            // Whoever needed it was deleted.
            lock(&self.scrub.state).known.retain(|k| !gone.contains(k));
        }
        rot.findings().chain(of_layers).collect()
    }

    fn save_scrub(&self) {
        let state = lock(&self.scrub.state).clone();
        let write = || -> Result<()> {
            let context = || "cannot keep the scrub's position";
            let bytes = serde_json::to_vec(&state)
                .map_err(|e| Error::with_source(Kind::Failed, context(), e))?;
            let dir = &self.env.dir;
            match dir.remove(NEW_FILE) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(e).context(context),
                _ => {}
            }
            let disk = dir.open(NEW_FILE, Open::Create).context(context)?;
            disk.write_all_at(0, &[&bytes])
                .and_then(|()| disk.sync_data())
                .and_then(|()| dir.rename(NEW_FILE, FILE))
                .and_then(|()| dir.sync())
                .context(context)
        };
        if let Err(e) = write() {
            tracing::warn!("{}", e.chain());
        }
    }

    /// Scrubs; goes on where one that was cut off was. `news` is told grains and bytes read so far.
    ///
    /// # Errors
    /// `Busy` while another runs, `NotFound`, `Interrupted` when the store is closed (the position
    /// is kept), those of the map.
    pub fn scrub(
        &self,
        options: &ScrubOptions,
        news: &mut dyn FnMut(&ScrubState),
    ) -> Result<ScrubState> {
        let only = match &options.volume {
            Some(name) => Some(self.find(name)?.id),
            None => None,
        };
        if self.scrub.running.swap(true, Ordering::AcqRel) {
            return Err(Error::new(Kind::Busy, "a scrub is under way already"));
        }
        let _running = Running(&self.scrub.running);
        let complete = self.begin(options, only)?;
        let mut pace = Pace {
            shared: self,
            rate: options.rate,
            began: Instant::now(),
            bytes: 0,
            lsn: self.log.durable_lsn().0,
            saved: Instant::now(),
        };
        let done = self
            .scrub_regions(options, only, &mut pace, news)
            .and_then(|()| self.scrub_layers(options, only, &mut pace, news));
        if done.is_ok() {
            if complete && options.percent >= 100 {
                let catalog = lock(&self.catalog).clone();
                let layers = catalog.layers.iter();
                let layers = layers.filter(|(_, l)| only.is_none_or(|o| o == l.volume));
                let layers = layers.map(|(&id, _)| id).collect();
                self.scrub.forget_unseen(only, &layers);
            }
            let mut state = lock(&self.scrub.state);
            state.position = None;
            state.finished_ns = self.env.clock.now_ns();
        }
        self.save_scrub();
        done?;
        let state = self.scrub_state();
        tracing::info!(
            grains = state.grains,
            found = state.found,
            mended = state.mended,
            "a scrub came to its end"
        );
        Ok(ScrubState {
            running: false,
            ..state
        })
    }

    /// Whether all that is preserved by now is where it will look.
    fn begin(&self, options: &ScrubOptions, only: Option<u32>) -> Result<bool> {
        let random = self.env.clock.random().context(|| "no random bytes")?;
        let seed = u64::from_le_bytes(random[..8].try_into().expect("eight bytes"));
        let mut state = lock(&self.scrub.state);
        let same = state.only == only && state.percent == options.percent;
        if options.restart || !same || state.position.is_none() {
            *state = ScrubState {
                started_ns: self.env.clock.now_ns(),
                finished_ns: state.finished_ns,
                position: Some((only.unwrap_or(0), 0)),
                only,
                percent: options.percent,
                seed,
                known: std::mem::take(&mut state.known),
                ..ScrubState::default()
            };
        }
        drop(state);
        // What the newest checkpoint does not have yet is read the next time.
        let _maintaining = lock(&self.maintaining);
        self.check_open()?;
        self.healing(ExtentMap::check_sets)?;
        match crate::volume::reclaim::checkpoint(self) {
            Err(e) if e.kind() == Kind::Damaged => self.heal_map(&e).map(|()| true),
            Err(e) if e.kind() == Kind::NoSpace => Ok(false),
            done => done.map(|()| true),
        }
    }

    fn scrub_regions(
        &self,
        options: &ScrubOptions,
        only: Option<u32>,
        pace: &mut Pace<'_>,
        news: &mut dyn FnMut(&ScrubState),
    ) -> Result<()> {
        loop {
            let (position, seed) = {
                let state = lock(&self.scrub.state);
                (state.position.unwrap_or((0, 0)), state.seed)
            };
            let found = self.healing(|map| map.region_from(VolumeId(position.0), position.1))?;
            let Some(Region {
                volume,
                region,
                pages,
            }) = found
            else {
                return Ok(());
            };
            if only.is_some_and(|only| only != volume.0) {
                return Ok(());
            }
            let points = points_of(&lock(&self.catalog).clone());
            let walk = Walk {
                map: &self.map,
                volumes: &points,
                keys: self.log.keys(),
                read: &|place, buf| self.log.read(place, buf),
                share: Share(options.percent),
                seed,
            };
            let (counts, bad) =
                walk.region(volume, region, &pages, &mut |bytes| pace.after(bytes))?;
            for bad in bad {
                self.judge(&bad, &points, options.repair)?;
            }
            let told = {
                let mut state = lock(&self.scrub.state);
                state.grains += counts.read;
                state.bytes += counts.bytes;
                state.needed += counts.needed;
                state.position = Some((volume.0, region + 1));
                state.told()
            };
            news(&told);
            if pace.saved.elapsed() >= SAVE {
                self.save_scrub();
                pace.saved = Instant::now();
            }
        }
    }

    /// What lies in clones, where it has checksums. What is damaged there has no other copy.
    fn scrub_layers(
        &self,
        options: &ScrubOptions,
        only: Option<u32>,
        pace: &mut Pace<'_>,
        news: &mut dyn FnMut(&ScrubState),
    ) -> Result<()> {
        let volumes: Vec<(u32, u64)> = {
            let catalog = lock(&self.catalog);
            let all = catalog.volumes.iter();
            all.map(|(&id, v)| (id, v.grain.bytes())).collect()
        };
        let seed = lock(&self.scrub.state).seed;
        for (volume, grain) in volumes {
            if only.is_some_and(|only| only != volume) {
                continue;
            }
            let layers = lock(&self.clones).layers_of(volume);
            for layer in layers {
                let used = layer.overlay.has_open_files();
                let done = self.scrub_layer((&layer, grain, seed), options, pace, news);
                if !used {
                    // Clones that nobody has open hold no descriptors.
                    layer.overlay.close_files_again();
                }
                done?;
            }
        }
        Ok(())
    }

    fn scrub_layer(
        &self,
        (layer, grain, seed): (&Layer, u64, u64),
        options: &ScrubOptions,
        pace: &mut Pace<'_>,
        news: &mut dyn FnMut(&ScrubState),
    ) -> Result<()> {
        let held = lock(&layer.set).clone();
        let mut content = vec![0; grain as usize];
        for g in held.ranges().flatten() {
            if !Share(options.percent).takes_grain(seed, layer.id, g) {
                continue;
            }
            let read = layer.overlay.read(g * grain, &mut content);
            pace.after(grain)?;
            let told = {
                let mut state = lock(&self.scrub.state);
                state.grains += 1;
                state.needed += 1;
                state.bytes += grain;
                state.found += u64::from(read.is_err());
                state.told()
            };
            if read.is_err() {
                self.scrub.remember(Known {
                    volume: LAYER_BIT | layer.id,
                    epoch: 0,
                    before: None,
                    grain: g,
                    seen: 0,
                });
            }
            news(&told);
        }
        Ok(())
    }

    /// A grain that looked bad: looks again, mends it if that can be done, else remembers it.
    fn judge(&self, bad: &Bad, points: &BTreeMap<u32, Points>, repair: bool) -> Result<()> {
        // Nothing is freed meanwhile.
        let _maintaining = lock(&self.maintaining);
        self.check_open()?;
        let Some(points) = points.get(&bad.volume) else {
            return Ok(());
        };
        let now = points_of(&lock(&self.catalog).clone());
        let Some(now) = now.get(&bad.volume) else {
            return Ok(());
        };
        if verify::needing(&now.live, bad.before, bad.epoch)
            .next()
            .is_none()
        {
            // Deleted meanwhile, and perhaps freed.
            return Ok(());
        }
        let grain = points.grain.bytes() as usize;
        let holds = |bytes: &[u8]| self.log.keys().payload(bytes) == bad.sum;
        let mut bytes = vec![0; grain];
        if self.log.read(bad.place, &mut bytes).is_ok() && holds(&bytes) {
            return Ok(());
        }
        lock(&self.scrub.state).found += 1;
        let span = points.grain.span(bad.grain..bad.grain + 1);
        let at = format!(
            "bytes {}..{} of volume {}",
            span.start, span.end, bad.volume
        );
        if repair && let Some((from, good)) = self.good_copy(bad, grain, &holds) {
            // The last batch of the log is taken for torn if its payload is not whole.
            self.log.seal(self)?;
            match self.log.mend(bad.place, &good, bad.sum) {
                Ok(()) => {
                    tracing::warn!(
                        "preserved content of {at} was damaged and is mended from {from}"
                    );
                    self.scrub.forget(bad);
                    lock(&self.scrub.state).mended += 1;
                    return Ok(());
                }
                Err(e) => tracing::error!("{at}: {}", e.chain()),
            }
        }
        let who = Rot::of(
            &BTreeMap::from([(bad.volume, now.clone())]),
            std::slice::from_ref(bad),
        );
        tracing::error!(
            "preserved content of {at} is damaged ({}); concerned: {who}",
            bad.why
        );
        self.scrub.remember(Known {
            volume: bad.volume,
            epoch: bad.epoch,
            before: bad.before,
            grain: bad.grain,
            seen: 0,
        });
        Ok(())
    }

    /// A copy whose checksum is that of the record, and where it is from.
    fn good_copy(
        &self,
        bad: &Bad,
        grain: usize,
        holds: &dyn Fn(&[u8]) -> bool,
    ) -> Option<(&'static str, Vec<u8>)> {
        let vol = self.vol(bad.volume)?;
        let start = bad.grain * grain as u64;
        let mut bytes = vec![0; grain];
        if read_source(&vol, start, &mut bytes) && holds(&bytes) {
            return Some(("the source", bytes));
        }
        for &twin in &bad.twins {
            if self.log.read(twin, &mut bytes).is_ok() && holds(&bytes) {
                return Some(("another snapshot", bytes));
            }
        }
        let layers = lock(&self.clones).layers_of(vol.id);
        for layer in layers {
            let held = lock(&layer.set).contains(bad.grain);
            if held && layer.overlay.read(start, &mut bytes).is_ok() && holds(&bytes) {
                return Some(("a clone", bytes));
            }
        }
        None
    }
}

/// Whether there can be such a grain: the file may say anything.
fn fits(known: &Known, grain: Grain) -> bool {
    known.grain < VOLUME_SIZE_MAX / grain.bytes()
}

/// What is known damaged in layers, by the clones that read it; what is gone is added to the rest of it.
fn known_in_layers(catalog: &Catalog, known: &[Known], gone: &mut Vec<Known>) -> Vec<Finding> {
    let mut readers: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for clone in catalog.clones.values() {
        let Some(volume) = catalog.volumes.get(&clone.volume) else {
            continue;
        };
        for (layer, _) in catalog.chain(clone.top) {
            let name = format!("{}/{}", volume.name, clone.name);
            readers.entry(layer).or_default().push(name);
        }
    }
    let mut all: BTreeMap<&str, Vec<Range<u64>>> = BTreeMap::new();
    for k in known.iter().filter(|k| k.volume & LAYER_BIT != 0) {
        let layer = k.volume & !LAYER_BIT;
        let entry = catalog.layers.get(&layer);
        let volume = entry.and_then(|l| catalog.volumes.get(&l.volume));
        let Some(volume) = volume.filter(|v| fits(k, v.grain)) else {
            gone.push(k.clone());
            continue;
        };
        let bytes = volume.grain.span(k.grain..k.grain + 1);
        for name in readers.get(&layer).into_iter().flatten() {
            let ranges = all.entry(name).or_default();
            match ranges.last_mut() {
                Some(last) if last.end == bytes.start => last.end = bytes.end,
                _ => ranges.push(bytes.clone()),
            }
        }
    }
    let finding = |(name, ranges): (&str, Vec<Range<u64>>)| {
        Finding::new(Severity::Damage, "payload", "clone", name, "damaged")
            .because("content of the clone does not match its checksum")
            .at(ranges)
            .advise("write these bytes anew, whole blocks of them, or delete the clone")
    };
    all.into_iter().map(finding).collect()
}

/// Reads a grain of the source as it would be preserved; whether that worked.
fn read_source(vol: &Arc<Vol>, start: u64, bytes: &mut [u8]) -> bool {
    let Some(source) = &vol.source else {
        return false;
    };
    let inside = vol.size().saturating_sub(start).min(bytes.len() as u64) as usize;
    let (data, rest) = bytes.split_at_mut(inside);
    rest.fill(0);
    source.read_exact_at(start, data).is_ok()
}

impl Engine {
    /// Reads preserved content and mends what has a good copy; see [`ScrubOptions`].
    ///
    /// # Errors
    /// `Busy` while another runs, `NotFound`, `Interrupted` when the store is closed: the position
    /// is kept.
    pub fn scrub(
        &self,
        options: &ScrubOptions,
        news: &mut dyn FnMut(&ScrubState),
    ) -> Result<ScrubState> {
        self.shared.scrub(options, news)
    }

    /// How the last scrub went, or how far the running one is.
    pub fn scrub_state(&self) -> ScrubState {
        self.shared.scrub_state()
    }

    /// What is known damaged and still needed by a snapshot or clone, from scrubs and from reads.
    pub fn known_damage(&self) -> Vec<Finding> {
        self.shared.known_damage()
    }

    /// Makes the extent map again from the log.
    ///
    /// # Errors
    /// `Damaged` if it cannot be done now.
    pub fn rebuild_map(&self) -> Result<()> {
        let why = Error::new(Kind::Damaged, "asked for");
        self.shared.heal_map(&why)
    }

    /// Holds what the store says against everything else it says; changes nothing.
    ///
    /// # Errors
    /// See [`crate::volume::audit::online`].
    pub fn audit(&self) -> Result<crate::volume::audit::Audit> {
        crate::volume::audit::online(&self.shared)
    }
}
