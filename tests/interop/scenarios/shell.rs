//! git, rsync and ssh through proxies that require passwords. The passwords are in a file.

use crate::ssh::{Sshd, git, repository, s5_as_proxy_command};
use crate::*;

#[test]
fn git_clones_and_pushes_over_ssh_through_two_proxies_with_passwords_from_file() {
    let Some(sshd) = is_installed("git").then(Sshd::start).flatten() else { return };
    let ((_alice_dir, alice), (_bob_dir, bob)) =
        (users_file(&[("alice", "open sesame")]), users_file(&[("bob", "pass:word")]));
    let (first, second) = (Server::start(&["--users", &alice]), Server::start(&["--users", &bob]));
    let (dir, content) = (temp_dir(), bytes(2 << 20));
    let origin = repository(dir.path(), &content);
    let url = format!("ssh://127.0.0.1:{}{}", sshd.addr.port(), origin.display());
    let git_with = |passwords: &str, at: &Path, args: &[&str]| {
        let file = write_file(dir.path(), "auth", passwords);
        let options = format!("-x alice@{},bob@{} --proxy-auth-file '{file}'", first.addr(), second.addr());
        let config = sshd.client_config(&s5_as_proxy_command(&options));
        run(git(at).env("GIT_SSH_COMMAND", format!("ssh -F '{config}'")).args(args), b"", LONG_TIMEOUT)
    };
    // The file has the passwords in another order than the chain.
    let right = "carol:other\nbob:pass:word\nalice:open sesame\n";
    let (clone, at) = (dir.path().join("clone"), dir.path());
    for (at, args) in [(at, ["clone", "-q", &url, "clone"]), (&clone, ["push", "-q", "origin", "main:pushed"])] {
        let output = git_with(right, at, &args);
        assert_eq!((exit_code(&output), text(&output.stderr).as_str()), (0, ""));
    }
    assert!(std::fs::read(clone.join("file")).expect("the file was cloned") == content);
    stdout(git(&origin).args(["rev-parse", "--verify", "-q", "pushed"]), b"");
    wait_session(&first, &["user=\"alice\"", &format!("to=\"{}\"", second.addr()), "rep=0"]);
    wait_session(&second, &["user=\"bob\"", &format!("to=\"{}\"", sshd.addr), "rep=0"]);

    let output = git_with("bob:open barley\nalice:open sesame\n", at, &["clone", "-q", &url, "wrong"]);
    let stderr = text(&output.stderr);
    assert!(!output.status.success() && stderr.contains(&format!("proxy {}: login, ", second.addr())), "{stderr}");
    assert!(!stderr.contains("barley") && !stderr.contains("sesame"), "{stderr}");
}

/// Starts a server that knows alice, and returns the options of a client that logs in as alice.
fn serve_alice(dir: &Path) -> (Server, String) {
    let (_users_dir, users) = users_file(&[("alice", "open sesame")]);
    let (server, file) = (Server::start(&["--users", &users]), write_file(dir, "auth", "alice:open sesame\n"));
    let options = format!("-x alice@{} --proxy-auth-file '{file}'", server.addr());
    (server, options)
}

/// Returns the content of all files below a directory, by relative path.
fn read_files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(dir).expect("directory read") {
        let path = entry.expect("directory entry").path();
        let name = path.file_name().expect("a file name").to_string_lossy().into_owned();
        if path.is_dir() {
            files.extend(read_files(&path).into_iter().map(|(below, content)| (format!("{name}/{below}"), content)));
        } else {
            files.insert(name, std::fs::read(&path).expect("file read"));
        }
    }
    files
}

#[test]
fn rsync_copies_directory_over_ssh_in_both_directions() {
    let Some(sshd) = is_installed("rsync").then(Sshd::start).flatten() else { return };
    let dir = temp_dir();
    let (server, options) = serve_alice(dir.path());
    let path = |name: &str| format!("{}/{name}/", dir.path().display());
    std::fs::create_dir_all(dir.path().join("original/below")).expect("directory created");
    for (name, content) in [("large", bytes(3 << 20)), ("empty", Vec::new()), ("below/two words", bytes(1000))] {
        std::fs::write(dir.path().join("original").join(name), content).expect("file written");
    }
    let ssh = format!("ssh -p {} -F '{}'", sshd.addr.port(), sshd.client_config(&s5_as_proxy_command(&options)));
    for [from, to] in [
        [path("original"), format!("127.0.0.1:{}", path("there"))],
        [format!("127.0.0.1:{}", path("there")), path("back")],
    ] {
        stdout(Command::new("rsync").args(["-a", "-e", &ssh, &from, &to]), b"");
    }
    let original = read_files(&dir.path().join("original"));
    for name in ["there", "back"] {
        let copied = read_files(&dir.path().join(name));
        assert!(copied == original, "{name}: {:?}", copied.keys());
    }
    let alice_session = format!("user=\"alice\" method=password command=connect to=\"{}\"", sshd.addr);
    server.wait_log(|log| log.matches(&alice_session).count() == 2);
}

/// Returns the number of processes that run `s5 connect` through this proxy.
fn client_count(proxy: &Server) -> usize {
    let addr = proxy.addr().to_string();
    let is_client = |line: &[u8]| {
        let line = text(line);
        let mut words = line.split('\0');
        words.next() == Some(env!("CARGO_BIN_EXE_s5"))
            && words.next() == Some("connect")
            && words.any(|word| word.ends_with(&addr))
    };
    let processes = std::fs::read_dir("/proc").expect("directory read").flatten();
    processes.filter(|process| std::fs::read(process.path().join("cmdline")).is_ok_and(|line| is_client(&line))).count()
}

#[test]
fn ssh_uses_passed_socket_after_s5_has_exited() {
    let Some(sshd) = Sshd::start() else { return };
    let (dir, data) = (temp_dir(), bytes(4 << 20));
    let (server, login) = serve_alice(dir.path());
    let with_fdpass = format!("{}\nProxyUseFdpass yes", s5_as_proxy_command(&format!("-F {login}")));
    assert_eq!(text(&stdout(sshd.ssh(&with_fdpass).arg("echo hello"), b"")), "hello\n");
    // Without -F the process keeps running, which shows that `client_count` finds it.
    for (lines, clients) in [(with_fdpass, 0), (s5_as_proxy_command(&login), 1)] {
        let mut ssh = RunningProgram::start(sshd.ssh(&lines).arg("cat"));
        ssh.write(b"hello\n");
        ssh.stdout(|bytes| bytes == b"hello\n");
        assert_eq!(client_count(&server), clients, "{lines}");
        ssh.write(&data);
        ssh.close_stdin();
        let (status, echoed, stderr) = ssh.wait_exit(LONG_TIMEOUT);
        assert_eq!((status.code(), stderr.as_str()), (Some(0), ""));
        assert!(echoed[6..] == data, "{} bytes", echoed.len());
    }
    let target = format!("to=\"{}\"", sshd.addr);
    server.wait_log(|log| log.lines().filter(|line| line.contains(&target) && line.contains(" rep=0 ")).count() == 3);
}

#[test]
fn pass_fd_requires_stdout_to_be_a_socket() {
    // The check precedes connecting and password prompts.
    let (proxy, target) = (closed_port().to_string(), echo_server().to_string());
    for args in [&["-F", "-x", &proxy, &target][..], &["--pass-fd", "--direct", &target]] {
        let output = run(s5().arg("connect").args(args), b"", TIMEOUT);
        assert_fails_with(&output, 2, &["s5: -F: ", "socket"]);
        assert_eq!(output.stdout, b"");
    }
}
