//! Every way in which a handshake can fail: its exit status, and its one line.

use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{SOON, closed_port, echo_server, in_namespace, run, s5};
use crate::scripted::{NO_AUTH, PASSWORD, SUCCESS, Scripted, Step, WELCOME, answer, say, text};

use Step::{Greeting, Login, Request, Reset, Silence};

const TARGET: &str = "target.example:80";
/// The shortest wait in which a loaded machine still comes to the point where a script falls silent.
const WAIT: &str = "500ms";

/// One way to fail.
struct Case {
    userinfo: &'static str,
    script: Vec<Step>,
    status: i32,
    phase: &'static str,
    reason: String,
}

fn case(script: Vec<Step>, status: i32, phase: &'static str, reason: &str) -> Case {
    Case { userinfo: "", script, status, phase, reason: reason.into() }
}

/// As `case`, with a user name and a password; the script begins behind the selection of that method.
fn login_case(script: Vec<Step>, status: i32, phase: &'static str, reason: &str) -> Case {
    let script = [Greeting, say(PASSWORD), Login].into_iter().chain(script).collect();
    Case { userinfo: "alice:secret@", script, status, phase, reason: reason.into() }
}

/// As `case`; the script begins behind the request.
fn request_case(script: Vec<Step>, status: i32, reason: &str) -> Case {
    let script = [Greeting, say(NO_AUTH), Request].into_iter().chain(script).collect();
    case(script, status, "request", reason)
}

/// Runs `s5 connect` for each case, all at once.
fn check(cases: Vec<Case>) {
    thread::scope(|scope| {
        for case in cases {
            scope.spawn(move || {
                let Case { userinfo, script, status, phase, reason } = case;
                let proxy = Scripted::start(script);
                let wait = if status == 28 { WAIT } else { "10" };
                let url = format!("{userinfo}{}", proxy.url());
                let output = run(s5().args(["connect", "-w", wait, "-x", &url, TARGET]), b"unsent", SOON);
                let line = format!("s5: proxy {}: {phase}, for {TARGET}: {reason}\n", proxy.addr);
                assert_eq!((output.status.code(), text(&output.stderr)), (Some(status), line));
                assert!(output.stdout.is_empty(), "stdout is data");
            });
        }
    });
}

#[test]
fn every_rep_has_a_status_of_its_own_and_its_number_and_name() {
    let names = [
        "general SOCKS server failure",
        "not allowed by ruleset",
        "network unreachable",
        "host unreachable",
        "connection refused",
        "TTL expired",
        "command not supported",
        "address type not supported",
        "unassigned reply code",
    ];
    let reps = (1..=9).chain([255]);
    let cases = reps.map(|rep: u8| {
        let reply = [5, rep, 0, 1, 0, 0, 0, 0, 0, 0];
        let name = names[usize::from(rep.min(9)) - 1];
        request_case(vec![say(&reply), Silence], 100 + i32::from(rep.min(9)), &format!("{name} (REP {rep})"))
    });
    check(cases.collect());
}

#[test]
fn a_failure_reply_that_ends_behind_rep_still_tells_the_rep() {
    let refused = "connection refused (REP 5)";
    check(vec![
        request_case(vec![say(&[5, 5])], 105, refused),
        request_case(vec![say(&[5, 5, 0, 0, 0, 0, 0, 0])], 105, refused),
        request_case(vec![say(&[5, 5, 0])], 105, refused),
        request_case(vec![say(&[5, 5, 0, 1, 127])], 105, refused),
    ]);
}

#[test]
fn silence_ends_with_the_wait_and_the_phase_is_named() {
    let late = "timed out after 0.5 s";
    check(vec![
        case(vec![Silence], 28, "greeting", late),
        case(vec![Greeting, say(&[5]), Silence], 28, "greeting", late),
        login_case(vec![Silence], 28, "login", late),
        login_case(vec![say(&[1]), Silence], 28, "login", late),
        login_case(vec![say(WELCOME), Silence], 28, "request", late),
        request_case(vec![Silence], 28, late),
        request_case(vec![say(&[5, 0, 0, 3, 200, b'x']), Silence], 28, late),
    ]);
}

#[test]
fn a_proxy_that_never_accepts_is_given_up_after_the_wait() {
    // A backlog that is full drops what else comes.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
    socket.listen(0).expect("it listens");
    let addr = socket.local_addr().ok().and_then(|addr| addr.as_socket()).expect("an address");
    let mut waiting = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&addr, Duration::from_millis(100)) {
        waiting.push(stream);
    }
    let proxy = addr.to_string();
    let output = run(s5().args(["connect", "-w", "200ms", "-x", &proxy, TARGET]), b"", SOON);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(28), "{said}");
    assert!(said.starts_with(&format!("s5: proxy {addr}: connecting to the proxy, for {TARGET}: timed out")), "{said}");
}

