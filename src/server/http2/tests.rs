//! HTTP/2 as a client sees it who looks at frames, and as the bodies do that are sent.

use std::{
    collections::VecDeque,
    future::{pending, ready},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use ::http::{HeaderMap, HeaderValue, StatusCode};
use bytes::{Bytes, BytesMut};
use h2::{RecvStream, client};
use http_body::Frame;
use tokio::{
    io::{AsyncWriteExt, DuplexStream},
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use super::*;
use crate::socket::Calls;

const PATIENCE: Duration = Duration::from_secs(10);

/// A body of frames that are at hand or to come. Counts how often it was asked; tells when it is dropped.
struct Script {
    frames: VecDeque<Result<Frame<Data>, BodyError>>,
    coming: Option<mpsc::Receiver<Bytes>>,
    asked: Arc<AtomicUsize>,
    _dropped: Option<oneshot::Sender<()>>,
}

impl Script {
    fn of(frames: impl IntoIterator<Item = Result<Frame<Data>, BodyError>>) -> Self {
        Self { frames: frames.into_iter().collect(), coming: None, asked: Arc::default(), _dropped: None }
    }
}

impl Body for Script {
    type Data = Data;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Data>, BodyError>>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        match (self.frames.pop_front(), &mut self.coming) {
            (Some(frame), _) => Poll::Ready(Some(frame)),
            (None, Some(coming)) => coming.poll_recv(cx).map(|data| data.map(|data| Ok(Frame::data(data.into())))),
            (None, None) => Poll::Ready(None),
        }
    }
}

fn data(bytes: impl Into<Bytes>) -> Result<Frame<Data>, BodyError> {
    Ok(Frame::data(bytes.into().into()))
}

const SETTINGS: Settings = Settings {
    keepalive_interval: Duration::from_secs(60),
    keepalive_timeout: Duration::from_secs(20),
    grace: Duration::ZERO,
};

/// Serves one connection, whose client's end it gives.
fn serving<A, F>(farewell: Farewell, answer: A) -> (DuplexStream, JoinHandle<Result<(), Ended>>)
where
    A: Fn(Request<Incoming>) -> F + Send + Sync + 'static,
    F: Future<Output = Response<Script>> + Send + 'static,
{
    let (near, far) = tokio::io::duplex(1 << 16);
    let served = tokio::spawn(async move {
        let (gather, mut calls) = (Gather::new(far), Calls::default());
        let mut outlet = gather.outlet();
        let mut serving = pin!(serve(gather, &SETTINGS, calls.executor(), farewell, answer));
        poll_fn(|cx| calls.poll(cx, &mut outlet, serving.as_mut())).await
    });
    (near, served)
}

/// A client whose streams may be sent `window` bytes before it has read any.
async fn client(near: DuplexStream, window: u32) -> client::SendRequest<Bytes> {
    let mut builder = client::Builder::new();
    let (sender, connection) = builder.initial_window_size(window).handshake(near).await.unwrap();
    tokio::spawn(connection);
    sender.ready().await.unwrap()
}

fn call(client: &mut client::SendRequest<Bytes>) -> (client::ResponseFuture, SendStream<Bytes>) {
    client.send_request(Request::post("http://a/b").body(()).unwrap(), false).unwrap()
}

/// Reads what is there of a body until it ends.
async fn read(body: &mut RecvStream) -> Result<BytesMut, h2::Error> {
    let mut all = BytesMut::new();
    while let Some(data) = body.data().await.transpose()? {
        body.flow_control().release_capacity(data.len())?;
        all.extend_from_slice(&data);
    }
    Ok(all)
}

#[tokio::test]
async fn an_answer_has_its_head_its_data_and_its_trailers() {
    let (near, _) = serving(Farewell::default(), |_| {
        let trailers = HeaderMap::from_iter([("a".parse().unwrap(), HeaderValue::from_static("b"))]);
        let frames = [data("one"), data(""), data("two"), Ok(Frame::trailers(trailers))];
        let mut response = Response::new(Script::of(frames));
        *response.status_mut() = StatusCode::ACCEPTED;
        ready(response)
    });
    let mut client = client(near, 1 << 16).await;
    let response = call(&mut client).0.await.unwrap();
    assert_eq!(response.status(), StatusCode::ACCEPTED);
    let mut body = response.into_body();
    assert_eq!(read(&mut body).await.unwrap(), "onetwo");
    assert_eq!(body.trailers().await.unwrap().unwrap()["a"], "b");
}

#[tokio::test]
async fn what_is_empty_needs_no_room() {
    let (near, _) = serving(Farewell::default(), |_| {
        ready(Response::new(Script::of([data(""), Ok(Frame::trailers(HeaderMap::new()))])))
    });
    let mut client = client(near, 0).await;
    let mut body = call(&mut client).0.await.unwrap().into_body();
    assert!(timeout(PATIENCE, body.trailers()).await.unwrap().unwrap().is_some());
}

#[tokio::test]
async fn what_was_read_of_a_request_makes_room_for_more() {
    let (near, _) = serving(Farewell::default(), |request| async {
        let mut body = request.into_body();
        let (mut read, mut told) = (0, HeaderMap::new());
        while let Some(Ok(frame)) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
            match frame.into_data() {
                Ok(data) => read += data.len(),
                Err(frame) => told = frame.into_trailers().unwrap(),
            }
        }
        Response::new(Script::of([data(format!("{read} {told:?}"))]))
    });
    let mut client = client(near, 1 << 16).await;
    let (response, mut request) = call(&mut client);
    for _ in 0..20 {
        let mut rest = Bytes::from(vec![0; STREAM_WINDOW as usize / 4]);
        while !rest.is_empty() {
            request.reserve_capacity(rest.len());
            let room = poll_fn(|cx| request.poll_capacity(cx)).await.unwrap().unwrap();
            request.send_data(rest.split_to(room), false).unwrap();
        }
    }
    request.send_trailers(HeaderMap::from_iter([("a".parse().unwrap(), HeaderValue::from_static("b"))])).unwrap();
    let answer = read(response.await.unwrap().body_mut()).await.unwrap();
    assert_eq!(answer, format!("{} {{\"a\": \"b\"}}", 5 * STREAM_WINDOW));
}

