//! Watch streams: any number of watchers on one, each a place in history from which it reads on.
//!
//! A watcher that has caught up is served from the recent history in memory, one that has not (or that fell behind) from the
//! log. Nothing is queued for a slow client beyond a few responses: it reads history until that has been compacted.

mod events;
mod watcher;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures_util::StreamExt;
use rand::RngExt;
use tokio::{
    sync::{mpsc, watch},
    time::{self, Interval, MissedTickBehavior},
};
use tonic::Streaming;

pub use self::events::next_chunk;
use self::{events::Chunk, watcher::Watcher};
use super::Engine;
use crate::{
    grpc,
    proto::etcdserverpb::{WatchCreateRequest, WatchRequest, WatchResponse, watch_request::RequestUnion},
    rules::{
        KeyRange, validate,
        watch::{Refusal, watched},
    },
    status::Status,
};

/// Where responses go.
pub type Responses = mpsc::Sender<Result<WatchResponse, tonic::Status>>;

/// The id in a response that speaks of no one watcher.
const NO_WATCHER: i64 = -1;

/// The shortest progress interval, as in etcd.
const MIN_PROGRESS: Duration = Duration::from_millis(100);

/// The client is gone.
struct Gone;

/// Serves one watch stream until the client goes or the store is closed.
pub async fn serve(engine: Engine, requests: Streaming<WatchRequest>, responses: Responses) {
    let gauge = engine.state().options.metrics.watch_streams.clone();
    gauge.inc();
    let session = Session::new(engine, responses);
    // The client's absence is how most streams end.
    let _: Result<(), Gone> = session.run(requests).await;
    gauge.dec();
}

struct Session {
    engine: Engine,
    responses: Responses,
    watchers: BTreeMap<i64, Watcher>,
    next_id: i64,
    revisions: watch::Receiver<i64>,
    progress: Interval,
}

impl Session {
    fn new(engine: Engine, responses: Responses) -> Self {
        let interval = engine.state().options.progress_interval.max(MIN_PROGRESS);
        let jitter = interval.mul_f64(rand::rng().random_range(0.0..0.1));
        let mut progress = time::interval_at(time::Instant::now() + interval + jitter, interval + jitter);
        progress.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let revisions = engine.state().revisions();
        Self { engine, responses, watchers: BTreeMap::new(), next_id: 0, revisions, progress }
    }

    async fn run(mut self, requests: Streaming<WatchRequest>) -> Result<(), Gone> {
        // A client that has said all it has to say still gets its events.
        let mut requests = requests.chain(futures_util::stream::pending());
        let closed = self.engine.closed().clone();
        loop {
            let behind = self.is_behind();
            tokio::select! {
                () = closed.cancelled() => return self.end(Status::STOPPED).await,
                () = self.responses.closed() => return Err(Gone),
                request = requests.next() => match request {
                    Some(Ok(request)) => self.handle(request).await?,
                    Some(Err(_)) | None => return Err(Gone),
                },
                _ = self.progress.tick() => self.notify_progress().await?,
                _ = self.revisions.changed(), if !behind => {}
                () = std::future::ready(()), if behind => self.deliver().await?,
            }
        }
    }

    async fn end(&self, status: Status) -> Result<(), Gone> {
        self.responses.send(Err(status.into())).await.map_err(|_| Gone)
    }

    async fn send(&self, response: WatchResponse) -> Result<(), Gone> {
        self.responses.send(Ok(response)).await.map_err(|_| Gone)
    }

    /// A response with a complete header at the latest revision.
    fn response(&self, watch_id: i64) -> WatchResponse {
        WatchResponse { header: Some(self.engine.state().header()), watch_id, ..Default::default() }
    }

    async fn handle(&mut self, request: WatchRequest) -> Result<(), Gone> {
        match request.request_union {
            Some(RequestUnion::CreateRequest(request)) => self.create(request).await,
            Some(RequestUnion::CancelRequest(request)) => self.cancel(request.watch_id).await,
            Some(RequestUnion::ProgressRequest(_)) => self.answer_progress().await,
            None => Ok(()),
        }
    }

    async fn create(&mut self, request: WatchCreateRequest) -> Result<(), Gone> {
        let range = watched(&request);
        if let Err(refusal) = validate::watch(&request, &range) {
            return self.refuse(refusal).await;
        }
        let id = if request.watch_id == 0 { self.unused_id() } else { request.watch_id };
        if self.watchers.contains_key(&id) {
            return self.refuse(Refusal::DuplicateId).await;
        }
        let created = self.response(id);
        let current = created.header.as_ref().map_or(0, |header| header.revision);
        self.watchers.insert(id, Watcher::new(&request, range, current));
        self.send(WatchResponse { created: true, ..created }).await
    }

    async fn refuse(&self, refusal: Refusal) -> Result<(), Gone> {
        let cancel_reason = refusal.to_string();
        self.send(WatchResponse { created: true, canceled: true, cancel_reason, ..self.response(NO_WATCHER) }).await
    }

    fn unused_id(&mut self) -> i64 {
        while self.watchers.contains_key(&self.next_id) {
            self.next_id = self.next_id.wrapping_add(1);
        }
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        id
    }

