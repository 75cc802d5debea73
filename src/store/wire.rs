//! Just enough of the protobuf wire format to take answers apart and put answers together without decoding what is inside.

use bytes::BufMut;

/// Bytes that are not protobuf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed protobuf at byte {at}")]
pub struct Malformed {
    /// How far into the message the fault was found.
    pub at: usize,
}

/// The value of one field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// Wire type 0.
    Varint(u64),
    /// Wire types 1 and 5: eight or four bytes as they are.
    Fixed(&'a [u8]),
    /// Wire type 2.
    Bytes(&'a [u8]),
}

impl<'a> Value<'a> {
    /// The value as an `int64`, `int32`, `bool` or enum; zero where the field is of another type, as a decoder that skips
    /// what it cannot use would leave it.
    pub fn int(self) -> i64 {
        match self {
            Self::Varint(value) => value as i64,
            _ => 0,
        }
    }

    /// The value of a length-delimited field; empty where the field is of another type.
    pub fn bytes(self) -> &'a [u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            _ => &[],
        }
    }
}

/// One field of a message.
#[derive(Clone, Copy, Debug)]
pub struct Field<'a> {
    /// The field's number.
    pub number: u32,
    /// Its value.
    pub value: Value<'a>,
    /// Where its tag begins in the message.
    pub start: usize,
    /// Where its value ends in the message.
    pub end: usize,
}

/// The fields of a message, in the order in which they stand.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a> {
    message: &'a [u8],
    at: usize,
}

impl<'a> Fields<'a> {
    /// Walks the fields of `message`.
    pub fn of(message: &'a [u8]) -> Self {
        Self { message, at: 0 }
    }

    fn varint(&mut self) -> Result<u64, Malformed> {
        let mut value = 0;
        for shift in (0..70).step_by(7) {
            let byte = *self.message.get(self.at).ok_or(Malformed { at: self.at })?;
            self.at += 1;
            value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(Malformed { at: self.at })
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], Malformed> {
        let fault = Malformed { at: self.at };
        let end = usize::try_from(length).ok().and_then(|length| self.at.checked_add(length)).ok_or(fault)?;
        let taken = self.message.get(self.at..end).ok_or(fault)?;
        self.at = end;
        Ok(taken)
    }

    fn field(&mut self) -> Result<Field<'a>, Malformed> {
        let start = self.at;
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3).ok().filter(|number| *number != 0).ok_or(Malformed { at: start })?;
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => Value::Fixed(self.take(8)?),
            2 => {
                let length = self.varint()?;
                Value::Bytes(self.take(length)?)
            }
            5 => Value::Fixed(self.take(4)?),
            _ => return Err(Malformed { at: start }),
        };
        Ok(Field { number, value, start, end: self.at })
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.message.len() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.at = self.message.len();
        }
        Some(field)
    }
}

/// How many bytes `value` takes as a varint.
pub const fn varint_len(value: u64) -> usize {
    (((value | 1).ilog2() as usize) * 9 + 73) / 64
}

/// Appends `value` as a varint.
pub fn put_varint(out: &mut impl BufMut, mut value: u64) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

/// How many bytes an integer field below number 16 takes; none for zero, which proto3 leaves out.
pub const fn int_field_len(value: i64) -> usize {
    if value == 0 { 0 } else { 1 + varint_len(value as u64) }
}

/// Appends an integer field below number 16, unless it is zero.
pub fn put_int_field(out: &mut impl BufMut, number: u8, value: i64) {
    if value != 0 {
        out.put_u8(number << 3);
        put_varint(out, value as u64);
    }
}

/// How many bytes a length-delimited field below number 16 takes, its tag and length included.
pub const fn bytes_field_len(length: usize) -> usize {
    1 + varint_len(length as u64) + length
}

/// Appends the tag and the length of a length-delimited field below number 16; the `length` bytes are for the caller.
pub fn put_bytes_head(out: &mut impl BufMut, number: u8, length: usize) {
    out.put_u8(number << 3 | 2);
    put_varint(out, length as u64);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn varints_come_back_and_are_as_long_as_said(value: u64) {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            prop_assert_eq!(out.len(), varint_len(value));
            prop_assert_eq!(Fields { message: &out, at: 0 }.varint(), Ok(value));
        }

        #[test]
        fn garbage_ends_in_an_error_and_never_in_a_panic(garbage: Vec<u8>) {
            let _ = Fields::of(&garbage).collect::<Vec<_>>();
        }
    }

    #[test]
    fn fields_come_in_order_with_their_places() {
        let mut out = Vec::new();
        put_int_field(&mut out, 2, -1);
        put_bytes_head(&mut out, 5, 3);
        out.extend_from_slice(b"abc");
        let fields: Vec<_> = Fields::of(&out).map(Result::unwrap).collect();
        assert_eq!(fields[0].value.int(), -1);
        assert_eq!((fields[1].number, fields[1].value.bytes(), fields[1].end), (5, &b"abc"[..], out.len()));
        assert_eq!(fields[1].end - fields[1].start, bytes_field_len(3));
    }
}
