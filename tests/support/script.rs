//! A random script of watches and writes, played in step on two servers.
//!
//! A recording watch gives the history that was written, and a small model says from it how many events each watcher is
//! due, so that every step waits for exactly what must come and what comes beyond that is noticed.

mod side;

use std::collections::BTreeMap;

use bytes::Bytes;
use millpond::proto::{
    etcdserverpb::{self as pb, WatchCreateRequest},
    mvccpb::Event,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::time::{Duration, Instant, sleep, sleep_until};

use side::{Side, eventually_counted, last_revision, progress_count, tells_progress_to};

use super::{
    client::{Client, eventually},
    compare::outcomes,
    operation::{Operation, execute},
    random::{Bounds, Generator},
    subject::Twins,
    watching::{Item, WatchStream, create, revision_of},
};

/// A watcher that starts in the past is surely up to date after this: etcd looks for such ones every tenth of a second.
const BEHIND: Duration = Duration::from_millis(1500);

/// What a stream's requests lead to, as far as the script must know it to pace itself.
struct Watcher {
    request: WatchCreateRequest,
    /// The first revision that it is to be told.
    from: i64,
    /// It began at the last compaction, which left only the last event of each key of that revision.
    at_compaction: bool,
    /// Cancelled by the server because of a compaction; its id stays taken.
    compacted: bool,
}

pub struct Script {
    reference: Side,
    subject: Side,
    /// Watches everything on the reference from the beginning.
    recorder: WatchStream,
    generator: Generator,
    rng: StdRng,
    bounds: Bounds,
    watchers: BTreeMap<i64, Watcher>,
    next_id: i64,
    /// Responses other than events that are due by now.
    controls: usize,
    /// When a watcher was last created with a start in the past.
    last_behind: Instant,
    /// The revisions to which progress was asked for and told.
    proven: Vec<i64>,
    /// Events due to watchers that are gone.
    settled_events: usize,
    steps: Vec<String>,
}

impl Script {
    pub async fn new(twins: &Twins, seed: u64) -> Self {
        Self::between(twins.reference.client(0), twins.subject.client(), seed).await
    }

    /// On two servers with equal ids and equal empty stores.
    pub async fn between(reference: Client, subject: Client, seed: u64) -> Self {
        let recorder = WatchStream::open(&reference).await;
        recorder.create(WatchCreateRequest { prev_kv: true, ..create("\0", "\0", 1) });
        let mut script = Self {
            recorder,
            reference: Side { stream: WatchStream::open(&reference).await, client: reference },
            subject: Side { stream: WatchStream::open(&subject).await, client: subject },
            generator: Generator::new(seed),
            rng: StdRng::seed_from_u64(seed ^ 1),
            bounds: Bounds::default(),
            watchers: BTreeMap::new(),
            next_id: 0,
            controls: 0,
            last_behind: Instant::now(),
            proven: Vec::new(),
            settled_events: 0,
            steps: Vec::new(),
        };
        script.generator.unknown_enums = false;
        for _ in 0..40 {
            script.write().await;
        }
        script
    }

    /// Plays `count` random steps, then compares everything that both streams were sent.
    pub async fn play(&mut self, count: usize) {
        for _ in 0..count {
            match self.rng.random_range(0..20) {
                0..5 => self.create().await,
                5 | 6 => self.cancel().await,
                7 => self.progress().await,
                8 => self.compact().await,
                9 => self.nonsense(),
                _ => self.write().await,
            }
        }
        sleep(Duration::from_millis(300)).await;
        self.compare();
    }

    /// How much was compared: watch responses and events.
    pub fn volume(&self) -> (usize, usize) {
        (self.reference.stream.responses().len(), self.reference.stream.events().len())
    }

    async fn write(&mut self) {
        let operation = match self.rng.random_range(0..40) {
            0..24 => Operation::Put(self.generator.put()),
            24..32 => Operation::Delete(self.generator.delete()),
            32 => Operation::Txn(self.generator.put_and_delete()),
            _ => Operation::Txn(self.generator.txn(self.bounds, 1)),
        };
        self.steps.push(format!("{operation:?}"));
        self.execute(&operation).await;
        self.settle().await;
    }

    async fn execute(&mut self, operation: &Operation) -> bool {
        let (expected, found) =
            tokio::join!(execute(&self.reference.client, operation), execute(&self.subject.client, operation));
        outcomes(operation, &expected, &found).unwrap_or_else(|difference| panic!("{difference}\n{operation:?}"));
        if let Ok(answer) = &expected {
            let header = answer.header().expect("every answer has a header");
            self.bounds.current = self.bounds.current.max(header.revision);
        }
        expected.is_ok()
    }

    async fn compact(&mut self) {
        let revision = self.rng.random_range(self.bounds.compacted..=self.bounds.current);
        if self.bounds.current - revision < 10 {
            return;
        }
        // A watcher that starts in the past is behind for a tenth of a second even when it is due nothing, and a compaction
        // in that time cancels it.
        sleep_until(self.last_behind + BEHIND).await;
        self.steps.push(format!("compact {revision}"));
        if self.execute(&Operation::Compact(pb::CompactionRequest { revision, physical: true })).await {
            self.bounds.compacted = revision;
        }
    }

    async fn create(&mut self) {
        let request = self.create_request();
        self.steps.push(format!("{request:?}"));
        self.expect_created(&request);
        self.reference.stream.create(request.clone());
        self.subject.stream.create(request);
        self.settle().await;
    }

    fn create_request(&mut self) -> WatchCreateRequest {
        let (key, range_end) = self.span();
        let start_revision = match self.rng.random_range(0..8) {
            0..4 => 0,
            4 => self.bounds.compacted,
            _ => self.generator.revision(self.bounds).max(-5),
        };
        let filters = match self.rng.random_range(0..8) {
            0 => vec![0],
            1 => vec![1],
            2 => vec![0, 1],
            _ => vec![],
        };
        let ids: Vec<i64> = self.watchers.keys().copied().collect();
        let watch_id = match self.rng.random_range(0..8) {
            0 => self.generator.pick(&[1, 2, 7, 100, -1, -9, i64::MAX, i64::MIN]),
            1 if !ids.is_empty() => self.generator.pick(&ids),
            _ => 0,
        };
        let (prev_kv, fragment) = (self.generator.chance(2), self.generator.chance(2));
        WatchCreateRequest {
            key,
            range_end,
            start_revision,
            progress_notify: false,
            filters,
            prev_kv,
            watch_id,
            fragment,
        }
    }

    /// What to watch: every other time something wide, so that there are events.
    fn span(&mut self) -> (Bytes, Bytes) {
        const WIDE: [(&[u8], &[u8]); 6] =
            [(b"a/", b"a0"), (b"b/", b"b0"), (b"b/1/", b"b/10"), (b"\0", b"\0"), (b"", b"\0"), (b"a", b"\0")];
        if self.generator.chance(2) {
            return self.generator.span();
        }
        let (key, end) = self.generator.pick(&WIDE);
        (Bytes::from_static(key), Bytes::from_static(end))
    }

    /// Follows etcd's checks, to know what is due.
    fn expect_created(&mut self, request: &WatchCreateRequest) {
        self.controls += 1;
        let (key, end) = span_of(request);
        let is_empty = !end.is_empty() && end != b"\0" && key >= end;
        if request.start_revision < 0 || is_empty {
            return;
        }
        let id = match request.watch_id {
            0 => self.pick_id(),
            id if self.watchers.contains_key(&id) => return,
            id => id,
        };
        let is_live = request.start_revision == 0 || request.start_revision > self.bounds.current;
        let from = if request.start_revision == 0 { self.bounds.current + 1 } else { request.start_revision };
        if !is_live {
            self.last_behind = Instant::now();
        }
        let compacted = !is_live && from < self.bounds.compacted;
        self.controls += usize::from(compacted);
        let at_compaction = !is_live && from == self.bounds.compacted;
        self.watchers.insert(id, Watcher { request: request.clone(), from, at_compaction, compacted });
    }

    fn pick_id(&mut self) -> i64 {
        while self.watchers.contains_key(&self.next_id) {
            self.next_id += 1;
        }
        self.next_id += 1;
        self.next_id - 1
    }

    async fn cancel(&mut self) {
        let ids: Vec<i64> = self.watchers.keys().copied().collect();
        let id = if ids.is_empty() || self.generator.chance(6) { 4242 } else { self.generator.pick(&ids) };
        self.steps.push(format!("cancel {id}"));
        if let Some(watcher) = self.watchers.remove(&id) {
            self.controls += 1;
            self.settled_events += self.due(&watcher);
        }
        self.reference.stream.cancel(id);
        self.subject.stream.cancel(id);
        self.settle().await;
    }

    /// Asks for progress. A stream whose watchers are all told everything answers; any other is silent.
    async fn progress(&mut self) {
        let current = self.bounds.current;
        let is_silent = self.watchers.is_empty()
            || self.watchers.values().any(|watcher| watcher.compacted || watcher.request.start_revision > current);
        self.steps.push(format!("progress at {current}, silent: {is_silent}"));
        if is_silent {
            return self.expect_silence().await;
        }
        sleep_until(self.last_behind + BEHIND).await;
        self.proven.push(current);
        for (name, side) in [("reference", &self.reference), ("subject", &self.subject)] {
            let what = format!("the {name}'s proof of progress to {current} after\n{}", self.last_steps());
            eventually(&what, async || {
                side.stream.ask_progress();
                let asked = Instant::now();
                while asked.elapsed() < Duration::from_millis(200) && !tells_progress_to(&side.stream, current) {
                    sleep(Duration::from_millis(2)).await;
                }
                tells_progress_to(&side.stream, current).then_some(())
            })
            .await;
        }
    }

    /// Asks for progress where etcd stays silent.
    async fn expect_silence(&self) {
        for (name, side) in [("reference", &self.reference), ("subject", &self.subject)] {
            let before = progress_count(&side.stream);
            side.stream.ask_progress();
            sleep(Duration::from_millis(150)).await;
            if progress_count(&side.stream) > before {
                let compacted = self.watchers.iter().filter(|(_, watcher)| watcher.compacted);
                let compacted: Vec<i64> = compacted.map(|(id, _)| *id).collect();
                let future = self.watchers.iter().filter(|(_, w)| w.request.start_revision > self.bounds.current);
                let future: Vec<i64> = future.map(|(id, _)| *id).collect();
                panic!(
                    "the {name} told progress with {} watchers, {compacted:?} compacted, {future:?} in the future, after\n{}",
                    self.watchers.len(),
                    self.last_steps()
                );
            }
        }
    }

    /// Requests without content are ignored.
    fn nonsense(&mut self) {
        self.steps.push("an empty request".to_owned());
        for side in [&self.reference, &self.subject] {
            side.stream.send_raw(pb::WatchRequest { request_union: None });
        }
    }

    /// Waits until both streams were sent everything that is due.
    async fn settle(&mut self) {
        let current = self.bounds.current;
        if current > 1 {
            let what = format!("the recorder at revision {current}");
            self.recorder.until(&what, |responses| last_revision(responses) >= current).await;
        }
        let events = self.settled_events + self.watchers.values().map(|watcher| self.due(watcher)).sum::<usize>();
        let controls = self.controls;
        for (name, side) in [("reference", &self.reference), ("subject", &self.subject)] {
            let counted = eventually_counted(side, controls, events).await;
            assert!(
                counted == (controls, events),
                "the {name} was due {controls} answers and {events} events, not {counted:?}, after\n{}",
                self.last_steps()
            );
        }
    }

    /// How many events a watcher is due by now.
    fn due(&self, watcher: &Watcher) -> usize {
        if watcher.compacted {
            return 0;
        }
        let history = self.recorder.events();
        let is_due = |at: &usize| {
            let event = &history[*at];
            let gone = watcher.at_compaction && revision_of(event) == watcher.from && is_superseded(&history, *at);
            revision_of(event) >= watcher.from && sees(&watcher.request, event) && !gone
        };
        (0..history.len()).filter(is_due).count()
    }

    fn compare(&self) {
        let (expected, found) = (self.reference.items(&self.proven), self.subject.items(&self.proven));
        let ids = |watchers: &BTreeMap<i64, Vec<Item>>| watchers.keys().copied().collect::<Vec<_>>();
        assert_eq!(ids(&expected), ids(&found), "watch ids, after\n{}", self.last_steps());
        for (id, expected) in &expected {
            let found = &found[id];
            let differs = expected.iter().zip(found).position(|(expected, found)| !expected.agrees_with(found));
            if let Some(at) = differs {
                let steps = self.last_steps();
                panic!(
                    "watcher {id}, item {at}\nexpected: {:?}\n   found: {:?}\nsteps:\n{steps}",
                    expected[at], found[at]
                );
            }
            assert_eq!(expected.len(), found.len(), "number of items of watcher {id}");
        }
    }

    fn last_steps(&self) -> String {
        const LENGTH: usize = 400;
        let last = &self.steps[self.steps.len().saturating_sub(12)..];
        last.iter().map(|step| step.chars().take(LENGTH).collect::<String>()).collect::<Vec<_>>().join("\n")
    }
}

/// Whether a later event of the same revision is about the same key.
fn is_superseded(history: &[Event], at: usize) -> bool {
    let key = |event: &Event| event.kv.as_ref().expect("every event has a record").key.clone();
    let revision = revision_of(&history[at]);
    let mut later = history[at + 1..].iter().take_while(|later| revision_of(later) == revision);
    later.any(|later| key(later) == key(&history[at]))
}

fn span_of(request: &WatchCreateRequest) -> (&[u8], &[u8]) {
    let key = if request.key.is_empty() { b"\0" } else { &request.key[..] };
    (key, &request.range_end)
}

fn sees(request: &WatchCreateRequest, event: &Event) -> bool {
    let (key, end) = span_of(request);
    let changed = &event.kv.as_ref().expect("every event has a record").key[..];
    let is_inside = match end {
        b"" => changed == key,
        b"\0" => changed >= key,
        end => changed >= key && changed < end,
    };
    is_inside && !request.filters.contains(&event.r#type)
}
