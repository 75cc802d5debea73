//! Moves a client's call to an endpoint as it is: headers, body, trailers, half-close, resets, in both directions.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};

use bytes::Bytes;
use http::{Request, Response, Uri, uri};
use http_body::{Body, Frame, SizeHint};
use hyper::{body::Incoming, client::conn::http1::SendRequest};

use super::{
    Answer, BodyError, EndpointId, ForwardClass, MemberLink, NO_CONNECTION, RequestBody, Shared, Upstream,
    connection::Class, grpc, limits::Permit, pool::Slot,
};
use crate::status::Status;

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
    /// A moment just before the request was handed to the connection.
    pub sent: Instant,
    /// The answer, from its headers on.
    pub response: Response<ForwardedBody>,
}

/// The body of a forwarded answer. Holds the call's place on the connection and its permit until it ends.
pub struct ForwardedBody {
    incoming: Incoming,
    shared: Arc<Shared>,
    at: EndpointId,
    _slot: Option<Slot>,
    _permit: Permit,
}

impl Upstream {
    /// Forwards a request, whatever scheme and authority its URI has. Waits for a
    /// permit, and for the probes if no endpoint is known to be usable yet.
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
                Ok(Answer { response, slot, sent }) => {
                    let wrap = |incoming| ForwardedBody::new(incoming, shared, at, Some(slot), permit);
                    return Ok(Forwarded { at, sent, response: response.map(wrap) });
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
        let (at, mut connection) = shared.connect_http1(route).await?;
        let sent = Instant::now();
        let response = connection.send_request(request).await.map_err(|error| shared.failed(at, &error))?;
        let response = response.map(|incoming| ForwardedBody::new(incoming, shared, at, None, permit));
        Ok(Forwarded { at, sent, response })
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
    fn limit(&self, class: ForwardClass) -> &super::Limit {
        match class {
            ForwardClass::Unary => &self.unary_limit,
            ForwardClass::Stream => &self.stream_limit,
        }
    }

    async fn connect_http1(&self, route: Route) -> Result<(EndpointId, SendRequest<RequestBody>), Status> {
        let mut tried = Vec::new();
        loop {
            let at = self.choose(route, &tried).await?;
            match (self.member(at)?.pool.http1().await, route) {
                (Ok(connection), _) => return Ok((at, connection)),
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
                preferred.ok_or(NO_CONNECTION)
            }
        }
    }
}

impl ForwardedBody {
    fn new(incoming: Incoming, shared: &Arc<Shared>, at: EndpointId, slot: Option<Slot>, permit: Permit) -> Self {
        Self { incoming, shared: shared.clone(), at, _slot: slot, _permit: permit }
    }
}

impl Body for ForwardedBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = ready!(Pin::new(&mut self.incoming).poll_frame(cx));
        if let Some(Err(error)) = &frame
            && grpc::remote_reset(error).is_none()
        {
            self.shared.suspect(self.at);
        }
        Poll::Ready(frame.map(|frame| frame.map_err(|error| BodyError(error.into()))))
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}
