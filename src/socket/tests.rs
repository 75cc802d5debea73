//! Byte order, boundedness and liveness of the write-gathering wrapper.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::Waker,
};

use bytes::{Bytes, buf::Chain};
use futures_util::future::poll_fn;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{wakes::Wakes, *};

mod pings;
mod room;

/// A socket that takes as much of each write as its script says (0: not now), and never has anything to read.
#[derive(Default)]
struct Scripted {
    taken: Arc<Mutex<Vec<u8>>>,
    calls: Arc<Mutex<usize>>,
    script: VecDeque<usize>,
}

impl AsyncRead for Scripted {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
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

fn flush<S: AsyncRead + AsyncWrite + Unpin>(gather: &mut Gather<S>) {
    let mut cx = Context::from_waker(Waker::noop());
    assert!(Pin::new(gather).poll_flush(&mut cx).is_ready());
}

fn write<S: AsyncRead + AsyncWrite + Unpin>(gather: &mut Gather<S>, data: &[u8]) {
    let mut cx = Context::from_waker(Waker::noop());
    assert!(matches!(Pin::new(gather).poll_write(&mut cx, data), Poll::Ready(Ok(n)) if n == data.len()));
}

fn end_turn<S: AsyncWrite + Unpin>(outlet: &mut Outlet<S>, goes_on: bool) {
    outlet.end_turn(&mut Context::from_waker(Waker::noop()), goes_on);
}

fn pending<S>(gather: &Gather<S>) -> usize {
    gather.socket.lock().pending.len()
}

#[test]
fn what_was_gathered_leaves_in_one_call_at_the_end_of_the_turn_and_the_buffer_is_given_back() {
    let socket = Scripted::default();
    let (taken, calls) = (socket.taken.clone(), socket.calls.clone());
    let mut gather = Gather::new(socket);
    let mut outlet = gather.outlet();
    for round in 0..2u8 {
        for frame in 0..10u8 {
            write(&mut gather, &[round * 10 + frame; 300]);
            flush(&mut gather);
        }
        assert_eq!(*calls.lock().unwrap(), 0, "nothing leaves while responses may follow");
        end_turn(&mut outlet, true);
    }
    assert_eq!(*calls.lock().unwrap(), 1, "another turn is waited for, but not two");
    let expected: Vec<u8> = (0..20u8).flat_map(|frame| [frame; 300]).collect();
    assert_eq!(*taken.lock().unwrap(), expected);
    assert_eq!(gather.socket.lock().pending.capacity(), 0);
    write(&mut gather, b"once more");
    end_turn(&mut outlet, false);
    assert_eq!(*calls.lock().unwrap(), 2);
}

/// Counts the writes that it passes on.
struct Counted<S>(S, Arc<AtomicUsize>);

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.1.fetch_add(1, Ordering::Relaxed);
        Pin::new(&mut self.0).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.1.fetch_add(1, Ordering::Relaxed);
        Pin::new(&mut self.0).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Of a frame below 1 KiB, writing it by itself costs more than copying it twice; one that lies in several pieces is one write.
#[tokio::test]
async fn h2_hands_small_frames_over_together_and_each_large_one_at_once() {
    for (count, piece, most) in [(50, 300, 5), (8, 4000, 8)] {
        let (near, far) = tokio::io::duplex(1 << 16);
        let (mut client, connection) = h2::client::handshake(near).await.unwrap();
        tokio::spawn(connection);
        let call = || http::Request::new(());
        let _answers: Vec<_> = (0..count).map(|_| client.send_request(call(), true).unwrap()).collect();
        let writes = Arc::<AtomicUsize>::default();
        let counted = Counted(Gather::new(far), writes.clone());
        let mut connection = h2::server::Builder::new().handshake::<_, Chain<Bytes, Bytes>>(counted).await.unwrap();
        let mut streams = Vec::new();
        while streams.len() < count {
            let (_, mut respond) = connection.accept().await.unwrap().unwrap();
            streams.push(respond.send_response(http::Response::new(()), false).unwrap());
        }
        let mut poll = || connection.poll_closed(&mut Context::from_waker(Waker::noop())).is_pending();
        assert!(poll());
        let before = writes.load(Ordering::Relaxed);
        let half = Bytes::from(vec![7; piece]);
        streams.iter_mut().for_each(|stream| stream.send_data(half.clone().chain(half.clone()), true).unwrap());
        assert!(poll());
        let writes = writes.load(Ordering::Relaxed) - before;
        assert!((1..=most).contains(&writes), "{writes} writes of {count} frames of {} bytes", 2 * piece);
    }
}

#[test]
fn what_the_socket_does_not_take_leaves_later() {
    let socket = Scripted { script: [2, 0, 3, 0].into(), ..Scripted::default() };
    let taken = socket.taken.clone();
    let mut gather = Gather::new(socket);
    let mut outlet = gather.outlet();
    write(&mut gather, b"piecemeal");
    for expected in [&b"pi"[..], b"piece", b"piecemeal"] {
        end_turn(&mut outlet, false);
        assert_eq!(*taken.lock().unwrap(), expected);
    }
}

#[test]
fn the_socket_closes_with_its_connection() {
    let gather = Gather::new(Scripted::default());
    let (mut outlet, taken) = (gather.outlet(), gather.socket.lock().inner.taken.clone());
    drop(gather);
    assert_eq!(Arc::strong_count(&taken), 1);
    end_turn(&mut outlet, false);
}

#[test]
fn what_exceeds_the_buffer_is_written_at_once() {
    let socket = Scripted::default();
    let taken = socket.taken.clone();
    let mut gather = Gather::new(socket);
    for _ in 0..1000 {
        write(&mut gather, &[7; 4000]);
        assert!(pending(&gather) <= CAPACITY);
    }
    assert!(taken.lock().unwrap().len() >= 1000 * 4000 - CAPACITY);
}

#[tokio::test]
async fn http1_is_not_gathered_and_http2_is_even_when_its_preface_dribbles_in() {
    for (reads, expected) in [
        (vec!["PRI * HTTP/2.0\r\n"], Some(Protocol::Http2)),
        (vec!["P", "R", "I ", "* HTTP/2.0"], Some(Protocol::Http2)),
        (vec!["P", "OST / HTTP/1.1"], Some(Protocol::Http1)),
        (vec!["GET / HTTP/1.1"], Some(Protocol::Http1)),
        (vec!["PROPFIND / HTTP/1.1"], Some(Protocol::Http1)),
        (vec!["PRI"], None),
        (vec![], None),
    ] {
        let (near, mut far) = tokio::io::duplex(1024);
        let accepting = tokio::spawn(Gather::accept(near));
        for read in &reads {
            far.write_all(read.as_bytes()).await.unwrap();
            tokio::task::yield_now().await;
        }
        far.shutdown().await.unwrap();
        let accepted = accepting.await.unwrap().unwrap();
        assert_eq!(accepted.as_ref().map(|(_, protocol)| *protocol), expected, "{reads:?}");
        if let Some((mut gather, protocol)) = accepted {
            gather.write_all(b"x").await.unwrap();
            assert_eq!(pending(&gather) > 0, protocol == Protocol::Http2, "{reads:?}");
            let mut all = String::new();
            gather.read_to_string(&mut all).await.unwrap();
            assert_eq!(all, reads.concat(), "nothing that was looked at is missing");
        }
    }
}

/// A connection whose peer said nothing was kept for ever.
#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_begin_is_let_go() {
    for said in ["", "PR"] {
        let (near, mut far) = tokio::io::duplex(1024);
        far.write_all(said.as_bytes()).await.unwrap();
        let begun = Instant::now();
        let accepted = Gather::accept(near).await;
        assert_eq!(accepted.err().map(|error| error.kind()), Some(io::ErrorKind::TimedOut));
        assert_eq!(begun.elapsed().as_secs(), GREETING.as_secs());
    }
}

