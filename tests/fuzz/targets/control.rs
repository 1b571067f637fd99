//! Lines of the control protocol: requests and answers.
//!
//! Input: a byte that says which and how the stream ends, then the stream. Held: a message that was understood says the same
//! when it is sent again; what is refused is `Invalid`; no line is read beyond its limit.

use std::io::{self, BufReader, Read};

use serde::Serialize;
use serde::de::DeserializeOwned;
use stillframe::daemon::protocol::{
    Answer, Choices, Leave, NewSize, Origin, Request, Response, receive, send,
};
use stillframe::error::Kind;
use stillframe::volume::OnFull;

use super::{Target, nothing};

pub const TARGET: Target = Target {
    name: "control",
    seeds,
    run,
    reaches: &["nothing", "refused", "request", "answer"],
    tokens: &[
        b"{",
        b"}",
        b"[",
        b"]",
        b"\"",
        b":",
        b",",
        b"\\u0000",
        b"\\ud800",
        b"null",
        b"true",
        b"-1",
        b"1e999",
        b"18446744073709551615",
        b"18446744073709551616",
        b"\"do\"",
        b"\"name\"",
        b"\"with\"",
        b"\"is\"",
        b"\"ok\"",
        b"\"error\"",
        b"\"progress\"",
        b"\"status\"",
        b"\"volumes\"",
        b"\n",
        b"\xff",
        b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    ],
    max_len: 8192,
    group: 1,
    reset: nothing,
};

/// Longest line here, so that the limit is met.
const MAX: u64 = 700;

fn requests() -> Vec<Request> {
    let (name, volume, new) = ("s1".to_owned(), "vm".to_owned(), "s2".to_owned());
    let n = || name.clone();
    let v = || volume.clone();
    vec![
        Request::Status {},
        Request::VolumeAdd {
            name: v(),
            source: "/srv/vm \u{1b}.img".into(),
            choices: Choices {
                grain: Some(65536),
                on_full: Some(OnFull::FailSnapshot),
                on_full_wait: Some(7),
            },
        },
        Request::VolumeList { name: None },
        Request::VolumeSet {
            name: v(),
            choices: Choices::default(),
        },
        Request::VolumeAccept { name: v() },
        Request::VolumeRemove { name: v() },
        Request::VolumeResize {
            name: v(),
            size: NewSize::By(u64::MAX),
        },
        Request::SnapshotCreate {
            targets: vec![(v(), n()), (n(), v())],
        },
        Request::SnapshotList { volume: Some(v()) },
        Request::SnapshotDelete {
            volume: v(),
            name: n(),
            keep_bookmark: true,
        },
        Request::SnapshotRevert {
            volume: v(),
            name: n(),
            force: false,
        },
        Request::SnapshotHold {
            volume: v(),
            name: n(),
            held: true,
        },
        Request::SnapshotRename {
            volume: v(),
            name: n(),
            new: new.clone(),
        },
        Request::CloneCreate {
            volume: v(),
            of: Origin::Clone(n()),
            name: new.clone(),
        },
        Request::CloneList { volume: None },
        Request::CloneDelete {
            volume: v(),
            name: n(),
        },
        Request::CloneRename {
            volume: v(),
            name: n(),
            new,
        },
        Request::BookmarkList { volume: None },
        Request::BookmarkDelete {
            volume: v(),
            name: n(),
        },
        Request::Diff {
            volume: v(),
            from: n(),
            to: "live".into(),
        },
        Request::Unmount { how: Leave::Lazily },
    ]
}

/// Answers as the daemon sends them.
const ANSWERS: [&str; 5] = [
    r#"{"error":{"kind":"damaged","message":"no"}}"#,
    r#"{"ok":{"is":"volumes","with":[{"name":"vm","uuid":"u","source":"/x","size":1,"grain":4096,"state":"active","reason":null,"used":0,"reclaimable":0,"on_full":"fail-write","on_full_wait":60,"added":"t","snapshots":[{"volume":"vm","name":"a","uuid":"u","epoch":1,"time":"t","size":1,"allocated":0,"unique":0,"state":"failed","reason":"full","parent":null,"group":null,"held":false}],"clones":[],"bookmarks":[]}]}}"#,
    r#"{"ok":{"is":"status","with":{"version":"1","pid":7,"store":"/s","uuid":"u","mountpoint":null,"log_bytes":1,"thin":{"used":1,"limit":null,"free":2,"growth_per_hour":-3,"measured_seconds":4,"full_in_seconds":null},"volumes":[]}}}"#,
    r#"{"ok":{"is":"snapshots","with":[]}}"#,
    r#"{"ok":{"is":"detached"}}"#,
];

fn seeds() -> Vec<Vec<u8>> {
    let line = |first: u8, message: &dyn Fn(&mut Vec<u8>)| {
        let mut out = vec![first];
        message(&mut out);
        out
    };
    let mut seeds: Vec<Vec<u8>> = requests()
        .iter()
        .map(|r| line(0, &|out| send(out, r).unwrap()))
        .collect();
    for response in [
        Response::Progress("half".into()),
        Response::Ok(Answer::Done),
    ] {
        seeds.push(line(1, &|out| send(out, &response).unwrap()));
    }
    for answer in ANSWERS {
        seeds.push(line(1, &|out| {
            out.extend_from_slice(answer.as_bytes());
            out.push(b'\n');
        }));
    }
    seeds
}

/// A stream that a signal interrupts before its first byte, and that comes in two parts.
struct Interrupted<'a> {
    rest: &'a [u8],
    reads: usize,
    /// It ends with an error and not with an end.
    broken: bool,
}

impl Read for Interrupted<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.reads += 1;
        let most = match self.reads {
            1 => return Err(io::ErrorKind::Interrupted.into()),
            _ if self.rest.is_empty() && self.broken => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            2 => self.rest.len().div_ceil(2),
            _ => self.rest.len(),
        };
        let len = most.min(buf.len());
        let (now, later) = self.rest.split_at(len);
        buf[..len].copy_from_slice(now);
        self.rest = later;
        Ok(len)
    }
}

fn line_of(message: &impl Serialize) -> Vec<u8> {
    let mut line = Vec::new();
    send(&mut line, message).expect("what was read can be written");
    line
}

fn read<T: DeserializeOwned + Serialize>(
    stream: &[u8],
    what: &'static str,
    broken: bool,
) -> &'static str {
    let mut reader = BufReader::new(Interrupted {
        rest: stream,
        reads: 0,
        broken,
    });
    let message: T = match receive(&mut reader, MAX) {
        Ok(Some(message)) => message,
        Ok(None) => {
            assert!(stream.is_empty());
            return "nothing";
        }
        Err(e) => {
            assert!(e.kind() == Kind::Invalid || broken, "{e:?}");
            assert!(!e.chain().contains('\n'), "one line: {:?}", e.chain());
            return "refused";
        }
    };
    let line = line_of(&message);
    assert_eq!(line.iter().filter(|&&b| b == b'\n').count(), 1, "one line");
    let mut again = BufReader::new(&line[..]);
    let again: Option<T> = receive(&mut again, u64::MAX >> 1).expect("what was sent is understood");
    assert_eq!(line_of(&again.expect("there is one")), line);
    what
}

fn run(input: &[u8]) -> &'static str {
    match input.split_first() {
        None => "nothing",
        Some((which, stream)) => {
            let broken = which & 2 != 0;
            match which % 2 {
                0 => read::<Request>(stream, "request", broken),
                _ => read::<Response>(stream, "answer", broken),
            }
        }
    }
}
