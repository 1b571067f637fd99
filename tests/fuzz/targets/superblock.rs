//! The superblock: two slots, with right checksums or wrong ones.
//!
//! Input: for each slot a byte of flags (1: the checksum stays as it is) and its bytes without the zeros
//! at the end. Held: what opens keeps its own limits, survives being written, and the copy written is the
//! one that is read.

use stillframe::error::Kind;
use stillframe::log::segment::{SEGMENT_MAX, SEGMENT_MIN};
use stillframe::log::superblock::{FILE, INCOMPAT_KNOWN, MARKS_MAX, SLOT_LEN, SuperblockFile};

use stillframe::units::COUNTER_MAX;

use super::bytes::{Input, put_counted, trimmed};
use super::disk::MemDir;
use super::store::valid;
use super::{Target, nothing};

pub const TARGET: Target = Target {
    name: "superblock",
    seeds,
    run,
    reaches: &["damaged", "newer", "opened", "full of sequences"],
    tokens: &[
        b"SFsuper1",
        &[1, 0, 0, 0, 0xfe, 0xff, 0xff, 0xff],
        &[2, 0, 0, 0, 0xfd, 0xff, 0xff, 0xff],
    ],
    max_len: 4096,
    group: 1,
    reset: nothing,
};

const COUNT_AT: usize = 104;
const MARKS_AT: usize = 112;

fn seeds() -> Vec<Vec<u8>> {
    use stillframe::log::superblock::{InvalidMark, Reason};
    let mut plain = valid().superblock.clone();
    let mut marked = plain.clone();
    marked.sequence += 1;
    marked.invalid = [(1, Reason::Full), (2, Reason::Lost)]
        .map(|(volume, reason)| InvalidMark {
            volume,
            first: 3,
            last: 9,
            reason,
        })
        .to_vec();
    let both = |a: &[u8], b: &[u8]| {
        let mut out = vec![0];
        put_counted(&mut out, trimmed(a));
        out.push(0);
        put_counted(&mut out, trimmed(b));
        out
    };
    let (a, b) = (plain.encode(), marked.encode());
    plain.sequence = COUNTER_MAX;
    vec![
        both(&a, &b),
        both(&b, &a),
        both(&a, &[]),
        both(&plain.encode(), &a),
    ]
}

fn slot(input: &mut Input<'_>) -> Vec<u8> {
    let flags = input.u8();
    let mut bytes = input.counted().to_vec();
    bytes.resize(SLOT_LEN, 0);
    if flags & 1 == 0 {
        let count = u32::from_le_bytes(bytes[COUNT_AT..MARKS_AT - 4].try_into().unwrap());
        let used = MARKS_AT + 24 * count.min(MARKS_MAX as u32) as usize;
        let sum = blake3::derive_key("stillframe 2026-11 superblock v1", &bytes[..used]);
        bytes[used..used + 16].copy_from_slice(&sum[..16]);
    }
    bytes
}

fn run(input: &[u8]) -> &'static str {
    let mut input = Input(input);
    let content = [slot(&mut input), slot(&mut input)].concat();
    let dir = MemDir::new([(FILE.to_owned(), content)]);
    let mut file = match SuperblockFile::open(&dir) {
        Ok(file) => file,
        Err(e) if e.kind() == Kind::Damaged => return "damaged",
        Err(e) if e.kind() == Kind::Unsupported => return "newer",
        Err(e) => panic!("no other error: {e:?}"),
    };
    let found = file.current().clone();
    assert!(found.invalid.len() <= MARKS_MAX);
    assert_eq!(found.incompat & !INCOMPAT_KNOWN, 0);
    assert!((SEGMENT_MIN..=SEGMENT_MAX).contains(&found.segment_bytes));
    let mut next = found.clone();
    next.open = !next.open;
    if let Err(e) = file.update(next.clone()) {
        assert_eq!((found.sequence, e.kind()), (COUNTER_MAX, Kind::Limit));
        return "full of sequences";
    }
    next.sequence = found.sequence + 1;
    assert_eq!(*file.current(), next);
    let again = SuperblockFile::open(&dir).expect("it was just written");
    assert_eq!(*again.current(), next);
    "opened"
}
