//! Talking to etcd: endpoints and failover, our own calls, raw calls for forwarding, and what the upstream can be trusted
//! with.
//!
//! - `endpoint`: where an etcd is and how a byte stream to it is opened;
//! - `connection`, `pool`: HTTP connections, by class of traffic; `pings`: how often their servers are pinged; `sender`: a
//!   connection, or a server in this process;
//! - `health`, `roster`, `probe`, `version`: which endpoints may be used, which cluster they are, whether authentication is on;
//! - `call`: our own calls; `pages`: how much of a list to ask for at a time;
//! - `forward`, `limits`: clients' calls, moved as they are;
//! - `body`: what the requests of both carry.
//!
//! A call that may have been applied is never repeated here. A forwarded call moves to another endpoint only while nothing
//! of it was handed to a live connection.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use prost::Message;
use tokio::{sync::watch, task::AbortHandle, time::sleep};
use tokio_util::task::AbortOnDropHandle;

mod body;
mod call;
mod connection;
mod endpoint;
mod forward;
mod health;
mod limits;
mod metrics;
mod pages;
mod pings;
mod pool;
mod probe;
mod roster;
mod sender;
mod shared;
mod version;

pub use self::{
    body::RequestBody,
    call::{StreamReceiver, StreamSender},
    endpoint::{Dial, DialFuture, Endpoint, EndpointId, Io, Serve, ServeFuture, host_and_port},
    forward::{Forwarded, ForwardedBody, Route},
    health::{AuthState, EndpointHealth, Health, Report, Standing},
    limits::{ForwardClass, UnderWay},
    pages::{PageSize, Sizing, TooLarge, is_refusal_of_size},
    pool::ConnectionNumber,
    version::{Gate, Version},
};
use self::{
    connection::Class,
    metrics::Metrics,
    pool::Slot,
    shared::{Shared, decode},
};
pub(crate) use self::{forward::ABSENCE, probe::refuses_strangers};
use crate::{grpc, signal::SignalReader, status::Status, vital::Vital};

/// Why an upstream cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// An endpoint's text is not one.
    #[error("endpoint {endpoint:?}: {reason}")]
    Endpoint {
        /// The text.
        endpoint: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// There is nothing to talk to.
    #[error("no endpoints")]
    NoEndpoints,
    /// The metrics are registered already.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// What an upstream is told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The cluster's members, in the order of preference.
    pub endpoints: Vec<Endpoint>,
    /// For a dial with its handshake, and for a probe.
    pub connect_timeout: Duration,
    /// Silence on a connection with open streams before it is pinged. etcd tolerates 5 s and more; longer after a server that
    /// does not has said so.
    pub keepalive_interval: Duration,
    /// How long a ping's answer may take.
    pub keepalive_timeout: Duration,
    /// Clients' unary calls under way at once.
    pub forward_limit: usize,
    /// Clients' streams and blocking calls under way at once.
    pub stream_limit: usize,
    /// How long a client may leave a unary answer unread before the call is given up.
    pub stall_limit: Duration,
    /// Between two probes of an endpoint.
    pub probe_interval: Duration,
}

impl Settings {
    /// The defaults, for these endpoints.
    pub fn new(endpoints: Vec<Endpoint>) -> Self {
        Self {
            endpoints,
            connect_timeout: Duration::from_secs(3),
            keepalive_interval: Duration::from_secs(10),
            keepalive_timeout: Duration::from_secs(5),
            forward_limit: 1024,
            stream_limit: 16 * 1024,
            stall_limit: Duration::from_secs(60),
            probe_interval: Duration::from_secs(1),
        }
    }
}

/// One etcd cluster. Cheap to clone; the probes end with the last clone.
#[derive(Clone)]
pub struct Upstream(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
    vital: Vital,
    probers: Vec<AbortHandle>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.probers.iter().for_each(AbortHandle::abort);
    }
}

