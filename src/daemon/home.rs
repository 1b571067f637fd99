//! Whether a store is where it was made, or a copy.
//!
//! A file of the store, `home`, says which inode it is, when it was made, on which device and since which
//! boot of the machine. `cp -a`, `rsync`, a restored backup make another file, so a copy tells itself from
//! the original. Two stores that serve one source, one after the other, would each miss what the other has
//! overwritten; the one that knows itself for a copy trusts no source that it cannot compare
//! ([`crate::volume::Settings::copied`]).
//!
//! Promises: [`is_copy`] changes nothing; a store without the file (of an older version) is no copy; a file
//! that cannot be read is one. A copy of the whole filesystem, block by block or as its own snapshot, is not
//! noticed unless it is used in the same boot.

use std::fs::{self, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::time::UNIX_EPOCH;

use crate::sys::disk::{Dir, Disk, Open};
use crate::sys::file::FileDir;

/// The file's name in the store.
pub const HOME: &str = "home";
/// Bytes of it that are read.
const CONTENT_MAX: u64 = 256;
const VERSION: &str = "1";

/// Whether the store in `dir` is a copy, or was moved to another filesystem. What cannot be told is none.
///
/// # Errors
/// The system's error.
pub fn is_copy(dir: &FileDir) -> io::Result<bool> {
    let Some(meta) = look(dir)? else {
        return Ok(false);
    };
    let file = dir.open_file(HOME, Open::Read)?;
    let mut bytes = vec![0; file.size()?.min(CONTENT_MAX) as usize];
    file.read_exact_at(0, &mut bytes)?;
    let here = Where::of(&meta, boot());
    // What is not understood was not written by us, here.
    Ok(Where::parse(&bytes).is_none_or(|noted| noted.differs(&here)))
}

/// Notes that the store is at home where it is; durable when it returns.
///
/// # Errors
/// The system's error.
pub fn settle(dir: &FileDir) -> io::Result<()> {
    let file = match dir.open_file(HOME, Open::Write) {
        Err(e) if e.kind() == ErrorKind::NotFound => dir.open_file(HOME, Open::Create)?,
        other => other?,
    };
    let meta = look(dir)?.ok_or(ErrorKind::NotFound)?;
    let text = Where::of(&meta, boot()).text();
    file.set_size(0)?;
    file.write_all_at(0, &[text.as_bytes()])?;
    file.sync_data()?;
    dir.sync()
}

fn look(dir: &FileDir) -> io::Result<Option<Metadata>> {
    match fs::symlink_metadata(dir.fd_path().join(HOME)) {
        Ok(meta) => Ok(Some(meta)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// This boot of the machine; empty where the kernel does not say.
fn boot() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

/// Who a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Where {
    ino: u64,
    /// Nanoseconds since 1970; 0 where the filesystem does not keep it.
    born: u128,
    dev: u64,
    boot: String,
}

impl Where {
    fn of(meta: &Metadata, boot: String) -> Where {
        let born = meta
            .created()
            .ok()
            .and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        Where {
            ino: meta.ino(),
            born: born.map_or(0, |since| since.as_nanos()),
            dev: meta.dev(),
            boot,
        }
    }

    fn text(&self) -> String {
        let boot = if self.boot.is_empty() {
            "-"
        } else {
            &self.boot
        };
        format!("{VERSION} {} {} {} {boot}\n", self.ino, self.born, self.dev)
    }

    fn parse(bytes: &[u8]) -> Option<Where> {
        let text = std::str::from_utf8(bytes).ok()?;
        let mut words = text.strip_suffix('\n')?.split(' ');
        if words.next()? != VERSION {
            return None;
        }
        let ino = words.next()?.parse().ok()?;
        let born = words.next()?.parse().ok()?;
        let dev = words.next()?.parse().ok()?;
        let boot = words.next()?.trim_start_matches('-').to_owned();
        Some(Where {
            ino,
            born,
            dev,
            boot,
        })
    }

    /// Device numbers mean something within one boot only.
    fn differs(&self, here: &Where) -> bool {
        let same_boot = !here.boot.is_empty() && self.boot == here.boot;
        self.ino != here.ino || self.born != here.born || same_boot && self.dev != here.dev
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::process::Command;

    fn open(path: &Path) -> FileDir {
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap();
        FileDir::open(path).unwrap()
    }

    #[test]
    fn a_copy_knows_itself() {
        let top = tempfile::tempdir().unwrap();
        let (a, b) = (top.path().join("a"), top.path().join("b"));
        fs::create_dir(&a).unwrap();
        let dir = open(&a);
        assert!(!is_copy(&dir).unwrap(), "nothing says so");
        settle(&dir).unwrap();
        assert!(!is_copy(&dir).unwrap());
        let copied = Command::new("cp").arg("-a").args([&a, &b]).status();
        assert!(copied.unwrap().success());
        let copy = open(&b);
        assert!(is_copy(&copy).unwrap() && !is_copy(&dir).unwrap());
        settle(&copy).unwrap();
        assert!(!is_copy(&copy).unwrap() && !is_copy(&dir).unwrap());
        // Renaming makes no copy.
        drop((dir, copy));
        fs::rename(&b, top.path().join("c")).unwrap();
        assert!(!is_copy(&open(&top.path().join("c"))).unwrap());
    }

    #[test]
    fn nonsense_is_no_home() {
        let top = tempfile::tempdir().unwrap();
        let dir = open(top.path());
        for odd in ["", "1", "2 3 4 5 x\n", "1 a 0 0 -\n", "\u{1b}", "1 1 1 1 x"] {
            fs::write(top.path().join(HOME), odd).unwrap();
            assert!(is_copy(&dir).unwrap(), "{odd:?}");
        }
    }

    #[test]
    fn a_device_counts_within_a_boot_only() {
        let at = |dev, boot: &str| Where {
            ino: 1,
            born: 2,
            dev,
            boot: boot.to_owned(),
        };
        assert!(at(3, "x").differs(&at(4, "x")));
        assert!(!at(3, "x").differs(&at(4, "y")) && !at(3, "").differs(&at(4, "")));
        for one in [at(3, "x"), at(3, "")] {
            assert_eq!(Where::parse(one.text().as_bytes()), Some(one));
        }
    }
}
