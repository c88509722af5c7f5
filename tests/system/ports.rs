//! Many tunnels from one source address.

use std::process::Child;

use crate::support::*;

/// Servers with the same source address. Each has a process with its clients and its target, because a process may often
/// have only 20,000 descriptors.
const PARTS: u16 = 5;
const TUNNELS: usize = 8_000;
const SOURCE: &str = "127.0.0.2";
/// Set for a process with the clients of a server: the port of its target.
const PART: &str = "S5_TEST_PART";

/// Opens the tunnels of one server, and keeps them until the end of stdin.
fn open_part(port: u16) {
    let dir = temp_dir();
    let path = dir.path().join("s5");
    let mut command = s5();
    let listen = format!("unix:{}", path.display());
    command.args(["serve", "--listen", &listen, "--outbound", SOURCE, "--max-per-client", "9000"]);
    let _server = Server::start_with(&mut command, 1);
    let target = TcpListener::bind((V4, port)).expect("free port");
    let greeting_and_request = [&[5, 1, 0][..], &request(CONNECT, SocketAddr::new(V4, port))].concat();
    let open = |n| {
        let mut client = UnixStream::connect(&path).expect("the server accepts");
        client.write_all(&greeting_and_request).expect("request sent");
        let mut answer = [0; 4];
        client.read_exact(&mut answer).expect("answered");
        assert_eq!(answer, [5, 0, 5, 0], "after {n} tunnels");
        (client, target.accept().expect("a connection"))
    };
    let _tunnels: Vec<_> = (0..TUNNELS).map(open).collect();
    println!("open");
    let _ = io::stdin().read(&mut [0]);
}

/// Fails if a connection takes a port of its source address for itself (without IP_BIND_ADDRESS_NO_PORT): an address has
/// 28,232 ports by default.
#[test]
#[ignore = "make test-system"]
fn one_source_address_serves_40_000_tunnels() {
    enter_namespace!("", "");
    if !raise_fd_limit(2 * TUNNELS as u64 + 500) {
        return record_skip("the limit of descriptors is too low");
    }
    if let Ok(port) = std::env::var(PART) {
        return open_part(port.parse().expect("a port"));
    }
    let test = test_name(here);
    let start = |port: u16| {
        let mut command = Command::new(std::env::current_exe().expect("path of this test"));
        command.args(["--exact", test, "--nocapture", "--ignored"]).env(PART, port.to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("started")
    };
    let mut parts: Vec<Child> = (1..=PARTS).map(start).collect();
    for part in &mut parts {
        let lines = BufReader::new(part.stdout.as_mut().expect("stdout is piped")).lines();
        assert!(lines.map_while(Result::ok).any(|line| line.ends_with("open")), "a part has failed");
    }
    let table = fs::read_to_string("/proc/net/tcp").expect("table read");
    // The address in hexadecimal.
    let is_tunnel = |line: &&str| line.split_whitespace().nth(1).is_some_and(|local| local.starts_with("0200007F:"));
    assert_eq!(table.lines().filter(is_tunnel).count(), usize::from(PARTS) * TUNNELS);
    for mut part in parts {
        drop(part.stdin.take());
        assert!(part.wait().expect("ended").success());
    }
}
