//! Calls that ask for a leader (`hasleader`, as Kubernetes sets on every watch) are refused while a member says that there is none.
//! Streams also end once no endpoint has shown one for three election timeouts, as in etcd. When no endpoint can be reached at all they
//! end too, so that their clients go on elsewhere if they can, but not with the word that there is no leader.

use std::time::Duration;

use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    status::Status,
    upstream::{ABSENCE, Health, Upstream},
};

/// Three of etcd's default election timeouts.
const PATIENCE: Duration = Duration::from_secs(3);

/// Knows whether the cluster has a leader. Cheap to clone.
#[derive(Clone)]
pub struct Leader {
    health: watch::Receiver<Health>,
    /// Cancelled when the leader is lost; followed by another when there is one again.
    reign: watch::Receiver<CancellationToken>,
    stop: CancellationToken,
}

impl Leader {
    /// Begins to look after the leader; to be called inside a tokio runtime. Every reign ends with `stop` too.
    pub fn start(upstream: &Upstream, stop: CancellationToken) -> Self {
        let (reigns, reign) = watch::channel(stop.child_token());
        let health = upstream.health();
        let (minded, until) = (health.clone(), stop.clone());
        upstream.vital().spawn("leader", async move {
            until.run_until_cancelled(mind(minded, reigns, &until)).await;
        });
        Self { health, reign, stop }
    }

    /// A token that is cancelled when the leader is lost, or the server leaves. While nobody can be reached, waits a moment
    /// for somebody who can be: who is refused comes back at once, and Kubernetes opens each of its streams ten times a second
    /// then.
    ///
    /// # Errors
    /// What streams end with ([`Leader::lack`]), while there is no leader.
    pub async fn reign(&self) -> Result<CancellationToken, Status> {
        let mut reign = self.reign.clone();
        if !self.is_denied() && reign.borrow().is_cancelled() {
            let _ = timeout(ABSENCE, reign.wait_for(|reign| !reign.is_cancelled())).await;
        }
        let reign = reign.borrow().clone();
        let is_over = reign.is_cancelled() && !self.stop.is_cancelled();
        if self.is_denied() || is_over { Err(self.lack()) } else { Ok(reign) }
    }

    /// Why a reign is over. A member without a leader says so, and etcd's client tells its user, for Kubernetes to try again at once and,
    /// after half a minute, to give its own caches up. Of members that cannot be reached nobody knows that, and etcd's client would
    /// just look for another.
    pub fn lack(&self) -> Status {
        if self.is_denied() { Status::NO_LEADER } else { Status::NO_CONNECTION }
    }

    /// Whether a member says that there is no leader.
    pub fn is_denied(&self) -> bool {
        let health = self.health.borrow();
        health.reachable && !health.has_leader
    }
}

/// Ends a reign when the leader is lost, and begins another when there is one again.
async fn mind(mut health: watch::Receiver<Health>, reigns: watch::Sender<CancellationToken>, stop: &CancellationToken) {
    loop {
        if health.wait_for(|health| !health.has_leader).await.is_err() {
            return;
        }
        if timeout(PATIENCE, health.wait_for(|health| health.has_leader)).await.is_ok() {
            continue;
        }
        tracing::warn!("no endpoint shows a leader: streams that ask for one end");
        reigns.borrow().cancel();
        if health.wait_for(|health| health.has_leader).await.is_err() {
            return;
        }
        tracing::info!("the cluster has a leader again");
        reigns.send_replace(stop.child_token());
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, sleep};

    use super::*;
    use crate::upstream::Settings;

    #[tokio::test(start_paused = true)]
    async fn without_anybody_a_reign_lasts_for_a_while_and_is_waited_for_but_not_by_a_server_that_leaves() {
        let nobody = Settings::new(vec!["127.0.0.1:1".parse().unwrap()]);
        let upstream = Upstream::start(nobody, &prometheus::Registry::new()).unwrap();
        let stop = CancellationToken::new();
        let leader = Leader::start(&upstream, stop.clone());
        let reign = leader.reign().await.unwrap();
        sleep(PATIENCE / 2).await;
        assert!(!reign.is_cancelled());
        sleep(PATIENCE).await;
        let began = Instant::now();
        assert_eq!(leader.reign().await.unwrap_err(), Status::NO_CONNECTION);
        assert!(reign.is_cancelled() && began.elapsed() >= ABSENCE);
        stop.cancel();
        assert!(leader.reign().await.unwrap().is_cancelled(), "not for want of a leader");
    }
}
