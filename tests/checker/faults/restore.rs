//! The etcd is restored from a snapshot with the same flags and ids: another history takes the place of this one. It may have been
//! written in the same way.

use std::sync::Arc;

use millpond::proto::{
    etcdserverpb::{DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, request_op::Request},
    mvccpb::{Event, KeyValue, event::EventType},
};

use super::{
    super::{recorder::Recorder, world::Link},
    servers::Director,
};
use crate::support::fault::Faults;

/// By how much a restore raises the revision, when it does.
const BUMP: i64 = 5000;
const BUMP_FLAGS: [&str; 2] = ["--bump-revision=5000", "--mark-compacted"];

impl Director {
    /// Takes a snapshot, lets the history go on for a while, and goes back to the snapshot.
    pub(super) async fn restore(&mut self) {
        let name = format!("snapshot-{}.db", self.ended.len());
        let snapshot = self.world.cluster.save_snapshot(&name).await;
        let pause = self.random.below(1200) as u64;
        self.wait(pause).await;
        let bump = if self.random.chance(2) { BUMP } else { 0 };
        self.log.note(format!("restore: raised by {bump}"));
        let links: Vec<Arc<Link>> = self.world.links.iter().chain([&self.world.gate]).cloned().collect();
        let mut busy = Vec::new();
        for link in &links {
            busy.push(link.busy.lock().await);
        }
        self.context.timeline.close();
        links.iter().for_each(|link| link.cut_off());
        self.finish_history().await;
        let flags = if bump == 0 { &[][..] } else { &BUMP_FLAGS };
        self.world.cluster.restore(&snapshot, flags).await;
        self.begin_history(bump).await;
        links.iter().for_each(|link| link.heal());
    }

    /// Records the history to its end. Nobody is in touch with the etcd any more, and what had still been on the way to it
    /// dies with the process.
    async fn finish_history(&mut self) {
        self.world.cluster.kill(0);
        self.world.cluster.restart(0).await;
        let end = self.world.cluster.client(0).revision().await.expect("an etcd that nobody disturbs answers");
        self.recorder.until(end).await;
        self.recorder.stop();
        self.world.cluster.kill(0);
        self.ended.push(self.recorder.history());
    }

    async fn begin_history(&mut self, bump: i64) {
        let client = self.world.cluster.client(0);
        let present = client.revision().await.expect("an etcd that nobody disturbs answers");
        let shared = self.shared_revision(present - bump, bump).await;
        self.log.note(format!("restored: to revision {shared}, raised by {bump}"));
        let mut history = self.ended.last().expect("a history has just ended").truncated(shared);
        history.last = shared + bump;
        self.recorder = Recorder::start(self.world.cluster.endpoints(), history, shared + bump + 1);
        if bump == 0 && self.random.chance(2) {
            self.write_again(shared).await;
        }
        let present = client.revision().await.expect("an etcd that nobody disturbs answers");
        let compacted = if bump > 0 { shared + bump } else { self.context.bounds().compacted.min(shared) };
        self.context.restart_at(present, compacted);
        self.context.timeline.open(shared, compacted);
    }

    /// Whoever wrote what was lost after `shared` does so again before anybody else is in touch: the same keys at the same revisions, but
    /// other values. Ends at what one transaction does not take.
    async fn write_again(&self, shared: i64) {
        let client = self.world.cluster.client(0);
        let ended = self.ended.last().expect("a history has just ended");
        let mut written = 0;
        for (_, events) in ended.revisions().filter(|(revision, _)| **revision > shared) {
            let request = TxnRequest { success: events.iter().map(again).collect(), ..Default::default() };
            if client.kv.clone().txn(request).await.is_err() {
                break;
            }
            written += 1;
        }
        self.log.note(format!("written again: {written} revisions"));
    }

    /// Which revision was restored: the last at which the etcd has what was recorded. That is `newest`, unless leases have
    /// expired already.
    async fn shared_revision(&self, newest: i64, bump: i64) -> i64 {
        let ended = self.ended.last().expect("a history has just ended");
        for shared in (newest - 20..=newest).rev() {
            let revision = shared + bump;
            let request = RangeRequest { key: "\0".into(), range_end: "\0".into(), revision, ..Default::default() };
            let restored = self.world.cluster.client(0).range(request).await;
            if restored.expect("an etcd that nobody disturbs answers").kvs == ended.contents(shared) {
                return shared;
            }
        }
        panic!("what was restored is not what was recorded at revision {newest}, nor shortly before");
    }
}

/// What made `event`, with another value.
fn again(event: &Event) -> RequestOp {
    let KeyValue { key, value, .. } = event.kv.clone().expect("every event has a record");
    let request = match event.r#type() {
        EventType::Put => {
            let value = [b"again ", &value[..]].concat().into();
            Request::RequestPut(PutRequest { key, value, ..Default::default() })
        }
        EventType::Delete => Request::RequestDeleteRange(DeleteRangeRequest { key, ..Default::default() }),
    };
    RequestOp { request: Some(request) }
}

impl Link {
    fn cut_off(&self) {
        self.set(&Faults { refuse: true, ..Faults::default() });
        self.reset();
    }
}
