//! Reads: what was answered, at which revision, and how recent that was.

use std::collections::HashMap;

use millpond::proto::etcdserverpb::{
    self as pb, RangeRequest, TxnRequest, TxnResponse, request_op::Request, response_op::Response,
};
use millpond::proto::mvccpb::KeyValue;
use millpond::status::Status;
use tonic::Code;

use super::{
    super::{
        history::History,
        record::{Call, Target},
    },
    Breach, Case, Counts,
    placing::{Placing, is_current, revision},
};
use crate::support::{
    compare::outcomes,
    operation::{Answer, Failure, Operation},
};

pub const EVALUATION: &str = "a read equals the history at its revision";
pub const STALE: &str = "a linearizable answer is not older than anything told before it was asked for";
pub const PAST: &str = "a linearizable read finds nothing that was compacted before it was asked for";
pub const BACKWARDS: &str = "one connection's revisions never go back";
pub const REFUSAL: &str = "a refusal says what is so";

pub fn judge(case: &Case, placing: &Placing, counts: &mut Counts) -> Vec<Breach> {
    let mut breaches = Vec::new();
    for call in &case.calls {
        let found = match &call.outcome {
            Some(Ok(answer)) => [
                evaluation(case, placing, call, answer, counts),
                stale(placing, call, counts),
                past(case, placing, call),
            ],
            Some(Err(failure)) => [refusal(case, placing, call, failure), None, None],
            None => [None, None, None],
        };
        breaches.extend(found.into_iter().flatten());
    }
    breaches.extend(backwards(case, placing));
    breaches
}

fn breach(check: &'static str, call: &Call, text: &str) -> Breach {
    let answer = match &call.outcome {
        Some(Ok(answer)) => {
            let text = format!("{answer:?}");
            text.chars().take(600).collect()
        }
        other => format!("{other:?}"),
    };
    let what = format!(
        "{text}\n    asked: {:?} by worker {} from tick {} to {}\n    request: {:?}\n    answer: {answer}",
        call.target, call.worker, call.begin, call.end, call.operation
    );
    Breach { check, tick: call.begin, size: what.len(), text: what }
}

fn evaluation(case: &Case, placing: &Placing, call: &Call, answer: &Answer, counts: &mut Counts) -> Option<Breach> {
    let check: &dyn Fn(&History) -> Result<(), String> = match (&call.operation, answer) {
        // Etcd 3.7.1 reads each chunk at the present then, and so does what is relayed from it.
        (Operation::RangeStream(request), _) if request.revision < 0 => return None,
        (Operation::Range(request) | Operation::RangeStream(request), Answer::Range(found)) => {
            &|history| range(history, request, found)
        }
        (Operation::Txn(request), Answer::Txn(found)) if is_reads_only(request) => {
            &|history| txn(history, request, found)
        }
        _ => return None,
    };
    counts.reads += 1;
    let (lowest, highest) = placing.eras_of(call);
    let mut difference = String::new();
    for era in (lowest..=highest).rev() {
        match check(&case.histories[era]) {
            Ok(()) => return None,
            Err(text) => {
                difference += &format!("\n    in history {era}: {}", text.chars().take(1500).collect::<String>())
            }
        }
    }
    Some(breach(EVALUATION, call, &difference))
}

fn range(history: &History, request: &RangeRequest, found: &pb::RangeResponse) -> Result<(), String> {
    let header = found.header.ok_or("no header")?;
    let expected = pb::RangeResponse { header: Some(header), ..select(history, request, header.revision)? };
    let apart = difference(&expected.kvs, &found.kvs);
    let (expected, found) = (Ok(Answer::Range(expected)), Ok(Answer::Range(found.clone())));
    outcomes(&Operation::Range(request.clone()), &expected, &found).map_err(|text| format!("{apart}\n    {text}"))
}

/// The records that are in one list only.
fn difference(expected: &[KeyValue], found: &[KeyValue]) -> String {
    let only = |these: &[KeyValue], those: &[KeyValue]| {
        let only: Vec<String> = these.iter().filter(|one| !those.contains(one)).map(|one| format!("{one:?}")).collect();
        only.join("\n        ").chars().take(1000).collect::<String>()
    };
    format!("only expected: {}\n    only found: {}", only(expected, found), only(found, expected))
}

