//! A fixed pool of workers behind a bounded queue: whatever may wait for a medium runs here, so
//! that the threads which read requests from the kernel stay free.
//!
//! Promises: a job that was accepted runs exactly once, also during shutdown; a job that panics is
//! logged and its worker lives on. When the queue is full the submitter waits: that is the only
//! bound on memory held by queued writes ([`QUEUE_MAX`] jobs of at most a request each). Jobs run in
//! no order; the kernel only sends what may be reordered before the answer.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

/// Workers. Most of their time is waiting for a sync, so there are more of them than processors; a
/// group commit is the larger, the more of them wait at once.
pub(super) const WORKERS: usize = 24;

/// Most jobs waiting for a worker. Writers that wait for space must not stop the threads that read
/// requests, so there is room for many; the kernel bounds what one program can have under way.
pub(super) const QUEUE_MAX: usize = 1024;

type Job = Box<dyn FnOnce() + Send>;

struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    room: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        loop {
            let mut queue = self.lock();
            let job = loop {
                if let Some(job) = queue.jobs.pop_front() {
                    break job;
                }
                if queue.closed {
                    return;
                }
                queue = self
                    .work
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
            };
            drop(queue);
            self.room.notify_one();
            guarded("worker", job);
        }
    }
}

/// The workers; dropping it finishes what was accepted.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts the workers.
    ///
    /// # Errors
    /// The system's, when a thread cannot be started.
    pub fn start(workers: usize) -> io::Result<Pool> {
        let queue = Mutex::new(Queue {
            jobs: VecDeque::with_capacity(QUEUE_MAX),
            closed: false,
        });
        let shared = Arc::new(Shared {
            queue,
            work: Condvar::new(),
            room: Condvar::new(),
        });
        let mut pool = Pool {
            shared,
            workers: Vec::with_capacity(workers),
        };
        for i in 0..workers {
            let shared = Arc::clone(&pool.shared);
            let worker = Builder::new()
                .name(format!("worker-{i}"))
                .spawn(move || shared.run())?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Hands a job over; waits while the queue is full.
    pub fn submit(&self, job: impl FnOnce() + Send + 'static) {
        let mut queue = self.shared.lock();
        while queue.jobs.len() >= QUEUE_MAX {
            queue = self
                .shared
                .room
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        queue.jobs.push_back(Box::new(job));
        drop(queue);
        self.shared.work.notify_one();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            // A worker cannot panic: jobs are guarded.
            let _ = worker.join();
        }
    }
}

/// Runs a handler; a panic is logged and ends only this call. The reply it held was dropped on the
/// way, which answers EIO.
pub(super) fn guarded(operation: &'static str, handler: impl FnOnce()) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(handler)) {
        let text = panic
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("no message");
        tracing::error!(operation, "a request failed with a panic: {text}");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn every_accepted_job_runs_also_after_a_panic_and_at_shutdown() {
        let pool = Pool::start(2).unwrap();
        let ran = Arc::new(AtomicUsize::new(0));
        // More jobs than the queue holds: the submitter has to wait and goes on.
        for i in 0..QUEUE_MAX * 3 {
            let ran = Arc::clone(&ran);
            pool.submit(move || {
                ran.fetch_add(1, Ordering::Relaxed);
                assert!(i % 10 != 0, "a job that panics");
            });
        }
        drop(pool);
        assert_eq!(ran.load(Ordering::Relaxed), QUEUE_MAX * 3);
    }

    #[test]
    fn a_waiting_job_does_not_hold_the_others() {
        let pool = Pool::start(2).unwrap();
        let (release, wait) = channel::<()>();
        pool.submit(move || wait.recv().unwrap());
        let (done, finished) = channel();
        pool.submit(move || done.send(()).unwrap());
        finished.recv().unwrap();
        release.send(()).unwrap();
    }
}
