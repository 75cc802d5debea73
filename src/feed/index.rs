//! The index, within the memory that it may have. One that is too large is dropped, and tried again later.

use std::time::Duration;

use tokio::time::Instant;
use tracing::warn;

use super::{End, Feed};
use crate::{aside, store::Tree, upstream::Link};

/// Before the first further try to keep an index that was too large; twice as long before each that follows.
const FIRST_WAIT: Duration = Duration::from_secs(60);
const LONGEST_WAIT: Duration = Duration::from_secs(1800);

/// Ends an attempt, so that the next lists.
pub(super) const TRY_INDEX: End = End::Again("trying whether the keyspace fits the cache limit again");

/// What is lacking of an index that was too large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lacking {
    /// Nothing, or it is too early.
    Nothing,
    /// The number of keys.
    Count,
    /// Everything.
    List,
}

impl Feed {
    /// How many records an index for that of the current view comes and goes with.
    pub(super) fn exchanged(&self, tree: Option<&Tree>) -> u64 {
        tree.map_or(0, Tree::len) + self.writer.store().view().tree.as_ref().map_or(0, Tree::len)
    }

    /// What an index that was too large waits for. Watchers wait while a list is made, so that is not done in vain: there have
    /// to be fewer keys than were too many. Values may have shrunk as well, so after the longest wait nobody asks.
    pub(super) fn lacking(&self) -> Lacking {
        match self.retry_index {
            Some((when, _)) if Instant::now() < when => Lacking::Nothing,
            Some((_, wait)) if wait < LONGEST_WAIT => Lacking::Count,
            Some(_) => Lacking::List,
            None => Lacking::Nothing,
        }
    }

    /// Takes the number of keys, which a server that has much to do may fail to tell.
    pub(super) fn take_count(&mut self, counted: Result<u64, End>) -> Result<(), End> {
        if counted.is_ok_and(|keys| keys < self.too_many) {
            return Err(TRY_INDEX);
        }
        self.note_size(None);
        Ok(())
    }

    /// Tries again to build an index that was too large, for the revision at which the history stands.
    pub(super) async fn retry_index(&mut self, link: &Link) -> Result<(), End> {
        if self.retry_index.is_none_or(|(when, _)| Instant::now() < when) {
            return Ok(());
        }
        let listed = self.list(link, self.writer.position().revision).await?;
        self.index(listed.tree);
        Ok(())
    }

    /// Takes a new index for the revision at which the history stands.
    pub(super) fn index(&mut self, tree: Option<Tree>) {
        self.note_size(tree.as_ref());
        aside::walk(self.exchanged(tree.as_ref()), || {
            self.writer.set_tree(tree);
            self.publish();
        });
    }

    /// Keeps the account of an index that is too large to be kept.
    pub(super) fn note_size(&mut self, tree: Option<&Tree>) {
        let wait = self.retry_index.map_or(FIRST_WAIT, |(_, wait)| (wait * 2).min(LONGEST_WAIT));
        self.retry_index = tree.is_none().then(|| (Instant::now() + wait, wait));
        self.metrics.over_limit.set(tree.is_none().into());
        if tree.is_none() {
            let limit = self.settings.cache_bytes;
            warn!(limit, "the keyspace is larger than the cache limit: reads are forwarded, watches go on");
        }
    }
}
