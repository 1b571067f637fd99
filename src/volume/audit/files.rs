//! Layers of clones against their files, and names that are nobody's.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{IoContext, Result};
use crate::log::keys::Keys;
use crate::log::segment;
use crate::map::{ExtentMap, GrainSet};
use crate::sys::disk::Dir;
use crate::units::Epoch;
use crate::volume::audit::view::View;
use crate::volume::audit::{Audit, Finding, NEXT_START, Severity, open_if_there};
use crate::volume::clone_records::{Base, layer_volume};
use crate::volume::facts::SnapshotState;
use crate::volume::overlay::{self, Home, Overlay, PIECE_BYTES};
use crate::volume::sums::Sums;
use crate::volume::verify::Share;

/// Names that belong into a store.
const KNOWN: [&str; 13] = [
    "lock",
    "superblock",
    "log",
    "map",
    "clones",
    "ballast",
    "scrub",
    "scrub.new",
    "home",
    "home.new",
    "control.sock",
    "daemon.log",
    "daemon.log.old",
];
const SPARE: &str = "spare";

/// Looks at what clones stand on, and whether their overlays are there and long enough.
///
/// # Errors
/// The system's.
pub fn clones(
    store: &dyn Dir,
    view: &View,
    actual: Option<&ExtentMap>,
    audit: &mut Audit,
) -> Result<()> {
    let map = actual.unwrap_or(&view.map);
    let dir = store.subdir("clones", false).ok();
    let mut files = match &dir {
        Some(dir) => overlay::files(dir.as_ref())?,
        None => BTreeMap::new(),
    };
    for clone in view.catalog.clones.values() {
        let Some(volume) = view.catalog.volumes.get(&clone.volume) else {
            continue;
        };
        let chain = view.catalog.chain(clone.top);
        let whole = match chain.last() {
            Some((_, layer)) => match layer.base {
                Base::Snapshot(epoch) => {
                    view.catalog.snapshot_or_kept(clone.volume, epoch).is_some()
                }
                Base::Nothing => true,
                Base::Layer(_) => false,
            },
            None => false,
        };
        if !whole && clone.state == SnapshotState::Active {
            let name = format!("{}/{}", volume.name, clone.name);
            audit.findings.push(
                Finding::new(Severity::Damage, "clone", "clone", &name, "damaged")
                    .because("what it stands on is not in the catalogue")
                    .advise("delete it"),
            );
        }
    }
    for (&id, layer) in &view.catalog.layers {
        let names = files.remove(&id).unwrap_or_default();
        let Some(volume) = view.catalog.volumes.get(&layer.volume) else {
            continue;
        };
        let set = map.changed_between(layer_volume(id), Epoch(0), None);
        let grain = volume.grain.bytes();
        let mut piece_names: BTreeMap<u64, &String> = BTreeMap::new();
        for name in &names {
            if let Some(piece) = overlay::piece_of(name) {
                piece_names.insert(piece, name);
            }
        }
        let mut lacks = Vec::new();
        let per_piece = PIECE_BYTES / grain;
        let mut sizes: BTreeMap<u64, u64> = BTreeMap::new();
        if let Some(dir) = &dir {
            for (&piece, name) in &piece_names {
                let disk = match open_if_there(dir.as_ref(), name) {
                    Ok(disk) => disk,
                    Err(e) => {
                        // A link or a directory in its place, or the medium: that layer's alone.
                        unopened(name, &e, audit);
                        continue;
                    }
                };
                if let Some(disk) = disk {
                    let size = disk.size().context(|| "cannot stat an overlay")?;
                    sizes.insert(piece, size);
                    stray(disk.as_ref(), piece, name, &set, grain, audit)?;
                }
            }
        }
        for run in set.ranges() {
            let mut at = run.start;
            while at < run.end {
                let piece = at / per_piece;
                let end = run.end.min((piece + 1) * per_piece);
                let size = sizes.get(&piece).copied().unwrap_or(0);
                let there = (piece * per_piece + size / grain).clamp(at, end);
                if there < end {
                    lacks.push(there * grain..end * grain);
                }
                at = end;
            }
        }
        if lacks.is_empty() {
            continue;
        }
        for clone in view.catalog.clones.values().filter(|c| {
            view.catalog
                .chain(c.top)
                .iter()
                .any(|&(layer, _)| layer == id)
        }) {
            let name = format!("{}/{}", volume.name, clone.name);
            audit.findings.push(
                Finding::new(Severity::Damage, "clone", "clone", &name, "lost")
                    .because(format!(
                        "the overlay of layer {id} is missing, too short, or cannot be opened"
                    ))
                    .at(lacks.clone())
                    .advise("bring the file back from a copy of the store, or delete the clone"),
            );
        }
    }
    let lost = view.lost || !view.read || audit.end_lost;
    for (layer, names) in files {
        // A file is made after its layer's record is durable: a number that was never given says that
        // the record is lost.
        let lost = lost || layer >= view.catalog.next_layer;
        for name in names {
            orphan(&name, lost, audit);
        }
    }
    Ok(())
}

