//! A socket wrapper that gathers the many small writes of an HTTP/2 connection into few system calls.
//!
//! h2 hands every DATA frame of 1 KiB or more to the socket by itself and asks for a flush after it, so a burst of
//! ready responses would cost one system call each. [`Gather`] copies small writes into a buffer and answers a flush at
//! once without writing. The buffer leaves through the [`Outlet`], when the connection's task has done everything that it can
//! do for now. Large writes pass through without being copied, together with what was gathered before them. No timer is
//! involved, but for the answers to pings if nothing follows them ([`courtesy`]).
//!
//! HTTP/1 connections gather by themselves, so an accepted connection is looked at first ([`Gather::accept`]).

mod calls;
mod courtesy;
mod frames;
mod news;
mod outlet;
mod turn;
#[cfg(test)]
mod wakes;

use std::{
    io::{self, IoSlice},
    os::fd::AsFd,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use parking_lot::Mutex;
use rustix::net::sockopt;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    time::{Instant, timeout},
};

use self::courtesy::Courtesy;
pub use self::outlet::Outlet;
pub(crate) use self::{
    calls::{Call, Calls, NewCalls},
    news::{Extent, News},
};

/// Bytes that are gathered at most before they are written. Go's gRPC takes frames of 16 KiB; of a large answer, copying them
/// together costs less than a system call for each, after which the receiver may have to be woken.
const CAPACITY: usize = 1024 * 1024;
/// A write of this many bytes or more is worth a system call of its own rather than a copy.
const LARGE: usize = 32 * 1024;
/// The first allocation; most lonely responses fit. Of a size that nothing lasting has: the allocator keeps those together, and where
/// only two share a page, each leaves a page behind that is in memory for nothing.
const FIRST_ALLOCATION: usize = 768;
/// How every HTTP/2 connection begins; no HTTP/1 method in use starts so.
const HTTP2_START: [u8; 4] = *b"PRI ";
/// Slices of one vectored write: what was gathered, the head of a frame, and as many of its payload as h2 offers at a time.
const SLICES: usize = 18;

/// For a peer to begin to speak, and for the rest of how it begins: a connection that says nothing would be kept for ever. The
/// limit of Go's gRPC server.
pub(crate) const GREETING: Duration = Duration::from_secs(120);

/// How long a TCP connection is silent before the kernel asks whether the peer lives, and between questions: Go's defaults.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// Lets the kernel notice a peer that has vanished: sent bytes may stay unacknowledged for `silence`, and an idle peer is
/// asked now and then. A platform without one of these options goes without.
pub fn detect_dead_peer(socket: &impl AsFd, silence: Duration) {
    let milliseconds = u32::try_from(silence.as_millis()).unwrap_or(u32::MAX);
    let set = || {
        sockopt::set_socket_keepalive(socket, true)?;
        sockopt::set_tcp_keepidle(socket, KEEPALIVE)?;
        sockopt::set_tcp_keepintvl(socket, KEEPALIVE)?;
        #[cfg(target_os = "linux")]
        sockopt::set_tcp_user_timeout(socket, milliseconds)?;
        Ok::<(), rustix::io::Errno>(())
    };
    if let Err(error) = set() {
        tracing::debug!(%error, milliseconds, "cannot set TCP keep-alive");
    }
}

/// Gathers writes to `S`; see the module's comment.
pub struct Gather<S> {
    socket: Arc<Mutex<Socket<S>>>,
    /// What h2 hears when it asks for vectored writes. It asks before its first frame how large a frame it should copy into its
    /// own buffer, of 16 KiB, rather than write by itself: below 1 KiB if there are none, below 256 bytes if there are. Later it
    /// asks before each write, and needs them for answers that lie in many pieces.
    is_vectored: bool,
}

struct Socket<S> {
    inner: S,
    opening: Opening,
    pending: BytesMut,
    courtesy: Courtesy,
    /// What was gathered last time, in bytes: an idle connection keeps no buffer, but knows how large its next one should be.
    usual: u32,
    protocol: Protocol,
    /// When the peer was heard of last.
    heard: Instant,
    /// Who writes and waits for room. The socket knows one waker, which may be that of the outlet.
    blocked: Option<Waker>,
    /// Why what was gathered could not be written, to be told to the connection.
    failure: Option<io::Error>,
}

