//! Random requests, sent to etcd and to the server under test: every answer must be the same, field by field.
//!
//! `MILLPOND_TEST_OPERATIONS` sets how many, `MILLPOND_TEST_SEED` repeats a run.

mod support;

use millpond::{
    proto::etcdserverpb::{self as pb, range_request::SortTarget, request_op::Request},
    status::Status,
};
use support::{
    client::Client,
    compare::outcomes,
    operation::{Answer, Failure, Operation, Outcome, execute},
    random::{Bounds, Generator, operations, seed},
    subject::{Kind, Twins},
    toolchain::Release,
};
use tonic::Code;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_3_7_answers_alike() {
    against("3.7.1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_3_6_answers_alike() {
    against("3.6.14").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_3_5_answers_alike() {
    against("3.5.33").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_named_etcd_answers_alike() {
    let release = Release::newest();
    if release.version != support::toolchain::VERSIONS[0] {
        run(release).await;
    }
}

async fn against(version: &str) {
    if let Some(release) = Release::pinned(version) {
        run(release).await;
    }
}

async fn run(release: Release) {
    let mut twins = Twins::start(&release).await;
    let mut run = Run {
        reference: twins.reference.client(0),
        subject: twins.subject.client(),
        generator: Generator::new(seed()),
        bounds: Bounds::default(),
        release,
        kinds: Kinds::default(),
    };
    run.fill().await;
    let count = operations(3000);
    for number in 0..count {
        run.step(number).await;
        if number % 500 == 0 {
            twins.subject.assert_well();
        }
    }
    twins.subject.assert_well();
    println!("etcd {}: {count} requests, {:?}", run.release.version, run.kinds);
    assert!(count < 1000 || run.kinds.is_broad(), "the run exercised too little: {:?}", run.kinds);
}

/// What the run has met, so that a run that tests nothing is noticed.
#[derive(Debug, Default)]
struct Kinds {
    answers: usize,
    errors: usize,
    keys_read: usize,
    writes: usize,
}

impl Kinds {
    fn is_broad(&self) -> bool {
        self.answers > 500 && self.errors > 50 && self.keys_read > 2000 && self.writes > 200
    }

    fn note(&mut self, operation: &Operation, outcome: &Outcome) {
        match outcome {
            Ok(Answer::Range(answer)) => self.keys_read += answer.kvs.len(),
            Ok(_) if matches!(operation, Operation::Put(_) | Operation::Delete(_) | Operation::Txn(_)) => {
                self.writes += 1
            }
            _ => {}
        }
        *(if outcome.is_ok() { &mut self.answers } else { &mut self.errors }) += 1;
    }
}

struct Run {
    reference: Client,
    subject: Client,
    generator: Generator,
    bounds: Bounds,
    release: Release,
    kinds: Kinds,
}

impl Run {
    /// Leases and some history to begin with.
    async fn fill(&mut self) {
        for id in 1..5 {
            self.check(&Operation::Grant(pb::LeaseGrantRequest { id, ttl: 6000 })).await;
        }
        for _ in 0..150 {
            let put = self.generator.put();
            self.check(&Operation::Put(put)).await;
        }
    }

    async fn step(&mut self, number: usize) {
        let operation = if self.generator.chance(12) { self.generator.lease() } else { self.generator.kv(self.bounds) };
        if self.is_fatal_to_old_etcds(&operation) || is_garbled_by_etcd(&operation) {
            return;
        }
        // Much of the history stays uncompacted, so that reads of the past have something to read.
        if let Operation::Compact(request) = &operation
            && (request.revision > self.bounds.current - 100 && request.revision <= self.bounds.current || number < 100)
        {
            return;
        }
        self.check(&operation).await;
    }

    /// Sends one request to both and compares what comes back.
    async fn check(&mut self, operation: &Operation) {
        let (expected, found) = tokio::join!(self.expected(operation), self.found(operation));
        if let Err(difference) = outcomes(operation, &expected, &found) {
            panic!(
                "etcd {} and the server under test disagree: {difference}\nrequest: {operation:?}",
                self.release.version
            );
        }
        self.kinds.note(operation, &expected);
        self.learn(operation, &expected);
    }

    fn learn(&mut self, operation: &Operation, outcome: &Outcome) {
        let Ok(answer) = outcome else { return };
        if let Some(header) = answer.header() {
            self.bounds.current = self.bounds.current.max(header.revision);
        }
        if let Operation::Compact(request) = operation {
            self.bounds.compacted = self.bounds.compacted.max(request.revision);
        }
    }

    async fn expected(&self, operation: &Operation) -> Outcome {
        self.as_if_newest(&self.reference, operation).await
    }

    /// What the server under test says. It must be up to the newest version by itself, unless it is an etcd.
    async fn found(&self, operation: &Operation) -> Outcome {
        match Kind::chosen() {
            Kind::Proxy => execute(&self.subject, operation).await,
            Kind::Etcd => self.as_if_newest(&self.subject, operation).await,
        }
    }

    /// What an etcd says, or what it would say if it were of the newest version where that is the rule.
    async fn as_if_newest(&self, etcd: &Client, operation: &Operation) -> Outcome {
        match operation {
            Operation::Range(request) | Operation::RangeStream(request)
                if !self.release.is_3_7() && !request.key.is_empty() && has_unknown_sort(request) =>
            {
                Err(Failure::from(Status::INVALID_SORT_OPTION))
            }
            Operation::RangeStream(request) if !self.release.is_3_7() => range_stream_of_old(etcd, request).await,
            _ => execute(etcd, operation).await,
        }
    }

    /// Etcds before 3.6 end themselves when a transaction sorts by something that they do not know.
    fn is_fatal_to_old_etcds(&self, operation: &Operation) -> bool {
        matches!(operation, Operation::Txn(request) if !self.release.is_3_7() && txn_has_unknown_sort(request))
    }
}

/// RangeStream as 3.7 has it, from the Range of an older etcd. Keys alone come without their leases since 3.7.
async fn range_stream_of_old(etcd: &Client, request: &pb::RangeRequest) -> Outcome {
    if request.key.is_empty() {
        return Err(Failure::from(Status::EMPTY_KEY));
    }
    let unimplemented = |what: &str| {
        let text = format!("RangeStream does not support {what}");
        Err(Failure { code: Code::Unimplemented, text })
    };
    if request.sort_order == 2 || request.sort_order == 1 && request.sort_target != SortTarget::Key as i32 {
        return unimplemented("custom sort orders");
    }
    if has_filters(request) {
        return unimplemented("revision filters");
    }
    let mut outcome = execute(etcd, &Operation::Range(request.clone())).await;
    if let Ok(Answer::Range(answer)) = &mut outcome
        && request.keys_only
    {
        answer.kvs.iter_mut().for_each(|kv| kv.lease = 0);
    }
    outcome
}

/// A RangeStream by something else than the key, without an order, is sorted chunk by chunk in etcd 3.7, and what it
/// resumes from is the last key of the sorted chunk: keys come twice or not at all. Nobody can rely on that.
fn is_garbled_by_etcd(operation: &Operation) -> bool {
    matches!(operation, Operation::RangeStream(request) if request.sort_order == 0 && request.sort_target != 0)
}

fn has_unknown_sort(request: &pb::RangeRequest) -> bool {
    !(0..3).contains(&request.sort_order) || !(0..5).contains(&request.sort_target)
}

fn has_filters(request: &pb::RangeRequest) -> bool {
    let filters =
        [request.min_mod_revision, request.max_mod_revision, request.min_create_revision, request.max_create_revision];
    filters.iter().any(|filter| *filter != 0)
}

fn txn_has_unknown_sort(request: &pb::TxnRequest) -> bool {
    request.success.iter().chain(&request.failure).any(|op| match &op.request {
        Some(Request::RequestRange(range)) => has_unknown_sort(range),
        Some(Request::RequestTxn(txn)) => txn_has_unknown_sort(txn),
        _ => false,
    })
}
