//! Fake etcds that are well by their probes and otherwise do what a test wants, and clients that see every frame.

use std::{future::Future, sync::Arc, time::Duration};

use http::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use millpond::{
    grpc::{self, Incoming},
    proto::etcdserverpb::{PutRequest, PutResponse},
    server::{body::Body, listener, response},
    status::Status,
    upstream::{Endpoint, EndpointId, RequestBody, Settings, Upstream},
};
use prometheus::Registry;
use tokio::net::TcpStream;

use super::{Answering, PATIENCE, Proxy, Served, probe_answer, serve};

pub const PUT: &str = "/etcdserverpb.KV/Put";
pub const WATCH: &str = "/etcdserverpb.Watch/Watch";
pub const FUTURE: &str = "/future.Service/Anything";
pub const AT: EndpointId = EndpointId(0);

/// A fake etcd that is well, and answers everything but probes by `answer`.
pub async fn fake<F, Fut>(answer: F) -> Served
where
    F: Fn(Request<Incoming>) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Response<Body>> + Send + 'static,
{
    // A fake has no manners: when it stops, its connections break.
    let abrupt = listener::Settings { grace: Duration::ZERO, ..listener::Settings::default() };
    let handler = Answering(move |request: Request<Incoming>| {
        let probe = probe_answer(request.uri().path());
        let answer = answer.clone();
        async move {
            match probe {
                Some(response) => response,
                None => answer(request).await,
            }
        }
    });
    serve(Arc::new(handler), abrupt).await
}

/// A client of the proxy that sees everything that gRPC sees.
pub fn client(proxy: &Proxy) -> Upstream {
    let endpoint: Endpoint = proxy.address().parse().unwrap();
    Upstream::start(Settings::new(vec![endpoint]), &Registry::new()).unwrap()
}

pub async fn put(client: &Upstream) -> Result<PutResponse, Status> {
    client.unary(AT, PUT, &PutRequest::default(), PATIENCE).await
}

pub async fn raw_client(address: &str) -> hyper::client::conn::http2::SendRequest<RequestBody> {
    let stream = TcpStream::connect(address).await.unwrap();
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

pub fn post(address: &str, path: &str) -> http::request::Builder {
    Request::post(format!("http://{address}{path}")).header("content-type", "application/grpc").header("te", "trailers")
}

pub async fn put_ok(_: Request<Incoming>) -> Response<Body> {
    response::framed(grpc::frame(&PutResponse::default()))
}
