//! Sources that change under a running daemon by somebody else's hand.
//!
//! A lock keeps out programs that look at locks. Of the others this sees what can be seen: a file that
//! was cut off or has grown, and a path that leads elsewhere. What was written into a source without
//! changing its size cannot be seen while we write to it, too.
//!
//! Promises: nothing is read from behind the end of a source that was cut off, as zeros or as a hole, and
//! nothing is written there; a source of another size than the volume's makes the volume `changed`, in
//! the log as well, so that a restart remembers; a source without a name, which would be gone with the
//! daemon, makes it `suspect`, and no sync that returns after it lost its name succeeds. A source that was only
//! renamed goes on, with a word to the operator.

use std::sync::TryLockError;
use std::sync::atomic::Ordering;

use crate::error::{Error, IoContext, Kind, Result};
use crate::units::escape;
use crate::volume::catalog::Trust;
use crate::volume::engine::Engine;
use crate::volume::facts::VolumeState;
use crate::volume::shared::{Shared, Vol, lock};

impl Vol {
    /// Whether the source is at least as long as the volume. Cheap: asked before every change. Whoever
    /// changes something holds the gate, so that nobody of us makes it shorter meanwhile.
    ///
    /// # Errors
    /// `Failed` if it is not: the volume is `changed` from then on. `Io`.
    pub fn whole(&self) -> Result<()> {
        let size = self.size();
        let cut = || {
            let cut = self.source()?.shorter_than(size);
            cut.context(|| format!("cannot stat {}", self.source_path))
        };
        // A resize sets the volume's size ahead of the source's. The second look is for who holds no gate:
        // a shrink and a growth may both have passed since the first.
        if !cut()? || self.size() < size || !cut()? {
            return Ok(());
        }
        self.note_changed(format!(
            "it was cut off below the volume's {size} bytes by somebody else"
        ));
        self.state().usable(&self.name)
    }

    /// Takes note that somebody else has changed the source.
    fn note_changed(&self, why: String) {
        let mut state = self.state();
        if state.trust == Trust::Changed || state.removed {
            return;
        }
        state.trust = Trust::Changed;
        // A sync that failed stays failed: only the reason grows.
        state.health = match &state.health {
            VolumeState::Suspect(before) => VolumeState::Suspect(format!("{before}; {why}")),
            _ => VolumeState::Changed(why.clone()),
        };
        drop(state);
        tracing::error!(
            "volume {}: the source {} is not ours any more: {why}",
            self.name,
            escape(&self.source_path)
        );
    }

    /// Whether a name leads to the source. Without one its content goes with this process: the volume is
    /// `suspect` from then on. Costs no I/O; a source that is not open has lost nothing here.
    ///
    /// # Errors
    /// `Failed` if none does; `Io`.
    pub fn named(&self) -> Result<()> {
        let Some(source) = &self.source else {
            return Ok(());
        };
        let named = source.has_name();
        if named.context(|| format!("cannot stat {}", self.source_path))? {
            return Ok(());
        }
        let why = format!(
            "the source {} was deleted and its content goes with the daemon; copy live.img away while it is \
             mounted",
            escape(&self.source_path)
        );
        let mut state = self.state();
        let new = matches!(state.health, VolumeState::Active | VolumeState::Unverified);
        if new {
            state.health = VolumeState::Suspect(why.clone());
        }
        drop(state);
        if new {
            tracing::error!("volume {}: {why}", self.name);
        }
        Err(Error::new(Kind::Failed, why))
    }
}

impl Engine {
    /// Looks at every source as somebody may have left it. To be called every second or so, from a
    /// thread that may wait for the source's filesystem. What goes wrong is logged and tried again.
    pub fn look_at_sources(&self) {
        for volume in self.volumes() {
            let vol = &volume.vol;
            if let Err(e) = look(&self.shared, vol) {
                tracing::debug!("volume {}: {}", vol.name, e.chain());
            }
        }
        if let Err(e) = self.remember_changes() {
            tracing::debug!("{}", e.chain());
        }
    }

    /// Writes into the log which sources were found changed, as far as it does not say so yet; durable
    /// when it returns.
    ///
    /// # Errors
    /// `NoSpace`, `Io`.
    pub fn remember_changes(&self) -> Result<()> {
        for volume in self.volumes() {
            self.remember_change(&volume.vol)?;
        }
        Ok(())
    }

    /// Writes into the log that a source was found changed, if it is not there yet.
    fn remember_change(&self, vol: &Vol) -> Result<()> {
        let known = |shared: &Shared| {
            let catalog = lock(&shared.catalog);
            catalog
                .volumes
                .get(&vol.id)
                .is_none_or(|entry| entry.trust == Trust::Changed)
        };
        let due = || vol.state().trust == Trust::Changed && !known(&self.shared);
        if !due() {
            return Ok(());
        }
        let _structure = lock(&self.shared.structure);
        self.shared.check_open()?;
        // An operator may have accepted it meanwhile.
        if !due() {
            return Ok(());
        }
        let now = self.shared.env.clock.now_ns();
        self.change_entry(vol, |entry, state| {
            entry.trust = state.trust;
            state.note_change(now);
        })?;
        tracing::info!("volume {}: the log knows of the changed source", vol.name);
        Ok(())
    }
}

fn look(shared: &Shared, vol: &Vol) -> Result<()> {
    let Some(source) = &vol.source else {
        return Ok(());
    };
    {
        // Held, nobody of us changes the size. Whoever has it exclusively may do so for long, or hang: the
        // other volumes must not wait for that.
        let _gate = match vol.gate.try_read() {
            Ok(gate) => gate,
            Err(TryLockError::Poisoned(gate)) => gate.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        if shared.closed.load(Ordering::Acquire) {
            return Ok(());
        }
        let found = source.identity();
        let found = found.context(|| format!("cannot stat {}", vol.source_path))?;
        let catalog = lock(&shared.catalog);
        let entry = catalog.volumes.get(&vol.id);
        let strange = entry.is_some_and(|entry| !entry.allows(&found));
        drop(catalog);
        if strange {
            vol.note_changed(format!(
                "it has {} bytes and the volume {}",
                found.size,
                vol.size()
            ));
        }
    }
    let elsewhere = shared.env.sources.astray(&vol.source_path, &**source)?;
    if elsewhere.is_some() && vol.named().is_err_and(|e| e.kind() == Kind::Failed) {
        // It says so itself.
        vol.state().astray = None;
        return Ok(());
    }
    let astray = elsewhere.map(|what| {
        format!(
            "{} names {what} by now; move the source back before the next mount",
            escape(&vol.source_path)
        )
    });
    let before = std::mem::replace(&mut vol.state().astray, astray.clone());
    if let (None, Some(text)) = (before, astray) {
        tracing::warn!("volume {}: {text}", vol.name);
    }
    Ok(())
}
