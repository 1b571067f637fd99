//! The jobs a store does on request, the same behind the control socket and in process.
//!
//! Promises: names are checked here, whoever asks; when [`run`] returns `Ok` the change is durable;
//! a source that would be hidden by the mount, or that is part of the store, is refused. Unmounting
//! is not a job of a store: `daemon::serve` does it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::daemon::places;
use crate::daemon::protocol::{
    Answer, Checked, Choices, NewSize, Origin, Request, RevertRow, VolumeRow,
};
use crate::daemon::status::{self, Place};
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::image::diff::{DiffList, LIVE, extents};
use crate::image::live::LiveImage;
use crate::tree::{Tree, TreeError};
use crate::units::{Grain, Name};
use crate::volume::audit::{Finding, Severity};
use crate::volume::{
    Engine, OnFull, Reverted, ScrubOptions, ScrubState, VolumeInfo, VolumeOptions,
};

/// Bytes a second that a scrub reads beside live work, where nobody says.
const SCRUB_RATE: u64 = 64 << 20;
/// How often a long job says how far it is.
const NEWS: Duration = Duration::from_secs(1);

/// Where a job is done.
#[derive(Clone, Copy)]
pub struct Scene<'a> {
    /// The store.
    pub engine: &'a Engine,
    /// Where it is, and where it is served.
    pub place: &'a Place,
    /// What is served; `None` in a process that only does this job.
    pub tree: Option<&'a Tree>,
}

/// Does one job; `progress` is told in lines for people how a long one goes on.
///
/// # Errors
/// The engine's; `Invalid` for a bad name, size or source; `Busy`.
pub fn run(scene: Scene<'_>, request: &Request, progress: &mut dyn FnMut(&str)) -> Result<Answer> {
    let Scene { engine, place, .. } = scene;
    match request {
        Request::Status {} => Ok(Answer::Status(Box::new(status::report(engine, place)))),
        Request::VolumeAdd {
            name,
            source,
            choices,
        } => add_volume(engine, place, &Name::new(name)?, source, *choices),
        Request::VolumeList { name } => volumes(engine, name.as_deref()).map(Answer::Volumes),
        Request::VolumeSet { name, choices } => set_volume(engine, &Name::new(name)?, *choices),
        Request::VolumeAccept { name } => engine
            .accept_volume(&Name::new(name)?)
            .map(|()| Answer::Done),
        Request::VolumeRemove { name } => engine
            .remove_volume(&Name::new(name)?)
            .map(|()| Answer::Done),
        Request::VolumeResize { name, size } => resize(scene, &Name::new(name)?, *size),
        Request::SnapshotCreate { targets } => take(engine, targets),
        Request::SnapshotList { volume } => {
            listed(engine, volume.as_deref(), |v| engine.snapshots(v))
                .map(|all| Answer::Snapshots(all.iter().map(status::snapshot_row).collect()))
        }
        Request::SnapshotDelete {
            volume,
            name,
            keep_bookmark,
        } => {
            let (volume, name) = (Name::new(volume)?, Name::new(name)?);
            match keep_bookmark {
                true => engine.delete_snapshot_keep_bookmark(&volume, &name),
                false => engine.delete_snapshot(&volume, &name),
            }
            .map(|()| Answer::Done)
        }
        Request::SnapshotRevert {
            volume,
            name,
            force,
        } => {
            let (volume, name) = (Name::new(volume)?, Name::new(name)?);
            revert(scene, &volume, &name, *force, progress)
        }
        Request::CloneCreate { volume, of, name } => {
            let (volume, name) = (Name::new(volume)?, Name::new(name)?);
            let made = match of {
                Origin::Snapshot(of) => engine.clone_snapshot(&volume, &Name::new(of)?, &name),
                Origin::Clone(of) => engine.clone_clone(&volume, &Name::new(of)?, &name),
            };
            made.map(|info| Answer::Clones(vec![status::clone_row(&info)]))
        }
        Request::CloneList { volume } => listed(engine, volume.as_deref(), |v| engine.clones(v))
            .map(|all| Answer::Clones(all.iter().map(status::clone_row).collect())),
        Request::CloneDelete { volume, name } => engine
            .delete_clone(&Name::new(volume)?, &Name::new(name)?)
            .map(|()| Answer::Done),
        Request::CloneRename { volume, name, new } => engine
            .rename_clone(&Name::new(volume)?, &Name::new(name)?, &Name::new(new)?)
            .map(|()| Answer::Done),
        Request::BookmarkList { volume } => {
            listed(engine, volume.as_deref(), |v| engine.bookmarks(v))
                .map(|all| Answer::Bookmarks(all.iter().map(status::bookmark_row).collect()))
        }
        Request::BookmarkDelete { volume, name } => engine
            .delete_bookmark(&Name::new(volume)?, &Name::new(name)?)
            .map(|()| Answer::Done),
        Request::SnapshotHold { volume, name, held } => engine
            .hold_snapshot(&Name::new(volume)?, &Name::new(name)?, *held)
            .map(|()| Answer::Done),
        Request::SnapshotRename { volume, name, new } => engine
            .rename_snapshot(&Name::new(volume)?, &Name::new(name)?, &Name::new(new)?)
            .map(|()| Answer::Done),
        Request::Diff { volume, from, to } => {
            diff(engine, &Name::new(volume)?, &Name::new(from)?, to)
        }
        Request::Check { percent, repair } => check(scene, *percent, *repair, progress),
        Request::Scrub {
            volume,
            percent,
            rate,
            repair,
            restart,
        } => {
            let volume = volume.as_deref().map(Name::new).transpose()?;
            let usual = if scene.tree.is_some() { SCRUB_RATE } else { 0 };
            let options = ScrubOptions {
                volume,
                percent: *percent,
                rate: rate.unwrap_or(usual),
                repair: *repair,
                restart: *restart,
            };
            scrub(engine, &options, progress)?;
            Ok(Answer::Scrubbed(Box::new(status::scrub_row(engine))))
        }
        Request::Unmount { .. } => Err(Error::new(Kind::Locked, "no daemon serves this store")),
    }
}

