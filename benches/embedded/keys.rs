//! A store of a million keys: how long it takes to start, and how large it is on disk and in memory.

use std::{env, fs, path::Path, time::Instant};

use bytes::Bytes;
use millpond::{
    proto::etcdserverpb::{PutRequest, RangeRequest, kv_client::KvClient},
    sql::{Engine, Options, Transaction, sqlite},
};
use tokio::{net::TcpListener, runtime::Runtime};

use super::{
    Outcome,
    load::{VALUE, Work, judge, load},
    servers::{Server, System, scratch},
};

const KEYS: u64 = 1_000_000;

/// Puts that share a commit while a store is filled.
const BATCH: u64 = 1000;

const MIB: f64 = (1 << 20) as f64;

fn key(number: u64) -> Bytes {
    Bytes::from(format!("/registry/pods/{number:08}"))
}

/// Fills the store in `dir`: every key once, in no order, and then again as often as said, each put with a revision of its own.
pub async fn fill(dir: &Path, keys: u64, overwrites: u64) -> Outcome<()> {
    let engine = Engine::open(dir, Options { quota_bytes: 0, ..Options::default() })?;
    for first in (0..keys * (1 + overwrites)).step_by(BATCH as usize) {
        let put_all = move |transaction: &mut Transaction<'_>| {
            for number in first..first + BATCH {
                let key = key(number.wrapping_mul(7_654_321) % keys);
                transaction.put(PutRequest { key, value: vec![7; VALUE].into(), ..Default::default() })?;
            }
            Ok(())
        };
        engine.write(0, put_all).await?;
    }
    engine.close().await;
    Ok(())
}

/// Fills, compacts, and measures.
pub fn run() -> Outcome<()> {
    let home = scratch()?;
    let runtime = Runtime::new()?;
    let data = home.path().join("data");
    let started = Instant::now();
    runtime.block_on(fill(&data, KEYS, 0))?;
    println!("filled in {:.1} s", started.elapsed().as_secs_f64());
    runtime.block_on(compact(&data))?;
    let size = fs::metadata(data.join(sqlite::FILE))?.len() as f64;
    let payload = (KEYS * (VALUE + key(0).len()) as u64) as f64;
    println!("{:.0} MiB of keys and values, {:.0} MiB on disk", payload / MIB, size / MIB);
    judge("the file over keys and values, compacted and checkpointed", size / payload, 2.0, false);
    start(home.path(), &runtime)?;
    engine(home.path(), &runtime)
}

/// Compacts to the newest revision; closing writes everything into the one file.
async fn compact(dir: &Path) -> Outcome<()> {
    let engine = Engine::open(dir, Options { quota_bytes: 0, ..Options::default() })?;
    let revision = engine.state().position().current;
    engine.write(0, move |transaction| transaction.compact(revision)).await?;
    engine.compaction_finished(revision).await?;
    engine.close().await;
    Ok(())
}

/// From the start of the process to its first answer and to a warm cache.
fn start(home: &Path, runtime: &Runtime) -> Outcome<()> {
    let started = Instant::now();
    let mut server = Server::launch(System::Millpond, home)?;
    server.wait(|server| runtime.block_on(one_key(&server.endpoint)).is_ok())?;
    judge("seconds to the first answer", started.elapsed().as_secs_f64(), 1.0, false);
    server.wait(|server| server.get("/health").is_ok_and(|body| body.contains("\"cache_warm\":true")))?;
    judge("seconds to a warm cache", started.elapsed().as_secs_f64(), 10.0, false);
    println!("resident memory with the cache: {:.0} MiB", server.resident()? as f64 / MIB);
    Ok(())
}

async fn one_key(endpoint: &str) -> Outcome<()> {
    let request = RangeRequest { key: key(1), ..Default::default() };
    let found = KvClient::connect(format!("http://{endpoint}")).await?.range(request).await?.into_inner();
    if found.count == 1 { Ok(()) } else { Err("the key is not there".into()) }
}

/// The engine's own memory, after everything was read and some of it written.
fn engine(home: &Path, runtime: &Runtime) -> Outcome<()> {
    let server = Server::start(System::Engine, home)?;
    let idle = server.resident()?;
    let started = Instant::now();
    let listed = runtime.block_on(list(&server.endpoint))?;
    println!("{listed} keys listed by pages of 10,000 in {:.1} s", started.elapsed().as_secs_f64());
    let read = server.resident()?;
    load(&server, Work::Puts(KEYS), (10, 10), std::time::Duration::from_secs(3))?;
    let written = server.resident()?;
    let [idle, read, written] = [idle, read, written].map(|bytes| bytes as f64 / MIB);
    println!(
        "resident memory of the engine alone: {idle:.0} MiB idle, {read:.0} after the list, {written:.0} after puts"
    );
    println!("of which its page cache may take {} MiB", Options::default().cache_bytes >> 20);
    Ok(())
}

async fn list(endpoint: &str) -> Outcome<usize> {
    let mut kv = KvClient::connect(format!("http://{endpoint}")).await?.max_decoding_message_size(usize::MAX);
    let (mut next, mut listed) = (Bytes::from_static(b"\0"), 0);
    loop {
        let range_end = Bytes::from_static(b"\0");
        let page = RangeRequest { key: next, range_end, limit: 10_000, ..Default::default() };
        let page = kv.range(page).await?.into_inner();
        listed += page.kvs.len();
        let Some(last) = page.kvs.last().filter(|_| page.more) else { return Ok(listed) };
        next = [&last.key[..], &[0]].concat().into();
    }
}

/// What the process of [`System::Engine`] does: serves the store in `dir` alone.
pub fn serve_engine(dir: &Path) -> Outcome<()> {
    Runtime::new()?.block_on(async {
        let engine = Engine::open(dir, Options::default())?;
        let listener = TcpListener::bind(env::var("MILLPOND_BENCH_LISTEN")?).await?;
        Ok(engine.serve(listener, std::future::pending()).await?)
    })
}
