//! Required protection can't be bypassed by a proxy; and many concurrent logins to a hop succeed.

use crate::*;

#[test]
fn protection_options_offer_only_gssapi() {
    let Some(realm) = realm() else { return };
    // This server accepts clients without a login.
    let open = Server::start(&[]);
    let target = echo_server().to_string();
    let connect = |args: &[&str]| hello(&mut any_client(&realm, "connect", &url(&open), &[args, &[&target]].concat()));
    assert!(connect(&[]).status.success());
    for demand in [&["--gssapi-min", "integrity"][..], &["--gssapi-protection", "integrity"], &["--gssapi-nec"]] {
        assert_fails_with(&connect(demand), 67, &["no acceptable authentication method"]);
    }
    assert_fails_with(&connect(&["--auth", "none", "--gssapi-min", "integrity"]), 2, &["--auth"]);
    let chain = format!("{0},{0}", url(&open));
    for one in [["--gssapi-host", "localhost", &*target], ["--gssapi-service", "rcmd/localhost", &*target]] {
        assert_fails_with(&hello(&mut any_client(&realm, "connect", &chain, &one)), 2, &["chain"]);
    }
}

#[test]
fn protected_tunnel_socket_is_not_passed() {
    let Some(realm) = realm() else { return };
    let (server, target) = (serve(&realm, &[]), echo_server().to_string());
    let (stdout, _ours) = UnixStream::pair().expect("a pair");
    let mut command = client(&realm, "connect", &url(&server), &["-F", &target]);
    command.stdout(OwnedFd::from(stdout)).stderr(Stdio::piped());
    let output = command.spawn().and_then(Child::wait_with_output).expect("s5 runs");
    assert_fails_with(&output, 1, &["pass the socket", "GSSAPI"]);
}

#[test]
fn server_with_hop_auth_gssapi_refuses_unprotected_hop_and_logs_in_often() {
    let Some(realm) = realm() else { return };
    let (plain, protected, target) = (Server::start(&[]), serve(&realm, &[]), echo_server());
    let through = |hop: &Server| start(&realm, &["--hop-auth", "gssapi", "--via", &url(hop)]);
    assert_eq!(open(&through(&plain), CONNECT, target).1, 1, "unprotected");
    let server = through(&protected);
    thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| {
                let mut stream = connect_to(&server, target);
                ping(&mut stream, b"x");
            });
        }
    });
    wait_session(&protected, &[ALICE, "protection=confidentiality"]);
}
