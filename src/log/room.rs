//! Making the file of a segment, and zeros in it.
//!
//! Promises: a head is written only into a file that has all the space it was to have, so that a lack of
//! space leaves no head behind as a rule; where one may be left, the caller is told. What
//! [`zero_behind`] returns is written blocks of zeros, durable. After [`settle`] no batch is found behind
//! the end of a segment.
//!
//! It does not decide when a segment is made, nor what of; that is [`super::commit`].

use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::Arc;

use crate::log::segment::{self, BATCHES_AT, HEAD_AT};
use crate::sys::disk::{Dir, Disk, Open};
use crate::sys::planted::{Bug, planted};
use crate::units::BLOCK;

/// A file of zeros that becomes the next segment when there is no space to make one.
pub const SPARE: &str = "spare";
/// Zeros to write ahead, in pieces.
pub const ZEROS: &[u8] = &[0; 16 << 10];

/// What a segment is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    /// A new file of so many bytes of zeros.
    New(u64),
    /// The spare.
    OfSpare,
    /// A new file with nothing but the head.
    Bare,
}

/// Makes a segment's file with its head, durably.
///
/// # Errors
/// The system's error, and whether a head may have been written.
pub fn begin(
    dir: &dyn Dir,
    name: &str,
    sector: &[u8],
    made: Made,
) -> std::result::Result<Arc<dyn Disk>, (io::Error, bool)> {
    let opened = match made {
        Made::OfSpare => {
            dir.rename(SPARE, name).map_err(|e| (e, false))?;
            // The name is taken from here on.
            let opened = dir.open(name, Open::Write).map_err(|e| (e, true));
            opened.inspect_err(|_| drop(dir.remove(name)))
        }
        _ => dir.open(name, Open::Create).map_err(|e| (e, false)),
    };
    let file = opened?;
    // All that needs space comes before the head.
    let sized = match made {
        Made::OfSpare => Ok(()),
        Made::New(bytes) => write_zeros(file.as_ref(), 0..bytes),
        Made::Bare => file.set_size(BATCHES_AT),
    };
    if let Err(e) = sized {
        let _ = dir.remove(name);
        return Err((e, false));
    }
    let started = HEAD_AT
        .iter()
        .try_for_each(|&at| file.write_all_at(at, &[sector]))
        .and_then(|()| file.sync_data())
        .and_then(|()| match planted(Bug::NameUnsynced) {
            true => Ok(()),
            false => dir.sync(),
        });
    match started {
        Ok(()) => Ok(file),
        Err(e) => {
            // What is left of it is removed at the next open.
            let _ = dir.remove(name);
            Err((e, true))
        }
    }
}

/// Writes zeros over a range.
fn write_zeros(file: &dyn Disk, range: Range<u64>) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(ZEROS.len() as u64);
        file.write_all_at(at, &[&ZEROS[..len as usize]])?;
        at += len;
    }
    Ok(())
}

/// Has nothing but durable zeros stand behind `end`, in blocks that the file has; returns where they
/// end. What was left of a batch there must not be mixed with the next.
///
/// # Errors
/// The system's error: nothing is known of what stands there.
pub fn zero_behind(file: &dyn Disk, end: u64) -> io::Result<u64> {
    let size = file.size()?;
    if planted(Bug::TailKept) {
        return Ok(size);
    }
    let mut at = end;
    while at < size {
        let next = size.min(at + ZEROS.len() as u64);
        match write_zeros(file, at..next) {
            Ok(()) => at = next,
            // A hole, and no space to fill it.
            Err(e) if e.kind() == ErrorKind::StorageFull => {
                file.set_size(at)?;
                break;
            }
            Err(e) => return Err(e),
        }
    }
    file.sync_data()?;
    Ok(at.max(end))
}

/// Ends the last segment where a scan found its end. A torn batch behind must be gone before anything is
/// served, also if the disk is too full for a new segment whose head would say so. Its first block is
/// enough: nothing is found by another. It is overwritten in place, which needs no space.
///
/// # Errors
/// The system's error.
pub fn settle(dir: &dyn Dir, number: u32, end: u64) -> io::Result<()> {
    let disk = dir.open(&segment::file_name(number), Open::Write)?;
    let left = disk.size()?.saturating_sub(end);
    let mut block = vec![0; left.min(BLOCK) as usize];
    disk.read_exact_at(end, &mut block)?;
    if block.iter().any(|&byte| byte != 0) && !planted(Bug::TailKept) {
        block.fill(0);
        disk.write_all_at(end, &[&block])?;
    }
    disk.sync_data()
}
