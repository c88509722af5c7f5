//! Unit tests of the private items of `src/server/log_shares.rs`.

use std::net::Ipv4Addr;

use super::*;

#[test]
fn all_clients_together_log_2000_sessions_and_2000_failed_logins_in_a_second() {
    let mut shares = Shares::new(Instant::now());
    let mut admitted = |topic, clients: u32| {
        let client = |n| Some(ClientKey::new(Some(Ipv4Addr::from_bits(n).into())));
        let lines = (1..=clients).flat_map(|n| [client(n); 30]);
        lines.filter(|client| shares.admit(topic, *client)).count()
    };
    assert_eq!(admitted(Topic::Session, 50), 50 * 20);
    assert_eq!(admitted(Topic::Session, 150), 1000);
    assert_eq!(admitted(Topic::Login, 150), 2000, "sessions hide no failed login");
    let left_out: Vec<u32> = shares.restart(Instant::now()).into_values().map(|(_, left_out)| left_out).collect();
    assert_eq!(left_out.iter().sum::<u32>(), (50 + 150 + 150) * 30 - 4000);
    assert!(left_out.len() <= 2 * 101, "the lines with these numbers are limited too: {}", left_out.len());
    assert!(shares.admit(Topic::Session, None), "in the next second");
}
