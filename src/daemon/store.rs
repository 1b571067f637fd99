//! A store directory: where it is, whether it is one, and holding it open.
//!
//! Promises: a directory becomes a store only when the caller says that it may, so that a mistyped
//! path is refused instead of being filled; nothing is opened without the store's lock, and the
//! lock is let go only after the engine has closed. [`Store::close`] is the clean stop; a `Store`
//! that is dropped without it is as safe as a killed process, and no safer.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::daemon::home;
use crate::daemon::status::shown;
use crate::error::{Error, IoContext, Kind, Result};
use crate::log::superblock::SuperblockFile;
use crate::map::index::IndexHome;
use crate::map::sled_index::SledHome;
use crate::sys::clock::SystemClock;
use crate::sys::disk::{Dir, Disk};
use crate::sys::file::FileDir;
use crate::sys::lock::StoreLock;
use crate::sys::process;
use crate::sys::source::FileSources;
use crate::volume::{Engine, Environment, Settings, Sources};

/// The control socket's name in the store.
pub const SOCKET: &str = "control.sock";
/// The daemon's log in the store, where there is no journal.
pub const LOG: &str = "daemon.log";
/// The file that makes a directory a store.
const MARK: &str = "superblock";
/// The log's folder.
const LOG_DIR: &str = "log";
/// The extent map's folder.
const MAP_DIR: &str = "map";
/// What may lie in a directory that is not a store yet.
const HARMLESS: [&str; 4] = ["lock", SOCKET, LOG, "daemon.log.old"];

/// The store when nobody names one: `/var/lib/stillframe` for root, else
/// `$XDG_STATE_HOME/stillframe`, else `~/.local/state/stillframe`.
///
/// # Errors
/// `Invalid` when there is no home directory either.
pub fn default_path() -> Result<PathBuf> {
    if process::effective_uid() == 0 {
        return Ok(PathBuf::from("/var/lib/stillframe"));
    }
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .map(|state| state.join("stillframe"))
        .ok_or_else(|| {
            Error::new(
                Kind::Invalid,
                "there is no home directory; name the store with --store DIR",
            )
        })
}

/// What is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    Absent,
    /// A directory without content of anybody's.
    Empty,
    /// A store, of whatever health.
    Store,
}

/// Looks at a path without changing anything.
///
/// # Errors
/// `Invalid` if it is no directory, or one with something else in it; `Damaged` if it holds a log
/// but no superblock; `Permission`, `Io`.
pub fn look(path: &Path) -> Result<Found> {
    look_in(path, &shown(path))
}

fn look_in(path: &Path, at: &str) -> Result<Found> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Found::Absent),
        Err(e) if e.kind() == ErrorKind::NotADirectory => {
            return Err(Error::new(
                Kind::Invalid,
                format!("store {at} is not a directory"),
            ));
        }
        Err(e) => return Err(Error::io(format!("cannot look into store {at}"), e)),
    };
    let mut foreign = false;
    let mut log = false;
    for entry in entries {
        let name = entry
            .context(|| format!("cannot look into store {at}"))?
            .file_name();
        if name == MARK {
            return Ok(Found::Store);
        }
        if name == LOG_DIR {
            // Empty: what is left of making a store that was cut off.
            log |= !is_empty(&path.join(LOG_DIR));
            continue;
        }
        foreign |= !HARMLESS.iter().any(|&harmless| name == harmless);
    }
    if log {
        return Err(Error::new(
            Kind::Damaged,
            format!("store {at} holds a log but no superblock"),
        ));
    }
    if foreign {
        return Err(Error::new(
            Kind::Invalid,
            format!("{at} is not a store and not empty; name an empty directory with --store"),
        ));
    }
    Ok(Found::Empty)
}

/// The machine's sources, as the engine asks for them.
struct RealSources;

impl Sources for RealSources {
    fn open(&self, path: &str) -> Result<Arc<dyn Disk>> {
        FileSources.open(path)
    }

    fn astray(&self, path: &str, disk: &dyn Disk) -> Result<Option<String>> {
        FileSources.astray(path, disk)
    }
}

fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none())
}

/// Whether making the store was cut off before it was one: the superblock is the last thing that is
/// made, and no segment of the log is there before it.
fn is_unfinished(dir: &FileDir) -> bool {
    is_empty(&dir.fd_path().join(LOG_DIR))
        && SuperblockFile::open(dir).is_err_and(|e| e.kind() == Kind::Damaged)
}

