//! Answers of every size, with and without values.

use std::sync::Arc;

use bytes::Buf;
use http_body_util::BodyExt;
use prost::Message;

use super::*;
use crate::{
    proto::{
        etcdserverpb::{
            RangeRequest, RangeResponse, ResponseHeader, TxnResponse, response_op::Response::ResponseRange,
        },
        mvccpb::KeyValue,
    },
    rules::range::range_of,
    store::{Limits, Position, Responder, Revision, Store, range::select},
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
        assert!(answer.kvs.iter().enumerate().all(|(n, kv)| kv.key == format!("k{n:05}") && kv.value.len() == size));
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
async fn keys_of_any_number_decode_to_what_was_selected() {
    for keys in [0, 1, 3000, 100_000] {
        let view = view(keys, 10);
        for (order, values) in [(0, Values::LeftOut), (2, Values::LeftOutWithLease)] {
            let request = RangeRequest { sort_order: order, ..everything(0) };
            let answer = answer(&view, &request, values).await;
            assert_eq!((answer.kvs.len() as u32, answer.count as u32), (keys, keys));
            let number = |n: usize| if order == 2 { keys as usize - 1 - n } else { n };
            let is_right = |(n, kv): (usize, &KeyValue)| kv.key == format!("k{:05}", number(n));
            assert!(answer.kvs.iter().enumerate().all(is_right));
            assert!(answer.kvs.iter().all(|kv| kv.value.is_empty() && (kv.lease == 5) == (order == 0)));
        }
    }
}

/// All the keys used to be copied together, for as long as their client liked.
#[tokio::test]
async fn many_keys_are_not_kept_for_a_client_that_does_not_read_them() {
    let given_up = prometheus::IntCounter::new("given_up", "for the test").unwrap();
    let (holder, view) = (Holder::new(given_up.clone()), view(100_000, 10));
    let selection = select(&view, &range_of(&everything(0)), &everything(0)).unwrap();
    let response = range(&holder, &view, selection, Values::LeftOut, u64::MAX).unwrap();
    let mut body = response.into_body();
    let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert!(first.remaining() < EAGER_WALK + (128 << 10), "{}", first.remaining());
    (0..10).for_each(|_| holder.sweep());
    assert_eq!(given_up.get(), 1);
    assert!(body.frame().await.unwrap().is_err());
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

/// The records and the order of the answers to some reads, however large these are together.
#[tokio::test]
async fn the_reads_of_a_transaction_decode_to_what_was_selected() {
    let view = view(5000, 300);
    let few = RangeRequest { limit: 3, ..everything(0) };
    let sorted = RangeRequest { sort_order: 2, sort_target: 3, ..everything(0) };
    let nothing = RangeRequest { key: "x".into(), ..Default::default() };
    for reads in [vec![], vec![&few, &nothing], vec![&few, &everything(0), &nothing, &few, &sorted, &everything(7)]] {
        for values in [Values::Sent, Values::LeftOut] {
            let select = |read| select(&view, &range_of(read), read).unwrap();
            let nested = reads.iter().map(|read| nested_range(&view, select(read), values));
            let all: Vec<_> = once(opening(&view, true)).chain(nested).collect();
            let length = all.iter().map(Section::len).sum();
            let answer = TxnResponse::decode(message(sections(&holder(), all, length)).await).unwrap();
            assert!(answer.succeeded && answer.header == Some(view.responder.header(view.revision())));
            assert_eq!(answer.responses.len(), reads.len());
            for (read, found) in reads.iter().zip(answer.responses) {
                let Some(ResponseRange(found)) = found.response else { panic!("the answer to a read") };
                let mut expected = self::answer(&view, read, values).await;
                expected.header = Some(ResponseHeader { revision: 10, ..Default::default() });
                assert!(found == expected, "{read:?}");
            }
        }
    }
}
