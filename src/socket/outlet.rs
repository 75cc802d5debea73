//! Where what a connection has gathered leaves: at the end of its task's turn.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::Weak,
    task::{Context, Poll},
};

use parking_lot::Mutex;
use tokio::io::AsyncWrite;

use super::Socket;

/// Writes what a [`Gather`](super::Gather) has gathered. The socket is closed with that, not with this.
pub struct Outlet<S> {
    socket: Weak<Mutex<Socket<S>>>,
    /// The last turn left something for this one to write.
    is_due: bool,
}

impl<S> Outlet<S> {
    pub(super) fn new(socket: Weak<Mutex<Socket<S>>>) -> Self {
        Self { socket, is_due: false }
    }
}

impl<S: AsyncWrite + Unpin> Outlet<S> {
    /// To be called when the task of `cx` can do nothing more for now. `goes_on` says that it has another turn at once: then
    /// what was gathered waits for what that may add, but for one turn only.
    pub(super) fn end_turn(&mut self, cx: &mut Context<'_>, goes_on: bool) {
        let Some(socket) = self.socket.upgrade() else { return };
        let socket = &mut *socket.lock();
        let waits = goes_on && !self.is_due && !socket.pending.is_empty();
        self.is_due = waits;
        if waits {
            return;
        }
        socket.courtesy.join(&mut socket.pending, cx);
        if socket.pending.is_empty() {
            return;
        }
        if let Poll::Ready(Err(error)) = socket.release(cx) {
            socket.failure = Some(error);
            cx.waker().wake_by_ref();
        }
    }

    /// Runs a connection whose calls are tasks of their own. They have one turn of the scheduler to add to what one of them
    /// has sent.
    pub async fn drive<C: Future>(mut self, connection: C) -> C::Output {
        let mut connection = pin!(connection);
        poll_fn(|cx| {
            let polled = connection.as_mut().poll(cx);
            if polled.is_pending() {
                self.end_turn(cx, true);
                if self.is_due {
                    cx.waker().wake_by_ref();
                }
            }
            polled
        })
        .await
    }
}
