//! Rot: bits that flip on the medium of a store, anywhere, and what is done about it.
//!
//! A rich store (volumes of two grains, snapshots kept and deleted, clones of clones, bookmarks, a
//! revert, resizes, small segments) is made in the simulator or on real files, closed, and damaged.
//! Promises that are shown: no view ever returns a wrong byte; what answers an error lies within what
//! the damaged record covers; the audit notices; the scrub mends what has a good copy; a damaged map is
//! made again and is the same.
//!
//! | variable | meaning |
//! | --- | --- |
//! | `STILLFRAME_FLIPS` | bit flips in log, superblock and overlays, 500 by default |
//! | `STILLFRAME_FLIPS_SEED` | the seed, decimal |
//! | `STILLFRAME_FLIPS_STATE` | a file that keeps how far a campaign is: the next run goes on there |
//! | `STILLFRAME_MAP_FLIPS` | the same for real files of the map, 40 by default |

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

#[path = "../rig/mod.rs"]
mod rig;
#[path = "../rig/sim.rs"]
mod sim;

mod audit;
mod flips;
mod log;
mod map;
mod scrub;
mod stage;
