//! The program under test as its users have it: the daemon, its mount, plain files, the command line.
//!
//! [`Daemon`] is a [`Machine`] for a history; [`same_through_the_mount`] starts the daemon on a crash
//! state as a user would and reads every view through the mount.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use crate::machine::{Machine, Restart, VOLUMES, volume_name};
use crate::model::{Patch, Which, World};
use crate::rig::{Rig, eventually, good, touch};

/// Its default settings; files that are written to stay open, since closing one makes it durable.
pub struct Daemon {
    rig: Rig,
    store: PathBuf,
    open: Mutex<BTreeMap<(usize, Which), Arc<File>>>,
}

fn snapshot_path(rig: &Rig, v: usize, name: &str) -> PathBuf {
    rig.snapshot(&volume_name(v), name)
}

fn image_path(rig: &Rig, v: usize, which: &Which) -> PathBuf {
    let volume = volume_name(v);
    match which {
        None => rig.live(&volume),
        Some(clone) => rig.mnt().join(volume).join(format!("clones/{clone}.img")),
    }
}

impl Daemon {
    /// Makes a store at a directory, and the volumes with new sources in another.
    pub fn new(store: &Path, sources: &Path) -> Daemon {
        let mut rig = Rig::with_store(store.to_owned());
        for (v, &(size, grain)) in VOLUMES.iter().enumerate() {
            let (name, grain) = (volume_name(v), grain.to_string());
            let path = sources.join(format!("{name}.img"));
            let source = File::create_new(&path).unwrap();
            source.set_len(size).unwrap();
            source.sync_all().unwrap();
            File::open(sources).unwrap().sync_all().unwrap();
            let path = path.to_str().unwrap();
            if v == 0 {
                rig.mount_with(&["--grain", &grain, "--volume", &format!("{name}={path}")]);
            } else {
                rig.ok(&["volume", "add", &name, path, "--grain", &grain]);
            }
        }
        Daemon {
            rig,
            store: store.to_owned(),
            open: Mutex::default(),
        }
    }

    fn file(&self, v: usize, which: &Which) -> Arc<File> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (v, which.clone());
        let file = open.entry(key).or_insert_with(|| {
            let path = image_path(&self.rig, v, which);
            Arc::new(OpenOptions::new().write(true).open(path).unwrap())
        });
        Arc::clone(file)
    }

    fn forget(&self, v: usize, which: &Which) -> Option<Arc<File>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.remove(&(v, which.clone()))
    }

    fn forget_all(&self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.clear();
    }

    fn names(&self, v: usize, kind: &str) -> BTreeSet<String> {
        listed(&self.rig, v, kind)
    }
}

/// The names of the images in a directory of a volume.
fn listed(rig: &Rig, v: usize, kind: &str) -> BTreeSet<String> {
    let dir = rig.mnt().join(volume_name(v)).join(kind);
    let names = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name());
    let names = names.map(|name| name.into_string().unwrap());
    names
        .map(|name| name.strip_suffix(".img").unwrap().to_owned())
        .collect()
}

impl Machine for Daemon {
    fn write(&self, v: usize, which: &Which, patch: &Patch) {
        let file = self.file(v, which);
        file.write_all_at(&patch.data, patch.offset).unwrap();
    }

    fn zero(&self, v: usize, which: &Which, offset: u64, len: u64) {
        let path = image_path(&self.rig, v, which);
        let mut command = Command::new("fallocate");
        command.args(["--punch-hole", "--offset", &offset.to_string()]);
        command.args(["--length", &len.to_string()]).arg(path);
        good(&command.output().unwrap(), "fallocate");
    }

    fn flush(&self, v: usize, which: &Which) {
        self.file(v, which).sync_data().unwrap();
    }

    fn take(&self, snapshot: &str, of: &[usize]) {
        if let [v] = of {
            touch(&snapshot_path(&self.rig, *v, snapshot)).unwrap();
            return;
        }
        let targets = of.iter().map(|&v| format!("{}@{snapshot}", volume_name(v)));
        let targets: Vec<String> = targets.collect();
        let mut args = vec!["snapshot", "create"];
        args.extend(targets.iter().map(String::as_str));
        self.rig.ok(&args);
    }

    fn delete(&self, v: usize, snapshot: &str, keep_bookmark: bool) {
        if keep_bookmark {
            let target = format!("{}@{snapshot}", volume_name(v));
            self.rig
                .ok(&["snapshot", "delete", &target, "--keep-bookmark"]);
        } else {
            fs::remove_file(snapshot_path(&self.rig, v, snapshot)).unwrap();
        }
    }

