//! The protocol without a kernel: requests as bytes over a socket pair, replies read back.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use super::*;
use crate::tree::fixture::{World, world};
use crate::tree::{CONTROL, ROOT, STATUS_FILE};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const MKDIR: u32 = 9;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const REMOVEXATTR: u32 = 24;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const RELEASEDIR: u32 = 29;
const CREATE: u32 = 35;
const DESTROY: u32 = 38;
const READDIRPLUS: u32 = 44;
const COPY_FILE_RANGE: u32 = 47;

const ENOENT: i32 = -2;
const EIO: i32 = -5;
const EPERM: i32 = -1;
const EBUSY: i32 = -16;
const ENFILE: i32 = -23;
const EEXIST: i32 = -17;
const EXDEV: i32 = -18;
const EROFS: i32 = -30;
const ERANGE: i32 = -34;
const ENOSYS: i32 = -38;
const EOPNOTSUPP: i32 = -95;

const ATOMIC_O_TRUNC: u32 = 1 << 3;
const EXPORT_SUPPORT: u32 = 1 << 4;
/// DO_READDIRPLUS and READDIRPLUS_AUTO.
const READDIRPLUS_FLAGS: u32 = 3 << 13;
const WRITEBACK_CACHE: u32 = 1 << 16;
const DIRECT_IO: u32 = 1 << 0;
const KEEP_CACHE: u32 = 1 << 1;

/// The kernel's side.
struct Kernel {
    socket: UnixDatagram,
    unique: u64,
    handle: SessionHandle,
    world: World,
}

fn bytes32(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn request(opcode: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = bytes32(&[40 + body.len() as u32, opcode]);
    bytes.extend(unique.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    // uid, gid, pid, padding
    bytes.extend(bytes32(&[0; 4]));
    bytes.extend(body);
    bytes
}

fn init_body(flags: u32) -> Vec<u8> {
    let mut body = bytes32(&[7, 45, 128 << 10, flags, 0]);
    body.resize(64, 0);
    body
}

/// A session whose INIT is done, with one event thread so that DESTROY ends it; the INIT reply.
fn session() -> (Kernel, Vec<u8>) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let world = world();
    let tree = Arc::clone(&world.tree);
    ours.send(&request(INIT, 1, 0, &init_body(u32::MAX)))
        .unwrap();
    let options = Options {
        event_threads: 1,
        workers: 2,
    };
    let handle = serve(OwnedFd::from(theirs), tree, options).unwrap();
    let mut kernel = Kernel {
        socket: ours,
        unique: 1,
        handle,
        world,
    };
    let reply = kernel.receive();
    (kernel, reply.1)
}

impl Kernel {
    fn receive(&mut self) -> (i32, Vec<u8>) {
        let mut bytes = vec![0; 1 << 20];
        let len = self.socket.recv(&mut bytes).unwrap();
        bytes.truncate(len);
        assert_eq!(u32_at(&bytes, 0) as usize, len, "the length of the reply");
        assert_eq!(
            u64_at(&bytes, 8),
            self.unique,
            "the reply is to the request"
        );
        (u32_at(&bytes, 4) as i32, bytes.split_off(16))
    }

    fn send(&mut self, opcode: u32, node: u64, body: &[u8]) {
        self.unique += 2;
        self.socket
            .send(&request(opcode, self.unique, node, body))
            .unwrap();
    }

    fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.send(opcode, node, body);
        match self.receive() {
            (0, body) => Ok(body),
            (errno, body) => {
                assert!(body.is_empty());
                Err(errno)
            }
        }
    }

    fn lookup(&mut self, node: u64, name: &str) -> Result<u64, i32> {
        let entry = self.call(LOOKUP, node, format!("{name}\0").as_bytes())?;
        assert_eq!(u64_at(&entry, 16), 0, "names are never cached");
        Ok(u64_at(&entry, 0))
    }

    fn walk(&mut self, path: &str) -> u64 {
        path.split('/')
            .fold(ROOT.0, |node, name| self.lookup(node, name).unwrap())
    }

    /// Handle and FOPEN flags.
    fn open(&mut self, node: u64, flags: u32) -> Result<(u64, u32), i32> {
        let reply = self.call(OPEN, node, &bytes32(&[flags, 0]))?;
        Ok((u64_at(&reply, 0), u32_at(&reply, 8)))
    }

    fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let mut body = fh.to_le_bytes().to_vec();
        body.extend(offset.to_le_bytes());
        body.extend(bytes32(&[size, 0, 0, 0, 0, 0]));
        self.call(READ, node, &body)
    }

    fn write(&mut self, node: u64, fh: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let mut body = fh.to_le_bytes().to_vec();
        body.extend(offset.to_le_bytes());
        body.extend(bytes32(&[data.len() as u32, 0, 0, 0, 1, 0]));
        body.extend(data);
        self.call(WRITE, node, &body).map(|reply| u32_at(&reply, 0))
    }

    /// FLUSH, FSYNC or RELEASE: a handle and 16 more bytes.
    fn handle_call(&mut self, opcode: u32, node: u64, fh: u64, more: usize) -> Result<(), i32> {
        let mut body = fh.to_le_bytes().to_vec();
        body.resize(8 + more, 0);
        self.call(opcode, node, &body).map(drop)
    }

    /// The new node.
    fn link(&mut self, source: u64, parent: u64, name: &str) -> Result<u64, i32> {
        let mut body = source.to_le_bytes().to_vec();
        body.extend(format!("{name}\0").as_bytes());
        let entry = self.call(LINK, parent, &body)?;
        assert_eq!(u64_at(&entry, 16), 0, "names are never cached");
        Ok(u64_at(&entry, 0))
    }

    /// Node, handle and FOPEN flags.
    fn create(&mut self, parent: u64, name: &str, flags: u32) -> Result<(u64, u64, u32), i32> {
        let mut body = bytes32(&[flags, 0o644, 0o22, 0]);
        body.extend(format!("{name}\0").as_bytes());
        let made = self.call(CREATE, parent, &body)?;
        Ok((u64_at(&made, 0), u64_at(&made, 128), u32_at(&made, 136)))
    }

    fn copy(&mut self, from: (u64, u64), to: (u64, u64), len: u64) -> Result<u32, i32> {
        let body = [from.1, 0, to.0, to.1, 0, len, 0];
        let body: Vec<u8> = body.iter().flat_map(|v| v.to_le_bytes()).collect();
        let copied = self.call(COPY_FILE_RANGE, from.0, &body)?;
        Ok(u32_at(&copied, 0))
    }

    fn setxattr(&mut self, node: u64, name: &str, value: &str) -> Result<(), i32> {
        let mut body = bytes32(&[value.len() as u32, 0]);
        body.extend(format!("{name}\0{value}").as_bytes());
        self.call(SETXATTR, node, &body).map(drop)
    }

    fn destroy(mut self) {
        self.call(DESTROY, 0, &[]).unwrap();
        self.handle.wait().unwrap();
        assert!(self.handle.is_finished());
        assert_eq!(
            self.world.tree.open_handles(),
            0,
            "every handle was released"
        );
    }
}

