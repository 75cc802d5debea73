//! `millpond check`: is a cache what its upstream has; do two endpoints agree; is a data directory sound?

use std::{io, path::PathBuf};

use clap::Args;
use etcd_client::{Client, GetOptions, KeyValue};
use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::{
    cache::CheckReport,
    sql::{self, SqlError},
};

/// Shown below the help.
pub const EXAMPLES: &str = "\
Keys and their mod revisions are compared at one revision, page by page.

Examples:
  A running cache, with its upstream:  millpond check
  Any two endpoints:                   millpond check --endpoints a:2379 --against b:2379
  An embedded store, with itself:      millpond check --data-dir millpond-data";

/// Keys in a page.
const PAGE: i64 = 5_000;
/// Differing keys that are named.
const NAMED: usize = 10;

/// Arguments.
#[derive(Debug, Args)]
pub struct Check {
    /// Operators' address of the running cache to check against its upstream
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:23791")]
    admin: String,
    /// Endpoint of one side
    #[arg(long, value_name = "HOST:PORT", requires = "against")]
    endpoints: Option<String>,
    /// Endpoint of the other side
    #[arg(long, value_name = "HOST:PORT", requires = "endpoints")]
    against: Option<String>,
    /// Data directory of an embedded store to check for damage
    #[arg(long, value_name = "DIR", conflicts_with = "endpoints")]
    data_dir: Option<PathBuf>,
}

/// Why a check is not passed.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The two sides are not the same.
    #[error("different at revision {revision}: {}", .differing.join(", "))]
    Different {
        /// Where they were compared.
        revision: i64,
        /// The first differing keys.
        differing: Vec<String>,
    },
    /// The store is damaged.
    #[error("the store is damaged: {}", .0.join("; "))]
    Damaged(Vec<String>),
    /// An endpoint does not answer.
    #[error("{endpoint}: {source}")]
    Endpoint {
        /// The endpoint.
        endpoint: String,
        /// Why not.
        source: etcd_client::Error,
    },
    /// The operators' port does not answer, or says that the check could not be run.
    #[error("{address}: {problem}")]
    Admin {
        /// The address.
        address: String,
        /// What is wrong.
        problem: String,
    },
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] SqlError),
    /// The runtime cannot start.
    #[error("cannot start: {0}")]
    Runtime(#[from] io::Error),
}

/// Runs the check; gives back what to tell the person who asked.
pub fn run(check: &Check) -> Result<String, CheckError> {
    if let Some(dir) = &check.data_dir {
        let report = sql::check(dir)?;
        return match report.problems.is_empty() {
            true => Ok(format!("sound: revision {}, compacted at {}\n", report.revision, report.compacted)),
            false => Err(CheckError::Damaged(report.problems)),
        };
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let report = runtime.block_on(async {
        match (&check.endpoints, &check.against) {
            (Some(one), Some(other)) => compare(one, other).await,
            _ => ask(&check.admin).await,
        }
    })?;
    let CheckReport { revision, keys, differing } = report;
    if differing.is_empty() {
        Ok(format!("the same: {keys} keys at revision {revision}\n"))
    } else {
        Err(CheckError::Different { revision, differing })
    }
}

/// Lets the running cache check itself.
async fn ask(address: &str) -> Result<CheckReport, CheckError> {
    let failed = |problem: String| CheckError::Admin { address: address.to_owned(), problem };
    let stream = TcpStream::connect(address).await.map_err(|error| failed(error.to_string()))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| failed(error.to_string()))?;
    tokio::spawn(connection);
    let request = Request::post("/check").header("host", address).body(Empty::<bytes::Bytes>::new());
    let request = request.map_err(|error| failed(error.to_string()))?;
    let response = sender.send_request(request).await.map_err(|error| failed(error.to_string()))?;
    let body = response.into_body().collect().await.map_err(|error| failed(error.to_string()))?.to_bytes();
    serde_json::from_slice(&body).map_err(|_| failed(String::from_utf8_lossy(&body).trim().to_owned()))
}

/// One side of a comparison, read page by page.
struct Side {
    endpoint: String,
    client: Client,
    revision: i64,
    next: Option<Vec<u8>>,
    page: std::vec::IntoIter<KeyValue>,
}

impl Side {
    async fn connect(endpoint: &str) -> Result<Self, CheckError> {
        let failed = |source| CheckError::Endpoint { endpoint: endpoint.to_owned(), source };
        let mut client = Client::connect([endpoint], None).await.map_err(failed)?;
        let options = GetOptions::new().with_count_only().with_limit(1);
        let answer = client.get([0], Some(options)).await.map_err(failed)?;
        let revision = answer.header().map_or(0, |header| header.revision());
        Ok(Self { endpoint: endpoint.to_owned(), client, revision, next: Some(vec![0]), page: Vec::new().into_iter() })
    }

    /// The next key and its mod revision.
    async fn next(&mut self) -> Result<Option<(Vec<u8>, i64)>, CheckError> {
        loop {
            if let Some(kv) = self.page.next() {
                return Ok(Some((kv.key().to_vec(), kv.mod_revision())));
            }
            let Some(start) = self.next.take() else { return Ok(None) };
            let options = GetOptions::new()
                .with_from_key()
                .with_keys_only()
                .with_limit(PAGE)
                .with_serializable()
                .with_revision(self.revision);
            let answer = self.client.get(start, Some(options)).await;
            let mut answer =
                answer.map_err(|source| CheckError::Endpoint { endpoint: self.endpoint.clone(), source })?;
            let kvs = answer.take_kvs();
            self.next = kvs.last().filter(|_| answer.more()).map(|last| [last.key(), &[0]].concat());
            self.page = kvs.into_iter();
        }
    }
}

/// Compares two endpoints at the lower of their revisions.
async fn compare(one: &str, other: &str) -> Result<CheckReport, CheckError> {
    let (mut one, mut other) = (Side::connect(one).await?, Side::connect(other).await?);
    let revision = one.revision.min(other.revision);
    (one.revision, other.revision) = (revision, revision);
    let mut report = CheckReport { revision, ..CheckReport::default() };
    let (mut left, mut right) = (one.next().await?, other.next().await?);
    while left.is_some() || right.is_some() {
        report.keys += 1;
        let order = match (&left, &right) {
            (Some(left), Some(right)) => left.0.cmp(&right.0),
            (Some(_), None) => std::cmp::Ordering::Less,
            _ => std::cmp::Ordering::Greater,
        };
        if left != right && report.differing.len() < NAMED {
            let key = if order.is_le() { &left } else { &right };
            report.differing.extend(key.iter().map(|(key, _)| String::from_utf8_lossy(key).into_owned()));
        }
        if order.is_le() {
            left = one.next().await?;
        }
        if order.is_ge() {
            right = other.next().await?;
        }
    }
    Ok(report)
}
