//! Whether the tests find what they are there to find.
//!
//! Goal: every fault of `stillframe::sys::planted` (the hazards H1 to H17 of docs/testing.md and some of
//! our own) makes a test fail that passes without it; those that are a matter of crash states, of failing I/O
//! or of lying disks within 500 states of seed 0 of the model's campaigns.
//!
//! Method: the test programs are built with the feature `planted` and run with one fault at a time, and once
//! with none, to see that it is the fault which is found. `cargo test --features planted --test planted`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use stillframe::sys::planted::{ALL, Bug};

type Settings = &'static [(&'static str, &'static str)];

/// A test program, the tests of it to run, and its settings with a fault and without any.
struct Finder {
    program: &'static str,
    tests: &'static str,
    settings: Settings,
    sound: Settings,
}

const fn finder(program: &'static str, tests: &'static str) -> Finder {
    Finder {
        program,
        tests,
        settings: &[],
        sound: &[],
    }
}

/// The army, on one thread, so that the number of states does not depend on how many there are.
const ARMY: Finder = Finder {
    program: "model",
    tests: "army::every_state",
    settings: &[("STILLFRAME_ARMY_SEED", "0")],
    sound: &[("STILLFRAME_ARMY_SEED", "0")],
};

/// Failing I/O, every kind in its turn; without a fault the sample that every test run has.
const FAULTS: Finder = Finder {
    program: "model",
    tests: "faults::every_io_may_fail",
    settings: &[("STILLFRAME_FAULTS_SEED", "0")],
    sound: &[],
};

/// Disks that lie.
const BROKEN: Finder = Finder {
    program: "model",
    tests: "broken::a_disk_that_breaks_its_promises",
    settings: &[("STILLFRAME_BROKEN_SEED", "0")],
    sound: &[("STILLFRAME_BROKEN_SEED", "0")],
};

/// Within so many states the army, failing I/O and lying disks find what is theirs.
const SOON: u64 = 500;

/// What finds a fault.
fn finder_of(bug: Bug) -> Finder {
    match bug {
        Bug::UndoUnsynced
        | Bug::IndexUnsynced
        | Bug::NameUnsynced
        | Bug::TailKept
        | Bug::GrainInPart
        | Bug::DiscardUnpreserved
        | Bug::SnapUnflushed
        | Bug::PredecessorUnsynced
        | Bug::FreedBeforeDelete
        | Bug::SecondCache
        | Bug::SourceUnsynced
        | Bug::IntentLost
        | Bug::RevertUnsynced
        | Bug::FailureUnmarked
        | Bug::LayerShared
        | Bug::SweptEarly
        | Bug::DurableEarly
        | Bug::BitmapShort
        | Bug::ShrinkUnpreserved
        | Bug::OverlayUnsynced
        | Bug::ReplayShort
        | Bug::IntentUnread
        | Bug::CleanEarly
        | Bug::SizeUnsynced
        | Bug::RevertUnmeant
        | Bug::OverlayNameUnsynced
        | Bug::SweptAtEpoch
        | Bug::CloneFilesFirst
        | Bug::DiffShort
        | Bug::AppliedFirst
        | Bug::DiscardClean => ARMY,
        Bug::SyncRetried | Bug::SyncErrorForgotten | Bug::CatalogEarly => FAULTS,
        Bug::SumsIgnored => BROKEN,
        Bug::LinkFirst => finder("regressions", "segments_that_a_power_cut_brings_back"),
        Bug::HeadKept => finder("stillframe", "log::tests::without_space_for_a_segment"),
        Bug::AllocatedOnly => finder("bookmarks", "on_a_full_disk_a_bookmark_is_never_wrong"),
        Bug::ReaderTrusts => finder(
            "revert",
            "what_is_cut_off_under_a_reader_is_read_from_the_log",
        ),
        Bug::NoIoFlusher => finder("cli", "the_daemon_s_threads_are_io_flushers"),
    }
}

/// The test programs of this build by name.
fn programs() -> BTreeMap<String, PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["test", "--features", "planted", "--no-run", "--lib"]);
    for name in ["model", "bookmarks", "revert", "cli", "regressions"] {
        build.args(["--test", name]);
    }
    build.arg("--message-format=json").stderr(Stdio::inherit());
    let out = build
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(out.status.success(), "the tests do not build");
    let lines = String::from_utf8(out.stdout).unwrap();
    let found = lines.lines().filter_map(|line| {
        let said: serde_json::Value = serde_json::from_str(line).ok()?;
        let executable = said["executable"].as_str()?;
        let is_test = said["profile"]["test"].as_bool()?;
        let name = said["target"]["name"].as_str()?;
        is_test.then(|| (name.to_owned(), PathBuf::from(executable)))
    });
    found.collect()
}

/// Tests that failed, and in how many states at most, where they are counted.
#[derive(Debug, PartialEq)]
struct Found {
    tests: String,
    states: Option<u64>,
}

/// Runs a finder; what failed, or `None` if all passed.
fn run(programs: &BTreeMap<String, PathBuf>, finder: &Finder, bug: Option<Bug>) -> Option<Found> {
    let mut command = Command::new(&programs[finder.program]);
    command.arg(finder.tests).stdin(Stdio::null());
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    match bug {
        Some(bug) => command
            .env("STILLFRAME_PLANTED", format!("{bug:?}"))
            .envs(finder.settings.iter().copied()),
        None => command
            .env_remove("STILLFRAME_PLANTED")
            .envs(finder.sound.iter().copied()),
    };
    let out = command.output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(
        !said.contains("\nrunning 0 tests"),
        "{}: no test '{}'",
        finder.program,
        finder.tests
    );
    let failed: Vec<&str> = said
        .lines()
        .filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"))
        .collect();
    // Anything else than a test that failed is not a finding.
    assert_eq!(out.status.success(), failed.is_empty(), "{said}");
    let states = said.lines().find_map(|line| {
        let (_, states) = line.split_once(", in the first ")?;
        states.split(' ').next()?.parse().ok()
    });
    let tests = failed.join(", ");
    (!failed.is_empty()).then_some(Found { tests, states })
}

#[test]
fn every_planted_fault_is_found() {
    let programs = programs();
    let mut sound = BTreeMap::new();
    let (mut missed, mut late) = (Vec::new(), Vec::new());
    for bug in ALL {
        let finder = finder_of(bug);
        let without = sound.entry((finder.program, finder.tests));
        let without = without.or_insert_with(|| run(&programs, &finder, None));
        assert_eq!(*without, None, "{} fails without any fault", finder.program);
        let Some(found) = run(&programs, &finder, Some(bug)) else {
            missed.push(bug);
            continue;
        };
        let Found { tests, states } = found;
        match states {
            Some(states) => println!("{bug:?}: {}: {tests}: {states} states", finder.program),
            None => println!("{bug:?}: {}: {tests}", finder.program),
        }
        if finder.program == "model" && states.is_none_or(|states| states > SOON) {
            late.push((bug, states));
        }
    }
    assert!(missed.is_empty(), "not found: {missed:?}");
    assert!(late.is_empty(), "not within {SOON} states: {late:?}");
}
