//! Clones in the catalogue: entries, records, and what keeps a layer or a deleted snapshot there.
//!
//! A clone names its top layer; each layer names what lies beneath it: a snapshot, another layer or
//! nothing. A layer that no clone reaches vanishes with the record that made it so, and with it the
//! last reason to keep a snapshot that was deleted meanwhile. All of that is decided by the records
//! alone, so a replay decides the same.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Error, Kind, Result};
use crate::log::codec::{Reader, Writer};
use crate::log::record::{Record, RecordType};
use crate::units::{Name, Uuid, VolumeId};
use crate::volume::catalog::{Catalog, SnapEntry, counted, same_grain, sized};
use crate::volume::facts::SnapshotState;

/// Set in a volume's number, it stands for a layer (in the extent map, as the owner of the layer's
/// set of grains) or for a clone (in INVALIDATE). Numbers of volumes, layers and clones are below it.
pub const LAYER_BIT: u32 = 1 << 31;

const UNGROUNDED: &str = "what it was made of is not known";

const GROWING: u8 = 1;
const FAILED: u8 = 2;

/// What lies beneath a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// Nothing: zeros.
    Nothing,
    /// The snapshot of the layer's volume with this epoch, listed or kept.
    Snapshot(u64),
    /// Another layer of the volume, never written again.
    Layer(u32),
}

/// A layer in the catalogue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerEntry {
    /// Number of its volume.
    pub volume: u32,
    /// What lies beneath.
    pub base: Base,
    /// Bytes of it that show through; behind them, what the layer does not hold is zero.
    pub visible: u64,
}

/// A clone in the catalogue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloneEntry {
    /// Number of its volume.
    pub volume: u32,
    /// Name, unique among the volume's clones.
    pub name: Name,
    /// Unique for ever.
    pub uuid: Uuid,
    /// Inode number.
    pub ino: u64,
    /// When it was made, ns since 1970.
    pub created_ns: i64,
    /// Bytes.
    pub size: u64,
    /// The layer that it writes to, and nobody else.
    pub top: u32,
    /// It was made empty, and its size may change.
    pub growing: bool,
    /// Whether it can be read.
    pub state: SnapshotState,
}

/// The owner of a layer's set in the extent map.
pub fn layer_volume(layer: u32) -> VolumeId {
    VolumeId(LAYER_BIT | layer)
}

fn damaged(why: &str) -> Error {
    Error::new(Kind::Damaged, format!("a CLONE {why}"))
}

