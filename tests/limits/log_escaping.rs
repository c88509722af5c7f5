//! Values from clients, targets and hops are escaped in the log, and secrets are never logged.

use crate::support::bytes::hex;
use crate::*;

/// Attacks on readers of the log: texts that end a line or a value, look like a number, control a terminal, or reverse
/// the following text.
pub const ATTACKS: [&[u8]; 28] = [
    b"\n",
    b"\t",
    b"12",
    b"\r\nts=2026-11-23T23:30:48.827Z level=warn msg=session id=1 from=1.2.3.4:5",
    b"\" error=\"login refused",
    b"\\",
    b"\\\"",
    b"\0",
    b"\x07",
    b"\x08",
    b"\x1b[2J",
    b"\x1b]0;title\x07",
    b"\x7f",
    b"\x80\x9b",
    b"\xff\xfe",
    "\u{85}".as_bytes(),
    "\u{9b}2J".as_bytes(),
    "\u{a0}".as_bytes(),
    "\u{ad}".as_bytes(),
    "\u{200b}".as_bytes(),
    "\u{200f}".as_bytes(),
    "\u{2028}".as_bytes(),
    "\u{202e}".as_bytes(),
    "\u{2066}".as_bytes(),
    "\u{feff}".as_bytes(),
    "\u{fff9}".as_bytes(),
    "\u{e0041}".as_bytes(),
    "\u{f8ff}".as_bytes(),
];

/// Returns a request for a domain name of arbitrary bytes.
fn request_bytes(command: u8, name: &[u8], port: u16) -> Vec<u8> {
    let length = u8::try_from(name.len()).expect("at most 255 bytes");
    [&[5, command, 0, 3, length], name, &port.to_be_bytes()].concat()
}

/// Fails unless all characters are letters or printable ASCII, and session lines have all keys.
fn assert_harmless(log: &str, session_count: usize) {
    for line in log.lines() {
        let harmful = line.chars().find(|c| !(c.is_ascii_graphic() || *c == ' ' || c.is_alphanumeric()));
        assert_eq!(harmful, None, "{line:?}");
        let is_logfmt = line.starts_with("ts=20") && line["ts=2026-11-23T23:30:48.827Z".len()..].starts_with(" level=");
        let is_plain = line.starts_with("20") && line["2026-11-23T23:30:48.827Z INFO  ".len()..].starts_with("[s5");
        assert!(is_logfmt || is_plain, "not a log line: {line}");
    }
    assert_eq!(session_lines(log).len(), session_count, "one line per session:\n{log}");
    for line in session_lines(log) {
        let mut keys: Vec<&str> = pairs(line).into_iter().map(|(key, _)| key).collect();
        let order = keys.iter().map(|key| KEYS.iter().position(|known| known == key).expect("a known key"));
        assert!(order.is_sorted(), "{line}");
        keys.retain(|key| ["id", "from", "up", "down", "seconds"].contains(key));
        assert_eq!(keys, ["id", "from", "up", "down", "seconds"], "{line}");
    }
}

/// The keys of a session line, in their order.
const KEYS: [&str; 17] = [
    "id",
    "from",
    "user",
    "method",
    "protection",
    "command",
    "to",
    "addr",
    "via",
    "outbound",
    "bnd",
    "rep",
    "targets",
    "up",
    "down",
    "seconds",
    "error",
];

/// Returns the keys and values of a session line, without the quotes of quoted values.
fn pairs(line: &str) -> Vec<(&str, &str)> {
    let (mut key, mut rest) = line.split_once('=').expect("a field");
    let mut pairs = Vec::new();
    loop {
        let (value, after) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_at(quote_at(quoted)),
            None => rest.split_at(rest.find(' ').unwrap_or(rest.len())),
        };
        assert!(key.bytes().all(|byte| byte.is_ascii_lowercase()), "{key}: {line}");
        pairs.push((key, value));
        let Some((_, next)) = after.split_once(' ') else { return pairs };
        (key, rest) = next.split_once('=').unwrap_or_else(|| panic!("no key: {line}"));
    }
}

