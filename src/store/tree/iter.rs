//! Walking the index in key order.

use std::slice;

use super::node::{Child, Node, route};
use crate::store::Record;

/// The records of a tree from some key on, in order.
pub struct Iter<'a> {
    /// What is still to come of each inner node on the path to the current leaf, the root's first.
    path: Vec<slice::Iter<'a, Child>>,
    leaf: slice::Iter<'a, Record>,
}

impl<'a> Iter<'a> {
    pub(super) fn new(root: &'a Node, start: &[u8]) -> Self {
        let mut iter = Self { path: Vec::with_capacity(6), leaf: [].iter() };
        let mut node = root;
        loop {
            match node {
                Node::Inner(children) => {
                    let at = route(children, start);
                    iter.path.push(children[at + 1..].iter());
                    node = &children[at].node;
                }
                Node::Leaf(records) => {
                    let at = records.partition_point(|record| record.key() < start);
                    iter.leaf = records[at..].iter();
                    return iter;
                }
            }
        }
    }

    /// Goes to the first leaf right of the current one; false when there is none.
    fn next_leaf(&mut self) -> bool {
        while let Some(siblings) = self.path.last_mut() {
            let Some(child) = siblings.next() else {
                self.path.pop();
                continue;
            };
            match &*child.node {
                Node::Inner(children) => self.path.push(children.iter()),
                Node::Leaf(records) => {
                    self.leaf = records.iter();
                    return true;
                }
            }
        }
        false
    }
}

impl<'a> Iterator for Iter<'a> {
    type Item = &'a Record;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(record) = self.leaf.next() {
                return Some(record);
            }
            if !self.next_leaf() {
                return None;
            }
        }
    }
}
