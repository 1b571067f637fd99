//! Sources whose reads and syncs are counted, so that a test can tell what reached the daemon's disk.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use stillframe::error::Result;
use stillframe::sys::disk::{Disk, Identity};
use stillframe::sys::source::FileSources;
use stillframe::volume::Sources;

/// Reads and syncs of all sources of a mount since it was made.
#[derive(Default)]
pub struct Counts {
    pub reads: AtomicU64,
    pub syncs: AtomicU64,
}

/// The real sources, counted.
pub struct CountedSources(pub Arc<Counts>);

impl Sources for CountedSources {
    fn open(&self, path: &str) -> Result<Arc<dyn Disk>> {
        let disk = FileSources.open(path)?;
        let counts = Arc::clone(&self.0);
        Ok(Arc::new(CountedDisk { disk, counts }))
    }
}

struct CountedDisk {
    disk: Arc<dyn Disk>,
    counts: Arc<Counts>,
}

impl Disk for CountedDisk {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.counts.reads.fetch_add(1, Ordering::SeqCst);
        self.disk.read_exact_at(offset, buf)
    }
    fn write_all_at(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        self.disk.write_all_at(offset, parts)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.counts.syncs.fetch_add(1, Ordering::SeqCst);
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
