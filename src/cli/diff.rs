//! `stillframe diff`: what changed between two points.

use std::path::Path;

use clap::Args;

use super::args::{self, DiffArg};
use super::out::{self, Align};
use super::work;
use crate::daemon::protocol::{Answer, Request};
use crate::error::Result;
use crate::image::diff::DiffList;

/// Arguments.
#[derive(Debug, Clone, Args)]
pub struct DiffArgs {
    /// From the older snapshot A to the newer B, or to `live`
    #[arg(value_name = "VOL@A..B", value_parser = args::diff)]
    pub target: DiffArg,
    /// Print JSON: every extent in bytes, and whether it is all zero
    #[arg(long)]
    pub json: bool,
}

/// Runs it.
///
/// # Errors
/// See the table of exit codes.
pub fn run(args: &DiffArgs, store: &Path) -> Result<()> {
    let DiffArg { volume, from, to } = args.target.clone();
    match work::perform(store, &Request::Diff { volume, from, to }, false)? {
        Answer::Diff(list) if args.json => out::json(&list),
        Answer::Diff(list) => out::line(&listing(&list)),
        other => Err(work::unexpected(&other)),
    }
}

/// The sum on a line, then the extents as a table, if there are any.
fn listing(list: &DiffList) -> String {
    let changed: u64 = list.extents.iter().map(|e| e.length).sum();
    let sum = format!(
        "{changed} of {} bytes changed, in {} extents",
        list.size,
        list.extents.len()
    );
    if list.extents.is_empty() {
        return sum;
    }
    let header = [
        ("START", Align::Right),
        ("LENGTH", Align::Right),
        ("CONTENT", Align::Left),
    ];
    let content = |zero: bool| if zero { "zero" } else { "data" };
    let cells: Vec<Vec<String>> = list
        .extents
        .iter()
        .map(|e| {
            vec![
                e.start.to_string(),
                e.length.to_string(),
                content(e.zero).to_owned(),
            ]
        })
        .collect();
    format!("{sum}\n{}", out::table(&header, &cells))
}
