//! The index, within the memory that it may have. One that is too large is dropped, and tried again later.

use std::time::Duration;

use tokio::time::Instant;
use tracing::warn;

use super::{End, Feed};
use crate::{aside, store::Tree, upstream::Link};

/// Before the first further try to keep an index that was too large; twice as long before each that follows.
const FIRST_WAIT: Duration = Duration::from_secs(60);
const LONGEST_WAIT: Duration = Duration::from_secs(1800);

impl Feed {
    /// How many records an index for that of the current view comes and goes with.
    pub(super) fn exchanged(&self, tree: Option<&Tree>) -> u64 {
        tree.map_or(0, Tree::len) + self.writer.store().view().tree.as_ref().map_or(0, Tree::len)
    }

    /// Whether an index that was too large is to be tried again now. Watchers wait while a list is made, so that is not done in
    /// vain: there have to be fewer keys than were too many. Values may have shrunk as well, so after the longest wait nobody asks.
    pub(super) async fn wants_index(&mut self, link: &Link) -> Result<bool, End> {
        let Some((_, wait)) = self.retry_index.filter(|(when, _)| Instant::now() >= *when) else { return Ok(false) };
        let is_hopeless = wait < LONGEST_WAIT && self.count(link).await? >= self.too_many;
        if is_hopeless {
            self.note_size(None);
        }
        Ok(!is_hopeless)
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
