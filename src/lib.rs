//! Stillframe keeps point-in-time copies of disk volumes and shows them as plain files.
//!
//! One folder is one layer, and a layer names only layers below it (`tests/architecture.rs` holds
//! this table):
//!
//! ```text
//! cli -> daemon -> fuse -> tree -> image -> volume -> { map decides, log moves bytes } -> sys
//! ```
//!
//! Start reading at [`volume`]: it promises what a snapshot is and when it is durable.

pub mod cli;
pub mod daemon;
pub mod error;
pub mod fuse;
pub mod image;
pub mod log;
pub mod map;
pub mod sys;
pub mod tree;
pub mod units;
pub mod volume;
