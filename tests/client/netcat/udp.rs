//! `s5 udp`: framings, counts of answers, incomplete and dropped answers, and use without a proxy.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use crate::support::scripted::{RunningProgram, ScriptedServer, reply_with, success_reply, text, with_stream};
use crate::support::{Server, TIMEOUT, V4, retry, run, s5, udp_echo_server};

#[test]
fn udp_framings_round_trip() {
    let (server, echo) = (Server::start(&[]), udp_echo_server(V4).to_string());
    let long = [&[0x10, 0][..], &[7; 4096]].concat();
    let cases: [(&str, &[u8], &[u8], &str); 6] = [
        ("--hex", b"00ff0A\n\nde ad be ef\n", b"00ff0a\n\ndeadbeef\n", "3"),
        ("--hex", b"c0ffee", b"c0ffee\n", "1"),
        ("--length-prefixed", b"\0\x03abc\0\0\0\x02\n\n", b"\0\x03abc\0\0\0\x02\n\n", "3"),
        ("--length-prefixed", &long, &long, "1"),
        ("--raw", b"a\nb\n", b"a\nb\n", "1"),
        ("-v", b"a\nb\n", b"a\nb\n", "2"),
    ];
    for (framing, stdin, stdout, count) in cases {
        let args = ["udp", framing, "-n", count, "-w", "5", "-x", &server.addr().to_string(), &echo];
        let output = run(s5().args(args), stdin, TIMEOUT);
        assert_eq!(output.status.code(), Some(0), "{framing}: {}", text(&output.stderr));
        assert!(output.stdout == stdout, "{framing}: {:?}", text(&output.stdout));
    }
}

#[test]
fn udp_malformed_frame_is_an_error() {
    let (server, echo) = (Server::start(&[]), udp_echo_server(V4).to_string());
    let cases: [(&str, &[u8], &str); 5] = [
        ("--hex", b"abc\n", "not hexadecimal"),
        ("--hex", b"xy\n", "not hexadecimal"),
        ("--length-prefixed", b"\0\x05abc", "within a datagram"),
        ("--length-prefixed", b"\0", "within a datagram"),
        ("--length-prefixed", b"\xff\xff", "within a datagram"),
    ];
    for (framing, stdin, reason) in cases {
        let output = run(s5().args(["udp", framing, "-x", &server.addr().to_string(), &echo]), stdin, TIMEOUT);
        let stderr = text(&output.stderr);
        assert_eq!((output.status.code(), stderr.lines().count()), (Some(26), 1), "{stderr}");
        assert!(stderr.contains(reason), "{stderr}");
    }
}

#[test]
fn udp_count_exits_after_n_answers_and_fails_if_answers_are_missing() {
    let (server, echo) = (Server::start(&[]), udp_echo_server(V4).to_string());
    let proxy = server.addr().to_string();
    let started = Instant::now();
    let output = run(s5().args(["udp", "-n", "2", "-w", "9", "-x", &proxy, &echo]), b"a\nb\nc\nd\n", TIMEOUT);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout).lines().count(), 2, "number of answers");
    assert!(started.elapsed() < Duration::from_secs(5), "the client waited after two answers");
    let output = run(s5().args(["udp", "-n", "3", "-w", "300ms", "-x", &proxy, &echo]), b"a\nb\n", TIMEOUT);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(28), "a\nb\n".into()));
    assert!(text(&output.stderr).ends_with(": received 2 of 3 answers in time\n"), "{}", text(&output.stderr));
    // -q limits only the wait for answers.
    let output = run(s5().args(["udp", "-q", "100ms", "-w", "30", "-x", &proxy, &echo]), b"a\n", TIMEOUT);
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn udp_idle_timeout_exits_with_28() {
    let (server, echo) = (Server::start(&[]), udp_echo_server(V4).to_string());
    let mut client = RunningProgram::start(s5().args(["udp", "-i", "400ms", "-x", &server.addr().to_string(), &echo]));
    client.write(b"x\n");
    let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!((status.code(), stdout), (Some(28), b"x\n".to_vec()), "{stderr}");
    assert!(stderr.ends_with("idle for 400ms\n"), "{stderr}");
}

#[test]
fn udp_direct_and_no_proxy_bypass_the_proxy() {
    for ip in [V4, crate::support::V6] {
        let echo = udp_echo_server(ip).to_string();
        let output = run(s5().args(["udp", "--direct", "-n", "2", "-w", "5", &echo]), b"one\ntwo\n", TIMEOUT);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "one\ntwo\n".into()));
        let mut with_no_proxy = s5();
        with_no_proxy.env("ALL_PROXY", "127.0.0.1:1").env("NO_PROXY", "127.0.0.0/8,::1");
        let output = run(with_no_proxy.args(["udp", "-n", "1", "-w", "5", &echo]), b"one\n", TIMEOUT);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "one\n".into()));
    }
}

