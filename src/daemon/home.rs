//! Whether a store is where it was made, or a copy.
//!
//! A file of the store, `home`, says which inode it is, when it was made, on which filesystem and since which
//! boot of the machine. `cp -a`, `rsync`, a restored backup make another file, so a copy tells itself from
//! the original. Two stores that serve one source, one after the other, would each miss what the other has
//! overwritten; the one that knows itself for a copy trusts no source that it cannot compare
//! ([`crate::volume::Settings::copied`]).
//!
//! Promises: [`is_copy`] changes nothing; a store without the file (of an older version) is no copy; a file
//! that says nothing sensible is one. [`settle`] replaces the file as a whole: a full disk, a kill or a power
//! cut leaves the old one or the new one, never a torn one that would make a copy of the original. A copy of
//! the whole filesystem, block by block, is noticed in the same boot only, and on btrfs not at all (but there a
//! snapshot of the subvolume is); in turn, a filesystem that comes back under another device number within
//! one boot looks like a copy.

use std::fs::{self, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::time::UNIX_EPOCH;

use crate::sys::disk::{Dir, Disk, Open};
use crate::sys::file::FileDir;
use crate::sys::place::{Place, place_of};

/// The file's name in the store.
pub const HOME: &str = "home";
/// Its name until it is complete.
const NEW: &str = "home.new";
/// Bytes of it that are read.
const CONTENT_MAX: u64 = 256;
const VERSION: &str = "1";

/// Whether the store in `dir` is a copy, or was moved to another filesystem. What cannot be told is none.
///
/// # Errors
/// The system's error.
pub fn is_copy(dir: &FileDir) -> io::Result<bool> {
    let Some((noted, meta)) = read(dir)? else {
        return Ok(false);
    };
    let here = Where::of(&meta, place_of(dir)?, boot());
    // What is not understood was not written by us, here.
    Ok(Where::parse(&noted).is_none_or(|noted| noted.differs(&here)))
}

/// Notes that the store is at home where it is; durable when it returns.
///
/// # Errors
/// The system's error; what was noted before still is.
pub fn settle(dir: &FileDir) -> io::Result<()> {
    if let Some((noted, meta)) = read(dir)?
        && noted == Where::of(&meta, place_of(dir)?, boot()).text().as_bytes()
    {
        return Ok(());
    }
    match dir.remove(NEW) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
        // What a kill left half done.
        _ => {}
    }
    let done = write_new(dir).and_then(|()| dir.rename(NEW, HOME));
    if done.is_err() {
        // Else it goes with the next attempt.
        let _ = dir.remove(NEW);
    }
    done.and_then(|()| dir.sync())
}

/// The complete file under its first name. Renaming keeps inode and birth.
fn write_new(dir: &FileDir) -> io::Result<()> {
    let file = dir.open_file(NEW, Open::Create)?;
    let text = Where::of(&look(dir, NEW)?, place_of(dir)?, boot()).text();
    file.write_all_at(0, &[text.as_bytes()])?;
    file.sync_data()
}

