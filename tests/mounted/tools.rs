//! Backup and restore with nothing but the tools of the machine.
//!
//! The image holds random data with holes at the front, between and at the end, so that every tool
//! has something to skip. Each backup must equal the source at the instant, byte for byte; where the
//! tool keeps holes it may not use more storage than the source does.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use stillframe::volume::VolumeOptions;

use crate::harness::{Chance, Mount, Needs, allocated, arg, assert_equal, open, possible, run};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 48 * MIB;
const GRAIN: u64 = 4096;

/// A sparse image; about a third of it is data.
fn make_image(path: &Path, seed: u64) {
    let file = File::create(path).unwrap();
    file.set_len(SIZE).unwrap();
    let mut chance = Chance(seed);
    for at in [1, 2, 7, 19, 20, 21, 33, 40] {
        let len = 1 + chance.below(2 * MIB - GRAIN) / GRAIN * GRAIN;
        file.write_all_at(&chance.bytes(len as usize), at * MIB)
            .unwrap();
    }
}

/// A mount with volume `vm`, and an independent copy of its content.
fn mounted(seed: u64) -> (Mount, PathBuf) {
    let mount = Mount::new();
    let source = mount.scratch("source.img");
    make_image(&source, seed);
    let copy = mount.scratch("expected.img");
    run("cp", &[&source, &copy]);
    mount.add("vm", &source, VolumeOptions::default());
    (mount, copy)
}

/// Overwrites all data of `live.img` so that a snapshot must come from the thin target.
fn scramble(mount: &Mount) {
    let live = open(&mount.live("vm"), 0);
    let mut chance = Chance(99);
    for at in 0..SIZE / MIB {
        live.write_all_at(&chance.bytes(MIB as usize), at * MIB)
            .unwrap();
    }
}

fn assert_backup(backup: &Path, expected: &Path, sparse: bool, what: &str) {
    assert_equal(backup, expected);
    let (used, limit) = (allocated(backup), allocated(expected));
    assert!(!sparse || used <= limit, "{what}: {used} of {limit} bytes");
}

#[test]
fn cp_tar_and_dd_take_backups_that_are_equal_and_no_larger() {
    if !possible(Needs::Fuse, "backups with plain tools") {
        return;
    }
    let (mount, expected) = mounted(1);
    // Once with every block from the source, once with every block from the thin target; from two
    // snapshots, so that the kernel has nothing of the second one.
    for round in ["clean", "preserved"] {
        mount.touch("vm", round);
    }
    for round in ["clean", "preserved"] {
        let snapshot = mount.snapshot("vm", round);
        let out = |name: &str| mount.scratch(&format!("{round}-{name}"));
        run("cp", &[&snapshot, &out("cp")]);
        assert_backup(&out("cp"), &expected, true, "cp");
        let sparse = PathBuf::from("--sparse=always");
        run("cp", &[&sparse, &snapshot, &out("cps")]);
        assert_backup(&out("cps"), &expected, true, "cp --sparse=always");
        let (input, output) = (arg("if", &snapshot), arg("of", &out("dd")));
        run("dd", &[&input, &output, "bs=1M"]);
        assert_backup(&out("dd"), &expected, false, "dd");
        let output = arg("of", &out("dds"));
        // It leaves out whole blocks of its own size only.
        run("dd", &[&input, &output, "bs=4k", "conv=sparse"]);
        // A hole at the end is not even written, here as from any file.
        open(&out("dds"), 0).set_len(SIZE).unwrap();
        assert_backup(&out("dds"), &expected, true, "dd conv=sparse");
        let (archive, into) = (out("tar"), out("untarred"));
        fs::create_dir(&into).unwrap();
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let from = text(snapshot.parent().unwrap());
        let name = format!("{round}.img");
        run("tar", &["-cSf", &text(&archive), "-C", &from, &name]);
        run("tar", &["-xSf", &text(&archive), "-C", &text(&into)]);
        assert_backup(&into.join(name), &expected, true, "tar -S");
        assert!(fs::metadata(&archive).unwrap().len() < SIZE / 2);
        if round == "clean" {
            scramble(&mount);
        }
    }
}

/// What `rsync --stats` says of how many files it transferred.
fn transferred(stats: &str) -> u64 {
    let line = stats
        .lines()
        .find_map(|l| l.strip_prefix("Number of regular files transferred: "));
    line.expect("a line of the statistics")
        .trim()
        .parse()
        .unwrap()
}

