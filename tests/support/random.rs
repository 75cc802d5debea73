//! Random requests that mix every option: ordinary ones, edge cases and nonsense, over a small and nasty set of keys.

use std::env;

use bytes::Bytes;
use millpond::proto::etcdserverpb::{
    self as pb, compare::TargetUnion, range_request::SortTarget, request_op::Request as Op,
};
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};

use super::{client::prefix_end, operation::Operation};

/// How many requests a test sends: `MILLPOND_TEST_OPERATIONS`, or `usual`.
pub fn operations(usual: usize) -> usize {
    number("MILLPOND_TEST_OPERATIONS").map_or(usual, |count| count as usize)
}

/// `MILLPOND_TEST_SEED`, or a new one; printed, so that a failure can be repeated.
pub fn seed() -> u64 {
    let seed = number("MILLPOND_TEST_SEED").unwrap_or_else(|| rand::rng().random());
    println!("MILLPOND_TEST_SEED={seed}");
    seed
}

fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

/// What the generator must know of the store to choose interesting revisions.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounds {
    pub current: i64,
    pub compacted: i64,
}

/// Makes requests from a seed.
pub struct Generator {
    rng: StdRng,
    /// Enum values that no etcd knows. Old etcds die of some of them, so a test may switch them off.
    pub unknown_enums: bool,
}

impl Generator {
    pub fn new(seed: u64) -> Self {
        Self { rng: StdRng::seed_from_u64(seed), unknown_enums: true }
    }

    pub fn chance(&mut self, one_in: u32) -> bool {
        self.rng.random_ratio(1, one_in)
    }

    pub fn below(&mut self, end: usize) -> usize {
        self.rng.random_range(0..end)
    }

