//! What a request to create a watcher asks for, and why it is refused, in etcd's words. A refusal is an answer on the
//! stream, which stays open.

use bytes::Bytes;

use super::KeyRange;
use crate::proto::etcdserverpb::{WatchCreateRequest, watch_create_request::FilterType};

/// Why a watcher was not created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The start revision is negative.
    #[error("etcdserver: mvcc: required revision has been compacted")]
    NegativeStart,
    /// The range's end is not after its start.
    #[error("mvcc: watcher range is empty")]
    EmptyRange,
    /// The id is taken.
    #[error("mvcc: duplicate watch ID provided on the WatchStream")]
    DuplicateId,
}

/// The keys to watch. As in etcd, an empty key means the zero byte.
pub fn watched(request: &WatchCreateRequest) -> KeyRange {
    let key = if request.key.is_empty() { &Bytes::from_static(&[0]) } else { &request.key };
    KeyRange::from_request(key, &request.range_end)
}

/// Whether a filter is asked for. As in etcd, filters that nobody knows mean nothing.
pub fn is_filtered(request: &WatchCreateRequest, filter: FilterType) -> bool {
    request.filters.contains(&filter.into())
}
