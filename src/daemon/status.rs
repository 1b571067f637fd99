//! The state of a store as rows, as JSON and as Prometheus text.
//!
//! Promises: what cannot be read of one volume does not hide the others (its row says why); every
//! label is escaped as the text format demands, so that a name or path cannot forge a sample.
//! It only reads; the numbers are of one moment per volume, not of one moment together.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::daemon::protocol::{
    BookmarkRow, CloneRow, Report, ScrubRow, SnapshotRow, ThinRow, VolumeRow,
};
use crate::daemon::timestamp;
use crate::error::{Kind, Result};
use crate::units::escape;
use crate::volume::{
    BookmarkInfo, CloneInfo, Engine, SnapshotInfo, SnapshotState, Volume, VolumeState,
};

/// Who serves the store, for the report.
#[derive(Debug, Clone)]
pub struct Place {
    /// The store directory.
    pub store: PathBuf,
    /// The mountpoint, while a daemon serves it.
    pub mountpoint: Option<PathBuf>,
}

/// Where things stand now.
pub fn report(engine: &Engine, place: &Place) -> Report {
    Report {
        uuid: engine.uuid().to_string(),
        log_bytes: engine.log_bytes().ok(),
        thin: engine.thin().ok().map(|thin| ThinRow {
            used: thin.used,
            limit: thin.limit,
            free: thin.free,
            growth_per_hour: thin.growth,
            measured_seconds: thin.measured_s,
            full_in_seconds: thin.full_in_s,
        }),
        scrub: scrub_row(engine),
        volumes: engine
            .volumes()
            .iter()
            .filter_map(|v| volume_row(engine, v))
            .collect(),
        ..nothing(place)
    }
}

/// What is known of a store without asking it.
pub fn nothing(place: &Place) -> Report {
    Report {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: place.mountpoint.is_some().then(std::process::id),
        store: shown(&place.store),
        uuid: String::new(),
        mountpoint: place.mountpoint.as_deref().map(shown),
        log_bytes: None,
        thin: None,
        scrub: ScrubRow::default(),
        volumes: Vec::new(),
        stuck: Vec::new(),
        unanswered: false,
    }
}

/// The last scrub, and what is known damaged.
pub fn scrub_row(engine: &Engine) -> ScrubRow {
    let state = engine.scrub_state();
    let time = |ns: i64| (ns != 0).then(|| timestamp::precise(ns));
    ScrubRow {
        running: state.running,
        started: time(state.started_ns),
        finished: time(state.finished_ns),
        finished_unix: (state.finished_ns != 0).then_some(state.finished_ns as f64 / 1e9),
        percent: state.percent,
        grains: state.grains,
        bytes: state.bytes,
        found: state.found,
        mended: state.mended,
        damaged: engine.known_damage(),
    }
}

/// A path as text, for people and JSON.
pub fn shown(path: &Path) -> String {
    escape(&path.to_string_lossy())
}

/// One volume with its snapshots; `None` if it was removed meanwhile.
pub fn volume_row(engine: &Engine, volume: &Arc<Volume>) -> Option<VolumeRow> {
    let info = volume.info();
    let (state, reason) = volume_state(&info.state);
    let mut reason = reason.or_else(|| info.notice.as_deref().map(escape));
    let name = &info.name;
    let snapshots = rows(engine.snapshots(name), snapshot_row, &mut reason)?;
    let clones = rows(engine.clones(name), clone_row, &mut reason)?;
    let bookmarks = rows(engine.bookmarks(name), bookmark_row, &mut reason)?;
    Some(VolumeRow {
        name: info.name.to_string(),
        uuid: info.uuid.to_string(),
        source: info.source,
        size: info.size,
        grain: info.grain.bytes(),
        state: state.to_owned(),
        reason,
        used: info.used,
        reclaimable: info.reclaimable,
        on_full: info.options.on_full,
        on_full_wait: info.options.on_full_wait_s,
        added: timestamp::precise(info.added_ns),
        snapshots,
        clones,
        bookmarks,
    })
}

/// A listing as rows; what keeps it from being made becomes the reason, if there is none yet. `None`
/// if the volume is gone.
fn rows<I, R>(
    list: Result<Vec<I>>,
    row: impl Fn(&I) -> R,
    reason: &mut Option<String>,
) -> Option<Vec<R>> {
    match list {
        Ok(list) => Some(list.iter().map(row).collect()),
        Err(e) if e.kind() == Kind::NotFound => None,
        Err(e) => {
            reason.get_or_insert_with(|| escape(&e.chain()));
            Some(Vec::new())
        }
    }
}

