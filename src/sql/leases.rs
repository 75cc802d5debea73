//! The leases that are alive and when each runs out, on a clock that neither steps nor counts down time.

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};

use super::backend::StoredLease;

/// The shortest time to live that is granted, in seconds: etcd's with its default election timeout.
pub const MIN_TTL: i64 = 2;

/// The longest, in seconds, as in etcd.
pub const MAX_TTL: i64 = 9_000_000_000;

/// One lease.
#[derive(Clone, Copy, Debug)]
struct Lease {
    ttl: i64,
    expiry: Instant,
    /// Whether the database holds a remaining time that a renewal has to clear.
    checkpointed: bool,
    /// Whether its revocation is on its way.
    revoking: bool,
}

/// What a renewal came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// There is no such lease.
    Unknown,
    /// It has run out and must be revoked.
    Expired,
    /// It has its full time to live again, in seconds.
    Renewed {
        /// The time to live.
        ttl: i64,
        /// Whether the checkpoint in the database must be cleared before the client is told.
        clear_checkpoint: bool,
    },
}

/// All leases of a store. The database holds their ids and times to live, this table when they run out.
#[derive(Default)]
pub struct Leases {
    leases: HashMap<i64, Lease>,
    queue: BTreeSet<(Instant, i64)>,
}

impl Leases {
    /// The table after a restart: each lease has what remained at its last checkpoint, or its full time.
    pub fn recover(stored: Vec<StoredLease>, now: Instant) -> Self {
        let mut leases = Self::default();
        for lease in stored {
            let left = if lease.remaining > 0 { lease.remaining } else { lease.ttl };
            leases.insert(lease.id, lease.ttl, left, now);
            leases.leases.entry(lease.id).and_modify(|entry| entry.checkpointed = lease.remaining > 0);
        }
        leases
    }

    /// Adds a lease that has just been granted.
    pub fn grant(&mut self, id: i64, ttl: i64, now: Instant) {
        self.insert(id, ttl, ttl, now);
    }

    fn insert(&mut self, id: i64, ttl: i64, left: i64, now: Instant) {
        self.remove(id);
        let expiry = after(now, left);
        self.queue.insert((expiry, id));
        self.leases.insert(id, Lease { ttl, expiry, checkpointed: false, revoking: false });
    }

    /// Removes a lease that has been revoked.
    pub fn remove(&mut self, id: i64) {
        if let Some(lease) = self.leases.remove(&id) {
            self.queue.remove(&(lease.expiry, id));
        }
    }

    /// Whether the lease is there, run out or not.
    pub fn contains(&self, id: i64) -> bool {
        self.leases.contains_key(&id)
    }

    /// Whether the lease is there and has run out.
    pub fn is_expired(&self, id: i64, now: Instant) -> bool {
        self.leases.get(&id).is_some_and(|lease| lease.expiry <= now)
    }

    /// Starts the lease's time over, unless it has run out.
    pub fn renew(&mut self, id: i64, now: Instant) -> Renewal {
        let Some(lease) = self.leases.get_mut(&id) else { return Renewal::Unknown };
        if lease.expiry <= now {
            return Renewal::Expired;
        }
        self.queue.remove(&(lease.expiry, id));
        lease.expiry = after(now, lease.ttl);
        self.queue.insert((lease.expiry, id));
        let clear_checkpoint = std::mem::take(&mut lease.checkpointed);
        Renewal::Renewed { ttl: lease.ttl, clear_checkpoint }
    }

    /// The whole seconds that remain (0 when run out) and the granted time to live.
    pub fn time_to_live(&self, id: i64, now: Instant) -> Option<(i64, i64)> {
        let lease = self.leases.get(&id)?;
        Some((seconds(lease.expiry.saturating_duration_since(now)), lease.ttl))
    }

    /// All ids, the first to run out first.
    pub fn ids(&self) -> Vec<i64> {
        self.queue.iter().map(|(_, id)| *id).collect()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.leases.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }

    /// Up to `limit` leases that have run out and are not being revoked; they count as being revoked from now on.
    pub fn take_expired(&mut self, now: Instant, limit: usize) -> Vec<i64> {
        let due = self.queue.iter().take_while(|(expiry, _)| *expiry <= now).map(|(_, id)| *id);
        let leases = &self.leases;
        let idle = due.filter(|id| leases.get(id).is_some_and(|lease| !lease.revoking));
        let taken: Vec<i64> = idle.take(limit).collect();
        for id in &taken {
            self.leases.entry(*id).and_modify(|lease| lease.revoking = true);
        }
        taken
    }

