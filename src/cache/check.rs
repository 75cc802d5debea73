//! Is the cache what the upstream has? Keys and mod revisions at one revision, page by page, without haste.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use arc_swap::Guard;
use rand::RngExt;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use tracing::{error, info, warn};

use super::{Cache, Prefix, Shared, Unserved};
use crate::{
    proto::{
        etcdserverpb::{RangeRequest, RangeResponse},
        mvccpb::KeyValue,
        paths,
    },
    rules::{KeyRange, successor},
    status::Status,
    store::{Record, View},
};

/// Keys in a page.
const PAGE: i64 = 5_000;
const DEADLINE: Duration = Duration::from_secs(30);
/// Differing keys that are named.
const NAMED: usize = 10;
/// Times that a check is begun again because its revision was compacted under it.
const TRIES: usize = 3;

/// What a consistency check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// The revision at which both sides were compared; of the last prefix, if there are several.
    pub revision: i64,
    /// Keys compared.
    pub keys: u64,
    /// The first keys that differ, as text. Empty: both sides are the same.
    pub differing: Vec<String>,
}

/// Why a check could not be run to its end.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CheckError {
    /// There is nothing to compare.
    #[error("nothing to check: {0}")]
    Unserved(#[from] Unserved),
    /// The upstream does not answer.
    #[error("the upstream did not answer: {0}")]
    Upstream(#[from] Status),
    /// No endpoint is reachable.
    #[error("no endpoint of the upstream is reachable")]
    Unreachable,
}

impl Cache {
    /// Compares every prefix with the upstream. A prefix that differs is not served from until it has been rebuilt.
    ///
    /// # Errors
    /// When the comparison cannot be made.
    pub async fn check(&self) -> Result<CheckReport, CheckError> {
        let mut report = CheckReport::default();
        for prefix in self.prefixes() {
            let outcome = self.check_prefix(prefix).await;
            let result = match &outcome {
                Ok(found) if found.differing.is_empty() => "same",
                Ok(_) => "different",
                Err(_) => "failed",
            };
            self.0.metrics.checks.with_label_values(&[result]).inc();
            let found = outcome?;
            report.revision = found.revision;
            report.keys += found.keys;
            report.differing.extend(found.differing);
        }
        Ok(report)
    }

    async fn check_prefix(&self, prefix: &Prefix) -> Result<CheckReport, CheckError> {
        let mut tries = 0;
        let (view, differing, keys) = loop {
            let view = Guard::into_inner(self.provable(prefix)?);
            tries += 1;
            match self.compare(prefix.range(), &view).await {
                Ok((differing, keys)) => break (view, differing, keys),
                Err(CheckError::Upstream(status)) if status == Status::COMPACTED && tries < TRIES => {}
                Err(error) => return Err(error),
            }
        };
        if !differing.is_empty() {
            error!(revision = view.revision().0, ?differing, "the cache differs from the upstream: it is rebuilt");
            prefix.rebuild(view.position);
        }
        Ok(CheckReport { revision: view.revision().0, keys, differing })
    }

    /// The first differing keys, and how many keys the upstream has.
    async fn compare(&self, range: &KeyRange, view: &Arc<View>) -> Result<(Vec<String>, u64), CheckError> {
        let Some(tree) = &view.tree else { return Err(Unserved::OverLimit.into()) };
        let mut ours = tree.iter_from(b"").peekable();
        let mut differing = Vec::new();
        let mut keys = 0;
        let mut request = RangeRequest {
            key: range.request_key(),
            range_end: range.request_end(),
            revision: view.revision().0,
            limit: PAGE,
            keys_only: true,
            ..Default::default()
        };
        loop {
            let began = Instant::now();
            let page = self.page(&request).await?;
            keys += page.kvs.len() as u64;
            for theirs in &page.kvs {
                while let Some(extra) = ours.next_if(|ours| ours.key() < &theirs.key[..]) {
                    name(extra.key(), &mut differing);
                }
                let same = ours.next_if(|ours| ours.key() == &theirs.key[..]).is_some_and(|ours| agree(ours, theirs));
                if !same {
                    name(&theirs.key, &mut differing);
                }
            }
            match page.kvs.last().filter(|_| page.more) {
                Some(last) => request.key = successor(&last.key),
                None => break,
            }
            // As long a rest as the page took, so that a check costs the upstream half its time at most.
            sleep(began.elapsed()).await;
        }
        for extra in ours {
            name(extra.key(), &mut differing);
        }
        Ok((differing, keys))
    }

    async fn page(&self, request: &RangeRequest) -> Result<RangeResponse, CheckError> {
        let upstream = self.upstream();
        let at = upstream.preferred(&[]).ok_or(CheckError::Unreachable)?;
        Ok(upstream.unary(at, paths::RANGE, request, DEADLINE).await?)
    }
}

fn agree(ours: &Record, theirs: &KeyValue) -> bool {
    ours.mod_revision().0 == theirs.mod_revision
}

/// Notes a differing key, if there is room.
fn name(key: &[u8], differing: &mut Vec<String>) {
    if differing.len() < NAMED {
        differing.push(String::from_utf8_lossy(key).into_owned());
    }
}

/// Checks now and then, with jitter, for as long as the cache lives.
pub(super) async fn keep_checking(cache: Weak<Shared>, interval: Duration) {
    loop {
        let jitter = rand::rng().random_range(0.8..1.2);
        sleep(interval.mul_f64(jitter)).await;
        let Some(cache) = cache.upgrade().map(Cache) else { return };
        match cache.check().await {
            Ok(report) if report.differing.is_empty() => {
                info!(revision = report.revision, keys = report.keys, "the cache is the same as the upstream");
            }
            // Said already, with the keys.
            Ok(_) => {}
            Err(CheckError::Unserved(_)) => {}
            Err(error) => warn!(%error, "the cache could not be compared with the upstream"),
        }
    }
}
