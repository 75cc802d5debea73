//! The server under test, and beside it a plain etcd that must answer the same.
//!
//! Both are given the same requests in the same order. Their etcds have the same ids, so even headers must agree.

use std::{env, time::Duration};

use super::{client::Client, etcd::Cluster, millpond::Millpond, toolchain::Release};

/// Which server is under test. `MILLPOND_TEST_SUBJECT=etcd` puts etcd itself there, to test the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Millpond in front of an etcd.
    Proxy,
    /// A second etcd.
    Etcd,
}

impl Kind {
    pub fn chosen() -> Self {
        match env::var("MILLPOND_TEST_SUBJECT").as_deref() {
            Ok("etcd") => Self::Etcd,
            Ok("proxy") | Err(_) => Self::Proxy,
            Ok(other) => panic!("MILLPOND_TEST_SUBJECT is {other}; it may be proxy or etcd"),
        }
    }
}

/// The server under test with all that stands behind it.
pub struct Subject {
    pub etcd: Cluster,
    /// `None` when etcd itself is under test.
    pub millpond: Option<Millpond>,
}

impl Subject {
    /// Puts the server under test before this cluster; `flags` are Millpond's.
    pub async fn before(etcd: Cluster, flags: &[&str]) -> Self {
        let millpond = match Kind::chosen() {
            Kind::Proxy => Some(Millpond::start(&etcd.endpoints(), flags).await),
            Kind::Etcd => None,
        };
        Self { etcd, millpond }
    }

    /// `host:port` of the server under test.
    pub fn endpoint(&self) -> String {
        self.millpond.as_ref().map_or_else(|| self.etcd.endpoint(0), |millpond| millpond.endpoint.clone())
    }

    pub fn client(&self) -> Client {
        Client::new(&self.endpoint())
    }

    /// Fails the test when the server under test has ended or panicked.
    pub fn assert_well(&mut self) {
        if let Some(millpond) = &mut self.millpond {
            millpond.assert_well();
        }
    }
}

/// A plain etcd and the server under test, with equal ids and, to begin with, equal empty stores.
pub struct Twins {
    pub reference: Cluster,
    pub subject: Subject,
}

impl Twins {
    pub async fn start(release: &Release) -> Self {
        Self::with_progress_interval(release, Duration::from_secs(600)).await
    }

    /// With this interval of progress notifications on both.
    pub async fn with_progress_interval(release: &Release, interval: Duration) -> Self {
        let builder = || Cluster::builder(release.clone()).fixed_identity().progress_interval(interval);
        let (reference, behind) = tokio::join!(builder().start(), builder().start());
        let flag = format!("--progress-interval={}ms", interval.as_millis());
        Self { reference, subject: Subject::before(behind, &[&flag]).await }
    }
}
