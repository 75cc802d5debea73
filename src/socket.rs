//! A socket wrapper that gathers the many small writes of an HTTP/2 connection into few system calls.
//!
//! h2 hands every DATA frame of 256 bytes or more to the socket by itself and asks for a flush after it, so a burst of
//! ready responses would cost one system call each. [`Gather`] copies small writes into a buffer and answers a flush at
//! once without writing: it only asks for the connection's task to be polled again. The task goes to the end of the
//! scheduler's queue, behind the tasks that are about to add their responses, and the buffer leaves when the reading side
//! of a later poll has run dry. No timer is involved: a lonely response waits for two turns of an otherwise idle
//! scheduler. Large writes pass through without being copied, together with what was gathered before them. Only the answer
//! to a ping that came with a request waits for a timer, if nothing follows it ([`courtesy`]).
//!
//! The end of the reading phase is the signal because HTTP/2 connections always read before they write in a poll. HTTP/1
//! connections do not, and gather by themselves, so an accepted connection is looked at first ([`Gather::sniffing`]).

mod calls;
mod courtesy;
mod turn;
#[cfg(test)]
mod wakes;

use std::{
    io::{self, IoSlice},
    os::fd::AsFd,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

pub(crate) use self::calls::{Calls, NewCalls};
use self::courtesy::{Pause, may_wait};
#[cfg(test)]
pub(crate) use self::wakes::Wakes;

/// Bytes that are gathered at most before they are written.
const CAPACITY: usize = 64 * 1024;
/// A write of this many bytes or more is worth a system call of its own rather than a copy.
const LARGE: usize = 8 * 1024;
/// The first allocation; most lonely responses fit.
const FIRST_ALLOCATION: usize = 2 * 1024;
/// How every HTTP/2 connection begins; no HTTP/1 method in use starts so.
const HTTP2_START: [u8; 4] = *b"PRI ";
/// A read of no more bytes than this brought nothing that somebody waits for.
const SMALL_READ: usize = 64;
/// Slices of one vectored write: what was gathered, and the head, payload and rest of a frame.
const SLICES: usize = 8;

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
    inner: S,
    pending: BytesMut,
    mode: Mode,
    deferral: Deferral,
    /// Bytes of the last read that brought any.
    last_read: usize,
}

enum Mode {
    /// The first bytes have not all been seen; how many matched [`HTTP2_START`].
    Sniffing(usize),
    /// Writes go straight through.
    Direct,
    /// Writes are gathered.
    Gathering,
}

enum Deferral {
    /// Nothing was promised by a flush.
    None,
    /// A flush was promised in this poll; others may add to it until the next one is over.
    Promised,
    /// There was nothing to flush but what may wait; another poll will show whether that remains so.
    Courtesy,
    /// It did: the flush waits for something to be added, or for the end of the pause.
    Paused(Pause),
    /// The promise is kept as soon as the reading side is dry.
    Due,
}

impl<S> Gather<S> {
    /// For a connection that is known to speak HTTP/2.
    pub fn new(inner: S) -> Self {
        let (pending, mode, deferral) = (BytesMut::new(), Mode::Gathering, Deferral::None);
        Self { inner, pending, mode, deferral, last_read: 0 }
    }

    /// For an accepted connection: gathers only if the peer opens with the HTTP/2 preface.
    pub fn sniffing(inner: S) -> Self {
        Self { mode: Mode::Sniffing(0), ..Self::new(inner) }
    }

    fn sniff(&mut self, read: &[u8]) {
        let Mode::Sniffing(matched) = self.mode else { return };
        let wanted = HTTP2_START.iter().skip(matched);
        let agreed = wanted.zip(read).take_while(|(wanted, byte)| wanted == byte).count();
        let seen = matched + agreed;
        self.mode = if seen == HTTP2_START.len() {
            Mode::Gathering
        } else if agreed == read.len() {
            Mode::Sniffing(seen)
        } else {
            Mode::Direct
        };
    }

    fn gather(&mut self, slices: &[IoSlice<'_>], length: usize) {
        if self.pending.capacity() == 0 {
            self.pending.reserve(length.max(FIRST_ALLOCATION));
        }
        slices.iter().for_each(|slice| self.pending.extend_from_slice(slice));
    }
}

impl<S: AsyncWrite + Unpin> Gather<S> {
    /// Writes everything gathered, and flushes what is below.
    fn drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.pending.has_remaining() {
            let written = ready!(Pin::new(&mut self.inner).poll_write(cx, &self.pending))?;
            self.consume(written)?;
        }
        ready!(Pin::new(&mut self.inner).poll_flush(cx))?;
        self.deferral = Deferral::None;
        Poll::Ready(Ok(()))
    }

    fn consume(&mut self, written: usize) -> io::Result<()> {
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.pending.advance(written.min(self.pending.len()));
        Ok(())
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

    /// What is to be done when nothing more can be read for now: keep a promise that is due, or give memory back.
    fn reading_is_dry(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match &mut self.deferral {
            Deferral::None if self.pending.is_empty() => self.pending = BytesMut::new(),
            Deferral::None => {}
            Deferral::Promised if self.last_read > SMALL_READ && may_wait(&self.pending) => {
                self.look_again(Deferral::Courtesy, cx);
            }
            Deferral::Promised => self.look_again(Deferral::Due, cx),
            Deferral::Courtesy => self.deferral = Deferral::Paused(Pause::begin(cx)),
            Deferral::Paused(pause) => {
                if pause.is_over(cx) {
                    return self.keep_promise(cx);
                }
            }
            Deferral::Due => return self.keep_promise(cx),
        }
        Ok(())
    }

    fn keep_promise(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.drain(cx) {
            Poll::Ready(result) => result,
            Poll::Pending => Ok(()),
        }
    }

    fn look_again(&mut self, deferral: Deferral, cx: &Context<'_>) {
        self.deferral = deferral;
        cx.waker().wake_by_ref();
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Gather<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let me = self.get_mut();
        let before = buffer.filled().len();
        let result = Pin::new(&mut me.inner).poll_read(cx, buffer);
        let read = &buffer.filled()[before..];
        if read.is_empty() {
            me.reading_is_dry(cx)?;
        } else {
            me.last_read = read.len();
            me.sniff(read);
        }
        result
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
        let me = self.get_mut();
        let length: usize = slices.iter().map(|slice| slice.len()).sum();
        if length >= LARGE || !matches!(me.mode, Mode::Gathering) {
            return me.pass_through(cx, slices);
        }
        if me.pending.len() + length > CAPACITY {
            ready!(me.drain(cx))?;
        }
        me.gather(slices, length);
        Poll::Ready(Ok(length))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let me = self.get_mut();
        match me.deferral {
            Deferral::None if me.pending.is_empty() => return Pin::new(&mut me.inner).poll_flush(cx),
            Deferral::None => me.look_again(Deferral::Promised, cx),
            Deferral::Paused(_) if !may_wait(&me.pending) => me.look_again(Deferral::Promised, cx),
            // One poll was waited for already.
            Deferral::Courtesy if !may_wait(&me.pending) => me.look_again(Deferral::Due, cx),
            _ => {}
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let me = self.get_mut();
        ready!(me.drain(cx))?;
        Pin::new(&mut me.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
