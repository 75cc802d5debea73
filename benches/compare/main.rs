//! Millpond beside etcd, etcd's own grpc-proxy and a bare hyper server, in one run on one machine.
//!
//! `cargo bench --bench compare` runs every row; `cargo bench --bench compare -- P1 P8` runs those. `--list` names them,
//! `--no-millpond` leaves Millpond out. The table and the plots go to `target/bench-report/`.
//!
//! What counts is the CPU time of the server's process per operation: on a machine with few cores, wall-clock figures say more
//! about the scheduler. The load comes from the generator behind `millpond bench`, in this process; its own CPU time is in the
//! table so that a reader sees that it was not the bottleneck.
//!
//! - [`servers`]: the four servers as child processes; [`bare`]: the one that is the floor.
//! - [`world`]: the servers of a run, the keys in them, and measuring one load on one server.
//! - [`rows`]: what is measured, and what Millpond is to reach.
//! - [`report`], [`plot`]: the table and the plots; [`host`]: whether the machine was ours meanwhile.

use std::{error::Error, fs, path::PathBuf, process::ExitCode, time::Instant};

use self::{
    host::HostTime,
    report::Row,
    rows::{ROWS, RowKind},
    world::World,
};

mod bare;
#[path = "../support/child.rs"]
mod child;
mod host;
mod plot;
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
#[path = "../../tests/support/ports.rs"]
mod ports;
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
#[path = "../../tests/support/process.rs"]
mod process;
mod report;
mod rows;
mod servers;
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
#[path = "../../tests/support/toolchain.rs"]
mod toolchain;
mod world;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// What every part returns: the first problem ends the run with its text.
type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.first().map(String::as_str) {
        Some("bare") => bare::serve(&arguments[1..]),
        _ if !arguments.iter().any(|argument| argument == "--bench") => {
            println!("the comparison takes minutes; run it with cargo bench --bench compare");
            Ok(())
        }
        _ => compare(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare: {error}");
            ExitCode::FAILURE
        }
    }
}

fn compare(arguments: &[String]) -> Outcome<()> {
    let wanted: Vec<&str> = arguments.iter().map(String::as_str).filter(|name| !name.starts_with("--")).collect();
    if let Some(unknown) = wanted.iter().find(|name| !ROWS.iter().any(|row| row.id == **name)) {
        return Err(format!("no row {unknown}; --list names them").into());
    }
    let chosen: Vec<&RowKind> = ROWS.iter().filter(|row| wanted.is_empty() || wanted.contains(&row.id)).collect();
    if arguments.iter().any(|argument| matches!(argument.as_str(), "--list" | "--test")) {
        chosen.iter().for_each(|row| println!("{:<12} {}", row.id, row.work));
        return Ok(());
    }
    let started = Instant::now();
    let mut world = World::new(!arguments.iter().any(|argument| argument == "--no-millpond"))?;
    let mut results: Vec<Row> = Vec::new();
    for kind in chosen {
        eprintln!("{} {}", kind.id, kind.work);
        let before = HostTime::now();
        let mut row = (kind.measure)(&mut world, kind)?;
        row.remarks.extend(HostTime::now().zip(before).and_then(|(now, before)| now.remark(before)));
        eprintln!("    {}", row.summary());
        results.push(row);
    }
    let place = write(&results)?;
    eprintln!("{:.0} s; {}", started.elapsed().as_secs_f64(), place.display());
    Ok(())
}

/// Writes the table and the plots; returns where the table is.
fn write(results: &[Row]) -> Outcome<PathBuf> {
    let directory = toolchain::target().join("bench-report");
    fs::create_dir_all(&directory)?;
    let text = report::markdown(results);
    print!("{text}");
    let table = directory.join("compare.md");
    fs::write(&table, text)?;
    for row in results {
        for (index, series) in row.plots.iter().enumerate() {
            fs::write(directory.join(plot::file_name(row.id, index)), plot::svg(series))?;
        }
    }
    Ok(table)
}
