//! What clients know of single events. A history that goes on has them all; that it has the newest is asked of the upstream.

use std::hash::{DefaultHasher, Hasher};

use bytes::Bytes;

use super::floor::Mark;
use crate::{
    proto::{etcdserverpb::PutRequest, mvccpb},
    store::{Record, Revision},
};

/// An event that a client knows of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) key: Bytes,
    pub(super) revision: Revision,
    pub(super) what: What,
}

/// What a client knows of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// It was a put.
    Put(Known),
    /// It was a deletion.
    Delete,
}

/// What a client knows of a version that was put: what it was told of it, or has said itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Known {
    created: Option<Revision>,
    version: Option<i64>,
    lease: Option<i64>,
    /// What its value comes to: values may be large.
    value: Option<u64>,
}

impl Known {
    pub(super) fn by_event(record: &mvccpb::KeyValue) -> Self {
        Self {
            created: Some(Revision(record.create_revision)),
            version: Some(record.version),
            lease: Some(record.lease),
            value: Some(fingerprint(&record.value)),
        }
    }

    pub(super) fn by_request(request: &PutRequest) -> Self {
        Self {
            lease: (!request.ignore_lease).then_some(request.lease),
            value: (!request.ignore_value).then(|| fingerprint(&request.value)),
            ..Self::default()
        }
    }

    /// Whether `found` may be that version. In another history the same key may have been put at the same revision.
    pub(super) fn fits(&self, found: &Record) -> bool {
        self.created.is_none_or(|created| created == found.create_revision())
            && self.version.is_none_or(|version| version == found.version())
            && self.lease.is_none_or(|lease| lease == found.lease())
            && self.value.is_none_or(|value| value == fingerprint(found.value()))
    }
}

fn fingerprint(value: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(value);
    hasher.finish()
}

/// The newest events that clients know of.
#[derive(Clone, Debug, Default)]
pub(super) struct Newest {
    event: Option<(Mark, Seen)>,
    /// The newest one that was a put: deletions look alike.
    put: Option<(Mark, Seen)>,
}

impl Newest {
    /// Whether an event of `revision` is newer than what is known.
    pub(super) fn is_news(&self, revision: Revision, is_put: bool) -> bool {
        is_newer(&self.event, revision) || is_put && is_newer(&self.put, revision)
    }

    /// Notes `seen`, as far as it is news.
    pub(super) fn note(&mut self, mark: Mark, seen: &Seen) {
        let is_put = matches!(seen.what, What::Put(_));
        for slot in [Some(&mut self.event), is_put.then_some(&mut self.put)].into_iter().flatten() {
            if is_newer(slot, seen.revision) {
                *slot = Some((mark, seen.clone()));
            }
        }
    }

    /// Forgets those of which `is_over` is true.
    pub(super) fn forget(&mut self, is_over: impl Fn(Mark, &Seen) -> bool) {
        for slot in [&mut self.event, &mut self.put] {
            slot.take_if(|(mark, seen)| is_over(*mark, seen));
        }
    }

    /// The newest, and the newest put if that is another.
    pub(super) fn events(&self) -> impl Iterator<Item = &Seen> {
        let put = self.put.as_ref().filter(|_| self.put != self.event);
        self.event.iter().chain(put).map(|(_, seen)| seen)
    }
}

fn is_newer(slot: &Option<(Mark, Seen)>, revision: Revision) -> bool {
    slot.as_ref().is_none_or(|(_, known)| known.revision < revision)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_of_a_version_tells_it_from_others() {
        let found = |value: &str, lease| Record::new(b"k", value.as_bytes(), Revision(5), Revision(7), 2, lease);
        let event = Known::by_event(&mvccpb::KeyValue {
            version: 2,
            create_revision: 5,
            value: "v".into(),
            ..Default::default()
        });
        let request = PutRequest { value: "v".into(), ..Default::default() };
        for known in [event, Known::by_request(&request)] {
            assert!(known.fits(&found("v", 0)) && !known.fits(&found("w", 0)) && !known.fits(&found("v", 1)));
        }
        assert!(!Known { version: Some(3), ..event }.fits(&found("v", 0)));
        let ignores_value = Known::by_request(&PutRequest { ignore_value: true, ..PutRequest::default() });
        assert!(ignores_value.fits(&found("w", 0)) && !ignores_value.fits(&found("w", 1)));
        let ignores_lease = Known::by_request(&PutRequest { ignore_lease: true, ..request });
        assert!(ignores_lease.fits(&found("v", 1)) && !ignores_lease.fits(&found("w", 1)));
    }
}