/// Scrubs, and says every second how far it is.
fn scrub(
    engine: &Engine,
    options: &ScrubOptions,
    progress: &mut dyn FnMut(&str),
) -> Result<ScrubState> {
    let mut next = Instant::now() + NEWS;
    engine.scrub(options, &mut |state| {
        if Instant::now() >= next {
            let (bytes, found) = (state.bytes, state.found);
            progress(&format!("{bytes} bytes read, {found} damaged blocks"));
            next = Instant::now() + NEWS;
        }
    })
}

/// Checks an open store.
fn check(
    scene: Scene<'_>,
    percent: u32,
    repair: bool,
    progress: &mut dyn FnMut(&str),
) -> Result<Answer> {
    let Scene { engine, place, .. } = scene;
    let mut audit = engine.audit()?;
    let mut map_rebuilt = false;
    if repair && audit.map_to_rebuild {
        engine.rebuild_map()?;
        map_rebuilt = true;
        let again = engine.audit()?;
        for finding in &mut audit.findings {
            let left = |f: &Finding| (&f.check, &f.name) == (&finding.check, &finding.name);
            // What else is gone was not mended, it only cannot be seen any more.
            let mended = matches!(finding.check.as_str(), "map" | "bitmap");
            finding.repaired =
                mended && finding.severity != Severity::Note && !again.findings.iter().any(left);
        }
    }
    if percent > 0 {
        let options = ScrubOptions {
            volume: None,
            percent,
            rate: if scene.tree.is_some() { SCRUB_RATE } else { 0 },
            repair,
            restart: true,
        };
        let read = scrub(engine, &options, progress)?;
        (audit.grains_read, audit.grains_needed) = (read.grains, read.needed);
        if read.mended > 0 {
            let why = format!(
                "{} damaged blocks were mended from good copies",
                read.mended
            );
            let mut mended =
                Finding::new(Severity::Damage, "payload", "store", "log", "damaged").because(why);
            mended.repaired = true;
            audit.findings.push(mended);
        }
    }
    audit.findings.extend(engine.known_damage());
    Ok(Answer::Checked(Box::new(Checked {
        audit,
        map_rebuilt,
        report: status::report(engine, place),
    })))
}

