//! Range answers put together from the bytes of records. A large one is sent piece by piece, as the client takes it, so that
//! neither it nor the state that it tells of stays in memory as a whole for a client that does not.

use std::iter::once;

use ::http::Response;
use bytes::{BufMut, Bytes, BytesMut};

use super::{
    held::{Holder, Rest},
    pieces::{Form, Pieces, Section},
};
use crate::{
    aside,
    grpc::{PREFIX, prefix},
    server::{
        body::Body,
        data::List,
        response::{self, check_length},
    },
    status::Status,
    store::{
        Record, Sums, View,
        range::{Records, Selection},
        wire::{bytes_field_len, int_field_len, put_bytes_head, put_int_field},
    },
};

/// Above this many bytes an answer is sent piece by piece.
const EAGER: u64 = 256 << 10;
/// The same where the length is only known after a walk over the records. More, as one of 10,000 keys is not to pay for two.
const EAGER_WALK: usize = 1 << 20;
/// Up to this many bytes an answer is copied together before it is sent.
const SHORT: u64 = 16 << 10;
/// Records of at least so many bytes, on average, are sent without being copied together: a reference has its price too.
const LARGE: u64 = 256;
/// About what a record takes without its value.
const WITHOUT_VALUE: usize = 96;

const HEADER: u8 = 1;
const KVS: u8 = 2;
const MORE: u8 = 3;
const COUNT: u8 = 4;
/// Of a header.
const REVISION: u8 = 3;
/// Of a transaction's answer, whose responses are unions.
const SUCCEEDED: u8 = 2;
const RESPONSES: u8 = 3;
const RESPONSE_RANGE: u8 = 1;

/// Whether an answer carries values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Values {
    /// It does.
    Sent,
    /// It does not.
    LeftOut,
    /// It does not, and no lease either.
    LeftOutWithLease,
}

/// Appends `record` as one of an answer's records.
pub(super) fn put_record(out: &mut impl BufMut, record: &Record, values: Values) {
    if values == Values::Sent {
        return out.put_slice(record.field());
    }
    let (before, lease) = record.wire_without_value();
    let lease = if values == Values::LeftOut { lease } else { &[] };
    put_bytes_head(out, KVS, before.len() + lease.len());
    out.put_slice(before);
    out.put_slice(lease);
}

/// How many bytes [`put_record`] appends.
pub(super) fn record_len(record: &Record, values: Values) -> usize {
    if values == Values::Sent {
        return record.field().len();
    }
    let (before, lease) = record.wire_without_value();
    bytes_field_len(before.len() + if values == Values::LeftOut { lease.len() } else { 0 })
}

/// The fields after the records.
fn tail(selection: &Selection) -> Vec<u8> {
    let mut tail = Vec::with_capacity(16);
    put_int_field(&mut tail, MORE, selection.more.into());
    put_int_field(&mut tail, COUNT, selection.count as i64);
    tail
}

/// The answer to a Range request.
///
/// # Errors
/// As [`check_length`], when it is longer than `limit`.
pub(super) fn range(
    holder: &Holder,
    view: &View,
    selection: Selection,
    values: Values,
    limit: u64,
) -> Result<Response<Body>, Status> {
    if values != Values::Sent {
        return without_values(holder, view, selection, values, limit);
    }
    let tail = tail(&selection);
    let records = selection.records;
    let sums = records.sums();
    if sums.wire > EAGER || is_referred(sums) {
        return large(holder, view, records, sums, tail.into(), limit);
    }
    let mut out = begun(view, sums.wire as usize);
    records.for_each(|record| put_record(&mut out, record, values));
    out.put_slice(&tail);
    let length = out.len() - PREFIX;
    check_length(length as u64, limit)?;
    out[..PREFIX].copy_from_slice(&prefix(length));
    Ok(response::framed(out.freeze()))
}

/// Room for an answer with `records` bytes of records, and its header behind room for a prefix.
fn begun(view: &View, records: usize) -> BytesMut {
    let mut out = BytesMut::with_capacity(PREFIX + 64 + records);
    out.put_slice(&[0; PREFIX]);
    view.responder.put(&mut out, view.revision());
    out
}

