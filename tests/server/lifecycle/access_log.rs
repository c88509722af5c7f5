//! The file of `--access-log`: rotation, full disks, files that block, permissions.

use std::os::unix::fs::{MetadataExt as _, chown, lchown};

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::{Signal, kill_process};

use crate::*;

/// A folder for the log, and the path of the file.
fn log_file() -> (TempDir, String) {
    let dir = temp_dir();
    let file = dir.path().join("access.log").display().to_string();
    (dir, file)
}

/// Runs a session that the target refuses, from a client address of its own.
fn run_session(server: &Server) {
    let mut stream = greet_from(server, unused_client_ip());
    stream.write_all(&request(CONNECT, server.addr())).expect("request sent");
    assert_eq!(read_reply(&mut stream).0, 2);
}

/// Returns the ids of the session lines in all files of a folder, sorted. Fails if a line is not whole.
fn ids(dir: &Path) -> Vec<usize> {
    let files = fs::read_dir(dir).expect("folder read").flatten().map(|entry| entry.path());
    let text = files.map(|file| fs::read_to_string(file).expect("file read")).collect::<String>();
    assert!(text.is_empty() || text.ends_with('\n'), "{text}");
    let id = |line: &str| {
        let fields =
            line.split_once(" level=info msg=session id=").filter(|(ts, _)| ts.len() == "ts=T.123Z".len() + 18);
        let (id, rest) = fields.and_then(|(_, fields)| fields.split_once(' ')).unwrap_or_else(|| panic!("{line}"));
        assert!(rest.starts_with("from=127.") && rest.ends_with('"') && rest.matches("from=").count() == 1, "{line}");
        id.parse().expect("a number")
    };
    let mut ids: Vec<usize> = text.lines().map(id).collect();
    ids.sort_unstable();
    ids
}

#[test]
fn access_log_has_all_sessions_and_stderr_all_other_lines() {
    // No other process takes the port of the server.
    enter_namespace!("", "");
    let (_dir, file) = log_file();
    let sessions = || fs::read_to_string(&file).expect("file read").matches(" level=info msg=session ").count();
    fs::write(&file, "ts=2026-11-27T00:00:00.000Z level=info msg=session id=1000 from=127.0.0.1:1 error=\"x\"\n")
        .expect("file written");
    for args in [&["-vv"][..], &["-q"]] {
        let addr = closed_port();
        let mut command = s5();
        command.args(["serve", "--listen", &addr.to_string(), "--access-log", &file]).args(args);
        let mut program = RunningProgram::start(&mut command);
        wait_until("the server listens", TIMEOUT, || TcpStream::connect(addr).is_ok());
        let before = sessions();
        let mut stream = greet_at(addr);
        stream.write_all(&request(CONNECT, addr)).expect("request sent");
        assert_eq!(read_reply(&mut stream).0, 2);
        drop(stream);
        wait_until("the line is written", TIMEOUT, || sessions() > before);
        if args == ["-vv"] {
            program.stderr(|stderr| stderr.contains("msg=start"));
        }
        let stderr = program.kill().2;
        assert!(!stderr.contains("msg=session"), "{stderr}");
        assert_eq!(stderr.contains("msg=start"), args == ["-vv"], "{stderr}");
    }
}

#[test]
fn rotation_under_load_loses_and_tears_no_line() {
    let (dir, file) = log_file();
    let server = Server::start(&["--access-log", &file, "--threads", "2"]);
    let (count, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    run_session(&server);
                    count.fetch_add(1, Ordering::Relaxed);
                    // All clients together may log 2000 lines a second.
                    thread::sleep(Duration::from_millis(2));
                }
            });
        }
        for n in 0..20 {
            let enough = count.load(Ordering::Relaxed) + 20;
            wait_until("sessions run", TIMEOUT, || count.load(Ordering::Relaxed) > enough);
            fs::rename(&file, format!("{file}.{n}")).expect("renamed");
            server.reload();
            wait_until("there is a new file", TIMEOUT, || fs::exists(&file).expect("checked"));
        }
        is_over.store(true, Ordering::Relaxed);
    });
    let expected: Vec<usize> = (1..=count.into_inner()).collect();
    wait_until("all lines are written", TIMEOUT, || ids(dir.path()).len() == expected.len());
    assert_eq!(ids(dir.path()), expected);
    assert!(session_lines(&server.log()).is_empty(), "{}", server.log());
    let metadata = fs::metadata(&file).expect("a file");
    assert_eq!(metadata.mode() & 0o777 & !0o640, 0, "{:o}", metadata.mode());
}