impl Catalog {
    /// Numbers of all layers; each one's set of grains is in the extent map under
    /// [`layer_volume`], epoch 1.
    pub fn layer_ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.layers.keys().copied()
    }

    /// A clone's number by name.
    pub fn find_clone(&self, volume: u32, name: &Name) -> Option<u32> {
        self.clones
            .iter()
            .find(|(_, c)| c.volume == volume && c.name == *name)
            .map(|(&id, _)| id)
    }

    /// Layers from `top` down; stops at one that is not known.
    pub fn chain(&self, top: u32) -> Vec<(u32, LayerEntry)> {
        let mut chain = Vec::new();
        let mut next = Base::Layer(top);
        while let Base::Layer(id) = next {
            let Some(layer) = self.layers.get(&id) else {
                break;
            };
            // Layers stand on older ones only, so this ends.
            if chain.last().is_some_and(|&(above, _)| above <= id) {
                break;
            }
            chain.push((id, *layer));
            next = layer.base;
        }
        chain
    }

    /// Epoch of the snapshot at the bottom of a clone's layers.
    pub fn bottom(&self, top: u32) -> Option<u64> {
        match self.chain(top).last() {
            Some((_, layer)) => match layer.base {
                Base::Snapshot(epoch) => Some(epoch),
                Base::Nothing | Base::Layer(_) => None,
            },
            None => None,
        }
    }

    /// A snapshot of a volume, listed or kept by a layer.
    pub fn snapshot_or_kept(&self, volume: u32, epoch: u64) -> Option<&SnapEntry> {
        let volume = self.volumes.get(&volume)?;
        let listed = volume.snapshots.get(&epoch);
        listed.or_else(|| volume.kept.get(&epoch))
    }

    /// Takes a snapshot out of the listing; it is kept while a layer stands on it. Returns what was
    /// listed.
    pub fn unlist_snapshot(&mut self, volume: u32, epoch: u64) -> Option<SnapEntry> {
        let needed = self.stands_on(volume, epoch);
        let entry = self.volumes.get_mut(&volume)?;
        let snap = entry.snapshots.remove(&epoch)?;
        if needed {
            entry.kept.insert(epoch, snap.clone());
        }
        Some(snap)
    }

    fn stands_on(&self, volume: u32, epoch: u64) -> bool {
        self.layers
            .values()
            .any(|l| l.volume == volume && l.base == Base::Snapshot(epoch))
    }

    /// Applies a CLONE.
    pub(super) fn apply_clone(&mut self, record: &Record) -> Result<()> {
        let id = u32::try_from(record.epoch).map_err(|_| damaged("has no number"))?;
        let (mut entry, layers) = decode_clone(record.volume, &record.body)?;
        if !self.volumes.contains_key(&record.volume) || id >= LAYER_BIT {
            return Err(damaged("is of a volume that was never defined"));
        }
        let stranger = |id| {
            let known: Option<&LayerEntry> = self.layers.get(id);
            known.is_some_and(|layer| layer.volume != record.volume)
        };
        if layers.keys().any(stranger) {
            return Err(damaged("takes a layer of another volume"));
        }
        for layer in layers.keys() {
            self.next_layer = self.next_layer.max(layer + 1);
        }
        let moved = layers.iter().any(|(id, layer)| {
            let known = self.layers.get(id);
            known.is_some_and(|known| known.base != layer.base)
        });
        self.layers.extend(layers);
        self.next_clone = self.next_clone.max(id + 1);
        self.next_ino = self.next_ino.max(entry.ino + 1);
        let whole = self.is_whole(record.volume, entry.top);
        if !whole && entry.state == SnapshotState::Active {
            // Only where a part of the log was lost: the clone goes, not the store.
            entry.state = SnapshotState::Failed(UNGROUNDED.to_owned());
        }
        let replaced = self.clones.insert(id, entry).is_some();
        if moved {
            // Other clones may have stood on what moved.
            self.fail_groundless(record.volume);
        }
        if replaced {
            // Not for a new one: in a CATALOG the clones that need the others' layers are yet to come.
            self.drop_unreachable(record.volume);
        }
        Ok(())
    }

    /// Whether the layers from `top` down are known, of one volume, and stand on something known.
    fn is_whole(&self, volume: u32, top: u32) -> bool {
        let chain = self.chain(top);
        let own = chain.iter().all(|(_, layer)| layer.volume == volume);
        let grounded = chain.last().is_some_and(|(_, last)| match last.base {
            Base::Nothing => true,
            Base::Layer(_) => false,
            Base::Snapshot(epoch) => self.snapshot_or_kept(volume, epoch).is_some(),
        });
        own && grounded
    }

    /// Fails the clones of a volume whose layers are not whole any more.
    fn fail_groundless(&mut self, volume: u32) {
        let own = self.clones.iter().filter(|(_, c)| c.volume == volume);
        let broken = own.filter(|(_, c)| !self.is_whole(volume, c.top));
        let broken: Vec<u32> = broken.map(|(&id, _)| id).collect();
        for id in broken {
            if let Some(clone) = self.clones.get_mut(&id)
                && clone.state == SnapshotState::Active
            {
                clone.state = SnapshotState::Failed(UNGROUNDED.to_owned());
            }
        }
    }

    /// Applies a CLONE_ALLOC: a growing clone has at least the size that its data reaches.
    pub(super) fn apply_clone_alloc(&mut self, record: &Record) -> Result<()> {
        if let Some(volume) = self.volumes.get(&record.volume) {
            same_grain(volume, record)?;
        }
        let mut r = Reader::new(&record.body, "a CLONE_ALLOC");
        let (_, _, size) = (r.u32()?, r.u32()?, sized(r.u64()?)?);
        if size > 0 {
            for clone in self.clones.values_mut() {
                if u64::from(clone.top) == record.epoch && clone.volume == record.volume {
                    clone.size = clone.size.max(size);
                }
            }
        }
        Ok(())
    }

    /// Applies a CLONE_DELETED.
    pub(super) fn apply_clone_deleted(&mut self, record: &Record) {
        let id = u32::try_from(record.epoch).unwrap_or(u32::MAX);
        self.clones.remove(&id);
        self.drop_unreachable(record.volume);
    }

    /// Applies an INVALIDATE of a clone.
    pub(super) fn fail_clone(&mut self, id: u32, why: &str) {
        if let Some(clone) = self.clones.get_mut(&id) {
            clone.state = SnapshotState::Failed(why.to_owned());
        }
    }

    /// What no clone of the volume needs any more.
    pub(super) fn drop_unreachable(&mut self, volume: u32) {
        let reached: BTreeSet<u32> = self
            .clones
            .values()
            .filter(|c| c.volume == volume)
            .flat_map(|c| self.chain(c.top))
            .map(|(id, _)| id)
            .collect();
        self.layers
            .retain(|id, layer| layer.volume != volume || reached.contains(id));
        let needed: BTreeSet<u64> = self
            .layers
            .values()
            .filter(|l| l.volume == volume)
            .filter_map(|l| match l.base {
                Base::Snapshot(epoch) => Some(epoch),
                Base::Nothing | Base::Layer(_) => None,
            })
            .collect();
        if let Some(entry) = self.volumes.get_mut(&volume) {
            entry.kept.retain(|epoch, _| needed.contains(epoch));
        }
    }

    /// The records of all clones of a volume, each layer in one of them.
    pub(super) fn clone_records(&self, volume: u32) -> Vec<Record> {
        let mut told = BTreeSet::new();
        let clones = self.clones.iter().filter(|(_, c)| c.volume == volume);
        clones
            .map(|(&id, clone)| {
                let mut layers = self.chain(clone.top);
                layers.retain(|(layer, entry)| entry.volume == volume && told.insert(*layer));
                clone_record(id, clone, &layers)
            })
            .collect()
    }
}

