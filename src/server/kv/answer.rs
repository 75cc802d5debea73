//! Range answers put together from the bytes of records. A large one is sent piece by piece, as the client takes it, so that
//! neither it nor the state that it tells of stays in memory as a whole for a client that does not.

use std::iter::once;

use ::http::Response;
use bytes::{BufMut, Bytes, BytesMut};

use super::held::{Held, Holder, Rest};
use crate::{
    server::{
        body::{Body, BodyError},
        data::{Data, List},
        response::{self, check_length},
    },
    status::Status,
    store::{
        Record, Sums, View,
        range::{Records, Selection},
        wire::{bytes_field_len, int_field_len, put_bytes_head, put_int_field},
    },
    upstream::grpc::{PREFIX, prefix},
};

/// Above this many bytes an answer is sent piece by piece.
const EAGER: u64 = 256 << 10;
/// Up to this many bytes an answer is copied together before it is sent.
const SHORT: u64 = 16 << 10;
/// Records of at least so many bytes, on average, are sent without being copied together: a reference has its price too.
const LARGE: u64 = 256;
/// About what a record takes without its value.
const WITHOUT_VALUE: u64 = 96;
/// Bytes in one piece of copies.
const PIECE: usize = 64 << 10;
/// Bytes in one piece of references, which takes no memory but for records that are overwritten before it has left.
const LONG_PIECE: usize = 256 << 10;

const KVS: u8 = 2;
const MORE: u8 = 3;
const COUNT: u8 = 4;

/// Whether an answer carries values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Values {
    /// It does.
    Sent,
    /// It does not.
    LeftOut,
    /// It does not, and no lease either.
    LeftOutWithLease,
}

/// Appends `record` as one of an answer's records.
pub(super) fn put_record(out: &mut impl BufMut, record: &Record, values: Values) {
    if values == Values::Sent {
        return out.put_slice(record.field());
    }
    let (before, lease) = record.wire_without_value();
    let lease = if values == Values::LeftOut { lease } else { &[] };
    put_bytes_head(out, KVS, before.len() + lease.len());
    out.put_slice(before);
    out.put_slice(lease);
}

/// How many bytes [`put_record`] appends.
pub(super) fn record_len(record: &Record, values: Values) -> usize {
    if values == Values::Sent {
        return record.field().len();
    }
    let (before, lease) = record.wire_without_value();
    bytes_field_len(before.len() + if values == Values::LeftOut { lease.len() } else { 0 })
}

/// The fields after the records.
fn tail(selection: &Selection) -> Vec<u8> {
    let mut tail = Vec::with_capacity(16);
    put_int_field(&mut tail, MORE, selection.more.into());
    put_int_field(&mut tail, COUNT, selection.count as i64);
    tail
}

/// The answer to a Range request.
///
/// # Errors
/// As [`check_length`], when it is longer than `limit`.
pub(super) fn range(
    holder: &Holder,
    view: &View,
    selection: Selection,
    values: Values,
    limit: u64,
) -> Result<Response<Body>, Status> {
    let tail = tail(&selection);
    let records = selection.records;
    let sums = match values {
        Values::Sent => records.sums(),
        Values::LeftOut | Values::LeftOutWithLease => Sums { keys: records.len(), wire: records.len() * WITHOUT_VALUE },
    };
    if values == Values::Sent && (sums.wire > EAGER || is_referred(sums)) {
        return large(holder, view, records, sums, tail.into(), limit);
    }
    let mut out = BytesMut::with_capacity(PREFIX + 64 + sums.wire as usize);
    out.put_slice(&[0; PREFIX]);
    view.responder.put(&mut out, view.revision());
    put_records(&mut out, &records, values);
    out.put_slice(&tail);
    let length = out.len() - PREFIX;
    check_length(length as u64, limit)?;
    out[..PREFIX].copy_from_slice(&prefix(length));
    Ok(response::framed(out.freeze()))
}

/// A `RangeResponse` as it stands inside a transaction's answer, whose header has only a revision.
pub(super) fn nested_range(view: &View, selection: &Selection, values: Values) -> Vec<u8> {
    let mut out = Vec::new();
    put_bytes_head(&mut out, 1, int_field_len(view.revision().0));
    put_int_field(&mut out, 3, view.revision().0);
    put_records(&mut out, &selection.records, values);
    out.extend_from_slice(&tail(selection));
    out
}

fn put_records(out: &mut impl BufMut, records: &Records, values: Values) {
    records.for_each(|record| put_record(out, record, values));
}

/// Whether records are sent as they lie rather than copied together first.
fn is_referred(sums: Sums) -> bool {
    sums.wire > SHORT && sums.wire >= sums.keys * LARGE
}

fn large(
    holder: &Holder,
    view: &View,
    records: Records,
    sums: Sums,
    tail: Bytes,
    limit: u64,
) -> Result<Response<Body>, Status> {
    let header = view.responder.field_len(view.revision());
    let length = header as u64 + sums.wire + tail.len() as u64;
    check_length(length, limit)?;
    let mut head = BytesMut::with_capacity(PREFIX + header);
    head.put_slice(&prefix(length as usize));
    view.responder.put(&mut head, view.revision());
    let (head, mut rest) = (head.freeze(), Rest::from(records));
    if sums.wire > EAGER {
        let pieces = Pieces { rest: Some(holder.hold(rest)), are_referred: is_referred(sums) };
        return Ok(response::pieces(once(Ok(head.into())).chain(pieces).chain(once(Ok(tail.into())))));
    }
    let mut list = List::default();
    list.push_bytes(head);
    rest.refer(&mut list, usize::MAX);
    list.push_bytes(tail);
    Ok(response::framed(list))
}

