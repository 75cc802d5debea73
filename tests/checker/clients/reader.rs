//! Readers: every option of a Range, at every kind of revision, alone and in transactions.

use std::sync::Arc;

use millpond::proto::etcdserverpb::{RangeRequest, RequestOp, TxnRequest, request_op::Request};

use super::{super::context::Context, calls::Caller};
use crate::support::operation::Operation;

/// Reads until the work is over.
pub async fn run(worker: usize, context: Arc<Context>) {
    let mut caller = Caller::new(worker, &context);
    while context.works() {
        let operation = choose(&mut caller);
        let outcome = caller.call(operation).await;
        let longest = if outcome.is_some_and(|outcome| outcome.is_ok()) { 25 } else { 100 };
        caller.pause(longest).await;
    }
}

fn choose(caller: &mut Caller) -> Operation {
    let bounds = caller.context.bounds();
    match caller.random.below(10) {
        // Etcd sorts each chunk by itself when a target comes without an order, and loses keys at that.
        0 => Operation::RangeStream(RangeRequest { sort_target: 0, ..caller.random.range(bounds) }),
        1 => Operation::Txn(reads(caller)),
        // What reads of the present must show matters most, so most of them ask for all of it.
        2..5 => Operation::Range(everything_under(caller)),
        _ => Operation::Range(caller.random.range(bounds)),
    }
}

fn everything_under(caller: &mut Caller) -> RangeRequest {
    let (key, range_end) = caller.random.pick(&[("b/", "b0"), ("a/", "a0"), ("\0", "\0"), ("b/1/", "b/10")]);
    RangeRequest { key: key.into(), range_end: range_end.into(), ..Default::default() }
}

fn reads(caller: &mut Caller) -> TxnRequest {
    let bounds = caller.context.bounds();
    let count = 1 + caller.random.below(3);
    let op = |_| RequestOp { request: Some(Request::RequestRange(caller.random.range(bounds))) };
    TxnRequest { success: (0..count).map(op).collect(), ..Default::default() }
}
