//! Clusters of real etcds: started, killed, restarted, frozen and restored from a snapshot.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use millpond::proto::etcdserverpb::SnapshotRequest;
use rustix::process::Signal;
use tempfile::TempDir;

use super::{
    client::{Client, eventually},
    ports,
    process::Process,
    toolchain::{Release, etcdutl},
};

/// How a cluster is to be started.
pub struct Builder {
    release: Release,
    members: usize,
    fixed_identity: bool,
    durable: bool,
    flags: Vec<String>,
}

impl Builder {
    pub fn members(mut self, members: usize) -> Self {
        self.members = members;
        self
    }

    /// Gives a single member the same cluster and member ids as every other cluster started so: ids are hashes of the
    /// advertised peer URL, which nobody dials in a cluster of one.
    pub fn fixed_identity(mut self) -> Self {
        self.fixed_identity = true;
        self
    }

    /// Flushes to disk, as a test of durability needs.
    pub fn durable(mut self) -> Self {
        self.durable = true;
        self
    }

    /// How often a quiet watcher with `progress_notify` hears of it.
    pub fn progress_interval(self, interval: Duration) -> Self {
        let name = if self.release.minor() < (3, 6) {
            "--experimental-watch-progress-notify-interval"
        } else {
            "--watch-progress-notify-interval"
        };
        self.flag(format!("{name}={}ms", interval.as_millis()))
    }

    /// Any other flag of etcd, as `--name=value`.
    pub fn flag(mut self, flag: impl Into<String>) -> Self {
        self.flags.push(flag.into());
        self
    }

    /// Starts the members and waits until they serve.
    pub async fn start(self) -> Cluster {
        let mut cluster = Cluster::new(self);
        for member in 0..cluster.members.len() {
            cluster.launch(member);
        }
        cluster.ready().await;
        cluster
    }
}

/// One member: where it lives, and its process while it runs.
struct Member {
    name: String,
    client_port: u16,
    peer_port: u16,
    data: PathBuf,
    process: Option<Process>,
}

/// A running cluster, killed on drop.
pub struct Cluster {
    members: Vec<Member>,
    options: Builder,
    home: TempDir,
}

impl Cluster {
    pub fn builder(release: Release) -> Builder {
        Builder { release, members: 1, fixed_identity: false, durable: false, flags: Vec::new() }
    }

    /// One member, with default settings.
    pub async fn single(release: Release) -> Self {
        Self::builder(release).start().await
    }

    fn new(options: Builder) -> Self {
        let home = TempDir::with_prefix("millpond-etcd-").unwrap();
        let member = |number: usize| {
            let name = format!("m{number}");
            let data = home.path().join(&name);
            Member { name, client_port: ports::free(), peer_port: ports::free(), data, process: None }
        };
        Self { members: (0..options.members).map(member).collect(), options, home }
    }

    pub fn release(&self) -> &Release {
        &self.options.release
    }

    pub fn size(&self) -> usize {
        self.members.len()
    }

    /// A member's `host:port` for clients.
    pub fn endpoint(&self, member: usize) -> String {
        format!("127.0.0.1:{}", self.members[member].client_port)
    }

    pub fn endpoints(&self) -> Vec<String> {
        (0..self.members.len()).map(|member| self.endpoint(member)).collect()
    }

    /// A client of one member.
    pub fn client(&self, member: usize) -> Client {
        Client::new(&self.endpoint(member))
    }

    /// The running process of a member.
    pub fn process(&mut self, member: usize) -> &mut Process {
        self.members[member].process.as_mut().expect("the member runs")
    }

    /// A directory for the test's own files, gone with the cluster.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// SIGKILL.
    pub fn kill(&mut self, member: usize) {
        if let Some(mut process) = self.members[member].process.take() {
            process.kill();
        }
    }

    /// Starts a killed member again on its data and waits until it serves. It cannot where the majority is gone.
    pub async fn restart(&mut self, member: usize) {
        self.launch(member);
        self.member_ready(member).await;
    }

    /// Starts a killed member again, without waiting.
    pub fn launch(&mut self, member: usize) {
        let command = self.command(member);
        let log = self.home.path().join(format!("m{member}.log"));
        self.members[member].process = Some(Process::start(command, &log));
    }

