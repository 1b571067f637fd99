//! The jobs a store does on request, the same behind the control socket and in process.
//!
//! Promises: names are checked here, whoever asks; when [`run`] returns `Ok` the change is durable;
//! a source that would be hidden by the mount, or that is part of the store, is refused. Unmounting
//! is not a job of a store: `daemon::serve` does it.

use std::sync::Arc;

use crate::daemon::places;
use crate::daemon::protocol::{Answer, Choices, Request, SnapshotRow, VolumeRow};
use crate::daemon::status::{self, Place};
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::image::diff::{DiffList, LIVE, extents};
use crate::image::live::LiveImage;
use crate::units::{Grain, Name};
use crate::volume::{Engine, OnFull, VolumeOptions};

/// Does one job.
///
/// # Errors
/// The engine's; `Invalid` for a bad name, size or source.
pub fn run(engine: &Engine, place: &Place, request: &Request) -> Result<Answer> {
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
        Request::SnapshotCreate { targets } => take(engine, targets),
        Request::SnapshotList { volume } => snapshots(engine, volume.as_deref()),
        Request::SnapshotDelete { volume, name } => engine
            .delete_snapshot(&Name::new(volume)?, &Name::new(name)?)
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
        Request::Unmount { .. } => Err(Error::new(Kind::Locked, "no daemon serves this store")),
    }
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

fn snapshots(engine: &Engine, only: Option<&str>) -> Result<Answer> {
    let names = match only {
        Some(name) => vec![Name::new(name)?],
        None => engine.volumes().iter().map(|v| v.info().name).collect(),
    };
    let mut rows: Vec<SnapshotRow> = Vec::new();
    for name in &names {
        match engine.snapshots(name) {
            Ok(list) => rows.extend(list.iter().map(status::snapshot_row)),
            // Removed between the two questions.
            Err(e) if only.is_none() && e.kind() == Kind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(Answer::Snapshots(rows))
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
    let older = engine.open_snapshot(volume, from)?;
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
    if diff.from.uuid != older.info().uuid {
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
