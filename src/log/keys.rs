//! Keyed checksums. The store's secret makes them unforgeable by what guests write.

use crate::units::Uuid;

/// The keys derived from a store's secret, one a purpose.
#[derive(Clone)]
pub struct Keys {
    commit: [u8; 32],
    payload: [u8; 32],
    head: [u8; 32],
}

/// Checksum of a commit block or segment head.
pub type Sum128 = [u8; 16];

impl Keys {
    /// Derives the keys of a store.
    pub fn derive(secret: &[u8; 32], store: Uuid) -> Keys {
        let mut material = [0; 48];
        material[..32].copy_from_slice(secret);
        material[32..].copy_from_slice(&store.0);
        let key = |context| blake3::derive_key(context, &material);
        Keys {
            commit: key("stillframe 2026-11 log commit block v1"),
            payload: key("stillframe 2026-11 log payload v1"),
            head: key("stillframe 2026-11 log segment head v1"),
        }
    }

    /// Checksum of a commit block's bytes.
    pub fn commit(&self, bytes: &[u8]) -> Sum128 {
        first16(&blake3::keyed_hash(&self.commit, bytes))
    }

    /// Checksum of a segment head's bytes.
    pub fn head(&self, bytes: &[u8]) -> Sum128 {
        first16(&blake3::keyed_hash(&self.head, bytes))
    }

    /// Checksum of one grain of payload.
    pub fn payload(&self, bytes: &[u8]) -> u64 {
        let hash = blake3::keyed_hash(&self.payload, bytes);
        u64::from_le_bytes(
            hash.as_bytes()[..8]
                .try_into()
                .expect("a hash has 32 bytes"),
        )
    }

    /// Checksums of payload, one for each `unit` bytes, as a record's body holds them.
    pub fn payload_sums(&self, bytes: &[u8], unit: usize) -> Vec<u8> {
        bytes
            .chunks(unit)
            .flat_map(|chunk| self.payload(chunk).to_le_bytes())
            .collect()
    }
}

fn first16(hash: &blake3::Hash) -> Sum128 {
    hash.as_bytes()[..16]
        .try_into()
        .expect("a hash has 32 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_by_purpose_and_store() {
        let a = Keys::derive(&[1; 32], Uuid([1; 16]));
        let b = Keys::derive(&[1; 32], Uuid([2; 16]));
        assert_ne!(a.commit(b"x"), a.head(b"x"));
        assert_ne!(a.commit(b"x"), b.commit(b"x"));
        assert_ne!(a.payload(b"x"), b.payload(b"x"));
    }
}
