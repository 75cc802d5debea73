//! Faults that strike at random, in an order that the seed decides.
//!
//! - [`links`]: what goes wrong between a Millpond and the etcd.
//! - [`servers`], [`loads`]: what happens to the servers themselves, and to the keys.
//! - [`restore`]: another history takes the place of this one.

pub mod links;
pub mod loads;
pub mod restore;
pub mod servers;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Instant,
};

/// What struck, and when.
#[derive(Clone)]
pub struct FaultLog {
    start: Instant,
    lines: Arc<Mutex<Vec<(f64, String)>>>,
}

impl FaultLog {
    pub fn new() -> Self {
        Self { start: Instant::now(), lines: Arc::default() }
    }

    /// Notes a fault. The words before the first colon are its kind.
    pub fn note(&self, text: impl Into<String>) {
        self.lines.lock().unwrap().push((self.start.elapsed().as_secs_f64(), text.into()));
    }

    pub fn text(&self) -> String {
        let lines = self.lines.lock().unwrap();
        lines.iter().map(|(at, text)| format!("{at:8.3} s  {text}\n")).collect()
    }

    /// How often each kind struck.
    pub fn counts(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for (_, text) in self.lines.lock().unwrap().iter() {
            let kind = text.split(':').next().unwrap_or(text);
            *counts.entry(kind.to_owned()).or_default() += 1;
        }
        counts
    }
}
