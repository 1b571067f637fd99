//! Overlay files: the content of one layer of a clone, sparse, at the offsets of the volume.
//!
//! A layer's file is `clones/<layer>.data`; where a filesystem limits the size of a file it still
//! works, because what lies past each [`PIECE_BYTES`] goes to `clones/<layer>.<piece>.data`. Files
//! are made when they are first written to.
//!
//! Which grains count is not told here but by the layer's set; so holes and stale bytes carry no
//! meaning. What is read is verified where `sums` has a checksum of it. What a good [`Overlay::sync`] covered is on the
//! medium, with the names of new files. After a failed one nothing is written or synced any more
//! (I7), until the store is opened again.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use crate::error::{Error, IoContext, Kind, Result};
use crate::map::GrainSet;
use crate::sys::disk::{Dir, Disk, Open};
use crate::sys::planted::{Bug, planted};
use crate::volume::shared::lock;
use crate::volume::sums::{self, Sums};

/// Bytes of a layer in one file: half of what the tightest filesystem takes. A multiple of every grain.
pub const PIECE_BYTES: u64 = 8 << 40;
const DIR_NAME: &str = "clones";
const SUFFIX: &str = ".data";
/// Behind the name of a file that was set aside, with a number.
const ASIDE: &str = ".lost-";

/// The directory of all overlays; made when the first is.
pub struct Home {
    store: Arc<dyn Dir>,
    dir: Mutex<Option<Arc<dyn Dir>>>,
}

impl Home {
    /// The directory in a store.
    pub fn new(store: Arc<dyn Dir>) -> Home {
        Home {
            store,
            dir: Mutex::new(None),
        }
    }

    /// The directory; `None` if there is none and none is to be made.
    ///
    /// # Errors
    /// `NoSpace`, `Io`.
    pub fn dir(&self, create: bool) -> Result<Option<Arc<dyn Dir>>> {
        let context = || "cannot open the directory of clones";
        let mut known = lock(&self.dir);
        if let Some(dir) = &*known {
            return Ok(Some(Arc::clone(dir)));
        }
        let dir = match self.store.subdir(DIR_NAME, create) {
            Err(e) if !create && e.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.context(context)?,
        };
        // A predecessor may have been killed before it made the name durable.
        self.store.sync().context(context)?;
        *known = Some(Arc::clone(&dir));
        Ok(Some(dir))
    }
}

fn file_name(layer: u32, piece: u64) -> String {
    match piece {
        0 => format!("{layer:06}{SUFFIX}"),
        piece => format!("{layer:06}.{piece}{SUFFIX}"),
    }
}

/// Layer and piece that a file's name says; `None` for a foreign file.
fn parse(name: &str) -> Option<(u32, u64)> {
    let stem = name.strip_suffix(SUFFIX)?;
    let (layer, piece) = stem.split_once('.').unwrap_or((stem, "0"));
    let found = (layer.parse().ok()?, piece.parse().ok()?);
    (file_name(found.0, found.1) == name).then_some(found)
}

/// The number of the piece that a file of [`files`] is; `None` for a table of checksums.
pub fn piece_of(name: &str) -> Option<u64> {
    parse(name).map(|(_, piece)| piece)
}

/// Whether a name is one that [`set_aside`] gives.
pub fn is_aside(name: &str) -> bool {
    let parts = name.rsplit_once(ASIDE);
    parts.is_some_and(|(name, n)| is_ours(name) && n.parse::<u64>().is_ok())
}

/// Whether a name is that of an overlay, or of a table of checksums.
pub fn is_ours(name: &str) -> bool {
    parse(name).is_some() || sums::parse(name).is_some()
}

/// All overlay files by layer.
///
/// # Errors
/// `Io`.
pub fn files(dir: &dyn Dir) -> Result<BTreeMap<u32, Vec<String>>> {
    let mut files: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for name in dir.list().context(|| "cannot list the overlays")? {
        let layer = parse(&name).map(|(layer, _)| layer);
        match layer.or_else(|| sums::parse(&name)) {
            Some(layer) => files.entry(layer).or_default().push(name),
            None if name.contains(ASIDE) => tracing::warn!(
                "{name:?} was written to a clone of which the log says nothing any more; it may be removed"
            ),
            None => tracing::warn!("a foreign file {name:?} among the overlays"),
        }
    }
    Ok(files)
}

