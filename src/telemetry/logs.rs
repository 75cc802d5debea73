//! The log: structured events as text or JSON on standard error.

use std::io::{self, IsTerminal};

use tracing_subscriber::{EnvFilter, filter::ParseError, util::TryInitError};
use tracing_subscriber::{Layer, layer::SubscriberExt, registry, util::SubscriberInitExt};

use crate::config::{Config, LogFormat};

/// Why the log cannot start.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The level or its directives cannot be read.
    #[error("log-level: {0}")]
    Level(#[from] ParseError),
    /// Another subscriber is installed already.
    #[error("{0}")]
    Taken(#[from] TryInitError),
}

/// Installs the global subscriber.
pub fn start(config: &Config) -> Result<(), LogError> {
    let filter = EnvFilter::try_new(&config.log_level)?;
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let layer = match config.log_format {
        LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    registry().with(filter).with(layer).try_init()?;
    Ok(())
}
