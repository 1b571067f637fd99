//! Starting a daemon in the background, and hearing from it whether it serves.
//!
//! The child is this program again, in a session of its own and without our terminal. It says one
//! JSON line: that it serves or why it does not, and what was worth knowing on the way. Promises:
//! [`start`] returns `Ok` only when the mount serves; a child that dies without a word is an error;
//! a parent that goes away first makes the child stop.

use std::ffi::OsString;
use std::fmt::Display;

use serde::{Deserialize, Serialize};

use crate::daemon::serve::Announce;
use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::process::{self, ReadyWriter};

/// Most characters of a note or message: a line of the pipe is bounded.
const TEXT_MAX: usize = 2048;
/// Most notes that are kept.
const NOTES_MAX: usize = 8;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Word {
    notes: Vec<String>,
    outcome: Outcome,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    Ready,
    Failed { kind: Kind, message: String },
}

/// Starts a daemon and waits until it serves; returns its process.
///
/// # Errors
/// The daemon's own; `Failed` if it ended without a word.
pub fn start(args: &[OsString], note: &mut dyn FnMut(&str)) -> Result<u32> {
    let (mut child, pipe) = process::spawn_daemon(args)?;
    let pid = child.id();
    let Some(line) = pipe.receive().context(|| "cannot hear from the daemon")? else {
        let how: Box<dyn Display> = match child.wait() {
            Ok(status) => Box::new(status),
            Err(e) => Box::new(e),
        };
        return Err(Error::new(
            Kind::Failed,
            format!("the daemon (pid {pid}) ended before it served ({how}); see its log"),
        ));
    };
    let word: Word = serde_json::from_str(&line)
        .map_err(|e| Error::with_source(Kind::Failed, "the daemon is not understood", e))?;
    word.notes.iter().for_each(|text| note(text));
    match word.outcome {
        Outcome::Ready => Ok(pid),
        Outcome::Failed { kind, message } => {
            // It has nothing left to do; a mount tried again at once must not find it alive.
            child
                .wait()
                .context(|| "cannot wait for the daemon to end")?;
            Err(Error::new(kind, message))
        }
    }
}

/// The child's end of the pipe.
pub struct Parent {
    pipe: Option<ReadyWriter>,
    notes: Vec<String>,
}

impl Parent {
    /// Takes the pipe that the parent made; `None` when this process was not started by [`start`].
    pub fn from_env() -> Option<Parent> {
        ReadyWriter::from_env().map(|pipe| Parent {
            pipe: Some(pipe),
            notes: Vec::new(),
        })
    }

    fn say(&mut self, outcome: Outcome) -> bool {
        let word = Word {
            notes: std::mem::take(&mut self.notes),
            outcome,
        };
        match (self.pipe.take(), serde_json::to_string(&word)) {
            (Some(pipe), Ok(line)) => pipe.send(&line).is_ok(),
            _ => false,
        }
    }

    /// Tells why the daemon does not serve; nobody hears it after it was ready.
    pub fn failed(&mut self, e: &Error) {
        self.say(Outcome::Failed {
            kind: e.kind(),
            message: cut(&e.chain()),
        });
    }
}

impl Announce for Parent {
    fn note(&mut self, text: &str) {
        if self.notes.len() < NOTES_MAX {
            self.notes.push(cut(text));
        }
    }

    fn ready(&mut self) -> bool {
        self.say(Outcome::Ready)
    }
}

/// Plain and bounded: what is foreign in it was escaped where it came in.
fn cut(text: &str) -> String {
    let plain = |c: char| {
        if c == ' ' || c.is_ascii_graphic() {
            c
        } else {
            '?'
        }
    };
    text.chars().map(plain).take(TEXT_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The longest word still fits the pipe's line of 64 KiB.
    #[test]
    fn the_longest_word_fits() {
        let long = cut(&"\"\n".repeat(100_000));
        assert!(!long.contains('\n'));
        let outcome = Outcome::Failed {
            kind: Kind::NoSpace,
            message: long.clone(),
        };
        let word = Word {
            notes: vec![long; NOTES_MAX],
            outcome,
        };
        let line = serde_json::to_string(&word).unwrap();
        assert!(line.len() < 60 << 10, "{}", line.len());
        assert_eq!(serde_json::from_str::<Word>(&line).unwrap(), word);
    }
}
