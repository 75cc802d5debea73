//! Walking the index in key order.

use std::{slice, sync::Arc};

use super::{
    Sums,
    node::{Child, Node, route},
    sorted::Entry,
};
use crate::store::Record;

/// The records of a tree from some key on, in order.
pub struct Iter<'a> {
    leaves: Leaves<'a>,
    leaf: slice::Iter<'a, Entry<Record>>,
}

impl<'a> Iter<'a> {
    pub(super) fn new(root: &'a Arc<Node>, sums: Sums, start: &[u8]) -> Self {
        Self { leaves: Leaves::new(root, sums, start), leaf: [].iter() }
    }
}

impl<'a> Iterator for Iter<'a> {
    type Item = &'a Record;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(entry) = self.leaf.next() {
                return Some(entry.item());
            }
            let leaf = self.leaves.next()?;
            self.leaf = leaf.node.records_from(leaf.from);
        }
    }
}

/// The runs of a tree from some key on, in order: one for each leaf.
pub struct Runs<'a>(Leaves<'a>);

impl<'a> Runs<'a> {
    pub(super) fn new(root: &'a Arc<Node>, sums: Sums, start: &[u8]) -> Self {
        Self(Leaves::new(root, sums, start))
    }
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let Leaf { node, sums, from } = self.0.next()?;
        Some(Run { leaf: node.clone(), sums, from, until: node.len() })
    }
}

/// Neighbouring records. They stay what they were for as long as somebody holds them.
#[derive(Clone, Debug)]
pub struct Run {
    leaf: Arc<Node>,
    /// Those of the whole leaf.
    sums: Sums,
    from: usize,
    until: usize,
}

impl Run {
    /// What all records amount to that are kept in memory by this: those of the leaf.
    pub fn kept(&self) -> Sums {
        self.sums
    }

    /// What the records amount to. Of a whole leaf that is known without a look at them.
    pub fn sums(&self) -> Sums {
        if self.len() as u64 == self.sums.keys { self.sums } else { self.records().map(Sums::of).sum() }
    }

    /// How many records there are.
    pub fn len(&self) -> usize {
        self.until - self.from
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The `at`th record, counted from zero.
    pub fn get(&self, at: usize) -> Option<&Record> {
        let entry = self.leaf.records_from(self.from).nth(at);
        entry.filter(|_| at < self.len()).map(Entry::item)
    }

    /// All records.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.leaf.records_from(self.from).take(self.len()).map(Entry::item)
    }

    /// Leaves out all records but the first `len`.
    pub fn truncate(&mut self, len: usize) {
        self.until = self.until.min(self.from.saturating_add(len));
    }

    /// Leaves out the first `count` records.
    pub fn advance(&mut self, count: usize) {
        self.from = self.until.min(self.from.saturating_add(count));
    }
}

/// The leaves of a tree from some key on, in order.
struct Leaves<'a> {
    /// What is still to come of each inner node on the path to the current leaf, the root's first.
    path: Vec<slice::Iter<'a, Entry<Child>>>,
    first: Option<Leaf<'a>>,
}

/// A leaf, and where in it to begin.
struct Leaf<'a> {
    node: &'a Arc<Node>,
    sums: Sums,
    from: usize,
}

impl<'a> Leaves<'a> {
    fn new(root: &'a Arc<Node>, sums: Sums, start: &[u8]) -> Self {
        let mut leaves = Self { path: Vec::with_capacity(6), first: None };
        let (mut node, mut sums) = (root, sums);
        loop {
            match &**node {
                Node::Inner(children) => {
                    let mut onwards = children.entries_from(route(children, start));
                    let Some(child) = onwards.next() else { return leaves };
                    leaves.path.push(onwards);
                    (node, sums) = (&child.item().node, child.item().sums);
                }
                Node::Leaf(records) => {
                    leaves.first = Some(Leaf { node, sums, from: records.find(start).unwrap_or_else(|at| at) });
                    return leaves;
                }
            }
        }
    }
}

impl<'a> Iterator for Leaves<'a> {
    type Item = Leaf<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.first.is_some() {
            return self.first.take();
        }
        while let Some(siblings) = self.path.last_mut() {
            let Some(child) = siblings.next() else {
                self.path.pop();
                continue;
            };
            let Child { node, sums, .. } = child.item();
            match &**node {
                Node::Inner(children) => self.path.push(children.entries_from(0)),
                Node::Leaf(_) => return Some(Leaf { node, sums: *sums, from: 0 }),
            }
        }
        None
    }
}