#[test]
fn init_asks_for_what_we_need_and_never_for_the_write_back_cache() {
    let (kernel, reply) = session();
    let flags = u32_at(&reply, 12);
    assert_eq!(u32_at(&reply, 0), 7);
    assert_ne!(flags & ATOMIC_O_TRUNC, 0);
    assert_ne!(flags & EXPORT_SUPPORT, 0);
    assert_eq!(flags & WRITEBACK_CACHE, 0);
    assert_eq!(u32_at(&reply, 20), 1 << 20, "max_write");
    assert_eq!(u32_at(&reply, 16) & 0xffff, 64, "max_background");
    kernel.destroy();
}

#[test]
fn a_file_is_found_opened_written_synced_and_read() {
    let (mut k, _) = session();
    let live = k.walk("vm/live.img");
    let (fh, flags) = k.open(live, 2).unwrap();
    assert_eq!(flags & (DIRECT_IO | KEEP_CACHE), DIRECT_IO);
    assert_eq!(k.write(live, fh, 5000, b"hello"), Ok(5));
    assert_eq!(k.read(live, fh, 4999, 7).unwrap(), b"\0hello\0");
    k.handle_call(FSYNC, live, fh, 8).unwrap();
    k.handle_call(FLUSH, live, fh, 16).unwrap();
    k.handle_call(RELEASE, live, fh, 16).unwrap();
    assert_eq!(k.read(live, fh, 0, 1), Err(-9), "EBADF after release");
    assert_eq!(k.lookup(ROOT.0, "nope"), Err(ENOENT));
    assert_eq!(k.call(MKDIR, ROOT.0, b"\0\0\0\0\0\0\0\0d\0"), Err(EPERM));
    k.destroy();
}

