//! Keys of the index, and the checksum of its values.
//!
//! A key is a namespace byte and three numbers, big-endian, so that byte order is number order and
//! one forward scan of pages finds who preserved a region at or after an epoch. Sets have theirs in
//! [`crate::map::bitmaps`]; the position in the log is the key `A`.

use crate::error::{Error, Kind, Result};
use crate::units::{COUNTER_MAX, Epoch, REGION_GRAINS, VolumeId};

/// First byte of the keys of pages.
pub const PAGE_NAMESPACE: u8 = b'P';

pub use crate::units::GRAINS_MAX;

/// Eight bytes of BLAKE3 over a key and a value.
pub fn checksum(key: &[u8], value: &[u8]) -> u64 {
    let mut hash = blake3::Hasher::new();
    hash.update(key);
    hash.update(value);
    let hash = hash.finalize();
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight of 32 bytes"))
}

/// A key of 21 bytes: namespace, then three numbers, big-endian.
pub fn put_key(namespace: u8, volume: u32, first: u64, second: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(21);
    key.push(namespace);
    key.extend_from_slice(&volume.to_be_bytes());
    key.extend_from_slice(&first.to_be_bytes());
    key.extend_from_slice(&second.to_be_bytes());
    key
}

/// Reads what [`put_key`] wrote.
///
/// # Errors
/// `Damaged`.
pub fn take_key(namespace: u8, key: &[u8]) -> Result<(u32, u64, u64)> {
    if key.len() != 21 || key[0] != namespace {
        return Err(Error::new(
            Kind::Damaged,
            "the extent map holds an unknown key",
        ));
    }
    let number = |at: usize| u64::from_be_bytes(key[at..at + 8].try_into().expect("eight bytes"));
    let volume = u32::from_be_bytes(key[1..5].try_into().expect("four bytes"));
    Ok((volume, number(5), number(13)))
}

/// The keys of one volume in a namespace, as the two ends of a scan.
pub fn volume_keys(namespace: u8, volume: VolumeId) -> (Vec<u8>, Vec<u8>) {
    let end = match volume.0.checked_add(1) {
        Some(next) => put_key(namespace, next, 0, 0),
        None => vec![namespace + 1],
    };
    (put_key(namespace, volume.0, 0, 0), end)
}

/// The key of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageKey {
    /// Whose.
    pub volume: VolumeId,
    /// First grain divided by [`REGION_GRAINS`].
    pub region: u64,
    /// The epoch that preserved.
    pub epoch: Epoch,
}

impl PageKey {
    /// The key as the index orders it.
    pub fn encode(self) -> Vec<u8> {
        put_key(PAGE_NAMESPACE, self.volume.0, self.region, self.epoch.0)
    }

    /// Reads a key.
    ///
    /// # Errors
    /// `Damaged`.
    pub fn decode(key: &[u8]) -> Result<PageKey> {
        let (volume, region, epoch) = take_key(PAGE_NAMESPACE, key)?;
        if region >= GRAINS_MAX / REGION_GRAINS || epoch > COUNTER_MAX {
            return Err(Error::new(
                Kind::Damaged,
                "a page of the extent map is out of range",
            ));
        }
        Ok(PageKey {
            volume: VolumeId(volume),
            region,
            epoch: Epoch(epoch),
        })
    }

    /// First grain of the region.
    pub fn first_grain(self) -> u64 {
        self.region * REGION_GRAINS
    }
}
