//! A QEMU guest whose disk is an image of the mount, as a writable raw disk.
//!
//! Shown: the guest mounts its ext4, writes and syncs files and powers off, and what it said it wrote is
//! there; snapshots taken while it writes hold every file that it had synced before, and their
//! filesystem is clean after its journal was replayed; the image has what the guest left. From
//! `live.img`, and then from a clone of one of those snapshots, which stays as it was.
//!
//! The guest is emulated (no KVM is needed). Its kernel and busybox come from `.ci/guest`, or from where
//! `STILLFRAME_GUEST` points: a directory with `vmlinuz` (NVMe and ext4 built in) and a static
//! `busybox`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;

use std::fs;
use std::io::{BufRead, BufReader};
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

fn parts() -> Option<PathBuf> {
    let there = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest");
    let parts = std::env::var_os("STILLFRAME_GUEST").map_or(there, PathBuf::from);
    for part in ["vmlinuz", "busybox"] {
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
            .args([
                "-accel",
                "tcg",
                "-m",
                "256",
                "-nodefaults",
                "-display",
                "none",
            ])
            .args(["-no-reboot", "-serial", "stdio", "-drive", &drive])
            .args(["-device", "nvme,drive=disk,serial=disk"])
            .arg("-kernel")
            .arg(parts.join("vmlinuz"))
            .arg("-initrd")
            .arg(&initrd_path)
            .args(["-append", "console=ttyS0 quiet panic=-1"])
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

    fn finish(mut self) -> Vec<Sum> {
        self.until("FINISHED");
        rig::eventually("the guest powers off", || {
            self.qemu.0.try_wait().unwrap().is_some()
        });
        assert_eq!(self.sums.len() as u64, FILES);
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
    (guest.finish(), synced)
}

#[test]
fn a_guest_runs_from_the_live_image_and_from_a_clone() {
    let Some(parts) = parts().filter(|_| can_mount()) else {
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
