//! Who uses the cache and the cluster: writers, readers, and an observer of the view.

use bytes::Bytes;
use millpond::{
    cache::{Proof, Stamp, Tense},
    feed::Phase,
    proto::etcdserverpb::{CompactionRequest, CompactionResponse, PutRequest, PutResponse, ResponseHeader},
    store::{Position, Revision},
    upstream::ConnectionNumber,
};
use tokio::time::{Duration, sleep, timeout};

use crate::{dice::Dice, model::history::Write, world::World};

/// A client's patience with a write.
const DEADLINE: Duration = Duration::from_secs(3);

fn key(world: &World, dice: &mut Dice) -> Bytes {
    Bytes::from_static(dice.pick(&world.0.keys).as_bytes())
}

/// One that is never written twice.
pub fn value(dice: &mut Dice) -> Bytes {
    format!("{:x}", dice.between(0, i64::MAX)).into()
}

/// One to four changes of different keys, with values that are never written twice.
fn writes(world: &World, dice: &mut Dice) -> Vec<Write> {
    let mut keys: Vec<Bytes> = (0..dice.between(1, 4)).map(|_| key(world, dice)).collect();
    keys.sort();
    keys.dedup();
    let write = |key| if dice.chance(3) { Write::Delete(key) } else { Write::Put(key, value(dice)) };
    keys.into_iter().map(write).collect()
}

/// Writes at the members, past the cache.
pub async fn write(world: World, mut dice: Dice) {
    let cluster = &world.0.cluster;
    loop {
        sleep(dice.pause(80)).await;
        let at = dice.below(world.0.links.len());
        let lose = dice.chance(15);
        let writes = writes(&world, &mut dice);
        if let Ok(Ok(header)) = timeout(DEADLINE, cluster.write(at, &writes, lose)).await {
            // An answer comes from the process that was asked, so it is of the present history.
            let generation = cluster.look().generation();
            cluster.tell(generation, header.revision);
            world.0.trace.note(format!("written {} at member {at}", header.revision));
        }
    }
}

/// Writes through the cache's upstream, as the server relays a client's write.
pub async fn relay(world: World, mut dice: Dice) {
    let cache = &world.0.cache;
    loop {
        sleep(dice.pause(200)).await;
        let Some(at) = cache.upstream().preferred(&[]) else { continue };
        let request = PutRequest { key: key(&world, &mut dice), value: value(&mut dice), ..Default::default() };
        let sent = cache.consensus().stamp();
        let path = "/etcdserverpb.KV/Put";
        let answer = cache.upstream().unary_numbered::<_, PutResponse>(at, path, &request, DEADLINE).await;
        let Ok((PutResponse { header: Some(header), .. }, connection)) = answer else { continue };
        note(&world, sent, &header, connection);
        cache.note_put(&request, Revision(header.revision));
    }
}

/// Compacts through the cache's upstream, as the server relays a client's compaction.
pub async fn compact(world: World, revision: i64) {
    let cache = &world.0.cache;
    let Some(at) = cache.upstream().preferred(&[]) else { return };
    let (request, sent) = (CompactionRequest { revision, physical: false }, cache.consensus().stamp());
    let path = "/etcdserverpb.KV/Compact";
    let answer = cache.upstream().unary_numbered::<_, CompactionResponse>(at, path, &request, DEADLINE).await;
    let Ok((CompactionResponse { header: Some(header) }, connection)) = answer else { return };
    note(&world, sent, &header, connection);
    cache.note_compacted(Revision(revision));
}

/// Notes an answer that is relayed.
fn note(world: &World, sent: Stamp, header: &ResponseHeader, connection: ConnectionNumber) {
    let (cluster, cache) = (&world.0.cluster, &world.0.cache);
    cache.note_told(Revision(header.revision), connection);
    if let Some(proof) = Proof::of(header, connection) {
        cache.consensus().note(sent, proof);
    }
    let generation = cluster.look().generation();
    cluster.tell(generation, header.revision);
    world.show(generation, header.revision);
    world.0.trace.note(format!("relayed {}", header.revision));
}

/// Reads linearizably.
pub async fn read(world: World, mut dice: Dice, pause: u64) {
    loop {
        sleep(dice.pause(pause)).await;
        let before = world.before();
        let range = dice.pick(&world.0.ranges);
        let tense = dice.pick(&[Tense::Present, Tense::Past]);
        match world.0.cache.linearizable(&range, tense).await {
            Ok(view) => {
                world.0.trace.note(format!("linearizable {:?}", view.position));
                world.judge_linearizable(before, &range, &view);
                if tense == Tense::Past {
                    world.judge_past(before, &view);
                }
            }
            Err(unserved) => world.0.trace.note(format!("linearizable: {unserved}")),
        }
    }
}

/// Reads serializably.
pub async fn read_serializable(world: World, mut dice: Dice) {
    loop {
        sleep(dice.pause(60)).await;
        let before = world.before();
        let range = dice.pick(&world.0.ranges);
        if let Ok(view) = world.0.cache.serializable(&range).await {
            world.judge_serializable(before, &range, &view);
        }
    }
}

/// Sees to it that the view of a prefix goes forward only, and that its epoch changes only after a restore.
pub async fn observe(world: World, lane: usize) {
    let prefix = &world.0.cache.prefixes()[lane];
    let (mut positions, mut phases) = (prefix.store().position(), prefix.phases());
    let mut last = Position::default();
    loop {
        tokio::select! {
            biased;
            changed = positions.changed() => if changed.is_err() { return },
            changed = phases.changed() => if changed.is_err() { return },
        }
        let phase = *phases.borrow_and_update();
        let phase = if matches!(phase, Phase::Lost(_)) { "lost".into() } else { format!("{phase:?}") };
        let position = *positions.borrow_and_update();
        world.0.trace.note(format!("view {lane} {position:?} {phase}"));
        let generation = world.0.cluster.look().generation();
        if position.epoch < last.epoch || (position.epoch == last.epoch && position.revision < last.revision) {
            world.0.trace.breach("the view goes forward only", format!("{position:?} after {last:?}"));
        }
        let begun = position.epoch > last.epoch;
        if begun && world.0.adopted[lane].lock().replace(generation) == Some(generation) {
            let what = format!("{position:?} after {last:?}, in the same history");
            world.0.trace.breach("the epoch changes only with the history", what);
        }
        last = position;
    }
}
