//! What a node of the index holds: records or children in the order of their keys, each with a hint of its key beside it.
//!
//! What a search pays for is cache misses, and each key that it compares with is one. The hint is what follows in the key on that
//! which all keys of the node begin with. Neighbours in a keyspace differ soon after that, so that a search by the hints comes to
//! one key, which is the one that was looked for or shows that there is none.

use std::slice;

/// What has a key.
pub(super) trait Keyed {
    fn key(&self) -> &[u8];
}

/// Items in the order of their keys.
#[derive(Clone, Debug)]
pub(super) struct Sorted<T> {
    entries: Vec<Entry<T>>,
    /// How many bytes all keys begin with at least. The hints are what follows on these.
    shared: usize,
}

/// An item, and the hint of its key. Where one key sorts before another, its hint does not sort after the other's.
#[derive(Clone, Debug)]
pub(super) struct Entry<T> {
    hint: u64,
    item: T,
}

impl<T> Entry<T> {
    pub(super) fn item(&self) -> &T {
        &self.item
    }
}

impl<T> Default for Sorted<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), shared: 0 }
    }
}

impl<T: Keyed> Sorted<T> {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// All items.
    pub(super) fn items(&self) -> impl Iterator<Item = &T> {
        self.entries.iter().map(Entry::item)
    }

    /// The items before the `end`th.
    pub(super) fn before(&self, end: usize) -> impl Iterator<Item = &T> {
        self.entries[..end].iter().map(Entry::item)
    }

    /// The entries from the `start`th on.
    pub(super) fn entries_from(&self, start: usize) -> slice::Iter<'_, Entry<T>> {
        self.entries[start..].iter()
    }

    pub(super) fn get(&self, at: usize) -> Option<&T> {
        self.entries.get(at).map(Entry::item)
    }

    /// To change everything but the key.
    pub(super) fn get_mut(&mut self, at: usize) -> Option<&mut T> {
        self.entries.get_mut(at).map(|entry| &mut entry.item)
    }

    /// Where `key` stands, or where it would.
    pub(super) fn find(&self, key: &[u8]) -> Result<usize, usize> {
        let hint = hint(key, self.shared);
        let from = self.entries.partition_point(|entry| entry.hint < hint);
        let alike = self.entries[from..].iter().take_while(|entry| entry.hint == hint).count();
        let found = self.entries[from..from + alike].binary_search_by(|entry| entry.item.key().cmp(key));
        match (found, self.get(0).map(T::key)) {
            (Ok(at), _) => Ok(from + at),
            // It begins otherwise than all that are here.
            (Err(_), Some(first)) if !key.starts_with(&first[..self.shared]) => {
                Err(if key < first { 0 } else { self.len() })
            }
            (Err(at), _) => Err(from + at),
        }
    }

    /// Puts `item` in as the `at`th, where its key belongs.
    pub(super) fn insert(&mut self, at: usize, item: T) {
        let shared = match self.get(0) {
            Some(first) => shared(first.key(), item.key()).min(self.shared),
            None => item.key().len(),
        };
        self.share(shared);
        let hint = hint(item.key(), shared);
        self.entries.insert(at, Entry { hint, item });
    }

    /// Puts `item` in the place of the `at`th, which has the same key; gives that back.
    pub(super) fn replace(&mut self, at: usize, item: T) -> T {
        std::mem::replace(&mut self.entries[at].item, item)
    }

    pub(super) fn remove(&mut self, at: usize) -> T {
        self.entries.remove(at).item
    }

    /// Takes off the items from the `at`th on.
    pub(super) fn split_off(&mut self, at: usize) -> Self {
        let mut right = Self { entries: self.entries.split_off(at), shared: self.shared };
        self.entries.shrink_to_fit();
        self.share_all();
        right.share_all();
        right
    }

    /// Takes in the items of `right`, all of which sort after these.
    pub(super) fn append(&mut self, mut right: Self) {
        self.entries.append(&mut right.entries);
        // The hints of `right` may follow on something else.
        self.shared = usize::MAX;
        self.share_all();
    }

    /// Lets the hints begin as late as they may.
    fn share_all(&mut self) {
        if let [first, .., last] = &self.entries[..] {
            self.share(shared(first.item.key(), last.item.key()));
        }
    }

    /// Lets the hints be what follows on `shared` bytes.
    fn share(&mut self, shared: usize) {
        if shared != self.shared {
            self.shared = shared;
            self.entries.iter_mut().for_each(|entry| entry.hint = hint(entry.item.key(), shared));
        }
    }

    #[cfg(test)]
    pub(super) fn check(&self) {
        let first = self.get(0).map(|first| &first.key()[..self.shared]);
        for Entry { hint: told, item } in &self.entries {
            assert!(first.is_some_and(|first| item.key().starts_with(first)));
            assert_eq!(*told, hint(item.key(), self.shared));
        }
        assert!(self.items().map(T::key).is_sorted_by(|one, other| one < other));
    }
}

/// What follows on the first `skipped` bytes of `key`, as far as it goes.
fn hint(key: &[u8], skipped: usize) -> u64 {
    let rest = key.get(skipped..).unwrap_or_default();
    if let Some(bytes) = rest.first_chunk() {
        return u64::from_be_bytes(*bytes);
    }
    let mut bytes = [0; size_of::<u64>()];
    bytes[..rest.len()].copy_from_slice(rest);
    u64::from_be_bytes(bytes)
}

/// How many bytes both begin with.
fn shared(one: &[u8], other: &[u8]) -> usize {
    one.iter().zip(other).take_while(|(one, other)| one == other).count()
}
