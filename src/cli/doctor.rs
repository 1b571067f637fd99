//! `stillframe doctor`: what would keep Stillframe from working here, one line each.
//!
//! Promises: it changes one thing only, stale mounts of ours, which it takes away; a mount of
//! anybody else, and one of ours that is alive or merely silent, is never touched. Everything else
//! it reports together with what would help.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::{exit, out};
use crate::daemon::client;
use crate::daemon::places::{self, Probe};
use crate::daemon::status::shown;
use crate::daemon::store::{self, Found};
use crate::error::{IoContext, Result};
use crate::sys::disk::Dir;
use crate::sys::file::FileDir;
use crate::sys::{mount, process};

/// Free space in the store below which the doctor frowns: a few segments of the log.
const SPACE_LOW: u64 = 1 << 30;

/// Arguments.
#[derive(Debug, Clone, Args)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    Ok,
    /// Something was wrong and is not any more.
    Fixed,
    /// Works, but.
    Warning,
    /// Does not work.
    Bad,
}

#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    detail: String,
    help: Option<String>,
}

impl Finding {
    fn new(check: &'static str, verdict: Verdict, detail: impl Into<String>) -> Finding {
        Finding {
            check,
            verdict,
            detail: detail.into(),
            help: None,
        }
    }

    fn help(mut self, help: impl Into<String>) -> Finding {
        self.help = Some(help.into());
        self
    }
}

/// Runs it; returns the exit code: 1 if anything is bad.
///
/// # Errors
/// `Io` if the mount table cannot be read or nothing can be printed.
pub fn run(args: &DoctorArgs, at: &Path) -> Result<u8> {
    let mut findings = vec![fuse_device(), mounting()];
    findings.extend(stale_mounts()?);
    findings.extend(store_findings(at));
    if args.json {
        out::json(&findings)?;
    } else {
        let lines: Vec<String> = findings.iter().map(line).collect();
        out::line(&lines.join("\n"))?;
    }
    let bad = findings.iter().any(|f| f.verdict == Verdict::Bad);
    Ok(if bad {
        exit::code(crate::error::Kind::Failed)
    } else {
        exit::DONE
    })
}

fn line(finding: &Finding) -> String {
    let verdict = match finding.verdict {
        Verdict::Ok => "ok",
        Verdict::Fixed => "fixed",
        Verdict::Warning => "warning",
        Verdict::Bad => "bad",
    };
    let help = finding
        .help
        .as_ref()
        .map_or(String::new(), |help| format!("; {help}"));
    exit::safe(&format!(
        "{verdict:<8} {:<11} {}{help}",
        finding.check, finding.detail
    ))
}

fn fuse_device() -> Finding {
    let check = "fuse-device";
    match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(_) => Finding::new(check, Verdict::Ok, "/dev/fuse can be opened"),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            Finding::new(check, Verdict::Bad, "there is no /dev/fuse")
                .help("load the kernel module (modprobe fuse), or give the container the device")
        }
        Err(e) => Finding::new(
            check,
            Verdict::Bad,
            format!("/dev/fuse cannot be opened: {e}"),
        )
        .help("give your user read and write access to it, or run as root"),
    }
}

/// Whether this user may mount: root by itself, others through `fusermount3`.
fn mounting() -> Finding {
    let check = "mounting";
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = fusermount(&path);
    if process::effective_uid() == 0 {
        return Finding::new(check, Verdict::Ok, "root mounts without help");
    }
    let Some(program) = found else {
        return Finding::new(check, Verdict::Bad, "fusermount3 is not installed")
            .help("install the package fuse3, or run as root");
    };
    let setuid = fs::metadata(&program).is_ok_and(|m| m.uid() == 0 && m.mode() & 0o4000 != 0);
    if setuid {
        return Finding::new(
            check,
            Verdict::Ok,
            format!("{} mounts for users", shown(&program)),
        );
    }
    Finding::new(
        check,
        Verdict::Bad,
        format!("{} is not setuid root", shown(&program)),
    )
    .help("install the package fuse3 anew, or run as root")
}

