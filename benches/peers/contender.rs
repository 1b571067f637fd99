//! Ours and its peers: how each is started over a source, and how it is made to leave nothing behind.
//!
//! Whatever is started here is ended when its [`Contender`] is dropped, also by a panic: by its own number, asked
//! first and killed after [`ASKED`], and what is still mounted after that is unmounted. A peer that is not
//! installed, or does not start, is named in [`Peers::missing`] and left out; with `STILLFRAME_CI` that ends the
//! run.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::options::installed;
use super::rig::{self, Attached, Rig, is_mounted};

const ASKED: Duration = Duration::from_secs(10);
const STARTS: Duration = Duration::from_secs(20);

pub const RAW: &str = "raw file";
pub const LOOP: &str = "loop device";
pub const OURS: &str = "stillframe";
pub const QSD: &str = "qsd plain";
pub const QSD_URING: &str = "qsd plain io_uring";
pub const FLEECING: &str = "qsd fleecing";
pub const FLEECING_URING: &str = "qsd fleecing io_uring";
pub const FLEECING_SHORT: &str = "qsd fleecing, 64 KiB requests";
pub const NBD: &str = "nbdkit file";
pub const NBD_COW: &str = "nbdkit cow";

const EMULATOR: &str = "qemu-storage-daemon";

/// Somebody who serves a source, with all that has to go afterwards.
pub struct Contender {
    pub name: &'static str,
    /// Where the state of the start is read: a snapshot where there is one.
    pub read: PathBuf,
    /// Where is written; equal to `read` where there is no snapshot.
    pub live: PathBuf,
    /// Whether O_DIRECT means the way to the server. With the raw file and the loop device it would mean the
    /// medium, so their pages are always the cache's.
    pub direct: bool,
    /// Bytes of a request when it is read in order.
    pub request: u64,
    /// Passes in which it returned wrong bytes. A peer's are named; ours end the run.
    pub wrong: u64,
    /// Processes that serve.
    pub pids: Vec<u32>,
    /// What is written to on the way.
    pub behind: Vec<PathBuf>,
    /// In the order in which they have to go.
    parts: Vec<Part>,
}

#[allow(dead_code, reason = "some are only held until they are dropped")]
enum Part {
    Ours(Box<Rig>),
    Process(Process),
    Loop(Attached),
    Dir(TempDir),
}

impl Contender {
    fn new(name: &'static str, path: PathBuf) -> Contender {
        Contender {
            name,
            read: path.clone(),
            live: path,
            direct: true,
            request: 1 << 20,
            wrong: 0,
            pids: Vec::new(),
            behind: Vec::new(),
            parts: Vec::new(),
        }
    }

    /// The raw file.
    pub fn raw(source: &Path) -> Contender {
        Contender {
            direct: false,
            behind: vec![source.to_owned()],
            ..Contender::new(RAW, source.to_owned())
        }
    }

    /// The daemon of a rig that serves `disk`, with a snapshot `s0` if that is wanted.
    pub fn ours(source: &Path, snapshot: bool) -> Contender {
        let mut rig = Rig::new();
        let volume = format!("disk={}", source.display());
        rig.mount_with(&["--volume", &volume]);
        let live = rig.live("disk");
        let mut contender = Contender::new(OURS, live.clone());
        if snapshot {
            contender.read = rig.snapshot("disk", "s0");
            rig::touch(&contender.read).unwrap();
        }
        contender.behind = vec![source.to_owned(), rig.store()];
        contender.pids = vec![rig.pid()];
        contender.parts = vec![Part::Ours(Box::new(rig))];
        contender
    }

    /// Ours only.
    pub fn rig(&mut self) -> &mut Rig {
        let rigs = self.parts.iter_mut().find_map(|part| match part {
            Part::Ours(rig) => Some(rig),
            _ => None,
        });
        rigs.expect("it is ours")
    }

    /// The same server, as long as it lives, under another name, read with other requests.
    pub fn with_requests(&self, name: &'static str, request: u64) -> Contender {
        Contender {
            pids: self.pids.clone(),
            behind: self.behind.clone(),
            request,
            ..Contender::new(name, self.read.clone())
        }
    }

    /// Whether it is one of the peers.
    pub fn is_peer(&self) -> bool {
        self.name != RAW && !self.name.starts_with(OURS)
    }

    /// CPU seconds that its processes have used, ended threads included.
    pub fn cpu(&self) -> f64 {
        self.pids.iter().map(|pid| cpu_of(&pid.to_string())).sum()
    }
}

