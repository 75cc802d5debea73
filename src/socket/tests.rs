//! Byte order, boundedness and liveness of the write-gathering wrapper.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    task::Waker,
};

use futures_util::future::poll_fn;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

/// A socket that takes as much of each write as its script says (0: not now), and never has anything to read.
#[derive(Default)]
struct Scripted {
    taken: Arc<Mutex<Vec<u8>>>,
    calls: Arc<Mutex<usize>>,
    script: VecDeque<usize>,
    start: Option<Vec<u8>>,
}

impl AsyncRead for Scripted {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.start.take() {
            Some(bytes) => {
                buffer.put_slice(&bytes);
                Poll::Ready(Ok(()))
            }
            None => Poll::Pending,
        }
    }
}

impl AsyncWrite for Scripted {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(data)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let room = self.script.pop_front().unwrap_or(usize::MAX);
        if room == 0 {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        *self.calls.lock().unwrap() += 1;
        let all: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).take(room).collect();
        self.taken.lock().unwrap().extend_from_slice(&all);
        Poll::Ready(Ok(all.len()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// One poll of an HTTP/2 connection that has nothing to read.
fn poll_reading<S: AsyncRead + AsyncWrite + Unpin>(gather: &mut Gather<S>) {
    let mut cx = Context::from_waker(Waker::noop());
    let mut space = [0; 64];
    assert!(Pin::new(gather).poll_read(&mut cx, &mut ReadBuf::new(&mut space)).is_pending());
}

fn flush<S: AsyncRead + AsyncWrite + Unpin>(gather: &mut Gather<S>) {
    let mut cx = Context::from_waker(Waker::noop());
    assert!(Pin::new(gather).poll_flush(&mut cx).is_ready());
}

fn write<S: AsyncRead + AsyncWrite + Unpin>(gather: &mut Gather<S>, data: &[u8]) {
    let mut cx = Context::from_waker(Waker::noop());
    assert!(matches!(Pin::new(gather).poll_write(&mut cx, data), Poll::Ready(Ok(n)) if n == data.len()));
}

#[test]
fn a_burst_over_two_polls_leaves_in_one_call_and_the_buffer_is_given_back() {
    let socket = Scripted::default();
    let (taken, calls) = (socket.taken.clone(), socket.calls.clone());
    let mut gather = Gather::new(socket);
    for round in 0..2u8 {
        poll_reading(&mut gather);
        for frame in 0..10u8 {
            write(&mut gather, &[round * 10 + frame; 300]);
            flush(&mut gather);
        }
        assert_eq!(*calls.lock().unwrap(), 0, "nothing leaves while responses may follow");
    }
    poll_reading(&mut gather);
    assert_eq!(*calls.lock().unwrap(), 1);
    let expected: Vec<u8> = (0..20u8).flat_map(|frame| [frame; 300]).collect();
    assert_eq!(*taken.lock().unwrap(), expected);
    poll_reading(&mut gather);
    assert_eq!(gather.pending.capacity(), 0);
}

#[test]
fn what_exceeds_the_buffer_is_written_at_once() {
    let socket = Scripted::default();
    let taken = socket.taken.clone();
    let mut gather = Gather::new(socket);
    for _ in 0..1000 {
        write(&mut gather, &[7; 4000]);
        assert!(gather.pending.len() <= CAPACITY);
    }
    assert!(taken.lock().unwrap().len() >= 1000 * 4000 - CAPACITY);
}

#[test]
fn http1_is_not_gathered_and_http2_is_even_when_its_preface_dribbles_in() {
    for (reads, gathers) in [
        (vec!["PRI * HTTP/2.0\r\n"], true),
        (vec!["P", "R", "I ", "* HTTP/2.0"], true),
        (vec!["P", "OST / HTTP/1.1"], false),
        (vec!["GET / HTTP/1.1"], false),
        (vec!["PROPFIND / HTTP/1.1"], false),
    ] {
        let mut gather = Gather::sniffing(Scripted::default());
        for read in &reads {
            gather.sniff(read.as_bytes());
        }
        assert_eq!(matches!(gather.mode, Mode::Gathering), gathers, "{reads:?}");
    }
}

#[test]
fn the_mode_follows_from_what_is_read() {
    let start = Some(b"PRI * HTTP/2.0".to_vec());
    let mut gather = Gather::sniffing(Scripted { start, ..Scripted::default() });
    let mut cx = Context::from_waker(Waker::noop());
    let mut space = [0; 64];
    let mut buffer = ReadBuf::new(&mut space);
    assert!(Pin::new(&mut gather).poll_read(&mut cx, &mut buffer).is_ready());
    assert!(matches!(gather.mode, Mode::Gathering));
}

#[tokio::test]
async fn a_lonely_write_arrives_without_a_timer() {
    let (near, mut far) = tokio::io::duplex(1024);
    let mut gather = Gather::new(near);
    gather.write_all(b"lonely").await.unwrap();
    gather.flush().await.unwrap();
    let connection = tokio::spawn(async move {
        let mut space = [0; 16];
        gather.read(&mut space).await.unwrap()
    });
    let mut seen = [0; 6];
    far.read_exact(&mut seen).await.unwrap();
    assert_eq!(&seen, b"lonely");
    drop(far);
    assert_eq!(connection.await.unwrap(), 0);
}

#[tokio::test]
async fn a_closed_peer_is_an_error_and_not_a_loop() {
    let (near, far) = tokio::io::duplex(16);
    drop(far);
    let mut gather = Gather::new(near);
    let result = async {
        gather.write_all(&[1; 100]).await?;
        gather.shutdown().await
    };
    assert!(result.await.is_err());
}

/// One poll of an HTTP/2 connection; how much it read.
fn poll_once<S: AsyncRead + AsyncWrite + Unpin>(gather: &mut Gather<S>) -> usize {
    let mut cx = Context::from_waker(Waker::noop());
    let mut space = [0; 256];
    let mut buffer = ReadBuf::new(&mut space);
    let _ = Pin::new(gather).poll_read(&mut cx, &mut buffer);
    buffer.filled().len()
}

const PONG: [u8; 17] = [0, 0, 8, 6, 1, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];

/// A connection that has read as many bytes and answered the ping among them.
fn pinged(bytes: usize) -> Gather<Scripted> {
    let mut gather = Gather::new(Scripted { start: Some(vec![0; bytes]), ..Scripted::default() });
    assert_eq!(poll_once(&mut gather), bytes);
    write(&mut gather, &PONG);
    flush(&mut gather);
    gather
}

#[tokio::test(start_paused = true)]
async fn the_answer_to_a_ping_that_came_with_a_request_leaves_with_what_follows() {
    let mut gather = pinged(200);
    let (taken, calls) = (gather.inner.taken.clone(), gather.inner.calls.clone());
    for _ in 0..5 {
        poll_once(&mut gather);
        flush(&mut gather);
    }
    assert_eq!(*calls.lock().unwrap(), 0);
    write(&mut gather, &[1; 60]);
    flush(&mut gather);
    poll_once(&mut gather);
    write(&mut gather, &[2; 60]);
    flush(&mut gather);
    assert_eq!(*calls.lock().unwrap(), 0, "what follows may be followed by more");
    poll_once(&mut gather);
    assert_eq!(*calls.lock().unwrap(), 1);
    assert_eq!(*taken.lock().unwrap(), [&PONG[..], &[1; 60], &[2; 60]].concat());
}

#[tokio::test(start_paused = true)]
async fn the_answer_to_a_ping_leaves_by_itself_when_nothing_follows() {
    let mut gather = pinged(200);
    let taken = gather.inner.taken.clone();
    let sent = taken.clone();
    let connection = poll_fn(move |cx| {
        let mut space = [0; 256];
        let _ = Pin::new(&mut gather).poll_read(cx, &mut ReadBuf::new(&mut space));
        if sent.lock().unwrap().is_empty() { Poll::Pending } else { Poll::Ready(()) }
    });
    let begun = tokio::time::Instant::now();
    tokio::time::timeout(Duration::from_secs(1), connection).await.unwrap();
    assert!(begun.elapsed() <= Duration::from_millis(2), "{:?}", begun.elapsed());
    assert_eq!(*taken.lock().unwrap(), PONG);
}

#[test]
fn the_answer_to_a_ping_that_came_alone_does_not_wait() {
    let mut gather = pinged(30);
    poll_once(&mut gather);
    poll_once(&mut gather);
    assert_eq!(*gather.inner.taken.lock().unwrap(), PONG);
}

/// Counts the writes that reach the socket.
struct Counting<S>(S, Arc<Mutex<usize>>);

impl<S: AsyncRead + Unpin> AsyncRead for Counting<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counting<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        *self.1.lock().unwrap() += 1;
        Pin::new(&mut self.0).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Without the wrapper, each of these responses is a write of its own.
#[tokio::test]
async fn two_hundred_responses_on_one_connection_leave_in_few_writes() {
    use http::{Request, Response};
    use http_body_util::{BodyExt, Full};
    use hyper::{body::Incoming, service::service_fn};
    use hyper_util::rt::{TokioExecutor, TokioIo};

    const CALLS: usize = 200;
    let writes = Arc::new(Mutex::new(0));
    let all_here = Arc::new(tokio::sync::Barrier::new(CALLS));
    let (near, far) = tokio::io::duplex(1 << 20);
    let service = service_fn(move |_: Request<Incoming>| {
        let all_here = all_here.clone();
        async move {
            all_here.wait().await;
            Ok::<_, io::Error>(Response::new(Full::new(bytes::Bytes::from(vec![7; 1024]))))
        }
    });
    let socket = TokioIo::new(Gather::new(Counting(far, writes.clone())));
    let mut server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    tokio::spawn(server.max_concurrent_streams(None).serve_connection(socket, service));
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(near));
    let (sender, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    let calls = (0..CALLS).map(|_| {
        let mut sender = sender.clone();
        async move {
            let request = Request::post("http://a/").body(Full::new(bytes::Bytes::new())).unwrap();
            sender.send_request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes()
        }
    });
    for body in futures_util::future::join_all(calls).await {
        assert_eq!(body, vec![7; 1024]);
    }
    let writes = *writes.lock().unwrap();
    assert!(writes <= CALLS / 8, "{writes} writes");
}

proptest! {
    /// Whatever the socket takes at a time, and however large and small writes, flushes and polls mix: all bytes, in order.
    #[test]
    fn bytes_stay_in_order(
        sizes in proptest::collection::vec(prop_oneof![1usize..600, 8000usize..9000, 20_000usize..70_000], 1..40),
        script in proptest::collection::vec(prop_oneof![Just(0usize), 1usize..50, 100usize..40_000], 0..200),
        pauses in proptest::collection::vec(0u8..4, 40),
    ) {
        let socket = Scripted { script: script.into(), ..Scripted::default() };
        let taken = socket.taken.clone();
        let mut gather = Gather::new(socket);
        let mut expected = Vec::new();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            for (index, size) in sizes.iter().enumerate() {
                let data: Vec<u8> = (0..*size).map(|i| (i * 31 + index) as u8).collect();
                expected.extend_from_slice(&data);
                let (head, tail) = data.split_at(size / 3);
                let mut chain = Buf::chain(head, tail);
                gather.write_all_buf(&mut chain).await.unwrap();
                match pauses[index] {
                    0 => gather.flush().await.unwrap(),
                    1 => {
                        gather.flush().await.unwrap();
                        poll_fn(|cx| {
                            let mut space = [0; 8];
                            let _ = Pin::new(&mut gather).poll_read(cx, &mut ReadBuf::new(&mut space));
                            Poll::Ready(())
                        }).await;
                    }
                    _ => {}
                }
                assert!(gather.pending.len() <= CAPACITY);
            }
            gather.shutdown().await.unwrap();
        });
        prop_assert_eq!(&*taken.lock().unwrap(), &expected);
    }
}
