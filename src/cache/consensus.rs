//! How far has the cluster got? Proof comes only from an answer that went through consensus, and only for readers that
//! arrived before its request was sent. Readers that wait together share one answer.
//!
//! Every reader draws a ticket when it arrives, and every request that may serve as proof draws one just before it is sent.
//! An answer serves the readers whose tickets are lower than its request's. Readers have no timers of their own: whoever has waited
//! for too long is sent away by the one who asks.

use std::{
    collections::VecDeque,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, oneshot},
    task::AbortHandle,
    time::{Instant, sleep, timeout},
};
use tracing::debug;

use super::Metrics;
use crate::{
    proto::etcdserverpb::{RangeRequest, RangeResponse, ResponseHeader},
    status::Status,
    store::{Responder, Revision},
    upstream::{ConnectionNumber, EndpointId, Upstream},
};

/// After which a question is put to another endpoint.
const DEADLINE: Duration = Duration::from_millis(500);
/// The longest pause while no endpoint answers.
const LONGEST_PAUSE: Duration = Duration::from_millis(250);
/// How often in a reader's patience those who have none left are looked for.
const LOOKS: u32 = 16;
/// How long a question may be held back while readers gather, unless a round trip takes longer.
const GATHERING: Duration = Duration::from_millis(1);

/// A point in the order of arrivals and departures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(u64);

/// What an answer that went through consensus has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proof {
    /// Who said so.
    pub responder: Responder,
    /// The cluster had got at least here when the request was sent.
    pub revision: Revision,
    /// Over which connection that was heard.
    pub connection: ConnectionNumber,
}

impl Proof {
    /// The proof in a header; none if the header is incomplete.
    pub fn of(header: &ResponseHeader, connection: ConnectionNumber) -> Option<Self> {
        let complete = header.cluster_id != 0 && header.revision > 0;
        complete.then(|| Self { responder: header.into(), revision: Revision(header.revision), connection })
    }
}

/// Readers that wait for proof, and the one who asks for them.
pub struct Consensus {
    waiting: Arc<Waiting>,
    asker: AbortHandle,
}

struct Waiting {
    clock: AtomicU64,
    readers: Mutex<Readers>,
    gathered: Notify,
    metrics: Metrics,
}

#[derive(Default)]
struct Readers {
    queue: VecDeque<(Stamp, oneshot::Sender<Proof>)>,
    /// How many of them the asker waits for; none: it is busy, and will look by itself.
    awaited: Option<usize>,
}

impl Consensus {
    /// `patience` is how long a reader waits at most.
    pub(super) fn start(upstream: Upstream, patience: Duration, metrics: Metrics) -> Self {
        let waiting =
            Arc::new(Waiting { clock: AtomicU64::new(0), readers: Mutex::default(), gathered: Notify::new(), metrics });
        let asker = Asker {
            waiting: waiting.clone(),
            upstream,
            patience,
            marks: VecDeque::new(),
            last: 0,
            round_trip: Duration::ZERO,
        };
        Self { waiting, asker: tokio::spawn(asker.run()).abort_handle() }
    }

    /// To be drawn before a request is sent whose answer is to be [`noted`](Consensus::note).
    pub fn stamp(&self) -> Stamp {
        self.waiting.stamp()
    }

    /// Notes what the answer to a request that was sent at `sent` has shown. The request went through consensus.
    pub fn note(&self, sent: Stamp, proof: Proof) {
        self.waiting.note(sent, proof);
    }

    /// Waits for the proof of a request sent after this call. None when patience has run out.
    pub async fn ask(&self) -> Option<Proof> {
        self.waiting.metrics.readers.inc();
        self.waiting.enter().await.ok()
    }

    /// As [`Consensus::ask`], for as long as it takes.
    pub async fn ask_on(&self) -> Proof {
        loop {
            if let Some(proof) = self.ask().await {
                return proof;
            }
        }
    }
}

impl Drop for Consensus {
    fn drop(&mut self) {
        self.asker.abort();
    }
}

impl Waiting {
    fn stamp(&self) -> Stamp {
        Stamp(self.clock.fetch_add(1, Ordering::SeqCst))
    }