/// The position of the first quote without a backslash.
fn quote_at(text: &str) -> usize {
    let mut escaped = false;
    let end = text.bytes().position(|byte| {
        let is_end = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        is_end
    });
    end.unwrap_or_else(|| panic!("no closing quote: {text}"))
}

/// Offers no authentication and sends a request. Each client has an address of its own, so that all lines are logged.
fn send_request(server: &Server, request: &[u8]) -> TcpStream {
    let mut stream = greet_from(server, unused_client_ip());
    stream.write_all(request).expect("data sent");
    stream
}

/// Starts a hop that runs a script of steps: read a number of bytes, then write these bytes.
fn hop(script: Vec<(usize, Vec<u8>)>) -> String {
    let addr = tcp_server(V4, move |mut stream| {
        for (reads, writes) in &script {
            let mut ignored = vec![0; *reads];
            if stream.read_exact(&mut ignored).is_err() || stream.write_all(writes).is_err() {
                return;
            }
        }
        let _ = stream.read_to_end(&mut Vec::new());
    });
    addr.to_string()
}

/// Returns a reply with a domain name in BND.
fn reply_with_name(rep: u8, name: &[u8]) -> Vec<u8> {
    [&[5, rep, 0, 3, u8::try_from(name.len()).expect("at most 255")], name, &[0, 80]].concat()
}

