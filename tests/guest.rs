//! QEMU guests: one whose disk is an image of the mount, and one that boots from a backup.
//!
//! Shown of an image of the mount, as a writable raw disk: the guest mounts its ext4, writes and syncs files and powers off, and what it said it wrote is
//! there; snapshots taken while it writes hold every file that it had synced before, and their
//! filesystem is clean after its journal was replayed; the image has what the guest left. From
//! `live.img`, and then from a clone of one of those snapshots, which stays as it was.
//!
//! Shown of a backup, that is of `a.img` and `a..b.qcow2` copied into a directory, with no daemon running: it
//! is a whole machine. Firmware finds the boot loader in its first sector, that the kernel in its first
//! partition, that its root and init in the second; what runs there sees b's content, and writes;
//! `a.img` stays as it is. The same for a chain of two overlays, made by hand with `qemu-img rebase -u`.
//!
//! The guests are emulated (no KVM is needed). What they run comes from `.ci/guest`, or from where
//! `STILLFRAME_GUEST` points: a directory with `vmlinuz` (NVMe and ext4 built in), a static `busybox`, and
//! for the second test syslinux, its `mbr.bin`, mtools and mkfs.fat.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rig::{Rig, Running, can_mount, must, touch};

const QEMU: &str = "qemu-system-x86_64";
const SIZE: u64 = 64 << 20;
/// Files that the guest writes and syncs, one after another.
const FILES: u64 = 24;
/// How long an emulated guest may take for all it does.
const PATIENCE: Duration = Duration::from_secs(180);

/// What the guest runs. A line `SYNCED n` comes when file n is on its disk for good.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
exec >/dev/ttyS0 2>&1
/bin/busybox mount -t ext4 /dev/nvme0n1 /mnt || echo FAILED
n=1
while [ $n -le FILES ]; do
    /bin/busybox dd if=/dev/urandom of=/mnt/TAG$n bs=65536 count=4 2>/dev/null || echo FAILED
    /bin/busybox sync
    echo SUM $(/bin/busybox md5sum /mnt/TAG$n)
    echo SYNCED $n
    n=$((n + 1))
done
/bin/busybox umount /mnt || echo FAILED
echo FINISHED
/bin/busybox poweroff -f
"#;

/// A file of a guest's disk, and its checksum as the guest saw it.
type Sum = (String, String);

fn parts(needed: &[&str]) -> Option<PathBuf> {
    let there = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest");
    let parts = std::env::var_os("STILLFRAME_GUEST").map_or(there, PathBuf::from);
    for part in needed {
        if !parts.join(part).exists() {
            rig::skip(&format!(
                "no {part} in {}; .ci/guest gets it",
                parts.display()
            ));
            return None;
        }
    }
    if Command::new(QEMU).arg("--version").output().is_err() {
        rig::skip(&format!("no {QEMU}"));
        return None;
    }
    Some(parts)
}

/// An archive as the kernel unpacks it ("newc").
struct Archive(Vec<u8>);

impl Archive {
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        let ino = self.0.len();
        let (len, name_len) = (content.len(), name.len() + 1);
        let (major, minor) = device;
        let head = format!(
            "070701{ino:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{len:08x}{0:08x}{0:08x}\
             {major:08x}{minor:08x}{name_len:08x}{0:08x}",
            0, 1
        );
        self.0.extend(head.as_bytes());
        self.0.extend(name.as_bytes());
        self.0.push(0);
        self.pad();
        self.0.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

/// The guest's first filesystem: busybox and its script.
fn initrd(busybox: &Path, tag: &str) -> Vec<u8> {
    let init = INIT
        .replace("FILES", &FILES.to_string())
        .replace("TAG", tag);
    let mut archive = Archive(Vec::new());
    for dir in ["bin", "dev", "mnt"] {
        archive.add(dir, 0o40755, (0, 0), &[]);
    }
    archive.add("dev/console", 0o20600, (5, 1), &[]);
    archive.add(
        "bin/busybox",
        0o100_755,
        (0, 0),
        &fs::read(busybox).unwrap(),
    );
    archive.add("init", 0o100_755, (0, 0), init.as_bytes());
    archive.add("TRAILER!!!", 0, (0, 0), &[]);
    archive.0
}

/// A running guest and what its console says.
struct Guest {
    qemu: Running,
    lines: Receiver<String>,
    end: Instant,
    sums: Vec<Sum>,
}

impl Guest {
    fn boot(parts: &Path, rig: &Rig, image: &Path, tag: &str) -> Guest {
        let initrd_path = rig.at(&format!("initrd-{tag}"));
        fs::write(&initrd_path, initrd(&parts.join("busybox"), tag)).unwrap();
        let drive = format!(
            "file={},format=raw,if=none,id=disk",
            image.to_str().unwrap()
        );
        let mut command = Command::new(QEMU);
        command
            .args(["-drive", &drive])
            .arg("-kernel")
            .arg(parts.join("vmlinuz"))
            .arg("-initrd")
            .arg(&initrd_path)
            .args(["-append", "console=ttyS0 quiet panic=-1"]);
        Guest::start(command)
    }

