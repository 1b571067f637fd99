//! Files and directories of a [`SimWorld`] as the layers above see them.

use std::io::{self, ErrorKind};
use std::sync::{Arc, MutexGuard};

use crate::sys::disk::{Dir, Disk, Identity, Open, Space};
use crate::sys::file::check_name;
use crate::sys::sim::medium::{Change, Medium, Names};
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
        world.check_life(self.life)?;
        if self.writable {
            Ok(world)
        } else {
            Err(os(libc::EBADF))
        }
    }

    fn looking<T>(&self, look: impl FnOnce(&mut Medium) -> T) -> io::Result<T> {
        let mut world = self.world.lock();
        world.check_life(self.life)?;
        world.file(self.id).map(look)
    }
}

impl Disk for SimDisk {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut world = self.world.lock();
        world.begin(self.life, Op::Read, false)?;
        let file = world.file(self.id)?;
        let end = offset.saturating_add(buf.len() as u64);
        if !buf.is_empty() && end > file.size() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        file.read(offset, buf);
        Ok(())
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
        let mut outcome = world.begin(self.life, Op::Write, true);
        let mut left = match outcome {
            Ok(()) => total,
            Err(_) => world.rng.below(total as u64 + 1) as usize,
        };
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
        world.changed(self.id);
        outcome
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut world = self.world.lock();
        let outcome = world.begin(self.life, Op::Sync, true);
        if outcome.is_ok() {
            world.file(self.id)?.sync();
        } else if world.check_life(self.life).is_ok() {
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
        world.begin(self.life, Op::SetSize, true)?;
        if size > i64::MAX as u64 {
            return Err(os(libc::EFBIG));
        }
        world.file(self.id)?.set_size(size);
        world.changed(self.id);
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut world = self.writing()?;
        world.begin(self.life, Op::Punch, true)?;
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
        self.looking(Medium::drop_cache)
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
        world.begin(self.life, Op::Open, how == Open::Create)?;
        let found = world.names(self.id)?.entries.get(name).copied();
        let id = match (found, how) {
            (Some(_), Open::Create) => return Err(os(libc::EEXIST)),
            (None, Open::Create) => world.make(self.id, name, Content::File(Medium::new()))?,
            (Some(id), _) => id,
            (None, _) => return Err(os(libc::ENOENT)),
        };
        world.file(id)?;
        Ok(self.world.handle(&mut world, id, how != Open::Read))
    }

    fn subdir(&self, name: &str, create: bool) -> io::Result<Arc<dyn Dir>> {
        check_name(name)?;
        let mut world = self.world.lock();
        let found = world.names(self.id)?.entries.get(name).copied();
        world.begin(self.life, Op::Open, create && found.is_none())?;
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
        world.check_life(self.life)?;
        Ok(world.names(self.id)?.entries.keys().cloned().collect())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        check_name(name)?;
        let mut world = self.world.lock();
        world.begin(self.life, Op::Remove, true)?;
        let names = world.names(self.id)?;
        let id = *names.entries.get(name).ok_or_else(|| os(libc::ENOENT))?;
        world.file(id)?;
        let remove = Some((name.to_owned(), id));
        world.names(self.id)?.change(Change { remove, add: None });
        world.unlink(id);
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        check_name(from)?;
        check_name(to)?;
        let mut world = self.world.lock();
        world.begin(self.life, Op::Rename, true)?;
        let names = world.names(self.id)?;
        let id = *names.entries.get(from).ok_or_else(|| os(libc::ENOENT))?;
        let over = names.entries.get(to).copied();
        if over == Some(id) {
            return Ok(());
        }
        if let Some(over) = over {
            world.file(over)?;
            world.file(id).map_err(|_| os(libc::ENOTDIR))?;
            world.unlink(over);
        }
        let change = Change {
            remove: Some((from.to_owned(), id)),
            add: Some((to.to_owned(), id)),
        };
        world.names(self.id)?.change(change);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut world = self.world.lock();
        let outcome = world.begin(self.life, Op::DirSync, true);
        if outcome.is_ok() {
            world.names(self.id)?.sync();
            world.sweep();
        } else if world.check_life(self.life).is_ok() {
            world.names(self.id)?.sync_failed();
        }
        outcome
    }

    fn space(&self) -> io::Result<Space> {
        let world = self.world.lock();
        world.check_life(self.life)?;
        Ok(world.space_of(self.id))
    }
}
