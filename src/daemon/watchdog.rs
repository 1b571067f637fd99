//! Notices what hangs, says what and why, and cuts the mount's users off if it was told to.
//!
//! Promises: a request that is older than the limit is named in the log once, with its volume, its age and
//! what it waits for, and once more when it is over; the same can be asked for at any time
//! ([`Watchdog::stuck`]) and comes from memory, so that it is answered while everything else hangs. A
//! writer that waits for space as its volume's policy says is not stuck, nor is who waits for a worker
//! behind such writers; a job that may take long (a revert, a diff, background work) is stuck when it gives
//! no sign of life.
//!
//! It ends nothing by itself unless `abort_after` is set: then the mount is cut off when a request has hung
//! in one call for so long, or when nothing at all has moved for so long.

use std::fs;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::daemon::protocol::StuckRow;
use crate::daemon::ticker::Ticker;
use crate::error::Result;
use crate::sys::watch::{Seen, Stage, Watch};
use crate::units::escape;

/// The limit when nobody chose one, in seconds.
pub const NAMED_AFTER_S: u32 = 30;

/// What is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// From when on a request is named; `None` for never.
    pub named_after: Option<Duration>,
    /// From when on the mount is cut off; `None` for never.
    pub abort_after: Option<Duration>,
}

impl Limits {
    /// Often enough to see either limit pass.
    fn pause(&self) -> Duration {
        let least = self.named_after.into_iter().chain(self.abort_after).min();
        let least = least.unwrap_or(Duration::from_secs(10));
        (least / 8).clamp(Duration::from_millis(50), Duration::from_secs(2))
    }
}

/// Looks at what is under way.
pub struct Watchdog {
    watch: Arc<Watch>,
    limits: Limits,
    /// What was named, by number.
    named: Mutex<Vec<(u64, StuckRow)>>,
}

impl Watchdog {
    /// Makes one; it sleeps until [`Watchdog::start`].
    pub fn new(watch: Arc<Watch>, limits: Limits) -> Arc<Watchdog> {
        Arc::new(Watchdog {
            watch,
            limits,
            named: Mutex::default(),
        })
    }

    /// Has a thread look again and again; `abort` is called once when the mount is to be cut off.
    ///
    /// # Errors
    /// `Io` if the system gives no thread.
    pub fn start(self: &Arc<Watchdog>, abort: impl Fn() + Send + 'static) -> Result<Ticker> {
        let dog = Arc::clone(self);
        let mut aborted = false;
        Ticker::start("watchdog", self.limits.pause(), move || {
            let all = dog.watch.look();
            dog.name(&all);
            if let Some(limit) = dog.limits.abort_after
                && !aborted
                && let Some(seen) = beyond_help(&all, limit)
            {
                tracing::error!(
                    "cutting the users of the mount off: {}",
                    sentence(&dog.row(seen))
                );
                aborted = true;
                abort();
            }
        })
    }

    /// What is stuck now, the oldest first.
    pub fn stuck(&self) -> Vec<StuckRow> {
        let all = self.watch.look();
        self.late(&all).map(|seen| self.row(seen)).collect()
    }

    /// Everything that is under way, in words.
    pub fn under_way(&self) -> Vec<String> {
        let all = self.watch.look();
        all.iter().map(|seen| sentence(&self.row(seen))).collect()
    }

    fn late<'a>(&self, all: &'a [Seen]) -> impl Iterator<Item = &'a Seen> {
        let limit = self.limits.named_after;
        let patient = all.iter().any(|seen| seen.stage == Stage::Patient);
        all.iter()
            .filter(move |seen| limit.is_some_and(|limit| is_late(seen, limit, patient)))
    }

    /// Logs what has become stuck and what is no longer.
    fn name(&self, all: &[Seen]) {
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        named.retain(|(number, row)| {
            let there = all.iter().any(|seen| seen.number == *number);
            if !there {
                tracing::warn!("no longer stuck: {}", subject(row));
            }
            there
        });
        for seen in self.late(all) {
            if named.iter().any(|(number, _)| *number == seen.number) {
                continue;
            }
            let row = self.row(seen);
            tracing::error!("stuck: {}", sentence(&row));
            named.push((seen.number, row));
        }
    }

    fn row(&self, seen: &Seen) -> StuckRow {
        StuckRow {
            operation: seen.what.to_string(),
            subject: match seen.node {
                0 => None,
                node => Some(self.watch.describe(node)),
            },
            seconds: seen.age.as_secs(),
            quiet_seconds: seen.quiet.as_secs(),
            phase: match seen.stage {
                Stage::Queued => "waits for a worker".to_owned(),
                Stage::Patient => "waits for space".to_owned(),
                Stage::Between => "waits for other work".to_owned(),
                Stage::In(call, fd) => format!("in a {} of {}", call.name(), file_of(fd)),
            },
        }
    }
}

