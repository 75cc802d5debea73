//! Range, RangeStream, Put, DeleteRange and Compact.

use futures_util::TryStreamExt;
use millpond::proto::etcdserverpb::{CompactionRequest, DeleteRangeRequest, PutRequest, RangeRequest};
use tonic::Code;

use crate::store::{Result, Store, bytes, everything, keys, put, range, refusal, revision};

const COMPACTED: &str = "etcdserver: mvcc: required revision has been compacted";
const FUTURE: &str = "etcdserver: mvcc: required revision is a future revision";

#[tokio::test]
async fn a_put_is_read_back_with_its_revisions() -> Result {
    let store = Store::open().await?;
    assert_eq!(store.put("a", "1").await?, 2);
    assert_eq!(store.put("b", "x").await?, 3);
    assert_eq!(store.put("a", "2").await?, 4);
    let found = store.range(range("a", "")).await?;
    let kv = found.kvs.first().ok_or("no key")?;
    assert_eq!((kv.create_revision, kv.mod_revision, kv.version, &kv.value[..]), (2, 4, 2, &b"2"[..]));
    let header = found.header.ok_or("no header")?;
    assert_eq!((header.revision, found.count, found.more), (4, 1, false));
    assert!(header.cluster_id != 0 && header.member_id != 0 && header.raft_term >= 1);
    Ok(())
}

#[tokio::test]
async fn a_key_that_comes_back_starts_over() -> Result {
    let store = Store::open().await?;
    store.put("a", "1").await?;
    assert_eq!(store.delete("a", "").await?, 1);
    assert_eq!(store.delete("a", "").await?, 0);
    assert_eq!(store.put("a", "2").await?, 4);
    let found = store.range(range("a", "")).await?;
    assert_eq!(found.kvs.first().map(|kv| (kv.create_revision, kv.version)), Some((4, 1)));
    Ok(())
}