#[test]
fn create_takes_a_snapshot_that_the_kernel_may_cache() {
    let (mut k, _) = session();
    let directory = k.walk("vm/snapshots");
    let mut body = bytes32(&[0o101, 0o600, 0o22, 0]);
    body.extend(b"a.img\0");
    let reply = k.call(CREATE, directory, &body).unwrap();
    // An entry of 128 bytes, then the handle and its flags.
    let (node, fh, flags) = (u64_at(&reply, 0), u64_at(&reply, 128), u32_at(&reply, 136));
    assert_eq!(flags & (DIRECT_IO | KEEP_CACHE), KEEP_CACHE);
    assert_eq!(k.write(node, fh, 0, b"x"), Err(EROFS));
    k.handle_call(RELEASE, node, fh, 16).unwrap();
    assert_eq!(k.lookup(directory, "a.img"), Ok(node));
    k.destroy();
}

#[test]
fn extended_attributes_follow_the_size_protocol() {
    let (mut k, _) = session();
    let live = k.walk("vm/live.img");
    let get = |size: u32| {
        let mut body = bytes32(&[size, 0]);
        body.extend(b"user.stillframe.state\0");
        body
    };
    let size = k.call(GETXATTR, live, &get(0)).unwrap();
    assert_eq!(u32_at(&size, 0), 6);
    assert_eq!(k.call(GETXATTR, live, &get(5)), Err(ERANGE));
    assert_eq!(k.call(GETXATTR, live, &get(6)).unwrap(), b"active");
    k.destroy();
}

#[test]
fn a_handler_that_panics_answers_eio_and_the_session_lives_on() {
    let (mut k, _) = session();
    k.world.status.panic_next();
    assert_eq!(k.call(GETATTR, STATUS_FILE.0, &[0; 16]), Err(EIO));
    assert!(k.call(GETATTR, STATUS_FILE.0, &[0; 16]).is_ok());
    assert!(k.lookup(CONTROL.0, "status.json").is_ok());
    k.destroy();
}

#[test]
fn malformed_requests_are_answered_and_harm_nothing() {
    let (mut k, _) = session();
    // An opcode nobody knows, a body too short, a name without its end.
    assert_eq!(k.call(4000, ROOT.0, &[]), Err(ENOSYS));
    assert_eq!(k.call(WRITE, ROOT.0, &[1, 2, 3]), Err(ENOSYS));
    assert_eq!(k.call(LOOKUP, ROOT.0, b"vm"), Err(ENOSYS));
    // Nodes and handles that do not exist, offsets and sizes beyond all reason.
    assert_eq!(k.lookup(999_999, "x"), Err(ENOENT));
    assert_eq!(k.read(ROOT.0, 77, 0, 4096), Err(-9));
    let live = k.walk("vm/live.img");
    let (fh, _) = k.open(live, 2).unwrap();
    assert_eq!(k.read(live, fh, i64::MAX as u64, 4096), Ok(Vec::new()));
    assert_eq!(k.read(live, fh, 0, u32::MAX), Err(-22), "EINVAL");
    assert_eq!(k.write(live, fh, i64::MAX as u64, b"x"), Err(-28), "ENOSPC");
    // FORGET is never answered.
    k.send(FORGET, 999_999, &u64::MAX.to_le_bytes());
    k.handle_call(RELEASE, live, fh, 16).unwrap();
    k.destroy();
}

#[test]
fn a_second_init_is_refused() {
    let (mut k, _) = session();
    assert_eq!(k.call(INIT, 0, &init_body(0)), Err(EIO));
    k.destroy();
}

#[test]
fn a_session_that_does_not_begin_with_init_is_an_error_not_a_hang() {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.send(&request(GETATTR, 1, ROOT.0, &[0; 16])).unwrap();
    let tree = Arc::clone(&world().tree);
    let error = serve(OwnedFd::from(theirs), tree, Options::default())
        .err()
        .unwrap();
    assert_eq!(error.kind(), Kind::Io);
}

#[test]
fn a_forced_unmount_is_a_normal_end() {
    const ENODEV: i32 = 19;
    assert_eq!(ended(Ok(())), Ok(()));
    assert_eq!(ended(Err(ErrorKind::ConnectionAborted.into())), Ok(()));
    assert_eq!(ended(Err(io::Error::from_raw_os_error(ENODEV))), Ok(()));
    assert!(ended(Err(ErrorKind::InvalidData.into())).is_err());
}

