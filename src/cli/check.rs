//! `stillframe check`: holds everything a store says against everything else it says.
//!
//! A store that is not mounted is audited without a change first. If nothing is wrong, it is then
//! opened as a start would, and its sources are looked at. If something is wrong it is left alone,
//! unless `--repair` was given: then what is certain is mended (the extent map made again, torn and
//! orphaned files removed, damaged content overwritten from a copy with the right checksum), and the
//! store is audited once more, so that what is called repaired is. Where the end of the log is lost it is
//! not opened in any case: a start would go on from what is left, and that is not for a check to decide.
//! A mounted store is audited by its daemon.
//!
//! Exit codes: 0 nothing is wrong, 10 something was and all of it is repaired, 3 a source, or the map on a
//! full disk, could not be looked at, 7 something is wrong.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use super::{args, exit, interrupt, out, work};
use crate::daemon::protocol::{Answer, Checked, Report, Request, VolumeRow};
use crate::daemon::status::{self, Place};
use crate::daemon::store::Held;
use crate::daemon::{client, store};
use crate::error::{Error, Kind, Result};
use crate::volume::audit::{self, Audit, Bytes, Finding, Severity};
use crate::volume::{ScrubOptions, Share};

/// Arguments.
#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    /// Read all preserved content and verify its checksums
    #[arg(long)]
    pub read_data: bool,
    /// Read and verify only about so many of all preserved blocks
    #[arg(long, value_name = "N%", value_parser = args::percent, conflicts_with = "read_data")]
    pub sample: Option<u32>,
    /// Mend what can be mended for certain
    #[arg(long)]
    pub repair: bool,
    /// Drop the extent map and rebuild it from the log
    #[arg(long)]
    pub rebuild_map: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What is printed as JSON; the shape is part of the contract.
#[derive(Debug, Serialize)]
struct Outcome {
    /// Of this shape.
    version: u32,
    /// `offline`, or `online` if the daemon of the store did it.
    mode: &'static str,
    map_rebuilt: bool,
    segments: u64,
    batches: u64,
    grains_needed: u64,
    grains_read: u64,
    findings: Vec<Finding>,
    /// Absent where damage kept the store from being opened.
    report: Option<Report>,
}

impl Outcome {
    fn new(mode: &'static str, audit: Audit) -> Outcome {
        Outcome {
            version: 1,
            mode,
            map_rebuilt: false,
            segments: audit.segments,
            batches: audit.batches,
            grains_needed: audit.grains_needed,
            grains_read: audit.grains_read,
            findings: audit.findings,
            report: None,
        }
    }
}

/// Runs it; returns the exit code.
///
/// # Errors
/// `Locked` while another command has the store, and with `--rebuild-map` while a daemon has; `Damaged`
/// for a store without a usable superblock.
pub fn run(args: &CheckArgs, at: &Path) -> Result<u8> {
    let end = Instant::now() + work::PATIENCE;
    let outcome = loop {
        match store::hold(at, false) {
            Err(e) if e.kind() == Kind::Locked => {
                if !args.rebuild_map
                    && let Some(outcome) = online(args, at)?
                {
                    break outcome;
                }
                // Nobody answers for a daemon that is about to start or stop, and for a command.
                if Instant::now() >= end || (args.rebuild_map && client::connect(at)?.is_some()) {
                    return Err(e);
                }
                thread::sleep(Duration::from_millis(50));
            }
            held => break offline(args, at, held?)?,
        }
    };
    let code = verdict(&outcome.findings);
    if args.json {
        out::json(&outcome)?
    } else {
        out::line(&text(&outcome))?
    }
    Ok(code)
}

fn percent(args: &CheckArgs) -> u32 {
    match args.read_data {
        true => 100,
        false => args.sample.unwrap_or(0),
    }
}

fn online(args: &CheckArgs, at: &Path) -> Result<Option<Outcome>> {
    let Some(mut daemon) = client::connect(at)? else {
        return Ok(None);
    };
    let request = Request::Check {
        percent: percent(args),
        repair: args.repair,
    };
    let Checked {
        audit,
        report,
        map_rebuilt,
    } = match daemon.call(&request, &mut |text| out::progress(text))? {
        Answer::Checked(checked) => *checked,
        other => return Err(work::unexpected(&other)),
    };
    let mut outcome = Outcome::new("online", audit);
    outcome.map_rebuilt = map_rebuilt;
    outcome.findings.retain(|f| f.check != "state");
    outcome.findings.extend(states(&report));
    outcome.report = Some(report);
    Ok(Some(outcome))
}

fn seed() -> u64 {
    let id = std::process::id();
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed();
    now.map_or(0, |t| t.as_nanos() as u64) ^ u64::from(id)
}

