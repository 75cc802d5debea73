//! A Watch stream of one member, by etcd's rules.
//!
//! A watcher that starts in the past is behind until a round of catching up, up to 100 ms later, has brought it to the
//! member's present; then it is sent every revision as the member applies it. It may fall behind again. A request for progress
//! is answered only while nobody is behind, and never before the events. A watcher that is behind a compaction is cancelled.

use millpond::{
    proto::{
        etcdserverpb::{
            WatchCreateRequest, WatchRequest, WatchResponse, watch_create_request::FilterType,
            watch_request::RequestUnion,
        },
        mvccpb::{Event, event::EventType},
    },
    rules::KeyRange,
};
use tokio::{
    sync::mpsc::{Sender, error::TrySendError},
    time::{Instant, sleep_until},
};
use tonic::Streaming;

use super::server::Node;
use crate::dice::Dice;

/// The longest time until those who are behind are looked after: etcd's interval.
const ROUND: u64 = 100;
/// The most events that a watcher is sent in a round, but for the last revision's.
const STRETCH: usize = 40;

/// Responses that wait for a link; more than a simulation has.
pub const QUEUE: usize = 1 << 14;

struct Watcher {
    id: i64,
    range: KeyRange,
    /// The first revision that it has not been sent.
    next: i64,
    behind: bool,
    prev_kv: bool,
    filters: Vec<i32>,
}

impl Watcher {
    fn wants(&self, event: &Event) -> bool {
        let unwanted = if event.r#type() == EventType::Put { FilterType::Noput } else { FilterType::Nodelete };
        !self.filters.contains(&(unwanted as i32))
    }
}

struct Stream {
    node: Node,
    dice: Dice,
    watchers: Vec<Watcher>,
    next_id: i64,
    /// Up to here those who are not behind have been sent everything.
    told: i64,
    responses: Sender<Result<WatchResponse, tonic::Status>>,
}

/// Serves a stream until the client is gone, the member's process ends, or the leader that it `required` is missing.
pub async fn serve(
    node: Node,
    mut requests: Streaming<WatchRequest>,
    responses: Sender<Result<WatchResponse, tonic::Status>>,
    required: bool,
) {
    let (incarnation, told) = {
        let inner = node.cluster.look();
        (inner.members[node.at].incarnation, inner.standpoint(node.at).revision)
    };
    let (cluster, at) = (node.cluster.clone(), node.at);
    let mut dice = node.dice();
    let mut round = Instant::now() + dice.pause(ROUND);
    let mut stream = Stream { node, dice, watchers: Vec::new(), next_id: 0, told, responses: responses.clone() };
    let mut open = true;
    loop {
        let (told, any_behind) = (stream.told, stream.watchers.iter().any(|watcher| watcher.behind));
        tokio::select! {
            biased;
            status = cluster.ended(at, incarnation, required) => return drop(responses.try_send(Err(status.into()))),
            () = responses.closed() => return,
            _ = cluster.until(|inner| (inner.standpoint(at).revision > told).then_some(())) => stream.go_on(),
            request = requests.message(), if open => match request {
                Ok(Some(request)) => stream.take(request),
                Ok(None) => open = false,
                Err(_) => return,
            },
            () = sleep_until(round), if any_behind => {
                stream.catch_up();
                round = Instant::now() + stream.dice.pause(ROUND);
            }
        }
    }
}

impl Stream {
    fn take(&mut self, request: WatchRequest) {
        match request.request_union {
            Some(RequestUnion::CreateRequest(create)) => self.create(create),
            Some(RequestUnion::CancelRequest(cancel)) => {
                self.watchers.retain(|watcher| watcher.id != cancel.watch_id);
                self.send(self.told, WatchResponse { watch_id: cancel.watch_id, canceled: true, ..Default::default() });
            }
            Some(RequestUnion::ProgressRequest(_)) => {
                let has_all = |watcher: &Watcher| !watcher.behind && watcher.next <= self.told + 1;
                if !self.watchers.is_empty() && self.watchers.iter().all(has_all) {
                    self.send(self.told, WatchResponse { watch_id: -1, ..Default::default() });
                }
            }
            None => {}
        }
    }

