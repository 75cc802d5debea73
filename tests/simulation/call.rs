//! A call of the Watch service, without the network: what the client reads is the body that the service makes.

use std::{future::poll_fn, net::SocketAddr, pin::Pin};

use bytes::{Buf, Bytes, BytesMut};
use http::Request;
use http_body::Body as _;
use millpond::{
    grpc::{self, Incoming},
    proto::{
        etcdserverpb::{WatchRequest, WatchResponse},
        paths,
    },
    server::{body::Body, listener::Connection, watch::Watch},
    status::Status,
};
use prost::Message;
use tokio_util::sync::CancellationToken;
use tonic::Code;

/// A stream of requests and responses.
pub struct Call {
    requests: h2::SendStream<Bytes>,
    responses: Body,
    said: BytesMut,
    /// The way of the requests ends with the place that its answer would have.
    _way: h2::server::SendResponse<Bytes>,
}

impl Call {
    /// Calls `watch`. Requests go over HTTP/2, since that is what the service reads them from.
    ///
    /// # Errors
    /// The service's refusal.
    pub async fn open(watch: &Watch) -> Result<Self, Status> {
        let (near, far) = tokio::io::duplex(1 << 16);
        let (client, server) = tokio::join!(h2::client::handshake(near), h2::server::handshake(far));
        let ((mut client, connection), mut server) = (client.expect("a sound pipe"), server.expect("a sound pipe"));
        tokio::spawn(connection);
        let request = Request::post(paths::WATCH).body(()).expect("a path");
        let (_, requests) = client.send_request(request, false).expect("a connection without calls");
        let (request, way) = server.accept().await.expect("a call").expect("a sound pipe");
        tokio::spawn(async move { while server.accept().await.is_some() {} });
        let peer = SocketAddr::from(([127, 0, 0, 1], 1));
        let connection = Connection::new(peer, CancellationToken::new());
        let response = watch.call(&connection, request.map(Incoming::Http2)).await;
        match grpc::outcome(response.headers()) {
            Some(Err(status)) => Err(status),
            _ => Ok(Self { requests, responses: response.into_body(), said: BytesMut::new(), _way: way }),
        }
    }

    pub fn ask(&mut self, request: &WatchRequest) {
        let message = request.encode_to_vec();
        let framed = [&grpc::prefix(message.len())[..], &message].concat();
        self.requests.send_data(framed.into(), false).expect("the service reads until the call is over");
    }

    /// The next response, or how the call ended. May be dropped and called again.
    pub async fn next(&mut self) -> Result<WatchResponse, Status> {
        loop {
            if let Some((length, rest)) = grpc::split(&self.said)
                && rest.len() >= length
            {
                self.said.advance(grpc::prefix(0).len());
                let message = self.said.split_to(length);
                return Ok(WatchResponse::decode(message).expect("the service sends what can be decoded"));
            }
            let frame = poll_fn(|cx| Pin::new(&mut self.responses).poll_frame(cx)).await;
            let broken = |why: &str| Status::new(Code::Internal, format!("the call broke off: {why}"));
            match frame.map(|frame| frame.map(|frame| frame.into_data())) {
                Some(Ok(Ok(mut data))) => self.said.extend_from_slice(&data.copy_to_bytes(data.remaining())),
                Some(Ok(Err(frame))) => {
                    let outcome = frame.trailers_ref().and_then(grpc::outcome);
                    return Err(outcome.and_then(Result::err).unwrap_or_else(|| broken("it was well")));
                }
                Some(Err(error)) => return Err(broken(&error.to_string())),
                None => return Err(broken("nothing follows")),
            }
        }
    }
}
