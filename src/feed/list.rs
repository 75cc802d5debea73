//! The first state: every key of the range at one pinned revision.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::sleep;
use tonic::Code;
use tracing::debug;

use super::{DEADLINE, End, Feed, decode::Page};
use crate::{
    aside,
    proto::{
        etcdserverpb::{RangeRequest, ResponseHeader},
        paths,
    },
    rules::successor,
    status::Status,
    store::{Record, Revision, Tree},
    upstream::{Link, Sizing, TooLarge, is_refusal_of_size},
};

/// Pages weigh much, because etcd walks the whole range for each. The first has few keys, since nothing is known of them, and the
/// largest not so many that heavier ones behind light ones would be more than etcd can send.
pub(super) const PAGES: Sizing = Sizing { first: 100, largest: 32_000, bytes: 16 << 20 };
/// More than any single key can weigh, and all that is read at a time.
const HEAVIEST_PAGE: usize = 256 << 20;
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
        aside::walk(records.len() as u64, || {
            for record in records {
                self.bytes += record.memory();
                self.tree.insert(record);
            }
        });
        self.bytes <= self.limit
    }
}

impl Feed {
    /// Lists the range at `revision`, or at the present when that is zero.
    pub(super) async fn list(&mut self, link: &Link, revision: Revision) -> Result<Listed, End> {
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

    pub(super) fn list_request(&self, revision: Revision) -> RangeRequest {
        let range = &self.settings.range;
        let (key, range_end) = (range.request_key(), range.request_end());
        RangeRequest { key, range_end, revision: revision.0, ..Default::default() }
    }

    async fn list_by_stream(
        &mut self,
        link: &Link,
        mut revision: Revision,
        mut filling: Filling,
    ) -> Result<Listed, End> {
        let (sender, mut chunks) = link.open_stream(paths::RANGE_STREAM, &[])?;
        sender.send(&self.list_request(revision)).await?;
        sender.finish();
        let pinned = revision > Revision::ZERO;
        while let Some(chunk) = tokio::time::timeout(PAGE_DEADLINE, chunks.next()).await.map_err(|_| silent())? {
            let page = Page::decode_chunk(&chunk?)?;
            if !pinned {
                revision = page.header.map_or(revision, |header| Revision(header.revision));
            }
            if !filling.take(page.records) {
                return self.too_large(link, &filling.tree).await;
            }
        }
        if revision == Revision::ZERO {
            return Err(End::Unreadable("a list without a header".into()));
        }
        Ok(Listed { revision, tree: Some(filling.tree) })
    }

    async fn list_by_pages(
        &mut self,
        link: &Link,
        mut revision: Revision,
        mut filling: Filling,
    ) -> Result<Listed, End> {
        let mut request = self.list_request(revision);
        self.page_size.begin();
        loop {
            request.limit = self.page_size.keys();
            let Some(message) = self.ask_for_page(link, &request).await? else { continue };
            let page = Page::decode(&message)?;
            if revision == Revision::ZERO {
                revision = page.header.map_or(revision, |header| Revision(header.revision));
                request.revision = revision.0;
            }
            let last = page.records.last().map(|record| successor(record.key()));
            self.page_size.weighed(page.records.len() as i64, message.len());
            if !filling.take(page.records) {
                return self.too_large(link, &filling.tree).await;
            }
            match last.filter(|_| page.more) {
                Some(next) => request.key = next,
                None => break,
            }
        }
        self.page_size.finished();
        Ok(Listed { revision, tree: Some(filling.tree) })
    }

    /// One page; none when it is too large, and a smaller one is to be asked for.
    async fn ask_for_page(&mut self, link: &Link, request: &RangeRequest) -> Result<Option<Bytes>, End> {
        let can_shrink = request.limit > 1;
        let most = if can_shrink { HEAVIEST_PAGE } else { usize::MAX };
        match link.unary_up_to(paths::RANGE, request, PAGE_DEADLINE, most).await {
            Ok(Ok(message)) => return Ok(Some(message)),
            Ok(Err(TooLarge { announced })) => self.page_size.weighed(request.limit, announced),
            Err(status) if can_shrink && is_refusal_of_size(&status) => self.page_size.refused(request.limit),
            Err(status) => {
                if matches!(status.code, Code::DeadlineExceeded | Code::Unavailable) {
                    self.page_size.failed();
                }
                return Err(status.into());
            }
        }
        debug!(endpoint = self.upstream.name(link.at()), keys = request.limit, "a page is too large");
        Ok(None)
    }

    /// The keyspace is over the limit, with the keys of `tree` alone: only where the history begins is needed.
    async fn too_large(&mut self, link: &Link, tree: &Tree) -> Result<Listed, End> {
        self.too_many = tree.len();
        let header = examine(link).await?;
        Ok(Listed { revision: Revision(header.revision), tree: None })
    }
}

/// How many keys a list by `request` would have.
pub(super) async fn count(link: &Link, request: RangeRequest) -> Result<u64, End> {
    let request = RangeRequest { count_only: true, ..request };
    let message = link.unary_raw(paths::RANGE, &request, PAGE_DEADLINE).await?;
    Ok(Page::decode(&message)?.count)
}

/// Asks, through consensus, who answers and how far the cluster has got. A question that a change of the leader has overtaken is
/// asked again: the connection is sound, and over another one, relays that began before could not be joined.
pub(super) async fn examine(link: &Link) -> Result<ResponseHeader, End> {
    let question = RangeRequest { key: Bytes::from_static(&[0]), count_only: true, ..Default::default() };
    let mut repeats = 0..MOST_REPEATS;
    let message = loop {
        match link.unary_raw(paths::RANGE, &question, DEADLINE).await {
            Err(status) if status == Status::LEADER_CHANGED && repeats.next().is_some() => sleep(BEFORE_REPEAT).await,
            answer => break answer?,
        }
    };
    Page::decode(&message)?.header.ok_or_else(|| End::Unreadable("an answer without a header".into()))
}

fn silent() -> End {
    End::Failed(Status::TIMEOUT)
}
