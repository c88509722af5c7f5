//! The bytes on the network: with encryption, requests, data and replies must not be readable.

use crate::*;

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
    let target = tcp_server(V4, |mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).expect("closed");
        stream.write_all(SERVER_DATA).expect("sent");
    });
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
