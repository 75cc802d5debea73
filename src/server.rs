//! The gRPC and HTTP faces.
//!
//! - [`router`]: which of the following answers a request;
//! - [`kv`], [`watch`]: what the cache answers, and relays where it cannot;
//! - [`leader`]: calls that want a leader;
//! - [`listener`]: accepts connections and serves HTTP/1.1 on them, `http2` HTTP/2; `keepalive`: clients that have vanished;
//! - [`body`], [`response`]: what answers are made of;
//! - [`forward`], [`observe`]: calls that etcd answers;
//! - `precheck`: what is no gRPC call at all is refused as by etcd; `metadata`: what etcd looks at in that of every call;
//! - [`members`]: MemberList, so that clients stay behind the proxy;
//! - [`health`], [`http`]: `grpc.health.v1`, and what etcd serves over HTTP/1.1 on its client port; `alarms`: those of the
//!   embedded store;
//! - [`admin`]: the operators' port.

pub mod admin;
mod alarms;
pub mod body;
pub mod data;
pub mod forward;
pub mod health;
pub mod http;
mod http2;
mod keepalive;
pub mod kv;
pub mod leader;
pub mod listener;
pub mod members;
mod metadata;
pub mod observe;
mod precheck;
pub mod response;
pub mod router;
pub mod watch;
