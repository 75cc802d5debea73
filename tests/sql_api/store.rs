//! A store in a temporary directory, and clients of its gRPC face over a pipe within the process.

use std::{
    future::Future,
    path::Path,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use hyper_util::rt::TokioIo;
use millpond::{
    proto::etcdserverpb::{
        CompactionRequest, DeleteRangeRequest, LeaseGrantRequest, PutRequest, RangeRequest, RangeResponse,
        kv_client::KvClient, lease_client::LeaseClient, maintenance_client::MaintenanceClient,
        watch_client::WatchClient,
    },
    sql::{Engine, Options},
};
use tempfile::TempDir;
use tokio::io::DuplexStream;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint, Uri},
};

/// What tests return.
pub type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// An open store and a connection to it.
pub struct Store {
    pub engine: Engine,
    pub channel: Channel,
    dir: TempDir,
}

struct Connector(Engine);

impl tower_service::Service<Uri> for Connector {
    type Response = TokioIo<DuplexStream>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = std::io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let io = TokioIo::new(self.0.connect());
        Box::pin(async move { Ok(io) })
    }
}

/// A channel to an engine.
pub async fn channel(engine: &Engine) -> Result<Channel> {
    Ok(Endpoint::from_static("http://store").connect_with_connector(Connector(engine.clone())).await?)
}

impl Store {
    pub async fn open() -> Result<Self> {
        Self::with(Options::default()).await
    }

    pub async fn with(options: Options) -> Result<Self> {
        Self::within(tempfile::tempdir()?, options).await
    }

    async fn within(dir: TempDir, options: Options) -> Result<Self> {
        let engine = Engine::open(dir.path(), options)?;
        let channel = channel(&engine).await?;
        Ok(Self { engine, channel, dir })
    }

    /// Closes the store and opens it again.
    pub async fn reopen(self, options: Options) -> Result<Self> {
        self.engine.close().await;
        Self::within(self.dir, options).await
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel.clone()).max_decoding_message_size(usize::MAX)
    }

    pub fn lease(&self) -> LeaseClient<Channel> {
        LeaseClient::new(self.channel.clone())
    }

    pub fn maintenance(&self) -> MaintenanceClient<Channel> {
        MaintenanceClient::new(self.channel.clone())
    }

    pub fn watch(&self) -> WatchClient<Channel> {
        WatchClient::new(self.channel.clone()).max_decoding_message_size(usize::MAX)
    }

    /// Puts a key and returns the revision.
    pub async fn put(&self, key: &str, value: &str) -> Result<i64> {
        self.put_with(put(key, value)).await
    }

    pub async fn put_with(&self, request: PutRequest) -> Result<i64> {
        revision(self.kv().put(request).await?.into_inner().header)
    }

    /// Deletes a range and returns how many keys were in it.
    pub async fn delete(&self, key: &str, range_end: &str) -> Result<i64> {
        let request = DeleteRangeRequest { key: bytes(key), range_end: bytes(range_end), prev_kv: false };
        Ok(self.kv().delete_range(request).await?.into_inner().deleted)
    }

    pub async fn range(&self, request: RangeRequest) -> Result<RangeResponse> {
        Ok(self.kv().range(request).await?.into_inner())
    }

    /// The value of a key, if it exists.
    pub async fn get(&self, key: &str) -> Result<Option<String>> {
        let found = self.range(range(key, "")).await?;
        Ok(found.kvs.first().map(|kv| String::from_utf8_lossy(&kv.value).into_owned()))
    }

    pub async fn compact(&self, revision: i64) -> std::result::Result<(), Status> {
        self.kv().compact(CompactionRequest { revision, physical: true }).await.map(drop)
    }

    pub async fn grant(&self, id: i64, ttl: i64) -> Result<i64> {
        Ok(self.lease().lease_grant(LeaseGrantRequest { id, ttl }).await?.into_inner().id)
    }
}

pub fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

pub fn put(key: &str, value: &str) -> PutRequest {
    PutRequest { key: bytes(key), value: bytes(value), ..Default::default() }
}

pub fn range(key: &str, range_end: &str) -> RangeRequest {
    RangeRequest { key: bytes(key), range_end: bytes(range_end), ..Default::default() }
}

/// Everything in the store.
pub fn everything() -> RangeRequest {
    range("\0", "\0")
}

pub fn revision(header: Option<millpond::proto::etcdserverpb::ResponseHeader>) -> Result<i64> {
    Ok(header.ok_or("an answer without a header")?.revision)
}

pub fn keys(response: &RangeResponse) -> Vec<String> {
    response.kvs.iter().map(|kv| String::from_utf8_lossy(&kv.key).into_owned()).collect()
}

/// The code and text with which a call was refused.
pub fn refusal<T>(result: std::result::Result<T, Status>) -> (Code, String) {
    match result {
        Ok(_) => (Code::Ok, String::new()),
        Err(status) => (status.code(), status.message().to_owned()),
    }
}

/// Waits for something, but not for ever.
pub async fn soon<T>(future: impl Future<Output = T>) -> Result<T> {
    Ok(tokio::time::timeout(Duration::from_secs(20), future).await?)
}

/// Waits until a condition holds.
pub async fn eventually<F, Fut>(mut holds: F) -> Result
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<bool>>,
{
    soon(async {
        while !holds().await? {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    })
    .await?
}
