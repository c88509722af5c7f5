//! `s5 udp`: framings, counts of answers, dropped answers, and use without a proxy.

use crate::udp::{associating_proxy, datagram, receive, socket};
use crate::*;

#[test]
fn udp_framings_round_trip() {
    let ((_server, proxy), echo) = (serve(), udp_echo_server(V4));
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
        let output = run(&mut command(&format!("udp {framing} -n {count} -w 5 -x {proxy} {echo}")), stdin, TIMEOUT);
        assert!(output.status.success() && output.stdout == stdout, "{framing}: {output:?}");
    }
}

#[test]
fn udp_malformed_frame_is_an_error() {
    let ((_server, proxy), echo) = (serve(), udp_echo_server(V4));
    let cases: [(&str, &[u8], &str); 5] = [
        ("--hex", b"abc\n", "not hexadecimal"),
        ("--hex", b"xy\n", "not hexadecimal"),
        ("--length-prefixed", b"\0\x05abc", "within a datagram"),
        ("--length-prefixed", b"\0", "within a datagram"),
        ("--length-prefixed", b"\xff\xff", "within a datagram"),
    ];
    for (framing, stdin, reason) in cases {
        let (status, _, stderr) = outcome(&format!("udp {framing} -x {proxy} {echo}"), stdin);
        assert_eq!((status, stderr.lines().count(), stderr.contains(reason)), (Some(26), 1, true), "{stderr}");
    }
}

#[test]
fn udp_count_exits_after_n_answers_and_fails_if_answers_are_missing() {
    let ((_server, proxy), echo) = (serve(), udp_echo_server(V4));
    let started = Instant::now();
    let (status, stdout, stderr) = outcome(&format!("udp -n 2 -w 9 -x {proxy} {echo}"), b"a\nb\nc\nd\n");
    assert_eq!((status, stdout.lines().count()), (Some(0), 2), "{stderr}");
    assert!(started.elapsed() < Duration::from_secs(5), "the client waited after two answers");
    let (status, stdout, stderr) = outcome(&format!("udp -n 3 --connect-timeout 9 -w 1s -x {proxy} {echo}"), b"a\nb\n");
    assert_eq!((status, stdout.as_str()), (Some(28), "a\nb\n"));
    assert!(stderr.ends_with(": received 2 of 3 answers in time\n"), "{stderr}");
    // -q limits only the wait for answers.
    assert_eq!(outcome(&format!("udp -q 100ms -w 30 -x {proxy} {echo}"), b"a\n").0, Some(0));
}

#[test]
fn udp_count_succeeds_if_the_proxy_ends_the_association_after_the_last_answer() {
    let answer = "00 00 00 01 c0 00 02 07 00 07 \"hi\"";
    for _ in 0..10 {
        let proxy = ScriptedServer::start(&reply(&format!("05 00 00 {{relay}}; udp> {answer}; udp< {answer}")));
        assert_eq!(outcome(&format!("udp -n 1 -w 5 -x {} 192.0.2.7:7", proxy.addr), b"hi\n"), success("hi\n"));
    }
}

#[test]
fn udp_idle_timeout_exits_with_28() {
    let ((_server, proxy), echo) = (serve(), udp_echo_server(V4));
    let mut client = start(&format!("udp -i 400ms -x {proxy} {echo}"));
    client.write(b"x\n");
    let (status, stdout, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!((status.code(), stdout), (Some(28), b"x\n".to_vec()), "{stderr}");
    assert!(stderr.ends_with("idle for 400ms\n"), "{stderr}");
}

#[test]
fn udp_direct_and_no_proxy_bypass_the_proxy() {
    for ip in [V4, V6] {
        let echo = udp_echo_server(ip);
        let direct = outcome(&format!("udp --direct -n 2 -w 5 {echo}"), b"one\ntwo\n");
        assert_eq!(direct, success("one\ntwo\n"));
        let mut with_no_proxy = command(&format!("udp -n 1 -w 5 {echo}"));
        with_no_proxy.env("ALL_PROXY", "127.0.0.1:1").env("NO_PROXY", "127.0.0.0/8,::1");
        assert_eq!(outcome_of(&mut with_no_proxy, b"one\n"), success("one\n"));
    }
}

#[test]
fn udp_source_option_sets_the_address_of_datagrams() {
    let ((_server, proxy), target) = (serve(), socket());
    let addr = target.local_addr().expect("local address");
    assert_eq!(outcome(&format!("udp --direct -s 127.0.0.9 -w 0 {addr}"), b"x\n"), success(""));
    assert_eq!(receive(&target).1.ip().to_string(), "127.0.0.9");
    // The proxy accepts datagrams only from the address of the TCP connection.
    let args = format!("udp -s 127.0.0.9 -n 1 -w 5 -x {proxy} {}", udp_echo_server(V4));
    assert_eq!(outcome(&args, b"x\n"), success("x\n"));
}

#[test]
fn udp_z_reports_whether_association_succeeds() {
    let (_server, proxy) = serve();
    assert_eq!(outcome(&format!("udp -z -x {proxy}"), b""), success(""));
    let proxy = ScriptedServer::start(&reply("05 07 00 01 00*6"));
    assert_eq!(outcome(&format!("udp -z -x {}", proxy.addr), b""), failure(107, ""));
}

#[test]
fn udp_answers_dropped_by_a_full_buffer_are_reported() {
    let proxy = associating_proxy();
    // The reader of stdout sleeps, so that the pipe fills up.
    let client = format!("echo x | \"$0\" udp -w 2 --raw -x {} 192.0.2.7:7", proxy.addr);
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{client} | {{ sleep 1; cat >/dev/null; }}"), env!("CARGO_BIN_EXE_s5")]);
    let client = std::thread::spawn(move || outcome_of(&mut command, b""));
    let (_, from) = receive(&proxy.relay);
    // More than fit into the pipe, the client and the buffer of its socket.
    let buffer = SockRef::from(&proxy.relay).recv_buffer_size().expect("option read");
    for _ in 0..3000 + buffer / 1200 {
        proxy.relay.send_to(&datagram(&[b'x'; 1200]), from).expect("datagram sent");
    }
    let (_, _, stderr) = client.join().expect("the thread does not panic");
    assert!(stderr.contains("answers dropped: they arrived faster than they were read ("), "{stderr}");
}
