//! Asks one endpoint, again and again, whether it is well.
//!
//! Two questions go out together. Maintenance.Status tells version, leader, cluster and term; before it, the member is asked whether it
//! knows itself among the members, since one that was removed panics at Status (etcd 3.7.1). A serializable Range of one
//! key without a token tells whether authentication is on, since it then fails; it costs etcd next to nothing, where
//! AuthStatus would go through consensus. Newer versions (3.6, and late 3.5) answer Status and MemberList to nobody without
//! a token when authentication is on. Then `GET /version` gives the version, and the rest is in the header with which a
//! watch is refused; the watch is one that every version refuses.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header::HOST};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use tokio::{
    join,
    time::{sleep, timeout},
};
use tonic::Code;

use super::{
    AuthState, EndpointId, Report, RequestBody, Version,
    connection::Class,
    shared::{Shared, decode},
};
use crate::{
    grpc,
    proto::{
        etcdserverpb::{
            MemberListRequest, MemberListResponse, RangeRequest, ResponseHeader, StatusRequest, StatusResponse,
            WatchCreateRequest, WatchRequest, WatchResponse, watch_request::RequestUnion,
        },
        paths,
    },
    status::Status,
};

const REMOVED: Status = Status::fixed(Code::Unavailable, "the member was removed from its cluster");
/// An answer to `GET /version` has about 70 bytes.
const VERSION_LIMIT: usize = 4096;

/// Probes the endpoint until the task is aborted.
pub(super) async fn run(shared: Arc<Shared>, at: EndpointId) {
    let Some(member) = shared.members.get(at.0) else { return };
    let mut listed = None;
    loop {
        let epoch = shared.roster.lock().epoch();
        let found = timeout(shared.settings.connect_timeout, probe(&shared, at, &mut listed)).await;
        let found = found.unwrap_or_else(|_| Err(Status::fixed(Code::DeadlineExceeded, "no answer to a probe")));
        if found.is_err() {
            member.pool.retire();
        }
        shared.roster.lock().record(at, epoch, found.map_err(|status| status.message.into_owned()));
        shared.reap(at);
        // A kick that came while the probe was under way is about something the probe may not have seen.
        let _ = timeout(shared.settings.probe_interval, member.kick.notified()).await;
        sleep(KICK_SPACING).await;
    }
}

/// Keeps a storm of failures from becoming a storm of probes.
const KICK_SPACING: Duration = Duration::from_millis(10);

async fn probe(shared: &Arc<Shared>, at: EndpointId, listed: &mut Option<u64>) -> Result<Report, Status> {
    let (status, auth) = join!(status(shared, at, listed), auth(shared, at));
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
async fn probe_secured(shared: &Arc<Shared>, at: EndpointId) -> Result<Report, Status> {
    let header = async {
        match refused_watch(shared, at, &[("hasleader", "true")]).await {
            Err(status) if status == Status::NO_LEADER => Ok((refused_watch(shared, at, &[]).await?, false)),
            answer => answer.map(|header| (header, true)),
        }
    };
    // With `--listen-client-http-urls`, etcd speaks no HTTP/1.1 on this port: the member is well, its version is not known.
    let version = timeout(shared.settings.connect_timeout / 2, version(shared, at));
    let (header, version) = join!(header, version);
    let (header, has_leader) = header?;
    let version = version.ok().and_then(Result::ok).flatten();
    Ok(Report { version, has_leader, ..from_header(&header, AuthState::On) })
}

/// The header of the refusal of a watch from a negative revision.
async fn refused_watch(
    shared: &Arc<Shared>,
    at: EndpointId,
    metadata: &[(&'static str, &'static str)],
) -> Result<ResponseHeader, Status> {
    let (sender, mut receiver) = shared.open_stream(at, Class::Probe, paths::WATCH, metadata).await?;
    let create = WatchCreateRequest { key: Bytes::from_static(b"\0"), start_revision: -1, ..Default::default() };
    sender.send(&WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }).await?;
    let refusal = receiver.next().await.unwrap_or(Err(UNTOLD))?;
    decode::<WatchResponse>(paths::WATCH, refusal)?.header.ok_or(UNTOLD)
}

const UNTOLD: Status = Status::fixed(Code::Internal, "a refused watch told no header");

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
    match shared.unary(at, Class::Probe, paths::RANGE, &[], grpc::frame(&question), deadline).await {
        Ok(_) => AuthState::Off,
        Err(status) if refuses_strangers(&status) => AuthState::On,
        Err(_) => AuthState::Unknown,
    }
}

/// Whether etcd says so because permissions are checked.
pub(crate) fn refuses_strangers(status: &Status) -> bool {
    *status == Status::USER_EMPTY || matches!(status.code, Code::Unauthenticated | Code::PermissionDenied)
}

async fn status(shared: &Shared, at: EndpointId, listed: &mut Option<u64>) -> Result<StatusResponse, Status> {
    if is_removed(shared, at, listed).await {
        return Err(REMOVED);
    }
    let deadline = shared.settings.connect_timeout;
    let question = grpc::frame(&StatusRequest::default());
    let (answer, _) = shared.unary(at, Class::Probe, paths::STATUS, &[], question, deadline).await?;
    decode(paths::STATUS, answer)
}

/// Whether the member, whose id was among the cluster's when it was found to be `listed`, is not any more. For a second it goes on
/// answering then. What cannot be told, as by a learner or while authentication is on, is no removal.
async fn is_removed(shared: &Shared, at: EndpointId, listed: &mut Option<u64>) -> bool {
    let question = grpc::frame(&MemberListRequest { linearizable: false });
    // Who cannot tell in time may still answer Status.
    let deadline = shared.settings.connect_timeout / 2;
    let answer = shared.unary(at, Class::Probe, paths::MEMBER_LIST, &[], question, deadline).await;
    let Ok(list) = answer.and_then(|(answer, _)| decode::<MemberListResponse>(paths::MEMBER_LIST, answer)) else {
        return false;
    };
    let id = list.header.unwrap_or_default().member_id;
    if list.members.iter().any(|member| member.id == id) {
        *listed = Some(id);
        return false;
    }
    *listed == Some(id)
}

/// The version that the server tells everyone; `None` when it does not read like one.
async fn version(shared: &Shared, at: EndpointId) -> Result<Option<Version>, Status> {
    let member = shared.member(at)?;
    let (mut connection, _) = member.pool.http1().await?;
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
