//! `stillframe scrub`: reads all preserved content and mends what has a good copy.
//!
//! The daemon of the store does it, at a limited rate and giving way to writers; without one this
//! process does, as fast as it goes. A scrub that was cut off goes on where it was. Exit codes: 0 all
//! that was read is good, 10 something was damaged and is mended, 7 something is damaged.

use std::path::Path;

use clap::Args;

use super::{args, check, exit, out, work};
use crate::daemon::protocol::{Answer, Request, ScrubRow};
use crate::error::{Kind, Result};

/// Arguments.
#[derive(Debug, Clone, Args)]
pub struct ScrubArgs {
    /// Only this volume
    pub volume: Option<String>,
    /// Read only about so many of all preserved blocks
    #[arg(long, value_name = "N%", value_parser = args::percent)]
    pub sample: Option<u32>,
    /// Bytes a second; 0 for as fast as it goes [default: 64 MiB with a daemon, else 0]
    #[arg(long, value_name = "SIZE", value_parser = args::size)]
    pub rate: Option<u64>,
    /// Only look, mend nothing
    #[arg(long)]
    pub no_repair: bool,
    /// Begin anew, also if an earlier scrub was cut off
    #[arg(long)]
    pub restart: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs it; returns the exit code.
///
/// # Errors
/// See the table of exit codes; `Busy` while another scrub runs.
pub fn run(args: &ScrubArgs, store: &Path) -> Result<u8> {
    let request = Request::Scrub {
        volume: args.volume.clone(),
        percent: args.sample.unwrap_or(100),
        rate: args.rate,
        repair: !args.no_repair,
        restart: args.restart,
    };
    let row = match work::perform(store, &request, false)? {
        Answer::Scrubbed(row) => *row,
        other => return Err(work::unexpected(&other)),
    };
    if args.json {
        out::json(&row)?;
    } else {
        out::line(&text(&row))?;
    }
    Ok(match (row.damaged.is_empty(), row.mended) {
        (false, _) => exit::code(Kind::Damaged),
        (true, 0) => exit::DONE,
        (true, _) => exit::REPAIRED,
    })
}

fn text(row: &ScrubRow) -> String {
    let mut lines = vec![format!(
        "{} blocks ({}) read, {} damaged, {} of them mended",
        row.grains,
        out::size(row.bytes),
        row.found,
        row.mended
    )];
    lines.extend(row.damaged.iter().map(|f| exit::safe(&check::line(f))));
    lines.join("\n")
}