/// The options of a new volume: what was chosen, else the defaults.
///
/// # Errors
/// `Invalid` for a grain that is none.
pub fn options(choices: Choices) -> Result<VolumeOptions> {
    let mut options = VolumeOptions::default();
    if let Some(bytes) = choices.grain {
        options.grain = Grain::new(bytes)?;
    }
    apply(&mut options, choices.on_full, choices.on_full_wait);
    Ok(options)
}

fn apply(options: &mut VolumeOptions, on_full: Option<OnFull>, wait_s: Option<u32>) {
    options.on_full = on_full.unwrap_or(options.on_full);
    options.on_full_wait_s = wait_s.unwrap_or(options.on_full_wait_s);
}

fn add_volume(
    engine: &Engine,
    place: &Place,
    name: &Name,
    source: &str,
    choices: Choices,
) -> Result<Answer> {
    let options = options(choices)?;
    let source = places::source(place, source)?;
    let volume = engine.add_volume(name, &source, options)?;
    let row = status::volume_row(engine, &volume);
    Ok(Answer::Volumes(row.into_iter().collect()))
}

fn set_volume(engine: &Engine, name: &Name, choices: Choices) -> Result<Answer> {
    if choices.grain.is_some() {
        return Err(Error::new(
            Kind::Invalid,
            "the grain of a volume cannot be changed",
        ));
    }
    let mut options = engine.volume(name)?.info().options;
    apply(&mut options, choices.on_full, choices.on_full_wait);
    engine.set_volume(name, options)?;
    Ok(Answer::Done)
}

fn volumes(engine: &Engine, only: Option<&str>) -> Result<Vec<VolumeRow>> {
    let list = match only {
        Some(name) => vec![engine.volume(&Name::new(name)?)?],
        None => engine.volumes(),
    };
    Ok(list
        .iter()
        .filter_map(|v| status::volume_row(engine, v))
        .collect())
}

