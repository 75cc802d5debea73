//! Moves a client's call to an endpoint as it is: headers, body, trailers, half-close, resets, in both directions.

use std::{
    pin::Pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, Uri, uri};
use http_body::{Body, Frame, SizeHint};
use hyper::client::conn::http1::SendRequest;
use parking_lot::Mutex;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use super::{
    ConnectionNumber, EndpointId, ForwardClass, RequestBody, Upstream,
    connection::Class,
    limits::{Limit, Permit},
    pool::Slot,
    sender::ResponseBody,
    shared::{Answer, MemberLink, Shared},
};
use crate::{
    grpc::{self, BodyError},
    status::Status,
};

/// Where a forwarded call goes.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// To the preferred endpoint, or the next one while nothing was sent.
    Preferred,
    /// To this endpoint or nowhere.
    Member(EndpointId),
}

/// A forwarded call that is being answered.
pub struct Forwarded {
    /// Who answers.
    pub at: EndpointId,
    /// Over which connection.
    pub connection: ConnectionNumber,
    /// The answer, from its headers on.
    pub response: Response<ForwardedBody>,
}

/// The body of a forwarded answer. Holds the call's place on the connection and its permit until it ends.
///
/// A unary answer that its client stops reading is given up after [`Settings::stall_limit`](super::Settings), so that
/// clients which never read cannot keep all permits.
pub struct ForwardedBody {
    call: Arc<Call>,
    shared: Arc<Shared>,
    at: EndpointId,
    passed: usize,
    watchdog: Option<AbortOnDropHandle<()>>,
}

/// What a forwarded call holds; taken away when its client stalls.
struct Call {
    live: Mutex<Option<Live>>,
    /// Frames that were asked for and came.
    frames: AtomicU64,
    /// Whether the next frame was asked for: then etcd is the one who is slow.
    asked: AtomicBool,
}

struct Live {
    incoming: ResponseBody,
    /// Whether the client has to keep reading.
    impatient: bool,
    _slot: Option<Slot>,
    _permit: Permit,
}

/// For an upstream that is away. A member of etcd that is cut off keeps a call for seven seconds, and etcd's client waits for a server
/// that is not there for as long as it may; but a client that has another server to go to is to try that soon.
pub(crate) const ABSENCE: Duration = Duration::from_secs(1);

/// Bytes after which a client can be stalled at all: its smallest window.
const SMALLEST_WINDOW: usize = 48 << 10;

#[derive(Debug, thiserror::Error)]
#[error("the client stopped reading")]
struct Stalled;

impl Upstream {
    /// Forwards a request, whatever scheme and authority its URI has. Waits a moment for an endpoint if none can be reached, and for a
    /// permit.
    ///
    /// # Errors
    /// Unavailable when no endpoint can be reached (`there is no connection available`: nothing was sent), or the
    /// connection was lost; the code that gRPC gives to a reset by etcd; see [`ForwardClass`] for what a full queue gives.
    pub async fn forward(
        &self,
        route: Route,
        class: ForwardClass,
        request: Request<RequestBody>,
    ) -> Result<Forwarded, Status> {
        let shared = self.shared();
        if route == Route::Preferred {
            // Before it takes a permit: whoever waits here keeps nothing from others.
            shared.await_any(ABSENCE).await;
        }
        let permit = shared.limit(class).permit().await?;
        let connections = match class {
            ForwardClass::Unary => Class::Unary,
            ForwardClass::Stream => Class::Stream,
        };
        let (mut request, mut tried) = (request, Vec::new());
        loop {
            let at = shared.choose(route, &tried).await?;
            let member = shared.member(at)?;
            request = aim(request, member)?;
            match shared.send(at, connections, request).await {
                Ok(Answer { response, slot }) => {
                    let connection = slot.number();
                    let impatient = class == ForwardClass::Unary;
                    let live = |incoming| Live { incoming, impatient, _slot: Some(slot), _permit: permit };
                    let response = response.map(|incoming| ForwardedBody::new(live(incoming), shared, at));
                    return Ok(Forwarded { at, connection, response });
                }
                Err(unsent) => match (unsent.request, route) {
                    (Some(given_back), Route::Preferred) => request = given_back,
                    (Some(_), Route::Member(_)) | (None, _) => return Err(unsent.status),
                },
            }
            tried.push(at);
        }
    }

