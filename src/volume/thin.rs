//! How much of the thin target is used, how much it may still take, and how fast it grows.
//!
//! Used is what the log's segments and the overlays of clones occupy on their filesystem; the map, the
//! superblock and the ballast are not counted. A limit refuses preserved content that would go beyond
//! it, and only that: deletions, marks of failure and new snapshots are records of some hundred bytes
//! and get through.
//!
//! The forecast is measured, not modelled: the growth between the oldest and the newest of the samples
//! that are kept, taken as time goes by. It says nothing before it has seen [`LEAST_NS`].

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::error::{IoContext, Result};
use crate::log::commit::RESERVE;
use crate::sys::disk::{Open, Space};
use crate::volume::facts::ThinInfo;
use crate::volume::shared::{Shared, lock};

/// The folder of the overlays of clones.
const CLONES_DIR: &str = "clones";
/// The time that samples cover, and the least time between two of them.
const WINDOW_NS: i64 = 3600 * NS_PER_S;
const SAMPLE_NS: i64 = 30 * NS_PER_S;
/// Nothing is said of less.
const LEAST_NS: i64 = 60 * NS_PER_S;
/// A clock that jumped by more was set: what was seen before says nothing.
const JUMP_NS: i64 = 2 * 3600 * NS_PER_S;
const NS_PER_S: i64 = 1_000_000_000;
/// How long a count of what is used counts for those who need little of what was left, and for those
/// who only want to see it.
const FRESH: Duration = Duration::from_secs(1);

/// What is remembered between looks.
#[derive(Default)]
pub struct Thin {
    samples: Mutex<VecDeque<(i64, u64)>>,
    /// When it was counted, and what the limit had left then, less what was taken since.
    left: Mutex<Option<(Instant, u64)>>,
    /// When it was counted for somebody who looks, and what was used then.
    seen: Mutex<Option<(Instant, u64)>>,
}

impl Shared {
    /// Bytes that the log and the clones use.
    ///
    /// # Errors
    /// The system's error.
    pub fn thin_used(&self) -> Result<u64> {
        Ok(self.log.allocated()? + self.clones_used()?)
    }

    fn clones_used(&self) -> Result<u64> {
        let context = || "cannot count the space of the clones";
        let dir = match self.env.dir.subdir(CLONES_DIR, false) {
            Ok(dir) => dir,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(0),
            Err(e) => return Err(e).context(context),
        };
        let mut bytes = 0;
        for name in dir.list().context(context)? {
            match dir.open(&name, Open::Read) {
                Ok(overlay) => bytes += overlay.allocated().context(context)?,
                // Deleted since the listing, or nothing that holds content.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(e).context(context),
            }
        }
        Ok(bytes)
    }

    /// Whether the limit lets preserved content take so many bytes more. Exact near the limit; with
    /// plenty left a count of the last second is good enough.
    ///
    /// # Errors
    /// The system's error.
    pub fn limit_allows(&self, bytes: u64) -> Result<bool> {
        let Some(limit) = self.settings.limit_bytes else {
            return Ok(true);
        };
        // The head, the catalogue and the reserve of a new segment come without asking.
        let needed = bytes.saturating_add(2 * RESERVE);
        let mut left = lock(&self.thin.left);
        if let Some((counted, room)) = &mut *left
            && counted.elapsed() < FRESH
            && *room / 4 > needed
        {
            *room -= bytes;
            return Ok(true);
        }
        let room = limit.saturating_sub(self.thin_used()?);
        let allowed = room >= needed;
        *left = Some((Instant::now(), if allowed { room - bytes } else { 0 }));
        Ok(allowed)
    }

    /// The space that preserved content has, as `statfs` shows it: what the filesystem or the limit has,
    /// whichever is less. With a limit it may be a second old: everything that looks at a file may ask.
    ///
    /// # Errors
    /// The system's error.
    pub fn space_shown(&self) -> Result<Space> {
        let space = self.env.dir.space();
        let space = space.context(|| "cannot ask for the store's space")?;
        let Some(limit) = self.settings.limit_bytes else {
            return Ok(space);
        };
        let mut seen = lock(&self.thin.seen);
        let used = match *seen {
            Some((counted, used)) if counted.elapsed() < FRESH => used,
            _ => {
                let used = self.thin_used()?;
                *seen = Some((Instant::now(), used));
                used
            }
        };
        Ok(Space {
            total: space.total.min(limit),
            available: space.available.min(limit.saturating_sub(used)),
        })
    }

