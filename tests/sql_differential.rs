//! The same random requests and watches, sent to a real etcd and to the SQL engine: every answer must be the same, field by
//! field, and so must the hash of everything that the requests left behind.
//!
//! `MILLPOND_TEST_OPERATIONS` sets how many, `MILLPOND_TEST_SEED` repeats a run.

mod support;

use std::collections::HashSet;

use millpond::proto::{
    etcdserverpb as pb,
    v3electionpb::{self as epb, election_client::ElectionClient},
    v3lockpb::{LockRequest, UnlockRequest, lock_client::LockClient},
};
use support::{
    client::Client,
    operation::Operation,
    pair::{Pair, tell},
    random::{Bounds, Generator, operations, seed},
    script::Script,
};

/// A RangeStream by something else than the key, without an order, comes garbled from etcd 3.7.
fn is_garbled_by_etcd(operation: &Operation) -> bool {
    matches!(operation, Operation::RangeStream(request) if request.sort_order == 0 && request.sort_target != 0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_answer_is_etcds() {
    let Some(pair) = Pair::start().await else { return };
    let mut generator = Generator::new(seed());
    let mut bounds = Bounds { current: 1, compacted: 0 };
    for id in 1..5 {
        pair.check(&Operation::Grant(pb::LeaseGrantRequest { id, ttl: 6000 })).await;
    }
    let (count, mut compared, mut compactions) = (operations(4000), 0, HashSet::new());
    for number in 0..count {
        let operation = match number {
            0..150 => Operation::Put(generator.put()),
            _ if generator.chance(12) => generator.lease(),
            _ => generator.kv(bounds),
        };
        if is_garbled_by_etcd(&operation) {
            continue;
        }
        compared += 1;
        let Some(header) = pair.check(&operation).await else { continue };
        bounds.current = bounds.current.max(header.revision);
        if let Operation::Compact(request) = &operation {
            bounds.compacted = request.revision;
            compactions.insert(request.revision);
        }
        if number % 200 == 0 {
            let revision = generator.revision(bounds).max(1);
            if !compactions.contains(&revision) {
                pair.same_hash(revision).await;
            }
        }
    }
    println!("{compared} requests compared, up to revision {}", bounds.current);
    assert!(count < 1000 || bounds.current > 500, "the run wrote too little");
    pair.stop().await;
}

/// Where no key is left, etcd lets everything count that it still has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_hash_without_keys_does_not_depend_on_how_far_removal_has_got() {
    const KEYS: usize = 5;
    let Some(pair) = Pair::start().await else { return };
    for number in 0..300 {
        let key = format!("k{}", number % KEYS).into();
        pair.check(&Operation::Put(pb::PutRequest { key, value: "v".into(), ..Default::default() })).await;
    }
    // Gone before the compaction, and gone and come again.
    for key in ["k0", "k1"] {
        let one = pb::DeleteRangeRequest { key: key.into(), ..Default::default() };
        pair.check(&Operation::Delete(one)).await;
    }
    pair.check(&Operation::Put(pb::PutRequest { key: "k1".into(), value: "w".into(), ..Default::default() })).await;
    let everything = pb::DeleteRangeRequest { key: "k".into(), range_end: "l".into(), prev_kv: false };
    let revision = pair.check(&Operation::Delete(everything)).await.unwrap().revision;
    // etcd waits for its removal, the engine has only begun.
    for (client, physical) in [(&pair.reference, true), (&pair.subject, false)] {
        let compaction = pb::CompactionRequest { revision: revision - 1, physical };
        client.kv.clone().compact(compaction).await.unwrap();
    }
    pair.same_hash(revision).await;
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_watch_is_etcds() {
    let seed = seed();
    let (mut responses, mut events) = (0, 0);
    for number in 0..6 {
        if number >= 2 && events > 300 {
            break;
        }
        let Some(pair) = Pair::start().await else { return };
        let (reference, subject) = (pair.reference.clone(), pair.subject.clone());
        let mut script = Script::between(reference, subject, seed.wrapping_add(number)).await;
        script.play(operations(200)).await;
        let volume = script.volume();
        (responses, events) = (responses + volume.0, events + volume.1);
        pair.stop().await;
    }
    println!("{responses} watch responses with {events} events compared");
    assert!(events > 300, "the scripts exercised too little: {events} events");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_and_elections_are_etcds() {
    let Some(pair) = Pair::start().await else { return };
    for id in [7, -7, 300] {
        pair.check(&Operation::Grant(pb::LeaseGrantRequest { id, ttl: 6000 })).await;
    }
    let (reference, subject) = tokio::join!(contend(&pair.reference), contend(&pair.subject));
    for (step, (expected, found)) in reference.iter().zip(&subject).enumerate() {
        assert_eq!(expected, found, "step {step}");
    }
    assert_eq!(reference.len(), subject.len());
    pair.stop().await;
}

/// Plays the same story of locks and elections on a server, and tells what came back.
async fn contend(client: &Client) -> Vec<String> {
    let mut told = Vec::new();
    let mut lock = LockClient::new(client.channel.clone());
    let mut election = ElectionClient::new(client.channel.clone());
    let lock_request = |name: &str, lease| LockRequest { name: name.to_owned().into(), lease };
    let leader_request = || epb::LeaderRequest { name: "e".into() };
    let first = lock.lock(lock_request("l", 7)).await;
    let key = first.as_ref().unwrap().get_ref().key.clone();
    told.push(tell(first));
    told.push(tell(lock.lock(lock_request("l", 7)).await));
    told.push(tell(lock.lock(lock_request("l", 404)).await));
    let mut waiting = lock.clone();
    let second = tokio::spawn(async move { waiting.lock(lock_request("l", -7)).await });
    support::client::eventually("the second lock's key", async || {
        (client.range(support::operation::range("l/", "l0")).await.unwrap().count == 2).then_some(())
    })
    .await;
    told.push(tell(lock.unlock(UnlockRequest { key }).await));
    told.push(tell(second.await.unwrap()));
    told.push(tell(lock.unlock(UnlockRequest::default()).await));
    told.push(tell(election.leader(leader_request()).await));
    let campaign =
        |lease, value: &str| epb::CampaignRequest { name: "e".into(), lease, value: value.to_owned().into() };
    let elected = election.campaign(campaign(7, "one")).await;
    let leader = elected.as_ref().unwrap().get_ref().leader.clone();
    told.push(tell(elected));
    told.push(tell(election.leader(leader_request()).await));
    let mut observed = election.observe(leader_request()).await.unwrap().into_inner();
    told.push(tell(observed.message().await));
    let proclaim = epb::ProclaimRequest { leader: leader.clone(), value: "two".into() };
    told.push(tell(election.proclaim(proclaim).await));
    told.push(tell(observed.message().await));
    told.push(tell(election.campaign(campaign(7, "three")).await));
    told.push(tell(observed.message().await));
    let mut waiting = election.clone();
    let request = campaign(300, "four");
    let next = tokio::spawn(async move { waiting.campaign(request).await });
    support::client::eventually("the second candidate's key", async || {
        (client.range(support::operation::range("e/", "e0")).await.unwrap().count == 2).then_some(())
    })
    .await;
    told.push(tell(election.resign(epb::ResignRequest { leader: leader.clone() }).await));
    told.push(tell(next.await.unwrap()));
    told.push(tell(observed.message().await));
    told.push(tell(election.resign(epb::ResignRequest { leader: leader.clone() }).await));
    told.push(tell(election.proclaim(epb::ProclaimRequest { leader, value: "late".into() }).await));
    told.push(tell(election.proclaim(epb::ProclaimRequest::default()).await));
    let nameless = epb::LeaderKey { name: "e".into(), lease: 7, ..Default::default() };
    told.push(tell(election.resign(epb::ResignRequest { leader: Some(nameless.clone()) }).await));
    told.push(tell(election.proclaim(epb::ProclaimRequest { leader: Some(nameless), value: "two".into() }).await));
    told.push(tell(election.campaign(campaign(7, &"large".repeat(1 << 19))).await));
    told.push(tell(lock.lock(lock_request(&"large".repeat(1 << 19), 7)).await));
    told.push(tell(election.resign(epb::ResignRequest::default()).await));
    told
}
