//! Which mountpoint, store and sources may be used together, and what is at a mountpoint.
//!
//! Promises: the mount table is asked, not the mount: a dead or hung mount cannot hang these
//! functions ([`probe`] asks the mount itself, from a thread it gives up on). A stale mount of ours
//! is cleaned and said so; a mount of anybody else is never touched. A mountpoint that would hide
//! the store or a source is refused.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::daemon::client;
use crate::daemon::status::{Place, shown};
use crate::daemon::store::{self, Found};
use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::mount::{self, MountEntry, Mountpoint, Unmount};
use crate::sys::source::FileSources;
use crate::units::escape;

/// How long a mount may take to tell whether it lives: a served one answers in microseconds.
const PROBE: Duration = Duration::from_secs(3);

/// What is mounted at a path.
#[derive(Debug)]
pub enum Standing {
    /// Nothing.
    Nothing,
    /// A Stillframe mount of this store.
    Ours {
        /// The store it serves or served.
        store: PathBuf,
        /// Device number (major, minor) of the mount.
        device: (u32, u32),
    },
    /// Something else, in words: foreign text.
    Foreign(String),
}

/// Whether a mount answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// It answers.
    Alive,
    /// Its daemon is gone (`ENOTCONN`).
    Dead,
    /// It has not answered for a while.
    Silent,
}

/// The path of a mountpoint without `..` and symbolic links; does not look into what is mounted.
///
/// # Errors
/// `NotFound`, `Permission`, `Io`.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    let name = shown(path);
    let explain = |e: io::Error| match e.kind() {
        ErrorKind::NotFound => Error::new(
            Kind::NotFound,
            format!("mountpoint {name} does not exist; make the directory first"),
        ),
        _ => Error::io(format!("cannot find mountpoint {name}"), e),
    };
    let absolute = std::path::absolute(path).map_err(explain)?;
    if let (Some(parent), Some(last)) = (absolute.parent(), absolute.file_name()) {
        let direct = parent.canonicalize().map_err(explain)?.join(last);
        if at(&direct)?.is_some() {
            return Ok(direct);
        }
    }
    absolute.canonicalize().map_err(explain)
}

fn at(resolved: &Path) -> Result<Option<MountEntry>> {
    mount::mount_at(resolved).context(|| "cannot read the table of mounts")
}

/// What is mounted at a resolved path.
///
/// # Errors
/// `Io` if the mount table cannot be read.
pub fn standing(resolved: &Path) -> Result<Standing> {
    Ok(match at(resolved)? {
        None => Standing::Nothing,
        Some(entry) => match ours(&entry) {
            Some(store) => Standing::Ours {
                store,
                device: (entry.major, entry.minor),
            },
            None => Standing::Foreign(format!("{} ({})", entry.source, entry.fstype)),
        },
    })
}

/// The store behind a mount, if the mount is one of ours.
pub fn ours(entry: &MountEntry) -> Option<PathBuf> {
    let fuse = entry.fstype == "fuse" || entry.fstype.starts_with("fuse.");
    if fuse {
        mount::unescape_source(&entry.source)
    } else {
        None
    }
}

/// Asks a mount whether it lives.
pub fn probe(mountpoint: &Path) -> Probe {
    let (tell, told) = mpsc::channel();
    let path = mountpoint.to_owned();
    let asked = thread::Builder::new().name("probe".into()).spawn(move || {
        // Nobody may be waiting any more.
        let _ = tell.send(fs::metadata(path).err().map(|e| e.kind()));
    });
    match asked.ok().map(|_| told.recv_timeout(PROBE)) {
        Some(Ok(Some(ErrorKind::NotConnected))) => Probe::Dead,
        Some(Ok(_)) => Probe::Alive,
        _ => Probe::Silent,
    }
}

/// Takes a dead mount of ours away; the caller has made sure that it is one.
///
/// # Errors
/// `Permission`, `Io`.
pub fn clean(mountpoint: &Path) -> Result<()> {
    mount::unmount(mountpoint, Unmount::Lazy)
}

