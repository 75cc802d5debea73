//! How many keys follow a page, remembered from the page before it.
//!
//! A range's answer tells the number of keys in the whole range, so that a client which reads page by page would have the
//! store count the rest anew for every page. At one revision the rest never changes: it is what it was, less the page.

use std::collections::VecDeque;

use bytes::Bytes;
use parking_lot::Mutex;

use super::{
    backend::Reader,
    error::Fault,
    range::{self, Position},
};
use crate::{
    proto::etcdserverpb::{RangeRequest, RangeResponse},
    rules::{range::is_run, successor},
};

/// Pages that are remembered.
const KEPT: usize = 128;

/// The pages that are likely to be asked for next.
#[derive(Default)]
pub struct Counts(Mutex<VecDeque<Page>>);

/// The number of keys from `key` to `range_end` at `revision`.
#[derive(Clone, Debug)]
struct Page {
    revision: i64,
    key: Bytes,
    range_end: Bytes,
    count: i64,
}

impl Counts {
    /// Answers `request` as [`range::evaluate`] does, without counting what it knows.
    pub fn evaluate(
        &self,
        store: &mut dyn Reader,
        request: &RangeRequest,
        at: Position,
    ) -> Result<RangeResponse, Fault> {
        if !is_page(request) {
            return range::evaluate(store, request, at);
        }
        let revision = at.resolve(request.revision)?;
        let response = match self.take(revision, request) {
            Some(count) => RangeResponse { count, ..range::first(store, request, at)? },
            None => range::evaluate(store, request, at)?,
        };
        if let Some(last) = response.kvs.last().filter(|_| response.more) {
            let read = i64::try_from(response.kvs.len()).unwrap_or(i64::MAX);
            let (key, range_end) = (successor(&last.key), request.range_end.clone());
            self.keep(Page { revision, key, range_end, count: response.count.saturating_sub(read) });
        }
        Ok(response)
    }

    fn take(&self, revision: i64, request: &RangeRequest) -> Option<i64> {
        let pages = self.0.lock();
        let is_it =
            |page: &&Page| page.revision == revision && page.key == request.key && page.range_end == request.range_end;
        pages.iter().rev().find(is_it).map(|page| page.count)
    }

    fn keep(&self, page: Page) {
        let mut pages = self.0.lock();
        if pages.len() == KEPT {
            pages.pop_front();
        }
        pages.push_back(page);
    }
}

/// Whether a request is one for a page in the order of keys.
fn is_page(request: &RangeRequest) -> bool {
    request.limit > 0 && !request.count_only && is_run(request)
}
