//! Two doors for `tests/fuzz/`, on plain bytes: the catalogue's readers, which nobody outside of this layer
//! needs. Not an interface, and only in a build with the feature `planted`, which nobody ships.
//!
//! Promises: whatever the bytes, an answer or an error, no panic. What is accepted is said again
//! ([`Accepted::again`]) and looked over ([`Accepted::faults`]).

use crate::error::Result;
use crate::log::record::Record;
use crate::units::VOLUME_SIZE_MAX;
use crate::volume::catalog::{Catalog, INO_PER_VOLUME, VolumeEntry};
use crate::volume::clone_records::{Base, LAYER_BIT};
use crate::volume::facts::SnapshotState;

/// A catalogue that was accepted.
#[derive(Debug)]
pub struct Accepted {
    /// Its encoding.
    pub again: Vec<u8>,
    /// What does not hold in it and should; a line each.
    pub faults: Vec<String>,
}

/// Reads the payload of a CATALOG.
///
/// # Errors
/// Those of reading it.
pub fn catalog(payload: &[u8]) -> Result<Accepted> {
    Catalog::decode(payload).map(|catalog| accepted(&catalog))
}

/// Reads the payload of a CATALOG and applies records one after another.
///
/// # Errors
/// Those of reading it, or of the first record that does not apply.
pub fn apply(payload: &[u8], records: &[Record]) -> Result<Accepted> {
    let mut catalog = Catalog::decode(payload)?;
    for record in records {
        catalog.apply(record)?;
    }
    Ok(accepted(&catalog))
}

fn accepted(catalog: &Catalog) -> Accepted {
    let mut faults = Vec::new();
    let mut hold = |holds: bool, what: String| {
        if !holds {
            faults.push(what);
        }
    };
    for (&id, volume) in &catalog.volumes {
        hold(
            id < catalog.next_volume,
            format!("volume {id} is ahead of its counter"),
        );
        hold(
            id < LAYER_BIT,
            format!("volume {id} has the number of a layer"),
        );
        let end = volume.ino_base.checked_add(INO_PER_VOLUME);
        let known = end.is_some_and(|end| end <= catalog.next_ino);
        hold(
            known,
            format!("volume {id} has inode numbers ahead of their counter"),
        );
        check_volume(id, volume, catalog.next_ino, &mut hold);
    }
    for (&id, clone) in &catalog.clones {
        hold(
            id < catalog.next_clone && id < LAYER_BIT,
            format!("clone {id} is ahead of its counter"),
        );
        hold(
            clone.ino < catalog.next_ino,
            format!("clone {id} has an inode number ahead of its counter"),
        );
        hold(
            clone.size <= VOLUME_SIZE_MAX,
            format!("clone {id} is too large"),
        );
        let volume = catalog.volumes.contains_key(&clone.volume);
        hold(volume, format!("clone {id} is of no volume"));
        let chain = catalog.chain(clone.top);
        hold(
            chain.len() <= catalog.layers.len(),
            format!("clone {id} goes in circles"),
        );
        let grounded = chain.last().is_some_and(|(_, layer)| match layer.base {
            Base::Nothing => true,
            Base::Layer(_) => false,
            Base::Snapshot(epoch) => catalog.snapshot_or_kept(clone.volume, epoch).is_some(),
        });
        let active = clone.state == SnapshotState::Active;
        hold(
            grounded || !active,
            format!("clone {id} is served and stands on nothing known"),
        );
        let own = chain.iter().all(|(_, layer)| layer.volume == clone.volume);
        hold(
            own || !active,
            format!("clone {id} stands on another volume"),
        );
    }
    for (&id, layer) in &catalog.layers {
        hold(
            id < catalog.next_layer && id < LAYER_BIT,
            format!("layer {id} is ahead of its counter"),
        );
        let below = !matches!(layer.base, Base::Layer(below) if below >= id);
        hold(below, format!("layer {id} stands on a newer one"));
    }
    Accepted {
        again: catalog.encode(),
        faults,
    }
}

fn check_volume(id: u32, volume: &VolumeEntry, next_ino: u64, hold: &mut impl FnMut(bool, String)) {
    let sizes = [Some(volume.size), volume.resizing];
    let small = sizes
        .into_iter()
        .flatten()
        .all(|size| size <= VOLUME_SIZE_MAX);
    hold(small, format!("volume {id} is too large"));
    hold(
        volume.grain == volume.options.grain,
        format!("volume {id} has two grains"),
    );
    for (&epoch, snap) in volume.snapshots.iter().chain(&volume.kept) {
        hold(
            epoch <= volume.epoch,
            format!("snapshot {epoch} of volume {id} is ahead of its epoch"),
        );
        hold(
            snap.size <= VOLUME_SIZE_MAX,
            format!("snapshot {epoch} of volume {id} is too large"),
        );
        hold(
            snap.ino < next_ino,
            format!("snapshot {epoch} of volume {id} has an inode number ahead"),
        );
    }
    for (&epoch, mark) in &volume.bookmarks {
        hold(
            epoch <= volume.epoch,
            format!("bookmark {epoch} of volume {id} is ahead of its epoch"),
        );
        hold(
            mark.size <= VOLUME_SIZE_MAX,
            format!("bookmark {epoch} of volume {id} is too large"),
        );
        hold(
            mark.ino < next_ino,
            format!("bookmark {epoch} of volume {id} has an inode number ahead"),
        );
    }
}
