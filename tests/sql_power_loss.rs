//! Power is cut below SQLite: of what was not synced, a random part reaches the disk, torn at sectors. Whatever the store had
//! acknowledged must be there afterwards, whole, and the file must be sound.

mod sql_disk;

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use millpond::{
    proto::etcdserverpb::{RangeRequest, RequestOp, TxnRequest, kv_client::KvClient, request_op::Request},
    sql::{Engine, Options, check, sqlite},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{net::TcpListener, task::JoinSet};
use tonic::transport::{Channel, Endpoint};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const WRITERS: usize = 8;
const CUTS: u64 = 25;
/// Acknowledged transactions without which the cuts have met too little.
const ENOUGH: u64 = 500;

/// For each writer, the last number that was acknowledged and the last that was sent.
type Numbers = Arc<Mutex<[(u64, u64); WRITERS]>>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_a_power_cut() -> Result {
    sql_disk::install();
    let seed = std::env::var("MILLPOND_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    println!("MILLPOND_TEST_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let home = tempfile::tempdir()?;
    let mut total = 0;
    // A slow disk takes more of them until there was load enough.
    for cut in 0.. {
        if cut >= CUTS && total > ENOUGH {
            break;
        }
        assert!(cut < 20 * CUTS, "the load is too light to mean anything: {total} writes");
        let (before, after) = (home.path().join(format!("{cut}")), home.path().join(format!("{cut}-after")));
        let load = Duration::from_millis(rng.random_range(5..150));
        let (acknowledged, sent) = run_until_cut(&before, &after, load, &mut rng).await?;
        total += acknowledged.iter().sum::<u64>();
        verify(&after, &acknowledged, &sent).await.map_err(|error| format!("cut {cut}: {error}"))?;
    }
    println!("at least {CUTS} cuts, {total} acknowledged transactions");
    Ok(())
}

/// Writes for a while, then cuts the power. Returns the numbers that were acknowledged before, and that may have been sent.
async fn run_until_cut(
    before: &Path,
    after: &Path,
    load: Duration,
    rng: &mut StdRng,
) -> Result<([u64; WRITERS], [u64; WRITERS])> {
    let engine = Engine::open(before, Options::default())?;
    let channel = serve(&engine).await?;
    let numbers = Numbers::default();
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        writers.spawn(write(channel.clone(), writer, numbers.clone()));
    }
    tokio::time::sleep(load).await;
    let acknowledged = numbers.lock().map_err(|error| error.to_string())?.map(|(acknowledged, _)| acknowledged);
    std::fs::create_dir(after)?;
    for (name, content) in sql_disk::cut(before, rng) {
        std::fs::write(after.join(name), content)?;
    }
    let sent = numbers.lock().map_err(|error| error.to_string())?.map(|(_, sent)| sent);
    writers.shutdown().await;
    engine.close().await;
    Ok((acknowledged, sent))
}

async fn serve(engine: &Engine) -> Result<Channel> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let endpoint = Endpoint::from_shared(format!("http://{}", listener.local_addr()?))?;
    let (serving, closed) = (engine.clone(), engine.closed().clone());
    tokio::spawn(async move { serving.serve(listener, closed.cancelled_owned()).await });
    Ok(endpoint.connect_lazy())
}

/// Writes the same growing number to two keys at a time, with ballast that spans pages.
async fn write(channel: Channel, writer: usize, numbers: Numbers) -> Result {
    let mut kv = KvClient::new(channel);
    for number in 1.. {
        numbers.lock().map_err(|error| error.to_string())?[writer].1 = number;
        let put = |key: &str| {
            let value = format!("{number} {}", "ballast".repeat(number as usize % 1500));
            let key = format!("{writer}/{key}");
            let put = millpond::proto::etcdserverpb::PutRequest {
                key: key.into(),
                value: value.into(),
                ..Default::default()
            };
            RequestOp { request: Some(Request::RequestPut(put)) }
        };
        let request = TxnRequest { success: vec![put("a"), put("b")], ..Default::default() };
        if kv.txn(request).await.is_err() {
            return Ok(());
        }
        numbers.lock().map_err(|error| error.to_string())?[writer].0 = number;
    }
    Ok(())
}

async fn verify(dir: &Path, acknowledged: &[u64; WRITERS], sent: &[u64; WRITERS]) -> Result {
    if !dir.join(sqlite::FILE).exists() {
        assert_eq!(*acknowledged, [0; WRITERS], "nothing reached the disk");
        return Ok(());
    }
    let engine = Engine::open(dir, Options::default())?;
    let mut kv = KvClient::new(serve(&engine).await?).max_decoding_message_size(usize::MAX);
    let everything = bytes::Bytes::from_static(b"\0");
    let request = RangeRequest { key: everything.clone(), range_end: everything, ..Default::default() };
    let found = kv.range(request).await?.into_inner();
    let number = |key: String| -> Result<u64> {
        let Some(kv) = found.kvs.iter().find(|kv| kv.key == key) else { return Ok(0) };
        Ok(std::str::from_utf8(&kv.value)?.split(' ').next().unwrap_or_default().parse()?)
    };
    for writer in 0..WRITERS {
        let (a, b) = (number(format!("{writer}/a"))?, number(format!("{writer}/b"))?);
        assert_eq!(a, b, "half a transaction of writer {writer}");
        assert!(
            (acknowledged[writer]..=sent[writer]).contains(&a),
            "writer {writer} lost writes: {a}, acknowledged {acknowledged:?}"
        );
    }
    engine.close().await;
    assert_eq!(check(dir)?.problems, Vec::<String>::new());
    Ok(())
}
