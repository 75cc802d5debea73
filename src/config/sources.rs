//! Where values come from and how the layers are merged: file, then environment, then flags, each over the one before.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use figment::{
    Figment, Metadata, Profile, Provider,
    value::{Dict, Map, Value},
};

use super::{Config, ConfigError, check, settings};

/// Environment variable that names the settings file.
const CONFIG_VARIABLE: &str = "MILLPOND_CONFIG";

/// Environment variables that share our prefix but belong to the build and the tests.
const FOREIGN: [&str; 2] = ["MILLPOND_PROTOC", "MILLPOND_TEST_"];

/// Where a value was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nowhere.
    Default,
    /// The settings file.
    File(PathBuf),
    /// This environment variable.
    Environment(String),
    /// This flag.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "from {}", path.display()),
            Self::Environment(name) => write!(f, "from {name}"),
            Self::Flag(name) => write!(f, "from --{name}"),
        }
    }
}

/// What settings are read from.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// The settings file; else the one that the environment names; else none.
    pub file: Option<PathBuf>,
    /// Environment variables; those without our prefix are passed over.
    pub environment: Vec<(String, String)>,
    /// Values of flags by setting name, in the order given.
    pub flags: BTreeMap<String, Vec<String>>,
}

/// Checked settings and where each came from.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The settings.
    pub config: Config,
    origins: BTreeMap<&'static str, Origin>,
}

impl Loaded {
    /// Reads, merges and checks. Touches nothing but the settings file.
    pub fn load(sources: &Sources) -> Result<Self, ConfigError> {
        let layers = layers(sources)?;
        let mut origins = BTreeMap::new();
        let mut figment = Figment::new();
        for layer in layers {
            for key in layer.values.keys() {
                let setting = settings::find(key).ok_or_else(|| layer.unknown(key))?;
                origins.insert(setting.name, layer.origin(key));
            }
            figment = figment.merge(layer);
        }
        let loaded = figment.extract().map(|config| Self { config, origins: origins.clone() });
        let loaded = loaded.map_err(|error| unreadable(&error, &origins))?;
        check::check(&loaded)?;
        Ok(loaded)
    }

    /// Where the value of a setting came from.
    pub fn origin(&self, setting: &str) -> Origin {
        self.origins.get(setting).cloned().unwrap_or(Origin::Default)
    }
}

fn unreadable(error: &figment::Error, origins: &BTreeMap<&'static str, Origin>) -> ConfigError {
    let setting = error.path.first().cloned().unwrap_or_default();
    let origin = origins.get(setting.as_str()).cloned().unwrap_or(Origin::Default);
    ConfigError::Value { origin, problem: error.kind.to_string(), setting }
}

/// The values of one source.
struct Layer {
    kind: LayerKind,
    values: Dict,
}

enum LayerKind {
    File(PathBuf),
    Environment,
    Flags,
}

impl Layer {
    fn origin(&self, key: &str) -> Origin {
        match &self.kind {
            LayerKind::File(path) => Origin::File(path.clone()),
            LayerKind::Environment => Origin::Environment(variable(key)),
            LayerKind::Flags => Origin::Flag(key.to_owned()),
        }
    }

    fn unknown(&self, key: &str) -> ConfigError {
        ConfigError::Unknown { key: key.to_owned(), origin: self.origin(key), similar: settings::similar(key) }
    }
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named("settings")
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Profile::Default.collect(self.values.clone()))
    }
}

fn variable(key: &str) -> String {
    format!("{}{}", settings::ENV_PREFIX, key.replace('-', "_").to_uppercase())
}

fn layers(sources: &Sources) -> Result<Vec<Layer>, ConfigError> {
    let mut layers = Vec::new();
    let named = sources.environment.iter().find(|(name, path)| name == CONFIG_VARIABLE && !path.is_empty());
    if let Some(path) = sources.file.clone().or_else(|| named.map(|(_, path)| PathBuf::from(path))) {
        layers.push(file_layer(&path)?);
    }
    layers.push(environment_layer(&sources.environment));
    let values = sources.flags.iter().map(|(name, values)| (name.clone(), flag_value(values))).collect();
    layers.push(Layer { kind: LayerKind::Flags, values });
    Ok(layers)
}

fn flag_value(values: &[String]) -> Value {
    Value::from(values.join(","))
}