/// One clone.
pub fn clone_row(info: &CloneInfo) -> CloneRow {
    let (state, reason) = snapshot_state(&info.state);
    CloneRow {
        volume: info.volume.to_string(),
        name: info.name.to_string(),
        uuid: info.uuid.to_string(),
        created: timestamp::precise(info.created_ns),
        modified: timestamp::precise(info.mtime_ns),
        size: info.size,
        base: info.base.map(|u| u.to_string()),
        base_name: info.base_name.as_ref().map(|n| n.to_string()),
        layers: info.layers,
        own: info.own,
        state,
        reason,
    }
}

/// One bookmark.
pub fn bookmark_row(info: &BookmarkInfo) -> BookmarkRow {
    let (state, reason) = snapshot_state(&info.state);
    BookmarkRow {
        volume: info.volume.to_string(),
        name: info.name.to_string(),
        uuid: info.uuid.to_string(),
        epoch: info.epoch.0,
        time: timestamp::precise(info.taken_ns),
        size: info.size,
        state,
        reason,
    }
}

fn snapshot_state(state: &SnapshotState) -> (String, Option<String>) {
    match state {
        SnapshotState::Active => ("active".to_owned(), None),
        SnapshotState::Failed(why) => ("failed".to_owned(), Some(escape(why))),
    }
}

/// One snapshot.
pub fn snapshot_row(info: &SnapshotInfo) -> SnapshotRow {
    let (state, reason) = snapshot_state(&info.state);
    SnapshotRow {
        volume: info.volume.to_string(),
        name: info.name.to_string(),
        uuid: info.uuid.to_string(),
        epoch: info.epoch.0,
        time: timestamp::precise(info.taken_ns),
        size: info.size,
        allocated: info.allocated,
        unique: info.unique,
        state,
        reason,
        parent: info.parent.map(|u| u.to_string()),
        group: info.group.map(|u| u.to_string()),
        held: info.held,
    }
}

fn volume_state(state: &VolumeState) -> (&'static str, Option<String>) {
    match state {
        VolumeState::Active => ("active", None),
        VolumeState::Unverified => (
            "unverified",
            Some("the last stop was unclean; works, the source was not compared".into()),
        ),
        VolumeState::Changed(why) => ("changed", Some(escape(why))),
        VolumeState::Suspect(why) => ("suspect", Some(escape(why))),
        VolumeState::Missing(why) => ("missing", Some(escape(why))),
        VolumeState::Unfinished(why) => ("unfinished", Some(escape(why))),
    }
}

/// The states a volume can be in, in the order of the metric's label values.
const VOLUME_STATES: [&str; 6] = [
    "active",
    "unverified",
    "changed",
    "suspect",
    "missing",
    "unfinished",
];

/// The report in the text format of Prometheus, version 0.0.4.
pub fn metrics(report: &Report) -> String {
    let mut out = String::new();
    let mut gauge = |name: &str, help: &str, samples: &mut dyn Iterator<Item = (String, f64)>| {
        let _ = writeln!(out, "# HELP stillframe_{name} {help}");
        let _ = writeln!(out, "# TYPE stillframe_{name} gauge");
        for (labels, value) in samples {
            let _ = writeln!(out, "stillframe_{name}{labels} {value}");
        }
    };
    let volumes = || report.volumes.iter();
    let of = |v: &VolumeRow| format!("{{volume=\"{}\"}}", label(&v.name));
    let sum = |v: &VolumeRow, f: fn(&SnapshotRow) -> bool| {
        v.snapshots.iter().filter(|s| f(s)).count() as f64
    };
    let build = format!(
        "{{version=\"{}\",store=\"{}\"}}",
        label(&report.version),
        label(&report.store)
    );
    gauge(
        "build_info",
        "Always 1; the labels tell what runs.",
        &mut [(build, 1.0)].into_iter(),
    );
    gauge(
        "log_bytes",
        "Bytes of the log on disk.",
        &mut report
            .log_bytes
            .iter()
            .map(|&bytes| (String::new(), bytes as f64)),
    );
    gauge(
        "stuck_requests",
        "Requests and jobs that are under way for longer than they should be.",
        &mut [(String::new(), report.stuck.len() as f64)].into_iter(),
    );
    thin_metrics(report, &mut gauge);
    scrub_metrics(&report.scrub, &mut gauge);
    gauge(
        "volume_size_bytes",
        "Size of the volume.",
        &mut volumes().map(|v| (of(v), v.size as f64)),
    );
    gauge(
        "volume_used_bytes",
        "Bytes of the thin target that serve the volume's snapshots.",
        &mut volumes().map(|v| (of(v), v.used as f64)),
    );
    gauge(
        "volume_reclaimable_bytes",
        "Bytes of the thin target that reclaim will give back.",
        &mut volumes().map(|v| (of(v), v.reclaimable as f64)),
    );
    gauge(
        "volume_state",
        "1 for the state the volume is in, 0 for the others.",
        &mut volumes().flat_map(|v| {
            VOLUME_STATES.iter().map(|&state| {
                let labels = format!("{{volume=\"{}\",state=\"{state}\"}}", label(&v.name));
                (labels, f64::from(u8::from(v.state == state)))
            })
        }),
    );
    gauge(
        "volume_snapshots",
        "Snapshots of the volume.",
        &mut volumes().map(|v| (of(v), v.snapshots.len() as f64)),
    );
    gauge(
        "volume_snapshots_failed",
        "Snapshots of the volume that could not be kept.",
        &mut volumes().map(|v| (of(v), sum(v, |s| s.state == "failed"))),
    );
    gauge(
        "volume_clones",
        "Writable clones of the volume.",
        &mut volumes().map(|v| (of(v), v.clones.len() as f64)),
    );
    gauge(
        "volume_bookmarks",
        "Bookmarks of the volume.",
        &mut volumes().map(|v| (of(v), v.bookmarks.len() as f64)),
    );
    snapshot_metrics(report, &mut gauge);
    out
}