/// What the file holds, and who it is; `None` if there is none. A link is read as nonsense, and not followed.
fn read(dir: &FileDir) -> io::Result<Option<(Vec<u8>, Metadata)>> {
    let meta = match look(dir, HOME) {
        Ok(meta) => meta,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut bytes = Vec::new();
    if meta.is_file() {
        let file = dir.open_file(HOME, Open::Read)?;
        bytes.resize(file.size()?.min(CONTENT_MAX) as usize, 0);
        file.read_exact_at(0, &mut bytes)?;
    }
    Ok(Some((bytes, meta)))
}

fn look(dir: &FileDir, name: &str) -> io::Result<Metadata> {
    fs::symlink_metadata(dir.fd_path().join(name))
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
    place: Place,
    boot: String,
}

impl Where {
    fn of(meta: &Metadata, place: Place, boot: String) -> Where {
        let born = meta
            .created()
            .ok()
            .and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        Where {
            ino: meta.ino(),
            born: born.map_or(0, |since| since.as_nanos()),
            place,
            boot,
        }
    }

    fn text(&self) -> String {
        let boot = if self.boot.is_empty() {
            "-"
        } else {
            &self.boot
        };
        let place = match self.place {
            Place::Device(number) => format!("dev:{number}"),
            Place::Filesystem(number) => format!("fs:{number}"),
            Place::Unknown => "-".to_owned(),
        };
        format!("{VERSION} {} {} {place} {boot}\n", self.ino, self.born)
    }

    fn parse(bytes: &[u8]) -> Option<Where> {
        let text = std::str::from_utf8(bytes).ok()?;
        let mut words = text.strip_suffix('\n')?.split(' ');
        if words.next()? != VERSION {
            return None;
        }
        let ino = words.next()?.parse().ok()?;
        let born = words.next()?.parse().ok()?;
        let place = match words.next()?.split_once(':') {
            Some(("dev", number)) => Place::Device(number.parse().ok()?),
            Some(("fs", number)) => Place::Filesystem(number.parse().ok()?),
            Some(_) => return None,
            None => Place::Unknown,
        };
        let boot = words.next()?.trim_start_matches('-').to_owned();
        Some(Where {
            ino,
            born,
            place,
            boot,
        })
    }

    fn differs(&self, here: &Where) -> bool {
        let same_boot = !here.boot.is_empty() && self.boot == here.boot;
        let elsewhere = match (self.place, here.place) {
            (Place::Device(was), Place::Device(is)) => same_boot && was != is,
            (Place::Unknown, _) | (_, Place::Unknown) => false,
            (was, is) => was != is,
        };
        self.ino != here.ino || self.born != here.born || elsewhere
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
        // Settled again it is not even written.
        let written = || fs::metadata(a.join(HOME)).unwrap().ctime_nsec();
        let before = written();
        settle(&dir).unwrap();
        assert_eq!(written(), before);
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

    /// What a kill or a full disk left of an earlier attempt neither counts nor is in the way.
    #[test]
    fn what_is_noted_is_replaced_as_a_whole() {
        let top = tempfile::tempdir().unwrap();
        let dir = open(top.path());
        settle(&dir).unwrap();
        let noted = fs::read(top.path().join(HOME)).unwrap();
        fs::write(top.path().join(NEW), "1 2").unwrap();
        assert!(!is_copy(&dir).unwrap());
        // Of an earlier boot.
        let mut other: Vec<&[u8]> = noted.split(|&b| b == b' ').collect();
        *other.last_mut().unwrap() = b"an-earlier-one\n";
        fs::write(top.path().join(HOME), other.join(&b' ')).unwrap();
        assert!(!is_copy(&dir).unwrap(), "a boot makes no copy");
        // It cannot be replaced: it stays as it is.
        fs::remove_file(top.path().join(NEW)).unwrap();
        fs::create_dir(top.path().join(NEW)).unwrap();
        settle(&dir).unwrap_err();
        assert_eq!(fs::read(top.path().join(HOME)).unwrap(), other.join(&b' '));
        fs::remove_dir(top.path().join(NEW)).unwrap();
        settle(&dir).unwrap();
        assert!(!is_copy(&dir).unwrap() && !top.path().join(NEW).exists());
        let now = fs::read(top.path().join(HOME)).unwrap();
        assert!(now.ends_with(noted.rsplit(|&b| b == b' ').next().unwrap()));
    }

    /// A link in its place is nonsense, is not followed, and is replaced.
    #[test]
    fn a_link_is_no_home() {
        let top = tempfile::tempdir().unwrap();
        let dir = open(top.path());
        let victim = top.path().join("victim");
        settle(&dir).unwrap();
        fs::rename(top.path().join(HOME), &victim).unwrap();
        let before = fs::read(&victim).unwrap();
        std::os::unix::fs::symlink(&victim, top.path().join(HOME)).unwrap();
        assert!(is_copy(&dir).unwrap());
        settle(&dir).unwrap();
        assert!(!is_copy(&dir).unwrap());
        assert_eq!(fs::read(&victim).unwrap(), before);
    }

    #[test]
    fn a_device_counts_within_a_boot_only() {
        use Place::{Device, Filesystem, Unknown};
        let at = |place, boot: &str| Where {
            ino: 1,
            born: 2,
            place,
            boot: boot.to_owned(),
        };
        let dev = |number, boot| at(Device(number), boot);
        assert!(dev(3, "x").differs(&dev(4, "x")));
        assert!(!dev(3, "x").differs(&dev(4, "y")) && !dev(3, "").differs(&dev(4, "")));
        // A subvolume's number counts for ever.
        assert!(at(Filesystem(3), "x").differs(&at(Filesystem(4), "y")));
        assert!(!at(Filesystem(3), "x").differs(&at(Filesystem(3), "y")));
        assert!(at(Filesystem(3), "x").differs(&dev(3, "y")));
        assert!(!at(Unknown, "x").differs(&dev(3, "x")) && !dev(3, "x").differs(&at(Unknown, "x")));
        for one in [
            dev(3, "x"),
            dev(3, ""),
            at(Unknown, "x"),
            at(Filesystem(9), "x"),
        ] {
            assert_eq!(Where::parse(one.text().as_bytes()), Some(one));
        }
    }
}