/// Whether it should be over, or have given a sign of life.
fn is_late(seen: &Seen, limit: Duration, somebody_is_patient: bool) -> bool {
    match seen.stage {
        Stage::Patient => false,
        Stage::Queued => seen.age >= limit && !somebody_is_patient,
        _ if seen.long => seen.quiet >= limit,
        _ => seen.age >= limit,
    }
}

/// A request that will not end by itself, as far as one can tell.
fn beyond_help(all: &[Seen], limit: Duration) -> Option<&Seen> {
    let patient = all.iter().any(|seen| seen.stage == Stage::Patient);
    let moves = |seen: &Seen| seen.stage != Stage::Queued && seen.quiet < limit;
    let still = !patient && !all.iter().any(moves);
    all.iter().filter(|seen| seen.node != 0).find(|seen| {
        let hangs = matches!(seen.stage, Stage::In(..)) && seen.quiet >= limit;
        hangs || still && seen.age >= limit
    })
}

/// The file behind a descriptor of this process. The kernel's own answer: nothing is asked of the file.
fn file_of(fd: i32) -> String {
    match fs::read_link(format!("/proc/self/fd/{fd}")) {
        Ok(path) => escape(&path.to_string_lossy()),
        Err(_) => "a file".to_owned(),
    }
}

fn subject(row: &StuckRow) -> String {
    match &row.subject {
        Some(subject) => format!("{} on {subject}", row.operation),
        None => row.operation.clone(),
    }
}

/// One line about something stuck.
pub fn sentence(row: &StuckRow) -> String {
    format!(
        "{} for {} s, without a sign of life for {} s: {}",
        subject(row),
        row.seconds,
        row.quiet_seconds,
        row.phase
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::watch::Call;

    fn seen(age: u64, quiet: u64, stage: Stage) -> Seen {
        Seen {
            number: 1,
            what: "write".into(),
            node: 17,
            long: false,
            age: Duration::from_secs(age),
            quiet: Duration::from_secs(quiet),
            stage,
        }
    }

    #[test]
    fn only_what_hangs_is_named() {
        let limit = Duration::from_secs(30);
        let late = |seen: &Seen| is_late(seen, limit, false);
        let call = || Stage::In(Call::Write, 0);
        assert!(late(&seen(30, 0, call())) && !late(&seen(29, 29, call())));
        assert!(late(&seen(99, 0, Stage::Between)));
        assert!(!late(&seen(99, 99, Stage::Patient)));
        assert!(late(&seen(99, 99, Stage::Queued)));
        assert!(!is_late(&seen(99, 99, Stage::Queued), limit, true));
        let long = |quiet| Seen {
            long: true,
            ..seen(999, quiet, call())
        };
        assert!(late(&long(30)) && !late(&long(29)));
    }

    #[test]
    fn only_what_will_not_move_is_aborted() {
        let limit = Duration::from_secs(60);
        let help = |all: &[Seen]| beyond_help(all, limit).is_some();
        let hangs = seen(61, 61, Stage::In(Call::Sync, 0));
        let waits = seen(61, 61, Stage::Between);
        let moves = seen(61, 1, Stage::Between);
        assert!(help(std::slice::from_ref(&hangs)));
        assert!(help(&[moves.clone(), hangs]));
        // Who waits for somebody who moves will get his turn; if nobody moves, nobody will.
        assert!(!help(&[moves.clone(), waits.clone()]) && help(std::slice::from_ref(&waits)));
        assert!(!help(&[seen(999, 999, Stage::Patient), waits.clone()]));
        let job = Seen { node: 0, ..waits };
        assert!(!help(&[job]) && !help(&[moves]) && !help(&[]));
    }

    #[test]
    fn a_row_says_what_and_where() {
        let limits = Limits {
            named_after: Some(Duration::ZERO),
            abort_after: None,
        };
        let watch = Arc::new(Watch::default());
        watch.describe_by(Box::new(|node| (node == 17).then(|| "vm".to_owned())));
        let dog = Watchdog::new(watch.clone(), limits);
        assert!(dog.stuck().is_empty());
        let work = watch.begin("write", 17, false);
        work.run(|| {
            let said = sentence(&dog.stuck()[0]);
            assert_eq!(
                said,
                "write on vm for 0 s, without a sign of life for 0 s: waits for other work"
            );
        });
        let _other = watch.begin("read", 99, false);
        let row = &dog.stuck()[0];
        assert_eq!(row.subject.as_deref(), Some("inode 99"));
        assert_eq!(row.phase, "waits for a worker");
        assert_eq!(dog.under_way().len(), 1);
    }
}