/// What the request selects, when the answer says that `present` is the newest revision.
fn select(history: &History, request: &RangeRequest, present: i64) -> Result<pb::RangeResponse, String> {
    if present > history.last {
        return Err(format!("revision {present} was never reached, {} was", history.last));
    }
    if request.revision > present {
        return Err(format!("revision {} was asked for and answered at {present}", request.revision));
    }
    let at = if request.revision > 0 { request.revision } else { present };
    Ok(history.select(request, at, false))
}

fn is_reads_only(request: &TxnRequest) -> bool {
    let is_range = |op: &pb::RequestOp| matches!(op.request, Some(Request::RequestRange(_)));
    request.compare.is_empty() && request.success.iter().chain(&request.failure).all(is_range)
}

fn txn(history: &History, request: &TxnRequest, found: &TxnResponse) -> Result<(), String> {
    let header = found.header.ok_or("no header")?;
    let mut expected = TxnResponse { header: Some(header), succeeded: true, responses: Vec::new() };
    for (number, op) in request.success.iter().enumerate() {
        let Some(Request::RequestRange(request)) = &op.request else { continue };
        let mut answer = select(history, request, header.revision)?;
        if let Some(Response::ResponseRange(inner)) = found.responses.get(number).and_then(|one| one.response.as_ref())
        {
            answer.header = inner.header;
        }
        expected.responses.push(pb::ResponseOp { response: Some(Response::ResponseRange(answer)) });
    }
    outcomes(&Operation::Txn(request.clone()), &Ok(Answer::Txn(expected)), &Ok(Answer::Txn(found.clone())))
}

fn stale(placing: &Placing, call: &Call, counts: &mut Counts) -> Option<Breach> {
    let revision = revision(call).filter(|_| is_current(&call.operation))?;
    counts.linearizable += 1;
    let (lowest, highest) = placing.eras_of(call);
    let seen = placing.seen_before(lowest, call.begin);
    let text = format!("answered at revision {revision}, though somebody had been told of {seen} before");
    (lowest == highest && revision < seen).then(|| breach(STALE, call, &text))
}

fn past(case: &Case, placing: &Placing, call: &Call) -> Option<Breach> {
    let (Operation::Range(request) | Operation::RangeStream(request)) = &call.operation else { return None };
    let (lowest, highest) = placing.eras_of(call);
    let compacted = case.eras.surely_compacted(lowest, call.begin);
    let found = request.revision > 0 && request.revision < compacted;
    let text = format!("revision {} was read, though {compacted} had been compacted before", request.revision);
    (found && is_current(&call.operation) && lowest == highest).then(|| breach(PAST, call, &text))
}

fn backwards(case: &Case, placing: &Placing) -> Vec<Breach> {
    // The highest revision so far, and the first era that it can be of.
    let mut before: HashMap<(usize, Target), (usize, i64, &Call)> = HashMap::new();
    let mut breaches = Vec::new();
    for call in &case.calls {
        let Some(revision) = revision(call) else { continue };
        let (lowest, highest) = placing.eras_of(call);
        let known = before.entry((call.worker, call.target)).or_insert((lowest, revision, call));
        if known.0 == highest && revision < known.1 {
            let text = format!("answered at revision {revision} after one at {}, to {:?}", known.1, known.2.operation);
            breaches.push(breach(BACKWARDS, call, &text));
        }
        if known.0 != lowest || revision > known.1 {
            *known = (lowest, revision, call);
        }
    }
    breaches
}

fn refusal(case: &Case, placing: &Placing, call: &Call, failure: &Failure) -> Option<Breach> {
    let Operation::Range(request) = &call.operation else { return None };
    let (lowest, highest) = placing.eras_of(call);
    let is = |status: Status| *failure == Failure::from(status);
    let text = if is(Status::COMPACTED) {
        let compacted = (lowest..=highest).map(|era| case.eras.compacted(era, call.end)).max().unwrap_or(0);
        (request.revision >= compacted)
            .then(|| format!("revision {} was not compacted, {compacted} is", request.revision))
    } else if is(Status::FUTURE_REVISION) {
        let seen = placing.seen_before(lowest, call.begin);
        let known = lowest == highest && !request.serializable && request.revision <= seen;
        known.then(|| format!("revision {} is not in the future, {seen} had been told of", request.revision))
    } else {
        let excused = [Code::Unavailable, Code::Unknown, Code::Cancelled, Code::Internal, Code::InvalidArgument];
        (!excused.contains(&failure.code)).then(|| "a refusal that nothing explains".to_owned())
    };
    text.map(|text| breach(REFUSAL, call, &text))
}
