//! s5 with s5: UDP ASSOCIATE at each level, one frame a datagram.

use std::net::Ipv6Addr;

use crate::common::{Server, udp_echo_server};
use crate::kit::V4;
use crate::kit::realm::Realm;
use crate::scripted::{RunningProgram, text};
use crate::{ALICE, LEVELS, client_at, realm, serve_at, session, url};

/// What is left of 65507 octets behind the header of an IPv4 target and what Kerberos adds at each level (aes-sha1).
const WHOLE: [usize; 3] = [65_497, 65_465, 65_433];

fn udp(realm: &Realm, server: &Server, level: &str, target: &str) -> RunningProgram {
    RunningProgram::start(&mut client_at(realm, "udp", &url(server), level, &["-w", "0", target]))
}

fn line(length: usize) -> Vec<u8> {
    let letters = (b'a'..=b'z').cycle().enumerate().map(|(i, letter)| letter ^ (u8::from(i % 7 == 0) << 5));
    letters.take(length).chain([b'\n']).collect()
}

#[test]
fn datagrams_of_every_size_come_back_at_every_level() {
    let Some(realm) = realm() else { return };
    let target = udp_echo_server(V4).to_string();
    for (level, whole) in LEVELS.into_iter().zip(WHOLE) {
        let server = serve_at(&realm, level);
        let mut client = udp(&realm, &server, level, &target);
        let mut expected = Vec::new();
        // From `whole + 1` on in fragments, both ways.
        for length in [0, 1, 1472, 16_384, whole, whole + 1, 65_507] {
            client.write(&line(length));
            expected.extend(line(length));
            let all = client.stdout(|all| all.len() >= expected.len());
            assert!(all == expected, "{length} octets at {level}");
        }
        client.close_stdin();
        let (status, _, said) = client.wait_exit(crate::common::TIMEOUT);
        assert!(status.success(), "{said}");
        let total = expected.len() - 7;
        session(&server, &[ALICE, "command=udp", &format!("rep=0 up={total} down={total} ")]);
    }
}

#[test]
fn many_datagrams_can_be_under_way() {
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
fn targets_may_have_names() {
    let Some(realm) = realm() else { return };
    // On both families, for whichever address of the name the server takes.
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
fn what_udp_does_not_carry_is_refused() {
    let Some(realm) = realm() else { return };
    let server = serve_at(&realm, "confidentiality");
    let target = udp_echo_server(V4).to_string();
    let mut command = client_at(&realm, "udp", &url(&server), "confidentiality", &["-w", "0", &target]);
    let output = crate::common::run(&mut command, &line(65_508), crate::LONG);
    crate::assert_says(&output, 55, &["65507"]);
}