    pub fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from.choose(&mut self.rng).expect("there is something to pick from").clone()
    }

    /// Any operation on keys, reads and writes about evenly.
    pub fn kv(&mut self, bounds: Bounds) -> Operation {
        match self.below(100) {
            0..40 => Operation::Range(self.range(bounds)),
            40..50 => Operation::RangeStream(self.range(bounds)),
            50..76 => Operation::Put(self.put()),
            76..80 => Operation::Delete(self.delete()),
            80..97 => Operation::Txn(self.txn(bounds, 2)),
            97 => Operation::Txn(self.put_and_delete()),
            _ => Operation::Compact(self.compaction(bounds)),
        }
    }

    /// Any operation on leases.
    pub fn lease(&mut self) -> Operation {
        let id = self.lease_id();
        match self.below(6) {
            0 | 1 => Operation::Grant(pb::LeaseGrantRequest { id: id.max(1), ttl: self.ttl() }),
            2 => Operation::Revoke(pb::LeaseRevokeRequest { id }),
            3 => Operation::KeepAlive(pb::LeaseKeepAliveRequest { id }),
            4 => Operation::TimeToLive(pb::LeaseTimeToLiveRequest { id, keys: self.chance(2) }),
            _ => Operation::Leases(pb::LeaseLeasesRequest {}),
        }
    }

    fn ttl(&mut self) -> i64 {
        // Long enough that none expires while a test runs, but for the impossible ones.
        self.pick(&[600, 1000, 5000, 9_000_000_000, 9_000_000_001, i64::MAX])
    }

    /// One of few leases, so that most exist some of the time.
    fn lease_id(&mut self) -> i64 {
        self.pick(&[1, 2, 3, 4, 5, 77, i64::MAX, 0])
    }

    /// A key: of a small tree mostly, sometimes of bytes at the edges, rarely empty.
    pub fn key(&mut self) -> Bytes {
        match self.below(60) {
            0 => Bytes::new(),
            1..8 => {
                self.pick(&[&b"\0"[..], b"\0\0", b"a", b"a\0", b"a\xff", b"\xff", b"\xff\xff", b"b/"]).to_vec().into()
            }
            8..24 => format!("a/{}", self.below(12)).into(),
            _ => format!("b/{}/{}", self.below(3), self.below(10)).into(),
        }
    }

    /// A key and a range end of every kind: none, prefix, from-key, everything, two keys in either order, nonsense.
    pub fn span(&mut self) -> (Bytes, Bytes) {
        let key = self.key();
        let end = match self.below(20) {
            0..4 => Bytes::new(),
            4..7 => Bytes::from_static(b"\0"),
            7..10 => return (self.pick(&["a/", "b/", "b/1/", "a", "b"]).into(), self.prefix_end()),
            10..12 => return (Bytes::from_static(b"\0"), Bytes::from_static(b"\0")),
            12..14 => prefix_end(&key),
            14 => key.clone(),
            _ => self.key(),
        };
        (key, end)
    }

    fn prefix_end(&mut self) -> Bytes {
        self.pick(&["a0", "b0", "b/10", "b", "c"]).into()
    }

    pub fn range(&mut self, bounds: Bounds) -> pb::RangeRequest {
        let (key, range_end) = self.span();
        let mut request = pb::RangeRequest { key, range_end, serializable: self.chance(2), ..Default::default() };
        request.limit = self.pick(&[0, 0, 0, 0, 1, 2, 3, 10, 1000, -1, i64::MAX, i64::MIN]);
        if self.chance(4) {
            request.revision = self.revision(bounds);
        }
        if self.chance(3) {
            request.sort_order = self.below(3) as i32;
            request.sort_target = self.below(5) as i32;
        }
        if self.unknown_enums && self.chance(30) {
            request.sort_order = self.pick(&[3, -1, i32::MAX, request.sort_order]);
            request.sort_target = self.pick(&[5, -1, i32::MIN, request.sort_target]);
        }
        request.keys_only = self.chance(5);
        request.count_only = self.chance(8);
        if self.chance(4) {
            self.revision_filters(&mut request, bounds);
        }
        request
    }

    fn revision_filters(&mut self, request: &mut pb::RangeRequest, bounds: Bounds) {
        let filters = [
            &mut request.min_mod_revision,
            &mut request.max_mod_revision,
            &mut request.min_create_revision,
            &mut request.max_create_revision,
        ];
        for filter in filters {
            if self.rng.random_bool(0.35) {
                *filter = self.revision(bounds);
            }
        }
    }

    /// A revision: past mostly, also current, compacted, future, and none at all.
    pub fn revision(&mut self, Bounds { current, compacted }: Bounds) -> i64 {
        match self.below(14) {
            0..9 => self.rng.random_range(compacted..=current),
            9 => current,
            10 => compacted,
            11 => self.rng.random_range(0..=compacted),
            12 => self.pick(&[current + 1, current + 1000, i64::MAX]),
            _ => self.pick(&[-1, i64::MIN, 0, 1]),
        }
    }

    pub fn value(&mut self) -> Bytes {
        match self.below(10) {
            0 => Bytes::new(),
            1..6 => format!("v{}", self.below(5)).into(),
            6..9 => format!("value {}", self.below(1_000_000)).into(),
            _ => {
                let (byte, length) = (self.below(256) as u8, self.below(3000));
                vec![byte; length].into()
            }
        }
    }

    pub fn put(&mut self) -> pb::PutRequest {
        let mut request =
            pb::PutRequest { key: self.key(), value: self.value(), prev_kv: self.chance(3), ..Default::default() };
        if self.chance(4) {
            request.lease = self.lease_id();
        }
        if self.chance(8) {
            request.ignore_value = true;
            if !self.chance(4) {
                request.value = Bytes::new();
            }
        }
        if self.chance(8) {
            request.ignore_lease = true;
            if !self.chance(4) {
                request.lease = 0;
            }
        }
        request
    }

    pub fn delete(&mut self) -> pb::DeleteRangeRequest {
        let (key, range_end) = if self.chance(12) { self.span() } else { (self.key(), Bytes::new()) };
        pb::DeleteRangeRequest { key, range_end, prev_kv: self.chance(2) }
    }

    /// A deletion that has an end. With one that has none, etcd lets a transaction put a key after it deleted it, and a
    /// compaction at just that revision takes the key's only record, of which etcd dies at the next read.
    fn bounded_delete(&mut self) -> pb::DeleteRangeRequest {
        let mut request = self.delete();
        if request.range_end == b"\0"[..] {
            request.range_end = Bytes::new();
        }
        request
    }

    fn compaction(&mut self, bounds: Bounds) -> pb::CompactionRequest {
        let revision = match self.below(4) {
            0 => self.revision(bounds),
            _ => self.rng.random_range(bounds.compacted..=bounds.current),
        };
        pb::CompactionRequest { revision, physical: self.chance(2) }
    }

    /// A transaction, nested at most `depth` deep. One that puts a key without its value or lease after it deleted that key
    /// makes etcd itself crash, so deletions and such puts do not come together.
    pub fn txn(&mut self, bounds: Bounds, depth: usize) -> pb::TxnRequest {
        let mut txn = self.nested_txn(bounds, depth);
        if deletes(&txn) {
            spell_out(&mut txn);
        }
        txn
    }

    /// A transaction that deletes again some of what it puts. Etcd refuses to touch a key twice, but does not notice it in a
    /// deletion of everything from a key on.
    pub fn put_and_delete(&mut self) -> pb::TxnRequest {
        let put = |key: String, value| pb::PutRequest { key: key.into(), value, ..Default::default() };
        let mut requests: Vec<_> =
            (0..3).map(|at| Op::RequestPut(put(format!("b/2/{}", 3 * at + self.below(3)), self.value()))).collect();
        let (key, prev_kv) = (format!("b/2/{}", self.below(10)).into(), self.chance(2));
        requests.push(Op::RequestDeleteRange(pb::DeleteRangeRequest { key, range_end: b"\0"[..].into(), prev_kv }));
        let success = requests.into_iter().map(|request| pb::RequestOp { request: Some(request) }).collect();
        pb::TxnRequest { success, ..Default::default() }
    }

    fn nested_txn(&mut self, bounds: Bounds, depth: usize) -> pb::TxnRequest {
        let compares = self.below(4);
        pb::TxnRequest {
            compare: (0..compares).map(|_| self.compare(bounds)).collect(),
            success: self.ops(bounds, depth),
            failure: self.ops(bounds, depth),
        }
    }

    fn ops(&mut self, bounds: Bounds, depth: usize) -> Vec<pb::RequestOp> {
        let count = if self.chance(60) { self.pick(&[128, 129, 200]) } else { self.below(4) };
        let reads_only = self.chance(3);
        (0..count).map(|_| self.op(bounds, depth, reads_only)).collect()
    }

    fn op(&mut self, bounds: Bounds, depth: usize, reads_only: bool) -> pb::RequestOp {
        let request = match self.below(if reads_only { 4 } else { 12 }) {
            0..4 => Some(Op::RequestRange(self.range(bounds))),
            4..9 => Some(Op::RequestPut(self.put())),
            9 => Some(Op::RequestDeleteRange(self.bounded_delete())),
            10 if depth > 0 => Some(Op::RequestTxn(self.nested_txn(bounds, depth - 1))),
            _ => Some(Op::RequestPut(self.put())),
        };
        pb::RequestOp { request }
    }

    fn compare(&mut self, bounds: Bounds) -> pb::Compare {
        let (key, range_end) = if self.chance(3) { self.span() } else { (self.key(), Bytes::new()) };
        let target = self.below(5);
        let number = if self.chance(2) { self.below(4) as i64 } else { self.revision(bounds) };
        // The union may disagree with the target, and then etcd compares with zero.
        let union = if self.chance(12) { self.below(6) } else { target };
        let target_union = match union {
            0 => Some(TargetUnion::Version(number)),
            1 => Some(TargetUnion::CreateRevision(number)),
            2 => Some(TargetUnion::ModRevision(number)),
            3 => Some(TargetUnion::Value(self.value())),
            4 => Some(TargetUnion::Lease(self.lease_id())),
            _ => None,
        };
        let mut compare =
            pb::Compare { result: self.below(4) as i32, target: target as i32, key, range_end, target_union };
        if self.unknown_enums && self.chance(40) {
            compare.result = self.pick(&[4, -1, compare.result]);
            compare.target = self.pick(&[5, -1, compare.target]);
        }
        compare
    }
}

/// Whether a request sorts by something in which records can tie.
pub fn can_tie(request: &pb::RangeRequest) -> bool {
    SortTarget::try_from(request.sort_target).is_ok_and(|target| target != SortTarget::Key)
}

/// Whether a transaction may delete something.
fn deletes(txn: &pb::TxnRequest) -> bool {
    txn.success.iter().chain(&txn.failure).any(|op| match &op.request {
        Some(Op::RequestDeleteRange(_)) => true,
        Some(Op::RequestTxn(inner)) => deletes(inner),
        _ => false,
    })
}

/// Lets every put of a transaction say its value and lease itself.
fn spell_out(txn: &mut pb::TxnRequest) {
    for op in txn.success.iter_mut().chain(&mut txn.failure) {
        match &mut op.request {
            Some(Op::RequestPut(put)) => (put.ignore_value, put.ignore_lease) = (false, false),
            Some(Op::RequestTxn(inner)) => spell_out(inner),
            _ => {}
        }
    }
}
