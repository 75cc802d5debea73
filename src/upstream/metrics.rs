//! What the upstream room counts.

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use super::connection::Class;

/// Cheap to clone: every clone counts into the same metrics.
#[derive(Clone)]
pub(super) struct Metrics {
    connections: IntGaugeVec,
    dials: IntCounterVec,
    /// 1 where the endpoint answers and belongs to the cluster.
    pub well: IntGaugeVec,
    /// 1 where the endpoint is refused because it belongs to another cluster.
    pub foreign: IntGaugeVec,
    /// Probes that failed.
    pub probe_failures: IntCounterVec,
    /// Times that a new cluster id was adopted.
    pub clusters_replaced: IntCounter,
    /// -1 unknown, 0 off, 1 on.
    pub auth: IntGauge,
    /// Forwarded calls that hold a permit now.
    pub forwarding: IntGaugeVec,
    /// Forwarded calls that wait for a permit now.
    pub waiting: IntGaugeVec,
    /// Forwarded calls that were refused because of a limit.
    pub refused: IntCounterVec,
}

impl Metrics {
    pub(super) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let gauge = |name: &str, help: &str, label: &str| -> Result<IntGaugeVec, prometheus::Error> {
            let gauge = IntGaugeVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let counter = |name: &str, help: &str, labels: &[&str]| -> Result<IntCounterVec, prometheus::Error> {
            let counter = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counter.clone()))?;
            Ok(counter)
        };
        let auth = IntGauge::new("millpond_upstream_auth", "Authentication upstream: -1 unknown, 0 off, 1 on.")?;
        registry.register(Box::new(auth.clone()))?;
        let replaced = "Times that all endpoints turned out to belong to a new cluster, which was adopted.";
        let clusters_replaced = IntCounter::new("millpond_upstream_clusters_replaced_total", replaced)?;
        registry.register(Box::new(clusters_replaced.clone()))?;
        Ok(Self {
            connections: gauge("millpond_upstream_connections", "Open connections to etcd.", "class")?,
            dials: counter("millpond_upstream_dials_total", "Connections tried.", &["endpoint", "outcome"])?,
            well: gauge(
                "millpond_upstream_endpoint_well",
                "1 where the endpoint answers and may be used.",
                "endpoint",
            )?,
            foreign: gauge(
                "millpond_upstream_endpoint_foreign",
                "1 where the endpoint is refused: it belongs to another cluster.",
                "endpoint",
            )?,
            probe_failures: counter("millpond_upstream_probe_failures_total", "Failed probes.", &["endpoint"])?,
            clusters_replaced,
            auth,
            forwarding: gauge("millpond_upstream_forwarding", "Forwarded calls under way.", "class")?,
            waiting: gauge("millpond_upstream_forward_waiting", "Forwarded calls waiting for a permit.", "class")?,
            refused: counter("millpond_upstream_forward_refused_total", "Calls refused at a limit.", &["class"])?,
        })
    }

    pub(super) fn connections(&self, class: Class) -> IntGauge {
        self.connections.with_label_values(&[class.name()])
    }

    pub(super) fn dialed(&self, endpoint: &str, succeeded: bool) {
        self.dials.with_label_values(&[endpoint, if succeeded { "ok" } else { "failed" }]).inc();
    }
}
