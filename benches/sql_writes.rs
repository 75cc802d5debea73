//! The SQL engine's writes next to an etcd's, both durable, from the same clients over loopback TCP.
//!
//! `cargo bench --bench sql_writes` measures the engine alone; with `MILLPOND_BENCH_ETCD=/path/to/etcd` also that etcd.
//! `MILLPOND_BENCH_SECONDS` sets how long each row runs, `MILLPOND_BENCH_DIR` where the data goes.

use std::{
    env,
    error::Error,
    future::Future,
    net::TcpListener as StdListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use millpond::{
    proto::etcdserverpb::{
        Compare, PutRequest, RangeRequest, RequestOp, TxnRequest, compare::TargetUnion, kv_client::KvClient,
        request_op::Request,
    },
    sql::{Engine, Options},
};
use tokio::{net::TcpListener, runtime::Runtime};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

type Result<T = ()> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const VALUE: usize = 512;
const KEYS: u64 = 100_000;
const CONNECTIONS: usize = 10;

fn main() -> Result {
    // Run by `cargo test --benches`, there is nothing to measure.
    if env::args().any(|argument| argument == "--test") {
        return Ok(());
    }
    if let Some(keys) = env::var("MILLPOND_BENCH_KEYS").ok().and_then(|text| text.parse().ok()) {
        return Runtime::new()?.block_on(many_keys(keys));
    }
    println!("| server | work | in flight | per second | p50 | p99 |\n|---|---|---|---|---|---|");
    engine()?;
    if let Ok(etcd) = env::var("MILLPOND_BENCH_ETCD") {
        peer(&etcd)?;
    }
    Ok(())
}

/// Fills a store with keys, and tells what it takes on disk, in memory and to start.
async fn many_keys(keys: u64) -> Result {
    let dir = scratch()?;
    let engine = Engine::open(dir.path(), Options { quota_bytes: 0, ..Options::default() })?;
    let start = Instant::now();
    for first in (0..keys).step_by(1000) {
        let numbers = first..keys.min(first + 1000);
        let fill = move |transaction: &mut millpond::sql::Transaction<'_>| {
            for number in numbers {
                // In no order, as keys come.
                let key = key(number.wrapping_mul(7_654_321) % keys);
                transaction.put(PutRequest { key, value: vec![7; VALUE].into(), ..Default::default() })?;
            }
            Ok(())
        };
        engine.write(0, fill).await?;
    }
    let filled = start.elapsed();
    engine.close().await;
    let size = std::fs::metadata(dir.path().join(millpond::sql::sqlite::FILE))?.len();
    let payload = keys * (VALUE as u64 + key(0).len() as u64);
    println!(
        "{keys} keys: filled in {filled:.1?}, {size} bytes, {:.2} of keys and values",
        size as f64 / payload as f64
    );
    let start = Instant::now();
    let engine = Engine::open(dir.path(), Options::default())?;
    let mut kv = KvClient::new(in_process(&engine)?).max_decoding_message_size(usize::MAX);
    kv.range(RangeRequest { key: key(1), ..Default::default() }).await?;
    println!("first answer after {:.1?}", start.elapsed());
    let mut next = bytes::Bytes::from_static(b"\0");
    let (end, start, mut read) = (next.clone(), Instant::now(), 0);
    let request = RangeRequest { range_end: end, limit: 10_000, ..Default::default() };
    loop {
        let page = kv.range(RangeRequest { key: next, ..request.clone() }).await?.into_inner();
        read += page.kvs.len();
        let Some(last) = page.kvs.last().filter(|_| page.more) else { break };
        next = [&last.key[..], &[0]].concat().into();
    }
    println!("{read} keys listed in {:.1?}", start.elapsed());
    let start = Instant::now();
    let mut stream = kv
        .range_stream(RangeRequest {
            key: b"\0".to_vec().into(),
            range_end: b"\0".to_vec().into(),
            ..Default::default()
        })
        .await?
        .into_inner();
    let mut streamed = 0;
    while let Some(part) = stream.message().await? {
        streamed += part.range_response.map_or(0, |part| part.kvs.len());
    }
    println!("{streamed} keys streamed in {:.1?}", start.elapsed());
    engine.close().await;
    Ok(())
}

/// A connection to the engine's gRPC face over loopback.
fn in_process(engine: &Engine) -> Result<Channel> {
    let listener = StdListener::bind("127.0.0.1:0")?;
    listener.set_nonblocking(true)?;
    let endpoint = Endpoint::from_shared(format!("http://{}", listener.local_addr()?))?;
    let (serving, listener) = (engine.clone(), TcpListener::from_std(listener)?);
    let closed = engine.closed().clone();
    tokio::spawn(async move { serving.serve(listener, closed.cancelled_owned()).await });
    Ok(endpoint.initial_stream_window_size(1 << 22).initial_connection_window_size(1 << 24).connect_lazy())
}

