//! FUSE requests: a session over a socket pair, its INIT, and then whatever comes.
//!
//! Input: requests, each an opcode, a node and a body. The header says the true length (the kernel is
//! trusted for that); everything behind it is free, but that a small number of a handle means the one that so
//! many opens of this input before gave. Held: no handler panics, every request is answered at most
//! once, to its number and with its own length, an error is one and has no body, and after each input
//! whatever it opened can be released and nothing is open.
//!
//! A session is started for [`Target::group`] inputs, one after another, since starting one costs as much as a
//! hundred requests. At its end it still answers, ends with DESTROY, the store stops cleanly, and opens again.

use std::cell::RefCell;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use stillframe::error::Result;
use stillframe::fuse::{Options, serve};
use stillframe::map::memory::MemoryIndexHome;
use stillframe::sys::disk::Space;
use stillframe::sys::sim::SimWorld;
use stillframe::tree::{ROOT, StatusFile, StatusSource, Tree};
use stillframe::volume::Engine;

use super::Target;
use super::bytes::{Input, put_counted};
use super::store::{environment, settings, valid};

pub const TARGET: Target = Target {
    name: "fuse",
    seeds,
    run,
    reaches: &["refused", "answered"],
    tokens: &[
        b"a.img\0",
        b"live.img\0",
        b"vm\0",
        b"snapshots\0",
        b"clones\0",
        b"..\0",
        b"\0",
        b".img\0",
        b"user.stillframe.revert\0",
        &[0xff; 8],
        &[0, 0, 0, 0, 0, 0, 0, 0x80],
        &[0xff, 0xff, 0xff, 0x7f],
    ],
    max_len: 8192,
    group: 128,
    reset,
};

const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const RELEASE: u32 = 18;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const CREATE: u32 = 35;
const COPY_FILE_RANGE: u32 = 47;
const READ: u32 = 15;
const READDIR: u32 = 28;
const READDIRPLUS: u32 = 44;
const WRITE: u32 = 16;
const SETXATTR: u32 = 21;
const IOCTL: u32 = 39;
/// Bytes of an IOCTL before its data.
const IOCTL_HEAD: usize = 32;
/// Bytes of a WRITE before its data.
const WRITE_HEAD: usize = 40;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;

/// Behind it are the numbers that mean the node of an open of the same input. No tree gives such numbers.
const OPENED: u64 = 1 << 56;

/// How long an answer may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Requests of one input.
const REQUESTS: usize = 48;

struct Status;

