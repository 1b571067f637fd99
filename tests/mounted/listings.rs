//! Listings with attributes (READDIRPLUS), as tools ask for them: nothing is told that a look at the
//! file alone would not tell, nothing is read that a listing need not read, all is forgotten again.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use stillframe::units::Name;
use stillframe::volume::VolumeOptions;

use crate::harness::{Mount, Needs, errno, open, possible, run};

const SIZE: u64 = 1 << 20;

/// The volume `vm` with some snapshots and a clone.
fn mounted(snapshots: usize) -> Mount {
    use std::os::unix::fs::FileExt;
    let mount = Mount::new();
    let source = mount.scratch("vm.img");
    fs::write(&source, vec![1; SIZE as usize]).unwrap();
    mount.add("vm", &source, VolumeOptions::default());
    let live = open(&mount.live("vm"), 0);
    for i in 0..snapshots {
        live.write_all_at(&[i as u8; 700], 4096 * i as u64 % SIZE)
            .unwrap();
        fs::File::create_new(mount.snapshot("vm", &format!("s{i:04}"))).unwrap();
    }
    fs::hard_link(mount.snapshot("vm", "s0000"), mount.at("vm/clones/c.img")).unwrap();
    mount
}

/// What `stat` tells, as `find -printf` and as we print it.
const FORMAT: &str = "%f %i %m %n %U %G %s %b %T@ %C@\n";

fn told(path: &Path) -> String {
    let meta = fs::symlink_metadata(path).unwrap();
    let name = path.file_name().unwrap().to_str().unwrap();
    // find has ten digits of a second's fraction.
    let time = |s: i64, ns: i64| format!("{s}.{ns:09}0");
    format!(
        "{name} {} {:o} {} {} {} {} {} {} {}",
        meta.ino(),
        meta.mode() & 0o7777,
        meta.nlink(),
        meta.uid(),
        meta.gid(),
        meta.len(),
        meta.blocks(),
        time(meta.mtime(), meta.mtime_nsec()),
        time(meta.ctime(), meta.ctime_nsec())
    )
}

