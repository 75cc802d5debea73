//! Decides which endpoints may be used, which cluster they belong to, and whether authentication is on.
//!
//! The roster is a state machine without I/O or clock: probes report to it, and it publishes a [`Health`].
//!
//! **The cluster.** The first configured endpoint that answers sets the cluster. Endpoints that show another cluster id are
//! refused. When no reachable endpoint shows the cluster's id any more, all reachable ones agree on another, and one of
//! them used to belong to the cluster, then the cluster was replaced, and the new id is adopted. An endpoint that never
//! belonged cannot take over just because the others are gone.
//!
//! **Authentication.** It is on when one usable member says so, and off when all say so. While a change may be under way
//! ([`Roster::hold`]) it is neither, and afterwards until every usable member was asked anew.

use tokio::sync::watch;

use super::{
    Gate,
    endpoint::EndpointId,
    health::{AuthState, EndpointHealth, Health, Report, Standing},
    metrics::Metrics,
};
use crate::signal::{Signal, SignalReader};

/// Keeps the account; see the module's comment.
pub(super) struct Roster {
    members: Vec<Member>,
    cluster: Option<u64>,
    auth: AuthState,
    holds: usize,
    epoch: u64,
    health: watch::Sender<Health>,
    auth_told: Signal<AuthState>,
    gate_told: Signal<Gate>,
    metrics: Metrics,
}

struct Member {
    name: String,
    concluded: bool,
    suspect: bool,
    reachable: bool,
    report: Option<Report>,
    error: Option<String>,
    /// It has shown the present cluster's id.
    belonged: bool,
    /// The epoch in which the authentication of its report was asked.
    epoch: u64,
}

impl Member {
    fn new(name: String) -> Self {
        Member {
            name,
            concluded: false,
            suspect: false,
            reachable: false,
            report: None,
            error: None,
            belonged: false,
            epoch: 0,
        }
    }

    fn shown_cluster(&self) -> Option<u64> {
        self.report.as_ref().filter(|_| self.reachable).map(|report| report.cluster_id)
    }

    fn standing(&self, cluster: Option<u64>) -> Standing {
        match self.shown_cluster() {
            _ if !self.concluded || self.suspect => Standing::Examining,
            None => Standing::Down,
            Some(_) if cluster.is_none() => Standing::Examining,
            shown if shown == cluster => Standing::Well,
            Some(_) => Standing::Foreign,
        }
    }
}

impl Roster {
    pub(super) fn new(names: Vec<String>, metrics: Metrics) -> Self {
        let members: Vec<Member> = names.into_iter().map(Member::new).collect();
        let initial = Health {
            reachable: false,
            has_leader: false,
            cluster_id: None,
            auth: AuthState::Unknown,
            endpoints: Vec::new(),
        };
        let mut roster = Roster {
            members,
            cluster: None,
            auth: AuthState::Unknown,
            holds: 0,
            epoch: 0,
            auth_told: Signal::new(AuthState::Unknown),
            gate_told: Signal::new(initial.gate()),
            health: watch::Sender::new(initial),
            metrics,
        };
        roster.publish();
        roster
    }

    pub(super) fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    pub(super) fn auth(&self) -> SignalReader<AuthState> {
        self.auth_told.reader()
    }

    pub(super) fn gate(&self) -> SignalReader<Gate> {
        self.gate_told.reader()
    }

    /// To be read before a probe starts: its answer on authentication counts only while this has not changed.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Takes in what a probe, begun in `epoch`, found.
    pub(super) fn record(&mut self, at: EndpointId, epoch: u64, found: Result<Report, String>) {
        let Some(member) = self.members.get_mut(at.0) else { return };
        member.concluded = true;
        member.suspect = false;
        member.reachable = found.is_ok();
        match found {
            Ok(report) => {
                member.report = Some(report);
                member.epoch = epoch;
                member.error = None;
            }
            Err(error) => {
                self.metrics.probe_failures.with_label_values(&[&member.name]).inc();
                member.error = Some(error);
            }
        }
        self.settle_cluster();
        self.publish();
    }

    /// A caller saw the endpoint fail: not to be preferred until its next probe. Returns whether that is news.
    pub(super) fn suspect(&mut self, at: EndpointId) -> bool {
        let Some(member) = self.members.get_mut(at.0) else { return false };
        let news = !member.suspect && member.reachable;
        if news {
            member.suspect = true;
            self.publish();
        }
        news
    }

    /// Authentication may be switched on from now on.
    pub(super) fn hold(&mut self) {
        self.holds += 1;
        self.publish();
    }

    /// The change is over: what members said before counts no more.
    pub(super) fn release(&mut self) {
        self.holds = self.holds.saturating_sub(1);
        self.epoch += 1;
        self.publish();
    }

