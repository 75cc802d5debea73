//! Settings: what can be set, where values come from, and whether they make sense together.
//!
//! A setting comes from a flag, from `MILLPOND_…` in the environment, from a TOML file, or from [`Config::default`], in that
//! order of precedence. [`Loaded::load`] reads and checks them all before anything else happens.
//!
//! - [`settings`]: the table behind flags, environment names and help.
//! - [`sources`]: the layers and their merging.
//! - [`check`]: values that contradict each other.
//! - [`show`]: the effective settings as TOML that can be fed back.
//! - [`units`], [`values`]: sizes, durations, addresses as text.

use std::{net::SocketAddr, num::NonZero, path::PathBuf, time::Duration};

use http::uri::Authority;
use serde::{Deserialize, Serialize};

pub use self::{
    error::ConfigError,
    sources::{Loaded, Origin, Sources},
    values::LogFormat,
};
use crate::{server::listener, sql, upstream};

pub mod check;
mod error;
pub mod settings;
pub mod show;
pub mod sources;
pub mod units;
pub mod values;

/// Where the embedded store lives when neither endpoints nor a directory are given.
pub const DEFAULT_DATA_DIR: &str = "millpond-data";

/// Every setting, checked. The field names in kebab case are the setting names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Config {
    /// The upstream's members as `host:port`. Empty: the embedded store.
    #[serde(with = "values::endpoints")]
    pub endpoints: Vec<Authority>,
    /// How long dialling an endpoint may take.
    #[serde(with = "values::span")]
    pub connect_timeout: Duration,
    /// How long a linearizable read waits for the upstream before it fails.
    #[serde(with = "values::span")]
    pub read_timeout: Duration,
    /// Concurrent unary calls forwarded upstream.
    #[serde(with = "values::count")]
    pub forward_limit: usize,
    /// Concurrent streams forwarded upstream.
    #[serde(with = "values::count")]
    pub forward_stream_limit: usize,
    /// Concurrent upstream watches for starts older than the history window.
    #[serde(with = "values::count")]
    pub catch_up_limit: usize,
    /// Pause before an HTTP/2 ping on an upstream connection.
    #[serde(with = "values::span")]
    pub upstream_keepalive_interval: Duration,
    /// How long an upstream ping may go unanswered.
    #[serde(with = "values::span")]
    pub upstream_keepalive_timeout: Duration,

    /// Where clients connect.
    #[serde(with = "values::address")]
    pub listen: SocketAddr,
    /// Where metrics and health are served.
    #[serde(with = "values::address")]
    pub admin_listen: SocketAddr,
    /// The client URL that MemberList tells in place of the members' own.
    #[serde(with = "values::url", skip_serializing_if = "Option::is_none")]
    pub advertise_client_url: Option<String>,
    /// Largest request, in bytes.
    #[serde(with = "values::size")]
    pub max_request_bytes: u64,
    /// Largest answer, in bytes. None: no limit.
    #[serde(with = "values::limit")]
    pub max_response_bytes: Option<u64>,
    /// Pause before an HTTP/2 ping on an idle client connection.
    #[serde(with = "values::span")]
    pub grpc_keepalive_interval: Duration,
    /// How long a client's answer to a ping may take.
    #[serde(with = "values::span")]
    pub grpc_keepalive_timeout: Duration,
    /// How long calls may go on after a signal to stop.
    #[serde(with = "values::span")]
    pub shutdown_grace: Duration,

    /// Key prefixes to cache, sorted, none inside another. Empty: the whole keyspace.
    #[serde(with = "values::prefixes")]
    pub prefixes: Vec<String>,
    /// Memory for the cached keyspace, in bytes.
    #[serde(with = "values::size")]
    pub cache_bytes: u64,
    /// Memory for the history window, replaced and deleted values included, in bytes.
    #[serde(with = "values::size")]
    pub history_bytes: u64,
    /// Age of the oldest revision in the history window.
    #[serde(with = "values::span")]
    pub history_age: Duration,
    /// Pause between progress notifications on a quiet watch.
    #[serde(with = "values::span")]
    pub progress_interval: Duration,
    /// Pause between comparisons of the cache with the upstream. Zero: never.
    #[serde(with = "values::span")]
    pub check_interval: Duration,

    /// The embedded store's directory, when it was named.
    #[serde(with = "values::path", skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<PathBuf>,
    /// The embedded store's quota in bytes, when it was given.
    #[serde(with = "values::optional_size", skip_serializing_if = "Option::is_none")]
    pub quota_backend_bytes: Option<u64>,
    /// `periodic` or `revision`, when it was given.
    #[serde(with = "values::word", skip_serializing_if = "Option::is_none")]
    pub auto_compaction_mode: Option<String>,
    /// A duration, a number of hours or a number of revisions, when it was given.
    #[serde(with = "values::word", skip_serializing_if = "Option::is_none")]
    pub auto_compaction_retention: Option<String>,

    /// Threads that serve, when it was given.
    #[serde(with = "values::threads", skip_serializing_if = "Option::is_none")]
    pub worker_threads: Option<usize>,
    /// How long the serving thread, if it is one, keeps awake for the answer to a lone forwarded call. Zero: not at all.
    #[serde(with = "values::span")]
    pub busy_poll: Duration,

    /// A level, or directives as in `RUST_LOG`.
    #[serde(with = "values::log_level")]
    pub log_level: String,
    /// Text for people or JSON for machines.
    pub log_format: LogFormat,
}