impl Upstream {
    /// Starts probing the endpoints; to be called inside a tokio runtime. An etcd that is down is no error.
    ///
    /// # Errors
    /// When there are no endpoints, or metrics of these names are registered already.
    pub fn start(settings: Settings, registry: &prometheus::Registry) -> Result<Upstream, UpstreamError> {
        let shared = Arc::new(Shared::new(settings, Metrics::register(registry)?)?);
        let vital = Vital::default();
        let prober = |index| vital.spawn("probe", probe::run(shared.clone(), EndpointId(index)));
        let probers = (0..shared.members.len()).map(prober).collect();
        Ok(Upstream(Arc::new(Handle { shared, vital, probers })))
    }

    /// One call of our own at one endpoint.
    ///
    /// # Errors
    /// etcd's status; DeadlineExceeded after `deadline`; Unavailable when the endpoint cannot be reached.
    pub async fn unary<Q: Message, A: Message + Default>(
        &self,
        at: EndpointId,
        path: &'static str,
        request: &Q,
        deadline: Duration,
    ) -> Result<A, Status> {
        Ok(self.unary_numbered(at, path, request, deadline).await?.0)
    }

    /// As [`Upstream::unary`], with the connection that the answer came over.
    ///
    /// # Errors
    /// As [`Upstream::unary`].
    pub async fn unary_numbered<Q: Message, A: Message + Default>(
        &self,
        at: EndpointId,
        path: &'static str,
        request: &Q,
        deadline: Duration,
    ) -> Result<(A, ConnectionNumber), Status> {
        let answered = self.shared().unary(at, Class::Own, path, &[], grpc::frame(request), deadline).await;
        let (message, connection) = answered?;
        Ok((decode(path, message)?, connection))
    }

    /// A short-lived watch that reads history, on a connection shared with others of its kind. The first message may be
    /// sent at once; an error that follows the opening is told by the receiver.
    ///
    /// # Errors
    /// Unavailable when the endpoint cannot be reached.
    pub async fn open_catch_up<Q: Message>(
        &self,
        at: EndpointId,
        path: &'static str,
    ) -> Result<(StreamSender<Q>, StreamReceiver), Status> {
        self.shared().open_stream(at, Class::CatchUp, path, &[]).await
    }

    /// A connection of its own, for a feed.
    ///
    /// # Errors
    /// Unavailable when the endpoint cannot be reached.
    pub async fn connect(&self, at: EndpointId) -> Result<Link, Status> {
        let shared = self.shared().clone();
        let slot = shared.member(at)?.pool.slot(Class::Feed).await.inspect_err(|_| shared.suspect(at))?;
        Ok(Link { shared, at, slot: Arc::new(slot) })
    }

    /// The number of the connection that was opened last.
    pub fn newest_connection(&self) -> ConnectionNumber {
        self.shared().numbers.newest()
    }

    /// The endpoint to use now: the first usable one in configured order, those with a leader and a vote first, without
    /// those to `avoid`. `None`: none is reachable.
    pub fn preferred(&self, avoid: &[EndpointId]) -> Option<EndpointId> {
        self.shared().health.borrow().preferred(avoid)
    }

    /// As [`Upstream::preferred`], but waits while probes under way may yet find one, for `patience` at most.
    pub async fn await_preferred(&self, avoid: &[EndpointId], patience: Duration) -> Option<EndpointId> {
        self.shared().await_preferred(avoid, patience).await
    }

    /// All endpoints, in configured order.
    pub fn endpoints(&self) -> impl Iterator<Item = EndpointId> + use<> {
        (0..self.shared().members.len()).map(EndpointId)
    }

    /// An endpoint's name, for logs.
    pub fn name(&self, at: EndpointId) -> &str {
        self.shared().members.get(at.0).map_or("unknown", |member| member.pool.name())
    }

    /// Whether it is a server in this process, which takes gRPC requests and nothing else.
    pub fn is_in_process(&self) -> bool {
        self.shared().members.iter().all(|member| member.pool.is_in_process())
    }

