//! Opening sources: the files and devices that hold the volumes' current content.
//!
//! Promises: what [`FileSources::open`] answers is a regular file or block device, open for reading
//! and writing, locked against programs that look at locks (firmly, for a device), and not inside
//! a Stillframe mount, where serving it would wait for itself. Every refusal is one line that names
//! the path. Symbolic links are followed.
//!
//! It is not asked whether a device lies on a Stillframe mount by way of device mapper; a loop
//! device is.

use std::fs::{self, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::disk::Disk;
use crate::sys::file::FileDisk;
use crate::sys::lock::lock_source;
use crate::sys::mount::{mount_of, mounts, unescape_source};
use crate::sys::process::effective_uid;
use crate::units::escape;

/// Opens sources of this machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct FileSources;

impl FileSources {
    /// Opens and locks a source for reading and writing. The lock ends with the disk.
    ///
    /// # Errors
    /// `NotFound`; `Permission`; `Busy` if it is locked or claimed by another program; `Invalid`
    /// for a directory, for what is neither file nor device, and inside a Stillframe mount; else
    /// by the system's error.
    pub fn open(&self, path: &str) -> Result<Arc<dyn Disk>> {
        let shown = escape(path);
        let (full, meta) = look(path, &shown)?;
        let disk = open(&full, &meta).map_err(|e| open_error(&shown, e))?;
        // The file may have been replaced since it was looked at.
        let device = meta.file_type().is_block_device();
        let (dev, ino) = if device {
            (meta.rdev(), 0)
        } else {
            (meta.dev(), meta.ino())
        };
        let now = disk
            .identity()
            .context(|| format!("cannot look at source {shown}"))?;
        if (now.dev, now.ino) != (dev, ino) {
            let text = format!("source {shown} was replaced while it was opened");
            return Err(Error::new(Kind::Busy, text));
        }
        if device && now.size == 0 {
            // A drive without a medium, a loop device without a file: not a source that has shrunk.
            let text = format!("source {shown} is a device without a medium");
            return Err(Error::new(Kind::NotFound, text));
        }
        lock_source(&disk, &shown)?;
        Ok(Arc::new(disk))
    }

    /// What the path of an open source names by now, in words, if that is not the source.
    ///
    /// # Errors
    /// The system's error.
    pub fn astray(&self, path: &str, disk: &dyn Disk) -> Result<Option<String>> {
        let context = || format!("cannot look at source {}", escape(path));
        let known = disk.identity().context(context)?;
        let named = match fs::symlink_metadata(path) {
            Ok(meta) => meta,
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Ok(Some("nothing".to_owned()));
            }
            Err(e) => return Err(e).context(context),
        };
        let found = if named.file_type().is_block_device() {
            (named.rdev(), 0)
        } else {
            (named.dev(), named.ino())
        };
        Ok((found != (known.dev, known.ino)).then(|| "another file".to_owned()))
    }

    /// The path under which a source is kept: absolute, without symbolic links, so that it means
    /// the same from any directory. Checks what can be checked without opening it.
    ///
    /// # Errors
    /// As [`FileSources::open`]; also `Invalid` for a path that is not UTF-8.
    pub fn canonical(&self, path: &str) -> Result<String> {
        let shown = escape(path);
        let (full, _) = look(path, &shown)?;
        full.into_os_string().into_string().map_err(|_| {
            Error::new(
                Kind::Invalid,
                format!("source {shown} has a path that is not UTF-8"),
            )
        })
    }
}

/// Everything that needs no open file: the canonical path and what it names.
fn look(path: &str, shown: &str) -> Result<(PathBuf, Metadata)> {
    // By text first: asking a mount of ours, from the process that serves it, might wait for ever.
    let absolute = std::path::absolute(path).map_err(|e| open_error(shown, e))?;
    refuse_inside(&absolute, shown)?;
    let full = absolute.canonicalize().map_err(|e| open_error(shown, e))?;
    refuse_inside(&full, shown)?;
    let meta = fs::metadata(&full).map_err(|e| open_error(shown, e))?;
    let kind = meta.file_type();
    let refuse = |why: &str| Err(Error::new(Kind::Invalid, format!("source {shown} {why}")));
    if kind.is_dir() {
        return refuse("is a directory");
    }
    if !kind.is_file() && !kind.is_block_device() {
        return refuse("is neither a regular file nor a block device");
    }
    refuse_device_of_ours(&meta, shown)?;
    Ok((full, meta))
}

/// Refuses a path that lies in a Stillframe mount by its text.
fn refuse_inside(path: &Path, shown: &str) -> Result<()> {
    let entry = mount_of(path).context(|| "cannot read the table of mounts")?;
    match entry
        .as_ref()
        .and_then(|entry| unescape_source(&entry.source))
    {
        Some(store) => Err(inside(&store, shown)),
        None => Ok(()),
    }
}

