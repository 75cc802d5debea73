//! The outcome of a call, as headers and trailers carry it.

use std::sync::LazyLock;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use tonic::Code;

use crate::status::Status;

const STATUS: HeaderName = HeaderName::from_static("grpc-status");
const MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// The trailers of every success.
static SUCCESS: LazyLock<HeaderMap> = LazyLock::new(|| {
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert(STATUS, HeaderValue::from_static("0"));
    trailers
});

/// The trailers of a success.
pub fn success_trailers() -> HeaderMap {
    SUCCESS.clone()
}

/// The trailers of a failure.
pub fn failure_trailers(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(2);
    write_status(&mut trailers, status);
    trailers
}

/// Puts a failure into headers or trailers.
pub fn write_status(headers: &mut HeaderMap, status: &Status) {
    headers.insert(STATUS, HeaderValue::from(status.code as i32));
    // Escaped text is printable ASCII, which every header value may be.
    if let Ok(message) = HeaderValue::try_from(escape(&status.message)) {
        headers.insert(MESSAGE, message);
    }
}

/// The outcome that headers or trailers tell: `None` when they tell none, `Some(Ok(()))` for a success.
pub fn outcome(headers: &HeaderMap) -> Option<Result<(), Status>> {
    let code = headers.get(STATUS)?;
    let code = Code::from_bytes(code.as_bytes());
    if code == Code::Ok {
        return Some(Ok(()));
    }
    let message = headers.get(MESSAGE).map(|text| unescape(text.as_bytes())).unwrap_or_default();
    Some(Err(Status::new(code, message)))
}

/// The gRPC code for a response without a gRPC status, as gRPC's documentation maps HTTP codes.
pub fn from_http(status: StatusCode) -> Status {
    let code = match status.as_u16() {
        400 => Code::Internal,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::Unimplemented,
        429 | 502 | 503 | 504 => Code::Unavailable,
        _ => Code::Unknown,
    };
    Status::new(code, format!("unexpected HTTP status code received from server: {status}"))
}

/// Percent-encodes a status text for the `grpc-message` header: printable ASCII but `%` stays.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => escaped.push(char::from(byte)),
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

fn unescape(mut text: &[u8]) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    while let Some((&first, rest)) = text.split_first() {
        let pair = rest.get(..2).filter(|pair| first == b'%' && pair.iter().all(u8::is_ascii_hexdigit));
        let escaped = pair.and_then(|pair| std::str::from_utf8(pair).ok());
        match escaped.and_then(|pair| u8::from_str_radix(pair, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                text = rest.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(first);
                text = rest;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_texts_survive_the_header() {
        for text in ["etcdserver: no leader", "100% größe\n", "%zz%4", ""] {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-status", "14".parse().unwrap());
            headers.insert("grpc-message", escape(text).parse().unwrap());
            assert_eq!(outcome(&headers), Some(Err(Status::unavailable(text))));
        }
        assert_eq!(unescape(b"%zz%4"), "%zz%4");
        assert_eq!(outcome(&HeaderMap::new()), None);
    }
}
