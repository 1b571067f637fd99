//! The operating system: the only layer with `unsafe` and `libc`.

pub mod clock;
pub mod disk;
pub mod file;
pub mod lock;
pub mod mount;
pub mod place;
pub mod planted;
pub mod process;
pub mod signals;
pub mod sim;
pub mod source;
pub mod watch;

/// Waits for what other tests of this process can delay: a child of theirs holds copies of our
/// descriptors between fork and exec.
#[cfg(test)]
pub(crate) fn eventually(mut is_so: impl FnMut() -> bool) -> bool {
    for _ in 0..500 {
        if is_so() {
            return true;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    false
}
