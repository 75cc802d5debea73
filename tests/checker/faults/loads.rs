//! What is done to the keys: compactions, also past where a feed has stopped, and a lot at once.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use millpond::proto::etcdserverpb::{
    DeleteRangeRequest, LeaseGrantRequest, PutRequest, RequestOp, TxnRequest, request_op::Request,
};
use tokio::time::timeout;

use super::servers::Director;
use crate::support::fault::Faults;

/// For each request; the etcd is up and its link whole.
const PATIENCE: Duration = Duration::from_secs(5);

impl Director {
    /// Never ahead of the recorder.
    pub(super) async fn compact(&mut self) {
        let back = self.random.pick(&[0, 0, 10, 100, 500]);
        self.compact_to(self.recorder.position() - back).await;
    }

    async fn compact_to(&mut self, revision: i64) {
        if revision <= self.context.bounds().compacted {
            return;
        }
        self.log.note(format!("compaction: to {revision}"));
        self.context.timeline.compacting(revision);
        // An error is an etcd that is just starting, or another compaction that went further.
        if let Ok(Ok(())) = timeout(PATIENCE, self.client().compact(revision)).await {
            self.context.timeline.compacted(revision);
        }
        self.context.note_compacted(revision);
    }

    /// Holds a Millpond back until what it has not seen is compacted away.
    pub(super) async fn compact_past_a_feed(&mut self) {
        let number = self.random.below(self.world.links.len());
        let link = Arc::clone(&self.world.links[number]);
        let _busy = link.busy.lock().await;
        self.log.note(format!("compaction past the feed: of millpond {number}"));
        link.set(&Faults { refuse: true, ..Faults::black_hole() });
        let pause = 300 + self.random.below(1000) as u64;
        self.wait(pause).await;
        self.compact_to(self.recorder.position()).await;
        link.reset();
        // What the link still holds must be gone before it is whole again.
        self.wait(50).await;
        link.heal();
    }

    pub(super) async fn expire_leases(&mut self) {
        let count = 20 + self.random.below(200);
        self.log.note(format!("leases expire: {count}"));
        let client = self.client();
        for number in 0..count {
            let mut lease = client.lease.clone();
            let granted = timeout(PATIENCE, lease.lease_grant(LeaseGrantRequest { id: 0, ttl: 1 })).await;
            let Ok(Ok(granted)) = granted else { return };
            let request = PutRequest {
                key: format!("b/8/{number:04}").into(),
                value: Bytes::from_static(b"until the lease expires"),
                lease: granted.into_inner().id,
                ..Default::default()
            };
            let _ = timeout(PATIENCE, client.kv.clone().put(request)).await;
        }
    }

    pub(super) async fn delete_many(&mut self) {
        self.log.note("many deleted: 1000 keys in one revision");
        let client = self.client();
        for part in 0..8 {
            let put = |number| {
                let key = format!("a/many/{part}/{number:03}").into();
                let request = PutRequest { key, value: Bytes::from_static(b"one of many"), ..Default::default() };
                RequestOp { request: Some(Request::RequestPut(request)) }
            };
            let txn = TxnRequest { success: (0..125).map(put).collect(), ..Default::default() };
            let _ = timeout(PATIENCE, client.kv.clone().txn(txn)).await;
        }
        let all = DeleteRangeRequest { key: "a/many/".into(), range_end: "a/many0".into(), prev_kv: false };
        let _ = timeout(PATIENCE, client.kv.clone().delete_range(all)).await;
    }

    pub(super) async fn put_large(&mut self) {
        self.log.note("large value: 1.4 MB, for a while");
        let client = self.client();
        let _ = timeout(PATIENCE, client.put("b/large", vec![b'l'; 1_400_000])).await;
        self.wait(100).await;
        let _ = timeout(PATIENCE, client.delete("b/large")).await;
    }
}
