//! `stillframe demo`: the whole loop on a scratch volume, with the commands a user would type.
//!
//! Promises: it works in a new directory below the system's temporary one and touches nothing else;
//! it checks every step and fails loudly at the first that does not hold; however it ends (also by
//! Ctrl-C), the scratch mount and the directory are gone, unless `--keep` asks for them to stay and
//! everything held.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Args;

use super::{interrupt, mount, out, umount};
use crate::daemon::protocol::Leave;
use crate::daemon::status::shown;
use crate::error::{Error, IoContext, Kind, Result};

/// Bytes of the scratch volume.
const SIZE: u64 = 64 << 20;
/// Bytes that are overwritten.
const DAMAGE: usize = 1 << 20;
/// Where they are: past the first metadata of a filesystem, well inside the volume.
const DAMAGE_AT: u64 = 8 << 20;
/// Bytes copied at once.
const PIECE: usize = 1 << 20;

/// Arguments.
#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// Leave the mount in place at the end, to look around
    #[arg(long)]
    pub keep: bool,
}

/// Runs it.
///
/// # Errors
/// The failing step's; `Failed` if a check does not hold; `Interrupted`.
pub fn run(args: &DemoArgs) -> Result<()> {
    let _guard = interrupt::guard();
    let mut scratch = Scratch::new()?;
    let outcome = show(&mut scratch, args.keep);
    match outcome {
        Ok(()) if args.keep => scratch.keep(),
        Ok(()) => scratch.clean(),
        // The step's failure is what counts; cleaning up is tried all the same.
        Err(e) => {
            if let Err(left) = scratch.clean() {
                out::remark(&format!("cleaning up failed too: {}", left.chain()));
            }
            Err(e)
        }
    }
}

/// The scratch directory and what is mounted in it.
struct Scratch {
    top: PathBuf,
    mounted: bool,
    step: usize,
}

impl Scratch {
    fn new() -> Result<Scratch> {
        let base = std::env::temp_dir();
        let context = || format!("cannot make a scratch directory in {}", shown(&base));
        for attempt in 0..100 {
            let top = base.join(format!("stillframe-demo-{}-{attempt}", std::process::id()));
            match fs::DirBuilder::new().mode(0o700).create(&top) {
                Ok(()) => {
                    // From here on it is removed again, whatever fails.
                    let made = Scratch {
                        top,
                        mounted: false,
                        step: 0,
                    };
                    return match fs::create_dir(made.mountpoint()) {
                        Ok(()) => Ok(made),
                        Err(e) => {
                            made.clean()?;
                            Err(Error::io(context(), e))
                        }
                    };
                }
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::io(context(), e)),
            }
        }
        Err(Error::new(Kind::Exists, context()))
    }

    fn at(&self, name: &str) -> PathBuf {
        self.top.join(name)
    }

    fn mountpoint(&self) -> PathBuf {
        self.at("mnt")
    }

    fn volume(&self) -> PathBuf {
        self.mountpoint().join("disk")
    }

    fn live(&self) -> PathBuf {
        self.volume().join("live.img")
    }

    /// Says what comes next, and what one would type.
    fn step(&mut self, text: &str, command: &str) -> Result<()> {
        interrupt::check()?;
        self.step += 1;
        out::line(&format!("\n{}. {text}\n   $ {command}", self.step))
    }

    fn clean(mut self) -> Result<()> {
        if self.mounted {
            umount::end(&self.mountpoint(), Leave::Lazily)?;
            self.mounted = false;
        }
        fs::remove_dir_all(&self.top).context(|| format!("cannot remove {}", shown(&self.top)))
    }

    fn keep(self) -> Result<()> {
        let (top, at) = (shown(&self.top), shown(&self.mountpoint()));
        out::line(&format!(
            "\nKept for you to look around:\n   {at}/disk/live.img\n   {at}/disk/snapshots/\n   \
             {at}/.stillframe/status.json\n\nWhen you are done:\n   $ stillframe umount {at}\n   \
             $ rm -r {top}"
        ))
    }
}