impl StatusSource for Status {
    fn render(&self, file: StatusFile) -> Result<Vec<u8>> {
        Ok(format!("{file:?}").into_bytes())
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

fn message(opcode: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(40 + body.len());
    bytes.extend((40 + body.len() as u32).to_le_bytes());
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    // uid, gid, pid, padding
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

/// The kernel's side of a session.
struct Kernel {
    socket: UnixDatagram,
    unique: u64,
    buffer: Vec<u8>,
    /// Requests whose answer was not seen yet.
    waiting: Vec<u64>,
    /// Node and handle of each open of this input; the node of a CREATE is the one it made.
    opened: Vec<(u64, u64)>,
}

impl Kernel {
    /// The next answer: its number, its error, its body.
    fn receive(&mut self) -> (u64, i32, usize) {
        let began = Instant::now();
        let len = loop {
            match self.socket.recv(&mut self.buffer) {
                Ok(len) => break len,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    // Who would answer may be gone.
                    check_panics();
                    let waiting = &self.waiting;
                    let late = began.elapsed() > PATIENCE;
                    assert!(
                        !late,
                        "no answer within {PATIENCE:?}; waiting for {waiting:?}"
                    );
                }
                Err(e) => panic!("the session ended: {e}"),
            }
        };
        let bytes = &self.buffer[..len];
        assert!(len >= 16, "an answer has a header");
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(u32_at(0) as usize, len, "the length of the answer");
        let errno = u32_at(4) as i32;
        assert!((-4095..=0).contains(&errno), "errno {errno}");
        assert!(errno == 0 || len == 16, "an error has no body");
        (
            u64::from_le_bytes(bytes[8..16].try_into().unwrap()),
            errno,
            len - 16,
        )
    }

    fn send(&mut self, opcode: u32, node: u64, body: &[u8]) -> u64 {
        self.unique += 2;
        let bytes = message(opcode, self.unique, node, body);
        self.socket
            .send(&bytes)
            .expect("the session takes requests");
        self.unique
    }

    /// Sends a request and waits for its answer, if it gets one. Returns whether it worked.
    fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> bool {
        let unique = self.send(opcode, node, body);
        if matches!(opcode, FORGET | BATCH_FORGET) {
            // No answer, unless it was too short to be known for what it is: the next ones tell.
            self.waiting.push(unique);
            return false;
        }
        loop {
            let (to, errno, _) = self.receive();
            if to == unique {
                if errno == 0 {
                    self.note_open(opcode, node);
                }
                return errno == 0;
            }
            let at = self.waiting.iter().position(|&u| u == to);
            self.waiting
                .swap_remove(at.expect("an answer to a request that waits for one"));
        }
    }
}

impl Kernel {
    /// Keeps the handle that the answer in the buffer gives.
    fn note_open(&mut self, opcode: u32, node: u64) {
        let said = |at: usize| u64::from_le_bytes(self.buffer[at..at + 8].try_into().unwrap());
        let opened = match opcode {
            OPEN | OPENDIR => (node, said(16)),
            // The handle is behind what is said of the entry.
            CREATE => (said(16), said(16 + 128)),
            _ => return,
        };
        self.opened.push(opened);
    }

    /// The node of the n-th open where the number is that of [`OPENED`] and n.
    fn true_node(&self, node: u64) -> u64 {
        let nth = node.checked_sub(OPENED + 1);
        let nth = nth.and_then(|nth| self.opened.get(usize::try_from(nth).ok()?));
        nth.map_or(node, |&(node, _)| node)
    }

    /// Puts the handle that the n-th open gave where the number n is one. A number that no open of this
    /// input belongs to stays: it is that of no handle, or of one that is gone.
    fn true_handles(&self, opcode: u32, body: &mut [u8]) {
        let places: &[usize] = match opcode {
            GETATTR | SETATTR => &[8],
            COPY_FILE_RANGE => &[0, 24],
            READ
            | WRITE
            | RELEASE
            | 20
            | 25
            | READDIR
            | 29..=33
            | IOCTL
            | 40
            | 43
            | READDIRPLUS
            | 46 => &[0],
            _ => &[],
        };
        for &at in places {
            let Some(field) = body.get_mut(at..at + 8) else {
                continue;
            };
            let n = u64::from_le_bytes(field.try_into().unwrap());
            let nth = usize::try_from(n).ok().and_then(|n| n.checked_sub(1));
            if let Some((_, handle)) = nth.and_then(|nth| self.opened.get(nth)) {
                field.copy_from_slice(&handle.to_le_bytes());
            }
        }
    }

    /// Releases what this input opened, also what it released itself.
    fn release_all(&mut self) {
        for (node, handle) in std::mem::take(&mut self.opened) {
            self.call(RELEASE, node, &longs(&[handle, 0, 0]));
        }
    }
}

struct Requests(Vec<u8>);

impl Requests {
    fn add(&mut self, opcode: u32, node: u64, body: &[u8]) -> &mut Requests {
        self.0.push(opcode as u8);
        self.0.extend(node.to_le_bytes());
        put_counted(&mut self.0, body);
        self
    }
}

/// Numbers one after another, four bytes each.
fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Numbers one after another, eight bytes each.
fn longs(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn named(head: &[u8], names: &[&str]) -> Vec<u8> {
    let mut body = head.to_vec();
    for name in names {
        body.extend(name.as_bytes());
        body.push(0);
    }
    body
}

/// Nodes of the valid store, as its tree numbers them.
struct Nodes {
    volume: u64,
    live: u64,
    snapshots: u64,
    clones: u64,
    diffs: u64,
    snapshot: u64,
    clone: u64,
    growing: u64,
    growing_clones: u64,
    overlay: u64,
    list: u64,
    list_to_live: u64,
}

fn nodes() -> Nodes {
    let mut session = Session::start(false);
    let mut find = |parent: u64, name: &str| {
        assert!(
            session.kernel.call(1, parent, &named(&[], &[name])),
            "{name}"
        );
        u64::from_le_bytes(session.kernel.buffer[16..24].try_into().unwrap())
    };
    let volume = find(ROOT.0, "vm");
    let (snapshots, clones) = (find(volume, "snapshots"), find(volume, "clones"));
    let diffs = find(volume, "diffs");
    let odd = find(ROOT.0, "odd");
    let growing_clones = find(odd, "clones");
    let nodes = Nodes {
        volume,
        live: find(volume, "live.img"),
        snapshots,
        clones,
        diffs,
        snapshot: find(snapshots, "b.img"),
        clone: find(clones, "c.img"),
        growing: find(growing_clones, "e.img"),
        growing_clones,
        overlay: find(diffs, "b..y.qcow2"),
        list: find(diffs, "b..y.json"),
        list_to_live: find(diffs, "b..live.json"),
    };
    session.end();
    nodes
}

fn seeds() -> Vec<Vec<u8>> {
    let n = nodes();
    let none = Requests(Vec::new());
    let mut all = vec![none];
    let mut seed = |requests: &mut Requests| {
        // Handles count from the first one on: 1 is the first open of each seed.
        all.push(Requests(std::mem::take(&mut requests.0)));
    };
    let new = || Requests(Vec::new());
    let rw = words(&[2, 0]);
    let read =
        |fh: u64, at: u64, size: u32| [longs(&[fh, at]), words(&[size, 0, 0, 0, 0, 0])].concat();
    let write = |fh: u64, at: u64, data: &[u8]| {
        [
            longs(&[fh, at]),
            words(&[data.len() as u32, 0, 0, 0, 1, 0]),
            data.to_vec(),
        ]
        .concat()
    };
    let release = |fh: u64| longs(&[fh, 0, 0]);
    for (node, name) in [
        (ROOT.0, "vm"),
        (n.volume, "live.img"),
        (n.snapshots, "b.img"),
        (n.clones, "c.img"),
        (n.volume, ".."),
        (n.diffs, "b..y.qcow2"),
        (n.diffs, "b..live.json"),
        (n.diffs, "y.img"),
        (ROOT.0, ".stillframe"),
    ] {
        seed(
            new()
                .add(1, node, &named(&[], &[name]))
                .add(GETATTR, node, &[0; 16])
                .add(FORGET, node, &longs(&[1])),
        );
    }
    for node in [n.live, n.clone] {
        seed(
            new()
                .add(14, node, &rw)
                .add(16, node, &write(1, 5000, b"hello"))
                .add(15, node, &read(1, 4096, 8192))
                .add(
                    43,
                    node,
                    &[longs(&[1, 4096, 4096]), words(&[3, 0])].concat(),
                )
                .add(
                    43,
                    node,
                    &[longs(&[1, 0, 9000]), words(&[0x11, 0])].concat(),
                )
                .add(46, node, &[longs(&[1, 0]), words(&[3, 0])].concat())
                .add(46, node, &[longs(&[1, 0]), words(&[4, 0])].concat())
                .add(20, node, &[longs(&[1]), words(&[1, 0])].concat())
                .add(25, node, &longs(&[1, 0, 0]))
                .add(18, node, &release(1)),
        );
    }
    for node in [n.snapshot, n.overlay, n.list, n.list_to_live] {
        seed(
            new()
                .add(14, node, &words(&[0, 0]))
                .add(15, node, &read(1, 0, 65536))
                .add(15, node, &read(1, 65536, 4096))
                .add(46, node, &[longs(&[1, 100]), words(&[4, 0])].concat())
                .add(18, node, &release(1)),
        );
    }
    for directory in [ROOT.0, n.volume, n.snapshots, n.clones, n.diffs] {
        seed(
            new()
                .add(27, directory, &words(&[0, 0]))
                .add(28, directory, &read(1, 0, 4096))
                .add(28, directory, &read(1, 2, 100))
                .add(44, directory, &read(1, 0, 4096))
                .add(30, directory, &[longs(&[1]), words(&[0, 0])].concat())
                .add(29, directory, &release(1)),
        );
    }
    let create = |flags: u32, name: &str| named(&words(&[flags, 0o600, 0o22, 0]), &[name]);
    seed(
        new()
            .add(35, n.snapshots, &create(0o101, "new.img"))
            .add(18, n.snapshot, &release(1))
            .add(
                12,
                n.snapshots,
                &named(&longs(&[n.snapshots]), &["new.img", "newer.img"]),
            )
            .add(
                45,
                n.snapshots,
                &named(
                    &[longs(&[n.snapshots]), words(&[1, 0])].concat(),
                    &["newer.img", "new.img"],
                ),
            )
            .add(10, n.snapshots, &named(&[], &["new.img"]))
            .add(10, n.snapshots, &named(&[], &["b.img"])),
    );
    seed(
        new()
            .add(35, n.clones, &create(0o102, "made.img"))
            .add(16, n.clone, &write(1, 0, &[7; 5000]))
            .add(14, n.snapshot, &words(&[0, 0]))
            .add(47, n.snapshot, &longs(&[2, 0, n.clone, 1, 0, 262_144, 0]))
            .add(18, n.clone, &release(1)),
    );
    let linked = |of: u64, name: &str| named(&longs(&[of]), &[name]);
    seed(
        new()
            .add(13, n.clones, &linked(n.snapshot, "l.img"))
            .add(13, n.clones, &linked(n.clone, "m.img"))
            .add(10, n.clones, &named(&[], &["c.img"])),
    );
    let xattr = |size: u32, name: &str| named(&words(&[size, 0]), &[name]);
    seed(
        new()
            .add(22, n.live, &xattr(0, "user.stillframe.state"))
            .add(22, n.snapshot, &xattr(4096, "user.stillframe.uuid"))
            .add(23, n.live, &words(&[4096, 0]))
            .add(
                21,
                n.live,
                &[xattr(1, "user.stillframe.revert"), b"b".to_vec()].concat(),
            )
            .add(24, n.live, &named(&[], &["user.stillframe.revert"])),
    );
    // valid, padding, fh, size, lock owner, atime, mtime, ctime, six of four bytes, mode, unused, uid, gid, unused
    let setattr = |valid: u32, size: u64| {
        [
            words(&[valid, 0]),
            longs(&[0, size, 0, 0, 0, 0]),
            words(&[0; 9]),
        ]
        .concat()
    };
    for node in [n.live, n.clone, n.snapshot] {
        seed(
            new()
                .add(4, node, &setattr(8, 8192))
                .add(4, node, &setattr(0x1b1, 0))
                .add(17, node, &[])
                .add(34, node, &words(&[4, 0])),
        );
    }
    let whole = |valid: u32, size: u64, mode: u32, id: u32| {
        [
            words(&[valid, 0]),
            longs(&[1, size, 0, 0, 0, 0]),
            words(&[0, 0, 0, mode, 0, id, id, 0, 0]),
        ]
        .concat()
    };
    for seconds in [i64::MAX, i64::MIN + 1, -1] {
        let seconds = seconds as u64;
        let times = [
            words(&[0x30, 0]),
            longs(&[0, 0, 0, seconds, seconds, seconds]),
            words(&[999_999_999, 999_999_999, 0, 0, 0, 0, 0, 0, 0]),
        ];
        seed(new().add(4, n.live, &times.concat()));
    }
    // What grows, what is written anew, and what was made here.
    for (node, how) in [
        (n.growing, 2),
        (n.growing, 0o1002),
        (n.live, 0o1002),
        (n.clone, 0o1001),
    ] {
        seed(
            new()
                .add(14, node, &words(&[how, 0]))
                .add(16, node, &write(1, 0, &[5; 5000]))
                .add(16, node, &write(1, 7, &[]))
                .add(4, node, &whole(8, 4096, 0, 0))
                .add(4, node, &whole(8 | 64, 9000, 0, 0))
                .add(4, node, &whole(8 | 64, 262_144, 0, 0))
                .add(25, node, &longs(&[1, 0, 0]))
                .add(18, node, &release(1)),
        );
    }
    let made = OPENED + 1;
    for (directory, how) in [
        (n.clones, 0o102),
        (n.growing_clones, 0o1102),
        (n.snapshots, 0o101),
    ] {
        seed(
            new()
                .add(35, directory, &create(how, "m.img"))
                .add(4, made, &whole(48, 0, 0, 0))
                .add(4, made, &whole(1, 0, 0o100_777, 0))
                .add(4, made, &whole(8, 70_000, 0, 7))
                .add(16, made, &write(1, 60_000, &[3; 9000]))
                .add(47, n.snapshot, &longs(&[2, 0, made, 1, 0, 262_144, 0]))
                .add(
                    12,
                    directory,
                    &named(&longs(&[directory]), &["m.img", "n.img"]),
                )
                .add(3, made, &[0; 16])
                .add(10, directory, &named(&[], &["n.img"]))
                .add(3, made, &[0; 16])
                .add(15, made, &read(1, 0, 4096))
                .add(2, made, &longs(&[1])),
        );
    }
    for (node, directory, from) in [
        (n.snapshot, n.snapshots, "b.img"),
        (n.clone, n.clones, "c.img"),
        (n.overlay, n.snapshots, "b.img"),
        (n.list, n.snapshots, "y.img"),
    ] {
        // Open, and by another name; open, and gone.
        seed(
            new()
                .add(1, directory, &named(&[], &[from]))
                .add(14, node, &words(&[0, 0]))
                .add(
                    12,
                    directory,
                    &named(&longs(&[directory]), &[from, "r.img"]),
                )
                .add(3, node, &[0; 16])
                .add(10, directory, &named(&[], &["r.img"]))
                .add(3, node, &[0; 16])
                .add(15, node, &read(1, 0, 65536))
                .add(14, node, &words(&[0, 0]))
                .add(18, node, &release(1))
                .add(3, node, &[0; 16]),
        );
    }
    for (from, to, len) in [
        (0, 4096, 8192),
        (0, 0, 0),
        (4096, 4096, 8192),
        (0, 0, 1 << 40),
    ] {
        seed(
            new()
                .add(14, n.growing, &rw)
                .add(14, n.clone, &rw)
                .add(14, n.snapshot, &words(&[0, 0]))
                .add(47, n.snapshot, &longs(&[3, from, n.clone, 2, to, len, 0]))
                .add(47, n.clone, &longs(&[2, from, n.growing, 1, to, len, 0])),
        );
    }
    let name_only = named(&[], &["x"]);
    seed(
        new()
            .add(6, n.volume, &named(&[], &["x", "y"]))
            .add(8, n.volume, &named(&words(&[0o100_644, 0, 0, 0]), &["x"]))
            .add(9, n.volume, &named(&words(&[0o755, 0]), &["x"]))
            .add(11, n.volume, &name_only)
            .add(5, n.live, &[])
            .add(
                39,
                n.live,
                &[longs(&[1]), words(&[0, 0]), longs(&[0]), words(&[0, 0])].concat(),
            )
            .add(
                31,
                n.live,
                &[longs(&[1, 0, 0, 0]), words(&[0, 0, 0, 0])].concat(),
            )
            .add(36, 0, &longs(&[3]))
            .add(42, 0, &[words(&[1, 0]), longs(&[n.live, 1])].concat())
            .add(40, n.live, &[longs(&[1, 0]), words(&[0, 0])].concat()),
    );
    all.retain(|r| !r.0.is_empty());
    all.into_iter().map(|r| r.0).collect()
}

struct Session {
    world: SimWorld,
    index: MemoryIndexHome,
    kernel: Kernel,
    handle: stillframe::fuse::SessionHandle,
    engine: Arc<Engine>,
    tree: Arc<Tree>,
}

/// Panics inside of the session are answered with EIO; the driver's hook counts them here.
pub static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

thread_local! {
    /// The session that inputs go to, one after another.
    static SESSION: RefCell<Option<Session>> = const { RefCell::new(None) };
}

impl Session {
    /// `old`: as a kernel that can do little; one after another, the inputs of a session decide.
    fn start(old: bool) -> Session {
        let world = valid().world.fork(5);
        let index = MemoryIndexHome::new();
        let engine = Engine::open(environment(&world, &index), settings()).expect("a valid store");
        let tree = Arc::new(Tree::new(Arc::clone(&engine), 0, 0, Arc::new(Status)));
        let (socket, theirs) = UnixDatagram::pair().expect("a socket pair");
        socket
            .set_read_timeout(Some(Duration::from_secs(1)))
            .expect("a time limit");
        let mut kernel = Kernel {
            socket,
            unique: 1,
            buffer: vec![0; 2 << 20],
            waiting: Vec::new(),
            opened: Vec::new(),
        };
        let (minor, flags) = if old { (31, 0) } else { (45, u32::MAX) };
        let mut body = words(&[7, minor, 128 << 10, flags, 0]);
        body.resize(64, 0);
        kernel
            .socket
            .send(&message(INIT, 1, 0, &body))
            .expect("it fits");
        let options = Options {
            event_threads: 1,
            workers: 1,
        };
        let handle =
            serve(OwnedFd::from(theirs), Arc::clone(&tree), options).expect("INIT is good");
        assert_eq!((kernel.receive().0, kernel.unique), (1, 1));
        Session {
            world,
            index,
            kernel,
            handle,
            engine,
            tree,
        }
    }

    /// Sends one input; returns whether any request of it worked.
    fn feed(&mut self, input: &[u8]) -> bool {
        let mut input = Input(input);
        let mut good = false;
        for _ in 0..REQUESTS {
            if input.0.is_empty() {
                break;
            }
            let (opcode, node, body) = (u32::from(input.u8()), input.u64(), input.counted());
            let node = self.kernel.true_node(node);
            let mut body = body.to_vec();
            match opcode {
                WRITE => true_length(&mut body, 16, WRITE_HEAD),
                READ | READDIR | READDIRPLUS => fits_the_socket(&mut body),
                SETATTR => true_times(&mut body),
                IOCTL => true_length(&mut body, 24, IOCTL_HEAD),
                SETXATTR => {
                    let end = body.iter().skip(8).position(|&b| b == 0);
                    true_length(&mut body, 0, end.map_or(usize::MAX, |end| 8 + end + 1));
                }
                _ => {}
            }
            self.kernel.true_handles(opcode, &mut body);
            // The end comes at the end.
            if opcode != DESTROY {
                good |= self.kernel.call(opcode, node, &body);
            }
        }
        self.kernel.release_all();
        assert_eq!(self.tree.open_handles(), 0, "everything was released");
        check_panics();
        good
    }

    fn end(mut self) {
        assert!(
            self.kernel.call(GETATTR, ROOT.0, &[0; 16]),
            "the session lives"
        );
        assert!(self.kernel.call(DESTROY, 0, &[]), "it can be ended");
        self.handle.wait().expect("a good end");
        self.engine.close().expect("the store stops cleanly");
        check_panics();
        drop((self.tree, self.engine));
        let again = Engine::open(environment(&self.world, &self.index), settings());
        drop(again.expect("the store opens again"));
    }
}

fn check_panics() {
    let panics = std::mem::take(&mut *PANICS.lock().unwrap());
    assert!(panics.is_empty(), "inside of the session: {panics:?}");
}

/// Requests in an input; what `run` sends.
pub fn requests(input: &[u8]) -> usize {
    let mut input = Input(input);
    let mut count = 0;
    while !input.0.is_empty() && count < REQUESTS {
        input.take(9);
        input.counted();
        count += 1;
    }
    count
}

/// WRITE, SETXATTR and IOCTL say how long their data is, beside the header. No kernel lies there, and the
/// library that reads it panics if one does (fuser 0.18), which ends the session.
fn true_length(body: &mut [u8], at: usize, head: usize) {
    if let Some(len) = body.len().checked_sub(head) {
        body[at..at + 4].copy_from_slice(&(len as u32).to_le_bytes());
    }
}

/// Times in a SETATTR have less than a second in their nanoseconds, as every kernel says them. Seconds at their
/// type's end overflow in the library (fuser 0.18) where that is checked, which ends the session.
fn true_times(body: &mut [u8]) {
    const SECONDS: [usize; 3] = [32, 40, 48];
    const NANOSECONDS: [usize; 3] = [56, 60, 64];
    for at in SECONDS {
        if let Some(field) = body.get_mut(at..at + 8)
            && *field == i64::MIN.to_le_bytes()
        {
            field.copy_from_slice(&(i64::MIN + 1).to_le_bytes());
        }
    }
    for at in NANOSECONDS {
        if let Some(field) = body.get_mut(at..at + 4) {
            let said = u32::from_le_bytes([field[0], field[1], field[2], field[3]]);
            field.copy_from_slice(&(said % 1_000_000_000).to_le_bytes());
        }
    }
}

/// An answer is one datagram, and the system's limit for those is below the largest read.
fn fits_the_socket(body: &mut [u8]) {
    const MOST: u32 = 128 << 10;
    if let Some(size) = body.get_mut(16..20) {
        let asked = u32::from_le_bytes([size[0], size[1], size[2], size[3]]);
        // What is far too large is refused by itself.
        if (MOST..=64 << 20).contains(&asked) {
            size.copy_from_slice(&MOST.to_le_bytes());
        }
    }
}

fn run(input: &[u8]) -> &'static str {
    SESSION.with_borrow_mut(|slot| {
        // One that failed is gone.
        let start = || Session::start(input.len() % 4 == 3);
        let mut session = slot.take().unwrap_or_else(start);
        let good = session.feed(input);
        *slot = Some(session);
        match good {
            true => "answered",
            false => "refused",
        }
    })
}

/// Ends the session; the next input gets another.
fn reset() {
    if let Some(session) = SESSION.take() {
        session.end();
    }
}
