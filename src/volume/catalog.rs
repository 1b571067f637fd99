//! The catalogue: volumes, snapshots, counters. A function of the log.
//!
//! [`Catalog::apply`] is the only way it changes: the engine calls it for each record that has become
//! durable, recovery for each record it finds. A CATALOG record holds the whole of it as a table of
//! the same records, so there is one encoding and older segments may go.

use std::collections::BTreeMap;

use crate::error::{Error, Kind, Result};
use crate::log::codec::{Reader, Writer};
use crate::log::record::{Record, RecordType, encode_table};
use crate::sys::disk::Identity;
use crate::units::{Grain, Name, Uuid};
use crate::volume::{OnFull, SnapshotState, VolumeOptions};

/// First inode number handed out to volumes and snapshots; smaller ones are the tree's own.
pub const INO_FIRST: u64 = 1024;
/// Inode numbers a volume takes for its own nodes.
pub const INO_PER_VOLUME: u64 = 16;

/// Flag of a SNAP: the snapshot has failed.
const SNAP_FAILED: u8 = 1;
/// Flag of a SNAP: the snapshot is on hold.
const SNAP_HELD: u8 = 2;

/// What is known of a source's trustworthiness, as far as it outlives the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Trust {
    /// The content is as we left it.
    #[default]
    Known,
    /// The last stop was unclean; nothing could be checked but identity and size.
    Unverified,
    /// Found changed; waits for an operator.
    Changed,
}

/// A snapshot in the catalogue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapEntry {
    /// Name.
    pub name: Name,
    /// Unique for ever.
    pub uuid: Uuid,
    /// Inode number.
    pub ino: u64,
    /// The instant, ns since 1970.
    pub taken_ns: i64,
    /// Last change before it, ns since 1970.
    pub mtime_ns: i64,
    /// Bytes.
    pub size: u64,
    /// Bytes of storage its content used.
    pub allocated: u64,
    /// The snapshot before it.
    pub parent: Option<Uuid>,
    /// Its group.
    pub group: Option<Uuid>,
    /// On hold: it cannot be deleted.
    pub held: bool,
    /// Whether it can be read.
    pub state: SnapshotState,
}

/// A volume in the catalogue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeEntry {
    /// Unique for ever.
    pub uuid: Uuid,
    /// Name.
    pub name: Name,
    /// Absolute path of the source.
    pub source: String,
    /// Bytes.
    pub size: u64,
    /// Grain.
    pub grain: Grain,
    /// Options, grain included.
    pub options: VolumeOptions,
    /// First of its inode numbers.
    pub ino_base: u64,
    /// When it was added, ns since 1970.
    pub added_ns: i64,
    /// The largest epoch any record of it names.
    pub epoch: u64,
    /// Last change, ns since 1970.
    pub mtime_ns: i64,
    /// The largest mtime a snapshot of it ever got.
    pub snap_mtime_ns: i64,
    /// Whether anything may have changed since the last snapshot.
    pub changed: bool,
    /// Trust in the source.
    pub trust: Trust,
    /// The source as it was left at the last clean stop.
    pub identity: Identity,
    /// Snapshots by epoch.
    pub snapshots: BTreeMap<u64, SnapEntry>,
}

/// Everything a store knows besides preserved content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Catalog {
    /// The store was stopped cleanly, and nothing happened since.
    pub clean: bool,
    /// Number of the next volume.
    pub next_volume: u32,
    /// Next inode number.
    pub next_ino: u64,
    /// Volumes by number.
    pub volumes: BTreeMap<u32, VolumeEntry>,
}

impl Default for Catalog {
    fn default() -> Self {
        Catalog {
            clean: false,
            next_volume: 1,
            next_ino: INO_FIRST,
            volumes: BTreeMap::new(),
        }
    }
}

