//! Real mounts where this user may make them; else a test says that it was skipped.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};

use super::*;
use crate::sys::eventually;

/// A directory to mount at; unmounted on drop, also after a failed assertion.
struct Place(tempfile::TempDir, PathBuf);

impl Place {
    fn new() -> Place {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().canonicalize().unwrap().join("m p,t");
        fs::create_dir(&path).unwrap();
        Place(temp, path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        while mount_at(&self.1).unwrap().is_some() && unmount(&self.1, Unmount::Lazy).is_ok() {}
    }
}

fn may_mount(test: &str) -> bool {
    let may = process::effective_uid() == 0 && open_device().is_ok();
    if !may {
        skipped(test, "needs root and /dev/fuse");
    }
    may
}

/// Where everything is to be tested this is a failure.
fn skipped(test: &str, why: &str) {
    assert!(std::env::var_os("STILLFRAME_CI").is_none(), "{test}: {why}");
    eprintln!("SKIPPED {test}: {why}");
}

fn tmpfs(at: &Path) {
    let path = c_path(at).unwrap();
    // SAFETY: all are C strings; no data.
    let answer = unsafe {
        libc::mount(
            c"store,x".as_ptr(),
            path.as_ptr(),
            c"tmpfs".as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    assert_eq!(answer, 0);
}

#[test]
fn a_mount_lives_dies_and_goes() {
    if !may_mount("a_mount_lives_dies_and_goes") {
        return;
    }
    let place = Place::new();
    let source = escape_source(Path::new("/var/store, one"));
    assert_eq!(check_mountpoint(&place.1).unwrap(), Mountpoint::Ready);
    let connection = mount_fuse(&place.1, &source, true).unwrap();
    let entry = mount_at(&place.1).unwrap().unwrap();
    assert_eq!(
        (entry.fstype.as_str(), &entry.source),
        ("fuse.stillframe", &source)
    );
    assert_eq!(
        unescape_source(&entry.source).unwrap(),
        Path::new("/var/store, one")
    );
    // Nobody answers the connection: alive, as far as one can tell.
    let live = Mountpoint::OursLive {
        source: source.clone(),
    };
    assert_eq!(check_mountpoint(&place.1).unwrap(), live);
    if set_read_ahead(entry.major, entry.minor, 1024) {
        let setting = format!(
            "/sys/class/bdi/{}:{}/read_ahead_kb",
            entry.major, entry.minor
        );
        assert_eq!(fs::read_to_string(setting).unwrap(), "1024\n");
    }
    let link = place.0.path().join("link");
    std::os::unix::fs::symlink(&place.1, &link).unwrap();
    assert_eq!(check_mountpoint(&link).unwrap(), live);
    let stale = Mountpoint::Stale { source };
    if abort_connection(entry.minor).unwrap() {
        assert_eq!(
            check_mountpoint(&place.1).unwrap(),
            stale,
            "although somebody holds it"
        );
    }
    drop(connection);
    assert!(eventually(|| check_mountpoint(&place.1).unwrap() == stale));
    assert_eq!(check_mountpoint(&link).unwrap(), stale);
    assert_eq!(
        check_mountpoint(&place.1.join("")).unwrap(),
        stale,
        "with a slash"
    );
    // A look that is just ending keeps it busy for a moment.
    assert!(eventually(|| unmount(&place.1, Unmount::Normal).is_ok()));
    assert_eq!(check_mountpoint(&place.1).unwrap(), Mountpoint::Ready);
    assert_eq!(
        unmount(&place.1, Unmount::Normal).unwrap_err().kind(),
        Kind::Invalid
    );
}

#[test]
fn fusermount_mounts_and_unmounts() {
    if !may_mount("fusermount_mounts_and_unmounts") {
        return;
    }
    let place = Place::new();
    let Some(connection) = fusermount::mount(&place.1, "stillframe:/s", false).unwrap() else {
        return skipped("fusermount_mounts_and_unmounts", "no fusermount");
    };
    let entry = mount_at(&place.1).unwrap().unwrap();
    assert_eq!(
        (entry.fstype.as_str(), entry.source.as_str()),
        ("fuse.stillframe", "stillframe:/s")
    );
    // SAFETY: takes numbers only.
    let flags = unsafe { libc::fcntl(connection.as_raw_fd(), libc::F_GETFD) };
    assert_eq!(flags, libc::FD_CLOEXEC, "no child keeps the mount alive");
    drop(connection);
    assert!(eventually(|| fusermount::unmount(
        &place.1,
        Unmount::Normal
    )
    .is_ok()));
    assert_eq!(mount_at(&place.1).unwrap(), None);
    assert!(fusermount::unmount(&place.1, Unmount::Lazy).is_err());
    let file = place.0.path().join("f");
    fs::write(&file, "").unwrap();
    let e = fusermount::mount(&file.join("x"), "stillframe:/s", false).unwrap_err();
    assert_eq!(e.kind(), Kind::Permission);
    assert!(e.to_string().contains("fusermount"), "its own words: {e}");
}

#[test]
fn a_busy_foreign_mount_names_its_holders() {
    if !may_mount("a_busy_foreign_mount_names_its_holders") {
        return;
    }
    let place = Place::new();
    tmpfs(&place.1);
    let foreign = Mountpoint::ForeignMount {
        fstype: "tmpfs".into(),
        source: "store,x".into(),
    };
    assert_eq!(check_mountpoint(&place.1).unwrap(), foreign);
    let inner = place.1.join("inner");
    fs::create_dir(&inner).unwrap();
    tmpfs(&inner);
    assert_eq!(
        unmount(&place.1, Unmount::Normal).unwrap_err().kind(),
        Kind::Busy
    );
    let below = Holder {
        pid: None,
        name: inner.to_str().unwrap().into(),
    };
    assert_eq!(holders(&place.1), [below]);
    assert_eq!(
        fusermount::unmount(&place.1, Unmount::Normal)
            .unwrap_err()
            .kind(),
        Kind::Busy
    );
    unmount(&inner, Unmount::Normal).unwrap();
    let file = fs::File::create(place.1.join("open")).unwrap();
    assert_eq!(
        unmount(&place.1, Unmount::Normal).unwrap_err().kind(),
        Kind::Busy
    );
    assert_eq!(
        mount_of(&inner).unwrap().unwrap().dev(),
        file.metadata().unwrap().dev()
    );
    unmount(&place.1, Unmount::Lazy).unwrap();
    assert_eq!(mount_at(&place.1).unwrap(), None);
}

#[test]
fn holders_are_found_by_directory_and_by_descriptor() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().canonicalize().unwrap();
    assert_eq!(holders(&path), []);
    let mut sleep = Command::new("sleep");
    let mut by_cwd = sleep.arg("30").current_dir(&path).spawn().unwrap();
    let file = fs::File::create(path.join("f")).unwrap();
    let mut by_fd = Command::new("sleep")
        .arg("30")
        .stdin(Stdio::from(file))
        .spawn()
        .unwrap();
    let name = |child: &Child| process::process_name(child.id());
    assert!(eventually(
        || [&by_cwd, &by_fd].map(name) == [Some("sleep".into()), Some("sleep".into())]
    ));
    let found = holders(&path);
    for child in [&mut by_cwd, &mut by_fd] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let holder = |pid| Holder {
        pid: Some(pid),
        name: "sleep".into(),
    };
    assert!(found.contains(&holder(by_cwd.id())) && found.contains(&holder(by_fd.id())));
    assert!(found.is_sorted());
    assert!(!is_below(b"/a/bc\n", Path::new("/a/b")) && is_below(b"/a/b\n", Path::new("/a/b")));
}

#[test]
fn bad_mountpoints_are_told_apart() {
    let temp = tempfile::tempdir().unwrap();
    let kind = |path: &Path| check_mountpoint(path).unwrap_err().kind();
    assert_eq!(kind(&temp.path().join("none")), Kind::NotFound);
    assert_eq!(kind(&temp.path().join("none/deeper")), Kind::NotFound);
    fs::write(temp.path().join("file"), "").unwrap();
    assert_eq!(kind(&temp.path().join("file")), Kind::Invalid);
    let e = check_mountpoint(temp.path()).unwrap_err();
    assert!(
        e.kind() == Kind::Invalid && e.to_string().ends_with("is not empty"),
        "{e}"
    );
    fs::create_dir(temp.path().join("dir")).unwrap();
    std::os::unix::fs::symlink("dir", temp.path().join("link")).unwrap();
    assert_eq!(
        check_mountpoint(&temp.path().join("link")).unwrap(),
        Mountpoint::Ready
    );
    let full = temp.path().canonicalize().unwrap().join("dir");
    assert_eq!(resolve(&temp.path().join("link")).unwrap(), full);
    assert_eq!(resolve(&temp.path().join("dir/../dir/.")).unwrap(), full);
}

#[test]
fn odd_sources_and_relative_mountpoints_are_refused() {
    for odd in ["", "a,b", "a b", "a\\b", "a\nb", "\u{e4}", "a\0b"] {
        let e = mount_fuse(Path::new("/nonexistent"), odd, false).unwrap_err();
        assert_eq!(e.kind(), Kind::Invalid, "{odd:?}");
    }
    let e = mount_fuse(Path::new("m"), "stillframe:/s", false).unwrap_err();
    assert_eq!(e.kind(), Kind::Invalid);
    if may_mount("odd_sources_and_relative_mountpoints_are_refused") {
        let e = mount_fuse(Path::new("/nonexistent"), "stillframe:/s", false).unwrap_err();
        assert_eq!(e.kind(), Kind::NotFound);
    }
}

#[test]
fn messages_name_what_is_missing() {
    for errno in [libc::ENOENT, libc::ENODEV, libc::ENXIO] {
        let e = device_error(io::Error::from_raw_os_error(errno));
        assert!(
            e.kind() == Kind::Unsupported && e.to_string().contains("modprobe fuse"),
            "{e}"
        );
    }
    let e = device_error(io::Error::from_raw_os_error(libc::EACCES));
    assert!(
        e.kind() == Kind::Permission && e.to_string().contains("chmod 666 /dev/fuse"),
        "{e}"
    );
    assert!(!abort_connection(u32::MAX).unwrap(), "no such connection");
    assert!(!set_read_ahead(0, u32::MAX, 1024));
}
