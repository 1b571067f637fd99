//! `stillframe umount`: asks the daemon to end, and returns when its process has ended.
//!
//! The mount's source names the store, the store holds the control socket. A mount of ours whose
//! daemon is gone is cleaned; a mount of anybody else is not touched.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;

use super::{args, out};
use crate::daemon::client::{self, Connection};
use crate::daemon::places::{self, Probe, Standing};
use crate::daemon::protocol::{Answer, Leave, Report, Request};
use crate::daemon::status::shown;
use crate::daemon::watchdog;
use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::file::FileDir;
use crate::sys::lock;
use crate::sys::mount::{self, Unmount};
use crate::units::escape;

/// How long a live mount may be without a control socket: its daemon is starting.
const STARTING: Duration = Duration::from_secs(2);
/// How long a daemon's process may take to end once it has said that everything is closed.
const ENDING: Duration = Duration::from_secs(30);
/// How long a daemon may take to obey `--force` before it is done without it.
const FORCE: Duration = Duration::from_secs(10);

/// How long a daemon may take to say how it is: it answers within two seconds whatever hangs below it.
const STATUS: Duration = Duration::from_secs(4);
/// Seconds to wait for a clean stop when nobody says how many.
const WAIT_S: u32 = 60;

/// Arguments.
#[derive(Debug, Clone, Args)]
pub struct UmountArgs {
    /// Where it is mounted
    pub mountpoint: PathBuf,
    /// Abort what is in flight; also ends a mount whose daemon hangs
    #[arg(long, conflicts_with = "lazy")]
    pub force: bool,
    /// Detach now; the daemon ends when the last user is gone
    #[arg(long)]
    pub lazy: bool,
    /// How many seconds to wait for the daemon to have closed the store
    #[arg(long, value_name = "SECONDS", default_value_t = WAIT_S)]
    pub wait: u32,
}

/// Runs it.
///
/// # Errors
/// `NotFound` for no such path or a mount that is not ours; `Locked` where no daemon serves;
/// `Busy` naming who uses the mount.
pub fn run(args: &UmountArgs) -> Result<()> {
    let how = match (args.force, args.lazy) {
        (true, _) => Leave::Forcibly,
        (_, true) => Leave::Lazily,
        _ => Leave::Gently,
    };
    let wait = Duration::from_secs(args.wait.max(1).into());
    end_within(&args::absolute(&args.mountpoint)?, how, wait)
}

/// Ends the mount at a path.
///
/// # Errors
/// As [`run`].
pub fn end(mountpoint: &Path, how: Leave) -> Result<()> {
    end_within(mountpoint, how, Duration::from_secs(WAIT_S.into()))
}

fn end_within(mountpoint: &Path, how: Leave, wait: Duration) -> Result<()> {
    let path = places::resolve(mountpoint)?;
    let at = shown(&path);
    let (store, device) = match places::standing(&path)? {
        Standing::Ours { store, device } => (store, device),
        Standing::Nothing => {
            return Err(Error::new(
                Kind::Locked,
                format!("nothing is mounted at {at}: no daemon serves it; see 'stillframe doctor'"),
            ));
        }
        Standing::Foreign(what) => {
            return Err(Error::new(
                Kind::NotFound,
                format!(
                    "{at} is no Stillframe mount but {}; use umount(8)",
                    escape(&what)
                ),
            ));
        }
    };
    // Both may be waited for in vain, so at the same time. The look is over before anybody unmounts: it
    // would be in the way.
    let look = path.clone();
    let looks = thread::Builder::new().spawn(move || places::probe(&look));
    let daemon = daemon_of(&store, &path);
    let seen = looks.ok().and_then(|looks| looks.join().ok());
    match daemon? {
        Some((daemon, report)) => ask(daemon, &report, (&store, &path, device), how, wait),
        None => {
            let seen = match seen {
                Some(Probe::Silent) => Probe::Silent,
                // What answered then may be dead by now.
                _ => places::probe(&path),
            };
            without_daemon(&store, &path, device, (seen, how))
        }
    }
}

