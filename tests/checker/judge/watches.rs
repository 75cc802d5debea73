//! Watches: each watcher was sent exactly the events of its range from its start on, in order, each revision whole, none
//! missing and none twice; and what it was told of its progress was so.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use millpond::proto::mvccpb::Event;

use super::{
    super::{
        history::History,
        record::{Item, Life, Target, Told},
        timeline::Eras,
    },
    Breach, Case, Counts, brief,
    placing::Placing,
};
use crate::support::watching::revision_of;

pub const EVENTS: &str = "a watcher is sent exactly the events of its range";
pub const PROGRESS: &str = "progress is told when everything up to it has been sent";
pub const SHORT: &str = "progress is not below what was known when it was asked for";
pub const CANCELLED: &str = "a watcher is cancelled only for a reason";
pub const UNFINISHED: &str = "a watcher is sent everything in the end";

/// Why a life does not follow a history: which item, and what is wrong with it.
struct Wrong {
    check: &'static str,
    item: usize,
    what: String,
}

pub fn judge(case: &Case, placing: &Placing, counts: &mut Counts) -> Vec<Breach> {
    let mut breaches: Vec<Breach> =
        case.lives.iter().filter_map(|life| judge_life(case, placing, counts, life)).collect();
    breaches.extend(changes(case));
    breaches
}

/// How many caches a Millpond has, each of which finds out about another history by itself.
const CACHES: usize = 2;

/// Cancellations that no compaction explains come with a change of history: once for each, and each cache.
fn changes(case: &Case) -> Vec<Breach> {
    let mut changes: BTreeMap<(Target, usize), BTreeSet<i64>> = BTreeMap::new();
    for life in case.lives.iter() {
        for item in &life.items {
            let Told::Compacted(at) = item.told else { continue };
            let era = case.eras.at(item.tick);
            let explained = (0..=era).any(|era| at <= case.eras.compacted(era, item.tick));
            if !explained {
                changes.entry((life.target, era)).or_default().insert(at);
            }
        }
    }
    let often = changes.into_iter().filter(|(_, at)| at.len() > CACHES);
    let text = |((target, era), at)| format!("{target:?} told of changes of history at {at:?} within history {era}");
    often.map(text).map(|text| Breach { check: CANCELLED, tick: 0, size: text.len(), text }).collect()
}

fn judge_life(case: &Case, placing: &Placing, counts: &mut Counts, life: &Life) -> Option<Breach> {
    count(life, counts);
    let follower = Follower { case, life };
    let wrong = follower.follow(0, start(life), placing.first_era(life)).err()?;
    Some(breach(life, wrong))
}

/// The first revision that the watcher is to be sent. Of a watcher that begins now, etcd itself may tell a later present than
/// the one that it begins after, when much is written meanwhile; and etcd is not under test.
fn start(life: &Life) -> i64 {
    let told = life.start.unwrap_or(0);
    let first = life.items.iter().find_map(|item| match &item.told {
        Told::Events(events) => events.first().map(revision_of),
        _ => None,
    });
    let begins_now = matches!(life.target, Target::Etcd(_)) && life.request.start_revision == 0;
    first.filter(|_| begins_now).map_or(told, |first| first.min(told))
}

/// Looks for histories that a watcher's items can be of.
struct Follower<'a> {
    case: &'a Case,
    life: &'a Life,
}

impl Follower<'_> {
    /// Whether the items from `from` on can be of `lowest` or a later history.
    fn follow(&self, from: usize, next: i64, lowest: usize) -> Result<(), Wrong> {
        let Self { case, life } = self;
        let last = last_era(life, from..life.items.len(), &case.eras);
        // Who is still alive must be in step with what there is now.
        let first = if life.over { lowest } else { case.eras.last() };
        let mut nearest: Option<Wrong> = None;
        for era in first..=last {
            match self.replay(era).whole(from, next) {
                Ok(()) => return Ok(()),
                Err(wrong) if nearest.as_ref().is_none_or(|nearest| nearest.item <= wrong.item) => {
                    nearest = Some(wrong)
                }
                Err(_) => {}
            }
        }
        if self.has_come_back(from, next, lowest) {
            return Ok(());
        }
        Err(nearest.unwrap_or_else(|| Wrong {
            check: CANCELLED,
            item: life.items.len(),
            what: format!(
                "its history ended and it was not told: it is of history {last} at most, and {first} goes on"
            ),
        }))
    }

    /// Whether its history ended before it came back on another stream. A server cannot know that it is the same watcher,
    /// and sends it what it asks for, of the history that there is now.
    fn has_come_back(&self, from: usize, next: i64, lowest: usize) -> bool {
        let Self { case, life } = self;
        let again = (from + 1..life.items.len()).filter(|item| matches!(life.items[*item].told, Told::Resumed));
        again.into_iter().any(|again| {
            let eras = lowest..=last_era(life, from..again, &case.eras);
            let ended = |era: &usize| case.eras.has_ended(*era, life.items[again].tick);
            eras.into_iter().filter(ended).any(|era| {
                let before = self.replay(era).run(from..again, next);
                before.is_ok_and(|next| self.follow(again, next, era + 1).is_ok())
            })
        })
    }

    fn replay(&self, era: usize) -> Replay<'_> {
        Replay { case: self.case, life: self.life, era, history: &self.case.histories[era] }
    }
}

