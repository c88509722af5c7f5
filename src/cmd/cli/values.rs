//! Values of options: times, numbers and lists.

use std::str::FromStr;
use std::time::Duration;

/// Parses a time such as `10`, `2.5`, `500ms`, `10s`, `5m` or `2h`. The default unit is seconds.
pub(in crate::cmd) fn parse_duration(text: &str) -> Result<Duration, String> {
    let invalid = || "expected a time such as 10, 500ms, 5m or 2h, at most one year".to_owned();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text.get(digits.len()..).unwrap_or_default() {
        "" | "s" => Duration::from_secs(1),
        "ms" => Duration::from_millis(1),
        "m" => Duration::from_secs(60),
        "h" => Duration::from_secs(3600),
        _ => return Err(invalid()),
    };
    let time = parse_decimal(digits).and_then(|billionths| {
        // With integers: the parser for floating-point numbers would add much code to the binary.
        let nanos = unit.as_nanos().checked_mul(billionths)? / 1_000_000_000;
        u64::try_from(nanos).ok().map(Duration::from_nanos)
    });
    let time = time.filter(|time| *time <= MAX_DURATION);
    time.ok_or_else(invalid)
}

/// Parses a number greater than 0.
pub(in crate::cmd) fn parse_positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "expected a number greater than 0".into())
}

/// Parses a number of threads, or a port.
pub(in crate::cmd) fn parse_nonzero(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "expected a number from 1 to 65535".into())
}

/// Parses a comma-separated list of different values.
pub(in crate::cmd) fn parse_set<T: FromStr<Err = String> + PartialEq>(text: &str) -> Result<Vec<T>, String> {
    let mut set = Vec::new();
    for word in text.split(',') {
        let value = word.parse()?;
        if set.contains(&value) {
            return Err(format!("{word:?} is given twice"));
        }
        set.push(value);
    }
    Ok(set)
}

/// Parses a decimal number such as `2.5`. Returns it in billionths, rounded down.
fn parse_decimal(text: &str) -> Option<u128> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() && fraction.is_empty() || !is_number(whole) || !is_number(fraction) {
        return None;
    }
    let fraction: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    format!("{whole}{fraction}").parse().ok()
}

/// The longest time that an option accepts: one year.
const MAX_DURATION: Duration = Duration::from_secs(365 * 24 * 3600);

/// Parses a time greater than 0.
pub(in crate::cmd) fn parse_timeout(text: &str) -> Result<Duration, String> {
    parse_duration(text).and_then(|time| if time.is_zero() { Err("must be greater than 0".into()) } else { Ok(time) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_duration_defaults_to_seconds() {
        let table = [
            ("10", 10_000),
            ("2.5", 2500),
            ("0.25s", 250),
            (".5", 500),
            ("500ms", 500),
            ("10s", 10_000),
            ("5m", 300_000),
            ("2h", 7_200_000),
        ];
        for (text, millis) in table {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "-1", "1.2.3", ".", "1d", "x", "1e9999", "inf", "NaN", "99999999999", "ms"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        assert!(parse_timeout("0").is_err());
    }
}
