//! `grpc.health.v1`, answered here. As in etcd, the only service is the empty name, which stands for the whole server.

use ::http::{Request, Response};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http_body::Frame;
use http_body_util::StreamBody;
use prost::Message;
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus};

use super::{
    body::{Body, read_message},
    response,
};
use crate::{
    grpc::{self, BodyError, Incoming, failure_trailers},
    status::Status,
};

/// The path of every method of the service begins so.
pub const SERVICE: &str = "/grpc.health.v1.Health/";
/// A service's name is short.
const REQUEST_LIMIT: usize = 64 << 10;

/// Whether the proxy can serve.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// Reads can be answered from memory.
    pub cache_warm: bool,
    /// Requests can be forwarded.
    pub upstream_reachable: bool,
    /// Why it is not ready; empty when it is.
    pub reason: String,
}

impl Readiness {
    /// Ready means that the cache is warm or the upstream answers.
    pub fn is_ready(&self) -> bool {
        self.cache_warm || self.upstream_reachable
    }

    fn serving(&self) -> ServingStatus {
        if self.is_ready() { ServingStatus::Serving } else { ServingStatus::NotServing }
    }
}

/// Answers health questions.
#[derive(Clone)]
pub struct HealthService {
    readiness: watch::Receiver<Readiness>,
    stop: CancellationToken,
}

impl HealthService {
    /// Answers by `readiness`; watches end when `stop` is cancelled.
    pub fn new(readiness: watch::Receiver<Readiness>, stop: CancellationToken) -> Self {
        Self { readiness, stop }
    }

    /// The present readiness.
    pub fn readiness(&self) -> Readiness {
        self.readiness.borrow().clone()
    }

    /// Answers a call whose path begins with [`SERVICE`].
    pub async fn call(&self, mut request: Request<Incoming>) -> Response<Body> {
        let question = match read_message(&mut request, REQUEST_LIMIT).await {
            Ok(question) => question,
            Err(status) => return response::error(&status),
        };
        let method = request.uri().path().strip_prefix(SERVICE).unwrap_or_default();
        let answer = match method {
            "Check" => service(question).and_then(|service| self.check(&service)),
            "Watch" => service(question).map(|service| self.watch(&service)),
            "List" => Ok(response::unary(&ListResponse::of(self.now()).encode_to_vec())),
            _ => Err(Status::new(
                Code::Unimplemented,
                format!("unknown method {method} for service grpc.health.v1.Health"),
            )),
        };
        answer.unwrap_or_else(|status| response::error(&status))
    }

    fn now(&self) -> HealthCheckResponse {
        answer(self.readiness.borrow().serving())
    }

    fn check(&self, service: &str) -> Result<Response<Body>, Status> {
        if service.is_empty() {
            Ok(response::framed(grpc::frame(&self.now())))
        } else {
            Err(Status::fixed(Code::NotFound, "unknown service"))
        }
    }

    fn watch(&self, service: &str) -> Response<Body> {
        let stop = self.stop.clone().cancelled_owned();
        let states = if service.is_empty() {
            changes(self.readiness.clone()).left_stream()
        } else {
            stream::once(async { ServingStatus::ServiceUnknown }).chain(stream::pending()).right_stream()
        };
        let messages = states.take_until(stop).map(|state| Frame::data(grpc::frame(&answer(state)).into()));
        let end = stream::once(async { Frame::trailers(failure_trailers(&Status::STOPPED)) });
        response::streaming(Body::boxed(StreamBody::new(messages.chain(end).map(Ok::<_, BodyError>))))
    }
}

/// The present state and every other one that follows.
fn changes(readiness: watch::Receiver<Readiness>) -> impl Stream<Item = ServingStatus> + Send {
    let mut last = None;
    WatchStream::new(readiness).filter_map(move |readiness| {
        let state = readiness.serving();
        let news = last.replace(state) != Some(state);
        std::future::ready(news.then_some(state))
    })
}

fn answer(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

fn service(question: Bytes) -> Result<String, Status> {
    let question = HealthCheckRequest::decode(question);
    question
        .map(|question| question.service)
        .map_err(|error| Status::new(Code::Internal, format!("grpc: error unmarshalling request: {error}")))
}

/// `HealthListResponse`: a map from service to state, which on the wire is a list of entries.
#[derive(Clone, PartialEq, Message)]
struct ListResponse {
    #[prost(message, repeated, tag = "1")]
    statuses: Vec<ListEntry>,
}

#[derive(Clone, PartialEq, Message)]
struct ListEntry {
    #[prost(string, tag = "1")]
    service: String,
    #[prost(message, optional, tag = "2")]
    state: Option<HealthCheckResponse>,
}

impl ListResponse {
    fn of(state: HealthCheckResponse) -> Self {
        Self { statuses: vec![ListEntry { service: String::new(), state: Some(state) }] }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;

    use bytes::Buf;
    use http_body_util::BodyExt;

    use super::*;

    fn health(ready: bool) -> (watch::Sender<Readiness>, CancellationToken, HealthService) {
        let readiness = Readiness { cache_warm: ready, ..Readiness::default() };
        let (sender, receiver) = watch::channel(readiness);
        let stop = CancellationToken::new();
        let service = HealthService::new(receiver, stop.clone());
        (sender, stop, service)
    }

    async fn state(body: &mut Body) -> i32 {
        let mut frame = body.frame().await.unwrap().unwrap().into_data().unwrap();
        frame.advance(grpc::PREFIX);
        HealthCheckResponse::decode(frame).unwrap().status
    }

    #[tokio::test]
    async fn check_tells_the_state_of_the_whole_server_and_knows_no_other() {
        for (ready, expected) in [(true, ServingStatus::Serving), (false, ServingStatus::NotServing)] {
            let (_sender, _stop, service) = health(ready);
            let mut body = service.check("").unwrap().into_body();
            assert_eq!(state(&mut body).await, i32::from(expected));
            assert_eq!(service.check("etcdserverpb.KV").err().map(|status| status.code), Some(Code::NotFound));
        }
    }

    #[tokio::test]
    async fn watch_tells_changes_and_ends_when_the_server_stops() {
        let (sender, stop, service) = health(false);
        let mut body = service.watch("").into_body();
        assert_eq!(state(&mut body).await, i32::from(ServingStatus::NotServing));
        sender.send_modify(|readiness| readiness.reason = "still warming".to_owned());
        assert!(is_quiet(body.frame()).await, "the state is the same");
        sender.send_modify(|readiness| readiness.upstream_reachable = true);
        assert_eq!(state(&mut body).await, i32::from(ServingStatus::Serving));
        stop.cancel();
        let trailers = body.frame().await.unwrap().unwrap().into_trailers().unwrap();
        assert_eq!(grpc::outcome(&trailers), Some(Err(Status::STOPPED)));
    }

    #[tokio::test]
    async fn watch_of_an_unknown_service_stays_open() {
        let (_sender, _stop, service) = health(true);
        let mut body = service.watch("nobody").into_body();
        assert_eq!(state(&mut body).await, i32::from(ServingStatus::ServiceUnknown));
        assert!(is_quiet(body.frame()).await);
    }

    async fn is_quiet(future: impl Future + Unpin) -> bool {
        futures_util::poll!(future).is_pending()
    }
}
