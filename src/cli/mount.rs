//! `stillframe mount`: starts a daemon and returns when the mount serves.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::args::{self, NewVolumeArgs, VolumeArg};
use super::out;
use crate::daemon::launch::{self, Parent};
use crate::daemon::protocol::Choices;
use crate::daemon::serve::{self, Announce, Config, Log};
use crate::daemon::status::shown;
use crate::daemon::watchdog::{self, Limits};
use crate::error::{Error, Kind, Result};

/// Arguments.
#[derive(Debug, Clone, Args)]
pub struct MountArgs {
    /// An empty directory
    pub mountpoint: PathBuf,
    /// Put a source under protection, if it is not yet; makes the store if there is none
    #[arg(long, value_name = "NAME=SOURCE", value_parser = args::volume)]
    pub volume: Vec<VolumeArg>,
    /// Stay in the foreground and log to the terminal
    #[arg(long)]
    pub foreground: bool,
    /// Let other users in (needs user_allow_other in /etc/fuse.conf unless root)
    #[arg(long)]
    pub allow_other: bool,
    /// Log to this file instead of the journal
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Most bytes that the log and the clones may use while this daemon runs; beyond it the store
    /// counts as full
    #[arg(long, value_name = "SIZE", value_parser = args::size)]
    pub limit: Option<u64>,
    /// Size at which a segment of the log is closed, 1M to 1G; only when the store is made
    /// [default: 64M]
    #[arg(long, value_name = "SIZE", value_parser = args::segment)]
    pub segment_size: Option<u64>,
    /// Name a request in the log and in the status that is older than so many seconds; 0 for never
    #[arg(long, value_name = "SECONDS", default_value_t = watchdog::NAMED_AFTER_S)]
    pub stuck_after: u32,
    /// Cut the users of the mount off when a request has hung for so many seconds; never by default
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub abort_stuck: Option<u32>,
    /// Choices for new volumes.
    #[command(flatten)]
    pub choices: NewVolumeArgs,
}

/// Runs it.
///
/// # Errors
/// See the table of exit codes; the daemon's own reason where it is the daemon that fails.
pub fn run(args: &MountArgs, store: &Path) -> Result<()> {
    let mut volumes = Vec::new();
    for volume in &args.volume {
        volumes.push((volume.name.clone(), args::absolute_text(&volume.source)?));
    }
    let log = args.log.as_deref().map(args::absolute).transpose()?;
    let config = Config {
        store: store.to_owned(),
        mountpoint: args::absolute(&args.mountpoint)?,
        volumes,
        choices: args.choices.choices(),
        allow_other: args.allow_other,
        limit: args.limit,
        segment_size: args.segment_size,
        limits: limits(args),
        log: match log {
            Some(path) => Log::File(path),
            None if args.foreground => Log::Stderr,
            None => Log::Best,
        },
    };
    if let Some(mut parent) = Parent::from_env() {
        let outcome = serve::run(&config, &mut parent);
        if let Err(e) = &outcome {
            parent.failed(e);
        }
        return outcome;
    }
    if args.foreground {
        return serve::run(&config, &mut Terminal);
    }
    super::interrupt::install()?;
    start(&config)
}

fn limits(args: &MountArgs) -> Limits {
    let seconds = |n: u32| (n > 0).then(|| Duration::from_secs(n.into()));
    Limits {
        named_after: seconds(args.stuck_after),
        abort_after: args.abort_stuck.and_then(seconds),
    }
}

fn start(config: &Config) -> Result<()> {
    let line = command_line(config);
    let pid = launch::start(&line, &mut |text| out::remark(text))?;
    let at = shown(&config.mountpoint);
    out::line(&format!(
        "serving {} at {at} (pid {pid})",
        shown(&config.store)
    ))
}

