//! The KV service: reads from the view where it may answer, everything else forwarded.
//!
//! What is forwarded is looked at only for its header: its revision is the floor below which we never answer, and, where the
//! call went through consensus, proof of how far the cluster has got.

mod answer;
mod held;
mod pieces;
mod range_stream;
mod reads;
mod txn;

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use ::http::{Request, Response};
use arc_swap::Guard;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use prometheus::{IntCounter, IntCounterVec, Opts, Registry};
use prost::Message;
use tokio::time::sleep;
use tonic::Code;

use held::Holder;

use super::{
    body::{Body, read_message, read_only_message},
    forward::forward,
    leader::Leader,
    listener::{BoxedRequest, Connection},
    metadata,
    observe::AnswerObserver,
    response,
};
use crate::{
    cache::{Cache, Proof, Stamp, Tense, Unserved},
    grpc::{self, Incoming},
    proto::etcdserverpb::{CompactionRequest, PutRequest, ResponseHeader},
    rules::KeyRange,
    status::Status,
    store::{Revision, View},
    upstream::{ConnectionNumber, RequestBody},
};

/// The path of every method of the service begins so.
pub const SERVICE: &str = "/etcdserverpb.KV/";

const LAGS: Status =
    Status::fixed(Code::Unavailable, "the member that was asked lags behind what clients were told: try again");

/// Between two looks whether memory can answer what the upstream has not.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// What the service is told.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Etcd's `--max-request-bytes`.
    pub max_request_bytes: usize,
    /// The largest answer from memory.
    pub max_response_bytes: u64,
}

/// Counts reads, by method and by who answered.
#[derive(Clone)]
pub struct Metrics {
    reads: IntCounterVec,
    given_up: IntCounter,
}

impl Metrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// When they are registered already.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let opts = Opts::new(
            "millpond_server_reads_total",
            "Reads, by method and by who answered: memory, or upstream and why.",
        );
        let reads = IntCounterVec::new(opts, &["method", "answered"])?;
        registry.register(Box::new(reads.clone()))?;
        let given_up = IntCounter::new(
            "millpond_server_answers_given_up_total",
            "Large answers from memory that were given up because the client had stopped reading.",
        )?;
        registry.register(Box::new(given_up.clone()))?;
        Ok(Self { reads, given_up })
    }

    fn count(&self, method: &str, answered: &str) {
        self.reads.with_label_values(&[method, answered]).inc();
    }
}

/// The KV service.
pub struct Kv {
    cache: Cache,
    settings: Settings,
    metrics: Metrics,
    hot: IntCounter,
    leader: Leader,
    holder: Arc<Holder>,
}

/// The methods of the service that something is known of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Method {
    Range,
    RangeStream,
    Put,
    DeleteRange,
    Txn,
    Compact,
    Other,
}

impl Method {
    fn of(path: &str) -> Self {
        match path.strip_prefix(SERVICE).unwrap_or_default() {
            "Range" => Self::Range,
            "RangeStream" => Self::RangeStream,
            "Put" => Self::Put,
            "DeleteRange" => Self::DeleteRange,
            "Txn" => Self::Txn,
            "Compact" => Self::Compact,
            _ => Self::Other,
        }
    }

    /// Whether a call may be answered here. Of others, etcd says whether it has a leader for them.
    fn reads(self) -> bool {
        matches!(self, Self::Range | Self::RangeStream | Self::Txn)
    }
}

/// A call as it is passed from one step to the next: the request, whose body has been read, and the message that it was.
struct Call<'a> {
    connection: &'a Connection,
    request: BoxedRequest,
    message: Bytes,
}

/// What memory makes of a read: the answer or its refusal, or why only the upstream can tell.
type Answered = Result<Result<Response<Body>, Status>, &'static str>;

/// Whether a forwarded answer shows how far the cluster has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Evidence {
    /// The call goes through consensus, so its answer is proof.
    Proof,
    /// One member answers as it stands.
    Hearsay,
}

impl Kv {
    /// The service on `cache`, within a runtime.
    pub fn new(cache: Cache, settings: Settings, metrics: Metrics, leader: Leader) -> Self {
        let hot = metrics.reads.with_label_values(&["Range", "memory"]);
        let holder = Holder::new(metrics.given_up.clone());
        cache.upstream().vital().spawn("holder", Holder::look_after(Arc::downgrade(&holder)));
        Self { cache, settings, metrics, hot, leader, holder }
    }