fn offline(args: &CheckArgs, at: &Path, held: Held) -> Result<Outcome> {
    let _guard = interrupt::guard();
    let share = Share(percent(args));
    let seed = seed();
    let first = audited(&held, share, seed)?;
    interrupt::check()?;
    if args.rebuild_map && first.keep_map {
        return Err(Error::new(
            Kind::Damaged,
            "a part of the log is lost that the extent map may still know of, so the map is not \
             dropped; bring the log back from a copy of the store, 'stillframe check' names what is lost",
        ));
    }
    let wrong = first
        .findings
        .iter()
        .any(|f| is_wrong(f) && f.check != "state");
    if wrong && (first.end_lost || !(args.repair || args.rebuild_map)) {
        return Ok(Outcome::new("offline", first));
    }
    let rebuild = args.rebuild_map || (args.repair && first.map_to_rebuild);
    if rebuild {
        held.drop_map()?;
    }
    let place = Place {
        store: held.dir().path().to_owned(),
        mountpoint: None,
    };
    let store = held.open()?;
    let scrub = args.repair && first.findings.iter().any(|f| f.check == "payload");
    let mended = match scrub {
        true => {
            let options = ScrubOptions {
                volume: None,
                percent: 100,
                rate: 0,
                repair: true,
                restart: true,
            };
            store.engine().scrub(&options, &mut |_| {}).map(drop)
        }
        false => Ok(()),
    };
    let report = status::report(store.engine(), &place);
    let report = work::finish(store, mended.map(|()| report))?;
    let findings = if rebuild || (wrong && args.repair) {
        // What was read before is read again, and all of it where all of it was scrubbed.
        let share = if scrub { Share::ALL } else { share };
        let held = hold_again(at)?;
        let second = audited(&held, share, seed)?;
        compared(&first, second.findings, rebuild)
    } else {
        first.findings.clone()
    };
    let mut outcome = Outcome::new("offline", Audit { findings, ..first });
    outcome.map_rebuilt = rebuild;
    outcome.findings.retain(|f| f.check != "state");
    outcome.findings.extend(states(&report));
    outcome.report = Some(report);
    Ok(outcome)
}

/// Another command may have it for a moment.
fn hold_again(at: &Path) -> Result<Held> {
    let end = Instant::now() + work::PATIENCE;
    loop {
        match store::hold(at, false) {
            Err(e) if e.kind() == Kind::Locked && Instant::now() < end => {
                thread::sleep(Duration::from_millis(50));
            }
            held => return held,
        }
    }
}

fn audited(held: &Held, share: Share, seed: u64) -> Result<Audit> {
    audit::offline(&held.environment(), share, seed).map_err(|e| match e.kind() {
        // As when it is opened.
        Kind::Unsupported => Error::new(
            Kind::Damaged,
            format!("{}; use the version that wrote the store", e.chain()),
        ),
        _ => e,
    })
}

/// What was found before a repair and what is found after it, each once: what is gone is repaired if it
/// was mended, and stands as it was if it only cannot be seen any more.
fn compared(first: &Audit, after: Vec<Finding>, rebuilt: bool) -> Vec<Finding> {
    let mut all = Vec::new();
    for found in first.findings.iter().filter(|f| is_wrong(f)) {
        let left = after.iter().filter(|f| same(found, f));
        let left: Vec<Bytes> = left.flat_map(|f| f.ranges.clone()).collect();
        let mut gone = found.clone();
        if after.iter().any(|f| same(found, f)) {
            // Of some of its bytes it may be gone.
            gone.ranges = without(&found.ranges, &left);
            if gone.ranges.is_empty() {
                continue;
            }
        }
        gone.repaired = match found.check.as_str() {
            // On a full disk it is made again in memory, which says nothing of what is on the disk.
            "map" | "bitmap" => rebuilt && !after.iter().any(is_unread),
            _ if found.severity == Severity::Warning => true,
            // Of what has failed meanwhile nothing is read any more.
            "payload" => !first.keep_map,
            _ => false,
        };
        if gone.repaired || left.is_empty() {
            all.push(gone);
        }
    }
    all.extend(after);
    all
}

/// The parts of `all` that are in none of `taken`.
fn without(all: &[Bytes], taken: &[Bytes]) -> Vec<Bytes> {
    let mut taken: Vec<(u64, u64)> = taken
        .iter()
        .map(|t| (t.start, t.start + t.length))
        .collect();
    taken.sort_unstable();
    // Disjoint, so that their ends ascend, too.
    taken.dedup_by(|next, last| {
        let joins = next.0 <= last.1;
        if joins {
            last.1 = last.1.max(next.1);
        }
        joins
    });
    let mut rest = Vec::new();
    let mut push = |start: u64, end: u64| {
        if start < end {
            let length = end - start;
            rest.push(Bytes { start, length });
        }
    };
    for run in all {
        let (mut at, end) = (run.start, run.start + run.length);
        let first = taken.partition_point(|&(_, end)| end <= at);
        for &(from, to) in taken[first..].iter().take_while(|&&(from, _)| from < end) {
            push(at, from);
            at = to;
        }
        push(at, end);
    }
    rest
}

