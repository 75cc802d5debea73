//! Transactions made of nothing but compares and reads, evaluated on one view. All others, and all that etcd would refuse,
//! are forwarded.

use ::http::Response;
use futures_util::FutureExt;
use prost::Message;

use super::{Answered, Call, Evidence, Kv, answer, pieces::Section, unless_memory_can, unserved};
use crate::{
    aside,
    proto::etcdserverpb::{Compare, RangeRequest, RequestOp, TxnRequest, request_op::Request as Operation},
    rules::{
        KeyRange,
        compare::{compared, holds_for_none, is_by_value, is_known, number_holds, value_holds},
        range::{range_of, read_of},
        validate,
    },
    server::{body::Body, response::check_length},
    status::Status,
    store::{Tree, View},
};

/// Etcd's default `--max-txn-ops`; a larger transaction is for the upstream to judge.
const MOST_OPERATIONS: usize = 128;

impl Kv {
    pub(super) async fn txn(&self, call: Call<'_>) -> Result<Response<Body>, Status> {
        let Ok(request) = TxnRequest::decode(call.message.clone()) else {
            return Ok(self.forward_unread(call).await);
        };
        let Some(reads) = Reads::of(&request) else {
            self.metrics.count("Txn", "writes");
            return Ok(self.forward_txn(call, &request).await);
        };
        match self.answer_reads(&request, &reads).await {
            Ok(answer) => {
                let answer = answer?;
                self.metrics.count("Txn", "memory");
                Ok(answer)
            }
            Err(why) => {
                self.metrics.count("Txn", why);
                let read = || self.answer_reads(&request, &reads).boxed();
                unless_memory_can(self.forward_txn(call, &request), read).await
            }
        }
    }

    async fn forward_txn(&self, call: Call<'_>, request: &TxnRequest) -> Response<Body> {
        if goes_through_consensus(request) {
            return self.forward(call, Evidence::Proof).await;
        }
        let asking = through_consensus(request.clone());
        if !goes_through_consensus(&asking) {
            return self.forward(call, Evidence::Hearsay).await;
        }
        self.forward_hearsay(call, || asking.encode_to_vec()).await
    }

    async fn answer_reads(&self, request: &TxnRequest, reads: &Reads<'_>) -> Answered {
        let range = reads.hull().ok_or("not_cached")?;
        let view = match self.view(&range, 0, reads.serializable).await {
            Ok(view) => view,
            Err(why) => return unserved(why),
        };
        let Some(tree) = &view.tree else { return Err("over_limit") };
        let keys = request.compare.iter().map(|compare| tree.sums_in(&compared(compare)).keys).sum();
        let succeeded = aside::walk(keys, || request.compare.iter().all(|compare| holds(tree, compare)));
        let branch = if succeeded { &reads.success } else { &reads.failure };
        let mut sections = vec![answer::opening(&view, succeeded)];
        let mut length = sections.iter().map(Section::len).sum();
        for read in branch {
            let section = self.section(&view, read)?;
            length += section.len();
            sections.push(section);
            // A short request may ask for everything many times over, and even what a sort puts in a list is not little.
            if let Err(refusal) = check_length(length, self.longest()) {
                return Ok(Err(refusal));
            }
        }
        Ok(Ok(self.with_age(&range, answer::sections(&self.holder, sections, length))))
    }

    /// The answer to one read.
    fn section(&self, view: &View, request: &RangeRequest) -> Result<Section, &'static str> {
        let selection = self
            .evaluate(view, &range_of(request), request)
            .map_err(|_| "compacted")?
            .ok_or("revision_not_in_memory")?;
        Ok(answer::nested_range(view, selection, self.values(request)))
    }
}

/// A transaction that only reads, taken apart.
struct Reads<'a> {
    success: Vec<&'a RangeRequest>,
    failure: Vec<&'a RangeRequest>,
    compares: &'a [Compare],
    /// Every read says that it is; then etcd asks no consensus for the compares either.
    serializable: bool,
}

impl<'a> Reads<'a> {
    /// None when the transaction does more than read, or is one that etcd would refuse. It judges revisions in a
    /// transaction by rules of its own, and compares that are unknown here by those of its version: both are left to it.
    fn of(request: &'a TxnRequest) -> Option<Self> {
        let branch = |operations: &'a [RequestOp]| operations.iter().map(read_of).collect::<Option<Vec<_>>>();
        let (success, failure) = (branch(&request.success)?, branch(&request.failure)?);
        let mut all = success.iter().chain(&failure);
        let sound = validate::txn(request, MOST_OPERATIONS).is_ok()
            && request.compare.iter().all(is_known)
            && all.clone().all(|read| read.revision == 0);
        let serializable = all.all(|read| read.serializable);
        sound.then_some(Self { success, failure, compares: &request.compare, serializable })
    }

