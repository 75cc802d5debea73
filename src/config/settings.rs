//! The table of settings: one row per field of [`Config`], from which flags, environment names and help are made.

use serde_json::Value;

use super::{Config, DEFAULT_DATA_DIR};

/// Prefix of every environment variable that is a setting.
pub const ENV_PREFIX: &str = "MILLPOND_";

/// What a setting is for; the headings of the help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Where data comes from.
    Upstream,
    /// Where and how clients connect.
    Clients,
    /// What is kept in memory.
    Cache,
    /// The store when there is no etcd.
    EmbeddedStore,
    /// The process itself.
    Process,
    /// Log lines.
    Logs,
}

impl Group {
    /// The heading.
    pub fn title(self) -> &'static str {
        match self {
            Self::Upstream => "Upstream",
            Self::Clients => "Clients",
            Self::Cache => "Cache",
            Self::EmbeddedStore => "Embedded store (without --endpoints)",
            Self::Process => "Process",
            Self::Logs => "Logs",
        }
    }
}

/// One setting.
#[derive(Debug)]
pub struct Setting {
    /// Its name in the file, and as a flag after `--`.
    pub name: &'static str,
    /// The word that stands for its value in the help.
    pub value_name: &'static str,
    /// Its heading.
    pub group: Group,
    /// One sentence of help, without the default.
    pub help: &'static str,
    /// Whether the flag can be given several times.
    pub repeatable: bool,
    /// What happens when it is unset, for settings whose default is not a value.
    unset: Option<&'static str>,
}

impl Setting {
    /// The default with its unit, or what happens without a value.
    pub fn default_text(&self) -> String {
        if let Some(unset) = self.unset {
            return unset.to_owned();
        }
        let defaults = serde_json::to_value(Config::default()).unwrap_or(Value::Null);
        match defaults.get(self.name) {
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
            None => String::new(),
        }
    }
}

const fn one(name: &'static str, value_name: &'static str, group: Group, help: &'static str) -> Setting {
    Setting { name, value_name, group, help, repeatable: false, unset: None }
}

const fn unset(setting: Setting, text: &'static str) -> Setting {
    Setting { unset: Some(text), ..setting }
}

const fn many(setting: Setting) -> Setting {
    Setting { repeatable: true, ..setting }
}

use Group::{Cache, Clients, EmbeddedStore, Logs, Process, Upstream};

