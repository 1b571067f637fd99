//! The kernel's words to the tree's and back: open flags, fallocate modes, attributes.
//!
//! The numbers are those of the Linux ABI. Open flags are those of asm-generic, which the
//! architectures named below use; another one does not compile rather than misread a flag.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo, OpenAccMode, RenameFlags, Version};

use crate::tree::{Attr, BLOCK_SIZE, DirEntry, FileKind, OpenFlags, RenameMode, Seek, SpaceChange};

#[cfg(not(any(
    target_arch = "x86_64",
    target_arch = "x86",
    target_arch = "aarch64",
    target_arch = "arm",
    target_arch = "riscv64",
    target_arch = "s390x",
    target_arch = "powerpc64",
    target_arch = "loongarch64"
)))]
compile_error!("check the open flags of this architecture in src/fuse/wire.rs");

const O_TRUNC: i32 = 0o1000;
const O_APPEND: i32 = 0o2000;
/// O_SYNC contains this bit too.
const O_DSYNC: i32 = 0o10000;

const FALLOC_KEEP_SIZE: i32 = 0x01;
const FALLOC_PUNCH_HOLE: i32 = 0x02;
const FALLOC_ZERO_RANGE: i32 = 0x10;

const SEEK_DATA: i32 = 3;
const SEEK_HOLE: i32 = 4;

/// The first protocol (Linux 5.10) whose kernels surely refuse attributes with an impossible size
/// instead of believing them.
pub(super) const LISTS_WITH_ATTRIBUTES: Version = Version(7, 32);

/// How a file is opened.
pub(super) fn open_flags(flags: fuser::OpenFlags) -> OpenFlags {
    OpenFlags {
        write: flags.acc_mode() != OpenAccMode::O_RDONLY,
        truncate: flags.0 & O_TRUNC != 0,
        append: flags.0 & O_APPEND != 0,
    }
}

/// Whether a write must be durable before it is answered. The kernel puts RWF_DSYNC here too.
pub(super) fn is_durable_write(flags: fuser::OpenFlags) -> bool {
    flags.0 & O_DSYNC != 0
}

/// What a fallocate asks for; `None` for what no image can do.
pub(super) fn space_change(mode: i32) -> Option<SpaceChange> {
    const PUNCH: i32 = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE;
    const ZERO_KEEP: i32 = FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE;
    match mode {
        0 => Some(SpaceChange::Reserve),
        PUNCH => Some(SpaceChange::Punch),
        FALLOC_ZERO_RANGE => Some(SpaceChange::Zero { keep_size: false }),
        ZERO_KEEP => Some(SpaceChange::Zero { keep_size: true }),
        _ => None,
    }
}

/// What an lseek looks for; `None` for what the kernel does itself.
pub(super) fn seek(whence: i32) -> Option<Seek> {
    match whence {
        SEEK_DATA => Some(Seek::Data),
        SEEK_HOLE => Some(Seek::Hole),
        _ => None,
    }
}

/// How a rename treats its target.
pub(super) fn rename_mode(flags: RenameFlags) -> RenameMode {
    if flags.difference(RenameFlags::RENAME_NOREPLACE).is_empty() {
        RenameMode::Plain
    } else {
        RenameMode::Special
    }
}

/// Kind of a directory entry.
pub(super) fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Directory => FileType::Directory,
        FileKind::File => FileType::RegularFile,
    }
}

/// Attributes.
pub(super) fn file_attr(attr: &Attr) -> FileAttr {
    let mtime = time(attr.mtime_ns);
    let ctime = time(attr.ctime_ns);
    FileAttr {
        ino: INodeNo(attr.node.0),
        size: attr.size,
        blocks: attr.blocks,
        atime: mtime,
        mtime,
        ctime,
        crtime: ctime,
        kind: file_type(attr.kind),
        perm: attr.mode,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: 0,
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}

/// What a listing says of an entry whose attributes it does not tell: its number and kind, and a size
/// that no file can have. A kernel that knows protocol [`LISTS_WITH_ATTRIBUTES`] lists the entry, takes
/// nothing else of it, and gives back at once the lookup that was counted.
///
/// The protocol has a better word for this (node 0), but fuser has one number for the node and for
/// what `readdir` shows.
pub(super) fn untold_attr(entry: &DirEntry) -> FileAttr {
    FileAttr {
        ino: INodeNo(entry.node.0),
        size: u64::MAX,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: file_type(entry.kind),
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}

fn time(ns: i64) -> SystemTime {
    let distance = Duration::from_nanos(ns.unsigned_abs());
    if ns >= 0 {
        UNIX_EPOCH + distance
    } else {
        UNIX_EPOCH - distance
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_mean_what_the_kernel_sends() {
        let flags = open_flags(fuser::OpenFlags(0o1101));
        assert!(flags.write && flags.truncate && !flags.append);
        assert!(!open_flags(fuser::OpenFlags(0)).write);
        assert!(open_flags(fuser::OpenFlags(2)).write);
        // O_DSYNC, O_SYNC, O_TRUNC | O_WRONLY.
        for (flags, durable) in [(0o10001, true), (0o4010001, true), (0o1001, false)] {
            assert_eq!(is_durable_write(fuser::OpenFlags(flags)), durable);
        }
    }

    #[test]
    fn only_the_fallocates_an_image_can_do_are_known() {
        for mode in -1..0x80 {
            let expected = match mode {
                0 => Some(SpaceChange::Reserve),
                3 => Some(SpaceChange::Punch),
                16 => Some(SpaceChange::Zero { keep_size: false }),
                17 => Some(SpaceChange::Zero { keep_size: true }),
                _ => None,
            };
            assert_eq!(space_change(mode), expected, "{mode}");
        }
    }

    #[test]
    fn times_before_1970_are_kept() {
        assert_eq!(time(0), UNIX_EPOCH);
        assert_eq!(
            time(1_500_000_000) - Duration::from_millis(1500),
            UNIX_EPOCH
        );
        assert_eq!(
            time(-1_500_000_000) + Duration::from_millis(1500),
            UNIX_EPOCH
        );
        // The ends of the range must not panic.
        let _ = (time(i64::MIN), time(i64::MAX));
    }
}