fn fusermount(path: &OsStr) -> Option<PathBuf> {
    std::env::split_paths(path)
        .chain(["/usr/bin".into(), "/bin".into()])
        .map(|dir| dir.join("fusermount3"))
        .find(|program| program.is_file())
}

fn stale_mounts() -> Result<Vec<Finding>> {
    let check = "mounts";
    let mut findings = Vec::new();
    let table = mount::mounts().context(|| "cannot read the table of mounts")?;
    let mut alive = 0;
    // The newest first: dead mounts may lie one over the other.
    for entry in table.iter().rev() {
        let Some(store) = places::ours(entry) else {
            continue;
        };
        let at = shown(&entry.mountpoint);
        let of = shown(&store);
        match places::probe(&entry.mountpoint) {
            Probe::Alive => alive += 1,
            Probe::Silent => findings.push(
                Finding::new(
                    check,
                    Verdict::Bad,
                    format!("{at} (store {of}) does not answer"),
                )
                .help(format!("'stillframe umount --force {at}' ends it")),
            ),
            Probe::Dead => findings.push(match places::clean(&entry.mountpoint) {
                Ok(()) => {
                    let text = format!("cleaned the stale mount of store {of} at {at}");
                    Finding::new(check, Verdict::Fixed, text)
                }
                Err(e) => {
                    let text = format!("{at} is stale and cannot be cleaned: {}", e.chain());
                    Finding::new(check, Verdict::Bad, text)
                        .help("run this as root or as the user who mounted it")
                }
            }),
        }
    }
    if findings.is_empty() {
        findings.push(Finding::new(
            check,
            Verdict::Ok,
            format!("{alive} alive, none stale"),
        ));
    }
    Ok(findings)
}

fn store_findings(at: &Path) -> Vec<Finding> {
    let check = "store";
    let of = shown(at);
    match store::look(at) {
        Ok(Found::Store) => {}
        Ok(Found::Absent | Found::Empty) => {
            let text = format!("there is no store at {of} yet");
            return vec![
                Finding::new(check, Verdict::Ok, text)
                    .help("'stillframe mount --volume NAME=SOURCE' makes one"),
            ];
        }
        Err(e) => return vec![Finding::new(check, Verdict::Bad, e.chain())],
    }
    let dir = match FileDir::open(at) {
        Ok(dir) => dir,
        Err(e) => {
            return vec![
                Finding::new(check, Verdict::Bad, e.chain())
                    .help("a store belongs to the user who serves it, with mode 0700"),
            ];
        }
    };
    vec![served(at), rights(at), space(&dir)]
}

fn served(at: &Path) -> Finding {
    let of = shown(at);
    match client::connect(at) {
        Ok(Some(_)) => Finding::new("store", Verdict::Ok, format!("{of} is served by a daemon")),
        Ok(None) => Finding::new("store", Verdict::Ok, format!("{of} is not mounted")),
        Err(e) => Finding::new("store", Verdict::Bad, e.chain()),
    }
}

fn rights(at: &Path) -> Finding {
    let mode = fs::metadata(at).map_or(0, |about| about.permissions().mode() & 0o777);
    if mode & 0o077 == 0 {
        return Finding::new("rights", Verdict::Ok, format!("mode {mode:04o}"));
    }
    Finding::new(
        "rights",
        Verdict::Warning,
        format!("others may look into the store ({mode:04o})"),
    )
    .help(format!("chmod 0700 {}", shown(at)))
}

fn space(dir: &FileDir) -> Finding {
    let check = "space";
    match dir.space() {
        Ok(space) if space.available >= SPACE_LOW => Finding::new(
            check,
            Verdict::Ok,
            format!("{} free", out::size(space.available)),
        ),
        Ok(space) => {
            let text = format!("only {} free in the store", out::size(space.available));
            Finding::new(check, Verdict::Warning, text).help("free space or delete snapshots")
        }
        Err(e) => Finding::new(
            check,
            Verdict::Bad,
            format!("cannot ask for free space: {e}"),
        ),
    }
}
