//! The index, within the memory that it may have. One that is too large is dropped, and tried again later.

use std::time::Duration;

use tokio::time::Instant;
use tracing::warn;

use super::{End, Feed};
use crate::{aside, store::Tree, upstream::Link};

impl Feed {
    /// How many records an index for that of the current view comes and goes with.
    pub(super) fn exchanged(&self, tree: Option<&Tree>) -> u64 {
        tree.map_or(0, Tree::len) + self.writer.store().view().tree.as_ref().map_or(0, Tree::len)
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
        self.retry_index = match (tree, self.retry_index) {
            (Some(_), _) => None,
            (None, Some((_, wait))) => Some((Instant::now() + wait * 2, (wait * 2).min(Duration::from_secs(1800)))),
            (None, None) => Some((Instant::now() + Duration::from_secs(60), Duration::from_secs(60))),
        };
        self.metrics.over_limit.set(tree.is_none().into());
        if tree.is_none() {
            let limit = self.settings.cache_bytes;
            warn!(limit, "the keyspace is larger than the cache limit: reads are forwarded, watches go on");
        }
    }
}
