//! What a stream is to send next.

use bytes::{Bytes, BytesMut};

/// gRPC frames that a session has put out: its own, or some that other streams send as well.
#[derive(Debug, Default)]
pub struct Out {
    own: BytesMut,
    /// Frames that other streams may hold references to. While there are any, there are none of its own.
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
    pub fn append(&mut self) -> &mut BytesMut {
        if let Some(shared) = self.shared.take() {
            self.own.extend_from_slice(&shared);
        }
        &mut self.own
    }

    /// Takes everything out.
    pub fn take(&mut self) -> Bytes {
        self.shared.take().unwrap_or_else(|| {
            let own = std::mem::take(&mut self.own);
            // What waits for a slow client is counted by what it says, and is to take no more room than that.
            if own.len() < own.capacity() / 2 { Bytes::copy_from_slice(&own) } else { own.freeze() }
        })
    }

    /// Makes room for `count` responses of up to `each` bytes at once, since what grows is copied each time. None of them will
    /// begin where `budget` bytes are before it.
    pub(super) fn make_room(&mut self, count: usize, each: usize, budget: usize) {
        let own = self.append();
        let left = budget.saturating_sub(own.len()).saturating_add(each);
        own.reserve(count.saturating_mul(each).min(left));
    }

    /// Lets go of everything from `length` on, and of the room that it took.
    pub fn cut(&mut self, length: usize) {
        *self = Self { own: self.bytes()[..length].into(), shared: None };
    }

    /// Puts out what other streams send too.
    pub(super) fn put_shared(&mut self, shared: Bytes) {
        match self.is_empty() {
            true => self.shared = Some(shared),
            false => self.append().extend_from_slice(&shared),
        }
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
        out.append().extend_from_slice(b"one");
        let shared = out.share();
        assert_eq!((out.len(), out.bytes()), (3, &b"one"[..]));
        let mut other = Out::default();
        other.put_shared(shared.clone());
        assert_eq!(other.take().as_ptr(), shared.as_ptr(), "nothing is copied");
        other.append().extend_from_slice(b"other");
        assert_eq!(other.take(), "other");
        out.append().extend_from_slice(b"two");
        assert_eq!((&out.take()[..], &shared[..]), (&b"onetwo"[..], &b"one"[..]));
        assert!(out.is_empty());
        out.put_shared(shared);
        out.put_shared(Bytes::from_static(b"two"));
        out.cut(4);
        assert_eq!(out.take(), "onet");
    }

    #[test]
    fn room_is_made_once_and_what_takes_little_of_it_is_sent_without_the_rest() {
        const EACH: usize = 500;
        let mut out = Out::default();
        out.make_room(10, EACH, 2 * EACH);
        let room = out.append().capacity();
        assert!((3 * EACH..4 * EACH).contains(&room), "two within the budget, and one that begins there: {room}");
        out.append().extend_from_slice(&[7; EACH]);
        out.make_room(10, EACH, 2 * EACH);
        assert_eq!(out.append().capacity(), room);
        out.append().truncate(1);
        let sent = out.take().try_into_mut().unwrap();
        assert_eq!((&sent[..], sent.capacity() < EACH), (&[7][..], true));
    }
}
