//! Unit tests of the private items of `src/net/resolve.rs`.

use super::*;

#[test]
fn host_names_may_have_underscores_letters_of_any_script_and_a_final_dot() {
    for name in ["localhost", "LOCALHOST.", "a-b.example", "_srv.example", "127.1", "bücher.example"] {
        assert!(is_host_name(name), "{name}");
    }
}
