//! The bytes on the network: with encryption, requests, data and replies must not be readable.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::support::programs::{has_all, stdout};
use crate::support::scripted::RunningProgram;
use crate::support::{
    CONNECT, TIMEOUT, V4, in_namespace, request_by_name, tcp_server, temp_dir, udp_echo_server, wait_until,
};
use crate::{LEVELS, client_at, realm, serve_at, url};

const CLIENT_DATA: &[u8] = b"a secret of the client";
const SERVER_DATA: &[u8] = b"a secret of the server";
/// Host name of the target in requests.
const NAME: &str = "localhost";

/// Bytes from the client and to the client.
type Recording = [Arc<Mutex<Vec<u8>>>; 2];

/// Forwards connections to `to` and records both directions.
fn recorder(to: SocketAddr) -> (String, Recording) {
    let seen = Recording::default();
    let kept = seen.clone();
    let addr = tcp_server(V4, move |client| {
        let server = TcpStream::connect(to).expect("the server accepts");
        let pump = |mut from: &TcpStream, mut to: &TcpStream, kept: &Mutex<Vec<u8>>| {
            let mut buffer = [0; 65_536];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                kept.lock().expect("no panic").extend(&buffer[..n]);
                let _ = to.write_all(&buffer[..n]);
            }
            let _ = to.shutdown(Shutdown::Write);
        };
        thread::scope(|scope| {
            scope.spawn(|| pump(&server, &client, &kept[1]));
            pump(&client, &server, &kept[0]);
        });
    });
    (format!("localhost:{}", addr.port()), seen)
}

/// Starts a target that answers after the client's half-close.
fn target() -> SocketAddr {
    tcp_server(V4, |mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).expect("closed");
        stream.write_all(SERVER_DATA).expect("sent");
    })
}

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|window| window == needle)
}

/// Skips the greeting, the token and the level: the ticket contains the host name of the proxy.
fn after_the_login(bytes: &[u8], greeting: usize) -> &[u8] {
    let mut rest = &bytes[greeting..];
    for mtyp in [1, 2] {
        assert_eq!(rest[..2], [1, mtyp]);
        rest = &rest[4 + usize::from(u16::from_be_bytes([rest[2], rest[3]]))..];
    }
    rest
}

#[test]
fn stream_is_readable_without_encryption_and_hidden_with_it() {
    let Some(realm) = realm() else { return };
    let target = target();
    let request = request_by_name(CONNECT, NAME, target.port());
    for level in LEVELS {
        let server = serve_at(&realm, level);
        let (proxy, seen) = recorder(server.addr());
        let target = format!("{NAME}:{}", target.port());
        let received = stdout(&mut client_at(&realm, "connect", &proxy, level, &[&target]), CLIENT_DATA);
        assert_eq!(received, SERVER_DATA);
        let [up, down] = seen.map(|seen| seen.lock().expect("no panic").clone());
        let (up, down) = (after_the_login(&up, 3), after_the_login(&down, 2));
        for (case, direction, bytes) in [
            ("the request", up, &request[..]),
            ("the name", up, NAME.as_bytes()),
            ("the data", up, CLIENT_DATA),
            ("the reply", down, &[5, 0, 0, 1, 127, 0, 0, 1]),
            ("the answer", down, SERVER_DATA),
        ] {
            assert_eq!(contains(direction, bytes), level != "confidentiality", "{case} at {level}");
        }
        assert_eq!(up[..2] == [1, 3] && down[..2] == [1, 3], level != "none", "frames at {level}");
    }
}

#[test]
fn captured_packets_are_readable_only_without_encryption() {
    if !has_all(&["tshark", "unshare"]) || realm().is_none() {
        return;
    }
    // A network namespace has no other traffic, and permits capturing.
    let test = "capture::captured_packets_are_readable_only_without_encryption";
    if !in_namespace(test, "127.0.0.1 localhost\n", "") {
        return;
    }
    let realm = realm().expect("a realm can be started");
    let target = target();
    let udp = udp_echo_server(V4);
    for level in &LEVELS[1..] {
        let dir = temp_dir();
        let file = dir.path().join("capture.pcapng");
        let server = serve_at(&realm, level);
        let mut tshark = Command::new("tshark");
        tshark.args(["-i", "lo", "-q", "-w"]).arg(&file).stdin(Stdio::null());
        let mut tshark = RunningProgram::start(&mut tshark);
        tshark.stderr(|stderr| stderr.contains("Capturing on"));
        // tshark prints this before it captures, so wait for a marker packet.
        let marker = UdpSocket::bind((V4, 0)).expect("a port");
        let to = marker.local_addr().expect("an address");
        repeat_until_captured(&file, b"the capture begins", || drop(marker.send_to(b"the capture begins", to)));
        let client = |mode, target: SocketAddr| client_at(&realm, mode, &url(&server), level, &[&target.to_string()]);
        assert_eq!(stdout(&mut client("connect", target), CLIENT_DATA), SERVER_DATA);
        let mut client = RunningProgram::start(&mut client("udp", udp));
        client.write(b"a secret datagram\n");
        client.stdout(|all| all == b"a secret datagram\n");
        drop(client);
        repeat_until_captured(&file, b"the capture ends", || drop(marker.send_to(b"the capture ends", to)));
        assert!(tshark.is_running());
        drop(tshark);
        let bnd = server.wait_log(|log| log.contains("command=udp"));
        let (_, relay) = bnd.rsplit_once("bnd=127.0.0.1:").expect("the relay's port");
        let relay = relay.split(' ').next().expect("a number");
        // Only packets between client and server, not those between server and target.
        let filter = format!("tcp.port == {} || udp.port == {relay}", server.addr().port());
        let mut read = Command::new("tshark");
        read.args(["-T", "fields", "-e", "tcp.payload", "-e", "udp.payload", "-Y", &filter, "-r"]).arg(&file);
        let hex = String::from_utf8(stdout(&mut read, b"")).expect("hexadecimal");
        assert!(hex.lines().count() > 10, "all was captured");
        for data in [CLIENT_DATA, SERVER_DATA, b"a secret datagram"] {
            let data_hex: String = data.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex.contains(&data_hex), *level == "integrity", "{level}: {data_hex}");
        }
    }
}

/// Repeats `act` until the file contains these bytes.
fn repeat_until_captured(file: &Path, bytes: &[u8], act: impl Fn()) {
    wait_until("it is captured", TIMEOUT, || {
        act();
        std::fs::read(file).is_ok_and(|all| contains(&all, bytes))
    });
}
