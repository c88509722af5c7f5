//! s5 with s5: CONNECT and BIND at each level.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::Command;

use crate::common::{Server, TIMEOUT, closed_port, echo_server, read_exact, run, s5, tcp_server, temp_dir};
use crate::kit::realm::Realm;
use crate::kit::{V4, listener, reset};
use crate::scripted::{RunningProgram, text};
use crate::{
    ALICE, LEVELS, LONG, assert_says, client, client_at, octets, path, realm, serve, serve_at, session, stdout, url,
};

fn connect(realm: &Realm, server: &Server, level: &str, target: SocketAddr) -> Command {
    client_at(realm, "connect", &url(server), level, &[&target.to_string()])
}

#[test]
fn a_tunnel_moves_8_mib_each_way_at_every_level() {
    let Some(realm) = realm() else { return };
    let (echo, data) = (echo_server(), octets(8 << 20));
    for level in LEVELS {
        let server = serve_at(&realm, level);
        let came = stdout(&mut connect(&realm, &server, level, echo), &data);
        assert_eq!(came.len(), data.len(), "{level}");
        assert!(came == data, "other octets at {level}");
        let user = format!("user=\"{ALICE}\"");
        session(&server, &[&user, "command=connect", "rep=0 up=8388608 down=8388608"]);
    }
}

#[test]
fn whichever_side_speaks_first_and_each_half_close_goes_through() {
    let Some(realm) = realm() else { return };
    let target = tcp_server(V4, |mut stream| {
        stream.write_all(b"220 hello\n").expect("it is sent");
        let mut all = Vec::new();
        stream.read_to_end(&mut all).expect("it is closed");
        stream.write_all(format!("{} octets", all.len()).as_bytes()).expect("it is sent");
    });
    for level in LEVELS {
        let server = serve_at(&realm, level);
        let mut client = RunningProgram::start(&mut connect(&realm, &server, level, target));
        client.stdout(|octets| octets == b"220 hello\n");
        client.write(b"question");
        client.close_stdin();
        let (status, stdout, said) = client.wait_exit(TIMEOUT);
        assert_eq!((status.code(), text(&stdout).as_str()), (Some(0), "220 hello\n8 octets"), "{level}: {said}");
    }
}

#[test]
fn the_target_may_close_first() {
    let Some(realm) = realm() else { return };
    let target = tcp_server(V4, |mut stream| stream.write_all(b"all").expect("it is sent"));
    for level in LEVELS {
        let server = serve_at(&realm, level);
        let mut client = RunningProgram::start(&mut connect(&realm, &server, level, target));
        let (status, stdout, said) = client.wait_exit(TIMEOUT);
        assert_eq!((status.code(), stdout), (Some(0), b"all".to_vec()), "{level}: {said}");
    }
}

#[test]
fn a_target_that_resets_is_no_good_end() {
    let Some(realm) = realm() else { return };
    let target = tcp_server(V4, |mut stream| {
        read_exact(&mut stream, 2);
        reset(stream);
    });
    for level in LEVELS {
        let server = serve_at(&realm, level);
        let mut client = RunningProgram::start(&mut connect(&realm, &server, level, target));
        client.write(b"go");
        let (status, _, said) = client.wait_exit(TIMEOUT);
        assert!(status.code() == Some(56) && said.contains("transfer"), "{level}: {said}");
    }
}

#[test]
fn refusals_come_in_the_protected_reply() {
    let Some(realm) = realm() else { return };
    for level in LEVELS {
        let server = serve_at(&realm, level);
        let output = run(&mut connect(&realm, &server, level, closed_port()), b"", LONG);
        assert_says(&output, 105, &["REP 5"]);
        session(&server, &[ALICE, "rep=5"]);
    }
}

/// The address behind a word that the program says on stderr.
fn said(program: &RunningProgram, word: &str) -> SocketAddr {
    let said = program.stderr(|said| said.lines().any(|line| line.starts_with(word)) && said.ends_with('\n'));
    let line = said.lines().find_map(|line| line.strip_prefix(word)).expect("the line is there");
    line.trim().parse().expect("an address")
}

