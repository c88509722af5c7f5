//! --explain with lines of the log, of the server and of its earlier versions.

use super::tools::alice_and_bob;
use crate::*;

/// Log lines, each with the request that `--explain` prints for it.
const LOG_LINES: [(&str, &str); 11] = [
    (
        "id=8 from=192.0.2.7:50000 proxy=127.0.0.1:40000 user=\"alice\" method=password command=connect to=\"a.test:25\"",
        "from=192.0.2.7 user=alice method=password protection=none command=connect to=a.test:25",
    ),
    (
        "ts=2026-11-26T21:17:50.123Z level=info msg=session id=7f3a from=192.0.2.7:50000 user=\"alice\" method=password \
         command=connect to=\"a.test:25\" addr=198.51.100.1:25 bnd=- rep=2 up=0 down=0 seconds=0.001 \
         error=\"denied: rules line 1 (deny port=25 to=a.test)\"",
        "from=192.0.2.7 user=alice method=password protection=none command=connect to=a.test:25 addr=198.51.100.1:25",
    ),
    (
        "Nov 26 21:17:50 host s5[71]: <6>level=info msg=session id=7 from=[2001:db8::7]:50000 user=\"alice\" \
         method=password command=udp to=\"0.0.0.0:0\" addr=- via=\"far \\\"away\\\"\" bnd=127.0.0.1:9 rep=0 x=new",
        "from=2001:db8::7 user=alice method=password protection=none command=udp to=0.0.0.0:0",
    ),
    (
        "msg=datagram id=7 from=192.0.2.7:50000 user=\"alice\" command=udp addr=[2001:db8::1]:53",
        "from=192.0.2.7 user=alice method=password protection=none command=udp to=[2001:db8::1]:53 \
         addr=[2001:db8::1]:53",
    ),
    (
        "2026-11-26T21:17:50.123Z INFO  [s5::server::session_log] session client=192.0.2.7:50000 \
         user=\"a\\xff, \\\"b\\\"\" command=connect dst=\"a.test:25\" bnd=- rep=2 up=0 down=0 seconds=0.001 \
         error=\"denied: x (deny to=a, b)\"",
        "from=192.0.2.7 user=a%FF%2C%20%22b%22 method=password protection=none command=connect to=a.test:25",
    ),
    (
        "session client=192.0.2.7:50000 user=\"eve@CORP\" protection=integrity command=bind dst=\"10.0.0.1:0\" rep=0",
        "from=192.0.2.7 user=eve@CORP method=gssapi protection=integrity command=bind to=10.0.0.1",
    ),
    (
        "session client=unix user=- command=connect dst=\"[2001:db8::1]:443\" bnd=- rep=5",
        "from=127.0.0.1 method=none protection=none command=connect to=[2001:db8::1]:443",
    ),
    (
        "from=[fe80::7%eth0]:50000 user=\"bob@corp\" command=connect to=\"b\\u{fc}cher/@:80\" rep=4",
        "from=fe80::7 user=bob@corp method=password protection=none command=connect to=bücher/@:80",
    ),
    (
        "from=10.1.1.1:5555 user=\"jos\u{e9} \\u{202e}\" to=\"a.test:25\"",
        "from=10.1.1.1 user=jos%C3%A9%20%E2%80%AE method=password protection=none command=connect to=a.test:25",
    ),
    ("client=192.0.2.7 dst=a.test:25", "from=192.0.2.7 method=none protection=none command=connect to=a.test:25"),
    (
        "from=10.1.1.1:5555 user=al%20ice to=a.test port=25",
        "from=10.1.1.1 user=al%20ice method=password protection=none command=connect to=a.test:25",
    ),
];

