//! Where the daemon's log goes: a file that was named, the journal, or a file in the store.
//!
//! Promises: a log file is for the owner alone and is only appended to; the file in the store is
//! set aside once at start when it has grown past [`LOG_MAX`], so that it cannot fill the store's
//! filesystem over the years; a file that hangs holds nobody up ([`Lines`]). `STILLFRAME_LOG` chooses what is logged (`debug`, `stillframe=trace`).

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::daemon::lines::Lines;
use crate::daemon::status::shown;
use crate::daemon::store::LOG;
use crate::error::{Error, IoContext, Kind, Result};

/// Bytes after which the log file in the store is set aside at the next start.
pub const LOG_MAX: u64 = 8 << 20;

/// The journal's socket; without it there is no journal.
const JOURNAL: &str = "/run/systemd/journal/socket";

/// Where to log.
#[derive(Debug, Clone)]
pub enum Target {
    /// The terminal, for `--foreground`.
    Stderr,
    /// A file that was named.
    File(PathBuf),
    /// The journal, else a file in this store.
    Best(PathBuf),
}

/// Starts logging for the rest of the process's life and says where to look.
///
/// # Errors
/// By the system's error if the file cannot be opened; `Failed` if logging was started before.
pub fn start(target: &Target) -> Result<String> {
    let registry = tracing_subscriber::registry().with(filter());
    let lines = tracing_subscriber::fmt::layer().with_ansi(false);
    let (started, shown) = match target {
        Target::Stderr => (
            registry
                .with(lines.with_writer(patient(std::io::stderr())?))
                .try_init(),
            "stderr".to_owned(),
        ),
        Target::File(path) => {
            let file = open(path)?;
            (
                registry.with(lines.with_writer(patient(file)?)).try_init(),
                shown(path),
            )
        }
        Target::Best(store) => match journal() {
            Some(journal) => (registry.with(journal).try_init(), "the journal".to_owned()),
            None => {
                let path = store.join(LOG);
                set_aside(&path)?;
                let file = open(&path)?;
                (
                    registry.with(lines.with_writer(patient(file)?)).try_init(),
                    shown(&path),
                )
            }
        },
    };
    started.map_err(|e| Error::with_source(Kind::Failed, "cannot start logging", e))?;
    Ok(shown)
}

/// A log on a filesystem that hangs, or a terminal that nobody reads, must not hang the daemon.
fn patient(file: impl Write + Send + 'static) -> Result<Arc<Lines>> {
    Lines::start(file).context(|| "cannot start a thread")
}

fn filter() -> EnvFilter {
    // Both crates tell at `info` what only their developers want to know.
    let plain = "info,fuser=warn,sled=warn";
    EnvFilter::try_from_env("STILLFRAME_LOG").unwrap_or_else(|_| EnvFilter::new(plain))
}

fn journal() -> Option<tracing_journald::Layer> {
    if !Path::new(JOURNAL).exists() {
        return None;
    }
    tracing_journald::layer().ok()
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .context(|| format!("cannot open log file {}", shown(path)))
}

fn set_aside(path: &Path) -> Result<()> {
    match fs::metadata(path) {
        Ok(about) if about.len() > LOG_MAX => fs::rename(path, path.with_extension("log.old"))
            .context(|| format!("cannot set aside log file {}", shown(path))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_file_that_grew_large_is_set_aside_once() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join(LOG);
        set_aside(&path).unwrap();
        open(&path).unwrap().set_len(LOG_MAX).unwrap();
        set_aside(&path).unwrap();
        assert!(path.exists());
        open(&path).unwrap().set_len(LOG_MAX + 1).unwrap();
        set_aside(&path).unwrap();
        assert!(!path.exists() && top.path().join("daemon.log.old").exists());
    }
}
