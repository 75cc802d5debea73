//! What resets and lost connections mean for a call, in the words and codes of Go's gRPC library.

use std::error::Error;

use tonic::Code;

use crate::status::Status;

/// The status of a call that a transport error ended, with the words and codes of Go's gRPC library.
pub fn from_transport(error: &(dyn Error + 'static)) -> Status {
    match remote_reset(error) {
        Some(reason) => {
            let text = format!("stream terminated by RST_STREAM with error code: {}", reset_name(reason));
            Status::new(code_of_reset(reason), text)
        }
        None => Status::unavailable(format!("error reading from server: {}", root_cause(error))),
    }
}

/// The reason with which the peer reset this one stream; `None` when the whole connection failed.
pub fn remote_reset(error: &(dyn Error + 'static)) -> Option<h2::Reason> {
    let error = http2_error(error)?;
    error.reason().filter(|_| error.is_reset() && error.is_remote())
}

/// Whether `error` ended one stream and says nothing of its connection: the peer has reset it, or we have, because the
/// request broke off.
pub fn is_of_one_stream(error: &(dyn Error + 'static)) -> bool {
    http2_error(error).is_some_and(|error| error.is_reset() && !error.is_library())
}

/// What went wrong with HTTP/2, if that is behind `error`.
pub fn http2_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a h2::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            return Some(error);
        }
        next = error.source();
    }
    None
}

fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

fn code_of_reset(reason: h2::Reason) -> Code {
    match reason {
        h2::Reason::REFUSED_STREAM => Code::Unavailable,
        h2::Reason::CANCEL => Code::Cancelled,
        h2::Reason::ENHANCE_YOUR_CALM => Code::ResourceExhausted,
        h2::Reason::INADEQUATE_SECURITY => Code::PermissionDenied,
        _ => Code::Internal,
    }
}

fn reset_name(reason: h2::Reason) -> &'static str {
    match reason {
        h2::Reason::NO_ERROR => "NO_ERROR",
        h2::Reason::PROTOCOL_ERROR => "PROTOCOL_ERROR",
        h2::Reason::INTERNAL_ERROR => "INTERNAL_ERROR",
        h2::Reason::FLOW_CONTROL_ERROR => "FLOW_CONTROL_ERROR",
        h2::Reason::STREAM_CLOSED => "STREAM_CLOSED",
        h2::Reason::FRAME_SIZE_ERROR => "FRAME_SIZE_ERROR",
        h2::Reason::REFUSED_STREAM => "REFUSED_STREAM",
        h2::Reason::CANCEL => "CANCEL",
        h2::Reason::COMPRESSION_ERROR => "COMPRESSION_ERROR",
        h2::Reason::ENHANCE_YOUR_CALM => "ENHANCE_YOUR_CALM",
        _ => "unknown",
    }
}
