//! How far has the cluster got? Proof comes only from an answer that went through consensus, and only for readers that
//! arrived before its request was sent. Readers that wait together share one answer.
//!
//! Every reader draws a ticket when it arrives, and every request that may serve as proof draws one just before it is sent.
//! An answer serves the readers whose tickets are lower than its request's. Readers have no timers of their own: whoever has waited
//! for too long is sent away by the one who asks ([`asker`]), who also finds out what has been compacted where we do not see it.

mod asker;

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, oneshot},
    task::AbortHandle,
    time::Instant,
};

use self::asker::Asker;
use super::{Metrics, Prefix};
use crate::{
    proto::etcdserverpb::ResponseHeader,
    store::{Responder, Revision},
    upstream::{ConnectionNumber, Upstream},
};

/// How long it is held against the cluster that it has not answered. Longer than the asker takes to find that it still does not.
const MEMORY: Duration = Duration::from_secs(5);

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

/// When a read looks at the keys, and so what a proof has to show for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tense {
    /// How far the cluster has got.
    Present,
    /// That, and that we know of all compactions that concern what is in memory.
    Past,
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

/// One that waits.
struct Reader {
    arrived: Stamp,
    tense: Tense,
    sender: oneshot::Sender<Proof>,
}

#[derive(Default)]
struct Readers {
    queue: VecDeque<Reader>,
    /// How many of them the asker waits for; none: it is busy, and will look by itself.
    awaited: Option<usize>,
    /// When a question was last without an answer, if readers were sent away and there was no answer since.
    unanswered: Option<Instant>,
}

impl Consensus {
    /// `patience` is how long a reader waits at most; `prefixes` is what compactions concern.
    pub(super) fn start(upstream: Upstream, prefixes: Arc<[Prefix]>, patience: Duration, metrics: Metrics) -> Self {
        let waiting =
            Arc::new(Waiting { clock: AtomicU64::new(0), readers: Mutex::default(), gathered: Notify::new(), metrics });
        let vital = upstream.vital().clone();
        let asker = Asker::new(waiting.clone(), upstream, prefixes, patience);
        Self { waiting, asker: vital.spawn("asker", asker.run()) }
    }

    /// To be drawn before a request is sent whose answer is to be [`noted`](Consensus::note).
    pub fn stamp(&self) -> Stamp {
        self.waiting.stamp()
    }

    /// Notes what the answer to a request that was sent at `sent` has shown. The request went through consensus.
    pub fn note(&self, sent: Stamp, proof: Proof) {
        self.waiting.note(sent, proof, Tense::Present);
    }

    /// Whether a reader's patience has run out not long ago, and nothing has been answered since.
    pub fn is_unanswered(&self) -> bool {
        self.waiting.is_unanswered()
    }

