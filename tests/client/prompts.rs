//! Prompts for a missing password on the terminal or by an askpass program, and passwords in the command line.

use crate::credentials::{accepting_proxy, as_s5, assert_login};
use crate::*;

/// s5 in a new session, which has no terminal.
fn without_a_terminal(args: &str) -> Command {
    let mut command = as_s5("setsid");
    command.args(["--wait", env!("CARGO_BIN_EXE_s5")]).args(args.split(' '));
    command
}

/// Checks that s5 does not prompt, and fails before connecting.
fn assert_not_prompted(command: &mut Command, proxy: &str) {
    let words = [&*format!("proxy {proxy}: login: no password for alice (use --proxy-auth-file or ")];
    assert_line_in(outcome_of(command, b"payload"), 67, &words);
}

#[test]
fn user_without_password_fails_at_once_without_a_terminal() {
    // Nothing listens at this address: status 67 shows that the client has not connected.
    let closed = closed_port().to_string();
    for mode in ["connect", "bind", "udp"] {
        for options in [format!("-x alice@{closed}"), format!("-x {closed} -P alice")] {
            let args = format!("{mode} {options} {TARGET}");
            assert_not_prompted(command(&args).env("CI", "true"), &closed);
            if is_installed("setsid") {
                assert_not_prompted(&mut without_a_terminal(&args), &closed);
            }
        }
    }
}

fn executable(dir: &Path, name: &str, script: &str) -> String {
    let path = write_file(dir, name, script);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("permissions set");
    path
}

#[test]
fn askpass_program_runs_in_the_same_cases_as_in_ssh() {
    if !is_installed("setsid") {
        return;
    }
    let dir = temp_dir();
    // Records its prompt, reads its stdin to the end, and answers with two lines.
    let script = "#!/bin/sh\nprintf '%s' \"$*\" > \"$PROMPT_FILE\"\ncat\necho topsecret\necho more\n";
    let program = executable(dir.path(), "askpass", script);
    let prompt_file = dir.path().join("prompt");
    let with_askpass = |proxy: &str, variables: &[(&str, &str)]| {
        let mut command = without_a_terminal(&format!("connect -P alice -x {proxy} {TARGET}"));
        command.env("SSH_ASKPASS", &program).env("PROMPT_FILE", &prompt_file).envs(variables.iter().copied());
        command
    };
    let cases_with_askpass: [&[(&str, &str)]; 5] = [
        &[("SSH_ASKPASS_REQUIRE", "force")],
        &[("SSH_ASKPASS_REQUIRE", "prefer")],
        &[("DISPLAY", ":0")],
        &[("WAYLAND_DISPLAY", "wayland-0")],
        &[("SSH_ASKPASS_REQUIRE", "force"), ("CI", "false")],
    ];
    for variables in cases_with_askpass {
        let proxy = accepting_proxy();
        // The program does not read the stdin of s5.
        let (status, stdout, _) = outcome_of(&mut with_askpass(&proxy.url(), variables), b"payload");
        assert_eq!((status, stdout.as_str()), (Some(0), "payload"), "{variables:?}");
        assert_login(&proxy, "alice", b"topsecret");
        let prompt = fs::read_to_string(&prompt_file).expect("the askpass program ran");
        assert!(prompt.contains("alice") && prompt.contains(&proxy.url()), "{prompt}");
        fs::remove_file(&prompt_file).expect("file removed");
    }
    let cases_without_askpass: [&[(&str, &str)]; 4] = [
        &[],
        &[("SSH_ASKPASS_REQUIRE", "never"), ("DISPLAY", ":0")],
        &[("SSH_ASKPASS_REQUIRE", "force"), ("CI", "true")],
        &[("DISPLAY", ":0"), ("CI", "1")],
    ];
    let closed = closed_port().to_string();
    for variables in cases_without_askpass {
        assert_not_prompted(&mut with_askpass(&closed, variables), &closed);
        assert!(!prompt_file.exists(), "{variables:?}");
    }
}

#[test]
fn failing_askpass_program_has_status_67() {
    let dir = temp_dir();
    let fails = executable(dir.path(), "fails", "#!/bin/sh\necho topsecret\nexit 3\n");
    let closed = closed_port().to_string();
    for program in [&fails, "/nonexistent/askpass"] {
        let mut command = command(&format!("connect -P alice -x {closed} {TARGET}"));
        command.env("SSH_ASKPASS", program).env("SSH_ASKPASS_REQUIRE", "force");
        assert_line_of(&mut command, 67, &[&format!("proxy {closed}: login: {program}: ")]);
    }
}

