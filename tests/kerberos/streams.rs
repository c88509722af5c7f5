//! s5 client and server: CONNECT and BIND at each level.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::Command;

use crate::support::realm::Realm;
use crate::support::scripted::{RunningProgram, text};
use crate::support::{
    Server, TIMEOUT, V4, closed_port, echo_server, listener, read_exact, reset, run, s5, tcp_server, temp_dir,
};
use crate::{
    ALICE, LEVELS, LONG_TIMEOUT, assert_fails_with, bytes, client, client_at, path, realm, serve, serve_at, stdout,
    url, wait_session,
};

fn connect(realm: &Realm, server: &Server, level: &str, target: SocketAddr) -> Command {
    client_at(realm, "connect", &url(server), level, &[&target.to_string()])
}

#[test]
fn tunnel_transfers_8_mib_each_way_at_every_level() {
    let Some(realm) = realm() else { return };
    let (echo, data) = (echo_server(), bytes(8 << 20));
    for level in LEVELS {
        let server = serve_at(&realm, level);
        let received = stdout(&mut connect(&realm, &server, level, echo), &data);
        assert_eq!(received.len(), data.len(), "{level}");
        assert!(received == data, "wrong data at {level}");
        let user = format!("user=\"{ALICE}\"");
        wait_session(&server, &[&user, "command=connect", "rep=0 up=8388608 down=8388608"]);
    }
}

#[test]
fn server_can_send_first_and_half_close_passes() {
    let Some(realm) = realm() else { return };
    let target = tcp_server(V4, |mut stream| {
        stream.write_all(b"220 hello\n").expect("sent");
        let mut all = Vec::new();
        stream.read_to_end(&mut all).expect("closed");
        stream.write_all(format!("{} bytes", all.len()).as_bytes()).expect("sent");
    });
    for level in LEVELS {
        let server = serve_at(&realm, level);
        let mut client = RunningProgram::start(&mut connect(&realm, &server, level, target));
        client.stdout(|bytes| bytes == b"220 hello\n");
        client.write(b"question");
        client.close_stdin();
        let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
        assert_eq!((status.code(), text(&stdout).as_str()), (Some(0), "220 hello\n8 bytes"), "{level}: {stderr}");
    }
}

#[test]
fn target_can_close_first() {
    let Some(realm) = realm() else { return };
    let target = tcp_server(V4, |mut stream| stream.write_all(b"all").expect("sent"));
    for level in LEVELS {
        let server = serve_at(&realm, level);
        let mut client = RunningProgram::start(&mut connect(&realm, &server, level, target));
        let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
        assert_eq!((status.code(), stdout), (Some(0), b"all".to_vec()), "{level}: {stderr}");
    }
}

#[test]
fn reset_by_target_is_an_error() {
    let Some(realm) = realm() else { return };
    let target = tcp_server(V4, |mut stream| {
        read_exact(&mut stream, 2);
        reset(stream);
    });
    for level in LEVELS {
        let server = serve_at(&realm, level);
        let mut client = RunningProgram::start(&mut connect(&realm, &server, level, target));
        client.write(b"go");
        let (status, _, stderr) = client.wait_exit(TIMEOUT);
        assert!(status.code() == Some(56) && stderr.contains("transfer"), "{level}: {stderr}");
    }
}

#[test]
fn failure_reply_is_protected() {
    let Some(realm) = realm() else { return };
    for level in LEVELS {
        let server = serve_at(&realm, level);
        let output = run(&mut connect(&realm, &server, level, closed_port()), b"", LONG_TIMEOUT);
        assert_fails_with(&output, 105, &["REP 5"]);
        wait_session(&server, &[ALICE, "rep=5"]);
    }
}

