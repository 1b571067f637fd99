//! `stillframe completions`: completion scripts for a shell.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, out};
use crate::error::{Error, Kind, Result};

/// Arguments.
#[derive(Debug, Clone, Args)]
pub struct CompletionsArgs {
    /// Which shell
    pub shell: Shell,
}

/// Runs it.
///
/// # Errors
/// `Io`.
pub fn run(args: &CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "stillframe", &mut script);
    let script = String::from_utf8(script)
        .map_err(|e| Error::with_source(Kind::Failed, "cannot render the script", e))?;
    out::line(script.trim_end())
}
