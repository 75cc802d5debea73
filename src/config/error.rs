//! What can be wrong with the settings: always one line, always naming the setting and where its value came from.

use std::{io, path::PathBuf};

use super::sources::Origin;

/// Settings that cannot be used. None of these is worth a retry.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file given by `--config` cannot be read.
    #[error("config: {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why it cannot be read.
        source: io::Error,
    },
    /// The file is not TOML.
    #[error("config: {} line {line}: {problem}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What the parser says, on one line.
        problem: String,
    },
    /// A name that is no setting.
    #[error("{key}: no such setting ({origin}){}", hint(.similar))]
    Unknown {
        /// The name as it was given.
        key: String,
        /// Where it was given.
        origin: Origin,
        /// The setting that was probably meant.
        similar: Option<&'static str>,
    },
    /// A value that cannot be read.
    #[error("{setting}: {problem} ({origin})")]
    Value {
        /// The setting.
        setting: String,
        /// Where the value was given.
        origin: Origin,
        /// What is wrong with the value.
        problem: String,
    },
    /// Values that do not go together.
    #[error("{setting}: {problem} ({origin})")]
    Contradiction {
        /// The setting to change first.
        setting: &'static str,
        /// Where its value was given.
        origin: Origin,
        /// What it contradicts.
        problem: String,
    },
}

fn hint(similar: &Option<&'static str>) -> String {
    similar.map_or_else(String::new, |name| format!("; did you mean {name}?"))
}
