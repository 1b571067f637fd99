//! Disks in memory, served as files through FUSE, that remember every write, discard and flush.
//!
//! A [`Farm`] is one mount; each of its disks is a file there, good for a loop device with a
//! filesystem on it. The disks of one [`Recorder`] share one log, so there is one order of events over
//! all of them, and the log's length when a call of the program returned says what had reached which
//! device by then. The kernel's page cache is left out (direct I/O), so what the log has is what a
//! device was told.
//!
//! Promises: events are in the order in which the requests came, one at a time; a write is in the log
//! before it is answered; when a farm is dropped nothing stays mounted.
//!
//! It does not slow down, reorder or fail anything: that is decided when a crash is made up
//! ([`crate::crash`]).

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, WriteFlags,
};
use tempfile::TempDir;

use crate::filesystems::run;
use crate::rig::{ended, eventually, is_mounted};

pub const PAGE: u64 = 4096;
/// Of a farm's directory; the number of its process follows.
const PREFIX: &str = "stillframe-power-";
const TTL: Duration = Duration::from_secs(60);

type Page = Arc<[u8; PAGE as usize]>;

/// Sparse bytes; what is absent is zero.
#[derive(Clone, Default)]
pub struct Image(HashMap<u64, Page>);

/// Cuts a range of bytes at pages: (page, range within it, range within the buffer).
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at >= len {
            return None;
        }
        let position = offset + at as u64;
        let within = (position % PAGE) as usize;
        let size = (PAGE as usize - within).min(len - at);
        let piece = (position / PAGE, within..within + size, at..at + size);
        at += size;
        Some(piece)
    })
}

impl Image {
    fn page(&self, page: u64) -> Option<&Page> {
        self.0.get(&page)
    }
}

/// What a device was told. Offsets and lengths are bytes.
pub enum Event {
    Write {
        offset: u64,
        data: Vec<u8>,
    },
    /// A discard, or zeros without data.
    Zero {
        offset: u64,
        len: u64,
    },
    Flush,
}

/// One log of events over some disks, as (disk, event).
#[derive(Clone, Default)]
pub struct Recorder(Arc<Mutex<Vec<(usize, Event)>>>);

impl Recorder {
    /// How many events there were.
    pub fn position(&self) -> usize {
        lock(&self.0).len()
    }

    /// How many writes and discards there were since a position.
    pub fn writes_since(&self, position: usize) -> usize {
        let log = lock(&self.0);
        let told = log[position..].iter();
        told.filter(|(_, event)| !matches!(event, Event::Flush))
            .count()
    }

    /// The events; the recorder is empty afterwards.
    pub fn take(&self) -> Vec<(usize, Event)> {
        std::mem::take(&mut lock(&self.0))
    }
}

/// A disk: a base that it shares with others, and what was written to it since.
#[derive(Clone)]
pub struct Disk {
    pub size: u64,
    pub base: Arc<Image>,
    pub own: Image,
    /// Where its events are noted, and as which disk.
    pub recorder: Option<(Recorder, usize)>,
}

impl Disk {
    pub fn new(size: u64) -> Disk {
        Disk {
            size,
            base: Arc::default(),
            own: Image::default(),
            recorder: None,
        }
    }

    fn read(&self, offset: u64, buf: &mut [u8]) {
        for (page, within, part) in pieces(offset, buf.len()) {
            match self.own.page(page).or_else(|| self.base.page(page)) {
                Some(bytes) => buf[part].copy_from_slice(&bytes[within]),
                None => buf[part].fill(0),
            }
        }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        for (page, within, part) in pieces(offset, data.len()) {
            let base = &self.base;
            let own = self.own.0.entry(page).or_insert_with(|| {
                let below = base.page(page).cloned();
                below.unwrap_or_else(|| Arc::new([0; PAGE as usize]))
            });
            Arc::make_mut(own)[within].copy_from_slice(&data[part]);
        }
    }