/// A store directory with its lock.
pub struct Held {
    dir: Arc<FileDir>,
    lock: StoreLock,
    index: Arc<SledHome>,
    fresh: bool,
}

/// Locks a store; with `may_create` an absent or empty directory becomes one.
///
/// # Errors
/// `NotFound` if there is no store and none may be made; `Locked` naming the process that has it;
/// else as [`look`].
pub fn hold(path: &Path, may_create: bool) -> Result<Held> {
    let found = look(path)?;
    let no_store = || {
        Error::new(
            Kind::NotFound,
            format!(
                "no store at {}; correct --store, or name the first volume with \
                 --volume NAME=SOURCE to make one there",
                shown(path)
            ),
        )
    };
    if found != Found::Store && !may_create {
        return Err(no_store());
    }
    let dir = if found == Found::Absent {
        FileDir::create(path)?
    } else {
        FileDir::open(path)?
    };
    // The path may lead elsewhere by now: nothing is made in what was not looked at.
    let opened = look_in(&dir.fd_path(), &shown(dir.path()))?;
    if opened != Found::Store && !may_create {
        return Err(no_store());
    }
    let lock = StoreLock::acquire(&dir)?;
    // Looked at again: another process may have made the store before the lock was ours.
    let mut fresh = look_in(&dir.fd_path(), &shown(dir.path()))? != Found::Store;
    if !fresh && is_unfinished(&dir) {
        if !may_create {
            return Err(no_store());
        }
        dir.remove(MARK)
            .context(|| "cannot remove an unfinished superblock")?;
        fresh = true;
    }
    // By the descriptor: the store's own path may be renamed, or lead elsewhere, at any time.
    let index = SledHome::through(dir.fd_path().join(MAP_DIR), dir.path().join(MAP_DIR));
    let index = Arc::new(index);
    Ok(Held {
        dir: Arc::new(dir),
        lock,
        index,
        fresh,
    })
}

impl Held {
    /// Whether [`Held::open`] will make the store.
    pub fn fresh(&self) -> bool {
        self.fresh
    }

    /// The directory.
    pub fn dir(&self) -> &Arc<FileDir> {
        &self.dir
    }

    /// Gets the extent map out of the way, so that opening rebuilds it from the log.
    ///
    /// # Errors
    /// `Io`.
    pub fn drop_map(&self) -> Result<()> {
        self.index.set_aside()
    }

    /// What the engine is given.
    pub fn environment(&self) -> Environment {
        Environment {
            dir: self.dir.clone(),
            index: self.index.clone(),
            sources: Arc::new(RealSources),
            clock: Arc::new(SystemClock),
        }
    }

    /// What cannot be read says nothing: then it is taken for one, which trusts less.
    fn is_copy(&self) -> bool {
        let copy = home::is_copy(&self.dir).unwrap_or_else(|e| {
            tracing::warn!("cannot read where the store was: {e}");
            true
        });
        if copy {
            tracing::warn!("this store is a copy, or was moved to another filesystem");
        }
        copy
    }

    /// Opens the store, after making it if it is fresh; recovers what a killed predecessor left.
    ///
    /// # Errors
    /// `Damaged` for damage and for a newer format; `NoSpace`, `Permission`, `Io`.
    pub fn open(self) -> Result<Store> {
        self.open_with(Settings::default())
    }

    /// As [`Held::open`], with other settings than the usual ones.
    ///
    /// # Errors
    /// As [`Held::open`]; `Invalid` for a setting that no store can have.
    pub fn open_with(self, settings: Settings) -> Result<Store> {
        let environment = self.environment();
        if self.fresh {
            // Before anything is made in it.
            self.dir.overwrite_in_place();
            Engine::create(&environment, &settings)?;
        }
        let copied = !self.fresh && self.is_copy();
        let settings = Settings { copied, ..settings };
        let engine = Engine::open(environment, settings).map_err(|e| match e.kind() {
            Kind::Unsupported => Error::new(
                Kind::Damaged,
                format!("{}; use the version that wrote the store", e.chain()),
            ),
            _ => e,
        })?;
        let remembered = engine.remember_changes();
        let settled = remembered
            .and_then(|()| home::settle(&self.dir).context(|| "cannot write to the store"));
        // Next time it is a copy again.
        if let Err(e) = settled {
            tracing::warn!("cannot note where the store is: {}", e.chain());
        }
        Ok(Store {
            engine,
            dir: self.dir,
            lock: self.lock,
        })
    }
}

