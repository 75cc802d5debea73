//! `millpond import`, `export` and `restore`: whole stores in and out of data directories.

use std::{io, path::PathBuf};

use clap::Args;
use etcd_client::Client;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    config::DEFAULT_DATA_DIR,
    sql::{self, Options, Progress, SqlError},
};

/// Shown below the help of `import` and `export`.
pub const REVISIONS: &str = "\
Revisions cannot be kept: every key gets a new one, and watches and lists that
go on from a revision of the source have to begin anew. Leases are granted
again under their ids, with their full time to live.";

/// Shown below the help of `restore`.
pub const SNAPSHOT: &str = "\
Snapshots are taken with: etcdctl --endpoints 127.0.0.1:23790 snapshot save FILE
The new store has new cluster and member ids.";

/// Arguments of `import`.
#[derive(Debug, Args)]
pub struct Import {
    /// Endpoint of the etcd to copy from
    #[arg(long, value_name = "HOST:PORT")]
    from: String,
    /// Where the new store goes; it must not hold one with anything in it
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DATA_DIR)]
    data_dir: PathBuf,
}

/// Arguments of `export`.
#[derive(Debug, Args)]
pub struct Export {
    /// The store to copy; no process may have it open
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DATA_DIR)]
    data_dir: PathBuf,
    /// Endpoint of the etcd to copy to
    #[arg(long, value_name = "HOST:PORT")]
    to: String,
}

/// Arguments of `restore`.
#[derive(Debug, Args)]
pub struct Restore {
    /// The snapshot
    #[arg(value_name = "FILE")]
    snapshot: PathBuf,
    /// Where the new store goes
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DATA_DIR)]
    data_dir: PathBuf,
}

/// Why a store could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The etcd cannot be reached.
    #[error("{endpoint}: {source}")]
    Connect {
        /// The endpoint.
        endpoint: String,
        /// Why not.
        source: etcd_client::Error,
    },
    /// The store, or the etcd, failed.
    #[error(transparent)]
    Store(#[from] SqlError),
    /// The runtime cannot start.
    #[error("cannot start: {0}")]
    Runtime(#[from] io::Error),
}

/// Copies an etcd into a new data directory; gives back what to tell the person who asked.
pub fn import(arguments: &Import) -> Result<String, TransferError> {
    let moved = block_on(async {
        let client = connect(&arguments.from).await?;
        let bar = bar();
        let moved = sql::import(&client, &arguments.data_dir, Options::default(), &mut |at| show(&bar, at)).await?;
        bar.finish_and_clear();
        Ok(moved)
    })?;
    Ok(told(moved, &format!("imported into {}", arguments.data_dir.display())))
}

/// Copies a data directory into an etcd; gives back what to tell the person who asked.
pub fn export(arguments: &Export) -> Result<String, TransferError> {
    let moved = block_on(async {
        let client = connect(&arguments.to).await?;
        let bar = bar();
        let moved = sql::export(&arguments.data_dir, Options::default(), &client, &mut |at| show(&bar, at)).await?;
        bar.finish_and_clear();
        Ok(moved)
    })?;
    Ok(told(moved, &format!("exported to {}", arguments.to)))
}

/// Makes a data directory from a snapshot; gives back what to tell the person who asked.
pub fn restore(arguments: &Restore) -> Result<String, TransferError> {
    sql::restore(&arguments.snapshot, &arguments.data_dir)?;
    Ok(format!("restored into {}; the store has new cluster and member ids\n", arguments.data_dir.display()))
}

fn block_on<T>(work: impl Future<Output = Result<T, TransferError>>) -> Result<T, TransferError> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(work)
}

async fn connect(endpoint: &str) -> Result<Client, TransferError> {
    let failed = |source| TransferError::Connect { endpoint: endpoint.to_owned(), source };
    Client::connect([endpoint], None).await.map_err(failed)
}

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {human_pos} of {human_len} keys, {eta} left");
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn show(bar: &ProgressBar, at: Progress) {
    bar.set_length(at.total);
    bar.set_position(at.keys);
}

fn told(moved: Progress, done: &str) -> String {
    let Progress { keys, leases, expired, .. } = moved;
    let gone = if expired > 0 { format!(", left out {expired} whose lease ran out meanwhile") } else { String::new() };
    format!("{done}: {keys} keys, {leases} leases{gone}; their revisions are new\n")
}
