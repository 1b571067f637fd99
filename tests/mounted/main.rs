//! The program's heart as its users meet it: through a real mount, real files and plain tools.
//!
//! | file | shows |
//! | --- | --- |
//! | `model` | 5,000 random operations of every kind against a model |
//! | `tools` | cp, rsync, tar and dd take backups and restore them |
//! | `attributes` | modes, owners, links, space, times; who gets in; locks and ioctls |
//! | `clones` | clones by ln and cp, written with plain tools and used as disks; revert, resize, bookmarks |
//! | `diffs` | a snapshot and a diff in a directory are a backup that qemu-img restores |
//! | `filesystems` | ext4 and XFS on `live.img`: snapshots pass fsck and hold the files of their instant |
//! | `listings` | listings with attributes: `ls -l`, `find`, `rsync -n`, `cp -r`, and what the kernel forgets |
//! | `semantics` | what only a kernel can ask: the sentences of `docs/semantics.md` about system calls |
//! | `sentences` | more of these: caches and syncs counted, tools that leave holes, loop devices that are resized |
//!
//! Every test has a mount of its own in a directory of its own, and leaves neither behind, also when
//! it fails. Without `/dev/fuse` (or root, for loop devices) a test says so and passes; with
//! `STILLFRAME_CI=1` it fails instead.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod attributes;
mod clones;
mod counted;
mod diffs;
mod filesystems;
mod harness;
mod listings;
mod model;
#[path = "../rig/mod.rs"]
mod rig;
mod semantics;
mod sentences;
mod tools;
