//! Puts while a million revisions are compacted, against puts in quiet.

use std::{thread, time::Duration};

use bytes::Bytes;
use millpond::{
    cli::bench::report::Report,
    proto::etcdserverpb::{CompactionRequest, RangeRequest, kv_client::KvClient},
};
use tokio::runtime::Runtime;

use super::{
    Outcome,
    keys::fill,
    load::{Work, judge, load},
    servers::{Server, System, scratch},
};

/// Each key is put this often once more, all of which becomes superfluous.
const KEYS: u64 = 100_000;
const OVERWRITES: u64 = 10;

/// As many clients as a store of this size may have at once.
const IN_FLIGHT: (usize, usize) = (10, 1);

const TURN: Duration = Duration::from_secs(3);

/// Fills, measures, compacts, measures again.
pub fn run() -> Outcome<()> {
    let home = scratch()?;
    let runtime = Runtime::new()?;
    runtime.block_on(fill(&home.path().join("data"), KEYS, OVERWRITES))?;
    let server = Server::start(System::Millpond, home.path())?;
    let turn = || load(&server, Work::Puts(KEYS), IN_FLIGHT, TURN);
    let mut quiet = vec![turn()?, turn()?];
    let compacting = thread::spawn({
        let endpoint = server.endpoint.clone();
        move || compact(&endpoint)
    });
    let mut during = Vec::new();
    while !compacting.is_finished() {
        during.push(turn()?);
    }
    let (removed, took) = compacting.join().map_err(|_| "the compaction panicked")??;
    // The last turn may have gone on after the compaction had ended.
    during.truncate(during.len().saturating_sub(1).max(1));
    quiet.push(turn()?);
    println!("| puts, 10 in flight | per second | p50 | p99 | longest |\n|---|---|---|---|---|");
    quiet.iter().for_each(|report| print("in quiet", report));
    during.iter().for_each(|report| print("while compacting", report));
    println!("{removed} revisions compacted in {took:.1} s");
    let ratio = middle_p99(&mut during) / middle_p99(&mut quiet);
    judge("p99 while compacting over p99 in quiet, of the middle turns", ratio, 5.0, false);
    Ok(())
}

fn middle_p99(reports: &mut [Report]) -> f64 {
    reports.sort_by_key(|report| report.latency_micros.p99);
    reports.get(reports.len() / 2).map_or(f64::NAN, |report| report.latency_micros.p99.max(1) as f64)
}

fn print(when: &str, report: &Report) {
    let l = report.latency_micros;
    println!("| {when} | {:.0} | {} µs | {} µs | {} µs |", report.rate, l.p50, l.p99, l.max);
}

/// Compacts everything there is, and waits until it has been removed. How many revisions, and the seconds.
fn compact(endpoint: &str) -> Outcome<(i64, f64)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut kv = KvClient::connect(format!("http://{endpoint}")).await?;
        let newest = RangeRequest { key: Bytes::from_static(b"\0"), ..Default::default() };
        let revision = kv.range(newest).await?.into_inner().header.ok_or("no header")?.revision;
        let start = std::time::Instant::now();
        kv.compact(CompactionRequest { revision, physical: true }).await?;
        Ok((revision, start.elapsed().as_secs_f64()))
    })
}