fn holds(what: &str, is: bool) -> Result<()> {
    if !is {
        return Err(Error::new(
            Kind::Failed,
            format!("the demo's check does not hold: {what}"),
        ));
    }
    out::line(&format!("   ok: {what}"))
}

fn show(scratch: &mut Scratch, keep: bool) -> Result<()> {
    out::line("Stillframe demo: a scratch disk, a snapshot, a backup, an accident, a restore.")?;
    let image = scratch.at("disk.img");
    make_image(scratch, &image)?;
    let original = digest(&image)?;
    serve(scratch, &image, original)?;
    let monday = scratch.volume().join("snapshots/monday.img");
    take_and_break(scratch, &monday, original)?;
    back_up_and_restore(scratch, &monday, original)?;
    if keep {
        return Ok(());
    }
    take_down(scratch, &image, &monday, original)
}

fn serve(scratch: &mut Scratch, image: &Path, original: blake3::Hash) -> Result<()> {
    let (at, store) = (scratch.mountpoint(), scratch.at("store"));
    let command = format!(
        "stillframe mount {} --store {} --volume disk={}",
        shown(&at),
        shown(&store),
        shown(image)
    );
    scratch.step(
        "Serve it: from now on the disk is written through live.img only.",
        &command,
    )?;
    mount::scratch(&store, &at, "disk", image)?;
    scratch.mounted = true;
    holds(
        "live.img is the disk, byte for byte",
        digest(&scratch.live())? == original,
    )
}

fn take_and_break(scratch: &mut Scratch, monday: &Path, original: blake3::Hash) -> Result<()> {
    let (live, named) = (scratch.live(), shown(monday));
    scratch.step(
        "Take a snapshot by making a file.",
        &format!("touch {named}"),
    )?;
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(monday)
        .context(|| format!("cannot take {named}"))?;
    holds(
        "the snapshot is the disk, byte for byte",
        digest(monday)? == original,
    )?;

    let of = shown(&live);
    scratch.step(
        "An accident: one MiB of the disk is overwritten.",
        &format!("dd if=/dev/urandom of={of} bs=1M count=1 seek=8 conv=notrunc"),
    )?;
    damage(&live)?;
    holds("the disk has changed", digest(&live)? != original)?;
    holds("the snapshot has not", digest(monday)? == original)
}

fn back_up_and_restore(scratch: &mut Scratch, monday: &Path, original: blake3::Hash) -> Result<()> {
    let (live, backup) = (scratch.live(), scratch.at("backup.img"));
    let (from, to) = (shown(monday), shown(&backup));
    let command = format!("cp --sparse=always {from} {to}");
    scratch.step("Back the snapshot up with a plain copy.", &command)?;
    copy_sparse(monday, &backup)?;
    holds(
        "the backup is the disk as it was",
        digest(&backup)? == original,
    )?;
    let allocated = fs::metadata(&backup)
        .context(|| "cannot look at the backup")?
        .blocks()
        * 512;
    out::line(&format!(
        "   it takes {} of {}",
        out::size(allocated),
        out::size(SIZE)
    ))?;

    let command = format!("dd if={to} of={} bs=1M", shown(&live));
    scratch.step("Restore with a plain copy.", &command)?;
    restore(&backup, &live)?;
    holds("the disk is what it was", digest(&live)? == original)
}

fn take_down(
    scratch: &mut Scratch,
    image: &Path,
    monday: &Path,
    original: blake3::Hash,
) -> Result<()> {
    let (at, named) = (shown(&scratch.mountpoint()), shown(monday));
    scratch.step(
        "Delete the snapshot by removing the file.",
        &format!("rm {named}"),
    )?;
    fs::remove_file(monday).context(|| format!("cannot delete {named}"))?;
    let snapshots = fs::read_dir(scratch.volume().join("snapshots"));
    let left = snapshots.context(|| "cannot list the snapshots")?.count();
    holds("no snapshot is left", left == 0)?;

    let command = format!("stillframe umount {at}");
    scratch.step("Stop serving; the disk is a plain file again.", &command)?;
    umount::end(&scratch.mountpoint(), Leave::Gently)?;
    scratch.mounted = false;
    holds(
        "the image itself is what it was",
        digest(image)? == original,
    )?;
    out::line("\nThat was all of it. 'stillframe demo --keep' leaves the mount for you to look at.")
}

