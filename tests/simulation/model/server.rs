//! One member's gRPC face.

use std::{future::pending, io, pin::Pin, sync::Arc};

use bytes::Bytes;
use millpond::{
    proto::{
        etcdserverpb::{
            self as pb,
            kv_server::{Kv, KvServer},
            maintenance_server::{Maintenance, MaintenanceServer},
            watch_server::{Watch, WatchServer},
        },
        mvccpb::KeyValue,
    },
    rules::KeyRange,
    status::Status,
};
use parking_lot::Mutex;
use tokio::{io::DuplexStream, sync::mpsc, time::sleep};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Streaming, service::Routes, transport::Server};

use super::{
    cluster::{Cluster, Standpoint},
    history::Write,
    watch,
};
use crate::dice::Dice;

/// How the members of a cluster behave.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// The etcd version that they say they are.
    pub version: &'static str,
    /// The longest way between two members, in milliseconds.
    pub round_trip: u64,
    /// Records in a chunk of a RangeStream.
    pub piece: usize,
    /// A watch that keeps up falls behind once in as many revisions.
    pub victims: u32,
    /// One write in as many is done without an answer.
    pub unanswered: u32,
}

/// One member. Cheap to clone.
#[derive(Clone)]
pub struct Node {
    pub cluster: Cluster,
    pub at: usize,
    pub manner: Manner,
    dice: Arc<Mutex<Dice>>,
}

impl Node {
    pub fn new(cluster: Cluster, at: usize, manner: Manner, dice: Dice) -> Self {
        Self { cluster, at, manner, dice: Arc::new(Mutex::new(dice)) }
    }

    pub fn dice(&self) -> Dice {
        self.dice.lock().fork()
    }

    fn round_trip(&self) -> std::time::Duration {
        self.dice.lock().pause(self.manner.round_trip)
    }

    /// Serves one connection until it ends.
    pub async fn serve(self, pipe: DuplexStream) {
        let routes = Routes::new(KvServer::new(self.clone()))
            .add_service(WatchServer::new(self.clone()))
            .add_service(MaintenanceServer::new(self));
        let incoming = futures_util::stream::iter([Ok::<_, io::Error>(pipe)]);
        // A connection that the simulation breaks ends with an error, which is no news.
        let _ = Server::builder().add_routes(routes).serve_with_incoming(incoming).await;
    }

    async fn standpoint(&self, request: &pb::RangeRequest) -> Result<Standpoint, Status> {
        if request.serializable {
            return Ok(self.cluster.look().standpoint(self.at));
        }
        self.cluster.consent(self.at, self.round_trip()).await
    }

    async fn evaluate(&self, request: &pb::RangeRequest) -> Result<pb::RangeResponse, Status> {
        let hangs = self.cluster.look().counts_hang;
        if hangs && request.count_only && !request.range_end.is_empty() {
            return pending().await;
        }
        let at = self.standpoint(request).await?;
        let inner = self.cluster.look();
        let revision = if request.revision > 0 { request.revision } else { at.revision };
        if revision > at.revision {
            return Err(Status::FUTURE_REVISION);
        }
        if revision < at.compacted {
            return Err(Status::COMPACTED);
        }
        let range = KeyRange::from_request(&request.key, &request.range_end);
        let state = inner.histories[at.generation].state(revision);
        let inside: Vec<&KeyValue> = state.values().filter(|kv| range.contains(&kv.key)).collect();
        let count = inside.len() as i64;
        let limit = if request.limit > 0 { request.limit as usize } else { usize::MAX };
        let mut kvs: Vec<KeyValue> =
            inside.into_iter().filter(|kv| kv.mod_revision >= request.min_mod_revision).cloned().collect();
        let more = kvs.len() > limit;
        kvs.truncate(if request.count_only { 0 } else { limit });
        if request.keys_only {
            kvs.iter_mut().for_each(|kv| kv.value = Bytes::new());
        }
        Ok(pb::RangeResponse { header: Some(inner.header(self.at, at.revision)), kvs, more, count })
    }

    async fn stream(self, request: pb::RangeRequest, chunks: mpsc::Sender<Chunk>) {
        self.cluster.look().lists += 1;
        let mut rest = match self.evaluate(&request).await {
            Ok(answer) => answer,
            Err(status) => return drop(chunks.send(Err(status.into())).await),
        };
        let pinned = rest.header.map_or(0, |header| header.revision);
        loop {
            let later = rest.kvs.split_off(rest.kvs.len().min(self.manner.piece));
            if later.is_empty() {
                return drop(chunks.send(Ok(pb::RangeStreamResponse { range_response: Some(rest) })).await);
            }
            let kvs = std::mem::replace(&mut rest.kvs, later);
            let chunk = pb::RangeResponse { kvs, ..Default::default() };
            if chunks.send(Ok(pb::RangeStreamResponse { range_response: Some(chunk) })).await.is_err() {
                return;
            }
            sleep(self.round_trip()).await;
            let revision = if request.revision > 0 { request.revision } else { pinned };
            if self.cluster.look().standpoint(self.at).compacted > revision {
                return drop(chunks.send(Err(Status::COMPACTED.into())).await);
            }
        }
    }

