//! Writes, beside etcd and kine.

use super::{
    Outcome,
    load::{Work, compare, judge},
    servers::{
        Kine,
        System::{self, Etcd, Millpond},
    },
};

/// Keys that puts are spread over.
const KEYS: u64 = 100_000;

const HUNDRED: (usize, usize) = (10, 10);

/// One put at a time.
pub fn puts_one() -> Outcome<()> {
    let rates = compare(&[Etcd, Millpond, System::Engine], Work::Puts(KEYS), (1, 1))?;
    judge("Millpond's rate over etcd's", rates[1] / rates[0], 0.8, true);
    Ok(())
}

/// A hundred at a time.
pub fn puts_hundred() -> Outcome<()> {
    let rates = compare(&[Etcd, Millpond, System::Engine], Work::Puts(KEYS), HUNDRED)?;
    judge("Millpond's rate over etcd's", rates[1] / rates[0], 1.0, true);
    Ok(())
}

/// What a Kubernetes API server sends most.
pub fn updates() -> Outcome<()> {
    let kines = [Kine::Default, Kine::Durable, Kine::Fastest].map(System::Kine);
    let systems = [Etcd, Millpond, kines[0], kines[1], kines[2]];
    let rates = compare(&systems, Work::Updates, HUNDRED)?;
    judge("Millpond's rate over etcd's", rates[1] / rates[0], 1.0, true);
    for (kine, rate) in kines.iter().zip(&rates[2..]) {
        judge(&format!("Millpond's rate over that of {}", kine.name()), rates[1] / rate, 3.0, true);
    }
    Ok(())
}