#[test]
fn a_drip_does_not_renew_the_wait() {
    let name = [&[5, 0, 0, 3, 255][..], &[b'x'; 255], &[0, 80]].concat();
    let script = vec![Greeting, say(NO_AUTH), Request, Step::Drip(name.repeat(20))];
    let proxy = Scripted::start(script);
    let began = Instant::now();
    let output = run(s5().args(["bind", "-w", "200ms", "-x", &proxy.url()]), b"", SOON);
    assert_eq!(output.status.code(), Some(28), "{}", text(&output.stderr));
    assert!(began.elapsed() >= Duration::from_millis(200));
}

#[test]
fn a_proxy_that_closes_is_named_with_the_phase() {
    let closed = "the proxy closed the connection";
    check(vec![
        case(vec![Greeting], 97, "greeting", closed),
        case(vec![Greeting, say(&[5])], 97, "greeting", closed),
        login_case(vec![], 97, "login", closed),
        login_case(vec![say(&[1])], 97, "login", closed),
        login_case(vec![say(WELCOME), Request], 97, "request", closed),
        request_case(vec![], 97, closed),
        request_case(vec![say(&[5])], 97, closed),
        request_case(vec![say(&[5, 0])], 97, closed),
        request_case(vec![say(&SUCCESS[..9])], 97, closed),
    ]);
}

#[test]
fn a_proxy_that_resets_is_named_with_the_phase() {
    let reset = "Connection reset by peer (os error 104)";
    check(vec![
        case(vec![Greeting, Reset], 97, "greeting", reset),
        login_case(vec![Reset], 97, "login", reset),
        login_case(vec![say(WELCOME), Request, Reset], 97, "request", reset),
        request_case(vec![Reset], 97, reset),
    ]);
}

#[test]
fn a_proxy_that_resets_at_once_is_a_failure_of_the_proxy() {
    let proxy = Scripted::start(vec![Reset]);
    let output = run(s5().args(["connect", "-x", &proxy.url(), TARGET]), b"", SOON);
    // Whether the reset meets connect(2) or what follows is a matter of microseconds.
    assert!(matches!(output.status.code(), Some(7 | 97)), "{:?}", output.status);
    assert_eq!(text(&output.stderr).lines().count(), 1, "{}", text(&output.stderr));
}

#[test]
fn what_is_not_socks5_is_told_from_what_it_says() {
    let not = |what: &str| format!("not a SOCKS5 server ({what})");
    let foreign = |first: &[u8], what: &str| case(vec![Greeting, say(first)], 97, "greeting", &not(what));
    check(vec![
        foreign(b"HTTP/1.1 400 Bad Request\r\n\r\n", "it answered 0x48 'H', HTTP?"),
        foreign(&[0x15, 3, 1, 0, 2, 2, 70], "it answered 0x15, TLS?"),
        foreign(b"SSH-2.0-OpenSSH_9.2\r\n", "it answered 0x53 'S', SSH?"),
        foreign(&[0, 0x5b, 0, 0, 0, 0, 0, 0], "it answered 0x00, SOCKS4?"),
        foreign(&[0xff; 8], "it answered 0xff"),
        foreign(&[0x1b, b'[', b'2', b'J'], "it answered 0x1b"),
    ]);
}

#[test]
fn a_server_that_speaks_first_is_told_from_what_it_says() {
    // As an SSH server does.
    let script = vec![say(b"SSH-2.0-OpenSSH_9.2\r\n"), Silence];
    let reason = "not a SOCKS5 server (it answered 0x53 'S', SSH?)";
    check(vec![case(script, 97, "greeting", reason)]);
}

#[test]
fn an_echo_server_is_not_taken_for_a_proxy() {
    let proxy = echo_server().to_string();
    for (url, phase, what) in [
        (proxy.clone(), "greeting", "it selected gssapi, which was not offered"),
        (format!("alice:secret@{proxy}"), "login", "sub-negotiation version 0 instead of 1"),
    ] {
        let output = run(s5().args(["connect", "-x", &url, TARGET]), b"", SOON);
        let line = format!("s5: proxy {proxy}: {phase}, for {TARGET}: not a SOCKS5 server ({what})\n");
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(97), line));
    }
}

#[test]
fn a_wrong_version_is_an_error_in_every_message() {
    let not = |what: &str| format!("not a SOCKS5 server ({what})");
    check(vec![
        case(vec![Greeting, say(&[4, 0])], 97, "greeting", &not("it answered 0x04, SOCKS4?")),
        login_case(vec![say(&[5, 0])], 97, "login", &not("sub-negotiation version 5 instead of 1")),
        request_case(vec![say(&[4, 0, 0, 1, 0, 0, 0, 0, 0, 0])], 97, &not("it answered 0x04, SOCKS4?")),
        request_case(vec![say(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0])], 97, &not("it answered 0x01")),
    ]);
}

#[test]
fn a_reply_with_an_unknown_atyp_is_an_error() {
    let reason = "not a SOCKS5 server (unknown address type 2)";
    check(vec![request_case(vec![say(&[5, 0, 0, 2, 0, 0, 0, 0, 0, 0])], 97, reason)]);
}

