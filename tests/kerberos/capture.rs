//! What somebody on the wire gets to see.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::common::{TIMEOUT, in_namespace, is_installed, tcp_server, udp_echo_server, wait_until};
use crate::kit::V4;
use crate::scripted::RunningProgram;
use crate::{LEVELS, client_at, realm, serve_at, stdout, url};

const SENT: &[u8] = b"a secret of the client";
const ANSWERED: &[u8] = b"a secret of the server";
/// By which the target is asked for.
const NAME: &str = "localhost";

/// From the client, and to it.
type Seen = [Arc<Mutex<Vec<u8>>>; 2];

/// Passes connections on to `to` and keeps what goes through.
fn recorder(to: SocketAddr) -> (String, Seen) {
    let seen = Seen::default();
    let kept = seen.clone();
    let addr = tcp_server(V4, move |client| {
        let server = TcpStream::connect(to).expect("the server accepts");
        let handles =
            |a: &TcpStream, b: &TcpStream| (a.try_clone().expect("a handle"), b.try_clone().expect("a handle"));
        let pump = |(mut from, mut to): (TcpStream, TcpStream), kept: Arc<Mutex<Vec<u8>>>| {
            let mut buffer = [0; 65_536];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                kept.lock().expect("no panic holds it").extend(&buffer[..n]);
                let _ = to.write_all(&buffer[..n]);
            }
            let _ = to.shutdown(Shutdown::Write);
        };
        let (up, down, [sent, received]) = (handles(&client, &server), handles(&server, &client), kept.clone());
        let back = thread::spawn(move || pump(down, received));
        pump(up, sent);
        back.join().expect("a thread");
    });
    (format!("localhost:{}", addr.port()), seen)
}

fn contains(octets: &[u8], needle: &[u8]) -> bool {
    octets.windows(needle.len()).any(|window| window == needle)
}

/// What stands behind the greeting, a token and a level, each in its frame: the ticket has the name of the proxy in it.
fn behind_the_login(octets: &[u8], greeting: usize) -> &[u8] {
    let mut rest = &octets[greeting..];
    for mtyp in [1, 2] {
        assert_eq!(rest[..2], [1, mtyp]);
        rest = &rest[4 + usize::from(u16::from_be_bytes([rest[2], rest[3]]))..];
    }
    rest
}

#[test]
fn a_stream_shows_all_at_level_1_and_nothing_at_level_2() {
    let Some(realm) = realm() else { return };
    let target = tcp_server(V4, |mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).expect("it is closed");
        stream.write_all(ANSWERED).expect("it is sent");
    });
    let request = crate::kit::request_by_name(crate::kit::CONNECT, NAME, target.port());
    for level in LEVELS {
        let server = serve_at(&realm, level);
        let (proxy, seen) = recorder(server.addr());
        let target = format!("{NAME}:{}", target.port());
        let came = stdout(&mut client_at(&realm, "connect", &proxy, level, &[&target]), SENT);
        assert_eq!(came, ANSWERED);
        let [up, down] = seen.map(|seen| seen.lock().expect("no panic holds it").clone());
        let (up, down) = (behind_the_login(&up, 3), behind_the_login(&down, 2));
        for (what, direction, octets) in [
            ("the request", up, &request[..]),
            ("the name", up, NAME.as_bytes()),
            ("the data", up, SENT),
            ("the reply", down, &[5, 0, 0, 1, 127, 0, 0, 1]),
            ("the answer", down, ANSWERED),
        ] {
            assert_eq!(contains(direction, octets), level != "confidentiality", "{what} at {level}");
        }
        assert_eq!(up[..2] == [1, 3] && down[..2] == [1, 3], level != "none", "frames at {level}");
    }
}

#[test]
fn an_eavesdropper_can_follow_streams_and_datagrams_at_level_1_only() {
    if !is_installed("tshark") || !is_installed("unshare") || realm().is_none() {
        return;
    }
    // With nobody else on the wire, and as whoever may listen there.
    let this = "capture::an_eavesdropper_can_follow_streams_and_datagrams_at_level_1_only";
    if !in_namespace(this, "127.0.0.1 localhost\n", "") {
        return;
    }
    let realm = realm().expect("a realm can be started");
    let target = tcp_server(V4, |mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).expect("it is closed");
        stream.write_all(ANSWERED).expect("it is sent");
    });
    let udp = udp_echo_server(V4);
    for level in &LEVELS[1..] {
        let folder = crate::common::temp_dir();
        let file = folder.path().join("capture.pcapng");
        let server = serve_at(&realm, level);
        let (host, port) = (server.addr().ip(), server.addr().port());
        assert_eq!(host, V4);
        let mut tshark = Command::new("tshark");
        tshark.args(["-i", "lo", "-q", "-w"]).arg(&file).stdin(Stdio::null());
        let mut tshark = RunningProgram::start(&mut tshark);
        tshark.stderr(|said| said.contains("Capturing on"));
        // It says so a little before it does so.
        let marker = UdpSocket::bind((V4, 0)).expect("a port");
        let to = marker.local_addr().expect("an address");
        seen_after(&file, b"the capture begins", || drop(marker.send_to(b"the capture begins", to)));
        let args = [target.to_string()];
        let came = stdout(&mut client_at(&realm, "connect", &url(&server), level, &[&args[0]]), SENT);
        assert_eq!(came, ANSWERED);
        let mut client =
            RunningProgram::start(&mut client_at(&realm, "udp", &url(&server), level, &[&udp.to_string()]));
        client.write(b"a secret datagram\n");
        client.stdout(|all| all == b"a secret datagram\n");
        drop(client);
        seen_after(&file, b"the capture ends", || drop(marker.send_to(b"the capture ends", to)));
        assert!(tshark.is_running());
        drop(tshark);
        let bnd = server.wait_log(|log| log.contains("command=udp"));
        let relay = bnd
            .lines()
            .find(|line| line.contains("command=udp"))
            .and_then(|line| line.split("bnd=127.0.0.1:").nth(1)?.split(' ').next());
        let relay = relay.expect("the relay's port");
        // What goes between client and server, and not what the server says to the targets.
        let filter = format!("tcp.port == {port} || udp.port == {relay}");
        let mut read = Command::new("tshark");
        read.args(["-T", "fields", "-e", "tcp.payload", "-e", "udp.payload", "-Y", &filter, "-r"]).arg(&file);
        let hex = String::from_utf8(stdout(&mut read, b"")).expect("hexadecimal");
        assert!(hex.lines().count() > 10, "all was captured");
        for what in [SENT, ANSWERED, b"a secret datagram"] {
            let what: String = what.iter().map(|octet| format!("{octet:02x}")).collect();
            assert_eq!(hex.contains(&what), *level == "integrity", "{level}: {what}");
        }
    }
}

/// Does something again and again until a file has these octets.
fn seen_after(file: &Path, octets: &[u8], act: impl Fn()) {
    wait_until("it is captured", TIMEOUT, || {
        act();
        std::fs::read(file).is_ok_and(|all| contains(&all, octets))
    });
}
