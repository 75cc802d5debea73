//! The watch: whole revisions, in order, into the store; a view for each batch.

use std::{
    convert::Infallible,
    future::{Future, pending},
    pin::Pin,
    time::Duration,
};

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::time::{Instant, sleep_until, timeout};

use super::{
    DEADLINE, Demand, End, Feed, Phase,
    decode::Response,
    floor::Mark,
    index::{Lacking, TRY_INDEX},
    list::{count, examine},
    serializable_question,
};
use crate::{
    aside,
    proto::{
        etcdserverpb::{WatchCreateRequest, WatchProgressRequest, WatchRequest, watch_request::RequestUnion},
        paths,
    },
    rules::KeyRange,
    status::Status,
    store::{Change, Position, Revision},
    upstream::{AuthState, ConnectionNumber, EndpointId, Link, StreamReceiver, StreamSender},
};

/// Messages that are taken into one batch, if they are there already.
const BATCH_MESSAGES: usize = 512;
/// Between two looks at the age of the history, and at an index that was too large.
const HOUSEKEEPING: Duration = Duration::from_secs(5);
/// For the watch to be created.
const OPENING: Duration = Duration::from_secs(10);
/// The longest pause between two requests for progress while one is awaited.
const LONGEST_ASK: Duration = Duration::from_millis(100);
/// With the whole keyspace cached, an event is on its way for every revision: only a revision without one needs asking.
const PATIENCE_WITH_EVENTS: Duration = Duration::from_millis(20);

/// The open watch.
struct Stream {
    sender: StreamSender<WatchRequest>,
    receiver: StreamReceiver,
}

/// When to ask for progress, and since when the goal has been missed without an event.
#[derive(Clone, Copy, Debug)]
struct Chase {
    since: Instant,
    arrived: Arrived,
    ask: Instant,
    pause: Duration,
}

/// What has come of the events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Arrived {
    /// Messages that had any.
    messages: u64,
    /// Bytes of the message that is on its way. One that deletes a large range has many.
    bytes: usize,
}

/// What the answer to a question over the feed's own connection shows.
struct Shown {
    /// All connections up to this one lead to the server that answered.
    confirmed: ConnectionNumber,
    /// How far the cluster has got, when it was asked for that, and what had been noted before.
    present: Option<(Mark, Revision)>,
}

/// A question under way.
type Asking<'a, T> = Option<Pin<Box<dyn Future<Output = Result<T, End>> + Send + 'a>>>;

/// The questions under way, with the watch open beside them.
#[derive(Default)]
struct Questions<'a> {
    present: Asking<'a, Shown>,
    count: Asking<'a, u64>,
}

impl Feed {
    /// Follows the upstream from the writer's position on.
    pub(super) async fn follow(&mut self, link: &Link) -> Result<Infallible, End> {
        let at = link.at();
        let mut stream = self.open_watch(link).await?;
        self.confirm(link.number());
        self.enter(Phase::Live);
        let mut auth = self.upstream.auth().changes();
        let doubts = self.demand.borrow().doubts;
        self.heed(doubts)?;
        let (mut chase, mut questions) = (None, Questions::default());
        let mut housekeeping = Instant::now() + HOUSEKEEPING;
        loop {
            let arrived = Arrived { messages: self.arrived, bytes: stream.receiver.incomplete() };
            chase = self.chase(at, arrived, chase)?;
            if questions.present.is_none() && self.is_asked_to_confirm() {
                questions.present = Some(Box::pin(ask_again(link, self.upstream.newest_connection())));
            }
            let wake = chase.map_or(housekeeping, |chase: Chase| chase.ask.min(housekeeping));
            tokio::select! {
                message = stream.receiver.next() => self.take_batch(&mut stream, message)?,
                Ok(()) = self.demand.changed() => self.heed(doubts)?,
                shown = answer(&mut questions.present) => self.take_shown(&shown?),
                counted = answer(&mut questions.count) => self.take_count(counted)?,
                Ok(()) = auth.changed() => {
                    if *auth.borrow_and_update() == AuthState::On {
                        return Err(End::Barred);
                    }
                }
                () = sleep_until(wake) => {
                    if Instant::now() >= housekeeping {
                        housekeeping = Instant::now() + HOUSEKEEPING;
                        self.keep_house(link, &mut questions)?;
                    }
                    if let Some(chase) = &mut chase {
                        self.ask_for_progress(&stream.sender, chase).await?;
                    }
                }
            }
        }
    }

