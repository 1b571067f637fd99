//! Faults put in on purpose, one at a time, to see whether the tests find them; and places to be killed at.
//!
//! Without the feature `planted` (nobody ships it) [`planted`] is `false` at compile time, [`point`] does
//! nothing, and nothing of this is in the program. With it, the environment variable `STILLFRAME_PLANTED`
//! names the one [`Bug`] that this process has, and `STILLFRAME_KILL_AT` a file that, as soon as it is there,
//! says `NAME:N`: the place at whose N-th passing from then on it is killed. The numbers H1 to H17 are those of docs/testing.md, which says of each
//! what goes wrong and which test finds it; `tests/planted.rs` holds the two together.

/// A fault of ordering, recovery or bookkeeping that this program could have had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// H1: the source is overwritten before its old content is durable.
    UndoUnsynced,
    /// H2: the index is believed durable without a sync.
    IndexUnsynced,
    /// H3: preserved content is not held against its checksum.
    SumsIgnored,
    /// H4: a failed sync of the log is tried again, and its success taken as proof.
    SyncRetried,
    /// H5: a failed sync of the source is forgotten once it was reported.
    SyncErrorForgotten,
    /// H6: space is allocated where it should have been written ahead.
    AllocatedOnly,
    /// H7: a new segment's name is not synced.
    NameUnsynced,
    /// H8: what lies behind the end of a segment stays there.
    TailKept,
    /// H9: a reader of a snapshot does not look again after it read the source.
    ReaderTrusts,
    /// H10: of a grain that is written in part only that part is preserved.
    GrainInPart,
    /// H11: a discard does not preserve.
    DiscardUnpreserved,
    /// H12: a snapshot is acknowledged while its content is only in the page cache.
    SnapUnflushed,
    /// H13: what a killed predecessor left in the page cache is relied on.
    PredecessorUnsynced,
    /// H14: the space of a snapshot is given back before its deletion is durable.
    FreedBeforeDelete,
    /// H15: old content comes from a second cache that does not see every write.
    SecondCache,
    /// H16: the daemon may be made to wait for itself when memory is short.
    NoIoFlusher,
    /// H17: the source is believed durable because the log is.
    SourceUnsynced,
    /// The mark that a region changes is not made durable before it does.
    IntentLost,
    /// A revert says that it is done before the source is durable.
    RevertUnsynced,
    /// A snapshot that cannot be kept is failed in memory only.
    FailureUnmarked,
    /// A clone of a clone goes on sharing the layer that both write.
    LayerShared,
    /// Preserved content goes although an older snapshot reads it.
    SweptEarly,
    /// A batch counts before it is durable.
    DurableEarly,
    /// The last grain of a longer run is missing in the bitmap.
    BitmapShort,
    /// A volume is made shorter without preserving what is cut off.
    ShrinkUnpreserved,
    /// A clone's record is durable before the grains it speaks of.
    OverlayUnsynced,
    /// The log goes on in a segment while the head of a successor that was given up may come back.
    HeadKept,
    /// Of several segments that go at once, each is cut only when its successor, whose link says where it ends, goes.
    LinkFirst,
    /// Recovery begins one batch behind where the index ends.
    ReplayShort,
    /// Recovery does not read the marks of regions that change.
    IntentUnread,
    /// A clean stop does not make the sources durable.
    CleanEarly,
    /// A resize says that it is done before the source's size is durable.
    SizeUnsynced,
    /// A revert overwrites without a record that it has begun.
    RevertUnmeant,
    /// The name of a clone's new file is not synced.
    OverlayNameUnsynced,
    /// Preserved content counts as unneeded by the snapshot of its own epoch.
    SweptAtEpoch,
    /// A clone's files go before its deletion is durable.
    CloneFilesFirst,
    /// The catalogue forgets a snapshot before its deletion is durable.
    CatalogEarly,
    /// A diff leaves out what was written right after its first snapshot.
    DiffShort,
    /// The index says how far it goes before it has gone there.
    AppliedFirst,
    /// A discard leaves the volume as clean as it was.
    DiscardClean,
}

/// Whether this process has that fault.
#[cfg(not(feature = "planted"))]
#[inline(always)]
pub const fn planted(_bug: Bug) -> bool {
    false
}

