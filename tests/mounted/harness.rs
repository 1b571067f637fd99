//! A store served over a real mount by this process, and the tools of the machine.
//!
//! [`Mount`] unmounts when it is dropped, also while a test panics: lazily, so that a file the test
//! still holds does not keep it. Everything lies below one temporary directory on a real disk.

#![allow(
    unsafe_code,
    reason = "fallocate, renameat2 and mmap as a user's program calls them"
)]

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::counted::{CountedSources, Counts};
pub use crate::rig::Chance;

use stillframe::error::Result;
use stillframe::fuse::{Options, SessionHandle, serve};
use stillframe::map::sled_index::SledHome;
use stillframe::sys::clock::{Clock, SystemClock};
use stillframe::sys::disk::{Dir, Space};
use stillframe::sys::file::{FileDir, FileDisk};
use stillframe::sys::mount::{Unmount, escape_source, mount_fuse, unmount};
use stillframe::sys::process::{effective_gid, effective_uid};
use stillframe::tree::{NodeId, StatusFile, StatusSource, Tree};
use stillframe::units::Name;
use stillframe::volume::{Engine, Environment, Settings, VolumeInfo, VolumeOptions};

/// What a test needs of the machine.
#[derive(Clone, Copy, PartialEq)]
pub enum Needs {
    Fuse,
    /// Root too, for loop devices and mounting what is on them.
    Loops,
}

/// Whether a test can run; says loudly that it cannot, and fails where it must.
pub fn possible(needs: Needs, test: &str) -> bool {
    let fuse = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let missing = match (fuse, needs) {
        (Err(e), _) => format!("/dev/fuse: {e}"),
        (Ok(_), Needs::Loops) if effective_uid() != 0 => "not root".to_owned(),
        (Ok(_), Needs::Loops) if !Path::new("/dev/loop-control").exists() => {
            "no /dev/loop-control".to_owned()
        }
        _ => return true,
    };
    let text = format!("SKIPPED {test}: {missing}\n");
    assert!(std::env::var_os("STILLFRAME_CI").is_none(), "{text}");
    // Not by a macro: the test harness would keep that to itself.
    io::stderr().write_all(text.as_bytes()).unwrap();
    false
}

/// Whether QEMU's tool for images is there; a part of `test` is left out without it.
pub fn qemu_img(test: &str) -> bool {
    if Command::new("qemu-img").arg("--version").output().is_ok() {
        return true;
    }
    let text = format!("SKIPPED {test} with qemu-img: it is not installed\n");
    assert!(std::env::var_os("STILLFRAME_CI").is_none(), "{text}");
    io::stderr().write_all(text.as_bytes()).unwrap();
    false
}

struct RealStatus(FileDir);

impl StatusSource for RealStatus {
    fn render(&self, file: StatusFile) -> Result<Vec<u8>> {
        Ok(format!("{file:?}\n").into_bytes())
    }

    fn space(&self) -> Result<Space> {
        use stillframe::error::IoContext;
        self.0.space().context(|| "cannot ask for space")
    }

    fn now_ns(&self) -> i64 {
        SystemClock.now_ns()
    }
}

/// The thread a daemon has for background work.
struct Maintenance {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
    failure: Arc<Mutex<Option<String>>>,
}

impl Maintenance {
    fn start(engine: &Arc<Engine>) -> Maintenance {
        let stop = Arc::new(AtomicBool::new(false));
        let failure = Arc::new(Mutex::new(None));
        let (stopped, failed) = (Arc::clone(&stop), Arc::clone(&failure));
        let engine = Arc::clone(engine);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if let Err(e) = engine.maintain() {
                    failed.lock().unwrap().get_or_insert(e.chain());
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Maintenance {
            stop,
            thread,
            failure,
        }
    }

    fn end(self) -> Option<String> {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
        self.failure.lock().unwrap().take()
    }
}

struct Running {
    engine: Arc<Engine>,
    session: SessionHandle,
    tree: Arc<Tree>,
    maintenance: Maintenance,
}

/// A mounted store.
pub struct Mount {
    running: Option<Running>,
    counts: Arc<Counts>,
    /// Whether others than who mounts may come in.
    others: bool,
    path: PathBuf,
    dir: tempfile::TempDir,
}

impl Mount {
    /// An empty store, mounted.
    pub fn new() -> Mount {
        Mount::open_to(false)
    }

