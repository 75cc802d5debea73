//! The parts on the hot paths by themselves: the index, the evaluation of ranges, the history, the index from ranges to
//! watchers, and the encoding and hand-out of events.
//!
//! `cargo bench --bench micro [-- NAME]` measures; `cargo test --bench micro` runs each once.

use std::{
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Waker,
    time::Duration,
};

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use millpond::{
    fanout::{
        Hub, Out, Session, SessionSettings, Start, WatchOptions,
        encode::put_event,
        ranges::{Placed, RangeIndex},
    },
    proto::etcdserverpb::{RangeRequest, WatchCreateRequest},
    rules::{KeyRange, range::range_of},
    store::{Change, Event, EventKind, Limits, Position, Record, Revision, Store, Tree, View, Writer, range::select},
};

const KEYS: u64 = 100_000;

fn key(number: u64) -> Vec<u8> {
    format!("/registry/pods/namespace-{:03}/pod-{number:06}", number % 200).into_bytes()
}

fn record(number: u64, revision: i64, value: usize) -> Record {
    Record::new(&key(number), &vec![b'v'; value], Revision(2), Revision(revision), 3, 0)
}

fn tree() -> Tree {
    (0..KEYS).map(|number| record(number, 5, 300)).collect()
}

/// A store with [`KEYS`] keys, and its writer.
fn store() -> (Arc<Store>, Writer) {
    let (store, mut writer) = Store::new(Limits { bytes: 64 << 20, age: u64::MAX });
    writer.reset(Position { epoch: 1, revision: Revision(10) }, Some(tree()));
    writer.publish(0);
    (store, writer)
}

fn change(number: u64, revision: i64) -> Change {
    Change { kind: EventKind::Put, record: record(number, revision, 512), previous: None }
}

/// Steps through the keys so that neighbours do not follow each other.
fn scattered(step: &mut u64) -> u64 {
    *step = step.wrapping_add(77_773);
    *step % KEYS
}

fn index(criterion: &mut Criterion) {
    let tree = tree();
    let mut step = 0;
    criterion.bench_function("index/get", |bench| bench.iter(|| tree.get(&key(scattered(&mut step))).is_some()));
    let mut own = tree.clone();
    criterion.bench_function("index/replace", |bench| {
        bench.iter_batched(|| record(scattered(&mut step), 6, 300), |record| own.insert(record), BatchSize::SmallInput);
    });
    criterion.bench_function("index/replace under a view", |bench| {
        bench.iter_batched(
            || record(scattered(&mut step), 6, 300),
            |record| {
                let view = own.clone();
                (own.insert(record), view)
            },
            BatchSize::SmallInput,
        );
    });
    let range =
        KeyRange::from_request(&"/registry/pods/namespace-100/".into(), &"/registry/pods/namespace-1000".into());
    criterion.bench_function("index/count", |bench| bench.iter(|| tree.sums_in(black_box(&range))));
    criterion.bench_function("index/k-th key", |bench| bench.iter(|| tree.nth_from(b"", black_box(54_321)).is_some()));
}

fn ranges(criterion: &mut Criterion) {
    let (store, _writer) = store();
    let view: Arc<View> = store.view_owned();
    let everything = RangeRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() };
    let requests = [
        ("range/one key", RangeRequest { key: key(4711).into(), ..Default::default() }),
        ("range/page of 500", RangeRequest { limit: 500, ..everything.clone() }),
        ("range/count of everything", RangeRequest { count_only: true, ..everything.clone() }),
        ("range/the 10 newest", RangeRequest { limit: 10, sort_order: 2, sort_target: 3, ..everything }),
    ];
    for (name, request) in requests {
        criterion.bench_function(name, |bench| {
            bench.iter(|| {
                let request = black_box(&request);
                let selection = select(&view, &range_of(request), request).expect("the revision is the present");
                (selection.count, selection.records.len())
            });
        });
    }
}

