//! Reports how many tests this run of `cargo test` has skipped because a program is missing. Cargo runs test files in
//! alphabetical order, so the name makes this file the last one.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;

#[test]
fn skipped_tests_are_reported() {
    let file = support::skipped_tests_file();
    let text = std::fs::read_to_string(&file).unwrap_or_default();
    let mut tests: BTreeSet<&str> = BTreeSet::new();
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    for (test, reason) in text.lines().filter_map(|line| line.split_once(": ")) {
        if tests.insert(test) {
            *reasons.entry(reason).or_default() += 1;
        }
    }
    let mut report = format!("{} tests were skipped in this run\n", tests.len());
    for (reason, count) in reasons {
        report += &format!("{count:5} {reason}\n");
    }
    // The test harness captures the output of `print!` in passing tests.
    std::io::stderr().write_all(report.as_bytes()).expect("the report is printed");
    let _ = std::fs::remove_file(file);
}
