//! The outcome of a call as a client sees it: a gRPC code and a text, in etcd's own words.
//!
//! The Go client matches on the text, other clients on the code, so both are part of the contract. The texts are those of
//! etcd's `rpctypes` package.

use std::{borrow::Cow, fmt};

use tonic::Code;

/// Why a call failed, as it goes over the wire. Never `Code::Ok`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rpc error: code = {} desc = {message}", CodeName(*.code))]
pub struct Status {
    /// The gRPC code.
    pub code: Code,
    /// The text, with etcd's `etcdserver: ` prefix where etcd has one.
    pub message: Cow<'static, str>,
}

impl Status {
    /// Authentication has come on: cached events are for nobody any more, and the upstream takes the watchers.
    pub const WATCH_AGAIN: Self = Self::fixed(Code::Unavailable, "authentication is on: watch again");

    /// A status with a text that is known at compile time.
    pub const fn fixed(code: Code, message: &'static str) -> Self {
        Self { code, message: Cow::Borrowed(message) }
    }

    /// A status with a text made for the occasion.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: Cow::Owned(message.into()) }
    }

    /// `Unavailable`, the code on which every etcd client tries again elsewhere or later.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Code::Unavailable, message)
    }
}

impl From<tonic::Status> for Status {
    fn from(status: tonic::Status) -> Self {
        Self::new(status.code(), status.message())
    }
}

impl From<Status> for tonic::Status {
    fn from(status: Status) -> Self {
        Self::new(status.code, status.message)
    }
}

/// A code under the name that Go's gRPC library prints, which etcd embeds in the cancel reason of a refused watch.
struct CodeName(Code);

impl fmt::Display for CodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Code::Cancelled => f.write_str("Canceled"),
            code => write!(f, "{code:?}"),
        }
    }
}

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $code:ident, $text:literal;)*) => {
        impl Status {
            $($(#[$doc])* pub const $name: Status = Status::fixed(Code::$code, concat!("etcdserver: ", $text));)*
        }
    };
}

impl Status {
    /// The time that a client gives its call is over, as gRPC says it.
    pub const DEADLINE: Self = Self::fixed(Code::DeadlineExceeded, "context deadline exceeded");
    /// The client has given its call up, as gRPC says it.
    pub const CANCELLED: Self = Self::fixed(Code::Cancelled, "context canceled");
    /// No member can be reached. By this text etcd's client knows that not even a write was sent, and tries again; a
    /// Watch stream that ends so it opens again, there or elsewhere, and its user does not notice.
    pub const NO_CONNECTION: Self = Self::fixed(Code::Unavailable, "there is no connection available");
}

statuses! {
    /// A request without a key.
    EMPTY_KEY = InvalidArgument, "key is not provided";
    /// `ignore_value` or `ignore_lease` on a key that does not exist.
    KEY_NOT_FOUND = InvalidArgument, "key not found";
    /// A value beside `ignore_value`.
    VALUE_PROVIDED = InvalidArgument, "value is provided";
    /// A lease beside `ignore_lease`.
    LEASE_PROVIDED = InvalidArgument, "lease is provided";
    /// More operations in a transaction than the limit.
    TOO_MANY_OPS = InvalidArgument, "too many operations in txn request";
    /// Two writes to one key in a transaction.
    DUPLICATE_KEY = InvalidArgument, "duplicate key given in txn request";
    /// A client version that is no text.
    INVALID_CLIENT_API_VERSION = InvalidArgument, "invalid client api version";
    /// An unknown sort order or target.
    INVALID_SORT_OPTION = InvalidArgument, "invalid sort option";
    /// A request above the size limit.
    REQUEST_TOO_LARGE = InvalidArgument, "request is too large";
    /// A call without a token while authentication is on.
    USER_EMPTY = InvalidArgument, "user name is empty";
    /// A revision below the compaction.
    COMPACTED = OutOfRange, "mvcc: required revision has been compacted";
    /// A revision that does not exist yet.
    FUTURE_REVISION = OutOfRange, "mvcc: required revision is a future revision";
    /// A lease TTL above the maximum.
    LEASE_TTL_TOO_LARGE = OutOfRange, "too large lease TTL";
    /// The store is at its quota.
    NO_SPACE = ResourceExhausted, "mvcc: database space exceeded";
    /// The server is overloaded.
    TOO_MANY_REQUESTS = ResourceExhausted, "too many requests";
    /// No such lease.
    LEASE_NOT_FOUND = NotFound, "requested lease not found";
    /// A lease id that is in use.
    LEASE_EXISTS = FailedPrecondition, "lease already exists";
    /// An RPC that the server does not offer.
    NOT_CAPABLE = FailedPrecondition, "not capable";
    /// A token that is not valid (any more).
    INVALID_AUTH_TOKEN = Unauthenticated, "invalid auth token";
    /// The user lacks the permission.
    PERMISSION_DENIED = PermissionDenied, "permission denied";
    /// No leader, and the client asked not to be served then.
    NO_LEADER = Unavailable, "no leader";
    /// A read was overtaken by a change of the leader.
    LEADER_CHANGED = Unavailable, "leader changed";
    /// The server is shutting down.
    STOPPED = Unavailable, "server stopped";
    /// The cluster did not answer in time.
    TIMEOUT = Unavailable, "request timed out";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn displays_as_go_prints_it() {
        assert_eq!(
            Status::PERMISSION_DENIED.to_string(),
            "rpc error: code = PermissionDenied desc = etcdserver: permission denied"
        );
        assert_eq!(Status::new(Code::Cancelled, "x").to_string(), "rpc error: code = Canceled desc = x");
    }
}