type Gauge<'a> = dyn FnMut(&str, &str, &mut dyn Iterator<Item = (String, f64)>) + 'a;

/// What is not known has no sample: an alarm on its absence is better than a made-up number.
fn thin_metrics(report: &Report, gauge: &mut Gauge<'_>) {
    let thin = report.thin.as_ref();
    let mut one = |name: &str, help: &str, value: Option<f64>| {
        gauge(
            name,
            help,
            &mut value.into_iter().map(|v| (String::new(), v)),
        );
    };
    one(
        "thin_used_bytes",
        "Bytes of the thin target in use.",
        thin.map(|t| t.used as f64),
    );
    one(
        "thin_free_bytes",
        "Bytes by which the thin target may still grow.",
        thin.map(|t| t.free as f64),
    );
    one(
        "thin_limit_bytes",
        "Bytes that the thin target may use at most, where a limit was set.",
        thin.and_then(|t| t.limit).map(|v| v as f64),
    );
    one(
        "thin_growth_bytes_per_hour",
        "Growth of the thin target, measured over the last hour at most.",
        thin.and_then(|t| t.growth_per_hour).map(|v| v as f64),
    );
    one(
        "thin_full_seconds",
        "Time until the thin target is full if it goes on growing like that.",
        thin.and_then(|t| t.full_in_seconds).map(|v| v as f64),
    );
}

fn scrub_metrics(scrub: &ScrubRow, gauge: &mut Gauge<'_>) {
    let mut one = |name: &str, help: &str, value: Option<f64>| {
        gauge(
            name,
            help,
            &mut value.into_iter().map(|v| (String::new(), v)),
        );
    };
    one(
        "scrub_running",
        "1 while a scrub runs.",
        Some(f64::from(u8::from(scrub.running))),
    );
    one(
        "scrub_finished_timestamp_seconds",
        "When a scrub last came to its end; absent if none did.",
        scrub.finished_unix,
    );
    one(
        "scrub_read_bytes",
        "Bytes that the last scrub has read.",
        Some(scrub.bytes as f64),
    );
    one(
        "scrub_damaged_blocks",
        "Damaged blocks that the last scrub has found.",
        Some(scrub.found as f64),
    );
    one(
        "scrub_mended_blocks",
        "Damaged blocks that the last scrub has mended.",
        Some(scrub.mended as f64),
    );
    one(
        "damaged_points",
        "Snapshots and clones of which some bytes are known damaged.",
        Some(scrub.damaged.len() as f64),
    );
}

fn snapshot_metrics(report: &Report, gauge: &mut Gauge<'_>) {
    let snapshots = || report.volumes.iter().flat_map(|v| &v.snapshots);
    let of = |s: &SnapshotRow| {
        format!(
            "{{volume=\"{}\",snapshot=\"{}\"}}",
            label(&s.volume),
            label(&s.name)
        )
    };
    gauge(
        "snapshot_size_bytes",
        "Size of the volume at the instant of the snapshot.",
        &mut snapshots().map(|s| (of(s), s.size as f64)),
    );
    gauge(
        "snapshot_unique_bytes",
        "Bytes of the thin target that only this snapshot needs.",
        &mut snapshots().map(|s| (of(s), s.unique as f64)),
    );
    let clones = || report.volumes.iter().flat_map(|v| &v.clones);
    gauge(
        "clone_own_bytes",
        "Bytes that lie in the clone's own layer.",
        &mut clones().map(|c| {
            let (volume, clone) = (label(&c.volume), label(&c.name));
            let labels = format!("{{volume=\"{volume}\",clone=\"{clone}\"}}");
            (labels, c.own as f64)
        }),
    );
}

