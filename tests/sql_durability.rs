//! Acknowledged writes survive `kill -9`: a child process serves a store under load, is killed again and again, and after
//! each restart everything that it had acknowledged is there, nothing is half there, and watchers go on without a gap.

use std::{
    collections::BTreeMap,
    env,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use millpond::{
    proto::{
        etcdserverpb::{
            DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, WatchCreateRequest, WatchRequest,
            kv_client::KvClient, request_op::Request, watch_client::WatchClient, watch_request::RequestUnion,
        },
        mvccpb::Event,
    },
    sql::{Engine, Options, check},
};
use rand::RngExt;
use rustix::process::{Signal, set_parent_process_death_signal};
use tokio::{net::TcpListener, runtime::Runtime, sync::mpsc, task::JoinSet};
use tonic::transport::{Channel, Endpoint};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const CHILD: &str = "MILLPOND_SQL_CHILD";
const WRITERS: usize = 16;
const KILLS: usize = 8;

/// The test, and in the child that it starts, the server.
#[test]
fn acknowledged_writes_survive_kill_9() -> Result {
    match env::var(CHILD) {
        Ok(dir) => serve(Path::new(&dir)),
        Err(_) => Runtime::new()?.block_on(kill_and_verify()),
    }
}

fn serve(dir: &Path) -> Result {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    Runtime::new()?.block_on(async {
        let engine = Engine::open(dir, Options::default())?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        println!("\nlistening {}", listener.local_addr()?);
        Ok(engine.serve(listener, std::future::pending()).await?)
    })
}

/// A child that serves the store; it dies with the test.
struct Server {
    child: Child,
    channel: Channel,
}

impl Server {
    fn start(dir: &Path) -> Result<Self> {
        let mut child = Command::new(env::current_exe()?)
            .args(["--exact", "acknowledged_writes_survive_kill_9", "--nocapture"])
            .env(CHILD, dir)
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
        let mut addresses =
            lines.map_while(std::io::Result::ok).filter_map(|line| Some(line.strip_prefix("listening ")?.to_owned()));
        let Some(address) = addresses.next() else {
            child.kill()?;
            return Err("the server did not start".into());
        };
        let channel = Endpoint::from_shared(format!("http://{address}"))?.connect_lazy();
        Ok(Self { child, channel })
    }

    fn kill(&mut self) -> Result {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("the server could not be killed: {error}");
        }
    }
}

/// What one writer has sent and what was acknowledged.
#[derive(Clone, Copy, Debug, Default)]
struct Writer {
    sent: u64,
    acknowledged: u64,
}

/// What the test knows of the store.
#[derive(Default)]
struct Known {
    writers: [Writer; WRITERS],
    /// Acknowledged revisions, with the writer and number that each carries.
    revisions: BTreeMap<i64, (usize, u64)>,
    /// Everything that the watch has seen.
    events: Vec<Event>,
}

async fn kill_and_verify() -> Result {
    let dir = tempfile::tempdir()?;
    let known = Arc::new(Mutex::new(Known::default()));
    for _ in 0..KILLS {
        let mut server = Server::start(dir.path())?;
        verify(&server, &known).await?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut load = JoinSet::new();
        for writer in 0..WRITERS {
            load.spawn(write(server.channel.clone(), writer, known.clone(), stop.clone()));
        }
        load.spawn(follow(server.channel.clone(), known.clone()));
        tokio::time::sleep(Duration::from_millis(rand::rng().random_range(50..400))).await;
        server.kill()?;
        stop.store(true, Ordering::Relaxed);
        while let Some(result) = load.join_next().await {
            result??;
        }
        let report = check(dir.path())?;
        assert_eq!(report.problems, Vec::<String>::new());
    }
    let server = Server::start(dir.path())?;
    verify(&server, &known).await?;
    compare_histories(&server, &known).await
}

/// Writes until the server is gone: in turn a put, a transaction over three keys, and a deletion with a put.
async fn write(channel: Channel, writer: usize, known: Arc<Mutex<Known>>, stop: Arc<AtomicBool>) -> Result {
    let mut kv = KvClient::new(channel);
    while !stop.load(Ordering::Relaxed) {
        let number = {
            let mut known = known.lock().map_err(|error| error.to_string())?;
            known.writers[writer].sent += 1;
            known.writers[writer].sent
        };
        let success = operations(writer, number);
        let Ok(answer) = kv.txn(TxnRequest { success, ..Default::default() }).await else { return Ok(()) };
        let revision = answer.into_inner().header.ok_or("no header")?.revision;
        let mut known = known.lock().map_err(|error| error.to_string())?;
        known.writers[writer].acknowledged = number;
        let before = known.revisions.insert(revision, (writer, number));
        assert_eq!(before, None, "revision {revision} was given twice");
    }
    Ok(())
}

