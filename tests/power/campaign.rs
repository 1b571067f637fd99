//! A campaign: rounds of traces and states, by several workers, resumable.
//!
//! A round is a layout, a history on it, states of that; then one of its states is recovered under the
//! recorder, goes on, and is cut again. A round's seed follows from the campaign's. With a state file a
//! campaign goes on where an earlier run stopped: each line says what one round found.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::crash::Replay;
use crate::disks::Farm;
use crate::filesystems::Layout;
use crate::rig::{Chance, setting};
use crate::trace::{By, Cut, Findings, Trace};
use crate::verify::count;

/// States of each of a round's traces.
const STATES: u64 = 25;
const OPERATIONS: u64 = 120;
const OPERATIONS_AFTER: u64 = 40;

pub fn seed() -> u64 {
    setting("STILLFRAME_POWER_SEED", crate::rig::SEED)
}

pub struct Campaign {
    pub seed: u64,
    rounds: u64,
    end: Option<Instant>,
    file: Option<PathBuf>,
    done: BTreeMap<u64, u64>,
}

impl Campaign {
    /// As the environment says.
    pub fn new() -> Campaign {
        let states = setting("STILLFRAME_POWER_STATES", 300);
        let seconds = setting("STILLFRAME_POWER_SECONDS", u64::MAX);
        let mut campaign = Campaign {
            seed: seed(),
            rounds: states.div_ceil(2 * STATES),
            end: Instant::now().checked_add(Duration::from_secs(seconds.min(1 << 30))),
            file: std::env::var_os("STILLFRAME_POWER_FILE").map(PathBuf::from),
            done: BTreeMap::new(),
        };
        if let Some(file) = &campaign.file {
            match std::fs::read_to_string(file) {
                Ok(text) => campaign.resume(&text),
                Err(_) => std::fs::write(file, format!("seed {}\n", campaign.seed)).unwrap(),
            }
        }
        println!("seed {}", campaign.seed);
        campaign
    }

    /// The state file: `seed N`, then `round N states N violations N` for each round.
    fn resume(&mut self, text: &str) {
        let number = |word: Option<&str>| -> u64 {
            let word = word.expect("a word in the state file");
            word.parse().expect("a number in the state file")
        };
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            match words[0] {
                "seed" => self.seed = number(words.get(1).copied()),
                "round" => {
                    let violations = number(words.get(5).copied());
                    assert_eq!(violations, 0, "an earlier run found: {line}");
                    let states = number(words.get(3).copied());
                    self.done.insert(number(words.get(1).copied()), states);
                }
                other => panic!("the state file says {other}"),
            }
        }
    }

    /// Whether this run did all of the campaign.
    pub fn was_whole(&self) -> bool {
        self.done.is_empty() && self.end.is_none_or(|end| Instant::now() < end)
    }

    /// Does the rounds that are left, until the time is up; what this run found.
    pub fn run(&mut self, workers: u64) -> Findings {
        let left = (0..self.rounds).filter(|round| !self.done.contains_key(round));
        let left = Mutex::new(left.collect::<Vec<u64>>().into_iter());
        let found = Mutex::new(Findings::default());
        let campaign = &*self;
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    let mut farm = Farm::new();
                    while campaign.end.is_none_or(|end| Instant::now() < end) {
                        let Some(round) = left.lock().unwrap().next() else {
                            break;
                        };
                        let findings = campaign.round(&mut farm, round);
                        let mut found = found.lock().unwrap();
                        campaign.note(round, &findings);
                        found.add(findings);
                    }
                });
            }
        });
        let before: u64 = self.done.values().sum();
        let findings = found.into_inner().unwrap();
        println!("states so far: {}", before + findings.states);
        findings
    }

    /// One writer at a time.
    fn note(&self, round: u64, findings: &Findings) {
        let Some(file) = &self.file else { return };
        let mut line = String::new();
        let (states, bad) = (findings.states, findings.violations.len());
        writeln!(line, "round {round} states {states} violations {bad}").expect("it is a string");
        let mut file = std::fs::File::options().append(true).open(file).unwrap();
        file.write_all(line.as_bytes()).unwrap();
    }

    fn round(&self, farm: &mut Farm, round: u64) -> Findings {
        let mut chance = Chance(self.seed ^ round.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let layout = Layout::number(setting("STILLFRAME_POWER_LAYOUT", round));
        let trace = Trace::new(farm, layout, By::Library, chance.next(), |done, _| {
            done >= OPERATIONS
        });
        let mut findings = Findings::default();
        let again = chance.below(STATES);
        let seed = chance.next();
        let kept = states(&trace, farm, &mut chance, &mut findings, again, "history");
        let kept = kept.expect("one of the states");
        // The same state once more, recorded this time.
        match trace.after(farm, kept, seed, OPERATIONS_AFTER) {
            Ok(after) => {
                states(&after, farm, &mut chance, &mut findings, 0, "recovery");
            }
            Err((cut, why)) => trace.report(&cut, &why, &mut findings),
        }
        findings
    }
}

/// Some states of a trace; returns the one of a number.
fn states(
    trace: &Trace,
    farm: &mut Farm,
    chance: &mut Chance,
    findings: &mut Findings,
    keep: u64,
    what: &str,
) -> Option<Cut> {
    let mut replay: Replay<'_> = trace.replay();
    let mut kept = None;
    for (n, at) in trace.cuts(chance, STATES).into_iter().enumerate() {
        replay.advance(at);
        if replay.volatile() > 0 {
            count(&mut findings.counts, "something was not flushed");
        }
        if what == "recovery" && at < trace.opened() {
            count(&mut findings.counts, "cut while it was recovered");
        }
        let cut = trace.cut(&replay, None, chance);
        trace.check(farm, &cut, chance, findings);
        if n as u64 == keep {
            kept = Some(cut);
        }
    }
    for (name, n) in &trace.counts {
        *findings.counts.entry(format!("did: {name}")).or_default() += n;
    }
    kept
}
