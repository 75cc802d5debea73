//! Watchers on a connection: creating them, and counting what they are sent.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};

use super::{
    link::{Link, LinkError},
    messages::{Field, Fields, Messages},
    requests::Keys,
    wire::{Frame, Manners, StreamId},
    writer::age,
};
use crate::{
    grpc,
    proto::{
        etcdserverpb::{WatchCreateRequest, WatchRequest, watch_request::RequestUnion},
        paths,
    },
};

/// Field numbers of a WatchResponse and what is inside.
mod field {
    pub const CREATED: u64 = 3;
    pub const CANCELED: u64 = 4;
    pub const EVENTS: u64 = 11;
    pub const EVENT_KV: u64 = 2;
    pub const KV_VALUE: u64 = 5;
}

/// All watchers of a run.
#[derive(Clone, Debug)]
pub struct Fleet {
    /// Connections.
    pub connections: usize,
    /// Streams on each connection.
    pub streams: usize,
    /// Watchers on each stream.
    pub watchers: usize,
    /// What their keys begin with.
    pub prefix: String,
    /// Each watcher has a key of its own; else all watch one key.
    pub distinct: bool,
}

impl Fleet {
    /// Watchers in all.
    pub fn total(&self) -> u64 {
        [self.streams, self.watchers].iter().fold(self.connections as u64, |total, &n| total.saturating_mul(n as u64))
    }

    /// How many watchers see one write.
    pub fn watchers_per_write(&self) -> u64 {
        if self.distinct { 1 } else { self.total() }
    }

    /// The keys that are watched.
    pub fn keys(&self) -> Keys {
        let count = if self.distinct { self.total().max(1) } else { 1 };
        Keys { prefix: format!("{}watched/", self.prefix), count }
    }

    /// The create requests of one stream, framed, one after the other.
    fn creates(&self, connection: usize, stream: usize) -> Bytes {
        let keys = self.keys();
        let first = (connection as u64 * self.streams as u64 + stream as u64) * self.watchers as u64;
        let mut bytes = BytesMut::new();
        for watcher in 0..self.watchers as u64 {
            let number = if self.distinct { first + watcher } else { 0 };
            let create = WatchCreateRequest { key: keys.key(number), ..Default::default() };
            let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
            bytes.extend_from_slice(&grpc::frame(&request));
        }
        bytes.freeze()
    }
}

/// A connection with its watchers.
pub struct WatchLink {
    link: Link,
    streams: Vec<Messages>,
    first: StreamId,
}

/// What became of watchers so far.
#[derive(Default)]
struct Created {
    created: usize,
    ended: bool,
}

impl WatchLink {
    /// Connects and creates this connection's watchers; done when the server has confirmed each.
    pub async fn connect(
        endpoint: &str,
        fleet: &Fleet,
        connection: usize,
        manners: Manners,
    ) -> Result<Self, LinkError> {
        let mut link = Link::connect(endpoint, paths::WATCH, manners).await?;
        let mut first = 0;
        for stream in 0..fleet.streams {
            let id = link.wire().open(fleet.creates(connection, stream), false);
            first = if stream == 0 { id } else { first };
        }
        let streams = std::iter::repeat_with(Messages::default).take(fleet.streams).collect();
        let mut watching = Self { link, streams, first };
        watching.confirm(fleet.streams * fleet.watchers).await?;
        Ok(watching)
    }

    async fn confirm(&mut self, watchers: usize) -> Result<(), LinkError> {
        let mut state = Created::default();
        while state.created < watchers {
            self.messages(|message| match message {
                Some(message) => {
                    state.created += usize::from(has_flag(message, field::CREATED));
                    state.ended |= has_flag(message, field::CANCELED);
                }
                None => state.ended = true,
            })
            .await?;
            if state.ended {
                let refused = std::io::Error::other("the server refused a watcher or ended its stream");
                return Err(LinkError::Io(refused));
            }
        }
        Ok(())
    }

    /// Takes what the server has sent next and tells each event: how many (one), how long after its write, its message bytes.
    pub async fn turn(&mut self, mut on: impl FnMut(u64, Duration, u64, Instant)) -> Result<(), LinkError> {
        let mut now = None;
        let mut ended = false;
        self.messages(|message| {
            let Some(message) = message else {
                ended = true;
                return;
            };
            let now = *now.get_or_insert_with(Instant::now);
            for value in values(message) {
                if let Some(age) = age(value, now) {
                    on(1, age, value.len() as u64, now);
                }
            }
        })
        .await?;
        if ended {
            return Err(LinkError::Io(std::io::Error::other("the server ended a watch stream")));
        }
        Ok(())
    }

    /// Tells each whole message of the next burst; None for a stream that ended.
    async fn messages(&mut self, mut on: impl FnMut(Option<&[u8]>)) -> Result<(), LinkError> {
        let (streams, first) = (&mut self.streams, self.first);
        let turn = self.link.turn(|_, frame| match frame {
            Frame::Data { stream: id, bytes, end } => {
                let index = (id.wrapping_sub(first) / 2) as usize;
                let Some(stream) = streams.get_mut(index) else { return };
                stream.feed(bytes, |message| on(Some(message)));
                if end {
                    on(None);
                }
            }
            Frame::Headers { end: true, .. } | Frame::Reset { .. } => on(None),
            Frame::Ready | Frame::Headers { .. } => {}
        });
        turn.await
    }
}

fn has_flag(message: &[u8], flag: u64) -> bool {
    Fields(message).any(|field| field == (flag, Field::Number(1)))
}

/// The values of all events in a WatchResponse.
fn values(message: &[u8]) -> impl Iterator<Item = &[u8]> {
    let events = Fields(message).filter_map(|field| nested(field, field::EVENTS));
    let records = events.flat_map(|event| Fields(event).filter_map(|field| nested(field, field::EVENT_KV)));
    records.filter_map(|record| Fields(record).find_map(|field| nested(field, field::KV_VALUE)))
}

fn nested((number, field): (u64, Field<'_>), wanted: u64) -> Option<&[u8]> {
    match field {
        Field::Bytes(bytes) if number == wanted => Some(bytes),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::proto::{
        etcdserverpb::WatchResponse,
        mvccpb::{Event, KeyValue},
    };

    #[test]
    fn values_of_all_events_are_found() {
        let event = |value: &'static str| Event {
            kv: Some(KeyValue { key: "k".into(), version: 3, value: value.into(), lease: 5, ..Default::default() }),
            ..Default::default()
        };
        let response = WatchResponse { events: vec![event("a"), event(""), event("b")], ..Default::default() };
        let message = response.encode_to_vec();
        assert_eq!(values(&message).collect::<Vec<_>>(), [b"a", b"b"]);
    }

    #[test]
    fn watchers_with_keys_of_their_own_have_different_keys() {
        let fleet = Fleet { connections: 2, streams: 3, watchers: 4, prefix: "/p/".into(), distinct: true };
        let mut seen = std::collections::BTreeSet::new();
        for (connection, stream) in (0..2).flat_map(|c| (0..3).map(move |s| (c, s))) {
            Messages::default().feed(&fleet.creates(connection, stream), |message| {
                seen.insert(message.to_vec());
            });
        }
        assert_eq!((seen.len(), fleet.total(), fleet.keys().count), (24, 24, 24));
    }
}
