//! What a Range request asks for: keys, order, filters and limit, as etcd reads them. The request has passed
//! [`super::validate::range`].

use std::cmp::Ordering;

use super::{KeyRange, Number, Numbers};
use crate::proto::etcdserverpb::{
    RangeRequest, RequestOp,
    range_request::{SortOrder, SortTarget},
    request_op::Request,
};

/// The keys that `request` asks for.
pub fn range_of(request: &RangeRequest) -> KeyRange {
    KeyRange::from_request(&request.key, &request.range_end)
}

/// The Range request that an operation of a transaction is, if it is one.
pub fn read_of(operation: &RequestOp) -> Option<&RangeRequest> {
    match &operation.request {
        Some(Request::RequestRange(request)) => Some(request),
        _ => None,
    }
}

/// How many records are sent at most; without a limit, any number.
pub fn limit(request: &RangeRequest) -> usize {
    usize::try_from(request.limit).ok().filter(|limit| *limit > 0).unwrap_or(usize::MAX)
}

/// How many records are fetched at most before they are sorted. As etcd does it: without an explicit order the limit
/// comes first, even where there is a target. One more than the limit shows whether there are more.
pub fn most_fetched(request: &RangeRequest) -> usize {
    if is_default_order(request) && !has_filters(request) { limit(request).saturating_add(1) } else { usize::MAX }
}

/// Whether the answer is a run of the keys as they lie: in their own order, and none of them filtered out.
pub fn is_run(request: &RangeRequest) -> bool {
    in_key_order(request) && !has_filters(request)
}

/// Whether the order is that of keys by etcd's notion, which takes "no order" for it even where the target is another.
pub fn is_default_order(request: &RangeRequest) -> bool {
    request.sort_order() == SortOrder::None || in_key_order(request)
}

fn in_key_order(request: &RangeRequest) -> bool {
    request.sort_target() == SortTarget::Key && request.sort_order() != SortOrder::Descend
}

/// Whether the order is that of values.
pub fn is_by_value(request: &RangeRequest) -> bool {
    request.sort_target() == SortTarget::Value
}

/// Whether the request asks for revisions above or below some bound.
pub fn has_filters(request: &RangeRequest) -> bool {
    request.min_mod_revision != 0
        || request.max_mod_revision != 0
        || request.min_create_revision != 0
        || request.max_create_revision != 0
}

/// Whether `record` passes the request's filters; 0 is no filter, any other number is one.
pub fn passes(record: &impl Numbers, request: &RangeRequest) -> bool {
    let within = |number: Number, min: i64, max: i64| {
        let revision = record.number_of(number);
        (max == 0 || revision <= max) && (min == 0 || revision >= min)
    };
    !has_filters(request)
        || within(Number::Mod, request.min_mod_revision, request.max_mod_revision)
            && within(Number::Create, request.min_create_revision, request.max_create_revision)
}

/// Puts records, which are in the order of keys, into the request's own, unless that is [by value](is_by_value). Ties
/// stay in the order of keys.
pub fn sort<T: Numbers>(records: &mut [T], request: &RangeRequest) {
    match request.sort_target() {
        SortTarget::Key if descends(request) => records.reverse(),
        SortTarget::Key | SortTarget::Value => {}
        SortTarget::Version => sort_by_number(records, request, |record| record.number_of(Number::Version)),
        SortTarget::Create => sort_by_number(records, request, |record| record.number_of(Number::Create)),
        SortTarget::Mod => sort_by_number(records, request, |record| record.number_of(Number::Mod)),
    }
}

/// Reads each number once: some have to be looked for in the record's bytes. A function for each number, so that none asks
/// anew for every record which one is meant.
fn sort_by_number<T>(records: &mut [T], request: &RangeRequest, number: impl Fn(&T) -> i64) {
    let descends = descends(request);
    // The complement turns the order of integers around, and has no overflow.
    records.sort_by_cached_key(|record| if descends { !number(record) } else { number(record) });
}

/// Puts records, which are in the order of keys, into the order of their values. Ties stay in the order of keys.
pub fn sort_by_value<T>(records: &mut [T], request: &RangeRequest, value: impl Fn(&T) -> &[u8]) {
    let descends = descends(request);
    let directed = |ordering: Ordering| if descends { ordering.reverse() } else { ordering };
    records.sort_by(|a, b| directed(value(a).cmp(value(b))));
}

fn descends(request: &RangeRequest) -> bool {
    request.sort_order() == SortOrder::Descend
}