/// Whether this process has that fault.
///
/// # Panics
/// If `STILLFRAME_PLANTED` names none: a campaign that looks for nothing would find nothing.
#[cfg(feature = "planted")]
pub fn planted(bug: Bug) -> bool {
    use std::sync::OnceLock;
    static CHOSEN: OnceLock<Option<Bug>> = OnceLock::new();
    let choose = || {
        let name = std::env::var("STILLFRAME_PLANTED").ok()?;
        let found = ALL.iter().find(|bug| format!("{bug:?}") == name);
        assert!(found.is_some(), "STILLFRAME_PLANTED={name} is no fault");
        found.copied()
    };
    *CHOSEN.get_or_init(choose) == Some(bug)
}

/// A named place on the way, at which a build with the feature `planted` can be killed.
#[cfg(not(feature = "planted"))]
#[inline(always)]
pub const fn point(_name: &'static str) {}

/// A named place on the way, one of [`POINTS`]: the process is killed here if it is to be.
#[cfg(feature = "planted")]
pub fn point(name: &'static str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    static PATH: OnceLock<Option<std::path::PathBuf>> = OnceLock::new();
    static CHOSEN: OnceLock<(String, AtomicU64)> = OnceLock::new();
    debug_assert!(POINTS.contains(&name), "{name} is not listed");
    let Some(path) = PATH.get_or_init(|| std::env::var_os("STILLFRAME_KILL_AT").map(Into::into))
    else {
        return;
    };
    if CHOSEN.get().is_none() {
        let Ok(text) = std::fs::read_to_string(path) else {
            return;
        };
        let (place, count) = text.split_once(':').expect("NAME:N");
        assert!(POINTS.contains(&place), "there is no point {place}");
        let count = count.parse().expect("NAME:N");
        let _ = CHOSEN.set((place.to_owned(), AtomicU64::new(count)));
    }
    let (place, left) = CHOSEN.get().expect("just set");
    if place == name && left.fetch_sub(1, Ordering::SeqCst) == 1 {
        // Another thread may get a little further; a kill is no other.
        crate::sys::process::kill_self();
    }
}

/// Every place to be killed at, in the order of a write, a snapshot and the rest.
#[cfg(feature = "planted")]
pub const POINTS: [&str; 21] = [
    "batch written",
    "batch durable",
    "segment begun",
    "segment has its catalogue",
    "write preserved",
    "write half done",
    "snapshot flushed",
    "snapshot durable",
    "deletion durable",
    "revert begun",
    "revert overwrites",
    "revert flushed",
    "resize meant",
    "resize done",
    "overlay synced",
    "clone durable",
    "checkpoint half done",
    "checkpoint durable",
    "space freed",
    "segment removed",
    "log recovered",
];

/// Every fault there is.
#[cfg(feature = "planted")]
pub const ALL: [Bug; 40] = [
    Bug::UndoUnsynced,
    Bug::IndexUnsynced,
    Bug::SumsIgnored,
    Bug::SyncRetried,
    Bug::SyncErrorForgotten,
    Bug::AllocatedOnly,
    Bug::NameUnsynced,
    Bug::TailKept,
    Bug::ReaderTrusts,
    Bug::GrainInPart,
    Bug::DiscardUnpreserved,
    Bug::SnapUnflushed,
    Bug::PredecessorUnsynced,
    Bug::FreedBeforeDelete,
    Bug::SecondCache,
    Bug::NoIoFlusher,
    Bug::SourceUnsynced,
    Bug::IntentLost,
    Bug::RevertUnsynced,
    Bug::FailureUnmarked,
    Bug::LayerShared,
    Bug::SweptEarly,
    Bug::DurableEarly,
    Bug::BitmapShort,
    Bug::ShrinkUnpreserved,
    Bug::OverlayUnsynced,
    Bug::HeadKept,
    Bug::LinkFirst,
    Bug::ReplayShort,
    Bug::IntentUnread,
    Bug::CleanEarly,
    Bug::SizeUnsynced,
    Bug::RevertUnmeant,
    Bug::OverlayNameUnsynced,
    Bug::SweptAtEpoch,
    Bug::CloneFilesFirst,
    Bug::CatalogEarly,
    Bug::DiffShort,
    Bug::AppliedFirst,
    Bug::DiscardClean,
];
