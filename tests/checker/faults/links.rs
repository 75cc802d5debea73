//! What goes wrong between a Millpond and the etcd: nothing arrives, little arrives, late, or half of it.

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;

use super::{
    super::{context::Context, world::Link},
    FaultLog,
};
use crate::support::{fault::Faults, random::Generator};

/// Strikes the links of Millpond `number` until the work is over.
pub async fn run(number: usize, link: Arc<Link>, context: Arc<Context>, log: FaultLog) {
    let mut random = Generator::new(context.seed_of(1000 + number));
    while context.works() {
        sleep(Duration::from_millis(200 + random.below(1800) as u64)).await;
        let _busy = link.busy.lock().await;
        if context.works() {
            strike(number, &link, &mut random, &log).await;
        }
    }
}

async fn strike(number: usize, link: &Link, random: &mut Generator, log: &FaultLog) {
    // Of three members, mostly only one is out of reach.
    let all = random.chance(3);
    let one = random.below(link.proxies.len());
    let proxies: Vec<_> = if all { link.proxies.iter().collect() } else { vec![&link.proxies[one]] };
    let millis = 100 + random.below(2400) as u64;
    let delay = Duration::from_millis(20 + random.below(700) as u64);
    let (what, faults) = match random.below(9) {
        0 => ("black hole", Faults::black_hole()),
        1 => ("answers vanish", Faults { hold_answers: true, ..Faults::default() }),
        2 => ("requests vanish", Faults { hold_requests: true, ..Faults::default() }),
        3 | 4 => ("delay", Faults { delay, ..Faults::default() }),
        5 => ("throttle", Faults { bytes_per_second: 1000 + random.below(20_000) as u64, ..Faults::default() }),
        6 => ("refusal", Faults { refuse: true, ..Faults::default() }),
        7 => {
            let bytes = random.below(6000) as u64;
            log.note(format!("cut: millpond {number}, after {bytes} bytes"));
            return proxies.iter().for_each(|proxy| proxy.cut_after(bytes));
        }
        _ => {
            log.note(format!("reset: millpond {number}"));
            return proxies.iter().for_each(|proxy| proxy.reset());
        }
    };
    log.note(format!("{what}: millpond {number}, {} links, {millis} ms, delay {delay:?}", proxies.len()));
    proxies.iter().for_each(|proxy| proxy.set(faults.clone()));
    if faults.refuse {
        proxies.iter().for_each(|proxy| proxy.reset());
    }
    sleep(Duration::from_millis(millis)).await;
    link.heal();
}
