//! One Watch stream after another to the same server, with watchers that come, go, and survive the streams.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use millpond::proto::etcdserverpb::{
    WatchCancelRequest, WatchProgressRequest, WatchRequest, WatchResponse, watch_request::RequestUnion,
};
use tokio::{sync::mpsc, time::sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::{
    super::{
        context::{Context, Knowledge, Stage},
        record::Target,
    },
    watcher::Watcher,
};
use crate::support::{client::Client, random::Generator};

/// The most watchers on a stream.
const WATCHERS: usize = 5;

struct Session {
    worker: usize,
    target: Target,
    context: Arc<Context>,
    client: Client,
    random: Generator,
    /// By a number that is never used again.
    watchers: HashMap<u64, Watcher>,
    numbers: u64,
}

/// One stream, while it is open.
struct Open {
    requests: mpsc::Sender<WatchRequest>,
    /// Creates that have been sent and not been answered, in their order.
    pending: VecDeque<u64>,
    /// What the server tells its clients while the stream is open.
    knowledge: Option<Knowledge>,
    /// Whether it asks for progress only when every request for it has been answered, while everybody works.
    patient: bool,
    /// What was known at each request for progress that may be unanswered, in their order.
    asked: VecDeque<i64>,
}

/// Watches until the run is over.
pub async fn run(worker: usize, target: Target, context: Arc<Context>) {
    let client = Client::new(context.endpoint(target));
    let random = Generator::new(context.seed_of(worker));
    let mut session = Session { worker, target, context, client, random, watchers: HashMap::new(), numbers: 0 };
    let mut stage = session.context.stage.subscribe();
    let watching = async {
        loop {
            session.stream().await;
            sleep(Duration::from_millis(20 + session.random.below(80) as u64)).await;
        }
    };
    tokio::select! {
        _ = stage.wait_for(|stage| *stage == Stage::Over) => {}
        () = watching => {}
    }
}

impl Session {
    /// Opens a stream, puts the watchers on it and works until it ends.
    async fn stream(&mut self) {
        for watcher in self.watchers.values_mut() {
            watcher.disconnect();
            if watcher.is_outlived(&self.context) {
                watcher.end();
            }
        }
        self.sweep();
        let (requests, outgoing) = mpsc::channel(1024);
        let patient = self.random.chance(2);
        let mut open = Open { requests, pending: VecDeque::new(), knowledge: None, patient, asked: VecDeque::new() };
        let mut numbers: Vec<u64> = self.watchers.keys().copied().collect();
        numbers.sort_unstable();
        numbers.into_iter().for_each(|number| self.create(&mut open, number));
        if self.watchers.is_empty() && !self.add(&mut open) {
            return;
        }
        let opened = self.client.watch.clone().watch(ReceiverStream::new(outgoing)).await;
        let end = match opened {
            Ok(answer) => self.follow(&mut open, answer.into_inner()).await,
            Err(status) => Some(status),
        };
        if let Some(status) = end.filter(|status| !is_survived(status)) {
            let how = format!("the stream ended with {status:?}, after which etcd's own client does not resume");
            self.watchers.values().for_each(|watcher| watcher.kill(&self.context, how.clone()));
        }
    }

    /// Takes responses and stirs now and then, until the stream ends. None: at our own will.
    async fn follow(&mut self, open: &mut Open, mut responses: Streaming<WatchResponse>) -> Option<Status> {
        let mut stir = Box::pin(sleep(self.until_stir()));
        loop {
            tokio::select! {
                response = responses.message() => match response {
                    Ok(Some(response)) => self.take(open, response),
                    Ok(None) => return None,
                    Err(status) => return Some(status),
                },
                () = &mut stir => {
                    if !self.stir(open) {
                        return None;
                    }
                    stir = Box::pin(sleep(self.until_stir()));
                }
            }
        }
    }

    fn until_stir(&mut self) -> Duration {
        Duration::from_millis(10 + self.random.below(250) as u64)
    }

    /// Does something at random. False: leaves the stream.
    fn stir(&mut self, open: &mut Open) -> bool {
        if !self.context.works() {
            self.ask(open);
            return true;
        }
        match self.random.below(12) {
            0..4 => drop(self.add(open)),
            4 => self.cancel(open),
            5 => return self.random.below(3) > 0,
            6..10 => self.ask(open),
            _ => {}
        }
        true
    }

    fn ask(&self, open: &mut Open) {
        if open.patient && !open.asked.is_empty() && self.context.works() {
            return;
        }
        let knowledge = open.knowledge.as_mut().filter(|_| self.context.timeline.era() == 0);
        open.asked.push_back(knowledge.map_or(0, |knowledge| self.context.known(knowledge)));
        self.send(open, RequestUnion::ProgressRequest(WatchProgressRequest {}));
    }

    /// The answer to one request for progress or to several in a row. Which ones it answers is not to be seen: a request
    /// may know of more than its sender does, and then its answer comes after later requests have been sent. The first one
    /// that was open is among them, so that as many are answered as answers have come, at least; of a patient stream, all.
    /// Another history may have less than was known.
    fn take_progress(&mut self, open: &mut Open, revision: i64) {
        let least = open.asked.pop_front().filter(|_| self.context.timeline.era() == 0);
        for watcher in self.watchers.values_mut().filter(|watcher| watcher.id.is_some()) {
            watcher.progress(&self.context, revision);
            if let Some(known) = least.filter(|known| *known > revision) {
                watcher.short(&self.context, revision, known);
            }
        }
    }

    fn add(&mut self, open: &mut Open) -> bool {
        if self.watchers.len() >= WATCHERS || !self.context.works() || self.context.timeline.is_closed() {
            return false;
        }
        self.numbers += 1;
        let watcher = Watcher::random(self.worker, self.target, &self.context, &mut self.random);
        self.watchers.insert(self.numbers, watcher);
        self.create(open, self.numbers);
        true
    }

    fn create(&mut self, open: &mut Open, number: u64) {
        let request = self.watchers[&number].create_request();
        open.pending.push_back(number);
        self.send(open, RequestUnion::CreateRequest(request));
    }

    fn cancel(&mut self, open: &mut Open) {
        let mut running: Vec<u64> = self.watchers.keys().copied().collect();
        running.sort_unstable();
        if running.is_empty() {
            return;
        }
        let number = self.random.pick(&running);
        let Some(watcher) = self.watchers.get_mut(&number) else { return };
        if let Some(watch_id) = watcher.id {
            watcher.cancelling = true;
            self.send(open, RequestUnion::CancelRequest(WatchCancelRequest { watch_id }));
        }
    }

    fn send(&self, open: &Open, request: RequestUnion) {
        // A server that takes nothing more shows that at the other end of the stream.
        let _ = open.requests.try_send(WatchRequest { request_union: Some(request) });
    }

    fn take(&mut self, open: &mut Open, response: WatchResponse) {
        if response.created {
            open.knowledge.get_or_insert_with(|| self.context.knowledge(self.target));
            let number = open.pending.pop_front().expect("as many are created as were asked for");
            if let Some(watcher) = self.watchers.get_mut(&number) {
                watcher.created(&self.context, &response);
            }
        } else if response.watch_id == -1 && matches!(self.target, Target::Etcd(_)) {
            // In etcd an answer for the watchers that were there can be overtaken by the `created` of a newer one that still
            // catches up. Whether an answer is true for that one cannot be known, and etcd is not under test.
        } else if response.watch_id == -1 {
            self.take_progress(open, response.header.map_or(0, |header| header.revision));
        } else if let Some(watcher) = self.watchers.values_mut().find(|one| one.id == Some(response.watch_id)) {
            let (watch_id, compacted) = (response.watch_id, response.compact_revision > 0);
            watcher.take(&self.context, response);
            if compacted {
                // As etcd's own client does: the id is free again only then.
                self.send(open, RequestUnion::CancelRequest(WatchCancelRequest { watch_id }));
            }
        }
        self.sweep();
    }

    fn sweep(&mut self) {
        self.watchers.retain(|_, watcher| !watcher.is_over());
    }
}

/// Whether the watchers of etcd's Go client survive this. Unknown and Cancelled are what our own client makes of a
/// connection that breaks.
fn is_survived(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Internal | Code::Unknown | Code::Cancelled)
}
