//! `stillframe volume ...`: what is under protection.

use std::path::Path;

use clap::{Args, Subcommand};

use super::args::{self, NewVolumeArgs, PolicyArgs};
use super::out::{self, Align};
use super::work;
use crate::daemon::protocol::{Answer, NewSize, Request, VolumeRow};
use crate::daemon::timestamp;
use crate::error::{Error, Kind, Result};
use crate::units::escape;

/// Subcommands.
#[derive(Debug, Clone, Subcommand)]
pub enum VolumeCommand {
    /// Put a source under protection
    Add(AddArgs),
    /// List the volumes
    List(ListArgs),
    /// Show one volume
    Show(ShowArgs),
    /// Change the policy for a full thin target
    Set(SetArgs),
    /// Give a volume another size; snapshots keep theirs
    Resize(ResizeArgs),
    /// Declare a changed, unverified or suspect source good as it is
    Accept(NameArgs),
    /// Forget a volume; its source stays as it is
    Remove(NameArgs),
}

/// Arguments of `add`.
#[derive(Debug, Clone, Args)]
pub struct AddArgs {
    /// Name of the volume
    #[arg(value_parser = args::checked)]
    pub name: String,
    /// The raw image
    pub source: String,
    /// Choices.
    #[command(flatten)]
    pub choices: NewVolumeArgs,
}

/// Arguments of `list`.
#[derive(Debug, Clone, Args)]
pub struct ListArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `show`.
#[derive(Debug, Clone, Args)]
pub struct ShowArgs {
    /// Name of the volume
    #[arg(value_parser = args::checked)]
    pub name: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `set`.
#[derive(Debug, Clone, Args)]
pub struct SetArgs {
    /// Name of the volume
    #[arg(value_parser = args::checked)]
    pub name: String,
    /// Policy.
    #[command(flatten)]
    pub policy: PolicyArgs,
}

/// Arguments of `resize`.
#[derive(Debug, Clone, Args)]
pub struct ResizeArgs {
    /// Name of the volume
    #[arg(value_parser = args::checked)]
    pub name: String,
    /// The new size (4096, 64K, 10G), or +SIZE for so much more
    #[arg(value_parser = args::new_size)]
    pub size: NewSize,
}

/// A name alone.
#[derive(Debug, Clone, Args)]
pub struct NameArgs {
    /// Name of the volume
    #[arg(value_parser = args::checked)]
    pub name: String,
}

/// Runs it.
///
/// # Errors
/// See the table of exit codes.
pub fn run(command: &VolumeCommand, store: &Path) -> Result<()> {
    let ask = |request: Request| work::perform(store, &request, false);
    match command {
        VolumeCommand::Add(args) => {
            let source = args::absolute_text(&args.source)?;
            let choices = args.choices.choices();
            let request = Request::VolumeAdd {
                name: args.name.clone(),
                source,
                choices,
            };
            work::perform(store, &request, true).map(|_| ())
        }
        VolumeCommand::List(args) => {
            let rows = rows(ask(Request::VolumeList { name: None })?)?;
            if args.json {
                out::json(&rows)
            } else {
                out::line(&listing(&rows))
            }
        }
        VolumeCommand::Show(args) => {
            let rows = rows(ask(Request::VolumeList {
                name: Some(args.name.clone()),
            })?)?;
            let row = rows.first().ok_or_else(|| {
                Error::new(
                    Kind::NotFound,
                    format!("volume {} was just removed", args.name),
                )
            })?;
            if args.json {
                out::json(row)
            } else {
                out::line(&details(row))
            }
        }
        VolumeCommand::Set(args) => {
            let choices = args.policy.choices();
            if choices == crate::daemon::protocol::Choices::default() {
                return Err(Error::new(
                    Kind::Invalid,
                    "nothing to change; use --on-full or --on-full-wait",
                ));
            }
            ask(Request::VolumeSet {
                name: args.name.clone(),
                choices,
            })
            .map(|_| ())
        }
        VolumeCommand::Resize(args) => ask(Request::VolumeResize {
            name: args.name.clone(),
            size: args.size,
        })
        .map(|_| ()),
        VolumeCommand::Accept(args) => ask(Request::VolumeAccept {
            name: args.name.clone(),
        })
        .map(|_| ()),
        VolumeCommand::Remove(args) => ask(Request::VolumeRemove {
            name: args.name.clone(),
        })
        .map(|_| ()),
    }
}

fn rows(answer: Answer) -> Result<Vec<VolumeRow>> {
    match answer {
        Answer::Volumes(rows) => Ok(rows),
        other => Err(work::unexpected(&other)),
    }
}

/// The volumes as a table.
pub fn listing(rows: &[VolumeRow]) -> String {
    let header = [
        ("NAME", Align::Left),
        ("STATE", Align::Left),
        ("SIZE", Align::Right),
        ("SNAPSHOTS", Align::Right),
        ("USED", Align::Right),
        ("SOURCE", Align::Left),
    ];
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            vec![
                row.name.clone(),
                row.state.clone(),
                out::size(row.size),
                row.snapshots.len().to_string(),
                out::size(row.used),
                row.source.clone(),
            ]
        })
        .collect();
    out::table(&header, &cells)
}

fn details(row: &VolumeRow) -> String {
    let policy = args::policy_name(row.on_full);
    let state = match &row.reason {
        Some(why) => format!("{} ({})", row.state, super::exit::safe(why)),
        None => row.state.clone(),
    };
    let lines = [
        ("name", row.name.clone()),
        ("uuid", row.uuid.clone()),
        ("source", escape(&row.source)),
        ("state", state),
        (
            "size",
            format!("{} ({} bytes)", out::size(row.size), row.size),
        ),
        ("grain", out::size(row.grain)),
        (
            "when full",
            format!("{policy} after {} s", row.on_full_wait),
        ),
        ("added", timestamp::brief(&row.added)),
        ("snapshots", row.snapshots.len().to_string()),
        ("clones", row.clones.len().to_string()),
        ("bookmarks", row.bookmarks.len().to_string()),
        ("used", out::size(row.used)),
        ("reclaimable", out::size(row.reclaimable)),
    ];
    let text: Vec<String> = lines
        .iter()
        .map(|(key, value)| format!("{key:<12}{value}"))
        .collect();
    text.join("\n")
}
