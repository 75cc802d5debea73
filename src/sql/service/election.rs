//! The Election service: a queue of keys under a name, whose oldest leads.

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response};

use super::{
    Services,
    session::{self, Changes, Leave, Place},
};
use crate::{
    proto::{
        etcdserverpb::{PutRequest, ResponseHeader, request_op},
        mvccpb::{KeyValue, event::EventType},
        v3electionpb::{
            CampaignRequest, CampaignResponse, LeaderKey, LeaderRequest, LeaderResponse, ProclaimRequest,
            ProclaimResponse, ResignRequest, ResignResponse, election_server::Election,
        },
    },
    sql::Engine,
    status::Status,
};

const NO_LEADER: Status = Status::fixed(Code::Unknown, "election: no leader");
const NOT_LEADER: Status = Status::fixed(Code::Unknown, "election: not leader");
const LEADER_MISSING: Status = Status::fixed(Code::Unknown, "\"leader\" field must be provided");

type Observed = Result<LeaderResponse, tonic::Status>;

#[tonic::async_trait]
impl Election for Services {
    async fn campaign(&self, request: Request<CampaignRequest>) -> Result<Response<CampaignResponse>, tonic::Status> {
        let elected = campaign(&self.engine, request.into_inner()).await;
        Ok(Response::new(elected.map_err(session::without_code)?))
    }

    async fn proclaim(&self, request: Request<ProclaimRequest>) -> Result<Response<ProclaimResponse>, tonic::Status> {
        let ProclaimRequest { leader, value } = request.into_inner();
        let leader = leader.ok_or(LEADER_MISSING)?;
        let place = Place { key: leader.key, revision: leader.rev };
        let proclaimed = async {
            let lease = session::lease_or_new(&self.engine, leader.lease).await?;
            proclaim(&self.engine, &place, value, lease).await
        };
        Ok(Response::new(ProclaimResponse { header: Some(proclaimed.await.map_err(session::without_code)?) }))
    }

    async fn leader(&self, request: Request<LeaderRequest>) -> Result<Response<LeaderResponse>, tonic::Status> {
        let prefix = session::prefix_of(&request.into_inner().name);
        let (header, kv) = session::oldest(&self.engine, &prefix).await.map_err(session::without_code)?;
        let kv = Some(kv.ok_or(NO_LEADER)?);
        Ok(Response::new(LeaderResponse { header: Some(header), kv }))
    }

    type ObserveStream = ReceiverStream<Observed>;

    async fn observe(&self, request: Request<LeaderRequest>) -> Result<Response<Self::ObserveStream>, tonic::Status> {
        let prefix = session::prefix_of(&request.into_inner().name);
        let (observed, stream) = mpsc::channel(16);
        let engine = self.engine.clone();
        tokio::spawn(async move {
            let gone = observed.clone();
            tokio::select! {
                () = gone.closed() => {}
                result = observe(&engine, &prefix, &observed) => if let Err(status) = result {
                    // The client may be gone as well.
                    let _ = observed.send(Err(session::without_code(status).into())).await;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn resign(&self, request: Request<ResignRequest>) -> Result<Response<ResignResponse>, tonic::Status> {
        let leader = request.into_inner().leader.ok_or(LEADER_MISSING)?;
        let created = session::compare_created(&leader.key, leader.rev);
        let resigned = session::transact(&self.engine, created, session::delete(&leader.key), None).await;
        Ok(Response::new(ResignResponse { header: resigned.map_err(session::without_code)?.header }))
    }
}

async fn campaign(engine: &Engine, request: CampaignRequest) -> Result<CampaignResponse, Status> {
    let lease = session::lease_or_new(engine, request.lease).await?;
    let prefix = session::prefix_of(&request.name);
    let key = session::key_of(&prefix, lease);
    let (header, place, existing) = session::enter(engine, key.clone(), request.value.clone(), lease).await?;
    let leave = Leave::new(engine, &place);
    if existing.is_some_and(|value| value != request.value) {
        proclaim(engine, &place, request.value, lease).await?;
    }
    session::wait_for_turn(engine, &prefix, &place).await?;
    leave.stay();
    let leader = LeaderKey { name: request.name, key, rev: place.revision, lease };
    Ok(CampaignResponse { header: Some(header), leader: Some(leader) })
}

async fn proclaim(engine: &Engine, place: &Place, value: Bytes, lease: i64) -> Result<ResponseHeader, Status> {
    let put =
        request_op::Request::RequestPut(PutRequest { key: place.key.clone(), value, lease, ..Default::default() });
    let answer = session::transact(engine, session::compare_created(&place.key, place.revision), put, None).await?;
    if answer.succeeded { Ok(answer.header.unwrap_or_default()) } else { Err(NOT_LEADER) }
}

/// Sends every leader and every value that it proclaims, until the client goes.
async fn observe(engine: &Engine, prefix: &Bytes, observed: &mpsc::Sender<Observed>) -> Result<(), Status> {
    loop {
        let (header, leader) = session::oldest(engine, prefix).await?;
        let (revision, leader) = match leader {
            Some(leader) => (header.revision, leader),
            None => match first_put(engine, prefix, header.revision).await? {
                Some(found) => found,
                None => continue,
            },
        };
        let key = leader.key.clone();
        tell(engine, observed, revision, leader).await?;
        let mut changes = Changes::new(engine, revision.saturating_add(1));
        let mut leads = true;
        while leads {
            let Some(events) = changes.next().await? else { break };
            for (revision, kind, kv) in events.into_iter().filter(|(_, _, kv)| kv.key == key) {
                if kind == i32::from(EventType::Delete) {
                    leads = false;
                    break;
                }
                tell(engine, observed, revision, kv).await?;
            }
        }
    }
}

/// Waits for the first put under the prefix at `from` or later; `None` when history has been compacted past it.
async fn first_put(engine: &Engine, prefix: &Bytes, from: i64) -> Result<Option<(i64, KeyValue)>, Status> {
    let mut changes = Changes::new(engine, from);
    while let Some(events) = changes.next().await? {
        let is_put = |kind: i32| kind == i32::from(EventType::Put);
        let mut puts = events.into_iter().filter(|(_, kind, kv)| is_put(*kind) && kv.key.starts_with(prefix));
        if let Some((revision, _, kv)) = puts.next() {
            return Ok(Some((revision, kv)));
        }
    }
    Ok(None)
}

async fn tell(
    engine: &Engine,
    observed: &mpsc::Sender<Observed>,
    revision: i64,
    leader: KeyValue,
) -> Result<(), Status> {
    let response = LeaderResponse { header: Some(engine.state().header_at(revision)), kv: Some(leader) };
    observed.send(Ok(response)).await.map_err(|_| Status::new(Code::Cancelled, "the client is gone"))
}
