//! Keys and leases from a real etcd into a store, and from the store into another etcd.

mod support;

use etcd_client::{Client, GetOptions, LeaseGrantOptions, PutOptions};
use millpond::sql::{Engine, Options, Progress, SqlError, check, export, import};
use support::{etcd::Cluster, toolchain::Release};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Keys, values and leases, without their revisions.
async fn content(client: &Client) -> Result<Vec<(Vec<u8>, Vec<u8>, i64)>> {
    let mut kv = client.kv_client().max_decoding_message_size(usize::MAX);
    let found = kv.get("", Some(GetOptions::new().with_all_keys())).await?;
    Ok(found.kvs().iter().map(|kv| (kv.key().to_vec(), kv.value().to_vec(), kv.lease())).collect())
}

async fn fill(client: &Client) -> Result {
    let (mut kv, mut lease) = (client.kv_client(), client.lease_client());
    for id in [5, 6] {
        lease.grant(600, Some(LeaseGrantOptions::new().with_id(id))).await?;
    }
    for number in 0..2500 {
        let options = PutOptions::new().with_lease(if number % 3 == 0 { 5 + number % 2 } else { 0 });
        kv.put(format!("key{number:05}"), format!("value {number}"), Some(options)).await?;
    }
    for number in 0..3 {
        kv.put(format!("large{number}"), vec![number; 1_400_000], None).await?;
    }
    kv.put([0xff, 0xff], "the last key", None).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_but_revisions_goes_there_and_back() -> Result {
    let Some(release) = Release::pinned("3.7.1") else { return Ok(()) };
    let (from, to) = tokio::join!(Cluster::single(release.clone()), Cluster::single(release));
    let (from, to) = (Client::connect(from.endpoints(), None).await?, Client::connect(to.endpoints(), None).await?);
    fill(&from).await?;
    let expected = content(&from).await?;
    let dir = tempfile::tempdir()?;
    let mut reports = Vec::new();
    let done = import(&from, dir.path(), Options::default(), &mut |progress| reports.push(progress)).await?;
    assert_eq!(done, Progress { keys: 2504, total: 2504, leases: 2, expired: 0 });
    assert!(reports.len() > 3 && reports.is_sorted_by_key(|progress| progress.keys));
    assert_eq!(check(dir.path())?.problems, Vec::<String>::new());
    let again = import(&from, dir.path(), Options::default(), &mut |_| {}).await;
    assert!(matches!(again, Err(SqlError::Occupied(_))), "{again:?}");
    let done = export(dir.path(), Options::default(), &to, &mut |_| {}).await?;
    assert_eq!(done, Progress { keys: 2504, total: 2504, leases: 2, expired: 0 });
    assert!(content(&to).await? == expected, "the copy of the copy differs");
    let lease = to.lease_client().time_to_live(5, None).await?;
    assert!(lease.granted_ttl() == 600 && lease.ttl() > 500);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_is_not_there_is_a_clear_error() -> Result {
    let dir = tempfile::tempdir()?;
    let nobody = Client::connect(["127.0.0.1:1"], None).await?;
    let refused = import(&nobody, dir.path(), Options::default(), &mut |_| {}).await;
    assert!(matches!(refused, Err(SqlError::Transfer { .. })), "{refused:?}");
    Engine::open(dir.path(), Options::default())?.close().await;
    Ok(())
}
