//! `millpond bench`: loads any etcd endpoint and says what an operation costs.
//!
//! The generator must not be the bottleneck: it speaks HTTP/2 itself ([`wire`]), gathers what it writes, decodes next to
//! nothing, and reports its own CPU time so that a reader can see it.
//!
//! - [`arguments`]: what can be asked for.
//! - [`wire`], [`link`], [`messages`]: HTTP/2, sockets, gRPC framing.
//! - [`requests`], [`fill`]: what is asked, and the keys it is asked about.
//! - [`calls`], [`watchers`], [`writer`], [`loads`]: the loads.
//! - [`mod@drive`]: threads, warm-up, the window that counts, CPU time.
//! - [`tally`], [`report`]: counts and figures.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

pub use self::arguments::{Bench, EXAMPLES};
use self::{
    arguments::{Common, Load, Range, Watch, Write},
    drive::{Conduct, DriveError, Outcome, drive},
    fill::{FillError, Filler},
    loads::{CallLoad, WatchLoad},
    report::{Deliveries, Report},
    requests::{GuardedUpdates, Keys, Ready, Source},
    watchers::Fleet,
};
use crate::proto::paths;

mod arguments;
pub mod calls;
pub mod drive;
pub mod fill;
pub mod link;
pub mod loads;
pub mod messages;
pub mod report;
pub mod requests;
pub mod tally;
pub mod watchers;
pub mod wire;
pub mod writer;

