//! SIGHUP ends a server whose terminal has been closed. In all other cases it is a reload.

use rustix::process::{Pid, Signal, kill_process};

use crate::*;

/// A server on a terminal; killed when dropped.
struct TerminalServer {
    /// script(1), which owns the terminal.
    terminal: Option<ProcessGroup>,
    dir: TempDir,
    pid: Pid,
}

impl TerminalServer {
    /// Starts a shell on a new terminal. `command` starts the server as `"$@"` and writes its process id to `pid`.
    fn start(command: &str) -> Self {
        let dir = temp_dir();
        let line = format!("set -- {} serve --listen 127.0.0.1:0; {command}", s5().get_program().display());
        let mut script = Command::new("script");
        script.args(["-qec", &format!("exec 2>log; {line}"), "/dev/null"]).env("SHELL", "/bin/sh");
        script.current_dir(dir.path()).stdin(Stdio::null()).stdout(Stdio::null());
        let terminal = Some(ProcessGroup::start(&mut script));
        wait_until("the server listens", TIMEOUT, || {
            read(dir.path(), "log").contains("listening on ") && read(dir.path(), "pid").ends_with('\n')
        });
        let pid = read(dir.path(), "pid").trim().parse().ok().and_then(Pid::from_raw).expect("a process id");
        Self { terminal, dir, pid }
    }

    fn wait_log(&self, what: &str) {
        wait_until(what, TIMEOUT, || read(self.dir.path(), "log").contains(what));
    }

    fn has_ended(&self) -> bool {
        !PathBuf::from(format!("/proc/{}/cmdline", self.pid.as_raw_nonzero())).exists()
    }

    fn hang_up(&self) {
        kill_process(self.pid, Signal::HUP).expect("the server runs");
    }
}

impl Drop for TerminalServer {
    fn drop(&mut self) {
        let _ = kill_process(self.pid, Signal::KILL);
        if thread::panicking() {
            eprintln!("the server's log:\n{}", read(self.dir.path(), "log"));
        }
    }
}

fn read(dir: &Path, name: &str) -> String {
    std::fs::read_to_string(dir.join(name)).unwrap_or_default()
}

#[test]
fn sighup_reloads_while_the_terminal_is_open_and_ends_the_server_when_it_is_closed() {
    if !is_installed("script") {
        return;
    }
    // As the leader of the session, which the kernel signals, and as a child of the shell.
    for command in ["echo $$ >pid; exec \"$@\"", "\"$@\" & echo $! >pid; wait"] {
        let mut server = TerminalServer::start(command);
        server.hang_up();
        server.wait_log("reload: ");
        server.terminal = None;
        server.wait_log("shutting down: draining sessions");
        wait_until("the server ends", TIMEOUT, || server.has_ended());
    }
}

#[test]
fn server_that_was_started_with_sighup_ignored_outlives_its_terminal() {
    if !is_installed("script") {
        return;
    }
    // As with nohup(1).
    let mut server = TerminalServer::start("echo $$ >pid; trap '' HUP; exec \"$@\"");
    server.terminal = None;
    wait_until("the terminal is closed", TIMEOUT, || {
        let stat =
            std::fs::read_to_string(format!("/proc/{}/stat", server.pid.as_raw_nonzero())).expect("the server runs");
        // tty_nr, field 7 of proc_pid_stat(5).
        stat.rsplit(')').next().and_then(|fields| fields.split_whitespace().nth(4)) == Some("0")
    });
    server.hang_up();
    server.wait_log("reload: ");
    assert!(!server.has_ended());
}
