//! The lines of the log: logfmt, and JSON with the same keys.

use super::escape::quote;

/// Returns fields in logfmt as a JSON object. Values without quotes that are numbers are numbers. A value that is not
/// UTF-8 keeps the escapes of logfmt.
pub(super) fn to_json(fields: &str) -> String {
    let (mut members, mut rest) = (Vec::new(), fields);
    while let Ok(Some((_, key, Value { bytes, is_quoted }, next))) = next_field(rest.trim_start()) {
        rest = next;
        let text = String::from_utf8(bytes).unwrap_or_else(|error| error.as_bytes().escape_ascii().to_string());
        let is_number = !is_quoted && is_number(&text);
        members.push(format!("{}:{}", quote(key), if is_number { text } else { quote(&text) }));
    }
    // Not reached as long as each line of the log is logfmt.
    members.extend(Some(rest.trim()).filter(|rest| !rest.is_empty()).map(|rest| format!("\"text\":{}", quote(rest))));
    format!("{{{}}}", members.join(","))
}

/// Returns true for digits with at most one point. An IPv4 address has three.
// Not by `f64::from_str`, which takes 22 KB.
fn is_number(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_digit())
        && text.ends_with(|c: char| c.is_ascii_digit())
        && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
        && text.bytes().filter(|byte| *byte == b'.').count() <= 1
}

/// The value of a field.
pub(in crate::cmd) struct Value {
    pub(in crate::cmd) bytes: Vec<u8>,
    pub(in crate::cmd) is_quoted: bool,
}

/// Splits the first field off. Returns its text, key and value, and the rest.
pub(in crate::cmd) fn next_field(text: &str) -> Result<Option<(&str, &str, Value, &str)>, String> {
    let Some(word) = text.split_whitespace().next() else { return Ok(None) };
    let (key, _) = word.split_once('=').filter(|_| !word.starts_with('{')).ok_or_else(|| match word {
        "allow" | "deny" => format!("{word:?} begins a rule, but a request has only key=value"),
        _ if word.starts_with('{') => "a line in JSON is not supported (write its fields as key=value)".into(),
        _ => format!("expected key=value, such as to=example.org:80, found {word:?}"),
    })?;
    let after = text.get(key.len() + 1..).unwrap_or_default();
    let Some(quoted) = after.strip_prefix('"') else {
        let (_, rest) = text.split_at(word.len());
        let bytes = word.get(key.len() + 1..).unwrap_or_default().into();
        return Ok(Some((word, key, Value { bytes, is_quoted: false }, rest)));
    };
    let (bytes, rest) = unquote(quoted).ok_or_else(|| format!("{word:?}: invalid escape, or no closing quote"))?;
    Ok(Some((word, key, Value { bytes, is_quoted: true }, rest)))
}

/// Decodes a value of the log up to its closing quote. Returns it and the rest.
fn unquote(text: &str) -> Option<(Vec<u8>, &str)> {
    let (mut bytes, mut rest) = (Vec::new(), text);
    loop {
        let (plain, special) = rest.split_at(rest.find(['"', '\\'])?);
        bytes.extend(plain.bytes());
        if let Some(after) = special.strip_prefix('"') {
            return Some((bytes, after));
        }
        let mut chars = special.get(1..)?.chars();
        match chars.next()? {
            'n' => bytes.push(b'\n'),
            'r' => bytes.push(b'\r'),
            't' => bytes.push(b'\t'),
            '0' => bytes.push(0),
            'x' => {
                bytes.push(u8::from_str_radix(chars.as_str().get(..2)?, 16).ok()?);
                chars.nth(1);
            }
            'u' => {
                let (digits, after) = chars.as_str().strip_prefix('{')?.split_once('}')?;
                let decoded = char::from_u32(u32::from_str_radix(digits, 16).ok()?)?;
                bytes.extend(decoded.encode_utf8(&mut [0; 4]).bytes());
                chars = after.chars();
            }
            other => bytes.extend(other.encode_utf8(&mut [0; 4]).bytes()),
        }
        rest = chars.as_str();
    }
}