impl Catalog {
    /// Applies a durable record. A CATALOG needs its payload: see [`Catalog::decode`].
    ///
    /// # Errors
    /// `Damaged` if the record does not fit what is known, `Unsupported` for a type whose meaning
    /// this program does not have.
    pub fn apply(&mut self, record: &Record) -> Result<()> {
        match record.kind {
            RecordType::Preserve | RecordType::Zero | RecordType::Changed => {
                self.clean = false;
                if let Some(volume) = self.volumes.get_mut(&record.volume) {
                    volume.epoch = volume.epoch.max(record.epoch);
                    volume.changed = true;
                }
            }
            RecordType::Snap => self.apply_snap(record)?,
            RecordType::Delete => {
                self.volume(record.volume)?.snapshots.remove(&record.epoch);
            }
            RecordType::Rename => {
                let name = Reader::new(&record.body, "a RENAME").name()?;
                let snapshots = &mut self.volume(record.volume)?.snapshots;
                if let Some(snap) = snapshots.get_mut(&record.epoch) {
                    snap.name = name;
                }
            }
            RecordType::Hold => {
                let held = Reader::new(&record.body, "a HOLD").u8()? != 0;
                let snapshots = &mut self.volume(record.volume)?.snapshots;
                if let Some(snap) = snapshots.get_mut(&record.epoch) {
                    snap.held = held;
                }
            }
            RecordType::Volume => self.apply_volume(record)?,
            RecordType::VolumeRemoved => {
                self.volumes.remove(&record.volume);
            }
            RecordType::Invalidate => {
                let mut r = Reader::new(&record.body, "an INVALIDATE");
                let (last, why) = (r.u64()?, r.text()?.to_owned());
                if let Some(volume) = self.volumes.get_mut(&record.volume)
                    && record.epoch <= last
                {
                    for (_, snap) in volume.snapshots.range_mut(record.epoch..=last) {
                        snap.state = SnapshotState::Failed(why.clone());
                    }
                }
            }
            RecordType::Store => {
                let mut r = Reader::new(&record.body, "a STORE record");
                self.clean = r.u32()? & 1 != 0;
                self.next_volume = self.next_volume.max(r.u32()?);
                self.next_ino = self.next_ino.max(r.u64()?);
                return Ok(());
            }
            RecordType::Group | RecordType::Catalog => {}
            other => {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!(
                        "the store uses {other:?}, which this stillframe does not; use a newer one"
                    ),
                ));
            }
        }
        self.clean = false;
        Ok(())
    }

    fn volume(&mut self, id: u32) -> Result<&mut VolumeEntry> {
        self.volumes.get_mut(&id).ok_or_else(|| {
            Error::new(
                Kind::Damaged,
                format!("the log speaks of a volume {id} it never defined"),
            )
        })
    }

    fn apply_snap(&mut self, record: &Record) -> Result<()> {
        let mut r = Reader::new(&record.body, "a SNAP");
        let (uuid, ino) = (r.uuid()?, r.u64()?);
        let (taken_ns, mtime_ns, size, allocated) = (r.i64()?, r.i64()?, r.u64()?, r.u64()?);
        let (parent, group) = (r.uuid_or_zero()?, r.uuid_or_zero()?);
        let flags = r.u8()?;
        let (failed, held) = (flags & SNAP_FAILED != 0, flags & SNAP_HELD != 0);
        let (name, why) = (r.name()?, r.text()?.to_owned());
        let state = if failed {
            SnapshotState::Failed(why)
        } else {
            SnapshotState::Active
        };
        self.next_ino = self.next_ino.max(ino + 1);
        let volume = self.volume(record.volume)?;
        volume.epoch = volume.epoch.max(record.epoch);
        volume.changed = false;
        volume.snap_mtime_ns = volume.snap_mtime_ns.max(mtime_ns);
        volume.mtime_ns = volume.mtime_ns.max(mtime_ns);
        let snap = SnapEntry {
            name,
            uuid,
            ino,
            taken_ns,
            mtime_ns,
            size,
            allocated,
            parent,
            group,
            held,
            state,
        };
        volume.snapshots.insert(record.epoch, snap);
        Ok(())
    }

    fn apply_volume(&mut self, record: &Record) -> Result<()> {
        let entry = decode_volume(&record.body)?;
        self.next_volume = self.next_volume.max(record.volume.saturating_add(1));
        self.next_ino = self.next_ino.max(entry.ino_base + INO_PER_VOLUME);
        let snapshots = self.volumes.remove(&record.volume).map(|v| v.snapshots);
        let entry = VolumeEntry {
            snapshots: snapshots.unwrap_or_default(),
            ..entry
        };
        self.volumes.insert(record.volume, entry);
        Ok(())
    }

    /// The whole catalogue as the payload of a CATALOG record.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u32(u32::from(self.clean))
            .u32(self.next_volume)
            .u64(self.next_ino);
        let mut records = vec![Record::plain(RecordType::Store, 0, 0, w.finish())];
        for (&id, volume) in &self.volumes {
            records.push(volume_record(id, volume));
            for (&epoch, snap) in &volume.snapshots {
                records.push(snap_record(id, epoch, snap));
            }
            // A SNAP says that nothing changed since; the VOLUME after it has the last word.
            records.push(volume_record(id, volume));
        }
        let mut w = Writer::new();
        w.u32(records.len() as u32).u32(0);
        w.raw(&encode_table(&records));
        w.finish()
    }

    /// Reads the payload of a CATALOG record.
    ///
    /// # Errors
    /// As [`Catalog::apply`].
    pub fn decode(payload: &[u8]) -> Result<Catalog> {
        let mut r = Reader::new(payload, "a CATALOG");
        let (count, _) = (r.u32()?, r.u32()?);
        let mut catalog = Catalog::default();
        let mut clean = false;
        for _ in 0..count {
            if let Some(record) = Record::decode(&mut r)? {
                catalog.apply(&record)?;
                if record.kind == RecordType::Store {
                    clean = catalog.clean;
                }
            }
        }
        catalog.clean = clean;
        Ok(catalog)
    }

    /// A volume's number by name.
    pub fn find(&self, name: &Name) -> Option<u32> {
        self.volumes
            .iter()
            .find(|(_, v)| v.name == *name)
            .map(|(&id, _)| id)
    }
}

