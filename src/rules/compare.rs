//! How a compare of a transaction is decided, for one record or for a key that is not there. It holds for a range when
//! it holds for every key of it; with no key there, it is put to none.

use std::cmp::Ordering;

use super::{KeyRange, Number, Numbers};
use crate::proto::etcdserverpb::{
    Compare,
    compare::{CompareResult, CompareTarget, TargetUnion},
};

/// The keys that `compare` is about.
pub fn compared(compare: &Compare) -> KeyRange {
    KeyRange::from_request(&compare.key, &compare.range_end)
}

/// Whether target and operator are known ones. Etcd refuses no others, and a newer one may know more.
pub fn is_known(compare: &Compare) -> bool {
    CompareTarget::try_from(compare.target).is_ok() && CompareResult::try_from(compare.result).is_ok()
}

/// Whether values are compared, and no numbers.
pub fn is_by_value(compare: &Compare) -> bool {
    compare.target == i32::from(CompareTarget::Value)
}

/// Whether a compare of values holds for `value`.
pub fn value_holds(compare: &Compare, value: &[u8]) -> bool {
    let given = match &compare.target_union {
        Some(TargetUnion::Value(value)) => &value[..],
        _ => &[],
    };
    result_holds(compare, value.cmp(given))
}

/// Whether a compare of numbers holds for `record`.
pub fn number_holds(compare: &Compare, record: &impl Numbers) -> bool {
    numbers_hold(compare, |number| record.number_of(number))
}

/// Whether a compare holds for a key that is not there: all its numbers are 0, and nothing is true of its value.
pub fn holds_for_none(compare: &Compare) -> bool {
    !is_by_value(compare) && numbers_hold(compare, |_| 0)
}

fn numbers_hold(compare: &Compare, found: impl Fn(Number) -> i64) -> bool {
    let number = match CompareTarget::try_from(compare.target) {
        Ok(CompareTarget::Version) => Number::Version,
        Ok(CompareTarget::Create) => Number::Create,
        Ok(CompareTarget::Mod) => Number::Mod,
        Ok(CompareTarget::Lease) => Number::Lease,
        Ok(CompareTarget::Value) | Err(_) => return result_holds(compare, Ordering::Equal),
    };
    result_holds(compare, found(number).cmp(&given(compare, number)))
}

/// The number that the request gives; one of another kind counts for 0.
fn given(compare: &Compare, number: Number) -> i64 {
    match (number, &compare.target_union) {
        (Number::Version, Some(TargetUnion::Version(given)))
        | (Number::Create, Some(TargetUnion::CreateRevision(given)))
        | (Number::Mod, Some(TargetUnion::ModRevision(given)))
        | (Number::Lease, Some(TargetUnion::Lease(given))) => *given,
        _ => 0,
    }
}

/// Puts an ordering to a compare's operator; as in etcd, an unknown operator holds.
fn result_holds(compare: &Compare, ordering: Ordering) -> bool {
    match CompareResult::try_from(compare.result) {
        Ok(CompareResult::Equal) => ordering.is_eq(),
        Ok(CompareResult::NotEqual) => ordering.is_ne(),
        Ok(CompareResult::Greater) => ordering.is_gt(),
        Ok(CompareResult::Less) => ordering.is_lt(),
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_knows_is_decided_as_in_etcd() {
        let unknown = Compare { result: 9, target_union: Some(TargetUnion::Value("a".into())), ..Compare::default() };
        assert!(!is_known(&unknown) && holds_for_none(&unknown) && value_holds(&unknown, b"b"));
        let target = Compare { target: 9, ..Compare::default() };
        assert!(!is_known(&target) && holds_for_none(&target), "an unknown target is equal to whatever is given");
        let unequal = Compare { result: CompareResult::NotEqual.into(), ..target };
        assert!(!holds_for_none(&unequal));
    }

    #[test]
    fn a_number_of_another_kind_counts_for_nothing() {
        let compare = Compare { target_union: Some(TargetUnion::Lease(7)), ..Compare::default() };
        assert!(holds_for_none(&compare), "version 0 is compared to 0");
        let by_value = Compare { target: CompareTarget::Value.into(), ..compare };
        assert!(value_holds(&by_value, b"") && !holds_for_none(&by_value));
    }
}
