//! Watchers at the cache, and the judgement of what they are sent.

use std::{future::poll_fn, sync::Arc, task::Poll};

use bytes::{Buf, Bytes};
use millpond::{
    fanout::{Hub, Out, Pumped, Session, SessionSettings, Start, WatchOptions},
    proto::{
        etcdserverpb::WatchResponse,
        mvccpb::{Event, event::EventType},
    },
    store::{KeyRange, Revision},
    upstream::grpc,
};
use parking_lot::Mutex;
use prost::Message;
use tokio::time::{Duration, Instant, sleep, timeout};

use crate::{dice::Dice, judge::matching, model::cluster::Inner, world::World};

/// How far a watcher has been sent everything, for those who wait at the end. None while it is between two watches.
pub type Seen = Arc<Mutex<Option<i64>>>;

/// One watcher under judgement.
struct Watched {
    /// The prefix.
    lane: usize,
    options: WatchOptions,
    /// The generations whose history it may be following.
    generations: Vec<usize>,
    /// The view's epoch when it was created.
    epoch: u64,
    seen: i64,
    /// How far it has followed a history: it may begin after a revision that was relayed, but that the view had not reached.
    followed: i64,
}

/// Watches again and again.
pub async fn watch(world: World, mut dice: Dice, seen: Seen) {
    let parts = &world.0;
    loop {
        *seen.lock() = None;
        let lane = dice.below(parts.ranges.len());
        let (prefix, range) = (&parts.cache.prefixes()[lane], &parts.ranges[lane]);
        sleep(dice.pause(50)).await;
        if !prefix.store().view().is_loaded() {
            continue;
        }
        let options = options(range, &mut dice);
        let back = if dice.chance(2) { 0 } else { dice.between(1, 30) };
        let now = parts.cache.begin(prefix, back > 0).await;
        let view = prefix.store().view_owned();
        let (start, first) = match now.1.0 - back {
            after if back == 0 => (Start::After(now.1), after),
            first => (Start::At(Revision(first.max(1))), first.max(1) - 1),
        };
        let followed = first.min(view.revision().0);
        let generations = matching(&parts.cluster.look(), range, &view, 0);
        let watched = Watched { lane, options, generations, epoch: view.position.epoch, seen: first, followed };
        let hubs: Arc<[Arc<Hub>]> = parts.cache.prefixes().iter().map(|prefix| prefix.hub().clone()).collect();
        let mut session = Session::new(hubs, SessionSettings { fragment_bytes: 2 << 20 });
        let mut out = Out::default();
        session.create(0, watched.options.clone(), start, Some(lane), now, &mut out);
        let life = dice.pause(8000);
        follow(&world, session, out, watched, &seen, Instant::now() + life, &mut dice).await;
    }
}

fn options(range: &KeyRange, dice: &mut Dice) -> WatchOptions {
    let part = KeyRange::prefix(Bytes::from_static(b"a/1"));
    let part = if range.covers(&part) { part } else { KeyRange::single(Bytes::from_static(b"b/1")) };
    WatchOptions {
        range: if dice.chance(3) { part } else { range.clone() },
        prev_kv: dice.chance(2),
        no_put: dice.chance(8),
        no_delete: dice.chance(8),
        fragment: false,
        progress_notify: false,
    }
}

/// Reads a session until it ends, or its time is over while it is judged to be well.
async fn follow(
    world: &World,
    mut session: Session,
    mut out: Out,
    mut watched: Watched,
    seen: &Seen,
    end: Instant,
    dice: &mut Dice,
) {
    loop {
        let mut said = out.take();
        while let Some(response) = take(&mut said) {
            if !watched.judge(world, &response) {
                return;
            }
        }
        *seen.lock() = Some(watched.seen);
        let pumped = poll_fn(|cx| match session.pump(&mut out, 1 << 16, cx.waker()) {
            Pumped::Idle if out.is_empty() => Poll::Pending,
            Pumped::Busy if out.is_empty() => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            pumped => Poll::Ready(pumped),
        });
        match timeout(dice.pause(400), pumped).await {
            Ok(Pumped::Ended(status)) => {
                return world.0.trace.breach("a watch goes on", format!("it ended with {status}"));
            }
            Ok(_) => {}
            // Nothing came for a while.
            Err(_) if !session.take_relays().is_empty() || Instant::now() >= end => return,
            Err(_) => drop(session.request_progress(world.0.cache.told())),
        }
    }
}