fn file_layer(path: &Path) -> Result<Layer, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::File { path: path.to_owned(), source })?;
    let syntax = |line, problem: &str| ConfigError::Syntax { path: path.to_owned(), line, problem: one_line(problem) };
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        let start = error.span().map_or(0, |span| span.start);
        let line = 1 + text.bytes().take(start).filter(|&byte| byte == b'\n').count();
        syntax(line, error.message())
    })?;
    let value = Value::serialize(table).map_err(|error| syntax(1, &error.kind.to_string()))?;
    Ok(Layer { kind: LayerKind::File(path.to_owned()), values: value.into_dict().unwrap_or_default() })
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// An empty variable counts as unset, since deployment tools write those for options that nobody filled in.
fn environment_layer(environment: &[(String, String)]) -> Layer {
    let ours = environment.iter().filter(|(name, value)| !value.is_empty() && !is_foreign(name));
    let values = ours.filter_map(|(name, value)| {
        let key = name.strip_prefix(settings::ENV_PREFIX)?;
        Some((key.to_lowercase().replace('_', "-"), Value::from(value.as_str())))
    });
    Layer { kind: LayerKind::Environment, values: values.collect() }
}

/// Whether a variable that may carry our prefix is none of our settings: Kubernetes describes a Service named `millpond` to
/// every pod in variables such as `MILLPOND_SERVICE_HOST` and `MILLPOND_PORT_2379_TCP`.
fn is_foreign(name: &str) -> bool {
    let ours = name == CONFIG_VARIABLE || FOREIGN.iter().any(|foreign| name.starts_with(foreign));
    let words: Vec<&str> = name.split('_').collect();
    let service = words.windows(2).any(|pair| matches!(pair, ["SERVICE", "HOST" | "PORT"]));
    let port = words.last() == Some(&"PORT") || words.windows(2).any(|pair| pair[0] == "PORT" && is_number(pair[1]));
    ours || service || port
}

fn is_number(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> Sources {
        let environment = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Sources { environment, ..Sources::default() }
    }

    fn problem(sources: &Sources) -> String {
        Loaded::load(sources).map(|loaded| loaded.config).unwrap_err().to_string()
    }

    #[test]
    fn nothing_given_is_the_default() {
        let loaded = Loaded::load(&Sources::default()).unwrap();
        assert_eq!(loaded.config, Config::default());
        assert_eq!(loaded.origin("listen"), Origin::Default);
    }

    #[test]
    fn a_flag_beats_the_environment() {
        let mut sources = environment(&[("MILLPOND_HISTORY_BYTES", "1MiB"), ("MILLPOND_FORWARD_LIMIT", "7")]);
        sources.flags.insert("history-bytes".into(), vec!["2MiB".into()]);
        let loaded = Loaded::load(&sources).unwrap();
        assert_eq!((loaded.config.history_bytes, loaded.config.forward_limit), (2 << 20, 7));
        assert_eq!(loaded.origin("history-bytes").to_string(), "from --history-bytes");
        assert_eq!(loaded.origin("forward-limit").to_string(), "from MILLPOND_FORWARD_LIMIT");
    }

    #[test]
    fn a_mistyped_variable_is_named() {
        let line = problem(&environment(&[("MILLPOND_HISTORY_BYTE", "1MiB")]));
        assert_eq!(line, "history-byte: no such setting (from MILLPOND_HISTORY_BYTE); did you mean history-bytes?");
    }

    #[test]
    fn an_unreadable_value_is_named() {
        let line = problem(&environment(&[("MILLPOND_FORWARD_LIMIT", "many")]));
        assert_eq!(line, "forward-limit: \"many\" is not a whole number of at least 1 (from MILLPOND_FORWARD_LIMIT)");
        let line = problem(&environment(&[("MILLPOND_LOG_FORMAT", "xml")]));
        assert!(line.starts_with("log-format: ") && line.contains("xml"), "{line}");
    }

    #[test]
    fn variables_of_kubernetes_and_empty_ones_are_passed_over() {
        let loaded = Loaded::load(&environment(&[
            ("MILLPOND_SERVICE_HOST", "10.0.0.1"),
            ("MILLPOND_SERVICE_PORT_GRPC", "2379"),
            ("MILLPOND_PORT", "tcp://10.0.0.1:2379"),
            ("MILLPOND_PORT_2379_TCP_ADDR", "10.0.0.1"),
            ("MILLPOND_ADMIN_PORT_23791_TCP", "tcp://10.0.0.1:23791"),
            ("MILLPOND_TEST_ETCD", "/usr/bin/etcd"),
            ("MILLPOND_ENDPOINTS", ""),
            ("OTHER", "x"),
        ]));
        assert_eq!(loaded.unwrap().config, Config::default());
    }
}
