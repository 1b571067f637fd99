//! How large the volumes of a run are and where they are hit.
//!
//! Promises: [`Shape::large`] is what the model test always had, so that its histories go on;
//! [`Shape::small`] has every kind of object in so few bytes that thousands of whole states can be
//! recovered and compared in a second.

use std::ops::Range;

use stillframe::volume::Settings;

use crate::MIB;

#[derive(Clone)]
pub struct Shape {
    /// Size at the start and grain of each volume; the second has the policy `fail-snapshot`.
    pub volumes: Vec<(u64, u64)>,
    /// Sizes that a resize may give.
    pub sizes: Range<u64>,
    /// Most bytes that a resize adds or takes.
    pub step: u64,
    /// Distance of the places that are written again and again, and how wide each is.
    pub apart: u64,
    pub spot: u64,
    /// The longest write.
    pub long: u64,
    /// Most snapshots and clones of a volume.
    pub snapshots: usize,
    pub clones: usize,
    pub settings: Settings,
}

impl Shape {
    pub fn large() -> Shape {
        Shape {
            volumes: vec![
                (64 * MIB, 4096),
                (64 * MIB + 777, 4096),
                (64 * MIB - 1536, 16384),
            ],
            sizes: 60 * MIB..68 * MIB,
            step: 300 << 10,
            apart: 13 * MIB,
            spot: 96 << 10,
            long: 64 << 10,
            snapshots: 5,
            clones: 4,
            // Small enough that segments, checkpoints and the page cache turn over all the time.
            settings: Settings {
                ballast_bytes: 512 << 10,
                map_cache_bytes: 256 << 10,
                segment_bytes: 2 * MIB,
                checkpoint_bytes: MIB,
                ..Settings::default()
            },
        }
    }

    pub fn small() -> Shape {
        Shape {
            volumes: vec![(48 << 10, 4096), ((40 << 10) + 777, 8192)],
            sizes: 24 << 10..64 << 10,
            step: 16 << 10,
            apart: 12 << 10,
            spot: 6 << 10,
            long: 12 << 10,
            snapshots: 3,
            clones: 2,
            settings: Settings {
                ballast_bytes: 64 << 10,
                map_cache_bytes: 64 << 10,
                segment_bytes: MIB,
                checkpoint_bytes: 64 << 10,
                ..Settings::default()
            },
        }
    }
}
