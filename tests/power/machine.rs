//! The program under test: a store and its volumes on mounted filesystems.
//!
//! [`Machine`] is what a history needs of it; [`Library`] is the engine in this process, opened the
//! way the daemon opens it, with real files and the real index.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use stillframe::daemon::store::{self, Held};
use stillframe::error::{Kind, Result};
use stillframe::sys::disk::Disk;
use stillframe::sys::source::FileSources;
use stillframe::units::{Grain, Name};
use stillframe::volume::{Engine, Environment, Settings, Sources, VolumeOptions, Zeroing};

use crate::model::{Patch, Which};
use crate::rig::PATIENCE;

pub fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

pub fn volume_name(v: usize) -> String {
    format!("v{v}")
}

/// The volumes' first sizes and grains.
pub const VOLUMES: [(u64, u64); 2] = [(640 << 10, 4096), ((768 << 10) + 777, 16384)];

/// A store that can be worked with; whatever it refuses fails the test.
pub trait Machine: Sync {
    fn write(&self, v: usize, which: &Which, patch: &Patch);
    /// Makes a range zero.
    fn zero(&self, v: usize, which: &Which, offset: u64, len: u64);
    fn flush(&self, v: usize, which: &Which);
    fn take(&self, snapshot: &str, of: &[usize]);
    fn delete(&self, v: usize, snapshot: &str, keep_bookmark: bool);
    fn delete_bookmark(&self, v: usize, bookmark: &str);
    fn rename(&self, v: usize, from: &str, to: &str);
    fn clone_snapshot(&self, v: usize, of: &str, clone: &str);
    fn clone_clone(&self, v: usize, of: &str, clone: &str);
    fn rename_clone(&self, v: usize, from: &str, to: &str);
    fn delete_clone(&self, v: usize, clone: &str);
    /// Returns the name of the snapshot that undoes it.
    fn revert(&self, v: usize, to: &str) -> String;
    fn resize(&self, v: usize, to: u64);
    fn maintain(&self);
    /// Stops, cleanly or by a kill, and starts again, perhaps without the map.
    fn restart(&mut self, how: Restart);
    /// Stops for good.
    fn stop(self: Box<Self>);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    Clean,
    Kill,
    LoseMap,
}

/// Small, so that segments, checkpoints and the cache turn over in a short history.
pub fn settings() -> Settings {
    Settings {
        map_cache_bytes: 64 << 10,
        segment_bytes: 1 << 20,
        checkpoint_bytes: 512 << 10,
        ballast_bytes: 256 << 10,
        ..Settings::default()
    }
}

/// Sources by their names in a directory: a state is mounted wherever there is room.
struct Named(PathBuf);

impl Sources for Named {
    fn open(&self, name: &str) -> Result<Arc<dyn Disk>> {
        let path = self.0.join(name);
        let path = path.to_str().expect("a temporary path");
        unlocked(|| FileSources.open(path))
    }
}

/// A process that another thread is starting has copies of all descriptors for a moment, also of a lock
/// that was just given back.
fn unlocked<T>(open: impl Fn() -> Result<T>) -> Result<T> {
    let end = Instant::now() + PATIENCE;
    loop {
        match open() {
            Err(e) if matches!(e.kind(), Kind::Locked | Kind::Busy) && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(1));
            }
            done => return done,
        }
    }
}

pub struct Library {
    dir: PathBuf,
    sources: PathBuf,
    /// The engine, and what holds the store's lock; the engine goes first.
    open: Option<(Arc<Engine>, Held)>,
}

impl Library {
    /// Makes a store at a directory, and the volumes with new sources in another.
    pub fn new(dir: &Path, sources: &Path) -> Library {
        let mut library = Library {
            dir: dir.to_owned(),
            sources: sources.to_owned(),
            open: None,
        };
        library.start(true).expect("a store is made");
        for (v, &(size, grain)) in VOLUMES.iter().enumerate() {
            let file = format!("{}.img", volume_name(v));
            let source = std::fs::File::create_new(sources.join(&file)).unwrap();
            source.set_len(size).unwrap();
            source.sync_all().unwrap();
            // Without this the source's name is not durable, and that is its maker's business.
            std::fs::File::open(sources).unwrap().sync_all().unwrap();
            let options = VolumeOptions {
                grain: Grain::new(grain).unwrap(),
                ..VolumeOptions::default()
            };
            let name = name(&volume_name(v));
            library.engine().add_volume(&name, &file, options).unwrap();
        }
        library
    }

    /// Opens what is there.
    pub fn existing(dir: &Path, sources: &Path, lose_map: bool) -> Result<Library> {
        let mut library = Library {
            dir: dir.to_owned(),
            sources: sources.to_owned(),
            open: None,
        };
        if lose_map {
            unlocked(|| store::hold(dir, false))?.drop_map()?;
        }
        library.start(false)?;
        Ok(library)
    }

