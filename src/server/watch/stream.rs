//! One Watch stream, as the body of its answer.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame};
use prost::Message;
use rand::RngExt;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, Sleep, sleep},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::Code;

use super::{
    Shared,
    relay::{self, Report},
};
use crate::{
    fanout::{Out, Pumped, Session, Start, WatchOptions, refuse},
    grpc::{self, BodyError, Compression, Deframer, Incoming, PREFIX, failure_trailers, largest_message},
    proto::etcdserverpb::{WatchCreateRequest, WatchRequest, watch_request::RequestUnion},
    rules::validate,
    server::{data::Data, response::LONGEST},
    socket::{Extent, News},
    status::Status,
    store::{Responder, Revision},
    upstream::AuthState,
};

/// Bytes that go out in one piece, if there is so much to say.
const PIECE: usize = 64 << 10;
/// Requests that are taken in before something is sent.
const REQUESTS_PER_PIECE: usize = 64;
/// Reports of relays that wait for the client to make room.
const REPORTS: usize = 4;
const TOO_MANY: Status = Status::fixed(Code::Unavailable, "too many watches of ranges that are not cached");
const LOST: Status =
    Status::fixed(Code::Unavailable, "the upstream was lost while the cache was warming up: watch again");

/// What a create request waits for: the present, or why the stream ends.
type Waiting = Pin<Box<dyn Future<Output = Result<(Responder, Revision), Status>> + Send>>;

/// A Watch stream.
pub(super) struct Stream {
    shared: Arc<Shared>,
    requests: Option<Incoming>,
    deframer: Deframer,
    session: Session,
    out: Out,
    news: News,
    /// A create request that waits to be told what the present is.
    opening: Option<Box<(WatchCreateRequest, Waiting)>>,
    relays: Option<Box<Relays>>,
    ticker: Option<Pin<Box<Sleep>>>,
    /// Cancelled when the stream has to end.
    end: Pin<Box<WaitForCancellationFutureOwned>>,
    /// In a box: an idle stream keeps no room for how it will end.
    ended: Option<Box<Status>>,
    finished: bool,
}

/// The relays of a stream.
struct Relays {
    sender: mpsc::Sender<Report>,
    reports: mpsc::Receiver<Report>,
    running: HashMap<(u32, u64), relay::Handle>,
}

impl Relays {
    fn new() -> Self {
        let (sender, reports) = mpsc::channel(REPORTS);
        Self { sender, reports, running: HashMap::new() }
    }
}

impl Stream {
    pub(super) fn new(
        shared: Arc<Shared>,
        requests: Incoming,
        compression: Compression,
        end: CancellationToken,
    ) -> Self {
        shared.metrics.streams.inc();
        Self {
            session: Session::new(shared.hubs.clone(), shared.session_settings()),
            shared,
            requests: Some(requests),
            deframer: Deframer::compressed(compression),
            out: Out::default(),
            news: News::default(),
            opening: None,
            relays: None,
            ticker: None,
            end: Box::pin(end.cancelled_owned()),
            ended: None,
            finished: false,
        }
    }

    /// Does everything that can be done at once. True when there is more to do at once.
    fn work(&mut self, news: Extent) -> bool {
        let looks_at_all = news == Extent::Everything;
        if looks_at_all && self.has_to_end() {
            return false;
        }
        let before = self.session.len();
        let mut more = looks_at_all && self.take_in();
        match self.session.pump(&mut self.out, PIECE, self.news.often()) {
            // Only now is known how far the watchers have got; a quiet one has not been looked at since the last tick.
            Pumped::Idle => self.take_tick(),
            Pumped::Busy => more = true,
            Pumped::Ended(status) => self.end_with(status),
        }
        if self.out.len() as u64 > LONGEST {
            self.leave_out_too_long();
        }
        // Cores share the gauge, and for an event there is nothing to tell it.
        if self.session.len() != before {
            self.shared.metrics.watchers.add(self.session.len() as i64 - before as i64);
        }
        self.start_relays() || more
    }

    /// The stream ends so, after what was put out.
    fn end_with(&mut self, status: Status) {
        self.ended = Some(Box::new(status));
    }

    fn has_to_end(&mut self) -> bool {
        let ends = self.end.as_mut().poll(&mut Context::from_waker(self.news.seldom())).is_ready();
        if ends {
            self.end_with(if self.shared.stop.is_cancelled() { Status::STOPPED } else { self.shared.leader.lack() });
        }
        ends
    }

    /// Takes in requests, and what relays have to tell. True when there may be more of it.
    fn take_in(&mut self) -> bool {
        let waker = self.news.seldom().clone();
        let cx = &mut Context::from_waker(&waker);
        let more = self.take_requests(cx);
        self.take_reports(cx) || more
    }

    /// Ends the stream before a response that is longer than etcd sends, as etcd does.
    fn leave_out_too_long(&mut self) {
        if let Some((start, length)) = too_long(self.out.bytes(), LONGEST) {
            // Not in place: what is left out is not to stay in memory.
            self.out.cut(start);
            let text = format!("trying to send message larger than max ({length} vs. {LONGEST})");
            self.end_with(Status::new(Code::ResourceExhausted, text));
        }
    }

