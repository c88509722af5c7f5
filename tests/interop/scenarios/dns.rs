//! DNS over UDP through a proxy. unbound answers for a few names and forwards no queries.

use crate::*;

const UNBOUND: &str = "/usr/sbin/unbound";

/// The TXT record of `large.test`. It requires EDNS, and a larger buffer than the default of servers.
fn large_txt() -> Vec<String> {
    (b'a'..=b'n').map(|letter| char::from(letter).to_string().repeat(250)).collect()
}

fn start_unbound() -> OtherServer {
    let strings: String = large_txt().iter().map(|string| format!(" \"{string}\"")).collect();
    OtherServer::start(|dir, addr| {
        let config = format!(
            "server:\n\
             interface: 127.0.0.1@{port}\naccess-control: 127.0.0.0/8 allow\nnum-threads: 1\n\
             do-daemonize: no\nusername: \"\"\nchroot: \"\"\nuse-syslog: no\nlogfile: \"\"\n\
             directory: \"{dir}\"\npidfile: \"{dir}/pid\"\n\
             module-config: \"iterator\"\ndo-not-query-localhost: yes\n\
             edns-buffer-size: 4096\nmax-udp-size: 4096\n\
             local-zone: \".\" refuse\nlocal-zone: \"test.\" static\n\
             local-data: \"host.test. A 192.0.2.10\"\nlocal-data: \"host.test. AAAA 2001:db8::10\"\n\
             local-data: 'large.test. TXT{strings}'\n\
             remote-control:\ncontrol-enable: no\n",
            port = addr.port(),
            dir = dir.display(),
        );
        let mut command = Command::new(UNBOUND);
        command.args(["-d", "-c", &write_file(dir, "unbound.conf", &config)]);
        command
    })
}

/// Returns the output of dig, with one try and over UDP only.
fn dig(server: SocketAddr, name: &str, kind: &str) -> String {
    let mut command = Command::new("dig");
    command.args(["-r", "@127.0.0.1", "-p", &server.port().to_string()]);
    command.args(["+short", "+notcp", "+ignore", "+tries=1", "+time=8", "+bufsize=4096", name, kind]);
    text(&stdout(&mut command, b""))
}

/// The duration in seconds of each association in the log, and its bytes to the client.
fn associations(log: &str) -> Vec<(f64, f64)> {
    let value = |line: &str, key: &str| -> f64 {
        let value = line.split_whitespace().find_map(|word| word.strip_prefix(key));
        value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {key} in {line}"))
    };
    let sessions = log.lines().filter(|line| line.contains(" command=udp "));
    sessions.map(|line| (value(line, "seconds="), value(line, "down="))).collect()
}

#[test]
fn dig_queries_through_local_port_and_idle_association_ends() {
    if !has_all(&["unbound", "dig"]) {
        return;
    }
    let (unbound, server) = (start_unbound(), Server::start(&[]));
    let args = ["udp", "-l", "0", "-i", "1s", "-x", &server.addr().to_string(), &unbound.addr.to_string()];
    let forward = Server::start_with(s5().args(args), 1);
    assert_eq!(forward.log(), format!("listening on {}\n", forward.addr()));
    assert!(forward.addr().ip().is_loopback() && forward.addr().port() != 0);
    assert_eq!(dig(forward.addr(), "host.test", "A"), "192.0.2.10\n");
    assert_eq!(dig(forward.addr(), "host.test", "AAAA"), "2001:db8::10\n");
    // Each dig sends from another port, so each has an association.
    server.wait_log(|log| associations(log).len() == 2);
    let strings: Vec<String> = large_txt().iter().map(|string| format!("\"{string}\"")).collect();
    assert_eq!(dig(forward.addr(), "large.test", "TXT"), format!("{}\n", strings.join(" ")));
    let ended = associations(&server.wait_log(|log| associations(log).len() == 3));
    assert!(ended.iter().all(|(seconds, _)| (1.0..TIMEOUT.as_secs_f64()).contains(seconds)), "{ended:?}");
    assert!(ended[2].1 > 3500.0, "the large answer is one datagram: {ended:?}");
    // The end of an idle association is not an error.
    assert_eq!(forward.log().lines().count(), 1, "{}", forward.log());
}

#[test]
fn hex_framing_queries_dns() {
    if !has_all(&["unbound"]) {
        return;
    }
    let (unbound, server) = (start_unbound(), Server::start(&[]));
    // ID, RD, one question: host.test, A, IN (RFC 1035 section 4).
    let query = b"1234 0100 0001 0000 0000 0000 04686f7374 0474657374 00 0001 0001\n";
    let args = ["udp", "-x", &server.addr().to_string(), &unbound.addr.to_string(), "-n", "1", "--hex"];
    let output = run(s5().args(args), query, TIMEOUT);
    assert_eq!((exit_code(&output), text(&output.stderr).as_str()), (0, ""));
    let answer = text(&output.stdout);
    let digits = answer.strip_suffix('\n').expect("the answer ends with a line end");
    assert!(digits.bytes().all(|digit| digit.is_ascii_hexdigit()), "{answer:?}");
    // ID, QR with NOERROR, one answer; the last 4 bytes are the address.
    assert!(digits.starts_with("12348") && digits[7..16] == *"000010001", "{digits}");
    assert!(digits.ends_with("0004c000020a"), "{digits}");
}
