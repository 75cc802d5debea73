//! The response header: who answers, and at which revision.

use std::ops::Deref;

use bytes::BufMut;

use super::{
    Revision,
    wire::{bytes_field_len, int_field_len, put_bytes_head, put_int_field},
};
use crate::proto::etcdserverpb::ResponseHeader;

/// Who answers: the parts of a response header that do not change with every answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Responder {
    /// The cluster's id.
    pub cluster_id: u64,
    /// The id of the member whose state this is.
    pub member_id: u64,
    /// The Raft term that was last seen.
    pub raft_term: u64,
}

impl Responder {
    /// A header at `revision`.
    pub fn header(self, revision: Revision) -> ResponseHeader {
        let Self { cluster_id, member_id, raft_term } = self;
        ResponseHeader { cluster_id, member_id, revision: revision.0, raft_term }
    }

    fn len(self, revision: Revision) -> usize {
        int_field_len(self.cluster_id as i64)
            + int_field_len(self.member_id as i64)
            + int_field_len(revision.0)
            + int_field_len(self.raft_term as i64)
    }

    /// The header as field 1, its place in every etcd answer.
    pub fn field(self, revision: Revision) -> HeaderField {
        let mut bytes = [0; HeaderField::LONGEST];
        let mut rest = &mut bytes[..];
        put_bytes_head(&mut rest, 1, self.len(revision));
        put_int_field(&mut rest, 1, self.cluster_id as i64);
        put_int_field(&mut rest, 2, self.member_id as i64);
        put_int_field(&mut rest, 3, revision.0);
        put_int_field(&mut rest, 4, self.raft_term as i64);
        let length = HeaderField::LONGEST - rest.len();
        HeaderField { bytes, length }
    }

    /// Appends [`Responder::field`].
    pub fn put(self, out: &mut impl BufMut, revision: Revision) {
        out.put_slice(&self.field(revision));
    }
}

/// An encoded header.
#[derive(Clone, Copy, Debug)]
pub struct HeaderField {
    bytes: [u8; Self::LONGEST],
    length: usize,
}

impl HeaderField {
    /// The most that there may be: four numbers.
    pub const LONGEST: usize = bytes_field_len(4 * int_field_len(-1));
}

impl Deref for HeaderField {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl From<&ResponseHeader> for Responder {
    fn from(header: &ResponseHeader) -> Self {
        let ResponseHeader { cluster_id, member_id, raft_term, .. } = *header;
        Self { cluster_id, member_id, raft_term }
    }
}
