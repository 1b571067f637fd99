//! Files and directories of a [`SimWorld`] as the layers above see them.

use std::io;
use std::sync::{Arc, MutexGuard};

use crate::sys::disk::{Dir, Disk, Identity, Open, Space};
use crate::sys::file::check_name;
use crate::sys::sim::faults::{What, cut_short};
use crate::sys::sim::medium::Medium;
use crate::sys::sim::names::{Change, Names};
use crate::sys::sim::world::{Content, UNLIMITED, World, os};
use crate::sys::sim::{Op, SimWorld};

/// A file of a [`SimWorld`].
#[derive(Debug)]
pub struct SimDisk {
    pub(super) world: SimWorld,
    pub(super) id: u64,
    pub(super) life: u64,
    pub(super) writable: bool,
}

impl SimDisk {
    /// The world, if this handle still lives in it and may write.
    fn writing(&self) -> io::Result<MutexGuard<'_, World>> {
        let world = self.world.lock();
        world.check(self.life, self.id)?;
        if self.writable {
            Ok(world)
        } else {
            Err(os(libc::EBADF))
        }
    }

    fn looking<T>(&self, look: impl FnOnce(&Medium) -> T) -> io::Result<T> {
        let mut world = self.world.lock();
        world.begin(self.life, self.id, Op::Look, false)?;
        world.look(self.id).map(look)
    }
}

impl Disk for SimDisk {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut world = self.world.lock();
        let struck = world.strike(self.life, self.id, Op::Read, false)?;
        if let Some(What::Errno(errno)) = struck {
            return Err(os(errno));
        }
        let part = world.rng_below_if(matches!(struck, Some(What::Short(_))), buf.len());
        let file = world.look(self.id)?;
        let end = offset.saturating_add(buf.len() as u64);
        if !buf.is_empty() && end > file.size() {
            return Err(cut_short());
        }
        match part {
            Some(part) => {
                file.read(offset, &mut buf[..part]);
                Err(cut_short())
            }
            None => {
                file.read(offset, buf);
                Ok(())
            }
        }
    }

    fn write_all_at(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        let mut world = self.writing()?;
        let total: usize = parts.iter().map(|part| part.len()).sum();
        if offset
            .checked_add(total as u64)
            .is_none_or(|end| end > i64::MAX as u64)
        {
            return Err(os(libc::EFBIG));
        }
        let (mut outcome, mut left, mut broken) = (Ok(()), total, None);
        match world.strike(self.life, self.id, Op::Write, true) {
            Ok(None) => {}
            Ok(Some(What::Short(errno))) => {
                left = world.rng.below(total.max(1) as u64) as usize;
                outcome = Err(os(errno));
            }
            Ok(Some(What::Errno(errno))) => outcome = Err(os(errno)),
            Ok(Some(what)) => broken = Some(what),
            Err(e) => outcome = Err(e),
        }
        if outcome.is_err() && left == total {
            left = world.rng.below(total as u64 + 1) as usize;
        }
        let mut at = offset;
        for part in parts {
            let part = &part[..part.len().min(left)];
            let room = if world.limits.is_empty() {
                UNLIMITED
            } else {
                world.space_of(self.id).available
            };
            let wrote = world.file(self.id)?.write(at, part, room);
            if wrote < part.len() {
                outcome = outcome.and(Err(os(libc::ENOSPC)));
                break;
            }
            left -= wrote;
            at += wrote as u64;
        }
        if let Some(what) = broken {
            let forget = world.rng.below(2) == 0;
            if what == What::Misdirected {
                world.misdirect(self.id, &parts.concat());
            }
            world.file(self.id)?.lose(offset, total, forget);
        }
        world.changed(self.id);
        outcome
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut world = self.world.lock();
        let outcome = world.begin(self.life, self.id, Op::Sync, true);
        if outcome.is_ok() {
            if !world.look(self.id)?.is_durable() {
                world.file(self.id)?.sync();
            }
        } else if world.check(self.life, self.id).is_ok() {
            world.file(self.id)?.sync_failed();
        }
        outcome
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync_data()?;
        if let Some(node) = self.world.lock().nodes.get_mut(&self.id) {
            node.durable_ctime_ns = node.ctime_ns;
        }
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        self.looking(|file| file.size())
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        let mut world = self.writing()?;
        world.begin(self.life, self.id, Op::SetSize, true)?;
        if size > i64::MAX as u64 {
            return Err(os(libc::EFBIG));
        }
        world.file(self.id)?.set_size(size);
        world.changed(self.id);
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut world = self.writing()?;
        world.begin(self.life, self.id, Op::Punch, true)?;
        world.file(self.id)?.punch(offset, len);
        world.changed(self.id);
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.looking(|file| file.next_data(offset))
    }

    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        self.looking(|file| file.next_hole(offset))
    }

    fn allocated(&self) -> io::Result<u64> {
        self.looking(|file| file.allocated())
    }

    fn drop_cache(&self) -> io::Result<()> {
        let mut world = self.world.lock();
        world.begin(self.life, self.id, Op::Look, false)?;
        world.file(self.id)?.drop_cache();
        Ok(())
    }

    fn identity(&self) -> io::Result<Identity> {
        let size = self.size()?;
        let world = self.world.lock();
        let node = world.nodes.get(&self.id).ok_or_else(|| os(libc::EIO))?;
        Ok(Identity {
            dev: node.fs,
            ino: self.id,
            size,
            ctime_ns: node.ctime_ns,
        })
    }
}