#[test]
fn a_link_answers_with_a_new_node_and_a_copy_is_taken_over_or_left_to_the_kernel() {
    let (mut k, _) = session();
    let snapshots = k.walk("vm/snapshots");
    let (a, fh, _) = k.create(snapshots, "a.img", 2).unwrap();
    let clones = k.walk("vm/clones");
    let b = k.link(a, clones, "b.img").unwrap();
    assert_ne!(a, b);
    assert_eq!(k.lookup(clones, "b.img"), Ok(b));
    assert_eq!(k.link(a, clones, "b.img"), Err(EEXIST));
    assert_eq!(k.link(b, snapshots, "c.img"), Err(EPERM));
    let other = k.walk("odd/clones");
    assert_eq!(k.link(b, other, "c.img"), Err(EXDEV));
    let (live, clone) = (k.walk("vm/live.img"), (b, k.open(b, 2).unwrap()));
    let (clone, flags) = ((clone.0, clone.1.0), clone.1.1);
    assert_eq!(flags & (DIRECT_IO | KEEP_CACHE), DIRECT_IO);
    assert_eq!(k.write(clone.0, clone.1, 9, b"clone"), Ok(5));
    // A clone that has its content is copied to; the request stays on offer.
    assert_eq!(k.copy((a, fh), clone, 4096), Err(EOPNOTSUPP));
    let (c, grown, flags) = k.create(clones, "c.img", 1).unwrap();
    assert_eq!(flags & (DIRECT_IO | KEEP_CACHE), DIRECT_IO);
    // More than an answer can say: as much as there is.
    let copied = k.copy((a, fh), (c, grown), u64::MAX >> 1);
    assert_eq!(copied, Ok(World::VM as u32));
    let (writer, _) = k.open(live, 2).unwrap();
    let revert = "user.stillframe.revert";
    assert_eq!(k.setxattr(live, revert, "a"), Err(EBUSY));
    assert_eq!(k.setxattr(live, "user.stillframe.state", "a"), Err(EPERM));
    assert_eq!(k.setxattr(live, "user.other", "a"), Err(EOPNOTSUPP));
    k.handle_call(RELEASE, live, writer, 16).unwrap();
    assert_eq!(k.setxattr(live, revert, "nope"), Err(ENOENT));
    assert_eq!(k.setxattr(live, revert, "a"), Ok(()));
    for (node, fh) in [(a, fh), clone, (c, grown)] {
        k.handle_call(FLUSH, node, fh, 16).unwrap();
        k.handle_call(RELEASE, node, fh, 16).unwrap();
    }
    k.destroy();
}

#[test]
fn a_node_is_found_again_after_it_was_forgotten() {
    let (mut k, _) = session();
    let live = k.walk("vm/live.img");
    let directory = k.walk("vm/snapshots");
    for node in [live, directory] {
        k.send(FORGET, node, &2u64.to_le_bytes());
        assert_eq!(k.lookup(node, "."), Ok(node));
    }
    let volume = k.lookup(directory, "..").unwrap();
    assert_eq!(k.lookup(ROOT.0, "vm"), Ok(volume));
    k.destroy();
}

/// One entry of a listing with attributes, in the kernel's bytes.
struct Listed {
    name: String,
    number: u64,
    /// `fuse_entry_out`.
    entry: Vec<u8>,
}

impl Listed {
    fn size(&self) -> u64 {
        u64_at(&self.entry, 48)
    }
}

impl Kernel {
    /// One batch from an open directory, of at most `room` bytes; where the next one begins.
    fn batch(&mut self, node: u64, fh: u64, after: u64, room: u32) -> (Vec<Listed>, u64) {
        let mut body = fh.to_le_bytes().to_vec();
        body.extend(after.to_le_bytes());
        body.extend(bytes32(&[room, 0, 0, 0, 0, 0]));
        let bytes = self.call(READDIRPLUS, node, &body).unwrap();
        assert!(bytes.len() <= room as usize);
        let (mut listed, mut at, mut next) = (Vec::new(), 0, after);
        while at < bytes.len() {
            let len = u32_at(&bytes, at + 144) as usize;
            let name = &bytes[at + 152..at + 152 + len];
            next = u64_at(&bytes, at + 136);
            listed.push(Listed {
                name: String::from_utf8(name.to_vec()).unwrap(),
                number: u64_at(&bytes, at + 128),
                entry: bytes[at..at + 128].to_vec(),
            });
            at += (152 + len).next_multiple_of(8);
        }
        (listed, next)
    }
}

