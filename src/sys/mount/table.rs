//! The kernel's table of mounts, and how a mount of ours names its store.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// What the source of every mount of ours starts with.
const SOURCE_PREFIX: &str = "stillframe:";

/// A mount of this mount namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Number of the mount; unique while it exists.
    pub id: u64,
    /// Device number, major part.
    pub major: u32,
    /// Device number, minor part; for FUSE also the number of the connection.
    pub minor: u32,
    /// Where, absolute.
    pub mountpoint: PathBuf,
    /// Filesystem type, with its subtype (`fuse.stillframe`).
    pub fstype: String,
    /// What is mounted: foreign text.
    pub source: String,
}

impl MountEntry {
    /// The device number as `stat` tells it.
    pub fn dev(&self) -> u64 {
        libc::makedev(self.major, self.minor)
    }
}

/// The mounts of this process' namespace, older ones first.
///
/// # Errors
/// The system's error.
pub fn mounts() -> io::Result<Vec<MountEntry>> {
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(table
        .split(|b| *b == b'\n')
        .filter_map(parse_line)
        .collect())
}

/// The topmost mount at exactly this absolute, resolved path.
///
/// # Errors
/// The system's error.
pub fn mount_at(path: &Path) -> io::Result<Option<MountEntry>> {
    Ok(mounts()?
        .into_iter()
        .rfind(|entry| entry.mountpoint == path))
}

/// The mount that an absolute, resolved path lies in, judged by its text alone.
///
/// # Errors
/// The system's error.
pub fn mount_of(path: &Path) -> io::Result<Option<MountEntry>> {
    let holding = mounts()?
        .into_iter()
        .filter(|entry| path.starts_with(&entry.mountpoint));
    // Of the longest, the last: `max_by_key` answers the last of equals.
    Ok(holding.max_by_key(|entry| entry.mountpoint.as_os_str().len()))
}

/// The source of the mount that shows the store at `store`: `stillframe:` and its path,
/// percent-encoded where a byte could be taken for something else.
pub fn escape_source(store: &Path) -> String {
    let mut out = SOURCE_PREFIX.to_owned();
    for byte in store.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/._-+:@=~".contains(byte) {
            out.push(char::from(*byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// The store a mount's source names; `None` if it is not one of ours.
pub fn unescape_source(source: &str) -> Option<PathBuf> {
    let mut bytes = source.strip_prefix(SOURCE_PREFIX)?.bytes();
    let mut out = Vec::new();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || char::from(bytes.next()?).to_digit(16);
        out.push((digit()? * 16 + digit()?) as u8);
    }
    let path = PathBuf::from(OsString::from_vec(out));
    path.is_absolute().then_some(path)
}

/// One line of mountinfo, see proc_pid_mountinfo(5): id parent major:minor root mountpoint options
/// tags... - type source superoptions. `None` for what is not one.
fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|b| *b == b' ');
    let id = text(fields.next()?).parse().ok()?;
    let device = text(fields.nth(1)?);
    let (major, minor) = device.split_once(':')?;
    let mountpoint = PathBuf::from(OsString::from_vec(unescape_octal(fields.nth(1)?)));
    let mut rest = fields.skip(1).skip_while(|field| *field != b"-").skip(1);
    let fstype = text(&unescape_octal(rest.next()?));
    let source = text(&unescape_octal(rest.next()?));
    let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
    Some(MountEntry {
        id,
        major,
        minor,
        mountpoint,
        fstype,
        source,
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Undoes the kernel's `\040`.
fn unescape_octal(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at..] {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                at += 4;
            }
            _ => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel_are_read() {
        let line = b"36 35 98:0 /mnt1 /mnt\\0402\\134x rw,noatime master:1 propagate_from:2 - \
            fuse.stillframe stillframe:/a%20b rw,user_id=0";
        let entry = parse_line(line).unwrap();
        assert_eq!((entry.id, entry.major, entry.minor), (36, 98, 0));
        assert_eq!(entry.mountpoint, Path::new("/mnt 2\\x"));
        assert_eq!(entry.fstype, "fuse.stillframe");
        assert_eq!(unescape_source(&entry.source).unwrap(), Path::new("/a b"));
        let untagged = parse_line(b"1 0 0:5 / / rw - proc proc rw").unwrap();
        assert_eq!(
            (untagged.fstype.as_str(), untagged.source.as_str()),
            ("proc", "proc")
        );
        assert_eq!(untagged.dev(), 5);
        // An empty source is an empty field.
        assert_eq!(
            parse_line(b"1 0 0:5 / /x rw - tmpfs  rw").unwrap().source,
            ""
        );
        for odd in [
            &b""[..],
            b"x",
            b"1 0 0:5 / / rw",
            b"1 0 05 / / rw - a b c",
            b"1 0 0:5 / /",
        ] {
            assert_eq!(parse_line(odd), None);
        }
        assert_eq!(unescape_octal(b"\\777 \\04 \\12"), b"\\777 \\04 \\12");
    }

    #[test]
    fn the_own_table_has_a_root() {
        assert_eq!(
            mount_at(Path::new("/")).unwrap().unwrap().mountpoint,
            Path::new("/")
        );
        assert_eq!(mount_at(Path::new("/proc/self")).unwrap(), None);
        let proc = mount_of(Path::new("/proc/self/x")).unwrap().unwrap();
        assert_eq!(
            (proc.mountpoint.as_path(), proc.fstype.as_str()),
            (Path::new("/proc"), "proc")
        );
    }

    #[test]
    fn sources_survive_any_path() {
        for path in [
            "/",
            "/var/lib/stillframe",
            "/a,b\\c d%e\n\u{e4}/\u{1b}[31m",
            "/%41",
        ] {
            let source = escape_source(Path::new(path));
            assert!(
                source
                    .bytes()
                    .all(|b| b.is_ascii_graphic() && !b",\\".contains(&b))
            );
            assert_eq!(unescape_source(&source).unwrap(), Path::new(path));
        }
        assert_eq!(escape_source(Path::new("/a b,c")), "stillframe:/a%20b%2Cc");
        for odd in [
            "",
            "/dev/sda",
            "stillframe:",
            "stillframe:x",
            "stillframe:/%",
            "stillframe:/%4",
        ] {
            assert_eq!(unescape_source(odd), None, "{odd}");
        }
    }
}
