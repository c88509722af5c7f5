//! Chains of s5 proxies: each hop has its own security context, within that of the previous hop.

use crate::support::realm::Realm;
use crate::support::scripted::{RunningProgram, text};
use crate::support::{Server, V4, echo_server, run, s5, temp_dir, udp_echo_server};
use crate::{
    ALICE, LEVELS, LONG_TIMEOUT, assert_fails_with, bytes, client, path, realm, serve, serve_at, start, stdout, url,
    wait_session,
};

/// Levels that the two hops grant.
const LEVEL_PAIRS: [[&str; 2]; 4] = [
    ["confidentiality", "integrity"],
    ["integrity", "confidentiality"],
    ["none", "confidentiality"],
    ["confidentiality", "none"],
];

/// Starts a server in the realm that requires the password of bob.
fn serve_bob(realm: &Realm, dir: &std::path::Path) -> Server {
    let users = path(&dir.join("users"));
    stdout(s5().args(["serve", "--users", &users, "--add-user", "bob"]), b"secret\n");
    start(realm, &["--users", &users])
}

/// Returns a client command in the realm without `--auth`.
fn client_with_default_auth(realm: &Realm, mode: &str, proxy: &str, args: &[&str]) -> std::process::Command {
    let mut command = s5();
    realm.env(command.args([mode, "-x", proxy]).args(args));
    command
}

#[test]
fn each_hop_of_a_chain_has_its_own_context() {
    let Some(realm) = realm() else { return };
    let (data, echo) = (bytes(300_000), echo_server().to_string());
    for levels in LEVEL_PAIRS {
        // The client requests the strongest level; each hop grants its own.
        let [first, second] = levels.map(|level| serve_at(&realm, level));
        let hops = format!("{},{}", url(&first), url(&second));
        let args = ["--gssapi-min", "none", &echo];
        let received = stdout(&mut client(&realm, "connect", &hops, &args), &data);
        assert!(received == data, "{levels:?}: {} bytes", received.len());
        wait_session(&first, &[ALICE, &format!("dst=\"{}\"", url(&second)), "rep=0"]);
        wait_session(&second, &[ALICE, &format!("dst=\"{echo}\""), "rep=0"]);
    }
}

#[test]
fn datagrams_are_wrapped_for_each_hop_of_a_chain() {
    let Some(realm) = realm() else { return };
    let target = udp_echo_server(V4).to_string();
    for levels in LEVEL_PAIRS {
        let [first, second] = levels.map(|level| serve_at(&realm, level));
        let hops = format!("{},{}", url(&first), url(&second));
        let mut client = RunningProgram::start(&mut client(&realm, "udp", &hops, &["--gssapi-min", "none", &target]));
        let mut expected = Vec::new();
        // The last one is sent in fragments.
        for length in [5, 1472, 60_000, 65_400] {
            let line = [vec![b'x'; length], b"\n".to_vec()].concat();
            client.write(&line);
            expected.extend(line);
            let all = client.stdout(|all| all.len() >= expected.len());
            assert!(all == expected, "{levels:?}: {length} bytes");
        }
    }
}

#[test]
fn bind_works_through_a_chain() {
    let Some(realm) = realm() else { return };
    let [first, second] = ["integrity", "confidentiality"].map(|level| serve_at(&realm, level));
    let hops = format!("{},{}", url(&first), url(&second));
    let mut client = RunningProgram::start(&mut client(&realm, "bind", &hops, &[]));
    let stderr = client.stderr(|stderr| stderr.contains("bound ") && stderr.ends_with('\n'));
    let port = stderr.trim().rsplit_once(':').expect("an address").1.parse::<u16>().expect("a port");
    let mut peer = std::net::TcpStream::connect((V4, port)).expect("the second hop listens");
    std::io::Write::write_all(&mut peer, b"hello").expect("sent");
    drop(peer);
    client.stdout(|bytes| bytes == b"hello");
    client.close_stdin();
    assert!(client.wait_exit(crate::support::TIMEOUT).0.success());
}

#[test]
fn hops_can_require_different_logins() {
    let Some(realm) = realm() else { return };
    let dir = temp_dir();
    let (kerberos, bob) = (serve(&realm, &[]), serve_bob(&realm, dir.path()));
    let (echo, with_bob) = (echo_server().to_string(), format!("bob:secret@{}", url(&bob)));
    for hops in [format!("{},{with_bob}", url(&kerberos)), format!("{with_bob},{}", url(&kerberos))] {
        assert_eq!(
            stdout(&mut client_with_default_auth(&realm, "connect", &hops, &[&echo]), b"hello"),
            b"hello",
            "{hops}"
        );
    }
    let udp = udp_echo_server(V4).to_string();
    for hops in [format!("{},{with_bob}", url(&kerberos)), format!("{with_bob},{}", url(&kerberos))] {
        let mut client = RunningProgram::start(&mut client_with_default_auth(&realm, "udp", &hops, &[&udp]));
        client.write(b"hello\n");
        client.stdout(|all| all == b"hello\n");
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
        let mut plain = s5();
        let received = stdout(plain.args(["connect", "-x", &url(&server), &echo]), &data);
        assert!(received == data, "{level}: {} bytes", received.len());
        wait_session(&hop, &[ALICE, "command=connect", "rep=0"]);
        let mut client = RunningProgram::start(s5().args(["udp", "-x", &url(&server), &udp]));
        // The last two need fragments, but only because the connection to the hop is protected.
        for length in [5, 65_433, 65_490] {
            let line = [vec![b'x'; length], b"\n".to_vec()].concat();
            client.write(&line);
            client.stdout(|all| all.ends_with(&line));
        }
        drop(client);
        wait_session(&hop, &[ALICE, "command=udp", "rep=0"]);
    }
}

#[test]
fn server_protects_client_and_hop_connections() {
    let Some(realm) = realm() else { return };
    let (echo, udp, data) = (echo_server().to_string(), udp_echo_server(V4).to_string(), bytes(300_000));
    let hop = serve_at(&realm, "confidentiality");
    let server = serve(&realm, &["--via", &url(&hop)]);
    let received = stdout(&mut client(&realm, "connect", &url(&server), &[&echo]), &data);
    assert!(received == data, "{} bytes", received.len());
    let mut client = RunningProgram::start(&mut client(&realm, "udp", &url(&server), &[&udp]));
    client.write(b"hello\n");
    client.stdout(|all| all == b"hello\n");
}

#[test]
fn server_without_ticket_replies_01_and_does_not_connect_directly() {
    let Some(realm) = realm() else { return };
    let (hop, echo) = (serve(&realm, &[]), echo_server().to_string());
    let mut command = s5();
    realm.env(command.args(["serve", "--listen", "127.0.0.1:0", "--via", &url(&hop)]));
    command.env("KRB5CCNAME", format!("FILE:{}", realm.file("no.ccache").display()));
    let server = Server::start_with(&mut command, 1);
    let output = run(s5().args(["connect", "-x", &url(&server), &echo]), b"", LONG_TIMEOUT);
    assert_fails_with(&output, 101, &["REP 1"]);
    let log = server.wait_log(|log| log.contains("rep=1"));
    assert!(log.contains("no acceptable authentication method"), "{log}");
    assert!(!text(&output.stdout).contains("hello"));
}