#[test]
fn a_listing_with_attributes_is_told_and_counted_entry_by_entry() {
    let (mut k, reply) = session();
    assert_eq!(u32_at(&reply, 12) & READDIRPLUS_FLAGS, READDIRPLUS_FLAGS);
    let (vm, directory) = (k.walk("vm"), k.walk("vm/snapshots"));
    for name in ["a.img", "b.img", "c.img"] {
        let (node, fh, _) = k.create(directory, name, 0).unwrap();
        k.handle_call(RELEASE, node, fh, 16).unwrap();
        k.send(FORGET, node, &1u64.to_le_bytes());
    }
    assert!(
        k.call(GETATTR, vm, &[0; 16]).is_ok(),
        "after the last FORGET"
    );
    let known = k.world.tree.known_nodes();
    let (fh, mut after) = (u64_at(&k.call(OPENDIR, directory, &[0; 8]).unwrap(), 0), 0);
    let mut all = Vec::new();
    // Room for two entries, and for half of one more, which is not counted.
    loop {
        let (mut batch, next) = k.batch(directory, fh, after, 2 * 160 + 80);
        if batch.is_empty() {
            break;
        }
        assert_eq!(batch.len().min(2), batch.len());
        (all, after) = (all.into_iter().chain(batch.drain(..)).collect(), next);
        assert_eq!(k.world.tree.known_nodes(), known + all.len() - 2);
    }
    let names: Vec<&str> = all.iter().map(|e: &Listed| e.name.as_str()).collect();
    assert_eq!(names, [".", "..", "a.img", "b.img", "c.img"]);
    assert_eq!((all[0].number, all[1].number), (directory, vm));
    for listed in &all[2..] {
        assert_eq!(listed.number, u64_at(&listed.entry, 0));
        let looked = k.call(LOOKUP, directory, format!("{}\0", listed.name).as_bytes());
        let looked = looked.unwrap();
        assert_eq!(listed.entry[..16], looked[..16], "node and generation");
        assert_eq!(listed.entry[40..], looked[40..], "attributes");
        assert_eq!(listed.entry[16..40], [0; 24], "neither name nor they last");
        k.send(FORGET, listed.number, &2u64.to_le_bytes());
    }
    k.handle_call(RELEASEDIR, directory, fh, 16).unwrap();
    assert_eq!(k.world.tree.known_nodes(), known, "all was forgotten");
    // What would have to be read has its number, and attributes that no kernel takes.
    let diffs = k.walk("vm/diffs");
    let fh = u64_at(&k.call(OPENDIR, diffs, &[0; 8]).unwrap(), 0);
    let (listed, _) = k.batch(diffs, fh, 0, 4096);
    assert_eq!(listed.len(), 6);
    for diff in &listed[2..] {
        assert_eq!((diff.size(), diff.number >> 63), (u64::MAX, 1));
        assert_eq!(diff.number, u64_at(&diff.entry, 0));
        k.send(FORGET, diff.number, &1u64.to_le_bytes());
    }
    k.handle_call(RELEASEDIR, diffs, fh, 16).unwrap();
    let bad = k.call(READDIRPLUS, diffs, &[9; 40]);
    assert_eq!(bad, Err(-9), "EBADF");
    k.destroy();
}

#[test]
fn a_kernel_that_would_believe_any_attributes_is_not_offered_them_in_listings() {
    for (minor, offered) in [(31, false), (32, true)] {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let mut body = bytes32(&[7, minor, 128 << 10, u32::MAX, 0]);
        body.resize(64, 0);
        ours.send(&request(INIT, 1, 0, &body)).unwrap();
        let options = Options {
            event_threads: 1,
            workers: 1,
        };
        let world = world();
        let tree = Arc::clone(&world.tree);
        let handle = serve(OwnedFd::from(theirs), tree, options).unwrap();
        let mut reply = vec![0; 4096];
        assert!(ours.recv(&mut reply).unwrap() > 16);
        let flags = u32_at(&reply, 16 + 12) & READDIRPLUS_FLAGS;
        assert_eq!(flags != 0, offered, "{minor}");
        ours.send(&request(DESTROY, 3, 0, &[])).unwrap();
        handle.wait().unwrap();
    }
}

