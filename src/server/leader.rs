//! Streams that ask for a leader (`hasleader`, as Kubernetes sets on every watch) end when there is none: at opening, and
//! once no endpoint has shown one for three election timeouts, as in etcd. When no endpoint can be reached at all they end too, so that
//! their clients go on elsewhere if they can, but not with the word that there is no leader.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    status::Status,
    upstream::{Health, Upstream},
};

/// Three of etcd's default election timeouts.
const PATIENCE: Duration = Duration::from_secs(3);

/// Knows whether the cluster has a leader. Cheap to clone.
#[derive(Clone)]
pub struct Leader {
    health: watch::Receiver<Health>,
    /// Cancelled when the leader is lost; then replaced by a new one when there is one again.
    reign: Arc<ArcSwap<CancellationToken>>,
    stop: CancellationToken,
}

impl Leader {
    /// Begins to look after the leader; to be called inside a tokio runtime. Every reign ends with `stop` too.
    pub fn start(upstream: &Upstream, stop: CancellationToken) -> Self {
        let leader = Self {
            health: upstream.health(),
            reign: Arc::new(ArcSwap::from_pointee(stop.child_token())),
            stop: stop.clone(),
        };
        let minder = leader.clone();
        tokio::spawn(async move { stop.run_until_cancelled(minder.mind()).await });
        leader
    }

    /// A token that is cancelled when the leader is lost.
    ///
    /// # Errors
    /// What streams end with ([`Leader::lack`]), while there is no leader.
    pub fn reign(&self) -> Result<CancellationToken, Status> {
        let health = self.health.borrow();
        let refused = health.reachable && !health.has_leader;
        let reign = self.reign.load();
        let goes_on = !refused && (!reign.is_cancelled() || self.stop.is_cancelled());
        if goes_on { Ok(CancellationToken::clone(&reign)) } else { Err(lack(&health)) }
    }

    /// Why a reign is over.
    pub fn lack(&self) -> Status {
        lack(&self.health.borrow())
    }

    async fn mind(self) {
        let mut health = self.health.clone();
        loop {
            if health.wait_for(|health| !health.has_leader).await.is_err() {
                return;
            }
            if timeout(PATIENCE, health.wait_for(|health| health.has_leader)).await.is_ok() {
                continue;
            }
            tracing::warn!("no endpoint shows a leader: streams that ask for one end");
            self.reign.load().cancel();
            if health.wait_for(|health| health.has_leader).await.is_err() {
                return;
            }
            tracing::info!("the cluster has a leader again");
            self.reign.store(Arc::new(self.stop.child_token()));
        }
    }
}

/// A member without a leader says so, and etcd's client tells its user, for Kubernetes to try again at once and, after half a minute, to
/// give its own caches up. Of members that cannot be reached nobody knows that, and etcd's client would just look for another.
fn lack(health: &Health) -> Status {
    if health.reachable { Status::NO_LEADER } else { Status::NO_CONNECTION }
}