    /// Takes requests in. True when there may be more of them.
    fn take_requests(&mut self, cx: &mut Context<'_>) -> bool {
        for _ in 0..REQUESTS_PER_PIECE {
            if !self.take_opening(cx) || self.ended.is_some() {
                return false;
            }
            match self.poll_request(cx) {
                Poll::Ready(Some(Ok(request))) => self.take_request(request),
                Poll::Ready(Some(Err(status))) => self.end_with(status),
                Poll::Ready(None) | Poll::Pending => return false,
            }
        }
        true
    }

    /// Finishes the create request that waits, if there is one. False while it still waits.
    fn take_opening(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(opening) = &mut self.opening else { return true };
        let Poll::Ready(now) = opening.1.as_mut().poll(cx) else { return false };
        match (self.opening.take(), now) {
            (Some(opening), Ok(now)) => self.create(opening.0, now),
            (_, Err(status)) => self.end_with(status),
            (None, Ok(_)) => {}
        }
        true
    }

    /// The next request; none after the client has closed its side, which does not end the stream.
    fn poll_request(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<WatchRequest, Status>>> {
        let limit = largest_message(self.shared.settings.max_request_bytes);
        loop {
            match self.deframer.check_announced(limit).and_then(|()| self.deframer.pop()) {
                Ok(Some(message)) => return Poll::Ready(Some(decode(message))),
                Ok(None) => {}
                Err(status) => return Poll::Ready(Some(Err(status))),
            }
            let Some(requests) = &mut self.requests else { return Poll::Ready(None) };
            match ready!(Pin::new(requests).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.deframer.push(data);
                    }
                }
                Some(Err(_)) => {
                    self.requests = None;
                    return Poll::Ready(Some(Err(Status::CANCELLED)));
                }
                None => self.requests = None,
            }
        }
    }

    fn take_request(&mut self, request: WatchRequest) {
        match request.request_union {
            Some(RequestUnion::CreateRequest(request)) => self.take_create(request),
            Some(RequestUnion::CancelRequest(request)) => {
                let now = self.now();
                self.session.cancel(request.watch_id, now, &mut self.out);
                if let Some(relays) = &mut self.relays {
                    relays.running.retain(|(slot, serial), _| self.session.is_relayed(*slot, *serial));
                }
            }
            Some(RequestUnion::ProgressRequest(_)) => {
                let known = self.shared.cache.told();
                self.shared.cache.prefixes().iter().for_each(|prefix| prefix.want(known));
                if self.session.request_progress(known) {
                    self.ask_relays(known);
                }
            }
            None => {}
        }
    }

    /// Creates a watcher at once if it may begin on the view of its range. While that is being found out, the request
    /// waits; where there is no view, only the cluster knows what the present is.
    fn take_create(&mut self, request: WatchCreateRequest) {
        let options = WatchOptions::from_request(&request);
        let names_start = request.start_revision > 0;
        let cache = &self.shared.cache;
        let covering = cache.covering(&options.range);
        self.session.attend(covering.as_ref().map(|(lane, _)| *lane));
        match covering.filter(|(_, prefix)| prefix.store().view().is_loaded()) {
            Some((lane, prefix)) => match cache.begin_at_once(prefix, names_start).filter(|_| cache.is_open()) {
                Some(now) => self.create(request, now),
                None => {
                    let cache = cache.clone();
                    self.wait(request, async move { cache.begin(&cache.prefixes()[lane], names_start).await });
                }
            },
            None => {
                let cache = cache.clone();
                self.wait(request, async move { cache.begin_unseen().await });
            }
        }
    }

    /// Lets a create request wait for `now`, and while authentication may be coming on. No hub knows of it yet, so it has to see for
    /// itself when that has happened.
    fn wait(&mut self, request: WatchCreateRequest, now: impl Future<Output = (Responder, Revision)> + Send + 'static) {
        let auth = self.shared.cache.upstream().auth().changes();
        self.opening = Some(Box::new((request, Box::pin(while_open(auth, now)))));
    }

    fn create(&mut self, request: WatchCreateRequest, now: (Responder, Revision)) {
        let options = WatchOptions::from_request(&request);
        if let Err(refusal) = validate::watch(&request, &options.range) {
            return refuse(refusal.to_string(), now, &mut self.out);
        }
        let lane = self.shared.cache.covering(&options.range).map(|(lane, _)| lane);
        let start = match request.start_revision {
            0 => Start::After(now.1),
            revision => Start::At(Revision(revision)),
        };
        self.session.create(request.watch_id, options, start, lane, now, &mut self.out);
    }

    /// Who answers now, and at which revision, for answers that concern no prefix in particular.
    fn now(&self) -> (Responder, Revision) {
        let cache = &self.shared.cache;
        let present = cache.prefixes().iter().map(|prefix| cache.present(prefix)).max_by_key(|(_, revision)| *revision);
        present.unwrap_or_default()
    }

    fn take_reports(&mut self, cx: &mut Context<'_>) -> bool {
        while self.out.len() < PIECE {
            let Some(relays) = &mut self.relays else { return false };
            let Poll::Ready(Some(report)) = relays.reports.poll_recv(cx) else { return false };
            match report {
                Report::Response(slot, serial, response) => {
                    self.session.relayed(slot, serial, *response, &mut self.out);
                    // Whoever was cancelled has no use for it any more.
                    if !self.session.is_relayed(slot, serial) {
                        relays.running.remove(&(slot, serial));
                    }
                }
                Report::Reached(slot, serial) => {
                    relays.running.remove(&(slot, serial));
                    self.session.end_relay(slot, serial);
                }
                Report::Refused => self.end_with(TOO_MANY),
                Report::Lost => self.end_with(LOST),
            }
            if self.ended.is_some() {
                return false;
            }
        }
        true
    }

    /// Starts the relays that the session has come to need. True when there were such.
    fn start_relays(&mut self) -> bool {
        let wanted = self.session.take_relays();
        let any = !wanted.is_empty();
        for relay in wanted {
            let relays = self.relays.get_or_insert_with(|| Box::new(Relays::new()));
            let key = (relay.slot, relay.serial);
            let handle = relay::start(&self.shared, relay, relays.sender.clone());
            if self.session.awaits_progress() {
                handle.ask(self.shared.cache.told());
            }
            relays.running.insert(key, handle);
        }
        any
    }

    /// Has the upstream asked how far the relays have got, until that is `known`.
    fn ask_relays(&self, known: Revision) {
        self.relays.iter().flat_map(|relays| relays.running.values()).for_each(|handle| handle.ask(known));
    }

    fn take_tick(&mut self) {
        let interval = self.shared.settings.progress_interval;
        if self.ticker.is_none() && self.session.wants_ticks() {
            // As in etcd, a little jitter keeps the streams from ticking all at once.
            let jitter = rand::rng().random_range(0.0..0.1);
            self.ticker = Some(Box::pin(sleep(interval.mul_f64(1.0 + jitter))));
        }
        let Some(ticker) = &mut self.ticker else { return };
        let cx = &mut Context::from_waker(self.news.often());
        if ticker.as_mut().poll(cx).is_ready() {
            ticker.as_mut().reset(Instant::now() + interval);
            // The new deadline is only seen when it is polled.
            let _ = ticker.as_mut().poll(cx);
            self.session.tick(&mut self.out);
            if self.session.ask_relays() {
                self.ask_relays(Revision::ZERO);
            }
        }
    }

    fn piece(&mut self) -> Frame<Data> {
        self.shared.metrics.bytes.inc_by(self.out.len() as u64);
        Frame::data(self.out.take().into())
    }
}