impl VolumeEntry {
    /// A snapshot's epoch by name.
    pub fn find(&self, name: &Name) -> Option<u64> {
        self.snapshots
            .iter()
            .find(|(_, s)| s.name == *name)
            .map(|(&epoch, _)| epoch)
    }
}

/// The SNAP record of a snapshot.
pub fn snap_record(volume: u32, epoch: u64, snap: &SnapEntry) -> Record {
    let mut w = Writer::new();
    w.uuid(snap.uuid)
        .u64(snap.ino)
        .i64(snap.taken_ns)
        .i64(snap.mtime_ns);
    w.u64(snap.size)
        .u64(snap.allocated)
        .uuid_or_zero(snap.parent)
        .uuid_or_zero(snap.group);
    let (failed, why) = match &snap.state {
        SnapshotState::Active => (0, ""),
        SnapshotState::Failed(why) => (SNAP_FAILED, why.as_str()),
    };
    let held = if snap.held { SNAP_HELD } else { 0 };
    w.u8(failed | held).text(snap.name.as_str()).text(why);
    Record::plain(RecordType::Snap, volume, epoch, w.finish())
}

/// The RENAME record of a snapshot.
pub fn rename_record(volume: u32, epoch: u64, name: &Name) -> Record {
    let mut w = Writer::new();
    w.text(name.as_str());
    Record::plain(RecordType::Rename, volume, epoch, w.finish())
}

/// The HOLD record that puts a snapshot on hold or releases it.
pub fn hold_record(volume: u32, epoch: u64, held: bool) -> Record {
    Record::plain(RecordType::Hold, volume, epoch, vec![u8::from(held)])
}

/// An INVALIDATE of the snapshots with epochs in `first..=last`.
pub fn invalidate_record(volume: u32, first: u64, last: u64, why: &str) -> Record {
    let mut w = Writer::new();
    w.u64(last).text(why);
    Record::plain(RecordType::Invalidate, volume, first, w.finish())
}

/// The VOLUME record of a volume, without its snapshots.
pub fn volume_record(id: u32, v: &VolumeEntry) -> Record {
    let mut w = Writer::new();
    w.uuid(v.uuid).u64(v.size).u32(v.grain.bytes() as u32);
    w.u32(v.options.on_full_wait_s);
    w.u8(match v.options.on_full {
        OnFull::FailWrite => 0,
        OnFull::FailSnapshot => 1,
    });
    w.u8(match v.trust {
        Trust::Known => 0,
        Trust::Unverified => 1,
        Trust::Changed => 2,
    });
    w.u8(u8::from(v.changed)).u8(0).u32(0);
    w.u64(v.ino_base)
        .i64(v.added_ns)
        .u64(v.epoch)
        .i64(v.mtime_ns)
        .i64(v.snap_mtime_ns);
    let i = &v.identity;
    w.u64(i.dev).u64(i.ino).u64(i.size).i64(i.ctime_ns);
    w.text(v.name.as_str()).text(&v.source);
    Record::plain(RecordType::Volume, id, 0, w.finish())
}

