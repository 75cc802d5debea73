//! The servers, as child processes that die with the run, each with its data on the disk that is measured.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use super::{
    Outcome,
    child::{self, Child, local},
    toolchain,
};

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
pub type Server = Child<System>;

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
        server.wait(match system {
            System::Millpond => Self::is_warm,
            System::Etcd => Self::is_well,
            System::Engine | System::Kine(_) => Self::listens,
        })?;
        Ok(server)
    }

    /// Starts it without waiting.
    pub fn launch(system: System, home: &Path) -> Outcome<Self> {
        let (endpoint, admin) = (local(), local());
        let admin = if system == System::Etcd { endpoint.clone() } else { admin };
        let command = match system {
            System::Millpond => millpond(&endpoint, &admin, home),
            System::Engine => engine(&endpoint, home)?,
            System::Etcd => child::etcd(&endpoint, home),
            System::Kine(kine) => kine_command(kine, &endpoint, home),
        };
        Ok(Self::spawn((system, system.name()), (endpoint, admin), command, home))
    }
}

fn millpond(endpoint: &str, admin: &str, home: &Path) -> Command {
    let mut command = child::millpond(endpoint, admin);
    command.arg("--data-dir").arg(home.join("data"));
    command
}

fn engine(endpoint: &str, home: &Path) -> Outcome<Command> {
    let mut command = Command::new(env::current_exe()?);
    command.arg("engine").arg(home.join("data")).env("MILLPOND_BENCH_LISTEN", endpoint);
    Ok(command)
}

fn kine_command(kine: Kine, endpoint: &str, home: &Path) -> Command {
    let mut command = Command::new(toolchain::kine());
    let file = home.join("kine.db");
    command.arg(format!("--endpoint=sqlite://{}?{}", file.display(), kine.parameters()));
    command.args(["--listen-address", endpoint, "--metrics-bind-address=0"]).args(kine.flags());
    command
}