/// The daemon's own arguments: those we were given, with absolute paths.
fn command_line(config: &Config) -> Vec<OsString> {
    let store = config.store.clone().into();
    let mut line: Vec<OsString> = vec!["mount".into(), "--store".into(), store];
    for (name, source) in &config.volumes {
        line.extend(["--volume".into(), format!("{name}={source}").into()]);
    }
    if let Log::File(path) = &config.log {
        line.extend(["--log".into(), path.clone().into()]);
    }
    if config.allow_other {
        line.push("--allow-other".into());
    }
    if let Some(bytes) = config.limit {
        line.push(format!("--limit={bytes}").into());
    }
    if let Some(bytes) = config.segment_size {
        line.push(format!("--segment-size={bytes}").into());
    }
    let named = config.limits.named_after.unwrap_or_default();
    line.push(format!("--stuck-after={}", named.as_secs()).into());
    if let Some(limit) = config.limits.abort_after {
        line.push(format!("--abort-stuck={}", limit.as_secs()).into());
    }
    let choices = config.choices;
    if let Some(bytes) = choices.grain {
        line.push(format!("--grain={bytes}").into());
    }
    if let Some(policy) = choices.on_full {
        line.push(format!("--on-full={}", args::policy_name(policy)).into());
    }
    if let Some(seconds) = choices.on_full_wait {
        line.push(format!("--on-full-wait={seconds}").into());
    }
    line.extend(["--".into(), config.mountpoint.clone().into()]);
    line
}

/// Whoever reads the log on the terminal needs no more.
struct Terminal;

impl Announce for Terminal {
    fn note(&mut self, text: &str) {
        out::remark(text);
    }

    fn ready(&mut self) -> bool {
        true
    }
}

/// Mounts for `demo`: in the background, one new volume.
///
/// # Errors
/// As [`run`].
pub fn scratch(store: &Path, mountpoint: &Path, name: &str, source: &Path) -> Result<()> {
    let source = source
        .to_str()
        .ok_or_else(|| Error::new(Kind::Invalid, "the temporary directory is not UTF-8"))?;
    let config = Config {
        store: store.to_owned(),
        mountpoint: mountpoint.to_owned(),
        volumes: vec![(name.to_owned(), source.to_owned())],
        choices: Choices::default(),
        allow_other: false,
        limit: None,
        segment_size: None,
        limits: Limits {
            named_after: Some(Duration::from_secs(watchdog::NAMED_AFTER_S.into())),
            abort_after: None,
        },
        log: Log::File(store.with_file_name("daemon.log")),
    };
    let line = command_line(&config);
    launch::start(&line, &mut |text| out::remark(text)).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    /// What the daemon is started with means the same as what we were given.
    #[test]
    fn the_daemon_is_told_everything() {
        let given = [
            "stillframe",
            "mount",
            "m",
            "--store",
            "s",
            "--volume",
            "a=b=c",
            "--volume=d=--e",
            "--allow-other",
            "--log",
            "l",
            "--grain",
            "64K",
            "--on-full",
            "fail-snapshot",
            "--on-full-wait",
            "7",
            "--limit=3G",
            "--segment-size",
            "4M",
            "--stuck-after=9",
            "--abort-stuck=99",
        ];
        let parse = |line: &[OsString]| {
            let cli = super::super::Cli::try_parse_from(line).unwrap();
            match cli.command {
                super::super::Command::Mount(args) => (cli.store.unwrap(), args),
                _ => panic!("another command"),
            }
        };
        let given: Vec<OsString> = given.iter().map(OsString::from).collect();
        let (_, args) = parse(&given);
        let config = Config {
            store: "/s -x".into(),
            mountpoint: "/-m".into(),
            volumes: vec![("a".into(), "/b=c".into()), ("d".into(), "/--e".into())],
            choices: args.choices.choices(),
            allow_other: true,
            limit: args.limit,
            segment_size: args.segment_size,
            limits: limits(&args),
            log: Log::File("/l".into()),
        };
        let mut line = command_line(&config);
        line.insert(0, "stillframe".into());
        let (store, told) = parse(&line);
        assert_eq!(store, config.store);
        assert_eq!(told.mountpoint, config.mountpoint);
        assert_eq!(told.log, Some("/l".into()));
        assert!(told.allow_other && !told.foreground);
        assert_eq!(
            (told.limit, told.segment_size),
            (Some(3 << 30), Some(4 << 20))
        );
        assert_eq!(limits(&told), config.limits);
        assert_eq!(limits(&told).named_after, Some(Duration::from_secs(9)));
        assert_eq!(limits(&told).abort_after, Some(Duration::from_secs(99)));
        assert_eq!(told.choices.choices(), config.choices);
        let volumes: Vec<_> = told
            .volume
            .into_iter()
            .map(|v| (v.name, v.source))
            .collect();
        assert_eq!(volumes, config.volumes);
    }
}
