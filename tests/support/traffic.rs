//! Writes and reads that go on while things break, and notice when an answer is wrong.
//!
//! One writer raises a counter and notes what was acknowledged; a linearizable read that began after that must not find
//! less. The counter is raised by a guarded transaction, so that a write whose outcome nobody knows cannot lower it later.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use millpond::proto::etcdserverpb::{
    self as pb, Compare, RequestOp, TxnRequest,
    compare::{CompareResult, CompareTarget, TargetUnion},
    request_op::Request,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::client::{Client, eventually};

const COUNTER: &[u8] = b"f/counter";
/// After this a call counts as failed; nobody knows whether it was applied.
const CALL: Duration = Duration::from_secs(2);

/// What was noted so far.
#[derive(Debug, Default)]
struct Notes {
    acknowledged: AtomicI64,
    writes: AtomicUsize,
    reads: AtomicUsize,
    /// Serializable reads.
    cached_reads: AtomicUsize,
    breach: Mutex<Option<String>>,
}

/// Running traffic; dropping it stops it.
pub struct Traffic {
    notes: Arc<Notes>,
    tasks: JoinSet<()>,
}

impl Traffic {
    /// Writes through `writers` in turn, reads through `reader`. Everything lies under `f/`.
    pub fn start(writers: Vec<Client>, reader: &Client, seed: u64) -> Self {
        let notes = Arc::new(Notes::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(count(writers.clone(), Arc::clone(&notes)));
        tasks.spawn(churn(writers, seed));
        for _ in 0..3 {
            tasks.spawn(read_linearizable(reader.clone(), Arc::clone(&notes)));
        }
        tasks.spawn(read_serializable(reader.clone(), Arc::clone(&notes)));
        Self { notes, tasks }
    }

    /// Fails the test when an answer was wrong.
    pub fn assert_right(&self) {
        let breach = self.notes.breach.lock().unwrap();
        assert!(breach.is_none(), "{}", breach.as_deref().unwrap_or_default());
    }

    /// Linearizable reads answered so far.
    pub fn reads(&self) -> usize {
        self.notes.reads.load(Ordering::SeqCst)
    }

    /// Serializable reads answered so far.
    pub fn cached_reads(&self) -> usize {
        self.notes.cached_reads.load(Ordering::SeqCst)
    }

    /// Waits until this many more writes were acknowledged and linearizable reads answered.
    pub async fn flows(&self, more: usize) {
        let (writes, reads) = (self.notes.writes.load(Ordering::SeqCst), self.reads());
        eventually("writes and reads that go on", async || {
            self.assert_right();
            let now = (self.notes.writes.load(Ordering::SeqCst), self.reads());
            (now.0 >= writes + more && now.1 >= reads + more).then_some(())
        })
        .await;
    }

    /// Stops everything; how many writes and reads there were.
    pub async fn stop(mut self) -> (usize, usize) {
        self.tasks.shutdown().await;
        self.assert_right();
        (self.notes.writes.load(Ordering::SeqCst), self.reads())
    }
}

/// Raises the counter through one client after the other.
async fn count(writers: Vec<Client>, notes: Arc<Notes>) {
    for (number, client) in (1_i64..).zip(writers.iter().cycle()) {
        if let Ok(Ok(answer)) = timeout(CALL, raise(client, number)).await
            && answer.succeeded
        {
            notes.acknowledged.fetch_max(number, Ordering::SeqCst);
            notes.writes.fetch_add(1, Ordering::SeqCst);
        }
        sleep(Duration::from_millis(4)).await;
    }
}

/// Puts the number unless a higher one is there. A counter that is not there at all counts as lower.
async fn raise(client: &Client, number: i64) -> Result<pb::TxnResponse, tonic::Status> {
    let value = Bytes::from(format!("{number:012}"));
    let compare = Compare {
        key: COUNTER.into(),
        target: CompareTarget::Value as i32,
        result: CompareResult::Greater as i32,
        target_union: Some(TargetUnion::Value(value.clone())),
        ..Default::default()
    };
    // The comparison of a missing key's value fails, so the write stands in the other branch.
    let put = pb::PutRequest { key: COUNTER.into(), value, ..Default::default() };
    let failure = vec![RequestOp { request: Some(Request::RequestPut(put)) }];
    let request = TxnRequest { compare: vec![compare], success: Vec::new(), failure };
    let mut answer = client.kv.clone().txn(request).await?.into_inner();
    answer.succeeded = !answer.succeeded;
    Ok(answer)
}

/// Puts and deletes some keys at random.
async fn churn(writers: Vec<Client>, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    for (number, client) in writers.iter().cycle().enumerate() {
        let key = format!("f/churn/{:02}", rng.random_range(0..30));
        if rng.random_ratio(1, 4) {
            let _ = timeout(CALL, client.delete(key)).await;
        } else {
            let _ = timeout(CALL, client.put(key, format!("{number} {}", "x".repeat(rng.random_range(0..400))))).await;
        }
        sleep(Duration::from_millis(3)).await;
    }
}

async fn read_linearizable(client: Client, notes: Arc<Notes>) {
    loop {
        let before = notes.acknowledged.load(Ordering::SeqCst);
        let request = pb::RangeRequest { key: COUNTER.into(), ..Default::default() };
        if let Ok(Ok(answer)) = timeout(CALL, client.range(request)).await {
            let found = answer.kvs.first().map_or(0, |kv| number_in(&kv.value));
            if found < before {
                let header = answer.header;
                note(&notes, format!("a linearizable read found {found} after {before} was acknowledged: {header:?}"));
            }
            notes.reads.fetch_add(1, Ordering::SeqCst);
        }
        sleep(Duration::from_millis(3)).await;
    }
}

/// Reads counter and revision from memory: both may lag, but never one without the other.
async fn read_serializable(client: Client, notes: Arc<Notes>) {
    let mut last = (0, 0);
    loop {
        if let Ok(Ok(answer)) = timeout(CALL, client.get(COUNTER)).await {
            let revision = answer.header.map_or(0, |header| header.revision);
            let kv = answer.kvs.first();
            let found = kv.map_or(0, |kv| number_in(&kv.value));
            if kv.is_some_and(|kv| kv.mod_revision > revision) || (revision >= last.0 && found < last.1) {
                note(&notes, format!("{found} at revision {revision} after {} at {}: {answer:?}", last.1, last.0));
            }
            last = (revision, found);
            notes.cached_reads.fetch_add(1, Ordering::SeqCst);
        }
        sleep(Duration::from_millis(10)).await;
    }
}

fn number_in(value: &[u8]) -> i64 {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn note(notes: &Notes, what: String) {
    notes.breach.lock().unwrap().get_or_insert(what);
}
