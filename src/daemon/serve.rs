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
//! cleanly (a busy mount is detached, then cut off after [`crate::daemon::mounted::DRAIN`]); the second ends the process at
//! once, which the store survives like any kill.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::daemon::answers::{Ending, Served, handler};
use crate::daemon::control::{self, Control};
use crate::daemon::mounted::{Event, Mounted};
use crate::daemon::protocol::{Choices, Leave};
use crate::daemon::reporter::Reporter;
use crate::daemon::status::{Place, shown};
use crate::daemon::store::{self, Held, Store};
use crate::daemon::ticker::Ticker;
use crate::daemon::watchdog::{Limits, Watchdog};
use crate::daemon::{client, events, jobs, logging, maintenance, places};
use crate::error::{Error, IoContext, Kind, Result};
use crate::fuse::{self, SessionHandle};
use crate::sys::mount;
use crate::sys::process;
use crate::sys::signals;
use crate::sys::watch::Watch;
use crate::tree::{NodeId, Tree};
use crate::units::{Name, escape};
use crate::volume::{Engine, Settings, VolumeOptions};

/// How often the sources are looked at.
const LOOK_AT_SOURCES: Duration = Duration::from_secs(1);
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
    /// What takes too long.
    pub limits: Limits,
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
    process::raise_descriptor_limit();
    signals::as_the_system_does();
    signals::ignore_harmless();
    // Threads inherit it: before the first.
    let flusher = process::set_io_flusher();
    let watch = Arc::new(Watch::default());
    events::tell_on_usr1(&watch)?;
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
        Log::Best => logging::Target::Best(held.dir().fd_path()),
    })?;
    tracing::info!(
        "stillframe {} starts; log: {logs}",
        env!("CARGO_PKG_VERSION")
    );
    if !flusher {
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
    let served = add_volumes(store.engine(), &place, &volumes, options).and_then(|()| {
        serve(
            &store,
            config,
            &place,
            &watch,
            &ending,
            &mut control,
            announce,
        )
    });
    if let Some(control) = &control {
        control.close();
    }
    // A close that hangs is told of by SIGUSR1, and ended by a second signal.
    let closing = watch.begin_job("closing the store".to_owned());
    let closed = closing.run(|| store.close());
    let outcome = served.and(closed);
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
    watch: &Arc<Watch>,
    ending: &Arc<Ending>,
    control: &mut Option<Control>,
    announce: &mut dyn Announce,
) -> Result<()> {
    let mountpoint = place.mountpoint.clone().expect("a daemon has a mountpoint");
    for volume in store.engine().volumes() {
        places::check_source(place, &volume.info().source)?;
    }
    let (tell, told) = mpsc::channel();
    events::catch_signals(tell.clone())?;
    let (dog, live, tree) = observers(store, config, place, watch);
    let fd = mount::mount_fuse(
        &mountpoint,
        &mount::escape_source(&place.store),
        config.allow_other,
    )?;
    let mounted = Mounted::new(mountpoint, tell.clone());
    // From here on the mount is ours to take away, whatever fails.
    let session = Arc::new(fuse::serve_watched(
        fd,
        Arc::clone(&tree),
        fuse::Options::default(),
        Arc::clone(watch),
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
    let maintenance = maintenance::start(store.engine().clone(), Arc::clone(watch))?;
    let sources = watch_sources(store.engine(), watch)?;
    let watchdog = dog.start(cut_off_later(&mounted))?;
    let mut listen = || -> Result<()> {
        if control.is_none() {
            let scene = Served {
                engine: store.engine().clone(),
                place: place.clone(),
                tree: tree.clone(),
                reporter: live.clone(),
                watch: Arc::clone(watch),
            };
            let handler = handler(scene, &mounted, ending);
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
    events::notify(&format!(
        "READY=1\nSTATUS=Serving {at}\nMAINPID={}",
        std::process::id()
    ));
    if !announce.ready() {
        tracing::warn!("nobody waits for this mount any more; stopping");
        let _ = tell.send(Event::Signal);
    }
    let drained = events::until_over(&told, &mounted, store.engine(), &mut listen);
    events::notify("STOPPING=1\nSTATUS=Closing the store");
    if !drained {
        // What hangs may hold the close up, too.
        events::end_soon(watch);
    }
    watchdog.stop();
    sources.stop();
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

/// The tree, and who tells how it and the store are.
fn observers(
    store: &Store,
    config: &Config,
    place: &Place,
    watch: &Arc<Watch>,
) -> (Arc<Watchdog>, Arc<Reporter>, Arc<Tree>) {
    let dog = Watchdog::new(Arc::clone(watch), config.limits);
    let live = Arc::new(Reporter::new(
        store.engine().clone(),
        place.clone(),
        Arc::clone(&dog),
    ));
    let (uid, gid) = (process::effective_uid(), process::effective_gid());
    let tree = Arc::new(Tree::new(store.engine().clone(), uid, gid, live.clone()));
    let names = Arc::downgrade(&tree);
    watch.describe_by(Box::new(move |node| {
        names.upgrade()?.belongs_to(NodeId(node))
    }));
    (dog, live, tree)
}

/// What the watchdog does when it was told to cut off the users of a mount that hangs.
fn cut_off_later(mounted: &Arc<Mounted>) -> impl Fn() + Send + 'static {
    let mounted = Arc::downgrade(mounted);
    move || {
        if let Some(mounted) = mounted.upgrade()
            && let Err(e) = mounted.leave(Leave::Forcibly, &mut |_| ())
        {
            tracing::error!("{}", e.chain());
        }
    }
}

/// Has the kernel look again at images that are not what they were, before it next reads from its cache:
/// snapshots that fail (it then drops their pages, and every read is refused), and volumes that were
/// reverted or resized. In a thread of its own, so that nobody who tells of it waits for the kernel.
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
                match session.forget_attributes(NodeId(ino)) {
                    Ok(()) => tracing::debug!("the kernel looks again at inode {ino}"),
                    Err(e) => tracing::debug!("{}", e.chain()),
                }
            }
        })
        .context(|| "cannot start a thread")?;
    Ok(())
}

/// Looks after the sources, in a thread that may wait for their filesystems.
fn watch_sources(engine: &Arc<Engine>, watch: &Arc<Watch>) -> Result<Ticker> {
    let (engine, watch) = (Arc::downgrade(engine), Arc::clone(watch));
    Ticker::start("sources", LOOK_AT_SOURCES, move || {
        if let Some(engine) = engine.upgrade() {
            let job = watch.begin_job("a look at the sources".to_owned());
            job.run(|| engine.look_at_sources());
        }
    })
}
