//! Clients of the cluster, which know only the address of HAProxy.

use super::lab::{TARGET, on};
use crate::support::*;

/// The addresses of HAProxy.
pub const PROXY: [&str; 2] = ["10.2.0.10:1080", "[fd00:2::10]:1080"];
/// Sessions per second of the load.
const RATE: u32 = 300;

/// Connects to HAProxy from a client, and sends a request without login. Returns the connection, REP and BND.
pub fn request_from(client: &str, command: u8, dst: SocketAddr) -> (TcpStream, u8, SocketAddr) {
    let proxy = addr(PROXY[usize::from(dst.is_ipv6())]);
    let mut stream = on(client, || greet_at(proxy));
    stream.write_all(&request(command, dst)).expect("request sent");
    let (rep, bnd) = read_reply(&mut stream);
    (stream, rep, bnd)
}

/// Opens a tunnel to the target.
pub fn tunnel_from(client: &str) -> TcpStream {
    on(client, || connect(TARGET[0]))
}

/// Opens a tunnel from this host.
pub fn connect(dst: &str) -> TcpStream {
    let mut stream = greet_at(addr(PROXY[0]));
    stream.write_all(&request(CONNECT, addr(dst))).expect("request sent");
    assert_eq!(read_reply(&mut stream).0, 0, "CONNECT {dst}");
    stream
}

/// Opens a tunnel to the target as a user, whose password is `secret`.
pub fn login_tunnel_from(client: &str, user: &str) -> TcpStream {
    let mut stream = on(client, || TcpStream::connect(PROXY[0])).expect("HAProxy accepts");
    stream.set_read_timeout(Some(TIMEOUT)).expect("timeout set");
    select_password(&mut stream);
    assert_eq!(send_login(&mut stream, user.as_bytes(), b"secret"), 0, "{user}");
    stream.write_all(&request(CONNECT, addr(TARGET[0]))).expect("request sent");
    assert_eq!(read_reply(&mut stream).0, 0, "CONNECT from {client}");
    stream
}

/// One whole session: connects, exchanges data, half-closes, and waits for the end of the target.
pub fn session() -> io::Result<()> {
    let mut stream = connect_for_load(addr(PROXY[0]))?;
    stream.write_all(&[5, 1, 0])?;
    stream.read_exact(&mut [0; 2])?;
    stream.write_all(&request(CONNECT, addr(TARGET[0])))?;
    let mut reply = [0; 10];
    stream.read_exact(&mut reply)?;
    stream.write_all(&reply)?;
    stream.shutdown(Shutdown::Write)?;
    let mut echoed = Vec::new();
    stream.read_to_end(&mut echoed)?;
    if reply[1] == 0 && echoed == reply { Ok(()) } else { Err(io::Error::other(format!("{reply:?}, {echoed:?}"))) }
}

/// Runs sessions of client1 while `work` runs. Returns the errors, and when their sessions began.
pub fn run_load(work: impl FnOnce(&Load) + Send) -> Vec<(Instant, String)> {
    on("client1", || Load::run(RATE, |_| session(), work).errors)
}