fn operations(writer: usize, number: u64) -> Vec<RequestOp> {
    let put = |key: String| {
        let value = number.to_string().into();
        RequestOp { request: Some(Request::RequestPut(PutRequest { key: key.into(), value, ..Default::default() })) }
    };
    let mut operations: Vec<RequestOp> = ["a", "b", "c"].map(|part| put(format!("w{writer:02}/{part}"))).into();
    let temporary = format!("x{writer:02}");
    operations.push(if number.is_multiple_of(2) {
        let delete = DeleteRangeRequest { key: temporary.into(), ..Default::default() };
        RequestOp { request: Some(Request::RequestDeleteRange(delete)) }
    } else {
        put(temporary)
    });
    operations
}

/// Watches on from what has been seen, until the server is gone.
async fn follow(channel: Channel, known: Arc<Mutex<Known>>) -> Result {
    let next = {
        let known = known.lock().map_err(|error| error.to_string())?;
        known.events.last().map_or(2, |event| revision(event) + 1)
    };
    // The server may go before the watch is open.
    let Ok((_requests, mut responses)) = watch(channel, next).await else { return Ok(()) };
    while let Ok(Some(response)) = responses.message().await {
        known.lock().map_err(|error| error.to_string())?.events.extend(response.events);
    }
    Ok(())
}

type Watching = (mpsc::Sender<WatchRequest>, tonic::Streaming<millpond::proto::etcdserverpb::WatchResponse>);

async fn watch(channel: Channel, start_revision: i64) -> Result<Watching> {
    let (requests, receiver) = mpsc::channel(1);
    let everything = bytes::Bytes::from_static(b"\0");
    let create =
        WatchCreateRequest { key: everything.clone(), range_end: everything, start_revision, ..Default::default() };
    requests.send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }).await?;
    let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut client = WatchClient::new(channel).max_decoding_message_size(usize::MAX);
    Ok((requests, client.watch(stream).await?.into_inner()))
}

fn revision(event: &Event) -> i64 {
    event.kv.as_ref().map_or(0, |kv| kv.mod_revision)
}

/// Every acknowledged write is there, and every transaction whole.
async fn verify(server: &Server, known: &Mutex<Known>) -> Result {
    let request = RangeRequest { key: "w".into(), range_end: "y".into(), ..Default::default() };
    let found = KvClient::new(server.channel.clone()).range(request).await?.into_inner();
    let values: BTreeMap<String, u64> = found
        .kvs
        .iter()
        .map(|kv| Ok((String::from_utf8(kv.key.to_vec())?, String::from_utf8(kv.value.to_vec())?.parse()?)))
        .collect::<Result<_>>()?;
    let mut known = known.lock().map_err(|error| error.to_string())?;
    let current = found.header.ok_or("no header")?.revision;
    assert!(known.revisions.last_key_value().is_none_or(|(last, _)| *last <= current), "revisions went back");
    for (number, writer) in known.writers.iter_mut().enumerate() {
        let parts = ["a", "b", "c"].map(|part| values.get(&format!("w{number:02}/{part}")).copied().unwrap_or(0));
        assert!(parts.iter().all(|part| *part == parts[0]), "half a transaction of writer {number}: {parts:?}");
        assert!((writer.acknowledged..=writer.sent).contains(&parts[0]), "{writer:?} and the store has {parts:?}");
        assert_eq!(values.contains_key(&format!("x{number:02}")), !parts[0].is_multiple_of(2));
        writer.acknowledged = parts[0];
        writer.sent = parts[0];
    }
    Ok(())
}

/// What was watched over all the kills is what a watch from the beginning shows now, and each acknowledged revision is the
/// write that it was given for.
async fn compare_histories(server: &Server, known: &Mutex<Known>) -> Result {
    let request = RangeRequest { key: "a".into(), ..Default::default() };
    let current = KvClient::new(server.channel.clone()).range(request).await?.into_inner().header.ok_or("no header")?;
    let (_requests, mut responses) = watch(server.channel.clone(), 2).await?;
    let mut history: Vec<Event> = Vec::new();
    while history.last().map_or(0, revision) < current.revision {
        history.extend(responses.message().await?.ok_or("the watch ended")?.events);
    }
    let known = known.lock().map_err(|error| error.to_string())?;
    assert!(known.events.len() > 100 && known.revisions.len() > 100, "the load was too light to mean anything");
    assert_eq!(known.events[..], history[..known.events.len()]);
    for (revision, (writer, number)) in &known.revisions {
        let key = format!("w{writer:02}/a");
        let events = history.iter().filter_map(|event| event.kv.as_ref()).filter(|kv| kv.mod_revision == *revision);
        let values: Vec<_> = events.filter(|kv| kv.key == key).map(|kv| kv.value.clone()).collect();
        assert_eq!(values, [number.to_string()], "revision {revision}");
    }
    println!("{KILLS} kills, {} acknowledged revisions, {} events", known.revisions.len(), history.len());
    Ok(())
}
