//! Whether what the cache handed out is so.

use std::{collections::BTreeMap, sync::Arc};

use millpond::{
    proto::mvccpb::{Event, KeyValue, event::EventType},
    rules::KeyRange,
    store::{Entry, EventKind, Record, Revision, View},
};

use crate::{
    model::{cluster::Inner, history::History},
    world::World,
};

/// How many of the window's revisions are compared with each view.
const REVISIONS: i64 = 15;

/// What was so when a read began.
#[derive(Clone, Copy, Debug)]
pub struct Before {
    generation: usize,
    /// The highest revision that anybody had been told of.
    told: i64,
    compacted: i64,
    /// The history that the cache had answered from for certain, and what it had relayed from it, or, with several prefixes,
    /// answered.
    shown: (usize, i64),
}

impl World {
    pub fn before(&self) -> Before {
        let inner = self.0.cluster.look();
        let generation = inner.generation();
        let (told, compacted) = (inner.told[generation], inner.compacted());
        Before { generation, told, compacted, shown: *self.0.shown.lock() }
    }

    /// A linearizable read has everything that anybody had been told of before it began, and is a state of the history
    /// that was the present one at some time between.
    pub fn judge_linearizable(&self, before: Before, range: &KeyRange, view: &View) {
        let inner = self.0.cluster.look();
        let generations = matching(&inner, range, view, before.generation);
        let least = |generation: usize| {
            if generation == before.generation { before.told } else { inner.began[generation] }
        };
        let revision = view.revision().0;
        let fresh = generations.iter().rev().find(|generation| revision >= least(**generation)).copied();
        let oldest = generations.first().copied();
        let fault = describe(&inner, range, view);
        drop(inner);
        match (fresh, oldest) {
            (Some(generation), Some(oldest)) => {
                self.0.cluster.tell(generation, revision);
                self.show(oldest, if self.0.ranges.len() > 1 { revision } else { 0 });
            }
            (None, Some(_)) => self.0.trace.breach(
                "a linearizable read has every write acknowledged before it",
                format!("revision {revision}, though before it {before:?}"),
            ),
            (_, None) => self.0.trace.breach("a view is the state at its revision", format!("{before:?}: {fault}")),
        }
    }

    /// A linearizable read of the past, which may choose any revision that `view` offers, finds nothing that had been compacted
    /// before it began.
    pub fn judge_past(&self, before: Before, view: &View) {
        let inner = self.0.cluster.look();
        let (offered, revision) = (oldest_in(view), view.revision().0);
        if inner.generation() == before.generation && offered < before.compacted && before.compacted <= revision {
            drop(inner);
            let what = format!("{offered} to {revision}, though before it {before:?}");
            self.0.trace.breach("nothing that was compacted is read", what);
        }
    }

    /// A serializable read is a state of a history that the cache does not know to be over, and not older than what the
    /// cache has relayed of it.
    pub fn judge_serializable(&self, before: Before, range: &KeyRange, view: &View) {
        let inner = self.0.cluster.look();
        let generations = matching(&inner, range, view, before.shown.0);
        let revision = view.revision().0;
        let least = |generation: usize| if generation == before.shown.0 { before.shown.1 } else { 0 };
        let fresh = generations.iter().find(|generation| revision >= least(**generation)).copied();
        match fresh {
            Some(generation) if self.0.ranges.len() > 1 => self.show(generation, revision),
            Some(_) => {}
            None if generations.is_empty() => {
                let fault = describe(&inner, range, view);
                self.0.trace.breach("a view is the state at its revision", format!("{before:?}: {fault}"));
            }
            None => {
                let what = format!("revision {revision}, though before it {before:?}");
                self.0.trace.breach("a serializable read is not older than what was answered", what);
            }
        }
    }

