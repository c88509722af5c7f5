//! Chains of s5 proxies: each hop has its own security context, within that of the previous hop.

use crate::*;

/// Levels that the two hops grant.
const LEVEL_PAIRS: [[&str; 2]; 4] = [
    ["confidentiality", "integrity"],
    ["integrity", "confidentiality"],
    ["none", "confidentiality"],
    ["confidentiality", "none"],
];

#[test]
fn each_hop_of_a_chain_has_its_own_context() {
    let Some(realm) = realm() else { return };
    let (data, echo, udp) = (bytes(300_000), echo_server().to_string(), udp_echo_server(V4).to_string());
    for levels in LEVEL_PAIRS {
        // The client requests the strongest level; each hop grants its own.
        let [first, second] = levels.map(|level| serve_at(&realm, level));
        let hops = format!("{},{}", url(&first), url(&second));
        assert_echoes(&mut client(&realm, "connect", &hops, &["--gssapi-min", "none", &echo]), &data);
        wait_session(&first, &[ALICE, &format!("to=\"{}\"", url(&second)), "rep=0"]);
        wait_session(&second, &[ALICE, &format!("to=\"{echo}\""), "rep=0"]);
        // The last datagram is sent in fragments.
        let mut client = client(&realm, "udp", &hops, &["--gssapi-min", "none", &udp]);
        exchange_datagrams(&mut client, &[5, 1472, 60_000, 65_400]);
    }
}

#[test]
fn chain_through_full_sockets_delivers_the_end_of_a_message() {
    enter_namespace!("127.0.0.1 localhost\n", "");
    let Some(realm) = realm() else { return };
    // The sockets accept a part of each frame.
    for (name, sizes) in [("tcp_wmem", "4096 4096 4096"), ("tcp_rmem", "4096 4096 4096")] {
        fs::write(format!("/proc/sys/net/ipv4/{name}"), sizes).expect("a namespace of this test");
    }
    let [first, second] = ["integrity", "confidentiality"].map(|level| serve_at(&realm, level));
    let (hops, echo) = (format!("{},{}", url(&first), url(&second)), echo_server().to_string());
    let server = start(&realm, &["--via", &hops]);
    for mut command in
        [client(&realm, "connect", &hops, &[&echo]), any_client(&realm, "connect", &url(&server), &[&echo])]
    {
        let mut client = RunningProgram::start(&mut command);
        for length in (8_000..40_000).step_by(4_001) {
            // stdin stays open: no further data and no end follows the message.
            let (before, message) = (client.stdout_so_far().len(), bytes(length));
            client.write(&message);
            let all = client.stdout(|all| all.len() >= before + length);
            assert!(all[before..] == message, "{command:?}: {length} bytes");
        }
    }
}

#[test]
fn bind_works_through_a_chain() {
    let Some(realm) = realm() else { return };
    let [first, second] = ["integrity", "confidentiality"].map(|level| serve_at(&realm, level));
    let hops = format!("{},{}", url(&first), url(&second));
    let mut client = RunningProgram::start(&mut client(&realm, "bind", &hops, &[]));
    let mut peer = TcpStream::connect((V4, streams::reported_addr(&client, "bound ").port())).expect("it listens");
    peer.write_all(b"hello").expect("sent");
    drop(peer);
    client.stdout(|bytes| bytes == b"hello");
    client.close_stdin();
    assert!(client.wait_exit(TIMEOUT).0.success());
}

#[test]
fn hops_can_require_different_logins() {
    let Some(realm) = realm() else { return };
    let (_dir, users) = users_file(&[("bob", "secret")]);
    let (kerberos, bob) = (serve(&realm, &[]), start(&realm, &["--users", &users]));
    let (echo, udp) = (echo_server().to_string(), udp_echo_server(V4).to_string());
    let with_bob = format!("bob:secret@{}", url(&bob));
    for hops in [format!("{},{with_bob}", url(&kerberos)), format!("{with_bob},{}", url(&kerberos))] {
        assert_hello(&hello(&mut any_client(&realm, "connect", &hops, &[&echo])), &hops);
        exchange_datagrams(&mut any_client(&realm, "udp", &hops, &[&udp]), &[5]);
    }
    wait_session(&bob, &["user=\"bob\""]);
    wait_session(&kerberos, &[ALICE]);
}

#[test]
fn server_logs_in_to_hops_with_tickets_of_its_environment() {
    let Some(realm) = realm() else { return };
    let (echo, udp, data) = (echo_server().to_string(), udp_echo_server(V4).to_string(), bytes(300_000));
    for level in &LEVELS[1..] {
        let hop = serve_at(&realm, level);
        let server = start(&realm, &["--via", &url(&hop)]);
        assert_echoes(s5().args(["connect", "-x", &url(&server), &echo]), &data);
        wait_session(&hop, &[ALICE, "command=connect", "rep=0"]);
        // The last two need fragments, but only because the connection to the hop is protected.
        exchange_datagrams(s5().args(["udp", "-x", &url(&server), &udp]), &[5, 65_433, 65_490]);
        wait_session(&hop, &[ALICE, "command=udp", "rep=0"]);
    }
}

#[test]
fn server_protects_client_and_hop_connections() {
    let Some(realm) = realm() else { return };
    let (echo, udp) = (echo_server().to_string(), udp_echo_server(V4).to_string());
    let hop = serve_at(&realm, "confidentiality");
    let server = serve(&realm, &["--via", &url(&hop)]);
    assert_echoes(&mut client(&realm, "connect", &url(&server), &[&echo]), &bytes(300_000));
    exchange_datagrams(&mut client(&realm, "udp", &url(&server), &[&udp]), &[5]);
}

#[test]
fn server_without_ticket_replies_01_and_does_not_connect_directly() {
    let Some(realm) = realm() else { return };
    let (hop, echo) = (serve(&realm, &[]), echo_server().to_string());
    let mut command = s5();
    realm.env(command.args(["serve", "--listen", "127.0.0.1:0", "--via", &url(&hop)]));
    command.env("KRB5CCNAME", format!("FILE:{}", realm.file("no.ccache").display()));
    let server = Server::start_with(&mut command, 1);
    let output = hello(s5().args(["connect", "-x", &url(&server), &echo]));
    assert_fails_with(&output, 101, &["REP 1"]);
    let log = server.wait_log(|log| log.contains("rep=1"));
    assert!(log.contains("no acceptable authentication method"), "{log}");
    assert_eq!(output.stdout, b"");
}