    fn create(&mut self, create: WatchCreateRequest) {
        let (id, next) = (self.next_id, create.start_revision);
        self.next_id += 1;
        self.send(self.told, WatchResponse { watch_id: id, created: true, ..Default::default() });
        self.watchers.push(Watcher {
            id,
            range: KeyRange::from_request(&create.key, &create.range_end),
            next: if next > 0 { next } else { self.told + 1 },
            behind: next > 0 && next <= self.told,
            prev_kv: create.prev_kv,
            filters: create.filters,
        });
    }

    /// The member has applied more.
    fn go_on(&mut self) {
        let at = self.node.cluster.look().standpoint(self.node.at).revision;
        while self.told < at {
            self.told += 1;
            for index in 0..self.watchers.len() {
                let watcher = &mut self.watchers[index];
                if !watcher.behind && watcher.next <= self.told && self.dice.chance(self.node.manner.victims) {
                    watcher.behind = true;
                }
                if !watcher.behind && watcher.next <= self.told {
                    self.bring(index, self.told, self.told);
                }
            }
        }
    }

    /// A round of catching up.
    fn catch_up(&mut self) {
        let compacted = self.node.cluster.look().standpoint(self.node.at).compacted;
        for index in 0..self.watchers.len() {
            let watcher = &self.watchers[index];
            if !watcher.behind {
                continue;
            }
            let (id, next) = (watcher.id, watcher.next);
            if next < compacted {
                let compact_revision = compacted;
                self.send(0, WatchResponse { watch_id: id, canceled: true, compact_revision, ..Default::default() });
            } else {
                let to = self.reach(index);
                self.bring(index, to, self.told);
                self.watchers[index].behind = to < self.told;
            }
        }
        self.watchers.retain(|watcher| !watcher.behind || watcher.next >= compacted);
    }

    /// How far a watcher gets in this round.
    fn reach(&mut self, index: usize) -> i64 {
        let (watcher, stretch) = (&self.watchers[index], self.dice.below(STRETCH));
        let inner = self.node.cluster.look();
        let mut events = inner.history().events_in(&watcher.range, watcher.next, self.told);
        let last = events.nth(stretch).and_then(|event| event.kv.as_ref());
        last.map_or(self.told, |kv| kv.mod_revision)
    }

    /// Sends a watcher everything up to `to`, in a response at `revision`.
    fn bring(&mut self, index: usize, to: i64, revision: i64) {
        let watcher = &mut self.watchers[index];
        let first = std::mem::replace(&mut watcher.next, to + 1);
        let inner = self.node.cluster.look();
        let compacted = inner.standpoint(self.node.at).compacted;
        let seen = |event: &Event| {
            let before = event.kv.as_ref().map_or(0, |kv| kv.mod_revision - 1);
            let told = watcher.prev_kv && before >= compacted;
            Event { prev_kv: event.prev_kv.clone().filter(|_| told), ..event.clone() }
        };
        let events = inner.history().events_in(&watcher.range, first, to);
        let events: Vec<Event> = events.filter(|event| watcher.wants(event)).map(seen).collect();
        drop(inner);
        if events.is_empty() {
            return;
        }
        let watch_id = watcher.id;
        self.send(revision, WatchResponse { watch_id, events, ..Default::default() });
    }

    fn send(&self, revision: i64, response: WatchResponse) {
        let mut header = self.node.cluster.look().header(self.node.at, revision);
        header.revision = revision;
        let sent = self.responses.try_send(Ok(WatchResponse { header: Some(header), ..response }));
        // A client that has gone is noticed by the loop.
        assert!(!matches!(sent, Err(TrySendError::Full(_))), "the queue holds all that a simulation can say");
    }
}