    /// A caller saw the endpoint fail: it is probed at once, and others are preferred until it is well again.
    pub fn report_failure(&self, at: EndpointId) {
        self.shared().suspect(at);
    }

    /// The clients' unary calls that are under way at any of the endpoints.
    pub fn unary_under_way(&self) -> Arc<UnderWay> {
        self.shared().unary_limit.running().clone()
    }

    /// What is known of the endpoints.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.shared().health.clone()
    }

    /// Whether permissions are checked.
    pub fn auth(&self) -> SignalReader<AuthState> {
        self.shared().auth.clone()
    }

    /// To be called before an AuthEnable is forwarded, and when a refusal shows that there has been one: from now on authentication
    /// counts as changing, and when the hold is dropped or [`LONGEST_HOLD`] old, until every usable member was asked anew.
    pub fn suspect_auth(&self) -> AuthHold {
        let hold = Hold::of(self.shared());
        AuthHold(AbortOnDropHandle::new(tokio::spawn(async move {
            let _hold = hold;
            sleep(LONGEST_HOLD).await;
        })))
    }

    /// What can be relied on, given the versions of all reachable members of the cluster.
    pub fn gate(&self) -> Gate {
        self.shared().gate.now()
    }

    /// What spawns the tasks that its users depend on.
    pub(crate) fn vital(&self) -> &Vital {
        &self.0.vital
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.0.shared
    }
}

/// A connection of its own to an endpoint: whatever is asked over it, the same server answers.
pub struct Link {
    shared: Arc<Shared>,
    at: EndpointId,
    slot: Arc<Slot>,
}

impl Link {
    /// Where it leads.
    pub fn at(&self) -> EndpointId {
        self.at
    }

    /// Its place among all connections.
    pub fn number(&self) -> ConnectionNumber {
        self.slot.number()
    }

    /// One call; the answer's message as it came, of any size.
    ///
    /// # Errors
    /// etcd's status; DeadlineExceeded after `deadline`; Unavailable when the connection is lost.
    pub async fn unary_raw<Q: Message>(
        &self,
        path: &'static str,
        request: &Q,
        deadline: Duration,
    ) -> Result<Bytes, Status> {
        let message = grpc::frame(request);
        self.shared.unary_on(self.at, &self.slot, path, message, deadline, call::unary_message).await
    }

    /// The same, but an answer that announces more than `most` bytes is not waited for.
    ///
    /// # Errors
    /// As above.
    pub async fn unary_up_to<Q: Message>(
        &self,
        path: &'static str,
        request: &Q,
        deadline: Duration,
        most: usize,
    ) -> Result<Result<Bytes, TooLarge>, Status> {
        let read = async |response| call::message_up_to(response, most).await;
        self.shared.unary_on(self.at, &self.slot, path, grpc::frame(request), deadline, read).await
    }

    /// A server-streaming or bidirectional call. The first message may be sent at once; an error that follows the opening
    /// is told by the receiver.
    ///
    /// # Errors
    /// When the request cannot be made.
    pub fn open_stream<Q: Message>(
        &self,
        path: &'static str,
        metadata: &[(&'static str, &'static str)],
    ) -> Result<(StreamSender<Q>, StreamReceiver), Status> {
        self.shared.stream_on(self.at, self.slot.clone(), path, metadata)
    }
}

/// See [`Upstream::suspect_auth`].
pub struct AuthHold(#[expect(dead_code, reason = "it is there to be dropped")] AbortOnDropHandle<()>);

/// Etcd gives up sooner on an AuthEnable that finds no quorum. A client that does not read its answer holds nothing up for longer.
const LONGEST_HOLD: Duration = Duration::from_secs(10);

struct Hold(Arc<Shared>);

impl Hold {
    fn of(shared: &Arc<Shared>) -> Self {
        shared.roster.lock().hold();
        Self(shared.clone())
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.roster.lock().release();
        self.0.members.iter().for_each(|member| member.kick.notify_one());
    }
}
