//! The alarms of the embedded store, as etcd's `/health` tells them.

use std::time::Duration;

use crate::{
    proto::{
        etcdserverpb::{AlarmRequest, AlarmResponse, AlarmType},
        paths,
    },
    upstream::Upstream,
};

/// It is a look into memory.
const DEADLINE: Duration = Duration::from_secs(5);

/// Why a server within the process is not healthy: the first alarm that is on and that `query` does not exclude.
pub async fn complaint(upstream: &Upstream, query: &str) -> Option<String> {
    let at = upstream.endpoints().next()?;
    let answer: Result<AlarmResponse, _> = upstream.unary(at, paths::ALARM, &AlarmRequest::default(), DEADLINE).await;
    match answer {
        Ok(answer) => unexcused(answer.alarms.iter().map(|on| on.alarm()), query),
        Err(status) => Some(format!("ALARM ERROR:{}", status.message)),
    }
}

fn unexcused(mut alarms: impl Iterator<Item = AlarmType>, query: &str) -> Option<String> {
    let excluded = |alarm: AlarmType| {
        query.split('&').any(|term| term.strip_prefix("exclude=").is_some_and(|name| name == alarm.as_str_name()))
    };
    let on = alarms.find(|alarm| !excluded(*alarm))?;
    Some(format!("ALARM {}", on.as_str_name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_alarm_counts_that_is_not_excluded() {
        for (query, complaint) in [
            ("", Some("ALARM NOSPACE")),
            ("exclude=", Some("ALARM NOSPACE")),
            ("exclude=nospace", Some("ALARM NOSPACE")),
            ("serializable=true&exclude=NOSPACE", Some("ALARM CORRUPT")),
            ("exclude=CORRUPT&exclude=NOSPACE", None),
        ] {
            let on = [AlarmType::Nospace, AlarmType::Corrupt].into_iter();
            assert_eq!(unexcused(on, query).as_deref(), complaint, "{query}");
        }
        assert_eq!(unexcused(std::iter::empty(), ""), None);
    }
}
