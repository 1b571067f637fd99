//! Rows 7, 28 and 29: few descriptors, little memory, a map without space.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;

use super::{content, image, log, served, status, vm, writable};
use crate::rig::{
    Attached, Rig, can_loop, can_mount, eventually, gone, must, setting, signal, touch,
};

/// With a limit of the process `what` (an option of prlimit).
fn limited(rig: &Rig, what: &str, more: &[&str]) -> std::process::Child {
    let mut command = std::process::Command::new("prlimit");
    command.arg(what).arg(crate::rig::BINARY);
    command
        .args(["mount", "--foreground", "--log"])
        .arg(rig.at("daemon.log"));
    command
        .arg(rig.mnt())
        .args(more)
        .arg("--store")
        .arg(rig.store());
    // Printing a backtrace of a failed allocation allocates; when that fails, too, the runtime waits for
    // itself for ever.
    command.env_remove("RUST_BACKTRACE");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn().unwrap()
}

/// Row 28: more clones and segments than descriptors. Some requests may be refused, with an error; none hangs,
/// nothing is wrong, deletions work, and afterwards everything does.
#[test]
fn few_descriptors_are_no_harm() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new();
    let volume = format!("vm={}", image(&rig, "disk.img").display());
    rig.mount_with(&["--segment-size=1M", "--volume", &volume]);
    rig.umount();
    let mut daemon = crate::rig::Running(limited(&rig, "--nofile=64:64", &[]));
    eventually("it serves", || rig.live("vm").exists());
    let live = writable(&rig.live("vm"));
    let mut expected = content("disk.img");
    let (mut made, mut refused) = (Vec::new(), 0);
    for i in 0..60u8 {
        let name = format!("s{i}");
        let taken = touch(&rig.snapshot("vm", &name));
        let clone = rig.mnt().join(format!("vm/clones/c{i}.img"));
        match taken.and_then(|()| fs::hard_link(rig.snapshot("vm", &name), &clone)) {
            Ok(()) => {
                let written = writable_or(&clone).and_then(|f| f.write_all_at(&[i; 4096], 0));
                made.push((i, expected.clone(), written.is_ok()));
                refused += u32::from(written.is_err());
            }
            Err(_) => refused += 1,
        }
        // The log and the source have theirs.
        live.write_all_at(&[i; 40_000], u64::from(i) * 9000)
            .unwrap();
        expected[usize::from(i) * 9000..][..40_000].fill(i);
    }
    live.sync_all().unwrap();
    let files = ["clones", "log"].map(|dir| {
        let all = fs::read_dir(rig.store().join(dir)).unwrap();
        all.count()
    });
    println!(
        "{} clones in {files:?} files, {refused} refusals",
        made.len()
    );
    assert!(files.iter().sum::<usize>() > 64, "too few for the limit");
    let report = status(&rig);
    assert_eq!(report["volumes"][0]["state"], "active");
    let check = |rig: &Rig, made: &[(u8, Vec<u8>, bool)]| {
        for (i, base, written) in made {
            let found = fs::read(rig.snapshot("vm", &format!("s{i}")));
            assert!(found.unwrap() == *base, "s{i}");
            if *written {
                let found = fs::read(rig.mnt().join(format!("vm/clones/c{i}.img"))).unwrap();
                assert!(found[..4096].iter().all(|b| b == i) && found[4096..] == base[4096..]);
            }
        }
    };
    assert!(fs::read(rig.live("vm")).unwrap() == expected);
    for i in 40..60 {
        fs::remove_file(rig.mnt().join(format!("vm/clones/c{i}.img"))).unwrap();
        fs::remove_file(rig.snapshot("vm", &format!("s{i}"))).unwrap();
    }
    made.retain(|(i, ..)| *i < 40);
    drop(live);
    // Killed and recovered with as few.
    signal(daemon.0.id(), "KILL");
    daemon.0.wait().unwrap();
    must("fusermount3", &["-u", "-z", rig.mnt().to_str().unwrap()]);
    let mut daemon = crate::rig::Running(limited(&rig, "--nofile=64:64", &[]));
    eventually("it serves", || rig.live("vm").exists());
    assert!(fs::read(rig.live("vm")).unwrap() == expected);
    rig.ok(&["umount", rig.mnt().to_str().unwrap()]);
    assert!(daemon.0.wait().unwrap().success());
    rig.mount();
    check(&rig, &made);
    rig.umount();
}

fn writable_or(path: &Path) -> std::io::Result<fs::File> {
    fs::OpenOptions::new().write(true).open(path)
}

