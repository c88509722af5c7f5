//! s5 client and server: UDP ASSOCIATE at each level. Each datagram is one frame.

use std::net::Ipv6Addr;

use crate::support::realm::Realm;
use crate::support::scripted::{RunningProgram, text};
use crate::support::{Server, V4, udp_echo_server};
use crate::{ALICE, LEVELS, client_at, realm, serve_at, url, wait_session};

/// Largest data that is not fragmented: 65507 bytes less the header for IPv4 and the overhead of each level (aes-sha1).
const MAX_UNFRAGMENTED: [usize; 3] = [65_497, 65_465, 65_433];

fn udp(realm: &Realm, server: &Server, level: &str, target: &str) -> RunningProgram {
    RunningProgram::start(&mut client_at(realm, "udp", &url(server), level, &["-w", "0", target]))
}

fn line(length: usize) -> Vec<u8> {
    let letters = (b'a'..=b'z').cycle().enumerate().map(|(i, letter)| letter ^ (u8::from(i % 7 == 0) << 5));
    letters.take(length).chain([b'\n']).collect()
}

#[test]
fn datagrams_of_all_sizes_pass_at_every_level() {
    let Some(realm) = realm() else { return };
    let target = udp_echo_server(V4).to_string();
    for (level, max) in LEVELS.into_iter().zip(MAX_UNFRAGMENTED) {
        let server = serve_at(&realm, level);
        let mut client = udp(&realm, &server, level, &target);
        let mut expected = Vec::new();
        // Longer data is fragmented in both directions.
        for length in [0, 1, 1472, 16_384, max, max + 1, 65_507] {
            client.write(&line(length));
            expected.extend(line(length));
            let all = client.stdout(|all| all.len() >= expected.len());
            assert!(all == expected, "{length} bytes at {level}");
        }
        client.close_stdin();
        let (status, _, stderr) = client.wait_exit(crate::support::TIMEOUT);
        assert!(status.success(), "{stderr}");
        let total = expected.len() - 7;
        wait_session(&server, &[ALICE, "command=udp", &format!("rep=0 up={total} down={total} ")]);
    }
}

#[test]
fn burst_of_datagrams_passes_at_every_level() {
    let Some(realm) = realm() else { return };
    let target = udp_echo_server(V4).to_string();
    for level in LEVELS {
        let server = serve_at(&realm, level);
        let lines: String = (0..100).map(|i| format!("datagram {i}\n")).collect();
        let mut client = udp(&realm, &server, level, &target);
        client.write(lines.as_bytes());
        let all = client.stdout(|all| all.len() >= lines.len());
        assert_eq!(text(&all), lines, "{level}");
    }
}

#[test]
fn udp_target_can_be_a_host_name() {
    let Some(realm) = realm() else { return };
    // The target listens on IPv4 and IPv6, because the server can use either address of the name.
    let port = udp_echo_server(Ipv6Addr::UNSPECIFIED.into()).port();
    for level in LEVELS {
        let server = serve_at(&realm, level);
        let target = format!("localhost:{port}");
        let mut client = udp(&realm, &server, level, &target);
        client.write(b"by name\n");
        client.stdout(|all| all == b"by name\n");
    }
}

#[test]
fn datagram_over_65507_bytes_is_refused() {
    let Some(realm) = realm() else { return };
    let server = serve_at(&realm, "confidentiality");
    let target = udp_echo_server(V4).to_string();
    let mut command = client_at(&realm, "udp", &url(&server), "confidentiality", &["-w", "0", &target]);
    let output = crate::support::run(&mut command, &line(65_508), crate::LONG_TIMEOUT);
    crate::assert_fails_with(&output, 55, &["65507"]);
}
