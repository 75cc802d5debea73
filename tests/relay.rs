//! Forwarding seen from both ends: what a misbehaving or watchful upstream gets, and what the client gets in turn.

mod proxy;

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Body as _, Frame};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use millpond::{
    proto::etcdserverpb::{PutRequest, PutResponse, WatchRequest},
    server::{
        body::{Body, BodyError, success_trailers},
        listener, response,
    },
    status::Status,
    upstream::{ConnectionClass, Endpoint, EndpointId, Route, Settings, Upstream, grpc},
};
use prometheus::Registry;
use proxy::{Answering, Options, PATIENCE, Proxy, Served, probe_answer, serve};
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
    sync::{Notify, mpsc},
    time::timeout,
};
use tonic::Code;

const PUT: &str = "/etcdserverpb.KV/Put";
const WATCH: &str = "/etcdserverpb.Watch/Watch";
const FUTURE: &str = "/future.Service/Anything";
const AT: EndpointId = EndpointId(0);

/// A fake etcd that is well, and answers everything but probes by `answer`.
async fn fake<F, Fut>(answer: F) -> Served
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
fn client(proxy: &Proxy) -> Upstream {
    let endpoint: Endpoint = proxy.address().parse().unwrap();
    Upstream::start(Settings::new(vec![endpoint]), &Registry::new()).unwrap()
}

async fn put(client: &Upstream) -> Result<PutResponse, Status> {
    client.unary(AT, PUT, &PutRequest::default(), PATIENCE).await
}

async fn raw_client(address: &str) -> hyper::client::conn::http2::SendRequest<millpond::upstream::RequestBody> {
    let stream = TcpStream::connect(address).await.unwrap();
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn post(address: &str, path: &str) -> http::request::Builder {
    Request::post(format!("http://{address}{path}")).header("content-type", "application/grpc").header("te", "trailers")
}

/// Tells when it is dropped.
struct Dropped(mpsc::UnboundedSender<()>);

impl Drop for Dropped {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}

#[tokio::test]
async fn metadata_trailers_and_bytes_pass_unaltered_in_both_directions() {
    let (seen, mut requests) = mpsc::unbounded_channel();
    let upstream = fake(move |request: Request<Incoming>| {
        let seen = seen.clone();
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.unwrap();
            seen.send((head.headers, head.uri.path().to_owned(), body.to_bytes())).unwrap();
            let mut trailers = success_trailers();
            trailers.append("x-late", "1".parse().unwrap());
            trailers.append("x-late", "2".parse().unwrap());
            trailers.append("x-late-bin", "AAEC".parse().unwrap());
            let frames = [Frame::data(Bytes::from_static(b"not even gRPC")), Frame::trailers(trailers)];
            let frames = tokio_stream::iter(frames.map(Ok::<_, BodyError>));
            let mut response = response::streaming(Body::boxed(StreamBody::new(frames)));
            response.headers_mut().append("x-early-bin", "//79".parse().unwrap());
            response
        }
    })
    .await;
    let proxy = Proxy::before(&[&upstream.address]).await;
    let request = post(proxy.address(), FUTURE)
        .header("token", "secret")
        .header("hasleader", "true")
        .header("twice", "a")
        .header("twice", "b")
        .header("trace-bin", "AAECAw")
        .header("grpc-timeout", "20S")
        .body(Bytes::from_static(b"\0\0\0\0\x01x").into())
        .unwrap();
    let answer = raw_client(proxy.address()).await.send_request(request).await.unwrap();
    assert_eq!(answer.headers()["x-early-bin"], "//79");
    let body = answer.into_body().collect().await.unwrap();
    let trailers = body.trailers().unwrap();
    assert_eq!(trailers.get_all("x-late").iter().collect::<Vec<_>>(), ["1", "2"]);
    assert_eq!(trailers["x-late-bin"], "AAEC");
    assert_eq!(trailers["grpc-status"], "0");
    assert_eq!(body.to_bytes(), "not even gRPC");

    let (headers, path, bytes): (HeaderMap, String, Bytes) = requests.recv().await.unwrap();
    assert_eq!((path.as_str(), &bytes[..]), (FUTURE, &b"\0\0\0\0\x01x"[..]));
    for (name, value) in [("token", "secret"), ("hasleader", "true"), ("trace-bin", "AAECAw"), ("grpc-timeout", "20S")]
    {
        assert_eq!(headers[name], value);
    }
    assert_eq!(headers.get_all("twice").iter().collect::<Vec<_>>(), ["a", "b"]);
}

