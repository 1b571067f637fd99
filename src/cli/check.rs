//! `stillframe check`: opens a store offline, recovers it, and says what is wrong with it.
//!
//! It judges the catalogue, the log and the map, not every preserved byte: those are verified
//! against their checksums when they are read.

use std::path::Path;

use clap::Args;
use serde::Serialize;

use super::{exit, interrupt, out, work};
use crate::daemon::protocol::{Report, VolumeRow};
use crate::daemon::status::{self, Place};
use crate::daemon::store;
use crate::error::Result;

/// Arguments.
#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    /// Drop the extent map and rebuild it from the log
    #[arg(long)]
    pub rebuild_map: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What was found.
#[derive(Debug, Serialize)]
struct Finding {
    /// `volume` or `snapshot`.
    what: &'static str,
    /// `VOL` or `VOL@NAME`.
    name: String,
    /// Its state.
    state: String,
    /// Why.
    reason: Option<String>,
}

#[derive(Debug, Serialize)]
struct Outcome {
    map_rebuilt: bool,
    findings: Vec<Finding>,
    report: Report,
}

/// Runs it; returns the exit code.
///
/// # Errors
/// `Locked` while a daemon or another command has the store; `Damaged` for a store that cannot be
/// opened.
pub fn run(args: &CheckArgs, at: &Path) -> Result<u8> {
    let _guard = interrupt::guard();
    let held = store::hold(at, false)?;
    let place = Place {
        store: held.dir().path().to_owned(),
        mountpoint: None,
    };
    if args.rebuild_map {
        held.drop_map()?;
    }
    let store = held.open()?;
    let report = status::report(store.engine(), &place);
    let report = work::finish(store, Ok(report))?;
    let findings: Vec<Finding> = report.volumes.iter().flat_map(findings).collect();
    let code = verdict(&findings);
    let outcome = Outcome {
        map_rebuilt: args.rebuild_map,
        findings,
        report,
    };
    if args.json {
        out::json(&outcome)?
    } else {
        out::line(&text(&outcome))?
    }
    Ok(code)
}

fn findings(volume: &VolumeRow) -> Vec<Finding> {
    let own = (volume.state != "active").then(|| Finding {
        what: "volume",
        name: volume.name.clone(),
        state: volume.state.clone(),
        reason: volume.reason.clone(),
    });
    let point = |what, name: String, state: &String, reason: &Option<String>| {
        (state != "active").then(|| Finding {
            what,
            name,
            state: state.clone(),
            reason: reason.clone(),
        })
    };
    let at = |name: &str| format!("{}@{name}", volume.name);
    let snapshots = volume.snapshots.iter();
    let snapshots = snapshots.filter_map(|s| point("snapshot", at(&s.name), &s.state, &s.reason));
    let clones = volume.clones.iter().filter_map(|c| {
        let name = format!("{}/{}", volume.name, c.name);
        point("clone", name, &c.state, &c.reason)
    });
    let marks = volume.bookmarks.iter();
    let marks = marks.filter_map(|b| point("bookmark", at(&b.name), &b.state, &b.reason));
    own.into_iter()
        .chain(snapshots)
        .chain(clones)
        .chain(marks)
        .collect()
}

/// A failed snapshot, clone or bookmark, a doubtful source and a resize or revert that could not be
/// finished are damage (7), a source that could not be looked at makes
/// the check incomplete (3), one that is only unverified is a remark.
fn verdict(findings: &[Finding]) -> u8 {
    let any = |states: &[&str]| findings.iter().any(|f| states.contains(&f.state.as_str()));
    if any(&["failed", "changed", "suspect", "unfinished"]) {
        return exit::code(crate::error::Kind::Damaged);
    }
    if any(&["missing"]) {
        return exit::INCOMPLETE;
    }
    exit::DONE
}

fn text(outcome: &Outcome) -> String {
    let report = &outcome.report;
    let snapshots: usize = report.volumes.iter().map(|v| v.snapshots.len()).sum();
    let mut lines = vec![format!(
        "store {}: opens; {} volumes, {snapshots} snapshots, log {}",
        report.store,
        report.volumes.len(),
        report.log_bytes.map_or("?".to_owned(), out::size)
    )];
    if outcome.map_rebuilt {
        lines.push("the extent map was rebuilt from the log".to_owned());
    }
    for f in &outcome.findings {
        let why = f.reason.as_deref().unwrap_or("no reason is recorded");
        lines.push(exit::safe(&format!(
            "{} {} is {}: {why}",
            f.what, f.name, f.state
        )));
    }
    if outcome.findings.is_empty() {
        lines.push("nothing is wrong".to_owned());
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_finding_decides() {
        let finding = |state: &str| Finding {
            what: "volume",
            name: "x".into(),
            state: state.into(),
            reason: None,
        };
        assert_eq!(verdict(&[]), 0);
        assert_eq!(verdict(&[finding("unverified")]), 0);
        assert_eq!(verdict(&[finding("unverified"), finding("missing")]), 3);
        assert_eq!(verdict(&[finding("missing"), finding("failed")]), 7);
        assert_eq!(verdict(&[finding("changed")]), 7);
        assert_eq!(verdict(&[finding("suspect")]), 7);
    }
}
