//! Values that are readable one by one but do not go together.

use std::{net::SocketAddr, time::Duration};

use http::uri::Authority;

use super::{Config, ConfigError, Loaded, units::parse_span};
use crate::sql::AutoCompaction;

/// etcd closes connections whose clients ping more often than this, by its default.
const SHORTEST_UPSTREAM_PING: Duration = Duration::from_secs(5);

/// Some ten times what an etcd with a good disk takes for a write.
const LONGEST_BUSY_POLL: Duration = Duration::from_millis(10);

/// etcd's own lower bound of the progress interval.
const SHORTEST_PROGRESS: Duration = Duration::from_millis(100);

/// The first contradiction found, if any.
pub fn check(loaded: &Loaded) -> Result<(), ConfigError> {
    let contradiction = |(setting, problem): (&'static str, String)| {
        let origin = loaded.origin(setting);
        ConfigError::Contradiction { setting, origin, problem }
    };
    let config = &loaded.config;
    listeners(config).map_err(contradiction)?;
    durations(config).map_err(contradiction)?;
    embedded(config).map_err(contradiction)
}

type Found = Result<(), (&'static str, String)>;

fn listeners(config: &Config) -> Found {
    let (clients, admin) = (config.listen, config.admin_listen);
    if overlap(clients, admin) {
        return Err(("admin-listen", format!("{admin} is taken by listen, which is {clients}")));
    }
    let own =
        |endpoint: &&Authority| endpoint.as_str().parse().is_ok_and(|address: SocketAddr| overlap(clients, address));
    if let Some(endpoint) = config.endpoints.iter().find(own) {
        return Err(("endpoints", format!("{endpoint} is where Millpond itself listens ({clients})")));
    }
    Ok(())
}

/// Whether two addresses cannot both be bound, or name the same listener on this machine. Port 0 is a new port each time.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let local = |bound: SocketAddr, other: SocketAddr| bound.ip().is_unspecified() && other.ip().is_loopback();
    let both_any = a.ip().is_unspecified() && b.ip().is_unspecified();
    a.port() != 0 && a.port() == b.port() && (a.ip() == b.ip() || both_any || local(a, b) || local(b, a))
}

fn durations(config: &Config) -> Found {
    let above_zero = [
        ("connect-timeout", config.connect_timeout),
        ("read-timeout", config.read_timeout),
        ("upstream-keepalive-timeout", config.upstream_keepalive_timeout),
        ("grpc-keepalive-interval", config.grpc_keepalive_interval),
        ("grpc-keepalive-timeout", config.grpc_keepalive_timeout),
        ("history-age", config.history_age),
    ];
    if let Some((setting, _)) = above_zero.iter().find(|(_, span)| span.is_zero()) {
        return Err((setting, "must be above 0".to_owned()));
    }
    if config.upstream_keepalive_interval < SHORTEST_UPSTREAM_PING {
        return Err(("upstream-keepalive-interval", "must be at least 5s, or etcd closes the connection".to_owned()));
    }
    if config.busy_poll > LONGEST_BUSY_POLL {
        return Err(("busy-poll", "must be at most 10ms: it takes a core for that long".to_owned()));
    }
    if config.progress_interval < SHORTEST_PROGRESS {
        return Err(("progress-interval", "must be at least 100ms".to_owned()));
    }
    Ok(())
}

/// Settings of the embedded store do nothing beside endpoints; whoever sets both expects something that will not happen.
fn embedded(config: &Config) -> Found {
    let given = [
        ("data-dir", config.data_dir.is_some()),
        ("quota-backend-bytes", config.quota_backend_bytes.is_some()),
        ("auto-compaction-mode", config.auto_compaction_mode.is_some()),
        ("auto-compaction-retention", config.auto_compaction_retention.is_some()),
    ];
    if let Some((setting, _)) = given.iter().find(|(_, given)| *given && !config.is_embedded()) {
        return Err((setting, "belongs to the embedded store, which is off because endpoints are set".to_owned()));
    }
    auto_compaction(config).map(drop)
}

/// What etcd's two flags of that name mean together. The error names the setting and the problem.
pub fn auto_compaction(config: &Config) -> Result<Option<AutoCompaction>, (&'static str, String)> {
    let keep = config.auto_compaction_retention.as_deref().unwrap_or("0");
    let retention = |problem: &str| ("auto-compaction-retention", format!("{keep:?} {problem}"));
    match config.auto_compaction_mode.as_deref().unwrap_or("periodic") {
        "periodic" => {
            let span = match keep.parse::<u32>() {
                Ok(hours) => Duration::from_secs(u64::from(hours) * 3600),
                Err(_) => parse_span(keep).map_err(|_| retention("is neither a duration nor a number of hours"))?,
            };
            Ok((!span.is_zero()).then_some(AutoCompaction::Periodic(span)))
        }
        "revision" => {
            let count = keep.parse::<i64>().ok().filter(|&count| count >= 0);
            let count = count.ok_or_else(|| retention("is not a number of revisions"))?;
            Ok((count > 0).then_some(AutoCompaction::Revisions(count)))
        }
        mode => Err(("auto-compaction-mode", format!("{mode:?} is neither periodic nor revision"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(change: impl FnOnce(&mut Config)) -> Config {
        let mut config = Config::default();
        change(&mut config);
        config
    }

    #[test]
    fn two_listeners_need_two_addresses() {
        let same = |clients: &str, admin: &str| {
            let config = config(|c| (c.listen, c.admin_listen) = (clients.parse().unwrap(), admin.parse().unwrap()));
            listeners(&config).is_err()
        };
        assert!(same("127.0.0.1:1", "127.0.0.1:1"));
        assert!(same("0.0.0.0:1", "127.0.0.1:1"));
        assert!(!same("127.0.0.1:0", "127.0.0.1:0"));
        assert!(!same("127.0.0.1:1", "127.0.0.2:1"));
    }

    #[test]
    fn an_endpoint_that_is_ourselves_is_refused() {
        let config = config(|c| c.endpoints = vec![Authority::from_static("127.0.0.1:23790")]);
        assert_eq!(listeners(&config).unwrap_err().0, "endpoints");
    }

    #[test]
    fn automatic_compaction_reads_as_in_etcd() {
        let read = |mode: &str, keep: &str| {
            auto_compaction(&config(|c| {
                (c.auto_compaction_mode, c.auto_compaction_retention) = (Some(mode.into()), Some(keep.into()));
            }))
        };
        assert_eq!(read("periodic", "2"), Ok(Some(AutoCompaction::Periodic(Duration::from_secs(7200)))));
        assert_eq!(read("periodic", "5m"), Ok(Some(AutoCompaction::Periodic(Duration::from_secs(300)))));
        assert_eq!(read("revision", "1000"), Ok(Some(AutoCompaction::Revisions(1000))));
        assert_eq!(read("revision", "0"), Ok(None));
        assert_eq!(read("revision", "5m").unwrap_err().0, "auto-compaction-retention");
        assert_eq!(read("yearly", "5").unwrap_err().0, "auto-compaction-mode");
    }
}
