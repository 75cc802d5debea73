//! What a Range request selects from a view: the records in their order, and the count beside them.
//!
//! In key order a selection is a run of the tree, whose size is known without a look at its records; in any other order,
//! or behind a revision filter, it is a list.

use std::borrow::Cow;

use bytes::Bytes;

use super::{Record, Revision, Sums, Tree, View};
use crate::{
    proto::etcdserverpb::RangeRequest,
    rules::{
        KeyRange,
        range::{is_by_value, is_run, limit, most_fetched, passes, sort, sort_by_value},
    },
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
    let selected = record.filter(|record| !request.count_only && passes(*record, request));
    Selection { count, more: false, records: Records::list(selected.cloned().into_iter().collect()) }
}

fn select_in(tree: Cow<'_, Tree>, range: KeyRange, request: &RangeRequest) -> Selection {
    let sums = tree.sums_in(&range);
    if request.count_only {
        return Selection { count: sums.keys, more: false, records: Records::NONE };
    }
    let limit = limit(request);
    if is_run(request) {
        return select_run(tree.into_owned(), range, sums, limit as u64);
    }
    let mut records: Vec<_> =
        tree.range(&range).take(most_fetched(request)).filter(|record| passes(*record, request)).cloned().collect();
    if is_by_value(request) {
        sort_by_value(&mut records, request, Record::value);
    } else {
        sort(&mut records, request);
    }
    let more = records.len() > limit;
    records.truncate(limit);
    Selection { count: sums.keys, more, records: Records::list(records) }
}

fn select_run(tree: Tree, mut range: KeyRange, sums: Sums, limit: u64) -> Selection {
    let count = sums.keys;
    if count <= limit {
        return Selection { count, more: false, records: Records::Run(tree, range.start, sums) };
    }
    let first_left_out = tree.nth_from(&range.start, limit).map(|record| record.key().to_vec());
    range.end = first_left_out.map(Into::into).or(range.end);
    let sums = tree.sums_in(&range);
    Selection { count, more: true, records: Records::Run(tree, range.start, sums) }
}

#[cfg(test)]
mod tests;
