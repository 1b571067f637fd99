//! `stillframe bookmark ...`: points in time from which changes are known and nothing else is kept.

use std::path::Path;

use clap::{Args, Subcommand};

use super::args::{self, SnapshotArg};
use super::out::{self, Align};
use super::work;
use crate::daemon::protocol::{Answer, BookmarkRow, Request};
use crate::daemon::timestamp;
use crate::error::Result;

/// Subcommands.
#[derive(Debug, Clone, Subcommand)]
pub enum BookmarkCommand {
    /// List the bookmarks, oldest first
    List(ListArgs),
    /// Delete a bookmark
    Delete(OneArgs),
}

/// Arguments of `list`.
#[derive(Debug, Clone, Args)]
pub struct ListArgs {
    /// Only of this volume
    #[arg(value_name = "VOL", value_parser = args::checked)]
    pub volume: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// One bookmark.
#[derive(Debug, Clone, Args)]
pub struct OneArgs {
    /// The bookmark
    #[arg(value_name = "VOL@NAME", value_parser = args::snapshot)]
    pub target: SnapshotArg,
}

/// Runs it.
///
/// # Errors
/// See the table of exit codes.
pub fn run(command: &BookmarkCommand, store: &Path) -> Result<()> {
    match command {
        BookmarkCommand::List(args) => {
            let volume = args.volume.clone();
            let rows = match work::perform(store, &Request::BookmarkList { volume }, false)? {
                Answer::Bookmarks(rows) => rows,
                other => return Err(work::unexpected(&other)),
            };
            if args.json {
                out::json(&rows)
            } else {
                out::line(&listing(&rows))
            }
        }
        BookmarkCommand::Delete(OneArgs { target }) => {
            let request = Request::BookmarkDelete {
                volume: target.volume.clone(),
                name: target.name.clone(),
            };
            work::perform(store, &request, false).map(|_| ())
        }
    }
}

/// The bookmarks as a table.
pub fn listing(rows: &[BookmarkRow]) -> String {
    let header = [
        ("BOOKMARK", Align::Left),
        ("TAKEN", Align::Left),
        ("STATE", Align::Left),
        ("SIZE", Align::Right),
    ];
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            vec![
                format!("{}@{}", row.volume, row.name),
                timestamp::brief(&row.time),
                row.state.clone(),
                out::size(row.size),
            ]
        })
        .collect();
    out::table(&header, &cells)
}