#[tokio::test]
async fn ranges_come_in_every_form() -> Result {
    let store = Store::open().await?;
    for key in ["a", "b", "ba", "c", "d"] {
        store.put(key, "").await?;
    }
    let all = async |key, end| Ok::<_, Box<dyn std::error::Error>>(keys(&store.range(range(key, end)).await?));
    assert_eq!(all("b", "").await?, ["b"]);
    assert_eq!(all("b", "c").await?, ["b", "ba"]);
    assert_eq!(all("b", "\0").await?, ["b", "ba", "c", "d"]);
    assert_eq!(all("\0", "\0").await?, ["a", "b", "ba", "c", "d"]);
    assert!(all("c", "a").await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_limit_cuts_and_says_so() -> Result {
    let store = Store::open().await?;
    for key in ["a", "b", "c"] {
        store.put(key, "v").await?;
    }
    let limited = async |limit| {
        let found = store.range(RangeRequest { limit, ..everything() }).await?;
        Ok::<_, Box<dyn std::error::Error>>((found.kvs.len(), found.more, found.count))
    };
    assert_eq!(limited(2).await?, (2, true, 3));
    assert_eq!(limited(3).await?, (3, false, 3));
    assert_eq!(limited(0).await?, (3, false, 3));
    assert_eq!(limited(-1).await?, (3, false, 3));
    assert_eq!(limited(i64::MAX).await?, (3, false, 3));
    let counted = store.range(RangeRequest { count_only: true, limit: 1, min_mod_revision: 4, ..everything() }).await?;
    assert_eq!((counted.kvs.len(), counted.more, counted.count), (0, false, 3));
    Ok(())
}

#[tokio::test]
async fn filters_and_orders_apply_before_the_limit() -> Result {
    let store = Store::open().await?;
    for (key, value) in [("a", "3"), ("b", "2"), ("c", "1"), ("a", "0")] {
        store.put(key, value).await?;
    }
    let sorted = async |sort_target, sort_order| {
        let found = store.range(RangeRequest { sort_target, sort_order, limit: 2, ..everything() }).await?;
        Ok::<_, Box<dyn std::error::Error>>((keys(&found).concat(), found.more))
    };
    for (target, ascending, descending) in
        [(0, "ab", "cb"), (1, "bc", "ab"), (2, "ab", "cb"), (3, "bc", "ac"), (4, "ac", "bc")]
    {
        assert_eq!(sorted(target, 1).await?, (ascending.to_owned(), true), "target {target}");
        assert_eq!(sorted(target, 2).await?, (descending.to_owned(), true), "target {target}");
    }
    let filtered = async |request: RangeRequest| {
        let found = store.range(request).await?;
        Ok::<_, Box<dyn std::error::Error>>((keys(&found).concat(), found.count))
    };
    assert_eq!(filtered(RangeRequest { min_mod_revision: 4, ..everything() }).await?, ("ac".to_owned(), 3));
    assert_eq!(filtered(RangeRequest { max_mod_revision: 4, ..everything() }).await?, ("bc".to_owned(), 3));
    assert_eq!(filtered(RangeRequest { min_create_revision: 3, ..everything() }).await?, ("bc".to_owned(), 3));
    assert_eq!(filtered(RangeRequest { max_create_revision: -1, ..everything() }).await?, (String::new(), 3));
    Ok(())
}

#[tokio::test]
async fn old_revisions_are_read_until_they_are_compacted() -> Result {
    let store = Store::open().await?;
    store.put("a", "1").await?;
    store.put("a", "2").await?;
    store.delete("a", "").await?;
    store.put("b", "1").await?;
    let at = async |revision| store.kv().range(RangeRequest { revision, ..everything() }).await;
    for (revision, expected) in [(2, "1"), (3, "2")] {
        let found = at(revision).await?.into_inner();
        assert_eq!(found.kvs.first().map(|kv| &kv.value[..]), Some(expected.as_bytes()));
        assert_eq!(found.header.map(|header| header.revision), Some(5));
    }
    assert_eq!(at(4).await?.into_inner().count, 0);
    assert_eq!(refusal(at(6).await), (Code::OutOfRange, FUTURE.to_owned()));
    store.compact(3).await?;
    assert_eq!(refusal(at(2).await), (Code::OutOfRange, COMPACTED.to_owned()));
    assert_eq!(at(3).await?.into_inner().kvs.first().map(|kv| kv.version), Some(2));
    assert_eq!(refusal(store.compact(3).await), (Code::OutOfRange, COMPACTED.to_owned()));
    assert_eq!(refusal(store.compact(6).await), (Code::OutOfRange, FUTURE.to_owned()));
    let header = store.kv().compact(CompactionRequest { revision: 5, physical: false }).await?.into_inner().header;
    assert_eq!(revision(header)?, 5);
    Ok(())
}

#[tokio::test]
async fn many_versions_of_a_key_do_not_hide_its_neighbours() -> Result {
    let store = Store::open().await?;
    for key in ["a", "m", "z"] {
        store.put(key, "first").await?;
    }
    for round in 0..100 {
        store.put("m", &round.to_string()).await?;
    }
    let old = store.range(RangeRequest { revision: 4, ..everything() }).await?;
    assert_eq!(keys(&old), ["a", "m", "z"]);
    assert!(old.kvs.iter().all(|kv| &kv.value[..] == b"first"));
    let new = store.range(RangeRequest { limit: 2, ..everything() }).await?;
    assert_eq!((keys(&new), new.count), (vec!["a".to_owned(), "m".to_owned()], 3));
    store.compact(104).await?;
    assert_eq!(store.range(everything()).await?.kvs.iter().map(|kv| kv.version).collect::<Vec<_>>(), [1, 101, 1]);
    Ok(())
}

#[tokio::test]
async fn keys_only_leaves_out_value_and_lease() -> Result {
    let store = Store::open().await?;
    let lease = store.grant(7, 60).await?;
    store.put_with(PutRequest { lease, ..put("a", "v") }).await?;
    let found = store.range(RangeRequest { keys_only: true, ..everything() }).await?;
    assert_eq!(found.kvs.first().map(|kv| (kv.lease, kv.value.len(), kv.version)), Some((0, 0, 1)));
    let by_value = store.range(RangeRequest { keys_only: true, sort_target: 4, ..everything() }).await?;
    assert_eq!(by_value.kvs.first().map(|kv| (kv.lease, kv.value.len())), Some((7, 0)));
    Ok(())
}

#[tokio::test]
async fn a_put_can_keep_value_or_lease_and_return_what_was() -> Result {
    let store = Store::open().await?;
    store.grant(7, 60).await?;
    store.put_with(PutRequest { lease: 7, ..put("a", "1") }).await?;
    let keep_value = PutRequest { ignore_value: true, prev_kv: true, ..put("a", "") };
    let answer = store.kv().put(keep_value).await?.into_inner();
    assert_eq!(answer.prev_kv.map(|kv| (kv.lease, kv.value)), Some((7, bytes("1"))));
    store.grant(8, 60).await?;
    store.put_with(PutRequest { lease: 8, ..put("a", "2") }).await?;
    store.put_with(PutRequest { ignore_lease: true, ..put("a", "3") }).await?;
    let found = store.range(range("a", "")).await?;
    assert_eq!(found.kvs.first().map(|kv| (kv.lease, kv.value.clone())), Some((8, bytes("3"))));
    Ok(())
}

#[tokio::test]
async fn bad_puts_are_refused_in_etcds_words() -> Result {
    let store = Store::open().await?;
    let mut kv = store.kv();
    let invalid = |text: &str| (Code::InvalidArgument, format!("etcdserver: {text}"));
    assert_eq!(refusal(kv.put(put("", "v")).await), invalid("key is not provided"));
    let request = PutRequest { ignore_value: true, ..put("a", "v") };
    assert_eq!(refusal(kv.put(request).await), invalid("value is provided"));
    let request = PutRequest { ignore_lease: true, lease: 1, ..put("a", "v") };
    assert_eq!(refusal(kv.put(request).await), invalid("lease is provided"));
    let request = PutRequest { ignore_value: true, ..put("a", "") };
    assert_eq!(refusal(kv.put(request).await), invalid("key not found"));
    let request = PutRequest { lease: 1, ..put("a", "v") };
    assert_eq!(refusal(kv.put(request).await), (Code::NotFound, "etcdserver: requested lease not found".to_owned()));
    let large = PutRequest { value: vec![0; 3 << 19].into(), ..put("a", "") };
    assert_eq!(refusal(kv.put(large).await), invalid("request is too large"));
    let larger = PutRequest { value: vec![0; 5 << 19].into(), ..put("a", "") };
    let (code, text) = refusal(kv.put(larger).await);
    assert_eq!(code, Code::ResourceExhausted);
    assert!(text.starts_with("grpc: received message larger than max ("), "{text}");
    assert_eq!(store.range(everything()).await?.header.map(|header| header.revision), Some(1));
    Ok(())
}

#[tokio::test]
async fn bad_ranges_are_refused_in_etcds_words() -> Result {
    let store = Store::open().await?;
    let invalid = |text: &str| (Code::InvalidArgument, format!("etcdserver: {text}"));
    let refused = async |request| refusal(store.kv().range(request).await);
    assert_eq!(refused(RangeRequest { sort_order: 9, ..range("", "") }).await, invalid("key is not provided"));
    assert_eq!(refused(RangeRequest { sort_order: 3, ..everything() }).await, invalid("invalid sort option"));
    assert_eq!(refused(RangeRequest { sort_target: -1, ..everything() }).await, invalid("invalid sort option"));
    let stream = async |request| refusal(store.kv().range_stream(request).await);
    let unimplemented = |text: &str| (Code::Unimplemented, format!("RangeStream does not support {text}"));
    assert_eq!(stream(RangeRequest { sort_order: 2, ..everything() }).await, unimplemented("custom sort orders"));
    assert_eq!(stream(RangeRequest { min_mod_revision: 2, ..everything() }).await, unimplemented("revision filters"));
    Ok(())
}

#[tokio::test]
async fn a_deletion_returns_what_it_deleted() -> Result {
    let store = Store::open().await?;
    for key in ["a", "b", "c"] {
        store.put(key, key).await?;
    }
    let request = DeleteRangeRequest { key: bytes("a"), range_end: bytes("c"), prev_kv: true };
    let answer = store.kv().delete_range(request).await?.into_inner();
    assert_eq!((answer.deleted, revision(answer.header)?), (2, 5));
    let values: Vec<_> = answer.prev_kvs.iter().map(|kv| kv.value.clone()).collect();
    assert_eq!(values, [bytes("a"), bytes("b")]);
    let nothing = DeleteRangeRequest { key: bytes("a"), range_end: bytes("c"), prev_kv: true };
    let answer = store.kv().delete_range(nothing).await?.into_inner();
    assert_eq!((answer.deleted, revision(answer.header)?), (0, 5));
    let empty = DeleteRangeRequest::default();
    let expected = (Code::InvalidArgument, "etcdserver: key is not provided".to_owned());
    assert_eq!(refusal(store.kv().delete_range(empty).await), expected);
    Ok(())
}

#[tokio::test]
async fn a_streamed_range_is_the_range_in_pieces() -> Result {
    let store = Store::open().await?;
    for key in 0..100 {
        store.put(&format!("key{key:03}"), &"v".repeat(1000)).await?;
    }
    for limit in [0, 1, 10, 11, 37, 100, 200] {
        let request = RangeRequest { limit, ..everything() };
        let whole = store.range(request.clone()).await?;
        let stream = store.kv().range_stream(request).await?.into_inner();
        let pieces: Vec<_> = stream.try_collect().await?;
        let pieces: Vec<_> = pieces.into_iter().filter_map(|piece| piece.range_response).collect();
        let (last, before) = pieces.split_last().ok_or("an empty stream")?;
        assert!(before.iter().all(|piece| piece.header.is_none() && !piece.more && piece.count == 0));
        assert_eq!((last.header, last.more, last.count), (whole.header, whole.more, whole.count), "limit {limit}");
        let kvs: Vec<_> = pieces.iter().flat_map(|piece| piece.kvs.clone()).collect();
        assert_eq!(kvs, whole.kvs);
    }
    let counted = store.kv().range_stream(RangeRequest { count_only: true, ..everything() }).await?.into_inner();
    let pieces: Vec<_> = counted.try_collect().await?;
    assert_eq!(
        pieces.iter().filter_map(|piece| piece.range_response.as_ref()).map(|r| r.count).collect::<Vec<_>>(),
        [100]
    );
    Ok(())
}

#[tokio::test]
async fn pages_at_one_revision_count_what_remains_whatever_is_written_meanwhile() -> Result {
    let store = Store::open().await?;
    for key in 0..50 {
        store.put(&format!("key{key:03}"), "v").await?;
    }
    let first = store.range(RangeRequest { limit: 20, ..everything() }).await?;
    let (revision, mut seen) = (revision(first.header)?, keys(&first));
    assert_eq!((first.count, first.more), (50, true));
    store.delete("key0", "\0").await?;
    store.put("key000", "again").await?;
    while seen.len() < 50 {
        let key = format!("{}\0", seen.last().ok_or("no key")?);
        let left = 50 - seen.len() as i64;
        let page = store.range(RangeRequest { limit: 20, revision, ..range(&key, "\0") }).await?;
        assert_eq!((page.count, page.more), (left, left > 20));
        let other_end = store.range(RangeRequest { limit: 1, revision, ..range(&key, "key045") }).await?;
        assert_eq!(other_end.count, (left - 5).max(0));
        seen.extend(keys(&page));
    }
    assert_eq!(store.range(RangeRequest { limit: 20, ..everything() }).await?.count, 1);
    Ok(())
}

#[tokio::test]
async fn concurrent_writes_each_get_a_revision() -> Result {
    let store = Store::open().await?;
    let mut writes = tokio::task::JoinSet::new();
    for writer in 0..200 {
        let mut kv = store.kv();
        // Every tenth is refused, in the middle of whatever group it shares.
        let lease = if writer % 10 == 0 { 99 } else { 0 };
        writes.spawn(async move { kv.put(PutRequest { lease, ..put(&format!("k{writer}"), "v") }).await });
    }
    let mut revisions = Vec::new();
    let mut refused = 0;
    while let Some(result) = writes.join_next().await {
        match result? {
            Ok(answer) => revisions.push(revision(answer.into_inner().header)?),
            Err(status) => refused += i32::from(status.code() == Code::NotFound),
        }
    }
    revisions.sort_unstable();
    assert_eq!((revisions, refused), ((2..182).collect(), 20));
    assert_eq!(store.range(everything()).await?.count, 180);
    Ok(())
}
