//! The commands: what the program does for each set of arguments, and its exit status.
//!
//! - [`mod@bench`]: a load generator.
//! - [`check`]: comparisons of endpoints, of a cache with its upstream, and of a data directory with itself.
//! - [`transfer`]: import, export and restore of embedded stores.
//! - [`flags`]: one flag per setting.
//! - [`usage`]: arguments that cannot be used, told on one line.
//! - [`serve`]: the proxy.
//! - [`signals`]: SIGTERM and SIGINT.

use std::{io, process::ExitCode};

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::config::{ConfigError, Loaded, show};

pub mod bench;
pub mod check;
pub mod flags;
pub mod serve;
pub mod signals;
pub mod transfer;
mod usage;

/// Exit status for arguments and settings that cannot be used (EX_USAGE of sysexits.h).
pub const EXIT_USAGE: u8 = 64;

/// Exit status for everything else that goes wrong.
pub const EXIT_FAILURE: u8 = 1;

const ABOUT: &str = "A watch cache for etcd: one upstream watch fills it, any number of clients read and watch from it";

const EXAMPLES: &str = "\
Examples:
  In front of a cluster:        millpond serve --endpoints etcd-0:2379,etcd-1:2379
  No etcd at hand:              millpond serve
  Any etcd client works:        etcdctl --endpoints 127.0.0.1:23790 get --prefix /
  Settings to start from:       millpond config > millpond.toml";

/// The program's arguments.
#[derive(Debug, Parser)]
#[command(name = "millpond", version, about = ABOUT, after_help = EXAMPLES, arg_required_else_help = true)]
#[command(disable_help_subcommand = true, max_term_width = 120)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the etcd API from memory
    #[command(after_help = serve::EXAMPLES, next_line_help = true)]
    Serve(flags::SettingFlags),
    /// Print the effective settings as TOML, with where each came from
    #[command(next_line_help = true, after_help = "The output can be fed back: millpond serve --config FILE")]
    Config(flags::SettingFlags),
    /// Load an etcd endpoint and measure what it costs
    #[command(next_line_help = true, after_help = bench::EXAMPLES, arg_required_else_help = true)]
    Bench(bench::Bench),
    /// Compare a cache with its upstream, two endpoints with each other, or a data directory with itself
    #[command(next_line_help = true, after_help = check::EXAMPLES)]
    Check(check::Check),
    /// Copy all keys and leases of an etcd into a new data directory
    #[command(next_line_help = true, after_help = transfer::REVISIONS)]
    Import(transfer::Import),
    /// Copy all keys and leases of a data directory into an etcd
    #[command(next_line_help = true, after_help = transfer::REVISIONS)]
    Export(transfer::Export),
    /// Make a new data directory from a snapshot of an embedded store
    #[command(next_line_help = true, after_help = transfer::SNAPSHOT)]
    Restore(transfer::Restore),
    /// Print a completion script for a shell
    #[command(after_help = "Example for bash: millpond completions bash > /etc/bash_completion.d/millpond")]
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// What stops a command. The text is one line for the person at the terminal.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// Settings that cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Settings that cannot be printed.
    #[error("config: {0}")]
    Show(#[from] toml::ser::Error),
    /// The proxy could not start or go on.
    #[error(transparent)]
    Serve(#[from] serve::ServeError),
    /// The load could not be run.
    #[error(transparent)]
    Bench(#[from] bench::BenchError),
    /// A comparison could not be made, or found differences.
    #[error(transparent)]
    Check(#[from] check::CheckError),
    /// A store could not be copied.
    #[error(transparent)]
    Transfer(#[from] transfer::TransferError),
    /// Standard output is closed or full.
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
}

impl CommandError {
    fn exit_status(&self) -> u8 {
        if matches!(self, Self::Config(_)) { EXIT_USAGE } else { EXIT_FAILURE }
    }
}

/// Runs the program with the process's arguments and environment. Problems go to standard error as one line.
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage::report(&error),
    };
    match execute(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(CommandError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            usage::complain(&error.to_string());
            ExitCode::from(error.exit_status())
        }
    }
}

fn execute(command: Command) -> Result<(), CommandError> {
    match command {
        Command::Serve(flags) => Ok(serve::run(Loaded::load(&flags.sources())?.config)?),
        Command::Config(flags) => {
            let loaded = Loaded::load(&flags.sources())?;
            print(show::to_toml(&loaded)?.as_bytes())
        }
        Command::Bench(bench) => print(bench::run(&bench)?.as_bytes()),
        Command::Check(check) => print(check::run(&check)?.as_bytes()),
        Command::Import(import) => print(transfer::import(&import)?.as_bytes()),
        Command::Export(export) => print(transfer::export(&export)?.as_bytes()),
        Command::Restore(restore) => print(transfer::restore(&restore)?.as_bytes()),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "millpond", &mut script);
            print(&script)
        }
    }
}

fn print(bytes: &[u8]) -> Result<(), CommandError> {
    use io::Write;
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_well_formed() {
        Cli::command().debug_assert();
    }
}
