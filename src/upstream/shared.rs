//! What the handle, the probers and the calls under way share: the way to each endpoint, and what is known of it.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, uri::Authority};
use parking_lot::Mutex;
use prost::Message;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout},
};
use tonic::Code;

use super::{
    AuthState, ConnectionNumber, Endpoint, EndpointId, ForwardClass, Gate, Health, RequestBody, Settings,
    StreamReceiver, StreamSender, UpstreamError, call,
    connection::{Class, Tuning},
    limits::Limit,
    metrics::Metrics,
    pings::PingPause,
    pool::{Numbers, Pool, Slot},
    roster::Roster,
    sender::Answered,
};
use crate::{grpc, signal::SignalReader, status::Status};

/// How often a request that a closing connection gave back is handed to another one.
const HANDOVERS: usize = 3;

pub(super) struct Shared {
    pub(super) settings: Settings,
    pub(super) members: Vec<MemberLink>,
    pub(super) numbers: Numbers,
    pub(super) roster: Mutex<Roster>,
    pub(super) health: watch::Receiver<Health>,
    pub(super) auth: SignalReader<AuthState>,
    pub(super) gate: SignalReader<Gate>,
    pub(super) unary_limit: Limit,
    pub(super) stream_limit: Limit,
}

/// The way to one endpoint.
pub(super) struct MemberLink {
    pub(super) pool: Pool,
    pub(super) authority: Authority,
    /// Wakes its prober early.
    pub(super) kick: Notify,
}

pub(super) fn decode<A: Message + Default>(path: &str, message: Bytes) -> Result<A, Status> {
    A::decode(message).map_err(|error| Status::new(Code::Internal, format!("unreadable answer to {path}: {error}")))
}

impl Shared {
    pub(super) fn new(settings: Settings, metrics: Metrics) -> Result<Self, UpstreamError> {
        if settings.endpoints.is_empty() {
            return Err(UpstreamError::NoEndpoints);
        }
        let numbers = Numbers::default();
        let link = |endpoint| MemberLink::new(endpoint, &settings, &metrics, &numbers);
        let members: Vec<MemberLink> = settings.endpoints.iter().map(link).collect();
        let names = members.iter().map(|member| member.pool.name().to_owned()).collect();
        let roster = Roster::new(names, metrics.clone());
        Ok(Self {
            members,
            numbers,
            health: roster.health(),
            auth: roster.auth(),
            gate: roster.gate(),
            roster: Mutex::new(roster),
            unary_limit: Limit::new(ForwardClass::Unary, settings.forward_limit, &metrics),
            stream_limit: Limit::new(ForwardClass::Stream, settings.stream_limit, &metrics),
            settings,
        })
    }

    pub(super) fn member(&self, at: EndpointId) -> Result<&MemberLink, Status> {
        self.members.get(at.0).ok_or(Status::fixed(Code::Internal, "no such endpoint"))
    }

    pub(super) async fn unary(
        &self,
        at: EndpointId,
        class: Class,
        path: &'static str,
        metadata: &[(&'static str, &'static str)],
        message: Bytes,
        deadline: Duration,
    ) -> Result<(Bytes, ConnectionNumber), Status> {
        let request =
            call::request(&self.member(at)?.authority, path, metadata, Some(deadline), RequestBody::full(message))?;
        let answer = timeout(deadline, async {
            let Answer { response, slot, .. } = self.send(at, class, request).await.map_err(|unsent| unsent.status)?;
            Ok((call::unary_message(response).await?, slot.number()))
        });
        answer.await.unwrap_or(Err(Status::DEADLINE))
    }

    pub(super) async fn open_stream<Q: Message>(
        self: &Arc<Self>,
        at: EndpointId,
        class: Class,
        path: &'static str,
        metadata: &[(&'static str, &'static str)],
    ) -> Result<(StreamSender<Q>, StreamReceiver), Status> {
        let slot = self.member(at)?.pool.slot(class).await.inspect_err(|_| self.suspect(at))?;
        self.stream_on(at, Arc::new(slot), path, metadata)
    }

    /// A stream on this very connection.
    pub(super) fn stream_on<Q: Message>(
        self: &Arc<Self>,
        at: EndpointId,
        slot: Arc<Slot>,
        path: &'static str,
        metadata: &[(&'static str, &'static str)],
    ) -> Result<(StreamSender<Q>, StreamReceiver), Status> {
        let shared = self.clone();
        let (sender, body) = StreamSender::new();
        let request = call::request(&self.member(at)?.authority, path, metadata, None, body)?;
        let answered = slot.sender().start(request);
        let receiver = StreamReceiver::new(slot.number(), async move {
            match answered.await {
                Ok(response) => Ok((response, slot)),
                Err(error) => Err(shared.failed(at, &error)),
            }
        });
        Ok((sender, receiver))
    }

