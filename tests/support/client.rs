//! Clients: the generated stubs over one connection, and the few calls that every test makes.

use std::time::{Duration, Instant};

use bytes::Bytes;
use millpond::proto::etcdserverpb::{
    self as pb, auth_client::AuthClient, cluster_client::ClusterClient, kv_client::KvClient, lease_client::LeaseClient,
    maintenance_client::MaintenanceClient, watch_client::WatchClient,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::transport::{Channel, Endpoint};

/// Long enough for anything that a test waits for, on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The stubs of every service, sharing one connection.
#[derive(Clone)]
pub struct Client {
    pub channel: Channel,
    pub kv: KvClient<Channel>,
    pub watch: WatchClient<Channel>,
    pub lease: LeaseClient<Channel>,
    pub cluster: ClusterClient<Channel>,
    pub maintenance: MaintenanceClient<Channel>,
    pub auth: AuthClient<Channel>,
}

impl Client {
    /// A client of `host:port`, which need not listen yet.
    pub fn new(endpoint: &str) -> Self {
        let channel = Endpoint::from_shared(format!("http://{endpoint}")).unwrap();
        let channel =
            channel.connect_timeout(Duration::from_secs(5)).initial_stream_window_size(1 << 20).connect_lazy();
        Self {
            kv: KvClient::new(channel.clone())
                .max_decoding_message_size(usize::MAX)
                .max_encoding_message_size(usize::MAX),
            watch: WatchClient::new(channel.clone()).max_decoding_message_size(usize::MAX),
            lease: LeaseClient::new(channel.clone()).max_decoding_message_size(usize::MAX),
            cluster: ClusterClient::new(channel.clone()),
            maintenance: MaintenanceClient::new(channel.clone()).max_decoding_message_size(usize::MAX),
            auth: AuthClient::new(channel.clone()),
            channel,
        }
    }

    pub async fn range(&self, request: pb::RangeRequest) -> Result<pb::RangeResponse, tonic::Status> {
        Ok(self.kv.clone().range(request).await?.into_inner())
    }

    /// One key; a serializable read.
    pub async fn get(&self, key: impl Into<Bytes>) -> Result<pb::RangeResponse, tonic::Status> {
        self.range(pb::RangeRequest { key: key.into(), serializable: true, ..Default::default() }).await
    }

    /// Puts a value; the answer is the revision of the write.
    pub async fn put(&self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Result<i64, tonic::Status> {
        let request = pb::PutRequest { key: key.into(), value: value.into(), ..Default::default() };
        let answer = self.kv.clone().put(request).await?.into_inner();
        Ok(answer.header.expect("a put's answer has a header").revision)
    }

    /// Deletes a key; the answer is the revision.
    pub async fn delete(&self, key: impl Into<Bytes>) -> Result<i64, tonic::Status> {
        let request = pb::DeleteRangeRequest { key: key.into(), ..Default::default() };
        let answer = self.kv.clone().delete_range(request).await?.into_inner();
        Ok(answer.header.expect("a delete's answer has a header").revision)
    }

    pub async fn compact(&self, revision: i64) -> Result<(), tonic::Status> {
        self.kv.clone().compact(pb::CompactionRequest { revision, physical: true }).await.map(drop)
    }

    pub async fn status(&self) -> Result<pb::StatusResponse, tonic::Status> {
        Ok(self.maintenance.clone().status(pb::StatusRequest::default()).await?.into_inner())
    }

    /// The current revision, by a linearizable read.
    pub async fn revision(&self) -> Result<i64, tonic::Status> {
        let request = pb::RangeRequest { key: Bytes::from_static(b"\0"), count_only: true, ..Default::default() };
        Ok(self.range(request).await?.header.expect("a range's answer has a header").revision)
    }
}

/// The smallest key above every key with this prefix, as clients compute it: `\0` when there is none.
pub fn prefix_end(prefix: &[u8]) -> Bytes {
    let Some(last) = prefix.iter().rposition(|byte| *byte != 0xff) else {
        return Bytes::from_static(b"\0");
    };
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    end.into()
}

/// Asks again and again until `probe` gives a value; `what` is the failure's message.
pub async fn eventually<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = probe().await {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// One HTTP/1.1 GET on a connection of its own: status and body.
pub async fn http_get(address: &str, path: &str) -> std::io::Result<(u16, String)> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    let answer = tokio::time::timeout(Duration::from_secs(10), raw_exchange(address, request.as_bytes())).await??;
    let text = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split_whitespace().nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    Ok((status, body.to_owned()))
}

/// Sends bytes and reads until the server closes.
pub async fn raw_exchange(address: &str, request: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(request).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(answer)
}
