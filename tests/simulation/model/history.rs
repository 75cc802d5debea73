//! What happened to the keys: every revision's events, and the state after each.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use millpond::{
    proto::mvccpb::{Event, KeyValue, event::EventType},
    rules::KeyRange,
};

/// The keys at a revision.
pub type State = Arc<BTreeMap<Bytes, KeyValue>>;

/// One change of a transaction.
#[derive(Clone, Debug)]
pub enum Write {
    Put(Bytes, Bytes),
    Delete(Bytes),
}

/// A history of a keyspace. Its revisions are numbered from 1, at which it is empty, as in etcd.
#[derive(Clone, Debug)]
pub struct History {
    /// The events of revision `index + 1`, and the state after them.
    revisions: Vec<(Vec<Event>, State)>,
}

impl History {
    pub fn new() -> Self {
        Self { revisions: vec![(Vec::new(), State::default())] }
    }

    /// The newest revision.
    pub fn head(&self) -> i64 {
        self.revisions.len() as i64
    }

    /// What a backup taken at `revision` holds, with the revision raised by `bump`.
    pub fn restored(&self, revision: i64, bump: i64) -> Self {
        let mut revisions = self.revisions[..revision as usize].to_vec();
        let state = revisions.last().map(|(_, state)| state.clone()).unwrap_or_default();
        revisions.extend((0..bump).map(|_| (Vec::new(), state.clone())));
        Self { revisions }
    }

    /// The keys at `revision`, which must have been reached; before the first, there are none.
    pub fn state(&self, revision: i64) -> &State {
        &self.revisions[revision.max(1) as usize - 1].1
    }

    /// The events of `revision`, each with the record before it, as etcd tells it: none for a put that creates.
    pub fn events(&self, revision: i64) -> &[Event] {
        &self.revisions[revision as usize - 1].0
    }

    /// What was done at `revision`, with other values.
    pub fn again(&self, revision: i64, mut value: impl FnMut() -> Bytes) -> Vec<Write> {
        let write = |event: &Event| {
            let key = event.kv.as_ref().map(|kv| kv.key.clone()).unwrap_or_default();
            if event.r#type() == EventType::Delete { Write::Delete(key) } else { Write::Put(key, value()) }
        };
        self.events(revision).iter().map(write).collect()
    }

    /// The events in `range` of all revisions from `first` to `last`.
    pub fn events_in(&self, range: &KeyRange, first: i64, last: i64) -> impl Iterator<Item = &Event> {
        let wanted = move |event: &&Event| event.kv.as_ref().is_some_and(|kv| range.contains(&kv.key));
        (first.max(1)..=last.min(self.head())).flat_map(|revision| self.events(revision)).filter(wanted)
    }

    /// Does one transaction: a new revision, unless it changes nothing. Gives the revision at which it stands then.
    pub fn write(&mut self, writes: &[Write]) -> i64 {
        let revision = self.head() + 1;
        let before = self.state(self.head());
        let mut state = BTreeMap::clone(before);
        let events: Vec<Event> =
            writes.iter().filter_map(|write| change(before, &mut state, write, revision)).collect();
        if !events.is_empty() {
            self.revisions.push((events, Arc::new(state)));
        }
        self.head()
    }
}

fn change(
    before: &BTreeMap<Bytes, KeyValue>,
    state: &mut BTreeMap<Bytes, KeyValue>,
    write: &Write,
    revision: i64,
) -> Option<Event> {
    match write {
        Write::Put(key, value) => {
            let (create_revision, version) =
                state.get(key).map_or((revision, 1), |old| (old.create_revision, old.version + 1));
            let previous = before.get(key).filter(|_| create_revision < revision).cloned();
            let kv = KeyValue {
                key: key.clone(),
                value: value.clone(),
                create_revision,
                mod_revision: revision,
                version,
                lease: 0,
            };
            state.insert(key.clone(), kv.clone());
            Some(Event { r#type: EventType::Put as i32, kv: Some(kv), prev_kv: previous })
        }
        Write::Delete(key) => {
            state.remove(key)?;
            let kv = KeyValue { key: key.clone(), mod_revision: revision, ..KeyValue::default() };
            Some(Event { r#type: EventType::Delete as i32, kv: Some(kv), prev_kv: before.get(key).cloned() })
        }
    }
}
