//! The small words of the tree: node and handle numbers, attributes, requests, answers, errors.
//!
//! Nothing here knows FUSE. Times are nanoseconds since 1970, sizes and offsets are bytes, modes are
//! permission bits only.

use std::fmt;

use crate::error::{Error, Kind};
use crate::sys::disk::Space;

/// A node's inode number: stable across restarts, never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u64);

/// An open file or directory; unique while the tree lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HandleId(pub u64);

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
}

/// What `stat` shows of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub node: NodeId,
    /// Kind.
    pub kind: FileKind,
    /// Permission bits.
    pub mode: u16,
    /// Links: 2 and one for each subdirectory; 1 for a file; 0 for a deleted file still open.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Storage in use in units of 512 bytes, never more than the size needs.
    pub blocks: u64,
    /// Last change of the content; also shown as the last access.
    pub mtime_ns: i64,
    /// Last change of the node.
    pub ctime_ns: i64,
    /// Nothing of this but the links can change while the node exists.
    pub fixed: bool,
}

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OpenFlags {
    /// For writing (O_WRONLY or O_RDWR).
    pub write: bool,
    /// O_TRUNC.
    pub truncate: bool,
    /// O_APPEND.
    pub append: bool,
}

/// How the content of an open file may be cached by whoever asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caching {
    /// Not at all: it changes, or what was written must be in the next snapshot.
    None,
    /// For ever: it cannot change.
    Immutable,
}

/// An opened file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    /// The handle for all that follows, until it is released.
    pub handle: HandleId,
    /// How it may be cached.
    pub caching: Caching,
}

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The node; for `..` the parent as far as it is known, else the root.
    pub node: NodeId,
    /// Kind.
    pub kind: FileKind,
    /// Name.
    pub name: String,
    /// Where the listing goes on after this entry; only grows along a listing, and stays valid
    /// when other entries come and go.
    pub cookie: u64,
}

/// A change of attributes; `None` leaves one as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SetAttr {
    /// Permission bits and file type as chmod sends them; the type is ignored.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size.
    pub size: Option<u64>,
    /// Whether a time is to be set. Which time does not matter: none is ever kept.
    pub times: bool,
    /// Number of the process that asks; 0 if it is not known.
    pub caller: u32,
}

/// A change of space that is not a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpaceChange {
    /// Reserve (fallocate mode 0): nothing to do inside the image.
    Reserve,
    /// Give the space back; the range reads as zero. Never extends.
    Punch,
    /// Make the range zero; `keep_size` cuts it at the end instead of refusing.
    Zero {
        /// FALLOC_FL_KEEP_SIZE.
        keep_size: bool,
    },
}

/// What `lseek` looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seek {
    /// SEEK_DATA.
    Data,
    /// SEEK_HOLE.
    Hole,
}

/// How `rename` treats an existing target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RenameMode {
    /// Plain or RENAME_NOREPLACE: never replaces anything here.
    Plain,
    /// RENAME_EXCHANGE or RENAME_WHITEOUT.
    Special,
}

/// The files of the control directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusFile {
    /// `status.json`.
    Json,
    /// `metrics.prom`.
    Metrics,
}

/// What the tree must be told by whoever runs it.
pub trait StatusSource: Send + Sync {
    /// The bytes of a status file, as of now.
    ///
    /// # Errors
    /// Whatever keeps it from being rendered.
    fn render(&self, file: StatusFile) -> crate::error::Result<Vec<u8>>;

    /// Space of the filesystem that holds the store.
    ///
    /// # Errors
    /// `Io`.
    fn space(&self) -> crate::error::Result<Space>;

    /// Wall-clock time.
    fn now_ns(&self) -> i64;
}

/// Why the tree refuses: an [`Error`], or one of the answers that only a file system gives.
#[derive(Debug)]
pub enum TreeError {
    /// An error of the layers below, or one that its kind says exactly.
    Engine(Error),
    /// Writing to what cannot be written.
    ReadOnly,
    /// A file operation on a directory.
    IsDirectory,
    /// A directory operation on a file.
    NotDirectory,
    /// No such extended attribute.
    NoAttribute,
    /// The caller's buffer is too small.
    BufferTooSmall,
    /// A write at or past the end of an image, or a range that would extend it.
    PastEnd,
    /// Nothing to seek to.
    NoSuchOffset,
    /// Not a handle of this tree, or not opened for that.
    BadHandle,
    /// [`crate::tree::HANDLES_MAX`] files are open.
    TooManyOpen,
    /// The two files are of different volumes.
    OtherVolume,
}

/// The result of every operation of the tree.
pub type Result<T> = std::result::Result<T, TreeError>;

impl From<Error> for TreeError {
    fn from(e: Error) -> Self {
        TreeError::Engine(e)
    }
}

impl TreeError {
    /// A refusal that a kind says exactly.
    pub(crate) fn new(kind: Kind, context: impl Into<String>) -> TreeError {
        TreeError::Engine(Error::new(kind, context))
    }

    /// The whole chain on one line, for a log.
    pub fn chain(&self) -> String {
        match self {
            TreeError::Engine(e) => e.chain(),
            other => other.to_string(),
        }
    }
}

impl fmt::Display for TreeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            TreeError::Engine(e) => return e.fmt(f),
            TreeError::ReadOnly => "this file cannot be written",
            TreeError::IsDirectory => "this is a directory",
            TreeError::NotDirectory => "this is not a directory",
            TreeError::NoAttribute => "no such extended attribute",
            TreeError::BufferTooSmall => "the buffer is too small",
            TreeError::PastEnd => "an image has a fixed size",
            TreeError::NoSuchOffset => "no data or hole at or after the offset",
            TreeError::BadHandle => "the handle is unknown or not open for that",
            TreeError::TooManyOpen => "too many open files",
            TreeError::OtherVolume => "the two files are of different volumes",
        };
        f.write_str(text)
    }
}

impl std::error::Error for TreeError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            TreeError::Engine(e) => std::error::Error::source(e),
            _ => None,
        }
    }
}
