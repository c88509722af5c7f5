//! What people use the clients for, each with the programs that it takes: mail, health checks, a forwarded port.

#[path = "uses/dns.rs"]
mod dns;
#[path = "uses/shell.rs"]
mod shell;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{
    Server, TIMEOUT, closed_port, in_namespace, read_exact, run, s5, skip, tcp_server, temp_dir, wait_until,
};
use crate::kit::login::users_file;
use crate::kit::{V4, check_pattern, idle_descriptors, send_pattern, timed};
use crate::scripted::RunningProgram;
use crate::{LONG, Process, code, session, text};

/// A server that takes no port 0, and where it listens; it writes its log into the folder.
fn listening(folder: &Path, command: impl Fn(SocketAddr) -> Command) -> (Process, SocketAddr) {
    let attempt = || {
        let addr = closed_port();
        let log = File::create(folder.join("log")).expect("a file");
        let mut command = command(addr);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a second handle")).stderr(log);
        let mut process = Process::start(&mut command);
        let mut ended = false;
        wait_until("it listens", LONG, || {
            ended = process.has_ended();
            ended || TcpStream::connect(addr).is_ok()
        });
        if ended {
            eprintln!("{command:?}:\n{}", std::fs::read_to_string(folder.join("log")).unwrap_or_default());
        }
        (!ended).then_some((process, addr))
    };
    // Somebody may be faster to take a port that was free.
    (0..5).find_map(|_| attempt()).expect("it listens")
}

const HOSTS: &str = "127.0.0.1 localhost\n";
/// Debian's, whatever other Python the path has first.
const PYTHON: &str = "/usr/bin/python3";

fn have_aiosmtpd() -> bool {
    let import = || Command::new(PYTHON).args(["-c", "import aiosmtpd"]).output();
    let is_there = Path::new(PYTHON).exists() && import().expect("Python runs").status.success();
    if !is_there {
        skip("aiosmtpd (python3-aiosmtpd) is not installed");
    }
    is_there
}

#[test]
fn mail_arrives_with_crlf_and_only_so() {
    // The server wants to know what its own machine is called.
    if !have_aiosmtpd() || !in_namespace("uses::mail_arrives_with_crlf_and_only_so", HOSTS, "") {
        return;
    }
    let folder = temp_dir();
    let new = folder.path().join("mail/new");
    let (_mta, addr) = listening(folder.path(), |addr| {
        let mut command = Command::new(PYTHON);
        command.args(["-m", "aiosmtpd", "-n", "-l", &addr.to_string(), "-c", "aiosmtpd.handlers.Mailbox"]);
        command.arg(folder.path().join("mail"));
        command
    });
    let server = Server::start(&[]);
    let start = |options: &[&str]| {
        let mut command = s5();
        let mut client =
            RunningProgram::start(command.args(["connect", "-x", &server.addr().to_string()]).args(options));
        // One line has the end that it needs already.
        client.write(b"HELO client.test\nMAIL FROM:<anna@client.test>\nRCPT TO:<berta@mail.test>\nDATA\n");
        client.write(b"Subject: hello\n\none line\nanother\r\n.\nQUIT\n");
        client
    };
    let mails = || std::fs::read_dir(&new).expect("a folder of mail").map(|entry| entry.expect("a mail").path());
    let target = addr.to_string();

    // It waits for the end of the mail, which is a dot between two CR LF.
    let (status, said, complaint) = start(&["-i", "2s", &target]).end(LONG);
    assert_eq!(status.code(), Some(28), "{complaint}");
    assert!(text(&said).lines().last().is_some_and(|line| line.starts_with("354 ")), "{}", text(&said));
    assert_eq!(mails().count(), 0);

    let (status, said, complaint) = start(&["-C", &target]).end(LONG);
    assert_eq!((status.code(), complaint.as_str()), (Some(0), ""), "{}", text(&said));
    let said = text(&said);
    let codes: Vec<&str> = said.lines().filter_map(|line| line.get(..3)).collect();
    assert_eq!(codes, ["220", "250", "250", "250", "354", "250", "221"], "{said}");
    let mails: Vec<_> = mails().collect();
    assert_eq!(mails.len(), 1);
    let mail = std::fs::read_to_string(&mails[0]).expect("a mail");
    assert!(mail.contains("Subject: hello\n") && mail.ends_with("\n\none line\nanother\n"), "{mail:?}");
}

/// Longer than any of these tests lasts.
const WAIT: &str = "30s";

/// Fails unless it runs for long enough to have failed a few times.
fn keeps_trying(check: &mut RunningProgram) {
    let began = Instant::now();
    wait_until("it has tried a few times", TIMEOUT, || {
        assert!(check.is_running(), "it gave up");
        began.elapsed() > Duration::from_millis(400)
    });
}

fn succeeds(mut check: RunningProgram) {
    let (status, stdout, stderr) = check.end(TIMEOUT);
    assert_eq!((status.code(), stdout.len(), stderr.as_str()), (Some(0), 0, ""));
}

#[test]
fn a_health_check_waits_until_its_proxy_is_there() {
    let addr = closed_port().to_string();
    let mut check = RunningProgram::start(s5().args(["connect", "-z", "--wait", WAIT, "-x", &addr]));
    keeps_trying(&mut check);
    let _server = Server::start_with(s5().args(["serve", "--listen", &addr]), 1);
    succeeds(check);
}

