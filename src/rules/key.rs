//! Ranges of keys, with etcd's two special forms of `range_end` resolved.

use bytes::Bytes;

/// A half-open range of keys `[start, end)`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyRange {
    /// The first key that may be in the range.
    pub start: Bytes,
    /// The first key after the range; `None`: the range is open to the right.
    pub end: Option<Bytes>,
}

impl KeyRange {
    /// Every key.
    pub const fn everything() -> Self {
        Self { start: Bytes::new(), end: None }
    }

    /// The range that `key` and `range_end` of a request name: one key when `range_end` is empty, everything from `key`
    /// on when it is a single zero byte.
    pub fn from_request(key: &Bytes, range_end: &Bytes) -> Self {
        let start = key.clone();
        match &range_end[..] {
            [] => Self::single(start),
            [0] => Self { start, end: None },
            _ => Self { start, end: Some(range_end.clone()) },
        }
    }

    /// Exactly one key.
    pub fn single(key: Bytes) -> Self {
        Self { end: Some(successor(&key)), start: key }
    }

    /// Every key that begins with `prefix`.
    pub fn prefix(prefix: Bytes) -> Self {
        let end = prefix_end(&prefix);
        Self { start: prefix, end }
    }

    /// Whether no key can be in the range.
    pub fn is_empty(&self) -> bool {
        self.end.as_ref().is_some_and(|end| *end <= self.start)
    }

    /// Whether the range holds exactly one possible key.
    pub fn is_single(&self) -> bool {
        self.end.as_ref().is_some_and(|end| is_successor(&self.start, end))
    }

    /// Whether `key` lies in the range.
    pub fn contains(&self, key: &[u8]) -> bool {
        key >= &self.start[..] && self.end.as_ref().is_none_or(|end| key < &end[..])
    }

    /// Whether every key of `other` lies in this range.
    pub fn covers(&self, other: &Self) -> bool {
        other.is_empty()
            || (self.start <= other.start
                && match (&self.end, &other.end) {
                    (None, _) => true,
                    (Some(_), None) => false,
                    (Some(mine), Some(theirs)) => theirs <= mine,
                })
    }

    /// `range_end` as a request spells this range.
    pub fn request_end(&self) -> Bytes {
        match &self.end {
            None => Bytes::from_static(&[0]),
            Some(end) if is_successor(&self.start, end) => Bytes::new(),
            Some(end) => end.clone(),
        }
    }

    /// `key` as a request spells this range's start: a request must name a key, and no key sorts before the zero byte.
    pub fn request_key(&self) -> Bytes {
        if self.start.is_empty() { Bytes::from_static(&[0]) } else { self.start.clone() }
    }
}

/// The first key after `key`.
pub fn successor(key: &[u8]) -> Bytes {
    let mut next = Vec::with_capacity(key.len() + 1);
    next.extend_from_slice(key);
    next.push(0);
    next.into()
}

/// The first key after all keys that begin with `prefix`; `None` when there is no such key.
fn prefix_end(prefix: &[u8]) -> Option<Bytes> {
    let last = prefix.iter().rposition(|byte| *byte != u8::MAX)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end.into())
}

fn is_successor(start: &[u8], end: &[u8]) -> bool {
    end.len() == start.len() + 1 && end.last() == Some(&0) && end.starts_with(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(key: &'static [u8], end: &'static [u8]) -> KeyRange {
        KeyRange::from_request(&Bytes::from_static(key), &Bytes::from_static(end))
    }

    #[test]
    fn the_special_ends_of_etcd_are_resolved() {
        assert!(range(b"a", b"").contains(b"a"));
        assert!(!range(b"a", b"").contains(b"a\0") && !range(b"a", b"").contains(b"aa"));
        assert!(range(b"a", b"c").contains(b"bz") && !range(b"a", b"c").contains(b"c"));
        assert!(range(b"b", b"\0").contains(b"\xff\xff"));
        assert!(!range(b"b", b"\0").contains(b"a"));
        assert!(range(b"\0", b"\0").contains(b"\0"));
        assert!(range(b"b", b"a").is_empty() && !range(b"b", b"a").contains(b"b"));
    }

    #[test]
    fn a_range_is_spelled_as_it_was_asked_for() {
        for (key, end) in [(&b"a"[..], &b""[..]), (b"a", b"\0"), (b"a", b"c")] {
            let range = range(key, end);
            assert_eq!((&range.request_key()[..], &range.request_end()[..]), (key, end));
        }
    }

    #[test]
    fn prefixes_end_before_the_next_sibling() {
        assert_eq!(prefix_end(b"ab").as_deref(), Some(&b"ac"[..]));
        assert_eq!(prefix_end(b"a\xff").as_deref(), Some(&b"b"[..]));
        assert_eq!(prefix_end(b"\xff"), None);
        assert_eq!(prefix_end(b""), None);
        assert_eq!(KeyRange::prefix(Bytes::from_static(b"\xff\xff")).request_end(), "\0");
    }

    #[test]
    fn covering_honours_open_ends_and_empty_ranges() {
        let all = KeyRange::everything();
        let prefix = KeyRange::prefix(Bytes::from_static(b"/a/"));
        assert!(all.covers(&prefix) && !prefix.covers(&all));
        assert!(prefix.covers(&range(b"/a/x", b"")));
        assert!(prefix.covers(&range(b"z", b"y")));
        assert!(!prefix.covers(&range(b"/a/x", b"\0")));
    }
}
