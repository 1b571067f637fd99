//! `stillframe clone ...`: writable copies of snapshots and of clones.

use std::path::Path;

use clap::{Args, Subcommand};

use super::args::{self, CloneArg, OriginArg};
use super::out::{self, Align};
use super::work;
use crate::daemon::protocol::{Answer, CloneRow, Origin, Request};
use crate::daemon::timestamp;
use crate::error::Result;

/// Subcommands.
#[derive(Debug, Clone, Subcommand)]
pub enum CloneCommand {
    /// Make a writable clone of a snapshot or of a clone, at once
    Create(CreateArgs),
    /// List the clones, by name
    List(ListArgs),
    /// Delete a clone; its space is given back soon after
    Delete(OneArgs),
    /// Rename a clone
    Rename(RenameArgs),
}

/// Arguments of `create`.
#[derive(Debug, Clone, Args)]
pub struct CreateArgs {
    /// What it is made of: a snapshot (VOL@NAME) or a clone (VOL/CLONE)
    #[arg(value_name = "VOL@NAME|VOL/CLONE", value_parser = args::origin)]
    pub of: OriginArg,
    /// Its name
    #[arg(value_name = "CLONE", value_parser = args::checked)]
    pub name: String,
    /// Print what was made as JSON
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

/// One clone.
#[derive(Debug, Clone, Args)]
pub struct OneArgs {
    /// The clone
    #[arg(value_name = "VOL/CLONE", value_parser = args::clone)]
    pub target: CloneArg,
}

/// Arguments of `rename`.
#[derive(Debug, Clone, Args)]
pub struct RenameArgs {
    /// The clone
    #[arg(value_name = "VOL/CLONE", value_parser = args::clone)]
    pub target: CloneArg,
    /// Its new name
    #[arg(value_name = "NEW", value_parser = args::checked)]
    pub new: String,
}

/// Runs it.
///
/// # Errors
/// See the table of exit codes.
pub fn run(command: &CloneCommand, store: &Path) -> Result<()> {
    let ask = |request: Request| work::perform(store, &request, false);
    match command {
        CloneCommand::Create(CreateArgs { of, name, json }) => {
            let (volume, of) = match of.clone() {
                OriginArg::Snapshot(of) => (of.volume, Origin::Snapshot(of.name)),
                OriginArg::Clone(of) => (of.volume, Origin::Clone(of.name)),
            };
            let name = name.clone();
            let made = rows(ask(Request::CloneCreate { volume, of, name })?)?;
            if *json { out::json(&made) } else { Ok(()) }
        }
        CloneCommand::List(args) => {
            let volume = args.volume.clone();
            let rows = rows(ask(Request::CloneList { volume })?)?;
            if args.json {
                out::json(&rows)
            } else {
                out::line(&listing(&rows))
            }
        }
        CloneCommand::Delete(OneArgs { target }) => ask(Request::CloneDelete {
            volume: target.volume.clone(),
            name: target.name.clone(),
        })
        .map(|_| ()),
        CloneCommand::Rename(RenameArgs { target, new }) => ask(Request::CloneRename {
            volume: target.volume.clone(),
            name: target.name.clone(),
            new: new.clone(),
        })
        .map(|_| ()),
    }
}

fn rows(answer: Answer) -> Result<Vec<CloneRow>> {
    match answer {
        Answer::Clones(rows) => Ok(rows),
        other => Err(work::unexpected(&other)),
    }
}

/// The clones as a table.
pub fn listing(rows: &[CloneRow]) -> String {
    let header = [
        ("CLONE", Align::Left),
        ("CREATED", Align::Left),
        ("STATE", Align::Left),
        ("SIZE", Align::Right),
        ("OWN", Align::Right),
        ("LAYERS", Align::Right),
        ("BASE", Align::Left),
    ];
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            // The base is there, with its content, also when its name is not.
            let base = match (&row.base_name, &row.base) {
                (Some(name), _) => format!("{}@{name}", row.volume),
                (None, Some(_)) => "(deleted)".to_owned(),
                (None, None) => "-".to_owned(),
            };
            vec![
                format!("{}/{}", row.volume, row.name),
                timestamp::brief(&row.created),
                row.state.clone(),
                out::size(row.size),
                out::size(row.own),
                row.layers.to_string(),
                base,
            ]
        })
        .collect();
    out::table(&header, &cells)
}
