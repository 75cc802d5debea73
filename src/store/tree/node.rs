//! The nodes of the index: leaves of records, and inner nodes of children with their sums.

use std::sync::Arc;

use super::Sums;
use crate::store::Record;

/// The most entries of a node. Small enough that copying a path is cheap, large enough that the tree is shallow.
/// Tests use a small one, so that a few hundred keys make a deep tree.
pub(super) const CAPACITY: usize = if cfg!(test) { 6 } else { 32 };
/// At this fill or below a node is merged with a neighbour, if both fit into one.
const SPARSE: usize = CAPACITY / 4;

#[derive(Clone, Debug)]
pub(super) enum Node {
    Leaf(Vec<Record>),
    Inner(Vec<Child>),
}

/// A subtree, and what its parent knows of it.
#[derive(Clone, Debug)]
pub(super) struct Child {
    /// No key in the subtree sorts before this one, and every key in the subtrees to its left does.
    pub(super) low: Arc<[u8]>,
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
        Self::Leaf(Vec::new())
    }
}

impl Child {
    fn new(low: Arc<[u8]>, node: Arc<Node>) -> Self {
        Self { low, sums: node.sums(), node }
    }
}

impl Node {
    /// A root above what was the root and the sibling that it split off.
    pub(super) fn branch(left: Arc<Node>, right: Child) -> Self {
        Self::Inner(vec![Child::new(Arc::from(&[][..]), left), right])
    }

    fn len(&self) -> usize {
        match self {
            Self::Leaf(records) => records.len(),
            Self::Inner(children) => children.len(),
        }
    }

    pub(super) fn sums(&self) -> Sums {
        match self {
            Self::Leaf(records) => records.iter().map(Sums::of).sum(),
            Self::Inner(children) => children.iter().map(|child| child.sums).sum(),
        }
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<&Record> {
        match self {
            Self::Leaf(records) => find(records, key).ok().map(|at| &records[at]),
            Self::Inner(children) => children[route(children, key)].node.get(key),
        }
    }

    /// The sums of the keys that sort before `key`.
    pub(super) fn sums_below(&self, key: &[u8]) -> Sums {
        match self {
            Self::Leaf(records) => {
                let at = find(records, key).unwrap_or_else(|at| at);
                records[..at].iter().map(Sums::of).sum()
            }
            Self::Inner(children) => {
                let at = route(children, key);
                let mut sums: Sums = children[..at].iter().map(|child| child.sums).sum();
                sums += children[at].node.sums_below(key);
                sums
            }
        }
    }

    /// The `n`th record of the subtree, counted from zero.
    pub(super) fn nth(&self, mut n: u64) -> Option<&Record> {
        match self {
            Self::Leaf(records) => records.get(usize::try_from(n).ok()?),
            Self::Inner(children) => {
                for child in children {
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
            Self::Leaf(records) => match find(records, record.key()) {
                Ok(at) => (Inserted::Replaced(std::mem::replace(&mut records[at], record)), None),
                Err(at) => {
                    let at_end = at == records.len();
                    records.insert(at, record);
                    (Inserted::New, split_leaf(records, at_end))
                }
            },
            Self::Inner(children) => {
                let at = route(children, record.key());
                let added = Sums::of(&record);
                let child = &mut children[at];
                let (outcome, split) = Arc::make_mut(&mut child.node).insert(record);
                child.sums += added;
                if let Inserted::Replaced(old) = &outcome {
                    child.sums = child.sums - Sums::of(old);
                }
                let at_end = at + 1 == children.len();
                if let Some(right) = split {
                    children[at].sums = children[at].sums - right.sums;
                    children.insert(at + 1, right);
                }
                (outcome, split_inner(children, at_end))
            }
        }
    }

    pub(super) fn remove(&mut self, key: &[u8]) -> Option<Record> {
        match self {
            Self::Leaf(records) => find(records, key).ok().map(|at| records.remove(at)),
            Self::Inner(children) => {
                let at = route(children, key);
                let child = &mut children[at];
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
            Self::Inner(children) if children.len() == 1 => Some(children[0].node.clone()),
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
            Self::Inner(children) => children.iter().map(|child| child.node.leaves()).sum(),
        }
    }

    #[cfg(test)]
    pub(super) fn check(&self, root: bool) -> Sums {
        assert!(root || !self.is_empty(), "an empty node below the root");
        assert!(self.len() <= CAPACITY);
        if let Self::Inner(children) = self {
            for child in children {
                assert_eq!(child.node.check(false), child.sums);
            }
        }
        self.sums()
    }
}

/// Where `key` stands among `records`, or where it would.
fn find(records: &[Record], key: &[u8]) -> Result<usize, usize> {
    records.binary_search_by(|record| record.key().cmp(key))
}

/// The child whose subtree `key` belongs to. A key below every bound belongs to the first.
pub(super) fn route(children: &[Child], key: &[u8]) -> usize {
    children.partition_point(|child| *child.low <= *key).saturating_sub(1)
}

/// Where to split a node that overflowed. One that grew at its right end is being filled in order, as by a first list:
/// then the left part stays full.
fn split_point(len: usize, at_end: bool) -> usize {
    if at_end { len - 1 } else { len / 2 }
}

fn split_leaf(records: &mut Vec<Record>, at_end: bool) -> Option<Child> {
    if records.len() <= CAPACITY {
        return None;
    }
    let right = records.split_off(split_point(records.len(), at_end));
    records.shrink_to_fit();
    let low = Arc::from(right[0].key());
    Some(Child::new(low, Arc::new(Node::Leaf(right))))
}

fn split_inner(children: &mut Vec<Child>, at_end: bool) -> Option<Child> {
    if children.len() <= CAPACITY {
        return None;
    }
    let right = children.split_off(split_point(children.len(), at_end));
    let low = right[0].low.clone();
    Some(Child::new(low, Arc::new(Node::Inner(right))))
}

/// Joins the sparse child at `at` with a neighbour, if both fit into one node.
fn merge(children: &mut Vec<Child>, at: usize) {
    let left = at.saturating_sub(1);
    let Some(right) = children.get(left + 1) else { return };
    if children[left].node.len() + right.node.len() > CAPACITY {
        return;
    }
    let right = children.remove(left + 1);
    let into = &mut children[left];
    into.sums += right.sums;
    match (Arc::make_mut(&mut into.node), Arc::unwrap_or_clone(right.node)) {
        (Node::Leaf(records), Node::Leaf(more)) => records.extend(more),
        (Node::Inner(grown), Node::Inner(mut more)) => {
            // The first child of a node takes every key down to the node's own bound, which may lie below the child's.
            if let Some(first) = more.first_mut() {
                first.low = right.low;
            }
            grown.extend(more);
        }
        _ => unreachable!("all leaves are at one depth"),
    }
}