fn count(life: &Life, counts: &mut Counts) {
    counts.watchers += 1;
    for item in &life.items {
        match &item.told {
            Told::Events(events) => counts.events += events.len(),
            Told::Progress => counts.progress += 1,
            Told::Resumed => counts.resumed += 1,
            Told::Compacted(_) => counts.compacted += 1,
            Told::Created | Told::Killed(_) | Told::Short(_) => {}
        }
    }
}

/// A watcher's items followed through one history.
struct Replay<'a> {
    case: &'a Case,
    life: &'a Life,
    era: usize,
    history: &'a History,
}

impl Replay<'_> {
    /// Follows the items from `from` on, and looks for what is missing after them.
    fn whole(&self, from: usize, next: i64) -> Result<(), Wrong> {
        let next = self.run(from..self.life.items.len(), next)?;
        if self.life.over { Ok(()) } else { self.finished(next) }
    }

    /// Follows these items. Gives the first revision that the watcher has not been sent.
    fn run(&self, items: Range<usize>, mut next: i64) -> Result<i64, Wrong> {
        for (number, item) in self.life.items.iter().enumerate().take(items.end).skip(items.start) {
            let wrong = |check, what| Wrong { check, item: number, what };
            match &item.told {
                Told::Created | Told::Resumed => {}
                Told::Events(events) => {
                    self.events(next, item, events).map_err(|what| wrong(EVENTS, what))?;
                    next = events.last().map_or(next, |event| revision_of(event) + 1);
                }
                Told::Progress => {
                    self.progress(next, item.revision).map_err(|what| wrong(PROGRESS, what))?;
                    next = next.max(item.revision + 1);
                }
                Told::Short(known) => return Err(wrong(SHORT, format!("{known} was known"))),
                Told::Compacted(at) => self.compacted(next, item, *at).map_err(|what| wrong(CANCELLED, what))?,
                Told::Killed(how) => return Err(wrong(CANCELLED, how.clone())),
            }
        }
        Ok(next)
    }

    fn events(&self, next: i64, item: &Item, events: &[Event]) -> Result<(), String> {
        let last = events.last().map_or(0, revision_of);
        if item.revision < last || item.revision > self.history.last {
            return Err(format!("the header says {}, the last event is of {last}", item.revision));
        }
        let expected: Vec<&Event> = self.history.watched(&self.life.request, next, last).collect();
        let same = |expected: &&Event, found: &Event| expected.r#type == found.r#type && expected.kv == found.kv;
        let all_same =
            expected.len() == events.len() && expected.iter().zip(events).all(|(one, other)| same(one, other));
        if !all_same {
            let (expected, found) = (brief(expected.into_iter()), brief(events.iter()));
            return Err(format!("from revision {next} on\n    expected:{expected}\n    found:{found}"));
        }
        events.iter().try_for_each(|event| self.previous(item, event))
    }

    fn previous(&self, item: &Item, event: &Event) -> Result<(), String> {
        let Some(record) = &event.kv else { return Err("an event without a record".into()) };
        let before = self.history.get(&record.key, record.mod_revision - 1);
        let as_asked = match &event.prev_kv {
            Some(found) => self.life.request.prev_kv && Some(found) == before,
            // What etcd itself leaves out is not ours to judge: etcd-io/etcd#10681.
            None if matches!(self.life.target, Target::Etcd(_)) => true,
            // Etcd, and so a relayed watch, leaves out what has been compacted meanwhile.
            None => {
                let compacted = self.case.eras.compacted(self.era, item.tick);
                !self.life.request.prev_kv || before.is_none() || record.mod_revision - 1 < compacted
            }
        };
        if as_asked { Ok(()) } else { Err(format!("the record before was {before:?}\n    found: {event:?}")) }
    }

    fn progress(&self, next: i64, revision: i64) -> Result<(), String> {
        if revision > self.history.last {
            return Err(format!("revision {revision} was never reached"));
        }
        let missing = brief(self.history.watched(&self.life.request, next, revision));
        let told = self.history.watched(&self.life.request, next, revision).next().is_none();
        if told { Ok(()) } else { Err(format!("progress {revision} was told before these events:{missing}")) }
    }

    fn compacted(&self, next: i64, item: &Item, at: i64) -> Result<(), String> {
        let eras = &self.case.eras;
        let compacted = (self.era..=eras.at(item.tick)).map(|era| eras.compacted(era, item.tick)).max().unwrap_or(0);
        // A Millpond finds out about another history some time after that began; [`changes`] counts how often.
        // A feed that was compacted past, and finds no key that was left alone meanwhile, cannot know whether this is still
        // the same history: then whoever had not been told more goes down with it.
        let before = self.life.items.iter().take_while(|other| other.tick < item.tick);
        // The header of a creation is the present, of which the watcher has been sent nothing yet.
        let sent = before.filter(|other| matches!(other.told, Told::Events(_) | Told::Progress));
        let told = sent.map(|other| other.revision).max();
        let may_be_doubted = told.is_none_or(|told| told < compacted);
        if next < compacted || may_be_doubted || eras.at(item.tick) > 0 {
            return Ok(());
        }
        Err(format!(
            "cancelled by a compaction to {at}; its next revision is {next}, and {compacted} is the highest compaction"
        ))
    }

    fn finished(&self, next: i64) -> Result<(), Wrong> {
        let wrong = |what| Wrong { check: UNFINISHED, item: self.life.items.len(), what };
        if self.life.start.is_none() {
            return Err(wrong("it was never created".into()));
        }
        if !is_behind(self.life, next, self.history, self.case.end) {
            return Ok(());
        }
        let missing = brief(self.history.watched(&self.life.request, next, self.case.end));
        Err(wrong(format!("from revision {next} on it misses:{missing}")))
    }
}

