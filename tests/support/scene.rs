//! An etcd, a link that can break, and a Millpond behind it.

use super::{
    client::Client,
    etcd::Cluster,
    fault::{FaultProxy, Faults},
    millpond::Millpond,
};

/// The three of them.
pub struct Scene {
    pub cluster: Cluster,
    pub link: FaultProxy,
    pub millpond: Millpond,
}

impl Scene {
    /// Puts a Millpond with these flags in front of a cluster of one, over a link that is broken like this from the start.
    pub async fn before(cluster: Cluster, faults: Faults, flags: &[&str]) -> Self {
        let link = FaultProxy::start(&cluster.endpoint(0)).await;
        link.set(faults);
        let millpond = Millpond::start(std::slice::from_ref(&link.endpoint), flags).await;
        Self { cluster, link, millpond }
    }

    /// A client of the etcd itself.
    pub fn etcd(&self) -> Client {
        self.cluster.client(0)
    }
}
