//! Calls that etcd answers: byte for byte with metadata, trailers, half-close, flow control, deadline and cancellation.
//!
//! What a path means to the proxy stands in one table, [`Handling::of`]. A path that is not in it is forwarded as a stream,
//! so an RPC of a future etcd works on the day it ships.

use std::{sync::Arc, time::Duration};

use ::http::{
    HeaderMap, HeaderName, Method, Request, Response,
    header::{CONNECTION, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TRANSFER_ENCODING, UPGRADE},
};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::{
    body::{Body, read_message},
    listener::Connection,
    observe::{AnswerObserver, Encoding, ObservedBody, Peek},
    response,
};
use crate::{
    grpc::{self, Incoming},
    status::Status,
    upstream::{AuthHold, EndpointId, ForwardClass, Forwarded, RequestBody, Route, Upstream},
};

/// How long a member-bound call waits for the first probes.
const PATIENCE: Duration = Duration::from_secs(5);
const NO_METHOD: Status = Status::fixed(Code::Unimplemented, "CONNECT is not a gRPC method");

/// How a path is forwarded.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Handling {
    /// The limit that it is under.
    pub class: ForwardClass,
    /// It speaks of one member, so a client must keep reaching the same one.
    pub member_bound: bool,
    /// It may switch authentication on.
    pub enables_auth: bool,
    /// It goes on until somebody breaks it off, so a server that leaves has to.
    pub endless: bool,
}

impl Handling {
    const UNARY: Handling =
        Handling { class: ForwardClass::Unary, member_bound: false, enables_auth: false, endless: false };
    const STREAM: Handling = Handling { class: ForwardClass::Stream, ..Handling::UNARY };
    const ENDLESS: Handling = Handling { endless: true, ..Handling::STREAM };

    /// The handling of a gRPC path. Calls that block for as long as they like are streams here.
    pub fn of(path: &str) -> Handling {
        let Some((service, method)) = path.strip_prefix('/').and_then(|path| path.split_once('/')) else {
            return Handling::STREAM;
        };
        match (service, method) {
            ("etcdserverpb.KV", "Range" | "Put" | "DeleteRange" | "Txn" | "Compact") => Handling::UNARY,
            ("etcdserverpb.Lease", "LeaseGrant" | "LeaseRevoke" | "LeaseTimeToLive" | "LeaseLeases") => Handling::UNARY,
            (
                "etcdserverpb.Cluster",
                "MemberAdd" | "MemberRemove" | "MemberUpdate" | "MemberList" | "MemberPromote",
            ) => Handling::UNARY,
            ("etcdserverpb.Maintenance", "Alarm") => Handling::UNARY,
            ("etcdserverpb.Maintenance", "Status" | "Hash" | "HashKV" | "MoveLeader" | "Downgrade") => {
                Handling { member_bound: true, ..Handling::UNARY }
            }
            ("etcdserverpb.Maintenance", _) => Handling { member_bound: true, ..Handling::STREAM },
            ("etcdserverpb.Auth", "AuthEnable") => Handling { enables_auth: true, ..Handling::UNARY },
            ("etcdserverpb.Auth", _) => Handling::UNARY,
            ("etcdserverpb.Watch", "Watch") | ("etcdserverpb.Lease", "LeaseKeepAlive") => Handling::ENDLESS,
            ("v3electionpb.Election", "Observe") => Handling::ENDLESS,
            ("v3lockpb.Lock", "Unlock") => Handling::UNARY,
            ("v3electionpb.Election", "Proclaim" | "Leader" | "Resign") => Handling::UNARY,
            _ => Handling::STREAM,
        }
    }
}

/// A call with all that it asks, where that is one message of at most `limit` bytes: a client that sends none, or never the rest of it,
/// is not to keep others from being forwarded.
///
/// # Errors
/// As [`read_message`], and DeadlineExceeded.
pub async fn whole(mut request: Request<Incoming>, limit: usize) -> Result<Request<RequestBody>, Status> {
    if Handling::of(request.uri().path()).class == ForwardClass::Stream {
        return Ok(request.map(RequestBody::from));
    }
    let deadline = grpc::deadline(request.headers());
    let message = within(deadline, read_message(&mut request, limit)).await?;
    // What is forwarded is not compressed any more.
    request.headers_mut().remove(grpc::ENCODING);
    Ok(request.map(|_| RequestBody::full(grpc::frame_encoded(&message))))
}