/// Whether two findings are of the same thing.
fn same(a: &Finding, b: &Finding) -> bool {
    (&a.check, &a.what, &a.name, &a.state) == (&b.check, &b.what, &b.name, &b.state)
}

fn is_wrong(finding: &Finding) -> bool {
    finding.severity != Severity::Note && !finding.repaired
}

/// What the served state says is wrong.
fn states(report: &Report) -> Vec<Finding> {
    report.volumes.iter().flat_map(states_of).collect()
}

fn states_of(volume: &VolumeRow) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut add = |what: &str, name: String, state: &str, why: &Option<String>, advice: &str| {
        if state == "active" {
            return;
        }
        let severity = match state {
            "unverified" => Severity::Note,
            "missing" => Severity::Warning,
            _ => Severity::Damage,
        };
        let mut finding = Finding::new(severity, "state", what, &name, state).advise(advice);
        finding.reason.clone_from(why);
        findings.push(finding);
    };
    let advice = match volume.state.as_str() {
        "changed" => "compare the source with its backup, then 'stillframe volume accept'",
        "suspect" => "look at the disk, then 'stillframe volume accept'",
        "missing" => "bring the source back to its path",
        "unfinished" => "start again, or ask for the same resize or revert again",
        _ => "nothing",
    };
    add(
        "volume",
        volume.name.clone(),
        &volume.state,
        &volume.reason,
        advice,
    );
    for s in &volume.snapshots {
        let name = format!("{}@{}", volume.name, s.name);
        add("snapshot", name, &s.state, &s.reason, "delete it");
    }
    for c in &volume.clones {
        let name = format!("{}/{}", volume.name, c.name);
        add("clone", name, &c.state, &c.reason, "delete it");
    }
    for b in &volume.bookmarks {
        let name = format!("{}@{}", volume.name, b.name);
        let advice = "delete it; the next backup is a full one";
        add("bookmark", name, &b.state, &b.reason, advice);
    }
    findings
}

/// What could not be looked at, and may be good.
fn is_unread(f: &Finding) -> bool {
    (f.check == "state" && f.state == "missing") || (f.check == "map" && f.state == "unread")
}

/// What is wrong and not repaired is damage (7); what could not be looked at makes the check
/// incomplete (3); what was wrong and is repaired has a code of its own (10); notes are remarks.
fn verdict(findings: &[Finding]) -> u8 {
    let wrong = || findings.iter().filter(|f| is_wrong(f));
    if wrong().any(|f| !is_unread(f)) {
        return exit::code(Kind::Damaged);
    }
    if wrong().any(is_unread) {
        return exit::INCOMPLETE;
    }
    match findings.iter().any(|f| f.repaired) {
        true => exit::REPAIRED,
        false => exit::DONE,
    }
}

fn text(outcome: &Outcome) -> String {
    let mut lines = Vec::new();
    match &outcome.report {
        Some(report) => {
            let snapshots: usize = report.volumes.iter().map(|v| v.snapshots.len()).sum();
            lines.push(format!(
                "store {}: opens; {} volumes, {snapshots} snapshots, log {}",
                report.store,
                report.volumes.len(),
                report.log_bytes.map_or("?".to_owned(), out::size)
            ));
        }
        None => lines.push("the store was not opened and nothing in it was mended".to_owned()),
    }
    lines.push(format!(
        "{} batches in {} segments of the log were read, and {} of {} preserved blocks",
        outcome.batches,
        outcome.segments,
        outcome.grains_read,
        match outcome.grains_needed {
            0 if outcome.grains_read == 0 => "the".to_owned(),
            needed => needed.to_string(),
        }
    ));
    if outcome.map_rebuilt {
        lines.push("the extent map was rebuilt from the log".to_owned());
    }
    for f in &outcome.findings {
        lines.push(exit::safe(&line(f)));
    }
    if !outcome
        .findings
        .iter()
        .any(|f| f.severity != Severity::Note)
    {
        lines.push("nothing is wrong".to_owned());
    }
    lines.join("\n")
}

