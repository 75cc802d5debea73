//! The index: a B+tree ordered by key, copy-on-write, whose inner nodes know how much lies below them.
//!
//! A clone of a tree is a reference count; it stays as it was while the original goes on. A write copies only the nodes on
//! its path that a clone still shares, and changes the others in place. Because every inner node keeps the [`Sums`] of its
//! children, the size of any range, in keys or in bytes, costs O(log n).

mod iter;
mod node;
mod sorted;

use std::sync::Arc;

pub use iter::{Iter, Run, Runs};
use node::{Inserted, Node};

use super::Record;
use crate::rules::KeyRange;

/// What a run of records amounts to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// How many keys.
    pub keys: u64,
    /// Bytes of the records as repeated fields of a Range answer, tags and lengths included.
    pub wire: u64,
}

impl Sums {
    /// The sums of one record.
    pub fn of(record: &Record) -> Self {
        Self { keys: 1, wire: record.field().len() as u64 }
    }
}

impl std::ops::AddAssign for Sums {
    fn add_assign(&mut self, other: Self) {
        self.keys += other.keys;
        self.wire += other.wire;
    }
}

impl std::ops::Sub for Sums {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self { keys: self.keys - other.keys, wire: self.wire - other.wire }
    }
}

impl std::iter::Sum for Sums {
    fn sum<I: Iterator<Item = Self>>(items: I) -> Self {
        items.fold(Self::default(), |mut total, item| {
            total += item;
            total
        })
    }
}

/// An ordered map from keys to records. Cheap to clone; clones share what they have in common.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    root: Arc<Node>,
    sums: Sums,
}

impl Tree {
    /// The sums of the whole tree.
    pub fn sums(&self) -> Sums {
        self.sums
    }

    /// How many keys there are.
    pub fn len(&self) -> u64 {
        self.sums.keys
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The record of `key`. O(log n).
    pub fn get(&self, key: &[u8]) -> Option<&Record> {
        self.root.get(key)
    }

    /// Puts `record` in; gives back the record of the same key that it replaced. O(log n).
    pub fn insert(&mut self, record: Record) -> Option<Record> {
        let added = Sums::of(&record);
        let (outcome, split) = Arc::make_mut(&mut self.root).insert(record);
        if let Some(right) = split {
            let left = std::mem::take(&mut self.root);
            self.root = Arc::new(Node::branch(left, right));
        }
        self.sums += added;
        match outcome {
            Inserted::New => None,
            Inserted::Replaced(old) => {
                self.sums = self.sums - Sums::of(&old);
                Some(old)
            }
        }
    }

    /// Takes the record of `key` out. O(log n).
    pub fn remove(&mut self, key: &[u8]) -> Option<Record> {
        self.get(key)?;
        let removed = Arc::make_mut(&mut self.root).remove(key)?;
        while let Some(only) = self.root.only_child() {
            self.root = only;
        }
        if self.root.is_empty() {
            self.root = Arc::default();
        }
        self.sums = self.sums - Sums::of(&removed);
        Some(removed)
    }

    /// The sums of the keys in `range`. O(log n).
    pub fn sums_in(&self, range: &KeyRange) -> Sums {
        if range.is_empty() {
            return Sums::default();
        }
        let below = |key: &[u8]| self.root.sums_below(key, self.sums);
        range.end.as_ref().map_or(self.sums, |end| below(end)) - below(&range.start)
    }

    /// The `n`th record, counted from zero, at or after `start`. O(log n).
    pub fn nth_from(&self, start: &[u8], n: u64) -> Option<&Record> {
        self.root.nth(self.root.sums_below(start, self.sums).keys.checked_add(n)?)
    }

    /// The records from the first key at or after `start`, in order. O(log n) to begin, O(1) for each.
    pub fn iter_from(&self, start: &[u8]) -> Iter<'_> {
        Iter::new(&self.root, self.sums, start)
    }

    /// The same records as runs, which outlive the tree.
    pub fn runs_from(&self, start: &[u8]) -> Runs<'_> {
        Runs::new(&self.root, self.sums, start)
    }

    /// The records in `range`, in order.
    pub fn range<'a>(&'a self, range: &'a KeyRange) -> impl Iterator<Item = &'a Record> + 'a {
        self.iter_from(&range.start)
            .take_while(move |record| range.end.as_ref().is_none_or(|end| record.key() < &end[..]))
    }

    /// Checks order, sums and fill of every node; for tests.
    #[cfg(test)]
    pub(crate) fn check(&self) {
        assert_eq!(self.root.check(true), self.sums);
        let keys: Vec<_> = self.iter_from(b"").map(|record| record.key()).collect();
        assert!(keys.is_sorted_by(|a, b| a < b));
    }
}

impl FromIterator<Record> for Tree {
    fn from_iter<I: IntoIterator<Item = Record>>(records: I) -> Self {
        let mut tree = Self::default();
        for record in records {
            tree.insert(record);
        }
        tree
    }
}

#[cfg(test)]
mod tests;
