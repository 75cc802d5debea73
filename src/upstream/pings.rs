//! How often an endpoint is pinged. A server that takes pings for too frequent ends the connection; as Go's gRPC client does, what
//! is opened after that pings half as often.

use std::{
    error::Error,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tracing::warn;

/// The pause between pings to one endpoint. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct PingPause(Arc<AtomicU64>);

impl PingPause {
    pub(super) fn new(pause: Duration) -> Self {
        Self(Arc::new(AtomicU64::new(millis(pause))))
    }

    pub(super) fn now(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }

    /// Takes note of how a connection ended that paused for `paused`. Of several that end for the same reason, the first counts.
    pub(super) fn ended(&self, endpoint: &str, paused: Duration, error: &hyper::Error) {
        if !is_for_pings(error) {
            return;
        }
        let longer = millis(paused).saturating_mul(2);
        if self.0.fetch_max(longer, Ordering::Relaxed) < longer {
            let pause = Duration::from_millis(longer);
            warn!(
                endpoint,
                ?pause,
                "the upstream takes our pings for too frequent: pausing longer between them; \
                 set --upstream-keepalive-interval to its --grpc-keepalive-min-time or more"
            );
        }
    }
}

fn millis(pause: Duration) -> u64 {
    u64::try_from(pause.as_millis()).unwrap_or(u64::MAX)
}

/// Whether the peer has ended the connection to get some calm. Go's gRPC server has no other reason to say so.
fn is_for_pings(error: &hyper::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<h2::Error>());
    cause.is_some_and(|end| end.is_go_away() && end.is_remote() && end.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM))
}
