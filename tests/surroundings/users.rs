//! Rows 23 to 27: other users, names that mean harm, root without rights, links that are swapped.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::{content, image, is_root, log, refused, served, status, vm};
use crate::rig::{
    BINARY, Chance, Rig, Running, can_mount, eventually, is_mounted, must, setting, signal, touch,
};

/// Somebody who is neither root nor of root's group, and somebody who is of that group.
const STRANGER: (u32, u32) = (65534, 65534);
const GROUP: (u32, u32) = (65534, 0);

fn open_up(rig: &Rig) {
    fs::set_permissions(rig.at(""), Permissions::from_mode(0o755)).unwrap();
}

fn as_user(user: (u32, u32), script: &str) -> Output {
    let mut sh = Command::new("sh");
    sh.args(["-c", script])
        .uid(user.0)
        .gid(user.1)
        .current_dir("/");
    sh.stdin(Stdio::null()).output().unwrap()
}

/// Row 25: who may do what, with and without `--allow-other`. Without it the kernel asks nobody but the one
/// who mounted; with it modes decide, and they name the owner alone.
#[test]
fn others_get_in_as_far_as_they_are_let() {
    if !can_mount() || !is_root() {
        return;
    }
    for allow in [false, true] {
        let mut rig = Rig::new();
        open_up(&rig);
        let volume = format!("vm={}", image(&rig, "disk.img").display());
        let mut more = vec!["--volume", &volume];
        if allow {
            more.push("--allow-other");
        }
        rig.mount_with(&more);
        touch(&rig.snapshot("vm", "a")).unwrap();
        must(
            "ln",
            &[
                rig.snapshot("vm", "a").to_str().unwrap(),
                rig.mnt().join("vm/clones/c.img").to_str().unwrap(),
            ],
        );
        let at = rig.mnt();
        let at = at.to_str().unwrap();
        let deeds = [
            format!("ls {at}"),
            format!("ls {at}/vm"),
            format!("cat {at}/vm/live.img"),
            format!("cat {at}/vm/snapshots/a.img"),
            format!("cat {at}/vm/clones/c.img"),
            format!("cat {at}/.stillframe/status.json"),
            format!("cat {at}/vm/diffs/a..live.json"),
            format!("dd if=/dev/zero of={at}/vm/live.img count=1 conv=notrunc"),
            format!("dd if=/dev/zero of={at}/vm/clones/c.img count=1 conv=notrunc"),
            format!("touch {at}/vm/snapshots/mine.img"),
            format!("ln {at}/vm/snapshots/a.img {at}/vm/clones/mine.img"),
            format!("rm -f {at}/vm/snapshots/a.img"),
            format!("chmod 777 {at}/vm/live.img"),
            format!("setfattr -n user.stillframe.revert -v a {at}/vm/live.img"),
            format!("getfattr -d {at}/vm/live.img"),
            format!("truncate -s 0 {at}/vm/clones/c.img"),
            format!("mv {at}/vm/snapshots/a.img {at}/vm/snapshots/b.img"),
        ];
        for user in [STRANGER, GROUP] {
            for deed in &deeds {
                let out = as_user(user, deed);
                assert!(
                    !out.status.success(),
                    "{user:?} may {deed} (allow: {allow})"
                );
            }
            let out = as_user(user, &format!("stat {at}"));
            assert_eq!(out.status.success(), allow, "the top, by its mode alone");
        }
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = table
            .lines()
            .find(|l| l.split(' ').nth(4) == Some(at))
            .unwrap();
        assert!(line.contains("nosuid") && line.contains("nodev"), "{line}");
        assert_eq!(line.contains("allow_other"), allow, "{line}");
        assert_eq!(line.contains("default_permissions"), allow, "{line}");
        // All is as it was, for its owner.
        assert!(fs::read(rig.snapshot("vm", "a")).unwrap() == content("disk.img"));
        assert!(fs::read(rig.live("vm")).unwrap() == content("disk.img"));
        let modes = [
            ("", 0o700),
            (".stillframe", 0o700),
            (".stillframe/status.json", 0o400),
            ("vm", 0o700),
            ("vm/live.img", 0o600),
            ("vm/snapshots", 0o700),
            ("vm/snapshots/a.img", 0o400),
            ("vm/clones/c.img", 0o600),
            ("vm/diffs/a..live.json", 0o400),
        ];
        for (name, mode) in modes {
            let meta = fs::metadata(rig.mnt().join(name)).unwrap();
            assert_eq!((meta.mode() & 0o7777, meta.uid()), (mode, 0), "{name}");
        }
        private_store(&rig.store());
        turned_away(&rig);
        // It was not for want of a program that they failed. (The first and the last may nobody; what the
        // second removes, others need.)
        let left_out = ["chmod", "rm", "truncate"];
        for deed in &deeds {
            if !left_out.iter().any(|word| deed.starts_with(word)) {
                let out = as_user((0, 0), deed);
                let said = String::from_utf8_lossy(&out.stderr).into_owned();
                assert!(out.status.success(), "{deed}: {said}");
            }
        }
        rig.umount();
        private_store(&rig.store());
    }
}