    /// An empty store, mounted with or without `allow_other`.
    pub fn open_to(others: bool) -> Mount {
        let dir = tempfile::Builder::new()
            .prefix("mounted-")
            .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
            .unwrap();
        let path = dir.path().join("mnt");
        fs::create_dir(&path).unwrap();
        let mut mount = Mount {
            running: None,
            counts: Arc::default(),
            others,
            path,
            dir,
        };
        Engine::create(&mount.environment(), &settings()).unwrap();
        mount.start();
        mount
    }

    fn environment(&self) -> Environment {
        let dir = FileDir::create(&self.scratch("store")).unwrap();
        Environment {
            dir: Arc::new(dir),
            index: Arc::new(SledHome::new(self.scratch("store").join("map"))),
            sources: Arc::new(CountedSources(Arc::clone(&self.counts))),
            clock: Arc::new(SystemClock),
        }
    }

    fn start(&mut self) {
        let engine = Engine::open(self.environment(), settings()).unwrap();
        let store = self.scratch("store");
        let status = Arc::new(RealStatus(FileDir::open(&store).unwrap()));
        let tree = Arc::new(Tree::new(
            Arc::clone(&engine),
            effective_uid(),
            effective_gid(),
            status,
        ));
        let fd = mount_fuse(&self.path, &escape_source(&store), self.others).unwrap();
        let session = serve(fd, Arc::clone(&tree), Options::default()).unwrap();
        self.running = Some(Running {
            maintenance: Maintenance::start(&engine),
            engine,
            session,
            tree,
        });
    }

    fn stop(&mut self) -> std::result::Result<(), String> {
        let Some(running) = self.running.take() else {
            return Ok(());
        };
        let gone = unmount(&self.path, Unmount::Lazy);
        let begun = Instant::now();
        while !running.session.is_finished() && begun.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let finished = running.session.is_finished();
        let maintained = running.maintenance.end();
        let closed = running.engine.close();
        gone.map_err(|e| e.chain())?;
        closed.map_err(|e| e.chain())?;
        match (finished, maintained) {
            (true, None) => Ok(()),
            (true, Some(why)) => Err(format!("maintenance failed: {why}")),
            (false, _) => Err("the session did not end: something holds a file".to_owned()),
        }
    }

    /// A clean stop and a new life.
    pub fn restart(&mut self) {
        self.stop().unwrap();
        self.start();
    }

    /// A path beside the mount, on a real filesystem.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A path in the mount.
    pub fn at(&self, path: &str) -> PathBuf {
        self.path.join(path)
    }

    pub fn engine(&self) -> &Engine {
        &self.running.as_ref().unwrap().engine
    }

    /// Reads and syncs of the sources so far.
    pub fn source_reads_and_syncs(&self) -> (u64, u64) {
        let count = |n: &AtomicU64| n.load(Ordering::SeqCst);
        (count(&self.counts.reads), count(&self.counts.syncs))
    }

    /// Nodes that the kernel knows, the fixed ones aside.
    pub fn known_nodes(&self) -> usize {
        self.running.as_ref().unwrap().tree.known_nodes()
    }

    /// Listings with attributes that the kernel asked for.
    pub fn listings_with_attributes(&self) -> u64 {
        let tree = &self.running.as_ref().unwrap().tree;
        tree.listings_with_attributes()
    }

