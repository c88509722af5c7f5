//! Habits of users of nc, ncat, curl and ssh: s5 does what they mean, or says what to write instead.

use crate::bind::bound_address;
use crate::credentials::{accepting_proxy, assert_login};
use crate::*;

/// Replaces /etc/services in the namespace of this test.
fn set_services(text: &str) {
    let dir = temp_dir();
    let file = write_file(dir.path(), "services", text);
    let mount = run(Command::new("mount").args(["--bind", &file, "/etc/services"]), b"", TIMEOUT);
    assert!(mount.status.success(), "{mount:?}");
}

#[test]
fn port_may_be_the_name_of_a_service() {
    enter_namespace!("127.0.0.1 localhost\n", "");
    let ((_server, proxy), tcp, udp) = (serve(), echo_server(), udp_echo_server(V4));
    let (proxy_port, free) = (proxy.rsplit_once(':').expect("a port").1, closed_port().port());
    let services = [
        format!("echoer {}/tcp echo-alias", tcp.port()),
        format!("echoer {}/udp", udp.port()),
        format!("only-udp {}/udp", udp.port()),
        format!("our-proxy {proxy_port}/tcp"),
        format!("free {free}/tcp\n"),
    ];
    set_services(&services.join("\n"));
    for target in ["127.0.0.1:echoer", "127.0.0.1 echoer", "localhost:echo-alias", "localhost echoer"] {
        for option in [format!("-x {proxy}"), "-x 127.0.0.1:our-proxy".into(), "--direct".into()] {
            assert_eq!(outcome(&format!("connect {option} {target}"), b"hello"), success("hello"), "{option} {target}");
        }
    }
    for target in ["127.0.0.1:echoer", "127.0.0.1 echoer", "localhost:only-udp"] {
        assert_eq!(outcome(&format!("udp -n 1 -w 5 -x {proxy} {target}"), b"hello\n"), success("hello\n"), "{target}");
    }
    for listen in ["127.0.0.1:free", "free"] {
        let client = start(&format!("connect -l {listen} -x {proxy} 127.0.0.1:echoer"));
        client.stderr(|stderr| stderr.contains(&format!("listening on 127.0.0.1:{free}\n")));
        let client = start(&format!("udp -l {listen} -x {proxy} 127.0.0.1:echoer"));
        client.stderr(|stderr| stderr.contains(&format!("listening on 127.0.0.1:{free}\n")));
    }
    for (listen, count) in [("127.0.0.1:free", 1), ("free", 2)] {
        let server = crate::support::serve(listen, count, &["--via", "127.0.0.1:our-proxy"]);
        assert_eq!(outcome(&format!("connect -x {} {tcp}", server.addr()), b"hello"), success("hello"), "{listen}");
    }
    for peer in ["192.0.2.7:echoer", "192.0.2.7 echoer"] {
        let proxy = ScriptedServer::start(&reply("05 02 00 01 00*6"));
        assert_eq!(outcome(&format!("bind -x {} {peer}", proxy.addr), b"").0, Some(102));
        assert!(proxy.messages()[1].ends_with(&tcp.port().to_be_bytes()), "{peer}");
    }
    for args in ["connect a:unknown", "udp a unknown", "bind a:unknown"] {
        assert_line(args, 2, &["\"unknown\" is neither a port nor a known service"]);
    }
}

#[test]
fn nodns_and_proxy_auth_of_other_clients_are_accepted() {
    let ((_server, proxy), echo) = (serve(), echo_server());
    for (args, stdin) in [("connect -n", "hello"), ("connect -nv", "hello"), ("connect -nzv", "")] {
        let (status, stdout, stderr) = outcome(&format!("{args} -x {proxy} {echo}"), stdin.as_bytes());
        assert_eq!((status, stdout.as_str()), (Some(0), stdin), "{args}: {stderr}");
    }
    assert_eq!(outcome(&format!("udp -nz -x {proxy} {echo}"), b"").0, Some(0));
    bound_address(&start(&format!("bind -n -x {proxy}")));
    let proxy = accepting_proxy();
    assert_eq!(outcome(&format!("connect -z --proxy-auth alice:secret -x {} {TARGET}", proxy.addr), b"").0, Some(0));
    assert_login(&proxy, "alice", b"secret");
}

