//! Sources that are no ordinary files: block devices, and files as large as a system allows.
//!
//! Through the real daemon and mount, on loop devices and a loop-mounted XFS. What a size of 8 EiB
//! shows is address arithmetic: offsets beyond 2^31, 2^32, 2^43, 2^44 and 2^62, and the last byte.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rig::{Attached, Chance, Rig, can_loop, can_mount, must, touch};

/// No whole number of grains; a device has whole sectors.
const SIZE: u64 = (16 << 20) + 3 * 512;

fn random(chance: &mut Chance, len: u64) -> Vec<u8> {
    let words = (0..len.div_ceil(8)).map(|_| chance.next().to_le_bytes());
    let mut bytes: Vec<u8> = words.flatten().collect();
    bytes.truncate(len as usize);
    bytes
}

fn open(path: &Path) -> File {
    let mut how = OpenOptions::new();
    how.read(true).write(true).open(path).unwrap()
}

fn state(rig: &Rig, volume: &str) -> String {
    let report: serde_json::Value = serde_json::from_str(&rig.ok(&["status", "--json"])).unwrap();
    let volumes = report["volumes"].as_array().unwrap();
    let row = volumes.iter().find(|v| v["name"] == volume).unwrap();
    row["state"].as_str().unwrap().to_owned()
}

fn allocated(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    file.metadata().unwrap().blocks() * 512
}

/// A loop device under a number of its own, so that it can go and come back as the same.
struct Device {
    node: String,
    image: PathBuf,
}

impl Device {
    fn new(rig: &Rig, image: PathBuf) -> Device {
        // Those that look for a free device take the lowest.
        let number = 300 + std::process::id() % 600;
        let device = Device {
            node: format!("/dev/loop{number}"),
            image,
        };
        let _ = rig;
        device.attach();
        device
    }

    fn attach(&self) {
        must("losetup", &[&self.node, self.image.to_str().unwrap()]);
    }

    fn detach(&self) {
        must("losetup", &["--detach", &self.node]);
        rig::eventually("the device is gone", || {
            let backing = format!("/sys/block/{}/loop", self.node.trim_start_matches("/dev/"));
            !Path::new(&backing).exists()
        });
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .args(["--detach", &self.node])
            .output();
    }
}

fn refused(program: &str, args: &[&str]) -> String {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    let out = Command::new(program)
        .args(args)
        .env("PATH", path)
        .output()
        .unwrap();
    assert!(!out.status.success(), "{program} {args:?} was not refused");
    let text = [out.stdout, out.stderr].concat();
    String::from_utf8_lossy(&text).into_owned()
}