/// Forwards a gRPC call and gives etcd's answer, or a failure in etcd's words.
///
/// `observer` is told the header of the answer before the client can read that; it is for KV calls.
pub async fn forward(
    upstream: &Upstream,
    connection: &Connection,
    request: Request<impl Into<RequestBody>>,
    observer: Option<Arc<dyn AnswerObserver>>,
) -> Response<Body> {
    let handling = Handling::of(request.uri().path());
    let encoding = encoding_of(request.uri().path());
    let deadline = grpc::deadline(request.headers());
    let hold = handling.enables_auth.then(|| upstream.suspect_auth());
    let stop = handling.endless.then(|| connection.stop().clone());
    let sending = until_stopped(stop.clone(), Box::pin(send(upstream, connection, handling, request.map(Into::into))));
    match within(deadline, sending).await {
        Ok(forwarded) => {
            let end = stop.map(CancellationToken::cancelled_owned);
            // The first hold may have been over before etcd answered, and the client is about to know.
            let hold = hold.map(|_| upstream.suspect_auth());
            answer(forwarded, encoding, observer, hold).map(|body| body.until(end))
        }
        Err(status) => {
            tracing::debug!(peer = %connection.peer, %status, "forwarded call failed");
            response::error(&status)
        }
    }
}

/// Where headers stand in the answer to a call.
fn encoding_of(path: &str) -> Encoding {
    match path.rsplit_once('/') {
        Some((_, "RangeStream")) => Encoding::GrpcChunks,
        Some((_, "Watch" | "LeaseKeepAlive" | "Observe")) => Encoding::GrpcStream,
        _ => Encoding::Grpc,
    }
}

/// What `work` gives, unless the time that the client gives it is over first.
async fn within<T>(deadline: Option<Duration>, work: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    match deadline {
        Some(deadline) => timeout(deadline, work).await.unwrap_or(Err(Status::DEADLINE)),
        None => work.await,
    }
}

/// What `sending` gives, unless the server leaves first.
async fn until_stopped(
    stop: Option<CancellationToken>,
    sending: impl Future<Output = Result<Forwarded, Status>>,
) -> Result<Forwarded, Status> {
    match stop {
        Some(stop) => stop.run_until_cancelled(sending).await.unwrap_or(Err(Status::STOPPED)),
        None => sending.await,
    }
}

async fn send(
    upstream: &Upstream,
    connection: &Connection,
    handling: Handling,
    request: Request<RequestBody>,
) -> Result<Forwarded, Status> {
    if request.method() == Method::CONNECT {
        return Err(NO_METHOD);
    }
    let request = passable(request);
    if !handling.member_bound {
        return upstream.forward(Route::Preferred, handling.class, request).await;
    }
    let at = pinned(upstream, connection).await?;
    let forwarded = upstream.forward(Route::Member(at), handling.class, request).await;
    if forwarded.is_err() {
        leave_lost_member(upstream, connection, at);
    }
    forwarded
}

/// The member that this client's member-bound calls go to: the one preferred at the first of them, then always that one.
pub(super) async fn pinned(upstream: &Upstream, connection: &Connection) -> Result<EndpointId, Status> {
    if let Some(at) = connection.member.get() {
        return Ok(*at);
    }
    let preferred = upstream.await_preferred(&[], PATIENCE).await.ok_or(Status::NO_CONNECTION)?;
    Ok(*connection.member.get_or_init(|| preferred))
}

/// A client whose member is gone while others are well would fail for ever on this connection, which gRPC clients keep.
/// It is asked to open another: calls under way go on, and new ones find a new member.
fn leave_lost_member(upstream: &Upstream, connection: &Connection, at: EndpointId) {
    if upstream.preferred(&[at]).is_some() {
        tracing::info!(peer = %connection.peer, member = upstream.name(at), "member is gone, client is asked to reconnect");
        connection.retire();
    }
}

