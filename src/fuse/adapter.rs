//! Requests in, replies out: every method translates, calls the tree, and answers.
//!
//! Whatever may wait for a medium (changing, syncing, the catalogue) goes to the pool with its
//! payload and its reply; the rest is answered on the event thread. Names of entries are never
//! cached by the kernel, so what the command line takes or deletes is seen at once; attributes only
//! where they cannot change.
//!
//! A handler that panics answers EIO (its reply is dropped) and nothing else happens.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};

use crate::fuse::answer::{
    ENTRY_TTL, MAX_WRITE, attributes, empty, entry, fopen, listing, read_into_reply, xattr,
};
use crate::fuse::errno::answer;
use crate::fuse::pool::{Pool, guarded};
use crate::fuse::wire;
use crate::sys::watch::Watch;
use crate::tree::{HandleId, NodeId, Result, SetAttr, Tree, TreeError};
use crate::units::BLOCK;

/// Background requests (readahead, asynchronous direct I/O) in flight at once.
const MAX_BACKGROUND: u16 = 64;

/// Most bytes of one copy_file_range: what its answer can say, in whole grains of any size.
const COPY_MAX: u64 = 1 << 31;

/// Longest file name; the kernel checks it too.
const NAME_BYTES_MAX: u32 = 255;

/// The tree as fuser wants to see it.
pub(super) struct Adapter {
    tree: Arc<Tree>,
    /// Who wants to know what is under way.
    watch: Arc<Watch>,
    /// For what moves bytes. Taken out when the session ends.
    pool: Option<Pool>,
    /// For changes of the catalogue: a disk full of waiting writers must not keep somebody from
    /// deleting a snapshot.
    catalogue: Option<Pool>,
    /// For looks at files whose size is only known after reading: they keep nobody else waiting.
    views: Option<Pool>,
}

/// A look at a file whose size is only known after reading.
const VIEW: &str = "view";

impl Adapter {
    pub fn new(
        tree: Arc<Tree>,
        watch: Arc<Watch>,
        pool: Pool,
        catalogue: Pool,
        views: Pool,
    ) -> Adapter {
        Adapter {
            tree,
            watch,
            pool: Some(pool),
            catalogue: Some(catalogue),
            views: Some(views),
        }
    }

    /// Runs a handler on a worker.
    fn defer(
        &self,
        operation: &'static str,
        node: INodeNo,
        handler: impl FnOnce(&Tree) + Send + 'static,
    ) {
        // A revert, or looking for what changed, takes its time.
        let long = matches!(operation, "setxattr" | VIEW);
        let work = self.watch.begin(operation, node.0, long);
        let tree = Arc::clone(&self.tree);
        let pool = match operation {
            "create" | "link" | "unlink" | "rename" => &self.catalogue,
            VIEW => &self.views,
            _ => &self.pool,
        };
        if let Some(pool) = pool {
            pool.submit(move || work.run(|| guarded(operation, || handler(&tree))));
        }
    }

    /// Runs a handler here and now.
    fn here(&self, operation: &'static str, node: INodeNo, handler: impl FnOnce()) {
        let work = self.watch.begin(operation, node.0, false);
        work.run(|| guarded(operation, handler));
    }

    /// An operation that only answers whether it worked, on a worker.
    fn defer_empty(
        &self,
        operation: &'static str,
        node: INodeNo,
        reply: ReplyEmpty,
        run: impl FnOnce(&Tree) -> Result<()> + Send + 'static,
    ) {
        self.defer(operation, node, move |tree| {
            empty(operation, node, run(tree), reply)
        });
    }

    /// Answers an operation that is refused on every name.
    fn refuse_entry(&self, operation: &'static str, parent: INodeNo, reply: ReplyEntry) {
        self.here(operation, parent, || {
            let error = self.tree.refuse_name(NodeId(parent.0)).err();
            reply.error(error.map_or(Errno::EPERM, |e| answer(operation, parent.0, &e)));
        });
    }
}