    async fn cancel(&mut self, id: i64) -> Result<(), Gone> {
        if self.watchers.remove(&id).is_none() {
            return Ok(());
        }
        self.send(WatchResponse { canceled: true, ..self.response(id) }).await
    }

    /// Answers a request for progress if every watcher of the stream is live, after whatever they have still to get; stays
    /// silent otherwise, as etcd does.
    async fn answer_progress(&mut self) -> Result<(), Gone> {
        if self.watchers.is_empty() || !self.watchers.values().all(Watcher::is_live) {
            return Ok(());
        }
        while self.is_behind() {
            self.deliver().await?;
        }
        let response = self.caught_up_response(NO_WATCHER);
        let current = response.header.as_ref().map_or(0, |header| header.revision);
        if self.watchers.values().all(|watcher| watcher.is_live() && watcher.start <= current) {
            self.send(response).await?;
        }
        Ok(())
    }

    /// An empty response at the revision up to which all live watchers have been served.
    fn caught_up_response(&self, watch_id: i64) -> WatchResponse {
        let current = self.engine.state().position().current;
        let served = self.watchers.values().filter(|watcher| watcher.is_live()).map(|watcher| watcher.next - 1).min();
        let header = self.engine.state().header_at(served.unwrap_or(current).min(current));
        WatchResponse { header: Some(header), watch_id, ..Default::default() }
    }

    /// Tells the watchers that asked for it, and got nothing since the last time, how far they have got.
    async fn notify_progress(&mut self) -> Result<(), Gone> {
        while self.watchers.values().any(Watcher::is_live) && self.is_behind() {
            self.deliver().await?;
        }
        let current = self.engine.state().position().current;
        let due = self.watchers.iter_mut().filter_map(|(id, watcher)| watcher.take_progress(current).then_some(*id));
        for id in due.collect::<Vec<_>>() {
            self.send(self.caught_up_response(id)).await?;
        }
        Ok(())
    }

    fn is_behind(&self) -> bool {
        let current = *self.revisions.borrow();
        self.watchers.values().any(|watcher| watcher.is_behind(current))
    }

    /// Serves the watchers that are furthest behind, and whoever is at the same place, with the next stretch of history.
    async fn deliver(&mut self) -> Result<(), Gone> {
        let current = *self.revisions.borrow_and_update();
        let compacted = self.engine.state().position().compacted;
        self.cancel_compacted(current, compacted).await?;
        let behind = self.watchers.values().filter(|watcher| watcher.is_behind(current));
        let Some(from) = behind.map(|watcher| watcher.next).min() else { return Ok(()) };
        match events::next_chunk(&self.engine, from).await {
            Ok(Some(chunk)) => self.serve_chunk(chunk, current, compacted).await,
            // Compacted meanwhile: the next round says so.
            Ok(None) => Ok(()),
            Err(status) => {
                self.end(status).await?;
                Err(Gone)
            }
        }
    }

    async fn cancel_compacted(&mut self, current: i64, compacted: i64) -> Result<(), Gone> {
        let lost = |watcher: &Watcher| watcher.is_behind(current) && watcher.next < compacted;
        let lost: Vec<i64> = self.watchers.iter().filter(|(_, watcher)| lost(watcher)).map(|(id, _)| *id).collect();
        for id in lost {
            self.watchers.entry(id).and_modify(Watcher::set_compacted);
            let header = Some(self.engine.state().header_at(0));
            let response = WatchResponse { header, watch_id: id, canceled: true, ..Default::default() };
            self.send(WatchResponse { compact_revision: compacted, ..response }).await?;
        }
        Ok(())
    }

    async fn serve_chunk(&mut self, chunk: Chunk, current: i64, compacted: i64) -> Result<(), Gone> {
        // The store may have gone on while the stretch was read, and no header is older than an event under it.
        let current = current.max(chunk.last);
        let concerned = |watcher: &Watcher| watcher.is_behind(current) && watcher.next <= chunk.last;
        let with_previous: Vec<KeyRange> = self
            .watchers
            .values()
            .filter(|watcher| concerned(watcher) && watcher.prev_kv)
            .map(|watcher| watcher.range.clone())
            .collect();
        let previous = match events::previous(&self.engine, &chunk, with_previous).await {
            Ok(previous) => Arc::new(previous),
            Err(status) => {
                self.end(status).await?;
                return Err(Gone);
            }
        };
        let limit = grpc::largest_message(self.engine.state().options.max_request_bytes);
        let ids: Vec<i64> = self.watchers.iter().filter(|(_, watcher)| concerned(watcher)).map(|(id, _)| *id).collect();
        for id in ids {
            let Some(watcher) = self.watchers.get_mut(&id) else { continue };
            let responses = watcher.advance(&chunk, &previous, current, compacted);
            let fragment = watcher.fragment;
            for (revision, events) in responses {
                let header = Some(self.engine.state().header_at(revision));
                let response = WatchResponse { header, watch_id: id, events, ..Default::default() };
                if fragment {
                    for part in events::fragments(response, limit) {
                        self.send(part).await?;
                    }
                } else {
                    self.send(response).await?;
                }
            }
        }
        Ok(())
    }
}