/// Makes sure that a directory can be mounted on, and returns its resolved path.
///
/// # Errors
/// `NotFound`; `Invalid` if it is no directory, or one with something in it; `Busy` if something is
/// mounted there.
pub fn prepare(path: &Path, note: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    let resolved = resolve(path)?;
    let at = shown(&resolved);
    // Several dead mounts may lie one over the other; each round takes one away.
    loop {
        match mount::check_mountpoint(&resolved)? {
            Mountpoint::Ready => return Ok(resolved),
            Mountpoint::ForeignMount { fstype, source } => {
                let what = escape(&format!("{source} ({fstype})"));
                return Err(Error::new(
                    Kind::Busy,
                    format!("mountpoint {at} is in use: {what}; unmount that or choose another"),
                ));
            }
            Mountpoint::Stale { source } => {
                clean(&resolved)?;
                let of = mount::unescape_source(&source).unwrap_or_default();
                note(&format!(
                    "cleaned the stale mount of store {} at {at}",
                    shown(&of)
                ));
            }
            Mountpoint::OursLive { source } => {
                let store = mount::unescape_source(&source).unwrap_or_default();
                let pid = serving(&store).map_or(String::new(), |pid| format!(" (pid {pid})"));
                return Err(Error::new(
                    Kind::Busy,
                    format!(
                        "mountpoint {at} already serves store {}{pid}; 'stillframe umount' ends it",
                        shown(&store)
                    ),
                ));
            }
        }
    }
}

/// The process that serves a store, for messages.
fn serving(store: &Path) -> Option<u32> {
    use crate::daemon::protocol::{Answer, Request};
    let mut daemon = client::connect(store).ok()??;
    daemon.limit(PROBE);
    match daemon.call(&Request::Status {}, &mut |_| ()).ok()? {
        Answer::Status(report) => report.pid,
        _ => None,
    }
}

/// Refuses a mountpoint inside the store, or a store inside the mountpoint.
///
/// # Errors
/// `Invalid`, naming both.
pub fn keep_apart(store: &Path, mountpoint: &Path) -> Result<()> {
    let real = existing_part(store);
    let (of, at) = (shown(&real), shown(mountpoint));
    if mountpoint.starts_with(&real) {
        return Err(Error::new(
            Kind::Invalid,
            format!("mountpoint {at} is inside the store {of}; choose another"),
        ));
    }
    if real.starts_with(mountpoint) {
        return Err(Error::new(
            Kind::Invalid,
            format!("store {of} is inside the mountpoint {at}; the mount would hide it"),
        ));
    }
    Ok(())
}

/// The canonical path of what exists, with the rest of the path as it stands.
fn existing_part(path: &Path) -> PathBuf {
    for ancestor in path.ancestors() {
        if let Ok(real) = ancestor.canonicalize() {
            return match path.strip_prefix(ancestor) {
                Ok(rest) if rest.as_os_str().is_empty() => real,
                Ok(rest) => real.join(rest),
                Err(_) => real,
            };
        }
    }
    path.to_owned()
}

/// The path under which a new source is kept: absolute, without links, and apart from the rest.
///
/// # Errors
/// `NotFound`, `Permission`; `Invalid` for what cannot be a source or lies in the wrong place.
pub fn source(place: &Place, text: &str) -> Result<String> {
    let canonical = FileSources.canonical(text)?;
    check_source(place, &canonical)?;
    Ok(canonical)
}

/// Makes sure, before a store is made for them, that sources can be used: a mistyped source must not
/// leave an empty store behind. Does nothing where there is a store already.
///
/// # Errors
/// As [`source`], and those of opening it; as [`store::look`].
pub fn before_a_store_is_made(
    store: &Path,
    mountpoint: Option<&Path>,
    sources: &[&str],
) -> Result<()> {
    if store::look(store)? == Found::Store {
        return Ok(());
    }
    let place = Place {
        store: existing_part(store),
        mountpoint: mountpoint.map(Path::to_owned),
    };
    for text in sources {
        FileSources.open(&source(&place, text)?)?;
    }
    Ok(())
}