#[test]
fn a_method_that_was_not_offered_is_an_error() {
    let not = |what: &str| format!("not a SOCKS5 server (it selected {what}, which was not offered)");
    check(vec![
        case(vec![Greeting, say(&[5, 1])], 97, "greeting", &not("gssapi")),
        // Without credentials the password is not offered, and nothing is ever made up.
        case(vec![Greeting, say(&[5, 2])], 97, "greeting", &not("password")),
        case(vec![Greeting, say(&[5, 0x80])], 97, "greeting", &not("method 0x80")),
    ]);
}

#[test]
fn a_proxy_that_does_not_let_us_in_is_a_login_failure() {
    let no_method = "no acceptable authentication method (does it want user:password@, or a Kerberos ticket?)";
    let refused = "user name or password refused";
    check(vec![
        case(vec![Greeting, say(&[5, 255])], 67, "greeting", no_method),
        login_case(vec![say(&[1, 1])], 67, "login", refused),
        login_case(vec![say(&[1, 255])], 67, "login", refused),
    ]);
}

#[test]
fn a_proxy_that_is_down_is_told_from_a_target_that_is() {
    let proxy = closed_port().to_string();
    for mode in [&["connect", TARGET][..], &["bind", TARGET], &["udp", TARGET]] {
        let output = run(s5().args(mode).args(["-x", &proxy]), b"", SOON);
        let reason = "connection refused (is the proxy running?)";
        let line = format!("s5: proxy {proxy}: connecting to the proxy, for {TARGET}: {reason}\n");
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(7), line));
    }
}

#[test]
fn a_unix_socket_that_is_not_there_is_a_proxy_that_is_down() {
    let output = run(s5().args(["connect", "-x", "unix:/nonexistent/s5.sock", TARGET]), b"", SOON);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(7), "{said}");
    assert!(said.starts_with("s5: proxy unix:/nonexistent/s5.sock: connecting to the proxy, for"), "{said}");
}

#[test]
fn a_proxy_whose_name_can_not_be_resolved_has_its_own_status() {
    if !in_namespace(
        "failures::a_proxy_whose_name_can_not_be_resolved_has_its_own_status",
        "127.0.0.1 localhost\n",
        "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
    ) {
        return;
    }
    for (name, reason) in [("proxy.example", "temporary failure in name resolution"), ("a..b", "name not found")] {
        let output = run(s5().args(["connect", "-x", name, TARGET]), b"", SOON);
        let line = format!("s5: proxy {name}:1080: resolving the proxy's name, for {TARGET}: {reason}\n");
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(5), line));
    }
}

#[test]
fn a_failure_at_the_second_hop_names_the_second_hop() {
    let dead = closed_port();
    let first = Scripted::start(answer(&[5, 5, 0, 1, 0, 0, 0, 0, 0, 0]));
    let chain = format!("{},{dead}", first.addr);
    let output = run(s5().args(["connect", "-x", &chain, TARGET]), b"", SOON);
    let line = format!("s5: proxy {}: request, for {dead}: connection refused (REP 5)\n", first.addr);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(7), line));

    // A first hop that leads to something else than a proxy.
    let first = Scripted::start(answer(SUCCESS).into_iter().chain([Greeting, say(b"HTTP/1.1 400")]).collect());
    let chain = format!("{},second.example:99", first.addr);
    let output = run(s5().args(["connect", "-x", &chain, TARGET]), b"", SOON);
    let reason = "not a SOCKS5 server (it answered 0x48 'H', HTTP?)";
    let line = format!("s5: proxy second.example:99: greeting, for {TARGET}: {reason}\n");
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(97), line));
}

#[test]
fn what_a_proxy_says_can_not_drive_the_terminal() {
    // The peer's name in the second reply to BIND comes from outside as well as anything.
    let hostile = b"\x1b[2Jowned";
    let name = [&[5, 0, 0, 3, 9][..], hostile, &[0, 80]].concat();
    let proxy = Scripted::start(answer(SUCCESS).into_iter().chain([say(&name)]).collect());
    let output = run(s5().args(["bind", "-v", "-x", &proxy.url()]), b"", SOON);
    assert!(!output.stderr.contains(&0x1b), "{:?}", text(&output.stderr));
    assert!(text(&output.stderr).ends_with("accepted 0.0.0.0:0\n"), "{:?}", text(&output.stderr));
}

#[test]
fn every_mode_fails_alike() {
    for mode in [&["connect", TARGET][..], &["bind", TARGET], &["udp", TARGET]] {
        let cases = [
            (answer(&[5, 2, 0, 1, 0, 0, 0, 0, 0, 0]), 102, "request", "not allowed by ruleset (REP 2)"),
            (vec![Greeting], 97, "greeting", "the proxy closed the connection"),
        ];
        for (script, status, phase, reason) in cases {
            let proxy = Scripted::start(script);
            let output = run(s5().args(mode).args(["-x", &proxy.url()]), b"", SOON);
            let line = format!("s5: proxy {}: {phase}, for {TARGET}: {reason}\n", proxy.addr);
            assert_eq!((output.status.code(), text(&output.stderr)), (Some(status), line), "{mode:?}");
            assert!(output.stdout.is_empty());
        }
    }
}
