//! SIGTERM and SIGINT: the first asks for a graceful end, the second ends the process at once.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit status after a second SIGINT, as a shell reports it: 128 + the signal's number.
const STATUS_INTERRUPTED: i32 = 130;
/// Exit status after a second SIGTERM.
const STATUS_TERMINATED: i32 = 143;

/// Listens from now on. The token is cancelled by the first signal; the second one leaves the process without further ado.
pub fn listen() -> io::Result<CancellationToken> {
    let terminate = signal(SignalKind::terminate())?;
    let interrupt = signal(SignalKind::interrupt())?;
    let shutdown = CancellationToken::new();
    tokio::spawn(obey(terminate, interrupt, shutdown.clone()));
    Ok(shutdown)
}

async fn obey(mut terminate: Signal, mut interrupt: Signal, shutdown: CancellationToken) {
    let (name, _) = next(&mut terminate, &mut interrupt).await;
    tracing::info!(signal = name, "stopping; a second signal leaves at once");
    shutdown.cancel();
    let (name, status) = next(&mut terminate, &mut interrupt).await;
    tracing::warn!(signal = name, "leaving at once");
    std::process::exit(status);
}

async fn next(terminate: &mut Signal, interrupt: &mut Signal) -> (&'static str, i32) {
    tokio::select! {
        _ = terminate.recv() => ("SIGTERM", STATUS_TERMINATED),
        _ = interrupt.recv() => ("SIGINT", STATUS_INTERRUPTED),
    }
}