/// The kernel sends its FORGETs in its own time.
fn settles(mount: &Mount, known: usize) {
    for _ in 0..500 {
        if mount.known_nodes() == known {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(mount.known_nodes(), known, "nodes that the kernel knows");
}

#[test]
fn a_long_listing_is_what_each_file_says_and_is_forgotten_again() {
    if !possible(Needs::Fuse, "listings") {
        return;
    }
    let count = 300;
    let mount = mounted(count);
    let directory = mount.at("vm/snapshots");
    let names: Vec<String> = (0..count).map(|i| format!("s{i:04}.img")).collect();
    let drop_all = || {
        names
            .iter()
            .for_each(|name| mount.drop_name(&directory, name))
    };
    let numbers: BTreeMap<_, _> = names
        .iter()
        .map(|name| {
            (
                name.clone(),
                fs::metadata(directory.join(name)).unwrap().ino(),
            )
        })
        .collect();
    drop_all();
    // vm, live.img, snapshots, clones and the clone.
    let before = 5;
    settles(&mount, before);
    let asked = mount.listings_with_attributes();
    for round in 0..3 {
        // Nothing is known of the entries, then all is, then all is once more.
        let listed = run(
            "find",
            &[
                directory.to_str().unwrap(),
                "-name",
                "*.img",
                "-printf",
                FORMAT,
            ],
        );
        assert!(mount.known_nodes() >= before + count, "{round}");
        for (line, name) in listed.lines().zip(&names) {
            assert_eq!(line, told(&directory.join(name)), "{round}");
        }
        assert_eq!(listed.lines().count(), count);
        let ls = run("ls", &["-l", directory.to_str().unwrap()]);
        let sizes = ls
            .lines()
            .skip(1)
            .map(|l| l.split_whitespace().nth(4).unwrap().to_owned());
        assert!(sizes.eq(std::iter::repeat_n(SIZE.to_string(), count)));
        if round == 1 {
            drop_all();
            settles(&mount, before);
        }
    }
    assert!(
        mount.listings_with_attributes() >= asked + 6,
        "the kernel begins every listing with attributes"
    );
    // A listing without attributes shows the same numbers.
    let entries = fs::read_dir(&directory).unwrap().map(|e| e.unwrap());
    let shown: BTreeMap<_, _> = entries
        .map(|e| (e.file_name().into_string().unwrap(), e.ino()))
        .collect();
    assert_eq!(shown, numbers);
    // What goes behind the kernel's back is gone at once, however well it is known.
    let [volume, snapshot] = ["vm", "s0007"].map(|name| Name::new(name).unwrap());
    mount.engine().delete_snapshot(&volume, &snapshot).unwrap();
    let gone = fs::metadata(directory.join("s0007.img"));
    assert_eq!(errno(gone), libc::ENOENT);
    drop_all();
    settles(&mount, before);
}

#[test]
fn a_listing_of_diffs_names_them_and_knows_none() {
    if !possible(Needs::Fuse, "listing diffs/") {
        return;
    }
    let mount = mounted(40);
    let directory = mount.at("vm/diffs");
    fs::metadata(&directory).unwrap();
    let before = mount.known_nodes();
    for _ in 0..2 {
        let entries: Vec<_> = fs::read_dir(&directory)
            .unwrap()
            .map(|e| e.unwrap())
            .collect();
        assert_eq!(entries.len(), 2 * 39);
        assert!(entries.iter().all(|e| e.file_type().unwrap().is_file()));
        // The kernel was offered their attributes and took none: it knows no more than before.
        settles(&mount, before);
        for entry in entries.iter().take(4) {
            assert_eq!(entry.metadata().unwrap().ino(), entry.ino());
            assert_eq!(entry.ino() >> 63, 1);
            mount.drop_name(&directory, entry.file_name().to_str().unwrap());
        }
        settles(&mount, before);
    }
    // A look at each is as good as one without a listing.
    let format = ["-type", "f", "-printf", FORMAT];
    let found = run(
        "find",
        &[&[directory.to_str().unwrap()], &format[..]].concat(),
    );
    assert_eq!(found.lines().count(), 2 * 39);
    for line in found.lines() {
        let name = line.split(' ').next().unwrap();
        assert_eq!(line, told(&directory.join(name)));
        let len = fs::read(directory.join(name)).unwrap().len();
        assert_eq!(line.split(' ').nth(6).unwrap(), len.to_string(), "{name}");
    }
}

#[test]
fn tools_that_walk_the_tree_find_it_whole() {
    if !possible(Needs::Fuse, "walking") {
        return;
    }
    let mount = mounted(12);
    let root = mount.at("");
    let root = root.to_str().unwrap().trim_end_matches('/');
    let found = run("find", &[root, "-mindepth", "1", "-printf", "%y %P\n"]);
    let mut expected = vec![
        "d .stillframe".to_owned(),
        "f .stillframe/metrics.prom".to_owned(),
        "f .stillframe/status.json".to_owned(),
        "d vm".to_owned(),
        "d vm/clones".to_owned(),
        "f vm/clones/c.img".to_owned(),
        "d vm/diffs".to_owned(),
        "f vm/live.img".to_owned(),
        "d vm/snapshots".to_owned(),
    ];
    expected.extend((0..12).map(|i| format!("f vm/snapshots/s{i:04}.img")));
    for i in 0..11 {
        for kind in ["json", "qcow2"] {
            expected.push(format!("f vm/diffs/s{i:04}..s{:04}.{kind}", i + 1));
        }
    }
    expected.sort();
    let mut found: Vec<_> = found.lines().collect();
    found.sort_unstable();
    assert_eq!(found, expected);
    // cp -r and rsync -n agree that a copy has everything, byte for byte.
    let copy = mount.scratch("copy");
    run(
        "cp",
        &[
            "-r",
            "--preserve=timestamps",
            &format!("{root}/vm"),
            copy.to_str().unwrap(),
        ],
    );
    for path in [
        "live.img",
        "clones/c.img",
        "snapshots/s0003.img",
        "diffs/s0003..s0004.qcow2",
    ] {
        let (there, here) = (mount.at("vm").join(path), copy.join(path));
        assert!(
            fs::read(there).unwrap() == fs::read(here).unwrap(),
            "{path}"
        );
    }
    let to_send = [
        "-r",
        "-n",
        "--checksum",
        "--out-format=%n",
        &format!("{root}/vm/"),
    ];
    let sent = run("rsync", &[&to_send[..], &[copy.to_str().unwrap()]].concat());
    assert_eq!(sent, "", "nothing is missing in the copy");
}
