//! Exit codes and the one line that says what went wrong: the only table of either.
//!
//! The line is `stillframe: <what>: <why>; <what to do>`. What to do comes from whoever raised the
//! error where he knows better (the text holds a `; ` then), else from the kind.

use std::error::Error as _;
use std::io;

use crate::error::{Error, Kind};

/// Everything was done.
pub const DONE: u8 = 0;
/// Wrong usage; also what the argument parser answers.
pub const USAGE: u8 = 2;
/// Something was skipped.
pub const INCOMPLETE: u8 = 3;
/// Something was wrong, and all of it is mended.
pub const REPAIRED: u8 = 10;
/// Stopped by Ctrl-C.
pub const INTERRUPTED: u8 = 130;

/// The exit code of a failure.
pub fn code(kind: Kind) -> u8 {
    match kind {
        Kind::Failed | Kind::Unsupported | Kind::Limit | Kind::Io => 1,
        Kind::Invalid => USAGE,
        Kind::NotFound => 4,
        Kind::Exists | Kind::Busy => 5,
        Kind::Locked => 6,
        Kind::Damaged => 7,
        Kind::NoSpace => 8,
        Kind::Permission => 9,
        Kind::Interrupted => INTERRUPTED,
    }
}

fn advice(kind: Kind) -> &'static str {
    match kind {
        Kind::Invalid => "see --help",
        Kind::NotFound => "see 'stillframe volume list' and 'stillframe snapshot list'",
        Kind::Exists => "choose another name",
        Kind::Busy => "try again when it is no longer in use",
        Kind::Locked => "'stillframe status' shows a daemon, 'stillframe umount' ends it",
        Kind::Permission => "run this as the store's owner or as root",
        Kind::NoSpace => "free space or delete snapshots",
        Kind::Damaged => "copy the store aside, then run 'stillframe check'",
        Kind::Failed => "see 'stillframe status' and the daemon's log",
        Kind::Unsupported => "see the README for what this version can do",
        Kind::Limit => "reduce what is asked for",
        Kind::Interrupted => "run it again",
        Kind::Io => "see the system's log and the daemon's",
    }
}

/// The line for stderr.
pub fn line(e: &Error) -> String {
    let text = safe(&e.chain());
    if text.contains("; ") {
        return format!("stillframe: {text}");
    }
    format!("stillframe: {text}; {}", advice(e.kind()))
}

/// The last door before a terminal: names were escaped where they came in, this catches the rest.
pub fn safe(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c == ' ' || c.is_ascii_graphic() {
            out.push(c);
        } else {
            out.extend(c.escape_default());
        }
    }
    out
}

/// Whether our reader went away (`stillframe ... | head`): no failure worth a word.
pub fn is_broken_pipe(e: &Error) -> bool {
    let cause = e.source().and_then(|s| s.downcast_ref::<io::Error>());
    e.to_string() == super::out::CONTEXT
        && cause.is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of DESIGN section 3 and of the README.
    #[test]
    fn codes_are_as_documented() {
        let documented = [
            (
                1,
                vec![Kind::Failed, Kind::Unsupported, Kind::Limit, Kind::Io],
            ),
            (2, vec![Kind::Invalid]),
            (4, vec![Kind::NotFound]),
            (5, vec![Kind::Exists, Kind::Busy]),
            (6, vec![Kind::Locked]),
            (7, vec![Kind::Damaged]),
            (8, vec![Kind::NoSpace]),
            (9, vec![Kind::Permission]),
            (130, vec![Kind::Interrupted]),
        ];
        for (expected, kinds) in documented {
            for kind in kinds {
                assert_eq!(code(kind), expected, "{kind:?}");
            }
        }
    }

    #[test]
    fn a_line_is_one_plain_line_and_says_what_to_do() {
        let cause = io::Error::other("boom\n\u{1b}[31m");
        let text = line(&Error::with_source(Kind::Io, "reading x", cause));
        assert_eq!(
            text,
            "stillframe: reading x: boom\\n\\u{1b}[31m; see the system's log and the daemon's"
        );
        let text = line(&Error::new(Kind::Busy, "x is in use; use --lazy"));
        assert_eq!(text, "stillframe: x is in use; use --lazy");
    }

    #[test]
    fn only_our_own_output_may_break_quietly() {
        let broken = || io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(is_broken_pipe(&Error::io(
            super::super::out::CONTEXT,
            broken()
        )));
        assert!(!is_broken_pipe(&Error::io(
            "cannot ask the daemon",
            broken()
        )));
        assert!(!is_broken_pipe(&Error::io(
            super::super::out::CONTEXT,
            io::Error::from(io::ErrorKind::StorageFull)
        )));
    }
}
