//! A run: its options, its rows, and turns.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tempfile::TempDir;

use super::contender::{Contender, OURS, Peers, RAW};
use super::driver;
use super::options::Options;
use super::report::{Row, row_text};

pub struct Run {
    pub options: Options,
    pub peers: Peers,
    pub rows: Vec<Row>,
    /// Peers that returned wrong bytes.
    pub wrong: Vec<String>,
    interrupted: Arc<AtomicBool>,
}

impl Run {
    pub fn new(options: Options, interrupted: Arc<AtomicBool>) -> Run {
        Run {
            options,
            peers: Peers::default(),
            rows: Vec::new(),
            wrong: Vec::new(),
            interrupted,
        }
    }

    /// Says a finished row, and keeps it.
    pub fn done(&mut self, mut row: Row) {
        // Whoever began, the floor and ours stand first.
        row.samples.sort_by_key(|samples| {
            let name = samples.contender.clone();
            (name != RAW, name != OURS, !name.starts_with(OURS), name)
        });
        if row.samples.is_empty() {
            return;
        }
        println!("{}", row_text(&row, self.options.small).trim_end());
        self.rows.push(row);
    }

    /// Names a peer that returned wrong bytes.
    pub fn note_wrong(&mut self, contender: &Contender, when: &str) {
        if contender.wrong > 0 {
            let line = format!(
                "{} returned wrong bytes ({when}, in {} passes)",
                contender.name, contender.wrong
            );
            println!("\nWRONG BYTES of a peer: {line}");
            self.wrong.push(line);
        }
    }

    /// Ends the run in order if somebody asked for that.
    #[track_caller]
    pub fn check_interrupt(&self) {
        assert!(!self.interrupted.load(Ordering::SeqCst), "interrupted");
    }

    /// Whether a row is asked for.
    pub fn wants(&self, id: &str) -> bool {
        self.options.wants(&[id])
    }

    /// Measures everybody once in each round, each round beginning with another, after one round that does not count
    /// (but not with small input). What was written is made durable in between.
    pub fn turns<T>(
        &self,
        contenders: &mut [Contender],
        mut measure: impl FnMut(&mut Contender, usize) -> T,
        mut take: impl FnMut(&'static str, T),
    ) {
        let count = contenders.len();
        let unused = usize::from(!self.options.small);
        for round in 0..self.options.rounds + unused {
            for i in 0..count {
                self.check_interrupt();
                let contender = &mut contenders[(round + i) % count];
                if !self.options.measures(contender.name) {
                    continue;
                }
                let value = measure(contender, round);
                if !self.options.small {
                    driver::settle(&contender.behind);
                }
                if round >= unused {
                    take(contender.name, value);
                }
            }
        }
    }
}

/// A directory for sources, which goes with them.
pub struct Sources {
    dir: TempDir,
}

impl Sources {
    pub fn new() -> Sources {
        let dir = tempfile::Builder::new().prefix("sources-").tempdir();
        Sources { dir: dir.unwrap() }
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join(name)
    }

    /// A source of generation 0, in the page cache.
    pub fn make(&self, name: &str, size: u64) -> PathBuf {
        let path = self.at(name);
        driver::make_source(&path, size, 0..size);
        path
    }

    /// One that is to be written to, in pieces of the size that was asked for.
    pub fn make_for_writes(&self, name: &str, size: u64, options: &Options) -> PathBuf {
        let path = self.at(name);
        driver::make_source_in(options.pieces, &path, size, 0..size);
        path
    }
}