/// Waits for a line on stderr that starts with `word`, and returns the address after it.
fn reported_addr(program: &RunningProgram, word: &str) -> SocketAddr {
    let stderr = program.stderr(|stderr| stderr.lines().any(|line| line.starts_with(word)) && stderr.ends_with('\n'));
    let line = stderr.lines().find_map(|line| line.strip_prefix(word)).expect("the line");
    line.trim().parse().expect("an address")
}

#[test]
fn bind_transfers_data_both_ways_at_every_level() {
    let Some(realm) = realm() else { return };
    for level in LEVELS {
        let server = serve_at(&realm, level);
        let mut client = RunningProgram::start(&mut client_at(&realm, "bind", &url(&server), level, &["127.0.0.1"]));
        let mut peer = TcpStream::connect(reported_addr(&client, "bound ")).expect("the server listens");
        assert_eq!(reported_addr(&client, "accepted "), peer.local_addr().expect("an address"));
        peer.write_all(b"from the peer").expect("sent");
        client.stdout(|bytes| bytes == b"from the peer");
        client.write(b"from the client");
        client.close_stdin();
        let mut all = String::new();
        peer.read_to_string(&mut all).expect("closed");
        assert_eq!(all, "from the client", "{level}");
        peer.write_all(b", more").expect("sent");
        peer.shutdown(Shutdown::Write).expect("half-close");
        let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
        assert_eq!((status.code(), text(&stdout).as_str()), (Some(0), "from the peer, more"), "{level}: {stderr}");
        wait_session(&server, &[ALICE, "command=bind"]);
    }
}

#[test]
fn unix_socket_proxy_requires_gssapi_host() {
    let Some(realm) = realm() else { return };
    let dir = temp_dir();
    let (socket, keytab) = (path(&dir.path().join("s5.sock")), path(&realm.file("service.keytab")));
    let listen = format!("unix:{socket}");
    let mut command = s5();
    let server = Server::start_with(realm.env(command.args(["serve", "--keytab", &keytab, "--listen", &listen])), 1);
    let echo = echo_server().to_string();
    let named = stdout(&mut client(&realm, "connect", &listen, &["--gssapi-host", "localhost", &echo]), b"hello");
    assert_eq!(named, b"hello");
    server.wait_log(|log| log.contains(&format!("client=unix user=\"{ALICE}\"")));
    let unnamed = run(&mut client(&realm, "connect", &listen, &[&echo]), b"", LONG_TIMEOUT);
    assert_fails_with(&unnamed, 67, &["login", "--gssapi-host"]);
}

#[test]
fn proxy_given_as_ip_address_requires_gssapi_host() {
    let Some(realm) = realm() else { return };
    let (server, echo) = (serve(&realm, &[]), echo_server().to_string());
    let proxy = server.addr().to_string();
    let unnamed = run(&mut client(&realm, "connect", &proxy, &[&echo]), b"", LONG_TIMEOUT);
    let message = "Kerberos needs the host name of the proxy";
    assert_fails_with(&unnamed, 67, &[message, "127.0.0.1", "--gssapi-host"]);
    crate::page::assert_explains(message);
    let named = stdout(&mut client(&realm, "connect", &proxy, &["--gssapi-host", "localhost", &echo]), b"hello");
    assert_eq!(named, b"hello");
    let principal = ["--gssapi-service", "socks/localhost@S5.TEST", &echo];
    assert_eq!(stdout(&mut client(&realm, "connect", &proxy, &principal), b"hello"), b"hello");
}

#[test]
fn concurrent_sessions_do_not_mix_data() {
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
    // All tunnels are open before the first one is answered.
    let streams: Vec<TcpStream> = clients.iter().map(|_| crate::support::accept(&listener).0).collect();
    for mut stream in streams {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).expect("closed");
        stream.write_all(&all).expect("sent");
    }
    for (i, mut client) in clients.into_iter().enumerate() {
        let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
        assert!(status.success(), "{stderr}");
        assert!(stdout == [b'a' + u8::try_from(i).expect("a letter"); 100_000], "data of another session");
    }
}