#[test]
fn rsync_transfers_what_changed_and_nothing_else() {
    if !possible(Needs::Fuse, "rsync") {
        return;
    }
    let (mount, expected) = mounted(2);
    let (backup, sparse) = (mount.scratch("backup.img"), mount.scratch("sparse.img"));
    let rsync = |name: &str, flags: &str, to: &Path| {
        let from = mount.snapshot("vm", name);
        transferred(&run(
            "rsync",
            &[
                flags,
                "--stats",
                from.to_str().unwrap(),
                to.to_str().unwrap(),
            ],
        ))
    };
    // The modes and times of a snapshot are those of its file, so that -a has them to compare.
    mount.touch("vm", "a");
    assert_eq!(rsync("a", "-a", &backup), 1);
    assert_equal(&backup, &expected);
    assert_eq!(rsync("a", "-aS", &sparse), 1);
    assert_backup(&sparse, &expected, true, "rsync -S");
    mount.touch("vm", "b");
    assert_eq!(rsync("b", "-a", &backup), 0, "nothing was written");
    // One byte, many times within one second: always transferred.
    for (i, name) in ["c", "d", "e"].iter().enumerate() {
        let at = 7 * MIB + 12_345;
        for path in [mount.live("vm"), expected.clone()] {
            open(&path, 0).write_all_at(&[i as u8 ^ 0x5a], at).unwrap();
        }
        mount.touch("vm", name);
        assert_eq!(rsync(name, "-a", &backup), 1, "one byte was written");
        assert_equal(&backup, &expected);
        mount.touch("vm", &format!("{name}-again"));
        assert_eq!(rsync(&format!("{name}-again"), "-a", &backup), 0);
    }
}

#[test]
fn dd_and_cp_restore_onto_the_volume_and_onto_new_files() {
    if !possible(Needs::Fuse, "restoring with plain tools") {
        return;
    }
    let (mount, expected) = mounted(3);
    let snapshot = mount.touch("vm", "a");
    let live = mount.live("vm");
    let (backup, scrambled) = (mount.scratch("backup.img"), mount.scratch("scrambled.img"));
    run("cp", &[&snapshot, &backup]);
    scramble(&mount);
    run("cp", &[&live, &scrambled]);
    let other = mount.touch("vm", "scrambled");
    let restored = |tool: &str| {
        assert_equal(&live, &expected);
        assert_equal(&mount.scratch("source.img"), &expected);
        assert_equal(&snapshot, &expected);
        assert_equal(&other, &scrambled);
        println!("{tool}: restored");
    };
    // From the snapshot itself and from a backup elsewhere; dense and with holes.
    run("cp", &[&snapshot, &live]);
    restored("cp of a snapshot");
    scramble(&mount);
    run("cp", &[Path::new("--sparse=always"), &backup, &live]);
    restored("cp --sparse=always");
    scramble(&mount);
    run("dd", &[&arg("if", &backup), &arg("of", &live), "bs=1M"]);
    restored("dd");
    scramble(&mount);
    let flags = ["bs=1M", "oflag=direct", "conv=fsync,notrunc"];
    let (input, output) = (arg("if", &snapshot), arg("of", &live));
    run("dd", &[&[&input[..], &output], &flags[..]].concat());
    restored("dd oflag=direct");
    scramble(&mount);
    let flags = ["--inplace", "--no-whole-file"];
    let paths = [backup.to_str().unwrap(), live.to_str().unwrap()];
    run("rsync", &[&flags[..], &paths].concat());
    restored("rsync --inplace");
    let new = mount.scratch("new.img");
    run("dd", &[&arg("if", &snapshot), &arg("of", &new), "bs=256k"]);
    assert_equal(&new, &expected);
    run("cp", &[&snapshot, &new]);
    assert_equal(&new, &expected);
}

#[test]
fn restoring_an_image_of_which_one_percent_differs_costs_one_percent() {
    if !possible(Needs::Fuse, "the cost of a restore") {
        return;
    }
    let (mount, _) = mounted(4);
    scramble(&mount);
    let (live, image) = (mount.live("vm"), mount.scratch("image.img"));
    run("cp", &[&live, &image]);
    let grains = SIZE / GRAIN;
    for (tool, name) in [("dd", "a"), ("cp", "b")] {
        mount.touch("vm", name);
        let file = open(&image, 0);
        let mut chance = Chance(tool.len() as u64 + u64::from(name.as_bytes()[0]));
        let mut differ: Vec<u64> = (0..grains / 100).map(|_| chance.below(grains)).collect();
        differ.sort_unstable();
        differ.dedup();
        for grain in &differ {
            let at = grain * GRAIN + chance.below(GRAIN - 8);
            let mut old = [0; 8];
            file.read_exact_at(&mut old, at).unwrap();
            file.write_all_at(&old.map(|b| !b), at).unwrap();
        }
        let used = |mount: &Mount| mount.info("vm").used;
        let (before, log) = (used(&mount), mount.engine().log_bytes().unwrap());
        match tool {
            "dd" => run("dd", &[&arg("if", &image), &arg("of", &live), "bs=1M"]),
            _ => run("cp", &[&image, &live]),
        };
        assert_equal(&live, &image);
        let cost = differ.len() as u64 * GRAIN;
        assert_eq!(used(&mount) - before, cost, "{tool}: what differs, exactly");
        assert!(cost <= SIZE / 100);
        // The log grows by whole segments, written ahead.
        let grown = mount.engine().log_bytes().unwrap().saturating_sub(log);
        assert!(grown <= 16 * MIB, "{tool}: the log grew by {grown}");
    }
}