fn explain(args: &[&str], request: &str) -> Output {
    run(s5().arg("serve").args(args).args(["--explain", request]), b"", TIMEOUT)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn explain_accepts_lines_of_the_log() {
    let dir = temp_dir();
    let users = write_file(dir.path(), "users", alice_and_bob());
    let args = ["--users", &users, "--deny", "port=25", "--deny", ""];
    for (line, expected) in LOG_LINES {
        let output = explain(&args, line);
        let shown = text(&output.stdout);
        assert_eq!(shown.lines().next(), Some(&*format!("request {expected}")), "{line}: {}", text(&output.stderr));
        // What s5 prints is a request too, unless the name is none that a user could write.
        if !expected.contains("/@") {
            assert_eq!(text(&explain(&args, expected).stdout), shown, "{line}");
        }
    }
}

#[test]
fn explain_decides_about_the_address_of_a_log_line_without_a_lookup() {
    let args = ["--deny", "to=198.51.100.0/24", "--allow", "to=.test port=80"];
    let rows = [
        ("198.51.100.1", 1, "deny 198.51.100.1: --deny (deny to=198.51.100.0/24)\ndeny\n"),
        ("203.0.113.1", 0, "allow 203.0.113.1: --allow (allow to=.test port=80)\nallow\n"),
    ];
    for (addr, status, expected) in rows {
        let line = format!("msg=session from=192.0.2.7:5 user=- to=\"a.test:80\" addr={addr}:80 rep=2");
        let output = explain(&args, &line);
        let shown = text(&output.stdout);
        assert_eq!((shown.split_once('\n').expect("lines").1, output.status.code()), (expected, Some(status)));
    }
}

#[test]
fn explain_decides_like_the_server_about_addresses_that_are_sent_as_names() {
    let rules = ["--deny", "to=::1", "--deny", "to=.test"];
    let server = Server::start(&rules);
    for (name, port) in [("::1", 9), ("[::1]", 9), ("a:b.test", 9)] {
        assert_eq!(open_by_name(&server, CONNECT, name, port).1, 2, "{name}");
    }
    let log = server.wait_log(|log| session_lines(log).len() == 3);
    for line in session_lines(&log) {
        let output = explain(&rules, line);
        assert_eq!(output.status.code(), Some(1), "{line}: {}{}", text(&output.stdout), text(&output.stderr));
    }
}

#[test]
fn explain_of_a_bind_decides_about_address_and_port_of_the_peer_of_the_log_line() {
    let rules = ["--deny", "to=198.51.100.0/24 port=80", "--allow", "port=443", "--deny", ""];
    let rows = [
        ("0.0.0.0:0", "198.51.100.1:80", "deny 198.51.100.1: --deny (deny to=198.51.100.0/24 port=80)"),
        ("[::]:5000", "198.51.100.1:443", "allow 198.51.100.1: --allow (allow port=443)"),
        ("198.51.100.1:0", "198.51.100.1:443", "allow 198.51.100.1: --allow (allow port=443)"),
        ("198.51.100.1:443", "198.51.100.1:80", "allow 198.51.100.1: --allow (allow port=443)"),
    ];
    for (to, addr, expected) in rows {
        let line = format!("msg=session from=192.0.2.7:5 command=bind to=\"{to}\" addr={addr} rep=0");
        let output = explain(&rules, &line);
        assert_eq!(text(&output.stdout).lines().nth(1), Some(expected), "{line}: {}", text(&output.stderr));
    }
}

#[test]
fn explain_of_a_bind_or_udp_request_allows_it_before_the_address_is_known() {
    let server = Server::start(&[]);
    for (command, dst) in
        [(BIND, "0.0.0.0:0"), (BIND, "127.0.0.1:0"), (BIND, "[::]:5000"), (UDP_ASSOCIATE, "0.0.0.0:0")]
    {
        drop(open(&server, command, addr(dst)));
    }
    let log = server.wait_log(|log| session_lines(log).len() == 4);
    for line in session_lines(&log) {
        let output = explain(&[], line);
        let expected = "\nwait for an address (add addr=IP:PORT): built in (allow)\nallow\n";
        assert!(text(&output.stdout).ends_with(expected), "{line}: {}", text(&output.stdout));
        assert_eq!(output.status.code(), Some(0), "{line}: {}", text(&output.stderr));
        assert_eq!(explain(&["--deny", ""], line).status.code(), Some(1), "{line}");
    }
    let incomplete = explain(&[], "command=udp to=192.0.2.1");
    assert_eq!(text(&incomplete.stderr), "s5: --explain: to=192.0.2.1 has no port (write to=HOST:PORT)\n");
}

#[test]
fn explain_decides_about_port_0_of_a_log_line() {
    let server = Server::start(&["--deny", "port=25", "-v"]);
    for (name, port) in [("127.0.0.1", 0), ("localhost", 0)] {
        assert_eq!(open_by_name(&server, CONNECT, name, port).1, 3, "{name}");
    }
    let association = super::tools::associate_anonymously(&server);
    association.send(addr("127.0.0.1:0"), b"dropped");
    let log = server.wait_log(|log| session_lines(log).len() == 2 && !steps(log, "drop").is_empty());
    for line in session_lines(&log).into_iter().chain(steps(&log, "drop")) {
        let output = explain(&["--deny", "port=25"], &format!("msg=x {line}"));
        let shown = text(&output.stdout);
        assert!(
            shown.contains(":0\n") && shown.ends_with(": not a unicast address, or port 0\ndeny\n"),
            "{line}: {shown}"
        );
        assert_eq!(output.status.code(), Some(1), "{line}: {}", text(&output.stderr));
        let again = shown.lines().next().and_then(|line| line.strip_prefix("request ")).expect("the request");
        assert_eq!(text(&explain(&["--deny", "port=25"], again).stdout), shown);
    }
    // A hop may accept it.
    let hop = ["--via", "192.0.2.1", "--explain", "to=127.0.0.1:0"];
    assert!(run(s5().arg("serve").args(hop), b"", TIMEOUT).status.success());
}

#[test]
fn explain_denies_what_no_rule_can_allow() {
    let server = Server::start(&["--deny", "to=192.0.2.1"]);
    for target in ["224.0.0.251:5353", "255.255.255.255:80", "[ff02::1]:80"] {
        let output = explain(&[], &format!("to={target}"));
        let shown = text(&output.stdout);
        assert!(shown.ends_with(": not a unicast address, or port 0\ndeny\n"), "{target}: {shown}");
        assert_eq!((output.status.code(), open(&server, CONNECT, addr(target)).1), (Some(1), 3), "{target}");
    }
    // A rule can name a target of datagrams, and a hop can reach any address.
    assert_eq!(explain(&["--allow", "to=224.0.0.0/4"], "command=udp to=224.0.0.251:5353").status.code(), Some(0));
    assert_eq!(explain(&["--via", "127.0.0.1:9"], "to=224.0.0.251:5353").status.code(), Some(0));
}

#[test]
fn explain_of_the_log_line_of_a_denial_names_the_rule_of_the_line() {
    let args = ["--allow", "port=80", "--deny", "port=25"];
    let server = Server::start(&args);
    open(&server, CONNECT, addr("127.0.0.1:25"));
    let log = server.wait_log(|log| log.contains("denied: --deny"));
    let line = log.lines().find(|line| line.contains("denied: --deny")).expect("the line is in the log");
    let output = explain(&args, line);
    let expected = "\ndeny 127.0.0.1: --deny (deny port=25)\ndeny\n";
    assert!(text(&output.stdout).ends_with(expected), "{line}: {}{}", text(&output.stdout), text(&output.stderr));
}
