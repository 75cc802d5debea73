//! The embedded store beside etcd and kine, all of them servers of their own on the same disk, in one run.
//!
//! `cargo bench --bench embedded` runs every row; `cargo bench --bench embedded -- puts-1 keys` runs those, `--list` names
//! them. The data goes below `target/`, or where `MILLPOND_BENCH_DIR` says: the disk is part of what is measured.
//!
//! etcd and Millpond wait for the disk before they acknowledge anything. kine does not by default; it is measured as it comes,
//! durable, and with the number of connections that was found to be its fastest.
//!
//! - [`servers`]: the servers as child processes. [`load`]: loads, measured on several of them in turns.
//! - [`writes`], [`compaction`], [`keys`]: the rows.

use std::{error::Error, path::Path, process::ExitCode, time::Instant};

#[path = "../support/child.rs"]
mod child;
mod compaction;
mod keys;
mod load;
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
#[path = "../../tests/support/ports.rs"]
mod ports;
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
#[path = "../../tests/support/process.rs"]
mod process;
mod servers;
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
#[path = "../../tests/support/toolchain.rs"]
mod toolchain;
mod writes;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// What every part returns: the first problem ends the run with its text.
type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// A row's name, what is done, and by what.
type Row = (&'static str, &'static str, fn() -> Outcome<()>);

const ROWS: &[Row] = &[
    ("puts-1", "puts of 512 B, 1 in flight", writes::puts_one),
    ("puts-100", "puts of 512 B, 100 in flight", writes::puts_hundred),
    ("updates-100", "Kubernetes' guarded updates of 512 B, 100 in flight", writes::updates),
    ("kine", "the same beside kine, durable and not, as it comes and with few connections", writes::kine),
    ("compaction", "puts while 1,000,000 revisions are compacted", compaction::run),
    ("keys", "1,000,000 keys of 512 B", keys::run),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.first().map(String::as_str) {
        Some("engine") => keys::serve_engine(Path::new(arguments.get(1).map_or("", String::as_str))),
        _ if !arguments.iter().any(|argument| argument == "--bench") => {
            println!("the comparison takes minutes; run it with cargo bench --bench embedded");
            Ok(())
        }
        _ => compare(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("embedded: {error}");
            ExitCode::FAILURE
        }
    }
}

fn compare(arguments: &[String]) -> Outcome<()> {
    let wanted: Vec<&str> = arguments.iter().map(String::as_str).filter(|name| !name.starts_with("--")).collect();
    if let Some(unknown) = wanted.iter().find(|name| !ROWS.iter().any(|(id, ..)| id == *name)) {
        return Err(format!("no row {unknown}; --list names them").into());
    }
    let listing = arguments.iter().any(|argument| matches!(argument.as_str(), "--list" | "--test"));
    let started = Instant::now();
    for (id, work, run) in ROWS.iter().filter(|(id, ..)| wanted.is_empty() || wanted.contains(id)) {
        println!("{}{id}: {work}", if listing { "" } else { "\n" });
        if !listing {
            run()?;
        }
    }
    if !listing {
        println!("\nin {:.0} s", started.elapsed().as_secs_f64());
    }
    Ok(())
}
