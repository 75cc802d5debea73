//! What a Range request selects from a view: etcd's filters, sort orders and limits, and the count beside them.
//!
//! In key order a selection is a run of the tree, whose size is known without a look at its records; in any other order,
//! or behind a revision filter, it is a list.

use std::borrow::Cow;

use bytes::Bytes;

use super::{Record, Revision, Sums, Tree, View};
use crate::{
    proto::etcdserverpb::{
        RangeRequest,
        range_request::{SortOrder, SortTarget},
    },
    rules::KeyRange,
};

/// Why a view cannot answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// The revision lies after the view's own; the upstream may be further.
    #[error("the revision lies after the cache's own")]
    Future,
    /// The revision has been compacted.
    #[error("the revision has been compacted")]
    Compacted,
    /// Only the upstream can tell: the revision lies before the history window, or there is no index.
    #[error("the revision is not in memory")]
    NotInMemory,
}

/// What a request selects.
#[derive(Clone, Debug)]
pub struct Selection {
    /// Keys in the range, whatever the limit and the filters.
    pub count: u64,
    /// Whether the limit cut something off.
    pub more: bool,
    /// The records to send.
    pub records: Records,
}

/// Records to send, in order.
#[derive(Clone, Debug)]
pub enum Records {
    /// A run of a tree from a key on, in key order, and what it amounts to.
    Run(Tree, Bytes, Sums),
    /// Any records, and what they amount to.
    List(Vec<Record>, Sums),
}

impl Records {
    const NONE: Self = Self::List(Vec::new(), Sums { keys: 0, wire: 0 });

    /// These records in this order.
    pub fn list(records: Vec<Record>) -> Self {
        let sums = records.iter().map(Sums::of).sum();
        Self::List(records, sums)
    }

    /// How many records there are.
    pub fn len(&self) -> u64 {
        self.sums().keys
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `each` with all records in their order.
    pub fn for_each(&self, each: impl FnMut(&Record)) {
        match self {
            Self::Run(tree, start, sums) => tree.iter_from(start).take(sums.keys as usize).for_each(each),
            Self::List(records, _) => records.iter().for_each(each),
        }
    }

    /// What the records amount to.
    pub fn sums(&self) -> Sums {
        match self {
            Self::Run(_, _, sums) | Self::List(_, sums) => *sums,
        }
    }
}

/// The keys that `request` asks for.
pub fn range_of(request: &RangeRequest) -> KeyRange {
    KeyRange::from_request(&request.key, &request.range_end)
}

/// Evaluates `request`, whose range is `range`, on `view`. The request's key, sort order and target have been checked.
pub fn select(view: &View, range: &KeyRange, request: &RangeRequest) -> Result<Selection, RangeError> {
    let tree = tree_for(view, Revision(request.revision))?;
    if range.is_single() {
        return Ok(select_one(tree.get(&range.start), request));
    }
    Ok(select_in(tree, range.clone(), request))
}

/// At most how many records [`select`] looks at one by one: none where counts in the tree tell what it takes.
pub fn walked(view: &View, range: &KeyRange, request: &RangeRequest) -> u64 {
    if range.is_single() || request.count_only || is_run(request) {
        return 0;
    }
    let keys = view.tree.as_ref().map_or(0, |tree| tree.sums_in(range).keys);
    keys.min(most_fetched(request) as u64)
}

/// The tree at `revision`, where zero and less mean the view's own.
fn tree_for(view: &View, revision: Revision) -> Result<Cow<'_, Tree>, RangeError> {
    if revision > view.revision() {
        return Err(RangeError::Future);
    }
    if revision > Revision::ZERO && revision < view.compacted {
        return Err(RangeError::Compacted);
    }
    let revision = if revision > Revision::ZERO { revision } else { view.revision() };
    view.tree_at(revision).ok_or(RangeError::NotInMemory)
}

/// The most frequent of all reads, which needs one way down the tree only.
fn select_one(record: Option<&Record>, request: &RangeRequest) -> Selection {
    let count = u64::from(record.is_some());
    let selected = record.filter(|record| !request.count_only && passes(record, request));
    Selection { count, more: false, records: Records::list(selected.cloned().into_iter().collect()) }
}