    /// Cuts the history by age, and begins to ask what there is to be asked now and then.
    fn keep_house<'a>(&mut self, link: &'a Link, questions: &mut Questions<'a>) -> Result<(), End> {
        self.publish();
        match self.lacking() {
            Lacking::Nothing => {}
            Lacking::Count if questions.count.is_some() => {}
            Lacking::Count => questions.count = Some(Box::pin(count(link, self.list_request(Revision::ZERO)))),
            Lacking::List => return Err(TRY_INDEX),
        }
        if questions.present.is_none() && self.floor.revision() > self.writer.position().revision {
            let (newest, mark) = (self.upstream.newest_connection(), self.floor.mark());
            questions.present = Some(Box::pin(ask_for_present(link, newest, mark)));
        }
        Ok(())
    }

    /// Asks for whole responses. To cut one, etcd measures all events of a fragment again with each event, which for a
    /// range of 100,000 small keys that is deleted at once takes it minutes (3.7.1), and the watch stands still for so long.
    async fn open_watch(&mut self, link: &Link) -> Result<Stream, End> {
        let metadata = [("hasleader", "true")];
        let (sender, receiver) = link.open_stream(paths::WATCH, &metadata)?;
        let range = &self.settings.range;
        let create = WatchCreateRequest {
            key: range.request_key(),
            range_end: range.request_end(),
            start_revision: self.writer.position().revision.next().0,
            prev_kv: !self.writer.has_index(),
            ..Default::default()
        };
        sender.send(&WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }).await?;
        let mut stream = Stream { sender, receiver };
        let opened = timeout(OPENING, stream.receiver.next()).await;
        let message = opened.map_err(|_| End::Failed(Status::TIMEOUT))?;
        self.take_batch(&mut stream, message)?;
        Ok(stream)
    }

    /// Takes `first` and whatever else has arrived, and publishes it.
    fn take_batch(&mut self, stream: &mut Stream, first: Option<Result<Bytes, Status>>) -> Result<(), End> {
        let mut outcome = self.take(first);
        for _ in 1..BATCH_MESSAGES {
            let Some(received) = stream.receiver.next().now_or_never().filter(|_| outcome.is_ok()) else { break };
            outcome = self.take(received);
        }
        self.publish();
        outcome?;
        self.watch_size()
    }

    fn take(&mut self, received: Option<Result<Bytes, Status>>) -> Result<(), End> {
        let ended = || End::Failed(Status::unavailable("the upstream ended the watch"));
        let response = Response::decode(&received.ok_or_else(ended)??)?;
        if response.compacted > Revision::ZERO {
            self.writer.compacted(response.compacted);
            return Err(End::Again("the upstream was compacted past the feed"));
        }
        if response.canceled {
            return Err(End::from(Status::unavailable(response.reason)));
        }
        if response.created {
            return Ok(());
        }
        if response.changes.is_empty() {
            if self.upstream.gate().progress_is_proof {
                self.writer.advance(Revision(response.header.revision));
            }
            return Ok(());
        }
        self.arrived += 1;
        self.metrics.events.inc_by(response.changes.len() as u64);
        let now = self.started.elapsed().as_millis() as u64;
        self.apply(response.changes, now);
        Ok(())
    }

    /// Applies the events of one response, revision by revision.
    fn apply(&mut self, changes: Vec<Change>, now: u64) {
        let mut changes = changes.into_iter().peekable();
        while let Some(first) = changes.next() {
            let revision = first.record.mod_revision();
            let mut whole = vec![first];
            while let Some(change) = changes.next_if(|change| change.record.mod_revision() == revision) {
                whole.push(change);
            }
            aside::walk(whole.len() as u64, || self.writer.apply(revision, whole, now));
        }
    }

    /// Drops the index when it has grown over the limit; the next watch asks for previous versions instead.
    fn watch_size(&mut self) -> Result<(), End> {
        if self.writer.has_index() && self.writer.index_bytes() > self.settings.cache_bytes {
            self.too_many = self.exchanged(None);
            self.index(None);
            return Err(End::Again("the index has grown over the cache limit"));
        }
        Ok(())
    }

    /// Looks at what others need.
    fn heed(&mut self, doubts: u64) -> Result<(), End> {
        let demand: Demand = *self.demand.borrow_and_update();
        if demand.rebuilds != self.rebuilt {
            return Err(End::Again("the state was found to differ from the upstream's"));
        }
        if demand.doubts != doubts {
            return Err(End::Again("an answer contradicted the view"));
        }
        let Position { epoch, revision } = demand.compacted;
        if epoch == self.writer.position().epoch && revision > self.writer.store().view().compacted {
            self.writer.compacted(revision);
            self.publish();
        }
        Ok(())
    }

    /// Whether somebody waits for a revision that the view has not reached, and for how long it may stay so.
    fn chase(&self, endpoint: EndpointId, arrived: Arrived, chase: Option<Chase>) -> Result<Option<Chase>, End> {
        let (Position { epoch, revision: goal }, at) = (self.demand.borrow().goal, self.writer.position());
        if epoch != at.epoch || goal <= at.revision {
            return Ok(None);
        }
        let now = Instant::now();
        let patience =
            if self.settings.range == KeyRange::everything() { PATIENCE_WITH_EVENTS } else { Duration::ZERO };
        let fresh = Chase { since: now, arrived, ask: now + patience, pause: Duration::from_millis(1) };
        let mut chase = chase.unwrap_or(fresh);
        if chase.arrived != arrived {
            // It catches up, however slowly. Answers about progress are no such sign: a member that is cut off gives them.
            (chase.since, chase.arrived) = (now, arrived);
        }
        if now.duration_since(chase.since) > self.stall_limit(endpoint) {
            return Err(End::Stalled { at: at.revision, goal });
        }
        Ok(Some(chase))
    }

    /// How long the stream may stay behind without an event. While there is no other endpoint, beginning anew helps little:
    /// it makes the upstream read the same history again.
    fn stall_limit(&self, at: EndpointId) -> Duration {
        let alternative = self.upstream.preferred(&[at]).is_some();
        if alternative { self.settings.stall } else { self.settings.stall * 10 }
    }

    /// Asks for progress; and again, with growing pauses: etcd is silent while anything on the stream catches up.
    async fn ask_for_progress(&self, sender: &StreamSender<WatchRequest>, chase: &mut Chase) -> Result<(), End> {
        if Instant::now() < chase.ask {
            return Ok(());
        }
        let union = RequestUnion::ProgressRequest(WatchProgressRequest {});
        self.metrics.progress_requests.inc();
        // The stream may be stuck; that shows in the goal being missed.
        let request = WatchRequest { request_union: Some(union) };
        let _ = timeout(LONGEST_ASK, sender.send(&request)).await;
        chase.pause = (chase.pause * 2).min(LONGEST_ASK);
        chase.ask = Instant::now() + chase.pause;
        Ok(())
    }

    fn take_shown(&self, shown: &Shown) {
        self.confirm(shown.confirmed);
        if let Some((mark, present)) = shown.present {
            self.floor.trim(mark, present);
        }
    }
}

/// Asks something over the feed's own connection, when the connection `newest` has been opened. The answer shows that both
/// lead to the same server.
async fn ask_again(link: &Link, confirmed: ConnectionNumber) -> Result<Shown, End> {
    link.unary_raw(paths::RANGE, &serializable_question(), DEADLINE).await?;
    Ok(Shown { confirmed, present: None })
}

/// The same, and how far the cluster has got.
async fn ask_for_present(link: &Link, confirmed: ConnectionNumber, mark: Mark) -> Result<Shown, End> {
    let header = examine(link).await?;
    Ok(Shown { confirmed, present: Some((mark, Revision(header.revision))) })
}

/// The answer to a question, which is no longer under way then.
async fn answer<T>(asking: &mut Asking<'_, T>) -> Result<T, End> {
    let Some(question) = asking else { return pending().await };
    let answer = question.await;
    *asking = None;
    answer
}
