//! Sockets that systemd has opened: LISTEN_FDS.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net as unix;

use crate::*;

/// Opens the sockets of the first argument as descriptors 3 and higher, sets LISTEN_PID unless it is set, and replaces
/// itself by the program of the other arguments.
const ACTIVATE: &str = r#"
import os, socket, sys
sockets = []
for kind in sys.argv[1].split():
    if kind.startswith("/") or kind.startswith("@"):
        s = socket.socket(socket.AF_UNIX)
        s.bind(kind.replace("@", "\0"))
    else:
        host, kind = kind.rsplit("/", 1)
        s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET,
                          socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
        if ":" in host:
            s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, kind != "dual")
        s.bind((host, 0))
    if kind not in ("udp", "bound"):
        s.listen()
    sockets.append(s)
# Above the numbers that they get, since one may be in the way of another.
high = [os.dup2(s.fileno(), 50 + i) for i, s in enumerate(sockets)]
for i, fd in enumerate(high):
    os.dup2(fd, 3 + i)
os.closerange(3 + len(high), 256)
os.environ.setdefault("LISTEN_PID", str(os.getpid()))
os.environ.setdefault("LISTEN_FDS", str(len(high)))
os.execv(sys.argv[2], sys.argv[2:])
"#;

fn activated(sockets: &str, args: &[&str]) -> Command {
    let mut command = Command::new(PYTHON);
    command.args(["-c", ACTIVATE, sockets]).arg(s5().get_program()).arg("serve").args(args);
    command
}

/// Returns the address after "listening on" in each line that has it.
fn listening(server: &Server) -> Vec<String> {
    let log = server.log();
    log.lines().filter_map(|line| Some(line.split_once("listening on ")?.1.to_owned())).collect()
}

#[test]
fn sockets_of_systemd_are_used_and_their_names_are_in_the_log() {
    let dir = temp_dir();
    let path = dir.path().join("s5.sock");
    let abstract_name = format!("@{}", path.display());
    let sockets = format!("127.0.0.1/tcp ::1/tcp {} {abstract_name}", path.display());
    for args in [&[][..], &["--no-sandbox"]] {
        let mut command = activated(&sockets, args);
        let mut server = Server::start_with(command.env("LISTEN_FDNAMES", "four:six:file:abstract"), 4);
        let listening = listening(&server);
        let tcp =
            [0, 1].map(|i| listening[i].split(' ').next().and_then(|addr| addr.parse().ok()).expect("an address"));
        let expected = [
            format!("{} (four)", tcp[0]),
            format!("{} (six)", tcp[1]),
            format!("unix:{} (file)", path.display()),
            format!("unix:{abstract_name} (abstract)"),
        ];
        assert_eq!(listening, expected);
        let sessions = tcp.map(|addr: SocketAddr| greet_at(addr));
        // proc_net_tcp(5) has the remote address and the timer: 02 for keepalive, 01 until the client's kernel has
        // acknowledged the reply.
        let client = format!(":{:04X} 01 ", sessions[0].local_addr().expect("local address").port());
        wait_until("keepalive is set", TIMEOUT, || {
            let table = fs::read_to_string(format!("/proc/{}/net/tcp", server.pid())).expect("the server runs");
            let line = table.lines().find(|line| line.contains(&client)).expect("the connection");
            line.split_whitespace().nth(5).is_some_and(|timer| timer.starts_with("02:"))
        });
        let name = unix::SocketAddr::from_abstract_name(&abstract_name[1..]);
        let unix = [UnixStream::connect(&path), UnixStream::connect_addr(&name.expect("a name"))];
        for mut stream in unix.map(|stream| stream.expect("the listener accepts")) {
            stream.write_all(&[5, 1, 0]).expect("greeting sent");
            stream.read_exact(&mut [0; 2]).expect("method selection received");
        }
        server.signal("TERM");
        assert!(server.wait(TIMEOUT).success());
        // systemd owns the file.
        assert!(path.exists());
        fs::remove_file(&path).expect("file removed");
    }
}

#[test]
fn sockets_of_systemd_keep_names_and_files_at_a_restart() {
    let dir = temp_dir();
    let path = dir.path().join("s5.sock");
    let mut command = activated(&format!("127.0.0.1/tcp {}", path.display()), &[]);
    let mut server = Server::start_with(command.env("LISTEN_FDNAMES", "tcp:file"), 2);
    let successor = Successor::of(&server);
    server.wait_log(|log| log.matches("listening on ").count() == 4);
    assert_eq!(listening(&server)[..2], listening(&server)[2..]);
    rustix::process::kill_process(successor.0, rustix::process::Signal::TERM).expect("the new process runs");
    assert!(server.wait(TIMEOUT).success() && path.exists());
}

#[test]
fn dual_stack_socket_serves_ipv4_clients_as_ipv4() {
    let server = Server::start_with(
        &mut activated("::/dual", &["--allow", "from=127.0.0.0/8", "--deny", "", "--allow-open-relay", "-v"]),
        1,
    );
    let addr = SocketAddr::new(V4, server.addr().port());
    let mut stream = greet_at(addr);
    // The association is at the address that the client connected to.
    stream.write_all(&request(UDP_ASSOCIATE, "0.0.0.0:0".parse().expect("an address"))).expect("request sent");
    let (rep, bnd) = read_reply(&mut stream);
    assert_eq!((rep, bnd.ip()), (0, V4));
    let mut stream = greet_at(addr);
    stream.write_all(&request(CONNECT, echo_server())).expect("request sent");
    assert_eq!(read_reply(&mut stream).0, 0);
    drop(stream);
    wait_session(&server, &["from=127.0.0.1:", "command=connect", "rep=0"]);
    // IPv4 clients reach the port, so that it is an own listener in IPv4 too, and there is no hint about IPv6.
    let mut stream = greet_at(addr);
    stream.write_all(&request(CONNECT, addr)).expect("request sent");
    assert_eq!(read_reply(&mut stream).0, 2);
    assert!(!server.log().contains("accepts only IPv6"), "{}", server.log());
}

