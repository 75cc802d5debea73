//! The servers that are compared, as child processes that die with the run.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use millpond::telemetry::process::ProcessStat;
use tempfile::TempDir;

use super::{Outcome, ports, process::Process, toolchain::Release};

/// How long a server may take to start.
const PATIENCE: Duration = Duration::from_secs(60);

/// One of the four.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum System {
    /// etcd itself.
    Etcd,
    /// `etcd grpc-proxy`, of the same binary.
    GrpcProxy,
    /// The floor.
    Bare,
    /// Millpond in front of the etcd.
    Millpond,
}

impl System {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 4] = [Self::Etcd, Self::GrpcProxy, Self::Bare, Self::Millpond];

    /// Those that can do everything.
    pub const REAL: [Self; 3] = [Self::Etcd, Self::GrpcProxy, Self::Millpond];

    /// Its name in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::GrpcProxy => "grpc-proxy",
            Self::Bare => "bare hyper",
            Self::Millpond => "Millpond",
        }
    }
}

/// A running server.
pub struct Server {
    /// Which.
    pub system: System,
    /// `host:port` for clients.
    pub endpoint: String,
    /// `host:port` for health and metrics.
    admin: String,
    process: Process,
    _home: TempDir,
}

impl Server {
    /// An empty etcd. It does not wait for the disk, whose speed is not what is compared.
    pub fn etcd() -> Outcome<Self> {
        let home = TempDir::with_prefix("millpond-compare-")?;
        let endpoint = local();
        let (client, peer) = (format!("http://{endpoint}"), format!("http://{}", local()));
        let mut command = Command::new(Release::newest().etcd);
        command.args(["--log-level=error", "--unsafe-no-fsync", "--quota-backend-bytes=8589934592", "--name=m"]);
        command.arg("--data-dir").arg(home.path().join("data"));
        command.args([format!("--listen-client-urls={client}"), format!("--advertise-client-urls={client}")]);
        command.args([format!("--listen-peer-urls={peer}"), format!("--initial-advertise-peer-urls={peer}")]);
        command.arg(format!("--initial-cluster=m={peer}"));
        Self::start(System::Etcd, endpoint.clone(), endpoint, command, home)?.once(|server| server.answers("/health"))
    }

    /// etcd's proxy in front of an endpoint.
    pub fn grpc_proxy(upstream: &str) -> Outcome<Self> {
        let home = TempDir::with_prefix("millpond-compare-")?;
        let endpoint = local();
        let mut command = Command::new(Release::newest().etcd);
        command.args(["grpc-proxy", "start", "--endpoints", upstream, "--listen-addr", &endpoint]);
        command.current_dir(home.path());
        Self::start(System::GrpcProxy, endpoint.clone(), endpoint, command, home)?
            .once(|server| server.answers("/health"))
    }

    /// The floor, with that gRPC-framed answer.
    pub fn bare(answer: &Bytes) -> Outcome<Self> {
        let home = TempDir::with_prefix("millpond-compare-")?;
        let file = home.path().join("answer");
        fs::write(&file, answer)?;
        let endpoint = local();
        let port = endpoint.rsplit(':').next().unwrap_or_default();
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bare", port]).arg(&file);
        Self::start(System::Bare, endpoint.clone(), endpoint, command, home)?
            .once(|server| TcpStream::connect(&server.endpoint).is_ok())
    }

    /// Millpond in front of an endpoint, not yet warm.
    pub fn millpond(upstream: &str) -> Outcome<Self> {
        let home = TempDir::with_prefix("millpond-compare-")?;
        let (endpoint, admin) = (local(), local());
        let mut command = Command::new(env!("CARGO_BIN_EXE_millpond"));
        command.args(["serve", "--endpoints", upstream, "--listen", &endpoint, "--admin-listen", &admin]);
        command.args(["--log-level=warn", "--check-interval=0"]).current_dir(home.path());
        let millpond = Self::start(System::Millpond, endpoint, admin, command, home)?;
        millpond.once(|server| server.get("/livez").is_ok())
    }

    fn start(system: System, endpoint: String, admin: String, command: Command, home: TempDir) -> Outcome<Self> {
        let process = Process::start(command, &home.path().join("log"));
        Ok(Self { system, endpoint, admin, process, _home: home })
    }

    /// Waits until it is as it should be.
    fn once(mut self, is_so: impl Fn(&Self) -> bool) -> Outcome<Self> {
        self.wait(PATIENCE, is_so)?;
        Ok(self)
    }

    /// Waits until `is_so`, and says how long that took. Fails when the server ends or takes too long.
    pub fn wait(&mut self, patience: Duration, is_so: impl Fn(&Self) -> bool) -> Outcome<Duration> {
        let started = Instant::now();
        while !is_so(self) {
            if self.process.exited().is_some() || started.elapsed() > patience {
                return Err(format!("{} did not start:\n{}", self.system.name(), self.process.log_tail()).into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(started.elapsed())
    }

    /// Whether its process has ended by itself, which is told with its last words.
    pub fn is_gone(&mut self) -> bool {
        let gone = self.process.exited();
        if let Some(status) = gone {
            eprintln!("{} ended ({status}):\n{}", self.system.name(), self.process.log_tail());
        }
        gone.is_some()
    }

    /// Whether Millpond's cache answers.
    pub fn is_warm(&self) -> bool {
        self.get("/health").is_ok_and(|body| body.contains("\"cache_warm\":true"))
    }

    fn answers(&self, path: &str) -> bool {
        self.get(path).is_ok_and(|body| body.contains("\"health\":\"true\""))
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

    /// The sum of a metric over all of its label values that `labels` appears in.
    pub fn metric(&self, name: &str, labels: &str) -> Outcome<f64> {
        let text = self.get("/metrics")?;
        let lines = text.lines().filter(|line| line.starts_with(name) && line.contains(labels));
        Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
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

/// A free address on this machine.
fn local() -> String {
    format!("127.0.0.1:{}", ports::free())
}
