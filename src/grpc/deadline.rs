//! How long a call may take, as the header `grpc-timeout` says it.

use std::time::Duration;

use http::{HeaderMap, HeaderName};

/// The header with the time that a call may take.
pub const TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// The time that the client gives the call; a header that cannot be read gives none.
pub fn deadline(headers: &HeaderMap) -> Option<Duration> {
    checked_deadline(headers).ok().flatten()
}

/// As [`deadline`], where a header that cannot be read is a mistake.
///
/// # Errors
/// What is wrong with it, in the words of Go's gRPC library.
pub fn checked_deadline(headers: &HeaderMap) -> Result<Option<Duration>, String> {
    let Some(value) = headers.get(TIMEOUT) else { return Ok(None) };
    parse(&String::from_utf8_lossy(value.as_bytes())).map(Some)
}

/// What the header says: at most eight digits and a unit.
fn parse(text: &str) -> Result<Duration, String> {
    match text.len() {
        0 | 1 => return Err(format!("transport: timeout string is too short: {text:?}")),
        2..=9 => {}
        _ => return Err(format!("transport: timeout string is too long: {text:?}")),
    }
    let (digits, unit) = text.split_at_checked(text.len() - 1).unwrap_or(("", ""));
    let in_unit: fn(u64) -> Duration = match unit {
        "H" => |hours| Duration::from_secs(hours * 3600),
        "M" => |minutes| Duration::from_secs(minutes * 60),
        "S" => Duration::from_secs,
        "m" => Duration::from_millis,
        "u" => Duration::from_micros,
        "n" => Duration::from_nanos,
        _ => return Err(format!("transport: timeout unit is not recognized: {text:?}")),
    };
    // Go reads no sign, Rust would.
    let number = digits.parse().ok().filter(|_| !digits.starts_with('+'));
    number.map(in_unit).ok_or_else(|| format!("strconv.ParseUint: parsing {digits:?}: invalid syntax"))
}

/// The header's value for a call of ours. It has room for eight digits, so the unit grows with the time.
pub fn timeout_value(deadline: Duration) -> String {
    match deadline.as_millis() {
        milliseconds if milliseconds < 100_000_000 => format!("{}m", milliseconds.max(1)),
        milliseconds => format!("{}S", (milliseconds / 1000).min(99_999_999)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_read_as_grpc_writes_them() {
        let read =
            |text: &str| deadline(&HeaderMap::from_iter([("grpc-timeout".parse().unwrap(), text.parse().unwrap())]));
        assert_eq!(read("5S"), Some(Duration::from_secs(5)));
        assert_eq!(read("5m"), Some(Duration::from_millis(5)));
        assert_eq!(read("2S"), Some(Duration::from_millis(2000)));
        assert_eq!(read("1M"), Some(Duration::from_millis(60_000)));
        assert_eq!(read("3000u"), Some(Duration::from_millis(3)));
        assert_eq!(read("1500m"), Some(Duration::from_millis(1500)));
        assert_eq!(read("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for bad in ["", "S", "5", "-5S", "5 S", "999999999S", "5X", "+5S"] {
            assert_eq!(read(bad), None, "{bad}");
        }
        assert_eq!(deadline(&HeaderMap::new()), None);
    }

    #[test]
    fn what_we_write_is_read_again() {
        let written = |deadline| parse(&timeout_value(deadline));
        for whole in [Duration::from_millis(1500), Duration::from_millis(99_999_999), Duration::from_secs(100_000)] {
            assert_eq!(written(whole), Ok(whole));
        }
        assert_eq!(written(Duration::ZERO), Ok(Duration::from_millis(1)));
        assert_eq!(written(Duration::MAX), Ok(Duration::from_secs(99_999_999)));
    }
}
