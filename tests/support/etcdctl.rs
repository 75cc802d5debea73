//! etcdctl as a person runs it.

use std::{
    io::{PipeWriter, Write},
    process::{Command, Stdio},
};

use tempfile::TempDir;

use super::{
    client::eventually,
    process::{Process, spawn_bound},
    toolchain::etcdctl,
};

/// etcdctl pointed at one endpoint.
pub struct Etcdctl {
    endpoint: String,
    home: TempDir,
}

impl Etcdctl {
    pub fn new(endpoint: &str) -> Self {
        Self { endpoint: endpoint.to_owned(), home: TempDir::with_prefix("millpond-etcdctl-").unwrap() }
    }

    /// A directory for files, gone with this.
    pub fn home(&self) -> &std::path::Path {
        self.home.path()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(etcdctl());
        command.arg(format!("--endpoints={}", self.endpoint)).args(arguments).current_dir(self.home.path());
        command
    }

    /// Runs to the end; whether it succeeded, and what it printed, its log aside. `input` goes to its standard input.
    pub async fn outcome(&self, arguments: &[&str], input: &str) -> (bool, String) {
        let file = self.home.path().join("input");
        std::fs::write(&file, input).unwrap();
        let mut command = self.command(arguments);
        command.stdin(std::fs::File::open(file).unwrap()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = spawn_bound(command).unwrap();
        let output = tokio::task::spawn_blocking(|| child.wait_with_output().unwrap()).await.unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        let text: String = text.split_inclusive('\n').filter(|line| !line.starts_with("{\"level\"")).collect();
        (output.status.success(), text)
    }

    /// Runs to the end and must succeed; what it printed.
    pub async fn run(&self, arguments: &[&str]) -> String {
        let (succeeded, text) = self.outcome(arguments, "").await;
        assert!(succeeded, "etcdctl {arguments:?} failed: {text}");
        text
    }

    /// Starts a command that runs until it is stopped.
    pub fn start(&self, arguments: &[&str]) -> Running {
        let log = self.home.path().join(format!("{}.log", arguments.join("-").replace('/', "-")));
        let (input, typed) = std::io::pipe().unwrap();
        let process = Process::start_with_input(self.command(arguments), input.into(), &log);
        Running { process, typed }
    }
}

/// A running etcdctl, killed on drop.
pub struct Running {
    pub process: Process,
    typed: PipeWriter,
}

impl Running {
    /// Types a line into it.
    pub fn enter(&mut self, line: &str) {
        writeln!(self.typed, "{line}").unwrap();
    }

    /// Waits until it has printed this many lines, and returns them.
    pub async fn lines(&mut self, count: usize) -> Vec<String> {
        let what = format!("{count} lines from etcdctl");
        let process = &mut self.process;
        eventually(&what, async || {
            let lines: Vec<String> = process.log().lines().map(str::to_owned).collect();
            assert!(lines.len() >= count || process.exited().is_none(), "etcdctl ended after {lines:?}");
            (lines.len() >= count).then_some(lines)
        })
        .await
    }
}