/// The CLONE record of a clone that defines some layers, its top one among them unless it is known.
pub fn clone_record(id: u32, clone: &CloneEntry, layers: &[(u32, LayerEntry)]) -> Record {
    let mut w = Writer::new();
    w.uuid(clone.uuid).u64(clone.ino).i64(clone.created_ns);
    let count = u32::try_from(layers.len()).expect("chains are bounded");
    w.u64(clone.size).u32(clone.top).u32(count);
    let (failed, why) = match &clone.state {
        SnapshotState::Active => (0, ""),
        SnapshotState::Failed(why) => (FAILED, why.as_str()),
    };
    let growing = if clone.growing { GROWING } else { 0 };
    w.u8(failed | growing).pad(8);
    for (layer, entry) in layers {
        let (kind, base) = match entry.base {
            Base::Nothing => (0, 0),
            Base::Snapshot(epoch) => (1, epoch),
            Base::Layer(base) => (2, u64::from(base)),
        };
        w.u32(*layer).u32(kind).u64(base).u64(entry.visible);
    }
    w.text(clone.name.as_str()).text(why);
    Record::plain(RecordType::Clone, clone.volume, u64::from(id), w.finish())
}

fn decode_clone(volume: u32, body: &[u8]) -> Result<(CloneEntry, BTreeMap<u32, LayerEntry>)> {
    let mut r = Reader::new(body, "a CLONE");
    let (uuid, ino, created_ns) = (r.uuid()?, counted(r.u64()?)?, r.i64()?);
    let (size, top, count) = (sized(r.u64()?)?, r.u32()?, r.u32()?);
    let flags = r.u8()?;
    let _ = r.raw(7)?;
    let mut layers = BTreeMap::new();
    for _ in 0..count {
        let (id, kind, base, visible) = (r.u32()?, r.u32()?, r.u64()?, r.u64()?);
        let base = match (kind, u32::try_from(base)) {
            (0, _) => Base::Nothing,
            (1, _) => Base::Snapshot(base),
            (2, Ok(below)) if below < id => Base::Layer(below),
            _ => return Err(damaged("has a layer on nothing known")),
        };
        if id >= LAYER_BIT {
            return Err(damaged("has a layer with too large a number"));
        }
        let layer = LayerEntry {
            volume,
            base,
            visible,
        };
        layers.insert(id, layer);
    }
    let (name, why) = (r.name()?, r.text()?.to_owned());
    let entry = CloneEntry {
        volume,
        name,
        uuid,
        ino,
        created_ns,
        size,
        top,
        growing: flags & GROWING != 0,
        state: match flags & FAILED {
            0 => SnapshotState::Active,
            _ => SnapshotState::Failed(why),
        },
    };
    Ok((entry, layers))
}