/// What was read to learn which protocol this is, for whoever reads first. Small, as every connection has one.
#[derive(Default)]
struct Opening {
    bytes: [u8; HTTP2_START.len()],
    given: u8,
    read: u8,
}

impl Opening {
    /// How the peer begins, as far as it is needed. None when the peer goes before that is known.
    async fn read(socket: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Self>> {
        let mut opening = Self::default();
        while opening.left().len() < HTTP2_START.len() && HTTP2_START.starts_with(opening.left()) {
            match socket.read(&mut opening.bytes[usize::from(opening.read)..]).await? {
                0 => return Ok(None),
                read => opening.read += read as u8,
            }
        }
        Ok(Some(opening))
    }

    fn left(&self) -> &[u8] {
        &self.bytes[usize::from(self.given)..usize::from(self.read)]
    }

    /// Moves as much as fits into `buffer`.
    fn give(&mut self, buffer: &mut ReadBuf<'_>) {
        let left = self.left();
        let length = left.len().min(buffer.remaining());
        buffer.put_slice(&left[..length]);
        self.given += length as u8;
    }
}

/// What a connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1 or before: writes go straight through.
    Http1,
    /// HTTP/2: writes are gathered.
    Http2,
}

/// Tells when a connection's peer was heard of last.
pub(crate) struct Ear<S>(Weak<Mutex<Socket<S>>>);

impl<S> Ear<S> {
    /// When something was read last; none when the connection is gone.
    pub(crate) fn last_heard(&self) -> Option<Instant> {
        Some(self.0.upgrade()?.lock().heard)
    }
}

impl<S> Gather<S> {
    /// For a connection that is known to speak HTTP/2.
    pub fn new(inner: S) -> Self {
        Self::speaking(Protocol::Http2, inner, Opening::default())
    }

    fn speaking(protocol: Protocol, inner: S, opening: Opening) -> Self {
        let (pending, heard) = (BytesMut::new(), Instant::now());
        let courtesy = Courtesy::default();
        let socket =
            Socket { inner, opening, pending, courtesy, usual: 0, protocol, heard, blocked: None, failure: None };
        Self { socket: Arc::new(Mutex::new(socket)), is_vectored: protocol == Protocol::Http1 }
    }

    /// Where what is gathered leaves. Somebody has to see to that.
    pub fn outlet(&self) -> Outlet<S> {
        Outlet::new(Arc::downgrade(&self.socket))
    }

    /// What knows when the peer was heard of last.
    pub(crate) fn ear(&self) -> Ear<S> {
        Ear(Arc::downgrade(&self.socket))
    }
}

impl<S: AsyncRead + Unpin> Gather<S> {
    /// For an accepted connection: waits for how the peer begins, and gathers if that is how HTTP/2 begins. None when the peer
    /// goes before that is known.
    ///
    /// # Errors
    /// Those of the socket; `TimedOut` when the peer has not begun within two minutes.
    pub async fn accept(inner: S) -> io::Result<Option<(Self, Protocol)>> {
        let silent = |_| io::Error::new(io::ErrorKind::TimedOut, "the peer does not begin to speak");
        // In a box that goes: a connection keeps no room for how it began.
        Box::pin(timeout(GREETING, Self::recognise(inner))).await.map_err(silent)?
    }

    async fn recognise(mut inner: S) -> io::Result<Option<(Self, Protocol)>> {
        let Some(opening) = Opening::read(&mut inner).await? else { return Ok(None) };
        let protocol = if opening.left() == HTTP2_START { Protocol::Http2 } else { Protocol::Http1 };
        Ok(Some((Self::speaking(protocol, inner, opening), protocol)))
    }
}

