//! Errors to errno, in one place; and the one place that logs what is answered.
//!
//! What a caller did wrong, or can act on, is logged at debug level; what an operator must hear of
//! at error level, with the whole chain.

use fuser::Errno;

use crate::error::Kind;
use crate::tree::TreeError;

/// EDQUOT of the asm-generic table, which every Linux but the oldest ports uses; fuser has no name
/// for it.
const EDQUOT: i32 = 122;

/// The errno of a kind.
pub(super) fn of_kind(kind: Kind) -> Errno {
    match kind {
        Kind::Invalid => Errno::EINVAL,
        Kind::NotFound => Errno::ENOENT,
        Kind::Exists => Errno::EEXIST,
        // Locked speaks of other processes and their stores; nobody who waits helps either.
        Kind::Busy | Kind::Locked => Errno::EBUSY,
        // Not EACCES: no mode bit would change the answer.
        Kind::Permission => Errno::EPERM,
        Kind::NoSpace => Errno::ENOSPC,
        // The content cannot be vouched for: never a byte instead.
        Kind::Damaged | Kind::Failed | Kind::Io => Errno::EIO,
        Kind::Unsupported => Errno::EOPNOTSUPP,
        // Not ENOSPC: freeing space does not help.
        Kind::Limit => Errno::from_i32(EDQUOT),
        Kind::Interrupted => Errno::EINTR,
    }
}

/// The errno of a refusal of the tree.
pub(super) fn of(error: &TreeError) -> Errno {
    match error {
        TreeError::Engine(e) => of_kind(e.kind()),
        TreeError::ReadOnly => Errno::EROFS,
        TreeError::IsDirectory => Errno::EISDIR,
        TreeError::NotDirectory => Errno::ENOTDIR,
        TreeError::NoAttribute => Errno::NO_XATTR,
        TreeError::BufferTooSmall => Errno::ERANGE,
        // As a device answers.
        TreeError::PastEnd => Errno::ENOSPC,
        TreeError::NoSuchOffset => Errno::ENXIO,
        TreeError::BadHandle => Errno::EBADF,
        TreeError::TooManyOpen => Errno::ENFILE,
        TreeError::OtherVolume => Errno::EXDEV,
    }
}

/// Logs a refusal and returns its errno.
pub(super) fn answer(operation: &'static str, node: u64, error: &TreeError) -> Errno {
    let serious = match error {
        TreeError::Engine(e) => match e.kind() {
            Kind::Damaged | Kind::Failed | Kind::Io | Kind::NoSpace | Kind::Limit => true,
            Kind::Invalid
            | Kind::NotFound
            | Kind::Exists
            | Kind::Busy
            | Kind::Locked
            | Kind::Permission
            | Kind::Unsupported
            | Kind::Interrupted => false,
        },
        TreeError::TooManyOpen => true,
        TreeError::ReadOnly
        | TreeError::IsDirectory
        | TreeError::NotDirectory
        | TreeError::NoAttribute
        | TreeError::BufferTooSmall
        | TreeError::PastEnd
        | TreeError::NoSuchOffset
        | TreeError::OtherVolume
        | TreeError::BadHandle => false,
    };
    if serious {
        tracing::error!(operation, node, "{}", error.chain());
    } else {
        tracing::debug!(operation, node, "{}", error.chain());
    }
    of(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use crate::error::Error;

    /// What was logged.
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// Limits, damage and errors are told as such, at a level that is logged by default.
    #[test]
    fn the_log_says_why_it_was_refused() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::ERROR)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        let told = [
            (Kind::Limit, "at most 4194304 pieces", Errno::EDQUOT),
            (Kind::Damaged, "a checksum is wrong", Errno::EIO),
            (Kind::Io, "the medium refused", Errno::EIO),
            (Kind::Failed, "a fault of the program", Errno::EIO),
        ];
        tracing::subscriber::with_default(subscriber, || {
            for (kind, why, errno) in &told {
                let error = TreeError::Engine(Error::new(*kind, *why));
                assert_eq!(answer("read", 77, &error).code(), errno.code());
            }
        });
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().count(), told.len(), "{text}");
        for (line, (_, why, _)) in text.lines().zip(&told) {
            assert!(line.contains(why) && line.contains("node=77"), "{line}");
        }
    }

    #[test]
    fn a_kind_decides_the_errno_whatever_the_text() {
        let table = [
            (Kind::Invalid, Errno::EINVAL),
            (Kind::NotFound, Errno::ENOENT),
            (Kind::Exists, Errno::EEXIST),
            (Kind::Busy, Errno::EBUSY),
            (Kind::Locked, Errno::EBUSY),
            (Kind::Permission, Errno::EPERM),
            (Kind::NoSpace, Errno::ENOSPC),
            (Kind::Damaged, Errno::EIO),
            (Kind::Failed, Errno::EIO),
            (Kind::Unsupported, Errno::EOPNOTSUPP),
            (Kind::Limit, Errno::from_i32(EDQUOT)),
            (Kind::Interrupted, Errno::EINTR),
            (Kind::Io, Errno::EIO),
        ];
        for (kind, errno) in table {
            let error = TreeError::Engine(Error::new(kind, "No such file or directory"));
            assert_eq!(answer("test", 1, &error), errno, "{kind:?}");
        }
        let dquot = std::io::Error::from_raw_os_error(EDQUOT);
        assert_eq!(dquot.kind(), std::io::ErrorKind::QuotaExceeded);
    }

    #[test]
    fn a_refusal_of_the_tree_has_its_errno() {
        let table = [
            (TreeError::ReadOnly, Errno::EROFS),
            (TreeError::IsDirectory, Errno::EISDIR),
            (TreeError::NotDirectory, Errno::ENOTDIR),
            (TreeError::NoAttribute, Errno::ENODATA),
            (TreeError::BufferTooSmall, Errno::ERANGE),
            (TreeError::PastEnd, Errno::ENOSPC),
            (TreeError::NoSuchOffset, Errno::ENXIO),
            (TreeError::BadHandle, Errno::EBADF),
            (TreeError::TooManyOpen, Errno::ENFILE),
            (TreeError::OtherVolume, Errno::EXDEV),
        ];
        for (error, errno) in table {
            assert_eq!(answer("test", 1, &error), errno, "{error:?}");
        }
    }
}
