//! Changes of a live volume as a whole: revert and resize, and who must hear of them.
//!
//! Promises: a revert is refused while `live.img` is open for writing, unless it is forced (a handle
//! that is closed within [`LET_GO`] does not count); after
//! either change, whoever watches is told which nodes are not what they were, so that a cache above
//! can forget what it knows.
//!
//! Somebody may open `live.img` for writing while a revert runs: his writes wait in the engine and
//! then are made to the reverted volume.

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::Kind;
use crate::tree::Tree;
use crate::tree::node::live_node;
use crate::tree::types::{NodeId, Result, TreeError};
use crate::units::Name;
use crate::volume::{Reverted, VolumeInfo};

/// How long a handle may still count after it was closed: the kernel tells of it later.
const LET_GO: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(5);

type Watcher = Box<dyn Fn(NodeId) + Send + Sync>;

/// Who is told of nodes that have changed by themselves.
#[derive(Default)]
pub(super) struct Watch {
    watcher: Mutex<Option<Watcher>>,
}

impl Watch {
    fn tell(&self, node: NodeId) {
        let watcher = self.watcher.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tell) = &*watcher {
            tell(node);
        }
    }
}

impl Tree {
    /// Has `watch` told each node whose content or size was changed by something else than a handle.
    /// Called from a request's thread: it must neither call back nor wait.
    pub fn watch_changes(&self, watch: impl Fn(NodeId) + Send + Sync + 'static) {
        let mut watcher = self
            .changed
            .watcher
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *watcher = Some(Box::new(watch));
    }

    /// Makes a volume what one of its snapshots is, after taking one that undoes it. Durable when it
    /// returns. `progress` is told (bytes looked at, bytes to look at).
    ///
    /// # Errors
    /// `Busy` while `live.img` is open for writing, unless `force`; those of the engine.
    pub fn revert(
        &self,
        volume: &Name,
        to: &Name,
        force: bool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Reverted> {
        // A wrong name is told from a right one at a wrong time.
        self.engine.snapshot(volume, to)?;
        let node = self.live_unless_written(volume, !force, "revert")?;
        let result = self.engine.revert_volume(volume, to, progress);
        // Also after a failure: it may have changed a part.
        self.changed.tell(node);
        Ok(result?)
    }

    /// Gives a volume another size in bytes. Durable when it returns.
    ///
    /// # Errors
    /// `Busy` for a smaller size while `live.img` is open for writing; those of the engine.
    pub fn resize(&self, volume: &Name, size: u64) -> Result<VolumeInfo> {
        let shrinks = size < self.engine.volume(volume)?.size();
        let node = self.live_unless_written(volume, shrinks, "shrink")?;
        let result = self.engine.resize_volume(volume, size);
        self.changed.tell(node);
        Ok(result?)
    }

    fn live_unless_written(&self, volume: &Name, matters: bool, what: &str) -> Result<NodeId> {
        let node = live_node(self.engine.volume(volume)?.info().ino_base);
        let end = Instant::now() + LET_GO;
        while matters && self.handles.has_writers(node) {
            if Instant::now() < end {
                thread::sleep(LOOK_AGAIN);
                continue;
            }
            let why = format!(
                "cannot {what} volume '{volume}' while somebody has its live.img open for writing"
            );
            return Err(TreeError::new(Kind::Busy, why));
        }
        Ok(node)
    }
}