impl Drop for SimDisk {
    fn drop(&mut self) {
        let mut world = self.world.lock();
        if self.life == world.life
            && let Some(node) = world.nodes.get_mut(&self.id)
        {
            node.open -= 1;
        }
    }
}

/// A directory of a [`SimWorld`].
#[derive(Debug)]
pub struct SimDir {
    pub(super) world: SimWorld,
    pub(super) id: u64,
    pub(super) life: u64,
}

impl Dir for SimDir {
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn Disk>> {
        check_name(name)?;
        let mut world = self.world.lock();
        world.begin(self.life, self.id, Op::Open, how == Open::Create)?;
        let found = world.names(self.id)?.entries.get(name).copied();
        let id = match (found, how) {
            (Some(_), Open::Create) => return Err(os(libc::EEXIST)),
            (None, Open::Create) => {
                world.make(self.id, name, Content::File(Arc::new(Medium::new())))?
            }
            (Some(id), _) => id,
            (None, _) => return Err(os(libc::ENOENT)),
        };
        world.look(id)?;
        Ok(self.world.handle(&mut world, id, how != Open::Read))
    }

    fn subdir(&self, name: &str, create: bool) -> io::Result<Arc<dyn Dir>> {
        check_name(name)?;
        let mut world = self.world.lock();
        let found = world.names(self.id)?.entries.get(name).copied();
        world.begin(self.life, self.id, Op::Open, create && found.is_none())?;
        let id = match found {
            Some(id) => id,
            None if create => world.make(self.id, name, Content::Dir(Names::default()))?,
            None => return Err(os(libc::ENOENT)),
        };
        world.names(id)?;
        Ok(Arc::new(SimDir {
            world: self.world.clone(),
            id,
            life: self.life,
        }))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut world = self.world.lock();
        world.begin(self.life, self.id, Op::Look, false)?;
        Ok(world.names(self.id)?.entries.keys().cloned().collect())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        check_name(name)?;
        let mut world = self.world.lock();
        world.begin(self.life, self.id, Op::Remove, true)?;
        let names = world.names(self.id)?;
        let id = *names.entries.get(name).ok_or_else(|| os(libc::ENOENT))?;
        world.look(id)?;
        let remove = Some((name.to_owned(), id));
        world.rename(self.id, Change { remove, add: None })?;
        world.unlink(id);
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        check_name(from)?;
        check_name(to)?;
        let mut world = self.world.lock();
        world.begin(self.life, self.id, Op::Rename, true)?;
        let names = world.names(self.id)?;
        let id = *names.entries.get(from).ok_or_else(|| os(libc::ENOENT))?;
        let over = names.entries.get(to).copied();
        if over == Some(id) {
            return Ok(());
        }
        if let Some(over) = over {
            world.look(over)?;
            world.look(id).map_err(|_| os(libc::ENOTDIR))?;
            world.unlink(over);
        }
        let change = Change {
            remove: Some((from.to_owned(), id)),
            add: Some((to.to_owned(), id)),
        };
        world.rename(self.id, change)
    }

    fn sync(&self) -> io::Result<()> {
        let mut world = self.world.lock();
        let outcome = world.begin(self.life, self.id, Op::DirSync, true);
        if outcome.is_ok() {
            world.names(self.id)?.sync();
            world.sweep();
        } else if world.check(self.life, self.id).is_ok() {
            world.names(self.id)?.sync_failed();
        }
        outcome
    }

    fn space(&self) -> io::Result<Space> {
        let mut world = self.world.lock();
        world.begin(self.life, self.id, Op::Look, false)?;
        Ok(world.space_of(self.id))
    }
}
