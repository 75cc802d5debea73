//! What the load asks for: keys, values, and the requests of each shape, encoded ahead of the run.

use bytes::Bytes;
use rand::RngExt;

use super::messages::{Field, Fields};
use crate::{
    grpc,
    proto::etcdserverpb::{
        Compare, PutRequest, RangeRequest, RequestOp, TxnRequest,
        compare::{CompareResult, CompareTarget, TargetUnion},
        request_op::Request,
    },
};

/// Different requests encoded ahead for one connection.
const VARIANTS: usize = 512;

/// The keys of a run: `PREFIX` and eight digits, from 0 on.
#[derive(Clone, Debug)]
pub struct Keys {
    /// What they begin with.
    pub prefix: String,
    /// How many there are, at least one.
    pub count: u64,
}

impl Keys {
    /// The key of that number.
    pub fn key(&self, number: u64) -> Bytes {
        Bytes::from(format!("{}{number:08}", self.prefix))
    }

    /// The number of the key that is written in that turn. Keys are not created in the order of their names, and where they
    /// are, what an index refers to lies in memory as if it had been sorted.
    pub fn shuffled(&self, turn: u64) -> u64 {
        /// A prime above every count, hence without a common divisor, and near the golden section of 2^64.
        const STEP: u64 = 11_400_714_819_323_198_549;
        (u128::from(turn) * u128::from(STEP) % u128::from(self.count.max(1))) as u64
    }

    /// Any key.
    pub fn random(&self) -> Bytes {
        self.key(rand::rng().random_range(0..self.count.max(1)))
    }

    /// The end of the range that holds them all.
    pub fn end(&self) -> Bytes {
        let mut end = self.prefix.clone().into_bytes();
        while let Some(last) = end.pop() {
            if last < 0xff {
                end.push(last + 1);
                return Bytes::from(end);
            }
        }
        Bytes::from_static(b"\0")
    }
}

/// The shape of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Shape {
    /// One key, another each time
    Key,
    /// A page of --limit keys, from another key each time
    Page,
    /// All keys with their values
    All,
    /// The number of keys
    Count,
    /// All keys without their values
    Keys,
}

/// Range requests of one shape. `limit` is the size of a page.
pub fn reads(shape: Shape, keys: &Keys, limit: i64, linearizable: bool) -> Vec<RangeRequest> {
    let variants = if matches!(shape, Shape::Key | Shape::Page) { VARIANTS } else { 1 };
    let one = || {
        let all = RangeRequest {
            key: Bytes::from(keys.prefix.clone()),
            range_end: keys.end(),
            serializable: !linearizable,
            ..Default::default()
        };
        match shape {
            Shape::Key => RangeRequest { key: keys.random(), range_end: Bytes::new(), ..all },
            Shape::Page => RangeRequest { key: page_start(keys, limit), limit, ..all },
            Shape::All => all,
            Shape::Count => RangeRequest { count_only: true, ..all },
            Shape::Keys => RangeRequest { keys_only: true, ..all },
        }
    };
    std::iter::repeat_with(one).take(variants).collect()
}

/// A key after which a whole page is left.
fn page_start(keys: &Keys, limit: i64) -> Bytes {
    let last = keys.count.saturating_sub(limit.unsigned_abs());
    keys.key(rand::rng().random_range(0..=last))
}

/// Writes of random keys.
pub fn writes(keys: &Keys, value_size: usize) -> Vec<PutRequest> {
    let value = value(value_size);
    let put = || PutRequest { key: keys.random(), value: value.clone(), ..Default::default() };
    std::iter::repeat_with(put).take(VARIANTS).collect()
}

/// Bytes that do not compress.
pub fn value(size: usize) -> Bytes {
    let mut value = vec![0; size];
    rand::rng().fill(&mut value[..]);
    Bytes::from(value)
}

/// What one connection asks. A slot is a place for one call in flight.
pub trait Source: Send {
    /// The next request of that slot, gRPC-framed.
    fn request(&mut self, slot: usize) -> Bytes;

    /// Whether [`answer`](Self::answer) is to be called.
    fn wants_answers(&self) -> bool {
        false
    }

    /// The message that answered that slot's request.
    fn answer(&mut self, _slot: usize, _message: &[u8]) {}
}

/// Requests encoded ahead, picked at random.
pub struct Ready(Vec<Bytes>);