/// What every volume, or the named one, has of something.
fn listed<T>(
    engine: &Engine,
    only: Option<&str>,
    list: impl Fn(&Name) -> Result<Vec<T>>,
) -> Result<Vec<T>> {
    let names = match only {
        Some(name) => vec![Name::new(name)?],
        None => engine.volumes().iter().map(|v| v.info().name).collect(),
    };
    let mut all = Vec::new();
    for name in &names {
        match list(name) {
            Ok(some) => all.extend(some),
            // Removed between the two questions.
            Err(e) if only.is_none() && e.kind() == Kind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(all)
}

fn resize(scene: Scene<'_>, name: &Name, size: NewSize) -> Result<Answer> {
    let volume = scene.engine.volume(name)?;
    let size = match size {
        NewSize::To(size) => size,
        NewSize::By(more) => volume
            .size()
            .checked_add(more)
            .ok_or_else(|| Error::new(Kind::Invalid, "the size is too large"))?,
    };
    let _: VolumeInfo = match scene.tree {
        Some(tree) => tree.resize(name, size).map_err(as_error)?,
        None => scene.engine.resize_volume(name, size)?,
    };
    let volume = scene.engine.volume(name)?;
    let row = status::volume_row(scene.engine, &volume);
    Ok(Answer::Volumes(row.into_iter().collect()))
}

fn revert(
    scene: Scene<'_>,
    volume: &Name,
    name: &Name,
    force: bool,
    progress: &mut dyn FnMut(&str),
) -> Result<Answer> {
    let mut next = Instant::now() + NEWS;
    let mut news = |done: u64, all: u64| {
        if Instant::now() >= next {
            progress(&format!("{done} of {all} bytes compared"));
            next = Instant::now() + NEWS;
        }
    };
    let Reverted { undo, written } = match scene.tree {
        Some(tree) => tree.revert(volume, name, force, &mut news).map_err(|e| {
            let e = as_error(e);
            match e.kind() {
                Kind::Busy => Error::new(
                    Kind::Busy,
                    format!("{e}; close it first, or use --force to have its writers wait"),
                ),
                _ => e,
            }
        })?,
        None => scene.engine.revert_volume(volume, name, &mut news)?,
    };
    let undo = status::snapshot_row(&undo);
    Ok(Answer::Reverted(Box::new(RevertRow { undo, written })))
}

/// A refusal of the tree for whoever is no system call.
fn as_error(e: TreeError) -> Error {
    match e {
        TreeError::Engine(e) => e,
        other => Error::new(Kind::Unsupported, other.to_string()),
    }
}

fn take(engine: &Engine, targets: &[(String, String)]) -> Result<Answer> {
    let checked = targets
        .iter()
        .map(|(volume, name)| Ok((Name::new(volume)?, Name::new(name)?)))
        .collect::<Result<Vec<_>>>()?;
    if checked.is_empty() {
        return Err(Error::new(Kind::Invalid, "no snapshot is named"));
    }
    let taken = engine.take_snapshots(&checked)?;
    Ok(Answer::Snapshots(
        taken.iter().map(status::snapshot_row).collect(),
    ))
}

/// The points are held while their difference is looked at, so that it is of what was named.
fn diff(engine: &Engine, volume: &Name, from: &Name, to: &str) -> Result<Answer> {
    let point = engine.diff_point(volume, from)?;
    // A bookmark has nothing that could be taken away meanwhile.
    let held = match point.bookmark {
        true => None,
        false => Some(engine.open_snapshot(volume, from)?),
    };
    let (diff, image): (_, Arc<dyn Image>) = match to {
        LIVE => {
            let image = LiveImage::new(engine.volume(volume)?);
            (engine.diff(volume, from, None)?, Arc::new(image))
        }
        to => {
            let to = Name::new(to)?;
            let newer = engine.open_snapshot(volume, &to)?;
            let diff = engine.diff(volume, from, Some(&to))?;
            if diff.to.as_ref().map(|to| to.uuid) != Some(newer.info().uuid) {
                return Err(Error::new(Kind::Busy, "a snapshot was just renamed"));
            }
            (diff, newer)
        }
    };
    let held_is_it = held.is_none_or(|held| held.info().uuid == diff.from.uuid);
    if diff.from.uuid != point.uuid || !held_is_it {
        return Err(Error::new(Kind::Busy, "a snapshot was just renamed"));
    }
    let extents = extents(&*image, &diff)?;
    let list = DiffList::new(&diff, extents);
    Ok(Answer::Diff(Box::new(list)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_fall_back_to_the_defaults() {
        let plain = options(Choices::default()).unwrap();
        assert_eq!(plain.grain, Grain::DEFAULT);
        assert_eq!(
            (plain.on_full, plain.on_full_wait_s),
            (OnFull::FailWrite, 60)
        );
        let chosen = Choices {
            grain: Some(65536),
            on_full: Some(OnFull::FailSnapshot),
            on_full_wait: Some(0),
        };
        let chosen = options(chosen).unwrap();
        assert_eq!(chosen.grain.bytes(), 65536);
        assert_eq!(
            (chosen.on_full, chosen.on_full_wait_s),
            (OnFull::FailSnapshot, 0)
        );
        let odd = Choices {
            grain: Some(5000),
            ..Choices::default()
        };
        assert_eq!(options(odd).unwrap_err().kind(), Kind::Invalid);
    }
}