/// A shell command on a new terminal with echo. The terminal's output is the stdout of the command.
pub fn on_a_terminal(dir: &Path, command: &str) -> Command {
    let mut script = as_s5("script");
    script.current_dir(dir).env("SHELL", "/bin/sh");
    script.args(["-q", "-e", "-c", &format!("tty > tty; {command}"), "/dev/null"]);
    script
}

/// Waits for the prompt and for echo to be off, then types a password.
pub fn type_at_prompt(terminal: &mut RunningProgram, dir: &Path, prompt: &str, passwd: &str) {
    wait_for_prompt(terminal, dir, prompt);
    terminal.write(format!("{passwd}\n").as_bytes());
}

fn wait_for_prompt(terminal: &RunningProgram, dir: &Path, prompt: &str) {
    terminal.stdout(|shown| text(shown).contains(prompt));
    let tty = fs::read_to_string(dir.join("tty")).expect("file read");
    // The time includes the hashing of an unoptimised build.
    wait_until("the terminal does not echo", 6 * TIMEOUT, || {
        let settings = Command::new("stty").args(["-a", "-F", tty.trim()]).output().expect("stty runs");
        text(&settings.stdout).split_whitespace().any(|word| word == "-echo")
    });
}

/// Types the password of alice, and waits for the end of the client. Returns what the terminal shows, without it.
fn log_in(terminal: &mut RunningProgram, dir: &Path, proxy: &ScriptedServer) -> String {
    type_at_prompt(terminal, dir, "Password for alice at ", "topsecret");
    let (status, shown, _) = terminal.wait_exit(TIMEOUT);
    let shown = text(&shown);
    assert!(status.success() && !shown.contains("topsecret"), "{status}: {shown}");
    assert_login(proxy, "alice", b"topsecret");
    shown
}

#[test]
fn password_prompt_on_a_terminal_does_not_echo() {
    if !is_installed("script") {
        return;
    }
    // The first command does not read stdin (-z). In the second, stdin is a pipe.
    for (command, payload) in [
        ("\"$S5\" connect -z -P alice -x ADDR TARGET; status=$?; stty -a; exit $status", ""),
        ("printf payload | \"$S5\" connect -P alice -x ADDR TARGET; status=$?; stty -a; exit $status", "payload"),
    ] {
        let (dir, proxy) = (temp_dir(), accepting_proxy());
        let command = command.replace("ADDR", &proxy.url()).replace("TARGET", TARGET);
        let mut terminal = RunningProgram::start(&mut on_a_terminal(dir.path(), &command));
        let shown = log_in(&mut terminal, dir.path(), &proxy);
        assert!(shown.contains(payload), "{shown}");
        assert!(shown.split_whitespace().any(|word| word == "echo"), "echo is still off: {shown}");
    }
}

#[test]
fn signal_at_the_password_prompt_restores_the_echo() {
    if !is_installed("script") {
        return;
    }
    let client = "sh -c 'echo $$ > pid; exec \"$S5\" connect -z -P alice -x 127.0.0.1:1 a:1'";
    for signal in ["typed", "TERM"] {
        let dir = temp_dir();
        let command = format!("trap : INT; {client}; echo \"status $?\"; stty -a");
        let mut terminal = RunningProgram::start(&mut on_a_terminal(dir.path(), &command));
        wait_for_prompt(&terminal, dir.path(), "Password for alice at ");
        let pid = fs::read_to_string(dir.path().join("pid")).expect("file read");
        match signal {
            "typed" => terminal.write(b"\x03"),
            _ => send_signal(signal, pid.trim()),
        }
        let shown = text(&terminal.stdout_end());
        // The status is 67 if the tests run in the background of a shell, which ignores SIGINT.
        assert!(shown.contains("status ") && !shown.contains("status 0"), "{shown}");
        assert!(shown.split_whitespace().any(|word| word == "echo"), "echo is still off: {shown}");
    }
}

fn send_signal(signal: &str, pid: &str) {
    assert!(Command::new("kill").args(["-s", signal, pid]).status().expect("kill runs").success());
}