    fn delete_bookmark(&self, v: usize, bookmark: &str) {
        let target = format!("{}@{bookmark}", volume_name(v));
        self.rig.ok(&["bookmark", "delete", &target]);
    }

    fn rename(&self, v: usize, from: &str, to: &str) {
        let path = |name| snapshot_path(&self.rig, v, name);
        fs::rename(path(from), path(to)).unwrap();
    }

    fn clone_snapshot(&self, v: usize, of: &str, clone: &str) {
        let clone = image_path(&self.rig, v, &Some(clone.to_owned()));
        fs::hard_link(snapshot_path(&self.rig, v, of), clone).unwrap();
    }

    fn clone_clone(&self, v: usize, of: &str, clone: &str) {
        let path = |name: &str| image_path(&self.rig, v, &Some(name.to_owned()));
        fs::hard_link(path(of), path(clone)).unwrap();
    }

    fn rename_clone(&self, v: usize, from: &str, to: &str) {
        let (from, to) = (Some(from.to_owned()), Some(to.to_owned()));
        let path = |which| image_path(&self.rig, v, which);
        fs::rename(path(&from), path(&to)).unwrap();
        if let Some(file) = self.forget(v, &from) {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.insert((v, to), file);
        }
    }

    fn delete_clone(&self, v: usize, clone: &str) {
        let which = Some(clone.to_owned());
        fs::remove_file(image_path(&self.rig, v, &which)).unwrap();
        self.forget(v, &which);
    }

    fn revert(&self, v: usize, to: &str) -> String {
        let before = self.names(v, "snapshots");
        let target = format!("{}@{to}", volume_name(v));
        self.rig.ok(&["snapshot", "revert", &target, "--force"]);
        let after = self.names(v, "snapshots");
        let undo: Vec<&String> = after.difference(&before).collect();
        assert_eq!(undo.len(), 1, "one snapshot undoes it");
        undo[0].clone()
    }

    fn resize(&self, v: usize, to: u64) {
        // Refused while somebody may write; a handle just closed may count for a moment.
        self.forget(v, &None);
        let size = to.to_string();
        let mut out = None;
        eventually("nobody has it open for writing", || {
            let done = self.rig.run(&["volume", "resize", &volume_name(v), &size]);
            let busy = String::from_utf8_lossy(&done.stderr).contains("open for writing");
            out = Some(done);
            !busy
        });
        good(&out.expect("it was tried"), "volume resize");
    }

    /// The daemon does it by itself.
    fn maintain(&self) {}

    fn restart(&mut self, how: Restart) {
        if how == Restart::Kill {
            self.rig.kill();
            self.forget_all();
        } else {
            self.forget_all();
            self.rig.umount();
        }
        if how == Restart::LoseMap {
            fs::remove_dir_all(self.store.join("map")).unwrap();
        }
        self.rig.mount();
    }

    fn stop(mut self: Box<Self>) {
        self.forget_all();
        self.rig.umount();
    }
}

/// After a power cut the machine boots again. This one has not, and a store on another device within one
/// boot would be a copy.
fn another_boot(store: &Path) {
    let home = store.join("home");
    // A cut may hit before there is one.
    let Ok(text) = fs::read_to_string(&home) else {
        return;
    };
    let (rest, _) = text.rsplit_once(' ').expect("never torn: it is replaced");
    fs::write(&home, format!("{rest} another\n")).unwrap();
}

/// Starts the daemon on a crash state, compares every view with what the engine in this process found
/// in the same state, ends the daemon, and asks `check`.
pub fn same_through_the_mount(store: &Path, found: &World) {
    another_boot(store);
    let mut rig = Rig::with_store(store.to_owned());
    rig.mount();
    for (v, volume) in found.volumes.iter().enumerate() {
        let same = |path: PathBuf, expected: &dyn Fn(usize) -> Vec<u8>, size: u64| {
            let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            assert_eq!(bytes.len() as u64, size, "{}", path.display());
            assert!(bytes == expected(bytes.len()), "{} differs", path.display());
        };
        assert!(
            listed(&rig, v, "snapshots")
                .iter()
                .eq(volume.snapshots.keys())
        );
        assert!(listed(&rig, v, "clones").iter().eq(volume.clones.keys()));
        for (name, point) in &volume.snapshots {
            let path = snapshot_path(&rig, v, name);
            same(path, &|len| point.content.read(0, len), point.size);
        }
        for (name, image) in &volume.clones {
            let path = image_path(&rig, v, &Some(name.clone()));
            same(path, &|len| image.content.read(0, len), image.size);
        }
        let (path, live) = (image_path(&rig, v, &None), &volume.live);
        same(path, &|len| live.content.read(0, len), live.size);
    }
    rig.umount();
    rig.ok(&["check"]);
}
