//! Stillframe against its peers and against the raw file: the same work, in turns, in one run.
//!
//!     cargo bench --bench peers                          all rows; most of an hour, 15 GB of disk
//!     cargo bench --bench peers -- seq rand-read         rows whose name holds one of these
//!     cargo bench --bench peers -- --size 256M --rounds 3
//!     cargo test --bench peers -- --small                everything on a few MiB, in seconds; judges nothing
//!
//! Prints a table of each row as it is done (medians, least and greatest, ratios) and what the ratios must be; writes
//! `peers.json` and `peers.svg`. What each row does, and how to read it, stands in docs/performance.md.
//!
//! Promises: a wrong byte in a snapshot ends the run, and with it its claims; a peer that is not there is named; nothing
//! is left behind, also after a failure or an interrupt (but not after SIGKILL). A ratio that is not reached is no
//! failure. It installs nothing.

#![allow(clippy::unwrap_used, reason = "a measurement fails by panicking")]

mod contender;
mod content;
mod driver;
mod options;
mod plot;
mod report;
#[path = "../../tests/rig/mod.rs"]
mod rig;
mod run;
mod stages;

use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime};

use serde_json::json;

use options::Options;
use run::Run;
use stages::{cow, half, million, pause, plain, race, reads, scale};

type Stage = (&'static [&'static str], fn(&mut Run));

/// The race first: no number counts if it fails.
const STAGES: [Stage; 8] = [
    (&race::IDS, race::measure),
    (&reads::IDS, reads::measure),
    (&half::IDS, half::measure),
    (&cow::IDS, cow::measure),
    (&plain::IDS, plain::measure),
    (&scale::IDS, scale::measure),
    (&pause::IDS, pause::measure),
    (&million::IDS, million::measure),
];

fn main() {
    let options = Options::read();
    if options.list {
        for (ids, _) in STAGES {
            ids.iter().for_each(|id| println!("{id}"));
        }
        return;
    }
    let any = STAGES.iter().any(|(ids, _)| options.wants(ids));
    if !any {
        eprintln!("no row's name holds {:?}; --list names them", options.rows);
        std::process::exit(2);
    }
    if !rig::can_mount() {
        return;
    }
    content::self_test();
    fs::create_dir_all(&options.dir).unwrap();
    let dir = options.dir.canonicalize().unwrap();
    tempfile::env::override_temp_dir(&dir).expect("nobody asked for another before");
    let interrupted = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&interrupted);
    ctrlc::set_handler(move || seen.store(true, Ordering::SeqCst)).unwrap();
    let mut run = Run::new(options, interrupted);
    let begin = Instant::now();
    let machine = machine(&run.options);
    for (name, value) in machine.as_object().expect("it is one") {
        println!("{name}: {}", value.as_str().unwrap_or_default());
    }
    let before = load();
    for (ids, measure) in STAGES {
        // The race is run with any row, if only shortly: a fast row of a wrong program says nothing.
        if ids == race::IDS || run.options.wants(ids) {
            let begin = Instant::now();
            measure(&mut run);
            println!("\n({} to here: {:.1?})", ids[0], begin.elapsed());
        }
    }
    finish(
        &run,
        &machine,
        &format!("{before} before, {} after", load()),
    );
    println!(
        "\nload {before} before, {} after; all in {:.0?}",
        load(),
        begin.elapsed()
    );
}

/// Prints what is claimed of all rows, and writes the files.
fn finish(run: &Run, machine: &serde_json::Value, load: &str) {
    let (options, rows) = (&run.options, &run.rows);
    println!("{}", report::summary(rows, options.small).trim_end());
    if options.small {
        println!(
            "\nA small run: it shows that everything works. None of its numbers means anything."
        );
    }
    for missing in &run.peers.missing {
        println!("\nMISSING {missing}");
    }
    for wrong in &run.wrong {
        println!("\nWRONG BYTES of a peer: {wrong}");
    }
    let seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let whole = json!({
        "machine": machine,
        "seconds_since_1970": seconds.unwrap().as_secs(),
        "load": load,
        "small": options.small,
        "size": options.size,
        "rounds": options.rounds,
        "extents": options.extents,
        "pieces": options.pieces,
        "depth_16_by": options.driver(),
        "missing": run.peers.missing,
        "wrong_bytes_of_peers": run.wrong,
        "rows": rows.iter().map(|row| json!({
            "row": row,
            "claims": row.claims.iter().map(|claim| {
                let ratio = row.ratio(claim);
                json!({ "claim": claim, "measured": ratio, "verdict": report::verdict(claim, ratio, options.small) })
            }).collect::<Vec<_>>(),
        })).collect::<Vec<_>>(),
    });
    fs::create_dir_all(&options.out).unwrap();
    let title = format!(
        "Stillframe and its peers: {} MiB, {} rounds; bars are medians, lines least to greatest",
        options.size >> 20,
        options.rounds
    );
    let json = serde_json::to_string_pretty(&whole).unwrap();
    let svg = plot::draw(rows, &title, options.small);
    for (name, text) in [("peers.json", json), ("peers.svg", svg)] {
        let path = options.out.join(name);
        fs::write(&path, text).unwrap();
        println!("\nwritten: {}", path.display());
    }
}

/// What the numbers belong to.
fn machine(options: &Options) -> serde_json::Value {
    let first = |program: &str, args: &[&str]| -> String {
        let said = Command::new(program).args(args).output();
        let said = said.map(|out| String::from_utf8_lossy(&out.stdout).into_owned());
        said.ok()
            .and_then(|text| text.lines().last().map(str::to_owned))
            .unwrap_or_else(|| "not installed".into())
    };
    let line = |path: &str, name: &str| -> String {
        let text = fs::read_to_string(path).unwrap_or_default();
        let found = text.lines().find(|line| line.starts_with(name));
        let value = found.and_then(|line| line.split_once(':'));
        value.map_or(String::new(), |(_, value)| value.trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let dir = options.dir.to_str().expect("it was made from text");
    json!({
        "processor": format!("{cores} x {}", line("/proc/cpuinfo", "model name")),
        "memory": line("/proc/meminfo", "MemTotal"),
        "kernel": first("uname", &["-sr"]),
        "filesystem": first("findmnt", &["--noheadings", "--output", "FSTYPE,SOURCE", "--target", dir]),
        "qemu-storage-daemon": fs_version("qemu-storage-daemon"),
        "nbdkit": fs_version("nbdkit"),
        "nbdfuse": fs_version("nbdfuse"),
        "depth 16": match options.fio {
            true => fs_version("fio") + ", libaio",
            false => "threads of the benchmark".into(),
        },
    })
}

/// The first line that a program says of its version.
fn fs_version(program: &str) -> String {
    let said = Command::new(program).arg("--version").output();
    let said = said.map(|out| String::from_utf8_lossy(&out.stdout).into_owned());
    let line = said
        .ok()
        .and_then(|text| text.lines().next().map(str::to_owned));
    line.unwrap_or_else(|| "not installed".into())
}

fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap();
    text.split(' ').next().unwrap().to_owned()
}
