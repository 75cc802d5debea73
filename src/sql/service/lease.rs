//! The Lease service.

use std::time::Instant;

use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Streaming};

use super::Services;
use crate::{
    proto::etcdserverpb::{
        LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseLeasesRequest,
        LeaseLeasesResponse, LeaseRevokeRequest, LeaseRevokeResponse, LeaseStatus, LeaseTimeToLiveRequest,
        LeaseTimeToLiveResponse, lease_server::Lease,
    },
    sql::{Engine, leases::Renewal, quota, transaction::Transaction},
    status::Status,
};

#[tonic::async_trait]
impl Lease for Services {
    async fn lease_grant(
        &self,
        request: Request<LeaseGrantRequest>,
    ) -> Result<Response<LeaseGrantResponse>, tonic::Status> {
        Ok(Response::new(grant(&self.engine, request.into_inner()).await?))
    }

    async fn lease_revoke(
        &self,
        request: Request<LeaseRevokeRequest>,
    ) -> Result<Response<LeaseRevokeResponse>, tonic::Status> {
        let id = request.into_inner().id;
        let revoke = move |transaction: &mut Transaction<'_>| {
            quota::admit(transaction, false)?;
            transaction.revoke(id)
        };
        let revision = self.engine.write(0, revoke).await?;
        Ok(Response::new(LeaseRevokeResponse { header: Some(self.engine.state().header_at(revision)) }))
    }

    type LeaseKeepAliveStream = ReceiverStream<Result<LeaseKeepAliveResponse, tonic::Status>>;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, tonic::Status> {
        let (responses, stream) = mpsc::channel(16);
        tokio::spawn(keep_alive(self.engine.clone(), request.into_inner(), responses));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<LeaseTimeToLiveRequest>,
    ) -> Result<Response<LeaseTimeToLiveResponse>, tonic::Status> {
        let LeaseTimeToLiveRequest { id, keys } = request.into_inner();
        let keys = if keys { self.engine.read(move |store, _| Ok(store.lease_keys(id)?)).await? } else { Vec::new() };
        let found = self.engine.state().leases.lock().time_to_live(id, Instant::now());
        let header = Some(self.engine.state().header());
        let unknown = LeaseTimeToLiveResponse { header, id, ttl: -1, ..Default::default() };
        Ok(Response::new(match found {
            Some((ttl, granted_ttl)) => LeaseTimeToLiveResponse { ttl, granted_ttl, keys, ..unknown },
            None => unknown,
        }))
    }

    async fn lease_leases(
        &self,
        _: Request<LeaseLeasesRequest>,
    ) -> Result<Response<LeaseLeasesResponse>, tonic::Status> {
        let ids = self.engine.state().leases.lock().ids();
        let leases = ids.into_iter().map(|id| LeaseStatus { id }).collect();
        Ok(Response::new(LeaseLeasesResponse { header: Some(self.engine.state().header()), leases }))
    }
}

/// Grants a lease.
pub async fn grant(engine: &Engine, request: LeaseGrantRequest) -> Result<LeaseGrantResponse, Status> {
    quota::check(engine, quota::LEASE_COST).await?;
    let grant = move |transaction: &mut Transaction<'_>| {
        quota::admit(transaction, true)?;
        transaction.grant(&request)
    };
    let mut response = engine.write(0, grant).await?;
    engine.state().fill(&mut response.header);
    Ok(response)
}

async fn keep_alive(
    engine: Engine,
    mut requests: Streaming<LeaseKeepAliveRequest>,
    responses: mpsc::Sender<Result<LeaseKeepAliveResponse, tonic::Status>>,
) {
    let closed = engine.closed().clone();
    loop {
        let request = tokio::select! {
            request = requests.next() => request,
            () = responses.closed() => return,
            () = closed.cancelled() => Some(Err(Status::STOPPED.into())),
        };
        let response = match request {
            Some(Ok(LeaseKeepAliveRequest { id })) => {
                // Taken before the renewal, so that a lease revoked at a revision is never seen renewed after it.
                let header = Some(engine.state().header());
                renew(&engine, id).await.map(|ttl| LeaseKeepAliveResponse { header, id, ttl })
            }
            Some(Err(error)) => Err(error.into()),
            None => return,
        };
        let failed = response.is_err();
        if responses.send(response.map_err(tonic::Status::from)).await.is_err() || failed {
            return;
        }
    }
}

/// Renews a lease. Returns its time to live, 0 when there is no such lease (any more).
async fn renew(engine: &Engine, id: i64) -> Result<i64, Status> {
    let renewal = engine.state().leases.lock().renew(id, Instant::now());
    match renewal {
        Renewal::Unknown => Ok(0),
        Renewal::Expired => {
            engine.write(0, move |transaction| transaction.expire(id)).await?;
            Ok(0)
        }
        Renewal::Renewed { ttl, clear_checkpoint: false } => Ok(ttl),
        Renewal::Renewed { ttl, clear_checkpoint: true } => {
            let cleared = engine.write(0, move |transaction| transaction.clear_checkpoint(id)).await;
            if cleared.is_err() {
                engine.state().leases.lock().clearing_failed(id);
            }
            cleared.map(|()| ttl)
        }
    }
}
