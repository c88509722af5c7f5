//! git, rsync and ssh through proxies that require passwords. The passwords are in a file.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use crate::ssh::{Sshd, git, repository, s5_as_proxy_command};
use crate::support::login::users_file;
use crate::support::scripted::RunningProgram;
use crate::support::{Server, TIMEOUT, closed_port, echo_server, run, s5, temp_dir, write_file};
use crate::{LONG_TIMEOUT, assert_same, bytes, exit_code, has_all, stdout, text, wait_for_session};

#[test]
fn git_clones_over_ssh_through_two_proxies_with_passwords_from_file() {
    if !has_all(&["ssh", "sshd", "ssh-keygen", "git"]) {
        return;
    }
    let ((_alice_dir, alice), (_bob_dir, bob)) =
        (users_file(&[("alice", "open sesame")]), users_file(&[("bob", "pass:word")]));
    let (first, second) = (Server::start(&["--users", &alice]), Server::start(&["--users", &bob]));
    let (sshd, dir, content) = (Sshd::start(), temp_dir(), bytes(2 << 20));
    let origin = repository(dir.path(), &content);
    let clone = |name: &str, passwords: &str| {
        let file = write_file(dir.path(), &format!("{name}.auth"), passwords);
        let options = format!("-x alice@{},bob@{} --proxy-auth-file '{file}'", first.addr(), second.addr());
        let config = sshd.client_config(&s5_as_proxy_command(&options));
        let mut command = git(dir.path());
        command.env("GIT_SSH_COMMAND", format!("ssh -F '{config}'"));
        let url = format!("ssh://127.0.0.1:{}{}", sshd.addr.port(), origin.display());
        run(command.args(["clone", "-q", &url, name]), b"", LONG_TIMEOUT)
    };
    // The file has the passwords in another order than the chain.
    let output = clone("right", "carol:other\nbob:pass:word\nalice:open sesame\n");
    assert_eq!((exit_code(&output), text(&output.stderr).as_str()), (0, ""));
    let cloned = std::fs::read(dir.path().join("right/file")).expect("the file was cloned");
    assert_same(&cloned, &content);
    wait_for_session(&first, &["user=\"alice\"", &format!("dst=\"{}\"", second.addr()), "rep=0"]);
    wait_for_session(&second, &["user=\"bob\"", &format!("dst=\"{}\"", sshd.addr), "rep=0"]);

    let output = clone("wrong", "bob:open barley\nalice:open sesame\n");
    let stderr = text(&output.stderr);
    assert!(!output.status.success() && stderr.contains(&format!("proxy {}: login, ", second.addr())), "{stderr}");
    assert!(!stderr.contains("barley") && !stderr.contains("sesame"), "{stderr}");
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
    if !has_all(&["ssh", "sshd", "ssh-keygen", "rsync"]) {
        return;
    }
    let (_users_dir, users) = users_file(&[("alice", "open sesame")]);
    let (server, sshd, dir) = (Server::start(&["--users", &users]), Sshd::start(), temp_dir());
    let path = |name: &str| format!("{}/{name}/", dir.path().display());
    std::fs::create_dir_all(dir.path().join("original/below")).expect("directory created");
    for (name, content) in [("large", bytes(3 << 20)), ("empty", Vec::new()), ("below/two words", bytes(1000))] {
        std::fs::write(dir.path().join("original").join(name), content).expect("file written");
    }
    let file = write_file(dir.path(), "auth", "alice:open sesame\n");
    let options = format!("-x alice@{} --proxy-auth-file '{file}'", server.addr());
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
        assert!(copied.keys().eq(original.keys()), "{name}: {:?}", copied.keys());
        copied.iter().zip(&original).for_each(|((_, left), (_, right))| assert_same(left, right));
    }
    let alice_session = format!("user=\"alice\" command=connect dst=\"{}\"", sshd.addr);
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
    if !has_all(&["ssh", "sshd", "ssh-keygen"]) {
        return;
    }
    let (_users_dir, users) = users_file(&[("alice", "open sesame")]);
    let (server, sshd, dir, data) = (Server::start(&["--users", &users]), Sshd::start(), temp_dir(), bytes(4 << 20));
    let file = write_file(dir.path(), "auth", "alice:open sesame\n");
    let login = format!("-x alice@{} --proxy-auth-file '{file}'", server.addr());
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
        assert_same(&echoed[6..], &data);
    }
    let target = format!("dst=\"{}\"", sshd.addr);
    server.wait_log(|log| log.lines().filter(|line| line.contains(&target) && line.contains(" rep=0 ")).count() == 3);
}

#[test]
fn pass_fd_requires_stdout_to_be_a_socket() {
    // The check precedes connecting and password prompts.
    let (proxy, target) = (closed_port().to_string(), echo_server().to_string());
    for args in [&["-F", "-x", &proxy, &target][..], &["--pass-fd", "--direct", &target]] {
        let output = run(s5().arg("connect").args(args), b"", TIMEOUT);
        let stderr = text(&output.stderr);
        assert_eq!((exit_code(&output), output.stdout.len(), stderr.lines().count()), (2, 0, 1), "{stderr}");
        assert!(stderr.starts_with("s5: -F: ") && stderr.contains("socket"), "{stderr}");
    }
}
