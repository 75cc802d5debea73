//! Hashes of the store, by etcd's own algorithm: a CRC-32C over the revisions and pairs as etcd keeps them.
//!
//! Two stores with the same history compacted at the same revision have the same hash, whether the other one is an etcd or
//! not, at every revision but those of compactions. Of its last ten, until its next start, an etcd answers with the hash that
//! held just before, which a compaction of its own walks the whole store for. Here a compaction looks only at what came after the
//! one before, so that hash is not known: at the compacted revision the answer is what a new walk finds, below it there is none.

use std::ops::ControlFlow;

use prost::Message;

use super::{
    backend::{EventId, Reader, Record},
    error::Fault,
    range::Position,
};
use crate::{rules::KeyRange, status::Status};

/// The bucket in which etcd keeps its pairs; its name begins the hash.
const BUCKET: &[u8] = b"key";

/// Bytes of events that are read at a time.
const PIECE: usize = 1 << 20;

/// A hash and what it was taken of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hashed {
    /// The hash.
    pub hash: u32,
    /// The compacted revision, -1 before the first compaction.
    pub compact_revision: i64,
    /// The last revision that went into the hash.
    pub hash_revision: i64,
    /// The latest revision.
    pub current: i64,
}

/// The hash of everything up to `revision` (0: the latest), without what a compaction has yet to remove.
///
/// As in etcd, of the events up to the compacted revision only those count which are still in force at the revision asked
/// for, so that the hash does not depend on how far the removal has got. Where no key is left, etcd lets everything count that it
/// still has; here, what the removal leaves.
pub fn at(store: &mut dyn Reader, at: Position, revision: i64) -> Result<Hashed, Fault> {
    if revision > 0 && revision < at.compacted {
        return Err(Status::COMPACTED.into());
    }
    if revision > at.current {
        return Err(Status::FUTURE_REVISION.into());
    }
    let hash_revision = if revision == 0 { at.current } else { revision };
    let last = EventId::last(hash_revision.max(0));
    let in_force = if is_empty(store, last)? { EventId::last(at.compacted.max(0)) } else { last };
    let mut crc = Crc32c::new();
    crc.update(BUCKET);
    let mut next = EventId(0);
    loop {
        let records = read_some(store, next, last)?;
        let Some(end) = records.last().map(|record| record.version.id) else { break };
        next = EventId(end.0.saturating_add(1));
        for record in records {
            if counts(store, at.compacted, in_force, &record)? {
                add(&mut crc, record);
            }
        }
    }
    Ok(Hashed { hash: crc.finish(), compact_revision: at.compacted, hash_revision, current: at.current })
}

/// Whether a record counts: after the compaction each does, before it the puts that are in force at `in_force`.
fn counts(store: &mut dyn Reader, compacted: i64, in_force: EventId, record: &Record) -> Result<bool, Fault> {
    let (id, revision) = (record.version.id, record.version.id.revision());
    if revision > compacted || record.version.is_deletion() {
        return Ok(revision > compacted);
    }
    Ok(store.newest(&record.key, in_force)?.is_some_and(|newest| newest.id == id))
}

fn read_some(store: &mut dyn Reader, from: EventId, to: EventId) -> Result<Vec<Record>, Fault> {
    let (mut records, mut bytes) = (Vec::new(), 0);
    store.log(from, to, &mut |record| {
        bytes += record.key.len() + record.value.len() + size_of::<Record>();
        records.push(record);
        if bytes >= PIECE { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    Ok(records)
}

/// Whether no key exists as of `bound`.
fn is_empty(store: &mut dyn Reader, bound: EventId) -> Result<bool, Fault> {
    let mut empty = true;
    store.scan(&KeyRange::everything(), bound, &mut |_, _| {
        empty = false;
        ControlFlow::Break(())
    })?;
    Ok(empty)
}

/// The hash of the whole database: all pairs, and the leases.
pub fn whole(store: &mut dyn Reader, at: Position) -> Result<u32, Fault> {
    let mut crc = Crc32c::new();
    crc.update(BUCKET);
    store.log(EventId(0), EventId::last(at.current), &mut |record| {
        add(&mut crc, record);
        ControlFlow::Continue(())
    })?;
    for lease in store.leases()? {
        crc.update(&lease.id.to_be_bytes());
        crc.update(&lease.ttl.to_be_bytes());
    }
    Ok(crc.finish())
}

/// Adds one event in the form in which etcd keeps it: revision, `_`, place, a `t` for a deletion; then the pair.
fn add(crc: &mut Crc32c, record: Record) {
    let id = record.version.id;
    let deletion = record.version.is_deletion();
    crc.update(&id.revision().to_be_bytes());
    crc.update(b"_");
    crc.update(&id.sub().to_be_bytes());
    if deletion {
        crc.update(b"t");
    }
    let mut kv = record.into_kv();
    if deletion {
        kv.mod_revision = 0;
    }
    crc.update(&kv.encode_to_vec());
}

/// CRC-32 with Castagnoli's polynomial, eight bytes at a time.
struct Crc32c(u32);

const TABLES: [[u32; 256]; 8] = tables();

const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut slice = 1;
    while slice < 8 {
        let mut byte = 0;
        while byte < 256 {
            let below = tables[slice - 1][byte];
            tables[slice][byte] = below >> 8 ^ tables[0][(below & 0xff) as usize];
            byte += 1;
        }
        slice += 1;
    }
    tables
}

impl Crc32c {
    fn new() -> Self {
        Self(u32::MAX)
    }

    fn update(&mut self, bytes: &[u8]) {
        let (eights, rest) = bytes.as_chunks::<8>();
        for eight in eights {
            let word = u64::from_le_bytes(*eight) ^ u64::from(self.0);
            let index = |shift: u32| (word >> shift & 0xff) as usize;
            self.0 = (0..8).fold(0, |crc, place| crc ^ TABLES[7 - place][index(8 * place as u32)]);
        }
        for byte in rest {
            self.0 = self.0 >> 8 ^ TABLES[0][((self.0 ^ u32::from(*byte)) & 0xff) as usize];
        }
    }

    fn finish(self) -> u32 {
        !self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crc(bytes: &[u8]) -> u32 {
        let mut crc = Crc32c::new();
        crc.update(bytes);
        crc.finish()
    }

    #[test]
    fn the_checksum_is_castagnolis() {
        assert_eq!(crc(b"123456789"), 0xe306_9283);
        assert_eq!(crc(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn the_checksum_does_not_depend_on_how_bytes_are_cut() {
        let bytes: Vec<u8> = (0..=255).collect();
        let mut cut = Crc32c::new();
        for piece in bytes.chunks(7) {
            cut.update(piece);
        }
        assert_eq!(cut.finish(), crc(&bytes));
    }
}
