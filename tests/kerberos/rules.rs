//! Policy rules for Kerberos logins, also after a reload.

use std::io::Write as _;
use std::net::TcpStream;

use crate::support::realm::Realm;
use crate::support::scripted::RunningProgram;
use crate::support::{Server, TIMEOUT, V4, echo_server, run, temp_dir, udp_echo_server, wait_until, write_file};
use crate::{ALICE, LONG_TIMEOUT, assert_fails_with, client, path, realm, serve, stdout, url, wait_session};

/// Runs `s5 connect` as alice or mallory at this level.
fn as_user(realm: &Realm, server: &Server, user: &str, level: &str, target: &str) -> std::process::Output {
    let ccache = path(&realm.file(if user == "alice" { "ccache" } else { "ccache.mallory" }));
    let args = ["--ccache", &ccache, "--gssapi-protection", level, target];
    run(&mut client(realm, "connect", &url(server), &args), b"hello", LONG_TIMEOUT)
}

#[test]
fn rules_match_user_method_and_protection() {
    let Some(realm) = realm() else { return };
    let echo = echo_server().to_string();
    let (yes, no) = (true, false);
    // Expected results: alice at confidentiality, alice at integrity, mallory at confidentiality.
    let table = [
        ("user=alice@S5.TEST", [yes, yes, no]),
        ("user=*@S5.TEST", [yes, yes, yes]),
        ("user=*@OTHER.TEST", [no, no, no]),
        ("user=alice", [no, no, no]),
        ("user=*", [yes, yes, yes]),
        ("method=gssapi", [yes, yes, yes]),
        ("method=password", [no, no, no]),
        ("protection=confidentiality", [yes, no, yes]),
        ("protection=integrity,confidentiality user=mallory@S5.TEST", [no, no, yes]),
        ("protection=none", [no, no, no]),
    ];
    for (rule, expected) in table {
        let server = serve(&realm, &["--allow", rule, "--deny", ""]);
        let cases = [("alice", "confidentiality"), ("alice", "integrity"), ("mallory", "confidentiality")];
        for ((user, level), expected) in cases.into_iter().zip(expected) {
            let output = as_user(&realm, &server, user, level, &echo);
            match expected {
                true => assert_eq!(output.stdout, b"hello", "{rule}: {user} at {level}"),
                false => {
                    assert_fails_with(&output, 102, &["REP 2"]);
                    wait_session(&server, &[&format!("user=\"{user}@S5.TEST\""), "rep=2", "denied"]);
                }
            }
        }
    }
}

#[test]
fn rules_apply_to_udp_and_bind() {
    let Some(realm) = realm() else { return };
    let (udp, mallory) = (udp_echo_server(V4).to_string(), path(&realm.file("ccache.mallory")));
    let server = serve(&realm, &["--allow", &format!("user={ALICE} protection=confidentiality"), "--deny", ""]);
    for mode in ["udp", "bind"] {
        for args in [&["--ccache", &*mallory][..], &["--gssapi-protection", "integrity"]] {
            let target = if mode == "udp" { &*udp } else { "127.0.0.1" };
            let output =
                run(&mut client(&realm, mode, &url(&server), &[args, &[target]].concat()), b"hello\n", LONG_TIMEOUT);
            assert_fails_with(&output, 102, &["REP 2"]);
        }
    }
    let mut client = RunningProgram::start(&mut client(&realm, "udp", &url(&server), &[&udp]));
    client.write(b"hello\n");
    client.stdout(|all| all == b"hello\n");
}

#[test]
fn reload_ends_only_sessions_that_new_rules_deny() {
    let Some(realm) = realm() else { return };
    let (dir, echo, udp) = (temp_dir(), echo_server().to_string(), udp_echo_server(V4).to_string());
    let rules = |text: &str| write_file(dir.path(), "rules", text);
    let file = rules("allow user=*@S5.TEST\ndeny\n");
    let server = serve(&realm, &["--rules", &file]);
    let mallory = path(&realm.file("ccache.mallory"));
    let start = |mode: &str, args: &[&str]| {
        let mut client = RunningProgram::start(&mut client(&realm, mode, &url(&server), args));
        client.write(b"hello\n");
        client.stdout(|all| all == b"hello\n");
        client
    };
    let mut stay = [start("connect", &[&echo]), start("udp", &[&udp])];
    let mut go = [
        start("connect", &["--gssapi-protection", "integrity", &echo]),
        start("connect", &["--ccache", &mallory, &echo]),
        start("udp", &["--ccache", &mallory, &udp]),
    ];
    rules("# the same\nallow user=*@S5.TEST\ndeny\n");
    server.signal("HUP");
    server.wait_log(|log| log.matches("reload").count() >= 1);
    for client in stay.iter_mut().chain(&mut go) {
        client.write(b"again\n");
        client.stdout(|all| all == b"hello\nagain\n");
    }
    rules(&format!("allow user={ALICE} protection=confidentiality\ndeny\n"));
    server.signal("HUP");
    for client in &mut go {
        let (status, _, stderr) = client.wait_exit(TIMEOUT);
        assert!(!status.success(), "{stderr}");
    }
    for client in &mut stay {
        client.write(b"and again\n");
        client.stdout(|all| all == b"hello\nagain\nand again\n");
    }
}

#[test]
fn keytab_permits_listening_on_all_addresses_and_requires_login() {
    let Some(realm) = realm() else { return };
    // Without a login, s5 refuses to listen on all addresses.
    let mut command = crate::support::s5();
    let keytab = path(&realm.file("service.keytab"));
    realm.env(command.args(["serve", "--listen", "*:0", "--keytab", &keytab]));
    let server = Server::start_with(&mut command, 1);
    let mut stream = TcpStream::connect((V4, server.addr().port())).expect("the server accepts");
    stream.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    stream.write_all(&[5, 2, 0, 2]).expect("the greeting is sent");
    assert_eq!(crate::support::read_exact(&mut stream, 2), [5, 0xff]);
    let echo = echo_server().to_string();
    assert_eq!(stdout(&mut client(&realm, "connect", &url(&server), &[&echo]), b"hello"), b"hello");
    wait_until("the session ends", TIMEOUT, || server.log().contains(ALICE));
}
