//! Policy rules for Kerberos logins, also after a reload.

use crate::*;

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
    let cases = [
        ("alice", "ccache", "confidentiality"),
        ("alice", "ccache", "integrity"),
        ("mallory", "ccache.mallory", "confidentiality"),
    ];
    for (rule, expected) in table {
        let server = serve(&realm, &["--allow", rule, "--deny", ""]);
        for ((user, ccache, level), expected) in cases.into_iter().zip(expected) {
            let ccache = path(&realm.file(ccache));
            let args = ["--ccache", &ccache, "--gssapi-protection", level, &echo];
            let output = connect(&realm, &url(&server), &args);
            match expected {
                true => assert_hello(&output, &format!("{rule}: {user} at {level}")),
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
    for (mode, target) in [("udp", &*udp), ("bind", "127.0.0.1")] {
        for args in [["--ccache", &*mallory, target], ["--gssapi-protection", "integrity", target]] {
            assert_fails_with(&hello(&mut client(&realm, mode, &url(&server), &args)), 102, &["REP 2"]);
        }
    }
    exchange_datagrams(&mut client(&realm, "udp", &url(&server), &[&udp]), &[5]);
}

#[test]
fn reload_ends_only_sessions_that_new_rules_deny() {
    let Some(realm) = realm() else { return };
    let (dir, echo, udp) = (temp_dir(), echo_server().to_string(), udp_echo_server(V4).to_string());
    let rules = |text: &str| write_file(dir.path(), "rules", text);
    let file = rules("allow user=*@S5.TEST\ndeny\n");
    let server = serve(&realm, &["--rules", &file]);
    let mallory = path(&realm.file("ccache.mallory"));
    let exchange = |client: &mut RunningProgram, line: &[u8]| {
        client.write(line);
        client.stdout(|all| all.ends_with(line));
    };
    let start = |mode: &str, args: &[&str]| {
        let mut client = RunningProgram::start(&mut client(&realm, mode, &url(&server), args));
        exchange(&mut client, b"hello\n");
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
    server.wait_log(|log| log.contains("reload"));
    stay.iter_mut().chain(&mut go).for_each(|client| exchange(client, b"again\n"));
    rules(&format!("allow user={ALICE} protection=confidentiality\ndeny\n"));
    server.signal("HUP");
    for client in &mut go {
        let (status, _, stderr) = client.wait_exit(TIMEOUT);
        assert!(!status.success(), "{stderr}");
    }
    stay.iter_mut().for_each(|client| exchange(client, b"and again\n"));
}

#[test]
fn keytab_permits_listening_on_all_addresses_and_requires_login() {
    let Some(realm) = realm() else { return };
    // Without a login, s5 refuses to listen on all addresses.
    let mut command = s5();
    let keytab = path(&realm.file("service.keytab"));
    realm.env(command.args(["serve", "--listen", "*:0", "--keytab", &keytab]));
    let server = Server::start_with(&mut command, 1);
    let mut stream = TcpStream::connect((V4, server.addr().port())).expect("the server accepts");
    stream.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    stream.write_all(&[5, 2, 0, 2]).expect("the greeting is sent");
    assert_eq!(read_exact(&mut stream, 2), [5, 0xff]);
    assert_hello(&connect(&realm, &url(&server), &[&echo_server().to_string()]), "with a ticket");
    wait_until("the session ends", TIMEOUT, || server.log().contains(ALICE));
}