    /// Answers a call whose path begins with [`SERVICE`].
    pub async fn call(&self, connection: &Connection, mut request: BoxedRequest) -> Response<Body> {
        let limit = self.longest_request();
        let method = Method::of(request.uri().path());
        let read = match method {
            Method::RangeStream => Box::pin(read_only_message(&mut request, limit)).await,
            _ => read_message(&mut request, limit).await,
        };
        let message = match read {
            Ok(message) => message,
            Err(status) => return response::error(&status),
        };
        if method.reads()
            && let Err(status) = metadata::check(request.headers(), &self.leader)
        {
            return response::error(&status);
        }
        // What is forwarded is not compressed any more.
        request.headers_mut().remove(grpc::ENCODING);
        let call = Call { connection, request, message };
        let answered = match method {
            // Most calls are these, so they have their future in place, and no other makes it larger.
            Method::Range => self.range(call).await,
            Method::RangeStream => Box::pin(self.range_stream(call)).await,
            Method::Txn => Box::pin(self.txn(call)).await,
            Method::Compact => Box::pin(self.compact(call)).await,
            Method::Put => Ok(Box::pin(self.put(call)).await),
            Method::DeleteRange => Ok(Box::pin(self.forward(call, Evidence::Proof)).await),
            Method::Other => Ok(Box::pin(self.forward(call, Evidence::Hearsay)).await),
        };
        answered.unwrap_or_else(|status| response::error(&status))
    }

    /// Forwards the call and takes note of what its answer shows.
    async fn forward(&self, call: Call<'_>, evidence: Evidence) -> Response<Body> {
        self.forward_noting(call, evidence, Write::Other).await
    }

    async fn forward_noting(&self, call: Call<'_>, evidence: Evidence, write: Write) -> Response<Body> {
        let observer = Arc::new(self.observer(evidence, write));
        let request = call.request.map(|_| RequestBody::full(grpc::frame_encoded(&call.message)));
        Box::pin(forward(self.cache.upstream(), call.connection, request, Some(observer))).await
    }

    /// Forwards a read that one member may answer as it stands. Should that member lag behind what clients were told before, the
    /// cluster is asked by the message that `ask` gives: nobody's revisions go back.
    async fn forward_hearsay(&self, call: Call<'_>, ask: impl FnOnce() -> Vec<u8>) -> Response<Body> {
        let (connection, again) = (call.connection, head_of(&call.request));
        let (response, lags) = self.forward_to_member(call).await;
        if !lags {
            return response;
        }
        let observer = Arc::new(self.observer(Evidence::Proof, Write::Other));
        let request = again.map(|()| RequestBody::full(grpc::frame_encoded(&ask())));
        Box::pin(forward(self.cache.upstream(), connection, request, Some(observer))).await
    }

    /// Forwards a request that cannot be decoded: etcd takes more than we do, such as transactions that are nested more deeply.
    async fn forward_unread(&self, call: Call<'_>) -> Response<Body> {
        match self.forward_to_member(call).await {
            (_, true) => response::error(&LAGS),
            (response, false) => response,
        }
    }

    /// Forwards a call that one member may answer as it stands. True: it lags behind what clients were told before.
    async fn forward_to_member(&self, call: Call<'_>) -> (Response<Body>, bool) {
        let (told, observer) = (self.cache.told(), Arc::new(self.observer(Evidence::Hearsay, Write::Other)));
        let request = call.request.map(|_| RequestBody::full(grpc::frame_encoded(&call.message)));
        let forwarding = forward(self.cache.upstream(), call.connection, request, Some(observer.clone()));
        let mut response = Box::pin(forwarding).await;
        response.body_mut().read_ahead().await;
        (response, observer.revision.get().is_some_and(|revision| *revision < told))
    }

    /// An observer of the answer to a call that is sent from now on.
    fn observer(&self, evidence: Evidence, write: Write) -> Observer {
        let sent = (evidence == Evidence::Proof).then(|| self.cache.consensus().stamp());
        Observer { cache: self.cache.clone(), sent, write, revision: OnceLock::new() }
    }