    /// Has the kernel drop a name and, if nothing else holds it, forget the node.
    pub fn drop_name(&self, directory: &Path, name: &str) {
        let parent = NodeId(fs::metadata(directory).unwrap().ino());
        let session = &self.running.as_ref().unwrap().session;
        session.invalidate_entry(parent, name).unwrap();
    }

    /// Puts a file under protection.
    pub fn add(&self, name: &str, source: &Path, options: VolumeOptions) {
        let source = source.to_str().unwrap();
        self.engine()
            .add_volume(&Name::new(name).unwrap(), source, options)
            .unwrap();
    }

    pub fn info(&self, volume: &str) -> VolumeInfo {
        let name = Name::new(volume).unwrap();
        self.engine().volume(&name).unwrap().info()
    }

    pub fn live(&self, volume: &str) -> PathBuf {
        self.at(&format!("{volume}/live.img"))
    }

    pub fn snapshot(&self, volume: &str, name: &str) -> PathBuf {
        self.at(&format!("{volume}/snapshots/{name}.img"))
    }

    /// Takes a snapshot as touch does.
    pub fn touch(&self, volume: &str, name: &str) -> PathBuf {
        let path = self.snapshot(volume, name);
        run("touch", &[&path]);
        path
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let stopped = self.stop();
        if !std::thread::panicking() {
            stopped.unwrap();
        }
    }
}

fn settings() -> Settings {
    Settings {
        segment_bytes: 8 << 20,
        checkpoint_bytes: 4 << 20,
        ..Settings::default()
    }
}

/// Runs a tool that must succeed; returns what it printed.
pub fn run<A: AsRef<std::ffi::OsStr>>(tool: &str, args: &[A]) -> String {
    let (ok, text) = try_run(tool, args);
    assert!(ok, "{tool} failed: {text}");
    text
}

/// Runs a tool; whether it succeeded, and what it printed.
pub fn try_run<A: AsRef<std::ffi::OsStr>>(tool: &str, args: &[A]) -> (bool, String) {
    let output = Command::new(tool)
        .args(args)
        .env("LC_ALL", "C")
        .output()
        .unwrap_or_else(|e| panic!("{tool}: {e}"));
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

/// An argument `key=path`.
pub fn arg(key: &str, path: &Path) -> String {
    format!("{key}={}", path.to_str().unwrap())
}

/// Bytes of storage a file uses, after it was written out.
pub fn allocated(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    file.metadata().unwrap().blocks() * 512
}

/// Opens for reading what the file's own system answers now: what the kernel has cached is dropped.
pub fn fresh(path: &Path) -> File {
    let file = File::open(path).unwrap();
    // SAFETY: takes numbers only; the descriptor is open.
    let error = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(error, 0);
    file
}

/// Asserts that two files are equal, reading in large pieces and from no cache of the kernel.
pub fn assert_equal(a: &Path, b: &Path) {
    let (fa, fb) = (fresh(a), fresh(b));
    let size = fa.metadata().unwrap().len();
    assert_eq!(size, fb.metadata().unwrap().len(), "{a:?} {b:?}");
    let (mut pa, mut pb) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < size {
        let len = (size - at).min(1 << 20) as usize;
        fa.read_exact_at(&mut pa[..len], at).unwrap();
        fb.read_exact_at(&mut pb[..len], at).unwrap();
        if pa[..len] != pb[..len] {
            let bad = (0..len).find(|&i| pa[i] != pb[i]).unwrap();
            panic!("{a:?} and {b:?} differ at {}", at + bad as u64);
        }
        at += len as u64;
    }
}

/// Opens for reading and writing with more flags.
pub fn open(path: &Path, flags: i32) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
        .unwrap()
}

/// A file as the traits of the library see it: holes, punches, vectored writes.
pub fn disk(file: &File) -> FileDisk {
    FileDisk::from_file(file.try_clone().unwrap()).unwrap()
}

/// The errno of a refusal.
pub fn errno<T>(result: io::Result<T>) -> i32 {
    match result {
        Ok(_) => 0,
        Err(e) => e.raw_os_error().unwrap_or(-1),
    }
}

fn answer(result: i32) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// An ioctl(2) that no file knows, with no argument.
pub fn unknown_ioctl(file: &File) -> io::Result<()> {
    // SAFETY: _IO('x', 0x42) carries no data; the descriptor is open.
    answer(unsafe { libc::ioctl(file.as_raw_fd(), 0x7842) })
}

/// fallocate(2).
pub fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: takes numbers only; the descriptor is open.
    answer(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, len as i64) })
}

