//! A TCP proxy that breaks the connections through it in chosen ways, switchable while they are open.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp::OwnedReadHalf, tcp::OwnedWriteHalf},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};

use super::ports;

/// What happens to the bytes. The default lets everything pass.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Faults {
    /// Bytes from the client vanish: nothing arrives, nothing is reset. They go on when this is lifted, as TCP would.
    pub hold_requests: bool,
    /// Bytes from the server vanish in the same way.
    pub hold_answers: bool,
    /// Every chunk arrives this much later, in both directions.
    pub delay: Duration,
    /// Bytes per second and direction; 0 for no limit.
    pub bytes_per_second: u64,
    /// New connections are refused.
    pub refuse: bool,
}

impl Faults {
    /// Both directions vanish.
    pub fn black_hole() -> Self {
        Self { hold_requests: true, hold_answers: true, ..Self::default() }
    }
}

/// The part of the proxy that connections share.
struct Shared {
    faults: watch::Receiver<Faults>,
    /// Grows by one to reset every open connection.
    resets: watch::Receiver<u64>,
    /// Bytes from the server that may still pass before the connection is cut; `u64::MAX` for no limit.
    until_cut: AtomicU64,
    accepted: AtomicU64,
}

/// A proxy in front of one server.
pub struct FaultProxy {
    /// `host:port` to connect to.
    pub endpoint: String,
    faults: watch::Sender<Faults>,
    resets: watch::Sender<u64>,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

impl FaultProxy {
    /// Listens on a free port and connects onward to `target` (`host:port`).
    pub async fn start(target: &str) -> Self {
        let endpoint = format!("127.0.0.1:{}", ports::free());
        let (faults, seen_faults) = watch::channel(Faults::default());
        let (resets, seen_resets) = watch::channel(0);
        let shared = Arc::new(Shared {
            faults: seen_faults,
            resets: seen_resets,
            until_cut: AtomicU64::new(u64::MAX),
            accepted: AtomicU64::new(0),
        });
        let listener = listen(&endpoint).await;
        let accepting = tokio::spawn(accept(listener, endpoint.clone(), target.to_owned(), Arc::clone(&shared)));
        Self { endpoint, faults, resets, shared, accepting }
    }

    /// Switches to these faults; open connections feel them at their next byte.
    pub fn set(&self, faults: Faults) {
        self.faults.send_replace(faults);
    }

    /// Lets everything pass again.
    pub fn heal(&self) {
        self.shared.until_cut.store(u64::MAX, Ordering::SeqCst);
        self.set(Faults::default());
    }

    /// Resets every open connection now.
    pub fn reset(&self) {
        self.resets.send_modify(|count| *count += 1);
    }

    /// Lets `bytes` more from the server pass, then resets the connection that carries the next: in the middle of a
    /// frame, nearly always. Holds once.
    pub fn cut_after(&self, bytes: u64) {
        self.shared.until_cut.store(bytes, Ordering::SeqCst);
    }

    /// How many connections were accepted so far.
    pub fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::SeqCst)
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.reset();
        self.accepting.abort();
    }
}

async fn listen(endpoint: &str) -> TcpListener {
    let address: SocketAddr = endpoint.parse().unwrap();
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}

/// Accepts until aborted; while connections are to be refused, nothing listens.
async fn accept(listener: TcpListener, endpoint: String, target: String, shared: Arc<Shared>) {
    let mut listener = Some(listener);
    let mut faults = shared.faults.clone();
    loop {
        if faults.borrow_and_update().refuse {
            listener = None;
            if faults.changed().await.is_err() {
                return;
            }
            continue;
        }
        if listener.is_none() {
            listener = Some(listen(&endpoint).await);
        }
        let open = listener.as_ref().expect("listening was just begun");
        // A reset from now on is one of the next connection, too; and one that comes when it is to be refused is not accepted.
        let mut resets = shared.resets.clone();
        resets.mark_unchanged();
        tokio::select! {
            biased;
            changed = faults.changed() => if changed.is_err() { return },
            Ok((client, _)) = open.accept() => {
                shared.accepted.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(relay(client, target.clone(), Arc::clone(&shared), resets));
            }
        }
    }
}

/// One connection, until either side ends it or a fault does.
async fn relay(client: TcpStream, target: String, shared: Arc<Shared>, mut resets: watch::Receiver<u64>) {
    let Ok(server) = TcpStream::connect(&target).await else {
        return abort_on_close(&client);
    };
    // Resets, not ends: a connection that breaks does not say goodbye.
    abort_on_close(&client);
    abort_on_close(&server);
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::select! {
        _ = resets.changed() => {}
        () = pump(from_client, to_server, Direction::Requests, Arc::clone(&shared)) => {}
        () = pump(from_server, to_client, Direction::Answers, Arc::clone(&shared)) => {}
    }
}

fn abort_on_close(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

#[derive(Clone, Copy, PartialEq)]
enum Direction {
    Requests,
    Answers,
}

impl Direction {
    fn is_held(self, faults: &Faults) -> bool {
        match self {
            Self::Requests => faults.hold_requests,
            Self::Answers => faults.hold_answers,
        }
    }
}

/// Moves bytes one way: a reader stamps each chunk with the time at which it is due, a writer waits for it.
async fn pump(mut from: OwnedReadHalf, to: OwnedWriteHalf, direction: Direction, shared: Arc<Shared>) {
    let (due, chunks) = mpsc::channel::<(Instant, Vec<u8>)>(256);
    let faults = shared.faults.clone();
    let reading = async move {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let count = match from.read(&mut buffer).await {
                Ok(count) if count > 0 => count,
                _ => return,
            };
            let delay = faults.borrow().delay;
            if due.send((Instant::now() + delay, buffer[..count].to_vec())).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(reading, write(chunks, to, direction, shared));
}

async fn write(
    mut chunks: mpsc::Receiver<(Instant, Vec<u8>)>,
    mut to: OwnedWriteHalf,
    direction: Direction,
    shared: Arc<Shared>,
) {
    let mut faults = shared.faults.clone();
    while let Some((at, chunk)) = chunks.recv().await {
        sleep_until(at).await;
        if faults.wait_for(|faults| !direction.is_held(faults)).await.is_err() {
            return;
        }
        let allowed = if direction == Direction::Answers { take(&shared.until_cut, chunk.len()) } else { chunk.len() };
        let rate = shared.faults.borrow().bytes_per_second;
        if write_at_rate(&mut to, &chunk[..allowed], rate).await.is_err() || allowed < chunk.len() {
            return;
        }
    }
}

/// How many of `wanted` bytes may pass before the cut. The cut itself disarms it.
fn take(until_cut: &AtomicU64, wanted: usize) -> usize {
    let wanted = wanted as u64;
    let spend = |left: u64| match left {
        u64::MAX => None,
        left if left < wanted => Some(u64::MAX),
        left => Some(left - wanted),
    };
    let before = until_cut.fetch_update(Ordering::SeqCst, Ordering::SeqCst, spend).unwrap_or(u64::MAX);
    before.min(wanted) as usize
}

async fn write_at_rate(to: &mut OwnedWriteHalf, bytes: &[u8], per_second: u64) -> std::io::Result<()> {
    if per_second == 0 {
        return to.write_all(bytes).await;
    }
    for piece in bytes.chunks((per_second / 20).max(1) as usize) {
        to.write_all(piece).await?;
        sleep(Duration::from_secs_f64(piece.len() as f64 / per_second as f64)).await;
    }
    Ok(())
}