fn select_in(tree: Cow<'_, Tree>, range: KeyRange, request: &RangeRequest) -> Selection {
    let sums = tree.sums_in(&range);
    if request.count_only {
        return Selection { count: sums.keys, more: false, records: Records::NONE };
    }
    let limit = u64::try_from(request.limit).unwrap_or(0);
    if is_run(request) {
        return select_run(tree.into_owned(), range, sums, limit);
    }
    let mut records: Vec<_> =
        tree.range(&range).take(most_fetched(request)).filter(|record| passes(record, request)).cloned().collect();
    sort(&mut records, request);
    let more = limit > 0 && records.len() as u64 > limit;
    if more {
        records.truncate(limit as usize);
    }
    Selection { count: sums.keys, more, records: Records::list(records) }
}

fn select_run(tree: Tree, mut range: KeyRange, sums: Sums, limit: u64) -> Selection {
    let count = sums.keys;
    if limit == 0 || count <= limit {
        return Selection { count, more: false, records: Records::Run(tree, range.start, sums) };
    }
    let first_left_out = tree.nth_from(&range.start, limit).map(|record| record.key().to_vec());
    range.end = first_left_out.map(Into::into).or(range.end);
    let sums = tree.sums_in(&range);
    Selection { count, more: true, records: Records::Run(tree, range.start, sums) }
}

/// Whether a run of the tree is what is asked for.
fn is_run(request: &RangeRequest) -> bool {
    in_key_order(request) && !has_filters(request)
}

/// How many records are fetched at most before they are sorted. As etcd does it: without an explicit order the limit comes first.
fn most_fetched(request: &RangeRequest) -> usize {
    if is_default_order(request) && !has_filters(request) && request.limit > 0 {
        usize::try_from(request.limit.saturating_add(1)).unwrap_or(usize::MAX)
    } else {
        usize::MAX
    }
}

fn in_key_order(request: &RangeRequest) -> bool {
    request.sort_target() == SortTarget::Key && request.sort_order() != SortOrder::Descend
}

/// Etcd's own notion, which takes "no order" for the order of keys even where the target is another.
fn is_default_order(request: &RangeRequest) -> bool {
    request.sort_order() == SortOrder::None || in_key_order(request)
}

/// Whether the request asks for revisions above or below some bound.
pub fn has_filters(request: &RangeRequest) -> bool {
    request.min_mod_revision != 0
        || request.max_mod_revision != 0
        || request.min_create_revision != 0
        || request.max_create_revision != 0
}

/// Whether the request asks for an order that a stream of chunks cannot have.
pub fn has_custom_order(request: &RangeRequest) -> bool {
    !is_default_order(request)
}

fn passes(record: &Record, request: &RangeRequest) -> bool {
    let within =
        |revision: Revision, min: i64, max: i64| (max == 0 || revision.0 <= max) && (min == 0 || revision.0 >= min);
    !has_filters(request)
        || within(record.mod_revision(), request.min_mod_revision, request.max_mod_revision)
            && within(record.create_revision(), request.min_create_revision, request.max_create_revision)
}

/// Sorts by the request's target; ties stay in the order of keys.
fn sort(records: &mut [Record], request: &RangeRequest) {
    let descending = request.sort_order() == SortOrder::Descend;
    let directed = |ordering: std::cmp::Ordering| if descending { ordering.reverse() } else { ordering };
    match request.sort_target() {
        SortTarget::Key => records.sort_by(|a, b| directed(a.key().cmp(b.key()))),
        SortTarget::Version => sort_by_number(records, descending, Record::version),
        SortTarget::Create => sort_by_number(records, descending, |record| record.create_revision().0),
        SortTarget::Mod => sort_by_number(records, descending, |record| record.mod_revision().0),
        SortTarget::Value => records.sort_by(|a, b| directed(a.value().cmp(b.value()))),
    }
}

/// Reads each number once: some have to be looked for in the record's bytes.
fn sort_by_number(records: &mut [Record], descending: bool, number: impl Fn(&Record) -> i64) {
    // The complement turns the order of integers around, and has no overflow.
    records.sort_by_cached_key(|record| if descending { !number(record) } else { number(record) });
}

#[cfg(test)]
mod tests;
