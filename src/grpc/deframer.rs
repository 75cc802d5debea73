//! Messages out of the DATA frames that they come in.

use bytes::{Buf, Bytes, BytesMut};
use tonic::Code;

use super::{Compression, PREFIX, split};
use crate::status::Status;

/// Puts messages together from the DATA frames of one direction of a call.
#[derive(Default)]
pub struct Deframer {
    received: BytesMut,
    /// A frame that was taken as it came, before anything is copied.
    whole: Bytes,
    compression: Compression,
}

impl Deframer {
    /// For messages that may be compressed so.
    pub fn compressed(compression: Compression) -> Self {
        Self { compression, ..Self::default() }
    }

    /// Takes the next bytes of the body.
    pub fn push(&mut self, data: Bytes) {
        if self.received.is_empty() && self.whole.is_empty() {
            self.whole = data;
        } else {
            self.received.extend_from_slice(&std::mem::take(&mut self.whole));
            self.received.extend_from_slice(&data);
        }
    }

    /// The next whole message; `None` when bytes are missing.
    ///
    /// # Errors
    /// For a compressed message that cannot be unpacked, or that is too large then: see [`Compression`].
    pub fn pop(&mut self) -> Result<Option<Bytes>, Status> {
        let at_hand = self.at_hand();
        let (Some(&flag), Some((length, rest))) = (at_hand.first(), split(at_hand)) else { return Ok(None) };
        if rest.len() < length {
            return Ok(None);
        }
        let message = self.take(length);
        self.compression.unpack(flag, message).map(Some)
    }

    /// The length that the next message's prefix announces.
    pub fn announced(&self) -> Option<usize> {
        split(self.at_hand()).map(|(length, _)| length)
    }

    /// Refuses the next message if it announces more than `limit` bytes.
    ///
    /// # Errors
    /// ResourceExhausted, as Go's gRPC library words it.
    pub fn check_announced(&self, limit: usize) -> Result<(), Status> {
        match self.announced() {
            Some(length) if length > limit => Err(Status::new(
                Code::ResourceExhausted,
                format!("grpc: received message larger than max ({length} vs. {limit})"),
            )),
            _ => Ok(()),
        }
    }

    fn at_hand(&self) -> &[u8] {
        if self.received.is_empty() { &self.whole } else { &self.received }
    }

    fn take(&mut self, length: usize) -> Bytes {
        if self.received.is_empty() {
            self.whole.advance(PREFIX);
            return self.whole.split_to(length);
        }
        self.received.advance(PREFIX);
        self.received.split_to(length).freeze()
    }

    /// Whether the bytes so far end between two messages.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that have not been taken as messages.
    pub fn len(&self) -> usize {
        self.at_hand().len()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::frame, *};

    #[test]
    fn messages_come_out_whole_however_the_frames_are_cut() {
        // Bytes alone are a message of one field.
        let message = |size: usize| Bytes::from(vec![b'k'; size]);
        let messages: Vec<Bytes> = [0, 1, 300, 70_000].map(|size| frame(&message(size))).to_vec();
        let stream: Vec<u8> = messages.iter().flatten().copied().collect();
        for size in [1, 4, 5, 6, 1000, 16_384, stream.len()] {
            let mut deframer = Deframer::default();
            let mut seen = Vec::new();
            for cut in stream.chunks(size) {
                deframer.push(Bytes::copy_from_slice(cut));
                while let Some(message) = deframer.pop().unwrap() {
                    seen.push(message);
                }
            }
            let expected: Vec<Bytes> = messages.iter().map(|message| message.slice(PREFIX..)).collect();
            assert_eq!(seen, expected, "cut at {size}");
            assert!(deframer.is_empty());
        }
    }

    #[test]
    fn a_compressed_message_is_refused() {
        let mut deframer = Deframer::default();
        deframer.push(Bytes::from_static(&[1, 0, 0, 0, 0]));
        assert!(deframer.pop().is_err());
    }
}
