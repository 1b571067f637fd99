//! The one error type of the library: a closed kind, what was being done, and the cause.
//!
//! Rules: a caller decides on [`Kind`], never on text. The layer that knows a fact (a path, a
//! volume, a range) adds it; nobody wraps again. `Display` is one line and never repeats its
//! source; the chain is printed once, where the answer is given: errno in `fuse`, the exit code in
//! `cli`.

use std::error::Error as StdError;
use std::fmt;
use std::io;

/// What went wrong, as far as a caller may act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The request itself is wrong: a bad name, size, range or option.
    Invalid,
    /// A volume, snapshot, file or store that does not exist.
    NotFound,
    /// The name is taken.
    Exists,
    /// In use: open, held, or being changed by somebody else.
    Busy,
    /// The store is locked by another process, or no daemon answers.
    Locked,
    /// Not allowed by rights or by the kind of object (a snapshot is read-only).
    Permission,
    /// No space for what must be kept.
    NoSpace,
    /// Damaged data, or a format this program does not know.
    Damaged,
    /// A snapshot or volume that has failed for good, or is suspect until an operator decides.
    Failed,
    /// This object or build cannot do that.
    Unsupported,
    /// A fixed limit is reached; the message names it.
    Limit,
    /// Stopped on request.
    Interrupted,
    /// The system said no.
    Io,
}

/// An error: its kind, one line of context, and where there is one, its cause.
pub struct Error {
    kind: Kind,
    context: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// The result of every fallible operation of this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error that has no deeper cause.
    pub fn new(kind: Kind, context: impl Into<String>) -> Error {
        Error {
            kind,
            context: context.into(),
            source: None,
        }
    }

    /// An error of a chosen kind with its cause.
    pub fn with_source(
        kind: Kind,
        context: impl Into<String>,
        source: impl StdError + Send + Sync + 'static,
    ) -> Error {
        Error {
            kind,
            context: context.into(),
            source: Some(Box::new(source)),
        }
    }

    /// An error of the operating system; its kind follows from its number.
    pub fn io(context: impl Into<String>, source: io::Error) -> Error {
        Error {
            kind: kind_of_io(&source),
            context: context.into(),
            source: Some(Box::new(source)),
        }
    }

    /// What a caller may act on.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The whole chain on one line, for a log or a terminal.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(e) = cause {
            text.push_str(": ");
            text.push_str(&e.to_string());
            cause = e.source();
        }
        text
    }
}

fn kind_of_io(e: &io::Error) -> Kind {
    match e.kind() {
        io::ErrorKind::NotFound => Kind::NotFound,
        io::ErrorKind::AlreadyExists => Kind::Exists,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Kind::Permission,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            Kind::NoSpace
        }
        io::ErrorKind::ResourceBusy => Kind::Busy,
        io::ErrorKind::Unsupported => Kind::Unsupported,
        _ => Kind::Io,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.chain())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source
            .as_deref()
            .map(|e| e as &(dyn StdError + 'static))
    }
}

/// Adds context to a result of the operating system.
pub trait IoContext<T> {
    /// Turns an `io::Error` into an [`Error`] with one line of context.
    ///
    /// # Errors
    /// The error itself, with its context.
    fn context<S: Into<String>>(self, context: impl FnOnce() -> S) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn context<S: Into<String>>(self, context: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| Error::io(context(), e))
    }
}
