//! `s5 serve --check`.

use crate::*;

fn check(args: &str) -> Output {
    run(s5().args(["serve", "--check"]).args(args.split_whitespace()), b"", TIMEOUT)
}

#[test]
fn check_of_a_valid_configuration_prints_one_line_and_opens_no_port() {
    let (dir, server) = (temp_dir(), Server::start(&[]));
    let users = write_file(dir.path(), "users", "");
    let rules = write_file(dir.path(), "rules", "allow from=loopback\n");
    let socket = dir.path().join("s5.sock");
    let metrics = format!("unix:{}/metrics", dir.path().display());
    // A server that is running has the port and the path.
    let _running = Server::start(&["--metrics", &metrics]);
    let args = format!(
        "--listen {} --listen unix:{} --listen *:1080 --users {users} --rules {rules} --metrics {metrics}",
        server.addr(),
        socket.display()
    );
    let output = check(&args);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(output.stdout.is_empty());
    // The other line is about the empty users file.
    let (stderr, warning) = (text(&output.stderr), "no users, so every login is refused");
    assert!(
        stderr.contains(warning) && stderr.ends_with("\ns5: check passed: the options and files are valid\n"),
        "{stderr}"
    );
    assert!(stderr.lines().count() == 2 && !socket.exists(), "{stderr}");
    assert_eq!(text(&check("--listen 0").stderr), "s5: check passed: the options and files are valid\n");
    assert_eq!(text(&check("--listen 0 -q").stderr), "");
    let stderr = text(&check("--proxy-protocol-from 0.0.0.0/0,10.0.0.0/8,::/0,unix --allow-open-relay").stderr);
    for net in ["0.0.0.0/0", "::/0"] {
        assert!(
            stderr.contains(&format!("--proxy-protocol-from {net}: each client can choose its address")),
            "{stderr}"
        );
    }
    assert_eq!(stderr.lines().count(), 3, "{stderr}");
}

#[test]
fn check_of_the_access_log_creates_and_changes_no_file() {
    let dir = temp_dir();
    let (old, new, link) = (write_file(dir.path(), "old", "a line\n"), dir.path().join("new"), dir.path().join("link"));
    symlink("new", &link).expect("link created");
    for file in [old.as_str(), &new.display().to_string(), &link.display().to_string(), "/dev/null"] {
        let output = check(&format!("--access-log {file}"));
        assert!(output.status.success(), "{file}: {}", text(&output.stderr));
    }
    assert!(!new.exists());
    assert_eq!(fs::read(&old).expect("file read"), b"a line\n");
}

#[test]
fn check_fails_like_a_start() {
    let dir = temp_dir();
    let file = |name, text| write_file(dir.path(), name, text);
    let (rules, users, keytab) = (file("rules", "allow\nalow\n"), file("users", "alice\n"), file("keytab", ""));
    // Only this test uses the address, so that no other process takes the port.
    let addr = listener(unused_client_ip()).1;
    let port = addr.port();
    let in_use = ": address already in use (choose another address with --metrics)";
    let unix = |path: &str| format!("unix:{}/{path}", dir.path().display());
    let mut table = vec![
        (2, format!("--rules {rules}"), "rules: line 2: "),
        (2, format!("--users {users}"), "users: line 1: "),
        (2, "--users /nonexistent".to_owned(), "--users /nonexistent: no such file"),
        (2, format!("--keytab {keytab}"), "keytab: "),
        (2, "--listen *:0".into(), "refusing to listen on 0.0.0.0:"),
        (2, "--proxy-protocol-from 127.0.0.1".into(), "refusing to serve the clients of --proxy-protocol-from without"),
        (
            2,
            format!("--listen {} --proxy-protocol-from unix", unix("s5")),
            "refusing to serve the clients of --proxy-protocol-from without",
        ),
        (2, format!("--listen {addr} --via {addr}"), "is this server itself"),
        (2, "--via alice@127.0.0.1:1".into(), "no password"),
        (2, "--bind-ports 1-10".into(), "--bind-ports: the server may not use ports below"),
        (2, "--no-such-option".into(), "--no-such-option"),
        (2, "--advertise 224.0.0.1".into(), "--advertise '224.0.0.1': expected the IP address of a host"),
        (2, "--advertise-udp ::ffff:224.0.0.1".into(), ": expected the IP address of a host"),
        (2, "--allow-remote-metrics".into(), "--allow-remote-metrics requires --metrics ADDR"),
        (2, "--access-log -".into(), "--access-log: \"\" and \"-\" are not files (omit the option to log to stderr)"),
        (
            23,
            "--access-log /nonexistent/log".into(),
            "--access-log /nonexistent/log: no such file or directory (create its directory)",
        ),
        (23, "--access-log /proc/s5.log".into(), "--access-log /proc/s5.log: "),
        (23, "--access-log /".into(), "--access-log /: is a directory"),
        (1, "--listen nonexistent.invalid:1080".into(), "listen on nonexistent.invalid:1080: "),
        (1, "--listen 0 --metrics nonexistent.invalid:1".into(), "listen on nonexistent.invalid:1: "),
        (1, format!("--listen {addr} --metrics {addr}"), in_use),
        (1, format!("--listen {addr} --metrics *:{port} --allow-remote-metrics"), in_use),
        (
            1,
            format!("--listen [::1]:{port} --listen *:{port} --allow-open-relay"),
            "in use (choose another address with",
        ),
        (1, "--listen [fe80::1]:1400".into(), "listen on [fe80::1]:1400: a link-local address requires a zone"),
        (1, "--listen 192.0.2.1:1400".into(), "listen on 192.0.2.1:1400: cannot assign requested address (choose"),
        (
            1,
            format!("--listen {}", unix("none/s5")),
            "none/s5: no such file or directory (choose another address with --l",
        ),
        (1, format!("--listen 0 --metrics {}", unix("none/m")), "none/m: no such file or directory (choose another"),
        (1, format!("--listen {}", unix(&"x".repeat(108))), "x: path must be shorter than 108 bytes (choose"),
        (1, format!("--listen {}", unix("users")), "users: address already in use (choose"),
        (1, format!("--listen {0} --listen {0}", unix("s5")), "s5: address already in use (choose"),
        (
            1,
            format!("--listen {0} --metrics {0}", unix("m")),
            "m: address already in use (choose another address with --m",
        ),
    ];
    if !rustix::process::geteuid().is_root() {
        table.push((1, "--run-as 1:1".into(), "switch to the user of --run-as: "));
    } else {
        let args = format!("--run-as nobody --access-log {}", dir.path().join("log").display());
        table.push((23, args, "log: permission denied (the user of the server must"));
    }
    for (status, mut args, word) in table {
        // The default port may be in use.
        if !args.contains("--listen") {
            args += " --listen 127.0.0.1:0";
        }
        assert_fails_with(&check(&args), status, &[word]);
        assert_fails_with(&run(s5().arg("serve").args(args.split_whitespace()), b"", TIMEOUT), status, &[word]);
    }
}