    fn settle_cluster(&mut self) {
        match self.cluster {
            None => {
                // Those configured earlier have precedence, so their first probe is awaited.
                let mut concluded = self.members.iter().take_while(|member| member.concluded);
                if let Some(first) = concluded.find_map(Member::shown_cluster) {
                    tracing::info!(cluster_id = format!("{first:x}"), "upstream cluster found");
                    self.adopt(first);
                }
            }
            Some(current) => {
                if let Some(new) = self.replacement(current) {
                    let (old, new_id) = (format!("{current:x}"), format!("{new:x}"));
                    tracing::error!(old, new = new_id, "upstream was replaced by another cluster");
                    self.metrics.clusters_replaced.inc();
                    self.members.iter_mut().for_each(|member| member.belonged = false);
                    self.adopt(new);
                }
            }
        }
        let cluster = self.cluster;
        for member in &mut self.members {
            member.belonged |= cluster.is_some() && member.shown_cluster() == cluster;
        }
    }

    fn replacement(&self, current: u64) -> Option<u64> {
        let shown = || self.members.iter().filter_map(|member| Some((member, member.shown_cluster()?)));
        let (_, new) = shown().next()?;
        let agreed = new != current && shown().all(|(_, id)| id == new);
        (agreed && shown().any(|(member, _)| member.belonged)).then_some(new)
    }

    fn adopt(&mut self, cluster: u64) {
        self.cluster = Some(cluster);
        self.epoch += 1;
        for member in self.members.iter_mut().filter(|member| member.shown_cluster() == Some(cluster)) {
            member.epoch = self.epoch;
        }
    }

    fn settle_auth(&mut self) {
        let cluster = self.cluster;
        let well = || self.members.iter().filter(|member| member.standing(cluster) == Standing::Well);
        let says = |member: &Member| match &member.report {
            Some(report) if member.epoch == self.epoch => report.auth,
            _ => AuthState::Unknown,
        };
        let settled = if well().any(|member| says(member) == AuthState::On) {
            AuthState::On
        } else if self.holds > 0 {
            if self.auth == AuthState::On { AuthState::On } else { AuthState::Changing }
        } else if well().next().is_some() && well().all(|member| says(member) == AuthState::Off) {
            AuthState::Off
        } else {
            self.auth
        };
        if settled != self.auth {
            tracing::info!(was = ?self.auth, is = ?settled, "authentication upstream");
            self.auth = settled;
        }
        self.metrics.auth.set(match settled {
            AuthState::Unknown => -1,
            AuthState::Off => 0,
            AuthState::Changing | AuthState::On => 1,
        });
    }

    fn publish(&mut self) {
        self.settle_auth();
        let endpoints: Vec<EndpointHealth> = self.members.iter().map(|member| self.describe(member)).collect();
        let well = || endpoints.iter().filter(|endpoint| endpoint.standing == Standing::Well);
        let health = Health {
            reachable: well().next().is_some(),
            has_leader: well().any(|endpoint| endpoint.report.as_ref().is_some_and(|report| report.has_leader)),
            cluster_id: self.cluster,
            auth: self.auth,
            endpoints,
        };
        self.auth_told.set(self.auth);
        self.gate_told.set(health.gate());
        self.log_changes(&health);
        self.health.send_if_modified(|published| {
            let changed = *published != health;
            *published = health;
            changed
        });
    }

    fn describe(&self, member: &Member) -> EndpointHealth {
        EndpointHealth {
            name: member.name.clone(),
            standing: member.standing(self.cluster),
            report: member.report.clone(),
            error: member.error.clone(),
        }
    }

    fn log_changes(&self, new: &Health) {
        let old = self.health.borrow();
        for (index, endpoint) in new.endpoints.iter().enumerate() {
            let name = endpoint.name.as_str();
            let gauge = |standing| i64::from(endpoint.standing == standing);
            self.metrics.well.with_label_values(&[name]).set(gauge(Standing::Well));
            self.metrics.foreign.with_label_values(&[name]).set(gauge(Standing::Foreign));
            let was = old.endpoints.get(index).map_or(Standing::Examining, |endpoint| endpoint.standing);
            if was != endpoint.standing {
                log_change(endpoint, self.cluster);
            }
        }
    }
}

fn log_change(endpoint: &EndpointHealth, cluster: Option<u64>) {
    let name = endpoint.name.as_str();
    match endpoint.standing {
        Standing::Examining => tracing::debug!(endpoint = name, "endpoint is examined"),
        Standing::Well => {
            let version = endpoint.report.as_ref().and_then(|report| report.version).map(tracing::field::display);
            tracing::info!(endpoint = name, version, "endpoint is well");
        }
        Standing::Down => tracing::warn!(endpoint = name, error = endpoint.error, "endpoint does not answer"),
        Standing::Foreign => tracing::error!(
            endpoint = name,
            cluster_id = endpoint.report.as_ref().map(|report| format!("{:x}", report.cluster_id)),
            expected = cluster.map(|id| format!("{id:x}")),
            "endpoint belongs to another cluster and is refused"
        ),
    }
}

#[cfg(test)]
mod tests;
