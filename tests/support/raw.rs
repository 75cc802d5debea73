//! gRPC by hand over HTTP/2, for what a proper client would never send.

use bytes::{Bytes, BytesMut};
use h2::{
    RecvStream, SendStream,
    client::{ResponseFuture, SendRequest},
};
use http::{HeaderMap, Request};
use tokio::{net::TcpStream, task::JoinHandle, time::timeout};

use super::client::PATIENCE;

/// One HTTP/2 connection. Dropping it closes it.
pub struct RawConnection {
    requests: SendRequest<Bytes>,
    endpoint: String,
    driving: JoinHandle<()>,
}

/// How a call ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// With a gRPC status.
    Status(u32),
    /// With an HTTP status and no gRPC one.
    Http(u16),
    /// With a reset of the stream or the connection.
    Reset,
}

impl RawConnection {
    /// Connects; whoever never takes data lets the peer send this many bytes per stream, and on the connection.
    pub async fn open(endpoint: &str, window: u32) -> Self {
        let stream = TcpStream::connect(endpoint).await.unwrap();
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(window)
            .initial_connection_window_size(window.max(65_535))
            .max_header_list_size(64 << 20);
        let (requests, connection) = builder.handshake(stream).await.unwrap();
        let driving = tokio::spawn(async move {
            let _ = connection.await;
        });
        Self { requests, endpoint: endpoint.to_owned(), driving }
    }

    /// Opens a call: where its request goes and where its answer comes from.
    pub async fn open_call(
        &self,
        path: &str,
        extra: &[(&str, &str)],
    ) -> Result<(ResponseFuture, SendStream<Bytes>), h2::Error> {
        let mut request = Request::post(format!("http://{}{path}", self.endpoint))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        for (name, value) in extra {
            request = request.header(*name, *value);
        }
        self.send(request.body(()).unwrap()).await
    }

    async fn send(&self, request: Request<()>) -> Result<(ResponseFuture, SendStream<Bytes>), h2::Error> {
        let mut ready = self.requests.clone().ready().await?;
        ready.send_request(request, false)
    }

    /// A call with this body, sent as it is; how it ended, and the bytes of its answer.
    pub async fn call(&self, path: &str, body: Bytes, extra: &[(&str, &str)]) -> (Ending, Bytes) {
        let whole = async {
            let (answer, mut outgoing) = self.open_call(path, extra).await?;
            // A server may refuse before it has read everything.
            let _ = outgoing.send_data(body, true);
            let answer = answer.await?;
            let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
            let (data, trailers) = read(answer.into_body()).await?;
            Ok::<_, h2::Error>((ending(status, &headers, &trailers), data))
        };
        let ended =
            timeout(PATIENCE, whole).await.unwrap_or_else(|_| panic!("no answer to {path} within {PATIENCE:?}"));
        ended.unwrap_or((Ending::Reset, Bytes::new()))
    }

    /// A call with this message and with metadata that need not be text: the HTTP status, the gRPC status, and its text.
    pub async fn refusal(&self, path: &str, message: &[u8], metadata: &[(&str, &[u8])]) -> (u16, String, String) {
        let mut request = Request::post(format!("http://{}{path}", self.endpoint)).header("te", "trailers");
        for (name, value) in metadata {
            request = request.header(*name, *value);
        }
        let (answer, mut outgoing) = self.send(request.body(()).unwrap()).await.unwrap();
        // A server may refuse before it has read everything.
        let _ = outgoing.send_data(framed(message), true);
        let answer = timeout(PATIENCE, answer).await.expect("an answer").unwrap();
        let (http, headers) = (answer.status().as_u16(), answer.headers().clone());
        let (_, trailers) = read(answer.into_body()).await.unwrap();
        let told = |name: &str| {
            let value = trailers.get(name).or_else(|| headers.get(name));
            value.map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default()
        };
        (http, told("grpc-status"), told("grpc-message"))
    }
}

impl Drop for RawConnection {
    fn drop(&mut self) {
        self.driving.abort();
    }
}

async fn read(mut body: RecvStream) -> Result<(Bytes, HeaderMap), h2::Error> {
    let mut data = BytesMut::new();
    while let Some(part) = body.data().await {
        let part = part?;
        body.flow_control().release_capacity(part.len())?;
        data.extend_from_slice(&part);
    }
    Ok((data.freeze(), body.trailers().await?.unwrap_or_default()))
}

fn ending(http: u16, headers: &HeaderMap, trailers: &HeaderMap) -> Ending {
    let status = trailers.get("grpc-status").or_else(|| headers.get("grpc-status"));
    let code = status.and_then(|value| value.to_str().ok()?.parse().ok());
    code.map_or(Ending::Http(http), Ending::Status)
}

/// A message with gRPC's prefix: no compression, and the length.
pub fn framed(message: &[u8]) -> Bytes {
    framed_as(0, message.len() as u32, message)
}

/// A message with a prefix that may lie.
pub fn framed_as(flag: u8, length: u32, message: &[u8]) -> Bytes {
    [&[flag][..], &length.to_be_bytes(), message].concat().into()
}
