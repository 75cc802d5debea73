//! Granting and revoking leases.

use std::time::Instant;

use rand::Rng;

use super::Transaction;
use crate::{
    proto::etcdserverpb::{LeaseGrantRequest, LeaseGrantResponse},
    sql::{
        backend::StoredLease,
        error::Fault,
        leases::{MAX_TTL, MIN_TTL},
        range::header,
    },
    status::Status,
};

impl Transaction<'_> {
    /// Whether a lease is there, this group's grants and revocations considered.
    pub fn lease_exists(&self, id: i64) -> bool {
        match self.lease_changes.get(&id) {
            Some(change) => change.is_some(),
            None => self.leases.lock().contains(id),
        }
    }

    /// Grants a lease, picking an id when none is asked for and lengthening a time to live below etcd's minimum.
    pub fn grant(&mut self, request: &LeaseGrantRequest) -> Result<LeaseGrantResponse, Fault> {
        if request.ttl > MAX_TTL {
            return Err(Status::LEASE_TTL_TOO_LARGE.into());
        }
        let id = if request.id == 0 { self.unused_lease() } else { request.id };
        if self.lease_exists(id) {
            return Err(Status::LEASE_EXISTS.into());
        }
        let ttl = request.ttl.max(MIN_TTL);
        self.wrote = true;
        self.store.put_lease(StoredLease { id, ttl, remaining: 0 })?;
        self.lease_changes.insert(id, Some(ttl));
        Ok(LeaseGrantResponse { header: header(self.at.current), id, ttl, error: String::new() })
    }

    fn unused_lease(&self) -> i64 {
        let mut rng = rand::rng();
        loop {
            let id = (rng.next_u64() >> 1).cast_signed();
            if id != 0 && !self.lease_exists(id) {
                return id;
            }
        }
    }

    /// Revokes a lease and deletes its keys, sorted, in one revision. Returns the latest revision.
    pub fn revoke(&mut self, id: i64) -> Result<i64, Fault> {
        if !self.lease_exists(id) {
            return Err(Status::LEASE_NOT_FOUND.into());
        }
        self.wrote = true;
        let keys = self.store.lease_keys(id)?;
        self.check_room(keys.len())?;
        for key in keys {
            self.delete_key(key, id)?;
        }
        self.store.delete_lease(id)?;
        self.lease_changes.insert(id, None);
        self.seal();
        Ok(self.at.current)
    }

    /// Revokes a lease that was found to have run out, unless it has been revoked meanwhile, and perhaps granted anew. Whether it
    /// was.
    pub fn expire(&mut self, id: i64) -> Result<bool, Fault> {
        if self.lease_changes.contains_key(&id) || !self.leases.lock().is_expired(id, Instant::now()) {
            return Ok(false);
        }
        self.revoke(id).map(|_| true)
    }

    /// Keeps what remains of leases, for the next start. Leases that are gone are passed over.
    pub fn checkpoint_leases(&mut self, ids: &[i64]) -> Result<(), Fault> {
        for id in ids.iter().filter(|id| !self.lease_changes.contains_key(id)) {
            if let Some(lease) = self.leases.lock().checkpoint(*id, Instant::now()) {
                self.wrote = true;
                self.store.put_lease(lease)?;
            }
        }
        Ok(())
    }

    /// Forgets what was kept of a lease's remaining time, since it was renewed.
    pub fn clear_checkpoint(&mut self, id: i64) -> Result<(), Fault> {
        let lease = self.leases.lock().without_checkpoint(id);
        if let Some(lease) = lease.filter(|lease| self.lease_exists(lease.id)) {
            self.wrote = true;
            self.store.put_lease(lease)?;
        }
        Ok(())
    }
}