/// An answer whose length is only known after a walk over the records. A short one is copied on that walk.
fn without_values(
    holder: &Holder,
    view: &View,
    selection: Selection,
    values: Values,
    limit: u64,
) -> Result<Response<Body>, Status> {
    let (tail, keys) = (tail(&selection), selection.records.len());
    let expected = (keys as usize).saturating_mul(WITHOUT_VALUE);
    let mut out = begun(view, expected.min(EAGER_WALK));
    let mut rest = Rest::from(selection.records);
    let last = rest.hand_out(|record| {
        put_record(&mut out, record, values);
        out.len() < EAGER_WALK
    });
    let left = if last { 0 } else { length_of(&rest, keys, values) };
    let length = (out.len() - PREFIX) as u64 + left + tail.len() as u64;
    check_length(length, limit)?;
    out[..PREFIX].copy_from_slice(&prefix(length as usize));
    if last {
        out.put_slice(&tail);
        return Ok(response::framed(out.freeze()));
    }
    let section = Section { head: out.freeze(), rest, length: left, form: Form::Copied(values), tail: tail.into() };
    Ok(response::pieces(Pieces::new(holder, [section])))
}

/// How many bytes the records of a rest, at most `keys`, take in an answer, by a walk over them.
fn length_of(rest: &Rest, keys: u64, values: Values) -> u64 {
    let mut length = 0;
    aside::walk(keys, || rest.for_each(|record| length += record_len(record, values) as u64));
    length
}

/// What stands before the answers to the reads of a transaction.
pub(super) fn opening(view: &View, succeeded: bool) -> Section {
    let mut out = BytesMut::with_capacity(64);
    view.responder.put(&mut out, view.revision());
    put_int_field(&mut out, SUCCEEDED, succeeded.into());
    out.freeze().into()
}

/// The answer to one read of a transaction, as a `ResponseOp` with a header that has only a revision.
pub(super) fn nested_range(view: &View, selection: Selection, values: Values) -> Section {
    let tail = tail(&selection);
    let sums = (values == Values::Sent).then(|| selection.records.sums());
    let keys = selection.records.len();
    let rest = Rest::from(selection.records);
    let (length, form) = match sums {
        Some(sums) => (sums.wire, form_of(sums)),
        None => (length_of(&rest, keys, values), Form::Copied(values)),
    };
    let header = int_field_len(view.revision().0);
    let answer = bytes_field_len(header) + length as usize + tail.len();
    let mut head = BytesMut::with_capacity(64);
    put_bytes_head(&mut head, RESPONSES, bytes_field_len(answer));
    put_bytes_head(&mut head, RESPONSE_RANGE, answer);
    put_bytes_head(&mut head, HEADER, header);
    put_int_field(&mut head, REVISION, view.revision().0);
    Section { head: head.freeze(), rest, length, form, tail: tail.into() }
}

/// An answer of `sections`, which are `length` bytes.
pub(super) fn sections(holder: &Holder, sections: Vec<Section>, length: u64) -> Response<Body> {
    let prefix = prefix(length as usize);
    if length > EAGER {
        let prefix = Ok(Bytes::copy_from_slice(&prefix).into());
        return response::pieces(once(prefix).chain(Pieces::new(holder, sections)));
    }
    let mut out = BytesMut::with_capacity(PREFIX + length as usize);
    out.put_slice(&prefix);
    sections.into_iter().for_each(|section| section.copy_to(&mut out));
    response::framed(out.freeze())
}

/// Whether records are sent as they lie rather than copied together first.
fn is_referred(sums: Sums) -> bool {
    sums.wire > SHORT && sums.wire >= sums.keys * LARGE
}

fn form_of(sums: Sums) -> Form {
    if is_referred(sums) { Form::Referred } else { Form::Copied(Values::Sent) }
}

fn large(
    holder: &Holder,
    view: &View,
    records: Records,
    sums: Sums,
    tail: Bytes,
    limit: u64,
) -> Result<Response<Body>, Status> {
    let header = view.responder.field(view.revision());
    let length = header.len() as u64 + sums.wire + tail.len() as u64;
    check_length(length, limit)?;
    let mut head = BytesMut::with_capacity(PREFIX + header.len());
    head.put_slice(&prefix(length as usize));
    head.put_slice(&header);
    let (head, mut rest) = (head.freeze(), Rest::from(records));
    if sums.wire > EAGER {
        let section = Section { head, rest, length: sums.wire, form: form_of(sums), tail };
        return Ok(response::pieces(Pieces::new(holder, [section])));
    }
    let mut list = List::default();
    list.push_bytes(head);
    rest.refer(&mut list, usize::MAX);
    list.push_bytes(tail);
    Ok(response::framed(list))
}

#[cfg(test)]
mod tests;
