//! What etcd looks at in the metadata of every call before its services do, for calls that are answered here. For those that are
//! forwarded, etcd does so itself.

use ::http::{HeaderMap, HeaderName};

use super::leader::Leader;
use crate::status::Status;

static HAS_LEADER: HeaderName = HeaderName::from_static("hasleader");
static CLIENT_API_VERSION: HeaderName = HeaderName::from_static("client-api-version");

/// Whether the client wants to be served only while there is a leader.
pub fn asks_for_leader(metadata: &HeaderMap) -> bool {
    metadata.get(&HAS_LEADER).is_some_and(|value| value == "true")
}

/// Checks the version that the client says it speaks: etcd takes any text.
///
/// # Errors
/// `INVALID_CLIENT_API_VERSION`.
pub fn check_version(metadata: &HeaderMap) -> Result<(), Status> {
    match metadata.get(&CLIENT_API_VERSION) {
        Some(version) if std::str::from_utf8(version.as_bytes()).is_err() => Err(Status::INVALID_CLIENT_API_VERSION),
        _ => Ok(()),
    }
}

/// Checks the metadata of a call that ends by itself.
///
/// # Errors
/// `INVALID_CLIENT_API_VERSION`, or `NO_LEADER` where the client asks for a leader and a member says that there is none.
pub fn check(metadata: &HeaderMap, leader: &Leader) -> Result<(), Status> {
    check_version(metadata)?;
    if asks_for_leader(metadata) && leader.is_denied() { Err(Status::NO_LEADER) } else { Ok(()) }
}