/// Of an endless answer only as much is made as the client takes, and what h2 holds for it.
#[tokio::test]
async fn an_answer_waits_for_room() {
    const LENGTH: usize = 4 << 20;
    for piece in [2 << 10, 64 << 10] {
        let asked = Arc::<AtomicUsize>::default();
        let counted = asked.clone();
        let (near, _) = serving(Farewell::default(), move |_| {
            let pieces = (0..LENGTH / piece).map(|number| data(vec![number as u8; piece]));
            ready(Response::new(Script { asked: counted.clone(), ..Script::of(pieces) }))
        });
        let mut client = client(near, 1 << 10).await;
        let mut body = call(&mut client).0.await.unwrap().into_body();
        sleep(Duration::from_millis(100)).await;
        let (made, most) = (asked.load(Ordering::Relaxed), 2 + UNASKED.max(piece) / piece);
        assert!(made <= most, "{made} pieces of {piece} bytes were made that nobody takes");
        let all = read(&mut body).await.unwrap();
        assert!(all.chunks(piece).enumerate().all(|(number, bytes)| bytes.iter().all(|byte| *byte == number as u8)));
        assert_eq!(all.len(), LENGTH);
    }
}

/// A body is asked once for what has come and once more to hear that there is nothing else.
#[tokio::test]
async fn what_is_sent_wakes_nobody_in_vain() {
    const EVENTS: usize = 50;
    for is_late in [false, true] {
        let asked = Arc::<AtomicUsize>::default();
        let (send, coming) = mpsc::channel(1);
        let script = Script { coming: Some(coming), asked: asked.clone(), ..Script::of([data("at hand")]) };
        let script = parking_lot::Mutex::new(Some(script));
        let (near, _) = serving(Farewell::default(), move |_| {
            let script = script.lock().take().unwrap();
            async move {
                if is_late {
                    sleep(Duration::from_millis(20)).await;
                }
                Response::new(script)
            }
        });
        let mut client = client(near, 1 << 20).await;
        let (response, _request) = call(&mut client);
        let mut body = response.await.unwrap().into_body();
        assert_eq!(timeout(PATIENCE, body.data()).await.unwrap().unwrap().unwrap(), "at hand");
        for _ in 0..EVENTS {
            send.send(Bytes::from(vec![7; 600])).await.unwrap();
            assert_eq!(timeout(PATIENCE, body.data()).await.unwrap().unwrap().unwrap().len(), 600);
        }
        // A call that answers at once is polled a second time as it begins.
        let (asked, limit) = (asked.load(Ordering::Relaxed), 2 * EVENTS + if is_late { 2 } else { 3 });
        assert!(asked <= limit, "late: {is_late}: {EVENTS} events, and {asked} times asked for them");
    }
}

