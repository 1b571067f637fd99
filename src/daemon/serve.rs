//! The life of a daemon: checks, store, mount, events, clean stop.
//!
//! ```text
//! check mountpoint -> lock store -> open engine -> add volumes -> mount -> serve -> ready
//!   events: unmount asked | signal | session ended by somebody else's unmount | watchdog
//! unmount -> session ends -> maintenance ends -> socket gone -> engine closed -> lock let go -> answer
//! ```
//!
//! Promises: nothing is served before recovery is complete; whatever ends the mount, the engine is
//! closed cleanly and whoever asked for it gets the outcome; the control socket is removed while
//! the lock is still held, so that a successor's socket is never touched. The first signal stops
//! cleanly (a busy mount is detached, then cut off after [`DRAIN`]); the second ends the process at
//! once, which the store survives like any kill.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::daemon::control::{self, Control};
use crate::daemon::mounted::{DRAIN, Event, Mounted};
use crate::daemon::protocol::{Answer, Choices, Leave, Request};
use crate::daemon::status::{self, Place, shown};
use crate::daemon::store::{self, Held, Store};
use crate::daemon::{client, jobs, logging, maintenance, places};
use crate::error::{Error, IoContext, Kind, Result};
use crate::fuse::{self, SessionHandle};
use crate::sys::clock::{Clock, SystemClock};
use crate::sys::disk::{Dir, Space};
use crate::sys::mount;
use crate::sys::process;
use crate::tree::{NodeId, StatusFile, StatusSource, Tree};
use crate::units::{Name, escape};
use crate::volume::{Engine, Settings, VolumeOptions};

/// How long the session may take to end after its connection was cut.
const ABORT: Duration = Duration::from_secs(2);
/// How long a lazy unmount waits for the mount to become unused before it answers.
const LAZY: Duration = Duration::from_secs(1);
/// How often the control socket is tried again where the disk had no room for it.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);
/// How long a start waits for a store that another command has locked for a moment.
const LOCK_WAIT: Duration = Duration::from_secs(2);

/// What to serve, and how. Paths are absolute.
#[derive(Debug, Clone)]
pub struct Config {
    /// The store.
    pub store: PathBuf,
    /// Where to mount.
    pub mountpoint: PathBuf,
    /// Volumes that are to be there, as (name, source).
    pub volumes: Vec<(String, String)>,
    /// Policy for volumes that are new.
    pub choices: Choices,
    /// Let other users in.
    pub allow_other: bool,
    /// Most bytes that the log and the clones may use.
    pub limit: Option<u64>,
    /// Bytes of a log segment, if the store is made now.
    pub segment_size: Option<u64>,
    /// Where to log.
    pub log: Log,
}

/// Where a daemon logs.
#[derive(Debug, Clone)]
pub enum Log {
    /// The terminal.
    Stderr,
    /// A file that was named.
    File(PathBuf),
    /// The journal, else the store.
    Best,
}

/// Whoever waits for the daemon to serve.
pub trait Announce {
    /// Something worth knowing happened on the way.
    fn note(&mut self, text: &str);
    /// The mount serves. `false` when nobody waits any more: the daemon then stops.
    fn ready(&mut self) -> bool;
}

/// Serves until the mount ends.
///
/// # Errors
/// Whatever keeps it from serving or from stopping cleanly, see DESIGN section 3.
pub fn run(config: &Config, announce: &mut dyn Announce) -> Result<()> {
    process::private_umask();
    process::keep_few_heaps();
    let mountpoint = places::prepare(&config.mountpoint, &mut |text| announce.note(text))?;
    places::keep_apart(&config.store, &mountpoint)?;
    let volumes = named_volumes(config)?;
    let options = jobs::options(config.choices)?;
    let sources: Vec<&str> = volumes.iter().map(|(_, source)| *source).collect();
    places::before_a_store_is_made(&config.store, Some(&mountpoint), &sources)?;
    let held = hold(config)?;
    let logs = logging::start(&match &config.log {
        Log::Stderr => logging::Target::Stderr,
        Log::File(path) => logging::Target::File(path.clone()),
        Log::Best => logging::Target::Best(held.dir().path().to_owned()),
    })?;
    tracing::info!(
        "stillframe {} starts; log: {logs}",
        env!("CARGO_PKG_VERSION")
    );
    // Threads inherit it: before the first.
    if !process::set_io_flusher() {
        tracing::info!(
            "no right to be an I/O flusher (CAP_SYS_RESOURCE): when memory is short, a loop device on \
             this mount may be slow"
        );
    }
    let place = Place {
        store: held.dir().path().to_owned(),
        mountpoint: Some(mountpoint),
    };
    let fresh = held.fresh();
    if let (false, Some(_)) = (fresh, config.segment_size) {
        announce.note("the store exists: its segments keep their size");
    }
    let store = held.open_with(settings(config))?;
    if fresh {
        announce.note(&format!("made a new store at {}", shown(&place.store)));
    }
    let ending = Arc::new(Ending::default());
    let mut control = None;
    let served = add_volumes(store.engine(), &place, &volumes, options)
        .and_then(|()| serve(&store, config, &place, &ending, &mut control, announce));
    if let Some(control) = &control {
        control.close();
    }
    let outcome = served.and(store.close());
    match &outcome {
        Ok(()) => tracing::info!("stopped cleanly"),
        Err(e) => tracing::error!("stopped: {}", e.chain()),
    }
    ending.finish(&outcome);
    if let Some(control) = control
        && !control.drain(Duration::from_secs(2))
    {
        tracing::warn!("a control client did not take its answer");
    }
    outcome
}