/// An open store: its engine, its directory, its lock.
pub struct Store {
    engine: Arc<Engine>,
    dir: Arc<FileDir>,
    lock: StoreLock,
}

impl Store {
    /// The engine.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// The directory.
    pub fn dir(&self) -> &Arc<FileDir> {
        &self.dir
    }

    /// Clean stop, then lets the lock go. The lock goes in either case.
    ///
    /// # Errors
    /// The engine's: the next start recovers.
    pub fn close(self) -> Result<()> {
        let closed = self.engine.close();
        // Everything that holds the store's files goes before the lock does.
        drop(self.engine);
        drop(self.lock);
        closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_directory_is_a_store_only_with_its_superblock() {
        let top = tempfile::tempdir().unwrap();
        let at = top.path().join("s");
        assert_eq!(look(&at).unwrap(), Found::Absent);
        fs::create_dir(&at).unwrap();
        assert_eq!(look(&at).unwrap(), Found::Empty);
        fs::write(at.join("lock"), "").unwrap();
        assert_eq!(look(&at).unwrap(), Found::Empty);
        fs::write(at.join("holiday.jpg"), "").unwrap();
        assert_eq!(look(&at).unwrap_err().kind(), Kind::Invalid);
        fs::create_dir(at.join("log")).unwrap();
        assert_eq!(look(&at).unwrap_err().kind(), Kind::Invalid);
        fs::write(at.join("log/000001.seg"), "").unwrap();
        assert_eq!(look(&at).unwrap_err().kind(), Kind::Damaged);
        fs::write(at.join(MARK), "").unwrap();
        assert_eq!(look(&at).unwrap(), Found::Store);
        assert_eq!(look(&at.join("lock")).unwrap_err().kind(), Kind::Invalid);
    }

    /// As [`super::hold`]. A process that another test starts has copies of all descriptors for a
    /// moment, of a lock just given back too.
    fn hold(path: &Path, may_create: bool) -> Result<Held> {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
        loop {
            match super::hold(path, may_create) {
                Err(e) if e.kind() == Kind::Locked && std::time::Instant::now() < end => {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                done => return done,
            }
        }
    }

    /// A process killed while it made a store leaves nothing that needs repair, and a store whose
    /// log was deleted is not taken for one that was never finished.
    #[test]
    fn a_store_that_was_cut_off_in_the_making_is_made_again() {
        let top = tempfile::tempdir().unwrap();
        let at = top.path().join("s");
        for cut in ["", "log", "log superblock"] {
            fs::create_dir(&at).unwrap();
            fs::set_permissions(&at, fs::Permissions::from_mode(0o700)).unwrap();
            if cut.contains("log") {
                fs::create_dir(at.join(LOG_DIR)).unwrap();
            }
            if cut.contains(MARK) {
                fs::write(at.join(MARK), "torn").unwrap();
            }
            let refused = hold(&at, false).map(|_| ()).unwrap_err();
            assert_eq!(refused.kind(), Kind::NotFound, "{cut}");
            let held = hold(&at, true).unwrap();
            assert!(held.fresh(), "{cut}");
            held.open().unwrap().close().unwrap();
            assert!(!hold(&at, true).unwrap().fresh(), "{cut}");
            fs::remove_dir_all(at.join(LOG_DIR)).unwrap();
            fs::create_dir(at.join(LOG_DIR)).unwrap();
            assert!(!hold(&at, true).unwrap().fresh(), "{cut}");
            fs::remove_dir_all(&at).unwrap();
        }
    }

    /// A refused path stays as it was: nothing is made, not even a lock file.
    #[test]
    fn a_typo_leaves_no_trace() {
        let top = tempfile::tempdir().unwrap();
        let at = top.path().join("typo");
        assert_eq!(
            hold(&at, false).map(|_| ()).unwrap_err().kind(),
            Kind::NotFound
        );
        assert!(!at.exists());
        fs::create_dir(&at).unwrap();
        assert_eq!(
            hold(&at, false).map(|_| ()).unwrap_err().kind(),
            Kind::NotFound
        );
        assert_eq!(fs::read_dir(&at).unwrap().count(), 0);
    }
}
