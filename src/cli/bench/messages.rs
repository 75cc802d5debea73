//! gRPC messages out of pieces of a stream, and a look into protobuf messages without decoding them.

use crate::grpc;

/// Puts the messages of one stream together again.
#[derive(Default)]
pub struct Messages {
    partial: Vec<u8>,
}

impl Messages {
    /// Takes the next piece and tells each message that is now whole.
    pub fn feed(&mut self, bytes: &[u8], mut on: impl FnMut(&[u8])) {
        if self.partial.is_empty() {
            let rest = whole_messages(bytes, &mut on);
            self.partial.extend_from_slice(rest);
        } else {
            self.partial.extend_from_slice(bytes);
            let rest = whole_messages(&self.partial, &mut on).len();
            self.partial.drain(..self.partial.len() - rest);
        }
    }
}

/// Tells each whole message at the front and returns the rest.
fn whole_messages<'a>(mut bytes: &'a [u8], on: &mut impl FnMut(&[u8])) -> &'a [u8] {
    while let Some((length, rest)) = grpc::split(bytes) {
        let Some((message, rest)) = rest.split_at_checked(length) else { break };
        on(message);
        bytes = rest;
    }
    bytes
}

/// The value of a field.
#[derive(Debug, PartialEq, Eq)]
pub enum Field<'a> {
    /// A number or a boolean.
    Number(u64),
    /// Bytes, text or a nested message.
    Bytes(&'a [u8]),
}

/// The fields of a protobuf message, in wire order. Ends early at bytes that are no protobuf.
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = (u64, Field<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let key = varint(&mut self.0)?;
            let number = key >> 3;
            match key & 7 {
                0 => return Some((number, Field::Number(varint(&mut self.0)?))),
                1 => take(&mut self.0, 8)?,
                2 => {
                    let length = usize::try_from(varint(&mut self.0)?).ok()?;
                    return Some((number, Field::Bytes(take(&mut self.0, length)?)));
                }
                5 => take(&mut self.0, 4)?,
                _ => return None,
            };
        }
    }
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(taken)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::proto::{etcdserverpb::WatchResponse, mvccpb::Event};

    #[test]
    fn messages_survive_any_cut() {
        let first = WatchResponse { watch_id: 7, ..Default::default() };
        let second = WatchResponse { events: vec![Event::default(); 3], ..Default::default() };
        let stream = [grpc::frame(&first), grpc::frame(&second)].concat();
        for cut in 0..=stream.len() {
            let mut messages = Messages::default();
            let mut found = Vec::new();
            for piece in [&stream[..cut], &stream[cut..]] {
                messages.feed(piece, |message| found.push(WatchResponse::decode(message).unwrap()));
            }
            assert_eq!(found, [first.clone(), second.clone()]);
        }
    }

    #[test]
    fn fields_are_found_without_decoding() {
        let message = WatchResponse { watch_id: 300, cancel_reason: "x".into(), ..Default::default() }.encode_to_vec();
        let found: Vec<_> = Fields(&message).collect();
        assert_eq!(found, [(2, Field::Number(300)), (6, Field::Bytes(b"x"))]);
        assert_eq!(Fields(&[0x0a, 0xff]).next(), None);
        assert_eq!(Fields(&[0xff; 12]).next(), None);
    }
}
