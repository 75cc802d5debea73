//! A server as a child process that dies with the run, and what both comparisons ask of one.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use millpond::telemetry::process::ProcessStat;
use tempfile::TempDir;

use crate::{
    Outcome, ports,
    process::{self, Process},
    toolchain::Release,
};

/// How long a server may take to start, or to load everything.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running server of a kind.
pub struct Child<K> {
    /// Which.
    pub system: K,
    /// What it is called.
    name: &'static str,
    /// `host:port` for clients.
    pub endpoint: String,
    /// `host:port` for health and metrics.
    admin: String,
    process: Process,
    _home: Option<TempDir>,
}

impl<K> Child<K> {
    /// Starts it, with its log in `home`.
    pub fn spawn(
        (system, name): (K, &'static str),
        (endpoint, admin): (String, String),
        command: Command,
        home: &Path,
    ) -> Self {
        Self { system, name, endpoint, admin, process: Process::start(command, &home.join("log")), _home: None }
    }

    /// The same, with a directory that goes with it.
    #[allow(dead_code, reason = "only one of the comparisons gives each server a directory of its own")]
    pub fn housed(self, home: TempDir) -> Self {
        Self { _home: Some(home), ..self }
    }

    /// Waits until `is_so`, and says how long that took. Fails when the server ends or takes too long.
    pub fn wait(&mut self, is_so: impl Fn(&Self) -> bool) -> Outcome<Duration> {
        let started = Instant::now();
        while !is_so(self) {
            if self.process.exited().is_some() || started.elapsed() > PATIENCE {
                return Err(format!("{} did not get there:\n{}", self.name, self.process.log_tail()).into());
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(started.elapsed())
    }

    /// Whether its process has ended by itself, which is told with its last words.
    #[allow(dead_code, reason = "only one of the comparisons uses a server for several rows")]
    pub fn is_gone(&mut self) -> bool {
        let gone = self.process.exited();
        if let Some(status) = gone {
            eprintln!("{} ended ({status}):\n{}", self.name, self.process.log_tail());
        }
        gone.is_some()
    }

    /// Whether its port for clients takes connections.
    pub fn listens(&self) -> bool {
        TcpStream::connect(&self.endpoint).is_ok()
    }

    /// Whether an etcd, or its proxy, is well.
    pub fn is_well(&self) -> bool {
        self.get("/health").is_ok_and(|body| body.contains("\"health\":\"true\""))
    }

    /// Whether Millpond's cache answers.
    pub fn is_warm(&self) -> bool {
        self.get("/health").is_ok_and(|body| body.contains("\"cache_warm\":true"))
    }

    /// The body of a successful GET on the port for health and metrics.
    pub fn get(&self, path: &str) -> Outcome<String> {
        let mut socket = TcpStream::connect(&self.admin)?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(socket, "GET {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", self.admin)?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        let _ = socket.shutdown(Shutdown::Both);
        match answer.split_once("\r\n\r\n") {
            Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
            _ => Err(format!("{path}: {}", answer.lines().next().unwrap_or("no answer")).into()),
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Resident memory in bytes.
    pub fn resident(&self) -> Outcome<u64> {
        Ok(ProcessStat::read(self.pid())?.resident_bytes)
    }
}

/// The newest etcd as a cluster of one, with its data in `home`.
pub fn etcd(endpoint: &str, home: &Path) -> Command {
    let (client, peer) = (format!("http://{endpoint}"), format!("http://{}", local()));
    let mut command = Command::new(Release::newest().etcd);
    command.args(["--log-level=error", "--quota-backend-bytes=8589934592", "--name=m"]);
    command.arg("--data-dir").arg(home.join("data"));
    command.args([format!("--listen-client-urls={client}"), format!("--advertise-client-urls={client}")]);
    command.args([format!("--listen-peer-urls={peer}"), format!("--initial-advertise-peer-urls={peer}")]);
    command.arg(format!("--initial-cluster=m={peer}"));
    command
}

/// A `millpond serve` that says little and checks nothing, to be told what it is in front of.
pub fn millpond(endpoint: &str, admin: &str) -> Command {
    let mut command = process::millpond();
    command.args(["serve", "--listen", endpoint, "--admin-listen", admin, "--log-level=warn", "--check-interval=0"]);
    command
}

/// A free address on this machine.
pub fn local() -> String {
    format!("127.0.0.1:{}", ports::free())
}
