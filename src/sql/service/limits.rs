//! Sizes of requests, and what a client is told when one is too large.

use prost::Message;
use tonic::{Code, body::Body, service::Routes};

use crate::status::Status;

/// Bytes that etcd's own envelope adds to a write before it is measured: a request id and the field's tag and length.
const ENVELOPE: usize = 19;

/// Refuses a write that etcd would find too large for its log.
pub fn check(request: &impl Message, limit: usize) -> Result<usize, Status> {
    let bytes = request.encoded_len();
    if bytes.saturating_add(ENVELOPE) > limit { Err(Status::REQUEST_TOO_LARGE) } else { Ok(bytes) }
}

/// Makes the gRPC layer refuse an oversized message with the code and the text that etcd's does.
pub fn in_etcds_words(routes: Routes) -> Routes {
    let router = routes.into_axum_router().layer(axum::middleware::map_response(translate));
    Routes::from(router)
}

async fn translate(response: http::Response<axum::body::Body>) -> http::Response<axum::body::Body> {
    match tonic::Status::from_header_map(response.headers()) {
        Some(status) if status.code() == Code::OutOfRange => match oversized(status.message()) {
            Some(status) => status.into_http::<Body>().map(axum::body::Body::new),
            None => response,
        },
        _ => response,
    }
}

/// The status in etcd's words if `message` says, in tonic's, that a message was too large.
pub fn oversized(message: &str) -> Option<tonic::Status> {
    let sizes = message.strip_prefix("Error, decoded message length too large: found ")?;
    let mut numbers = sizes.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let (found, limit) = (numbers.next()?, numbers.next()?);
    Some(tonic::Status::resource_exhausted(format!("grpc: received message larger than max ({found} vs. {limit})")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_oversized_message_is_refused_as_grpc_go_does() {
        let said = "Error, decoded message length too large: found 2200000 bytes, the limit is: 2097152 bytes";
        let status = oversized(said).map(|status| (status.code(), status.message().to_owned()));
        let expected = "grpc: received message larger than max (2200000 vs. 2097152)".to_owned();
        assert_eq!(status, Some((Code::ResourceExhausted, expected)));
        assert!(oversized("etcdserver: mvcc: required revision has been compacted").is_none());
    }
}
