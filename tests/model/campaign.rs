//! Campaigns: many seeds, over several runs if need be.
//!
//! Promises: `STILLFRAME_<NAME>_STATES` sets how many states a campaign is to have in all, by default the
//! share that `cargo test` does; `STILLFRAME_<NAME>_SEED` runs one seed alone; with
//! `STILLFRAME_<NAME>_FILE` the seeds done and what they added up to are kept in that file, whole or not
//! at all, and the next run goes on behind them. Seeds are 0, 1, 2..., so a range of them says all. A file
//! of seeds that meant something else is refused.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// What was done, by kind.
#[derive(Default, Clone)]
pub struct Counts {
    pub states: u64,
    pub moments: u64,
    kinds: BTreeMap<String, u64>,
}

impl Counts {
    pub fn add(&mut self, what: &str) {
        self.add_many(what, 1);
    }

    pub fn add_many(&mut self, what: &str, count: u64) {
        match self.kinds.get_mut(what) {
            Some(known) => *known += count,
            None => drop(self.kinds.insert(what.to_owned(), count)),
        }
    }

    pub fn of(&self, what: &str) -> u64 {
        self.kinds.get(what).copied().unwrap_or(0)
    }

    pub fn merge(&mut self, other: &Counts) {
        self.states += other.states;
        self.moments += other.moments;
        for (what, count) in &other.kinds {
            self.add_many(what, *count);
        }
    }
}

/// Seeds after which a campaign's file is written.
const CHUNK: u64 = 2;

pub struct Campaign {
    name: &'static str,
    share: u64,
    states: u64,
    seed: Option<u64>,
    file: Option<PathBuf>,
    next_seed: u64,
    /// What a seed of this campaign means; it grows with every change of that.
    meaning: u64,
    pub counts: Counts,
    took_s: f64,
    here: u64,
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

impl Campaign {
    /// The campaign of that name as the environment has it; `share` states without it. `meaning`
    /// changes with what a seed does.
    pub fn of(name: &'static str, share: u64, meaning: u64) -> Campaign {
        let variable = |what: &str| format!("STILLFRAME_{name}_{what}");
        let mut campaign = Campaign {
            name,
            share,
            states: number(&variable("STATES")).unwrap_or(share),
            seed: number(&variable("SEED")),
            file: std::env::var_os(variable("FILE")).map(PathBuf::from),
            next_seed: 0,
            meaning,
            counts: Counts::default(),
            took_s: 0.0,
            here: 0,
        };
        campaign.load();
        campaign
    }

    /// Runs seeds until there are enough states; all processors take part.
    pub fn run(mut self, of_seed: impl Fn(u64) -> Counts + Sync) -> Campaign {
        let start = Instant::now();
        let before = self.counts.states;
        if let Some(seed) = self.seed {
            self.counts.merge(&of_seed(seed));
            self.next_seed = seed + 1;
        }
        let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
        while self.seed.is_none() && self.counts.states < self.states {
            // A chunk is done as a whole, so that the file can say so with one number.
            let (first, end) = (self.next_seed, self.next_seed + CHUNK.max(threads));
            let next = AtomicU64::new(first);
            let work = || {
                let mut counts = Counts::default();
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return counts;
                    }
                    counts.merge(&of_seed(seed));
                }
            };
            std::thread::scope(|scope| {
                let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
                for worker in workers {
                    let done = worker.join().expect("a seed failed; it is named above");
                    self.counts.merge(&done);
                }
            });
            self.next_seed = end;
            self.save();
        }
        self.took_s = start.elapsed().as_secs_f64();
        self.here = self.counts.states - before;
        self
    }

    /// Whether so much was done that every kind must have come up.
    pub fn full_share(&self) -> bool {
        self.seed.is_none() && self.states >= self.share
    }

    /// Whether this is no more than what every test run does.
    pub fn is_default(&self) -> bool {
        self.seed.is_none() && self.file.is_none() && self.states == self.share
    }

    fn load(&mut self) {
        let Some(file) = &self.file else { return };
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return,
            Err(e) => panic!("{}: {e}", file.display()),
        };
        // The first files said nothing of it.
        let mut meaning = 1;
        for line in text.lines() {
            let (number, what) = line.split_once(' ').expect("a number and what it counts");
            let number: u64 = number.parse().expect("a number at the start of each line");
            match what {
                "seeds from 0" => self.next_seed = number,
                "meaning of a seed" => meaning = number,
                "states" => self.counts.states = number,
                "moments" => self.counts.moments = number,
                what => self.counts.add_many(what, number),
            }
        }
        assert_eq!(
            meaning,
            self.meaning,
            "{}: its seeds meant something else (left) than they do now (right): name another file",
            file.display()
        );
    }

    fn save(&self) {
        let Some(file) = &self.file else { return };
        let mut text = format!(
            "{} seeds from 0\n{} meaning of a seed\n{} states\n{} moments\n",
            self.next_seed, self.meaning, self.counts.states, self.counts.moments
        );
        for (what, count) in &self.counts.kinds {
            text += &format!("{count} {what}\n");
        }
        let new = file.with_extension("new");
        std::fs::write(&new, text).expect("the campaign's file can be written");
        std::fs::rename(&new, file).expect("and takes its place");
    }
}

impl fmt::Display for Campaign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = self.here as f64 / self.took_s.max(0.001);
        let seeds = match self.seed {
            Some(seed) => format!("seed {seed}"),
            None => format!("seeds 0..{}", self.next_seed),
        };
        writeln!(
            f,
            "{}: {seeds}, {} moments, {} states, 0 violations; {:.0} s in this run, {rate:.0} states/s",
            self.name, self.counts.moments, self.counts.states, self.took_s
        )?;
        write!(f, "{:?}", self.counts.kinds)
    }
}
