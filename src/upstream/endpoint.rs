//! Where an etcd is, and how a byte stream to it is opened. TLS will be one more [`Dial`].

use std::{fmt, future::Future, io, pin::Pin, str::FromStr, sync::Arc, time::Duration};

use http::{Request, Response, uri::Authority};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

use super::{RequestBody, UpstreamError};

/// Which of the configured endpoints, by its place in the configuration.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug)]
pub struct EndpointId(pub usize);

/// A byte stream to a server.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// What [`Dial::dial`] returns.
pub type DialFuture<'a> = Pin<Box<dyn Future<Output = io::Result<Box<dyn Io>>> + Send + 'a>>;

/// Opens byte streams to one server. A closure that returns one end of a pipe is a `Dial`.
pub trait Dial: Send + Sync {
    /// Opens one more stream. The caller bounds the time.
    fn dial(&self) -> DialFuture<'_>;

    /// The server itself, where it is in this process and takes gRPC requests without a stream in between.
    fn in_process(&self) -> Option<Arc<dyn Serve>> {
        None
    }
}

/// What [`Serve::serve`] returns.
pub type ServeFuture = Pin<Box<dyn Future<Output = Response<tonic::body::Body>> + Send>>;

/// Answers gRPC requests as a server does, within the process.
pub trait Serve: Send + Sync {
    /// The answer to one request. Dropping it cancels the call.
    fn serve(&self, request: Request<RequestBody>) -> ServeFuture;
}

impl<F, T> Dial for F
where
    F: Fn() -> io::Result<T> + Send + Sync,
    T: Io + 'static,
{
    fn dial(&self) -> DialFuture<'_> {
        let dialed = self().map(|io| Box::new(io) as Box<dyn Io>);
        Box::pin(std::future::ready(dialed))
    }
}

/// One configured server. Parsed from `host:port` or `http://host:port`.
#[derive(Clone)]
pub enum Endpoint {
    /// A server reached over TCP.
    Tcp {
        /// `host:port`.
        authority: Authority,
    },
    /// A server in this process.
    InProcess {
        /// The name, which reads like `host` or `host:port`.
        name: Authority,
        /// What opens streams to it.
        dial: Arc<dyn Dial>,
    },
}

impl Endpoint {
    /// The HTTP authority of requests to it.
    pub fn authority(&self) -> &Authority {
        match self {
            Endpoint::Tcp { authority } => authority,
            Endpoint::InProcess { name, .. } => name,
        }
    }

    /// The name in logs and metrics.
    pub fn name(&self) -> &str {
        self.authority().as_str()
    }

    /// What opens streams to this endpoint. `silence` is how long sent bytes may stay unacknowledged.
    pub(super) fn dialer(&self, silence: Duration) -> Arc<dyn Dial> {
        match self {
            Endpoint::Tcp { authority } => Arc::new(TcpDial { authority: authority.clone(), silence }),
            Endpoint::InProcess { dial, .. } => dial.clone(),
        }
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Endpoint {
    type Err = UpstreamError;

    fn from_str(text: &str) -> Result<Self, UpstreamError> {
        let invalid = |reason| UpstreamError::Endpoint { endpoint: text.to_owned(), reason };
        let rest = match text.split_once("://") {
            None => text,
            Some(("http", rest)) => rest,
            Some(("https", _)) => return Err(invalid("TLS to etcd is not supported yet; use http:// or host:port")),
            Some(_) => return Err(invalid("the scheme is not http")),
        };
        Ok(Endpoint::Tcp { authority: host_and_port(rest).map_err(invalid)? })
    }
}

/// Reads `host:port`, with or without a slash at its end.
///
/// # Errors
/// What is wrong with it.
pub fn host_and_port(text: &str) -> Result<Authority, &'static str> {
    let text = text.strip_suffix('/').unwrap_or(text);
    let authority: Authority = text.parse().map_err(|_| "it is not host:port")?;
    if text.contains('@') || authority.host().is_empty() {
        return Err("it is not host:port");
    }
    match authority.port_u16() {
        None | Some(0) => Err("it has no port"),
        Some(_) => Ok(authority),
    }
}

struct TcpDial {
    authority: Authority,
    silence: Duration,
}

impl Dial for TcpDial {
    fn dial(&self) -> DialFuture<'_> {
        Box::pin(async move {
            let stream = TcpStream::connect(self.authority.as_str()).await?;
            stream.set_nodelay(true)?;
            crate::socket::detect_dead_peer(&stream, self.silence);
            Ok(Box::new(stream) as Box<dyn Io>)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_host_and_port_with_or_without_http() {
        for (text, name) in [
            ("127.0.0.1:2379", "127.0.0.1:2379"),
            ("http://etcd-0.etcd:2379", "etcd-0.etcd:2379"),
            ("http://[::1]:2379/", "[::1]:2379"),
            ("127.0.0.1:2379/", "127.0.0.1:2379"),
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().name(), name);
        }
    }

    #[test]
    fn a_bad_endpoint_is_named_with_the_reason() {
        for (text, reason) in [
            ("https://a:1", "TLS"),
            ("unix:///x", "scheme"),
            ("a", "no port"),
            ("a:0", "no port"),
            ("", "host:port"),
            ("http://a:1/path", "host:port"),
            ("user@a:1", "host:port"),
            ("a:99999", "no port"),
        ] {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains(text) && error.contains(reason), "{text}: {error}");
        }
    }
}
