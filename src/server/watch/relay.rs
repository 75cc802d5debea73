//! Watchers that the history window cannot serve, relayed from the upstream one by one: those that begin before it, or before
//! anything is loaded, until they have reached it, and those of ranges that are not cached, for as long as they live.
//!
//! A relay may outlive its upstream, and goes on where what comes next follows on what it has relayed ([`Lineage`]). Where nobody
//! can tell, it ends its client's stream, as etcd's own end would.

use std::{future::pending, pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use prost::Message;
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, watch},
    task::AbortHandle,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    Shared,
    lineage::{Descent, Lineage},
};
use crate::{
    fanout::{Hub, Relay},
    proto::{
        etcdserverpb::{
            WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse, watch_create_request::FilterType,
            watch_request::RequestUnion,
        },
        paths,
    },
    server::listener::Counted,
    status::Status,
    store::Revision,
    upstream::{ConnectionNumber, StreamReceiver, StreamSender},
};

const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// For a request to be taken.
const PATIENCE: Duration = Duration::from_millis(100);
/// For a client to make room. One that takes longer leaves its place among the relays to others meanwhile.
const ROOM: Duration = Duration::from_secs(1);
/// For the first load, which saves a relay the upstream. If it takes longer, nobody's watch is to stand still for it.
const LOAD: Duration = Duration::from_secs(5);

/// What a relay has to say to its stream.
pub(super) enum Report {
    /// Events, progress or a cancellation.
    Response(u32, u64, Box<WatchResponse>),
    /// The history window can take over.
    Reached(u32, u64),
    /// There is no room for another relay.
    Refused,
    /// Whether the history goes on cannot be told.
    Lost,
}

/// A relay under way; it ends when this is dropped.
pub(super) struct Handle {
    asked: watch::Sender<Revision>,
    task: AbortHandle,
}

