//! The fail2ban filter of src/policy/README.md on the log of a server. Each failed login is one match with the right
//! address, and values that a client chooses neither add nor hide a match.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::log_escaping::ATTACKS;
use crate::*;

/// The filter in the README.
fn filter() -> String {
    let readme = include_str!("../../src/policy/README.md");
    let blocks = readme.split("\n```").skip(1).step_by(2).filter_map(|block| block.split_once('\n'));
    let mut filters = blocks.map(|(_, text)| text).filter(|text| text.contains("[Definition]"));
    format!("{}\n", filters.next().expect("a filter in the README").trim())
}

#[test]
fn filter_of_the_package_is_that_of_the_page() {
    assert_eq!(include_str!("../../src/dist/s5.fail2ban"), filter());
}

/// The end of a log line of another client's failed login. Sent as a user name to forge that line.
const FORGED: &str = "x\" up=0 down=0 seconds=0.001 error=\"login refused\"";

/// User names that try to forge or hide a match.
fn user_names() -> Vec<Vec<u8>> {
    let line = format!("ts=2026-11-23T23:30:48.827Z level=warn msg=session id=1 from=1.2.3.4:5 user=\"{FORGED}");
    let line = line.split_at(line.len().min(250)).0;
    let ends_of_line = ["\n", "\r\n", "\u{2028}", "\u{85}", "\x0b\x0c"].map(|end| format!("{end}{line}"));
    let texts = [
        "alice",
        "\\\\\\",
        "a\" rep=0 error=\"other",
        "a\" from=1.2.3.4:5 user=\"b",
        "a msg=session id=1 from=1.2.3.4:5 user=\"b",
        FORGED,
        &format!("{FORGED}\n"),
        "<HOST> <F-ID>1.2.3.4</F-ID> %(known/failregex)s",
        "\x1b[2K\x1b[1A",
        " ",
    ];
    let texts = texts.into_iter().chain(ends_of_line.iter().map(String::as_str)).map(|text| text.as_bytes().to_vec());
    let long = [b'"', b'\\', b'\n', 0, b'a', 0xFF].map(|byte| vec![byte; 255]);
    texts.chain(ATTACKS.map(<[u8]>::to_vec)).chain(long).collect()
}

/// Returns the matches of the filter in a log: addresses and times, in the order of the log.
fn matches(dir: &Path, log: &str, zone: &str) -> Vec<(String, f64)> {
    let [log, filter] = [("log", log), ("s5.conf", &filter())].map(|(name, text)| write_file(dir, name, text));
    let mut command = Command::new("fail2ban-regex");
    command.args(["--out", "<ip> <time>", &log, &filter]).env("TZ", zone);
    let output = run(&mut command, b"", TIMEOUT * 3);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(stderr.is_empty(), "{stderr}");
    let parse = |line: &str| {
        let (ip, time) = line.split_once(' ').unwrap_or_else(|| panic!("{stdout}"));
        (ip.to_owned(), time.parse().unwrap_or_else(|_| panic!("{stdout}")))
    };
    stdout.lines().map(parse).collect()
}

/// Returns the addresses of [`matches`], sorted.
fn addresses(found: Vec<(String, f64)>) -> Vec<String> {
    let mut addresses: Vec<_> = found.into_iter().map(|(ip, _)| ip).collect();
    addresses.sort_unstable();
    addresses
}

#[test]
fn fail2ban_filter_matches_each_failed_login_once_and_nothing_else() {
    if !is_installed("fail2ban-regex")
        || !in_namespace("fail2ban::fail2ban_filter_matches_each_failed_login_once_and_nothing_else", "", "")
    {
        return;
    }
    ["logfmt", "json"].into_iter().for_each(check_filter);
}

