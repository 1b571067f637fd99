//! The work that is timed, the same for every contender.
//!
//! Reads look at one word of every page while the clock runs ([`content::sampled_wrong`]), which costs everybody
//! the same; a wrong one ends the run. Depth 1 is this process with one `pread` or `pwrite` after another. Depth 16
//! is fio with libaio if it is installed, which replays a list of offsets made here; else 16 threads of this
//! process. All contenders of a run have the same driver.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::content::{self, Buffer};
use super::options::Options;
use super::rig::{good, must};

/// What is written while a clock runs: never 0, which sources hold at first, and never the same again, because
/// who compares before he preserves would have nothing to do.
static NEXT: AtomicU64 = AtomicU64::new(100);

fn fresh() -> u64 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Opens a file, past the page cache if asked.
#[track_caller]
pub fn open(path: &Path, write: bool, direct: bool) -> File {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let mut how = OpenOptions::new();
    let file = how.read(true).write(write).custom_flags(flags).open(path);
    file.unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A range that was read in order.
pub struct Pass {
    pub took: Duration,
    /// Where a word was wrong, the first of them.
    pub wrong: Option<u64>,
}

impl Pass {
    /// How long it took, of one who must be right.
    #[track_caller]
    pub fn right(&self, path: &Path) -> Duration {
        if let Some(at) = self.wrong {
            panic!("WRONG BYTES at {at} of {}", path.display());
        }
        self.took
    }
}

/// Reads a range in order.
pub fn read_in_order(path: &Path, range: Range<u64>, request: u64, direct: bool) -> Pass {
    let file = open(path, false, direct);
    let mut buffer = Buffer::new(request as usize);
    let mut wrong = None;
    let begin = Instant::now();
    for at in range.step_by(request as usize) {
        file.read_exact_at(&mut buffer, at)
            .unwrap_or_else(|e| panic!("{} at {at}: {e}", path.display()));
        let found = content::sampled_wrong(&buffer, at, 0);
        wrong = wrong.or(found);
    }
    let took = begin.elapsed();
    Pass { took, wrong }
}

/// Reads a range and looks at every byte; not timed.
#[track_caller]
pub fn check_whole(path: &Path, range: Range<u64>, generation: u64) {
    let file = open(path, false, false);
    let mut buffer = Buffer::new(1 << 20);
    for at in range.clone().step_by(1 << 20) {
        let len = (range.end - at).min(1 << 20) as usize;
        file.read_exact_at(&mut buffer[..len], at)
            .unwrap_or_else(|e| panic!("{} at {at}: {e}", path.display()));
        if let Some(at) = content::first_wrong(&buffer[..len], at, generation) {
            panic!("WRONG BYTES at {at} of {}", path.display());
        }
    }
}

/// Writes a range in order and returns how long that took.
pub fn write_in_order(path: &Path, range: Range<u64>, request: u64, direct: bool) -> Duration {
    let file = open(path, true, direct);
    let mut buffer = Buffer::new(request as usize);
    content::fill(&mut buffer, range.start, fresh());
    let begin = Instant::now();
    for at in range.step_by(request as usize) {
        file.write_all_at(&buffer, at)
            .unwrap_or_else(|e| panic!("{} at {at}: {e}", path.display()));
    }
    begin.elapsed()
}

/// Small requests at given offsets.
#[derive(Clone, Copy)]
pub struct Scattered<'a> {
    pub path: &'a Path,
    pub offsets: &'a [u64],
    pub request: u64,
    pub depth: usize,
    pub write: bool,
    pub direct: bool,
}

