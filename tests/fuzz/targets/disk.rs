//! Files in memory, behind the traits that the readers of a store take: the bytes of one input.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex};

use stillframe::sys::disk::{Dir, Disk, Identity, Open, Space};

/// Most bytes a file may take: what asks for more has lost its measure.
const SIZE_MAX: u64 = 64 << 20;

/// A file.
#[derive(Default)]
pub struct MemDisk(pub Mutex<Vec<u8>>);

/// A directory of files.
#[derive(Default)]
pub struct MemDir(pub Mutex<BTreeMap<String, Arc<MemDisk>>>);

impl MemDir {
    /// A directory with these files.
    pub fn new(files: impl IntoIterator<Item = (String, Vec<u8>)>) -> MemDir {
        let disk = |(name, bytes)| (name, Arc::new(MemDisk(Mutex::new(bytes))));
        MemDir(Mutex::new(files.into_iter().map(disk).collect()))
    }
}

impl Disk for MemDisk {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let bytes = self.0.lock().unwrap();
        let from = usize::try_from(offset).ok();
        let found = from.and_then(|from| bytes.get(from..from.checked_add(buf.len())?));
        buf.copy_from_slice(found.ok_or(ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_all_at(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        let data = parts.concat();
        let end = offset.checked_add(data.len() as u64);
        let end = end
            .filter(|&end| end <= SIZE_MAX)
            .ok_or(ErrorKind::StorageFull)? as usize;
        let mut bytes = self.0.lock().unwrap();
        let len = bytes.len().max(end);
        bytes.resize(len, 0);
        bytes[offset as usize..end].copy_from_slice(&data);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().len() as u64)
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        if size > SIZE_MAX {
            return Err(ErrorKind::StorageFull.into());
        }
        self.0.lock().unwrap().resize(size as usize, 0);
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut bytes = self.0.lock().unwrap();
        let size = bytes.len() as u64;
        let range = offset.min(size) as usize..offset.saturating_add(len).min(size) as usize;
        bytes[range].fill(0);
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok((offset < self.size()?).then_some(offset))
    }

    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        Ok(self.size()?.max(offset))
    }

    fn allocated(&self) -> io::Result<u64> {
        self.size()
    }

    fn drop_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn identity(&self) -> io::Result<Identity> {
        Ok(Identity {
            dev: 1,
            ino: 1,
            size: self.size()?,
            ctime_ns: 1,
        })
    }
}

impl Dir for MemDir {
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn Disk>> {
        let mut files = self.0.lock().unwrap();
        if how == Open::Create {
            files.insert(name.to_owned(), Arc::default());
        }
        let found = files.get(name).ok_or(ErrorKind::NotFound)?;
        Ok(Arc::clone(found) as Arc<dyn Disk>)
    }

    fn subdir(&self, _name: &str, _create: bool) -> io::Result<Arc<dyn Dir>> {
        Err(ErrorKind::Unsupported.into())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.0.lock().unwrap().keys().cloned().collect())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let gone = self.0.lock().unwrap().remove(name);
        gone.map(drop).ok_or_else(|| ErrorKind::NotFound.into())
    }

    fn rename(&self, _from: &str, _to: &str) -> io::Result<()> {
        Err(ErrorKind::Unsupported.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn space(&self) -> io::Result<Space> {
        Ok(Space {
            total: 1 << 30,
            available: 1 << 29,
        })
    }
}