fn unopened(name: &str, e: &std::io::Error, audit: &mut Audit) {
    audit.findings.push(
        Finding::new(
            Severity::Damage,
            "clone",
            "file",
            &format!("clones/{name}"),
            "damaged",
        )
        .because(format!("the overlay cannot be opened: {e}"))
        .advise("put the file itself back in its place"),
    );
}

/// An overlay of a layer that the catalogue does not have.
fn orphan(name: &str, lost: bool, audit: &mut Audit) {
    let name = format!("clones/{name}");
    let finding = |severity, state| Finding::new(severity, "files", "file", &name, state);
    audit.findings.push(match lost {
        true => finding(Severity::Damage, "unclaimed")
            .because("written to a clone of which the log says nothing any more")
            .advise("bring the log back from a copy of the store; copy this file aside"),
        false => finding(Severity::Note, "orphan")
            .because("the overlay of a clone that is gone")
            .advise(NEXT_START),
    });
}

/// Reads what lies in layers, and verifies it where there are checksums.
///
/// # Errors
/// The system's.
pub fn content(
    store: &Arc<dyn Dir>,
    keys: &Keys,
    view: &View,
    actual: Option<&ExtentMap>,
    (share, seed): (Share, u64),
    audit: &mut Audit,
) -> Result<()> {
    let map = actual.unwrap_or(&view.map);
    let home = Arc::new(Home::new(Arc::clone(store)));
    let mut files = match home.dir(false)? {
        Some(dir) => overlay::files(dir.as_ref())?,
        None => BTreeMap::new(),
    };
    for (&id, layer) in &view.catalog.layers {
        let Some(volume) = view.catalog.volumes.get(&layer.volume) else {
            continue;
        };
        let names = files.remove(&id).unwrap_or_default();
        let grain = volume.grain.bytes();
        let sums = Sums::new(Arc::clone(&home), id, grain, keys.clone());
        let overlay = Overlay::new(Arc::clone(&home), id, &names, Some(sums));
        let held = map.changed_between(layer_volume(id), Epoch(0), None);
        let lost = overlay.damaged_sums(&held);
        if !lost.is_empty() {
            let name = format!("clones/{}", crate::volume::sums::file_name(id));
            // A power cut may leave a leaf half written.
            let severity = match view.unclean {
                true => Severity::Note,
                false => Severity::Warning,
            };
            audit.findings.push(
                Finding::new(severity, "clone", "file", &name, "damaged")
                    .because("checksums of a layer are lost; its content is read unverified")
                    .at(lost.into_iter().map(|run| volume.grain.span(run)))
                    .advise("nothing; they are made again from the content"),
            );
        }
        let mut bad: Vec<Range<u64>> = Vec::new();
        let mut why = String::new();
        let mut content = vec![0; grain as usize];
        for g in held.ranges().flatten() {
            if !share.takes_grain(seed, id, g) {
                continue;
            }
            audit.grains_needed += 1;
            audit.grains_read += 1;
            if let Err(e) = overlay.read(g * grain, &mut content) {
                if why.is_empty() {
                    why = e.chain();
                }
                match bad.last_mut() {
                    Some(last) if last.end == g * grain => last.end += grain,
                    _ => bad.push(g * grain..(g + 1) * grain),
                }
            }
        }
        if bad.is_empty() {
            continue;
        }
        for clone in view.catalog.clones.values() {
            let chain = view.catalog.chain(clone.top);
            if chain.iter().any(|&(layer, _)| layer == id) {
                let name = format!("{}/{}", volume.name, clone.name);
                audit.findings.push(
                    Finding::new(Severity::Damage, "payload", "clone", &name, "damaged")
                        .because(format!("content of layer {id} cannot be read: {why}"))
                        .at(bad.clone())
                        .advise(
                            "write these bytes anew, whole blocks of them, or delete the clone",
                        ),
                );
            }
        }
    }
    Ok(())
}