    fn enter(&self) -> oneshot::Receiver<Proof> {
        let (sender, receiver) = oneshot::channel();
        let mut readers = self.readers.lock();
        // Drawn under the lock, so that the queue is in the order of the tickets.
        let stamp = self.stamp();
        readers.queue.push_back((stamp, sender));
        let waiting = readers.queue.len();
        let enough = readers.awaited.take_if(|awaited| waiting >= *awaited);
        drop(readers);
        if enough.is_some() {
            self.gathered.notify_one();
        }
        receiver
    }

    fn note(&self, sent: Stamp, proof: Proof) {
        let mut readers = self.readers.lock();
        let served = readers.queue.partition_point(|(arrived, _)| *arrived < sent);
        let served: Vec<_> = readers.queue.drain(..served).collect();
        drop(readers);
        for (_, reader) in served {
            // A reader that has gone meanwhile needs no answer.
            let _ = reader.send(proof);
        }
    }

    /// Sends away who came before `mark`.
    fn send_away(&self, mark: Stamp) {
        let mut readers = self.readers.lock();
        let gone = readers.queue.partition_point(|(arrived, _)| *arrived < mark);
        readers.queue.drain(..gone);
    }

    /// How many readers wait who have not gone meanwhile.
    fn count(&self) -> usize {
        self.readers.lock().count()
    }

    /// Waits until so many readers wait.
    async fn gather(&self, awaited: usize) {
        let is_short = |readers: &mut Readers| {
            let short = readers.count() < awaited;
            readers.awaited = short.then_some(awaited);
            short
        };
        while is_short(&mut self.readers.lock()) {
            self.gathered.notified().await;
        }
    }
}

impl Readers {
    fn count(&mut self) -> usize {
        while self.queue.front().is_some_and(|(_, reader)| reader.is_closed()) {
            self.queue.pop_front();
        }
        self.queue.len()
    }
}

/// Puts one question at a time.
struct Asker {
    waiting: Arc<Waiting>,
    upstream: Upstream,
    patience: Duration,
    /// When which tickets had been drawn, while no answer came.
    marks: VecDeque<(Instant, Stamp)>,
    /// How many readers the last question was put for.
    last: usize,
    round_trip: Duration,
}

impl Asker {
    async fn run(mut self) {
        loop {
            self.waiting.gather(1).await;
            self.gather().await;
            self.last = self.waiting.count();
            self.put().await;
        }
    }

    /// While readers came in crowds, lets the next crowd gather: until it is as large as the last, or for a round trip. A
    /// lone reader is not kept waiting.
    async fn gather(&self) {
        if self.last <= 1 {
            return;
        }
        let _ = timeout(self.round_trip.max(GATHERING), self.waiting.gather(self.last)).await;
        self.waiting.readers.lock().awaited = None;
    }

    /// Puts a question until some endpoint answers it, or nobody waits any more.
    async fn put(&mut self) {
        let mut failed = Vec::new();
        let mut pause = Duration::from_millis(10);
        self.marks.clear();
        while self.waiting.count() > 0 {
            self.look_at_the_clock();
            let Some(at) = self.upstream.preferred(&failed) else {
                failed.clear();
                sleep(pause.min(self.patience / LOOKS)).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
                continue;
            };
            let (sent, began) = (self.waiting.stamp(), Instant::now());
            match self.question_watching_the_clock(at).await {
                Ok(proof) => {
                    self.round_trip = began.elapsed();
                    self.waiting.metrics.seconds.observe(self.round_trip.as_secs_f64());
                    self.waiting.metrics.questions.with_label_values(&["answered"]).inc();
                    return self.waiting.note(sent, proof);
                }
                Err(status) => {
                    self.waiting.metrics.questions.with_label_values(&["failed"]).inc();
                    debug!(endpoint = self.upstream.name(at), %status, "a consensus question was not answered");
                    failed.push(at);
                }
            }
        }
    }

    async fn question_watching_the_clock(&mut self, at: EndpointId) -> Result<Proof, Status> {
        let mut question = pin!(question(self.upstream.clone(), at));
        loop {
            tokio::select! {
                answer = &mut question => return answer,
                () = sleep(self.patience / LOOKS) => self.look_at_the_clock(),
            }
        }
    }