#[test]
fn access_log_is_reopened_while_the_server_drains_and_complete_at_its_end() {
    let (_dir, file) = log_file();
    let mut server = Server::start(&["--access-log", &file, "--drain-timeout", "60"]);
    let tunnels = [(); 15].map(|()| tunnel(&server));
    server.signal("TERM");
    server.wait_log(|log| log.contains("draining sessions"));
    fs::rename(&file, format!("{file}.1")).expect("renamed");
    server.signal("HUP");
    wait_until("there is a new file", TIMEOUT, || fs::exists(&file).expect("checked"));
    drop(tunnels);
    assert_eq!(server.wait(TIMEOUT).code(), Some(0));
    assert_eq!(session_lines(&fs::read_to_string(&file).expect("file read")).len(), 15);
}

#[test]
fn full_disk_costs_lines_that_are_counted_and_no_session() {
    enter_namespace!("127.0.0.1 localhost\n", "");
    let (dir, file) = log_file();
    let mut mount = Command::new("mount");
    let status = mount.args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"]).arg(dir.path()).status();
    assert!(status.expect("mount runs").success());
    let server = Server::start(&["--access-log", &file]);
    // All but one page, so that a part of a line fits.
    let filler = dir.path().join("filler");
    let mut size = 0;
    while fs::write(&filler, "\n".repeat(size + 4096)).is_ok() {
        size += 4096;
    }
    fs::write(&filler, "\n".repeat(size - 4096)).expect("there was room for that");
    (0..60).for_each(|_| run_session(&server));
    server.wait_log(|log| log.contains("no space left on device"));
    fs::remove_file(&filler).expect("file removed");
    run_session(&server);
    let log = server.wait_log(|log| log.contains(" level=warn msg=lost lines="));
    assert!(log.contains(&format!(" file=\"{file}\" error=\"no space left on device\"\n")), "{log}");
    wait_until("all lines are written or lost", TIMEOUT, || ids(dir.path()).len() + lost(&server.log()) == 61);
}

#[test]
fn process_that_drains_after_a_restart_writes_to_the_file_that_the_new_one_has_opened() {
    let (_dir, file) = log_file();
    let old = format!("{file}.1");
    let mut server = Server::start(&["--access-log", &file, "--drain-timeout", "60"]);
    let tunnels = [1, 2].map(|_| connect_to(&server, echo_server()));
    let successor = Successor::of(&server);
    fs::rename(&file, &old).expect("renamed");
    let lines = |file: &str| fs::read_to_string(file).map_or(0, |text| text.lines().count());
    let [first, last] = tunnels;
    // The new process has not handled the signal yet.
    drop(first);
    wait_until("the line is in the old file", TIMEOUT, || lines(&old) == 1);
    kill_process(successor.0, Signal::HUP).expect("the new process runs");
    wait_until("there is a new file", TIMEOUT, || fs::exists(&file).expect("checked"));
    drop(last);
    wait_until("the line is in the new file", TIMEOUT, || lines(&file) == 1);
    kill_process(successor.0, Signal::TERM).expect("the new process runs");
    assert!(server.wait(TIMEOUT).success());
}

#[test]
fn access_log_follows_a_link_to_a_missing_file_and_replaces_a_link_that_was_renamed() {
    let dir = temp_dir();
    let (links, data) = (dir.path().join("links"), dir.path().join("data"));
    fs::create_dir(&links).and_then(|()| fs::create_dir(&data)).expect("folders created");
    let (link, file) = (links.join("access.log"), data.join("access.log"));
    symlink("../data/access.log", &link).expect("link created");
    let server = Server::start(&["--access-log", &link.display().to_string()]);
    let rotate = |path: &Path| {
        fs::rename(path, path.with_extension("1")).expect("renamed");
        server.reload();
        run_session(&server);
        wait_until("the new file has the line", TIMEOUT, || fs::read(path).is_ok_and(|text| text.ends_with(b"\n")));
    };
    rotate(&file);
    rotate(&link);
    assert!(!link.is_symlink());
}

/// Returns the number of lost lines.
fn lost(log: &str) -> usize {
    let numbers =
        log.lines().filter_map(|line| line.split_once(" msg=lost lines=")?.1.split(' ').next()?.parse::<usize>().ok());
    numbers.sum()
}

#[test]
fn path_that_cannot_be_a_log_is_an_error_with_its_own_remedy() {
    let table = [
        (2, "", "--access-log: \"\" and \"-\" are not files (omit the option to log to stderr)"),
        (2, "-", "--access-log: \"\" and \"-\" are not files (omit the option to log to stderr)"),
        (23, "/nonexistent/log", "--access-log /nonexistent/log: no such file or directory (create its directory)"),
        (23, "/tmp", "--access-log /tmp: is a directory\n"),
    ];
    for (status, path, error) in table {
        let output = run(s5().args(["serve", "--listen", "127.0.0.1:0", "--access-log", path]), b"", TIMEOUT);
        assert_fails_with(&output, status, &[error]);
    }
}

