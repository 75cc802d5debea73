//! Which watchers does an event concern? An index from ranges to watchers, so that nobody is asked in vain.
//!
//! Watchers of one key stand in a hash map. All others stand in a treap ordered by range, one node for each distinct
//! range, whose nodes know how far right their subtree reaches: finding the ranges over a key costs O(log n) and a step for
//! each range found.

use std::{cmp::Ordering, collections::HashMap};

use bytes::Bytes;

use crate::rules::KeyRange;

/// Something that stands in a [`RangeIndex`] and remembers where, so that it can be taken out at once.
pub trait Placed {
    /// The place that was set last.
    fn place(&self) -> usize;
    /// Called whenever the place changes.
    fn set_place(&self, place: usize);
}

/// An index from ranges to watchers.
pub struct RangeIndex<T> {
    single: HashMap<Bytes, Vec<T>>,
    nodes: Vec<Node<T>>,
    free: Vec<Link>,
    root: Link,
    /// Where the priorities come from, drawn anew for each index: who knew them could choose ranges that make a path of the tree,
    /// and its walks recurse.
    seed: u32,
}

/// The number of a node, or [`NONE`].
type Link = u32;
const NONE: Link = Link::MAX;

struct Node<T> {
    range: KeyRange,
    /// The furthest end in the subtree; `None` is open.
    reach: Option<Bytes>,
    priority: u32,
    left: Link,
    right: Link,
    members: Vec<T>,
}

impl<T> Default for RangeIndex<T> {
    fn default() -> Self {
        Self {
            single: HashMap::new(),
            nodes: Vec::new(),
            free: Vec::new(),
            root: NONE,
            seed: rand::random::<u32>() | 1,
        }
    }
}

impl<T: Placed> RangeIndex<T> {
    /// Adds `member` under `range`, which is not empty.
    pub fn insert(&mut self, range: &KeyRange, member: T) {
        let members = if range.is_single() {
            self.single.entry(range.start.clone()).or_default()
        } else {
            let node = self.find(range).unwrap_or_else(|| self.add(range.clone()));
            &mut self.nodes[node as usize].members
        };
        member.set_place(members.len());
        members.push(member);
    }

    /// Takes `member` out, which was inserted under `range`.
    pub fn remove(&mut self, range: &KeyRange, member: &T) {
        if range.is_single() {
            let Some(members) = self.single.get_mut(&range.start) else { return };
            take(members, member.place());
            if members.is_empty() {
                self.single.remove(&range.start);
            }
        } else if let Some(node) = self.find(range) {
            let members = &mut self.nodes[node as usize].members;
            take(members, member.place());
            if members.is_empty() {
                self.root = self.detach(self.root, range);
                self.nodes[node as usize].range = KeyRange::everything();
                self.free.push(node);
            }
        }
    }

    /// Calls `visit` with every member under a range that `key` lies in.
    pub fn visit<'a>(&'a self, key: &[u8], mut visit: impl FnMut(&'a T)) {
        if let Some(members) = self.single.get(key) {
            members.iter().for_each(&mut visit);
        }
        self.visit_below(self.root, key, &mut visit);
    }

    fn visit_below<'a>(&'a self, link: Link, key: &[u8], visit: &mut impl FnMut(&'a T)) {
        let Some(node) = self.node(link) else { return };
        if node.reach.as_ref().is_some_and(|reach| &reach[..] <= key) {
            return;
        }
        self.visit_below(node.left, key, visit);
        if &node.range.start[..] <= key {
            if node.range.contains(key) {
                node.members.iter().for_each(&mut *visit);
            }
            self.visit_below(node.right, key, visit);
        }
    }

    fn node(&self, link: Link) -> Option<&Node<T>> {
        self.nodes.get(link as usize)
    }

    fn find(&self, range: &KeyRange) -> Option<Link> {
        let mut link = self.root;
        loop {
            let node = self.node(link)?;
            link = match range.cmp(&node.range) {
                Ordering::Less => node.left,
                Ordering::Greater => node.right,
                Ordering::Equal => return Some(link),
            };
        }
    }

    fn add(&mut self, range: KeyRange) -> Link {
        // A xorshift: only the balance depends on it.
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 17;
        self.seed ^= self.seed << 5;
        let reach = range.end.clone();
        let node = Node { range, reach, priority: self.seed, left: NONE, right: NONE, members: Vec::new() };
        let link = match self.free.pop() {
            Some(link) => {
                self.nodes[link as usize] = node;
                link
            }
            None => {
                self.nodes.push(node);
                self.nodes.len() as Link - 1
            }
        };
        self.root = self.attach(self.root, link);
        link
    }

    /// Puts the node `new` into the subtree at `link`; gives back the subtree's root.
    fn attach(&mut self, link: Link, new: Link) -> Link {
        let Some(node) = self.node(link) else { return new };
        if self.nodes[new as usize].priority > node.priority {
            let (left, right) = self.split(link, new);
            self.nodes[new as usize].left = left;
            self.nodes[new as usize].right = right;
            self.update(new);
            return new;
        }
        if self.nodes[new as usize].range < node.range {
            self.nodes[link as usize].left = self.attach(node.left, new);
        } else {
            self.nodes[link as usize].right = self.attach(node.right, new);
        }
        self.update(link);
        link
    }