/// One finding for people.
pub fn line(f: &Finding) -> String {
    let why = f.reason.as_deref().unwrap_or("no reason is recorded");
    let mut line = format!("{} {} is {}: {why}", f.what, f.name, f.state);
    if !f.ranges.is_empty() {
        line.push_str(&format!("; bytes {}", ranges(&f.ranges)));
    }
    match f.repaired {
        true => line.push_str("; repaired"),
        false if f.severity != Severity::Note && !f.advice.is_empty() => {
            line.push_str(&format!("; to do: {}", f.advice));
        }
        false => {}
    }
    line
}

/// The first few of some ranges.
fn ranges(all: &[Bytes]) -> String {
    const SHOWN: usize = 4;
    let mut shown: Vec<String> = all
        .iter()
        .take(SHOWN)
        .map(|r| format!("{}..{}", r.start, r.start + r.length))
        .collect();
    if all.len() > SHOWN {
        shown.push(format!("and {} more", all.len() - SHOWN));
    }
    shown.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_finding_decides() {
        let finding = |state: &str| {
            let severity = match state {
                "unverified" => Severity::Note,
                "missing" => Severity::Warning,
                _ => Severity::Damage,
            };
            Finding::new(severity, "state", "volume", "x", state)
        };
        assert_eq!(verdict(&[]), 0);
        assert_eq!(verdict(&[finding("unverified")]), 0);
        assert_eq!(verdict(&[finding("unverified"), finding("missing")]), 3);
        assert_eq!(verdict(&[finding("missing"), finding("failed")]), 7);
        assert_eq!(verdict(&[finding("changed")]), 7);
        assert_eq!(verdict(&[finding("suspect")]), 7);
        let mut mended = Finding::new(Severity::Damage, "map", "file", "map", "damaged");
        assert_eq!(verdict(std::slice::from_ref(&mended)), 7);
        mended.repaired = true;
        assert_eq!(verdict(std::slice::from_ref(&mended)), 10);
        assert_eq!(verdict(&[mended, finding("failed")]), 7);
    }

    #[test]
    fn only_what_was_mended_is_called_repaired() {
        let finding = |severity, check: &str, name: &str, ranges: &[std::ops::Range<u64>]| {
            Finding::new(severity, check, "snapshot", name, "damaged").at(ranges.iter().cloned())
        };
        let damage = |check, ranges| finding(Severity::Damage, check, "vm@a", ranges);
        let first = |findings| Audit {
            findings,
            ..Audit::default()
        };
        let told =
            |first: &Audit, after: Vec<Finding>, rebuilt| -> Vec<(String, bool, Vec<Bytes>)> {
                let all = compared(first, after, rebuilt).into_iter();
                all.map(|f| (f.check, f.repaired, f.ranges)).collect()
            };
        let bytes = |start, length| Bytes { start, length };
        // Of a damaged piece a part was mended.
        let before = first(vec![damage("payload", &[0..10, 20..30, 40..50])]);
        let after = vec![damage("payload", &[22..24, 40..60])];
        let mended = vec![bytes(0, 10), bytes(20, 2), bytes(24, 6)];
        let left = vec![bytes(22, 2), bytes(40, 20)];
        assert_eq!(
            told(&before, after, false),
            [
                ("payload".into(), true, mended),
                ("payload".into(), false, left)
            ]
        );
        // What is lost is not mended by nobody's knowing of it any more.
        let lost = first(vec![damage("log", &[])]);
        assert_eq!(told(&lost, vec![], true), [("log".into(), false, vec![])]);
        let map = first(vec![damage("map", &[0..1, 2..3])]);
        assert!(told(&map, vec![], true)[0].1);
        assert!(!told(&map, vec![], false)[0].1);
        // Nothing is read of what has failed meanwhile.
        let failed = Audit {
            keep_map: true,
            ..first(vec![damage("payload", &[0..1, 2..3])])
        };
        assert!(!told(&failed, vec![], false)[0].1);
        // On a full disk the new one is in memory only, and the old one's place is not looked at.
        let unread = Finding::new(Severity::Warning, "map", "file", "map", "unread");
        assert_eq!(verdict(std::slice::from_ref(&unread)), exit::INCOMPLETE);
        assert!(!told(&map, vec![unread], true)[0].1);
        // Notes are of their time.
        let torn = first(vec![finding(Severity::Note, "log", "log/1", &[])]);
        assert_eq!(told(&torn, vec![], true), []);
    }

    #[test]
    fn a_line_names_the_bytes() {
        let f = Finding::new(Severity::Damage, "payload", "snapshot", "vm@a", "damaged")
            .because("rot")
            .at([4096..8192, 0..1, 2..3, 4..5, 6..7])
            .advise("delete it");
        assert_eq!(
            line(&f),
            "snapshot vm@a is damaged: rot; bytes 4096..8192, 0..1, 2..3, 4..5, and 1 more; \
             to do: delete it"
        );
    }
}
