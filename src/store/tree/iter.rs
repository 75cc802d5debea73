//! Walking the index in key order.

use std::slice;

use super::{
    node::{Child, Node, route},
    sorted::Entry,
};
use crate::store::Record;

/// The records of a tree from some key on, in order.
pub struct Iter<'a> {
    /// What is still to come of each inner node on the path to the current leaf, the root's first.
    path: Vec<slice::Iter<'a, Entry<Child>>>,
    leaf: slice::Iter<'a, Entry<Record>>,
}

impl<'a> Iter<'a> {
    pub(super) fn new(root: &'a Node, start: &[u8]) -> Self {
        let mut iter = Self { path: Vec::with_capacity(6), leaf: [].iter() };
        let mut node = root;
        loop {
            match node {
                Node::Inner(children) => {
                    let mut onwards = children.entries_from(route(children, start));
                    let Some(child) = onwards.next() else { return iter };
                    iter.path.push(onwards);
                    node = &child.item().node;
                }
                Node::Leaf(records) => {
                    iter.leaf = records.entries_from(records.find(start).unwrap_or_else(|at| at));
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
            match &*child.item().node {
                Node::Inner(children) => self.path.push(children.entries_from(0)),
                Node::Leaf(records) => {
                    self.leaf = records.entries_from(0);
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
            if let Some(entry) = self.leaf.next() {
                return Some(entry.item());
            }
            if !self.next_leaf() {
                return None;
            }
        }
    }
}