/// An image with a real filesystem where the machine can make one, else with plain data.
fn make_image(scratch: &mut Scratch, image: &Path) -> Result<()> {
    let shown_image = shown(image);
    let context = || format!("cannot make {shown_image}");
    let file = File::create_new(image).context(context)?;
    file.set_len(SIZE).context(context)?;
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F"])
        .arg(image)
        .env("PATH", search_path())
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if made.is_ok_and(|status| status.success()) {
        return scratch.step(
            "A scratch disk with an ext4 on it.",
            &format!("truncate -s 64M {shown_image}; mkfs.ext4 -q -F {shown_image}"),
        );
    }
    let mut data = vec![0; PIECE];
    for piece in [0, 8, 9, 40] {
        fill(&mut data, piece);
        let mut file = &file;
        file.seek(SeekFrom::Start(piece * PIECE as u64))
            .context(context)?;
        file.write_all(&data).context(context)?;
    }
    scratch.step(
        "A scratch disk with some data on it (mkfs.ext4 is not installed).",
        &format!("truncate -s 64M {shown_image}"),
    )
}

/// `mkfs.ext4` lies where a user's PATH often does not lead.
fn search_path() -> std::ffi::OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    path
}

fn digest(path: &Path) -> Result<blake3::Hash> {
    let context = || format!("cannot read {}", shown(path));
    let mut file = File::open(path).context(context)?;
    let mut hasher = blake3::Hasher::new();
    let mut piece = vec![0; PIECE];
    loop {
        interrupt::check()?;
        match file.read(&mut piece).context(context)? {
            0 => return Ok(hasher.finalize()),
            n => hasher.update(&piece[..n]),
        };
    }
}

/// Bytes that no two pieces share and that do not compress to a hole.
fn fill(data: &mut [u8], seed: u64) {
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(data);
}

fn damage(live: &Path) -> Result<()> {
    let context = || format!("cannot write {}", shown(live));
    let mut file = OpenOptions::new().write(true).open(live).context(context)?;
    let mut data = vec![0; DAMAGE];
    fill(&mut data, u64::MAX);
    file.seek(SeekFrom::Start(DAMAGE_AT)).context(context)?;
    file.write_all(&data).context(context)?;
    file.sync_all().context(context)
}

/// What `cp --sparse=always` does: pieces that are all zero become holes.
fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    let context = || format!("cannot copy {} to {}", shown(from), shown(to));
    let mut source = File::open(from).context(context)?;
    let mut target = File::create_new(to).context(context)?;
    let mut piece = vec![0; 64 << 10];
    let mut len = 0;
    loop {
        interrupt::check()?;
        let n = source.read(&mut piece).context(context)?;
        if n == 0 {
            break;
        }
        if piece[..n].iter().any(|&b| b != 0) {
            target.seek(SeekFrom::Start(len)).context(context)?;
            target.write_all(&piece[..n]).context(context)?;
        }
        len += n as u64;
    }
    target.set_len(len).context(context)
}

/// What `dd` does: opens with `O_TRUNC`, writes from start to end, closes.
fn restore(from: &Path, to: &Path) -> Result<()> {
    let context = || format!("cannot restore {} to {}", shown(from), shown(to));
    let mut source = File::open(from).context(context)?;
    let mut target = OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(to)
        .context(context)?;
    let mut piece = vec![0; PIECE];
    loop {
        interrupt::check()?;
        match source.read(&mut piece).context(context)? {
            0 => return target.sync_all().context(context),
            n => target.write_all(&piece[..n]).context(context)?,
        }
    }
}
