//! Sizes of requests.

use prost::Message;

use crate::status::Status;

/// Bytes that etcd's own envelope adds to a write before it is measured: a request id and the field's tag and length.
const ENVELOPE: usize = 19;

/// Refuses a write that etcd would find too large for its log.
pub fn check(request: &impl Message, limit: usize) -> Result<usize, Status> {
    let bytes = request.encoded_len();
    if bytes.saturating_add(ENVELOPE) > limit { Err(Status::REQUEST_TOO_LARGE) } else { Ok(bytes) }
}
