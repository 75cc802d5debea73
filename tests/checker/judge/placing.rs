//! Which history an answer can be of, and what had been seen of it before.

use std::collections::HashMap;

use millpond::proto::etcdserverpb::{RequestOp, request_op::Request};

use super::{
    super::{
        record::{Call, Life, Target, Told},
        timeline::{Eras, Tick},
    },
    Case,
};
use crate::support::operation::Operation;

/// What is known of when who was told what.
pub struct Placing {
    eras: Eras,
    /// When a Millpond first answered from an era for sure.
    shown: HashMap<(Target, usize), Tick>,
    /// For each era, the ends of answers and the highest revision told by then.
    seen: Vec<Vec<(Tick, i64)>>,
}

impl Placing {
    pub fn new(case: &Case) -> Self {
        let mut placing =
            Self { eras: case.eras.clone(), shown: HashMap::new(), seen: vec![Vec::new(); case.histories.len()] };
        placing.note_shown(case);
        placing.note_seen(case);
        placing
    }

    fn note_shown(&mut self, case: &Case) {
        for call in case.calls.iter().filter(|call| is_current(&call.operation) && revision(call).is_some()) {
            let first = self.shown.entry((call.target, self.eras.at(call.begin))).or_insert(call.end);
            *first = call.end.min(*first);
        }
    }

    fn note_seen(&mut self, case: &Case) {
        for call in &case.calls {
            let (lowest, highest) = self.eras_of(call);
            if let Some(revision) = revision(call).filter(|_| lowest == highest) {
                self.seen[lowest].push((call.end, revision));
            }
        }
        for life in case.lives.iter().filter(|life| matches!(life.target, Target::Etcd(_))) {
            let era = self.eras.at(life.begin);
            let told = life
                .items
                .iter()
                .filter(|item| self.eras.at(item.tick) == era && !matches!(item.told, Told::Killed(_)));
            self.seen[era].extend(told.map(|item| (item.tick, item.revision)));
        }
        for seen in &mut self.seen {
            seen.sort_unstable();
            let mut highest = 0;
            for (_, revision) in seen {
                highest = highest.max(*revision);
                *revision = highest;
            }
        }
    }

    /// The first and the last era that the call's answer can be of.
    ///
    /// What went through consensus is of an era that could be reached meanwhile. What a Millpond answers from memory alone
    /// may be of a history that has ended, for as long as the Millpond cannot know; so at least until it has shown the new.
    pub fn eras_of(&self, call: &Call) -> (usize, usize) {
        let lowest =
            if is_current(&call.operation) { self.eras.at(call.begin) } else { self.floor(call.target, call.begin) };
        (lowest, self.eras.at(call.end))
    }

    /// The first era that a watcher can be of.
    pub fn first_era(&self, life: &Life) -> usize {
        self.floor(life.target, life.begin)
    }

    fn floor(&self, target: Target, tick: Tick) -> usize {
        if matches!(target, Target::Etcd(_)) {
            return self.eras.at(tick);
        }
        let shown = |era: &usize| self.shown.get(&(target, *era)).is_some_and(|end| *end < tick);
        (0..=self.eras.last()).rev().find(shown).unwrap_or(0)
    }

    /// The highest revision of an era that anybody had been told of before `tick`.
    pub fn seen_before(&self, era: usize, tick: Tick) -> i64 {
        let seen = &self.seen[era];
        let before = seen.partition_point(|(end, _)| *end < tick);
        seen[..before].last().map_or(0, |(_, revision)| *revision)
    }
}

/// The revision in a KV answer's header.
pub fn revision(call: &Call) -> Option<i64> {
    let kv = matches!(
        call.operation,
        Operation::Range(_) | Operation::RangeStream(_) | Operation::Put(_) | Operation::Delete(_) | Operation::Txn(_)
    );
    let answer = call.outcome.as_ref()?.as_ref().ok()?;
    answer.header().map(|header| header.revision).filter(|_| kv)
}

/// Whether the answer must show everything that was acknowledged before.
pub fn is_current(operation: &Operation) -> bool {
    match operation {
        Operation::Range(request) | Operation::RangeStream(request) => !request.serializable,
        Operation::Put(_) | Operation::Delete(_) => true,
        Operation::Txn(request) => request.success.iter().chain(&request.failure).any(is_current_op),
        _ => false,
    }
}

fn is_current_op(op: &RequestOp) -> bool {
    match &op.request {
        Some(Request::RequestRange(request)) => !request.serializable,
        Some(Request::RequestTxn(request)) => request.success.iter().chain(&request.failure).any(is_current_op),
        Some(_) => true,
        None => false,
    }
}
