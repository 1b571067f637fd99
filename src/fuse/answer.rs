//! The answers that several requests share, and how long the kernel may believe them.

use std::cell::RefCell;
use std::time::Duration;

use fuser::{
    Errno, FileHandle, FopenFlags, Generation, INodeNo, ReplyAttr, ReplyData, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyXattr,
};

use crate::fuse::errno::answer;
use crate::fuse::wire;
use crate::tree::{Attr, Caching, HandleId, Opened, Result, Tree, TreeError};

/// Largest write the kernel may send; reads have the same limit.
pub(super) const MAX_WRITE: u32 = 1 << 20;

/// A read larger than this is refused, not cut: a short answer to a buffered read means the end of
/// the file. No kernel asks for more than fits the limits agreed on in INIT.
const READ_MAX: u32 = 16 * MAX_WRITE;

/// Names are looked up every time.
pub(super) const ENTRY_TTL: Duration = Duration::ZERO;

/// Attributes of a snapshot cannot change, but it can be deleted: its link count may be this old.
const FIXED_ATTR_TTL: Duration = Duration::from_secs(1);

thread_local! {
    /// What an event thread reads into; grows to the largest read it has seen.
    static READ_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Whether it worked.
pub(super) fn empty(operation: &'static str, node: INodeNo, result: Result<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(answer(operation, node.0, &e)),
    }
}

fn attr_ttl(attr: &Attr) -> Duration {
    if attr.fixed {
        FIXED_ATTR_TTL
    } else {
        Duration::ZERO
    }
}

/// An entry of a directory.
pub(super) fn entry(
    operation: &'static str,
    parent: INodeNo,
    result: Result<Attr>,
    reply: ReplyEntry,
) {
    match result {
        Ok(attr) => reply.entry_with_ttls(
            &attr_ttl(&attr),
            &ENTRY_TTL,
            &wire::file_attr(&attr),
            Generation(0),
        ),
        Err(e) => reply.error(answer(operation, parent.0, &e)),
    }
}

/// A listing with attributes. Every entry that fits but `.` and `..` counts as a lookup, as the kernel
/// counts it. Its attributes are not believed for longer than its name, that is, not at all.
pub(super) fn listing(
    tree: &Tree,
    node: INodeNo,
    fh: FileHandle,
    offset: u64,
    mut reply: ReplyDirectoryPlus,
) {
    let listed = tree.readdir_plus(HandleId(fh.0), offset, |entry, attr| {
        let attr = attr.map_or_else(|| wire::untold_attr(entry), wire::file_attr);
        let (node, generation) = (INodeNo(entry.node.0), Generation(0));
        reply.add(
            node,
            entry.cookie,
            &entry.name,
            &ENTRY_TTL,
            &attr,
            generation,
        )
    });
    match listed {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(answer("readdirplus", node.0, &e)),
    }
}

/// How the kernel may cache an opened file. What cannot change needs no FLUSH either.
pub(super) fn fopen(opened: Opened) -> FopenFlags {
    match opened.caching {
        Caching::None => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
        Caching::Immutable => FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
    }
}

/// Answers with a value as getxattr and listxattr want it: its size, the value, or ERANGE.
pub(super) fn xattr(
    operation: &'static str,
    node: INodeNo,
    size: u32,
    value: Result<Vec<u8>>,
    reply: ReplyXattr,
) {
    let fits = value.and_then(|value| {
        let len = u32::try_from(value.len()).map_err(|_| TreeError::BufferTooSmall)?;
        if size != 0 && len > size {
            Err(TreeError::BufferTooSmall)
        } else {
            Ok((len, value))
        }
    });
    match fits {
        Ok((len, _)) if size == 0 => reply.size(len),
        Ok((_, value)) => reply.data(&value),
        Err(e) => reply.error(answer(operation, node.0, &e)),
    }
}

/// Reads and answers from this thread's buffer.
pub(super) fn read_into_reply(
    tree: &Tree,
    node: INodeNo,
    fh: FileHandle,
    offset: u64,
    size: u32,
    reply: ReplyData,
) {
    if size > READ_MAX {
        return reply.error(Errno::EINVAL);
    }
    READ_BUFFER.with_borrow_mut(|buffer| {
        let handle = HandleId(fh.0);
        // The size first, so that a request beyond it does not grow the buffer.
        let read = tree.size(handle).and_then(|end| {
            let len = u64::from(size).min(end.saturating_sub(offset)) as usize;
            if buffer.len() < len {
                buffer.resize(len, 0);
            }
            tree.read(handle, offset, &mut buffer[..len])
        });
        match read {
            Ok(len) => reply.data(&buffer[..len]),
            Err(e) => reply.error(answer("read", node.0, &e)),
        }
    });
}

/// Attributes.
pub(super) fn attributes(
    operation: &'static str,
    node: INodeNo,
    result: Result<Attr>,
    reply: ReplyAttr,
) {
    match result {
        Ok(attr) => reply.attr(&attr_ttl(&attr), &wire::file_attr(&attr)),
        Err(e) => reply.error(answer(operation, node.0, &e)),
    }
}
