//! What is under way in this process, since when, and what it waits for.
//!
//! A request or job is begun ([`Watch::begin`]), may wait in a queue, is taken up by one thread
//! ([`Work::run`]), and is over when its [`Work`] is dropped. While a thread works on one, what it asks of
//! the system through `sys::file` is noted with the file, and counts as a sign of life; so does the end
//! of a wait that is meant to be long ([`patiently`]).
//!
//! Promises: [`Watch::look`] takes no lock that is held across a system call, so it answers while
//! everything else hangs; noting costs no system call; a thread that works on nothing notes nothing.
//!
//! It decides nothing: what is too long is for the daemon to say.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// What is asked of the system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Call {
    /// Reading content.
    Read = 1,
    /// Writing content.
    Write,
    /// Making content or names durable.
    Sync,
    /// Changing the size, or giving space back.
    Space,
}

impl Call {
    fn from_number(number: u8) -> Option<Call> {
        [Call::Read, Call::Write, Call::Sync, Call::Space]
            .into_iter()
            .find(|&call| call as u8 == number)
    }

    /// In words: "in a ... of FILE".
    pub fn name(self) -> &'static str {
        match self {
            Call::Read => "read",
            Call::Write => "write",
            Call::Sync => "sync",
            Call::Space => "change of the space",
        }
    }
}

/// What one piece of work is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// No thread has taken it up.
    Queued,
    /// It waits on purpose: for space, as its volume's policy says.
    Patient,
    /// The system has not answered yet.
    In(Call, RawFd),
    /// Computing, or waiting for other work.
    Between,
}

/// One piece of work at a moment.
#[derive(Debug, Clone)]
pub struct Seen {
    /// A number of its own.
    pub number: u64,
    /// What it is.
    pub what: Cow<'static, str>,
    /// The node that it is about; 0 for none.
    pub node: u64,
    /// May take as long as it likes, while it gives signs of life.
    pub long: bool,
    /// Since it began, without waits that are meant to be long.
    pub age: Duration,
    /// Since the last sign of life.
    pub quiet: Duration,
    /// What it is doing.
    pub stage: Stage,
}

struct Slot {
    start: Instant,
    what: Cow<'static, str>,
    node: u64,
    long: bool,
    /// Milliseconds after `start`: when it began or last ended a long wait, and its last sign of life.
    since: AtomicU64,
    beat: AtomicU64,
    running: AtomicBool,
    patient: AtomicBool,
    /// 0, or a [`Call`] on this descriptor.
    call: AtomicU8,
    fd: AtomicI32,
}

impl Slot {
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn beat(&self) {
        self.beat.store(self.now(), Ordering::Relaxed);
    }

    fn stage(&self) -> Stage {
        if self.patient.load(Ordering::Relaxed) {
            return Stage::Patient;
        }
        if !self.running.load(Ordering::Relaxed) {
            return Stage::Queued;
        }
        match Call::from_number(self.call.load(Ordering::Acquire)) {
            Some(call) => Stage::In(call, self.fd.load(Ordering::Relaxed)),
            None => Stage::Between,
        }
    }
}

thread_local! {
    /// What this thread works on.
    static HERE: RefCell<Option<Arc<Slot>>> = const { RefCell::new(None) };
}

/// Says in words what a node is.
pub type Describe = dyn Fn(u64) -> Option<String> + Send + Sync;

/// Everything that is under way for one daemon.
#[derive(Default)]
pub struct Watch {
    slots: Mutex<Slots>,
    describe: OnceLock<Box<Describe>>,
}

#[derive(Default)]
struct Slots {
    next: u64,
    all: BTreeMap<u64, Arc<Slot>>,
}

impl Watch {
    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has nodes named by who knows them, from memory alone. The first one who does stays.
    pub fn describe_by(&self, describe: Box<Describe>) {
        let _ = self.describe.set(describe);
    }

    /// A node in words; by its number if nobody knows it.
    pub fn describe(&self, node: u64) -> String {
        let known = self.describe.get().and_then(|describe| describe(node));
        known.unwrap_or_else(|| format!("inode {node}"))
    }

    /// Begins a request about a node.
    pub fn begin(self: &Arc<Watch>, what: &'static str, node: u64, long: bool) -> Work {
        self.add(Cow::Borrowed(what), node, long)
    }

    /// Begins a job that may take long.
    pub fn begin_job(self: &Arc<Watch>, what: String) -> Work {
        self.add(Cow::Owned(what), 0, true)
    }

    fn add(self: &Arc<Watch>, what: Cow<'static, str>, node: u64, long: bool) -> Work {
        let slot = Arc::new(Slot {
            start: Instant::now(),
            what,
            node,
            long,
            since: AtomicU64::new(0),
            beat: AtomicU64::new(0),
            running: AtomicBool::new(false),
            patient: AtomicBool::new(false),
            call: AtomicU8::new(0),
            fd: AtomicI32::new(-1),
        });
        let mut slots = self.lock();
        slots.next += 1;
        let number = slots.next;
        slots.all.insert(number, Arc::clone(&slot));
        drop(slots);
        Work {
            watch: Arc::clone(self),
            number,
            slot,
        }
    }

