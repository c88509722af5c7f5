//! Unit tests of the private items of `src/server/reply.rs`.

use super::*;

#[test]
fn dial_errors_of_this_machine_and_of_routers_have_their_rep() {
    let table = [
        (DialError::HostUnreachable, 4, 4),
        (DialError::FamilyUnavailable, 8, 4),
        (DialError::Denied, 2, 2),
        (DialError::ZoneRequired, 3, 3),
        (DialError::LocalResources, 1, 1),
    ];
    for (error, by_address, by_name) in table {
        assert_eq!([false, true].map(|is_name| rep_for(error, is_name).0), [by_address, by_name], "{error:?}");
    }
}
