//! The arguments of `millpond bench`.

use std::{str::FromStr, time::Duration};

use clap::{Args, Subcommand};

use super::{requests::Shape, wire::Manners};
use crate::config::{
    units::{parse_size, parse_span},
    values::parse_endpoint,
};

/// Shown below the help.
pub const EXAMPLES: &str = "\
Keys are written below --prefix before the run and deleted after it.

Examples:
  millpond bench range --endpoints 127.0.0.1:2379 --pid $(pgrep -x etcd)
  millpond bench range --shape page --keys 100000 --limit 500 --connections 4
  millpond bench watch --connections 10 --streams 100 --rate 100 --duration 30s
  millpond bench txn --connections 10 --in-flight 10 --value-size 512 --json";

/// A size in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const LARGEST: u64 = 1 << 30;
        parse_size(text)
            .and_then(|bytes| if bytes > LARGEST { Err("at most 1GiB".to_owned()) } else { Ok(Self(bytes)) })
    }
}

/// A duration.
#[derive(Clone, Copy, Debug)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
        parse_span(text)
            .and_then(|span| if span > LONGEST { Err("at most one day".to_owned()) } else { Ok(Self(span)) })
    }
}

/// A duration above zero.
fn window(text: &str) -> Result<Span, String> {
    text.parse().and_then(|span: Span| if span.0.is_zero() { Err("must be above 0".to_owned()) } else { Ok(span) })
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if (0.0..=1e6).contains(&rate) => Ok(rate),
        _ => Err("must be from 0 to 1000000".to_owned()),
    }
}

fn endpoint(text: &str) -> Result<String, String> {
    parse_endpoint(text).map(|endpoint| endpoint.to_string())
}

/// A count of things, at least one and few enough to be held.
fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=1_000_000) => Ok(count),
        _ => Err("must be from 1 to 1000000".to_owned()),
    }
}

/// `millpond bench`.
#[derive(Debug, Args)]
pub struct Bench {
    #[command(subcommand)]
    pub load: Load,
}

/// The load.
#[derive(Debug, Subcommand)]
pub enum Load {
    /// Reads: a key, a page, everything, a count, keys only
    Range(Range),
    /// Watchers, and a writer whose events they see
    Watch(Watch),
    /// Writes of random keys
    Put(Write),
    /// Guarded updates as Kubernetes does them: compare a revision, then put, else get
    Txn(Write),
}

impl Load {
    /// What all loads have.
    pub fn common(&self) -> &Common {
        match self {
            Self::Range(range) => &range.common,
            Self::Watch(watch) => &watch.common,
            Self::Put(write) | Self::Txn(write) => &write.common,
        }
    }
}

/// What all loads have.
#[derive(Debug, Args)]
pub struct Common {
    /// Servers to load; connections take turns
    #[arg(long, value_name = "HOST:PORT,…", value_delimiter = ',', default_value = "127.0.0.1:23790", value_parser = endpoint)]
    pub endpoints: Vec<String>,
    /// Connections
    #[arg(long, value_name = "COUNT", default_value = "10", value_parser = count)]
    pub connections: usize,
    /// Time that counts
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = window)]
    pub duration: Span,
    /// Time under load before that
    #[arg(long, value_name = "DURATION", default_value = "1s")]
    pub warmup: Span,
    /// Threads of this program
    #[arg(long, value_name = "COUNT", default_value = "1", value_parser = count)]
    pub threads: usize,
    /// Process whose CPU time and memory are measured: the server, on this machine
    #[arg(long, value_name = "PID")]
    pub pid: Option<u32>,
    /// How answers are received
    #[arg(long, value_enum, default_value = "go")]
    pub manners: Manners,
    /// What the run's keys begin with
    #[arg(long, value_name = "PREFIX", default_value = "/millpond-bench/")]
    pub prefix: String,
    /// Leave the run's keys in place
    #[arg(long)]
    pub keep: bool,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
}

impl Common {
    /// Where keys are written.
    pub fn first_endpoint(&self) -> &str {
        self.endpoints.first().map_or("", String::as_str)
    }

    /// One line about the load. `in_flight` is zero for watches.
    pub fn describe(&self, what: &str, in_flight: usize) -> String {
        let depth = if in_flight > 0 { format!(" x {in_flight} in flight") } else { String::new() };
        format!("{what}: {} connections{depth} to {}", self.connections, self.endpoints.join(","))
    }
}

/// `millpond bench range`.
#[derive(Debug, Args)]
pub struct Range {
    #[command(flatten)]
    pub common: Common,
    /// What is read
    #[arg(long, value_enum, default_value = "key")]
    pub shape: Shape,
    /// Keys in the range
    #[arg(long, value_name = "COUNT", default_value = "10000", value_parser = clap::value_parser!(u64).range(1..=99_999_999))]
    pub keys: u64,
    /// Bytes of each value
    #[arg(long, value_name = "SIZE", default_value = "1KiB")]
    pub value_size: Size,
    /// Keys of a page
    #[arg(long, value_name = "COUNT", default_value = "500", value_parser = clap::value_parser!(i64).range(1..))]
    pub limit: i64,
    /// Calls in flight on each connection
    #[arg(long, value_name = "COUNT", default_value = "10", value_parser = count)]
    pub in_flight: usize,
    /// Linearizable reads instead of serializable ones
    #[arg(long)]
    pub linearizable: bool,
    /// The keys are there already, from a run with --keep
    #[arg(long)]
    pub no_fill: bool,
}

/// `millpond bench put` and `millpond bench txn`.
#[derive(Debug, Args)]
pub struct Write {
    #[command(flatten)]
    pub common: Common,
    /// Keys that puts choose from
    #[arg(long, value_name = "COUNT", default_value = "10000", value_parser = clap::value_parser!(u64).range(1..=99_999_999))]
    pub keys: u64,
    /// Bytes of each value
    #[arg(long, value_name = "SIZE", default_value = "512")]
    pub value_size: Size,
    /// Calls in flight on each connection
    #[arg(long, value_name = "COUNT", default_value = "10", value_parser = count)]
    pub in_flight: usize,
}

/// `millpond bench watch`.
#[derive(Debug, Args)]
pub struct Watch {
    #[command(flatten)]
    pub common: Common,
    /// Streams on each connection
    #[arg(long, value_name = "COUNT", default_value = "1", value_parser = count)]
    pub streams: usize,
    /// Watchers on each stream
    #[arg(long, value_name = "COUNT", default_value = "1", value_parser = count)]
    pub watchers: usize,
    /// Writes per second; 0 leaves the watchers idle
    #[arg(long, value_name = "RATE", default_value = "100", value_parser = rate)]
    pub rate: f64,
    /// Bytes of each value, at least 16
    #[arg(long, value_name = "SIZE", default_value = "512")]
    pub value_size: Size,
    /// A key of its own for each watcher, instead of one key for all
    #[arg(long)]
    pub distinct: bool,
    /// Server that takes the writes [default: the first endpoint]
    #[arg(long, value_name = "HOST:PORT", value_parser = endpoint)]
    pub write_endpoint: Option<String>,
}
