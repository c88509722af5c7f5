//! Handshakes that the client interrupts after each byte by FIN, RST or silence. The server releases all descriptors
//! and ports.

use super::fixtures::fixtures;
use super::server_role::start;
use crate::support::bytes::{LIMIT, encode_addr, wait_port_free};
use crate::support::transcript::User;
use crate::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interruption {
    Fin,
    Reset,
    Silence,
}

/// Each message of the client, with the number of bytes in the answer.
type Handshake = Vec<(Vec<u8>, usize)>;

#[test]
fn fin_after_each_handshake_byte_leaks_nothing() {
    interrupt_at_every_byte(Interruption::Fin, &[]);
}

#[test]
fn reset_after_each_handshake_byte_leaks_nothing() {
    interrupt_at_every_byte(Interruption::Reset, &[]);
}

#[test]
fn timeout_after_each_handshake_byte_leaks_nothing() {
    let args = ["--handshake-timeout", "1s", "--bind-timeout", "1s", "--idle-timeout", "1s"];
    interrupt_at_every_byte(Interruption::Silence, &args);
}

#[test]
fn handshake_timeout_is_not_extended_by_slow_bytes() {
    let server = Server::start(&["--handshake-timeout", "300ms"]);
    let mut stream = server.connect();
    stream.set_read_timeout(Some(Duration::from_millis(20))).expect("timeout set");
    stream.write_all(&[5, 255]).expect("data sent");
    let started = Instant::now();
    // A complete greeting would have 255 methods.
    let is_closed = (0..200).any(|_| {
        let _ = stream.write(&[0x80]);
        !matches!(retry(|| stream.read(&mut [0])), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
    });
    assert!(is_closed, "still open after {:?}", started.elapsed());
}

#[test]
fn client_reset_before_accept_is_logged_with_its_address() {
    let server = Server::start(&["-v"]);
    server.signal("STOP");
    let stream = server.connect();
    let client = stream.local_addr().expect("local address");
    interrupt(Interruption::Reset, stream).expect("connection reset");
    server.signal("CONT");
    let log = server.wait_log(|log| log.contains(" msg=session "));
    assert!(log.contains(&format!(" from={client} ")), "{client}\n{log}");
}

fn interrupt_at_every_byte(interruption: Interruption, args: &[&str]) {
    let dir = temp_dir();
    // With the lines of the clients that send nothing.
    let args: Vec<String> = args.iter().chain(&["-v"]).map(ToString::to_string).collect();
    let alice = User { bcrypt: false, name: "alice".into(), password: "secret".into() };
    for users in [vec![], vec![alice]] {
        let server = start(&args, &users, dir.path(), "users");
        let handshakes = [1, 2, 3].map(|command| handshake(command, !users.is_empty()));
        // First a complete session of each command, for descriptors that the server opens once and keeps.
        for handshake in &handshakes {
            send_up_to(&server, handshake, usize::MAX).0.shutdown(Shutdown::Both).expect("half-closed");
        }
        wait_until("the first sessions end", LIMIT, || server.log().matches(" msg=session ").count() >= 3);
        let before = server.descriptors();
        let mut interrupted = Vec::new();
        for (command, handshake) in (1..).zip(&handshakes) {
            let length: usize = handshake.iter().map(|(message, _)| message.len()).sum();
            interrupted.extend((0..=length).map(|end| (command, send_up_to(&server, handshake, end))));
        }
        let (mut clients, mut ports) = (Vec::new(), Vec::new());
        for (command, (stream, bnd)) in interrupted {
            clients.push(stream.local_addr().expect("local address"));
            ports.extend(bnd.filter(|_| command != 1).map(|addr| (addr, command == 2)));
            interrupt(interruption, stream).unwrap_or_else(|error| panic!("{interruption:?}, CMD {command}: {error}"));
        }
        assert_eq!(ports.len(), 2, "ports of the complete BIND and UDP ASSOCIATE");
        for (addr, is_tcp) in ports {
            assert!(wait_port_free(addr, is_tcp), "{interruption:?}: {addr} is still in use\n{}", server.log());
        }
        wait_until("the server releases its descriptors", LIMIT, || server.descriptors() <= before);
        for client in clients {
            let text = format!(" from={client} ");
            let count = |log: &str| session_lines(log).iter().filter(|line| line.contains(&text)).count();
            wait_until(&format!("one line with{text}"), LIMIT, || count(&server.log()) == 1);
        }
        assert!(!server.log().contains("from=unix"), "a TCP client is logged as a Unix client\n{}", server.log());
        send_up_to(&server, &handshake(1, !users.is_empty()), usize::MAX);
    }
}

fn handshake(command: u8, login: bool) -> Handshake {
    let dst = fixtures().addr(if command == 1 { "echo" } else { "any" }).expect("known fixture");
    let request = [&[5, command, 0], encode_addr(dst).as_slice()].concat();
    match login {
        false => vec![(vec![5, 1, 0], 2), (request, 10)],
        true => vec![(vec![5, 1, 2], 2), (b"\x01\x05alice\x06secret".into(), 2), (request, 10)],
    }
}

/// Sends the first `end` bytes of a handshake and reads the answers to its complete messages. Returns BND if the
/// handshake is complete.
fn send_up_to(server: &Server, handshake: &Handshake, end: usize) -> (TcpStream, Option<SocketAddr>) {
    // Each client has an address of its own, so that all lines are logged.
    let mut stream = connect_from_ip(server, unused_client_ip());
    let mut remaining = end;
    for (message, answer) in handshake {
        let part = message.get(..remaining).unwrap_or(message);
        stream.write_all(part).expect("data sent");
        remaining -= part.len();
        if part.len() < message.len() {
            return (stream, None);
        }
        let bytes = read_exact(&mut stream, *answer);
        assert_eq!(bytes[1] & !2, 0, "{bytes:?}: expected a method or success");
        if let [.., a, b, c, d, high, low] = bytes[..] {
            return (stream, Some(([a, b, c, d], u16::from_be_bytes([high, low])).into()));
        }
    }
    (stream, None)
}

/// Interrupts a handshake and waits until the server closes.
fn interrupt(interruption: Interruption, mut stream: TcpStream) -> std::io::Result<()> {
    match interruption {
        Interruption::Fin => stream.shutdown(Shutdown::Write)?,
        Interruption::Reset => return SockRef::from(&stream).set_linger(Some(Duration::ZERO)),
        Interruption::Silence => {}
    }
    stream.set_read_timeout(Some(LIMIT))?;
    match stream.read_to_end(&mut Vec::new()) {
        Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => Err(error),
        _ => Ok(()),
    }
}
