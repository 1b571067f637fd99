//! Time and randomness, behind a trait so that the simulator can own both.

#![allow(unsafe_code, reason = "random bytes of the system")]

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

/// Wall-clock time and random bytes.
pub trait Clock: Send + Sync {
    /// Nanoseconds since 1970, UTC. May jump; nobody orders events by it.
    fn now_ns(&self) -> i64;

    /// Sixteen unpredictable bytes.
    ///
    /// # Errors
    /// The system's error.
    fn random(&self) -> io::Result<[u8; 16]>;
}

/// This machine's clock and random source.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now_ns(&self) -> i64 {
        match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(since) => i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
            Err(before) => {
                i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |nanos| -nanos)
            }
        }
    }

    fn random(&self) -> io::Result<[u8; 16]> {
        let mut bytes = [0; 16];
        let mut have = 0;
        while have < bytes.len() {
            let rest = &mut bytes[have..];
            // SAFETY: `rest` is writable for its whole length during the call.
            let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
            match usize::try_from(got) {
                Ok(got) => have += got,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_is_of_this_century_and_its_bytes_differ() {
        let clock = SystemClock;
        assert!(clock.now_ns() > 1_600_000_000_000_000_000);
        assert!(clock.now_ns() < 4_100_000_000_000_000_000);
        let (a, b) = (clock.random().unwrap(), clock.random().unwrap());
        assert!(a != b && a != [0; 16] && a[12..] != [0; 4]);
    }
}