/// The daemon that serves this very mount. The store's daemon may serve another one by now.
fn daemon_of(store: &Path, path: &Path) -> Result<Option<(Connection, Report)>> {
    let end = Instant::now() + STARTING;
    loop {
        match report_of(store) {
            Ok(Some(report)) => {
                let this = report.mountpoint.as_deref() == Some(shown(path).as_str());
                // A connection carries one job.
                let again = client::connect(store)?;
                return Ok(again.filter(|_| this).map(|daemon| (daemon, report)));
            }
            // Nobody, or somebody who went away in the middle: starting, or just killed.
            Ok(None) => {}
            Err(e) if e.kind() == Kind::Io => {}
            Err(e) => return Err(e),
        }
        if Instant::now() >= end || places::probe(path) == Probe::Dead {
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn report_of(store: &Path) -> Result<Option<Report>> {
    let Some(mut daemon) = client::connect(store)? else {
        return Ok(None);
    };
    daemon.limit(STATUS);
    match daemon.call(&Request::Status {}, &mut |_| ())? {
        Answer::Status(report) => Ok(Some(*report)),
        other => Err(super::work::unexpected(&other)),
    }
}

fn ask(
    mut daemon: Connection,
    report: &Report,
    (store, path, device): (&Path, &Path, (u32, u32)),
    how: Leave,
    wait: Duration,
) -> Result<()> {
    let process = report.pid.and_then(client::mark);
    daemon.limit(if how == Leave::Forcibly { FORCE } else { wait });
    let answer = match daemon.call(&Request::Unmount { how }, &mut |text| out::progress(text)) {
        Err(e) if how == Leave::Forcibly && e.kind() == Kind::Io => {
            out::remark(&format!(
                "the daemon does not obey: {}; cutting its mount off",
                e.chain()
            ));
            return cut_off(store, path, device);
        }
        // Silent for too long, or gone: in the second case there is nothing to wait for.
        Err(e) if e.kind() == Kind::Io && process.is_some_and(client::still_runs) => {
            return Err(not_yet(store, path, report.pid));
        }
        other => other?,
    };
    if matches!(answer, Answer::Detached) {
        return out::line(&format!(
            "detached {}; it is still in use, the daemon ends with its last user",
            shown(path)
        ));
    }
    if process.is_some_and(|process| !client::wait_for_end(process, ENDING)) {
        return Err(Error::new(
            Kind::Busy,
            "the store is closed, but its daemon has not ended yet",
        ));
    }
    Ok(())
}

/// What to say when the daemon is not done in time: it goes on.
fn not_yet(store: &Path, path: &Path, pid: Option<u32>) -> Error {
    let stuck = report_of(store).ok().flatten().map(|r| r.stuck);
    let why = match stuck.as_deref() {
        Some([first, ..]) => format!(" ({})", watchdog::sentence(first)),
        _ => String::new(),
    };
    let pid = pid.map_or(String::new(), |pid| format!(" (pid {pid})"));
    let at = shown(path);
    let done = match places::standing(path) {
        Ok(Standing::Ours { .. }) => format!("{at} is not unmounted yet"),
        _ => format!("{at} is unmounted, but the store is not closed yet"),
    };
    Error::new(
        Kind::Busy,
        format!("{done}{why}; its daemon{pid} goes on, a SIGTERM more ends it at once"),
    )
}

fn without_daemon(
    store: &Path,
    path: &Path,
    device: (u32, u32),
    (seen, how): (Probe, Leave),
) -> Result<()> {
    let (at, of) = (shown(path), shown(store));
    match (seen, how) {
        (Probe::Dead, _) => {
            places::clean(path)?;
            out::line(&format!(
                "cleaned the stale mount of store {of} at {at}; its daemon was gone"
            ))
        }
        (_, Leave::Forcibly) => cut_off(store, path, device),
        (_, Leave::Lazily) => mount::unmount(path, Unmount::Lazy),
        (_, Leave::Gently) => Err(Error::new(
            Kind::Locked,
            format!("the daemon of {at} does not answer; --force ends the mount without it"),
        )),
    }
}

fn cut_off(store: &Path, path: &Path, device: (u32, u32)) -> Result<()> {
    // Detached first: afterwards nobody new comes in while those inside are cut off.
    // A daemon that hangs may have got as far as that itself.
    if matches!(places::standing(path)?, Standing::Ours { .. }) {
        mount::unmount(path, Unmount::Lazy)?;
    }
    let cut = mount::abort_connection(device.1).context(|| {
        format!(
            "{} is detached, but its users cannot be cut off",
            shown(path)
        )
    })?;
    let holder = FileDir::open(store)
        .ok()
        .and_then(|dir| lock::store_holder(&dir).ok()?);
    match holder {
        Some(pid) => out::remark(&format!(
            "its daemon (pid {pid}) still runs; 'kill {pid}' ends it"
        )),
        None if !cut => out::remark("its connection had gone already"),
        None => {}
    }
    Ok(())
}
