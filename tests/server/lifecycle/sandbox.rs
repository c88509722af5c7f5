//! What the server gives up once it listens. The code that tries to break out is in probe.c.

use crate::*;

const OK: i32 = 0;
const EPERM: i32 = 1;
const EACCES: i32 = 13;

/// A folder that everybody may read, with a users file and a file that the server does not need.
fn files() -> (TempDir, [String; 2]) {
    let dir = temp_dir();
    let inside = dir.path().join("s5");
    fs::create_dir(&inside).expect("folder created");
    let files = [write_file(&inside, "users", ""), write_file(dir.path(), "secret", "")];
    for path in [dir.path(), &inside] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("permissions set");
    }
    (dir, files)
}

fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root() && std::env::var_os("S5_TEST_NAMESPACE").is_none();
    if !is_root {
        record_skip("only root can switch to another user");
    }
    is_root
}

/// The line of the log that says what is in force.
fn sandbox_line(server: &Server) -> String {
    let log = server.wait_log(|log| log.contains("] sandbox: "));
    log.lines().find_map(|line| line.split_once("] sandbox: ")).map(|(_, line)| line.to_owned()).expect("a line")
}

#[test]
fn code_inside_of_the_server_cannot_open_files_execute_trace_or_use_raw_sockets() {
    if !is_installed("cc") || !is_root() {
        return;
    }
    let (dir, [users, secret]) = files();
    let library = dir.path().join("probe.so").display().to_string();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/server/lifecycle/probe.c");
    let output = run(Command::new("cc").args(["-shared", "-fPIC", "-o", &library, source]), b"", TIMEOUT);
    assert!(output.status.success(), "{output:?}");
    let start = |args: &[&str]| {
        let mut command = s5();
        command.args(["serve", "--listen", "127.0.0.1:0", "--rules", &users]).args(args);
        command.env("LD_PRELOAD", &library).env("PROBE_USERS", &users).env("PROBE_SECRET", &secret);
        let server = Server::start_with(&mut command, 1);
        let mut client = server.connect();
        client.write_all(b"\x05\x01\x00\x05\x01\x00\x03\x07no.test\x00\x50").expect("request sent");
        let log = server.wait_log(|log| log.contains("probe end"));
        let probes = log.lines().filter_map(|line| line.strip_prefix("probe ")?.split_once('='));
        let probes: BTreeMap<_, _> =
            probes.map(|(name, errno)| (name.to_owned(), errno.parse::<i32>().expect("an errno"))).collect();
        (server, probes)
    };
    let log = dir.path().join("s5/log").join("access.log").display().to_string();
    fs::create_dir(dir.path().join("s5/log")).expect("folder created");
    for args in [&[][..], &["--access-log", &log], &["--run-as", "nobody"]] {
        let (server, probes) = start(args);
        if !sandbox_line(&server).ends_with("Landlock ABI 7, seccomp") {
            return record_skip("the kernel lacks a part of the sandbox");
        }
        let refused = ["exec", "fork", "ptrace", "raw", "packet", "setuid", "kill", "dumpable", "type", "spawn"];
        let files = ["shadow", "secret", "overwrite", "create", "remove"];
        let expected = refused.map(|name| (name, EPERM)).into_iter().chain(files.map(|name| (name, EACCES)));
        let expected = expected.chain([("read", OK), ("stream", OK)]).map(|(name, errno)| (name.to_owned(), errno));
        assert_eq!(probes, expected.collect(), "{args:?}");
        // The library asks twice for raw sockets, and spawns a process with all signals blocked.
        let calls = [
            nix::libc::SYS_execve,
            nix::libc::SYS_clone,
            nix::libc::SYS_ptrace,
            nix::libc::SYS_socket,
            nix::libc::SYS_kill,
        ];
        for call in calls {
            let line = format!("sandbox: system call {call} refused");
            let log = server.wait_log(|log| log.contains(&line));
            assert_eq!(log.matches(&line).count(), 1, "{log}");
        }
    }
    // The probes find what is not restricted. Without the sandbox, `exec` would replace the server.
    assert!(fs::exists(&users).expect("checked") && !fs::exists("/tmp/s5-probe").expect("checked"));
}

#[test]
fn all_threads_have_no_capabilities_and_inherited_descriptors_are_closed() {
    if !is_root() {
        return;
    }
    for (args, uid, in_force) in [("", 0, ""), ("--run-as nobody", 65534, "user nobody (65534:65534), ")] {
        // With a session, so that all threads have started. The shell opens descriptor 7.
        let script = format!("exec \"$0\" serve --listen 127.0.0.1:0 {args} 7</dev/zero");
        let server = Server::start_with(Command::new("sh").args(["-c", &script]).arg(s5().get_program()), 1);
        let (_tunnel, rep, _) = open(&server, 1, echo_server());
        assert_eq!(rep, 0);
        assert!(sandbox_line(&server).starts_with(&format!("{in_force}no capabilities, no_new_privs, ")));
        let tasks: Vec<_> = fs::read_dir(format!("/proc/{}/task", server.pid())).expect("runs").flatten().collect();
        assert!(tasks.len() > 2, "{tasks:?}");
        for task in tasks {
            let status = fs::read_to_string(task.path().join("status")).expect("status read");
            for set in ["Inh", "Prm", "Eff", "Bnd", "Amb"] {
                assert!(status.contains(&format!("\nCap{set}:\t0000000000000000\n")), "{args:?} {status}");
            }
            let ids = [format!("\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n"), "\nNoNewPrivs:\t1\nSeccomp:\t2\n".into()];
            assert!(ids.iter().all(|line| status.contains(line)), "{args:?} {status}");
        }
        let links = fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("the server runs").flatten();
        let is_open = links.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|file| file == Path::new("/dev/zero"));
        assert!(!is_open, "{args:?}");
    }
}

