//! What a run is asked to do: arguments, else environment, else defaults.

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Parser;

use super::contender::OURS;

#[derive(Parser)]
#[command(
    name = "cargo bench --bench peers --",
    about = "Stillframe and its peers, the same work in turns"
)]
struct Arguments {
    /// Rows whose name holds one of these; all by default
    rows: Vec<String>,
    /// Everything on a few MiB, in seconds: shows that it works, judges nothing
    #[arg(long, env = "STILLFRAME_PEERS_SMALL")]
    small: bool,
    /// Size of a source [default: 1G, small: 8M]
    #[arg(long, env = "STILLFRAME_PEERS_SIZE", value_parser = stillframe::cli::args::size)]
    size: Option<u64>,
    /// How often everything is measured [default: 7, small: 1]
    #[arg(long, env = "STILLFRAME_PEERS_ROUNDS")]
    rounds: Option<usize>,
    /// Extents of the large store; a million need 10 GB of disk [default: 1000000, small: 2000]
    #[arg(long, env = "STILLFRAME_PEERS_EXTENTS")]
    extents: Option<u64>,
    /// Where sources, stores and mountpoints are made, and removed [default: target/tmp]
    #[arg(long, env = "STILLFRAME_PEERS_DIR")]
    dir: Option<PathBuf>,
    /// Where peers.json and peers.svg are written [default: target/peers, small: target/peers-small]
    #[arg(long, env = "STILLFRAME_PEERS_OUT")]
    out: Option<PathBuf>,
    /// Depth 16 by threads of this program also where fio is installed
    #[arg(long, env = "STILLFRAME_PEERS_NO_FIO")]
    no_fio: bool,
    /// In what pieces sources are made that are to be written to; decides how their page cache is cut up
    #[arg(long, env = "STILLFRAME_PEERS_PIECES", default_value = "4K", value_parser = stillframe::cli::args::size)]
    pieces: u64,
    /// Only contenders whose name holds this, and ours; may be given several times
    #[arg(long, value_name = "NAME")]
    who: Vec<String>,
    /// Name the rows and end
    #[arg(long)]
    list: bool,
    /// What cargo says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

pub struct Options {
    pub rows: Vec<String>,
    who: Vec<String>,
    pub small: bool,
    pub size: u64,
    pub rounds: usize,
    pub extents: u64,
    pub pieces: u64,
    pub dir: PathBuf,
    pub out: PathBuf,
    pub fio: bool,
    pub list: bool,
}

impl Options {
    /// Reads them; ends the process on wrong usage.
    pub fn read() -> Options {
        let arguments = Arguments::parse();
        let small = arguments.small;
        let least = 4 << 20;
        let size = arguments
            .size
            .unwrap_or(if small { 8 << 20 } else { 1 << 30 });
        let dir = arguments
            .dir
            .unwrap_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")));
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent();
        let out =
            target
                .expect("it lies in target")
                .join(if small { "peers-small" } else { "peers" });
        let out = arguments.out.unwrap_or(out);
        Options {
            rows: arguments.rows,
            who: arguments.who,
            small,
            size: size.max(least).next_multiple_of(1 << 20),
            rounds: arguments.rounds.unwrap_or(if small { 1 } else { 7 }).max(1),
            extents: arguments
                .extents
                .unwrap_or(if small { 2000 } else { 1_000_000 })
                .max(256),
            // Pages, up to a MiB.
            pieces: arguments.pieces.clamp(4096, 1 << 20).next_power_of_two(),
            dir,
            out,
            fio: !arguments.no_fio && installed("fio"),
            list: arguments.list,
        }
    }

    /// Whether one of these rows is asked for.
    pub fn wants(&self, ids: &[&str]) -> bool {
        let asked = |id: &&str| self.rows.iter().any(|part| id.contains(part.as_str()));
        self.rows.is_empty() || ids.iter().any(asked)
    }

    /// Whether a contender is asked for. Ours always is.
    pub fn measures(&self, name: &str) -> bool {
        let asked = |part: &String| name.contains(part.as_str());
        self.who.is_empty() || name.starts_with(OURS) || self.who.iter().any(asked)
    }

    /// How depth 16 is driven.
    pub fn driver(&self) -> &'static str {
        match self.fio {
            true => "fio libaio",
            false => "threads",
        }
    }
}

/// Whether a program can be started.
pub fn installed(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok()
}
