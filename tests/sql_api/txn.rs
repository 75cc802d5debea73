//! Transactions.

use millpond::proto::etcdserverpb::{
    Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, TxnResponse, compare::TargetUnion,
    request_op::Request, response_op::Response,
};
use tonic::Code;

use crate::store::{Result, Store, bytes, everything, keys, put, range, refusal, revision};

const EQUAL: i32 = 0;
const GREATER: i32 = 1;
const LESS: i32 = 2;
const NOT_EQUAL: i32 = 3;

fn op(request: Request) -> RequestOp {
    RequestOp { request: Some(request) }
}

fn put_op(key: &str, value: &str) -> RequestOp {
    op(Request::RequestPut(put(key, value)))
}

fn get_op(key: &str, end: &str) -> RequestOp {
    op(Request::RequestRange(range(key, end)))
}

fn delete_op(key: &str, end: &str) -> RequestOp {
    op(Request::RequestDeleteRange(DeleteRangeRequest { key: bytes(key), range_end: bytes(end), prev_kv: true }))
}

fn nested(txn: TxnRequest) -> RequestOp {
    op(Request::RequestTxn(txn))
}

fn compare(key: &str, end: &str, result: i32, union: TargetUnion) -> Compare {
    let target = match &union {
        TargetUnion::Version(_) => 0,
        TargetUnion::CreateRevision(_) => 1,
        TargetUnion::ModRevision(_) => 2,
        TargetUnion::Value(_) => 3,
        TargetUnion::Lease(_) => 4,
    };
    Compare { result, target, key: bytes(key), range_end: bytes(end), target_union: Some(union) }
}

fn success(success: Vec<RequestOp>) -> TxnRequest {
    TxnRequest { success, ..Default::default() }
}

async fn run(store: &Store, txn: TxnRequest) -> Result<TxnResponse> {
    Ok(store.kv().txn(txn).await?.into_inner())
}

async fn holds(store: &Store, compare: Compare) -> Result<bool> {
    Ok(run(store, TxnRequest { compare: vec![compare], ..Default::default() }).await?.succeeded)
}

#[tokio::test]
async fn every_target_compares_in_every_way() -> Result {
    let store = Store::open().await?;
    store.grant(9, 60).await?;
    store.put("a", "1").await?;
    store.put_with(PutRequest { lease: 9, ..put("a", "2") }).await?;
    let targets: [fn(i64) -> TargetUnion; 4] =
        [TargetUnion::Version, TargetUnion::CreateRevision, TargetUnion::ModRevision, TargetUnion::Lease];
    for (union, actual) in targets.into_iter().zip([2, 2, 3, 9]) {
        for (difference, expected) in
            [(-1, [false, true, false, true]), (0, [true, false, false, false]), (1, [false, false, true, true])]
        {
            for (result, expected) in [EQUAL, GREATER, LESS, NOT_EQUAL].into_iter().zip(expected) {
                assert_eq!(holds(&store, compare("a", "", result, union(actual + difference))).await?, expected);
            }
        }
    }
    let value = |text: &str| TargetUnion::Value(bytes(text));
    assert!(holds(&store, compare("a", "", EQUAL, value("2"))).await?);
    assert!(holds(&store, compare("a", "", GREATER, value("1"))).await?);
    assert!(holds(&store, compare("a", "", LESS, value("3"))).await?);
    assert!(!holds(&store, compare("a", "", NOT_EQUAL, value("2"))).await?);
    Ok(())
}

#[tokio::test]
async fn a_missing_key_compares_as_zero_but_its_value_as_nothing() -> Result {
    let store = Store::open().await?;
    assert!(holds(&store, compare("a", "", EQUAL, TargetUnion::Version(0))).await?);
    assert!(holds(&store, compare("a", "", LESS, TargetUnion::ModRevision(1))).await?);
    assert!(!holds(&store, compare("a", "", EQUAL, TargetUnion::Value(bytes("")))).await?);
    assert!(!holds(&store, compare("a", "", NOT_EQUAL, TargetUnion::Value(bytes("x")))).await?);
    Ok(())
}

#[tokio::test]
async fn a_range_compare_holds_for_every_key() -> Result {
    let store = Store::open().await?;
    for key in ["a", "b", "c"] {
        store.put(key, "v").await?;
    }
    assert!(holds(&store, compare("a", "d", GREATER, TargetUnion::ModRevision(1))).await?);
    assert!(!holds(&store, compare("a", "d", GREATER, TargetUnion::ModRevision(2))).await?);
    assert!(holds(&store, compare("b", "\0", GREATER, TargetUnion::ModRevision(2))).await?);
    assert!(holds(&store, compare("a", "d", EQUAL, TargetUnion::Value(bytes("v")))).await?);
    assert!(!holds(&store, compare("x", "z", EQUAL, TargetUnion::Value(bytes("v")))).await?);
    Ok(())
}