/// Refuses a file on a Stillframe mount however it was reached, and a loop device over one.
fn refuse_device_of_ours(meta: &Metadata, shown: &str) -> Result<()> {
    if meta.file_type().is_block_device() {
        let (major, minor) = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
        let backing = format!("/sys/dev/block/{major}:{minor}/loop/backing_file");
        return match fs::read_to_string(backing) {
            Ok(file) => refuse_inside(Path::new(file.trim_end_matches('\n')), shown),
            Err(_) => Ok(()), // not a loop device
        };
    }
    let table = mounts().context(|| "cannot read the table of mounts")?;
    let on_ours = table.iter().filter(|entry| entry.dev() == meta.dev());
    match on_ours
        .filter_map(|entry| unescape_source(&entry.source))
        .next()
    {
        Some(store) => Err(inside(&store, shown)),
        None => Ok(()),
    }
}

fn inside(store: &Path, shown: &str) -> Error {
    let store = escape(&store.to_string_lossy());
    let text = format!("source {shown} lies inside a Stillframe mount (of store {store})");
    Error::new(Kind::Invalid, text)
}

fn open(full: &Path, meta: &Metadata) -> io::Result<FileDisk> {
    // On a device O_EXCL means: nobody has mounted or claimed it, and nobody will.
    let claim = if meta.file_type().is_block_device() {
        libc::O_EXCL
    } else {
        0
    };
    let flags = claim | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(full)?;
    FileDisk::from_file(file)
}

