//! A session with etcdctl 3.7 through the server under test: what it prints must be what it prints against etcd.

mod support;

use rustix::process::Signal;
use serde_json::Value;
use support::{client::PATIENCE, etcdctl::Etcdctl, millpond::breathe, subject::Twins, toolchain::Release};

/// etcdctl pointed at both servers.
struct Session {
    twins: Twins,
    reference: Etcdctl,
    subject: Etcdctl,
}

impl Session {
    async fn start() -> Self {
        let twins = Twins::start(&Release::newest()).await;
        let reference = Etcdctl::new(&twins.reference.endpoint(0));
        let subject = Etcdctl::new(&twins.subject.endpoint());
        Self { twins, reference, subject }
    }

    /// Runs a command against both; what they agree on.
    async fn both(&self, line: &str) -> String {
        self.both_with(line, "").await
    }

    async fn both_with(&self, line: &str, input: &str) -> String {
        let arguments: Vec<&str> = line.split_whitespace().collect();
        let expected = self.reference.outcome(&arguments, input).await;
        let found = self.subject.outcome(&arguments, input).await;
        assert_eq!(found, expected, "etcdctl {line}");
        expected.1
    }

    /// Runs a command against the server under test only.
    async fn subject(&self, line: &str) -> String {
        self.subject.run(&line.split_whitespace().collect::<Vec<_>>()).await
    }