fn history(criterion: &mut Criterion) {
    let (store, mut writer) = store();
    let mut revision = 10;
    let mut apply = |writer: &mut Writer| {
        revision += 1;
        writer.apply(Revision(revision), vec![change(revision as u64 * 77_773 % KEYS, revision)], 0);
        revision
    };
    criterion.bench_function("history/apply and publish a revision", |bench| {
        bench.iter(|| {
            apply(&mut writer);
            writer.publish(0);
        });
    });
    let last = apply(&mut writer);
    for _ in 0..2000 {
        apply(&mut writer);
    }
    writer.publish(0);
    let view = store.view_owned();
    criterion.bench_function("history/replay 1,000 revisions", |bench| {
        bench.iter(|| {
            let entries = view.window.after(Revision(last)).expect("the window reaches back");
            entries.take(1000).map(|entry| entry.events.len()).sum::<usize>()
        });
    });
    let mut back = 0;
    criterion.bench_function("history/the state at an older revision", |bench| {
        bench.iter(|| {
            // Another segment each time, so that nothing is remembered from the last.
            back = (back + 257) % 2000;
            view.tree_at(Revision(last + back)).map(|tree| tree.len())
        });
    });
}

/// A member of the index that stands where it was put.
#[derive(Clone, Default)]
struct Member(Arc<AtomicUsize>);

impl Placed for Member {
    fn place(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    fn set_place(&self, place: usize) {
        self.0.store(place, Ordering::Relaxed);
    }
}

fn watchers(criterion: &mut Criterion) {
    let mut index = RangeIndex::default();
    for number in 0..KEYS {
        index.insert(&KeyRange::from_request(&key(number).into(), &Bytes::new()), Member::default());
        if number % 100 == 0 {
            let end = key(number + 500);
            index.insert(&KeyRange::from_request(&key(number).into(), &end.into()), Member::default());
        }
    }
    let mut step = 0;
    criterion.bench_function("watchers/find those of a key among 101,000", |bench| {
        bench.iter(|| {
            let mut found = 0;
            index.visit(&key(scattered(&mut step)), |_: &Member| found += 1);
            found
        });
    });
    let range = KeyRange::from_request(&"/registry/pods/x".into(), &"/registry/pods/y".into());
    criterion.bench_function("watchers/come and go", |bench| {
        bench.iter(|| {
            let member = Member::default();
            index.insert(&range, member.clone());
            index.remove(&range, &member);
        });
    });
}

fn events(criterion: &mut Criterion) {
    let event = Event { kind: EventKind::Put, record: record(1, 7, 512), previous: Some(record(1, 6, 512)) };
    let mut out = Vec::with_capacity(4096);
    criterion.bench_function("events/encode one of 512 B", |bench| {
        bench.iter(|| {
            out.clear();
            put_event(&mut out, black_box(&event), false);
            out.len()
        });
    });
}

/// An event on its way from the writer through the hub to the bytes of 1,000 watchers of one stream.
fn fan_out(criterion: &mut Criterion) {
    const WATCHERS: usize = 1000;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let (store, mut writer) = store();
    let hub = Hub::new(store.clone());
    let running = runtime.spawn(hub.clone().run());
    let mut session = Session::new(Arc::from([hub.clone()]), SessionSettings { fragment_bytes: 1 << 20 });
    let options = WatchCreateRequest { key: "/registry/".into(), range_end: "/registry0".into(), ..Default::default() };
    let mut out = Out::default();
    for _ in 0..WATCHERS {
        let present = (store.view().responder, store.view().revision());
        let options = WatchOptions::from_request(&options);
        session.create(0, options, Start::After(present.1), Some(0), present, &mut out);
    }
    session.pump(&mut out, usize::MAX, Waker::noop());
    let mut revision = 10;
    let mut group = criterion.benchmark_group("events");
    group.throughput(Throughput::Elements(WATCHERS as u64));
    group.bench_function("hand one to 1,000 watchers", |bench| {
        bench.iter(|| {
            revision += 1;
            writer.apply(Revision(revision), vec![change(revision as u64 % KEYS, revision)], 0);
            writer.publish(0);
            out.take();
            while out.is_empty() {
                runtime.block_on(tokio::task::yield_now());
                session.pump(&mut out, usize::MAX, Waker::noop());
            }
            assert!(out.len() > WATCHERS * 512, "everybody is told");
        });
    });
    group.finish();
    running.abort();
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = index, ranges, history, watchers, events, fan_out
}
criterion_main!(benches);