    /// Waits for the proof of a request sent after this call. None when patience has run out, or authentication is coming on.
    pub async fn ask(&self, tense: Tense) -> Option<Proof> {
        self.waiting.metrics.readers.inc();
        self.waiting.enter(tense).await.ok()
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

    fn enter(&self, tense: Tense) -> oneshot::Receiver<Proof> {
        let (sender, receiver) = oneshot::channel();
        let mut readers = self.readers.lock();
        // Drawn under the lock, so that the queue is in the order of the tickets.
        let arrived = self.stamp();
        readers.queue.push_back(Reader { arrived, tense, sender });
        let waiting = readers.queue.len();
        let enough = readers.awaited.take_if(|awaited| waiting >= *awaited);
        drop(readers);
        if enough.is_some() {
            self.gathered.notify_one();
        }
        receiver
    }

    fn note(&self, sent: Stamp, proof: Proof, shown: Tense) {
        let mut readers = self.readers.lock();
        readers.unanswered = None;
        let early = readers.early(sent);
        let (served, left): (Vec<_>, Vec<_>) = readers.queue.drain(..early).partition(|reader| reader.tense <= shown);
        left.into_iter().rev().for_each(|reader| readers.queue.push_front(reader));
        drop(readers);
        for reader in served {
            // A reader that has gone meanwhile needs no answer.
            let _ = reader.sender.send(proof);
        }
    }

    /// Sends away who came before `mark`.
    fn send_away(&self, mark: Stamp) {
        let mut readers = self.readers.lock();
        let gone = readers.early(mark);
        // Who reads the past may have waited in vain for more than an answer.
        let in_vain = readers.queue.drain(..gone).filter(|reader| reader.tense == Tense::Present).count();
        if in_vain > 0 {
            readers.unanswered = Some(Instant::now());
        }
    }

    /// Notes that a question was not answered. Of a cluster that does answer, that says little.
    fn note_failure(&self) {
        if let Some(last) = &mut self.readers.lock().unanswered {
            *last = Instant::now();
        }
    }

    fn is_unanswered(&self) -> bool {
        self.readers.lock().unanswered.is_some_and(|last| last.elapsed() < MEMORY)
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
    /// How many came before `mark`.
    fn early(&self, mark: Stamp) -> usize {
        self.queue.partition_point(|reader| reader.arrived < mark)
    }

    fn count(&mut self) -> usize {
        while self.queue.front().is_some_and(|reader| reader.sender.is_closed()) {
            self.queue.pop_front();
        }
        self.queue.len()
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{sleep, timeout};

    use super::{asker::GATHERING, *};

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
        let mut early = waiting.enter(Tense::Present);
        let sent = waiting.stamp();
        let mut late = waiting.enter(Tense::Present);
        waiting.note(sent, PROOF, Tense::Past);
        assert_eq!(early.try_recv(), Ok(PROOF));
        assert!(late.try_recv().is_err());
        waiting.note(waiting.stamp(), PROOF, Tense::Present);
        assert_eq!(late.try_recv(), Ok(PROOF));
    }

    #[test]
    fn who_reads_the_past_waits_for_an_answer_that_shows_it() {
        let waiting = waiting();
        let mut readers = [Tense::Past, Tense::Present, Tense::Past].map(|tense| waiting.enter(tense));
        let mut served = |waiting: &Waiting, shown| {
            waiting.note(waiting.stamp(), PROOF, shown);
            readers.each_mut().map(|reader| reader.try_recv().is_ok())
        };
        assert_eq!(served(&waiting, Tense::Present), [false, true, false]);
        assert_eq!(waiting.count(), 2);
        let mut later = waiting.enter(Tense::Past);
        waiting.send_away(Stamp(0));
        assert_eq!(served(&waiting, Tense::Past), [true, false, true]);
        assert_eq!((later.try_recv(), waiting.count()), (Ok(PROOF), 0));
    }

    #[tokio::test(start_paused = true)]
    async fn that_nobody_answers_is_remembered_while_questions_fail_and_until_one_is_answered() {
        let waiting = waiting();
        waiting.note_failure();
        waiting.send_away(waiting.stamp());
        assert!(!waiting.is_unanswered(), "nobody has waited in vain");
        let in_vain = || {
            let _reader = waiting.enter(Tense::Present);
            waiting.send_away(waiting.stamp());
        };
        in_vain();
        for _ in 0..3 {
            sleep(MEMORY / 2).await;
            assert!(waiting.is_unanswered());
            waiting.note_failure();
        }
        sleep(MEMORY).await;
        assert!(!waiting.is_unanswered(), "that was long ago");
        in_vain();
        waiting.note(waiting.stamp(), PROOF, Tense::Present);
        waiting.note_failure();
        assert!(!waiting.is_unanswered());
    }

    #[test]
    fn readers_who_have_gone_are_not_counted() {
        let waiting = waiting();
        let gone = waiting.enter(Tense::Present);
        assert_eq!(waiting.count(), 1);
        drop(gone);
        assert_eq!(waiting.count(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_is_awaited_and_a_busy_asker_is_not_disturbed() {
        let waiting = waiting();
        let mut readers = vec![waiting.enter(Tense::Present), waiting.enter(Tense::Present)];
        let short = timeout(GATHERING, waiting.gather(3)).await;
        assert!(short.is_err());
        readers.push(waiting.enter(Tense::Present));
        timeout(GATHERING, waiting.gather(3)).await.unwrap();
        readers.push(waiting.enter(Tense::Present));
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
        let consensus = Consensus::start(upstream, Arc::new([]), PATIENCE, Metrics::register(&registry).unwrap());
        let later = async {
            sleep(PATIENCE / 2).await;
            let began = Instant::now();
            (consensus.ask(Tense::Present).await, began.elapsed())
        };
        let began = Instant::now();
        let ((early, waited), (late, waited_later)) =
            tokio::join!(async { (consensus.ask(Tense::Present).await, began.elapsed()) }, later);
        assert_eq!((early, late), (None, None));
        for waited in [waited, waited_later] {
            assert!((PATIENCE..PATIENCE * 5 / 4).contains(&waited), "{waited:?}");
        }
    }

    #[test]
    fn a_header_without_cluster_or_revision_proves_nothing() {
        let header = ResponseHeader { cluster_id: 1, revision: 2, ..Default::default() };
        assert!(Proof::of(&header, CONNECTION).is_some());
        assert!(Proof::of(&ResponseHeader { cluster_id: 0, ..header }, CONNECTION).is_none());
        assert!(Proof::of(&ResponseHeader { revision: 0, ..header }, CONNECTION).is_none());
    }
}
