//! The floor: a server of nothing but hyper and bytes that were encoded before it started. Every unary call gets the same
//! answer. A put is also sent to every open watch as one frame that all of them share. It gathers its writes as Millpond does,
//! since without that most of the cost is system calls.

use std::{
    convert::Infallible,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, header::CONTENT_TYPE};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use millpond::{
    config::Config,
    grpc,
    proto::{
        etcdserverpb::{PutRequest, PutResponse, WatchResponse},
        mvccpb::{Event, KeyValue},
        paths,
    },
    socket::Gather,
};
use prost::Message;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::broadcast::{self, Receiver, Sender},
};
use tokio_stream::{StreamExt, iter, wrappers::BroadcastStream};

use super::Outcome;

/// Windows as large as Millpond's clients could ask for, so that flow control costs nothing.
const WINDOW: u32 = 8 << 20;

/// Events that a watch may be behind.
const BACKLOG: usize = 1024;

struct Bare {
    answer: Bytes,
    events: Sender<Bytes>,
}

/// Serves on the port that is the first argument. The second names a file with the gRPC-framed answer to every unary call.
pub fn serve(arguments: &[String]) -> Outcome<()> {
    let [port, answer] = arguments else { return Err("bare PORT FILE".into()) };
    let answer = Bytes::from(std::fs::read(Path::new(answer))?);
    let port: u16 = port.parse()?;
    let bare = Arc::new(Bare { answer, events: broadcast::channel(BACKLOG).0 });
    let workers = Config::default().worker_threads();
    tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build()?.block_on(async {
        let listener = TcpListener::bind(("127.0.0.1", port)).await?;
        loop {
            let (socket, _) = listener.accept().await?;
            tokio::spawn(connection(Arc::clone(&bare), socket));
        }
    })
}

async fn connection(bare: Arc<Bare>, socket: TcpStream) {
    // A client that is gone is no concern of a benchmark's server.
    let _ = socket.set_nodelay(true);
    let service = service_fn(move |request| answer(Arc::clone(&bare), request));
    let gather = Gather::new(socket);
    let outlet = gather.outlet();
    let connection = http2::Builder::new(TokioExecutor::new())
        .max_concurrent_streams(None)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .serve_connection(TokioIo::new(gather), service);
    let _ = outlet.drive(connection).await;
}

async fn answer(
    bare: Arc<Bare>,
    request: Request<Incoming>,
) -> Result<Response<BoxBody<Bytes, Infallible>>, Infallible> {
    let path = request.uri().path();
    let body = if path == paths::WATCH {
        watch(bare.events.subscribe(), request.into_body()).boxed()
    } else if path == paths::PUT {
        let put = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        let _ = bare.events.send(event(&put));
        Answer::new(grpc::frame(&PutResponse::default())).boxed()
    } else {
        let _ = request.into_body().collect().await;
        Answer::new(bare.answer.clone()).boxed()
    };
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(grpc::MEDIA_TYPE));
    Ok(response)
}

/// The event of a put, as every watcher is sent it.
fn event(put: &[u8]) -> Bytes {
    let put = put.get(5..).and_then(|message| PutRequest::decode(message).ok()).unwrap_or_default();
    let kv = KeyValue { key: put.key, value: put.value, version: 1, ..Default::default() };
    let event = Event { kv: Some(kv), ..Default::default() };
    grpc::frame(&WatchResponse { events: vec![event], ..Default::default() })
}

/// One watcher was created; then whatever is put. The request stays open for as long as the answer does.
fn watch(events: Receiver<Bytes>, request: Incoming) -> impl Body<Data = Bytes, Error = Infallible> {
    let created = grpc::frame(&WatchResponse { created: true, ..Default::default() });
    let events = BroadcastStream::new(events).filter_map(Result::ok);
    StreamBody::new(iter([created]).chain(events).map(move |bytes| {
        let _held = &request;
        Ok(Frame::data(bytes))
    }))
}

/// One message and the trailers of success.
struct Answer {
    message: Option<Bytes>,
    ended: bool,
}

impl Answer {
    fn new(message: Bytes) -> Self {
        Self { message: Some(message), ended: false }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(message) = self.message.take() {
            return Poll::Ready(Some(Ok(Frame::data(message))));
        }
        if std::mem::replace(&mut self.ended, true) {
            return Poll::Ready(None);
        }
        let mut trailers = HeaderMap::with_capacity(1);
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }
}
