//! Runs every command of README.md as printed, and compares its output with the page.
//!
//! Each section, and each recipe with a bold title, starts without processes of the previous one. Its commands run in
//! order in one directory, in a network namespace with a web server, a DNS server, an echo server and sshd under the
//! names and addresses that the page uses. Commands that keep running are killed at the end of the recipe.

use std::fs::{self, File};

use crate::ssh::Sshd;
use crate::*;

const README: &str = include_str!("../../README.md");
const TEST: &str = "readme::readme_commands_run_as_printed";
/// Time limit for a command that exits, which may be a release build.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(300);
const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 2, 7), Ipv4Addr::new(192, 0, 2, 53)];
const HOSTS: &str = "127.0.0.1 localhost proxy.example host.example.org host.example.net\n192.0.2.7 example.org\n";
const PASSWORD: &str = "open-sesame";

/// A command of the page with the lines that it prints.
#[derive(Debug)]
struct Step {
    command: String,
    output: Vec<String>,
}

/// The steps of each recipe of the page, and the page's ssh configuration.
fn recipes() -> (Vec<Vec<Step>>, String) {
    let (mut recipes, mut config) = (vec![Vec::new()], String::new());
    let mut language = None;
    // Its commands need systemd: tests/system runs them.
    let (before, service) = README.split_once("## Running s5 for others\n").expect("the section");
    let (_, after) = service.split_once("\n## ").expect("another section");
    for line in before.lines().chain(["## "]).chain(after.lines()) {
        match (language, line.strip_prefix("```")) {
            (None, Some(name)) => language = Some(name),
            (Some(_), Some(_)) => language = None,
            (None, None) if line.starts_with("## ") || line.starts_with("**") => recipes.push(Vec::new()),
            (Some("sh" | "console"), None) => {
                let steps: &mut Vec<Step> = recipes.last_mut().expect("at least one recipe");
                let prompt = line.strip_prefix("$ ");
                match steps.last_mut() {
                    Some(step) if step.command.ends_with('\\') => step.command += &format!("\n{line}"),
                    Some(step) if language == Some("console") && prompt.is_none() => step.output.push(line.into()),
                    _ => steps.push(Step { command: prompt.unwrap_or(line).into(), output: Vec::new() }),
                }
            }
            (Some("text"), None) => config += &format!("{line}\n"),
            _ => {}
        }
    }
    recipes.retain(|steps| !steps.is_empty());
    (recipes, config)
}

/// The text that a long-running command prints when it is ready, or `None` if the command exits.
fn ready_text(command: &str) -> Option<&'static str> {
    let is_query = ["--add-user", "--explain"].iter().any(|option| command.contains(option));
    match command {
        _ if is_query => None,
        _ if command.starts_with("s5 bind") => Some("bound "),
        // It prints nothing, so the test waits for its port.
        _ if command.starts_with("ssh -N") => Some(""),
        _ if command.contains("s5 serve") || command == "make serve" || command.contains(" -l ") => {
            Some("listening on ")
        }
        _ => None,
    }
}

/// Replaces each number of a line with addresses or a time by `0`, because times and ports differ between runs.
fn without_numbers(line: &str) -> String {
    if !line.contains(':') {
        return line.trim_end().to_owned();
    }
    let digits = line.trim_end().replace(|c: char| c.is_ascii_digit(), "0");
    let mut out = String::new();
    for c in digits.chars() {
        if c != '0' || !out.ends_with('0') {
            out.push(c);
        }
    }
    out
}

/// Creates a directory for PATH with the programs that the test replaces or configures.
fn programs(dir: &Path, ssh_config: &str) -> PathBuf {
    let bin = dir.join("programs");
    fs::create_dir(&bin).expect("directory created");
    let scripts = [
        ("s5", format!("exec '{}' \"$@\"", env!("CARGO_BIN_EXE_s5"))),
        ("sudo", "exec \"$@\"".to_owned()),
        ("nc", "exec nc.openbsd \"$@\"".to_owned()),
        ("ssh", format!("exec /usr/bin/ssh -F '{ssh_config}' \"$@\"")),
        // `make test` would run this test again.
        ("make", "[ \"$*\" = test ] || exec /usr/bin/make \"$@\"".to_owned()),
    ];
    for (name, script) in scripts {
        let path = write_file(&bin, name, &format!("#!/bin/sh\n{script}\n"));
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("permissions set");
    }
    bin
}

