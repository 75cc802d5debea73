//! One version of one key, kept as the encoded `mvccpb.KeyValue` that will be sent.

use std::fmt;

use triomphe::ThinArc;

use super::{
    Revision,
    wire::{self, Fields, Malformed},
};
use crate::rules::{Number, Numbers};

/// The number of the field that holds a record, in a `RangeResponse` and in an `Event`.
const FIELD: u8 = 2;
const KEY: u8 = 1;
const CREATE_REVISION: u8 = 2;
const MOD_REVISION: u8 = 3;
const VERSION: u8 = 4;
const VALUE: u8 = 5;
const LEASE: u8 = 6;

/// A key's record cannot be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MalformedRecord {
    /// The bytes are no `mvccpb.KeyValue`.
    #[error("a key-value record is not protobuf: {0}")]
    Wire(#[from] Malformed),
    /// The record has no key, or is larger than 4 GiB.
    #[error("a key-value record without a key, or of an impossible size")]
    Impossible,
}

/// One version of one key: the encoded `mvccpb.KeyValue`, and where its parts lie. Immutable; a clone is a reference.
///
/// The bytes are in field order, so everything before the value is the record of a keys-only answer. They lie beside the
/// numbers in one allocation, since what a walk over records pays for is cache misses.
#[derive(Clone)]
pub struct Record(ThinArc<Head, u8>);

/// What is asked of a record without a look at its bytes.
struct Head {
    mod_revision: i64,
    key_len: u32,
    value_start: u32,
    lease_start: u32,
    /// How many of the bytes stand before the `mvccpb.KeyValue`.
    before: u8,
}

/// What a record takes beside its bytes: the head, the count of references, and the length.
const OVERHEAD: usize = size_of::<Head>() + 2 * size_of::<usize>();

impl Record {
    /// Takes in the encoded `mvccpb.KeyValue`, copied out of whatever buffer it arrived in.
    pub fn from_wire(bytes: &[u8]) -> Result<Self, MalformedRecord> {
        let mut parts = Parts::default();
        for field in Fields::of(bytes) {
            parts.take(field?);
        }
        if parts.key.is_empty() || u32::try_from(bytes.len()).is_err() {
            return Err(MalformedRecord::Impossible);
        }
        Ok(parts.encode())
    }

    /// A record from its parts.
    pub fn new(key: &[u8], value: &[u8], create: Revision, modified: Revision, version: i64, lease: i64) -> Self {
        let (create_revision, mod_revision) = (create.0, modified.0);
        Parts { key, value, create_revision, mod_revision, version, lease }.encode()
    }

    /// The record of a deleted key: only the key and the revision of its deletion, as etcd sends it.
    pub fn tombstone(key: &[u8], modified: Revision) -> Self {
        Self::new(key, &[], Revision::ZERO, modified, 0, 0)
    }

    fn head(&self) -> &Head {
        &self.0.header.header
    }

    /// The key.
    pub fn key(&self) -> &[u8] {
        let length = self.head().key_len as usize;
        let start = 1 + wire::varint_len(length as u64);
        &self.wire()[start..start + length]
    }

    /// The value.
    pub fn value(&self) -> &[u8] {
        let field = &self.wire()[self.head().value_start as usize..self.head().lease_start as usize];
        Fields::of(field).next().and_then(Result::ok).map_or(&[], |field| field.value.bytes())
    }

    /// The revision of the key's creation.
    pub fn create_revision(&self) -> Revision {
        Revision(self.number(CREATE_REVISION))
    }

    /// The revision at which the key got this value.
    pub fn mod_revision(&self) -> Revision {
        Revision(self.head().mod_revision)
    }

    /// How many times the key was written since its creation.
    pub fn version(&self) -> i64 {
        self.number(VERSION)
    }

    /// The lease that the key hangs on, or zero.
    pub fn lease(&self) -> i64 {
        self.number(LEASE)
    }

    /// A field that few ask for; zero where it is left out.
    fn number(&self, field: u8) -> i64 {
        let (before, lease) = self.wire_without_value();
        let mut fields = Fields::of(before).chain(Fields::of(lease)).filter_map(Result::ok);
        fields.find(|found| found.number == u32::from(field)).map_or(0, |found| found.value.int())
    }

    /// The encoded `mvccpb.KeyValue`.
    pub fn wire(&self) -> &[u8] {
        &self.field()[self.head().before as usize..]
    }

    /// The same as field 2, with its head: so it stands in a `RangeResponse` and in an `Event`.
    pub fn field(&self) -> &[u8] {
        &self.0.slice
    }

    /// The encoded `mvccpb.KeyValue` without its value, in two pieces: all before the value, and the lease after it.
    pub fn wire_without_value(&self) -> (&[u8], &[u8]) {
        (&self.wire()[..self.head().value_start as usize], &self.wire()[self.head().lease_start as usize..])
    }

    /// How much memory the record takes, in bytes, its own book-keeping included.
    pub fn memory(&self) -> usize {
        OVERHEAD + self.field().len()
    }

    /// Whether both are the same version of the same key with the same value.
    pub fn same_version(&self, other: &Self) -> bool {
        self.wire() == other.wire()
    }
}

