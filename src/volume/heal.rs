//! Mending the extent map of an open store.
//!
//! The map is derived. When its index turns out damaged while the store is served (its pages are only
//! verified when they are read), the index is moved aside and made again from the log, and whoever asked
//! asks again; nobody sees more than a wait. Readers and writers go on meanwhile. Should that fail, the
//! answer is the map's error, and it is tried again later and at the next open.
//!
//! Lock: `one`, in the order of locks just before the map's own; held over I/O.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::error::{Error, IoContext, Kind, Result};
use crate::log::scan::{Event, Scan};
use crate::map::index::Index;
use crate::map::transient::TransientIndex;
use crate::map::{Applied, ExtentMap};
use crate::volume::shared::{Shared, lock, to_publish};
use crate::volume::space::has_room_for_map;

/// How long it is not tried again after it failed.
const PAUSE: Duration = Duration::from_secs(10);
/// A segment may be removed while the log is read.
const TRIES: u32 = 3;

/// What is known of earlier attempts.
#[derive(Default)]
pub struct Heal {
    /// When the last one failed.
    one: Mutex<Option<Instant>>,
    /// Those that succeeded.
    healed: AtomicU64,
}

impl Shared {
    /// Asks the map; if it turns out damaged, it is made again and asked once more.
    ///
    /// # Errors
    /// Those of `ask`.
    pub fn healing<T>(&self, ask: impl Fn(&ExtentMap) -> Result<T>) -> Result<T> {
        let before = self.heal.healed.load(Ordering::Acquire);
        match ask(&self.map) {
            Err(e) if e.kind() == Kind::Damaged => {
                self.heal_since(before, &e)?;
                ask(&self.map)
            }
            done => done,
        }
    }

    /// Makes the map again from the log.
    ///
    /// # Errors
    /// `Damaged` if it could not be done.
    pub fn heal_map(&self, why: &Error) -> Result<()> {
        self.heal_since(self.heal.healed.load(Ordering::Acquire), why)
    }

    fn heal_since(&self, before: u64, why: &Error) -> Result<()> {
        let mut failed = lock(&self.heal.one);
        if self.heal.healed.load(Ordering::Acquire) != before {
            // Somebody else has, since this was found out.
            return Ok(());
        }
        let again = || Error::new(Kind::Damaged, why.chain());
        if failed.is_some_and(|at| at.elapsed() < PAUSE) {
            return Err(again());
        }
        tracing::error!(
            "the extent map is damaged and is made again from the log: {}",
            why.chain()
        );
        let mut done = Ok(());
        for _ in 0..TRIES {
            done = self.map.adopt(|| self.map_from_log());
            if !matches!(&done, Err(e) if e.kind() == Kind::NotFound) {
                break;
            }
        }
        match done {
            Ok(()) => {
                *failed = None;
                self.heal.healed.fetch_add(1, Ordering::AcqRel);
                tracing::info!("the extent map is whole again");
                Ok(())
            }
            Err(e) => {
                *failed = Some(Instant::now());
                tracing::error!("the extent map cannot be made again: {}", e.chain());
                Err(again())
            }
        }
    }

    /// A new index with all that the log says, up to its end now.
    fn map_from_log(&self) -> Result<ExtentMap> {
        self.env.index.set_aside()?;
        let index: Arc<dyn Index> = match has_room_for_map(&self.env, 0) {
            true => self.env.index.open()?,
            false => {
                self.map_in_memory.store(true, Ordering::Release);
                Arc::new(TransientIndex::default())
            }
        };
        let map = ExtentMap::open(index, self.settings.map_cache_bytes)?;
        let (upto, segment, offset) = self.log.end_said();
        let dir = self.env.dir.subdir("log", false);
        let dir = dir.context(|| "cannot open the log's directory")?;
        let scan = Scan {
            dir: dir.as_ref(),
            keys: self.log.keys(),
            store: self.store,
            from_segment: 0,
        };
        // What is written meanwhile stands in the memory of the map that is in use.
        scan.run(&mut |event| match event {
            Event::Batch {
                lsn,
                place,
                end,
                records,
                ..
            } if lsn <= upto => {
                let records = records.iter().filter_map(|r| to_publish(r, place));
                map.publish(records.collect());
                if map.pending() > self.settings.map_cache_bytes {
                    map.checkpoint(Applied {
                        store: self.store,
                        lsn,
                        segment: place.segment,
                        offset: end,
                    })?;
                }
                Ok(())
            }
            Event::Lost { first, .. } if first <= upto => Err(Error::new(
                Kind::Failed,
                "the log has lost batches, too; start again to have it recovered",
            )),
            _ => Ok(()),
        })?;
        map.checkpoint(Applied {
            store: self.store,
            lsn: upto,
            segment,
            offset,
        })?;
        Ok(map)
    }
}