#[tokio::test(start_paused = true)]
async fn an_ear_knows_when_the_peer_was_heard_of_last() {
    let (near, mut far) = tokio::io::duplex(1024);
    let mut gather = Gather::new(near);
    let (ear, opened) = (gather.ear(), Instant::now());
    tokio::time::advance(Duration::from_secs(5)).await;
    gather.write_all(b"what we say does not count").await.unwrap();
    assert_eq!(ear.last_heard(), Some(opened));
    far.write_all(b"x").await.unwrap();
    gather.read_u8().await.unwrap();
    assert_eq!(ear.last_heard(), Some(opened + Duration::from_secs(5)));
    drop(gather);
    assert_eq!(ear.last_heard(), None);
}

#[tokio::test]
async fn a_lonely_write_arrives_without_a_timer() {
    let (near, mut far) = tokio::io::duplex(1024);
    let mut gather = Gather::new(near);
    let outlet = gather.outlet();
    let connection = tokio::spawn(outlet.drive(async move {
        gather.write_all(b"lonely").await.unwrap();
        gather.flush().await.unwrap();
        gather.read(&mut [0; 16]).await.unwrap()
    }));
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

#[test]
fn a_connection_is_told_why_its_bytes_did_not_leave() {
    let (near, far) = tokio::io::duplex(16);
    drop(far);
    let mut gather = Gather::new(near);
    let mut outlet = gather.outlet();
    write(&mut gather, b"lost");
    let (wakes, waker) = Wakes::task();
    let mut cx = Context::from_waker(&waker);
    outlet.end_turn(&mut cx, false);
    assert_eq!(wakes.count(), 1);
    let mut space = [0; 8];
    let read = Pin::new(&mut gather).poll_read(&mut cx, &mut ReadBuf::new(&mut space));
    assert!(matches!(read, Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe));
}

/// Without the wrapper, each of these responses is a write of its own.
#[tokio::test]
async fn two_hundred_responses_on_one_connection_leave_in_few_writes() {
    use http::{Request, Response};
    use http_body_util::{BodyExt, Full};
    use hyper::{body::Incoming, service::service_fn};
    use hyper_util::rt::{TokioExecutor, TokioIo};

    const CALLS: usize = 200;
    let writes = Arc::<AtomicUsize>::default();
    let all_here = Arc::new(tokio::sync::Barrier::new(CALLS));
    let (near, far) = tokio::io::duplex(1 << 20);
    let service = service_fn(move |_: Request<Incoming>| {
        let all_here = all_here.clone();
        async move {
            all_here.wait().await;
            Ok::<_, io::Error>(Response::new(Full::new(bytes::Bytes::from(vec![7; 1024]))))
        }
    });
    let gather = Gather::new(Counted(far, writes.clone()));
    let outlet = gather.outlet();
    let mut server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    tokio::spawn(outlet.drive(server.max_concurrent_streams(None).serve_connection(TokioIo::new(gather), service)));
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
    let writes = writes.load(Ordering::Relaxed);
    assert!(writes <= CALLS / 8, "{writes} writes");
}

proptest! {
    /// Whatever the socket takes at a time, and however large and small writes, flushes and polls mix: all bytes, in order.
    #[test]
    fn bytes_stay_in_order(
        sizes in proptest::collection::vec(prop_oneof![1usize..600, 8000usize..9000, 20_000usize..70_000], 1..60),
        script in proptest::collection::vec(prop_oneof![Just(0usize), 1usize..50, 100usize..40_000], 0..200),
        pauses in proptest::collection::vec(0u8..4, 60),
    ) {
        let socket = Scripted { script: script.into(), ..Scripted::default() };
        let taken = socket.taken.clone();
        let mut gather = Gather::new(socket);
        let mut outlet = gather.outlet();
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
                            outlet.end_turn(cx, index % 2 == 0);
                            Poll::Ready(())
                        }).await;
                    }
                    _ => {}
                }
                assert!(pending(&gather) <= CAPACITY);
            }
            gather.shutdown().await.unwrap();
        });
        prop_assert_eq!(&*taken.lock().unwrap(), &expected);
    }
}
