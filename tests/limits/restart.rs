//! The time limit of a restart.

use crate::*;

#[test]
fn new_process_that_is_not_ready_in_time_is_killed_and_the_server_continues() {
    let dir = temp_dir();
    let program = dir.path().join("s5");
    symlink(s5().get_program(), &program).expect("link created");
    let server = Server::start_with(Command::new(&program).args(["serve", "--listen", "127.0.0.1:0"]), 1);
    write_script(&program, "#!/bin/sh\necho started $$ >&2\nexec sleep 60\n");
    server.signal("USR2");
    let log = server.wait_log(|log| log.contains("started "));
    let pid = log.split_once("started ").and_then(|(_, rest)| rest.lines().next()).expect("a process id");
    let process = Path::new("/proc").join(pid);
    assert!(process.exists());
    // 15 s.
    wait_until("the restart fails", LONG_TIMEOUT, || server.log().contains("; this process goes on\n"));
    let expected = format!("restart: {}: not ready within 15s (signal: 9 (SIGKILL)); ", program.display());
    assert!(server.log().contains(&expected) && !process.exists(), "{}", server.log());
    greet(&server);
}