impl Handle {
    /// The stream wants to know how far it has got, and of a revision that is not below `known`.
    pub(super) fn ask(&self, known: Revision) {
        self.asked.send_modify(|asked| *asked = known.max(*asked));
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Starts to relay a watcher.
pub(super) fn start(shared: &Arc<Shared>, relay: Relay, reports: mpsc::Sender<Report>) -> Handle {
    let (asked, is_asked) = watch::channel(Revision::ZERO);
    let hub = relay.lane.and_then(|lane| shared.hubs.get(lane).cloned());
    let lineage = Lineage::new(shared.cache.clone(), relay.lane, relay.epoch);
    let (shared, next) = (shared.clone(), relay.from);
    let (heard, is_early, is_owed) = (Revision::ZERO, false, false);
    let task = Task { shared, hub, lineage, next, is_early, heard, is_owed, relay, reports, asked: is_asked };
    Handle { asked, task: tokio::spawn(task.run()).abort_handle() }
}

struct Task {
    shared: Arc<Shared>,
    /// Who can take over.
    hub: Option<Arc<Hub>>,
    /// The history that it relays.
    lineage: Lineage,
    relay: Relay,
    /// The first revision that has not been relayed.
    next: Revision,
    /// The upstream is asked for one revision more, which it has, since etcd tells no progress to who begins in its future.
    is_early: bool,
    /// The revision that the upstream watch has told of.
    heard: Revision,
    /// The upstream has yet to answer a request for progress. It is asked again: etcd says nothing while it sends older events.
    is_owed: bool,
    reports: mpsc::Sender<Report>,
    /// Up to where the stream wants to be told of progress, with a signal at every request.
    asked: watch::Receiver<Revision>,
}

/// How one upstream watch ended.
enum End {
    /// The relay is over.
    Over,
    /// It is to be tried again.
    Failed(Status),
    /// It is to be tried again at once.
    Again,
    /// It goes on after this, for which the client makes no room.
    Stalled(Report),
}

impl Task {
    async fn run(mut self) {
        loop {
            let permit = tokio::select! {
                biased;
                permit = self.permit() => permit,
                () = self.arrival() => return drop(self.hand_over().await),
            };
            let Some(permit) = permit else { return drop(self.report(Report::Refused).await) };
            let Some(report) = self.run_with(permit).await else { return };
            if self.reports.send(report).await.is_err() {
                return;
            }
        }
    }

    /// Relays for as long as the client makes room. Gives what it has made none for; none: the relay is over.
    async fn run_with(&mut self, _permit: OwnedSemaphorePermit) -> Option<Report> {
        let _counted = Counted::new(&self.shared.metrics.relays);
        let mut pause = FIRST_PAUSE;
        loop {
            let before = self.next;
            let status = match self.follow().await {
                End::Over => return None,
                End::Stalled(report) => return Some(report),
                End::Again => continue,
                End::Failed(status) => status,
            };
            if self.next != before {
                pause = FIRST_PAUSE;
            }
            tracing::debug!(%status, next = self.next.0, "a relayed watch is tried again");
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Room among the relays of its kind. Those that end by themselves queue for it; the others do not, and neither do those that a
    /// load which takes long would have to end.
    async fn permit(&self) -> Option<OwnedSemaphorePermit> {
        if self.hub.is_some() {
            let mut turn = pin!(self.shared.catch_up.clone().acquire_owned());
            if !self.lineage.can_resume()
                && let Ok(permit) = timeout(LOAD, &mut turn).await
            {
                return permit.ok();
            }
            if self.lineage.can_resume() {
                return turn.await.ok();
            }
        }
        self.shared.uncached.clone().try_acquire_owned().ok()
    }

    async fn follow(&mut self) -> End {
        if self.has_arrived() {
            return self.hand_over().await;
        }
        let upstream = self.shared.cache.upstream().clone();
        let Some(at) = upstream.preferred(&[]) else { return End::Failed(Status::unavailable("no endpoint")) };
        let (sender, mut receiver) = match upstream.open_catch_up(at, paths::WATCH).await {
            Ok(opened) => opened,
            Err(status) => return End::Failed(status),
        };
        match self.lineage.descent(receiver.connection()).await {
            Descent::Same => {}
            // The session learns from its hub that the watcher is to be cancelled.
            Descent::Another => return End::Over,
            Descent::Unknown => return self.report(Report::Lost).await,
        }
        // Whoever answers what is sent from now on was there when these had been opened.
        let opened = upstream.newest_connection().max(receiver.connection());
        let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(self.create_request())) };
        match sender.send(&create).await {
            Ok(()) => self.pass_on(&sender, &mut receiver, opened).await,
            Err(status) => End::Failed(status),
        }
    }

    /// Where the upstream watch begins.
    fn start(&self) -> Revision {
        if self.is_early { self.next.previous() } else { self.next }
    }

    /// Whether the upstream has everything before the first revision that has not been relayed. If not, because the client named a
    /// revision to come, etcd would never answer a request for progress.
    fn has_begun(&self) -> bool {
        self.relay.begins_now || self.next > self.relay.from
    }

    /// Whether the upstream watch has to be opened again because etcd does not answer on this one. Not where nobody could tell then
    /// whether it is of the same history.
    fn is_to_begin_earlier(&self) -> bool {
        self.is_owed && !self.is_early && self.heard < self.next && self.lineage.is_known()
    }

    fn create_request(&self) -> WatchCreateRequest {
        let options = &self.relay.options;
        let filters = [(options.no_put, FilterType::Noput), (options.no_delete, FilterType::Nodelete)];
        WatchCreateRequest {
            key: options.range.request_key(),
            range_end: options.range.request_end(),
            start_revision: self.start().0,
            filters: filters.into_iter().filter(|(on, _)| *on).map(|(_, filter)| filter as i32).collect(),
            prev_kv: options.prev_kv,
            ..Default::default()
        }
    }

    async fn pass_on(
        &mut self,
        sender: &StreamSender<WatchRequest>,
        receiver: &mut StreamReceiver,
        opened: ConnectionNumber,
    ) -> End {
        let trusted = self.shared.cache.gate().progress_is_proof;
        if let Some(end) = self.take_first(receiver, opened, trusted).await {
            return end;
        }
        let mut pause = FIRST_PAUSE;
        let mut ask = Instant::now() + pause;
        // Requests that an earlier upstream watch was sent may not have been answered.
        let mut asked = self.asked.clone();
        loop {
            let message = tokio::select! {
                // What seldom happens comes first, so that nothing waits for ever.
                biased;
                Ok(()) = asked.changed() => {
                    self.is_owed = self.has_begun();
                    pause = FIRST_PAUSE;
                    None
                }
                () = self.arrival() => return self.hand_over().await,
                message = receiver.next() => Some(message),
                () = sleep_until(ask), if trusted && self.asks_by_itself() => {
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    None
                }
            };
            let Some(message) = message else {
                if self.is_to_begin_earlier() {
                    self.is_early = true;
                    return End::Again;
                }
                ask_for_progress(sender).await;
                ask = Instant::now() + pause;
                continue;
            };
            if let Some(end) = self.take_message(message, receiver.connection(), trusted).await {
                return end;
            }
        }
    }

    /// Takes what an upstream watch begins with. Etcd may send progress ahead of `created`, and of events that it holds back
    /// until then: nobody asks before.
    async fn take_first(
        &mut self,
        receiver: &mut StreamReceiver,
        opened: ConnectionNumber,
        trusted: bool,
    ) -> Option<End> {
        self.heard = Revision::ZERO;
        let created = receiver.next().await;
        if matches!(created, Some(Ok(_))) {
            self.lineage.follow(opened);
        }
        self.take_message(created, receiver.connection(), trusted).await
    }

    async fn take_message(
        &mut self,
        message: Option<Result<Bytes, Status>>,
        connection: ConnectionNumber,
        trusted: bool,
    ) -> Option<End> {
        match message.map(|message| message.map(WatchResponse::decode)) {
            Some(Ok(Ok(response))) => self.take(response, connection, trusted).await,
            Some(Ok(Err(error))) => Some(End::Failed(Status::unavailable(error.to_string()))),
            Some(Err(status)) => Some(End::Failed(status)),
            None => Some(End::Failed(Status::unavailable("the upstream ended the watch"))),
        }
    }

    async fn take(&mut self, mut response: WatchResponse, connection: ConnectionNumber, trusted: bool) -> Option<End> {
        if self.lineage.is_outlived() {
            return Some(End::Again);
        }
        if self.is_early && response.canceled && response.compact_revision == self.next.0 {
            self.is_early = false;
            return Some(End::Again);
        }
        if response.canceled && response.compact_revision == 0 && !response.cancel_reason.is_empty() {
            // We are refused, not the client. That is so when authentication has come on.
            drop(self.shared.cache.upstream().suspect_auth());
            return Some(self.report(Report::Lost).await);
        }
        self.heard = self.heard.max(revision_of(&response));
        if self.is_early && !response.events.is_empty() {
            response.events.retain(|event| event.kv.as_ref().is_some_and(|kv| kv.mod_revision >= self.next.0));
            if response.events.is_empty() {
                return None;
            }
        }
        self.note(&response, connection);
        // The proof of just now may not know what has just been noted.
        if self.lineage.is_outlived() {
            return Some(End::Again);
        }
        if !self.advance(&response, trusted) {
            return None;
        }
        let canceled = response.canceled;
        let report = Report::Response(self.relay.slot, self.relay.serial, Box::new(response));
        if canceled {
            return Some(self.report(report).await);
        }
        if let Err(end) = self.pass(report).await {
            return Some(end);
        }
        if self.has_arrived() { Some(self.hand_over().await) } else { None }
    }

    /// Goes on to where `response` leads. Whether the stream is to be told of it.
    fn advance(&mut self, response: &WatchResponse, trusted: bool) -> bool {
        let last = response.events.iter().filter_map(|event| event.kv.as_ref()).next_back();
        if let Some(last) = last {
            self.next = self.next.max(Revision(last.mod_revision).next());
        } else if !response.canceled && (response.created || !trusted) {
            return false;
        } else if !response.canceled {
            self.next = self.next.max(revision_of(response).next());
            self.is_owed = false;
        }
        true
    }

    /// Gives `report` to the stream. There are few relays that end by themselves, so none of them is kept by a client that makes no
    /// room, if it can be taken up again.
    async fn pass(&self, report: Report) -> Result<(), End> {
        let may_pause = self.hub.is_some() && self.lineage.can_resume();
        let room = match timeout(ROOM, self.reports.reserve()).await {
            Err(_) if may_pause => return Err(End::Stalled(report)),
            Err(_) => self.reports.reserve().await,
            Ok(room) => room,
        };
        room.map(|room| room.send(report)).map_err(|_| End::Over)
    }

    /// Whether it asks for progress though the stream does not. One that ends by itself does, for a quiet range has no events
    /// that show how far it is. So does one whose upstream, which may be a member that lags, has told of less than the stream
    /// wants to know.
    fn asks_by_itself(&self) -> bool {
        self.hub.is_some() || self.is_owed || self.next <= *self.asked.borrow()
    }

    /// Lets the history window take over.
    async fn hand_over(&mut self) -> End {
        let settled = self.lineage.settle().await;
        self.report(if settled { Report::Reached(self.relay.slot, self.relay.serial) } else { Report::Lost }).await
    }

    /// What the client is about to be told has to be found in the history that the cache goes on with.
    fn note(&self, response: &WatchResponse, connection: ConnectionNumber) {
        let cache = &self.shared.cache;
        let options = &self.relay.options;
        // A transaction can put a key and delete it. Who is sent one of both does not know what is left.
        let knows_all = !options.no_put && !options.no_delete;
        if let (true, Some(prefix)) = (knows_all, self.lineage.prefix()) {
            prefix.note_events(&response.events);
        }
        cache.note_told(revision_of(response), connection);
    }

    /// Whether the history window holds everything that is still to come.
    fn has_arrived(&self) -> bool {
        self.hub.as_ref().is_some_and(|hub| {
            let view = hub.store().view();
            view.is_loaded() && view.window.start() <= self.next
        })
    }

    /// Waits for the first load to bring the history window here. What else brings it comes with messages.
    async fn arrival(&self) {
        let Some(hub) = &self.hub else { return pending().await };
        hub.store().reached(Revision(1)).await;
        if !self.has_arrived() {
            pending().await
        }
    }

    async fn report(&self, report: Report) -> End {
        // A stream that has gone meanwhile needs no word.
        let _ = self.reports.send(report).await;
        End::Over
    }
}

/// The revision in the header of `response`.
fn revision_of(response: &WatchResponse) -> Revision {
    Revision(response.header.as_ref().map_or(0, |header| header.revision))
}

async fn ask_for_progress(sender: &StreamSender<WatchRequest>) {
    let union = RequestUnion::ProgressRequest(WatchProgressRequest {});
    // A stream that has broken shows that at its receiving end; one that is stuck is not to be waited for, since it may be
    // waiting for us.
    let _ = timeout(PATIENCE, sender.send(&WatchRequest { request_union: Some(union) })).await;
}