/// Wraps a forwarded answer for the client.
pub(super) fn answer(
    forwarded: Forwarded,
    encoding: Encoding,
    observer: Option<Arc<dyn AnswerObserver>>,
    hold: Option<AuthHold>,
) -> Response<Body> {
    let (mut head, body) = forwarded.response.into_parts();
    head.extensions.clear();
    strip_hop_by_hop(&mut head.headers);
    let success = head.status.is_success();
    let peek = observer.filter(|_| success).map(|observer| Peek::new(observer, forwarded.connection, encoding));
    Response::from_parts(head, Body::Forwarded(Box::new(ObservedBody::new(body, encoding, peek, hold))))
}

/// A request without what concerns the client's own connection only.
pub(super) fn passable(request: Request<RequestBody>) -> Request<RequestBody> {
    let (mut head, body) = request.into_parts();
    head.extensions.clear();
    strip_hop_by_hop(&mut head.headers);
    Request::from_parts(head, body)
}

fn strip_hop_by_hop(headers: &mut HeaderMap) {
    const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
    const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
    let named: Vec<String> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|name| name.trim().to_owned())
        .collect();
    named.iter().for_each(|name| drop(headers.remove(name)));
    let ours = [CONNECTION, KEEP_ALIVE, PROXY_CONNECTION, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION];
    ours.iter().chain(&[TRANSFER_ENCODING, UPGRADE]).for_each(|name| drop(headers.remove(name)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_knows_what_blocks_what_is_bound_and_what_is_new() {
        let class = |path| Handling::of(path).class;
        for blocking in [
            "/etcdserverpb.Watch/Watch",
            "/etcdserverpb.Lease/LeaseKeepAlive",
            "/etcdserverpb.KV/RangeStream",
            "/v3lockpb.Lock/Lock",
            "/v3electionpb.Election/Campaign",
            "/v3electionpb.Election/Observe",
            "/etcdserverpb.Maintenance/Snapshot",
            "/etcdserverpb.Maintenance/Defragment",
            "/future.Service/Call",
            "nonsense",
            "",
        ] {
            assert_eq!(class(blocking), ForwardClass::Stream, "{blocking}");
        }
        for unary in ["/etcdserverpb.KV/Put", "/v3lockpb.Lock/Unlock", "/etcdserverpb.Auth/UserList"] {
            assert_eq!(class(unary), ForwardClass::Unary, "{unary}");
        }
        for bound in ["Status", "Defragment", "Hash", "HashKV", "Snapshot", "MoveLeader", "Downgrade"] {
            assert!(Handling::of(&format!("/etcdserverpb.Maintenance/{bound}")).member_bound, "{bound}");
        }
        assert!(!Handling::of("/etcdserverpb.Maintenance/Alarm").member_bound);
        for endless in
            ["/etcdserverpb.Watch/Watch", "/etcdserverpb.Lease/LeaseKeepAlive", "/v3electionpb.Election/Observe"]
        {
            assert!(Handling::of(endless).endless, "{endless}");
        }
        assert!(!Handling::of("/v3lockpb.Lock/Lock").endless, "it ends by itself");
        assert!(Handling::of("/etcdserverpb.Auth/AuthEnable").enables_auth);
        assert!(!Handling::of("/etcdserverpb.Auth/AuthDisable").enables_auth);
    }

    #[test]
    fn hop_by_hop_headers_stay_behind_and_metadata_passes() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "keep-alive, x-only-here"),
            ("keep-alive", "timeout=5"),
            ("x-only-here", "1"),
            ("transfer-encoding", "chunked"),
            ("te", "trailers"),
            ("token", "secret"),
            ("trace-bin", "AAEC"),
        ] {
            headers.append(name, value.parse().unwrap());
        }
        strip_hop_by_hop(&mut headers);
        let mut left: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["te", "token", "trace-bin"]);
    }
}