#[test]
fn error_says_what_is_meant() {
    let ambiguous = "fd77:1::1:1080 is ambiguous (write [fd77:1::1]:1080, or [fd77:1::1:1080] if it has no port)";
    let meant = "expected one HOST:PORT (-x takes the proxy: -x 203.0.113.7:7 example.org:80)";
    let user_name = "expected a host without a user name (-x takes the URL of a proxy)";
    let table = [
        ("connect http://example.org/", "target: expected HOST:PORT, not a URL (write example.org:80)"),
        ("udp https://u:p@example.org:8443/a?b", "target: expected HOST:PORT, not a URL (write example.org:8443)"),
        ("bind http://example.org/", "peer: expected HOST:PORT, not a URL (write example.org:80)"),
        ("connect nosuch://example.org 80", "target: expected HOST:PORT, not a URL (write example.org:PORT)"),
        ("connect 203.0.113.7:7 example.org:80", &format!("target: {meant}")),
        ("udp 203.0.113.7:7 example.org:80", &format!("target: {meant}")),
        ("connect user@example.org 22", &format!("target: {user_name}")),
        ("connect u:secret@example.org:1080", &format!("target: {user_name}")),
        ("connect u:secret@203.0.113.7:7 example.org:80", &format!("target: {user_name}")),
        ("udp user@example.org:53", &format!("target: {user_name}")),
        ("bind user@example.org", &format!("peer: {user_name}")),
        ("bind a:1 u:secret@example.org", &format!("peer: {user_name}")),
        ("connect -u example.org 53", "unrecognized option -u (use s5 udp)"),
        ("connect -x fd77:1::1:1080 a:1", &format!("--proxy: {ambiguous}")),
        ("connect -x socks5h://u:secret@fd77:1::1:1080 a:1", &format!("--proxy: {ambiguous}")),
        ("serve --via fd77:1::1:1080", &format!("--via: {ambiguous}")),
        ("serve --hop a=fd77:1::1:1080", &format!("--hop a: {ambiguous}")),
        ("bind fd77:1::1:1080", &format!("peer: {ambiguous}")),
        ("bind 4444", "peer: expected HOST, found a port (the proxy chooses its port; 0.0.0.0:4444 asks for this one)"),
        ("serve -p 1081", "unrecognized option -p (use --listen [ADDR:]PORT)"),
        ("connect --port 80 a", "unrecognized option --port (write the port after the host: HOST:PORT)"),
        ("connect --check a:1", "unrecognized option --check (use -z)"),
        ("connect --nonsense a:1", "unrecognized option --nonsense (see s5 connect --help)"),
        ("udp -n a 1", "-n 'a': expected a number of answers (without a number, -n is not necessary)"),
        (
            "connect -w 1m30 a:1",
            "-w '1m30': expected a time such as 10, 500ms, 1m30s or 2h, at most one year \
          (see s5 connect --help)",
        ),
    ];
    for (line, expected) in table {
        assert_eq!(outcome(line, b""), crate::failure(2, &format!("s5: {expected}\n")), "{line}");
    }
    let mut variable = command("connect a:1");
    assert_line_of(variable.env("ALL_PROXY", "socks5h://fd77:1::1:1080"), 2, &["ALL_PROXY: ", ambiguous]);
}

#[test]
fn times_may_be_sums_of_units() {
    let (_server, proxy) = serve();
    let echo = echo_server();
    for option in ["--wait 1m30s", "-w 1m30s", "-i 1h0.5m", "-q 1s500ms"] {
        assert_eq!(outcome(&format!("connect {option} -x {proxy} {echo}"), b"hello"), success("hello"), "{option}");
    }
}

#[test]
fn failure_of_the_default_proxy_names_settings_that_do_not_select_it() {
    enter_namespace!("127.0.0.1 localhost\n", "");
    let refused = "connection refused (is the proxy running?)";
    for mode in ["connect", "udp", "bind"] {
        let hint = format!("{refused} (-p is the source port; -x 127.0.0.1:1081 sets the port of the proxy)\n");
        assert_line(&format!("{mode} -p 1081 192.0.2.7:80"), 7, &[&hint]);
    }
    let run = |variables: &[(&str, &str)]| outcome_of(command("connect a:1").envs(variables.iter().copied()), b"");
    for name in ["https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"] {
        let hint = format!("{refused} ({name} is not used; set ALL_PROXY or -x to a SOCKS5 proxy)\n");
        assert_line_in(run(&[(name, "http://127.0.0.1:3128")]), 7, &[&hint]);
        let with_proxy = run(&[(name, "http://127.0.0.1:3128"), ("ALL_PROXY", "127.0.0.1:9")]);
        assert_line_in(with_proxy, 7, &[&format!("{refused}\n")]);
    }
    assert_line("connect a:1", 7, &[&format!("{refused}\n")]);
    assert_line("connect -p 1081 -x 127.0.0.1:1080 a:1", 7, &[&format!("{refused}\n")]);
}

