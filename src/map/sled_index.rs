//! The index over sled 0.34.7, and the only file that names sled.
//!
//! What sled does and promises was measured, and this file is shaped by it:
//!
//! - `flush` never syncs on Linux. We keep our own descriptor on sled's file, opened at start, and
//!   `fdatasync` it after each flush; what sled creates beside it is synced once after opening.
//! - A leaf holds up to 17 values and is rewritten whole. If that is over 128 KiB it becomes a file of
//!   its own under `blobs/`, never synced and never removed. Its cache forgets a leaf only after 64
//!   more accesses to the same one of 256 shards, whatever the capacity. So a value is kept in pieces
//!   of `PIECE` bytes, and each piece is read by an access of its own: a leaf stays below 40 KiB, and
//!   6,400 pages of 33 KiB are written and scanned in 35 MiB of memory (whole values: 200 MiB and 700 blobs).
//! - It panics where others return an error. Every call is guarded; after a panic or a failed
//!   sync the handle refuses (`Damaged` or `Io`) and only opening again helps.
//!
//! - A start writes a summary of its log beside its file, as `snap.N.generating`, and renames it when it is
//!   whole. What a kill or a full disk left of one it takes for the newest summary at the next start, and
//!   refuses. So such a file is removed first; the summary before it is still there.
//!
//! A key's pieces are `key ++ [i]`; piece 0 starts with the value's length (u32, little-endian). Other
//! pieces follow without gap. A batch of sled is atomic, also over a crash; `pieces` keeps readers
//! from seeing half of one. Locks: `pieces` only; nothing is called with it held but sled.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use crate::error::{Error, IoContext, Kind, Result};
use crate::map::index::{Change, Index, IndexHome, VALUE_MAX, assert_limits};

/// Bytes of a piece; a leaf of 17 pieces stays far below the 128 KiB at which sled makes a blob.
const PIECE: usize = 2048;
const _: () = assert!((VALUE_MAX + 4).div_ceil(PIECE) < 255);

/// Bytes of cache asked for; more only adds to what sled keeps anyway.
const CACHE_BYTES: u64 = 4 << 20;

/// Key of the format version; sorts before every namespace.
const FORMAT_KEY: &[u8] = &[0];
const FORMAT: &[u8] = &[1];

/// The last possible piece of a key, greater than all there are.
const PIECE_END: u8 = 255;

/// Opens the index in a directory, and moves it aside when it is not to be trusted.
#[derive(Debug, Clone)]
pub struct SledHome {
    path: PathBuf,
    shown: PathBuf,
}

impl SledHome {
    /// The home at a path; its parent exists.
    pub fn new(path: PathBuf) -> SledHome {
        let shown = path.clone();
        SledHome { path, shown }
    }

    /// As [`SledHome::new`], by a path that only this process understands; `shown` stands in messages.
    pub fn through(path: PathBuf, shown: PathBuf) -> SledHome {
        SledHome { path, shown }
    }

    /// Renames the directory to the next free `<name>.damaged-<n>`; `None` if there is none.
    fn move_away(&self) -> io::Result<Option<PathBuf>> {
        if !self.path.try_exists()? {
            return Ok(None);
        }
        let older = self.damaged()?;
        let next = older.iter().map(|(n, _)| n + 1).max().unwrap_or(1);
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".damaged-{next}"));
        let name = PathBuf::from(name);
        fs::rename(&self.path, &name)?;
        Ok(Some(name))
    }

    /// What [`IndexHome::set_aside`] has left: (number, path).
    fn damaged(&self) -> io::Result<Vec<(u64, PathBuf)>> {
        let Some(prefix) = self.path.file_name().and_then(|n| n.to_str()) else {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        };
        let prefix = format!("{prefix}.damaged-");
        let mut found = Vec::new();
        for entry in fs::read_dir(parent(&self.path))? {
            let entry = entry?;
            let name = entry.file_name();
            let number = name
                .to_str()
                .and_then(|n| n.strip_prefix(&prefix)?.parse().ok());
            if let Some(number) = number {
                found.push((number, entry.path()));
            }
        }
        Ok(found)
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => Path::new("/"),
    }
}

impl IndexHome for SledHome {
    fn open(&self) -> Result<Arc<dyn Index>> {
        Ok(Arc::new(SledIndex::open(&self.path, &self.shown)?))
    }

