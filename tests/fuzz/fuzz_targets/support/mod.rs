//! Helpers of the fuzz targets.

#![allow(dead_code, reason = "each fuzz target uses its own part")]

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use s5::cmd::{self, Action};

/// Returns the pieces of an input: each has its length in the first byte.
pub fn pieces(mut rest: &[u8]) -> Vec<&[u8]> {
    let mut pieces = Vec::new();
    while let [length, tail @ ..] = rest {
        let (piece, tail) = tail.split_at(usize::from(*length).min(tail.len()));
        pieces.push(piece);
        rest = tail;
    }
    pieces
}

/// Returns a path for a socket or a file of this process. Earlier ones with this name are removed: libFuzzer ends
/// without cleaning up.
pub fn temp_path(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("s5-fuzz-{name}"));
    let _ = std::fs::remove_file(&path);
    path
}

/// Starts `s5 serve` on a thread of this process at the first call, and returns its Unix socket and its TCP address.
/// Accepts clients without a login, and user "u" with password "p". Without the sandbox, which would hold for the
/// fuzzer.
pub fn server() -> &'static (PathBuf, SocketAddr) {
    static ADDRS: OnceLock<(PathBuf, SocketAddr)> = OnceLock::new();
    ADDRS.get_or_init(|| {
        let has_route = UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.connect("192.0.2.1:9")).is_ok();
        assert!(!has_route, "run this target with make fuzz, in a network namespace: inputs name random targets");
        let (path, users) = (temp_path("server"), temp_path("users"));
        let hash = bcrypt::hash("p", 4).expect("hashed");
        std::fs::write(&users, format!("u:{hash}\n")).expect("written");
        let addr = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("free port");
        let args = format!(
            "s5 serve --listen unix:{} --listen {addr} --threads 1 --auth none,password --users {} --no-sandbox \
             --handshake-timeout 1s --bind-timeout 200ms --connect-timeout 200ms",
            path.display(),
            users.display()
        );
        let args: Vec<String> = args.split_whitespace().map(str::to_owned).collect();
        let Ok(Action::Run(mode)) = cmd::parse(&args) else { panic!("valid arguments") };
        thread::spawn(move || panic!("the server has ended: {:?}", mode.run(Vec::new())));
        let deadline = Instant::now() + Duration::from_secs(10);
        while UnixStream::connect(&path).is_err() {
            assert!(Instant::now() < deadline, "the server does not listen");
            thread::sleep(Duration::from_millis(5));
        }
        (path, addr)
    })
}