#[tokio::test]
async fn operations_run_in_order_on_one_revision() -> Result {
    let store = Store::open().await?;
    store.put("old", "v").await?;
    let ops = vec![
        get_op("\0", "\0"),
        put_op("b", "1"),
        get_op("\0", "\0"),
        delete_op("old", ""),
        put_op("a", "1"),
        get_op("\0", "\0"),
    ];
    let answer = run(&store, success(ops)).await?;
    assert_eq!((revision(answer.header)?, answer.succeeded), (3, true));
    let mut ranges = Vec::new();
    for response in &answer.responses {
        if let Some(Response::ResponseRange(found)) = &response.response {
            ranges.push((keys(found).concat(), revision(found.header)?));
        }
        if let Some(Response::ResponseDeleteRange(deleted)) = &response.response {
            assert_eq!((deleted.deleted, deleted.prev_kvs.len(), revision(deleted.header)?), (1, 1, 3));
        }
    }
    assert_eq!(ranges, [("old".to_owned(), 2), ("bold".to_owned(), 3), ("ab".to_owned(), 3)]);
    let found = store.range(everything()).await?;
    assert!(found.kvs.iter().all(|kv| kv.mod_revision == 3));
    Ok(())
}

#[tokio::test]
async fn branches_are_decided_before_anything_is_written() -> Result {
    let store = Store::open().await?;
    let absent = || compare("a", "", EQUAL, TargetUnion::Version(0));
    let inner = TxnRequest {
        compare: vec![absent()],
        success: vec![put_op("inner", "absent")],
        failure: vec![put_op("inner", "present")],
    };
    let outer = TxnRequest {
        compare: vec![absent()],
        success: vec![put_op("a", "1"), nested(inner)],
        failure: vec![get_op("a", "")],
    };
    let answer = run(&store, outer.clone()).await?;
    assert!(answer.succeeded);
    assert_eq!(store.get("inner").await?.as_deref(), Some("absent"));
    let again = run(&store, outer).await?;
    assert!(!again.succeeded);
    assert_eq!(revision(again.header)?, 2);
    Ok(())
}

#[tokio::test]
async fn a_refused_transaction_writes_nothing() -> Result {
    let store = Store::open().await?;
    let with_lease = op(Request::RequestPut(PutRequest { lease: 404, ..put("b", "1") }));
    let refused = store.kv().txn(success(vec![put_op("a", "1"), with_lease])).await;
    assert_eq!(refusal(refused), (Code::NotFound, "etcdserver: requested lease not found".to_owned()));
    let future = op(Request::RequestRange(RangeRequest { revision: 99, ..range("a", "") }));
    let refused = store.kv().txn(success(vec![put_op("a", "1"), future])).await;
    let text = "etcdserver: mvcc: required revision is a future revision";
    assert_eq!(refusal(refused), (Code::OutOfRange, text.to_owned()));
    assert_eq!(store.range(everything()).await?.header.map(|header| header.revision), Some(1));
    Ok(())
}

#[tokio::test]
async fn a_put_that_keeps_the_value_of_a_key_just_deleted_is_undone_whole() -> Result {
    let store = Store::open().await?;
    store.put("a", "1").await?;
    let keep = op(Request::RequestPut(PutRequest { ignore_value: true, ..put("a", "") }));
    let refused = store.kv().txn(success(vec![put_op("b", "1"), delete_op("a", "\0"), keep])).await;
    assert_eq!(refusal(refused), (Code::InvalidArgument, "etcdserver: key not found".to_owned()));
    let found = store.range(everything()).await?;
    assert_eq!((keys(&found), revision(found.header)?), (vec!["a".to_owned()], 2));
    assert_eq!(store.put("c", "1").await?, 3);
    Ok(())
}

#[tokio::test]
async fn bad_transactions_are_refused_in_etcds_words() -> Result {
    let store = Store::open().await?;
    let refused = async |txn| refusal(store.kv().txn(txn).await);
    let invalid = |text: &str| (Code::InvalidArgument, format!("etcdserver: {text}"));
    let many = (0..129).map(|n| put_op(&n.to_string(), "")).collect();
    assert_eq!(refused(success(many)).await, invalid("too many operations in txn request"));
    assert_eq!(
        refused(success(vec![put_op("a", ""), put_op("a", "")])).await,
        invalid("duplicate key given in txn request")
    );
    assert_eq!(refused(success(vec![put_op("", "")])).await, invalid("key is not provided"));
    assert_eq!(refused(success(vec![RequestOp { request: None }])).await, invalid("key not found"));
    let empty = TxnRequest { compare: vec![Compare::default()], ..Default::default() };
    assert_eq!(refused(empty).await, invalid("key is not provided"));
    let sorted = op(Request::RequestRange(RangeRequest { sort_target: 77, ..range("a", "") }));
    assert_eq!(refused(success(vec![sorted])).await, invalid("invalid sort option"));
    Ok(())
}

#[tokio::test]
async fn a_transaction_of_reads_makes_no_revision() -> Result {
    let store = Store::open().await?;
    store.put("a", "1").await?;
    let answer = run(&store, success(vec![get_op("a", ""), get_op("b", "")])).await?;
    assert_eq!((revision(answer.header)?, answer.responses.len()), (2, 2));
    let nothing = run(&store, success(vec![delete_op("missing", "")])).await?;
    assert_eq!(revision(nothing.header)?, 2);
    let empty = run(&store, TxnRequest::default()).await?;
    assert_eq!((empty.succeeded, revision(empty.header)?), (true, 2));
    Ok(())
}
