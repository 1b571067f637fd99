//! A tree over a real engine on simulated disks, for the tests of `tree` and `fuse`.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::error::{Error, Kind, Result};
use crate::map::memory::MemoryIndexHome;
use crate::sys::disk::{Disk, Identity, Space};
use crate::sys::sim::SimWorld;
use crate::tree::{StatusFile, StatusSource, Tree};
use crate::units::Name;
use crate::volume::{Engine, Environment, Settings, Sources, VolumeOptions};

/// Two volumes, `odd` and `vm`, empty, without snapshots.
pub(crate) struct World {
    pub tree: Arc<Tree>,
    pub engine: Arc<Engine>,
    pub status: Arc<Status>,
    pub sim: SimWorld,
    index: MemoryIndexHome,
    sources: Arc<CountingSources>,
}

impl World {
    /// Bytes of `vm`.
    pub const VM: u64 = 1 << 20;
    /// Bytes of `odd`: not a whole number of grains or sectors.
    pub const ODD: u64 = 3 * 4096 + 777;
    pub const UID: u32 = 1234;
    pub const GID: u32 = 4321;

    /// How often a volume's source was synced.
    pub fn source_syncs(&self, volume: &str) -> u64 {
        self.sources.opened.lock().unwrap()[&format!("sources/{volume}")]
            .syncs
            .load(Ordering::SeqCst)
    }

    /// From the next opening on the sources are not there, or are there again.
    pub fn hide_sources(&self, hidden: bool) {
        self.sources.hidden.store(hidden, Ordering::SeqCst);
    }

    /// A new life: after a clean stop, or after the process was killed and `between` was done to the
    /// disks.
    pub fn restart(&mut self, kill: bool, between: impl FnOnce(&SimWorld)) {
        if kill {
            self.sim.kill();
        } else {
            self.engine.close().unwrap();
        }
        between(&self.sim);
        let environment = environment(&self.sim, &self.index, &self.sources);
        self.engine = Engine::open(environment, settings()).unwrap();
        self.tree = tree(&self.engine, &self.status);
    }
}

/// Log segments of the smallest useful size, so that a test can fill one.
fn settings() -> Settings {
    Settings {
        segment_bytes: 2 << 20,
        ..Settings::default()
    }
}

fn environment(
    sim: &SimWorld,
    index: &MemoryIndexHome,
    sources: &Arc<CountingSources>,
) -> Environment {
    Environment {
        dir: sim.dir("store"),
        index: Arc::new(index.clone()),
        sources: Arc::clone(sources) as Arc<dyn Sources>,
        clock: Arc::new(sim.clock()),
    }
}

fn tree(engine: &Arc<Engine>, status: &Arc<Status>) -> Arc<Tree> {
    let status = Arc::clone(status) as Arc<dyn StatusSource>;
    Arc::new(Tree::new(
        Arc::clone(engine),
        World::UID,
        World::GID,
        status,
    ))
}

pub(crate) fn world() -> World {
    let sim = SimWorld::new(1);
    let sources = Arc::new(CountingSources {
        sim: sim.clone(),
        hidden: AtomicBool::new(false),
        opened: Mutex::new(HashMap::new()),
    });
    let index = MemoryIndexHome::new();
    let environment = environment(&sim, &index, &sources);
    Engine::create(&environment, &settings()).unwrap();
    let engine = Engine::open(environment, settings()).unwrap();
    for (name, size) in [("odd", World::ODD), ("vm", World::VM)] {
        let path = format!("sources/{name}");
        sim.add_disk(&path, size);
        let name = Name::new(name).unwrap();
        // Nobody frees space in these tests: a writer need not wait for it.
        let options = VolumeOptions {
            on_full_wait_s: 0,
            ..VolumeOptions::default()
        };
        engine.add_volume(&name, &path, options).unwrap();
    }
    let status = Arc::new(Status::default());
    let tree = tree(&engine, &status);
    World {
        tree,
        engine,
        status,
        sim,
        index,
        sources,
    }
}

/// Renders something new each time.
#[derive(Default)]
pub(crate) struct Status {
    renders: AtomicU64,
    panic: AtomicBool,
}

impl Status {
    /// The next rendering panics.
    pub fn panic_next(&self) {
        self.panic.store(true, Ordering::Relaxed);
    }

    /// How often a status file was rendered.
    pub fn renders(&self) -> u64 {
        self.renders.load(Ordering::Relaxed)
    }
}

impl StatusSource for Status {
    fn render(&self, file: StatusFile) -> Result<Vec<u8>> {
        assert!(!self.panic.swap(false, Ordering::Relaxed), "asked to panic");
        Ok(format!(
            "{file:?} {:08}",
            self.renders.fetch_add(1, Ordering::Relaxed)
        )
        .into_bytes())
    }

    fn space(&self) -> Result<Space> {
        Ok(Space {
            total: 1 << 30,
            available: 1 << 29,
        })
    }

    fn now_ns(&self) -> i64 {
        1_700_000_000_000_000_000
    }
}

/// Simulated disks by name, each with its syncs counted.
struct CountingSources {
    sim: SimWorld,
    hidden: AtomicBool,
    opened: Mutex<HashMap<String, Arc<CountingDisk>>>,
}

impl Sources for CountingSources {
    fn open(&self, path: &str) -> Result<Arc<dyn Disk>> {
        let disk = self.sim.disk(path);
        let disk = disk
            .filter(|_| !self.hidden.load(Ordering::SeqCst))
            .ok_or_else(|| Error::new(Kind::NotFound, path))?;
        let disk = Arc::new(CountingDisk {
            disk,
            syncs: AtomicU64::new(0),
        });
        self.opened
            .lock()
            .unwrap()
            .insert(path.to_owned(), disk.clone());
        Ok(disk)
    }
}

struct CountingDisk {
    disk: Arc<dyn Disk>,
    syncs: AtomicU64,
}

impl Disk for CountingDisk {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.disk.read_exact_at(offset, buf)
    }
    fn write_all_at(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        self.disk.write_all_at(offset, parts)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.syncs.fetch_add(1, Ordering::SeqCst);
        self.disk.sync_data()
    }
    fn size(&self) -> io::Result<u64> {
        self.disk.size()
    }
    fn set_size(&self, size: u64) -> io::Result<()> {
        self.disk.set_size(size)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.disk.punch(offset, len)
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.disk.next_data(offset)
    }
    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        self.disk.next_hole(offset)
    }
    fn allocated(&self) -> io::Result<u64> {
        self.disk.allocated()
    }
    fn drop_cache(&self) -> io::Result<()> {
        self.disk.drop_cache()
    }

    fn identity(&self) -> io::Result<Identity> {
        self.disk.identity()
    }
}
