//! Uses of the clients together with other programs: mail, health checks, forwarded ports, DNS, ssh.

mod dns;
mod shell;

use crate::*;

const HOSTS: &str = "127.0.0.1 localhost\n";

#[test]
fn smtp_requires_crlf_option() {
    // In a namespace, because the SMTP server resolves the machine's name.
    let has_aiosmtpd = has_python_module("aiosmtpd", "aiosmtpd (python3-aiosmtpd)");
    if !has_aiosmtpd || !in_namespace("scenarios::smtp_requires_crlf_option", HOSTS, "") {
        return;
    }
    let mta = OtherServer::start(|dir, addr| {
        let mut command = Command::new(PYTHON);
        command.args(["-m", "aiosmtpd", "-n", "-l", &addr.to_string(), "-c", "aiosmtpd.handlers.Mailbox"]);
        command.arg(dir.join("mail"));
        command
    });
    let new = mta.dir.path().join("mail/new");
    let server = Server::start(&[]);
    let start = |options: &[&str]| {
        let mut command = s5();
        let mut client =
            RunningProgram::start(command.args(["connect", "-x", &server.addr().to_string()]).args(options));
        // One line already ends with CR LF.
        client.write(b"HELO client.test\nMAIL FROM:<anna@client.test>\nRCPT TO:<berta@mail.test>\nDATA\n");
        client.write(b"Subject: hello\n\none line\nanother\r\n.\nQUIT\n");
        client
    };
    let mails = || std::fs::read_dir(&new).expect("directory read").map(|entry| entry.expect("directory entry").path());
    let target = mta.addr.to_string();

    // The server waits for the end of the mail, a dot between two CR LF.
    let (status, stdout, stderr) = start(&["-i", "2s", &target]).wait_exit(LONG_TIMEOUT);
    assert_eq!(status.code(), Some(28), "{stderr}");
    assert!(text(&stdout).lines().last().is_some_and(|line| line.starts_with("354 ")), "{}", text(&stdout));
    assert_eq!(mails().count(), 0);

    let (status, stdout, stderr) = start(&["-C", "--linger", "0", &target]).wait_exit(LONG_TIMEOUT);
    assert_eq!((status.code(), stderr.as_str()), (Some(0), ""), "{}", text(&stdout));
    let stdout = text(&stdout);
    let codes: Vec<&str> = stdout.lines().filter_map(|line| line.get(..3)).collect();
    assert_eq!(codes, ["220", "250", "250", "250", "354", "250", "221"], "{stdout}");
    let mails: Vec<_> = mails().collect();
    assert_eq!(mails.len(), 1);
    let mail = std::fs::read_to_string(&mails[0]).expect("file read");
    assert!(mail.contains("Subject: hello\n") && mail.ends_with("\n\none line\nanother\n"), "{mail:?}");
}

/// Longer than any of these tests runs.
const LONG_WAIT: &str = "30s";

#[test]
fn health_check_waits_for_proxy_and_target() {
    let (proxy, target) = (closed_port().to_string(), closed_port());
    let args = ["connect", "-z", "--retry", LONG_WAIT, "-x", &proxy, &target.to_string()];
    let mut check = RunningProgram::start(s5().args(args));
    let mut assert_keeps_trying = || {
        let started = Instant::now();
        wait_until("the client has tried a few times", TIMEOUT, || {
            assert!(check.is_running(), "the client gave up");
            started.elapsed() > Duration::from_millis(400)
        });
    };
    assert_keeps_trying();
    let server = Server::start_with(s5().args(["serve", "--listen", &proxy]), 1);
    wait_session(&server, &[&format!("to=\"{target}\""), "rep=5"]);
    assert_keeps_trying();
    let listener = TcpListener::bind(target).expect("the port is still free");
    let (status, stdout, stderr) = check.wait_exit(TIMEOUT);
    assert_eq!((status.code(), stdout.len(), stderr.as_str()), (Some(0), 0, ""));
    drop(listener);
    wait_session(&server, &[&format!("to=\"{target}\""), "rep=0"]);
    // Without a target, the proxy alone is checked.
    let output = run(s5().args(["connect", "-z", "--retry", LONG_WAIT, "-x", &proxy]), b"", TIMEOUT);
    assert_eq!((exit_code(&output), text(&output.stderr).as_str()), (0, ""));
}