/// Compares the matches with the failed logins, with an access log in this format.
fn check_filter(format: &str) {
    let valid_name = "a\" error=\"login refused";
    let (_dir, users) = users_file(&[("alice", "secret"), (valid_name, "secret")]);
    let args = ["--listen", "[::1]:0", "--users", &users, "--deny", "to=.evil", "--max-per-user", "2", "-v", "-v"];
    let args = [&args[..], &["--proxy-protocol-from", "127.11.8.8"]].concat();
    let logs = temp_dir();
    let file = logs.path().join("access.log").display().to_string();
    let args = [&args[..], &["--log-format", format, "--access-log", &file]].concat();
    let server = serve("127.0.0.1:0", 2, &args);
    let mut expected = Vec::new();
    let names = user_names();
    for (uname, n) in names.iter().zip(1..) {
        assert_ne!(log_in(&server, [127, 11, 0, n], uname, b"wrong").1, 0, "{}", uname.escape_ascii());
        expected.push(Ipv4Addr::new(127, 11, 0, n).to_string());
    }
    for uname in names.iter().take(4) {
        let mut stream = connect_from(SocketAddr::new(V6, 0), server.addrs[1]);
        select_password(&mut stream);
        // The login counts as failed even if the client does not wait for the answer.
        stream.write_all(&login_message(uname, b"wrong")).expect("data sent");
        stream.shutdown(Shutdown::Write).expect("half-closed");
        stream_end(&mut stream);
        expected.push(V6.to_string());
    }
    // Behind a load balancer, the client is matched.
    for (family, client) in [("TCP4", "192.0.2.7"), ("TCP6", "2001:db8::7")] {
        let mut stream = connect_from_ip(&server, [127, 11, 8, 8]);
        write!(stream, "PROXY {family} {client} {client} 4000 1080\r\n").expect("header sent");
        select_password(&mut stream);
        assert_ne!(send_login(&mut stream, FORGED.as_bytes(), b"wrong"), 0);
        expected.push(client.into());
    }
    for (uname, passwd, n) in [("alice", "", 1), ("", "secret", 2)] {
        assert_ne!(log_in(&server, [127, 11, 7, n], uname.as_bytes(), passwd.as_bytes()).1, 0);
        expected.push(Ipv4Addr::new(127, 11, 7, n).to_string());
    }
    let mut others = 0;
    for uname in ["alice", valid_name] {
        let name = format!("{FORGED}.evil");
        for request in
            [request(CONNECT, closed_port()), request_by_name(CONNECT, &name, 80), request_by_name(2, &name, 80)]
        {
            let (mut stream, status) = log_in(&server, V4, uname.as_bytes(), b"secret");
            assert_eq!(status, 0);
            stream.write_all(&request).expect("data sent");
            assert_ne!(read_reply(&mut stream).0, 0);
            others += 1;
        }
        assert_eq!(log_in(&server, V4, uname.as_bytes(), b"secret").1, 0);
        others += 1;
    }
    // None of these is a complete login.
    let half = login_message(FORGED.as_bytes(), b"wrong");
    let incomplete: [(&[u8], usize); 5] = [
        (b"GET / HTTP/1.1\r\nerror=\"login refused\"\r\n\r\n", 0),
        (&[5, 1, 0], 2),
        (&[&[5, 1, 2], &half[..half.len() - 1]].concat(), 2),
        (&[5, 1, 2, 9], 4),
        (b"", 0),
    ];
    for (message, answer) in incomplete {
        let mut stream = server.connect();
        stream.write_all(message).expect("data sent");
        read_exact(&mut stream, answer);
        others += 1;
    }
    let all = expected.len() + others;
    let read_log = || fs::read_to_string(&file).expect("file read");
    wait_until("all sessions have a line", TIMEOUT, || read_log().lines().count() >= all);
    let log = read_log();
    assert_eq!(log.lines().count(), all, "one line each:\n{log}");
    // A Kerberos login that has failed; tests/kerberos has the real line.
    let kerberos = "ts=2026-11-27T00:00:00.000Z level=warn msg=session id=1 from=127.11.9.9:1 up=0 down=0 seconds=0.002 \
                    error=\"login refused (GSSAPI: Unspecified GSS failure \\\"x\\\")\"\n";
    assert_eq!(addresses(matches(temp_dir().path(), kerberos, "UTC")), ["127.11.9.9"]);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is after 1970").as_secs_f64();
    let dir = temp_dir();
    expected.sort_unstable();
    // Log times are in UTC in every time zone. A time in another zone would cause no ban, or one that is too long.
    for zone in ["UTC", "Asia/Tokyo", "America/New_York"] {
        let found = matches(dir.path(), &log, zone);
        assert!(found.iter().all(|(_, time)| (now - 120.0..=now + 1.0).contains(time)), "{zone}: {found:?} at {now}");
        assert_eq!(addresses(found), expected, "{zone}");
    }
    // From the journal, and in files that a syslog daemon or journalctl has written. There, the line has no time of its
    // own, unless another program has read it from a pipe.
    let seconds = |time: &str| format!("{time} host s5[123]:");
    let day = "2026-11-23T23:30:48";
    for start in ["host s5[123]:".into(), seconds("Nov 23 23:30:48"), seconds(&format!("{day}.827123+00:00"))] {
        let in_journal = |line: &str| match line.strip_prefix('{') {
            Some(json) => format!("{start} {{{}\n", json.split_once(',').expect("a time").1),
            None => format!("{start} {}\n", line.split_once(' ').expect("a time").1),
        };
        let from_pipe = |line: &str| format!("{start} {line}\n");
        for file in [log.lines().map(in_journal).collect::<String>(), log.lines().map(from_pipe).collect()] {
            assert_eq!(addresses(matches(dir.path(), &file, "UTC")), expected, "{start}");
        }
    }
}