#[test]
fn udp_source_option_sets_the_address_of_datagrams() {
    let (server, target) = (Server::start(&[]), UdpSocket::bind("127.0.0.1:0").expect("free port"));
    target.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    let addr = target.local_addr().expect("local address").to_string();
    let output = run(s5().args(["udp", "--direct", "-s", "127.0.0.9", "-w", "0", &addr]), b"x\n", TIMEOUT);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(retry(|| target.recv_from(&mut [0; 4])).expect("datagram received").1.ip().to_string(), "127.0.0.9");
    // The proxy accepts datagrams only from the address of the TCP connection.
    let args = ["udp", "-s", "127.0.0.9", "-n", "1", "-w", "5", "-x", &server.addr().to_string()];
    let output = run(s5().args(args).arg(udp_echo_server(V4).to_string()), b"x\n", TIMEOUT);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "x\n".into()), "{}", text(&output.stderr));
}

/// Runs a client that sends one datagram to a relay. `answers` sends the relay's answers. Returns stdout and stderr.
fn run_with_answers(
    answers: impl Fn(&UdpSocket, std::net::SocketAddr) + Send + 'static,
    args: &[&str],
) -> (String, String) {
    let relay = UdpSocket::bind("127.0.0.1:0").expect("free port");
    let bnd = success_reply(relay.local_addr().expect("local address"));
    let hold = with_stream(|mut stream| drop(std::io::copy(&mut stream, &mut std::io::sink())));
    let proxy = ScriptedServer::start(reply_with(&bnd).into_iter().chain([hold]).collect());
    std::thread::spawn(move || {
        let (_, from) = retry(|| relay.recv_from(&mut [0; 64])).expect("datagram received");
        answers(&relay, from);
    });
    let output =
        run(s5().args(["udp", "-w", "500ms", "-x", &proxy.url()]).args(args).arg("192.0.2.7:7"), b"x\n", TIMEOUT);
    assert_eq!(output.status.code(), Some(0), "exit status with lost answers");
    (text(&output.stdout), text(&output.stderr))
}

fn fragment(frag: u8, data: &[u8]) -> Vec<u8> {
    [&[0, 0, frag, 1, 192, 0, 2, 7, 0, 7][..], data].concat()
}

#[test]
fn udp_incomplete_and_dropped_answers_are_reported() {
    let send = |all: Vec<Vec<u8>>| {
        move |relay: &UdpSocket, to| {
            for bytes in &all {
                relay.send_to(bytes, to).expect("datagram sent");
            }
        }
    };
    // Three incomplete datagrams, then a complete one.
    let incomplete = vec![
        fragment(1, b"a"),
        fragment(0x83, b"c"),
        fragment(2, b"b"),
        fragment(0x83, b"c"),
        fragment(1, b"a"),
        fragment(1, b"one "),
        fragment(0x82, b"two"),
    ];
    let (stdout, stderr) = run_with_answers(send(incomplete), &[]);
    assert_eq!(stdout, "one two\n");
    assert!(stderr.ends_with("answers incomplete: fragments are missing (3)\n"), "{stderr}");
    let malformed = vec![b"".to_vec(), vec![0, 0, 0, 9], fragment(0, b"good")];
    let (stdout, stderr) = run_with_answers(send(malformed), &[]);
    assert_eq!(stdout, "good\n");
    assert!(stderr.ends_with("answers dropped: malformed, or not from the relay (2)\n"), "{stderr}");
    let (_, stderr) = run_with_answers(send(vec![fragment(0, b"good")]), &[]);
    assert_eq!(stderr, "");
}

#[test]
fn udp_answers_dropped_by_a_full_buffer_are_reported() {
    let relay = UdpSocket::bind("127.0.0.1:0").expect("free port");
    let bnd = success_reply(relay.local_addr().expect("local address"));
    let hold = with_stream(|mut stream| drop(std::io::copy(&mut stream, &mut std::io::sink())));
    let proxy = ScriptedServer::start(reply_with(&bnd).into_iter().chain([hold]).collect());
    // The reader of stdout sleeps, so that the pipe fills up.
    let script = "echo x | \"$0\" udp -w 2 --raw -x \"$1\" 192.0.2.7:7 | { sleep 1; cat >/dev/null; }";
    let mut command = std::process::Command::new("sh");
    command.args(["-c", script, env!("CARGO_BIN_EXE_s5"), &proxy.url()]);
    let client = std::thread::spawn(move || run(&mut command, b"", TIMEOUT));
    let (_, from) = retry(|| relay.recv_from(&mut [0; 64])).expect("datagram received");
    for _ in 0..3000 {
        relay.send_to(&fragment(0, &[b'x'; 1200]), from).expect("datagram sent");
    }
    let output = client.join().expect("the thread does not panic");
    assert!(
        text(&output.stderr).contains("answers dropped: they arrived faster than they were read ("),
        "{}",
        text(&output.stderr)
    );
}