    pub fn zero(&mut self, offset: u64, len: u64) {
        // In pieces: a discard may be as large as the disk.
        const ZEROS: &[u8] = &[0; PAGE as usize];
        let mut at = offset;
        while at < offset + len {
            let size = (PAGE - at % PAGE).min(offset + len - at);
            let here = |image: &Image| image.page(at / PAGE).is_some();
            if here(&self.own) || here(&self.base) {
                self.write(at, &ZEROS[..size as usize]);
            }
            at += size;
        }
    }

    /// The same content as a base that others can share.
    pub fn flatten(self) -> Disk {
        let mut image = Arc::unwrap_or_clone(self.base);
        image.0.extend(self.own.0);
        Disk {
            base: Arc::new(image),
            ..Disk::new(self.size)
        }
    }

    /// Writes it to a sparse file, to be looked at by hand.
    pub fn save(&self, path: &Path) -> std::io::Result<()> {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::create(path)?;
        file.set_len(self.size)?;
        for (page, bytes) in self.base.0.iter().chain(&self.own.0) {
            file.write_all_at(&bytes[..], page * PAGE)?;
        }
        Ok(())
    }

    fn note(&self, event: impl FnOnce() -> Event) {
        if let Some((recorder, disk)) = &self.recorder {
            lock(&recorder.0).push((*disk, event()));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type Disks = Arc<Mutex<BTreeMap<u64, Disk>>>;

/// Some disks under one mount.
pub struct Farm {
    top: TempDir,
    disks: Disks,
    next: u64,
    session: Option<BackgroundSession>,
}

impl Farm {
    pub fn new() -> Farm {
        let prefix = format!("{PREFIX}{}-", std::process::id());
        let top = tempfile::Builder::new().prefix(&prefix).tempdir();
        let top = top.unwrap();
        let disks = Disks::default();
        let mut config = Config::default();
        let name = MountOption::FSName("power-recorder".to_owned());
        config.mount_options = vec![name, MountOption::NoDev, MountOption::NoSuid];
        let served = Server {
            disks: Arc::clone(&disks),
            buffer: Mutex::default(),
        };
        let mut farm = Farm {
            top,
            disks,
            next: 2,
            session: None,
        };
        std::fs::create_dir(farm.mountpoint()).unwrap();
        let session = fuser::spawn_mount(served, farm.mountpoint(), &config);
        farm.session = Some(session.expect("the farm is mounted"));
        farm
    }

    fn mountpoint(&self) -> PathBuf {
        self.top.path().canonicalize().unwrap().join("disks")
    }

    /// An empty directory of this farm, for mounts.
    pub fn directory(&self, name: &str) -> PathBuf {
        let at = self.top.path().canonicalize().unwrap().join(name);
        std::fs::create_dir_all(&at).unwrap();
        at
    }

    /// Serves a disk; returns its number and its path. No number is given twice, so nothing that the
    /// kernel remembers of one disk is taken for another's.
    pub fn add(&mut self, disk: Disk) -> (u64, PathBuf) {
        let number = self.next;
        self.next += 1;
        lock(&self.disks).insert(number, disk);
        (number, self.mountpoint().join(number.to_string()))
    }

    pub fn remove(&mut self, number: u64) -> Disk {
        lock(&self.disks).remove(&number).expect("it was added")
    }
}

/// Clears away what a test that was killed has left. Such a process waits for answers that only it could
/// give, and does not even end; its connections are aborted, then its mounts go.
pub fn sweep() {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut left: Vec<(&str, &Path)> = Vec::new();
    for line in table.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let owner = words[4]
            .split('/')
            .find_map(|part| part.strip_prefix(PREFIX));
        let owner = owner.and_then(|rest| rest.split('-').next()?.parse().ok());
        if owner.is_some_and(ended) {
            let connection = words[2].rsplit(':').next().unwrap_or("");
            left.push((connection, Path::new(words[4])));
        }
    }
    if left.is_empty() {
        return;
    }
    let control = tempfile::tempdir().unwrap();
    let how = ["-t", "fusectl", "none"].map(OsStr::new);
    let at = control.path().as_os_str();
    let _ = run("mount", &[&how[..], &[at]].concat());
    for (connection, path) in &left {
        eprintln!("{} is left of a killed test", path.display());
        if path.ends_with("disks") {
            let _ = std::fs::write(control.path().join(connection).join("abort"), "1");
        }
    }
    let _ = run("umount", &[at]);
    for (_, path) in left.iter().rev() {
        let _ = run("umount", &["--lazy".as_ref(), path.as_os_str()]);
        let _ = std::fs::remove_dir(path);
        if let Some(top) = path.parent() {
            let _ = std::fs::remove_dir(top);
        }
    }
}

impl Drop for Farm {
    fn drop(&mut self) {
        let Some(session) = self.session.take() else {
            return;
        };
        if let Err(e) = session.umount_and_join() {
            eprintln!("the farm of disks does not unmount: {e}");
        }
        let at = self.mountpoint();
        if std::thread::panicking() {
            return;
        }
        eventually("the farm is unmounted", || !is_mounted(&at));
    }
}

struct Server {
    disks: Disks,
    /// Of the last read.
    buffer: Mutex<Vec<u8>>,
}

fn attributes(number: INodeNo, size: u64) -> FileAttr {
    let directory = number == INodeNo::ROOT;
    let epoch = SystemTime::UNIX_EPOCH;
    FileAttr {
        ino: number,
        size,
        blocks: size / 512,
        atime: epoch,
        mtime: epoch,
        ctime: epoch,
        crtime: epoch,
        kind: match directory {
            true => FileType::Directory,
            false => FileType::RegularFile,
        },
        perm: if directory { 0o700 } else { 0o600 },
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

#[allow(clippy::too_many_arguments, reason = "the signatures are fuser's")]
impl Filesystem for Server {
    fn lookup(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let number: Option<u64> = name.to_str().and_then(|name| name.parse().ok());
        let disks = lock(&self.disks);
        match number.and_then(|n| Some((n, disks.get(&n)?.size))) {
            Some((n, size)) => reply.entry(&TTL, &attributes(INodeNo(n), size), Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        if ino == INodeNo::ROOT {
            return reply.attr(&TTL, &attributes(ino, 0));
        }
        match lock(&self.disks).get(&ino.0) {
            Some(disk) => reply.attr(&TTL, &attributes(ino, disk.size)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut buf = lock(&self.buffer);
        {
            let disks = lock(&self.disks);
            let Some(disk) = disks.get(&ino.0) else {
                return reply.error(Errno::EIO);
            };
            let len = u64::from(size).min(disk.size.saturating_sub(offset));
            buf.resize(len as usize, 0);
            disk.read(offset, &mut buf);
        }
        reply.data(&buf);
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut disks = lock(&self.disks);
        match disks.get_mut(&ino.0) {
            Some(disk) if offset + data.len() as u64 <= disk.size => {
                disk.note(|| Event::Write {
                    offset,
                    data: data.to_vec(),
                });
                disk.write(offset, data);
                reply.written(data.len() as u32);
            }
            _ => reply.error(Errno::EIO),
        }
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        // Punching a hole (2) and zeroing (16), both with the size kept (1).
        let mut disks = lock(&self.disks);
        match disks.get_mut(&ino.0) {
            Some(disk) if mode & 0x12 != 0 && offset + len <= disk.size => {
                disk.note(|| Event::Zero { offset, len });
                disk.zero(offset, len);
                reply.ok();
            }
            _ => reply.error(Errno::EOPNOTSUPP),
        }
    }

    fn fsync(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        match lock(&self.disks).get(&ino.0) {
            Some(disk) => {
                disk.note(|| Event::Flush);
                reply.ok();
            }
            None => reply.error(Errno::EIO),
        }
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }
}