fn seconds() -> u64 {
    env::var("MILLPOND_BENCH_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(5)
}

fn scratch() -> Result<tempfile::TempDir> {
    let parent = env::var("MILLPOND_BENCH_DIR").map_or_else(|_| env::temp_dir(), PathBuf::from);
    Ok(tempfile::tempdir_in(parent)?)
}

fn engine() -> Result {
    let dir = scratch()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("engine").build()?;
    let (engine, address) = runtime.block_on(async {
        let engine = Engine::open(dir.path(), Options::default())?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let serving = engine.clone();
        tokio::spawn(async move { serving.serve(listener, std::future::pending()).await });
        Result::Ok((engine, address))
    })?;
    Runtime::new()?.block_on(rows("millpond", &address))?;
    runtime.block_on(engine.close());
    Ok(())
}

/// An etcd that ends with the benchmark.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        if self.0.kill().is_ok() {
            let _ = self.0.wait();
        }
    }
}

fn peer(etcd: &str) -> Result {
    let dir = scratch()?;
    let port = || Ok::<_, std::io::Error>(StdListener::bind("127.0.0.1:0")?.local_addr()?.port());
    let (client, peer) = (port()?, port()?);
    let url = format!("http://127.0.0.1:{client}");
    let _peer = Peer(
        Command::new(etcd)
            .arg(format!("--data-dir={}", dir.path().display()))
            .args([format!("--listen-client-urls={url}"), format!("--advertise-client-urls={url}")])
            .args([format!("--listen-peer-urls=http://127.0.0.1:{peer}")])
            .args([format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}")])
            .args([format!("--initial-cluster=default=http://127.0.0.1:{peer}"), "--log-level=error".to_owned()])
            .stderr(Stdio::null())
            .spawn()?,
    );
    Runtime::new()?.block_on(rows("etcd", &format!("127.0.0.1:{client}")))
}

async fn rows(server: &str, address: &str) -> Result {
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?;
        clients.push(KvClient::new(connected(&endpoint).await?));
    }
    for in_flight in [100, 1] {
        measure(server, "put", in_flight, &clients, put).await?;
    }
    measure(server, "guarded update", 100, &clients, update).await
}

async fn connected(endpoint: &Endpoint) -> Result<Channel> {
    let start = Instant::now();
    loop {
        let channel = endpoint.connect_lazy();
        let ready = KvClient::new(channel.clone()).range(RangeRequest { key: "a".into(), ..Default::default() }).await;
        match ready {
            Ok(_) => return Ok(channel),
            Err(error) if start.elapsed() > Duration::from_secs(20) => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn measure<F, Fut>(server: &str, work: &str, in_flight: usize, clients: &[KvClient<Channel>], call: F) -> Result
where
    F: Fn(KvClient<Channel>, u64) -> Fut + Copy + Send + 'static,
    Fut: Future<Output = std::result::Result<(), Status>> + Send,
{
    let numbers = Arc::new(AtomicU64::new(0));
    let (start, end) = (Instant::now(), Duration::from_secs(seconds()));
    let mut tasks = tokio::task::JoinSet::new();
    for (_, client) in (0..in_flight).zip(clients.iter().cycle()) {
        let (client, numbers) = (client.clone(), numbers.clone());
        tasks.spawn(async move {
            let mut latencies =
                Histogram::<u64>::new_with_max(60_000_000, 3).map_err(|error| Status::internal(error.to_string()))?;
            while start.elapsed() < end {
                let sent = Instant::now();
                let number = numbers.fetch_add(1, Ordering::Relaxed);
                call(client.clone(), number.wrapping_mul(7919) % KEYS).await?;
                latencies.saturating_record(u64::try_from(sent.elapsed().as_micros()).unwrap_or(u64::MAX));
            }
            Ok::<_, Status>(latencies)
        });
    }
    let mut all = Histogram::<u64>::new_with_max(60_000_000, 3)?;
    while let Some(latencies) = tasks.join_next().await {
        all.add(latencies??)?;
    }
    let rate = all.len() as f64 / start.elapsed().as_secs_f64();
    let (p50, p99) = (all.value_at_quantile(0.5), all.value_at_quantile(0.99));
    println!("| {server} | {work} | {in_flight} | {rate:.0} | {p50} µs | {p99} µs |");
    Ok(())
}

fn key(number: u64) -> bytes::Bytes {
    format!("/registry/pods/default/pod-{number:08}").into()
}

async fn put(mut client: KvClient<Channel>, number: u64) -> std::result::Result<(), Status> {
    client.put(PutRequest { key: key(number), value: vec![7; VALUE].into(), ..Default::default() }).await.map(drop)
}

/// Kubernetes' update: read, then put if unchanged.
async fn update(mut client: KvClient<Channel>, number: u64) -> std::result::Result<(), Status> {
    let get = RangeRequest { key: key(number), serializable: true, ..Default::default() };
    let found = client.range(get.clone()).await?.into_inner();
    let revision = found.kvs.first().map_or(0, |kv| kv.mod_revision);
    let union = Some(TargetUnion::ModRevision(revision));
    let compare = Compare { target: 2, key: key(number), target_union: union, ..Default::default() };
    let put = PutRequest { key: key(number), value: vec![8; VALUE].into(), ..Default::default() };
    let op = |request| RequestOp { request: Some(request) };
    let request = TxnRequest {
        compare: vec![compare],
        success: vec![op(Request::RequestPut(put))],
        failure: vec![op(Request::RequestRange(get))],
    };
    client.txn(request).await.map(drop)
}