/// Escapes a label value: the format knows exactly these three.
fn label(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::OnFull;

    fn sample() -> Report {
        let snapshot = SnapshotRow {
            volume: "vm".into(),
            name: "monday".into(),
            uuid: "u".into(),
            epoch: 3,
            time: timestamp::precise(0),
            size: 4096,
            allocated: 4096,
            unique: 512,
            state: "failed".into(),
            reason: Some("full".into()),
            parent: None,
            group: None,
            held: false,
        };
        let volume = VolumeRow {
            name: "vm".into(),
            uuid: "u".into(),
            source: "/x".into(),
            size: 1 << 40,
            grain: 4096,
            state: "active".into(),
            reason: None,
            used: 1,
            reclaimable: 2,
            on_full: OnFull::FailWrite,
            on_full_wait: 60,
            added: timestamp::precise(0),
            snapshots: vec![snapshot],
            clones: vec![CloneRow {
                volume: "vm".into(),
                name: "c".into(),
                uuid: "u".into(),
                created: timestamp::precise(0),
                modified: timestamp::precise(0),
                size: 4096,
                base: None,
                base_name: None,
                layers: 1,
                own: 77,
                state: "active".into(),
                reason: None,
            }],
            bookmarks: vec![],
        };
        Report {
            version: "1".into(),
            pid: Some(1),
            store: "/a\"b\\c\nstillframe_log_bytes 7".into(),
            uuid: "u".into(),
            mountpoint: Some("/m".into()),
            log_bytes: Some(9),
            thin: Some(ThinRow {
                used: 9,
                limit: None,
                free: 1 << 40,
                growth_per_hour: Some(7200),
                measured_seconds: 60,
                full_in_seconds: Some(77),
            }),
            scrub: ScrubRow::default(),
            volumes: vec![volume],
            stuck: Vec::new(),
            unanswered: false,
        }
    }

    /// Every line is a HELP, a TYPE or a sample of the family just declared; large numbers are
    /// written out; a path cannot smuggle in a line.
    #[test]
    fn metrics_are_well_formed() {
        let text = metrics(&sample());
        let mut family = String::new();
        let mut samples = 0;
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                family = rest.split(' ').next().unwrap().to_owned();
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                assert_eq!(rest, format!("{family} gauge"));
            } else {
                let (name, value) = line.rsplit_once(' ').unwrap();
                assert_eq!(name.split('{').next().unwrap(), family, "{line}");
                assert!(value.bytes().all(|b| b.is_ascii_digit()), "{line}");
                samples += 1;
            }
        }
        assert_eq!(samples, 28);
        assert!(!text.contains("\nstillframe_thin_limit_bytes "));
        assert!(text.contains("stillframe_thin_full_seconds 77\n"));
        assert!(text.contains("stillframe_log_bytes 9\n"));
        assert!(text.contains("stillframe_volume_size_bytes{volume=\"vm\"} 1099511627776\n"));
        assert!(text.contains("stillframe_volume_snapshots_failed{volume=\"vm\"} 1\n"));
        assert!(text.contains("stillframe_volume_clones{volume=\"vm\"} 1\n"));
        assert!(text.contains("stillframe_clone_own_bytes{volume=\"vm\",clone=\"c\"} 77\n"));
        assert!(
            text.contains("store=\"/a\\\"b\\\\c\\nstillframe_log_bytes 7\""),
            "{text}"
        );
    }

    /// The documented schema of `status --json`.
    #[test]
    fn the_report_has_the_documented_fields() {
        let json = serde_json::to_value(sample()).unwrap();
        for field in ["version", "pid", "store", "mountpoint", "thin", "volumes"] {
            assert!(json.get(field).is_some(), "{field}");
        }
        for field in [
            "used",
            "limit",
            "free",
            "growth_per_hour",
            "measured_seconds",
            "full_in_seconds",
        ] {
            assert!(json["thin"].get(field).is_some(), "{field}");
        }
        let volume = &json["volumes"][0];
        for field in [
            "name",
            "source",
            "size",
            "grain",
            "state",
            "used",
            "reclaimable",
            "snapshots",
            "clones",
            "bookmarks",
        ] {
            assert!(volume.get(field).is_some(), "{field}");
        }
        for field in ["name", "uuid", "epoch", "time", "size", "unique", "state"] {
            assert!(volume["snapshots"][0].get(field).is_some(), "{field}");
        }
        assert_eq!(volume["on_full"], "fail-write");
    }
}
