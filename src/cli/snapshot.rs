//! `stillframe snapshot ...`: points in time.

use std::path::Path;

use clap::{Args, Subcommand};

use super::args::{self, SnapshotArg};
use super::out::{self, Align};
use super::work;
use crate::daemon::protocol::{Answer, Request, RevertRow, SnapshotRow};
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
    Delete(DeleteArgs),
    /// Rename a snapshot
    Rename(RenameArgs),
    /// Make the live volume what a snapshot is; takes a snapshot first that undoes it
    Revert(RevertArgs),
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

/// Arguments of `delete`.
#[derive(Debug, Clone, Args)]
pub struct DeleteArgs {
    /// The snapshot
    #[arg(value_name = "VOL@NAME", value_parser = args::snapshot)]
    pub target: SnapshotArg,
    /// Leave a bookmark of its name, from which diffs can still be made
    #[arg(long)]
    pub keep_bookmark: bool,
}

/// Arguments of `revert`.
#[derive(Debug, Clone, Args)]
pub struct RevertArgs {
    /// The snapshot
    #[arg(value_name = "VOL@NAME", value_parser = args::snapshot)]
    pub target: SnapshotArg,
    /// Also while live.img is open for writing: its writers wait, then go on with the reverted volume
    #[arg(long)]
    pub force: bool,
    /// Print JSON: the snapshot that undoes it, and the bytes written
    #[arg(long)]
    pub json: bool,
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
        SnapshotCommand::Delete(DeleteArgs {
            target,
            keep_bookmark,
        }) => ask(Request::SnapshotDelete {
            volume: target.volume.clone(),
            name: target.name.clone(),
            keep_bookmark: *keep_bookmark,
        })
        .map(|_| ()),
        SnapshotCommand::Revert(args) => revert(args, store),
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

fn revert(args: &RevertArgs, store: &Path) -> Result<()> {
    let request = Request::SnapshotRevert {
        volume: args.target.volume.clone(),
        name: args.target.name.clone(),
        force: args.force,
    };
    let done = match work::perform(store, &request, false)? {
        Answer::Reverted(done) => done,
        other => return Err(work::unexpected(&other)),
    };
    if args.json {
        return out::json(&done);
    }
    let RevertRow { undo, written } = &*done;
    out::line(&format!(
        "{} differed and was written; {}@{} undoes it",
        out::size(*written),
        undo.volume,
        undo.name
    ))
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

/// Snapshots of one instant share this; the first digits of an id tell them apart well enough.
fn group(row: &SnapshotRow) -> String {
    let id = row.group.as_deref().unwrap_or("-");
    id.chars().take(8).collect()
}

/// The snapshots as a table.
pub fn listing(rows: &[SnapshotRow]) -> String {
    let header = [
        ("SNAPSHOT", Align::Left),
        ("TAKEN", Align::Left),
        ("STATE", Align::Left),
        ("SIZE", Align::Right),
        ("UNIQUE", Align::Right),
        ("GROUP", Align::Left),
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
                group(row),
            ]
        })
        .collect();
    out::table(&header, &cells)
}
