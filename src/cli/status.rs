//! `stillframe status`: everything worth knowing about a store.

use std::path::Path;

use clap::Args;

use super::{bookmark, clone, out, snapshot, volume, work};
use crate::daemon::protocol::{
    Answer, BookmarkRow, CloneRow, Report, Request, ScrubRow, SnapshotRow, ThinRow,
};
use crate::daemon::watchdog;
use crate::error::Result;

/// Arguments.
#[derive(Debug, Clone, Args)]
pub struct StatusArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs it.
///
/// # Errors
/// See the table of exit codes.
pub fn run(args: &StatusArgs, store: &Path) -> Result<()> {
    let report = match work::perform(store, &Request::Status {}, false)? {
        Answer::Status(report) => report,
        other => return Err(work::unexpected(&other)),
    };
    if args.json {
        out::json(&report)
    } else {
        out::line(&text(&report))
    }
}

fn text(report: &Report) -> String {
    let served = match (&report.mountpoint, report.pid) {
        (Some(at), Some(pid)) => format!("at {at} (pid {pid})"),
        _ => "not mounted".to_owned(),
    };
    let mut parts = vec![format!(
        "store    {}\nserved   {served}\nversion  {}\nlog      {}",
        report.store,
        report.version,
        report.log_bytes.map_or("?".to_owned(), out::size)
    )];
    if let Some(thin) = &report.thin {
        parts[0].push_str(&thin_lines(thin));
    }
    if report.unanswered {
        parts.push("the store does not answer; something below hangs".to_owned());
    }
    if !report.stuck.is_empty() {
        let lines = report.stuck.iter().map(|row| {
            let text = format!("stuck: {}", watchdog::sentence(row));
            super::exit::safe(&text)
        });
        parts.push(lines.collect::<Vec<_>>().join("\n"));
    }
    if !report.volumes.is_empty() {
        parts.push(volume::listing(&report.volumes));
    }
    let snapshots: Vec<SnapshotRow> = report
        .volumes
        .iter()
        .flat_map(|v| v.snapshots.iter().cloned())
        .collect();
    if !snapshots.is_empty() {
        parts.push(snapshot::listing(&snapshots));
    }
    let of = || report.volumes.iter();
    let clones: Vec<CloneRow> = of().flat_map(|v| v.clones.iter().cloned()).collect();
    if !clones.is_empty() {
        parts.push(clone::listing(&clones));
    }
    let bookmarks: Vec<BookmarkRow> = of().flat_map(|v| v.bookmarks.iter().cloned()).collect();
    if !bookmarks.is_empty() {
        parts.push(bookmark::listing(&bookmarks));
    }
    let reasons: Vec<String> = report
        .volumes
        .iter()
        .filter_map(|v| {
            v.reason
                .as_ref()
                .map(|why| format!("{} is {}: {why}", v.name, v.state))
        })
        .chain(snapshots.iter().filter_map(|s| {
            let why = s.reason.as_ref()?;
            Some(format!("{}@{} is {}: {why}", s.volume, s.name, s.state))
        }))
        .chain(clones.iter().filter_map(|c| {
            let why = c.reason.as_ref()?;
            Some(format!("{}/{} is {}: {why}", c.volume, c.name, c.state))
        }))
        .chain(bookmarks.iter().filter_map(|b| {
            let why = b.reason.as_ref()?;
            Some(format!("{}@{} is {}: {why}", b.volume, b.name, b.state))
        }))
        .map(|line| super::exit::safe(&line))
        .collect();
    if !reasons.is_empty() {
        parts.push(reasons.join("\n"));
    }
    if let Some(line) = scrub_line(&report.scrub) {
        parts[0].push_str(&line);
    }
    let damaged = report.scrub.damaged.iter();
    let damaged: Vec<String> = damaged
        .map(|f| super::exit::safe(&super::check::line(f)))
        .collect();
    if !damaged.is_empty() {
        parts.push(damaged.join("\n"));
    }
    parts.join("\n\n")
}

/// When the last scrub was, and what came of it.
fn scrub_line(scrub: &ScrubRow) -> Option<String> {
    let started = scrub.started.as_ref()?;
    let when = match (&scrub.finished, scrub.running) {
        (_, true) => format!("running since {started}"),
        (Some(finished), _) => format!("ended {finished}"),
        (None, _) => format!("begun {started}, cut off"),
    };
    Some(format!(
        "\nscrub    {when}; {} read, {} damaged blocks, {} mended",
        out::size(scrub.bytes),
        scrub.found,
        scrub.mended
    ))
}

/// What is left, and how long that lasts.
fn thin_lines(thin: &ThinRow) -> String {
    let free = match thin.limit {
        Some(limit) => format!(
            "{}, limit {} (in use {})",
            out::size(thin.free),
            out::size(limit),
            out::size(thin.used)
        ),
        None => out::size(thin.free),
    };
    let Some(growth) = thin.growth_per_hour else {
        return format!("\nfree     {free}");
    };
    let sign = if growth < 0 { "-" } else { "" };
    let mut line = format!(
        "\nfree     {free}\ngrowth   {sign}{} an hour, measured over {}",
        out::size(growth.unsigned_abs()),
        span(thin.measured_seconds)
    );
    if let Some(left) = thin.full_in_seconds {
        line.push_str(&format!("; full in {}", span(left)));
    }
    line
}

/// A time, as coarse as it is uncertain.
fn span(seconds: u64) -> String {
    const MINUTE: u64 = 60;
    const HOUR: u64 = 60 * MINUTE;
    const DAY: u64 = 24 * HOUR;
    match seconds {
        0..MINUTE => format!("{seconds} s"),
        MINUTE..HOUR => format!("{} min", seconds / MINUTE),
        HOUR..DAY => format!("{} h {} min", seconds / HOUR, seconds % HOUR / MINUTE),
        _ if seconds < 1000 * DAY => {
            format!("{} d {} h", seconds / DAY, seconds % DAY / HOUR)
        }
        _ => "more than 1000 d".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_forecast_reads_well() {
        let mut thin = ThinRow {
            used: 3 << 20,
            limit: None,
            free: 1 << 30,
            growth_per_hour: None,
            measured_seconds: 0,
            full_in_seconds: None,
        };
        assert_eq!(
            thin_lines(&thin),
            format!("\nfree     {}", out::size(1 << 30))
        );
        thin.growth_per_hour = Some(1 << 20);
        thin.measured_seconds = 1500;
        thin.full_in_seconds = Some(1024 * 3600);
        let text = thin_lines(&thin);
        assert!(
            text.ends_with("an hour, measured over 25 min; full in 42 d 16 h"),
            "{text}"
        );
        thin.growth_per_hour = Some(-(1 << 20));
        thin.full_in_seconds = None;
        thin.limit = Some(4 << 20);
        let text = thin_lines(&thin);
        assert!(
            text.contains("growth   -1") && !text.contains("full in"),
            "{text}"
        );
        assert!(text.contains("limit 4"), "{text}");
        assert_eq!(span(59), "59 s");
        assert_eq!(span(3 * 3600 + 61), "3 h 1 min");
        assert_eq!(span(u64::MAX), "more than 1000 d");
    }
}
