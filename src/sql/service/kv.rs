//! The KV service.

use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response};

use super::{Services, limits};
use crate::{
    proto::etcdserverpb::{
        CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse,
        RangeRequest, RangeResponse, RangeStreamResponse, TxnRequest, TxnResponse, kv_server::Kv,
    },
    rules::{successor, validate},
    sql::{
        Engine,
        backend::Reader,
        quota,
        range::{self, evaluate},
        transaction::{Transaction, is_read_only, read_only},
    },
    status::Status,
};

/// Keys in the first chunk of a streamed range, as in etcd.
const FIRST_CHUNK: i64 = 10;

#[tonic::async_trait]
impl Kv for Services {
    async fn range(&self, request: Request<RangeRequest>) -> Result<Response<RangeResponse>, tonic::Status> {
        let request = request.into_inner();
        validate::range(&request)?;
        let engine = self.engine.clone();
        let read = move |store: &mut dyn Reader, at| engine.state().counts.evaluate(store, &request, at);
        let mut response = self.engine.read(read).await?;
        self.engine.state().fill(&mut response.header);
        Ok(Response::new(response))
    }

    type RangeStreamStream = ReceiverStream<Result<RangeStreamResponse, tonic::Status>>;

    async fn range_stream(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, tonic::Status> {
        let request = request.into_inner();
        validate::range_stream(&request)?;
        let (chunks, stream) = mpsc::channel(2);
        tokio::spawn(stream_range(self.engine.clone(), request, chunks));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, tonic::Status> {
        let request = request.into_inner();
        validate::put(&request)?;
        quota::check(&self.engine, quota::put_cost(&request)).await?;
        let cost = limits::check(&request, self.engine.state().options.max_request_bytes)?;
        let write = move |transaction: &mut Transaction<'_>| {
            quota::admit(transaction, true)?;
            transaction.put(request)
        };
        let mut response = self.engine.write(cost, write).await?;
        self.engine.state().fill(&mut response.header);
        Ok(Response::new(response))
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, tonic::Status> {
        let request = request.into_inner();
        validate::delete(&request)?;
        let cost = limits::check(&request, self.engine.state().options.max_request_bytes)?;
        let write = move |transaction: &mut Transaction<'_>| {
            quota::admit(transaction, false)?;
            transaction.delete_range(&request)
        };
        let mut response = self.engine.write(cost, write).await?;
        self.engine.state().fill(&mut response.header);
        Ok(Response::new(response))
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, tonic::Status> {
        let request = request.into_inner();
        let options = &self.engine.state().options;
        validate::txn(&request, options.max_txn_ops)?;
        let needs = quota::txn_cost(&request);
        quota::check(&self.engine, needs).await?;
        let mut response = if is_read_only(&request) {
            self.engine.read(move |store, at| read_only(store, request, at)).await?
        } else {
            let cost = limits::check(&request, options.max_request_bytes)?;
            let write = move |transaction: &mut Transaction<'_>| {
                quota::admit(transaction, needs > 0)?;
                transaction.txn(request)
            };
            self.engine.write(cost, write).await?
        };
        self.engine.state().fill(&mut response.header);
        Ok(Response::new(response))
    }

    async fn compact(
        &self,
        request: Request<CompactionRequest>,
    ) -> Result<Response<CompactionResponse>, tonic::Status> {
        let CompactionRequest { revision, physical } = request.into_inner();
        let compact = move |transaction: &mut Transaction<'_>| {
            quota::admit(transaction, false)?;
            transaction.compact(revision)
        };
        self.engine.write(0, compact).await?;
        if physical {
            self.engine.compaction_finished(revision).await?;
        }
        Ok(Response::new(CompactionResponse { header: Some(self.engine.state().header()) }))
    }
}

/// Streams a range in chunks at one revision, each about as large as the largest request, and tells the number of keys with
/// the last.
async fn stream_range(
    engine: Engine,
    mut request: RangeRequest,
    chunks: mpsc::Sender<Result<RangeStreamResponse, tonic::Status>>,
) {
    request.sort_target = 0;
    let total = if request.limit > 0 { request.limit } else { i64::MAX };
    let (mut sent, mut limit, mut revision) = (0_i64, FIRST_CHUNK, 0);
    loop {
        request.limit = limit.min(total - sent).max(1);
        let chunk = match read_chunk(&engine, &request, limit >= total - sent).await {
            Ok(chunk) => chunk,
            Err(status) => return drop(chunks.send(Err(status.into())).await),
        };
        if revision == 0 {
            revision = chunk.header.as_ref().map_or(0, |header| header.revision);
            request.revision = if request.revision <= 0 { revision } else { request.revision };
        }
        let keys = i64::try_from(chunk.kvs.len()).unwrap_or(i64::MAX);
        let last = !chunk.more || sent + keys >= total || request.count_only;
        let next = chunk.kvs.last().map(|kv| successor(&kv.key)).unwrap_or_default();
        limit = next_limit(limit, chunk.encoded_len(), engine.state().options.max_request_bytes);
        let mut response = RangeResponse { kvs: chunk.kvs, ..Default::default() };
        if last {
            response.header = Some(engine.state().header_at(revision));
            response.more = chunk.more && !request.count_only;
            let remaining = if chunk.more || request.count_only { chunk.count } else { keys };
            response.count = sent.saturating_add(remaining);
        }
        let message = RangeStreamResponse { range_response: Some(response) };
        if chunks.send(Ok(message)).await.is_err() || last {
            return;
        }
        sent += keys;
        request.key = next;
    }
}

/// One chunk. With `count`, it also tells how many keys there are from its first on.
async fn read_chunk(engine: &Engine, request: &RangeRequest, count: bool) -> Result<RangeResponse, Status> {
    let request = request.clone();
    engine
        .read(move |store, at| {
            let counts = request.count_only || count;
            if counts { evaluate(store, &request, at) } else { range::first(store, &request, at) }
        })
        .await
}

/// The number of keys for the next chunk, so that chunks come near `target` bytes.
fn next_limit(limit: i64, bytes: usize, target: usize) -> i64 {
    match bytes {
        _ if bytes < target / 2 => limit.saturating_mul(2),
        _ if bytes > target.saturating_mul(2) => (limit / 2).max(1),
        _ => limit,
    }
}
