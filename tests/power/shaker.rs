//! Has the kernel write back what it holds of some files, at moments nobody chose.
//!
//! A kernel does this whenever it likes; in a short test it would hardly ever. What is written back is
//! not flushed: it lies in the device's cache, where a power cut may take any part of it.
//!
//! It works by advising that cached pages are not needed, which makes the kernel begin to write the
//! dirty ones. Dropping it ends its thread.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use stillframe::sys::disk::Disk;
use stillframe::sys::file::FileDisk;

use crate::rig::Chance;

pub struct Shaker {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// All files below a directory, as they are now.
fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files(&entry.path(), found),
            Ok(kind) if kind.is_file() => found.push(entry.path()),
            _ => {}
        }
    }
}

impl Shaker {
    pub fn new(dirs: Vec<PathBuf>, seed: u64) -> Shaker {
        let stop = Arc::new(AtomicBool::new(false));
        let ending = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut chance = Chance(seed);
            while !ending.load(Ordering::Acquire) {
                let mut all = Vec::new();
                dirs.iter().for_each(|dir| files(dir, &mut all));
                for path in all {
                    if chance.below(2) == 0 {
                        continue;
                    }
                    // It may be gone by now.
                    if let Ok(disk) = FileDisk::open(&path, false) {
                        let _ = disk.drop_cache();
                    }
                }
                std::thread::sleep(Duration::from_micros(chance.below(3000)));
            }
        });
        Shaker {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Shaker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
