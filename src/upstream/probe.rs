//! Asks one endpoint, again and again, whether it is well.
//!
//! Two questions go out together. Maintenance.Status tells version, leader, cluster and term. A serializable Range of one
//! key without a token tells whether authentication is on, since it then fails; it costs etcd next to nothing, where
//! AuthStatus would go through consensus. Since 3.5.33 and 3.6 Status itself needs a token when authentication is on; then
//! `GET /version` gives the version, and a MemberList that is not linearizable, which needs no token, gives the rest.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header::HOST};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use prost::Message;
use tokio::{
    join,
    time::{sleep, timeout},
};
use tonic::Code;

use super::{AuthState, EndpointId, Report, RequestBody, Shared, Version, connection::Class, decode, grpc};
use crate::{
    proto::etcdserverpb::{
        MemberListRequest, MemberListResponse, RangeRequest, ResponseHeader, StatusRequest, StatusResponse,
    },
    status::Status,
};

const STATUS: &str = "/etcdserverpb.Maintenance/Status";
const RANGE: &str = "/etcdserverpb.KV/Range";
const MEMBER_LIST: &str = "/etcdserverpb.Cluster/MemberList";
/// An answer to `GET /version` has about 70 bytes.
const VERSION_LIMIT: usize = 4096;

/// Probes the endpoint until the task is aborted.
pub(super) async fn run(shared: Arc<Shared>, at: EndpointId) {
    let Some(member) = shared.members.get(at.0) else { return };
    loop {
        let epoch = shared.roster.lock().epoch();
        let found = timeout(shared.settings.connect_timeout, probe(&shared, at)).await;
        let found = found.unwrap_or_else(|_| Err(Status::fixed(Code::DeadlineExceeded, "no answer to a probe")));
        if found.is_err() {
            member.pool.retire();
        }
        shared.roster.lock().record(at, epoch, found.map_err(|status| status.message.into_owned()));
        shared.reap(at);
        // A kick that came while the probe was under way is about something the probe may not have seen.
        let _ = timeout(shared.settings.auth_probe_interval, member.kick.notified()).await;
        sleep(KICK_SPACING).await;
    }
}

/// Keeps a storm of failures from becoming a storm of probes.
const KICK_SPACING: Duration = Duration::from_millis(10);

async fn probe(shared: &Shared, at: EndpointId) -> Result<Report, Status> {
    let question = StatusRequest::default();
    let (status, auth) = join!(ask::<_, StatusResponse>(shared, at, STATUS, &[], &question), auth(shared, at));
    match status {
        Ok(status) => Ok(from_status(status, auth)),
        Err(refused) if refuses_strangers(&refused) => probe_secured(shared, at).await,
        Err(status) => Err(status),
    }
}

fn from_status(status: StatusResponse, auth: AuthState) -> Report {
    let header = status.header.unwrap_or_default();
    Report {
        version: status.version.parse().ok(),
        has_leader: status.leader != 0,
        is_learner: status.is_learner,
        ..from_header(&header, auth)
    }
}

fn from_header(header: &ResponseHeader, auth: AuthState) -> Report {
    Report {
        version: None,
        has_leader: true,
        is_learner: false,
        cluster_id: header.cluster_id,
        member_id: header.member_id,
        raft_term: header.raft_term,
        auth,
    }
}

/// For a member that answers strangers no Status.
async fn probe_secured(shared: &Shared, at: EndpointId) -> Result<Report, Status> {
    let list = MemberListRequest { linearizable: false };
    let with_leader = async {
        match ask::<_, MemberListResponse>(shared, at, MEMBER_LIST, &[("hasleader", "true")], &list).await {
            Err(status) if status == Status::NO_LEADER => {
                ask(shared, at, MEMBER_LIST, &[], &list).await.map(|members| (members, false))
            }
            answer => answer.map(|members| (members, true)),
        }
    };
    let (members, version) = join!(with_leader, version(shared, at));
    let (members, has_leader) = members?;
    let header = members.header.unwrap_or_default();
    let me = members.members.iter().find(|member| member.id == header.member_id);
    let is_learner = me.is_some_and(|member| member.is_learner);
    Ok(Report { version: version?, has_leader, is_learner, ..from_header(&header, AuthState::On) })
}

/// Whether permissions are checked.
async fn auth(shared: &Shared, at: EndpointId) -> AuthState {
    let question = RangeRequest {
        key: Bytes::from_static(b"\0"),
        limit: 1,
        serializable: true,
        keys_only: true,
        count_only: true,
        ..RangeRequest::default()
    };
    let deadline = shared.settings.connect_timeout;
    match shared.unary(at, Class::Probe, RANGE, &[], grpc::frame(&question), deadline).await {
        Ok(_) => AuthState::Off,
        Err(status) if refuses_strangers(&status) => AuthState::On,
        Err(_) => AuthState::Unknown,
    }
}

fn refuses_strangers(status: &Status) -> bool {
    *status == Status::USER_EMPTY || matches!(status.code, Code::Unauthenticated | Code::PermissionDenied)
}

async fn ask<Q: Message, A: Message + Default>(
    shared: &Shared,
    at: EndpointId,
    path: &'static str,
    metadata: &[(&'static str, &'static str)],
    question: &Q,
) -> Result<A, Status> {
    let deadline = shared.settings.connect_timeout;
    let answer = shared.unary(at, Class::Probe, path, metadata, grpc::frame(question), deadline).await?;
    decode(path, answer)
}

/// The version that the server tells everyone; `None` when it does not read like one.
async fn version(shared: &Shared, at: EndpointId) -> Result<Option<Version>, Status> {
    let member = shared.member(at)?;
    let mut connection = member.pool.http1().await?;
    let request = Request::builder()
        .method(Method::GET)
        .uri("/version")
        .header(HOST, member.authority.as_str())
        .body(RequestBody::full(Bytes::new()))
        .map_err(|error| Status::new(Code::Internal, error.to_string()))?;
    let response = connection.send_request(request).await.map_err(|error| grpc::from_transport(&error))?;
    Ok(read_version(response).await)
}

async fn read_version(response: Response<Incoming>) -> Option<Version> {
    if response.status() != StatusCode::OK {
        return None;
    }
    let text = Limited::new(response.into_body(), VERSION_LIMIT).collect().await.ok()?.to_bytes();
    let fields: serde_json::Value = serde_json::from_slice(&text).ok()?;
    fields.get("etcdserver")?.as_str()?.parse().ok()
}
