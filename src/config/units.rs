//! Sizes and durations as people write them: `64MiB`, `1.5GB`, `10m`, `1h30m`.

use std::time::Duration;

/// Longer than any sensible setting, short enough that adding it to a clock cannot overflow.
const LONGEST: Duration = Duration::from_secs(10 * 366 * 24 * 60 * 60);

/// Binary units, largest first, for printing.
const BINARY: [(&str, u64); 4] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

/// Reads a size in bytes: a number, with or without a decimal part and a unit (`B`, `kB`, `KiB`, … `TiB`; `Ki` as in
/// Kubernetes). The error says what is wrong with the text.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.' && c != '_').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let size = unit_factor(unit.trim()).and_then(|factor| scale(number, factor));
    size.ok_or_else(|| format!("{text:?} is not a size in bytes; write it like 64MiB, 1.5GB or 1048576"))
}

fn unit_factor(unit: &str) -> Option<u64> {
    Some(match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" => 1_000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "t" | "tb" => 1_000_000_000_000,
        "ki" | "kib" => 1 << 10,
        "mi" | "mib" => 1 << 20,
        "gi" | "gib" => 1 << 30,
        "ti" | "tib" => 1 << 40,
        _ => return None,
    })
}

/// `number` (decimal digits with at most one point) times `factor`, rounded down; None when unreadable or above `i64::MAX`,
/// the largest number that TOML can hold.
fn scale(number: &str, factor: u64) -> Option<u64> {
    let number = number.replace('_', "");
    let (whole, fraction) = number.split_once('.').unwrap_or((&number, ""));
    if whole.is_empty() || fraction.len() > 9 || fraction.contains('.') {
        return None;
    }
    let whole = u128::from(whole.parse::<u64>().ok()?) * u128::from(factor);
    let part = if fraction.is_empty() { 0 } else { u128::from(fraction.parse::<u64>().ok()?) };
    let part = part * u128::from(factor) / 10u128.pow(fraction.len() as u32);
    u64::try_from(whole + part).ok().filter(|&bytes| i64::try_from(bytes).is_ok())
}

/// Prints a size so that [`parse_size`] reads exactly the same number back.
pub fn format_size(bytes: u64) -> String {
    for (name, factor) in BINARY {
        let thousandths = u128::from(bytes) * 1000;
        if bytes >= factor && thousandths % u128::from(factor) == 0 {
            let value = thousandths / u128::from(factor);
            let text = format!("{}.{:03}", value / 1000, value % 1000);
            return format!("{}{name}", text.trim_end_matches('0').trim_end_matches('.'));
        }
    }
    bytes.to_string()
}

/// Reads a duration such as `500ms`, `10m` or `1h30m`; `0` needs no unit. The error says what is wrong with the text.
pub fn parse_span(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let span = humantime::parse_duration(text)
        .map_err(|_| format!("{text:?} is not a duration; write it like 500ms, 10m or 1h30m"))?;
    if span > LONGEST {
        return Err(format!("{text:?} is longer than ten years"));
    }
    Ok(span)
}

/// Prints a duration so that [`parse_span`] reads exactly the same back.
pub fn format_span(span: Duration) -> String {
    if span.is_zero() { "0".to_owned() } else { humantime::format_duration(span).to_string().replace(' ', "") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_read_in_binary_and_decimal_units() {
        assert_eq!(parse_size("64MiB"), Ok(64 << 20));
        assert_eq!(parse_size("1.5MiB"), Ok(3 << 19));
        assert_eq!(parse_size("1GB"), Ok(1_000_000_000));
        assert_eq!(parse_size("2Gi"), Ok(2 << 30));
        assert_eq!(parse_size(" 1_000 kB "), Ok(1_000_000));
        assert_eq!(parse_size("12"), Ok(12));
    }

    #[test]
    fn unreadable_sizes_are_refused() {
        for text in ["", "MiB", "64XB", "-1", "1.2.3MiB", "1.MiBs", "99999999999TiB", "18446744073709551615", "."] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_are_read_and_bounded() {
        assert_eq!(parse_span("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_span("0"), Ok(Duration::ZERO));
        for text in ["", "10", "-5s", "10 parsecs", "11years", "584542046091years"] {
            assert!(parse_span(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_printed_size_reads_back(bytes in 0..=i64::MAX as u64) {
            prop_assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
        }

        #[test]
        fn a_printed_duration_reads_back(micros in 0u64..300_000_000_000_000) {
            let span = Duration::from_micros(micros);
            prop_assert_eq!(parse_span(&format_span(span)), Ok(span));
        }

        #[test]
        fn no_text_makes_the_parsers_panic(text in "\\PC*") {
            let _ = (parse_size(&text), parse_span(&text));
        }
    }
}