/// Row 29: with too little memory it does not start, or dies under load, as in a kill: the next start has
/// everything that was acknowledged.
#[test]
fn little_memory_is_a_kill_at_worst() {
    if !can_mount() {
        return;
    }
    let rounds = setting("STILLFRAME_MEMORY", 6);
    let mut rig = served();
    touch(&rig.snapshot("vm", "first")).unwrap();
    rig.umount();
    let mut expected = content("disk.img");
    let (mut served_by, mut died) = (0, 0);
    for round in 0..rounds {
        // From what is never enough to what is, in address space.
        let bytes = (40u64 << 20) + round * (600 << 20) / rounds;
        let daemon = limited(&rig, &format!("--as={bytes}"), &[]);
        let mut daemon = crate::rig::Running(daemon);
        let pid = daemon.0.id();
        eventually("it serves or ends", || rig.live("vm").exists() || gone(pid));
        if let Ok(live) = writable_or(&rig.live("vm")) {
            served_by += 1;
            for i in 0..64u64 {
                let at = i * 16_000;
                let bytes = [round as u8 + 1; 12_000];
                if live.write_all_at(&bytes, at).is_err() {
                    break;
                }
                expected[at as usize..][..12_000].copy_from_slice(&bytes);
                let _ = touch(&rig.snapshot("vm", &format!("s{round}-{i}")));
            }
        }
        let ended = gone(pid);
        died += u32::from(ended);
        if !ended {
            signal(pid, "TERM");
        }
        daemon.0.wait().unwrap();
        let said = rig.mount();
        assert!(!said.contains("repair"), "{said}");
        let found = fs::read(rig.live("vm")).unwrap();
        // A write that was cut off may have been made.
        let same = found.iter().zip(&expected).filter(|(a, b)| a == b).count();
        assert!(
            same + 12_000 >= expected.len(),
            "round {round}, {bytes} bytes"
        );
        expected = found;
        assert!(fs::read(rig.snapshot("vm", "first")).unwrap() == content("disk.img"));
        // The map that could not be opened for lack of memory was moved aside and made again.
        for entry in fs::read_dir(rig.store()).unwrap() {
            let entry = entry.unwrap();
            if entry
                .file_name()
                .to_string_lossy()
                .starts_with("map.damaged-")
            {
                fs::remove_dir_all(entry.path()).unwrap();
            }
        }
        rig.umount();
    }
    println!("{served_by} of {rounds} served, {died} ended for lack of memory");
    assert!(served_by > 0 && died > 0);
    rig.ok(&["check"]);
}

/// Row 7: the map on a filesystem of its own that is full. It is made in memory; everything works, a kill
/// included, and when there is space the map is there again.
#[test]
fn a_map_without_space_is_made_in_memory() {
    if !can_mount() || !can_loop() {
        return;
    }
    let mut rig = served();
    touch(&rig.snapshot("vm", "a")).unwrap();
    let live = writable(&rig.live("vm"));
    live.write_all_at(&[7; 50_000], 3000).unwrap();
    drop(live);
    rig.umount();
    let map = rig.store().join("map");
    fs::remove_dir_all(&map).unwrap();
    fs::create_dir(&map).unwrap();
    let file = rig.source("small", 1 << 20);
    must("mkfs.ext4", &["-q", "-m", "0", file.to_str().unwrap()]);
    let mut attached = Attached::new(&file);
    attached.mount(&map);
    must("chmod", &["700", map.to_str().unwrap()]);
    // To the last byte.
    let mut fill = fs::File::create(map.join("fill")).unwrap();
    while std::io::Write::write(&mut fill, &[1; 1024]).is_ok_and(|n| n > 0) {}
    drop(fill);
    let mut expected = content("disk.img");
    expected[3000..53_000].fill(7);
    for round in 0..2u8 {
        rig.mount();
        assert!(fs::read(rig.snapshot("vm", "a")).unwrap() == content("disk.img"));
        assert!(fs::read(rig.live("vm")).unwrap() == expected);
        let name = format!("full{round}");
        touch(&rig.snapshot("vm", &name)).unwrap();
        let before = expected.clone();
        let live = writable(&rig.live("vm"));
        live.write_all_at(&[round + 20; 50_000], 200_000).unwrap();
        live.sync_all().unwrap();
        drop(live);
        expected[200_000..250_000].fill(round + 20);
        assert!(fs::read(rig.snapshot("vm", &name)).unwrap() == before);
        fs::remove_file(rig.snapshot("vm", &name)).unwrap();
        if round == 0 {
            rig.kill();
        } else {
            rig.umount();
        }
    }
    assert!(log(&rig).contains("map"), "{}", log(&rig));
    attached.detach();
    rig.mount();
    assert_ne!(vm(&rig)["state"], "changed");
    assert!(fs::read(rig.snapshot("vm", "a")).unwrap() == content("disk.img"));
    assert!(fs::read(rig.live("vm")).unwrap() == expected);
    rig.umount();
    rig.ok(&["check"]);
}
