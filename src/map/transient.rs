//! An index that lives only as long as the process: for a store whose disk is too full for the real one.
//!
//! Promises: it does what [`Index`] says, except that nothing it holds is there at the next open, which
//! the map's contract allows for any index. What it holds is bounded by memory alone.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use crate::error::Result;
use crate::map::extents::walk;
use crate::map::index::{Change, Index, assert_limits};

/// An empty one is what a store starts with.
#[derive(Default)]
pub struct TransientIndex {
    pairs: RwLock<BTreeMap<Vec<u8>, Vec<u8>>>,
}

impl TransientIndex {
    /// What another index holds of the map, at this moment.
    ///
    /// # Errors
    /// Those of the other one.
    pub fn copy_of(index: &dyn Index) -> Result<TransientIndex> {
        let copy = TransientIndex::default();
        // The namespaces of the map are capital letters.
        walk(index, vec![b'A'], &[b'Z' + 1], |key, value| {
            copy.apply(vec![(key, Some(value))])
        })?;
        Ok(copy)
    }
}

impl Index for TransientIndex {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let pairs = self.pairs.read().unwrap_or_else(PoisonError::into_inner);
        Ok(pairs.get(key).cloned())
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        if from >= to {
            return Ok(Vec::new());
        }
        let pairs = self.pairs.read().unwrap_or_else(PoisonError::into_inner);
        let range = pairs.range(from.to_vec()..to.to_vec()).take(limit);
        Ok(range.map(|(k, v)| (k.clone(), v.clone())).collect())
    }

    fn apply(&self, changes: Vec<Change>) -> Result<()> {
        assert_limits(&changes);
        let mut pairs = self.pairs.write().unwrap_or_else(PoisonError::into_inner);
        for (key, value) in changes {
            match value {
                Some(value) => drop(pairs.insert(key, value)),
                None => drop(pairs.remove(&key)),
            }
        }
        Ok(())
    }

    fn checkpoint(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_an_ordered_map() {
        let index = TransientIndex::default();
        let key = |n: u8| vec![b'k', n];
        let put = |n: u8| (key(n), Some(vec![n; 3]));
        index.apply((0..9).map(put).collect()).unwrap();
        index.apply(vec![(key(4), None), put(2)]).unwrap();
        assert_eq!(index.get(&key(3)).unwrap(), Some(vec![3; 3]));
        assert_eq!(index.get(&key(4)).unwrap(), None);
        let found = index.scan(&key(2), &key(8), 4).unwrap();
        let keys: Vec<u8> = found.iter().map(|(k, _)| k[1]).collect();
        assert_eq!(keys, [2, 3, 5, 6]);
        assert_eq!(index.scan(&key(8), &key(2), 4).unwrap(), []);
        index.checkpoint().unwrap();
    }
}
