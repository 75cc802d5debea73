//! The first state: every key of the range at one pinned revision.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::sleep;
use tracing::debug;

use super::{DEADLINE, End, Feed, RANGE, decode::Page};
use crate::{
    proto::etcdserverpb::{RangeRequest, ResponseHeader},
    status::Status,
    store::{Record, Revision, Tree},
    upstream::Link,
};

/// What a page should weigh, in bytes: large, because etcd walks the whole range for each.
const PAGE_BYTES: usize = 16 << 20;
const FIRST_PAGE: i64 = 1000;
const LARGEST_PAGE: i64 = 100_000;
const PAGE_DEADLINE: Duration = Duration::from_secs(60);
/// How often a question that a change of the leader has overtaken is asked again, and how long after.
const MOST_REPEATS: u8 = 20;
const BEFORE_REPEAT: Duration = Duration::from_millis(25);

/// The state at a revision; without a tree when it is too large to keep.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) revision: Revision,
    pub(super) tree: Option<Tree>,
}

/// A tree while it is filled.
struct Filling {
    tree: Tree,
    bytes: usize,
    limit: usize,
}

impl Filling {
    /// Takes the records of a page in. False when the limit is reached.
    fn take(&mut self, records: Vec<Record>) -> bool {
        for record in records {
            self.bytes += record.memory();
            self.tree.insert(record);
        }
        self.bytes <= self.limit
    }
}

impl Feed {
    /// Lists the range at `revision`, or at the present when that is zero.
    pub(super) async fn list(&self, link: &Link, revision: Revision) -> Result<Listed, End> {
        let filling = Filling { tree: Tree::default(), bytes: 0, limit: self.settings.cache_bytes };
        let listed = if self.upstream.gate().has_range_stream {
            self.list_by_stream(link, revision, filling).await?
        } else {
            self.list_by_pages(link, revision, filling).await?
        };
        let keys = listed.tree.as_ref().map(Tree::len);
        debug!(endpoint = self.upstream.name(link.at()), revision = listed.revision.0, keys, "listed");
        Ok(listed)
    }

    fn list_request(&self, revision: Revision) -> RangeRequest {
        let range = &self.settings.range;
        let (key, range_end) = (range.request_key(), range.request_end());
        RangeRequest { key, range_end, revision: revision.0, ..Default::default() }
    }

    async fn list_by_stream(&self, link: &Link, mut revision: Revision, mut filling: Filling) -> Result<Listed, End> {
        let path = "/etcdserverpb.KV/RangeStream";
        let (sender, mut chunks) = link.open_stream(path, &[])?;
        sender.send(&self.list_request(revision)).await?;
        sender.finish();
        let pinned = revision > Revision::ZERO;
        while let Some(chunk) = tokio::time::timeout(PAGE_DEADLINE, chunks.next()).await.map_err(|_| silent())? {
            let page = Page::decode_chunk(&chunk?)?;
            if !pinned {
                revision = page.header.map_or(revision, |header| Revision(header.revision));
            }
            if !filling.take(page.records) {
                return self.too_large(link).await;
            }
        }
        if revision == Revision::ZERO {
            return Err(End::Unreadable("a list without a header".into()));
        }
        Ok(Listed { revision, tree: Some(filling.tree) })
    }

    async fn list_by_pages(&self, link: &Link, mut revision: Revision, mut filling: Filling) -> Result<Listed, End> {
        let mut request = RangeRequest { limit: FIRST_PAGE, ..self.list_request(revision) };
        loop {
            let message = link.unary_raw(RANGE, &request, PAGE_DEADLINE).await?;
            let page = Page::decode(&message)?;
            if revision == Revision::ZERO {
                revision = page.header.map_or(revision, |header| Revision(header.revision));
                request.revision = revision.0;
            }
            let last = page.records.last().map(|record| successor(record.key()));
            request.limit = next_limit(request.limit, message.len());
            if !filling.take(page.records) {
                return self.too_large(link).await;
            }
            match last.filter(|_| page.more) {
                Some(next) => request.key = next,
                None => return Ok(Listed { revision, tree: Some(filling.tree) }),
            }
        }
    }

    /// The keyspace is over the limit: only where the history begins is needed.
    async fn too_large(&self, link: &Link) -> Result<Listed, End> {
        let header = examine(link).await?;
        Ok(Listed { revision: Revision(header.revision), tree: None })
    }
}

/// Asks, through consensus, who answers and how far the cluster has got. A question that a change of the leader has overtaken is
/// asked again: the connection is sound, and over another one, relays that began before could not be joined.
pub(super) async fn examine(link: &Link) -> Result<ResponseHeader, End> {
    let question = RangeRequest { key: Bytes::from_static(&[0]), count_only: true, ..Default::default() };
    let mut repeats = 0..MOST_REPEATS;
    let message = loop {
        match link.unary_raw(RANGE, &question, DEADLINE).await {
            Err(status) if status == Status::LEADER_CHANGED && repeats.next().is_some() => sleep(BEFORE_REPEAT).await,
            answer => break answer?,
        }
    };
    Page::decode(&message)?.header.ok_or_else(|| End::Unreadable("an answer without a header".into()))
}

fn silent() -> End {
    End::Failed(Status::TIMEOUT)
}

/// The first key after `key`.
fn successor(key: &[u8]) -> Bytes {
    [key, &[0]].concat().into()
}

/// The limit for the next page, after a page of `limit` keys weighed `bytes`.
fn next_limit(limit: i64, bytes: usize) -> i64 {
    let ideal = limit.saturating_mul(PAGE_BYTES as i64) / (bytes.max(1) as i64);
    ideal.clamp(limit / 4, limit.saturating_mul(4)).clamp(1, LARGEST_PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_approach_their_weight_without_leaps() {
        assert_eq!(next_limit(1000, PAGE_BYTES), 1000);
        assert_eq!(next_limit(1000, 1), 4000);
        assert_eq!(next_limit(1000, PAGE_BYTES * 100), 250);
        assert_eq!(next_limit(1, usize::MAX / 2), 1);
        assert_eq!(next_limit(LARGEST_PAGE, 1), LARGEST_PAGE);
    }
}