    async fn subject_json(&self, line: &str) -> Value {
        let text = self.subject(&format!("{line} -w json")).await;
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("etcdctl {line}: {error}: {text}"))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_put_read_and_deleted() {
    let mut session = Session::start().await;
    for line in ["put a/1 one", "put a/2 two", "put a/3 three", "put b x --prev-kv", "put b y --prev-kv"] {
        session.both(line).await;
    }
    for line in [
        "get a/1",
        "get a/1 -w json",
        "get a/ --prefix -w json",
        "get a/ --prefix --keys-only",
        "get a/ --prefix --count-only -w fields",
        "get a/1 a/3",
        "get a/2 --from-key -w json",
        "get a/ --prefix --limit=2 -w json",
        "get a/ --prefix --order=DESCEND",
        "get a/ --prefix --sort-by=VALUE --order=ASCEND",
        "get a/ --prefix --sort-by=CREATE --order=DESCEND -w json",
        "get b --rev=5 -w json",
        "get b --rev=4 -w json",
        "get b --rev=1000",
        "get b --consistency=s -w json",
        "get missing -w json",
        "get a/ --prefix --min-mod-rev=3 --max-create-rev=3 -w json",
        "del a/1 --prev-kv",
        "del a/ --prefix",
        "del missing",
        "get a/ --prefix -w json",
    ] {
        session.both(line).await;
    }
    assert_eq!(session.both("get b").await, "b\ny\n");
    session.twins.subject.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_compactions_and_errors_read_the_same() {
    let session = Session::start().await;
    session.both("put k v1").await;
    let guarded = "value(\"k\") = \"v1\"\n\nput k v2\nget k\n\nget k\n\n";
    assert!(session.both_with("txn", guarded).await.starts_with("SUCCESS"));
    assert!(session.both_with("txn", guarded).await.starts_with("FAILURE"));
    session.both_with("txn -w json", "mod(\"k\") > \"0\"\nversion(\"k\") < \"100\"\n\ndel k\nput m n\n\n\n").await;
    for number in 0..5 {
        session.both(&format!("put k {number}")).await;
    }
    for line in
        ["compaction 5", "compaction 5", "compaction 500", "get k --rev=3", "get k --rev=5", "compaction 7 --physical"]
    {
        session.both(line).await;
    }
    assert!(session.both("get k --rev=2").await.contains("required revision has been compacted"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_show_the_past_the_present_and_progress() {
    let session = Session::start().await;
    for line in ["put w/1 a", "put w/1 b", "put w/2 c"] {
        session.subject(line).await;
    }
    let mut watch = session.subject.start(&["watch", "w/", "--prefix", "--rev=2", "--prev-kv"]);
    let past = watch.lines(11).await;
    assert_eq!(past[..3], ["PUT", "w/1", "a"]);
    assert_eq!(past[3..8], ["PUT", "w/1", "a", "w/1", "b"], "the previous record comes first");
    session.subject("del w/2").await;
    let all = watch.lines(16).await;
    assert_eq!(all[11..], ["DELETE", "w/2", "c", "w/2", ""], "{all:?}");

    let mut interactive = session.subject.start(&["watch", "-i"]);
    interactive.enter("watch w/1");
    breathe(300).await;
    interactive.enter("progress");
    assert_eq!(interactive.lines(1).await[0], "progress notify: 5");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_are_granted_kept_alive_and_revoked() {
    let session = Session::start().await;
    let granted = session.subject_json("lease grant 300").await;
    let id = format!("{:x}", granted["ID"].as_i64().expect("a lease has an id"));
    session.subject(&format!("put leased v --lease={id}")).await;
    let alive = session.subject(&format!("lease keep-alive {id} --once")).await;
    assert!(alive.contains("keepalived with TTL(300)"), "{alive}");
    let left = session.subject_json(&format!("lease timetolive {id} --keys")).await;
    assert_eq!((left["granted-ttl"].as_i64(), left["keys"][0].as_str()), (Some(300), Some("bGVhc2Vk")), "{left}");
    assert!(session.subject("lease list").await.contains(&id));
    session.subject(&format!("lease revoke {id}")).await;
    assert_eq!(session.subject("get leased").await, "", "the key goes with its lease");
    let (succeeded, text) = session.subject.outcome(&["lease", "revoke", &id], "").await;
    assert!(!succeeded && text.contains("requested lease not found"), "{text}");

    // Kept alive for longer than it would live by itself.
    let granted = session.subject_json("lease grant 5").await;
    let id = format!("{:x}", granted["ID"].as_i64().unwrap());
    let mut keeper = session.subject.start(&["lease", "keep-alive", &id]);
    keeper.lines(4).await;
    let left = session.subject_json(&format!("lease timetolive {id}")).await;
    assert!(left["ttl"].as_i64().unwrap() > 0, "{left}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_and_elections_wait_their_turn() {
    let session = Session::start().await;
    let mut holder = session.subject.start(&["lock", "mutex"]);
    let held = holder.lines(1).await;
    assert!(held[0].starts_with("mutex/"), "{held:?}");
    let waiting = Etcdctl::new(&session.twins.subject.endpoint());
    let mut second = waiting.start(&["lock", "mutex"]);
    breathe(300).await;
    assert_eq!(second.process.log(), "", "the lock is held");
    holder.process.signal(Signal::INT);
    assert!(second.lines(1).await[0].starts_with("mutex/"));

    let mut leader = session.subject.start(&["elect", "office", "alice"]);
    let elected = leader.lines(2).await;
    assert!(elected[0].starts_with("office/") && elected[1] == "alice", "{elected:?}");
    let mut listener = waiting.start(&["elect", "-l", "office"]);
    assert_eq!(listener.lines(2).await[1], "alice");
    leader.process.signal(Signal::INT);
    assert!(leader.process.wait(PATIENCE).await.is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cluster_and_its_upkeep_are_reached() {
    let mut session = Session::start().await;
    session.both("put k v").await;
    for line in
        ["auth status", "user list", "role list", "alarm list", "alarm disarm", "role add r", "role get r", "user list"]
    {
        session.both(line).await;
    }
    let members = session.subject_json("member list").await;
    let expected = session.twins.subject.etcd.client(0).status().await.unwrap();
    let header = expected.header.unwrap();
    assert_eq!(members["members"][0]["ID"].as_u64(), Some(header.member_id));
    let status = session.subject_json("endpoint status").await;
    assert_eq!(status[0]["Status"]["version"].as_str(), Some(expected.version.as_str()));
    assert_eq!(status[0]["Status"]["header"]["cluster_id"].as_u64(), Some(header.cluster_id));
    assert!(session.subject("endpoint health").await.contains("is healthy"));

    let hash = |endpoint: Value| endpoint[0]["HashKV"]["hash"].as_u64().expect("a hash");
    let direct: Value =
        serde_json::from_str(&session.reference.run(&["endpoint", "hashkv", "-w", "json"]).await).unwrap();
    assert_eq!(hash(session.subject_json("endpoint hashkv").await), hash(direct), "equal histories have equal hashes");
    assert!(session.subject("defrag").await.contains("Finished defragmenting"));
    session.twins.subject.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_saved_through_it_restores() {
    let mut session = Session::start().await;
    for number in 0..200 {
        let client = session.twins.subject.client();
        client.put(format!("k{number}"), vec![b'v'; 2000]).await.unwrap();
    }
    session.subject("snapshot save backup.db").await;
    session.subject("del k --prefix").await;
    let file = session.subject.home().join("backup.db");
    session.twins.reference.restore(&file, &[]).await;
    let restored = session.reference.run(&["get", "k", "--prefix", "--count-only", "-w", "fields"]).await;
    assert!(restored.contains("\"Count\" : 200"), "{restored}");
}