#[test]
fn error_has_each_value_once() {
    let options = [
        ("connect", "-w --retry -i -q -X --auth --gssapi-protection --gssapi-min -R -s -p -l"),
        ("udp", "-n --max-peers --udp-relay -l"),
        ("bind", "--auth -w"),
        ("serve", "--listen --advertise --bind-ports --udp-ports --threads --auth --gssapi-protection --hop-auth"),
        ("serve", "--udp-filtering --max-connections --max-per-client --rate --idle-timeout --rule --explain"),
    ];
    for (mode, names) in options {
        for option in names.split(' ') {
            let (status, _, stderr) = outcome(&format!("{mode} {option} bad/value"), b"");
            assert_eq!((status, stderr.matches("bad/value").count()), (Some(2), 1), "{mode} {option}: {stderr}");
        }
    }
    for args in ["connect bad/value", "connect a bad/value", "connect a:bad/value", "bind a:bad/value"] {
        let (status, _, stderr) = outcome(args, b"");
        assert_eq!((status, stderr.matches("bad/value").count()), (Some(2), 1), "{args}: {stderr}");
    }
}

#[test]
fn quit_time_begins_at_once_without_stdin() {
    // The target sends a byte and nothing more.
    let target = tcp_server(V4, |mut stream| {
        let _ = stream.write_all(b"x");
        let _ = stream.read(&mut [0]);
    });
    let (_server, proxy) = serve();
    let started = Instant::now();
    assert_eq!(outcome(&format!("connect -d -q 1s -x {proxy} {target}"), b""), success("x"));
    assert!(started.elapsed() >= Duration::from_secs(1), "s5 has not waited");
    let mut client = start(&format!("bind -d -q 100ms -x {proxy}"));
    let _peer = TcpStream::connect(bound_address(&client)).expect("the listener accepts");
    assert_eq!(client.wait_exit(TIMEOUT).0.code(), Some(0));
    assert_eq!(outcome(&format!("udp -d -q 100ms -x {proxy} {}", udp_echo_server(V4)), b"").0, Some(0));
}

#[test]
fn name_that_is_not_ascii_is_refused_with_advice() {
    let words = ["b\u{fc}cher.test is not ASCII", "ASCII form, xn--", "RFC 5891"];
    let name = "b\u{fc}cher.test";
    for args in [
        format!("connect {name}:80"),
        format!("connect {name} 80"),
        format!("connect --direct -R local {name}:80"),
        format!("udp {name}:53"),
        format!("bind {name}"),
        format!("bind {name}:20"),
        format!("connect -x {name} a:1"),
        format!("udp -x socks5h://u:topsecret@{name}:1080 a:1"),
        format!("bind -x 127.0.0.1:1,{name}"),
        format!("serve --via {name}:1080"),
        format!("serve --hop h={name}"),
        format!("serve --listen {name}:1080"),
    ] {
        assert_line(&args, 2, &words);
    }
    for variable in ["S5_PROXY", "ALL_PROXY"] {
        assert_line_of(command("connect a:1").env(variable, name), 2, &words);
    }
}

#[test]
fn server_leaves_a_name_that_is_not_ascii_as_it_is() {
    let (name, hosts) = ("b\u{fc}cher.test", "127.0.0.1 localhost b\u{fc}cher.test\n");
    enter_namespace!(hosts, "");
    let server = Server::start(&[]);
    assert_eq!(open_by_name(&server, CONNECT, name, echo_server().port()).1, 0);
    server.wait_log(|log| log.contains(name));
    let upstream = ScriptedServer::start(&reply("05 02 00 01 00*6"));
    let server = Server::start(&["--via", &upstream.url()]);
    assert_eq!(open_by_name(&server, CONNECT, name, 80).1, 2);
    assert!(text(&upstream.messages()[1]).contains(name), "the upstream proxy gets another name");
}

#[test]
fn family_options_apply_to_the_proxy_and_to_targets_that_s5_resolves() {
    let hosts = "127.0.0.1 localhost both.test\n::1 both.test\n";
    enter_namespace!(hosts, "");
    for (option, at, atyp) in [("-4", "127.0.0.1:0", 1), ("-6", "[::1]:0", 4)] {
        for (resolve, atyp) in [("", 3), ("-R local ", atyp)] {
            let proxy = ScriptedServer::start_at(at, &format!("{NO_AUTH} {SUCCESS}"), drop);
            let args = format!("connect -z {option} {resolve}-x both.test:{} both.test:80", proxy.addr.port());
            assert_eq!(outcome(&args, b"").0, Some(0), "{args}");
            assert_eq!(proxy.messages()[1][3], atyp, "{args}");
        }
        for mode in ["connect", "udp"] {
            let (_, help, _) = outcome(&format!("{mode} --help"), b"");
            let line = help.lines().find(|line| line.trim_start().starts_with(&format!("{option},")));
            assert!(line.is_some_and(|line| line.contains("proxy")), "{help}");
        }
    }
}