#[test]
fn domain_names_are_escaped_for_every_command_and_outcome() {
    // In a namespace without a resolver.
    enter_namespace!("", "");
    let port = closed_port().port();
    for args in [&[][..], &["--deny", "to=.evil"], &["--deny", "command=bind", "--deny", "to=127.0.0.0/8"]] {
        let server = Server::start(&[&["-v", "-v", "--connect-timeout", "300ms"], args].concat());
        let mut count = 0;
        let mut streams = Vec::new();
        for attack in ATTACKS {
            let name = [b"a", attack, b"b.evil"].concat();
            for command in [CONNECT, BIND, UDP_ASSOCIATE, 9] {
                streams.push(send_request(&server, &request_bytes(command, &name, port)));
                // The same request from a client that closes at once.
                drop(send_request(&server, &request_bytes(command, &name, port)));
                count += 2;
            }
        }
        let (mut control, rep, bnd) = open(&server, UDP_ASSOCIATE, "0.0.0.0:0".parse().expect("valid address"));
        assert_eq!(rep, 0);
        let socket = UdpSocket::bind("127.0.0.1:0").expect("free port");
        for attack in ATTACKS {
            let name = request_bytes(0, &[attack, b".evil"].concat(), port);
            socket.send_to(&[&[0, 0], &name[2..], b"data"].concat(), bnd).expect("datagram sent");
        }
        for stream in &mut streams {
            read_exact(stream, 2);
        }
        drop(streams);
        control.shutdown(std::net::Shutdown::Write).expect("half-closed");
        stream_end(&mut control);
        let log = server.wait_log(|log| session_lines(log).len() > count);
        assert_harmless(&log, count + 1);
        let has_exact_value =
            |line: &&str| pairs(line).contains(&("to", &format!(r#"a\" error=\"login refusedb.evil:{port}"#)));
        assert!(session_lines(&log).iter().any(has_exact_value), "{log}");
        let outcome = if args.is_empty() { "name not found" } else { "denied: --deny" };
        assert!(log.contains(outcome), "no request was processed:\n{log}");
    }
}

#[test]
fn hop_answers_are_escaped() {
    let unreachable = closed_port().to_string();
    let selection = |bytes: &[u8]| (3, bytes.to_vec());
    let is_text = |attack: &&&[u8]| std::str::from_utf8(attack).is_ok();
    let all = ATTACKS.iter().filter(is_text).copied().collect::<Vec<_>>().concat();
    for attack in [&all, &b"\\"[..]] {
        let name = [b"a", attack, b"b"].concat();
        let hops = [
            unreachable.clone(),
            hop(vec![selection(attack)]),
            hop(vec![selection(&[b"HTTP/1.1 400 ", attack, b"\r\n\r\n"].concat())]),
            hop(vec![selection(b"\x05\xff")]),
            hop(vec![selection(b"\x05\x00"), (7, reply_with_name(0, &name))]),
            hop(vec![selection(b"\x05\x00"), (7, reply_with_name(5, &name))]),
            hop(vec![selection(b"\x05\x00"), (7, reply_with_name(0x9B, &name))]),
            hop(vec![selection(b"\x05\x00"), (7, [reply_with_name(0, b"x"), reply_with_name(0, &name)].concat())]),
        ];
        for via in hops {
            let server = Server::start(&["-v", "-v", "--via", &via, "--connect-timeout", "300ms"]);
            let streams =
                [CONNECT, BIND, UDP_ASSOCIATE].map(|command| send_request(&server, &request_bytes(command, &name, 80)));
            for mut stream in streams {
                read_exact(&mut stream, 2);
                drop(stream);
            }
            let log = server.wait_log(|log| session_lines(log).len() == 3);
            assert_harmless(&log, 3);
        }
    }
}

#[test]
fn user_names_are_escaped_in_success_and_failure() {
    let valid_name = "ren\u{e9} \u{202e}\" rep=0";
    let (_dir, users) = users_file(&[(valid_name, "secret")]);
    let server = Server::start(&["--users", &users, "-v", "-v", "--max-per-user", "1"]);
    for (attack, n) in ATTACKS.iter().zip(1..) {
        assert_ne!(log_in(&server, [127, 9, 0, n], attack, b"wrong").1, 0);
    }
    let mut open_streams = Vec::new();
    for _ in 0..3 {
        open_streams.push(open_with_login(&server, (valid_name, "secret"), CONNECT, echo_server()));
    }
    drop(open_streams);
    let count = ATTACKS.len() + 3;
    let log = server.wait_log(|log| session_lines(log).len() >= count);
    assert_harmless(&log, count);
    let name = "user=\"ren\u{e9} \\u{202e}\\\" rep=0\"";
    assert_eq!(session_lines(&log).iter().filter(|line| line.contains(name)).count(), 3, "{log}");
}

#[test]
fn passwords_and_hashes_are_not_logged_at_trace_level() {
    let dir = temp_dir();
    let good = bcrypt_line("alice", "open-sesame", 4);
    let users = write_file(dir.path(), "users", &good);
    let hash = good.trim().split_once(':').expect("an entry").1;
    let refusing = hop(vec![(4, vec![5, 2]), (6, vec![]), (19, vec![1, 1])]);
    let http = hop(vec![(4, b"HTTP/1.1 400 no\r\n\r\n".to_vec())]);
    for to in [closed_port().to_string(), http, refusing, hop(vec![(4, vec![5, 2]), (6, vec![])])] {
        let via = format!("socks5h://hopper:hop%2Dsesame-two@{to}");
        let (named, rules) = (format!("other={via}"), write_file(dir.path(), "rules", "allow via=other port=81\n"));
        let args = ["-v", "-v", "--users", &users, "--via", &via, "--hop", &named, "--rules", &rules];
        let server = Server::start(&[&args[..], &["--connect-timeout", "300ms"]].concat());
        for passwd in ["wrong-sesame", "open-sesame-not", ""] {
            assert_ne!(log_in(&server, unused_client_ip(), b"alice", passwd.as_bytes()).1, 0);
        }
        for port in [80, 81] {
            let dst = SocketAddr::from(([192, 0, 2, 1], port));
            assert_ne!(open_with_login(&server, ("alice", "open-sesame"), CONNECT, dst).1, 0);
        }
        server.wait_log(|log| session_lines(log).len() == 5);
        for bad in [format!("{good}bob{hash}\n"), format!("{good}bob:{hash}!\n"), good.trim().into(), String::new()] {
            std::fs::write(&users, bad).expect("file written");
            server.reload();
        }
        std::fs::write(&users, &good).expect("file written");
        let log = server.log();
        let secrets = ["sesame", hash, &hash[7..29], &hash[29..]];
        assert_eq!(secrets.into_iter().find(|secret| log.contains(secret)), None, "{log}");
    }
}

/// Prints the keys of each line, the keys of its numbers, and the bytes of its user name. Fails if a line is not an object,
/// or has a key twice.
const READ_JSON: &str = "
import json, sys
def pairs(pairs):
    assert len(dict(pairs)) == len(pairs), pairs
    return dict(pairs)
for line in sys.stdin:
    fields = json.loads(line, object_pairs_hook=pairs)
    numbers = [key for key, value in fields.items() if not isinstance(value, str)]
    print(fields['msg'], ','.join(fields), ','.join(numbers), fields.get('user', '').encode().hex(' '), sep='|')
";

#[test]
fn json_lines_have_the_values_that_clients_sent() {
    if !is_installed("python3") {
        return;
    }
    let (_dir, users) = users_file(&[("alice", "secret")]);
    let server = Server::start(&["--users", &users, "-vv", "--log-format", "json", "--outbound", "127.0.0.1"]);
    for uname in ATTACKS {
        assert_ne!(log_in(&server, unused_client_ip(), uname, b"wrong").1, 0, "{}", uname.escape_ascii());
    }
    let (mut stream, status) = log_in(&server, unused_client_ip(), b"alice", b"secret");
    assert_eq!(status, 0);
    stream.write_all(&request_bytes(CONNECT, b"a\"b\\.test", 80)).expect("request sent");
    assert_ne!(read_reply(&mut stream).0, 0);
    drop(stream);
    assert_eq!(open_with_login(&server, ("alice", "secret"), CONNECT, echo_server()).1, 0);
    server.signal("USR1");
    let ended = |log: &str| log.matches("\"msg\":\"session\"").count();
    let log = server.wait_log(|log| ended(log) > ATTACKS.len() + 1 && log.contains("\"msg\":\"counters\""));
    assert!(log.contains(r#""to":"a\"b\\.test:80""#) && log.contains(r#","outbound":"127.0.0.1","#), "{log}");
    let read =
        String::from_utf8(stdout(Command::new("python3").args(["-c", READ_JSON]), log.as_bytes())).expect("ASCII");
    let (mut names, mut kinds) = (Vec::new(), BTreeSet::new());
    for line in read.lines() {
        let fields: Vec<&str> = line.split('|').collect();
        let [kind, keys, numbers, user] = fields[..] else { panic!("{line}") };
        kinds.insert(kind);
        assert!(keys.starts_with("ts,level,msg"), "{line}");
        if kind == "session" {
            assert!(keys.split(',').skip(3).all(|key| KEYS.contains(&key)), "{line}");
            assert!(["id,up,down,seconds", "id,rep,up,down,seconds"].contains(&numbers), "{line}");
            names.push(user.to_owned());
        }
    }
    let expected = ["detail", "session", "counters", "start", "greeting", "login", "lookup", "request"];
    assert!(expected.iter().all(|kind| kinds.contains(kind)), "{kinds:?}");
    let is_text = |uname: &[u8]| std::str::from_utf8(uname).is_ok();
    // Bytes that are not UTF-8 keep their escapes.
    let value =
        |uname: &[u8]| if is_text(uname) { uname.to_vec() } else { uname.escape_ascii().to_string().into_bytes() };
    let expected = ATTACKS.iter().map(|uname| hex(&value(uname)));
    names.sort_unstable();
    let mut expected: Vec<String> = expected.chain([(); 2].map(|()| hex(b"alice"))).collect();
    expected.sort_unstable();
    assert_eq!(names, expected);
    let output = run(s5().args(["serve", "--log-format", "json", "--rules", "/nonexistent"]), b"", TIMEOUT);
    let stderr = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(
        stderr.contains("\"level\":\"error\",\"msg\":\"detail\",\"module\":\"s5\",\"text\":\"--rules /nonexistent: ")
    );
    stdout(Command::new("python3").args(["-c", READ_JSON]), stderr.as_bytes());
}
