//! The servers that are compared, as child processes that die with the run.

use std::{fs, path::Path, process::Command};

use bytes::Bytes;
use tempfile::TempDir;

use super::{
    Outcome,
    child::{self, Child, local},
    toolchain::Release,
};

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

/// A running server, with a directory of its own.
pub type Server = Child<System>;

impl Server {
    /// An empty etcd. It does not wait for the disk, whose speed is not what is compared.
    pub fn etcd() -> Outcome<Self> {
        Self::start(System::Etcd, Self::is_well, |endpoint, _, home| {
            let mut command = child::etcd(endpoint, home);
            command.arg("--unsafe-no-fsync");
            Ok(command)
        })
    }

    /// etcd's proxy in front of an endpoint.
    pub fn grpc_proxy(upstream: &str) -> Outcome<Self> {
        Self::start(System::GrpcProxy, Self::is_well, |endpoint, _, home| {
            let mut command = Command::new(Release::newest().etcd);
            command.args(["grpc-proxy", "start", "--endpoints", upstream, "--listen-addr", endpoint]);
            command.current_dir(home);
            Ok(command)
        })
    }

    /// The floor, with that gRPC-framed answer.
    pub fn bare(answer: &Bytes) -> Outcome<Self> {
        Self::start(System::Bare, Self::listens, |endpoint, _, home| {
            let file = home.join("answer");
            fs::write(&file, answer)?;
            let port = endpoint.rsplit(':').next().unwrap_or_default();
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["bare", port]).arg(&file);
            Ok(command)
        })
    }

    /// Millpond in front of an endpoint, not yet warm.
    pub fn millpond(upstream: &str) -> Outcome<Self> {
        let is_there = |server: &Self| server.get("/livez").is_ok();
        Self::start(System::Millpond, is_there, |endpoint, admin, home| {
            let mut command = child::millpond(endpoint, admin);
            command.args(["--endpoints", upstream]).current_dir(home);
            Ok(command)
        })
    }

    /// Starts what `command` makes of the addresses for clients and for operators and of a directory, and waits until it is as
    /// it should be.
    fn start(
        system: System,
        is_so: impl Fn(&Self) -> bool,
        command: impl FnOnce(&str, &str, &Path) -> Outcome<Command>,
    ) -> Outcome<Self> {
        let home = TempDir::with_prefix("millpond-compare-")?;
        let endpoint = local();
        // The others have one port for everything.
        let admin = if system == System::Millpond { local() } else { endpoint.clone() };
        let command = command(&endpoint, &admin, home.path())?;
        let mut server = Self::spawn((system, system.name()), (endpoint, admin), command, home.path()).housed(home);
        server.wait(is_so)?;
        Ok(server)
    }

    /// The sum of a metric over all of its label values that `labels` appears in.
    pub fn metric(&self, name: &str, labels: &str) -> Outcome<f64> {
        let text = self.get("/metrics")?;
        let lines = text.lines().filter(|line| line.starts_with(name) && line.contains(labels));
        Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }
}
