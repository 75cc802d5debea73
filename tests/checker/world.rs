//! The servers of a run: an etcd, two Millponds in front of it, and between all of them proxies that can break links.
//!
//! Clients reach the etcd through gates that stay whole, but for a restore, when nobody but the recorder may be in touch
//! with it.

use std::sync::Arc;

use tokio::sync::Mutex;

use super::record::Target;
use crate::support::{
    etcd::Cluster,
    fault::{FaultProxy, Faults},
    millpond::Millpond,
    toolchain::Release,
};

/// The links from one Millpond to every member. Who strikes them holds `busy`.
pub struct Link {
    pub proxies: Vec<FaultProxy>,
    pub busy: Mutex<()>,
}

impl Link {
    async fn start(cluster: &Cluster) -> Arc<Self> {
        Arc::new(Self { proxies: proxies(cluster).await, busy: Mutex::new(()) })
    }

    pub fn endpoints(&self) -> Vec<String> {
        self.proxies.iter().map(|proxy| proxy.endpoint.clone()).collect()
    }

    pub fn heal(&self) {
        self.proxies.iter().for_each(FaultProxy::heal);
    }

    pub fn set(&self, faults: &Faults) {
        self.proxies.iter().for_each(|proxy| proxy.set(faults.clone()));
    }

    pub fn reset(&self) {
        self.proxies.iter().for_each(FaultProxy::reset);
    }
}

async fn proxies(cluster: &Cluster) -> Vec<FaultProxy> {
    let mut proxies = Vec::new();
    for endpoint in cluster.endpoints() {
        proxies.push(FaultProxy::start(&endpoint).await);
    }
    proxies
}

/// All servers of a run.
pub struct World {
    pub cluster: Cluster,
    pub gate: Arc<Link>,
    pub links: Vec<Arc<Link>>,
    pub millponds: Vec<Millpond>,
}

impl World {
    /// With an etcd of so many members.
    pub async fn start(members: usize) -> Self {
        let builder = Cluster::builder(Release::newest()).members(members).flag("--max-txn-ops=128");
        let cluster = if members == 1 { builder.fixed_identity().start().await } else { builder.start().await };
        let gate = Link::start(&cluster).await;
        let mut links = Vec::new();
        let mut millponds = Vec::new();
        for flags in flags() {
            let link = Link::start(&cluster).await;
            millponds.push(Millpond::start(&link.endpoints(), flags).await);
            links.push(link);
        }
        Self { cluster, gate, links, millponds }
    }

    /// Where clients connect.
    pub fn targets(&self) -> Vec<(Target, String)> {
        let millponds = self.millponds.iter().enumerate();
        let millponds = millponds.map(|(number, millpond)| (Target::Millpond(number), millpond.endpoint.clone()));
        let members = self.gate.endpoints().into_iter().enumerate();
        millponds.chain(members.map(|(number, endpoint)| (Target::Etcd(number), endpoint))).collect()
    }
}

/// One Millpond caches everything but keeps little history, so that watchers are relayed; the other caches two prefixes,
/// so that it depends on progress notifications and on forwarding.
fn flags() -> [&'static [&'static str]; 2] {
    const COMMON: &str = "--progress-interval=300ms";
    [&[COMMON, "--history-bytes=128KiB"], &[COMMON, "--prefixes=a/,b/", "--history-bytes=4MiB"]]
}
