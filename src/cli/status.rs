//! `stillframe status`: everything worth knowing about a store.

use std::path::Path;

use clap::Args;

use super::{bookmark, clone, out, snapshot, volume, work};
use crate::daemon::protocol::{Answer, BookmarkRow, CloneRow, Report, Request, SnapshotRow};
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
    parts.join("\n\n")
}
