//! Lookups and connection attempts: shares of the clients, cancelled work, and threads that end.

use crate::*;

/// A resolver that gives up after a second.
const RESOLV: &str = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n";

/// Names of the threads of the server, and how often all of them have waited so far.
fn threads(server: &Server) -> (Vec<String>, u64) {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).expect("the server runs");
    // A thread may have ended.
    let status = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok());
    let of_thread = |status: String| {
        let field = |name| status.lines().find_map(|line| line.strip_prefix(name)).expect("a field").trim().to_owned();
        (field("Name:"), field("voluntary_ctxt_switches:").parse::<u64>().expect("a number"))
    };
    let (names, waits): (Vec<_>, Vec<_>) = status.map(of_thread).unzip();
    (names, waits.into_iter().sum())
}

/// Sends a CONNECT to each name, from a connection of its own.
fn request_names(server: &Server, names: impl Iterator<Item = String>) -> Vec<TcpStream> {
    let request = |name: String| {
        let mut stream = greet(server);
        stream.write_all(&request_by_name(CONNECT, &name, 9)).expect("request sent");
        stream
    };
    names.map(request).collect()
}

#[test]
fn threads_of_lookups_end_and_an_idle_server_does_not_wake_up() {
    enter_namespace!("", RESOLV);
    dns::start();
    let server = Server::start(&["--threads", "2"]);
    let (before, _) = threads(&server);
    for mut stream in request_names(&server, (0..60).map(|n| format!("silent.n{n}"))) {
        assert_eq!(read_reply(&mut stream).0, 1);
    }
    wait_until("all threads of lookups have ended", TIMEOUT, || threads(&server).0 == before);
    // Without connections, the last timers of the sessions have ended too.
    let mut waits = 0;
    wait_until("one second without a wake-up", TIMEOUT, || {
        waits = threads(&server).1;
        thread::sleep(Duration::from_secs(1));
        threads(&server).1 == waits
    });
}