/// Starts an echo server, a web server and a DNS server at the addresses of the page.
fn start_servers() {
    let udp = |ip: Ipv4Addr, port: u16, answer: fn(&[u8]) -> Vec<u8>| {
        let socket = UdpSocket::bind((ip, port)).expect("free port");
        thread::spawn(move || {
            let mut buffer = [0; 65536];
            while let Ok((n, peer)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&answer(&buffer[..n]), peer);
            }
        });
    };
    udp(ADDRESSES[0], 7, <[u8]>::to_vec);
    // A DNS answer without records: the query with the bits QR and RA set.
    udp(ADDRESSES[1], 53, |query| [&query[..2], &[query[2] | 0x80, 0x80], &query[4..]].concat());
    let web = TcpListener::bind((ADDRESSES[0], 80)).expect("free port");
    thread::spawn(move || {
        for stream in web.incoming() {
            thread::spawn(move || answer_http(stream.expect("connection accepted")));
        }
    });
}

fn answer_http(mut stream: TcpStream) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n == 1) {
        head.extend(byte);
    }
    let _ = stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nHello from example.org\n");
}

/// Runs the steps of one recipe.
fn run_recipe(steps: &[Step], dir: &Path, environment: &[(&str, String)]) {
    let log = dir.join("log");
    let shell = |command: &str| {
        let mut shell = Command::new("sh");
        let is_build = command.contains("cargo") || command.contains("make");
        let at = if is_build { Path::new(env!("CARGO_MANIFEST_DIR")) } else { dir };
        shell.args(["-c", command]).current_dir(at).envs(environment.iter().map(|(name, value)| (name, value)));
        shell
    };
    let mut running = Vec::new();
    if !steps.iter().any(|step| step.command.contains("serve")) {
        let log = File::create(&log).expect("file created");
        running.push(ProcessGroup::start(s5().arg("serve").stdin(Stdio::null()).stderr(log)));
        wait_until("the default server listens", TIMEOUT, || TcpStream::connect("127.0.0.1:1080").is_ok());
    }
    for Step { command, output } in steps {
        let printed = if let Some(ready) = ready_text(command) {
            let file = File::create(&log).expect("file created");
            let mut shell = shell(command);
            let out = file.try_clone().expect("cloned");
            running.push(ProcessGroup::start(shell.stdin(Stdio::null()).stdout(out).stderr(file)));
            let read = || fs::read_to_string(&log).unwrap_or_default();
            wait_until(command, COMMAND_TIMEOUT, || {
                let process = running.last_mut().expect("the command was started");
                assert!(read().contains(ready) || !process.has_ended(), "{command}: {}", read());
                // The page may show several such lines.
                let lines = output.iter().filter(|line| line.contains(ready)).count().max(1);
                read().matches(ready).count() >= lines
                    && (ready.is_empty() || read().ends_with('\n'))
                    && (!ready.is_empty() || TcpStream::connect("127.0.0.1:1080").is_ok())
            });
            if let Some(bnd) = read().strip_prefix("bound ").filter(|_| !command.contains("--address-file")) {
                let bnd = bnd.lines().next().unwrap_or_default();
                let bnd: SocketAddr = bnd.parse().unwrap_or_else(|error| panic!("{bnd:?}: {error} in {}", read()));
                let mut peer = TcpStream::connect(bnd).expect("the proxy accepts");
                peer.write_all(b"hello").expect("data sent");
                wait_until("the peer is reported", TIMEOUT, || read().contains("accepted "));
            }
            read()
        } else {
            let stdin = if command.contains("--add-user") { PASSWORD } else { "" };
            // As on a terminal, stdout and stderr are one stream.
            let result = run(&mut shell(&format!("exec 2>&1\n{command}")), stdin.as_bytes(), COMMAND_TIMEOUT);
            let is_denied = output.last().is_some_and(|line| line == "deny");
            assert_eq!(result.status.code(), Some(i32::from(is_denied)), "{command}: {}", text(&result.stdout));
            text(&result.stdout)
        };
        let mut lines = printed.lines().map(without_numbers);
        for expected in output {
            let is_printed = lines.any(|line| line == without_numbers(expected));
            assert!(is_printed, "{command}: {expected:?} is not in this order in\n{printed}");
        }
    }
}