    fn start(&mut self, may_create: bool) -> Result<()> {
        let held = unlocked(|| store::hold(&self.dir, may_create))?;
        let environment = Environment {
            sources: Arc::new(Named(self.sources.clone())),
            ..held.environment()
        };
        if held.fresh() {
            held.dir().overwrite_in_place();
            Engine::create(&environment, &settings())?;
        }
        self.open = Some((Engine::open(environment, settings())?, held));
        Ok(())
    }

    pub fn engine(&self) -> &Engine {
        &self.open.as_ref().expect("it is open").0
    }

    fn clone(&self, v: usize, clone: &str) -> Arc<stillframe::volume::OpenClone> {
        let (volume, clone) = (name(&volume_name(v)), name(clone));
        self.engine().open_clone(&volume, &clone).unwrap()
    }

    fn volume(&self, v: usize) -> Arc<stillframe::volume::Volume> {
        self.engine().volume(&name(&volume_name(v))).unwrap()
    }
}

impl Machine for Library {
    fn write(&self, v: usize, which: &Which, patch: &Patch) {
        let done = match which {
            None => self.volume(v).write_at(patch.offset, &patch.data, false),
            Some(clone) => self
                .clone(v, clone)
                .write_at(patch.offset, &patch.data, false),
        };
        done.unwrap();
    }

    fn zero(&self, v: usize, which: &Which, offset: u64, len: u64) {
        let done = match which {
            None => self.volume(v).zero(offset, len, Zeroing::Discard),
            Some(clone) => self.clone(v, clone).zero(offset, len, Zeroing::Discard),
        };
        done.unwrap();
    }

    fn flush(&self, v: usize, which: &Which) {
        let done = match which {
            None => self.volume(v).flush(),
            Some(clone) => self.clone(v, clone).flush(),
        };
        done.unwrap();
    }

    fn take(&self, snapshot: &str, of: &[usize]) {
        let targets: Vec<_> = of
            .iter()
            .map(|&v| (name(&volume_name(v)), name(snapshot)))
            .collect();
        self.engine().take_snapshots(&targets).unwrap();
    }

    fn delete(&self, v: usize, snapshot: &str, keep_bookmark: bool) {
        let (volume, snapshot) = (name(&volume_name(v)), name(snapshot));
        let done = match keep_bookmark {
            true => self
                .engine()
                .delete_snapshot_keep_bookmark(&volume, &snapshot),
            false => self.engine().delete_snapshot(&volume, &snapshot),
        };
        done.unwrap();
    }

    fn delete_bookmark(&self, v: usize, bookmark: &str) {
        let volume = name(&volume_name(v));
        let done = self.engine().delete_bookmark(&volume, &name(bookmark));
        done.unwrap();
    }

    fn rename(&self, v: usize, from: &str, to: &str) {
        let volume = name(&volume_name(v));
        let done = self
            .engine()
            .rename_snapshot(&volume, &name(from), &name(to));
        done.unwrap();
    }

    fn clone_snapshot(&self, v: usize, of: &str, clone: &str) {
        let volume = name(&volume_name(v));
        let done = self
            .engine()
            .clone_snapshot(&volume, &name(of), &name(clone));
        done.unwrap();
    }

    fn clone_clone(&self, v: usize, of: &str, clone: &str) {
        let volume = name(&volume_name(v));
        let done = self.engine().clone_clone(&volume, &name(of), &name(clone));
        done.unwrap();
    }

    fn rename_clone(&self, v: usize, from: &str, to: &str) {
        let volume = name(&volume_name(v));
        let done = self.engine().rename_clone(&volume, &name(from), &name(to));
        done.unwrap();
    }

    fn delete_clone(&self, v: usize, clone: &str) {
        let volume = name(&volume_name(v));
        self.engine().delete_clone(&volume, &name(clone)).unwrap();
    }

    fn revert(&self, v: usize, to: &str) -> String {
        let volume = name(&volume_name(v));
        let done = self
            .engine()
            .revert_volume(&volume, &name(to), &mut |_, _| ());
        done.unwrap().undo.name.to_string()
    }

    fn resize(&self, v: usize, to: u64) {
        let volume = name(&volume_name(v));
        self.engine().resize_volume(&volume, to).unwrap();
    }

    fn maintain(&self) {
        while self.engine().maintain().unwrap() {}
    }

    fn restart(&mut self, how: Restart) {
        let (engine, held) = self.open.take().expect("it is open");
        // Dropped without a close it is as safe as a killed process, and no safer.
        if how != Restart::Kill {
            engine.close().unwrap();
        }
        drop(engine);
        drop(held);
        if how == Restart::LoseMap {
            let held = unlocked(|| store::hold(&self.dir, false)).unwrap();
            held.drop_map().unwrap();
        }
        self.start(false).expect("it opens again");
    }

    fn stop(self: Box<Self>) {
        self.engine().close().unwrap();
    }
}