fn take(out: &mut Bytes) -> Option<WatchResponse> {
    let (length, _) = grpc::split(out)?;
    out.advance(grpc::prefix(0).len());
    Some(WatchResponse::decode(out.split_to(length)).expect("the cache sends what can be decoded"))
}

impl Watched {
    /// Whether the watcher goes on after `response`.
    fn judge(&mut self, world: &World, response: &WatchResponse) -> bool {
        let inner = world.0.cluster.look();
        let trace = &world.0.trace;
        self.extend(&inner, &world.0.ranges[self.lane]);
        if response.canceled {
            let compacted = response.compact_revision;
            let restored = world.0.cache.prefixes()[self.lane].store().view().position.epoch > self.epoch;
            let known = inner.compacted_since(world.0.adopted[self.lane].lock().unwrap_or(0));
            if !restored && (compacted > known || compacted <= self.seen + 1) {
                let what = format!("at {compacted}, having seen {}, the cluster {known}", self.seen);
                trace.breach("a watcher is cancelled only for a reason", what);
            }
            return false;
        }
        if response.created {
            return true;
        }
        let told = response.header.map_or(0, |header| header.revision);
        let to = response.events.last().and_then(|event| event.kv.as_ref()).map_or(told, |kv| kv.mod_revision);
        let right: Vec<usize> =
            self.generations.iter().copied().filter(|at| self.fits(&inner, *at, to, response)).collect();
        if right.is_empty() {
            let what = format!("{:?}, seen {}, to {to}, {response:?}", self.generations, self.seen);
            trace.breach("a watcher is sent exactly the events", what);
            return false;
        }
        trace.note(format!("watcher from {} to {to}: {} events", self.seen, response.events.len()));
        self.generations = right;
        self.seen = self.seen.max(to);
        self.followed = self.seen;
        true
    }

    /// A history that shares everything seen so far is as good.
    fn extend(&mut self, inner: &Inner, range: &KeyRange) {
        for other in 0..=inner.generation() {
            let shares = |at: &usize| inner.are_alike(*at, other, range, self.followed);
            if !self.generations.contains(&other) && self.generations.iter().any(shares) {
                self.generations.push(other);
            }
        }
    }

    fn fits(&self, inner: &Inner, generation: usize, to: i64, response: &WatchResponse) -> bool {
        let history = &inner.histories[generation];
        let told = response.header.map_or(0, |header| header.revision);
        let wanted = |event: &&Event| match event.r#type == EventType::Put as i32 {
            true => !self.options.no_put,
            false => !self.options.no_delete,
        };
        let expected = history.events_in(&self.options.range, self.seen + 1, to).filter(wanted);
        let mut sent = response.events.iter();
        let same = expected.fold(true, |same, event| {
            let Some(sent) = sent.next().filter(|_| same) else { return false };
            // As at etcd, a compaction takes the previous records with it.
            let compacted = event.kv.as_ref().is_some_and(|kv| kv.mod_revision <= inner.compacted_since(0));
            let told = self.options.prev_kv && !(compacted && sent.prev_kv.is_none());
            *sent == Event { prev_kv: event.prev_kv.clone().filter(|_| told), ..event.clone() }
        });
        same && sent.next().is_none() && to <= history.head() && told <= history.head()
    }
}

/// Waits until every watcher has been sent everything up to `revision`.
pub async fn all_reach(seen: &[Seen], revision: i64, patience: Duration) -> bool {
    let reached = async {
        while seen.iter().any(|seen| seen.lock().is_none_or(|seen| seen < revision)) {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(patience, reached).await.is_ok()
}