#[tokio::test]
async fn a_call_that_its_client_resets_is_dropped_whatever_it_waits_for() {
    for is_answered in [false, true] {
        let (tell, dropped) = oneshot::channel();
        let (_send, coming) = mpsc::channel(1);
        let script = Script { coming: Some(coming), _dropped: Some(tell), ..Script::of([]) };
        let script = parking_lot::Mutex::new(Some(script));
        let (near, _) = serving(Farewell::default(), move |_| {
            let script = script.lock().take().unwrap();
            async move {
                if !is_answered {
                    pending::<()>().await;
                }
                Response::new(script)
            }
        });
        let mut client = client(near, 1 << 16).await;
        let (response, mut request) = call(&mut client);
        if is_answered {
            response.await.unwrap();
        } else {
            sleep(Duration::from_millis(20)).await;
        }
        request.send_reset(Reason::CANCEL);
        assert!(timeout(PATIENCE, dropped).await.unwrap().is_err());
    }
}

#[tokio::test]
async fn a_body_that_breaks_off_resets_its_stream_and_passes_a_reset_on() {
    let cases: [(fn() -> BodyError, _); 2] = [
        (|| BodyError("why".into()), Reason::INTERNAL_ERROR),
        (|| BodyError(h2::Error::from(Reason::CANCEL).into()), Reason::CANCEL),
    ];
    for (breaks, reason) in cases {
        let body = move || Script::of([data("half"), Err(breaks())]);
        let (near, _) = serving(Farewell::default(), move |_| ready(Response::new(body())));
        let mut client = client(near, 1 << 16).await;
        let error = async { read(call(&mut client).0.await?.body_mut()).await }.await.unwrap_err();
        assert_eq!((error.is_remote(), error.reason()), (true, Some(reason)));
    }
}

#[tokio::test]
async fn a_client_that_is_told_to_go_is_still_answered() {
    let farewell = Farewell::default();
    let (go, gone) = oneshot::channel::<()>();
    let gone = parking_lot::Mutex::new(Some(gone));
    let (near, served) = serving(farewell.clone(), move |_| {
        let gone = gone.lock().take().unwrap();
        async move {
            gone.await.unwrap();
            Response::new(Script::of([data("late")]))
        }
    });
    let mut client = client(near, 1 << 16).await;
    let (response, _) = call(&mut client);
    sleep(Duration::from_millis(20)).await;
    farewell.leave.cancel();
    let refused = async {
        while poll_fn(|cx| client.poll_ready(cx)).await.is_ok()
            && client.send_request(Request::post("http://a/b").body(()).unwrap(), true).is_ok()
        {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, refused).await.unwrap();
    go.send(()).unwrap();
    assert_eq!(read(response.await.unwrap().body_mut()).await.unwrap(), "late");
    timeout(PATIENCE, served).await.unwrap().unwrap().unwrap();
}

/// Whatever it waits for; but not before it was asked to go.
#[tokio::test]
async fn a_client_that_does_not_go_is_cut_off_at_the_end_of_the_grace_time() {
    let farewell = Farewell::default();
    let (near, served) = serving(farewell.clone(), |_| pending::<Response<Script>>());
    let mut client = client(near, 1 << 16).await;
    let (response, _request) = call(&mut client);
    sleep(Duration::from_millis(20)).await;
    farewell.leave.cancel();
    sleep(Duration::from_millis(50)).await;
    assert!(!served.is_finished());
    farewell.close.cancel();
    timeout(PATIENCE, served).await.unwrap().unwrap().unwrap();
    assert!(response.await.is_err());
}

#[tokio::test]
async fn a_client_that_has_not_finished_its_greeting_holds_no_stop_up() {
    let farewell = Farewell::default();
    let (mut near, served) = serving(farewell.clone(), |_| pending::<Response<Script>>());
    near.write_all(b"PRI * HTTP").await.unwrap();
    sleep(Duration::from_millis(20)).await;
    farewell.leave.cancel();
    timeout(PATIENCE, served).await.unwrap().unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_finish_its_greeting_is_let_go() {
    let (mut near, served) = serving(Farewell::default(), |_| pending::<Response<Script>>());
    near.write_all(b"PRI * HTTP").await.unwrap();
    let ended = timeout(GREETING * 2, served).await.unwrap().unwrap();
    assert!(matches!(ended, Err(Ended::Silent)), "{ended:?}");
}

#[tokio::test(start_paused = true)]
async fn a_silent_client_is_let_go_and_one_that_answers_pings_is_not() {
    let long = SETTINGS.keepalive_interval * 10;
    let never = |_| pending::<Response<Script>>();
    let (near, served) = serving(Farewell::default(), never);
    let mut client = client(near, 1 << 16).await;
    let _call = call(&mut client);
    assert!(timeout(long, served).await.is_err());

    let (mut near, served) = serving(Farewell::default(), never);
    near.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let begun = Instant::now();
    let ended = timeout(long, served).await.unwrap().unwrap();
    assert!(matches!(ended, Err(Ended::Silent)), "{ended:?}");
    assert_eq!(begun.elapsed().as_secs(), (SETTINGS.keepalive_interval + SETTINGS.keepalive_timeout).as_secs());
}