impl HttpBody for Stream {
    type Data = Data;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Data>, BodyError>>> {
        let stream = self.get_mut();
        if stream.finished {
            return Poll::Ready(None);
        }
        let Some(news) = stream.news.take(cx) else { return Poll::Pending };
        let more = stream.ended.is_none() && stream.work(news);
        if more || stream.ended.is_some() {
            stream.news.keep();
        }
        if !stream.out.is_empty() {
            return Poll::Ready(Some(Ok(stream.piece())));
        }
        if let Some(status) = &stream.ended {
            stream.finished = true;
            return Poll::Ready(Some(Ok(Frame::trailers(failure_trailers(status)))));
        }
        if more {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.metrics.streams.dec();
        self.shared.metrics.watchers.sub(self.session.len() as i64);
    }
}

/// What `waited` gives, unless authentication comes on first.
async fn while_open<T>(mut auth: watch::Receiver<AuthState>, waited: impl Future<Output = T>) -> Result<T, Status> {
    let mut changing = auth.clone();
    let waited = async {
        let _ = changing.wait_for(|auth| *auth != AuthState::Changing).await;
        waited.await
    };
    tokio::select! {
        biased;
        Ok(_) = auth.wait_for(|auth| *auth == AuthState::On) => Err(Status::WATCH_AGAIN),
        now = waited => Ok(now),
    }
}

/// Where in `out` the first response above `longest` begins, and how long it is.
fn too_long(out: &[u8], longest: u64) -> Option<(usize, usize)> {
    let mut start = 0;
    while let Some((length, rest)) = out.get(start..).and_then(grpc::split) {
        if length as u64 > longest {
            // Of one above 4 GiB the head tells too little.
            return Some((start, if length == u32::MAX as usize { rest.len() } else { length }));
        }
        start += PREFIX + length;
    }
    None
}

fn decode(message: Bytes) -> Result<WatchRequest, Status> {
    WatchRequest::decode(message)
        .map_err(|error| Status::new(Code::Internal, format!("grpc: error unmarshalling request: {error}")))
}

#[cfg(test)]
mod tests;