    /// Sends away who has waited for too long.
    fn look_at_the_clock(&mut self) {
        self.marks.push_back((Instant::now(), self.waiting.stamp()));
        let over = self.marks.partition_point(|(drawn, _)| drawn.elapsed() >= self.patience);
        if let Some((_, mark)) = self.marks.drain(..over).next_back() {
            self.waiting.send_away(mark);
        }
    }
}

async fn question(upstream: Upstream, at: EndpointId) -> Result<Proof, Status> {
    let question = RangeRequest { key: Bytes::from_static(&[0]), limit: 1, count_only: true, ..Default::default() };
    let asked = upstream.unary_numbered(at, "/etcdserverpb.KV/Range", &question, DEADLINE);
    let (answer, connection): (RangeResponse, _) = asked.await?;
    let proof = answer.header.as_ref().and_then(|header| Proof::of(header, connection));
    proof.ok_or_else(|| Status::unavailable("an answer without a cluster or a revision"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting() -> Waiting {
        let metrics = Metrics::register(&prometheus::Registry::new()).unwrap();
        Waiting { clock: AtomicU64::new(0), readers: Mutex::default(), gathered: Notify::new(), metrics }
    }

    const CONNECTION: ConnectionNumber = ConnectionNumber(1);
    const PROOF: Proof = Proof {
        responder: Responder { cluster_id: 1, member_id: 2, raft_term: 3 },
        revision: Revision(9),
        connection: CONNECTION,
    };

    #[test]
    fn an_answer_serves_only_those_who_came_before_its_request_was_sent() {
        let waiting = waiting();
        let mut early = waiting.enter();
        let sent = waiting.stamp();
        let mut late = waiting.enter();
        waiting.note(sent, PROOF);
        assert_eq!(early.try_recv(), Ok(PROOF));
        assert!(late.try_recv().is_err());
        waiting.note(waiting.stamp(), PROOF);
        assert_eq!(late.try_recv(), Ok(PROOF));
    }

    #[test]
    fn readers_who_have_gone_are_not_counted() {
        let waiting = waiting();
        let gone = waiting.enter();
        assert_eq!(waiting.count(), 1);
        drop(gone);
        assert_eq!(waiting.count(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_is_awaited_and_a_busy_asker_is_not_disturbed() {
        let waiting = waiting();
        let mut readers = vec![waiting.enter(), waiting.enter()];
        let short = timeout(GATHERING, waiting.gather(3)).await;
        assert!(short.is_err());
        readers.push(waiting.enter());
        timeout(GATHERING, waiting.gather(3)).await.unwrap();
        readers.push(waiting.enter());
        assert_eq!(waiting.readers.lock().awaited, None);
        drop(readers);
        assert!(timeout(GATHERING, waiting.gather(1)).await.is_err(), "who has gone is not waited with");
    }

    #[tokio::test(start_paused = true)]
    async fn patience_runs_out_where_nobody_answers() {
        const PATIENCE: Duration = Duration::from_secs(7);
        let registry = prometheus::Registry::new();
        let nobody = crate::upstream::Settings::new(vec!["127.0.0.1:1".parse().unwrap()]);
        let upstream = Upstream::start(nobody, &registry).unwrap();
        let consensus = Consensus::start(upstream, PATIENCE, Metrics::register(&registry).unwrap());
        let later = async {
            sleep(PATIENCE / 2).await;
            let began = Instant::now();
            (consensus.ask().await, began.elapsed())
        };
        let began = Instant::now();
        let ((early, waited), (late, waited_later)) =
            tokio::join!(async { (consensus.ask().await, began.elapsed()) }, later);
        assert_eq!((early, late), (None, None));
        for waited in [waited, waited_later] {
            assert!((PATIENCE..PATIENCE * 5 / 4).contains(&waited), "{waited:?}");
        }
        assert!(timeout(PATIENCE * 3, consensus.ask_on()).await.is_err());
    }

    #[test]
    fn a_header_without_cluster_or_revision_proves_nothing() {
        let header = ResponseHeader { cluster_id: 1, revision: 2, ..Default::default() };
        assert!(Proof::of(&header, CONNECTION).is_some());
        assert!(Proof::of(&ResponseHeader { cluster_id: 0, ..header }, CONNECTION).is_none());
        assert!(Proof::of(&ResponseHeader { revision: 0, ..header }, CONNECTION).is_none());
    }
}