fn decode_volume(body: &[u8]) -> Result<VolumeEntry> {
    let bad = |what: &str| Error::new(Kind::Damaged, format!("a VOLUME record has a bad {what}"));
    let mut r = Reader::new(body, "a VOLUME record");
    let (uuid, size, grain) = (r.uuid()?, r.u64()?, u64::from(r.u32()?));
    let grain = Grain::new(grain).map_err(|_| bad("grain"))?;
    let on_full_wait_s = r.u32()?;
    let on_full = match r.u8()? {
        0 => OnFull::FailWrite,
        1 => OnFull::FailSnapshot,
        _ => return Err(bad("policy")),
    };
    let trust = match r.u8()? {
        0 => Trust::Known,
        1 => Trust::Unverified,
        2 => Trust::Changed,
        _ => return Err(bad("trust")),
    };
    let changed = r.u8()? != 0;
    let _ = (r.u8()?, r.u32()?);
    let (ino_base, added_ns, epoch) = (r.u64()?, r.i64()?, r.u64()?);
    let (mtime_ns, snap_mtime_ns) = (r.i64()?, r.i64()?);
    let identity = Identity {
        dev: r.u64()?,
        ino: r.u64()?,
        size: r.u64()?,
        ctime_ns: r.i64()?,
    };
    let (name, source) = (r.name()?, r.text()?.to_owned());
    Ok(VolumeEntry {
        uuid,
        name,
        source,
        size,
        grain,
        options: VolumeOptions {
            grain,
            on_full,
            on_full_wait_s,
        },
        ino_base,
        added_ns,
        epoch,
        mtime_ns,
        snap_mtime_ns,
        changed,
        trust,
        identity,
        snapshots: BTreeMap::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Catalog {
        let mut snapshots = BTreeMap::new();
        for epoch in [3, 9] {
            let state = match epoch {
                3 => SnapshotState::Active,
                _ => SnapshotState::Failed("thin target full".into()),
            };
            let snap = SnapEntry {
                name: Name::new(&format!("s{epoch}")).unwrap(),
                uuid: Uuid([epoch as u8; 16]),
                ino: 2000 + epoch,
                taken_ns: 5,
                mtime_ns: 4,
                size: 4097,
                allocated: 4096,
                parent: (epoch > 3).then_some(Uuid([3; 16])),
                group: None,
                held: epoch == 9,
                state,
            };
            snapshots.insert(epoch, snap);
        }
        let grain = Grain::new(65536).unwrap();
        let volume = VolumeEntry {
            uuid: Uuid([4; 16]),
            name: Name::new("vm1").unwrap(),
            source: "/srv/vm1 with spaces.img".into(),
            size: 1 << 50,
            grain,
            options: VolumeOptions {
                grain,
                on_full: OnFull::FailSnapshot,
                on_full_wait_s: 7,
            },
            ino_base: 1024,
            added_ns: 1,
            epoch: 12,
            mtime_ns: 100,
            snap_mtime_ns: 4,
            changed: true,
            trust: Trust::Unverified,
            identity: Identity {
                dev: 1,
                ino: 2,
                size: 3,
                ctime_ns: -4,
            },
            snapshots,
        };
        Catalog {
            clean: true,
            next_volume: 8,
            next_ino: 5000,
            volumes: BTreeMap::from([(7, volume)]),
        }
    }

    #[test]
    fn a_catalogue_survives_its_encoding() {
        let catalog = sample();
        assert_eq!(Catalog::decode(&catalog.encode()).unwrap(), catalog);
    }

    /// Golden bytes: a change of any of them is a new format version. The sample holds a STORE, a
    /// VOLUME and two SNAPs.
    #[test]
    fn golden_bytes() {
        let bytes = sample().encode();
        assert_eq!(bytes.len(), 752);
        assert_eq!(
            blake3::hash(&bytes).to_hex().as_str(),
            "91c57f346a973b26c11b70fccc26fcf167ca8e9b2c41714dfb76a2d2945c7642"
        );
        let hex: String = bytes[..96].iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            "0500000000000000300000001000000000000000000000000000000000000000000000000000000000000000\
             0000000001000000080000008813000000000000160000009300000007000000000000000000000000000000\
             0000000000000000"
        );
    }

    #[test]
    fn a_damaged_catalogue_is_refused_and_never_panics() {
        let bytes = sample().encode();
        for cut in 0..bytes.len() {
            assert!(Catalog::decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x55;
            let _ = Catalog::decode(&bad);
        }
    }

    #[test]
    fn any_record_after_a_clean_stop_makes_it_unclean() {
        let mut catalog = sample();
        catalog
            .apply(&Record::run(RecordType::Zero, 7, 13, 0, 1))
            .unwrap();
        assert!(!catalog.clean);
        assert_eq!(catalog.volumes[&7].epoch, 13);
    }
}