/// Why a load could not be run.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The load broke off.
    #[error("bench: {0}")]
    Drive(#[from] DriveError),
    /// The keys could not be written, or the server refuses the request.
    #[error("bench: {0}")]
    Fill(#[from] FillError),
    /// No runtime.
    #[error("bench: {0}")]
    Io(#[from] std::io::Error),
    /// The report cannot be printed as JSON.
    #[error("bench: {0}")]
    Json(#[from] serde_json::Error),
}

/// Runs what was asked for and returns the text to print.
pub fn run(bench: &Bench) -> Result<String, BenchError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = match &bench.load {
        Load::Range(range) => run_range(&runtime, range)?,
        Load::Put(write) => run_put(&runtime, write)?,
        Load::Txn(write) => run_txn(&runtime, write)?,
        Load::Watch(watch) => run_watch(&runtime, watch)?,
    };
    let json = bench.load.common().json;
    Ok(if json { serde_json::to_string_pretty(&report)? + "\n" } else { report.to_string() })
}

fn run_range(runtime: &tokio::runtime::Runtime, range: &Range) -> Result<Report, BenchError> {
    let keys = Keys { prefix: range.common.prefix.clone(), count: range.keys };
    let requests = requests::reads(range.shape, &keys, range.limit, range.linearizable);
    let mut filler = runtime.block_on(Filler::connect(range.common.first_endpoint()))?;
    if !range.no_fill {
        runtime.block_on(fill_with_bar(&mut filler, &keys, range.value_size.0 as usize))?;
    }
    if let Some(request) = requests.first() {
        runtime.block_on(filler.probe(request.clone()))?;
    }
    let source = |_| Box::new(Ready::new(&requests)) as Box<dyn Source>;
    let outcome = call(&range.common, paths::RANGE, range.in_flight, &source)?;
    tidy(runtime, &range.common, &mut filler, &keys, range.no_fill)?;
    let consistency = if range.linearizable { "linearizable" } else { "serializable" };
    let what = format!("range, {:?}, {consistency}, {} keys", range.shape, range.keys).to_lowercase();
    Ok(Report::new(range.common.describe(&what, range.in_flight), "call", &outcome, None))
}

fn run_put(runtime: &tokio::runtime::Runtime, write: &Write) -> Result<Report, BenchError> {
    let keys = Keys { prefix: write.common.prefix.clone(), count: write.keys };
    let requests = requests::writes(&keys, write.value_size.0 as usize);
    let source = |_| Box::new(Ready::new(&requests)) as Box<dyn Source>;
    run_writes(runtime, write, "put", paths::PUT, &source)
}

fn run_txn(runtime: &tokio::runtime::Runtime, write: &Write) -> Result<Report, BenchError> {
    let (prefix, in_flight, size) = (&write.common.prefix, write.in_flight, write.value_size.0 as usize);
    let source = |connection| Box::new(GuardedUpdates::new(prefix, connection, in_flight, size)) as Box<dyn Source>;
    run_writes(runtime, write, "guarded update", paths::TXN, &source)
}

fn run_writes(
    runtime: &tokio::runtime::Runtime,
    write: &Write,
    what: &str,
    path: &str,
    source: &loads::MakeSource<'_>,
) -> Result<Report, BenchError> {
    let keys = Keys { prefix: write.common.prefix.clone(), count: write.keys };
    let mut filler = runtime.block_on(Filler::connect(write.common.first_endpoint()))?;
    let first = Keys { count: 1, ..keys.clone() };
    runtime.block_on(filler.fill(&first, write.value_size.0 as usize, |_| {}))?;
    let outcome = call(&write.common, path, write.in_flight, source)?;
    tidy(runtime, &write.common, &mut filler, &keys, false)?;
    let what = format!("{what}, values of {} bytes", write.value_size.0);
    Ok(Report::new(write.common.describe(&what, write.in_flight), "call", &outcome, None))
}

fn call(common: &Common, path: &str, in_flight: usize, source: &loads::MakeSource) -> Result<Outcome, BenchError> {
    let load = CallLoad {
        endpoints: &common.endpoints,
        path,
        connections: common.connections,
        in_flight,
        manners: common.manners,
        source,
    };
    Ok(drive_with_bar(&load, common)?)
}

fn run_watch(runtime: &tokio::runtime::Runtime, watch: &Watch) -> Result<Report, BenchError> {
    let common = &watch.common;
    let fleet = Fleet {
        connections: common.connections,
        streams: watch.streams,
        watchers: watch.watchers,
        prefix: common.prefix.clone(),
        distinct: watch.distinct,
    };
    let write_endpoint = watch.write_endpoint.as_deref().unwrap_or(common.first_endpoint());
    let load = WatchLoad {
        endpoints: &common.endpoints,
        write_endpoint,
        fleet,
        rate: watch.rate,
        value_size: watch.value_size.0 as usize,
        manners: common.manners,
        delivery: loads::Delivery::default(),
    };
    let keys = load.fleet.keys();
    // The first write creates the key, and shows early whether the server takes writes.
    let mut filler = runtime.block_on(Filler::connect(write_endpoint))?;
    runtime.block_on(filler.fill(&Keys { count: 1, ..keys.clone() }, watch.value_size.0 as usize, |_| {}))?;
    let outcome = drive_with_bar(&load, common)?;
    tidy(runtime, common, &mut filler, &keys, false)?;
    let deliveries =
        Deliveries { expected: load.delivery.expected(load.fleet.watchers_per_write()), seen: load.delivery.seen() };
    let what = format!(
        "watch, {} streams x {} watchers each, {} writes/s of {} bytes",
        watch.streams, watch.watchers, watch.rate, watch.value_size.0
    );
    Ok(Report::new(common.describe(&what, 0), "event", &outcome, Some(deliveries)))
}

fn tidy(
    runtime: &tokio::runtime::Runtime,
    common: &Common,
    filler: &mut Filler,
    keys: &Keys,
    foreign: bool,
) -> Result<(), BenchError> {
    if !common.keep && !foreign {
        runtime.block_on(filler.clear(keys))?;
    }
    Ok(())
}

async fn fill_with_bar(filler: &mut Filler, keys: &Keys, value_size: usize) -> Result<(), BenchError> {
    let bar = bar(keys.count, "filling {wide_bar} {human_pos}/{human_len} keys");
    filler.fill(keys, value_size, |written| bar.set_position(written)).await?;
    bar.finish_and_clear();
    Ok(())
}

fn drive_with_bar(load: &impl drive::Load, common: &Common) -> Result<Outcome, DriveError> {
    const STEPS: u64 = 1000;
    let bar = bar(STEPS, "{prefix} {wide_bar} {msg} {eta}");
    bar.set_prefix("loading");
    let conduct =
        Conduct { threads: common.threads, warmup: common.warmup.0, duration: common.duration.0, pid: common.pid };
    let outcome = drive(load, conduct, |operations, over| {
        bar.set_position((over * STEPS as f64) as u64);
        bar.set_message(format!("{}", indicatif::HumanCount(operations)));
    });
    bar.finish_and_clear();
    outcome
}

/// A bar on standard error; none where nobody watches.
fn bar(length: u64, template: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(length).with_style(style)
}
