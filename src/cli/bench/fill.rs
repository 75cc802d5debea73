//! The keys that a load reads: written before, deleted after, over an ordinary gRPC client that tells errors in full.

use bytes::Bytes;
use tonic::transport::{Channel, Endpoint};

use super::requests::{Keys, value};
use crate::proto::etcdserverpb::{
    DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, kv_client::KvClient, request_op::Request,
};

/// Puts in one transaction: etcd allows 128 by default.
const BATCH: u64 = 100;

/// Bytes in one transaction, well below the 1.5 MiB that etcd allows by default.
const BATCH_BYTES: usize = 1 << 20;

/// Transactions under way.
const IN_FLIGHT: usize = 8;

/// Why the keys cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// The endpoint cannot be reached.
    #[error("{endpoint}: {source}")]
    Connect {
        /// The endpoint.
        endpoint: String,
        /// Why.
        source: tonic::transport::Error,
    },
    /// The server refused.
    #[error("the server answered: {}", .0.message())]
    Refused(#[from] tonic::Status),
}

/// A client for the work before and after a load.
pub struct Filler {
    client: KvClient<Channel>,
}

impl Filler {
    /// Connects to `host:port`.
    pub async fn connect(endpoint: &str) -> Result<Self, FillError> {
        let failed = |source| FillError::Connect { endpoint: endpoint.to_owned(), source };
        let channel =
            Endpoint::from_shared(format!("http://{endpoint}")).map_err(failed)?.connect().await.map_err(failed)?;
        Ok(Self { client: KvClient::new(channel).max_decoding_message_size(usize::MAX) })
    }

    /// Puts every key with a value of that size. `progress` is told how many are there.
    pub async fn fill(&mut self, keys: &Keys, value_size: usize, progress: impl Fn(u64)) -> Result<(), FillError> {
        use futures_util::stream::{StreamExt, TryStreamExt, iter};
        let value = value(value_size);
        let batch = BATCH.min((BATCH_BYTES / value_size.max(1)) as u64).max(1);
        let starts = (0..keys.count).step_by(batch as usize);
        let writes = starts.map(|start| {
            let end = keys.count.min(start + batch);
            let puts = (start..end).map(|turn| put(keys.key(keys.shuffled(turn)), value.clone())).collect();
            let mut client = self.client.clone();
            async move { client.txn(TxnRequest { success: puts, ..Default::default() }).await.map(|_| end) }
        });
        let mut written = iter(writes).buffered(IN_FLIGHT);
        while let Some(end) = written.try_next().await? {
            progress(end);
        }
        Ok(())
    }

    /// Deletes everything below the prefix.
    pub async fn clear(&mut self, keys: &Keys) -> Result<(), FillError> {
        let request =
            DeleteRangeRequest { key: Bytes::from(keys.prefix.clone()), range_end: keys.end(), ..Default::default() };
        self.client.delete_range(request).await?;
        Ok(())
    }

    /// Asks once, so that a server that refuses says why: the load itself only counts failures.
    pub async fn probe(&mut self, request: RangeRequest) -> Result<(), FillError> {
        self.client.range(request).await?;
        Ok(())
    }
}

fn put(key: Bytes, value: Bytes) -> RequestOp {
    RequestOp { request: Some(Request::RequestPut(PutRequest { key, value, ..Default::default() })) }
}