#[derive(Default)]
struct Dirty {
    pieces: BTreeSet<u64>,
    names: bool,
}

#[cfg(test)]
type Counted = Box<dyn FnOnce(&Overlay) + Send>;

/// See the head of the file.
pub struct Overlay {
    home: Arc<Home>,
    layer: u32,
    piece_bytes: u64,
    /// Checksums of what the layer holds.
    sums: Option<Sums>,
    /// Pieces that have a file.
    known: Mutex<BTreeSet<u64>>,
    files: Mutex<BTreeMap<u64, Arc<dyn Disk>>>,
    /// Writers share it; who sets a file's size excludes them: a size that was looked at before
    /// another write made the file longer would cut that off.
    sizes: RwLock<()>,
    dirty: Mutex<Dirty>,
    /// Held during a sync; the number of the last good one.
    synced: Mutex<u64>,
    syncs_started: AtomicU64,
    /// Why a sync failed, if one did. Not held over I/O.
    failed: Mutex<Option<String>>,
    /// Called by a sync that has been counted and has not taken yet what it is to make durable.
    #[cfg(test)]
    counted: Mutex<Option<Counted>>,
}

impl Overlay {
    /// The overlay of a layer that has these files, with pieces of [`PIECE_BYTES`].
    pub fn new(home: Arc<Home>, layer: u32, names: &[String], sums: Option<Sums>) -> Overlay {
        Overlay {
            sums,
            ..Overlay::with_pieces(home, layer, names, PIECE_BYTES)
        }
    }

    fn with_pieces(home: Arc<Home>, layer: u32, names: &[String], piece_bytes: u64) -> Overlay {
        let known = names.iter().filter_map(|name| parse(name));
        let known = known.map(|(_, piece)| piece).collect();
        Overlay {
            home,
            layer,
            piece_bytes,
            sums: None,
            known: Mutex::new(known),
            files: Mutex::default(),
            sizes: RwLock::new(()),
            dirty: Mutex::default(),
            synced: Mutex::new(0),
            syncs_started: AtomicU64::new(0),
            failed: Mutex::default(),
            #[cfg(test)]
            counted: Mutex::default(),
        }
    }

