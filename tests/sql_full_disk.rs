//! A full disk: writes are refused in etcd's words and leave nothing behind, reads go on, nothing that was acknowledged is
//! lost, and writes work again once there is room.

mod sql_disk;
#[path = "support/mod.rs"]
mod support;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use millpond::{
    proto::etcdserverpb::{RangeRequest, RequestOp, TxnRequest, kv_client::KvClient, request_op::Request},
    sql::{Engine, Options, check, sqlite},
};
use rand::{SeedableRng, rngs::StdRng};
use support::{
    client::{Client, eventually, http_get},
    ports,
    process::Process,
    random::seed,
};
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::Mutex, task::JoinSet};
use tonic::{Code, transport::Channel};

const FULL: &str = "etcdserver: mvcc: database space exceeded";
const VALUE: usize = 3000;

/// For tests that limit the disk below SQLite, of which all databases of the process share one.
static DISK: Mutex<()> = Mutex::const_new(());

/// What is known of a store: the value of each key whose write was acknowledged, and those that were refused.
#[derive(Default)]
struct Known {
    acknowledged: BTreeMap<String, i64>,
    refused: Vec<String>,
}

impl Known {
    fn note(&mut self, key: &str, answer: Result<i64, tonic::Status>) {
        match answer {
            Ok(revision) => drop(self.acknowledged.insert(key.to_owned(), revision)),
            Err(status) => {
                assert_eq!((status.code(), status.message()), (Code::ResourceExhausted, FULL));
                self.refused.push(key.to_owned());
            }
        }
    }

    /// The store has what was acknowledged and nothing else.
    async fn compare(&self, client: &Client, serializable: bool) {
        let all = RangeRequest { key: "\0".into(), range_end: "\0".into(), serializable, ..Default::default() };
        let found = client.range(all).await.expect("reads go on");
        let found: BTreeMap<String, i64> =
            found.kvs.iter().map(|kv| (String::from_utf8_lossy(&kv.key).into_owned(), kv.mod_revision)).collect();
        assert_eq!(found, self.acknowledged);
    }
}

/// Two keys in one transaction, so that half of it could be there.
async fn put_pair(channel: Channel, number: usize) -> (usize, Result<i64, tonic::Status>) {
    let put = |half: &str| {
        let put = millpond::proto::etcdserverpb::PutRequest {
            key: format!("{number:05}{half}").into(),
            value: vec![b'v'; VALUE].into(),
            ..Default::default()
        };
        RequestOp { request: Some(Request::RequestPut(put)) }
    };
    let request = TxnRequest { success: vec![put("a"), put("b")], ..Default::default() };
    let answer = KvClient::new(channel).txn(request).await;
    (number, answer.map(|answer| answer.into_inner().header.expect("an answer has a header").revision))
}

/// Writes pairs, eight at a time, and notes how they went. Returns how many were refused.
async fn write_pairs(channel: &Channel, numbers: std::ops::Range<usize>, known: &mut Known) -> usize {
    let before = known.refused.len();
    let mut writes = JoinSet::new();
    for number in numbers {
        writes.spawn(put_pair(channel.clone(), number));
        if writes.len() >= 8 {
            take(writes.join_next().await, known);
        }
    }
    while !writes.is_empty() {
        take(writes.join_next().await, known);
    }
    known.refused.len() - before
}

type Written = Option<Result<(usize, Result<i64, tonic::Status>), tokio::task::JoinError>>;

fn take(written: Written, known: &mut Known) {
    let Some(Ok((number, answer))) = written else { panic!("no writer fails") };
    known.note(&format!("{number:05}a"), answer.clone());
    known.note(&format!("{number:05}b"), answer);
}

/// A client of the engine over a socket.
async fn serve(engine: &Engine) -> Client {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = Client::new(&listener.local_addr().unwrap().to_string());
    let (serving, closed) = (engine.clone(), engine.closed().clone());
    tokio::spawn(async move { serving.serve(listener, closed.cancelled_owned()).await });
    client
}

async fn compare_with(dir: &Path, known: &Known) {
    let engine = Engine::open(dir, Options::default()).unwrap();
    known.compare(&serve(&engine).await, false).await;
    engine.close().await;
    assert_eq!(check(dir).unwrap().problems, Vec::<String>::new());
}

