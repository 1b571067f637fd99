//! The command line: parses, has the job done, shows the result, ends with a documented code.
//!
//! One file a command; `exit` holds the only table of exit codes, `out` everything that is printed,
//! `work` the choice between the store's daemon and this process. Commands of later versions are
//! absent, not stubbed. It decides nothing about data.

pub mod args;
pub mod bookmark;
pub mod check;
pub mod clone;
pub mod completions;
pub mod demo;
pub mod diff;
pub mod doctor;
pub mod exit;
pub mod interrupt;
pub mod man;
pub mod mount;
pub mod out;
pub mod scrub;
pub mod snapshot;
pub mod status;
pub mod umount;
pub mod volume;
pub mod work;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::daemon::store;
use crate::error::Result;

/// Point-in-time copies of disk volumes, shown as plain files
#[derive(Debug, Parser)]
#[command(name = "stillframe", version, arg_required_else_help = true, after_help = AFTER)]
pub struct Cli {
    /// The store [default: /var/lib/stillframe for root, else ~/.local/state/stillframe]
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "STILLFRAME_STORE",
        hide_env_values = true
    )]
    pub store: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const AFTER: &str = "Exit codes: 0 done, 1 failed, 2 usage, 3 incomplete, 4 not found, \
    5 exists or busy, 6 locked or no daemon, 7 damaged, 8 no space, 9 permission, 10 repaired, 130 interrupted.";

/// Commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a store at a mountpoint; returns when it serves
    Mount(mount::MountArgs),
    /// End a mount; returns when its daemon has ended
    Umount(umount::UmountArgs),
    /// What is under protection
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// Points in time
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
    /// Points in time from which only changes are known
    #[command(subcommand)]
    Bookmark(bookmark::BookmarkCommand),
    /// Writable copies of snapshots
    #[command(subcommand)]
    Clone(clone::CloneCommand),
    /// Show what changed between two points in time
    Diff(diff::DiffArgs),
    /// Show the state of a store
    Status(status::StatusArgs),
    /// Check a store
    Check(check::CheckArgs),
    /// Read and verify all preserved content, and mend what can be mended
    Scrub(scrub::ScrubArgs),
    /// Look for what would keep Stillframe from working; clean stale mounts of ours
    Doctor(doctor::DoctorArgs),
    /// Show the whole loop on a scratch volume, step by step
    Demo(demo::DemoArgs),
    /// Print a completion script
    Completions(completions::CompletionsArgs),
    /// Write the manual pages
    Man(man::ManArgs),
}

/// The program.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // A reader that went away is no failure of ours.
            let _ = match e.use_stderr() {
                true => std::io::Write::write_all(&mut std::io::stderr(), usage(&e).as_bytes()),
                false => e.print(),
            };
            return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(exit::USAGE));
        }
    };
    match run(&cli) {
        Ok(code) => ExitCode::from(code),
        Err(e) if exit::is_broken_pipe(&e) => ExitCode::from(exit::DONE),
        Err(e) => {
            // There is nobody to tell that stderr is closed.
            let _ = std::io::Write::write_all(
                &mut std::io::stderr(),
                format!("{}\n", exit::line(&e)).as_bytes(),
            );
            ExitCode::from(exit::code(e.kind()))
        }
    }
}

/// What the parser says of a wrong line. It repeats arguments as they are; a terminal must not get them so.
fn usage(e: &clap::Error) -> String {
    let text = e.render().to_string();
    let lines = text.lines().map(exit::safe);
    lines.collect::<Vec<_>>().join("\n") + "\n"
}

fn run(cli: &Cli) -> Result<u8> {
    let store = || match &cli.store {
        Some(path) => args::absolute(path),
        None => store::default_path(),
    };
    // The daemon has its own way with signals.
    if !matches!(cli.command, Command::Mount(_)) {
        interrupt::install()?;
    }
    let done = |result: Result<()>| result.map(|()| exit::DONE);
    match &cli.command {
        Command::Mount(args) => done(mount::run(args, &store()?)),
        Command::Umount(args) => done(umount::run(args)),
        Command::Volume(command) => done(volume::run(command, &store()?)),
        Command::Snapshot(command) => done(snapshot::run(command, &store()?)),
        Command::Bookmark(command) => done(bookmark::run(command, &store()?)),
        Command::Clone(command) => done(clone::run(command, &store()?)),
        Command::Diff(args) => done(diff::run(args, &store()?)),
        Command::Status(args) => done(status::run(args, &store()?)),
        Command::Check(args) => check::run(args, &store()?),
        Command::Scrub(args) => scrub::run(args, &store()?),
        Command::Doctor(args) => doctor::run(args, &store()?),
        Command::Demo(args) => done(demo::run(args)),
        Command::Completions(args) => done(completions::run(args)),
        Command::Man(args) => done(man::run(args)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_grammar_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_wrong_argument_reaches_no_terminal_as_it_is() {
        let line = [
            "stillframe",
            "snapshot",
            "create",
            "vm@\u{1b}[31m\t\u{202e}x",
        ];
        let said = usage(&Cli::try_parse_from(line).err().unwrap());
        let plain = |b: u8| (0x20..0x7f).contains(&b) || b == b'\n';
        assert!(
            said.bytes().all(plain) && said.contains("\\u{1b}"),
            "{said:?}"
        );
    }

    #[test]
    fn the_store_may_stand_after_any_subcommand() {
        for line in [
            "stillframe --store /s volume list",
            "stillframe volume --store /s list",
            "stillframe volume list --store /s",
            "stillframe snapshot create a@b --store /s",
            "stillframe status --store=/s",
        ] {
            let cli = Cli::try_parse_from(line.split(' ')).expect(line);
            assert_eq!(cli.store, Some("/s".into()), "{line}");
        }
    }
}
