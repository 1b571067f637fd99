//! Extended attributes: facts about snapshots, clones and the live image, for programs.
//!
//! All are text under `user.stillframe.`; one that has nothing to say is absent. They are read-only,
//! but for one that is never read: setting [`REVERT`] of `live.img` reverts the volume.

use crate::error::Kind;
use crate::tree::Tree;
use crate::tree::node::Node;
use crate::tree::types::{NodeId, Result, TreeError};
use crate::units::Name;
use crate::volume::{CloneInfo, SnapshotInfo, SnapshotState, VolumeInfo, VolumeState};

const PREFIX: &str = "user.stillframe.";

/// Set to a snapshot's name on `live.img`, it makes the volume what that snapshot is.
const REVERT: &str = "user.stillframe.revert";

/// A short name and its value.
type Fact = (&'static str, String);

impl Tree {
    /// The value of an attribute.
    ///
    /// # Errors
    /// `NoAttribute`; `NotFound` for a node that is gone.
    pub fn getxattr(&self, node: NodeId, name: &str) -> Result<Vec<u8>> {
        // The kernel asks for security.capability before writes: answer without looking up facts.
        let short = name.strip_prefix(PREFIX).ok_or(TreeError::NoAttribute)?;
        let facts = self.facts(node)?;
        let fact = facts.into_iter().find(|(key, _)| *key == short);
        fact.map(|(_, value)| value.into_bytes())
            .ok_or(TreeError::NoAttribute)
    }

    /// The names of a node's attributes, each ended by a zero byte.
    ///
    /// # Errors
    /// `NotFound` for a node that is gone.
    pub fn listxattr(&self, node: NodeId) -> Result<Vec<u8>> {
        let mut names = Vec::new();
        for (key, _) in self.facts(node)? {
            names.extend_from_slice(PREFIX.as_bytes());
            names.extend_from_slice(key.as_bytes());
            names.push(0);
        }
        Ok(names)
    }

    /// Sets an attribute: only the revert attribute of `live.img` does something. It returns when that is done
    /// and durable.
    ///
    /// # Errors
    /// Those of [`Tree::revert`]; `Invalid` for a value that is no snapshot's name; else as
    /// [`Tree::refuse_xattr`].
    pub fn setxattr(&self, node: NodeId, name: &str, value: &[u8]) -> Result<()> {
        if name != REVERT {
            return self.refuse_xattr(name);
        }
        let Node::Live(volume) = self.resolve(node)? else {
            return self.refuse_xattr(name);
        };
        let text = String::from_utf8_lossy(value);
        let to = Name::new(&text)?;
        self.revert(&volume.info.name, &to, false, &mut |_, _| {})?;
        Ok(())
    }

    /// Refuses to set or remove an attribute.
    ///
    /// # Errors
    /// Always: `Permission` for ours, `Unsupported` for others (cp and rsync then go on).
    pub fn refuse_xattr(&self, name: &str) -> Result<()> {
        Err(if name.starts_with(PREFIX) {
            TreeError::new(
                Kind::Permission,
                format!("{PREFIX}* attributes are read-only"),
            )
        } else {
            TreeError::new(
                Kind::Unsupported,
                "extended attributes cannot be stored here",
            )
        })
    }

    fn facts(&self, node: NodeId) -> Result<Vec<Fact>> {
        Ok(match self.resolve(node)? {
            Node::Snapshot { info, .. } => snapshot_facts(&info),
            Node::Live(v) => live_facts(&v.info),
            Node::Clone { info, .. } => clone_facts(&info),
            Node::Root
            | Node::Control
            | Node::Status(_)
            | Node::VolumeDirectory(_)
            | Node::Snapshots(_)
            | Node::Clones(_)
            | Node::Diffs(_)
            | Node::Diff(_) => Vec::new(),
        })
    }
}

fn snapshot_facts(info: &SnapshotInfo) -> Vec<Fact> {
    let mut facts = vec![
        ("uuid", info.uuid.to_string()),
        ("epoch", info.epoch.0.to_string()),
        ("unique", info.unique.to_string()),
        ("held", u8::from(info.held).to_string()),
        ("state", state_text(&info.state)),
    ];
    facts.extend(info.parent.map(|uuid| ("parent", uuid.to_string())));
    facts.extend(info.group.map(|uuid| ("group", uuid.to_string())));
    facts
}

fn state_text(state: &SnapshotState) -> String {
    match state {
        SnapshotState::Active => "active".to_owned(),
        SnapshotState::Failed(why) => format!("failed: {why}"),
    }
}

fn clone_facts(info: &CloneInfo) -> Vec<Fact> {
    let mut facts = vec![
        ("uuid", info.uuid.to_string()),
        ("layers", info.layers.to_string()),
        ("own", info.own.to_string()),
        ("state", state_text(&info.state)),
    ];
    facts.extend(info.base.map(|uuid| ("base", uuid.to_string())));
    facts
}

fn live_facts(info: &VolumeInfo) -> Vec<Fact> {
    let state = match &info.state {
        VolumeState::Active => "active".to_owned(),
        VolumeState::Unverified => "unverified".to_owned(),
        VolumeState::Changed(why) => format!("changed: {why}"),
        VolumeState::Suspect(why) => format!("suspect: {why}"),
        VolumeState::Missing(why) => format!("missing: {why}"),
        VolumeState::Unfinished(why) => format!("unfinished: {why}"),
    };
    vec![
        ("uuid", info.uuid.to_string()),
        ("state", state),
        ("source", info.source.clone()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::fixture::world;

    #[test]
    fn each_state_has_its_word() {
        let w = world();
        let vm = Name::new("vm").unwrap();
        let mut info = w.engine.volume(&vm).unwrap().info();
        let why = || "of this".to_owned();
        for (state, text) in [
            (VolumeState::Active, "active"),
            (VolumeState::Unverified, "unverified"),
            (VolumeState::Changed(why()), "changed: of this"),
            (VolumeState::Suspect(why()), "suspect: of this"),
            (VolumeState::Missing(why()), "missing: of this"),
            (VolumeState::Unfinished(why()), "unfinished: of this"),
        ] {
            info.state = state;
            let facts = live_facts(&info);
            assert_eq!(facts[1], ("state", text.to_owned()));
        }
    }
}
