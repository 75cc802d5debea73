//! A real etcd, and an embedded store that must answer the same.

use millpond::{
    proto::etcdserverpb::{self as pb, ResponseHeader},
    sql::{Engine, Options, sqlite},
};
use tempfile::TempDir;
use tokio::{net::TcpListener, task::JoinHandle};

use super::{
    client::Client,
    compare::outcomes,
    etcd::Cluster,
    operation::{Operation, execute},
    toolchain::Release,
};

/// An etcd, and an engine with the same ids and term, both empty.
pub struct Pair {
    etcd: Cluster,
    pub reference: Client,
    pub subject: Client,
    engine: Engine,
    server: JoinHandle<()>,
    _dir: TempDir,
}

impl Pair {
    pub async fn start() -> Option<Self> {
        let etcd = Cluster::single(Release::pinned("3.7.1")?).await;
        let reference = etcd.client(0);
        let header = reference.status().await.unwrap().header.unwrap();
        let dir = tempfile::tempdir().unwrap();
        impersonate(&dir, header).await;
        let engine = Engine::open(dir.path(), Options::default()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let subject = Client::new(&listener.local_addr().unwrap().to_string());
        let serving = engine.clone();
        let server = tokio::spawn(async move { serving.serve(listener, std::future::pending()).await.unwrap() });
        Some(Self { etcd, reference, subject, engine, server, _dir: dir })
    }

    /// Sends an operation to both and compares; the answer is etcd's, if it was none of its errors.
    pub async fn check(&self, operation: &Operation) -> Option<ResponseHeader> {
        let (expected, found) = tokio::join!(execute(&self.reference, operation), execute(&self.subject, operation));
        if let Err(difference) = outcomes(operation, &expected, &found) {
            panic!("etcd and the SQL engine disagree: {difference}\nrequest: {operation:?}");
        }
        expected.ok()?.header().copied()
    }

    /// Compares the hashes at a revision that was never compacted at: of those that were, etcd keeps the hash from before the
    /// compaction.
    pub async fn same_hash(&self, revision: i64) {
        let hash = async |client: &Client| {
            let answer = client.maintenance.clone().hash_kv(pb::HashKvRequest { revision }).await;
            answer.map(tonic::Response::into_inner).map_err(|status| (status.code(), status.message().to_owned()))
        };
        assert_eq!(hash(&self.reference).await, hash(&self.subject).await, "hash at {revision}");
    }

    pub async fn stop(self) {
        self.engine.close().await;
        self.server.abort();
        drop(self.etcd);
    }
}

/// Gives the store in `dir` an etcd's ids, and the term that its next start raises to the etcd's.
async fn impersonate(dir: &TempDir, header: ResponseHeader) {
    Engine::open(dir.path(), Options::default()).unwrap().close().await;
    let database = rusqlite::Connection::open(dir.path().join(sqlite::FILE)).unwrap();
    for (name, value) in
        [("cluster_id", header.cluster_id), ("member_id", header.member_id), ("term", header.raft_term - 1)]
    {
        let values = rusqlite::params![value.cast_signed(), name];
        assert_eq!(database.execute("UPDATE meta SET value = ?1 WHERE name = ?2", values).unwrap(), 1);
    }
}

/// What a call came to, in words, without the metadata.
pub fn tell<T: std::fmt::Debug>(result: Result<T, tonic::Status>) -> String {
    match result {
        Ok(answer) => {
            let text = format!("{answer:?}");
            // Metadata carries dates.
            text.find("message: ").map_or(text.clone(), |at| text[at..].to_owned())
        }
        Err(status) => format!("{:?} {}", status.code(), status.message()),
    }
}
