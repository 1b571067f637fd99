//! Reads snapshots through the library, without a mount and without a daemon.
//!
//! ```text
//! cargo run --release --example snapshot_reader -- STORE                    list what is there
//! cargo run --release --example snapshot_reader -- STORE VOL@NAME           print its hash
//! cargo run --release --example snapshot_reader -- STORE VOL@NAME FILE      copy it, holes kept
//! ```
//!
//! The store must not be served by a daemon meanwhile: opening it takes its lock.

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use stillframe::daemon::store;
use stillframe::units::Name;
use stillframe::volume::{Engine, Snapshot};

/// Bytes read at once.
const PIECE: u64 = 1 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some(path) = args.first() else {
        return Err("usage: snapshot_reader STORE [VOL@NAME [FILE]]".into());
    };
    // Opening recovers what a killed daemon left; `close` is the clean stop, in any case.
    let store = store::hold(Path::new(path), false)?.open()?;
    let outcome = run(store.engine(), &args[1..]);
    store.close()?;
    outcome
}

fn run(engine: &Engine, args: &[String]) -> Result<(), Box<dyn Error>> {
    let Some(target) = args.first() else {
        return list(engine);
    };
    let (volume, name) = target
        .split_once('@')
        .ok_or("a snapshot is written VOL@NAME")?;
    // While this lives, the snapshot's data stays, also if somebody deletes it.
    let snapshot = engine.open_snapshot(&Name::new(volume)?, &Name::new(name)?)?;
    match args.get(1) {
        Some(file) => copy(&snapshot, Path::new(file)),
        None => {
            println!("{}  {target}", hash(&snapshot)?);
            Ok(())
        }
    }
}

fn list(engine: &Engine) -> Result<(), Box<dyn Error>> {
    for volume in engine.volumes() {
        let info = volume.info();
        println!("{} ({} bytes, {:?})", info.name, info.size, info.state);
        for snapshot in engine.snapshots(&info.name)? {
            println!(
                "  @{} epoch {} {:?}",
                snapshot.name, snapshot.epoch.0, snapshot.state
            );
        }
    }
    Ok(())
}

fn hash(snapshot: &Snapshot) -> Result<blake3::Hash, Box<dyn Error>> {
    let mut hasher = blake3::Hasher::new();
    pieces(snapshot, 0, snapshot.size(), |_, data| {
        hasher.update(data);
        Ok(())
    })?;
    Ok(hasher.finalize())
}

/// Copies the data and leaves the holes: the copy takes no more space than the original.
fn copy(snapshot: &Snapshot, to: &Path) -> Result<(), Box<dyn Error>> {
    let file = File::create_new(to)?;
    file.set_len(snapshot.size())?;
    let mut at = 0;
    while let Some(start) = snapshot.next_data(at)? {
        let end = snapshot.next_hole(start)?;
        pieces(snapshot, start, end, |offset, data| {
            Ok(file.write_all_at(data, offset)?)
        })?;
        at = end;
    }
    file.sync_all()?;
    Ok(())
}

fn pieces(
    snapshot: &Snapshot,
    start: u64,
    end: u64,
    mut take: impl FnMut(u64, &[u8]) -> Result<(), Box<dyn Error>>,
) -> Result<(), Box<dyn Error>> {
    let mut data = vec![0; PIECE as usize];
    let mut at = start;
    while at < end {
        let len = PIECE.min(end - at) as usize;
        snapshot.read_at(at, &mut data[..len])?;
        take(at, &data[..len])?;
        at += len as u64;
    }
    Ok(())
}