impl Numbers for Record {
    #[inline]
    fn number_of(&self, which: Number) -> i64 {
        match which {
            Number::Version => self.version(),
            Number::Create => self.create_revision().0,
            Number::Mod => self.mod_revision().0,
            Number::Lease => self.lease(),
        }
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = String::from_utf8_lossy(self.key());
        write!(f, "{key}@{} (created {}, version {})", self.mod_revision().0, self.create_revision().0, self.version())
    }
}

/// The fields of a record while it is taken apart or put together.
#[derive(Default)]
struct Parts<'a> {
    key: &'a [u8],
    create_revision: i64,
    mod_revision: i64,
    version: i64,
    value: &'a [u8],
    lease: i64,
}

impl<'a> Parts<'a> {
    fn take(&mut self, field: wire::Field<'a>) {
        match u8::try_from(field.number) {
            Ok(KEY) => self.key = field.value.bytes(),
            Ok(CREATE_REVISION) => self.create_revision = field.value.int(),
            Ok(MOD_REVISION) => self.mod_revision = field.value.int(),
            Ok(VERSION) => self.version = field.value.int(),
            Ok(VALUE) => self.value = field.value.bytes(),
            Ok(LEASE) => self.lease = field.value.int(),
            _ => {}
        }
    }

    fn encoded_len(&self) -> usize {
        let numbers = [self.create_revision, self.mod_revision, self.version, self.lease];
        let value = if self.value.is_empty() { 0 } else { wire::bytes_field_len(self.value.len()) };
        wire::bytes_field_len(self.key.len()) + value + numbers.into_iter().map(wire::int_field_len).sum::<usize>()
    }

    /// The record, in the shortest encoding: no zeros spelled out, no padded numbers, nothing that is not ours.
    fn encode(&self) -> Record {
        let length = self.encoded_len();
        let mut out = Vec::with_capacity(wire::bytes_field_len(length));
        wire::put_bytes_head(&mut out, FIELD, length);
        let before = out.len();
        wire::put_bytes_head(&mut out, KEY, self.key.len());
        out.extend_from_slice(self.key);
        wire::put_int_field(&mut out, CREATE_REVISION, self.create_revision);
        wire::put_int_field(&mut out, MOD_REVISION, self.mod_revision);
        wire::put_int_field(&mut out, VERSION, self.version);
        let value_start = out.len() - before;
        if !self.value.is_empty() {
            wire::put_bytes_head(&mut out, VALUE, self.value.len());
            out.extend_from_slice(self.value);
        }
        let lease_start = out.len() - before;
        wire::put_int_field(&mut out, LEASE, self.lease);
        let head = Head {
            mod_revision: self.mod_revision,
            key_len: self.key.len() as u32,
            value_start: value_start as u32,
            lease_start: lease_start as u32,
            before: before as u8,
        };
        Record(ThinArc::from_header_and_slice(head, &out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::mvccpb::KeyValue;
    use proptest::prelude::*;
    use prost::Message;

    fn key_value() -> impl Strategy<Value = KeyValue> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..200);
        (bytes(), bytes(), any::<[i64; 4]>()).prop_map(|(mut key, value, [create, modified, version, lease])| {
            key.push(1);
            KeyValue {
                key: key.into(),
                create_revision: create,
                mod_revision: modified,
                version,
                value: value.into(),
                lease,
            }
        })
    }

    proptest! {
        #[test]
        fn a_record_gives_back_what_it_was_made_of(kv in key_value()) {
            let encoded = kv.encode_to_vec();
            let made = Record::new(
                &kv.key, &kv.value, Revision(kv.create_revision), Revision(kv.mod_revision), kv.version, kv.lease,
            );
            for record in [Record::from_wire(&encoded).unwrap(), made] {
                prop_assert_eq!(record.wire(), &encoded[..]);
                prop_assert_eq!(record.key(), &kv.key[..]);
                prop_assert_eq!(record.value(), &kv.value[..]);
                prop_assert_eq!(record.mod_revision().0, kv.mod_revision);
                prop_assert_eq!(record.create_revision().0, kv.create_revision);
                prop_assert_eq!((record.version(), record.lease()), (kv.version, kv.lease));
                let (before, lease) = record.wire_without_value();
                let bare = KeyValue { value: Default::default(), ..kv.clone() };
                prop_assert_eq!([before, lease].concat(), bare.encode_to_vec());
            }
        }

        #[test]
        fn garbage_is_refused_or_kept_but_never_a_panic(garbage: Vec<u8>) {
            if let Ok(record) = Record::from_wire(&garbage) {
                let _ = (record.key(), record.value(), record.wire_without_value());
            }
        }
    }

    #[test]
    fn fields_out_of_order_are_put_in_order() {
        let mut bytes = vec![0x20, 7];
        bytes.extend_from_slice(&[0x0a, 1, b'k']);
        let record = Record::from_wire(&bytes).unwrap();
        assert_eq!(record.wire(), [0x0a, 1, b'k', 0x20, 7]);
        assert_eq!((record.key(), record.version()), (&b"k"[..], 7));
    }

    #[test]
    fn a_tombstone_holds_key_and_revision_only() {
        let kv = KeyValue::decode(Record::tombstone(b"k", Revision(9)).wire()).unwrap();
        assert_eq!(kv, KeyValue { key: "k".into(), mod_revision: 9, ..Default::default() });
    }
}
