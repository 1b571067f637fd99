//! Row 30: signals in every phase.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::{content, log, served, vm};
use crate::rig::{
    Chance, Rig, Running, can_mount, ended, eventually, gone, is_mounted, setting, signal, touch,
};

/// Signals that are no reason to end or to stop.
const HARMLESS: [&str; 6] = ["USR1", "PIPE", "TSTP", "TTIN", "TTOU", "XFSZ"];

#[test]
fn harmless_signals_change_nothing() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    for name in HARMLESS {
        signal(rig.pid(), name);
        // Answers, so it was neither ended nor stopped.
        touch(&rig.snapshot("vm", &format!("after-{name}"))).unwrap();
        assert!(!ended(rig.pid()), "{name}");
    }
    signal(rig.pid(), "STOP");
    signal(rig.pid(), "CONT");
    assert!(fs::read(rig.live("vm")).unwrap() == content("disk.img"));
    assert!(log(&rig).contains("are under way"), "USR1");
    rig.umount();
}

/// TERM, INT and HUP end it cleanly, each.
#[test]
fn every_signal_to_end_is_a_clean_stop() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    rig.umount();
    for name in ["TERM", "INT", "HUP"] {
        let mut daemon = Running(rig.spawn());
        eventually("it serves", || rig.live("vm").exists());
        touch(&rig.snapshot("vm", name)).unwrap();
        signal(daemon.0.id(), name);
        assert_eq!(daemon.0.wait().unwrap().code(), Some(0), "{name}");
        assert!(!is_mounted(&rig.mnt()), "{name}");
        rig.mount();
        assert_eq!(vm(&rig)["state"], "active", "a clean stop: {name}");
        rig.umount();
    }
}

/// Any signal at any moment: while it starts, serves under load, takes and deletes snapshots, reverts, stops.
/// Nothing acknowledged is lost, snapshots stay exact, and the next start needs no repair.
#[test]
fn any_signal_at_any_moment() {
    if !can_mount() {
        return;
    }
    let rounds = setting("STILLFRAME_SIGNALS", 8);
    let seed = setting("STILLFRAME_SIGNALS_SEED", 1);
    println!("seed {seed}, {rounds} rounds");
    let mut chance = Chance(seed);
    let mut rig = served();
    touch(&rig.snapshot("vm", "first")).unwrap();
    rig.umount();
    let mut last = 0;
    let (mut clean, mut at_once, mut other) = (0, 0, 0);
    for round in 0..rounds {
        let starting = chance.below(4) == 0;
        let mut daemon = Running(rig.spawn());
        let pid = daemon.0.id();
        let mut sender = Sender::new(pid);
        if !starting {
            eventually("it serves", || rig.live("vm").exists());
        }
        let acknowledged = AtomicU64::new(last);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            if !starting {
                scope.spawn(|| load(&rig, &acknowledged, &over));
                scope.spawn(|| catalogue(&rig, round, &over));
            }
            std::thread::sleep(Duration::from_millis(chance.below(60)));
            for _ in 0..chance.below(3) {
                let names = ["USR1", "PIPE", "TSTP", "STOP", "CONT"];
                sender.send(names[chance.below(5) as usize]);
            }
            sender.send("CONT");
            let end = ["TERM", "INT", "HUP", "QUIT", "USR2", "ALRM"][chance.below(6) as usize];
            sender.send(end);
            if chance.below(3) == 0 {
                std::thread::sleep(Duration::from_millis(chance.below(30)));
                sender.send("TERM");
            }
            if round % 3 > 0 {
                // Else its users are cut off after a few seconds.
                over.store(true, Ordering::Release);
            }
            eventually(&format!("it ends by {end}"), || gone(pid));
            over.store(true, Ordering::Release);
        });
        match daemon.0.wait().unwrap().code() {
            Some(0) => clean += 1,
            Some(130) => at_once += 1,
            _ => other += 1,
        }
        last = acknowledged.into_inner();
        let said = rig.mount();
        assert!(!said.contains("repair"), "{said}");
        let live = fs::read(rig.live("vm")).unwrap();
        let number = u64::from_le_bytes(live[4096..4104].try_into().unwrap());
        // What was under way when it ended may be there or not.
        let first = u64::from_le_bytes(content("disk.img")[4096..4104].try_into().unwrap());
        let fine = number == last || number == last + 1 || last == 0 && number == first;
        assert!(
            fine,
            "round {round}: {number} after {last} was acknowledged"
        );
        if number != first {
            last = number;
        }
        assert!(fs::read(rig.snapshot("vm", "first")).unwrap() == content("disk.img"));
        rig.umount();
        let out = rig.run(&["check"]);
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stdout)
        );
    }
    println!("{clean} clean stops, {at_once} at once, {other} killed");
    assert!(clean > 0 && other > 0, "not all ways to end were met");
}

/// Sends signals without starting a program: that would close copies of this process's descriptors, and wait
/// for the daemon that is stopped.
struct Sender(Running);

impl Sender {
    fn new(pid: u32) -> Sender {
        let mut shell = Command::new("sh");
        let script = format!("while read name; do kill -s $name {pid}; done");
        shell.args(["-c", &script]).stdin(Stdio::piped());
        Sender(Running(shell.stderr(Stdio::null()).spawn().unwrap()))
    }

    fn send(&mut self, name: &str) {
        let mut to = self.0.0.stdin.as_ref().unwrap();
        writeln!(to, "{name}").unwrap();
    }
}

/// Numbers that only grow, one block, until the daemon is gone.
fn load(rig: &Rig, acknowledged: &AtomicU64, over: &AtomicBool) {
    let Ok(live) = std::fs::OpenOptions::new().write(true).open(rig.live("vm")) else {
        return;
    };
    while !over.load(Ordering::Acquire) {
        let next = acknowledged.load(Ordering::Acquire) + 1;
        let mut block = [0; 4096];
        block[..8].copy_from_slice(&next.to_le_bytes());
        if live.write_all_at(&block, 4096).is_err() {
            return;
        }
        acknowledged.store(next, Ordering::Release);
        if next.is_multiple_of(50) && live.sync_all().is_err() {
            return;
        }
    }
}

/// Snapshots come, are reverted to and go, until the daemon is gone.
fn catalogue(rig: &Rig, round: u64, over: &AtomicBool) {
    for i in 0.. {
        let name = format!("s{round}-{i}");
        if over.load(Ordering::Acquire) || touch(&rig.snapshot("vm", &name)).is_err() {
            return;
        }
        let deleted = fs::remove_file(rig.snapshot("vm", &name));
        if deleted.is_err() {
            return;
        }
    }
}

/// Stopped and woken, it goes on where it was. The writers are processes of their own: a descriptor of a
/// stopped daemon's mount in this one would hang every other test that starts a program.
#[test]
fn a_stopped_daemon_goes_on() {
    if !can_mount() {
        return;
    }
    let mut rig = served();
    for i in 0..8 {
        signal(rig.pid(), "STOP");
        let mut dd = Command::new("dd");
        dd.args(["if=/dev/zero", "bs=4096", "count=1", "conv=notrunc,fsync"]);
        dd.arg(format!("seek={i}"))
            .arg(format!("of={}", rig.live("vm").display()));
        let mut writer = Running(dd.stderr(Stdio::null()).spawn().unwrap());
        signal(rig.pid(), "CONT");
        assert!(writer.0.wait().unwrap().success());
    }
    let found = fs::read(rig.live("vm")).unwrap();
    assert!(found[..8 * 4096].iter().all(|&b| b == 0));
    assert!(found[8 * 4096..] == content("disk.img")[8 * 4096..]);
    rig.umount();
}
