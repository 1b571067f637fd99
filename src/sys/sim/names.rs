//! What a simulated directory holds, and what a power cut leaves of it.
//!
//! Invariant: `durable` with the pending changes that are not lost, applied in order, is `entries`.
//!
//! It knows no files, faults or locks; the world above does.

use std::collections::BTreeMap;

use crate::sys::sim::cut::{Fate, Rng};

/// One change of a directory: atomic, also a rename.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub(super) remove: Option<(String, u64)>,
    pub(super) add: Option<(String, u64)>,
}

impl Change {
    fn apply(&self, entries: &mut BTreeMap<String, u64>) {
        if let Some((name, id)) = &self.remove
            && entries.get(name) == Some(id)
        {
            entries.remove(name);
        }
        if let Some((name, id)) = &self.add {
            entries.insert(name.clone(), *id);
        }
    }
}

/// A change that is not durable.
#[derive(Debug, Clone)]
struct Pending {
    change: Change,
    /// When it was made.
    stamp: u64,
    /// A failed sync covered it: it will never be durable.
    lost: bool,
}

/// Names of a directory, now and on the medium.
#[derive(Debug, Clone, Default)]
pub(super) struct Names {
    pub(super) entries: BTreeMap<String, u64>,
    durable: BTreeMap<String, u64>,
    /// Changes not synced, in order.
    pending: Vec<Pending>,
}

impl Names {
    pub(super) fn change(&mut self, change: Change, stamp: u64) {
        change.apply(&mut self.entries);
        let lost = false;
        self.pending.push(Pending {
            change,
            stamp,
            lost,
        });
    }

    pub(super) fn sync(&mut self) {
        for pending in self.pending.iter().filter(|pending| !pending.lost) {
            pending.change.apply(&mut self.durable);
        }
        self.pending.retain(|pending| pending.lost);
    }

    pub(super) fn sync_failed(&mut self) {
        self.pending
            .iter_mut()
            .for_each(|pending| pending.lost = true);
    }

    /// When what is in doubt was done.
    pub(super) fn stamps(&self) -> Vec<u64> {
        self.pending.iter().map(|pending| pending.stamp).collect()
    }

    /// Everything this directory may name after a power cut.
    pub(super) fn reachable(&self) -> impl Iterator<Item = u64> {
        let pending = self
            .pending
            .iter()
            .filter_map(|pending| pending.change.add.as_ref());
        let named = self.entries.values().chain(self.durable.values()).copied();
        named.chain(pending.map(|(_, id)| *id))
    }

    /// Keeps a prefix of the pending changes, as a journal does, or any of them, as POSIX allows.
    pub(super) fn cut(&mut self, fate: Fate, rng: &mut Rng) {
        let pending = std::mem::take(&mut self.pending);
        let journal = rng.below(2) == 0;
        let kept = rng.below(pending.len() as u64 + 1) as usize;
        for (i, pending) in pending.iter().enumerate() {
            let keep = match fate {
                Fate::Until(stamp) => pending.stamp <= stamp,
                _ if journal => i < kept,
                _ => rng.below(2) == 0,
            };
            if keep && !pending.lost {
                pending.change.apply(&mut self.durable);
            }
        }
        self.entries = self.durable.clone();
    }
}
