//! `WatchResponse`s as gRPC frames, put together from the bytes of records without encoding those again.

use bytes::{BufMut, BytesMut};

use crate::store::{
    Event, EventKind, HeaderField,
    wire::{bytes_field_len, int_field_len, put_bytes_head, put_int_field},
};

/// Bytes before every gRPC message: a flag and the message's length.
pub const FRAME_HEAD: usize = 5;

/// The most that stands before a response's reason and events: the frame's head, the header and four numbers.
pub(super) const LONGEST_HEAD: usize = FRAME_HEAD + HeaderField::LONGEST + 4 * int_field_len(-1);

/// Everything of a `WatchResponse` but its header, which may be that of many, and its events.
#[derive(Clone, Debug, Default)]
pub struct Envelope {
    /// The watcher; -1 for all of a stream.
    pub watch_id: i64,
    /// The watcher has been created (or refused, with `canceled`).
    pub created: bool,
    /// The watcher has ended.
    pub canceled: bool,
    /// The compaction that ended it.
    pub compact_revision: i64,
    /// Why it was refused.
    pub cancel_reason: String,
    /// More of the same response follows.
    pub fragment: bool,
}

impl Envelope {
    fn len(&self) -> usize {
        int_field_len(self.watch_id)
            + 2 * (usize::from(self.created) + usize::from(self.canceled) + usize::from(self.fragment))
            + int_field_len(self.compact_revision)
            + if self.cancel_reason.is_empty() { 0 } else { bytes_field_len(self.cancel_reason.len()) }
    }

    /// How long the message is under `header` with `events` bytes of events.
    pub fn message_len(&self, header: &HeaderField, events: usize) -> usize {
        header.len() + self.len() + events
    }

    /// Appends one gRPC frame: `header`, and this envelope around events that are encoded already.
    pub fn put(&self, out: &mut BytesMut, header: &HeaderField, events: &[u8]) {
        let length = self.message_len(header, events.len());
        out.reserve(FRAME_HEAD + length);
        // Byte by byte into what grows would cost more than all of this.
        let mut head = [0; LONGEST_HEAD];
        let mut rest = &mut head[..];
        rest.put_u8(0);
        rest.put_u32(announced(length));
        rest.put_slice(header);
        put_int_field(&mut rest, 2, self.watch_id);
        put_int_field(&mut rest, 3, self.created.into());
        put_int_field(&mut rest, 4, self.canceled.into());
        put_int_field(&mut rest, 5, self.compact_revision);
        let length = LONGEST_HEAD - rest.len();
        out.put_slice(&head[..length]);
        if !self.cancel_reason.is_empty() {
            put_bytes_head(out, 6, self.cancel_reason.len());
            out.put_slice(self.cancel_reason.as_bytes());
        }
        put_int_field(out, 7, self.fragment.into());
        out.put_slice(events);
    }
}

/// The length that a frame's head tells. One above 4 GiB cannot be told, and must not pass for a short one: nobody is to send it.
fn announced(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// How many bytes [`put_event`] appends.
pub fn event_len(event: &Event, prev_kv: bool) -> usize {
    bytes_field_len(event_body_len(event, prev_kv))
}

fn event_body_len(event: &Event, prev_kv: bool) -> usize {
    let previous = event.previous.as_ref().filter(|_| prev_kv);
    int_field_len((event.kind == EventKind::Delete).into())
        + event.record.field().len()
        + previous.map_or(0, |previous| bytes_field_len(previous.wire().len()))
}

/// Appends `event` as one of a response's events, with the previous version if it is wanted and there is one.
pub fn put_event(out: &mut impl BufMut, event: &Event, prev_kv: bool) {
    put_bytes_head(out, 11, event_body_len(event, prev_kv));
    put_int_field(out, 1, (event.kind == EventKind::Delete).into());
    out.put_slice(event.record.field());
    if let Some(previous) = event.previous.as_ref().filter(|_| prev_kv) {
        put_bytes_head(out, 3, previous.wire().len());
        out.put_slice(previous.wire());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        proto::{
            etcdserverpb::WatchResponse,
            mvccpb::{self, event::EventType},
        },
        store::{Record, Responder, Revision},
    };
    use prost::Message;

    #[test]
    fn a_length_that_cannot_be_told_does_not_pass_for_a_short_one() {
        for (length, told) in [(5, 5), (u32::MAX as usize, u32::MAX), ((1 << 32) + 5, u32::MAX)] {
            assert_eq!(announced(length), told);
        }
    }

    #[test]
    fn a_response_decodes_to_what_was_meant() {
        let responder = Responder { cluster_id: u64::MAX, member_id: 7, raft_term: 3 };
        let event = Event {
            kind: EventKind::Delete,
            record: Record::tombstone(b"k", Revision(9)),
            previous: Some(Record::new(b"k", b"old", Revision(2), Revision(5), 2, 77)),
        };
        let mut events = vec![];
        put_event(&mut events, &event, true);
        assert_eq!(events.len(), event_len(&event, true));
        let envelope = Envelope {
            watch_id: -1,
            created: true,
            canceled: true,
            compact_revision: 4,
            cancel_reason: "why".into(),
            fragment: true,
        };
        let mut out = BytesMut::new();
        let header = responder.field(Revision(9));
        envelope.put(&mut out, &header, &events);
        assert_eq!(out.len(), FRAME_HEAD + envelope.message_len(&header, events.len()));
        let decoded = WatchResponse::decode(&out[FRAME_HEAD..]).unwrap();
        assert_eq!(decoded.header, Some(responder.header(Revision(9))));
        assert_eq!((decoded.watch_id, decoded.compact_revision, &decoded.cancel_reason[..]), (-1, 4, "why"));
        assert!(decoded.created && decoded.canceled && decoded.fragment);
        let [event] = &decoded.events[..] else { panic!("one event") };
        assert_eq!(event.r#type(), EventType::Delete);
        assert_eq!(event.kv, Some(mvccpb::KeyValue { key: "k".into(), mod_revision: 9, ..Default::default() }));
        assert_eq!(event.prev_kv.as_ref().map(|kv| (kv.lease, kv.version)), Some((77, 2)));
    }
}
