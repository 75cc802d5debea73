//! Clients that have vanished: after some silence a client is pinged, and if it stays silent, its connection ends. As Go's
//! gRPC library does for etcd, with etcd's defaults.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
};

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep, sleep};

use super::listener::Settings;
use crate::socket::Ear;

/// Watches over one connection.
pub(super) struct KeepAlive<'a, S> {
    pings: PingPong,
    ear: Ear<S>,
    settings: &'a Settings,
    /// When a ping was sent that nothing has followed yet.
    asked: Option<Instant>,
    timer: Pin<Box<Sleep>>,
}

impl<'a, S> KeepAlive<'a, S> {
    pub(super) fn new(pings: PingPong, ear: Ear<S>, settings: &'a Settings) -> Self {
        let timer = Box::pin(sleep(settings.keepalive_interval));
        Self { pings, ear, settings, asked: None, timer }
    }

    /// Ready when the client is silent though it was asked.
    pub(super) fn poll_silent(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let Some(heard) = self.ear.last_heard() else { return Poll::Pending };
            if self.asked.is_some_and(|asked| heard < asked) {
                return Poll::Ready(());
            }
            let now = Instant::now();
            let is_silent = heard + self.settings.keepalive_interval <= now;
            self.asked = is_silent.then_some(now);
            let next = if is_silent {
                now + self.settings.keepalive_timeout
            } else {
                heard + self.settings.keepalive_interval
            };
            self.timer.as_mut().reset(next);
            if is_silent {
                self.ping();
            }
        }
    }

    fn ping(&mut self) {
        // The answer to the last one has to be taken first. Who never answers one, but is heard of, is asked no second time: its
        // next silence ends the connection.
        let _ = self.pings.poll_pong(&mut Context::from_waker(Waker::noop()));
        let _ = self.pings.send_ping(Ping::opaque());
    }
}
