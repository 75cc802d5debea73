//! How a store is opened.

use std::time::Duration;

use super::Metrics;

/// Settings of a store. The defaults are etcd's where etcd has one.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of page cache over all connections: the engine's memory, whatever the number of keys.
    pub cache_bytes: usize,
    /// How many reads run at once.
    pub readers: usize,
    /// Bytes of recent events that are kept in memory for watchers.
    pub history_bytes: usize,
    /// Bytes of the database from which on writes that need room are refused; 0 is no limit.
    pub quota_bytes: i64,
    /// The largest write that is taken, in bytes.
    pub max_request_bytes: usize,
    /// The most operations of a transaction.
    pub max_txn_ops: usize,
    /// How often a watcher that asks for it hears that nothing happened.
    pub progress_interval: Duration,
    /// Whether and how old revisions go by themselves.
    pub auto_compaction: Option<AutoCompaction>,
    /// How long a lease must have been running for what remains of it to be kept over a restart; a shorter one starts over.
    pub lease_checkpoint_interval: Duration,
    /// The member's name in MemberList.
    pub member_name: String,
    /// The client URLs in MemberList.
    pub client_urls: Vec<String>,
    /// Where measurements go.
    pub metrics: Metrics,
}

/// When old revisions are compacted without being asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AutoCompaction {
    /// Keep the revisions of this last stretch of time.
    Periodic(Duration),
    /// Keep this many revisions; checked every five minutes, as in etcd.
    Revisions(i64),
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cache_bytes: 64 << 20,
            readers: 4,
            history_bytes: 32 << 20,
            quota_bytes: 2 << 30,
            max_request_bytes: 3 << 19,
            max_txn_ops: 128,
            progress_interval: Duration::from_secs(600),
            auto_compaction: None,
            lease_checkpoint_interval: Duration::from_secs(300),
            member_name: "millpond".to_owned(),
            client_urls: Vec::new(),
            metrics: Metrics::default(),
        }
    }
}