#[test]
fn attributes_last_a_second_and_only_where_they_cannot_change() {
    let (mut k, _) = session();
    let directory = k.walk("vm/snapshots");
    let (a, fh, _) = k.create(directory, "a.img", 0).unwrap();
    k.handle_call(RELEASE, a, fh, 16).unwrap();
    let (_, fh, _) = k.create(directory, "b.img", 0).unwrap();
    k.handle_call(RELEASE, a, fh, 16).unwrap();
    let clones = k.walk("vm/clones");
    k.link(a, clones, "b.img").unwrap();
    let paths = [
        ("vm/snapshots", "a.img", 1),
        ("vm/diffs", "a..b.qcow2", 1),
        ("vm/diffs", "a..b.json", 0),
        ("", "vm", 0),
        ("vm/clones", "b.img", 0),
        ("vm", "live.img", 0),
        ("vm", "snapshots", 0),
        (".stillframe", "status.json", 0),
    ];
    for (parent, name, seconds) in paths {
        let parent = match parent {
            "" => ROOT.0,
            path => k.walk(path),
        };
        let entry = k
            .call(LOOKUP, parent, format!("{name}\0").as_bytes())
            .unwrap();
        let (name_lasts, attributes_last) = (u64_at(&entry, 16), u64_at(&entry, 24));
        assert_eq!((name_lasts, attributes_last), (0, seconds), "{name}");
        assert_eq!([u32_at(&entry, 32), u32_at(&entry, 36)], [0, 0], "{name}");
        let attr = k.call(GETATTR, u64_at(&entry, 0), &[0; 16]).unwrap();
        assert_eq!((u64_at(&attr, 0), u32_at(&attr, 8)), (seconds, 0), "{name}");
    }
    k.destroy();
}

#[test]
fn what_may_change_or_fail_is_never_cached() {
    let (mut k, _) = session();
    let snapshots = k.walk("vm/snapshots");
    for name in ["a.img", "b.img"] {
        let (node, fh, _) = k.create(snapshots, name, 2).unwrap();
        k.handle_call(RELEASE, node, fh, 16).unwrap();
    }
    let (a, clones) = (k.walk("vm/snapshots/a.img"), k.walk("vm/clones"));
    k.link(a, clones, "c.img").unwrap();
    for (path, expected) in [
        ("vm/live.img", DIRECT_IO),
        ("vm/clones/c.img", DIRECT_IO),
        ("vm/diffs/a..b.qcow2", DIRECT_IO),
        ("vm/diffs/a..b.json", DIRECT_IO),
        ("vm/snapshots/a.img", KEEP_CACHE),
        ("vm/diffs/a.img", KEEP_CACHE),
    ] {
        let node = k.walk(path);
        let (fh, flags) = k.open(node, 0).unwrap();
        assert_eq!(flags & (DIRECT_IO | KEEP_CACHE), expected, "{path}");
        k.handle_call(RELEASE, node, fh, 16).unwrap();
    }
    k.destroy();
}

#[test]
fn beyond_65536_open_files_and_directories_there_is_enfile() {
    let (mut k, _) = session();
    let (live, directory) = (k.walk("vm/live.img"), k.walk("vm"));
    let tree = Arc::clone(&k.world.tree);
    let flags = crate::tree::OpenFlags {
        write: false,
        truncate: false,
        append: false,
    };
    let mut handles = Vec::new();
    for i in 0..65_535 {
        handles.push(match i % 2 {
            0 => tree.open(NodeId(live), flags).unwrap().handle,
            _ => tree.opendir(NodeId(directory)).unwrap(),
        });
    }
    let (last, _) = k.open(live, 0).unwrap();
    assert_eq!(k.open(live, 0), Err(ENFILE));
    let opened = k.call(OPENDIR, directory, &[0; 8]);
    assert_eq!(opened, Err(ENFILE));
    k.handle_call(RELEASE, live, last, 16).unwrap();
    let (last, _) = k.open(live, 0).unwrap();
    k.handle_call(RELEASE, live, last, 16).unwrap();
    for handle in handles {
        tree.release(handle).unwrap();
    }
    k.destroy();
}

#[test]
fn extended_attributes_are_neither_set_nor_removed() {
    let (mut k, _) = session();
    let (a, fh, _) = {
        let directory = k.walk("vm/snapshots");
        k.create(directory, "a.img", 2).unwrap()
    };
    for node in [a, k.walk("vm/live.img"), k.walk("vm")] {
        for (name, errno) in [
            ("user.stillframe.uuid", EPERM),
            ("user.stillframe.new", EPERM),
            ("user.other", EOPNOTSUPP),
        ] {
            assert_eq!(k.setxattr(node, name, "a"), Err(errno), "{name}");
            let name = format!("{name}\0");
            let removed = k.call(REMOVEXATTR, node, name.as_bytes());
            assert_eq!(removed, Err(errno), "{name}");
        }
    }
    k.handle_call(RELEASE, a, fh, 16).unwrap();
    k.destroy();
}