/// Whether the history of which a watcher was told something on its present stream has ended, so that it has to be cancelled.
pub fn is_outlived(life: &Life, eras: &Eras) -> bool {
    let came = life.items.iter().rposition(|item| matches!(item.told, Told::Resumed));
    last_era(life, came.unwrap_or(0)..life.items.len(), eras) < eras.last()
}

/// The last era that these items of a watcher can belong to.
fn last_era(life: &Life, items: Range<usize>, eras: &Eras) -> usize {
    // A creation tells what the present was, of which nothing has been sent yet: nobody could recognise it later.
    let binds = |item: &&Item| !matches!(item.told, Told::Created | Told::Resumed | Told::Short(_));
    let bounds = life.items[items].iter().filter(binds).map(|item| eras.bound(item.tick, item.revision));
    bounds.min().unwrap_or(eras.last())
}

/// Whether a watcher that was sent everything before `next` has not been sent everything up to `end`.
pub fn is_behind(life: &Life, next: i64, history: &History, end: i64) -> bool {
    history.watched(&life.request, next, end).next().is_some()
}

fn breach(life: &Life, wrong: Wrong) -> Breach {
    const SHOWN: usize = 6;
    let from = wrong.item.saturating_sub(SHOWN - 1);
    let shown = life.items.iter().enumerate().skip(from).take(SHOWN);
    let items: String = shown.map(|(number, item)| format!("\n    {number}: {}", brief_item(item))).collect();
    let Life { target, worker, request, begin, start, .. } = life;
    let text = format!(
        "{}\n    watcher of {target:?} by worker {worker}, asked for at tick {begin}, from revision {start:?}: {request:?}{items}",
        wrong.what
    );
    Breach { check: wrong.check, tick: *begin, size: text.len(), text }
}

fn brief_item(item: &Item) -> String {
    let told = match &item.told {
        Told::Events(events) => format!("events:{}", brief(events.iter())),
        other => format!("{other:?}"),
    };
    format!("tick {}, header {}: {told}", item.tick, item.revision)
}