#[tokio::test]
async fn a_client_that_cancels_before_the_answer_cancels_upstream() {
    let (dropped, mut drops) = mpsc::unbounded_channel();
    let entered = Arc::new(Notify::new());
    let upstream = {
        let entered = entered.clone();
        fake(move |_| {
            let (guard, entered) = (Dropped(dropped.clone()), entered.clone());
            async move {
                entered.notify_one();
                let _guard = guard;
                std::future::pending().await
            }
        })
        .await
    };
    let proxy = Proxy::before(&[&upstream.address]).await;
    let client = client(&proxy);
    let call = tokio::spawn(async move { put(&client).await });
    entered.notified().await;
    call.abort();
    timeout(PATIENCE, drops.recv()).await.unwrap().unwrap();
}

/// A body that gives one message and then nothing for ever.
struct Endless(Option<Bytes>, #[allow(dead_code, reason = "tells of its drop")] Dropped);

impl http_body::Body for Endless {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.0.take().map_or(Poll::Pending, |bytes| Poll::Ready(Some(Ok(Frame::data(bytes)))))
    }
}

#[tokio::test]
async fn a_client_that_cancels_in_the_middle_of_a_stream_cancels_upstream() {
    let (dropped, mut drops) = mpsc::unbounded_channel();
    let upstream = fake(move |_| {
        let body = Endless(Some(Bytes::from_static(b"\0\0\0\0\x01x")), Dropped(dropped.clone()));
        async move { response::streaming(Body::boxed(body)) }
    })
    .await;
    let proxy = Proxy::before(&[&upstream.address]).await;
    let client = client(&proxy);
    let opened = client.open_stream::<WatchRequest>(AT, ConnectionClass::CatchUp, WATCH, &[]).await;
    let (sender, mut receiver) = opened.unwrap();
    assert_eq!(receiver.next().await, Some(Ok(Bytes::from_static(b"x"))));
    assert!(drops.try_recv().is_err());
    drop((sender, receiver));
    timeout(PATIENCE, drops.recv()).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_reset_by_the_upstream_reaches_the_client_with_its_reason() {
    for (reason, code) in [(h2::Reason::CANCEL, Code::Cancelled), (h2::Reason::REFUSED_STREAM, Code::Unavailable)] {
        let upstream = fake(move |_| {
            let error: Box<dyn std::error::Error + Send + Sync> = Box::new(h2::Error::from(reason));
            let frames = [Ok(Frame::data(Bytes::from_static(b"\0\0\0\0\x01x"))), Err(BodyError(error))];
            async move { response::streaming(Body::boxed(StreamBody::new(tokio_stream::iter(frames)))) }
        })
        .await;
        let proxy = Proxy::before(&[&upstream.address]).await;
        let client = client(&proxy);
        let opened = client.open_stream::<WatchRequest>(AT, ConnectionClass::CatchUp, WATCH, &[]).await;
        let (_sender, mut receiver) = opened.unwrap();
        let end = loop {
            match receiver.next().await.unwrap() {
                Ok(message) => assert_eq!(message, "x"),
                Err(status) => break status,
            }
        };
        assert_eq!(end.code, code, "{end}");
        assert!(proxy.upstream.preferred(&[]).is_some(), "one reset stream is no failure of the endpoint");
    }
}

#[tokio::test]
async fn a_write_that_may_have_arrived_is_not_sent_again() {
    let received = Arc::new(AtomicUsize::new(0));
    let arrived = Arc::new(Notify::new());
    let answer = {
        let (received, arrived) = (received.clone(), arrived.clone());
        move |_: Request<Incoming>| {
            received.fetch_add(1, Ordering::SeqCst);
            arrived.notify_one();
            std::future::pending()
        }
    };
    let (first, second) = (fake(answer.clone()).await, fake(answer).await);
    let proxy = Proxy::before(&[&first.address, &second.address]).await;
    proxy.until_preferred(0).await;
    let client = client(&proxy);
    let call = put(&client);
    let (result, ()) = tokio::join!(call, async {
        arrived.notified().await;
        first.stop.cancel();
    });
    assert_eq!(result.unwrap_err().code, Code::Unavailable);
    assert_eq!(received.load(Ordering::SeqCst), 1);
    proxy.until_preferred(1).await;
}

/// An address on which nothing listens.
async fn nowhere() -> String {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string()
}

async fn put_ok(_: Request<Incoming>) -> Response<Body> {
    response::framed(grpc::frame(&PutResponse::default()))
}

#[tokio::test]
async fn calls_at_once_after_the_start_wait_for_the_probes_and_pass_a_dead_endpoint() {
    let upstream = fake(put_ok).await;
    let proxy = Proxy::before(&[&nowhere().await, &upstream.address]).await;
    let answer = put(&client(&proxy)).await;
    assert_eq!(answer, Ok(PutResponse::default()));
}

#[tokio::test]
async fn without_an_upstream_a_write_fails_in_the_way_that_clients_know_to_be_safe_to_repeat() {
    let proxy = Proxy::before(&[&nowhere().await]).await;
    let status = put(&client(&proxy)).await.unwrap_err();
    assert_eq!((status.code, &*status.message), (Code::Unavailable, "there is no connection available"));
}

#[tokio::test]
async fn the_clients_deadline_holds_when_the_upstream_is_silent() {
    let upstream = fake(|_| std::future::pending()).await;
    let proxy = Proxy::before(&[&upstream.address]).await;
    proxy.until_preferred(0).await;
    let request = post(proxy.address(), PUT).header("grpc-timeout", "50m").body(Bytes::new().into()).unwrap();
    let answer = raw_client(proxy.address()).await.send_request(request).await.unwrap();
    let status = grpc::outcome(answer.headers()).unwrap().unwrap_err();
    assert_eq!((status.code, &*status.message), (Code::DeadlineExceeded, "context deadline exceeded"));
}

#[tokio::test]
async fn a_connection_lost_in_the_middle_of_a_stream_is_unavailable() {
    let (dropped, _drops) = mpsc::unbounded_channel();
    let upstream = fake(move |_| {
        let body = Endless(Some(Bytes::from_static(b"\0\0\0\0\x01x")), Dropped(dropped.clone()));
        async move { response::streaming(Body::boxed(body)) }
    })
    .await;
    let proxy = Proxy::before(&[&upstream.address]).await;
    let client = client(&proxy);
    let opened = client.open_stream::<WatchRequest>(AT, ConnectionClass::CatchUp, WATCH, &[]).await;
    let (_sender, mut receiver) = opened.unwrap();
    assert_eq!(receiver.next().await, Some(Ok(Bytes::from_static(b"x"))));
    upstream.stop.cancel();
    let end = receiver.next().await.unwrap().unwrap_err();
    assert_eq!(end.code, Code::Unavailable, "{end}");
    assert!(end.message.starts_with("error reading from server: "), "{end}");
    assert_eq!(receiver.next().await, None);
}

/// Answers with more than any window, without end.
fn flood() -> Response<Body> {
    let block = Bytes::from(vec![0; 1 << 20]);
    let frames = std::iter::repeat_with(move || Ok(Frame::data(block.clone())));
    response::streaming(Body::boxed(StreamBody::new(tokio_stream::iter(frames))))
}

#[tokio::test]
async fn streams_that_nobody_reads_stall_no_other_call() {
    let upstream = fake(|request: Request<Incoming>| async move {
        if request.uri().path() == PUT { put_ok(request).await } else { flood() }
    })
    .await;
    let proxy = Proxy::before(&[&upstream.address]).await;
    let mut sender = raw_client(proxy.address()).await;
    let mut stalled = Vec::new();
    for _ in 0..150 {
        let request = post(proxy.address(), FUTURE).body(Bytes::new().into()).unwrap();
        stalled.push(sender.send_request(request).await.unwrap());
    }
    let answer = put(&client(&proxy)).await;
    assert_eq!(answer, Ok(PutResponse::default()));
    // Another stream of the same class shares a connection upstream with the stalled ones.
    let request = post(proxy.address(), FUTURE).body(Bytes::new().into()).unwrap();
    let answer = raw_client(proxy.address()).await.send_request(request).await.unwrap();
    let first = timeout(PATIENCE, answer.into_body().frame()).await.unwrap().unwrap().unwrap();
    assert!(first.is_data());
}

#[tokio::test]
async fn a_client_may_cancel_thousands_of_streams_at_once() {
    let upstream = fake(|request: Request<Incoming>| async move {
        if request.uri().path() == PUT { put_ok(request).await } else { std::future::pending().await }
    })
    .await;
    let mut options = Options::new(&[&upstream.address]);
    options.settings.stream_limit = 4000;
    let proxy = options.start().await;
    proxy.until_preferred(0).await;
    let sender = raw_client(proxy.address()).await;
    for _ in 0..2 {
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..3000 {
            let mut sender = sender.clone();
            let request = post(proxy.address(), FUTURE).body(Bytes::new().into()).unwrap();
            calls.spawn(async move { sender.send_request(request).await.map(drop) });
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        calls.shutdown().await;
    }
    let request = post(proxy.address(), PUT).body(Bytes::from_static(&[0; 5]).into()).unwrap();
    let answer = sender.clone().send_request(request).await.expect("the connection lives");
    let body = answer.into_body().collect().await.unwrap();
    assert_eq!(body.trailers().and_then(grpc::outcome), Some(Ok(())));
    assert!(!sender.is_closed());
}

#[tokio::test]
async fn calls_over_the_limit_wait_and_are_answered() {
    let most = Arc::new(AtomicUsize::new(0));
    let now = Arc::new(AtomicUsize::new(0));
    let upstream = {
        let (most, now) = (most.clone(), now.clone());
        fake(move |request| {
            let (most, now) = (most.clone(), now.clone());
            async move {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(5)).await;
                now.fetch_sub(1, Ordering::SeqCst);
                put_ok(request).await
            }
        })
        .await
    };
    let mut options = Options::new(&[&upstream.address]);
    options.settings.forward_limit = 4;
    let proxy = options.start().await;
    let client = client(&proxy);
    let calls = (0..60).map(|_| async { put(&client).await });
    for answer in futures_util::future::join_all(calls).await {
        assert_eq!(answer, Ok(PutResponse::default()));
    }
    assert!(most.load(Ordering::SeqCst) <= 4);
}

#[tokio::test]
async fn a_stop_lets_calls_finish_refuses_new_connections_and_ends_in_time() {
    let finish = Arc::new(Notify::new());
    let entered = Arc::new(Notify::new());
    let upstream = {
        let (finish, entered) = (finish.clone(), entered.clone());
        fake(move |request| {
            let (finish, entered) = (finish.clone(), entered.clone());
            async move {
                entered.notify_one();
                finish.notified().await;
                put_ok(request).await
            }
        })
        .await
    };
    let mut options = Options::new(&[&upstream.address]);
    options.listener.grace = Duration::from_millis(500);
    let Proxy { served, .. } = options.start().await;
    let endpoint: Endpoint = served.address.parse().unwrap();
    let client = Upstream::start(Settings::new(vec![endpoint]), &Registry::new()).unwrap();
    let watching = client.open_stream::<WatchRequest>(AT, ConnectionClass::Feed, WATCH, &[]).await.unwrap();
    entered.notified().await;
    let answer = put(&client);
    let (answer, ()) = tokio::join!(answer, async {
        entered.notified().await;
        served.stop.cancel();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(TcpStream::connect(&served.address).await.is_err(), "nobody listens any more");
        finish.notify_waiters();
    });
    assert_eq!(answer, Ok(PutResponse::default()));
    timeout(PATIENCE, served.done).await.expect("the grace time is an end").unwrap();
    drop(watching);
}

#[tokio::test]
async fn what_is_no_http_ends_the_connection_and_nothing_else() {
    let upstream = fake(put_ok).await;
    let proxy = Proxy::before(&[&upstream.address]).await;
    let mut broken_preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    broken_preface.extend_from_slice(&[0xff; 64]);
    for garbage in [&b"\x16\x03\x01\x02\x00\x01\x00"[..], b"PRI * nonsense\r\n\r\n", &broken_preface, &[0; 300]] {
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut stream, garbage).await.unwrap();
        let mut answer = Vec::new();
        let ended = timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
        assert!(ended.is_ok(), "{garbage:?} is hung on to");
    }
    let answer = put(&client(&proxy)).await;
    assert_eq!(answer, Ok(PutResponse::default()));
}