/// Everything in a store is its owner's alone.
fn private_store(at: &Path) {
    let meta = fs::symlink_metadata(at).unwrap();
    let mode = if meta.is_dir() { 0o700 } else { 0o600 };
    // sled makes its own files; the directory above keeps others out.
    let ours = !at.components().any(|c| c.as_os_str() == "map") || at.ends_with("map");
    if ours {
        assert_eq!(meta.mode() & 0o777, mode, "{}", at.display());
    }
    assert_eq!(
        meta.mode() & if ours { 0o077 } else { 0o022 },
        0,
        "{}",
        at.display()
    );
    if meta.is_dir() {
        for entry in fs::read_dir(at).unwrap() {
            private_store(&entry.unwrap().path());
        }
    }
}

/// A stranger who reaches the socket all the same is told to go by who he is, not by a mode.
fn turned_away(rig: &Rig) {
    let socket = rig.store().join("control.sock");
    assert!(fs::metadata(&socket).unwrap().file_type().is_socket());
    let hidden = as_user(STRANGER, &format!("ls {}", rig.store().display()));
    assert!(!hidden.status.success());
    for (path, mode) in [(rig.store(), 0o755), (socket.clone(), 0o666)] {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }
    let program = rig.at("program");
    if !program.exists() {
        // By another process: a descriptor of ours that a child has would keep it from being run.
        must("cp", &[BINARY, program.to_str().unwrap()]);
        fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    }
    let script = format!(
        "{} --store {} snapshot list",
        program.display(),
        rig.store().display()
    );
    let out = as_user(STRANGER, &script);
    refused(&out, 9);
    for (path, mode) in [(rig.store(), 0o700), (socket, 0o600)] {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }
}

/// Row 24: any bytes as a name, through the command line, the socket and the mount: refused or taken as
/// they stand, never half understood; nothing but plain text comes back; and the daemon serves on.
#[test]
fn names_of_any_bytes_do_no_harm() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    touch(&rig.snapshot("vm", "first")).unwrap();
    let seed = setting("STILLFRAME_NAMES_SEED", 7);
    let rounds = setting("STILLFRAME_NAMES", 150);
    println!("seed {seed}, {rounds} names");
    let mut chance = Chance(seed);
    let mut names: Vec<Vec<u8>> = [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/",
        "-x",
        "--help",
        "-",
        "a b",
        "a\tb",
        "a\nb",
        "\x1b[31mred",
        "\u{202e}gpj",
        "\u{e4}",
        "live",
        "a..b",
        "a@b",
        "..",
        ".hidden",
        "first",
        "%s%n",
        "$(id)",
        "`id`",
        "'\"\\",
        "*",
        "a\r",
        "con",
        "a.img",
        "first.img",
    ]
    .map(|name| name.as_bytes().to_vec())
    .to_vec();
    names.extend([200, 201, 255, 256, 5000].map(|len| vec![b'n'; len]));
    names.extend([
        b"\xff\xfe".to_vec(),
        b"a\x80".to_vec(),
        b"\xed\xa0\x80".to_vec(),
    ]);
    for _ in 0..rounds {
        let len = chance.below(12) + 1;
        let plain = chance.below(3) == 0;
        let byte = |chance: &mut Chance| match plain {
            true => b"abcXYZ019._+:-@/ "[chance.below(17) as usize],
            false => chance.below(255) as u8 + 1,
        };
        names.push((0..len).map(|_| byte(&mut chance)).collect());
    }
    let (mut taken, mut refusals) = (0, 0);
    for (i, name) in names.iter().enumerate() {
        let good = is_name(name);
        let text = std::ffi::OsString::from_vec([b"vm@".to_vec(), name.clone()].concat());
        // The mount.
        let path = rig
            .mnt()
            .join("vm/snapshots")
            .join(Path::new(&std::ffi::OsString::from_vec(
                [name.clone(), b".img".to_vec()].concat(),
            )));
        let one = !name.is_empty() && !name.contains(&b'/');
        if one && name != b"first" {
            match touch(&path) {
                Ok(()) => {
                    assert!(good, "{name:?} was taken");
                    fs::remove_file(&path).unwrap();
                    taken += 1;
                }
                Err(e) => {
                    let why = e.raw_os_error().unwrap();
                    assert!(!good, "{name:?} was refused: {e}");
                    assert!(
                        [libc::EINVAL, libc::ENAMETOOLONG].contains(&why),
                        "{name:?}: {e}"
                    );
                    refusals += 1;
                }
            }
        }
        // The command line: some of them, each is a process.
        if i < 40 || i % 8 == 0 {
            let out = rig
                .command(&["snapshot", "create"])
                .arg("--")
                .arg(&text)
                .output();
            let out = out.unwrap();
            plain_output(&out, name);
            if out.status.success() {
                assert!(good, "{name:?} was taken");
                let listed = rig.ok(&["snapshot", "list", "--json"]);
                assert!(listed.contains(std::str::from_utf8(name).unwrap()));
                let deleted = rig
                    .command(&["snapshot", "delete"])
                    .arg("--")
                    .arg(&text)
                    .output();
                assert!(deleted.unwrap().status.success());
            } else {
                assert!(!good || name == b"first", "{name:?}");
            }
        }
        // The socket, past all checks of the command line.
        let request = serde_json::json!({
            "do": "snapshot-delete",
            "volume": "vm",
            "name": String::from_utf8_lossy(name),
            "keep_bookmark": false,
        });
        if name != b"first" {
            let answer = ask(&rig, &request);
            assert!(answer.starts_with("{\"error\":"), "{name:?}: {answer}");
            let plain = |b: u8| (0x20..0x7f).contains(&b);
            assert!(answer.trim_end().bytes().all(plain), "{answer:?}");
        }
    }
    println!("{taken} taken, {refusals} refused by the mount");
    assert!(taken > 5 && refusals > 50);
    let report = status(&rig);
    let left = report["volumes"][0]["snapshots"].as_array().unwrap();
    assert_eq!(left.len(), 1);
    assert!(fs::read(rig.snapshot("vm", "first")).unwrap() == content("disk.img"));
    assert!(!log(&rig).contains('\x1b'));
    rig.umount();
}

