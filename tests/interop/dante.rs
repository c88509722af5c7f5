//! danted as a proxy of the clients of s5, and as a client of `s5 serve`.

use crate::*;

const DANTED: &str = "/usr/sbin/danted";
const ALL_COMMANDS: &str = "command: connect bind udpassociate bindreply udpreply\n  log: connect error";
// Exit statuses of s5: login refused, REP 2 and REP 5.
const LOGIN_REFUSED: i32 = 67;
const NOT_ALLOWED: i32 = 102;
const CONNECTION_REFUSED: i32 = 105;

/// Starts danted with these lines in its rule and its configuration. Returns `None` if it is not installed.
fn danted(socks_rule: &str, global: &str) -> Option<OtherServer> {
    let config = Dante { method: "none", socks_rule, global, ..Dante::default() };
    is_installed("danted").then(|| OtherServer::start(|dir, addr| config.configure(dir, addr, Command::new(DANTED))))
}

fn proxy(danted: &OtherServer) -> String {
    format!("socks5h://{}", danted.addr)
}

/// danted in a namespace with this test's /etc/passwd and /etc/shadow, because it only authenticates system users.
fn danted_with_test_users(dir: &Path) -> Command {
    // crypt(3) of `open sesame`.
    let shadow = "anna:\
                  $6$abcdefgh$CkjGkP7IIgZVUCNlt.Vi53LOYJLXZ5KzdpzEYCj01XGruA1hxZYJqccTU2zz68oJwAGsd1iPty5F7dHIatUTy/\
                  :19000::::::\n";
    let passwd = "root:x:0:0::/:/bin/false\nanna:x:0:0::/:/bin/false\n";
    let (passwd, shadow) = (write_file(dir, "passwd", passwd), write_file(dir, "shadow", shadow));
    let script = "mount --bind \"$1\" /etc/passwd && mount --bind \"$2\" /etc/shadow && shift 2 && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "--", "sh", "-c", script, "sh", &passwd, &shadow, DANTED]);
    command
}

/// Runs `s5 bind` through these hops, connects as the peer, and exchanges data in both directions.
fn bind_and_exchange(hops: &str) {
    let mut bind = RunningProgram::start(s5().args(["bind", "-x", hops, "127.0.0.1"]));
    let addr = |word: &str| -> SocketAddr {
        // Only complete lines.
        let find = |stderr: &str| {
            let mut lines = stderr.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')?.strip_prefix(word));
            lines.next().map(str::to_owned)
        };
        find(&bind.stderr(|stderr| find(stderr).is_some())).and_then(|addr| addr.parse().ok()).expect("an address")
    };
    let mut peer = TcpStream::connect(addr("bound ")).expect("the proxy accepts the peer");
    peer.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    assert_eq!(addr("accepted "), peer.local_addr().expect("local address"));
    bind.write(b"from the client");
    bind.close_stdin();
    let mut received = String::new();
    peer.read_to_string(&mut received).expect("the client sends and half-closes");
    assert_eq!(received, "from the client");
    peer.write_all(b"from the peer").expect("the proxy reads");
    drop(peer);
    let (status, stdout, stderr) = bind.wait_exit(TIMEOUT);
    assert_eq!((status.code(), text(&stdout).as_str()), (Some(0), "from the peer"), "{stderr}");
}

/// Sends datagrams through these hops to an echo server, and waits for all answers.
fn udp_and_compare(hops: &str, echo: SocketAddr) {
    let lines = format!("one\n\n{}\n", "x".repeat(8000));
    let mut udp = RunningProgram::start(s5().args(["udp", "-w", "0", "-x", hops, &echo.to_string()]));
    udp.write(lines.as_bytes());
    udp.stdout(|stdout| stdout.len() >= lines.len());
    udp.close_stdin();
    let (status, stdout, stderr) = udp.wait_exit(TIMEOUT);
    assert_eq!((status.code(), text(&stdout)), (Some(0), lines), "{hops}: {stderr}");
}

fn connect(hops: &str, target: SocketAddr) -> Command {
    let mut command = s5();
    command.args(["connect", "-x", hops, &target.to_string()]);
    command
}

