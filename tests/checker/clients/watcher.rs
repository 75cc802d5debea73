//! Watchers that behave as etcd's Go client does: several on one stream, and when the stream breaks, each goes on with the
//! first revision that it has not seen, on another stream.

use millpond::proto::{
    etcdserverpb::{WatchCreateRequest, WatchResponse},
    mvccpb::Event,
};

use super::super::{
    context::Context,
    record::{Item, Life, SharedLife, Target, Told},
};
use crate::support::{random::Generator, watching::revision_of};

/// A watcher on a stream.
pub struct Watcher {
    pub life: SharedLife,
    /// None until it has been created on the present stream.
    pub id: Option<i64>,
    /// Of a response whose last fragment has not come.
    fragments: Vec<Event>,
    /// The era in which it began: after a restore nobody goes on.
    era: usize,
    pub cancelling: bool,
}

impl Watcher {
    /// A watcher of a random range, with random options.
    pub fn random(worker: usize, target: Target, context: &Context, random: &mut Generator) -> Self {
        let request = request(context, random);
        let life = Life {
            target,
            worker,
            next: request.start_revision,
            request,
            begin: context.timeline.tick(),
            start: None,
            items: Vec::new(),
            over: false,
        };
        let (life, era) = (context.notes.life(life), context.timeline.era());
        Self { life, id: None, fragments: Vec::new(), era, cancelling: false }
    }

    /// The request that creates it on a new stream.
    pub fn create_request(&self) -> WatchCreateRequest {
        let life = self.life.lock().unwrap();
        WatchCreateRequest { start_revision: life.next, ..life.request.clone() }
    }

    /// The stream broke.
    pub fn disconnect(&mut self) {
        self.id = None;
        self.cancelling = false;
        self.fragments.clear();
    }

    /// Whether it belongs to a history that has ended, as far as a client can tell.
    pub fn is_outlived(&self, context: &Context) -> bool {
        context.timeline.is_closed() || context.timeline.era() != self.era
    }

    pub fn is_over(&self) -> bool {
        self.life.lock().unwrap().over
    }

    pub fn end(&self) {
        self.life.lock().unwrap().over = true;
    }

    /// Notes that the server has done what kills the watcher of a Go client.
    pub fn kill(&self, context: &Context, how: String) {
        self.tell(context, 0, Told::Killed(how));
        self.end();
    }

    pub fn created(&mut self, context: &Context, response: &WatchResponse) {
        let revision = revision(response);
        self.id = Some(response.watch_id);
        if response.canceled {
            // Such as an empty range: then there is nothing to be watched.
            return self.end();
        }
        let mut life = self.life.lock().unwrap();
        let resumed = life.start.is_some();
        if !resumed {
            life.start =
                Some(if life.request.start_revision == 0 { revision + 1 } else { life.request.start_revision });
            life.next = life.start.unwrap_or_default();
        }
        drop(life);
        self.tell(context, revision, if resumed { Told::Resumed } else { Told::Created });
        if resumed && self.is_outlived(context) {
            self.end();
        }
    }

    /// Takes a response with its id.
    pub fn take(&mut self, context: &Context, response: WatchResponse) {
        let revision = revision(&response);
        if response.canceled {
            let told = match response.compact_revision {
                0 if self.cancelling => return self.end(),
                0 => Told::Killed(format!("cancelled for no reason: {response:?}")),
                compacted => Told::Compacted(compacted),
            };
            self.tell(context, revision, told);
            return self.end();
        }
        if response.events.is_empty() {
            return self.progress(context, revision);
        }
        self.fragments.extend(response.events);
        if !response.fragment {
            let events = std::mem::take(&mut self.fragments);
            self.life.lock().unwrap().next = events.last().map_or(0, revision_of) + 1;
            self.tell(context, revision, Told::Events(events));
        }
    }

    pub fn progress(&mut self, context: &Context, revision: i64) {
        let mut life = self.life.lock().unwrap();
        life.next = life.next.max(revision + 1);
        drop(life);
        self.tell(context, revision, Told::Progress);
    }

    /// Notes an answer to a request for progress that was below what the server had told before.
    pub fn short(&self, context: &Context, revision: i64, known: i64) {
        self.tell(context, revision, Told::Short(known));
    }

    fn tell(&self, context: &Context, revision: i64, told: Told) {
        context.seen(revision);
        let tick = context.timeline.tick();
        self.life.lock().unwrap().items.push(Item { tick, revision, told });
    }
}

fn revision(response: &WatchResponse) -> i64 {
    response.header.as_ref().map_or(0, |header| header.revision)
}

fn request(context: &Context, random: &mut Generator) -> WatchCreateRequest {
    let (key, range_end) = if random.chance(2) { ("b/".into(), "b0".into()) } else { random.span() };
    let bounds = context.bounds();
    let start_revision = match random.below(10) {
        0..4 => 0,
        4 => bounds.current + random.below(20) as i64,
        5..8 => (bounds.current - random.below(100) as i64).max(1),
        _ => random.revision(bounds).clamp(1, bounds.current + 10),
    };
    WatchCreateRequest {
        key,
        range_end,
        start_revision,
        progress_notify: random.chance(3),
        filters: random.pick(&[vec![], vec![], vec![], vec![0], vec![1], vec![0, 1]]),
        prev_kv: random.chance(2),
        watch_id: 0,
        fragment: random.chance(3),
    }
}
