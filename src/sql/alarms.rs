//! The alarms that are on: which member has which. As in etcd, anybody's may be on, the embedded store's own or not.

use std::{collections::BTreeSet, sync::Arc};

use crate::proto::etcdserverpb::{AlarmMember, AlarmType};

/// The most alarms that clients can turn on: they stay in memory, and nobody needs so many.
const MOST: usize = 1024;

/// An alarm of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Alarm {
    /// Its type, which need not be one that is known.
    pub kind: i32,
    /// The member's id, which need not be one that there is.
    pub member_id: u64,
}

impl From<Alarm> for AlarmMember {
    fn from(alarm: Alarm) -> Self {
        Self { member_id: alarm.member_id, alarm: alarm.kind }
    }
}

/// A set of alarms. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Alarms(Arc<BTreeSet<Alarm>>);

impl Alarms {
    /// Whether some member has an alarm of this type.
    pub fn any(&self, kind: AlarmType) -> bool {
        self.of(kind.into()).next().is_some()
    }

    /// The alarms of a type; 0 stands for all.
    pub fn of(&self, kind: i32) -> impl Iterator<Item = Alarm> {
        self.0.iter().copied().filter(move |alarm| kind == 0 || alarm.kind == kind)
    }

    /// Whether clients can turn no other alarm on.
    pub fn are_full(&self) -> bool {
        self.0.len() >= MOST
    }

    /// Whether this alarm is on.
    pub fn contains(&self, alarm: Alarm) -> bool {
        self.0.contains(&alarm)
    }

    /// Adds an alarm.
    pub fn insert(&mut self, alarm: Alarm) {
        Arc::make_mut(&mut self.0).insert(alarm);
    }

    /// Removes an alarm.
    pub fn remove(&mut self, alarm: Alarm) {
        Arc::make_mut(&mut self.0).remove(&alarm);
    }
}

impl FromIterator<Alarm> for Alarms {
    fn from_iter<I: IntoIterator<Item = Alarm>>(alarms: I) -> Self {
        Self(Arc::new(alarms.into_iter().collect()))
    }
}