impl Default for Config {
    /// The rooms' own defaults, where they have any.
    fn default() -> Self {
        let upstream = upstream::Settings::new(Vec::new());
        let listener = listener::Settings::default();
        let store = sql::Options::default();
        Self {
            endpoints: Vec::new(),
            connect_timeout: upstream.connect_timeout,
            read_timeout: Duration::from_secs(7),
            forward_limit: upstream.forward_limit,
            forward_stream_limit: upstream.stream_limit,
            catch_up_limit: 16,
            upstream_keepalive_interval: upstream.keepalive_interval,
            upstream_keepalive_timeout: upstream.keepalive_timeout,
            listen: SocketAddr::from(([127, 0, 0, 1], 23790)),
            admin_listen: SocketAddr::from(([127, 0, 0, 1], 23791)),
            advertise_client_url: None,
            max_request_bytes: store.max_request_bytes as u64,
            max_response_bytes: None,
            grpc_keepalive_interval: listener.keepalive_interval,
            grpc_keepalive_timeout: listener.keepalive_timeout,
            shutdown_grace: listener.grace,
            prefixes: Vec::new(),
            cache_bytes: 4 << 30,
            history_bytes: 256 << 20,
            history_age: Duration::from_secs(10 * 60),
            progress_interval: store.progress_interval,
            check_interval: Duration::from_secs(5 * 60),
            data_dir: None,
            quota_backend_bytes: None,
            auto_compaction_mode: None,
            auto_compaction_retention: None,
            worker_threads: None,
            busy_poll: Duration::from_millis(1),
            log_level: "info".to_owned(),
            log_format: LogFormat::Text,
        }
    }
}

impl Config {
    /// Whether the embedded store is the upstream: no endpoints are set.
    pub fn is_embedded(&self) -> bool {
        self.endpoints.is_empty()
    }

    /// The embedded store's quota in bytes; etcd's default of 2 GiB unless another was given.
    pub fn quota_bytes(&self) -> u64 {
        let given = self.quota_backend_bytes.filter(|&bytes| bytes > 0);
        given.unwrap_or_else(|| sql::Options::default().quota_bytes.unsigned_abs())
    }

    /// How many threads serve: half of the cores that the process may use, unless a number was given. Measured on two cores, one
    /// thread does writes, deliveries and consistent reads for less CPU time than two, and pages for several connections for more.
    pub fn worker_threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, NonZero::get);
        self.worker_threads.unwrap_or_else(|| (cores() / 2).max(1))
    }

    /// The embedded store's automatic compaction, with the meanings of etcd's flags. None: off.
    pub fn auto_compaction(&self) -> Option<sql::AutoCompaction> {
        check::auto_compaction(self).ok().flatten()
    }
}