#[test]
fn device_without_space_costs_lines_that_are_counted_at_the_exit() {
    let (mut server, metrics) = crate::metrics::start(&["--access-log", "/dev/full"]);
    (0..3).for_each(|_| run_session(&server));
    server.wait_log(|log| log.contains("--access-log /dev/full: no space left on device; lines are lost"));
    let lines = "s5_log_lines_dropped_total{reason=\"unwritten\"}";
    wait_until("the lines count", TIMEOUT, || crate::metrics::Metrics::scrape(metrics).get(lines) == 3.0);
    server.signal("TERM");
    assert_eq!(server.wait(TIMEOUT).code(), Some(0));
    server.wait_log(|log| lost(log) == 3);
}

#[test]
fn size_limit_of_files_costs_lines_and_not_the_server() {
    let (_dir, file) = log_file();
    let mut command = Command::new("prlimit");
    command.args(["--fsize=2000", env!("CARGO_BIN_EXE_s5"), "serve", "--listen", "127.0.0.1:0", "--access-log", &file]);
    let mut server = Server::start_with(&mut command, 1);
    (0..20).for_each(|_| run_session(&server));
    server.wait_log(|log| log.contains(": file too large; lines are lost"));
    server.signal("TERM");
    assert_eq!(server.wait(TIMEOUT).code(), Some(0));
}

#[test]
fn pipe_that_is_not_read_stops_neither_sessions_nor_signals() {
    let (dir, _) = log_file();
    let pipe = dir.path().join("pipe").display().to_string();
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("mkfifo runs").success());
    let output = run(s5().args(["serve", "--listen", "127.0.0.1:0", "--access-log", &pipe]), b"", TIMEOUT);
    assert_fails_with(&output, 23, &["--access-log", "no such device or address (a pipe needs a reader, and"]);
    let mut reader = fs::File::options().read(true).write(true).open(&pipe).expect("pipe opened");
    let mut server = Server::start(&["--access-log", &pipe, "--drain-timeout", "60"]);
    (0..600).for_each(|_| run_session(&server));
    server.reload();
    run_session(&server);
    server.signal("TERM");
    assert_eq!(server.wait(TIMEOUT).code(), Some(0));
    // At the exit, the lines that wait are lost, and stderr has their number.
    let log = server.wait_log(|log| lost(log) > 0);
    assert!(log.contains(&format!(" file=\"{pipe}\" error=\"the access log could not be written\"\n")), "{log}");
    fcntl_setfl(&reader, OFlags::NONBLOCK).expect("flags set");
    let mut written = Vec::new();
    let _ = reader.read_to_end(&mut written);
    assert_eq!(String::from_utf8_lossy(&written).matches(" msg=session ").count() + lost(&log), 601, "{log}");
}

#[test]
fn user_of_run_as_owns_the_file_and_an_error_keeps_the_open_one() {
    if !rustix::process::geteuid().is_root() || std::env::var_os("S5_TEST_NAMESPACE").is_some() {
        return record_skip("only root can switch to another user");
    }
    let (dir, file) = log_file();
    let set_owner = |uid| chown(dir.path(), Some(uid), None).expect("owner set");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("permissions set");
    let args = ["serve", "--listen", "127.0.0.1:0", "--run-as", "nobody", "--access-log", &file];
    let output = run(s5().args(args), b"", TIMEOUT);
    assert_fails_with(&output, 23, &["--access-log", "permission denied (the user of the server must"]);
    set_owner(65534);
    let server = Server::start(&args[3..]);
    let rotate = |to: &str| {
        fs::rename(&file, format!("{file}.{to}")).expect("renamed");
        server.reload();
    };
    rotate("1");
    wait_until("there is a new file", TIMEOUT, || fs::exists(&file).expect("checked"));
    assert_eq!(fs::metadata(&file).expect("a file").uid(), 65534);
    set_owner(0);
    rotate("2");
    let expected =
        format!("--access-log {file}: permission denied (see SANDBOX in the manual); keeping the open file\n");
    server.wait_log(|log| log.contains(&expected));
    run_session(&server);
    wait_until("the line is in the old file", TIMEOUT, || ids(dir.path()) == [1]);
    assert!(!fs::exists(&file).expect("checked"));
    // A link of another user, in a directory where all users can create links.
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).expect("permissions set");
    symlink("/nonexistent", &file).and_then(|()| lchown(&file, Some(1), None)).expect("link created");
    let output = run(s5().args(["serve", "--listen", "127.0.0.1:0", "--access-log", &file]), b"", TIMEOUT);
    assert_fails_with(&output, 23, &[&format!("{file} is a symbolic link of another user")]);
}
