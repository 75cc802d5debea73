//! What the clients note down while they work.

use std::sync::{Arc, Mutex};

use millpond::proto::{etcdserverpb::WatchCreateRequest, mvccpb::Event};

use super::timeline::Tick;
use crate::support::operation::{Operation, Outcome};

/// Which server somebody talks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    Millpond(usize),
    Etcd(usize),
}

/// One unary call.
#[derive(Clone, Debug)]
pub struct Call {
    /// Tells the connections to one server apart.
    pub worker: usize,
    pub target: Target,
    pub begin: Tick,
    pub end: Tick,
    pub operation: Operation,
    /// None: no answer came within the client's patience. A write may have been done all the same.
    pub outcome: Option<Outcome>,
}

/// A watcher from its creation to its end, over however many streams.
#[derive(Clone, Debug)]
pub struct Life {
    pub target: Target,
    pub worker: usize,
    pub request: WatchCreateRequest,
    /// When its first request was sent.
    pub begin: Tick,
    /// The first revision that it is to be sent, once that is known.
    pub start: Option<i64>,
    /// The first revision that it has not been sent.
    pub next: i64,
    pub items: Vec<Item>,
    pub over: bool,
}

/// Something that a watcher was told.
#[derive(Clone, Debug)]
pub struct Item {
    pub tick: Tick,
    /// The header's.
    pub revision: i64,
    pub told: Told,
}

#[derive(Clone, Debug)]
pub enum Told {
    Created,
    /// Created again on another stream, from the next revision on.
    Resumed,
    /// A response, put together from its fragments.
    Events(Vec<Event>),
    /// Everything up to the header's revision has been sent.
    Progress,
    /// The answer to a request for progress was below this revision, which the server had told before it was asked.
    Short(i64),
    /// Cancelled by a compaction up to here.
    Compacted(i64),
    /// Cancelled or ended in a way that no server may: the watcher of etcd's own client would be dead.
    Killed(String),
}

pub type SharedLife = Arc<Mutex<Life>>;

/// Where everything is noted down.
#[derive(Default)]
pub struct Notes {
    pub calls: Mutex<Vec<Call>>,
    pub lives: Mutex<Vec<SharedLife>>,
}

impl Notes {
    pub fn call(&self, call: Call) {
        self.calls.lock().unwrap().push(call);
    }

    pub fn life(&self, life: Life) -> SharedLife {
        let life = Arc::new(Mutex::new(life));
        self.lives.lock().unwrap().push(Arc::clone(&life));
        life
    }
}