#[test]
fn bind_moves_data_both_ways_at_every_level() {
    let Some(realm) = realm() else { return };
    for level in LEVELS {
        let server = serve_at(&realm, level);
        let mut client = RunningProgram::start(&mut client_at(&realm, "bind", &url(&server), level, &["127.0.0.1"]));
        let mut peer = TcpStream::connect(said(&client, "bound ")).expect("the server listens");
        assert_eq!(said(&client, "accepted "), peer.local_addr().expect("an address"));
        peer.write_all(b"from the peer").expect("it is sent");
        client.stdout(|octets| octets == b"from the peer");
        client.write(b"from the client");
        client.close_stdin();
        let mut all = String::new();
        peer.read_to_string(&mut all).expect("it is closed");
        assert_eq!(all, "from the client", "{level}");
        peer.write_all(b", more").expect("it is sent");
        peer.shutdown(Shutdown::Write).expect("half-close");
        let (status, stdout, said) = client.wait_exit(TIMEOUT);
        assert_eq!((status.code(), text(&stdout).as_str()), (Some(0), "from the peer, more"), "{level}: {said}");
        session(&server, &[ALICE, "command=bind"]);
    }
}

#[test]
fn a_unix_socket_takes_gssapi_when_the_host_is_named() {
    let Some(realm) = realm() else { return };
    let folder = temp_dir();
    let (socket, keytab) = (path(&folder.path().join("s5.sock")), path(&realm.file("service.keytab")));
    let listen = format!("unix:{socket}");
    let mut command = s5();
    let server = Server::start_with(realm.env(command.args(["serve", "--keytab", &keytab, "--listen", &listen])), 1);
    let echo = echo_server().to_string();
    let named = stdout(&mut client(&realm, "connect", &listen, &["--gssapi-host", "localhost", &echo]), b"hello");
    assert_eq!(named, b"hello");
    server.wait_log(|log| log.contains(&format!("client=unix user=\"{ALICE}\"")));
    let unnamed = run(&mut client(&realm, "connect", &listen, &[&echo]), b"", LONG);
    assert_says(&unnamed, 67, &["login", "--gssapi-host"]);
}

#[test]
fn a_proxy_known_by_address_wants_its_host_named() {
    let Some(realm) = realm() else { return };
    let (server, echo) = (serve(&realm, &[]), echo_server().to_string());
    let proxy = server.addr().to_string();
    let unnamed = run(&mut client(&realm, "connect", &proxy, &[&echo]), b"", LONG);
    assert_says(&unnamed, 67, &["Kerberos needs the host name of the proxy", "127.0.0.1", "--gssapi-host"]);
    let named = stdout(&mut client(&realm, "connect", &proxy, &["--gssapi-host", "localhost", &echo]), b"hello");
    assert_eq!(named, b"hello");
    let principal = ["--gssapi-service", "socks/localhost@S5.TEST", &echo];
    assert_eq!(stdout(&mut client(&realm, "connect", &proxy, &principal), b"hello"), b"hello");
}

#[test]
fn many_sessions_at_once_do_not_get_into_each_others_way() {
    let Some(realm) = realm() else { return };
    let (server, (listener, target)) = (serve(&realm, &[]), listener(V4));
    let clients: Vec<RunningProgram> = (0..8)
        .map(|i| {
            let mut client = RunningProgram::start(&mut connect(&realm, &server, LEVELS[1 + i % 2], target));
            client.write(&[b'a' + u8::try_from(i).expect("a letter"); 100_000]);
            client.close_stdin();
            client
        })
        .collect();
    // All are open before any is answered.
    let streams: Vec<TcpStream> = clients.iter().map(|_| crate::kit::accept(&listener).0).collect();
    for mut stream in streams {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).expect("it is closed");
        stream.write_all(&all).expect("it is sent");
    }
    for (i, mut client) in clients.into_iter().enumerate() {
        let (status, stdout, said) = client.wait_exit(TIMEOUT);
        assert!(status.success(), "{said}");
        assert!(stdout == [b'a' + u8::try_from(i).expect("a letter"); 100_000], "others' octets");
    }
}
