//! The nodes of the index: leaves of records, and inner nodes of children with their sums.

use std::{slice, sync::Arc};

use super::{
    Sums,
    sorted::{Entry, Keyed, Sorted},
};
use crate::store::Record;

/// The most entries of a node. Small enough that copying a path is cheap, large enough that the tree is shallow.
/// Tests use a small one, so that a few hundred keys make a deep tree.
pub(super) const CAPACITY: usize = if cfg!(test) { 6 } else { 32 };
/// At this fill or below a node is merged with a neighbour, if both fit into one.
const SPARSE: usize = CAPACITY / 4;

#[derive(Clone, Debug)]
pub(super) enum Node {
    Leaf(Sorted<Record>),
    Inner(Sorted<Child>),
}

/// A subtree, and what its parent knows of it.
#[derive(Clone, Debug)]
pub(super) struct Child {
    /// No key in the subtree sorts before this one, and every key in the subtrees to its left does.
    low: Arc<[u8]>,
    pub(super) sums: Sums,
    pub(super) node: Arc<Node>,
}

/// What an insertion did.
pub(super) enum Inserted {
    New,
    Replaced(Record),
}

impl Default for Node {
    fn default() -> Self {
        Self::Leaf(Sorted::default())
    }
}

impl Keyed for Record {
    fn key(&self) -> &[u8] {
        self.key()
    }
}

impl Keyed for Child {
    fn key(&self) -> &[u8] {
        &self.low
    }
}

impl Child {
    /// The subtree of `node`.
    fn new(node: Arc<Node>) -> Self {
        Self { low: node.low(), sums: node.sums(), node }
    }
}

impl Node {
    /// A root above what was the root and the sibling that it split off.
    pub(super) fn branch(left: Arc<Node>, right: Child) -> Self {
        let mut children = Sorted::default();
        children.insert(0, Child::new(left));
        children.insert(1, right);
        Self::Inner(children)
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Leaf(records) => records.len(),
            Self::Inner(children) => children.len(),
        }
    }

    /// The entries of a leaf from the `start`th on.
    pub(super) fn records_from(&self, start: usize) -> slice::Iter<'_, Entry<Record>> {
        match self {
            Self::Leaf(records) => records.entries_from(start),
            Self::Inner(_) => [].iter(),
        }
    }

    /// What no key in the subtree sorts before.
    fn low(&self) -> Arc<[u8]> {
        let low = match self {
            Self::Leaf(records) => records.get(0).map(|first| Arc::from(first.key())),
            Self::Inner(children) => children.get(0).map(|first| first.low.clone()),
        };
        low.unwrap_or_default()
    }

    pub(super) fn sums(&self) -> Sums {
        match self {
            Self::Leaf(records) => records.items().map(Sums::of).sum(),
            Self::Inner(children) => children.items().map(|child| child.sums).sum(),
        }
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<&Record> {
        match self {
            Self::Leaf(records) => records.get(records.find(key).ok()?),
            Self::Inner(children) => children.get(route(children, key))?.node.get(key),
        }
    }

    /// The sums of the keys that sort before `key`, of `all` that are in the subtree.
    pub(super) fn sums_below(&self, key: &[u8], all: Sums) -> Sums {
        match self {
            Self::Leaf(records) => {
                let at = records.find(key).unwrap_or_else(|at| at);
                sums_before(records, at, all, Sums::of)
            }
            Self::Inner(children) => {
                let at = route(children, key);
                let mut sums = sums_before(children, at, all, |child| child.sums);
                sums += children.get(at).map(|child| child.node.sums_below(key, child.sums)).unwrap_or_default();
                sums
            }
        }
    }

    /// The `n`th record of the subtree, counted from zero.
    pub(super) fn nth(&self, mut n: u64) -> Option<&Record> {
        match self {
            Self::Leaf(records) => records.get(usize::try_from(n).ok()?),
            Self::Inner(children) => {
                for child in children.items() {
                    if n < child.sums.keys {
                        return child.node.nth(n);
                    }
                    n -= child.sums.keys;
                }
                None
            }
        }
    }

    /// Puts `record` in; the second half of the answer is the right part of this node when it had to split.
    pub(super) fn insert(&mut self, record: Record) -> (Inserted, Option<Child>) {
        match self {
            Self::Leaf(records) => match records.find(record.key()) {
                Ok(at) => (Inserted::Replaced(records.replace(at, record)), None),
                Err(at) => {
                    records.insert(at, record);
                    (Inserted::New, split(records, at).map(|right| Child::new(Arc::new(Self::Leaf(right)))))
                }
            },
            Self::Inner(children) => {
                let at = match children.find(record.key()) {
                    Ok(at) => at,
                    Err(0) => lower(children, record.key()),
                    Err(after) => after - 1,
                };
                let Some(child) = children.get_mut(at) else { unreachable!("an inner node has children") };
                let added = Sums::of(&record);
                let (outcome, right) = Arc::make_mut(&mut child.node).insert(record);
                child.sums += added;
                if let Inserted::Replaced(old) = &outcome {
                    child.sums = child.sums - Sums::of(old);
                }
                let Some(right) = right else { return (outcome, None) };
                child.sums = child.sums - right.sums;
                children.insert(at + 1, right);
                (outcome, split(children, at + 1).map(|right| Child::new(Arc::new(Self::Inner(right)))))
            }
        }
    }

    pub(super) fn remove(&mut self, key: &[u8]) -> Option<Record> {
        match self {
            Self::Leaf(records) => records.find(key).ok().map(|at| records.remove(at)),
            Self::Inner(children) => {
                let at = route(children, key);
                let child = children.get_mut(at)?;
                let removed = Arc::make_mut(&mut child.node).remove(key)?;
                child.sums = child.sums - Sums::of(&removed);
                match child.node.len() {
                    0 => drop(children.remove(at)),
                    len if len <= SPARSE => merge(children, at),
                    _ => {}
                }
                Some(removed)
            }
        }
    }

    /// The child of a root that has but one left, which is then the better root.
    pub(super) fn only_child(&self) -> Option<Arc<Node>> {
        match self {
            Self::Inner(children) if children.len() == 1 => children.get(0).map(|only| only.node.clone()),
            _ => None,
        }
    }

    /// Whether nothing is left in this node.
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    #[cfg(test)]
    pub(super) fn leaves(&self) -> usize {
        match self {
            Self::Leaf(_) => 1,
            Self::Inner(children) => children.items().map(|child| child.node.leaves()).sum(),
        }
    }

    #[cfg(test)]
    pub(super) fn check(&self, root: bool) -> Sums {
        assert!(root || !self.is_empty(), "an empty node below the root");
        assert!(self.len() <= CAPACITY);
        match self {
            Self::Leaf(records) => records.check(),
            Self::Inner(children) => {
                children.check();
                for child in children.items() {
                    assert!(child.low <= child.node.low());
                    assert_eq!(child.node.check(false), child.sums);
                }
            }
        }
        self.sums()
    }
}

