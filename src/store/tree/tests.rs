//! The index against a `BTreeMap`, under random histories.

use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::store::Revision;

#[derive(Clone, Debug)]
enum Step {
    Put(u16, u8),
    Delete(u16),
    Snapshot,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..600u16, any::<u8>()).prop_map(|(key, size)| Step::Put(key, size)),
        4 => (0..600u16).prop_map(Step::Delete),
        1 => Just(Step::Snapshot),
    ];
    prop::collection::vec(step, 1..1500)
}

/// A key of its own for each number; they begin alike for long, not at all, or are nothing but the beginning of the next.
fn key(number: u16) -> Vec<u8> {
    match number % 5 {
        0 => format!("/k/{number:03}"),
        1 => format!("/k/{number:03}\0"),
        2 => format!("{number:03}"),
        3 => format!("/k/alike-for-long/{number:03}"),
        _ => "\0".repeat(usize::from(number / 5) + 1),
    }
    .into_bytes()
}

type Model = BTreeMap<Vec<u8>, Record>;

fn assert_same(tree: &Tree, model: &Model) {
    tree.check();
    assert!(tree.iter_from(b"").map(|record| record.key().to_vec()).eq(model.keys().cloned()));
    assert!(model.iter().all(|(key, record)| tree.get(key).is_some_and(|found| found.same_version(record))));
}

fn assert_ranges(tree: &Tree, model: &Model, bounds: &[(u16, Option<u16>)]) {
    for (start, end) in bounds {
        let range = KeyRange { start: key(*start).into(), end: end.map(|end| Bytes::from(key(end))) };
        let expected: Vec<_> = model.values().filter(|record| range.contains(record.key())).collect();
        assert_eq!(tree.sums_in(&range), expected.iter().map(|record| Sums::of(record)).sum());
        let nth = usize::from(*start) / 2;
        let at_or_after = model.range(key(*start)..).nth(nth).map(|(_, record)| record.key());
        assert_eq!(tree.nth_from(&range.start, nth as u64).map(|record| record.key()), at_or_after);
        assert!(tree.range(&range).map(|record| record.key()).eq(expected.iter().map(|record| record.key())));
        let runs: Vec<_> = tree.runs_from(&range.start).collect();
        assert!(model.range(key(*start)..).map(|(key, _)| &key[..]).eq(runs.iter().flat_map(keys_of)));
        for mut run in runs {
            assert_eq!(run.sums(), run.records().map(Sums::of).sum());
            let third = run.get(2).map(|record| record.key().to_vec());
            run.truncate(3);
            run.advance(2);
            assert!(keys_of(&run).eq(third.iter().map(|key| &key[..])) && run.get(run.len()).is_none());
            assert_eq!((run.len(), run.is_empty()), (third.iter().len(), third.is_none()));
        }
    }
}

fn keys_of(run: &Run) -> impl Iterator<Item = &[u8]> {
    run.records().map(|record| record.key())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn behaves_as_a_btree_map_and_clones_stay_as_they_were(
        steps in steps(),
        bounds in prop::collection::vec((0..600u16, prop::option::of(0..600u16)), 8),
    ) {
        let (mut tree, mut model) = (Tree::default(), Model::new());
        let mut snapshots = vec![];
        for (revision, step) in steps.into_iter().enumerate() {
            match step {
                Step::Put(number, size) => {
                    let revision = Revision(revision as i64 + 2);
                    let record = Record::new(&key(number), &vec![b'v'; size.into()], revision, revision, 1, 0);
                    let replaced = tree.insert(record.clone());
                    prop_assert_eq!(replaced.is_some(), model.insert(key(number), record).is_some());
                }
                Step::Delete(number) => {
                    prop_assert_eq!(tree.remove(&key(number)).is_some(), model.remove(&key(number)).is_some());
                }
                Step::Snapshot => snapshots.push((tree.clone(), model.clone())),
            }
        }
        snapshots.push((tree, model));
        for (tree, model) in &snapshots {
            assert_same(tree, model);
            assert_ranges(tree, model, &bounds);
        }
    }
}

#[test]
fn runs_stay_as_they_were() {
    let record = |n: u32| Record::new(format!("{n:06}").as_bytes(), b"", Revision(1), Revision(1), 1, 0);
    let mut tree: Tree = (0..1_000).map(record).collect();
    let runs: Vec<_> = tree.runs_from(b"000400").collect();
    (0..1_000).filter(|n| n % 3 > 0).for_each(|n| drop(tree.remove(record(n).key())));
    (1_000..2_000).for_each(|n| drop(tree.insert(record(n))));
    let expected: Vec<_> = (400..1_000).map(record).collect();
    assert!(runs.iter().flat_map(keys_of).eq(expected.iter().map(|record| record.key())));
}

#[test]
fn filling_in_order_leaves_full_nodes() {
    let record = |n: u32| Record::new(format!("{n:06}").as_bytes(), b"", Revision(n.into()), Revision(n.into()), 1, 0);
    let tree: Tree = (1..=10_000).map(record).collect();
    tree.check();
    assert!(tree.root.leaves() < 10_000 * 10 / (node::CAPACITY * 9), "{} leaves", tree.root.leaves());
}

#[test]
fn an_emptied_tree_can_be_filled_again() {
    let record = |n: u32| Record::new(format!("{n:06}").as_bytes(), b"", Revision(1), Revision(1), 1, 0);
    let mut tree: Tree = (0..5_000).map(record).collect();
    for n in 0..5_000 {
        assert!(tree.remove(format!("{n:06}").as_bytes()).is_some());
    }
    tree.check();
    assert!(tree.is_empty() && tree.remove(b"x").is_none());
    tree.insert(record(1));
    tree.check();
}
