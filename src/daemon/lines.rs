//! A log file whose filesystem may hang without holding up the daemon.
//!
//! Promises: a line is in the file when writing it returns, so that a kill right after loses none; should
//! the file not take it for [`PATIENCE`], the writer goes on, and so does everybody after him at once,
//! until the file takes lines again. Meanwhile [`QUEUE_MAX`] lines are kept; what is more is counted, and
//! the count is written when there is room. An error of the file loses the line.

use std::io::{self, Write};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// How long a line may take. Whoever wants to stop a daemon that hangs waits for it.
pub const PATIENCE: Duration = Duration::from_secs(1);
/// Lines that are kept while the file hangs.
pub const QUEUE_MAX: usize = 1024;

/// Where lines are written to.
pub struct Lines {
    queue: SyncSender<Vec<u8>>,
    shared: Arc<Shared>,
    patience: Duration,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    written: Condvar,
}

#[derive(Default)]
struct State {
    /// Lines taken into the queue, and those of them that are done.
    taken: u64,
    done: u64,
    /// Lines that found no room since the last one that did.
    lost: u64,
    hangs: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lines {
    /// Starts the thread that writes.
    ///
    /// # Errors
    /// The system's, if it gives no thread.
    pub fn start(file: impl Write + Send + 'static) -> io::Result<Arc<Lines>> {
        Lines::with(file, PATIENCE, QUEUE_MAX)
    }

    fn with(
        file: impl Write + Send + 'static,
        patience: Duration,
        room: usize,
    ) -> io::Result<Arc<Lines>> {
        let (queue, lines) = mpsc::sync_channel(room);
        let shared = Arc::<Shared>::default();
        let theirs = Arc::clone(&shared);
        thread::Builder::new()
            .name("log".into())
            .spawn(move || run(&lines, file, &theirs))?;
        Ok(Arc::new(Lines {
            queue,
            shared,
            patience,
        }))
    }
}

fn run(lines: &Receiver<Vec<u8>>, mut file: impl Write, shared: &Shared) {
    for line in lines {
        // There is nowhere to tell of an error.
        let _ = file.write_all(&line);
        let lost = {
            let mut state = shared.lock();
            // What was lost came after all that is queued.
            match state.done + 1 == state.taken {
                true => std::mem::take(&mut state.lost),
                false => 0,
            }
        };
        if lost > 0 {
            let _ = writeln!(
                file,
                "{lost} lines were lost while the log could not be written"
            );
        }
        let _ = file.flush();
        let mut state = shared.lock();
        state.done += 1;
        state.hangs = false;
        shared.written.notify_all();
    }
}

impl Write for &Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut state = self.shared.lock();
        match self.queue.try_send(line.to_vec()) {
            Ok(()) => state.taken += 1,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                state.lost += 1;
                return Ok(line.len());
            }
        }
        let number = state.taken;
        let (mut state, waited) = self
            .shared
            .written
            .wait_timeout_while(state, self.patience, |state| {
                state.done < number && !state.hangs
            })
            .unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            state.hangs = true;
            // Others who wait need not wait as long.
            self.shared.written.notify_all();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::Sender;

    /// A file that takes a line when it is let.
    struct Slow {
        let_go: Receiver<()>,
        file: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.let_go.recv();
            self.file.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn slow(room: usize) -> (Arc<Lines>, Sender<()>, Arc<Mutex<Vec<u8>>>) {
        let (let_go, wait) = mpsc::channel();
        let file = Arc::<Mutex<Vec<u8>>>::default();
        let slow = Slow {
            let_go: wait,
            file: Arc::clone(&file),
        };
        let lines = Lines::with(slow, Duration::from_millis(20), room).unwrap();
        (lines, let_go, file)
    }

    fn text(file: &Mutex<Vec<u8>>) -> String {
        String::from_utf8(file.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn a_line_is_there_when_its_writer_goes_on() {
        let (lines, let_go, file) = slow(4);
        for i in 0..10 {
            let_go.send(()).unwrap();
            (&*lines).write_all(format!("{i}\n").as_bytes()).unwrap();
            // A thread that was not given the processor for as long is late, not lost.
            assert!(crate::sys::eventually(
                || text(&file).lines().count() == i + 1
            ));
        }
        assert_eq!(text(&file), "0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n");
    }

    /// Nobody waits while it hangs; what there was room for comes afterwards, in order, and the rest is
    /// counted.
    #[test]
    fn a_file_that_hangs_holds_nobody_up() {
        let (lines, let_go, file) = slow(4);
        // The first is in the thread's hand or in the queue.
        (&*lines).write_all(b"first\n").unwrap();
        assert!(lines.shared.lock().hangs);
        for i in 0..100 {
            (&*lines).write_all(format!("{i}\n").as_bytes()).unwrap();
        }
        assert_eq!(text(&file), "");
        let lost = lines.shared.lock().lost;
        assert!((96..=97).contains(&lost), "{lost}");
        drop(let_go);
        assert!(crate::sys::eventually(|| {
            let state = lines.shared.lock();
            state.done == state.taken && !state.hangs
        }));
        let said = text(&file);
        assert!(said.starts_with("first\n0\n1\n2\n"), "{said}");
        assert!(said.contains(&format!("{lost} lines were lost")), "{said}");
        (&*lines).write_all(b"again\n").unwrap();
        assert!(crate::sys::eventually(|| text(&file).ends_with("again\n")));
    }
}