/// The record that a clone is gone.
pub fn clone_deleted_record(volume: u32, id: u32) -> Record {
    Record::plain(RecordType::CloneDeleted, volume, u64::from(id), Vec::new())
}

/// A CLONE_ALLOC: grains that lie in a layer from now on; `size` is that of a growing clone, else 0.
pub fn clone_alloc_record(
    volume: u32,
    layer: u32,
    grains: std::ops::Range<u64>,
    grain_bytes: u64,
    zero: bool,
    size: u64,
) -> Record {
    let mut record = Record::grains(
        RecordType::CloneAlloc,
        volume,
        u64::from(layer),
        grains,
        grain_bytes,
    );
    let mut w = Writer::new();
    w.u32(u32::from(zero)).u64(size);
    record.body.extend(w.finish());
    record
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Grain;
    use crate::volume::catalog::{VolumeEntry, snap_record, volume_record};
    use crate::volume::facts::VolumeOptions;

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    fn snap(text: &str) -> SnapEntry {
        SnapEntry {
            name: name(text),
            uuid: Uuid([5; 16]),
            ino: 3000,
            taken_ns: 1,
            mtime_ns: 1,
            size: 1 << 20,
            allocated: 4096,
            parent: None,
            group: None,
            held: false,
            state: SnapshotState::Active,
        }
    }

    /// A volume 1 with a snapshot of epoch 1.
    fn catalog() -> Catalog {
        let grain = Grain::DEFAULT;
        let volume = VolumeEntry {
            uuid: Uuid([4; 16]),
            name: name("v"),
            source: "/v".into(),
            size: 1 << 20,
            grain,
            options: VolumeOptions::default(),
            ino_base: 1024,
            added_ns: 0,
            epoch: 1,
            mtime_ns: 0,
            snap_mtime_ns: 0,
            changed: true,
            trust: Default::default(),
            identity: Default::default(),
            resizing: None,
            reverting: None,
            snapshots: BTreeMap::new(),
            bookmarks: BTreeMap::new(),
            kept: BTreeMap::new(),
        };
        let mut catalog = Catalog::default();
        catalog.apply(&volume_record(1, &volume)).unwrap();
        catalog.apply(&snap_record(1, 1, &snap("s"))).unwrap();
        catalog
    }

    fn clone(id: u32, top: u32) -> CloneEntry {
        CloneEntry {
            volume: 1,
            name: name(&format!("c{id}")),
            uuid: Uuid([id as u8; 16]),
            ino: 4000 + u64::from(id),
            created_ns: 7,
            size: 1 << 20,
            top,
            growing: false,
            state: SnapshotState::Active,
        }
    }

    fn layer(base: Base) -> LayerEntry {
        LayerEntry {
            volume: 1,
            base,
            visible: 1 << 20,
        }
    }

    /// Clone 1 on layers 2, 1 and the snapshot; clone 2 on layers 3, 1.
    fn cloned() -> Catalog {
        let mut catalog = catalog();
        let records = [
            clone_record(1, &clone(1, 1), &[(1, layer(Base::Snapshot(1)))]),
            clone_record(1, &clone(1, 2), &[(2, layer(Base::Layer(1)))]),
            clone_record(2, &clone(2, 3), &[(3, layer(Base::Layer(1)))]),
        ];
        for record in &records {
            catalog.apply(record).unwrap();
        }
        catalog
    }

    fn delete_snapshot(catalog: &mut Catalog) {
        let delete = Record::plain(RecordType::Delete, 1, 1, Vec::new());
        catalog.apply(&delete).unwrap();
    }

    #[test]
    fn clones_survive_the_encoding_of_the_catalogue_with_what_they_keep() {
        let mut catalog = cloned();
        assert_eq!(Catalog::decode(&catalog.encode()).unwrap(), catalog);
        delete_snapshot(&mut catalog);
        catalog
            .apply(&clone_record(3, &clone(3, 4), &[(4, layer(Base::Nothing))]))
            .unwrap();
        catalog.apply(&clone_deleted_record(1, 3)).unwrap();
        assert!(catalog.volumes[&1].snapshots.is_empty());
        assert_eq!(catalog.volumes[&1].kept.len(), 1);
        catalog.clean = false;
        let decoded = Catalog::decode(&catalog.encode()).unwrap();
        assert_eq!(decoded, catalog);
        assert_eq!((decoded.next_clone, decoded.next_layer), (4, 5));
    }

    #[test]
    fn a_deleted_snapshot_goes_with_the_last_layer_on_it() {
        let mut catalog = cloned();
        delete_snapshot(&mut catalog);
        catalog.apply(&clone_deleted_record(1, 1)).unwrap();
        assert_eq!(catalog.layer_ids().collect::<Vec<_>>(), [1, 3]);
        assert!(catalog.snapshot_or_kept(1, 1).is_some());
        assert_eq!(catalog.bottom(3), Some(1));
        catalog.apply(&clone_deleted_record(1, 2)).unwrap();
        assert_eq!(catalog.layer_ids().count(), 0);
        assert!(catalog.snapshot_or_kept(1, 1).is_none());
    }

    #[test]
    fn a_listed_snapshot_stays_when_its_last_clone_goes() {
        let mut catalog = cloned();
        for id in [1, 2] {
            catalog.apply(&clone_deleted_record(1, id)).unwrap();
        }
        assert!(catalog.volumes[&1].snapshots.contains_key(&1));
        delete_snapshot(&mut catalog);
        assert!(catalog.snapshot_or_kept(1, 1).is_none());
    }

    #[test]
    fn a_clone_of_something_lost_fails_and_the_catalogue_stands() {
        let mut catalog = catalog();
        for (id, base) in [(1, Base::Snapshot(9)), (2, Base::Layer(0))] {
            catalog
                .apply(&clone_record(id, &clone(id, id), &[(id, layer(base))]))
                .unwrap();
            assert!(matches!(
                catalog.clones[&id].state,
                SnapshotState::Failed(_)
            ));
        }
    }

    #[test]
    fn a_clone_takes_no_layer_of_another_volume() {
        let mut catalog = cloned();
        let other = catalog.volumes[&1].clone();
        catalog.apply(&volume_record(2, &other)).unwrap();
        let mut thief = clone(9, 3);
        thief.volume = 2;
        let layers = [(3, layer(Base::Nothing))];
        let why = catalog.apply(&clone_record(9, &thief, &layers));
        assert_eq!(why.unwrap_err().kind(), Kind::Damaged);
    }

    #[test]
    fn a_clone_under_which_a_layer_moves_to_nothing_known_fails() {
        let mut catalog = cloned();
        let layers = [(1, layer(Base::Snapshot(77)))];
        catalog
            .apply(&clone_record(1, &clone(1, 2), &layers))
            .unwrap();
        let failed = |id| matches!(catalog.clones[&id].state, SnapshotState::Failed(_));
        assert!(failed(1) && failed(2));
    }

    #[test]
    fn a_layer_on_itself_or_a_newer_one_is_damaged() {
        let mut catalog = catalog();
        for base in [1, 2] {
            let bad = clone_record(1, &clone(1, 1), &[(1, layer(Base::Layer(base)))]);
            assert_eq!(catalog.apply(&bad).unwrap_err().kind(), Kind::Damaged);
        }
    }

    #[test]
    fn data_past_the_end_lets_a_growing_clone_grow() {
        let mut catalog = catalog();
        let empty = CloneEntry {
            size: 0,
            growing: true,
            ..clone(1, 1)
        };
        catalog
            .apply(&clone_record(1, &empty, &[(1, layer(Base::Nothing))]))
            .unwrap();
        catalog
            .apply(&clone_alloc_record(1, 1, 0..3, 4096, false, 9000))
            .unwrap();
        catalog
            .apply(&clone_alloc_record(1, 1, 0..1, 4096, true, 100))
            .unwrap();
        assert_eq!(catalog.clones[&1].size, 9000);
    }

    fn hex(record: Record) -> String {
        let bytes = crate::log::record::encode_table(&[record]);
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Golden bytes of whole records: a change of any of them is a new format version.
    #[test]
    fn golden_bytes() {
        let failed = CloneEntry {
            growing: true,
            state: SnapshotState::Failed("why".into()),
            ..clone(5, 9)
        };
        let layers = [
            (9, layer(Base::Layer(4))),
            (4, layer(Base::Snapshot(0x0102))),
            (3, layer(Base::Nothing)),
        ];
        assert_eq!(
            hex(clone_record(5, &failed, &layers)),
            "140000008d0000000100000000000000050000000000000000000000000000000000000000000000\
             05050505050505050505050505050505a50f00000000000007000000000000000000100000000000\
             09000000030000000300000000000000090000000200000004000000000000000000100000000000\
             04000000010000000201000000000000000010000000000003000000000000000000000000000000\
             000010000000000002000000633503000000776879000000"
        );
        assert_eq!(
            hex(clone_record(1, &clone(1, 1), &[])),
            "14000000420000000100000000000000010000000000000000000000000000000000000000000000\
             01010101010101010101010101010101a10f00000000000007000000000000000000100000000000\
             0100000000000000000000000000000002000000633100000000000000000000"
        );
        assert_eq!(
            hex(clone_deleted_record(1, 5)),
            "22000000000000000100000000000000050000000000000000000000000000000000000000000000"
        );
        assert_eq!(
            hex(clone_alloc_record(1, 9, 5..8, 4096, false, 0)),
            "15000000100000000100000003000000090000000000000005000000000000000000000000000000\
             00100000000000000000000000000000"
        );
        assert_eq!(
            hex(clone_alloc_record(1, 9, 5..6, 65536, true, 9000)),
            "15000000100000000100000001000000090000000000000005000000000000000000000000000000\
             00000100010000002823000000000000"
        );
        let invalid = crate::volume::catalog::invalidate_record(LAYER_BIT | 5, 0, u64::MAX, "why");
        assert_eq!(
            hex(invalid),
            "1e0000000f0000000500008000000000000000000000000000000000000000000000000000000000\
             ffffffffffffffff0300000077687900"
        );
    }

    /// The catalogue of a store with clones, one of them of a snapshot that was deleted; golden as above.
    #[test]
    fn golden_bytes_of_a_catalogue_with_clones() {
        let mut catalog = cloned();
        delete_snapshot(&mut catalog);
        let bytes = catalog.encode();
        let hex: String = bytes[..80].iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            (bytes.len(), &*hex),
            (
                848,
                "06000000000000003000000018000000000000000000000000000000000000000000000000000000\
             00000000000000000000000002000000a30f0000000000000300000004000000160000007b000000"
            )
        );
        assert_eq!(
            blake3::hash(&bytes).to_hex().as_str(),
            "ed716587e05d2a77f7ba349594dba3f995c55fa0573312239f469be4be95be0e"
        );
        assert_eq!(layer_volume(9), VolumeId(0x8000_0009));
        // A clean stop with a clone that has failed.
        (catalog.clean, catalog.unsettled) = (true, true);
        let decoded = Catalog::decode(&catalog.encode()).unwrap();
        assert_eq!(decoded, catalog);
        assert_eq!(catalog.encode()[48], 3);
    }

    #[test]
    fn a_damaged_clone_never_panics() {
        let mut catalog = cloned();
        delete_snapshot(&mut catalog);
        let bytes = catalog.encode();
        for cut in 0..bytes.len() {
            assert!(Catalog::decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x55;
            let _ = Catalog::decode(&bad);
        }
    }
}