fn settings(config: &Config) -> Settings {
    let usual = Settings::default();
    Settings {
        segment_bytes: config.segment_size.unwrap_or(usual.segment_bytes),
        limit_bytes: config.limit,
        ..usual
    }
}

fn named_volumes(config: &Config) -> Result<Vec<(Name, &str)>> {
    config
        .volumes
        .iter()
        .map(|(name, source)| Ok((Name::new(name)?, source.as_str())))
        .collect()
}

/// Locks the store; waits a moment for a command that has it, not for a daemon.
fn hold(config: &Config) -> Result<Held> {
    let end = Instant::now() + LOCK_WAIT;
    loop {
        match store::hold(&config.store, !config.volumes.is_empty()) {
            Err(e) if e.kind() == Kind::Locked && Instant::now() < end => {
                if client::connect(&config.store)?.is_some() {
                    return Err(e);
                }
                thread::sleep(Duration::from_millis(50));
            }
            other => return other,
        }
    }
}

/// Adds what is not there yet; the same name with the same source is there already.
fn add_volumes(
    engine: &Arc<Engine>,
    place: &Place,
    volumes: &[(Name, &str)],
    options: VolumeOptions,
) -> Result<()> {
    for (name, text) in volumes {
        let source = places::source(place, text);
        match engine.volume(name) {
            // A source that is gone cannot be resolved; the volume then says that it is missing.
            Ok(there) if there.info().source == source.as_deref().unwrap_or(text) => {}
            Ok(there) => {
                let (has, wanted) = (escape(&there.info().source), escape(&source?));
                return Err(Error::new(
                    Kind::Exists,
                    format!("volume {name} has the source {has}; choose another name for {wanted}"),
                ));
            }
            Err(e) if e.kind() == Kind::NotFound => {
                let source = source?;
                engine.add_volume(name, &source, options)?;
                tracing::info!("added volume {name} from {}", escape(&source));
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Mounts and serves until the session has ended.
fn serve(
    store: &Store,
    config: &Config,
    place: &Place,
    ending: &Arc<Ending>,
    control: &mut Option<Control>,
    announce: &mut dyn Announce,
) -> Result<()> {
    let mountpoint = place.mountpoint.clone().expect("a daemon has a mountpoint");
    for volume in store.engine().volumes() {
        places::check_source(place, &volume.info().source)?;
    }
    let (tell, events) = mpsc::channel();
    catch_signals(tell.clone())?;
    let live = Arc::new(Live {
        engine: store.engine().clone(),
        dir: store.dir().clone(),
        place: place.clone(),
    });
    let (uid, gid) = (process::effective_uid(), process::effective_gid());
    let tree = Arc::new(Tree::new(store.engine().clone(), uid, gid, live));
    let fd = mount::mount_fuse(
        &mountpoint,
        &mount::escape_source(&place.store),
        config.allow_other,
    )?;
    let mounted = Mounted::new(mountpoint, tell.clone());
    // From here on the mount is ours to take away, whatever fails.
    let session = Arc::new(fuse::serve(
        fd,
        Arc::clone(&tree),
        fuse::Options::default(),
    )?);
    forget_stale(store.engine(), &tree, Arc::clone(&session))?;
    mounted.tune();
    let waiting = tell.clone();
    let ended = thread::Builder::new()
        .name("session-end".into())
        .spawn(move || {
            let outcome = session.wait();
            // The event loop may have gone on to its end already.
            let _ = waiting.send(Event::SessionEnded);
            outcome
        })
        .context(|| "cannot start a thread")?;
    let maintenance = maintenance::start(store.engine().clone())?;
    let mut listen = || -> Result<()> {
        if control.is_none() {
            let handler = handler(store, place, tree.clone(), &mounted, ending);
            *control = Some(control::start(store.dir(), handler)?);
        }
        Ok(())
    };
    match listen() {
        // Snapshots are served, taken and deleted without it; it comes when there is space.
        Err(e) if e.kind() == Kind::NoSpace => {
            tracing::error!("no control socket yet: {}", e.chain());
        }
        done => done?,
    }
    let at = shown(mounted.mountpoint());
    tracing::info!("serving store {} at {at}", shown(&place.store));
    notify(&format!(
        "READY=1\nSTATUS=Serving {at}\nMAINPID={}",
        std::process::id()
    ));
    if !announce.ready() {
        tracing::warn!("nobody waits for this mount any more; stopping");
        let _ = tell.send(Event::Signal);
    }
    let drained = event_loop(&events, &mounted, store.engine(), &mut listen);
    notify("STOPPING=1\nSTATUS=Closing the store");
    maintenance.stop();
    mounted.gone();
    if !drained {
        // Closing the engine refuses what still comes; the process's end hangs up for good.
        tracing::warn!("the mount's users do not let go; closing the store under them");
        return Ok(());
    }
    match ended.join() {
        Ok(outcome) => outcome,
        Err(_) => Err(Error::new(Kind::Failed, "the session's thread panicked")),
    }
}

/// Has the kernel forget what it knows of images that are not what they were: cached pages of
/// snapshots that fail (from then on every read is refused), and pages and attributes of a volume
/// that was reverted or resized. In a thread of its own, because the kernel may call back before it
/// answers.
fn forget_stale(engine: &Engine, tree: &Tree, session: Arc<SessionHandle>) -> Result<()> {
    let (tell, stale) = mpsc::channel();
    let changed = tell.clone();
    engine.watch_failures(move |ino| {
        // Nobody listens any more once the session has ended: then nothing is cached either.
        let _ = tell.send(ino);
    });
    tree.watch_changes(move |node| {
        let _ = changed.send(node.0);
    });
    thread::Builder::new()
        .name("forget-stale".into())
        .spawn(move || {
            for ino in stale {
                if let Err(e) = session.invalidate_inode(NodeId(ino)) {
                    tracing::debug!("{}", e.chain());
                }
            }
        })
        .context(|| "cannot start a thread")?;
    Ok(())
}

/// Takes events until the session has ended, or cannot be ended; returns whether it has.
fn event_loop(
    events: &Receiver<Event>,
    mounted: &Mounted,
    engine: &Engine,
    listen: &mut dyn FnMut() -> Result<()>,
) -> bool {
    let watchdog = watchdog_interval();
    let mut listens = false;
    let mut cut_off: Option<Instant> = None;
    let mut aborted = false;
    let mut next_beat = Instant::now();
    loop {
        let now = Instant::now();
        if let Some(interval) = watchdog
            && now >= next_beat
        {
            // An engine that does not answer this does not serve: let systemd notice.
            let _ = engine.log_bytes();
            notify("WATCHDOG=1");
            next_beat = now + interval;
        }
        listens = listens || listen().is_ok();
        let beat = watchdog.map(|_| next_beat);
        let again = (!listens).then(|| now + LISTEN_AGAIN);
        let wake = [beat, cut_off, again].into_iter().flatten().min();
        let pause = wake.map_or(Duration::from_secs(3600), |at| {
            at.saturating_duration_since(now)
        });
        match events.recv_timeout(pause) {
            Ok(Event::SessionEnded) | Err(RecvTimeoutError::Disconnected) => return true,
            Ok(Event::Unmounted { grace: None }) => {}
            Ok(Event::Unmounted { grace: Some(grace) }) => cut_off = Some(Instant::now() + grace),
            Ok(Event::Signal) => {
                tracing::info!("told to stop");
                notify("STOPPING=1\nSTATUS=Unmounting");
                mounted.detach_for_stop();
                cut_off = Some(Instant::now() + DRAIN);
            }
            Err(RecvTimeoutError::Timeout) => {
                if cut_off.is_some_and(|at| Instant::now() >= at) {
                    tracing::warn!("the mount is still in use; cutting its users off");
                    if aborted || !mounted.abort() {
                        return false;
                    }
                    aborted = true;
                    cut_off = Some(Instant::now() + ABORT);
                }
            }
        }
    }
}

/// Half of what systemd allows between two signs of life; `None` when it watches nobody or not us.
fn watchdog_interval() -> Option<Duration> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    if number("WATCHDOG_PID").is_some_and(|pid| pid != u64::from(std::process::id())) {
        return None;
    }
    number("WATCHDOG_USEC")
        .filter(|&us| us > 0)
        .map(|us| Duration::from_micros(us / 2))
}

fn notify(text: &str) {
    if let Err(e) = process::notify_systemd(text) {
        tracing::debug!("cannot tell systemd: {}", e.chain());
    }
}

fn catch_signals(tell: Sender<Event>) -> Result<()> {
    let count = AtomicUsize::new(0);
    let tell = Mutex::new(tell);
    ctrlc::set_handler(move || {
        if count.fetch_add(1, Ordering::SeqCst) > 0 {
            tracing::warn!("told to stop a second time: ending at once");
            std::process::exit(130);
        }
        // Nobody listens once the mount has ended: the stop is on its way already.
        let _ = tell
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .send(Event::Signal);
    })
    .map_err(|e| Error::with_source(Kind::Io, "cannot catch signals", e))
}

/// Answers the control socket.
fn handler(
    store: &Store,
    place: &Place,
    tree: Arc<Tree>,
    mounted: &Arc<Mounted>,
    ending: &Arc<Ending>,
) -> Box<control::Handler> {
    let (engine, place) = (store.engine().clone(), place.clone());
    // Weak: a client that still listens must not keep a mount of ours from being taken away.
    let (mounted, ending) = (Arc::downgrade(mounted), ending.clone());
    Box::new(move |request, progress| match request {
        Request::Unmount { how } => {
            if let Some(mounted) = mounted.upgrade() {
                mounted.leave(how, progress)?;
            }
            if how == Leave::Lazily && !ending.wait(LAZY) {
                return Ok(Answer::Detached);
            }
            ending.outcome()
        }
        other => {
            let scene = jobs::Scene {
                engine: &engine,
                place: &place,
                tree: Some(&tree),
            };
            jobs::run(scene, &other, progress)
        }
    })
}

/// How the daemon ended, for the clients that wait for it.
#[derive(Default)]
struct Ending {
    outcome: Mutex<Option<std::result::Result<(), (Kind, String)>>>,
    changed: Condvar,
}

impl Ending {
    fn finish(&self, outcome: &Result<()>) {
        let told = outcome
            .as_ref()
            .map(|&()| ())
            .map_err(|e| (e.kind(), e.chain()));
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(told);
        self.changed.notify_all();
    }

    /// Waits for the end; `false` if it has not come within the limit.
    fn wait(&self, limit: Duration) -> bool {
        let outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        let (outcome, _) = self
            .changed
            .wait_timeout_while(outcome, limit, |outcome| outcome.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        outcome.is_some()
    }

    fn outcome(&self) -> Result<Answer> {
        let outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = self
            .changed
            .wait_while(outcome, |outcome| outcome.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        match &*outcome {
            Some(Err((kind, message))) => Err(Error::new(*kind, message.clone())),
            Some(Ok(())) | None => Ok(Answer::Done),
        }
    }
}

/// The control directory's files, and what the tree must know of the machine.
struct Live {
    engine: Arc<Engine>,
    dir: Arc<crate::sys::file::FileDir>,
    place: Place,
}

impl StatusSource for Live {
    fn render(&self, file: StatusFile) -> Result<Vec<u8>> {
        let report = status::report(&self.engine, &self.place);
        match file {
            StatusFile::Json => {
                let mut text = serde_json::to_vec_pretty(&report)
                    .map_err(|e| Error::with_source(Kind::Failed, "cannot render the status", e))?;
                text.push(b'\n');
                Ok(text)
            }
            StatusFile::Metrics => Ok(status::metrics(&report).into_bytes()),
        }
    }

    fn space(&self) -> Result<Space> {
        self.dir
            .space()
            .context(|| "cannot ask for the store's space")
    }

    fn now_ns(&self) -> i64 {
        SystemClock.now_ns()
    }
}