/// Returns the state of a process in /proc. `Z`: it has ended.
fn state(pid: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let state = status.lines().find_map(|line| line.strip_prefix("State:")).unwrap_or("Z");
    state.trim().chars().take(1).collect()
}

#[test]
fn ignored_signal_at_the_password_prompt_leaves_the_echo_off() {
    if !is_installed("script") {
        return;
    }
    let (dir, proxy) = (temp_dir(), accepting_proxy());
    let args = format!("connect -z -P alice -x {} {TARGET}", proxy.url());
    let client = format!("trap '' HUP; echo $$ > pid; exec \"$S5\" {args}");
    let mut terminal = RunningProgram::start(&mut on_a_terminal(dir.path(), &client));
    wait_for_prompt(&terminal, dir.path(), "Password for alice at ");
    let pid = fs::read_to_string(dir.path().join("pid")).expect("file read");
    send_signal("HUP", pid.trim());
    log_in(&mut terminal, dir.path(), &proxy);
}

#[test]
fn signal_ends_a_password_prompt_in_the_background() {
    if !is_installed("script") {
        return;
    }
    let dir = temp_dir();
    let client = "sh -c 'echo $$ > pid; exec \"$S5\" connect -z -P alice -x 127.0.0.1:1 a:1'";
    let _terminal = RunningProgram::start(&mut on_a_terminal(dir.path(), &format!("set -m; {client} & read line")));
    let pid = || fs::read_to_string(dir.path().join("pid")).unwrap_or_default().trim().to_owned();
    wait_until("the client is stopped", TIMEOUT, || state(&pid()) == "T");
    send_signal("TERM", &pid());
    send_signal("CONT", &pid());
    wait_until("the client has ended", TIMEOUT, || state(&pid()) == "Z");
}

#[test]
fn password_prompt_leaves_no_thread_and_no_open_terminal() {
    if !is_installed("script") {
        return;
    }
    let (dir, proxy) = (temp_dir(), accepting_proxy());
    let args = format!("connect -k -l 0 -P alice -x {} {TARGET}", proxy.url());
    let client = format!("echo $$ > pid; exec \"$S5\" {args}");
    let mut terminal = RunningProgram::start(&mut on_a_terminal(dir.path(), &client));
    type_at_prompt(&mut terminal, dir.path(), "Password for alice at ", "topsecret");
    terminal.stdout(|shown| text(shown).contains("listening on "));
    let pid = fs::read_to_string(dir.path().join("pid")).expect("file read");
    let files = fs::read_dir(format!("/proc/{}/fd", pid.trim())).expect("the client runs");
    let mut files = files.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
    assert!(files.all(|file| file != Path::new("/dev/tty")), "the terminal is open");
}

/// The limit of threads does not apply to root, so the client runs as another user.
#[test]
fn password_prompt_needs_no_thread() {
    if !is_installed("script") || !is_installed("setpriv") {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return record_skip("needs root");
    }
    let (dir, proxy) = (temp_dir(), accepting_proxy());
    // By another process, so that no child of this one has it open for writing.
    stdout(Command::new("cp").arg(env!("CARGO_BIN_EXE_s5")).arg(dir.path().join("s5")), b"");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("permissions set");
    let args = format!("connect -z -P alice -x {} {TARGET}", proxy.url());
    let user = "setpriv --reuid=54321 --regid=54321 --clear-groups";
    let client = format!("exec prlimit --nproc=1 {user} ./s5 {args}");
    let mut terminal = RunningProgram::start(&mut on_a_terminal(dir.path(), &client));
    log_in(&mut terminal, dir.path(), &proxy);
}

#[test]
fn no_prompt_if_the_terminal_is_the_payload_or_ci_is_set() {
    if !is_installed("script") {
        return;
    }
    let dir = temp_dir();
    let closed = closed_port().to_string();
    for (command, ci) in [
        ("exec \"$S5\" connect -P alice -x ADDR TARGET", "false"),
        ("exec \"$S5\" udp -P alice -x ADDR TARGET", ""),
        ("exec \"$S5\" bind -P alice -x ADDR", ""),
        ("exec \"$S5\" connect -v -z -P alice -x ADDR TARGET", "true"),
    ] {
        let command = command.replace("ADDR", &closed).replace("TARGET", TARGET);
        let mut terminal = RunningProgram::start(on_a_terminal(dir.path(), &command).env("CI", ci));
        let (status, shown, _) = terminal.wait_exit(TIMEOUT);
        let shown = text(&shown);
        assert_eq!(status.code(), Some(67), "{shown}");
        assert!(shown.starts_with(&format!("s5: proxy {closed}: login: no password for alice (")), "{shown}");
    }
}

