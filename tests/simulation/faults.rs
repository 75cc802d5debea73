//! What goes wrong, and for how long.

use tokio::time::{Duration, sleep};

use crate::{
    clients,
    dice::Dice,
    link::Way,
    world::{KEEPALIVE, World},
};

/// Restores in one simulation.
const RESTORES: u32 = 2;

/// Lets faults strike until the time is over; several may be there at once.
pub async fn strike(world: World, mut dice: Dice) {
    let mut restores = 0;
    let pace = dice.pick(&[200, 600, 1500]);
    loop {
        sleep(dice.pause(pace)).await;
        if restores < RESTORES && dice.chance(12) {
            restores += 1;
            restore(&world, &mut dice).await;
        } else if dice.chance(6) {
            compact(&world, &mut dice);
        } else {
            tokio::spawn(one(world.clone(), dice.fork()));
        }
    }
}

async fn one(world: World, mut dice: Dice) {
    let at = dice.below(world.0.links.len());
    let link = &world.0.links[at];
    let longest = dice.pick(&[300, 2500]);
    let (long, kind) = (dice.pause(longest), dice.below(9));
    let held = Way { held: true, ..Way::SOUND };
    let slow = Way { delay: dice.pick(&[30, 400]) as u64, piece: dice.pick(&[17, 512]), ..Way::SOUND };
    let names = ["hold", "hold up", "hold down", "slow", "cut", "reset", "kill", "cut off", "lag"];
    world.0.trace.note(format!("{} {at} for {long:?}", names[kind]));
    match kind {
        0 => link.set(held, held),
        1 => link.set(held, Way::SOUND),
        2 => link.set(Way::SOUND, held),
        3 => link.set(slow, slow),
        4 => return link.cut(),
        5 => return link.reset(),
        6 => world.kill(at),
        7 => world.0.cluster.change(|inner| inner.members[at].cut_off = true),
        _ => world.0.cluster.change(|inner| inner.members[at].lag = 1500),
    }
    sleep(long).await;
    match kind {
        0..=3 => link.set(Way::SOUND, Way::SOUND),
        6 => world.revive(at),
        _ => world.0.cluster.change(|inner| (inner.members[at].cut_off, inner.members[at].lag) = (false, 3)),
    }
    if dice.chance(2) {
        world.0.cluster.elect();
    }
}

fn compact(world: &World, dice: &mut Dice) {
    let revision = world.0.cluster.look().history().head() - dice.pick(&[0, 1, 10]);
    world.0.trace.note(format!("compact {revision}"));
    match dice.chance(2) {
        true => drop(tokio::spawn(clients::compact(world.clone(), revision))),
        false => world.0.cluster.compact(revision),
    }
}

/// Stops the cluster and begins it anew from a backup. That takes longer than a dead connection stays unnoticed. Whoever wrote what is
/// lost may do so again, at the same revisions, before anybody else is back.
async fn restore(world: &World, dice: &mut Dice) {
    *world.0.restoring.lock() = true;
    (0..world.0.links.len()).for_each(|at| world.kill(at));
    world.0.trace.note("stopped for a restore");
    sleep(KEEPALIVE + Duration::from_millis(500) + dice.pause(1000)).await;
    let (revision, lost) = {
        let inner = world.0.cluster.look();
        let (head, least) = (inner.history().head(), inner.compacted().max(1));
        let revision = (head - dice.pick(&[0, 1, 3, 20])).max(least);
        let again = |revision| inner.history().again(revision, || clients::value(dice));
        (revision, (revision + 1..=head).map(again).collect::<Vec<_>>())
    };
    let (bump, held) = (dice.pick(&[0, 0, 5, 1000]), dice.chance(2));
    world.0.trace.note(format!("restored at {revision}, raised by {bump}, term held: {held}"));
    world.0.cluster.restore(revision, bump, held);
    if bump == 0 && dice.chance(2) {
        world.0.trace.note(format!("written again up to {}", revision + lost.len() as i64));
        world.0.cluster.go_on_with(&lost);
    }
    *world.0.restoring.lock() = false;
    (0..world.0.links.len()).for_each(|at| world.revive(at));
}