#[test]
fn health_check_exits_at_its_time_limit_and_reports_attempts() {
    let proxy = closed_port().to_string();
    let check = |options: &str| {
        let mut command = s5();
        command.arg("connect").args(options.split(' ')).args(["--retry", "1s", "-x", &proxy]);
        timed(|| run(&mut command, b"", TIMEOUT))
    };
    let (elapsed, output) = check("-zv");
    let stderr = text(&output.stderr);
    assert_eq!((exit_code(&output), stderr.lines().count()), (7, 1), "{stderr}");
    assert!((Duration::from_millis(950)..Duration::from_secs(4)).contains(&elapsed), "{elapsed:?}");
    let attempts =
        stderr.trim_end().strip_suffix(" attempts)").and_then(|stderr| stderr.rsplit_once(" (given up after "));
    let attempts: Option<u32> = attempts.and_then(|(_, attempts)| attempts.parse().ok());
    // More than one attempt, with pauses between them.
    assert!(attempts.is_some_and(|attempts| (2..=10).contains(&attempts)), "{stderr}");
    let (_, output) = check("-z");
    assert!(text(&output.stderr).ends_with(" attempts)\n"), "{}", text(&output.stderr));
    let (_, output) = check("-z --quiet");
    assert_eq!((exit_code(&output), text(&output.stderr).as_str()), (7, ""));
}

#[test]
fn health_check_does_not_retry_final_errors() {
    let (_dir, users) = users_file(&[("alice", "secret")]);
    let server = Server::start(&["--users", &users]);
    let web = tcp_server(V4, |mut stream| {
        let _ = stream.write_all(b"HTTP/1.0 400 Bad Request\r\n\r\n");
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let silent = tcp_server(V4, |mut stream| drop(stream.read_to_end(&mut Vec::new())));
    let table = [
        (format!("alice:wrong@{}", server.addr()), 67, "refused"),
        (server.addr().to_string(), 67, "authentication method"),
        (web.to_string(), 97, "SOCKS5"),
    ];
    for (proxy, status, word) in table {
        // A client that retries would not exit within TIMEOUT.
        let output = run(s5().args(["connect", "-zv", "--retry", LONG_WAIT, "-x", &proxy]), b"", TIMEOUT);
        assert_fails_with(&output, status, &[word]);
        assert!(!text(&output.stderr).contains("given up"), "{proxy}");
    }
    // --retry also limits a single try.
    let output = run(s5().args(["connect", "-zv", "--retry", "300ms", "-x", &silent.to_string()]), b"", TIMEOUT);
    assert_eq!(exit_code(&output), 28, "{}", text(&output.stderr));
}

/// Bytes on each connection.
const BYTES_EACH: usize = 128 << 20;
const CONNECTIONS: usize = 8;

/// Half of the connections send to the target, the others receive from it. The receiver checks the data.
#[test]
fn forwarded_port_transfers_one_gib_on_eight_connections() {
    let target = tcp_server(V4, |mut stream| {
        let direction = read_exact(&mut stream, 1);
        stream.write_all(b"+").expect("data sent");
        if direction == *b"d" {
            send_pattern(&mut stream, BYTES_EACH, |_| {});
        } else {
            check_pattern(&mut stream, BYTES_EACH);
            stream.write_all(b"right").expect("data sent");
        }
    });
    let server = Server::start(&[]);
    let args = ["connect", "-l", "0", "-k", "-x", &server.addr().to_string(), &target.to_string()];
    let forward = Server::start_with(s5().args(args), 1);
    let idle = (forward.descriptors(), idle_descriptors(&server));
    let open = |n: usize| {
        let (mut stream, is_upload) = (forward.connect(), n.is_multiple_of(2));
        stream.write_all(if is_upload { b"u" } else { b"d" }).expect("data sent");
        assert_eq!(read_exact(&mut stream, 1), b"+");
        (stream, is_upload)
    };
    // All connections are open before the first one ends.
    let streams: Vec<_> = (0..CONNECTIONS).map(open).collect();
    thread::scope(|scope| {
        for (mut stream, is_upload) in streams {
            scope.spawn(move || {
                stream.set_read_timeout(Some(LONG_TIMEOUT)).expect("timeout set");
                if is_upload {
                    send_pattern(&mut stream, BYTES_EACH, |_| {});
                    stream.shutdown(Shutdown::Write).expect("half-closed");
                    assert_eq!(read_exact(&mut stream, 5), b"right");
                } else {
                    check_pattern(&mut stream, BYTES_EACH);
                }
            });
        }
    });
    let byte_counts = [format!(" up={} down=6 ", BYTES_EACH + 1), format!(" up=1 down={} ", BYTES_EACH + 1)];
    server.wait_log(|log| byte_counts.iter().all(|counts| log.matches(counts).count() == CONNECTIONS / 2));
    wait_until("all descriptors are closed", TIMEOUT, || (forward.descriptors(), server.descriptors()) == idle);
    assert_eq!(forward.log(), format!("listening on {}\n", forward.addr()));
}
