//! `stillframe snapshot ...`: points in time.

use std::path::Path;

use clap::{Args, Subcommand};

use super::args::{self, SnapshotArg};
use super::out::{self, Align};
use super::work;
use crate::daemon::protocol::{Answer, Request, SnapshotRow};
use crate::daemon::timestamp;
use crate::error::Result;

/// Subcommands.
#[derive(Debug, Clone, Subcommand)]
pub enum SnapshotCommand {
    /// Take snapshots; several are of one instant
    Create(CreateArgs),
    /// List the snapshots, oldest first
    List(ListArgs),
    /// Delete a snapshot; its space is given back soon after
    Delete(OneArgs),
    /// Rename a snapshot
    Rename(RenameArgs),
    /// Keep a snapshot from being deleted
    Hold(OneArgs),
    /// End a hold
    Release(OneArgs),
}

/// Arguments of `create`.
#[derive(Debug, Clone, Args)]
pub struct CreateArgs {
    /// What to take, and how to call it
    #[arg(required = true, value_name = "VOL@NAME", value_parser = args::snapshot)]
    pub targets: Vec<SnapshotArg>,
    /// Print what was taken as JSON
    #[arg(long)]
    pub json: bool,
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

/// One snapshot.
#[derive(Debug, Clone, Args)]
pub struct OneArgs {
    /// The snapshot
    #[arg(value_name = "VOL@NAME", value_parser = args::snapshot)]
    pub target: SnapshotArg,
}

/// Arguments of `rename`.
#[derive(Debug, Clone, Args)]
pub struct RenameArgs {
    /// The snapshot
    #[arg(value_name = "VOL@NAME", value_parser = args::snapshot)]
    pub target: SnapshotArg,
    /// Its new name
    #[arg(value_name = "NEW", value_parser = args::checked)]
    pub new: String,
}

/// Runs it.
///
/// # Errors
/// See the table of exit codes.
pub fn run(command: &SnapshotCommand, store: &Path) -> Result<()> {
    let ask = |request: Request| work::perform(store, &request, false);
    match command {
        SnapshotCommand::Create(args) => {
            let pairs = args
                .targets
                .iter()
                .map(|t| (t.volume.clone(), t.name.clone()));
            let taken = rows(ask(Request::SnapshotCreate {
                targets: pairs.collect(),
            })?)?;
            if args.json { out::json(&taken) } else { Ok(()) }
        }
        SnapshotCommand::List(args) => {
            let rows = rows(ask(Request::SnapshotList {
                volume: args.volume.clone(),
            })?)?;
            if args.json {
                out::json(&rows)
            } else {
                out::line(&listing(&rows))
            }
        }
        SnapshotCommand::Delete(OneArgs { target }) => ask(Request::SnapshotDelete {
            volume: target.volume.clone(),
            name: target.name.clone(),
        })
        .map(|_| ()),
        SnapshotCommand::Hold(args) => ask(hold(args, true)).map(|_| ()),
        SnapshotCommand::Release(args) => ask(hold(args, false)).map(|_| ()),
        SnapshotCommand::Rename(RenameArgs { target, new }) => ask(Request::SnapshotRename {
            volume: target.volume.clone(),
            name: target.name.clone(),
            new: new.clone(),
        })
        .map(|_| ()),
    }
}

fn hold(OneArgs { target }: &OneArgs, held: bool) -> Request {
    Request::SnapshotHold {
        volume: target.volume.clone(),
        name: target.name.clone(),
        held,
    }
}

fn rows(answer: Answer) -> Result<Vec<SnapshotRow>> {
    match answer {
        Answer::Snapshots(rows) => Ok(rows),
        other => Err(work::unexpected(&other)),
    }
}

/// The snapshots as a table.
pub fn listing(rows: &[SnapshotRow]) -> String {
    let header = [
        ("SNAPSHOT", Align::Left),
        ("TAKEN", Align::Left),
        ("STATE", Align::Left),
        ("SIZE", Align::Right),
        ("UNIQUE", Align::Right),
    ];
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            vec![
                format!("{}@{}", row.volume, row.name),
                timestamp::brief(&row.time),
                match row.held {
                    true => format!("{}, held", row.state),
                    false => row.state.clone(),
                },
                out::size(row.size),
                out::size(row.unique),
            ]
        })
        .collect();
    out::table(&header, &cells)
}