    /// A machine with nothing but a disk, which is an overlay.
    fn boot_from(overlay: &Path) -> Guest {
        let overlay = overlay.to_str().unwrap();
        let mut command = Command::new(QEMU);
        let drive = format!("file={overlay},format=qcow2,if=none,id=disk");
        command.args(["-drive", &drive]);
        Guest::start(command)
    }

    fn start(mut command: Command) -> Guest {
        command
            .args(["-accel", "tcg", "-m", "256", "-nodefaults"])
            .args(["-display", "none", "-no-reboot", "-serial", "stdio"])
            .args(["-device", "nvme,drive=disk,serial=disk,bootindex=0"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        let mut child = command.spawn().unwrap();
        let console = BufReader::new(child.stdout.take().unwrap());
        let (tell, lines) = channel();
        std::thread::spawn(move || {
            for line in console.split(b'\n').map_while(|line| line.ok()) {
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                if tell.send(line).is_err() {
                    return;
                }
            }
        });
        Guest {
            qemu: Running(child),
            lines,
            end: Instant::now() + PATIENCE,
            sums: Vec::new(),
        }
    }

    /// Waits for a line, and keeps what the guest says of its files.
    fn until(&mut self, wanted: &str) {
        let mut heard = Vec::new();
        loop {
            let left = self.end.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left);
            let line = line.unwrap_or_else(|_| panic!("no '{wanted}' after {heard:#?}"));
            assert!(!line.contains("FAILED"), "{line} after {heard:#?}");
            if let Some(sum) = line.strip_prefix("SUM ") {
                let (sum, path) = sum.split_once(' ').unwrap();
                let name = path.trim().trim_start_matches("/mnt/");
                self.sums.push((name.to_owned(), sum.to_owned()));
            }
            if line == wanted {
                return;
            }
            heard.push(line);
        }
    }

    fn finish(mut self, files: u64) -> Vec<Sum> {
        self.until("FINISHED");
        rig::eventually("the guest powers off", || {
            self.qemu.0.try_wait().unwrap().is_some()
        });
        assert_eq!(self.sums.len() as u64, files);
        std::mem::take(&mut self.sums)
    }
}

/// A filesystem that is clean as it is, or after its journal was replayed, and holds these files.
fn holds(rig: &Rig, image: &Path, sums: &[Sum], as_it_is: bool) {
    let copy = rig.at("copy");
    must(
        "cp",
        &[
            "--sparse=always",
            image.to_str().unwrap(),
            copy.to_str().unwrap(),
        ],
    );
    must("chmod", &["600", copy.to_str().unwrap()]);
    let copied = copy.to_str().unwrap();
    if !as_it_is {
        // 1: the journal was replayed, or the like.
        must(
            "sh",
            &[
                "-c",
                &format!("PATH=$PATH:/sbin:/usr/sbin; e2fsck -p {copied} || [ $? -eq 1 ]"),
            ],
        );
    }
    must("e2fsck", &["-f", "-n", copied]);
    let file = rig.at("file");
    for (name, sum) in sums {
        let dump = format!("dump /{name} {}", file.to_str().unwrap());
        must("debugfs", &["-R", &dump, copied]);
        let found = must("md5sum", &[file.to_str().unwrap()]);
        assert_eq!(found.split(' ').next(), Some(&**sum), "{name} of {image:?}");
        fs::remove_file(&file).unwrap();
    }
    fs::remove_file(&copy).unwrap();
}

/// Boots from an image of the mount, takes snapshots of the volume while the guest writes; returns
/// what the guest wrote, and how much of that each snapshot must hold.
fn run(
    parts: &Path,
    rig: &Rig,
    image: &Path,
    tag: &str,
    snapshots: &[&str],
) -> (Vec<Sum>, Vec<usize>) {
    let mut guest = Guest::boot(parts, rig, image, tag);
    let mut synced = Vec::new();
    for (i, name) in snapshots.iter().enumerate() {
        let number = FILES / (snapshots.len() as u64 + 1) * (i as u64 + 1);
        guest.until(&format!("SYNCED {number}"));
        // It goes on writing meanwhile.
        touch(&rig.snapshot("vm", name)).unwrap();
        synced.push(guest.sums.len());
    }
    (guest.finish(FILES), synced)
}

#[test]
fn a_guest_runs_from_the_live_image_and_from_a_clone() {
    let needed = ["vmlinuz", "busybox"];
    let Some(parts) = parts(&needed).filter(|_| can_mount()) else {
        return;
    };
    let mut rig = Rig::new();
    let source = rig.source("vm", SIZE);
    must("mkfs.ext4", &["-q", "-F", source.to_str().unwrap()]);
    rig.mount_with(&["--volume", &format!("vm={}", source.to_str().unwrap())]);
    touch(&rig.snapshot("vm", "empty")).unwrap();
    let live = rig.live("vm");
    let (sums, synced) = run(&parts, &rig, &live, "live", &["a", "b", "c"]);
    holds(&rig, &live, &sums, true);
    holds(&rig, &rig.snapshot("vm", "empty"), &[], true);
    for (name, synced) in ["a", "b", "c"].iter().zip(&synced) {
        assert!(*synced as u64 >= FILES / 4);
        holds(&rig, &rig.snapshot("vm", name), &sums[..*synced], false);
    }
    // A clone of what the first guest was torn out of: the second one replays its journal.
    let clone = rig.mnt().join("vm/clones/second.img");
    fs::hard_link(rig.snapshot("vm", "b"), &clone).unwrap();
    let (more, _) = run(&parts, &rig, &clone, "clone", &[]);
    let both = [&sums[..synced[1]], &more].concat();
    holds(&rig, &clone, &both, true);
    rig.umount();
    rig.mount();
    holds(&rig, &clone, &both, true);
    holds(&rig, &live, &sums, true);
    holds(&rig, &rig.snapshot("vm", "b"), &sums[..synced[1]], false);
    rig.umount();
}

/// What a disk that boots by itself is made with, besides what every guest needs.
const LOADER: [&str; 8] = [
    "vmlinuz", "busybox", "mbr.bin", "syslinux", "mkfs.fat", "mtools", "mcopy", "mattrib",
];
const MIB: u64 = 1 << 20;
/// Its partitions: FAT with boot loader and kernel, ext4 with everything else. Offset and length.
const BOOT: (u64, u64) = (MIB, 20 * MIB);
const ROOT: (u64, u64) = (21 * MIB, 26 * MIB);

/// What runs on it.
const DISK_INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev || exit 1
exec >/dev/ttyS0 2>&1
/bin/busybox mount -t proc proc /proc || echo FAILED
/bin/busybox grep -q ' / ext4 rw' /proc/mounts || echo FAILED
echo CONTENT $(/bin/busybox cat /content)
/bin/busybox dd if=/dev/urandom of=/written bs=65536 count=16 2>/dev/null || echo FAILED
/bin/busybox sync
echo SUM $(/bin/busybox md5sum /written)
/bin/busybox mount -o remount,ro / || echo FAILED
echo FINISHED
/bin/busybox poweroff -f
"#;

const LOADER_CONFIG: &str = "DEFAULT linux
LABEL linux
  KERNEL /vmlinuz
  APPEND console=ttyS0 quiet panic=-1 root=/dev/nvme0n1p2 rw
";

/// An entry of the partition table in the first sector.
fn partition(active: bool, kind: u8, (offset, len): (u64, u64)) -> Vec<u8> {
    // Where it lies by cylinder, head and sector is past what can be said that way.
    let nowhere = [0xfe, 0xff, 0xff];
    let mut entry = vec![if active { 0x80 } else { 0 }];
    entry.extend(nowhere);
    entry.push(kind);
    entry.extend(nowhere);
    entry.extend(((offset / 512) as u32).to_le_bytes());
    entry.extend(((len / 512) as u32).to_le_bytes());
    entry
}

/// A tool of the parts; syslinux looks for mtools by name.
fn tool(parts: &Path, name: &str, args: &[&str]) {
    let mut path = parts.as_os_str().to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let mut command = Command::new(parts.join(name));
    let out = command.args(args).env("PATH", path).output().unwrap();
    rig::good(&out, &format!("{name} {args:?}"));
}

/// A file with partitions, boot loader, kernel, and a root whose `/content` says `a`.
fn bootable_disk(parts: &Path, rig: &Rig) -> PathBuf {
    let disk = rig.source("pc", ROOT.0 + ROOT.1);
    let path = disk.to_str().unwrap();
    let mut first = fs::read(parts.join("mbr.bin")).unwrap();
    assert!(first.len() <= 446, "no boot code for a partition table");
    first.resize(446, 0);
    first.extend(partition(true, 0x0e, BOOT));
    first.extend(partition(false, 0x83, ROOT));
    first.resize(510, 0);
    first.extend([0x55, 0xaa]);
    let file = fs::OpenOptions::new().write(true).open(&disk).unwrap();
    file.write_all_at(&first, 0).unwrap();
    drop(file);

    let (sector, kib) = ((BOOT.0 / 512).to_string(), (BOOT.1 / 1024).to_string());
    let offset = format!("--offset={sector}");
    let args = ["-F", "16", "-h", &sector, &offset, path, &kib];
    tool(parts, "mkfs.fat", &args);
    let at = BOOT.0.to_string();
    tool(parts, "syslinux", &["--install", "--offset", &at, path]);
    let config = rig.at("syslinux.cfg");
    fs::write(&config, LOADER_CONFIG).unwrap();
    let (place, kernel) = (format!("{path}@@{at}"), parts.join("vmlinuz"));
    for file in [&kernel, &config] {
        let name = file.file_name().unwrap().to_str().unwrap();
        let args = ["-i", &place, file.to_str().unwrap(), &format!("::{name}")];
        tool(parts, "mcopy", &args);
    }

    let root = rig.at("root");
    for dir in ["bin", "sbin", "dev", "proc"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    fs::copy(parts.join("busybox"), root.join("bin/busybox")).unwrap();
    fs::write(root.join("sbin/init"), DISK_INIT).unwrap();
    for program in ["bin/busybox", "sbin/init"] {
        must("chmod", &["755", root.join(program).to_str().unwrap()]);
    }
    fs::write(root.join("content"), "a").unwrap();
    let (offset, kib) = (format!("offset={}", ROOT.0), format!("{}k", ROOT.1 / 1024));
    let from = root.to_str().unwrap();
    let args = ["-q", "-F", "-E", &offset, "-d", from, path, &kib];
    must("mkfs.ext4", &args);
    disk
}

/// The root of a disk as e2fsprogs name it.
fn root_of(disk: &Path) -> String {
    format!("{}?offset={}", disk.to_str().unwrap(), ROOT.0)
}

/// Gives the root's `/content` another text.
fn set_content(rig: &Rig, disk: &Path, text: &str) {
    let (content, script) = (rig.at("content"), rig.at("script"));
    fs::write(&content, text).unwrap();
    let write = format!(
        "rm /content\nwrite {} /content\n",
        content.to_str().unwrap()
    );
    fs::write(&script, write).unwrap();
    let script = script.to_str().unwrap();
    must("debugfs", &["-w", "-f", script, &root_of(disk)]);
}

/// What the guest left in an overlay: a clean root with this content, and what it says it wrote.
fn check_overlay(rig: &Rig, overlay: &Path, content: &str, sums: &[Sum]) {
    let raw = rig.at("raw");
    let (from, to) = (overlay.to_str().unwrap(), raw.to_str().unwrap());
    must("qemu-img", &["check", "-q", from]);
    must("qemu-img", &["convert", "-O", "raw", from, to]);
    let root = root_of(&raw);
    must("e2fsck", &["-f", "-n", &root]);
    assert_eq!(must("debugfs", &["-R", "cat /content", &root]), content);
    let file = rig.at("file");
    for (name, sum) in sums {
        let dump = format!("dump {name} {}", file.to_str().unwrap());
        must("debugfs", &["-R", &dump, &root]);
        let found = must("md5sum", &[file.to_str().unwrap()]);
        assert_eq!(found.split(' ').next(), Some(&**sum), "{name}");
    }
    fs::remove_file(&raw).unwrap();
}

/// Copies files of the volume into a new directory, whose files may be written to.
fn back_up(rig: &Rig, to: &str, files: &[&str]) -> PathBuf {
    let dir = rig.at(to);
    fs::create_dir(&dir).unwrap();
    for name in files {
        let from = rig.mnt().join("pc").join(name);
        let to = dir.join(from.file_name().unwrap());
        let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
        must("cp", &["--sparse=always", from, to]);
        must("chmod", &["600", to]);
    }
    dir
}

#[test]
fn a_machine_boots_from_a_copied_snapshot_and_overlay() {
    let Some(parts) = parts(&LOADER).filter(|_| can_mount()) else {
        return;
    };
    let mut rig = Rig::new();
    let disk = bootable_disk(&parts, &rig);
    rig.mount_with(&["--volume", &format!("pc={}", disk.to_str().unwrap())]);
    let live = rig.live("pc");
    touch(&rig.snapshot("pc", "a")).unwrap();
    for name in ["b", "c"] {
        set_content(&rig, &live, name);
        touch(&rig.snapshot("pc", name)).unwrap();
    }
    let backup = back_up(&rig, "backup", &["snapshots/a.img", "diffs/a..b.qcow2"]);
    let files = ["snapshots/a.img", "diffs/a..b.qcow2", "diffs/b..c.qcow2"];
    let chain = back_up(&rig, "chain", &files);
    let last = chain.join("b..c.qcow2");
    let rebase = ["rebase", "-u", "-F", "qcow2", "-b", "a..b.qcow2"];
    must(
        "qemu-img",
        &[&rebase[..], &[last.to_str().unwrap()]].concat(),
    );
    // From here on there is nothing but these files.
    rig.umount();
    fs::remove_dir_all(rig.store()).unwrap();
    fs::remove_file(&disk).unwrap();

    let read = |dir: &Path, name: &str| fs::read(dir.join(name)).unwrap();
    let a = read(&backup, "a.img");
    let below = read(&chain, "a..b.qcow2");
    assert!(read(&chain, "a.img") == a);
    let first = backup.join("a..b.qcow2");
    assert!(below == read(&backup, "a..b.qcow2"));
    // Both at once: most of the time is the emulator's.
    let mut guests = [Guest::boot_from(&first), Guest::boot_from(&last)];
    guests[0].until("CONTENT b");
    guests[1].until("CONTENT c");
    let [first_sums, last_sums] = guests.map(|guest| guest.finish(1));
    check_overlay(&rig, &first, "b", &first_sums);
    check_overlay(&rig, &last, "c", &last_sums);
    assert!(read(&backup, "a..b.qcow2") != below, "nothing was written");
    assert!(read(&backup, "a.img") == a && read(&chain, "a.img") == a);
    assert!(read(&chain, "a..b.qcow2") == below);
    // What is below is still a's.
    let below = ["-R", "cat /content", &root_of(&backup.join("a.img"))];
    assert_eq!(must("debugfs", &below), "a");
}
