//! A request of any kind as a value, and its execution through a client.

use bytes::Bytes;
use millpond::proto::etcdserverpb as pb;
use tokio_stream::StreamExt;
use tonic::Code;

use super::client::Client;

/// One request.
#[derive(Clone, Debug)]
pub enum Operation {
    Range(pb::RangeRequest),
    RangeStream(pb::RangeRequest),
    Put(pb::PutRequest),
    Delete(pb::DeleteRangeRequest),
    Txn(pb::TxnRequest),
    Compact(pb::CompactionRequest),
    Grant(pb::LeaseGrantRequest),
    Revoke(pb::LeaseRevokeRequest),
    KeepAlive(pb::LeaseKeepAliveRequest),
    TimeToLive(pb::LeaseTimeToLiveRequest),
    Leases(pb::LeaseLeasesRequest),
}

/// What came back when it was no error.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    Range(pb::RangeResponse),
    Put(pb::PutResponse),
    Delete(pb::DeleteRangeResponse),
    Txn(pb::TxnResponse),
    Compact(pb::CompactionResponse),
    Grant(pb::LeaseGrantResponse),
    Revoke(pb::LeaseRevokeResponse),
    KeepAlive(Option<pb::LeaseKeepAliveResponse>),
    TimeToLive(pb::LeaseTimeToLiveResponse),
    Leases(pb::LeaseLeasesResponse),
}

/// An error as a client sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub code: Code,
    pub text: String,
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        Self { code: status.code(), text: status.message().to_owned() }
    }
}

impl From<millpond::status::Status> for Failure {
    fn from(status: millpond::status::Status) -> Self {
        Self { code: status.code, text: status.message.into_owned() }
    }
}

pub type Outcome = Result<Answer, Failure>;

impl Answer {
    pub fn header(&self) -> Option<&pb::ResponseHeader> {
        match self {
            Self::Range(answer) => answer.header.as_ref(),
            Self::Put(answer) => answer.header.as_ref(),
            Self::Delete(answer) => answer.header.as_ref(),
            Self::Txn(answer) => answer.header.as_ref(),
            Self::Compact(answer) => answer.header.as_ref(),
            Self::Grant(answer) => answer.header.as_ref(),
            Self::Revoke(answer) => answer.header.as_ref(),
            Self::KeepAlive(answer) => answer.as_ref().and_then(|answer| answer.header.as_ref()),
            Self::TimeToLive(answer) => answer.header.as_ref(),
            Self::Leases(answer) => answer.header.as_ref(),
        }
    }
}

/// Sends the request and waits for the whole answer.
pub async fn execute(client: &Client, operation: &Operation) -> Outcome {
    let Client { mut kv, mut lease, .. } = client.clone();
    let answer = match operation.clone() {
        Operation::Range(request) => Answer::Range(kv.range(request).await?.into_inner()),
        Operation::RangeStream(request) => Answer::Range(range_stream(client, request).await?),
        Operation::Put(request) => Answer::Put(kv.put(request).await?.into_inner()),
        Operation::Delete(request) => Answer::Delete(kv.delete_range(request).await?.into_inner()),
        Operation::Txn(request) => Answer::Txn(kv.txn(request).await?.into_inner()),
        Operation::Compact(request) => Answer::Compact(kv.compact(request).await?.into_inner()),
        Operation::Grant(request) => Answer::Grant(lease.lease_grant(request).await?.into_inner()),
        Operation::Revoke(request) => Answer::Revoke(lease.lease_revoke(request).await?.into_inner()),
        Operation::KeepAlive(request) => {
            let mut answers = lease.lease_keep_alive(tokio_stream::once(request)).await?.into_inner();
            Answer::KeepAlive(answers.next().await.transpose()?)
        }
        Operation::TimeToLive(request) => Answer::TimeToLive(lease.lease_time_to_live(request).await?.into_inner()),
        Operation::Leases(request) => Answer::Leases(lease.lease_leases(request).await?.into_inner()),
    };
    Ok(answer)
}

/// The chunks of a RangeStream put together, after a check of their form: header, `more` and `count` come last and once.
async fn range_stream(client: &Client, request: pb::RangeRequest) -> Result<pb::RangeResponse, tonic::Status> {
    let mut chunks = client.kv.clone().range_stream(request).await?.into_inner();
    let mut whole = pb::RangeResponse::default();
    while let Some(chunk) = chunks.message().await? {
        let part = chunk.range_response.expect("every chunk carries a part of the range");
        assert!(whole.header.is_none(), "a chunk follows the one with the header");
        if part.header.is_none() {
            assert!(
                !part.more && part.count == 0 && !part.kvs.is_empty(),
                "an early chunk holds nothing but keys: {part:?}"
            );
        }
        whole.kvs.extend(part.kvs);
        (whole.header, whole.more, whole.count) = (part.header, part.more, part.count);
    }
    assert!(whole.header.is_some(), "the last chunk carries the header");
    Ok(whole)
}

/// A range over everything from `key` to `end`.
pub fn range(key: impl Into<Bytes>, end: impl Into<Bytes>) -> pb::RangeRequest {
    pb::RangeRequest { key: key.into(), range_end: end.into(), ..Default::default() }
}