/// The records of a large answer, piece by piece.
struct Pieces {
    rest: Option<Held>,
    are_referred: bool,
}

impl Iterator for Pieces {
    type Item = Result<Data, BodyError>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.rest.as_mut()?;
        let piece = if self.are_referred { refer(rest) } else { copy(rest) };
        if !matches!(piece, Ok((_, false))) {
            self.rest = None;
        }
        Some(piece.map(|(piece, _)| piece))
    }
}

/// The next piece of references, and whether it is the last.
fn refer(rest: &mut Held) -> Result<(Data, bool), BodyError> {
    let mut piece = List::default();
    let last = rest.refer(&mut piece, LONG_PIECE)?;
    Ok((piece.into(), last))
}

/// The next piece of copies, and whether it is the last.
fn copy(rest: &mut Held) -> Result<(Data, bool), BodyError> {
    let mut piece = BytesMut::with_capacity(PIECE);
    let last = rest.hand_out(|record| {
        piece.put_slice(record.field());
        piece.len() < PIECE
    })?;
    Ok((piece.freeze().into(), last))
}

/// How long `RangeStreamResponse`s and their like are around an inner message of `length` bytes.
pub(super) fn wrapped_len(length: usize) -> usize {
    bytes_field_len(length)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http_body_util::BodyExt;
    use prost::Message;

    use super::*;
    use crate::{
        proto::etcdserverpb::{RangeRequest, RangeResponse},
        store::{
            Limits, Position, Responder, Revision, Store,
            range::{range_of, select},
        },
    };

    fn view(keys: u32, size: usize) -> Arc<View> {
        let (store, mut writer) = Store::new(Limits { bytes: usize::MAX, age: u64::MAX });
        let key = |number: u32| format!("k{number:05}").into_bytes();
        let record = |number| Record::new(&key(number), &vec![b'v'; size], Revision(2), Revision(3), 1, 5);
        writer.set_responder(Responder { cluster_id: 9, member_id: 8, raft_term: 7 });
        writer.reset(Position { epoch: 1, revision: Revision(10) }, Some((0..keys).map(record).collect()));
        writer.publish(0);
        store.view_owned()
    }

    async fn answer(view: &View, request: &RangeRequest, values: Values) -> RangeResponse {
        let selection = select(view, &range_of(request), request).unwrap();
        let response = range(&holder(), view, selection, values, u64::MAX).unwrap();
        RangeResponse::decode(message(response).await).unwrap()
    }

    fn holder() -> Arc<Holder> {
        Holder::new(prometheus::IntCounter::new("given_up", "for the test").unwrap())
    }

    async fn message(response: Response<Body>) -> Bytes {
        let body = response.into_body().collect().await.unwrap();
        assert!(body.trailers().is_some());
        let bytes = body.to_bytes();
        assert_eq!(bytes[..PREFIX], prefix(bytes.len() - PREFIX));
        bytes.slice(PREFIX..)
    }

    fn everything(limit: i64) -> RangeRequest {
        let zero = Bytes::from_static(&[0]);
        RangeRequest { key: zero.clone(), range_end: zero, limit, ..Default::default() }
    }

    #[tokio::test]
    async fn answers_of_any_size_decode_to_what_was_selected() {
        for (keys, size, limit) in [(0, 0, 0), (3, 10, 0), (5000, 300, 0), (5000, 300, 1234)] {
            let view = view(keys, size);
            let answer = answer(&view, &everything(limit), Values::Sent).await;
            let expected = if limit > 0 { limit as u32 } else { keys };
            assert_eq!((answer.kvs.len() as u32, answer.count as u32), (expected, keys));
            assert_eq!(answer.more, expected < keys);
            assert_eq!(answer.header.as_ref().map(|header| (header.revision, header.cluster_id)), Some((10, 9)));
            assert!(
                answer.kvs.iter().enumerate().all(|(n, kv)| kv.key == format!("k{n:05}") && kv.value.len() == size)
            );
        }
    }

    #[tokio::test]
    async fn values_and_leases_are_left_out_where_they_must_be() {
        let view = view(3, 10);
        let bare = answer(&view, &everything(0), Values::LeftOutWithLease).await;
        assert!(bare.kvs.iter().all(|kv| kv.value.is_empty() && kv.lease == 0 && kv.version == 1));
        let leased = answer(&view, &everything(0), Values::LeftOut).await;
        assert!(leased.kvs.iter().all(|kv| kv.value.is_empty() && kv.lease == 5));
    }

    #[tokio::test]
    async fn an_answer_above_the_limit_is_refused_by_its_length() {
        for (keys, size) in [(3, 10), (5000, 4), (5000, 300), (100_000, 4), (20, 1000)] {
            let view = view(keys, size);
            for values in [Values::Sent, Values::LeftOut] {
                let select = || select(&view, &range_of(&everything(0)), &everything(0)).unwrap();
                let given = range(&holder(), &view, select(), values, u64::MAX).unwrap();
                let length = message(given).await.len() as u64;
                assert!(range(&holder(), &view, select(), values, length).is_ok());
                let refused = range(&holder(), &view, select(), values, length - 1).err().unwrap();
                assert_eq!(Err(refused), check_length(length, length - 1));
            }
        }
    }
}