#[test]
fn show_rules_and_explain_include_the_sockets_of_systemd() {
    let output = |args: &[&str]| String::from_utf8(run(&mut activated("127.0.0.1/tcp", args), b"", TIMEOUT).stdout);
    let shown = output(&["--show-rules"]).expect("UTF-8");
    let listeners: Vec<&str> = shown.lines().filter(|line| line.contains("# built in, own listener")).collect();
    assert!(listeners.len() == 1 && listeners[0].starts_with("deny to=127.0.0.1 port="), "{shown}");
    assert!(!shown.contains("port=1080"), "{shown}");
    let explained = output(&["--explain", "to=127.0.0.1:1080"]).expect("UTF-8");
    assert!(explained.ends_with("\nallow\n"), "{explained}");
}

#[test]
fn wrong_sockets_and_variables_are_errors_that_name_them() {
    let not_listener =
        "is not a listening TCP or Unix socket (in the socket unit, set ListenStream=, and not Accept=yes)";
    let unset = "(only the service manager sets this variable)";
    // Sockets, LISTEN_FDS, LISTEN_FDNAMES, LISTEN_PID, and the error. An empty variable stands for the right value.
    let table = [
        ("127.0.0.1/tcp 127.0.0.1/udp", "", "", "", format!("LISTEN_FDS: descriptor 4 {not_listener}")),
        ("127.0.0.1/bound", "", "", "", format!("LISTEN_FDS: descriptor 3 {not_listener}")),
        ("127.0.0.1/tcp", "2", "", "", format!("LISTEN_FDS: descriptor 4: bad file descriptor {unset}")),
        ("127.0.0.1/tcp", "abc", "", "", "LISTEN_FDS: expected a number, found \"abc\"".into()),
        ("127.0.0.1/tcp", "-1", "", "", "LISTEN_FDS: expected a number, found \"-1\"".into()),
        ("127.0.0.1/tcp", "0", "", "", "LISTEN_FDS: expected a number from 1 to 253, found 0".into()),
        ("127.0.0.1/tcp", "9999999", "", "", "LISTEN_FDS: expected a number from 1 to 253, found 9999999".into()),
        ("127.0.0.1/tcp", "", "", "x", "LISTEN_PID: expected a number, found \"x\"".into()),
        (
            "127.0.0.1/tcp",
            "",
            "a:b",
            "",
            "LISTEN_FDNAMES: number of names: expected 1, as in LISTEN_FDS, found 2".into(),
        ),
        ("0.0.0.0/tcp", "", "", "", "refusing to listen on 0.0.0.0:".into()),
        ("::/tcp", "", "", "", "refusing to listen on [::]:".into()),
    ];
    for (sockets, fds, names, pid, expected) in table {
        for args in [&[][..], &["--check"]] {
            let mut command = activated(sockets, args);
            for (name, value) in [("LISTEN_FDS", fds), ("LISTEN_FDNAMES", names), ("LISTEN_PID", pid)] {
                if !value.is_empty() {
                    command.env(name, value);
                }
            }
            let output = run(&mut command, b"", TIMEOUT);
            assert_fails_with(&output, 2, &[&expected]);
        }
    }
}

#[test]
fn sockets_for_another_process_or_besides_listen_are_ignored_with_a_warning() {
    enter_namespace!("", "");
    let server = Server::start_with(activated("127.0.0.1/tcp", &[]).env("LISTEN_PID", "1"), 2);
    assert_eq!(listening(&server), ["127.0.0.1:1080", "[::1]:1080"]);
    let expected =
        format!("LISTEN_FDS is ignored: it is for another process (LISTEN_PID is 1, this one is {})", server.pid());
    assert!(server.log().contains(&expected), "{}", server.log());
    drop(server);
    let server = Server::start_with(s5().arg("serve").env("LISTEN_FDS", "1"), 2);
    assert!(server.log().contains("(LISTEN_PID is not set, this one is "), "{}", server.log());
    let server = Server::start_with(&mut activated("127.0.0.1/tcp", &["--listen", "127.0.0.2:0"]), 1);
    assert_eq!(server.addr().ip().to_string(), "127.0.0.2");
    assert!(server.log().contains("the sockets of LISTEN_FDS are not used, because --listen is given"));
}

#[test]
fn systemd_socket_activate_starts_the_server_at_the_first_connection() {
    enter_namespace!("", "");
    if !is_installed("systemd-socket-activate") {
        return;
    }
    let mut command = Command::new("systemd-socket-activate");
    command.args(["-l", "1080", "--fdname", "socks", "--"]).arg(s5().get_program());
    command.args(["serve", "--allow", "from=loopback"]);
    let program = RunningProgram::start(&mut command);
    program.stderr(|text| text.contains("Listening on [::]:1080"));
    let (target, addr) = (echo_server(), SocketAddr::new(V4, 1080));
    let mut stream = greet_at(addr);
    stream.write_all(&request(CONNECT, target)).expect("request sent");
    assert_eq!(read_reply(&mut stream).0, 0);
    ping(&mut stream, b"hello");
    program.stderr(|text| text.contains("listening on [::]:1080 (socks)\n"));
}
