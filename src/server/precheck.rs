//! What Go's gRPC library, and so etcd, refuses before a call reaches any service: what is no gRPC call at all.

use std::time::Duration;

use ::http::{
    HeaderValue, Method, Request, Response, StatusCode,
    header::{CONTENT_TYPE, HeaderMap},
};
use tonic::Code;

use super::{body::Body, response};
use crate::{
    grpc::{MEDIA_TYPE, checked_deadline},
    status::Status,
};

/// Values of metadata whose names end so are base64.
const BINARY: &str = "-bin";

/// The refusal of an HTTP/2 request that is no gRPC call, or whose time is over before it begins.
pub fn refusal<B>(request: &Request<B>) -> Option<Response<Body>> {
    let headers = request.headers();
    if request.method() == Method::CONNECT {
        return None;
    }
    let content_type = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    if !is_grpc(content_type) {
        let content_type = String::from_utf8_lossy(content_type);
        let text = format!("invalid gRPC request content-type {content_type:?}");
        return Some(refuse(StatusCode::UNSUPPORTED_MEDIA_TYPE, &Status::new(Code::InvalidArgument, text)));
    }
    let deadline = checked_deadline(headers).map_err(|why| format!("malformed grpc-timeout: {why}"));
    if let Some(why) = deadline.as_ref().err().or(malformed_binary(headers).as_ref()) {
        return Some(refuse(StatusCode::BAD_REQUEST, &Status::new(Code::Internal, &**why)));
    }
    if request.method() != Method::POST {
        let text =
            format!("Received a HEADERS frame with :method {:?} which should be POST", request.method().as_str());
        return Some(refuse(StatusCode::METHOD_NOT_ALLOWED, &Status::new(Code::Internal, text)));
    }
    (deadline == Ok(Some(Duration::ZERO))).then(|| response::error(&Status::DEADLINE))
}

fn refuse(http: StatusCode, status: &Status) -> Response<Body> {
    let mut refusal = response::error(status);
    *refusal.status_mut() = http;
    refusal
}

/// The type of gRPC, alone or with a format or parameters behind it.
fn is_grpc(content_type: &[u8]) -> bool {
    let grpc = MEDIA_TYPE.as_bytes();
    let behind = content_type.split_at_checked(grpc.len()).filter(|(begin, _)| begin.eq_ignore_ascii_case(grpc));
    behind.is_some_and(|(_, behind)| matches!(behind.first(), None | Some(b'+' | b';')))
}

/// What is wrong with a value that has to be base64, if there is such a value.
fn malformed_binary(headers: &HeaderMap) -> Option<String> {
    let mut binary = headers.iter().filter(|(name, _)| name.as_str().ends_with(BINARY));
    binary.find_map(|(name, value)| {
        let at = corrupt_at(value.as_bytes())?;
        let value = String::from_utf8_lossy(value.as_bytes());
        Some(format!(
            "malformed binary metadata {value:?} in header \"{name}\": illegal base64 data at input byte {at}"
        ))
    })
}

/// The place at which Go's decoder finds that this is no base64. What has the length of padded base64 has to be padded, and
/// nothing else may be.
fn corrupt_at(text: &[u8]) -> Option<usize> {
    let foreign = text.iter().position(|byte| !(byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/')));
    let may_be_padded = text.len().is_multiple_of(4);
    match foreign {
        None => (text.len() % 4 == 1).then(|| text.len() - 1),
        Some(at) if !may_be_padded || text.get(at) != Some(&b'=') => Some(at),
        Some(at) => {
            let padding = match at % 4 {
                3 => 1,
                2 if text.get(at + 1) == Some(&b'=') => 2,
                _ => return Some(at),
            };
            (at + padding < text.len()).then_some(at + padding)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(method: &str, headers: &[(&str, &str)]) -> Option<(u16, String, String)> {
        let mut request = Request::builder().method(method).uri("/etcdserverpb.KV/Range");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let refusal = refusal(&request.body(()).unwrap())?;
        let text = |name: &str| refusal.headers()[name].to_str().unwrap().to_owned();
        Some((refusal.status().as_u16(), text("grpc-status"), text("grpc-message")))
    }

    #[test]
    fn calls_pass_and_what_is_none_is_refused_as_by_etcd() {
        for passes in
            ["application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8", "Application/gRPC"]
        {
            assert_eq!(refused("POST", &[("content-type", passes)]), None, "{passes}");
        }
        for bad in ["", "application/json", "application/grpc-web", "application/grpcfoo"] {
            let (http, code, text) = refused("POST", &[("content-type", bad)]).unwrap();
            assert_eq!((http, &code[..], text), (415, "3", format!("invalid gRPC request content-type {bad:?}")));
        }
        let (http, code, text) = refused("GET", &[("content-type", "application/grpc")]).unwrap();
        assert_eq!((http, &code[..]), (405, "13"));
        assert_eq!(text, "Received a HEADERS frame with :method \"GET\" which should be POST");
    }

    #[test]
    fn binary_metadata_is_base64_as_go_reads_it() {
        for (text, corrupt) in [
            ("", None),
            ("AAEC", None),
            ("AAE=", None),
            ("AA==", None),
            ("AAE", None),
            ("AA", None),
            ("A", Some(0)),
            ("AAECA", Some(4)),
            ("!!!", Some(0)),
            ("AA!A", Some(2)),
            ("AA=A", Some(2)),
            ("A===", Some(1)),
            ("====", Some(0)),
            ("AA=", Some(2)),
            ("AA==AAEC", Some(4)),
            ("AAE=AAEC", Some(4)),
            ("AAE,AAE", Some(3)),
            ("AA-_", Some(2)),
        ] {
            assert_eq!(corrupt_at(text.as_bytes()), corrupt, "{text}");
        }
        let (http, code, text) =
            refused("POST", &[("content-type", "application/grpc"), ("x-bin", "!!!"), ("plain", "!!!")]).unwrap();
        assert_eq!((http, &code[..]), (400, "13"));
        assert_eq!(text, "malformed binary metadata \"!!!\" in header \"x-bin\": illegal base64 data at input byte 0");
    }

    #[test]
    fn a_timeout_that_cannot_be_read_is_refused_and_one_of_nothing_is_over() {
        let with = |timeout: &str| refused("POST", &[("content-type", "application/grpc"), ("grpc-timeout", timeout)]);
        for passes in ["1n", "20S", "99999999H", "1500m"] {
            assert_eq!(with(passes), None, "{passes}");
        }
        for (bad, why) in [
            ("", "transport: timeout string is too short: \"\""),
            ("S", "transport: timeout string is too short: \"S\""),
            ("999999999S", "transport: timeout string is too long: \"999999999S\""),
            ("abc", "transport: timeout unit is not recognized: \"abc\""),
            ("-1S", "strconv.ParseUint: parsing \"-1\": invalid syntax"),
            ("+1S", "strconv.ParseUint: parsing \"+1\": invalid syntax"),
        ] {
            let (http, code, text) = with(bad).unwrap();
            assert_eq!((http, &code[..], text), (400, "13", format!("malformed grpc-timeout: {why}")));
        }
        assert_eq!(with("0S"), Some((200, "4".to_owned(), "context deadline exceeded".to_owned())));
    }
}
