//! Unit tests of the private items of `src/gssapi/layout.rs`.

use super::*;

#[test]
fn duplicate_outweighs_other_orders() {
    let table = [
        (0, TokenOrder::Next),
        (GSS_S_CONTINUE_NEEDED, TokenOrder::Next),
        (GSS_S_GAP_TOKEN, TokenOrder::OutOfOrder),
        (GSS_S_UNSEQ_TOKEN, TokenOrder::OutOfOrder),
        (GSS_S_OLD_TOKEN, TokenOrder::Duplicate),
        (GSS_S_DUPLICATE_TOKEN | GSS_S_UNSEQ_TOKEN, TokenOrder::Duplicate),
    ];
    for (major, order) in table {
        assert_eq!(token_order(major), order, "{major}");
    }
}

#[test]
fn error_text_is_that_of_the_status_with_the_reason() {
    let text = |major, minor, minor_text: &str| error_text(major, "major".into(), minor, minor_text.into());
    assert_eq!(text(7 << 16, 0, "minor"), "major");
    assert_eq!(text(7 << 16, 1, "Success"), "major");
    assert_eq!(text(7 << 16, 1, "minor"), "major: minor");
    assert_eq!(text(GSS_S_FAILURE, 1, "minor"), "minor");
}

#[test]
fn one_line_has_no_control_characters() {
    assert_eq!(one_line(" a\nb\t\u{1b}[1m  c\0"), "a b [1m c");
}
