//! Judges a run: everything that clients were told, against what really happened.
//!
//! - [`placing`]: which history an answer can be of, and what had been seen of it before.
//! - [`reads`]: every read is the evaluation of its request at one revision, and recent enough.
//! - [`writes`]: what was acknowledged happened, what was refused did not, nothing happened twice.
//! - [`halves`]: what was not answered happened whole or not at all.
//! - [`watches`]: every watcher was sent exactly what it asked for.

pub mod halves;
pub mod placing;
pub mod reads;
pub mod watches;
pub mod writes;

use std::fmt;

use millpond::proto::mvccpb::{Event, event::EventType};

use super::{
    history::History,
    record::{Call, Life},
    timeline::{Eras, Tick},
};

/// A run, when it is over.
pub struct Case {
    pub eras: Eras,
    /// One for each era.
    pub histories: Vec<History>,
    pub calls: Vec<Call>,
    pub lives: Vec<Life>,
    /// Up to where every watcher that is still alive must have been sent everything.
    pub end: i64,
}

/// Something that no server may do.
#[derive(Clone, Debug)]
pub struct Breach {
    /// Which rule was broken.
    pub check: &'static str,
    pub tick: Tick,
    /// How much there is to look at, to show the smallest first.
    pub size: usize,
    pub text: String,
}

/// How much was compared.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub calls: usize,
    pub unanswered: usize,
    pub reads: usize,
    pub linearizable: usize,
    pub writes: usize,
    /// Transactions whose outcome nobody was told.
    pub in_doubt: usize,
    pub watchers: usize,
    pub resumed: usize,
    pub compacted: usize,
    pub events: usize,
    pub progress: usize,
}

impl Counts {
    pub fn add(&mut self, other: &Self) {
        self.calls += other.calls;
        self.unanswered += other.unanswered;
        self.reads += other.reads;
        self.linearizable += other.linearizable;
        self.writes += other.writes;
        self.in_doubt += other.in_doubt;
        self.watchers += other.watchers;
        self.resumed += other.resumed;
        self.compacted += other.compacted;
        self.events += other.events;
        self.progress += other.progress;
    }
}

/// All breaches, the smallest of each check first.
pub fn judge(case: &Case) -> (Vec<Breach>, Counts) {
    let mut counts = Counts { calls: case.calls.len(), ..Counts::default() };
    counts.unanswered = case.calls.iter().filter(|call| call.outcome.is_none()).count();
    let placing = placing::Placing::new(case);
    let mut breaches = reads::judge(case, &placing, &mut counts);
    breaches.extend(writes::judge(case, &placing, &mut counts));
    breaches.extend(halves::judge(case, &mut counts));
    breaches.extend(watches::judge(case, &placing, &mut counts));
    breaches.sort_by_key(|breach| (breach.check, breach.size, breach.tick));
    (breaches, counts)
}

/// An event in few words.
pub struct Brief<'a>(pub &'a Event);

impl fmt::Display for Brief<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(record) = &self.0.kv else { return write!(f, "an event without a record") };
        let kind = if self.0.r#type == EventType::Put as i32 { "put" } else { "delete" };
        write!(f, "{}: {kind} {:?}", record.mod_revision, record.key)?;
        if kind == "put" {
            write!(f, " version {} value {:?}", record.version, shortened(&record.value))?;
        }
        match &self.0.prev_kv {
            Some(before) => write!(f, " (before: revision {} version {})", before.mod_revision, before.version),
            None => Ok(()),
        }
    }
}

fn shortened(value: &[u8]) -> String {
    String::from_utf8_lossy(&value[..value.len().min(24)]).into_owned()
}

/// Events in few words, and not all when there are many.
pub fn brief<'a>(events: impl Iterator<Item = &'a Event>) -> String {
    const MOST: usize = 12;
    let all: Vec<&Event> = events.collect();
    let mut text: String = all.iter().take(MOST).map(|event| format!("\n      {}", Brief(event))).collect();
    if all.len() > MOST {
        text += &format!("\n      and {} more", all.len() - MOST);
    }
    if all.is_empty() { "\n      nothing".into() } else { text }
}
