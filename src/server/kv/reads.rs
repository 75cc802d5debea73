//! Range: checked as etcd checks it, answered from the view, or forwarded.

use ::http::{HeaderValue, Response};
use prost::Message;

use super::{Call, Evidence, Kv, answer, decode, forwardable};
use crate::{
    aside,
    proto::etcdserverpb::RangeRequest,
    rules::{
        KeyRange,
        range::{is_by_value, range_of},
        validate,
    },
    server::body::Body,
    status::Status,
    store::{
        View,
        range::{RangeError, Selection, select, walked},
    },
    upstream::Version,
};

/// For how many milliseconds the upstream has been gone when an answer was given without it.
const AGE: &str = "millpond-age-ms";
/// From this version on, keys-only answers have no lease.
const LEASELESS: Version = Version::new(3, 7, 0);

impl Kv {
    pub(super) async fn range(&self, call: Call<'_>) -> Result<Response<Body>, Status> {
        let request: RangeRequest = decode(&call.message)?;
        validate::range(&request)?;
        let range = range_of(&request);
        let unserved = match self.view(&range, request.revision, request.serializable).await {
            Ok(view) => match self.evaluate(&view, &range, &request)? {
                Some(selection) => {
                    let values = self.values(&request);
                    let mut response = answer::range(&self.holder, &view, selection, values, self.longest())?;
                    self.hot.inc();
                    self.tell_age(&range, &mut response);
                    return Ok(response);
                }
                None => "revision_not_in_memory",
            },
            Err(unserved) => forwardable(unserved)?,
        };
        self.metrics.count("Range", unserved);
        Ok(match request.serializable {
            true => {
                let ask = || RangeRequest { serializable: false, ..request }.encode_to_vec();
                Box::pin(self.forward_hearsay(call, ask)).await
            }
            false => Box::pin(self.forward(call, Evidence::Proof)).await,
        })
    }

    /// What the request selects from the view. None: only the upstream can tell, be it because the revision is older than
    /// our history, or because it seems to lie in the future.
    pub(super) fn evaluate(
        &self,
        view: &View,
        range: &KeyRange,
        request: &RangeRequest,
    ) -> Result<Option<Selection>, Status> {
        match aside::walk(walked(view, range, request), || select(view, range, request)) {
            Ok(selection) => Ok(Some(selection)),
            Err(RangeError::Compacted) => Err(Status::COMPACTED),
            Err(RangeError::Future | RangeError::NotInMemory) => Ok(None),
        }
    }

    /// Whether the answer has values. As in etcd, sorting by value keeps the lease.
    pub(super) fn values(&self, request: &RangeRequest) -> answer::Values {
        match request.keys_only {
            false => answer::Values::Sent,
            true if is_by_value(request) || self.cache.gate().lowest < LEASELESS => answer::Values::LeftOut,
            true => answer::Values::LeftOutWithLease,
        }
    }

    /// Says how old the answer may be while the upstream is gone.
    pub(super) fn tell_age(&self, range: &KeyRange, response: &mut Response<Body>) {
        if let Some(age) = self.age(range) {
            response.headers_mut().insert(AGE, HeaderValue::from(age.as_millis() as u64));
        }
    }
}