impl Ready {
    /// Encodes them. There must be at least one.
    pub fn new(requests: &[impl prost::Message]) -> Self {
        Self(requests.iter().map(grpc::frame).collect())
    }
}

impl Source for Ready {
    fn request(&mut self, _slot: usize) -> Bytes {
        match self.0.as_slice() {
            [] => Bytes::new(),
            [only] => only.clone(),
            many => many[rand::rng().random_range(0..many.len())].clone(),
        }
    }
}

/// Kubernetes' guarded update: put if the key's revision is still the one known, else get. Each slot owns a key, so it
/// succeeds from the second try on.
pub struct GuardedUpdates {
    keys: Vec<(Bytes, i64)>,
    value: Bytes,
}

impl GuardedUpdates {
    /// `connection` numbers the connection, so that no two share keys.
    pub fn new(prefix: &str, connection: usize, in_flight: usize, value_size: usize) -> Self {
        let key = |slot| (Bytes::from(format!("{prefix}guarded/{connection:06}/{slot:06}")), 0);
        Self { keys: (0..in_flight).map(key).collect(), value: value(value_size) }
    }

    fn update(key: Bytes, revision: i64, value: Bytes) -> TxnRequest {
        let compare = Compare {
            result: CompareResult::Equal.into(),
            target: CompareTarget::Mod.into(),
            key: key.clone(),
            target_union: Some(TargetUnion::ModRevision(revision)),
            ..Default::default()
        };
        let put = PutRequest { key: key.clone(), value, ..Default::default() };
        let get = RangeRequest { key, ..Default::default() };
        TxnRequest {
            compare: vec![compare],
            success: vec![RequestOp { request: Some(Request::RequestPut(put)) }],
            failure: vec![RequestOp { request: Some(Request::RequestRange(get)) }],
        }
    }
}

impl Source for GuardedUpdates {
    fn request(&mut self, slot: usize) -> Bytes {
        let (key, revision) = self.keys.get(slot).cloned().unwrap_or_default();
        grpc::frame(&Self::update(key, revision, self.value.clone()))
    }

    fn wants_answers(&self) -> bool {
        true
    }

    fn answer(&mut self, slot: usize, message: &[u8]) {
        if let (Some((_, known)), Some(revision)) = (self.keys.get_mut(slot), revision_after(message)) {
            *known = revision;
        }
    }
}

/// The key's revision as a TxnResponse tells it: the header's when the put was done, else that of the record that was got.
fn revision_after(message: &[u8]) -> Option<i64> {
    let succeeded = Fields(message).any(|field| field == (2, Field::Number(1)));
    let path: &[u64] = if succeeded { &[1, 3] } else { &[3, 1, 2, 3] };
    number_at(message, path)
}

/// The number that a path of field numbers leads to; of repeated fields the first.
fn number_at(message: &[u8], path: &[u64]) -> Option<i64> {
    let (first, rest) = path.split_first()?;
    Fields(message).find(|(number, _)| number == first).and_then(|(_, field)| match field {
        Field::Number(number) if rest.is_empty() => Some(number as i64),
        Field::Bytes(nested) => number_at(nested, rest),
        Field::Number(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::proto::{
        etcdserverpb::{RangeResponse, ResponseHeader, ResponseOp, TxnResponse, response_op::Response},
        mvccpb::KeyValue,
    };

    #[test]
    fn pages_start_where_a_whole_page_is_left() {
        let keys = Keys { prefix: "/b/".into(), count: 1000 };
        for request in reads(Shape::Page, &keys, 900, false) {
            assert!(request.key >= keys.key(0) && request.key <= keys.key(100) && request.range_end == "/b0");
        }
    }

    #[test]
    fn a_guarded_update_learns_the_revision_either_way() {
        let header = Some(ResponseHeader { revision: 9, ..Default::default() });
        let done = TxnResponse { header, succeeded: true, ..Default::default() };
        assert_eq!(revision_after(&done.encode_to_vec()), Some(9));
        let kvs = vec![KeyValue { key: "k".into(), mod_revision: 4, ..Default::default() }];
        let got = Response::ResponseRange(RangeResponse { header, kvs, ..Default::default() });
        let other = TxnResponse { header, responses: vec![ResponseOp { response: Some(got) }], ..Default::default() };
        assert_eq!(revision_after(&other.encode_to_vec()), Some(4));
    }
}
