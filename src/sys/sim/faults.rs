//! What can be made to go wrong in a simulated machine, besides a cut or a kill.
//!
//! Promises: a fault strikes at the n-th matching operation, once or from then on; whether it did is
//! counted. Errors, short transfers and devices that go away are faults within what a disk promises.
//! Lost and misdirected writes break its promises: they are acknowledged, and so is a sync of them.
//!
//! It does not choose what to break; tests do.

use std::io::{self, ErrorKind};

use crate::sys::sim::world::{World, os};
use crate::sys::sim::{Op, SimWorld};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// The operation fails with this errno. A write has written some prefix; what a sync covered is
    /// lost (W4).
    Errno(i32),
    /// A read ends early, with `UnexpectedEof` and a part of the buffer filled; a write stores a true
    /// prefix and fails with this errno. Anything else fails with it.
    Short(i32),
    /// A write is acknowledged and never stored: its bytes are read until the cache is dropped, by
    /// chance at once. Only writes match.
    Lost,
    /// As [`What::Lost`], and the bytes land at another sector of a file of the same directory. Only
    /// writes match.
    Misdirected,
}

/// One thing that will go wrong.
#[derive(Debug, Clone)]
pub struct Fault {
    /// What.
    pub what: What,
    /// Operations that match; none: all.
    pub ops: &'static [Op],
    /// A file or directory to whose files it is confined (`store/log`), or whose whole filesystem it
    /// is (`store`); empty for everything.
    pub under: &'static str,
    /// At which matching operation from now (the next is 1).
    pub nth: u64,
    /// From then on, rather than once.
    pub lasting: bool,
}

impl SimWorld {
    /// Lets something go wrong.
    pub fn inject(&self, fault: Fault) {
        let nth = fault.nth.max(1);
        self.lock().faults.push(Fault { nth, ..fault });
    }

    /// How often an injected fault has struck.
    pub fn struck(&self) -> u64 {
        self.lock().struck
    }

    /// Takes back what was to go wrong and has not yet.
    pub fn clear_faults(&self) {
        self.lock().faults.clear();
    }

    /// The device below a topmost directory goes away, as in a power cut of its own: what was not
    /// durable there is resolved, and its handles answer EIO until [`SimWorld::kill`] or
    /// [`SimWorld::power_cut`].
    ///
    /// # Panics
    /// If the directory does not exist: tests only.
    pub fn lose_device(&self, top: &str) {
        let mut world = self.lock();
        let lost = world.find(top).expect("the directory exists");
        world.cut(|fs| fs == lost);
        world.gone.insert(lost);
    }
}

impl World {
    /// Counts an operation; what goes wrong with it, if anything does.
    ///
    /// # Errors
    /// The handle is dead.
    pub(super) fn strike(
        &mut self,
        life: u64,
        id: u64,
        op: Op,
        changing: bool,
    ) -> io::Result<Option<What>> {
        self.count(life, id, op, changing)?;
        if self.faults.is_empty() {
            return Ok(None);
        }
        let (mut what, mut faults) = (None, std::mem::take(&mut self.faults));
        faults.retain_mut(|fault| {
            if !self.matches(fault, id, op) {
                return true;
            }
            fault.nth = fault.nth.saturating_sub(1);
            if fault.nth == 0 {
                what = Some(fault.what);
            }
            fault.nth > 0 || fault.lasting
        });
        self.faults = faults;
        self.struck += u64::from(what.is_some());
        Ok(what)
    }

    /// As [`World::strike`], for what can only be done or fail.
    ///
    /// # Errors
    /// The fault's errno; the handle is dead.
    pub(super) fn begin(&mut self, life: u64, id: u64, op: Op, changing: bool) -> io::Result<()> {
        match self.strike(life, id, op, changing)? {
            Some(What::Errno(errno) | What::Short(errno)) => Err(os(errno)),
            _ => Ok(()),
        }
    }

    fn matches(&mut self, fault: &Fault, id: u64, op: Op) -> bool {
        let of_kind = match fault.what {
            What::Lost | What::Misdirected => op == Op::Write,
            _ => fault.ops.is_empty() || fault.ops.contains(&op),
        };
        of_kind && (fault.under.is_empty() || self.lies_under(fault.under, id))
    }

    fn lies_under(&mut self, path: &str, id: u64) -> bool {
        let under = self.find(path);
        let node = self.nodes.get(&id);
        under.is_some_and(|u| u == id || node.is_some_and(|node| node.fs == u || node.dir == u))
    }

    /// Has bytes that were written to a file land in a wrong place instead.
    pub(super) fn misdirect(&mut self, id: u64, bytes: &[u8]) {
        let Some(dir) = self.nodes.get(&id).map(|node| node.dir) else {
            return;
        };
        let same = |id: &u64| self.nodes.get(id).is_some_and(|node| node.dir == dir);
        let files: Vec<u64> = self.nodes.keys().copied().filter(same).collect();
        let files: Vec<u64> = files
            .into_iter()
            .filter(|id| self.look(*id).is_ok())
            .collect();
        let victim = files[self.rng.below(files.len() as u64) as usize];
        let Ok(size) = self.look(victim).map(|file| file.size()) else {
            return;
        };
        let room = size.saturating_sub(bytes.len() as u64) / 512;
        let at = self.rng.below(room + 1) * 512;
        let len = bytes.len().min((size - at) as usize);
        if let Ok(file) = self.file(victim) {
            file.poke(at, &bytes[..len]);
        }
    }
}

/// A read that ends early.
pub(super) fn cut_short() -> io::Error {
    ErrorKind::UnexpectedEof.into()
}