fn open_error(shown: &str, e: io::Error) -> Error {
    let user = effective_uid();
    let say = |kind, text: String| Error::new(kind, format!("source {shown} {text}"));
    match e.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => {
            say(Kind::NotFound, "does not exist".into())
        }
        ErrorKind::PermissionDenied => say(
            Kind::Permission,
            format!("may not be read and written by user {user}"),
        ),
        ErrorKind::ReadOnlyFilesystem => {
            say(Kind::Permission, "lies on a read-only filesystem".into())
        }
        ErrorKind::ResourceBusy => say(
            Kind::Busy,
            "is in use (mounted, swap, or part of another device)".into(),
        ),
        ErrorKind::ExecutableFileBusy => say(Kind::Busy, "is a running program".into()),
        ErrorKind::InvalidInput => say(Kind::Invalid, "has a path that names no file".into()),
        _ if e.raw_os_error() == Some(libc::ELOOP) => {
            say(Kind::Invalid, "has too many symbolic links".into())
        }
        _ => Error::io(format!("cannot open source {shown}"), e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::eventually;
    use crate::sys::mount::{Unmount, escape_source, mount_fuse, unmount};
    use std::os::unix::fs::symlink;
    use std::process::Command;

    fn refused(path: &Path) -> (Kind, String) {
        let e = FileSources.open(path.to_str().unwrap()).err().unwrap();
        (e.kind(), e.to_string())
    }

    #[test]
    fn a_file_is_opened_once_through_any_path() {
        let temp = tempfile::tempdir().unwrap();
        let (file, link) = (temp.path().join("a.img"), temp.path().join("link"));
        fs::write(&file, "content").unwrap();
        symlink("a.img", &link).unwrap();
        let disk = FileSources.open(link.to_str().unwrap()).unwrap();
        let mut bytes = [0; 7];
        disk.read_exact_at(0, &mut bytes).unwrap();
        disk.write_all_at(0, &[b"C"]).unwrap();
        assert_eq!(&bytes, b"content");
        let (kind, text) = refused(&file);
        assert_eq!(kind, Kind::Busy, "{text}");
        assert_eq!(
            text,
            format!("source {} is locked by another program", file.display())
        );
        drop(disk);
        assert!(eventually(|| FileSources
            .open(file.to_str().unwrap())
            .is_ok()));
        let full = FileSources.canonical(link.to_str().unwrap()).unwrap();
        assert_eq!(
            Path::new(&full),
            temp.path().canonicalize().unwrap().join("a.img")
        );
    }

    #[test]
    fn what_is_no_source_is_refused_with_its_reason() {
        let temp = tempfile::tempdir().unwrap();
        let at = |name: &str| temp.path().join(name);
        fs::write(at("file"), "").unwrap();
        symlink("loop", at("loop")).unwrap();
        let socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        for (path, kind, words) in [
            (at("none"), Kind::NotFound, "does not exist"),
            (at("file/x"), Kind::NotFound, "does not exist"),
            (temp.path().to_owned(), Kind::Invalid, "is a directory"),
            (
                at("socket"),
                Kind::Invalid,
                "is neither a regular file nor a block device",
            ),
            (
                "/dev/null".into(),
                Kind::Invalid,
                "is neither a regular file nor a block device",
            ),
            (at("loop"), Kind::Invalid, "has too many symbolic links"),
            ("".into(), Kind::Invalid, "has a path that names no file"),
        ] {
            let (found, text) = refused(&path);
            assert_eq!(
                (found, text.ends_with(words)),
                (kind, true),
                "{path:?}: {text}"
            );
        }
        let odd = FileSources
            .open("/n\u{1b}[31m\n")
            .err()
            .unwrap()
            .to_string();
        assert!(odd.bytes().all(|b| (0x20..0x7f).contains(&b)), "{odd:?}");
        drop(socket);
    }

    #[test]
    fn rights_are_named() {
        let text = |errno| open_error("/x", io::Error::from_raw_os_error(errno));
        let denied = text(libc::EACCES);
        let expected = format!(
            "source /x may not be read and written by user {}",
            effective_uid()
        );
        assert_eq!(
            (denied.kind(), denied.to_string()),
            (Kind::Permission, expected)
        );
        assert_eq!(text(libc::EROFS).kind(), Kind::Permission);
        assert_eq!(text(libc::EBUSY).kind(), Kind::Busy);
        assert_eq!(text(libc::ETXTBSY).kind(), Kind::Busy);
        assert_eq!(text(libc::EIO).kind(), Kind::Io);
    }

    /// Where everything is to be tested this is a failure.
    fn skipped(test: &str, why: &str) {
        assert!(std::env::var_os("STILLFRAME_CI").is_none(), "{test}: {why}");
        eprintln!("SKIPPED {test}: {why}");
    }

    #[test]
    fn a_source_inside_a_mount_of_ours_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let mountpoint = temp.path().canonicalize().unwrap().join("m");
        fs::create_dir(&mountpoint).unwrap();
        symlink(mountpoint.join("v/live.img"), temp.path().join("link")).unwrap();
        let source = escape_source(Path::new("/the store"));
        let connection = match mount_fuse(&mountpoint, &source, false) {
            Ok(connection) => connection,
            Err(e) => {
                return skipped(
                    "a_source_inside_a_mount_of_ours_is_refused",
                    &e.chain().to_string(),
                );
            }
        };
        // Nobody serves this mount: whoever asked it would wait for ever.
        let by_text = refused(&mountpoint.join("v/live.img"));
        drop(connection);
        let by_link = refused(&temp.path().join("link"));
        assert!(eventually(|| unmount(&mountpoint, Unmount::Normal).is_ok()));
        assert_eq!(by_text.0, Kind::Invalid);
        let words = "lies inside a Stillframe mount (of store /the store)";
        assert!(by_text.1.ends_with(words), "{}", by_text.1);
        assert_ne!(
            by_link.0,
            Kind::NotFound,
            "a dead mount is not a missing file: {}",
            by_link.1
        );
    }

    #[test]
    fn a_device_is_claimed_once() {
        let temp = tempfile::tempdir().unwrap();
        let image = temp.path().join("i");
        fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
        let losetup = Command::new("losetup")
            .args(["-f", "--show"])
            .arg(&image)
            .output();
        let Some(output) = losetup.ok().filter(|output| output.status.success()) else {
            return skipped("a_device_is_claimed_once", "cannot make a loop device");
        };
        let device = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        let outcome = std::panic::catch_unwind(|| {
            let disk = FileSources.open(&device).unwrap();
            let (kind, text) = refused(Path::new(&device));
            assert_eq!(kind, Kind::Busy, "{text}");
            assert_eq!(
                (disk.size().unwrap(), disk.allocated().unwrap()),
                (1 << 20, 1 << 20)
            );
            let id = disk.identity().unwrap();
            assert_eq!((id.ino, id.size, id.ctime_ns), (0, 1 << 20, 0));
            assert_eq!(id.dev, fs::metadata(&device).unwrap().rdev());
            disk.write_all_at(0, &[&vec![7; 1 << 20]]).unwrap();
            disk.punch(5000, 20_000).unwrap();
            disk.sync_data().unwrap();
            let mut bytes = vec![1; 1 << 20];
            disk.read_exact_at(0, &mut bytes).unwrap();
            assert!(bytes[5000..25_000].iter().all(|b| *b == 0));
            assert!(
                bytes[..5000]
                    .iter()
                    .chain(&bytes[25_000..])
                    .all(|b| *b == 7)
            );
            assert_eq!(disk.next_data(9).unwrap(), Some(9));
            assert_eq!(disk.next_data(1 << 20).unwrap(), None);
            assert_eq!(disk.next_hole(9).unwrap(), 1 << 20);
            assert_eq!(disk.set_size(5).unwrap_err().kind(), ErrorKind::Unsupported);
        });
        Command::new("losetup")
            .arg("-d")
            .arg(&device)
            .status()
            .unwrap();
        outcome.unwrap();
    }
}
