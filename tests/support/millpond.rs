//! The Millpond binary as a child process in front of real etcds.

use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use super::{
    client::{Client, PATIENCE, eventually, http_get},
    ports,
    process::{self, Process},
};

/// A running `millpond serve`, killed on drop.
pub struct Millpond {
    pub process: Process,
    /// `host:port` for clients.
    pub endpoint: String,
    /// `host:port` of metrics and health.
    pub admin: String,
    flags: Vec<String>,
    environment: Vec<(&'static str, String)>,
    home: TempDir,
}

impl Millpond {
    /// Starts it in front of `endpoints` with further flags (`--name=value`), and waits until it is ready.
    pub async fn start(endpoints: &[String], flags: &[&str]) -> Self {
        let mut millpond = Self::launch(endpoints, flags);
        millpond.ready().await;
        millpond
    }

    /// Starts it with further variables in its environment, and waits until it is ready.
    pub async fn start_in(environment: Vec<(&'static str, String)>, endpoints: &[String], flags: &[&str]) -> Self {
        let mut millpond = Self::launch_in(environment, endpoints, flags);
        millpond.ready().await;
        millpond
    }

    /// Starts it without waiting, as for an upstream that is down.
    pub fn launch(endpoints: &[String], flags: &[&str]) -> Self {
        Self::launch_in(Vec::new(), endpoints, flags)
    }

    fn launch_in(environment: Vec<(&'static str, String)>, endpoints: &[String], flags: &[&str]) -> Self {
        let endpoint = format!("127.0.0.1:{}", ports::free());
        let admin = format!("127.0.0.1:{}", ports::free());
        let home = TempDir::with_prefix("millpond-").unwrap();
        let mut all = vec![format!("--listen={endpoint}"), format!("--admin-listen={admin}")];
        if !endpoints.is_empty() {
            all.push(format!("--endpoints={}", endpoints.join(",")));
        }
        all.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let process = serve(&all, &environment, &home);
        Self { process, endpoint, admin, flags: all, environment, home }
    }

    /// A client of it.
    pub fn client(&self) -> Client {
        Client::new(&self.endpoint)
    }

    /// SIGKILL, then a start with the same flags and ports; waits until it is ready.
    pub async fn restart(&mut self) {
        self.process.kill();
        self.process = serve(&self.flags, &self.environment, &self.home);
        self.ready().await;
    }

    /// Waits until the admin port says ready.
    pub async fn ready(&mut self) {
        let (admin, process) = (&self.admin, &mut self.process);
        eventually("a Millpond that is ready", async || {
            assert!(process.exited().is_none(), "millpond ended at its start:\n{}", process.log_tail());
            http_get(admin, "/readyz").await.ok().filter(|(status, _)| *status == 200)
        })
        .await;
    }

    /// Waits until everything that is cached, so many prefixes, is in memory. Ready says only that somebody can be asked.
    pub async fn warm(&self, prefixes: usize) {
        eventually("a warm cache", async || {
            (self.metric("millpond_feed_phase{phase=\"live\"").await == prefixes as f64).then_some(())
        })
        .await;
    }

    /// Waits until a read is answered from memory, and so has what was written through this Millpond before.
    pub async fn has_in_memory(&self, client: &Client, key: &str) {
        let from_memory = async || self.metric("millpond_server_reads_total{answered=\"memory\"").await;
        let before = from_memory().await;
        eventually("an answer from memory", async || {
            client.get(key.to_owned()).await.ok()?;
            (from_memory().await > before).then_some(())
        })
        .await;
    }

    /// The value of a metric, summed over its labels; `name` may have the first of them, as in `name{label="value"`.
    pub async fn metric(&self, name: &str) -> f64 {
        let (status, text) = http_get(&self.admin, "/metrics").await.unwrap();
        assert_eq!(status, 200, "/metrics answers");
        let of_name = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ',', ' ']));
        text.lines().filter(of_name).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// Asks it to stop and waits for the end: the exit code.
    pub async fn terminate(&mut self) -> Option<i32> {
        self.process.signal(Signal::TERM);
        self.process.wait(PATIENCE).await
    }

    /// Fails the test when it has ended, or has panicked anywhere.
    pub fn assert_well(&mut self) {
        assert!(self.process.exited().is_none(), "millpond ended:\n{}", self.process.log_tail());
        let log = self.process.log();
        assert!(!log.contains("panicked at"), "millpond panicked:\n{}", self.process.log_tail());
    }
}

/// A moment for things that must *not* happen to happen.
pub async fn breathe(millis: u64) {
    tokio::time::sleep(Duration::from_millis(millis)).await;
}

fn serve(flags: &[String], environment: &[(&'static str, String)], home: &TempDir) -> Process {
    let mut command = process::millpond();
    command.envs(environment.iter().map(|(name, value)| (name, value)));
    command.arg("serve").args(flags).current_dir(home.path());
    Process::start(command, &home.path().join("millpond.log"))
}