/// Space that lies in an overlay outside of the layer's grains.
fn stray(
    disk: &dyn crate::sys::disk::Disk,
    piece: u64,
    name: &str,
    set: &GrainSet,
    grain: u64,
    audit: &mut Audit,
) -> Result<()> {
    let context = || format!("cannot look for holes in the overlay {name}");
    let first = piece * (PIECE_BYTES / grain);
    let mut used = 0;
    let mut at = 0;
    while let Some(data) = disk.next_data(at).context(context)? {
        let end = disk.next_hole(data).context(context)?;
        let grains = first + data / grain..first + end.div_ceil(grain);
        let outside = set.gaps_in(grains).map(|gap| gap.end - gap.start);
        used += outside.sum::<u64>() * grain;
        at = end.max(data + 1);
    }
    if used > 0 {
        audit.findings.push(
            Finding::new(
                Severity::Note,
                "clone",
                "file",
                &format!("clones/{name}"),
                "stray",
            )
            .because(format!(
                "{used} bytes belong to no grain of the layer, as a crash leaves them"
            ))
            .advise("nothing; they go with the clone"),
        );
    }
    Ok(())
}

/// Names in the store that are nobody's.
///
/// # Errors
/// The system's.
pub fn orphans(store: &dyn Dir, log: &dyn Dir, view: &View, audit: &mut Audit) -> Result<()> {
    let mut add = |name: String, state: &str, why: &str, advice: &str| {
        audit.findings.push(
            Finding::new(Severity::Note, "files", "file", &name, state)
                .because(why)
                .advise(advice),
        );
    };
    let listed = |dir: &dyn Dir, what: &'static str| -> Result<Vec<String>> {
        let mut names = dir.list().context(|| what)?;
        // Always in the same order, whatever the filesystem's is.
        names.sort_unstable();
        Ok(names)
    };
    for name in listed(store, "cannot list the store")? {
        if name.starts_with("map.damaged-") {
            let why = "an extent map that was set aside";
            add(
                name,
                "orphan",
                why,
                "remove it once nobody wants to look at it",
            );
        } else if !KNOWN.contains(&&*name) {
            let why = "not a file of a store";
            add(name, "foreign", why, "move it elsewhere, if it is yours");
        }
    }
    for name in listed(log, "cannot list the log")? {
        if segment::number(&name).is_none() && name != SPARE {
            let why = "not a file of the log";
            let name = format!("log/{name}");
            add(name, "foreign", why, "move it elsewhere, if it is yours");
        }
    }
    // Without one there are no names in it; what is not a directory was found before.
    if let Ok(clones) = store.subdir("clones", false) {
        for name in listed(clones.as_ref(), "cannot list the overlays")? {
            if overlay::is_aside(&name) {
                let why =
                    "written to a clone of which the log says nothing any more; a start kept it";
                let advice = "remove it once nobody wants to look at it";
                add(format!("clones/{name}"), "orphan", why, advice);
            } else if !overlay::is_ours(&name) {
                let why = "not a file of a clone";
                let advice = "move it elsewhere, if it is yours";
                add(format!("clones/{name}"), "foreign", why, advice);
            }
        }
    }
    for &number in &view.abandoned {
        let name = format!("log/{}", segment::file_name(number));
        let why = "a segment that never became part of the log";
        add(name, "orphan", why, NEXT_START);
    }
    Ok(())
}