    fn file(&self, piece: u64, create: bool) -> Result<Option<Arc<dyn Disk>>> {
        let name = file_name(self.layer, piece);
        let context = || format!("cannot open the overlay {name}");
        let mut files = lock(&self.files);
        if let Some(disk) = files.get(&piece) {
            return Ok(Some(Arc::clone(disk)));
        }
        if !create && !lock(&self.known).contains(&piece) {
            return Ok(None);
        }
        let Some(dir) = self.home.dir(create)? else {
            return Ok(None);
        };
        let disk = match dir.open(&name, Open::Write) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if !create {
                    return Ok(None);
                }
                let disk = dir.open(&name, Open::Create).context(context)?;
                lock(&self.dirty).names = true;
                disk
            }
            opened => opened.context(context)?,
        };
        lock(&self.known).insert(piece);
        files.insert(piece, Arc::clone(&disk));
        Ok(Some(disk))
    }

    fn written(&self, piece: u64) -> Result<Arc<dyn Disk>> {
        self.check()?;
        let disk = self.file(piece, true)?;
        disk.ok_or_else(|| Error::new(Kind::Io, "an overlay cannot be made"))
    }

    /// The parts of a range in each piece: (piece, range in its file, offset in the range).
    fn parts(&self, range: Range<u64>) -> impl Iterator<Item = (u64, Range<u64>, usize)> {
        let (mut at, size) = (range.start, self.piece_bytes);
        std::iter::from_fn(move || {
            if at >= range.end {
                return None;
            }
            let (piece, from) = (at / size, at % size);
            let len = (size - from).min(range.end - at);
            let part = (piece, from..from + len, (at - range.start) as usize);
            at += len;
            Some(part)
        })
    }

    /// Refuses once a sync has failed.
    ///
    /// # Errors
    /// `Failed`.
    pub fn check(&self) -> Result<()> {
        match &*lock(&self.failed) {
            None => Ok(()),
            Some(why) => Err(self.failure(why)),
        }
    }

    fn failure(&self, why: &str) -> Error {
        Error::new(
            Kind::Failed,
            format!(
                "a sync of overlay {} failed ({why}): writes since the last good one may be lost",
                self.layer
            ),
        )
    }

    /// Reads grains that the layer holds, and verifies them where there are checksums.
    ///
    /// # Errors
    /// `Damaged` if the file is missing or too short, or content does not match its checksum; `Io`.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let Some(sums) = &self.sums else {
            return self.read_plain(offset, buf);
        };
        let end = offset + buf.len() as u64;
        let grain = sums.grain();
        let grains = offset / grain..end.div_ceil(grain);
        let known = sums.of(grains.clone());
        if known.iter().all(|&sum| sum == 0) {
            return self.read_plain(offset, buf);
        }
        if grains.start * grain == offset && grains.end * grain == end {
            self.read_plain(offset, buf)?;
            return self.verify(sums, grains.start, &known, buf);
        }
        let mut whole = vec![0; ((grains.end - grains.start) * grain) as usize];
        self.read_plain(grains.start * grain, &mut whole)?;
        self.verify(sums, grains.start, &known, &mut whole)?;
        let from = (offset - grains.start * grain) as usize;
        buf.copy_from_slice(&whole[from..from + buf.len()]);
        Ok(())
    }

    /// Holds whole grains against the checksums that were there before they were read.
    fn verify(&self, sums: &Sums, first: u64, known: &[u64], content: &mut [u8]) -> Result<()> {
        let size = sums.grain() as usize;
        for (i, content) in content.chunks_mut(size).enumerate() {
            let grain = first + i as u64;
            let mut expect = known[i];
            while expect != 0 && sums.sum(content) != expect {
                let now = sums.of(grain..grain + 1)[0];
                if now == expect {
                    let at = grain * sums.grain();
                    let why = format!(
                        "content of overlay {} at bytes {at}..{} does not match its checksum",
                        self.layer,
                        at + sums.grain()
                    );
                    tracing::error!("{why}");
                    return Err(Error::new(Kind::Damaged, why));
                }
                // It was written meanwhile.
                self.read_plain(grain * sums.grain(), content)?;
                expect = now;
            }
        }
        Ok(())
    }

    #[cfg(test)]
    pub fn sums(&self) -> &Sums {
        self.sums.as_ref().expect("made with checksums")
    }

    fn opened(&self, range: Range<u64>) -> Result<Option<RwLockReadGuard<'_, ()>>> {
        self.sums.as_ref().map(|sums| sums.open(range)).transpose()
    }

    /// Makes checksums of grains that nobody writes any more, see [`Sums::seal`].
    ///
    /// # Errors
    /// Those of a sync.
    pub fn seal(&self, held: &dyn Fn() -> GrainSet, rounds: u32, budget: u64) -> Result<u64> {
        match &self.sums {
            Some(sums) if self.check().is_ok() => sums.seal(
                held,
                rounds,
                budget,
                &|at, buf| self.read_plain(at, buf),
                &|| self.sync(),
            ),
            _ => Ok(0),
        }
    }

    /// Grains have become the layer's: they are to get checksums.
    pub fn note_held(&self, grains: Range<u64>) {
        if let Some(sums) = &self.sums {
            sums.note_held(grains);
        }
    }

    /// Before a part of a grain changes: the rest of it must be what it was, or the checksum that is made
    /// of it then would be of rot.
    fn hold_edges(&self, range: &Range<u64>) -> Result<()> {
        let Some(sums) = &self.sums else {
            return Ok(());
        };
        let size = sums.grain();
        let edges = [range.start, range.end];
        let mut parts: Vec<u64> = edges
            .into_iter()
            .filter(|at| !at.is_multiple_of(size))
            .map(|at| at / size)
            .collect();
        parts.dedup();
        for grain in parts {
            if sums.of(grain..grain + 1) != [0] {
                self.read(grain * size, &mut vec![0; size as usize])?;
            }
        }
        Ok(())
    }

    /// The grains whose checksums are lost.
    pub fn damaged_sums(&self, held: &GrainSet) -> Vec<Range<u64>> {
        let sums = self.sums.as_ref();
        sums.map_or_else(Vec::new, |sums| sums.damaged(held))
    }

    fn read_plain(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        for (piece, part, at) in self.parts(offset..offset + buf.len() as u64) {
            let out = &mut buf[at..at + (part.end - part.start) as usize];
            let gone = |what: &str| {
                let name = file_name(self.layer, piece);
                Error::new(Kind::Damaged, format!("the overlay {name} {what}"))
            };
            let disk = self.file(piece, false)?.ok_or_else(|| gone("is missing"))?;
            match disk.read_exact_at(part.start, out) {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                    return Err(gone("is too short"));
                }
                done => done.context(|| format!("cannot read overlay {}", self.layer))?,
            }
        }
        Ok(())
    }

    /// Writes; in the page cache when it returns.
    ///
    /// # Errors
    /// `Failed` after a failed sync, `NoSpace`, `Io`: a prefix may have been written. `Damaged` if the rest
    /// of a grain that is written in part has rotted.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let range = offset..offset + data.len() as u64;
        self.hold_edges(&range)?;
        let _opened = self.opened(range)?;
        for (piece, part, at) in self.parts(offset..offset + data.len() as u64) {
            let disk = self.written(piece)?;
            let data = &data[at..at + (part.end - part.start) as usize];
            let sizes = self.sizes.read().unwrap_or_else(PoisonError::into_inner);
            let done = disk.write_all_at(part.start, &[data]);
            drop(sizes);
            // After the write: a sync that began before it must not clear this.
            lock(&self.dirty).pieces.insert(piece);
            done.context(|| format!("cannot write overlay {}", self.layer))?;
        }
        Ok(())
    }

    /// Makes a range read as zero, also where the files do not reach yet.
    ///
    /// # Errors
    /// As [`Overlay::write`].
    pub fn zero(&self, range: Range<u64>) -> Result<()> {
        let context = || format!("cannot punch overlay {}", self.layer);
        self.hold_edges(&range)?;
        let _opened = self.opened(range.clone())?;
        for (piece, part, _) in self.parts(range) {
            let disk = self.written(piece)?;
            let size = disk.size().context(context)?;
            let mut done = Ok(());
            if part.start < size {
                done = disk.punch(part.start, part.end.min(size) - part.start);
            }
            if part.end > size && done.is_ok() {
                // What a layer holds always lies inside the file: a file that was cut is noticed.
                let _sizes = self.sizes.write().unwrap_or_else(PoisonError::into_inner);
                done = disk.size().and_then(|size| match size < part.end {
                    true => disk.set_size(part.end),
                    false => Ok(()),
                });
            }
            lock(&self.dirty).pieces.insert(piece);
            done.context(context)?;
        }
        Ok(())
    }

    /// Makes everything from an offset on zero, as far as there are files.
    ///
    /// # Errors
    /// As [`Overlay::write`].
    pub fn zero_from(&self, offset: u64) -> Result<()> {
        for (piece, disk) in self.there()? {
            let size = disk.size().context(|| "cannot stat an overlay")?;
            let start = piece * self.piece_bytes;
            let from = offset.max(start);
            if from < start + size {
                self.zero(from..start + size)?;
            }
        }
        Ok(())
    }

    /// The files there are, by piece.
    fn there(&self) -> Result<Vec<(u64, Arc<dyn Disk>)>> {
        let pieces: Vec<u64> = lock(&self.known).iter().copied().collect();
        let mut disks = Vec::new();
        for piece in pieces {
            if let Some(disk) = self.file(piece, false)? {
                disks.push((piece, disk));
            }
        }
        Ok(disks)
    }

    /// Makes everything written before durable, names too. One sync serves all who asked before it
    /// began.
    ///
    /// # Errors
    /// `Failed`, from the first failure on.
    pub fn sync(&self) -> Result<()> {
        self.sync_for(self.syncs_started.load(Ordering::Acquire))
    }

    /// For one who asked when so many syncs had begun.
    fn sync_for(&self, started: u64) -> Result<()> {
        let mut synced = lock(&self.synced);
        self.check()?;
        if *synced > started {
            return Ok(());
        }
        // Counted before it is taken what is to be synced: who still saw the old count has made its
        // files dirty before, so they are among them.
        let number = self.syncs_started.fetch_add(1, Ordering::AcqRel) + 1;
        #[cfg(test)]
        if let Some(counted) = lock(&self.counted).take() {
            counted(self);
        }
        let dirty = std::mem::take(&mut *lock(&self.dirty));
        if dirty.pieces.is_empty() && !dirty.names {
            *synced = number;
            return Ok(());
        }
        match self.sync_files(&dirty) {
            Ok(()) => {
                *synced = number;
                Ok(())
            }
            Err(e) => {
                let why = e.chain();
                tracing::error!(layer = self.layer, "a sync of an overlay failed: {why}");
                let failure = self.failure(&why);
                *lock(&self.failed) = Some(why);
                Err(failure)
            }
        }
    }

    fn sync_files(&self, dirty: &Dirty) -> Result<()> {
        let context = || "cannot sync an overlay";
        for &piece in &dirty.pieces {
            if let Some(disk) = self.file(piece, false)? {
                disk.sync_data().context(context)?;
            }
        }
        if dirty.names
            && !planted(Bug::OverlayNameUnsynced)
            && let Some(dir) = self.home.dir(false)?
        {
            dir.sync().context(context)?;
        }
        Ok(())
    }

    /// After an unclean stop: what the page cache has is made durable, and what a failed sync left
    /// there is forgotten. A failure counts as that of a sync.
    pub fn settle(&self) {
        let settled = self.there().and_then(|disks| {
            disks.iter().try_for_each(|(_, disk)| {
                disk.sync_data()
                    .and_then(|()| disk.drop_cache())
                    .context(|| "cannot sync an overlay")
            })
        });
        if let Err(e) = settled {
            tracing::error!(layer = self.layer, "{}", e.chain());
            *lock(&self.failed) = Some(e.chain());
        }
    }

    /// Whether a sync would have anything to do.
    pub fn is_dirty(&self) -> bool {
        let dirty = lock(&self.dirty);
        dirty.names || !dirty.pieces.is_empty()
    }

    /// Closes the files if nothing waits for a sync.
    pub fn close_files(&self) {
        let _synced = lock(&self.synced);
        let mut files = lock(&self.files);
        if !self.is_dirty() {
            files.clear();
            if let Some(sums) = &self.sums {
                sums.close_file();
            }
        }
    }

    /// As [`Overlay::close_files`], for whoever had them opened for himself: writers that have come
    /// meanwhile are let finish.
    pub fn close_files_again(&self) {
        let _quiet = self.sums.as_ref().map(Sums::quiet);
        self.close_files();
    }

    /// Whether any file is open.
    pub fn has_open_files(&self) -> bool {
        !lock(&self.files).is_empty() || self.sums.as_ref().is_some_and(Sums::is_open)
    }

    /// Last change of the files' status, ns since 1970; `None` without files.
    ///
    /// # Errors
    /// `Io`.
    pub fn ctime_ns(&self) -> Result<Option<i64>> {
        let mut newest = None;
        for (_, disk) in self.there()? {
            let identity = disk.identity().context(|| "cannot stat an overlay")?;
            newest = newest.max(Some(identity.ctime_ns));
        }
        Ok(newest)
    }

    /// Bytes of storage in use.
    ///
    /// # Errors
    /// `Io`.
    pub fn allocated(&self) -> Result<u64> {
        let mut total = 0;
        for (_, disk) in self.there()? {
            total += disk.allocated().context(|| "cannot stat an overlay")?;
        }
        Ok(total)
    }

    /// The first data (`want_data`) or hole in a range of grains that the layer holds.
    ///
    /// # Errors
    /// As [`Overlay::read`].
    pub fn seek(&self, range: Range<u64>, want_data: bool) -> Result<Option<u64>> {
        for (piece, part, _) in self.parts(range) {
            let disk = self.file(piece, false)?.ok_or_else(|| {
                let name = file_name(self.layer, piece);
                Error::new(Kind::Damaged, format!("the overlay {name} is missing"))
            })?;
            let found = match want_data {
                true => disk.next_data(part.start),
                false => disk.next_hole(part.start).map(Some),
            };
            let found = found.context(|| "cannot look for holes in an overlay")?;
            if let Some(found) = found.filter(|&at| at < part.end) {
                return Ok(Some(piece * self.piece_bytes + found));
            }
        }
        Ok(None)
    }

    /// Removes the files of a layer that is gone.
    ///
    /// # Errors
    /// `Io`: some may still be there; call again.
    pub fn remove(&self) -> Result<()> {
        let Some(dir) = self.home.dir(false)? else {
            return Ok(());
        };
        if self.sums.is_some() {
            remove_files(dir.as_ref(), &[sums::file_name(self.layer)])?;
        }
        let pieces: Vec<u64> = lock(&self.known).iter().copied().collect();
        for piece in pieces {
            remove_files(dir.as_ref(), &[file_name(self.layer, piece)])?;
            lock(&self.known).remove(&piece);
        }
        Ok(())
    }
}

