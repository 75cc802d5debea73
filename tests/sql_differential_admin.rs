//! What an operator asks of a store, and calls that do not exist, sent to a real etcd and to the SQL engine.

mod support;

use millpond::proto::etcdserverpb as pb;
use support::{
    client::Client,
    pair::{Pair, tell},
};

/// Compares, step by step, what a play told on either side.
async fn same(play: impl AsyncFn(&Client) -> Vec<String>) -> Vec<String> {
    let Some(pair) = Pair::start().await else { return Vec::new() };
    let (expected, found) = tokio::join!(play(&pair.reference), play(&pair.subject));
    assert_eq!(expected.len(), found.len());
    let steps = expected.iter().zip(&found).enumerate().filter(|(_, (expected, found))| expected != found);
    let differences: Vec<_> =
        steps.map(|(step, (expected, found))| format!("step {step}: etcd {expected}, the engine {found}")).collect();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    pair.stop().await;
    expected
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn downgrades_are_answered_as_etcd_does() {
    use pb::downgrade_request::DowngradeAction::{Cancel, Enable, Validate};
    // Not 3.6, which etcd would go back to.
    let versions = [
        "",
        "3",
        "3.",
        "three",
        "3.6.x",
        "3.6.0.1",
        "-1.2.3",
        "+3.6.0",
        "3.6.0-a..b",
        "3.6-rc",
        "3.6.0+a b",
        "3. 6.0",
        "3.6.99999999999999999999",
        "3.7",
        "3.7.0",
        "3.7.0-rc.0+x.y",
        "3.5",
        "2.0.1",
        "9.9",
        "3.7-rc.0",
        "3.7.0-",
        "03.07",
    ];
    same(async |client| {
        let mut told = Vec::new();
        let mut actions = vec![(i32::from(Cancel), ""), (Cancel.into(), "three"), (9, "3.6")];
        actions.extend(versions.iter().flat_map(|version| [(Validate.into(), *version), (Enable.into(), *version)]));
        for (action, version) in actions {
            let request = pb::DowngradeRequest { action, version: version.to_owned() };
            told.push(format!("{action} {version:?}: {}", tell(client.maintenance.clone().downgrade(request).await)));
        }
        told
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_carry_etcds_storage_version() {
    same(async |client| {
        // etcd finds it out some time after its first start.
        let versions = async || {
            let mut pieces = client.maintenance.clone().snapshot(pb::SnapshotRequest {}).await.unwrap().into_inner();
            let mut versions = Vec::new();
            while let Some(piece) = pieces.message().await.unwrap() {
                versions.push(piece.version);
            }
            versions.iter().any(|version| !version.is_empty()).then_some(versions)
        };
        let mut versions = support::client::eventually("a version", versions).await;
        // One piece is the checksum; of how many the rest has is each server's own matter.
        assert!(versions.len() > 1);
        versions.dedup();
        versions
    })
    .await;
}
