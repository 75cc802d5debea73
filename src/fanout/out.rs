//! What a stream is to send next.

use bytes::{Bytes, BytesMut};

/// gRPC frames that a session has put out: its own, or some that other streams send as well.
#[derive(Debug, Default)]
pub struct Out {
    own: BytesMut,
    /// Frames that other streams hold references to. While there are any, there are none of its own.
    shared: Option<Bytes>,
}

impl Out {
    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.bytes().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes().is_empty()
    }

    /// What there is.
    pub fn bytes(&self) -> &[u8] {
        self.shared.as_deref().unwrap_or(&self.own)
    }

    /// Where more is appended.
    pub fn own(&mut self) -> &mut BytesMut {
        if let Some(shared) = self.shared.take() {
            self.own.extend_from_slice(&shared);
        }
        &mut self.own
    }

    /// Takes everything out.
    pub fn take(&mut self) -> Bytes {
        self.shared.take().unwrap_or_else(|| std::mem::take(&mut self.own).freeze())
    }

    /// Lets go of everything from `length` on, and of the room that it took.
    pub fn cut(&mut self, length: usize) {
        *self = Self { own: self.bytes()[..length].into(), shared: None };
    }

    /// Puts out what other streams send too, where there was nothing.
    pub(super) fn put_shared(&mut self, shared: Bytes) {
        debug_assert!(self.is_empty(), "what was put out before comes first");
        self.shared = Some(shared);
    }

    /// Everything, for other streams to send too.
    pub(super) fn share(&mut self) -> Bytes {
        let shared = self.take();
        self.shared = Some(shared.clone());
        shared
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_appended_follows_what_is_shared() {
        let mut out = Out::default();
        assert!(out.is_empty());
        out.own().extend_from_slice(b"one");
        let shared = out.share();
        assert_eq!((out.len(), out.bytes()), (3, &b"one"[..]));
        let mut other = Out::default();
        other.put_shared(shared.clone());
        assert_eq!(other.take().as_ptr(), shared.as_ptr(), "nothing is copied");
        other.own().extend_from_slice(b"other");
        assert_eq!(other.take(), "other");
        out.own().extend_from_slice(b"two");
        assert_eq!((&out.take()[..], &shared[..]), (&b"onetwo"[..], &b"one"[..]));
        assert!(out.is_empty());
        out.put_shared(shared);
        out.cut(2);
        assert_eq!(out.take(), "on");
    }
}
