//! What a client owes the server for data it received: window updates and pings, in one of two manners.

use std::collections::HashMap;

use super::StreamId;

/// How a client receives. What it sends back costs the server CPU time, so it belongs to the load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Manners {
    /// As etcd's Go client by default: it measures the bandwidth with a ping for nearly every burst
    #[default]
    Go,
    /// Windows as large as can be, and no pings
    Quiet,
}

impl Manners {
    /// Bytes that the server may send ahead, on a call and on the connection.
    pub fn window(self) -> u32 {
        match self {
            Self::Go => 1 << 20,
            Self::Quiet => 0x7fff_ffff,
        }
    }

    /// Bytes after which a window is filled up again.
    fn refill(self) -> u32 {
        match self {
            Self::Go => self.window() / 4,
            Self::Quiet => 64 << 20,
        }
    }
}

/// What is to be sent back for a piece of data.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Owed {
    /// Bytes to give back to the connection's window.
    pub connection: u32,
    /// Bytes to give back to the call's window.
    pub stream: u32,
    /// A ping.
    pub ping: bool,
}

/// Counts what one connection received.
pub struct Receiving {
    manners: Manners,
    connection: u32,
    streams: HashMap<StreamId, u32>,
    ping_is_out: bool,
}

impl Receiving {
    /// Nothing received.
    pub fn new(manners: Manners) -> Self {
        Self { manners, connection: 0, streams: HashMap::new(), ping_is_out: false }
    }

    /// Notes data of a call that goes on. grpc-go gives the connection's window back before each of its pings.
    pub fn data(&mut self, stream: StreamId, bytes: u32) -> Owed {
        let ping = self.manners == Manners::Go && !std::mem::replace(&mut self.ping_is_out, true);
        self.connection = self.connection.saturating_add(bytes);
        let of_stream = self.streams.entry(stream).or_default();
        *of_stream = of_stream.saturating_add(bytes);
        let refill = self.manners.refill();
        let give_back = |count: &mut u32, due: bool| if due { std::mem::take(count) } else { 0 };
        let connection_is_due = ping || self.connection > refill;
        let stream_is_due = *of_stream > refill;
        Owed {
            connection: give_back(&mut self.connection, connection_is_due),
            stream: give_back(of_stream, stream_is_due),
            ping,
        }
    }

    /// Forgets a call that is over.
    pub fn end(&mut self, stream: StreamId) {
        self.streams.remove(&stream);
    }

    /// Notes the answer to a ping.
    pub fn ping_answered(&mut self) {
        self.ping_is_out = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_pings_once_until_it_is_answered() {
        let mut receiving = Receiving::new(Manners::Go);
        assert_eq!(receiving.data(1, 10), Owed { connection: 10, stream: 0, ping: true });
        assert_eq!(receiving.data(1, 10), Owed::default());
        receiving.ping_answered();
        assert_eq!(receiving.data(3, 10), Owed { connection: 20, stream: 0, ping: true });
    }

    #[test]
    fn windows_are_given_back_before_they_are_used_up() {
        for manners in [Manners::Go, Manners::Quiet] {
            let mut receiving = Receiving::new(manners);
            let (mut sent, mut returned) = (0u64, 0u64);
            while sent < 2 * u64::from(manners.window()) {
                let owed = receiving.data(1, 16_384);
                sent += 16_384;
                returned += u64::from(owed.stream);
                assert!(sent - returned < u64::from(manners.window()), "{manners:?}");
            }
        }
    }
}
