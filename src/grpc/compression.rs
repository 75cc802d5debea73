//! Messages that a client has compressed. We never compress, but clients may: etcd takes gzip, so we do.

use std::io::Read;

use bytes::Bytes;
use flate2::read::GzDecoder;
use http::{HeaderMap, HeaderValue};
use tonic::Code;

use crate::status::Status;

/// The header that names the compression of a call's messages.
pub const ENCODING: &str = "grpc-encoding";

const NOT_NAMED: Status = Status::fixed(Code::Internal, "grpc: compressed flag set with identity or empty encoding");

/// How the peer may compress its messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// With gzip, to messages that have at most `limit` bytes when they are unpacked.
    Gzip {
        /// The largest unpacked message, in bytes.
        limit: usize,
    },
}

impl Compression {
    /// What the headers of a call name. `limit` is the largest unpacked message, in bytes.
    ///
    /// # Errors
    /// Unimplemented for a compression that etcd does not know either, in the words of Go's gRPC library.
    pub fn named(headers: &HeaderMap, limit: usize) -> Result<Self, Status> {
        match headers.get(ENCODING).map(HeaderValue::as_bytes) {
            None | Some(b"" | b"identity") => Ok(Self::None),
            Some(b"gzip") => Ok(Self::Gzip { limit }),
            Some(other) => {
                let other = String::from_utf8_lossy(other);
                let text = format!("grpc: Decompressor is not installed for grpc-encoding {other:?}");
                Err(Status::new(Code::Unimplemented, text))
            }
        }
    }

    /// The message that came with this `flag` in its prefix.
    ///
    /// # Errors
    /// Internal for what cannot be unpacked, ResourceExhausted for what is too large then, as Go's gRPC library says
    /// it.
    pub(super) fn unpack(self, flag: u8, message: Bytes) -> Result<Bytes, Status> {
        match (flag, self) {
            (0, _) => Ok(message),
            (1, Self::Gzip { limit }) => gunzip(&message, limit),
            (1, Self::None) => Err(NOT_NAMED),
            _ => Err(Status::new(Code::Internal, format!("grpc: received unexpected payload format {flag}"))),
        }
    }
}

/// Unpacks no more than `limit` bytes, however many a small message would grow to.
fn gunzip(packed: &[u8], limit: usize) -> Result<Bytes, Status> {
    let mut message = Vec::new();
    let unpacked = GzDecoder::new(packed).take((limit as u64).saturating_add(1)).read_to_end(&mut message);
    match unpacked {
        Err(error) => {
            Err(Status::new(Code::Internal, format!("grpc: failed to decompress the received message: {error}")))
        }
        Ok(length) if length > limit => Err(Status::new(
            Code::ResourceExhausted,
            format!("grpc: received message after decompression larger than max {limit}"),
        )),
        Ok(_) => Ok(message.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression as Level, write::GzEncoder};

    use super::*;

    fn packed(message: &[u8]) -> Bytes {
        let mut packer = GzEncoder::new(Vec::new(), Level::best());
        packer.write_all(message).unwrap();
        packer.finish().unwrap().into()
    }

    fn named(name: &str) -> Result<Compression, Status> {
        Compression::named(&HeaderMap::from_iter([(ENCODING.parse().unwrap(), name.parse().unwrap())]), 1000)
    }

    #[test]
    fn gzip_is_unpacked_up_to_the_limit() {
        let gzip = named("gzip").unwrap();
        assert_eq!(gzip.unpack(1, packed(b"a message")).unwrap(), "a message");
        assert_eq!(gzip.unpack(0, Bytes::from_static(b"bare")).unwrap(), "bare");
        assert_eq!(gzip.unpack(1, packed(&[7; 1000])).unwrap().len(), 1000);
        assert_eq!(gzip.unpack(1, packed(&[7; 100_000_000])).unwrap_err().code, Code::ResourceExhausted);
        assert_eq!(gzip.unpack(1, Bytes::from_static(b"bare")).unwrap_err().code, Code::Internal);
    }

    #[test]
    fn what_is_not_named_or_not_known_is_refused() {
        for none in [Compression::named(&HeaderMap::new(), 1), named("identity")] {
            assert_eq!(none.unwrap().unpack(1, packed(b"a message")), Err(NOT_NAMED));
        }
        assert_eq!(named("snappy").unwrap_err().code, Code::Unimplemented);
        assert_eq!(named("gzip").unwrap().unpack(2, Bytes::new()).unwrap_err().code, Code::Internal);
    }
}
