//! `millpond bench` against a real etcd and a Millpond in front of it: every load runs, counts, and tidies up.

mod support;

use std::process::Output;

use serde_json::Value;
use support::{client::Client, etcd::Cluster, millpond::Millpond, toolchain::Release};

const SHORT: [&str; 6] =
    ["--warmup=100ms", "--duration=300ms", "--connections=2", "--json", "--prefix=/t/", "--endpoints"];

fn bench(load: &str, endpoint: &str, arguments: &[&str]) -> Output {
    let mut command = support::process::millpond();
    command.args(["bench", load]).args(SHORT).arg(endpoint).args(arguments);
    command.output().unwrap()
}

/// The report of a run that must succeed without a failed operation.
fn report(load: &str, endpoint: &str, arguments: &[&str]) -> Value {
    let output = bench(load, endpoint, arguments);
    assert!(output.status.success(), "{load}: {}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    // On a busy machine every event of a short run may be late, and count as seen only.
    let done = [&report["operations"], &report["deliveries"]["seen"]].iter().any(|count| count.as_u64() > Some(0));
    assert!(done && report["errors"] == 0, "{load} {arguments:?}: {report}");
    report
}

async fn left_over(client: &Client) -> i64 {
    let all = millpond::proto::etcdserverpb::RangeRequest {
        key: "\0".into(),
        range_end: "\0".into(),
        count_only: true,
        ..Default::default()
    };
    client.range(all).await.unwrap().count
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_load_runs_and_tidies_up() {
    let mut cluster = Cluster::single(Release::newest()).await;
    let millpond = Millpond::start(&cluster.endpoints(), &[]).await;
    let pid = format!("--pid={}", cluster.process(0).pid());
    for endpoint in [cluster.endpoint(0), millpond.endpoint.clone()] {
        for shape in ["key", "page", "all", "count", "keys"] {
            let report = report("range", &endpoint, &["--keys=300", "--limit=50", "--shape", shape, &pid]);
            assert!(
                report["server_cpu_micros"].is_number() && report["latency_micros"]["p99"].as_u64() > Some(0),
                "{report}"
            );
        }
        report("range", &endpoint, &["--keys=300", "--linearizable", "--value-size=4KiB"]);
        report("put", &endpoint, &["--keys=50", "--in-flight=4", "--value-size=100KiB"]);
        report("txn", &endpoint, &["--in-flight=4"]);
    }
    assert_eq!(left_over(&cluster.client(0)).await, 0, "keys of the runs are left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_watcher_gets_every_event() {
    let cluster = Cluster::single(Release::newest()).await;
    let millpond = Millpond::start(&cluster.endpoints(), &[]).await;
    for endpoint in [cluster.endpoint(0), millpond.endpoint.clone()] {
        for shape in [["--streams=5", "--watchers=1"], ["--streams=1", "--watchers=50"]] {
            for keys in [&["--rate=200"][..], &["--rate=200", "--distinct"]] {
                let report = report("watch", &endpoint, &[&shape, keys].concat());
                assert_eq!(report["deliveries"]["seen"], report["deliveries"]["expected"], "{report}");
            }
        }
    }
    assert_eq!(left_over(&cluster.client(0)).await, 0, "keys of the runs are left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guarded_update_writes_its_keys() {
    let cluster = Cluster::single(Release::newest()).await;
    report("txn", &cluster.endpoint(0), &["--in-flight=3", "--keep"]);
    let client = cluster.client(0);
    assert_eq!(left_over(&client).await, 1 + 2 * 3, "the first key, and one for each call in flight");
    let one = client.get("/t/guarded/000001/000002").await.unwrap();
    assert!(one.kvs[0].version > 1, "it was updated, not only created: {}", one.kvs[0].version);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_loaded_is_told_on_one_line() {
    let told = |output: Output| (output.status.code(), String::from_utf8(output.stderr).unwrap());
    let (code, line) = told(bench("range", "127.0.0.1:9", &[]));
    assert!(code == Some(1) && line.starts_with("millpond: bench: 127.0.0.1:9") && line.lines().count() == 1, "{line}");
    for wrong in ["--connections=0", "--duration=0", "--value-size=2GiB", "--shape=round", "--rate=1"] {
        let (code, line) = told(bench("range", "127.0.0.1:9", &[wrong]));
        assert!(code == Some(64) && line.lines().count() == 1, "{wrong}: {line}");
    }
    let cluster = Cluster::single(Release::newest()).await;
    let (code, line) = told(bench("range", &cluster.endpoint(0), &["--pid=4294967295", "--keys=1"]));
    assert!(code == Some(1) && line.contains("pid 4294967295"), "{line}");
}