    /// Renames the directory to `<name>.damaged-<n>` for a later look, and removes older ones.
    fn set_aside(&self) -> Result<()> {
        let what = || format!("moving the extent map {} aside", self.shown.display());
        let older = self.damaged().context(what)?;
        if self.move_away().context(what)?.is_none() {
            return Ok(());
        }
        for (_, path) in older {
            fs::remove_dir_all(path).context(what)?;
        }
        sync(parent(&self.path)).context(what)
    }

    fn discard(&self) -> Result<()> {
        let what = || format!("removing the extent map {}", self.shown.display());
        // At once: half of a directory would look like damage.
        if let Some(path) = self.move_away().context(what)? {
            fs::remove_dir_all(path).context(what)?;
        }
        sync(parent(&self.path)).context(what)
    }
}

fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// An open index. See the head of the file.
struct SledIndex {
    /// Taken only when dropped.
    db: Option<sled::Db>,
    /// Our own descriptor on sled's file.
    file: File,
    dir: PathBuf,
    /// Read while a value's pieces are read, written while they change.
    pieces: RwLock<()>,
    /// sled panicked: its own locks may never be released again.
    panicked: AtomicBool,
    /// A sync failed: what is durable is unknown, and a later success would prove nothing.
    unsynced: AtomicBool,
}

impl SledIndex {
    fn open(path: &Path, shown: &Path) -> Result<SledIndex> {
        let what = || format!("opening the extent map {}", shown.display());
        match DirBuilder::new().mode(0o700).create(path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.context(what)?,
        }
        remove_unfinished(path).context(what)?;
        let db = start(path, &what())?;
        let file = File::options()
            .read(true)
            .write(true)
            .open(path.join("db"))
            .context(what)?;
        let index = SledIndex {
            db: Some(db),
            file,
            dir: path.to_owned(),
            pieces: RwLock::new(()),
            panicked: AtomicBool::new(false),
            unsynced: AtomicBool::new(false),
        };
        index.sync_all().context(what)?;
        index.check_format()?;
        Ok(index)
    }

    /// Makes durable what sled created and what a killed predecessor left in the page cache.
    fn sync_all(&self) -> io::Result<()> {
        self.file.sync_all()?;
        for entry in fs::read_dir(&self.dir)? {
            sync(&entry?.path())?;
        }
        sync(&self.dir)?;
        sync(parent(&self.dir))
    }

    fn check_format(&self) -> Result<()> {
        match self.get(FORMAT_KEY)? {
            Some(format) if format == FORMAT => Ok(()),
            Some(_) => Err(self.damaged("of an unknown format")),
            None if self.guard(|db| Ok(db.is_empty()))? => {
                self.apply(vec![(FORMAT_KEY.to_vec(), Some(FORMAT.to_vec()))])
            }
            None => Err(self.damaged("has no format version")),
        }
    }

    fn damaged(&self, why: &str) -> Error {
        Error::new(
            Kind::Damaged,
            format!("extent map {}: {why}", self.dir.display()),
        )
    }

    /// The one way to call sled.
    fn guard<T>(&self, call: impl FnOnce(&sled::Db) -> sled::Result<T>) -> Result<T> {
        let Some(db) = self
            .db
            .as_ref()
            .filter(|_| !self.panicked.load(Ordering::Acquire))
        else {
            return Err(self.damaged("unusable since a panic"));
        };
        match catch_unwind(AssertUnwindSafe(|| call(db))) {
            Ok(done) => {
                done.map_err(|e| translate(format!("extent map {}", self.dir.display()), e))
            }
            Err(_) => {
                self.panicked.store(true, Ordering::Release);
                Err(self.damaged("a panic"))
            }
        }
    }

    /// A value from its pieces. `pieces` is held.
    fn read(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let Some((len, first)) = self.head(key)? else {
            return Ok(None);
        };
        let mut value = first;
        for i in 1..count(len) {
            match self.guard(|db| db.get(piece(key, i)))? {
                Some(next) => value.extend_from_slice(&next),
                None => return Err(self.damaged("a piece is missing")),
            }
        }
        if value.len() != len {
            return Err(self.damaged("a value has the wrong length"));
        }
        Ok(Some(value))
    }

