//! Required protection can't be bypassed by a proxy; and many concurrent logins to a hop succeed.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::thread;

use crate::support::realm::Realm;
use crate::support::{Server, echo_server, open, read_exact, run, s5};
use crate::{ALICE, LONG_TIMEOUT, assert_fails_with, realm, serve, start, url, wait_session};

/// Runs `s5 connect` in the realm with these options and no `--auth`.
fn connect(realm: &Realm, proxy: &str, args: &[&str]) -> std::process::Output {
    run(realm.env(s5().args(["connect", "-x", proxy]).args(args)), b"", LONG_TIMEOUT)
}

#[test]
fn protection_options_offer_only_gssapi() {
    let Some(realm) = realm() else { return };
    // This server accepts clients without a login.
    let open = Server::start(&[]);
    let target = echo_server().to_string();
    assert!(connect(&realm, &url(&open), &[&target]).status.success());
    for demand in [&["--gssapi-min", "integrity"][..], &["--gssapi-protection", "integrity"], &["--gssapi-nec"]] {
        let output = connect(&realm, &url(&open), &[demand, &[&target]].concat());
        assert_fails_with(&output, 67, &["no acceptable authentication method"]);
    }
    let output = connect(&realm, &url(&open), &["--auth", "none", "--gssapi-min", "integrity", &target]);
    assert_fails_with(&output, 2, &["--auth"]);
    let chain = format!("{0},{0}", url(&open));
    for one in [&["--gssapi-host", "localhost"][..], &["--gssapi-service", "rcmd/localhost"]] {
        assert_fails_with(&connect(&realm, &chain, &[one, &[&target]].concat()), 2, &["chain"]);
    }
}

#[test]
fn protected_tunnel_socket_is_not_passed() {
    let Some(realm) = realm() else { return };
    let (server, target) = (serve(&realm, &[]), echo_server().to_string());
    let (stdout, _ours) = UnixStream::pair().expect("a pair");
    let mut command = s5();
    command.args(["connect", "-F", "--auth", "gssapi", "-x", &url(&server), &target]);
    let command = realm.env(command.stdout(OwnedFd::from(stdout)).stderr(Stdio::piped()));
    let output = command.spawn().and_then(Child::wait_with_output).expect("s5 runs");
    assert_fails_with(&output, 1, &["pass the socket", "GSSAPI"]);
}

#[test]
fn server_with_hop_auth_gssapi_refuses_unprotected_hop() {
    let Some(realm) = realm() else { return };
    let (plain, target) = (Server::start(&[]), echo_server());
    let through = |hop: &Server| {
        let mut command = s5();
        command.args(["serve", "--listen", "127.0.0.1:0", "--hop-auth", "gssapi", "--via", &url(hop)]);
        Server::start_with(realm.env(&mut command), 1)
    };
    assert_eq!(open(&through(&plain), 1, target).1, 1, "unprotected");
    let protected = serve(&realm, &[]);
    let server = through(&protected);
    assert_eq!(open(&server, 1, target).1, 0);
    wait_session(&protected, &[ALICE, "protection=confidentiality"]);
}

#[test]
fn many_concurrent_logins_to_a_hop_succeed() {
    let Some(realm) = realm() else { return };
    let (hop, target) = (serve(&realm, &[]), echo_server());
    let server = start(&realm, &["--hop-auth", "gssapi", "--via", &url(&hop)]);
    let all: Vec<u8> = thread::scope(|scope| {
        let sessions: Vec<_> = (0..200)
            .map(|_| {
                scope.spawn(|| {
                    let (mut stream, rep, _) = open(&server, 1, target);
                    if rep == 0 {
                        std::io::Write::write_all(&mut stream, b"x").expect("sent");
                        assert_eq!(read_exact(&mut stream, 1), b"x");
                    }
                    rep
                })
            })
            .collect();
        sessions.into_iter().map(|session| session.join().expect("no panic")).collect()
    });
    assert!(all.iter().all(|rep| *rep == 0), "{all:?}");
}
