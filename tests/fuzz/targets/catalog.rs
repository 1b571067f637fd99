//! The catalogue: its document, and the bodies of records that are applied to it (volumes, snapshots,
//! bookmarks, clones, layers, marks of failure).
//!
//! Input: a byte that says how many records follow the document (0: none), the document, the records'
//! table. Held: what `volume::fuzzing` lists, and a catalogue that was accepted survives its encoding.

use stillframe::error::Kind;
use stillframe::log::record::{Record, RecordType, decode_table, encode_table};
use stillframe::log::scan::{Event, Scan};
use stillframe::units::{BLOCK, Place};
use stillframe::volume::fuzzing;

use super::bytes::{Input, put_counted};
use super::disk::MemDir;
use super::store::{segments, valid};
use super::{Target, nothing};

pub const TARGET: Target = Target {
    name: "catalog",
    seeds,
    run,
    reaches: &["damaged", "newer", "document", "records"],
    tokens: &[
        &[16, 0],
        &[17, 0],
        &[18, 0],
        &[19, 0],
        &[20, 0],
        &[21, 0],
        &[22, 0],
        &[23, 0],
        &[24, 0],
        &[25, 0],
        &[29, 0],
        &[30, 0],
        &[32, 0],
        &[33, 0],
        &[34, 0],
        &[35, 0],
        &[48, 0],
        &[0, 0, 0, 0x80],
        &[1, 0, 0, 0],
        b"live",
        b"..",
    ],
    max_len: 16 << 10,
    group: 1,
    reset: nothing,
};

/// The documents and all other records of the valid store, in the order of the log.
pub fn history() -> (Vec<Vec<u8>>, Vec<Record>) {
    let valid = valid();
    let files = segments();
    let named = files
        .iter()
        .map(|(n, bytes)| (format!("{n:06}.seg"), bytes.clone()));
    let dir = MemDir::new(named);
    let scan = Scan {
        dir: &dir,
        keys: &valid.keys,
        store: valid.superblock.store,
        from_segment: 0,
    };
    let (mut documents, mut records) = (Vec::new(), Vec::new());
    let payload = |place: Place, len: u32| {
        let file = &files.iter().find(|(n, _)| *n == place.segment).unwrap().1;
        let from = usize::try_from(u64::from(place.block) * BLOCK).unwrap();
        file[from..from + len as usize].to_vec()
    };
    scan.run(&mut |event| {
        if let Event::Batch {
            place,
            records: found,
            ..
        } = event
        {
            for record in found {
                match record.kind {
                    RecordType::Catalog => {
                        documents.push(payload(record.place(place), record.payload.len));
                    }
                    _ => records.push(record.clone()),
                }
            }
        }
        Ok(())
    })
    .unwrap();
    (documents, records)
}

fn seed(document: &[u8], records: &[Record]) -> Vec<u8> {
    let mut out = vec![u8::try_from(records.len()).unwrap()];
    put_counted(&mut out, document);
    out.extend(encode_table(records));
    out
}

fn seeds() -> Vec<Vec<u8>> {
    let (documents, records) = history();
    let mut seeds: Vec<Vec<u8>> = documents.iter().map(|d| seed(d, &[])).collect();
    let catalogue: Vec<Record> = records
        .into_iter()
        .filter(|r| !matches!(r.kind, RecordType::Preserve | RecordType::Bitmap))
        .collect();
    for document in [documents.first(), documents.last()].into_iter().flatten() {
        seeds.extend(catalogue.chunks(7).map(|some| seed(document, some)));
        seeds.extend(catalogue.chunks(60).map(|some| seed(document, some)));
    }
    // Records that no history of one store holds together.
    let last = documents.last().unwrap();
    let body = |kind, volume, epoch, body: &[u8]| Record::plain(kind, volume, epoch, body.to_vec());
    let mut lost = 9u64.to_le_bytes().to_vec();
    lost.extend(4u32.to_le_bytes());
    lost.extend(b"lost");
    let odd = [
        body(RecordType::Invalidate, 1, 1, &lost),
        body(RecordType::Invalidate, 1 << 31 | 1, 0, &lost),
        body(RecordType::BookmarkDeleted, 1, 3, &[]),
        body(RecordType::CloneDeleted, 1, 1, &[]),
        body(RecordType::Delete, 1, 2, &[]),
        body(RecordType::VolumeRemoved, 1, 0, &[]),
        body(RecordType::Group, 0, 0, &[]),
    ];
    seeds.push(seed(last, &odd));
    seeds
}

fn run(input: &[u8]) -> &'static str {
    let mut input = Input(input);
    let count = u32::from(input.u8());
    let document = input.counted();
    let read = match count {
        0 => fuzzing::catalog(document),
        _ => decode_table(input.0, count).and_then(|records| fuzzing::apply(document, &records)),
    };
    let accepted = match read {
        Ok(accepted) => accepted,
        Err(e) if e.kind() == Kind::Damaged => return "damaged",
        Err(e) if e.kind() == Kind::Unsupported => return "newer",
        Err(e) => panic!("no other error: {e:?}"),
    };
    assert!(accepted.faults.is_empty(), "{:?}", accepted.faults);
    let again = fuzzing::catalog(&accepted.again).expect("what was written is read");
    assert_eq!(again.again, accepted.again, "it survives its encoding");
    assert!(again.faults.is_empty());
    match count {
        0 => "document",
        _ => "records",
    }
}
