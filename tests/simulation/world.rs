//! What one simulation consists of: the cluster, the links to it, the cache under test, and the trace of what happened.

use std::sync::Arc;

use bytes::Bytes;
use millpond::{
    cache::{self, Cache},
    rules::KeyRange,
    server::{
        leader::Leader,
        watch::{self, Watch},
    },
    store::Limits,
    upstream::{self, Endpoint, Upstream},
};
use parking_lot::Mutex;
use prometheus::Registry;
use tokio::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    dice::Dice,
    link::{Link, Way},
    model::{
        cluster::Cluster,
        server::{Manner, Node},
    },
};

/// Silence on a connection until it is given up. A restore takes longer.
pub const KEEPALIVE: Duration = Duration::from_millis(3000);
/// Bytes for an index that nothing written here fills.
pub const AMPLE: usize = 64 << 20;

/// Keys that are written. One that stands here twice is written twice as often.
pub const KEYS: [&str; 8] = ["a/0", "a/1", "a/2", "a/11", "a/3", "b/0", "b/1", "c"];
/// So that a prefix may have little to tell of what becomes of the rest, or nothing.
const QUIET_KEYS: [&str; 8] = ["a/1", "b/0", "b/1", "b/1", "c", "c", "c", "c"];
const OTHER_KEYS: [&str; 8] = ["b/0", "b/0", "b/1", "b/1", "c", "c", "c", "c"];

/// Everything of one simulation. Cheap to clone.
#[derive(Clone)]
pub struct World(pub Arc<Parts>);

pub struct Parts {
    pub cluster: Cluster,
    pub links: Vec<Link>,
    pub cache: Cache,
    pub watch: Watch,
    /// What the cache keeps, prefix by prefix.
    pub ranges: Vec<KeyRange>,
    /// What is written.
    pub keys: [&'static str; 8],
    pub trace: Trace,
    /// The history that the cache has answered from for certain, and what it has relayed from it.
    pub shown: Mutex<(usize, i64)>,
    /// The history that was the present one when the epoch of each prefix's view began.
    pub adopted: Vec<Mutex<Option<usize>>>,
    /// A restore is under way: nobody is revived.
    pub restoring: Mutex<bool>,
}

/// What happened, and what should not have.
pub struct Trace {
    began: Instant,
    lines: Mutex<Vec<String>>,
    breaches: Mutex<Vec<String>>,
}

impl Trace {
    fn new() -> Self {
        Self { began: Instant::now(), lines: Mutex::default(), breaches: Mutex::default() }
    }

    pub fn note(&self, line: impl AsRef<str>) {
        let at = self.began.elapsed().as_secs_f64();
        self.lines.lock().push(format!("{at:10.6} {}", line.as_ref()));
    }

    /// Notes a breach of `check`.
    pub fn breach(&self, check: &str, what: impl AsRef<str>) {
        let text = format!("{check}: {}", what.as_ref());
        self.note(format!("BREACH {text}"));
        self.breaches.lock().push(text);
    }

    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().clone()
    }

    pub fn breaches(&self) -> Vec<String> {
        self.breaches.lock().clone()
    }
}

impl World {
    /// Starts a cluster and a cache on it, of a kind that is up to chance.
    pub fn start(dice: &mut Dice) -> Self {
        let members = dice.pick(&[1, 3, 3]);
        let manner = Manner {
            version: dice.pick(&["3.7.1", "3.6.14"]),
            round_trip: dice.pick(&[1, 5]),
            piece: dice.pick(&[1, 3, 1000]),
            victims: dice.pick(&[5, 50]),
            unanswered: 10,
        };
        let [a, b] = [b"a/", b"b/"].map(|prefix| KeyRange::prefix(Bytes::from_static(prefix)));
        let ranges = dice.pick(&[vec![KeyRange::everything()], vec![a.clone()], vec![a, b]]);
        let keys = dice.pick(&[KEYS, KEYS, QUIET_KEYS, OTHER_KEYS]);
        Self::of(members, manner, ranges, keys, AMPLE, dice)
    }

    /// Starts a cluster of `members` and a cache of `ranges` with so many bytes for its index.
    pub fn of(
        members: usize,
        manner: Manner,
        ranges: Vec<KeyRange>,
        keys: [&'static str; 8],
        cache_bytes: usize,
        dice: &mut Dice,
    ) -> Self {
        let trace = Trace::new();
        trace.note(format!("{members} members, {manner:?}, {ranges:?}, {keys:?}"));
        let cluster = Cluster::start(members, dice);
        let links: Vec<Link> = (0..members)
            .map(|at| Link::new(Node::new(cluster.clone(), at, manner, dice.fork()), dice.fork()))
            .collect();
        let cache = start_cache(&links, &ranges, cache_bytes, dice);
        let watch = start_watch(&cache);
        let adopted = ranges.iter().map(|_| Mutex::default()).collect();
        let (shown, restoring) = (Mutex::default(), Mutex::default());
        Self(Arc::new(Parts { cluster, links, cache, watch, ranges, keys, trace, shown, adopted, restoring }))
    }

    pub fn kill(&self, at: usize) {
        self.0.cluster.kill(at);
        self.0.links[at].touch();
    }

    pub fn revive(&self, at: usize) {
        if !*self.0.restoring.lock() {
            self.0.cluster.revive(at);
            self.0.links[at].touch();
        }
    }

    /// Everything works again.
    pub fn heal(&self) {
        self.0.cluster.change(|inner| {
            inner.members.iter_mut().for_each(|member| (member.alive, member.cut_off, member.lag) = (true, false, 3));
        });
        self.0.links.iter().for_each(|link| link.set(Way::SOUND, Way::SOUND));
    }
}

fn start_cache(links: &[Link], ranges: &[KeyRange], cache_bytes: usize, dice: &mut Dice) -> Cache {
    let endpoint = |(at, link): (usize, &Link)| Endpoint::InProcess {
        name: format!("member-{at}").parse().unwrap(),
        dial: Arc::new(link.clone()),
    };
    let registry = Registry::new();
    let settings = upstream::Settings {
        connect_timeout: Duration::from_millis(1000),
        keepalive_interval: KEEPALIVE * 2 / 3,
        keepalive_timeout: KEEPALIVE / 3,
        probe_interval: Duration::from_millis(500),
        ..upstream::Settings::new(links.iter().enumerate().map(endpoint).collect())
    };
    let upstream = Upstream::start(settings, &registry).expect("a fresh registry and endpoints");
    let settings = cache::Settings {
        prefixes: ranges.to_vec(),
        cache_bytes,
        history: Limits { bytes: dice.pick(&[4 << 10, 64 << 20]), age: 600_000 },
        floor_patience: Duration::from_millis(300),
        view_patience: Duration::from_millis(dice.pick(&[300, 1000])),
        consensus_patience: Duration::from_millis(7000),
        check_interval: Duration::ZERO,
    };
    Cache::start(upstream, settings, &registry).expect("a fresh registry")
}

/// The Watch service on `cache`, with room for all relays that a simulation has.
fn start_watch(cache: &Cache) -> Watch {
    let settings = watch::Settings {
        max_request_bytes: 1 << 20,
        progress_interval: Duration::from_secs(600),
        catch_up_limit: 8,
        stream_limit: 8,
    };
    let metrics = watch::Metrics::register(&Registry::new()).expect("a fresh registry");
    let stop = CancellationToken::new();
    Watch::new(cache.clone(), settings, metrics, Leader::start(cache.upstream(), stop.clone()), stop)
}
