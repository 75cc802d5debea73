//! Logs and metrics of the process: what every room reports through.
//!
//! - [`logs`]: the tracing subscriber.
//! - [`process`]: CPU, memory and files of a process, from the kernel.
//! - [`metrics`]: the registry's first entries: build, process, allocator.

use prometheus::Registry;

pub use self::logs::LogError;
use crate::config::Config;

pub mod logs;
pub mod metrics;
pub mod process;

/// The process's one registry of metrics. A cheap clone.
#[derive(Clone, Debug)]
pub struct Telemetry {
    /// Where each room registers its metrics, and what `/metrics` shows.
    pub registry: Registry,
}

/// Why logs or metrics cannot start. Neither is worth a retry.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// Logs.
    #[error("logs: {0}")]
    Logs(#[from] LogError),
    /// Metrics.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

impl Telemetry {
    /// Starts logging as the settings say, and registers the metrics of the build, the process and the allocator. Once per
    /// process, since there is one global log.
    pub fn start(config: &Config) -> Result<Self, TelemetryError> {
        logs::start(config)?;
        let registry = Registry::new();
        metrics::register(&registry)?;
        Ok(Self { registry })
    }
}