/// The child whose subtree `key` belongs to. A key below every bound belongs to the first.
pub(super) fn route(children: &Sorted<Child>, key: &[u8]) -> usize {
    children.find(key).unwrap_or_else(|at| at.saturating_sub(1))
}

/// The sums of the items before the `at`th, of `all`. Counts those on the side where there are fewer.
fn sums_before<T: Keyed>(sorted: &Sorted<T>, at: usize, all: Sums, of: impl Fn(&T) -> Sums) -> Sums {
    if at <= sorted.len() / 2 {
        sorted.before(at).map(of).sum()
    } else {
        all - sorted.entries_from(at).map(|entry| of(entry.item())).sum()
    }
}

/// Lets the first child take keys down to `key`; gives its place.
fn lower(children: &mut Sorted<Child>, key: &[u8]) -> usize {
    let first = children.remove(0);
    children.insert(0, Child { low: Arc::from(key), ..first });
    0
}

/// The right part of a node that overflowed when its `at`th was put in. One that grew at its right end is being filled in
/// order, as by a first list: then the left part stays full.
fn split<T: Keyed>(sorted: &mut Sorted<T>, at: usize) -> Option<Sorted<T>> {
    let len = sorted.len();
    let at_end = at + 1 == len;
    (len > CAPACITY).then(|| sorted.split_off(if at_end { len - 1 } else { len / 2 }))
}

/// Joins the sparse child at `at` with a neighbour, if both fit into one node.
fn merge(children: &mut Sorted<Child>, at: usize) {
    let left = at.saturating_sub(1);
    let len = |at| children.get(at).map(|child| child.node.len());
    let (Some(kept), Some(joined)) = (len(left), len(left + 1)) else { return };
    if kept + joined > CAPACITY {
        return;
    }
    let right = children.remove(left + 1);
    let Some(into) = children.get_mut(left) else { return };
    into.sums += right.sums;
    match (Arc::make_mut(&mut into.node), Arc::unwrap_or_clone(right.node)) {
        (Node::Leaf(records), Node::Leaf(more)) => records.append(more),
        (Node::Inner(grown), Node::Inner(more)) => grown.append(more),
        _ => unreachable!("all leaves are at one depth"),
    }
}
