//! The gRPC and HTTP faces.
//!
//! - [`listener`]: accepts connections and serves HTTP/2 and HTTP/1.1 on them;
//! - [`body`], [`response`]: what answers are made of;
//! - [`forward`], [`relay`]: calls that etcd answers;
//! - [`members`]: MemberList, so that clients stay behind the proxy;
//! - [`health`], [`http`]: `grpc.health.v1`, and what etcd serves over HTTP/1.1 on its client port.

pub mod body;
pub mod forward;
pub mod health;
pub mod http;
pub mod listener;
pub mod members;
pub mod relay;
pub mod response;