impl Scattered<'_> {
    /// Requests a second.
    pub fn run(&self, options: &Options) -> f64 {
        // With small input its start would take longer than all the work.
        match options.small {
            true => self.by_threads(),
            false => self.as_measured(options),
        }
    }

    /// The same, and with small input, too.
    pub fn as_measured(&self, options: &Options) -> f64 {
        match self.depth > 1 && options.fio {
            true => self.by_fio(options),
            false => self.by_threads(),
        }
    }

    /// Without fio.
    pub fn by_threads(&self) -> f64 {
        let next = AtomicUsize::new(0);
        let begin = Instant::now();
        match self.depth {
            1 => self.work(&next),
            depth => std::thread::scope(|scope| {
                (0..depth).for_each(|_| {
                    scope.spawn(|| self.work(&next));
                });
            }),
        }
        self.offsets.len() as f64 / begin.elapsed().as_secs_f64()
    }

    fn work(&self, next: &AtomicUsize) {
        let file = open(self.path, self.write, self.direct);
        let mut buffer = Buffer::new(self.request as usize);
        content::fill(&mut buffer, 0, fresh());
        while let Some(&at) = self.offsets.get(next.fetch_add(1, Ordering::Relaxed)) {
            let done = match self.write {
                true => file.write_all_at(&buffer, at),
                false => file.read_exact_at(&mut buffer, at),
            };
            done.unwrap_or_else(|e| panic!("{} at {at}: {e}", self.path.display()));
            if !self.write && content::sampled_wrong(&buffer, at, 0).is_some() {
                panic!("WRONG BYTES at {at} of {}", self.path.display());
            }
        }
    }

    fn by_fio(&self, options: &Options) -> f64 {
        let list = tempfile::NamedTempFile::new().unwrap();
        let path = self.path.to_str().unwrap();
        let what = if self.write { "write" } else { "read" };
        let mut text = format!("fio version 2 iolog\n{path} add\n{path} open\n");
        for at in self.offsets {
            text.push_str(&format!("{path} {what} {at} {}\n", self.request));
        }
        text.push_str(&format!("{path} close\n"));
        list.as_file().write_all(text.as_bytes()).unwrap();
        let mut command = Command::new("fio");
        command.args(["--name=work", "--replay_no_stall=1", "--ioengine=libaio"]);
        command.args(["--output-format=json", "--invalidate=0", "--thread"]);
        command.arg(format!("--iodepth={}", self.depth));
        command.arg(format!("--randseed={}", fresh()));
        command.arg(format!("--direct={}", u8::from(self.direct)));
        command.arg(format!("--read_iolog={}", list.path().display()));
        command.current_dir(&options.dir);
        let said = good(&command.output().unwrap(), "fio");
        // It may say something before.
        let json = &said[said.find('{').expect("fio answers in JSON")..];
        let answer: serde_json::Value = serde_json::from_str(json).unwrap();
        let job = &answer["jobs"][0];
        assert_eq!(job["error"], 0, "fio: {said}");
        let total = job[what]["total_ios"].as_u64().unwrap();
        assert_eq!(total, self.offsets.len() as u64, "fio did other work");
        // A runtime of whole milliseconds is too coarse for small input, and never zero.
        let ms = job[what]["runtime"].as_u64().unwrap().max(1);
        total as f64 * 1e3 / ms as f64
    }
}

/// Makes a new source with pages of generation 0 in `range`, the rest of `size` a hole. In the page cache,
/// and durable.
pub fn make_source(path: &Path, size: u64, range: Range<u64>) {
    make_source_in(1 << 20, path, size, range);
}

/// The same, written in pieces of this size. Recent kernels keep what was written at once in one piece of page cache,
/// and with ext4 a small write to a large one costs ten times as much, whoever does it.
pub fn make_source_in(piece: u64, path: &Path, size: u64, range: Range<u64>) {
    let file = File::create_new(path).unwrap();
    file.set_len(size).unwrap();
    let mut buffer = Buffer::new(piece as usize);
    for at in range.clone().step_by(piece as usize) {
        let len = (range.end - at).min(piece) as usize;
        content::fill(&mut buffer[..len], at, 0);
        file.write_all_at(&buffer[..len], at).unwrap();
    }
    file.sync_all().unwrap();
}

/// Reads a file through, so that it is in the page cache.
pub fn warm(path: &Path, range: Range<u64>) {
    let file = open(path, false, false);
    let mut buffer = vec![0; 1 << 20];
    for at in range.step_by(1 << 20) {
        // The last piece may be short.
        let _ = file.read_at(&mut buffer, at).unwrap();
    }
}

/// Sees to it that a source is in the page cache.
pub fn ready(source: &Path, size: u64) {
    if cached(source).is_none_or(|bytes| bytes < size) {
        warm(source, 0..size);
    }
}

/// Has the kernel forget its clean pages of one file. What a mount's pages were made from stays.
pub fn forget(path: &Path) {
    let path = path.to_str().unwrap();
    must(
        "dd",
        &[
            &format!("if={path}"),
            "iflag=nocache",
            "count=0",
            "status=none",
        ],
    );
}

/// Bytes of a file in the page cache, if a tool is there that can tell.
pub fn cached(path: &Path) -> Option<u64> {
    let mut command = Command::new("fincore");
    command.args(["--bytes", "--noheadings", "--output", "RES"]);
    let out = command.arg(path).output().ok()?;
    String::from_utf8_lossy(&out.stdout).trim().parse().ok()
}

/// Waits until what was written to files is on the medium, so that nobody pays for another's writes.
pub fn settle(paths: &[std::path::PathBuf]) {
    for path in paths {
        match path.is_dir() {
            true => {
                let entries = fs::read_dir(path).unwrap();
                let inner: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
                settle(&inner);
            }
            // Sockets cannot be opened, and what is gone by now needs nothing.
            false => {
                if let Ok(file) = File::open(path) {
                    let _ = file.sync_all();
                }
            }
        }
    }
}