    /// Takes a sample for the forecast if it is time for one. Best effort.
    pub fn sample_growth(&self) {
        let now = self.env.clock.now_ns();
        let last = lock(&self.thin.samples).back().copied();
        let since = last.map(|(last, _)| now.saturating_sub(last));
        if since.is_some_and(|since| (0..SAMPLE_NS).contains(&since)) {
            return;
        }
        let Ok(used) = self.growing_used() else {
            return;
        };
        let mut samples = lock(&self.thin.samples);
        if since.is_some_and(|since| !(0..=JUMP_NS).contains(&since)) {
            samples.clear();
        }
        samples.push_back((now, used));
        while samples.len() > 2 && now.saturating_sub(samples[1].0) >= WINDOW_NS {
            samples.pop_front();
        }
    }

    /// What is used, without what was written ahead: that comes in large steps.
    fn growing_used(&self) -> Result<u64> {
        Ok(self.thin_used()?.saturating_sub(self.log.written_ahead()))
    }

    /// Facts about the thin target, now.
    ///
    /// # Errors
    /// The system's error.
    pub fn thin_info(&self) -> Result<ThinInfo> {
        let used = self.thin_used()?;
        let limit = self.settings.limit_bytes;
        let space = self.env.dir.space();
        let available = space
            .context(|| "cannot tell the store's free space")?
            .available;
        let free = limit.map_or(available, |l| l.saturating_sub(used).min(available));
        let now = (self.env.clock.now_ns(), self.growing_used()?);
        let first = lock(&self.thin.samples).front().copied();
        let (growth, measured_s) = match first.and_then(|first| growth(first, now)) {
            Some((growth, measured_s)) => (Some(growth), measured_s),
            None => (None, 0),
        };
        let full_in_s = growth.and_then(|g| seconds_until(free, g));
        Ok(ThinInfo {
            used,
            limit,
            free,
            growth,
            measured_s,
            full_in_s,
        })
    }
}

/// Bytes an hour between two samples (ns, bytes), and the seconds between them; `None` if they are too
/// near to each other, or the clock was set in between.
fn growth(first: (i64, u64), now: (i64, u64)) -> Option<(i64, u64)> {
    let elapsed = now.0.checked_sub(first.0)?;
    if !(LEAST_NS..=JUMP_NS).contains(&elapsed) {
        return None;
    }
    let grown = i128::from(now.1) - i128::from(first.1);
    let an_hour = grown * 3600 * i128::from(NS_PER_S) / i128::from(elapsed);
    Some((
        i64::try_from(an_hour).ok()?,
        u64::try_from(elapsed / NS_PER_S).ok()?,
    ))
}

fn seconds_until(free: u64, growth: i64) -> Option<u64> {
    let growth = u128::try_from(growth).ok().filter(|&g| g > 0)?;
    u64::try_from(u128::from(free) * 3600 / growth).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: i64 = NS_PER_S;

    #[test]
    fn growth_is_what_was_seen_and_nothing_is_said_of_too_little() {
        assert_eq!(growth((0, 100), (59 * S, 1000)), None);
        assert_eq!(growth((0, 100), (60 * S, 1100)), Some((60_000, 60)));
        assert_eq!(growth((0, 1100), (60 * S, 100)), Some((-60_000, 60)));
        assert_eq!(growth((0, 7), (3600 * S, 7)), Some((0, 3600)));
        // The clock was set back, or far ahead.
        assert_eq!(growth((100 * S, 0), (0, 7)), None);
        assert_eq!(growth((0, 0), (9999 * 3600 * S, 7)), None);
        assert_eq!(growth((i64::MIN, 0), (i64::MAX, 7)), None);
        assert_eq!(growth((0, 0), (60 * S, u64::MAX)), None);
    }

    #[test]
    fn the_time_left_follows_from_it() {
        assert_eq!(seconds_until(1000, 100), Some(36_000));
        assert_eq!(seconds_until(0, 100), Some(0));
        assert_eq!(seconds_until(1000, 0), None);
        assert_eq!(seconds_until(1000, -5), None);
        assert_eq!(seconds_until(u64::MAX, 1), None);
    }
}
