//! Watchers at the Watch service, and the judgement of what they are sent: of ranges that are cached, from revisions within the
//! history window and before it, and of ranges that are not, which are relayed.

use std::sync::Arc;

use bytes::Bytes;
use millpond::{
    proto::{
        etcdserverpb::{
            WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse, watch_create_request::FilterType,
            watch_request::RequestUnion,
        },
        mvccpb::{Event, event::EventType},
    },
    rules::KeyRange,
    status::Status,
};
use parking_lot::Mutex;
use tokio::time::{Duration, Instant, sleep, timeout};
use tonic::Code;

use crate::{call::Call, dice::Dice, judge::matching, model::cluster::Inner, world::World};

/// How far a watcher has been sent everything, for those who wait at the end. None while it is between two watches.
pub type Seen = Arc<Mutex<Option<i64>>>;

/// What a watcher asks for.
struct Wish {
    range: KeyRange,
    prev_kv: bool,
    no_put: bool,
    no_delete: bool,
    /// The first revision; zero: what follows on the present.
    start: i64,
}

/// One watcher under judgement.
struct Watched {
    wish: Wish,
    /// The prefix whose history decides over it.
    lane: usize,
    /// Whether it began on what is cached.
    is_cached: bool,
    /// The generations whose history it may be following.
    generations: Vec<usize>,
    /// The present generation, and the view's epoch, when it was created.
    began: (usize, u64),
    /// The first revision that it is to be sent.
    first: i64,
    seen: i64,
    /// How far it has followed a history: it may begin after a revision that was relayed, but that the view had not reached.
    followed: i64,
}

/// Watches again and again.
pub async fn watch(world: World, mut dice: Dice, seen: Seen) {
    loop {
        *seen.lock() = None;
        sleep(dice.pause(50)).await;
        let wish = wish(&world, &mut dice);
        let life = dice.pause(8000);
        let Ok(mut call) = Call::open(&world.0.watch).await else { continue };
        let Some(watched) = begin(&world, &mut call, wish).await else { continue };
        follow(&world, call, watched, &seen, Instant::now() + life, &mut dice).await;
    }
}

fn wish(world: &World, dice: &mut Dice) -> Wish {
    let range = dice.pick(&world.0.ranges);
    let part = KeyRange::prefix(Bytes::from_static(b"a/1"));
    let part = if range.covers(&part) { part } else { KeyRange::single(Bytes::from_static(b"b/1")) };
    let apart = [KeyRange::single(Bytes::from_static(b"c")), KeyRange::prefix(Bytes::from_static(b"b/"))];
    let range = match dice.below(6) {
        0 | 1 => part,
        2 => dice.pick(&apart),
        3 => KeyRange::everything(),
        _ => range,
    };
    let is_cached = lane_of(world, &range).is_some();
    let head = world.0.cluster.look().history().head();
    let start = if dice.chance(2) { 0 } else { (head - dice.between(-3, 30)).max(1) };
    let [no_put, no_delete] = [(); 2].map(|()| is_cached && dice.chance(8));
    Wish { range, prev_kv: dice.chance(2), no_put, no_delete, start }
}

/// The prefix that has all of a range, by its place.
fn lane_of(world: &World, range: &KeyRange) -> Option<usize> {
    world.0.ranges.iter().position(|prefix| prefix.covers(range))
}

/// Creates a watcher; none if the call ends before that is done.
async fn begin(world: &World, call: &mut Call, wish: Wish) -> Option<Watched> {
    let parts = &world.0;
    let covering = lane_of(world, &wish.range);
    let lane = covering.unwrap_or(0);
    let store = parts.cache.prefixes()[lane].store();
    let (before, asked) = (store.view_owned(), parts.cluster.look().generation());
    call.ask(&wish.request());
    let created = call.next().await.inspect_err(|status| judge_end(world, covering.is_some(), status)).ok()?;
    let after = store.view_owned();
    let now = created.header.map_or(0, |header| header.revision);
    let first = if wish.start > 0 { wish.start } else { now + 1 };
    let inner = parts.cluster.look();
    let mut generations: Vec<usize> = (asked..=inner.generation()).collect();
    for view in [&before, &after] {
        generations.extend(matching(&inner, &parts.ranges[lane], view, 0));
    }
    // One that begins in the future has seen nothing of what another history may lack.
    let is_cached = covering.is_some() && before.is_loaded() && first <= now + 1;
    let followed = if is_cached { (first - 1).min(after.revision().0) } else { 0 };
    let began = (asked, before.position.epoch);
    parts.trace.note(format!("watcher of {:?} from {first}, now {now}", wish.range));
    Some(Watched { wish, lane, is_cached, generations, began, first, seen: first - 1, followed })
}

impl Wish {
    fn request(&self) -> WatchRequest {
        let filters = [(self.no_put, FilterType::Noput), (self.no_delete, FilterType::Nodelete)];
        let create = WatchCreateRequest {
            key: self.range.request_key(),
            range_end: self.range.request_end(),
            start_revision: self.start,
            prev_kv: self.prev_kv,
            filters: filters.into_iter().filter(|(on, _)| *on).map(|(_, filter)| filter as i32).collect(),
            ..Default::default()
        };
        WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }
    }

    fn wants(&self, event: &Event) -> bool {
        if event.r#type == EventType::Put as i32 { !self.no_put } else { !self.no_delete }
    }
}

/// Reads a call until it ends, or its time is over while it is judged to be well.
async fn follow(world: &World, mut call: Call, mut watched: Watched, seen: &Seen, end: Instant, dice: &mut Dice) {
    loop {
        *seen.lock() = Some(watched.seen);
        match timeout(dice.pause(400), call.next()).await {
            Ok(Ok(response)) => {
                if !watched.judge(world, &response) {
                    return;
                }
            }
            Ok(Err(status)) => return judge_end(world, watched.is_cached, &status),
            // Nothing came for a while.
            Err(_) if Instant::now() >= end => return,
            Err(_) => {
                let progress = RequestUnion::ProgressRequest(WatchProgressRequest {});
                call.ask(&WatchRequest { request_union: Some(progress) });
            }
        }
    }
}