/// Below SQLite, so it runs everywhere: files stop growing in the middle of a write, again and again, and power is cut then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_layer_without_room_refuses_writes_until_there_is_some() {
    let _alone = DISK.lock().await;
    sql_disk::install();
    let mut rng = StdRng::seed_from_u64(seed());
    let home = TempDir::new().unwrap();
    let (dir, after) = (home.path().join("store"), home.path().join("after"));
    let engine = Engine::open(&dir, Options::default()).unwrap();
    let (channel, mut known) = (serve(&engine).await.channel, Known::default());
    for round in 0..5 {
        // The room ends anywhere within a page.
        sql_disk::limit(Some(sql_disk::used() + 150_000 + round * 1111));
        let refused = write_pairs(&channel, round * 100..round * 100 + 50, &mut known).await;
        assert!(refused > 0, "there was room for everything");
        fs::create_dir_all(&after).unwrap();
        for (name, content) in sql_disk::cut(&dir, &mut rng) {
            fs::write(after.join(name), content).unwrap();
        }
        sql_disk::limit(None);
        compare_with(&after, &known).await;
        fs::remove_dir_all(&after).unwrap();
        let refused = write_pairs(&channel, round * 100 + 50..round * 100 + 60, &mut known).await;
        assert_eq!(refused, 0, "there is room again");
    }
    engine.close().await;
    compare_with(&dir, &known).await;
    let revisions: Vec<i64> = known.acknowledged.values().copied().step_by(2).collect();
    let last = revisions.iter().max().copied().unwrap_or(0);
    assert_eq!(last - 1, revisions.len() as i64, "a refused write takes no revision");
    println!("{} keys acknowledged, {} refused", known.acknowledged.len(), known.refused.len());
}

/// The files of a database as a process that is killed leaves them.
fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for name in [sqlite::FILE.to_owned(), format!("{}-wal", sqlite::FILE)] {
        fs::copy(from.join(&name), to.join(&name)).unwrap();
    }
}

/// SQLite calls that an I/O error, and has written and synced the commit before. It was there after a restart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_the_logs_index_had_no_room_for_does_not_come_back() {
    let _alone = DISK.lock().await;
    sql_disk::install();
    let home = TempDir::new().unwrap();
    let dir = home.path().join("store");
    let engine = Engine::open(&dir, Options::default()).unwrap();
    let (channel, mut known) = (serve(&engine).await.channel, Known::default());
    sql_disk::limit_index(Some(1));
    let mut number = 0;
    while known.refused.is_empty() {
        write_pairs(&channel, number..number + 1, &mut known).await;
        number += 1;
        assert!(number < 4000, "there was room for everything");
    }
    for round in 0..4 {
        let killed = home.path().join(format!("killed-{round}"));
        copy(&dir, &killed);
        sql_disk::limit_index(None);
        compare_with(&killed, &known).await;
        sql_disk::limit_index(Some(1));
        assert_eq!(write_pairs(&channel, number..number + 1, &mut known).await, 2);
        number += 1;
    }
    sql_disk::limit_index(None);
    assert_eq!(write_pairs(&channel, number..number + 50, &mut known).await, 0, "there is room again");
    engine.close().await;
    compare_with(&dir, &known).await;
}

/// It said that there was an I/O error.
#[tokio::test]
async fn a_start_without_room_for_the_logs_index_says_so() {
    let _alone = DISK.lock().await;
    sql_disk::install();
    let home = TempDir::new().unwrap();
    Engine::open(home.path(), Options::default()).unwrap().close().await;
    sql_disk::limit_index(Some(0));
    let refused = Engine::open(home.path(), Options::default()).err().map(|error| error.to_string());
    sql_disk::limit_index(None);
    assert!(refused.as_ref().is_some_and(|text| text.contains("no room on the disk")), "{refused:?}");
    Engine::open(home.path(), Options::default()).unwrap().close().await;
}

/// `millpond serve` on a small file system of its own.
struct Island {
    /// Keeps the file system while the server comes and goes.
    holder: Process,
    server: Process,
    endpoint: String,
    admin: String,
    data: PathBuf,
    home: TempDir,
}