/// CPU seconds of a process, or of this one with `self`; a hundredth is the least that shows.
pub fn cpu_of(pid: &str) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, rest) = stat.rsplit_once(") ").unwrap();
    let words: Vec<&str> = rest.split(' ').collect();
    let ticks = words[11].parse::<u64>().unwrap() + words[12].parse::<u64>().unwrap();
    // What Linux tells programs is in hundredths, whatever its own clock does.
    ticks as f64 / 100.0
}

/// A server, and where it is mounted.
struct Process {
    child: Child,
    mounts: Vec<PathBuf>,
}

impl Drop for Process {
    fn drop(&mut self) {
        // Our own child that was not waited for: the number is still its.
        let pid = self.child.id().to_string();
        let _ = Command::new("kill").args(["-s", "TERM", &pid]).output();
        let end = Instant::now() + ASKED;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        for mount in &self.mounts {
            if is_mounted(mount) {
                let mut lazy = Command::new("fusermount3");
                let _ = lazy.args(["-u", "-z"]).arg(mount).output();
            }
            if is_mounted(mount) {
                eprintln!("{} is still mounted", mount.display());
            }
        }
    }
}

/// Starts a server and waits until it is there; else says what it said.
fn start(
    command: &mut Command,
    log: &Path,
    mounts: &[PathBuf],
    socket: Option<&Path>,
) -> Result<Process, String> {
    let said = File::create(log).unwrap();
    // A group of its own: an interrupt at the terminal is for this program, which then ends it in order.
    let command = command.stdin(Stdio::null()).process_group(0);
    let command = command.stdout(said.try_clone().unwrap()).stderr(said);
    let child = command.spawn().map_err(|e| e.to_string())?;
    let mounts = mounts.to_vec();
    let mut process = Process { child, mounts };
    let end = Instant::now() + STARTS;
    loop {
        let mounted = process.mounts.iter().all(|mount| is_mounted(mount));
        if mounted && socket.is_none_or(Path::exists) {
            return Ok(process);
        }
        let ended = !matches!(process.child.try_wait(), Ok(None));
        if ended || Instant::now() > end {
            let text = fs::read_to_string(log).unwrap_or_default();
            let line = text.lines().next().unwrap_or("it does not start");
            return Err(line.to_owned());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Starts peers, and keeps a list of those that are not there.
#[derive(Default)]
pub struct Peers {
    pub missing: Vec<String>,
}

impl Peers {
    fn or_missing(
        &mut self,
        name: &'static str,
        made: Result<Contender, String>,
    ) -> Option<Contender> {
        match made {
            Ok(contender) => Some(contender),
            Err(why) => {
                let line = format!("{name}: {why}");
                if !self.missing.contains(&line) {
                    rig::skip(&line);
                    self.missing.push(line);
                }
                None
            }
        }
    }

    /// A loop device, which is attached for reading only or for both.
    pub fn loop_device(&mut self, source: &Path, write: bool) -> Option<Contender> {
        let made = match rig::can_loop() {
            true => {
                let part = match write {
                    true => Attached::new(source),
                    false => Attached::read_only(source),
                };
                let mut contender = Contender::new(LOOP, PathBuf::from(&part.device));
                contender.direct = false;
                contender.behind = vec![source.to_owned()];
                contender.parts = vec![Part::Loop(part)];
                Ok(contender)
            }
            false => Err("no loop devices here".into()),
        };
        self.or_missing(LOOP, made)
    }

    /// The emulator's storage daemon with nothing between the file and its export.
    pub fn plain(&mut self, source: &Path, uring: bool, write: bool) -> Option<Contender> {
        let name = if uring { QSD_URING } else { QSD };
        let made = plain(name, source, uring, write);
        self.or_missing(name, made)
    }

    /// The same with copy-before-write, and its snapshot.
    pub fn fleecing(&mut self, source: &Path, uring: bool) -> Option<Contender> {
        let name = if uring { FLEECING_URING } else { FLEECING };
        let made = fleecing(name, source, uring);
        self.or_missing(name, made)
    }

    /// nbdkit and nbdfuse; with its filter for copies on write, or without.
    pub fn nbd(&mut self, source: &Path, cow: bool, write: bool) -> Option<Contender> {
        let name = if cow { NBD_COW } else { NBD };
        let made = nbd(name, source, cow, write);
        self.or_missing(name, made)
    }
}

fn needs(program: &str) -> Result<(), String> {
    match installed(program) {
        true => Ok(()),
        false => Err(format!("{program} is not installed")),
    }
}

/// A directory for what a peer needs.
fn place() -> (TempDir, PathBuf) {
    let dir = tempfile::Builder::new().prefix("peer-").tempdir().unwrap();
    let path = dir.path().canonicalize().unwrap();
    (dir, path)
}

fn blockdev(node: &str, file: &Path, uring: bool, write: bool) -> String {
    let (file, aio) = (file.display(), if uring { "io_uring" } else { "threads" });
    // Our daemon holds a lock on the source that it serves.
    format!(
        "driver=file,node-name={node},filename={file},locking=off,aio={aio},read-only={}",
        if write { "off" } else { "on" }
    )
}

fn export(node: &str, at: &Path, write: bool) -> String {
    format!(
        "type=fuse,id=export-{node},node-name={node},mountpoint={},writable={}",
        at.display(),
        if write { "on" } else { "off" }
    )
}

fn plain(name: &'static str, source: &Path, uring: bool, write: bool) -> Result<Contender, String> {
    needs(EMULATOR)?;
    let (dir, place) = place();
    let at = place.join("export");
    File::create(&at).unwrap();
    let mut command = Command::new(EMULATOR);
    command.args(["--blockdev", &blockdev("source", source, uring, write)]);
    command.args(["--export", &export("source", &at, write)]);
    let process = start(
        &mut command,
        &place.join("log"),
        std::slice::from_ref(&at),
        None,
    )?;
    let mut contender = Contender::new(name, at);
    contender.pids = vec![process.child.id()];
    contender.behind = vec![source.to_owned()];
    contender.parts = vec![Part::Process(process), Part::Dir(dir)];
    Ok(contender)
}

/// As [`Peers::fleecing`], for one that is started anew: its snapshot begins then.
pub fn fleecing(name: &'static str, source: &Path, uring: bool) -> Result<Contender, String> {
    needs(EMULATOR)?;
    let (dir, place) = place();
    let (live, snapshot, target) = (place.join("live"), place.join("snap"), place.join("target"));
    for file in [&live, &snapshot, &target] {
        File::create(file).unwrap();
    }
    let size = fs::metadata(source).unwrap().len();
    let file = File::options().write(true).open(&target).unwrap();
    file.set_len(size).unwrap();
    let mut command = Command::new(EMULATOR);
    for node in [
        blockdev("source", source, uring, true),
        blockdev("target", &target, uring, true),
        "driver=copy-before-write,node-name=cbw,file=source,target=target".into(),
        "driver=snapshot-access,node-name=snapshot,file=cbw".into(),
    ] {
        command.args(["--blockdev", &node]);
    }
    command.args(["--export", &export("cbw", &live, true)]);
    command.args(["--export", &export("snapshot", &snapshot, false)]);
    let mounts = [live.clone(), snapshot.clone()];
    let process = start(&mut command, &place.join("log"), &mounts, None)?;
    let mut contender = Contender::new(name, snapshot);
    contender.live = live;
    contender.pids = vec![process.child.id()];
    contender.behind = vec![source.to_owned(), target];
    contender.parts = vec![Part::Process(process), Part::Dir(dir)];
    Ok(contender)
}

/// As [`Peers::nbd`], for one that is started anew.
pub fn nbd(name: &'static str, source: &Path, cow: bool, write: bool) -> Result<Contender, String> {
    needs("nbdkit")?;
    needs("nbdfuse")?;
    let (dir, place) = place();
    let (socket, mount) = (place.join("s"), place.join("mnt"));
    fs::create_dir(&mount).unwrap();
    let mut server = Command::new("nbdkit");
    server.args(["--foreground", "--unix"]).arg(&socket);
    // A filter that keeps changes needs no right to write, but has to be asked for with it.
    if cow {
        server.arg("--filter=cow");
        // Where it keeps them.
        server.env("TMPDIR", &place);
    } else if !write {
        server.arg("--readonly");
    }
    server.arg("file").arg(source);
    let server = start(&mut server, &place.join("log"), &[], Some(&socket))?;
    let mut client = Command::new("nbdfuse");
    if !write {
        client.arg("--readonly");
    }
    client.arg(mount.join("nbd"));
    client.arg(format!("nbd+unix:///?socket={}", socket.display()));
    let client = start(
        &mut client,
        &place.join("log-client"),
        std::slice::from_ref(&mount),
        None,
    )?;
    let mut contender = Contender::new(name, mount.join("nbd"));
    contender.pids = vec![client.child.id(), server.child.id()];
    contender.behind = vec![source.to_owned()];
    // The client goes first, while it has a server to say goodbye to.
    contender.parts = vec![Part::Process(client), Part::Process(server), Part::Dir(dir)];
    Ok(contender)
}
