//! Compactions that are made elsewhere: at etcd itself, or through another Millpond.

mod support;

use millpond::proto::etcdserverpb::RangeRequest;
use support::{
    client::{Client, eventually},
    etcd::Cluster,
    millpond::Millpond,
    operation::range,
    random::{Generator, seed},
    toolchain::Release,
    watching::{WatchStream, create},
};

const COMPACTED: &str = "etcdserver: mvcc: required revision has been compacted";
const ROUNDS: usize = 30;

/// The key's value as it was at `revision`, by a read that goes through consensus.
async fn value_at(client: &Client, revision: i64) -> Result<String, String> {
    let read = client.range(RangeRequest { revision, ..range("k", "") }).await;
    let answer = read.map_err(|status| status.message().to_owned())?;
    Ok(answer.kvs.iter().map(|kv| String::from_utf8_lossy(&kv.value)).collect())
}

/// Where a watcher of the key that begins at `start` is told that it has been compacted, if it is.
async fn compaction_told(client: &Client, start: i64) -> Option<i64> {
    let stream = WatchStream::watching(client, create("k", "", start)).await;
    let response = stream.until_count(2).await.remove(1);
    response.canceled.then_some(response.compact_revision)
}

/// Three members, a Millpond in front of two of them, and one that stands behind a Millpond.
struct Several {
    cluster: Cluster,
    millponds: Vec<Millpond>,
}

impl Several {
    async fn start() -> Self {
        let cluster = Cluster::builder(Release::newest()).members(3).start().await;
        let mut millponds = Vec::new();
        for member in 0..2 {
            millponds.push(Millpond::start(&[cluster.endpoint(member)], &[]).await);
        }
        millponds.push(Millpond::start(std::slice::from_ref(&millponds[0].endpoint), &[]).await);
        Self { cluster, millponds }
    }

    fn clients(&self) -> Vec<Client> {
        self.millponds.iter().map(Millpond::client).collect()
    }
}

/// As at etcd: once a read has gone through consensus, watchers on the same server know of what was compacted before it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_of_the_past_and_watchers_after_them_know_of_every_compaction() {
    let mut several = Several::start().await;
    let (clients, etcd) = (several.clients(), several.cluster.client(2));
    let mut random = Generator::new(seed());
    let mut watched = Vec::new();
    for client in &clients {
        watched.push(WatchStream::watching(client, create("k", "", 0)).await);
    }
    let (mut revisions, mut compacted) = (Vec::new(), 1);
    for round in 0..ROUNDS {
        for number in 0..random.below(20) + 3 {
            revisions.push(etcd.put("k", format!("{round} {number}")).await.unwrap());
        }
        let head = *revisions.last().unwrap();
        for client in &clients {
            assert_eq!(value_at(client, compacted).await, value_at(&etcd, compacted).await, "before compacting");
        }
        compacted = head - random.below((head - compacted) as usize) as i64;
        // All but the first learn of it by themselves.
        let compacts = if round % 2 == 0 { &etcd } else { &clients[0] };
        compacts.compact(compacted).await.unwrap();
        for client in &clients {
            let told = format!("round {round}, compacted at {compacted}, at {head}");
            // Of the present, or of the past.
            if round % 3 == 0 {
                assert_eq!(client.revision().await.unwrap(), head);
                assert_eq!(compaction_told(client, compacted - 1).await, Some(compacted), "{told}");
            }
            for revision in [compacted - 1, compacted, compacted + (head - compacted) / 2, head] {
                let expected = value_at(&etcd, revision).await;
                assert_eq!(value_at(client, revision).await, expected, "{told}, read at {revision}");
                assert_eq!(
                    expected == Err(COMPACTED.into()),
                    revision < compacted,
                    "{told}, {expected:?} at {revision}"
                );
            }
            assert_eq!(compaction_told(client, compacted - 1).await, Some(compacted), "{told}");
            assert_eq!(compaction_told(client, compacted).await, None, "{told}");
        }
    }
    for stream in &watched {
        stream.until_revisions(&revisions).await;
    }
    several.millponds.iter_mut().for_each(Millpond::assert_well);
}

/// Serializable reads and watchers ask nobody, and nobody else reads.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compaction_is_noticed_though_nobody_asks() {
    let mut several = Several::start().await;
    let (clients, etcd) = (several.clients(), several.cluster.client(2));
    let mut revisions = Vec::new();
    for number in 0..20 {
        revisions.push(etcd.put("k", number.to_string()).await.unwrap());
    }
    let serializable = |revision| RangeRequest { revision, serializable: true, ..range("k", "") };
    for client in &clients {
        eventually("the view reaches the last revision", async || {
            client.get("k").await.unwrap().kvs.pop().filter(|kv| kv.mod_revision == revisions[19])
        })
        .await;
    }
    etcd.compact(revisions[10]).await.unwrap();
    for client in &clients {
        eventually("a read of what was compacted is refused", async || {
            client.range(serializable(revisions[9])).await.err().filter(|status| status.message() == COMPACTED)
        })
        .await;
        assert!(client.range(serializable(revisions[10])).await.is_ok());
        assert_eq!(compaction_told(client, revisions[9]).await, Some(revisions[10]));
    }
    several.millponds.iter_mut().for_each(Millpond::assert_well);
}
