//! What a client demands, it is not talked out of; and many at once who go through a hop wait for their turn.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::thread;

use crate::common::{Server, echo_server, open, read_exact, run, s5};
use crate::kit::realm::Realm;
use crate::{ALICE, LONG, assert_says, realm, serve, session, start, url};

/// A client of ours in the realm with these options and no `--auth`.
fn ask(realm: &Realm, proxy: &str, args: &[&str]) -> std::process::Output {
    run(realm.env(s5().args(["connect", "-x", proxy]).args(args)), b"", LONG)
}

#[test]
fn whoever_wants_protection_offers_nothing_else() {
    let Some(realm) = realm() else { return };
    // It would take anybody.
    let open = Server::start(&[]);
    let target = echo_server().to_string();
    assert!(ask(&realm, &url(&open), &[&target]).status.success());
    for demand in [&["--gssapi-min", "integrity"][..], &["--gssapi-protection", "integrity"], &["--gssapi-nec"]] {
        let output = ask(&realm, &url(&open), &[demand, &[&target]].concat());
        assert_says(&output, 67, &["no acceptable authentication method"]);
    }
    let output = ask(&realm, &url(&open), &["--auth", "none", "--gssapi-min", "integrity", &target]);
    assert_says(&output, 2, &["--auth"]);
    let chain = format!("{0},{0}", url(&open));
    for one in [&["--gssapi-host", "localhost"][..], &["--gssapi-service", "rcmd/localhost"]] {
        assert_says(&ask(&realm, &chain, &[one, &[&target]].concat()), 2, &["chain"]);
    }
}

#[test]
fn a_protected_tunnel_is_not_handed_on_without_its_protection() {
    let Some(realm) = realm() else { return };
    let (server, target) = (serve(&realm, &[]), echo_server().to_string());
    let (stdout, _ours) = UnixStream::pair().expect("a pair");
    let mut command = s5();
    command.args(["connect", "-F", "--auth", "gssapi", "-x", &url(&server), &target]);
    let command = realm.env(command.stdout(OwnedFd::from(stdout)).stderr(Stdio::piped()));
    let output = command.spawn().and_then(Child::wait_with_output).expect("s5 runs");
    assert_says(&output, 1, &["pass the socket", "GSSAPI"]);
}

#[test]
fn a_hop_does_not_talk_the_server_out_of_gssapi() {
    let Some(realm) = realm() else { return };
    let (plain, target) = (Server::start(&[]), echo_server());
    let through = |hop: &Server| {
        let mut command = s5();
        command.args(["serve", "--listen", "127.0.0.1:0", "--hop-auth", "gssapi", "--via", &url(hop)]);
        Server::start_with(realm.env(&mut command), 1)
    };
    assert_eq!(open(&through(&plain), 1, target).1, 1, "it would be plain");
    let protected = serve(&realm, &[]);
    let server = through(&protected);
    assert_eq!(open(&server, 1, target).1, 0);
    session(&protected, &[ALICE, "protection=confidentiality"]);
}

#[test]
fn many_at_once_through_a_hop_all_get_there() {
    let Some(realm) = realm() else { return };
    let (hop, target) = (serve(&realm, &[]), echo_server());
    let server = start(&realm, &["--hop-auth", "gssapi", "--via", &url(&hop)]);
    let all: Vec<u8> = thread::scope(|scope| {
        let sessions: Vec<_> = (0..200)
            .map(|_| {
                scope.spawn(|| {
                    let (mut stream, rep, _) = open(&server, 1, target);
                    if rep == 0 {
                        std::io::Write::write_all(&mut stream, b"x").expect("it is sent");
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