#[test]
fn a_block_device_is_a_source_like_a_file() {
    if !can_mount() || !can_loop() {
        return;
    }
    let mut rig = Rig::new();
    let mut chance = Chance(11);
    let image = rig.source("image", SIZE);
    let mut live = random(&mut chance, SIZE);
    fs::write(&image, &live).unwrap();
    let device = Device::new(&rig, image.clone());
    rig.mount_with(&["--volume", &format!("dev={}", device.node)]);
    assert_eq!(fs::metadata(rig.live("dev")).unwrap().len(), SIZE);

    // Writes, also of the cut last grain, and snapshots.
    let file = open(&rig.live("dev"));
    let mut kept = Vec::new();
    for name in ["a", "b"] {
        touch(&rig.snapshot("dev", name)).unwrap();
        kept.push((name, live.clone()));
        for at in [0, 5000, SIZE / 2 - 77, SIZE - 1536, SIZE - 1] {
            let bytes = random(&mut chance, (SIZE - at).min(9000));
            file.write_all_at(&bytes, at).unwrap();
            live[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
        }
        assert!(file.write_at(&[1; 2], SIZE).is_err());
    }
    file.sync_all().unwrap();
    assert!(fs::read(rig.live("dev")).unwrap() == live);
    assert!(fs::read(&device.node).unwrap() == live, "the device itself");
    for (name, content) in &kept {
        assert!(
            &fs::read(rig.snapshot("dev", name)).unwrap() == content,
            "{name}"
        );
    }

    claimed_by_nobody_else(&rig, &device);
    discards_reach_the_device(&rig, &device, &mut live);
    for (name, content) in &kept {
        assert!(
            &fs::read(rig.snapshot("dev", name)).unwrap() == content,
            "{name}"
        );
    }

    // Restored by copying a snapshot over it.
    let from = rig.snapshot("dev", "a");
    let to = rig.live("dev");
    must(
        "dd",
        &[
            &format!("if={}", from.to_str().unwrap()),
            &format!("of={}", to.to_str().unwrap()),
            "bs=1M",
            "conv=notrunc,fsync",
        ],
    );
    live.clone_from(&kept[0].1);
    assert!(fs::read(&to).unwrap() == live);
    assert!(fs::read(rig.snapshot("dev", "b")).unwrap() == kept[1].1);

    // Nothing can be told of a device's changes while nobody watched it.
    drop(file);
    rig.kill();
    rig.mount();
    assert_eq!(state(&rig, "dev"), "unverified");
    assert!(fs::read(rig.live("dev")).unwrap() == live);
    assert!(fs::read(rig.snapshot("dev", "b")).unwrap() == kept[1].1);
    open(&rig.live("dev")).write_all_at(&[5; 100], 100).unwrap();
    live[100..200].fill(5);
    rig.umount();
    rig.mount();
    assert_eq!(state(&rig, "dev"), "unverified");
    rig.ok(&["volume", "accept", "dev"]);
    assert_eq!(state(&rig, "dev"), "active");
    assert!(fs::read(rig.snapshot("dev", "b")).unwrap() == kept[1].1);
    rig.umount();

    comes_and_goes(&mut rig, &device, &kept[1].1, &live);
}

fn claimed_by_nobody_else(rig: &Rig, device: &Device) {
    let mut exclusive = OpenOptions::new();
    let opened = exclusive
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(&device.node);
    assert_eq!(opened.unwrap_err().raw_os_error(), Some(libc::EBUSY));
    let text = refused("mkfs.ext4", &["-q", "-F", &device.node]);
    assert!(text.contains("in use"), "{text}");
    let at = rig.at("elsewhere");
    fs::create_dir(&at).unwrap();
    refused("mount", &["-t", "ext4", &device.node, at.to_str().unwrap()]);
    let other = Rig::new();
    let (mnt, volume) = (other.mnt(), format!("dev={}", device.node));
    let out = other.run(&["mount", mnt.to_str().unwrap(), "--volume", &volume]);
    assert!(!out.status.success());
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(said.contains("is in use"), "{said}");
}

/// A hole in `live.img`, and a discard on a device over it, give back blocks of the image below.
fn discards_reach_the_device(rig: &Rig, device: &Device, live: &mut [u8]) {
    let before = allocated(&device.image);
    let path = rig.live("dev");
    let punch = ["--punch-hole", "--offset", "5001", "--length", "4194304"];
    must(
        "fallocate",
        &[&punch[..], &[path.to_str().unwrap()]].concat(),
    );
    live[5001..5001 + (4 << 20)].fill(0);
    open(&path).sync_all().unwrap();
    let after = allocated(&device.image);
    assert!(before - after >= 4 << 20 >> 1, "{before} {after}");
    assert!(fs::read(&path).unwrap() == live);

    let above = Attached::new(&path);
    must(
        "blkdiscard",
        &["--offset", "8388608", "--length", "2097152", &above.device],
    );
    above.detach();
    live[8 << 20..10 << 20].fill(0);
    open(&path).sync_all().unwrap();
    let last = allocated(&device.image);
    assert!(after - last >= 1 << 20, "{after} {last}");
    assert!(fs::read(&path).unwrap() == live);
    // The tail of the device is no whole block.
    let tail = [
        "--punch-hole",
        "--offset",
        "16776000",
        "--length",
        "1000000",
    ];
    must(
        "fallocate",
        &[&tail[..], &[path.to_str().unwrap()]].concat(),
    );
    live[16_776_000..].fill(0);
    assert!(fs::read(&path).unwrap() == live);
}

/// A device that is not there, and one of another size.
fn comes_and_goes(rig: &mut Rig, device: &Device, b: &[u8], live: &[u8]) {
    device.detach();
    rig.mount();
    assert_eq!(state(rig, "dev"), "missing");
    assert!(fs::read(rig.snapshot("dev", "b")).is_err());
    assert!(
        OpenOptions::new()
            .write(true)
            .open(rig.live("dev"))
            .and_then(|f| f.write_at(&[1], 0))
            .is_err()
    );
    rig.umount();
    // It comes back as it was: nothing has to be accepted.
    device.attach();
    rig.mount();
    assert_eq!(state(rig, "dev"), "unverified");
    assert!(fs::read(rig.snapshot("dev", "b")).unwrap() == b);
    assert!(fs::read(rig.live("dev")).unwrap() == live);
    rig.umount();

    // One that has grown has all that it had; the volume grows when it is told to.
    let image = open(&device.image);
    device.detach();
    image.set_len(SIZE + 512).unwrap();
    device.attach();
    rig.mount();
    assert_eq!(state(rig, "dev"), "unverified");
    assert!(fs::read(rig.snapshot("dev", "b")).unwrap() == b);
    assert!(fs::read(rig.live("dev")).unwrap() == live);
    rig.umount();

    device.detach();
    image.set_len(SIZE - 512).unwrap();
    device.attach();
    rig.mount();
    assert_eq!(state(rig, "dev"), "changed");
    assert!(fs::read(rig.snapshot("dev", "b")).is_err());
    let accept = rig.run(&["volume", "accept", "dev"]);
    assert!(!accept.status.success(), "less than there was is accepted");
    rig.umount();
    device.detach();
    image.set_len(SIZE).unwrap();
    let tail = &live[live.len() - 512..];
    image.write_all_at(tail, SIZE - 512).unwrap();
    image.sync_all().unwrap();
    device.attach();
    rig.mount();
    assert_eq!(state(rig, "dev"), "changed", "until somebody says so");
    rig.ok(&["volume", "accept", "dev"]);
    assert_eq!(state(rig, "dev"), "active");
    assert!(fs::read(rig.snapshot("dev", "b")).unwrap() == b);
    rig.umount();
}

/// Every power of two where an offset, a grain's or a sector's number changes its width.
fn offsets(size: u64) -> Vec<u64> {
    let mut at: Vec<u64> = [31, 32, 43, 44, 45, 51, 60, 62]
        .iter()
        .map(|bit| 1_u64 << bit)
        .filter(|at| at + 8192 < size)
        .flat_map(|at| [at - 4096, at - 3, at + 4, at + 4095])
        .collect();
    at.push(0);
    at.push(size - 8192 - size % 4096);
    at.push(size - 7);
    at
}

fn far(rig: &mut Rig, source: &Path, size: u64) {
    let volume = format!("far={}", source.to_str().unwrap());
    rig.mount_with(&["--volume", &volume]);
    assert_eq!(fs::metadata(rig.live("far")).unwrap().len(), size);
    let file = open(&rig.live("far"));
    let places = offsets(size);
    let pattern = |round: u8, i: usize| {
        let mut bytes = [round; 7];
        bytes[0] = i as u8 + 1;
        bytes
    };
    let check = |path: &Path, round: u8| {
        let file = File::open(path).unwrap();
        for (i, &at) in places.iter().enumerate() {
            let mut bytes = [0; 7];
            file.read_exact_at(&mut bytes, at).unwrap();
            let expected = if round == 0 {
                [0; 7]
            } else {
                pattern(round, i)
            };
            assert_eq!(bytes, expected, "{path:?} round {round} at {at}");
        }
        // Nothing past the end. (The kernel refuses a range that reaches past the largest offset.)
        if size < i64::MAX as u64 - 100 {
            assert_eq!(file.read_at(&mut [0; 100], size - 3).unwrap(), 3);
        }
    };
    for round in 0..3 {
        touch(&rig.snapshot("far", &format!("s{round}"))).unwrap();
        for (i, &at) in places.iter().enumerate() {
            file.write_all_at(&pattern(round + 1, i), at).unwrap();
        }
        check(&rig.live("far"), round + 1);
    }
    touch(&rig.snapshot("far", "s3")).unwrap();
    file.sync_all().unwrap();
    for life in 0..3 {
        for round in 0..4 {
            check(&rig.snapshot("far", &format!("s{round}")), round);
        }
        check(&rig.live("far"), 3);
        diffs(rig, &places, size);
        // A start after a kill, and one that makes the map again.
        rig.kill();
        if life == 1 {
            fs::remove_dir_all(rig.store().join("map")).unwrap();
        }
        rig.mount();
    }
    holes(&rig.live("far"), size);
    fs::remove_file(rig.snapshot("far", "s1")).unwrap();
    check(&rig.snapshot("far", "s0"), 0);
    check(&rig.snapshot("far", "s2"), 2);
    drop(file);
    rig.umount();
}

/// The list of what changed names just the grains that were written, to the last one.
fn diffs(rig: &Rig, places: &[u64], size: u64) {
    let text = rig.ok(&["diff", "--json", "far@s1..s2"]);
    let list: serde_json::Value = serde_json::from_str(&text).unwrap();
    let runs: Vec<(u64, u64)> = list["extents"]
        .as_array()
        .unwrap_or_else(|| panic!("no extents in {text}"))
        .iter()
        .map(|run| {
            let number = |field: &str| run[field].as_u64().unwrap();
            (number("start"), number("length"))
        })
        .collect();
    let within = |at: u64| {
        runs.iter()
            .any(|&(start, len)| (start..start + len).contains(&at))
    };
    for &at in places {
        assert!(within(at) && within(at + 6), "{at} is not in {runs:?}");
    }
    let total: u64 = runs.iter().map(|(_, len)| len).sum();
    assert!(total <= 2 * 4096 * places.len() as u64, "{total}");
    assert!(runs.iter().all(|&(start, len)| start + len <= size));
}

fn holes(path: &Path, size: u64) {
    let out = must(
        "sh",
        &[
            "-c",
            &format!(
                "xfs_io -r -c 'seek -d {}' -c 'seek -h {}' {} 2>&1 || true",
                (1_u64 << 60) + (1 << 20),
                size - 1,
                path.to_str().unwrap()
            ),
        ],
    );
    assert!(out.lines().any(|line| line.starts_with("DATA")), "{out}");
    assert!(out.lines().any(|line| line.starts_with("HOLE")), "{out}");
}

#[test]
fn a_source_may_have_eight_exbibytes() {
    if !can_mount() || !can_loop() {
        return;
    }
    let mut rig = Rig::new();
    let (disk, at) = (rig.at("disk"), rig.at("xfs"));
    File::create(&disk).unwrap().set_len(300 << 20).unwrap();
    fs::create_dir(&at).unwrap();
    must("mkfs.xfs", &["-q", disk.to_str().unwrap()]);
    let mut attached = Attached::new(&disk);
    attached.mount(&at);
    // What the largest file offset allows: one byte less than 8 EiB.
    let size = i64::MAX as u64;
    let source = at.join("far");
    let file = File::create(&source).unwrap();
    file.set_len(size).unwrap();
    drop(file);
    far(&mut rig, &source, size);
    drop(rig);
    attached.detach();
}