/// All settings, in the order of the help.
pub static SETTINGS: &[Setting] = &[
    many(unset(
        one("endpoints", "HOST:PORT,…", Upstream, "Members of the etcd cluster to cache, with or without http://"),
        "none, use the embedded store",
    )),
    one("connect-timeout", "DURATION", Upstream, "How long dialling an endpoint may take"),
    one("read-timeout", "DURATION", Upstream, "How long a linearizable read waits for the upstream before it fails"),
    one("forward-limit", "COUNT", Upstream, "Unary calls forwarded upstream at a time; further ones wait briefly"),
    one(
        "forward-stream-limit",
        "COUNT",
        Upstream,
        "Streams forwarded upstream at a time (lease keep-alives, observers, …)",
    ),
    one(
        "catch-up-limit",
        "COUNT",
        Upstream,
        "Upstream watches at a time for clients that start before the history window",
    ),
    one(
        "upstream-keepalive-interval",
        "DURATION",
        Upstream,
        "Pause between pings to the upstream; at least etcd's --grpc-keepalive-min-time, 5s unless set",
    ),
    one(
        "upstream-keepalive-timeout",
        "DURATION",
        Upstream,
        "How long a ping may go unanswered before the connection is given up",
    ),
    one("listen", "IP:PORT", Clients, "Where etcd clients connect (gRPC and HTTP)"),
    one("admin-listen", "IP:PORT", Clients, "Where metrics and health are served (HTTP)"),
    unset(
        one(
            "advertise-client-url",
            "URL",
            Clients,
            "Client URL told in MemberList, so that clients with AutoSync stay here",
        ),
        "none, the members' own",
    ),
    one("max-request-bytes", "SIZE", Clients, "Largest request"),
    one("max-response-bytes", "SIZE", Clients, "Largest answer, or \"unlimited\""),
    one("grpc-keepalive-interval", "DURATION", Clients, "Silence on a client connection before it is pinged"),
    one("grpc-keepalive-timeout", "DURATION", Clients, "How long a client's answer to a ping may take"),
    one("shutdown-grace", "DURATION", Clients, "How long calls may go on after SIGTERM or SIGINT"),
    many(unset(
        one("prefixes", "PREFIX,…", Cache, "Cache only keys that begin so; everything else is forwarded"),
        "none, cache the whole keyspace",
    )),
    one(
        "cache-bytes",
        "SIZE",
        Cache,
        "Memory for keys and values; past it the cache is dropped and reads are forwarded",
    ),
    one(
        "history-bytes",
        "SIZE",
        Cache,
        "Memory for past revisions and what they replaced, from which watches resume and old revisions are read",
    ),
    one("history-age", "DURATION", Cache, "Past revisions older than this are dropped"),
    one("progress-interval", "DURATION", Cache, "Pause between progress notifications on a quiet watch"),
    one("check-interval", "DURATION", Cache, "Pause between comparisons of the cache with the upstream; 0 is never"),
    unset(one("data-dir", "DIR", EmbeddedStore, "Directory of the embedded store"), DEFAULT_DATA_DIR),
    unset(one("quota-backend-bytes", "SIZE", EmbeddedStore, "Size at which writes are refused with NOSPACE"), "2GiB"),
    unset(
        one(
            "auto-compaction-mode",
            "MODE",
            EmbeddedStore,
            "What the retention means: periodic (time) or revision (count)",
        ),
        "periodic",
    ),
    unset(
        one(
            "auto-compaction-retention",
            "KEEP",
            EmbeddedStore,
            "History to keep: a duration or a number of hours when periodic, a count of revisions otherwise; 0 is all",
        ),
        "0",
    ),
    unset(
        one(
            "worker-threads",
            "COUNT",
            Process,
            "Threads that serve; fewer make writes and watches cheaper, more make pages cheaper and carry more reads",
        ),
        "half of the cores, at least 1",
    ),
    one(
        "busy-poll",
        "DURATION",
        Process,
        "How long a single serving thread keeps awake for the answer to a lone forwarded call; 0 is not at all",
    ),
    one(
        "log-level",
        "LEVEL",
        Logs,
        "off, error, warn, info, debug or trace, or directives like info,millpond::feed=debug",
    ),
    one("log-format", "FORMAT", Logs, "text or json, on standard error"),
];

/// The setting of that name.
pub fn find(name: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.name == name)
}

/// The setting whose name is nearest to a mistyped one, if any is near.
pub fn similar(name: &str) -> Option<&'static str> {
    let name = name.to_lowercase().replace('_', "-");
    let nearest = SETTINGS.iter().map(|setting| (distance(&name, setting.name), setting.name)).min()?;
    (nearest.0 <= 1 + nearest.1.len() / 5).then_some(nearest.1)
}

/// Levenshtein distance in bytes.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{super::units::format_size, *};

    #[test]
    fn the_table_and_the_fields_are_the_same_settings() {
        let full = Config {
            advertise_client_url: Some("http://a:1".into()),
            data_dir: Some("d".into()),
            quota_backend_bytes: Some(1),
            auto_compaction_mode: Some("revision".into()),
            auto_compaction_retention: Some("1".into()),
            worker_threads: Some(1),
            ..Config::default()
        };
        let fields = serde_json::to_value(full).unwrap();
        let fields: BTreeSet<&str> = fields.as_object().unwrap().keys().map(String::as_str).collect();
        let rows: BTreeSet<&str> = SETTINGS.iter().map(|setting| setting.name).collect();
        assert_eq!(fields, rows);
        assert_eq!(rows.len(), SETTINGS.len());
    }

    #[test]
    fn every_setting_says_its_default() {
        assert!(SETTINGS.iter().all(|setting| !setting.default_text().is_empty()));
        assert_eq!(find("max-request-bytes").map(Setting::default_text).as_deref(), Some("1.5MiB"));
        assert_eq!(find("max-response-bytes").map(Setting::default_text).as_deref(), Some("unlimited"));
        let quota = format_size(Config::default().quota_bytes());
        assert_eq!(find("quota-backend-bytes").map(Setting::default_text), Some(quota));
    }

    #[test]
    fn a_mistyped_name_finds_its_setting() {
        assert_eq!(similar("history_byte"), Some("history-bytes"));
        assert_eq!(similar("endpoint"), Some("endpoints"));
        assert_eq!(similar("colour"), None);
    }
}
