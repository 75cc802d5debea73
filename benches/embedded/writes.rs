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
    let rates = compare(&[Etcd, Millpond], Work::Updates, HUNDRED)?;
    judge("Millpond's rate over etcd's", rates[1] / rates[0], 1.0, true);
    Ok(())
}

/// The same, beside kine.
pub fn kine() -> Outcome<()> {
    let systems = Kine::ALL.map(System::Kine);
    let rates = compare(&[&[Millpond], &systems[..]].concat(), Work::Updates, HUNDRED)?;
    for (kine, rate) in systems.iter().zip(&rates[1..]) {
        judge(&format!("Millpond's rate over that of {}", kine.name()), rates[0] / rate, 3.0, true);
    }
    Ok(())
}
