//! The operators' port over real sockets.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::Notify,
};

use super::*;

struct Port {
    address: SocketAddr,
    readiness: watch::Sender<Readiness>,
    shutdown: CancellationToken,
    served: tokio::task::JoinHandle<()>,
}

async fn start(check: Option<Arc<dyn ConsistencyCheck>>) -> Port {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (readiness, receiver) = watch::channel(Readiness { reason: "loading".to_owned(), ..Readiness::default() });
    let shutdown = CancellationToken::new();
    let registry = Registry::new();
    registry.register(Box::new(prometheus::IntCounter::new("millpond_test_total", "For the test").unwrap())).unwrap();
    let admin = Admin { readiness: receiver, registry, check };
    let served = tokio::spawn(serve(listener, admin, shutdown.clone()));
    Port { address, readiness, shutdown, served }
}

impl Port {
    /// Status and body of one exchange on a connection of its own.
    async fn ask(&self, method: &str, path: &str) -> (u16, String) {
        let mut socket = TcpStream::connect(self.address).await.unwrap();
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    fn set(&self, cache_warm: bool, upstream_reachable: bool) {
        self.readiness.send_replace(Readiness { cache_warm, upstream_reachable, reason: "why".to_owned() });
    }
}

#[tokio::test]
async fn readiness_is_the_cache_or_the_upstream() {
    let port = start(None).await;
    assert_eq!(
        port.ask("GET", "/readyz").await,
        (503, "[-]cache failed: loading\n[-]upstream failed: loading\nnot ready\n".into())
    );
    port.set(false, true);
    assert_eq!(port.ask("GET", "/readyz").await, (200, "ok\n".into()));
    port.set(true, false);
    assert_eq!(port.ask("GET", "/readyz?verbose").await, (200, "[+]cache ok\n[-]upstream failed: why\nok\n".into()));
    assert_eq!(port.ask("GET", "/livez").await, (200, "ok\n".into()));
}

#[tokio::test]
async fn health_says_which_part_is_well() {
    let port = start(None).await;
    assert_eq!(port.ask("GET", "/health").await.0, 503);
    port.set(true, false);
    let (status, body) = port.ask("GET", "/health").await;
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    let expected = json!({"health": "true", "reason": "why", "cache_warm": true, "upstream_reachable": false});
    assert_eq!((status, body), (200, expected));
}

#[tokio::test]
async fn metrics_and_version_are_shown() {
    let port = start(None).await;
    let (status, text) = port.ask("GET", "/metrics").await;
    assert!(status == 200 && text.contains("millpond_test_total 0"), "{text}");
    assert_eq!(port.ask("GET", "/version").await.1, format!("{{\"millpond\":\"{}\"}}", env!("CARGO_PKG_VERSION")));
    assert_eq!(port.ask("GET", "/nothing").await.0, 404);
    assert_eq!(port.ask("POST", "/health").await.0, 405);
}

/// Reports when it runs, and ends when it is let go.
#[derive(Default)]
struct HeldCheck {
    runs: Notify,
    release: Notify,
}

impl ConsistencyCheck for HeldCheck {
    fn check(&self) -> BoxFuture<'_, Result<CheckReport, String>> {
        Box::pin(async {
            self.runs.notify_one();
            self.release.notified().await;
            Ok(CheckReport { revision: 7, keys: 3, differing: vec!["a".to_owned()] })
        })
    }
}

#[tokio::test]
async fn one_check_runs_at_a_time() {
    let check = Arc::new(HeldCheck::default());
    let port = start(Some(check.clone())).await;
    let second = async {
        check.runs.notified().await;
        let answer = port.ask("POST", "/check").await;
        check.release.notify_one();
        answer
    };
    let (first, second) = tokio::join!(port.ask("POST", "/check"), second);
    assert_eq!(second, (409, "{\"error\":\"a check is running already\"}".into()));
    assert_eq!(first, (200, "{\"differing\":[\"a\"],\"keys\":3,\"revision\":7}".into()));
    assert_eq!(port.ask("GET", "/check").await.0, 405);
}

#[tokio::test]
async fn without_a_cache_there_is_nothing_to_check() {
    let port = start(None).await;
    assert_eq!(port.ask("POST", "/check").await.0, 503);
}

#[tokio::test]
async fn shutdown_ends_idle_connections() {
    let port = start(None).await;
    let mut idle = TcpStream::connect(port.address).await.unwrap();
    idle.write_all(b"GET /livez HTTP/1.1\r\nhost: test\r\n\r\n").await.unwrap();
    let mut answer = vec![0; 15];
    idle.read_exact(&mut answer).await.unwrap();
    port.shutdown.cancel();
    port.served.await.unwrap();
    assert!(TcpStream::connect(port.address).await.is_err());
}