impl<S> Socket<S> {
    fn gather(&mut self, slices: &[IoSlice<'_>], length: usize) {
        if self.pending.capacity() == 0 {
            self.pending.reserve(length.max(self.usual as usize).max(FIRST_ALLOCATION));
        }
        slices.iter().for_each(|slice| self.pending.extend_from_slice(slice));
    }

    fn consume(&mut self, written: usize) -> io::Result<()> {
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.pending.advance(written.min(self.pending.len()));
        Ok(())
    }

    fn check(&mut self) -> io::Result<()> {
        self.failure.take().map_or(Ok(()), Err)
    }
}

impl<S: AsyncWrite + Unpin> Socket<S> {
    /// Writes everything gathered, flushes what is below, and gives the buffer back. Whoever waits for room is woken when there
    /// is some, or never will be.
    fn release(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let gathered = self.pending.len();
        self.usual = gathered as u32;
        let drained = self.drain(cx);
        if self.pending.len() < gathered || matches!(drained, Poll::Ready(Err(_))) {
            self.blocked.take().into_iter().for_each(Waker::wake);
        }
        if self.pending.is_empty() {
            self.pending = BytesMut::new();
        }
        drained
    }

    /// Writes everything gathered, and flushes what is below.
    fn drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.pending.has_remaining() {
            let written = ready!(Pin::new(&mut self.inner).poll_write(cx, &self.pending))?;
            self.consume(written)?;
        }
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    /// Takes `slices`, to write them with what follows, or at once if they are large. Returns how much was taken.
    fn write(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if self.protocol == Protocol::Http1 {
            return self.pass_through(cx, slices);
        }
        self.courtesy.cut_in(&mut self.pending);
        // Answers to pings are what h2 begins a write with; one that stands further back goes as it is.
        if let Some(kept) = slices.first().and_then(|slice| self.courtesy.keep(slice)) {
            return Poll::Ready(Ok(kept));
        }
        let length: usize = slices.iter().map(|slice| slice.len()).sum();
        let taken = if length >= LARGE {
            ready!(self.pass_through(cx, slices))?
        } else {
            if self.pending.len() + length > CAPACITY {
                ready!(self.drain(cx))?;
            }
            self.gather(slices, length);
            length
        };
        self.courtesy.pass(slices, taken);
        Poll::Ready(Ok(taken))
    }

    /// Writes what was gathered and `slices` in order without copying, and returns how much of `slices` went.
    fn pass_through(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        while self.pending.has_remaining() {
            let gathered = self.pending.len();
            let mut all = [IoSlice::new(&[]); SLICES];
            let sources = std::iter::once(&self.pending[..]).chain(slices.iter().map(|slice| &**slice));
            all.iter_mut().zip(sources).for_each(|(slot, source)| *slot = IoSlice::new(source));
            let used = SLICES.min(slices.len() + 1);
            let written = ready!(Pin::new(&mut self.inner).poll_write_vectored(cx, &all[..used]))?;
            self.consume(written)?;
            if written > gathered {
                return Poll::Ready(Ok(written - gathered));
            }
        }
        Pin::new(&mut self.inner).poll_write_vectored(cx, slices)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gather<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut socket = self.socket.lock();
        socket.check()?;
        if !socket.opening.left().is_empty() {
            socket.opening.give(buffer);
            return Poll::Ready(Ok(()));
        }
        let read = ready!(Pin::new(&mut socket.inner).poll_read(cx, buffer));
        socket.heard = Instant::now();
        Poll::Ready(read)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gather<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(data)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut socket = self.socket.lock();
        socket.check()?;
        let written = socket.write(cx, slices);
        socket.blocked = written.is_pending().then(|| cx.waker().clone());
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.is_vectored
    }

    /// What was gathered leaves through the outlet.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.is_vectored = true;
        let mut socket = self.socket.lock();
        if socket.pending.is_empty() { Pin::new(&mut socket.inner).poll_flush(cx) } else { Poll::Ready(Ok(())) }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut socket = self.socket.lock();
        let drained = socket.drain(cx);
        socket.blocked = drained.is_pending().then(|| cx.waker().clone());
        ready!(drained)?;
        Pin::new(&mut socket.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
