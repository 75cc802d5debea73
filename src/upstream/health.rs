//! What is known of the endpoints, as others see it.

use super::{Gate, Version, endpoint::EndpointId};

/// Whether etcd checks permissions.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum AuthState {
    /// Nothing has answered yet.
    Unknown,
    /// Everyone may read everything.
    Off,
    /// It was off, and may be coming on: nothing new is to be given to everyone until that has been found out.
    Changing,
    /// Permissions are checked.
    On,
}

/// Whether an endpoint may be used.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Not known yet, or a caller saw it fail: a probe will tell soon.
    Examining,
    /// It answers and belongs to the cluster.
    Well,
    /// It does not answer.
    Down,
    /// It answers, but belongs to another cluster.
    Foreign,
}

/// What one probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The server's version; `None` when it could not be read.
    pub version: Option<Version>,
    /// Whether the member knows a leader.
    pub has_leader: bool,
    /// Whether the member is a learner, which refuses most calls.
    pub is_learner: bool,
    /// The cluster's id.
    pub cluster_id: u64,
    /// The member's id.
    pub member_id: u64,
    /// The Raft term.
    pub raft_term: u64,
    /// Whether this member checks permissions.
    pub auth: AuthState,
}

/// One endpoint, as far as it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointHealth {
    /// Its name.
    pub name: String,
    /// Whether it may be used.
    pub standing: Standing,
    /// What its last successful probe found.
    pub report: Option<Report>,
    /// Why its last probe failed.
    pub error: Option<String>,
}

/// The whole upstream, as far as it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// An endpoint may be used.
    pub reachable: bool,
    /// A usable endpoint knows a leader.
    pub has_leader: bool,
    /// The cluster that all usable endpoints belong to; `None` before the first has answered.
    pub cluster_id: Option<u64>,
    /// Whether permissions are checked.
    pub auth: AuthState,
    /// Every endpoint, in configured order.
    pub endpoints: Vec<EndpointHealth>,
}

impl Health {
    /// The endpoint to use: well, with a leader and a vote if there is one such, first in configured order.
    pub fn preferred(&self, avoid: &[EndpointId]) -> Option<EndpointId> {
        let well = || self.endpoints.iter().enumerate().filter(|(_, endpoint)| endpoint.standing == Standing::Well);
        let well = || well().filter(|(index, _)| !avoid.contains(&EndpointId(*index)));
        let able = |endpoint: &EndpointHealth| {
            endpoint.report.as_ref().is_some_and(|report| report.has_leader && !report.is_learner)
        };
        let best = well().find(|(_, endpoint)| able(endpoint)).or_else(|| well().next());
        best.map(|(index, _)| EndpointId(index))
    }

    /// What can be relied on, given the versions of all reachable members of the cluster.
    pub(super) fn gate(&self) -> Gate {
        let well = self.endpoints.iter().filter(|endpoint| endpoint.standing == Standing::Well);
        let version = |endpoint: &EndpointHealth| endpoint.report.as_ref().and_then(|report| report.version);
        let gate = Gate::over(well.map(|endpoint| version(endpoint).unwrap_or(Version::UNKNOWN)));
        // While nobody can be reached, what is answered from memory must look as it did before.
        let last = self.endpoints.iter().filter_map(version).min();
        if gate.lowest == Version::UNKNOWN { Gate { lowest: last.unwrap_or(Version::UNKNOWN), ..gate } } else { gate }
    }

    /// Whether a probe under way may yet find an endpoint that [`Health::preferred`] can give.
    pub fn undecided(&self, avoid: &[EndpointId]) -> bool {
        let mut endpoints = self.endpoints.iter().enumerate();
        endpoints
            .any(|(index, endpoint)| endpoint.standing == Standing::Examining && !avoid.contains(&EndpointId(index)))
    }
}
