//! A key set like a Kubernetes cluster's, paged and watched by hundreds while it changes: every watcher ends with exactly
//! the upstream's state.

mod support;

use std::{
    collections::BTreeMap,
    env,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use millpond::proto::etcdserverpb::{
    self as pb, Compare, RequestOp, TxnRequest,
    compare::{CompareTarget, TargetUnion},
    request_op::Request,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use support::{
    client::{Client, prefix_end},
    etcd::Cluster,
    informer::{Contents, Informer, list},
    operation::range,
    random::seed,
    subject::Subject,
    toolchain::Release,
};
use tokio::task::JoinSet;

const KINDS: [&str; 5] = ["configmaps", "events", "leases", "pods", "secrets"];
const NAMESPACES: usize = 40;
/// Objects of one kind in one namespace, to begin with.
const OBJECTS: usize = 100;
const WRITERS: usize = 4;
const INFORMERS_OF_ALL: usize = 4;
const INFORMERS_PER_KIND: usize = 6;

/// Writes by each writer: `MILLPOND_TEST_WRITES`, or few enough for every run of the tests.
fn writes() -> usize {
    env::var("MILLPOND_TEST_WRITES").map_or(400, |text| text.parse().expect("MILLPOND_TEST_WRITES is a number"))
}

fn namespace_prefix(kind: &str, namespace: usize) -> Bytes {
    format!("/registry/{kind}/namespace-{namespace:02}/").into()
}

fn key_of(kind: &str, namespace: usize, name: usize) -> Bytes {
    format!("/registry/{kind}/namespace-{namespace:02}/object-{name:05}").into()
}

/// 1 to 20 KiB of something that does not repeat from key to key.
fn value(rng: &mut StdRng) -> Bytes {
    let mut value = vec![rng.random::<u8>(); rng.random_range(1024..20 * 1024)];
    rng.fill(&mut value[..64]);
    value.into()
}

/// Writes all objects, a good part of the request limit at a time.
async fn load(client: &Client, rng: &mut StdRng) {
    let names = KINDS.iter().flat_map(|kind| (0..NAMESPACES * OBJECTS).map(move |number| (kind, number)));
    let keys: Vec<Bytes> = names.map(|(kind, number)| key_of(kind, number / OBJECTS, number % OBJECTS)).collect();
    for batch in keys.chunks(60) {
        let success = batch.iter().map(|key| put_op(key.clone(), value(rng))).collect();
        client.kv.clone().txn(TxnRequest { success, ..Default::default() }).await.unwrap();
    }
}

fn put_op(key: Bytes, value: Bytes) -> RequestOp {
    RequestOp { request: Some(Request::RequestPut(pb::PutRequest { key, value, ..Default::default() })) }
}

/// A writer with keys of its own, that knows their revisions and guards every change by them, as Kubernetes does.
struct Writer {
    client: Client,
    rng: StdRng,
    /// The mod revision of each of its keys; 0 for one that is not there.
    known: BTreeMap<Bytes, i64>,
}

impl Writer {
    async fn write(&mut self) {
        let nth = self.rng.random_range(0..self.known.len());
        let (key, revision) = self.known.iter().nth(nth).map(|(key, revision)| (key.clone(), *revision)).unwrap();
        let is_delete = revision > 0 && self.rng.random_ratio(1, 5);
        let change = if is_delete {
            let delete = pb::DeleteRangeRequest { key: key.clone(), ..Default::default() };
            RequestOp { request: Some(Request::RequestDeleteRange(delete)) }
        } else {
            put_op(key.clone(), value(&mut self.rng))
        };
        let written = self.guarded(&key, revision, change).await;
        self.known.insert(key, if is_delete { 0 } else { written });
    }

    /// Changes a key if it still has this mod revision, which it must.
    async fn guarded(&self, key: &Bytes, revision: i64, change: RequestOp) -> i64 {
        let compare = Compare {
            key: key.clone(),
            target: CompareTarget::Mod as i32,
            target_union: Some(TargetUnion::ModRevision(revision)),
            ..Default::default()
        };
        let read = RequestOp { request: Some(Request::RequestRange(range(key.clone(), ""))) };
        let request = TxnRequest { compare: vec![compare], success: vec![change], failure: vec![read] };
        let answer = self.client.kv.clone().txn(request).await.unwrap().into_inner();
        assert!(answer.succeeded, "nobody else writes {key:?}: {answer:?}");
        answer.header.expect("a txn's answer has a header").revision
    }
}

/// Writers with disjoint keys, every other one through the server under test.
fn writers(subject: &Subject, contents: &Contents, seed: u64) -> Vec<Writer> {
    let clients = [subject.etcd.client(0), subject.client()];
    let mut writers: Vec<Writer> = (0..WRITERS)
        .map(|number| Writer {
            client: clients[number % 2].clone(),
            rng: StdRng::seed_from_u64(seed + number as u64),
            known: BTreeMap::new(),
        })
        .collect();
    for (number, (key, record)) in contents.iter().enumerate() {
        writers[number % WRITERS].known.insert(key.clone(), record.mod_revision);
    }
    // Keys that are not there yet.
    for number in 0..1000 {
        let key = key_of(KINDS[number % KINDS.len()], number % NAMESPACES, OBJECTS + number);
        writers[number % WRITERS].known.insert(key, 0);
    }
    writers
}

/// Informers of everything, of a kind, of a namespace, on a few connections.
fn informers(subject: &Subject) -> Vec<Informer> {
    let clients: Vec<Client> = (0..8).map(|_| subject.client()).collect();
    let mut scopes = vec![Bytes::from_static(b"/registry/"); INFORMERS_OF_ALL];
    for kind in KINDS {
        scopes.extend(vec![Bytes::from(format!("/registry/{kind}/")); INFORMERS_PER_KIND]);
        scopes.extend((0..NAMESPACES).map(|namespace| namespace_prefix(kind, namespace)));
    }
    let with_client = scopes.into_iter().zip(clients.iter().cycle());
    with_client.map(|(prefix, client)| Informer::start(client.clone(), prefix.clone(), prefix_end(&prefix))).collect()
}

/// Pages one kind again and again until told to stop; every walk is checked by [`list`].
async fn page(client: Client, kind: &'static str, stop: Arc<AtomicBool>) -> usize {
    let prefix = Bytes::from(format!("/registry/{kind}/"));
    let mut walks = 0;
    while !stop.load(Ordering::Relaxed) {
        let (_, contents) = list(&client, &prefix, &prefix_end(&prefix), 500).await.unwrap();
        assert!(contents.len() > NAMESPACES * OBJECTS / 2, "most objects are there: {}", contents.len());
        walks += 1;
    }
    walks
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_of_informers_end_with_the_upstreams_state() {
    let seed = seed();
    let etcd = Cluster::builder(Release::newest()).flag("--quota-backend-bytes=8589934592").start().await;
    let direct = etcd.client(0);
    load(&direct, &mut StdRng::seed_from_u64(seed)).await;
    let mut subject = Subject::before(etcd, &[]).await;
    let everything = (Bytes::from_static(b"/registry/"), Bytes::from_static(b"/registry0"));
    let (_, before) = list(&direct, &everything.0, &everything.1, 500).await.unwrap();
    assert_eq!(before.len(), KINDS.len() * NAMESPACES * OBJECTS);

    let informers = informers(&subject);
    for informer in &informers {
        informer.listed().await;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let mut pagers = JoinSet::new();
    for kind in [KINDS[0], KINDS[3]] {
        pagers.spawn(page(subject.client(), kind, Arc::clone(&stop)));
    }
    let mut writing = JoinSet::new();
    for mut writer in writers(&subject, &before, seed) {
        writing.spawn(async move {
            for _ in 0..writes() {
                writer.write().await;
            }
        });
    }
    writing.join_all().await;
    stop.store(true, Ordering::Relaxed);
    let walks: usize = pagers.join_all().await.iter().sum();

    let revision = direct.revision().await.unwrap();
    let mut events = 0;
    for informer in &informers {
        informer.until_equal(&direct).await;
        events += informer.look(|state| state.events);
    }
    println!("{} informers, {events} events, {walks} walks of 4,000 keys, revision {revision}", informers.len());
    check_reads_at(&subject, &direct, revision).await;
    subject.assert_well();
}

/// Every option of reading the whole set, at the revision that both have reached.
async fn check_reads_at(subject: &Subject, direct: &Client, revision: i64) {
    let through = subject.client();
    let whole = pb::RangeRequest { revision, serializable: true, ..range("/registry/", "/registry0") };
    for request in [
        whole.clone(),
        pb::RangeRequest { keys_only: true, ..whole.clone() },
        pb::RangeRequest { count_only: true, ..whole.clone() },
        pb::RangeRequest { limit: 500, ..whole.clone() },
        pb::RangeRequest { revision: revision - 100, keys_only: true, ..whole.clone() },
    ] {
        let (mut expected, mut found) =
            (direct.range(request.clone()).await.unwrap(), through.range(request.clone()).await.unwrap());
        (expected.header, found.header) = (None, None);
        assert!(expected == found, "the answers to {request:?} differ");
    }
}
