//! s5 client and server: UDP ASSOCIATE at each level. Each datagram is one frame.

use crate::*;

/// Largest data that is not fragmented: 65507 bytes less the header for IPv4 and the overhead of each level (aes-sha1).
const MAX_UNFRAGMENTED: [usize; 3] = [65_497, 65_465, 65_433];

#[test]
fn datagrams_of_all_sizes_and_in_bursts_pass_at_every_level() {
    let Some(realm) = realm() else { return };
    let target = udp_echo_server(V4).to_string();
    // The target listens on IPv4 and IPv6, because the server can use either address of the name.
    let named = format!("localhost:{}", udp_echo_server(Ipv6Addr::UNSPECIFIED.into()).port());
    for (level, max) in LEVELS.into_iter().zip(MAX_UNFRAGMENTED) {
        let server = serve_at(&realm, level);
        let udp = |target| client_at(&realm, "udp", &url(&server), level, &["-w", "0", target]);
        // Longer data is fragmented in both directions.
        let lengths = [0, 1, 1472, 16_384, max, max + 1, 65_507];
        let mut client = exchange_datagrams(&mut udp(&target), &lengths);
        client.close_stdin();
        let (status, _, stderr) = client.wait_exit(TIMEOUT);
        assert!(status.success(), "{stderr}");
        let total: usize = lengths.iter().sum();
        wait_session(&server, &[ALICE, "command=udp", &format!("rep=0 targets=1 up={total} down={total} ")]);

        let mut client = RunningProgram::start(&mut udp(&target));
        let burst: String = (0..100).map(|i| format!("datagram {i}\n")).collect();
        client.write(burst.as_bytes());
        assert_eq!(text(&client.stdout(|all| all.len() >= burst.len())), burst, "{level}");
        exchange_datagrams(&mut udp(&named), &[7]);
    }
}

#[test]
fn datagram_over_65507_bytes_is_refused() {
    let Some(realm) = realm() else { return };
    let server = serve_at(&realm, "confidentiality");
    let target = udp_echo_server(V4).to_string();
    let mut command = client_at(&realm, "udp", &url(&server), "confidentiality", &["-w", "0", &target]);
    let output = run(&mut command, &[[b'x'; 65_508].as_slice(), b"\n"].concat(), LONG_TIMEOUT);
    assert_fails_with(&output, 55, &["65507"]);
}
