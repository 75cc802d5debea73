//! Leases.

use std::time::{Duration, Instant};

use millpond::{
    proto::etcdserverpb::{
        LeaseGrantRequest, LeaseKeepAliveRequest, LeaseLeasesRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest,
        LeaseTimeToLiveResponse, PutRequest,
    },
    sql::Options,
};
use tonic::Code;

use crate::store::{Result, Store, bytes, eventually, everything, put, refusal, revision, soon};

async fn time_to_live(store: &Store, id: i64) -> Result<LeaseTimeToLiveResponse> {
    Ok(store.lease().lease_time_to_live(LeaseTimeToLiveRequest { id, keys: true }).await?.into_inner())
}

async fn keep_alive(store: &Store, id: i64) -> Result<i64> {
    let requests = tokio_stream::iter([LeaseKeepAliveRequest { id }]);
    let mut responses = store.lease().lease_keep_alive(requests).await?.into_inner();
    Ok(soon(responses.message()).await??.ok_or("no answer")?.ttl)
}

#[tokio::test]
async fn ids_are_chosen_or_picked() -> Result {
    let store = Store::open().await?;
    let grant = async |id, ttl| store.lease().lease_grant(LeaseGrantRequest { id, ttl }).await;
    let chosen = grant(5, 60).await?.into_inner();
    assert_eq!((chosen.id, chosen.ttl, revision(chosen.header)?), (5, 60, 1));
    assert_eq!(grant(-5, 1).await?.into_inner().ttl, 2, "the shortest time to live is 2 s");
    assert_eq!(grant(0, -1).await?.into_inner().ttl, 2);
    assert!(grant(0, 60).await?.into_inner().id > 0);
    let exists = (Code::FailedPrecondition, "etcdserver: lease already exists".to_owned());
    assert_eq!(refusal(grant(5, 60).await), exists);
    let too_long = (Code::OutOfRange, "etcdserver: too large lease TTL".to_owned());
    assert_eq!(refusal(grant(6, 9_000_000_001).await), too_long);
    assert_eq!(grant(6, 9_000_000_000).await?.into_inner().ttl, 9_000_000_000);
    Ok(())
}

#[tokio::test]
async fn a_revocation_deletes_the_keys_sorted_in_one_revision() -> Result {
    let store = Store::open().await?;
    store.grant(5, 60).await?;
    for key in ["c", "a", "b", "free"] {
        let lease = if key == "free" { 0 } else { 5 };
        store.put_with(PutRequest { lease, ..put(key, "v") }).await?;
    }
    let found = time_to_live(&store, 5).await?;
    assert_eq!((found.granted_ttl, found.keys), (60, vec![bytes("a"), bytes("b"), bytes("c")]));
    assert!((58..=60).contains(&found.ttl));
    store.put("c", "detached").await?;
    let mut watch = crate::watch::Stream::open(&store).await?;
    watch
        .create(millpond::proto::etcdserverpb::WatchCreateRequest {
            key: bytes("\0"),
            range_end: bytes("\0"),
            ..Default::default()
        })
        .await?;
    let answer = store.lease().lease_revoke(LeaseRevokeRequest { id: 5 }).await?.into_inner();
    assert_eq!(revision(answer.header)?, 7);
    let events = watch.next().await?.events;
    let deleted: Vec<_> = events.iter().filter_map(|event| event.kv.as_ref()).map(|kv| kv.key.clone()).collect();
    assert_eq!(deleted, [bytes("a"), bytes("b")]);
    assert_eq!(crate::store::keys(&store.range(everything()).await?), ["c", "free"]);
    let unknown = (Code::NotFound, "etcdserver: requested lease not found".to_owned());
    assert_eq!(refusal(store.lease().lease_revoke(LeaseRevokeRequest { id: 5 }).await), unknown);
    assert_eq!(refusal(store.kv().put(PutRequest { lease: 5, ..put("a", "v") }).await), unknown);
    Ok(())
}

#[tokio::test]
async fn an_unknown_lease_is_no_error_to_ask_about() -> Result {
    let store = Store::open().await?;
    let found = time_to_live(&store, 404).await?;
    assert_eq!((found.id, found.ttl, found.granted_ttl), (404, -1, 0));
    assert_eq!(keep_alive(&store, 404).await?, 0);
    Ok(())
}

#[tokio::test]
async fn a_lease_that_runs_out_takes_its_keys_along() -> Result {
    let store = Store::open().await?;
    store.grant(5, 4).await?;
    store.grant(6, 600).await?;
    store.put_with(PutRequest { lease: 5, ..put("short", "v") }).await?;
    store.put_with(PutRequest { lease: 6, ..put("long", "v") }).await?;
    eventually(async || Ok(store.get("short").await?.is_none())).await?;
    assert_eq!(time_to_live(&store, 5).await?.ttl, -1);
    assert_eq!(store.get("long").await?.as_deref(), Some("v"));
    let leases = store.lease().lease_leases(LeaseLeasesRequest {}).await?.into_inner().leases;
    assert_eq!(leases.iter().map(|lease| lease.id).collect::<Vec<_>>(), [6]);
    Ok(())
}

#[tokio::test]
async fn keeping_alive_keeps_a_lease() -> Result {
    let store = Store::open().await?;
    store.grant(5, 4).await?;
    store.put_with(PutRequest { lease: 5, ..put("kept", "v") }).await?;
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(1400)).await;
        assert_eq!(keep_alive(&store, 5).await?, 4);
    }
    assert_eq!(store.get("kept").await?.as_deref(), Some("v"));
    Ok(())
}

#[tokio::test]
async fn a_thousand_leases_may_run_out_at_once() -> Result {
    let store = Store::open().await?;
    for id in 1..=1000 {
        store.grant(id, 2).await?;
    }
    store.put_with(PutRequest { lease: 1000, ..put("last", "v") }).await?;
    eventually(async || Ok(store.lease().lease_leases(LeaseLeasesRequest {}).await?.into_inner().leases.is_empty()))
        .await?;
    assert_eq!(store.get("last").await?, None);
    Ok(())
}

#[tokio::test]
async fn a_restart_does_not_shorten_a_lease() -> Result {
    let options = Options { lease_checkpoint_interval: Duration::from_secs(1), ..Options::default() };
    let store = Store::with(options.clone()).await?;
    store.grant(5, 100).await?;
    store.grant(6, 30).await?;
    store.put_with(PutRequest { lease: 6, ..put("a", "v") }).await?;
    tokio::time::sleep(Duration::from_millis(3300)).await;
    let asked = Instant::now();
    let before = time_to_live(&store, 5).await?.ttl;
    let store = store.reopen(options).await?;
    let after = time_to_live(&store, 5).await?;
    let elapsed = asked.elapsed().as_secs() as i64;
    assert!(after.ttl + elapsed >= before && after.ttl < 100, "{before} before, {} after {elapsed} s", after.ttl);
    assert_eq!(after.granted_ttl, 100);
    assert_eq!(time_to_live(&store, 6).await?.keys, [bytes("a")]);
    let renewed = Instant::now();
    assert_eq!(keep_alive(&store, 5).await?, 100);
    let store = store.reopen(Options::default()).await?;
    let found = time_to_live(&store, 5).await?.ttl;
    assert!(found + renewed.elapsed().as_secs() as i64 >= 99, "a renewal clears what was kept: {found}");
    Ok(())
}