    /// SIGSTOP: connections stay open and nothing answers.
    pub fn freeze(&mut self, member: usize) {
        self.process(member).signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn thaw(&mut self, member: usize) {
        self.process(member).signal(Signal::CONT);
    }

    /// The member that leads now, as the first member that answers sees it.
    pub async fn leader(&mut self) -> usize {
        let clients: Vec<Client> = (0..self.size()).map(|member| self.client(member)).collect();
        eventually("a leader", async || {
            let mut ids = Vec::new();
            let mut leader = 0;
            for client in &clients {
                let status = client.status().await.ok();
                leader = status.as_ref().map_or(leader, |status| status.leader);
                ids.push(status.and_then(|status| status.header).map(|header| header.member_id));
            }
            ids.iter().position(|id| *id == Some(leader))
        })
        .await
    }

    /// Waits until every running member answers linearizable reads.
    pub async fn ready(&mut self) {
        for member in 0..self.members.len() {
            if self.members[member].process.is_some() {
                self.member_ready(member).await;
            }
        }
    }

    async fn member_ready(&mut self, member: usize) {
        let client = self.client(member);
        let process = self.members[member].process.as_mut().expect("the member runs");
        eventually("an etcd that serves", async || {
            assert!(process.exited().is_none(), "etcd ended at its start:\n{}", process.log_tail());
            tokio::time::timeout(Duration::from_secs(2), client.revision()).await.ok()?.ok()
        })
        .await;
    }

    /// Saves a snapshot of a member's store to a file in [`Self::home`].
    pub async fn save_snapshot(&self, name: &str) -> PathBuf {
        let path = self.home.path().join(name);
        let mut stream = self.client(0).maintenance.snapshot(SnapshotRequest {}).await.unwrap().into_inner();
        let mut blob = Vec::new();
        while let Some(part) = stream.message().await.unwrap() {
            blob.extend_from_slice(&part.blob);
        }
        std::fs::write(&path, blob).unwrap();
        path
    }

    /// Kills a cluster of one, replaces its data by a snapshot's, and starts it with the same flags and ids.
    ///
    /// `extra` goes to `etcdutl snapshot restore`, such as `--bump-revision=1000 --mark-compacted`.
    pub async fn restore(&mut self, snapshot: &Path, extra: &[&str]) {
        assert_eq!(self.size(), 1, "only a cluster of one is restored");
        self.kill(0);
        let _ = std::fs::remove_dir_all(&self.members[0].data);
        let output = Command::new(etcdutl())
            .args(["snapshot", "restore"])
            .arg(snapshot)
            .arg(format!("--data-dir={}", self.members[0].data.display()))
            .args(self.identity(0))
            .args(extra)
            .output()
            .unwrap();
        assert!(output.status.success(), "restore failed: {}", String::from_utf8_lossy(&output.stderr));
        self.restart(0).await;
    }

    /// Kills a cluster of one and starts another in its place: same address, empty, with ids of its own.
    pub async fn replace(&mut self) {
        self.kill(0);
        let _ = std::fs::remove_dir_all(&self.members[0].data);
        self.options.flags.push("--initial-cluster-token=another".to_owned());
        self.restart(0).await;
    }

    /// The flags from which cluster and member ids follow.
    fn identity(&self, member: usize) -> Vec<String> {
        let peers: Vec<String> = self.members.iter().map(|m| format!("{}={}", m.name, self.peer_url(m))).collect();
        vec![
            format!("--name={}", self.members[member].name),
            format!("--initial-advertise-peer-urls={}", self.peer_url(&self.members[member])),
            format!("--initial-cluster={}", peers.join(",")),
        ]
    }

    fn peer_url(&self, member: &Member) -> String {
        let port = if self.options.fixed_identity { 1 } else { member.peer_port };
        format!("http://127.0.0.1:{port}")
    }

    fn command(&self, member: usize) -> Command {
        let own = &self.members[member];
        let client_url = format!("http://127.0.0.1:{}", own.client_port);
        // A cluster of one has nobody to wait for; three on a loaded machine must not elect anew at every hiccup.
        let (heartbeat, election) = if self.size() == 1 { (20, 200) } else { (100, 1000) };
        let mut command = Command::new(&self.options.release.etcd);
        command
            .args(self.identity(member))
            .arg(format!("--data-dir={}", own.data.display()))
            .arg(format!("--listen-client-urls={client_url}"))
            .arg(format!("--advertise-client-urls={client_url}"))
            .arg(format!("--listen-peer-urls=http://127.0.0.1:{}", own.peer_port))
            .arg(format!("--heartbeat-interval={heartbeat}"))
            .arg(format!("--election-timeout={election}"))
            .arg("--log-level=warn")
            .args(&self.options.flags);
        if !self.options.durable {
            command.arg("--unsafe-no-fsync");
        }
        command
    }
}