/// The rule as documented.
fn is_name(name: &[u8]) -> bool {
    let allowed = |b: &u8| b.is_ascii_alphanumeric() || b"._+:-".contains(b);
    let first = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_';
    let inside = |b: &u8| allowed(b) || *b == b'_';
    name.first().is_some_and(first)
        && name.iter().all(inside)
        && name.len() <= 200
        && !name.windows(2).any(|w| w == b"..")
        && name != b"live"
}

/// Nothing that a terminal would take for a command.
fn plain_output(out: &Output, name: &[u8]) {
    for text in [&out.stdout, &out.stderr] {
        let plain = |b: &u8| (0x20..0x7f).contains(b) || *b == b'\n';
        assert!(text.iter().all(plain), "{name:?}: {:?}", text.as_bstr());
    }
}

trait Shown {
    fn as_bstr(&self) -> String;
}

impl Shown for Vec<u8> {
    fn as_bstr(&self) -> String {
        std::ffi::OsStr::from_bytes(self)
            .to_string_lossy()
            .into_owned()
    }
}

fn ask(rig: &Rig, request: &serde_json::Value) -> String {
    let mut stream = UnixStream::connect(rig.store().join("control.sock")).unwrap();
    stream.write_all(format!("{request}\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Row 26: root has no rights in somebody else's FUSE mount (nor on an NFS with root_squash): a plain refusal,
/// and nothing is left half made.
#[test]
fn root_without_rights_is_told_so() {
    use stillframe::sys::mount::{Unmount, unmount};
    if !can_mount() || !is_root() {
        return;
    }
    struct Foreign(PathBuf);
    impl Drop for Foreign {
        fn drop(&mut self) {
            let _ = unmount(&self.0, Unmount::Lazy);
        }
    }
    let rig = Rig::new();
    let at = rig.at("foreign");
    fs::create_dir(&at).unwrap();
    // The mount's owner is another user, so the kernel lets root not even look.
    let keep = format!(
        "exec 3<>/dev/fuse; mount -i -t fuse -o fd=3,rootmode=40000,user_id=65534,group_id=65534 none {} \
         && exec sleep 1000",
        at.display()
    );
    let mut sh = Command::new("sh");
    let _holder = Running(sh.args(["-c", &keep]).stdin(Stdio::null()).spawn().unwrap());
    let _foreign = Foreign(at.clone());
    eventually("it is mounted", || is_mounted(&at));
    let inside = at.join("store");
    let disk = image(&rig, "disk.img");
    let volume = format!("vm={}", disk.display());
    let mnt = rig.mnt();
    let mnt = mnt.to_str().unwrap();
    let store = |path: &Path, args: &[&str]| {
        let mut command = Command::new(BINARY);
        command.args(args).arg("--store").arg(path);
        command.stdin(Stdio::null()).output().unwrap()
    };
    let denied = |out: &Output| {
        let said = refused(out, 9);
        assert!(said.contains("foreign"), "{said}");
        assert!(!is_mounted(&rig.mnt()) && !rig.store().exists(), "{said}");
    };
    // The store, the source, the mountpoint.
    denied(&store(&inside, &["mount", mnt, "--volume", &volume]));
    denied(&store(&inside, &["snapshot", "list"]));
    let source = format!("vm={}", at.join("disk.img").display());
    denied(&store(&rig.store(), &["mount", mnt, "--volume", &source]));
    let deep = at.join("mnt");
    denied(&store(
        &rig.store(),
        &["mount", deep.to_str().unwrap(), "--volume", &volume],
    ));
}

/// Row 27: somebody who may write where the names of the store and the mountpoint lie swaps links in a loop while
/// root's daemons start and stop there. Nothing is ever made, changed or mounted where his links lead.
#[test]
fn links_that_are_swapped_lead_nowhere() {
    if !can_mount() || !is_root() {
        return;
    }
    let seconds = setting("STILLFRAME_SWAP_SECONDS", 4);
    let rig = Rig::new();
    open_up(&rig);
    let (arena, victim) = (rig.at("arena"), rig.at("victim"));
    for dir in [&arena, &victim] {
        fs::create_dir(dir).unwrap();
    }
    must("chown", &["65534:65534", arena.to_str().unwrap()]);
    // Root's, closed to the attacker, and tempting: he wants root to do something in it.
    fs::set_permissions(&victim, Permissions::from_mode(0o700)).unwrap();
    fs::write(victim.join("precious"), "precious").unwrap();
    fs::create_dir(victim.join("log")).unwrap();
    fs::create_dir(rig.at("lure")).unwrap();
    let before = listing(&victim);
    let script = format!(
        "cd {arena} && mkdir -p mnt && while :; do for name in store mnt; do \
         ln -sfn {victim} link; mv -T $name old.$$ 2>/dev/null; mv -T link $name 2>/dev/null; \
         rm -f $name; mv -T old.$$ $name 2>/dev/null; \
         mv -T $name aside.$$ 2>/dev/null; ln -s {victim} $name 2>/dev/null; rm -f $name; \
         mv -T aside.$$ $name 2>/dev/null; \
         done; done",
        arena = arena.display(),
        victim = victim.display()
    );
    let mut sh = Command::new("sh");
    sh.args(["-c", &script]).uid(STRANGER.0).gid(STRANGER.1);
    sh.stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let attacker = Running(sh.spawn().unwrap());
    eventually("the attacker is at work", || arena.join("mnt").exists());
    let disk = image(&rig, "other.img");
    let volume = format!("vm={}", disk.display());
    let (mnt, store) = (arena.join("mnt"), arena.join("store"));
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut served, mut refusals) = (0, 0);
    // As many as a slow machine needs, too.
    while Instant::now() < end || served + refusals <= 3 {
        let mut command = Command::new("timeout");
        command.args(["--signal=TERM", "20", BINARY, "mount", "--foreground"]);
        command.args([mnt.to_str().unwrap(), "--volume", &volume, "--store"]);
        command.arg(&store).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut daemon = command.spawn().unwrap();
        // He renames the mountpoint, so it is anywhere in the arena.
        let mounts = || {
            let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
            let at = table.lines().filter_map(|l| l.split(' ').nth(4));
            let at = at.filter(|at| at.starts_with(arena.to_str().unwrap()));
            at.map(str::to_owned).collect::<Vec<_>>()
        };
        eventually("it serves or ends", || {
            !mounts().is_empty() || daemon.try_wait().unwrap().is_some()
        });
        if daemon.try_wait().unwrap().is_none() {
            served += 1;
            signal(daemon.id(), "TERM");
            let _ = daemon.wait().unwrap();
        } else {
            refusals += 1;
        }
        for at in mounts() {
            // He may have renamed it under the daemon, which then does not find it.
            let _ = Command::new("umount").args(["-l", &at]).output();
        }
        assert_eq!(listing(&victim), before);
        assert!(!is_mounted(&victim));
    }
    drop(attacker);
    println!("{served} served, {refusals} refused, nothing was touched");
    assert!(served + refusals > 3);
    assert_eq!(fs::read(&disk).unwrap(), content("other.img"));
}

/// Names, sizes, modes and owners of what lies in a directory, and of itself.
fn listing(dir: &Path) -> Vec<(PathBuf, u64, u32, u32, i64)> {
    let mut all = vec![dir.to_owned()];
    all.extend(fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()));
    all.sort();
    let look = |path: PathBuf| {
        let meta = fs::symlink_metadata(&path).unwrap();
        (path, meta.len(), meta.mode(), meta.uid(), meta.mtime_nsec())
    };
    all.into_iter().map(look).collect()
}

/// A link in the place of each of the store's files is refused, not followed, and so is one in the place of the
/// log file.
#[test]
fn links_in_a_store_are_not_followed() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    touch(&rig.snapshot("vm", "a")).unwrap();
    rig.umount();
    let victim = rig.at("victim");
    fs::write(&victim, "precious").unwrap();
    for name in ["superblock", "lock", "home", "ballast", "log", "clones"] {
        let (real, aside) = (rig.store().join(name), rig.at("aside"));
        if !real.exists() {
            continue;
        }
        fs::rename(&real, &aside).unwrap();
        symlink(&victim, &real).unwrap();
        let (mnt, log) = (rig.mnt(), rig.at("daemon.log"));
        let (mnt, log) = (mnt.to_str().unwrap(), log.to_str().unwrap());
        let out = rig.run(&["mount", mnt, "--log", log]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        if out.status.success() {
            // What can be done without is done without.
            assert!(
                ["ballast", "home", "clones"].contains(&name),
                "{name}: {said}"
            );
            rig.ok(&["umount", rig.mnt().to_str().unwrap()]);
        }
        assert_eq!(fs::read(&victim).unwrap(), b"precious", "{name}");
        assert!(!is_mounted(&rig.mnt()), "{name}");
        fs::remove_file(&real).unwrap();
        fs::rename(&aside, &real).unwrap();
    }
    // The socket's name is taken over without following it.
    symlink(&victim, rig.store().join("control.sock")).unwrap();
    rig.mount();
    assert!(fs::read(rig.snapshot("vm", "a")).unwrap() == content("disk.img"));
    assert_eq!(fs::read(&victim).unwrap(), b"precious");
    assert_eq!(vm(&rig)["state"], "active");
    rig.umount();
}

/// Row 23: whatever a guest has in its disk, nothing of it is mounted by us: of mount(2) there is one call,
/// for the mountpoint.
#[test]
fn nothing_in_a_volume_is_ever_mounted() {
    if !can_mount() || !is_root() {
        return;
    }
    if Command::new("strace").arg("-V").output().is_err() {
        crate::rig::skip("strace");
        return;
    }
    let mut rig = Rig::new();
    let disk = rig.source("disk.img", 4 << 20);
    must("mkfs.ext4", &["-q", "-F", disk.to_str().unwrap()]);
    let trace = rig.at("trace");
    let mnt = rig.mnt();
    let mut strace = Command::new("strace");
    strace.args([
        "-f",
        "-qq",
        "-e",
        "trace=mount,move_mount,fsopen,open_tree,mount_setattr",
        "-o",
    ]);
    strace
        .arg(&trace)
        .arg(BINARY)
        .args(["mount", "--foreground"]);
    strace
        .arg(&mnt)
        .arg("--volume")
        .arg(format!("vm={}", disk.display()));
    strace.arg("--store").arg(rig.store());
    strace
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut daemon = Running(strace.spawn().unwrap());
    eventually("it serves", || rig.live("vm").exists());
    touch(&rig.snapshot("vm", "a")).unwrap();
    fs::hard_link(rig.snapshot("vm", "a"), mnt.join("vm/clones/c.img")).unwrap();
    assert_eq!(fs::read(rig.live("vm")).unwrap().len(), 4 << 20);
    rig.ok(&["snapshot", "revert", "vm@a"]);
    rig.ok(&["umount", mnt.to_str().unwrap()]);
    daemon.0.wait().unwrap();
    let calls = fs::read_to_string(&trace).unwrap();
    let calls: Vec<&str> = calls.lines().filter(|l| l.contains('(')).collect();
    assert_eq!(calls.len(), 1, "{calls:?}");
    assert!(calls[0].contains("\"fuse.stillframe\""), "{calls:?}");
    rig.mount();
    rig.umount();
}