    /// The smallest range that covers everything that is looked at; none when nothing is.
    fn hull(&self) -> Option<KeyRange> {
        let reads = self.success.iter().chain(&self.failure).map(|read| range_of(read));
        let ranges = self.compares.iter().map(compared).chain(reads);
        ranges.reduce(|hull, range| KeyRange {
            start: hull.start.min(range.start),
            end: match (hull.end, range.end) {
                (Some(hull), Some(end)) => Some(hull.max(end)),
                _ => None,
            },
        })
    }
}

/// Whether etcd puts the transaction through consensus: it writes, nests another one, or has a read that is not
/// serializable. One without operations is answered by one member as it stands.
fn goes_through_consensus(request: &TxnRequest) -> bool {
    let mut operations = request.success.iter().chain(&request.failure);
    operations.any(|operation| read_of(operation).is_none_or(|read| !read.serializable))
}

/// The same transaction, put so that etcd takes it through consensus, provided that it has a read.
fn through_consensus(mut request: TxnRequest) -> TxnRequest {
    for operation in request.success.iter_mut().chain(&mut request.failure) {
        if let Some(Operation::RequestRange(read)) = &mut operation.request {
            read.serializable = false;
        }
    }
    request
}

/// Whether a compare holds for every key of its range, or for the key that is not there.
fn holds(tree: &Tree, compare: &Compare) -> bool {
    let range = compared(compare);
    let mut found = tree.range(&range).peekable();
    if found.peek().is_none() {
        return holds_for_none(compare);
    }
    match is_by_value(compare) {
        true => found.all(|record| value_holds(compare, record.value())),
        false => found.all(|record| number_holds(compare, record)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        proto::etcdserverpb::{
            PutRequest,
            compare::{CompareResult, CompareTarget, TargetUnion},
        },
        store::{Record, Revision},
    };

    fn read(key: &'static str, serializable: bool) -> RequestOp {
        let range = RangeRequest { key: key.into(), serializable, ..Default::default() };
        RequestOp { request: Some(Operation::RequestRange(range)) }
    }

    fn put() -> RequestOp {
        RequestOp { request: Some(Operation::RequestPut(PutRequest::default())) }
    }

    #[test]
    fn only_what_goes_through_consensus_is_proof() {
        let txn = |success: Vec<RequestOp>, failure: Vec<RequestOp>| TxnRequest { compare: vec![], success, failure };
        assert!(!goes_through_consensus(&txn(vec![], vec![])));
        assert!(!goes_through_consensus(&txn(vec![read("a", true)], vec![])));
        assert!(goes_through_consensus(&txn(vec![read("a", true)], vec![read("a", false)])));
        assert!(goes_through_consensus(&txn(vec![], vec![put()])));
        assert!(goes_through_consensus(&txn(vec![RequestOp { request: None }], vec![])));
    }

    #[test]
    fn what_writes_or_would_be_refused_is_not_for_us() {
        let txn = |success: Vec<RequestOp>| TxnRequest { success, ..Default::default() };
        assert!(Reads::of(&txn(vec![read("a", true)])).is_some_and(|reads| reads.serializable));
        assert!(Reads::of(&txn(vec![put()])).is_none());
        assert!(Reads::of(&txn(vec![read("", true)])).is_none());
        assert!(Reads::of(&txn(vec![read("a", true); 129])).is_none());
    }

    #[test]
    fn compares_hold_as_in_etcd() {
        let tree: Tree = [Record::new(b"a", b"v", Revision(2), Revision(4), 3, 9)].into_iter().collect();
        let compare = |key: &'static str, target, result: CompareResult, union| Compare {
            key: key.into(),
            target: target as i32,
            result: result as i32,
            target_union: union,
            ..Default::default()
        };
        let value = |text: &'static str| Some(TargetUnion::Value(text.into()));
        assert!(holds(&tree, &compare("a", CompareTarget::Value, CompareResult::Equal, value("v"))));
        assert!(holds(&tree, &compare("a", CompareTarget::Value, CompareResult::Greater, value("u"))));
        assert!(!holds(&tree, &compare("b", CompareTarget::Value, CompareResult::NotEqual, value("v"))));
        assert!(holds(&tree, &compare("b", CompareTarget::Version, CompareResult::Equal, None)));
        assert!(holds(&tree, &compare("a", CompareTarget::Lease, CompareResult::Less, Some(TargetUnion::Lease(10)))));
        let from = Compare {
            range_end: vec![0].into(),
            ..compare("a", CompareTarget::Mod, CompareResult::Greater, Some(TargetUnion::ModRevision(3)))
        };
        assert!(holds(&tree, &from));
    }
}
