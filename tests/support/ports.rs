//! Free TCP ports for servers that must be told their port.
//!
//! They lie below the range from which the kernel takes ports for outgoing connections, so that no client's connection
//! lands on one between its choice here and its use.

use std::{collections::HashSet, net::TcpListener, sync::Mutex};

use rand::RngExt;

/// Every port handed out in this process: a server that restarts keeps its port while it is down.
static TAKEN: Mutex<Option<HashSet<u16>>> = Mutex::new(None);

/// A port on 127.0.0.1 on which nothing listens, never handed out before by this process.
pub fn free() -> u16 {
    let mut taken = TAKEN.lock().unwrap();
    let taken = taken.get_or_insert_default();
    for _ in 0..1000 {
        let port = rand::rng().random_range(12_000..32_000);
        if !taken.contains(&port) && TcpListener::bind(("127.0.0.1", port)).is_ok() {
            taken.insert(port);
            return port;
        }
    }
    panic!("no free port found on 127.0.0.1 in 1000 tries");
}
