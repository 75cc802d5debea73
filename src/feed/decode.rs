//! Takes etcd's answers apart as far as a store needs it: records stay bytes.

use prost::Message;

use super::End;
use crate::{
    proto::etcdserverpb::ResponseHeader,
    store::{Change, EventKind, MalformedRecord, Record, Revision, wire::Fields, wire::Malformed},
};

impl From<Malformed> for End {
    fn from(error: Malformed) -> Self {
        Self::Unreadable(error.to_string())
    }
}

impl From<MalformedRecord> for End {
    fn from(error: MalformedRecord) -> Self {
        Self::Unreadable(error.to_string())
    }
}

/// One page or chunk of a list.
#[derive(Debug, Default)]
pub(super) struct Page {
    pub(super) header: Option<ResponseHeader>,
    pub(super) records: Vec<Record>,
    pub(super) more: bool,
    pub(super) count: u64,
}

impl Page {
    /// Reads a `RangeResponse`.
    pub(super) fn decode(message: &[u8]) -> Result<Self, End> {
        let mut page = Self::default();
        for field in Fields::of(message) {
            let field = field?;
            match field.number {
                1 => page.header = Some(header(field.value.bytes())?),
                2 => page.records.push(Record::from_wire(field.value.bytes())?),
                3 => page.more = field.value.int() != 0,
                4 => page.count = field.value.int().cast_unsigned(),
                _ => {}
            }
        }
        Ok(page)
    }

    /// Reads a `RangeStreamResponse`.
    pub(super) fn decode_chunk(message: &[u8]) -> Result<Self, End> {
        for field in Fields::of(message) {
            let field = field?;
            if field.number == 1 {
                return Self::decode(field.value.bytes());
            }
        }
        Ok(Self::default())
    }
}

/// A `WatchResponse`.
#[derive(Debug, Default)]
pub(super) struct Response {
    pub(super) header: ResponseHeader,
    pub(super) created: bool,
    pub(super) canceled: bool,
    pub(super) compacted: Revision,
    pub(super) reason: String,
    pub(super) changes: Vec<Change>,
}

impl Response {
    pub(super) fn decode(message: &[u8]) -> Result<Self, End> {
        let mut response = Self::default();
        for field in Fields::of(message) {
            let field = field?;
            match field.number {
                1 => response.header = header(field.value.bytes())?,
                3 => response.created = field.value.int() != 0,
                4 => response.canceled = field.value.int() != 0,
                5 => response.compacted = Revision(field.value.int()),
                6 => response.reason = String::from_utf8_lossy(field.value.bytes()).into_owned(),
                11 => response.changes.push(change(field.value.bytes())?),
                _ => {}
            }
        }
        Ok(response)
    }
}

fn header(bytes: &[u8]) -> Result<ResponseHeader, End> {
    ResponseHeader::decode(bytes).map_err(|error| End::Unreadable(error.to_string()))
}

fn change(bytes: &[u8]) -> Result<Change, End> {
    let (mut kind, mut record, mut previous) = (EventKind::Put, None, None);
    for field in Fields::of(bytes) {
        let field = field?;
        match field.number {
            1 if field.value.int() == 1 => kind = EventKind::Delete,
            2 => record = Some(Record::from_wire(field.value.bytes())?),
            3 => previous = Some(Record::from_wire(field.value.bytes())?),
            _ => {}
        }
    }
    let record = record.ok_or_else(|| End::Unreadable("an event without a key".into()))?;
    Ok(Change { kind, record, previous })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{
        etcdserverpb::{RangeResponse, WatchResponse},
        mvccpb::{Event, KeyValue},
    };
    use proptest::prelude::*;

    fn kv(key: &'static str, revision: i64) -> KeyValue {
        KeyValue { key: key.into(), mod_revision: revision, create_revision: 1, version: 2, ..Default::default() }
    }

    #[test]
    fn a_watch_response_keeps_its_events_as_they_were_sent() {
        let header = ResponseHeader { revision: 9, raft_term: 2, ..Default::default() };
        let event = Event { r#type: 1, kv: Some(kv("a", 9)), prev_kv: Some(kv("a", 4)) };
        let sent = WatchResponse {
            header: Some(header),
            created: true,
            compact_revision: 3,
            events: vec![event],
            ..Default::default()
        };
        let read = Response::decode(&sent.encode_to_vec()).unwrap();
        assert_eq!((read.header, read.created, read.compacted), (header, true, Revision(3)));
        assert_eq!(read.changes[0].kind, EventKind::Delete);
        assert_eq!(read.changes[0].record.wire(), kv("a", 9).encode_to_vec());
        assert_eq!(read.changes[0].previous.as_ref().map(|record| record.mod_revision()), Some(Revision(4)));
    }

    #[test]
    fn a_page_keeps_its_records_as_they_were_sent() {
        let sent = RangeResponse { kvs: vec![kv("a", 2), kv("b", 3)], more: true, count: 7, ..Default::default() };
        let page = Page::decode(&sent.encode_to_vec()).unwrap();
        assert!(page.more && page.header.is_none());
        assert_eq!(page.records.iter().map(|record| record.key()).collect::<Vec<_>>(), [b"a", b"b"]);
    }

    #[test]
    fn a_chunk_that_cannot_be_read_is_not_taken_for_an_empty_one() {
        assert!(matches!(Page::decode_chunk(&[0x0a, 200]), Err(End::Unreadable(_))));
        assert!(Page::decode_chunk(&[]).is_ok_and(|page| page.records.is_empty()));
    }

    proptest! {
        #[test]
        fn garbage_is_an_error_and_never_a_panic(garbage: Vec<u8>) {
            let _ = (Page::decode(&garbage), Page::decode_chunk(&garbage), Response::decode(&garbage));
        }
    }
}