/// Refuses a source that is part of the store or that the mount hides; looks at the paths alone.
///
/// # Errors
/// `Invalid`, with the two paths.
pub fn check_source(place: &Place, canonical: &str) -> Result<()> {
    let (path, shown_source) = (Path::new(canonical), escape(canonical));
    if path.starts_with(&place.store) {
        let of = shown(&place.store);
        return Err(Error::new(
            Kind::Invalid,
            format!("source {shown_source} is inside the store {of}; keep them apart"),
        ));
    }
    if let Some(mountpoint) = place.mountpoint.as_deref().filter(|m| path.starts_with(m)) {
        let at = shown(mountpoint);
        return Err(Error::new(
            Kind::Invalid,
            format!("source {shown_source} is inside the mountpoint {at}; the mount would hide it"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn store_and_mountpoint_are_kept_apart() {
        let top = tempfile::tempdir().unwrap();
        let top = top.path().canonicalize().unwrap();
        for dir in ["store", "mnt"] {
            fs::create_dir(top.join(dir)).unwrap();
        }
        std::os::unix::fs::symlink(top.join("mnt"), top.join("link")).unwrap();
        let check = |store: &str, at: &str| keep_apart(&top.join(store), &top.join(at));
        assert!(check("store", "mnt").is_ok() && check("absent/deep", "mnt").is_ok());
        assert!(check("mnt2", "mnt").is_ok() && check("mnt", "mnt2").is_ok());
        for (store, at) in [
            ("store", "store"),
            ("store", "store/inner"),
            ("mnt/store", "mnt"),
            ("mnt/not/yet/there", "mnt"),
            ("link/store", "mnt"),
        ] {
            assert_eq!(
                check(store, at).unwrap_err().kind(),
                Kind::Invalid,
                "{store} {at}"
            );
        }
    }

    #[test]
    fn a_source_may_lie_neither_in_the_store_nor_below_the_mount() {
        let top = tempfile::tempdir().unwrap();
        let top = top.path().canonicalize().unwrap();
        for dir in ["store", "mnt", "data"] {
            fs::create_dir(top.join(dir)).unwrap();
            fs::write(top.join(dir).join("disk"), "x").unwrap();
        }
        std::os::unix::fs::symlink(top.join("store/disk"), top.join("data/link")).unwrap();
        let place = Place {
            store: top.join("store"),
            mountpoint: Some(top.join("mnt")),
        };
        let check = |path: &str| source(&place, top.join(path).to_str().unwrap());
        let disk = top.join("data/disk").to_str().unwrap().to_owned();
        assert_eq!(check("data/../data/disk").unwrap(), disk);
        assert_eq!(check("data/absent").unwrap_err().kind(), Kind::NotFound);
        for bad in ["store/disk", "mnt/disk", "data/link", "mnt"] {
            assert_eq!(check(bad).unwrap_err().kind(), Kind::Invalid, "{bad}");
        }
    }

    #[test]
    fn a_directory_that_answers_lives() {
        let top = tempfile::tempdir().unwrap();
        assert_eq!(probe(top.path()), Probe::Alive);
        assert_eq!(probe(&top.path().join("absent")), Probe::Alive);
    }

    #[test]
    fn an_ordinary_directory_is_ready_under_every_name() {
        let top = tempfile::tempdir().unwrap();
        let real = top.path().canonicalize().unwrap().join("mnt");
        fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, top.path().join("link")).unwrap();
        for name in ["mnt", "mnt/", "./mnt/../mnt", "link"] {
            let mut said = Vec::new();
            let ready = prepare(&top.path().join(name), &mut |text| {
                said.push(text.to_owned())
            });
            assert_eq!(ready.unwrap(), real, "{name}");
            assert!(said.is_empty());
        }
        fs::write(real.join("x"), "").unwrap();
        let kind = |name: &str| {
            prepare(&top.path().join(name), &mut |_| ())
                .unwrap_err()
                .kind()
        };
        assert_eq!(kind("mnt"), Kind::Invalid);
        assert_eq!(kind("mnt/x"), Kind::Invalid);
        assert_eq!(kind("absent"), Kind::NotFound);
    }
}
