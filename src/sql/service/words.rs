//! What the gRPC layer by itself tells a client, in the words of etcd's: that a message is too large or none, and that there is no
//! such method.

use axum::{
    body::Body,
    extract::Request,
    middleware::{self, Next},
    response::Response,
};
use tonic::{Code, service::Routes};

use crate::proto::{
    etcdserverpb::{auth_server, cluster_server, kv_server, lease_server, maintenance_server, watch_server},
    v3electionpb::election_server,
    v3lockpb::lock_server,
};

/// The services that there are.
const SERVICES: [&str; 8] = [
    auth_server::SERVICE_NAME,
    cluster_server::SERVICE_NAME,
    election_server::SERVICE_NAME,
    kv_server::SERVICE_NAME,
    lease_server::SERVICE_NAME,
    lock_server::SERVICE_NAME,
    maintenance_server::SERVICE_NAME,
    watch_server::SERVICE_NAME,
];

/// Makes the gRPC layer refuse with the codes and the texts that etcd's does.
pub fn in_etcds_words(routes: Routes) -> Routes {
    Routes::from(routes.into_axum_router().layer(middleware::from_fn(translate)))
}

async fn translate(request: Request, next: Next) -> Response {
    let uri = request.uri().clone();
    let response = next.run(request).await;
    let status = tonic::Status::from_header_map(response.headers()).and_then(|status| match status.code() {
        Code::OutOfRange => oversized(status.message()),
        Code::Internal => unreadable(status.message()),
        Code::Unimplemented if status.message().is_empty() => Some(unknown(uri.path())),
        _ => None,
    });
    match status {
        Some(status) => status.into_http::<tonic::body::Body>().map(Body::new),
        None => response,
    }
}

/// What a call is told that does not exist.
fn unknown(path: &str) -> tonic::Status {
    tonic::Status::unimplemented(match path.strip_prefix('/').unwrap_or(path).rsplit_once('/') {
        None => format!("malformed method name: {path:?}"),
        Some((service, method)) if SERVICES.contains(&service) => {
            format!("unknown method {method} for service {service}")
        }
        Some((service, _)) => format!("unknown service {service}"),
    })
}

/// The status in etcd's words if `message` says, in tonic's, that a message was too large.
pub fn oversized(message: &str) -> Option<tonic::Status> {
    let sizes = message.strip_prefix("Error, decoded message length too large: found ")?;
    let mut numbers = sizes.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let (found, limit) = (numbers.next()?, numbers.next()?);
    Some(tonic::Status::resource_exhausted(format!("grpc: received message larger than max ({found} vs. {limit})")))
}

/// The status in the words of Go's gRPC library if `message` says, in tonic's, that a message cannot be decoded.
fn unreadable(message: &str) -> Option<tonic::Status> {
    let why = message.strip_prefix("failed to decode Protobuf message: ")?;
    Some(tonic::Status::internal(format!("grpc: error unmarshalling request: {why}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::etcdserverpb::PutRequest;

    #[test]
    fn an_oversized_message_is_refused_as_grpc_go_does() {
        let said = "Error, decoded message length too large: found 2200000 bytes, the limit is: 2097152 bytes";
        let status = oversized(said).map(|status| (status.code(), status.message().to_owned()));
        let expected = "grpc: received message larger than max (2200000 vs. 2097152)".to_owned();
        assert_eq!(status, Some((Code::ResourceExhausted, expected)));
        assert!(oversized("etcdserver: mvcc: required revision has been compacted").is_none());
    }

    #[test]
    fn what_is_no_message_is_refused_as_grpc_go_does() {
        let error = <PutRequest as prost::Message>::decode(&b"\x0a\x20k"[..]).unwrap_err();
        let status = unreadable(&error.to_string()).unwrap();
        assert_eq!(status.code(), Code::Internal);
        assert!(status.message().starts_with("grpc: error unmarshalling request: "), "{status}");
        assert!(unreadable("anything else").is_none());
    }
}
