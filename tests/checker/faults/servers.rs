//! What happens to the servers themselves: they die, freeze and change their leader.

use std::{sync::Arc, time::Duration};

use millpond::proto::etcdserverpb::MoveLeaderRequest;
use rustix::process::Signal;
use tokio::time::{sleep, timeout};

use super::{
    super::{context::Context, history::History, recorder::Recorder, world::World},
    FaultLog,
};
use crate::support::{client::Client, random::Generator};

/// Strikes servers. It has them to itself.
pub struct Director {
    pub world: World,
    pub recorder: Recorder,
    pub context: Arc<Context>,
    pub log: FaultLog,
    /// The histories that have ended.
    pub ended: Vec<History>,
    pub(super) random: Generator,
}

impl Director {
    pub fn new(world: World, recorder: Recorder, context: Arc<Context>, log: FaultLog) -> Self {
        let random = Generator::new(context.seed_of(2000));
        Self { world, recorder, context, log, ended: Vec::new(), random }
    }

    /// Strikes until the work is over.
    pub async fn run(mut self) -> Self {
        while self.context.works() {
            let pause = 200 + self.random.below(1500);
            self.wait(pause as u64).await;
            if self.context.works() {
                self.strike().await;
            }
        }
        self
    }

    async fn strike(&mut self) {
        let alone = self.world.cluster.size() == 1;
        match self.random.below(20) {
            0..4 => self.kill_member().await,
            4 | 5 => self.kill_millpond().await,
            6 => self.freeze_member().await,
            7 => self.freeze_millpond().await,
            8..10 => self.compact().await,
            10..12 => self.compact_past_a_feed().await,
            12 => self.expire_leases().await,
            13 => self.delete_many().await,
            14 => self.put_large().await,
            15..18 if alone => self.restore().await,
            15 | 16 => self.kill_majority().await,
            _ if alone => self.kill_member().await,
            _ => self.move_leader().await,
        }
    }

    pub(super) async fn wait(&self, millis: u64) {
        sleep(Duration::from_millis(millis)).await;
    }

    /// A client of a member, over a link without faults.
    pub(super) fn client(&mut self) -> Client {
        let member = self.random.below(self.world.cluster.size());
        self.world.cluster.client(member)
    }

    async fn kill_member(&mut self) {
        let member = self.random.below(self.world.cluster.size());
        let down = self.random.below(1500) as u64;
        self.log.note(format!("etcd killed: member {member}, {down} ms"));
        self.world.cluster.kill(member);
        self.wait(down).await;
        self.world.cluster.restart(member).await;
    }

    async fn kill_majority(&mut self) {
        let members = self.world.cluster.size();
        let spared = self.random.below(members + 1);
        let down = self.random.below(2500) as u64;
        self.log.note(format!("majority killed: all but member {spared}, {down} ms"));
        let killed = || (0..members).filter(|member| *member != spared);
        killed().for_each(|member| self.world.cluster.kill(member));
        self.wait(down).await;
        killed().for_each(|member| self.world.cluster.launch(member));
        self.world.cluster.ready().await;
    }

    async fn move_leader(&mut self) {
        let leader = self.world.cluster.leader().await;
        let other = (leader + 1) % self.world.cluster.size();
        let status = self.world.cluster.client(other).status().await;
        let target_id = status.ok().and_then(|status| status.header).map_or(0, |header| header.member_id);
        self.log.note(format!("leader moved: from member {leader} to member {other}"));
        let mut maintenance = self.world.cluster.client(leader).maintenance;
        // It may fail when the leader has changed meanwhile, which will do as well.
        let _ = timeout(Duration::from_secs(5), maintenance.move_leader(MoveLeaderRequest { target_id })).await;
    }

    async fn kill_millpond(&mut self) {
        let number = self.random.below(self.world.millponds.len());
        self.log.note(format!("millpond killed: {number}"));
        self.world.millponds[number].assert_well();
        self.world.millponds[number].restart().await;
    }

    async fn freeze_member(&mut self) {
        let member = self.random.below(self.world.cluster.size());
        let millis = 200 + self.random.below(1800) as u64;
        self.log.note(format!("etcd frozen: member {member}, {millis} ms"));
        self.world.cluster.freeze(member);
        self.wait(millis).await;
        self.world.cluster.thaw(member);
        self.world.cluster.ready().await;
    }

    async fn freeze_millpond(&mut self) {
        let number = self.random.below(self.world.millponds.len());
        let millis = 100 + self.random.below(1500) as u64;
        self.log.note(format!("millpond frozen: {number}, {millis} ms"));
        self.world.millponds[number].process.signal(Signal::STOP);
        self.wait(millis).await;
        self.world.millponds[number].process.signal(Signal::CONT);
    }
}