    /// The length of a value and its first bytes.
    fn head(&self, key: &[u8]) -> Result<Option<(usize, Vec<u8>)>> {
        let Some(first) = self.guard(|db| db.get(piece(key, 0)))? else {
            return Ok(None);
        };
        let Some((len, bytes)) = first.split_at_checked(4) else {
            return Err(self.damaged("a value without a length"));
        };
        let len = u32::from_le_bytes(len.try_into().expect("four bytes")) as usize;
        if len > VALUE_MAX {
            return Err(self.damaged("a value over the limit"));
        }
        Ok(Some((len, bytes.to_vec())))
    }
}

/// Removes what is left of summaries that were not finished. See the head of the file.
fn remove_unfinished(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Starts sled. It lets go of its lock some time after it was dropped, when its own threads are done;
/// the store's lock keeps others out, so a lock that is taken is worth a short wait.
fn start(path: &Path, what: &str) -> Result<sled::Db> {
    const TRIES: u32 = 50;
    const PAUSE: Duration = Duration::from_millis(20);
    for left in (0..TRIES).rev() {
        let config = sled::Config::new()
            .path(path)
            .flush_every_ms(None)
            .cache_capacity(CACHE_BYTES)
            .mode(sled::Mode::LowSpace);
        match catch_unwind(AssertUnwindSafe(|| config.open())) {
            Ok(Ok(db)) => return Ok(db),
            Ok(Err(sled::Error::Io(e))) if e.to_string().contains("acquire lock") => {
                if left > 0 {
                    std::thread::sleep(PAUSE);
                }
            }
            Ok(Err(e)) => return Err(translate(what.to_owned(), e)),
            Err(_) => return Err(Error::new(Kind::Damaged, format!("{what}: a panic"))),
        }
    }
    Err(Error::new(Kind::Locked, format!("{what}: it stays locked")))
}

/// Number of pieces of a value.
fn count(len: usize) -> u8 {
    u8::try_from((len + 4).div_ceil(PIECE)).expect("limits are asserted")
}

fn piece(key: &[u8], i: u8) -> Vec<u8> {
    let mut name = Vec::with_capacity(key.len() + 1);
    name.extend_from_slice(key);
    name.push(i);
    name
}

fn translate(what: String, e: sled::Error) -> Error {
    match e {
        sled::Error::Io(e) => Error::io(what, e),
        other => Error::with_source(Kind::Damaged, what, other),
    }
}

impl Index for SledIndex {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let _pieces = self.pieces.read().unwrap_or_else(PoisonError::into_inner);
        self.read(key)
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let _pieces = self.pieces.read().unwrap_or_else(PoisonError::into_inner);
        let mut pairs = Vec::new();
        let mut next = self.guard(|db| db.range(from..).keys().next().transpose())?;
        while let Some(name) = next {
            let Some((&i, key)) = name.split_last() else {
                return Err(self.damaged("an empty key"));
            };
            if key >= to || pairs.len() == limit {
                break;
            }
            // `from` may lie between a key and its pieces.
            if key >= from {
                let value = if i == 0 { self.read(key)? } else { None };
                let value = value.ok_or_else(|| self.damaged("a first piece is missing"))?;
                pairs.push((key.to_vec(), value));
            }
            next = self.guard(|db| Ok(db.get_gt(piece(key, PIECE_END))?.map(|(name, _)| name)))?;
        }
        Ok(pairs)
    }

    fn apply(&self, changes: Vec<Change>) -> Result<()> {
        assert_limits(&changes);
        let _pieces = self.pieces.write().unwrap_or_else(PoisonError::into_inner);
        let mut batch = sled::Batch::default();
        for (key, value) in changes {
            let before = self.head(&key)?.map_or(0, |(len, _)| count(len));
            let now = value.as_ref().map_or(0, |value| count(value.len()));
            if let Some(value) = value {
                let len = u32::try_from(value.len()).expect("limits are asserted");
                let whole = [&len.to_le_bytes()[..], &value].concat();
                for (i, bytes) in (0..).zip(whole.chunks(PIECE)) {
                    batch.insert(piece(&key, i), bytes);
                }
            }
            for i in now..before {
                batch.remove(piece(&key, i));
            }
        }
        self.guard(|db| db.apply_batch(batch))
    }

    fn checkpoint(&self) -> Result<()> {
        let what = || format!("syncing the extent map {}", self.dir.display());
        if self.unsynced.load(Ordering::Acquire) {
            return Err(Error::new(Kind::Io, format!("{}: failed before", what())));
        }
        let synced = self
            .guard(|db| db.flush())
            .and_then(|_| self.file.sync_data().context(what));
        if synced.is_err() {
            self.unsynced.store(true, Ordering::Release);
        }
        synced
    }
}