    /// A call on this very connection, and what is read of its answer.
    pub(super) async fn unary_on<T>(
        &self,
        at: EndpointId,
        slot: &Slot,
        path: &'static str,
        message: Bytes,
        deadline: Duration,
        read: impl AsyncFnOnce(Answered) -> Result<T, Status>,
    ) -> Result<T, Status> {
        let authority = &self.member(at)?.authority;
        let request = call::request(authority, path, &[], Some(deadline), RequestBody::full(message))?;
        let answer = timeout(deadline, async {
            let response = slot.sender().send(request).await.map_err(|error| self.failed(at, error.error()))?;
            read(response).await
        });
        answer.await.unwrap_or(Err(Status::DEADLINE))
    }

    /// Sends a request, dialling if need be.
    pub(super) async fn send(
        &self,
        at: EndpointId,
        class: Class,
        mut request: Request<RequestBody>,
    ) -> Result<Answer, Unsent> {
        let Ok(member) = self.member(at) else { return Err(Unsent::lost(Status::NO_CONNECTION)) };
        for _ in 0..HANDOVERS {
            let slot = match member.pool.slot(class).await {
                Ok(slot) => slot,
                Err(status) => {
                    self.suspect(at);
                    return Err(Unsent { status, request: Some(request) });
                }
            };
            match slot.sender().send(request).await {
                Ok(response) => return Ok(Answer { response, slot }),
                Err(mut error) => match error.take_message() {
                    Some(given_back) => request = given_back,
                    None => return Err(Unsent::lost(self.failed(at, error.error()))),
                },
            }
        }
        self.suspect(at);
        Err(Unsent { status: Status::NO_CONNECTION, request: Some(request) })
    }

    /// The status of a call that a transport error ended. An error of the whole connection makes the endpoint suspect.
    pub(super) fn failed(&self, at: EndpointId, error: &hyper::Error) -> Status {
        if !grpc::is_of_one_stream(error) && !error.is_canceled() {
            self.suspect(at);
        }
        grpc::from_transport(error)
    }

    pub(super) fn suspect(&self, at: EndpointId) {
        if self.roster.lock().suspect(at)
            && let Some(member) = self.members.get(at.0)
        {
            member.kick.notify_one();
        }
    }

    pub(super) async fn await_preferred(&self, avoid: &[EndpointId], patience: Duration) -> Option<EndpointId> {
        let decided = |health: &Health| health.preferred(avoid).is_some() || !health.undecided(avoid);
        if !decided(&self.health.borrow()) {
            // Whether it was decided or patience ended, what is known now is the answer.
            let _ = timeout(patience, self.health.clone().wait_for(decided)).await;
        }
        self.health.borrow().preferred(avoid)
    }

    /// Waits until some endpoint may be used, or `patience` ends.
    pub(super) async fn await_any(&self, patience: Duration) {
        let is_there = |health: &Health| health.preferred(&[]).is_some();
        if !is_there(&self.health.borrow()) {
            // Whoever goes on finds out which of both it was.
            let _ = timeout(patience, self.health.clone().wait_for(is_there)).await;
        }
    }

    pub(super) fn reap(&self, at: EndpointId) {
        if let Some(member) = self.members.get(at.0) {
            member.pool.reap(Instant::now());
        }
    }
}

impl MemberLink {
    fn new(endpoint: &Endpoint, settings: &Settings, metrics: &Metrics, numbers: &Numbers) -> Self {
        let tuning = Tuning {
            connect_timeout: settings.connect_timeout,
            ping_pause: PingPause::new(settings.keepalive_interval),
            keepalive_timeout: settings.keepalive_timeout,
        };
        let dialer = endpoint.dialer(settings.keepalive_interval + settings.keepalive_timeout);
        let pool = Pool::new(endpoint.name().to_owned(), dialer, tuning, metrics.clone(), numbers.clone());
        Self { authority: endpoint.authority().clone(), pool, kick: Notify::new() }
    }
}

/// An answer from its headers on; the slot is to be kept until its end.
pub(super) struct Answer {
    pub(super) response: Answered,
    pub(super) slot: Slot,
}

/// A request that was not answered; `request` is there if nothing of it was handed to a live connection.
pub(super) struct Unsent {
    pub(super) status: Status,
    pub(super) request: Option<Request<RequestBody>>,
}

impl Unsent {
    pub(super) fn lost(status: Status) -> Self {
        Self { status, request: None }
    }
}