#[tokio::test]
async fn an_upstream_in_this_process_is_reached_through_a_pipe() {
    let (pipes, mut accept) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(pipe) = accept.recv().await {
            let service = hyper::service::service_fn(|request: Request<Incoming>| async move {
                let probe = probe_answer(request.uri().path());
                Ok::<_, std::convert::Infallible>(match probe {
                    Some(response) => response,
                    None => put_ok(request).await,
                })
            });
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(server.serve_connection(TokioIo::new(pipe), service));
        }
    });
    let dial = move || {
        let (near, far) = tokio::io::duplex(64 * 1024);
        pipes.send(far).map_err(|_| std::io::ErrorKind::BrokenPipe)?;
        Ok(near)
    };
    let upstream = Upstream::start(Settings::new(vec![Endpoint::InProcess(Arc::new(dial))]), &Registry::new()).unwrap();
    assert_eq!(upstream.await_preferred(&[], PATIENCE).await, Some(AT));
    assert_eq!(upstream.name(AT), "embedded");
    let request = Request::post(FUTURE).body(Bytes::from_static(&[0; 5]).into()).unwrap();
    let forwarded = upstream.forward(Route::Preferred, millpond::upstream::ForwardClass::Unary, request).await.unwrap();
    assert!(forwarded.response.status().is_success() && !forwarded.response.body().is_end_stream());
    let answer = put(&upstream).await;
    assert_eq!(answer, Ok(PutResponse::default()));
}
