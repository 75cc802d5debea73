//! Answers made here, as opposed to forwarded.

use ::http::{
    HeaderValue, Response, StatusCode,
    header::{CONTENT_TYPE, HeaderMap},
};
use bytes::Bytes;
use http_body::Frame;
use http_body_util::StreamBody;
use tonic::Code;

use super::{
    body::{Body, UnaryBody},
    data::Data,
};
use crate::{
    grpc::{BodyError, MEDIA_TYPE, frame_encoded, success_trailers, write_status},
    status::Status,
};

const GRPC: HeaderValue = HeaderValue::from_static(MEDIA_TYPE);

/// A unary success with a message that has its five-byte prefix already.
pub fn framed(message: impl Into<Data>) -> Response<Body> {
    streaming(Body::Unary(UnaryBody::Message(message.into())))
}

/// A unary success. The message is copied behind its prefix; [`framed`] spares that.
pub fn unary(message: &[u8]) -> Response<Body> {
    framed(frame_encoded(message))
}

/// A gRPC answer whose body ends with its own trailers.
pub fn streaming(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, GRPC);
    response
}

/// A gRPC success that is written piece by piece. An error breaks it off: nothing is asked for after one.
pub fn pieces(pieces: impl Iterator<Item = Result<Data, BodyError>> + Send + 'static) -> Response<Body> {
    let trailers = std::iter::once_with(|| Ok(Frame::trailers(success_trailers())));
    let frames = pieces.map(|piece| piece.map(Frame::data)).chain(trailers);
    streaming(Body::boxed(StreamBody::new(futures_util::stream::iter(frames))))
}

/// The longest message that etcd's gRPC layer sends.
pub const LONGEST: u64 = i32::MAX as u64;

/// Refuses an answer of `length` bytes where no more than `limit` are sent, as Go's gRPC library words it.
///
/// # Errors
/// ResourceExhausted.
pub fn check_length(length: u64, limit: u64) -> Result<(), Status> {
    if length <= limit {
        return Ok(());
    }
    Err(Status::new(
        Code::ResourceExhausted,
        // What a prefix cannot say is refused before anybody looks at the limit.
        match u32::try_from(length) {
            Ok(length) => format!("grpc: trying to send message larger than max ({length} vs. {limit})"),
            Err(_) => format!("grpc: message too large ({length} bytes)"),
        },
    ))
}

/// A failure before any message.
pub fn error(status: &Status) -> Response<Body> {
    let mut response = Response::new(Body::Empty);
    let mut headers = HeaderMap::with_capacity(3);
    headers.insert(CONTENT_TYPE, GRPC);
    write_status(&mut headers, status);
    *response.headers_mut() = headers;
    response
}

/// An answer over plain HTTP.
pub fn plain(status: StatusCode, content_type: &'static str, text: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Body::Plain(Some(text.into())));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;
    use crate::grpc;

    #[tokio::test]
    async fn a_unary_answer_is_one_framed_message_and_a_success() {
        let body = unary(b"abc").into_body().collect().await.unwrap();
        assert_eq!(body.trailers().and_then(grpc::outcome), Some(Ok(())));
        assert_eq!(&body.to_bytes()[..], b"\0\0\0\0\x03abc");
    }

    /// One of 4 GiB and more used to announce less than followed.
    #[test]
    fn no_answer_is_longer_than_etcd_sends() {
        assert_eq!(check_length(LONGEST, LONGEST), Ok(()));
        let text = |length, limit| check_length(length, limit).unwrap_err().to_string();
        let said = "rpc error: code = ResourceExhausted desc = grpc: ";
        let expected = format!("{said}trying to send message larger than max (2147483648 vs. 2147483647)");
        assert_eq!(text(LONGEST + 1, LONGEST), expected);
        assert_eq!(text(1 << 32, 5), format!("{said}message too large (4294967296 bytes)"));
    }

    #[test]
    fn an_error_is_told_in_the_headers() {
        let response = error(&Status::NO_LEADER);
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(grpc::outcome(response.headers()), Some(Err(Status::NO_LEADER)));
        assert!(http_body::Body::is_end_stream(response.body()));
    }
}