    /// Notes that the cache has answered from `generation`, or has relayed `revision` of it.
    pub fn show(&self, generation: usize, revision: i64) {
        let mut shown = self.0.shown.lock();
        if generation > shown.0 {
            *shown = (generation, revision);
        } else if generation == shown.0 {
            shown.1 = shown.1.max(revision);
        }
    }
}

/// The oldest revision that may be read from `view`.
pub fn oldest_in(view: &View) -> i64 {
    view.window.start().previous().max(view.compacted).0
}

/// The generations from `first` on whose history has `view`.
pub fn matching(inner: &Inner, range: &KeyRange, view: &View, first: usize) -> Vec<usize> {
    (first..=inner.generation()).filter(|generation| is_of(inner, range, view, *generation).is_ok()).collect()
}

fn describe(inner: &Inner, range: &KeyRange, view: &View) -> String {
    let each = (0..=inner.generation()).map(|generation| {
        let verdict = is_of(inner, range, view, generation).err().unwrap_or_else(|| "yes".into());
        format!("is {:?} of history {generation}? {verdict}", view.position)
    });
    each.collect::<Vec<_>>().join("; ")
}

/// Whether `view`, with the end of its window, is of the history.
fn is_of(inner: &Inner, range: &KeyRange, view: &View, generation: usize) -> Result<(), String> {
    let (history, revision) = (&inner.histories[generation], view.revision().0);
    if revision < 1 || revision > history.head() {
        return Err(format!("it has only got to {}", history.head()));
    }
    let Some(tree) = &view.tree else { return Err("there is no index".into()) };
    let mut expected = history.state(revision).values().filter(|kv| range.contains(&kv.key));
    for record in tree.iter_from(b"") {
        if !expected.next().is_some_and(|kv| is_record(kv, record)) {
            return Err(format!("{record:?} is not in it"));
        }
    }
    if let Some(missing) = expected.next() {
        return Err(format!("{missing:?} is missing"));
    }
    let after = view.window.start().previous().0.max(revision - REVISIONS);
    let Some(entries) = view.window.after(Revision(after)) else { return Ok(()) };
    let entries: BTreeMap<i64, &Arc<Entry>> = entries.map(|entry| (entry.revision.0, entry)).collect();
    let mut followed = generation;
    for revision in (after + 1..=revision).rev() {
        let entry = entries.get(&revision).copied();
        // It may have followed an earlier history up to a revision at which both were the same.
        let fits = |other: &usize| {
            inner.histories[*other].head() >= revision
                && is_same_entry(&inner.histories[*other], range, revision, entry)
                && inner.are_alike(*other, followed, range, revision)
        };
        let earlier = (0..=followed).rev().find(fits);
        followed = earlier.ok_or_else(|| format!("revision {revision} is not in it, but {entry:?} in the window"))?;
    }
    Ok(())
}

fn is_same_entry(history: &History, range: &KeyRange, revision: i64, entry: Option<&Arc<Entry>>) -> bool {
    let mut events = entry.map(|entry| entry.events.iter()).unwrap_or_default();
    let same = |expected: &Event| {
        let event = events.next();
        event.is_some_and(|event| is_event(expected, event.kind, &event.record, event.previous.as_ref()))
    };
    history.events_in(range, revision, revision).all(same) && events.next().is_none()
}

fn is_record(kv: &KeyValue, record: &Record) -> bool {
    let numbers = (record.create_revision().0, record.mod_revision().0, record.version());
    kv.key == record.key() && kv.value == record.value() && (kv.create_revision, kv.mod_revision, kv.version) == numbers
}

fn is_event(expected: &Event, kind: EventKind, record: &Record, previous: Option<&Record>) -> bool {
    let put = expected.r#type == EventType::Put as i32;
    let same_previous = match (&expected.prev_kv, previous) {
        (Some(kv), Some(record)) => is_record(kv, record),
        (None, None) => true,
        _ => false,
    };
    put == (kind == EventKind::Put) && expected.kv.as_ref().is_some_and(|kv| is_record(kv, record)) && same_previous
}