#[allow(clippy::too_many_arguments, reason = "the signatures are fuser's")]
impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = [
            ("ATOMIC_O_TRUNC", InitFlags::FUSE_ATOMIC_O_TRUNC),
            ("PARALLEL_DIROPS", InitFlags::FUSE_PARALLEL_DIROPS),
            ("ASYNC_DIO", InitFlags::FUSE_ASYNC_DIO),
            // Numbers can be looked up for ever, and none is given again: generation 0 will do.
            ("EXPORT_SUPPORT", InitFlags::FUSE_EXPORT_SUPPORT),
            // Whoever reads has the pages dropped of what failed: `SessionHandle::forget_attributes`.
            ("AUTO_INVAL_DATA", InitFlags::FUSE_AUTO_INVAL_DATA),
        ];
        for (name, flag) in wanted {
            // None is needed to be right: without ATOMIC_O_TRUNC a rewrite is refused (EPERM).
            if config.add_capabilities(flag).is_err() {
                tracing::warn!("this kernel does not offer {name}");
            }
        }
        let listings = InitFlags::FUSE_DO_READDIRPLUS | InitFlags::FUSE_READDIRPLUS_AUTO;
        if config.kernel_abi() >= wire::LISTS_WITH_ATTRIBUTES {
            // Plain listings will do as well.
            let _ = config.add_capabilities(listings);
        }
        // A refused value leaves fuser's default, which is only slower.
        let _ = config.set_max_write(MAX_WRITE);
        let _ = config.set_max_readahead(MAX_WRITE);
        let _ = config.set_max_background(MAX_BACKGROUND);
        let _ = config.set_congestion_threshold(MAX_BACKGROUND);
        Ok(())
    }

    fn destroy(&mut self) {
        self.pool = None;
        self.catalogue = None;
        self.views = None;
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (id, name) = (NodeId(parent.0), name.to_string_lossy().into_owned());
        let answer = move |tree: &Tree| entry("lookup", parent, tree.lookup(id, &name), reply);
        match self.tree.reads_to_look(id) {
            true => self.defer(VIEW, parent, answer),
            false => self.here("lookup", parent, || answer(&self.tree)),
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.here("forget", ino, || self.tree.forget(NodeId(ino.0), nlookup));
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let id = NodeId(ino.0);
        let answer = move |tree: &Tree| attributes("getattr", ino, tree.getattr(id), reply);
        match self.tree.reads_to_look(id) {
            true => self.defer(VIEW, ino, answer),
            false => self.here("getattr", ino, || answer(&self.tree)),
        }
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let times = atime.is_some() || mtime.is_some();
        let set = SetAttr {
            mode,
            uid,
            gid,
            size,
            times,
            caller: req.pid(),
        };
        let handle = fh.map(|fh| HandleId(fh.0));
        let answer = move |tree: &Tree| {
            let result = tree.setattr(NodeId(ino.0), handle, set);
            attributes("setattr", ino, result, reply);
        };
        // A clone that still grows gets another size, durably.
        match size {
            Some(_) => self.defer("setattr", ino, answer),
            None => self.here("setattr", ino, || answer(&self.tree)),
        }
    }

    fn mknod(
        &self,
        _req: &Request,
        parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        self.refuse_entry("mknod", parent, reply);
    }

    fn mkdir(
        &self,
        _req: &Request,
        parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        self.refuse_entry("mkdir", parent, reply);
    }

    fn symlink(
        &self,
        _req: &Request,
        parent: INodeNo,
        _name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        self.refuse_entry("symlink", parent, reply);
    }

    fn link(
        &self,
        _req: &Request,
        ino: INodeNo,
        new_parent: INodeNo,
        new_name: &OsStr,
        reply: ReplyEntry,
    ) {
        let name = new_name.to_string_lossy().into_owned();
        self.defer("link", new_parent, move |tree| {
            let made = tree.link(NodeId(ino.0), NodeId(new_parent.0), &name);
            entry("link", new_parent, made, reply);
        });
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        self.here("rmdir", parent, || {
            empty(
                "rmdir",
                parent,
                self.tree.refuse_name(NodeId(parent.0)),
                reply,
            );
        });
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_string_lossy().into_owned();
        self.defer_empty("unlink", parent, reply, move |tree| {
            tree.unlink(NodeId(parent.0), &name)
        });
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let name = name.to_string_lossy().into_owned();
        let new_name = new_name.to_string_lossy().into_owned();
        let mode = wire::rename_mode(flags);
        self.defer_empty("rename", parent, reply, move |tree| {
            tree.rename(
                NodeId(parent.0),
                &name,
                NodeId(new_parent.0),
                &new_name,
                mode,
            )
        });
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let flags = wire::open_flags(OpenFlags(flags));
        let name = name.to_string_lossy().into_owned();
        let caller = req.pid();
        self.defer("create", parent, move |tree| {
            match tree.create(NodeId(parent.0), &name, flags, caller) {
                // One time to live for name and attributes alike: the name's.
                Ok((attr, opened)) => reply.created(
                    &ENTRY_TTL,
                    &wire::file_attr(&attr),
                    Generation(0),
                    FileHandle(opened.handle.0),
                    fopen(opened),
                ),
                Err(e) => reply.error(answer("create", parent.0, &e)),
            }
        });
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let id = NodeId(ino.0);
        let flags = wire::open_flags(flags);
        let run = move |tree: &Tree| match tree.open(id, flags) {
            Ok(opened) => reply.opened(FileHandle(opened.handle.0), fopen(opened)),
            Err(e) => reply.error(answer("open", ino.0, &e)),
        };
        match self.tree.reads_to_look(id) {
            true => self.defer(VIEW, ino, run),
            // Empties a clone that still grows, durably.
            false if flags.truncate => self.defer("open", ino, run),
            false => self.here("open", ino, || run(&self.tree)),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.here("read", ino, || {
            read_into_reply(&self.tree, ino, fh, offset, size, reply)
        });
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let data = data.to_vec();
        let durable = wire::is_durable_write(flags);
        self.defer("write", ino, move |tree| {
            match tree.write(HandleId(fh.0), offset, &data, durable) {
                // A request holds at most MAX_WRITE bytes, so its length fits.
                Ok(len) => reply.written(len as u32),
                Err(e) => reply.error(answer("write", ino.0, &e)),
            }
        });
    }

    fn flush(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.defer_empty("flush", ino, reply, move |tree| tree.flush(HandleId(fh.0)));
    }

    fn fsync(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.defer_empty("fsync", ino, reply, move |tree| tree.fsync(HandleId(fh.0)));
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.defer_empty("release", ino, reply, move |tree| {
            tree.release(HandleId(fh.0))
        });
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.here("opendir", ino, || match self.tree.opendir(NodeId(ino.0)) {
            Ok(handle) => reply.opened(FileHandle(handle.0), FopenFlags::empty()),
            Err(e) => reply.error(answer("opendir", ino.0, &e)),
        });
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        self.here("readdir", ino, || {
            let listed = self.tree.readdir(HandleId(fh.0), offset, |e| {
                reply.add(
                    INodeNo(e.node.0),
                    e.cookie,
                    wire::file_type(e.kind),
                    &e.name,
                )
            });
            match listed {
                Ok(()) => reply.ok(),
                Err(e) => reply.error(answer("readdir", ino.0, &e)),
            }
        });
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        self.here("readdirplus", ino, || {
            listing(&self.tree, ino, fh, offset, reply)
        });
    }

    fn releasedir(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.here("releasedir", ino, || {
            empty("releasedir", ino, self.tree.release(HandleId(fh.0)), reply);
        });
    }

    /// Every change of a directory is durable when it is answered.
    fn fsyncdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn statfs(&self, _req: &Request, ino: INodeNo, reply: ReplyStatfs) {
        self.here("statfs", ino, || match self.tree.statfs() {
            Ok(space) => {
                let free = space.available / BLOCK;
                let blocks = space.total / BLOCK;
                let size = BLOCK as u32;
                reply.statfs(blocks, free, free, 0, 0, size, NAME_BYTES_MAX, size);
            }
            Err(e) => reply.error(answer("statfs", ino.0, &e)),
        });
    }

    fn setxattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let name = name.to_string_lossy().into_owned();
        let value = value.to_vec();
        self.defer_empty("setxattr", ino, reply, move |tree| {
            tree.setxattr(NodeId(ino.0), &name, &value)
        });
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.here("removexattr", ino, || {
            empty(
                "removexattr",
                ino,
                self.tree.refuse_xattr(&name.to_string_lossy()),
                reply,
            );
        });
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        self.here("getxattr", ino, || {
            let value = self.tree.getxattr(NodeId(ino.0), &name.to_string_lossy());
            xattr("getxattr", ino, size, value, reply);
        });
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.here("listxattr", ino, || {
            xattr(
                "listxattr",
                ino,
                size,
                self.tree.listxattr(NodeId(ino.0)),
                reply,
            );
        });
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        match wire::space_change(mode) {
            Some(change) => self.defer_empty("fallocate", ino, reply, move |tree| {
                tree.allocate(HandleId(fh.0), offset, length, change)
            }),
            None => reply.error(Errno::EOPNOTSUPP),
        }
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        self.here("lseek", ino, || {
            let Some(what) = wire::seek(whence) else {
                return reply.error(Errno::EINVAL);
            };
            // A negative offset is nowhere, like one past the end.
            let found = u64::try_from(offset)
                .map_err(|_| TreeError::NoSuchOffset)
                .and_then(|offset| self.tree.seek(HandleId(fh.0), offset, what));
            match found {
                Ok(offset) => reply.offset(offset as i64),
                Err(e) => reply.error(answer("lseek", ino.0, &e)),
            }
        });
    }

    /// ENOSYS tells the kernel to do without, from now on and without asking again.
    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let (from, to) = (HandleId(fh_in.0), HandleId(fh_out.0));
        let len = len.min(COPY_MAX);
        self.defer("copy_file_range", ino_out, move |tree| {
            match tree.copy_range(from, offset_in, to, offset_out, len) {
                // At most COPY_MAX, so it fits.
                Ok(copied) => reply.written(copied as u32),
                // EOPNOTSUPP has the kernel copy this one itself; ENOSYS would end all asking.
                Err(e) => reply.error(answer("copy_file_range", ino_out.0, &e)),
            }
        });
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }
}