/// Gives overlay files that nobody knows names that are no overlay's, durably, so that they are there
/// for a look however often the store is opened. Returns what they are called now.
///
/// # Errors
/// `Io`, `NoSpace`: some may have kept their names.
pub fn set_aside(dir: &dyn Dir, names: &[String]) -> Result<Vec<String>> {
    let there: BTreeSet<String> = dir
        .list()
        .context(|| "cannot list the overlays")?
        .into_iter()
        .collect();
    let mut aside = Vec::new();
    for name in names {
        let called = |n: u64| format!("{name}{ASIDE}{n}");
        let free = (1..).map(called).find(|name| !there.contains(name));
        let free = free.expect("a directory holds fewer names than there are numbers");
        dir.rename(name, &free)
            .context(|| format!("cannot rename the overlay {name}"))?;
        aside.push(free);
    }
    dir.sync()
        .context(|| "cannot sync the overlays' directory")?;
    Ok(aside)
}

/// Removes overlay files, durably.
///
/// # Errors
/// `Io`.
pub fn remove_files(dir: &dyn Dir, names: &[String]) -> Result<()> {
    for name in names {
        match dir.remove(name) {
            // By a call before, whose sync then failed.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            done => done.context(|| format!("cannot remove the overlay {name}"))?,
        }
    }
    if names.is_empty() {
        return Ok(());
    }
    dir.sync().context(|| "cannot sync the overlays' directory")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::sim::{Op, SimWorld};

    const PIECE: u64 = 64 << 10;

    fn overlay(world: &SimWorld) -> Overlay {
        let home = Arc::new(Home::new(world.dir("store")));
        let dir = home.dir(true).unwrap().unwrap();
        let names = files(dir.as_ref()).unwrap().remove(&7).unwrap_or_default();
        Overlay::with_pieces(home, 7, &names, PIECE)
    }

    #[test]
    fn content_goes_over_the_end_of_a_file_into_the_next() {
        let world = SimWorld::new(1);
        let o = overlay(&world);
        let data: Vec<u8> = (0..16384u32).map(|i| (i % 251) as u8).collect();
        o.write(3 * PIECE - 8192, &data).unwrap();
        o.sync().unwrap();
        world.power_cut();
        let o = overlay(&world);
        let mut back = vec![0; data.len()];
        o.read(3 * PIECE - 8192, &mut back).unwrap();
        assert!(back == data);
        assert_eq!(
            world.peek("store/clones/000007.2.data").unwrap().len(),
            1 << 16
        );
        assert_eq!(
            world.peek("store/clones/000007.3.data").unwrap().len(),
            8192
        );
        assert_eq!(
            o.seek(3 * PIECE - 8192..3 * PIECE + 8192, false).unwrap(),
            None
        );
        o.zero(3 * PIECE - 4096..3 * PIECE + 4096).unwrap();
        let found = o.seek(3 * PIECE - 8192..3 * PIECE + 8192, false).unwrap();
        assert_eq!(found, Some(3 * PIECE - 4096));
        let found = o.seek(3 * PIECE - 4096..3 * PIECE + 8192, true).unwrap();
        assert_eq!(found, Some(3 * PIECE + 4096));
        o.zero_from(2 * PIECE).unwrap();
        assert_eq!(
            o.seek(3 * PIECE - 8192..3 * PIECE + 8192, true).unwrap(),
            None
        );
        o.remove().unwrap();
        assert!(
            files(world.dir("store/clones").as_ref())
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn what_is_missing_is_an_error_and_never_zeros() {
        let world = SimWorld::new(1);
        let o = overlay(&world);
        let read = |o: &Overlay, at| o.read(at, &mut [0; 4096]).map_err(|e| e.kind());
        assert_eq!(read(&o, 0), Err(Kind::Damaged));
        o.zero(0..8192).unwrap();
        assert_eq!(read(&o, 4096), Ok(()));
        assert_eq!(read(&o, 8192), Err(Kind::Damaged));
    }

    #[test]
    fn after_a_failed_sync_nothing_is_synced_or_written() {
        let world = SimWorld::new(1);
        let o = overlay(&world);
        o.write(0, &[1; 4096]).unwrap();
        world.fail_nth(Op::Sync, 1, 5);
        assert_eq!(o.sync().unwrap_err().kind(), Kind::Failed);
        assert_eq!(o.sync().unwrap_err().kind(), Kind::Failed);
        assert_eq!(o.write(0, &[1; 4096]).unwrap_err().kind(), Kind::Failed);
        assert_eq!(o.zero(0..1).unwrap_err().kind(), Kind::Failed);
    }

    /// Who wrote after a sync had begun, and asks while it runs, is not answered by it alone.
    #[test]
    fn a_sync_that_has_begun_does_not_serve_who_wrote_since() {
        let world = SimWorld::new(1);
        for first_is_dirty in [true, false] {
            let o = Arc::new(overlay(&world));
            if first_is_dirty {
                o.write(0, &[1; 4096]).unwrap();
            }
            let asked = Arc::new(AtomicU64::new(0));
            let tell = Arc::clone(&asked);
            *lock(&o.counted) = Some(Box::new(move |o| {
                o.write(5 * PIECE, &[2; 4096]).unwrap();
                tell.store(o.syncs_started.load(Ordering::Acquire), Ordering::Release);
            }));
            o.sync().unwrap();
            o.sync_for(asked.load(Ordering::Acquire)).unwrap();
            world.power_cut();
            let mut back = [0; 4096];
            overlay(&world).read(5 * PIECE, &mut back).unwrap();
            assert!(back == [2; 4096], "{first_is_dirty}");
            overlay(&world).remove().unwrap();
        }
    }

    #[test]
    fn zeros_behind_the_end_cut_off_no_other_write() {
        let world = SimWorld::new(1);
        let o = overlay(&world);
        for piece in 0..1000 {
            let at = piece * PIECE;
            let start = std::sync::Barrier::new(2);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    start.wait();
                    o.write(at + 8192, &[7; 4096]).unwrap();
                });
                start.wait();
                o.zero(at..at + 4096).unwrap();
            });
            let mut back = [0; 4096];
            o.read(at + 8192, &mut back).unwrap();
            assert!(back == [7; 4096], "piece {piece}");
        }
    }

    /// Golden: what lies where in a layer's files. There is nothing in them but content, at its offset.
    #[test]
    fn golden_files() {
        let world = SimWorld::new(1);
        let home = Arc::new(Home::new(world.dir("store")));
        let o = Overlay::new(home, 12, &[], None);
        assert_eq!(PIECE_BYTES, 8_796_093_022_208);
        o.write(4096, &[1; 4096]).unwrap();
        o.write(3 * PIECE_BYTES - 4096, &[2; 8192]).unwrap();
        let mut names = world.dir("store/clones").list().unwrap();
        names.sort();
        assert_eq!(names, ["000012.2.data", "000012.3.data", "000012.data"]);
        let first = world.peek("store/clones/000012.data").unwrap();
        assert!(first.len() == 8192 && first[..4096] == [0; 4096] && first[4096..] == [1; 4096]);
        assert!(world.peek("store/clones/000012.3.data").unwrap() == [2; 4096]);
        let disk = world.disk("store/clones/000012.2.data").unwrap();
        assert_eq!(disk.size().unwrap(), PIECE_BYTES);
        assert_eq!(disk.next_data(0).unwrap(), Some(PIECE_BYTES - 4096));
    }

    #[test]
    fn names_are_told_from_foreign_ones() {
        assert_eq!(parse("000012.data"), Some((12, 0)));
        assert_eq!(parse("000012.3.data"), Some((12, 3)));
        assert_eq!(parse(&file_name(12_345_678, 0)), Some((12_345_678, 0)));
        for name in [
            "12.data",
            "000012.0.data",
            "000012.data~",
            "+00012.data",
            "x.data",
        ] {
            assert_eq!(parse(name), None, "{name}");
        }
    }
}