/// A relayed watch ends when nobody can tell whether its history goes on; nothing else does. So is one of a cached range, while it
/// begins before the window: what it ends with then is said of relays alone.
fn judge_end(world: &World, is_cached: bool, status: &Status) {
    let is_of_a_relay = !is_cached || status.message.contains("the upstream was lost");
    if !is_of_a_relay || status.code != Code::Unavailable {
        world.0.trace.breach("a watch goes on", format!("it ended with {status}"));
    }
}

impl Watched {
    /// Whether the watcher goes on after `response`.
    fn judge(&mut self, world: &World, response: &WatchResponse) -> bool {
        let inner = world.0.cluster.look();
        let trace = &world.0.trace;
        self.extend(&inner, &world.0.ranges[self.lane]);
        if response.canceled {
            let compacted = response.compact_revision;
            let epoch = world.0.cache.prefixes()[self.lane].store().view().position.epoch;
            let (generation, known) = self.began;
            let restored = if known > 0 { epoch > known } else { inner.generation() > generation };
            let since = if self.is_cached { world.0.adopted[self.lane].lock().unwrap_or(0) } else { 0 };
            let known = inner.compacted_since(since);
            if !restored && (compacted > known || compacted <= self.seen + 1) {
                let what = format!("at {compacted}, having seen {}, the cluster {known}", self.seen);
                trace.breach("a watcher is cancelled only for a reason", what);
            }
            return false;
        }
        let told = response.header.map_or(0, |header| header.revision);
        let to = response.events.last().and_then(|event| event.kv.as_ref()).map_or(told, |kv| kv.mod_revision);
        let right: Vec<usize> =
            self.generations.iter().copied().filter(|at| self.fits(&inner, *at, to, response)).collect();
        let Some(&least) = right.first() else {
            let what = format!("{:?}, seen {}, to {to}, {response:?}", self.generations, self.seen);
            trace.breach("a watcher is sent exactly the events", what);
            return false;
        };
        drop(inner);
        if right.len() == 1 {
            world.0.cluster.tell(least, to);
        }
        trace.note(format!("watcher from {} to {to}: {} events", self.seen, response.events.len()));
        self.generations = right;
        self.seen = self.seen.max(to);
        // Not as far as the future in which it may have asked to begin.
        self.followed = self.followed.max(to);
        true
    }

    /// A history that shares everything seen so far is as good.
    fn extend(&mut self, inner: &Inner, range: &KeyRange) {
        let shares = |at: usize, other: usize| match self.is_cached {
            true => inner.are_alike(at, other, range, self.followed) || self.is_at_the_edge(inner, at, other, range),
            false => self.has_same_events(inner, at, other),
        };
        let all = 0..=inner.generation();
        let more = all
            .filter(|other| !self.generations.contains(other) && self.generations.iter().any(|at| shares(*at, *other)));
        let more: Vec<usize> = more.collect();
        self.generations.extend(more);
    }

    /// Whether what the watcher was sent is all that it was to be sent so far, in both histories. A relayed one knows nothing else;
    /// of what the newer has compacted the state alone is left, as it is for a watcher at the etcd itself.
    fn has_same_events(&self, inner: &Inner, one: usize, other: usize) -> bool {
        let range = &self.wish.range;
        let events = |first: i64, at: usize| -> Vec<Event> {
            inner.histories[at].events_in(range, first, self.followed).cloned().collect()
        };
        let same_from = |first: i64| events(first, one) == events(first, other);
        let compacted = inner.compacted_since(one.max(other));
        let left = compacted.min(self.followed);
        self.followed <= inner.histories[one].head().min(inner.histories[other].head())
            && (same_from(self.first) || inner.are_alike(one, other, range, left) && same_from(left + 1))
            || self.is_at_the_edge(inner, one, other, range)
    }

    /// Whether the newer history begins to tell just where the watcher goes on, and has left alone nothing but what was like that
    /// in the older. Etcd takes a watcher for one that has missed nothing then.
    fn is_at_the_edge(&self, inner: &Inner, one: usize, other: usize, range: &KeyRange) -> bool {
        let (old, new) = (&inner.histories[one.min(other)], &inner.histories[one.max(other)]);
        let next = self.followed + 1;
        let left_alone = || {
            let (old, new) = (old.state(self.followed), new.state(next));
            let mut left = new.values().filter(|kv| kv.mod_revision < next && range.contains(&kv.key));
            left.all(|kv| old.get(&kv.key) == Some(kv))
        };
        let begins_there = inner.compacted_since(one.max(other)) == next;
        begins_there && self.followed <= old.head() && next <= new.head() && left_alone()
    }

    fn fits(&self, inner: &Inner, generation: usize, to: i64, response: &WatchResponse) -> bool {
        let history = &inner.histories[generation];
        let told = response.header.map_or(0, |header| header.revision);
        let wanted = |event: &&Event| self.wish.wants(event);
        let expected = history.events_in(&self.wish.range, self.seen + 1, to).filter(wanted);
        let mut sent = response.events.iter();
        let same = expected.fold(true, |same, event| {
            let Some(sent) = sent.next().filter(|_| same) else { return false };
            // As at etcd, a compaction takes the previous records with it.
            let compacted = event.kv.as_ref().is_some_and(|kv| kv.mod_revision <= inner.compacted_since(0));
            let told = self.wish.prev_kv && !(compacted && sent.prev_kv.is_none());
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
