//! The in-memory twin of the index, with power cuts and faults decided by a seed.
//!
//! It is as bad as the contract of [`Index`] allows, not as good as sled happens to be: at a cut any
//! subset of the batches since the last checkpoint survives; a failed batch leaves any part of its
//! changes; after a failed checkpoint a later one that succeeds proves nothing about what the failed
//! one covered. Handles opened before a cut answer `Io` after it, like a process that is gone.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::error::{Error, Kind, Result};
use crate::map::index::{Change, Index, IndexHome, assert_limits};

type Pairs = BTreeMap<Vec<u8>, Vec<u8>>;

/// Where the twin keeps its content across opens.
#[derive(Clone, Default)]
pub struct MemoryIndexHome {
    medium: Arc<Mutex<Medium>>,
}

#[derive(Default, Clone)]
struct Medium {
    /// What a cut cannot take.
    durable: Pairs,
    /// What readers see.
    current: Pairs,
    /// Applied since the last checkpoint that succeeded or failed.
    batches: Vec<Vec<Change>>,
    /// Covered by a checkpoint that failed.
    doubtful: Vec<Vec<Change>>,
    /// Counts opens and cuts; older handles are dead.
    life: u64,
    /// Calls until one fails.
    apply_fault: Option<u64>,
    checkpoint_fault: Option<u64>,
    /// Calls of any kind until one fails, whether all do from then on, and with what.
    any_fault: Option<(u64, bool, Kind)>,
    /// How often that fault has struck.
    struck: u64,
    random: u64,
}

struct MemoryIndex {
    medium: Arc<Mutex<Medium>>,
    life: u64,
}

impl Medium {
    /// One of `0..below` (splitmix64).
    fn pick(&mut self, below: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }

    fn settle(&mut self, mut keep: impl FnMut(&mut Medium, usize) -> bool) {
        let batches: Vec<_> = self
            .doubtful
            .drain(..)
            .chain(self.batches.drain(..))
            .collect::<Vec<_>>();
        for (i, batch) in batches.into_iter().enumerate() {
            if keep(self, i) {
                put(&mut self.durable, batch);
            }
        }
    }

    /// Counts a call; the error it answers if it is to fail.
    fn call(&mut self) -> Option<Error> {
        let (left, lasting, kind) = self.any_fault.as_mut()?;
        *left = left.saturating_sub(1);
        if *left > 0 {
            return None;
        }
        let (lasting, kind) = (*lasting, *kind);
        if !lasting {
            self.any_fault = None;
        }
        self.struck += 1;
        Some(Error::new(kind, "injected fault of the index"))
    }

    fn fails(fault: &mut Option<u64>) -> bool {
        match fault {
            Some(0) => {
                *fault = None;
                true
            }
            Some(n) => {
                *n -= 1;
                false
            }
            None => false,
        }
    }
}

fn put(pairs: &mut Pairs, batch: Vec<Change>) {
    for (key, value) in batch {
        match value {
            Some(value) => pairs.insert(key, value),
            None => pairs.remove(&key),
        };
    }
}

impl MemoryIndexHome {
    /// An empty index.
    pub fn new() -> MemoryIndexHome {
        MemoryIndexHome::default()
    }

    /// Counts opens and cuts.
    pub fn opened(&self) -> u64 {
        self.lock().life
    }

    /// Flips a bit of some value, behind everybody's back; `false` if there is none.
    pub fn rot(&self, seed: u64) -> bool {
        let mut medium = self.lock();
        medium.random ^= seed;
        let (keys, at) = (medium.current.len() as u64, medium.random);
        if keys == 0 {
            return false;
        }
        let picked = medium.pick(keys) as usize;
        let Some(key) = medium.current.keys().nth(picked).cloned() else {
            return false;
        };
        let medium = &mut *medium;
        for pairs in [&mut medium.durable, &mut medium.current] {
            if let Some(value) = pairs.get_mut(&key).filter(|v| !v.is_empty()) {
                let byte = (at % value.len() as u64) as usize;
                value[byte] ^= 1 << (at % 8);
            }
        }
        true
    }

    /// Cuts the power: what was checkpointed stays, and any subset of the batches since.
    pub fn power_cut(&self, seed: u64) {
        self.cut(seed, |medium, _| medium.pick(2) == 0);
    }

    /// Kills the process: what was checkpointed stays, and a prefix of the batches since.
    pub fn kill(&self, seed: u64) {
        let mut medium = self.lock();
        medium.random ^= seed;
        let all = medium.doubtful.len() + medium.batches.len();
        let stay = medium.pick(all as u64 + 1) as usize;
        drop(medium);
        self.cut(seed, |_, i| i < stay);
    }

    fn cut(&self, seed: u64, keep: impl FnMut(&mut Medium, usize) -> bool) {
        let mut medium = self.lock();
        medium.random ^= seed;
        medium.life += 1;
        medium.settle(keep);
        medium.current = medium.durable.clone();
        medium.apply_fault = None;
        medium.checkpoint_fault = None;
        medium.any_fault = None;
    }