    async fn put(&self, call: Call<'_>) -> Response<Body> {
        let put = PutRequest::decode(call.message.clone()).map(Write::Put);
        self.forward_noting(call, Evidence::Proof, put.unwrap_or(Write::Other)).await
    }

    async fn compact(&self, call: Call<'_>) -> Result<Response<Body>, Status> {
        let compact = CompactionRequest::decode(call.message.clone());
        let compact = compact.map(|request| Write::Compact(Revision(request.revision)));
        Ok(self.forward_noting(call, Evidence::Proof, compact.unwrap_or(Write::Other)).await)
    }

    /// The view that a read of `range` at `revision` (zero or less: the present) may be answered from.
    async fn view(&self, range: &KeyRange, revision: i64, serializable: bool) -> Result<Guard<Arc<View>>, Unserved> {
        let tense = if revision > 0 { Tense::Past } else { Tense::Present };
        if tense == Tense::Past && self.cache.is_before_memory(range, Revision(revision)) {
            return Err(Unserved::TooOld);
        }
        match serializable {
            true => self.cache.serializable(range).await,
            false => Box::pin(self.cache.linearizable(range, tense)).await,
        }
    }

    /// The longest message that a unary call may carry, be it of this service or of another.
    pub fn longest_request(&self) -> usize {
        grpc::largest_message(self.settings.max_request_bytes)
    }

    /// The longest answer.
    fn longest(&self) -> u64 {
        self.settings.max_response_bytes.min(response::LONGEST)
    }

    /// For how long the upstream of `range` has been gone, for clients who want to know how old an answer may be.
    fn age(&self, range: &KeyRange) -> Option<Duration> {
        self.cache.covering(range)?.1.age()
    }
}

/// What `forwarding` gives; or what memory makes of the read, should it become able to before the upstream answers. The
/// member that is asked may have fallen silent, and the feed follows another sooner than a connection is given up.
async fn unless_memory_can<'a>(
    forwarding: impl Future<Output = Response<Body>>,
    read: impl Fn() -> BoxFuture<'a, Answered>,
) -> Result<Response<Body>, Status> {
    let memory = async {
        loop {
            sleep(LOOK_AGAIN).await;
            if let Ok(answer) = read().await {
                return answer;
            }
        }
    };
    tokio::select! {
        response = forwarding => Ok(response),
        answer = memory => answer,
    }
}

/// What is made of a read that memory cannot serve: it is forwarded, but not where the cluster has had as long as etcd would
/// give it.
fn unserved(why: Unserved) -> Answered {
    match why {
        Unserved::NoConsensus => Ok(Err(Status::TIMEOUT)),
        other => Err(other.label()),
    }
}

/// An observer for forwarded answers of other services, and of the JSON gateway: nothing older is served from then on.
pub fn forwarded_observer(cache: &Cache) -> Arc<dyn AnswerObserver> {
    Arc::new(Observer { cache: cache.clone(), sent: None, write: Write::Other, revision: OnceLock::new() })
}

/// Takes note of a forwarded answer before the client can read it.
struct Observer {
    cache: Cache,
    /// Drawn before the request was sent, if it goes through consensus.
    sent: Option<Stamp>,
    write: Write,
    /// The revision of the answer, once that is known.
    revision: OnceLock<Revision>,
}

/// What a forwarded call does, as far as its success tells something that its answer does not.
enum Write {
    Put(PutRequest),
    Compact(Revision),
    Other,
}

impl AnswerObserver for Observer {
    fn answered(&self, connection: ConnectionNumber, header: ResponseHeader) {
        self.cache.note_told(Revision(header.revision), connection);
        let _ = self.revision.set(Revision(header.revision));
        if let (Some(sent), Some(proof)) = (self.sent, Proof::of(&header, connection)) {
            self.cache.consensus().note(sent, proof);
        }
        match &self.write {
            Write::Put(request) => self.cache.note_put(request, Revision(header.revision)),
            Write::Compact(revision) => self.cache.note_compacted(*revision),
            Write::Other => {}
        }
    }
}

/// A copy of a request without its body.
fn head_of(request: &Request<Incoming>) -> Request<()> {
    let mut head = Request::new(());
    *head.method_mut() = request.method().clone();
    *head.uri_mut() = request.uri().clone();
    *head.version_mut() = request.version();
    *head.headers_mut() = request.headers().clone();
    head
}