impl Island {
    /// `None` where the system lets nobody mount a tmpfs in a namespace of their own.
    async fn start(size: &str) -> Option<Self> {
        let home = TempDir::with_prefix("millpond-full-").unwrap();
        let data = home.path().join("data");
        fs::create_dir(&data).unwrap();
        let holder = |then: &str| {
            let mut command = Command::new("unshare");
            let script = format!("mount -t tmpfs -o size=\"$0\" millpond-test \"$1\" && {then}");
            command.args(["-rm", "setpriv", "--pdeathsig", "KILL", "sh", "-c", &script, size]).arg(&data);
            command
        };
        let probe = holder("nsenter --version && setpriv --version").output();
        if !probe.as_ref().is_ok_and(|output| output.status.success()) {
            println!("skipped: a file system cannot be mounted in a namespace here: {probe:?}");
            return None;
        }
        let holder = Process::start(holder("touch \"$1/mounted\" && exec sleep 600"), &home.path().join("holder.log"));
        let (endpoint, admin) = (format!("127.0.0.1:{}", ports::free()), format!("127.0.0.1:{}", ports::free()));
        let mounted = outside(&holder, &data).join("mounted");
        eventually("the file system to be mounted", async || mounted.exists().then_some(())).await;
        let server = serve_inside(&holder, &data, &endpoint, &admin, &home);
        let mut island = Self { holder, server, endpoint, admin, data, home };
        island.ready().await;
        Some(island)
    }

    async fn ready(&mut self) {
        let (admin, server) = (&self.admin, &mut self.server);
        eventually("a server that is ready", async || {
            assert!(server.exited().is_none(), "millpond ended at its start:\n{}", server.log_tail());
            http_get(admin, "/readyz").await.ok().filter(|(status, _)| *status == 200)
        })
        .await;
    }

    /// SIGKILL, and a start on what is there.
    async fn restart(&mut self) {
        self.server.kill();
        self.server = serve_inside(&self.holder, &self.data, &self.endpoint, &self.admin, &self.home);
        self.ready().await;
    }

    fn ballast(&self) -> PathBuf {
        outside(&self.holder, &self.data).join("ballast")
    }

    /// The database and its log, where SQLite can reach them: it does not go through another's namespace.
    fn copy(&self) -> PathBuf {
        let to = self.home.path().join("copy");
        copy(&outside(&self.holder, &self.data), &to);
        to
    }

    /// Leaves not a byte.
    fn fill(&self) {
        let mut ballast = fs::File::options().create(true).append(true).open(self.ballast()).unwrap();
        for size in [1 << 16, 1 << 12, 1] {
            while std::io::Write::write(&mut ballast, &vec![0; size]).is_ok_and(|written| written == size) {}
        }
    }
}

/// A directory of the island, from outside.
fn outside(holder: &Process, dir: &Path) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root{}", holder.pid(), dir.display()))
}

fn serve_inside(holder: &Process, data: &Path, endpoint: &str, admin: &str, home: &TempDir) -> Process {
    let mut command = Command::new("nsenter");
    command
        .args(["--user", "--mount", "--preserve-credentials", "--target", &holder.pid().to_string()])
        .args(["setpriv", "--pdeathsig", "KILL", env!("CARGO_BIN_EXE_millpond"), "serve"])
        .args([format!("--listen={endpoint}"), format!("--admin-listen={admin}")])
        .arg(format!("--data-dir={}", data.display()));
    Process::start(command, &home.path().join("millpond.log"))
}

/// The whole server on a file system without a free byte, over a SIGKILL, until there is room again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_file_system_stops_writes_and_nothing_else() {
    let Some(mut island) = Island::start("12m").await else { return };
    let (client, mut known) = (Client::new(&island.endpoint), Known::default());
    assert_eq!(write_pairs(&client.channel, 0..50, &mut known).await, 0);
    island.fill();
    let refused = write_pairs(&client.channel, 50..150, &mut known).await;
    assert!(refused > 0, "there was room for everything");
    known.compare(&client, false).await;
    known.compare(&client, true).await;
    island.restart().await;
    known.compare(&client, false).await;
    island.fill();
    assert!(write_pairs(&client.channel, 150..200, &mut known).await > 0, "there was room for everything");
    fs::remove_file(island.ballast()).unwrap();
    assert_eq!(write_pairs(&client.channel, 200..250, &mut known).await, 0, "there is room again");
    known.compare(&client, false).await;
    island.restart().await;
    known.compare(&client, false).await;
    island.server.kill();
    // What another test does to disks holds within this process.
    let _alone = DISK.lock().await;
    assert_eq!(check(&island.copy()).unwrap().problems, Vec::<String>::new());
    println!("{} keys acknowledged, {} refused", known.acknowledged.len(), known.refused.len());
}