#[test]
fn clients_work_through_dante() {
    let Some(danted) = danted(ALL_COMMANDS, "") else { return };
    let echo = echo_server();
    assert_echoes(&mut connect(&proxy(&danted), echo), &bytes(4 << 20));
    danted.wait_log("tcp/connect");
    assert_echoes(s5().args(["connect", "-x", &proxy(&danted), "localhost", &echo.port().to_string()]), b"hello");
    bind_and_exchange(&proxy(&danted));
    danted.wait_log("tcp/bindreply");
    udp_and_compare(&proxy(&danted), udp_echo_server(V4));
    danted.wait_log("udp/udpassociate");
}

#[test]
fn clients_report_rep_2_and_rep_5_of_dante() {
    let Some(danted) = danted("command: connect", "") else { return };
    let target = closed_port().to_string();
    let table: [(&str, &str, i32, &[&str]); 3] = [
        ("connect", &target, CONNECTION_REFUSED, &[&target, "refused (REP 5)"]),
        ("bind", "127.0.0.1", NOT_ALLOWED, &[]),
        ("udp", &target, NOT_ALLOWED, &[]),
    ];
    for (mode, target, status, words) in table {
        let output = run(s5().args([mode, "-x", &proxy(&danted), target]), b"", LONG_TIMEOUT);
        assert_fails_with(&output, status, words);
    }
}

#[test]
fn s5_logs_in_to_dante_with_the_right_password_only() {
    if !has_all(&["danted", "unshare"]) {
        return;
    }
    let config = Dante { method: "username", user: Some("root"), socks_rule: ALL_COMMANDS, ..Dante::default() };
    let danted = OtherServer::start(|dir, addr| config.configure(dir, addr, danted_with_test_users(dir)));
    let (echo, udp) = (echo_server(), udp_echo_server(V4));
    let proxy = |userinfo: &str| format!("socks5h://{userinfo}{}", danted.addr);
    let right = proxy("anna:open%20sesame@");
    assert_echoes(&mut connect(&right, echo), b"hello");
    udp_and_compare(&right, udp);
    bind_and_exchange(&right);
    for userinfo in ["anna:sesame@", "berta:open%20sesame@", ""] {
        let output = run(&mut connect(&proxy(userinfo), echo), b"", LONG_TIMEOUT);
        assert_eq!(exit_code(&output), LOGIN_REFUSED, "{userinfo}: {}", text(&output.stderr));
        assert!(!text(&output.stderr).contains("sesame"), "{}", text(&output.stderr));
    }
}

#[test]
fn chains_of_dante_and_s5_pass_connect_bind_and_udp() {
    let Some(danted) = danted(ALL_COMMANDS, "") else { return };
    let (first, last, echo, udp) = (Server::start(&[]), Server::start(&[]), echo_server(), udp_echo_server(V4));
    assert_echoes(&mut connect(&format!("{},{},{}", first.addr(), danted.addr, last.addr()), echo), &bytes(1 << 20));
    wait_session(&first, &["command=connect", &format!("to=\"{}\"", danted.addr), "rep=0"]);
    wait_session(&last, &["command=connect", &format!("to=\"{echo}\""), "rep=0"]);
    danted.wait_log(&format!("127.0.0.1.{}", last.addr().port()));
    for hops in [[first.addr(), danted.addr], [danted.addr, last.addr()]] {
        let hops = hops.map(|addr| addr.to_string()).join(",");
        bind_and_exchange(&hops);
        udp_and_compare(&hops, udp);
    }
}

#[test]
fn dante_forwards_connect_to_s5() {
    let (server, echo) = (Server::start(&[]), echo_server());
    let route = format!(
        "route {{\n  from: 0.0.0.0/0 to: 0.0.0.0/0 via: 127.0.0.1 port = {}\n  command: connect\n  \
         proxyprotocol: socks_v5\n  protocol: tcp\n  method: none\n}}",
        server.addr().port()
    );
    let Some(danted) = danted(ALL_COMMANDS, &route) else { return };
    assert_echoes(&mut connect(&proxy(&danted), echo), &bytes(1 << 20));
    wait_session(&server, &["command=connect", &format!("to=\"{echo}\""), "rep=0"]);
}