#[test]
fn a_health_check_waits_until_its_target_is_there() {
    let (server, target) = (Server::start(&[]), closed_port());
    let (proxy, addr) = (server.addr().to_string(), target.to_string());
    let mut check = RunningProgram::start(s5().args(["connect", "-z", "--wait", WAIT, "-x", &proxy, &addr]));
    keeps_trying(&mut check);
    session(&server, &[&format!("dst=\"{target}\""), "rep=5"]);
    let listener = TcpListener::bind(target).expect("the port is still free");
    succeeds(check);
    drop(listener);
    session(&server, &[&format!("dst=\"{target}\""), "rep=0"]);
}

#[test]
fn a_health_check_gives_up_in_time_and_tells_its_tries() {
    let proxy = closed_port().to_string();
    let check =
        |options: &str| timed(|| run(s5().args(["connect", options, "--wait", "300ms", "-x", &proxy]), b"", TIMEOUT));
    let (took, output) = check("-zv");
    let said = text(&output.stderr);
    assert_eq!((code(&output), said.lines().count()), (7, 1), "{said}");
    assert!((Duration::from_millis(250)..Duration::from_secs(3)).contains(&took), "{took:?}");
    let tries = said.trim_end().strip_suffix(" tries)").and_then(|said| said.rsplit_once(" (given up after "));
    let tries: Option<u32> = tries.and_then(|(_, tries)| tries.parse().ok());
    // Not once, and not as fast as it can.
    assert!(tries.is_some_and(|tries| (2..=10).contains(&tries)), "{said}");
    let (_, quiet) = check("-z");
    assert_eq!((code(&quiet), text(&quiet.stderr).as_str()), (7, ""));
}

#[test]
fn a_health_check_does_not_wait_for_what_will_not_change() {
    let (_folder, users) = users_file(&[("alice", "secret")]);
    let server = Server::start(&["--users", &users]);
    let web = tcp_server(V4, |mut stream| {
        let _ = stream.write_all(b"HTTP/1.0 400 Bad Request\r\n\r\n");
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let mute = tcp_server(V4, |mut stream| drop(stream.read_to_end(&mut Vec::new())));
    let table = [
        (format!("alice:wrong@{}", server.addr()), 67, "refused"),
        (server.addr().to_string(), 67, "authentication method"),
        (web.to_string(), 97, "SOCKS5"),
    ];
    for (proxy, status, word) in table {
        // Who does not succeed here within TIMEOUT has tried again.
        let output = run(s5().args(["connect", "-zv", "--wait", WAIT, "-x", &proxy]), b"", TIMEOUT);
        let said = text(&output.stderr);
        assert_eq!(code(&output), status, "{proxy}: {said}");
        assert!(said.contains(word) && !said.contains("given up"), "{proxy}: {said}");
    }
    // A wait is the limit of a try as well.
    let output = run(s5().args(["connect", "-zv", "--wait", "300ms", "-x", &mute.to_string()]), b"", TIMEOUT);
    assert_eq!(code(&output), 28, "{}", text(&output.stderr));
}

/// How much each of the connections carries.
const EACH: usize = 128 << 20;
const CONNECTIONS: usize = 8;

/// Half of it goes up, half comes down; whoever receives checks.
#[test]
fn a_gibibyte_goes_through_a_forwarded_port_on_eight_connections_at_once() {
    let target = tcp_server(V4, |mut stream| {
        let way = read_exact(&mut stream, 1);
        stream.write_all(b"+").expect("it is sent");
        if way == *b"d" {
            send_pattern(&mut stream, EACH, |_| {});
        } else {
            check_pattern(&mut stream, EACH);
            stream.write_all(b"right").expect("it is sent");
        }
    });
    let server = Server::start(&[]);
    let args = ["connect", "-l", "0", "-k", "-x", &server.addr().to_string(), &target.to_string()];
    let forward = Server::start_with(s5().args(args), 1);
    let idle = (forward.descriptors(), idle_descriptors(&server));
    let open = |n: usize| {
        let (mut stream, goes_up) = (forward.connect(), n.is_multiple_of(2));
        stream.write_all(if goes_up { b"u" } else { b"d" }).expect("it is sent");
        assert_eq!(read_exact(&mut stream, 1), b"+");
        (stream, goes_up)
    };
    // All are open before one of them may end.
    let streams: Vec<_> = (0..CONNECTIONS).map(open).collect();
    thread::scope(|scope| {
        for (mut stream, goes_up) in streams {
            scope.spawn(move || {
                stream.set_read_timeout(Some(LONG)).expect("a timeout can be set");
                if goes_up {
                    send_pattern(&mut stream, EACH, |_| {});
                    stream.shutdown(Shutdown::Write).expect("it can be shut down");
                    assert_eq!(read_exact(&mut stream, 5), b"right");
                } else {
                    check_pattern(&mut stream, EACH);
                }
            });
        }
    });
    let moved = [format!(" up={} down=6 ", EACH + 1), format!(" up=1 down={} ", EACH + 1)];
    server.wait_log(|log| moved.iter().all(|moved| log.matches(moved).count() == CONNECTIONS / 2));
    wait_until("nothing is left open", TIMEOUT, || (forward.descriptors(), server.descriptors()) == idle);
    assert_eq!(forward.log(), format!("listening on {}\n", forward.addr()));
}
