//! Who puts the questions: one at a time, to one endpoint after another until one answers.
//!
//! A question is a Range at the oldest revision that memory still answers for. So its answer tells two things: how far the
//! cluster has got, and that nothing of what is in memory has been compacted, be it at etcd itself or through somebody else. If it
//! has, more questions find out up to where. While nobody asks, one is put now and then, for those who ask nobody: serializable
//! reads, watchers that begin in the past, and watchers of what is quiet.

use std::{collections::VecDeque, pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;
use tracing::{debug, info};

use super::{Proof, Stamp, Tense, Waiting};
use crate::{
    cache::Prefix,
    feed::Phase,
    proto::{
        etcdserverpb::{RangeRequest, RangeResponse},
        paths,
    },
    status::Status,
    store::{Position, Revision},
    upstream::{EndpointId, Upstream, refuses_strangers},
};

/// After which a question is put to another endpoint, unless answers are known to take longer.
const DEADLINE: Duration = Duration::from_millis(500);
/// However long they are known to take: who has stopped is not to be waited for.
const LONGEST_DEADLINE: Duration = Duration::from_secs(2);
/// The longest pause while no endpoint answers.
const LONGEST_PAUSE: Duration = Duration::from_millis(250);
/// How often in a reader's patience those who have none left are looked for.
const LOOKS: u32 = 16;
/// How long a question may be held back while readers gather, unless a round trip takes longer.
pub(super) const GATHERING: Duration = Duration::from_millis(1);
/// Questions that are put at once to find a compaction: a window of a million revisions takes seven rounds.
const AT_ONCE: i64 = 8;
/// How long nobody asks before a question is put for those who do not, and how long a quiet view may stay behind.
const SILENCE: Duration = Duration::from_secs(1);

const CONTRADICTION: Status = Status::fixed(Code::Unavailable, "a compaction above all revisions");

pub(super) struct Asker {
    waiting: Arc<Waiting>,
    upstream: Upstream,
    prefixes: Arc<[Prefix]>,
    patience: Duration,
    /// When which tickets had been drawn, while no answer came.
    marks: VecDeque<(Instant, Stamp)>,
    /// How many readers the last question was put for.
    last: usize,
    round_trip: Duration,
    /// When views were brought to the present last.
    led: Option<Instant>,
}

impl Asker {
    pub(super) fn new(waiting: Arc<Waiting>, upstream: Upstream, prefixes: Arc<[Prefix]>, patience: Duration) -> Self {
        let (marks, last, round_trip) = (VecDeque::new(), 0, Duration::ZERO);
        Self { waiting, upstream, prefixes, patience, marks, last, round_trip, led: None }
    }

    pub(super) async fn run(mut self) {
        loop {
            self.wait().await;
            self.gather().await;
            self.last = self.waiting.count();
            self.put().await;
        }
    }

    /// Waits for a reader.
    async fn wait(&mut self) {
        let waiting = self.waiting.clone();
        let mut reader = pin!(waiting.gather(1));
        loop {
            let look = async {
                sleep(SILENCE).await;
                self.look_back().await;
            };
            tokio::select! {
                biased;
                () = &mut reader => return,
                () = look => {}
            }
        }
    }

    /// Puts a question for those who ask nobody.
    async fn look_back(&mut self) {
        if self.prefixes.iter().all(|prefix| prefix.phase() != Phase::Live) {
            return;
        }
        let Some(at) = self.upstream.preferred(&[]) else { return };
        // Nobody waits for the answer.
        if let Err(status) = self.look(at, LONGEST_DEADLINE).await {
            self.waiting.note_failure();
            debug!(endpoint = self.upstream.name(at), %status, "whether there was a compaction is not known");
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
        let mut deadline = (self.round_trip * 2).clamp(DEADLINE, LONGEST_DEADLINE);
        self.marks.clear();
        while self.waiting.count() > 0 {
            self.look_at_the_clock();
            let Some(at) = self.upstream.preferred(&failed) else {
                // Perhaps nobody is gone, and all are slow.
                if !failed.is_empty() {
                    deadline = (deadline * 2).min(self.patience.max(DEADLINE));
                }
                failed.clear();
                sleep(pause.min(self.patience / LOOKS)).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
                continue;
            };
            match self.look(at, deadline).await {
                Ok(()) => return,
                Err(status) => {
                    self.waiting.note_failure();
                    self.waiting.metrics.questions.with_label_values(&["failed"]).inc();
                    debug!(endpoint = self.upstream.name(at), %status, "a consensus question was not answered");
                    if refuses_strangers(&status) {
                        drop(self.upstream.suspect_auth());
                        return self.waiting.send_away(self.waiting.stamp());
                    }
                    failed.push(at);
                }
            }
        }
    }

    /// Asks how far the cluster has got, and whether it has been compacted above the oldest revision in memory. Nobody is
    /// answered before it is known up to where: etcd's clients take it that who has read through consensus knows of it.
    async fn look(&mut self, at: EndpointId, deadline: Duration) -> Result<(), Status> {
        loop {
            let sent = self.waiting.stamp();
            let kept: Vec<Option<Position>> = self.prefixes.iter().map(Prefix::oldest).collect();
            let oldest = kept.iter().flatten().map(|oldest| oldest.revision).min().unwrap_or_default();
            match self.ask(sent, at, oldest, deadline).await {
                Err(status) if status == Status::COMPACTED => {
                    let finding = find_compaction(self.upstream.clone(), at, oldest, deadline);
                    let revision = self.watching_the_clock(finding).await?;
                    info!(%revision, "the cluster has been compacted");
                    // A view shows a compaction when it has got to it.
                    self.led = None;
                    self.each_kept(&kept, |prefix, kept| prefix.note_compaction(Position { revision, ..kept }));
                }
                // Another history has taken the place of the one in memory. Its revision tells readers so.
                Err(status) if status == Status::FUTURE_REVISION => {
                    return self.ask(sent, at, Revision::ZERO, deadline).await.map(drop);
                }
                answer => return answer.map(|present| self.lead(&kept, present)),
            }
        }
    }

    /// Has views brought to `present` now and then. Those of quiet prefixes stay behind otherwise, and so would what their watchers are
    /// told of progress, and the revision that their feeds go on from when they have lost the upstream.
    fn lead(&mut self, kept: &[Option<Position>], present: Revision) {
        let is_due = self.led.is_none_or(|led| led.elapsed() >= SILENCE);
        if !is_due || !self.upstream.gate().progress_is_proof {
            return;
        }
        self.led = Some(Instant::now());
        self.each_kept(kept, |prefix, kept| prefix.lead(Position { revision: present, ..kept }));
    }

    /// The prefixes in which something was kept when the question was put, with what that was: an answer is of no other history.
    fn each_kept(&self, kept: &[Option<Position>], tell: impl Fn(&Prefix, Position)) {
        let known = self.prefixes.iter().zip(kept).filter_map(|(prefix, kept)| kept.map(|kept| (prefix, kept)));
        known.for_each(|(prefix, kept)| tell(prefix, kept));
    }

    /// Puts one question, at `revision` or at the present, and tells the readers whom the answer serves: those who came before
    /// `sent`. Gives the present.
    async fn ask(
        &mut self,
        sent: Stamp,
        at: EndpointId,
        revision: Revision,
        deadline: Duration,
    ) -> Result<Revision, Status> {
        let began = Instant::now();
        let asking = question(self.upstream.clone(), at, revision, deadline);
        let proof = self.watching_the_clock(asking).await?;
        self.round_trip = began.elapsed();
        self.waiting.metrics.seconds.observe(self.round_trip.as_secs_f64());
        self.waiting.metrics.questions.with_label_values(&["answered"]).inc();
        self.waiting.note(sent, proof, Tense::Past);
        Ok(proof.revision)
    }

    async fn watching_the_clock<T>(&mut self, asking: impl Future<Output = T>) -> T {
        let mut asking = pin!(asking);
        loop {
            tokio::select! {
                answer = &mut asking => return answer,
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

/// Finds the compaction that has taken the revision `taken`: the lowest revision that can still be read.
async fn find_compaction(
    upstream: Upstream,
    at: EndpointId,
    mut taken: Revision,
    deadline: Duration,
) -> Result<Revision, Status> {
    let question = |revision| question(upstream.clone(), at, revision, deadline);
    let mut left = question(Revision::ZERO).await?.revision;
    if left <= taken {
        return Err(CONTRADICTION);
    }
    while taken.next() < left {
        let step = ((left.0 - taken.0) / (AT_ONCE + 1)).max(1);
        let between = (1..=AT_ONCE).map(|number| Revision(taken.0 + number * step)).take_while(|middle| *middle < left);
        let asking = between.map(async |middle| (middle, question(middle).await));
        for (middle, answer) in join_all(asking).await {
            match answer {
                Ok(_) => left = left.min(middle),
                Err(status) if status == Status::COMPACTED => taken = taken.max(middle),
                Err(status) => return Err(status),
            }
        }
    }
    Ok(left)
}

async fn question(upstream: Upstream, at: EndpointId, revision: Revision, deadline: Duration) -> Result<Proof, Status> {
    let key = Bytes::from_static(&[0]);
    let question = RangeRequest { key, limit: 1, count_only: true, revision: revision.0, ..Default::default() };
    let asked = upstream.unary_numbered(at, paths::RANGE, &question, deadline);
    let (answer, connection): (RangeResponse, _) = asked.await?;
    let proof = answer.header.as_ref().and_then(|header| Proof::of(header, connection));
    proof.ok_or_else(|| Status::unavailable("an answer without a cluster or a revision"))
}