    /// Everything under way, the oldest first.
    pub fn look(&self) -> Vec<Seen> {
        let slots: Vec<_> = {
            let slots = self.lock();
            slots.all.iter().map(|(&n, s)| (n, Arc::clone(s))).collect()
        };
        let seen = |(number, slot): &(u64, Arc<Slot>)| {
            let now = slot.now();
            let past = |at: &AtomicU64| {
                Duration::from_millis(now.saturating_sub(at.load(Ordering::Relaxed)))
            };
            Seen {
                number: *number,
                what: slot.what.clone(),
                node: slot.node,
                long: slot.long,
                age: past(&slot.since),
                quiet: past(&slot.beat),
                stage: slot.stage(),
            }
        };
        slots.iter().map(seen).collect()
    }
}

/// A piece of work; over when it is dropped.
pub struct Work {
    watch: Arc<Watch>,
    number: u64,
    slot: Arc<Slot>,
}

impl Work {
    /// Does it in this thread.
    pub fn run<T>(self, job: impl FnOnce() -> T) -> T {
        /// Puts back what the thread did before, also after a panic.
        struct Before(Option<Arc<Slot>>);
        impl Drop for Before {
            fn drop(&mut self) {
                HERE.with(|here| *here.borrow_mut() = self.0.take());
            }
        }
        self.slot.running.store(true, Ordering::Relaxed);
        self.slot.beat();
        let _before = Before(HERE.with(|here| here.borrow_mut().replace(Arc::clone(&self.slot))));
        job()
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.watch.lock().all.remove(&self.number);
    }
}

/// Notes a call of this thread; see [`calling`].
pub(in crate::sys) struct Calling(Option<Arc<Slot>>);

impl Drop for Calling {
    fn drop(&mut self) {
        if let Some(slot) = &self.0 {
            slot.call.store(0, Ordering::Release);
            slot.beat();
        }
    }
}

/// This thread asks something of the system, until the answer is dropped.
#[must_use]
pub(in crate::sys) fn calling(call: Call, fd: RawFd) -> Calling {
    let slot = HERE.with(|here| here.borrow().clone());
    if let Some(slot) = &slot {
        slot.beat();
        slot.fd.store(fd, Ordering::Relaxed);
        slot.call.store(call as u8, Ordering::Release);
    }
    Calling(slot)
}

/// A wait that is meant to be long, and does not count as hanging.
pub fn patiently<T>(wait: impl FnOnce() -> T) -> T {
    let slot = HERE.with(|here| here.borrow().clone());
    if let Some(slot) = &slot {
        slot.patient.store(true, Ordering::Relaxed);
    }
    let waited = wait();
    if let Some(slot) = &slot {
        slot.patient.store(false, Ordering::Relaxed);
        slot.beat();
        slot.since.store(slot.now(), Ordering::Relaxed);
    }
    waited
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn work_is_seen_from_its_beginning_to_its_end() {
        let watch = Arc::new(Watch::default());
        assert!(watch.look().is_empty());
        let work = watch.begin("write", 17, false);
        let seen = &watch.look()[0];
        assert_eq!((&*seen.what, seen.node, seen.long), ("write", 17, false));
        assert_eq!(seen.stage, Stage::Queued);
        let inside = watch.clone();
        work.run(|| {
            assert_eq!(inside.look()[0].stage, Stage::Between);
            let call = calling(Call::Sync, 7);
            assert_eq!(inside.look()[0].stage, Stage::In(Call::Sync, 7));
            drop(call);
            patiently(|| assert_eq!(inside.look()[0].stage, Stage::Patient));
            assert_eq!(inside.look()[0].stage, Stage::Between);
            // A job within a job, as when a command waits for reclaim.
            let inner = inside.begin_job("inner".into());
            inner.run(|| {
                let _call = calling(Call::Read, 3);
                let stages: Vec<_> = inside.look().into_iter().map(|s| s.stage).collect();
                assert_eq!(stages, [Stage::Between, Stage::In(Call::Read, 3)]);
            });
            assert_eq!(inside.look().len(), 1);
        });
        assert!(watch.look().is_empty());
        drop(calling(Call::Write, 1));
    }

    #[test]
    fn a_panic_ends_the_work() {
        let watch = Arc::new(Watch::default());
        let work = watch.begin("read", 1, false);
        let run = std::panic::AssertUnwindSafe(|| work.run(|| panic!("on purpose")));
        assert!(std::panic::catch_unwind(run).is_err());
        assert!(watch.look().is_empty());
        assert!(HERE.with(|here| here.borrow().is_none()));
    }

    /// Age and quiet grow while a thread hangs; a long wait on purpose does not count.
    #[test]
    fn time_goes_by_for_what_hangs() {
        let watch = Arc::new(Watch::default());
        let (release, wait) = channel::<()>();
        let work = watch.begin("write", 1, false);
        let thread = std::thread::spawn(move || {
            work.run(|| {
                patiently(|| wait.recv().unwrap());
                let _call = calling(Call::Write, 5);
                wait.recv().unwrap();
            });
        });
        let grown = |enough: &dyn Fn(&Seen) -> bool| {
            crate::sys::eventually(|| watch.look().first().is_some_and(enough))
        };
        assert!(grown(
            &|s| s.stage == Stage::Patient && s.age.as_millis() > 50
        ));
        release.send(()).unwrap();
        assert!(grown(&|s| s.stage == Stage::In(Call::Write, 5)));
        assert!(grown(
            &|s| s.age.as_millis() > 50 && s.quiet.as_millis() > 50
        ));
        release.send(()).unwrap();
        thread.join().unwrap();
        assert!(watch.look().is_empty());
    }
}