/// renameat2(2).
pub fn rename_with(from: &Path, to: &Path, flags: u32) -> io::Result<()> {
    let path = |path: &Path| CString::new(path.as_os_str().as_bytes()).unwrap();
    let (from, to, here) = (path(from), path(to), libc::AT_FDCWD);
    // SAFETY: both are C strings that outlive the call.
    answer(unsafe { libc::renameat2(here, from.as_ptr(), here, to.as_ptr(), flags) })
}

/// lseek(2).
pub fn seek(file: &File, offset: u64, whence: i32) -> io::Result<u64> {
    // SAFETY: takes numbers only; the descriptor is open.
    let at = unsafe { libc::lseek(file.as_raw_fd(), offset as i64, whence) };
    u64::try_from(at).map_err(|_| io::Error::last_os_error())
}

/// The first page by mmap(2) for reading.
pub fn first_page(file: &File, flags: i32) -> io::Result<Vec<u8>> {
    // SAFETY: a new mapping at a place the kernel chooses, copied from and unmapped at once; nothing
    // truncates the file: an image has a fixed size.
    unsafe {
        let null = std::ptr::null_mut();
        let page = libc::mmap(null, 4096, libc::PROT_READ, flags, file.as_raw_fd(), 0);
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let bytes = std::slice::from_raw_parts(page.cast::<u8>(), 4096).to_vec();
        answer(libc::munmap(page, 4096)).map(|()| bytes)
    }
}

/// A loop device over a file; detached when dropped.
pub struct Loop(pub PathBuf);

impl Loop {
    pub fn new(file: &Path, more: &[&str]) -> Loop {
        let mut args = vec!["--find", "--show"];
        args.extend(more);
        args.push(file.to_str().unwrap());
        Loop(PathBuf::from(run("losetup", &args).trim()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = try_run("losetup", &["--detach", self.0.to_str().unwrap()]);
        if !std::thread::panicking() {
            assert!(detached.0, "{}", detached.1);
        }
    }
}

/// A mounted filesystem; unmounted when dropped.
pub struct Mounted(pub PathBuf);

impl Mounted {
    pub fn new(device: &Path, at: PathBuf, options: &str) -> Mounted {
        fs::create_dir_all(&at).unwrap();
        run(
            "mount",
            &[
                "-o",
                options,
                device.to_str().unwrap(),
                at.to_str().unwrap(),
            ],
        );
        Mounted(at)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let lazy = if std::thread::panicking() {
            "--lazy"
        } else {
            "-v"
        };
        let umount = || try_run("umount", &[lazy, self.0.to_str().unwrap()]);
        let (mut done, begun) = (umount(), Instant::now());
        // A process that another test has just started holds every file of ours until it executes.
        while !done.0 && done.1.contains("busy") && begun.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(20));
            done = umount();
        }
        if !done.0 && !std::thread::panicking() {
            // Nothing stays behind, also when this fails the test.
            try_run("umount", &["--lazy", self.0.to_str().unwrap()]);
            panic!("{}", done.1);
        }
    }
}

impl Chance {
    /// Bytes that no compression or hole detection can shorten.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let words = (0..len.div_ceil(8)).map(|_| self.next().to_le_bytes());
        let mut bytes: Vec<u8> = words.flatten().collect();
        bytes.truncate(len);
        bytes
    }
}
