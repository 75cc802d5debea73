//! Forwarding seen from both ends: what a misbehaving or watchful upstream gets, and what the client gets in turn.

#![allow(clippy::disallowed_methods, reason = "what a test sends to itself is few")]

mod proxy;

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use millpond::{
    grpc::{self, BodyError, Incoming, success_trailers},
    proto::etcdserverpb::{PutResponse, WatchRequest},
    server::{body::Body, data::Data, response},
    upstream::{ForwardClass, Route, Settings, Upstream},
};
use prometheus::Registry;
use proxy::{
    Answering, PATIENCE, Proxy,
    fake::{AT, FUTURE, PUT, WATCH, client, fake, post, put, put_ok, raw_client},
    serve,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, mpsc},
    time::timeout,
};
use tonic::Code;

/// Tells when it is dropped.
struct Dropped(mpsc::Sender<()>);

impl Drop for Dropped {
    fn drop(&mut self) {
        let _ = self.0.try_send(());
    }
}

#[tokio::test]
async fn metadata_trailers_and_bytes_pass_unaltered_in_both_directions() {
    let (seen, mut requests) = mpsc::channel(16);
    let upstream = fake(move |request: Request<Incoming>| {
        let seen = seen.clone();
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.unwrap();
            seen.send((head.headers, head.uri.path().to_owned(), body.to_bytes())).await.unwrap();
            let mut trailers = success_trailers();
            trailers.append("x-late", "1".parse().unwrap());
            trailers.append("x-late", "2".parse().unwrap());
            trailers.append("x-late-bin", "AAEC".parse().unwrap());
            let frames = [data(b"not even gRPC"), Frame::trailers(trailers)];
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
    let (dropped, mut drops) = mpsc::channel(16);
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

fn data(bytes: &'static [u8]) -> Frame<Data> {
    Frame::data(Bytes::from_static(bytes).into())
}

/// A body that gives one message and then nothing for ever.
struct Endless(Option<&'static [u8]>, #[allow(dead_code, reason = "tells of its drop")] Dropped);

impl http_body::Body for Endless {
    type Data = Data;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Data>, BodyError>>> {
        self.0.take().map_or(Poll::Pending, |bytes| Poll::Ready(Some(Ok(data(bytes)))))
    }
}

#[tokio::test]
async fn a_client_that_cancels_in_the_middle_of_a_stream_cancels_upstream() {
    let (dropped, mut drops) = mpsc::channel(16);
    let upstream = fake(move |_| {
        let body = Endless(Some(b"\0\0\0\0\x01x"), Dropped(dropped.clone()));
        async move { response::streaming(Body::boxed(body)) }
    })
    .await;
    let proxy = Proxy::before(&[&upstream.address]).await;
    let client = client(&proxy);
    let opened = client.open_catch_up::<WatchRequest>(AT, WATCH).await;
    let (sender, mut receiver) = opened.unwrap();
    assert_eq!(receiver.next().await, Some(Ok(Bytes::from_static(b"x"))));
    assert!(drops.try_recv().is_err());
    drop((sender, receiver));
    timeout(PATIENCE, drops.recv()).await.unwrap().unwrap();
}

/// Whether the answer has begun or not. Nobody drops the call here before it has ended by itself.
#[tokio::test]
async fn a_client_that_breaks_its_request_off_is_no_failure_of_the_endpoint() {
    let (dropped, _drops) = mpsc::channel(16);
    let upstream = fake(move |request: Request<Incoming>| {
        let body = Endless(Some(b"\0\0\0\0\x01x"), Dropped(dropped.clone()));
        async move {
            if request.uri().path() == FUTURE {
                std::future::pending::<()>().await;
            }
            response::streaming(Body::boxed(body))
        }
    })
    .await;
    let settings = Settings::new(vec![upstream.address.parse().unwrap()]);
    let upstream = Upstream::start(settings, &Registry::new()).unwrap();
    upstream.health().wait_for(|health| health.preferred(&[]).is_some()).await.unwrap();
    let (told, mut ends) = mpsc::channel(1);
    let forwarding = Answering(move |request: Request<Incoming>| {
        let (upstream, told) = (upstream.clone(), told.clone());
        tokio::spawn(async move {
            let forwarded = upstream.forward(Route::Preferred, ForwardClass::Stream, request.map(Into::into)).await;
            let has_failed = match forwarded {
                Ok(forwarded) => forwarded.response.into_body().collect().await.is_err(),
                Err(_) => true,
            };
            told.send((has_failed, upstream.preferred(&[]).is_some())).await.unwrap();
        });
        std::future::pending()
    });
    let proxy = serve(Arc::new(forwarding), Default::default()).await;
    let stream = TcpStream::connect(&proxy.address).await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    for path in [FUTURE, WATCH] {
        let mut sender = sender.clone().ready().await.unwrap();
        let request = post(&proxy.address, path).body(()).unwrap();
        let (_answer, mut outgoing) = sender.send_request(request, false).unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        outgoing.send_reset(h2::Reason::CANCEL);
        let (has_failed, is_well) = timeout(PATIENCE, ends.recv()).await.unwrap().unwrap();
        assert!(has_failed && is_well, "{path}: failed {has_failed}, the endpoint is well {is_well}");
    }
}

#[tokio::test]
async fn a_reset_by_the_upstream_reaches_the_client_with_its_reason() {
    for (reason, code) in [(h2::Reason::CANCEL, Code::Cancelled), (h2::Reason::REFUSED_STREAM, Code::Unavailable)] {
        let upstream = fake(move |_| {
            let error: Box<dyn std::error::Error + Send + Sync> = Box::new(h2::Error::from(reason));
            let frames = [Ok(data(b"\0\0\0\0\x01x")), Err(BodyError(error))];
            async move { response::streaming(Body::boxed(StreamBody::new(tokio_stream::iter(frames)))) }
        })
        .await;
        let proxy = Proxy::before(&[&upstream.address]).await;
        let client = client(&proxy);
        let opened = client.open_catch_up::<WatchRequest>(AT, WATCH).await;
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
    let (dropped, _drops) = mpsc::channel(16);
    let upstream = fake(move |_| {
        let body = Endless(Some(b"\0\0\0\0\x01x"), Dropped(dropped.clone()));
        async move { response::streaming(Body::boxed(body)) }
    })
    .await;
    let proxy = Proxy::before(&[&upstream.address]).await;
    let client = client(&proxy);
    let opened = client.open_catch_up::<WatchRequest>(AT, WATCH).await;
    let (_sender, mut receiver) = opened.unwrap();
    assert_eq!(receiver.next().await, Some(Ok(Bytes::from_static(b"x"))));
    upstream.stop.cancel();
    let end = receiver.next().await.unwrap().unwrap_err();
    assert_eq!(end.code, Code::Unavailable, "{end}");
    assert!(end.message.starts_with("error reading from server: "), "{end}");
    assert_eq!(receiver.next().await, None);
}