#[test]
fn server_of_another_user_reloads_files_that_were_replaced_and_warns_about_unreadable_ones() {
    if !is_root() {
        return;
    }
    let (_dir, [rules, _]) = files();
    let server = Server::start(&["--run-as", "nobody", "--rules", &rules]);
    assert_eq!(open(&server, 1, echo_server()).1, 0);
    fs::write(format!("{rules}.new"), "deny command=connect\n")
        .and_then(|()| fs::rename(format!("{rules}.new"), &rules))
        .expect("renamed");
    assert!(server.reload().contains("rules: 1"), "{}", server.log());
    assert_eq!(open(&server, 1, echo_server()).1, 2);
    let log = server.log();
    assert!(!log.contains("cannot be read") && !log.contains(" refused (see"), "{log}");
    fs::set_permissions(&rules, fs::Permissions::from_mode(0o600)).expect("permissions set");
    let server = Server::start(&["--run-as", "nobody", "--rules", &rules]);
    server.wait_log(|log| log.contains(&format!("sandbox: {rules} cannot be read again: permission denied")));
}

#[test]
fn reload_of_a_link_to_another_directory_fails_with_the_remedy_and_a_restart_succeeds() {
    let dir = temp_dir();
    let path = |name: &str| dir.path().join(name);
    for name in ["v1", "v2", "etc"] {
        fs::create_dir(path(name)).expect("folder created");
    }
    write_file(&path("v1"), "rules", "");
    write_file(&path("v2"), "rules", "deny port=1\n");
    let link = path("etc").join("rules");
    symlink("../v1/rules", &link).expect("link created");
    let server = Server::start(&["--rules", &link.display().to_string()]);
    if !sandbox_line(&server).contains("Landlock ABI") {
        return record_skip("the kernel lacks Landlock");
    }
    fs::remove_file(&link).and_then(|()| symlink("../v2/rules", &link)).expect("link replaced");
    let line = server.reload();
    let remedy = "is not in the directory that it was in at the start: restart the server, see SANDBOX in the manual";
    let expected = format!("--rules {0}: permission denied ({0} {remedy}); keeping the current", link.display());
    assert!(line.contains(&expected), "{line}");
    let _successor = Successor::of(&server);
    assert_eq!(open(&server, CONNECT, SocketAddr::new(V4, 1)).1, 2, "the new rules are in force");
}

#[test]
fn run_as_refuses_unknown_users_and_no_sandbox_says_so() {
    let table = [
        ("no-such-user", "no such user (create it: useradd --system no-such-user)"),
        ("root:no-such-group", "no such group (create it: groupadd --system no-such-group)"),
        ("nobody:", "expected USER or USER:GROUP (see s5 serve --help)"),
        (":nogroup", "expected USER or USER:GROUP (see s5 serve --help)"),
        ("4000000", "no user has this number (write 4000000:GROUP)"),
    ];
    for (user, expected) in table {
        let output = run(s5().args(["serve", "--listen", "127.0.0.1:0", "--run-as", user]), b"", TIMEOUT);
        let expected = format!("s5: --run-as '{user}': {expected}\n");
        assert_eq!((output.status.code(), &*String::from_utf8_lossy(&output.stderr)), (Some(2), &*expected));
    }
    let server = Server::start(&["--no-sandbox"]);
    assert_eq!(sandbox_line(&server), "off");
    assert_eq!(open(&server, 1, echo_server()).1, 0);
}

#[test]
fn ports_that_need_a_capability_are_refused_at_the_start() {
    for (option, args) in [("--bind-ports", ""), ("--udp-ports", "--no-sandbox --run-as nobody")] {
        if !args.is_empty() && !is_root() {
            continue;
        }
        let mut command = s5();
        command.args(["serve", "--listen", "127.0.0.1:0", option, "1-2000"]).args(args.split_whitespace());
        let output = run(&mut command, b"", TIMEOUT);
        let stderr = String::from_utf8_lossy(&output.stderr);
        let expected = format!("{option}: the server may not use ports below ");
        assert!(output.status.code() == Some(2) && stderr.contains(&expected), "{stderr}");
    }
    if is_root() {
        Server::start(&["--no-sandbox", "--bind-ports", "1-2000"]);
    }
}