    /// A copy of the index as it is; handles of `self` do not belong to it.
    #[must_use]
    pub fn fork(&self, seed: u64) -> MemoryIndexHome {
        let mut medium = self.lock().clone();
        medium.life += 1;
        medium.random ^= seed;
        MemoryIndexHome {
            medium: Arc::new(Mutex::new(medium)),
        }
    }

    /// The `n`th call of any kind from now (the next is 1), opening included, fails with an error of
    /// this kind, once or (`lasting`) from then on. A batch may then be applied in part.
    pub fn fail_call(&self, n: u64, lasting: bool, kind: Kind) {
        self.lock().any_fault = Some((n.max(1), lasting, kind));
    }

    /// How often a fault of [`MemoryIndexHome::fail_call`] has struck.
    pub fn struck(&self) -> u64 {
        self.lock().struck
    }

    /// Takes back what was to fail and has not yet.
    pub fn clear_faults(&self) {
        let mut medium = self.lock();
        medium.apply_fault = None;
        medium.checkpoint_fault = None;
        medium.any_fault = None;
    }

    /// Deletes the index.
    pub fn lose(&self) {
        let mut medium = self.lock();
        *medium = Medium {
            life: medium.life + 1,
            random: medium.random,
            any_fault: medium.any_fault,
            struck: medium.struck,
            ..Medium::default()
        };
    }

    /// The `n`th batch from now (0 is the next) fails.
    pub fn fail_apply(&self, n: u64) {
        self.lock().apply_fault = Some(n);
    }

    /// The `n`th checkpoint from now (0 is the next) fails.
    pub fn fail_checkpoint(&self, n: u64) {
        self.lock().checkpoint_fault = Some(n);
    }

    /// Changes a value behind everybody's back; `None` loses it. For tests of damage.
    pub fn tamper(&self, change: impl FnOnce(&mut BTreeMap<Vec<u8>, Vec<u8>>)) {
        let mut medium = self.lock();
        change(&mut medium.current);
        medium.durable = medium.current.clone();
    }

    fn lock(&self) -> MutexGuard<'_, Medium> {
        self.medium
            .lock()
            .expect("no code panics while it holds the twin")
    }
}

impl IndexHome for MemoryIndexHome {
    fn open(&self) -> Result<Arc<dyn Index>> {
        let mut medium = self.lock();
        if let Some(e) = medium.call() {
            return Err(e);
        }
        medium.life += 1;
        let life = medium.life;
        drop(medium);
        Ok(Arc::new(MemoryIndex {
            medium: Arc::clone(&self.medium),
            life,
        }))
    }

    fn set_aside(&self) -> Result<()> {
        self.lose();
        Ok(())
    }

    fn discard(&self) -> Result<()> {
        self.set_aside()
    }
}

impl MemoryIndex {
    fn lock(&self) -> Result<MutexGuard<'_, Medium>> {
        let medium = self
            .medium
            .lock()
            .expect("no code panics while it holds the twin");
        if medium.life != self.life {
            return Err(Error::new(Kind::Io, "the index was closed by a cut"));
        }
        Ok(medium)
    }
}

impl Index for MemoryIndex {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let mut medium = self.lock()?;
        match medium.call() {
            Some(e) => Err(e),
            None => Ok(medium.current.get(key).cloned()),
        }
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        if from >= to {
            return Ok(Vec::new());
        }
        let mut medium = self.lock()?;
        if let Some(e) = medium.call() {
            return Err(e);
        }
        let range = medium.current.range(from.to_vec()..to.to_vec());
        Ok(range
            .take(limit)
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect())
    }

    fn apply(&self, mut changes: Vec<Change>) -> Result<()> {
        assert_limits(&changes);
        let mut medium = self.lock()?;
        let failure = medium.call();
        let failed = Medium::fails(&mut medium.apply_fault) || failure.is_some();
        if failed {
            let some: Vec<bool> = changes.iter().map(|_| medium.pick(2) == 0).collect();
            let mut some = some.into_iter();
            changes.retain(|_| some.next() == Some(true));
        }
        put(&mut medium.current, changes.clone());
        medium.batches.push(changes);
        if failed {
            let fault = || Error::new(Kind::Io, "injected fault of a batch");
            Err(failure.unwrap_or_else(fault))
        } else {
            Ok(())
        }
    }

    fn checkpoint(&self) -> Result<()> {
        let mut medium = self.lock()?;
        let failure = medium.call();
        if Medium::fails(&mut medium.checkpoint_fault) || failure.is_some() {
            let batches = std::mem::take(&mut medium.batches);
            medium.doubtful.extend(batches);
            let fault = || Error::new(Kind::Io, "injected fault of a checkpoint");
            return Err(failure.unwrap_or_else(fault));
        }
        // What a failed sync covered may be lost although this one succeeds.
        let doubtful = medium.doubtful.len();
        medium.settle(|medium, i| i >= doubtful || medium.pick(2) == 0);
        Ok(())
    }
}