    async fn write(&self, writes: &[Write]) -> Result<pb::ResponseHeader, tonic::Status> {
        sleep(self.round_trip()).await;
        let lose = self.dice.lock().chance(self.manner.unanswered);
        Ok(self.cluster.write(self.at, writes, lose).await?)
    }
}

type Chunk = Result<pb::RangeStreamResponse, tonic::Status>;
type Outgoing<T> = Pin<Box<dyn Stream<Item = Result<T, tonic::Status>> + Send>>;

fn unknown<T>() -> Result<Response<T>, tonic::Status> {
    Err(tonic::Status::unimplemented("the model does not do that"))
}

#[tonic::async_trait]
impl Kv for Node {
    type RangeStreamStream = Outgoing<pb::RangeStreamResponse>;

    async fn range(&self, request: Request<pb::RangeRequest>) -> Result<Response<pb::RangeResponse>, tonic::Status> {
        Ok(Response::new(self.evaluate(request.get_ref()).await?))
    }

    async fn range_stream(
        &self,
        request: Request<pb::RangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, tonic::Status> {
        let (chunks, stream) = mpsc::channel(1);
        tokio::spawn(self.clone().stream(request.into_inner(), chunks));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn put(&self, request: Request<pb::PutRequest>) -> Result<Response<pb::PutResponse>, tonic::Status> {
        let pb::PutRequest { key, value, .. } = request.into_inner();
        let header = self.write(&[Write::Put(key, value)]).await?;
        Ok(Response::new(pb::PutResponse { header: Some(header), ..Default::default() }))
    }

    async fn delete_range(
        &self,
        request: Request<pb::DeleteRangeRequest>,
    ) -> Result<Response<pb::DeleteRangeResponse>, tonic::Status> {
        let header = self.write(&[Write::Delete(request.into_inner().key)]).await?;
        Ok(Response::new(pb::DeleteRangeResponse { header: Some(header), ..Default::default() }))
    }

    async fn txn(&self, _: Request<pb::TxnRequest>) -> Result<Response<pb::TxnResponse>, tonic::Status> {
        unknown()
    }

    async fn compact(
        &self,
        request: Request<pb::CompactionRequest>,
    ) -> Result<Response<pb::CompactionResponse>, tonic::Status> {
        sleep(self.round_trip()).await;
        let header = self.cluster.compact_through(self.at, request.get_ref().revision).await?;
        Ok(Response::new(pb::CompactionResponse { header: Some(header) }))
    }
}

#[tonic::async_trait]
impl Watch for Node {
    type WatchStream = Outgoing<pb::WatchResponse>;

    async fn watch(
        &self,
        request: Request<Streaming<pb::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, tonic::Status> {
        let required = request.metadata().get("hasleader").is_some_and(|value| value == "true");
        if required && !self.cluster.look().is_connected(self.at) {
            return Err(Status::NO_LEADER.into());
        }
        let (responses, stream) = mpsc::channel(watch::QUEUE);
        tokio::spawn(watch::serve(self.clone(), request.into_inner(), responses, required));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

#[tonic::async_trait]
impl Maintenance for Node {
    type SnapshotStream = Outgoing<pb::SnapshotResponse>;

    async fn status(&self, _: Request<pb::StatusRequest>) -> Result<Response<pb::StatusResponse>, tonic::Status> {
        let inner = self.cluster.look();
        let header = inner.header(self.at, inner.standpoint(self.at).revision);
        Ok(Response::new(pb::StatusResponse {
            header: Some(header),
            version: self.manner.version.to_owned(),
            leader: u64::from(inner.is_connected(self.at)),
            raft_term: header.raft_term,
            ..Default::default()
        }))
    }

    async fn alarm(&self, _: Request<pb::AlarmRequest>) -> Result<Response<pb::AlarmResponse>, tonic::Status> {
        unknown()
    }

    async fn defragment(
        &self,
        _: Request<pb::DefragmentRequest>,
    ) -> Result<Response<pb::DefragmentResponse>, tonic::Status> {
        unknown()
    }

    async fn hash(&self, _: Request<pb::HashRequest>) -> Result<Response<pb::HashResponse>, tonic::Status> {
        unknown()
    }

    async fn hash_kv(&self, _: Request<pb::HashKvRequest>) -> Result<Response<pb::HashKvResponse>, tonic::Status> {
        unknown()
    }

    async fn snapshot(&self, _: Request<pb::SnapshotRequest>) -> Result<Response<Self::SnapshotStream>, tonic::Status> {
        unknown()
    }

    async fn move_leader(
        &self,
        _: Request<pb::MoveLeaderRequest>,
    ) -> Result<Response<pb::MoveLeaderResponse>, tonic::Status> {
        unknown()
    }

    async fn downgrade(
        &self,
        _: Request<pb::DowngradeRequest>,
    ) -> Result<Response<pb::DowngradeResponse>, tonic::Status> {
        unknown()
    }
}
