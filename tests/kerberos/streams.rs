//! s5 client and server: CONNECT and BIND at each level.

use crate::*;

#[test]
fn tunnel_transfers_8_mib_each_way_at_every_level() {
    let Some(realm) = realm() else { return };
    let (echo, data) = (echo_server().to_string(), bytes(8 << 20));
    for level in LEVELS {
        let server = serve_at(&realm, level);
        assert_echoes(&mut client_at(&realm, "connect", &url(&server), level, &[&echo]), &data);
        let user = format!("user=\"{ALICE}\"");
        wait_session(&server, &[&user, "command=connect", "rep=0 up=8388608 down=8388608"]);
    }
}

#[test]
fn half_close_close_reset_and_failure_reply_pass_at_every_level() {
    let Some(realm) = realm() else { return };
    let half_closes = tcp_server(V4, |mut stream| {
        stream.write_all(b"220 hello\n").expect("sent");
        let mut all = Vec::new();
        stream.read_to_end(&mut all).expect("closed");
        stream.write_all(format!("{} bytes", all.len()).as_bytes()).expect("sent");
    });
    let (sender, received) = channel();
    let ends_first = tcp_server(V4, move |mut stream| {
        stream.write_all(b"all").and_then(|()| stream.shutdown(Shutdown::Write)).expect("sent");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("closed");
        sender.send(answer).expect("the test runs");
    });
    let resets = tcp_server(V4, |mut stream| {
        read_exact(&mut stream, 2);
        reset(stream);
    });
    for level in LEVELS {
        let server = serve_at(&realm, level);
        let command = |target: SocketAddr| client_at(&realm, "connect", &url(&server), level, &[&target.to_string()]);
        let mut client = RunningProgram::start(&mut command(half_closes));
        client.stdout(|bytes| bytes == b"220 hello\n");
        client.write(b"question");
        client.close_stdin();
        let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
        assert_eq!((status.code(), text(&stdout).as_str()), (Some(0), "220 hello\n8 bytes"), "{level}: {stderr}");

        let mut client = RunningProgram::start(&mut command(ends_first));
        assert_eq!(client.stdout_end(), b"all", "{level}");
        client.write(b"late");
        client.close_stdin();
        assert_eq!(received.recv_timeout(TIMEOUT).as_deref(), Ok(&b"late"[..]), "{level}");
        assert_eq!(client.wait_exit(TIMEOUT).0.code(), Some(0), "{level}");

        let mut client = RunningProgram::start(&mut command(resets));
        client.write(b"go");
        let (status, _, stderr) = client.wait_exit(TIMEOUT);
        assert!(status.code() == Some(56) && stderr.contains("transfer"), "{level}: {stderr}");

        assert_fails_with(&hello(&mut command(closed_port())), 105, &["REP 5"]);
        wait_session(&server, &[ALICE, "rep=5"]);
    }
}

/// Waits for a line on stderr that starts with `word`, and returns the address after it.
pub fn reported_addr(program: &RunningProgram, word: &str) -> SocketAddr {
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
fn proxy_at_unix_socket_or_ip_address_requires_gssapi_host() {
    let Some(realm) = realm() else { return };
    let (dir, echo) = (temp_dir(), echo_server().to_string());
    let (listen, keytab) = (format!("unix:{}/s5.sock", dir.path().display()), path(&realm.file("service.keytab")));
    let mut command = s5();
    let server = Server::start_with(realm.env(command.args(["serve", "--keytab", &keytab, "--listen", &listen])), 1);
    assert_hello(&connect(&realm, &listen, &["--gssapi-host", "localhost", &echo]), "unix");
    server.wait_log(|log| log.contains(&format!("from=unix user=\"{ALICE}\"")));
    assert_fails_with(&connect(&realm, &listen, &[&echo]), 67, &["Kerberos needs the host name", "--gssapi-host"]);

    let server = serve(&realm, &[]);
    let proxy = server.addr().to_string();
    let message = "Kerberos needs the host name of the proxy";
    assert_fails_with(&connect(&realm, &proxy, &[&echo]), 67, &[message, "127.0.0.1", "--gssapi-host"]);
    crate::page::assert_explains(message);
    for named in [["--gssapi-host", "localhost"], ["--gssapi-service", "socks/localhost@S5.TEST"]] {
        assert_hello(&connect(&realm, &proxy, &[&named, &[&*echo][..]].concat()), named[0]);
    }
}

#[test]
fn concurrent_sessions_do_not_mix_data() {
    let Some(realm) = realm() else { return };
    let (server, (listener, target)) = (serve(&realm, &[]), listener(V4));
    let data = |i: usize| vec![b'a' + u8::try_from(i).expect("a letter"); 100_000];
    let start = |i: usize| {
        let args = [&*target.to_string()];
        let mut command = client_at(&realm, "connect", &url(&server), LEVELS[1 + i % 2], &args);
        let mut client = RunningProgram::start(&mut command);
        client.write(&data(i));
        client.close_stdin();
        client
    };
    let clients: Vec<RunningProgram> = (0..8).map(start).collect();
    // All tunnels are open before the first one is answered.
    let streams: Vec<TcpStream> = clients.iter().map(|_| accept(&listener).0).collect();
    for mut stream in streams {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).expect("closed");
        stream.write_all(&all).expect("sent");
    }
    for (i, mut client) in clients.into_iter().enumerate() {
        let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
        assert!(status.success(), "{stderr}");
        assert!(stdout == data(i), "data of another session");
    }
}