    /// The revocation of a lease failed: it is to be tried again.
    pub fn revocation_failed(&mut self, id: i64) {
        self.leases.entry(id).and_modify(|lease| lease.revoking = false);
    }

    /// The leases that have been running for at least `running` since their last renewal, so that what remains of them
    /// deserves to be kept.
    pub fn long_running(&self, running: Duration, now: Instant) -> Vec<i64> {
        let is_due = |lease: &Lease| {
            let left = lease.expiry.saturating_duration_since(now);
            Duration::from_secs(lease.ttl.unsigned_abs()).saturating_sub(left) >= running && !left.is_zero()
        };
        self.leases.iter().filter(|(_, lease)| is_due(lease)).map(|(id, _)| *id).collect()
    }

    /// The lease as the database is to keep it now, with what remains in whole seconds rounded up.
    pub fn checkpoint(&mut self, id: i64, now: Instant) -> Option<StoredLease> {
        let lease = self.leases.get_mut(&id)?;
        lease.checkpointed = true;
        let left = seconds(lease.expiry.saturating_duration_since(now));
        Some(StoredLease { id, ttl: lease.ttl, remaining: left.saturating_add(1).min(lease.ttl) })
    }

    /// The checkpoint of a lease could not be cleared: the next renewal has to.
    pub fn clearing_failed(&mut self, id: i64) {
        self.leases.entry(id).and_modify(|lease| lease.checkpointed = true);
    }

    /// The lease as the database keeps it without a checkpoint.
    pub fn without_checkpoint(&self, id: i64) -> Option<StoredLease> {
        self.leases.get(&id).map(|lease| StoredLease { id, ttl: lease.ttl, remaining: 0 })
    }
}

fn after(now: Instant, seconds: i64) -> Instant {
    let left = Duration::from_secs(seconds.clamp(0, MAX_TTL).unsigned_abs());
    now.checked_add(left).unwrap_or(now)
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn runs_out_in_order_and_is_taken_once() {
        let (mut leases, now) = (Leases::default(), Instant::now());
        leases.grant(1, 10, now);
        leases.grant(2, 5, now);
        assert_eq!(leases.ids(), [2, 1]);
        assert_eq!(leases.time_to_live(1, now + SECOND), Some((9, 10)));
        assert!(leases.take_expired(now + 4 * SECOND, 9).is_empty());
        assert_eq!(leases.take_expired(now + 5 * SECOND, 9), [2]);
        assert!(leases.take_expired(now + 5 * SECOND, 9).is_empty());
        leases.revocation_failed(2);
        assert_eq!(leases.take_expired(now + 10 * SECOND, 1), [2]);
        assert_eq!(leases.take_expired(now + 10 * SECOND, 1), [1]);
    }

    #[test]
    fn a_renewal_starts_over_but_not_after_the_end() {
        let (mut leases, now) = (Leases::default(), Instant::now());
        leases.grant(1, 10, now);
        let renewed = Renewal::Renewed { ttl: 10, clear_checkpoint: false };
        assert_eq!(leases.renew(1, now + 9 * SECOND), renewed);
        assert_eq!(leases.time_to_live(1, now + 9 * SECOND), Some((10, 10)));
        assert_eq!(leases.renew(1, now + 19 * SECOND), Renewal::Expired);
        assert_eq!(leases.renew(2, now), Renewal::Unknown);
    }

    #[test]
    fn a_restart_gives_at_least_what_remained() {
        let (mut leases, now) = (Leases::default(), Instant::now());
        leases.grant(1, 1000, now);
        leases.grant(2, 20, now);
        let later = now + 400 * SECOND;
        assert_eq!(leases.long_running(300 * SECOND, later), [1]);
        let kept: Vec<_> = leases.checkpoint(1, later).into_iter().collect();
        assert_eq!(kept, [StoredLease { id: 1, ttl: 1000, remaining: 601 }]);
        let mut again = Leases::recover(kept, now);
        assert_eq!(again.time_to_live(1, now), Some((601, 1000)));
        assert_eq!(again.renew(1, now), Renewal::Renewed { ttl: 1000, clear_checkpoint: true });
        assert_eq!(again.renew(1, now), Renewal::Renewed { ttl: 1000, clear_checkpoint: false });
    }

    #[test]
    fn the_longest_time_to_live_is_no_overflow() {
        let (mut leases, now) = (Leases::default(), Instant::now());
        leases.grant(i64::MIN, MAX_TTL, now);
        assert_eq!(leases.time_to_live(i64::MIN, now).map(|(left, _)| left), Some(MAX_TTL));
    }
}
