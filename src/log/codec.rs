//! Little-endian fields in byte strings: a writer that cannot fail and a reader that never panics.
//!
//! Every read is bounded by what is there; a short or overlong field is [`Kind::Damaged`].

use crate::error::{Error, Kind, Result};
use crate::units::{Name, Uuid};

/// Appends little-endian fields.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// An empty string.
    pub fn new() -> Writer {
        Writer::default()
    }

    /// Appends a byte.
    pub fn u8(&mut self, value: u8) -> &mut Writer {
        self.bytes.push(value);
        self
    }

    /// Appends two bytes.
    pub fn u16(&mut self, value: u16) -> &mut Writer {
        self.raw(&value.to_le_bytes())
    }

    /// Appends four bytes.
    pub fn u32(&mut self, value: u32) -> &mut Writer {
        self.raw(&value.to_le_bytes())
    }

    /// Appends eight bytes.
    pub fn u64(&mut self, value: u64) -> &mut Writer {
        self.raw(&value.to_le_bytes())
    }

    /// Appends eight bytes, two's complement.
    pub fn i64(&mut self, value: i64) -> &mut Writer {
        self.raw(&value.to_le_bytes())
    }

    /// Appends bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Writer {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Appends a UUID.
    pub fn uuid(&mut self, uuid: Uuid) -> &mut Writer {
        self.raw(&uuid.0)
    }

    /// Appends a UUID or sixteen zeros.
    pub fn uuid_or_zero(&mut self, uuid: Option<Uuid>) -> &mut Writer {
        self.raw(&uuid.map_or([0; 16], |u| u.0))
    }

    /// Appends a length of four bytes and the text.
    pub fn text(&mut self, text: &str) -> &mut Writer {
        let len = u32::try_from(text.len()).expect("texts are bounded far below 4 GiB");
        self.u32(len).raw(text.as_bytes())
    }

    /// Pads with zeros to a multiple of `align`.
    pub fn pad(&mut self, align: usize) -> &mut Writer {
        let len = self.bytes.len().next_multiple_of(align);
        self.bytes.resize(len, 0);
        self
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The bytes.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// Takes little-endian fields off the front of a byte string.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    /// Reads `bytes`; errors name `what`.
    pub fn new(bytes: &'a [u8], what: &'static str) -> Reader<'a> {
        Reader { rest: bytes, what }
    }

    fn damaged(&self, why: &str) -> Error {
        Error::new(Kind::Damaged, format!("{} {why}", self.what))
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// `Damaged` if fewer are left.
    pub fn raw(&mut self, len: usize) -> Result<&'a [u8]> {
        if len > self.rest.len() {
            return Err(self.damaged("ends too early"));
        }
        let (taken, rest) = self.rest.split_at(len);
        self.rest = rest;
        Ok(taken)
    }

    /// The next bytes as an array.
    ///
    /// # Errors
    /// `Damaged` if fewer are left.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.raw(N)?);
        Ok(array)
    }

    /// One byte.
    ///
    /// # Errors
    /// `Damaged` at the end.
    pub fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    /// Two bytes.
    ///
    /// # Errors
    /// `Damaged` at the end.
    pub fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// Four bytes.
    ///
    /// # Errors
    /// `Damaged` at the end.
    pub fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// Eight bytes.
    ///
    /// # Errors
    /// `Damaged` at the end.
    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Eight bytes, two's complement.
    ///
    /// # Errors
    /// `Damaged` at the end.
    pub fn i64(&mut self) -> Result<i64> {
        Ok(i64::from_le_bytes(self.array()?))
    }

    /// A UUID.
    ///
    /// # Errors
    /// `Damaged` at the end.
    pub fn uuid(&mut self) -> Result<Uuid> {
        Ok(Uuid(self.array()?))
    }

    /// A UUID, `None` for sixteen zeros.
    ///
    /// # Errors
    /// `Damaged` at the end.
    pub fn uuid_or_zero(&mut self) -> Result<Option<Uuid>> {
        let uuid = self.uuid()?;
        Ok((uuid.0 != [0; 16]).then_some(uuid))
    }

    /// A text with its length before it.
    ///
    /// # Errors
    /// `Damaged` if it ends early or is not UTF-8.
    pub fn text(&mut self) -> Result<&'a str> {
        let len = self.u32()? as usize;
        let bytes = self.raw(len)?;
        std::str::from_utf8(bytes).map_err(|_| self.damaged("holds a text that is not UTF-8"))
    }

    /// A name, checked by the rules for names.
    ///
    /// # Errors
    /// `Damaged` if it is not one.
    pub fn name(&mut self) -> Result<Name> {
        Name::new(self.text()?).map_err(|_| self.damaged("holds a name that breaks the rules"))
    }

    /// Bytes not yet taken.
    pub fn left(&self) -> usize {
        self.rest.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_a_cut_is_damage() {
        let mut w = Writer::new();
        w.u8(7)
            .u16(300)
            .u32(1 << 30)
            .u64(1 << 60)
            .i64(-5)
            .text("abc")
            .uuid_or_zero(None)
            .pad(8);
        let bytes = w.finish();
        assert_eq!(bytes.len() % 8, 0);
        let mut r = Reader::new(&bytes, "test");
        assert_eq!(r.u8().unwrap(), 7);
        assert_eq!(r.u16().unwrap(), 300);
        assert_eq!(r.u32().unwrap(), 1 << 30);
        assert_eq!(r.u64().unwrap(), 1 << 60);
        assert_eq!(r.i64().unwrap(), -5);
        assert_eq!(r.text().unwrap(), "abc");
        assert_eq!(r.uuid_or_zero().unwrap(), None);
        for cut in 0..10 {
            let mut r = Reader::new(&bytes[..cut], "test");
            let all = (|| Ok::<_, Error>((r.u8()?, r.u16()?, r.u32()?, r.u64()?)))();
            assert_eq!(all.unwrap_err().kind(), Kind::Damaged);
        }
    }
}
