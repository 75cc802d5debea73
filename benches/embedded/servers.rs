//! The servers, as child processes that die with the run, each with its data on the disk that is measured.

use std::{
    env, fs,
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use millpond::telemetry::process::ProcessStat;
use tempfile::TempDir;

use super::{
    Outcome, ports,
    process::Process,
    toolchain::{self, Release},
};

/// How long a server may take to start.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    /// `millpond serve` without endpoints.
    Millpond,
    /// The store alone, without the cache in front of it.
    Engine,
    /// etcd with its own defaults.
    Etcd,
    /// kine on SQLite.
    Kine(Kine),
}

/// How kine is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kine {
    /// `synchronous=FULL`, so that an acknowledged write is on the disk; kine's own default is `NORMAL`, where it is not.
    pub durable: bool,
    /// `--datastore-max-open-connections`: none is kine's default, few are its fastest.
    pub connections: Option<u8>,
}

impl Kine {
    /// All that are measured; the first is as kine comes.
    pub const ALL: [Self; 4] = [
        Self { durable: false, connections: None },
        Self { durable: false, connections: Some(4) },
        Self { durable: true, connections: None },
        Self { durable: true, connections: Some(4) },
    ];

    /// What follows the file's name in `--endpoint`: kine's own defaults but for `synchronous`.
    fn parameters(self) -> String {
        let synchronous = if self.durable { "FULL" } else { "NORMAL" };
        format!(
            "_journal_mode=WAL&_busy_timeout=30000&_synchronous={synchronous}&_txlock=immediate&_stmt_cache_size=20\
             &cache=shared"
        )
    }

    fn flags(self) -> Option<String> {
        self.connections.map(|count| format!("--datastore-max-open-connections={count}"))
    }
}

impl System {
    /// Its name in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Millpond => "Millpond",
            Self::Engine => "engine without cache",
            Self::Etcd => "etcd",
            Self::Kine(Kine { durable: false, connections: None }) => "kine as it comes, not durable",
            Self::Kine(Kine { durable: false, connections: Some(_) }) => "kine, 4 connections, not durable",
            Self::Kine(Kine { durable: true, connections: None }) => "kine, durable",
            Self::Kine(Kine { durable: true, connections: Some(_) }) => "kine, 4 connections, durable",
        }
    }
}

/// A running server.
pub struct Server {
    /// Which.
    pub system: System,
    /// `host:port` for clients.
    pub endpoint: String,
    admin: String,
    process: Process,
}

/// A directory on the disk that is measured.
pub fn scratch() -> Outcome<TempDir> {
    let parent = env::var_os("MILLPOND_BENCH_DIR").map_or_else(|| toolchain::target().join("tmp"), PathBuf::from);
    fs::create_dir_all(&parent)?;
    Ok(TempDir::with_prefix_in("millpond-embedded-", parent)?)
}

impl Server {
    /// Starts it on a directory and waits until it answers.
    pub fn start(system: System, home: &Path) -> Outcome<Self> {
        let mut server = Self::launch(system, home)?;
        server.wait(|server| match system {
            System::Millpond => server.get("/health").is_ok_and(|body| body.contains("\"cache_warm\":true")),
            System::Etcd => server.get("/health").is_ok_and(|body| body.contains("\"health\":\"true\"")),
            System::Engine | System::Kine(_) => TcpStream::connect(&server.endpoint).is_ok(),
        })?;
        Ok(server)
    }

    /// Starts it without waiting.
    pub fn launch(system: System, home: &Path) -> Outcome<Self> {
        let (endpoint, other) = (local(), local());
        let command = match system {
            System::Millpond => millpond(&endpoint, &other, home),
            System::Engine => engine(&endpoint, home)?,
            System::Etcd => etcd(&endpoint, &other, home),
            System::Kine(kine) => kine_command(kine, &endpoint, home),
        };
        let admin = if system == System::Etcd { endpoint.clone() } else { other };
        let process = Process::start(command, &home.join("log"));
        Ok(Self { system, endpoint, admin, process })
    }

    /// Waits until `is_so`, and says how long that took.
    pub fn wait(&mut self, is_so: impl Fn(&Self) -> bool) -> Outcome<Duration> {
        let started = Instant::now();
        while !is_so(self) {
            if self.process.exited().is_some() || started.elapsed() > PATIENCE {
                return Err(format!("{} did not get there:\n{}", self.system.name(), self.process.log_tail()).into());
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(started.elapsed())
    }

    /// The body of a successful GET on the port for health and metrics.
    pub fn get(&self, path: &str) -> Outcome<String> {
        let mut socket = TcpStream::connect(&self.admin)?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(socket, "GET {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", self.admin)?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
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

fn millpond(endpoint: &str, admin: &str, home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_millpond"));
    command.args(["serve", "--listen", endpoint, "--admin-listen", admin, "--log-level=warn", "--check-interval=0"]);
    command.arg("--data-dir").arg(home.join("data"));
    command
}

fn engine(endpoint: &str, home: &Path) -> Outcome<Command> {
    let mut command = Command::new(env::current_exe()?);
    command.arg("engine").arg(home.join("data")).env("MILLPOND_BENCH_LISTEN", endpoint);
    Ok(command)
}

fn etcd(endpoint: &str, peer: &str, home: &Path) -> Command {
    let (client, peer) = (format!("http://{endpoint}"), format!("http://{peer}"));
    let mut command = Command::new(Release::newest().etcd);
    command.args(["--log-level=error", "--quota-backend-bytes=8589934592", "--name=m"]);
    command.arg("--data-dir").arg(home.join("data"));
    command.args([format!("--listen-client-urls={client}"), format!("--advertise-client-urls={client}")]);
    command.args([format!("--listen-peer-urls={peer}"), format!("--initial-advertise-peer-urls={peer}")]);
    command.arg(format!("--initial-cluster=m={peer}"));
    command
}

fn kine_command(kine: Kine, endpoint: &str, home: &Path) -> Command {
    let mut command = Command::new(toolchain::kine());
    let file = home.join("kine.db");
    command.arg(format!("--endpoint=sqlite://{}?{}", file.display(), kine.parameters()));
    command.args(["--listen-address", endpoint, "--metrics-bind-address=0"]).args(kine.flags());
    command
}

/// A free address on this machine.
fn local() -> String {
    format!("127.0.0.1:{}", ports::free())
}
