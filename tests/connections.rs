//! Many connections and streams: those that nobody reads, that are cancelled in masses, that wait, and the listener's end.

#![allow(clippy::disallowed_methods, reason = "what a test sends to itself is few")]

mod proxy;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body as _, Frame};
use http_body_util::{BodyExt, StreamBody};
use hyper_util::rt::{TokioExecutor, TokioIo};
use millpond::{
    grpc::{self, Incoming},
    proto::etcdserverpb::{
        AuthEnableRequest, AuthEnableResponse, Member, MemberListResponse, PutResponse, ResponseHeader, WatchRequest,
    },
    server::{body::Body, listener, response},
    status::Status,
    upstream::{AuthState, Endpoint, ForwardClass, Route, Settings, Upstream},
};
use prometheus::Registry;
use proxy::{
    Answering, Options, PATIENCE, Proxy,
    fake::{AT, FUTURE, PUT, WATCH, client, fake, post, put, put_ok, raw_client},
    probe_answer, serve,
};
use tokio::{
    io::AsyncReadExt,
    net::TcpStream,
    sync::{Notify, mpsc},
    time::{sleep, timeout},
};

/// Answers with more than any window, without end.
fn flood() -> Response<Body> {
    let block = Bytes::from(vec![0; 1 << 20]);
    let frames = std::iter::repeat_with(move || Ok(Frame::data(block.clone().into())));
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
    let watching = client.open_catch_up::<WatchRequest>(AT, WATCH).await.unwrap();
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

/// A forwarded keep-alive or watch never ends by itself: the proxy used to wait for it until its grace time was over, while
/// the client's new connection was refused and its leases ran out.
#[tokio::test]
async fn a_stop_ends_forwarded_streams_that_go_on_for_ever() {
    const KEEP_ALIVE: &str = "/etcdserverpb.Lease/LeaseKeepAlive";
    let upstream = fake(|request: Request<Incoming>| async move {
        if request.uri().path() == WATCH {
            std::future::pending::<()>().await;
        }
        let first = [Ok(Frame::data(Bytes::from_static(&[0; 5]).into()))];
        let endless = tokio_stream::StreamExt::chain(tokio_stream::iter(first), tokio_stream::pending());
        response::streaming(Body::boxed(StreamBody::new(endless)))
    })
    .await;
    let mut options = Options::new(&[&upstream.address]);
    options.listener.grace = Duration::from_secs(3600);
    let proxy = options.start().await;
    proxy.until_preferred(0).await;
    let mut sender = raw_client(proxy.address()).await;
    let mut open = async |path| sender.send_request(post(proxy.address(), path).body(Bytes::new().into()).unwrap());
    let (answered, unanswered) = (open(KEEP_ALIVE).await, open(WATCH).await);
    let mut answered = answered.await.unwrap().into_body();
    assert!(answered.frame().await.unwrap().unwrap().is_data());
    proxy.served.stop.cancel();
    let trailers = answered.frame().await.unwrap().unwrap().into_trailers().unwrap();
    let unanswered = timeout(PATIENCE, unanswered).await.unwrap().unwrap();
    for status in [&trailers, unanswered.headers()] {
        assert_eq!(
            (&status["grpc-status"], &status["grpc-message"]),
            (&"14".parse().unwrap(), &"etcdserver: server stopped".parse().unwrap())
        );
    }
    timeout(PATIENCE, proxy.served.done).await.expect("nothing is left to wait for").unwrap();
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

/// etcd 3.7.1 panics at Status between its removal and its end, as its own TestMemberRemove shows now and then.
#[tokio::test]
async fn a_member_that_has_been_removed_is_not_asked_for_its_status() {
    let (is_removed, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (removed, statuses) = (is_removed.clone(), asked.clone());
    let answering = Answering(move |request: Request<Incoming>| {
        let path = request.uri().path().to_owned();
        let is_removed = removed.load(Ordering::SeqCst);
        let answer = match path.as_str() {
            "/etcdserverpb.Cluster/MemberList" if is_removed => {
                let header = Some(ResponseHeader { cluster_id: 7, member_id: 8, ..Default::default() });
                let members = vec![Member { id: 9, ..Default::default() }];
                Some(response::framed(grpc::frame(&MemberListResponse { header, members })))
            }
            "/etcdserverpb.Maintenance/Status" if is_removed => {
                statuses.fetch_add(1, Ordering::SeqCst);
                None
            }
            path => probe_answer(path),
        };
        async move { answer.unwrap_or_else(|| response::error(&Status::STOPPED)) }
    });
    let served = serve(Arc::new(answering), listener::Settings::default()).await;
    let proxy = Proxy::before(&[&served.address]).await;
    proxy.until_preferred(0).await;
    is_removed.store(true, Ordering::SeqCst);
    proxy.until("nobody to ask", |health| health.preferred(&[]).is_none()).await;
    // One may have been under way.
    let before = asked.load(Ordering::SeqCst);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(asked.load(Ordering::SeqCst), before);
    assert!(before <= 1 && proxy.upstream.health().borrow().preferred(&[]).is_none());
}

#[tokio::test]
async fn an_upstream_in_this_process_is_reached_through_a_pipe() {
    let (pipes, mut accept) = mpsc::channel(16);
    tokio::spawn(async move {
        while let Some(pipe) = accept.recv().await {
            let service = hyper::service::service_fn(|request: Request<hyper::body::Incoming>| async move {
                let probe = probe_answer(request.uri().path());
                Ok::<_, std::convert::Infallible>(match probe {
                    Some(response) => response,
                    None => put_ok(request.map(Incoming::Http1)).await,
                })
            });
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(server.serve_connection(TokioIo::new(pipe), service));
        }
    });
    let dial = move || {
        let (near, far) = tokio::io::duplex(64 * 1024);
        pipes.try_send(far).map_err(|_| std::io::ErrorKind::BrokenPipe)?;
        Ok(near)
    };
    let upstream = Upstream::start(
        Settings::new(vec![Endpoint::InProcess { name: "embedded".parse().unwrap(), dial: Arc::new(dial) }]),
        &Registry::new(),
    )
    .unwrap();
    assert_eq!(upstream.await_preferred(&[], PATIENCE).await, Some(AT));
    assert_eq!(upstream.name(AT), "embedded");
    let request = Request::post(FUTURE).body(Bytes::from_static(&[0; 5]).into()).unwrap();
    let forwarded = upstream.forward(Route::Preferred, ForwardClass::Unary, request).await.unwrap();
    assert!(forwarded.response.status().is_success() && !forwarded.response.body().is_end_stream());
    let answer = put(&upstream).await;
    assert_eq!(answer, Ok(PutResponse::default()));
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
async fn a_client_that_never_reads_gives_its_permit_back() {
    let upstream = fake(|request: Request<Incoming>| async move {
        if request.uri().path() == PUT { put_ok(request).await } else { flood() }
    })
    .await;
    let mut options = Options::new(&[&upstream.address]);
    options.settings.forward_limit = 1;
    options.settings.stall_limit = Duration::from_millis(50);
    let proxy = options.start().await;
    let request = post(proxy.address(), "/etcdserverpb.KV/Txn").body(Bytes::new().into()).unwrap();
    let unread = raw_client(proxy.address()).await.send_request(request).await.unwrap();
    assert!(unread.status().is_success());
    assert_eq!(put(&client(&proxy)).await, Ok(PutResponse::default()), "the only permit is free again");
    let end = unread.into_body().collect().await.unwrap();
    assert_eq!(end.trailers().and_then(grpc::outcome).unwrap().unwrap_err().code, tonic::Code::Unavailable);
}

/// By then, what was held when it was asked for may have been let go, and members may have said that authentication is off.
#[tokio::test]
async fn authentication_is_not_off_when_an_answer_tells_that_it_is_on_however_late_that_comes() {
    const LATE: Duration = Duration::from_secs(11);
    let enabled = Arc::new(AtomicBool::new(false));
    let upstream = {
        let enabled = enabled.clone();
        let handler = Answering(move |request: Request<Incoming>| {
            let (probe, enabled) = (probe_answer(request.uri().path()), enabled.clone());
            async move {
                match probe {
                    // Nobody hears from a member before the client does.
                    Some(_) if enabled.load(Ordering::SeqCst) => std::future::pending().await,
                    Some(response) => response,
                    None => {
                        sleep(LATE).await;
                        enabled.store(true, Ordering::SeqCst);
                        response::framed(grpc::frame(&AuthEnableResponse::default()))
                    }
                }
            }
        });
        serve(Arc::new(handler), listener::Settings::default()).await
    };
    let proxy = Proxy::before(&[&upstream.address]).await;
    proxy.until("off", |health| health.auth == AuthState::Off).await;
    let enabling = async {
        let path = "/etcdserverpb.Auth/AuthEnable";
        client(&proxy).unary::<_, AuthEnableResponse>(AT, path, &AuthEnableRequest {}, PATIENCE).await
    };
    assert_eq!(enabling.await, Ok(AuthEnableResponse::default()));
    assert_eq!(proxy.upstream.auth().now(), AuthState::Changing);
}
