//! How each kind of value is read from text, numbers and lists, and printed again: serde `with` modules for [`super::Config`].

use std::{net::SocketAddr, path::PathBuf};

use http::uri::Authority;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

use super::units::{format_size, format_span, parse_size, parse_span};
use crate::upstream::{Endpoint, host_and_port};

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One readable line per event.
    Text,
    /// One JSON object per event.
    Json,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "text or a whole number that is not negative")]
enum Scalar {
    Number(u64),
    Text(String),
}

impl Scalar {
    fn text(self) -> String {
        match self {
            Self::Number(number) => number.to_string(),
            Self::Text(text) => text,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "text or a list of texts")]
enum List {
    One(String),
    Many(Vec<String>),
}

impl List {
    /// The items; a single text is split at commas.
    fn items(self) -> Vec<String> {
        match self {
            Self::One(text) => text.split(',').map(|item| item.trim().to_owned()).filter(|i| !i.is_empty()).collect(),
            Self::Many(items) => items,
        }
    }
}

fn read<'de, D: Deserializer<'de>, T>(from: D, parse: impl Fn(&str) -> Result<T, String>) -> Result<T, D::Error> {
    parse(&Scalar::deserialize(from)?.text()).map_err(D::Error::custom)
}

fn read_optional<'de, D: Deserializer<'de>, T>(
    from: D,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<Option<T>, D::Error> {
    let text = Scalar::deserialize(from)?.text();
    if text.is_empty() { Ok(None) } else { parse(&text).map(Some).map_err(D::Error::custom) }
}

macro_rules! scalar {
    ($(#[$doc:meta])* $name:ident: $kind:ty, $parse:expr, $print:expr) => {
        $(#[$doc])*
        pub mod $name {
            use super::*;

            #[allow(missing_docs)]
            pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<$kind, D::Error> {
                read(from, $parse)
            }

            #[allow(missing_docs)]
            pub fn serialize<S: Serializer>(value: &$kind, to: S) -> Result<S::Ok, S::Error> {
                let print: fn(&$kind) -> String = $print;
                to.serialize_str(&print(value))
            }
        }
    };
}

macro_rules! optional {
    ($(#[$doc:meta])* $name:ident: $kind:ty, $parse:expr, $print:expr) => {
        $(#[$doc])*
        pub mod $name {
            use super::*;

            #[allow(missing_docs)]
            pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<$kind>, D::Error> {
                read_optional(from, $parse)
            }

            #[allow(missing_docs)]
            pub fn serialize<S: Serializer>(value: &Option<$kind>, to: S) -> Result<S::Ok, S::Error> {
                let print: fn(&$kind) -> String = $print;
                to.serialize_str(&value.as_ref().map(print).unwrap_or_default())
            }
        }
    };
}

scalar!(
    /// A size in bytes, above zero.
    size: u64, |text| parse_size(text).and_then(above_zero), |bytes| format_size(*bytes));
scalar!(
    /// A size in bytes, or `unlimited`.
    limit: Option<u64>,
    |text| if text == "unlimited" { Ok(None) } else { parse_size(text).and_then(above_zero).map(Some) },
    |bytes| bytes.map_or_else(|| "unlimited".to_owned(), format_size));
scalar!(
    /// A duration.
    span: std::time::Duration, parse_span, |span| format_span(*span));
scalar!(
    /// An IP address and a port.
    address: SocketAddr, parse_address, SocketAddr::to_string);
scalar!(
    /// A log level, or directives as in `RUST_LOG`.
    log_level: String, parse_log_level, Clone::clone);
optional!(
    /// A size in bytes that may be unset; zero means the default.
    optional_size: u64, parse_size, |bytes| format_size(*bytes));
optional!(
    /// A path that may be unset.
    path: PathBuf, |text| Ok(PathBuf::from(text)), |path| path.display().to_string());
optional!(
    /// A word that may be unset.
    word: String, |text| Ok(text.to_owned()), Clone::clone);
optional!(
    /// A client URL that may be unset.
    url: String, parse_url, Clone::clone);

optional!(
    /// A number of threads that may be unset, at least one.
    threads: usize, parse_threads, usize::to_string);

/// A count of things, at least one.
pub mod count {
    use super::*;

    /// The largest count: what a semaphore can hold.
    const MOST: usize = tokio::sync::Semaphore::MAX_PERMITS;

    #[allow(missing_docs)]
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<usize, D::Error> {
        read(from, |text| parse_count(text, MOST))
    }

    #[allow(missing_docs)]
    pub fn serialize<S: Serializer>(count: &usize, to: S) -> Result<S::Ok, S::Error> {
        count.serialize(to)
    }
}

/// Endpoints as `host:port`, each once.
pub mod endpoints {
    use super::*;

    #[allow(missing_docs)]
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Authority>, D::Error> {
        let mut endpoints: Vec<Authority> = Vec::new();
        for item in List::deserialize(from)?.items() {
            let endpoint = parse_endpoint(&item).map_err(D::Error::custom)?;
            // Authorities are equal in any case of letters; what is written differently stays.
            if !endpoints.iter().any(|known| known.as_str() == endpoint.as_str()) {
                endpoints.push(endpoint);
            }
        }
        Ok(endpoints)
    }

    #[allow(missing_docs)]
    pub fn serialize<S: Serializer>(endpoints: &[Authority], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(endpoints.iter().map(Authority::as_str))
    }
}

/// Key prefixes, sorted, without those that another one covers.
pub mod prefixes {
    use super::*;

    #[allow(missing_docs)]
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
        Ok(merge(List::deserialize(from)?.items()))
    }

    #[allow(missing_docs)]
    pub fn serialize<S: Serializer>(prefixes: &[String], to: S) -> Result<S::Ok, S::Error> {
        prefixes.serialize(to)
    }

    /// Two prefixes are either disjoint or one covers the other, so dropping the covered ones loses nothing.
    fn merge(mut prefixes: Vec<String>) -> Vec<String> {
        prefixes.sort();
        prefixes.dedup_by(|next, kept| next.starts_with(kept.as_str()));
        prefixes.retain(|prefix| !prefix.is_empty());
        prefixes
    }
}

fn parse_count(text: &str, most: usize) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err(format!("{text:?} is not a whole number of at least 1")),
        Ok(count) if count > most => Err(format!("{text:?} is more than {most}")),
        Ok(count) => Ok(count),
    }
}

fn parse_threads(text: &str) -> Result<usize, String> {
    /// More than any machine has cores.
    const MOST: usize = 1024;
    parse_count(text, MOST)
}

fn above_zero(bytes: u64) -> Result<u64, String> {
    if bytes == 0 { Err("must be above 0".to_owned()) } else { Ok(bytes) }
}

/// Reads an address to listen on: `IP:port`, `localhost:port`, or `:port` for all interfaces.
pub fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let full = match text.split_once(':') {
        Some(("", port)) => format!("0.0.0.0:{port}"),
        Some(("localhost", port)) => format!("127.0.0.1:{port}"),
        _ => text.to_owned(),
    };
    full.parse()
        .map_err(|_| format!("{text:?} is not an address to listen on; write it like 127.0.0.1:2379 or [::1]:2379"))
}

/// Reads an endpoint, with or without `http://`, as `host:port`.
pub fn parse_endpoint(text: &str) -> Result<Authority, String> {
    let text = text.trim();
    match text.parse::<Endpoint>() {
        Ok(endpoint) => Ok(endpoint.authority().clone()),
        Err(_) if text.starts_with("https://") => {
            Err(format!("{text:?} asks for TLS, which is not supported yet; use http://"))
        }
        Err(_) => Err(format!("{text:?} is not an endpoint; write it like 127.0.0.1:2379 or http://etcd-0.etcd:2379")),
    }
}

fn parse_url(text: &str) -> Result<String, String> {
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    match rest.map(host_and_port) {
        Some(Ok(_)) => Ok(text.to_owned()),
        _ => Err(format!("{text:?} is not a client URL; write it like http://millpond.example:2379")),
    }
}

fn parse_log_level(text: &str) -> Result<String, String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let problem = || {
        format!(
            "{text:?} is not a level (off, error, warn, info, debug, trace) or a list like info,millpond::feed=debug"
        )
    };
    // The filter's own parser takes a bare word that is no level for a target with everything switched on, which hides typos.
    let bare = text.split(',').filter(|part| !part.contains(['=', '[']));
    if !bare.clone().all(|word| LEVELS.contains(&word.trim().to_ascii_lowercase().as_str())) {
        return Err(problem());
    }
    let filter = text.parse::<tracing_subscriber::filter::EnvFilter>();
    filter.map(|_| text.to_owned()).map_err(|_| problem())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_come_with_or_without_scheme() {
        for text in ["127.0.0.1:2379", "http://127.0.0.1:2379", "http://127.0.0.1:2379/"] {
            assert_eq!(parse_endpoint(text).unwrap().as_str(), "127.0.0.1:2379");
        }
        assert_eq!(parse_endpoint("[::1]:2379").unwrap().as_str(), "[::1]:2379");
        assert_eq!(parse_endpoint("etcd-0.etcd:2379").unwrap().as_str(), "etcd-0.etcd:2379");
    }

    #[test]
    fn what_is_no_endpoint_is_refused() {
        for text in [
            "",
            "etcd",
            "etcd:",
            "etcd:0",
            ":2379",
            "etcd:99999",
            "unix:///x",
            "https://etcd:2379",
            "a:1/x",
            "u@h:1",
            "a b:1",
        ] {
            assert!(parse_endpoint(text).is_err(), "{text}");
        }
    }

    #[test]
    fn listen_addresses_know_the_short_forms() {
        assert_eq!(parse_address(":2379"), Ok("0.0.0.0:2379".parse().unwrap()));
        assert_eq!(parse_address("localhost:1"), Ok("127.0.0.1:1".parse().unwrap()));
        assert_eq!(parse_address("[::1]:1"), Ok("[::1]:1".parse().unwrap()));
        for text in ["2379", "http://127.0.0.1:1", "host.example:1", "127.0.0.1:99999"] {
            assert!(parse_address(text).is_err(), "{text}");
        }
    }

    #[test]
    fn threads_are_at_least_one_and_not_absurdly_many() {
        assert_eq!((parse_threads("1"), parse_threads("1024")), (Ok(1), Ok(1024)));
        for text in ["", "0", "-1", "1025", "two"] {
            assert!(parse_threads(text).is_err(), "{text}");
        }
        assert!(crate::config::Config::default().worker_threads() >= 1);
    }

    #[test]
    fn log_levels_are_levels_or_directives() {
        for text in ["info", "DEBUG", "warn,millpond::feed=trace", "millpond[watch]=debug"] {
            assert!(parse_log_level(text).is_ok(), "{text}");
        }
        for text in ["", "inof", "millpond=loud", "info,"] {
            assert!(parse_log_level(text).is_err(), "{text}");
        }
    }

    #[derive(serde::Deserialize)]
    struct Prefixes {
        #[serde(with = "prefixes")]
        of: Vec<String>,
    }

    #[test]
    fn covered_prefixes_are_merged() {
        let read = |text: &str| toml::from_str::<Prefixes>(text).unwrap().of;
        assert_eq!(read("of = ['/b/', '/a', '/a/x', '/a']"), ["/a", "/b/"]);
        assert_eq!(read("of = ['/a', '']"), [""; 0]);
        assert_eq!(read("of = '/b, /a'"), ["/a", "/b"]);
    }
}
