//! Values of options as users write them: times, rates, numbers and lists.

use std::str::FromStr;
use std::time::Duration;

/// The longest time that an option accepts: one year.
const MAX_DURATION: Duration = Duration::from_secs(365 * 24 * 3600);

/// Units of time, in nanoseconds. A number without a unit is in seconds.
const TIME_UNITS: [(&str, u64); 5] =
    [("", 1_000_000_000), ("ms", 1_000_000), ("s", 1_000_000_000), ("m", 60_000_000_000), ("h", 3_600_000_000_000)];
/// Units of rates, in bytes per second.
const RATE_UNITS: [(&str, u64); 4] = [("", 1), ("k", 1_000), ("M", 1_000_000), ("G", 1_000_000_000)];

/// Parses a time such as `10`, `2.5`, `500ms`, `10s`, `1m30s` or `2h`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let time = parse_time(text).map(Duration::from_nanos).filter(|time| *time <= MAX_DURATION);
    time.ok_or_else(|| "expected a time such as 10, 500ms, 1m30s or 2h, at most one year".into())
}

/// Parses a sum of times. If there are several, each has a unit. Returns nanoseconds.
fn parse_time(text: &str) -> Option<u64> {
    let is_letter = |c: char| c.is_ascii_alphabetic();
    let (mut rest, mut sum) = (text, 0_u64);
    loop {
        let unit = rest.trim_start_matches(|c| !is_letter(c));
        let next = unit.trim_start_matches(is_letter);
        let part = rest.strip_suffix(next)?;
        sum = sum.checked_add(parse_quantity(part, &TIME_UNITS)?)?;
        if next.is_empty() {
            return Some(sum).filter(|_| part == text || !unit.is_empty());
        }
        rest = next;
    }
}

pub(crate) fn parse_timeout(text: &str) -> Result<Duration, String> {
    parse_duration(text).and_then(|time| if time.is_zero() { Err("must be greater than 0".into()) } else { Ok(time) })
}

/// Parses bytes per second, such as `1500`, `64k` or `10M`.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    let rate = parse_quantity(text, &RATE_UNITS).filter(|rate| *rate > 0);
    rate.ok_or_else(|| "expected bytes per second, such as 1500 or 10M".into())
}

/// Parses a decimal number with a unit. Returns the number times the unit, rounded down.
fn parse_quantity(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let (_, unit) = units.iter().find(|(name, _)| text.strip_prefix(number) == Some(name))?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if number.is_empty() || number == "." || !whole.bytes().chain(fraction.bytes()).all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // With integers: the parser for floating-point numbers would add much code to the binary.
    let fraction: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let billionths: u128 = format!("{whole}{fraction}").parse().ok()?;
    u64::try_from(billionths.checked_mul((*unit).into())? / 1_000_000_000).ok()
}

/// Parses the address to send datagrams to: that in the reply of a proxy, or with true that of the proxy.
pub(crate) fn parse_udp_relay(text: &str) -> Result<bool, String> {
    parse_choice(text, [("reply", false), ("proxy", true)])
}

pub(crate) fn parse_choice<T>(text: &str, choices: [(&str, T); 2]) -> Result<T, String> {
    let expected = format!("expected {} or {}", choices[0].0, choices[1].0);
    choices.into_iter().find(|(word, _)| *word == text).map(|(_, value)| value).ok_or(expected)
}

pub(crate) fn parse_positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "expected a number greater than 0".into())
}

pub(crate) fn parse_nonzero(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "expected a number from 1 to 65535".into())
}

pub(crate) fn parse_set<T: FromStr<Err = String> + PartialEq>(text: &str) -> Result<Vec<T>, String> {
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
