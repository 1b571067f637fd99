//! Filesystems on the disks of a farm: made, mounted through a loop device, unmounted.
//!
//! Promises: a [`Mounted`] is unmounted and its loop device is gone when it is dropped, also when the
//! test has failed; a filesystem that will not be unmounted is detached lazily and said so.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::disks::{Disk, Farm};
use crate::rig::good;

/// Where a program lies. (By its path, and with this process's environment, one is started without
/// this process's memory being copied first.)
pub fn program(name: &str) -> Option<PathBuf> {
    let dirs = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(Path::new);
    let mut paths = dirs.iter().map(|dir| dir.join(name));
    paths.find(|path| path.exists())
}

/// Runs a program, and keeps what it says.
pub fn run(name: &str, args: &[&OsStr]) -> std::io::Result<Output> {
    let path = program(name).ok_or(std::io::ErrorKind::NotFound)?;
    let mut command = Command::new(path);
    command.args(args).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.output()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ext4,
    Xfs,
    Btrfs,
}

pub const KINDS: [Kind; 3] = [Kind::Ext4, Kind::Xfs, Kind::Btrfs];

/// Where store and sources lie.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub store: Kind,
    /// The sources' own device, if they have one.
    pub sources: Option<Kind>,
}

impl Layout {
    /// The layouts in turn: each filesystem, alone and with the sources on a second device.
    pub fn number(n: u64) -> Layout {
        let kind = |n: u64| KINDS[(n % 3) as usize];
        Layout {
            store: kind(n),
            sources: (n % 6 >= 3).then(|| kind(n + n / 6)),
        }
    }

    pub fn kinds(self) -> Vec<Kind> {
        std::iter::once(self.store).chain(self.sources).collect()
    }

    pub fn name(self) -> String {
        match self.sources {
            None => self.store.name().to_owned(),
            Some(sources) => format!("{} and {}", self.store.name(), sources.name()),
        }
    }
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Ext4 => "ext4",
            Kind::Xfs => "xfs",
            Kind::Btrfs => "btrfs",
        }
    }

    fn size(self) -> u64 {
        (match self {
            Kind::Ext4 => 96,
            // The least that mkfs.xfs makes is 300 MiB.
            Kind::Xfs => 320,
            Kind::Btrfs => 192,
        }) << 20
    }

    /// Whether a page of the device holds what no filesystem survives torn: its superblock. A device
    /// that writes such a page in parts is outside what any of them promises.
    pub fn is_atomic(self, page: u64) -> bool {
        match self {
            Kind::Ext4 | Kind::Xfs => page == 0,
            // 64 KiB and 64 MiB.
            Kind::Btrfs => page == 16 || page == 16384,
        }
    }

    /// A new filesystem.
    pub fn make(self, farm: &mut Farm) -> Disk {
        let (number, path) = farm.add(Disk::new(self.size()));
        let force = match self {
            Kind::Ext4 => "-F",
            Kind::Xfs | Kind::Btrfs => "-f",
        };
        let mkfs = format!("mkfs.{}", self.name());
        let out = run(&mkfs, &["-q".as_ref(), force.as_ref(), path.as_ref()]);
        good(&out.unwrap(), &mkfs);
        farm.remove(number).flatten()
    }
}

/// A filesystem mounted from a file.
pub struct Mounted {
    at: PathBuf,
    mounted: bool,
}

impl Mounted {
    /// Mounts it; what the system says if it will not.
    pub fn new(kind: Kind, file: &Path, at: &Path) -> Result<Mounted, String> {
        let options = match kind {
            Kind::Xfs => "loop,nouuid",
            _ => "loop",
        };
        let how = ["-t", kind.name(), "-o", options].map(OsStr::new);
        let args = [&how[..], &[file.as_ref(), at.as_ref()]].concat();
        let out = run("mount", &args).map_err(|e| e.to_string())?;
        if !out.status.success() {
            return Err(String::from_utf8_lossy(&out.stderr).trim().to_owned());
        }
        let at = at.to_owned();
        Ok(Mounted { at, mounted: true })
    }

    fn try_unmount(&self, how: &[&str]) -> bool {
        let how: Vec<&OsStr> = how.iter().map(OsStr::new).collect();
        let done = run("umount", &[&how[..], &[self.at.as_ref()]].concat());
        done.is_ok_and(|out| out.status.success())
    }

    /// Unmounts it; fails if it cannot be.
    pub fn unmount(mut self) {
        // A thread of the index may still be on its way out.
        let end = Instant::now() + Duration::from_secs(20);
        while !self.try_unmount(&[]) {
            assert!(Instant::now() < end, "{} stays busy", self.at.display());
            std::thread::sleep(Duration::from_millis(5));
        }
        self.mounted = false;
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.mounted && !self.try_unmount(&[]) {
            eprintln!("{} is detached lazily", self.at.display());
            self.try_unmount(&["--lazy"]);
        }
    }
}
