//! `stillframe man`: the manual pages, one a command.

use std::path::PathBuf;

use clap::{Args, CommandFactory};

use super::Cli;
use crate::daemon::status::shown;
use crate::error::{IoContext, Result};

/// Arguments.
#[derive(Debug, Clone, Args)]
pub struct ManArgs {
    /// Directory to write them to
    pub dir: PathBuf,
}

/// Runs it.
///
/// # Errors
/// `NotFound`, `Permission`, `NoSpace`, `Io`.
pub fn run(args: &ManArgs) -> Result<()> {
    let context = || format!("cannot write manual pages to {}", shown(&args.dir));
    // Asked first: the generator would leave some pages behind before it noticed.
    std::fs::read_dir(&args.dir).context(context)?;
    clap_mangen::generate_to(Cli::command(), &args.dir).context(context)
}