    /// Forwards a request over HTTP/1.1 on a connection of its own; its URI is a path, and `Host` is as the client gave it.
    ///
    /// # Errors
    /// As [`Upstream::forward`].
    pub async fn forward_http1(&self, route: Route, request: Request<RequestBody>) -> Result<Forwarded, Status> {
        let shared = self.shared();
        let permit = shared.stream_limit.permit().await?;
        let (at, mut sender, connection) = shared.connect_http1(route).await?;
        let response = sender.send_request(request).await.map_err(|error| shared.failed(at, &error))?;
        let live = |incoming| Live {
            incoming: ResponseBody::Incoming(incoming),
            impatient: false,
            _slot: None,
            _permit: permit,
        };
        let response = response.map(|incoming| ForwardedBody::new(live(incoming), shared, at));
        Ok(Forwarded { at, connection, response })
    }
}

/// Addresses a request to a member.
fn aim(mut request: Request<RequestBody>, member: &MemberLink) -> Result<Request<RequestBody>, Status> {
    let mut parts = std::mem::take(request.uri_mut()).into_parts();
    parts.scheme = Some(uri::Scheme::HTTP);
    parts.authority = Some(member.authority.clone());
    let unusable = |error| Status::new(tonic::Code::Internal, format!("unusable path: {error}"));
    *request.uri_mut() = Uri::from_parts(parts).map_err(unusable)?;
    Ok(request)
}

impl Shared {
    fn limit(&self, class: ForwardClass) -> &Limit {
        match class {
            ForwardClass::Unary => &self.unary_limit,
            ForwardClass::Stream => &self.stream_limit,
        }
    }

    async fn connect_http1(
        &self,
        route: Route,
    ) -> Result<(EndpointId, SendRequest<RequestBody>, ConnectionNumber), Status> {
        let mut tried = Vec::new();
        loop {
            let at = self.choose(route, &tried).await?;
            match (self.member(at)?.pool.http1().await, route) {
                (Ok((sender, connection)), _) => return Ok((at, sender, connection)),
                (Err(status), Route::Member(_)) => {
                    self.suspect(at);
                    return Err(status);
                }
                (Err(_), Route::Preferred) => self.suspect(at),
            }
            tried.push(at);
        }
    }

    async fn choose(&self, route: Route, tried: &[EndpointId]) -> Result<EndpointId, Status> {
        match route {
            Route::Member(at) => Ok(at),
            Route::Preferred => {
                let preferred = self.await_preferred(tried, self.settings.connect_timeout).await;
                preferred.ok_or(Status::NO_CONNECTION)
            }
        }
    }
}

impl ForwardedBody {
    fn new(live: Live, shared: &Arc<Shared>, at: EndpointId) -> Self {
        let call = Call { live: Mutex::new(Some(live)), frames: AtomicU64::new(0), asked: AtomicBool::new(false) };
        Self { call: Arc::new(call), shared: shared.clone(), at, passed: 0, watchdog: None }
    }

    fn count(&mut self, bytes: usize) {
        self.passed = self.passed.saturating_add(bytes);
        if self.watchdog.is_none() && self.passed >= SMALLEST_WINDOW {
            let watching = watch(Arc::downgrade(&self.call), self.shared.settings.stall_limit);
            self.watchdog = Some(AbortOnDropHandle::new(tokio::spawn(watching)));
        }
    }
}

/// Gives a call up when its client has not asked for more for `limit`.
async fn watch(call: Weak<Call>, limit: Duration) {
    let mut seen = None;
    loop {
        sleep(limit).await;
        let Some(call) = call.upgrade() else { return };
        let frames = call.frames.load(Ordering::Acquire);
        if seen.replace(frames) == Some(frames) && !call.asked.load(Ordering::Acquire) {
            *call.live.lock() = None;
            return;
        }
    }
}

impl Body for ForwardedBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let me = &mut *self;
        let (frame, impatient) = match me.call.live.lock().as_mut() {
            None => return Poll::Ready(Some(Err(BodyError(Box::new(Stalled))))),
            Some(live) => {
                let frame = Pin::new(&mut live.incoming).poll_frame(cx);
                me.call.asked.store(frame.is_pending(), Ordering::Release);
                (ready!(frame), live.impatient)
            }
        };
        me.call.frames.fetch_add(1, Ordering::AcqRel);
        match &frame {
            Some(Ok(frame)) if impatient => me.count(frame.data_ref().map_or(0, Bytes::len)),
            Some(Err(error)) if !grpc::is_of_one_stream(error) => me.shared.suspect(me.at),
            _ => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.call.live.lock().as_ref().is_some_and(|live| live.incoming.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.call.live.lock().as_ref().map(|live| live.incoming.size_hint()).unwrap_or_default()
    }
}
