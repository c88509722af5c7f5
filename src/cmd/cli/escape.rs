//! Escapes of text from proxies, targets, clients and files: in messages, in the log and in JSON.

use std::io;

/// Escapes all characters that a terminal does not show as themselves: control characters, and those that are invisible
/// or change the direction of text.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_visible(c) { out.push(c) } else { out.extend(c.escape_default()) }
    }
    out
}

/// Returns true for letters, digits, punctuation and symbols of any script, and for the space.
pub(crate) fn is_visible(c: char) -> bool {
    match c {
        // Letters and a symbol that are blank: the fillers of Hangul, and the empty Braille pattern.
        '\u{115f}' | '\u{1160}' | '\u{3164}' | '\u{ffa0}' | '\u{2800}' => false,
        '"' | '\'' | '\\' => true,
        // Debug escapes controls, format characters, separators, and marks, of which many are parts of letters.
        c => c.is_alphanumeric() || c.escape_debug().len() == 1,
    }
}

/// Quotes a string for JSON. The reader of the object may be a terminal, so invisible characters are escaped too.
pub fn quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if is_visible(c) => out.push(c),
            c => out.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}"))),
        }
    }
    out + "\""
}

/// Changes system errors in a message to the style of s5: lower case, without the number that [`io::Error`] appends.
pub fn plain_os_errors(mut message: String) -> String {
    message = message.replace(" SUN_LEN", " 108 bytes");
    let after_number = message.split(" (os error ").skip(1);
    let numbers: Vec<i32> = after_number.filter_map(|text| text.split(')').next()?.parse().ok()).collect();
    numbers.into_iter().fold(message, |message, number| {
        let error = io::Error::from_raw_os_error(number).to_string();
        let text = error.trim_end_matches(&format!(" (os error {number})"));
        let (first, others) = text.split_at_checked(1).unwrap_or((text, ""));
        message.replace(&error, &(first.to_lowercase() + others))
    })
}
