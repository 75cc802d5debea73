//! What the simulation once found, told step by step.

use bytes::Bytes;
use millpond::{cache::Tense, rules::KeyRange, store::Revision};
use tokio::time::{Duration, sleep, timeout};

use crate::{
    dice::Dice,
    model::{history::Write, server::Manner},
    run::{answer, simulated},
    world::{AMPLE, KEEPALIVE, KEYS, World},
};

const MANNER: Manner = Manner { version: "3.7.1", round_trip: 1, piece: 1000, victims: 1000, unanswered: 1_000_000 };

/// A cache of `a/` on one member.
fn world() -> World {
    with_room(AMPLE)
}

fn with_room(cache_bytes: usize) -> World {
    World::of(1, MANNER, vec![KeyRange::prefix(Bytes::from_static(b"a/"))], KEYS, cache_bytes, &mut Dice::new(1))
}

async fn put(world: &World, keys: &[&'static str]) {
    for key in keys {
        let value = Bytes::from(format!("{key} of {}", world.0.cluster.look().generation()));
        write(world, &[Write::Put(Bytes::from_static(key.as_bytes()), value)]).await;
    }
}

async fn delete(world: &World, keys: &[&'static str]) {
    for key in keys {
        write(world, &[Write::Delete(Bytes::from_static(key.as_bytes()))]).await;
    }
}

async fn write(world: &World, writes: &[Write]) {
    let header = world.0.cluster.write(0, writes, false).await.expect("the model takes writes");
    let generation = world.0.cluster.look().generation();
    world.0.cluster.tell(generation, header.revision);
}

/// Stops the cluster and begins it anew from a backup taken at `revision`; the cache cannot reach it before it is released.
async fn restore(world: &World, revision: i64, release: bool) {
    world.kill(0);
    sleep(KEEPALIVE * 2).await;
    world.0.cluster.restore(revision, 0, true);
    world.0.cluster.revive(0);
    if release {
        world.0.links[0].touch();
    }
}

fn settle(world: &World) {
    assert_eq!(world.0.trace.breaches(), Vec::<String>::new());
}

/// The feed proved its last event only. A progress answer had moved its view past that, and a restored history that parted
/// from the old one in between, where the prefix was quiet, was taken for the old one: its events there were never seen.
#[test]
fn a_history_that_parts_where_the_prefix_is_quiet_is_another() {
    simulated(async {
        let (world, range) = (world(), KeyRange::prefix(Bytes::from_static(b"a/")));
        put(&world, &["a/1", "b/1"]).await;
        answer(&world, &range).await;
        assert_eq!(world.0.cache.prefixes()[0].store().view().revision(), Revision(3));
        restore(&world, 2, false).await;
        put(&world, &["a/2", "b/2"]).await;
        world.0.links[0].touch();
        answer(&world, &range).await;
        assert_eq!(world.0.cache.prefixes()[0].store().view().position.epoch, 2);
        settle(&world);
    });
}

/// The feed's first question was overtaken by changes of the leader, and the feed connected anew: watches that had begun before
/// that had to end.
#[test]
fn a_question_that_an_election_overtakes_is_asked_again_over_the_same_connection() {
    let connections = |elections| {
        simulated(async move {
            let (world, range) = (world(), KeyRange::prefix(Bytes::from_static(b"a/")));
            for _ in 0..elections {
                world.0.cluster.elect();
                sleep(Duration::from_millis(1)).await;
            }
            answer(&world, &range).await;
            settle(&world);
            world.0.cache.upstream().newest_connection()
        })
    };
    assert_eq!(connections(100), connections(0));
}

/// A restore marks as compacted what it raises the revision by. When the mark was the revision that follows on the view's, and what had
/// been lost was written again later, nothing told the histories apart, and watchers at the mark went on.
#[test]
fn a_history_that_is_compacted_up_to_the_next_revision_is_compared_there() {
    simulated(async {
        let (world, range) = (world(), KeyRange::prefix(Bytes::from_static(b"a/")));
        put(&world, &["a/0", "a/1", "a/1"]).await;
        answer(&world, &range).await;
        assert_eq!(world.0.cache.prefixes()[0].store().view().revision(), Revision(4));
        world.kill(0);
        sleep(KEEPALIVE * 2).await;
        world.0.cluster.restore(3, 2, true);
        world.0.cluster.revive(0);
        put(&world, &["a/1"]).await;
        world.0.links[0].touch();
        answer(&world, &range).await;
        assert_eq!(world.0.cache.prefixes()[0].store().view().position.epoch, 2);
        settle(&world);
    });
}

/// A watcher of what no view has is not refused and not given up: it begins when somebody can be asked.
#[test]
fn a_watcher_of_what_no_view_has_waits_for_as_long_as_it_takes() {
    simulated(async {
        let (world, range) = (world(), KeyRange::prefix(Bytes::from_static(b"a/")));
        put(&world, &["a/1"]).await;
        answer(&world, &range).await;
        world.kill(0);
        let cache = world.0.cache.clone();
        assert!(timeout(Duration::from_secs(60), cache.begin_unseen()).await.is_err());
        world.0.cluster.revive(0);
        world.0.links[0].touch();
        assert_eq!(cache.begin_unseen().await.1, Revision(2));
        settle(&world);
    });
}

/// A deletion that was the last event was taken for a proof. In the restored history the same key was deleted at the same
/// revision, as when a lease runs out again, but other things had happened before.
#[test]
fn a_history_that_ends_with_the_same_deletion_is_another() {
    simulated(async {
        let (world, range) = (world(), KeyRange::prefix(Bytes::from_static(b"a/")));
        put(&world, &["a/1"]).await;
        answer(&world, &range).await;
        put(&world, &["a/2"]).await;
        delete(&world, &["a/1"]).await;
        answer(&world, &range).await;
        assert_eq!(world.0.cache.prefixes()[0].store().view().revision(), Revision(4));
        restore(&world, 2, false).await;
        put(&world, &["a/3"]).await;
        delete(&world, &["a/1"]).await;
        world.0.links[0].touch();
        answer(&world, &range).await;
        assert_eq!(world.0.cache.prefixes()[0].store().view().position.epoch, 2);
        settle(&world);
    });
}

/// A key that the last transaction created and deleted leaves nothing before it and nothing after. That was taken for another
/// history at every reconnect.
#[test]
fn a_key_that_came_and_went_in_one_revision_is_no_sign_of_another_history() {
    simulated(async {
        let (world, range) = (world(), KeyRange::prefix(Bytes::from_static(b"a/")));
        put(&world, &["a/1"]).await;
        answer(&world, &range).await;
        let key = Bytes::from_static(b"a/2");
        write(&world, &[Write::Put(key.clone(), "here".into()), Write::Delete(key)]).await;
        answer(&world, &range).await;
        assert_eq!(world.0.cache.prefixes()[0].store().view().revision(), Revision(3));
        world.kill(0);
        sleep(KEEPALIVE * 2).await;
        world.0.cluster.revive(0);
        world.0.links[0].touch();
        put(&world, &["a/3"]).await;
        answer(&world, &range).await;
        assert_eq!(world.0.cache.prefixes()[0].store().view().position.epoch, 1);
        settle(&world);
    });
}

/// A compaction that was noted in the old history was held against the new one, which had not been compacted.
#[test]
fn a_compaction_does_not_outlive_its_history() {
    simulated(async {
        let (world, range) = (world(), KeyRange::prefix(Bytes::from_static(b"a/")));
        put(&world, &["a/1", "a/2", "a/3"]).await;
        answer(&world, &range).await;
        world.0.cluster.compact(4);
        world.0.cache.note_compacted(Revision(4));
        sleep(Duration::from_millis(10)).await;
        let prefix = &world.0.cache.prefixes()[0];
        assert_eq!(prefix.store().view().compacted, Revision(4));
        restore(&world, 1, true).await;
        put(&world, &["a/4"]).await;
        answer(&world, &range).await;
        world.0.cache.note_compacted(Revision(1));
        sleep(Duration::from_millis(10)).await;
        assert_eq!(prefix.store().view().position.epoch, 2);
        assert_eq!(prefix.store().view().compacted, Revision(1));
        settle(&world);
    });
}

/// The feed learns of a compaction after the client that asked for it was answered, and what had been compacted was served
/// until then. Likewise, a watcher began in the past on a view that was behind what its client had written.
#[test]
fn what_clients_were_told_of_is_known_to_reads_and_watchers_that_begin_afterwards() {
    simulated(async {
        let (world, range) = (world(), KeyRange::prefix(Bytes::from_static(b"a/")));
        let (cache, view) = (&world.0.cache, || world.0.cache.prefixes()[0].store().view_owned());
        let prefix = &cache.prefixes()[0];
        put(&world, &["a/1", "a/2", "a/3"]).await;
        answer(&world, &range).await;
        let must_wait = || cache.begin_at_once(prefix, true).is_none();
        let compact = |revision| {
            world.0.cluster.compact(revision);
            cache.note_compacted(Revision(revision));
            assert!(must_wait() && view().compacted < Revision(revision));
        };
        compact(2);
        assert_eq!(cache.serializable(&range).await.map(|view| view.compacted), Ok(Revision(2)));
        compact(3);
        assert_eq!(cache.linearizable(&range, Tense::Present).await.map(|view| view.compacted), Ok(Revision(3)));
        compact(4);
        cache.begin(prefix, true).await;
        assert_eq!((must_wait(), view().compacted), (false, Revision(4)));

        put(&world, &["a/4"]).await;
        cache.note_told(Revision(5), cache.upstream().newest_connection());
        assert_eq!((must_wait(), view().revision()), (true, Revision(4)));
        assert_eq!(cache.begin_at_once(prefix, false).map(|(_, present)| present), Some(Revision(5)));
        assert_eq!(cache.begin(prefix, true).await.1, Revision(5));
        assert_eq!((must_wait(), view().revision()), (false, Revision(5)));
        settle(&world);
    });
}

/// A compaction that went past the cache was never known to it.
#[test]
fn a_compaction_by_others_is_known_to_reads_of_the_past_at_once_and_to_all_soon() {
    simulated(async {
        let (world, range) = (world(), KeyRange::prefix(Bytes::from_static(b"a/")));
        let (cache, view) = (&world.0.cache, || world.0.cache.prefixes()[0].store().view_owned());
        answer(&world, &range).await;
        for _ in 0..20 {
            put(&world, &["a/1", "a/2"]).await;
        }
        answer(&world, &range).await;
        for compacted in [2, 3, 17, 40].map(Revision) {
            world.0.cluster.compact(compacted.0);
            assert!(view().compacted < compacted);
            assert_eq!(cache.linearizable(&range, Tense::Past).await.map(|view| view.compacted), Ok(compacted));
        }
        world.0.cluster.compact(41);
        sleep(Duration::from_secs(2)).await;
        assert_eq!(cache.serializable(&range).await.map(|view| view.compacted), Ok(Revision(41)));
        settle(&world);
    });
}

/// What a view had yet to be told of was taken for compacted in it, and whoever began to watch then was sent away.
#[test]
fn a_compaction_ahead_of_the_view_shows_when_the_view_gets_there() {
    simulated(async {
        let (world, range) = (world(), KeyRange::prefix(Bytes::from_static(b"a/")));
        let (cache, view) = (&world.0.cache, || world.0.cache.prefixes()[0].store().view_owned());
        put(&world, &["a/1", "a/2", "a/3"]).await;
        answer(&world, &range).await;
        cache.note_compacted(Revision(6));
        sleep(Duration::from_millis(10)).await;
        assert_eq!((view().revision(), view().compacted), (Revision(4), Revision(0)));
        assert!(cache.serializable(&range).await.is_ok(), "what is not in the view is no matter of its readers");
        put(&world, &["a/4", "a/5"]).await;
        assert_eq!(cache.linearizable(&range, Tense::Past).await.map(|view| view.compacted), Ok(Revision(6)));
        settle(&world);
    });
}

/// It was noted, and shown when somebody next read what was cached.
#[test]
fn a_compaction_ahead_of_a_quiet_view_is_known_soon() {
    simulated(async {
        let (world, range) = (world(), KeyRange::prefix(Bytes::from_static(b"a/")));
        put(&world, &["a/1"; 3]).await;
        answer(&world, &range).await;
        put(&world, &["b/1"; 8]).await;
        world.0.cluster.compact(8);
        sleep(Duration::from_secs(3)).await;
        assert_eq!(world.0.cache.serializable(&range).await.map(|view| view.compacted), Ok(Revision(8)));
        settle(&world);
    });
}

/// Notes the last event of `revision` as one that a watcher of what is not cached is sent.
fn relay_last_event(world: &World, revision: i64) {
    let event = world.0.cluster.look().history().events(revision).last().cloned();
    let cache = &world.0.cache;
    cache.prefixes()[0].note_events(&[event.expect("an event of that revision")]);
    cache.note_told(Revision(revision), cache.upstream().newest_connection());
}

/// The first list of the prefix made the cache forget what a client had been told of other keys before.
#[test]
fn what_a_client_was_told_before_the_first_list_is_looked_for_too() {
    simulated(async {
        let (world, range) = (world(), KeyRange::prefix(Bytes::from_static(b"a/")));
        put(&world, &["a/1", "b/1"]).await;
        assert!(!world.0.cache.prefixes()[0].store().view().is_loaded());
        relay_last_event(&world, 3);
        answer(&world, &range).await;
        restore(&world, 2, false).await;
        put(&world, &["b/1"]).await;
        world.0.links[0].touch();
        answer(&world, &range).await;
        assert_eq!(world.0.cache.prefixes()[0].store().view().position.epoch, 2);
        settle(&world);
    });
}

/// What was told before the first list, of a history that had ended by then, would have begun another epoch at the next reconnect.
#[test]
fn what_the_first_list_contradicts_is_of_a_history_that_has_ended() {
    simulated(async {
        let (world, range) = (world(), KeyRange::prefix(Bytes::from_static(b"a/")));
        put(&world, &["a/1", "b/1"]).await;
        relay_last_event(&world, 3);
        restore(&world, 2, true).await;
        answer(&world, &range).await;
        world.0.links[0].cut();
        sleep(Duration::from_secs(3)).await;
        answer(&world, &range).await;
        let position = world.0.cache.prefixes()[0].store().view().position;
        assert_eq!((position.epoch, position.revision), (1, Revision(2)));
        settle(&world);
    });
}

/// Of a key that is not cached, a deletion was taken for another history's because the key had not been there before.
#[test]
fn a_deletion_that_a_client_knows_of_may_be_of_a_key_that_came_in_the_same_revision() {
    simulated(async {
        let (world, range) = (world(), KeyRange::prefix(Bytes::from_static(b"a/")));
        put(&world, &["a/1"]).await;
        answer(&world, &range).await;
        let key = Bytes::from_static(b"b/1");
        write(&world, &[Write::Put(key.clone(), "v".into()), Write::Delete(key)]).await;
        relay_last_event(&world, 3);
        put(&world, &["a/2"]).await;
        answer(&world, &range).await;
        world.0.links[0].reset();
        sleep(KEEPALIVE).await;
        answer(&world, &range).await;
        assert_eq!(world.0.cache.prefixes()[0].store().view().position.epoch, 1);
        settle(&world);
    });
}

/// Where only a comparison of the prefix could tell whether its history goes on, nobody looked for what clients knew of other keys.
#[test]
fn what_clients_know_of_other_keys_is_looked_for_in_doubt_as_well() {
    for (term_held, compacts) in [(true, false), (false, false), (true, true)] {
        simulated(async move {
            let (world, range) = (world(), KeyRange::prefix(Bytes::from_static(b"a/")));
            let cluster = &world.0.cluster;
            cluster.elect();
            answer(&world, &range).await;
            put(&world, &["a/1", "b/1", "b/2", "b/3", "b/4"]).await;
            relay_last_event(&world, 6);
            answer(&world, &range).await;
            world.kill(0);
            sleep(KEEPALIVE * 2).await;
            cluster.restore(5, 0, term_held);
            cluster.revive(0);
            put(&world, &["b/5", "b/6"]).await;
            if compacts {
                cluster.compact(5);
            }
            world.0.links[0].touch();
            answer(&world, &range).await;
            let epoch = world.0.cache.prefixes()[0].store().view().position.epoch;
            assert_eq!(epoch, 2, "term held: {term_held}, compacts: {compacts}");
            settle(&world);
        });
    }
}

/// An index that has outgrown the limit comes back at the first further try, once enough keys have gone.
#[test]
fn an_index_that_had_grown_over_the_limit_comes_back_when_keys_have_gone() {
    simulated(async {
        let (world, range) = (with_room(200), KeyRange::prefix(Bytes::from_static(b"a/")));
        let keys = || world.0.cache.prefixes()[0].store().view_owned().tree.as_ref().map(|tree| tree.len());
        answer(&world, &range).await;
        assert_eq!(keys(), Some(0));
        put(&world, &["a/1", "a/2", "a/3", "a/4", "a/5"]).await;
        sleep(Duration::from_secs(10)).await;
        assert_eq!(keys(), None);
        delete(&world, &["a/1", "a/2", "a/3", "a/4"]).await;
        sleep(Duration::from_secs(90)).await;
        assert_eq!(keys(), Some(1));
        settle(&world);
    });
}

/// A keyspace over the limit is tried again now and then. While its prefix was quiet, each attempt began a new epoch.
#[test]
fn a_keyspace_over_the_limit_is_tried_again_in_its_own_history() {
    simulated(async {
        let world = with_room(200);
        let view = || world.0.cache.prefixes()[0].store().view_owned();
        put(&world, &["a/1", "a/2", "a/3", "a/4", "a/5", "b/1"]).await;
        // The history has been cut by its age meanwhile, so no event is left that shows which one it is.
        sleep(Duration::from_secs(4000)).await;
        assert!(view().is_loaded() && view().tree.is_none(), "five records do not fit");
        assert_eq!(view().position.epoch, 1);
        assert_eq!(world.0.cluster.look().lists, 2, "at first, and in case that values have shrunk: no key has gone");
        delete(&world, &["a/1", "a/2", "a/3", "a/4"]).await;
        put(&world, &["b/2"]).await;
        sleep(Duration::from_secs(4000)).await;
        let (position, keys) = (view().position, view().tree.as_ref().map(|tree| tree.len()));
        assert_eq!((position.epoch, keys), (1, Some(1)));
        settle(&world);
    });
}

/// The number of keys is asked before that. Until the answer came, for a minute where none did, watchers stood still.
#[test]
fn events_come_while_the_keys_are_counted() {
    simulated(async {
        let world = with_room(200);
        let revision = || world.0.cache.prefixes()[0].store().view().revision();
        put(&world, &["a/1", "a/2", "a/3", "a/4", "a/5"]).await;
        sleep(Duration::from_secs(10)).await;
        assert_eq!(revision(), Revision(6));
        world.0.cluster.look().counts_hang = true;
        for expected in 7..200 {
            sleep(Duration::from_secs(1)).await;
            put(&world, &["a/1"]).await;
            sleep(Duration::from_secs(1)).await;
            assert_eq!(revision(), Revision(expected));
        }
        assert_eq!(world.0.cluster.look().lists, 1, "nobody could tell whether there are fewer keys");
        settle(&world);
    });
}