/// The arguments of a process, as visible in /proc.
fn command_line(pid: u32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).expect("file read");
    text(&bytes).trim_end_matches('\0').replace('\0', " ")
}

/// Checks that only the passwords of a command line are overwritten.
fn assert_hidden(pid: u32, args: &str) {
    let redacted = args.replace("topsecret", "xxxxxxxxx");
    let shown = command_line(pid);
    assert_eq!(shown.split_once(' ').map(|(_, shown)| shown), Some(redacted.as_str()));
}

/// A proxy that answers a login only after it was checked.
fn waiting_proxy() -> ScriptedServer {
    ScriptedServer::start("> {greeting}; < 05 02; > {login}; > ...")
}

/// Fails unless the login is the next message.
fn assert_next_login(proxy: &ScriptedServer) {
    assert_eq!(proxy.message(), login_message(b"alice", b"topsecret"));
}

#[test]
fn password_in_the_command_line_is_overwritten() {
    for args in [
        "-x alice:topsecret@ADDR",
        "-x socks5h://alice:topsecret@ADDR",
        "-xalice:topsecret@ADDR",
        "--proxy=alice:topsecret@ADDR",
        "-vxalice:topsecret@ADDR",
        "-x ADDR -P alice:topsecret",
        "-x ADDR -e -P -P alice:topsecret",
        "-x ADDR -Palice:topsecret",
        "-x ADDR -vPalice:topsecret",
        "-x ADDR --proxy-user=alice:topsecret",
    ] {
        let proxy = waiting_proxy();
        let args = format!("connect {} {TARGET}", args.replace("ADDR", &proxy.url()));
        let client = crate::start(&args);
        proxy.message();
        assert_hidden(client.pid(), &args);
        assert_next_login(&proxy);
    }
}

#[test]
fn passwords_of_a_chain_in_the_command_line_are_overwritten() {
    let proxy = waiting_proxy();
    let chain = format!("alice:topsecret@{},bob:othersecret@second.example", proxy.addr);
    let client = crate::start(&format!("connect -x {chain} {TARGET}"));
    proxy.message();
    let shown = command_line(client.pid());
    let shown = shown.split(' ').nth(3).expect("the value of -x");
    let passwords = shown.strip_prefix("alice:").and_then(|rest| rest.strip_suffix("@second.example"));
    assert!(passwords.is_some_and(|passwords| passwords.chars().all(|c| c == 'x')), "{shown}");
    assert_eq!(shown.len(), chain.len());
    assert_next_login(&proxy);
}

#[test]
fn password_in_the_via_option_of_a_server_is_overwritten() {
    let proxy = waiting_proxy();
    let via = format!("alice:topsecret@{}", proxy.addr);
    let server = Server::start(&["--via", &via]);
    assert_hidden(server.pid(), &format!("serve --listen 127.0.0.1:0 --via {via}"));
    let mut client = server.connect();
    client.write_all(&[5, 1, 0]).expect("data sent");
    client.write_all(&crate::support::request(1, closed_port())).expect("data sent");
    proxy.message();
    assert_next_login(&proxy);
}

#[test]
fn password_in_the_user_option_causes_one_warning() {
    let stderr = |options: &str| {
        let proxy = accepting_proxy();
        let mut command = command(&format!("connect -z -x {} {TARGET} {options}", proxy.addr));
        let (status, _, stderr) = outcome_of(command.env("S5_PROXY_AUTH", "alice:known"), b"");
        assert_eq!(status, Some(0), "{stderr}");
        stderr
    };
    let warned = stderr("-P alice:topsecret");
    assert!(warned.starts_with("s5: --proxy-user: ") && warned.lines().count() == 1, "{warned}");
    assert!(!warned.contains("topsecret"), "{warned}");
    assert_eq!(stderr("-P alice:topsecret --quiet"), "");
    assert_eq!(stderr("-P alice"), "");
}