#[test]
fn readme_commands_run_as_printed() {
    if !has_all(&["curl", "dig", "ssh", "sshd", "nc.openbsd", "unshare", "ip", "make"]) {
        return;
    }
    if !rustix::process::getuid().is_root() {
        return record_skip("sshd requires root in the namespace");
    }
    let dir = temp_dir();
    if std::env::var_os("S5_TEST_NAMESPACE").is_none() {
        let hosts = write_file(dir.path(), "hosts", HOSTS);
        let add: String = ADDRESSES.iter().map(|ip| format!("ip addr add {ip}/32 dev lo && ")).collect();
        let script = format!("ip link set lo up && {add} mount --bind \"$1\" /etc/hosts && shift && exec \"$@\"");
        let mut command = Command::new("unshare");
        command.args(["--mount", "--net", "--", "sh", "-c", &script, "sh", &hosts]);
        command.arg(std::env::current_exe().expect("path of this test")).args(["--exact", TEST, "--nocapture"]);
        let output = run(command.env("S5_TEST_NAMESPACE", "1"), b"", 2 * COMMAND_TIMEOUT);
        let report = text(&output.stderr) + &text(&output.stdout);
        assert!(output.status.success() && report.contains("1 passed"), "in the namespace:\n{report}");
        return;
    }
    start_servers();
    let Some(sshd) = Sshd::start() else { return };
    let (recipes, page_config) = recipes();
    assert!(recipes.len() > 10, "only {} recipes were found", recipes.len());
    let config = sshd.client_config(&format!("{page_config}\nHost *\nPort {}", sshd.addr.port()));
    let bin = programs(dir.path(), &config);
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
    let environment = [
        ("PATH", path),
        ("CARGO_INSTALL_ROOT", dir.path().display().to_string()),
        ("CARGO_NET_OFFLINE", "true".into()),
        ("DESTDIR", dir.path().display().to_string()),
    ];
    let files = [
        ("auth", format!("alice:{PASSWORD}\n")),
        ("request", "GET / HTTP/1.0\r\n\r\n".into()),
        ("file", "a file".into()),
    ];
    for (name, text) in files {
        write_file(dir.path(), name, &text);
    }
    let ssh = Step { command: "ssh host.example.org".into(), output: Vec::new() };
    assert!(README.contains(&ssh.command) && page_config.contains("Host *.example.org"));
    for steps in recipes.iter().map(Vec::as_slice).chain([&[ssh][..]]) {
        run_recipe(steps, dir.path(), &environment);
    }
    assert_eq!(fs::read(dir.path().join("received")).expect("received"), b"a file", "the file is received whole");
    for installed in ["bin/s5", "usr/local/bin/s5", "usr/local/share/man/man1/s5.1"] {
        assert!(dir.path().join(installed).is_file(), "{installed} is not installed");
    }
}

#[test]
fn readme_is_short() {
    let (lines, characters) = (README.lines().count(), README.chars().count());
    assert!(lines <= 250 && characters <= 14_000, "{lines} lines, {characters} characters");
    // Output is as long as it is.
    let long = README.lines().filter(|line| line.chars().count() > 120 && !line.starts_with("s5: "));
    assert_eq!(long.collect::<Vec<_>>(), [""; 0], "lines of more than 120 characters");
}