    /// Splits the subtree at `link` into what sorts before the range of `by`, and what sorts after.
    fn split(&mut self, link: Link, by: Link) -> (Link, Link) {
        let Some(node) = self.node(link) else { return (NONE, NONE) };
        if node.range < self.nodes[by as usize].range {
            let (left, right) = self.split(node.right, by);
            self.nodes[link as usize].right = left;
            self.update(link);
            (link, right)
        } else {
            let (left, right) = self.split(node.left, by);
            self.nodes[link as usize].left = right;
            self.update(link);
            (left, link)
        }
    }

    /// Takes the node of `range` out of the subtree at `link`; gives back the subtree's root.
    fn detach(&mut self, link: Link, range: &KeyRange) -> Link {
        let Some(node) = self.node(link) else { return NONE };
        let (left, right) = (node.left, node.right);
        match range.cmp(&node.range) {
            Ordering::Equal => return self.join(left, right),
            Ordering::Less => self.nodes[link as usize].left = self.detach(left, range),
            Ordering::Greater => self.nodes[link as usize].right = self.detach(right, range),
        }
        self.update(link);
        link
    }

    /// One subtree of two, the first of which sorts before the second.
    fn join(&mut self, left: Link, right: Link) -> Link {
        let (Some(first), Some(second)) = (self.node(left), self.node(right)) else {
            return if left == NONE { right } else { left };
        };
        if first.priority > second.priority {
            self.nodes[left as usize].right = self.join(first.right, right);
            self.update(left);
            left
        } else {
            self.nodes[right as usize].left = self.join(left, second.left);
            self.update(right);
            right
        }
    }

    fn update(&mut self, link: Link) {
        let node = &self.nodes[link as usize];
        let mut reach = node.range.end.clone();
        for child in [node.left, node.right].into_iter().filter_map(|child| self.node(child)) {
            reach = match (reach, &child.reach) {
                (Some(mine), Some(theirs)) => Some(mine.max(theirs.clone())),
                _ => None,
            };
        }
        self.nodes[link as usize].reach = reach;
    }
}

/// Takes the member at `place` out; the last one takes its place.
fn take<T: Placed>(members: &mut Vec<T>, place: usize) {
    if place < members.len() {
        members.swap_remove(place);
        if let Some(moved) = members.get(place) {
            moved.set_place(place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{cell::Cell, rc::Rc};

    struct Member(u32, Cell<usize>);

    impl Placed for Rc<Member> {
        fn place(&self) -> usize {
            self.1.get()
        }
        fn set_place(&self, place: usize) {
            self.1.set(place);
        }
    }

    fn range() -> impl Strategy<Value = KeyRange> {
        (0..30u8, prop::option::of(0..30u8), any::<bool>()).prop_map(|(start, end, single)| {
            let start = Bytes::from(vec![start]);
            match end {
                _ if single => KeyRange::single(start),
                Some(end) => KeyRange { end: Some(vec![start[0] + 1 + end].into()), start },
                None => KeyRange { start, end: None },
            }
        })
    }

    fn insert_at(index: &mut RangeIndex<Rc<Member>>, start: usize) {
        let range = KeyRange { start: Bytes::from(format!("{start:05}")), end: None };
        index.insert(&range, Rc::new(Member(0, Cell::new(0))));
    }

    fn depth(index: &RangeIndex<Rc<Member>>, link: Link) -> usize {
        index.node(link).map_or(0, |node| 1 + depth(index, node.left).max(depth(index, node.right)))
    }

    #[test]
    fn nobody_can_choose_ranges_that_make_a_path_of_the_tree() {
        const RANGES: usize = 4000;
        let mut seen = RangeIndex::default();
        (0..RANGES).for_each(|start| insert_at(&mut seen, start));
        // In the order of the priorities that this index has drawn.
        let mut order: Vec<usize> = (0..RANGES).collect();
        order.sort_by_key(|at| seen.nodes[*at].priority);
        let mut starts = vec![0; RANGES];
        order.into_iter().enumerate().for_each(|(rank, at)| starts[at] = rank);
        let mut other = RangeIndex::default();
        starts.into_iter().for_each(|start| insert_at(&mut other, start));
        for index in [seen, other] {
            let depth = depth(&index, index.root);
            assert!(depth < 100, "{depth}");
        }
    }

    proptest! {
        #[test]
        fn finds_exactly_the_members_over_a_key(
            steps in prop::collection::vec((range(), prop::option::weighted(0.4, any::<prop::sample::Index>())), 1..200)
        ) {
            let mut index = RangeIndex::default();
            let mut model: Vec<(KeyRange, Rc<Member>)> = vec![];
            for (number, (range, removal)) in steps.into_iter().enumerate() {
                match removal {
                    Some(which) if !model.is_empty() => {
                        let (range, member) = model.swap_remove(which.index(model.len()));
                        index.remove(&range, &member);
                    }
                    _ => {
                        let member = Rc::new(Member(number as u32, Cell::new(0)));
                        index.insert(&range, member.clone());
                        model.push((range, member));
                    }
                }
            }
            for key in 0..70u8 {
                let mut found = vec![];
                index.visit(&[key], |member| found.push(member.0));
                let over = model.iter().filter(|(range, _)| range.contains(&[key]));
                let mut expected: Vec<_> = over.map(|(_, member)| member.0).collect();
                found.sort_unstable();
                expected.sort_unstable();
                prop_assert_eq!(found, expected);
            }
        }
    }
}
