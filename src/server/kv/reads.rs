//! Range: checked as etcd checks it, answered from the view, or forwarded.

use ::http::{HeaderValue, Response};
use futures_util::FutureExt;
use prost::Message;

use super::{Answered, Call, Evidence, Kv, answer, unless_memory_can, unserved};
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
        let Ok(request) = RangeRequest::decode(call.message.clone()) else {
            return Ok(Box::pin(self.forward_unread(call)).await);
        };
        validate::range(&request)?;
        let range = range_of(&request);
        let answered = match self.view(&range, request.revision, request.serializable).await {
            Ok(view) => self.answer_range(&view, &range, &request),
            Err(why) => unserved(why),
        };
        match answered {
            Ok(answer) => {
                let answer = answer?;
                self.hot.inc();
                Ok(answer)
            }
            Err(why) => {
                self.metrics.count("Range", why);
                Box::pin(self.range_elsewhere(call, range, request)).await
            }
        }
    }

    /// No `async fn` around the view: every call, of whatever service, has room for the future of this one.
    fn answer_range(&self, view: &View, range: &KeyRange, request: &RangeRequest) -> Answered {
        match self.evaluate(view, range, request) {
            Ok(Some(selection)) => {
                let answer = answer::range(&self.holder, view, selection, self.values(request), self.longest());
                Ok(answer.map(|answer| self.with_age(range, answer)))
            }
            Ok(None) => Err("revision_not_in_memory"),
            Err(refusal) => Ok(Err(refusal)),
        }
    }

    async fn range_elsewhere(
        &self,
        call: Call<'_>,
        range: KeyRange,
        request: RangeRequest,
    ) -> Result<Response<Body>, Status> {
        let read = async || match self.view(&range, request.revision, request.serializable).await {
            Ok(view) => self.answer_range(&view, &range, &request),
            Err(why) => unserved(why),
        };
        unless_memory_can(self.forward_range(call, &request), || read().boxed()).await
    }

    async fn forward_range(&self, call: Call<'_>, request: &RangeRequest) -> Response<Body> {
        match request.serializable {
            true => {
                let ask = || RangeRequest { serializable: false, ..request.clone() }.encode_to_vec();
                self.forward_hearsay(call, ask).await
            }
            false => self.forward(call, Evidence::Proof).await,
        }
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

    /// The answer, which says how old it may be while the upstream is gone.
    pub(super) fn with_age(&self, range: &KeyRange, mut answer: Response<Body>) -> Response<Body> {
        if let Some(age) = self.age(range) {
            answer.headers_mut().insert(AGE, HeaderValue::from(age.as_millis() as u64));
        }
        answer
    }
}