impl Drop for SledIndex {
    fn drop(&mut self) {
        let db = self.db.take();
        // Dropping flushes, and panics where that fails; nothing depends on it.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(db)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u32) -> Vec<u8> {
        [&b"P"[..], &n.to_be_bytes()].concat()
    }

    fn value(n: u32, len: usize) -> Vec<u8> {
        (0..len).map(|i| (n as usize * 31 + i * 7) as u8).collect()
    }

    #[test]
    fn values_of_any_length_come_back_whole_also_after_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let home = SledHome::new(dir.path().join("map"));
        let lens = [0, 1, PIECE - 5, PIECE - 4, PIECE - 3, 5 * PIECE, VALUE_MAX];
        let index = home.open().unwrap();
        for (n, &len) in (0..).zip(&lens) {
            index
                .apply(vec![(key(n), Some(value(n, VALUE_MAX)))])
                .unwrap();
            index.apply(vec![(key(n), Some(value(n, len)))]).unwrap();
        }
        index.apply(vec![(key(100), Some(value(9, 9999)))]).unwrap();
        index
            .apply(vec![(key(100), None), (key(101), None)])
            .unwrap();
        let all = index.scan(b"P", b"Q", 100).unwrap();
        let expect: Vec<_> = (0..)
            .zip(&lens)
            .map(|(n, &len)| (key(n), value(n, len)))
            .collect();
        assert_eq!(all, expect);
        index.checkpoint().unwrap();
        drop(index);
        let index = home.open().unwrap();
        for (n, &len) in (0..).zip(&lens) {
            assert_eq!(index.get(&key(n)).unwrap(), Some(value(n, len)));
        }
        assert_eq!(index.get(&key(100)).unwrap(), None);
    }

    /// What a kill or a full disk leaves of a summary that sled was writing is no damage.
    #[test]
    fn an_unfinished_summary_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let home = SledHome::new(dir.path().join("map"));
        let put = |n| {
            let index = home.open().unwrap();
            index.apply(vec![(key(n), Some(value(n, 100)))]).unwrap();
            index.checkpoint().unwrap();
        };
        let summaries = || -> Vec<String> {
            let names = fs::read_dir(dir.path().join("map")).unwrap();
            let names = names.map(|e| e.unwrap().file_name().into_string().unwrap());
            names.filter(|name| name.starts_with("snap.")).collect()
        };
        put(1);
        put(2);
        // The name sorts behind those of all that are whole, as the next one's would.
        for (n, rest) in (3..).zip([&b""[..], b"cut short", &[0; 64]]) {
            assert!(!summaries().is_empty(), "sled keeps no summary any more");
            let left = dir.path().join("map/snap.00000000FFFFFFFF.generating");
            fs::write(&left, rest).unwrap();
            put(n);
            assert!(!left.exists());
            let index = home.open().unwrap();
            for n in 1..=n {
                assert_eq!(index.get(&key(n)).unwrap(), Some(value(n, 100)));
            }
        }
    }

    #[test]
    fn a_scan_starts_and_ends_where_it_should() {
        let dir = tempfile::tempdir().unwrap();
        let index = SledHome::new(dir.path().join("map")).open().unwrap();
        for n in 0..40 {
            index
                .apply(vec![(key(n), Some(value(n, 3 * PIECE)))])
                .unwrap();
        }
        let keys = |from: Vec<u8>, to: Vec<u8>, limit| -> Vec<Vec<u8>> {
            index
                .scan(&from, &to, limit)
                .unwrap()
                .into_iter()
                .map(|(key, _)| key)
                .collect()
        };
        assert_eq!(keys(key(3), key(5), 9), [key(3), key(4)]);
        assert_eq!(keys(key(3), key(5), 1), [key(3)]);
        // Just behind a key, which is before its second piece in sled's order.
        assert_eq!(keys(piece(&key(3), 0), key(6), 9), [key(4), key(5)]);
        assert_eq!(keys(key(9), key(9), 9), Vec::<Vec<u8>>::new());
        assert_eq!(keys(key(39), vec![b'Q'], 9), [key(39)]);
    }

    /// What a kill leaves is what is in sled's files; copying them while it is open shows just that.
    #[test]
    fn what_was_checkpointed_is_in_the_files_and_nothing_is_a_blob() {
        let dir = tempfile::tempdir().unwrap();
        let home = SledHome::new(dir.path().join("map"));
        let index = home.open().unwrap();
        for n in 0..200 {
            index
                .apply(vec![(key(n * 37 % 200), Some(value(n, 80_000)))])
                .unwrap();
            index.apply(vec![(key(n), Some(value(n, 81_944)))]).unwrap();
        }
        index.checkpoint().unwrap();
        let copy = dir.path().join("copy");
        fs::create_dir_all(copy.join("blobs")).unwrap();
        for entry in fs::read_dir(dir.path().join("map")).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() {
                fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
            }
        }
        assert_eq!(
            fs::read_dir(dir.path().join("map/blobs")).unwrap().count(),
            0
        );
        let copied = SledHome::new(copy).open().unwrap();
        let (a, b) = (
            index.scan(b"P", b"Q", 999).unwrap(),
            copied.scan(b"P", b"Q", 999).unwrap(),
        );
        assert_eq!(a.len(), 200);
        assert!(a == b);
    }

    #[test]
    fn a_second_opener_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let home = SledHome::new(dir.path().join("map"));
        let _index = home.open().unwrap();
        assert_eq!(home.open().err().unwrap().kind(), Kind::Locked);
    }

    /// Whatever is done to the files, opening and reading ends in a value that was put or an error.
    #[test]
    fn damage_is_an_error_and_setting_aside_starts_anew() {
        let dir = tempfile::tempdir().unwrap();
        let home = SledHome::new(dir.path().join("map"));
        let mut noticed = 0;
        for round in 0..9_u64 {
            let index = home.open().unwrap();
            for n in 0..60 {
                index.apply(vec![(key(n), Some(value(n, 60_000)))]).unwrap();
            }
            index.checkpoint().unwrap();
            drop(index);
            let db = dir.path().join("map/db");
            let mut bytes = fs::read(&db).unwrap();
            let len = bytes.len();
            match round % 3 {
                0 => bytes.truncate(len / 2),
                1 => bytes[len / 3..len / 3 + 4096].fill(0xff),
                _ => {
                    (0..64).for_each(|i| bytes[(round as usize * 7919 + i * 104_729) % len] ^= 0x55)
                }
            }
            fs::write(&db, bytes).unwrap();
            let looked = home.open().and_then(|index| index.scan(b"P", b"Q", 99));
            match looked {
                // sled may go back to an older state; the map above checks each value.
                Ok(pairs) => {
                    assert!(pairs.len() <= 60);
                    noticed += usize::from(pairs.len() < 60);
                }
                Err(e) => {
                    assert!(matches!(e.kind(), Kind::Damaged | Kind::Io), "{e:?}");
                    noticed += 1;
                }
            }
            home.set_aside().unwrap();
            assert_eq!(home.open().unwrap().scan(b"P", b"Q", 99).unwrap(), []);
            home.set_aside().unwrap();
            let left: Vec<_> = home.damaged().unwrap();
            assert_eq!(left.len(), 1, "{left:?}");
        }
        assert!(noticed > 0);
    }

    #[test]
    fn a_foreign_format_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let home = SledHome::new(dir.path().join("map"));
        let index = home.open().unwrap();
        index
            .apply(vec![(FORMAT_KEY.to_vec(), Some(vec![2]))])
            .unwrap();
        drop(index);
        assert_eq!(home.open().err().unwrap().kind(), Kind::Damaged);
        home.set_aside().unwrap();
        let index = home.open().unwrap();
        index
            .apply(vec![(key(1), Some(vec![1])), (FORMAT_KEY.to_vec(), None)])
            .unwrap();
        drop(index);
        assert_eq!(home.open().err().unwrap().kind(), Kind::Damaged);
    }
}
